"""How a solve is made, and recomputed: what is stored of it, and the loops forwards.

On the way forward the state is stored at the start of every `length`th step, while
there is room; and then they are thinned out. The starts of the last steps are all kept,
so that of a short solve nothing has to be recomputed. From a stored state it is the
host's own loop that makes the steps again, with the step size controller.

The elements of a batch reach a step with some number at different times, as each has
steps rejected of its own. If each stored its state just then, that would be nearly all
the time, and the others would wait. So a segment ends for all of them with the first
that has made `length` steps: those of the others may be shorter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import constant_steps_after, without_saving
from .._jax_compat import eqxi
from .._method.tree import arrays, replace, statics, stop_gradient, tree_where
from . import slots as slots_
from .hoist import Hoister
from .index import div, pack, put, rem, take, take_all, unpack
from .noise import Noise, Value
from .pullback import AbstractPullback
from .residuals import Residuals
from .slots import Keeping, Slots
from .step_record import Marks, Recorder, Starts
from .vmap import tree_where_active


class Stored(NamedTuple):
    """Of the host's state."""

    y: PyTree
    solver_state: PyTree
    made_jump: Any
    # The end of the step before, `tprev`, `tnext` and the state of the controller (but
    # for constant steps), packed: each array that a loop carries costs time.
    steps: list[Array]


class _Made(NamedTuple):
    """A solve, as far as it has been made."""

    # The host's.
    state: Any
    # The end of the last accepted step.
    t_last: Array
    # Of the last steps.
    starts: Starts
    marks: Marks | None
    # Of Brownian motions, where the next step should start.
    values: list[Value | None]


