"""Of a Brownian motion each value is found once in a loop over steps, and none anew for
the steps that are differentiated; and nothing depends on that."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan

from .helpers import relative_difference, spy_segments


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


class Rekeyed(diffrax.ControlTerm):
    """Asks another path from time to time, that is made of the one that it has."""

    def contr(self, t0, t1, **kwargs):
        key = jax.random.fold_in(self.control.key, jnp.floor(4 * t0).astype(int))
        path = eqx.tree_at(lambda path: path.key, self.control, key)
        return path.evaluate(t0, t1, **kwargs)


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


@pytest.mark.long
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "solver,term,adaptive",
    [
        (diffrax.EulerHeun(), diffrax.ControlTerm, False),
        (diffrax.Heun(), Jitted, False),
        (diffrax.Heun(), Rekeyed, False),
        (diffrax.Heun(), Vmapped, False),
        (diffrax.HalfSolver(diffrax.EulerHeun()), diffrax.ControlTerm, True),
        (diffrax.ItoMilstein(), Halved, False),
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
        # An increment is the difference of the same two values, to the last bit. (But
        # the stages of some solvers are unrolled.)
        assert relative_difference(ours, default) < 10 * EPS
        assert relative_difference(grad, grad_default) < 100 * EPS


@pytest.mark.long
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
        num_slots, length = plan.share_out_recomputed(float(checkpoints), n)
        adjoint = dfxr.ReversibleAdjoint(checkpoints)
        loss = lambda params: jnp.sum(_solve(params, adjoint, n, solver).ys)
        found.clear()
        jax.block_until_ready(jax.jit(jax.grad(loss))(PARAMS))
        jax.effects_barrier()
        if reversible:
            # Both ends of a step that is undone.
            assert len(found) == n + 1 + 2 * n
        else:
            assert (num_slots + 1) * length >= n
            # Of the last steps none is recomputed, and each other one once.
            again = n - length
            num = n + 1 + again
            # (And one more for each segment.)
            assert num <= len(found) <= num + -(-again // length)


class _Spare(eqx.Module):
    path: diffrax.VirtualBrownianTree

    def __call__(self, t, y, args):
        return -args * y


@pytest.mark.long
@pytest.mark.one_in(1)
def test_others_that_ask():
    # A path that no step asks, and an event that asks between the steps.
    one, other = (
        diffrax.VirtualBrownianTree(0.0, 3.0, 1e-3, (), jax.random.key(i))
        for i in range(2)
    )
    noise = diffrax.ControlTerm(lambda t, y, args: args * y, one)
    terms = diffrax.MultiTerm(diffrax.ODETerm(_Spare(other)), noise)

    def is_far(t, y, args, *, terms, **kwargs):
        _, increment = terms.contr(t, t + 1e-3)
        return (y > 0.5) & (increment > -1)

    def value_and_grad(adjoint):
        def loss(args):
            event = diffrax.Event(lambda t, y, args, **kw: ~is_far(t, y, args, **kw))
            options = dict(adjoint=adjoint, event=event, max_steps=64)
            times = (0.0, 2.0, 0.05)
            solver = diffrax.EulerHeun()
            return diffrax.diffeqsolve(terms, solver, *times, 1.0, args, **options).ys[
                0
            ]

        return jax.jit(jax.value_and_grad(loss))(0.5)

    ours = value_and_grad(OURS)
    default = value_and_grad(diffrax.RecursiveCheckpointAdjoint())
    assert relative_difference(ours, default) < 100 * EPS


@pytest.mark.one_in(1)
@pytest.mark.parametrize("size", [2, 100])
def test_wide_noise(size, monkeypatch):
    # Of more numbers than the state: then no increments are stored, as there would be
    # room for a few steps only.
    found = spy_segments(monkeypatch)
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (size,), jax.random.key(0))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(lambda t, y, args: jnp.ones((2, size)), path),
    )
    solve = lambda y0: (
        diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, 1.0, 0.1, y0, adjoint=OURS, max_steps=1024
        ).ys
    )
    jax.eval_shape(solve, jnp.ones(2))
    [(segments, _)] = found
    assert segments.length >= 5
    assert segments._has_increments == (size == 2)


def test_other_increments():
    traced = []

    class Solver(diffrax.EulerHeun):
        def step(self, terms, t0, t1, *args, **kwargs):
            traced.append(None)
            for _ in range(3 - len(traced)):
                terms.contr(t0, t1)
            return super().step(terms, t0, t1, *args, **kwargs)

    message = "must ask for the same increments"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: _solve(PARAMS, OURS, 3, Solver()).ys)


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
