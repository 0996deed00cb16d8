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
from .._method import restart
from .._method.affine import Coupling, Registers, StepInfo
from .._method.coupling import AbstractCouplingSolver
from .._method.interpolation import hermite_or_linear


# `(t_prev, y_prev)`, and with `full_sync` whether to do so next, and a `restart.Memo`.
_SolverState: TypeAlias = tuple[Any, ...]


@final
class LeapfrogMidpoint(AbstractCouplingSolver[_SolverState]):
    r"""The leapfrog/midpoint method, with its reverse. Use it for oscillations, with
    [`diffrax.ConstantStepSize`][] or [`diffrax.StepTo`][]: it makes one evaluation a
    step, and has no error estimate.

    The steps are those of [`diffrax.LeapfrogMidpoint`][], of order 2 if they are even.
    Not for SDEs.

    Each step makes one evaluation of the vector field, and one evaluation with its
    pullback on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The
    solver state is $(t_{n-1}, y_{n-1})$, of the structure, shapes and dtypes of `t0`
    and `y`, so that with `y` it takes twice the memory of `y`. The time in it is
    recorded for every step, as uneven steps cannot be undone without it.

    Uses 2nd order Hermite interpolation for dense/ts output, from $y_n$, $f(t_n, y_n)$
    and $y_{n+1}$ (and through $y_{n-1}$ if the steps are even), without further
    evaluations. The error is of order 2 at all times, as with the local linear
    interpolation of [`diffrax.LeapfrogMidpoint`][]; and that of the derivative of order
    1 with either, as whatever passes through each $y_n$ follows the parasitic solution
    below. Where that is small the derivative is better by an order.

    !!! warning

        Unstable on every component of the solution that decays: the method has a
        parasitic solution that grows like $e^{-at}$ along a component that behaves like
        $e^{at}$, and changes its sign from step to step. On `y' = -5 y` over a time of
        10, with a thousand steps, the error is 3e+18. Use
        [`diffrax_reversible.UReversible`][] there, or
        `LeapfrogMidpoint(full_sync=True)`: that is accurate again, and starts anew in
        66 of these steps.

    **How it works.** A step is

    $y_{n+1} = y_{n-1} + (t_{n+1} - t_{n-1}) f(t_n, y_n)$

    where the first is an Euler step, $t_{-1} = t_0$ and $y_{-1} = y_0$.

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

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    # What was advanced is `y`, and what was `y` is now the previous value.
    permutation: ClassVar[tuple[int, ...]] = (1, 0)
    full_sync: bool = False
    # "hermite" or "linear". (Checked below, with a message better than a checker's.)
    interpolation: Any = eqx.field(static=True, default="hermite")

    def __check_init__(self) -> None:
        hermite_or_linear("LeapfrogMidpoint", self.interpolation)

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractLocalInterpolation]:
        return hermite_or_linear("LeapfrogMidpoint", self.interpolation)

    def order(self, terms: Terms) -> int:
        return 2

    def init(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        del terms, t1, args
        if self.full_sync:
            return t0, y0, jnp.array(False), restart.init(y0)
        return t0, y0

    def func(
        self,
        terms: Term,
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return terms.vf(t0, y0, args)

    def split(self, y: PyTree, solver_state: Any) -> Registers:
        if self.full_sync:
            _, y_prev, _, memo = solver_state
            return Registers((y_prev, y), memo=memo)
        _, y_prev = solver_state
        return Registers((y_prev, y))

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        (y_prev, y), _, fixed, memo = registers
        if self.full_sync:
            t_prev, sync = fixed
            return y, (t_prev, y_prev, sync, memo)
        return y, (fixed, y_prev)

    def recorded(self, solver_state: Any) -> Any:
        if self.full_sync:
            t_prev, _, sync, _ = solver_state
            return t_prev, sync
        t_prev, _ = solver_state
        return t_prev

    def wants_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        del new_solver_state, made_jump
        if self.full_sync:
            _, _, sync, _ = solver_state
            return sync
        return False

    def control(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        fixed: PyTree,
    ) -> PyTree:
        t_prev = fixed
        if self.full_sync:
            t_prev, sync = fixed
            t_prev = jnp.where(sync, t0, t_prev)
        # The second is for the interpolation alone.
        own = None if self.interpolation == "linear" else terms.contr(t0, t1)
        return terms.contr(t_prev, t1), own

    def next_fixed(
        self, fixed: PyTree, t0: RealScalarLike, t1: RealScalarLike
    ) -> PyTree:
        if self.full_sync:
            _, sync = fixed
            return t0, sync
        return t0

    def steer(
        self,
        fixed: PyTree,
        memo: PyTree,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        y_error: Y | None,
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[PyTree, PyTree]:
        if not self.full_sync:
            return fixed, memo
        t_prev, _ = fixed
        _, y0 = registers0
        _, y1 = registers1
        *_, info = infos
        # How far the step is from one of Euler's: half of `h**2 y''`, and twice the
        # parasitic solution.
        q = jtu.tree_map(lambda y1, y0, k: y1 - y0 - 0.5 * k, y1, y0, info["k"])
        # (After a start the two solutions are equal.)
        sync, memo = restart.update(memo, q, y1, 2)
        return (t_prev, sync), memo

    def couplings(self) -> tuple[Coupling, ...]:
        if self.full_sync:
            return (
                Coupling(0, self._forget, scale=self._keep),
                Coupling(0, self._leap),
            )
        return (Coupling(0, self._leap),)

    def _keep(self, fixed):
        _, sync = fixed
        return jnp.where(sync, jnp.float32(0), jnp.float32(1))

    def _forget(self, step: StepInfo, registers: tuple[PyTree, ...]):
        _, y = registers
        _, sync = step.fixed
        return jtu.tree_map(lambda x: jnp.where(sync, x, jnp.zeros_like(x)), y), {}

    def _leap(self, step: StepInfo, registers: tuple[PyTree, ...]):
        _, y = registers
        terms: Any = step.terms
        control, own = step.control
        f = terms.vf(step.t0, y, step.args)
        k = terms.prod(f, control)
        info = dict(k=k) if self.full_sync else {}
        if self.interpolation == "hermite":
            info["slope"] = terms.prod(f, own)
        return k, info

    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        _, y0 = registers0
        _, y1 = registers1
        if self.interpolation == "linear":
            return None, dict(y0=y0, y1=y1)
        *_, info = infos
        k0 = info["slope"]
        # That slope at the end with which there is no cubic term.
        k1 = jtu.tree_map(lambda a, b, k: 2 * (b - a) - k, y0, y1, k0)
        return None, dict(y0=y0, y1=y1, k0=k0, k1=k1)


LeapfrogMidpoint.__init__.__doc__ = """**Arguments:**

- `full_sync`: If true then the method starts anew, with an Euler step, when the
    parasitic solution has become four times the second difference of the true one. That
    keeps it stable. But such a step is no longer that of
    [`diffrax.LeapfrogMidpoint`][], and the state at it is stored, as one of
    `ReversibleAdjoint(checkpoints=...)`.
- `interpolation`: `"hermite"`, or `"linear"` for that of
    [`diffrax.LeapfrogMidpoint`][].

**Raises:**

- `ValueError` if `interpolation` is neither of the two.
"""
