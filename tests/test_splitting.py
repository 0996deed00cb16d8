"""Palindromic splittings keep the energy of long orbits, have the right gradient after
many steps, and take what a user makes of `AbstractSplitting`; all else is refused."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffrax_reversible as dfxr

from .helpers import relative_difference


#
# Long solves of an eccentric orbit
#

ECCENTRICITY = 0.6
ORBIT = (
    diffrax.ODETerm(lambda t, q, args: -q / jnp.sum(q**2) ** 1.5),
    diffrax.ODETerm(lambda t, p, args: p),
)
ORBIT_Y0 = (
    jnp.array([0.0, ((1 + ECCENTRICITY) / (1 - ECCENTRICITY)) ** 0.5]),
    jnp.array([1 - ECCENTRICITY, 0.0]),
)


def _orbit(terms, solver, per_period, num_steps, y0, adjoint, saveat=None):
    h = 2 * np.pi / per_period
    return diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        num_steps * h,
        h,
        y0,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        adjoint=adjoint,
        max_steps=num_steps + 1,
    )


def _energy(t, y, args):
    p, q = y
    return jnp.sum(p**2) / 2 - 1 / jnp.sqrt(jnp.sum(q**2))


def _energy_errors(terms, solver, per_period, num_steps):
    """The largest in the first and in the last tenth of the steps."""
    # A number of steps that is no divisor of a period, so that all of it is seen.
    saveat = diffrax.SaveAt(steps=7, fn=_energy)
    run = jax.jit(
        lambda y0: (
            _orbit(
                terms, solver, per_period, num_steps, y0, diffrax.ForwardMode(), saveat
            ).ys
        )
    )
    energies = run(ORBIT_Y0)
    errors = np.abs(energies[np.isfinite(energies)] - _energy(0, ORBIT_Y0, None))
    tenth = errors.size // 10
    return np.max(errors[:tenth]), np.max(errors[-tenth:])


@pytest.mark.parametrize(
    "solver,per_period,size",
    [
        (dfxr.StormerVerlet(), 400, 1e-3),
        (dfxr.StormerVerlet("position"), 400, 1e-3),
        (dfxr.BlanesMoan4(), 80, 1e-4),
    ],
)
def test_energy(solver, per_period, size):
    first, last = _energy_errors(ORBIT, solver, per_period, 200_000)
    assert first < size
    assert last < 1.01 * first


def test_energy_of_a_method_that_is_not_symplectic():
    force, _ = ORBIT
    term = diffrax.ODETerm(lambda t, y, args: (force.vf(t, y[1], args), y[0]))
    first, last = _energy_errors(term, diffrax.Tsit5(), 80, 20_000)
    assert last > 3 * first


@pytest.mark.long
def test_gradient_of_many_steps():
    solver, per_period = dfxr.StormerVerlet(), 400

    def loss(num_steps, adjoint, y0):
        ys = _orbit(ORBIT, solver, per_period, num_steps, y0, adjoint).ys
        return sum(jnp.sum(jnp.sin(x)) for x in jtu.tree_leaves(ys))

    # Of both the record has whole rows, of 64 steps each.
    few, many = 1024, 102_400
    adjoint = dfxr.ReversibleAdjoint()
    few_compiled, compiled = (
        jax.jit(jax.grad(ft.partial(loss, n, adjoint))).lower(ORBIT_Y0).compile()
        for n in (few, many)
    )
    grad = compiled(ORBIT_Y0)
    # Independently: in forward mode, which undoes nothing.
    derivative = jax.jit(
        lambda v: jax.jvp(
            ft.partial(loss, many, diffrax.ForwardMode()), (ORBIT_Y0,), (v,)
        )[1]
    )
    zero = jnp.zeros(2)
    expected = (
        jnp.stack([derivative((e, zero)) for e in jnp.eye(2)]),
        jnp.stack([derivative((zero, e)) for e in jnp.eye(2)]),
    )
    # Rounding errors grow like the square of time here. Against 80 bits this gradient
    # and the default adjoint's are off by 4e-8 to 1.4e-7, as XLA orders the sums.
    assert relative_difference(grad, expected) < 1e-6
    # And the memory does not grow with the steps.
    size = lambda x: x.memory_analysis().temp_size_in_bytes
    assert size(compiled) - size(few_compiled) < 2**17


#
# Time and control
#


class _Smooth(diffrax.AbstractPath):
    t0 = -10.0
    t1 = 10.0

    def evaluate(self, t0, t1=None, left=True):
        x = lambda t: (t + 0.3 * jnp.sin(2 * t))[None]
        return x(t0) if t1 is None else x(t1) - x(t0)


def _rate(t):
    return 1 + 0.6 * jnp.cos(2 * t)


def _force(t, q, args):
    return -jnp.sin(q) + 0.4 * jnp.cos(3 * t)


def _velocity(t, p, args):
    return p / jnp.sqrt(1 + p**2) + 0.2 * jnp.sin(t)


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_order_in_time(controlled, sign):
    # Both vector fields depend on time; with a control they are multiplied by its rate.
    fields = (_force, _velocity)
    if controlled:
        terms = tuple(
            diffrax.ControlTerm(lambda t, x, args, f=f: f(t, x, args)[None], _Smooth())
            for f in fields
        )
        rate = _rate
    else:
        terms = tuple(map(diffrax.ODETerm, fields))
        rate = lambda t: 1.0
    whole = diffrax.ODETerm(
        lambda t, y, args: (
            rate(t) * _force(t, y[1], args),
            rate(t) * _velocity(t, y[0], args),
        )
    )
    y0 = (jnp.array(0.3), jnp.array(1.0))

    @ft.partial(jax.jit, static_argnums=(0, 1))
    def solve(solver, num_steps):
        return diffrax.diffeqsolve(
            whole if isinstance(solver, diffrax.Dopri8) else terms,
            solver,
            0.0,
            sign * 2.0,
            sign * 2.0 / num_steps,
            y0,
            adjoint=diffrax.ForwardMode(),
            max_steps=num_steps + 1,
        ).ys

    exact = solve(diffrax.Dopri8(), 200)
    few, many = (
        max(
            jtu.tree_leaves(
                jtu.tree_map(
                    lambda a, b: float(abs(a[0] - b[0])),
                    solve(dfxr.BlanesMoan4(), n),
                    exact,
                )
            )
        )
        for n in (10, 40)
    )
    assert 3.7 < np.log(few / many) / np.log(4) < 4.5


#
# A method of a user's, and what is refused
#


class McLachlan2(dfxr.AbstractSplitting):
    kicks = (0.1932, 0.6136, 0.1932)
    drifts = (0.5, 0.5)

    def order(self, terms):
        return 2


def test_user_method():
    # More accurate than a Stormer--Verlet method of the same number of evaluations.
    errors = [
        _energy_errors(ORBIT, solver, per_period, 2_000)[0]
        for solver, per_period in ((dfxr.StormerVerlet(), 400), (McLachlan2(), 200))
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "kicks_,drifts_,match",
    [
        ((0.5, 0.5), (0.5, 0.5), "must differ in length by one"),
        ((1.0,), (), "must differ in length by one"),
        ((0.5, 0.5), (0.9,), "`Method.drifts` must add up to 1"),
        ((0.3, 0.7), (1.0,), "`Method.kicks` must be a palindrome"),
        ((0.5, 0.0, 0.5), (0.5, 0.5), "must not have zeros"),
    ],
)
def test_invalid_method(kicks_, drifts_, match):
    class Method(dfxr.AbstractSplitting):
        kicks = kicks_
        drifts = drifts_

        def order(self, terms):
            return 2

    with pytest.raises(ValueError, match=match):
        Method()


def test_invalid_form():
    with pytest.raises(ValueError, match='must be "velocity" or "position"'):
        dfxr.StormerVerlet("leapfrog")


@pytest.mark.filterwarnings("ignore:.*not marked as converging.*:UserWarning")
def test_sde():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jax.random.key(0))
    terms = (
        diffrax.ControlTerm(lambda t, q, args: jnp.cos(q), path),
        diffrax.ODETerm(lambda t, p, args: p),
    )
    y0 = (jnp.array(0.0), jnp.array(1.0))
    solve = lambda solver: diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.5, y0)
    solve(dfxr.StormerVerlet())
    with pytest.raises(ValueError, match="sub-steps go backwards in time"):
        solve(dfxr.BlanesMoan4())


class _Leap(diffrax.AbstractStepSizeController):
    """Steps of one size, with a jump after the first to reach 1/2."""

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, dt0

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, state):
        is_there = (t0 < 0.5) & (t1 >= 0.5)
        next_t0 = jnp.where(is_there, jnp.nextafter(t1, jnp.inf), t1)
        result = diffrax.RESULTS.successful
        return True, next_t0, next_t0 + state, is_there, state, result


@pytest.mark.parametrize("form", ["velocity", "position"])
def test_jump(form):
    # The shared evaluation is not the same on both sides.
    leap = lambda t: jnp.where(t > 0.5, 2.0, 0.0)
    terms = (
        diffrax.ODETerm(lambda t, q, args: leap(t) - jnp.sin(q)),
        diffrax.ODETerm(lambda t, p, args: leap(t) + p),
    )

    def loss(adjoint, y0):
        sol = diffrax.diffeqsolve(
            terms,
            dfxr.StormerVerlet(form),
            0.0,
            1.0,
            0.125,
            y0,
            stepsize_controller=_Leap(),
            adjoint=adjoint,
            max_steps=32,
        )
        return sum(jnp.sum(x) for x in jtu.tree_leaves(sol.ys)), sol.stats

    run = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    y0 = (jnp.array(0.3), jnp.array(1.0))
    ours, stats = run(dfxr.ReversibleAdjoint(), y0)
    expected, _ = run(diffrax.RecursiveCheckpointAdjoint(), y0)
    assert stats["num_checkpoints"] == 1
    assert relative_difference(ours, expected) < 1e-12
