r"""The controlled coupling of [`diffrax_reversible.UReversible`][].

**The method.** Let $\Psi_h(y)$ be the increment of a Runge--Kutta method of order $p$,
and $R$ its stability function. From $(y, z)$ a step makes

$z' = m z + (1 - m) y, \quad y_1 = y + \Psi_h(z'), \quad z_1 = z' - \Psi_{-h}(y_1)$

with $0 \leq m \leq 1$ chosen anew for each step. It is undone by $z' = z_1 +
\Psi_{-h}(y_1)$, $y = y_1 - \Psi_h(z')$, $z = y - (y - z') / m$. McCallum & Foster
[1] have a single number $\lambda$ in place of the $m$s, and $\lambda y + (1 - \lambda)
z$ in place of the $y$ in the second equation. Here the roles are such that $y$ leads:
for $m = 0$ it *is* the wrapped method.

**Order.** Let $d = y - z$, so that $z' = y - m d$. As $y_1 - (z' + \Psi_h(z')) = m d$,

$d_1 = m d + [\Psi_h(z') + \Psi_{-h}(z' + \Psi_h(z'))] + [\Psi_{-h}(z' + \Psi_h(z') + m
d) - \Psi_{-h}(z' + \Psi_h(z'))].$

The first bracket is the defect of going there and back, at most $C h^{p + 1}$ as either
way has order $p$. The second is at most $h L m |d|$. So $|d_1| \leq (1 + h L) m |d| + C
h^{p + 1}$, and $|d_n| \leq C T e^{L T} h^p$ for every choice of the $m$s in $[0, 1]$.
Finally $|y_1 - (y + \Psi_h(y))| \leq h L m |d| = O(h^{p + 1})$, no more than a local
error: **the order is $p$, whatever the $m$s are.**

**Stability.** For $y' = a y$ let $R = R(ah)$, $\bar R = R(-ah)$. Then

$\begin{pmatrix} y_1 \\ d_1 \end{pmatrix} = \begin{pmatrix} R & -m (R - 1) \\ R \bar R -
1 & m (1 - (R - 1) \bar R) \end{pmatrix} \begin{pmatrix} y \\ d \end{pmatrix}$

whose determinant is $m$. So next to an eigenvalue $\mu$ close to $R$ there is a
parasitic one, $m / \mu$; for $m \to 0$ they become $R$ and 0: **the stability is that
of the wrapped method.** With $m$ close to 1, on the other hand, $d$ grows by $m / |R|$
in each step along every component that decays. That is the instability of the published
method; keeping $m$ below the rate at which the solution contracts removes it.

**The way back** multiplies rounding errors by $1 / \mu$ and by $\mu / m$. The first is
inherent to undoing a contraction. The second is the price of damping: $-\ln m$ is the
information (in nats) that a step forgets.

**Rounding.** What is kept is $(y, d)$ rather than $(y, z)$. With $\psi = \Psi_h(y - m
d)$ a step is $d \leftarrow m d$, then $(y, d) \leftarrow (y + \psi, d + \psi)$, and at
last $d \leftarrow d + \Psi_{-h}(y_1)$; and the second of these is undone as $y - d$,
and so $\psi$, is the same before and after it. (The two increments all but cancel, and
by Sterbenz's lemma without an error.) So $d$ is known to about $\epsilon |\psi|$, and
not just to $\epsilon |y|$ as the difference of two numbers would be: then a correction
of less than $\epsilon |y|$ would be rounded away, $d$ could not shrink below that, and
damping by $m$ would multiply $\epsilon |y|$ by $1 / m$ on the way back.

**The choice of $m$.** Whatever is forgotten must be paid for, so $m = 1$ unless $d$ has
outgrown the level

$D = \kappa |e| + 4 \epsilon |y|$

with the embedded error estimate $e$ of the step before ($|.|$ is the root mean square,
and $\epsilon$ the spacing of floating-point numbers); and then $m = D / |d|$, or 0 if
that is less than 1/1000. (If $y$ is a pytree of several leaves then each has its $D$,
and that for which $m$ is least decides. Their sizes may differ by any factor. In place
of $|e|$ stands the largest relative error of all times the size of the leaf, where that
is more: the error estimate of a scalar may vanish as it changes its sign.)

The perturbation of $y$ in a step is about $h L D$. For a linear problem the local error
is $\chi h L |e|$, where $\chi$ is the ratio of the leading coefficients of $R(x) - e^x$
and of the embedded error (both in the tableau). So $\kappa = \chi$ would perturb the
solution by its own local error, and a constant $\kappa$ would forget the same for all
methods; we take the geometric mean of $\chi$ and a constant, $\kappa = \min(1,
\sqrt\chi / 2)$: 0.16 for Tsit5, 0.36 for Dopri5, 0.29 for Heun, 0.71 for Bosh3, 0.06
for Dopri8. The second term is there for rounding alone: without it noise would be
damped at great cost, and with a larger one the solution in single precision would be
worse than rounding makes it.

If there is no embedded estimate then $|e|$ is what it would be for a linear problem,
from the slopes at both ends of the step.

**Noise.** For an SDE the same holds with $W$ next to $h$: a perturbation of $D$ is
multiplied by $h L$ and by $|W| L$, in the latter case of mean zero; and the $m$s are
known before the noise of their step is. But a step with little noise has a small error
estimate, and $d$ is the sum of those before it. With $D$ from that step alone one
driven by a single noise would forget in most of its steps: so $|e|$ is the largest so
far, faded by 0.9 a step.

**The derivative** of a step is taken with $d$ as a constant throughout, so that it is
that of the wrapped solver, from $z'$: $1 + \Psi_h'(y - m d)$ in place of $1 +
\Psi_h'(y)$. The difference is $O(h L' m |d|)$, where $L'$ bounds the second derivative
of the vector field, and $|d| = O(h^p)$: **so the gradient has the order $p$ too.** (An
exact derivative would have a parasitic part, that of $d$, which the control does not
see: a sensitive solution multiplies it as the eigenvalue $m / \mu$ says, with $m$ a
constant that was chosen for $d$ and not for its tangent. On Van der Pol's equation with
$\mu = 20$ it has been seen to grow by a factor of 1e115.) And what makes $d$ is not
differentiated, so that the second increment costs no pullback. It belongs to the
definition of the step: all adjoints compute the same gradient.

**The account.** `spent` estimates the logarithm of how much the way back amplifies
rounding errors since the last checkpoint. Each step adds $\max(-\ln m, \ln(|d_1| / (m
P)))$, where $P$ is the largest $|d|$ so far, faded by every $m$ since: that is, $d$
growing beyond what it has been, in the leaf in which it does so most. (What falls and
rises again, as in an oscillator, does not count, and neither does growth from less than
a twentieth, which is a new defect rather than an old one amplified.) When it would
exceed a budget of 10 nats (4 in single precision) the solver asks for a checkpoint at
the start of the step. So the error of what is rebuilt is at most about $e^{10} \epsilon
= 5 \cdot 10^{-12}$ ($7 \cdot 10^{-6}$) where the account is right; and that of the
gradient, which close encounters and the like amplify by up to some thousand, still
small. It is an estimate: a component of $d$ that grows quickly may hide below a larger
one. For such cases there is the drift check of
[`diffrax_reversible.ReversibleAdjoint`][].

**A bound.** Two states that a contraction brings together by $e^{-A}$ are told apart by
$A / \ln 2$ bits fewer. Numbers of $b$ bits next to a component that does not contract
can lose no more than $b$. So *any* way of undoing such a solution needs about $A / (b
\ln 2)$ stored states, one for 36 nats in double precision; here it is one for 10.
Memory that does not grow at all cannot be had on strongly dissipative problems. And on
a parabolic equation at its limit of stability, where $A$ grows like the number of
steps, ordinary checkpointing is the better method.

**References.** [1] McCallum, Foster: Efficient, Accurate and Stable Gradients for
Neural ODEs. arXiv 2410.11648, 2024. The order and the determinant are as for the
published method in there; the control is ours. That reversing a contraction needs
memory in proportion to it is the argument of [2] Maclaurin, Duvenaud, Adams:
Gradient-based Hyperparameter Optimization through Reversible Learning. ICML 2015.
"""

