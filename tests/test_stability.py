"""`UReversible(base)` is as good as `base` where the published coupling fails: its
coupling is controlled, what it forgets is kept, and what drifts is found and cured.
`diagnose` tells all of that."""

import functools as ft
import math
import re

import diffrax
import equinox as eqx
import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan, verify
from diffrax_reversible._method import controlled

from .helpers import GenericUReversible, relative_difference


EPS = float(jnp.finfo(jnp.float64).eps)


#
# The mathematics of `_controlled`
#


def _with_code(solver_state, code):
    z, _, account = solver_state
    return z, code, account


@ft.cache
def _error_with_codes(base, num_steps):
    solver = dfxr.UReversible(base)
    term = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) - t]))
    y0 = jnp.array([0.5, 0.3])
    ts = jnp.linspace(0.0, 1.0, num_steps + 1)
    fine = diffrax.diffeqsolve(
        term, diffrax.Dopri8(), 0.0, 1.0, 1e-3, y0, max_steps=1001
    )

    @jax.jit
    def error(codes):
        def step(carry, x):
            y, state = carry
            t0, t1, code = x
            y, _, _, state, _ = solver.step(
                term, t0, t1, y, None, _with_code(state, code), False
            )
            return (y, state), None

        start = (y0, solver.init(term, ts[0], ts[1], y0, None))
        (y, _), _ = jax.lax.scan(step, start, (ts[:-1], ts[1:], codes))
        return jnp.max(jnp.abs(y - fine.ys[0]))

    return error


@pytest.mark.parametrize(
    "base,few,many",
    [(diffrax.Heun(), 20, 80), (diffrax.Bosh3(), 20, 80), (diffrax.Tsit5(), 8, 24)],
    ids=lambda x: type(x).__name__,
)
@hyp.settings(max_examples=10)
@hyp.given(seed=st.integers(0, 2**31 - 1), most=st.sampled_from([0, 8, 80, 255]))
def test_order_for_every_sequence(base, few, many, seed, most):
    codes = np.random.default_rng(seed).integers(0, most + 1, many).astype(np.uint8)
    for i in range(1, many):
        # As the control does: or the other copy would be a step behind.
        if controlled.leaves_out(jnp.asarray(codes[i - 1])):
            codes[i] = controlled._SYNC
    errors = [_error_with_codes(base, n)(jnp.asarray(codes[:n])) for n in (few, many)]
    slope = math.log(errors[0] / errors[1]) / math.log(many / few)
    # Not an asymptotic slope; and a sequence drawn twice is not the same one.
    assert slope > base.order(None) - 0.5


@pytest.mark.parametrize(
    "base", [diffrax.Heun(), diffrax.Tsit5(), diffrax.Dopri8()], ids=lambda x: str(x)
)
def test_spectrum(base):
    solver = dfxr.UReversible(base)

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, None))
    def spectrum(ah, code):
        term = diffrax.ODETerm(lambda t, y, args: ah * y)
        zero, one = jnp.array(0.0), jnp.array(1.0)
        state = solver.init(term, zero, one, one, None)

        def step(y, z):
            _, _, account = state
            out = solver.step(term, zero, one, y, None, (z, code, account), False)
            return out[0], out[3][0]

        # Linear, so that this is its matrix.
        columns = [step(one, zero), step(zero, one)]
        matrix = jnp.array(columns).T
        base_step = base.step(term, zero, one, one, None, _init(base, term, one), False)
        return jnp.linalg.det(matrix), jnp.trace(matrix), base_step[0]

    def _init(base, term, y):
        return base.init(term, jnp.array(0.0), jnp.array(1.0), y, None)

    ah = jnp.linspace(-2.0, 1.0, 13)
    for code in (0, 3, 8, 40, 79, 255):
        m = controlled.coupling(jnp.uint8(code)).astype(float)
        det, trace, r = spectrum(ah, jnp.uint8(code))
        # Of entries up to R(2)^2, so some hundred roundings. Code 40 is `m = 1/32`.
        assert jnp.allclose(det, m, atol=1e4 * EPS)
        if code == 255:
            # The base solver's, and zero.
            assert jnp.allclose(trace, r, rtol=0, atol=1e4 * EPS)
        # As `m` goes to zero it tends to that.
        size = jnp.abs(1 - (r - 1) * spectrum(-ah, jnp.uint8(255))[2])
        assert jnp.all(jnp.abs(trace - r) <= m * size + 1e4 * EPS)


