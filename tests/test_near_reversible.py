"""`EES25` and `EES27`, which are undone by a step of the opposite size up to a high
order, have a gradient that is good to that order; and what is missing is told, and
cured."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan, verify

from .helpers import relative_difference


@ft.partial(jax.jit, static_argnums=(0, 1))
def _gradient(solver, adjoint, h, params):
    def loss(params):
        w, y0 = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.tanh(w @ y) + 0.1 * jnp.cos(t)),
            solver,
            0.0,
            4.0,
            h,
            y0,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0, 4, 5)),
            adjoint=adjoint,
            max_steps=4096,
        )
        return jnp.sum(jnp.sin(sol.ys))

    return jax.grad(loss)(params)


@pytest.mark.parametrize(
    "solver,order,num_steps",
    [(dfxr.EES25(), 5, (40, 160)), (dfxr.EES27(), 7, (16, 64))],
)
def test_order_of_gradient(solver, order, num_steps, monkeypatch):
    # That of one defect a step, each of one order more, if nobody looks at it.
    monkeypatch.setattr(verify, "tolerance", lambda y: 1e9)
    monkeypatch.setattr(plan, "_PART_OF_RECORD", 1e9)
    params = (jax.random.normal(jax.random.key(0), (3, 3)), jnp.array([1.0, 0.5, -0.2]))
    # (An adjoint that no other test has, as it is compiled with that.)
    ours = dfxr.ReversibleAdjoint(checkpoints=1)
    errors = [
        relative_difference(
            _gradient(solver, ours, 4.0 / n, params),
            _gradient(solver, diffrax.RecursiveCheckpointAdjoint(), 4.0 / n, params),
        )
        for n in num_steps
    ]
    slope = np.log(errors[0] / errors[1]) / np.log(num_steps[1] / num_steps[0])
    assert order - 0.5 < slope < order + 1
    assert errors[1] > 1e-13  # above rounding


@pytest.mark.parametrize("step", [1.0, 0.1])
def test_defect_is_cured(step):
    # Whatever the defect of the way back, the gradient is that of the steps; to what
    # verification lets pass of it, over the few that are rebuilt.
    params = (jax.random.normal(jax.random.key(0), (3, 3)), jnp.array([1.0, 0.5, -0.2]))
    ours, expected = [
        _gradient(dfxr.EES25(), adjoint, step, params)
        for adjoint in (
            dfxr.ReversibleAdjoint(),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    ]
    assert relative_difference(ours, expected) < 1e-12


@pytest.mark.parametrize("solver", [dfxr.EES25(), dfxr.EES27()])
def test_adaptive(solver):
    # As many steps as Heun's method, whose error estimate is the same to leading order.
    def solve(solver):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])),
            solver,
            0.0,
            10.0,
            None,
            jnp.array([1.0, 0.0]),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
            adjoint=diffrax.ForwardMode(),
        ).stats["num_steps"]

    ours, heun = solve(solver), solve(diffrax.Heun())
    assert abs(ours - heun) < 0.1 * heun


def test_defect_is_told():
    # It has no second register, and never asks for a checkpoint by itself.
    w = jax.random.normal(jax.random.key(0), (3, 3))
    found = dfxr.diagnose(
        diffrax.ODETerm(lambda t, y, args: jnp.tanh(w @ y) + 0.1 * jnp.cos(t)),
        dfxr.EES25(),
        0.0,
        4.0,
        0.1,
        jnp.array([1.0, 0.5, -0.2]),
        max_steps=64,
    )
    assert found.num_checkpoints == 0
    assert np.all(np.isnan(found.separation)) and np.all(np.isnan(found.coupling))
    assert float(found.drift[0]) == np.max(found.drift) > 1e-9
