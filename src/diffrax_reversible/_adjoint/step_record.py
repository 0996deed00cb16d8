"""The record of steps, so that they can be undone: where they start and end, what the
solver asks to be recorded, and which of them cannot be undone.

Steps are undone, or recomputed, by *segments*. A segment that holds a step which cannot
be undone, or not without a loss of digits, is marked: it is recomputed.
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .._method.base import AbstractReversibleSolver
from .._method.coupling import AbstractCouplingSolver
from .._method.tree import same_struct, statics, stop_gradient, tree_where
from .index import put, rem, take, take_all
from .vmap import together


class Starts(NamedTuple):
    """Of steps: what is needed to differentiate them. Those of a segment have a leading
    axis."""

    # The end of the step before; and the start and the end of this one.
    t_prev: Any
    t0: Any
    t1: Any
    # `None` if it is known in advance that there are no jumps.
    made_jump: Any
    # The arrays of `y`, and of what is stored of the solver state: see
    # `AbstractPullback.stored`.
    y: PyTree
    solver_state: PyTree
    # Of Brownian motions, if steps are not undone: see `Noise`.
    increments: list[list[PyTree]]


class StepRecord(NamedTuple):
    """Of the steps of a segment, along the last axis of `t1` and others; and of many
    segments, along a leading axis."""

    # The number of the first step, and the end of the step before it.
    first: Any
    t_first: Any
    # The ends of the steps, as they are or as `Uniform`; and if there may be jumps,
    # their starts, and whether each follows one.
    t1: Any
    t0: Any
    made_jump: Any
    # What the solver wants recorded: the leaves of `solver.recorded`.
    recorded: list[Any]
    # Whether the segment is to be recomputed.
    is_marked: Any


class Uniform(NamedTuple):
    """The ends of steps that are all of one length, but for rounding: in a byte each.
    There is nothing but sums and a product with a power of two in this, so that what
    has been found to be right once is always so."""

    # Of a step, in the mean.
    length: Any
    # By how many units each step ends later than if all were of that length.
    excess: Any

    @classmethod
    def empty(cls, t_first: Array, num_steps: int) -> "Uniform":
        excess = jnp.zeros((*t_first.shape, num_steps), jnp.int8)
        return cls(jnp.zeros_like(t_first), excess)

    @classmethod
    def of(cls, t_first: Array, t1: Array, num: Array) -> "Uniform":
        """Of the first `num` of these steps. (Those after them are anything.)"""
        out = cls.empty(t_first, len(t1))
        num = jnp.maximum(num, 1)
        t_last = take(t1, num - 1)
        out = out._replace(length=(t_last - t_first) / num.astype(t1.dtype))
        even = out.ends(t_first)
        excess = jnp.round((t1 - even) / out._unit(even))
        return out._replace(excess=jnp.clip(excess, -127, 127).astype(jnp.int8))

    def ends(self, t_first: Array) -> Array:
        numbers, power = np.arange(1, len(self.excess) + 1), self.length
        multiples = jnp.zeros(self.excess.shape, power.dtype)
        while np.any(numbers > 0):
            multiples = multiples + jnp.where(numbers % 2 == 1, power, 0)
            numbers, power = numbers // 2, power + power
        even = t_first + multiples
        return even + self._unit(even) * self.excess.astype(even.dtype)

    def differs(self, t_first: Array, t1: Array) -> Array:
        return self.ends(t_first) != t1

    def _unit(self, even: Array) -> Array:
        # (The time may be so much smaller as to be spaced half as far.)
        return jnp.maximum(_spacing(even) / 2, _spacing(self.length))


def _spacing(x: Array) -> Array:
    return eqxi.nextafter(jnp.abs(x)) - jnp.abs(x)


class Marks(NamedTuple):
    """What is carried from step to step, to know which segments can be undone."""

    # Which elements of `y` the last accepted step has left at rest; and whether it has
    # changed any that was.
    rests: list[Array]
    has_left: Array
    # Whether this segment is to be recomputed, as far as is known; the number of its
    # first step; and how many have been recorded.
    is_marked: Array
    first: Array
    num_recorded: Array
    # How many states have been wanted so far.
    num_wanted: Array


# A step moves an element that is at rest by no more than its size times the spacing of
# numbers to this power: more than what undoing a segment loses where little moves.
_AT_REST = 0.7
# (Of numbers that are spaced more widely many a solution is moved as little by steps.)
_IS_FINE = 1e-12


class Recorder:
    """Records the steps of a reversible solver.

    **Arguments:**

    - `has_jumps`: Whether a step may follow a jump.
    - `is_uniform`: Whether all steps should be of one length.
    - `every`: The state at every step whose number is a multiple of this is wanted, or
        `None`.
    - `num_rows`: Of how many segments there is room for the steps.
    """

    def __init__(
        self,
        solver: AbstractReversibleSolver,
        has_jumps: bool,
        is_uniform: bool,
        every: int | None,
        num_rows: int,
    ):
        self._solver = solver
        self._has_jumps = has_jumps
        self.is_uniform = is_uniform
        self._every = every
        self.num_rows = num_rows

    def of_size(self, num_rows: int) -> "Recorder":
        rest = (self._solver, self._has_jumps, self.is_uniform, self._every)
        return Recorder(*rest, num_rows)

    def _leaves(self, solver_state: PyTree) -> list[Any]:
        return jtu.tree_leaves(self._solver.recorded(solver_state))

    #
    # On the way forward
    #

    def empty(self, init_state, length: int) -> StepRecord:
        # (An element of a batch may read here though it never made a step.)
        shape = (self.num_rows, length)
        first = jnp.full(self.num_rows, init_state.tprev)
        times = ends = jnp.full(shape, init_state.tprev)
        if self.is_uniform:
            ends = Uniform.empty(first, length)
        return StepRecord(
            first=jnp.zeros(self.num_rows, jnp.int32),
            t_first=first,
            t1=ends,
            t0=times if self._has_jumps else None,
            made_jump=jnp.zeros(shape, bool) if self._has_jumps else None,
            recorded=[
                jnp.broadcast_to(x, (*shape, *jnp.shape(x)))
                for x in self._leaves(init_state.solver_state)
            ],
            is_marked=jnp.zeros(self.num_rows, bool),
        )

    def no_marks(self, init_state) -> Marks:
        elements = _elements(self._solver, init_state)
        rests = [jnp.zeros(y.shape, bool) for (y, *_), _ in elements]
        return Marks(rests, *(jnp.array(False),) * 2, *(jnp.array(0),) * 3)

    def mark(self, marks: Marks, state, new_state, t_last: Array) -> Marks:
        """After an attempted step. The step before it ended at `t_last`."""
        index = state.num_accepted_steps
        accepted = new_state.num_accepted_steps > index
        needs, wants = asks(
            self._solver,
            state.solver_state,
            new_state.solver_state,
            state.made_jump if self._has_jumps else False,
        )
        rests, leaves = at_rest(self._solver, marks.rests, state, new_state)
        # (What is evaluated at the end of a step may belong to the next one. And all of
        # a batch that makes the same steps records them once.)
        needs = needs | together(leaves | marks.has_left, index)
        if self._every is not None:
            wants = wants | (rem(index, self._every) == 0)
        # (The start of the solve is there anyway.)
        is_wanted = accepted & (needs | wants) & (index > 0)
        is_marked = is_wanted | (accepted & needs)
        if not self._has_jumps:
            # (Then a step is taken to start where the step before ended.)
            is_marked = is_marked | (accepted & (state.tprev != t_last))
        return marks._replace(
            rests=tree_where(accepted, rests, marks.rests),
            has_left=jnp.where(accepted, leaves, marks.has_left),
            is_marked=marks.is_marked | is_marked,
            num_wanted=marks.num_wanted + jnp.where(is_wanted, 1, 0),
        )

    def row(
        self,
        starts: Starts,
        solver_state: PyTree,
        is_marked: Array,
        first: Array,
        stop: Array,
    ) -> StepRecord:
        """Of a segment, from its steps. (Those after its last are anything.)"""
        static = statics(solver_state)
        t_first, t1 = starts.t_prev[0], starts.t1
        if self.is_uniform:
            t1 = Uniform.of(t_first, t1, stop - first)
            is_step = jnp.arange(len(starts.t1)) < stop - first
            differs = t1.differs(t_first, starts.t1)
            is_marked = is_marked | jnp.any(is_step & differs)
        return StepRecord(
            first=first.astype(jnp.int32),
            t_first=t_first,
            t1=t1,
            t0=starts.t0 if self._has_jumps else None,
            made_jump=starts.made_jump,
            recorded=self._leaves(eqx.combine(starts.solver_state, static)),
            is_marked=is_marked,
        )

    def write(
        self, steps: StepRecord, row: StepRecord, k: Array, pred: Any
    ) -> StepRecord:
        """The `k`th segment, if `pred`."""
        return put(steps, rem(k, self.num_rows), row, pred)

    #
    # On the backward pass
    #

    def is_marked(self, steps: StepRecord, k: Array, marks: Marks) -> Array:
        """Whether the `k`th segment is to be recomputed; as it is too if there is no
        record of it any more."""
        is_marked = take(steps.is_marked, self._row(k))
        return self.is_lost(k, marks) | is_marked

    def is_lost(self, k: Array, marks: Marks) -> Array:
        return marks.num_recorded - k > self.num_rows

    def first(self, steps: StepRecord, k: Array, marks: Marks) -> Array:
        """The number of the first step of the `k`th segment, if that is not lost."""
        of_row = take(steps.first, self._row(k)).astype(marks.first.dtype)
        return jnp.where(k == marks.num_recorded, marks.first, of_row)

    def _row(self, k: Array) -> Array:
        return rem(jnp.maximum(k, 0), self.num_rows)

    def load(
        self, steps: StepRecord, starts: Starts, order: Array, k: Array, pred: Array
    ) -> Starts:
        """If `pred`, the steps of the `k`th segment, without their states. `order` are
        the numbers of the steps within that segment, in the places of `starts`."""
        row: StepRecord = take(steps, self._row(k))
        t1 = row.t1.ends(row.t_first) if self.is_uniform else row.t1
        t_prev = jnp.concatenate([row.t_first[None], t1[:-1]])
        t0 = row.t0 if self._has_jumps else t_prev
        new = (t_prev, t0, t1, row.made_jump, row.recorded)
        # (Not of the states, which may be large.)
        new = take_all(new, order)
        old = (*starts[:4], self._leaves(starts.solver_state))
        *times, recorded = jtu.tree_map(lambda a, b: jnp.where(pred, a, b), new, old)
        solver_state = starts.solver_state
        if len(recorded) > 0:
            solver_state = eqx.tree_at(self._leaves, solver_state, recorded)
        t_prev, t0, t1, made_jump = times
        times = dict(t_prev=t_prev, t0=t0, t1=t1, made_jump=made_jump)
        return starts._replace(**times, solver_state=solver_state)

    def with_recorded(self, solver_state: PyTree, start: PyTree) -> PyTree:
        """`solver_state`, at the end of a step, with its recorded part as it is at the
        `start`."""
        recorded = self._leaves(start)
        if len(recorded) == 0:
            return solver_state
        return eqx.tree_at(self._leaves, solver_state, recorded)


def asks(
    solver: AbstractReversibleSolver, solver_state, new_solver_state, made_jump: Any
) -> tuple[Any, Any]:
    """Whether the solver needs the start of a step to be stored, and whether it wants
    that. Each is `False` if that is known in advance of every step."""
    states = (solver_state, new_solver_state, made_jump)
    return solver.needs_checkpoint(*states), solver.wants_checkpoint(*states)


def at_rest(
    solver: AbstractReversibleSolver, rests: list[Array], state, new_state
) -> tuple[list[Array], Array]:
    """Which elements of `y` are at rest, as a step leaves them exactly as they were or
    hardly moves them; and whether it changes anything of those that are or were. The
    states have a `y` and a `solver_state`.

    Such a step cannot be undone: a vector field may well have a kink where an element
    rests, such as at zero, and what is rebuilt is next to it. While nothing changes all
    is well, as couplings undo a rest exactly."""
    new_rests, leaves = [], jnp.array(False)
    before, after = (_elements(solver, s) for s in (state, new_state))
    for rested, (olds, old_others), (news, new_others) in zip(
        rests, before, after, strict=True
    ):
        pairs = list(zip(olds + old_others, news + new_others, strict=True))
        changes = ft.reduce(jnp.logical_or, [a != b for a, b in pairs])
        size = ft.reduce(jnp.maximum, [jnp.abs(a) for a in olds])
        moves = [jnp.abs(b - a) for a, b in zip(olds, news, strict=True)]
        eps = float(jnp.finfo(size.dtype).eps)
        stays = ft.reduce(jnp.maximum, moves) <= eps**_AT_REST * size
        if eps > _IS_FINE:
            rests_now = ~changes | (rested & stays)
        else:
            rests_now = stays
            rested = rested | stays
        leaves = leaves | jnp.any(rested & changes)
        new_rests.append(rests_now)
    return new_rests, leaves


def _elements(
    solver: AbstractReversibleSolver, state
) -> list[tuple[list[Array], list[Array]]]:
    """Of each array in `y`: its elements, and what the registers like it have in their
    places; and apart from these the registers that are differences, at which nothing is
    evaluated. All of them are real."""
    points, others = [state.y], []
    if isinstance(solver, AbstractCouplingSolver):
        registers = solver.split(state.y, state.solver_state).registers
        differences = {coupling.also for coupling in solver.couplings()}
        # (Another may be the same, at the start.)
        first = next((i for i, x in enumerate(registers) if x is state.y), None)
        for i, register in enumerate(registers):
            if i != first and same_struct(register, state.y):
                (others if i in differences else points).append(register)
    points, others = [map(_reals, x) for x in (points, others)]
    points = [list(x) for x in zip(*points, strict=True)]
    others = [list(x) for x in zip(*others, strict=True)] or [[] for _ in points]
    return list(zip(points, others, strict=True))


def _reals(tree: PyTree) -> list[Array]:
    leaves = jtu.tree_leaves(eqx.filter(stop_gradient(tree), eqx.is_inexact_array))
    parts = [(x.real, x.imag) if jnp.iscomplexobj(x) else (x,) for x in leaves]
    return [x for of_leaf in parts for x in of_leaf]
