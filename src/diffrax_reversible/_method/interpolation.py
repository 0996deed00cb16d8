"""The solution in between the steps."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp


def hermite_or_linear(
    name: str, interpolation: Any
) -> Callable[..., diffrax.AbstractLocalInterpolation]:
    """The interpolation of the solver called `name`, which leaves the choice."""
    if interpolation == "hermite":
        return diffrax.ThirdOrderHermitePolynomialInterpolation
    if interpolation == "linear":
        return diffrax.LocalLinearInterpolation
    raise ValueError(
        f'`{name}(interpolation=...)` must be "hermite" or "linear"; got '
        f"{interpolation!r}."
    )


def has_own_interpolation(solver: Any) -> bool:
    """Whether a [`diffrax.AbstractERK`][] has an interpolation of its own, rather than
    a line or diffrax's cubic. (Which takes the last stage for the slope at the end: in
    `Midpoint`, `Ralston` and `Heun` it is not, or not to the order of a cubic.)

    The interpolation is traced, as diffrax would call it.
    """
    if solver.interpolation_cls is diffrax.LocalLinearInterpolation:
        return False
    name = type(solver).__name__
    num_stages = solver.tableau.num_stages
    t = jax.ShapeDtypeStruct((), jnp.float32)
    y = jax.ShapeDtypeStruct((2,), jnp.float32)
    k = jax.ShapeDtypeStruct((num_stages, 2), jnp.float32)

    def evaluate(t, y, k):
        out = solver.interpolation_cls(t0=t, t1=t, y0=y, y1=y, k=k)
        return out, out.evaluate(t)

    message = (
        f"`UReversible({name}())` needs `{name}.interpolation_cls` to be like those of "
        "diffrax's Runge--Kutta solvers: called as `interpolation_cls(t0=t0, t1=t1, "
        f"y0=y0, y1=y1, k=k)`, with all stages stacked in `k`, here {num_stages}, it "
        "must return an interpolation from `y0` to `y1`. "
        "Use for example `diffrax.ThirdOrderHermitePolynomialInterpolation.from_k`. "
    )
    try:
        interpolation, out = eqx.filter_eval_shape(evaluate, t, y, k)
    except Exception as e:
        raise ValueError(message + f"`{name}.interpolation_cls` fails: {e}") from e
    if getattr(out, "shape", None) != y.shape:
        raise ValueError(
            message + f"`{name}.interpolation_cls` gives {out} where `y` is {y}."
        )
    # Not `isinstance`: a subclass may be anything.
    return type(interpolation) not in (
        diffrax.LocalLinearInterpolation,
        diffrax.ThirdOrderHermitePolynomialInterpolation,
    )
