"""The gradient is that of the discretised solve.

Every comparison is between two adjoints of the *same* solver at a coarse step, where
agreement can only come from algebra.
"""

import functools as ft

import diffrax
import equinox as eqx
import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr

from .helpers import (
    CouplingLeapfrog,
    flatten,
    GenericLeapfrog,
    GenericUReversible,
    make_args,
    make_terms,
    make_y,
    random_like,
    relative_difference,
    SOLVERS,
)


# The rounding of about ten coarse steps, there and back, amplified by what they do:
# some 1e-13. What is asked for is 1e-9.
TOL = 1e-10
MAX_STEPS = 64
TS = jnp.array([0.0, 0.17, 0.3, 0.3, 0.71, 1.0])

CONTROLLERS = {
    "constant": lambda sign: (diffrax.ConstantStepSize(), 0.1),
    "step_to": lambda sign: (
        diffrax.StepTo(sign * jnp.array([0.0, 0.05, 0.2, 0.3, 0.55, 0.6, 1.0])),
        None,
    ),
    "pid": lambda sign: (diffrax.PIDController(rtol=1e-2, atol=1e-2), 0.3),
    "clip": lambda sign: (
        diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-2, atol=1e-2),
            step_ts=sign * jnp.array([0.31]),
            jump_ts=sign * jnp.array([0.5, 0.9]),
            store_rejected_steps=10,
        ),
        0.3,
    ),
}

SAVEATS = {
    "t1": lambda ts: diffrax.SaveAt(t1=True),
    "mixed": lambda ts: diffrax.SaveAt(t0=True, t1=True, ts=ts),
    "fn": lambda ts: diffrax.SaveAt(
        ts=ts, fn=lambda t, y, args: (jnp.sum(y) * args["scale"] * jnp.cos(t), y**2)
    ),
    "steps": lambda ts: diffrax.SaveAt(
        t0=True, steps=True, ts=ts, fn=lambda t, y, args: y**2 * args["scale"] * t
    ),
    "subs": lambda ts: diffrax.SaveAt(
        subs={
            "a": diffrax.SubSaveAt(steps=3, t1=True, fn=lambda t, y, args: y**2),
            "b": [None, diffrax.SubSaveAt(ts=ts)],
        }
    ),
    "dense": lambda ts: diffrax.SaveAt(dense=True, ts=ts),
}


def weighted_sum(tree):
    """A smooth loss that tells all elements apart, and leaves out those not saved."""
    total = 0.0
    for i, x in enumerate(jtu.tree_leaves(tree)):
        x = jnp.where(jnp.isfinite(x), x, 0)
        weights = jnp.sin(1.0 + i + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        total = total + jnp.sum(weights * jnp.sin(x))
    return total


def solve_loss(adjoint, solver, terms, y0, args, controller, saveat, sign=1.0):
    stepsize_controller, dt0 = CONTROLLERS[controller](sign)
    sign = jnp.asarray(sign)
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        sign * 1.0,
        None if dt0 is None else sign * dt0,
        y0,
        args,
        saveat=SAVEATS[saveat](sign * TS.astype(jnp.result_type(sign))),
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=MAX_STEPS,
    )
    loss = weighted_sum(sol.ys)
    if sol.interpolation is not None:
        ts = sign * jnp.linspace(0, 1, 7)
        loss = loss + weighted_sum(jax.vmap(sol.evaluate)(ts))
        loss = loss + weighted_sum(jax.vmap(sol.derivative)(ts[1:-1]))
    return loss


