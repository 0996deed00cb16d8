"""States that are kept, in a fixed number of slots."""

from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi


class Slots(NamedTuple):
    """A stack of states. Below it lies the start of the solve, which needs no slot."""

    # Of each slot: the number of the step whose start is kept, and that state. In the
    # host's loop the states are buffers.
    numbers: Array
    states: PyTree
    # The slots from the bottom of the stack to its top, then those that are free.
    order: Array
    # How many are in use.
    count: Array

    @property
    def size(self) -> int:
        return self.order.shape[0]

    def _slot(self, k: Array) -> Array:
        return self.order[jnp.maximum(k, 0)]

    def top(self) -> Array:
        """The number of the step on top; if there is none then 0, the start."""
        k = self.count - 1
        return jnp.where(k >= 0, self.numbers[self._slot(k)], 0)

    def top_state(self, initial: PyTree) -> PyTree:
        slot, is_empty = self._slot(self.count - 1), self.count == 0
        return jtu.tree_map(
            lambda x, buffer: jnp.where(is_empty, x, buffer[slot]),
            initial,
            self.states,
        )

    def push(self, number: Array, state: PyTree, pred: Any) -> "Slots":
        """Puts a state on top, if `pred`. (There must be a free slot then.)"""
        slot = self._slot(jnp.minimum(self.count, self.size - 1))

        def put(x, buffer):
            if hasattr(buffer, "_array"):
                return eqxi.buffer_at_set(buffer, slot, x, pred=pred)
            return buffer.at[slot].set(jnp.where(pred, x, buffer[slot]))

        return self._replace(
            numbers=put(number.astype(self.numbers.dtype), self.numbers),
            states=jtu.tree_map(put, state, self.states),
            count=self.count + jnp.where(pred, 1, 0),
        )

    def pop(self, pred: Array) -> "Slots":
        return self._replace(count=self.count - jnp.where(pred, 1, 0))

    def keep_only(self, is_kept: Array, pred: Array) -> "Slots":
        """Of those in use, if `pred`, frees all others. `is_kept` is in the order of
        the stack. (This copies no state.)"""
        is_used = jnp.arange(self.size) < self.count
        is_kept = jnp.where(pred, is_kept, True) & is_used
        num_kept = jnp.sum(is_kept)
        # Those that stay, and then those that are free, each in their order.
        place = jnp.where(is_kept, jnp.cumsum(is_kept), num_kept + jnp.cumsum(~is_kept))
        order = jnp.zeros_like(self.order).at[place - 1].set(self.order)
        return self._replace(order=order, count=num_kept.astype(self.count.dtype))


def empty(size: int, state: PyTree) -> Slots:
    """For `size` states like this one, of arrays."""

    def make(x):
        return jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x))

    zero = jnp.array(0)
    return Slots(make(zero), jtu.tree_map(make, state), jnp.arange(size), zero)


class Keeping(NamedTuple):
    """Which states are kept, if it is not known how many there will be. When the slots
    are full, those that are not wanted are dropped. If there are none, then every other
    one is dropped, and from then on half as many of those wanted are kept: so they are
    always spread evenly."""

    slots: Slots
    # Those slots, from the bottom of the stack, that are not to be touched.
    base: Array
    # Of each slot: whether the state in it is wanted.
    is_wanted: Array
    # Of how many that are wanted one is kept, and how many there were.
    stride: Array
    num_wanted: Array

    @classmethod
    def of(cls, slots: Slots) -> "Keeping":
        zero = jnp.zeros_like(slots.count)
        return cls(slots, slots.count, jnp.zeros(slots.size, bool), zero + 1, zero)

    def add(
        self, number: Array, state: PyTree, pred: Array, is_wanted: Array, capacity: Any
    ) -> "Keeping":
        """The next state, if `pred`. No more than `capacity` slots are used."""
        num_wanted = self.num_wanted + jnp.where(is_wanted, 1, 0)
        pred = pred & (~is_wanted | (num_wanted % self.stride == 0))
        is_full = pred & (self.slots.count >= capacity)
        order, count, stride = lax.cond(
            eqxi.unvmap_any(is_full),
            lambda: self._make_room(is_full, is_wanted),
            lambda: (self.slots.order, self.slots.count, self.stride),
        )
        # There may be no room even so.
        pred = pred & (~is_wanted | (num_wanted % stride == 0)) & (count < capacity)
        slots = self.slots._replace(order=order, count=count)
        slots = slots.push(number, state, pred)
        slot = order[jnp.minimum(count, slots.size - 1)]
        here = (jnp.arange(slots.size) == slot) & pred
        return self._replace(
            slots=slots,
            is_wanted=jnp.where(here, is_wanted, self.is_wanted),
            stride=stride,
            num_wanted=num_wanted,
        )

    def _make_room(self, pred: Array, is_wanted: Array) -> tuple[Array, Array, Array]:
        """`slots.order`, `slots.count` and `stride`."""
        k = jnp.arange(self.slots.size)
        others = ~self.is_wanted[self.slots.order]
        others = others & (k >= self.base) & (k < self.slots.count)
        has_others = jnp.any(others)
        halves = pred & is_wanted & ~has_others
        dropped = jnp.where(
            has_others, others, (k >= self.base) & ((k - self.base) % 2 == 0)
        )
        slots = self.slots.keep_only(~dropped, halves | (pred & has_others))
        return slots.order, slots.count, jnp.where(halves, 2 * self.stride, self.stride)
