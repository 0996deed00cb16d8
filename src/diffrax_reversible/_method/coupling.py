import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu

from .._compat import Args, BoolScalarLike, DenseInfo, PyTree, RealScalarLike, Terms, Y
from .base import AbstractReversibleSolver
from .tree import stop_gradient, tree_add


_SolverState = TypeVar("_SolverState")


class StepInfo(NamedTuple):
    """What a coupling is told of the step that it is a part of: the `step` in
    `Coupling(shift=...)`, called as `shift(step, registers)`.

    **Attributes:**

    - `terms`: The terms of the differential equation, as in `step`.
    - `t0`, `t1`: The start and the end of the step.
    - `args`: Any extra arguments passed to the vector field.
    - `control`: The result of [`diffrax_reversible.AbstractCouplingSolver.control`][].
    - `fixed`: What [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects
        of the solver state, at the start of the step.
    - `value`: In a solver with `has_evaluate`, and there in the first and the last
        coupling, the result of [`diffrax_reversible.AbstractCouplingSolver.evaluate`][]
        at the start and at the end of the step. Otherwise `None`.
    """

    terms: Terms
    t0: RealScalarLike
    t1: RealScalarLike
    args: Args
    control: PyTree
    fixed: PyTree
    value: PyTree = None


class Registers(NamedTuple):
    """`y` and the solver state, taken apart into what couplings update (the
    *registers*) and what they do not. [`diffrax_reversible.AbstractCouplingSolver`][]
    has the methods `split`, which returns it, and `merge`, which takes it.

    **Attributes:**

    - `registers`: A tuple with a PyTree of arrays for each register. A coupling updates
        `registers[coupling.register]`.
    - `value`: In a solver with `has_evaluate`, the most recent result of
        [`diffrax_reversible.AbstractCouplingSolver.evaluate`][]. Otherwise `None`.
    - `fixed`: What [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects
        of the solver state. `split` must leave it `None`; `merge` finds it here.
    - `memo`: What the solver keeps only to choose how it makes its coming steps. It is
        neither undone nor recorded: on the backward pass it stays as it was at the end
        of the solve.
    """

    registers: tuple[PyTree, ...]
    value: PyTree = None
    fixed: PyTree = None
    memo: PyTree = None


def _times(scale: Any, x: Any):
    """`scale * x`, of the dtype of `x`."""
    return (scale.astype(x.dtype) if eqx.is_array(scale) else scale) * x


def _over(scale: Any, x: Any):
    return x / (scale.astype(x.dtype) if eqx.is_array(scale) else scale)


def _is_one(scale: RealScalarLike) -> bool:
    return isinstance(scale, float) and scale == 1.0