class Segments:
    """How a solve is made, and recomputed.

    **Arguments:**

    - `made_jump`: `False` if that is known in advance of every step; or an example.
    - `recorder`: `None` if no step can be undone.
    - `is_uniform`: Whether all steps are of one length.
    - `has_increments`: Whether those of Brownian motions are stored with the states of
        a segment.
    - `num_slots`: How many states may be stored.
    - `length`: Of a segment, the most steps.
    """

    def __init__(
        self,
        pullback: AbstractPullback,
        noise: Noise,
        made_jump: Any,
        recorder: Recorder | None,
        is_uniform: bool,
        has_increments: bool,
        num_slots: int,
        length: int,
    ):
        self.pullback = pullback
        self._noise = noise
        self.made_jump = made_jump
        self.recorder = recorder
        self._is_uniform = is_uniform
        self._has_increments = has_increments
        self.num_slots = num_slots
        self.length = length

    #
    # What is stored of a state
    #

    def stored(self, state, t_last: Array) -> Stored:
        """Of the host's state, at the start of a step."""
        made_jump = None
        if self.made_jump is not False:
            made_jump = jnp.asarray(state.made_jump)
        solver_state = self.pullback.stored(state.solver_state)
        y, solver_state = arrays((state.y, solver_state))
        return Stored(y, solver_state, made_jump, pack(self._steps(state, t_last)))

    def resumed(self, terms, args, init_state, number: Array, stored: Stored):
        """The host's state, at the start of the step with that number; and the end of
        the step before."""
        y, solver_state = self.with_static(init_state, stored.y, stored.solver_state)
        example = self._steps(init_state, init_state.tprev)
        t_last, tprev, tnext, controller_state = unpack(stored.steps, example)
        initial = init_state.controller_state
        if self._is_uniform:
            # (What XLA knows when the steps are first made it has to know here too, or
            # it rounds their ends in another way.)
            controller_state = constant_steps_after(initial, number)
        else:
            controller_state = eqx.combine(controller_state, statics(initial))
        number = number.astype(jnp.result_type(init_state.num_steps))
        initial, made_jump = init_state.solver_state, init_state.made_jump
        state = replace(
            init_state,
            y=y,
            solver_state=self.pullback.resumed(
                terms, args, tprev, y, solver_state, initial, number == 0
            ),
            tprev=tprev,
            tnext=tnext,
            made_jump=made_jump if stored.made_jump is None else stored.made_jump,
            controller_state=controller_state,
            num_steps=number,
            num_accepted_steps=number,
        )
        return state, t_last

    def _steps(self, state, t_last: Array) -> tuple[Array, Array, Array, PyTree]:
        controller_state = None if self._is_uniform else arrays(state.controller_state)
        return t_last, state.tprev, state.tnext, controller_state

    def with_static(self, init_state, y: PyTree, solver_state: PyTree):
        """What is stored of these, with what is not an array."""
        stored = self.pullback.stored(init_state.solver_state)
        return eqx.combine((y, solver_state), statics((init_state.y, stored)))

    def empty_slots(self, init_state) -> Slots:
        stored = self.stored(init_state, init_state.tprev)
        return slots_.empty(max(self.num_slots, 1), stored)

    def empty_starts(self, init_state) -> Starts:
        # There is a valid step in every place: an element of a batch that makes none is
        # pulled back through one all the same, with a gradient of zero.
        return jtu.tree_map(
            lambda x: jnp.broadcast_to(x, (self.length + 1, *jnp.shape(x))),
            self._start(init_state, init_state.tprev, self._noise.no_increments()),
        )

    def place(self, number: Array) -> Array:
        """That of a step in `Starts`. There is one more than a segment has steps: the
        last step of a solve may be a rejected one."""
        return rem(number, self.length + 1)

    def order(self, first: Array) -> Array:
        """In each place of `Starts`: the number of the step there within the segment
        that begins with the `first`. (In the place that is left over, of the last.)"""
        size = self.length + 1
        # (A constant: what `jnp.arange` makes would be carried by the loop.)
        places = jnp.asarray(np.arange(size))
        order = rem(places + size - self.place(first), size)
        return jnp.minimum(order, self.length - 1)

    def _start(self, state, t_last: Array, increments: list[list]) -> Starts:
        increments = increments if self._has_increments else []
        stored = self.stored(state, t_last)
        return Starts(
            *(t_last, state.tprev, state.tnext, stored.made_jump),
            *(stored.y, stored.solver_state, increments),
        )

    #
    # The loops
    #

    def add_recompute(
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

        def recompute(times, number, stored, stop, slots, stride, starts):
            terms, args = of_terms
            state, t_last = self.resumed(terms, args, bare_state, number, stored)
            return self._recompute(
                cond,
                located(times, body),
                state,
                buffers=buffers,
                t_last=t_last,
                stop=stop,
                slots=slots,
                stride=stride,
                starts=starts,
            )

        zero, stored = jnp.array(0), self.stored(init_state, init_state.tprev)
        slots, starts = self.empty_slots(init_state), self.empty_starts(init_state)
        example = (times, zero, stored, zero, slots, zero + 1, starts)
        hoister.add("recompute", recompute, *example)

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
        host's final state, and the residuals."""
        recorder = self.recorder

        def unfinished(state):
            out = cond_fun(state)
            if max_steps is not None:
                out = out & (state.num_steps < max_steps)
            return out

        def is_due(n, first):
            return (n - first == self.length) & records

        def visit(made, kept, pred, first):
            keeping, steps, k = kept
            marks, n = made.marks, made.state.num_accepted_steps
            if self.num_slots > 0:
                stored = stop_gradient(self.stored(made.state, made.t_last))
                keeping = keeping.add(k + 1, n, stored, pred)
            if recorder is not None:
                starts, solver_state = self._from(made, first), made.state.solver_state
                row = recorder.row(starts, solver_state, marks.is_marked, first, n)
                steps = recorder.write(steps, row, k, pred)
                marks = marks._replace(is_marked=marks.is_marked & ~pred)
            kept = keeping, steps, k + jnp.where(pred, 1, 0)
            return made._replace(marks=marks), kept

        marks = steps = None
        if recorder is not None:
            marks = recorder.no_marks(init_state)
            steps = recorder.empty(init_state, self.length)
        starts = self.empty_starts(init_state)
        keeping = Keeping.of(self.empty_slots(init_state))
        made, (keeping, steps, k), first = self._loop(
            unfinished,
            body_fun,
            _Made(init_state, init_state.tprev, starts, marks, self._noise.no_values()),
            (keeping, steps, jnp.array(0)),
            is_due=is_due,
            together=True,
            visit=visit,
            buffers=buffers,
            kept_buffers=lambda kept: [kept[0].slots.states, kept[1]],
            keep=stop_gradient,
            records=records,
        )
        state, marks = made.state, made.marks
        num_wanted = div(jnp.maximum(state.num_accepted_steps - 1, 0), self.length)
        if marks is not None:
            num_wanted = marks.num_wanted
            # (They are of the size of `y`.)
            marks = marks._replace(rests=[], num_recorded=k, first=first)
        slots = keeping.slots
        return state, Residuals(
            steps, marks, slots, num_wanted, made.t_last, made.starts
        )

    def _recompute(
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

        def is_due(n, last):
            is_next = (rem(n - first, stride) == 0) & (n > last)
            return is_next & (n < stop - self.length)

        def visit(made, slots, pred, last):
            del last
            n, stored = made.state.num_accepted_steps, self.stored(*made[:2])
            return made, slots.push(n, stored, pred)

        made, slots, _ = self._loop(
            unfinished,
            body_fun,
            _Made(init_state, t_last, starts, None, self._noise.no_values()),
            slots,
            is_due=is_due,
            # (Each has its own number of free slots.)
            together=False,
            visit=visit,
            buffers=buffers,
            kept_buffers=lambda slots: [slots.states],
            # (It may be differentiated.)
            keep=lambda state: state,
            records=True,
        )
        return made.state, made.starts, slots

    def _loop(
        self,
        unfinished: Callable,
        body_fun: Callable,
        made: "_Made",
        kept: PyTree,
        *,
        is_due: Callable,
        together: bool,
        visit: Callable,
        buffers: Callable,
        kept_buffers: Callable,
        keep: Callable,
        records: Any,
    ) -> tuple["_Made", PyTree, Array]:
        """The host's loop. If `is_due(n, last)`, of the number of steps and what that
        was when it was due before, then `visit(made, kept, pred, last)` puts something
        into `kept`, which is not touched in between: for all of a batch at once, if
        `together`. The start of each step is put into `made.starts`, after `keep` has
        been applied to it. Returns also the last `last`."""

        def due(made, active, last):
            out = active & is_due(made.state.num_accepted_steps, last)
            return active & eqxi.unvmap_any(out) if together else out

        def step(carry):
            (state, t_last, starts, marks, values), active = carry
            kept_state, t_kept = keep((state, t_last))
            new_state, increments, new_values = self._noise.make(
                lambda: body_fun(state), values
            )
            start = self._start(kept_state, t_kept, keep(increments))
            place = self.place(state.num_accepted_steps)
            starts = _put(starts, start, place, active, records)
            if self.made_jump is False:
                # (So that XLA knows that it does not change.)
                new_state = replace(new_state, made_jump=state.made_jump)
            accepted = new_state.num_accepted_steps > state.num_accepted_steps
            if marks is not None:
                assert self.recorder is not None
                marks = self.recorder.mark(marks, kept_state, keep(new_state), t_kept)
            t_last = jnp.where(accepted, state.tnext, t_last)
            values = tree_where(accepted, new_values, values)
            # (An element of a batch that is done stays so: Equinox asks for the
            # condition after a step that it then takes no notice of. Of an event there
            # is no more to be seen by then, so that it would end the loop for all of
            # the others, again and again.)
            active = active & unfinished(new_state)
            return _Made(new_state, t_last, starts, marks, values), active

        def outer_body(carry):
            made, kept, last = carry

            def inner_cond(carry):
                made, active = carry
                # A batch leaves this loop together.
                return active & ~eqxi.unvmap_any(due(made, active, last))

            made, active = eqxi.while_loop(
                inner_cond,
                step,
                (made, jnp.asarray(unfinished(made.state))),
                buffers=lambda carry: [*buffers(carry[0].state), carry[0].starts],
                kind="lax",
            )
            pred, n = due(made, active, last), made.state.num_accepted_steps
            made, kept = visit(made, kept, pred, last)
            return made, kept, jnp.where(pred, n, last)

        return eqxi.while_loop(
            lambda carry: unfinished(carry[0].state),
            outer_body,
            (made, kept, jnp.asarray(made.state.num_accepted_steps)),
            buffers=lambda carry: [
                *(*buffers(carry[0].state), carry[0].starts),
                *kept_buffers(carry[1]),
            ],
            kind="lax",
        )

    def _from(self, made: "_Made", first: Array) -> Starts:
        """The steps from that with the number `first` on, in their order."""
        places = self.place(first + jnp.arange(self.length))
        return take_all(made.starts._replace(increments=[]), places)


def _put(starts: Starts, start: Starts, place: Array, active, records) -> Starts:
    """That of a step, into its place. If the step is rejected then the one after it is
    put there."""

    old = take(starts, place)
    return put(starts, place, tree_where_active(active, start, old), records)
