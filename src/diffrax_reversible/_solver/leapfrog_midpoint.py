from collections.abc import Callable
from typing import Any, ClassVar, final, TypeAlias

import diffrax
from jaxtyping import PyTree

from .._compat import Args, RealScalarLike, VF, Y
from .._coupling import AbstractCouplingSolver, Coupling, Registers, StepInfo


_SolverState: TypeAlias = tuple[RealScalarLike, PyTree]


@final
class LeapfrogMidpoint(AbstractCouplingSolver[_SolverState]):
    r"""The leapfrog/midpoint method, with its reverse.

    The steps are those of [`diffrax.LeapfrogMidpoint`][], of order 2 if they are even:

    $y_{n+1} = y_{n-1} + (t_{n+1} - t_{n-1}) f(t_n, y_n)$

    where the first of them is an Euler step, $t_{-1} = t_0$ and $y_{-1} = y_0$. Has no
    error estimate.

    Each step makes one evaluation of the vector field, and one evaluation with its
    pullback on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The
    solver state is $(t_{n-1}, y_{n-1})$; the time in it is recorded for every step, as
    uneven steps cannot be undone without it. Uses 1st order local linear interpolation
    for dense/ts output.

    !!! warning

        The method has a parasitic solution that grows like $e^{-at}$ along a component
        that behaves like $e^{at}$: it is unstable on every component that decays.

    ??? cite "Reference"

        ```bibtex
        @article{shampine2009stability,
            title={Stability of the leapfrog/midpoint method},
            author={L. F. Shampine},
            journal={Applied Mathematics and Computation},
            volume={208},
            number={1},
            pages={293-298},
            year={2009},
        }
        ```
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )
    # What was advanced is `y`, and what was `y` is now the previous value.
    permutation: ClassVar[tuple[int, ...]] = (1, 0)

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        return 2

    def init(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del terms, t1, args
        return t0, y0

    def func(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return terms.vf(t0, y0, args)

    def split(self, y: PyTree, solver_state: Any) -> Registers:
        _, y_prev = solver_state
        return Registers((y_prev, y))

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        (y_prev, y), _, t_prev = registers
        return y, (t_prev, y_prev)

    def recorded(self, solver_state: Any) -> Any:
        t_prev, _ = solver_state
        return t_prev

    def control(self, terms, t0, t1, fixed):
        t_prev = fixed
        return terms.contr(t_prev, t1)

    def next_fixed(self, fixed, t0, t1):
        return t0

    def couplings(self) -> tuple[Coupling, ...]:
        return (Coupling(0, self._leap),)

    def _leap(self, step: StepInfo, registers: tuple[PyTree, ...]):
        _, y = registers
        return step.terms.vf_prod(step.t0, y, step.args, step.control), {}  # pyright: ignore[reportAttributeAccessIssue]

    def finish(self, registers0, registers1, infos):
        _, y0 = registers0
        _, y1 = registers1
        return None, dict(y0=y0, y1=y1)


LeapfrogMidpoint.__init__.__doc__ = """**Arguments:** None"""
