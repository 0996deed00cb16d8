"""What all elements of a batch share, before and after a solve that is batched.

Some of what comes out may not depend on the batch: the times of fixed steps, or a part
of `y`. JAX then has one gradient of it, in all. In a rule that is batched every element
starts from that gradient as if it were its own, and the sum over the batch, where
something that goes in is shared, counts it as often as there are elements. JAX 0.10.2
says nothing; JAX 0.12 raises an error, even if that gradient is zero. Hence the first
element gets it, and the others get zero; and the sum is made here.

Under `jax.vmap` of `jax.grad` each element is to have its own in both places. The two
are told apart by a mark: see `batch`.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._jax_compat import ad, batching, mlir, Primitive


# The identity in their second argument, without a batch.
_to_first_p = Primitive("diffrax_reversible_to_first")
_total_p = Primitive("diffrax_reversible_total")


def _jvp_rule(p):
    def jvp(primals, tangents):
        mark, x, *rest = primals
        _, t, *_ = tangents
        t_out = t if type(t) is ad.Zero else p.bind(mark, t, *rest)
        return p.bind(*primals), t_out

    return jvp


def _transpose(grad, mark, x, *rest):
    # (Never used. But JAX looks for it before `once_only` is asked, which refuses it.)
    del mark, x
    return (None, grad, *[None for _ in rest])


for _p in (_to_first_p, _total_p):
    _p.def_impl(lambda mark, x, *rest: x)
    _p.def_abstract_eval(lambda mark, x, *rest: x)
    mlir.register_lowering(
        _p, mlir.lower_fun(lambda mark, x, *rest: x, multiple_results=False)
    )
    ad.primitive_jvps[_p] = _jvp_rule(_p)
    ad.primitive_transposes[_p] = _transpose


def _to_first_batch(axis_data, xs, dims):
    mark, x = xs
    mark_dim, dim = dims
    if mark_dim is not None and dim is None:
        is_first = jnp.arange(axis_data.size) == 0
        is_first = is_first.reshape(-1, *[1] * jnp.ndim(x))
        x, dim = jnp.where(is_first, x[None], jnp.zeros_like(x)[None]), 0
    # Outwards.
    return _to_first_p.bind(mark, x), dim


def _total_batch(xs, dims):
    mark, grad, x = xs
    mark_dim, grad_dim, dim = dims
    if mark_dim is not None and grad_dim is not None and dim is None:
        grad, grad_dim = jnp.sum(grad, axis=grad_dim), None
    return _total_p.bind(mark, grad, x), grad_dim


batching.fancy_primitive_batchers[_to_first_p] = _to_first_batch
batching.primitive_batchers[_total_p] = _total_batch


def to_first(mark: Any, grads: PyTree) -> PyTree:
    """The gradients of what has come out, of which those that all elements of a batch
    share become those of the first. To be called in the backward pass, with a `mark`
    that was made before the forward one."""
    return jtu.tree_map(lambda g: _to_first_p.bind(mark, g), grads)


def total(mark: Any, grads: PyTree, inputs: PyTree) -> PyTree:
    """The gradients of `inputs`, summed over the batches that share these. (`None`
    stays.)"""
    return jtu.tree_map(
        lambda g, x: None if g is None or x is None else _total_p.bind(mark, g, x),
        grads,
        eqx.filter(inputs, eqx.is_inexact_array),
        is_leaf=lambda x: x is None,
    )
