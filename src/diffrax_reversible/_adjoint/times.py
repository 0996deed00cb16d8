"""Gradients with respect to the times of a solve.

The steps of `ConstantStepSize` move as they do in the host: they are known functions of
the end of the first step and of the controller's state, of which the host makes them.
(These depend in turn on `t0`, `t1` and `dt0`, which is JAX's matter.)

The steps that an adaptive controller chose are constants, but for the ends of the
solve, as `t0` is where the first step starts and `t1` is where the last one ends, and
for the times that the controller was told to step to.

**Output at steps.** That is right of what is output at given times, as this depends on
where the steps are only through its error. It is wrong of what is output where a step
ends: by `SaveAt(steps=...)`, or as the solve ends there, at an event without a root
finder or as steps run out. What an adaptive controller does is not known, so a gradient
that needs it is an error; those of `StepTo` were told. (Second derivatives of a method
of first order, with respect to the times of such steps, are wrong likewise: what is
missing is of the order of the error of a derivative, which has one order less.)

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

from .._compat import constant_steps, save_every
from .._jax_compat import eqxi


class AtSteps(NamedTuple):
    """What is output where steps end."""

    # Every how many steps each `SubSaveAt` saves, or zero.
    every: tuple[int, ...]
    # For each condition of an event, whether it ends the solve where a step ends, and
    # not at a root.
    at_event: tuple[bool, ...]
    # Whether it is known where that is.
    is_known: bool

    @classmethod
    def of(cls, controller, subs: Sequence[Any], event, event_values) -> "AtSteps":
        at_event = tuple(
            event.root_finder is None or jnp.result_type(value) == bool
            for value in jtu.tree_leaves(event_values)
        )
        known = (diffrax.ConstantStepSize, diffrax.StepTo)
        return cls(tuple(map(save_every, subs)), at_event, type(controller) in known)

    def is_root(self, event_mask: PyTree) -> Any:
        """Whether a solve ended at a root. `False` if that cannot be."""
        pairs = zip(jtu.tree_leaves(event_mask), self.at_event, strict=True)
        masks = [mask for mask, here in pairs if not here]
        return ft.reduce(jnp.logical_or, masks) if len(masks) > 0 else False


class Constant(NamedTuple):
    """What the ends of the steps of `ConstantStepSize` are made of."""

    # The end of the first step.
    first: Any
    # What steps are spread over. Or, if they are not, anything and their size.
    start: Any
    end_or_size: Any
    # The number of the first step, and of all. Negative if they are not spread.
    number: Any
    total: Any

    def weights(self, n: Array) -> "Constant":
        """The derivative of the end of the `n`th step with respect to each."""
        dtype, adds = self.first.dtype, self.total < 0
        number, total, n = (x.astype(dtype) for x in (self.number, self.total, n))
        fraction = (number + n - 1) / jnp.maximum(total, 1)
        is_first, one = n == 1, jnp.ones((), dtype)
        weights = (
            jnp.where(adds | is_first, one, 0),
            jnp.where(adds | is_first, 0, 1 - fraction),
            jnp.where(adds, n - 1, jnp.where(is_first, 0, fraction)),
        )
        return Constant(*weights, None, None)


class Times(NamedTuple):
    """Those that can be differentiated, or the same structure with something else for
    each: gradients, or `None`; or whether they are perturbed."""

    start: Any
    end: Any
    # `SubSaveAt.ts`, or `None`, of each `SubSaveAt`.
    saved: tuple[Any, ...]
    # Those of `controller_times`.
    controller: tuple[Any, ...]
    clipped: tuple[Any, ...]
    # `None` unless all steps move.
    constant: Constant | None

    @property
    def of_steps(self) -> "Times":
        return self._replace(saved=())

    @property
    def any_of_steps(self) -> bool:
        return any(jtu.tree_leaves(self.of_steps))


def controller_times(
    controller: Any, dtype: Any
) -> tuple[tuple[Array, ...], tuple[Array, ...], PyTree]:
    """The times that a step size controller steps to; those of them, apart, with which
    the steps on either side move along; and whatever it holds of which we do not know
    what it is. `dtype` is that of the times of steps."""
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
    times, clipped = (
        tuple(jnp.asarray(x).astype(dtype) for x in ts if x is not None)
        for ts in (times, clipped)
    )
    return times, clipped, unknown


def zeros(perturbed: Times, times: Times) -> Times:
    return Times(
        *[
            jtu.tree_map(
                lambda p, t: jnp.zeros(jnp.shape(t), jnp.result_type(t)) if p else None,
                *pair,
            )
            for pair in zip(perturbed, times)
        ]
    )


def constant(controller: Any, init_state: Any) -> Constant | None:
    """Of `ConstantStepSize`. `None` for other controllers."""
    if type(controller) is not diffrax.ConstantStepSize:
        return None
    state = constant_steps(init_state.controller_state)
    number, total, start, end_or_size = map(jnp.asarray, state)
    return Constant(init_state.tnext, start, end_or_size, number, total)


def _weights(times: Times, t: Array, n: Array) -> Times:
    """The derivative of `t`, where the `n`th step ends, or if `n` is zero the first one
    starts, with respect to each. (Those of `times.clipped` are no derivatives, as other
    steps move along with these.)"""
    is_start = n == 0
    is_end = (t == times.end) & ~is_start
    is_inside = ~(is_start | is_end)
    told = [is_inside & _at(ts, t) for ts in (*times.controller, *times.clipped)]
    # One that was given twice has half of it each time, as from `jnp.minimum`.
    count = jnp.maximum(sum(jnp.sum(match) for match in told), 1).astype(t.dtype)
    told = tuple(jnp.where(match, 1 / count, 0) for match in told)
    k = len(times.controller)
    constant = None
    if times.constant is not None:
        constant = jtu.tree_map(
            lambda w: jnp.where(is_inside, w, 0), times.constant.weights(n)
        )
    start, end = is_start.astype(t.dtype), is_end.astype(t.dtype)
    return Times(start, end, (), told[:k], told[k:], constant)


def is_chosen(times: Times, t: Array, n: Array) -> Array:
    """Whether nothing that is differentiated tells the end `t` of the `n`th step."""
    weights = jtu.tree_leaves(_weights(times, t, n))
    return ~ft.reduce(jnp.logical_or, [jnp.any(w != 0) for w in weights])


def ends_where_chosen(times: Times, ends: Any) -> Array:
    """Whether a solve has ended at such a step, and not at a root."""
    is_root = jnp.asarray(ends.is_root)
    return ~is_root & is_chosen(times, ends.tprev, ends.num_steps)


def add(grads: Times, times: Times, t: Array, grad: Array, n: Array) -> Times:
    """Adds the gradient of the end of the `n`th step, at `t`, to those of what it is
    made of. `n` is zero at the start of the solve. `grad` need not be finite if it is
    not used."""

    def one(g, w):
        return None if g is None else g + jnp.where(w != 0, w * grad, 0)

    new = jtu.tree_map(one, grads.of_steps, _weights(times, t, n), is_leaf=_is_none)
    return new._replace(saved=grads.saved)


def locate(times: Times, t: Array, n: Array) -> Array:
    """`t`, where the `n`th step ends, with the derivative of what it is made of: what
    `add` is the transpose of."""
    sources = eqx.filter(times.of_steps, eqx.is_inexact_array)
    return _locate(t, sources, _weights(times, t, n))


@jax.custom_jvp
def _locate(t, sources, weights):
    del sources, weights
    return t


@_locate.defjvp
def _locate_jvp(primals, tangents):
    t, _, weights = primals
    _, t_sources, _ = tangents
    out = jtu.tree_map(
        lambda w, x: jnp.sum(jnp.where(w != 0, w * x, 0)), weights, t_sources
    )
    return t, jnp.asarray(sum(jtu.tree_leaves(out))).astype(t.dtype)


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


def _is_none(x: Any) -> bool:
    return x is None


def _at(ts: Array, t: Array) -> Array:
    # Steps end just before a jump, and start just after it.
    before, after = eqxi.prevbefore(t), eqxi.nextafter(t)
    return (ts == t) | (ts == before) | (ts == after)