class Coupling(eqx.Module):
    r"""An affine coupling: one register is scaled, and shifted by a function of the
    others. [`diffrax_reversible.AbstractCouplingSolver`][] makes its steps of them.

    A coupling updates

    $x_i \leftarrow \alpha x_i + \phi(x_j, j \neq i)$ with $\alpha \neq 0$

    and is undone by $x_i \leftarrow (x_i - \phi) / \alpha$, whatever $\phi$ is. A
    gradient $g$ is pulled back by $g_j \leftarrow g_j + (\partial \phi / \partial
    x_j)^T g_i$ and then $g_i \leftarrow \alpha g_i$, so that a single VJP of $\phi$
    gives both the value that undoes the coupling and the map for the gradient.
    """

    register: int = eqx.field(static=True)
    shift: (
        Callable[[StepInfo, tuple[PyTree, ...]], tuple[PyTree, dict[str, PyTree]]]
        | None
    ) = eqx.field(static=True)
    # A number or a function. (Checked below, with a message better than a checker's.)
    scale: Any = eqx.field(static=True, default=1.0)
    also: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.also is not None and not (
            _is_one(self.scale) and self.also != self.register
        ):
            raise ValueError(
                "`Coupling(also=...)` must be a register other than "
                "`Coupling(register=...)`, and needs `scale=1.0`, as both are"
                f" shifted; got `also={self.also}`, `register={self.register}`, "
                f"`scale={self.scale}`."
            )
        if callable(self.scale):
            return
        if not isinstance(self.scale, (int, float)):
            raise ValueError(
                "`Coupling(scale=...)` must be a Python number, or a function of "
                f"`StepInfo.fixed` that returns a scalar; got {self.scale}."
            )
        if self.scale == 0:
            raise ValueError(
                "`Coupling(scale=0)` cannot be undone. Use a nonzero `scale`."
            )

    def scale_at(self, fixed: PyTree) -> Any:
        """The factor in a step with this `StepInfo.fixed`."""
        return self.scale(fixed) if callable(self.scale) else self.scale

    def shift_at(
        self, step: StepInfo, others: tuple[PyTree, ...]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """What `shift` returns, if there is one."""
        return (None, {}) if self.shift is None else self.shift(step, others)

    def apply(
        self, registers: list[PyTree], scale: RealScalarLike, shift: PyTree
    ) -> None:
        """Updates `registers`, in place."""
        i = self.register
        if not _is_one(scale):
            registers[i] = jtu.tree_map(lambda x: _times(scale, x), registers[i])
        if self.shift is not None:
            for j in self.updated:
                registers[j] = jtu.tree_map(lambda x, s: x + s, registers[j], shift)

    def undo(
        self, registers: list[PyTree], scale: RealScalarLike, shift: PyTree
    ) -> None:
        """The inverse of `apply`."""
        i = self.register
        if self.shift is not None:
            for j in self.updated:
                registers[j] = jtu.tree_map(lambda x, s: x - s, registers[j], shift)
        if not _is_one(scale):
            registers[i] = jtu.tree_map(lambda x: _over(scale, x), registers[i])

    def pull_scale(self, grads: list[PyTree], scale: RealScalarLike) -> None:
        """The part of the pullback that does not go through `shift`."""
        if not _is_one(scale):
            i = self.register
            grads[i] = jtu.tree_map(lambda g: _times(scale, g), grads[i])

    @property
    def updated(self) -> tuple[int, ...]:
        """The registers that it updates."""
        return (self.register,) if self.also is None else (self.register, self.also)

    def others(self, registers: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """What `shift` is given for `registers`."""
        # `None` in its own place, so that a coupling that reads what it updates, and so
        # could not be undone, fails when it is traced.
        out = [None if i in self.updated else x for i, x in enumerate(registers)]
        if self.also is not None:
            out[self.register] = jtu.tree_map(
                lambda x, y: x - y, registers[self.register], registers[self.also]
            )
        return tuple(out)

    def grad_shift(self, grads: list[PyTree]) -> PyTree:
        """The gradient of what `shift` returned."""
        if self.also is None:
            return grads[self.register]
        return tree_add(grads[self.register], grads[self.also])

    def add_others(self, grads: list[PyTree], new: tuple[PyTree, ...]) -> None:
        """The transpose of `others`, added to `grads` in place."""
        for i, g in enumerate(new):
            grads[i] = tree_add(grads[i], g)
        if self.also is not None:
            minus = jtu.tree_map(lambda g: -g, new[self.register])
            grads[self.also] = tree_add(grads[self.also], minus)


Coupling.__init__.__doc__ = """**Arguments:**

- `register`: Which register is updated: an index into the `registers` of
    [`diffrax_reversible.Registers`][].
- `shift`: The function $\\phi$, called as `shift(step, registers)`, with a
    [`diffrax_reversible.StepInfo`][] and the tuple of all registers, in which the one
    that is updated is `None`. Should return a pair: the increment, of the structure,
    shapes and dtypes of the register, and a dictionary with whatever else
    [`diffrax_reversible.AbstractCouplingSolver.finish`][] needs from this coupling.
    Usually a bound method of the solver. If it is `None` then the register is only
    scaled.
- `scale`: The factor $\\alpha$; must not be zero. Either a Python number, or a function
    that takes `StepInfo.fixed` and returns a scalar. (Such a function may return zero
    in a step for which `needs_checkpoint` or `wants_checkpoint` is true.)
- `also`: Another register, to which the same increment is added. What `shift` is given
    in the place of `register` is then the difference of the two, `registers[register] -
    registers[also]`, which does not change. For solvers that keep a second copy of a
    register as its difference from it. Needs `scale=1`.

**Raises:**

- `ValueError` if `scale` is zero, or neither a number nor a function; and if `also` is
    `register`, or given with a `scale`.
"""


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
