import functools as ft
from typing import Any, cast

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Bool, Float, Int

from ._adjoint.adjoint import ReversibleAdjoint
from ._adjoint.drift import distance
from ._adjoint.plan import made_jump_example, make_forward
from ._adjoint.rule import inner_loop, with_arrays
from ._adjoint.steps import Window
from ._adjoint.verify import tolerance
from ._compat import ArrayTree, BoolScalarLike, host_loop, PyTree, RealScalarLike, Terms
from ._method.controlled import coupling, rms
from ._method.coupling import AbstractCouplingSolver
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
    - `made_again`: How often the step is recomputed on the backward pass, as fewer
        states are stored than should be. Integers. (More are recomputed if verification
        fails.)
    - `max_checkpoints`: How many states can be stored. An integer.
    - `tolerance`: The `drift` beyond which verification fails. A number.
    - `solution`: The [`diffrax.Solution`][] of the solve.
    """

    ts: Float[np.ndarray, " steps"]
    separation: Float[np.ndarray, " steps"]
    coupling: Float[np.ndarray, " steps"]
    checkpoints: Bool[np.ndarray, " steps"]
    drift: Float[np.ndarray, " steps"]
    made_again: Int[np.ndarray, " steps"]
    max_checkpoints: int
    tolerance: float
    solution: diffrax.Solution

    @property
    def num_checkpoints(self) -> int:
        """How many states should be stored. With as many `checkpoints` of
        [`diffrax_reversible.ReversibleAdjoint`][] nothing is recomputed."""
        return int(np.sum(self.checkpoints))

    def __repr__(self) -> str:
        n, wanted, room = len(self.ts), self.num_checkpoints, self.max_checkpoints
        if n == 0:
            return "No steps."
        again, worst = int(np.sum(self.made_again)), int(np.argmax(self.drift))
        # (Not if it is NaN.)
        is_well = bool(self.drift[worst] <= self.tolerance)
        how = "well" if is_well else "badly"
        steps = (
            f"{n} steps, undone {how}: the largest drift is {self.drift[worst]:.1e}, "
            f"at t = {self.ts[worst]:.4g}."
        )
        states = (
            f"{wanted} states are wanted, {room} can be stored, and {again} steps are "
            "recomputed."
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
        elif again > 0:
            remedies = [f"`ReversibleAdjoint(checkpoints={wanted})`"]
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
        """Draws `separation`, `coupling`, `drift` and `made_again` over time, with a
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
            (axes[3], self.made_again, "made again"),
        ):
            ax.plot(self.ts, values, lw=1)
            ax.set_ylabel(label)
            for t in self.ts[self.checkpoints]:
                ax.axvline(t, color="tab:orange", lw=0.5, zorder=0)
        for ax in (axes[0], axes[2]):
            ax.set_yscale("log")
        axes[0].set_title(
            f"{len(self.ts)} steps, {self.num_checkpoints} checkpoints (orange), "
            f"{np.sum(self.made_again)} steps made again"
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
    num_slots, grid = map(int, sol.stats.pop("slots"))
    tol = float(sol.stats.pop("tolerance"))
    n = int(sol.stats["num_accepted_steps"])
    out = {name: np.asarray(x)[:n] for name, x in found.items()}
    out["made_again"] = _made_again(out["checkpoints"], num_slots, grid)
    if sol.t1 < sol.t0:
        # The host integrates over reversed time.
        out["ts"] = -out["ts"]
    return Diagnosis(**out, max_checkpoints=num_slots, tolerance=tol, solution=sol)


def _made_again(
    is_wanted: Bool[np.ndarray, " steps"], num_slots: int, grid: int
) -> Int[np.ndarray, " steps"]:
    """How often each step is made again, if all of them are recorded: which states are
    kept on the way forward (see `Keeping` and `Forward`), and which on the way back."""
    n = len(is_wanted)
    kept, stride, count = [], 1, 0
    for i in range(1, n):
        count += is_wanted[i]
        may_be_kept = is_wanted[i] or i % grid == 0 or i <= num_slots
        if not may_be_kept or (is_wanted[i] and count % stride != 0):
            continue
        if len(kept) == num_slots:
            if not np.all(is_wanted[kept]):
                kept = [k for k in kept if is_wanted[k]]
            elif is_wanted[i]:
                kept, stride = kept[1::2], 2 * stride
        if len(kept) < num_slots and not (is_wanted[i] and count % stride != 0):
            kept.append(i)
    out, stack = np.zeros(n, int), [0, *kept]
    for i in reversed(range(1, n)):
        while stack[-1] > i:
            stack.pop()
        if is_wanted[i] and stack[-1] != i:
            start = stack[-1]
            out[start:i] += 1
            between = [k for k in range(start + 1, i) if is_wanted[k]]
            free = num_slots + 1 - len(stack)
            stride = -(-(len(between) + 1) // (free + 1))
            stack += [*between[stride - 1 :: stride][:free], i]
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

        def make(checkpoints, checkpoint_every):
            return make_forward(
                solver,
                init_state,
                made_jump_example(stepsize_controller, init_state, args),
                max_steps,
                checkpoints,
                checkpoint_every,
                records_all=True,
            )

        # A slot for every step.
        forward = make(max_steps, 1)
        real = make(self.adjoint.checkpoints, self.adjoint.checkpoint_every)
        records = []

        def outer_while_loop(cond_fun, body_fun, init_state, *, max_steps, buffers):
            init_state = with_arrays(init_state)

            final_state, record = forward.run(
                cond_fun, body_fun, init_state, max_steps=max_steps, buffers=buffers
            )
            records.append((init_state, final_state, record))
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
        [(init_state, final_state, record)] = records
        found = _walk_back(
            forward,
            record,
            solver,
            terms,
            args,
            init_state,
            final_state,
            max_steps,
            self.adjoint.checkpoint_every,
        )
        slots = (jnp.array(real.num_slots), jnp.array(real.grid))
        tol = jnp.array(tolerance(init_state.y))
        return out, {**stats, "diagnosis": found, "slots": slots, "tolerance": tol}


def _walk_back(
    forward,
    record,
    solver,
    terms,
    args,
    init_state,
    final_state,
    max_steps,
    checkpoint_every,
):
    zero = jnp.array(0)
    # (Or else of more steps than there are.)
    every = jnp.array(checkpoint_every or max_steps + 1)
    window = Window(record.steps, zero, init_state.tprev, every)
    static = eqx.filter((init_state.y, init_state.solver_state), eqx.is_array, True)

    def cond_fun(carry):
        index, *_ = carry
        return index > 0

    def body_fun(carry):
        num_steps, rebuilt, slots, out = carry
        index = num_steps - 1
        block = forward.format.read(window, index[None])
        _, t0, t1, made_jump = block.times(jnp.array(0))
        y1, state1 = rebuilt
        state1 = forward.format.read_recorded(
            block, state1, jnp.array(0), state1, jnp.array(False)
        )
        y0, _, state0 = solver.backward_step(terms, t0, t1, y1, args, state1, made_jump)
        # All steps but the first have a slot.
        stored, _ = slots.top_state(forward.kept(init_state, init_state.tprev))
        y_stored, state_stored = eqx.combine(stored, static)
        # (The start of the solve is there anyway.)
        needs, wants = block.is_needed[0], block.is_wanted[0] & (index > 0)
        drift = distance(y0, y_stored, y1)
        separation, m = _coupling(solver, y_stored, state_stored)
        values = dict(
            ts=t0,
            separation=separation,
            coupling=m,
            checkpoints=wants,
            drift=jnp.where(needs, 0, drift),
        )
        out = {name: out[name].at[index].set(x) for name, x in values.items()}
        rebuilt = jtu.tree_map(
            lambda a, b: jnp.where(wants, a, b) if eqx.is_array(a) else a,
            (y_stored, state_stored),
            (y0, state0),
        )
        return index, rebuilt, slots.pop(slots.count > 0), out

    n = final_state.num_accepted_steps
    dtype = rms(init_state.y).dtype
    nan = jnp.full(max_steps, jnp.nan, dtype)
    out = dict(
        ts=nan,
        separation=nan,
        coupling=nan,
        checkpoints=jnp.zeros(max_steps, bool),
        drift=nan,
    )
    final = (final_state.y, final_state.solver_state)
    carry = (n, final, record.slots, out)
    *_, out = lax.while_loop(cond_fun, body_fun, carry)
    return out


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
