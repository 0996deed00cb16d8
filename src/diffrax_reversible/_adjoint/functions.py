"""What the loop calls, with its constants, as the backward pass uses it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._method.tree import tree_add
from .batch import Batch
from .hoist import Hoisted
from .vmap import where_active


class Functions(NamedTuple):
    """The hoisted functions, with their constants."""

    hoisted: Hoisted
    consts: Sequence[Any]
    # The numbers of those constants with respect to which we differentiate.
    differentiated: frozenset[int]
    # Whether we differentiate with respect to the times of steps.
    times_vary: bool

    # Over which gradients of constants are summed.
    batch: Batch

    def call(self, name: str, *args):
        return self.hoisted.call(name, self.consts, *args)

    def vjp(self, name: str, args: tuple, diff_args: tuple):
        return self.hoisted.vjp(
            name, self.consts, self.differentiated, args, diff_args, self.batch
        )

    def vjp_where(self, where, name: str, args: tuple, diff_args: tuple):
        """As `vjp`, for those elements of a batch of which `where` is true. For others
        the gradient is zero, even if it would not be finite. For one that is in no
        batch, `where` must be true."""
        each = self.batch.steps_differ
        out, pull = self.hoisted.vjp(
            name,
            self.consts,
            self.differentiated,
            args,
            diff_args,
            # For the batch as a whole, what is not finite could not be left out.
            None if each else self.batch,
        )

        def pull_where(grad):
            grad_consts, grad_args = jtu.tree_map(
                lambda g: where_active(where, g, jnp.zeros_like(g)), pull(grad)
            )
            if each:
                grad_consts = {~i: g for i, g in grad_consts.items()}
            return grad_consts, grad_args

        return out, pull_where

    def numbers_where(self, name: str) -> list[int]:
        """Of the gradients of constants that `vjp_where` gives: `i`, or `~i` for one
        that is yet to be summed over the batch."""
        used = self.differentiated.intersection(self.hoisted.uses(name))
        return [~i if self.batch.steps_differ else i for i in sorted(used)]

    def zero_consts(self, names_where: Sequence[str]) -> dict[int, Any]:
        """For the sum of all gradients of constants. `names_where` are the functions
        with which `vjp_where` is called."""
        numbers = set(self.differentiated)
        for name in names_where:
            numbers.update(self.numbers_where(name))
        return {i: jnp.zeros_like(self.consts[max(i, ~i)]) for i in sorted(numbers)}

    def sum_consts(self, grads: dict[int, Any]) -> dict[int, Any]:
        """The gradients of constants, from the sum of all that were given."""
        each = self.batch.sum({~i: g for i, g in grads.items() if i < 0})
        return {i: tree_add(g, each.get(i)) for i, g in grads.items() if i >= 0}

    def linearise(self, name: str, args: tuple, diff_args: tuple):
        return self.hoisted.linearise(
            name, self.consts, self.differentiated, args, diff_args, self.batch
        )

    def split_times(self, others: tuple, times: tuple) -> tuple[tuple, tuple]:
        """The arguments of a function that are constants, and those that are not."""
        return (others, times) if self.times_vary else ((*others, *times), ())

    def depends(self, name: str) -> bool:
        """Whether the output depends on what we differentiate, its arguments aside."""
        return not self.differentiated.isdisjoint(self.hoisted.uses(name))


def of_dtype(grads: PyTree, of: PyTree) -> PyTree:
    """The gradient of what was promoted to the dtypes of `grads`."""

    def cast(g, x):
        if g is None:
            return None
        if jnp.iscomplexobj(g) and not jnp.iscomplexobj(x):
            g = jnp.real(g)
        return g.astype(jnp.result_type(x))

    return jtu.tree_map(cast, grads, of, is_leaf=lambda g: g is None)
