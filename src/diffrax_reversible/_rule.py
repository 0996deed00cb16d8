"""The loop over the steps of a solve, and the rule for its derivative: the way back."""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from . import _save as save, _times as times_
from ._batch import Batch, find_batch, mark_batch
from ._compat import is_save_state, is_sub_save_at
from ._controlled import precision
from ._drift import all_finite, check_drift, distance
from ._guard import once_only, reverse_only, without_tangents
from ._hoist import Hoisted, Hoister, materialise, tree_add
from ._pullback import AbstractPullback, comparable, Functions, make_pullback, Step
from ._record import make_recorder, Record, Recorder
from ._vmap import where_active


inner_loop = jax.named_call(eqxi.while_loop, name="inner-loop")


def with_arrays(init_state):
    """After a step what the state holds are arrays, and before it too."""
    if init_state.made_jump is True:
        # Or the host takes every step to follow a jump.
        init_state = dataclasses.replace(init_state, made_jump=jnp.array(True))
    # The initial solver state may hold Python scalars.
    solver_state = jtu.tree_map(
        lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x,
        init_state.solver_state,
    )
    return dataclasses.replace(init_state, solver_state=solver_state)


class Meter:
    """The user's progress meter, which makes no progress when steps are repeated."""

    def __init__(self, meter: diffrax.AbstractProgressMeter):
        self._meter = meter
        self.is_on = True

    def step(self, state, progress):
        return self._meter.step(state, progress) if self.is_on else state


def outer_while_loop(
    cond_fun,
    body_fun,
    init_state,
    *,
    max_steps,
    buffers,
    args,
    terms,
    solver,
    stepsize_controller,
    saveat,
    t1,
    progress_meter,
    checkpoints,
    checkpoint_every,
    drift_tolerance,
    sum_over_batch,
    passed_solver_state,
    num_checkpoints,
):
    """The host's loop over steps, with our rule for differentiating it.

    `solver.init`, saving at `t0` and `t1`, locating an event, and all else that the
    host does before and after, lies outside this function and is differentiated by JAX.
    """
    init_state = without_tangents(with_arrays(init_state))
    recorder = make_recorder(
        solver,
        stepsize_controller,
        init_state,
        args,
        max_steps,
        checkpoints,
        checkpoint_every,
    )

    run = ft.partial(
        recorder.run, cond_fun, body_fun, max_steps=max_steps, buffers=buffers
    )

    def rerun(stop):
        _, record = run(init_state, has_slots=False, stop=stop)
        return record

    # What the rule needs, as functions whose constants are explicit.
    hoister = Hoister()
    pullback = make_pullback(solver, init_state.solver_state, recorder.made_jump)
    step = Step(
        init_state.tprev,
        init_state.tnext,
        init_state.y,
        init_state.solver_state,
        recorder.made_jump,
    )
    pullback.add_functions(hoister, terms, args, step)
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_sub_save_at)
    for i, sub in enumerate(subs):
        save.add_functions(hoister, i, sub, solver, terms, args, step)
    num_local = hoister.num_consts
    hoister.add("run", run, init_state)
    if recorder.is_window:
        progress_meter.is_on = False
        hoister.add("rerun", rerun, jnp.array(0))
        progress_meter.is_on = True
    hoisted, consts = hoister.finish()

    controller, unknown = times_.controller_times(stepsize_controller)
    times = times_.Times(
        init_state.tprev, t1, tuple(sub.ts for sub in subs), controller
    )
    inputs = _Inputs(init_state, times, without_tangents(consts), unknown, None)
    inputs = reverse_only(inputs)
    if sum_over_batch:
        inputs = inputs._replace(mark=mark_batch(inputs))
    final_state, n = _loop(
        inputs,
        hoisted=hoisted,
        num_local=num_local,
        recorder=recorder,
        pullback=pullback,
        # (A boolean in diffrax 0.7.0.)
        steps=tuple(int(sub.steps) for sub in subs),
        drift_tolerance=drift_tolerance,
        passed_solver_state=passed_solver_state,
    )
    # Handed to `loop` past the host, which calls this.
    num_checkpoints.append(n)
    # The locations of the steps are constants, and what else depends on them alone; and
    # the host makes nothing of the last values of event functions but comparisons.
    stop = ft.partial(
        jtu.tree_map, lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x
    )
    return dataclasses.replace(
        final_state,
        tnext=stop(final_state.tnext),
        controller_state=stop(final_state.controller_state),
        progress_meter_state=stop(final_state.progress_meter_state),
        event_values=stop(final_state.event_values),
        solver_state=recorder.stop_recorded(final_state.y, final_state.solver_state),
    )


