"""Making states again: forwards from one that is kept, by the recorded times, jumps and
couplings.

There is no step size controller in this, nothing is saved, and no step is rejected.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .functions import Functions
from .slots import Slots
from .steps import BLOCK, Format, Window
from .vmap import where_active


class _Carry(NamedTuple):
    # The number of the step that starts at `state`: the arrays of `(y, solver_state)`.
    number: Array
    state: PyTree
    # How many have been met that are wanted.
    num_met: Array
    slots: Slots


def make_again(
    format: Format,
    fns: Functions,
    window: Window,
    slots: Slots,
    kept_initial: PyTree,
    initial: tuple[PyTree, PyTree],
    stop: Array,
    pred: Array,
    goes_on: Array,
    capacity: Any,
    located: Callable,
) -> tuple[Slots, tuple[PyTree, PyTree]]:
    """Puts the start of the step number `stop` on top of the stack, if `pred`, made
    again from what is on top now. States in between that are wanted are put into the
    slots that are free, up to `capacity`, evenly. If it `goes_on`, then the step that
    starts at what is on top is made too. Returns also the state at the end of the last
    step."""
    start = slots.top()
    stop = jnp.where(pred, stop, start)
    end = stop + jnp.where(goes_on, 1, 0)
    num_wanted = format.count_wanted(window, start, stop) + 1
    free = jnp.maximum(capacity - slots.count, 0)
    stride = -(-num_wanted // (free + 1))

    static = eqx.filter(initial, eqx.is_array, inverse=True)
    # (The rest is for the host's loop, which never begins at a state from here.)
    top, rest = slots.top_state(kept_initial)

    def advance(carry: _Carry) -> _Carry:
        first = carry.number
        # An element of a batch that is there reads the last step again.
        numbers = first + jnp.arange(BLOCK)
        block = format.read(window, jnp.minimum(numbers, jnp.maximum(end - 1, first)))
        last = jnp.minimum(jnp.where(first < stop, stop, end), first + BLOCK)
        # To the next that is wanted.
        is_next = block.is_wanted & (numbers > first) & (numbers < last)
        last = jnp.min(jnp.where(is_next, numbers, last))

        def proceeds(number__state):
            number, _ = number__state
            return eqxi.unvmap_any(number < last)

        def make_step(number__state):
            number, state = number__state
            is_active = number < last
            k = number - first
            _, t0, t1, made_jump = block.times(k)
            t0, t1 = located(number, t0, t1)
            y0, solver_state0 = eqx.combine(state, static)
            solver_state0 = format.read_recorded(
                block, solver_state0, k, solver_state0, window.every == 1
            )
            y1, solver_state1, _ = fns.call(
                "step", made_jump, t0, t1, y0, solver_state0
            )
            new_state = eqx.filter((y1, solver_state1), eqx.is_array)
            state = jtu.tree_map(
                lambda a, b: where_active(is_active, a, b), new_state, state
            )
            return number + jnp.where(is_active, 1, 0), state

        number, state = lax.while_loop(proceeds, make_step, (carry.number, carry.state))
        has_moved = number > first
        is_stop = has_moved & (number == stop)
        num_met = carry.num_met + jnp.where(has_moved & jnp.any(is_next), 1, 0)
        is_kept = has_moved & ~is_stop & jnp.any(is_next) & (num_met % stride == 0)
        is_kept = is_kept & (carry.slots.count < capacity)
        slots = carry.slots.push(number, (state, rest), is_kept | is_stop)
        return _Carry(number, state, num_met, slots)

    carry = lax.while_loop(
        lambda carry: eqxi.unvmap_any(carry.number < end),
        advance,
        _Carry(start, top, jnp.zeros_like(start), slots),
    )
    return carry.slots, eqx.combine(carry.state, static)
