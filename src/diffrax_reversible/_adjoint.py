import dataclasses
import functools as ft
from typing import Any, Literal, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._compat import host_loop, is_save_state, is_sub_save_at, is_unsafe_sde
from ._controlled import precision
from ._drift import all_finite, check_drift, distance
from ._hoist import Hoister, materialise, tree_add
from ._pullback import comparable, Functions, make_pullback, Step
from ._record import make_recorder, Record, Recorder
from ._registry import to_reversible
from ._vmap import where_active


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][] by undoing its steps.

    To be used with a reversible solver:
    [`diffrax_reversible.AbstractReversibleSolver`][], or an instance of
    [`diffrax.ReversibleHeun`][], [`diffrax.SemiImplicitEuler`][] or
    [`diffrax.LeapfrogMidpoint`][]. On the backward pass the input of every step is
    rebuilt from its output, in closed form. So the gradient of the discretised solve is
    exact up to rounding, is computed in time proportional to the number of steps `n`,
    and takes an amount of memory that does not grow with `n`, but for a record of the
    step times: one floating-point number for every step up to `max_steps`. (And one
    byte if the step size controller may report jumps, and whatever
    [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects: for
    [`diffrax_reversible.UReversible`][] one byte.) The record of times is shared by the
    elements of a batch, under `jax.vmap`, if they make the same steps.

    Undoing a step may amplify rounding errors, as where the solution contracts. So
    there are a fixed number of checkpoints, for a solver to ask for; and wherever the
    backward pass arrives at one, and at the start of the solve, what has been rebuilt
    is compared with what is stored. The number of them that was asked for is
    `sol.stats["num_checkpoints"]` (not with `max_steps=None`).

    Gradients are computed with respect to `y0`, `args`, everything differentiable in
    `terms`, and values that the vector field, the control or `SaveAt(fn=...)` close
    over. The locations of the steps are constants for the purpose of differentiation,
    as are the parameters of the step size controller; with
    [`diffrax.RecursiveCheckpointAdjoint`][] it is the same.

    **Raises:**

    - `ValueError` if the solver is not reversible, or for a
        [`diffrax.UnsafeBrownianPath`][].
    - `NotImplementedError` for `diffeqsolve(event=...)`; and when differentiating with
        respect to `t0`, `t1`, `dt0`, `SaveAt(ts=...)` or the times in a step size
        controller.
    - `RuntimeError`, by the gradient alone and under `jax.jit` too, if the solver asked
        for more checkpoints than there are; if the backward pass does not arrive at the
        stored states to `drift_tolerance`; or if these or the gradient are not finite.
        Under `jax.vmap`, if this is so for any element of the batch.

    ??? cite "Reference"

        ```bibtex
        @article{mccallum2024efficient,
            title={Efficient, Accurate and Stable Gradients for Neural {ODE}s},
            author={McCallum, Sam and Foster, James},
            journal={arXiv preprint arXiv:2410.11648},
            year={2024}
        }
        ```
    """

    checkpoints: int | Literal["auto"] = "auto"
    checkpoint_every: int | None = None
    drift_tolerance: float | int | Literal["auto"] | None = "auto"

    def __check_init__(self):
        n = self.checkpoints
        if n != "auto" and (not _is_integer(n) or n < 0):
            raise ValueError(
                "`ReversibleAdjoint(checkpoints=...)` must be a nonnegative integer, "
                f'or "auto"; got {n}.'
            )
        if self.checkpoint_every is not None and (
            not _is_integer(self.checkpoint_every) or self.checkpoint_every < 1
        ):
            raise ValueError(
                "`ReversibleAdjoint(checkpoint_every=...)` must be a positive integer, "
                f"or `None`; got {self.checkpoint_every}."
            )
        tolerance = self.drift_tolerance
        if tolerance not in (None, "auto") and (
            isinstance(tolerance, bool)
            or not isinstance(tolerance, (int, float))
            or not tolerance > 0
        ):
            raise ValueError(
                "`ReversibleAdjoint(drift_tolerance=...)` must be a positive number, "
                f'"auto", or `None` for no check; got {tolerance}.'
            )

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        max_steps,
        init_state,
        throw,
        passed_solver_state,
        passed_controller_state,
        **kwargs,
    ) -> Any:
        del throw, passed_solver_state, passed_controller_state
        if event is not None:
            raise NotImplementedError(
                "`diffeqsolve(..., event=..., adjoint=ReversibleAdjoint())` is not "
                "supported yet. Use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
            )
        if is_unsafe_sde(terms):
            raise ValueError(
                "`adjoint=ReversibleAdjoint()` does not support `UnsafeBrownianPath`, "
                "which cannot be queried again on the backward pass. Use "
                "`VirtualBrownianTree`."
            )
        solver = to_reversible(solver)
        init_state = with_arrays(init_state)
        outer_while_loop = ft.partial(
            _outer_while_loop,
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            checkpoints=_num_slots(self.checkpoints, init_state.y),
            checkpoint_every=self.checkpoint_every,
            drift_tolerance=self.drift_tolerance,
        )
        num_checkpoints = []
        final_state, stats = host_loop(
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            max_steps=max_steps,
            init_state=init_state,
            inner_while_loop=ft.partial(inner_loop, kind="lax"),
            outer_while_loop=ft.partial(
                outer_while_loop, num_checkpoints=num_checkpoints
            ),
            **kwargs,
        )
        [n] = num_checkpoints
        return final_state, stats if n is None else {**stats, "num_checkpoints": n}


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: The number of slots for steps that the solver would like to be stored
    ([`diffrax_reversible.AbstractReversibleSolver.wants_checkpoint`][]) or cannot undo
    ([`diffrax_reversible.AbstractReversibleSolver.needs_checkpoint`][]), and for
    `checkpoint_every`. Each takes the memory of `y` and the solver state. No memory is
    used for them with solvers that never ask for one. `"auto"` is 64, or 128 if any
    part of `y` is in single precision (or less). With `checkpoints=0` the memory is
    that of the record alone, and the gradient of a solve that needs a checkpoint raises
    an error.
- `checkpoint_every`: If an integer `k` then every `k`th step is stored as well. Useful
    for a solver that is not stable on the way back, and does not say so.
- `drift_tolerance`: The largest acceptable difference between what has been rebuilt and
    what was stored, relative to the size of `y` (of each of its leaves, in root mean
    square). `"auto"` is 1e-5, or 6e-5 if any part of `y` is in single precision (or
    less). It is the *state* that is looked at: the gradient may be better or worse,
    usually by no more than a factor of 50. With `None` nothing is checked.

**Raises:**

- `ValueError` if `checkpoints` is not a nonnegative integer or `"auto"`,
    `checkpoint_every` not a positive one or `None`, or `drift_tolerance` not a positive
    number, `"auto"` or `None`.
"""


def _num_slots(checkpoints: int | Literal["auto"], y: PyTree) -> int:
    if checkpoints == "auto":
        # With less precision more of them are needed; the memory is the same.
        return 64 if float(precision(y).eps) < 1e-12 else 128
    return checkpoints


inner_loop = jax.named_call(eqxi.while_loop, name="inner-loop")
outer_loop = jax.named_call(eqxi.while_loop, name="outer-loop")


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


def _outer_while_loop(
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
    checkpoints,
    checkpoint_every,
    drift_tolerance,
    num_checkpoints,
):
    """The host's loop over steps, with our rule for differentiating it.

    `solver.init`, saving at `t0` and `t1`, and all else that the host does before and
    after, lies outside this function and is differentiated by JAX.
    """
    init_state = with_arrays(init_state)
    if max_steps is None:
        final_state = outer_loop(
            cond_fun, body_fun, init_state, buffers=buffers, kind="lax"
        )
        num_checkpoints.append(None)
        return eqxi.nondifferentiable_backward(
            final_state,
            msg=(
                "Cannot reverse-mode autodifferentiate when using "
                "`diffeqsolve(..., max_steps=None, adjoint=ReversibleAdjoint())`, as "
                "the memory for the record of step times is allocated in advance. Put "
                "a bound on the number of steps: it costs 8 bytes a step (4 in 32-bit "
                "precision)."
            ),
            symbolic=True,
        )

    recorder = make_recorder(
        solver,
        stepsize_controller,
        init_state,
        args,
        max_steps,
        checkpoints,
        checkpoint_every,
    )

    def run(init_state):
        def _cond_fun(carry):
            state, _ = carry
            return cond_fun(state)

        def _body_fun(carry):
            state, record = carry
            new_state = body_fun(state)
            return new_state, recorder.append(record, state, new_state)

        def _buffers(carry):
            state, record = carry
            return [*buffers(state), *recorder.buffers(record)]

        return outer_loop(
            _cond_fun,
            _body_fun,
            (init_state, recorder.init(init_state)),
            max_steps=max_steps,
            buffers=_buffers,
            kind="lax",
        )

    # What the rule needs, as functions whose constants are explicit.
    hoister = Hoister()
    pullback = make_pullback(solver, recorder.made_jump)
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
        _add_save_functions(hoister, i, sub, solver, terms, args, step)
    num_local = hoister.num_consts
    hoister.add("run", run, init_state)
    hoisted, consts = hoister.finish()

    ts = tuple(sub.ts for sub in subs)
    stationary = frozenset(
        hoister.number(x)
        for x in _stationary_parameters(stepsize_controller, init_state.y)
    )
    final_state, n = _loop(
        (init_state, ts, consts),
        hoisted=hoisted,
        num_local=num_local,
        stationary=stationary,
        recorder=recorder,
        pullback=pullback,
        steps=tuple(sub.steps for sub in subs),
        drift_tolerance=drift_tolerance,
    )
    # Handed to `loop` past the host, which calls this.
    num_checkpoints.append(n)
    # The locations of the steps are constants.
    stop = ft.partial(
        jtu.tree_map, lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x
    )
    return dataclasses.replace(
        final_state,
        tprev=stop(final_state.tprev),
        tnext=stop(final_state.tnext),
        controller_state=stop(final_state.controller_state),
        progress_meter_state=stop(final_state.progress_meter_state),
        solver_state=recorder.stop_recorded(final_state.y, final_state.solver_state),
        dense_ts=stop(final_state.dense_ts),
        save_state=jtu.tree_map(
            lambda s: dataclasses.replace(s, ts=stop(s.ts)),
            final_state.save_state,
            is_leaf=is_save_state,
        ),
    )


def _add_save_functions(hoister, i, sub, solver, terms, args, step):
    if sub.ts is not None:
        _, _, dense_info, _, _ = eqx.filter_eval_shape(
            solver.step,
            terms,
            step.t0,
            step.t1,
            step.y1,
            args,
            step.solver_state,
            step.made_jump,
        )

        def interpolate(t0, t1, t, dense_info):
            interpolation = solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
            return sub.fn(t, interpolation.evaluate(t), args)

        hoister.add(f"save_ts_{i}", interpolate, step.t0, step.t1, step.t0, dense_info)
    if sub.steps != 0:
        hoister.add(
            f"save_steps_{i}", lambda t, y: sub.fn(t, y, args), step.t0, step.y1
        )


def _stationary_parameters(controller, y):
    # The host stops all gradients through these.
    while isinstance(controller, diffrax.ClipStepSizeController):
        controller = controller.controller
    if isinstance(controller, diffrax.PIDController):
        names = (
            "rtol",
            "atol",
            "pcoeff",
            "icoeff",
            "dcoeff",
            "safety",
            "factormin",
            "factormax",
            "error_order",
        )
        # With what the norm closes over.
        norm = eqx.filter_closure_convert(controller.norm, y)
        return jtu.tree_leaves(([getattr(controller, name) for name in names], norm))
    return []


@eqx.filter_custom_vjp
def _loop(vjp_arg, *, hoisted, **kwargs):
    del kwargs
    init_state, _, consts = vjp_arg
    final_state, record = hoisted.call("run", consts, init_state)
    return final_state, record.num_wanted


@_loop.def_fwd
def _loop_fwd(
    perturbed,
    vjp_arg,
    *,
    hoisted,
    num_local,
    stationary,
    recorder,
    pullback,
    steps,
    drift_tolerance,
):
    del recorder, steps, drift_tolerance
    init_state, _, consts = vjp_arg
    perturbed_state, perturbed_ts, perturbed_consts = perturbed
    differentiated = frozenset(
        i for i, p in enumerate(perturbed_consts[:num_local]) if p
    )
    unused = frozenset(
        i for i, p in enumerate(perturbed_consts) if p and i >= num_local
    )
    if (
        perturbed_state.tprev
        or perturbed_state.tnext
        or any(jtu.tree_leaves(perturbed_state.controller_state))
        or any(jtu.tree_leaves(perturbed_ts))
        or not unused <= stationary
    ):
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` cannot differentiate with respect to the "
            "times of a solve yet: `t0`, `t1`, `dt0`, `SaveAt(ts=...)`, or those in a "
            "step size controller. Use `jax.lax.stop_gradient` on them if their "
            "gradient is not needed, or else "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    reason = pullback.unsupported(hoisted, differentiated, perturbed_state.solver_state)
    if reason is not None:
        raise NotImplementedError(reason)
    final_state, record = hoisted.call("run", consts, init_state)
    residuals = (
        final_state.y,
        final_state.solver_state,
        final_state.tprev,
        final_state.num_accepted_steps,
        [
            (s.saveat_ts_index, s.save_index)
            for s in jtu.tree_leaves(final_state.save_state, is_leaf=is_save_state)
        ],
        record,
        differentiated,
    )
    return (final_state, record.num_wanted), residuals


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
    # (saveat_ts_index, save_index) for each `SubSaveAt`.
    save_indices: list[tuple[Array, Array]]
    grad_y1: PyTree
    grad_solver_state: PyTree
    grad_consts: dict[int, Any]
    # The largest so far.
    drift: Array


@_loop.def_bwd
def _loop_bwd(
    residuals,
    grad_out,
    perturbed,
    vjp_arg,
    *,
    hoisted,
    num_local,
    stationary,
    recorder: Recorder,
    pullback,
    steps,
    drift_tolerance,
):
    del perturbed, num_local, stationary
    init_state, ts, consts = vjp_arg
    (
        final_y,
        final_solver_state,
        final_tprev,
        num_accepted_steps,
        save_indices,
        record,
        differentiated,
    ) = residuals
    record: Record
    grad_final_state, _ = grad_out
    del vjp_arg, residuals
    fns = Functions(hoisted, consts, differentiated)
    grad_ys = [
        None
        if all(g is None for g in jtu.tree_leaves(s.ys, is_leaf=_is_none))
        else s.ys
        for s in jtu.tree_leaves(grad_final_state.save_state, is_leaf=is_save_state)
    ]
    grad_dense_infos = grad_final_state.dense_infos
    if len(jtu.tree_leaves(grad_dense_infos)) == 0:
        grad_dense_infos = None
    want_dense_info = grad_dense_infos is not None or any(
        g is not None and t is not None for g, t in zip(grad_ys, ts)
    )

    def keep(pred, new, old):
        return jtu.tree_map(lambda a, b: where_active(pred, a, b), new, old)

    def select(pred, new, old):
        return jtu.tree_map(
            lambda a, b: jnp.where(pred, a, b) if eqx.is_array(b) else b, new, old
        )

    zero_drift = jnp.zeros((), precision(final_y).dtype)

    def cond_fun(carry: _Carry):
        return eqxi.unvmap_any(carry.num_steps > 0)

    def body_fun(carry: _Carry):
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

        t_prev, t0, made_jump = recorder.read_times(record, init_state, index)
        step = Step(
            t0,
            carry.t1,
            carry.y1,
            recorder.read_recorded(record, carry.solver_state, index),
            made_jump,
        )
        num_slots, is_slot, is_undone, read_slot = recorder.read_slot(
            record, carry.num_slots, index, active
        )
        is_start = index == 0

        def restore(y0, solver_state0):
            # An element that never made a step is already where it started.
            rebuilt = keep(
                num_accepted_steps > 0,
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
                eqxi.unvmap_any((is_slot | is_start) & (num_accepted_steps > 0)),
                read,
                lambda: (rebuilt, zero_drift),
            )
            return y0, solver_state0, drift

        rebuilt = pullback.rebuild(fns, carry.pullback, step, restore, want_dense_info)

        #
        # Values that were saved during this step, in the order opposite to that in
        # which they were saved.
        #

        if grad_dense_infos is None:
            grad_dense_info = None
        else:
            grad_dense_info = zero_unless_active(
                jtu.tree_map(lambda g: g[index], grad_dense_infos)
            )
        new_save_indices = []
        for i, (ts_index, save_index) in enumerate(carry.save_indices):
            if steps[i] != 0:
                saved = active & ((index + 1) % steps[i] == 0)
                if grad_ys[i] is not None:
                    new_consts, grad_y1 = _pull_save_steps(
                        fns, i, saved, carry, save_index, grad_ys[i], grad_y1
                    )
                    _accumulate(grad_consts, new_consts)
                save_index = save_index - jnp.where(saved, 1, 0)
            if ts[i] is not None and grad_ys[i] is not None:
                ts_index, save_index, grad_consts, grad_dense_info = _pull_save_ts(
                    fns,
                    i,
                    step,
                    rebuilt.dense_info,
                    ts[i],
                    # Saved here were those after the end of the step before.
                    lambda t: active & ((index == 0) | (t > t_prev)),
                    ts_index,
                    save_index,
                    grad_ys[i],
                    grad_consts,
                    grad_dense_info,
                )
            new_save_indices.append((ts_index, save_index))

        new_consts, grad_y0, grad_solver_state0, new_pullback = rebuilt.pull(
            grad_y1, grad_solver_state, grad_dense_info
        )
        _accumulate(grad_consts, new_consts)

        return _Carry(
            num_steps=index,
            num_slots=num_slots,
            t1=keep(unfinished, t_prev, carry.t1),
            t_after=t0,
            y1=keep(unfinished, rebuilt.y0, carry.y1),
            solver_state=keep(unfinished, rebuilt.solver_state, carry.solver_state),
            pullback=keep(unfinished, new_pullback, carry.pullback),
            save_indices=new_save_indices,
            grad_y1=keep(active, grad_y0, carry.grad_y1),
            grad_solver_state=keep(active, grad_solver_state0, carry.grad_solver_state),
            grad_consts=grad_consts,
            drift=jnp.maximum(carry.drift, rebuilt.drift),
        )

    t1 = recorder.last_time(record, num_accepted_steps)
    init_carry = _Carry(
        num_steps=num_accepted_steps,
        num_slots=recorder.num_slots(record),
        t1=t1,
        t_after=final_tprev,
        y1=final_y,
        solver_state=final_solver_state,
        pullback=pullback.prime(fns, t1, final_y, final_solver_state),
        save_indices=save_indices,
        grad_y1=materialise(
            grad_final_state.y, eqx.filter(final_y, eqx.is_inexact_array)
        ),
        grad_solver_state=materialise(
            grad_final_state.solver_state,
            eqx.filter(final_solver_state, eqx.is_inexact_array),
        ),
        grad_consts={i: jnp.zeros_like(consts[i]) for i in sorted(differentiated)},
        drift=zero_drift,
    )
    carry = lax.while_loop(cond_fun, body_fun, init_carry)
    grads = (carry.grad_y1, carry.grad_solver_state, carry.grad_consts)
    grads = recorder.check(record, grads)
    if drift_tolerance is not None:
        # If they are not finite then that is not for what they were pulled back from.
        overflow = ~all_finite(grads) & all_finite(grad_final_state)
        drift = jnp.where(overflow, jnp.inf, carry.drift)
        grads = check_drift(grads, drift, drift_tolerance)
    grad_y0, grad_solver_state0, grad_consts = grads

    grad_init_state = jtu.tree_map(
        lambda _: None, eqx.filter(init_state, eqx.is_inexact_array)
    )
    grad_init_state = dataclasses.replace(
        grad_init_state,
        y=grad_y0,
        solver_state=grad_solver_state0,
        # What was saved during the loop went into places that were empty before it, so
        # there is no need to put zeros there.
        save_state=jtu.tree_map(
            lambda s, g: dataclasses.replace(s, ys=g.ys),
            grad_init_state.save_state,
            grad_final_state.save_state,
            is_leaf=is_save_state,
        ),
    )
    grad_ts = tuple(None for _ in ts)
    return (
        grad_init_state,
        grad_ts,
        tuple(grad_consts.get(i) for i in range(len(consts))),
    )


def _is_none(x):
    return x is None


def _is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)


def _accumulate(grad_consts: dict[int, Any], new: dict[int, Any]) -> None:
    for i, g in new.items():
        grad_consts[i] = grad_consts[i] + g


def _pull_save_steps(fns, i, saved, carry, save_index, grad_ys, grad_y1):
    """Pulls back what `SubSaveAt(steps=...)` saved at the end of a step."""

    def pull():
        grad = jtu.tree_map(lambda g: g[jnp.maximum(save_index - 1, 0)], grad_ys)
        _, pull_fn = fns.vjp(f"save_steps_{i}", (carry.t_after,), (carry.y1,))
        new_consts, (new_y1,) = pull_fn(grad)
        return jtu.tree_map(
            lambda g: jnp.where(saved, g, jnp.zeros_like(g)), (new_consts, new_y1)
        )

    new_consts, new_y1 = lax.cond(
        eqxi.unvmap_any(saved),
        pull,
        lambda: jtu.tree_map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pull)
        ),
    )
    return new_consts, tree_add(grad_y1, new_y1)


def _pull_save_ts(
    fns,
    i,
    step,
    dense_info,
    ts,
    saved_here,
    ts_index,
    save_index,
    grad_ys,
    grad_consts,
    grad_dense_info,
):
    """Pulls back what `SubSaveAt(ts=...)` saved during a step. Makes no iterations if
    that was nothing."""
    used = [j for j in fns.hoisted.uses(f"save_ts_{i}") if j in fns.differentiated]
    grad_dense_info = materialise(
        grad_dense_info, eqx.filter(dense_info, eqx.is_inexact_array)
    )

    def last(ts_index):
        t = ts[jnp.maximum(ts_index - 1, 0)]
        return t, (ts_index > 0) & saved_here(t)

    def cond_fun(carry):
        ts_index, _, _, _ = carry
        _, saved = last(ts_index)
        return eqxi.unvmap_any(saved)

    def body_fun(carry):
        ts_index, save_index, own_consts, grad_dense_info = carry
        t, saved = last(ts_index)
        t = jnp.where(saved, t, step.t1)
        grad = jtu.tree_map(lambda g: g[jnp.maximum(save_index - 1, 0)], grad_ys)
        _, pull = fns.vjp(f"save_ts_{i}", (step.t0, step.t1, t), (dense_info,))
        new_consts, (new_dense_info,) = pull(grad)
        new = jtu.tree_map(
            lambda g: where_active(saved, g, jnp.zeros_like(g)),
            (new_consts, new_dense_info),
        )
        own_consts, grad_dense_info = jtu.tree_map(
            jnp.add, (own_consts, grad_dense_info), new
        )
        one = jnp.where(saved, 1, 0)
        return ts_index - one, save_index - one, own_consts, grad_dense_info

    own_consts = {j: grad_consts[j] for j in used}
    ts_index, save_index, own_consts, grad_dense_info = lax.while_loop(
        cond_fun, body_fun, (ts_index, save_index, own_consts, grad_dense_info)
    )
    return ts_index, save_index, {**grad_consts, **own_consts}, grad_dense_info
