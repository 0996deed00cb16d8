"""Whether what was rebuilt is what it was rebuilt for.

The backward pass compares the two wherever a state is stored, or has been recomputed:
the states themselves, element by element; and what they do to the gradient, as a stiff
operator multiplies a difference that is hardly one. If they differ, it begins anew, and
recomputes every state.
"""

import functools as ft
import math
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .._method.controlled import precision, rms
from .._method.tree import same_struct
from .coupling_pullback import comparable
from .functions import Functions, of_dtype
from .hoist import Hoister
from .pullback import Step


def tolerance(y: PyTree) -> float:
    """Of the elements of a state, relative to their sizes: half of all digits, which is
    several times what solvers let be lost before they want the next state. In half
    precision that would be less than a few roundings."""
    eps = float(precision(y).eps)
    return max(0.5 * math.sqrt(eps), 8 * eps)


# Of the gradient, as a power of that. (Larger, as what the largest difference would do
# in all of the steps is several times what it does.)
_OF_GRADIENT = 3 / 4
# What is put down to rounding, in units of it.
_FLOOR = 8


def add_functions(hoister: Hoister, solver, terms, args, step: Step) -> None:
    """Adds what is compared, and the vector field, if there is one that takes the whole
    of `y`. `step` is an example."""
    hoister.add(
        "comparable", ft.partial(comparable, solver), step.y1, step.solver_state
    )
    if not isinstance(terms, diffrax.AbstractTerm):
        return
    struct = eqx.filter_eval_shape(terms.contr, step.t0, step.t1)

    def vector_field(t0, t1, y):
        # (Of a path, any change will do.)
        control = jtu.tree_map(
            lambda x: jnp.full(x.shape, (t1 - t0).astype(x.dtype)), struct
        )
        return terms.vf_prod(t0, y, args, control)

    hoister.add("vector_field", vector_field, step.t0, step.t1, step.y1)


class Found(NamedTuple):
    """A state, as it was rebuilt and as it is known to be; and a later one. Each is a
    pair of `y` and the solver state."""

    t0: Array
    t1: Array
    rebuilt: tuple[PyTree, PyTree]
    known: tuple[PyTree, PyTree]
    # Nothing was saved in between.
    later: tuple[PyTree, PyTree]
    # Whether an element that does not change is one that has not changed since: as
    # otherwise the next step is made from what is known.
    at_rest: Array

    @property
    def y(self) -> tuple[PyTree, PyTree]:
        return self.rebuilt[0], self.known[0]

    def is_same(self, fns: Functions) -> Array:
        """Whether they are just the same. (Not but for rounding: there may be a kink
        where an element is, or where it is next to another.)"""
        a, b = [
            _arrays((state[0], fns.call("comparable", *state)))
            for state in (self.rebuilt, self.known)
        ]
        same = [jnp.all(x == y) for x, y in zip(a, b, strict=True)]
        return ft.reduce(jnp.logical_and, same, jnp.array(True))

    def differs(self, fns: Functions, change: PyTree, is_finite: Array) -> Array:
        """Whether they differ. `change` is that of `y` in the next step, or `None` if
        it is not known."""
        states = (self.rebuilt, self.known, self.later)
        rebuilt, known, later = [fns.call("comparable", *state) for state in states]
        moved = rests = None
        if change is not None:
            y, solver_state = self.known
            rests = [self.at_rest & x for x in _at_rest(y, change, known)]
            moved_y = jtu.tree_map(
                lambda x, c: x if c is None else x + c.astype(x.dtype), y, change
            )
            moved = fns.call("comparable", moved_y, solver_state)
        tol = tolerance(self.known[0])
        return _states_differ(tol, rebuilt, known, later, moved, rests, is_finite)


