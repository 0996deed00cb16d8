"""Gradients with respect to times are right: of the start, the end, what is saved, and
the steps that a controller was told to make."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest

import diffrax_reversible as dfxr

from .derivatives import ADJOINT, agree, everything
from .helpers import from_term, relative_difference, SOLVERS
from .test_gradient import TOL, weighted_sum


RK = dfxr.UReversible(diffrax.Heun())
HEUN = dfxr.ReversibleHeun()
PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)
MAX_STEPS = 32


#
# Where the method makes no error
#


# Quadratic solutions, and their interpolation, are exact in `Heun`: whatever the
# locations of the steps are, and however these depend on anything.
def ramp(t, y, args):
    return args[0] + args[1] * t


def ramp_exact(t0, t, y0, args):
    return y0 + args[0] * (t - t0) + args[1] * (t**2 - t0**2) / 2


def saved(t, y, args):
    return {"y": y * jnp.cos(t), "t": t**2 * args[1]}


SLOPES = (jnp.array([0.5, -1.0]), jnp.array([1.2, 0.4]))
Y0 = jnp.array([0.3, -0.2])
FRACTIONS = jnp.array([0.0, 0.12, 0.5, 0.5, 0.77, 1.0])


@pytest.mark.long
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("controller", ["constant", "pid", "pid-dt0", "clip", "jump"])
def test_quadratic(controller, sign):
    stepsize_controller, dt0 = {
        "constant": (diffrax.ConstantStepSize(), 0.13),
        "pid": (PID, None),
        "pid-dt0": (PID, 0.05),
        "clip": (
            diffrax.ClipStepSizeController(
                PID, step_ts=[0.4 * sign], store_rejected_steps=3
            ),
            0.1,
        ),
        "jump": (
            diffrax.ClipStepSizeController(PID, jump_ts=[0.4 * sign, 0.6 * sign]),
            0.1,
        ),
    }[controller]
    dt0 = None if dt0 is None else sign * dt0

    def ours(params):
        y0, args, t0, t1, ts = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            RK,
            t0,
            t1,
            dt0,
            y0,
            args,
            saveat=diffrax.SaveAt(t0=True, t1=True, ts=ts, fn=saved),
            stepsize_controller=stepsize_controller,
            adjoint=ADJOINT,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys) + weighted_sum(sol.ts)

    def exact(params):
        y0, args, t0, t1, ts = params
        ts = jnp.concatenate([t0[None], ts, t1[None]])
        ys = jax.vmap(lambda t: saved(t, ramp_exact(t0, t, y0, args), args))(ts)
        return weighted_sum(ys) + weighted_sum(ts)

    t0, t1 = jnp.array(0.1 * sign), jnp.array(1.1 * sign)
    # Those at the very ends may not leave the interval: they are saved, and constant.
    ts = t0 + FRACTIONS * (t1 - t0)
    params = (Y0, SLOPES, t0, t1, ts)
    value, grad = jax.jit(jax.value_and_grad(ours))(params)
    expected_value, expected = jax.value_and_grad(exact)(params)
    assert abs(value - expected_value) < TOL
    assert relative_difference(grad, expected) < TOL
    assert all(jnp.all(x != 0) for x in jtu.tree_leaves(grad[2:]))


@pytest.mark.long
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dense(sign):
    # Evaluated at times that are differentiated as well.
    def ours(params):
        t0, t1, t, s = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            RK,
            t0,
            t1,
            sign * 0.13,
            Y0,
            SLOPES,
            saveat=diffrax.SaveAt(dense=True),
            adjoint=ADJOINT,
            max_steps=MAX_STEPS,
        )
        out = sol.evaluate(t), sol.evaluate(t, s), sol.derivative(s), sol.t0, sol.t1
        return weighted_sum(out)

    def exact(params):
        t0, t1, t, s = params
        at = lambda t: ramp_exact(t0, t, Y0, SLOPES)
        return weighted_sum((at(t), at(s) - at(t), ramp(s, None, SLOPES), t0, t1))

    params = tuple(sign * jnp.array(x) for x in (0.1, 1.1, 0.37, 0.92))
    value, grad = jax.jit(jax.value_and_grad(ours))(params)
    expected_value, expected = jax.value_and_grad(exact)(params)
    assert abs(value - expected_value) < TOL
    assert relative_difference(grad, expected) < TOL


@pytest.mark.long
def test_resumed_at_a_time():
    # The vector field changes at `tm`, where one solve ends and another begins with
    # everything that the first has kept.
    controller = diffrax.ClipStepSizeController(PID, step_ts=[0.2, 0.9])

    def ours(tm, adjoint=ADJOINT):
        solve = ft.partial(
            diffrax.diffeqsolve,
            diffrax.ODETerm(ramp),
            RK,
            dt0=0.1,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        first = solve(
            t0=0.0,
            t1=tm,
            y0=Y0,
            args=SLOPES,
            saveat=diffrax.SaveAt(
                t1=True, solver_state=True, controller_state=True, made_jump=True
            ),
        )
        second = solve(
            t0=first.ts[0],
            t1=1.0,
            y0=first.ys[0],
            args=SLOPES[::-1],
            solver_state=first.solver_state,
            controller_state=first.controller_state,
            made_jump=first.made_jump,
        )
        return weighted_sum(second.ys)

    def exact(tm):
        y = ramp_exact(0.0, tm, Y0, SLOPES)
        return weighted_sum(ramp_exact(tm, 1.0, y, SLOPES[::-1])[None])

    tm = jnp.array(0.47)
    value, grad = jax.jit(jax.value_and_grad(ours))(tm)
    expected_value, expected = jax.value_and_grad(exact)(tm)
    assert abs(value - expected_value) < TOL
    assert abs(grad - expected) < TOL


@pytest.mark.long
def test_batch():
    # One of them makes no step; and each has its own times.
    def ours(t0, t1, ts):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            RK,
            t0,
            t1,
            None,
            Y0,
            SLOPES,
            saveat=diffrax.SaveAt(t1=True, ts=ts, fn=saved),
            stepsize_controller=PID,
            adjoint=ADJOINT,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys) + weighted_sum(sol.ts)

    t0, t1 = jnp.array([0.2, 0.3, 0.0]), jnp.array([1.0, 0.3, 0.01])
    ts = jnp.stack([t0 + x * (t1 - t0) for x in (0.2, 0.9)])
    gradient = jax.grad(ours, argnums=(0, 1, 2))
    batched = jax.jit(jax.vmap(gradient, (0, 0, 1)))(t0, t1, ts)
    single = jax.jit(gradient)
    for i in (0, 2):
        expected = single(t0[i], t1[i], ts[:, i])
        assert relative_difference([x[i] for x in batched], expected) < TOL
    assert all(jnp.all(jnp.isfinite(x)) for x in batched)


def test_no_steps():
    # t0 == t1. diffrax saves `y0` at `t0`, `len(ts)` times; moving `t1` alone is not
    # the same solve any more.
    def loss(adjoint, params):
        y0, t = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            RK,
            t,
            t,
            None,
            y0,
            SLOPES,
            saveat=diffrax.SaveAt(t0=True, t1=True, ts=jnp.stack([t, t]), fn=saved),
            stepsize_controller=PID,
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys) + weighted_sum(sol.ts)

    def exact(params):
        y0, t = params
        ys = jax.vmap(lambda t: saved(t, y0, SLOPES))(jnp.stack([t] * 4))
        return weighted_sum(ys) + weighted_sum(jnp.stack([t] * 4))

    params = (Y0, jnp.array(0.6))
    grad = jax.jit(jax.grad(ft.partial(loss, ADJOINT)))(params)
    assert relative_difference(grad, jax.grad(exact)(params)) < TOL


#
# Where it does: the discrete solution, with the steps inside the interval held fixed
#


def decay(t, y, args):
    return jnp.tanh(args @ y) * (1 + 0.3 * jnp.sin(t))


W = jnp.array([[-0.6, 1.4], [-1.1, 0.2]])

# (controller, dt0, solver, how to save)
GRID = [
    ("constant", 0.23, RK, "ts"),
    ("constant", 0.23, HEUN, "dense"),
    ("pid", None, RK, "ts"),
    ("pid", 0.1, HEUN, "ts"),
    ("pid", 0.1, RK, "ts"),
    ("pid", None, dfxr.UReversible(diffrax.Bosh3(), 0.999), "ts"),
    ("constant", 0.23, dfxr.LeapfrogMidpoint(), "ts"),
    ("constant", 0.23, diffrax.LeapfrogMidpoint(), "dense"),
]


def _solve(adjoint, params, solver, controller, dt0, save_at, max_steps=MAX_STEPS):
    y0, w, t0, t1, ts = params
    fn = lambda t, y, args: (jnp.sum(args @ y) * jnp.cos(t), t)
    save_at = {
        "ts": lambda: diffrax.SaveAt(t0=True, t1=True, ts=ts, fn=fn),
        "dense": lambda: diffrax.SaveAt(dense=True, ts=ts),
        "times": lambda: diffrax.SaveAt(steps=True),
    }[save_at]()
    return diffrax.diffeqsolve(
        diffrax.ODETerm(decay),
        solver,
        t0,
        t1,
        dt0,
        y0,
        w,
        saveat=save_at,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("controller,dt0,solver,save_at", GRID)
def test_steps(controller, dt0, solver, save_at, sign):
    is_constant = controller == "constant"
    controller = {"constant": diffrax.ConstantStepSize(), "pid": PID}[controller]
    dt0 = None if dt0 is None else sign * dt0
    t0, t1 = sign * jnp.array(0.2), sign * jnp.array(1.3)
    ts = t0 + jnp.array([0.0, 0.31, 0.64, 0.9]) * (t1 - t0)
    params = (Y0 + 1, W, t0, t1, ts)

    def loss(adjoint, params):
        return everything(_solve(adjoint, params, solver, controller, dt0, save_at))

    if is_constant:
        # They move as they do in the host.
        agree(loss, params)
        return
    # The same steps again, of which only the ends move with `t0` and `t1`.
    sol = eqx.filter_jit(_solve)(
        diffrax.ForwardMode(), params, solver, controller, dt0, "times"
    )
    inside = sol.ts[: int(sol.stats["num_accepted_steps"]) - 1]
    assert jnp.all(jnp.isfinite(inside))

    def reference(adjoint, params):
        _, _, t0, t1, _ = params
        fixed = jnp.concatenate([t0[None], inside, t1[None]])
        step_to = diffrax.StepTo(fixed)
        return everything(_solve(adjoint, params, solver, step_to, None, save_at))

    _, grad = agree(loss, params, reference=reference)
    assert all(jnp.all(x != 0) for x in jtu.tree_leaves(grad))


#
# Where there is output at steps: these move as they do in the host
#


def with_time(t, y, args):
    return jnp.sum(args @ y) * jnp.cos(t), t


SUBS = (
    diffrax.SubSaveAt(steps=2, t1=True, fn=with_time),
    {"a": diffrax.SubSaveAt(ts=[0.5, 0.7]), "b": diffrax.SubSaveAt(t0=True)},
)
STEPS = diffrax.SaveAt(steps=True)


def is_late(t, y, args, **kwargs):
    return jnp.abs(t) > 0.8


def falls(t, y, args, **kwargs):
    return y[1] - 0.65


ENDS = diffrax.Event(is_late)
# At a step, or within one.
BOTH = diffrax.Event([is_late, falls], optx.Newton(1e-10, 1e-10))

AT_STEPS = {
    "steps": dict(saveat=diffrax.SaveAt(steps=True, ts=[0.5, 0.9], fn=with_time)),
    "backwards": dict(saveat=STEPS, sign=-1.0),
    "subs": dict(saveat=diffrax.SaveAt(subs=SUBS)),
    "dense": dict(saveat=diffrax.SaveAt(steps=3, dense=True), solver=HEUN),
    "leapfrog": dict(saveat=STEPS, solver=diffrax.LeapfrogMidpoint()),
    "windows": dict(saveat=diffrax.SaveAt(steps=9), dt0=2e-3, max_steps=1000),
    "event": dict(event=ENDS),
    "event-inf": dict(event=ENDS, saveat=STEPS, is_long=True),
    "event-backwards": dict(event=ENDS, sign=-1.0),
    "event-root": dict(event=BOTH, dt0=0.23),
    "event-step": dict(event=BOTH, dt0=0.31, saveat=diffrax.SaveAt(steps=2, t1=True)),
    "event-real": dict(event=diffrax.Event(falls)),
    "runs-out": dict(throw=False, max_steps=3),
    "runs-out-inf": dict(throw=False, max_steps=3, is_long=True),
    "told": dict(saveat=diffrax.SaveAt(subs=SUBS), told=[0.4, 0.8, 1.0]),
    "told-event": dict(event=ENDS, told=[0.4, 0.85, 1.0]),
}


def _at_steps(
    adjoint,
    params,
    solver=RK,
    sign=1.0,
    is_long=False,
    told=None,
    dt0=0.23,
    controller=None,
    **kwargs,
):
    """`params` are the initial value, and the times of a solve."""
    y0, times = params
    t0, t1, dt0, *inside = times
    t1 = sign * jnp.inf if is_long else t1
    if told is not None:
        dt0, controller = None, diffrax.StepTo(jnp.stack([t0, *inside, t1]))
    elif controller is None:
        controller = diffrax.ConstantStepSize()
    return diffrax.diffeqsolve(
        diffrax.ODETerm(decay),
        solver,
        t0,
        t1,
        dt0,
        y0,
        W,
        stepsize_controller=controller,
        adjoint=adjoint,
        **{"max_steps": MAX_STEPS, **kwargs},
    )


def _params(sign=1.0, told=None, dt0=0.23, **kwargs):
    inside = () if told is None else told
    return Y0 + 1, sign * jnp.array([0.2, 1.3, dt0, *inside])


@pytest.mark.long
@pytest.mark.parametrize("name", AT_STEPS)
@pytest.mark.one_in(4)
def test_output_at_steps(name):
    # Each is the derivative of what is computed, to rounding, with steps that are few.
    case = AT_STEPS[name]

    def loss(adjoint, params):
        return everything(_at_steps(adjoint, params, **case))

    _, (_, grad) = agree(loss, _params(**case))
    assert grad[0] != 0


def test_finite_differences_at_steps():
    def value(times):
        # (A solver whose couplings do not depend on where the steps are.)
        case = dict(solver=HEUN, saveat=STEPS, event=ENDS)
        return everything(_at_steps(ADJOINT, (Y0 + 1, times), **case))

    times = _params()[1]
    value, h = jax.jit(jax.value_and_grad(value)), 1e-5
    _, grad = value(times)
    for g, e in zip(grad, h * jnp.eye(3), strict=True):
        numerical = (value(times + e)[0] - value(times - e)[0]) / (2 * h)
        # (By rounding, and the third derivative.)
        assert abs(g - numerical) < 1e-8


@pytest.mark.long
def test_second_derivative_at_steps():
    case = dict(saveat=diffrax.SaveAt(steps=2, fn=with_time), event=ENDS)

    def loss(adjoint, times):
        return everything(_at_steps(adjoint, (Y0 + 1, times), **case))

    times = _params()[1]
    ours = jax.jit(jax.jacfwd(jax.grad(ft.partial(loss, ADJOINT))))(times)
    forward = ft.partial(loss, diffrax.ForwardMode())
    expected = jax.jit(jax.jacfwd(jax.jacfwd(forward)))(times)
    assert relative_difference(ours, expected) < TOL


@pytest.mark.long
def test_batch_at_steps():
    # Each with its own steps, until an event ends it.
    event = diffrax.Event(lambda t, y, args, **kwargs: y[1] < 0.2)

    def loss(adjoint, params):
        y0, times = params

        def one(y0, dt0):
            times_ = times.at[2].set(dt0)
            saveat = diffrax.SaveAt(steps=2, t1=True)
            sol = _at_steps(adjoint, (y0, times_), event=event, saveat=saveat)
            return everything(sol)

        return jnp.sum(jax.vmap(one)(y0, jnp.array([0.8, 1.0, 0.2]) * times[2]))

    y0, times = _params()
    agree(loss, (jnp.stack([y0, 0.4 * y0, 1.1 * y0]), times))


@pytest.mark.long
def test_resumed_at_steps():
    # The second solve goes on with the step size of the first.
    def loss(adjoint, params):
        y0, times = params
        subs = [diffrax.SubSaveAt(steps=1), diffrax.SubSaveAt(t1=True)]
        saveat = diffrax.SaveAt(subs=subs, controller_state=True)
        first = _at_steps(adjoint, params, saveat=saveat)
        (_, [t]), (_, [y]) = first.ts, first.ys
        times = times.at[:2].set(jnp.stack([t, 2 * times[1]]))
        second = _at_steps(
            adjoint,
            (y, times),
            saveat=STEPS,
            controller_state=first.controller_state,
        )
        return weighted_sum(second.ys) + weighted_sum(second.ts)

    agree(loss, _params())


CHOSEN = {
    "steps": dict(saveat=STEPS),
    "event": dict(event=ENDS),
    "event-step": dict(event=diffrax.Event(is_late, BOTH.root_finder)),
}


def _of_chosen(params, which=everything, **case):
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    y0, times = params
    # Its first step is a constant.
    times = times.at[2].set(0.1)
    return which(_at_steps(ADJOINT, (y0, times), controller=pid, **case))


@pytest.mark.long
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_steps(name):
    # Where an adaptive controller would make them otherwise is not known.
    loss = ft.partial(_of_chosen, **CHOSEN[name])
    params = _params()
    message = "cannot differentiate output at steps"
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(jax.jit(jax.grad(loss))(params))
    y0, times = params
    # Nothing of this is needed for anything else.
    grad = jax.jit(jax.grad(lambda y0: loss((y0, times))))(y0)
    assert jnp.all(jnp.isfinite(grad)) and jnp.all(grad != 0)


@pytest.mark.parametrize("mode", ["forward", "second"])
def test_chosen_steps_in_forward_mode(mode):
    times = _params()[1]
    loss = lambda y0, times: _of_chosen((y0, times), saveat=STEPS)
    if mode == "forward":
        derivative = lambda y0, times, t: jax.jvp(loss, (y0, times), (y0, t))
    else:
        derivative = lambda y0, times, t: jax.jvp(
            lambda times: jax.grad(loss)(y0, times), (times,), (t,)
        )
    derivative = eqx.filter_jit(derivative)
    if mode == "forward":
        out = derivative(Y0 + 1, times, jnp.zeros(3))
        assert all(jnp.all(jnp.isfinite(x)) for x in out)
    with pytest.raises(RuntimeError, match="cannot differentiate output at steps"):
        jax.block_until_ready(derivative(Y0 + 1, times, jnp.ones(3)))


def _at_end(sol):
    return jnp.sum(sol.ys[-1])


def _at_last_step(sol):
    return jnp.sum(sol.ys[sol.stats["num_accepted_steps"] - 1])


@pytest.mark.long
def test_chosen_steps_do_not_matter():
    # The loss is of the end alone; or the event does not happen; or it does at a root.
    never = diffrax.Event(lambda t, y, args, **kwargs: t > 9)
    root = diffrax.Event([never.cond_fn, falls], BOTH.root_finder)

    def gradient(which=_at_end, **case):
        loss = ft.partial(_of_chosen, which=which, **case)
        return jax.jit(jax.grad(loss))(_params())

    end = gradient()
    assert relative_difference(gradient(_at_last_step, saveat=STEPS), end) < TOL
    assert relative_difference(gradient(event=never), end) < TOL
    _, grad = gradient(event=root)
    assert grad[0] != 0 and grad[1] == 0


@pytest.mark.long
def test_chosen_steps_without_throw():
    # For the element of the batch that an event has ended.
    event = diffrax.Event(lambda t, y, args, **kwargs: (y[1] < 0.5) & (y[0] > 0))

    def loss(y0, times):
        return _of_chosen((y0, times), event=event, throw=False)

    y0, times = _params()
    gradient = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None)))
    for grad in gradient(jnp.stack([y0, -y0]), times):
        is_known = jnp.all(jnp.isfinite(grad), axis=1)
        assert jnp.array_equal(is_known, jnp.array([False, True]))


#
# Against the true derivative
#


@pytest.mark.long
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_accurate_solve(sign):
    # y' = p y cos(t), solved well enough that it matters no more how.
    def ours(params):
        p, y0, t0, t1, ts = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: p * y * jnp.cos(t)),
            dfxr.UReversible(diffrax.Bosh3()),
            t0,
            t1,
            None,
            y0,
            p,
            saveat=diffrax.SaveAt(t1=True, ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
            adjoint=ADJOINT,
            max_steps=4096,
        )
        return weighted_sum(sol.ys)

    def exact(params):
        p, y0, t0, t1, ts = params
        ts = jnp.append(ts, t1)
        return weighted_sum(
            jax.vmap(lambda t: y0 * jnp.exp(p * (jnp.sin(t) - jnp.sin(t0))))(ts)
        )

    t0, t1 = sign * jnp.array(0.3), sign * jnp.array(2.0)
    ts = sign * jnp.array([0.7, 1.4])
    params = (jnp.array(0.9), jnp.array([1.0, -0.4]), t0, t1, ts)
    grad = jax.jit(jax.grad(ours))(params)
    assert relative_difference(grad, jax.grad(exact)(params)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("solver", [RK, HEUN], ids=["UReversible", "ReversibleHeun"])
def test_finite_differences(solver):
    # Of a solve with many steps: what those inside of the interval do when its ends
    # move makes a difference of the order of the error, 1e-6 here; and a linear
    # interpolation has a slope that is wrong by 1e-3.
    def loss(adjoint, x):
        t0, t1, t = x
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(decay),
            solver,
            t0,
            t1,
            1e-3,
            Y0 + 1,
            W,
            saveat=diffrax.SaveAt(t1=True, ts=t[None]),
            adjoint=adjoint,
            max_steps=2048,
        )
        return weighted_sum(sol.ys)

    # Not where there is a step more or less, nor a save from another step.
    x = jnp.array([0.2, 1.3005, 0.7104])
    grad = jax.jit(jax.grad(ft.partial(loss, ADJOINT)))(x)
    value = jax.jit(ft.partial(loss, ADJOINT))
    h = 1e-5
    for i in range(3):
        e = h * jnp.eye(3)[i]
        numerical = (value(x + e) - value(x - e)) / (2 * h)
        assert abs(grad[i] - numerical) < 1e-3 * abs(numerical)


@pytest.mark.long
def test_second_derivative():
    # Forward over reverse, of a time.
    solver = dfxr.UReversible(diffrax.Heun(), 0.999)

    def loss(t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            solver,
            0.0,
            t1,
            0.13,
            Y0,
            SLOPES,
            adjoint=ADJOINT,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys)

    exact = lambda t1: weighted_sum(ramp_exact(0.0, t1, Y0, SLOPES)[None])
    t1 = jnp.array(1.1)
    ours = jax.jit(jax.jacfwd(jax.grad(loss)))(t1)
    assert relative_difference(ours, jax.hessian(exact)(t1)) < 1e-8


#
# Times of a step size controller
#


def _with_steps(adjoint, times, solver=RK):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(decay),
        solver,
        times[0],
        times[-1],
        None,
        Y0 + 1,
        W,
        stepsize_controller=diffrax.StepTo(times),
        saveat=diffrax.SaveAt(t1=True, ts=[0.5]),
        adjoint=adjoint,
        max_steps=MAX_STEPS,
    )


@pytest.mark.parametrize("solver", [RK, HEUN], ids=["UReversible", "ReversibleHeun"])
def test_step_to(solver):
    # Each of them is an argument of the user's, and none is chosen by a controller.
    def loss(adjoint, times):
        return weighted_sum(_with_steps(adjoint, times, solver).ys)

    _, grad = agree(loss, jnp.array([0.2, 0.35, 0.6, 1.0, 1.3]))
    assert jnp.all(grad != 0)


@pytest.mark.long
def test_where_the_vector_field_jumps():
    # What a controller is told of a jump, in order that the time of the jump can be
    # differentiated: the vector field has no derivative there, but the step that ends
    # at the jump has.
    def loss(adjoint, s, is_told=True):
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        if is_told:
            controller = diffrax.ClipStepSizeController(controller, jump_ts=s[None])
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, s: jnp.where(t < s, 1.0, -2.0) * jnp.ones(2)),
            RK,
            0.0,
            1.0,
            0.1,
            Y0,
            s,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(sol.ys)

    # Two components, each with y(1) = s - 2 (1 - s).
    s = jnp.array(0.37)
    value, grad = jax.jit(jax.value_and_grad(ft.partial(loss, ADJOINT)))(s)
    assert abs(value - (jnp.sum(Y0) + 2 * (3 * s - 2))) < 1e-8
    assert abs(grad - 6) < 1e-8
    # Without being told, none.
    for adjoint in (ADJOINT, diffrax.RecursiveCheckpointAdjoint()):
        assert jax.jit(jax.grad(ft.partial(loss, adjoint, is_told=False)))(s) == 0


# Where the input is switched, and by how much.
SWITCHED = jnp.array([0.21, 0.5, 0.83])
AMOUNTS = jnp.array([1.0, -0.7, 0.4])


def _switched(adjoint, times, solver, told, later, sign, **kwargs):
    """`y' = -y + u(t)`. Either of the two values of `u` may be that at the jump."""

    def field(t, y, times):
        # As a function of `sign * t`.
        t, times = sign * t, sign * times
        is_on = (t >= times) if later else (t > times)
        return sign * (
            -y + jnp.sum(jnp.where(is_on, AMOUNTS, 0)) * (1 + jnp.sin(3 * t))
        )

    pid = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    controller = diffrax.ClipStepSizeController(pid, **{told: times})
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        0.0,
        sign,
        None,
        1.0,
        times,
        stepsize_controller=controller,
        adjoint=adjoint,
        **{"max_steps": 1024, **kwargs},
    )


def _of_switched(t):
    """The derivative of the solution at `t`, with respect to each time."""
    u = AMOUNTS * (1 + jnp.sin(3 * SWITCHED))
    return jnp.where(SWITCHED < t, -u * jnp.exp(SWITCHED - t), 0)


TSIT5 = dfxr.UReversible(diffrax.Tsit5())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("told", ["step_ts", "jump_ts"])
@pytest.mark.parametrize("later", [True, False], ids=["later", "earlier"])
@pytest.mark.parametrize("solver", [TSIT5, RK, HEUN], ids=["Tsit5", "Heun", "RevHeun"])
def test_switched(solver, later, told, sign):
    # With `step_ts` one of the two steps next to a jump has stages on its far side:
    # whichever that is, and whatever their weight, which is 2.3, 0.1 or 0.5 here. (Not
    # a comparison of adjoints: that of diffrax differentiates the step size controller
    # on its way to the jump, and is off by much more than this, or beyond all bounds.)
    def loss(times):
        return _switched(ADJOINT, times, solver, told, later, sign).ys[-1]

    grad = jax.jit(jax.grad(loss))(sign * SWITCHED)
    assert relative_difference(sign * grad, _of_switched(1.0)) < 3e-3


def test_switched_is_saved():
    # Not at the end of the solve; in a batch, and with more steps than are recorded.
    ts = jnp.array([0.3, 0.55, 0.7])

    def loss(weights, times):
        saveat = diffrax.SaveAt(ts=ts)
        sol = _switched(
            ADJOINT, times, TSIT5, "step_ts", True, 1.0, saveat=saveat, max_steps=None
        )
        return jnp.sum(weights * sol.ys)

    grads = jax.jit(jax.vmap(jax.grad(loss, argnums=1), (0, None)))(
        jnp.eye(3), SWITCHED
    )
    assert relative_difference(grads, jax.vmap(_of_switched)(ts)) < 3e-3


def test_as_other_adjoints():
    # A single jump, with a tolerance at which they do agree.
    def loss(adjoint, s):
        pid = diffrax.PIDController(rtol=1e-6, atol=1e-6)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, s: -y + jnp.where(t < s, 0.0, 1.0)),
            TSIT5,
            0.0,
            1.0,
            None,
            1.0,
            s,
            stepsize_controller=diffrax.ClipStepSizeController(pid, step_ts=s[None]),
            adjoint=adjoint,
            max_steps=256,
        )
        return sol.ys[-1]

    s = jnp.array(0.5)
    for adjoint in (ADJOINT, diffrax.RecursiveCheckpointAdjoint()):
        grad = jax.jit(jax.grad(ft.partial(loss, adjoint)))(s)
        assert abs(grad + jnp.exp(-0.5)) < 1e-4


@pytest.mark.parametrize("threshold", [2.0, 0.5 + 1e-7])
def test_event_after_a_jump(threshold):
    # Far from it, or in the step that starts there, whose end moves along.
    def loss(s):
        pid = diffrax.PIDController(rtol=1e-5, atol=1e-5)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, s: jnp.where(t < s, 1.0, 3.0)),
            TSIT5,
            0.0,
            5.0,
            None,
            0.0,
            s,
            stepsize_controller=diffrax.ClipStepSizeController(pid, step_ts=s[None]),
            event=diffrax.Event(
                lambda t, y, args, **kwargs: y - threshold, optx.Newton(1e-10, 1e-10)
            ),
            adjoint=ADJOINT,
            max_steps=256,
        )
        return sol.ts[-1]

    # At `s + (threshold - s) / 3`.
    assert abs(jax.jit(jax.grad(loss))(jnp.array(0.5)) - 2 / 3) < 1e-6


@pytest.mark.long
def test_nested_clip():
    # Controllers in a controller, each with times of its own.
    def loss(adjoint, params):
        t1, steps, jumps = params
        inner = diffrax.ClipStepSizeController(PID, step_ts=steps, jump_ts=jumps[:1])
        outer = diffrax.ClipStepSizeController(
            inner, jump_ts=jumps[1:], store_rejected_steps=4
        )
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            RK,
            0.0,
            t1,
            None,
            Y0,
            SLOPES,
            stepsize_controller=outer,
            saveat=diffrax.SaveAt(t1=True, ts=[0.1, 0.7]),
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys)

    # The solution does not depend on where these are; nor is it ever told.
    params = (jnp.array(1.0), jnp.array([0.3, 0.8]), jnp.array([0.4, 0.6]))
    value, grad = jax.jit(jax.value_and_grad(ft.partial(loss, ADJOINT)))(params)
    ys = jax.vmap(lambda t: ramp_exact(0.0, t, Y0, SLOPES))(jnp.array([0.1, 0.7, 1.0]))
    assert abs(value - weighted_sum(ys)) < TOL
    assert all(jnp.all(jnp.abs(x) < TOL) for x in grad[1:])
    assert grad[0] != 0


@pytest.mark.parametrize("dt0", ["constant", "pid"])
def test_first_step(dt0):
    # `dt0` is accepted. In an exact solve it does not matter.
    controller = diffrax.ConstantStepSize() if dt0 == "constant" else PID

    def loss(dt0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(ramp),
            RK,
            0.0,
            1.0,
            dt0,
            Y0,
            SLOPES,
            stepsize_controller=controller,
            adjoint=ADJOINT,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys)

    assert abs(jax.jit(jax.grad(loss))(jnp.array(0.13))) < TOL


def test_ends_of_a_control():
    # The ends of a path are times too, and these of the solve are taken from it.
    def loss(adjoint, params):
        ts, xs = params
        path = diffrax.LinearInterpolation(ts, xs)
        term = diffrax.ControlTerm(lambda t, y, args: jnp.outer(jnp.cos(y), y), path)
        sol = diffrax.diffeqsolve(
            term,
            RK,
            path.t0,
            path.t1,
            None,
            Y0 + 1,
            stepsize_controller=diffrax.StepTo(ts),
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys)

    ts = jnp.array([0.0, 0.3, 0.5, 0.9])
    xs = jnp.array([[0.0, 0.1], [0.5, 0.3], [0.2, 0.8], [0.9, 0.2]])
    agree(loss, (ts, xs))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name):
    # The steps inside are told to the controller, so that nothing is held fixed.
    case = SOLVERS[name]

    def field(t, y, args):
        return jnp.tanh(args * y[::-1]) * (1 + 0.3 * jnp.sin(2 * t))

    term = diffrax.ODETerm(field)

    def loss(adjoint, params):
        y0, w, times, ts = params
        sol = diffrax.diffeqsolve(
            from_term(case, term),
            case.solver,
            times[0],
            times[-1],
            None,
            (y0, y0[::-1]) if case.pair else y0,
            w,
            stepsize_controller=diffrax.StepTo(times),
            saveat=diffrax.SaveAt(t1=True, ts=ts),
            adjoint=adjoint,
            max_steps=8,
        )
        return weighted_sum(sol.ys)

    times = jnp.array([0.2, 0.35, 0.6, 1.0, 1.3])
    _, grad = agree(loss, (Y0 + 1, jnp.array(0.7), times, jnp.array([0.5, 1.1])))
    assert all(jnp.all(x != 0) for x in jtu.tree_leaves(grad))


@pytest.mark.long
@pytest.mark.parametrize("is_constant", [True, False])
@pytest.mark.one_in(1)
def test_slope_at_the_end(is_constant):
    # It is a function of the last time, and of what `y` is there.
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    if is_constant:
        controller = diffrax.ConstantStepSize()

    def loss(times, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(decay),
            diffrax.Tsit5(),
            times[0],
            times[1],
            0.01,
            Y0 + 1,
            W,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=256,
        )
        return weighted_sum(sol.solver_state[1])

    times = jnp.array([0.2, 1.3])
    ours, expected = [
        jax.jit(jax.grad(ft.partial(loss, adjoint=adjoint)))(times)
        for adjoint in (ADJOINT, diffrax.RecursiveCheckpointAdjoint())
    ]
    # (The steps that a controller chose are constants for us.)
    assert relative_difference(ours, expected) < (TOL if is_constant else 1e-6)


def test_times_of_another_dtype():
    # (Promotion is strict in the tests.)
    controller = diffrax.ClipStepSizeController(
        PID, step_ts=jnp.array([1]), jump_ts=jnp.array([0.5], jnp.float32)
    )

    def loss(adjoint, params):
        sol = diffrax.diffeqsolve(
            *(diffrax.ODETerm(decay), diffrax.Heun(), 0.2, 1.3, 0.1, params, W),
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=64,
        )
        return weighted_sum(sol.ys)

    agree(loss, Y0 + 1)