def test_bytes():
    codes = jnp.arange(256, dtype=jnp.uint8)
    ms = jax.vmap(controlled.coupling)(codes)
    assert ms[0] == 1 and jnp.all(jnp.diff(ms[: controlled._LAST_SYNC + 1]) < 0)
    assert jnp.all(ms[controlled._LAST_SYNC :] == 0)
    some = np.array([-100, 0.0, 0.1, 1.0, 5.99, 6.0, 100, np.inf, np.nan])
    codes = jax.vmap(controlled._encode)(some.astype(np.float32))
    assert codes.dtype == jnp.uint8
    encoded = np.asarray(jax.vmap(controlled.coupling)(codes))
    # Never above, and not below by more than an eighth of an octave.
    ms = 2.0 ** -np.maximum(some[:5], 0)
    assert np.all(encoded[:5] <= ms) and np.all(encoded[:5] > ms * 0.91)
    assert np.all(encoded[5:] == 0)


@pytest.mark.parametrize("code", [0, 8, 48])
def test_steps_in_a_row(code):
    # From any other code: 16 of them, and then one in 16, make a second increment.
    period, code, made = controlled._PERIOD, jnp.uint8(code), []
    for _ in range(5 * period):
        code = controlled._next_sync(code)
        assert code.dtype == jnp.uint8 and controlled.coupling(code) == 0
        # And the account goes over each budget.
        assert controlled._bits(code) > controlled.budget(jnp.zeros(()))
        made.append(not controlled.leaves_out(code))
    a_period = [False] * (period - 1) + [True]
    assert made == [True] * period + 4 * a_period
    # Nothing else leaves it out.
    others = jnp.arange(controlled._LAST_SYNC + 1, dtype=jnp.uint8)
    assert not jnp.any(jax.vmap(controlled.leaves_out)(others))


@pytest.mark.one_in(1)
def test_no_step_in_a_row_can_be_undone():
    # Whether it makes the second increment or not: all but the first want their states.
    n = 100
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -3.0 * n * (y - jnp.cos(t))),
        dfxr.UReversible(diffrax.Tsit5()),
        0.0,
        1.0,
        1 / n,
        jnp.array([2.0, 1.0]),
        adjoint=dfxr.ReversibleAdjoint(),
        max_steps=n,
    )
    assert sol.stats["num_steps"] == n
    assert sol.stats["num_checkpoints"] == n - 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.complex64])
def test_rms(dtype):
    x = jnp.array([3.0, 4.0], dtype)
    for scale in (1e-30, 1.0, 1e30):
        tree = {"a": scale * x, "b": jnp.array([1]), "c": None}
        norm = controlled.rms(tree)
        assert norm.dtype == jnp.finfo(dtype).dtype
        assert jnp.allclose(norm, scale * math.sqrt(12.5), rtol=1e-6)
    assert controlled.rms({"a": jnp.zeros(0, dtype)}) == 0
    assert not jnp.isfinite(controlled.rms(jnp.array([1.0, jnp.inf])))
    assert not jnp.isfinite(controlled.rms(jnp.array([1.0, jnp.nan])))


#
# Problems on which the published method fails
#


def van_der_pol(t, y, args):
    return jnp.stack([y[1], args * (1 - y[0] ** 2) * y[1] - y[0]])