import functools as ft
import math
import operator
from typing import Any, NamedTuple, TypeAlias

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, PyTree, UInt8

from .._compat import Y


Tableau: TypeAlias = diffrax.ButcherTableau | diffrax.StochasticButcherTableau


class Account(NamedTuple):
    """What decides on the coming steps. All scalars."""

    # The largest `|y - z|` of each leaf, faded by the couplings since.
    peak: tuple[Float[Array, ""], ...]
    # Since the last checkpoint, in nats.
    spent: Float[Array, ""]
    # Whether the last step was over the budget.
    wants_checkpoint: Bool[Array, ""]
    # For an SDE: the largest error estimate of each leaf, faded. (Otherwise not an
    # empty tuple: there is but one of those, and `equinox.tree_at` is confused.)
    errors: tuple[Float[Array, ""], ...] | None


# `m = 2**(-code / 8)`, but for `_SYNC`, which is `m = 0`. One byte a step is recorded.
_SYNC = 255
_STEPS_PER_OCTAVE = 8
_LEAST_COUPLING = 1e-3
# The level of `|y - z|` that is put down to rounding, in units of it.
_FLOOR = 4
# Growth by more than this is a new defect.
_MOST_GROWTH = 20
# By which an error estimate of an SDE fades in each step.
_FADE = 0.9


