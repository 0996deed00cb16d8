"""A user's own solver may do whatever its docstring allows, with the right gradient,
and is told so if it may not."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan

from .helpers import GenericLeapfrog, relative_difference
from .test_counts import Counter
from .test_errors import Forgetful


TOL = 1e-10
Y0 = jnp.array([0.5, 0.7])


def vector_field(t, y, args):
    return jnp.sin(args * y) + t


class Damped(dfxr.AbstractCouplingSolver):
    """Asynchronous leapfrog, damped by a parameter that is in its scale too."""

    damping: Any
    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def split(self, y, solver_state):
        return dfxr.Registers((y, solver_state))

    def merge(self, registers):
        return registers.registers

    def couplings(self):
        return (
            dfxr.Coupling(0, self._drift),
            dfxr.Coupling(1, self._kick, scale=lambda fixed: self.damping),
            dfxr.Coupling(0, self._drift),
        )

    def _drift(self, step, registers):
        return 0.5 * step.control * registers[1], {}

    def _kick(self, step, registers):
        t = step.t0 + 0.5 * (step.t1 - step.t0)
        f = step.terms.vf(t, registers[0], step.args)
        return (1 - self.damping) * f, {}

    def finish(self, registers0, registers1, infos):
        return None, dict(y0=registers0[0], y1=registers1[0])


class Recorded(Damped):
    """With a recorded number in its shift and scale, that `init` makes of `args`."""

    stop: bool = False

    def init(self, terms, t0, t1, y0, args):
        number = jnp.tanh(args)
        number = jax.lax.stop_gradient(number) if self.stop else number
        return terms.vf(t0, y0, args), number

    def split(self, y, solver_state):
        return dfxr.Registers((y, solver_state[0]))

    def merge(self, registers):
        y, v = registers.registers
        return y, (v, registers.fixed)

    def recorded(self, solver_state):
        return solver_state[1]

    def couplings(self):
        return (
            dfxr.Coupling(0, self._drift),
            dfxr.Coupling(1, self._kick, scale=lambda fixed: -fixed),
            dfxr.Coupling(0, self._drift),
        )

    def _kick(self, step, registers):
        f = step.terms.vf(step.t0, registers[0], step.args)
        return (1 + step.fixed) * f, {}


class Pair(Damped):
    """Without any solver state: the registers are the parts of `y`."""

    term_structure = diffrax.AbstractTerm

    def init(self, terms, t0, t1, y0, args):
        return None

    def split(self, y, solver_state):
        p, q = y
        return dfxr.Registers((p, q))

    def merge(self, registers):
        return registers.registers, None

    def couplings(self):
        return dfxr.Coupling(0, self._first), dfxr.Coupling(1, self._second)

    def _first(self, step, registers):
        _, q = registers
        p, _ = step.terms.vf_prod(step.t0, (q, q), step.args, step.control)
        return p, {}

    def _second(self, step, registers):
        p, _ = registers
        _, q = step.terms.vf_prod(step.t1, (p, p), step.args, step.control)
        return q, {}

    def finish(self, registers0, registers1, infos):
        return None, dict(y0=registers0, y1=registers1)


def solve(solver, y0, args, adjoint, t1=1.0, **kwargs):
    vf = lambda t, y, args: jax.tree.map(lambda x: vector_field(t, x, args), y)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vf),
        solver,
        0.0,
        t1,
        0.1,
        y0,
        args,
        saveat=diffrax.SaveAt(t1=True, ts=jnp.array([0.0])),
        adjoint=adjoint,
        max_steps=16,
        **kwargs,
    )


def gradients(loss, params, reference=diffrax.DirectAdjoint()):
    return [
        jax.jit(jax.grad(ft.partial(loss, adjoint)))(params)
        for adjoint in (dfxr.ReversibleAdjoint(), reference)
    ]


def total(sol):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(sol.ys))


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static:UserWarning")
def test_scale_is_differentiated():
    def loss(adjoint, params):
        damping, y0, args = params
        return total(solve(Damped(damping), y0, args, adjoint))

    assert relative_difference(
        *gradients(loss, (jnp.array(-0.9), Y0, jnp.array(1.3)))
    ) < (TOL)


def test_registers_of_y():
    def loss(adjoint, params):
        y0, args = params
        return total(solve(Pair(1.0), y0, args, adjoint))

    params = ((Y0, 2 * Y0), jnp.array(1.3))
    assert relative_difference(*gradients(loss, params)) < TOL


@pytest.mark.parametrize("stop", [False, True])
def test_recorded_is_differentiated(stop):
    # Not by couplings, which take it for a constant.
    def loss(adjoint, args):
        return total(solve(Recorded(1.0, stop), Y0, args, adjoint))

    pair = gradients(loss, jnp.array(1.3))
    assert relative_difference(*pair) < TOL


# Equinox warns of the array too.
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static:UserWarning")
@pytest.mark.parametrize("scale", [jnp.array(0.5), "half"])
def test_scale_is_no_number(scale):
    with pytest.raises(ValueError, match="must be a Python number, or a function"):
        dfxr.Coupling(0, lambda step, registers: (None, {}), scale)


def test_scale_is_zero():
    with pytest.raises(ValueError, match="cannot be undone"):
        dfxr.Coupling(0, lambda step, registers: (None, {}), scale=0.0)


def test_fixed_set_by_split():
    class Wrong(Recorded):
        def split(self, y, solver_state):
            return dfxr.Registers((y, solver_state[0]), fixed=solver_state[1])

    with pytest.raises(ValueError, match="select that part of the solver state in"):
        solve(Wrong(1.0), Y0, jnp.array(1.3), dfxr.ReversibleAdjoint())


def test_evaluate_not_shared():
    class Wrong(Damped):
        has_evaluate = True

        def couplings(self):
            return (dfxr.Coupling(0, self._drift), dfxr.Coupling(1, self._kick))

    with pytest.raises(ValueError, match="update the same register"):
        solve(Wrong(1.0), Y0, jnp.array(1.3), dfxr.ReversibleAdjoint())


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    [Recorded(1.0, True), dfxr.LeapfrogMidpoint(), Forgetful()],
    ids=["recorded", "leapfrog", "checkpoints"],
)
def test_elements_that_finish_early(solver):
    # One of them makes no step at all; and the checkpoint of another is at its first.
    t1 = jnp.array([0.0, 0.25, 1.0])

    def loss(adjoint, params):
        y0, args = params
        fn = lambda t1: total(solve(solver, y0, args, adjoint, t1))
        return jnp.sum(jax.vmap(fn)(t1))

    params = (Y0, jnp.array(1.3))
    if isinstance(solver, Forgetful):
        ours, _ = gradients(loss, params)
        # The same steps.
        expected = jax.jit(
            jax.grad(
                lambda params: jnp.sum(
                    jax.vmap(
                        lambda t1: total(
                            solve(
                                GenericLeapfrog(), *params, diffrax.DirectAdjoint(), t1
                            )
                        )
                    )(t1)
                )
            )
        )(params)
    else:
        ours, expected = gradients(loss, params)
    assert relative_difference(ours, expected) < TOL


@pytest.mark.long
@pytest.mark.parametrize("coupling_parameter", [0.9, "auto"])
def test_hessian(coupling_parameter):
    # Forward over reverse, batched.
    def loss(adjoint, y0):
        solver = dfxr.UReversible(diffrax.Heun(), coupling_parameter)
        return total(solve(solver, y0, jnp.array(1.3), adjoint))

    hessian = eqx.filter_jit(jax.hessian(ft.partial(loss, dfxr.ReversibleAdjoint())))
    forward = jax.jacfwd(jax.jacfwd(ft.partial(loss, diffrax.ForwardMode())))
    assert relative_difference(hessian(Y0), jax.jit(forward)(Y0)) < TOL


def test_progress_meter(capfd):
    def loss(adjoint, y0):
        solver = dfxr.UReversible(diffrax.Heun())
        meter = diffrax.TextProgressMeter(minimum_increase=0.5)
        return total(solve(solver, y0, jnp.array(1.3), adjoint, progress_meter=meter))

    assert relative_difference(*gradients(loss, Y0)) < TOL
    jax.effects_barrier()
    assert "100.00%" in capfd.readouterr().out


def test_norm_that_closes_over_parameters():
    def loss(adjoint, y0):
        norm = lambda error: jnp.sqrt(jnp.mean((error / (1 + y0**2)) ** 2))
        controller = diffrax.PIDController(rtol=1e-2, atol=1e-3, norm=norm)
        solver = dfxr.UReversible(diffrax.Heun())
        return total(
            solve(solver, y0, jnp.array(1.3), adjoint, stepsize_controller=controller)
        )

    assert relative_difference(*gradients(loss, Y0)) < TOL


#
# What is rebuilt of the solver state
#


RIGHT, KEPT, ZERO, NAN, INEXACT, MISCOUNTED, FLIPPED, ALTERNATING = range(8)


class Remembering(dfxr.AbstractReversibleSolver):
    """Velocity Verlet, with the last force, a counter, and a flag in its state. All of
    them go into a step, and none into undoing `y`."""

    # How `backward_step` returns the state; in all of them `y` is right.
    mode: Any
    h: float
    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return dict(force=terms.vf(t0, y0, args), count=0, is_third=True)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def _kick(self, force, count, is_third):
        weight = jnp.where(count % 2 == 0, 1.0, 1.1) + jnp.where(is_third, 0.2, 0.0)
        kick = jnp.arctan(force[1])
        return 0.5 * self.h * weight * jnp.stack([kick, jnp.zeros_like(kick)])

    def _drift(self, y):
        p, _ = y
        return self.h * jnp.stack([jnp.zeros_like(p), p])

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1 = y0 + self._kick(**solver_state)
        y1 = y1 + self._drift(y1)
        force, count = terms.vf(t1, y1, args), solver_state["count"] + 1
        state1 = dict(force=force, count=count, is_third=count % 3 == 0)
        y1 = y1 + self._kick(force, count, False)
        return y1, None, dict(y0=y0, y1=y1), state1, diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        count = jnp.round(t0 / self.h).astype(solver_state["count"].dtype)
        y0 = y1 - self._kick(terms.vf(t1, y1, args), count + 1, False)
        y0 = y0 - self._drift(y0)
        force, is_third = terms.vf(t0, y0, args), count % 3 == 0
        y0 = y0 - self._kick(force, count, is_third)
        factor = jnp.array([1, 0, 0, jnp.nan, 1.001, 1, 1, 1])[self.mode]
        force = factor * force
        force = jnp.where(self.mode == KEPT, solver_state["force"], force)
        count = count + jnp.where(self.mode == MISCOUNTED, 1, 0)
        is_third = is_third ^ (self.mode == FLIPPED)
        # (Right again after two steps.)
        is_right = solver_state["is_third"] == ((count + 1) % 3 == 0)
        is_third = is_third ^ ((self.mode == ALTERNATING) & is_right)
        return (
            y0,
            dict(y0=y0, y1=y1),
            dict(force=force, count=count, is_third=is_third),
        )


NUM_STEPS = 128
counter = Counter()


@ft.partial(jax.jit, static_argnums=0)
def _remembering_gradient(adjoint, mode, args):
    def loss(args):
        def force(t, y, args):
            _, q = y
            out = counter.vector_field(-args * jnp.sin(3 * q) - args * t / 8)
            return jnp.stack([jnp.zeros_like(q), out - 1])

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(force),
            Remembering(mode, 1 / 32),
            0.0,
            NUM_STEPS / 32,
            1 / 32,
            # (At rest.)
            jnp.array([0.0, 0.5]),
            args,
            adjoint=adjoint,
            max_steps=NUM_STEPS,
        )
        return jnp.sum(sol.ys)

    return jax.grad(loss)(args)


@pytest.mark.one_in(1)
@pytest.mark.parametrize("mode", range(8))
def test_state_of_a_solver(mode, monkeypatch):
    monkeypatch.setattr(plan, "_PART_OF_RECORD", 1e9)
    # (It was handed on as it was, and the gradient was wrong by up to 150%.)
    args = jnp.array(1.3)
    ours = _remembering_gradient(dfxr.ReversibleAdjoint(), mode, args)
    jax.block_until_ready(ours)
    evaluations, _ = counter.take()
    expected = _remembering_gradient(diffrax.RecursiveCheckpointAdjoint(), mode, args)
    jax.block_until_ready(expected)
    counter.take()
    # A few roundings in each step.
    tolerance = 10 * NUM_STEPS * jnp.finfo(float).eps
    assert relative_difference(ours, expected) < tolerance
    # One a step there, and three back; and two at each of the few states that are
    # stored, where they are not the same.
    without_alarm = 4 * NUM_STEPS + 2 * 4
    assert (evaluations < without_alarm) == (mode == RIGHT)


@pytest.mark.parametrize("checkpoints", [1, 2, 4])
def test_what_is_right_after_two_steps(checkpoints):
    args = jnp.array(1.3)
    adjoint = dfxr.ReversibleAdjoint(checkpoints)
    ours = _remembering_gradient(adjoint, ALTERNATING, args)
    expected = _remembering_gradient(diffrax.RecursiveCheckpointAdjoint(), RIGHT, args)
    tolerance = 10 * NUM_STEPS * jnp.finfo(float).eps
    assert relative_difference(ours, expected) < tolerance


class Forgetting(dfxr.AbstractCouplingSolver):
    """A register is scaled by next to nothing in every fifth step."""

    form: str = eqx.field(static=True)
    m: Any
    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 1

    def init(self, terms, t0, t1, y0, args):
        return jnp.cos(y0), 0

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def recorded(self, solver_state):
        return solver_state[1]

    def split(self, y, solver_state):
        return dfxr.Registers((y, solver_state[0]))

    def merge(self, registers):
        y, r = registers.registers
        return y, (r, registers.fixed)

    def next_fixed(self, fixed, t0, t1):
        return fixed + 1

    def _is_forgetful(self, count):
        return (count % 5 == 4) & (self.form not in ("number", "reset"))

    def needs_checkpoint(self, solver_state, new_solver_state, made_jump):
        _, count = solver_state
        return (count % 5 == 4) & (self.form != "number")

    @property
    def resets(self):
        return self.form == "reset"

    def reset(self, registers, made_jump):
        y, r = registers.registers
        r = jnp.where(registers.fixed % 5 == 4, self.m * jnp.sin(y), r)
        return registers._replace(registers=(y, r)), made_jump

    def couplings(self):
        def scale(count):
            return jnp.where(self._is_forgetful(count), self.m, 1.0)

        forgets = dfxr.Coupling(
            1,
            lambda step, registers: (registers[0] / 3, {}),
            scale=1e-9 if self.form == "number" else scale,
        )
        add = lambda step, registers: (0.3 * step.control * jnp.cos(registers[0]), {})
        couplings = (
            dfxr.Coupling(1, add),
            dfxr.Coupling(0, self._advance),
            forgets,
            dfxr.Coupling(1, lambda step, registers: (-registers[0] / 7, {})),
        )
        if self.form == "first":
            return (dfxr.Coupling(1, None, scale=scale), *couplings[:2])
        return couplings

    def _advance(self, step, registers):
        y = step.terms.vf(step.t0, registers[1], step.args)
        return jnp.sin(step.control * y), {}

    def finish(self, registers0, registers1, infos):
        return None, dict(y0=registers0[0], y1=registers1[0])


@ft.partial(jax.jit, static_argnums=(0, 1))
def _forgetting_gradient(form, adjoint, params):
    def loss(params):
        m, args = params
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, a: a * jnp.tanh(y) + 0.2),
            Forgetting(form, m),
            0.0,
            1.0,
            1 / 64,
            Y0,
            args,
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(sol.ys)

    return jax.grad(loss)(params)


# (Of the solver, which is bound to `_advance`.)
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static:UserWarning")
@pytest.mark.parametrize("m", [1e-6, 1e-16, 0.0])
@pytest.mark.parametrize("form", ["first", "after", "number", "reset"])
def test_scale_that_forgets(form, m):
    # (After a shift: that was differentiated at a rounding error over `m`.)
    params = jnp.array(m), jnp.array(1.3)
    ours, expected = [
        _forgetting_gradient(form, adjoint, params)
        for adjoint in (
            dfxr.ReversibleAdjoint(checkpoints=4),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    ]
    for a, b in zip(ours, expected):
        # A few roundings in each of 64 steps; and for `m` in another step too.
        assert jnp.allclose(a, b, rtol=1e3 * 64 * jnp.finfo(float).eps, atol=0)


class Thrown(Damped):
    """Its last drift is so long that the register before it is lost to rounding."""

    def couplings(self):
        kick = dfxr.Coupling(1, self._kick, scale=0.5)
        far = lambda step, registers: (1e8 * jnp.cos(registers[1]), {})
        return (dfxr.Coupling(0, self._drift), kick, dfxr.Coupling(0, far))


def test_middle_of_a_step_whose_start_is_known():
    @ft.partial(jax.jit, static_argnums=0)
    def gradient(adjoint, args):
        def loss(args):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, a: jnp.sin(a * y)),
                Thrown(0.5),
                0.0,
                1.0,
                0.5,
                jnp.array([0.3]),
                args,
                adjoint=adjoint,
            )
            return jnp.sum(jnp.sin(1e-8 * sol.ys))

        return jax.grad(loss)(args)

    args = jnp.array(1.0)
    ours = gradient(dfxr.ReversibleAdjoint(checkpoint_every=1), args)
    expected = gradient(diffrax.RecursiveCheckpointAdjoint(), args)
    # (What is undone is off by 1e8 roundings.)
    assert relative_difference(ours, expected) < TOL
