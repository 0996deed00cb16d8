from collections.abc import Callable
from typing import Any, ClassVar, final, TypeAlias

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    PyTree,
    RealScalarLike,
    Term,
    Terms,
    VF,
    Y,
)
from .._method.affine import Coupling, Registers, StepInfo
from .._method.controlled import precision, rms
from .._method.coupling import AbstractCouplingSolver
from .._method.interpolation import hermite_or_linear


# `(yhat, f)`, and with `full_sync` whether to do so next.
_SolverState: TypeAlias = tuple[PyTree, ...]


@final
class ReversibleHeun(
    AbstractCouplingSolver[_SolverState],
    diffrax.AbstractAdaptiveSolver[_SolverState],
    diffrax.AbstractStratonovichSolver[_SolverState],
):
    r"""The reversible Heun method, with its reverse. Use it for SDEs, and where a
    vector field is costly: it makes one evaluation a step.

    The steps are those of [`diffrax.ReversibleHeun`][], of order 2 with an embedded
    error estimate of order 1, so that step sizes can be adaptive. When used to solve
    SDEs, converges to the Stratonovich solution, with strong order 0.5.

    Each step makes one evaluation of the vector field, as the last one is kept for the
    next step; and one evaluation with its pullback on the backward pass of
    [`diffrax_reversible.ReversibleAdjoint`][]. The solver state is $(\hat y, f)$, so
    that with `y` it takes the memory of three `y`. Here $\hat y$ has the structure,
    shapes and dtypes of `y`, and $f$ those of the vector field. Uses 3rd order Hermite
    interpolation for dense/ts output, from the slopes at $\hat y$, without further
    evaluations: the output is of order 2 at all times, and so is its derivative.
    ([`diffrax.ReversibleHeun`][] has local linear interpolation, with a derivative of
    order 1.)

    !!! warning

        Unstable on every component of the solution that decays: the difference $y -
        \hat y$ grows by $e^{-ah}$ in each step along a component that behaves like
        $e^{at}$. On `y' = -5 y` over a time of 10, with a thousand steps, the error is
        2e+15. Use [`diffrax_reversible.UReversible`][] there, or
        `ReversibleHeun(full_sync=True)`: that is accurate again, but starts anew in
        every third of these steps.

    At a jump of the vector field (see [`diffrax.ClipStepSizeController`][]) the kept
    evaluation is replaced by one at $y$, which cannot be undone. So the state at such a
    step is stored, as one of `ReversibleAdjoint(checkpoints=...)`.

    **How it works.** With a second copy $\hat y$ of the solution, a step over a control
    increment $\Delta x$ is

    $y \leftarrow y + \frac{1}{2} f(t_0, \hat y) \Delta x$

    $\hat y \leftarrow -\hat y + 2 y$

    $y \leftarrow y + \frac{1}{2} f(t_1, \hat y) \Delta x$

    ??? cite "Reference"

        ```bibtex
        @article{kidger2021efficient,
            author={Kidger, Patrick and Foster, James and Li, Xuechen and Lyons, Terry},
            title={{E}fficient and {A}ccurate {G}radients for {N}eural {SDE}s},
            journal={Advances in Neural Information Processing Systems},
            year={2021}
        }
        ```
    """

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    has_evaluate: ClassVar[bool] = True
    full_sync: bool = False
    # "hermite" or "linear". (Checked below, with a message better than a checker's.)
    interpolation: Any = eqx.field(static=True, default="hermite")

    def __check_init__(self) -> None:
        hermite_or_linear("ReversibleHeun", self.interpolation)

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractLocalInterpolation]:
        return hermite_or_linear("ReversibleHeun", self.interpolation)

    @property
    def resets(self) -> bool:
        return self.full_sync

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
        del t1
        f = terms.vf(t0, y0, args)
        return (y0, f, jnp.array(False)) if self.full_sync else (y0, f)

    def func(
        self,
        terms: Term,
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return terms.vf(t0, y0, args)

    def split(self, y: PyTree, solver_state: Any) -> Registers:
        yhat, f, *_ = solver_state
        return Registers((y, yhat), value=f)

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        (y, yhat), f, sync, _ = registers
        return y, (yhat, f, sync) if self.full_sync else (yhat, f)

    def recorded(self, solver_state: Any) -> Any:
        if self.full_sync:
            _, _, sync = solver_state
            return sync
        return ()

    def reset(
        self, registers: Registers, made_jump: BoolScalarLike
    ) -> tuple[Registers, BoolScalarLike]:
        (y, yhat), f, sync, memo = registers
        yhat = jtu.tree_map(lambda a, b: jnp.where(sync, a, b), y, yhat)
        return Registers((y, yhat), f, sync, memo), made_jump | sync

    def steer(
        self,
        fixed: PyTree,
        memo: PyTree,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        y_error: Y | None,
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[PyTree, PyTree]:
        if self.full_sync:
            y1, yhat1 = registers1
            difference = rms(jtu.tree_map(lambda a, b: a - b, y1, yhat1))
            eps = float(precision(y1).eps)
            level = rms(y_error) + 16 * eps * rms(y1)
            fixed = ~(difference <= level)
        return fixed, memo

    def couplings(self) -> tuple[Coupling, ...]:
        return (
            Coupling(0, self._kick),
            Coupling(1, self._reflect, scale=-1.0),
            Coupling(0, self._kick),
        )

    def evaluate(
        self,
        terms: Terms,
        t: RealScalarLike,
        registers: tuple[PyTree, ...],
        args: Args,
    ) -> PyTree:
        _, yhat = registers
        return terms.vf(t, yhat, args)

    def evaluate_after_jump(
        self,
        terms: Terms,
        t: RealScalarLike,
        registers: tuple[PyTree, ...],
        args: Args,
    ) -> PyTree:
        # As diffrax does: the one place in which the register that is kicked is read.
        y, _ = registers
        return terms.vf(t, y, args)

    def needs_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        del new_solver_state
        if self.full_sync:
            _, _, sync = solver_state
            return made_jump | sync
        return made_jump

    def _kick(self, step: StepInfo, registers: tuple[PyTree, ...]):
        f_dx = step.terms.prod(step.value, step.control)  # pyright: ignore[reportAttributeAccessIssue]
        kick = jtu.tree_map(lambda x: 0.5 * x, f_dx)
        return kick, dict(kick=kick)

    def _reflect(self, step: StepInfo, registers: tuple[PyTree, ...]):
        y, _ = registers
        return jtu.tree_map(lambda x: 2 * x, y), {}

    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        y0, yhat0 = registers0
        y1, yhat1 = registers1
        first, _, last = infos
        y_error = jtu.tree_map(lambda a, b: a - b, last["kick"], first["kick"])
        if self.interpolation == "linear":
            return y_error, dict(y0=y0, y1=y1)
        # Twice the kicks. Not the first kick itself: on the way back that is not known
        # where a solve was given a kept evaluation that is not its own.
        k0 = jtu.tree_map(lambda y, a, b: a + b - 2 * y, y0, yhat0, yhat1)
        k1 = jtu.tree_map(lambda x: 2 * x, last["kick"])
        return y_error, dict(y0=y0, y1=y1, k0=k0, k1=k1)


ReversibleHeun.__init__.__doc__ = """**Arguments:**

- `full_sync`: If true then a step starts from $\\hat y = y$, with one more evaluation
    of the vector field, if the distance of the two has grown beyond the error estimate
    of the step before. That keeps the method stable. But such a step is no longer that
    of [`diffrax.ReversibleHeun`][], the state at it is stored, as one of
    `ReversibleAdjoint(checkpoints=...)`, and the backward pass makes two evaluations
    more for each step.
- `interpolation`: `"hermite"`, or `"linear"` for that of [`diffrax.ReversibleHeun`][].

**Raises:**

- `ValueError` if `interpolation` is neither of the two.
"""
