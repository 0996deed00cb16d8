import functools as ft
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    is_sde,
    PyTree,
    RealScalarLike,
    Term,
    Terms,
    VF,
    WrapTerm,
    Y,
)
from .._method.affine import Coupling, Registers, StepInfo
from .._method.continuous_extension import corrections
from .._method.coupling import AbstractCouplingSolver


# The evaluation that two neighbouring steps share.
_SolverState: TypeAlias = PyTree


def composition(
    weights: Sequence[float],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The fractions `(kicks, drifts)` of Stormer--Verlet steps of these sizes, one
    after the other."""
    before, after = (0.0, *weights), (*weights, 0.0)
    return tuple((a + b) / 2 for a, b in zip(before, after)), tuple(weights)


def palindrome(half: Sequence[float], middle: float | None = None) -> tuple[float, ...]:
    """`half`, `middle` if there is one, and `half` the other way round."""
    return (*half, *(() if middle is None else (middle,)), *reversed(half))


class SplittingInterpolation(diffrax.AbstractLocalInterpolation):
    """For each variable a straight line, and corrections that vanish at both ends."""

    t0: RealScalarLike
    t1: RealScalarLike
    # The values at both ends, and the coefficients of `theta**k - theta` for `k = 2, 3,
    # ...`. (In one tuple, for `equinox.tree_at` takes no empty ones.)
    p: tuple[PyTree, ...]
    q: tuple[PyTree, ...]

    def evaluate(
        self, t0: RealScalarLike, t1: RealScalarLike | None = None, left: bool = True
    ) -> PyTree:
        del left
        if t1 is not None:
            return jtu.tree_map(
                lambda a, b: b - a, self.evaluate(t0), self.evaluate(t1)
            )
        # Of a step of no length, as in the unused part of a `DenseInterpolation`, the
        # start.
        empty = self.t0 == self.t1
        passed = jnp.where(empty, 0, t0 - self.t0)
        theta = passed / jnp.where(empty, 1, self.t1 - self.t0)

        def at_theta(x0, x1, *coefficients):
            s = theta.astype(jnp.finfo(jnp.result_type(x0)).dtype)
            out = x0 + s * (x1 - x0)
            for k, x in enumerate(coefficients, start=2):
                out = out + (s**k - s) * x
            return out

        return jtu.tree_map(at_theta, *self.p), jtu.tree_map(at_theta, *self.q)


class AbstractSplitting(AbstractCouplingSolver[_SolverState]):
    r"""Abstract base class for palindromic splittings. Subclass it to write a symmetric
    method, for Hamiltonian systems a symplectic one, with nothing but its coefficients.

    !!! example

        McLachlan's optimised method of order 2 with two stages.

        ```python
        import diffrax_reversible as dfxr

        class McLachlan2(dfxr.AbstractSplitting):
            kicks = (0.1932, 0.6136, 0.1932)
            drifts = (0.5, 0.5)

            def order(self, terms):
                return 2
        ```

    For `terms=(term_1, term_2)` and `y=(p, q)`, arranged as for
    [`diffrax.SemiImplicitEuler`][]: `term_1` gives the change of `p` from `q`, and
    `term_2` that of `q` from `p`. Has no error estimate.

    **Attributes:**

    - `kicks`: The fractions of the step by which `p` moves in the sub-steps that update
        it, in order: a tuple of floats that add up to 1. It reads the same backwards,
        and has no zeros.
    - `drifts`: The same for `q`. If there is one kick more than there are drifts then a
        step begins and ends with a kick, and if there is one drift more then with a
        drift.

    **Raises:**

    - `ValueError`, when an instance is made, if `kicks` or `drifts` are not like that;
        and, when a solve starts, for an SDE if one of them is negative.

    **Cost:** The sub-steps at both ends share their evaluation with the neighbouring
    steps, so that a step makes as many evaluations of each vector field as there are of
    the rarer sub-steps; and as many with their pullback on the backward pass of
    [`diffrax_reversible.ReversibleAdjoint`][]. The shared evaluation is the solver
    state.

    **Dense output** needs no further evaluations. It is a polynomial through the values
    at both ends, with corrections from the increments of the sub-steps, of as high an
    order up to 4 as they allow: the docstring of each method says of which. A
    Stormer--Verlet step has a single increment of one of the variables, and that is
    interpolated linearly.

    **How it works.** A step consists of *kicks* and *drifts* by turns,

    $p \leftarrow p + b_j h f_1(t_q, q), \quad q \leftarrow q + a_i h f_2(t_p, p)$

    where $t_q$ and $t_p$ are the times at which $q$ and $p$ are. (Each moves on with
    the sub-steps of its own variable, so that the order holds for vector fields that
    depend on time.) Which of the two begins is a matter of naming: with `terms=(term_2,
    term_1)` and `y=(q, p)` a method with a kick at both ends becomes one with a drift
    at both ends. Of the methods here neither form is the better one on all problems.

    The control of a sub-step is the increment of the control of its term over the times
    between which its own variable moves. So the order holds for a
    [`diffrax.ControlTerm`][] with a smooth control too, but the order of the dense
    output does not. In methods of order 3 or more some sub-steps go backwards, and the
    vector fields and controls may be evaluated a little outside of the step. Such
    methods cannot be used for SDEs.
    """

    term_structure: ClassVar[Any] = (diffrax.AbstractTerm, diffrax.AbstractTerm)
    interpolation_cls: ClassVar[Callable[..., SplittingInterpolation]] = (
        SplittingInterpolation
    )
    has_evaluate: ClassVar[bool] = True
    # The fractions of the step by which `p` and `q` move in the sub-steps.
    kicks: eqx.AbstractClassVar[tuple[float, ...]]
    drifts: eqx.AbstractClassVar[tuple[float, ...]]

    def __check_init__(self) -> None:
        name = type(self).__name__
        kicks, drifts = self.kicks, self.drifts
        if abs(len(kicks) - len(drifts)) != 1 or 0 in (len(kicks), len(drifts)):
            raise ValueError(
                f"`{name}.kicks` and `{name}.drifts` must differ in length by one, as "
                "they take turns and the first sub-step is of the kind of the last; "
                f"got {len(kicks)} kicks and {len(drifts)} drifts."
            )
        for attribute, fractions in (("kicks", kicks), ("drifts", drifts)):
            if abs(math.fsum(fractions) - 1) > 1e-12:
                raise ValueError(
                    f"`{name}.{attribute}` must add up to 1, as they are fractions of "
                    f"a step; they add up to {math.fsum(fractions)!r}."
                )
            if any(abs(a - b) > 1e-12 for a, b in zip(fractions, fractions[::-1])):
                raise ValueError(
                    f"`{name}.{attribute}` must be a palindrome; got {fractions}. "
                    "Write a method that is not symmetric as an "
                    "`AbstractCouplingSolver`."
                )
            if 0 in fractions:
                raise ValueError(
                    f"`{name}.{attribute}` must not have zeros in it; got {fractions}. "
                    "Leave sub-steps of no length out, and join their neighbours."
                )

    @property
    def _fractions(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.kicks), tuple(self.drifts)

    @property
    def _begins(self) -> int:
        """The variable whose sub-steps begin and end the step."""
        return 0 if len(self.kicks) > len(self.drifts) else 1

    def init(
        self,
        terms: tuple[Term, Term],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: tuple[PyTree, PyTree],
        args: Args,
    ) -> _SolverState:
        del t1
        if is_sde(terms) and min(*self.kicks, *self.drifts) < 0:
            raise ValueError(
                f"`{type(self).__name__}()` cannot solve an SDE, as some of its "
                "sub-steps go backwards in time. Use `StormerVerlet()`."
            )
        return self.evaluate(terms, t0, y0, args)

    def func(
        self,
        terms: tuple[Term, Term],
        t0: RealScalarLike,
        y0: tuple[PyTree, PyTree],
        args: Args,
    ) -> VF:
        term_1, term_2 = terms
        p, q = y0
        return term_1.vf(t0, q, args), term_2.vf(t0, p, args)

    def split(self, y: PyTree, solver_state: Any) -> Registers:
        p, q = y
        return Registers((p, q), value=solver_state)

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        return registers.registers, registers.value

    def needs_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        # The step before used the value from the other side of the jump. (There are
        # none but with `diffeqsolve(made_jump=True)`, as the steps are not adaptive.)
        del solver_state, new_solver_state
        return made_jump

    def control(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        fixed: PyTree,
    ) -> PyTree:
        term_1, term_2 = terms
        return (
            _sub_controls(term_1, t0, t1, self.kicks),
            _sub_controls(term_2, t0, t1, self.drifts),
        )

    def evaluate(
        self,
        terms: Terms,
        t: RealScalarLike,
        registers: tuple[PyTree, ...],
        args: Args,
    ) -> PyTree:
        i = self._begins
        return terms[i].vf(t, registers[1 - i], args)

    def couplings(self) -> tuple[Coupling, ...]:
        a, b = self._begins, 1 - self._begins
        out = [Coupling(a, ft.partial(self._advance, a, 0))]
        for i in range(len(self._fractions[b])):
            out.append(Coupling(b, ft.partial(self._advance, b, i)))
            out.append(Coupling(a, ft.partial(self._advance, a, i + 1)))
        return tuple(out)

    def _advance(
        self, which: int, i: int, step: StepInfo, registers: tuple[PyTree, ...]
    ):
        """The sub-step `i` of those that update the register `which`."""
        term, control = step.terms[which], step.control[which][i]
        if step.value is None:
            # As many sub-steps of the other variable have been made before.
            made = i if which == self._begins else i + 1
            fractions = self._fractions[1 - which]
            t = _after(step.t0, step.t1, fractions, made)
            increment = term.vf_prod(t, registers[1 - which], step.args, control)
        else:
            increment = term.prod(step.value, control)
        return increment, dict(increment=increment)

    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        increments = [info["increment"] for info in infos]
        of_variable = [increments[1::2], increments[1::2]]
        of_variable[self._begins] = increments[::2]
        dense_info = []
        for i, own in enumerate(self._fractions):
            begins = i == self._begins
            coefficients = [
                _combine([w / b for w, b in zip(weights, own)], of_variable[i])
                for weights in corrections(own, self._fractions[1 - i], begins)
            ]
            dense_info.append((registers0[i], registers1[i], *coefficients))
        p, q = dense_info
        return None, dict(p=p, q=q)


def _after(t0, t1, fractions, made):
    """The time after the first `made` sub-steps of these fractions."""
    # Exact at both ends, where the vector field may have its only finite limit.
    if made == 0:
        return t0
    if made == len(fractions):
        return t1
    return t0 + math.fsum(fractions[:made]) * (t1 - t0)


def _is_time(term: Term) -> bool:
    """Whether the control is the time that has passed."""
    if isinstance(term, WrapTerm):
        return _is_time(term.term)
    if isinstance(term, diffrax.MultiTerm):
        return all(_is_time(x) for x in term.terms)
    return type(term) is diffrax.ODETerm


def _sub_controls(term, t0, t1, fractions):
    if _is_time(term):
        # Not as differences of times: late in a long solve those would be rounded to
        # much less than the precision of a short step.
        control = term.contr(t0, t1)
        return tuple(jtu.tree_map(lambda x, b=b: b * x, control) for b in fractions)
    times = [_after(t0, t1, fractions, made) for made in range(len(fractions) + 1)]
    return tuple(term.contr(a, b) for a, b in zip(times[:-1], times[1:]))


def _combine(weights: list[float], increments: list[PyTree]) -> PyTree:
    def weighted_sum(*leaves):
        return ft.reduce(operator.add, [w * x for w, x in zip(weights, leaves)])

    return jtu.tree_map(weighted_sum, *increments)
