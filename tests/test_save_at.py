"""Every `SaveAt` saves what it saves with diffrax's adjoints, with the same gradient;
and a solve can be resumed from it."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr

from .derivatives import ADJOINT, agree, everything
from .helpers import relative_difference, SOLVERS
from .test_gradient import MAX_STEPS, TOL, weighted_sum


RK = dfxr.UReversible(diffrax.Heun())
HEUN = diffrax.ReversibleHeun()
PID = diffrax.PIDController(rtol=1e-2, atol=1e-2)
JUMPS = diffrax.ClipStepSizeController(
    PID, jump_ts=[0.4], step_ts=[0.7], store_rejected_steps=5
)
W = jnp.array([[-0.6, 1.4], [-1.1, 0.2]])
Y0 = jnp.array([1.0, 0.4])


def field(t, y, w):
    return jnp.tanh(w @ y) * (1 + 0.3 * jnp.sin(t))


def solve(adjoint, params, save_at, controller=None, solver=RK, **kwargs):
    y0, w = params
    kwargs = dict(t0=0.0, t1=1.0, dt0=0.11, max_steps=MAX_STEPS) | kwargs
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        y0=y0,
        args=w,
        saveat=save_at,
        stepsize_controller=controller or diffrax.ConstantStepSize(),
        adjoint=adjoint,
        **kwargs,
    )


#
# Values of other kinds
#


class Saved(eqx.Module):
    value: jax.Array
    count: jax.Array
    label: str = eqx.field(static=True)


def _module(t, y, w):
    # With an integer, which has no gradient, and things that are no arrays.
    count = jnp.sum(y > 0, dtype=jnp.int32)
    return Saved(y * t, count, "saved"), None, {}


def _mixed_dtypes(t, y, w):
    return (
        y.astype(jnp.float32),
        jnp.isfinite(y),
        jax.lax.complex(y[0], y[1]),
        jnp.zeros((0, 2)),
    )


def _nothing_of_y(t, y, w):
    return w * t


def _constant(t, y, w):
    return jnp.array(2.0)


def _with_a_constant(t, y, w):
    return y, jnp.array(3.0)


def _differentiates(t, y, w):
    # The derivative of the solution, and more of the kind.
    jac = jax.jacfwd(lambda y: field(t, y, w))(y)
    return jac @ field(t, y, w)


def _looks_inside(t, y, w):
    def step(carry, x):
        return jnp.sin(carry) + x, carry[0]

    return jax.lax.scan(step, y, w)


TS = jnp.array([0.0, 0.17, 0.3, 0.3, 0.71, 1.0])


@pytest.mark.parametrize(
    "fn,where,controller,solver",
    [
        (_module, "ts", JUMPS, RK),
        (_module, "steps", None, HEUN),
        (_mixed_dtypes, "ts", PID, HEUN),
        (_mixed_dtypes, "steps", JUMPS, RK),
        (_nothing_of_y, "ts", None, RK),
        (_nothing_of_y, "steps", PID, HEUN),
        (_constant, "ts", PID, RK),
        (_with_a_constant, "ts", None, HEUN),
        (_with_a_constant, "steps", None, HEUN),
        (_differentiates, "ts", JUMPS, HEUN),
        (_looks_inside, "steps", PID, RK),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex dtype support:UserWarning")
# diffrax fills up what has not been saved yet with infinity, be it of integers.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.one_in(3)
def test_fn(fn, where, controller, solver):
    save_at = {
        "ts": diffrax.SaveAt(t0=True, ts=TS, fn=fn),
        "steps": diffrax.SaveAt(steps=True, t1=True, fn=fn),
    }[where]

    def loss(adjoint, params):
        ys = solve(adjoint, params, save_at, controller, solver).ys
        real = [
            jnp.real(x).astype(jnp.float64) + jnp.imag(x).astype(jnp.float64)
            for x in jtu.tree_leaves(ys)
        ]
        return weighted_sum(real)

    # Half of `_mixed_dtypes` is in single precision.
    tol = 1e-6 if fn is _mixed_dtypes else TOL
    agree(loss, (Y0, W), tol=tol)


def test_fn_closes_over():
    def loss(adjoint, params):
        y0, w, scale = params
        fn = lambda t, y, args: y * scale + t * jnp.sum(w)
        subs = {
            "a": diffrax.SubSaveAt(ts=TS, fn=fn),
            "b": diffrax.SubSaveAt(t0=True, t1=True, fn=lambda t, y, args: scale**2),
            "c": diffrax.SubSaveAt(steps=2, fn=lambda t, y, args: fn(t, 2 * y, args)),
        }
        sol = solve(adjoint, (y0, w), diffrax.SaveAt(subs=subs), JUMPS)
        return weighted_sum(sol.ys)

    _, grad = agree(loss, (Y0, W, jnp.array([0.7, -0.2])))
    assert jnp.all(grad[2] != 0)


def test_unused():
    # Only one of what was saved has a gradient, and the others have not even zeros.
    def loss(adjoint, params):
        sub = lambda **kwargs: diffrax.SubSaveAt(**kwargs)
        subs = [sub(ts=TS), (sub(steps=True), sub(ts=TS[2:4], t0=True)), None]
        sol = solve(adjoint, params, diffrax.SaveAt(subs=subs, dense=True), PID, HEUN)
        return weighted_sum(sol.ys[1][1])

    agree(loss, (Y0, W))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(t0=True),
        dict(ts=[0.0]),
        dict(ts=[1.0]),
        dict(ts=[0.5]),
        dict(t0=True, t1=True),
        dict(steps=4, t1=True),
        dict(steps=200, t1=True),
    ],
    ids=str,
)
@pytest.mark.one_in(3)
def test_few_saved(kwargs):
    save_at = diffrax.SaveAt(**kwargs)
    loss = lambda adjoint, params: everything(solve(adjoint, params, save_at))
    agree(loss, (Y0, W))


def test_numpy_times():
    save_at = diffrax.SaveAt(ts=np.linspace(0, 1, 4))
    loss = lambda adjoint, params: everything(solve(adjoint, params, save_at, PID))
    agree(loss, (Y0, W))


def test_integer_times():
    # Of ints alone diffrax makes floats.
    def loss(adjoint, params):
        save_at = diffrax.SaveAt(ts=jnp.array([0, 1, 2], jnp.int32), t1=True)
        return everything(
            solve(adjoint, params, save_at, t0=0, t1=jnp.array(2), dt0=jnp.array(1))
        )

    agree(loss, (Y0, W))


#
# Dense output
#


@pytest.mark.parametrize(
    "controller,solver,sign",
    [(JUMPS, RK, 1.0), (PID, HEUN, -1.0), (None, diffrax.LeapfrogMidpoint(), -1.0)],
    ids=["jumps", "pid", "leapfrog"],
)
@pytest.mark.one_in(2)
def test_dense(controller, solver, sign):
    def loss(adjoint, params):
        save_at = diffrax.SaveAt(dense=True)
        sol = solve(
            adjoint, params, save_at, controller, solver, t1=sign, dt0=0.11 * sign
        )
        a, b = 0.23 * sign, 0.83 * sign
        path = sol.interpolation
        # At the ends and between, an increment, from the left and the right.
        return weighted_sum(
            (
                sol.evaluate(0.0),
                sol.evaluate(sign),
                sol.evaluate(a, b),
                sol.evaluate(a, left=False),
                path.derivative(b),
                jax.jacfwd(path.evaluate)(jnp.array(a)),
            )
        )

    if controller is JUMPS:
        # With negative times it would have to be another.
        assert sign > 0
    agree(loss, (Y0, W))


def test_dense_drives_another():
    # The solution is the control of a second equation, solved with other steps.
    def loss(adjoint, params):
        first = solve(adjoint, params, diffrax.SaveAt(dense=True), PID)
        term = diffrax.ControlTerm(
            lambda t, y, args: jnp.outer(jnp.sin(y), jnp.cos(y)), first
        )
        second = diffrax.diffeqsolve(
            term, HEUN, 0.0, 1.0, 0.2, Y0, adjoint=adjoint, max_steps=8
        )
        return weighted_sum(second.ys)

    _, grad = agree(loss, (Y0, W))
    assert jnp.all(grad[1] != 0)


def test_dense_without_a_step():
    def loss(y0):
        sol = solve(ADJOINT, (y0, W), diffrax.SaveAt(dense=True), PID, t0=1.0, dt0=None)
        return weighted_sum(sol.evaluate(1.0))

    grad = jax.jit(jax.grad(loss))(Y0)
    assert relative_difference(grad, jax.grad(weighted_sum)(Y0)) < TOL


@pytest.mark.parametrize("save_at", [dict(dense=True), dict(ts=TS, t1=True)], ids=str)
@pytest.mark.one_in(2)
def test_batch_of_ends(save_at):
    # Some of a batch make no step, or one.
    t1 = jnp.array([0.0, 0.05, 1.0])

    def loss(adjoint, params):
        def one(t1):
            kwargs = dict(save_at)
            if "ts" in kwargs:
                kwargs["ts"] = kwargs["ts"] * t1
            sol = solve(adjoint, params, diffrax.SaveAt(**kwargs), PID, t1=t1)
            if sol.ys is None:
                return weighted_sum(sol.evaluate(0.6 * t1))
            return weighted_sum(sol.ys)

        return weighted_sum(jax.vmap(one)(t1))

    agree(loss, (Y0, W))


#
# Kept for another solve
#


@pytest.mark.long
@pytest.mark.parametrize("solver", [RK, HEUN], ids=["UReversible", "ReversibleHeun"])
@pytest.mark.parametrize("kept", [("solver_state",), ("controller_state",), "all"])
@pytest.mark.one_in(3)
def test_resume(kept, solver):
    names = ("solver_state", "controller_state", "made_jump")
    kept = names if kept == "all" else kept

    def loss(adjoint, params):
        y0, w = params
        keep = dict.fromkeys(kept, True)
        # The first ends at the jump.
        first = solve(
            adjoint, params, diffrax.SaveAt(t1=True, **keep), JUMPS, solver, t1=0.4
        )
        assert all(
            (getattr(first, name) is None) == (name not in kept) for name in names
        )
        second = solve(
            adjoint,
            (first.ys[0], w),
            diffrax.SaveAt(ts=[0.45, 0.8], t1=True),
            JUMPS,
            solver,
            t0=0.4,
            **{name: getattr(first, name) for name in kept},
        )
        return weighted_sum(second.ys)

    agree(loss, (Y0, W))


@pytest.mark.long
def test_resume_is_to_go_on():
    # With all that was kept, two solves are one.
    controller = diffrax.StepTo(jnp.array([0.0, 0.1, 0.3, 0.5, 0.6, 1.0]))
    kwargs = dict(dt0=None, solver=dfxr.ReversibleHeun())

    def whole(params):
        return solve(ADJOINT, params, diffrax.SaveAt(t1=True), controller, **kwargs).ys

    def halves(params):
        y0, w = params
        first = solve(
            ADJOINT,
            params,
            diffrax.SaveAt(t1=True, solver_state=True),
            diffrax.StepTo(controller.ts[:4]),
            t1=0.5,
            **kwargs,
        )
        second = solve(
            ADJOINT,
            (first.ys[0], w),
            diffrax.SaveAt(t1=True),
            diffrax.StepTo(controller.ts[3:]),
            t0=0.5,
            solver_state=first.solver_state,
            **kwargs,
        )
        return second.ys

    one, two = (
        jax.jit(jax.value_and_grad(lambda p, f=f: weighted_sum(f(p))))((Y0, W))
        for f in (whole, halves)
    )
    assert relative_difference(two, one) < TOL


@pytest.mark.parametrize("name", ["solver_state", "controller_state"])
@pytest.mark.one_in(2)
def test_loss_of_what_was_kept(name):
    # `solver_state` is part of the solution; the step sizes are constants.
    def loss(adjoint, params):
        save_at = diffrax.SaveAt(t1=True, **{name: True})
        sol = solve(adjoint, params, save_at, PID, dfxr.ReversibleHeun())
        leaves = [
            jnp.asarray(x)
            for x in jtu.tree_leaves(getattr(sol, name))
            if eqx.is_inexact_array(x)
        ]
        return weighted_sum(sol.ys) + weighted_sum(leaves)

    agree(loss, (Y0, W))


@pytest.mark.parametrize("made_jump", [True, False, "array"])
@pytest.mark.one_in(2)
def test_made_jump(made_jump):
    made_jump = jnp.array(True) if made_jump == "array" else made_jump

    def loss(adjoint, params):
        y0, w, f0 = params
        term = diffrax.ODETerm(field)
        # A state of another vector field; a jump makes the solver evaluate its own.
        state = HEUN.init(term, 0.0, 0.1, y0 + 0.1, f0)
        sol = solve(
            adjoint,
            (y0, w),
            diffrax.SaveAt(t1=True, ts=TS, made_jump=True),
            PID,
            HEUN,
            solver_state=state,
            made_jump=made_jump,
        )
        return weighted_sum(sol.ys)

    agree(loss, (Y0, W, 2 * W))


@pytest.mark.parametrize("controller", [None, "step_to"])
def test_made_jump_stays_static(controller):
    # Where no controller makes jumps diffrax leaves them out when it compiles.
    kwargs = dict(dt0=0.2)
    if controller == "step_to":
        controller = diffrax.StepTo(jnp.array([0.0, 0.3, 1.0]))
        kwargs = dict(dt0=None)

    @jax.jit
    def run(y0):
        save_at = diffrax.SaveAt(t1=True, made_jump=True)
        sol = solve(ADJOINT, (y0, W), save_at, controller, **kwargs)
        assert sol.made_jump is False
        return sol.ys

    jax.block_until_ready(run(Y0))


@pytest.mark.long
@pytest.mark.parametrize("rejected", [None, 6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.one_in(2)
def test_discontinuous_vector_field(sign, rejected):
    # With and without the jump given, and with steps rejected on its account.
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-3, atol=1e-3),
        step_ts=[0.3 * sign],
        jump_ts=[0.5 * sign],
        store_rejected_steps=rejected,
    )

    def jumping(t, y, w):
        return jnp.where(jnp.abs(t) < 0.5, w @ y, 3 * jnp.cos(y))

    def loss(adjoint, params):
        y0, w = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(jumping),
            HEUN,
            0.0,
            sign,
            0.4 * sign,
            y0,
            w,
            saveat=diffrax.SaveAt(steps=True, ts=sign * TS),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=64,
        )
        return weighted_sum(sol.ys) + sol.stats["num_rejected_steps"]

    value, _ = agree(loss, (Y0, W))
    assert value > 1


#
# Out of steps
#


@pytest.mark.long
@pytest.mark.parametrize(
    "kwargs",
    [dict(steps=True), dict(dense=True), dict(ts=TS, steps=2, t1=True)],
    ids=str,
)
@pytest.mark.parametrize("max_steps", [1, 4])
@pytest.mark.one_in(3)
def test_max_steps_reached(kwargs, max_steps):
    def loss(adjoint, params):
        sol = solve(
            adjoint,
            params,
            diffrax.SaveAt(**kwargs),
            PID,
            dt0=0.07,
            max_steps=max_steps,
            throw=False,
        )
        if sol.interpolation is not None:
            return weighted_sum((sol.evaluate(0.03), sol.derivative(0.05)))
        return weighted_sum(sol.ys)

    sol = solve(ADJOINT, (Y0, W), diffrax.SaveAt(t1=True), max_steps=4, throw=False)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    agree(loss, (Y0, W))


def test_max_steps_reached_raises():
    # The check is on the solution, and a gradient that does not look at that has none.
    def loss(y0):
        save_at = diffrax.SaveAt(t1=True)
        return weighted_sum(solve(ADJOINT, (y0, W), save_at, max_steps=4).ys)

    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        jax.block_until_ready(jax.jit(jax.grad(loss))(Y0))


@pytest.mark.long
def test_some_of_a_batch_run_out_of_steps():
    def loss(adjoint, params):
        def one(t1):
            sol = solve(
                adjoint,
                params,
                diffrax.SaveAt(t1=True, ts=0.1 * TS),
                t1=t1,
                max_steps=6,
                throw=False,
            )
            return weighted_sum(sol.ys)

        return weighted_sum(jax.vmap(one)(jnp.array([0.3, 3.0, 0.65])))

    agree(loss, (Y0, W))


#
# No bound on the number of steps
#


@pytest.mark.long
@pytest.mark.parametrize(
    "controller,solver",
    [(None, RK), (JUMPS, RK), (PID, HEUN), (None, diffrax.LeapfrogMidpoint())],
    ids=["constant", "jumps", "pid", "leapfrog"],
)
@pytest.mark.one_in(2)
def test_no_bound(controller, solver):
    def loss(params, max_steps):
        save_at = diffrax.SaveAt(t0=True, t1=True, ts=TS)
        sol = solve(ADJOINT, params, save_at, controller, solver, max_steps=max_steps)
        return everything(sol)

    bounded, unbounded = (
        jax.jit(jax.value_and_grad(ft.partial(loss, max_steps=n)))((Y0, W))
        for n in (MAX_STEPS, None)
    )
    assert relative_difference(unbounded, bounded) < TOL


@pytest.mark.long
def test_no_bound_in_a_batch():
    def loss(adjoint, params, max_steps=None):
        def one(t1):
            sol = solve(
                adjoint,
                params,
                diffrax.SaveAt(t1=True),
                PID,
                t1=t1,
                max_steps=max_steps,
            )
            return weighted_sum(sol.ys)

        return weighted_sum(jax.vmap(one)(jnp.array([0.0, 0.4, 2.0])))

    agree(loss, (Y0, W))


def test_no_bound_with_an_event():
    # The way to solve until something happens.
    def loss(adjoint, params):
        y0, level = params
        sol = solve(
            adjoint,
            (y0, W),
            diffrax.SaveAt(t1=True),
            PID,
            t1=jnp.inf,
            max_steps=None,
            event=diffrax.Event(lambda t, y, args, **kwargs: y[0] < level),
        )
        return weighted_sum(sol.ys)

    agree(loss, (Y0, jnp.array(0.2)))


@pytest.mark.parametrize("save_at", [dict(steps=True), dict(dense=True)], ids=str)
@pytest.mark.one_in(2)
def test_no_bound_on_what_is_saved(save_at):
    # diffrax's own error.
    with pytest.raises(ValueError, match="max_steps=None"):
        solve(ADJOINT, (Y0, W), diffrax.SaveAt(**save_at), max_steps=None)


#
# A solver state that is not what this solve would have begun with
#


@pytest.mark.long
@pytest.mark.parametrize("name", ["ReversibleHeun", "StormerVerlet"])
def test_given_evaluation(name):
    # It is a part of the first step, of its output, and of its derivative by `t0`.
    pair = name == "StormerVerlet"

    def field(t, y, p):
        return p * jnp.sin(2 * y) + t

    def loss(adjoint, params):
        p, f0, y0, times = params
        sol = diffrax.diffeqsolve(
            (diffrax.ODETerm(field),) * 2 if pair else diffrax.ODETerm(field),
            SOLVERS[name].solver,
            times[0],
            times[-1],
            None,
            (y0, 2 * y0) if pair else y0,
            p,
            solver_state=f0 if pair else (y0, f0),
            stepsize_controller=diffrax.StepTo(times),
            saveat=diffrax.SaveAt(ts=[0.1, 0.25, 0.6], fn=_nonlinear),
            adjoint=adjoint,
            max_steps=8,
        )
        return weighted_sum(sol.ys)

    times = jnp.array([0.0, 0.3, 0.7, 1.0])
    params = (jnp.array(0.8), jnp.array([5.0, -3.0]), jnp.array([1.0, 0.5]), times)
    agree(loss, params)


def _nonlinear(t, y, args):
    return jtu.tree_map(lambda x: t * jnp.sin(2 * x), y)


@pytest.mark.long
def test_resumed_at_a_jump():
    # `made_jump` comes out of one solve and goes into the next.
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-2, atol=1e-2), jump_ts=[0.5]
    )

    def loss(adjoint, p):
        solve = ft.partial(
            diffrax.diffeqsolve,
            diffrax.ODETerm(lambda t, y, p: p * jnp.where(t < 0.5, 1.0, -y)),
            dfxr.UReversible(diffrax.Heun()),
            dt0=0.1,
            args=p,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        first = solve(
            t0=0.0,
            t1=0.5,
            y0=jnp.array([1.0, 0.5]),
            saveat=diffrax.SaveAt(t1=True, solver_state=True, made_jump=True),
        )
        second = solve(
            t0=first.ts[0],
            t1=1.0,
            y0=first.ys[0],
            solver_state=first.solver_state,
            made_jump=first.made_jump,
        )
        return weighted_sum(second.ys)

    agree(loss, jnp.array(0.8))