def _parameters(name, kind, structure, dtype, seed):
    case = SOLVERS[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    terms = make_terms(case, kind, structure, dtype, keys[0])
    y0 = random_like(make_y(case, structure, dtype), keys[1])
    return terms, y0, make_args(keys[2], dtype)


@ft.cache
def compiled_gradient(adjoint, name, controller, saveat, kind, structure, dtype):
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def gradient(params, sign):
        terms, y0, args = params
        solver = SOLVERS[name].solver
        return solve_loss(adjoint, solver, terms, y0, args, controller, saveat, sign)

    def run(seed, sign):
        params = _parameters(name, kind, structure, dtype, seed)
        return gradient(params, jnp.array(sign, dtype))

    return run


@ft.cache
def compiled_derivative(name, controller, saveat, kind, structure, dtype):
    """In a direction, by forward mode: compiles in half the time of a reverse mode."""

    @eqx.filter_jit
    def derivative(params, tangent, sign):
        def loss(params):
            terms, y0, args = params
            solver, adjoint = SOLVERS[name].solver, diffrax.ForwardMode()
            return solve_loss(
                adjoint, solver, terms, y0, args, controller, saveat, sign
            )

        return eqx.filter_jvp(loss, (params,), (tangent,))

    def run(seed, tangent, sign):
        params = _parameters(name, kind, structure, dtype, seed)
        return derivative(params, tangent, jnp.array(sign, dtype))

    return run


def agree(name, controller, saveat, kind, structure, seed, sign):
    arguments = (name, controller, saveat, kind, structure, jnp.float64)
    ours = compiled_gradient(dfxr.ReversibleAdjoint(), *arguments)(seed, sign)
    value, grad = ours
    assert np.count_nonzero(flatten(grad)) > 0.5 * flatten(grad).size
    # In the direction of random signs, so that nothing is left out.
    rng = np.random.default_rng(seed)
    tangent = jtu.tree_map(
        lambda g: jnp.asarray(rng.choice([-1.0, 1.0], g.shape), g.dtype), grad
    )
    expected = compiled_derivative(*arguments)(seed, tangent, sign)
    # Along a rough path with adaptive steps, rounding may decide on the coupling, which
    # changes the solution by less than its error: the tolerance is 1e-2.
    tol = 1e-6 if (controller, kind) == ("pid", "sde") else TOL
    assert abs(value - expected[0]) <= tol * abs(expected[0])
    grad, tangent = flatten(grad), flatten(tangent)
    assert abs(np.dot(grad, tangent) - expected[1]) <= tol * np.sum(np.abs(grad))


# Every solver, and every controller and every kind of term with one of each family. All
# of their combinations are in `test_exhaustive`.
GRID = [
    ("UReversible-Heun", "step_to", "cde"),
    ("UReversible-Heun", "pid", "sde"),
    ("UReversible-Heun", "clip", "ode"),
    ("UReversible-Heun-0.999", "constant", "sde"),
    ("UReversible-Ralston-0.5", "pid", "cde"),
    ("UReversible-Bosh3-1", "pid", "ode"),
    ("UReversible-ShARK", "pid", "sde"),
    ("UReversible-SPaRK-0.999", "constant", "sde"),
    ("ReversibleHeun-sync", "pid", "ode"),
    ("LeapfrogMidpoint-sync", "constant", "ode"),
    ("ReversibleHeun", "constant", "sde"),
    ("ReversibleHeun", "pid", "cde"),
    ("ReversibleHeun", "clip", "ode"),
    ("LeapfrogMidpoint", "step_to", "cde"),
    ("SemiImplicitEuler", "constant", "sde"),
    ("AsynchronousLeapfrog", "pid", "cde"),
    ("StormerVerlet", "step_to", "cde"),
    ("user-generic", "step_to", "ode"),
    ("user-coupling", "constant", "ode"),
    ("Tsit5", "clip", "ode"),
    ("Tsit5", "pid", "cde"),
    ("Heun", "constant", "sde"),
    ("Euler", "step_to", "cde"),
    ("HalfSolver", "pid", "ode"),
    ("EulerHeun", "constant", "sde"),
    ("SEA", "step_to", "sde"),
    ("Kvaerno3", "pid", "ode"),
    ("ImplicitEuler", "constant", "ode"),
    ("user-multistep", "constant", "ode"),
]


def _exhaustive():
    for name, case in SOLVERS.items():
        controllers = CONTROLLERS if case.adaptive else ["constant", "step_to"]
        for controller in controllers:
            for kind in ("ode", *case.controls):
                for saveat in SAVEATS:
                    if not (saveat == "fn" and case.pair):
                        yield name, controller, saveat, kind


def _check(name, controller, saveat, kind, seed, sign):
    structure = "pytree" if kind == "ode" and saveat == "mixed" else "vector"
    agree(name, controller, saveat, kind, structure, seed, sign)


SEED = st.integers(0, 2**31 - 1)
SIGN = st.sampled_from([1.0, -1.0])


def test_grid_has_every_solver():
    assert {name for name, _, _ in GRID} == set(SOLVERS)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*not marked as converging.*:UserWarning")
@pytest.mark.parametrize("name,controller,saveat,kind", list(_exhaustive()))
@hyp.settings(max_examples=2)
@hyp.given(seed=SEED, sign=SIGN)
def test_exhaustive(name, controller, saveat, kind, seed, sign):
    _check(name, controller, saveat, kind, seed, sign)


@pytest.mark.filterwarnings("ignore:.*not marked as converging.*:UserWarning")
@pytest.mark.parametrize("name,controller,kind", GRID)
@hyp.settings(max_examples=4)
@hyp.given(seed=SEED, sign=SIGN)
def test_solver_controller_term(name, controller, kind, seed, sign):
    _check(name, controller, "mixed", kind, seed, sign)


@pytest.mark.long
@pytest.mark.parametrize(
    "name,controller,saveat",
    [
        ("UReversible-Heun", "clip", "fn"),
        ("UReversible-Heun", "pid", "steps"),
        ("UReversible-Heun", "constant", "subs"),
        ("UReversible-Heun", "pid", "dense"),
        ("ReversibleHeun", "pid", "subs"),
        ("StormerVerlet", "constant", "dense"),
        ("user-generic", "step_to", "fn"),
        ("Tsit5", "pid", "fn"),
        ("Tsit5", "clip", "steps"),
        ("Tsit5", "pid", "dense"),
        ("Kvaerno3", "pid", "subs"),
    ],
)
@hyp.settings(max_examples=3)
@hyp.given(seed=SEED, sign=SIGN)
def test_save_at(name, controller, saveat, seed, sign):
    _check(name, controller, saveat, "ode", seed, sign)


@pytest.mark.parametrize("name", ["UReversible-Heun"])
def test_float32(name):
    arguments = (name, "constant", "mixed", "ode", "scalar", jnp.float32)
    ours = compiled_gradient(dfxr.ReversibleAdjoint(), *arguments)(0, 1.0)
    reference = compiled_gradient(diffrax.DirectAdjoint(), *arguments)(0, 1.0)
    assert all(
        x.dtype == jnp.float32
        for x in jtu.tree_leaves(eqx.filter(ours, eqx.is_inexact_array))
    )
    # Ten steps, of some tens of roundings each.
    tol = 500 * jnp.finfo(jnp.float32).eps * SOLVERS[name].amplification ** 10
    assert relative_difference(ours, reference) < tol


def _linear_problem():
    w = jax.random.normal(jax.random.key(0), (3, 3))
    return w, jnp.array([1.0, 0.5, -0.2])


@pytest.mark.long
def test_user_solvers_agree():
    # The same method by both routes, and `UReversible` written out with diffrax's Heun.
    def gradient(solver):
        @jax.jit
        @jax.grad
        def run(params):
            w, y0 = params
            term = diffrax.ODETerm(lambda t, y, args: jnp.tanh(w @ y) * jnp.cos(t))
            adjoint = dfxr.ReversibleAdjoint()
            return solve_loss(
                adjoint, solver, term, y0, {"scale": 1.0}, "step_to", "t1"
            )

        return run(_linear_problem())

    pairs = [
        (GenericLeapfrog(), CouplingLeapfrog()),
        (GenericUReversible(), dfxr.UReversible(diffrax.Heun(), 0.9)),
    ]
    for generic, coupling in pairs:
        assert relative_difference(gradient(generic), gradient(coupling)) < TOL


@pytest.mark.parametrize("name", ["UReversible-Heun-0.999", "SemiImplicitEuler"])
def test_finite_differences(name):
    case = SOLVERS[name]
    keys = jax.random.split(jax.random.key(1), 4)
    terms = make_terms(case, "ode", "vector", jnp.float64, keys[0])
    y0 = random_like(make_y(case, "vector", jnp.float64), keys[1])
    params = (terms, y0, make_args(keys[2], jnp.float64))
    diff, static = eqx.partition(params, eqx.is_inexact_array)
    direction = random_like(diff, keys[3])

    @jax.jit
    def loss(diff):
        terms, y0, args = eqx.combine(diff, static)
        adjoint = dfxr.ReversibleAdjoint()
        return solve_loss(adjoint, case.solver, terms, y0, args, "constant", "mixed")

    grad = jax.jit(jax.grad(loss))(diff)
    h = 1e-6
    shifted = lambda s: jtu.tree_map(lambda x, d: x + s * h * d, diff, direction)
    numerical = (loss(shifted(1)) - loss(shifted(-1))) / (2 * h)
    dots = jtu.tree_map(lambda g, d: jnp.sum(g * d), grad, direction)
    exact = sum(jtu.tree_leaves(dots))
    # Truncation h^2 and rounding eps / h, both of order 1e-10, times the third
    # derivative.
    assert abs(numerical - exact) < 1e-7 * abs(exact)


@pytest.mark.parametrize("name", ["UReversible-Heun", "ReversibleHeun"])
def test_closed_over(name):
    # Values that the user's functions close over get the same gradient as when they are
    # passed as `args`.
    w, y0 = _linear_problem()
    solver = SOLVERS[name].solver
    xs = jax.random.normal(jax.random.key(1), (9, 3))

    def loss(adjoint, params):
        w, y0, xs, scale = params
        path = diffrax.LinearInterpolation(jnp.linspace(-2.0, 2.0, 9), xs)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: jnp.tanh(w @ y)),
            diffrax.ControlTerm(
                lambda t, y, args: jnp.outer(jnp.cos(y), scale * y),
                lambda t0, t1: path.evaluate(t0, t1),
            ),
        )
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            0.1,
            y0,
            saveat=diffrax.SaveAt(ts=TS, fn=lambda t, y, args: y * scale),
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        return weighted_sum(sol.ys)

    params = (w, y0, xs, jnp.array([0.3, 0.2, 0.1]))
    ours = jax.jit(jax.grad(ft.partial(loss, dfxr.ReversibleAdjoint())))(params)
    reference = jax.jit(jax.grad(ft.partial(loss, diffrax.DirectAdjoint())))(params)
    assert relative_difference(ours, reference) < TOL
    assert all(np.any(x != 0) for x in ours)


