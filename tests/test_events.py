"""Solves that stop at an event stop where they do with diffrax's adjoints, and with the
same gradient."""

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
from .helpers import relative_difference
from .test_gradient import TOL, weighted_sum


RK = dfxr.UReversible(diffrax.Heun())
HEUN = diffrax.ReversibleHeun()
NEWTON = optx.Newton(1e-8, 1e-8, optx.rms_norm)
BISECTION = optx.Bisection(1e-8, 1e-8)
PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)
CONTROLLERS = {
    "constant": (diffrax.ConstantStepSize(), 0.15),
    "step_to": (diffrax.StepTo(jnp.linspace(0.0, 3.0, 17) ** 2 / 3), None),
    "pid": (PID, None),
    "clip": (
        diffrax.ClipStepSizeController(
            PID, jump_ts=[0.4], step_ts=[0.7], store_rejected_steps=4
        ),
        0.3,
    ),
}
TS = jnp.array([0.0, 0.2, 0.55, 0.9, 1.6, 2.7])


def pendulum(t, y, args):
    return jnp.stack([y[1], -args["k"] * jnp.sin(y[0])]) * (1 + 0.1 * jnp.cos(t))


# The first component falls from 1 through 0 somewhere after t = 1, and rises through it
# again after the end; the second falls from 0.
Y0 = jnp.array([1.0, 0.0])
PARAMS = (Y0, {"k": jnp.array(1.7), "label": "args"}, jnp.array(0.2))


def solve(adjoint, params, event, controller="constant", solver=RK, **kwargs):
    y0, args, _ = params
    stepsize_controller, dt0 = CONTROLLERS[controller]
    kwargs = dict(t0=0.0, t1=3.0, dt0=dt0, max_steps=64) | kwargs
    return diffrax.diffeqsolve(
        diffrax.ODETerm(pendulum),
        solver,
        y0=y0,
        args=args,
        stepsize_controller=stepsize_controller,
        event=event,
        adjoint=adjoint,
        **kwargs,
    )


#
# Conditions. All of them close over the level, which is differentiated.
#


def below(level, t, y, args, **kwargs):
    return y[0] < level


def crosses(level, t, y, args, **kwargs):
    return (y[0] - level) * (1 + t) * args["k"]


def late(level, t, y, args, **kwargs):
    return t > 2 + level


def never(level, t, y, args, **kwargs):
    return y[0] + 5 + level


EVENTS = {
    "boolean": lambda c: diffrax.Event(ft.partial(below, c)),
    "boolean-newton": lambda c: diffrax.Event(ft.partial(below, c), NEWTON),
    "real": lambda c: diffrax.Event(ft.partial(crosses, c)),
    "real-newton": lambda c: diffrax.Event(ft.partial(crosses, c), NEWTON),
    "real-bisection": lambda c: diffrax.Event(ft.partial(crosses, c), BISECTION),
    "falling": lambda c: diffrax.Event(ft.partial(crosses, c), NEWTON, False),
    # Does not happen, as it only ever falls.
    "rising": lambda c: diffrax.Event(ft.partial(crosses, c), NEWTON, True),
    "several": lambda c: diffrax.Event(
        {
            "a": [ft.partial(late, c), ft.partial(never, c)],
            "b": ft.partial(crosses, c),
        },
        NEWTON,
        {"a": [None, True], "b": False},
    ),
    "several-boolean-first": lambda c: diffrax.Event(
        (ft.partial(never, c), ft.partial(below, c), ft.partial(crosses, 0 * c)),
        NEWTON,
    ),
}