def differs(
    fns: Functions,
    found: Found,
    grad_y: PyTree,
    grad_consts: dict[int, Array],
    num_steps: Array,
    noise: Array,
    pred: Array,
    is_finite: Array,
) -> tuple[Array, Array]:
    """Whether the two differ, by more than would matter if they did so in `num_steps`
    steps. `grad_consts` are the gradients of constants so far. Only asked for those of
    a batch for which `pred` is true; among them it may not be known which. `is_finite`
    if the solution is, so that what has been recomputed should be.

    Returns also the new `noise`: by how much, in units of the spacing of numbers,
    rounding `y` in each of so many steps changes the loss; the most so far. (Where a
    solution is at rest the gradient with respect to a rate is made of nothing else.)"""
    tol, eps = tolerance(found.y[1]), float(precision(found.y[1]).eps)
    if len(jtu.tree_leaves(_inexact(found.y))) == 0:
        return jnp.zeros_like(pred), noise
    if "vector_field" not in fns.hoisted:
        return pred & found.differs(fns, None, is_finite), noise
    static = eqx.filter(found.y[1], eqx.is_inexact_array, inverse=True)
    grad_y = jtu.tree_map(lambda g: jnp.where(pred, g, 0), grad_y)

    def pull(y):
        y = eqx.combine(_inexact(y), static)
        change, pull_fn = fns.vjp("vector_field", (found.t0, found.t1), (y,))
        new_consts, (new_y,) = pull_fn(of_dtype(grad_y, _inexact(change)))
        return change, new_consts, new_y

    # (Side by side: then XLA compares the gradients of constants as it makes them, and
    # none takes any memory.)
    (_, *rebuilt), (change, *known) = map(pull, found.y)
    # The size of an element does not vanish where it changes its sign, nor where it is
    # yet to become anything.
    out = found.differs(fns, _inexact(change), is_finite)
    # (The same for a batch, or gradients that it shares would be one for each element.)
    num_steps = eqxi.unvmap_max(num_steps)
    new_noise = _rounding(grad_y, known[1], _inexact(found.y[1]), num_steps)
    noise = jnp.maximum(noise, eqxi.unvmap_max(new_noise.astype(noise.dtype)))
    tol = tol**_OF_GRADIENT
    for i, b in known[0].items():
        floor = _FLOOR * eps * _over_largest(noise, fns.consts[i])
        a, total = rebuilt[0][i], grad_consts[i]
        if b.size > 0:
            out = out | _gradients_differ(tol, a, b, total, floor, num_steps)
    of_y, no_floor = (rebuilt[1], known[1], grad_y), jnp.zeros_like(noise)
    for a, b, total in zip(*map(jtu.tree_leaves, of_y), strict=True):
        if b.size > 0:
            out = out | _gradients_differ(tol, a, b, total, no_floor, num_steps)
    return pred & out, noise


def _rounding(grad_y: PyTree, pulled: PyTree, y: PyTree, num_steps: Array) -> Array:
    """What rounding `y` in each step does to the loss, in units of the spacing."""
    total = jnp.zeros((), precision(y).dtype)
    for g, h, x in zip(*map(jtu.tree_leaves, (grad_y, pulled, y)), strict=True):
        # (Not of elements that nothing depends on, as one that only adds up.)
        each = jnp.where(h != 0, jnp.abs(g) * jnp.abs(x), 0)
        total = total + jnp.sum(_size(each)).astype(total.dtype)
    return num_steps.astype(total.dtype) * total


def _over_largest(a: Array, x: Array) -> Array:
    largest = _largest(x).astype(a.dtype) if x.size > 0 else jnp.zeros_like(a)
    return jnp.where(largest > 0, a / jnp.where(largest > 0, largest, 1), 0)


