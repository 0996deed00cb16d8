"""The increment of an explicit Runge--Kutta method."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import Args, RealScalarLike, Term, VF, Y


# In place of a stage that is not evaluated. (`None` is a stage, if `y` is `None`.)
NOT_THERE: Any = object()


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
    term: Term,
    t_from: RealScalarLike,
    t_to: RealScalarLike,
    y: Y,
    args: Args,
    control: PyTree,
    sign: int,
    scan: bool | None = None,
    first: Y | None = None,
) -> Increment:
    r"""The increment $\Psi$ of one step of an explicit Runge--Kutta method that starts
    from `y` at `t_from` and goes to `t_to`.

    `control` is that over the interval between the two times; `sign` is `1` if it was
    taken from `t_from` to `t_to`, and `-1` if the other way round. (The interaction
    between vector field and control is linear, so the sign is applied to its result.
    In this way the control, which may be costly, is the same for a step and for its
    reverse.)

    The stages are made by a loop, if `scan`, or unrolled; by default unrolled, unless
    that takes long to compile. In either case no stage is evaluated that does not
    contribute. The first stage may be given as `first`.

    With a `Checkpointed` term it takes little more memory to differentiate than one
    stage does.
    """
    stages = num_evaluations(tableau)
    ts = [t_from]
    for c in tableau.c[: stages - 1].tolist():
        # Exact at both ends, where the vector field may have its only finite limit.
        t_i = t_from if c == 0 else t_to if c == 1 else t_from + c * (t_to - t_from)
        ts.append(t_i)
    if scan is None:
        scan = _is_long(stages, term, t_from, y, args, control)
    if scan and stages > 1:
        k = _scan_stages(tableau, term, ts, y, args, control, sign, first)
    else:
        k = [] if first is None else [first]
        vf_prod = term.vf_prod
        if isinstance(term, Checkpointed):
            vf_prod = _OneByOne(vf_prod)
        for i, t_i in list(enumerate(ts))[len(k) :]:
            y_i = y if i == 0 else combine(tableau.a_lower[i - 1], k, sign, y)
            # XLA would fuse each stage into those that use it, to be computed again in
            # each, and that grows quickly with their number.
            k_i = vf_prod(t_i, lax.optimization_barrier(y_i), args, control)
            k.append(lax.optimization_barrier(k_i))
    return Increment(
        increment=combine(tableau.b_sol[:stages], k, sign),
        error=combine(tableau.b_error[:stages], k, sign),
        k=tuple(k),
    )


class Checkpointed(diffrax.AbstractTerm):
    """A term whose vector field is evaluated once more to be differentiated, so that
    nothing of what is within it has to be kept."""

    term: diffrax.AbstractTerm

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return eqx.filter_checkpoint(self.term.vf)(t, y, args)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> Any:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: Any) -> Y:
        return self.term.prod(vf, control)

    def vf_prod(self, t: RealScalarLike, y: Y, args: Args, control: Any) -> Y:
        return eqx.filter_checkpoint(self.term.vf_prod)(t, y, args, control)


class _OneByOne:
    """A function of which the gradients with respect to what all calls share, such as
    `args` or what it closes over, are added one after the other: XLA would keep those
    of all calls to add them at once."""

    def __init__(self, fn: Callable):
        self._fn = fn
        # By their `id`: what is shared, and what stands for it in the next call.
        self._shared: dict[int, tuple[Array, Array]] = {}

    def __call__(self, *args: Any) -> Any:
        fn = eqx.filter_closure_convert(self._fn, *args)
        fn, args = jtu.tree_map(self._next, (fn, args))
        return fn(*args)

    def _next(self, x: Any) -> Any:
        if not eqx.is_inexact_array(x):
            return x
        _, old = self._shared.get(id(x), (x, x))
        self._shared[id(x)] = (x, lax.optimization_barrier(old))
        return self._shared[id(x)][1]


# Unrolled stages of more operations than this in all take long to compile.
_MANY = 1000


def _is_long(stages: int, term, t, y, args, control) -> bool:
    """Whether stages are better made by a loop. (Its pullback adds to all of them in
    each, so that a gradient takes up to three times as long.)"""
    jaxpr, _, _ = eqx.filter_make_jaxpr(term.vf_prod)(t, y, args, control)
    return stages * len(list(equations(jaxpr.jaxpr))) > _MANY


def equations(jaxpr, repeats: int = 1) -> Iterator[tuple[Any, int]]:
    """Also those of the functions that are called in it; and how often each is run, as
    far as that is known."""
    is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    for eqn in jaxpr.eqns:
        yield eqn, repeats
        of_loop = repeats * eqn.params.get("length", 1)
        for x in jtu.tree_leaves(eqn.params, is_leaf=is_jaxpr):
            if is_jaxpr(x):
                yield from equations(getattr(x, "jaxpr", x), of_loop)


def _scan_stages(
    tableau: diffrax.ButcherTableau,
    term: Term,
    ts: list[RealScalarLike],
    y: Y,
    args: Args,
    control: PyTree,
    sign: int,
    first: Y | None,
) -> list[PyTree]:
    n = len(ts)
    a = np.zeros((n, n))
    for i in range(1, n):
        a[i, :i] = sign * tableau.a_lower[i - 1]
    struct = eqx.filter_eval_shape(term.vf_prod, ts[0], y, args, control)
    rows = jtu.tree_map(lambda x: jnp.asarray(a, x.dtype), struct)

    def stage(k, xs):
        i, t_i, rows_i = xs
        y_i = jtu.tree_map(
            lambda y, row, k: y + jnp.tensordot(row, k, 1, precision="highest"),
            *(y, rows_i, k),
        )
        k_i = term.vf_prod(t_i, y_i, args, control)
        return jtu.tree_map(lambda x, x_i: x.at[i].set(x_i), k, k_i), None

    k = jtu.tree_map(lambda x: jnp.zeros((n, *x.shape), x.dtype), struct)
    num_given = 0
    if first is not None:
        num_given = 1
        k = jtu.tree_map(lambda x, x_0: x.at[0].set(x_0), k, first)
    xs = (np.arange(n), jnp.stack(ts), rows)
    k, _ = lax.scan(stage, k, jtu.tree_map(lambda x: x[num_given:], xs))
    return [jtu.tree_map(lambda x, i=i: x[i], k) for i in range(n)]


def combine(
    coefficients: np.ndarray, k: Sequence[PyTree], sign: int, y: PyTree = NOT_THERE
) -> PyTree:
    """`sign` times the weighted sum of the stages `k`, and `y` if it is given. A stage
    that is `NOT_THERE` counts as zero."""
    # Python scalars, so that the dtype of `k` is kept.
    pairs = [
        (sign * c.item(), ki)
        for c, ki in zip(coefficients, k)
        if c != 0 and ki is not NOT_THERE
    ]

    def sum_leaves(*leaves):
        total, *terms = leaves
        for x in terms:
            total = total + x
        return total

    terms = [jtu.tree_map(lambda x, c=c: c * x, ki) for c, ki in pairs]
    if y is not NOT_THERE:
        terms = [y, *terms]
    if len(terms) == 0:
        return jtu.tree_map(lambda x: 0 * x, next(x for x in k if x is not NOT_THERE))
    return jtu.tree_map(sum_leaves, *terms)
