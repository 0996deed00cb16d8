"""One primitive, for functions that are linear in some of their arrays.

JAX differentiates a function in forward mode, and for reverse mode transposes what is
linear in the tangents. So the rule for the derivative of a solve is a linear function,
that can be run (forward mode) and transposed (reverse mode), and differentiated again.

It is batched by keeping what is to be batched, and how, for when it is run. Under
`jax.grad` of `jax.vmap` that is before it is transposed: so then it is known which of
its gradients are sums over the batch, and they may be summed in the course of it. Under
`jax.vmap` of `jax.grad` it is after that, and each element has its own.
"""

import abc
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._jax_compat import ad, batching, mlir, Primitive, ShapedArray


class Level(NamedTuple):
    """One of the batches that a linear function is in."""

    size: int
    name: Any
    spmd_name: Any
    # Of each array that goes in, the linear ones first, and of each that comes out.
    # `None` for one that is the same for all elements.
    dims: tuple[int | None, ...]
    dims_out: tuple[int | None, ...]
    # Whether the function has been transposed since. Then linear arrays without an axis
    # are those of the first element alone, or they would count as often as there are
    # elements; and what comes out without an axis is the sum over all of them.
    is_transposed: bool = False


class AbstractLinear(abc.ABC):
    """A function of two lists of arrays, linear in the first."""

    @property
    def effects(self) -> set[Any]:
        """Those of JAX, as of `jax.debug.print`."""
        return set()

    @abc.abstractmethod
    def __call__(
        self, linear: list[Array], others: list[Array], batch: Sequence["Marked"]
    ) -> list[Array]:
        """`batch` are the levels that were there before the function was transposed,
        the innermost first."""

    def keeps_name(self, dims: Sequence[int | None]) -> bool:
        """Whether the elements of a batch, over these axes of the arrays, do the same
        at the same time, so that there may be collective operations."""
        del dims
        return True

    def dims_out(self, dims: Sequence[int | None]) -> tuple[int | None, ...] | None:
        """Over which axes what comes out is batched, if these are those of the arrays
        that go in; `None` if all of it is, over the first."""
        del dims
        return None

    @abc.abstractmethod
    def shapes(self, linear: list[Any], others: list[Any]) -> list[Any]:
        """Of what comes out, given those of what goes in."""

    @abc.abstractmethod
    def transpose(self, given: tuple[int, ...], perturbed: tuple[int, ...]):
        """From cotangents of those `given` that come out, to those of the linear arrays
        that are `perturbed`."""

    @abc.abstractmethod
    def differentiate(
        self, linear: list[Array], others: list[Array], tangents: dict[int, Array]
    ) -> list[Array] | None:
        """The tangents of what comes out, given those of `others`, by number; or `None`
        if they are zero. Linear in them, by means of this primitive."""


class Marked(NamedTuple):
    """A level, within it."""

    level: Level
    # Batched at this level, and at no other.
    mark: Array


_linear_p = Primitive("diffrax_reversible_linear")
_linear_p.multiple_results = True
# The identity in its second argument; but if that is batched at the level of the mark,
# the sum of all elements, or else the first.
_unbatch_p = Primitive("diffrax_reversible_unbatch")


def apply(
    fn: AbstractLinear, linear: Sequence[Any], others: Sequence[Any]
) -> list[Any]:
    # (Which may be tracers of a kind that a checker of types does not take for arrays.)
    return _linear_p.bind(*linear, *others, fn=fn, levels=(), num=len(linear))


def _over(
    levels: Sequence[Level],
    fn: Callable,
    num: int,
    keeps_name: Callable[[Level], bool],
) -> Callable:
    """`fn(batch, *arrays)` over all levels, as a function of the arrays, of which the
    first `num` are linear."""

    def over(fn, level):
        def one(mark, batch, *arrays):
            arrays = list(arrays)
            if level.is_transposed:
                batch = (Marked(level, mark), *batch)
                for i, d in enumerate(level.dims[:num]):
                    if d is None:
                        arrays[i] = jnp.where(mark, arrays[i], 0)
            outs = fn(batch, *arrays)
            unbatch = ft.partial(_unbatch_p.bind, mark, sums=level.is_transposed)
            pairs = zip(outs, level.dims_out, strict=True)
            return [x if d is not None else unbatch(x) for x, d in pairs]

        def all_of_them(batch, *arrays):
            # True for the first.
            mark = jnp.arange(level.size) == 0
            dims_out = list(level.dims_out)
            mapped = jax.vmap(
                lambda mark, *arrays: one(mark, batch, *arrays),
                in_axes=(0, *level.dims),
                out_axes=dims_out,
                axis_size=level.size,
                axis_name=level.name if keeps_name(level) else None,
                spmd_axis_name=level.spmd_name,
            )
            return mapped(mark, *arrays)

        return all_of_them

    for level in levels:
        fn = over(fn, level)
    return lambda *arrays: fn((), *arrays)


def _impl(*arrays, fn: AbstractLinear, levels: tuple[Level, ...], num: int):
    def call(batch, *arrays):
        # (The innermost level was put there last.)
        return fn(list(arrays[:num]), list(arrays[num:]), batch)

    return _over(levels, call, num, lambda level: fn.keeps_name(level.dims))(*arrays)


