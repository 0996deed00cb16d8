"""The pullback of a step that is a sequence of couplings: undoing a coupling and
differentiating it take one evaluation between them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._jax_compat import eqxi
from .._method.affine import Registers, StepInfo
from .._method.base import AbstractReversibleSolver
from .._method.coupling import AbstractCouplingSolver
from .._method.explicit_rk import Checkpointed
from .._method.tree import stop_gradient, tree_add
from .functions import Functions, of_dtype
from .pullback import (
    AbstractPullback,
    add_step,
    GenericPullback,
    Grads,
    Rebuilt,
    Start,
    Step,
)


# A scale with which what is lost of a register, in one step, is more than rounding.
_SMALL = 1 / 64


class _Shared(NamedTuple):
    """What all couplings of a step are given."""

    fns: Functions
    fixed: PyTree
    # The first arguments of shifts: the constant ones, and the others.
    constant: tuple
    varying: tuple
    # `None` if the control is among the constant ones.
    pull_control: Callable | None

    @classmethod
    def of(cls, fns: Functions, step: Step, fixed: PyTree) -> "_Shared":
        constant, times = fns.split_times((fixed,), (step.t0, step.t1))
        control, pull = fns.vjp("control", constant, times)
        if fns.times_vary or fns.depends("control"):
            return cls(fns, fixed, constant, (*times, control), pull)
        return cls(fns, fixed, (*constant, control), times, None)

    def shift(self, k: int, others: tuple[PyTree, ...], value: PyTree) -> PyTree:
        arguments = (*self.constant, *self.varying, others, value)
        shift, _ = self.fns.call(f"shift_{k}", *arguments)
        return shift

    def vjp_shift(self, k: int, others: tuple[PyTree, ...], value: PyTree):
        """Of the shift and what it tells `finish`."""
        varying = (*self.varying, others, value)
        return self.fns.vjp(f"shift_{k}", self.constant, varying)


class _Evaluated(NamedTuple):
    """`evaluate` at the start of a step, and its linearisation."""

    value: PyTree
    residuals: PyTree
    # With those of any step.
    with_residuals: Callable


class _Undone(NamedTuple):
    """A coupling that has been undone, and what its pullback needs."""

    shift: PyTree
    # For `finish`.
    info: dict[str, PyTree]
    pull: Callable | None
    scale: Any
    pull_scale: Callable | None
    # The register that it updates, before that.
    unscaled: PyTree


class _Total:
    """The gradients of what all couplings of a step share, so far."""

    def __init__(self, shared: _Shared):
        self._times_vary = shared.fns.times_vary
        self._pull_control = shared.pull_control
        self._control: PyTree = None
        self.consts: dict[int, Any] = {}
        self.times: tuple = (None, None)

    def add_consts(self, new: dict[int, Any]) -> None:
        for i, g in new.items():
            self.consts[i] = tree_add(self.consts.get(i), g)

    def add_times(self, new: tuple) -> None:
        if self._times_vary:
            self.times = tree_add(self.times, new)

    def add_shared(self, new: list[PyTree]) -> None:
        """Those of `_Shared.varying`."""
        if self._pull_control is not None:
            *new, control = new
            self._control = tree_add(self._control, control)
        self.add_times(tuple(new))

    def pull_control(self) -> None:
        """To be called when there is no more to come."""
        if self._pull_control is not None:
            new, grad_times = self._pull_control(self._control)
            self.add_consts(new)
            self.add_times(grad_times)


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
        self.num_unrolled = solver._num_unrolled

    @property
    def name_of_differentiated(self) -> str:
        return f"shift_{self._first_shift}"

    @property
    def _first_shift(self) -> int:
        """The first coupling that shifts anything."""
        shifts = [k for k, c in enumerate(self.couplings) if c.shift is not None]
        return shifts[0]

    @property
    def _rebuilds_by_constants(self) -> bool:
        """Whether what is differentiated does not depend on those after it, where the
        start of the step is known."""
        others = self.couplings[self._first_shift + 1 :]
        return all(map(self.solver.is_constant, others))

    @property
    def _last_loss(self) -> int:
        """The last coupling that, when it is undone, may lose more than rounding. What
        those before it are given cannot be had from the end of the step, even if its
        start is known."""
        lossy = [
            k
            for k, coupling in enumerate(self.couplings)
            if callable(coupling.scale) or abs(coupling.scale) < _SMALL
        ]
        return max(lossy, default=0)

    @property
    def _last_read(self) -> int:
        """The last coupling that is differentiated at registers which others of the
        same step still update: those of its end are known anyway."""
        couplings, read = self.couplings, []
        for k, coupling in enumerate(couplings):
            own = set() if coupling.also is not None else set(coupling.updated)
            later = set[int]().union(*(c.updated for c in couplings[k + 1 :]))
            if not self.solver.is_constant(coupling) and later - own:
                read.append(k)
        return max(read, default=0)

    def _known(self, shared: _Shared, start: Start) -> list[tuple]:
        """The registers before each coupling, from the start of the step: as far as
        what is found from its end might be on the other side of a kink, or is lost."""
        registers0, value, *_ = self.solver.split(start.y, start.solver_state)
        last = max(self._last_read, self._last_loss)

        def sweep():
            registers, out = list(registers0), []
            for k in range(last):
                coupling, shift = self.couplings[k], None
                if coupling.shift is not None:
                    value_k = value if self._has_value(k) else None
                    shift = shared.shift(k, coupling.others(registers), value_k)
                scale, _ = self._scale(shared, k)
                coupling.apply(registers, scale, shift)
                out.append(tuple(registers))
            return out

        if last <= self._first_shift:
            # That takes no evaluation.
            return [tuple(registers0), *sweep()]
        return [tuple(registers0), *_if(eqxi.unvmap_any(start.is_known), sweep)]

    def _has_value(self, k: int) -> bool:
        return self.solver.has_evaluate and k in (0, self.last)

    def add_functions(self, hoister, terms, args, step):
        if self.fallback is None:
            add_step(hoister, self.solver, terms, args, step)
        else:
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
                term = Checkpointed(terms) if self.recomputes_stages else terms
                info = StepInfo(term, t0, t1, args, control, fixed, value)
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

    def stop_recorded(self, y, solver_state):
        # What is recorded, and the memo.
        def where(state):
            memo = self.solver.split(y, state).memo
            return jtu.tree_leaves((self.solver.recorded(state), memo))

        leaves = where(solver_state)
        if len(leaves) == 0:
            return solver_state
        return eqx.tree_at(where, solver_state, stop_gradient(leaves))

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

    def _scale(self, shared: _Shared, k: int):
        """The scale, and a function that takes its gradient to the constants."""
        coupling, fns, fixed = self.couplings[k], shared.fns, shared.fixed
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
        constant, varying = fns.split_times((), (t,))
        return constant, (*varying, others)

    def rebuild(self, fns, carry, step, start, want_dense_info):
        solver = self.solver
        end = solver.arrange(step.y1, step.solver_state)
        shared = _Shared.of(fns, step, end.fixed)
        undone, registers0, evaluated = self._undo_all(
            shared, step, start, end, want_dense_info
        )
        value0, next_carry, pull_value1 = None, carry, None
        if evaluated is not None:
            value0, next_carry = evaluated.value, evaluated.residuals
            # All linearisations of `evaluate` differ only in their residuals.
            pull_value1 = evaluated.with_residuals(carry)
        rebuilt = solver.merge(Registers(registers0, value0, end.fixed, end.memo))
        dense_info = pull_finish = None
        if want_dense_info:
            registers0 = solver.split(*start.choose(*rebuilt)).registers
            infos = tuple(x.info for x in undone)
            (_, dense_info), pull_finish = fns.vjp(
                "finish", (), (registers0, end.registers, infos)
            )

        def pull(grad_y1, grad_solver_state1, grad_dense_info):
            grad_end = solver.arrange(grad_y1, grad_solver_state1)
            grad_registers1 = grad_end.registers
            total = _Total(shared)
            grad_registers0, grad_infos = None, (None,) * len(self.couplings)
            if grad_dense_info is not None:
                assert pull_finish is not None
                new, (grad_registers0, grad_finish1, grad_infos) = pull_finish(
                    (None, grad_dense_info)
                )
                total.add_consts(new)
                grad_registers1 = tree_add(grad_registers1, grad_finish1)
            grads = self._drop_constants(solver._unpermute(grad_registers1))
            grad_value0 = self._pull_all(
                undone, grads, grad_infos, grad_end.value, pull_value1, total
            )
            total.pull_control()
            if grad_registers0 is not None:
                grads = [tree_add(g, h) for g, h in zip(grads, grad_registers0)]
            for i in solver.constants:
                grads[i] = jtu.tree_map(
                    jnp.zeros_like, eqx.filter(registers0[i], eqx.is_inexact_array)
                )
            grad_y0, grad_solver_state0 = solver.merge(
                grad_end._replace(registers=tuple(grads), value=grad_value0)
            )
            grads0 = Grads(total.consts, grad_y0, grad_solver_state0, *total.times)
            return grads0, next_carry

        return Rebuilt(*rebuilt, dense_info, pull)

    #
    # The couplings of a step, from the last to the first
    #

    def _undo_all(
        self,
        shared: _Shared,
        step: Step,
        start: Start,
        end: Registers,
        want_dense_info: bool,
    ) -> tuple[list[_Undone], tuple[PyTree, ...], _Evaluated | None]:
        """Undoes a step. Returns also the registers at its start, and what is evaluated
        there, if anything."""
        registers = self.solver._unpermute(end.registers)
        undone: list[Any] = [None] * len(self.couplings)
        evaluated = None
        known = self._known(shared, start)
        for k in reversed(range(len(self.couplings))):
            coupling = self.couplings[k]
            others = coupling.others(registers)
            if k < len(known):
                others = start.select(coupling.others(known[k]), others)
            value = end.value if self._has_value(k) else None
            if self._has_value(k) and k == 0:
                evaluated = self._evaluate(shared.fns, step.t0, others, start)
                value = evaluated.value
            # (Nothing that is differentiated depends on others, at a known start.)
            is_asked = True
            if k > self._first_shift and self._rebuilds_by_constants:
                is_asked = start.is_rebuilt
            undone[k] = self._undo(
                shared, k, registers, others, value, want_dense_info, is_asked
            )
            if k < len(known):
                unscaled = start.select(known[k][coupling.register], undone[k].unscaled)
                undone[k] = undone[k]._replace(unscaled=unscaled)
        return undone, tuple(registers), evaluated

    def _evaluate(self, fns, t0, others, start: Start) -> _Evaluated:
        """`evaluate` at the start of a step."""
        arguments = self._evaluate_arguments(fns, t0, others)
        value, residuals, with_residuals = fns.linearise("evaluate", *arguments)
        # At the start of the solve, it need not be what is found here.
        kept = self.solver.split(start.y, start.solver_state).value
        return _Evaluated(start.select(kept, value), residuals, with_residuals)

    def _undo(
        self,
        shared: _Shared,
        k: int,
        registers: list[PyTree],
        others: tuple[PyTree, ...],
        value: PyTree,
        want_dense_info: bool,
        is_asked: Any,
    ) -> _Undone:
        """Undoes a coupling, in place. Anything will do if it is a constant, and what
        it is undone to is not asked for."""
        coupling = self.couplings[k]
        shift, info, pull = None, {}, None
        if coupling.shift is not None:
            if self.solver.is_constant(coupling) and not want_dense_info:
                call = lambda: shared.shift(k, others, value)
                # (A branch even so is not free.)
                shift = call() if is_asked is True else _if(is_asked, call)
            else:
                (shift, info), pull = shared.vjp_shift(k, others, value)
        scale, pull_scale = self._scale(shared, k)
        coupling.undo(registers, scale, shift)
        unscaled = registers[coupling.register]
        return _Undone(shift, info, pull, scale, pull_scale, unscaled)

    def _pull_all(
        self,
        undone: list[_Undone],
        grads: list[PyTree],
        grad_infos: tuple,
        grad_value1: PyTree,
        pull_value1: Callable | None,
        total: _Total,
    ) -> PyTree:
        """Pulls the gradients of the registers back through a step, in place. Returns
        that of the value at its start."""
        grad_value0 = None
        for k in reversed(range(len(self.couplings))):
            grad_value = self._pull(k, undone[k], grads, grad_infos[k], total)
            if self._has_value(k) and k == 0:
                grad_value0 = grad_value
            elif self._has_value(k):
                assert pull_value1 is not None
                new, (*grad_t1, grad_others) = pull_value1(
                    tree_add(grad_value1, grad_value)
                )
                total.add_consts(new)
                total.add_times((None, *grad_t1))
                self.couplings[k].add_others(grads, grad_others)
        return grad_value0

    def _pull(
        self, k: int, undone: _Undone, grads: list, grad_info, total: _Total
    ) -> PyTree:
        """Pulls gradients back through a coupling, in place. Returns that of the value
        which it shares with the next step."""
        coupling = self.couplings[k]
        grad_others = grad_value = None
        if undone.pull is not None:
            grad_shift = of_dtype(coupling.grad_shift(grads), undone.shift)
            new, (*grad_shared, grad_others, grad_value) = undone.pull(
                (grad_shift, grad_info)
            )
            total.add_consts(new)
            total.add_shared(grad_shared)
        if undone.pull_scale is not None:
            _, pull_product = jax.vjp(
                lambda s: jtu.tree_map(lambda x: s * x, undone.unscaled), undone.scale
            )
            new, _ = undone.pull_scale(*pull_product(grads[coupling.register]))
            total.add_consts(new)
        coupling.pull_scale(grads, undone.scale)
        if grad_others is not None:
            coupling.add_others(grads, grad_others)
            grads[:] = self._drop_constants(grads)
        return grad_value


def _if(pred, call: Callable) -> PyTree:
    """What it returns, or zero."""
    struct = jax.eval_shape(call)
    zeros = lambda: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
    return lax.cond(pred, call, zeros)


def comparable(solver: AbstractReversibleSolver, y: PyTree, solver_state: PyTree):
    """What should be the same, but for rounding, in what was rebuilt and in what was
    stored, at the start of a step: `y`, and what is rebuilt of the solver state.

    Of couplings it is the registers, less what the step is about to forget. A constant
    has no gradient, and no size of its own: it matters where another register is read
    less that one. And nothing that the kept value goes into: that may be from before
    the solve, with other `args`."""
    if not isinstance(solver, AbstractCouplingSolver):
        return y, solver.rebuilt(solver_state)
    start, couplings = solver.arrange(y, solver_state), solver.checked_couplings()
    registers = list(start.registers)
    for coupling in couplings:
        if callable(coupling.scale):
            # (Where that is zero it is anything.)
            scale, i = coupling.scale_at(start.fixed), coupling.register
            scaled = coupling.scaled(registers, scale)
            registers[i] = jtu.tree_map(lambda x: jnp.where(scale == 0, 0, x), scaled)
    left_out = set(solver.constants)
    if solver.has_evaluate:
        left_out.update(couplings[0].updated)
        couplings = couplings[:1]
    differences = [
        coupling.others(registers)[coupling.register]
        for coupling in couplings
        if coupling.also is not None
    ]
    return [x for i, x in enumerate(registers) if i not in left_out], differences


def make_pullback(
    solver: AbstractReversibleSolver, solver_state: PyTree, made_jump: Any
) -> AbstractPullback:
    if (
        not isinstance(solver, AbstractCouplingSolver)
        or solver.resets
        # After a jump the value at hand is not that from the step before.
        or (solver.has_evaluate and made_jump is not False)
    ):
        return GenericPullback(solver)
    # What is recorded may be among what is differentiated, if it is not only counters.
    recorded = solver.recorded(solver_state)
    has_floats = any(map(eqx.is_inexact_array, jtu.tree_leaves(recorded)))
    return CouplingPullback(solver, GenericPullback(solver) if has_floats else None)
