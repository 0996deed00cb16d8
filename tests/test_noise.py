"""Solvers marked as converging to the Stratonovich solution do so."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr


# A random walk with many small steps. It is as good as a Brownian motion, and what it
# drives converges to the Stratonovich solution. (The noise does not commute.)
FINE = 512


@ft.partial(jax.jit, static_argnums=(0, 1))
def _driven(solver, num_steps):
    walks = jax.random.normal(jax.random.key(0), (64, FINE, 2)) / FINE**0.5
    walks = jnp.pad(jnp.cumsum(walks, axis=1), ((0, 0), (1, 0), (0, 0)))
    by_q = lambda t, q, args: jnp.stack([0.5 + 0.4 * jnp.sin(q), 0.3 * q])
    by_p = lambda t, p, args: jnp.stack([0.4 * p, 0.5 * jnp.cos(p)])
    both = lambda t, y, args: jnp.stack([by_q(t, y[1], args), by_p(t, y[0], args)])

    def solve(walk):
        path = diffrax.LinearInterpolation(jnp.linspace(0, 1, FINE + 1), walk)
        if isinstance(solver, dfxr.AbstractSplitting):
            terms = tuple(diffrax.ControlTerm(g, path) for g in (by_q, by_p))
            y0 = (jnp.array(0.3), jnp.array(1.0))
        else:
            terms, y0 = diffrax.ControlTerm(both, path), jnp.array([0.3, 1.0])
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            1 / num_steps,
            y0,
            adjoint=diffrax.ForwardMode(),
            max_steps=num_steps + 1,
        )
        return jnp.hstack(jax.tree.map(jnp.ravel, jax.tree.leaves(sol.ys)))

    return jax.vmap(solve)(walks)


@pytest.mark.parametrize(
    "solver",
    [
        dfxr.AsynchronousLeapfrog(),
        dfxr.StormerVerlet(),
        dfxr.StormerVerlet("position"),
        dfxr.EES25(),
    ],
)
def test_stratonovich(solver):
    exact = _driven(diffrax.Heun(), FINE)
    few, many = (
        jnp.sqrt(jnp.mean((_driven(solver, n) - exact) ** 2)) for n in (8, 128)
    )
    # Of order 1/2.
    assert 2.5 < few / many < 6


def test_damped_is_not_stratonovich():
    # Why it is refused for SDEs, which this is not marked as.
    exact = _driven(diffrax.Heun(), FINE)
    difference = _driven(dfxr.AsynchronousLeapfrog(0.8), FINE) - exact
    assert jnp.sqrt(jnp.mean(difference**2)) > 0.02