def _abstract_eval(*arrays, fn: AbstractLinear, levels: tuple[Level, ...], num: int):
    shapes = [x.shape for x in arrays]
    # From the outermost to the innermost.
    for level in reversed(levels):
        shapes = [
            s if d is None else (*s[:d], *s[d + 1 :])
            for s, d in zip(shapes, level.dims, strict=True)
        ]
    inside = [
        jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(shapes, arrays, strict=True)
    ]
    outs = fn.shapes(inside[:num], inside[num:])
    shapes = [x.shape for x in outs]
    for level in levels:
        shapes = [
            s if d is None else (*s[:d], level.size, *s[d:])
            for s, d in zip(shapes, level.dims_out, strict=True)
        ]
    return [ShapedArray(s, x.dtype) for s, x in zip(shapes, outs, strict=True)]


def _batch(axis_data, arrays, dims, *, fn, levels, num):
    if all(d is None for d in dims):
        out = _linear_p.bind(*arrays, fn=fn, levels=levels, num=num)
        return out, [None] * len(out)
    dims_out = fn.dims_out(dims)
    if dims_out is None:
        # (A constant may be a Python scalar here.)
        structs = [
            jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays
        ]
        dims_out = (0,) * len(fn.shapes(structs[:num], structs[num:]))
    level = Level(
        axis_data.size, axis_data.name, axis_data.spmd_name, tuple(dims), dims_out
    )
    out = _linear_p.bind(*arrays, fn=fn, levels=(*levels, level), num=num)
    return out, dims_out


def _jvp(primals, tangents, *, fn, levels, num):
    out = _linear_p.bind(*primals, fn=fn, levels=levels, num=num)
    others, t_out = primals[num:], None
    if any(type(t) is not ad.Zero for t in tangents[:num]):
        t_linear = [ad.instantiate_zeros(t) for t in tangents[:num]]
        t_out = _linear_p.bind(*t_linear, *others, fn=fn, levels=levels, num=num)
    numbers = [i for i, t in enumerate(tangents[num:]) if type(t) is not ad.Zero]
    if len(numbers) > 0:
        is_zero = False

        def differentiate(batch, *arrays):
            nonlocal is_zero
            del batch
            linear, others, ts = arrays[:num], arrays[num : len(primals)], None
            ts = dict(zip(numbers, arrays[len(primals) :], strict=True))
            found = fn.differentiate(list(linear), list(others), ts)
            if found is None:
                is_zero = True
                return [jnp.zeros(x.shape, x.dtype) for x in fn.shapes(linear, others)]
            return found

        more = [
            level._replace(dims=(*level.dims, *[level.dims[num + i] for i in numbers]))
            for level in levels
        ]
        t_others = [tangents[num + i] for i in numbers]
        # (Names are kept: what is called in there has its own levels.)
        new = _over(more, differentiate, num, lambda level: True)(*primals, *t_others)
        if not is_zero:
            t_out = new if t_out is None else [a + b for a, b in zip(t_out, new)]
    if t_out is None:
        t_out = [ad.Zero.from_primal_value(x) for x in out]  # pyright: ignore
    return out, t_out


def _transpose(cts, *arrays, fn, levels, num):
    given = tuple(i for i, ct in enumerate(cts) if type(ct) is not ad.Zero)
    perturbed = tuple(i for i in range(num) if ad.is_undefined_primal(arrays[i]))
    out: list[Any] = [None] * len(arrays)
    if len(given) == 0:
        return out
    transposed = [
        level._replace(
            dims=(*[level.dims_out[i] for i in given], *level.dims[num:]),
            dims_out=tuple(level.dims[i] for i in perturbed),
            is_transposed=not level.is_transposed,
        )
        for level in levels
    ]
    grads = _linear_p.bind(
        *[cts[i] for i in given],
        *arrays[num:],
        fn=fn.transpose(given, perturbed),
        levels=tuple(transposed),
        num=len(given),
    )
    for i, g in zip(perturbed, grads, strict=True):
        out[i] = g
    return out


_linear_p.def_impl(_impl)
_linear_p.def_effectful_abstract_eval(
    lambda *arrays, fn, **kwargs: (_abstract_eval(*arrays, fn=fn, **kwargs), fn.effects)
)
mlir.register_lowering(_linear_p, mlir.lower_fun(_impl, multiple_results=True))
batching.fancy_primitive_batchers[_linear_p] = _batch
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose


def _unbatch(arrays, dims, sums):
    mark, x = arrays
    mark_dim, dim = dims
    if mark_dim is None:
        return _unbatch_p.bind(mark, x, sums=sums), dim
    if dim is None:
        return x, None
    return jnp.sum(x, axis=dim) if sums else jnp.take(x, 0, axis=dim), None


# (It has no implementation: nothing is left of it within a batch.)
_unbatch_p.def_abstract_eval(lambda mark, x, sums: x)
batching.primitive_batchers[_unbatch_p] = _unbatch