def lotka_volterra(t, y, args):
    hare, lynx = y
    return jnp.stack([hare * (args - 0.028 * lynx), lynx * (0.026 * hare - 0.84)])


def decay(t, y, args):
    return -args * y + jnp.cos(t) * jnp.array([1.0, 0.0], y.dtype)


# vector field, y0, args, t1, fixed step
PROBLEMS = {
    "van_der_pol": (van_der_pol, [2.0, 0.0], 5.0, 10.0, 0.01),
    "lotka_volterra": (lotka_volterra, [30.0, 4.0], 0.55, 20.0, 0.05),
    "decay": (decay, [1.0, 1.0], 5.0, 10.0, 0.01),
}


def solve(
    problem,
    solver,
    adjoint,
    params=None,
    adaptive=False,
    tol=1e-6,
    dtype=jnp.float64,
    t1=None,
    **kwargs,
):
    vector_field, y0, args, default_t1, step = PROBLEMS[problem]
    if params is None:
        params = (jnp.array(y0, dtype), jnp.array(args, dtype))
    y0, args = params
    pid = diffrax.PIDController(rtol=tol, atol=tol)
    t1 = default_t1 if t1 is None else t1
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        jnp.array(0, dtype),
        jnp.array(t1, dtype),
        jnp.array(step, dtype),
        y0,
        args,
        stepsize_controller=pid if adaptive else diffrax.ConstantStepSize(),
        adjoint=adjoint,
        max_steps=2000,
        **kwargs,
    )


def gradient(problem, solver, adjoint, dtype=jnp.float64, **kwargs):
    """`(value, solution), gradient`."""
    vector_field, y0, args, _, _ = PROBLEMS[problem]

    @eqx.filter_jit
    def run(params):
        def loss(params):
            sol = solve(problem, solver, adjoint, params, dtype=dtype, **kwargs)
            return jnp.sum(jnp.sin(sol.ys)), sol

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run((jnp.array(y0, dtype), jnp.array(args, dtype)))


@ft.cache
def _reference(problem):
    sol = solve(problem, diffrax.Dopri8(), diffrax.ForwardMode(), tol=1e-13)
    return sol.ys[0]


CONTROLLED = dfxr.UReversible(diffrax.Tsit5())
CHECKPOINTING = diffrax.RecursiveCheckpointAdjoint()


@pytest.mark.long
def test_as_good_as_the_wrapped_solver():
    problem, adaptive = "van_der_pol", True
    base = solve(problem, diffrax.Tsit5(), diffrax.ForwardMode(), adaptive=adaptive)
    (_, sol), grads = gradient(
        problem, CONTROLLED, dfxr.ReversibleAdjoint(), adaptive=adaptive
    )
    exact = _reference(problem)
    error = lambda sol: jnp.max(jnp.abs(sol.ys[0] - exact))
    # With the same step size Dopri8 is exact to about 1e-12 here.
    assert error(sol) <= 3 * error(base) + 1e-11
    num_steps = lambda sol: sol.stats["num_accepted_steps"]
    assert num_steps(sol) <= 1.05 * num_steps(base)

    # And the gradient is that of the same solve, by checkpointing. In between rounding
    # has grown by e^10, at most.
    (_, same), expected = gradient(
        problem, CONTROLLED, CHECKPOINTING, adaptive=adaptive
    )
    assert jnp.allclose(sol.ys, same.ys, rtol=1e-9)
    assert relative_difference(grads, expected) < 1e-6
    assert sol.stats["num_checkpoints"] > 0


def test_published_coupling_fails():
    # What the control is for; `test_as_good_as_the_wrapped_solver` has the cure.
    published = dfxr.UReversible(diffrax.Tsit5(), 0.999)
    sol = solve("decay", published, diffrax.ForwardMode())
    assert not jnp.all(jnp.abs(sol.ys[0] - _reference("decay")) < 1e3)


