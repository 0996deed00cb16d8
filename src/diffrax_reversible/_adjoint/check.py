"""What can go wrong with a gradient though the solution is right."""

import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi


def all_finite(tree: PyTree) -> Array:
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return ft.reduce(jnp.logical_and, finite, jnp.array(True))


def check(
    grads: PyTree,
    grad_final_state: PyTree,
    is_consistent: Array,
    event_is_lost: Array | None,
    throw: bool,
) -> PyTree:
    """Raises an error, or without `throw` makes that gradient (of this element of a
    batch) NaN."""
    messages = [
        "`adjoint=ReversibleAdjoint()` does not support a step size controller that "
        "starts a step elsewhere than at the end of the step before (or, at a jump, "
        "just after it), as this one did. Use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
        "`adjoint=ReversibleAdjoint()` does not support a solve with an event that "
        "stops at `max_steps` with a rejected step, as one element of this batch does. "
        "Use a larger `max_steps`.",
        "The gradient is not finite, though the solution that it was pulled back from "
        "is. Look for functions in the vector field whose derivative is not finite, "
        "such as `jnp.sqrt` at zero. Use `diffeqsolve(throw=False)` for a NaN in place "
        "of this error.",
    ]
    lost = jnp.array(False) if event_is_lost is None else event_is_lost
    # If it is not finite then that is not for what it was pulled back from.
    overflow = ~all_finite(grads) & all_finite(grad_final_state)
    wrong = jnp.stack([~is_consistent, lost, overflow])
    is_wrong = jnp.any(wrong)
    if throw:
        which = eqxi.unvmap_max(jnp.argmax(wrong))
        return eqxi.branched_error_if(grads, is_wrong, which, messages)
    # (What is not finite is left as it is: others may be right.)
    is_unknown = jnp.any(wrong[:2])
    return jtu.tree_map(lambda g: jnp.where(is_unknown, jnp.nan, g), grads)
