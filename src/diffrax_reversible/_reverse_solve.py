"""Undoing a whole solve. diffrax itself makes the steps: see `_backwards`."""

import functools as ft
from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Real

from ._adjoint.adjoint import ReversibleAdjoint
from ._backwards import Backwards, Retrace, with_recorded
from ._compat import (
    ArrayTree,
    is_sub_save_at,
    is_unsafe_sde,
    PyTree,
    RealScalarLike,
    Terms,
    WrapTerm,
)
from ._drift import check_tolerance, default_tolerance, distance
from ._method.base import AbstractReversibleSolver
from ._method.coupling import AbstractCouplingSolver
from ._method.tree import stop_gradient
from ._registry import to_reversible
from ._solver.bases import spelling
from ._solver.leapfrog_midpoint import LeapfrogMidpoint
from ._solver.splitting import AbstractSplitting
from ._solver.u_reversible import UReversible


@eqx.filter_jit
def reverse_solve(
    terms: Terms,
    solver: diffrax.AbstractSolver[Any],
    t0: RealScalarLike,
    t1: RealScalarLike,
    dt0: RealScalarLike | None,
    y1: ArrayTree,
    args: PyTree = None,
    *,
    solver_state: PyTree = None,
    step_ts: Real[ArrayLike, " steps"] | Sequence[RealScalarLike] | None = None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t0=True),
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
    max_steps: int | None = 4096,
    drift_tolerance: float | int | str | None = "auto",
) -> diffrax.Solution:
    """Undoes a finished solve, step by step from its end back to its start, to
    rounding; and returns what the solve would have returned for this `saveat`. Use it
    to go back along a trajectory that was not saved.

    Call it as [`diffrax.diffeqsolve`][] was called, with the solution at the end in
    place of that at the start:

    ```python
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    sol = diffrax.diffeqsolve(terms, solver, t0, t1, dt0, y0, args, saveat=saveat)
    back = reverse_solve(
        terms, solver, t0, t1, dt0, sol.ys[-1], args, solver_state=sol.solver_state
    )
    # `back.ys[0]` is `y0`, to rounding
    ```

    **Arguments:**

    - `terms`, `solver`, `t0`, `t1`, `args`: Those of the solve to be undone. (If it
        ended early, then `t1` is the time at which it did.) The solver must be able to
        undo every step without a stored state: not `UReversible` with the coupling
        `"auto"`, not [`diffrax_reversible.ABOBA`][], and nothing with `full_sync=True`.
    - `dt0`: The constant step size of that solve; or `None`, if there are `step_ts`.
    - `y1`: The solution at `t1`.
    - `solver_state`: The solver state at `t1`, from `SaveAt(solver_state=True)`. Can be
        left out with solvers that have none, and with splittings.
    - `step_ts`: The ends of the steps, in order, of shape `(steps,)`, as saved by
        `SaveAt(steps=True)`, with the `inf` after them. (Or the times that were given
        to [`diffrax.StepTo`][].) Needed after steps of different sizes.
    - `saveat`: What to save, as for [`diffrax.diffeqsolve`][] from `t0` to `t1`, and in
        the same order: `t0` means `t0`, and times increase. But `steps=True` saves the
        starts of steps, in place of their ends; and `steps=n` every `n`th of them,
        counted from `t1`. What `solver_state=True` returns is the state at `t0`.
    - `adjoint`: How to differentiate. Derivatives are taken with respect to what they
        can be taken with respect to in [`diffrax.diffeqsolve`][].
    - `max_steps`: As in that solve, but not `None`. Not used if there are `step_ts`.
    - `drift_tolerance`: How far the solver state that is arrived at may be from that
        with which a solve starts at `t0`, relative to the size of each of its leaves.
        `"auto"` is 1e-5, or 6e-5 in single precision. Use `None`, for no check, if the
        solve was not started at `t0` but resumed. (Then what is `recorded` is not known
        to be right, such as the time of the step before with
        [`diffrax_reversible.LeapfrogMidpoint`][], and such solvers have no
        `SaveAt(solver_state=True)`.) Solvers without a state, and splittings, cannot be
        checked.

    **Returns:**

    A [`diffrax.Solution`][] from `t0` to `t1`.

    **Raises:**

    - `ValueError` if the solver is not reversible, or cannot undo every step; without
        the `solver_state` if there should be one; without or with both of `dt0` and
        `step_ts`; for `SaveAt(controller_state=True)` and `SaveAt(made_jump=True)`; for
        `max_steps=None`; for a `drift_tolerance` that is none; for a
        [`diffrax.UnsafeBrownianPath`][]; and for [`diffrax.BacksolveAdjoint`][] and
        [`diffrax.ImplicitAdjoint`][].
    - `NotImplementedError` for a solver with both `recorded` and `steer`. (In solvers
        that have only `recorded`, this must not depend on the solution.)
    - `RuntimeError` if `step_ts` do not lead from `t0` to `t1`; if there are more than
        `max_steps` steps; if some are too short to be told from `t0`; or if the state
        that is arrived at is not finite, or off by more than `drift_tolerance`.

    **Cost:** One `backward_step` for each step, and an array of `max_steps` times (or
    as many as there are `step_ts`). Can be used within `jax.jit` and `jax.vmap`.

    !!! warning

        Only the state at `t0` can show that the solve was another one, with other
        `terms`, `args` or steps: see `drift_tolerance`. In particular a solve cannot be
        undone that was made with `jump_ts`, or that ended at an event with a root
        finder, as its end is not the end of a step.

    This is not `diffeqsolve` from `t1` to `t0`, which makes other steps, and arrives at
    `y0` only up to the error of the solver. Rounding errors grow in either where the
    solution contracts. With a coupling of 0.999 they grow by 1 / 0.999 in each step
    too; and with [`diffrax_reversible.EES25`][] and [`diffrax_reversible.EES27`][] the
    result is as close as these are reversible.

    To save the ends of steps as `sol.ts["steps"]`, without the solution there:

    ```python
    steps = diffrax.SubSaveAt(steps=True, fn=lambda t, y, args: None)
    end = diffrax.SubSaveAt(t1=True)
    saveat = diffrax.SaveAt(subs=dict(steps=steps, end=end), solver_state=True)
    ```
    """
    solver = to_reversible(solver, "reverse_solve")
    _check_arguments(terms, dt0, step_ts, saveat, adjoint, max_steps, drift_tolerance)
    t0, t1, y1 = _as_diffrax_does(t0, t1, dt0, y1, saveat)
    direction = jnp.where(t0 < t1, 1, -1)
    ts = lax.stop_gradient(_step_times(t0, t1, dt0, step_ts, max_steps, direction))
    num_steps = jnp.sum(jnp.isfinite(ts) & (ts * direction > t0 * direction))

    # As diffrax has them, of the solve to be undone.
    forwards = jtu.tree_map(lambda x: WrapTerm(x, direction), terms, is_leaf=_is_term)
    start = ft.partial(_start, solver, *stop_gradient((forwards, ts * direction, args)))
    # Of the right structure; nothing in it is used but what does not depend on `y`.
    example_y = stop_gradient(y1)
    example = start(example_y)
    _check_is_undone(solver, example)
    if solver_state is None:
        solver_state = _state_from_solution(solver, forwards, t1 * direction, y1, args)
    recorded = _recorded(solver, forwards, ts * direction, args, example_y, example)
    if recorded and saveat.solver_state and drift_tolerance is None:
        raise ValueError(
            "`reverse_solve(..., drift_tolerance=None)` does not support "
            f"`SaveAt(solver_state=True)` with `{type(solver).__name__}`, of whose "
            "state a part is not known if the solve was resumed. Leave `solver_state` "
            "out, or undo a solve that was not resumed."
        )

    problem = (terms, Backwards(solver, recorded), t1, t0, None, y1, args)
    sol, y0, state0 = _solve_backwards(problem, ts, solver_state, saveat, adjoint)
    saved_state = state0 if saveat.solver_state else None
    sol = eqx.tree_at(
        lambda s: (s.t0, s.t1, s.solver_state), sol, (t0, t1, saved_state)
    )
    sol = eqx.error_if(
        sol,
        sol.stats["num_accepted_steps"] != num_steps,
        "`reverse_solve` did not make as many steps as the solve had. Pass `step_ts` "
        "in order; and use double precision for times, as diffrax joins steps that end "
        "within 100 floating-point numbers of `t0`.",
    )
    if drift_tolerance is not None:
        y0 = stop_gradient(y0)
        states = ((y0, state0), (y0, start(y0)), (y1, solver_state))
        sol = _check_start(sol, solver, *states, drift_tolerance)
    return sol


