"""Gradients with respect to the times of a solve.

The locations of the steps are constants, but for the ends of the solve: `t0` is where
the first step starts and `t1` is where the last one ends. So are those that a step size
controller was told to step to.

**Where the vector field jumps.** The step that ends at such a time, `s`, has stages at
`s` itself, and so has the step that starts there. Whatever value the vector field has
at `s`, one of the two steps sees the far side of the jump: with a weight `w`, that of
these stages. That makes an error in the solution of no more than the length of the
step, which the error estimate keeps short. But in the derivative with respect to the
length of the step there is `w` itself, and no tolerance makes that small: the sum of
the two steps' derivatives is `1 - w` times the true one, and `w` is 2.3 for Tsit5. So
the lengths of these two steps are what is held fixed: their other ends move along with
`s`. Then the steps next to them change their lengths, and all of their stages are on
the right side. (As they are with `jump_ts`, where the steps end just before `s` and
start just after it. In diffrax's own adjoints the other ends move by what the step size
controller does after it has rejected steps on the way to `s`.)
"""

import functools as ft
from collections.abc import Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
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
    # Those of `controller_times`.
    controller: tuple[Any, ...]
    clipped: tuple[Any, ...]

    @property
    def any_of_steps(self) -> bool:
        return self.start or self.end or any(self.controller) or any(self.clipped)


def controller_times(
    controller: Any,
) -> tuple[tuple[Array, ...], tuple[Array, ...], PyTree]:
    """The times that a step size controller steps to; those of them, apart, with which
    the steps on either side move along; and whatever it holds of which we do not know
    what it is."""
    times, clipped = [], []
    while type(controller) is diffrax.ClipStepSizeController:
        clipped.append(controller.step_ts)
        times.append(controller.jump_ts)
        controller = controller.controller
    if type(controller) is diffrax.StepTo:
        times.append(controller.ts)
        unknown = None
    elif type(controller) in (diffrax.ConstantStepSize, diffrax.PIDController):
        # All else they have chooses step sizes, and these are constants.
        unknown = None
    else:
        unknown = eqx.filter(controller, eqx.is_inexact_array)
    times, clipped = (tuple(x for x in ts if x is not None) for ts in (times, clipped))
    return times, clipped, unknown


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
    start, end = grads.start, grads.end
    is_end = (t == times.end) & ~is_start
    if start is not None:
        start = start + jnp.where(is_start, grad, 0)
    if end is not None:
        end = end + jnp.where(is_end, grad, 0)
    grads = grads._replace(start=start, end=end)
    grads_told = (*grads.controller, *grads.clipped)
    if all(g is None for g in grads_told):
        return grads
    is_inside = ~(is_start | is_end)
    told = (*times.controller, *times.clipped)
    grads_told = _share(grads_told, [is_inside & _at(ts, t) for ts in told], grad)
    n = len(times.controller)
    return grads._replace(controller=grads_told[:n], clipped=grads_told[n:])


def locate(times: Times, t: Array, is_start: Any) -> Array:
    """`t`, where a step starts or ends, whose derivative is that of where it comes
    from: what `add` is the transpose of. (Of `times.clipped` that is no derivative, as
    other steps move along with these.)"""
    return _locate((*times.controller,), times.start, times.end, t, is_start)


@jax.custom_jvp
def _locate(told, start, end, t, is_start):
    del told, start, end, is_start
    return t


@_locate.defjvp
def _locate_jvp(primals, tangents):
    told, start, end, t, is_start = primals
    t_told, t_start, t_end, *_ = tangents
    is_end = (t == end) & ~is_start
    matches = [~is_start & ~is_end & _at(ts, t) for ts in told]
    count = jnp.maximum(sum(jnp.sum(match) for match in matches), 1)
    out = jnp.where(is_start, t_start, jnp.where(is_end, t_end, 0))
    for match, t_ts in zip(matches, t_told, strict=True):
        out = out + jnp.sum(jnp.where(match, t_ts, 0)) / count.astype(out.dtype)
    return t, out.astype(t.dtype)


class Node(NamedTuple):
    """The start of a step, as it is seen from the step before."""

    # The end of the step that starts here.
    next: Array
    # Of where that starts.
    grad: Array


def move(
    grads: Times, times: Times, t: Array, t_prev: Array, t_next: Array, grad: Array
) -> Times:
    """Adds the gradient of `t`, where a step ends and the next one starts, to that of
    the one of `times.clipped` with which it moves along, if there is one. `t_prev` and
    `t_next` are the other ends of these two steps."""
    told = (*times.controller, *times.clipped)
    is_told = (t == times.start) | (t == times.end)
    for ts in told:
        is_told = is_told | jnp.any(_at(ts, t))

    def at(s):
        # One at an end of the solve does not move.
        moves = (s != times.start) & (s != times.end) & ~is_told
        return [moves & (ts == s) for ts in times.clipped]

    before, after = at(t_prev), at(t_next)
    # Between two of them it can move with one alone. It is usual for a vector field to
    # have its later value at a jump, so that it is the step towards it which matters.
    is_before = ~ft.reduce(jnp.logical_or, map(jnp.any, after))
    matches = [(b & is_before) | a for b, a in zip(before, after)]
    return grads._replace(clipped=_share(grads.clipped, matches, grad))


def _share(grads: tuple, matches: Sequence[Array], grad: Array) -> tuple:
    # One that was given twice gets half of it each time, as from `jnp.minimum`.
    count = sum(jnp.sum(match) for match in matches)
    share = grad / jnp.maximum(count, 1).astype(grad.dtype)
    return tuple(
        None if g is None else g + jnp.where(match, share, 0)
        for g, match in zip(grads, matches)
    )


def _at(ts: Array, t: Array) -> Array:
    # Steps end just before a jump, and start just after it.
    before, after = eqxi.prevbefore(t), eqxi.nextafter(t)
    return (ts == t) | (ts == before) | (ts == after)