@pytest.mark.long
@pytest.mark.parametrize("coupling_parameter", ["auto", 0.999])
def test_differentiated_solver_state(coupling_parameter):
    # A solve resumed with a solver state given by the user, and its gradient.
    w, y0 = _linear_problem()
    solver = dfxr.UReversible(diffrax.Heun(), coupling_parameter)

    def loss(adjoint, params):
        w, y0, z0 = params
        kwargs = dict(adjoint=adjoint, max_steps=MAX_STEPS)
        term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
        if coupling_parameter == "auto":
            _, code, account = solver.init(term, 0.0, 0.1, y0, w)
            z0 = (y0 - z0, code, account)
        first = diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            0.5,
            0.1,
            y0,
            w,
            solver_state=z0,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            **kwargs,
        )
        second = diffrax.diffeqsolve(
            term,
            solver,
            0.5,
            1.0,
            0.1,
            first.ys[0],
            w,
            solver_state=first.solver_state,
            **kwargs,
        )
        return weighted_sum(second.ys)

    params = (w, y0, y0 + 0.1)
    ours = jax.jit(jax.grad(ft.partial(loss, dfxr.ReversibleAdjoint())))(params)
    reference = jax.jit(jax.grad(ft.partial(loss, diffrax.DirectAdjoint())))(params)
    assert relative_difference(ours, reference) < TOL


