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
inherent to undoing a contraction. The second is the price of damping: $-\log_2 m$ is
the information (in bits) that a step forgets.

**Rounding.** What is kept is $(y, d)$ rather than $(y, z)$. With $\psi = \Psi_h(y - m
d)$ a step is $d \leftarrow m d$, then $(y, d) \leftarrow (y + \psi, d + \psi)$, and at
last $d \leftarrow d + \Psi_{-h}(y_1)$; and the second of these is undone as $y - d$,
and so $\psi$, is the same before and after it. (The two increments all but cancel, and
by Sterbenz's lemma without an error.) So $d$ is known to about $\epsilon |\psi|$, and
not just to $\epsilon |y|$ as the difference of two numbers would be: then a correction
of less than $\epsilon |y|$ would be rounded away, $d$ could not shrink below that, and
damping by $m$ would multiply $\epsilon |y|$ by $1 / m$ on the way back.

**The choice of $m$.** Whatever is forgotten must be paid for, so $m = 1$ unless $d$ has
outgrown its level, which each element $i$ of $y$ has for itself:

$D_i = \kappa \max(|e_i|, \rho s_i) + 4 \epsilon s_i$

with the embedded error estimate $e$ of the step before, the size $s_i = \max(|y_{0,
i}|, |y_{1, i}|)$ of the element in it, and the spacing $\epsilon$ of floating-point
numbers. As the error estimate of an element may vanish when it changes its sign, it
counts as no less than $\rho s_i$, where $\rho = \max_i |e_i| / \max_i s_i$. Then

$m = 1 / \max(1, \| d_i / D_i \|)$

in the mean of eighth powers, which on few elements is nearly the largest of them, and
on the many of a field not that of a single point. Where this is less than 1/64 it is 0:
there the step is at the limit of stability, as below, and half a damping would be
worse than none or all. So $z := y$, whatever $d$ was; it cannot be undone, and wants a
checkpoint.

**Where $m$ is 0 step after step** the second increment of a step is dropped at once by
the next, and serves to find the next $m$ alone. After 16 such steps in a row it is left
out, so that $z_1 = z'$, and $m$ is 0 in the next step too, whatever it would have been:
in all but every 16th step, which makes it. These steps are those of the wrapped method,
and cost as much; but for one evaluation at $y_1$, for the error estimate (where the
wrapped method has its last stage from the step after). The price is that a row of them
ends up to 15 steps late. That is less than it is long, and so it is paid for: a step
that cannot be undone is made again once or twice, and each time without the second
increment. Shorter rows are as they would be otherwise, as in a predator-prey cycle.
(Measured: rows are of hundreds of steps where a problem is stiff, and so there are 1%
more such steps.) Of a batch it is left out where all elements do so.

The perturbation of $y$ in a step is about $h L D$. For a linear problem the local error
is $\chi h L |e|$, where $\chi$ is the ratio of the leading coefficients of $R(x) - e^x$
and of the embedded error (both in the tableau). So $\kappa = \chi$ would perturb the
solution by its own local error, and a constant $\kappa$ would forget the same for all
methods; we take the geometric mean of $\chi$ and a constant, $\kappa = \min(0.1,
\sqrt\chi / 60)$: 0.005 for Tsit5, 0.012 for Dopri5, 0.010 for Heun, 0.023 for Bosh3,
0.002 for Dopri8. (Measured. Thirty times as much leaves the order as it is, but makes
errors that are several times those of the wrapped method; three times as much does so
for the gradient of a few problems, of Van der Pol's with $\mu = 20$ for one; three
times less forgets much more on conservative problems.) The second term is there for
rounding alone: without it
noise would be damped at great cost, and with a larger one the solution in single
precision would be worse than rounding makes it.

If there is no embedded estimate then $|e|$ is what it would be for a linear problem,
from the slopes at both ends of the step.

**Not finite.** The second increment starts from $y_1$ and goes where the solution has
not been: it may overflow, or leave the domain of the vector field. Where it is not
finite it is zero instead. That too is a function of $y_1$, and so undone like any
other; the $d$ that it leaves is far above its level, and dropped in the next step.

**Noise.** For an SDE the same holds with $W$ next to $h$: a perturbation of $D$ is
multiplied by $h L$ and by $|W| L$, in the latter case of mean zero; and the $m$s are
known before the noise of their step is. But a step with little noise has a small error
estimate, and $d$ is the sum of those before it. With $D$ from that step alone one
driven by a single noise would forget in most of its steps: so $\rho$ is the largest so
far, faded by 0.9 a step.

**The derivative** of a step is taken with $d$ as a constant throughout, so that it is
that of the wrapped method, from $z'$: $1 + \Psi_h'(y - m d)$ in place of $1 +
\Psi_h'(y)$. The difference is $O(h L' m |d|)$, where $L'$ bounds the second derivative
of the vector field, and $|d| = O(h^p)$: **so the gradient has the order $p$ too.** What
makes $d$ is not differentiated, and the second increment costs no pullback. (An exact
derivative would have a parasitic part, that of $d$, which the control does not see: a
sensitive solution multiplies it as the eigenvalue $m / \mu$ says, with $m$ a constant
that was chosen for $d$ and not for its tangent. On Van der Pol's equation with $\mu =
20$ it has been seen to grow by a factor of 1e115.) It belongs to the definition of the
step: all adjoints compute the same gradient.

