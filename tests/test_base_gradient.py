"""`UReversible(base)` has the solution of `base` and its gradient: where the second
increment is worse than the first, and whatever the components are like."""

import functools as ft
import math

import diffrax
import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._method import controlled

from .helpers import relative_difference


CHECKPOINTING = diffrax.RecursiveCheckpointAdjoint()
REVERSIBLE = dfxr.ReversibleAdjoint()


def _gradient(
    vector_field,
    base,
    y0,
    args,
    t1,
    dt0=None,
    tol=None,
    adjoint=REVERSIBLE,
    dtype=jnp.float64,
    max_steps=1024,
    noise=None,
    reversible=True,
):
    """`(y1, stats, result), gradient` of a sum over all components."""
    cast = lambda x: jnp.asarray(x, dtype)
    controller = diffrax.ConstantStepSize()
    if tol is not None:
        controller = diffrax.PIDController(rtol=tol, atol=tol)
    term = diffrax.ODETerm(vector_field)
    if noise is not None:
        term = diffrax.MultiTerm(term, noise)

    @jax.jit
    def run(params):
        def loss(params):
            sol = diffrax.diffeqsolve(
                term,
                dfxr.UReversible(base) if reversible else base,
                cast(0),
                cast(t1),
                None if dt0 is None else cast(dt0),
                *params,
                stepsize_controller=controller,
                adjoint=adjoint if reversible else CHECKPOINTING,
                max_steps=max_steps,
                throw=False,
            )
            weights = jnp.cos(jnp.arange(sol.ys[0].size, dtype=dtype))
            return jnp.sum(weights * sol.ys[0]), (sol.ys[0], sol.stats, sol.result)

        return jax.grad(loss, has_aux=True)(params)

    grad, aux = run((cast(y0), cast(args)))
    return aux, grad


def _both(*args, **kwargs):
    ours = _gradient(*args, **kwargs)
    base = _gradient(*args, **kwargs, reversible=False)
    (_, stats, result), _ = ours
    (_, base_stats, base_result), _ = base
    assert result == base_result == diffrax.RESULTS.successful
    steps, base_steps = stats["num_accepted_steps"], base_stats["num_accepted_steps"]
    assert abs(steps - base_steps) <= 0.02 * base_steps + 1
    return ours, base


@pytest.mark.parametrize("adjoint", [REVERSIBLE, CHECKPOINTING], ids=["ours", "host"])
def test_rejected_step_that_overflows(adjoint):
    # In the second increment alone: the first is finite. Its derivative was NaN.
    def vector_field(t, y, p):
        return jnp.stack([p * y[0] - 7 * y[0] * y[1], -3 * y[1] + 7 * y[0] * y[1]])

    args = (vector_field, diffrax.Tsit5(), [11.0, 9.0], 2.0, 0.5)
    kwargs = dict(dt0=0.5, tol=1e-5, adjoint=adjoint)
    ((y1, *_), grad), ((base_y1, *_), base_grad) = _both(*args, **kwargs)
    assert jnp.allclose(y1, base_y1, rtol=1e-3)
    assert relative_difference(grad, base_grad) < 1e-2


@pytest.mark.parametrize("tol,dt0", [(1e-4, None), (None, 0.4)])
def test_domain(tol, dt0):
    # The solution grows by more than a factor of e in a step, and so steps back from
    # its end lead to where there is no logarithm.
    vector_field = lambda t, y, p: p[0] * y * jnp.log(p[1] / y)
    args = (vector_field, diffrax.Tsit5(), [3e-6], [0.6, 1.2], 14.0)
    ((y1, *_), grad), ((base_y1, *_), base_grad) = _both(*args, dt0=dt0, tol=tol)
    assert jnp.allclose(y1, base_y1, rtol=1e-4)
    assert relative_difference(grad, base_grad) < 1e-2


def test_derivative_outside_of_the_domain():
    # `y**n` by `n`, where the second increment makes `y` a negative number.
    def vector_field(t, y, p):
        return jnp.stack([1 / (1 + y[1] ** p[0]) - y[0], y[0] - p[1] * y[1]])

    args = (vector_field, diffrax.Tsit5(), [0.0, 0.0], [2.0, 0.7], 3.0)
    (_, grad), (_, base_grad) = _both(*args, tol=1e-5)
    assert relative_difference(grad, base_grad) < 1e-3


