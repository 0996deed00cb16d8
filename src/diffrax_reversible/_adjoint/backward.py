"""The backward pass, from one segment to the one before, in turns:

1. The segment is recomputed, from the last stored state before it; and all of its
   states are kept (`segments.py`). Or, if the solver is reversible, only the times of
   its steps are read from their record (`step_record.py`), unless the segment is marked
   there.
2. What has been rebuilt in the turn before is compared with what is known now
   (`verify.py`). If they differ, the backward pass begins anew, and recomputes every
   segment.
3. The gradient is pulled back through each step (`adjoint_step.py`): at its start if
   that is known, and else at what it is undone to.

All elements of a batch go through their segments together, each through its own; so
none waits for another.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .._method.controlled import precision
from .._method.tree import arrays, tree_where
from . import verify as verify
from .adjoint_step import AdjointStep, Carry
from .check import all_finite
from .index import div, put, take
from .pullback import Start, Step
from .residuals import Ends, Residuals
from .segments import Segments, Stored
from .slots import Slots
from .step_record import Marks, Recorder, Starts, StepRecord
from .vmap import as_batched, tree_where_active


class Backward(NamedTuple):
    """Where the backward pass has got to."""

    carry: Carry
    slots: Slots
    starts: Starts
    # Whether what was recomputed is not what was computed first.
    is_lost: Array
    # `None` if no step is undone.
    check: "Check | None"


class Check(NamedTuple):
    """What is known of the states that have been rebuilt."""

    # The number of the segment at hand, as far as there is a record.
    k: Array
    # The number of the last step whose start was known.
    since: Array
    # Of the last stored state that was come by, `y` and the solver state; and of which
    # step it is the start. (Read before the slots are written to, which would otherwise
    # be copied.)
    stored: tuple[PyTree, PyTree]
    stored_at: Array
    # Whether what the pullback carries belongs to the state at hand. (A batch has it as
    # one whole: so it is lost to an element that waits for others.)
    is_primed: Array
    # What rounding of `y` has done to the gradient, see `verify.differs`.
    noise: Array
    # Whether something was found to differ; and whether every segment is recomputed, as
    # it was once.
    has_failed: Array
    is_whole: Array

    def is_rebuilt(self, carry: Carry) -> Array:
        """Whether the state at hand is."""
        return self.since > carry.num_steps


def _of_each(backward: Backward, check: Check, is_marked: Array) -> Backward:
    """An element of a batch goes its own way, if steps of its own are marked."""
    own = ft.partial(as_batched, like=is_marked)
    carry = backward.carry
    carry = carry._replace(
        num_steps=own(carry.num_steps),
        t1=own(carry.t1),
        t_after=own(carry.t_after),
        solver_state=own(carry.solver_state),
        grad_solver_state=own(carry.grad_solver_state),
    )
    since, stored, stored_at = own((check.since, check.stored, check.stored_at))
    check = check._replace(since=since, stored=stored, stored_at=stored_at)
    slots, starts, is_lost = own((backward.slots, backward.starts, backward.is_lost))
    return Backward(carry, slots, starts, is_lost, check)


def _state(at: Any) -> tuple[PyTree, PyTree]:
    return at.y, at.solver_state


class _At(NamedTuple):
    """A step, with its start, as far as that is known."""

    starts: Starts
    y: PyTree
    solver_state: PyTree

    @property
    def made_jump(self) -> Any:
        return False if self.starts.made_jump is None else self.starts.made_jump


class _Segment(NamedTuple):
    """The steps that are pulled back in one turn."""

    # The numbers of the first and the last of them.
    first: Array
    last: Array
    starts: Starts
    # Without those after the last step.
    slots: Slots
    # Whether the states in `starts` are known. If not, then only the last one that is
    # stored, at the start of the step with the second number: if it is of this segment.
    is_known: Array
    stored: Stored
    stored_at: Array
    # Whether they have been recomputed in this turn, and the host's state after that.
    is_new: Array
    end: Any


class Walk:
    """The backward pass.

    **Arguments:**

    - `recompute_fn`: The function that recomputes a segment.
    - `has_stored`: Otherwise all states are recomputed from the start, and no step is
        undone: what was stored has no tangents, and nor has the end.
    """

    def __init__(
        self,
        segments: Segments,
        adjoint_step: AdjointStep,
        init_state,
        ends: Ends,
        residuals: Residuals,
        recompute_fn: Callable,
        has_stored: bool,
    ):
        self._segments = segments
        self._adjoint_step = adjoint_step
        self._init_state = init_state
        self._ends = ends
        self._residuals = residuals
        self._recompute_fn = recompute_fn
        self._has_stored = has_stored
        self._initial = segments.stored(init_state, init_state.tprev)
        # Unless no step is undone.
        self._recorder = segments.recorder if has_stored else None

    def run(self) -> Backward:
        residuals, ends = self._residuals, self._ends
        # (Those of the last segment are there from the way forward.)
        slots = residuals.slots.sealed()
        starts, y, solver_state = residuals.starts, *ends[:2]
        if not self._has_stored:
            starts = self._segments.empty_starts(self._init_state)
            slots = slots.emptied(True)
            n, top = ends.num_steps, self._initial
            end, starts, slots = self._recompute(n, True, slots, top, starts)
            y, solver_state = end.y, end.solver_state
        check = None
        if self._recorder is not None:
            check = self._new_check(eqxi.unvmap_any(self._last_differs(starts)))
        carry = self._adjoint_step.start(y, solver_state)
        backward = Backward(carry, slots, starts, jnp.array(False), check)
        if residuals.marks is not None and check is not None:
            backward = _of_each(backward, check, residuals.marks.is_marked)
        return lax.while_loop(self._goes_on, self._turn, backward)

    def _new_check(self, is_whole: Array) -> Check:
        """At the end of the solve."""
        no, noise = jnp.array(False), jnp.zeros((), precision(self._ends.y).dtype)
        assert self._residuals.marks is not None
        k, n = self._residuals.marks.num_recorded, self._ends.num_steps
        none = jnp.array(-1, n.dtype)
        initial = _state(self._initial)
        return Check(k, n, initial, none, ~no, noise, no, is_whole)

    def _goes_on(self, backward: Backward) -> Array:
        carry, check = backward.carry, backward.check
        out = eqxi.unvmap_any(carry.num_steps > 0)
        if check is not None:
            # (There is one more turn to compare what was rebuilt of the start.)
            is_rebuilt = eqxi.unvmap_any(check.is_rebuilt(carry))
            out = out | is_rebuilt | check.has_failed
        return out

    #
    # A turn
    #

    def _turn(self, backward: Backward) -> Backward:
        if backward.check is not None:
            backward = self._begin_anew(backward, backward.check)
        carry, slots, starts, is_lost, check = backward
        n = carry.num_steps
        segment = self._segment(n, slots, starts, check)
        is_lost = is_lost | (segment.is_new & self._is_lost(segment, carry, check))
        limit = segment.first
        if check is not None:
            carry, check = self._compare(carry, check, segment)
            limit = jnp.where(check.has_failed, n, limit)
        carry = lax.while_loop(
            lambda carry: eqxi.unvmap_any(carry.num_steps > limit),
            lambda carry: self._pull(segment, carry, limit),
            carry,
        )
        if check is not None:
            num = n - carry.num_steps
            check = check._replace(
                k=check.k - 1,
                since=jnp.where(segment.is_known, carry.num_steps, check.since),
                stored=_state(segment.stored),
                stored_at=segment.stored_at.astype(n.dtype),
                is_primed=~eqxi.unvmap_any(num != eqxi.unvmap_max(num)),
            )
        return Backward(carry, segment.slots, segment.starts, is_lost, check)

    def _begin_anew(self, backward: Backward, check: Check) -> Backward:
        """If it has failed: from the end, all of a batch."""
        carry, slots, starts, is_lost, _ = backward
        again, ends = check.has_failed, self._ends

        def from_end(*old):
            del old
            carry = self._adjoint_step.start(ends.y, ends.solver_state)
            return carry, self._new_check(jnp.array(True))

        # (Not of what is stored: a branch would copy it.)
        carry, check = lax.cond(again, from_end, lambda *old: old, carry, check)
        slots = slots.emptied(again)
        return Backward(carry, slots, starts, is_lost & ~again, check)

    def _segment(
        self, n: Array, slots: Slots, starts: Starts, check: Check | None
    ) -> _Segment:
        """The steps before that with the number `n`: as they are there, or recorded, or
        recomputed."""
        length, last = self._segments.length, jnp.maximum(n - 1, 0)
        slots = slots.before(n)
        # Whether their states are there from the way forward.
        is_there, is_known = n == self._ends.num_steps, jnp.array(True)
        # The last ones that have been made, whichever segment they are of.
        first = jnp.maximum(n - length, jnp.where(is_there, 0, slots.top()))
        if check is not None:
            first = self._first(check, first)
            # (What was stored when others were recomputed may be within this one.)
            slots = slots.before(jnp.minimum(first + 1, n))
        stored_at, stored = slots.top(), slots.top_state(self._initial)
        if check is not None:
            is_there = is_there & ~check.is_whole
            is_known = check.is_whole | is_there | self._is_marked(check.k)
            is_read = ~is_known & (first < n)
            is_here = is_read & (stored_at == first)
            starts = self._load(starts, stored, check.k, first, is_read, is_here)
        is_new = is_known & ~is_there & (n > 0)
        end, starts, slots = self._recompute(n, is_new, slots, stored, starts)
        known = (is_known, stored, stored_at)
        return _Segment(first, last, starts, slots, *known, is_new, end)

    def _recompute(
        self, n: Array, pred: Any, slots: Slots, top: Stored, starts: Starts
    ):
        """The last steps before that with the number `n`, if `pred`: from the `top` of
        the `slots`."""
        length, start = self._segments.length, slots.top()
        pieces = div(n - start + length - 1, length)
        free = jnp.maximum(self._segments.num_slots - slots.count, 0)
        # Where there is no more room nothing is stored.
        stride = length * div(pieces + free, free + 1)
        stop = jnp.where(pred, n, start)
        return self._recompute_fn(start, top, stop, slots, stride, starts)

    def _is_lost(self, segment: _Segment, carry: Carry, check: Check | None) -> Array:
        """Whether what has been recomputed does not end where it should."""
        lost = verify.is_lost(segment.end.y, carry.y1)
        if check is not None:
            # (What has been rebuilt is compared more closely.)
            lost = lost & ~check.is_rebuilt(carry)
        return lost | verify.is_lost(segment.end.tprev, carry.t_after)

    def _at(self, starts: Starts, number: Array) -> _At:
        at: Starts = take(starts, self._segments.place(number))
        return _At(at, *self._with_static(at.y, at.solver_state))

    def _with_static(self, *state: PyTree) -> tuple[PyTree, PyTree]:
        return self._segments.with_static(self._init_state, *state)

    #
    # What has been recorded, and what has been rebuilt
    #

    def _is_marked(self, k: Array) -> Array:
        recorder, steps, marks = self._record()
        return recorder.is_marked(steps, k, marks)

    def _first(self, check: Check, otherwise: Array) -> Array:
        """The first step of the segment at hand, if that is recorded."""
        recorder, steps, marks = self._record()
        is_lost = check.is_whole | recorder.is_lost(check.k, marks)
        return jnp.where(is_lost, otherwise, recorder.first(steps, check.k, marks))

    def _record(self) -> tuple[Recorder, StepRecord, Marks]:
        residuals = self._residuals
        assert self._recorder is not None
        assert residuals.steps is not None and residuals.marks is not None
        return self._recorder, residuals.steps, residuals.marks

    def _load(
        self,
        starts: Starts,
        stored: Stored,
        k: Array,
        first: Array,
        pred: Array,
        is_here: Array,
    ) -> Starts:
        """If `pred`, the steps of a segment, from the record; with the state that is
        `stored`, if that `is_here`, at the start of the first."""
        recorder, steps, _ = self._record()
        order = self._segments.order(first)
        starts = recorder.load(steps, starts, order, k, pred)
        place = self._segments.place(first)
        y = put(starts.y, place, stored.y, is_here)
        solver_state = put(starts.solver_state, place, stored.solver_state, is_here)
        return starts._replace(y=y, solver_state=solver_state)

    def _known(
        self, n: Array, check: Check, segment: _Segment
    ) -> tuple[tuple[PyTree, PyTree], Array]:
        """The state at the end of a segment, as it was stored or has been recomputed;
        and whether it was."""
        is_stored = check.stored_at == n
        known = tree_where(is_stored, check.stored, arrays(_state(segment.end)))
        return self._with_static(*known), is_stored | segment.is_new

    def _last_differs(self, starts: Starts) -> Array:
        """Whether the last step is undone to something else than its start, which is
        known. (That is one step: where others are compared it may be an even number of
        them, and what goes wrong in each may be right again.)"""
        adjoint_step, ends = self._adjoint_step, self._ends
        assert self._recorder is not None and self._residuals.marks is not None
        at = self._at(starts, jnp.maximum(ends.num_steps - 1, 0))
        solver_state = self._recorder.with_recorded(ends.solver_state, at.solver_state)
        t0, t1 = at.starts.t0, at.starts.t1
        step = Step(t0, t1, ends.y, solver_state, at.made_jump)
        rebuilt = adjoint_step.pullback.undone(adjoint_step.fns, step)
        if rebuilt is None:
            return jnp.array(False)
        known, later, no = at[1:], (ends.y, ends.solver_state), jnp.array(False)
        found = verify.Found(t0, t1, rebuilt, known, later, no)
        differs = found.differs(adjoint_step.fns, None, all_finite(ends.y))
        return differs & (ends.num_steps > 0) & ~self._residuals.marks.is_marked

    def _compare(
        self, carry: Carry, check: Check, segment: _Segment
    ) -> tuple[Carry, Check]:
        """Compares the state at hand with what it is known to be, and takes that."""
        adjoint_step, n = self._adjoint_step, carry.num_steps
        known, is_known = self._known(n, check, segment)
        # (The next step is about as long.)
        step = self._at(segment.starts, segment.last).starts
        found = verify.Found(
            carry.t_after,
            carry.t_after + (step.t1 - step.t0),
            (carry.y1, carry.solver_state),
            known,
            (carry.y_seen, carry.solver_state),
            # (Of the first step it is not known.)
            n > 0,
        )
        checks = check.is_rebuilt(carry) & is_known & ~found.is_same(adjoint_step.fns)

        def compare():
            return verify.differs(
                adjoint_step.fns,
                found,
                carry.grad_y1,
                carry.grad_consts,
                check.since - n,
                check.noise,
                checks,
                all_finite(self._ends.y),
            )

        differs, noise = lax.cond(
            eqxi.unvmap_any(checks),
            compare,
            lambda: (jnp.zeros_like(checks), check.noise),
        )
        y1, solver_state = tree_where(is_known, known, (carry.y1, carry.solver_state))
        y_seen = tree_where(is_known, y1, carry.y_seen)
        carry = carry._replace(y1=y1, solver_state=solver_state, y_seen=y_seen)
        if carry.pullback is not None:
            primes = eqxi.unvmap_any((n > 0) & ~check.is_primed)
            carry = lax.cond(primes, adjoint_step.prime, lambda carry: carry, carry)
        check = check._replace(
            since=jnp.where(is_known, n, check.since),
            noise=noise,
            # (Together, so that what a batch shares stays shared.)
            has_failed=eqxi.unvmap_any(checks & differs),
        )
        return carry, check

    #
    # A step
    #

    def _pull(self, segment: _Segment, carry: Carry, limit: Array) -> Carry:
        """Through one step of the segment, of those from `limit` on."""
        n, is_known = carry.num_steps, segment.is_known
        adjoint_step = self._adjoint_step
        active = n > limit
        # An element of a batch that is done is pulled back through its last step again.
        number = jnp.minimum(jnp.where(active, n - 1, n), segment.last)
        at, initial = self._at(segment.starts, number), self._init_state.solver_state
        y = at.y
        state = self._segments.pullback.of_step(at.solver_state, initial, number == 0)
        t0, t1 = adjoint_step.located(number, at.starts.t0, at.starts.t1)
        recorder, solver_state = self._segments.recorder, carry.solver_state
        if recorder is not None:
            solver_state = recorder.with_recorded(solver_state, at.solver_state)
            # (Or, if steps are differentiated at both ends, a step of length zero from
            # where it is: so that no NaN comes of it.)
            at_hand = (carry.y1, carry.solver_state)
            t0, t1, (y, state), solver_state = tree_where_active(
                active,
                (t0, t1, (y, state), solver_state),
                (carry.t_after, carry.t_after, at_hand, carry.solver_state),
            )
        step = Step(t0, t1, carry.y1, solver_state, at.made_jump)
        increments = at.starts.increments
        start = Start(jnp.array(True), jnp.array(False), y, state, increments)
        if self._recorder is not None:
            is_rebuilt = eqxi.unvmap_any(active & ~is_known)
            knows = is_known | ~active | (number == segment.stored_at)
            start = Start(knows, is_rebuilt, y, state, increments)
        carry = adjoint_step.pull(carry, number, at.starts.t_prev, step, start, active)
        if recorder is not None:
            # (What a step is undone to is asked for, even where its start is known.)
            rebuilt = (carry.y1, carry.solver_state)
            y1, solver_state = tree_where(active & is_known, (y, state), rebuilt)
            carry = carry._replace(y1=y1, solver_state=solver_state)
        return carry