That is why the control is strict. On a linear problem this derivative is a product of
$R$s, and the solution one of eigenvalues that are about $R + m (1 - (R - 1) \bar R)$.
At the limit of stability $\bar R$ is large, and a step size controller keeps the
*solution* in check: if its eigenvalue were not $R$, the product of $R$s would explode.

**The account.** `spent` estimates how many bits the way back loses to amplified
rounding errors since the last checkpoint. With $N = \| d_i / D_i \|$ a step adds

$\max(2 \log_2 G - \log_2 m, \log_2(N_1 / (m P)))$

where $P$ is the largest $N$ so far, faded by every $m$ since: so the second is $d$
growing beyond what it has been, as the solution contracts. (What falls and rises again,
as in an oscillator, does not count, and neither does growth from less than a twentieth,
which is a new defect rather than an old one amplified.) And where the solution expands,
$\mu > 1$, the way back multiplies errors of $d$ by $\mu / m$, and relative to a
solution that shrinks by as much on the way back by $\mu^2 / m$. Such a $\mu$ is $G$, by
which the elements of $y$ and their slopes have both grown in the step, in the same mean
as above. (Not of $y$ alone: an element that has crossed zero grows, but not its slope.)

When it would exceed a budget of 22 bits (8 in single precision) the solver asks for a
checkpoint at the start of the step. So the error of what is rebuilt is at most about
$2^{22} \epsilon = 10^{-9}$ ($3 \cdot 10^{-5}$) where the account is right. It is an
estimate: a component of $d$ that grows quickly may hide below a larger one, and an
operator of large norm multiplies errors by more than the solution shows.

**A bound.** Two states that a contraction brings together by $e^{-A}$ are told apart by
$A / \ln 2$ bits fewer. Numbers of $b$ bits next to a component that does not contract
can lose no more than $b$. So *any* way of undoing such a solution needs about $A / (b
\ln 2)$ stored states, one for 53 bits in double precision; here it is one for 22.
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
from collections.abc import Callable
from typing import Any, TypeAlias

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Inexact, PyTree, UInt8

from .._compat import Y
from .._jax_compat import eqxi


Tableau: TypeAlias = diffrax.ButcherTableau | diffrax.StochasticButcherTableau


# What decides on the coming steps, all in one array, as each that a loop carries costs
# time; in single precision, whatever the solution is in:
# - the binary logarithm of the largest norm of `y - z` in units of its level, faded by
#   the couplings since;
# - `spent`, in bits, since the last checkpoint: if this is over the budget then the
#   last step wants one;
# - for an SDE: the largest relative error, faded.
Account: TypeAlias = Float32[Array, "2"] | Float32[Array, "3"]


# `m = 2**(-code / 8)`; but the last codes are all `m = 0`. Of such steps in a row the
# first is `_SYNC`, and the code falls by one from each to the next. After `_LAST_SYNC`
# come those of its period again, in all of which but itself the second increment is
# left out. One byte a step is recorded.
_SYNC = 255
_PERIOD = 16
_LAST_SYNC = _SYNC + 1 - 2 * _PERIOD
_STEPS_PER_OCTAVE = 8
# With more bits than this it is put to zero.
_MOST_BITS = 6
# The part of the level of `|y - z|` that is put down to rounding, in units of it.
_FLOOR = 4
# The power in the norm of `|y - z|`.
_POWER = 8
# Growth by more than this is a new defect.
_MOST_GROWTH = 20
# And no more than this of the growth of an element.
_MOST_EXPANSION = 4
# By which an error estimate of an SDE fades in each step.
_FADE = 0.9


def coupling(code: UInt8[Array, ""]) -> Float32[Array, ""]:
    """The coupling `m` that a byte stands for."""
    return jnp.where(code >= _LAST_SYNC, jnp.float32(0), jnp.exp2(-_bits(code)))


def leaves_out(code: UInt8[Array, ""]) -> Bool[Array, ""]:
    """Whether a step leaves the second increment out. (Then `m` is 0 in the next.)"""
    return (code > _LAST_SYNC) & (code <= _SYNC - _PERIOD)


