"""Solves by segments: how they are made, and how the backward pass goes through them.

On the way forward the state is stored at the start of every `length`th step, while
there is room; and then of every third of these, and so on. The backward pass goes from
one of these *segments* to the one before, in turns:

1. The segment is recomputed, from the last stored state before it; and all of its
   states are kept. It is the host's own loop that makes the steps again, with the step
   size controller. Or, if the solver is reversible, only the times of its steps are
   read from the record (`record.py`), unless the segment is marked there.
2. What has been rebuilt in the turn before is compared with what is known now
   (`verify.py`). If they differ, the backward pass begins anew, and recomputes every
   segment.
3. The gradient is pulled back through each step (`undo.py`): at its start if that is
   known, and else at what it is undone to.

The states of the last segment are kept on the way forward. So nothing is recomputed,
or undone, in a solve of no more steps than that.

All elements of a batch go through their segments together, each through its own; so
none waits for another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import without_saving
from .._jax_compat import eqxi
from .._method.controlled import precision
from .._method.tree import replace, stop_gradient
from . import slots as slots_, verify as verify
from .check import all_finite
from .hoist import Hoister
from .pullback import AbstractPullback, Start, Step
from .record import Ends, Record, Recorder, Starts
from .slots import Keeping, Slots
from .undo import Carry, Undo
from .verify import is_lost
from .vmap import where_active


class _Stored(NamedTuple):
    """Of the host's state."""

    y: PyTree
    solver_state: PyTree
    tprev: Array
    tnext: Array
    made_jump: Any
    controller_state: PyTree
    t_last: Array


