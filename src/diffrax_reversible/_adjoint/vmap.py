import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu


@jax.custom_batching.custom_vmap
def together(pred, number):
    """`pred`; or if it is batched, and `number` is not, whether it is true for any."""
    del number
    return pred


@together.def_vmap
def _together_vmap(axis_size, in_batched, pred, number):
    pred_batched, number_batched = in_batched
    if not number_batched:
        return together(jnp.any(pred, axis=0) if pred_batched else pred, number), False
    if not pred_batched:
        pred = jnp.broadcast_to(pred, (axis_size, *pred.shape))
    return together(pred, number), True


@jax.custom_jvp
def where_active(active, new, old):
    """`jnp.where(active, new, old)`, if `active` is batched; otherwise it must be true,
    and this is `new`.

    To be used in the body of a loop that runs for as long as any element is active: a
    loop that is not batched then has no selects in it.
    """
    return _where_active(active, new, old)


# Linear in `new` and `old`. (And `custom_vmap` cannot be batched once differentiated.)
@where_active.defjvp
def _where_active_jvp(primals, tangents):
    active, new, old = primals
    _, t_new, t_old = tangents
    return where_active(active, new, old), where_active(active, t_new, t_old)


@jax.custom_batching.custom_vmap
def _where_active(active, new, old):
    del active, old
    return new


@_where_active.def_vmap
def _where_active_vmap(axis_size, in_batched, active, new, old):
    active_batched, new_batched, old_batched = in_batched
    if not active_batched:
        # All are active, or else within a batch of which we do not know yet.
        if new_batched and not old_batched:
            old = jnp.broadcast_to(old, (axis_size, *old.shape))
        elif old_batched and not new_batched:
            new = jnp.broadcast_to(new, (axis_size, *new.shape))
        return _where_active(active, new, old), new_batched or old_batched
    axes = (0, 0 if new_batched else None, 0 if old_batched else None)
    return jax.vmap(lax.select, in_axes=axes)(active, new, old), True


def tree_where_active(active, new, old):
    return jtu.tree_map(
        lambda a, b: where_active(active, a, b) if eqx.is_array(a) else a, new, old
    )


def as_batched(tree, like):
    """`tree`, of which a batch has one for each element if it has so of `like`, a
    boolean: for what a loop begins with. (JAX batches the body of a loop again, and all
    loops in it, where more of what it carries turns out to be batched.)"""
    # (XLA removes it.)
    return jtu.tree_map(
        lambda x: lax.select(like, x, x) if eqx.is_array(x) else x, tree
    )