@pytest.mark.long
@pytest.mark.parametrize("name", ["UReversible-Heun", "ReversibleHeun"])
def test_resumed_with_other_args(name):
    # What the solver kept from the first solve is not what it would find in the second.
    w, y0 = _linear_problem()
    term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))

    def loss(adjoint, params):
        w, y0 = params
        solve = ft.partial(
            diffrax.diffeqsolve,
            term,
            SOLVERS[name].solver,
            dt0=0.1,
            adjoint=adjoint,
            max_steps=MAX_STEPS,
        )
        first = solve(
            t0=0.0,
            t1=0.5,
            y0=y0,
            args=w,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
        )
        second = solve(
            t0=0.5,
            t1=1.0,
            y0=first.ys[0],
            args=2 * w,
            solver_state=first.solver_state,
            saveat=diffrax.SaveAt(ts=[0.53, 0.57], fn=lambda t, y, w: y**3),
        )
        return weighted_sum(second.ys)

    ours = jax.jit(jax.grad(ft.partial(loss, dfxr.ReversibleAdjoint())))((w, y0))
    reference = jax.jit(jax.grad(ft.partial(loss, diffrax.DirectAdjoint())))((w, y0))
    assert relative_difference(ours, reference) < TOL


@pytest.mark.long
@pytest.mark.parametrize("host", [diffrax.ReversibleHeun(), diffrax.LeapfrogMidpoint()])
def test_host_instances(host):
    w, y0 = _linear_problem()

    def loss(adjoint, params):
        w, y0 = params
        term = diffrax.ODETerm(lambda t, y, args: jnp.tanh(w @ y))
        return solve_loss(adjoint, host, term, y0, {"scale": 1.0}, "step_to", "dense")

    ours = jax.jit(jax.grad(ft.partial(loss, dfxr.ReversibleAdjoint())))((w, y0))
    reference = jax.jit(jax.grad(ft.partial(loss, diffrax.DirectAdjoint())))((w, y0))
    assert relative_difference(ours, reference) < TOL


