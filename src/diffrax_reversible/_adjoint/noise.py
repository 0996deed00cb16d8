"""The Brownian motion of a solve, of which each step asks for an increment: which costs
more than all else in many a step.

diffrax makes an increment of two values, and each is found by going down a tree. But
where a step starts the one before it has ended; and a step that is differentiated has
been made before. So a loop over steps carries along the value at their ends, and the
increments of a segment are kept with its states.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import WatchedBrownianTree
from .._jax_compat import eqxi
from .._method.tree import same_struct


class Value(NamedTuple):
    """Of a Brownian motion, somewhere."""

    at: Array
    value: PyTree


class Asked(NamedTuple):
    """What a step asks for."""

    # Of each path: the increments, in their order.
    increments: list[list[PyTree]]
    # Of each path: the last value, or `None` if there is none.
    ends: list[Value | None]


class Noise:
    """What the steps of a solve ask of its Brownian motions.

    **Arguments:**

    - `terms`: Of the solve, which is to be made with those in `Noise.terms`.
    """

    def __init__(self, terms: PyTree):
        is_path = lambda x: type(x) is diffrax.VirtualBrownianTree
        self._watches: list[_Watch] = []

        def watched(x):
            if not is_path(x):
                return x
            self._watches.append(_Watch(jtu.tree_leaves(x)))
            return WatchedBrownianTree.of(x, self._watches[-1])

        self.terms = jtu.tree_map(watched, terms, is_leaf=is_path)
        # Of one step, as structures.
        self._asked = Asked([], [])

    def learn(self, make_step: Callable) -> None:
        """What a step asks for. Nothing is used again if it does so within a
        transformation."""
        # (Or they would outlive the trace.)
        ids = set()

        def found():
            _, asked = self._watched(make_step, None)
            ids.update(map(id, jtu.tree_leaves(asked)))
            return asked

        if len(self._watches) == 0:
            return
        try:
            jaxpr, asked = jax.make_jaxpr(found, return_shape=True)()
        except jax.errors.UnexpectedTracerError:
            return
        # (What comes from within a transformation is taken for a constant.)
        if len(ids) > 0 and ids.isdisjoint(map(id, jaxpr.consts)):
            self._asked = asked

    @property
    def is_asked(self) -> bool:
        return len(self._asked.increments) > 0

    @property
    def path_arrays(self) -> list[Array]:
        """All that increments depend on, but for their times."""
        leaves = [x for watch in self._watches for x in watch.leaves]
        return [x for x in leaves if isinstance(x, jax.Array)]

    def no_increments(self) -> list[list[PyTree]]:
        """Zeros in place of those of a step."""
        return _zeros(self._asked.increments)

    def no_values(self) -> list[Value | None]:
        """Those before the first step."""
        values = _zeros(self._asked.ends)
        nowhere = lambda x: x._replace(at=jnp.full_like(x.at, jnp.nan))
        return [None if x is None else nowhere(x) for x in values]

    def make(
        self, make_step: Callable, values: list[Value | None]
    ) -> tuple[Any, list[list[PyTree]], list[Value | None]]:
        """A step, from the values where it should start. Returns also the increments
        that it asked for, and the values where it ends."""
        if not self.is_asked:
            return make_step(), [], []
        out, asked = self._watched(make_step, values)
        if not same_struct(asked, self._asked):
            raise ValueError(
                "The solver's `step` must ask for the same increments of a "
                "`diffrax.VirtualBrownianTree` whenever it is traced."
            )
        # (Of the same dtypes, not weak ones.)
        asked = jtu.tree_map(
            lambda x, like: lax.convert_element_type(x, like.dtype), asked, self._asked
        )
        return out, *asked

    def make_again(self, make_step: Callable, increments: list[list[PyTree]]) -> Any:
        """A step, with the increments that it asked for."""
        for watch, given in zip(self._watches, increments, strict=True):
            watch.given = list(given)
            watch.is_short = False
        try:
            out = make_step()
            are_others = any(x.is_short or x.given for x in self._watches)
        finally:
            for watch in self._watches:
                watch.given = None
        return make_step() if are_others else out

    def _watched(self, make_step: Callable, values: list[Value | None] | None):
        counts = [len(x) for x in self._asked.increments]
        found: list[list[PyTree]] = [[] for _ in self._watches]
        for i, watch in enumerate(self._watches):
            watch.found, watch.last = found[i], None
            # (What comes after a step, such as an event, may ask for more.)
            watch.count = None if values is None else counts[i]
            watch.known = None if values is None else values[i]
        try:
            out = make_step()
            return out, Asked(found, [watch.last for watch in self._watches])
        finally:
            for watch in self._watches:
                watch.found = watch.known = watch.last = None


class _Watch:
    """Of a path, while a step is traced.

    It is part of a PyTree's structure, and so all are equal: as paths may be combined,
    leaf by leaf. What comes of that has other leaves."""

    def __init__(self, leaves: list[Any]):
        self.leaves = leaves
        # The increments that are found, how many at most; those that are there, in
        # place of these.
        self.found: list | None = None
        self.count: int | None = None
        self.given: list | None = None
        self.is_short = False
        # A value that may be that at the start of an increment; and the last one.
        self.known: Value | None = None
        self.last: Value | None = None
        # Of the increment at hand: how many values have been found; or `None`.
        self._num_values: int | None = None

    def __eq__(self, other):
        return isinstance(other, _Watch)

    def __hash__(self):
        return hash(_Watch)

    def increment(self, path: PyTree, find: Callable) -> PyTree:
        own = jtu.tree_leaves(path)
        is_own = len(own) == len(self.leaves) and all(map(_is, own, self.leaves))
        if is_own and self.given is not None:
            self.is_short = self.is_short or len(self.given) == 0
            return find() if self.is_short else self.given.pop(0)
        if not is_own or self.found is None or len(self.found) == self.count:
            return find()
        self._num_values = 0
        try:
            out = find()
        finally:
            self._num_values = None
        self.found.append(out)
        return out

    def value(self, at: Array, find: Callable) -> PyTree:
        if self._num_values is None:
            return find(at)
        known, self._num_values = self.known, self._num_values + 1
        if known is None or self._num_values > 1:
            out = find(at)
        else:
            is_other = eqxi.unvmap_any(at != known.at)
            out = lax.cond(is_other, lambda: find(at), lambda: known.value)
        self.last = Value(at, out)
        return out


def _is(a: Any, b: Any) -> bool:
    return a is b


def _zeros(structs: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structs)
