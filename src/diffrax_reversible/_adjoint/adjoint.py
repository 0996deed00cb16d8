import functools as ft
from typing import Any, Literal

import diffrax
from jaxtyping import PyTree

from .._compat import host_loop, is_unsafe_sde
from .._method.controlled import precision
from .._registry import to_reversible
from .drift import check_tolerance
from .rule import inner_loop, Meter, outer_while_loop, with_arrays


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Backpropagate through [`diffrax.diffeqsolve`][] by undoing its steps.

    To be used with a reversible solver:
    [`diffrax_reversible.AbstractReversibleSolver`][], or an instance of
    [`diffrax.ReversibleHeun`][], [`diffrax.SemiImplicitEuler`][] or
    [`diffrax.LeapfrogMidpoint`][]. On the backward pass the input of every step is
    rebuilt from its output, in closed form. So the gradient of the discretised solve is
    exact up to rounding, is computed in time proportional to the number of steps `n`,
    and takes an amount of memory that does not grow with `n`, but for a record of the
    step times: one floating-point number for every step up to `max_steps`. (And one
    byte if the step size controller may report jumps, and whatever
    [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects: for
    [`diffrax_reversible.UReversible`][] one byte.) The record of times is shared by the
    elements of a batch, under `jax.vmap`, if they make the same steps. And so is the
    gradient of what the elements share, under `jax.grad` of `jax.vmap`.

    Undoing a step may amplify rounding errors, as where the solution contracts. So
    there are a fixed number of checkpoints, for a solver to ask for; and wherever the
    backward pass arrives at one, and at the start of the solve, what has been rebuilt
    is compared with what is stored. The number of them that was asked for is
    `sol.stats["num_checkpoints"]`.

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

    With `max_steps=None` the times of the last 65536 steps are recorded. If there are
    more then parts of the solve are run again on the backward pass, always from its
    start: for 2e5 steps that costs another solve in all, and for 1e6 steps seven.

    Second derivatives can be had by forward over reverse mode, `jax.jvp` of `jax.grad`;
    but not with [`diffrax_reversible.UReversible`][], unless its coupling is a number.

    **Raises:**

    - `ValueError` if the solver is not reversible, or for a
        [`diffrax.UnsafeBrownianPath`][].
    - `NotImplementedError` in forward mode; for second derivatives with
        `UReversible(..., coupling_parameter="auto")`; and when differentiating with
        respect to something in a step size controller that is not one of diffrax's
        own.
    - `RuntimeError` in reverse over reverse mode.
    - `RuntimeError`, by the gradient alone and under `jax.jit` too, if the solver asked
        for more checkpoints than there are; if the backward pass does not arrive at the
        stored states to `drift_tolerance`; or if these or the gradient are not finite.
        Under `jax.vmap`, if this is so for any element of the batch.

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
    drift_tolerance: float | int | Literal["auto"] | None = "auto"
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
        check_tolerance("ReversibleAdjoint", self.drift_tolerance)
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
        del throw, passed_controller_state
        if is_unsafe_sde(terms):
            raise ValueError(
                "`adjoint=ReversibleAdjoint()` does not support "
                "`diffrax.UnsafeBrownianPath`, which cannot be queried again on the "
                "backward pass. Use `diffrax.VirtualBrownianTree`."
            )
        solver = to_reversible(solver)
        init_state = with_arrays(init_state)
        num_checkpoints = []
        outer = ft.partial(
            outer_while_loop,
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            saveat=saveat,
            t1=t1,
            checkpoints=_num_slots(self.checkpoints, init_state.y),
            checkpoint_every=self.checkpoint_every,
            drift_tolerance=self.drift_tolerance,
            sum_over_batch=self.sum_over_batch,
            passed_solver_state=passed_solver_state,
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
            progress_meter=Meter(progress_meter),
            inner_while_loop=ft.partial(inner_loop, kind="lax"),
            outer_while_loop=outer,
            **kwargs,
        )
        [n] = num_checkpoints
        return final_state, {**stats, "num_checkpoints": n}


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: The number of slots for steps that the solver would like to be stored
    ([`diffrax_reversible.AbstractReversibleSolver.wants_checkpoint`][]) or cannot undo
    ([`diffrax_reversible.AbstractReversibleSolver.needs_checkpoint`][]), and for
    `checkpoint_every`. Each takes the memory of `y` and the solver state. No memory is
    used for them with solvers that never ask for one. `"auto"` is 64, or 128 if any
    part of `y` is in single precision (or less); there are no more than `max_steps`.
    With `checkpoints=0` the memory is that of the record alone, and the gradient of a
    solve that needs a checkpoint raises an error.
- `checkpoint_every`: If an integer `k` then every `k`th step is stored as well. Useful
    for a solver that is not stable on the way back, and does not say so.
- `drift_tolerance`: The largest acceptable difference between what has been rebuilt and
    what was stored, relative to the size of `y` (of each of its leaves, in root mean
    square). `"auto"` is 1e-5, or 6e-5 if any part of `y` is in single precision (or
    less). It is the *state* that is looked at: the gradient may be better or worse,
    usually by no more than a factor of 50. With `None` nothing is checked.
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
    `checkpoint_every` not a positive one or `None`, `drift_tolerance` not a positive
    number, `"auto"` or `None`, or `sum_over_batch` not a boolean
    or `"auto"`.
"""


def _num_slots(checkpoints: int | Literal["auto"], y: PyTree) -> int:
    if checkpoints == "auto":
        # With less precision more of them are needed; the memory is the same.
        return 64 if float(precision(y).eps) < 1e-12 else 128
    return checkpoints


def _check_sum_over_batch(value) -> None:
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(
            "`ReversibleAdjoint(sum_over_batch=...)` must be `True`, `False`, or "
            f'"auto"; got {value}.'
        )


def _is_integer(x):
    return isinstance(x, int) and not isinstance(x, bool)
