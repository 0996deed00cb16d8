import functools as ft
from typing import Any, Literal

import diffrax
import jax.tree_util as jtu

from .._compat import (
    host_loop,
    is_sub_save_at,
    is_unsafe_sde,
    loop_without_saving,
    PyTree,
    RealScalarLike,
    Terms,
)
from .._registry import as_reversible
from .noise import Noise
from .recomputed import make_recomputed
from .rule import inner_loop, outer_while_loop, Solve, with_arrays


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Differentiates any [`diffrax.diffeqsolve`][]: the exact gradient of the
    discretised solve, with any solver, in every mode of differentiation.

    Use it as `diffeqsolve(..., adjoint=ReversibleAdjoint())`. Steps of a *reversible*
    solver are undone on the backward pass, in memory that hardly grows with the number
    of steps. Those of any other are recomputed from stored states. Then the solution is
    that of the solver, and the gradient with respect to `y0` and parameters that of
    [`diffrax.RecursiveCheckpointAdjoint`][], but for rounding. (In single precision, or
    of an SDE, rounding can be enough for an adaptive step size controller to choose
    other steps, which are as good; and output at the steps themselves shows any
    difference of theirs.) Reversible are the solvers of this package, any other
    [`diffrax_reversible.AbstractReversibleSolver`][], and [`diffrax.ReversibleHeun`][],
    [`diffrax.SemiImplicitEuler`][] and [`diffrax.LeapfrogMidpoint`][].

    **Segments:** The state at every `n`th step is stored; if there is no more room then
    of the earliest of these every third is left, and so on. (In a batch the states of
    all elements are stored when the first has made `n` steps.) The backward pass goes
    from one of these segments to the one before. It recomputes the steps of a segment,
    from the last stored state before it, with the step size controller; and then it
    differentiates each at its start. So a step costs one more step, and one with its
    pullback. (Of the last `n` steps nothing is recomputed, and so of no step of a short
    solve.)

    By default as many states are stored as take 0.6 of the memory of the checkpoints of
    [`diffrax.RecursiveCheckpointAdjoint`][], for each element of a batch; or up to all
    of it, until each of `max_steps` steps is recomputed only once, which takes some
    `2 * sqrt(max_steps)` states. (Large parameters count as a few more checkpoints.) If
    that is not enough, or with `max_steps=None`, some steps of a long solve are
    recomputed twice, or more often. With what the loops need, memory has been 0.1 to
    1.1 times that of the default adjoint where this takes more than 30 kB. Where the
    values inside a stage are much larger than `y`, as of wide layers, those of one
    stage are kept at a time (for one more evaluation a stage, if it is an explicit
    Runge--Kutta solver for ODEs, or `UReversible` of one), and it has been up to 1.6
    times; or 2 to 5, if the weights of several layers are in one array. (On CPUs from
    JAX 0.12 on: before it XLA keeps those of all stages, up to 7 times.)

    A [`diffrax.VirtualBrownianTree`][] is asked for its value at the end of each step
    of a solve, and once more where the step is recomputed: not at the starts of steps,
    nor when a step is differentiated, as the increments of the steps of a segment are
    stored with their states. (Unless a term asks for them within a transformation of
    JAX; or if what is differentiated are the path's own arrays.)

    The stages of an explicit Runge--Kutta solver for ODEs that is given by its tableau
    are unrolled (or made by a loop, if they have more than 1000 operations, or with
    `Tsit5(scan_kind="lax")`). All other solvers are run as they are, and root finders
    are differentiated implicitly, as by diffrax.

    The rest, up to *Derivatives*, is about reversible solvers.

    **Reversible solvers:** The steps of a segment are undone, and differentiated on the
    way; the docstring of each solver gives the evaluations. At most 32 states are
    kept (or as many as take 64 kB): a third of them is stored, and the others are those
    of a segment. Of each step there is a record: one floating-point number (a byte with
    [`diffrax.ConstantStepSize`][]; two, and a byte, if there may be jumps), and what
    [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects (one byte for
    [`diffrax_reversible.UReversible`][]). It takes at most a fifth of the memory of the
    checkpoints of [`diffrax.RecursiveCheckpointAdjoint`][], or two fifths with constant
    steps, for each element of a batch; earlier steps than it has room for are
    recomputed.

    Some steps cannot be undone: one that changes an element of the state which is at
    rest, or was (as a step holds it exactly, or hardly moves it), since vector fields
    often have a kink there, such as at zero; and of some solvers others. And where the
    solution contracts undoing a step amplifies rounding errors. So the solver says at
    which other steps the state should be stored; `sol.stats["num_checkpoints"]` is how
    many these are. A segment with such a step is recomputed, as with any other solver.

    **Verification:** At each stored state, at the start, and where a segment has been
    recomputed, what was rebuilt is compared with it: each element of `y` and of the
    solver state, and what the vector field does with a gradient there. If they differ,
    then the backward pass begins anew, and recomputes every segment. An error in what
    is rebuilt costs time, and does not change the result. What is recomputed is
    compared in turn, with where the backward pass stands. If it differs, as a solution
    amplifies rounding beyond all digits, an error is raised: that has no cure but more
    `checkpoints`.

    !!! warning

        A kink that a step starts at exactly while the solution moves on, or a second
        copy of it, such as that of `jnp.max(y)` where two elements are equal, cannot be
        told from its neighbourhood, unless the derivative of the vector field differs
        at a stored state. Nor can one which stages of a step are on either side of by
        rounding alone. If there are such then take a solver that is not reversible,
        such as `solver` for `UReversible(solver)`: what is recomputed is exact.

    **Derivatives:** Gradients are computed with respect to `y0`, `args`, everything
    differentiable in `terms`, and values that the vector field, the control, the event
    function or `SaveAt(fn=...)` close over; and with respect to `t0`, `t1`,
    `SaveAt(ts=...)`, and the times in [`diffrax.StepTo`][] and
    [`diffrax.ClipStepSizeController`][]. With [`diffrax.ConstantStepSize`][] the steps
    move with `t0`, `t1` and `dt0`, as they do in diffrax. The steps that an adaptive
    controller chose are constants, except `t0`, `t1` and times passed to it; the two
    steps next to one of `ClipStepSizeController(step_ts=...)` move along with it. So
    the gradient with respect to its `dt0` and to tolerances is zero. (Output at given
    times depends on step times only through its error. So its gradient with respect to
    a time is that of the true solution up to the order of the solver, also if the
    vector field jumps at one of `step_ts` or `jump_ts`; but finite differences of a
    coarse solve differ from it. Second derivatives with respect to these times are of
    one order less.) If the controller is not told of the time of a jump then the
    gradient with respect to that time is zero, and with constant steps those with
    respect to `t0`, `t1` and `dt0` leave out what the jump does to them, as with any
    adjoint of diffrax: give it to `ClipStepSizeController(jump_ts=...)`.

    **Output at steps:** What `SaveAt(steps=...)` saves depends on where steps end, its
    times above all. So does what is output at the end of a solve that ends at a step:
    at an event that has no root finder, or whose condition is a boolean; or at
    `max_steps`, with `throw=False`. If an adaptive step size controller chose the
    steps, then a gradient of such output with respect to `t0`, `t1`, or the times in
    the controller raises an error, except of what is output at one of these times.
    (With respect to `y0`, parameters and tolerances, the steps that it chose are
    constants, as in diffrax.)

    !!! warning

        A vector field that jumps at `t0` or `t1` itself must have there the value that
        it has within the solve, and a time in `StepTo` should not be that of a jump.
        Otherwise the gradient with respect to *that* time is wrong, without an error.

    **Modes:** Reverse (`jax.grad`), forward (`jax.jvp`, `jax.jacfwd`, `jax.linearize`),
    and twice in any order of these (`jax.hessian`). Forward mode makes the solve twice,
    once with tangents, in the memory of a gradient. For second derivatives nothing is
    rebuilt: every state is recomputed from the start, with its tangent.

    **Raises:**

    - `ValueError` for a [`diffrax.UnsafeBrownianPath`][].
    - `NotImplementedError` for third derivatives; in forward mode with respect to
        `ClipStepSizeController(step_ts=...)`; and when differentiating with respect to
        something in a step size controller that is not one of diffrax's own.
    - `RuntimeError`, raised by the gradient alone and under `jax.jit` too, if the
        gradient is not finite though the solution that it is pulled back from is; if it
        is one of output at steps that is not known, or if the states of a solve cannot
        be recomputed, see above; and if a solve with an event stops at `max_steps` with
        a rejected step. With `diffeqsolve(throw=False)` the gradient is not finite
        instead, under `jax.vmap` for that element of the batch alone.

    ??? cite "Reference"

        ```bibtex
        @article{mccallum2024efficient,
            title={Efficient, Accurate and Stable Gradients for Neural {ODE}s},
            author={McCallum, Sam and Foster, James},
            journal={arXiv preprint arXiv:2410.11648},
            year={2024}
        }
        ```
    """

    checkpoints: int | Literal["auto"] = "auto"
    checkpoint_every: int | None = None
    sum_over_batch: bool | Literal["auto"] = "auto"

    def __check_init__(self) -> None:
        n = self.checkpoints
        if n != "auto" and (not _is_integer(n) or n < 0):
            raise ValueError(
                "`ReversibleAdjoint(checkpoints=...)` must be a nonnegative integer, "
                f'or "auto"; got {n}.'
            )
        if self.checkpoint_every is not None and (
            not _is_integer(self.checkpoint_every) or self.checkpoint_every < 1
        ):
            raise ValueError(
                "`ReversibleAdjoint(checkpoint_every=...)` must be a positive integer, "
                f"or `None`; got {self.checkpoint_every}."
            )
        _check_sum_over_batch(self.sum_over_batch)

    def loop(
        self,
        *,
        args: PyTree,
        terms: Terms,
        solver: diffrax.AbstractSolver[Any],
        stepsize_controller: diffrax.AbstractStepSizeController[Any, Any],
        saveat: diffrax.SaveAt,
        event: diffrax.Event | None,
        t1: RealScalarLike,
        init_state: Any,
        throw: bool,
        passed_solver_state: bool,
        passed_controller_state: bool,
        progress_meter: diffrax.AbstractProgressMeter[Any],
        **kwargs: Any,
    ) -> Any:
        """Called by [`diffrax.diffeqsolve`][]."""
        del passed_controller_state, passed_solver_state
        if is_unsafe_sde(terms):
            raise ValueError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffrax.UnsafeBrownianPath`, which cannot be queried again on the "
                "backward pass. Use `diffrax.VirtualBrownianTree`."
            )
        reversible, recomputed = as_reversible(solver), None
        noise = Noise(terms)
        if reversible is None:
            subs = jtu.tree_leaves(saveat.subs, is_leaf=is_sub_save_at)
            has_times = any(sub.ts is not None for sub in subs)
            interpolates = has_times or saveat.dense or event is not None
            recomputed = make_recomputed(solver, interpolates, noise)
            solver = recomputed.solver
        else:
            solver = reversible
        kwargs |= dict(
            args=args,
            terms=noise.terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            t1=t1,
            init_state=with_arrays(init_state),
        )
        solve = Solve(
            args=args,
            terms=noise.terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            event=event,
            t1=t1,
            throw=throw,
            noise=noise,
            adjoint=self,
            recomputed=recomputed,
            bare_loop=ft.partial(loop_without_saving, **kwargs),
        )
        num_wanted: list[Any] = []
        final_state, stats = host_loop(
            saveat=saveat,
            event=event,
            progress_meter=progress_meter,
            inner_while_loop=ft.partial(inner_loop, kind="lax"),
            outer_while_loop=ft.partial(
                outer_while_loop, solve=solve, num_wanted=num_wanted
            ),
            **kwargs,
        )
        [n] = num_wanted
        return final_state, {**stats, "num_checkpoints": n}


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: How many states may be stored, those of a segment included. Each
    takes the memory of `y` and the solver state. `"auto"` is as many as fit into the
    memory of [`diffrax.RecursiveCheckpointAdjoint`][], see *Segments*; and for a
    reversible solver 32, or as many as take 64 kB if these are more: give more to save
    time where it wants many. With as many as `max_steps` no step is recomputed, unless
    the solver is reversible. With `checkpoints=0` only `y0` and one state at hand are
    kept, and whatever else is wanted is recomputed from the start.
- `checkpoint_every`: If an integer `k` then the state at every `k`th step of a
    reversible solver is wanted too. Use it for one whose steps are not undone well and
    that does not say so; otherwise that is found out by verification alone. (It is of
    no effect with any other solver, of which every step is recomputed.)
- `sum_over_batch`: Whether, under `jax.grad` of `jax.vmap`, the gradients of what the
    elements of the batch share, such as parameters, are summed over the batch in every
    step of the backward pass, or once after it. `True` takes the memory of one gradient
    and not of one for each element, and products of matrices take the place of outer
    products. `False` is faster, by a tenth, if there are few parameters; and for a
    batch that `jax.jit` splits over several devices, by the shardings of its arguments,
    as these would exchange their sums in every step. `"auto"` is `True` if there are
    more than four parameters for each number in `y`, and JAX has but one device. (Under
    `jax.shard_map` each device sums its own part, so `True` is better there. Under
    `jax.vmap(..., spmd_axis_name=...)` it is always `False`.)

**Raises:**

- `ValueError` if `checkpoints` is not a nonnegative integer or `"auto"`,
    `checkpoint_every` not a positive one or `None`, or `sum_over_batch` not a boolean
    or `"auto"`.
"""


def _check_sum_over_batch(value) -> None:
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(
            "`ReversibleAdjoint(sum_over_batch=...)` must be `True`, `False`, or "
            f'"auto"; got {value}.'
        )


def _is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)