SAVE_ATS = {
    "t1": diffrax.SaveAt(t1=True),
    "t0": diffrax.SaveAt(t0=True),
    "ts": diffrax.SaveAt(ts=TS),
    "ts-t1": diffrax.SaveAt(t0=True, t1=True, ts=TS),
    "steps": diffrax.SaveAt(steps=True, t1=True, ts=TS),
    "every-third": diffrax.SaveAt(steps=3, t1=True),
    "dense": diffrax.SaveAt(dense=True, t1=True),
    "fn": diffrax.SaveAt(
        t1=True, ts=TS, fn=lambda t, y, args: {"q": y**2 * args["k"] * t, "t": t}
    ),
    "subs": diffrax.SaveAt(
        subs=[
            diffrax.SubSaveAt(steps=2, fn=lambda t, y, args: jnp.sum(y) * t),
            None,
            {"x": diffrax.SubSaveAt(t1=True), "y": diffrax.SubSaveAt(ts=TS)},
        ]
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "event,controller,save_at,solver,happens",
    [
        ("boolean", "constant", "ts-t1", RK, True),
        ("boolean", "clip", "dense", RK, True),
        ("boolean-newton", "pid", "steps", RK, True),
        ("boolean-newton", "step_to", "subs", HEUN, True),
        ("real", "pid", "every-third", HEUN, True),
        ("real", "step_to", "fn", RK, True),
        ("real-newton", "constant", "subs", RK, True),
        ("real-newton", "pid", "dense", RK, True),
        ("real-newton", "clip", "fn", HEUN, True),
        ("real-bisection", "constant", "steps", HEUN, True),
        ("real-bisection", "pid", "ts", RK, True),
        ("falling", "clip", "every-third", RK, True),
        ("falling", "constant", "t1", diffrax.LeapfrogMidpoint(), True),
        ("rising", "pid", "ts-t1", RK, False),
        ("rising", "constant", "dense", HEUN, False),
        ("several", "pid", "fn", RK, True),
        ("several-boolean-first", "constant", "steps", RK, True),
    ],
)
def test_event(event, controller, save_at, solver, happens):
    def run(adjoint, params):
        return solve(
            adjoint,
            params,
            EVENTS[event](params[2]),
            controller,
            solver,
            saveat=SAVE_ATS[save_at],
        )

    sol = eqx.filter_jit(run)(ADJOINT, PARAMS)
    mask = [bool(x) for x in jtu.tree_leaves(sol.event_mask)]
    assert sum(mask) == happens
    assert (sol.result == diffrax.RESULTS.event_occurred) == happens
    _, grad = agree(lambda adjoint, params: everything(run(adjoint, params)), PARAMS)
    # The level matters if there is a root to be found, and only then.
    root = event in ("real-newton", "real-bisection", "falling", "several")
    assert (grad[2] != 0) == (root and save_at != "ts")


def test_which_event():
    sol = solve(ADJOINT, PARAMS, EVENTS["several"](PARAMS[2]), "pid")
    assert sol.event_mask["b"] and not any(sol.event_mask["a"])
    y = sol.ys[0]
    assert abs(y[0] - PARAMS[2]) < 1e-6


def test_nothing_to_differentiate_at_the_event():
    # Saved at the start only: the gradient does not pass through the loop at all.
    def loss(adjoint, params):
        event = EVENTS["real-newton"](params[2])
        sol = solve(adjoint, params, event, saveat=SAVE_ATS["t0"])
        return weighted_sum(sol.ys)

    grad = jax.jit(jax.grad(lambda y0: loss(ADJOINT, (y0, *PARAMS[1:]))))(Y0)
    expected = jax.grad(lambda y0: weighted_sum(y0[None]))(Y0)
    assert relative_difference(grad, expected) < TOL


@pytest.mark.long
@pytest.mark.parametrize("root_finder", [None, NEWTON], ids=["end", "root"])
@pytest.mark.parametrize("save_at", ["ts-t1", "dense"])
def test_no_event_is_no_difference(root_finder, save_at):
    def loss(event, y0):
        params = (y0, *PARAMS[1:])
        sol = solve(ADJOINT, params, event, "pid", saveat=SAVE_ATS[save_at])
        return everything(sol)

    event = diffrax.Event(ft.partial(never, 0.0), root_finder)
    with_event = jax.jit(jax.value_and_grad(ft.partial(loss, event)))(Y0)
    without = jax.jit(jax.value_and_grad(ft.partial(loss, None)))(Y0)
    assert relative_difference(with_event, without) < TOL


@pytest.mark.parametrize("root_finder", [None, NEWTON], ids=["end", "root"])
@pytest.mark.parametrize("solver", [RK, HEUN], ids=["UReversible", "ReversibleHeun"])
def test_before_the_first_step(solver, root_finder):
    # True at the start, so that no step is made.
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0] > 0.5, root_finder)

    @eqx.filter_jit
    def run(y0):
        params = (y0, *PARAMS[1:])
        return solve(
            ADJOINT,
            params,
            event,
            "constant",
            solver,
            saveat=diffrax.SaveAt(t0=True, t1=True, ts=TS),
        )

    sol = run(Y0)
    assert sol.stats["num_steps"] == 0
    assert sol.result == diffrax.RESULTS.event_occurred
    finite = jnp.isfinite(sol.ys[:, 0])
    assert jnp.sum(finite) == 2
    assert jnp.array_equal(sol.ys[finite], jnp.stack([Y0, Y0]))

    # Of what is at the start and at the end, which is the same.
    loss = lambda y0: jnp.sum(jnp.where(jnp.isfinite(ys := run(y0).ys), ys, 0))
    assert jnp.array_equal(jax.jit(jax.grad(loss))(Y0), jnp.array([2.0, 2.0]))


