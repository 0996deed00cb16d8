"""Orders of convergence, at the ends of steps and in between, and agreement with
diffrax's own solvers."""

import functools as ft
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._registry import as_reversible

from .helpers import (
    make_args,
    make_terms,
    make_y,
    random_like,
    relative_difference,
    REVERSIBLE,
)


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


class _Errors(NamedTuple):
    # One for each number of steps.
    end: np.ndarray
    # The largest at `TS`: of what is saved there, and of `sol.derivative`.
    ts: np.ndarray
    derivative: np.ndarray
    # Largest difference between what is saved at the end of a step and what the
    # interpolations before and after it give there, in multiples of rounding.
    gap: np.ndarray


def _distance(x, y):
    diff = jtu.tree_map(lambda a, b: jnp.max(jnp.abs(a - b)), x, y)
    return float(max(jtu.tree_leaves(diff)))


@ft.cache
def _errors(solver, pair, num_steps):
    terms, y0 = _pendulum(pair)
    end, at_ts = _reference()
    p, q = at_ts
    derivative = _push(TS, q), p
    saveat = diffrax.SaveAt(
        subs={
            "steps": diffrax.SubSaveAt(t0=True, steps=True),
            "ts": diffrax.SubSaveAt(ts=TS),
        },
        dense=True,
    )

    @jax.jit
    def solve(dt0):
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            T1,
            dt0,
            y0,
            saveat=saveat,
            adjoint=diffrax.ForwardMode(),
            max_steps=max(num_steps),
        )
        gaps = []
        for left in (True, False):
            ts = sol.ts["steps"]
            ys = jax.vmap(ft.partial(sol.evaluate, left=left))(ts)
            gap = jtu.tree_map(
                lambda a, b: jnp.where(jnp.isfinite(ts), a - b, 0), ys, sol.ys["steps"]
            )
            gaps.append(gap)
        n = sol.stats["num_steps"]
        last = jtu.tree_map(lambda x: x[n], sol.ys["steps"])
        return last, sol.ys["ts"], jax.vmap(sol.derivative)(TS), gaps

    errors = []
    for n in num_steps:
        last, ys, derivatives, gaps = solve(T1 / n)
        gap = max(float(jnp.max(jnp.abs(x))) for x in jtu.tree_leaves(gaps))
        errors.append(
            (
                _distance(last, end),
                _distance(ys, at_ts),
                _distance(derivatives, derivative),
                gap / jnp.finfo(jnp.float64).eps,
            )
        )
    return _Errors(*np.array(errors).T)


def _slope(errors, num_steps):
    return np.log(errors[0] / errors[-1]) / np.log(num_steps[-1] / num_steps[0])


# A few roundings of numbers of size 1, or of a few multiples of that.
MAX_GAP = 8


@pytest.mark.parametrize("name", [n for n in REVERSIBLE if "UReversible" not in n])
def test_order(name):
    case = REVERSIBLE[name]
    num_steps = (20, 160)
    errors = _errors(case.solver, case.pair, num_steps)
    terms, _ = _pendulum(case.pair)
    assert case.solver.order(terms) == case.order
    for error in (errors.end, errors.ts):
        assert case.order - 0.2 < _slope(error, num_steps) < case.order + 0.6
    # 1 where an order is lost to linear interpolation, or to a parasitic solution as
    # with LeapfrogMidpoint.
    order = 2 if name.startswith(("ReversibleHeun", "Asynchronous")) else 1
    assert order - 0.2 < _slope(errors.derivative, num_steps) < order + 0.6
    assert np.all(errors.gap < MAX_GAP)


@pytest.mark.parametrize("solver", [dfxr.ReversibleHeun, dfxr.LeapfrogMidpoint])
def test_order_linear(solver):
    num_steps = (20, 160)
    errors = _errors(solver(interpolation="linear"), False, num_steps)
    assert abs(_slope(errors.ts, num_steps) - 2) < 0.4
    assert abs(_slope(errors.derivative, num_steps) - 1) < 0.4
    assert np.all(errors.gap < MAX_GAP)


@pytest.mark.parametrize("interpolation,order", [("hermite", 2), ("linear", 1)])
def test_order_of_leapfrog_without_parasite(interpolation, order):
    # Where `y` has no curvature at first, the Euler step is as good as the others.
    solver = dfxr.LeapfrogMidpoint(interpolation=interpolation)

    @jax.jit
    def error(dt0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.cos(3 * t)),
            solver,
            0.0,
            T1,
            dt0,
            jnp.array(0.0),
            saveat=diffrax.SaveAt(dense=True),
            max_steps=160,
        )
        return jnp.max(jnp.abs(jax.vmap(sol.derivative)(TS) - jnp.cos(3 * TS)))

    slope = _slope([error(T1 / n) for n in (20, 160)], (20, 160))
    assert abs(slope - order) < 0.3


