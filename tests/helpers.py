"""Solvers, problems, and comparisons shared by the tests.

A solver that is added to `SOLVERS` gets every generic test.
"""

import dataclasses
import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import plan, rule


#
# Solvers that a user might write: one method, by both routes.
#


def _half(control, v):
    return jtu.tree_map(lambda x: 0.5 * control * x, v)


def _add(x, y):
    return jtu.tree_map(jnp.add, x, y)


def _sub(x, y):
    return jtu.tree_map(jnp.subtract, x, y)


class GenericLeapfrog(dfxr.AbstractReversibleSolver):
    """Asynchronous leapfrog, with nothing but `step` and `backward_step`."""

    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        # A state with more in it than arrays of the shape of `y`.
        return dict(v=terms.vf(t0, y0, args), count=0)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        h = t1 - t0
        v0 = solver_state["v"]
        y_mid = _add(y0, _half(h, v0))
        f = terms.vf(t0 + 0.5 * h, y_mid, args)
        v1 = jtu.tree_map(lambda f, v: 2 * f - v, f, v0)
        y1 = _add(y_mid, _half(h, v1))
        solver_state = dict(v=v1, count=solver_state["count"] + 1)
        return y1, None, dict(y0=y0, y1=y1), solver_state, diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        h = t1 - t0
        v1 = solver_state["v"]
        y_mid = _sub(y1, _half(h, v1))
        f = terms.vf(t0 + 0.5 * h, y_mid, args)
        v0 = jtu.tree_map(lambda f, v: 2 * f - v, f, v1)
        y0 = _sub(y_mid, _half(h, v0))
        return y0, dict(y0=y0, y1=y1), dict(v=v0, count=solver_state["count"] - 1)


class CouplingLeapfrog(dfxr.AbstractCouplingSolver):
    """Asynchronous leapfrog, as couplings."""

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
            dfxr.Coupling(1, self._kick, scale=-1.0),
            dfxr.Coupling(0, self._drift),
        )

    def _drift(self, step, registers):
        _, v = registers
        return _half(step.control, v), {}

    def _kick(self, step, registers):
        y, _ = registers
        f = step.terms.vf(step.t0 + 0.5 * (step.t1 - step.t0), y, step.args)
        return jtu.tree_map(lambda x: 2 * x, f), {}

    def finish(self, registers0, registers1, infos):
        return None, dict(y0=registers0[0], y1=registers1[0])


