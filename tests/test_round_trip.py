"""`backward_step` undoes `step`, and the other way round."""

import functools as ft

import diffrax
import equinox as eqx
import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

import diffrax_reversible as dfxr

from .helpers import (
    from_term,
    make_args,
    make_terms,
    make_y,
    random_like,
    REVERSIBLE,
    STRUCTURES,
)


BATCH = 32


def _states(case, terms, t0, t1, args, dtype, structure, key, spread):
    """A state at `t0` that need not be one at which a solve starts: the registers are
    apart by `spread`."""
    key1, key2 = jax.random.split(key)
    y0 = random_like(make_y(case, structure, dtype), key1)
    solver_state = case.solver.init(terms, t0, t1, y0, args)
    solver_state = jtu.tree_map(jnp.asarray, solver_state)

    def perturb(x, noise):
        return x + spread * noise if eqx.is_inexact_array(x) else x

    if isinstance(case.solver, dfxr.ReversibleHeun):
        # The kept evaluation must be that at the perturbed register.
        yhat, _, *rest = solver_state
        yhat = jtu.tree_map(perturb, yhat, random_like(yhat, key2))
        solver_state = (yhat, terms.vf(t0, yhat, args), *rest)
    elif isinstance(case.solver, dfxr.LeapfrogMidpoint):
        t_prev, y_prev, *rest = solver_state
        y_prev = jtu.tree_map(perturb, y_prev, random_like(y_prev, key2))
        solver_state = (t_prev - 0.7 * (t1 - t0), y_prev, *rest)
    elif isinstance(case.solver, dfxr.AbstractSplitting):
        pass  # No register but `y`, at which the kept evaluation is.
    elif getattr(case.solver, "coupling_parameter", None) == "auto":
        z, _, account = solver_state
        z = jtu.tree_map(perturb, z, random_like(z, key2))
        code = jax.random.randint(key2, (), 0, 25).astype(jnp.uint8)
        solver_state = (z, code, account)
    else:
        inexact = eqx.filter(solver_state, eqx.is_inexact_array)
        inexact = jtu.tree_map(perturb, inexact, random_like(inexact, key2))
        solver_state = eqx.combine(inexact, solver_state)
    return y0, solver_state


def _distance(x, y):
    """Largest difference and largest element."""
    xs = [x for x in jtu.tree_leaves(x) if eqx.is_inexact_array(x)]
    ys = [y for y in jtu.tree_leaves(y) if eqx.is_inexact_array(y)]
    zero = jnp.zeros((), xs[0].dtype) if xs else jnp.array(0.0)
    diff = [jnp.max(jnp.abs(a - b)) for a, b in zip(xs, ys)]
    size = [jnp.max(jnp.abs(b)) for b in ys]
    return ft.reduce(jnp.maximum, diff, zero), ft.reduce(jnp.maximum, size, zero)


def _with_recorded(solver, solver_state1, solver_state0):
    """What the adjoint hands to `backward_step`."""
    values = jtu.tree_leaves(solver.recorded(solver_state0))
    if len(values) == 0:
        return solver_state1
    where = lambda s: jtu.tree_leaves(solver.recorded(s))
    return eqx.tree_at(where, solver_state1, values)


@ft.cache
def _compiled(name, kind, structure, dtype):
    case = REVERSIBLE[name]
    solver = case.solver

    def one(key, h, spread):
        keys = jax.random.split(key, 4)
        terms = make_terms(case, kind, structure, dtype, keys[0])
        args = make_args(keys[1], dtype)
        t0 = jax.random.uniform(keys[2], (), dtype, -1, 1)
        t1 = t0 + h
        y0, state0 = _states(
            case, terms, t0, t1, args, dtype, structure, keys[3], spread
        )
        step = ft.partial(solver.step, terms, t0, t1)
        backward = ft.partial(solver.backward_step, terms, t0, t1)
        y1, _, dense_info, state1, _ = step(y0, args, state0, False)
        state1_ = _with_recorded(solver, state1, state0)
        y0_, dense_info_, state0_ = backward(y1, args, state1_, False)
        # And the other way round, from a state at `t1`.
        y2, state2 = _states(
            case, terms, t1, t1 + h, args, dtype, structure, keys[3], spread
        )
        ym, _, statem = backward(y2, args, state2, False)
        y2_, _, _, state2_, _ = step(ym, args, statem, False)

        rebuilt = ft.partial(_rebuilt, solver)
        there, size = _distance(
            (rebuilt(y0_, state0_), dense_info_), (rebuilt(y0, state0), dense_info)
        )
        _, size1 = _distance(rebuilt(y1, state1), rebuilt(y1, state1))
        back, size2 = _distance(rebuilt(y2_, state2_), rebuilt(y2, state2))
        _, size3 = _distance(rebuilt(ym, statem), rebuilt(ym, statem))
        return there, jnp.maximum(size, size1), back, jnp.maximum(size2, size3)

    return jax.jit(jax.vmap(one))