def _check_arguments(
    terms, dt0, step_ts, saveat, adjoint, max_steps, drift_tolerance
) -> None:
    if is_unsafe_sde(terms):
        raise ValueError(
            "`reverse_solve` does not support `diffrax.UnsafeBrownianPath`, which "
            "cannot be queried again. Use `diffrax.VirtualBrownianTree`, in the solve "
            "to be undone too."
        )
    if saveat.controller_state or saveat.made_jump:
        raise ValueError(
            "`reverse_solve` does not support `SaveAt(controller_state=True)` and "
            "`SaveAt(made_jump=True)`, as it has no such state. Leave them out."
        )
    if isinstance(adjoint, (diffrax.BacksolveAdjoint, diffrax.ImplicitAdjoint)):
        raise ValueError(
            f"`reverse_solve` does not support `{type(adjoint).__name__}`. Use "
            "`ReversibleAdjoint()`, which is the default."
        )
    if max_steps is None:
        raise ValueError(
            "`reverse_solve` does not support `max_steps=None`. Use "
            '`max_steps=sol.stats["num_steps"]` of the solve to be undone, or more.'
        )
    check_tolerance("reverse_solve", drift_tolerance)
    if (dt0 is None) == (step_ts is None):
        raise ValueError(
            "`reverse_solve` needs exactly one of `dt0` and `step_ts`, to know where "
            "the steps were. After constant steps pass `dt0`; after adaptive steps "
            "pass `dt0=None` and `step_ts`, as saved by `SaveAt(steps=True)`."
        )