def _size(x: Array) -> Array:
    """Zero for what is not finite: or nothing next to it could be compared."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), 0)


def _underflow(dtype) -> float:
    """What is smaller loses more than half of its digits where what is added to it is
    flushed to zero, so that no comparison would tell anything."""
    # (Half precision is computed in single precision.)
    tiny = min(float(jnp.finfo(dtype).tiny), float(jnp.finfo(jnp.float32).tiny))
    return tiny / math.sqrt(float(jnp.finfo(dtype).eps))


def _inexact(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_inexact_array)


def _states_differ(
    tol: float,
    rebuilt: PyTree,
    known: PyTree,
    later: PyTree,
    moved: PyTree,
    rests: list[Any] | None,
    is_finite: Array,
) -> Array:
    out = jnp.array(False)
    states = (rebuilt, known, later, known if moved is None else moved)
    leaves = [*map(_arrays, states)]
    rests = [False] * len(leaves[0]) if rests is None else rests
    for a, b, *others, holds in zip(*leaves, rests, strict=True):
        if b.size == 0:
            continue
        if not eqx.is_inexact_array(b):
            out = out | jnp.any(a != b)
            continue
        eps = float(jnp.finfo(b.dtype).eps)
        size = own = _size(b)
        if moved is None:
            size = size + rms(size).astype(size.dtype)
        for x in others:
            size = jnp.maximum(size, _size(x))
        # (It may be of less precision than `y` is.)
        tol_b = max(tol, tolerance(b))
        bound = tol_b * size + _FLOOR * eps * jnp.max(size)
        # (A kink may be just there, as at zero: then rounding is not nothing.)
        bound = jnp.where(holds, tol_b * own, bound)
        bound = bound + _underflow(b.dtype)
        # (What is not finite in the solution itself cannot be cured.)
        is_lost = ~(jnp.isfinite(b) | is_finite)
        out = out | ~jnp.all((a == b) | (jnp.abs(a - b) <= bound) | is_lost)
    return out


def _at_rest(y: PyTree, change: PyTree, comparable: PyTree) -> list[Any]:
    """Of each array that is compared: which elements do not change, in `y` and in the
    registers like it; and `False` elsewhere."""
    is_like = lambda x: same_struct(x, y)
    changes = iter(jtu.tree_leaves(change))
    like_y = [eqx.is_inexact_array(x) and next(changes) == 0 for x in _arrays(y)]
    registers, others = comparable
    out = []
    for part in jtu.tree_leaves(registers, is_leaf=is_like):
        out += like_y if is_like(part) else [False] * len(_arrays(part))
    return out + [False] * len(_arrays(others))


def _arrays(tree: PyTree) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def _gradients_differ(
    tol: float, a: Array, b: Array, total: Array, floor: Array, num_steps: Array
) -> Array:
    n = num_steps.astype(jnp.finfo(b.dtype).dtype)
    eps = float(jnp.finfo(b.dtype).eps)
    bound = tol * (_size(total) + n * jnp.abs(b))
    bound = bound + 1e3 * eps * _size(_largest(total)) + n * _underflow(b.dtype)
    bound = bound + floor.astype(bound.dtype)
    return ~jnp.all((n * jnp.abs(a - b) <= bound) | ~jnp.isfinite(b))


def _largest(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return jnp.max(jnp.abs(x))
    # (Of what there is, as XLA would store `jnp.abs(x)`.)
    return jnp.maximum(jnp.max(x), -jnp.min(x))


def is_lost(recomputed: PyTree, y: PyTree) -> Array:
    """Whether a state that has been recomputed is not `y`, as it was first: by so much
    that the gradient is wrong, as rounding has led elsewhere."""
    out = jnp.array(False)
    for a, b in zip(*map(jtu.tree_leaves, map(_inexact, (recomputed, y)))):
        if b.size > 0:
            tol = float(jnp.finfo(b.dtype).eps) ** 0.25
            size = _size(b)
            bound = tol * (size + rms(size)) + _underflow(b.dtype)
            # (What is not finite in the solution itself is nothing new.)
            out = out | jnp.any(~(jnp.abs(a - b) <= bound) & jnp.isfinite(b))
    return out
