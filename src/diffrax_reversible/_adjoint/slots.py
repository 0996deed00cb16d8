"""States that are kept, in a fixed number of slots."""

from typing import Any, NamedTuple

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

    def drop_every_other(self, base: Array, pred: Array) -> "Slots":
        """Of those above the first `base`, if `pred`, frees the 1st, 3rd, 5th, ..."""
        k = jnp.arange(self.size)
        above, num_above = k - base, self.count - base
        num_kept = num_above // 2
        # Those that stay, and then those that are free now.
        old = jnp.where(above < num_kept, 2 * above + 1, 2 * (above - num_kept))
        is_moved = pred & (above >= 0) & (k < self.count)
        return self._replace(
            order=self.order[jnp.where(is_moved, base + old, k)],
            count=jnp.where(pred, base + num_kept, self.count),
        )


def empty(size: int, state: PyTree) -> Slots:
    """For `size` states like this one, of arrays."""

    def make(x):
        return jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x))

    zero = jnp.array(0)
    return Slots(make(zero), jtu.tree_map(make, state), jnp.arange(size), zero)


class Keeping(NamedTuple):
    """Which of the candidates are kept, if it is not known how many there will be: each
    `stride`th of them. When the slots are full, every other one of them is dropped, and
    the stride is doubled. So they are always spread evenly."""

    slots: Slots
    # Those slots that are not to be touched.
    base: Array
    stride: Array
    num_candidates: Array

    def add(
        self, number: Array, state: PyTree, pred: Array, capacity: Any
    ) -> "Keeping":
        """The next candidate, if `pred`. No more than `capacity` slots are used."""
        num_candidates = self.num_candidates + jnp.where(pred, 1, 0)
        is_kept = pred & (num_candidates % self.stride == 0)
        is_full = is_kept & (self.slots.count >= capacity)
        stride = jnp.where(is_full, 2 * self.stride, self.stride)
        # (This copies no state.)
        slots = self.slots.drop_every_other(self.base, is_full)
        # There may be no room even so.
        is_kept = is_kept & (num_candidates % stride == 0) & (slots.count < capacity)
        return self._replace(
            slots=slots.push(number, state, is_kept),
            stride=stride,
            num_candidates=num_candidates,
        )
