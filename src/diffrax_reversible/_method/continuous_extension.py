r"""Dense output of a splitting, from the increments of its sub-steps alone.

Let $h l_j$ be the slopes of the sub-steps that update one of the two variables, and
$b_j$ the fractions of the step by which they do so. Between the ends of a step that
variable is taken to be

$p(t_0 + \theta h) = p_0 + \sum_j \beta_j(\theta) h l_j.$

A splitting is a partitioned Runge--Kutta method, whose slopes of one variable depend
on the other variable only. So this is of order $o$ if $M \beta(\theta) = r(\theta)$,
where the rows of $M$ are the elementary weights of the rooted trees with at most $o$
vertices, in which the two variables alternate from level to level; and the elements of
$r$ are $\theta^k / \gamma$ for a tree with $k$ vertices and density $\gamma$ [1,
III.2]. The weights $b$ of the method solve this at $\theta = 1$. With the
pseudoinverse of $M$,

$\beta(\theta) = \theta b + M^+ (r(\theta) - \theta r(1))$

solves it for all $\theta$, if it can be solved: a straight line, and a correction that
vanishes at both ends. It is as symmetric in time as the method.

**References.** [1] Hairer, Lubich, Wanner: Geometric Numerical Integration. Springer,
2nd edition, 2006.
"""

import functools as ft

import numpy as np


# Of trees. The next order would have 17 conditions, more than most methods have slopes.
_MOST_ORDER = 4


def _conditions(own, other, own_begins):
    """Pairs of number of vertices, elementary weights, and density."""
    j, i = np.arange(len(own))[:, None], np.arange(len(other))[None, :]
    # Which sub-steps of the other variable come before each of this one.
    before = i < j if own_begins else i <= j
    to_other = before * np.array(other)
    to_own = ~before.T * np.array(own)
    one = np.ones(len(own))
    time = to_other.sum(axis=1)
    second = to_other @ to_own.sum(axis=1)
    return [
        (1, one, 1),
        (2, time, 2),
        (3, time**2, 3),
        (3, second, 6),
        (4, time**3, 4),
        (4, time * second, 8),
        (4, to_other @ to_own.sum(axis=1) ** 2, 12),
        (4, to_other @ (to_own @ time), 24),
    ]


@ft.cache
def corrections(
    own: tuple[float, ...], other: tuple[float, ...], own_begins: bool
) -> tuple[tuple[float, ...], ...]:
    r"""Weights $w_k$ such that

    $\beta(\theta) = \theta b + \sum_{k = 2}^o (\theta^k - \theta) w_k$

    is of the largest order $o$ that can be had, up to 4.

    **Arguments:**

    - `own`: The fractions of the step of the sub-steps that update this variable.
    - `other`: Those of the other variable.
    - `own_begins`: Whether the former begin and end the step.
    """
    conditions = _conditions(own, other, own_begins)
    out: tuple[tuple[float, ...], ...] = ()
    for order in range(2, _MOST_ORDER + 1):
        some = [c for c in conditions if c[0] <= order]
        matrix = np.stack([weights for _, weights, _ in some])
        # The right-hand sides, one column for each power of `theta`.
        powers = np.array(
            [[float(n == k) / density for k in range(1, order + 1)]
             for n, _, density in some]
        )  # fmt: skip
        inverse = np.linalg.pinv(matrix, rcond=1e-10)
        weights = inverse @ powers
        solved = np.allclose(matrix @ weights, powers, rtol=0, atol=1e-9)
        consistent = np.allclose(matrix @ own, powers.sum(axis=1), rtol=0, atol=1e-9)
        if not (solved and consistent):
            break
        out = tuple(tuple(column.tolist()) for column in weights.T[1:])
    return out
