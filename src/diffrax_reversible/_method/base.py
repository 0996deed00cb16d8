import abc
from typing import Any, TypeVar

import diffrax
import equinox as eqx
import jax.tree_util as jtu

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, Terms, Y


_SolverState = TypeVar("_SolverState")


class AbstractReversibleSolver(diffrax.AbstractSolver[_SolverState]):
    """Abstract base class for solvers whose steps can be undone. Subclass it to use a
    solver of your own with [`diffrax_reversible.ReversibleAdjoint`][].

    A subclass is a [`diffrax.AbstractSolver`][] with one more method,
    [`diffrax_reversible.AbstractReversibleSolver.backward_step`][]; nothing else is
    required. On the backward pass each step is undone by `backward_step` and
    differentiated by taking the VJP of `step`, which together cost about two
    evaluations of the step and one pullback. Write a solver that is a sequence of
    affine couplings as a [`diffrax_reversible.AbstractCouplingSolver`][] instead: that
    gets `step`, `backward_step` and a pullback of about half the cost from a single
    definition.

    If some steps cannot be undone, or not without a loss of accuracy, override
    `needs_checkpoint` or `wants_checkpoint`. If a part of the solver state cannot be
    rebuilt, override `recorded`.
    """

    @abc.abstractmethod
    def backward_step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState]:
        """Undoes a single step of the solver.

        **Arguments:**

        - `terms`: The PyTree of terms representing the vector fields and controls.
        - `t0`: The start of the interval that the step was made over.
        - `t1`: The end of the interval that the step was made over; `t0 < t1`, as for
            `step`.
        - `y1`: The solution at `t1`, as returned by `step`.
        - `args`: Any extra arguments passed to the vector field.
        - `solver_state`: The solver state at `t1`, as returned by `step`; but for the
            parts of it that are selected by `recorded`, which have the values that
            they had at `t0`.
        - `made_jump`: The value that was passed to `step`.

        **Returns:**

        A tuple of three objects:

        - The solution at `t0`, of the structure, shapes and dtypes of `y1`.
        - The dictionary of information that is passed to the solver's interpolation
            routine for dense output over `[t0, t1]`, as returned by `step`.
        - The solver state at `t0`.

        [`diffrax_reversible.ReversibleAdjoint`][] compares `y` and the solver state,
        but for what is recorded, with what was stored: floating-point numbers to about
        half of their digits, and all others exactly. What differs is recomputed.
        """

    def recorded(self, solver_state: Any) -> Any:
        """Selects the part of the solver state that cannot be rebuilt, and does not
        depend on `y`: times, counters, and the like.

        **Arguments:**

        - `solver_state`: The solver state.

        **Returns:**

        A node or a sequence of nodes of `solver_state`, as for the `where` of
        `equinox.tree_at`. By default, nothing.

        What is selected is recorded at the start of every accepted step, and handed to
        `backward_step` as a part of its `solver_state`. It costs its own size in memory
        for every step, and is a constant when a step is differentiated.
        """
        del solver_state
        return ()

    def rebuilt(self, solver_state: Any) -> Any:
        """Selects the part of the solver state that is compared with what is stored.

        **Arguments:**

        - `solver_state`: The solver state, as it was stored, or as `backward_step`
            returned it.

        **Returns:**

        A PyTree. By default, all but what `recorded` selects. Leave out what
        `backward_step` does not rebuild as nothing depends on it there: an account from
        which `wants_checkpoint` is told, say.
        """
        where = lambda state: jtu.tree_leaves(self.recorded(state))
        recorded = where(solver_state)
        if len(recorded) == 0:
            return solver_state
        return eqx.tree_at(where, solver_state, [None] * len(recorded))

    def needs_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        """Whether an accepted step cannot be undone by `backward_step`. If so then `y`
        and the solver state at its start are stored (or recomputed from what is), and
        take the place of what `backward_step` returns.

        **Arguments:**

        - `solver_state`: The solver state at the start of the step.
        - `new_solver_state`: The solver state that `step` returned.
        - `made_jump`: The value that was passed to `step`.

        **Returns:**

        A boolean. By default the Python value `False`, for a solver of which every step
        can be undone.
        """
        del solver_state, new_solver_state, made_jump
        return False

    def wants_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        """Whether `y` and the solver state at the start of an accepted step should be
        stored although `backward_step` can rebuild them: for example because rounding
        errors would have grown by too much between the end of the solve and there.

        **Arguments:** As for
        [`diffrax_reversible.AbstractReversibleSolver.needs_checkpoint`][].

        **Returns:**

        A boolean. By default the Python value `False`.
        """
        del solver_state, new_solver_state, made_jump
        return False
