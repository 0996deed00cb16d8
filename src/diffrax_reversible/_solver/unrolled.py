from typing import Any

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    PyTree,
    RealScalarLike,
    Term,
    VF,
    Y,
)
from .._jax_compat import eqxi
from .._method.explicit_rk import (
    Checkpointed,
    combine,
    explicit_rk_increment,
    NOT_THERE,
)


def cast_like(x: PyTree, like: PyTree) -> PyTree:
    """`x`, of the dtypes of `like`, to which they must be promoted."""

    def cast(a, b):
        dtype = jnp.result_type(b)
        # (Whatever the user's setting is.)
        with jax.numpy_dtype_promotion("standard"):
            promoted = jnp.promote_types(a.dtype, dtype)
        if promoted != dtype:
            raise ValueError(
                f"The vector field returned an array of dtype {a.dtype}, which cannot "
                f"be promoted to that of `y0`, {dtype}. Cast `y0`, or what the vector "
                "field returns."
            )
        return a.astype(dtype)

    return jtu.tree_map(cast, x, like)


class _OfDtype(diffrax.AbstractTerm):
    """A term whose products with a control are of the dtypes of `y`, as diffrax stores
    them."""

    term: diffrax.AbstractTerm
    y: PyTree

    def vf(self, t: RealScalarLike, y: Y, args: Args) -> VF:
        return self.term.vf(t, y, args)

    def contr(self, t0: RealScalarLike, t1: RealScalarLike, **kwargs: Any) -> Any:
        return self.term.contr(t0, t1, **kwargs)

    def prod(self, vf: VF, control: Any) -> Y:
        return cast_like(self.term.prod(vf, control), self.y)

    def vf_prod(self, t: RealScalarLike, y: Y, args: Args, control: Any) -> Y:
        return cast_like(self.term.vf_prod(t, y, args, control), self.y)


class Unrolled(diffrax.AbstractWrappedSolver[PyTree]):
    """The steps of an explicit Runge--Kutta solver, given by its tableau, with their
    stages unrolled: the same but for rounding. Has its solver state, in which the slope
    must be there from the first step."""

    solver: diffrax.AbstractERK

    @property
    def term_structure(self) -> Any:
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Any:
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self) -> Any:
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms: Term) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: Term) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: Term) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    def init(
        self, terms: Term, t0: RealScalarLike, t1: RealScalarLike, y0: Y, args: Args
    ) -> PyTree:
        return self.solver.init(terms, t0, t1, y0, args)

    def func(self, terms: Term, t0: RealScalarLike, y0: Y, args: Args) -> VF:
        return self.solver.func(terms, t0, y0, args)

    def step(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        solver_state: PyTree,
        made_jump: BoolScalarLike,
    ) -> tuple[Y, Y, DenseInfo, PyTree, diffrax.RESULTS]:
        f0 = NOT_THERE
        if solver_state is not None:
            _, f0 = solver_state
            if made_jump is not False:
                given = f0
                f0 = lax.cond(
                    eqxi.unvmap_any(made_jump),
                    lambda: jtu.tree_map(
                        lambda a, b: jnp.where(made_jump, a, b),
                        cast_like(terms.vf(t0, y0, args), given),
                        given,
                    ),
                    lambda: given,
                )
        y1, y_error, dense_info, f1 = self.make(terms, t0, t1, y0, args, f0)
        solver_state = None if f0 is NOT_THERE else (False, f1)
        return y1, y_error, dense_info, solver_state, diffrax.RESULTS.successful

    def make(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
        f0: Any = NOT_THERE,
    ) -> tuple[Y, Y, DenseInfo, Any]:
        """A step, and the slope at its end: if that at its start is given, as it is if
        the solver is first-same-as-last. (All of the dtype of `y`, as in diffrax.)"""
        tableau, control = self.solver.tableau, terms.contr(t0, t1)
        of_dtype = _OfDtype(terms, y0)
        if isinstance(terms, Checkpointed):
            of_dtype = Checkpointed(_OfDtype(terms.term, y0))
        has_slope = f0 is not NOT_THERE
        new = explicit_rk_increment(
            tableau,  # pyright: ignore[reportArgumentType]
            of_dtype,
            t0,
            t1,
            y0,
            args,
            control,
            1,
            scan=None if self.solver.scan_kind is None else True,
            first=of_dtype.prod(f0, control) if has_slope else None,
        )
        y1 = jtu.tree_map(lambda y, x: y + x, y0, new.increment)
        k, f1 = new.k, NOT_THERE
        if has_slope:
            f1 = cast_like(terms.vf(t1, y1, args), f0)
            k = (*k, of_dtype.prod(f1, control))
        elif tableau.fsal:  # pyright: ignore
            # (But the vector field is a costly one, see `is_vf_expensive`.)
            k = (*k, of_dtype.vf_prod(t1, y1, args, control))
        y_error = combine(tableau.b_error, k, 1)  # pyright: ignore
        dense_info = dict(y0=y0, y1=y1, k=jtu.tree_map(lambda *x: jnp.stack(x), *k))
        return y1, y_error, dense_info, f1
