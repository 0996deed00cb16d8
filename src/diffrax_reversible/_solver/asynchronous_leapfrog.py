import math
from collections.abc import Callable
from typing import Any, ClassVar, final, TypeAlias

import diffrax
import equinox as eqx
import jax.lax as lax
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
    Y,
)
from .._method import restart
from .._method.affine import Coupling, Registers, StepInfo
from .._method.coupling import AbstractCouplingSolver


# `v`; and with `full_sync`, `(v, sync, memo)` where `sync` is whether to do so next.
_SolverState: TypeAlias = PyTree


@final
class AsynchronousLeapfrog(
    AbstractCouplingSolver[_SolverState],
    diffrax.AbstractAdaptiveSolver[_SolverState],
    diffrax.AbstractStratonovichSolver[_SolverState],
):
    r"""The asynchronous leapfrog method, with its reverse. Use it where a vector field
    is costly: it makes one evaluation a step.

    Of order 2 (of **order 1** with a `damping` other than 1), with an embedded error
    estimate of order 1, so that step sizes can be adaptive. When used to solve SDEs,
    with `damping=1`, converges to the Stratonovich solution, with strong order 0.5.

    Each step makes one evaluation of the vector field, and one evaluation with its
    pullback on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]; one
    more is made at the very start. The solver state is a velocity $v$, of the
    structure, shapes and dtypes of the vector field, so that with `y` it takes twice
    the memory of `y`. Uses 2nd order interpolation for dense/ts output, without further
    evaluations.

    !!! warning

        Unstable on every component of the solution that decays: the error of $v$
        changes its sign in every step, and grows like $e^{-at}$ along a component that
        behaves like $e^{at}$. On `y' = -5 y` over a time of 10, with a thousand steps,
        the error is 2e+15; and under a step size controller the steps become so small
        that `max_steps` is reached. Use [`diffrax_reversible.UReversible`][] there, or
        `AsynchronousLeapfrog(full_sync=True)`: that is accurate again, and starts anew
        in 19 of these steps. A jump of the vector field has the same effect, as $v$ is
        carried across it, and the same remedy.

        With $\eta < 1$ the method is stable there, but of order 1; and undoing a step
        amplifies rounding errors by $1 / |1 - 2 \eta|$. For $\eta = 0.9$ that is a
        factor of 5e+9 in a hundred steps.

    **How it works.** With $v_0 = f(t_0, y_0)$, a step over a control increment $\Delta
    x$ is

    $y \leftarrow y + \frac{1}{2} v \Delta x$

    $v \leftarrow (1 - 2 \eta) v + 2 \eta f(t_0 + \frac{h}{2}, y)$

    $y \leftarrow y + \frac{1}{2} v \Delta x$

    with the `damping` $\eta$. The error estimate is half of the change of $v$, times
    $\Delta x$. With $\eta < 1$, $v$ lags behind by $h y'' (1 - \eta) / (2 \eta)$, and
    the error is of the first order in that.

    ??? cite "Reference"

        ```bibtex
        @article{mutze2013asynchronous,
            title={An asynchronous leapfrog method {II}},
            author={Mutze, Ulrich},
            journal={arXiv preprint arXiv:1311.6602},
            year={2013},
        }

        @inproceedings{zhuang2021mali,
            title={{MALI}: A memory efficient and reverse accurate integrator for neural
                   {ODE}s},
            author={Zhuang, Juntang and Dvornek, Nicha C. and Tatikonda, Sekhar and
                    Duncan, James S.},
            booktitle={International Conference on Learning Representations},
            year={2021},
        }
        ```
    """

    term_structure: ClassVar[Any] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation
    damping: float
    full_sync: bool

    def __init__(self, damping: float | int = 1.0, full_sync: bool = False):
        self.damping = _check_damping(damping)
        self.full_sync = full_sync
        if full_sync and self.damping != 1:
            raise ValueError(
                "`AsynchronousLeapfrog(damping=..., full_sync=True)`: use one or the "
                "other, as `full_sync=True` needs `damping=1`."
            )

    def order(self, terms: Terms) -> int:
        return 2 if self.damping == 1 else 1

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
        if self.damping != 1 and is_sde(terms):
            raise ValueError(
                f"`AsynchronousLeapfrog(damping={self.damping})` cannot solve an SDE, "
                "as it converges neither to its Ito nor to its Stratonovich solution. "
                "Use `damping=1`."
            )
        v = terms.vf(t0, y0, args)
        if self.full_sync:
            return v, jnp.array(False), restart.init(y0)
        return v

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
            v, _, memo = solver_state
            return Registers((y, v), memo=memo)
        return Registers((y, solver_state))

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        (y, v), _, sync, memo = registers
        return y, (v, sync, memo) if self.full_sync else v

    def recorded(self, solver_state: Any) -> Any:
        if self.full_sync:
            _, sync, _ = solver_state
            return sync
        return ()

    def wants_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        del new_solver_state, made_jump
        if self.full_sync:
            _, sync, _ = solver_state
            return sync
        return False

    def couplings(self) -> tuple[Coupling, ...]:
        step = (
            Coupling(0, self._drift),
            Coupling(1, self._kick, scale=1 - 2 * self.damping),
            Coupling(0, self._drift),
        )
        if self.full_sync:
            return (Coupling(1, self._renew, scale=self._keep), *step)
        return step

    def _keep(self, sync):
        return jnp.where(sync, jnp.float32(0), jnp.float32(1))

    def _renew(self, step: StepInfo, registers: tuple[PyTree, ...]):
        y, _ = registers
        evaluate = lambda: step.terms.vf(step.t0, y, step.args)  # pyright: ignore[reportAttributeAccessIssue]
        struct = eqx.filter_eval_shape(evaluate)
        zeros = lambda: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
        return lax.cond(step.fixed, evaluate, zeros), {}

    def _drift(self, step: StepInfo, registers: tuple[PyTree, ...]):
        _, v = registers
        v_dx = step.terms.prod(v, step.control)  # pyright: ignore[reportAttributeAccessIssue]
        drift = jtu.tree_map(lambda x: 0.5 * x, v_dx)
        return drift, dict(drift=drift)

    def _kick(self, step: StepInfo, registers: tuple[PyTree, ...]):
        y, _ = registers
        t_mid = step.t0 + 0.5 * (step.t1 - step.t0)
        f = step.terms.vf(t_mid, y, step.args)  # pyright: ignore[reportAttributeAccessIssue]
        return jtu.tree_map(lambda x: 2 * self.damping * x, f), {}

    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        y0, _ = registers0
        y1, _ = registers1
        *_, first, _, last = infos
        drift0, drift1 = first["drift"], last["drift"]
        y_error = jtu.tree_map(lambda a, b: b - a, drift0, drift1)
        double = lambda x: jtu.tree_map(lambda a: 2 * a, x)
        return y_error, dict(y0=y0, y1=y1, k0=double(drift0), k1=double(drift1))

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
        y1, _ = registers1
        # The estimate is half of `h**2 y''`, and the parasitic solution.
        return restart.update(memo, y_error, y1, 1)