def test_rejected_steps_leave_no_trace():
    # Accepted steps alone, made in one go, lead to the same state.
    kwargs = dict(saveat=diffrax.SaveAt(t0=True, steps=True, solver_state=True))
    sol = solve(
        "van_der_pol", CONTROLLED, dfxr.ReversibleAdjoint(), adaptive=True, **kwargs
    )
    assert sol.stats["num_rejected_steps"] > 0
    ts = sol.ts[jnp.isfinite(sol.ts)]
    vector_field, y0, args, t1, _ = PROBLEMS["van_der_pol"]
    same = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        CONTROLLED,
        0.0,
        t1,
        None,
        jnp.array(y0),
        args,
        stepsize_controller=diffrax.StepTo(ts),
        adjoint=diffrax.ForwardMode(),
        **kwargs,
    )
    # The sizes of the steps differ by a rounding.
    n = len(ts)
    assert jnp.allclose(sol.ys[:n], same.ys[:n], rtol=1e-6)


@pytest.mark.long
def test_leaves_of_different_size():
    # A part that relaxes, next to one that oscillates and is larger by `1 / scale`.
    def solve(scale, solver, adjoint):
        def vector_field(t, y, args):
            (a, b), x = y
            return jnp.stack([b, -a]), -args * (x - scale * jnp.sin(t))

        def loss(args):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(vector_field),
                solver,
                0.0,
                20.0,
                0.05,
                (jnp.array([1.0, 0.0]), jnp.asarray(scale)),
                args,
                adjoint=adjoint,
                max_steps=400,
            )
            return sol.ys[1][0] / scale

        return jax.value_and_grad(loss)(jnp.array(5.0))

    base = jax.jit(ft.partial(solve, solver=diffrax.Tsit5(), adjoint=CHECKPOINTING))
    adjoint = dfxr.ReversibleAdjoint(checkpoints=256)
    ours = jax.jit(ft.partial(solve, solver=CONTROLLED, adjoint=adjoint))
    # Up to e^-100 the initial condition is forgotten.
    exact = (25 * math.sin(20) - 5 * math.cos(20)) / 26
    for scale in (1.0, 1e-6, 1e-20):
        (base_value, base_grad), (value, grad) = base(scale), ours(scale)
        assert abs(value - exact) <= 3 * abs(base_value - exact)
        # The steps of both are exact to about 1e-7 in this.
        assert abs(grad - base_grad) <= 1e-5 * abs(base_grad)


@pytest.mark.long
def test_without_error_estimate():
    # The classical method of order 4.
    tableau_ = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0, 0.5]), np.array([0, 0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )

    class Classical(diffrax.AbstractERK):
        tableau = tableau_
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms):
            return 4

    for problem in ("van_der_pol", "decay"):
        base = solve(problem, Classical(), diffrax.ForwardMode())
        ours = solve(problem, dfxr.UReversible(Classical()), dfxr.ReversibleAdjoint())
        error = lambda sol: jnp.max(jnp.abs(sol.ys[0] - _reference(problem)))
        assert error(ours) <= 3 * error(base) + 1e-11


@pytest.mark.long
def test_small_solutions():
    # Decayed to 1e-30: its squares are no single precision numbers.
    def run(solver, adjoint):
        term = diffrax.ODETerm(lambda t, y, args: args * y)
        y0 = jnp.array([1.0, 0.5], jnp.float32)
        return jax.jit(
            jax.value_and_grad(
                lambda args: (
                    1e30
                    * jnp.sum(
                        diffrax.diffeqsolve(
                            term,
                            solver,
                            jnp.float32(0),
                            jnp.float32(14),
                            jnp.float32(0.05),
                            y0,
                            args,
                            adjoint=adjoint,
                            max_steps=300,
                        ).ys
                    )
                )
            )
        )(jnp.float32(-5.0))

    ours = run(CONTROLLED, dfxr.ReversibleAdjoint(checkpoints=64))
    base = run(diffrax.Tsit5(), CHECKPOINTING)
    # 280 steps of some roundings each.
    assert relative_difference(ours, base) < 1e-3


