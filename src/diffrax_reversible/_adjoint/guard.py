"""What JAX and Equinox are not to see when the rule is differentiated."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


def without_tangents(tree: PyTree) -> PyTree:
    """The identity, through which integers and booleans have no tangents.

    Those that come out of a custom rule have (of dtype `float0`), as `made_jump` of one
    solve does that is given to the next; and Equinox does not accept them then.
    """

    def drop(x):
        if eqx.is_array(x) and (
            x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)
        ):
            return lax.bitwise_or(x, jnp.zeros_like(x))
        return x

    return jtu.tree_map(drop, tree)
