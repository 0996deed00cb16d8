import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import PyTree


def stop_gradient(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, tree)


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
