"""`UReversible` over a stochastic Runge--Kutta method has the strong order of that
method and the right gradient, and goes back along the same path. Every such method of
diffrax is tested, or refused."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan
from diffrax_reversible._method.srk import reversed_control, srk_control

from .helpers import relative_difference
from .test_counts import Counter


class Polygon(diffrax.AbstractBrownianPath):
    """Straight lines between the points of a random walk, at equal times in [0, 1], and
    all that can be known of it between any two of these times. With many small steps it
    is as good as a Brownian motion."""

    walk: Any
    # The integrals of `w` and `t w` from zero.
    integrals: Any
    levy_area: Any = eqx.field(static=True)

    def __init__(self, walk):
        n = len(walk) - 1
        a, b = walk[:-1], walk[1:]
        start = jnp.arange(n, dtype=a.dtype)[:, None] / n
        pieces = ((a + b) / 2 / n, (start * (a + b) / 2 + (a + 2 * b) / 6 / n) / n)
        self.walk = walk
        self.integrals = [
            jnp.pad(jnp.cumsum(x, axis=0), ((1, 0), (0, 0))) for x in pieces
        ]
        self.levy_area = diffrax.SpaceTimeTimeLevyArea

    @property
    def t0(self):
        return 0.0

    @property
    def t1(self):
        return 1.0

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        n = len(self.walk) - 1
        i, j = (jnp.round(t * n).astype(int) for t in (t0, t1))
        w = self.walk[j] - self.walk[i]
        if not use_levy:
            return w
        h = t1 - t0
        first, second = (x[j] - x[i] for x in self.integrals)
        # From the start of the interval, and of the length of one.
        first = first - h * self.walk[i]
        second = second - self.walk[i] * (t1**2 - t0**2) / 2 - t0 * first
        h = jnp.where(h == 0, 1, h)
        first, second = first / h, second / h**2
        return diffrax.SpaceTimeTimeLevyArea(
            dt=h, W=w, H=first - w / 2, K=(first - w / 2) / 2 - (second - w / 3)
        )


def walk(key, num_steps, size):
    steps = jax.random.normal(key, (num_steps, size)) / num_steps**0.5
    return jnp.pad(jnp.cumsum(steps, axis=0), ((1, 0), (0, 0)))


AdditiveCoeffs = type(diffrax.ShARK.tableau.coeffs_w)


def _coefficients(size):
    return AdditiveCoeffs(a=np.zeros(1), b_sol=np.array(float(size)))


# A method that uses everything.
ALL_AREAS = diffrax.StochasticButcherTableau(
    a=[],
    b_sol=np.ones(1),
    b_error=None,
    c=np.zeros(0),
    coeffs_w=_coefficients(1),
    coeffs_hh=_coefficients(0),
    coeffs_kk=_coefficients(0),
    ignore_stage_f=None,
    ignore_stage_g=None,
)


class AllAreas(diffrax.AbstractSRK, diffrax.AbstractStratonovichSolver):
    tableau = ALL_AREAS


def _drift(t, y, args):
    return jnp.tanh(jnp.array([[0.3, 1.0], [-1.0, 0.4]]) @ y) + jnp.cos(2 * t)


DIFFUSIONS = {
    "additive": lambda t, y, args: (
        jnp.array([[0.5, 0.2], [-0.3, 0.4]]) * (1 + 0.5 * jnp.sin(3 * t))
    ),
    # Of a single noise.
    "commutative": lambda t, y, args: 0.8 * jnp.cos(y + jnp.array([0.0, 1.0]))[:, None],
    "general": lambda t, y, args: (
        jnp.array([[0.5, 0.3], [-0.4, 0.5]]) * jnp.cos(y[::-1] + t)[:, None]
    ),
}


def _size(kind):
    return 1 if kind == "commutative" else 2


def _terms(kind, path, drift=_drift):
    return diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(DIFFUSIONS[kind], path)
    )


Y0 = jnp.array([0.3, -0.5])


#
# Time reversal
#


def test_levy_areas_of_polygon():
    # What the other tests stand on: the areas of diffrax's path, from its values.
    path = diffrax.VirtualBrownianTree(
        0.0,
        1.0,
        2**-7,
        (2,),
        jax.random.key(0),
        levy_area=diffrax.SpaceTimeTimeLevyArea,
    )
    n = 128
    t0, t1 = jnp.array(0.25), jnp.array(0.75)
    times = jnp.append(jnp.linspace(0, 1, n + 1), t1)
    levy = jax.jit(jax.vmap(lambda t: path.evaluate(t0, t, use_levy=True)))(times)
    expected = jax.tree.map(lambda x: x[-1], levy)
    found = Polygon(levy.W[:-1]).evaluate(t0, t1, use_levy=True)
    # The area between the path and a line has a variance of `dt**3 / 12` for each of
    # the pieces: five standard deviations.
    tol = 5 * (0.5 / 12) ** 0.5 / n
    assert jnp.allclose(found.W, expected.W, rtol=0, atol=1e-12)
    assert jnp.allclose(found.H, expected.H, rtol=0, atol=2 * tol)
    assert jnp.max(jnp.abs(expected.H)) > 2 * tol
    assert jnp.allclose(found.K, expected.K, rtol=0, atol=tol)
    assert jnp.max(jnp.abs(expected.K)) > 2 * tol


def test_time_reversal():
    points = walk(jax.random.key(0), 64, 2)
    t0, t1 = jnp.array(0.25), jnp.array(0.75)
    forwards, backwards = (
        srk_control(ALL_AREAS, _terms("additive", Polygon(w)), t0, t1)
        for w in (points, points[::-1])
    )
    assert len(forwards) == 4
    h, *areas = reversed_control(forwards)
    assert h == -backwards[0]
    assert relative_difference(areas, list(backwards[1:])) < 1e-12


@pytest.mark.parametrize(
    "base,kind", [(diffrax.ShARK(), "additive"), (diffrax.SlowRK(), "commutative")]
)
def test_backwards_in_time(base, kind):
    # From `t0 = 1` to `t1 = 0`, against the same with the other direction of time.
    points = walk(jax.random.key(0), 64, _size(kind))
    solver = dfxr.UReversible(base)

    def solve(terms, t0, t1):
        return diffrax.diffeqsolve(
            terms, solver, t0, t1, (t1 - t0) / 8, Y0, max_steps=9
        ).ys

    def diffusion(t, y, args):
        return DIFFUSIONS[kind](1 - t, y, args)

    mirrored = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -_drift(1 - t, y, args)),
        diffrax.ControlTerm(diffusion, Polygon(points[::-1])),
    )
    expected = solve(mirrored, 0.0, 1.0)
    found = solve(_terms(kind, Polygon(points)), 1.0, 0.0)
    assert relative_difference(found, expected) < 1e-12


@pytest.mark.parametrize(
    "base,kind",
    [
        (diffrax.SEA(), "additive"),
        (diffrax.SRA1(), "additive"),
        (diffrax.ShARK(), "additive"),
        (diffrax.GeneralShARK(), "general"),
        (diffrax.SlowRK(), "general"),
        (diffrax.SPaRK(), "general"),
    ],
)
def test_first_step_is_that_of_base(base, kind):
    terms = _terms(kind, Polygon(walk(jax.random.key(0), 8, 2)))
    t0, t1 = jnp.array(0.25), jnp.array(0.5)
    solver = dfxr.UReversible(base)
    state = solver.init(terms, t0, t1, Y0, None)
    y1, y_error, *_ = solver.step(terms, t0, t1, Y0, None, state, False)
    expected = base.step(terms, t0, t1, Y0, None, None, False)
    assert relative_difference((y1, y_error), expected[:2]) < 1e-14


def test_every_solver_of_diffrax_is_tested():
    def subclasses(cls):
        for c in cls.__subclasses__():
            yield c
            yield from subclasses(c)

    [mark] = test_first_step_is_that_of_base.pytestmark
    tested = {type(base) for base, _ in mark.args[1]}
    assert {
        cls
        for cls in subclasses(diffrax.AbstractSRK)
        if cls.__module__.startswith("diffrax.") or cls.__module__ == "diffrax"
    } == tested


#
# Strong order
#

FINE = 1024
FEW, MANY = 8, 64


@ft.cache
def _solver(solver, kind, max_steps):
    @jax.jit
    def solve(dt0):
        def one(key):
            path = Polygon(walk(key, FINE, _size(kind)))
            return diffrax.diffeqsolve(
                _terms(kind, path),
                solver,
                0.0,
                1.0,
                dt0,
                Y0,
                adjoint=diffrax.ForwardMode(),
                max_steps=max_steps,
            ).ys[0]

        return jax.vmap(one)(jax.random.split(jax.random.key(0), 64))

    return solve


def _error(solver, kind, num_steps):
    # Of a polygon it is exact but for what the polygon's own steps leave.
    exact = _solver(diffrax.Heun(), kind, FINE + 1)(1 / FINE)
    found = _solver(solver, kind, MANY + 1)(1 / num_steps)
    return jnp.sqrt(jnp.mean((found - exact) ** 2))


@pytest.mark.parametrize(
    "base,kind,order,coupling_parameter",
    [
        (diffrax.ShARK(), "additive", 1.5, "auto"),
        (diffrax.SlowRK(), "commutative", 1.5, "auto"),
        (diffrax.SPaRK(), "general", 0.5, "auto"),
        (diffrax.SEA(), "additive", 1, 0.999),
        (diffrax.SRA1(), "additive", 1.5, 0.999),
        (diffrax.GeneralShARK(), "commutative", 1, 0.999),
    ],
)
@pytest.mark.one_in(2)
def test_strong_order(base, kind, order, coupling_parameter):
    solver = dfxr.UReversible(base, coupling_parameter)
    few, many = (_error(solver, kind, n) for n in (FEW, MANY))
    measured = np.log(few / many) / np.log(MANY / FEW)
    assert order - 0.2 < measured < order + 0.5
    # And as good as the base.
    assert many < 1.5 * _error(base, kind, MANY)


def test_dissipation():
    # Where the published coupling fails.
    @ft.partial(jax.jit, static_argnums=0)
    def solve(solver):
        path = Polygon(walk(jax.random.key(0), 128, 1))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -50 * jnp.sinh(y)),
            diffrax.ControlTerm(lambda t, y, args: jnp.array([2.0]), path),
        )
        y0 = jnp.array(1.0)
        sol = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / 128, y0, adjoint=ADJOINT, max_steps=129
        )
        return sol.ys[0], sol.stats["num_checkpoints"]

    # All but the base.
    expected, _ = solve(dfxr.UReversible(diffrax.ShARK(), 1e-6))
    found, num_checkpoints = solve(dfxr.UReversible(diffrax.ShARK()))
    assert jnp.abs(found - expected) < 0.05
    assert 0 < num_checkpoints <= 64
    failed, _ = solve(dfxr.UReversible(diffrax.ShARK(), 0.999))
    assert not jnp.abs(failed - expected) < 1


def test_little_is_forgotten():
    # Whatever the noise of single steps is. (Where each goes by its own error estimate,
    # this asks for several times as many.)
    @jax.jit
    def solve(key):
        terms = _terms("commutative", Polygon(walk(key, FINE, 1)))
        solver = dfxr.UReversible(diffrax.SPaRK())
        sol = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / FINE, Y0, adjoint=ADJOINT, max_steps=FINE + 1
        )
        return sol.stats["num_checkpoints"]

    assert solve(jax.random.key(0)) <= 16


#
# Gradients
#

ADJOINT = dfxr.ReversibleAdjoint()


@pytest.mark.parametrize(
    "base,kind,coupling_parameter,adaptive",
    [
        (diffrax.SPaRK(), "general", "auto", True),
        (diffrax.SlowRK(), "commutative", "auto", False),
        (diffrax.SRA1(), "additive", 0.999, False),
        (diffrax.GeneralShARK(), "general", 0.999, False),
        (diffrax.SEA(), "additive", "auto", False),
    ],
)
@pytest.mark.one_in(3)
def test_gradient(base, kind, coupling_parameter, adaptive):
    # (Between its points this path is no path, but a function of two times still.)
    path = Polygon(walk(jax.random.key(0), 100, _size(kind)))
    controller = diffrax.ConstantStepSize()
    if adaptive:
        controller = diffrax.PIDController(rtol=1e-2, atol=1e-2, dtmin=0.02)

    def gradient(adjoint):
        @jax.jit
        @jax.value_and_grad
        def run(params):
            y0, scale, sigma = params
            g = DIFFUSIONS[kind]
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: scale * _drift(t, y, args)),
                diffrax.ControlTerm(lambda t, y, args: sigma * g(t, y, args), path),
            )
            sol = diffrax.diffeqsolve(
                terms,
                dfxr.UReversible(base, coupling_parameter),
                0.0,
                1.0,
                0.2,
                y0,
                saveat=diffrax.SaveAt(t1=True, ts=[0.3, 0.7]),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=32,
            )
            return jnp.sum(jnp.sin(sol.ys))

        return run((Y0, jnp.array(1.1), jnp.array(0.9)))

    # The rounding of a few coarse steps, there and back.
    assert (
        relative_difference(gradient(ADJOINT), gradient(diffrax.DirectAdjoint()))
        < 1e-11
    )


#
# Counts
#


class _CountedPath(diffrax.AbstractPath):
    path: diffrax.AbstractPath
    count: Any = eqx.field(static=True)

    @property
    def t0(self):
        return self.path.t0

    @property
    def t1(self):
        return self.path.t1

    def evaluate(self, t0, t1=None, left=True, **kwargs):
        return self.path.evaluate(self.count(t0), t1, left, **kwargs)


@pytest.mark.long
@pytest.mark.parametrize(
    "base,kind,num_drifts,num_diffusions",
    [(diffrax.SlowRK(), "general", 2, 5), (diffrax.ShARK(), "additive", 2, 2)],
)
def test_counts(base, kind, num_drifts, num_diffusions, monkeypatch):
    monkeypatch.setattr(plan, "_PART_OF_RECORD", 1e9)
    drifts, diffusions = Counter(), Counter()
    queries = 0

    def count(t):
        def callback(t):
            nonlocal queries
            queries += 1
            return np.zeros_like(t)

        return t + jax.pure_callback(callback, t, jax.lax.stop_gradient(t))

    path = _CountedPath(Polygon(walk(jax.random.key(0), 10, 1)), count)

    def diffusion(t, y, args):
        # (Of its times alone, where it must be.)
        at = y if kind == "general" else t * args
        return diffusions.vector_field(at)[None]

    @jax.jit
    def solve(y0):
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: drifts.vector_field(y)),
            diffrax.ControlTerm(diffusion, path),
        )
        return diffrax.diffeqsolve(
            terms,
            dfxr.UReversible(base),
            0.0,
            1.0,
            0.1,
            y0,
            y0,
            adjoint=dfxr.ReversibleAdjoint(checkpoints=0),
            max_steps=20,
        ).ys[0]

    n = 10
    jax.block_until_ready(solve(jnp.array(0.3)))
    assert drifts.take() == (2 * num_drifts * n, 0)
    assert diffusions.take() == (2 * num_diffusions * n, 0)
    assert queries == n
    queries = 0
    jax.block_until_ready(jax.jit(jax.grad(solve))(jnp.array(0.3)))
    # Forwards once more, and backwards, where the second increment is not
    # differentiated, nor asked for in the last step, whose start is known; and two of
    # each to compare what has been rebuilt with the start.
    for counter, k in ((drifts, num_drifts), (diffusions, num_diffusions)):
        assert counter.take() == ((4 * n - 1) * k + 2, n * k + 2)
    assert queries == 2 * n


#
# What is refused
#


@pytest.mark.parametrize(
    "base",
    [
        diffrax.Euler(),
        diffrax.ItoMilstein(),
        diffrax.EulerHeun(),
        diffrax.StratonovichMilstein(),
    ],
)
def test_other_bases(base):
    with pytest.raises(ValueError, match=r"`UReversible\(diffrax\.Heun\(\)\)`") as e:
        dfxr.UReversible(base)
    is_ito = isinstance(base, diffrax.AbstractItoSolver)
    assert ("converges to the Ito solution" in str(e.value)) == is_ito
    assert ("with the same strong order" in str(e.value)) == (not is_ito)


class _Ito(diffrax.AbstractSRK, diffrax.AbstractItoSolver):
    tableau = diffrax.SPaRK.tableau


class _OwnStep(diffrax.SPaRK):
    def step(self, *args, **kwargs):
        raise NotImplementedError


def test_own_step():
    with pytest.raises(ValueError, match="`_OwnStep` has a `step` of its own"):
        dfxr.UReversible(_OwnStep())


@pytest.mark.parametrize(
    "base,kind,levy_area,message",
    [
        (_Ito(), "general", diffrax.SpaceTimeLevyArea, "Stratonovich"),
        (diffrax.SPaRK(), "general", diffrax.BrownianIncrement, "LevyArea"),
        (AllAreas(), "additive", diffrax.SpaceTimeLevyArea, "TimeTimeLevyArea"),
        (diffrax.ShARK(), "general", diffrax.SpaceTimeLevyArea, "independent of y"),
        (diffrax.ShARK(), "shape", diffrax.SpaceTimeLevyArea, "output of structure"),
    ],
)
def test_refused(base, kind, levy_area, message):
    path = diffrax.VirtualBrownianTree(
        0.0, 1.0, 0.1, (2,), jax.random.key(0), levy_area=levy_area
    )
    if kind == "shape":
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(_drift),
            diffrax.ControlTerm(lambda t, y, args: jnp.ones(2), path),
        )
    else:
        terms = _terms(kind, path)
    with pytest.raises(ValueError, match=message):
        diffrax.diffeqsolve(terms, dfxr.UReversible(base), 0.0, 1.0, 0.1, Y0)