def coupling(code: UInt8[Array, ""]) -> Float[Array, ""]:
    """The coupling `m` that a byte stands for."""
    # In single precision whatever the solution is in, and so the same number for all.
    exponent = code.astype(jnp.float32) / _STEPS_PER_OCTAVE
    return jnp.where(code == _SYNC, jnp.float32(0), jnp.exp2(-exponent))


def _encode(m: Float[Array, ""]) -> UInt8[Array, ""]:
    # Rounded towards stronger damping.
    safe = jnp.maximum(m, m.dtype.type(_LEAST_COUPLING))
    code = jnp.ceil(-_STEPS_PER_OCTAVE * jnp.log2(safe)).astype(jnp.uint8)
    return jnp.where(m < _LEAST_COUPLING, jnp.uint8(_SYNC), code)


def _leaves(tree: PyTree) -> list[Inexact[Array, "..."]]:
    return [
        x for x in map(jnp.asarray, jtu.tree_leaves(tree)) if eqx.is_inexact_array(x)
    ]


def precision(y: Y) -> Any:  # `jnp.finfo`, for which there are two types
    """That of the least precise part of `y`."""
    kinds = [jnp.finfo(x.dtype) for x in _leaves(y)]
    if len(kinds) == 0:
        return jnp.finfo(jnp.result_type(float))
    return max(kinds, key=lambda kind: float(kind.eps))


def rms(tree: PyTree) -> Float[Array, ""]:
    """Root mean square over all elements. Its squares neither overflow nor underflow:
    a solution that has decayed to 1e-30 still counts in single precision."""
    leaves = [jnp.abs(x) for x in _leaves(tree) if x.size > 0]
    dtype = precision(tree).dtype
    if len(leaves) == 0:
        return jnp.zeros((), dtype)
    leaves = [x.astype(dtype) for x in leaves]
    largest = ft.reduce(jnp.maximum, [jnp.max(x) for x in leaves])
    scale = jnp.where(largest > 0, largest, 1)
    total = ft.reduce(operator.add, [jnp.sum((x / scale) ** 2) for x in leaves])
    return largest * jnp.sqrt(total / sum(x.size for x in leaves))


def norms(tree: PyTree) -> tuple[Float[Array, ""], ...]:
    """That of each leaf; of nothing at all, a zero."""
    dtype = precision(tree).dtype
    out = tuple(rms(x).astype(dtype) for x in _leaves(tree) if x.size > 0)
    return (jnp.zeros((), dtype),) if len(out) == 0 else out


def budget(y: Y) -> float:
    """In nats."""
    return 10.0 if float(precision(y).eps) < 1e-12 else 4.0


@ft.cache
def _ratio_of_errors(coefficients: tuple) -> float | None:
    a, b_sol, b_error = (np.array(x) for x in coefficients)

    def leading(weights, subtract):
        # Of a power series: the coefficient of x^(k + 1) is `weights @ a^k @ 1`.
        powers = np.ones(len(weights))
        for k in range(len(weights)):
            coefficient = weights @ powers - subtract / math.factorial(k + 1)
            # Those that vanish do so to rounding.
            if abs(coefficient) > 1e-11:
                return float(abs(coefficient))
            powers = a @ powers
        return None

    local_error, estimate = leading(b_sol, 1), leading(b_error, 0)
    if estimate is None:
        return None
    if local_error is None:
        # All stages are used up by the order, as in the classical method of order 4.
        local_error = 1 / math.factorial(len(b_sol) + 1)
    return local_error / estimate


def has_error_estimate(tableau: Tableau) -> bool:
    return tableau.b_error is not None and bool(np.any(tableau.b_error != 0))


def reference_factor(tableau: Tableau) -> float:
    r"""The factor $\kappa$ between the error estimate and the level of `|y - z|`. (Of a
    stochastic method, that of its drift.)"""
    is_ode = isinstance(tableau, diffrax.ButcherTableau)
    n = len(tableau.b_sol)
    a = np.zeros((n, n))
    for i, row in enumerate(tableau.a_lower if is_ode else tableau.a):
        a[i + 1, : i + 1] = row
    to_tuple = lambda x: tuple(map(tuple, x)) if x.ndim == 2 else tuple(x)
    b_error = np.zeros(n) if tableau.b_error is None else tableau.b_error
    ratio = _ratio_of_errors((to_tuple(a), to_tuple(tableau.b_sol), to_tuple(b_error)))
    # Without an estimate, `error_from_slopes` is on the scale of the local error.
    return 1.0 if ratio is None else min(1.0, math.sqrt(ratio) / 2)


