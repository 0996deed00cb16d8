"""Batches, over which the gradients of shared parameters are summed step by step.

Under `jax.grad` of `jax.vmap` the gradient of what is not batched is summed over the
batch. JAX does so after the backward pass: in it, each element has its own. Done inside
it, there is one copy of them, and products of matrices are made in place of as many
outer products. But under `jax.vmap` of `jax.grad` each element is to keep its own; and
within a backward pass the two look alike.

They differ in which comes first, when the solve is called. So a primitive is put beside
it: its batching rule marks the batch, and its derivative is one that batches no longer
mark. In the backward pass a function can then be differentiated for the batch as a
whole: its arguments are gathered, and each element is handed its part of the results.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._jax_compat import ad, batching, mlir, Primitive


_mark_p = Primitive("diffrax_reversible_mark")
_mark_p.def_impl(lambda mark, *xs, **kwargs: mark)
_mark_p.def_abstract_eval(lambda mark, *xs, **kwargs: mark)
mlir.register_lowering(
    _mark_p, mlir.lower_fun(lambda mark, *xs, **kwargs: mark, multiple_results=False)
)


def _mark_batch(axis_data, xs, dims, *, over_devices):
    mark = _mark_p.bind(*xs, over_devices=over_devices)
    is_batched = any(d is not None for d in dims[1:])
    is_over_devices = axis_data.spmd_name is not None
    if not is_batched or (is_over_devices and not over_devices):
        return mark, None
    return jnp.broadcast_to(mark, (axis_data.size, *jnp.shape(mark))), 0


batching.fancy_primitive_batchers[_mark_p] = _mark_batch
# Not bound again, so a batch is not marked that is outside of the derivative.
ad.primitive_jvps[_mark_p] = lambda xs, tangents, **kwargs: (xs[0], tangents[0])


def mark_batch(inputs: PyTree, over_devices: bool) -> Array:
    """An array that is batched just where `inputs` are, or a part of them, before they
    are differentiated. To be handed to the function that is, besides them.

    Batches over devices are marked only if `over_devices`: if sums are made in every
    step, then these would exchange them there.
    """
    leaves = jtu.tree_leaves(eqx.filter(inputs, eqx.is_array))
    return _mark_p.bind(jnp.array(False), *leaves, over_devices=over_devices)


class Level(NamedTuple):
    """One of the batches that the solve is in."""

    # Batched here, and perhaps at the levels that this one is in.
    mark: Any
    size: int
    name: Any
    # Which of the constants.
    is_batched: tuple[bool, ...]
    # Whether its elements may make different steps, or save at different times.
    steps_differ: bool


class _Found:
    """Where the batching rule of `_levels_p` puts what it finds."""

    def __init__(self, mark):
        self.mark = mark
        self.levels: list[Level] | None = []


_levels_p = Primitive("diffrax_reversible_levels")
_levels_p.multiple_results = True
_levels_p.def_impl(lambda *xs, **kwargs: [])
_levels_p.def_abstract_eval(lambda *xs, **kwargs: [])
mlir.register_lowering(
    _levels_p, mlir.lower_fun(lambda *xs, **kwargs: [], multiple_results=True)
)
ad.primitive_jvps[_levels_p] = lambda xs, _, **kwargs: ([], [])


def _find_level(axis_data, xs, dims, *, found, num_consts):
    is_batched = tuple(d is not None for d in dims)
    is_marked, consts, steps = (
        is_batched[0],
        is_batched[1 : num_consts + 1],
        is_batched[num_consts + 1 :],
    )
    if found.levels is not None:
        if is_marked:
            size, name = axis_data.size, axis_data.name
            found.levels.append(Level(found.mark, size, name, consts, any(steps)))
        # As it is outside of this level.
        found.mark = xs[0]
    # Outwards.
    _levels_p.bind(*xs, found=found, num_consts=num_consts)
    return [], []


batching.fancy_primitive_batchers[_levels_p] = _find_level


_whole_p = Primitive("diffrax_reversible_whole")
_own_p = Primitive("diffrax_reversible_own")


def _abstract(x, shape, spec):
    return x.update(
        shape=shape, sharding=NamedSharding(x.sharding.mesh, PartitionSpec(*spec))
    )


# (Neither has an implementation: nothing is left of them within a batch.)
_whole_p.def_abstract_eval(
    lambda mark, x, size: _abstract(x, (size, *x.shape), (None, *x.sharding.spec))
)
_own_p.def_abstract_eval(lambda mark, x: _abstract(x, x.shape[1:], x.sharding.spec[1:]))


def _whole_batch(xs, dims, size):
    mark, x = xs
    mark_dim, dim = dims
    if mark_dim is not None:
        return batching.bdim_at_front(x, dim, size), None
    return _whole_p.bind(mark, x, size=size), None if dim is None else dim + 1


def _own_batch(xs, dims):
    mark, x = xs
    mark_dim, dim = dims
    if mark_dim is not None:
        assert dim is None
        return x, 0
    # This level is not that of the mark.
    x = jnp.moveaxis(x, dim, -1)
    return _own_p.bind(mark, x), x.ndim - 2


batching.primitive_batchers[_whole_p] = _whole_batch
batching.primitive_batchers[_own_p] = _own_batch


class Batch(NamedTuple):
    """All of the batches over which gradients are summed."""

    # The innermost first.
    levels: tuple[Level, ...]
    # The constants, each a whole at those levels at which it is batched.
    consts: tuple[Any, ...]

    @property
    def steps_differ(self) -> bool:
        return any(level.steps_differ for level in self.levels)

    @property
    def is_named(self) -> bool:
        """Whether there may be collective operations over it."""
        # (What JAX has in place of a name is a bare `object()`.)
        has_names = any(type(level.name) is not object for level in self.levels)
        return has_names and not self.steps_differ

    def num_shared_by(self, i: int) -> int:
        """How many elements share a constant."""
        return math.prod(x.size for x in self.levels if not x.is_batched[i])

    def whole(self, tree: PyTree) -> PyTree:
        """All elements of the batch, along leading axes."""
        for level in self.levels:
            tree = jtu.tree_map(lambda x: _whole(level, x), tree)
        return tree

    def own(self, tree: PyTree) -> PyTree:
        """The element's part of what is whole."""
        for level in reversed(self.levels):
            tree = jtu.tree_map(lambda x: _own_p.bind(level.mark, x), tree)
        return tree

    def own_const(self, i: int, x: Array) -> Array:
        """That of the gradient of a constant, which may be whole at some levels."""
        for level in reversed(self.levels):
            if level.is_batched[i]:
                x = _own_p.bind(level.mark, x)
        return x

    def sum(self, grads: dict[int, Array]) -> dict[int, Array]:
        """Of gradients of constants, as each element has them."""

        def one(i, x):
            for level in self.levels:
                if not level.is_batched[i]:
                    x = jnp.sum(_whole(level, x), axis=0)
            return x

        return {i: one(i, x) for i, x in grads.items()}

    def vmap(self, fn: Callable, indices: Sequence[int]) -> Callable:
        """`fn(consts, args)` for the whole batch, `consts` being those numbered so."""
        for level in self.levels:
            axes = [0 if level.is_batched[i] else None for i in indices]
            # For collective operations, if elements make each step together.
            name = None if level.steps_differ else level.name
            fn = jax.vmap(fn, in_axes=(axes, 0), axis_name=name, axis_size=level.size)
        return fn


def _whole(level: Level, x: Array) -> Array:
    return _whole_p.bind(level.mark, x, size=level.size)


def find_batch(mark: Any, consts: Sequence[Any], steps: PyTree) -> Batch:
    """To be called in the backward pass, with the `mark` made before the forward one
    (`None` if there is nothing to be summed), the constants, and that on which it
    depends which steps there are, and what was saved in them."""
    if mark is None:
        return Batch((), tuple(consts))
    found = _Found(mark)
    steps = jtu.tree_leaves(eqx.filter(steps, eqx.is_array))
    _levels_p.bind(mark, *consts, *steps, found=found, num_consts=len(consts))
    levels = found.levels
    assert levels is not None
    # If this has become part of a program then that must not hold on to tracers, nor
    # add to them.
    found.levels = found.mark = None

    def whole(i, x):
        for level in levels:
            if level.is_batched[i]:
                x = _whole(level, x)
        return x

    return Batch(tuple(levels), tuple(whole(i, x) for i, x in enumerate(consts)))