# With the orders of the output in between steps, and of its derivative. (Of the
# interpolations of diffrax, where they are better than a cubic.)
BASES = [
    (diffrax.Heun(), (20, 160), 2, 2),
    (diffrax.Midpoint(), (20, 160), 2, 2),
    (diffrax.Ralston(), (20, 160), 2, 2),
    (diffrax.Bosh3(), (20, 160), 3, 3),
    (diffrax.Tsit5(), (10, 40), 5, 4),
    (diffrax.Dopri5(), (10, 40), 5, 4),
    (diffrax.Dopri8(), (4, 10), 6, 5),
]


@pytest.mark.parametrize("coupling_parameter", ["auto", 0.999])
@pytest.mark.parametrize(
    "base,num_steps,order_ts,order_derivative",
    BASES,
    ids=lambda x: type(x).__name__ if isinstance(x, diffrax.AbstractERK) else "",
)
def test_order_u_reversible(
    base, num_steps, order_ts, order_derivative, coupling_parameter
):
    solver = dfxr.UReversible(base, coupling_parameter)
    order = base.order(None)
    assert solver.order(None) == order
    errors = _errors(solver, False, num_steps)
    # Dopri8 reaches rounding before its order shows cleanly.
    slack = 1.0 if order == 8 else 0.4
    assert _slope(errors.end, num_steps) > order - slack
    assert _slope(errors.ts, num_steps) > order_ts - 0.4
    assert _slope(errors.derivative, num_steps) > order_derivative - 0.4
    # And the sizes of the errors are those of the wrapped solver.
    of_base = _errors(base, False, num_steps)
    assert np.all(errors.ts < 1.3 * of_base.ts)
    assert np.all(errors.derivative < 1.3 * of_base.derivative)
    # Those of Dopri5 and Dopri8 are sums with large coefficients.
    assert np.all(errors.gap < MAX_GAP + 2 * of_base.gap)


# With the order of dense output, of which the error is of one order more.
SPLITTINGS = [
    (dfxr.StormerVerlet("velocity"), 2, 1, (20, 80)),
    (dfxr.StormerVerlet("position"), 2, 1, (20, 80)),
    (dfxr.ForestRuth(), 4, 2, (20, 80)),
    (dfxr.Suzuki4(), 4, 3, (20, 80)),
    (dfxr.BlanesMoan4(), 4, 3, (10, 40)),
    (dfxr.BlanesMoan6(), 6, 3, (6, 16)),
    (dfxr.KahanLi6(), 6, 4, (8, 24)),
    (dfxr.KahanLi8(), 8, 4, (4, 8)),
]


@pytest.mark.parametrize(
    "solver,order,dense_order,num_steps", SPLITTINGS, ids=lambda x: type(x).__name__
)
def test_order_splitting(solver, order, dense_order, num_steps):
    assert solver.order(None) == order
    errors = _errors(solver, True, num_steps)
    assert order - 0.3 < _slope(errors.end, num_steps) < order + 0.6
    assert _slope(errors.ts, num_steps) > min(order, dense_order + 1) - 0.4


def _trees(size):
    """The rooted trees of a size, each the tuple of its branches."""

    def forests(size, largest):
        if size == 0:
            yield ()
        for first in range(min(size, largest[0]), 0, -1):
            for i, tree in enumerate(_trees(first)):
                if (first, i) <= largest:
                    for rest in forests(size - first, (first, i)):
                        yield (tree, *rest)

    yield from forests(size - 1, (size, 0))


@pytest.mark.parametrize(
    "solver,order", [x[:2] for x in SPLITTINGS], ids=lambda x: type(x).__name__
)
def test_order_conditions(solver, order):
    # Those of a partitioned Runge--Kutta method, to rounding: of the published digits
    # none is missing.
    fractions = [np.array(solver.kicks), np.array(solver.drifts)]
    first = len(fractions[0]) < len(fractions[1])
    begins, other = fractions[first], fractions[not first]
    before = np.tril(np.ones((len(begins), len(other))), -1)
    matrices = before * other, (1 - before).T * begins

    def weights(tree, which):
        out, size, density = 1.0, 1, 1
        for branch in tree:
            x, n, gamma = weights(branch, 1 - which)
            out, size, density = out * (matrices[which] @ x), size + n, density * gamma
        return out * np.ones(len(matrices[which])), size, density * size

    assert [len(list(_trees(n))) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]
    for size in range(1, order + 1):
        for tree in _trees(size):
            for which, b in enumerate((begins, other)):
                x, _, density = weights(tree, which)
                assert abs(b @ x - 1 / density) < 4e-15


