"""Solves drawn from all that can be combined: each has the right gradient, or an error
that says so.

A case is drawn from its number, and is compiled once for several parameters and both
directions of time. `nox -s fuzz` runs all cases, `nox -s fuzz -- -k 'case[17]'` one.
"""

import dataclasses
import functools as ft
import random
import re
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr

from .derivatives import random_signs
from .helpers import (
    flatten,
    GenericLeapfrog,
    make_args,
    make_terms,
    make_y,
    random_like,
    SolverCase,
    STRUCTURES,
)
from .test_gradient import CONTROLLERS, SAVEATS, TS, weighted_sum


NUM_CASES = 400
NUM_SEEDS = 4

BASES = [
    diffrax.Heun,
    diffrax.Midpoint,
    diffrax.Ralston,
    diffrax.Bosh3,
    diffrax.Tsit5,
    diffrax.Dopri5,
    diffrax.Dopri8,
]
SPLITTINGS = [
    dfxr.SemiImplicitEuler,
    diffrax.SemiImplicitEuler,
    dfxr.StormerVerlet,
    dfxr.ForestRuth,
    dfxr.Suzuki4,
    dfxr.BlanesMoan4,
    dfxr.BlanesMoan6,
    dfxr.KahanLi6,
    dfxr.KahanLi8,
]
# Each takes a source of randomness.
FAMILIES = {
    "u_reversible": lambda draw: SolverCase(
        dfxr.UReversible(
            draw.choice(BASES)(), draw.choice(["auto", "auto", 0.999, 0.7, 1])
        ),
        0,
        adaptive=True,
    ),
    "reversible_heun": lambda draw: SolverCase(
        draw.choice(
            [
                dfxr.ReversibleHeun(full_sync=draw.choice([True, False])),
                dfxr.ReversibleHeun(interpolation="linear"),
                diffrax.ReversibleHeun(),
            ]
        ),
        0,
        adaptive=True,
    ),
    "leapfrog": lambda draw: SolverCase(
        draw.choice(
            [
                dfxr.AsynchronousLeapfrog(full_sync=draw.choice([True, False])),
                dfxr.AsynchronousLeapfrog(damping=0.9),
            ]
        ),
        0,
        adaptive=True,
    ),
    "near_reversible": lambda draw: SolverCase(
        draw.choice([dfxr.EES25, dfxr.EES27])(), 0, adaptive=True
    ),
    "midpoint": lambda draw: SolverCase(
        draw.choice([dfxr.LeapfrogMidpoint(), diffrax.LeapfrogMidpoint()]),
        0,
        controls=("cde",),
    ),
    "splitting": lambda draw: SolverCase(draw.choice(SPLITTINGS)(), 0, pair=True),
    "user": lambda draw: SolverCase(GenericLeapfrog(), 0, controls=()),
    "as it is": lambda draw: draw.choice(
        [
            *[SolverCase(base(), 0, adaptive=True) for base in BASES],
            SolverCase(diffrax.Tsit5(scan_kind="lax"), 0, adaptive=True),
            SolverCase(diffrax.Euler(), 0),
            # (Not `HalfSolver`, of which the host's forward mode makes an error.)
            SolverCase(diffrax.Bosh3(scan_kind="lax"), 0, adaptive=True),
            SolverCase(diffrax.ImplicitEuler(), 0, adaptive=True, controls=()),
            SolverCase(diffrax.Kvaerno3(), 0, adaptive=True, controls=()),
        ]
    ),
}
EVENTS = {
    "none": None,
    "boolean": diffrax.Event(lambda t, y, args, **_: jnp.abs(t) > 0.62),
    "real": diffrax.Event(
        lambda t, y, args, **_: jnp.sum(jtu.tree_leaves(y)[0]) - args["level"]
    ),
}


ADJOINTS = [
    *3 * [dfxr.ReversibleAdjoint()],
    dfxr.ReversibleAdjoint(checkpoints=0),
    dfxr.ReversibleAdjoint(checkpoints=1),
    dfxr.ReversibleAdjoint(checkpoints=16, checkpoint_every=4),
    dfxr.ReversibleAdjoint(checkpoint_every=1),
]


@dataclasses.dataclass(frozen=True)
class Case:
    solver: SolverCase
    is_recomputed: bool
    kind: str
    structure: str
    dtype: Any
    controller: str
    saveat: str
    event: str
    max_steps: int | None
    adjoint: dfxr.ReversibleAdjoint
    batch: str


def draw_case(number: int) -> Case:
    draw = random.Random(number)
    # The first and the last are most of what the package is for.
    family = draw.choices(list(FAMILIES), weights=[5, 2, 2, 1, 1, 3, 1, 6])[0]
    solver = FAMILIES[family](draw)
    dtype = draw.choice([jnp.float64, jnp.float64, jnp.float32])
    controllers = ["constant"]
    if dtype == jnp.float64:
        controllers += ["step_to"]
    if solver.adaptive:
        # (The other two hold times in double precision.)
        controllers += ["pid"] if dtype == jnp.float32 else ["pid", "clip"]
    kind = draw.choice(["ode", "ode", *solver.controls])
    controller = draw.choice(controllers)
    if dtype == jnp.float32 and kind == "sde":
        # Along a rough path rounding decides which steps are accepted.
        controller = "constant"
    # The others have functions of one array.
    saveat = draw.choice(["t1", "mixed", "dense"] if solver.pair else list(SAVEATS))
    # The host keeps all steps only if it knows how many there may be.
    many = [] if saveat in ("steps", "subs", "dense") else [None]
    return Case(
        solver,
        family == "as it is",
        kind,
        draw.choice(list(STRUCTURES)) if saveat == "t1" else "vector",
        dtype,
        controller,
        saveat,
        draw.choice(["none", "none", "boolean", "real"]),
        draw.choice([48, 48, 48, 6, *many]),
        draw.choice(ADJOINTS),
        draw.choice(["none", "none", "sum", "per_example"]),
    )


