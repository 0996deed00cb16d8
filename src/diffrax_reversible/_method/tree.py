from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


def stop_gradient(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


def arrays(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_array)


def statics(tree: PyTree) -> PyTree:
    """All but the arrays."""
    return eqx.filter(tree, eqx.is_array, inverse=True)


def tree_where(pred: Any, x: PyTree, y: PyTree) -> PyTree:
    """`x`, or unless `pred` the arrays of `y`."""
    return jtu.tree_map(
        lambda a, b: jnp.where(pred, a, b) if eqx.is_array(a) else a, x, y
    )


def same_struct(x: PyTree, y: PyTree) -> bool:
    """Whether they have the same structure, shapes and dtypes."""

    def struct(z):
        leaves, treedef = jtu.tree_flatten(z)
        # Of the results of `eval_shape`, whose leaves all have these.
        return [(leaf.shape, leaf.dtype) for leaf in leaves], treedef

    return struct(x) == struct(y)


def tree_add(x: PyTree, y: PyTree) -> PyTree:
    """Sum of two gradients, in either of which `None` is zero."""
    if x is None:
        return y
    if y is None:
        return x

    def add(a, b):
        if a is None:
            return b
        if b is None:
            return a
        return a + b

    return jtu.tree_map(add, x, y, is_leaf=lambda z: z is None)


def replace(module: Any, **fields: Any) -> Any:
    """As `dataclasses.replace`, but does not go through `__init__`: that checks types,
    if the module belongs to a package that is type-checked at run time, and gradients
    are not of them. (`equinox.tree_at` is confused by fields that are empty tuples.)"""
    children, treedef = jtu.tree_flatten_with_path(
        module, is_leaf=lambda x: x is not module
    )
    new = [fields.pop(path[0].name, child) for path, child in children]
    assert len(fields) == 0
    return jtu.tree_unflatten(treedef, new)
