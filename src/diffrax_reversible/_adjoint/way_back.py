"""The way back, from the end of a solve to its start.

Between states that are kept, steps are undone (`undo.py`). A state that is wanted and
is not there is made again (`replay.py`). And at each state that is kept, what has been
rebuilt is compared with it (`verify.py`): if they differ the whole is done again, with
more of the states wanted, and in the end all of them. Then nothing is rebuilt.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from . import verify as verify
from .check import all_finite
from .coupling_pullback import comparable
from .forward import Forward, Record
from .functions import Functions
from .replay import make_again
from .slots import Slots
from .steps import BLOCK, Session
from .undo import Carry, Ends, Segment, Undo


# How many states are wanted if the first attempt failed: one of so many; in the next
# attempt all.
_DENSE = 16
# More than there are steps.
_NEVER = 2**31 - 1


class Progress(NamedTuple):
    """Where the way back has got to."""

    carry: Carry
    slots: Slots
    # The number of the step whose start was the last to be taken from a slot.
    since: Array
    # Whether something was found to differ.
    has_failed: Array
    # Of how many steps one is wanted besides those that the solver wants.
    every: Array
    # How many steps were made again, and how often the whole was begun anew.
    num_again: Array
    num_repeats: Array


class WayBack:
    def __init__(
        self,
        *,
        fns: Functions,
        undo: Undo,
        forward: Forward,
        init_state,
        ends: Ends,
        record: Record,
        checkpoint_every: int | None,
        rerun: Callable,
    ):
        self._fns = fns
        self._undo = undo
        self._forward = forward
        self._format = forward.format
        self._init_state = init_state
        self._num_steps = ends.num_steps
        self._is_finite = all_finite(ends.y)
        self._record = record
        self._every = _NEVER if checkpoint_every is None else checkpoint_every
        self._rerun = rerun

    @property
    def _initial(self) -> tuple[PyTree, PyTree]:
        return self._init_state.y, self._init_state.solver_state

    def walk(self) -> Progress:
        """All the way."""
        record = self._record
        zero, every = jnp.array(0), jnp.array(self._every)
        progress = Progress(
            carry=self._undo.start(),
            slots=record.slots,
            since=self._num_steps,
            has_failed=jnp.array(False),
            every=every,
            num_again=zero,
            num_repeats=zero,
        )
        session = Session(record.steps, zero, self._init_state.tprev, every)

        def proceeds(loop):
            progress, *_ = loop
            is_inside = eqxi.unvmap_any(progress.carry.num_steps > 0)
            return is_inside | progress.has_failed

        def attempt(progress, session):
            session = session._replace(every=progress.every)
            return self._walk_session(progress, session)

        def restart(progress):
            return lax.cond(
                progress.has_failed, lambda: self._again(progress), lambda: progress
            )

        if not self._format.is_window:
            # (Then the record is not carried, which would copy it.)
            (progress,) = lax.while_loop(
                proceeds,
                lambda loop: (attempt(restart(loop[0]), session),),
                (progress,),
            )
            return progress

        def attempt_session(loop):
            progress, session = loop
            # If it begins anew then none of the record can be read any more, unless it
            # is that of all steps.
            is_lost = progress.has_failed & (self._num_steps > self._most)
            first = jnp.where(is_lost, self._num_steps, session.first)
            progress, session = self._next_session(
                restart(progress), session._replace(first=first)
            )
            return attempt(progress, session), session

        progress, _ = lax.while_loop(
            proceeds, attempt_session, (progress, self._first_session(session))
        )
        return progress

    def _again(self, progress: Progress) -> Progress:
        """From the end, all of a batch."""
        is_first = progress.every > _DENSE
        every = jnp.where(is_first, jnp.minimum(progress.every, _DENSE), 1)
        return Progress(
            carry=self._undo.start(),
            slots=progress.slots._replace(count=jnp.zeros_like(progress.slots.count)),
            since=self._num_steps,
            has_failed=jnp.zeros_like(progress.has_failed),
            every=every,
            num_again=progress.num_again,
            num_repeats=progress.num_repeats + 1,
        )

    #
    # Sessions
    #

    @property
    def _most(self) -> int:
        """How many steps there can be in a session, if not all are recorded. (In the
        place of the oldest row is the last, which may not be full.)"""
        return self._format.length - BLOCK

    def _first_session(self, session: Session) -> Session:
        """What can be read of the record that was made on the way forward. It begins at
        a state that is kept; if there is none, with the last step."""
        n, slots = self._num_steps, self._record.slots
        least = jnp.maximum(n - self._most, 0)
        is_used = (
            jnp.zeros(slots.size, bool)
            .at[slots.order]
            .set(jnp.arange(slots.size) < slots.count)
        )
        numbers = jnp.where(is_used & (slots.numbers >= least), slots.numbers, n)
        first = jnp.where(least == 0, 0, jnp.min(numbers))
        t_first = self._format.end(session.steps, jnp.maximum(first - 1, 0))
        t_first = jnp.where(first == 0, session.t_first, t_first)
        return session._replace(first=first, t_first=t_first)

    def _next_session(
        self, progress: Progress, session: Session
    ) -> tuple[Progress, Session]:
        """If there are no more steps to be undone in this session, makes those before
        again, from the last state that is kept, by the host's loop. (They may differ,
        by what the solution makes of rounding. But so may all steps that any adjoint
        makes again.)"""
        carry = progress.carry
        n, is_done = carry.num_steps, carry.num_steps == 0
        needs = ~is_done & (n <= session.first)

        def proceeds(loop):
            _, session, _ = loop
            return eqxi.unvmap_any(needs & (session.first >= n))

        def run(loop):
            slots, session, carry = loop
            start = slots.top()
            # What is at hand, and where a session begins, have slots of their own.
            least = n - self._most
            is_last = start >= least
            stop = jnp.where(is_last, n, least)
            # (An element that need not, makes no step.)
            stop = jnp.where(needs, stop, start)
            kept = slots.top_state(self._kept_initial)
            _, (_, t_first) = kept
            used = slots.count + jnp.where(is_last, 0, 1)
            free = jnp.maximum(self._forward.num_slots + 1 - used, 0)
            capacity = slots.count + jnp.where(is_last, free, free // 2)
            capacity = jnp.minimum(capacity, slots.size - 1)
            end, record = self._rerun(start, kept, slots, capacity, stop)
            slots = record.slots.push(stop, end, needs & ~is_last)
            new = Session(record.steps, start, t_first, session.every)
            takes = needs & is_last
            session = jtu.tree_map(lambda a, b: jnp.where(takes, a, b), new, session)
            # To be undone from its own end.
            y1, solver_state = self._restored(
                takes, end, (carry.y1, carry.solver_state)
            )
            t1 = jnp.where(takes, record.t_last, carry.t1)
            carry = carry._replace(t1=t1, y1=y1, solver_state=solver_state)
            return slots, session, carry

        loop = (progress.slots, session, carry)
        slots, session, carry = lax.while_loop(proceeds, run, loop)
        return progress._replace(slots=slots, carry=carry), session

    def _restored(self, pred, kept: PyTree, state: PyTree) -> PyTree:
        """`(y, solver_state)`, or if `pred` that which was kept."""
        arrays, _ = kept
        old, static = eqx.partition(state, eqx.is_array)
        new = jtu.tree_map(lambda a, b: jnp.where(pred, a, b), arrays, old)
        return eqx.combine(new, static)

    @property
    def _kept_initial(self) -> PyTree:
        return self._forward.kept(self._init_state, self._init_state.tprev)

    #
    # Steps
    #

    def _walk_session(self, progress: Progress, session: Session) -> Progress:
        """Back to the first step of a session, unless something is found to differ."""
        first = session.first

        def proceeds(progress):
            is_inside = progress.carry.num_steps > first
            return eqxi.unvmap_any(is_inside) & ~progress.has_failed

        return lax.while_loop(
            proceeds, lambda progress: self._walk_block(progress, session), progress
        )

    def _walk_block(self, progress: Progress, session: Session) -> Progress:
        """Some of the steps: to the next state that is kept, or wanted, at most."""
        carry, slots = progress.carry, progress.slots
        is_inside = carry.num_steps > session.first
        last = jnp.maximum(carry.num_steps - 1, session.first)
        numbers = jnp.maximum(last - jnp.arange(BLOCK), session.first)
        block = self._format.read(session, numbers)
        first = jnp.maximum(session.first, last + 1 - BLOCK)
        wanted = jnp.max(jnp.where(block.is_wanted & is_inside, numbers, -1))

        # An element of a batch waits for those that can go on without.
        is_stuck = wanted > slots.top()
        makes = eqxi.unvmap_any(is_stuck) & ~eqxi.unvmap_any(is_inside & ~is_stuck)
        slots, num_made, carry = lax.cond(
            makes,
            lambda: self._make_again(carry, slots, session, wanted, is_stuck),
            lambda: (slots, jnp.zeros_like(progress.num_again), carry),
        )
        is_waiting = is_stuck & ~makes

        target = slots.top()
        has_target = target >= first
        kept = slots.top_state(self._kept_initial)
        y, solver_state = self._restored(True, kept, self._initial)
        segment = Segment(
            block,
            last,
            jnp.where(has_target, target, -1),
            y,
            solver_state,
            session.every == 1,
        )
        limit = jnp.where(has_target, target, first)
        limit = jnp.where(is_waiting | ~is_inside, carry.num_steps, limit)
        moves = carry.num_steps > limit

        # A batch leaves the inner loop together. It touches no long array.
        def goes_on(carry):
            is_there = moves & (carry.num_steps <= limit)
            return eqxi.unvmap_any(carry.num_steps > limit) & ~eqxi.unvmap_any(is_there)

        carry = lax.while_loop(
            goes_on,
            lambda carry: self._undo.step(carry, segment, carry.num_steps > limit),
            carry,
        )
        arrives = moves & has_target & (carry.num_steps == target)
        # Of a segment of one step, nothing has been rebuilt.
        is_rebuilt = (progress.since - target > 1) & ~block.is_needed[last - target]
        checks = arrives & is_rebuilt
        differs = lax.cond(
            eqxi.unvmap_any(checks),
            lambda: self._differs(carry, segment, progress.since, checks),
            lambda: jnp.zeros_like(progress.has_failed),
        )
        y1, solver_state1 = self._restored(
            arrives, kept, (carry.y1, carry.solver_state)
        )
        return Progress(
            carry=carry._replace(y1=y1, solver_state=solver_state1),
            slots=slots.pop(arrives & (slots.count > 0)),
            since=jnp.where(arrives, target, progress.since),
            # (Together, so that what a batch shares stays shared.)
            has_failed=progress.has_failed | eqxi.unvmap_any(checks & differs),
            every=progress.every,
            num_again=progress.num_again + num_made,
            num_repeats=progress.num_repeats,
        )

    def _make_again(
        self,
        carry: Carry,
        slots: Slots,
        session: Session,
        wanted: Array,
        is_stuck: Array,
    ) -> tuple[Slots, Array, Carry]:
        # What is at hand has a slot of its own, as has where a session begins.
        in_session = jnp.where(session.first > 0, 1, 0)
        slots, num_made = make_again(
            self._format,
            self._fns,
            session,
            slots,
            self._kept_initial,
            self._initial,
            wanted,
            is_stuck,
            self._forward.num_slots + in_session,
        )
        return slots, num_made, self._undo.prime(carry)

    def _differs(
        self, carry: Carry, segment: Segment, since: Array, checks: Array
    ) -> Array:
        solver, state = self._forward.solver, (segment.y, segment.solver_state)
        _, t0, t1, _ = segment.block.times(segment.last - carry.num_steps)
        rebuilt = comparable(solver, carry.y1, carry.solver_state)
        found = verify.Found(
            t0, t1, (carry.y1, segment.y), (rebuilt, comparable(solver, *state))
        )
        num_steps = since - carry.num_steps
        return verify.differs(
            self._fns,
            found,
            carry.grad_y1,
            carry.grad_consts,
            num_steps,
            checks,
            self._is_finite,
        )