def unless_left_out(
    code: UInt8[Array, ""], make: Callable[[], PyTree], otherwise: Callable[[], PyTree]
) -> PyTree:
    """What `make` returns; or where the second increment is left out, `otherwise`. Then
    `make` is not called, unless it is for others of a batch."""
    is_left_out = leaves_out(code)

    def made():
        select = lambda a, b: jnp.where(is_left_out, a, b)
        return jtu.tree_map(select, otherwise(), make())

    return lax.cond(eqxi.unvmap_any(~is_left_out), made, otherwise)


def _next_sync(code: UInt8[Array, ""]) -> UInt8[Array, ""]:
    """The code of a step with `m = 0`, from that of the step before."""
    in_a_row = jnp.where(code > _LAST_SYNC, code - 1, _SYNC - _PERIOD)
    return jnp.where(code >= _LAST_SYNC, in_a_row, _SYNC).astype(jnp.uint8)


def _bits(code: UInt8[Array, ""]) -> Float32[Array, ""]:
    """The information that a coupling forgets."""
    return code.astype(jnp.float32) / _STEPS_PER_OCTAVE


def _encode(bits: Float32[Array, ""]) -> UInt8[Array, ""]:
    # Rounded towards stronger damping. (What is not a number is no less than this.)
    is_mild = bits < _MOST_BITS
    code = jnp.ceil(_STEPS_PER_OCTAVE * jnp.where(is_mild, bits, 0))
    return jnp.where(is_mild, jnp.maximum(code, 0), _SYNC).astype(jnp.uint8)


def _leaves(tree: PyTree) -> list[Inexact[Array, "..."]]:
    leaves = map(jnp.asarray, jtu.tree_leaves(tree))
    return [x for x in leaves if eqx.is_inexact_array(x) and x.size > 0]


def precision(y: Y) -> Any:  # `jnp.finfo`, for which there are two types
    """That of the least precise part of `y`."""
    kinds = [jnp.finfo(x.dtype) for x in _leaves(y)]
    if len(kinds) == 0:
        return jnp.finfo(jnp.result_type(float))
    return max(kinds, key=lambda kind: float(kind.eps))


def rms(tree: PyTree) -> Float[Array, ""]:
    """Root mean square over all elements. Its squares neither overflow nor underflow:
    a solution that has decayed to 1e-30 still counts in single precision."""
    leaves = [jnp.abs(x) for x in _leaves(tree)]
    dtype = precision(tree).dtype
    if len(leaves) == 0:
        return jnp.zeros((), dtype)
    leaves = [x.astype(dtype) for x in leaves]
    largest = ft.reduce(jnp.maximum, [jnp.max(x) for x in leaves])
    scale = jnp.where(largest > 0, largest, 1)
    total = ft.reduce(operator.add, [jnp.sum((x / scale) ** 2) for x in leaves])
    return largest * jnp.sqrt(total / sum(x.size for x in leaves))


def largest(tree: PyTree) -> Float[Array, ""]:
    """The largest absolute value of all elements."""
    dtype = precision(tree).dtype
    each = [jnp.max(jnp.abs(x)).astype(dtype) for x in _leaves(tree)]
    return ft.reduce(jnp.maximum, each, jnp.zeros((), dtype))