def make_params(case: Case, seed: int):
    keys = jax.random.split(jax.random.key(seed), 3)
    terms = make_terms(case.solver, case.kind, case.structure, case.dtype, keys[0])
    y0 = random_like(make_y(case.solver, case.structure, case.dtype), keys[1])
    args = make_args(keys[2], case.dtype) | {"level": jnp.asarray(0.2, case.dtype)}
    return terms, y0, args


def make_loss(case: Case, adjoint, params, sign):
    """The loss as a function of what is differentiated, and that."""
    diff, static = eqx.partition(params, eqx.is_inexact_array)

    def solve(params, y0, t1):
        terms, _, args = params
        controller, dt0 = CONTROLLERS[case.controller](sign)
        sol = diffrax.diffeqsolve(
            terms,
            case.solver.solver,
            0.0,
            t1,
            None if dt0 is None else sign * dt0,
            y0,
            args,
            saveat=SAVEATS[case.saveat](sign * TS.astype(case.dtype)),
            stepsize_controller=controller,
            adjoint=adjoint,
            event=EVENTS[case.event],
            max_steps=case.max_steps,
            throw=False,
        )
        return weighted_sum(sol.ys)

    def loss(diff):
        params = eqx.combine(diff, static)
        _, y0, _ = params
        one = sign * jnp.asarray(1.0, case.dtype)
        if case.batch != "sum":
            return solve(params, y0, one)
        y0s, ends = _batch(y0), one * jnp.ones(3, case.dtype)
        return jnp.sum(jax.vmap(ft.partial(solve, params))(y0s, ends))

    return loss, diff


def _batch(tree):
    return jtu.tree_map(lambda x: jnp.stack([x, 0.4 * x, -x]), tree)


def make_derivatives(case: Case):
    """The gradient by our adjoint, and the derivative in a direction by forward mode:
    functions of the parameters and the direction of time."""

    @eqx.filter_jit
    def ours(params, sign):
        loss, diff = make_loss(case, case.adjoint, params, sign)
        run = jax.value_and_grad(loss)
        return jax.vmap(run)(_batch(diff)) if case.batch == "per_example" else run(diff)

    @eqx.filter_jit
    def reference(params, sign):
        loss, diff = make_loss(case, diffrax.ForwardMode(), params, sign)
        tangent = random_signs(diff)
        run = lambda diff: (*jax.jvp(loss, (diff,), (tangent,)), tangent)
        return jax.vmap(run)(_batch(diff)) if case.batch == "per_example" else run(diff)

    return ours, reference


def _flatten_each(case: Case, tree):
    """A row for each gradient."""
    if case.batch == "per_example":
        return np.stack(
            [flatten(jtu.tree_map(lambda x, i=i: x[i], tree)) for i in range(3)]
        )
    return flatten(tree)[None]


def check(number: int) -> list[str]:
    """What came of the solves of a case: each is right, or refused. (Or not finite with
    every adjoint.)"""
    case = draw_case(number)
    ours, reference = make_derivatives(case)
    outcomes = []
    for seed in range(NUM_SEEDS):
        for sign in (1.0, -1.0):
            arguments = make_params(case, seed), jnp.asarray(sign, case.dtype)
            try:
                value, derivative, tangent = jax.block_until_ready(
                    reference(*arguments)
                )
            except ValueError as e:
                # Before the first step, and so with every adjoint.
                with pytest.raises(ValueError, match=re.escape(str(e))):
                    ours(*arguments)
                return [*outcomes, "refused by the solver"]
            try:
                own_value, grad = jax.block_until_ready(ours(*arguments))
            except (RuntimeError, ValueError, NotImplementedError) as e:
                assert "ReversibleAdjoint" in str(e), str(e)
                outcomes.append("refused")
                continue
            values, derivatives = np.atleast_1d(value), np.atleast_1d(derivative)
            grads, tangents = _flatten_each(case, grad), _flatten_each(case, tangent)
            if not (np.all(np.isfinite(values)) and np.all(np.isfinite(derivatives))):
                outcomes.append("not finite")
                continue
            scale = np.sum(np.abs(grads), axis=1)
            # Rounding, amplified by what the steps forget; or what is not reversible.
            # (It may be much; what is looked for is what is wrong altogether.)
            tol = 1e-7 if case.dtype == jnp.float64 else 5e-3
            if case.is_recomputed and case.dtype == jnp.float64:
                # Some 1e4 roundings, each of them amplified by what comes after it.
                tol = 1e-11
            if isinstance(case.solver.solver, (dfxr.EES25, dfxr.EES27)):
                tol = max(tol, 1e-4)
            np.testing.assert_allclose(np.atleast_1d(own_value), values, tol, tol)
            error = np.abs(np.sum(grads * tangents, axis=1) - derivatives)
            assert np.all(error <= tol * np.maximum(scale, 1e-3)), error / scale
            outcomes.append("right")
    return outcomes


@pytest.mark.one_in(NUM_CASES // 8)
@pytest.mark.filterwarnings("ignore:.*not marked as converging.*:UserWarning")
@pytest.mark.parametrize("case", range(NUM_CASES))
def test_fuzz(case, record_property):
    record_property("outcomes", check(case))
