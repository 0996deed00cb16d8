"""States that are kept, in a fixed number of slots."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._method.tree import tree_where
from .index import put, rem, take, take_all


_NO_STEP = 2**31 - 1


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
        return take(self.order, jnp.maximum(k, 0))

    def top(self) -> Array:
        """The number of the step on top; if there is none then 0, the start."""
        k = self.count - 1
        return jnp.where(k >= 0, take(self.numbers, self._slot(k)), 0)

    def top_state(self, initial: PyTree) -> PyTree:
        slot, is_empty = self._slot(self.count - 1), self.count == 0
        return tree_where(is_empty, initial, take(self.states, slot))

    def push(self, number: Array, state: PyTree, pred: Any) -> "Slots":
        """Puts a state on top, if `pred`. (There must be a free slot then.)"""
        slot = self._slot(jnp.minimum(self.count, self.size - 1))
        return self._replace(
            numbers=put(self.numbers, slot, number, pred),
            states=put(self.states, slot, state, pred),
            count=self.count + jnp.where(pred, 1, 0),
        )

    def sealed(self) -> "Slots":
        """Ready for `before`, for which the free slots have the number of no step."""
        is_used = jnp.arange(self.size) < self.count
        numbers = jnp.where(is_used, take_all(self.numbers, self.order), _NO_STEP)
        numbers = jnp.zeros_like(numbers).at[self.order].set(numbers)
        return self._replace(numbers=numbers)

    def emptied(self, pred: Any) -> "Slots":
        """Without all states, if `pred`."""
        return self._replace(
            numbers=jnp.where(pred, _NO_STEP, self.numbers),
            count=jnp.where(pred, 0, self.count),
        )

    def before(self, number: Array) -> "Slots":
        """Without the states from that step on, now and ever after."""
        return self._replace(count=jnp.sum(self.numbers < number))


def empty(size: int, state: PyTree) -> Slots:
    """For `size` states like this one, of arrays."""

    def make(x):
        return jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x))

    zero = jnp.array(0)
    return Slots(make(zero), jtu.tree_map(make, state), jnp.arange(size), zero)


class Keeping(NamedTuple):
    """Which states are stored, if it is not known how many there will be: those at the
    starts of all segments. Once the slots are full they are thinned from the bottom,
    and no more than is needed: of three states the last is left. So all slots are in
    use, and the spacing is wide where the solve began, and a third of that where it has
    got to. (Once it is wide throughout it begins anew, with three times the spacing.)

    If all segments have an odd number of steps, as they do but in a batch with rejected
    steps, then there are always an odd number between two states. (What goes wrong in
    every other step, as a sign that a `backward_step` forgets, would be right after an
    even number of them.)"""

    slots: Slots
    # Of the segments those whose number is a multiple of this are stored; and of the
    # states at the bottom so many are left from three.
    every: Array
    num_wide: Array

    @classmethod
    def of(cls, slots: Slots) -> "Keeping":
        zero = jnp.zeros_like(slots.count)
        return cls(slots, zero + 1, zero)

    def add(self, k: Array, number: Array, state: PyTree, pred: Array) -> "Keeping":
        """If `pred`, the start of the `k`th segment (from 0 on), which is that of the
        step with this `number`."""
        slots, every, wide = self
        pred = pred & (rem(k, every) == 0)
        is_full = pred & (slots.count == slots.size)
        thins = is_full & (slots.size - wide >= 3)
        is_wide = is_full & ~thins
        # (The two slots that are freed come last, as those that are free do; no state
        # is copied.)
        places = jnp.arange(slots.size)
        after = jnp.where(places < slots.size - 2, places + 2, places + 2 - slots.size)
        freed = after + jnp.where(places < slots.size - 2, 0, wide)
        places = jnp.where(thins & (places >= wide), freed, places)
        count = jnp.where(thins, slots.count - 2, slots.count)
        slots = slots._replace(
            order=take_all(slots.order, places), count=jnp.where(is_wide, wide, count)
        )
        every = jnp.where(is_wide, 3 * every, every)
        wide = jnp.where(is_wide, 0, wide + jnp.where(thins, 1, 0))
        pred = pred & (rem(k, every) == 0)
        return Keeping(slots.push(number, state, pred), every, wide)
