"""Compares the gradient by `ADJOINT` to the derivative by forward mode.

Forward mode compiles in half the time of a second reverse mode, and shares no code with
it. It is taken in one direction of random signs, so that no part of the gradient is
left out.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

import diffrax_reversible as dfxr

from .helpers import flatten
from .test_gradient import TOL, weighted_sum


ADJOINT = dfxr.ReversibleAdjoint()


def random_signs(tree, seed=0):
    rng = np.random.default_rng(seed)

    def signs(x):
        out = rng.choice([-1.0, 1.0], jnp.shape(x))
        if jnp.iscomplexobj(x):
            out = out + 1j * rng.choice([-1.0, 1.0], jnp.shape(x))
        return jnp.asarray(out, jnp.result_type(x))

    return jtu.tree_map(signs, tree)


def split(loss, params):
    """`loss(adjoint, params)` as a function of the differentiable part of `params`."""
    diff, static = eqx.partition(params, eqx.is_inexact_array_like)
    diff = jtu.tree_map(jnp.asarray, diff)
    return diff, lambda adjoint, diff: loss(adjoint, eqx.combine(diff, static))


def assert_along(grad, tangent, expected, tol):
    grad, tangent = flatten(grad), flatten(tangent)
    assert np.all(np.isfinite(grad))
    assert np.isfinite(expected)
    # JAX's convention for complex numbers; of real ones it is the dot product.
    derivative = np.real(np.sum(grad * tangent))
    assert abs(derivative - expected) <= tol * np.sum(np.abs(grad))


def agree(loss, params, *, reference=None, adjoint=ADJOINT, tol=TOL):
    """Asserts that `loss(adjoint, params)` has the gradient of `reference` (by default
    of itself, with diffrax's forward mode), and returns its value and gradient."""
    diff, own = split(loss, params)
    _, other = split(loss if reference is None else reference, params)

    @jax.jit
    def reverse(diff):
        return jax.value_and_grad(lambda x: own(adjoint, x))(diff)

    @jax.jit
    def forward(diff, tangent):
        fn = lambda x: other(diffrax.ForwardMode(), x)
        return jax.jvp(fn, (diff,), (tangent,))

    value, grad = reverse(diff)
    tangent = random_signs(diff)
    expected_value, expected = forward(diff, tangent)
    assert abs(value - expected_value) <= tol * max(1.0, abs(expected_value))
    assert_along(grad, tangent, expected, tol)
    return value, grad


def everything(sol):
    """A loss that everything saved in a solution has a part in, its times too."""
    loss = weighted_sum(sol.ys) + 0.3 * weighted_sum(sol.ts)
    if sol.interpolation is not None:
        end = sol.t1 if sol.ts is None else jnp.max(_finite(sol.ts))
        for fraction in (0.0, 0.3, 0.65):
            t = sol.t0 + fraction * (end - sol.t0)
            loss = loss + weighted_sum(sol.evaluate(t)) * (1 + fraction)
        t = sol.t0 + 0.4 * (end - sol.t0)
        loss = loss + weighted_sum(sol.derivative(t))
    return loss


def _finite(tree):
    leaves = [jnp.where(jnp.isfinite(x), x, 0) for x in jtu.tree_leaves(tree)]
    return jnp.concatenate([jnp.ravel(x) for x in leaves])
