"""Errors for modes of differentiation that the rule of `ReversibleAdjoint` does not
have, in place of those that JAX would raise further on."""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._jax_compat import ad, batching, eqxi, mlir, Primitive


FORWARD_MODE = (
    "`adjoint=ReversibleAdjoint()` cannot be differentiated in forward mode "
    "(`jax.jvp`, `jax.jacfwd`, ...). Use `adjoint=diffrax.ForwardMode()` with the same "
    "solver. (Forward over reverse mode, `jax.jvp` of `jax.grad`, works.)"
)
REVERSE_OVER_REVERSE = (
    "The gradient that `adjoint=ReversibleAdjoint()` computes cannot be differentiated "
    "in reverse mode once more. For second derivatives use forward over reverse mode "
    "(`jax.jvp` or `jax.jacfwd` of `jax.grad`), or `adjoint=diffrax.DirectAdjoint()`."
)


# The identity. Its tangents go through `_linear_p`, which can be transposed, but not
# run: so reverse mode, and forward over reverse, never notice, and forward mode fails.
_reverse_only_p = Primitive("diffrax_reversible_reverse_only")
_linear_p = Primitive("diffrax_reversible_reverse_only_linear")
for _p in (_reverse_only_p, _linear_p):
    _p.multiple_results = True
    _p.def_abstract_eval(lambda *xs: list(xs))


def _refuse(*args, **kwargs):
    del args, kwargs
    raise NotImplementedError(FORWARD_MODE)


def _jvp(primals, tangents):
    out = list(tangents)
    which = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
    for i, t in zip(which, _linear_p.bind(*[tangents[i] for i in which])):
        out[i] = t
    # Not bound again: that is for the innermost differentiation alone.
    return list(primals), out


_reverse_only_p.def_impl(lambda *xs: list(xs))
mlir.register_lowering(
    _reverse_only_p, mlir.lower_fun(lambda *xs: list(xs), multiple_results=True)
)
batching.primitive_batchers[_reverse_only_p] = lambda xs, dims: (
    _reverse_only_p.bind(*xs),
    dims,
)
ad.primitive_jvps[_reverse_only_p] = _jvp
_linear_p.def_impl(_refuse)
ad.primitive_jvps[_linear_p] = _refuse
# As JAX does for a `custom_vjp`: it is never batched before it is transposed.
batching.primitive_batchers[_linear_p] = _refuse
mlir.register_lowering(_linear_p, _refuse)
ad.primitive_transposes[_linear_p] = lambda grads, *args: grads


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


def reverse_only(tree: PyTree) -> PyTree:
    """The identity, that raises an error if it is differentiated in forward mode."""
    dynamic, static = eqx.partition(tree, eqx.is_inexact_array)
    leaves, treedef = jtu.tree_flatten(dynamic)
    if len(leaves) == 0:
        return tree
    leaves = _reverse_only_p.bind(*[jnp.asarray(x) for x in leaves])
    return eqx.combine(jtu.tree_unflatten(treedef, leaves), static)


def once_only(tree: PyTree) -> PyTree:
    """The identity, that raises an error if it is differentiated in reverse mode."""
    return eqxi.nondifferentiable_backward(tree, msg=REVERSE_OVER_REVERSE)