@pytest.mark.long
@pytest.mark.parametrize("controller", ["constant", "pid"])
def test_in_the_first_step(controller):
    def loss(adjoint, params):
        event = EVENTS["real-newton"](params[2])
        sol = solve(adjoint, params, event, controller, saveat=SAVE_ATS["fn"])
        return everything(sol)

    # Where it is after the first 0.01 or so.
    level = jnp.array(1.0 - 1e-6)
    sol = solve(ADJOINT, PARAMS, EVENTS["real-newton"](level), controller)
    assert sol.stats["num_accepted_steps"] == 1
    agree(loss, (Y0, PARAMS[1], level))


#
# Against closed forms
#


GRAVITY = 8.0
BALL = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -args]))
LANDS = lambda t, y, args, **kwargs: y[0]


@pytest.mark.long
@pytest.mark.parametrize("t1", [5.0, jnp.inf], ids=["finite", "infinite"])
@pytest.mark.parametrize("controller", ["constant", "pid"])
def test_falling_ball(t1, controller):
    # A method of second order makes no error here, and neither does its interpolation.
    def landing(adjoint, height, gravity, t0):
        stepsize_controller, _ = CONTROLLERS[controller]
        sol = diffrax.diffeqsolve(
            BALL,
            RK,
            t0,
            t1,
            0.1,
            jnp.stack([height, jnp.zeros_like(height)]),
            gravity,
            stepsize_controller=stepsize_controller,
            event=diffrax.Event(LANDS, optx.Newton(1e-11, 1e-11), False),
            adjoint=adjoint,
            max_steps=64,
        )
        return sol.ts[0], sol.ys[0, 1]

    height, gravity = jnp.array(3.0), jnp.array(GRAVITY)
    fn = ft.partial(landing, ADJOINT)
    t0 = jnp.array(0.5)
    time, speed = jax.jit(fn)(height, gravity, t0)
    exact = jnp.sqrt(2 * height / gravity)
    assert abs(time - (t0 + exact)) < 1e-9
    assert abs(speed + gravity * exact) < 1e-8
    # Both from one solve, as a Jacobian.
    jac = jax.jit(jax.jacrev(fn, argnums=(0, 1)))(height, gravity, t0)
    expected = (
        (exact / (2 * height), -exact / (2 * gravity)),
        (-gravity * exact / (2 * height), -exact / 2),
    )
    assert relative_difference(jac, expected) < 1e-8