def _rebuilt(solver, y, solver_state):
    """Without what is recorded, or only chosen."""
    if isinstance(solver, dfxr.AbstractCouplingSolver):
        registers = solver.split(y, solver_state)
        return registers.registers, registers.value
    recorded = {id(x) for x in jtu.tree_leaves(solver.recorded(solver_state))}
    return y, [x for x in jtu.tree_leaves(solver_state) if id(x) not in recorded]


CONFIGURATIONS = [
    (name, kind, structure, dtype)
    for name, case in REVERSIBLE.items()
    for kind, structure, dtype in (
        ("ode", "pytree", jnp.float32),
        *([("ode", "none", jnp.float64)] if case.host is case.noise is None else []),
        # All of them are in the gradients.
        *(
            (kind, "vector", jnp.float64)
            for kind in case.controls[:1]
            if case.noise is None
        ),
    )
]


@pytest.mark.parametrize("name,kind,structure,dtype", CONFIGURATIONS)
@hyp.settings(max_examples=10)
@hyp.given(
    seed=st.integers(0, 2**31 - 1),
    h_max=st.floats(1e-3, 0.7),
    sign=st.sampled_from([-1, 1]),
    spread=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_round_trip(name, kind, structure, dtype, seed, h_max, sign, spread):
    assert structure in STRUCTURES
    case = REVERSIBLE[name]
    key1, key2 = jax.random.split(jax.random.key(seed))
    h = sign * jax.random.uniform(key1, (BATCH,), dtype, 0.01 * h_max, h_max)
    there, size, back, size_back = _compiled(name, kind, structure, dtype)(
        jax.random.split(key2, BATCH), h, jnp.full(BATCH, spread, dtype)
    )
    # Some twenty roundings each way, of numbers no larger than `size`, amplified by the
    # coupling parameter and by the Lipschitz constant of the increments: about `h L`
    # with `L` below 10 for these networks, twice a step.
    tol = 64 * jnp.finfo(dtype).eps * case.amplification
    assert jnp.all(there <= tol * (1 + size))
    assert jnp.all(back <= tol * (1 + size_back))


@pytest.mark.parametrize("name", REVERSIBLE)
@hyp.settings(max_examples=5)
@hyp.given(seed=st.integers(0, 2**31 - 1))
def test_many_steps(name, seed):
    # A rotation: nothing decays, so that what one step back loses is all that is lost.
    n = 200
    case = REVERSIBLE[name]
    terms, y0 = _rotation(case)
    y0 = random_like(y0, jax.random.key(seed))
    error = _many_steps(name, n)(y0)
    # eps a step, times 1 / coupling_parameter: 0.5**200 is beyond any precision.
    bound = 64 * n * jnp.finfo(jnp.float64).eps * (1 / 0.999) ** n
    if not case.forgets:
        assert error < bound
    else:
        assert not error < bound


def _rotation(case):
    if case.pair:
        terms = (
            diffrax.ODETerm(lambda t, q, args: -q),
            diffrax.ODETerm(lambda t, p, args: p),
        )
        return terms, (jnp.zeros(2), jnp.zeros(2))
    term = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    return from_term(case, term), jnp.zeros(2)


@ft.cache
def _many_steps(name, n):
    case = REVERSIBLE[name]
    solver = case.solver
    terms, _ = _rotation(case)
    ts = jnp.linspace(0.0, 20.0, n + 1)

    @jax.jit
    def run(y0):
        state0 = solver.init(terms, ts[0], ts[1], y0, None)
        state0 = jtu.tree_map(jnp.asarray, state0)

        def forward(carry, interval):
            y, state = carry
            y1, _, _, state1, _ = solver.step(terms, *interval, y, None, state, False)
            return (y1, state1), solver.recorded(state)

        def backward(carry, x):
            y, state = carry
            interval, recorded = x
            values = jtu.tree_leaves(recorded)
            if len(values) > 0:
                where = lambda s: jtu.tree_leaves(solver.recorded(s))
                state = eqx.tree_at(where, state, values)
            y0, _, state0 = solver.backward_step(
                terms, *interval, y, None, state, False
            )
            return (y0, state0), None

        intervals = (ts[:-1], ts[1:])
        end, recorded = jax.lax.scan(forward, (y0, state0), intervals)
        start, _ = jax.lax.scan(backward, end, (intervals, recorded), reverse=True)
        diff, size = _distance(_rebuilt(solver, *start), _rebuilt(solver, y0, state0))
        return diff / size

    return run
