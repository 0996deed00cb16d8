"""The loop over the steps of a solve, and the rule for its derivative."""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import is_save_state, is_sub_save_at, save_every, without_saving
from .._jax_compat import eqxi
from .._method.tree import replace, stop_gradient
from . import save as save, times as times_, verify as verify
from .batch import Batch, find_batch, mark_batch
from .check import check
from .coupling_pullback import make_pullback
from .forward import Forward, Record
from .functions import Functions
from .guard import once_only, reverse_only, without_tangents
from .hoist import Hoisted, Hoister
from .plan import make_forward
from .pullback import AbstractPullback, Step
from .shared import to_first, total
from .undo import Ends, Undo
from .way_back import WayBack


inner_loop = jax.named_call(eqxi.while_loop, name="inner-loop")


def with_arrays(init_state):
    """After a step what the state holds are arrays, and before it too."""
    if init_state.made_jump is True:
        # Or the host takes every step to follow a jump.
        init_state = replace(init_state, made_jump=jnp.array(True))
    # The initial solver state may hold Python scalars.
    solver_state = jtu.tree_map(
        lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x,
        init_state.solver_state,
    )
    controller_state = jtu.tree_map(
        lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x,
        init_state.controller_state,
    )
    return replace(
        init_state, solver_state=solver_state, controller_state=controller_state
    )


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
    bare_loop,
    checkpoints,
    checkpoint_every,
    sum_over_batch,
    throw,
    num_checkpoints,
):
    """The host's loop over steps, with our rule for differentiating it.

    `solver.init`, saving at `t0` and `t1`, locating an event, and all else that the
    host does before and after, lies outside this function and is differentiated by JAX.
    """
    init_state = without_tangents(with_arrays(init_state))
    forward = make_forward(
        solver,
        stepsize_controller,
        init_state,
        args,
        max_steps,
        checkpoints,
        checkpoint_every,
    )
    made_jump = forward.format.made_jump

    def run(init_state):
        slots = forward.empty_slots(init_state)
        return forward.run(
            cond_fun,
            body_fun,
            init_state,
            slots,
            init_state.tprev,
            max_steps=max_steps,
            buffers=buffers,
            capacity=forward.num_slots,
        )

    # What the rule needs, as functions whose constants are explicit.
    hoister = Hoister()
    pullback = make_pullback(solver, init_state.solver_state, made_jump)
    step = Step(
        init_state.tprev,
        init_state.tnext,
        init_state.y,
        init_state.solver_state,
        made_jump,
    )
    pullback.add_functions(hoister, terms, args, step)
    verify.add_functions(hoister, terms, args, step)
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_sub_save_at)
    for i, sub in enumerate(subs):
        save.add_functions(hoister, i, sub, solver, terms, args, step)
    num_local = hoister.num_consts
    hoister.add("run", run, init_state)
    if forward.format.is_window:
        bare_cond, bare_body, bare_buffers = bare_loop()
        bare_state = without_saving(init_state)

        def rerun(number, kept, slots, capacity, stop):
            state, t_last = forward.resume(bare_state, number, kept)
            state, record = forward.run(
                bare_cond,
                bare_body,
                state,
                slots,
                t_last,
                max_steps=None,
                buffers=bare_buffers,
                capacity=capacity,
                stop=stop,
            )
            return forward.kept(state, record.t_last), record

        zero, kept = jnp.array(0), forward.kept(init_state, init_state.tprev)
        slots = forward.empty_slots(init_state)
        hoister.add("rerun", rerun, zero, kept, slots, zero, zero)
    hoisted, consts = hoister.finish()

    *told, unknown = times_.controller_times(stepsize_controller)
    times = times_.Times(init_state.tprev, t1, tuple(sub.ts for sub in subs), *told)
    inputs = _Inputs(init_state, times, without_tangents(consts), unknown, None, None)
    inputs = reverse_only(inputs)
    marks = {"batch": mark_batch(inputs, over_devices=True)}
    if sum_over_batch is not False:
        marks["summed"] = mark_batch(inputs, over_devices=False)
    inputs = inputs._replace(**marks)
    final_state, n = _loop(
        inputs,
        hoisted=hoisted,
        num_local=num_local,
        forward=forward,
        pullback=pullback,
        steps=tuple(map(save_every, subs)),
        checkpoint_every=checkpoint_every,
        sum_over_batch=sum_over_batch,
        throw=throw,
    )
    # Handed to `loop` past the host, which calls this.
    num_checkpoints.append(n)
    # The locations of the steps are constants, and what else depends on them alone; and
    # the host makes nothing of the last values of event functions but comparisons.
    return replace(
        final_state,
        tnext=stop_gradient(final_state.tnext),
        controller_state=stop_gradient(final_state.controller_state),
        progress_meter_state=stop_gradient(final_state.progress_meter_state),
        event_values=stop_gradient(final_state.event_values),
        solver_state=pullback.stop_recorded(final_state.y, final_state.solver_state),
    )


class _Inputs(NamedTuple):
    init_state: Any
    times: times_.Times
    consts: tuple[Any, ...]
    # Whatever is in a step size controller that we do not know.
    unknown: PyTree
    # Marks of the batches that the solve is in, and of those over which gradients are
    # to be summed step by step, or `None`.
    batch: Any
    summed: Any


