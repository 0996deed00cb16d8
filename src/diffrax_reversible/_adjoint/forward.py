"""The host's loop over steps, with a record of them."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_save_state, without_saving
from .._jax_compat import eqxi
from .._method.base import AbstractReversibleSolver
from .._method.coupling import AbstractCouplingSolver
from .._method.tree import replace, same_struct, stop_gradient
from . import slots as slots_
from .hoist import Hoister
from .save import Saved
from .slots import Keeping, Slots
from .steps import BLOCK, Format, Steps
from .vmap import together, where_active


class Record(NamedTuple):
    """What is left of a solve for the way back."""

    # Of all accepted steps, or of the last. Their number is in the host's state. (Or of
    # what is stored: to know whether the elements of a batch make the same steps.)
    steps: Any
    slots: Slots
    # How many states were wanted.
    num_wanted: Any
    # The end of the last accepted step. NaN if the times of steps cannot be had again
    # from `steps`.
    t_last: Array
    # Those of the last steps, if they are recomputed.
    starts: Any = None

    @property
    def is_consistent(self) -> Array:
        return ~jnp.isnan(self.t_last)


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
    def of(cls, final_state, record, is_root: Any) -> "Ends":
        return cls(
            final_state.y,
            final_state.solver_state,
            final_state.tprev,
            final_state.num_accepted_steps,
            record.t_last,
            [
                Saved(s.saveat_ts_index, s.save_index)
                for s in jtu.tree_leaves(final_state.save_state, is_leaf=is_save_state)
            ],
            (final_state.event_tprev, final_state.event_tnext),
            is_root,
        )


_KEPT, _WANTED = 1, 2
# By so many roundings an element moves that is at rest.
_ROUNDING = 8


class _Row(NamedTuple):
    """What is carried from step to step besides the host's state."""

    # The row that the last step is in, and how many steps have been copied into the
    # long record.
    steps: Steps
    num_copied: Array
    t_last: Array
    num_wanted: Array
    # Of the last step: `_KEPT` if its start may be kept, `_WANTED` if it is wanted; and
    # its start.
    mark: Array
    start: PyTree
    # Of each leaf of `y`: which elements the last accepted step has left as they were.
    held: list[Array]


