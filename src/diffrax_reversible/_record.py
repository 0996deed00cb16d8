"""What is kept of each accepted step on the way forward, for the way back."""

from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._coupling import AbstractCouplingSolver, stop_gradient
from ._solver.base import AbstractReversibleSolver


# By how many floating-point numbers the start of a step may differ from the end of the
# step before. At a jump diffrax's controllers move it by one or two.
_MAX_BUMPS = 4
_JUMP_BIT = 0x80
# Messages about too few slots name a power of two up to this one.
_MAX_LOG2_SLOTS = 24
# With `max_steps=None`: how many steps are recorded at a time.
WINDOW = 2**16


class Record(NamedTuple):
    # Those annotated `Any` are arrays, or within the loop Equinox's buffers.
    #
    # `tnext` of every accepted step, or of the last `WINDOW` of them. The number of
    # accepted steps is in the host's state.
    times: Any
    # If there may be jumps: by how much the start of the step differs from the end of
    # the step before, and whether there was a jump.
    jumps: Any
    # What the solver wants recorded: a list of the leaves of `solver.recorded`.
    recorded: list[Any]
    # Slots for the starts of steps: the index of the step, whether it can be undone
    # too, and `(y, solver_state)`.
    slot_index: Any
    slot_is_undone: Any
    slots: PyTree
    # How many slots were asked for.
    num_wanted: Any
    # The end of the last accepted step.
    t_last: Array
    # Whether the times of all steps can be had again from `times` and `jumps`.
    is_consistent: Array