@eqx.filter_custom_vjp
def _loop(inputs, *, hoisted, **kwargs):
    del kwargs
    final_state, record = hoisted.call("run", inputs.consts, inputs.init_state)
    return final_state, record.num_wanted


@_loop.def_fwd
def _loop_fwd(perturbed, inputs, *, hoisted, **kwargs):
    del kwargs
    if any(jtu.tree_leaves(perturbed.unknown)):
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` cannot differentiate with respect to what a "
            "step size controller holds that is not one of diffrax's own. Use "
            "`jax.lax.stop_gradient` on it if its gradient is not needed, or else "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    final_state, record = hoisted.call("run", inputs.consts, inputs.init_state)
    ends = Ends(
        final_state.y,
        final_state.solver_state,
        final_state.tprev,
        final_state.num_accepted_steps,
        record.t_last,
        [
            save.Saved(s.saveat_ts_index, s.save_index)
            for s in jtu.tree_leaves(final_state.save_state, is_leaf=is_save_state)
        ],
        (final_state.event_tprev, final_state.event_tnext),
    )
    # Arrays alone. If a program that JAX has cached is differentiated twice then what
    # is static in here is that of the second time, for both backward passes.
    return once_only(((final_state, record.num_wanted), (ends, record)))


@_loop.def_bwd
def _loop_bwd(
    residuals,
    grad_out,
    perturbed,
    inputs,
    *,
    hoisted: Hoisted,
    num_local,
    forward: Forward,
    pullback: AbstractPullback,
    steps,
    checkpoint_every,
    sum_over_batch,
    throw,
):
    init_state, times, consts, unknown, batch_mark, summed_mark = inputs
    ends, record = residuals
    ends: Ends
    record: Record
    grad_out, _ = grad_out
    grad_final_state = to_first(batch_mark, grad_out)
    # (What else the steps depend on chooses where they are made, which is a constant.)
    differentiated = frozenset(
        i for i, p in enumerate(perturbed.consts[:num_local]) if p
    )
    wanted = jtu.tree_map(lambda p: p is True, perturbed.times, is_leaf=_is_none)
    perturbed_solver_state = perturbed.init_state.solver_state
    del residuals, perturbed
    when = (ends.num_steps, ends.tprev, ends.saved, record.steps, times.saved)
    batch = find_batch(summed_mark, consts, (when, record.slots.numbers))
    fns = Functions(hoisted, consts, differentiated, wanted.any_of_steps, batch)
    pullback = pullback.choose(fns, perturbed_solver_state)
    if sum_over_batch == "auto" and not _is_worth_a_sum(fns, ends.y):
        fns = fns._replace(batch=Batch((), consts))
    undo = Undo(
        fns=fns,
        pullback=pullback,
        format=forward.format,
        ends=ends,
        grad_final_state=grad_final_state,
        times=times,
        wanted=wanted,
        steps=steps,
    )
    way_back = WayBack(
        fns=fns,
        undo=undo,
        forward=forward,
        init_state=init_state,
        ends=ends,
        record=record,
        checkpoint_every=checkpoint_every,
        rerun=ft.partial(hoisted.call, "rerun", consts),
    )
    carry = way_back.walk().carry
    grads = (carry.grad_y1, carry.grad_solver_state)
    grads = (*grads, fns.sum_consts(carry.grad_consts), carry.grad_times)
    grads = check(
        grads,
        grad_final_state,
        record.is_consistent,
        undo.event_is_lost(),
        throw,
    )
    grad_y0, grad_solver_state0, grad_consts, grad_times = grads

    grad_init_state = jtu.tree_map(
        lambda _: None, eqx.filter(init_state, eqx.is_inexact_array)
    )
    grad_init_state = replace(
        grad_init_state,
        y=grad_y0,
        solver_state=grad_solver_state0,
        # What was saved during the loop went into places that were empty before it, so
        # there is no need to put zeros there.
        dense_ts=grad_out.dense_ts,
        save_state=jtu.tree_map(
            lambda s, g: replace(s, ts=g.ts, ys=g.ys),
            grad_init_state.save_state,
            grad_out.save_state,
            is_leaf=is_save_state,
        ),
    )
    grad_inputs = _Inputs(
        grad_init_state,
        grad_times,
        tuple(grad_consts.get(i) for i in range(len(consts))),
        jtu.tree_map(lambda _: None, unknown),
        None,
        None,
    )
    return once_only(total(batch_mark, grad_inputs, inputs))


# What fits into a cache is faster to be summed at the end, by a tenth. And a sum over a
# batch makes XLA compute what it is made of once more, unless these are products of
# matrices or convolutions: then there are more parameters than in pointwise functions.
_MANY_BYTES = 2**24
_MANY_PARAMETERS = 4


def _is_worth_a_sum(fns: Functions, y: PyTree) -> bool:
    if jax.device_count() > 1:
        # The batch may be split over them, which cannot be known here.
        return False
    num_parameters = num_bytes = 0
    for i in fns.differentiated:
        const = fns.consts[i]
        num_parameters += const.size
        num_bytes += fns.batch.num_shared_by(i) * const.size * const.dtype.itemsize
    size = sum(map(jnp.size, jtu.tree_leaves(y)))
    return num_bytes > _MANY_BYTES and num_parameters > _MANY_PARAMETERS * size


def _is_none(x):
    return x is None