class Forward:
    """How a solve is made, and made again.

    **Arguments:**

    - `checkpoint_every`: Of how many steps one is wanted anyway, or `None`.
    - `grid`: Of how many steps one may be kept, if there is room, for the comparison
        with what is rebuilt.
    """

    def __init__(
        self,
        solver: AbstractReversibleSolver,
        format: Format,
        num_slots: int,
        checkpoint_every: int | None,
        grid: int,
    ):
        self.solver = solver
        self.format = format
        self.num_slots = num_slots
        self._checkpoint_every = checkpoint_every
        self.grid = grid

    #
    # What is kept of a state
    #

    def kept(self, state, t_last: Array) -> PyTree:
        """Of the host's state, at the start of a step."""
        out = _arrays((state.y, state.solver_state))
        if not self.format.is_window:
            return out, None
        # The times of steps are then not all recorded, and have to be made again.
        return out, (_arrays(self._rest(state)), t_last)

    def _rest(self, state) -> tuple[Any, ...]:
        # (In the loop the host's static values are arrays.)
        made_jump: Any = False
        if self.format.made_jump is not False:
            made_jump = jnp.asarray(state.made_jump)
        return state.tprev, state.tnext, made_jump, state.controller_state

    def resume(self, init_state, number: Array, kept: PyTree) -> tuple[Any, Array]:
        """The host's state, and the end of the step before."""
        arrays, (rest, t_last) = kept
        old = ((init_state.y, init_state.solver_state), self._rest(init_state))
        (y, solver_state), rest = eqx.combine((arrays, rest), old)
        tprev, tnext, made_jump, controller_state = rest
        number = number.astype(jnp.result_type(init_state.num_steps))
        state = replace(
            init_state,
            y=y,
            solver_state=solver_state,
            tprev=tprev,
            tnext=tnext,
            made_jump=made_jump,
            controller_state=controller_state,
            num_steps=number,
            num_accepted_steps=number,
        )
        return state, t_last

    def empty_slots(self, init_state) -> Slots:
        # One more for what is at hand, and one for where a record begins.
        size = self.num_slots + (2 if self.format.is_window else 1)
        return slots_.empty(size, self.kept(init_state, init_state.tprev))

    #
    # The loop
    #

    def add_rerun(
        self,
        hoister: Hoister,
        init_state,
        times: PyTree,
        bare_loop: Callable,
        located: Callable,
        of_terms: tuple,
    ) -> None:
        """Adds the function that makes steps again of which there is no record, if
        there may be any."""
        del of_terms
        if not self.format.is_window:
            return
        cond, body, buffers = bare_loop()
        bare_state = without_saving(init_state)

        def rerun(times, number, kept, slots, capacity, stop):
            state, t_last = self.resume(bare_state, number, kept)
            state, record = self.run(
                cond,
                located(times, body),
                state,
                max_steps=None,
                buffers=buffers,
                slots=slots,
                t_last=t_last,
                capacity=capacity,
                stop=stop,
            )
            return self.kept(state, record.t_last), record

        zero, kept = jnp.array(0), self.kept(init_state, init_state.tprev)
        slots = self.empty_slots(init_state)
        hoister.add("rerun", rerun, times, zero, kept, slots, zero, zero)

    def run(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_state,
        *,
        max_steps: int | None,
        buffers: Callable,
        slots: Slots | None = None,
        t_last: Array | None = None,
        capacity: Any = None,
        stop: Array | None = None,
        records: Any = True,
    ):
        """The host's loop, from its start; without a record unless `records`. Or from
        elsewhere, where the step before ended at `t_last`, until `stop` accepted steps
        have been made; it then puts states on top of those that are in `slots`, of
        which it uses `capacity`. Returns the host's final state, and the record."""
        if slots is None:
            slots, capacity = self.empty_slots(init_state), self.num_slots
        t_before: Array = init_state.tprev if t_last is None else t_last

        def unfinished(state):
            out = cond_fun(state)
            if max_steps is not None:
                out = out & (state.num_steps < max_steps)
            if stop is not None:
                out = out & (state.num_accepted_steps < stop)
            return out

        # A batch leaves the inner loop together, so that none waits for another. An
        # element that is done must have no say in it: Equinox asks for the condition
        # after a step that it would make, and then takes no notice of that step. So a
        # loop that it ended would go on, by what is kept, and be ended again for ever.
        # Hence `is_done` below for such steps, and `unfinished` here for what is kept.
        def any_unfinished(pred, state):
            return eqxi.unvmap_any(pred & unfinished(state))

        def ends(state, row):
            n = state.num_accepted_steps
            is_full = (n % BLOCK == 0) & (n > row.num_copied)
            return any_unfinished(is_full & records, state)

        def inner_cond(carry):
            state, row = carry
            out = unfinished(state) & ~ends(state, row)
            return out & ~any_unfinished(row.mark > 0, state)

        def inner_body(carry):
            state, row = carry
            is_done = ~unfinished(state)
            new_state = body_fun(state)
            if self.format.made_jump is False:
                # (So that XLA knows that it does not change.)
                new_state = replace(new_state, made_jump=state.made_jump)
            row = self._append(row, state, new_state, is_done, start, records)
            if stop is None:
                # (Where steps are made again it has tangents.)
                row = row._replace(start=stop_gradient(row.start))
            return new_state, row

        def inner_buffers(carry):
            state, row = carry
            return [*buffers(state), row.steps]

        def outer_cond(carry):
            state, row, *_ = carry
            is_left = state.num_accepted_steps > row.num_copied
            return unfinished(state) | (is_left & records)

        def outer_body(carry):
            state, row, steps, keeping = carry
            state, row = eqxi.while_loop(
                inner_cond, inner_body, (state, row), buffers=inner_buffers, kind="lax"
            )
            # (If it may be kept then the last step has been accepted.)
            index, is_wanted = state.num_accepted_steps - 1, row.mark == _WANTED
            keeping = keeping.add(index, row.start, row.mark > 0, is_wanted, capacity)
            # (Once for all of a batch, or each that ends would have all copied.)
            is_end = ends(state, row) | ~eqxi.unvmap_any(unfinished(state))
            n = state.num_accepted_steps
            steps = lax.cond(is_end, lambda: self._copy(steps, row, n), lambda: steps)
            num_copied = jnp.where(is_end, n, row.num_copied)
            row = row._replace(num_copied=num_copied, mark=jnp.zeros_like(row.mark))
            return state, row, steps, keeping

        def outer_buffers(carry):
            state, row, steps, keeping = carry
            return [*buffers(state), row.steps, steps, keeping.slots.states]

        start = jnp.asarray(init_state.num_accepted_steps)
        zero = jnp.array(0)
        row = _Row(
            steps=self.format.empty_row(init_state),
            num_copied=start,
            t_last=t_before,
            num_wanted=zero,
            mark=jnp.array(0, jnp.uint8),
            start=self.kept(init_state, t_before),
            # (What has been before is not known.)
            held=[
                jnp.zeros(x.shape, bool) for x, *_ in _elements(self.solver, init_state)
            ],
        )
        state, row, steps, keeping = eqxi.while_loop(
            outer_cond,
            outer_body,
            (
                init_state,
                row,
                self.format.empty(init_state),
                Keeping.of(slots),
            ),
            buffers=outer_buffers,
            kind="lax",
        )
        return state, Record(steps, keeping.slots, row.num_wanted, row.t_last)

    def _append(
        self,
        row: _Row,
        state,
        new_state,
        is_done: Array,
        start: Array,
        records: Any,
    ) -> _Row:
        """Called after every attempted step. `is_done` if it is none, as it is made
        after the end of a solve for the sake of others in a batch."""
        index = state.num_accepted_steps
        accepted = (new_state.num_accepted_steps > index) & ~is_done
        if self.format.made_jump is False:
            # (In the loop it is an array, which would be one more to be carried.)
            state = replace(state, made_jump=False)
        needs, wants = asks(self.solver, state, new_state.solver_state)
        held, leaves = self._at_rest(row.held, state, new_state)
        # (As all of a batch that makes the same steps record them once.)
        needs = needs | together(leaves, index)
        is_wanted = needs | wants
        entry, is_consistent = self.format.entry(state, row.t_last, is_wanted, needs)
        entry = stop_gradient(entry)
        if self._checkpoint_every is not None:
            is_wanted = is_wanted | (index % self._checkpoint_every == 0)
        # (If there are hardly more steps than slots then nothing has to be rebuilt.)
        may_be_kept = (index % self.grid == 0) | (index <= self.num_slots)
        mark = jnp.where(is_wanted, _WANTED, jnp.where(may_be_kept, _KEPT, 0))
        # (The start of the loop is there anyway.)
        is_inside = accepted & (index > start)

        # If the step was rejected then the next one is put into the same place. (If it
        # is none at all then that may be the place of a step that is still needed.)
        place = index % BLOCK

        def put(x, buffer):
            return buffer.at[place].set(where_active(~is_done, x, buffer[place]))

        return row._replace(
            steps=jtu.tree_map(put, entry, row.steps),
            t_last=jnp.where(
                accepted, jnp.where(is_consistent, state.tnext, jnp.nan), row.t_last
            ),
            num_wanted=row.num_wanted + jnp.where(is_inside & is_wanted, 1, 0),
            mark=jnp.where(is_inside & records, mark, 0).astype(row.mark.dtype),
            start=self.kept(state, row.t_last),
            held=[jnp.where(accepted, x, y) for x, y in zip(held, row.held)],
        )

    def _at_rest(
        self, held: list[Array], state, new_state
    ) -> tuple[list[Array], Array]:
        """Which elements of `y` a step leaves exactly as they were, or moves by no more
        than rounding after one that did; and whether it moves any of these by more.

        Such a step cannot be undone: a vector field may well have a kink where an
        element is at rest, such as at zero, and what is rebuilt is next to it. From its
        start on all is well, as couplings undo a rest exactly."""
        new_held, leaves = [], jnp.array(False)
        before, after = (_elements(self.solver, s) for s in (state, new_state))
        for was_held, old, new in zip(held, before, after, strict=True):
            pairs = list(zip(old, new, strict=True))
            is_same = ft.reduce(jnp.logical_and, [a == b for a, b in pairs])
            size = ft.reduce(jnp.maximum, [jnp.abs(a) for a in old])
            change = ft.reduce(jnp.maximum, [jnp.abs(b - a) for a, b in pairs])
            moves = change > _ROUNDING * float(jnp.finfo(size.dtype).eps) * size
            leaves = leaves | jnp.any(was_held & moves)
            # (It may set out slowly.)
            new_held.append(is_same | (was_held & ~moves))
        return new_held, leaves

    def _copy(self, steps: Steps, row: _Row, num_steps: Array) -> Steps:
        """Copies the row that the last of `num_steps` steps is in."""
        # Only if there are new ones. (If the row was full then the place of a rejected
        # step is that of its first.)
        is_new: Any = num_steps > row.num_copied
        number = self.format.row(jnp.maximum(num_steps - 1, 0))

        def put(x, buffer):
            # (A buffer again within this loop, but not one to be written to.)
            while not eqx.is_array(x):
                x = x._array
            return eqxi.buffer_at_set(buffer, number, x, pred=is_new)

        is_leaf = lambda x: hasattr(x, "at")
        return jtu.tree_map(put, row.steps, steps, is_leaf=is_leaf)


def asks(solver: AbstractReversibleSolver, state, new_solver_state) -> tuple[Any, Any]:
    """Whether the solver needs the start of a step to be kept, and whether it wants
    that. Each is `False` if that is known in advance of every step."""
    states = (state.solver_state, new_solver_state, state.made_jump)
    return solver.needs_checkpoint(*states), solver.wants_checkpoint(*states)


def _elements(solver: AbstractReversibleSolver, state) -> list[tuple[Array, ...]]:
    """Of each leaf of `y`: its elements, and what the registers like `y` have in their
    places."""
    trees = [state.y]
    if isinstance(solver, AbstractCouplingSolver):
        registers = solver.split(state.y, state.solver_state).registers
        trees += [r for r in registers if same_struct(r, state.y)]
    trees = stop_gradient(trees)
    leaves = map(jtu.tree_leaves, eqx.filter(trees, eqx.is_inexact_array))
    return list(zip(*leaves, strict=True))


def _arrays(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_array)
