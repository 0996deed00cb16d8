"""The drift check: whether the backward pass arrives where the forward pass was."""

import functools as ft
import math

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._jax_compat import eqxi
from .._method.controlled import precision, rms


def distance(rebuilt, stored, y1):
    """Relative difference of two values of `y` at the start of a step; infinite if
    either is not finite."""
    scale = jtu.tree_map(lambda a, b: jnp.abs(a) + jnp.abs(b), *_inexact(stored, y1))
    # A leaf that is zero, to rounding, is as large as rounding makes it.
    least = math.sqrt(float(precision(stored).eps)) * rms(scale)
    out = jnp.zeros((), least.dtype)
    for a, b, s in zip(*map(jtu.tree_leaves, (*_inexact(rebuilt, stored), scale))):
        size = jnp.maximum(rms(s).astype(out.dtype), least)
        difference = rms(a - b).astype(out.dtype)
        ratio = difference / jnp.where(size > 0, size, 1)
        out = jnp.maximum(out, jnp.where(jnp.isfinite(ratio), ratio, jnp.inf))
    return out


def _inexact(*trees):
    return [eqx.filter(x, eqx.is_inexact_array) for x in trees]


def all_finite(tree):
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return ft.reduce(jnp.logical_and, finite, jnp.array(True))


def check_tolerance(name: str, tolerance) -> None:
    if tolerance not in (None, "auto") and (
        isinstance(tolerance, bool)
        or not isinstance(tolerance, (int, float))
        or not tolerance > 0
    ):
        raise ValueError(
            f"`{name}(drift_tolerance=...)` must be a positive number, "
            f'"auto", or `None` for no check; got {tolerance}.'
        )


def default_tolerance(drift) -> float:
    # Single precision cannot do better, and double need not be worse.
    return 6e-5 if drift.dtype.itemsize <= 4 else 1e-5


def check_drift(grads, drift, tolerance):
    if tolerance == "auto":
        tolerance = default_tolerance(drift)
    remedies = (
        "The gradient would be wrong (which says nothing of the solution). Use "
        "smaller steps if the solver is `EES25` or `EES27`; or "
        "`ReversibleAdjoint(checkpoint_every=...)`, with enough `checkpoints`, for "
        "shorter ways back; or double precision; or "
        '`UReversible(..., coupling_parameter="auto")` if that is not what you use; or '
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
    )
    messages = [
        "The backward pass did not arrive at the state from which the forward pass had "
        f"come: they differ by more than `ReversibleAdjoint(drift_tolerance=...)`, "
        f"here {tolerance} relative to the size of the state. Rounding errors have "
        "grown too much on the way, or the defect of a solver that is only nearly "
        f"reversible. {remedies}",
        "The backward pass arrived at values that are not finite. Either the solution "
        "or its derivative is not finite, or rounding errors have grown beyond all "
        f"bounds on the way back. In the second case: {remedies}",
    ]
    kind = eqxi.unvmap_max(jnp.where(jnp.isinf(drift), 1, 0))
    return eqxi.branched_error_if(grads, ~(drift <= tolerance), kind, messages)
