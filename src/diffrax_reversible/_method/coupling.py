import abc
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import diffrax
import jax.lax as lax

from .._compat import Args, BoolScalarLike, DenseInfo, PyTree, RealScalarLike, Terms, Y
from .affine import Coupling, Registers, StepInfo
from .base import AbstractReversibleSolver
from .tree import stop_gradient


_SolverState = TypeVar("_SolverState")


class AbstractCouplingSolver(AbstractReversibleSolver[_SolverState]):
    """Abstract base class for solvers whose steps are sequences of affine couplings.
    Subclass it to get `step`, `backward_step` and a cheap pullback from a single
    definition.

    `y` and the solver state are taken apart into *registers*, the variables that the
    couplings update in turn. Define `split` and `merge` (to registers and back),
    `couplings` (a step), and `finish` (the error estimate and dense output), next to
    what every [`diffrax.AbstractSolver`][] has.

    **Attributes:**

    - `permutation`: The indices of the registers at the end of a step, in the order in
        which they start the next one, as a tuple. By default `None`: they stay so.
    - `has_evaluate`: Whether the last coupling of a step shares an evaluation with the
        first coupling of the next, and the solver has `evaluate`. By default `False`.

    With [`diffrax_reversible.ReversibleAdjoint`][] each `shift` is evaluated once to
    undo the step and to differentiate it: if a step makes `s` evaluations of the vector
    field then the backward pass makes `s` evaluations and `s` pullbacks of it for that
    step.

    !!! example

        The asynchronous leapfrog integrator: the registers are `y` and a velocity `v`,
        which is part of the solver state.

        ```python
        import diffrax
        import diffrax_reversible as dfxr
        import jax

        class AsynchronousLeapfrog(dfxr.AbstractCouplingSolver):
            term_structure = diffrax.ODETerm
            interpolation_cls = diffrax.LocalLinearInterpolation

            def order(self, terms):
                return 2

            def init(self, terms, t0, t1, y0, args):
                return terms.vf(t0, y0, args)

            def func(self, terms, t0, y0, args):
                return terms.vf(t0, y0, args)

            def split(self, y, solver_state):
                return dfxr.Registers((y, solver_state))

            def merge(self, registers):
                return registers.registers

            def couplings(self):
                return (
                    dfxr.Coupling(0, self._drift),
                    dfxr.Coupling(1, self._kick, scale=-1.0),
                    dfxr.Coupling(0, self._drift),
                )

            def _drift(self, step, registers):
                _, v = registers
                return jax.tree.map(lambda x: 0.5 * step.control * x, v), {}

            def _kick(self, step, registers):
                y, _ = registers
                t_mid = step.t0 + 0.5 * (step.t1 - step.t0)
                f = step.terms.vf(t_mid, y, step.args)
                return jax.tree.map(lambda x: 2 * x, f), {}

            def finish(self, registers0, registers1, infos):
                return None, dict(y0=registers0[0], y1=registers1[0])
        ```
    """

    permutation: ClassVar[tuple[int, ...] | None] = None
    has_evaluate: ClassVar[bool] = False

    @property
    def constants(self) -> tuple[int, ...]:
        """The indices of the registers that count as constants when a step is
        differentiated, as the size of the step does; by default none. A coupling that
        updates no others is not differentiated. (But what its `shift` returns for
        `finish` is. There, apply `jax.lax.stop_gradient` to what does not go into it.)
        """
        return ()

    @property
    def resets(self) -> bool:
        """Whether the solver has `reset`."""
        return False

    @abc.abstractmethod
    def split(self, y: PyTree, solver_state: Any) -> Registers:
        """Takes `y` and the solver state apart. Must do nothing else: it is called with
        gradients in their place too.

        **Arguments:**

        - `y`: The solution, or a gradient with respect to it.
        - `solver_state`: The solver state, or a gradient with respect to it.

        **Returns:**

        A [`diffrax_reversible.Registers`][], without `fixed`.
        """

    @abc.abstractmethod
    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        """The inverse of `split`.

        **Arguments:**

        - `registers`: A [`diffrax_reversible.Registers`][], with `fixed`.

        **Returns:**

        The pair of `y` and the solver state.
        """

    @abc.abstractmethod
    def couplings(self) -> tuple[Coupling, ...]:
        """The couplings that make a step, in order, as a tuple of
        [`diffrax_reversible.Coupling`][]."""

    @abc.abstractmethod
    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        """Completes a step.

        **Arguments:**

        - `registers0`: The registers at the start of the step.
        - `registers1`: The registers at its end.
        - `infos`: The dictionaries that the `shift`s of the couplings returned.

        **Returns:**

        The pair of the local error estimate (or `None`), of the structure and shapes of
        `y`, and the dictionary that is passed to the solver's interpolation routine.
        """

    def control(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        fixed: PyTree,
    ) -> PyTree:
        """What is computed once a step and passed to all of its couplings, as
        `StepInfo.control`. By default `terms.contr(t0, t1)`.

        **Arguments:**

        - `terms`: The PyTree of terms representing the vector fields and controls.
        - `t0`, `t1`: The start and the end of the step.
        - `fixed`: As in [`diffrax_reversible.StepInfo`][].

        **Returns:**

        A PyTree.
        """
        del fixed
        return terms.contr(t0, t1)  # pyright: ignore[reportAttributeAccessIssue]

    def next_fixed(
        self, fixed: PyTree, t0: RealScalarLike, t1: RealScalarLike
    ) -> PyTree:
        """What `recorded` selects, at the end of a step. By default it does not change.
        It is a constant when a step is differentiated, and must not depend on anything
        differentiated. (What depends on the solution can be put into it in `steer`.)

        **Arguments:**

        - `fixed`: What `recorded` selects, at the start of the step.
        - `t0`, `t1`: The start and the end of the step.

        **Returns:**

        A PyTree of the structure, shapes and dtypes of `fixed`.
        """
        del t0, t1
        return fixed

    def steer(
        self,
        fixed: PyTree,
        memo: PyTree,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        y_error: Y | None,
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[PyTree, PyTree]:
        """Chooses how the next step is made: `Registers.fixed` and `Registers.memo` at
        the end of a step. By default they are not changed.

        **Arguments:**

        - `fixed`: The result of `next_fixed`.
        - `memo`: `Registers.memo` at the start of the step.
        - `registers0`, `registers1`, `infos`: As for `finish`.
        - `y_error`: The local error estimate that `finish` returned.

        **Returns:**

        The pair of `fixed` and `memo`, of the structure, shapes and dtypes of those
        given.

        What this chooses is a constant when a step is differentiated, whatever it
        depends on, as is the size of a step: no gradient passes through the arguments,
        other than `fixed`.
        """
        del registers0, registers1, y_error, infos
        return fixed, memo

    def reset(
        self, registers: Registers, made_jump: BoolScalarLike
    ) -> tuple[Registers, BoolScalarLike]:
        """Called at the start of a step of a solver with `resets`. Steps in which it
        changes anything must have `needs_checkpoint` or `wants_checkpoint`.

        **Arguments:**

        - `registers`: The [`diffrax_reversible.Registers`][] at the start of the step.
        - `made_jump`: The value that was passed to `step`.

        **Returns:**

        The pair of the [`diffrax_reversible.Registers`][] from which the step is made,
        and whether `evaluate` has to be called on them anew.
        """
        return registers, made_jump

    def evaluate(
        self,
        terms: Terms,
        t: RealScalarLike,
        registers: tuple[PyTree, ...],
        args: Args,
    ) -> PyTree:
        """The evaluation that the last coupling of a step shares with the first
        coupling of the next, in a solver with `has_evaluate`. It is kept in the solver
        state, and passed to these two couplings as `StepInfo.value`.

        **Arguments:**

        - `terms`: The PyTree of terms representing the vector fields and controls.
        - `t`: The time at which the two steps meet.
        - `registers`: The registers at that time, with `None` for the one that the two
            couplings update.
        - `args`: Any extra arguments passed to the vector field.

        **Returns:**

        A PyTree.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"`{name}.has_evaluate` is true, but `{name}` has no method `evaluate`. "
            "Define `evaluate`, or leave `has_evaluate` out."
        )

    def evaluate_after_jump(
        self,
        terms: Terms,
        t: RealScalarLike,
        registers: tuple[PyTree, ...],
        args: Args,
    ) -> PyTree:
        """Called in place of `evaluate`, with all registers, at the start of a step
        that follows a jump of the vector field. By default it is `evaluate`.

        **Arguments and returns:** As for
        [`diffrax_reversible.AbstractCouplingSolver.evaluate`][].
        """
        return self.evaluate(terms, t, registers, args)

    def arrange(self, y: PyTree, solver_state: Any) -> Registers:
        """`split`, with `Registers.fixed`."""
        registers = self.split(y, solver_state)
        if registers.fixed is not None:
            raise ValueError(
                f"`{type(self).__name__}.split` must not set `Registers.fixed`: select "
                "that part of the solver state in `recorded` instead."
            )
        return registers._replace(fixed=self.recorded(solver_state))

    def checked_couplings(self) -> tuple[Coupling, ...]:
        """`couplings`, if they fit `has_evaluate`."""
        couplings = self.couplings()
        if self.has_evaluate:
            first, last = couplings[0].register, couplings[-1].register
            if self.permutation is not None:
                first = self.permutation[first]
            if len(couplings) < 2 or first != last:
                raise ValueError(
                    f"`{type(self).__name__}.has_evaluate` needs two couplings, or "
                    "more, the first and the last of which update the same register: "
                    "only then can the last evaluation of a step be the first of the "
                    "next. Leave `has_evaluate` out if no evaluation is shared."
                )
        return couplings

    @property
    def _num_unrolled(self) -> int:
        """How many stages a shift consists of, if they are evaluations of the one
        term."""
        return 1

    def is_constant(self, coupling: Coupling) -> bool:
        """Whether it updates nothing but `constants`."""
        return set(coupling.updated) <= set(self.constants)

    def _stop(self, registers: Sequence[PyTree]) -> list[PyTree]:
        constants = self.constants
        return [
            stop_gradient(x) if i in constants else x for i, x in enumerate(registers)
        ]

    def _permute(self, registers: Sequence[PyTree]) -> tuple[PyTree, ...]:
        if self.permutation is None:
            return tuple(registers)
        return tuple(registers[i] for i in self.permutation)

    def _unpermute(self, registers: Sequence[PyTree]) -> list[PyTree]:
        if self.permutation is None:
            return list(registers)
        out: list[PyTree] = [None] * len(registers)
        for i, x in zip(self.permutation, registers):
            out[i] = x
        return out

    def step(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y | None, DenseInfo, _SolverState, diffrax.RESULTS]:
        start = self.arrange(y0, solver_state)
        if self.resets:
            start, made_jump = self.reset(start, made_jump)
        registers0, value, fixed, memo = start
        registers0 = tuple(self._stop(registers0))
        info = StepInfo(terms, t0, t1, args, self.control(terms, t0, t1, fixed), fixed)
        if self.has_evaluate and made_jump is not False:
            value = lax.cond(
                made_jump,
                lambda: self.evaluate_after_jump(terms, t0, registers0, args),
                lambda: value,
            )
        registers = list(registers0)
        couplings = self.checked_couplings()
        infos = []
        for k, coupling in enumerate(couplings):
            if self.has_evaluate and k == len(couplings) - 1:
                value = self.evaluate(terms, t1, coupling.others(registers), args)
            at_end = k in (0, len(couplings) - 1)
            shift, info_k = coupling.shift_at(
                info._replace(value=value if at_end else None),
                coupling.others(registers),
            )
            coupling.apply(registers, coupling.scale_at(fixed), shift)
            registers = self._stop(registers)
            infos.append(info_k)
        registers1 = self._permute(registers)
        infos = tuple(infos)
        y_error, dense_info = self.finish(registers0, registers1, infos)
        fixed1, memo1 = self.steer(
            self.next_fixed(fixed, t0, t1),
            *stop_gradient((memo, registers0, registers1, y_error, infos)),
        )
        y1, solver_state1 = self.merge(Registers(registers1, value, fixed1, memo1))
        return y1, y_error, dense_info, solver_state1, diffrax.RESULTS.successful

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
        # A step that starts with a jump cannot be undone if `evaluate_after_jump`
        # depends on what is rebuilt here; such a solver asks for a checkpoint.
        del made_jump
        registers1, value, fixed, memo = self.arrange(y1, solver_state)
        info = StepInfo(terms, t0, t1, args, self.control(terms, t0, t1, fixed), fixed)
        registers = self._unpermute(registers1)
        couplings = self.checked_couplings()
        infos = []
        for k, coupling in reversed(list(enumerate(couplings))):
            if self.has_evaluate and k == 0:
                value = self.evaluate(terms, t0, coupling.others(registers), args)
            at_end = k in (0, len(couplings) - 1)
            shift, info_k = coupling.shift_at(
                info._replace(value=value if at_end else None),
                coupling.others(registers),
            )
            coupling.undo(registers, coupling.scale_at(fixed), shift)
            infos.append(info_k)
        registers0 = tuple(registers)
        _, dense_info = self.finish(registers0, registers1, tuple(reversed(infos)))
        y0, solver_state0 = self.merge(Registers(registers0, value, fixed, memo))
        return y0, dense_info, solver_state0
