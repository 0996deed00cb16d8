import functools as ft
import math
from typing import Any, cast, NamedTuple

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Bool, Float, Int

from ._adjoint.adjoint import ReversibleAdjoint
from ._adjoint.coupling_pullback import make_pullback
from ._adjoint.hoist import Hoister
from ._adjoint.noise import Noise
from ._adjoint.plan import made_jump_example, make_segments
from ._adjoint.pullback import Step
from ._adjoint.rule import inner_loop, with_arrays
from ._adjoint.segments import Segments
from ._adjoint.step_record import asks, at_rest, Recorder, Starts, Uniform
from ._adjoint.times import constant
from ._adjoint.verify import tolerance
from ._compat import ArrayTree, BoolScalarLike, host_loop, PyTree, RealScalarLike, Terms
from ._drift import distance
from ._method.base import AbstractReversibleSolver
from ._method.controlled import coupling, rms
from ._method.coupling import AbstractCouplingSolver
from ._method.tree import statics, tree_where
from ._registry import to_reversible
from ._solver.u_reversible import UReversible


class Diagnosis(eqx.Module):
    """What [`diffrax_reversible.diagnose`][] returns: for each accepted step, how well
    it is undone, and what that costs. `print` it for a summary, with what to do.

    **Attributes:** (NumPy arrays of shape `(steps,)`, unless another type is given)

    - `ts`: The times at which the steps start, of a floating-point dtype.
    - `separation`: The distance between `y` and the second copy of the solution that
        the solver carries along (`z` or `yhat`), relative to the size of `y`. NaN if
        the solver has none; of no meaning if it has something else of the structure of
        `y`, such as a velocity.
    - `coupling`: The coupling of [`diffrax_reversible.UReversible`][]: the number $m$
        of the step, or the `coupling_parameter`. NaN for other solvers.
    - `checkpoints`: Whether the state at the start of the step should be stored, as the
        solver wants it or as it is one of `checkpoint_every`. Booleans.
    - `drift`: The distance between `y` and what it is rebuilt as, starting from the end
        of the solve or from the next of the `checkpoints`, whichever is sooner;
        relative to the size of `y`.
    - `recomputed`: How often the step is recomputed on the backward pass: once, if it
        is next to one of the `checkpoints`, or one of so many steps that there is no
        record of it; and more often, if more states would have to be stored for that
        than can be. Integers. (More are recomputed if verification fails.)
    - `max_checkpoints`: How many states can be stored. An integer.
    - `tolerance`: The `drift` beyond which verification fails. A number.
    - `solution`: The [`diffrax.Solution`][] of the solve.
    """

    ts: Float[np.ndarray, " steps"]
    separation: Float[np.ndarray, " steps"]
    coupling: Float[np.ndarray, " steps"]
    checkpoints: Bool[np.ndarray, " steps"]
    drift: Float[np.ndarray, " steps"]
    recomputed: Int[np.ndarray, " steps"]
    max_checkpoints: int
    tolerance: float
    solution: diffrax.Solution

    @property
    def num_checkpoints(self) -> int:
        """How many states should be stored."""
        return int(np.sum(self.checkpoints))

    def __repr__(self) -> str:
        n, wanted, room = len(self.ts), self.num_checkpoints, self.max_checkpoints
        if n == 0:
            return "No steps."
        again, worst = int(np.sum(self.recomputed)), int(np.argmax(self.drift))
        # (Not if it is NaN.)
        is_well = bool(self.drift[worst] <= self.tolerance)
        how = "well" if is_well else "badly"
        # (A step that is not undone wants its state to be stored.)
        is_mostly_recomputed = 2 * wanted > n
        undone = f"undone {how}"
        if is_mostly_recomputed:
            undone = f"mostly not undone, the others {how}"
        steps = (
            f"{n} steps, {undone}: the largest drift is {self.drift[worst]:.1e}, "
            f"at t = {self.ts[worst]:.4g}."
        )
        states = (
            f"{wanted} states are wanted, {room} can be stored, and steps are "
            f"recomputed {again} times."
        )
        remedies = []
        if not is_well:
            steps += (
                f" Beyond {self.tolerance:.1e} gradients take longer, as verification "
                "fails and more is recomputed."
            )
            remedies = [
                f"`ReversibleAdjoint(checkpoint_every={self._steps_undone_well()})`",
                "a solver that wants states where it needs them, as "
                "`UReversible(diffrax.Tsit5())`",
            ]
        elif is_mostly_recomputed:
            remedies = [
                "a solver that undoes nothing, such as `diffrax.Tsit5()` in the place "
                "of `UReversible(diffrax.Tsit5())`"
            ]
        elif np.max(self.recomputed) > 1:
            # (For the states of as many segments as one has steps.)
            num = 2 * math.ceil(math.sqrt(n))
            remedies = [f"`ReversibleAdjoint(checkpoints={num})`"]
        todo = "Nothing is to be done."
        if len(remedies) > 0:
            todo = f"To save time, use {', or '.join(remedies)}."
        return "\n".join((steps, states, todo))

    def _steps_undone_well(self) -> int:
        """How many at a time: half of the fewest that lead from a state that is known
        to where the drift is too large, as drift grows faster elsewhere."""
        counts, count = [], 0
        for drift, is_known in zip(self.drift[::-1], self.checkpoints[::-1]):
            if not drift <= self.tolerance:
                counts.append(count)
            count = 0 if is_known else count + 1
        return max(1, min(counts) // 2)

    def plot(self, filename: str | None = None) -> Any:
        """Draws `separation`, `coupling`, `drift` and `recomputed` over time, with a
        line at each of the `checkpoints`. Needs matplotlib.

        **Arguments:**

        - `filename`: Where to save the picture, if anywhere.

        **Returns:**

        The `matplotlib.figure.Figure`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 6), layout="constrained")
        axes = cast(Any, figure.subplots(4, 1, sharex=True))
        for ax, values, label in (
            (axes[0], self.separation, "separation of y and z"),
            (axes[1], self.coupling, "coupling"),
            (axes[2], self.drift, "drift"),
            (axes[3], self.recomputed, "recomputed"),
        ):
            ax.plot(self.ts, values, lw=1)
            ax.set_ylabel(label)
            for t in self.ts[self.checkpoints]:
                ax.axvline(t, color="tab:orange", lw=0.5, zorder=0)
        for ax in (axes[0], axes[2]):
            ax.set_yscale("log")
        axes[0].set_title(
            f"{len(self.ts)} steps, {self.num_checkpoints} checkpoints (orange), "
            f"{np.sum(self.recomputed)} recomputed steps"
        )
        axes[-1].set_xlabel("t")
        if filename is not None:
            figure.savefig(filename)
        return figure


def diagnose(
    terms: Terms,
    solver: diffrax.AbstractSolver[Any],
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    y0: ArrayTree,
    args: PyTree = None,
    *,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    stepsize_controller: diffrax.AbstractStepSizeController[Any, Any] = (
        diffrax.ConstantStepSize()
    ),
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
    event: diffrax.Event | None = None,
    max_steps: int | None = 4096,
    throw: bool = False,
    progress_meter: diffrax.AbstractProgressMeter[Any] = diffrax.NoProgressMeter(),
    solver_state: ArrayTree | None = None,
    controller_state: ArrayTree | None = None,
    made_jump: BoolScalarLike | None = None,
    discrete_terminating_event: Any = None,
) -> Diagnosis:
    """Solves a differential equation and undoes it, and tells for each step how well
    that went. Use it to choose a reversible solver, and `checkpoints` of
    [`diffrax_reversible.ReversibleAdjoint`][].

    **Arguments:**

    Those of [`diffrax.diffeqsolve`][], with a reversible `solver`. These differ:

    - `adjoint`: The [`diffrax_reversible.ReversibleAdjoint`][] that is to be used. Any
        other adjoint stands for `ReversibleAdjoint()`, the default.
    - `max_steps`: Not `None`.
    - `throw`: `False` by default.

    **Returns:**

    A [`diffrax_reversible.Diagnosis`][], which has a method `plot`.

    **Raises:**

    - `ValueError` if the solver is not reversible, or if `max_steps=None`.

    **Cost:** About the time of a gradient, and the memory of `max_steps` times `y` and
    the solver state. Cannot be used within `jax.jit`, `jax.vmap` or `jax.grad`.
    """
    if not isinstance(adjoint, ReversibleAdjoint):
        adjoint = ReversibleAdjoint()
    sol = eqx.filter_jit(diffrax.diffeqsolve)(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=saveat,
        stepsize_controller=stepsize_controller,
        adjoint=_DiagnosticAdjoint(adjoint),
        event=event,
        max_steps=max_steps,
        throw=throw,
        progress_meter=progress_meter,
        solver_state=solver_state,
        controller_state=controller_state,
        made_jump=made_jump,
        discrete_terminating_event=discrete_terminating_event,
    )
    found = sol.stats.pop("diagnosis")
    num_slots, length, num_rows = map(int, sol.stats.pop("segments"))
    is_lost = np.asarray(sol.stats.pop("is_lost"))
    tol = float(sol.stats.pop("tolerance"))
    n = int(sol.stats["num_accepted_steps"])
    out = {name: np.asarray(x)[:n] for name, x in found.items()}
    # (A segment whose times cannot be recorded is as one in which a state is wanted.)
    is_marked = out["checkpoints"] | np.repeat(is_lost, length)[:n]
    out["recomputed"] = _recomputed(is_marked, num_slots, length, num_rows)
    if sol.t1 < sol.t0:
        # The host integrates over reversed time.
        out["ts"] = -out["ts"]
    return Diagnosis(
        **out, max_checkpoints=num_slots + length, tolerance=tol, solution=sol
    )


def _recomputed(
    is_marked: Bool[np.ndarray, " steps"], num_slots: int, length: int, num_rows: int
) -> Int[np.ndarray, " steps"]:
    """How often each step is recomputed: by segments of this `length`, see `Segments`;
    of the last `num_rows` of which there is a record."""
    n = len(is_marked)
    # (As `Keeping` does.)
    stack, spacing, num_wide = [], 1, 0
    for k in range(1, -(-n // length)):
        if k % spacing == 0 and len(stack) >= num_slots:
            if num_slots - num_wide >= 3:
                del stack[num_wide : num_wide + 2]
                num_wide += 1
            else:
                del stack[num_wide:]
                spacing, num_wide = 3 * spacing, 0
        if k % spacing == 0 and len(stack) < num_slots:
            stack.append(k * length)
    out, last = np.zeros(n, int), max(n - 1, 0) // length
    # (The states of the last segment are there.)
    for k in reversed(range(last)):
        first, stop = k * length, (k + 1) * length
        stack = [i for i in stack if i < stop]
        if not np.any(is_marked[first:stop]) and k >= last - num_rows:
            continue
        start = stack[-1] if len(stack) > 0 else 0
        out[start:stop] += 1
        free = max(num_slots - len(stack), 0)
        stride = length * -(-(stop - start) // (length * (free + 1)))
        stack += range(start + stride, first, stride)
    return out


class _DiagnosticAdjoint(diffrax.AbstractAdjoint):
    adjoint: ReversibleAdjoint

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        max_steps,
        init_state,
        throw,
        passed_solver_state,
        passed_controller_state,
        **kwargs,
    ) -> Any:
        del throw, passed_solver_state, passed_controller_state
        if max_steps is None:
            raise ValueError(
                "`diagnose(..., max_steps=None)` is not supported, as every step is "
                "stored. Set `max_steps` to a bound on the number of steps."
            )
        solver = to_reversible(solver, "diagnose")
        init_state = with_arrays(init_state)

        made_jump = made_jump_example(stepsize_controller, init_state, args)
        pullback = make_pullback(solver, init_state.solver_state, made_jump)
        # One for all steps; and how it would be done.
        noise = Noise(None)
        segments = Segments(
            pullback, noise, made_jump, None, False, False, 0, max_steps
        )
        hoister = Hoister()
        step = Step.example(init_state, made_jump)
        pullback.add_functions(hoister, terms, args, step)
        real = make_segments(
            pullback,
            noise,
            init_state,
            made_jump,
            hoister,
            is_uniform=constant(stepsize_controller, init_state) is not None,
            max_steps=max_steps,
            checkpoints=self.adjoint.checkpoints,
            checkpoint_every=self.adjoint.checkpoint_every,
        )
        runs = []

        def outer_while_loop(cond_fun, body_fun, init_state, *, max_steps, buffers):
            init_state = with_arrays(init_state)
            final_state, record = segments.run(
                cond_fun,
                body_fun,
                init_state,
                max_steps=max_steps,
                buffers=buffers,
                records=True,
            )
            runs.append((init_state, final_state, record.starts))
            return final_state

        out, stats = host_loop(
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            max_steps=max_steps,
            init_state=init_state,
            inner_while_loop=ft.partial(inner_loop, kind="lax"),
            outer_while_loop=outer_while_loop,
            **kwargs,
        )
        [(init_state, final_state, starts)] = runs
        every = self.adjoint.checkpoint_every
        steps = _Steps(segments, solver, init_state, final_state, starts)
        found = _undo(steps, terms, args, *_wanted(steps, every))
        assert real.recorder is not None
        of_segments = (real.num_slots, real.length, real.recorder.num_rows)
        tol = jnp.array(tolerance(init_state.y))
        segments = jtu.tree_map(jnp.array, of_segments)
        return out, {
            **stats,
            "diagnosis": found,
            "segments": segments,
            "is_lost": _lost(steps, real),
            "tolerance": tol,
        }


class _State(NamedTuple):
    y: PyTree
    solver_state: PyTree


class _Steps(NamedTuple):
    """All steps of a solve."""

    segments: Segments
    solver: AbstractReversibleSolver
    init_state: Any
    final_state: Any
    starts: Starts

    @property
    def num(self):
        return self.final_state.num_accepted_steps

    @property
    def max_steps(self) -> int:
        return self.segments.length

    @property
    def end(self) -> _State:
        return _State(self.final_state.y, self.final_state.solver_state)

    def start(self, index) -> tuple[Starts, _State]:
        static = statics((self.init_state.y, self.init_state.solver_state))
        at: Starts = jtu.tree_map(lambda x: x[index], self.starts)
        return at, _State(*eqx.combine((at.y, at.solver_state), static))


def _wanted(steps: _Steps, every: int | None):
    """Of each step: whether it cannot be undone, and whether the state at its start
    should be stored."""
    solver = steps.solver

    def body_fun(carry):
        index, rests, left, needed, wanted = carry
        at, old = steps.start(index)
        _, new = steps.start(index + 1)
        new = tree_where(index + 1 < steps.num, new, steps.end)
        made_jump = False if at.made_jump is None else at.made_jump
        needs, wants = asks(solver, old.solver_state, new.solver_state, made_jump)
        rests, leaves = at_rest(solver, rests, old, new)
        needs = needs | leaves | left
        wants = needs | wants
        if every is not None:
            wants = wants | (index % every == 0)
        # (The start of the solve is there anyway.)
        wants = wants & (index > 0)
        needed, wanted = needed.at[index].set(needs), wanted.at[index].set(wants)
        return index + 1, rests, leaves, needed, wanted

    rests = Recorder(solver, False, False, None, 1).no_marks(steps.init_state).rests
    no = jnp.zeros(steps.max_steps, bool)
    carry = (jnp.zeros_like(steps.num), rests, jnp.array(False), no, no)
    cond_fun = lambda carry: carry[0] < steps.num
    *_, needed, wanted = lax.while_loop(cond_fun, body_fun, carry)
    return needed, wanted


def _lost(steps: _Steps, segments: Segments):
    """Of which segments the times cannot be recorded."""
    num, length = -(-steps.max_steps // segments.length), segments.length
    assert segments.recorder is not None
    if not segments.recorder.is_uniform:
        return jnp.zeros(num, bool)

    def one(k):
        places = jnp.minimum(k * length + jnp.arange(length), steps.max_steps)
        t_first, t1 = steps.starts.t_prev[places[0]], steps.starts.t1[places]
        uniform = Uniform.of(t_first, t1, jnp.array(length))
        return jnp.any(uniform.differs(t_first, t1))

    return lax.map(one, jnp.arange(num))


def _undo(steps: _Steps, terms, args, needed, wanted):
    solver, recorder = steps.solver, Recorder(steps.solver, False, False, None, 1)

    def body_fun(carry):
        num_steps, rebuilt, out = carry
        index = num_steps - 1
        at, stored = steps.start(index)
        y1, state1 = rebuilt
        state1 = recorder.with_recorded(state1, stored.solver_state)
        made_jump = False if at.made_jump is None else at.made_jump
        y0, _, state0 = solver.backward_step(
            terms, at.t0, at.t1, y1, args, state1, made_jump
        )
        drift = distance(y0, stored.y, y1)
        separation, m = _coupling(solver, stored.y, stored.solver_state)
        values = dict(
            ts=at.t0,
            separation=separation,
            coupling=m,
            drift=jnp.where(needed[index], 0, drift),
        )
        out = {name: out[name].at[index].set(x) for name, x in values.items()}
        rebuilt = tree_where(wanted[index], stored, _State(y0, state0))
        return index, rebuilt, out

    nan = jnp.full(steps.max_steps, jnp.nan, rms(steps.init_state.y).dtype)
    out = dict(ts=nan, separation=nan, coupling=nan, drift=nan)
    carry = (steps.num, steps.end, out)
    *_, out = lax.while_loop(lambda carry: carry[0] > 0, body_fun, carry)
    return {**out, "checkpoints": wanted}


def _coupling(solver, y, solver_state):
    dtype = rms(y).dtype
    # Then the second register is the difference already.
    controlled = isinstance(solver, UReversible) and solver.coupling_parameter == "auto"
    separation = m = jnp.array(jnp.nan, dtype)
    if isinstance(solver, AbstractCouplingSolver):
        registers = solver.split(y, solver_state).registers
        if len(registers) >= 2:
            a, b, *_ = registers
            if jtu.tree_structure(a) == jtu.tree_structure(b):
                if not controlled:
                    b = jtu.tree_map(lambda x, y: x - y, a, b)
                separation = rms(b) / rms(y)
    if isinstance(solver, UReversible):
        if controlled:
            m = coupling(solver.recorded(solver_state)).astype(dtype)
        else:
            m = jnp.array(solver.coupling_parameter, dtype)
    return separation, m
