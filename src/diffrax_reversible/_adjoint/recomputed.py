"""Pulling a gradient back through a step that is not undone, as its start is recomputed
or was stored. This is the one place where it matters what kind of solver that is.

A solver has two forms here: one for the loop over steps, and one that is
differentiated. What the loop carries and does not have to be stored is found anew.
"""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._jax_compat import eqxi
from .._method.explicit_rk import Checkpointed, NOT_THERE, num_evaluations
from .._method.tree import tree_where
from .._solver.bases import is_given_by_tableau
from .._solver.unrolled import cast_like, Unrolled
from .noise import Noise
from .pullback import AbstractPullback, Grads, Rebuilt


class StepPullback(AbstractPullback):
    """Of any solver: by the VJP of its own `step`."""

    # (It is differentiated in forward mode at most.)
    solver: diffrax.AbstractSolver
    undoes = False

    def __init__(
        self, solver: diffrax.AbstractSolver, interpolates: bool, noise: Noise
    ):
        self.solver = _with_stages(solver, "lax")
        self._differentiated = _with_stages(solver, "bounded")
        self._noise = noise
        # Whether there may be output in between the steps.
        self._interpolates = interpolates

    def prepare(self, terms, args, state):
        """At the first step a Runge--Kutta solver of diffrax has no slope yet, and then
        it evaluates that of all elements of a batch. On the backward pass these come to
        their first steps one by one. So it is evaluated here."""
        if not self._has_slope(state.solver_state):
            return state.solver_state
        first_step, f0 = state.solver_state
        t0, y0 = state.tprev, state.y
        slope = lambda: jtu.tree_map(
            lambda a, b: a.astype(b.dtype), self.solver.func(terms, t0, y0, args), f0
        )
        f0 = lax.cond(
            eqxi.unvmap_any(first_step),
            lambda: tree_where(first_step, slope(), f0),
            lambda: f0,
        )
        return jnp.zeros_like(first_step), f0

    def _has_slope(self, solver_state: PyTree) -> bool:
        host = diffrax.AbstractRungeKutta
        has_init = getattr(type(self._differentiated), "init", None) is host.init
        return has_init and solver_state is not None

    def finish(self, initial, final, num_steps):
        if self._has_slope(initial):
            return tree_where(num_steps == 0, initial, final)
        return final

    def add_functions(self, hoister, terms, args, step):
        for dense in (False, True) if self._interpolates else (False,):
            fn = ft.partial(self._step, terms, args, dense)
            state = self.of_step(
                self.stored(step.solver_state), step.solver_state, jnp.array(True)
            )
            example = (step.made_jump, step.t0, step.t1, step.y1, state)
            hoister.add(_name(dense), fn, *example)
            if self._noise.is_asked:
                again = ft.partial(self._step_again, fn)
                increments = self._noise.no_increments()
                hoister.add(_again(_name(dense)), again, increments, *example)
        if self._noise.is_asked:
            hoister.add("paths", lambda: self._noise.path_arrays)

    def _step_again(self, fn, increments, *args):
        """The same, with the increments of Brownian motions."""
        return self._noise.make_again(lambda: fn(*args), increments)

    def _step(self, terms, args, dense, made_jump, t0, t1, y0, solver_state):
        y1, _, dense_info, solver_state, _ = self._differentiated.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return y1, solver_state, dense_info if dense else None

    def prime(self, fns, t1, y1, solver_state):
        return None

    def rebuild(self, fns, carry, step, start, want_dense_info):
        times = (step.t0, step.t1)
        constant, varying = fns.split_times((step.made_jump,), times)
        name = _name(want_dense_info)
        has_increments = len(start.increments) > 0
        # (They are stored as constants.)
        if has_increments and not (fns.times_vary or fns.depends("paths")):
            name, constant = _again(name), (start.increments, *constant)
        (_, _, dense_info), pull_step = fns.vjp(
            name, constant, (*varying, start.y, start.solver_state)
        )

        def pull(grad_y1, grad_solver_state1, grad_dense_info):
            grad_consts, (*grad_times, grad_y0, grad_solver_state0) = pull_step(
                (grad_y1, self._grad_out(grad_solver_state1), grad_dense_info)
            )
            grad_t0, grad_t1 = grad_times if fns.times_vary else (None, None)
            return (
                Grads(grad_consts, grad_y0, grad_solver_state0, grad_t0, grad_t1),
                carry,
            )

        return Rebuilt(start.y, start.solver_state, dense_info, pull)

    def _grad_out(self, grad_solver_state1: PyTree) -> PyTree:
        return grad_solver_state1


