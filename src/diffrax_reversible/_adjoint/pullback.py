"""Undoing one step, and pulling a gradient back through it.

There are two ways. `GenericPullback`, in here, needs nothing but `backward_step` and
`step`. `CouplingPullback` uses that the step is a sequence of couplings.

Both work in two parts, so that the values saved during the step, which need what was
rebuilt, can be differentiated in between: `rebuild` returns the start of the step and a
function `pull`.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._method.base import AbstractReversibleSolver
from .._method.tree import same_struct
from .functions import Functions
from .hoist import Hoister


class Step(NamedTuple):
    """A step to be undone."""

    t0: Array
    t1: Array
    y1: PyTree
    # At `t1`, but for its recorded part, which is that at `t0`.
    solver_state: PyTree
    made_jump: Any

    @classmethod
    def example(cls, init_state, made_jump: Any) -> "Step":
        """Of the same structure, shapes and dtypes."""
        times = (init_state.tprev, init_state.tnext)
        return cls(*times, init_state.y, init_state.solver_state, made_jump)


class Start(NamedTuple):
    """What is known of the start of a step without undoing it."""

    # Whether it is known.
    is_known: Array
    # Whether it is asked for what it is rebuilt as, even so, in any of a batch.
    is_rebuilt: Array
    y: PyTree
    solver_state: PyTree
    # Of Brownian motions, in the step; or none, if they are not stored.
    increments: list[list[PyTree]]

    def choose(self, y: PyTree, solver_state: PyTree) -> tuple[PyTree, PyTree]:
        """It, or else what was rebuilt."""
        return self.select((self.y, self.solver_state), (y, solver_state))

    def select(self, known: PyTree, rebuilt: PyTree) -> PyTree:
        def one(a, b):
            return jnp.where(self.is_known, a, b) if eqx.is_array(b) else b

        return jtu.tree_map(one, known, rebuilt)


class Grads(NamedTuple):
    """Of the start of a step, and what the step depends on."""

    # By number.
    consts: dict[int, Any]
    y0: PyTree
    solver_state: PyTree
    # `None` unless they vary.
    t0: Array | None
    t1: Array | None


class Rebuilt(NamedTuple):
    # As they were rebuilt, whatever is known; or anything, if that is not asked for.
    y0: PyTree
    solver_state: PyTree
    # `None` unless it was asked for.
    dense_info: PyTree
    # (grad_y1, grad_solver_state1, grad_dense_info or None) -> (Grads, carry)
    pull: Callable


class AbstractPullback(abc.ABC):
    # That of the loop.
    solver: diffrax.AbstractSolver
    # Whether a step can be undone; otherwise its start has to be known.
    undoes: bool = True
    # How many stages the function that is differentiated consists of, if they are
    # evaluations of one term and not made by the host's loop.
    num_unrolled: int = 1
    # Whether what is within a stage is recomputed to be differentiated.
    recomputes_stages: bool = False
    # What can stand in for this one, with the same functions, where it is not enough.
    fallback: "AbstractPullback | None" = None

    @property
    def name_of_differentiated(self) -> str:
        return "step"

    @abc.abstractmethod
    def add_functions(self, hoister: Hoister, terms, args, step: Step):
        """Adds those functions that will be needed. `step` is an example."""

    def choose(
        self, fns: Functions, perturbed_solver_state: PyTree
    ) -> "AbstractPullback":
        """That which can do what is asked for."""
        del fns, perturbed_solver_state
        return self

    def prepare(self, terms, args, state) -> PyTree:
        """The solver state from which the loop is to start, from the host's state. (It
        is outside of what we differentiate.)"""
        del terms, args
        return state.solver_state

    def finish(self, initial: PyTree, final: PyTree, num_steps: Array) -> PyTree:
        """The solver state that the host would have at the end, from that before
        `prepare` and that at the end of the loop."""
        del initial, num_steps
        return final

    def stored(self, solver_state: PyTree) -> PyTree:
        """What has to be stored of a solver state."""
        return solver_state

    def resumed(self, terms, args, t, y, stored, initial, is_start) -> PyTree:
        """The solver state from which the loop can go on. `initial` is that at the
        start of the solve, which this is if `is_start`."""
        del terms, args, t, y, initial, is_start
        return stored

    def of_step(self, stored: PyTree, initial: PyTree, is_start: Array) -> PyTree:
        """The solver state of which a step is differentiated as a function."""
        del initial, is_start
        return stored

    def stop_recorded(self, y: PyTree, solver_state: PyTree) -> PyTree:
        """What is a constant in the solver state at the end of a solve is one."""
        del y
        return solver_state

    def start(
        self, fns: Functions, t1: Array, y1: PyTree, grad_solver_state, num_steps: Array
    ) -> tuple[dict[int, Any], list[Array], PyTree, PyTree]:
        """What becomes of the gradient of the solver state at the end of a solve:
        gradients of constants, of `t1` (if it varies) and of `y1`, or `None`; and what
        is left of it."""
        del fns, t1, y1, num_steps
        return {}, [], None, grad_solver_state

    def undone(self, fns: Functions, step: Step) -> tuple[PyTree, PyTree] | None:
        """What a step is undone to; or `None` if that is known to be its start, but for
        rounding."""
        del fns, step

    @abc.abstractmethod
    def prime(self, fns: Functions, t1, y1, solver_state) -> PyTree:
        """What is carried from step to step, before the first."""

    @abc.abstractmethod
    def rebuild(
        self,
        fns: Functions,
        carry: PyTree,
        step: Step,
        start: Start,
        want_dense_info: bool,
    ) -> Rebuilt:
        """Undoes a step. It is differentiated at its start, if that is known, and else
        at what that is rebuilt as."""


def add_step(hoister: Hoister, solver, terms, args, step: Step) -> PyTree:
    """Adds a step forwards. Returns the structure of its output."""

    def make_step(made_jump, t0, t1, y0, solver_state):
        y1, _, dense_info, solver_state, _ = solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, solver_state, dense_info

    example = (step.made_jump, step.t0, step.t1, step.y1, step.solver_state)
    return hoister.add("step", make_step, *example)


class GenericPullback(AbstractPullback):
    solver: AbstractReversibleSolver

    def __init__(self, solver: AbstractReversibleSolver):
        self.solver = solver

    def add_functions(self, hoister, terms, args, step):
        solver = self.solver

        def _backward_step(made_jump, t0, t1, y1, solver_state):
            y0, _, solver_state = solver.backward_step(
                terms, t0, t1, y1, args, solver_state, made_jump
            )
            return y0, solver_state

        example = (step.made_jump, step.t0, step.t1, step.y1, step.solver_state)
        y1, solver_state1, _ = add_step(hoister, solver, terms, args, step)
        y0, solver_state0 = hoister.add("backward_step", _backward_step, *example)
        for name, before, after in (
            ("y0", y0, y1),
            ("solver_state", solver_state0, solver_state1),
        ):
            if not same_struct(before, after):
                raise ValueError(
                    f"`{type(solver).__name__}.backward_step` must return `{name}` of "
                    "the structure, shapes and dtypes that `step` takes and returns. "
                    f"Got {eqx.tree_pformat(before)}, expected "
                    f"{eqx.tree_pformat(after)}."
                )

    def prime(self, fns, t1, y1, solver_state):
        return None

    def rebuild(self, fns, carry, step, start, want_dense_info):
        times = (step.t0, step.t1)
        rebuilt = self._rebuilt(fns, step, start)
        y0, solver_state0 = start.choose(*rebuilt)
        constant, varying = fns.split_times((step.made_jump,), times)
        (_, _, dense_info), pull_step = fns.vjp(
            "step", constant, (*varying, y0, solver_state0)
        )

        def pull(grad_y1, grad_solver_state1, grad_dense_info):
            grad_consts, (*grad_times, grad_y0, grad_solver_state0) = pull_step(
                (grad_y1, grad_solver_state1, grad_dense_info)
            )
            grad_t0, grad_t1 = grad_times if fns.times_vary else (None, None)
            return (
                Grads(grad_consts, grad_y0, grad_solver_state0, grad_t0, grad_t1),
                carry,
            )

        return Rebuilt(rebuilt[0], rebuilt[1], dense_info, pull)

    def _rebuilt(self, fns, step, start) -> tuple[PyTree, PyTree]:
        """The start of a step, if that is asked for."""
        known, static = eqx.partition((start.y, start.solver_state), eqx.is_array)
        rebuilt = lax.cond(
            start.is_rebuilt,
            lambda: eqx.filter(self.undone(fns, step), eqx.is_array),
            lambda: known,
        )
        return eqx.combine(rebuilt, static)

    def undone(self, fns, step):
        return fns.call(
            "backward_step",
            step.made_jump,
            step.t0,
            step.t1,
            step.y1,
            step.solver_state,
        )