class GenericUReversible(dfxr.AbstractReversibleSolver):
    """`UReversible(Heun())` by the generic route, through diffrax's own `Heun.step`."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation
    coupling_parameter: float = 0.9

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return y0

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def _psi(self, terms, t0, t1, y, args):
        y1, *_ = diffrax.Heun().step(terms, t0, t1, y, args, None, False)
        return _sub(y1, y)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        z0, m = solver_state, self.coupling_parameter
        mixed = jtu.tree_map(lambda y, z: m * y + (1 - m) * z, y0, z0)
        y1 = _add(mixed, self._psi(terms, t0, t1, z0, args))
        z1 = _sub(z0, self._psi(terms, t1, t0, y1, args))
        return y1, None, dict(y0=y0, y1=y1), z1, diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        m = self.coupling_parameter
        z0 = _add(solver_state, self._psi(terms, t1, t0, y1, args))
        mixed = _sub(y1, self._psi(terms, t0, t1, z0, args))
        y0 = jtu.tree_map(lambda y, z: (y - (1 - m) * z) / m, mixed, z0)
        return y0, dict(y0=y0, y1=y1), z0


class AdamsBashforth(diffrax.AbstractSolver):
    """Of two steps of the same size, with the last slope as its state: a solver that
    cannot be undone."""

    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2

    def init(self, terms, t0, t1, y0, args):
        return dict(f=terms.vf(t0, y0, args), count=0)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        h = t1 - t0
        f = terms.vf(t0, y0, args)
        y1 = jtu.tree_map(
            lambda y, a, b: y + h * (1.5 * a - 0.5 * b), y0, f, solver_state["f"]
        )
        state = dict(f=f, count=solver_state["count"] + 1)
        return y1, None, dict(y0=y0, y1=y1), state, diffrax.RESULTS.successful


@dataclasses.dataclass(frozen=True)
class SolverCase:
    solver: diffrax.AbstractSolver
    order: int
    # Whether `terms` and `y` are pairs.
    pair: bool = False
    # Which kinds of terms it takes, besides ODEs.
    controls: tuple[str, ...] = ("cde", "sde")
    adaptive: bool = False
    # diffrax's own solver that makes the same steps.
    host: Any = None
    # By how much a step back can amplify rounding, besides what the step size does.
    amplification: float = 1.0
    # Whether that happens in every step, so that many of them cannot be undone.
    forgets: bool = False
    # For those that need noise in all terms: whether it must be "additive", or may be
    # "general".
    noise: str | None = None


U = dfxr.UReversible
# Those that undo their steps.
REVERSIBLE = {
    # With a coupling drawn down to 1/8 where steps are made one by one.
    "UReversible-Heun": SolverCase(
        U(diffrax.Heun()), 2, adaptive=True, amplification=8, forgets=True
    ),
    "UReversible-Heun-0.999": SolverCase(U(diffrax.Heun(), 0.999), 2, adaptive=True),
    "UReversible-Ralston-0.5": SolverCase(
        U(diffrax.Ralston(), 0.5),
        2,
        controls=("cde",),
        adaptive=True,
        amplification=2,
        forgets=True,
    ),
    "UReversible-Bosh3-1": SolverCase(
        U(diffrax.Bosh3(), 1), 3, controls=("cde",), adaptive=True
    ),
    "UReversible-ShARK": SolverCase(
        U(diffrax.ShARK()),
        2,
        controls=("sde",),
        adaptive=True,
        amplification=8,
        forgets=True,
        noise="additive",
    ),
    "UReversible-SPaRK-0.999": SolverCase(
        U(diffrax.SPaRK(), 0.999), 2, controls=("sde",), adaptive=True, noise="general"
    ),
    "ReversibleHeun": SolverCase(
        dfxr.ReversibleHeun(), 2, adaptive=True, host=diffrax.ReversibleHeun()
    ),
    "LeapfrogMidpoint": SolverCase(
        dfxr.LeapfrogMidpoint(), 2, controls=("cde",), host=diffrax.LeapfrogMidpoint()
    ),
    "ReversibleHeun-sync": SolverCase(
        dfxr.ReversibleHeun(full_sync=True), 2, adaptive=True
    ),
    "LeapfrogMidpoint-sync": SolverCase(
        dfxr.LeapfrogMidpoint(full_sync=True), 2, controls=("cde",)
    ),
    "SemiImplicitEuler": SolverCase(
        dfxr.SemiImplicitEuler(), 1, pair=True, host=diffrax.SemiImplicitEuler()
    ),
    "AsynchronousLeapfrog": SolverCase(dfxr.AsynchronousLeapfrog(), 2, adaptive=True),
    # One of the splittings for all, which differ in nothing but their coefficients.
    "StormerVerlet": SolverCase(dfxr.StormerVerlet(), 2, pair=True),
    "user-generic": SolverCase(GenericLeapfrog(), 2, controls=()),
    "user-coupling": SolverCase(CouplingLeapfrog(), 2, controls=()),
}

# Those that do not.
_ROOT_FINDER = diffrax.VeryChord(rtol=1e-5, atol=1e-5)
RECOMPUTED = {
    # Their slope is a part of the state, or not.
    "Tsit5": SolverCase(diffrax.Tsit5(), 5, controls=("cde",), adaptive=True),
    "Heun": SolverCase(diffrax.Heun(), 2, adaptive=True),
    "Euler": SolverCase(diffrax.Euler(), 1),
    "HalfSolver": SolverCase(diffrax.HalfSolver(diffrax.Euler()), 1, adaptive=True),
    "EulerHeun": SolverCase(diffrax.EulerHeun(), 1, controls=("sde",), noise="general"),
    "SEA": SolverCase(diffrax.SEA(), 1, controls=("sde",), noise="additive"),
    "Kvaerno3": SolverCase(
        diffrax.Kvaerno3(root_finder=_ROOT_FINDER), 3, controls=(), adaptive=True
    ),
    "ImplicitEuler": SolverCase(
        diffrax.ImplicitEuler(root_finder=optimistix.Newton(1e-8, 1e-8)),
        1,
        controls=(),
        adaptive=True,
    ),
    "user-multistep": SolverCase(AdamsBashforth(), 2, controls=()),
}

SOLVERS = {**REVERSIBLE, **RECOMPUTED}

STRUCTURES = {
    "scalar": lambda f: f(()),
    "vector": lambda f: f((3,)),
    "pytree": lambda f: {"a": f((2,)), "b": (f(()), f((1, 2)))},
    "none": lambda f: (f((2,)), None),
}


def random_like(struct, key, scale=1.0):
    leaves, treedef = jtu.tree_flatten(struct)
    keys = jax.random.split(key, max(len(leaves), 1))
    return jtu.tree_unflatten(
        treedef,
        [
            scale * jax.random.normal(k, jnp.shape(x), jnp.result_type(x))
            for k, x in zip(keys, leaves)
        ],
    )


class Network(eqx.Module):
    """A bounded vector field between any two PyTrees, with a few parameters."""

    w_in: Any
    w_out: Any
    out: Any = eqx.field(static=True)

    def __init__(self, y, out, key, extra=()):
        flat, _ = jfu.ravel_pytree(y)
        flat_out, self_out = jfu.ravel_pytree(out)
        k1, k2 = jax.random.split(key)
        width = 4
        self.w_in = jax.random.normal(k1, (width, flat.size), flat.dtype)
        self.w_out = jax.random.normal(k2, (flat_out.size, width), flat.dtype) / width
        self.out = self_out

    def __call__(self, t, y, args):
        flat, _ = jfu.ravel_pytree(y)
        x = jnp.tanh(self.w_in @ flat + jnp.cos(t).astype(flat.dtype))
        return self.out(args["scale"] * (self.w_out @ x))


def _zeros(dtype):
    return lambda shape: jnp.zeros(shape, dtype)


def make_y(case: SolverCase, structure: str, dtype):
    y = STRUCTURES[structure](_zeros(dtype))
    return (y, y) if case.pair else y


CONTROL_SIZE = 2


def make_terms(case: SolverCase, kind: str, structure: str, dtype, key):
    y = make_y(case, structure, dtype)
    keys = iter(jax.random.split(key, 8))

    def ode(y_in, y_out):
        return diffrax.ODETerm(Network(y_in, y_out, next(keys)))

    def driven(y_in, y_out, control):
        matrix = jtu.tree_map(
            lambda x: jnp.zeros((*x.shape, CONTROL_SIZE), x.dtype), y_out
        )
        # Broadcast the control over the leaves of `y`.
        control_tree = ft.partial(_BroadcastPath, control, jtu.tree_structure(y_out))()
        network = Network(y_in, matrix, next(keys))
        if case.noise == "additive":
            network = _AtOnes(network)
        return diffrax.ControlTerm(network, control_tree)

    def term(y_in, y_out):
        if kind == "ode" and case.noise is not None:
            path = SmoothPath((CONTROL_SIZE,), dtype)
            return diffrax.MultiTerm(ode(y_in, y_out), driven(y_in, y_out, path))
        if kind == "ode":
            return ode(y_in, y_out)
        if kind == "cde":
            ts = jnp.linspace(-2, 2, 9, dtype=dtype)
            xs = jax.random.normal(next(keys), (9, CONTROL_SIZE), dtype)
            return driven(y_in, y_out, diffrax.LinearInterpolation(ts, xs))
        if kind == "sde":
            # Of a coarse tolerance, as its depth is compiled at every query. (Its ends
            # are not arrays, or they would be differentiated: NaN for every adjoint.)
            path = diffrax.VirtualBrownianTree(
                -2.0,
                2.0,
                0.05,
                jax.ShapeDtypeStruct((CONTROL_SIZE,), dtype),
                next(keys),
                diffrax.SpaceTimeLevyArea if case.noise else diffrax.BrownianIncrement,
            )
            return diffrax.MultiTerm(ode(y_in, y_out), driven(y_in, y_out, path))
        raise ValueError(kind)

    if case.pair:
        p, q = y
        return term(q, p), term(p, q)
    return term(y, y)


def from_term(case: SolverCase, term):
    """As a solver takes them, from a single term of an ODE."""
    if case.pair:
        return term, term
    if case.noise is None:
        return term
    path = SmoothPath((), jnp.float64)
    noise = diffrax.ControlTerm(lambda t, y, args: 0.1 * jnp.ones_like(y), path)
    return diffrax.MultiTerm(term, noise)


class _AtOnes(eqx.Module):
    """Does not depend on `y`."""

    network: Network

    def __call__(self, t, y, args):
        return self.network(t, jtu.tree_map(jnp.ones_like, y), args)


class SmoothPath(diffrax.AbstractPath):
    """`sin(t)`, with its Levy areas."""

    shape: tuple[int, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @property
    def t0(self):
        return -jnp.inf

    @property
    def t1(self):
        return jnp.inf

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        dt = t1 - t0
        h = jnp.where(dt == 0, 1, dt)
        w = jnp.sin(t1) - jnp.sin(t0)
        area = (jnp.cos(t0) - jnp.cos(t1)) / h - (jnp.sin(t0) + jnp.sin(t1)) / 2
        scales = 1 + jnp.arange(np.prod(self.shape, dtype=int)).astype(self.dtype)
        w, area = (x.astype(self.dtype) * scales.reshape(self.shape) for x in (w, area))
        if not use_levy:
            return w
        return diffrax.SpaceTimeLevyArea(dt=dt.astype(self.dtype), W=w, H=area)


class _BroadcastPath(diffrax.AbstractPath):
    path: diffrax.AbstractPath
    treedef: Any = eqx.field(static=True)

    @property
    def t0(self):
        return self.path.t0

    @property
    def t1(self):
        return self.path.t1

    def evaluate(self, t0, t1=None, left=True, **kwargs):
        x = self.path.evaluate(t0, t1, left, **kwargs)
        broadcast = lambda x: [x] * self.treedef.num_leaves
        return jtu.tree_map(lambda x: jtu.tree_unflatten(self.treedef, broadcast(x)), x)


def make_args(key, dtype):
    return {"scale": 1 + 0.3 * jax.random.normal(key, (), dtype), "label": "args"}


def spy_segments(monkeypatch):
    """A list to which each solve that is traced adds its `Segments`, and the state that
    it begins with."""
    found, make = [], plan.make_segments

    def make_segments(pullback, noise, init_state, *args, **kwargs):
        segments = make(pullback, noise, init_state, *args, **kwargs)
        found.append((segments, init_state))
        return segments

    monkeypatch.setattr(rule, "make_segments", make_segments)
    return found


def short_records(monkeypatch):
    """Makes records so short that even a short solve does not fit into one: of one
    segment."""
    monkeypatch.setattr(plan, "_MOST_STEPS", 1)


#
# Comparisons
#


def flatten(tree):
    leaves = [
        np.ravel(np.asarray(x))
        for x in jtu.tree_leaves(tree)
        if eqx.is_inexact_array(x) or isinstance(x, (float, np.ndarray))
    ]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def relative_difference(x, y):
    """Largest difference, relative to the largest element."""
    x, y = flatten(x), flatten(y)
    assert x.shape == y.shape
    if x.size == 0:
        return 0.0
    assert np.all(np.isfinite(x)) and np.all(np.isfinite(y))
    return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))
