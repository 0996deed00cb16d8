"""Records of a part of the steps, where there are more than can be recorded.

A window is what can be read of a record. If it is over, then the steps before are made
again, by the host's loop: from the last state that is kept, for as many steps as there
is room for.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .forward import Forward, Record
from .slots import Slots
from .steps import BLOCK, Window
from .undo import Carry


class Windows:
    def __init__(
        self,
        forward: Forward,
        init_state,
        num_steps: Array,
        record: Record,
        rerun: Callable,
    ):
        self._forward = forward
        self._format = forward.format
        self._num_steps = num_steps
        self._record = record
        # (first step, its kept start, slots, capacity, end) -> (kept end, record)
        self._rerun = rerun
        self.kept_initial = forward.kept(init_state, init_state.tprev)

    @property
    def _most(self) -> int:
        """How many steps there can be in a window, if not all are recorded. (In the
        place of the oldest row is the last, which may not be full.)"""
        return self._format.length - BLOCK

    @property
    def covers_all(self) -> Any:
        """Whether all steps are in the record that was made on the way forward."""
        return self._num_steps <= self._most

    def first_window(self, window: Window) -> Window:
        """What can be read of the record that was made on the way forward. It begins at
        a state that is kept; if there is none, with the last step."""
        n, slots = self._num_steps, self._record.slots
        least = jnp.maximum(n - self._most, 0)
        is_used = (
            jnp.zeros(slots.size, bool)
            .at[slots.order]
            .set(jnp.arange(slots.size) < slots.count)
        )
        numbers = jnp.where(is_used & (slots.numbers >= least), slots.numbers, n)
        first = jnp.where(least == 0, 0, jnp.min(numbers))
        t_first = self._format.end(window.steps, jnp.maximum(first - 1, 0))
        t_first = jnp.where(first == 0, window.t_first, t_first)
        return window._replace(first=first, t_first=t_first)

    def next_window(
        self, carry: Carry, slots: Slots, window: Window
    ) -> tuple[Carry, Slots, Window]:
        """If there are no more steps to be undone in this window, makes those before
        again. (They may differ, by what the solution makes of rounding. But so may all
        steps that any adjoint makes again.)"""
        n, is_done = carry.num_steps, carry.num_steps == 0
        needs = ~is_done & (n <= window.first)

        def proceeds(loop):
            _, _, window = loop
            return eqxi.unvmap_any(needs & (window.first >= n))

        def run(loop):
            carry, slots, window = loop
            start = slots.top()
            # What is at hand, and where a window begins, have slots of their own.
            least = n - self._most
            is_last = start >= least
            stop = jnp.where(is_last, n, least)
            # (An element that need not, makes no step.)
            stop = jnp.where(needs, stop, start)
            kept = slots.top_state(self.kept_initial)
            _, (_, t_first) = kept
            used = slots.count + jnp.where(is_last, 0, 1)
            free = jnp.maximum(self._forward.num_slots + 1 - used, 0)
            capacity = slots.count + jnp.where(is_last, free, free // 2)
            capacity = jnp.minimum(capacity, slots.size - 1)
            end, record = self._rerun(start, kept, slots, capacity, stop)
            slots = record.slots.push(stop, end, needs & ~is_last)
            new = Window(record.steps, start, t_first, window.every)
            takes = needs & is_last
            window = jtu.tree_map(lambda a, b: jnp.where(takes, a, b), new, window)
            # To be undone from its own end.
            y1, solver_state = restored(takes, end, (carry.y1, carry.solver_state))
            t1 = jnp.where(takes, record.t_last, carry.t1)
            carry = carry._replace(t1=t1, y1=y1, solver_state=solver_state)
            return carry, slots, window

        return lax.while_loop(proceeds, run, (carry, slots, window))


def restored(pred, kept: PyTree, state: PyTree) -> PyTree:
    """`(y, solver_state)`, or if `pred` that which was kept."""
    arrays, _ = kept
    old, static = eqx.partition(state, eqx.is_array)
    new = jtu.tree_map(lambda a, b: jnp.where(pred, a, b), arrays, old)
    return eqx.combine(new, static)