#
# Checkpoints
#


@pytest.mark.parametrize("checkpoints", [0, 3])
def test_few_checkpoints(checkpoints):
    # What is missing is made again.
    adjoint = dfxr.ReversibleAdjoint(checkpoints=checkpoints)
    (_, sol), ours = gradient("van_der_pol", CONTROLLED, adjoint)
    assert sol.stats["num_checkpoints"] > 3
    _, expected = gradient("van_der_pol", CONTROLLED, CHECKPOINTING)
    assert relative_difference(ours, expected) < 1e-9


@pytest.mark.long
def test_checkpoint_every():
    solver = GenericUReversible(0.9)
    every = dfxr.ReversibleAdjoint(checkpoints=4, checkpoint_every=25)
    (_, sol), ours = gradient("lotka_volterra", solver, every)
    assert sol.stats["num_checkpoints"] == 15
    _, expected = gradient("lotka_volterra", solver, CHECKPOINTING)
    # 25 steps back amplify rounding by 14, and the solution does by some thousands.
    assert relative_difference(ours, expected) < 1e-8
    # 400 steps back, by 1 / 0.9**400, or 1e18: that is noticed, and cured.
    _, ours = gradient("lotka_volterra", solver, dfxr.ReversibleAdjoint())
    assert relative_difference(ours, expected) < 1e-8


@pytest.mark.parametrize("value", [0, -1, True])
def test_checkpoint_every_is_wrong(value):
    with pytest.raises(
        ValueError, match=r"checkpoint_every=\.\.\.\)` must be a positive"
    ):
        dfxr.ReversibleAdjoint(checkpoint_every=value)


#
# What is rebuilt is verified
#


@ft.cache
def _drifting(dtype, adjoint, num_steps_at_most=500):
    """The gradient of so many steps of a pendulum, that rounding errors grow in."""
    solver = dfxr.UReversible(diffrax.Heun(), 0.9 if dtype == jnp.float64 else 0.95)

    def loss(params, num_steps):
        y0, args = params
        vector_field = lambda t, y, args: jnp.stack([y[1], -args * jnp.sin(y[0])])
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            jnp.array(0, dtype),
            num_steps * jnp.array(0.02, dtype),
            jnp.array(0.02, dtype),
            y0,
            args,
            adjoint=adjoint,
            max_steps=num_steps_at_most,
        )
        return jnp.sum(jnp.sin(sol.ys))

    # An error from a batch is a `ValueError` with `jax.jit`.
    return eqx.filter_jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_drift_is_cured(dtype):
    # Each alone in its batch, and all together.
    params = (jnp.array([1.0, 0.3], dtype), jnp.array(1.0, dtype))
    num_steps = jnp.arange(20, 420, 40).astype(dtype)
    expected = _drifting(dtype, CHECKPOINTING)(params, num_steps)
    run = _drifting(dtype, dfxr.ReversibleAdjoint(checkpoints=0))
    alone = [run(params, n[None]) for n in num_steps]
    alone = jtu.tree_map(lambda *x: jnp.concatenate(x), *alone)
    tol = 1e-6 if dtype == jnp.float64 else 1e-3
    assert relative_difference(alone, expected) < tol
    assert relative_difference(run(params, num_steps), expected) < tol


@pytest.mark.long
def test_drift_is_there_to_be_cured(monkeypatch):
    # Or the test before shows nothing, where no step is recomputed.
    monkeypatch.setattr(verify, "tolerance", lambda y: 1e9)
    monkeypatch.setattr(plan, "_PART_OF_RECORD", 1e9)
    params = (jnp.array([1.0, 0.3]), jnp.array(1.0))
    num_steps = jnp.array([380.0])
    run = _drifting(jnp.float64, dfxr.ReversibleAdjoint(checkpoints=0), 501)
    expected = _drifting(jnp.float64, CHECKPOINTING, 501)(params, num_steps)
    with np.errstate(all="ignore"):
        try:
            wrong = run(params, num_steps)
        except RuntimeError as e:
            assert "not finite" in str(e)
        else:
            assert relative_difference(wrong, expected) > 0.1


