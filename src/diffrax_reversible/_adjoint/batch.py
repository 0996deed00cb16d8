"""Batches, over which the gradients of shared parameters are summed step by step.

Under `jax.grad` of `jax.vmap` the gradient of what is not batched is summed over the
batch: see `linear`. Done in each step, there is one copy of these gradients, and
products of matrices are made in place of as many outer products. So a function is
differentiated for the batch as a whole: its arguments are gathered, and each element is
handed its part of the results.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._jax_compat import batching, Primitive


class Level(NamedTuple):
    """One of the batches that the solve is in."""

    # Batched here, and at no other level.
    mark: Any
    size: int
    name: Any
    # Which of the constants.
    is_batched: tuple[bool, ...]
    # Whether its elements may make different steps, or save at different times.
    steps_differ: bool


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

    def all(self, i: int, pred: Array) -> Array:
        """Whether it is true of all over which the gradient of a constant is summed."""
        for level in self.levels:
            if not level.is_batched[i]:
                pred = jnp.all(_whole(level, pred), axis=0)
        return pred

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


def make_batch(levels: Sequence[Level], consts: Sequence[Any]) -> Batch:
    """To be called within these levels, the innermost of which is the first."""

    def whole(i, x):
        for level in levels:
            if level.is_batched[i]:
                x = _whole(level, x)
        return x

    return Batch(tuple(levels), tuple(whole(i, x) for i, x in enumerate(consts)))
