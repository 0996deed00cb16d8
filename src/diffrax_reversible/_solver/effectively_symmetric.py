import math
from collections.abc import Callable
from typing import Any, ClassVar, final, TypeAlias

import diffrax
import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    RealScalarLike,
    Term,
    Terms,
    VF,
    Y,
)
from .._method.base import AbstractReversibleSolver
from .._method.explicit_rk import explicit_rk_increment


_SolverState: TypeAlias = None

_ees25_tableau = diffrax.ButcherTableau(
    a_lower=(np.array([1 / 3]), np.array([-5 / 48, 15 / 16])),
    b_sol=np.array([1 / 10, 1 / 2, 2 / 5]),
    b_error=np.array([1 / 10 - 1, 1 / 2, 2 / 5]),
    c=np.array([1 / 3, 5 / 6]),
)

_root = math.sqrt(2)
_ees27_b = np.array(
    [
        (5 - 3 * _root) / 14,
        (3 + _root) / 14,
        3 * (2 * _root - 1) / 14,
        (9 - 4 * _root) / 14,
    ]
)
_ees27_tableau = diffrax.ButcherTableau(
    a_lower=(
        np.array([(2 - _root) / 3]),
        np.array([(_root - 4) / 24, (4 + _root) / 8]),
        np.array(
            [
                (145 * _root - 176) / 168,
                3 * (8 - 5 * _root) / 56,
                3 * (3 - _root) / 7,
            ]
        ),
    ),
    b_sol=_ees27_b,
    b_error=_ees27_b - np.array([1.0, 0.0, 0.0, 0.0]),
    c=np.array([(2 - _root) / 3, (2 + _root) / 6, (4 + _root) / 6]),
)


class _AbstractEffectivelySymmetric(
    AbstractReversibleSolver[_SolverState],
    diffrax.AbstractAdaptiveSolver[_SolverState],
    diffrax.AbstractStratonovichSolver[_SolverState],
):
    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation
    tableau: eqx.AbstractClassVar[diffrax.ButcherTableau]

    def order(self, terms: Terms) -> int:
        return 2

    def strong_order(self, terms: Terms) -> RealScalarLike:
        return 0.5

    def init(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        return None

    def func(
        self,
        terms: Term,
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, _SolverState, diffrax.RESULTS]:
        del solver_state, made_jump
        control = terms.contr(t0, t1)
        psi = explicit_rk_increment(
            self.tableau, terms, t0, t1, y0, args, control, sign=1
        )
        y1 = jtu.tree_map(lambda y, p: y + p, y0, psi.increment)
        dense_info = _dense_info(y0, y1, psi.k[0])
        return y1, psi.error, dense_info, None, diffrax.RESULTS.successful

    def backward_step(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState]:
        del solver_state, made_jump
        control = terms.contr(t0, t1)
        psi = explicit_rk_increment(
            self.tableau, terms, t1, t0, y1, args, control, sign=-1
        )
        y0 = jtu.tree_map(lambda y, p: y + p, y1, psi.increment)
        k0 = terms.vf_prod(t0, y0, args, control)
        return y0, _dense_info(y0, y1, k0), None


def _dense_info(y0: Y, y1: Y, k0: Y) -> DenseInfo:
    # The slope at the end that makes the cubic a parabola.
    k1 = jtu.tree_map(lambda a, b, k: 2 * (b - a) - k, y0, y1, k0)
    return dict(y0=y0, y1=y1, k0=k0, k1=k1)


@final
class EES25(_AbstractEffectivelySymmetric):
    r"""An explicit Runge--Kutta method that is *nearly* reversible: of 3 stages, and
    undone by a step of size $-h$ up to $O(h^6)$. Use it where a second copy of `y` does
    not fit in memory.

    Of order 2, with an embedded Euler method as error estimate, so that step sizes can
    be adaptive. As stable as an ordinary explicit Runge--Kutta method with 3 stages of
    order 2. When used to solve SDEs, converges to the Stratonovich solution, with
    strong order 0.5.

    Each step makes 3 evaluations of the vector field; undoing it makes 6, and 3
    pullbacks, on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. There
    is no solver state. Uses 2nd order interpolation for dense/ts output, without
    further evaluations.

    !!! warning

        A step is not undone exactly. The error of what is rebuilt, $O(h^5)$ in all,
        grows on the backward pass where the solution contracts. `ReversibleAdjoint`
        notices an error of more than about half of the digits, and repeats the backward
        pass with more states stored and recomputed, in the end with all of them: then
        the gradient is exact, and takes longer. A smaller error is in the gradient.
        `ReversibleAdjoint(checkpoint_every=...)` makes it smaller still, and the
        `drift` of [`diffrax_reversible.diagnose`][] shows how large it is. For exact
        gradients at once use [`diffrax_reversible.UReversible`][].

    This is EES(2, 5; x = 1/10) of the reference.

    ??? cite "Reference"

        ```bibtex
        @article{shmelev2025explicit,
            title={Explicit and Effectively Symmetric {R}unge--{K}utta Methods},
            author={Shmelev, Daniil and Ebrahimi-Fard, Kurusch and Tapia, Nikolas and
                    Salvi, Cristopher},
            journal={arXiv preprint arXiv:2507.21006},
            year={2025},
        }
        ```
    """

    tableau: ClassVar[diffrax.ButcherTableau] = _ees25_tableau


@final
class EES27(_AbstractEffectivelySymmetric):
    r"""An explicit Runge--Kutta method that is *nearly* reversible: of 4 stages, and
    undone by a step of size $-h$ up to $O(h^8)$. Use it where a second copy of `y` does
    not fit in memory.

    Of order 2, with an embedded Euler method as error estimate, so that step sizes can
    be adaptive. As stable as an ordinary explicit Runge--Kutta method with 4 stages of
    order 2. When used to solve SDEs, converges to the Stratonovich solution, with
    strong order 0.5.

    Each step makes 4 evaluations of the vector field; undoing it makes 8, and 4
    pullbacks, on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. There
    is no solver state. Uses 2nd order interpolation for dense/ts output, without
    further evaluations.

    !!! warning

        A step is not undone exactly. The error of what is rebuilt, $O(h^7)$ in all,
        grows on the backward pass where the solution contracts. `ReversibleAdjoint`
        notices an error of more than about half of the digits, and repeats the backward
        pass with more states stored and recomputed, in the end with all of them: then
        the gradient is exact, and takes longer. A smaller error is in the gradient.
        `ReversibleAdjoint(checkpoint_every=...)` makes it smaller still, and the
        `drift` of [`diffrax_reversible.diagnose`][] shows how large it is. For exact
        gradients at once use [`diffrax_reversible.UReversible`][].

    This is EES(2, 7; x = (5 - 3 sqrt(2)) / 14) of the reference.

    ??? cite "Reference"

        ```bibtex
        @article{shmelev2025explicit,
            title={Explicit and Effectively Symmetric {R}unge--{K}utta Methods},
            author={Shmelev, Daniil and Ebrahimi-Fard, Kurusch and Tapia, Nikolas and
                    Salvi, Cristopher},
            journal={arXiv preprint arXiv:2507.21006},
            year={2025},
        }
        ```
    """

    tableau: ClassVar[diffrax.ButcherTableau] = _ees27_tableau


EES25.__init__.__doc__ = """**Arguments:** None"""
EES27.__init__.__doc__ = """**Arguments:** None"""
