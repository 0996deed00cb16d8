"""`reverse_solve` gives back what the solve gave."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

import diffrax_reversible as dfxr

from .helpers import (
    make_args,
    make_terms,
    make_y,
    random_like,
    relative_difference,
    REVERSIBLE,
)


EPS = float(jnp.finfo(jnp.float64).eps)
# All that undo every step without a checkpoint.
UNDONE = [
    name
    for name, case in REVERSIBLE.items()
    if not getattr(case.solver, "full_sync", False)
    and getattr(case.solver, "coupling_parameter", None) != "auto"
]
ENDS = diffrax.SaveAt(t1=True, solver_state=True)
# The ends of the steps, and no more.
STEPS = diffrax.SaveAt(
    subs=dict(
        end=diffrax.SubSaveAt(t1=True),
        steps=diffrax.SubSaveAt(steps=True, fn=lambda t, y, args: None),
    ),
    solver_state=True,
)
PENDULUM = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])]))


def _last(ys):
    return jtu.tree_map(lambda x: x[-1], ys)


@pytest.mark.parametrize("name", UNDONE)
def test_round_trip(name):
    # Over either direction of time, with all kinds of terms, and with a last step that
    # is shorter than the others.
    i, case = UNDONE.index(name), REVERSIBLE[name]
    solver, sign = case.solver, (-1.0) ** i
    kinds = [k for k in ("ode", *case.controls) if k != "sde" or case.order > 1]
    kind = kinds[i % len(kinds)]
    structure = "pytree" if kind == "ode" else "vector"
    keys = jax.random.split(jax.random.key(i), 3)
    terms = make_terms(case, kind, structure, jnp.float64, keys[0])
    y0 = random_like(make_y(case, structure, jnp.float64), keys[1])
    args = make_args(keys[2], jnp.float64)
    # At, between, and at the ends of steps.
    ts = sign * jnp.array([-0.5, -0.41, -0.3, -0.3, 0.07, 0.51, 0.52])
    saveat = diffrax.SaveAt(t0=True, ts=ts, t1=True, solver_state=True)
    kwargs = dict(saveat=saveat, max_steps=16, adjoint=diffrax.ForwardMode())

    @eqx.filter_jit
    def there_and_back():
        problem = (terms, solver, -0.5 * sign, 0.52 * sign, 0.1 * sign)
        sol = diffrax.diffeqsolve(*problem, y0, args, **kwargs)
        y1, state = _last(sol.ys), sol.solver_state
        back = dfxr.reverse_solve(*problem, y1, args, solver_state=state, **kwargs)
        return sol, back

    sol, back = there_and_back()
    assert sol.stats["num_steps"] == back.stats["num_steps"] == 11
    assert (back.t0, back.t1) == (sol.t0, sol.t1)
    assert jnp.array_equal(back.ts, sol.ts)
    # As in the round trip of single steps. What one of them amplifies all do.
    tol = 64 * EPS * 11 * case.amplification**11
    assert relative_difference(back.ys, sol.ys) < tol


@pytest.mark.parametrize("sign", [1, -1])
def test_dense(sign):
    problem = (PENDULUM, dfxr.ReversibleHeun(), 0.0, 1.0 * sign, 0.1 * sign)
    y0 = jnp.array([1.0, 0.2])
    saveat = diffrax.SaveAt(t1=True, dense=True, solver_state=True)
    kwargs = dict(saveat=saveat, max_steps=16, adjoint=diffrax.ForwardMode())
    sol = diffrax.diffeqsolve(*problem, y0, **kwargs)
    back = dfxr.reverse_solve(
        *problem, _last(sol.ys), solver_state=sol.solver_state, **kwargs
    )
    tol = 64 * EPS * 10
    for t in (0.0, 0.123 * sign, 0.5 * sign, 1.0 * sign):
        assert relative_difference(back.evaluate(t), sol.evaluate(t)) < tol
    between = [x.evaluate(0.1 * sign, 0.33 * sign) for x in (back, sol)]
    assert relative_difference(*between) < 10 * tol
    # Of rounding over a step.
    t = 0.123 * sign
    assert relative_difference(back.derivative(t), sol.derivative(t)) < 10 * tol
    # That with which it started.
    yhat, f = back.solver_state
    assert relative_difference(yhat, y0) < tol
    assert relative_difference(f, PENDULUM.vf(0.0, y0, None)) < tol


@pytest.mark.parametrize("name", ["StormerVerlet", "UReversible-Bosh3-1"])
def test_kepler(name):
    def kepler(q):
        return -q / jnp.sum(q**2) ** 1.5

    case = REVERSIBLE[name]
    p0, q0 = jnp.array([0.0, 1.1]), jnp.array([1.0, 0.0])
    if case.pair:
        force = diffrax.ODETerm(lambda t, q, args: kepler(q))
        terms, y0 = (force, diffrax.ODETerm(lambda t, p, args: p)), (p0, q0)
    else:
        field = diffrax.ODETerm(lambda t, y, args: (kepler(y[1]), y[0]))
        terms, y0 = field, (p0, q0)
    n, t1 = 100_000, 1000.0
    problem = (terms, case.solver, 0.0, t1, t1 / n)
    kwargs = dict(max_steps=n, adjoint=diffrax.ForwardMode())
    sol = diffrax.diffeqsolve(*problem, y0, saveat=ENDS, **kwargs)
    back = dfxr.reverse_solve(
        *problem, _last(sol.ys), solver_state=sol.solver_state, **kwargs
    )
    assert back.stats["num_steps"] == n
    # A rounding error in the energy is one in the frequency, and so it grows like time;
    # there are `n` of them, of random signs.
    assert relative_difference(_last(back.ys), y0) < 10 * EPS * n**0.5 * t1


def test_adaptive_vmap_jit():
    # The elements make different numbers of steps.
    solver = dfxr.ReversibleHeun()
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)

    @jax.jit
    @jax.vmap
    def there_and_back(y0):
        problem = (PENDULUM, solver, 0.0, 4.0, None)
        sol = diffrax.diffeqsolve(
            *problem,
            y0,
            saveat=STEPS,
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=256,
        )
        back = dfxr.reverse_solve(
            *problem,
            _last(sol.ys["end"]),
            solver_state=sol.solver_state,
            step_ts=sol.ts["steps"],
            saveat=diffrax.SaveAt(steps=True),
            adjoint=diffrax.ForwardMode(),
        )
        return sol.ts["steps"], sol.stats["num_accepted_steps"], back

    y0 = jnp.array([[0.1, 0.0], [2.5, 0.5]])
    ts, num_steps, back = there_and_back(y0)
    assert num_steps[0] != num_steps[1]
    assert jnp.array_equal(back.stats["num_steps"], num_steps)
    for i, n in enumerate(num_steps):
        # The starts of the steps, in order, and then the padding.
        starts = jnp.concatenate([jnp.zeros(1), ts[i, : n - 1]])
        assert jnp.array_equal(back.ts[i, :n], starts)
        assert jnp.all(jnp.isinf(back.ts[i, n:])) and jnp.all(jnp.isinf(back.ys[i, n:]))
        tol = 64 * EPS * n * jnp.exp(4.0)
        assert relative_difference(back.ys[i, 0], y0[i]) < tol


@pytest.mark.parametrize(
    "solver", [dfxr.LeapfrogMidpoint(), dfxr.UReversible(diffrax.Heun(), 0.999)]
)
def test_gradient(solver):
    # There and back again is the identity, and so is its derivative.
    problem = (PENDULUM, solver, 0.0, 2.0, 0.1)
    adjoint = dfxr.ReversibleAdjoint()

    @jax.jit
    @jax.grad
    def grad(y0, weights):
        kwargs = dict(max_steps=20, adjoint=adjoint)
        sol = diffrax.diffeqsolve(*problem, y0, saveat=ENDS, **kwargs)
        back = dfxr.reverse_solve(
            *problem, sol.ys[-1], solver_state=sol.solver_state, **kwargs
        )
        return weights @ back.ys[0]

    weights = jnp.array([0.3, -2.0])
    grads = grad(jnp.array([1.0, 0.2]), weights)
    # Of forty steps, and what they amplify.
    assert relative_difference(grads, weights) < 64 * 40 * EPS * jnp.exp(2.0)


def test_without_state():
    # As in diffrax's issue 241; and with given steps.
    terms = (
        diffrax.ODETerm(lambda t, q, args: -q),
        diffrax.ODETerm(lambda t, p, args: p),
    )
    y0 = (jnp.array([1.0, 2.0]), jnp.array([12.0, 3.0]))
    ts = jnp.array([0.0, 0.3, 0.35, 0.9, 1.0])
    for solver in (diffrax.SemiImplicitEuler(), dfxr.StormerVerlet()):
        sol = diffrax.diffeqsolve(
            terms, solver, 0, 1, None, y0, stepsize_controller=diffrax.StepTo(ts)
        )
        back = dfxr.reverse_solve(terms, solver, 0, 1, None, _last(sol.ys), step_ts=ts)
        assert relative_difference(_last(back.ys), y0) < 64 * EPS * 4


def test_no_steps():
    back = _undo(dfxr.EES25(), t0=1.0, t1=1.0)
    assert jnp.array_equal(back.ys[0], jnp.ones(2))
    assert back.stats["num_steps"] == 0


@pytest.mark.parametrize("solver,order", [(dfxr.EES25(), 5), (dfxr.EES27(), 7)])
def test_near_reversible(solver, order):
    # To their defect.
    y0 = jnp.array([1.0, 0.2])

    @jax.jit
    def error(dt0):
        problem = (PENDULUM, solver, 0.0, 4.0, dt0)
        sol = diffrax.diffeqsolve(*problem, y0, max_steps=64)
        assert sol.ys is not None
        back = dfxr.reverse_solve(*problem, sol.ys[-1], max_steps=64)
        assert back.ys is not None
        return jnp.max(jnp.abs(back.ys[0] - y0))

    slope = jnp.log2(error(0.2) / error(0.1))
    assert order - 0.5 < slope < order + 1


def _undo(solver, *, t0=0.0, t1=1.0, dt0=0.1, y1=None, **kwargs):
    y1 = jnp.ones(2) if y1 is None else y1
    # (As an array it is compiled for once.)
    dt0 = None if dt0 is None else jnp.array(dt0)
    kwargs = dict(adjoint=diffrax.ForwardMode(), max_steps=16) | kwargs
    out = dfxr.reverse_solve(PENDULUM, solver, t0, t1, dt0, y1, **kwargs)
    return jax.block_until_ready(out)


def test_refused():
    u = dfxr.UReversible(diffrax.Heun(), 1)
    for solver, instead in (
        (diffrax.Tsit5(), "UReversible(diffrax.Tsit5(), 0.999)"),
        (diffrax.HalfSolver(dfxr.ReversibleHeun()), "ReversibleHeun()"),
        (diffrax.ALIGN(0.1), "UReversible(diffrax.Heun(), 0.999)"),
    ):
        match = f"^`reverse_solve` needs .*Use `{re.escape(instead)}`, in the solve"
        with pytest.raises(ValueError, match=match):
            _undo(solver)
    with pytest.raises(ValueError, match=r"`UReversible\(diffrax.Heun\(\), 0.999\)`"):
        _undo(dfxr.UReversible(diffrax.Heun()))
    for solver in (
        dfxr.ReversibleHeun(full_sync=True),
        dfxr.LeapfrogMidpoint(full_sync=True),
        dfxr.AsynchronousLeapfrog(full_sync=True),
    ):
        with pytest.raises(ValueError, match=r"\(full_sync=False\)`"):
            _undo(solver)
    with pytest.raises(ValueError, match="solver_state=sol.solver_state"):
        _undo(u)
    for kwargs in (dict(dt0=None), dict(step_ts=jnp.ones(1))):
        with pytest.raises(ValueError, match="exactly one of `dt0` and `step_ts`"):
            _undo(u, solver_state=jnp.ones(2), **kwargs)
    with pytest.raises(ValueError, match="controller_state=True"):
        _undo(u, saveat=diffrax.SaveAt(t0=True, controller_state=True))
    for adjoint in (diffrax.BacksolveAdjoint(), diffrax.ImplicitAdjoint()):
        with pytest.raises(ValueError, match=f"support `{type(adjoint).__name__}`"):
            _undo(u, adjoint=adjoint)
    with pytest.raises(ValueError, match=r"stats\[\"num_steps\"\]` of the solve"):
        _undo(u, max_steps=None)
    with pytest.raises(ValueError, match=r"^`reverse_solve\(drift_tolerance=...\)`"):
        _undo(u, drift_tolerance=-1.0)
    path = diffrax.UnsafeBrownianPath((), jax.random.key(0))
    with pytest.raises(ValueError, match="Use `diffrax.VirtualBrownianTree`"):
        dfxr.reverse_solve(
            diffrax.ControlTerm(lambda t, y, args: y, path), u, 0.0, 1.0, 0.1, 1.0
        )


class _Steered(dfxr.AbstractCouplingSolver):
    """Has a state that depends on the solution, and does not say so."""

    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        return y0, jnp.array(1.0)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def recorded(self, solver_state):
        return solver_state[1]

    def split(self, y, solver_state):
        return dfxr.Registers((y, solver_state[0]))

    def merge(self, registers):
        (y, z), _, fixed, _ = registers
        return y, (z, fixed)

    def couplings(self):
        return ()

    def finish(self, registers0, registers1, infos):
        return None, dict(y0=registers0[0], y1=registers1[0])

    def steer(self, fixed, memo, registers0, registers1, y_error, infos):
        return jnp.sum(registers1[0]), memo


def test_steered():
    with pytest.raises(NotImplementedError, match="`_Steered`, which has both"):
        _undo(_Steered(), solver_state=(jnp.ones(2), jnp.array(1.0)))


@pytest.mark.parametrize(
    "step_ts",
    [
        [0.5, 0.9, jnp.inf],  # not to the end
        [0.5, 0.4, 1.0],  # not in order
        [0.5, jnp.inf, 1.0],  # not all
        [jnp.inf],
    ],
)
def test_wrong_steps(step_ts):
    with pytest.raises(RuntimeError, match="must be the ends of all steps"):
        _undo(dfxr.EES25(), dt0=None, step_ts=jnp.array(step_ts))


def test_steps_too_short():
    # diffrax would join the first two.
    step_ts = jnp.array([1 + 8 * EPS, 1.5, 2.0])
    with pytest.raises(RuntimeError, match="did not make as many steps"):
        _undo(dfxr.EES25(), t0=1.0, t1=2.0, dt0=None, step_ts=step_ts)


def test_drift():
    solver = dfxr.UReversible(diffrax.Heun(), 0.5)
    problem = (PENDULUM, solver, 0.0, 1.0, 0.1)
    y0 = jnp.array([1.0, 0.2])
    sol = diffrax.diffeqsolve(*problem, y0, saveat=ENDS)
    assert sol.ys is not None
    kwargs = dict(y1=sol.ys[-1], solver_state=sol.solver_state)
    _undo(solver, **kwargs)
    # Other steps.
    with pytest.raises(RuntimeError, match="state with which no solve starts"):
        _undo(solver, dt0=0.2, **kwargs)
    _undo(solver, dt0=0.2, drift_tolerance=None, **kwargs)
    # Rounding.
    state = sol.solver_state
    assert eqx.is_array(state)
    with pytest.raises(RuntimeError, match="state with which no solve starts"):
        _undo(solver, y1=sol.ys[-1], solver_state=state + 1e-7)
    # (Found out without a state too.)
    with pytest.raises(RuntimeError, match="state with which no solve starts"):
        _undo(dfxr.EES25(), y1=jnp.array([jnp.nan, 1.0]))


def test_max_steps():
    with pytest.raises(RuntimeError, match="Try increasing `max_steps`"):
        _undo(dfxr.EES25(), dt0=1 / 17)


@pytest.mark.parametrize("y0", [0.0, 1e-12])
def test_starts_from_zero(y0):
    # Which is known to the rounding of what comes after it.
    term = diffrax.ODETerm(lambda t, y, args: jnp.cos(3 * t) - jnp.sin(y))
    problem = (term, dfxr.UReversible(diffrax.Bosh3(), 0.99), 0.0, 1.0, 0.1)
    sol = diffrax.diffeqsolve(*problem, jnp.array(y0), saveat=ENDS)
    back = dfxr.reverse_solve(
        *problem, _last(sol.ys), solver_state=sol.solver_state, max_steps=16
    )
    assert back.ys is not None
    assert abs(back.ys[0] - y0) < 100 * EPS


def test_times_of_the_output():
    # They have a say in the dtype of all times, and so of `y`.
    ts = jnp.linspace(0, 1, 4)
    saveat = diffrax.SaveAt(ts=ts, t1=True, solver_state=True)
    times = [jnp.asarray(t, jnp.float32) for t in (0.0, 1.0, 0.125)]
    term = diffrax.ODETerm(lambda t, y, args: -y)
    problem = ((term, term), dfxr.StormerVerlet(), *times)
    y0 = (jnp.ones(2, jnp.float32), jnp.ones(2, int))
    sol = diffrax.diffeqsolve(*problem, y0, saveat=saveat)
    back = dfxr.reverse_solve(*problem, _last(sol.ys), saveat=saveat, max_steps=16)
    assert back.ts is not None and sol.ts is not None
    assert back.ts.dtype == sol.ts.dtype == jnp.float64
    assert jnp.array_equal(back.ts, sol.ts)
    assert relative_difference(back.ys, sol.ys) < 100 * EPS


def test_step_to():
    # Its times start with that of the start.
    ts = jnp.array([0.0, 0.2, 0.3, 0.7, 1.0])
    problem = (PENDULUM, dfxr.LeapfrogMidpoint(), 0.0, 1.0, None)
    y0 = jnp.array([1.0, 0.2])
    sol = diffrax.diffeqsolve(
        *problem, y0, saveat=ENDS, stepsize_controller=diffrax.StepTo(ts)
    )
    saveat = diffrax.SaveAt(t0=True, solver_state=True)
    for step_ts in (ts, ts[1:], ts[1:].tolist()):
        back = dfxr.reverse_solve(
            *problem,
            _last(sol.ys),
            solver_state=sol.solver_state,
            step_ts=step_ts,
            saveat=saveat,
        )
        assert relative_difference(back.ys, y0) < 100 * EPS
        t_before, _ = back.solver_state
        assert t_before == 0.0


@pytest.mark.long
def test_resumed():
    solver, y0 = dfxr.LeapfrogMidpoint(), jnp.array([1.0, 0.2])
    first = diffrax.diffeqsolve(PENDULUM, solver, 0.0, 1.0, 0.1, y0, saveat=ENDS)
    problem = (PENDULUM, solver, 1.0, 2.0, 0.1)
    sol = diffrax.diffeqsolve(
        *problem, _last(first.ys), solver_state=first.solver_state, saveat=ENDS
    )
    kwargs = dict(solver_state=sol.solver_state, max_steps=16, drift_tolerance=None)
    back = dfxr.reverse_solve(*problem, _last(sol.ys), **kwargs)
    assert relative_difference(back.ys, first.ys) < 100 * EPS
    saveat = diffrax.SaveAt(t0=True, solver_state=True)
    with pytest.raises(ValueError, match="if the solve was resumed"):
        dfxr.reverse_solve(*problem, _last(sol.ys), saveat=saveat, **kwargs)


def test_elements_that_finish_early():
    # With other adjoints they make steps after their end, from a time that is none.
    y1 = jnp.array([1.0, 0.2])

    def gradient(adjoint):
        def loss(y1, t1):
            back = dfxr.reverse_solve(
                PENDULUM,
                dfxr.LeapfrogMidpoint(),
                0.0,
                t1,
                0.1,
                y1,
                solver_state=(t1 - 0.1, y1),
                adjoint=adjoint,
                max_steps=16,
                drift_tolerance=None,
            )
            return jnp.sum(back.ys)

        return jax.jit(jax.vmap(jax.grad(loss)))(
            jnp.stack([y1, y1]), jnp.array([1.0, 0.5])
        )

    ours = gradient(dfxr.ReversibleAdjoint())
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    assert relative_difference(ours, expected) < 100 * EPS


def test_gradient_of_t0_in_one_step():
    def gradient(adjoint):
        def loss(t0):
            back = dfxr.reverse_solve(
                *(PENDULUM, dfxr.EES25(), t0, 0.1, 0.2, jnp.array([1.0, 0.2])),
                adjoint=adjoint,
                max_steps=4,
            )
            return jnp.sum(back.ys)

        return jax.jit(jax.grad(loss))(0.0)

    ours = gradient(dfxr.ReversibleAdjoint())
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    # The ends of the interval are all there is.
    assert relative_difference(ours, expected) < 100 * EPS
