"""The loop over the steps of a solve, and the rule for its derivative."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import is_sub_save_at
from .._jax_compat import eqxi
from .._method.tree import replace, stop_gradient
from . import save as save, times as times_, verify as verify
from .coupling_pullback import make_pullback
from .derivative import differentiate
from .guard import without_tangents
from .hoist import Hoister
from .noise import Noise
from .plan import add_functions, made_jump_example, make_segments
from .problem import Derivative, Inputs
from .pullback import AbstractPullback, Step
from .residuals import Residuals


inner_loop = jax.named_call(eqxi.while_loop, name="inner-loop")


def with_arrays(init_state):
    """After a step what the state holds are arrays, and before it too."""
    if init_state.made_jump is True:
        # Or the host takes every step to follow a jump.
        init_state = replace(init_state, made_jump=jnp.array(True))
    # The initial solver state may hold Python scalars.
    solver_state = jtu.tree_map(
        lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x,
        init_state.solver_state,
    )
    controller_state = jtu.tree_map(
        lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x,
        init_state.controller_state,
    )
    return replace(
        init_state, solver_state=solver_state, controller_state=controller_state
    )


class Solve(NamedTuple):
    """What is solved, and how, as `ReversibleAdjoint.loop` is asked to."""

    args: PyTree
    # (With `noise` in the place of Brownian motions.)
    terms: PyTree
    solver: Any
    stepsize_controller: diffrax.AbstractStepSizeController
    saveat: diffrax.SaveAt
    event: diffrax.Event | None
    t1: Any
    throw: bool
    noise: Noise
    # For its options.
    adjoint: Any
    # Of a step that is not undone. `None` if the solver is reversible.
    recomputed: AbstractPullback | None
    # The host's loop, of a state that saves nothing: see `loop_without_saving`.
    bare_loop: Callable

    @property
    def subs(self) -> list[diffrax.SubSaveAt]:
        return jtu.tree_leaves(self.saveat.subs, is_leaf=is_sub_save_at)


def outer_while_loop(
    cond_fun,
    body_fun,
    init_state,
    *,
    max_steps,
    buffers,
    solve: Solve,
    num_wanted: list,
):
    """The host's loop over steps, with our rule for differentiating it. How many states
    were wanted is put into `num_wanted`.

    `solver.init`, saving at `t0` and `t1`, locating an event, and all else that the
    host does before and after, lies outside this function and is differentiated by JAX.
    """
    init_state = with_arrays(init_state)
    made_jump = made_jump_example(solve.stepsize_controller, init_state, solve.args)
    pullback = solve.recomputed
    if pullback is None:
        pullback = make_pullback(solve.solver, init_state.solver_state, made_jump)
    initial_solver_state = init_state.solver_state
    # (Otherwise differentiated by JAX.)
    solver_state = pullback.prepare(solve.terms, solve.args, init_state)
    init_state = without_tangents(replace(init_state, solver_state=solver_state))
    times, unknown = _times(solve, init_state)

    def run(segments, init_state, times, records):
        final_state, residuals = segments.run(
            cond_fun,
            _located(times, body_fun),
            init_state,
            max_steps=max_steps,
            buffers=buffers,
            records=records,
        )
        return _located_at_end(times, final_state), residuals

    derivative, consts = _make_derivative(
        solve, pullback, init_state, made_jump, times, max_steps, run
    )
    inputs = Inputs(init_state, times, without_tangents(consts), unknown)
    final_state, residuals = _loop(inputs, derivative=derivative, records=False)
    # Handed to `ReversibleAdjoint.loop` past the host, which calls this.
    num_wanted.append(residuals.num_wanted)
    solver_state = pullback.stop_recorded(final_state.y, final_state.solver_state)
    n = final_state.num_accepted_steps
    solver_state = pullback.finish(initial_solver_state, solver_state, n)
    final_state = replace(final_state, solver_state=solver_state)
    return _stop_steps(solve.stepsize_controller, init_state, final_state)


def _times(solve: Solve, init_state) -> tuple[times_.Times, PyTree]:
    """Those that can be differentiated; and what is in the step size controller that we
    do not know."""
    constant = times_.constant(solve.stepsize_controller, init_state)
    controller, clipped, unknown = times_.controller_times(
        solve.stepsize_controller, init_state.tprev.dtype
    )
    saved = tuple(sub.ts for sub in solve.subs)
    times = (init_state.tprev, solve.t1, saved, controller, clipped, constant)
    return times_.Times(*times), unknown


def _make_derivative(
    solve: Solve,
    pullback: AbstractPullback,
    init_state,
    made_jump: Any,
    times: times_.Times,
    max_steps: int | None,
    run: Callable,
) -> tuple[Derivative, Sequence[Any]]:
    """What the rule needs, as functions whose constants are explicit; and these."""
    terms, args, solver, noise = solve.terms, solve.args, solve.solver, solve.noise
    step = Step.example(init_state, made_jump)
    t0, t_next, y0, solver_state0, _ = step
    noise.learn(
        lambda: solver.step(terms, t0, t_next, y0, args, solver_state0, made_jump)
    )
    # Those of single steps come first, and of these the step itself: how much memory
    # there is for segments depends on it.
    hoister = Hoister()
    add_functions(pullback, hoister, terms, args, step, init_state, max_steps)
    segments = make_segments(
        *(pullback, noise, init_state, made_jump, hoister),
        is_uniform=times.constant is not None,
        max_steps=max_steps,
        checkpoints=solve.adjoint.checkpoints,
        checkpoint_every=solve.adjoint.checkpoint_every,
    )
    if pullback.undoes:
        verify.add_functions(hoister, solver, terms, args, step)
    for i, sub in enumerate(solve.subs):
        save.add_functions(hoister, i, sub, solver, terms, args, step)
    num_local = hoister.num_consts
    hoister.add("run", ft.partial(run, segments), init_state, times, jnp.array(True))
    segments.add_recompute(
        hoister, init_state, times, solve.bare_loop, _located, (terms, args)
    )
    hoisted, consts = hoister.finish()
    at_steps = times_.AtSteps.of(
        *(solve.stepsize_controller, solve.subs, solve.event, init_state.event_values)
    )
    options = solve.adjoint.sum_over_batch, solve.throw
    return Derivative(hoisted, num_local, segments, at_steps, *options), consts


def _stop_steps(stepsize_controller, init_state, final_state):
    """The locations of the steps are constants, and what else depends on them alone;
    and the host makes nothing of the last values of event functions but comparisons."""
    controller_state = stop_gradient(final_state.controller_state)
    if type(stepsize_controller) is diffrax.ConstantStepSize:
        # But this holds the times that it was given, for a solve that goes on with it.
        given = eqx.filter(init_state.controller_state, eqx.is_inexact_array)
        controller_state = eqx.combine(given, controller_state)
    return replace(
        final_state,
        tnext=stop_gradient(final_state.tnext),
        controller_state=controller_state,
        progress_meter_state=stop_gradient(final_state.progress_meter_state),
        event_values=stop_gradient(final_state.event_values),
    )


def _located(times: times_.Times, body_fun: Callable) -> Callable:
    """The body of the loop, as a function of where steps start and end."""

    def located(state):
        n = state.num_accepted_steps
        tprev = times_.locate(times, state.tprev, n)
        tnext = times_.locate(times, state.tnext, n + 1)
        return body_fun(replace(state, tprev=tprev, tnext=tnext))

    return located


def _located_at_end(times: times_.Times, state):
    n = state.num_accepted_steps
    state = replace(state, tprev=times_.locate(times, state.tprev, n))
    if state.event_tprev is None:
        return state
    return replace(
        state,
        event_tprev=times_.locate(times, state.event_tprev, jnp.maximum(n - 1, 0)),
        event_tnext=times_.locate(times, state.event_tnext, n),
    )


@eqx.filter_custom_jvp
def _loop(
    inputs: Inputs, *, derivative: Derivative, records: bool
) -> tuple[Any, Residuals]:
    return derivative.run(inputs, records)


@_loop.def_jvp
def _loop_jvp(primals, tangents, *, derivative: Derivative, records: bool):
    del records
    (inputs,), (t_inputs,) = primals, tangents
    # (By itself, so that it can be differentiated again.)
    final_state, residuals = _loop(inputs, derivative=derivative, records=True)
    t_final_state = differentiate(derivative, inputs, final_state, residuals, t_inputs)
    t_residuals = jtu.tree_map(lambda _: None, residuals)
    return (final_state, residuals), (t_final_state, t_residuals)
