"""How much memory is given to what: to stored states, to those of a segment, and to the
record of steps."""

import math
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import without_saving
from .hoist import Hoister
from .noise import Noise
from .pullback import AbstractPullback, Step
from .segments import Segments
from .step_record import Recorder


# The checkpoints that the memory of a solve without a bound is compared with; and what
# part of it is taken for states, as the loops need some too: or the second part, if
# that is enough to recompute each step just once. If it is not then all is taken, but
# for what a step takes in addition to one of the default adjoint: so many bytes of the
# loops, and what a pullback keeps of all of its stages but two.
_NO_BOUND = 64
_PART = 0.6
_PART_IF_ENOUGH = 0.8
_OF_LOOPS = 6000
_STAGES_OF_HOST = 2
# The default adjoint keeps the gradients of constants more than once, if there are any.
# Of the memory of constants (or that of half of the checkpoints, if that is less) so
# much is counted too.
_PART_OF_CONSTS = 1 / 6
# If steps can be undone: half of how many states there are, if they take more than few
# bytes; what part of that memory is taken for the record, or twice that if steps are
# uniform (as all of them may fit then); and the most steps in it.
_HALF_IF_LARGE = 16
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


def add_functions(
    pullback: AbstractPullback,
    hoister: Hoister,
    terms,
    args,
    step: Step,
    init_state,
    max_steps: int | None,
) -> None:
    """Those of the `pullback`: so that what is within a stage is kept, if there is room
    for that beside the states, and recomputed if there is not."""
    pullback.add_functions(hoister, terms, args, step)
    room = (1 - _PART) * _bytes_of_host(init_state, max_steps)
    room += _PART_OF_CONSTS * hoister.bytes_of_consts
    # (What has effects cannot be recomputed.)
    has_effects = hoister.has_effects(pullback.name_of_differentiated)
    bytes_of_stages = _bytes_of_stages(pullback, hoister)
    if bytes_of_stages > max(room, _OF_LOOPS) and not has_effects:
        pullback.recomputes_stages = True
        pullback.add_functions(hoister, terms, args, step)


def make_segments(
    pullback: AbstractPullback,
    noise: Noise,
    init_state,
    made_jump: Any,
    hoister: Hoister,
    *,
    is_uniform: bool,
    max_steps: int | None,
    checkpoints: int | Literal["auto"],
    checkpoint_every: int | None,
) -> Segments:
    """As many states as fit into the memory of the default adjoint, unless the user
    says how many. The `hoister` has the functions of the `pullback`."""
    of_host = _bytes_of_host(init_state, max_steps)
    of_grads = min(_PART_OF_CONSTS * hoister.bytes_of_consts, of_host / 2)
    # (With a place for one state, and for one start of a step.)
    one = Segments(pullback, noise, made_jump, None, is_uniform, False, 1, 0)
    of_slot = _num_bytes(one.empty_slots(init_state))
    of_start = _num_bytes(one.empty_starts(init_state))
    # (A step that is undone asks for them anew. And if they are much larger than the
    # state, then there would be room for so few that most steps are recomputed often.)
    of_noise = _num_bytes(noise.no_increments())
    has_increments = not pullback.undoes and 0 < of_noise <= of_slot + of_start
    if has_increments:
        of_start += of_noise
    recorder = None
    if pullback.undoes:
        of_host += of_grads
        num_slots, length = _undone(of_host, of_slot + of_start, max_steps)
        if checkpoints != "auto":
            num_slots, length = share_out_undone(checkpoints, max_steps)
        has_jumps = made_jump is not False
        recorder = Recorder(
            pullback.solver,  # pyright: ignore[reportArgumentType]
            has_jumps,
            is_uniform and not has_jumps,
            checkpoint_every,
            1,
        )
        of_row = _num_bytes(recorder.empty(init_state, length))
        recorder = recorder.of_size(
            _num_rows(of_host, of_row, recorder.is_uniform, length, max_steps)
        )
    elif checkpoints == "auto":
        budget = _PART * (of_host + of_grads)
        if max_steps is not None:
            # That in which each step is recomputed once.
            enough = 2 * math.sqrt(max_steps * of_slot * of_start) + of_slot
            most = of_host - _OF_LOOPS - _bytes_of_stages(pullback, hoister)
            is_enough = enough <= _PART_IF_ENOUGH * of_host
            budget = max(budget, enough if is_enough else min(enough, most))
        num_slots, length = share_out_recomputed(budget, max_steps, of_slot, of_start)
        if length != max_steps:
            num_slots = max(num_slots, 1)
    else:
        num_slots, length = share_out_recomputed(float(checkpoints), max_steps)
    known = (pullback, noise, made_jump, recorder, is_uniform, has_increments)
    return Segments(*known, num_slots, length)


