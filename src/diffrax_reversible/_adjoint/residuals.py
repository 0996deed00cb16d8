"""What is left of a solve for the backward pass."""

from typing import Any, NamedTuple

import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_save_state
from .save import Saved
from .slots import Slots
from .step_record import Marks, Starts, StepRecord


class Residuals(NamedTuple):
    """What is left of a solve for the backward pass."""

    # That of the last segments, and what is left of the marks at the end. `None` if no
    # step can be undone.
    steps: StepRecord | None
    marks: Marks | None
    slots: Slots
    # How many states were wanted.
    num_wanted: Any
    # The end of the last accepted step.
    t_last: Array
    # Of the last steps.
    starts: Starts


class Ends(NamedTuple):
    """What is kept of the final state."""

    y: PyTree
    solver_state: PyTree
    tprev: Array
    num_steps: Array
    # The end of the last accepted step.
    t_last: Array
    saved: list[Saved]
    # `(None, None)` if there are no events.
    event_times: tuple[Any, Any]
    # Whether the solve has ended at a root, within the last step. `False` if it cannot.
    is_root: Any

    @classmethod
    def of(cls, final_state, residuals: Residuals, is_root: Any) -> "Ends":
        return cls(
            final_state.y,
            final_state.solver_state,
            final_state.tprev,
            final_state.num_accepted_steps,
            residuals.t_last,
            [
                Saved(s.saveat_ts_index, s.save_index)
                for s in jtu.tree_leaves(final_state.save_state, is_leaf=is_save_state)
            ],
            (final_state.event_tprev, final_state.event_tnext),
            is_root,
        )