def test_not_finite_on_the_way_back():
    # The reciprocal of the solution is rebuilt past its pole.
    solver = dfxr.UReversible(diffrax.Heun(), 0.01)

    def loss(y0, adjoint=dfxr.ReversibleAdjoint()):
        term = diffrax.ODETerm(lambda t, y, args: jnp.sqrt(y) * jnp.cos(9 * t))
        sol = diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            1.0,
            0.02,
            y0,
            adjoint=adjoint,
            max_steps=60,
        )
        return jnp.sum(sol.ys)

    ours = eqx.filter_jit(jax.grad(loss))
    expected = eqx.filter_jit(jax.grad(ft.partial(loss, adjoint=CHECKPOINTING)))
    assert abs(ours(jnp.array(0.1)) / expected(jnp.array(0.1)) - 1) < 1e-9


@pytest.mark.long
def test_gradient_not_finite():
    # The derivative of the square root at zero; also of one element of a batch.
    def loss(y0, throw):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.sqrt(y)),
            dfxr.UReversible(diffrax.Heun()),
            0.0,
            1.0,
            0.25,
            y0,
            adjoint=dfxr.ReversibleAdjoint(),
            max_steps=4,
            throw=throw,
        )
        return jnp.sum(sol.ys)

    @eqx.filter_jit
    def run(y0, throw):
        return jax.vmap(jax.grad(loss), in_axes=(0, None))(y0, throw)

    y0 = jnp.array([0.0, 1.0])
    assert np.isfinite(run(y0, False)).tolist() == [False, True]
    with pytest.raises(RuntimeError, match="The gradient is not finite"):
        run(y0, True)


#
# Full sync
#


@pytest.mark.parametrize(
    "cls", [dfxr.ReversibleHeun, dfxr.LeapfrogMidpoint, dfxr.AsynchronousLeapfrog]
)
def test_full_sync(cls):
    exact = _reference("decay")
    error = lambda sol: jnp.max(jnp.abs(sol.ys[0] - exact))
    assert error(solve("decay", cls(), diffrax.ForwardMode())) > 1e3
    adjoint = dfxr.ReversibleAdjoint(checkpoints=256)
    (_, sol), ours = gradient("decay", cls(full_sync=True), adjoint)
    # Second order, with `L h = 0.05`.
    assert error(sol) < 1e-3
    assert sol.stats["num_checkpoints"] > 0
    _, expected = gradient("decay", cls(full_sync=True), CHECKPOINTING)
    assert relative_difference(ours, expected) < 1e-9


#
# Diagnosis
#


@pytest.mark.parametrize("sign", [1, -1])
def test_diagnose(sign, tmp_path):
    vector_field, y0, args, t1, step = PROBLEMS["van_der_pol"]
    term = diffrax.ODETerm(lambda t, y, args: sign * vector_field(t, y, args))
    found = dfxr.diagnose(
        term, CONTROLLED, 0, sign * t1, sign * step, jnp.array(y0), args, max_steps=1010
    )
    sol = solve("van_der_pol", CONTROLLED, dfxr.ReversibleAdjoint())
    assert jnp.allclose(found.solution.ys, sol.ys, rtol=1e-9)
    # Compiled differently, and so not the same to the last bit.
    assert abs(found.num_checkpoints - sol.stats["num_checkpoints"]) <= 2
    assert np.allclose(found.ts, sign * step * np.arange(1000), atol=1e-9)
    for x in (found.separation, found.coupling, found.checkpoints, found.drift):
        assert x.shape == (1000,)
    assert found.separation[0] == 0 and found.coupling[0] == 1
    assert 0 < found.drift.max() < 1e-8 and found.coupling.min() < 1
    # (All of a segment are, and only the last is there.)
    assert np.all(found.recomputed[found.checkpoints][:-1] > 0)
    found.plot(str(tmp_path / "diagnosis.png"))
    assert (tmp_path / "diagnosis.png").stat().st_size > 1e4


