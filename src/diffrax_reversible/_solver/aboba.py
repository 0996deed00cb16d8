import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar, final, NamedTuple

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    PyTree,
    RealScalarLike,
    Terms,
    VF,
    WrapTerm,
    Y,
)
from .._method.base import AbstractReversibleSolver
from .._method.controlled import budget, precision
from .._method.srk import brownian_control


class _SolverState(NamedTuple):
    # By how much rounding errors grow on the way back to the last checkpoint, in bits.
    spent: Float[Array, ""]
    # Whether the last step was over the budget.
    wants_checkpoint: Bool[Array, ""]
    # Whether it would have been so by itself.
    needs_checkpoint: Bool[Array, ""]


class _Step(NamedTuple):
    """What a step and its inverse are made of."""

    h: RealScalarLike
    # `x -> u h grad_f(x) / 2`.
    half_kick: Callable[[PyTree], PyTree]
    # `exp(-gamma h)`.
    contraction: PyTree
    # What the noise adds to `v`, and half of what it adds to `x`.
    noise_v: PyTree
    noise_x: PyTree


def _unwrap(term: Any) -> Any:
    return term.term if isinstance(term, WrapTerm) else term


def _broadcast(coefficients: PyTree, x: PyTree) -> PyTree:
    """A prefix of `x`, to its structure and shapes."""

    def to(a, subtree):
        return jtu.tree_map(
            lambda x: jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape), subtree
        )

    return jtu.tree_map(to, coefficients, x)


def _axpy(a: RealScalarLike, x: PyTree, y: PyTree) -> PyTree:
    def add(x, y):
        return jnp.asarray(a).astype(x.dtype) * x + y

    return jtu.tree_map(add, x, y)


def _add(x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda x, y: x + y, x, y)


def _sub(x: PyTree, y: PyTree) -> PyTree:
    return jtu.tree_map(lambda x, y: x - y, x, y)