def _as_diffrax_does(t0, t1, dt0, y1, saveat):
    """The times and the solution, as arrays of the dtypes that diffrax gives them."""
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_sub_save_at)
    times = [x for x in (t0, t1, dt0, *(sub.ts for sub in subs)) if x is not None]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(float)
        y1 = jtu.tree_map(lambda y: jnp.asarray(y, jnp.result_type(y, dtype)), y1)
    return jnp.asarray(t0, dtype), jnp.asarray(t1, dtype), y1


def _solve_backwards(problem, ts, solver_state, saveat, adjoint):
    """The solution as `saveat` has it, and `y` and the solver state at its start."""
    last = jnp.sum(jnp.isfinite(ts)) - 1

    def reverse(sub):
        return diffrax.SubSaveAt(
            t0=sub.t1,
            t1=sub.t0,
            ts=None if sub.ts is None else sub.ts[::-1].astype(ts.dtype),
            steps=sub.steps,
            fn=sub.fn,
        )

    sol = diffrax.diffeqsolve(
        *problem,
        solver_state=(jtu.tree_map(_as_array, solver_state), last),
        stepsize_controller=Retrace(ts, last),
        # The second for the check.
        saveat=diffrax.SaveAt(
            subs=(
                jtu.tree_map(reverse, saveat.subs, is_leaf=is_sub_save_at),
                diffrax.SubSaveAt(t1=True),
            ),
            dense=saveat.dense,
            solver_state=True,
        ),
        adjoint=adjoint,
        max_steps=len(ts) - 1,
    )
    ts_saved, _ = sol.ts  # pyright: ignore[reportGeneralTypeIssues]
    ys, y0 = sol.ys  # pyright: ignore[reportGeneralTypeIssues]
    state0, _ = sol.solver_state  # pyright: ignore[reportGeneralTypeIssues]
    ys = jtu.tree_map(
        lambda t, y: jtu.tree_map(lambda x: x[_order(t)], y), ts_saved, ys
    )
    ts_saved = jtu.tree_map(lambda t: t[_order(t)], ts_saved)
    sol = eqx.tree_at(lambda s: (s.ts, s.ys), sol, (ts_saved, ys))
    return sol, jtu.tree_map(lambda x: x[0], y0), state0


def _is_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def _as_array(x: Any):
    return jnp.asarray(x) if eqx.is_array_like(x) else x


def _order(ts: Array) -> Array:
    """Those that were saved in reverse, and what was not saved after them."""
    return (jnp.sum(jnp.isfinite(ts)) - 1 - jnp.arange(len(ts))) % len(ts)


def _step_times(t0, t1, dt0, step_ts, max_steps, direction) -> Array:
    """`t0`, and the ends of all steps, and then what is not finite."""
    if step_ts is None:
        # Those that diffrax makes, to the last bit.
        clock = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.zeros_like(y)),
            diffrax.Euler(),
            lax.stop_gradient(t0),
            lax.stop_gradient(t1),
            lax.stop_gradient(dt0),
            jnp.zeros((), t0.dtype),
            saveat=diffrax.SaveAt(steps=True, fn=lambda t, y, args: None),
            adjoint=diffrax.ForwardMode(),
            max_steps=max_steps,
        )
        step_ts = clock.ts
        assert step_ts is not None
    ts = jnp.concatenate([t0[None], jnp.asarray(step_ts, t0.dtype)])
    is_step = jnp.isfinite(ts)
    is_ordered = (ts[1:] * direction >= ts[:-1] * direction) & is_step[:-1]
    return eqx.error_if(
        ts,
        ~jnp.all(is_ordered | ~is_step[1:]) | (ts[jnp.sum(is_step) - 1] != t1),
        "`reverse_solve(step_ts=...)` must be the ends of all steps from `t0` to `t1`, "
        "in order and up to `t1` itself, as saved by `SaveAt(steps=True)`.",
    )


