"""The record of steps: when each accepted step was made, and how.

It is what is needed, besides the state at its end or its start, to undo a step or to
make it again.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .._method.base import AbstractReversibleSolver


# By how many floating-point numbers the start of a step may differ from the end of the
# step before. At a jump diffrax's controllers move it by one or two.
_MAX_BUMPS = 4
# A byte of flags holds that number, whether there was a jump, whether the state at the
# start of the step is wanted, and whether that is as the step cannot be undone.
_BUMPS = 0x07
_NEEDED = 0x20
_WANTED = 0x40
_JUMP = 0x80

# How many steps are recorded before they are copied into the long record, of which they
# are a row. On CPUs XLA runs a loop with little overhead only if none of its arrays has
# more than 512 bytes, which is that many times; and longer arrays are touched only
# outside the inner loop.
BLOCK = 64


class Steps(NamedTuple):
    """Of accepted steps, in rows of `BLOCK`. In the host's loop the arrays are
    buffers."""

    # `tnext`.
    times: Any
    flags: Any
    # What the solver wants recorded: a list of the leaves of `solver.recorded`.
    recorded: list[Any]


class Window(NamedTuple):
    """Those steps that can be read from a record."""

    steps: Steps
    # The number of the first, and the end of the step before it.
    first: Array
    t_first: Array
    # Besides those that are wanted anyway, the starts of steps whose numbers are
    # multiples of this are wanted.
    every: Array


class Block(NamedTuple):
    """Some steps that were read at once. All arrays have a leading axis."""

    # The end of the step before, and the start and the end of this one.
    t_prev: Array
    t0: Array
    t1: Array
    # `False` if it is known in advance that there are no jumps.
    made_jump: Any
    is_wanted: Array
    is_needed: Array
    recorded: list[Array]

    def times(self, k: Array):
        """`t_prev`, `t0`, `t1` and `made_jump` of one of them."""
        made_jump = False if self.made_jump is False else self.made_jump[k]
        return self.t_prev[k], self.t0[k], self.t1[k], made_jump


class Format:
    """How steps are written to the record, and read from it."""

    def __init__(
        self,
        solver: AbstractReversibleSolver,
        made_jump: Any,
        length: int,
        is_window: bool,
    ):
        self._solver = solver
        # `False` if that is known in advance of every step; otherwise an example.
        self.made_jump = made_jump
        self._has_jumps = made_jump is not False
        # Whether there may be more steps than are recorded, and then only the last are.
        self.is_window = is_window
        self._num_rows = -(-length // BLOCK)

    @property
    def length(self) -> int:
        return self._num_rows * BLOCK

    def _recorded_leaves(self, solver_state: PyTree) -> list[Array]:
        return [
            jnp.asarray(x) for x in jtu.tree_leaves(self._solver.recorded(solver_state))
        ]

    def _empty(self, init_state, *shape: int) -> Steps:
        # An element of a batch may read here though it never made a step. So this holds
        # what a step of length zero would have put.
        return Steps(
            times=jnp.full(shape, init_state.tprev),
            flags=jnp.zeros(shape, jnp.uint8),
            recorded=[
                jnp.broadcast_to(x, (*shape, *x.shape))
                for x in self._recorded_leaves(init_state.solver_state)
            ],
        )

    def empty_row(self, init_state) -> Steps:
        return self._empty(init_state, BLOCK)

    def empty(self, init_state) -> Steps:
        return self._empty(init_state, self._num_rows, BLOCK)

    def row(self, index: Array) -> Array:
        """That of a step."""
        row = index // BLOCK
        return row % self._num_rows if self.is_window else row

    def entry(
        self, state, t_last: Array, is_wanted: Any, is_needed: Any
    ) -> tuple[Steps, Array]:
        """What is recorded of the step that is made from `state`, the step before
        having ended at `t_last`; and whether its start can be had again from that."""
        t, bumps = t_last, jnp.array(0, jnp.uint8)
        if self._has_jumps:
            for k in range(1, _MAX_BUMPS + 1):
                t = eqxi.nextafter(t)
                bumps = jnp.where(state.tprev == t, jnp.uint8(k), bumps)
        is_consistent = (bumps > 0) | (state.tprev == t_last)
        flags = bumps | _bit(is_wanted, _WANTED) | _bit(is_needed, _NEEDED)
        if self._has_jumps:
            flags = flags | _bit(state.made_jump, _JUMP)
        recorded = self._recorded_leaves(state.solver_state)
        return Steps(state.tnext, flags, recorded), is_consistent

    def end(self, steps: Steps, index: Array) -> Array:
        """That of a step."""
        return self._read(steps.times, index)

    def _read(self, rows: Array, index: Array) -> Array:
        place = index % self.length if self.is_window else index
        return rows.reshape(-1, *rows.shape[2:])[place]

    def read(self, window: Window, numbers: Array) -> Block:
        """Steps with these numbers, none before `window.first`."""
        steps = window.steps
        before = self._read(steps.times, jnp.maximum(numbers - 1, 0))
        t_prev = jnp.where(numbers > window.first, before, window.t_first)
        t0, made_jump = t_prev, False
        flags = self._read(steps.flags, numbers)
        if self._has_jumps:
            t = t_prev
            for k in range(1, _MAX_BUMPS + 1):
                t = eqxi.nextafter(t)
                t0 = jnp.where((flags & jnp.uint8(_BUMPS)) == k, t, t0)
            made_jump = _has(flags, _JUMP)
        return Block(
            t_prev=t_prev,
            t0=t0,
            t1=self._read(steps.times, numbers),
            made_jump=made_jump,
            is_wanted=(numbers % window.every == 0) | _has(flags, _WANTED),
            is_needed=_has(flags, _NEEDED),
            recorded=[self._read(x, numbers) for x in steps.recorded],
        )

    def count_wanted(self, window: Window, start: Array, stop: Array) -> Array:
        """How many of the steps after `start` and before `stop` are wanted."""

        # (Row by row, or there would be an array as long as the record.)
        def add_row(carry):
            first, count = carry
            numbers = first + jnp.arange(BLOCK)
            flags = self._read(window.steps.flags, numbers)
            is_wanted = (numbers % window.every == 0) | _has(flags, _WANTED)
            is_between = (numbers > start) & (numbers < stop)
            new = jnp.sum(is_wanted & is_between).astype(count.dtype)
            return first + BLOCK, count + new

        _, count = lax.while_loop(
            lambda carry: eqxi.unvmap_any(carry[0] < stop),
            add_row,
            (start, jnp.zeros_like(start)),
        )
        return count

    def read_recorded(
        self,
        block: Block,
        solver_state: PyTree,
        k: Array,
        start: PyTree,
        is_whole: Array,
    ) -> PyTree:
        """`solver_state` with its recorded part as it was at the start of a step. If
        nothing is rebuilt (`is_whole`) then that is as it is at the `start` that has
        been made again: which may be another, as the solution amplifies rounding."""
        if len(block.recorded) == 0:
            return solver_state
        where = lambda s: jtu.tree_leaves(self._solver.recorded(s))
        own = map(jnp.asarray, where(start))
        recorded = [
            jnp.where(is_whole, x, y[k])
            for x, y in zip(own, block.recorded, strict=True)
        ]
        return eqx.tree_at(where, solver_state, recorded)


def _bit(pred: Any, bit: int) -> Array:
    return jnp.where(pred, jnp.uint8(bit), jnp.uint8(0))


def _has(flags: Array, bit: int) -> Array:
    return (flags & jnp.uint8(bit)) != 0