@pytest.mark.parametrize("controller", ["constant", "pid"])
def test_start_and_event_time(controller):
    # What starts later ends later, by the same.
    def time(t0):
        stepsize_controller, _ = CONTROLLERS[controller]
        sol = diffrax.diffeqsolve(
            BALL,
            RK,
            t0,
            5.0,
            0.1,
            jnp.array([3.0, 0.0]),
            jnp.array(GRAVITY),
            stepsize_controller=stepsize_controller,
            event=diffrax.Event(LANDS, optx.Newton(1e-11, 1e-11)),
            adjoint=ADJOINT,
            max_steps=64,
        )
        return sol.ts[0]

    assert abs(jax.jit(jax.grad(time))(jnp.array(0.5)) - 1) < 1e-8


@pytest.mark.long
def test_bouncing_ball():
    # Solves one after another, each from where the one before has ended: its event
    # time is the next `t0`, and is differentiated.
    def position(adjoint, height):
        def bounce(carry, _):
            t, y = carry
            sol = diffrax.diffeqsolve(
                BALL,
                RK,
                t,
                t + 4.0,
                0.1,
                y,
                jnp.array(GRAVITY),
                event=diffrax.Event(LANDS, optx.Newton(1e-11, 1e-11), False),
                adjoint=adjoint,
                max_steps=64,
            )
            y = jnp.stack([jnp.zeros_like(t), -0.8 * sol.ys[0, 1]])
            return (sol.ts[0], y), sol.ts[0]

        y0 = jnp.stack([height, jnp.zeros_like(height)])
        (_, y), times = jax.lax.scan(bounce, (jnp.array(0.0), y0), length=3)
        return times[-1], y[1]

    height = jnp.array(2.0)
    time, speed = jax.jit(jax.jacrev(ft.partial(position, ADJOINT)))(height)
    # First it falls, then it goes up and down twice, at 0.8 of the speed.
    first = jnp.sqrt(2 * height / GRAVITY)
    exact = first * (1 + 2 * 0.8 + 2 * 0.8**2)
    assert abs(time - exact / (2 * height)) < 1e-8
    assert abs(speed - 0.8**3 * GRAVITY * first / (2 * height)) < 1e-7


#
# What a condition may look at
#


@pytest.mark.long
def test_condition_reads_the_vector_field():
    # Stops where the first component is largest; the terms are handed to the condition
    # by diffrax, and so it depends on all that they hold.
    def loss(adjoint, params):
        y0, w = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.tanh(w @ y)),
            RK,
            0.0,
            4.0,
            0.2,
            y0,
            event=diffrax.Event(
                lambda t, y, args, *, terms, **kwargs: terms.vf(t, y, args)[0], NEWTON
            ),
            adjoint=adjoint,
            max_steps=32,
        )
        return weighted_sum(sol.ys) + weighted_sum(sol.ts)

    w = jnp.array([[0.1, 1.0], [-1.0, -0.1]])
    _, grad = agree(loss, (jnp.array([0.3, 0.8]), w))
    assert jnp.all(grad[1] != 0)


def test_condition_gets_the_arguments_of_the_solve():
    seen = {}

    def cond_fn(t, y, args, **kwargs):
        seen.update(kwargs)
        return y[0] - kwargs["t1"] / 10

    sol = solve(ADJOINT, PARAMS, diffrax.Event(cond_fn), solver=HEUN)
    assert set(seen) == {
        "terms",
        "solver",
        "t0",
        "t1",
        "dt0",
        "saveat",
        "stepsize_controller",
        "max_steps",
    }
    assert seen["max_steps"] == 64
    assert sol.event_mask


@pytest.mark.parametrize("t1", [50.0, jnp.inf], ids=["finite", "infinite"])
def test_steady_state(t1):
    def loss(adjoint, params):
        y0, rate, level = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: rate * (level - y)),
            RK,
            0.0,
            t1,
            None,
            y0,
            stepsize_controller=PID,
            event=diffrax.Event(diffrax.steady_state_event()),
            adjoint=adjoint,
            saveat=diffrax.SaveAt(t1=True, steps=True),
            max_steps=64,
        )
        return weighted_sum(sol.ys)

    params = (jnp.array([1.0, 0.4]), jnp.array(1.3), jnp.array([0.7, -0.2]))
    agree(loss, params)


