"""Numbers that are known not to be negative, and indices that are in bounds too: `jnp`
asks about that wherever one is used, which XLA compiles over and over. And arrays that
are carried as one."""

from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree


def div(n: Array, m: Any) -> Array:
    """`n // m`."""
    return lax.div(n, jnp.asarray(m, n.dtype))


def rem(n: Array, m: Any) -> Array:
    """`n % m`."""
    return lax.rem(n, jnp.asarray(m, n.dtype))


def take(tree: PyTree, i: Array) -> PyTree:
    """`x[i]` of each array, or buffer of a loop."""
    i = _unsigned(i)
    return jtu.tree_map(lambda x: _take(x, i), tree, is_leaf=_is_buffer)


def take_all(tree: PyTree, indices: Array) -> PyTree:
    """`x[indices]` of each array, or buffer of a loop."""
    i = _unsigned(indices)
    return jtu.tree_map(
        lambda x: _array(x).at[i].get(mode="promise_in_bounds"),
        tree,
        is_leaf=_is_buffer,
    )


def put(tree: PyTree, i: Array, new: PyTree, pred: Any) -> PyTree:
    """`x.at[i].set(new)` of each array, or buffer of a loop, if `pred`."""
    i = _unsigned(i)

    def one(x, old):
        if _is_buffer(old):
            return eqx.tree_at(lambda b: b._array, old, one(x, old._array))
        x = jnp.where(pred, x, _take(old, i)).astype(old.dtype)
        return lax.dynamic_update_index_in_dim(old, x, i, 0)

    return jtu.tree_map(one, new, tree)


def pack(tree: PyTree) -> list[Array]:
    """All arrays of each dtype, in one."""
    return [ravel_pytree(xs)[0] for xs in _of_dtypes(tree).values()]


def unpack(packed: list[Array], example: PyTree) -> PyTree:
    """The inverse of `pack`, to the structure of the example."""
    pairs = zip(_of_dtypes(example).items(), packed, strict=True)
    parts = {dtype: iter(ravel_pytree(xs)[1](x)) for (dtype, xs), x in pairs}
    return jtu.tree_map(lambda x: next(parts[x.dtype]), example)


def _of_dtypes(tree: PyTree) -> dict[Any, list[Array]]:
    out = {}
    for x in jtu.tree_leaves(tree):
        out.setdefault(x.dtype, []).append(x)
    return out


def _unsigned(i: Array) -> Array:
    # (Apart, so that what it is made of is not compiled anew wherever it is used.)
    return lax.optimization_barrier(jnp.asarray(i).astype(jnp.uint32))


def _take(x: Any, i: Array) -> Array:
    return lax.dynamic_index_in_dim(_array(x), i, keepdims=False)


def _array(x: Any) -> Array:
    return _array(x._array) if _is_buffer(x) else x


def _is_buffer(x: Any) -> bool:
    return isinstance(x, eqx.Module) and hasattr(x, "_array")
