"""`ABOBA` solves underdamped Langevin dynamics: with strong order 2, the right
stationary distribution and the right gradient, also where friction makes its steps hard
to undo. Everything else that it could be given is refused."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan

from .helpers import relative_difference
from .test_counts import Counter
from .test_stochastic import Polygon, walk


GAMMA, U = jnp.array([1.5, 0.5]), jnp.array([0.7, 1.2])
Y0 = (jnp.array([0.3, -0.5]), jnp.array([1.0, 0.2]))
ADJOINT = dfxr.ReversibleAdjoint()


def _grad_f(x, args):
    return jnp.sin(x) + x + 0.3 * jnp.cos(x[::-1])


def _terms(path, gamma=GAMMA, u=U, grad_f=_grad_f):
    return diffrax.MultiTerm(
        diffrax.UnderdampedLangevinDriftTerm(gamma, u, grad_f),
        diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, path),
    )


def _solve(terms, num_steps, adjoint=ADJOINT, y0=Y0, t0=0.0, t1=1.0, **kwargs):
    return diffrax.diffeqsolve(
        terms,
        dfxr.ABOBA(),
        t0,
        t1,
        (t1 - t0) / num_steps,
        y0,
        adjoint=adjoint,
        max_steps=num_steps + 1,
        **kwargs,
    )


def test_strong_order():
    fine, few, many = 1024, 8, 64

    @ft.partial(jax.jit, static_argnums=(0, 1))
    def ends(solver, num_steps):
        def one(key):
            terms = _terms(Polygon(walk(key, fine, 2)))
            y = diffrax.diffeqsolve(
                terms,
                solver,
                0.0,
                1.0,
                1 / num_steps,
                Y0,
                adjoint=diffrax.ForwardMode(),
                max_steps=num_steps + 1,
            ).ys
            return jnp.concatenate([a[0] for a in y])

        return jax.vmap(one)(jax.random.split(jax.random.key(0), 64))

    exact = ends(diffrax.Heun(), fine)
    e_few, e_many = (
        jnp.sqrt(jnp.mean((ends(dfxr.ABOBA(), n) - exact) ** 2)) for n in (few, many)
    )
    assert 1.8 < np.log(e_few / e_many) / np.log(many / few) < 2.4


def test_gradient():
    # `gamma` and `u` are numbers, or there is one for each coordinate.
    path = Polygon(walk(jax.random.key(0), 64, 2))

    def gradient(adjoint):
        @jax.jit
        @jax.value_and_grad
        def run(params):
            y0, gamma, u, scale = params
            terms = _terms(path, gamma, u, lambda x, args: scale * _grad_f(x, args))
            saveat = diffrax.SaveAt(t1=True, ts=[0.3, 0.7])
            x, v = _solve(terms, 8, adjoint, y0, saveat=saveat).ys
            return jnp.sum(jnp.sin(x)) + jnp.sum(v**2)

        return run((Y0, GAMMA, jnp.array(0.8), jnp.array(1.1)))

    # The rounding of a few coarse steps, there and back.
    found, expected = gradient(ADJOINT), gradient(diffrax.DirectAdjoint())
    assert relative_difference(found, expected) < 1e-12


def test_backwards_in_time():
    # Back by small steps: the Stratonovich solution can be undone.
    terms = _terms(Polygon(walk(jax.random.key(0), 256, 2)))

    @jax.jit
    def solve(y0, t0, t1):
        sol = _solve(terms, 128, diffrax.ForwardMode(), y0, t0, t1)
        return jax.tree.map(lambda x: x[0], sol.ys)

    y1 = solve(Y0, 0.0, 1.0)
    assert relative_difference(y1, Y0) > 0.1
    assert relative_difference(solve(y1, 1.0, 0.0), Y0) < 2e-4


def test_stationary():
    # In large steps, with much friction and without.
    size = 4096
    gamma = jnp.where(jnp.arange(size) % 2 == 0, 0.1, 4.0)
    path = diffrax.UnsafeBrownianPath(
        (size,), jax.random.key(0), levy_area=diffrax.SpaceTimeLevyArea
    )
    terms = _terms(path, gamma, jnp.array(2.0), lambda x, args: jnp.zeros_like(x))
    y0 = (jnp.zeros(size), 2**0.5 * jax.random.normal(jax.random.key(1), (size,)))
    _, v = _solve(terms, 20, diffrax.DirectAdjoint(), y0, t1=10.0).ys
    # Four standard deviations.
    for half in (v[0, ::2], v[0, 1::2]):
        assert jnp.abs(jnp.var(half) / 2 - 1) < 4 * (2 / (size / 2)) ** 0.5


def test_dissipation():
    # Undone only with checkpoints, for which it asks.
    path = Polygon(walk(jax.random.key(0), 128, 2))

    def gradient(adjoint):
        @ft.partial(jax.value_and_grad, has_aux=True)
        def run(y0):
            sol = _solve(_terms(path, 60.0, 30.0), 128, adjoint, y0)
            x, v = sol.ys
            return jnp.sum(x) + jnp.sum(v), sol.stats.get("num_checkpoints")

        (_, num_checkpoints), grad = jax.jit(run)(Y0)
        return num_checkpoints, grad

    num_checkpoints, grad = gradient(ADJOINT)
    # Of 60 nats, which are 87 bits, with 22 for each of them.
    assert num_checkpoints == 3
    _, expected = gradient(diffrax.DirectAdjoint())
    assert relative_difference(grad, expected) < 1e-9
    _, grad = gradient(dfxr.ReversibleAdjoint(checkpoints=0))
    assert relative_difference(grad, expected) < 1e-9


@pytest.mark.parametrize("gamma", [240.0, 8000.0])
def test_friction_of_which_no_step_can_be_undone(gamma):
    # It loses more than there are digits, or all.
    path = Polygon(walk(jax.random.key(0), 64, 2))
    gammas = jnp.array([gamma, 1.0])

    def gradient(adjoint):
        @ft.partial(jax.value_and_grad, has_aux=True)
        def run(y0):
            sol = _solve(_terms(path, gammas, 1.0), 8, adjoint, y0)
            x, v = sol.ys
            return jnp.sum(x) + jnp.sum(v**2), sol.stats.get("num_checkpoints")

        (_, num_checkpoints), grad = jax.jit(run)(Y0)
        return num_checkpoints, grad

    num_checkpoints, grad = gradient(ADJOINT)
    # (The start is there anyway.)
    assert num_checkpoints == 7
    _, expected = gradient(diffrax.DirectAdjoint())
    assert relative_difference(grad, expected) < 1e-12


def test_counts(monkeypatch):
    monkeypatch.setattr(plan, "_PART_OF_RECORD", 1e9)
    counter = Counter()
    path = Polygon(walk(jax.random.key(0), 10, 1))

    @jax.jit
    def solve(x0):
        def grad_f(x, args):
            return counter.vector_field(x[0])[None]

        y0 = (x0[None], jnp.ones(1))
        x, _ = _solve(_terms(path, 1.0, 1.0, grad_f), 10, y0=y0).ys
        return x[0, 0]

    jax.block_until_ready(solve(jnp.array(0.3)))
    assert counter.take() == (10, 0)
    jax.block_until_ready(jax.jit(jax.grad(solve))(jnp.array(0.3)))
    # Two each to compare what has been rebuilt with the start.
    assert counter.take() == (30 + 2, 10 + 2)


def test_refused():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), jax.random.key(0))
    with pytest.raises(ValueError, match="levy_area=diffrax.SpaceTimeLevyArea"):
        _solve(_terms(path), 8)
    path = Polygon(walk(jax.random.key(0), 10, 2))
    drift, _ = _terms(path).terms
    _, diffusion = _terms(path, gamma=2 * GAMMA).terms
    with pytest.raises(Exception, match="to be the same in both"):
        _solve(diffrax.MultiTerm(drift, diffusion), 8)
