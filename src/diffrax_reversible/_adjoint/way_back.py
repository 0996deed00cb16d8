"""The way back, from the end of a solve to its start.

Between states that are kept, steps are undone (`undo.py`). A state that is wanted and
is not there is made again (`replay.py`). And at each state that is kept, what has been
rebuilt is compared with it (`verify.py`): if they differ the whole is done again, with
more of the states wanted, and in the end all of them. Then nothing is rebuilt.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .._method.controlled import precision
from . import verify as verify
from .check import all_finite
from .forward import Ends, Forward, Record
from .functions import Functions
from .replay import make_again
from .slots import Slots
from .steps import BLOCK, Block, Window
from .undo import Carry, Segment, Undo
from .windows import restored, Windows


# How many states are wanted if an attempt failed: one of so many. If that would not
# have helped, as it failed over fewer steps, then all.
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
    # Whether what was made again is not what was made first, which is not to be cured.
    is_lost: Array
    # The number of the step from which all was made again that has been compared.
    compared: Array
    # Whether what the pullback carries is of where the way back stands. (A batch has
    # it as one whole: so it is lost to an element that waits for others.)
    is_primed: Array
    # What rounding of `y` has done to the gradient, see `verify.differs`.
    noise: Array
    # Of how many steps one is wanted besides those that the solver wants. (In the next
    # attempt, once this one has failed.)
    every: Array


class _Read(NamedTuple):
    """Steps of the record, backwards."""

    block: Block
    numbers: Array

    @property
    def last(self) -> Array:
        return self.numbers[0]

    @property
    def first(self) -> Array:
        return self.numbers[-1]


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
        rebuilds: bool,
    ):
        self._fns = fns
        self._undo = undo
        self._forward = forward
        self._format = forward.format
        self._init_state = init_state
        self._ends = ends
        self._num_steps = ends.num_steps
        self._is_finite = all_finite(ends.y)
        self._record = record
        self._every = _NEVER if checkpoint_every is None else checkpoint_every
        self._windows = Windows(forward, init_state, self._num_steps, record, rerun)
        # Or else every state is wanted, and made again from the start.
        self._rebuilds = rebuilds

    @property
    def _initial(self) -> tuple[PyTree, PyTree]:
        return self._init_state.y, self._init_state.solver_state

    def walk(self) -> Progress:
        """All the way."""
        record, ends = self._record, self._ends
        zero, every = jnp.array(0), jnp.array(self._every)
        progress = Progress(
            carry=self._undo.start(ends.y, ends.solver_state),
            slots=record.slots,
            since=self._num_steps,
            has_failed=jnp.array(False),
            is_lost=jnp.array(False),
            compared=self._num_steps,
            is_primed=jnp.array(True),
            noise=jnp.zeros((), precision(ends.y).dtype),
            every=every,
        )
        window = Window(record.steps, zero, self._init_state.tprev, every)
        if not self._rebuilds:
            progress = self._without_kept(progress, window)

        def proceeds(loop):
            progress, *_ = loop
            is_inside = eqxi.unvmap_any(progress.carry.num_steps > 0)
            return is_inside | progress.has_failed

        def attempt(progress, window):
            window = window._replace(every=progress.every)
            return self._walk_window(progress, window)

        def restart(progress):
            if not self._rebuilds:
                return progress
            return lax.cond(
                progress.has_failed, lambda: self._again(progress), lambda: progress
            )

        if not self._format.is_window:
            # (Then the record is not carried, which would copy it.)
            (progress,) = lax.while_loop(
                proceeds,
                lambda loop: (attempt(restart(loop[0]), window),),
                (progress,),
            )
            return progress

        def attempt_window(loop):
            progress, window = loop
            # If it begins anew then none of the record can be read any more, unless it
            # is that of all steps.
            is_lost = progress.has_failed & ~windows.covers_all
            first = jnp.where(is_lost, self._num_steps, window.first)
            progress, window = restart(progress), window._replace(first=first)
            old = window
            carry, slots, window = windows.next_window(
                progress.carry, progress.slots, window
            )
            is_primed = progress.is_primed & (window.first == old.first)
            progress = progress._replace(carry=carry, slots=slots, is_primed=is_primed)
            return attempt(progress, window), window

        windows = self._windows
        window = windows.first_window(window)
        if not self._rebuilds:
            window = window._replace(first=self._num_steps)
        progress, _ = lax.while_loop(proceeds, attempt_window, (progress, window))
        return progress

    def _without_kept(self, progress: Progress, window: Window) -> Progress:
        """With every state wanted, and none of those that were kept, nor the end: for
        these have no tangents."""
        slots, every = progress.slots, jnp.array(1)
        slots = slots._replace(count=jnp.zeros_like(slots.count))
        carry, n = progress.carry, self._num_steps
        if not self._format.is_window:
            # (Otherwise that is done for the first window.)
            window = window._replace(every=every)
            slots, _ = self._make_again(slots, window, n, n > 0, jnp.array(False))
            end = slots.top_state(self._windows.kept_initial)
            slots = slots.pop(n > 0)
            carry = self._undo.start(*restored(True, end, self._initial))
        return progress._replace(carry=carry, slots=slots, every=every)

    def _again(self, progress: Progress) -> Progress:
        """From the end, all of a batch."""
        return Progress(
            carry=self._undo.start(self._ends.y, self._ends.solver_state),
            slots=progress.slots._replace(count=jnp.zeros_like(progress.slots.count)),
            since=self._num_steps,
            has_failed=jnp.zeros_like(progress.has_failed),
            is_lost=jnp.zeros_like(progress.is_lost),
            compared=self._num_steps,
            is_primed=jnp.ones_like(progress.is_primed),
            noise=jnp.zeros_like(progress.noise),
            every=progress.every,
        )

    def _walk_window(self, progress: Progress, window: Window) -> Progress:
        """Back to the first step of a window, unless something is found to differ."""
        first = window.first

        def proceeds(progress):
            is_inside = progress.carry.num_steps > first
            return eqxi.unvmap_any(is_inside) & ~progress.has_failed

        return lax.while_loop(
            proceeds, lambda progress: self._walk_block(progress, window), progress
        )

    def _walk_block(self, progress: Progress, window: Window) -> Progress:
        """Some of the steps: until one of a batch has come to the end of a block."""
        last = jnp.maximum(progress.carry.num_steps - 1, window.first)
        numbers = jnp.maximum(last - jnp.arange(BLOCK), window.first)
        # (Once for many segments, as it takes longer than a step of a small system.)
        read = _Read(self._format.read(window, numbers), numbers)

        def proceeds(progress):
            n = progress.carry.num_steps
            is_inside = n > window.first
            is_over = is_inside & (n <= read.first)
            out = eqxi.unvmap_any(is_inside) & ~eqxi.unvmap_any(is_over)
            return out & ~progress.has_failed

        return lax.while_loop(
            proceeds,
            lambda progress: self._walk_segment(progress, window, read),
            progress,
        )

    def _walk_segment(
        self, progress: Progress, window: Window, read: "_Read"
    ) -> Progress:
        """To the next state that is kept, or wanted, at most."""
        carry, slots = progress.carry, progress.slots
        block, numbers, last, first = read.block, read.numbers, read.last, read.first
        is_inside = carry.num_steps > window.first
        is_wanted = block.is_wanted & (numbers < carry.num_steps) & is_inside
        wanted = jnp.max(jnp.where(is_wanted, numbers, -1))

        # An element of a batch waits for those that can go on without.
        is_stuck = wanted > slots.top()
        makes = eqxi.unvmap_any(is_stuck) & ~eqxi.unvmap_any(is_inside & ~is_stuck)
        # A step from a known state to the one at hand is made for a comparison. If that
        # is known too then of what is made again, once, as what is made from it is the
        # same. And if it is rebuilt, of that, if the step cannot be undone. (Otherwise
        # it is compared where the way back arrives.)
        is_made, start = is_stuck & makes, slots.top()
        is_next = is_inside & (carry.num_steps - 1 == jnp.where(is_made, wanted, start))
        is_known = progress.since == carry.num_steps
        compares = is_made & is_next & is_known & (start < progress.compared)
        is_end = is_next & ~is_known & self._is_needed(read, carry.num_steps - 1)
        # (Not in a branch, which would copy all that is kept.)
        proceeds = (compares | is_end) & self._rebuilds
        y_seen = jtu.tree_map(
            lambda a, b: jnp.where(is_end, a, b), carry.y_seen, carry.y1
        )
        carry = carry._replace(y_seen=y_seen)
        slots, end = self._make_again(slots, window, wanted, is_made, proceeds)
        is_lost = compares & self._rebuilds & verify.is_lost(end[0], carry.y1)
        is_waiting = is_stuck & ~makes

        target = slots.top()
        has_target = target >= first
        # Then nothing has to be rebuilt.
        is_single = has_target & (progress.since - target <= 1)
        kept = slots.top_state(self._windows.kept_initial)
        y, solver_state = restored(True, kept, self._initial)
        segment = Segment(
            block,
            last,
            jnp.where(has_target, target, -1),
            y,
            solver_state,
            is_single,
            window.every == 1,
        )
        # (Where it cannot be undone, only to its end.)
        is_before = ~is_single & self._is_needed(read, target)
        limit = jnp.where(has_target, target + jnp.where(is_before, 1, 0), first)
        limit = jnp.where(is_waiting | ~is_inside, carry.num_steps, limit)
        moves = carry.num_steps > limit
        if carry.pullback is not None:
            primes = eqxi.unvmap_any(moves & ~progress.is_primed)
            carry = lax.cond(primes, self._undo.prime, lambda carry: carry, carry)

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
        checks = (arrives & ~is_single) | is_end
        differs, noise = jnp.zeros_like(progress.has_failed), progress.noise
        if self._rebuilds:
            differs, noise = lax.cond(
                eqxi.unvmap_any(checks),
                lambda: self._differs(
                    carry,
                    segment,
                    restored(~is_end, kept, end),
                    progress,
                    checks,
                    window.first,
                ),
                lambda: (differs, noise),
            )
        # (Together, so that what a batch shares stays shared.)
        fails = checks & differs
        is_short = progress.since - carry.num_steps <= _DENSE
        is_last = eqxi.unvmap_any(fails & is_short) | (progress.every <= _DENSE)
        fails = eqxi.unvmap_any(fails)
        y1, solver_state1 = restored(arrives, kept, (carry.y1, carry.solver_state))
        return Progress(
            carry=carry._replace(y1=y1, solver_state=solver_state1),
            slots=slots.pop(arrives & (slots.count > 0)),
            since=jnp.where(arrives | is_end, carry.num_steps, progress.since),
            has_failed=progress.has_failed | fails,
            is_lost=progress.is_lost | is_lost,
            compared=jnp.where(compares, start, progress.compared),
            is_primed=moves | (progress.is_primed & ~eqxi.unvmap_any(moves)),
            noise=noise,
            every=jnp.where(fails, jnp.where(is_last, 1, _DENSE), progress.every),
        )

    def _is_needed(self, read: _Read, number: Array) -> Array:
        """Of a step that was read."""
        return read.block.is_needed[read.last - number]

    def _make_again(
        self,
        slots: Slots,
        window: Window,
        wanted: Array,
        pred: Array,
        goes_on: Array,
    ) -> tuple[Slots, tuple[PyTree, PyTree]]:
        # What is at hand has a slot of its own, as has where a window begins.
        in_window = jnp.where(window.first > 0, 1, 0)
        return make_again(
            self._format,
            self._fns,
            window,
            slots,
            self._windows.kept_initial,
            self._initial,
            wanted,
            pred,
            goes_on,
            self._forward.num_slots + in_window,
            self._undo.located,
        )

    def _differs(
        self,
        carry: Carry,
        segment: Segment,
        state: tuple[PyTree, PyTree],
        progress: Progress,
        checks: Array,
        first: Array,
    ) -> tuple[Array, Array]:
        # (Of a step next to it, at the end of those that were read.)
        k = jnp.maximum(segment.last - carry.num_steps, 0)
        _, t0, t1, _ = segment.block.times(k)
        # (Of the first step that was recorded it is not known.)
        at_rest = (carry.num_steps > first) & (carry.num_steps <= segment.last)
        at_rest = at_rest & ~segment.block.is_needed[k]
        found = verify.Found(
            t0,
            t1,
            (carry.y1, carry.solver_state),
            state,
            (carry.y_seen, progress.carry.solver_state),
            at_rest,
        )
        num_steps = progress.since - carry.num_steps
        return verify.differs(
            self._fns,
            found,
            carry.grad_y1,
            carry.grad_consts,
            num_steps,
            progress.noise,
            checks,
            self._is_finite,
        )
