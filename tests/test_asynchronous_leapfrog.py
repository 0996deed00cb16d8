"""The options of `AsynchronousLeapfrog` do what they promise, or are refused: `damping`
and `full_sync`, with adaptive steps, in a batch, and under noise."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr

from .helpers import relative_difference


@pytest.mark.parametrize("damping", [0, -1, 1.1, float("nan")])
def test_invalid_damping(damping):
    with pytest.raises(ValueError, match=r"`AsynchronousLeapfrog\(damping=...\)` must"):
        dfxr.AsynchronousLeapfrog(damping)


def test_damping_that_forgets():
    with pytest.raises(ValueError, match="cannot be undone"):
        dfxr.AsynchronousLeapfrog(0.5)
    with pytest.raises(ValueError, match="use one or the other"):
        dfxr.AsynchronousLeapfrog(0.9, full_sync=True)


def test_damped_sde():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jax.random.key(0))
    term = diffrax.ControlTerm(lambda t, y, args: jnp.cos(y), path)
    solver = dfxr.AsynchronousLeapfrog(0.9)
    with pytest.raises(ValueError, match="neither to its Ito nor"):
        diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.5, jnp.array(1.0))


def _orbit(t, y, args):
    q, p = y
    return p, -q / jnp.sum(q**2) ** 1.5


@ft.partial(jax.jit, static_argnums=(0, 1))
def _solve(solver, tol, y0):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(_orbit),
        solver,
        0.0,
        20.0,
        None,
        y0,
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        adjoint=dfxr.ReversibleAdjoint()
        if isinstance(solver, dfxr.AbstractReversibleSolver)
        else diffrax.ForwardMode(),
    )


@pytest.mark.parametrize("full_sync", [False, True])
def test_adaptive(full_sync):
    # As good as Heun's method in about as many steps, each at half the price.
    y0 = (jnp.array([0.7, 0.0]), jnp.array([0.0, (1.3 / 0.7) ** 0.5]))
    exact = _solve(diffrax.Dopri8(), 1e-12, y0)
    error = lambda sol: relative_difference(sol.ys, exact.ys)
    ours = _solve(dfxr.AsynchronousLeapfrog(full_sync=full_sync), 1e-5, y0)
    heun = _solve(diffrax.Heun(), 1e-5, y0)
    assert error(ours) < error(heun) < 1e-2
    assert ours.stats["num_steps"] < 1.3 * heun.stats["num_steps"]


def test_full_sync_batched():
    # Where each element of a batch is started anew at its own times.
    def loss(adjoint, rates):
        vector_field = lambda t, y, rate: jax.tree.map(
            lambda x: -rate * x + jnp.sin(t), y
        )
        solve = lambda rate: diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            dfxr.AsynchronousLeapfrog(full_sync=True),
            0.0,
            5.0,
            0.02,
            {"a": jnp.array(1.0), "b": (None, jnp.array([0.5, 2.0]))},
            rate,
            adjoint=adjoint,
            max_steps=256,
        )
        sol = jax.vmap(solve)(rates)
        return sum(jnp.sum(x) for x in jax.tree.leaves(sol.ys)), sol.stats

    rates = jnp.array([0.5, 3.0, 5.0])
    run = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    ours, stats = run(dfxr.ReversibleAdjoint(), rates)
    expected, _ = run(diffrax.RecursiveCheckpointAdjoint(), rates)
    assert relative_difference(ours, expected) < 1e-10
    assert len(set(stats["num_checkpoints"].tolist())) > 1