def _name(dense: bool) -> str:
    return "step_dense" if dense else "step"


def _again(name: str) -> str:
    return f"{name}_again"


def _with_stages(solver: Any, kind: str) -> Any:
    """With a loop over stages of this kind, unless the user has chosen another."""
    hosts = (diffrax.AbstractRungeKutta, diffrax.AbstractSRK)
    # (Not `isinstance`, which looks through wrappers.)
    has_stages = lambda x: issubclass(type(x), hosts)

    def choose(x):
        if has_stages(x) and x.scan_kind is None:
            return eqx.tree_at(
                lambda s: s.scan_kind, x, kind, is_leaf=lambda k: k is None
            )
        return x

    return jtu.tree_map(choose, solver, is_leaf=has_stages)


class ExplicitPullback(StepPullback):
    """Of an explicit Runge--Kutta solver that is given by its tableau: with the stages
    unrolled. What is within one of them is recomputed if all of that would take more
    memory than the default adjoint does.

    Its state is the slope at the start of a step, if it is first-same-as-last. That is
    a function of `y`, so it is not stored. But at the start of a solve it may be given,
    and be another.
    """

    solver: Unrolled

    def __init__(self, solver: diffrax.AbstractERK, interpolates: bool, noise: Noise):
        self.solver = Unrolled(solver)
        assert isinstance(solver.tableau, diffrax.ButcherTableau)
        self.num_unrolled = num_evaluations(solver.tableau)
        self._differentiated = solver
        self._noise = noise
        self._interpolates = interpolates

    def stored(self, solver_state):
        del solver_state
        return None

    def resumed(self, terms, args, t, y, stored, initial, is_start):
        del stored
        if initial is None:
            return None
        no, f0 = initial
        return no, tree_where(is_start, f0, cast_like(terms.vf(t, y, args), f0))

    def of_step(self, stored, initial, is_start):
        del stored
        if initial is None:
            return None
        _, f0 = initial
        return is_start, f0

    def _step(self, terms, args, dense, made_jump, t0, t1, y0, solver_state):
        if self.recomputes_stages:
            terms = Checkpointed(terms)
        f0 = NOT_THERE
        if solver_state is not None:
            is_given, f0 = solver_state
            if made_jump is not False:
                is_given = is_given & ~made_jump
            f0 = tree_where(is_given, f0, cast_like(terms.vf(t0, y0, args), f0))
        y1, _, dense_info, _ = self.solver.make(terms, t0, t1, y0, args, f0)
        return y1, None, dense_info if dense else None

    def add_functions(self, hoister, terms, args, step):
        super().add_functions(hoister, terms, args, step)
        if step.solver_state is not None:
            _, f0 = step.solver_state
            slope = lambda t, y: cast_like(terms.vf(t, y, args), f0)
            hoister.add("slope", slope, step.t0, step.y1)

    def start(self, fns, t1, y1, grad_solver_state, num_steps):
        # The slope at the end is a function of `y` there, if there was a step.
        if grad_solver_state is None:
            return super().start(fns, t1, y1, grad_solver_state, num_steps)
        is_end = num_steps > 0
        nothing, grad_f = grad_solver_state
        zeros = jtu.tree_map(jnp.zeros_like, grad_f)
        constant, varying = fns.split_times((), (t1,))
        _, pull = fns.vjp("slope", constant, (*varying, y1))
        grad_consts, (*grad_t1, grad_y1) = pull(tree_where(is_end, grad_f, zeros))
        grad_solver_state = nothing, tree_where(is_end, zeros, grad_f)
        return grad_consts, grad_t1, grad_y1, grad_solver_state

    def _grad_out(self, grad_solver_state1):
        return None


def make_recomputed(
    solver: diffrax.AbstractSolver, interpolates: bool, noise: Noise
) -> StepPullback:
    # (With an `init` of its own its state may be anything.)
    has_init = getattr(type(solver), "init", None) is diffrax.AbstractRungeKutta.init
    if has_init and is_given_by_tableau(solver):
        return ExplicitPullback(
            solver,  # pyright: ignore[reportArgumentType]
            interpolates,
            noise,
        )
    return StepPullback(solver, interpolates, noise)