@pytest.mark.parametrize("tol,dt0", [(1e-5, None), (None, 0.04)])
@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_components_of_different_size(size, tol, dt0):
    # In one array: a damped oscillation, next to what is larger or smaller than it.
    def vector_field(t, y, p):
        x, v, z = y
        return jnp.stack([v, -p[0] * x - p[1] * v, p[1] * (size * jnp.sin(t) - z)])

    args = (vector_field, diffrax.Tsit5(), [1.0, 0.0, size], [20.0, 5.0], 6.0)
    ((y1, *_), _), ((base_y1, *_), _) = _both(*args, dt0=dt0, tol=tol)
    exact = _gradient(*args, dt0=0.005, max_steps=2048, reversible=False)[0][0]
    # Each by itself.
    error, base_error = jnp.abs(y1 - exact), jnp.abs(base_y1 - exact)
    assert jnp.all(error <= 2 * base_error + 1e-12 * jnp.abs(exact) + 1e-14)


def test_underflow():
    # In single precision: what has decayed to nothing adds nothing.
    args = (lambda t, y, p: -p * y, diffrax.Tsit5(), [1.0, 0.5], 1.0, 120.0)
    kwargs = dict(dt0=0.1, dtype=jnp.float32, max_steps=1300)
    adjoint = dfxr.ReversibleAdjoint()
    (_, stats, _), grad = _gradient(*args, **kwargs, adjoint=adjoint)
    assert all(jnp.all(jnp.abs(g) < 1e-30) for g in grad)
    assert stats["num_checkpoints"] < 150


def test_limit_of_stability():
    # A stiff relaxation with adaptive steps. The derivative of the base solver's steps
    # is a product of factors of about one in size, if they are its own steps.
    def vector_field(t, y, p):
        return jnp.stack([-p[0] * (y[0] - jnp.cos(y[1])), p[1]])

    args = (vector_field, diffrax.Bosh3(), [0.0, 0.0], [300.0, 1.0], 2.0)
    (_, (_, grad)), _ = _both(*args, tol=1e-6)
    # On the slow manifold, to the first order.
    expected = 2 * (math.cos(1.0) - math.sin(2.0))
    assert abs(grad[1] - expected) < 1e-3


@pytest.mark.long
@pytest.mark.parametrize("base", [diffrax.Heun(), diffrax.SPaRK()], ids=["erk", "srk"])
def test_sde(base):
    # In a deep potential, with steps that are coarse there.
    path = diffrax.VirtualBrownianTree(
        0.0, 5.0, 1e-3, (2,), jax.random.key(3), levy_area=diffrax.SpaceTimeLevyArea
    )
    noise = diffrax.ControlTerm(lambda t, y, p: p[1] * jnp.eye(2), path)
    vector_field = lambda t, y, p: -4 * y * (p[0] * y**2 - 1)
    args = (vector_field, base, [1.6, -0.2], [1.0, 0.1], 5.0)
    ((y1, *_), grad), ((base_y1, *_), base_grad) = _both(*args, dt0=0.05, noise=noise)
    assert jnp.allclose(y1, base_y1, rtol=1e-2)
    assert relative_difference(grad, base_grad) < 0.1


def test_growth_in_single_precision():
    # By a factor of 1e5: the way back shrinks the solution, and not its errors.
    vector_field = lambda t, y, p: p * y * (1 - y)
    args = (vector_field, diffrax.Tsit5(), [1e-5], 1.1, 15.0)
    kwargs = dict(dt0=0.1, dtype=jnp.float32)
    (_, grad), (_, base_grad) = _both(*args, **kwargs)
    assert relative_difference(grad, base_grad) < 1e-3


def test_relaxation_oscillation():
    vector_field = lambda t, y, p: jnp.stack([y[1], p * (1 - y[0] ** 2) * y[1] - y[0]])
    args = ([2.0, 0.0], 8.0, 12.0)
    (_, grad), (_, base_grad) = _both(vector_field, diffrax.Tsit5(), *args, dt0=0.02)
    kwargs = dict(dt0=0.005, max_steps=2500, reversible=False)
    _, exact = _gradient(vector_field, diffrax.Dopri8(), *args, **kwargs)
    # (Four times as much with a control that is ten times as lax.)
    error, base_error = (relative_difference(g, exact) for g in (grad, base_grad))
    assert error < 3 * base_error


