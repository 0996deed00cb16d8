"""What is kept of each accepted step on the way forward, for the way back."""

from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._jax_compat import eqxi
from .._method.base import AbstractReversibleSolver
from .._method.coupling import AbstractCouplingSolver
from .._method.tree import stop_gradient
from .vmap import where_active


# By how many floating-point numbers the start of a step may differ from the end of the
# step before. At a jump diffrax's controllers move it by one or two.
_MAX_BUMPS = 4
_JUMP_BIT = 0x80
# Messages about too few slots name a power of two up to this one.
_MAX_LOG2_SLOTS = 24
# With `max_steps=None`: how many steps are recorded at a time, two rows at least.
WINDOW = 2**16


# How many steps are recorded before they are copied into the long record, of which they
# are a row. On CPUs XLA runs a loop with little overhead only if none of its arrays has
# more than 512 bytes, which is that many times; and longer arrays are touched only
# outside the inner loop.
_BLOCK = 64


class Steps(NamedTuple):
    """Of accepted steps, in rows of `_BLOCK`. In the loop the arrays are buffers."""

    # `tnext`.
    times: Any
    # If there may be jumps: by how much the start of the step differs from the end of
    # the step before, and whether there was a jump.
    jumps: Any
    # What the solver wants recorded: a list of the leaves of `solver.recorded`.
    recorded: list[Any]


class Slots(NamedTuple):
    """The starts of steps. The arrays are buffers within the loop."""

    # The number of the step, and whether it can be undone too.
    index: Any
    is_undone: Any
    # `(y, solver_state)`, without what is no array.
    states: PyTree


class Record(NamedTuple):
    # Of all accepted steps, or of the last `WINDOW`. Their number is in the host's
    # state.
    steps: Steps
    # `None` if the solver never asks for any.
    slots: Slots | None
    # How many slots were asked for.
    num_wanted: Any
    # The end of the last accepted step.
    t_last: Array
    # Whether the times of all steps can be had again from `steps`.
    is_consistent: Array


class _Block(NamedTuple):
    """What is carried from step to step besides the host's state."""

    # The row that the last step is in, whether that is full, and how many steps have
    # been copied into the long record.
    steps: Steps
    is_full: Array
    num_copied: Array
    t_last: Array
    is_consistent: Array
    # If there are slots: whether the last step asks for one, whether it can be undone,
    # its number, and the state at its start.
    wants: Any
    is_undone: Any
    index: Any
    state: PyTree


class Segment(NamedTuple):
    """The last of the steps that are still to be undone: so many as are undone between
    two looks at the record."""

    # One more than the number of the last, and the number of the first.
    end: Array
    first: Array
    # Of each, from the last to the first: the end of the step before, its own start,
    # `made_jump` at it, and a list of the leaves of `solver.recorded`.
    t_prev: Array
    t0: Array
    made_jump: Any
    recorded: list[Array]
    # The number of the step at whose start there is a state to be compared with, and
    # whether that is in this slot; otherwise it is the start of the solve.
    stored_at: Array
    is_slot: Array
    slot: Array
    # Whether it should be what the steps before were undone to.
    is_undone: Array

    def times(self, index: Array):
        """The end of the step before, the start of the step, and `made_jump` at it."""
        k = self.end - 1 - index
        made_jump = False if self.made_jump is False else self.made_jump[k]
        return self.t_prev[k], self.t0[k], made_jump

    def num_passed(self, num_steps: Array) -> Array:
        """How many slots have been passed with only `num_steps` left to be undone."""
        return jnp.where(self.is_slot & (num_steps <= self.stored_at), 1, 0)


