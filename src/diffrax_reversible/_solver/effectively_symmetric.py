import math
from collections.abc import Callable
from typing import ClassVar, final, TypeAlias

import diffrax
import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._compat import Args, BoolScalarLike, DenseInfo, RealScalarLike, VF, Y
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
    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation
    tableau: eqx.AbstractClassVar[diffrax.ButcherTableau]

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        return 2

    def strong_order(self, terms: PyTree[diffrax.AbstractTerm]) -> RealScalarLike:
        return 0.5

    def init(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        return None

    def func(
        self,
        terms: diffrax.AbstractTerm,
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: diffrax.AbstractTerm,
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
        terms: diffrax.AbstractTerm,
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
    r"""An explicit and effectively symmetric Runge--Kutta method with 3 stages: it is
    undone by a step of size $-h$, up to $O(h^6)$.

    EES(2, 5; x = 1/10) of the reference. Of order 2, with an embedded Euler method as
    error estimate. Each step makes 3 evaluations of the vector field; undoing it makes
    6, and 3 pullbacks, on the backward pass of
    [`diffrax_reversible.ReversibleAdjoint`][]. There is no solver state, and no second
    register: so nothing grows next to the solution, and it is as stable as an ordinary
    Runge--Kutta method with steps forwards. Uses 2nd order interpolation for dense/ts
    output, which needs no further evaluations.

    When used to solve SDEs, converges to the Stratonovich solution.

    !!! warning

        The gradient is not exact. Its error is that of the rebuilt solution, $O(h^5)$,
        and grows on the way back as any error does that goes against a contraction.
        For a pendulum over a time of 20 it is 3e-5 with 100 steps, 1e-6 with 200 and
        3e-8 with 400; on Van der Pol's equation over a time of 10 it is 2e-5 with 800.
        Where the solution that was rebuilt is off by more than
        `ReversibleAdjoint(drift_tolerance=...)`, that raises an error; how far it is
        off is in the `drift` of [`diffrax_reversible.diagnose`][]. There are no
        checkpoints but those of `ReversibleAdjoint(checkpoint_every=...)`, which make
        the error smaller. For an exact gradient use
        [`diffrax_reversible.UReversible`][].

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
    r"""An explicit and effectively symmetric Runge--Kutta method with 4 stages: it is
    undone by a step of size $-h$, up to $O(h^8)$.

    EES(2, 7; x = (5 - 3 sqrt(2)) / 14) of the reference. Of order 2, with an embedded
    Euler method as error estimate. Each step makes 4 evaluations of the vector field;
    undoing it makes 8, and 4 pullbacks, on the backward pass of
    [`diffrax_reversible.ReversibleAdjoint`][]. There is no solver state, and no second
    register: so nothing grows next to the solution, and it is as stable as an ordinary
    Runge--Kutta method with steps forwards. Uses 2nd order interpolation for dense/ts
    output, which needs no further evaluations.

    When used to solve SDEs, converges to the Stratonovich solution.

    !!! warning

        The gradient is not exact. Its error is that of the rebuilt solution, $O(h^7)$,
        and grows on the way back as any error does that goes against a contraction.
        For a pendulum over a time of 20 it is 5e-6 with 50 steps, 4e-8 with 100 and
        3e-10 with 200; on Van der Pol's equation over a time of 10 it is 2e-5 with
        200. Where the solution that was rebuilt is off by more than
        `ReversibleAdjoint(drift_tolerance=...)`, that raises an error; how far it is
        off is in the `drift` of [`diffrax_reversible.diagnose`][]. There are no
        checkpoints but those of `ReversibleAdjoint(checkpoint_every=...)`, which make
        the error smaller. For an exact gradient use
        [`diffrax_reversible.UReversible`][].

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