# Stiff from one time to another: there many steps in a row cannot be undone, and others
# can.
def _stiff_for_a_while(t, y, p):
    rate, start, end = p
    is_stiff = jax.nn.sigmoid(50 * (t - start)) * jax.nn.sigmoid(50 * (end - t))
    x, v, z = y
    return jnp.stack([v, -x, -(1 + rate * is_stiff) * (z - x)])


def _args_of_stiff(rate=150.0, start=1.0, end=3.0, base=diffrax.Tsit5()):
    return _stiff_for_a_while, base, [1.0, 0.0, 0.5], [rate, start, end], 4.0


@pytest.mark.one_in(1)
@pytest.mark.parametrize("base", [diffrax.Tsit5(), diffrax.Heun(), diffrax.Dopri8()])
@pytest.mark.parametrize("tol,dt0", [(1e-5, None), (None, 0.01)])
def test_stiff_for_a_while(base, tol, dt0):
    args = _args_of_stiff(base=base)
    kwargs = dict(dt0=dt0, tol=tol)
    ((y1, *_), grad), ((base_y1, *_), base_grad) = _both(*args, **kwargs)
    assert jnp.allclose(y1, base_y1, rtol=1e-3)
    assert relative_difference(grad, base_grad) < 0.02
    # And of the same steps, by another adjoint.
    (same_y1, *_), same = _gradient(*args, **kwargs, adjoint=CHECKPOINTING)
    assert jnp.allclose(y1, same_y1, rtol=1e-9)
    assert relative_difference(grad, same) < 1e-7


@pytest.mark.long
@hyp.settings(max_examples=8)
@hyp.given(
    rate=st.floats(0, 300),
    start=st.floats(0.5, 2),
    length=st.floats(0, 2),
    adaptive=st.booleans(),
)
def test_stiff_for_any_while(rate, start, length, adaptive):
    args = _args_of_stiff(rate, start, start + length)
    kwargs = dict(tol=1e-4) if adaptive else dict(dt0=0.01)
    _, grad = _gradient(*args, **kwargs)
    _, same = _gradient(*args, **kwargs, adjoint=CHECKPOINTING)
    assert relative_difference(grad, same) < 1e-7


@pytest.mark.long
def test_batch_that_is_stiff_in_part():
    # Each element is made as it would be alone, whatever is left out of others.
    _, base, y0, _, t1 = _args_of_stiff()

    def run(p, adjoint):
        def loss(p):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(_stiff_for_a_while),
                dfxr.UReversible(base),
                0.0,
                t1,
                0.01,
                jnp.array(y0),
                p,
                adjoint=adjoint,
                max_steps=400,
                saveat=diffrax.SaveAt(t1=True, solver_state=True),
            )
            _, code, account = sol.solver_state
            return jnp.sum(jnp.sin(sol.ys)), (code, account)

        return jax.grad(loss, has_aux=True)(p)

    # Of the second and the third the end is stiff. (What others have learnt of `y - z`
    # is rounding.)
    stiff = slice(1, 3)
    ps = jnp.array([[0.0, 1, 2], [310, 3.5, 9], [310, 3.57, 9], [310, 1, 2]])
    batch = jax.jit(jax.vmap(ft.partial(run, adjoint=REVERSIBLE)))
    grads, (codes, accounts) = batch(ps)
    assert all(controlled.coupling(code) == 0 for code in codes[stiff])
    alone = jax.jit(ft.partial(run, adjoint=REVERSIBLE))
    expected, (_, same_accounts) = jax.vmap(ft.partial(run, adjoint=CHECKPOINTING))(ps)
    assert relative_difference(grads, expected) < 1e-7
    assert jnp.allclose(accounts[stiff], same_accounts[stiff], atol=1e-3)
    codes_alone = []
    for p, grad in zip(ps, grads, strict=True):
        grad_alone, (code_alone, _) = alone(p)
        assert relative_difference(grad, grad_alone) < 1e-7
        codes_alone.append(code_alone)
    assert jnp.array_equal(codes[stiff], jnp.stack(codes_alone)[stiff])