def error_from_slopes(k0: Y, k1: Y, order: int | None) -> tuple[Array, ...]:
    r"""In place of the norms of an embedded error estimate: what they would be for a
    linear problem,
    `h |f| (h L)**(order - 1) / (order + 1)!`, with the Lipschitz constant `L` as seen
    along the step. Times `h L` it is the local error, up to a constant.

    **Arguments:**

    - `k0`, `k1`: `h f` at both ends of the step.
    - `order`: That of the method.
    """
    mean = (rms(k0) + rms(k1)) / 2
    change = rms(jtu.tree_map(lambda a, b: a - b, k1, k0))
    ratio = jnp.where(mean > 0, change / jnp.where(mean > 0, mean, 1), 0)
    order = 1 if order is None else order
    factor = jnp.minimum(ratio, 1) ** (order - 1) / (2 * math.factorial(order + 1))
    return tuple(factor * (a + b) for a, b in zip(norms(k0), norms(k1), strict=True))


def init(y0: Y, noisy: bool) -> tuple[UInt8[Array, ""], Account]:
    zero = jnp.zeros((), precision(y0).dtype)
    peak = tuple(zero for _ in norms(y0))
    account = Account(peak, zero, jnp.array(False), peak if noisy else None)
    return jnp.array(0, jnp.uint8), account


def _levels(
    factor: float, errors: tuple[Float[Array, ""], ...], y1: Y
) -> list[Float[Array, ""]]:
    """What `|y - z|` may be, for each leaf."""
    all_eps = [float(jnp.finfo(x.dtype).eps) for x in _leaves(y1) if x.size > 0]
    sizes = norms(y1)
    if len(sizes) > 1:
        # That of a leaf may vanish as it changes its sign.
        total = rms(y1)
        error = ft.reduce(jnp.maximum, errors)
        relative = error / jnp.where(total > 0, total, 1)
        errors = tuple(
            jnp.maximum(e, relative * size)
            for e, size in zip(errors, sizes, strict=True)
        )
    return [
        factor * e + _FLOOR * eps * size
        for e, eps, size in zip(errors, all_eps or [0.0], sizes, strict=True)
    ]


def update(
    factor: float,
    code: UInt8[Array, ""],
    account: Account,
    difference1: Y,
    errors: tuple[Float[Array, ""], ...],
    y1: Y,
) -> tuple[UInt8[Array, ""], Account]:
    """The coupling of the next step, and the account after this one.

    **Arguments:**

    - `factor`: As returned by `reference_factor`.
    - `code`: The coupling of this step.
    - `account`: At the start of the step.
    - `difference1`: `y - z` at its end.
    - `errors`: The norms of its error estimate, of each leaf.
    - `y1`: `y` at its end.
    """
    dtype = precision(y1).dtype
    tiny = jnp.finfo(dtype).tiny
    m = coupling(code).astype(dtype)

    errors = tuple(e.astype(dtype) for e in errors)
    if account.errors is not None:
        faded = [_FADE * e for e in account.errors]
        errors = tuple(map(jnp.maximum, errors, faded))

    # Of the leaves, that with which it is worst.
    least = jnp.ones((), dtype)
    growth = jnp.zeros((), dtype)
    peaks = []
    sizes = norms(difference1)
    levels = _levels(factor, errors, y1)
    for size, level, peak in zip(sizes, levels, account.peak, strict=True):
        m1 = jnp.where(size > level, level / jnp.maximum(size, tiny), 1)
        # A difference that is not a number is as bad as one can be.
        least = jnp.minimum(least, jnp.where(jnp.isfinite(size), m1, 0))

        peak = m * peak
        known = peak * _MOST_GROWTH > size
        ratio = jnp.maximum(size, tiny) / jnp.maximum(peak, tiny)
        growth = jnp.maximum(growth, jnp.where(known, jnp.log(ratio), 0))
        peaks.append(jnp.maximum(peak, size))

    spent = account.spent + jnp.maximum(-jnp.log(jnp.maximum(m, tiny)), growth)
    over = spent > budget(y1)
    account1 = Account(
        peak=tuple(peaks),
        spent=jnp.where(over, jnp.zeros((), dtype), spent),
        wants_checkpoint=over,
        errors=None if account.errors is None else errors,
    )
    return _encode(least.astype(dtype)), account1
