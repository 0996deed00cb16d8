"""The increment of an explicit Runge--Kutta method."""

from collections.abc import Sequence
from typing import NamedTuple

import diffrax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._compat import Args, RealScalarLike, Y


class Increment(NamedTuple):
    increment: Y
    # The part of the embedded error that comes from the stages that were evaluated.
    error: Y | None
    # The stages that were evaluated, each times the control over the interval. The
    # first of them is at the point from which the increment is made.
    k: tuple[Y, ...]


def uses_last_stage(tableau: diffrax.ButcherTableau) -> bool:
    """`False` if the last stage is evaluated for the embedded error alone. Then the
    method is first-same-as-last, and that stage is the first of the next step."""
    return not tableau.fsal


def num_evaluations(tableau: diffrax.ButcherTableau) -> int:
    """Evaluations of the vector field for one increment."""
    return tableau.num_stages - (0 if uses_last_stage(tableau) else 1)


def explicit_rk_increment(
    tableau: diffrax.ButcherTableau,
    term: diffrax.AbstractTerm,
    t_from: RealScalarLike,
    t_to: RealScalarLike,
    y: Y,
    args: Args,
    control: PyTree,
    sign: int,
) -> Increment:
    r"""The increment $\Psi$ of one step of an explicit Runge--Kutta method that starts
    from `y` at `t_from` and goes to `t_to`.

    `control` is that over the interval between the two times; `sign` is `1` if it was
    taken from `t_from` to `t_to`, and `-1` if the other way round. (The interaction
    between vector field and control is linear, so the sign is applied to its result.
    In this way the control, which may be costly, is the same for a step and for its
    reverse.)

    The stages are unrolled: only nonzero coefficients are multiplied, and no stage is
    evaluated that does not contribute.
    """
    stages = num_evaluations(tableau)
    k: list[PyTree] = []
    for i in range(stages):
        if i == 0:
            c, y_i = 0.0, y
        else:
            c = tableau.c[i - 1].item()
            y_i = combine(tableau.a_lower[i - 1], k, sign, y)
        # Exact at both ends, where the vector field may have its only finite limit.
        t_i = t_from if c == 0 else t_to if c == 1 else t_from + c * (t_to - t_from)
        k.append(term.vf_prod(t_i, y_i, args, control))
    return Increment(
        increment=combine(tableau.b_sol[:stages], k, sign),
        error=combine(tableau.b_error[:stages], k, sign),
        k=tuple(k),
    )


def combine(
    coefficients: np.ndarray, k: Sequence[PyTree], sign: int, y: PyTree = None
) -> PyTree:
    """`sign` times the weighted sum of the stages `k`, and `y` if it is given. A stage
    that is `None` counts as zero."""
    # Python scalars, so that the dtype of `k` is kept.
    pairs = [
        (sign * c.item(), ki)
        for c, ki in zip(coefficients, k)
        if c != 0 and ki is not None
    ]

    def sum_leaves(*leaves):
        total, *terms = leaves
        for x in terms:
            total = total + x
        return total

    terms = [jtu.tree_map(lambda x, c=c: c * x, ki) for c, ki in pairs]
    if y is not None:
        terms = [y, *terms]
    if len(terms) == 0:
        return jtu.tree_map(lambda x: 0 * x, next(x for x in k if x is not None))
    return jtu.tree_map(sum_leaves, *terms)
