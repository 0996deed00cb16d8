"""Gradients with respect to the times of a solve.

The locations of the steps are constants, but for the ends of the solve: `t0` is where
the first step starts and `t1` is where the last one ends. So are those that a step size
controller was told to step to.
"""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi


class Times(NamedTuple):
    """Those that can be differentiated, or the same structure with something else for
    each: gradients, or `None`; or whether they are wanted."""

    start: Any
    end: Any
    # `SubSaveAt.ts`, or `None`, of each `SubSaveAt`.
    saved: tuple[Any, ...]
    # The arrays of `controller_times`.
    controller: tuple[Any, ...]

    @property
    def any_of_steps(self) -> bool:
        return self.start or self.end or any(self.controller)


def controller_times(controller: Any) -> tuple[tuple[Array, ...], PyTree]:
    """The times that a step size controller steps to, and whatever it holds of which we
    do not know what it is."""
    times = []
    while type(controller) is diffrax.ClipStepSizeController:
        times += [controller.step_ts, controller.jump_ts]
        controller = controller.controller
    if type(controller) is diffrax.StepTo:
        times.append(controller.ts)
        unknown = None
    elif type(controller) in (diffrax.ConstantStepSize, diffrax.PIDController):
        # All else they have chooses step sizes, and these are constants.
        unknown = None
    else:
        unknown = eqx.filter(controller, eqx.is_inexact_array)
    return tuple(x for x in times if x is not None), unknown


def zeros(wanted: Times, times: Times) -> Times:
    return Times(
        *[
            jtu.tree_map(
                lambda w, t: jnp.zeros(jnp.shape(t), jnp.result_type(t)) if w else None,
                *pair,
            )
            for pair in zip(wanted, times)
        ]
    )


def add(grads: Times, times: Times, t: Array, grad: Array, is_start: Any) -> Times:
    """Adds the gradient of the end of a step, at `t`, to that of where it comes from.

    **Arguments:**

    - `grads`, `times`: The gradients so far, and the times.
    - `t`: The start or the end of a step.
    - `grad`: Its gradient. Need not be finite if it is not used.
    - `is_start`: Whether it is the start of the solve.
    """
    start, end, controller = grads.start, grads.end, grads.controller
    is_end = (t == times.end) & ~is_start
    if start is not None:
        start = start + jnp.where(is_start, grad, 0)
    if end is not None:
        end = end + jnp.where(is_end, grad, 0)
    if any(g is not None for g in controller):
        is_inside = ~(is_start | is_end)
        matches = [is_inside & _at(ts, t) for ts in times.controller]
        # One that was given twice gets half of it each time, as from `jnp.minimum`.
        count = sum(jnp.sum(match) for match in matches)
        share = grad / jnp.maximum(count, 1).astype(grad.dtype)
        controller = tuple(
            None if g is None else g + jnp.where(match, share, 0)
            for g, match in zip(controller, matches)
        )
    return grads._replace(start=start, end=end, controller=controller)


def _at(ts: Array, t: Array) -> Array:
    # Steps end just before a jump, and start just after it.
    before, after = eqxi.prevbefore(t), eqxi.nextafter(t)
    return (ts == t) | (ts == before) | (ts == after)
