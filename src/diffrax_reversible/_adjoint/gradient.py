"""The gradient of a solve, by walking back through it."""

import functools as ft
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import is_save_state
from .._method.tree import replace
from .adjoint_step import AdjointStep
from .backward import Walk
from .batch import Batch, Level, make_batch
from .check import check
from .functions import Functions
from .linear import Marked
from .problem import Derivative, Inputs, Problem, put
from .residuals import Ends


def walk_back(
    problem: Problem,
    given: Sequence[int],
    perturbed: Sequence[int],
    grads: Sequence[Array],
    arrays: Sequence[Array],
    marked: Sequence[Marked],
    varied: Sequence[int] = (),
    has_stored: bool = True,
) -> list[Array]:
    """The gradients of the `perturbed` arrays of the inputs, from those of the `given`
    ones of the final state. It is differentiated with respect to those `varied`."""
    derivative = problem.derivative
    inputs, ends, residuals, _ = problem.unflatten(arrays)
    init_state, times, consts, _ = inputs
    grad_final_state = _of_final_state(init_state, given, grads)
    adjoint_step = _make_step(
        problem, inputs, ends, grad_final_state, perturbed, varied, marked
    )
    recompute = ft.partial(derivative.hoisted.call, "recompute", consts, times)
    backward = Walk(
        *(derivative.segments, adjoint_step, init_state, ends, residuals),
        recompute,
        has_stored,
    ).run()
    carry, fns = backward.carry, adjoint_step.fns
    (grad_y0, grad_solver_state0, grad_times), grad_consts = check(
        (carry.grad_y1, carry.grad_solver_state, carry.grad_times),
        fns.sum_consts(carry.grad_consts),
        grad_final_state,
        ends.y,
        adjoint_step.event_is_lost(),
        backward.is_lost,
        derivative.throw,
        fns.batch,
        carry.loses_time,
    )
    found = _of_inputs(
        *(inputs, grad_final_state),
        *(grad_y0, grad_solver_state0, grad_times, grad_consts),
    )
    by_number: dict[int, Array] = {}
    jtu.tree_map(
        lambda i, g: None if i is None or g is None else by_number.update({i: g}),
        problem.numbers.inputs,
        found,
        is_leaf=lambda i: i is None,
    )
    return [by_number.get(i, jnp.zeros_like(arrays[i])) for i in perturbed]


def _of_final_state(init_state, given: Sequence[int], grads: Sequence[Array]):
    """Those of the final state, which is of the structure of the initial one."""
    leaves, treedef = jtu.tree_flatten(eqx.filter(init_state, eqx.is_inexact_array))
    return jtu.tree_unflatten(treedef, put([None] * len(leaves), given, grads))


def _make_step(
    problem: Problem,
    inputs: Inputs,
    ends: Ends,
    grad_final_state,
    perturbed: Sequence[int],
    varied: Sequence[int],
    marked: Sequence[Marked],
) -> AdjointStep:
    """One step of the backward pass, for what is asked of it."""
    derivative, numbers = problem.derivative, problem.numbers.inputs
    all_perturbed = set(perturbed)
    is_perturbed: Inputs = jtu.tree_map(lambda i: i in all_perturbed, numbers)
    # (What else the steps depend on chooses where they are made, which is a constant.)
    differentiated = frozenset(
        i for i in range(derivative.num_local) if is_perturbed.consts[i] is True
    )
    perturbed_times = jtu.tree_map(
        lambda p: p is True, is_perturbed.times, is_leaf=lambda p: p is None
    )
    of_times = jtu.tree_leaves(numbers.times.of_steps)
    watches = not all_perturbed.union(varied).isdisjoint(of_times)
    fns = Functions(
        derivative.hoisted,
        inputs.consts,
        differentiated,
        perturbed_times.any_of_steps,
        _batch(derivative, problem, inputs.consts, marked),
    )
    pullback = derivative.segments.pullback.choose(
        fns, is_perturbed.init_state.solver_state
    )
    if derivative.sum_over_batch == "auto" and not _is_worth_a_sum(fns, ends.y):
        fns = fns._replace(batch=Batch((), inputs.consts))
    return AdjointStep(
        fns=fns,
        pullback=pullback,
        ends=ends,
        grad_final_state=grad_final_state,
        times=inputs.times,
        perturbed=perturbed_times,
        at_steps=derivative.at_steps,
        watches=watches and not derivative.at_steps.is_known,
    )


def _of_inputs(
    inputs: Inputs,
    grad_final_state,
    grad_y0: PyTree,
    grad_solver_state0: PyTree,
    grad_times: PyTree,
    grad_consts: dict[int, Any],
) -> Inputs:
    """Those that are known, where they belong."""
    grad_init_state = jtu.tree_map(
        lambda _: None, eqx.filter(inputs.init_state, eqx.is_inexact_array)
    )
    grad_init_state = replace(
        grad_init_state,
        y=grad_y0,
        solver_state=grad_solver_state0,
        # What was saved during the loop went into places that were empty before it, so
        # there is no need to put zeros there.
        dense_ts=grad_final_state.dense_ts,
        save_state=jtu.tree_map(
            lambda s, g: replace(s, ts=g.ts, ys=g.ys),
            grad_init_state.save_state,
            grad_final_state.save_state,
            is_leaf=is_save_state,
        ),
    )
    of_consts = tuple(grad_consts.get(i) for i in range(len(inputs.consts)))
    nothing = jtu.tree_map(lambda _: None, inputs.unknown)
    return Inputs(grad_init_state, grad_times, of_consts, nothing)


def _batch(
    derivative: Derivative,
    problem: Problem,
    consts: Sequence[Any],
    marked: Sequence[Marked],
) -> Batch:
    """Those levels over which gradients may be summed step by step."""
    if derivative.sum_over_batch is False:
        return Batch((), tuple(consts))
    inputs = problem.numbers.inputs
    levels = []
    for level, mark in marked:
        # (Over devices: these would exchange their sums in every step.)
        if level.spmd_name is not None:
            continue
        dims = level.dims[len(level.dims) - problem.size :]
        is_batched = tuple(i is not None and dims[i] is not None for i in inputs.consts)
        differ = problem.steps_differ(level.dims)
        levels.append(Level(mark, level.size, level.name, is_batched, differ))
    return make_batch(levels, consts)


# A sum over a batch makes XLA compute what it is made of once more, unless these are
# products of matrices or convolutions: then there are more parameters for each number
# than in pointwise functions.
_MANY_PARAMETERS = 4


def _is_worth_a_sum(fns: Functions, y: PyTree) -> bool:
    if jax.device_count() > 1:
        # The batch may be split over them, which cannot be known here.
        return False
    num_parameters = sum(fns.consts[i].size for i in fns.differentiated)
    size = sum(map(jnp.size, jtu.tree_leaves(y)))
    return num_parameters > _MANY_PARAMETERS * size
