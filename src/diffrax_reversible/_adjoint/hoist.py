"""Functions with everything that they close over made explicit.

The rule for differentiating the integration loop must not close over what is being
differentiated. But the functions from which the loop is made do: over `args`, `terms`,
and over whatever the user's own functions close over. So each of them is traced once,
and every array found in it becomes an explicit constant. The gradient of a constant is
then an ordinary gradient of the rule, and JAX takes it on to wherever it came from:
`args`, `terms`, or a variable in the user's closure.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._method.explicit_rk import equations
from .batch import Batch


Pull: TypeAlias = Callable[[PyTree], tuple[dict[int, Any], Any]]


class Hoisted:
    """A set of functions, called by name, that share one tuple of constants.

    Holds no arrays: the constants are kept apart (`hoist` returns them) and are handed
    back at each call. A constant that several functions use is held only once, so that
    there is a single place for its gradient.
    """

    def __init__(self, functions: dict[str, tuple[PyTree, Any, tuple[int, ...]]]):
        self._functions = functions

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    @property
    def effects(self) -> set[Any]:
        """Those that JAX is to keep in their order, as of `jax.debug.print`."""
        return set[Any]().union(*(_jaxpr(f).effects for f in self._functions.values()))

    def uses(self, name: str) -> tuple[int, ...]:
        """Which of the constants a function uses."""
        _, _, indices = self._functions[name]
        return indices

    def _bind(self, name: str, own: Sequence[Any]) -> Callable:
        static, treedef, _ = self._functions[name]
        return eqx.combine(jtu.tree_unflatten(treedef, own), static)

    def call(self, name: str, consts: Sequence[Any], *args: Any) -> Any:
        bound: Any = self._bind(name, [consts[i] for i in self.uses(name)])
        if hasattr(bound, "in_dynamic_struct"):
            # Under `jax.shard_map` an array may have a sharding where the example had
            # none, which Equinox takes for another argument.
            leaves, treedef = bound.in_dynamic_struct
            arrays = jtu.tree_leaves(eqx.filter(args, eqx.is_array))
            leaves = [_with_sharding(x, a) for x, a in zip(leaves, arrays)]
            object.__setattr__(bound, "in_dynamic_struct", (leaves, treedef))
        return bound(*args)

    def vjp(
        self,
        name: str,
        consts: Sequence[Any],
        differentiated: frozenset[int],
        args: tuple[Any, ...],
        diff_args: tuple[PyTree, ...],
        batch: Batch | None = None,
    ) -> tuple[Any, Pull]:
        """Calls `function(*args, *diff_args)`.

        Returns the output and a function that pulls a cotangent of its inexact arrays
        (`None` for zero) back to gradients of the `differentiated` constants that the
        function uses, by number, and of `diff_args`. With a `batch` the gradients of
        constants are summed over it; what is done if they are not batched.
        """
        out, residuals, with_residuals = self.linearise(
            name, consts, differentiated, args, diff_args, batch
        )
        return out, with_residuals(residuals)

    def linearise(
        self,
        name: str,
        consts: Sequence[Any],
        differentiated: frozenset[int],
        args: tuple[Any, ...],
        diff_args: tuple[PyTree, ...],
        batch: Batch | None = None,
    ) -> tuple[Any, list[Any], Callable[[list[Any]], Pull]]:
        """As `vjp`, but gives the pullback in two parts: the arrays that it needs
        besides the constants, and how to make it from them. The arrays may be carried
        through a loop, for all calls with arguments of the same structure, shapes and
        dtypes give the same second part. With a `batch` they are those of all of it.
        """
        indices = self.uses(name)
        which = [k for k, i in enumerate(indices) if i in differentiated]
        if batch is None or len(which) == 0:
            # Then there is nothing to be summed.
            batch = Batch((), tuple(consts))
        own = [batch.consts[i] for i in indices]
        dynamic, fixed = eqx.partition(diff_args, eqx.is_inexact_array)
        arrays, static = eqx.partition((args, fixed), eqx.is_array)
        static_out = []

        def fn(all_own, dynamic__arrays):
            dynamic, arrays = dynamic__arrays
            args, fixed = eqx.combine(arrays, static)
            out = self._bind(name, all_own)(*args, *eqx.combine(dynamic, fixed))
            # A constant among the outputs is no JAX array.
            out = jtu.tree_map(lambda x: jnp.asarray(x) if _is_constant(x) else x, out)
            out, aux = eqx.partition(out, eqx.is_inexact_array)
            aux, static_aux = eqx.partition(aux, eqx.is_array)
            static_out.append(static_aux)
            return out, aux

        arrays = batch.whole(arrays)
        batched_fn = batch.vmap(fn, indices)

        def diff_fn(diff_consts, dynamic):
            all_own = list(own)
            for k, const in zip(which, diff_consts):
                all_own[k] = const
            return batched_fn(all_own, (dynamic, arrays))

        out, pull, aux = jax.vjp(
            diff_fn, [own[k] for k in which], batch.whole(dynamic), has_aux=True
        )
        out, aux = batch.own((out, aux))
        struct = jax.eval_shape(lambda: out)
        leaves, treedef = jtu.tree_flatten(pull)
        const_ids = {id(c) for c in batch.consts}
        is_const = [id(leaf) in const_ids for leaf in leaves]
        residuals = [x for x, skip in zip(leaves, is_const) if not skip]

        def with_residuals(residuals: list[Any]) -> Pull:
            fresh = iter(residuals)
            pull = jtu.tree_unflatten(
                treedef,
                [x if keep else next(fresh) for x, keep in zip(leaves, is_const)],
            )

            def pullback(grad):
                grad_consts, grad_args = pull(batch.whole(materialise(grad, struct)))
                grad_consts = {
                    indices[k]: batch.own_const(indices[k], g)
                    for k, g in zip(which, grad_consts)
                }
                return grad_consts, batch.own(grad_args)

            return pullback

        return eqx.combine(out, aux, static_out[-1]), residuals, with_residuals


_PRODUCTS = {"dot_general", "conv_general_dilated"}
_COSTLY = {
    *("cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "sin"),
    *("tan", "tanh"),
}


# (Of a function that closes over nothing the jaxpr is not known.)
_NO_EQUATIONS = jax.make_jaxpr(lambda: None)().jaxpr


def _jaxpr(function: tuple[PyTree, Any, tuple[int, ...]]) -> Any:
    static, _, _ = function
    return getattr(static, "jaxpr", _NO_EQUATIONS)


class Hoister:
    """Collects functions, and traces each of them once."""

    def __init__(self):
        self._numbers: dict[int, int] = {}  # id of a constant -> its number
        self._consts: list[Any] = []
        self._functions = {}

    def add(self, name: str, fn: Callable, *example: Any) -> PyTree:
        """Adds a function, to be called with arguments like `example`. Returns the
        structure of its output."""
        converted = eqx.filter_closure_convert(fn, *example)
        dynamic, static = eqx.partition(converted, eqx.is_array)
        leaves, treedef = jtu.tree_flatten(dynamic)
        for leaf in leaves:
            if id(leaf) not in self._numbers:
                self._numbers[id(leaf)] = len(self._consts)
                self._consts.append(leaf)
        indices = tuple(self._numbers[id(leaf)] for leaf in leaves)
        self._functions[name] = (static, treedef, indices)
        return eqx.filter_eval_shape(converted, *example)

    @property
    def num_consts(self) -> int:
        return len(self._consts)

    @property
    def bytes_of_consts(self) -> int:
        """Of those that can be differentiated."""
        consts = filter(eqx.is_inexact_array, self._consts)
        return sum(x.size * x.dtype.itemsize for x in consts)

    def bytes_of_kept(self, name: str) -> int:
        """Of what the pullback of a function keeps, where XLA computes most others once
        more: the results of products of matrices, or of convolutions; or of costly
        functions, if that is more, as these may be of such results."""

        def of(names):
            return sum(
                repeats * x.aval.size * x.aval.dtype.itemsize
                for eqn, repeats in equations(_jaxpr(self._functions[name]))
                if eqn.primitive.name in names
                for x in eqn.outvars
            )

        return max(of(_PRODUCTS), of(_COSTLY))

    def has_effects(self, name: str) -> bool:
        return len(_jaxpr(self._functions[name]).effects) > 0

    def finish(self) -> tuple[Hoisted, tuple[Any, ...]]:
        return Hoisted(dict(self._functions)), tuple(self._consts)


def _with_sharding(struct: Any, x: Any) -> Any:
    sharding = getattr(jax.eval_shape(lambda: x), "sharding", None)
    if sharding == struct.sharding:
        return struct
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _is_constant(x: Any) -> bool:
    # NumPy's arrays are among them: to Equinox one in bfloat16 is no inexact array.
    return eqx.is_array_like(x) and not isinstance(x, jax.Array)


def materialise(grad: PyTree, like: PyTree) -> PyTree:
    """Zeros in place of the `None`s that stand for them."""
    return jtu.tree_map(
        lambda x, g: jnp.zeros(x.shape, x.dtype) if g is None else g,
        like,
        _expand_none(grad, like),
    )


def _expand_none(grad: PyTree, like: PyTree) -> PyTree:
    # A `None` may stand for a whole subtree.
    return jtu.tree_map(
        lambda g, sub: jtu.tree_map(lambda _: None, sub) if g is None else g,
        grad,
        like,
        is_leaf=lambda x: x is None,
    )