def test_steady_state_of_tolerances():
    # Those of the condition are its own, and it is a boolean: they have no gradient.
    def loss(y0, tol):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            RK,
            0.0,
            jnp.inf,
            0.1,
            y0,
            event=diffrax.Event(diffrax.steady_state_event(tol, tol, optx.rms_norm)),
            adjoint=ADJOINT,
            max_steps=64,
        )
        return jnp.sum(sol.ys)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones(2), jnp.array(0.1))
    assert jnp.all(grad[0] > 0)
    assert grad[1] == 0


@pytest.mark.long
def test_discrete_terminating_event():
    # diffrax's older interface to the same.
    event = diffrax.DiscreteTerminatingEvent(lambda state, **kwargs: state.y[0] < 0.2)

    def loss(kwargs, y0):
        return weighted_sum(solve(ADJOINT, (y0, *PARAMS[1:]), **kwargs).ys)

    new = diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0.2)
    expected = jax.jit(jax.grad(ft.partial(loss, {"event": new})))(Y0)
    kwargs = {"event": None, "discrete_terminating_event": event}
    with pytest.warns(UserWarning, match="discrete_terminating_event"):
        ours = jax.jit(jax.grad(ft.partial(loss, kwargs)))(Y0)
    assert relative_difference(ours, expected) < TOL


@pytest.mark.long
@pytest.mark.parametrize("event", ["real-newton", "boolean"])
def test_backwards_in_time(event):
    def loss(adjoint, params):
        y0, args, level = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -pendulum(t, y, args)),
            RK,
            3.0,
            0.0,
            -0.15,
            y0,
            args,
            event=diffrax.Event(
                (lambda t, y, args, **kwargs: y[0] - level)
                if event == "real-newton"
                else (lambda t, y, args, **kwargs: y[0] < level),
                NEWTON,
            ),
            saveat=diffrax.SaveAt(t1=True, steps=True, ts=3.0 - TS),
            adjoint=adjoint,
            max_steps=32,
        )
        return everything(sol)

    value, grad = agree(loss, PARAMS)
    assert (grad[2] != 0) == (event == "real-newton")


@pytest.mark.long
def test_stochastic():
    path = diffrax.VirtualBrownianTree(0.0, 3.0, 0.1, (), jax.random.key(1))

    def loss(adjoint, params):
        y0, (drift, noise), level = params
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: drift * jnp.cos(y)),
            diffrax.ControlTerm(lambda t, y, args: noise * jnp.sin(y), path),
        )
        sol = diffrax.diffeqsolve(
            terms,
            HEUN,
            0.0,
            3.0,
            0.1,
            y0,
            event=diffrax.Event(
                lambda t, y, args, **kwargs: jnp.sum(y) - level, NEWTON
            ),
            saveat=diffrax.SaveAt(t1=True, ts=TS),
            adjoint=adjoint,
            max_steps=32,
        )
        return everything(sol)

    params = (jnp.array([0.3, 0.1]), jnp.array([0.8, 0.3]), jnp.array(1.1))
    _, grad = agree(loss, params)
    assert grad[2] != 0


#
# Batches
#


# The first has its root behind it, the second stops early, the third late, the fourth
# not at all.
LEVELS = jnp.array([1.5, 0.8, -0.3, -4.0])
SIZES = jnp.array([1.0, 1.1, 0.9, 1.0])


