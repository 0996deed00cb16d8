"""The drift check: whether the backward pass arrives where the forward pass was."""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._method.controlled import precision, rms


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
