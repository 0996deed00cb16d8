"""A solve as a function of a list of arrays: what goes in, and what is left of it."""

import functools as ft
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_save_state
from . import times as times_
from .hoist import Hoisted
from .residuals import Ends, Residuals
from .segments import Segments


class Inputs(NamedTuple):
    init_state: Any
    times: times_.Times
    consts: tuple[Any, ...]
    # Whatever is in a step size controller that we do not know.
    unknown: PyTree


class Derivative(NamedTuple):
    """What does not depend on the inputs. Compared by identity."""

    hoisted: Hoisted
    # How many of the constants are those of functions of single steps.
    num_local: int
    segments: Segments
    at_steps: times_.AtSteps
    sum_over_batch: bool | Literal["auto"]
    throw: bool

    def run(self, inputs: Inputs, records: bool) -> tuple[Any, Residuals]:
        """The solve: the final state, and if it `records` what is left for the way
        back."""
        init_state, times, consts, _ = inputs
        return self.hoisted.call("run", consts, init_state, times, jnp.array(records))


class Parts(NamedTuple):
    """The inputs of a solve, and what is left of it."""

    inputs: Inputs
    ends: Ends
    residuals: Residuals
    # For each array of the final state, by number.
    shadows: dict[int, Any]


class Problem(NamedTuple):
    """The parts as a list of arrays."""

    derivative: Derivative
    static: PyTree
    treedef: Any
    size: int

    def unflatten(self, arrays: Sequence[Any]) -> Parts:
        assert len(arrays) == self.size
        return eqx.combine(jtu.tree_unflatten(self.treedef, arrays), self.static)

    @property
    def numbers(self) -> Parts:
        """Of the arrays, in their places."""
        return jtu.tree_unflatten(self.treedef, range(self.size))

    def dims_out(
        self,
        given: Sequence[int],
        varied: Sequence[tuple[int, int | None]],
        dims: Sequence[int | None],
    ) -> tuple[int | None, ...] | None:
        """Of tangents of the final state, if those of the arrays with the numbers
        `varied` have these axes. As JAX may batch a function before it is
        differentiated, and not ask again, those have an axis that the arrays have."""
        if any(d is not None and dims[i] is None for i, d in varied):
            return None
        shadows = self.numbers.shadows
        return tuple(None if dims[shadows[i]] is None else 0 for i in given)

    def final_state(self, arrays: Sequence[Array], given: Sequence[int]) -> list[Array]:
        """Those of its inexact arrays, from those of the inputs."""
        inputs = self.unflatten(arrays).inputs
        final_state, _ = self.derivative.run(inputs, records=False)
        leaves = jtu.tree_leaves(eqx.filter(final_state, eqx.is_inexact_array))
        return [leaves[i] for i in given]

    def state_shapes(self, arrays: Sequence[Any]) -> list[Any]:
        inputs = jtu.tree_unflatten(self.treedef, arrays).inputs
        leaves = jtu.tree_leaves(inputs.init_state)
        return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]

    def check_forward(self, numbers: Sequence[int]) -> None:
        clipped = jtu.tree_leaves(self.numbers.inputs.times.clipped)
        if not set(clipped).isdisjoint(numbers):
            raise NotImplementedError(
                "`adjoint=ReversibleAdjoint()` cannot differentiate in forward mode "
                "with respect to `ClipStepSizeController(step_ts=...)`. Use reverse "
                "mode, or `jax.lax.stop_gradient` if that derivative is not needed."
            )

    def loses_time(
        self, numbers: Sequence[int], tangents: Sequence[Array], arrays: Sequence[Any]
    ) -> Array | None:
        """Whether a tangent of a time matters where steps end, and it is not known how.
        `None` if there is no such tangent."""
        at_steps, parts = self.derivative.at_steps, self.unflatten(arrays)
        of_times = jtu.tree_leaves(self.numbers.inputs.times.of_steps)
        moves = [jnp.any(t != 0) for i, t in zip(numbers, tangents) if i in of_times]
        if at_steps.is_known or len(moves) == 0:
            return None
        loses = times_.ends_where_chosen(parts.inputs.times, parts.ends)
        for k in at_steps.every:
            loses = loses | ((k > 0) & (parts.ends.num_steps > k))
        return loses & ft.reduce(jnp.logical_or, moves)

    def steps_differ(self, dims: Sequence[int | None]) -> bool:
        """Whether the elements of a batch, over these axes of the arrays, may make
        different steps, or save at different times."""
        dims = dims[len(dims) - self.size :]
        inputs, ends, residuals, _ = self.numbers
        steps = (ends.num_steps, ends.tprev, ends.saved, residuals.slots.numbers)
        steps = (steps, residuals.slots.states.steps, inputs.times.saved)
        return any(dims[i] is not None for i in jtu.tree_leaves(steps))


def outputs(state) -> tuple[int, ...]:
    """The numbers of those inexact arrays in the final state, which is of the structure
    of the initial one, that depend on the inputs."""
    inexact = eqx.filter(state, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(inexact)
    numbers = jtu.tree_unflatten(treedef, range(len(leaves)))
    saves = jtu.tree_leaves(numbers.save_state, is_leaf=is_save_state)
    kept = (
        numbers.y,
        numbers.solver_state,
        numbers.tprev,
        [(s.ts, s.ys) for s in saves],
        (numbers.dense_ts, numbers.dense_infos),
        (numbers.event_tprev, numbers.event_tnext, numbers.event_dense_info),
    )
    return tuple(jtu.tree_leaves(kept))


def put(arrays: Sequence[Any], numbers: Sequence[int], new: Sequence[Any]) -> list:
    out = list(arrays)
    for i, x in zip(numbers, new, strict=True):
        out[i] = x
    return out
