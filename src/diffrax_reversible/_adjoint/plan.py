"""How much memory is given to what: to stored states, to those of a segment, and to the
record of steps."""

import math
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import without_saving
from .noise import Noise
from .pullback import AbstractPullback
from .record import Recorder
from .segments import Segments


# The checkpoints that the memory of a solve without a bound is compared with; and what
# part of it is taken for states, as the loops need some too.
_NO_BOUND = 64
_PART = 0.6
# It keeps their gradients more than once, if there are any. Of the memory of constants
# (or that of half of the checkpoints, if that is less) so much is counted too.
_PART_OF_CONSTS = 1 / 6
# If steps can be undone: the most states that are stored, and as many of a segment, if
# they take more than a few bytes; what part of that memory is taken for the record, or
# twice that if steps are even (as all of them may fit then); and the most steps in it.
_MOST = 16
_FEW_BYTES = 2**16
_PART_OF_RECORD = 0.2
_MOST_STEPS = 2**16
# A segment of fewer steps takes longer than what is saved by it.
_SHORT = 16


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
    pullback: AbstractPullback,
    noise: Noise,
    init_state,
    made_jump: Any,
    is_even: bool,
    num_bytes: int,
    max_steps: int | None,
    checkpoints: int | Literal["auto"],
    checkpoint_every: int | None,
) -> Segments:
    """As many states as fit into the memory of the default adjoint. `num_bytes` are
    those of the constants of a step."""
    num = _NO_BOUND if max_steps is None else _num_checkpoints(max_steps)
    of_host = num * _num_bytes(without_saving(init_state))
    of_host += min(_PART_OF_CONSTS * num_bytes, of_host / 2)
    recorder = None
    if pullback.undoes:
        has_jumps = made_jump is not False
        recorder = Recorder(
            pullback.solver,  # pyright: ignore[reportArgumentType]
            has_jumps,
            is_even and not has_jumps,
            checkpoint_every,
            1,
        )

    # (With a place for one state, and for one start of a step.)
    one = Segments(pullback, noise, made_jump, None, False, 1, 0)
    of_own = _num_bytes((one.empty_slots(init_state), one.empty_starts(init_state)))
    # (A step that is undone asks for them anew. And if they are much larger than the
    # state, then there would be room for so few that most steps are recomputed often.)
    of_noise = _num_bytes(noise.no_increments())
    has_increments = not pullback.undoes and 0 < of_noise <= of_own
    if has_increments:
        of_own += of_noise
    if checkpoints == "auto":
        # As many of one as of the other: then each step is recomputed once, if there
        # are no more of them than the square of this.
        num = max(int(_PART * of_host / of_own), 1)
        if max_steps is not None:
            num = min(num, math.ceil(math.sqrt(max_steps)))
        num_slots = length = num
        if pullback.undoes:
            # (An odd number of steps.)
            num_slots = min(num, max(_MOST, _FEW_BYTES // of_own))
            length = num_slots - 1 + num_slots % 2
    else:
        num_slots, length = _shared_out(checkpoints, max_steps)
    if recorder is not None:
        of_row = _num_bytes(recorder.empty(init_state, length))
        part = _PART_OF_RECORD * (2 if recorder.is_even else 1)
        num_rows = int(min(part * of_host / of_row, _MOST_STEPS / length))
        if max_steps is not None:
            num_rows = min(num_rows, -(-max_steps // length))
        recorder = recorder.of_size(max(num_rows, 1))
    return Segments(
        *(pullback, noise, made_jump, recorder, has_increments, num_slots, length)
    )


def _shared_out(num: int, max_steps: int | None) -> tuple[int, int]:
    """So many states among the slots and the segment at hand: whose steps are few if
    there are slots for all of the segments."""
    few, length = 1, max(num - num // 2, 1)
    if max_steps is not None and num**2 > 4 * max_steps:
        # The smaller solution of `(num - length) * length == max_steps`.
        few = math.ceil((num - math.sqrt(num**2 - 4 * max_steps)) / 2)
        length = max(few, min(length, _SHORT, max_steps))
    # (An odd number of steps, see `Keeping`.)
    if length % 2 == 0:
        length += 1 if length == few and length + 1 < num else -1
    num_slots = max(num - length, 0)
    if max_steps is not None:
        num_slots = min(num_slots, -(-max_steps // length))
    return num_slots, length


def _num_checkpoints(max_steps: int) -> int:
    """Those of `RecursiveCheckpointAdjoint`, by default: no more memory than for these
    is to be taken."""
    return math.ceil(-1.5 + math.sqrt(2 * max_steps + 0.25))


def _num_bytes(tree: PyTree) -> int:
    leaves = [x for x in jtu.tree_leaves(tree) if eqx.is_array(x)]
    return sum(x.size * x.dtype.itemsize for x in leaves)
