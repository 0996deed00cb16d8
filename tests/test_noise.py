"""Of a Brownian motion each value is found once in a loop over steps, and none anew for
the steps that are differentiated; and nothing depends on that."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan
from diffrax_reversible._diagnose import _recomputed

from .helpers import relative_difference


OURS = dfxr.ReversibleAdjoint()
EPS = jnp.finfo(jnp.float64).eps


class Jitted(diffrax.ControlTerm):
    def contr(self, t0, t1, **kwargs):
        contr = ft.partial(super().contr, **kwargs)
        return jax.jit(lambda *times: contr(*times))(t0, t1)


class Vmapped(diffrax.ControlTerm):
    def contr(self, t0, t1, **kwargs):
        contr = ft.partial(super().contr, **kwargs)
        return jax.vmap(lambda t0: contr(t0, t1))(jnp.stack([t0]))[0]


class Halved(diffrax.ControlTerm):
    """Asks twice, in the order opposite to that of time."""

    def contr(self, t0, t1, **kwargs):
        contr, middle = ft.partial(super().contr, **kwargs), (t0 + t1) / 2
        second = contr(middle, t1)
        return 2 * contr(t0, middle) + second


def _solve(params, adjoint, n, solver, term=diffrax.ControlTerm, adaptive=False):
    y0, rate = params
    path = diffrax.VirtualBrownianTree(0.0, 3.0, 1e-3, (2,), jax.random.key(1))
    drift = diffrax.ODETerm(lambda t, y, rate: jnp.sin(y[::-1]) - rate * y)
    noise = term(lambda t, y, rate: lx.DiagonalLinearOperator(rate * jnp.cos(y)), path)
    controller = diffrax.ConstantStepSize()
    if adaptive:
        controller = diffrax.PIDController(rtol=1e-2, atol=1e-2, dtmin=5e-3)
    return diffrax.diffeqsolve(
        diffrax.MultiTerm(drift, noise),
        solver,
        0.0,
        1.0,
        1 / n,
        y0,
        rate,
        adjoint=adjoint,
        stepsize_controller=controller,
        max_steps=256 if adaptive else n,
    )


PARAMS = jnp.array([1.0, 0.3]), jnp.array(0.7)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "solver,term,adaptive",
    [
        (diffrax.EulerHeun(), diffrax.ControlTerm, False),
        (diffrax.Heun(), Jitted, False),
        (diffrax.Heun(), Vmapped, False),
        (diffrax.ItoMilstein(), Halved, False),
        (diffrax.HalfSolver(diffrax.EulerHeun()), diffrax.ControlTerm, True),
    ],
)
def test_same_solution_and_gradient(solver, term, adaptive):
    def value_and_grad(adjoint):
        def loss(params):
            sol = _solve(params, adjoint, 12, solver, term, adaptive)
            return jnp.sum(sol.ys**2)

        return jax.jit(jax.value_and_grad(loss))(PARAMS)

    default, grad_default = value_and_grad(diffrax.RecursiveCheckpointAdjoint())
    for adjoint in (OURS, dfxr.ReversibleAdjoint(checkpoints=2)):
        ours, grad = value_and_grad(adjoint)
        # An increment is the difference of the same two values, to the last bit.
        assert ours == default
        assert relative_difference(grad, grad_default) < 100 * EPS


@pytest.mark.one_in(1)
@pytest.mark.parametrize("reversible", [False, True])
def test_how_often_values_are_found(reversible, monkeypatch):
    found, find = [], diffrax.VirtualBrownianTree._evaluate

    def count(self, r):
        jax.debug.callback(lambda: found.append(None))
        return find(self, r)

    monkeypatch.setattr(diffrax.VirtualBrownianTree, "_evaluate", count)
    n, base = 12, diffrax.Heun()
    solver = dfxr.UReversible(base) if reversible else base
    for checkpoints in (24, 6):
        num_slots, length = plan._shared_out(checkpoints, n)
        adjoint = dfxr.ReversibleAdjoint(checkpoints)
        loss = lambda params: jnp.sum(_solve(params, adjoint, n, solver).ys)
        found.clear()
        jax.block_until_ready(jax.jit(jax.grad(loss))(PARAMS))
        jax.effects_barrier()
        if reversible:
            # Both ends of a step that is undone.
            assert len(found) == n + 1 + 2 * n
        else:
            again = _recomputed(np.ones(n, bool), num_slots, length, num_rows=0)
            num = n + 1 + np.sum(again)
            # (And one more for each segment.)
            assert num < len(found) <= num + np.sum(again) // length + 1


def test_times_cannot_be_differentiated():
    # As they cannot in the host.
    def loss(t1):
        path = diffrax.VirtualBrownianTree(0.0, 3.0, 1e-3, (), jax.random.key(1))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.ControlTerm(lambda t, y, args: y, path),
        )
        solver = diffrax.EulerHeun()
        return diffrax.diffeqsolve(terms, solver, 0.0, t1, 0.1, 1.0, adjoint=OURS).ys[0]

    with pytest.raises(RuntimeError, match="cannot be autodifferentiated"):
        jax.grad(loss)(1.0)
