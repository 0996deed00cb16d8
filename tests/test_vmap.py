"""Batches: over any argument, in any nesting with `grad`, with steps of their own."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr

from .helpers import relative_difference, short_records
from .test_gradient import TOL, weighted_sum


B = 4
SOLVERS = [dfxr.UReversible(diffrax.Heun()), dfxr.ReversibleHeun()]
PID = diffrax.PIDController(rtol=1e-2, atol=1e-3)
CONTROLLERS = {
    "constant": diffrax.ConstantStepSize(),
    "pid": PID,
    "jumps": diffrax.ClipStepSizeController(PID, jump_ts=[0.4]),
}


def _loss(adjoint, solver, controller, w, y0, t1):
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, w: 2 * jnp.tanh(w @ y)),
        solver,
        0.0,
        t1,
        0.1,
        y0,
        w,
        saveat=diffrax.SaveAt(
            t1=True,
            ts=jnp.linspace(0, 0.5, 4),
            fn=lambda t, y, w: jnp.sum(y * w[0], keepdims=True),
        ),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=256,
    )
    return weighted_sum(sol.ys)


def _arguments():
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (B, 3, 3))
    # Of different sizes, so that step counts differ.
    y0 = jax.random.normal(keys[1], (B, 3)) * jnp.array([0.1, 0.5, 1, 3])[:, None]
    return w, y0, jnp.array([0.5, 0.7, 1.0, 1.9])


# The derivative in a direction: by our reverse mode, and by forward mode.
def _direction(x):
    return tuple(
        jnp.cos(jnp.arange(xi.size, dtype=xi.dtype)).reshape(xi.shape) for xi in x
    )


def _reverse(f, *x):
    grads = jax.grad(f, argnums=(0, 1))(*x)
    return sum(jnp.vdot(g, v) for g, v in zip(grads, _direction(x)))


def _forward(f, *x):
    return jax.jvp(f, x, _direction(x))[1]


def _sum_of_batch(derivative, loss, w, y0, t1):
    # Shared parameters.
    total = lambda w, y0: jnp.sum(jax.vmap(loss, (None, 0, 0))(w, y0, t1))
    return derivative(total, w[0], y0)


def _per_example(derivative, loss, w, y0, t1):
    one = lambda w, y0, t1: derivative(lambda w, y0: loss(w, y0, t1), w, y0)
    return jax.vmap(one, (None, 0, 0))(w[0], y0, t1)


def _nested(derivative, loss, w, y0, t1):
    # Over parameters outside of the derivative, over initial values inside.
    total = lambda w, y0: jnp.sum(jax.vmap(loss, (None, 0, 0))(w, y0, t1))
    return jax.vmap(lambda w: derivative(total, w, y0))(w[:2])


@pytest.mark.parametrize(
    "solver,nesting,controller",
    [
        (SOLVERS[0], _sum_of_batch, "jumps"),
        (SOLVERS[0], _per_example, "pid"),
        (SOLVERS[0], _nested, "pid"),
        (SOLVERS[1], _sum_of_batch, "jumps"),
    ],
)
def test_vmap(solver, nesting, controller):
    controller = CONTROLLERS[controller]
    derivatives = [
        jax.jit(
            ft.partial(nesting, mode, ft.partial(_loss, adjoint, solver, controller))
        )(*_arguments())
        for mode, adjoint in (
            (_reverse, dfxr.ReversibleAdjoint()),
            (_forward, diffrax.ForwardMode()),
        )
    ]
    assert relative_difference(*derivatives) < TOL


@pytest.mark.long
@pytest.mark.parametrize("solver", SOLVERS, ids=["UReversible", "ReversibleHeun"])
def test_finished_elements_do_nothing(solver):
    # One element takes few steps and ends where going on would be a disaster: the
    # vector field is a root of something about to be negative.
    def loss(p, y0, t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: -p * jnp.sqrt(y)),
            solver,
            0.0,
            t1,
            0.1,
            y0,
            p,
            adjoint=dfxr.ReversibleAdjoint(),
            max_steps=64,
            # Or the one that fails would raise an error.
            throw=False,
        )
        return jnp.sum(sol.ys)

    p = jnp.array(1.0)
    y0, t1 = jnp.array([2e-2, 4.0]), jnp.array([0.1, 3.0])
    gradient = jax.grad(loss, argnums=(0, 1))
    batched = jax.jit(jax.vmap(gradient, (None, 0, 0)))(p, y0, t1)
    single = jax.jit(gradient)
    for i in range(2):
        expected = single(p, y0[i], t1[i])
        assert relative_difference([x[i] for x in batched], expected) < TOL

    # And an element whose solve fails does not touch the others.
    bad = jax.jit(jax.vmap(gradient, (None, 0, 0)))(p, jnp.array([-1.0, 4.0]), t1)
    assert jnp.isnan(bad[1][0])
    assert relative_difference([x[1] for x in bad], single(p, y0[1], t1[1])) < TOL


def test_scan_and_checkpoint():
    w, y0, _ = _arguments()
    solver = SOLVERS[0]

    def loss(adjoint, w, y0):
        @jax.checkpoint
        def body(y, w):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
                solver,
                0.0,
                0.3,
                0.1,
                y,
                w,
                adjoint=adjoint,
                max_steps=8,
            )
            return sol.ys[0], None

        return weighted_sum(jax.lax.scan(body, y0[0], w)[0])

    gradients = [
        jax.jit(jax.grad(ft.partial(loss, adjoint), argnums=(0, 1)))(w, y0)
        for adjoint in (dfxr.ReversibleAdjoint(), diffrax.DirectAdjoint())
    ]
    assert relative_difference(*gradients) < TOL


#
# The record: it is made in blocks, which all elements of a batch begin together
#


def _decay(solver, adjoint, max_steps, k, t1, dt0=0.02, rtol=None):
    if rtol is None:
        controller = diffrax.ConstantStepSize()
    else:
        controller = diffrax.PIDController(rtol=rtol, atol=rtol, factormax=1.5)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, k: -k * y * (1 + 0.1 * jnp.sin(t))),
        solver,
        0.0,
        t1,
        dt0,
        jnp.array([1.0, 0.4]),
        k,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
    )
    return weighted_sum(sol.ys), sol.stats["num_accepted_steps"]


# An element that is done must not end the loop of the others: with a checkpoint that it
# would ask for if it went on, or by filling its block of 64 steps.
@pytest.mark.parametrize(
    "solver,adjoint,ks,steps",
    [
        (SOLVERS[0], dfxr.ReversibleAdjoint(), [5.0] * 20, list(range(80, 100))),
        (
            SOLVERS[1],
            dfxr.ReversibleAdjoint(checkpoint_every=3),
            [0.5, 0.5, 0.5, 0.5],
            [3, 9, 62, 1],
        ),
        (
            SOLVERS[1],
            dfxr.ReversibleAdjoint(),
            [0.5, 0.4, 0.3, 0.2, 0.1],
            [63, 64, 65, 128, 129],
        ),
    ],
    ids=["controlled", "every", "blocks"],
)
def test_elements_of_other_lengths(solver, adjoint, ks, steps):
    ks, steps = jnp.array(ks), jnp.array(steps)
    t1 = 0.02 * steps.astype(float) - 0.005

    def total(adjoint, ks):
        loss, num_steps = jax.vmap(lambda k, t1: _decay(solver, adjoint, 140, k, t1))(
            ks, t1
        )
        return jnp.sum(jnp.sin(loss)), num_steps

    grad, num_steps = jax.jit(jax.grad(ft.partial(total, adjoint), has_aux=True))(ks)
    assert jnp.array_equal(num_steps, steps)
    forward = ft.partial(total, diffrax.ForwardMode())
    _, expected, _ = jax.jit(
        lambda ks: jax.jvp(forward, (ks,), (jnp.cos(ks),), has_aux=True)
    )(ks)
    assert abs(jnp.vdot(grad, jnp.cos(ks)) - expected) < TOL * jnp.sum(jnp.abs(grad))


@pytest.mark.long
@pytest.mark.parametrize("checkpoints", [16, 24])
@pytest.mark.parametrize(
    "solver,rtol",
    [(SOLVERS[0], 1e-4), (dfxr.LeapfrogMidpoint(), None)],
    ids=["UReversible", "LeapfrogMidpoint"],
)
def test_segments(solver, rtol, checkpoints, monkeypatch):
    # Of 8 steps, or of 12; in a batch of which some have just as many.
    short_records(monkeypatch)
    steps = jnp.array([0, 1, 7, 8, 9, 12, 16, 17, 24, 25, 150])
    ks, t1 = (
        jnp.linspace(0.1, 0.5, 11),
        jnp.maximum(0.02 * steps.astype(float) - 0.005, 0),
    )

    def gradient(max_steps):
        adjoint = dfxr.ReversibleAdjoint(checkpoints)
        one = lambda k, t1: _decay(solver, adjoint, max_steps, k, t1, 0.02, rtol)
        return jax.jit(jax.vmap(jax.grad(one, has_aux=True)))(ks, t1)

    (ours, num_steps), (expected, _) = gradient(None), gradient(256)
    assert rtol is not None or jnp.array_equal(num_steps, steps)
    assert relative_difference(ours, expected) < TOL


@pytest.mark.parametrize("checkpoints", [6, "auto"])
def test_no_nan_of_elements_that_wait(checkpoints):
    # The vector field is not differentiable just off the solution.
    def loss(p, y0, t1, adjoint):
        term = diffrax.ODETerm(lambda t, y, p: 1 + p * jnp.sqrt(y - t))
        solver = dfxr.UReversible(diffrax.Heun(), 0.9)
        sol = diffrax.diffeqsolve(
            term, solver, 0.0, t1, 0.25, y0, p, adjoint=adjoint, max_steps=16
        )
        return sol.ys[-1] ** 2

    y0, t1 = jnp.array([0.01, 0.02, 0.015]), 0.25 * jnp.array([7.0, 11.0, 9.0])

    def total(p, adjoint):
        one = lambda y0, t1: loss(p, y0, t1, adjoint)
        return jnp.sum(jax.vmap(one)(y0, t1))

    ours = jax.jit(
        jax.grad(ft.partial(total, adjoint=dfxr.ReversibleAdjoint(checkpoints)))
    )
    expected = jax.jit(
        jax.grad(ft.partial(total, adjoint=diffrax.RecursiveCheckpointAdjoint()))
    )
    assert relative_difference(ours(0.1), expected(0.1)) < TOL