def _batched_loss(kind, save_at, controller, adjoint, y0, k, level, size):
    def boolean(t, y, args, **kwargs):
        return y[0] < level

    def real(t, y, args, **kwargs):
        return y[0] - level

    event = {
        "boolean": diffrax.Event(boolean),
        "root": diffrax.Event(real, NEWTON),
        "both": diffrax.Event([boolean, real], NEWTON, [None, False]),
    }[kind]
    sol = solve(
        adjoint,
        (size * y0, {"k": k}, level),
        event,
        controller,
        saveat=SAVE_ATS[save_at],
    )
    return everything(sol)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind,save_at,controller",
    [
        ("boolean", "ts-t1", "pid"),
        ("root", "fn", "constant"),
        ("root", "dense", "pid"),
        ("both", "steps", "constant"),
        ("both", "subs", "clip"),
    ],
)
def test_batch_with_some_events(kind, save_at, controller):
    fn = ft.partial(_batched_loss, kind, save_at, controller)

    def total(adjoint, params):
        y0, k, level = params
        loss = jax.vmap(lambda level, size: fn(adjoint, y0, k, level, size))
        return weighted_sum(loss(level, SIZES))

    # A root that is there at the start does not count as one that is crossed.
    agree(total, (Y0, jnp.array(1.7), LEVELS))


@pytest.mark.long
def test_gradient_for_each_element():
    fn = ft.partial(_batched_loss, "root", "ts-t1", "pid")
    k = jnp.array(1.7)
    gradient = jax.grad(ft.partial(fn, ADJOINT), argnums=(0, 1, 2))
    batched = jax.jit(jax.vmap(gradient, (None, None, 0, 0)))(Y0, k, LEVELS, SIZES)
    single = jax.jit(gradient)
    for i in range(len(LEVELS)):
        expected = single(Y0, k, LEVELS[i], SIZES[i])
        assert relative_difference([x[i] for x in batched], expected) < TOL


@pytest.mark.long
def test_batched_start():
    # The start is batched and differentiated, and `y0` is an integer.
    def end(t0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -jnp.ones_like(y)),
            RK,
            t0,
            jnp.inf,
            0.4,
            2,
            event=diffrax.Event(lambda t, y, args, **kwargs: y - t, NEWTON),
            adjoint=ADJOINT,
            max_steps=16,
        )
        return sol.ts[0], sol.ys[0]

    # 2 - (t - t0) = t
    t0 = jnp.array([0.0, 0.3, 1.1])
    time, value = jax.jit(jax.vmap(end))(t0)
    assert jnp.allclose(time, 1 + t0 / 2) and jnp.allclose(value, time)
    jac = jax.jit(jax.vmap(jax.jacrev(end)))(t0)
    assert relative_difference(jac, (jnp.full(3, 0.5), jnp.full(3, 0.5))) < 1e-8


@pytest.mark.long
def test_condition_with_a_batch_inside():
    def loss(adjoint, y0):
        largest = lambda t, y, args, **kwargs: jnp.max(jax.vmap(lambda y: y - 1)(y))
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y * jnp.cos(y / 9)),
            HEUN,
            0.0,
            jnp.inf,
            0.2,
            y0,
            event=diffrax.Event(largest, NEWTON),
            adjoint=adjoint,
            max_steps=32,
        )
        return weighted_sum(sol.ys) + weighted_sum(sol.ts)

    agree(loss, jnp.array([1.5, 2.5, 2.0]))


@pytest.mark.parametrize(
    "cond_fn,message",
    [
        (lambda t, y, args, **kwargs: (y[0],), "scalar"),
        (lambda t, y, args, **kwargs: y, "scalar"),
        (lambda t, y, args, **kwargs: jnp.array(1), "boolean or a float"),
        (
            lambda t, y, args, **kwargs: jax.lax.complex(y[0], y[1]),
            "boolean or a float",
        ),
    ],
    ids=["tree", "vector", "integer", "complex"],
)
def test_wrong_conditions(cond_fn, message):
    with pytest.raises(ValueError, match=message):
        solve(ADJOINT, PARAMS, diffrax.Event(cond_fn))