class _Inputs(NamedTuple):
    init_state: Any
    times: times_.Times
    consts: tuple[Any, ...]
    # Whatever is in a step size controller that we do not know.
    unknown: PyTree
    # `None` if gradients are not to be summed over a batch.
    mark: Any


@eqx.filter_custom_vjp
def _loop(inputs, *, hoisted, **kwargs):
    del kwargs
    final_state, record = hoisted.call("run", inputs.consts, inputs.init_state)
    return final_state, record.num_wanted


@_loop.def_fwd
def _loop_fwd(
    perturbed,
    inputs,
    *,
    hoisted,
    num_local,
    pullback: AbstractPullback,
    **kwargs,
):
    del kwargs
    if any(jtu.tree_leaves(perturbed.unknown)):
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` cannot differentiate with respect to what a "
            "step size controller holds that is not one of diffrax's own. Use "
            "`jax.lax.stop_gradient` on it if its gradient is not needed, or else "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    # (What else the steps depend on chooses where they are made, which is a constant.)
    differentiated = frozenset(
        i for i, p in enumerate(perturbed.consts[:num_local]) if p
    )
    wanted = jtu.tree_map(lambda p: p is True, perturbed.times, is_leaf=_is_none)
    fns = Functions(
        hoisted,
        inputs.consts,
        differentiated,
        wanted.any_of_steps,
        Batch((), inputs.consts),
    )
    pullback = pullback.choose(fns, perturbed.init_state.solver_state)
    final_state, record = hoisted.call("run", inputs.consts, inputs.init_state)
    ends = _Ends(
        final_state.y,
        final_state.solver_state,
        final_state.tprev,
        final_state.num_accepted_steps,
        [
            save.Saved(s.saveat_ts_index, s.save_index)
            for s in jtu.tree_leaves(final_state.save_state, is_leaf=is_save_state)
        ],
        (final_state.event_tprev, final_state.event_tnext),
    )
    out, ends, record = once_only(((final_state, record.num_wanted), ends, record))
    return out, (ends, record, differentiated, wanted, pullback)


class _Ends(NamedTuple):
    """What is kept of the final state."""

    y: PyTree
    solver_state: PyTree
    tprev: Array
    num_steps: Array
    saved: list[save.Saved]
    # `(None, None)` if there are no events.
    event_times: tuple[Any, Any]


class _Carry(NamedTuple):
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
    # The largest so far.
    drift: Array


@_loop.def_bwd
def _loop_bwd(
    residuals,
    grad_out,
    perturbed,
    inputs,
    *,
    hoisted: Hoisted,
    recorder: Recorder,
    steps,
    drift_tolerance,
    passed_solver_state,
    **kwargs,
):
    del perturbed, kwargs
    init_state, times, consts, unknown, mark = inputs
    ends, record, differentiated, wanted, pullback = residuals
    ends: _Ends
    record: Record
    grad_final_state, _ = grad_out
    del inputs, residuals, grad_out
    times_vary = wanted.any_of_steps
    when = (ends.num_steps, ends.tprev, ends.saved, record.steps.times, times.saved)
    batch = find_batch(mark, consts, when)
    fns = Functions(hoisted, consts, differentiated, times_vary, batch)
    grad_saves = jtu.tree_leaves(grad_final_state.save_state, is_leaf=is_save_state)
    grad_ys = [None if save.is_zero(s.ys) else s.ys for s in grad_saves]
    grad_dense_infos = _none_if_zero(grad_final_state.dense_infos)
    grad_event_info = _none_if_zero(grad_final_state.event_dense_info)
    want_dense_info = (
        grad_dense_infos is not None
        or grad_event_info is not None
        or any(g is not None and t is not None for g, t in zip(grad_ys, times.saved))
    )

    def keep(pred, new, old):
        return jtu.tree_map(lambda a, b: where_active(pred, a, b), new, old)

    def select(pred, new, old):
        return jtu.tree_map(
            lambda a, b: jnp.where(pred, a, b) if eqx.is_array(b) else b, new, old
        )

    def add_time(grad_times, t, grad, is_start):
        if grad is None:
            return grad_times
        return times_.add(grad_times, times, t, grad, is_start)

    zero_drift = jnp.zeros((), precision(ends.y).dtype)

    def step_back(carry: _Carry, record: Record) -> _Carry:
        # Under `vmap` an element that is done makes its last step again, with a zero
        # gradient: at a place where it has been before, so that no NaN comes of it.
        active = carry.num_steps > 0
        unfinished = carry.num_steps > 1
        index = jnp.maximum(carry.num_steps - 1, 0)
        zero_unless_active = ft.partial(
            jtu.tree_map, lambda g: where_active(active, g, jnp.zeros_like(g))
        )
        grad_y1 = zero_unless_active(carry.grad_y1)
        grad_solver_state = zero_unless_active(carry.grad_solver_state)
        grad_consts = dict(carry.grad_consts)
        grad_times = carry.grad_times

        is_start = index == 0
        t_prev, t0, made_jump = recorder.read_times(record, init_state, index)
        step = Step(
            t0,
            carry.t1,
            carry.y1,
            recorder.read_recorded(record, carry.solver_state, index),
            made_jump,
            (is_start, init_state.y, init_state.solver_state)
            if passed_solver_state
            else None,
        )
        num_slots, is_slot, is_undone, read_slot = recorder.read_slot(
            record, carry.num_slots, index, active
        )

        def restore(y0, solver_state0):
            # An element that never made a step is already where it started.
            rebuilt = keep(
                ends.num_steps > 0,
                (y0, solver_state0),
                (carry.y1, carry.solver_state),
            )

            def read():
                stored = read_slot(rebuilt)
                drift = zero_drift
                initial = (init_state.y, init_state.solver_state)
                if drift_tolerance is not None:
                    compared = [
                        comparable(pullback.solver, *state)
                        for state in (
                            rebuilt,
                            select(is_start, initial, stored),
                            (carry.y1, carry.solver_state),
                        )
                    ]
                    drift = distance(*compared)
                    drift = jnp.where(active & is_undone, drift, 0)
                if pullback.restores_start:
                    stored = select(is_start, initial, stored)
                return stored, drift

            (y0, solver_state0), drift = lax.cond(
                eqxi.unvmap_any((is_slot | is_start) & (ends.num_steps > 0)),
                read,
                lambda: (rebuilt, zero_drift),
            )
            return y0, solver_state0, drift

        rebuilt = pullback.rebuild(fns, carry.pullback, step, restore, want_dense_info)

        #
        # Values that were saved during this step, in the order opposite to that in
        # which they were saved.
        #

        grad_dense_info = None
        if grad_event_info is not None:
            # The last step is the one in which an event may have been.
            is_last = carry.num_steps == ends.num_steps
            grad_dense_info = jtu.tree_map(
                lambda g: jnp.where(active & is_last, g, 0), grad_event_info
            )
        if grad_dense_infos is not None:
            grad_dense_info = tree_add(
                grad_dense_info,
                zero_unless_active(jtu.tree_map(lambda g: g[index], grad_dense_infos)),
            )
        grad_t0 = grad_t1 = grad_end = jnp.zeros_like(carry.t1)
        if times_vary and grad_final_state.dense_ts is not None:
            grad_end = grad_end + grad_final_state.dense_ts[index + 1]
        new_saved = []
        for i, saved in enumerate(carry.saved):
            if steps[i] != 0:
                is_saved = active & ((index + 1) % steps[i] == 0)
                if grad_ys[i] is not None:
                    new_consts, grad_t, grad_y = save.pull_steps(
                        fns, i, is_saved, carry.t_after, carry.y1, grad_ys[i], saved
                    )
                    save.accumulate(grad_consts, new_consts)
                    grad_y1 = tree_add(grad_y1, grad_y)
                    grad_end = grad_end + grad_t
                if times_vary and grad_saves[i].ts is not None:
                    grad_end = grad_end + jnp.where(
                        is_saved, saved.last(grad_saves[i].ts), 0
                    )
                saved = saved._replace(index=saved.index - jnp.where(is_saved, 1, 0))
            ts = times.saved[i]
            if ts is not None and (grad_ys[i] is not None or wanted.saved[i]):
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
                        grad_saves[i],
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

        grads, new_pullback = rebuilt.pull(grad_y1, grad_solver_state, grad_dense_info)
        save.accumulate(grad_consts, grads.consts)
        if times_vary:
            for t, grad, at_start in (
                (carry.t_after, grad_end, jnp.array(False)),
                (carry.t1, grad_t1 + grads.t1, jnp.array(False)),
                (t0, grad_t0 + grads.t0, is_start),
            ):
                grad = jnp.where(active, grad, 0)
                grad_times = add_time(grad_times, t, grad, at_start)

        return _Carry(
            num_steps=index,
            num_slots=num_slots,
            t1=keep(unfinished, t_prev, carry.t1),
            t_after=t0,
            y1=keep(unfinished, rebuilt.y0, carry.y1),
            solver_state=keep(unfinished, rebuilt.solver_state, carry.solver_state),
            # Of a batch it is one whole. An element that is done has what belongs to
            # its start here, and pulls back zero through it.
            pullback=new_pullback,
            saved=new_saved,
            grad_y1=keep(active, grads.y0, carry.grad_y1),
            grad_solver_state=keep(active, grads.solver_state, carry.grad_solver_state),
            grad_consts=grad_consts,
            grad_times=grad_times,
            drift=jnp.maximum(carry.drift, rebuilt.drift),
        )

    no_steps = ends.num_steps == 0
    # (There may be one that was rejected.)
    t1 = jnp.where(no_steps, ends.tprev, recorder.last_time(record, ends.num_steps))
    grad_times = times_.zeros(wanted, times)
    event_is_lost = None
    if times_vary:
        grad_times = add_time(grad_times, ends.tprev, grad_final_state.tprev, no_steps)
    if ends.event_times[0] is not None:
        event_t0, event_t1 = ends.event_times
        grad_event = (grad_final_state.event_tprev, grad_final_state.event_tnext)
        if times_vary:
            is_first = ends.num_steps <= 1
            grad_times = add_time(grad_times, event_t0, grad_event[0], is_first)
            grad_times = add_time(grad_times, event_t1, grad_event[1], no_steps)
        if grad_event_info is not None:
            # The host interpolates over the last step that was tried.
            was_used = [jnp.any(g != 0) for g in jtu.tree_leaves(grad_event_info)]
            was_used = ft.reduce(jnp.logical_or, was_used)
            event_is_lost = was_used & (event_t1 != t1)
    carry = _Carry(
        num_steps=ends.num_steps,
        num_slots=recorder.num_slots(record),
        t1=t1,
        t_after=ends.tprev,
        y1=ends.y,
        solver_state=ends.solver_state,
        pullback=pullback.prime(fns, t1, ends.y, ends.solver_state),
        saved=ends.saved,
        grad_y1=materialise(
            grad_final_state.y, eqx.filter(ends.y, eqx.is_inexact_array)
        ),
        grad_solver_state=materialise(
            grad_final_state.solver_state,
            eqx.filter(ends.solver_state, eqx.is_inexact_array),
        ),
        grad_consts=fns.zero_consts(save.function_names(hoisted)),
        grad_times=grad_times,
        drift=zero_drift,
    )

    def walk(carry, record, first):
        """Back to the step number `first`."""
        return lax.while_loop(
            lambda carry: eqxi.unvmap_any(carry.num_steps > first),
            lambda carry: step_back(carry, record),
            carry,
        )

    if recorder.is_window:

        def walk_window(carry__record__consistent):
            carry, record, is_consistent = carry__record__consistent
            # An element that is done makes its first step again.
            is_done = carry.num_steps == 0
            stop = jnp.where(
                is_done,
                jnp.minimum(ends.num_steps, recorder.length),
                carry.num_steps,
            ).astype(jnp.result_type(int))
            again = hoisted.call("rerun", consts, stop)
            record = recorder.replace_steps(record, again)
            is_same = again.t_last == carry.t1
            is_consistent = is_consistent & (is_same | is_done)
            carry = walk(carry, record, recorder.first_step(stop))
            return carry, record, is_consistent

        carry = walk(carry, record, recorder.first_step(ends.num_steps))
        carry, _, is_repeated = lax.while_loop(
            lambda x: eqxi.unvmap_any(x[0].num_steps > 0),
            walk_window,
            (carry, record, jnp.array(True)),
        )
    else:
        carry = walk(carry, record, 0)
        is_repeated = True

    grads = (carry.grad_y1, carry.grad_solver_state)
    grads = (*grads, fns.sum_consts(carry.grad_consts), carry.grad_times)
    if event_is_lost is not None:
        grads = eqx.error_if(
            grads,
            event_is_lost,
            "The last step of a solve with an event was rejected, and yet its gradient "
            "is asked for. (So it is in a batch of which some elements have an event, "
            "if one that has none runs into `max_steps`.) "
            "`adjoint=ReversibleAdjoint()` has not recorded such a step. Use a larger "
            "`max_steps`.",
        )
    grads = recorder.check(record, grads, is_repeated)
    if drift_tolerance is not None:
        # If they are not finite then that is not for what they were pulled back from.
        overflow = ~all_finite(grads) & all_finite(grad_final_state)
        drift = jnp.where(overflow, jnp.inf, carry.drift)
        grads = check_drift(grads, drift, drift_tolerance)
    grad_y0, grad_solver_state0, grad_consts, grad_times = once_only(grads)

    grad_init_state = jtu.tree_map(
        lambda _: None, eqx.filter(init_state, eqx.is_inexact_array)
    )
    grad_init_state = dataclasses.replace(
        grad_init_state,
        y=grad_y0,
        solver_state=grad_solver_state0,
        # What was saved during the loop went into places that were empty before it, so
        # there is no need to put zeros there.
        dense_ts=grad_final_state.dense_ts,
        save_state=jtu.tree_map(
            lambda s, g: dataclasses.replace(s, ts=g.ts, ys=g.ys),
            grad_init_state.save_state,
            grad_final_state.save_state,
            is_leaf=is_save_state,
        ),
    )
    return _Inputs(
        grad_init_state,
        grad_times,
        tuple(grad_consts.get(i) for i in range(len(consts))),
        jtu.tree_map(lambda _: None, unknown),
        None,
    )


def _is_none(x):
    return x is None


def _none_if_zero(grads):
    return None if save.is_zero(grads) else grads


def _replaced(xs: tuple, i: int, x) -> tuple:
    return (*xs[:i], x, *xs[i + 1 :])