class Recorder:
    def __init__(
        self,
        solver: AbstractReversibleSolver,
        made_jump: Any,
        asks: bool,
        max_steps: int | None,
        num_slots: int,
        checkpoint_every: int | None,
    ):
        self._solver = solver
        # `False` if that is known in advance of every step; otherwise an example.
        self.made_jump = made_jump
        self._has_jumps = made_jump is not False
        # Whether the solver ever asks for a slot, be there any or not.
        self._asks = asks
        # Whether the record may be too short, and has to be made again on the way back.
        self.is_window = max_steps is None
        self.length = WINDOW if max_steps is None else max(max_steps, 1)
        self._num_rows = -(-self.length // _BLOCK)
        # (No step asks for two.)
        self._num_slots = num_slots if max_steps is None else min(num_slots, max_steps)
        self._checkpoint_every = checkpoint_every

    @property
    def has_slots(self) -> bool:
        return self._asks and self._num_slots > 0

    def _place(self, index: Array) -> Array:
        return index % self.length if self.is_window else index

    def _recorded_leaves(self, solver_state: PyTree) -> list[Array]:
        return [
            jnp.asarray(x) for x in jtu.tree_leaves(self._solver.recorded(solver_state))
        ]

    #
    # On the way forward
    #

    def _empty_steps(self, init_state, *shape: int) -> Steps:
        # An element of a batch may read here though it never made a step. So this holds
        # what a step of length zero would have put.
        return Steps(
            times=jnp.full(shape, init_state.tprev),
            jumps=jnp.zeros(shape, jnp.uint8) if self._has_jumps else None,
            recorded=[
                jnp.broadcast_to(x, (*shape, *x.shape))
                for x in self._recorded_leaves(init_state.solver_state)
            ],
        )

    def _empty_slots(self, init_state) -> Slots:
        def make(x):
            return jnp.zeros((self._num_slots, *jnp.shape(x)), jnp.result_type(x))

        states = jtu.tree_map(make, _arrays(init_state))
        return Slots(make(jnp.int32(0)), make(False), states)

    def run(
        self,
        cond_fun,
        body_fun,
        init_state,
        *,
        max_steps: int | None,
        buffers,
        has_slots: bool = True,
        stop: Array | None = None,
    ):
        """The host's loop, at most until `stop` accepted steps have been made. Returns
        its final state, and the record."""
        has_slots = has_slots and self._asks

        def unfinished(state):
            out = cond_fun(state)
            if max_steps is not None:
                out = out & (state.num_steps < max_steps)
            if stop is not None:
                out = out & (state.num_accepted_steps < stop)
            return out

        # A batch leaves the inner loop together, so that none waits for another. An
        # element that is done must have no say in it: Equinox asks for the condition
        # after a step that it would make, and then takes no notice of that step. So a
        # loop that it ended would go on, by what is kept, and be ended again for ever.
        # Hence `is_done` below for such steps, and `unfinished` here for what is kept.
        def any_unfinished(pred, state):
            return eqxi.unvmap_any(pred & unfinished(state))

        def is_full(state, block):
            return any_unfinished(block.is_full, state)

        def inner_cond(carry):
            state, block = carry
            out = unfinished(state) & ~is_full(state, block)
            return out & ~any_unfinished(block.wants, state) if has_slots else out

        def inner_body(carry):
            state, block = carry
            is_done = ~unfinished(state)
            new_state = body_fun(state)
            block = self._append(block, state, new_state, is_done, has_slots)
            return new_state, block

        def inner_buffers(carry):
            state, block = carry
            return [*buffers(state), block.steps]

        def outer_body(carry):
            state, block, record = carry
            state, block = eqxi.while_loop(
                inner_cond,
                inner_body,
                (state, block),
                buffers=inner_buffers,
                kind="lax",
            )
            if has_slots:
                record = self._store(record, block)
                block = block._replace(wants=jnp.array(False))
            ends = is_full(state, block) | eqxi.unvmap_any(~unfinished(state))
            n = state.num_accepted_steps
            steps = lax.cond(
                ends,
                lambda: self._copy(record.steps, block, n),
                lambda: record.steps,
            )
            block = block._replace(
                num_copied=jnp.where(ends, n, block.num_copied),
                is_full=jnp.array(False),
            )
            return state, block, record._replace(steps=steps)

        def outer_buffers(carry):
            state, block, record = carry
            return [*buffers(state), block.steps, record.steps, record.slots]

        slots = self._empty_slots(init_state) if has_slots else None
        none = None if slots is None else jnp.array(False)
        block = _Block(
            steps=self._empty_steps(init_state, _BLOCK),
            is_full=jnp.array(False),
            num_copied=jnp.asarray(init_state.num_accepted_steps),
            t_last=init_state.tprev,
            is_consistent=jnp.array(True),
            wants=none,
            is_undone=none,
            index=None if slots is None else jnp.array(0),
            state=None if slots is None else _arrays(init_state),
        )
        record = Record(
            steps=self._empty_steps(init_state, self._num_rows, _BLOCK),
            slots=slots,
            num_wanted=jnp.array(0),
            # These two are taken from the last block.
            t_last=init_state.tprev,
            is_consistent=jnp.array(True),
        )
        state, block, record = eqxi.while_loop(
            lambda carry: unfinished(carry[0]),
            outer_body,
            (init_state, block, record),
            buffers=outer_buffers,
            kind="lax",
        )
        return state, record._replace(
            t_last=block.t_last, is_consistent=block.is_consistent
        )

    def _append(
        self, block: _Block, state, new_state, is_done: Array, has_slots: bool
    ) -> _Block:
        """Called after every attempted step. `is_done` if it is none, as it is made
        after the end of a solve for the sake of others in a batch."""
        index = state.num_accepted_steps
        accepted = new_state.num_accepted_steps > index

        # If the step was rejected then the next one is put into the same place. (If it
        # is none at all then that may be the place of a step that is still needed.)
        place = index % _BLOCK

        def put(buffer, x):
            return buffer.at[place].set(where_active(~is_done, x, buffer[place]))

        times = put(block.steps.times, state.tnext)
        recorded = [
            put(buffer, x)
            for buffer, x in zip(
                block.steps.recorded, self._recorded_leaves(state.solver_state)
            )
        ]

        t = block.t_last
        if self._has_jumps:
            bumps = jnp.array(0, jnp.uint8)
            for k in range(1, _MAX_BUMPS + 1):
                t = eqxi.nextafter(t)
                bumps = jnp.where(state.tprev == t, jnp.uint8(k), bumps)
            is_consistent = (bumps > 0) | (state.tprev == block.t_last)
            code = bumps | jnp.where(
                state.made_jump, jnp.uint8(_JUMP_BIT), jnp.uint8(0)
            )
            jumps = put(block.steps.jumps, code)
        else:
            is_consistent = state.tprev == t
            jumps = None

        block = block._replace(
            steps=Steps(times, jumps, recorded),
            is_full=accepted & (place == _BLOCK - 1) & ~is_done,
            t_last=jnp.where(accepted, state.tnext, block.t_last),
            is_consistent=block.is_consistent & (is_consistent | ~accepted),
        )
        if has_slots:
            states = (state.solver_state, new_state.solver_state, state.made_jump)
            needs = self._solver.needs_checkpoint(*states)
            wants = needs | self._solver.wants_checkpoint(*states)
            if self._checkpoint_every is not None:
                wants = wants | ((index > 0) & (index % self._checkpoint_every == 0))
            block = block._replace(
                wants=accepted & wants & ~is_done,
                is_undone=~jnp.asarray(needs),
                index=index,
                state=_arrays(state),
            )
        return block

    def _store(self, record: Record, block: _Block) -> Record:
        """Puts the start of the last step into a slot, if it asks for one."""
        slot, slots = record.num_wanted, record.slots
        num_wanted = slot + jnp.where(block.wants, 1, 0)
        if self._num_slots > 0:
            store = block.wants & (slot < self._num_slots)
            values = Slots(block.index, block.is_undone, block.state)

            def put(x, buffer):
                return eqxi.buffer_at_set(buffer, slot, x, pred=store)

            slots = lax.cond(
                eqxi.unvmap_any(store),
                # In the loop buffers are nodes, not leaves.
                lambda: jtu.tree_map(put, values, slots),
                lambda: slots,
            )
        return record._replace(slots=slots, num_wanted=num_wanted)

    def _copy(self, steps: Steps, block: _Block, num_steps: Array) -> Steps:
        """Copies the row that the last of `num_steps` steps is in."""
        # Only if there are new ones. (If the row was full then the place of a rejected
        # step is that of its first.)
        is_new: Any = num_steps > block.num_copied
        row = self._place(jnp.maximum(num_steps - 1, 0)) // _BLOCK

        def put(x, buffer):
            # (A buffer again within this loop, but not one to be written to.)
            while not eqx.is_array(x):
                x = x._array
            return eqxi.buffer_at_set(buffer, row, x, pred=is_new)

        is_leaf = lambda x: hasattr(x, "at")
        return jtu.tree_map(put, block.steps, steps, is_leaf=is_leaf)

    #
    # On the way back
    #

    def last_time(self, record: Record, num_steps: Array) -> Array:
        """The end of the last of `num_steps` steps."""
        return self._read(record.steps.times, jnp.maximum(num_steps - 1, 0))

    def _read(self, rows: Array, index: Array) -> Array:
        return rows.reshape(-1, *rows.shape[2:])[self._place(index)]

    def first_step(self, num_steps: Array) -> Array:
        """The first step that can be read, if the record was made of `num_steps`."""
        # In the place of the oldest row is the last, which may not be full. (And one
        # step is lost, as reading it looks at the end of the one before.) The same for
        # all elements of a batch, or those that have more would be read too far.
        return jnp.maximum(num_steps - self.length + _BLOCK, 0)

    def replace_steps(self, record: Record, of: Record) -> Record:
        """`record`, with the steps of another."""
        return record._replace(steps=of.steps)

    def read_segment(
        self, record: Record, init_state, num_steps: Array, num_slots: Array, first
    ) -> Segment:
        """The last of `num_steps` steps, at most back to the step number `first`, and
        not beyond a state that is stored, of which there are `num_slots` to come."""
        # An element of a batch that is done makes its first step again.
        end = jnp.maximum(num_steps, 1)
        numbers = jnp.maximum(end - 1 - jnp.arange(_BLOCK), 0)
        steps = record.steps
        before = self._read(steps.times, jnp.maximum(numbers - 1, 0))
        t_prev = jnp.where(numbers > 0, before, init_state.tprev)
        t0, made_jump = t_prev, False
        if self._has_jumps:
            code = self._read(steps.jumps, numbers)
            bumps = code & jnp.uint8(_JUMP_BIT - 1)
            t = t_prev
            for k in range(1, _MAX_BUMPS + 1):
                t = eqxi.nextafter(t)
                t0 = jnp.where(bumps == k, t, t0)
            made_jump = (code & jnp.uint8(_JUMP_BIT)) != 0

        first = jnp.maximum(first, end - _BLOCK)
        slot = stored_at = jnp.zeros_like(end)
        is_slot, is_undone = jnp.array(False), jnp.array(True)
        if self.has_slots:
            slots = record.slots
            assert slots is not None
            # One that has been passed, as in the end all have been, has a larger
            # number. (But not one at the start of the solve, in an element that is
            # done: that is restored again.)
            slot = jnp.maximum(num_slots - 1, 0)
            index = slots.index[slot].astype(end.dtype)
            is_slot = (record.num_wanted > 0) & (index < end)
            is_undone = ~is_slot | slots.is_undone[slot]
            stored_at = jnp.where(is_slot, index, 0)
            first = jnp.maximum(first, stored_at)
        return Segment(
            end=end,
            first=first,
            t_prev=t_prev,
            t0=t0,
            made_jump=made_jump,
            recorded=[self._read(x, numbers) for x in steps.recorded],
            stored_at=stored_at,
            is_slot=is_slot,
            slot=slot,
            is_undone=is_undone,
        )

    def read_stored(self, record: Record, init_state, segment: Segment) -> PyTree:
        """The arrays of the `(y, solver_state)` that is stored for this segment."""
        initial = _arrays(init_state)
        if not self.has_slots:
            return initial
        assert record.slots is not None
        return jtu.tree_map(
            lambda buffer, x: jnp.where(segment.is_slot, buffer[segment.slot], x),
            record.slots.states,
            initial,
        )

    def read_recorded(
        self, segment: Segment, solver_state: PyTree, index: Array
    ) -> PyTree:
        """`solver_state` with its recorded part as it was at the start of the step."""
        if len(segment.recorded) == 0:
            return solver_state
        where = lambda s: jtu.tree_leaves(self._solver.recorded(s))
        recorded = [x[segment.end - 1 - index] for x in segment.recorded]
        return eqx.tree_at(where, solver_state, recorded)

    def stop_recorded(self, y: PyTree, solver_state: PyTree) -> PyTree:
        """With couplings, what is recorded is a constant, as is the memo."""
        solver = self._solver
        if not isinstance(solver, AbstractCouplingSolver):
            return solver_state

        def where(state):
            memo = solver.split(y, state).memo
            return jtu.tree_leaves((solver.recorded(state), memo))

        leaves = where(solver_state)
        if len(leaves) == 0:
            return solver_state
        return eqx.tree_at(where, solver_state, stop_gradient(leaves))

    def num_slots(self, record: Record) -> Array:
        return jnp.minimum(record.num_wanted, self._num_slots)

    def check(self, record: Record, grads: PyTree, is_repeated: Any) -> PyTree:
        """Raises an error if something went wrong on the way forward that spoils the
        gradient but not the solution."""
        if self.is_window:
            grads = eqx.error_if(
                grads,
                ~is_repeated,
                f"This solve makes more than {self.length} steps, and with "
                "`max_steps=None` they are made again on the backward pass. That did "
                "not lead to the same steps, because of rounding, so its gradient is "
                "not available. Use a bound, `max_steps=...`: the memory for it is 8 "
                "or 9 bytes a step.",
            )
        grads = eqx.error_if(
            grads,
            ~record.is_consistent,
            "The step size controller started a step elsewhere than at the end of the "
            "step before (or, at a jump, just after it). `adjoint=ReversibleAdjoint()` "
            "cannot record such steps. Use `adjoint=diffrax.RecursiveCheckpointAdjoint"
            "()`.",
        )
        if not self._asks:
            return grads
        too_few = record.num_wanted > self._num_slots
        # Rounded upwards.
        log2 = 32 - lax.clz(jnp.maximum(record.num_wanted, 1).astype(jnp.int32) - 1)
        log2 = jnp.minimum(log2, _MAX_LOG2_SLOTS)
        messages = [
            "The backward pass needs more checkpoints than "
            f"`ReversibleAdjoint(checkpoints={self._num_slots})` has slots for. The "
            "solution is right, but its gradient is not available. Use "
            f"`ReversibleAdjoint(checkpoints={2**k})`."
            for k in range(_MAX_LOG2_SLOTS + 1)
        ]
        return eqxi.branched_error_if(grads, too_few, eqxi.unvmap_max(log2), messages)


def _arrays(state) -> PyTree:
    return eqx.filter((state.y, state.solver_state), eqx.is_array)


def make_recorder(
    solver: AbstractReversibleSolver,
    stepsize_controller,
    init_state,
    args,
    max_steps: int | None,
    num_slots: int,
    checkpoint_every: int | None,
) -> Recorder:
    # The host keeps `made_jump` a Python `False` if the controller never reports a
    # jump, so we find that out as it does.
    _, _, _, made_jump, _, _ = eqx.filter_eval_shape(
        stepsize_controller.adapt_step_size,
        init_state.tprev,
        init_state.tnext,
        init_state.y,
        init_state.y,
        args,
        init_state.y,
        1.0,
        init_state.controller_state,
    )
    if made_jump is False and init_state.made_jump is False:
        example = False
    else:
        example = jnp.asarray(init_state.made_jump)
    states = (init_state.solver_state, init_state.solver_state, example)
    asks = (
        checkpoint_every is not None
        or solver.needs_checkpoint(*states) is not False
        or solver.wants_checkpoint(*states) is not False
    )
    return Recorder(solver, example, asks, max_steps, num_slots, checkpoint_every)
