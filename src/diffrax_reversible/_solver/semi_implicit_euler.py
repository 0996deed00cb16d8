from collections.abc import Callable
from typing import Any, ClassVar, final, TypeAlias

import diffrax

from .._compat import Args, DenseInfo, PyTree, RealScalarLike, Term, Terms, VF, Y
from .._method.affine import Coupling, Registers, StepInfo
from .._method.coupling import AbstractCouplingSolver


_SolverState: TypeAlias = None


@final
class SemiImplicitEuler(AbstractCouplingSolver[_SolverState]):
    r"""The semi-implicit (symplectic) Euler method, with its reverse. Use it where
    [`diffrax.SemiImplicitEuler`][] would be used;
    [`diffrax_reversible.StormerVerlet`][] costs the same and is of order 2.

    The steps are those of [`diffrax.SemiImplicitEuler`][], of order 1, for
    `terms=(term_1, term_2)` and `y=(p, q)`. Has no error estimate, and is not
    for SDEs.

    Each step makes one evaluation of each vector field, and one evaluation of each with
    its pullback on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][].
    There is no solver state.

    Uses 1st order local linear interpolation for dense/ts output. That loses nothing:
    its error is of second order in the step size, next to one of first order in the
    solution. (No better one can be made from the two evaluations of a step: the slopes
    that these give, of $p$ at its start and of $q$ at its end, are those of the line.)

    **How it works.** Over control increments $\Delta x_1$ and $\Delta x_2$ a step is

    $p \leftarrow p + f_1(t_0, q) \Delta x_1$

    $q \leftarrow q + f_2(t_0, p) \Delta x_2$

    ??? cite "Reference"

        ```bibtex
        @book{hairer2006geometric,
            title={Geometric Numerical Integration: Structure-Preserving Algorithms for
                   Ordinary Differential Equations},
            author={Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
            edition={Second},
            publisher={Springer},
            year={2006},
        }
        ```
    """

    term_structure: ClassVar[Any] = (diffrax.AbstractTerm, diffrax.AbstractTerm)
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

    def order(self, terms: Terms) -> int:
        return 1

    def init(
        self,
        terms: tuple[Term, Term],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: tuple[PyTree, PyTree],
        args: Args,
    ) -> _SolverState:
        return None

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
        return Registers(y)

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        return registers.registers, None

    def control(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        fixed: PyTree,
    ) -> PyTree:
        term_1, term_2 = terms
        return term_1.contr(t0, t1), term_2.contr(t0, t1)

    def couplings(self) -> tuple[Coupling, ...]:
        return Coupling(0, self._advance_p), Coupling(1, self._advance_q)

    def _advance_p(self, step: StepInfo, registers: tuple[PyTree, ...]):
        _, q = registers
        term, _ = step.terms
        control, _ = step.control
        return term.vf_prod(step.t0, q, step.args, control), {}

    def _advance_q(self, step: StepInfo, registers: tuple[PyTree, ...]):
        p, _ = registers
        _, term = step.terms
        _, control = step.control
        return term.vf_prod(step.t0, p, step.args, control), {}

    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        return None, dict(y0=registers0, y1=registers1)


SemiImplicitEuler.__init__.__doc__ = """**Arguments:** None"""
