"""How much memory is given to what: the number of slots, and of steps in the record."""

import math
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import without_saving
from .._method.base import AbstractReversibleSolver
from .forward import Forward
from .recomputed import StepPullback
from .segments import Segments
from .steps import BLOCK, Format


# The most there are, and how many with `max_steps=None`; and so for steps.
_SLOTS = 32
_WINDOW = 2**16
# The checkpoints that the memory of a solve without a bound is compared with; and what
# part of it is taken for states, as the loops need some too.
_NO_BOUND = 64
_PART = 0.6
# A segment of fewer steps takes longer than what is saved by it.
_SHORT = 16
# A record of fewer bytes than this is never too long. (So that of `UReversible` is not,
# with the host's default for `max_steps`.)
_FEW_BYTES = 3 * 2**14


def made_jump_example(stepsize_controller, init_state, args) -> Any:
    """`False` if no step of a solve follows a jump, or else a boolean array."""
    # The host keeps `made_jump` a Python `False` if the controller never reports a
    # jump, so we find that out as it does.
    _, _, _, made_jump, _, _ = eqx.filter_eval_shape(
        stepsize_controller.adapt_step_size,
        init_state.tprev,
        init_state.tnext,
        init_state.y,
        init_state.y,
        args,
        init_state.y,
        1.0,
        init_state.controller_state,
    )
    if made_jump is False and init_state.made_jump is False:
        return False
    return jnp.asarray(init_state.made_jump)


def make_segments(
    pullback: StepPullback,
    init_state,
    made_jump: Any,
    max_steps: int | None,
    checkpoints: int | Literal["auto"],
) -> Segments:
    """As many states as fit into the memory of the default adjoint."""
    # (With a place for one state, and for one start of a step.)
    segments = Segments(pullback, made_jump, 1, 0)
    if checkpoints != "auto":
        return segments.of_size(*_shared_out(checkpoints, max_steps))
    num = _NO_BOUND if max_steps is None else _num_checkpoints(max_steps)
    of_host = num * _num_bytes(without_saving(init_state))
    of_own = _num_bytes(
        (segments.empty_slots(init_state), segments.empty_starts(init_state))
    )
    # As many of one as of the other: then each step is recomputed once, if there are no
    # more of them than the square of this.
    num = max(int(_PART * of_host / of_own), 1)
    if max_steps is not None:
        num = min(num, math.ceil(math.sqrt(max_steps)))
    return segments.of_size(num, num)


def _shared_out(num: int, max_steps: int | None) -> tuple[int, int]:
    """So many states among the slots and the segment at hand: whose steps are few if
    there are slots for all of the segments."""
    length = max(num - num // 2, 1)
    if max_steps is not None and num**2 > 4 * max_steps:
        # The smaller solution of `(num - length) * length == max_steps`.
        few = math.ceil((num - math.sqrt(num**2 - 4 * max_steps)) / 2)
        length = max(few, min(length, _SHORT))
        return min(num - length, -(-max_steps // length)), length
    return num - length if num > 0 else 0, length


def make_forward(
    solver: AbstractReversibleSolver,
    init_state,
    example: Any,
    max_steps: int | None,
    checkpoints: int | Literal["auto"],
    checkpoint_every: int | None,
    records_all: bool = False,
) -> Forward:
    num_slots = _num_slots(max_steps) if checkpoints == "auto" else checkpoints
    if max_steps is None:
        length, is_window = _WINDOW, True
    else:
        # (Never more slots than steps.)
        num_slots = min(num_slots, max_steps)
        num_bytes = jnp.dtype(init_state.tnext.dtype).itemsize + 1
        num_bytes += _num_bytes(solver.recorded(init_state.solver_state))
        state_bytes = _num_bytes((init_state.y, init_state.solver_state))
        enough = max(_num_checkpoints(max_steps) * state_bytes // 2, _FEW_BYTES)
        length = min(max(enough // num_bytes, 8 * BLOCK), _WINDOW)
        is_window = max_steps > length and not records_all
        length = length if is_window else max(max_steps, 1)
    format = Format(solver, example, length, is_window)
    grid = -(-format.length // 2) if is_window else -(-length // (num_slots + 1))
    # (A whole number of blocks: then one turn of the way back goes from one to the
    # next.)
    grid = -(-grid // BLOCK) * BLOCK
    return Forward(solver, format, num_slots, checkpoint_every, grid)


def _num_checkpoints(max_steps: int) -> int:
    """Those of `RecursiveCheckpointAdjoint`, by default: no more memory than for these
    is to be taken."""
    return math.ceil(-1.5 + math.sqrt(2 * max_steps + 0.25))


def _num_slots(max_steps: int | None) -> int:
    if max_steps is None:
        return _SLOTS
    return min(max(_num_checkpoints(max_steps) // 2 - 2, 2), _SLOTS)


def _num_bytes(tree: PyTree) -> int:
    leaves = [x for x in jtu.tree_leaves(tree) if eqx.is_array(x)]
    return sum(x.size * x.dtype.itemsize for x in leaves)
