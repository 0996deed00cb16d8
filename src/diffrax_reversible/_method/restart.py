"""When a leapfrog method starts anew, with `full_sync`.

Such a method has a parasitic solution that changes its sign from step to step, and
grows where the true solution decays. Something of each step that is smooth in the true
solution shows it, in the difference from that of the step before.
"""

from typing import NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .controlled import precision, rms


# How much larger the alternating part may be than the smooth one.
_RATIO = 4
# What of it is put down to rounding, in units of that of `y`.
_FLOOR = 16


class Memo(NamedTuple):
    """What is kept of the step before."""

    smooth: PyTree
    # Steps since the last start.
    age: Array


def init(y0: PyTree) -> Memo:
    return Memo(jtu.tree_map(jnp.zeros_like, y0), jnp.array(0))


def update(
    memo: Memo, smooth: PyTree, y1: PyTree, least_age: int
) -> tuple[Array, Memo]:
    """Whether the next step starts anew, and what it is told. In the first `least_age`
    steps after a start there is nothing to compare with."""
    total = rms(jtu.tree_map(lambda a, b: a + b, smooth, memo.smooth))
    alternating = rms(jtu.tree_map(lambda a, b: a - b, smooth, memo.smooth))
    eps = float(precision(y1).eps)
    is_large = ~(alternating <= _RATIO * total + _FLOOR * eps * rms(y1))
    starts = is_large & (memo.age >= least_age)
    return starts, Memo(smooth, jnp.where(starts, 0, memo.age + 1))