class Segments:
    """How a solve is made, and recomputed.

    **Arguments:**

    - `made_jump`: `False` if that is known in advance of every step; or an example.
    - `recorder`: `None` if no step can be undone.
    - `num_slots`: How many states may be stored.
    - `length`: Of a segment, the most steps.
    """

    def __init__(
        self,
        pullback: AbstractPullback,
        made_jump: Any,
        recorder: Recorder | None,
        num_slots: int,
        length: int,
    ):
        self.pullback = pullback
        self.made_jump = made_jump
        self.recorder = recorder
        self.num_slots = num_slots
        self.length = length

    #
    # What is stored of a state
    #

    def stored(self, state, t_last: Array) -> _Stored:
        """Of the host's state, at the start of a step."""
        made_jump = None
        if self.made_jump is not False:
            made_jump = jnp.asarray(state.made_jump)
        stored = _Stored(
            state.y,
            self.pullback.stored(state.solver_state),
            state.tprev,
            state.tnext,
            made_jump,
            state.controller_state,
            t_last,
        )
        return _arrays(stored)

    def resumed(self, terms, args, init_state, number: Array, arrays: _Stored):
        """The host's state, at the start of the step with that number."""
        initial = init_state.solver_state
        old = self._static(init_state)
        stored: _Stored = eqx.combine(arrays, old)
        number = number.astype(jnp.result_type(init_state.num_steps))
        made_jump = init_state.made_jump
        return replace(
            init_state,
            y=stored.y,
            solver_state=self.pullback.resumed(
                terms,
                args,
                stored.tprev,
                stored.y,
                stored.solver_state,
                initial,
                number == 0,
            ),
            tprev=stored.tprev,
            tnext=stored.tnext,
            made_jump=made_jump if stored.made_jump is None else stored.made_jump,
            controller_state=stored.controller_state,
            num_steps=number,
            num_accepted_steps=number,
        )

    def _static(self, init_state) -> _Stored:
        stored = _Stored(
            init_state.y,
            self.pullback.stored(init_state.solver_state),
            init_state.tprev,
            init_state.tnext,
            None,
            init_state.controller_state,
            init_state.tprev,
        )
        return eqx.filter(stored, eqx.is_array, inverse=True)

    def empty_slots(self, init_state) -> Slots:
        stored = self.stored(init_state, init_state.tprev)
        return slots_.empty(max(self.num_slots, 1), stored)

    def empty_starts(self, init_state) -> Starts:
        # There is a valid step in every place: an element of a batch that makes none is
        # pulled back through one all the same, with a gradient of zero.
        return jtu.tree_map(
            lambda x: jnp.broadcast_to(x, (self.length + 1, *jnp.shape(x))),
            self._start(init_state, init_state.tprev),
        )

    def place(self, number: Array) -> Array:
        """That of a step in `Starts`. There is one more than a segment has steps: the
        last step of a solve may be a rejected one."""
        return number % (self.length + 1)

    def numbers(self, first: Array) -> Array:
        """In each place of `Starts`: the number of the step there within the segment
        that begins with the `first`. (In the place that is left over, of the last.)"""
        places = jnp.arange(self.length + 1)
        return jnp.minimum((places - first) % (self.length + 1), self.length - 1)

    def _start(self, state, t_last: Array) -> Starts:
        stored = self.stored(state, t_last)
        return Starts(
            stored.t_last,
            stored.tprev,
            stored.tnext,
            stored.made_jump,
            stored.y,
            stored.solver_state,
        )

    #
    # The loops
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
        """Adds the function that recomputes the steps of a segment."""
        cond, body, buffers = bare_loop()
        bare_state = without_saving(init_state)

        def refill(times, number, stored, stop, slots, stride, starts):
            terms, args = of_terms
            state = self.resumed(terms, args, bare_state, number, stored)
            return self.fill(
                cond,
                located(times, body),
                state,
                buffers=buffers,
                t_last=stored.t_last,
                stop=stop,
                slots=slots,
                stride=stride,
                starts=starts,
            )

        zero, stored = jnp.array(0), self.stored(init_state, init_state.tprev)
        slots, starts = self.empty_slots(init_state), self.empty_starts(init_state)
        example = (times, zero, stored, zero, slots, zero + 1, starts)
        hoister.add("rerun", refill, *example)

    def run(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_state,
        *,
        max_steps: int | None,
        buffers: Callable,
        records: Any,
    ):
        """The host's loop; without storing anything unless `records`. Returns the
        host's final state, and the record."""
        recorder = self.recorder

        def unfinished(state):
            out = cond_fun(state)
            if max_steps is not None:
                out = out & (state.num_steps < max_steps)
            return out

        def is_due(state, last):
            n = state.num_accepted_steps
            return (n % self.length == 0) & (n > last)

        def step(carry):
            (state, t_last), starts, marks, active = carry
            starts = self._put(starts, stop_gradient(state), t_last, active, records)
            new_state, new_t_last = self._step(body_fun, state, t_last)
            if recorder is not None:
                old, new, t_end = stop_gradient((state, new_state, t_last))
                marks = recorder.mark(marks, old, new, t_end)
            # (An element of a batch that is done stays so: Equinox asks for the
            # condition after a step that it then takes no notice of. Of an event there
            # is no more to be seen by then, so that it would end the loop for all of
            # the others, again and again.)
            active = active & unfinished(new_state)
            return (new_state, new_t_last), starts, marks, active

        def outer_body(carry):
            (state, t_last), starts, marks, last, keeping, steps = carry

            def inner_cond(carry):
                (state, _), _, _, active = carry
                # A batch leaves this loop together.
                ends = active & is_due(state, last) & records
                return active & ~eqxi.unvmap_any(ends)

            (state, t_last), starts, marks, _ = eqxi.while_loop(
                inner_cond,
                step,
                ((state, t_last), starts, marks, jnp.asarray(unfinished(state))),
                buffers=lambda carry: [*buffers(carry[0][0]), carry[1]],
                kind="lax",
            )
            due = is_due(state, last)
            n = state.num_accepted_steps
            k = n // self.length
            keeps = due & unfinished(state) & records
            if self.num_slots > 0:
                stored = stop_gradient(self.stored(state, t_last))
                keeping = keeping.add(k, n, stored, keeps)
            if recorder is not None:
                k = jnp.maximum(k - 1, 0)
                row = recorder.row(
                    self._segment(starts, state, k), state.solver_state, marks.is_marked
                )
                steps = recorder.write(steps, row, k, keeps)
                marks = marks._replace(
                    is_marked=marks.is_marked & ~keeps,
                    num_recorded=jnp.where(keeps, k + 1, marks.num_recorded),
                )
            last = jnp.where(due, n, last)
            return (state, t_last), starts, marks, last, keeping, steps

        def outer_buffers(carry):
            (state, _), starts, _, _, keeping, steps = carry
            return [*buffers(state), starts, keeping.slots.states, steps]

        marks = steps = None
        if recorder is not None:
            marks = recorder.no_marks(init_state)
            steps = recorder.empty(init_state, self.length)
        (state, t_last), starts, marks, _, keeping, steps = eqxi.while_loop(
            lambda carry: unfinished(carry[0][0]),
            outer_body,
            (
                (init_state, init_state.tprev),
                self.empty_starts(init_state),
                marks,
                jnp.zeros_like(jnp.asarray(init_state.num_accepted_steps)),
                Keeping.of(self.empty_slots(init_state)),
                steps,
            ),
            buffers=outer_buffers,
            kind="lax",
        )
        stored = keeping.slots.states
        num_wanted = jnp.maximum(state.num_accepted_steps - 1, 0) // self.length
        if marks is not None:
            num_wanted = marks.num_wanted
        return state, Record(
            (stored.tprev, stored.tnext),
            steps,
            marks,
            keeping.slots,
            num_wanted,
            t_last,
            starts,
        )

    def _segment(self, starts: Starts, state, k: Array) -> Starts:
        """The steps of the `k`th segment, in their order."""
        places = self.place(k * self.length + jnp.arange(self.length))

        def read(_, buffer):
            while not eqx.is_array(buffer):
                buffer = buffer._array
            return buffer[places]

        return jtu.tree_map(read, self._start(state, state.tprev), starts)

    def _put(self, starts: Starts, state, t_last: Array, active, records=True):
        """That of the next step, into its place. If the step is rejected then the one
        after it is put there."""
        place = self.place(state.num_accepted_steps)

        def put(x, buffer):
            old = buffer[place]
            x = where_active(active, x, old)
            return buffer.at[place].set(jnp.where(records, x, old))

        return jtu.tree_map(put, self._start(state, t_last), starts)

    def _step(self, body_fun: Callable, state, t_last: Array):
        new_state = body_fun(state)
        if self.made_jump is False:
            # (So that XLA knows that it does not change.)
            new_state = replace(new_state, made_jump=state.made_jump)
        accepted = new_state.num_accepted_steps > state.num_accepted_steps
        return new_state, jnp.where(accepted, state.tnext, t_last)

    def fill(
        self,
        cond_fun: Callable,
        body_fun: Callable,
        init_state,
        *,
        buffers: Callable,
        t_last: Array,
        stop: Array,
        slots: Slots,
        stride: Array,
        starts: Starts,
    ) -> tuple[Any, Starts, Slots]:
        """The host's loop, from a state until `stop` steps have been made. Returns the
        last state, and the starts of the last steps. Puts that of every `stride`th step
        on top of the `slots`, but for those. (The old `starts` are overwritten.)"""
        first = jnp.asarray(init_state.num_accepted_steps)

        def unfinished(state):
            # (What the loop found out at first it will find out again.)
            return (state.num_accepted_steps < stop) & cond_fun(state)

        def is_due(state, last):
            n = state.num_accepted_steps
            is_left = (n > last) & (n < stop - self.length)
            return is_left & ((n - first) % stride == 0)

        def outer_body(carry):
            (state, t_last), starts, last, slots = carry

            def inner_cond(carry):
                (state, _), _ = carry
                ends = unfinished(state) & is_due(state, last)
                return unfinished(state) & ~eqxi.unvmap_any(ends)

            def inner_body(carry):
                (state, t_last), starts = carry
                starts = self._put(starts, state, t_last, unfinished(state))
                return self._step(body_fun, state, t_last), starts

            (state, t_last), starts = eqxi.while_loop(
                inner_cond,
                inner_body,
                ((state, t_last), starts),
                buffers=lambda carry: [*buffers(carry[0][0]), carry[1]],
                kind="lax",
            )
            due = is_due(state, last) & unfinished(state)
            n = state.num_accepted_steps
            slots = slots.push(n, self.stored(state, t_last), due)
            return (state, t_last), starts, jnp.where(due, n, last), slots

        def outer_buffers(carry):
            (state, _), starts, _, slots = carry
            return [*buffers(state), starts, slots.states]

        (state, _), starts, _, slots = eqxi.while_loop(
            lambda carry: unfinished(carry[0][0]),
            outer_body,
            ((init_state, t_last), starts, first, slots),
            buffers=outer_buffers,
            kind="lax",
        )
        return state, starts, slots