def _check_damping(damping) -> float:
    try:
        as_float = float(damping)
    except (TypeError, ValueError) as e:  # includes traced values
        raise ValueError(
            "`AsynchronousLeapfrog(damping=...)` must be a number that is known when "
            f"the solver is made (not a traced array); got {damping}."
        ) from e
    if as_float == 0.5:
        raise ValueError(
            "`AsynchronousLeapfrog(damping=0.5)` discards the velocity, so that a step "
            "cannot be undone. Use another `damping`, best close to 1."
        )
    if not (math.isfinite(as_float) and 0 < as_float <= 1):
        raise ValueError(
            "`AsynchronousLeapfrog(damping=...)` must be greater than 0 and at most 1; "
            f"got {damping}."
        )
    return as_float


AsynchronousLeapfrog.__init__.__doc__ = """**Arguments:**

- `damping`: The number $\\eta$ of the method, with `0 < damping <= 1`. Not 1/2, for
    then nothing remains of the velocity, and a step cannot be undone.
- `full_sync`: If true then the method starts anew, from $v = f(t, y)$, with one more
    evaluation of the vector field, when the part of the error estimate that changes its
    sign from step to step has become four times the part that does not. That keeps it
    stable. But the state at such a step is stored, as one of
    `ReversibleAdjoint(checkpoints=...)`.

**Raises:**

- `ValueError` if `damping` is out of its range or 1/2, or given together with
    `full_sync`; and, when a solve starts, for an SDE with `damping` other than 1.
"""