def _bytes_of_host(init_state, max_steps: int | None) -> int:
    num = _NO_BOUND if max_steps is None else num_checkpoints_of_host(max_steps)
    return num * _num_bytes(without_saving(init_state))


def _bytes_of_stages(pullback: AbstractPullback, hoister: Hoister) -> float:
    """What a step takes in addition to one of the default adjoint."""
    num = 1 if pullback.recomputes_stages else pullback.num_unrolled
    if num <= _STAGES_OF_HOST:
        return 0.0
    num_bytes = hoister.bytes_of_kept(pullback.name_of_differentiated)
    return (num - _STAGES_OF_HOST) / num * num_bytes


#
# If all steps are recomputed
#


def share_out_recomputed(
    budget: float, max_steps: int | None, of_slot: int = 1, of_start: int = 1
) -> tuple[int, int]:
    """A number of slots and a length of segments that fit into the budget. The steps of
    the last segment are not recomputed: so this is the longest for which there is a
    slot for each of the others. If there is none then half of the budget is for slots,
    as that leaves the fewest segments without one."""
    if max_steps is not None:
        # The larger solution of `(num_slots + 1) * length == max_steps`.
        half = (budget + of_slot) / (2 * of_start)
        root = half**2 - max_steps * of_slot / of_start
        length = min(int(half + math.sqrt(max(root, 0))) + 1, max_steps)
        while length**2 * of_start >= max_steps * of_slot:
            num_slots = -(-max_steps // length) - 1
            if num_slots * of_slot + length * of_start <= budget:
                return num_slots, length
            length -= 1
    length = max(math.ceil(budget / (2 * of_start)), 1)
    return max(int((budget - length * of_start) / of_slot), 0), length


#
# If steps can be undone
#


def _undone(of_host: float, of_state: int, max_steps: int | None) -> tuple[int, int]:
    """Half as many slots as steps of a segment (measured: a segment costs as much time
    as a few steps); and an odd number of these, see `Keeping`."""
    half = int(_PART * of_host / of_state)
    if max_steps is not None:
        half = min(half, math.ceil(math.sqrt(max_steps)))
    half = max(min(half, max(_HALF_IF_LARGE, _FEW_BYTES // of_state)), 1)
    length = half + half // 3
    return half - half // 3, length - 1 + length % 2


def _num_rows(
    of_host: float, of_row: int, is_uniform: bool, length: int, max_steps: int | None
) -> int:
    """Of the record: of how many segments it has the steps."""
    part = _PART_OF_RECORD * (2 if is_uniform else 1)
    num = int(min(part * of_host / of_row, _MOST_STEPS / length))
    if max_steps is not None:
        num = min(num, -(-max_steps // length))
    return max(num, 1)


def share_out_undone(num: int, max_steps: int | None) -> tuple[int, int]:
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


def num_checkpoints_of_host(max_steps: int) -> int:
    """Those of `RecursiveCheckpointAdjoint`, by default: no more memory than for these
    is to be taken."""
    return math.floor(-1.5 + math.sqrt(2 * max_steps + 0.25)) + 1


def _num_bytes(tree: PyTree) -> int:
    leaves = [x for x in jtu.tree_leaves(tree) if eqx.is_array(x)]
    return sum(x.size * x.dtype.itemsize for x in leaves)
