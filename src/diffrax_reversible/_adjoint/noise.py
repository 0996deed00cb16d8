"""The Brownian motion of a solve, of which each step asks for an increment: which costs
more than all else in many a step.

diffrax makes an increment of two values, and each is found by going down a tree. But
where a step starts the one before it has ended; and a step that is differentiated has
been made before. So a loop over steps carries along the value at their ends, and the
increments of a segment are kept with its states.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import WatchedBrownianTree
from .._jax_compat import eqxi


class OtherIncrementsError(Exception):
    """Others are asked for than those that are given."""


class Value(NamedTuple):
    """Of a Brownian motion, somewhere."""

    at: Array
    value: PyTree


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
            self._watches.append(_Watch())
            return WatchedBrownianTree(x, self._watches[-1])

        self.terms = jtu.tree_map(watched, terms, is_leaf=is_path)
        self._paths = [x for x in jtu.tree_leaves(terms, is_leaf=is_path) if is_path(x)]
        # Of one step: the increments, and the last values.
        self._structs: tuple[list, list] = ([], [])

    def learn(self, make_step: Callable) -> None:
        """What a step asks for. Nothing is used again if it does so within a
        transformation."""
        if len(self._watches) == 0:
            return
        leaves = []

        def found():
            _, *out = self._watched(make_step, None)
            leaves.extend(jtu.tree_leaves(out))
            return out

        try:
            jaxpr, structs = jax.make_jaxpr(found, return_shape=True)()
        except jax.errors.UnexpectedTracerError:
            return
        # (What comes from within a transformation is taken for a constant.)
        if not {id(x) for x in leaves}.isdisjoint(map(id, jaxpr.consts)):
            return
        self._structs = structs

    @property
    def path_arrays(self) -> list[Array]:
        """All that increments depend on, but for their times."""
        return [x for x in jtu.tree_leaves(self._paths) if isinstance(x, jax.Array)]

    def no_increments(self) -> list[PyTree]:
        """Zeros in place of those of a step."""
        return _zeros(self._structs[0])

    def no_values(self) -> list[Value]:
        """Those before the first step."""
        values = _zeros(self._structs[1])
        return [x._replace(at=jnp.full_like(x.at, jnp.nan)) for x in values]

    def make(
        self, make_step: Callable, values: list[Value]
    ) -> tuple[Any, list[PyTree], list[Value]]:
        """A step, from the values where it should start. Returns also the increments
        that it asked for, and the values where it ends."""
        increments, ends = self._structs
        if len(increments) == 0:
            return make_step(), [], []
        out, *found = self._watched(make_step, values)
        # (Of the same dtypes, not weak ones.)
        found = jtu.tree_map(
            lambda x, like: lax.convert_element_type(x, like.dtype),
            tuple(found),
            (increments, ends),
        )
        return out, *found

    def make_again(self, make_step: Callable, increments: list[PyTree]) -> Any:
        """A step, with the increments that it asked for."""
        given = iter(increments)
        for watch in self._watches:
            watch.given = given
        try:
            out = make_step()
        finally:
            for watch in self._watches:
                watch.given = None
        if next(given, None) is not None:
            raise OtherIncrementsError
        return out

    def _watched(self, make_step: Callable, values: list[Value] | None):
        found = []
        for i, watch in enumerate(self._watches):
            watch.found, watch.last = found, None
            watch.known = None if values is None else values[i]
        try:
            out = make_step()
            return out, found, [watch.last for watch in self._watches]
        finally:
            for watch in self._watches:
                watch.found = watch.known = watch.last = None


class _Watch:
    """Of a path, while a step is traced."""

    # The increments that are found; those that are there, in place of these.
    found: list | None = None
    given: Iterator | None = None
    # A value that may be that at the start of an increment; and the last one.
    known: Value | None = None
    last: Value | None = None

    _is_start = False

    def increment(self, find: Callable) -> PyTree:
        if self.given is not None:
            out = next(self.given, None)
            if out is None:
                raise OtherIncrementsError
            return out
        self._is_start = True
        out = find()
        if self.found is not None:
            self.found.append(out)
        return out

    def value(self, at: Array, find: Callable) -> PyTree:
        known, is_start = self.known, self._is_start
        self._is_start = False
        if known is None or not is_start:
            out = find(at)
        else:
            is_other = eqxi.unvmap_any(at != known.at)
            out = lax.cond(is_other, lambda: find(at), lambda: known.value)
        self.last = Value(at, out)
        return out


def _zeros(structs: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), structs)