def test_diagnose_other_solvers():
    term = diffrax.ODETerm(lambda t, y, args: -y)
    for solver in (diffrax.ReversibleHeun(), dfxr.UReversible(diffrax.Heun(), 0.9)):
        found = dfxr.diagnose(term, solver, 0, 1, 0.1, jnp.array(1.0), max_steps=10)
        assert found.num_checkpoints == 0
        assert found.drift.max() < 100 * EPS / 0.9**10
    with pytest.raises(ValueError, match="bound on the number of steps"):
        dfxr.diagnose(term, solver, 0, 1, 0.1, jnp.array(1.0), max_steps=None)
    with pytest.raises(ValueError, match="UReversible"):
        dfxr.diagnose(term, diffrax.Tsit5(), 0, 1, 0.1, jnp.array(1.0))


@pytest.mark.long
def test_diagnose_prints():
    # `y1` decays: with a number for the coupling undoing a step amplifies rounding.
    term = diffrax.ODETerm(lambda t, y, args: jnp.stack([jnp.cos(t), -2 * y[1]]))

    def diagnose(solver, **kwargs):
        adjoint = dfxr.ReversibleAdjoint(**kwargs)
        y0 = jnp.array([3.0, 2.0])
        return dfxr.diagnose(
            term, solver, 0, 8, 0.05, y0, adjoint=adjoint, max_steps=160
        )

    def lines(found):
        assert repr(found) == str(found)
        return str(found).split("\n")

    well = diagnose(CONTROLLED, checkpoints=160)
    assert well.num_checkpoints > 1 and well.recomputed.max() == 1
    assert lines(well) == [
        f"160 steps, undone well: the largest drift is {well.drift.max():.1e}, at t = "
        f"{well.ts[well.drift.argmax()]:.4g}.",
        f"{well.num_checkpoints} states are wanted, {well.max_checkpoints} can be "
        f"stored, and steps are recomputed {well.recomputed.sum()} times.",
        "Nothing is to be done.",
    ]
    few = diagnose(CONTROLLED, checkpoints=1)
    _, states, todo = lines(few)
    assert f"1 can be stored, and steps are recomputed {few.recomputed.sum()}" in states
    match = re.search(r"`ReversibleAdjoint\(checkpoints=(\d+)\)`.$", todo)
    assert match is not None
    # So it is.
    again = diagnose(CONTROLLED, checkpoints=int(match[1]))
    assert again.recomputed.max() <= 1 and lines(again)[2] == "Nothing is to be done."

    # At the limit of stability.
    term = diffrax.ODETerm(lambda t, y, args: -39 * y)
    steps, _, todo = lines(diagnose(CONTROLLED))
    assert steps.startswith("160 steps, mostly not undone, the others well: ")
    assert todo.startswith("To save time, use a solver that undoes nothing, such as")

    term = diffrax.ODETerm(lambda t, y, args: jnp.stack([jnp.cos(t), -2 * y[1]]))
    forgetful = dfxr.UReversible(diffrax.Heun(), 0.7)
    badly = diagnose(forgetful)
    steps, states, todo = lines(badly)
    assert steps.startswith("160 steps, undone badly: the largest drift is ")
    assert states.startswith("0 states are wanted")
    match = re.search(r"checkpoint_every=(\d+)\)`, or a solver that wants", todo)
    assert match is not None
    cured = diagnose(forgetful, checkpoint_every=int(match[1]), checkpoints=160)
    assert cured.drift.max() <= cured.tolerance < badly.drift.max()
    assert lines(cured)[2] == "Nothing is to be done."
