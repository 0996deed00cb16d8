"""Undoing one step, and pulling a gradient back through it.

There are two ways. `GenericPullback` needs nothing but `backward_step` and `step`.
`CouplingPullback` uses that the step is a sequence of couplings, so that undoing a
coupling and differentiating it take one evaluation between them.

Both work in two parts, so that the values saved during the step, which need what was
rebuilt, can be differentiated in between: `rebuild` returns the start of the step and a
function `pull`.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._method.base import AbstractReversibleSolver
from .._method.coupling import AbstractCouplingSolver, Registers, StepInfo
from .._method.tree import stop_gradient, tree_add
from .batch import Batch
from .hoist import Hoisted, Hoister
from .vmap import where_active


class Functions(NamedTuple):
    """The hoisted functions, with their constants."""

    hoisted: Hoisted
    consts: Sequence[Any]
    # The numbers of those constants with respect to which we differentiate.
    differentiated: frozenset[int]
    # Whether we differentiate with respect to the times of steps.
    times_vary: bool

    # Over which gradients of constants are summed.
    batch: Batch

    def call(self, name: str, *args):
        return self.hoisted.call(name, self.consts, *args)

    def vjp(self, name: str, args: tuple, diff_args: tuple):
        return self.hoisted.vjp(
            name, self.consts, self.differentiated, args, diff_args, self.batch
        )

    def vjp_where(self, where, name: str, args: tuple, diff_args: tuple):
        """As `vjp`, for those elements of a batch of which `where` is true. For others
        the gradient is zero, even if it would not be finite. For one that is in no
        batch, `where` must be true."""
        each = self.batch.steps_differ
        out, pull = self.hoisted.vjp(
            name,
            self.consts,
            self.differentiated,
            args,
            diff_args,
            # For the batch as a whole, what is not finite could not be left out.
            None if each else self.batch,
        )

        def pull_where(grad):
            grad_consts, grad_args = jtu.tree_map(
                lambda g: where_active(where, g, jnp.zeros_like(g)), pull(grad)
            )
            if each:
                grad_consts = {~i: g for i, g in grad_consts.items()}
            return grad_consts, grad_args

        return out, pull_where

    def numbers_where(self, name: str) -> list[int]:
        """Of the gradients of constants that `vjp_where` gives: `i`, or `~i` for one
        that is yet to be summed over the batch."""
        used = self.differentiated.intersection(self.hoisted.uses(name))
        return [~i if self.batch.steps_differ else i for i in sorted(used)]

    def zero_consts(self, names_where: Sequence[str]) -> dict[int, Any]:
        """For the sum of all gradients of constants. `names_where` are the functions
        with which `vjp_where` is called."""
        numbers = set(self.differentiated)
        for name in names_where:
            numbers.update(self.numbers_where(name))
        return {i: jnp.zeros_like(self.consts[max(i, ~i)]) for i in sorted(numbers)}

    def sum_consts(self, grads: dict[int, Any]) -> dict[int, Any]:
        """The gradients of constants, from the sum of all that were given."""
        each = self.batch.sum({~i: g for i, g in grads.items() if i < 0})
        return {i: tree_add(g, each.get(i)) for i, g in grads.items() if i >= 0}

    def linearise(self, name: str, args: tuple, diff_args: tuple):
        return self.hoisted.linearise(
            name, self.consts, self.differentiated, args, diff_args, self.batch
        )

    def depends(self, name: str) -> bool:
        """Whether the output depends on what we differentiate, its arguments aside."""
        return not self.differentiated.isdisjoint(self.hoisted.uses(name))


class Step(NamedTuple):
    """A step to be undone."""

    t0: Array
    t1: Array
    y1: PyTree
    # At `t1`, but for its recorded part, which is that at `t0`.
    solver_state: PyTree
    made_jump: Any
    # If the solve was given a solver state: whether this is its first step, and its
    # start, `y` and that state.
    given: tuple[Any, PyTree, PyTree] | None = None


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
    y0: PyTree
    solver_state: PyTree
    # As returned by `restore`.
    restored: Any
    # `None` unless it was asked for.
    dense_info: PyTree
    # (grad_y1, grad_solver_state1, grad_dense_info or None) -> (Grads, carry)
    pull: Callable


class AbstractPullback(abc.ABC):
    solver: AbstractReversibleSolver
    # Whether the start of the first step is to be taken from the initial state: a value
    # kept from before the solve may be none that can be evaluated within it.
    restores_start: bool = False
    # What can stand in for this one, with the same functions, where it is not enough.
    fallback: "AbstractPullback | None" = None

    @abc.abstractmethod
    def add_functions(self, hoister: Hoister, terms, args, step: Step):
        """Adds those functions that will be needed. `step` is an example."""

    def choose(
        self, fns: Functions, perturbed_solver_state: PyTree
    ) -> "AbstractPullback":
        """That which can do what is asked for."""
        del fns, perturbed_solver_state
        return self

    def can_restore_after(self, want_dense_info: bool) -> bool:
        """Whether what is stored may as well be put in place after the step, or else it
        has to be in `rebuild`."""
        del want_dense_info
        return False

    @abc.abstractmethod
    def prime(self, fns: Functions, t1, y1, solver_state) -> PyTree:
        """What is carried from step to step, before the first."""

    @abc.abstractmethod
    def rebuild(
        self,
        fns: Functions,
        carry: PyTree,
        step: Step,
        restore: Callable,
        want_dense_info: bool,
    ) -> Rebuilt:
        """Undoes a step. `restore(y0, solver_state)` returns what was stored in a
        checkpoint at the start of this step, if there is one, and else its inputs; and
        something to be handed on."""


def _of_dtype(grads: PyTree, of: PyTree) -> PyTree:
    """The gradient of what was promoted to the dtypes of `grads`."""

    def cast(g, x):
        if g is None:
            return None
        if jnp.iscomplexobj(g) and not jnp.iscomplexobj(x):
            g = jnp.real(g)
        return g.astype(jnp.result_type(x))

    return jtu.tree_map(cast, grads, of, is_leaf=lambda g: g is None)


def _same_struct(x: PyTree, y: PyTree) -> bool:
    def struct(z):
        leaves, treedef = jtu.tree_flatten(z)
        # Of the results of `eval_shape`, whose leaves all have these.
        return [(leaf.shape, leaf.dtype) for leaf in leaves], treedef

    return struct(x) == struct(y)


def _split_times(fns: Functions, others: tuple, times: tuple) -> tuple[tuple, tuple]:
    """The arguments of a function that are constants, and those that are not."""
    return (others, times) if fns.times_vary else ((*others, *times), ())


class GenericPullback(AbstractPullback):
    restores_start = True

    def __init__(self, solver: AbstractReversibleSolver):
        self.solver = solver

    def add_functions(self, hoister, terms, args, step):
        solver = self.solver

        def _step(made_jump, t0, t1, y0, solver_state):
            y1, _, dense_info, solver_state, _ = solver.step(
                terms, t0, t1, y0, args, solver_state, made_jump
            )
            return y1, solver_state, dense_info

        def _backward_step(made_jump, t0, t1, y1, solver_state):
            y0, _, solver_state = solver.backward_step(
                terms, t0, t1, y1, args, solver_state, made_jump
            )
            return y0, solver_state

        example = (step.made_jump, step.t0, step.t1, step.y1, step.solver_state)
        y1, solver_state1, _ = hoister.add("step", _step, *example)
        y0, solver_state0 = hoister.add("backward_step", _backward_step, *example)
        for name, before, after in (
            ("y0", y0, y1),
            ("solver_state", solver_state0, solver_state1),
        ):
            if not _same_struct(before, after):
                raise ValueError(
                    f"`{type(solver).__name__}.backward_step` must return `{name}` of "
                    "the structure, shapes and dtypes that `step` takes and returns. "
                    f"Got {eqx.tree_pformat(before)}, expected "
                    f"{eqx.tree_pformat(after)}."
                )

    def prime(self, fns, t1, y1, solver_state):
        return None

    def rebuild(self, fns, carry, step, restore, want_dense_info):
        times = (step.t0, step.t1)
        y0, solver_state0, restored = restore(
            *fns.call(
                "backward_step", step.made_jump, *times, step.y1, step.solver_state
            )
        )
        constant, varying = _split_times(fns, (step.made_jump,), times)
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

        return Rebuilt(y0, solver_state0, restored, dense_info, pull)


class CouplingPullback(AbstractPullback):
    solver: AbstractCouplingSolver

    def __init__(
        self,
        solver: AbstractCouplingSolver,
        fallback: AbstractPullback | None,
    ):
        self.solver = solver
        self.fallback = fallback
        self.couplings = solver.checked_couplings()
        self.last = len(self.couplings) - 1
        self.restores_start = solver.has_evaluate

    def _has_value(self, k: int) -> bool:
        return self.solver.has_evaluate and k in (0, self.last)

    def add_functions(self, hoister, terms, args, step):
        if self.fallback is not None:
            self.fallback.add_functions(hoister, terms, args, step)
        solver = self.solver
        registers1, value, fixed, _ = solver.arrange(step.y1, step.solver_state)
        registers = solver._unpermute(registers1)
        t0, t1 = step.t0, step.t1
        control = hoister.add(
            "control",
            lambda fixed, t0, t1: solver.control(terms, t0, t1, fixed),
            fixed,
            t0,
            t1,
        )
        infos = []
        for k, coupling in enumerate(self.couplings):

            def shift(fixed, t0, t1, control, others, value, coupling=coupling):
                info = StepInfo(terms, t0, t1, args, control, fixed, value)
                shift, info_k = coupling.shift_at(info, others)
                if solver.is_constant(coupling):
                    shift = stop_gradient(shift)
                return shift, info_k

            others = coupling.others(registers)
            value_k = value if self._has_value(k) else None
            info_k = {}
            if coupling.shift is not None:
                _, info_k = hoister.add(
                    f"shift_{k}", shift, fixed, t0, t1, control, others, value_k
                )
            infos.append(info_k)
            if callable(coupling.scale):
                hoister.add(f"scale_{k}", coupling.scale, fixed)
        hoister.add("next_fixed", solver.next_fixed, fixed, t0, t1)
        hoister.add("finish", solver.finish, tuple(registers), registers1, tuple(infos))
        if solver.has_evaluate:
            others = self.couplings[-1].others(registers)
            hoister.add(
                "evaluate",
                lambda t, others: solver.evaluate(terms, t, others, args),
                t0,
                others,
            )

    def choose(self, fns, perturbed_solver_state):
        # What is recorded is taken for a constant here.
        perturbed = self.solver.recorded(perturbed_solver_state)
        if self.fallback is not None and (
            fns.times_vary
            or any(jtu.tree_leaves(perturbed))
            or fns.depends("next_fixed")
        ):
            return self.fallback
        return self

    def can_restore_after(self, want_dense_info):
        return not (want_dense_info or self.solver.has_evaluate)

    def _scale(self, fns, k, fixed):
        """The scale, and a function that takes its gradient to the constants."""
        coupling = self.couplings[k]
        if not callable(coupling.scale):
            return coupling.scale, None
        if coupling.register in self.solver.constants:
            return fns.call(f"scale_{k}", fixed), None
        out, pull = fns.vjp(f"scale_{k}", (fixed,), ())
        return out, pull if fns.depends(f"scale_{k}") else None

    def _drop_constants(self, grads: list[PyTree]) -> list[PyTree]:
        constants = self.solver.constants
        return [None if i in constants else g for i, g in enumerate(grads)]

    def prime(self, fns, t1, y1, solver_state):
        if not self.solver.has_evaluate:
            return None
        registers1 = self.solver.split(y1, solver_state).registers
        others = self.couplings[-1].others(self.solver._unpermute(registers1))
        arguments = self._evaluate_arguments(fns, t1, others)
        _, residuals, _ = fns.linearise("evaluate", *arguments)
        return residuals

    def _evaluate_arguments(self, fns, t, others):
        constant, varying = _split_times(fns, (), (t,))
        return constant, (*varying, others)

    def rebuild(self, fns, carry, step, restore, want_dense_info):
        solver = self.solver
        registers1, value1, fixed, memo = solver.arrange(step.y1, step.solver_state)
        constant, varying_times = _split_times(fns, (fixed,), (step.t0, step.t1))
        control, pull_control = fns.vjp("control", constant, varying_times)
        control_varies = fns.times_vary or fns.depends("control")

        registers = solver._unpermute(registers1)
        value0 = residuals0 = with_residuals = None
        pulls: list[Any] = [None] * len(self.couplings)
        infos: list[Any] = [None] * len(self.couplings)
        scales: list[Any] = [None] * len(self.couplings)
        pull_scales: list[Any] = [None] * len(self.couplings)
        unscaled: list[Any] = [None] * len(self.couplings)
        shifts: list[Any] = [None] * len(self.couplings)
        for k in reversed(range(len(self.couplings))):
            coupling = self.couplings[k]
            others = coupling.others(registers)
            value = None
            if self._has_value(k):
                if k == 0:
                    value0, residuals0, with_residuals = fns.linearise(
                        "evaluate", *self._evaluate_arguments(fns, step.t0, others)
                    )
                    if step.given is not None:
                        # It need not be what would be found in this solve.
                        is_start, *state = step.given
                        kept = solver.split(*state).value
                        value0 = jtu.tree_map(
                            lambda a, b: jnp.where(is_start, a, b), kept, value0
                        )
                    value = value0
                else:
                    value = value1
            if control_varies:
                own_constant, varying = constant, (control, others, value)
            else:
                own_constant, varying = (*constant, control), (others, value)
            varying = (*varying_times, *varying)
            if coupling.shift is None:
                shift, infos[k] = None, {}
            elif solver.is_constant(coupling) and not want_dense_info:
                shift, infos[k] = fns.call(f"shift_{k}", *own_constant, *varying)
            else:
                (shift, infos[k]), pulls[k] = fns.vjp(
                    f"shift_{k}", own_constant, varying
                )
            scales[k], pull_scales[k] = self._scale(fns, k, fixed)
            coupling.undo(registers, scales[k], shift)
            unscaled[k] = registers[coupling.register]
            shifts[k] = shift
        registers0 = solver.rebuilt(registers)
        if solver.has_evaluate:
            # All linearisations of `evaluate` differ only in their residuals.
            assert with_residuals is not None
            next_carry, pull_value1 = residuals0, with_residuals(carry)
        else:
            next_carry, pull_value1 = carry, None
        y0, solver_state0, restored = restore(
            *solver.merge(Registers(registers0, value0, fixed, memo))
        )
        registers0 = solver.split(y0, solver_state0).registers

        if want_dense_info:
            (_, dense_info), pull_finish = fns.vjp(
                "finish", (), (registers0, registers1, tuple(infos))
            )
        else:
            dense_info = pull_finish = None

        def pull(grad_y1, grad_solver_state1, grad_dense_info):
            grad_registers1, grad_value1, grad_fixed, grad_memo = solver.arrange(
                grad_y1, grad_solver_state1
            )
            grad_consts: dict[int, Any] = {}
            grad_control = grad_value0 = grad_finish0 = None
            grad_times: tuple = (None, None)
            grad_infos: tuple = (None,) * len(self.couplings)

            def add_consts(new):
                for i, g in new.items():
                    grad_consts[i] = tree_add(grad_consts.get(i), g)

            if grad_dense_info is not None:
                assert pull_finish is not None
                new, (grad_finish0, grad_finish1, grad_infos) = pull_finish(
                    (None, grad_dense_info)
                )
                add_consts(new)
                grad_registers1 = tree_add(grad_registers1, grad_finish1)

            grads = self._drop_constants(solver._unpermute(grad_registers1))
            for k in reversed(range(len(self.couplings))):
                coupling = self.couplings[k]
                i = coupling.register
                grad_others = grad_value_k = None
                if pulls[k] is not None:
                    grad_shift = _of_dtype(coupling.grad_shift(grads), shifts[k])
                    new, (*grad_others_k, grad_others, grad_value_k) = pulls[k](
                        (grad_shift, grad_infos[k])
                    )
                    add_consts(new)
                    if control_varies:
                        grad_control = tree_add(grad_control, grad_others_k.pop())
                    if fns.times_vary:
                        grad_times = tree_add(grad_times, tuple(grad_others_k))
                if pull_scales[k] is not None:
                    _, pull_product = jax.vjp(
                        lambda s, k=k: jtu.tree_map(lambda x: s * x, unscaled[k]),
                        scales[k],
                    )
                    new, _ = pull_scales[k](*pull_product(grads[i]))
                    add_consts(new)
                coupling.pull_scale(grads, scales[k])
                if grad_others is not None:
                    coupling.add_others(grads, grad_others)
                    grads = self._drop_constants(grads)
                if self._has_value(k):
                    if k == 0:
                        grad_value0 = grad_value_k
                    else:
                        assert pull_value1 is not None
                        new, (*grad_t1, grad_others) = pull_value1(
                            tree_add(grad_value1, grad_value_k)
                        )
                        add_consts(new)
                        if fns.times_vary:
                            grad_times = tree_add(grad_times, (None, *grad_t1))
                        coupling.add_others(grads, grad_others)
            if control_varies:
                new, grad_times_control = pull_control(grad_control)
                add_consts(new)
                if fns.times_vary:
                    grad_times = tree_add(grad_times, grad_times_control)
            if grad_finish0 is not None:
                grads = [tree_add(g, h) for g, h in zip(grads, grad_finish0)]
            for i in solver.constants:
                grads[i] = jtu.tree_map(
                    jnp.zeros_like, eqx.filter(registers0[i], eqx.is_inexact_array)
                )
            grad_y0, grad_solver_state0 = solver.merge(
                Registers(tuple(grads), grad_value0, grad_fixed, grad_memo)
            )
            return (
                Grads(grad_consts, grad_y0, grad_solver_state0, *grad_times),
                next_carry,
            )

        return Rebuilt(y0, solver_state0, restored, dense_info, pull)


def comparable(solver: AbstractReversibleSolver, y: PyTree, solver_state: PyTree):
    """What should be the same, but for rounding, in what was rebuilt and in what was
    stored: `y`, but for solvers with `evaluate` the registers that do not depend on the
    kept value. For that may be from before the solve, with other `args`."""
    if isinstance(solver, AbstractCouplingSolver) and solver.has_evaluate:
        registers = solver.split(y, solver_state).registers
        return solver.checked_couplings()[0].others(registers)
    return y


def make_pullback(
    solver: AbstractReversibleSolver, solver_state: PyTree, made_jump: Any
) -> AbstractPullback:
    if not isinstance(solver, AbstractCouplingSolver) or (
        # After a jump, or a reset, the value at hand is not that from the step before.
        solver.has_evaluate and (solver.resets or made_jump is not False)
    ):
        return GenericPullback(solver)
    # What is recorded may be among what is differentiated, if it is not only counters.
    recorded = solver.recorded(solver_state)
    has_floats = any(map(eqx.is_inexact_array, jtu.tree_leaves(recorded)))
    return CouplingPullback(solver, GenericPullback(solver) if has_floats else None)
