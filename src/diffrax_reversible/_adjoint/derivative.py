"""The derivative of a solve, in forward and in reverse mode, and its derivative.

Of the final state $F(x)$, where $x$ is all that goes in, there are four functions, each
linear in one of its arguments (see `linear`):

| function | | of | its transpose |
|---|---|---|---|
| `_Tangent` | $F'(x) v$ | $v$ | `_Gradient` |
| `_Gradient` | $F'(x)^T g$ | $g$ | `_Tangent` |
| `_Hessian` | $(g \\cdot F)''(x) v$ | $v$ | itself |
| `_SecondTangent` | $F''(x)(u, v)$ | $v$ | `_Hessian`, as a function of $g$ |

The first runs the loop forwards, with tangents; so does the last. The second walks
back. The third is the derivative in forward mode of a backward pass on which nothing is
rebuilt: all states are recomputed from the start, by `step`. (What is rebuilt from
something that counts as a constant has the right value, but not the right tangent.)
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .check import check_time
from .gradient import walk_back
from .linear import AbstractLinear, apply
from .problem import Derivative, Inputs, outputs, Parts, Problem, put
from .residuals import Ends, Residuals


def differentiate(
    derivative: Derivative, inputs: Inputs, final_state, residuals: Residuals, tangents
) -> PyTree:
    """The tangent of the final state, given that of `inputs`. `None` is zero."""
    if len(jtu.tree_leaves(tangents.unknown)) > 0:
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` cannot differentiate with respect to what a "
            "step size controller holds that is not one of diffrax's own. Use "
            "`jax.lax.stop_gradient` on it if its gradient is not needed, or else "
            "`adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    state_leaves, state_treedef = jtu.tree_flatten(
        eqx.filter(final_state, eqx.is_inexact_array)
    )
    given = outputs(inputs.init_state)
    # Empty, but batched as these are.
    shadows = {i: jnp.ravel(state_leaves[i])[:0] for i in given}
    is_root = derivative.at_steps.is_root(final_state.event_mask)
    parts = Parts(inputs, Ends.of(final_state, residuals, is_root), residuals, shadows)
    arrays, static = eqx.partition(parts, eqx.is_array)
    arrays, treedef = jtu.tree_flatten(arrays)
    problem = Problem(derivative, static, treedef, len(arrays))
    paired = jtu.tree_map(
        lambda t, i: None if t is None else (i, t),
        tangents,
        problem.numbers.inputs,
        is_leaf=_is_none,
    )
    pairs = [x for x in jtu.tree_leaves(paired, is_leaf=_is_pair) if _is_pair(x)]
    out: list[Any] = [None] * len(state_leaves)
    if len(pairs) > 0:
        perturbed = tuple(i for i, _ in pairs)
        found = apply(
            _Tangent(problem, given, perturbed), [t for _, t in pairs], arrays
        )
        for i, t in zip(given, found, strict=True):
            out[i] = t
    return jtu.tree_unflatten(state_treedef, out)


def _is_none(x):
    return x is None


def _is_pair(x):
    return type(x) is tuple and len(x) == 2 and isinstance(x[0], int)


def _struct(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _subset(xs: Sequence[int], which: Sequence[int]) -> tuple[int, ...]:
    return tuple(xs[i] for i in which)


class _OfSolve(AbstractLinear):
    problem: Problem

    @property
    def effects(self):
        return self.problem.derivative.hoisted.effects


class _Tangent(_OfSolve):
    def __init__(self, problem: Problem, given, perturbed):
        self.problem = problem
        # Which arrays of the final state, and which of the inputs.
        self.given = given
        self.perturbed = perturbed

    def shapes(self, linear, others):
        shapes = self.problem.state_shapes(others)
        return [_struct(shapes[i]) for i in self.given]

    def dims_out(self, dims):
        dims, others = dims[: len(self.perturbed)], dims[len(self.perturbed) :]
        varied = list(zip(self.perturbed, dims, strict=True))
        return self.problem.dims_out(self.given, varied, others)

    def __call__(self, linear, others, batch):
        self.problem.check_forward(self.perturbed)

        def fn(*values):
            arrays = put(others, self.perturbed, values)
            return self.problem.final_state(arrays, self.given)

        primals = [others[i] for i in self.perturbed]
        _, out = jax.jvp(fn, primals, list(linear))
        loses_time = self.problem.loses_time(self.perturbed, linear, others)
        return check_time(out, loses_time, self.problem.derivative.throw)

    def transpose(self, given, perturbed):
        given, perturbed = (
            _subset(self.given, given),
            _subset(self.perturbed, perturbed),
        )
        return _Gradient(self.problem, given, perturbed)

    def differentiate(self, linear, others, tangents):
        own = _of_inputs(self.problem, tangents)
        if len(own) == 0:
            return None
        fn = _SecondTangent(self.problem, self.given, self.perturbed, tuple(own))
        return apply(fn, list(own.values()), [*linear, *others])


class _Gradient(_OfSolve):
    def __init__(self, problem: Problem, given, perturbed):
        self.problem = problem
        self.given = given
        self.perturbed = perturbed

    def shapes(self, linear, others):
        return [_struct(others[i]) for i in self.perturbed]

    def keeps_name(self, dims):
        return not self.problem.steps_differ(dims)

    def __call__(self, linear, others, batch):
        return walk_back(
            self.problem, self.given, self.perturbed, linear, others, batch
        )

    def transpose(self, given, perturbed):
        perturbed, given = (
            _subset(self.perturbed, given),
            _subset(self.given, perturbed),
        )
        return _Tangent(self.problem, given, perturbed)

    def differentiate(self, linear, others, tangents):
        own = _of_inputs(self.problem, tangents)
        if len(own) == 0:
            return None
        fn = _Hessian(self.problem, self.given, self.perturbed, tuple(own))
        return apply(fn, list(own.values()), [*linear, *others])


def _of_inputs(problem: Problem, tangents: dict[int, Array]) -> dict[int, Array]:
    """(What is left of the solve is a function of the inputs.)"""
    numbers = set(jtu.tree_leaves(problem.numbers.inputs))
    return {i: t for i, t in tangents.items() if i in numbers}


class _Second(_OfSolve):
    def __init__(self, problem: Problem, given, perturbed, varied):
        self.problem = problem
        self.given = given
        self.perturbed = perturbed
        # With respect to which of the inputs it is differentiated once more.
        self.varied = varied

    def differentiate(self, linear, others, tangents):
        raise NotImplementedError(
            "`adjoint=ReversibleAdjoint()` has no third derivatives. Use "
            "`adjoint=diffrax.DirectAdjoint()`."
        )


class _Hessian(_Second):
    """Linear in the direction, or if `of_gradient` in the gradient that is pulled back;
    the other of them comes first among `others`."""

    of_gradient: bool = False

    def keeps_name(self, dims):
        return not self.problem.steps_differ(dims)

    def shapes(self, linear, others):
        arrays = others[len(others) - self.problem.size :]
        return [_struct(arrays[i]) for i in self.perturbed]

    def __call__(self, linear, others, batch):
        self.problem.check_forward(self.varied)
        k = len(others) - self.problem.size
        first, arrays = others[:k], others[k:]
        gradient, direction = (linear, first) if self.of_gradient else (first, linear)

        def fn(*values):
            return walk_back(
                self.problem,
                self.given,
                self.perturbed,
                gradient,
                put(arrays, self.varied, values),
                batch,
                varied=self.varied,
                has_stored=False,
            )

        primals = [arrays[i] for i in self.varied]
        _, out = jax.jvp(fn, primals, list(direction))
        return out

    def transpose(self, given, perturbed):
        if self.of_gradient:
            return _SecondTangent(
                self.problem,
                _subset(self.given, perturbed),
                self.varied,
                _subset(self.perturbed, given),
            )
        return _Hessian(
            self.problem,
            self.given,
            _subset(self.varied, perturbed),
            _subset(self.perturbed, given),
        )


class _HessianOfGradient(_Hessian):
    of_gradient = True


class _SecondTangent(_Second):
    def shapes(self, linear, others):
        shapes = self.problem.state_shapes(others[len(self.perturbed) :])
        return [_struct(shapes[i]) for i in self.given]

    def dims_out(self, dims):
        varied = list(zip((*self.varied, *self.perturbed), dims))
        return self.problem.dims_out(self.given, varied, dims[len(varied) :])

    def __call__(self, linear, others, batch):
        self.problem.check_forward((*self.perturbed, *self.varied))
        k = len(self.perturbed)
        direction, arrays = others[:k], others[k:]

        def fn(*values):
            return self.problem.final_state(
                put(arrays, all_numbers, values), self.given
            )

        all_numbers = tuple(sorted({*self.perturbed, *self.varied}))

        def first(*values):
            zeros = [jnp.zeros_like(x) for x in values]
            tangents = _put_at(zeros, all_numbers, self.perturbed, direction)
            return jax.jvp(fn, list(values), tangents)[1]

        primals = [arrays[i] for i in all_numbers]
        zeros = [jnp.zeros_like(x) for x in primals]
        tangents = _put_at(zeros, all_numbers, self.varied, linear)
        _, out = jax.jvp(first, primals, tangents)
        both = (*self.perturbed, *self.varied), (*direction, *linear)
        loses_time = self.problem.loses_time(*both, arrays)
        return check_time(out, loses_time, self.problem.derivative.throw)

    def transpose(self, given, perturbed):
        return _HessianOfGradient(
            self.problem,
            _subset(self.given, given),
            _subset(self.varied, perturbed),
            self.perturbed,
        )


def _put_at(zeros, all_numbers, numbers, values):
    out = list(zeros)
    for i, x in zip(numbers, values, strict=True):
        out[all_numbers.index(i)] = x
    return out