@final
class ABOBA(
    AbstractReversibleSolver[_SolverState],
    diffrax.AbstractStratonovichSolver[_SolverState],
):
    r"""A splitting method for underdamped Langevin dynamics, with its reverse. Use it
    for `terms=MultiTerm(UnderdampedLangevinDriftTerm(...),
    UnderdampedLangevinDiffusionTerm(...))` and `y=(x, v)`, as [`diffrax.ALIGN`][].

    Of order 2 and of strong order 2, and converges to the Stratonovich solution, which
    is the Ito solution too, as the noise is additive. Has no error estimate. Needs a
    Brownian motion with `levy_area=SpaceTimeLevyArea`.

    Each step makes one evaluation of $\nabla f$; undoing it makes two, with one
    pullback, on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The
    solver state is a real scalar and two booleans. Dense output is linear.

    !!! warning

        The friction contracts velocities by $e^{-\gamma h}$ in each step, so rounding
        errors grow by $e^{\gamma h}$ in the backward pass. The state is stored whenever
        they would have grown by $e^{10}$ ($e^4$ in single precision), that is $\gamma T
        / 10$ times in a solve over a time $T$, with the largest of the frictions; see
        `checkpoints` of [`diffrax_reversible.ReversibleAdjoint`][].

    **How it works.** The dynamics are

    $\mathrm{d}x = v \mathrm{d}t, \quad \mathrm{d}v = -\gamma v \mathrm{d}t - u \nabla
    f(x) \mathrm{d}t + \sqrt{2 \gamma u} \mathrm{d}w$

    A step of size $h$, in which $W$ is the increment of the Brownian motion and $H$ its
    space-time Levy area, is

    $x \leftarrow x + \frac{h}{2} v + \frac{h}{2} s H$

    $v \leftarrow v - \frac{h}{2} u \nabla f(x)$

    $v \leftarrow e^{-\gamma h} v + s (W - \gamma h H)$

    $v \leftarrow v - \frac{h}{2} u \nabla f(x)$

    $x \leftarrow x + \frac{h}{2} v + \frac{h}{2} s H$

    with $s^2 = u (1 - e^{-2 \gamma h}) / (h + \gamma^2 h^3 / 12)$, so that the velocity
    of a free particle has the right distribution whatever $h$ is. The method of the
    reference is the same without $H$, and of strong order 1.

    ??? cite "Reference"

        ```bibtex
        @article{leimkuhler2013rational,
            title={Rational Construction of Stochastic Numerical Methods for Molecular
                   Sampling},
            author={Leimkuhler, Benedict and Matthews, Charles},
            journal={Applied Mathematics Research eXpress},
            volume={2013},
            number={1},
            pages={34--56},
            year={2013}
        }
        ```
    """

    term_structure: ClassVar[Any] = diffrax.MultiTerm[
        tuple[
            diffrax.UnderdampedLangevinDriftTerm,
            diffrax.UnderdampedLangevinDiffusionTerm,
        ]
    ]
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = (
        diffrax.LocalLinearInterpolation
    )

    def order(self, terms: Terms) -> int:
        return 2

    def strong_order(self, terms: Terms) -> RealScalarLike:
        return 2

    def init(
        self,
        terms: diffrax.MultiTerm[Any],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        drift, diffusion = map(_unwrap, terms.terms)
        levy = diffusion.contr(t0, t1, use_levy=True)
        if not isinstance(levy, diffrax.AbstractSpaceTimeLevyArea):
            raise ValueError(
                "`ABOBA()` needs the space-time Levy area of the Brownian motion. Use "
                "`VirtualBrownianTree(..., levy_area=diffrax.SpaceTimeLevyArea)`."
            )
        x0, _ = y0
        same = [
            jnp.all(a == b)
            for name in ("gamma", "u")
            for a, b in zip(
                jtu.tree_leaves(_broadcast(getattr(drift, name), x0)),
                jtu.tree_leaves(_broadcast(getattr(diffusion, name), x0)),
                strict=True,
            )
        ]
        spent = eqx.error_if(
            jnp.zeros((), precision(y0).dtype),
            ~jnp.all(jnp.array(same)),
            "`ABOBA()` needs `gamma` and `u` to be the same in both of "
            "`UnderdampedLangevinDriftTerm` and `UnderdampedLangevinDiffusionTerm`. "
            "Pass the same values to both.",
        )
        return _SolverState(spent, jnp.array(False), jnp.array(False))

    def func(
        self,
        terms: diffrax.MultiTerm[Any],
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return terms.vf(t0, y0, args)

    def rebuilt(self, solver_state: _SolverState) -> Any:
        # The account is for the way forward alone.
        del solver_state
        return ()

    def needs_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        del solver_state, made_jump
        return new_solver_state.needs_checkpoint

    def wants_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        return new_solver_state.wants_checkpoint

    def _prepare(self, terms, t0, t1, x, args) -> _Step:
        h, w, area = brownian_control(terms, t0, t1, "WH")
        drift, diffusion = map(_unwrap, terms.terms)
        # Nothing happens in a step of no length; it must have a derivative.
        safe_h = jnp.where(h == 0, 1, h)

        def of_leaf(gamma, u_noise, w, area):
            h_, safe_h_ = (a.astype(gamma.dtype) for a in (h, safe_h))
            z = gamma * safe_h_
            s = jnp.sqrt(-u_noise * jnp.expm1(-2 * z) / (safe_h_ * (1 + z**2 / 12)))
            noise_v = s * (w - gamma * h_ * area)
            return jnp.exp(-gamma * h_), noise_v, s * h_ * area / 2

        gamma, u = (_broadcast(a, x) for a in (drift.gamma, drift.u))
        leaves = (gamma, _broadcast(diffusion.u, x), w, area)
        parts = [
            jtu.tree_map(lambda *a, i=i: of_leaf(*a)[i], *leaves) for i in (0, 1, 2)
        ]

        def half_kick(x):
            return jtu.tree_map(
                lambda u, f: (0.5 * h).astype(f.dtype) * u * f,
                u,
                drift.grad_f(x, args),
            )

        return _Step(h, half_kick, *parts)

    def _drift(self, step: _Step, sign: float, x: PyTree, v: PyTree) -> PyTree:
        moved = _axpy(0.5 * step.h, v, step.noise_x)
        return _axpy(sign, moved, x)

    def step(
        self,
        terms: diffrax.MultiTerm[Any],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, None, DenseInfo, _SolverState, diffrax.RESULTS]:
        del made_jump
        x, v = y0
        step = self._prepare(terms, t0, t1, x, args)
        x = self._drift(step, 1.0, x, v)
        kick = step.half_kick(x)
        v = _sub(v, kick)
        v = jtu.tree_map(lambda c, v, n: c * v + n, step.contraction, v, step.noise_v)
        v = _sub(v, kick)
        x = self._drift(step, 1.0, x, v)
        state1 = self._charge(step, y0, solver_state)
        return (x, v), None, dict(y0=y0, y1=(x, v)), state1, diffrax.RESULTS.successful

    def _charge(self, step: _Step, y0: Y, solver_state: _SolverState) -> _SolverState:
        spent, contraction = lax.stop_gradient((solver_state.spent, step.contraction))
        leaves = [c for c in jtu.tree_leaves(contraction) if c.size > 0]
        zero = jnp.zeros_like(spent)
        growth = [-jnp.log2(jnp.min(c)).astype(spent.dtype) for c in leaves]
        growth = ft.reduce(jnp.maximum, growth, zero)
        spent = spent + growth
        over = spent > budget(y0)
        return _SolverState(jnp.where(over, zero, spent), over, growth > budget(y0))

    def backward_step(
        self,
        terms: diffrax.MultiTerm[Any],
        t0: RealScalarLike,
        t1: RealScalarLike,
        y1: Y,
        args: Args,
        solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, DenseInfo, _SolverState]:
        del made_jump
        x, v = y1
        step = self._prepare(terms, t0, t1, x, args)
        x = self._drift(step, -1.0, x, v)
        kick = step.half_kick(x)
        v = _add(v, kick)
        v = jtu.tree_map(lambda c, v, n: (v - n) / c, step.contraction, v, step.noise_v)
        v = _add(v, kick)
        x = self._drift(step, -1.0, x, v)
        return (x, v), dict(y0=(x, v), y1=y1), solver_state


ABOBA.__init__.__doc__ = """**Arguments:** None

**Raises:**

- `ValueError`, when a solve starts, if the Brownian motion has no space-time Levy area.
- `RuntimeError`, when it runs, if `gamma` or `u` are not the same in both terms.
"""
