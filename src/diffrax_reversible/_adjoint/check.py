"""What can go wrong with a gradient though the solution is right."""

import functools as ft
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .batch import Batch


def all_finite(tree: PyTree) -> Array:
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    finite = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return ft.reduce(jnp.logical_and, finite, jnp.array(True))


def check(
    grads: PyTree,
    grad_consts: dict[int, Any],
    grad_final_state: PyTree,
    y: PyTree,
    is_consistent: Array,
    event_is_lost: Array | None,
    is_lost: Array,
    throw: bool,
    batch: Batch,
) -> tuple[PyTree, dict[int, Any]]:
    """Raises an error, or without `throw` makes that gradient (of this element of a
    batch, and of constants what is summed over it) NaN. `y` is that at the end."""
    messages = [
        "`adjoint=ReversibleAdjoint()` does not support a step size controller that "
        "starts a step elsewhere than at the end of the step before (or, at a jump, "
        "just after it), as this one did. Use "
        "`adjoint=diffrax.RecursiveCheckpointAdjoint()`.",
        "`adjoint=ReversibleAdjoint()` does not support a solve with an event that "
        "stops at `max_steps` with a rejected step, as one element of this batch does. "
        "Use a larger `max_steps`.",
        "`adjoint=ReversibleAdjoint()` could not make the states of this solve again: "
        "rounding errors grow too much from one that is stored to the next. Use a "
        "larger `ReversibleAdjoint(checkpoints=...)`.",
        "The gradient is not finite, though the solution that it was pulled back from "
        "is. Look for functions in the vector field whose derivative is not finite, "
        "such as `jnp.sqrt` at zero. Use `diffeqsolve(throw=False)` for a NaN in place "
        "of this error.",
    ]
    no_event = jnp.array(False) if event_is_lost is None else event_is_lost
    # If it is not finite then that is not for what it was pulled back from.
    is_finite = all_finite((grads, grad_consts))
    overflow = ~is_finite & all_finite((grad_final_state, y))
    wrong = jnp.stack([~is_consistent, no_event, is_lost, overflow])
    # (What is not finite is left as it is: others may be right.)
    is_known = ~jnp.any(wrong[:3])
    if throw:
        # (Of one number, as what is handed through takes memory; and the same for all
        # of a batch, as their sum must stay.)
        which, one = eqxi.unvmap_max(jnp.argmax(wrong)), jnp.array(1.0)
        one = eqxi.branched_error_if(one, jnp.any(wrong), which, messages)
        is_known = one == 1  # or NaN, if Equinox is told not to raise errors

    def mark(is_known, grads):
        return jtu.tree_map(lambda g: jnp.where(is_known, g, jnp.nan), grads)

    grad_consts = {
        i: mark(is_known if throw else batch.all(i, is_known), g)
        for i, g in grad_consts.items()
    }
    return mark(is_known, grads), grad_consts