def _check_is_undone(solver: AbstractReversibleSolver, state: PyTree) -> None:
    # (Within a solve without jumps.)
    needs = solver.needs_checkpoint(state, state, False)
    wants = solver.wants_checkpoint(state, state, False)
    if needs is False and wants is False:
        return
    name = type(solver).__name__
    if isinstance(solver, UReversible):
        base = spelling(solver.solver)
        remedy = f"Use `UReversible({base}(), 0.999)`, in the solve to be undone too."
        name = f"{name}({base}())"
    elif getattr(solver, "full_sync", False):
        remedy = f"Use `{name}(full_sync=False)`, in the solve to be undone too."
        name = f"{name}(full_sync=True)"
    else:
        remedy = (
            "Save what is needed of the solution during the solve, for example with "
            "`SaveAt(steps=True)`."
        )
        name = f"{name}()"
    raise ValueError(
        f"`reverse_solve` cannot undo every step of `{name}`: where a step discards "
        "information, it can be undone only from a checkpoint, and a finished solve "
        f"has none. {remedy}"
    )


def _start(solver, terms, ts, args, y0) -> PyTree:
    state = solver.init(terms, ts[0], ts[1], y0, args)
    return jtu.tree_map(_as_array, state)


def _state_from_solution(solver, terms, t1, y1, args) -> PyTree:
    state = solver.init(terms, t1, t1, y1, args)
    # What a splitting keeps is an evaluation at the solution.
    if jtu.tree_leaves(state) and not isinstance(solver, AbstractSplitting):
        raise ValueError(
            f"`{type(solver).__name__}` has a state, without which its steps cannot be "
            "undone. Use `SaveAt(t1=True, solver_state=True)` in the solve, and "
            "`reverse_solve(..., solver_state=sol.solver_state)`."
        )
    return state


def _recorded(solver, terms, ts, args, y1, state) -> list[Array]:
    """The leaves of what `solver.recorded` selects, at the starts of all steps."""
    values = jtu.tree_leaves(solver.recorded(state))
    if len(values) == 0:
        return []
    if (
        isinstance(solver, AbstractCouplingSolver)
        and type(solver).steer is not AbstractCouplingSolver.steer
        and not isinstance(solver, LeapfrogMidpoint)
    ):
        raise NotImplementedError(
            f"`reverse_solve` does not support `{type(solver).__name__}`, which has "
            "both `recorded` and `steer`: what `steer` chose is lost after the solve. "
            "Save what is needed of the solution during the solve, for example with "
            "`SaveAt(steps=True)`."
        )

    # It does not depend on `y`. So the steps are made from anywhere, and what they
    # evaluate is not used.
    def body(values, interval):
        t0, t1 = interval
        state0 = with_recorded(solver, state, values)
        _, _, _, state1, _ = solver.step(terms, t0, t1, y1, args, state0, False)
        # (The times given to `StepTo` start with `t0`, which is no step.)
        new_values = [
            jnp.where(t0 == t1, old, new)
            for old, new in zip(values, jtu.tree_leaves(solver.recorded(state1)))
        ]
        return new_values, values

    _, recorded = lax.scan(body, values, (ts[:-1], ts[1:]))
    return stop_gradient(recorded)


def _check_start(sol, solver, rebuilt, start, end, tolerance):
    def parts(y, state):
        # (What else there is follows from these, or only chooses steps to come.)
        if isinstance(solver, AbstractCouplingSolver):
            return solver.split(y, state).registers
        return y, state

    rebuilt, start, end = stop_gradient([parts(*x) for x in (rebuilt, start, end)])
    drift = distance(rebuilt, start, end)
    if tolerance == "auto":
        tolerance = default_tolerance(drift)
    return eqx.error_if(
        sol,
        ~(drift <= tolerance),
        "`reverse_solve` arrived at `t0` in a state with which no solve starts, to "
        f"within `drift_tolerance={tolerance}` of its size. Either `terms`, `args`, "
        "`dt0` or `step_ts` are not those of the solve to be undone, or rounding "
        "errors have grown too much on the way back. If that solve was resumed, and so "
        "did not start at `t0`, use `drift_tolerance=None`.",
    )
