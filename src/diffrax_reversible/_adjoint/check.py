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


_LOSES_TIME = (
    "`adjoint=ReversibleAdjoint()` cannot differentiate output at steps (of "
    "`SaveAt(steps=...)`, or at an event without a root finder) with respect to `t0`, "
    "`t1` or times in a step size controller, if that is adaptive: it is not known how "
    "the steps that it chose depend on these. Use `SaveAt(ts=...)`, or for an event "
    "with a real-valued condition `Event(root_finder=...)`; use "
    "`jax.lax.stop_gradient` on these times if their gradient is not needed; or else "
    "use `diffrax.ConstantStepSize`, or `adjoint=diffrax.RecursiveCheckpointAdjoint()` "
    "(which takes the ratios of step sizes for constants)."
)


def check_time(
    derivative: list[Array], loses_time: Array | None, throw: bool
) -> list[Array]:
    """As `check`, of what needs the derivative of a time that is not known."""
    if loses_time is None:
        return derivative
    if throw:
        return eqx.error_if(derivative, loses_time, _LOSES_TIME)
    return [jnp.where(loses_time, jnp.nan, x) for x in derivative]


def is_nonzero(tree: PyTree) -> Array:
    """(NaN is another matter.)"""
    leaves = [jnp.any(jnp.abs(x) > 0) for x in jtu.tree_leaves(tree)]
    return ft.reduce(jnp.logical_or, leaves, jnp.array(False))


def check(
    grads: PyTree,
    grad_consts: dict[int, Any],
    grad_final_state: PyTree,
    y: PyTree,
    event_is_lost: Array | None,
    is_lost: Array,
    throw: bool,
    batch: Batch,
    loses_time: Array | None = None,
) -> tuple[PyTree, dict[int, Any]]:
    """Raises an error, or without `throw` makes that gradient (of this element of a
    batch, and of constants what is summed over it) NaN. `y` is that at the end."""
    messages = [
        "`adjoint=ReversibleAdjoint()` does not support a solve with an event that "
        "stops at `max_steps` with a rejected step, as one element of this batch does. "
        "Use a larger `max_steps`.",
        "`adjoint=ReversibleAdjoint()` could not recompute the states of this solve: "
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
    wrong = jnp.stack([no_event, is_lost, overflow])
    # (What is not finite is left as it is: others may be right.)
    is_known = ~jnp.any(wrong[:2])
    # (Of one number, as what is handed through takes memory; and the same for all of a
    # batch, as their sum must stay.)
    if loses_time is not None and throw:
        loses_time = eqxi.unvmap_any(loses_time)
    [one] = check_time([jnp.array(1.0)], loses_time, throw)
    is_known = is_known & (one == 1)
    if throw:
        which = eqxi.unvmap_max(jnp.argmax(wrong))
        one = eqxi.branched_error_if(one, jnp.any(wrong), which, messages)
        is_known = one == 1  # or NaN, if Equinox is told not to raise errors

    def mark(is_known, grads):
        return jtu.tree_map(lambda g: jnp.where(is_known, g, jnp.nan), grads)

    grad_consts = {
        i: mark(is_known if throw else batch.all(i, is_known), g)
        for i, g in grad_consts.items()
    }
    return mark(is_known, grads), grad_consts