def test_every_splitting_is_tested():
    public = {
        x
        for x in vars(dfxr).values()
        if isinstance(x, type)
        and issubclass(x, dfxr.AbstractSplitting)
        and x is not dfxr.AbstractSplitting
    }
    assert public == {type(solver) for solver, *_ in SPLITTINGS}


@pytest.mark.parametrize(
    "solver,order",
    [
        (dfxr.AsynchronousLeapfrog(damping=0.9), 1),
        (dfxr.EES25(), 2),
        (dfxr.EES27(), 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_order_other(solver, order):
    num_steps = (20, 160)
    assert solver.order(None) == order
    errors = _errors(solver, False, num_steps)
    for slope in _slope(errors.end, num_steps), _slope(errors.ts, num_steps):
        assert order - 0.2 < slope < order + 0.2


@pytest.mark.parametrize(
    "solver",
    [dfxr.AsynchronousLeapfrog(), dfxr.EES25(), dfxr.EES27()],
    ids=lambda x: type(x).__name__,
)
def test_dense_output_within_a_step(solver):
    term, y0 = _pendulum(False)

    @jax.jit
    def error(h):
        solve = lambda solver, t, dt: (
            diffrax.diffeqsolve(
                term,
                solver,
                0.0,
                t,
                dt,
                y0,
                saveat=diffrax.SaveAt(ts=[h / 3]),
                adjoint=diffrax.ForwardMode(),
                max_steps=32,
            ).ys
        )
        ours, exact = solve(solver, h, h), solve(diffrax.Dopri8(), h / 3, h / 30)
        distances = jtu.tree_map(lambda a, b: jnp.abs(a - b)[0], ours, exact)
        return jnp.max(jnp.stack(jtu.tree_leaves(distances)))

    # As the step itself: of one order more than the solution.
    slope = jnp.log2(error(0.1) / error(0.05))
    assert 2.6 < slope < 3.5


def test_every_explicit_runge_kutta_solver_is_tested():
    in_diffrax = {
        x
        for x in vars(diffrax).values()
        if isinstance(x, type)
        and issubclass(x, diffrax.AbstractERK)
        and x is not diffrax.AbstractERK
    }
    assert in_diffrax == {type(base) for base, *_ in BASES}


@pytest.mark.parametrize("coupling_parameter", [1.0, 0.9, "auto"])
def test_error_estimate_and_interpolation(coupling_parameter):
    # Where `y` and `z` agree they are those of the wrapped solver.
    terms, y0 = _pendulum(False)
    for base in (diffrax.Bosh3(), diffrax.Tsit5(), diffrax.Dopri8()):
        solver = dfxr.UReversible(base, coupling_parameter)
        t0, t1 = jnp.array(0.0), jnp.array(0.05)

        def step(solver):
            state = solver.init(terms, t0, t1, y0, None)
            y1, y_error, dense_info, *_ = solver.step(
                terms, t0, t1, y0, None, state, False
            )
            interpolation = solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
            return y1, y_error, interpolation.evaluate(jnp.array(0.02))

        ours, host = step(solver), step(base)
        for a, b in zip(jtu.tree_leaves(ours), jtu.tree_leaves(host)):
            # Tens of roundings of numbers of order one.
            assert abs(a - b) < 100 * jnp.finfo(jnp.float64).eps


#
# Interpolation
#


class _ClassicalInterpolation(diffrax.AbstractLocalInterpolation):
    t0: Any
    t1: Any
    y0: Any
    k: Any

    def __init__(self, *, t0, t1, y0, y1, k):
        self.t0, self.t1, self.y0, self.k = t0, t1, y0, k

    def evaluate(self, t0, t1=None, left=True):
        s = (t0 - self.t0) / (self.t1 - self.t0)
        middle = s**2 - 2 / 3 * s**3
        b = [s - 1.5 * s**2 + 2 / 3 * s**3, middle, middle, 2 / 3 * s**3 - s**2 / 2]
        return jtu.tree_map(
            lambda y, k: y + sum(bi * ki for bi, ki in zip(b, k)), self.y0, self.k
        )


class _Classical(diffrax.AbstractERK):
    """Not first-same-as-last, and with a cubic of its own."""

    tableau = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0, 0.5]), np.array([0, 0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls = _ClassicalInterpolation

    def order(self, terms):
        return 4


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("coupling_parameter", ["auto", 0.9])
@pytest.mark.parametrize(
    "base",
    [diffrax.Tsit5(), diffrax.Dopri5(), diffrax.Dopri8(), _Classical()],
    ids=lambda x: type(x).__name__,
)
def test_interpolation_of_the_base(base, coupling_parameter, dtype):
    # If the vector field does not depend on `y` then the stages are those of the
    # wrapped solver, wherever `z` is.
    solver = dfxr.UReversible(base, coupling_parameter)
    times = jnp.array([0.3, 0.3 + 0.2 / 3, 0.41, 0.7], dtype)
    t0, *_, t1 = times
    y0 = {"a": jnp.array([1.0, -2.0], dtype), "b": jnp.array(0.5, dtype)}
    d = {"a": jnp.array([0.3, 0.1], dtype), "b": jnp.array(-0.2, dtype)}
    z0 = jtu.tree_map(lambda y, d: y - d, y0, d)
    vector_field = lambda t, y, args: {
        "a": jnp.stack([jnp.cos(5 * t), t**2]),
        "b": jnp.exp(-t),
    }
    terms = diffrax.ODETerm(vector_field)

    def interpolate(solver, y, state):
        y1, _, dense_info, *_ = solver.step(terms, t0, t1, y, None, state, False)
        interpolation = solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
        return jax.vmap(interpolation.evaluate)(times), y1

    @jax.jit
    def compare():
        state = solver.init(terms, t0, t1, y0, None)
        if coupling_parameter == "auto":
            # With a coupling of 1/2.
            difference, code, account = state
            state = d, jnp.full_like(code, 8), account
            start, line = y0, lambda t: 0 * t
        else:
            # Carried from `d` to `lambda * d`.
            state = start = z0
            line = lambda t: 1 - (1 - coupling_parameter) * (t - t0) / (t1 - t0)
        ours, y1 = interpolate(solver, y0, state)
        expected, _ = interpolate(base, start, base.init(terms, t0, t1, start, None))
        expected = jtu.tree_map(
            lambda x, d: x + jnp.multiply.outer(line(times), d), expected, d
        )
        ends = jtu.tree_map(lambda x: (x[0], x[-1]), ours)
        return ours, expected, ends, jtu.tree_map(lambda a, b: (a, b), y0, y1)

    ours, expected, ends, expected_ends = compare()
    # Of sums with coefficients up to 116.
    tol = 100 * float(jnp.finfo(dtype).eps)
    assert all(x.dtype == dtype for x in jtu.tree_leaves(ours))
    assert _distance(ours, expected) < tol
    assert _distance(ends, expected_ends) < tol


@pytest.mark.parametrize(
    "interpolation_cls",
    [
        diffrax.LocalLinearInterpolation,
        lambda t0, t1, y0, y1, k: diffrax.LocalLinearInterpolation(t0, t1, y0, y1),
        diffrax.ThirdOrderHermitePolynomialInterpolation.from_k,
    ],
)
def test_line_or_cubic_of_the_base(interpolation_cls):
    class Mine(diffrax.AbstractERK):
        tableau = diffrax.Midpoint.tableau

        @property
        def interpolation_cls(self):
            return interpolation_cls

        def order(self, terms):
            return 2

    cubic = diffrax.ThirdOrderHermitePolynomialInterpolation
    assert dfxr.UReversible(Mine()).interpolation_cls is cubic


@pytest.mark.long
@pytest.mark.parametrize(
    "base,coupling_parameter,kind,saveat",
    [
        (diffrax.Tsit5(), "auto", "ode", "mixed"),
        (_Classical(), 0.9, "cde", "dense"),
    ],
)
def test_gradient_of_interpolation(base, coupling_parameter, kind, saveat):
    from .test_gradient import solve_loss, TOL

    case = REVERSIBLE["UReversible-Heun"]
    solver = dfxr.UReversible(base, coupling_parameter)
    keys = jax.random.split(jax.random.key(5), 3)
    terms = make_terms(case, kind, "vector", jnp.float64, keys[0])
    y0 = random_like(make_y(case, "vector", jnp.float64), keys[1])
    args = make_args(keys[2], jnp.float64)

    def gradient(adjoint):
        @eqx.filter_jit
        @eqx.filter_grad
        def run(params):
            return solve_loss(adjoint, solver, *params, "constant", saveat)

        return run((terms, y0, args))

    ours = gradient(dfxr.ReversibleAdjoint())
    reference = gradient(diffrax.DirectAdjoint())
    assert relative_difference(ours, reference) < TOL


#
# The same numbers as diffrax's own solvers
#

HOSTED = [
    (name, kind, controller)
    for name, case in REVERSIBLE.items()
    if case.host is not None
    for kind in ("ode", *case.controls)
    for controller in (["step_to", "clip"] if case.adaptive else ["step_to"])
]


@pytest.mark.filterwarnings("ignore:.*not marked as converging.*:UserWarning")
@pytest.mark.parametrize("name,kind,controller", HOSTED)
def test_same_as_host(name, kind, controller):
    from .test_gradient import CONTROLLERS

    case = REVERSIBLE[name]
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

    # (Our own solvers may have another interpolation.)
    ours = solve(as_reversible(case.host), dfxr.ReversibleAdjoint())
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
