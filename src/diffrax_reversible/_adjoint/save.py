"""Pulling back what `SubSaveAt`s saved during a step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import save_every
from .._jax_compat import eqxi
from .functions import Functions
from .hoist import Hoisted, Hoister, materialise
from .index import take
from .pullback import Step


def add_functions(hoister: Hoister, i: int, sub, solver, terms, args, step: Step):
    """Adds what the `i`th `SubSaveAt` computes. `step` is an example."""
    if sub.ts is not None:
        _, _, dense_info, _, _ = eqx.filter_eval_shape(
            solver.step,
            terms,
            step.t0,
            step.t1,
            step.y1,
            args,
            step.solver_state,
            step.made_jump,
        )

        def interpolate(t0, t1, t, dense_info):
            interpolation = solver.interpolation_cls(t0=t0, t1=t1, **dense_info)
            return sub.fn(t, interpolation.evaluate(t), args)

        hoister.add(f"save_ts_{i}", interpolate, step.t0, step.t1, step.t0, dense_info)
    if save_every(sub) != 0:
        hoister.add(
            f"save_steps_{i}", lambda t, y: sub.fn(t, y, args), step.t0, step.y1
        )


def function_names(hoisted: Hoisted) -> list[str]:
    """Those of the functions that were added here."""
    return [name for name in hoisted.names if name.startswith("save_")]


class Saved(NamedTuple):
    """What one `SubSaveAt` saved, as it is seen from the end of a step."""

    # Those of the host's `SaveState` that count what has been saved until then.
    ts_index: Array
    index: Array

    def last(self, buffers: PyTree) -> PyTree:
        return take(buffers, jnp.maximum(self.index - 1, 0))


def is_zero(grads: PyTree) -> bool:
    return all(g is None for g in jtu.tree_leaves(grads, is_leaf=lambda x: x is None))


def accumulate(grad_consts: dict[int, Any], new: dict[int, Any]) -> None:
    for i, g in new.items():
        grad_consts[i] = grad_consts[i] + g


def pull_steps(fns: Functions, i: int, saved, t, y, grad_ys, index: Saved):
    """Pulls back what `SubSaveAt(steps=...)` saved at the end `(t, y)` of a step, if
    `saved`. Returns the gradients of constants, of `t`, and of `y`."""

    def pull():
        if fns.times_vary:
            _, pull_fn = fns.vjp_where(saved, f"save_steps_{i}", (), (t, y))
            new_consts, (grad_t, grad_y) = pull_fn(index.last(grad_ys))
        else:
            _, pull_fn = fns.vjp_where(saved, f"save_steps_{i}", (t,), (y,))
            new_consts, (grad_y,) = pull_fn(index.last(grad_ys))
            grad_t = jnp.zeros_like(t)
        return new_consts, grad_t, grad_y

    return lax.cond(
        eqxi.unvmap_any(saved),
        pull,
        lambda: jtu.tree_map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pull)
        ),
    )


def pull_ts(
    fns: Functions,
    i: int,
    step: Step,
    dense_info: PyTree,
    ts: Array,
    saved_here,
    index: Saved,
    grad_saved,
    grad_consts: dict[int, Any],
    grad_ts: Array | None,
    grad_dense_info: PyTree,
):
    """Pulls back what `SubSaveAt(ts=...)` saved during a step: at those `t` for which
    `saved_here(t)`. Makes no iterations if that was nothing. `grad_saved` is the
    gradient of the host's `SaveState`. Returns the new `index`, `grad_consts`,
    `grad_ts` and `grad_dense_info`, and the gradients of `step.t0` and `step.t1`."""
    has_ys = not is_zero(grad_saved.ys)
    name = f"save_ts_{i}"
    if has_ys:
        grad_dense_info = materialise(
            grad_dense_info, eqx.filter(dense_info, eqx.is_inexact_array)
        )
    times_vary = fns.times_vary or grad_ts is not None

    def last(ts_index):
        t = take(ts, jnp.maximum(ts_index - 1, 0))
        return t, (ts_index > 0) & saved_here(t)

    def cond_fun(carry):
        index, *_ = carry
        _, saved = last(index.ts_index)
        return eqxi.unvmap_any(saved)

    def body_fun(carry):
        index, grad_ts, grads = carry
        t, saved = last(index.ts_index)
        grad_t = jnp.zeros_like(t)
        if has_ys:
            new, grad_t = pull(saved, jnp.where(saved, t, step.t1), index)
            grads = jtu.tree_map(jnp.add, grads, new)
        if grad_ts is not None:
            if grad_saved.ts is not None:
                grad_t = grad_t + index.last(grad_saved.ts)
            place = jnp.maximum(index.ts_index - 1, 0)
            grad_ts = grad_ts.at[place].add(jnp.where(saved, grad_t, 0))
        one = jnp.where(saved, 1, 0)
        return Saved(index.ts_index - one, index.index - one), grad_ts, grads

    def pull(saved, t, index):
        times = (step.t0, step.t1, t)
        if times_vary:
            _, pull_fn = fns.vjp_where(saved, name, (), (*times, dense_info))
            consts, (t0, t1, t, info) = pull_fn(index.last(grad_saved.ys))
            return (consts, info, t0, t1), t
        _, pull_fn = fns.vjp_where(saved, name, times, (dense_info,))
        consts, (info,) = pull_fn(index.last(grad_saved.ys))
        zero = jnp.zeros_like(t)
        return (consts, info, zero, zero), zero

    zero = jnp.zeros_like(step.t0)
    own_consts = {j: grad_consts[j] for j in fns.numbers_where(name)}
    grads = (own_consts, grad_dense_info, zero, zero)
    index, grad_ts, grads = lax.while_loop(cond_fun, body_fun, (index, grad_ts, grads))
    own_consts, grad_dense_info, grad_t0, grad_t1 = grads
    grad_consts = {**grad_consts, **own_consts}
    return index, grad_consts, grad_ts, grad_dense_info, grad_t0, grad_t1