class Recorder:
    def __init__(
        self,
        solver: AbstractReversibleSolver,
        made_jump: Any,
        has_slots: bool,
        max_steps: int | None,
        num_slots: int,
        checkpoint_every: int | None,
    ):
        self._solver = solver
        # `False` if that is known in advance of every step; otherwise an example.
        self.made_jump = made_jump
        self._has_jumps = made_jump is not False
        self._has_slots = has_slots
        # Whether the record may be too short, and has to be made again on the way back.
        self.is_window = max_steps is None
        self.length = WINDOW if max_steps is None else max(max_steps, 1)
        self._num_slots = num_slots
        self._checkpoint_every = checkpoint_every

    def _place(self, index: Array) -> Array:
        return index % self.length if self.is_window else index

    def _recorded_leaves(self, solver_state: PyTree) -> list[Array]:
        return [
            jnp.asarray(x) for x in jtu.tree_leaves(self._solver.recorded(solver_state))
        ]

    #
    # On the way forward
    #

    def init(self, init_state, has_slots: bool = True) -> Record:
        n = self.length
        tprev = init_state.tprev
        has_slots = has_slots and self._has_slots

        def make(length, x):
            return jnp.zeros((length, *jnp.shape(x)), jnp.result_type(x))

        stored = eqx.filter((init_state.y, init_state.solver_state), eqx.is_array)
        return Record(
            # An element of a batch may read here though it never made a step. So these
            # hold what a step of length zero would have put.
            times=jnp.full(n, tprev),
            jumps=jnp.zeros(n, jnp.uint8) if self._has_jumps else None,
            recorded=[
                jnp.broadcast_to(x, (n, *x.shape))
                for x in self._recorded_leaves(init_state.solver_state)
            ],
            slot_index=jnp.zeros(self._num_slots, jnp.int32) if has_slots else None,
            slot_is_undone=jnp.zeros(self._num_slots, bool) if has_slots else None,
            slots=jtu.tree_map(lambda x: make(self._num_slots, x), stored)
            if has_slots
            else None,
            num_wanted=jnp.array(0),
            t_last=tprev,
            is_consistent=jnp.array(True),
        )

    def buffers(self, record: Record) -> list:
        return [
            record.times,
            record.jumps,
            record.recorded,
            record.slot_index,
            record.slot_is_undone,
            record.slots,
        ]

    def append(self, record: Record, state, new_state) -> Record:
        """Called after every attempted step."""
        index = state.num_accepted_steps
        accepted = new_state.num_accepted_steps > index

        # If the step was rejected then the next one is put into the same place.
        place = self._place(index)
        times = record.times.at[place].set(state.tnext)
        recorded = [
            buffer.at[place].set(x)
            for buffer, x in zip(
                record.recorded, self._recorded_leaves(state.solver_state)
            )
        ]

        t = record.t_last
        if self._has_jumps:
            bumps = jnp.array(0, jnp.uint8)
            for k in range(1, _MAX_BUMPS + 1):
                t = eqxi.nextafter(t)
                bumps = jnp.where(state.tprev == t, jnp.uint8(k), bumps)
            is_consistent = (bumps > 0) | (state.tprev == record.t_last)
            code = bumps | jnp.where(
                state.made_jump, jnp.uint8(_JUMP_BIT), jnp.uint8(0)
            )
            jumps = record.jumps.at[place].set(code)
        else:
            is_consistent = state.tprev == t
            jumps = None

        if record.slots is not None:
            states = (state.solver_state, new_state.solver_state, state.made_jump)
            needs = self._solver.needs_checkpoint(*states)
            wants = needs | self._solver.wants_checkpoint(*states)
            if self._checkpoint_every is not None:
                wants = wants | ((index > 0) & (index % self._checkpoint_every == 0))
            wants = accepted & wants
            slot = record.num_wanted
            slots = (record.slot_index, record.slot_is_undone, record.slots)
            if self._num_slots > 0:
                store = wants & (slot < self._num_slots)
                stored = eqx.filter((state.y, state.solver_state), eqx.is_array)
                values = (index, ~jnp.asarray(needs), stored)

                def put(x, buffer):
                    return eqxi.buffer_at_set(buffer, slot, x, pred=store)

                slots = lax.cond(
                    eqxi.unvmap_any(store),
                    # In the loop buffers are nodes, not leaves.
                    lambda: jtu.tree_map(put, values, slots),
                    lambda: slots,
                )
            slot_index, slot_is_undone, slots = slots
            num_wanted = slot + jnp.where(wants, 1, 0)
        else:
            slot_index = slot_is_undone = slots = None
            num_wanted = record.num_wanted

        return Record(
            times=times,
            jumps=jumps,
            recorded=recorded,
            slot_index=slot_index,
            slot_is_undone=slot_is_undone,
            slots=slots,
            num_wanted=num_wanted,
            t_last=jnp.where(accepted, state.tnext, record.t_last),
            is_consistent=record.is_consistent & (is_consistent | ~accepted),
        )

    #
    # On the way back
    #

    def last_time(self, record: Record, num_steps: Array) -> Array:
        """The end of the last of `num_steps` steps."""
        return record.times[self._place(jnp.maximum(num_steps - 1, 0))]

    def first_step(self, num_steps: Array) -> Array:
        """The first step that can be read, if the record was made of `num_steps`."""
        # One more is lost, as reading a step looks at the end of the one before.
        return jnp.where(
            num_steps <= self.length, 0, jnp.maximum(num_steps - self.length + 1, 0)
        )

    def replace_steps(self, record: Record, of: Record) -> Record:
        """`record`, with the steps of another."""
        return record._replace(times=of.times, jumps=of.jumps, recorded=of.recorded)

    def read_times(self, record: Record, init_state, index: Array):
        """The end of the step before, the start of the step, and `made_jump` at it."""
        t_prev = jnp.where(index > 0, self.last_time(record, index), init_state.tprev)
        if not self._has_jumps:
            return t_prev, t_prev, False
        assert record.jumps is not None
        code = record.jumps[self._place(index)]
        bumps = code & jnp.uint8(_JUMP_BIT - 1)
        t0 = t = t_prev
        for k in range(1, _MAX_BUMPS + 1):
            t = eqxi.nextafter(t)
            t0 = jnp.where(bumps == k, t, t0)
        return t_prev, t0, (code & jnp.uint8(_JUMP_BIT)) != 0

    def read_recorded(self, record: Record, solver_state: PyTree, index: Array):
        """`solver_state` with its recorded part as it was at the start of the step."""
        if len(record.recorded) == 0:
            return solver_state
        where = lambda s: jtu.tree_leaves(self._solver.recorded(s))
        place = self._place(index)
        return eqx.tree_at(where, solver_state, [x[place] for x in record.recorded])

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

    def read_slot(self, record: Record, num_slots: Array, index: Array, active: Array):
        """How many stored steps are still to come after this one, whether this is one
        of them, whether it should have been undone, and a function that returns `(y,
        solver_state)` as stored at its start (or if not, its arguments)."""
        if not self._has_slots or self._num_slots == 0:
            no, yes = jnp.array(False), jnp.array(True)
            return num_slots, no, yes, lambda state: state
        assert record.slot_index is not None
        slot = jnp.maximum(num_slots - 1, 0)
        # An element of a batch that makes its first step over again must restore again,
        # so this does not look at `active`, nor whether `num_slots` is zero. (A slot
        # that has been passed cannot match again: all indices to come are smaller.)
        is_here = (record.num_wanted > 0) & (record.slot_index[slot] == index)
        is_undone = ~is_here | record.slot_is_undone[slot]

        def read(state):
            rebuilt, static = eqx.partition(state, eqx.is_array)
            stored = jtu.tree_map(
                lambda buffer, x: jnp.where(is_here, buffer[slot], x),
                record.slots,
                rebuilt,
            )
            return eqx.combine(stored, static)

        passed = active & is_here & (num_slots > 0)
        return num_slots - jnp.where(passed, 1, 0), is_here, is_undone, read

    def check(self, record: Record, grads: PyTree, is_repeated: Any) -> PyTree:
        """Raises an error if something went wrong on the way forward that spoils the
        gradient but not the solution."""
        if self.is_window:
            grads = eqx.error_if(
                grads,
                ~is_repeated,
                f"This solve makes more than {self.length} steps, and with "
                "`max_steps=None` they are made again on the backward pass. That did "
                "not lead to the same steps, because of rounding. Put a bound on the "
                "number of steps: the memory for it is 8 or 9 bytes a step.",
            )
        grads = eqx.error_if(
            grads,
            ~record.is_consistent,
            "The step size controller started a step elsewhere than at the end of the "
            "step before (or, at a jump, just after it). `adjoint=ReversibleAdjoint()` "
            "cannot record such steps. Use `adjoint=diffrax.RecursiveCheckpointAdjoint"
            "()`.",
        )
        if not self._has_slots:
            return grads
        too_few = record.num_wanted > self._num_slots
        log2 = sum(
            jnp.where(record.num_wanted > 2**k, 1, 0) for k in range(_MAX_LOG2_SLOTS)
        )
        messages = [
            "The backward pass needs more checkpoints than "
            f"`ReversibleAdjoint(checkpoints={self._num_slots})` has slots for. The "
            "solution is right, but its gradient is not available. Use "
            f"`ReversibleAdjoint(checkpoints={2**k})`."
            for k in range(_MAX_LOG2_SLOTS + 1)
        ]
        return eqxi.branched_error_if(grads, too_few, eqxi.unvmap_max(log2), messages)


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
    has_slots = (
        checkpoint_every is not None
        or solver.needs_checkpoint(*states) is not False
        or solver.wants_checkpoint(*states) is not False
    )
    return Recorder(solver, example, has_slots, max_steps, num_slots, checkpoint_every)