@pytest.mark.long
def test_second_derivative_at_an_event():
    solver = dfxr.UReversible(diffrax.Heun(), 0.999)
    y0, tangent = jnp.array([1.0, 0.0]), jnp.array([0.7, -0.4])

    def loss(adjoint, y0):
        event = EVENTS["real-newton"](jnp.array(0.2))
        sol = solve(adjoint, (y0, *PARAMS[1:]), event, "constant", solver)
        return weighted_sum(sol.ys) + weighted_sum(sol.ts)

    def along(fn):
        return jax.jit(lambda y0: jax.jvp(fn, (y0,), (tangent,))[1])

    ours = along(jax.grad(ft.partial(loss, ADJOINT)))(y0)
    expected = along(jax.jacfwd(ft.partial(loss, diffrax.ForwardMode())))(y0)
    # The derivative of a root is taken at a root known to 1e-8.
    assert relative_difference(ours, expected) < 1e-8


@pytest.mark.parametrize("throw", [True, False])
def test_steps_run_out_before_the_event(throw):
    def loss(adjoint, params):
        event = EVENTS["real-newton"](params[2])
        sol = solve(
            adjoint,
            params,
            event,
            saveat=SAVE_ATS["ts-t1"],
            max_steps=5,
            throw=throw,
        )
        return everything(sol)

    if throw:
        fn = jax.jit(jax.grad(lambda y0: loss(ADJOINT, (y0, *PARAMS[1:]))))
        with pytest.raises(RuntimeError, match="maximum number of solver steps"):
            jax.block_until_ready(fn(Y0))
    else:
        agree(loss, PARAMS)


def test_root_finder_fails():
    # One iteration of Newton's method is not enough; the event is still there.
    event = diffrax.Event(
        lambda t, y, args, **kwargs: jnp.tanh(30 * (y[0] - 0.2)),
        optx.Newton(1e-14, 1e-14),
    )
    sol = solve(ADJOINT, PARAMS, event, throw=False)
    assert sol.event_mask
    grad = jax.jit(
        jax.grad(
            lambda y0: jnp.sum(solve(ADJOINT, (y0, *PARAMS[1:]), event, throw=False).ys)
        )
    )(Y0)
    assert jnp.all(jnp.isfinite(grad))


@pytest.mark.long
@pytest.mark.parametrize("max_steps", [1, 3])
def test_last_step_rejected(max_steps):
    # In a batch diffrax interpolates in the last step of an element without an event,
    # though it was rejected: the first of all here, with no accepted step before it.
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-8, factormin=0.9)

    def loss(throw, k, y0):
        # (With `throw` the host itself complains of the steps, after our error.)
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, k: -k * y),
            RK,
            0.0,
            2.0,
            0.01,
            y0,
            k,
            stepsize_controller=controller,
            event=diffrax.Event(lambda t, y, args, **kwargs: y - 0.5, NEWTON),
            adjoint=ADJOINT,
            max_steps=max_steps,
            throw=throw,
        )
        return jnp.sum(sol.ys)

    def gradient(throw):
        fn = jax.vmap(jax.grad(ft.partial(loss, throw)))
        ks, y0 = jnp.array([0.1, 100.0]), jnp.array([0.5001, 1.0])
        return eqx.filter_jit(fn)(ks, y0)

    assert jnp.isfinite(gradient(False)).tolist() == [True, False]
    with pytest.raises(RuntimeError, match="stops at `max_steps` with a rejected"):
        gradient(True)


@pytest.mark.long
@pytest.mark.parametrize("solver", [diffrax.Heun(), RK])
def test_events_end_no_segment_of_others(solver):
    # What an element of a batch would do after its event is no reason for the others to
    # wait: they did so forever.
    def loss(y0, adjoint):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.cos(t) + 0 * y),
            solver,
            0.0,
            2.0,
            0.1,
            y0,
            event=diffrax.Event(lambda t, y, args, **kwargs: y - 0.7),
            adjoint=adjoint,
            max_steps=20,
        )
        return sol.ys[0]

    def gradient(adjoint):
        total = lambda y0: jnp.sum(jax.vmap(lambda y0: loss(y0, adjoint))(y0))
        return jax.jit(jax.value_and_grad(total))(jnp.linspace(-0.5, 0.7, 8))

    ours = gradient(dfxr.ReversibleAdjoint(checkpoints=4))
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    assert relative_difference(ours, expected) < 100 * jnp.finfo(float).eps
