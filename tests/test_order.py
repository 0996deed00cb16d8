"""Orders of convergence, and agreement with diffrax's own solvers."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr

from .helpers import make_args, make_terms, make_y, random_like, SOLVERS


#
# Order, for a pendulum pushed at its hinge
#


def _push(t, q):
    return -jnp.sin(q) + 0.3 * jnp.cos(2 * t)


def _pendulum(pair):
    if pair:
        terms = (
            diffrax.ODETerm(lambda t, q, args: _push(t, q)),
            diffrax.ODETerm(lambda t, p, args: p),
        )
        return terms, (jnp.array(0.2), jnp.array(1.0))

    def vector_field(t, y, args):
        p, q = y
        return _push(t, q), p

    return diffrax.ODETerm(vector_field), (jnp.array(0.2), jnp.array(1.0))


T1 = 2.0
TS = jnp.sort(jax.random.uniform(jax.random.key(0), (25,), maxval=T1))


@ft.cache
def _reference():
    terms, y0 = _pendulum(False)
    sol = diffrax.diffeqsolve(
        terms,
        diffrax.Dopri8(),
        0.0,
        T1,
        1e-3,
        y0,
        adjoint=diffrax.ForwardMode(),
        max_steps=2001,
    )
    # Each of `TS` by a solve of its own, so that no interpolation enters.
    ends = jax.jit(
        jax.vmap(
            lambda t: (
                diffrax.diffeqsolve(
                    terms, diffrax.Dopri8(), 0.0, t, t / 100, y0, max_steps=101
                ).ys
            )
        )
    )(TS)
    at_ts = jtu.tree_map(lambda x: x[:, 0], ends)
    return jtu.tree_map(lambda x: x[-1], sol.ys), at_ts


def _errors(solver, pair, num_steps):
    """Errors at the end, and largest errors at `TS`."""
    terms, y0 = _pendulum(pair)
    end, at_ts = _reference()

    @jax.jit
    def solve(dt0):
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            T1,
            dt0,
            y0,
            saveat=diffrax.SaveAt(t1=True, ts=TS),
            adjoint=dfxr.ReversibleAdjoint(),
            max_steps=max(num_steps),
        )
        return sol.ys

    def distance(x, y):
        diff = jtu.tree_map(lambda a, b: jnp.max(jnp.abs(a - b)), x, y)
        return float(max(jtu.tree_leaves(diff)))

    errors = []
    for n in num_steps:
        ys = solve(T1 / n)
        last = jtu.tree_map(lambda x: x[-1], ys)
        rest = jtu.tree_map(lambda x: x[:-1], ys)
        errors.append((distance(last, end), distance(rest, at_ts)))
    return np.array(errors)


def _slope(errors, num_steps):
    return np.log(errors[0] / errors[-1]) / np.log(num_steps[-1] / num_steps[0])


@pytest.mark.parametrize("name", [n for n in SOLVERS if "UReversible" not in n])
def test_order(name):
    case = SOLVERS[name]
    num_steps = (20, 160)
    errors = _errors(case.solver, case.pair, num_steps)
    slope = _slope(errors[:, 0], num_steps)
    terms, _ = _pendulum(case.pair)
    assert case.solver.order(terms) == case.order
    assert case.order - 0.2 < slope < case.order + 0.6


BASES = [
    (diffrax.Heun(), (20, 160)),
    (diffrax.Midpoint(), (20, 160)),
    (diffrax.Ralston(), (20, 160)),
    (diffrax.Bosh3(), (20, 160)),
    (diffrax.Tsit5(), (10, 40)),
    (diffrax.Dopri5(), (10, 40)),
    (diffrax.Dopri8(), (4, 10)),
]


@pytest.mark.parametrize("base,num_steps", BASES, ids=lambda x: type(x).__name__)
def test_order_u_reversible(base, num_steps):
    solver = dfxr.UReversible(base)
    order = base.order(None)
    assert solver.order(None) == order
    errors = _errors(solver, False, num_steps)
    # Dopri8 reaches rounding before its order shows cleanly.
    slack = 1.0 if order == 8 else 0.4
    assert _slope(errors[:, 0], num_steps) > order - slack
    # The interpolation between steps is a cubic, of order 4 in the step size.
    assert _slope(errors[:, 1], num_steps) > min(order, 4) - 0.5


def test_every_explicit_runge_kutta_solver_is_tested():
    in_diffrax = {
        x
        for x in vars(diffrax).values()
        if isinstance(x, type)
        and issubclass(x, diffrax.AbstractERK)
        and x is not diffrax.AbstractERK
    }
    assert in_diffrax == {type(base) for base, _ in BASES}


@pytest.mark.parametrize("coupling_parameter", [1.0, 0.9, "auto"])
def test_error_estimate(coupling_parameter):
    # Where `y` and `z` agree it is that of the wrapped solver.
    terms, y0 = _pendulum(False)
    for base in (diffrax.Heun(), diffrax.Tsit5(), diffrax.Dopri8()):
        solver = dfxr.UReversible(base, coupling_parameter)
        t0, t1 = jnp.array(0.0), jnp.array(0.05)
        state = solver.init(terms, t0, t1, y0, None)
        ours = solver.step(terms, t0, t1, y0, None, state, False)
        state = base.init(terms, t0, t1, y0, None)
        host = base.step(terms, t0, t1, y0, None, state, False)
        for a, b in zip(jtu.tree_leaves(ours[:2]), jtu.tree_leaves(host[:2])):
            # Tens of roundings of numbers of order one.
            assert abs(a - b) < 100 * jnp.finfo(jnp.float64).eps


#
# The same numbers as diffrax's own solvers
#

HOSTED = [
    (name, kind, controller)
    for name, case in SOLVERS.items()
    if case.host is not None
    for kind in ("ode", *case.controls)
    for controller in (["step_to", "clip"] if case.adaptive else ["step_to"])
]


@pytest.mark.filterwarnings("ignore:.*not marked as converging.*:UserWarning")
@pytest.mark.parametrize("name,kind,controller", HOSTED)
def test_same_as_host(name, kind, controller):
    from .test_gradient import CONTROLLERS

    case = SOLVERS[name]
    keys = jax.random.split(jax.random.key(3), 3)
    terms = make_terms(case, kind, "vector", jnp.float64, keys[0])
    y0 = random_like(make_y(case, "vector", jnp.float64), keys[1])
    args = make_args(keys[2], jnp.float64)
    stepsize_controller, dt0 = CONTROLLERS[controller](1.0)

    def solve(solver, adjoint):
        return diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            dt0,
            y0,
            args,
            saveat=diffrax.SaveAt(
                t0=True, steps=True, ts=jnp.linspace(0, 1, 5), solver_state=True
            ),
            stepsize_controller=stepsize_controller,
            adjoint=adjoint,
            max_steps=50,
        )

    ours = solve(case.solver, dfxr.ReversibleAdjoint())
    host = solve(case.host, diffrax.RecursiveCheckpointAdjoint())
    assert ours.stats["num_steps"] == host.stats["num_steps"]
    assert type(ours.solver_state) is type(host.solver_state)
    for x, y in zip(
        jtu.tree_leaves((ours.ts, ours.ys, ours.solver_state)),
        jtu.tree_leaves((host.ts, host.ys, host.solver_state)),
    ):
        # Some ten steps of a few roundings each, the sums being in another order;
        # and where the steps are adapted to a rough path, their ends are rounded, and
        # the path is not smooth.
        rough = controller == "clip" and kind == "sde"
        tol = (1e6 if rough else 500) * jnp.finfo(jnp.float64).eps
        same = (x == y) | (jnp.abs(x - y) <= tol * (1 + jnp.abs(y)))
        assert jnp.all(same)
