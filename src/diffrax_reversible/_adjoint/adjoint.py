import functools as ft
from typing import Any, Literal

import diffrax

from .._compat import host_loop, is_unsafe_sde, loop_without_saving
from .._registry import to_reversible
from .rule import inner_loop, outer_while_loop, with_arrays


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][] by undoing its steps.

    To be used with a reversible solver:
    [`diffrax_reversible.AbstractReversibleSolver`][], or an instance of
    [`diffrax.ReversibleHeun`][], [`diffrax.SemiImplicitEuler`][] or
    [`diffrax.LeapfrogMidpoint`][]. On the backward pass the input of every step is
    rebuilt from its output, in closed form. So the gradient of the discretised solve is
    exact up to rounding, takes time proportional to the number of steps, and memory for
    a fixed number of states and a record of the step times: one floating-point number
    for each step, one byte for what the solver wants or the step size controller
    reports, and whatever [`diffrax_reversible.AbstractReversibleSolver.recorded`][]
    selects. (For [`diffrax_reversible.UReversible`][] that is one byte.) The record of
    times is shared by the elements of a batch, under `jax.vmap`, if they make the same
    steps. And so is the gradient of what the elements share, under `jax.grad` of
    `jax.vmap`.

    Undoing a step may amplify rounding errors, as where the solution contracts, and
    some steps cannot be undone at all. So the solver asks for states to be kept, as
    many as it likes; how many is `sol.stats["num_checkpoints"]`. There are
    `checkpoints` slots for them. If they are not enough then every other one is
    dropped, as often as it takes; and on the backward pass what has been dropped is
    made again, forwards from the last one that is kept, with no more than `step`.
    (With 16 slots, that is 0.5 forward solves in all if 32 states are wanted, and 2.8
    if it is 1000.)

    At each state that is kept, and at the start, what has been rebuilt is verified:
    each element of the state, and what the vector field does with a gradient there. If
    it fails, then the backward pass begins anew with every 16th step wanted, and then
    with every step: in that case nothing is rebuilt. So an error of what is rebuilt
    costs time, and not the result.

    Gradients are computed with respect to `y0`, `args`, everything differentiable in
    `terms`, and values that the vector field, the control, the event function or
    `SaveAt(fn=...)` close over. And with respect to `t0`, `t1`, `SaveAt(ts=...)`, and
    the times in [`diffrax.StepTo`][] and [`diffrax.ClipStepSizeController`][]. All
    other locations of steps are constants for the purpose of differentiation, but for
    the two next to one of `ClipStepSizeController(step_ts=...)`, which move along with
    it; and so are `dt0` and the parameters of the step size controller. (The solution
    depends on them only through its error. So the gradient with respect to a time is
    that of the true solution up to the order of the solver, and so it is if the vector
    field jumps at one of `step_ts` or `jump_ts`; but finite differences of a coarse
    solve differ from it.)

    No more step times are recorded than take half the memory of the checkpoints of
    [`diffrax.RecursiveCheckpointAdjoint`][] (but 48 kB in any case), and at most those
    of 65536 steps; so a large `max_steps` costs nothing, nor does `max_steps=None`. If
    there are more steps than that, then they are made again piece by piece on the
    backward pass, from the states that are kept, which is about one more forward solve.

    It is differentiated in every mode: reverse (`jax.grad`), forward (`jax.jvp`,
    `jax.jacfwd`, `jax.linearize`), and twice in any order of these (`jax.hessian`).
    Forward mode makes the solve twice, once with tangents, and takes the memory of a
    solve. For second derivatives nothing is rebuilt: every state is wanted, and made
    again from the start, with its tangent, in the same slots.

    **Raises:**

    - `ValueError` if the solver is not reversible, or for a
        [`diffrax.UnsafeBrownianPath`][].
    - `NotImplementedError` for third derivatives; in forward mode with respect to
        `ClipStepSizeController(step_ts=...)`; and when differentiating with respect to
        something in a step size controller that is not one of diffrax's own.
    - `RuntimeError`, by the gradient alone and under `jax.jit` too, if the gradient is
        not finite though what it was pulled back from is. With
        `diffeqsolve(throw=False)` there is no error: the gradient is then not finite,
        under `jax.vmap` for that element of the batch alone. (And so for a step size
        controller that starts a step elsewhere than at the end of the step before.)

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

    def __check_init__(self):
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
        args,
        terms,
        solver,
        stepsize_controller,
        saveat,
        t1,
        init_state,
        throw,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
        **kwargs,
    ) -> Any:
        del passed_controller_state, passed_solver_state
        if is_unsafe_sde(terms):
            raise ValueError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffrax.UnsafeBrownianPath`, which cannot be queried again on the "
                "backward pass. Use `diffrax.VirtualBrownianTree`."
            )
        solver = to_reversible(solver)
        init_state = with_arrays(init_state)
        num_checkpoints = []
        bare_loop = ft.partial(
            loop_without_saving,
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            t1=t1,
            init_state=init_state,
            **{k: v for k, v in kwargs.items() if k != "event"},
        )
        outer = ft.partial(
            outer_while_loop,
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            t1=t1,
            bare_loop=bare_loop,
            checkpoints=self.checkpoints,
            checkpoint_every=self.checkpoint_every,
            sum_over_batch=self.sum_over_batch,
            throw=throw,
            num_checkpoints=num_checkpoints,
        )
        final_state, stats = host_loop(
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            t1=t1,
            init_state=init_state,
            progress_meter=progress_meter,
            inner_while_loop=ft.partial(inner_loop, kind="lax"),
            outer_while_loop=outer,
            **kwargs,
        )
        [n] = num_checkpoints
        return final_state, {**stats, "num_checkpoints": n}


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: The number of slots for states, each of which takes the memory of `y`
    and the solver state. More of them save time where many states are wanted.
    `"auto"` is 16, or fewer if `max_steps` is small: so many that the gradient takes
    less memory than with [`diffrax.RecursiveCheckpointAdjoint`][]. With `checkpoints=0`
    no state is kept but `y0` and one at hand, and what is wanted is made again from the
    start.
- `checkpoint_every`: If an integer `k` then the start of every `k`th step is wanted as
    well. Useful for a solver whose way back is not stable, and that does not say so:
    for otherwise that is only found out by a failure.
- `sum_over_batch`: Under `jax.grad` of `jax.vmap` gradients are summed over the batch
    where they are of what its elements share, as parameters are. If `True` that is done
    in every step of the backward pass: it takes the memory of one gradient, and not of
    one for each element, and products of matrices take the place of outer products. If
    `False` it is done once, after it: which is faster if these gradients are small; and
    for a batch that `jax.jit` splits over several devices, by the shardings of its
    arguments, as these would exchange their sums in every step. `"auto"` is `True` if
    the gradients of all elements would take more than 16 MB, there are more than four
    parameters for each number in `y`, and JAX has but one device. (Under
    `jax.shard_map` each device sums its own part, so `True` is better there; under
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
