"""The way back: undoing the steps of a solve, and pulling a gradient through each."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_save_state
from .._jax_compat import eqxi
from .._method.controlled import precision
from .._method.tree import tree_add
from . import save as save, times as times_
from .drift import distance
from .hoist import materialise
from .pullback import AbstractPullback, comparable, Functions, Rebuilt, Step
from .record import Record, Recorder, Segment
from .vmap import where_active


# A branch in the inner loop takes about as long as it does to undo a step of a small
# system. So if `y` and the solver state have no more bytes than this, then there is
# none: what has been rebuilt last is kept, to be looked at outside the loop.
_SMALL = 512


class Ends(NamedTuple):
    """What is kept of the final state."""

    y: PyTree
    solver_state: PyTree
    tprev: Array
    num_steps: Array
    saved: list[save.Saved]
    # `(None, None)` if there are no events.
    event_times: tuple[Any, Any]


class Carry(NamedTuple):
    """What is carried from step to step, backwards. `1` is the end of the next step to
    be undone."""

    # How many steps are still to be undone. The index of the next is one less.
    num_steps: Array
    # How many of the stored checkpoints are still to be reached.
    num_slots: Array
    t1: Array
    # The start of the step after, which differs from `t1` if there is a jump between.
    t_after: Array
    y1: PyTree
    solver_state: PyTree
    pullback: PyTree
    # For each `SubSaveAt`.
    saved: list[save.Saved]
    grad_y1: PyTree
    grad_solver_state: PyTree
    grad_consts: dict[int, Any]
    grad_times: times_.Times
    # That at `t_after`; or `None` if no gradient asks for it.
    node: times_.Node | None
    # The largest so far.
    drift: Array
    # What has been rebuilt last, and from what; or `None`. See `_SMALL`.
    last: Any


class WayBack:
    """From the end of a solve to its start."""

    def __init__(
        self,
        *,
        fns: Functions,
        pullback: AbstractPullback,
        recorder: Recorder,
        init_state,
        ends: Ends,
        grad_final_state,
        times: times_.Times,
        wanted: times_.Times,
        steps: tuple[int, ...],
        check_drift: bool,
        passed_solver_state: bool,
    ):
        self._fns = fns
        self._pullback = pullback
        self._recorder = recorder
        self._init_state = init_state
        self._ends = ends
        self._grad_final_state = grad_final_state
        self._times = times
        self._wanted = wanted
        # Of each `SubSaveAt`.
        self._steps = steps
        self._check_drift = check_drift
        self._passed_solver_state = passed_solver_state

        self._grad_saves = jtu.tree_leaves(
            grad_final_state.save_state, is_leaf=is_save_state
        )
        self._grad_ys = [None if save.is_zero(s.ys) else s.ys for s in self._grad_saves]
        self._grad_dense_infos = _none_if_zero(grad_final_state.dense_infos)
        self._grad_event_info = _none_if_zero(grad_final_state.event_dense_info)
        self._want_dense_info = (
            self._grad_dense_infos is not None
            or self._grad_event_info is not None
            or any(
                g is not None and t is not None
                for g, t in zip(self._grad_ys, times.saved)
            )
        )
        self._zero_drift = jnp.zeros((), precision(ends.y).dtype)
        leaves = jtu.tree_leaves((init_state.y, init_state.solver_state))
        num_bytes = sum(x.size * x.dtype.itemsize for x in leaves if eqx.is_array(x))
        self._is_small = num_bytes <= _SMALL
        # Whether what is stored replaces what has been rebuilt, and whether it must do
        # so before a gradient is pulled back through the step.
        self._restores = recorder.has_slots or pullback.restores_start
        self._restores_inside = self._restores and not (
            self._is_small and pullback.can_restore_after(self._want_dense_info)
        )

    #
    # The whole of it
    #

    def start(self, record: Record) -> Carry:
        """At the end of the solve."""
        ends, grad = self._ends, self._grad_final_state
        no_steps = ends.num_steps == 0
        t1 = self.last_time(record)
        grad_times = times_.zeros(self._wanted, self._times)
        if self._wanted.any_of_steps:
            pairs = [(ends.tprev, grad.tprev, no_steps)]
            if ends.event_times[0] is not None:
                event_t0, event_t1 = ends.event_times
                pairs += [
                    (event_t0, grad.event_tprev, ends.num_steps <= 1),
                    (event_t1, grad.event_tnext, no_steps),
                ]
            for t, grad_t, is_start in pairs:
                grad_times = self._add_time(grad_times, t, grad_t, is_start)
        fns, state = self._fns, ends.solver_state
        return Carry(
            num_steps=ends.num_steps,
            num_slots=self._recorder.num_slots(record),
            t1=t1,
            t_after=ends.tprev,
            y1=ends.y,
            solver_state=state,
            pullback=self._pullback.prime(fns, t1, ends.y, state),
            saved=ends.saved,
            grad_y1=materialise(grad.y, eqx.filter(ends.y, eqx.is_inexact_array)),
            grad_solver_state=materialise(
                grad.solver_state, eqx.filter(state, eqx.is_inexact_array)
            ),
            grad_consts=fns.zero_consts(save.function_names(fns.hoisted)),
            grad_times=grad_times,
            node=self._last_node(t1),
            drift=self._zero_drift,
            last=self._last((ends.y, state), (ends.y, state)),
        )

    def _last_node(self, t1) -> times_.Node | None:
        if not any(self._wanted.clipped):
            return None
        # (If it is not the end of the solve then a solve that an event has ended.)
        grad = self._grad_final_state
        grads = [g for g in (grad.tprev, grad.event_tnext) if g is not None]
        return times_.Node(t1, sum(grads, jnp.zeros_like(t1)))

    def _last(self, state0, state1):
        if not (self._is_small and self._check_drift):
            return None
        return self._comparable(state0), self._comparable(state1)

    def _comparable(self, state):
        y, solver_state = state
        return comparable(self._pullback.solver, y, solver_state)

    def last_time(self, record: Record) -> Array:
        """The end of the last accepted step."""
        n = self._ends.num_steps
        # (There may be one that was rejected.)
        return jnp.where(n == 0, self._ends.tprev, self._recorder.last_time(record, n))

    def event_is_lost(self, record: Record) -> Array | None:
        """Whether the host interpolates over a last step that was not accepted, with a
        gradient. `None` if there is no such gradient."""
        if self._grad_event_info is None:
            return None
        was_used = [jnp.any(g != 0) for g in jtu.tree_leaves(self._grad_event_info)]
        _, event_t1 = self._ends.event_times
        is_lost = event_t1 != self.last_time(record)
        return ft.reduce(jnp.logical_or, was_used) & is_lost

    def walk(self, carry: Carry, record: Record, first) -> Carry:
        """Back to the step number `first`."""
        recorder, init_state = self._recorder, self._init_state

        # There are two loops for the sake of the inner one, which touches no long array
        # then: see `record._BLOCK`. As on the way forward, a batch leaves it together.
        def walk_segment(carry: Carry) -> Carry:
            segment = recorder.read_segment(
                record, init_state, carry.num_steps, carry.num_slots, first
            )
            read_stored = ft.partial(recorder.read_stored, record, init_state, segment)
            if self._is_small and (self._restores or self._check_drift):
                stored = read_stored()
                read_stored = lambda: stored

            def proceeds(carry):
                unfinished = carry.num_steps > first
                is_at_end = unfinished & (carry.num_steps <= segment.first)
                return eqxi.unvmap_any(unfinished) & ~eqxi.unvmap_any(is_at_end)

            before = carry.num_steps
            carry = lax.while_loop(
                proceeds, lambda carry: self._undo(carry, segment, read_stored), carry
            )
            if self._is_small:
                is_here = (before > segment.stored_at) & (
                    carry.num_steps <= segment.stored_at
                )
                carry = self._restore_after(carry, is_here, segment, read_stored)
            num_passed = segment.num_passed(carry.num_steps)
            return carry._replace(num_slots=carry.num_slots - num_passed)

        return lax.while_loop(
            lambda carry: eqxi.unvmap_any(carry.num_steps > first), walk_segment, carry
        )

    def walk_windows(
        self, carry: Carry, record: Record, rerun: Callable[[Array], Record]
    ) -> tuple[Carry, Array]:
        """Back to the start, if no more than the last steps are recorded. `rerun` makes
        the record of that many steps. Returns as well whether these were the same
        steps."""
        recorder, num_steps = self._recorder, self._ends.num_steps

        def walk_window(carry__record__consistent):
            carry, record, is_consistent = carry__record__consistent
            # An element that is done makes its first step again.
            is_done = carry.num_steps == 0
            stop = jnp.where(
                is_done, jnp.minimum(num_steps, recorder.length), carry.num_steps
            ).astype(jnp.result_type(int))
            again = rerun(stop)
            record = recorder.replace_steps(record, again)
            is_same = again.t_last == carry.t1
            is_consistent = is_consistent & (is_same | is_done)
            carry = self.walk(carry, record, recorder.first_step(stop))
            return carry, record, is_consistent

        carry = self.walk(carry, record, recorder.first_step(num_steps))
        carry, _, is_repeated = lax.while_loop(
            lambda x: eqxi.unvmap_any(x[0].num_steps > 0),
            walk_window,
            (carry, record, jnp.array(True)),
        )
        return carry, is_repeated

    #
    # One step
    #

    def _undo(
        self, carry: Carry, segment: Segment, read_stored: Callable[[], PyTree]
    ) -> Carry:
        # Under `vmap` an element that is done makes its first step again, with a zero
        # gradient: at a place where it has been before, so that no NaN comes of it.
        active = carry.num_steps > 0
        unfinished = carry.num_steps > 1
        index = jnp.maximum(carry.num_steps - 1, 0)
        zero_unless_active = ft.partial(
            jtu.tree_map, lambda g: where_active(active, g, jnp.zeros_like(g))
        )
        # Which for an element that is done are the result.
        grad_y0, grad_solver_state0 = carry.grad_y1, carry.grad_solver_state
        carry = carry._replace(
            grad_y1=zero_unless_active(grad_y0),
            grad_solver_state=zero_unless_active(grad_solver_state0),
        )
        is_start = index == 0
        t_prev, t0, made_jump = segment.times(index)
        init_state = self._init_state
        step = Step(
            t0,
            carry.t1,
            carry.y1,
            self._recorder.read_recorded(segment, carry.solver_state, index),
            made_jump,
            (is_start, init_state.y, init_state.solver_state)
            if self._passed_solver_state
            else None,
        )
        restore = ft.partial(
            self._restore, carry, index == segment.stored_at, segment, read_stored
        )
        fns = self._fns
        rebuilt = self._pullback.rebuild(
            fns, carry.pullback, step, restore, self._want_dense_info
        )
        drift, last = rebuilt.restored
        before, grad_end, (grad_t0, grad_t1), grad_dense_info = self._pull_saved(
            carry, index, t_prev, step, rebuilt
        )
        grads, new_pullback = rebuilt.pull(
            before.grad_y1, before.grad_solver_state, grad_dense_info
        )
        grad_consts = dict(before.grad_consts)
        save.accumulate(grad_consts, grads.consts)
        grad_times = before.grad_times
        if fns.times_vary:
            for t, grad, at_start in (
                (carry.t_after, grad_end, jnp.array(False)),
                (carry.t1, grad_t1 + grads.t1, jnp.array(False)),
                (t0, grad_t0 + grads.t0, is_start),
            ):
                grad = jnp.where(active, grad, 0)
                grad_times = self._add_time(grad_times, t, grad, at_start)
        node = carry.node
        if node is not None:
            grad_node = jnp.where(active, node.grad + grad_end + grad_t1 + grads.t1, 0)
            grad_times = times_.move(
                grad_times, self._times, carry.t1, t0, node.next, grad_node
            )
            grad_node = grad_t0 + grads.t0
            if self._grad_final_state.event_tprev is not None:
                is_last = carry.num_steps == self._ends.num_steps
                event_grad = self._grad_final_state.event_tprev
                grad_node = grad_node + jnp.where(is_last, event_grad, 0)
            node = times_.Node(carry.t1, grad_node)
        return Carry(
            num_steps=index,
            num_slots=carry.num_slots,
            t1=_keep(unfinished, t_prev, carry.t1),
            t_after=t0,
            y1=_keep(unfinished, rebuilt.y0, carry.y1),
            solver_state=_keep(unfinished, rebuilt.solver_state, carry.solver_state),
            # Of a batch it is one whole. An element that is done has what belongs to
            # its start here, and pulls back zero through it.
            pullback=new_pullback,
            saved=before.saved,
            grad_y1=_keep(active, grads.y0, grad_y0),
            grad_solver_state=_keep(active, grads.solver_state, grad_solver_state0),
            grad_consts=grad_consts,
            grad_times=grad_times,
            node=node,
            drift=carry.drift if last is not None else jnp.maximum(carry.drift, drift),
            last=last,
        )

    def _restore(
        self,
        carry: Carry,
        is_here: Array,
        segment: Segment,
        read_stored: Callable[[], PyTree],
        y0: PyTree,
        solver_state0: PyTree,
    ):
        """What a pullback calls with what it has rebuilt. `is_here` if that is stored
        too."""
        made_steps = self._ends.num_steps > 0
        # An element that never made a step is already where it started.
        rebuilt = _keep(made_steps, (y0, solver_state0), (carry.y1, carry.solver_state))

        def restored():
            return _select(is_here, read_stored(), rebuilt)

        if self._is_small:
            y0, solver_state0 = restored() if self._restores_inside else rebuilt
            last = self._last(rebuilt, (carry.y1, carry.solver_state))
            return y0, solver_state0, (self._zero_drift, last)
        if not (self._restores or self._check_drift):
            return *rebuilt, (self._zero_drift, None)

        def compare():
            stored, drift = restored(), self._zero_drift
            if self._check_drift:
                drift = distance(
                    self._comparable(rebuilt),
                    self._comparable(stored),
                    self._comparable((carry.y1, carry.solver_state)),
                )
                is_active = is_here & (carry.num_steps > 0)
                drift = jnp.where(is_active & segment.is_undone, drift, 0)
            return (stored if self._restores else None), drift

        stored, drift = lax.cond(
            eqxi.unvmap_any(is_here & made_steps),
            compare,
            lambda: (rebuilt if self._restores else None, self._zero_drift),
        )
        y0, solver_state0 = rebuilt if stored is None else stored
        return y0, solver_state0, (drift, None)

    def _restore_after(
        self,
        carry: Carry,
        is_here: Array,
        segment: Segment,
        read_stored: Callable[[], PyTree],
    ) -> Carry:
        """The same outside the inner loop, which ends where something is stored."""
        state = (carry.y1, carry.solver_state)
        if self._check_drift:
            last_y0, last_y1 = carry.last
            stored = _select(True, read_stored(), state)
            drift = distance(last_y0, self._comparable(stored), last_y1)
            drift = jnp.where(is_here & segment.is_undone, drift, 0)
            carry = carry._replace(drift=jnp.maximum(carry.drift, drift))
        if self._restores and not self._restores_inside:
            # (An element that is done stays at the end of its first step.)
            y1, solver_state = _select(
                is_here & (carry.num_steps > 0), read_stored(), state
            )
            carry = carry._replace(y1=y1, solver_state=solver_state)
        return carry

    def _pull_saved(
        self, carry: Carry, index: Array, t_prev: Array, step: Step, rebuilt: Rebuilt
    ):
        """Pulls back what was saved during a step, in the order opposite to that in
        which it was saved.

        Returns `carry`, before the step is undone but with these gradients; and the
        gradients of where the step after starts, of the start and the end of this step,
        and of `rebuilt.dense_info`.
        """
        active = carry.num_steps > 0
        fns, grad = self._fns, self._grad_final_state
        grad_consts, grad_times = dict(carry.grad_consts), carry.grad_times
        grad_y1 = carry.grad_y1
        grad_dense_info = None
        if self._grad_event_info is not None:
            # The last step is the one in which an event may have been.
            is_last = active & (carry.num_steps == self._ends.num_steps)
            grad_dense_info = jtu.tree_map(
                lambda g: jnp.where(is_last, g, 0), self._grad_event_info
            )
        if self._grad_dense_infos is not None:
            grad_dense_info = tree_add(
                grad_dense_info,
                jtu.tree_map(
                    lambda g: where_active(active, g[index], jnp.zeros_like(g[index])),
                    self._grad_dense_infos,
                ),
            )
        grad_t0 = grad_t1 = grad_end = jnp.zeros_like(carry.t1)
        if fns.times_vary and grad.dense_ts is not None:
            grad_end = grad_end + grad.dense_ts[index + 1]
        new_saved = []
        for i, saved in enumerate(carry.saved):
            grad_ys, grad_saved = self._grad_ys[i], self._grad_saves[i]
            if self._steps[i] != 0:
                is_saved = active & ((index + 1) % self._steps[i] == 0)
                if grad_ys is not None:
                    new_consts, grad_t, grad_y = save.pull_steps(
                        fns, i, is_saved, carry.t_after, carry.y1, grad_ys, saved
                    )
                    save.accumulate(grad_consts, new_consts)
                    grad_y1 = tree_add(grad_y1, grad_y)
                    grad_end = grad_end + grad_t
                if fns.times_vary and grad_saved.ts is not None:
                    grad_end = grad_end + jnp.where(
                        is_saved, saved.last(grad_saved.ts), 0
                    )
                saved = saved._replace(index=saved.index - jnp.where(is_saved, 1, 0))
            ts = self._times.saved[i]
            if ts is not None and (grad_ys is not None or self._wanted.saved[i]):
                saved, grad_consts, grad_ts, grad_dense_info, new_t0, new_t1 = (
                    save.pull_ts(
                        fns,
                        i,
                        step,
                        rebuilt.dense_info,
                        ts,
                        # Saved here were those after the end of the step before.
                        lambda t: active & ((index == 0) | (t > t_prev)),
                        saved,
                        grad_saved,
                        grad_consts,
                        grad_times.saved[i],
                        grad_dense_info,
                    )
                )
                grad_times = grad_times._replace(
                    saved=_replaced(grad_times.saved, i, grad_ts)
                )
                grad_t0, grad_t1 = grad_t0 + new_t0, grad_t1 + new_t1
            new_saved.append(saved)
        carry = carry._replace(
            saved=new_saved,
            grad_y1=grad_y1,
            grad_consts=grad_consts,
            grad_times=grad_times,
        )
        return carry, grad_end, (grad_t0, grad_t1), grad_dense_info

    def _add_time(self, grad_times: times_.Times, t, grad, is_start) -> times_.Times:
        if grad is None:
            return grad_times
        return times_.add(grad_times, self._times, t, grad, is_start)


def _select(pred, arrays: PyTree, state: PyTree) -> PyTree:
    """`state`, or if `pred` the same with these arrays."""
    old, static = eqx.partition(state, eqx.is_array)
    new = jtu.tree_map(lambda a, b: jnp.where(pred, a, b), arrays, old)
    return eqx.combine(new, static)


def _keep(pred, new: PyTree, old: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: where_active(pred, a, b), new, old)


def _none_if_zero(grads: PyTree) -> PyTree:
    return None if save.is_zero(grads) else grads


def _replaced(xs: tuple, i: int, x) -> tuple:
    return (*xs[:i], x, *xs[i + 1 :])
