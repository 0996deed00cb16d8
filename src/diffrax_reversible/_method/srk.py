r"""The increment of a stochastic Runge--Kutta method.

**Time reversal.** Over $[s, t]$ let $W = W_t - W_s$ be the increment of a Brownian
motion, $B_r = (W_r - W_s) - \frac{r - s}{t - s} W$ its bridge, and

$H = \frac{1}{t - s} \int_s^t B_r dr, \quad K = \frac{1}{(t - s)^2} \int_s^t B_r
(\frac{s + t}{2} - r) dr$

its space-time and space-time-time Levy areas. Seen from $t$ backwards the bridge is the
same, in the other order. So the control of the reversed interval is $(-h, -W, H, -K)$.

**Order.** The Stratonovich solution is the flow along the path, and the flow along the
reversed path is its inverse. Either increment follows its flow with the same local
error, in every moment, for either is a polynomial in the same words in $h, W, H, K$ up
to a remainder. Hence going there and back is the identity up to a local error. Its
leading terms have mean zero given the past, as those of the method have, also where
they are taken at the end of the step: what is of size $h^{p + 1/2}$ changes by a factor
of $1 + O(h^{1/2})$. So the distance of the two registers of
[`diffrax_reversible.UReversible`][] is of the strong order $p$ of the method, and so is
its solution. An Ito method has no such inverse.
"""

from collections.abc import Sequence
from typing import Any

import diffrax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._compat import Args, RealScalarLike, Y
from .explicit_rk import combine, Increment, NOT_THERE


def _coefficients(tableau: diffrax.StochasticButcherTableau) -> list[Any]:
    """Those of `W`, and of `H` and `K` if the method uses them."""
    all_of_them = (tableau.coeffs_w, tableau.coeffs_hh, tableau.coeffs_kk)
    return [x for x in all_of_them if x is not None]


def brownian_control(
    terms: diffrax.MultiTerm[Any], t0: RealScalarLike, t1: RealScalarLike, names: str
) -> tuple[PyTree, ...]:
    """`h`, and those of `W`, `H` and `K` that are named."""
    drift, diffusion = terms.terms
    h = drift.contr(t0, t1)
    levy = diffusion.contr(t0, t1, use_levy=True)

    def get(name: str):
        area = getattr(levy, name)
        if name == "H":
            # In a solve from a later to an earlier time diffrax changes the sign of
            # every part of the control. Of this one that is not right.
            area = jtu.tree_map(lambda x: jnp.where(h < 0, -x, x), area)
        return area

    return h, *map(get, names)


def srk_control(
    tableau: diffrax.StochasticButcherTableau,
    terms: diffrax.MultiTerm[Any],
    t0: RealScalarLike,
    t1: RealScalarLike,
) -> tuple[PyTree, ...]:
    """`(h, W)`, `(h, W, H)` or `(h, W, H, K)`, whichever the method uses."""
    return brownian_control(terms, t0, t1, "WHK"[: len(_coefficients(tableau))])


def reversed_control(control: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """That over the same interval, from its end to its start."""
    minus = lambda tree: jtu.tree_map(lambda x: -x, tree)
    return tuple(x if i == 2 else minus(x) for i, x in enumerate(control))


def srk_increment(
    tableau: diffrax.StochasticButcherTableau,
    terms: diffrax.MultiTerm[Any],
    t_from: RealScalarLike,
    t_to: RealScalarLike,
    y: Y,
    args: Args,
    control: tuple[PyTree, ...],
    sign: int,
) -> Increment:
    """As `explicit_rk_increment`, for a method with this tableau. `control` is that of
    `srk_control`, and `terms` are drift and diffusion.

    Drift and diffusion are evaluated once in each stage that has them. Diffusions that
    do not depend on `y` are evaluated at both times instead.

    `Increment.k` has one element: the slope where the increment is made from, from the
    first stages of drift and diffusion. (Of the drift alone if the diffusion does not
    depend on `y`.)
    """
    drift, diffusion = terms.terms
    h, *areas = control if sign == 1 else reversed_control(control)
    noise = _coefficients(tableau)
    stages = len(tableau.b_sol)
    additive = tableau.is_additive_noise()

    hf: list[PyTree] = []
    # For each of `areas` its product with the diffusion, in each stage.
    gx: list[list[PyTree]] = [[] for _ in areas]
    if additive:
        g_from = diffusion.vf(t_from, y, args)
        gx = [[diffusion.prod(g_from, x)] for x in areas]

    def total(of_drift, of_noise: Sequence[Any], y: PyTree = NOT_THERE):
        rows = [np.ravel(row) for row in (of_drift, *of_noise)]
        vectors = [x for row, k in zip(rows, (hf, *gx)) for x in k[: len(row)]]
        return combine(np.concatenate(rows), vectors, 1, y)

    for i in range(stages):
        if i == 0:
            c, of_drift = 0.0, ()
            of_noise = [x.a[0] if additive else () for x in noise]
        else:
            c, of_drift = tableau.c[i - 1].item(), tableau.a[i - 1]
            of_noise = [x.a[i if additive else i - 1] for x in noise]
        # Exact at both ends, where the vector field may have its only finite limit.
        t_i = t_from if c == 0 else t_to if c == 1 else t_from + c * (t_to - t_from)
        # (As in `explicit_rk_increment`.)
        y_i = lax.optimization_barrier(total(of_drift, of_noise, y))
        if tableau.ignore_stage_f is not None and tableau.ignore_stage_f[i]:
            hf.append(NOT_THERE)
        else:
            hf.append(lax.optimization_barrier(drift.vf_prod(t_i, y_i, args, h)))
        if additive:
            continue
        if tableau.ignore_stage_g is not None and tableau.ignore_stage_g[i]:
            g_i = NOT_THERE
        else:
            g_i = diffusion.vf(t_i, y_i, args)
        for k, x in zip(gx, areas):
            if g_i is NOT_THERE:
                k.append(NOT_THERE)
            else:
                k.append(lax.optimization_barrier(diffusion.prod(g_i, x)))

    first = lambda k: [next(x for x in k if x is not NOT_THERE)]
    slope = combine(np.ones(1), first(hf), sign)
    if not additive:
        slope = combine(np.full(1, float(sign)), first(gx[0]), 1, slope)
    if tableau.b_error is None:
        error = None
    else:
        error = total(tableau.b_error, [] if additive else [x.b_error for x in noise])
    of_noise = [x.b_sol for x in noise]
    if additive:
        # And half of `(g_to - g_from) (W - 2 H)`, for a diffusion that depends on time.
        change = [0.5, -1.0, 0.0][: len(areas)]
        of_noise = [b - c for b, c in zip(of_noise, change)]
        increment = total(tableau.b_sol, of_noise)
        g_to = diffusion.vf(t_to, y, args)
        to = [diffusion.prod(g_to, x) for x in areas]
        increment = combine(np.array(change), to, 1, increment)
    else:
        increment = total(tableau.b_sol, of_noise)
    return Increment(increment=increment, error=error, k=(slope,))