def zero_unless_finite(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """Zero where `x` is not finite, or is so large that a sum might not be."""
    return jnp.where(jnp.abs(x) < float(jnp.finfo(x.dtype).max) / 8, x, 0)


def budget(y: Y) -> float:
    """In bits."""
    eps = float(precision(y).eps)
    return 22.0 if eps < 1e-12 else 8.0 if eps < 1e-6 else 2.0


def wants_checkpoint(account: Account, y: Y) -> Bool[Array, ""]:
    """Whether the step that the account is after was over the budget."""
    return ~(account[1] <= budget(y))


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
    return 0.1 if ratio is None else min(0.1, math.sqrt(ratio) / 60)


def error_from_slopes(k0: Y, k1: Y, order: int | None) -> Y:
    r"""In place of an embedded error estimate: what it would be for a linear problem,
    `h |f| (h L)**(order - 1) / (order + 1)!`, with the Lipschitz constant `L` as seen
    along the step. Times `h L` it is the local error, up to a constant.

    **Arguments:**

    - `k0`, `k1`: `h f` at both ends of the step.
    - `order`: That of the method.
    """
    total = largest(jtu.tree_map(lambda a, b: jnp.abs(a) + jnp.abs(b), k0, k1))
    change = largest(jtu.tree_map(lambda a, b: a - b, k1, k0))
    ratio = jnp.where(total > 0, 2 * change / jnp.where(total > 0, total, 1), 0)
    order = 1 if order is None else order
    factor = jnp.minimum(ratio, 1) ** (order - 1) / (2 * math.factorial(order + 1))
    return jtu.tree_map(
        lambda a, b: factor.astype(jnp.finfo(a.dtype).dtype) * (abs(a) + abs(b)), k0, k1
    )


def init(noisy: bool) -> tuple[UInt8[Array, ""], Account]:
    zero = jnp.zeros((), jnp.float32)
    account = [_log_of_mean(zero, 1), zero, *([zero] if noisy else [])]
    return jnp.array(0, jnp.uint8), jnp.stack(account)


def is_noisy(account: Account) -> bool:
    return len(account) == 3


def _log_of_mean(total: Float32[Array, ""], num: int) -> Float32[Array, ""]:
    """The binary logarithm of the mean of powers, of which this is the sum."""
    tiny = float(jnp.finfo(jnp.float32).tiny)
    return jnp.log2(jnp.maximum(total, tiny) / max(num, 1)) / _POWER


def _over_level(
    factor: float,
    relative: Float32[Array, ""],
    difference1: Y,
    errors: list[Array],
    sizes: list[Array],
) -> Float32[Array, ""]:
    """The binary logarithm of the norm of `y - z`, each element in units of its
    level."""
    total, num = jnp.float32(0), 0
    for d, e, s in zip(_leaves(difference1), errors, sizes, strict=True):
        kind = jnp.finfo(d.dtype)
        e = jnp.maximum(e, relative.astype(s.dtype) * s)
        level = factor * e + _FLOOR * float(kind.eps) * s
        # What is about to underflow is left alone.
        ratio = jnp.abs(d) / (level + _FLOOR * float(kind.tiny))
        total = total + jnp.sum(ratio.astype(jnp.float32) ** _POWER)
        num = num + d.size
    return _log_of_mean(total, num)


def _expansion(k0: Y, k1: Y, y0: Y, y1: Y) -> Float32[Array, ""]:
    """By how many bits the elements have grown in a step. (Only what grows together
    with its slope: an element that has crossed zero does not count.)"""
    total, num = jnp.float32(0), 0
    for a, b, p, q in zip(*map(_leaves, (k0, k1, y0, y1)), strict=True):
        tiny = float(jnp.finfo(a.dtype).tiny)
        over = lambda x, y, tiny=tiny: jnp.abs(x) / jnp.maximum(jnp.abs(y), tiny)
        ratio = jnp.clip(jnp.minimum(over(b, a), over(q, p)), 1, _MOST_EXPANSION)
        total = total + jnp.sum(ratio.astype(jnp.float32) ** _POWER)
        num = num + a.size
    return jnp.float32(0) if num == 0 else _log_of_mean(total, num)


def update(
    factor: float,
    code: UInt8[Array, ""],
    account: Account,
    difference1: Y,
    error: Y,
    y0: Y,
    y1: Y,
    slopes: tuple[Y, Y] | None = None,
) -> tuple[UInt8[Array, ""], Account]:
    """The coupling of the next step, and the account after this one.

    **Arguments:**

    - `factor`: As returned by `reference_factor`.
    - `code`: The coupling of this step.
    - `account`: At the start of the step.
    - `difference1`: `y - z` at its end.
    - `error`: Its error estimate.
    - `y0`, `y1`: `y` at its start and end.
    - `slopes`: Times the step size, there. `None` for an SDE.
    """

    def find():
        errors = [jnp.abs(x) for x in _leaves(error)]
        pairs = zip(_leaves(y0), _leaves(y1), strict=True)
        sizes = [jnp.maximum(jnp.abs(a), jnp.abs(b)) for a, b in pairs]
        size = largest(sizes)
        relative = largest(errors) / jnp.where(size > 0, size, 1)
        relative = jnp.where(size > 0, relative, 0).astype(jnp.float32)
        if is_noisy(account):
            relative = jnp.maximum(relative, jnp.float32(_FADE) * account[2])

        excess = _over_level(factor, relative, difference1, errors, sizes)
        forgotten = _bits(code)
        peak = account[0] - forgotten
        growth = excess - peak
        growth = jnp.where(growth < math.log2(_MOST_GROWTH), growth, 0)
        if slopes is not None:
            forgotten = forgotten + 2 * _expansion(*slopes, y0, y1)
        spent = jnp.where(wants_checkpoint(account, y1), 0, account[1])
        # Of what is about to be dropped, and may be no number, nothing is left.
        peak1 = jnp.where(excess < _MOST_BITS, jnp.maximum(peak, excess), 0)
        account1 = [peak1, spent + jnp.maximum(forgotten, growth)]
        if is_noisy(account):
            account1.append(relative)
        code1 = _encode(excess)
        code1 = jnp.where(code1 == _SYNC, _next_sync(code), code1)
        return code1, jnp.stack(account1)

    # (The step before wanted a checkpoint: with the same account this one does too.)
    return unless_left_out(code, find, lambda: (_next_sync(code), account))