def test_no_steps():
    # t0 == t1: the solve is the identity.
    _, y0 = _linear_problem()

    @jax.jit
    @jax.grad
    def gradient(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: y),
            dfxr.ReversibleHeun(),
            1.0,
            1.0,
            0.1,
            y0,
            saveat=diffrax.SaveAt(t0=True, t1=True, ts=[1.0, 1.0]),
            adjoint=dfxr.ReversibleAdjoint(),
        )
        return jnp.sum(sol.ys)

    assert jnp.array_equal(gradient(y0), 4 * jnp.ones(3))


def test_unfinished():
    # The gradient of what was computed before `max_steps` was reached.
    w, y0 = _linear_problem()

    def loss(adjoint, w):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
            dfxr.UReversible(diffrax.Heun()),
            0.0,
            1.0,
            0.1,
            y0,
            w,
            saveat=diffrax.SaveAt(ts=TS, t1=True),
            adjoint=adjoint,
            max_steps=5,
            throw=False,
        )
        return weighted_sum(sol.ys)

    ours = jax.jit(jax.grad(ft.partial(loss, dfxr.ReversibleAdjoint())))(w)
    reference = jax.jit(jax.grad(ft.partial(loss, diffrax.DirectAdjoint())))(w)
    assert relative_difference(ours, reference) < TOL


@pytest.mark.long
def test_forward_over_reverse():
    w, y0 = _linear_problem()

    def gradient(adjoint):
        @jax.grad
        def run(w):
            term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
            sol = diffrax.diffeqsolve(
                term,
                dfxr.UReversible(diffrax.Heun(), 0.999),
                0.0,
                1.0,
                0.1,
                y0,
                w,
                saveat=diffrax.SaveAt(ts=TS),
                adjoint=adjoint,
                max_steps=MAX_STEPS,
            )
            return weighted_sum(sol.ys)

        return run

    tangent = jnp.ones_like(w)
    hvp = lambda adjoint: jax.jit(
        lambda w: jax.jvp(gradient(adjoint), (w,), (tangent,))[1]
    )(w)
    ours, reference = hvp(dfxr.ReversibleAdjoint()), hvp(diffrax.DirectAdjoint())
    assert relative_difference(ours, reference) < TOL
