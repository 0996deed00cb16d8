"""Solves whose steps are not undone: every state is recomputed.

On the way forward the state is stored at the start of every `length`th step, while
there is room; and then of every other of these, and so on. The backward pass goes from
one of these *segments* to the one before. In each, one loop makes the steps again and
keeps all of their states, and another pulls the gradient back through them. Both do
nothing else. (The states of the last segment are kept on the way forward. So nothing is
recomputed in a solve of no more steps than that.)

What is stored is all that the loop needs to go on from there: so it is the host's own
loop that makes the steps again, with the step size controller, and neither times of
steps nor anything else has to be recorded.
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
from .._method.tree import replace, stop_gradient
from . import slots as slots_
from .forward import Ends, Record
from .hoist import Hoister
from .pullback import Start, Step
from .recomputed import StepPullback
from .slots import Keeping, Slots
from .undo import Carry, Undo
from .verify import is_lost
from .vmap import where_active


class Starts(NamedTuple):
    """Of steps: what is needed to differentiate them. Those of a segment have a leading
    axis."""

    # The end of the step before; and the start and the end of this one.
    t_prev: Any
    t0: Any
    t1: Any
    # `None` if it is known in advance that there are no jumps.
    made_jump: Any
    # The arrays of `y`, and of what is stored of the solver state.
    y: PyTree
    stored: PyTree


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
    """How a solve is made, and made again in segments.

    **Arguments:**

    - `num_slots`: How many states may be stored.
    - `length`: Of a segment, the most steps.
    """

    def __init__(
        self,
        pullback: StepPullback,
        made_jump: Any,
        num_slots: int,
        length: int,
    ):
        self.pullback = pullback
        # `False` if that is known in advance of every step; otherwise an example.
        self.made_jump = made_jump
        self.num_slots = num_slots
        self.length = length
        self.format = None

    def of_size(self, num_slots: int, length: int) -> "Segments":
        return Segments(self.pullback, self.made_jump, num_slots, length)

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
        """Adds the function that makes the steps of a segment again."""
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

        def unfinished(state):
            out = cond_fun(state)
            if max_steps is not None:
                out = out & (state.num_steps < max_steps)
            return out

        def is_due(state, last):
            n = state.num_accepted_steps
            return (n % self.length == 0) & (n > last)

        def step(carry):
            (state, t_last), starts = carry
            starts = self._put(
                starts, stop_gradient(state), t_last, unfinished(state), records
            )
            return self._step(body_fun, state, t_last), starts

        def outer_body(carry):
            (state, t_last), starts, last, keeping = carry

            def inner_cond(carry):
                (state, _), _ = carry
                # A batch leaves this loop together. (An element that is done must have
                # no say: Equinox asks for the condition after a step that it then takes
                # no notice of.)
                ends = unfinished(state) & is_due(state, last) & records
                return unfinished(state) & ~eqxi.unvmap_any(ends)

            (state, t_last), starts = eqxi.while_loop(
                inner_cond,
                step,
                ((state, t_last), starts),
                buffers=lambda carry: [*buffers(carry[0][0]), carry[1]],
                kind="lax",
            )
            due = is_due(state, last)
            n = state.num_accepted_steps
            keeping = keeping.add(
                n,
                stop_gradient(self.stored(state, t_last)),
                due & unfinished(state) & records,
                jnp.array(True),
                self.num_slots,
            )
            return (state, t_last), starts, jnp.where(due, n, last), keeping

        def outer_buffers(carry):
            (state, _), starts, _, keeping = carry
            return [*buffers(state), starts, keeping.slots.states]

        (state, t_last), starts, _, keeping = eqxi.while_loop(
            lambda carry: unfinished(carry[0][0]),
            outer_body,
            (
                (init_state, init_state.tprev),
                self.empty_starts(init_state),
                jnp.zeros_like(jnp.asarray(init_state.num_accepted_steps)),
                Keeping.of(self.empty_slots(init_state)),
            ),
            buffers=outer_buffers,
            kind="lax",
        )
        stored = keeping.slots.states
        times = (stored.tprev, stored.tnext)
        return state, Record(times, keeping.slots, keeping.num_wanted, t_last, starts)

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
    # Whether what was recomputed is not what was computed first.
    is_lost: Array


def walk(
    segments: Segments,
    undo: Undo,
    init_state,
    ends: Ends,
    record: Record,
    refill: Callable,
    has_stored: bool,
) -> Backward:
    """The backward pass. Unless it `has_stored` states, all are recomputed from the
    start: those that were stored have no tangents, and nor has the end."""
    length, n = segments.length, ends.num_steps
    initial = segments.stored(init_state, init_state.tprev)
    static = segments._static(init_state)
    # (Those of the last segment are there from the way forward.)
    slots, starts = record.slots, record.starts
    if not has_stored:
        starts = segments.empty_starts(init_state)
        slots = slots._replace(count=jnp.zeros_like(slots.count))

    def recompute(n: Array, slots: Slots, starts: Starts):
        """The last steps before that with the number `n`."""
        start, stored = slots.top(), slots.top_state(initial)
        pieces = -(-(n - start) // length)
        free = jnp.maximum(segments.num_slots - slots.count, 0)
        # Where there is no more room nothing is stored.
        stride = length * -(-pieces // (free + 1))
        return refill(start, stored, n, slots, stride, starts)

    def turn(backward: Backward) -> Backward:
        carry, slots, starts, is_wrong = backward
        n = carry.num_steps
        first, last = jnp.maximum(n - length, slots.top()), jnp.maximum(n - 1, 0)

        def goes_on(carry):
            return eqxi.unvmap_any(carry.num_steps > first)

        def pull(carry):
            return _pull(segments, undo, init_state, starts, static, carry, first, last)

        carry = lax.while_loop(goes_on, pull, carry)
        # The start of what has been pulled back is of no more use.
        slots = slots.pop((slots.count > 0) & (slots.top() == first))
        n = carry.num_steps
        end, starts, slots = recompute(n, slots, starts)
        lost = is_lost((end.y, end.tprev), (carry.y1, carry.t_after))
        return Backward(carry, slots, starts, is_wrong | (lost & (n > 0)))

    y, solver_state = ends.y, ends.solver_state
    if not has_stored:
        end, starts, slots = recompute(n, slots, starts)
        y, solver_state = end.y, end.solver_state
    carry = undo.start(y, solver_state)
    return lax.while_loop(
        lambda backward: eqxi.unvmap_any(backward.carry.num_steps > 0),
        turn,
        Backward(carry, slots, starts, jnp.array(False)),
    )


def _pull(
    segments: Segments,
    undo: Undo,
    init_state,
    starts: Starts,
    static: _Stored,
    carry: Carry,
    first: Array,
    last: Array,
) -> Carry:
    """Through one step, of those that are there."""
    n = carry.num_steps
    active = n > first
    # An element of a batch that is done is pulled back through its last step again.
    number = jnp.minimum(jnp.where(active, n - 1, n), last)
    place = segments.place(number)
    at: Starts = jtu.tree_map(lambda x: x[place], starts)
    y, stored = eqx.combine((at.y, at.stored), (static.y, static.solver_state))
    is_start = number == 0
    state = segments.pullback.of_step(stored, init_state.solver_state, is_start)
    made_jump = False if at.made_jump is None else at.made_jump
    t0, t1 = undo.located(number, at.t0, at.t1)
    step = Step(t0, t1, carry.y1, state, made_jump)
    start = Start(jnp.array(True), jnp.array(False), y, state)
    carry = undo.pull(carry, number, at.t_prev, step, start, active)
    return carry


def _arrays(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_array)
