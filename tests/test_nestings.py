"""Any nesting of transformations around one solve, three deep, gives what it gives with
another adjoint, or refuses a third derivative."""

import diffrax
import hypothesis
import hypothesis.strategies as st
import jax
import jax.lax as lax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr

from .helpers import relative_difference
from .test_gradient import weighted_sum


def _solve(adjoint):
    def fn(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sin(y[::-1]) * y - t * y),
            dfxr.UReversible(diffrax.Heun()),
            0.0,
            1.0,
            0.25,
            y0,
            adjoint=adjoint,
            saveat=diffrax.SaveAt(ts=jnp.array([0.3, 1.0])),
            max_steps=4,
        )
        return weighted_sum(sol.ys)

    return fn


# Of functions of two numbers: what is made of them, and how often that differentiates.
WRAPPERS = {
    "grad": (lambda fn: jax.grad(lambda x: weighted_sum(fn(x))), 1),
    "jvp": (lambda fn: lambda x: jax.jvp(fn, (x,), (jnp.cos(x),))[1], 1),
    "jacfwd": (jax.jacfwd, 1),
    "jacrev": (jax.jacrev, 1),
    "linearize": (lambda fn: lambda x: jax.linearize(fn, x)[1](jnp.sin(x)), 1),
    "vmap": (lambda fn: lambda x: jax.vmap(fn)(jnp.stack([x, 0.5 * x])), 0),
    "scan": (lambda fn: lambda x: lax.scan(lambda c, _: (c, fn(c)), x, length=2)[1], 0),
    "checkpoint": (jax.checkpoint, 0),
    "jit": (jax.jit, 0),
}


def _check(names):
    def nested(adjoint):
        fn, order = _solve(adjoint), 0
        for name in names:
            wrap, times = WRAPPERS[name]
            fn, order = wrap(fn), order + times
        return jax.jit(fn), order

    y0 = jnp.array([0.8, -0.3])
    ours, order = nested(dfxr.ReversibleAdjoint())
    if order > 2:
        with pytest.raises(NotImplementedError, match="no third derivatives"):
            ours(y0)
        return
    expected, _ = nested(diffrax.DirectAdjoint())
    assert relative_difference(ours(y0), expected(y0)) < 1e-9


NAMES = st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=3, max_size=3)


@hypothesis.given(names=NAMES)
@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
@pytest.mark.exhaustive
def test_nesting(names):
    _check(names)


@pytest.mark.exhaustive
@hypothesis.given(names=NAMES)
@hypothesis.settings(max_examples=60, phases=[hypothesis.Phase.generate])
def test_nestings(names):
    _check(names)