class Backward(NamedTuple):
    """Where the backward pass has got to."""

    carry: Carry
    slots: Slots
    starts: Starts
    # Whether `starts` holds the states of the next segment already.
    is_there: Array
    # Whether what was recomputed is not what was computed first.
    is_lost: Array
    # `None` if no step can be undone.
    check: "Check | None"


class Check(NamedTuple):
    """What is known of the states that have been rebuilt."""

    # Whether the state at hand is one; and the number of the last step whose start is
    # known.
    is_rebuilt: Array
    since: Array
    # Whether what the pullback carries belongs to the state at hand. (A batch has it as
    # one whole: so it is lost to an element that waits for others.)
    is_primed: Array
    # What rounding of `y` has done to the gradient, see `verify.differs`.
    noise: Array
    # Whether something was found to differ; and whether it was once. Then every segment
    # is recomputed.
    has_failed: Array
    is_whole: Array


class Walk:
    """The backward pass.

    **Arguments:**

    - `refill`: The function that recomputes a segment.
    - `has_stored`: Otherwise all states are recomputed from the start, and no step is
        undone: what was stored has no tangents, and nor has the end.
    """

    def __init__(
        self,
        segments: Segments,
        undo: Undo,
        init_state,
        ends: Ends,
        record: Record,
        refill: Callable,
        has_stored: bool,
    ):
        self._segments = segments
        self._undo = undo
        self._init_state = init_state
        self._ends = ends
        self._record = record
        self._refill = refill
        self._has_stored = has_stored
        self._initial = segments.stored(init_state, init_state.tprev)
        self._static = segments._static(init_state)
        # Unless no step is undone.
        self._recorder = segments.recorder if has_stored else None

    def run(self) -> Backward:
        segments, record, ends = self._segments, self._record, self._ends
        # (Those of the last segment are there from the way forward.)
        slots, starts, is_there = record.slots, record.starts, jnp.array(True)
        y, solver_state = ends.y, ends.solver_state
        if not self._has_stored:
            starts = segments.empty_starts(self._init_state)
            slots = slots._replace(count=jnp.zeros_like(slots.count))
            end, starts, slots = self._recompute(ends.num_steps, True, slots, starts)
            y, solver_state = end.y, end.solver_state
        carry = self._undo.start(y, solver_state)
        no, check = jnp.array(False), None
        if self._recorder is not None:
            noise = jnp.zeros((), precision(y).dtype)
            is_whole = eqxi.unvmap_any(self._last_differs(starts))
            check = Check(no, ends.num_steps, ~no, noise, no, is_whole)
        return lax.while_loop(
            self._goes_on,
            self._turn,
            Backward(carry, slots, starts, is_there, no, check),
        )

    def _last_differs(self, starts: Starts) -> Array:
        """Whether the last step is undone to something else than its start, which is
        known. (That is one step: where others are compared it may be an even number of
        them, and what goes wrong in each may be right again.)"""
        undo, ends = self._undo, self._ends
        assert self._recorder is not None and self._record.marks is not None
        last = jnp.maximum(ends.num_steps - 1, 0)
        place = self._segments.place(last)
        at: Starts = jtu.tree_map(lambda x: x[place], starts)
        start = eqx.combine(
            (at.y, at.stored), (self._static.y, self._static.solver_state)
        )
        solver_state = self._recorder.with_recorded(ends.solver_state, start[1])
        made_jump = False if at.made_jump is None else at.made_jump
        step = Step(at.t0, at.t1, ends.y, solver_state, made_jump)
        rebuilt = undo.pullback.undone(undo.fns, step)
        if rebuilt is None:
            return jnp.array(False)
        later, no = (ends.y, ends.solver_state), jnp.array(False)
        found = verify.Found(at.t0, at.t1, rebuilt, start, later, no)
        differs = found.differs(undo.fns, None, all_finite(ends.y))
        return differs & (ends.num_steps > 0) & ~self._record.marks.is_marked

    def _goes_on(self, backward: Backward) -> Array:
        out = eqxi.unvmap_any(backward.carry.num_steps > 0)
        if backward.check is not None:
            # (There is one more turn to compare what was rebuilt of the start.)
            check = backward.check
            out = out | eqxi.unvmap_any(check.is_rebuilt) | check.has_failed
        return out

    def _recompute(self, n: Array, pred: Any, slots: Slots, starts: Starts):
        """The last steps before that with the number `n`, if `pred`."""
        segments = self._segments
        start, stored = slots.top(), slots.top_state(self._initial)
        pieces = -(-(n - start) // segments.length)
        free = jnp.maximum(segments.num_slots - slots.count, 0)
        # Where there is no more room nothing is stored.
        stride = segments.length * -(-pieces // (free + 1))
        stop = n if pred is True else jnp.where(pred, n, start)
        # (It may have become weakly typed on the way here.)
        slots = slots._replace(count=slots.count.astype(slots.order.dtype))
        return self._refill(start, stored, stop, slots, stride, starts)

    def _turn(self, backward: Backward) -> Backward:
        carry, slots, starts, is_there, is_wrong, check = backward
        if check is not None:
            # (Not of what is stored: a branch would copy it.)
            again = check.has_failed
            carry, check = lax.cond(again, self._again, lambda *old: old, carry, check)
            none = jnp.zeros_like(slots.count)
            slots = slots._replace(count=jnp.where(again, none, slots.count))
            is_there, is_wrong = is_there & ~again, is_wrong & ~again
        segments, n = self._segments, carry.num_steps
        k = jnp.maximum(n - 1, 0) // segments.length
        first = k * segments.length

        is_stored = slots.top() == n
        stored = slots.top_state(self._initial)
        slots = slots.pop(is_stored & (slots.count > 0))
        is_known = jnp.array(True)
        step_after: Any = None
        if check is not None:
            step_after = jtu.tree_map(lambda x: x[segments.place(n)], starts)
            is_known = check.is_whole | is_there | self._is_marked(k)
            starts = self._load(starts, slots, k, first, ~is_known)
        recomputes = is_known & ~is_there & (n > 0)
        end, starts, slots = self._recompute(n, recomputes, slots, starts)
        lost = is_lost(end.tprev, carry.t_after)
        same = ~is_lost(end.y, carry.y1)
        if check is None:
            lost = lost | ~same
        else:
            # (What has been rebuilt is compared more closely.)
            lost = lost | ~(same | check.is_rebuilt)
            truth = _where(
                is_stored,
                (stored.y, stored.solver_state),
                _arrays((end.y, end.solver_state)),
            )
            truth = eqx.combine(truth, (self._static.y, self._static.solver_state))
            carry, check = self._compare(
                carry, check, truth, is_stored | recomputes, step_after
            )
        is_wrong = is_wrong | (lost & recomputes)

        last = jnp.maximum(n - 1, 0)
        limit = first if check is None else jnp.where(check.has_failed, n, first)

        def goes_on(carry):
            return eqxi.unvmap_any(carry.num_steps > limit)

        def pull(carry):
            return self._pull(starts, carry, limit, last, is_known, slots.top())

        carry = lax.while_loop(goes_on, pull, carry)
        if check is not None:
            num = n - carry.num_steps
            differ = eqxi.unvmap_any(num != eqxi.unvmap_max(num))
            check = check._replace(
                is_rebuilt=check.is_rebuilt | ((num > 0) & ~is_known),
                since=jnp.where(is_known, carry.num_steps, check.since),
                is_primed=~differ,
            )
        no = jnp.zeros_like(is_there)
        return Backward(carry, slots, starts, no, is_wrong, check)

    def _is_marked(self, k: Array) -> Array:
        record = self._record
        assert self._recorder is not None
        assert record.steps is not None and record.marks is not None
        return self._recorder.is_marked(record.steps, k, record.marks)

    def _load(
        self, starts: Starts, slots: Slots, k: Array, first: Array, pred: Array
    ) -> Starts:
        """If `pred`, the steps of a segment, from the record; with the state at its
        start, if that is stored."""
        assert self._recorder is not None and self._record.steps is not None
        order = self._segments.numbers(first)
        starts = self._recorder.load(self._record.steps, starts, order, k, pred)
        place, here = self._segments.place(first), pred & (slots.top() == first)
        top = slots.top_state(self._initial)

        def put(x, buffer):
            return buffer.at[place].set(jnp.where(here, x, buffer[place]))

        y = jtu.tree_map(put, top.y, starts.y)
        stored = jtu.tree_map(put, top.solver_state, starts.stored)
        return starts._replace(y=y, stored=stored)

    def _again(self, carry: Carry, check: Check) -> tuple[Carry, Check]:
        """From the end, all of a batch."""
        no, ends = jnp.array(False), self._ends
        check = Check(
            is_rebuilt=jnp.zeros_like(check.is_rebuilt),
            since=ends.num_steps,
            is_primed=jnp.ones_like(check.is_primed),
            noise=jnp.zeros_like(check.noise),
            has_failed=no,
            is_whole=~no,
        )
        return self._undo.start(ends.y, ends.solver_state), check

    def _compare(
        self,
        carry: Carry,
        check: Check,
        truth: tuple[PyTree, PyTree],
        is_known: Array,
        step_after: Starts,
    ) -> tuple[Carry, Check]:
        """Compares the state at hand with what it is known to be, and takes that."""
        undo, n = self._undo, carry.num_steps
        checks = check.is_rebuilt & is_known

        def compare():
            found = verify.Found(
                step_after.t0,
                step_after.t1,
                (carry.y1, carry.solver_state),
                truth,
                (carry.y_seen, carry.solver_state),
                # (Of the first step it is not known.)
                n > 0,
            )
            return verify.differs(
                undo.fns,
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
        # (Together, so that what a batch shares stays shared.)
        fails = eqxi.unvmap_any(checks & differs)
        y1, solver_state = _where(is_known, truth, (carry.y1, carry.solver_state))
        carry = carry._replace(
            y1=y1, solver_state=solver_state, y_seen=_where(is_known, y1, carry.y_seen)
        )
        if carry.pullback is not None:
            primes = eqxi.unvmap_any((n > 0) & ~check.is_primed)
            carry = lax.cond(primes, undo.prime, lambda carry: carry, carry)
        check = check._replace(
            is_rebuilt=check.is_rebuilt & ~is_known,
            since=jnp.where(is_known, n, check.since),
            noise=noise,
            has_failed=fails,
        )
        return carry, check

    def _pull(
        self,
        starts: Starts,
        carry: Carry,
        limit: Array,
        last: Array,
        is_known: Array,
        top: Array,
    ) -> Carry:
        """Through one step, of those that are there. Their states are too, if
        `is_known`; otherwise that at the start of the step numbered `top` is."""
        segments, n = self._segments, carry.num_steps
        active = n > limit
        # An element of a batch that is done is pulled back through its last step again.
        number = jnp.minimum(jnp.where(active, n - 1, n), last)
        place = segments.place(number)
        at: Starts = jtu.tree_map(lambda x: x[place], starts)
        y, stored = eqx.combine(
            (at.y, at.stored), (self._static.y, self._static.solver_state)
        )
        initial = self._init_state.solver_state
        state = segments.pullback.of_step(stored, initial, number == 0)
        made_jump = False if at.made_jump is None else at.made_jump
        t0, t1 = self._undo.located(number, at.t0, at.t1)
        solver_state = carry.solver_state
        if segments.recorder is not None:
            solver_state = segments.recorder.with_recorded(solver_state, stored)
            # (Or, if steps are differentiated at both ends, a step of length zero from
            # where it is: so that no NaN comes of it.)
            t0, t1, y, state, solver_state = _keep(
                active,
                (t0, t1, y, state, solver_state),
                (carry.t_after,) * 2 + (carry.y1,) + (carry.solver_state,) * 2,
            )
        step = Step(t0, t1, carry.y1, solver_state, made_jump)
        start = Start(jnp.array(True), jnp.array(False), y, state)
        if self._recorder is not None:
            is_rebuilt = eqxi.unvmap_any(active & ~is_known)
            start = Start(is_known | ~active | (number == top), is_rebuilt, y, state)
        carry = self._undo.pull(carry, number, at.t_prev, step, start, active)
        if segments.recorder is not None:
            # (What a step is undone to is asked for, even where its start is known.)
            y1, solver_state = _where(
                active & is_known, (y, state), (carry.y1, carry.solver_state)
            )
            carry = carry._replace(y1=y1, solver_state=solver_state)
        return carry


def _keep(active: Array, new: PyTree, old: PyTree) -> PyTree:
    return jtu.tree_map(
        lambda a, b: where_active(active, a, b) if eqx.is_array(a) else a, new, old
    )


def _where(pred, a: PyTree, b: PyTree) -> PyTree:
    return jtu.tree_map(
        lambda x, y: jnp.where(pred, x, y) if eqx.is_array(x) else x, a, b
    )


def _arrays(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_array)
