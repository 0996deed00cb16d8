"""Everyday models, for `stability.py`.

Each is a vector field, what it starts from, its parameters, how long it is solved for,
a fixed step, and an absolute tolerance for adaptive ones. They are padded to a common
size, so that a solver is compiled once for all of a group.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Model(NamedTuple):
    vector_field: Callable
    y0: np.ndarray
    p: np.ndarray
    t1: float
    step: float
    atol: float
    # Into how many components, of equal size, `y0` and the parameters are split, if not
    # into their elements: a field is one.
    num_parts: tuple[int | None, int | None] = (None, None)

    def parts(self) -> np.ndarray:
        """The number of the part that each element of `y0` belongs to, and then each of
        the parameters."""
        numbers = []
        for x, n in zip((self.y0, self.p), self.num_parts):
            first = max(map(int, numbers), default=-1) + 1
            numbers += list(first + np.arange(x.size) * (n or x.size) // x.size)
        return np.array(numbers)


class Group:
    """Models that share a compiled function."""

    def __init__(self, models: dict[str, Model]):
        self.models = models
        self.names = list(models)
        self.size = max(m.y0.size for m in models.values())
        self.num_parameters = max(m.p.size for m in models.values())
        self._branches = [self._branch(m) for m in models.values()]

    def _branch(self, model: Model) -> Callable:
        # What is there already is repeated, so that norms are as without.
        repeated = np.arange(self.size) % model.y0.size

        def branch(t, y, p):
            f = model.vector_field(t, y[: model.y0.size], p[: model.p.size])
            return f.astype(y.dtype)[repeated]

        return branch

    def vector_field(self, t, y, args):
        index, p = args
        return jax.lax.switch(index, self._branches, t, y, p)

    def data(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`y0` and the parameters, padded."""
        model = self.models[name]
        p = np.zeros(self.num_parameters)
        p[: model.p.size] = model.p
        return model.y0[np.arange(self.size) % model.y0.size], p


_SMALL: dict[str, Model] = {}
_LARGE: dict[str, Model] = {}


def _model(name, y0, p, t1, step, atol=1e-6, models=_SMALL, num_parts=(None, None)):
    def add(vector_field):
        y0_, p_ = np.asarray(y0, float), np.asarray(p, float)
        models[name] = Model(vector_field, y0_, p_, t1, step, atol, num_parts)
        return vector_field

    return add


#
# Mechanics
#


@_model("oscillator", [1, 0], [1], 100, 0.05)
def _oscillator(t, y, p):
    return jnp.stack([y[1], -p[0] * y[0]])


def _kepler(t, y, p):
    q, v = y[:2], y[2:]
    return jnp.concatenate([v, -p[0] * q / jnp.sum(q**2) ** 1.5])


_model("Kepler 0.3", [0.7, 0, 0, math.sqrt(1.3 / 0.7)], [1], 60, 0.02)(_kepler)
_model("Kepler 0.9", [0.1, 0, 0, math.sqrt(1.9 / 0.1)], [1], 20, 0.0025)(_kepler)
# In metres and seconds.
_model("low orbit", [7e6, 0, 0, 7.6e3], [3.986e14], 12000, 20, 1e-3)(_kepler)


@_model("Henon-Heiles", [0, 0.1, 0.4, 0.2], [1], 60, 0.05)
def _henon_heiles(t, y, p):
    q1, q2, p1, p2 = y
    f1, f2 = -p[0] * q1 - 2 * q1 * q2, -p[0] * q2 - q1**2 + q2**2
    return jnp.stack([p1, p2, f1, f2])


@_model("Duffing", [0.1, 0], [0.25, 0.3], 40, 0.05)
def _duffing(t, y, p):
    force = y[0] - y[0] ** 3 - p[0] * y[1] + p[1] * jnp.cos(t)
    return jnp.stack([y[1], force])


@_model("pendulum with cost", [1, 0, 0], [2, 0.1], 20, 0.05)
def _pendulum(t, y, p):
    force = -p[0] * jnp.sin(y[0]) - p[1] * y[1]
    return jnp.stack([y[1], force, y[0] ** 2 + 0.1 * y[1] ** 2])


@_model("a thrown ball", [0, 100, 30, 300], [0.02, 0.01], 8, 0.05)
def _ball(t, y, p):
    _, u, v, temperature = y
    drag = -p[0] * jnp.abs(y[1:3]) * y[1:3]
    return jnp.stack([v, drag[0], drag[1] - 9.81, -p[1] * (temperature - 290)])


@_model("switched input", [1, 0], [1, 0.05], 30, 0.05)
def _switched(t, y, p):
    force = jnp.where(jnp.sin(0.7 * t) > 0, 0.5, -0.5)
    return jnp.stack([y[1], -p[0] * y[0] - p[1] * y[1] + force])


@_model("next to 1e6", [1, 0, 1e6], [30, 8], 10, 0.05)
def _next_to_large(t, y, p):
    return jnp.stack([y[1], -p[0] * y[0] - p[1] * y[1], 0 * y[2]])


@_model("next to 1e-6", [1, 0, 1e-6], [5], 20, 0.05, 1e-9)
def _next_to_small(t, y, p):
    return jnp.stack([y[1], -y[0], -p[0] * (y[2] - 1e-6 * jnp.sin(t))])


#
# Chaos and relaxation
#


def _lorenz(t, y, p):
    a, b, c = y
    return jnp.stack([p[0] * (b - a), a * (p[1] - c) - b, a * b - p[2] * c])


_model("Lorenz 5", [1, 1, 1], [10, 28, 8 / 3], 5, 0.01)(_lorenz)
_model("Lorenz 15", [1, 1, 1], [10, 28, 8 / 3], 15, 0.005)(_lorenz)


def _van_der_pol(t, y, p):
    return jnp.stack([y[1], p[0] * (1 - y[0] ** 2) * y[1] - y[0]])


_model("Van der Pol 5", [2, 0], [5], 10, 0.01)(_van_der_pol)
_model("Van der Pol 12", [2, 0], [12], 15, 0.005)(_van_der_pol)
_model("Van der Pol 20", [2, 0], [20], 20, 0.005)(_van_der_pol)


@_model("slow and fast", [1, 1], [0.1, 20], 10, 0.01)
def _slow_and_fast(t, y, p):
    return jnp.stack([-p[0] * y[0] + y[1], -p[1] * y[1]])


def _decay(t, y, p):
    return -p * y


_model("y' = -5y", [1], [5], 10, 0.01)(_decay)
_model("y' = -50y", [1], [50], 4, 0.01)(_decay)


@_model("relaxation", [1, 0], [50], 4, 0.02)
def _relaxation(t, y, p):
    return jnp.stack([-p[0] * (y[0] - jnp.cos(3 * t)), y[0]])


@_model("zeros", [1, 0, 0, 3], [2], 20, 0.05)
def _zeros(t, y, p):
    return jnp.stack([-p[0] * y[0], 0 * y[1], y[2], 0 * y[3]])


#
# Chemistry and engineering
#


@_model("Robertson", [1, 0, 0], [0.04, 3e7, 1e4], 0.5, 2e-4, 1e-9)
def _robertson(t, y, p):
    a, b, c = p[0] * y[0], p[1] * y[1] ** 2, p[2] * y[1] * y[2]
    return jnp.stack([c - a, a - c - b, b])


@_model("Michaelis-Menten", [10, 1, 0, 0], [1, 0.5, 0.3], 20, 0.02)
def _michaelis_menten(t, y, p):
    binding, release = p[0] * y[0] * y[1], (p[1] + p[2]) * y[2]
    return jnp.stack(
        [p[1] * y[2] - binding, release - binding, binding - release, p[2] * y[2]]
    )


@_model("a chain of decays", [1e3, 0, 0, 0], [3, 0.5, 0.05, 0.001], 30, 0.05)
def _chain(t, y, p):
    rates = p * y
    return jnp.concatenate([-rates[:1], rates[:-1] - rates[1:]])


@_model("Brusselator", [1, 3.1], [1, 3], 20, 0.02)
def _brusselator(t, y, p):
    rate = y[0] ** 2 * y[1]
    return jnp.stack([p[0] + rate - (p[1] + 1) * y[0], p[1] * y[0] - rate])


@_model("stirred tank", [1, 300], [1e6, 0.1], 20, 0.02)
def _stirred_tank(t, y, p):
    rate = p[0] * jnp.exp(-5000 / y[1]) * y[0]
    cooling = 0.2 * (y[1] - 300)
    return jnp.stack(
        [p[1] * (1 - y[0]) - rate, p[1] * (300 - y[1]) + 150 * rate - cooling]
    )


@_model("circuit", [0, 0], [1e-3, 1e-6, 10], 2e-3, 5e-6, 1e-9)
def _circuit(t, y, p):
    voltage = 5 * jnp.cos(2e4 * t) - p[2] * y[1] - y[0] / p[1]
    return jnp.stack([y[1], voltage / p[0]])


@_model("two bodies of heat", [350, 280, 0], [0.5, 0.02], 50, 0.2)
def _heat_exchange(t, y, p):
    flow = p[0] * (y[0] - y[1])
    return jnp.stack([-flow, 0.1 * flow - p[1] * (y[1] - 270), y[0]])


#
# Life
#


@_model("Lotka-Volterra", [30, 4], [0.55, 0.028, 0.026, 0.84], 20, 0.05)
def _lotka_volterra(t, y, p):
    growth = jnp.stack([p[0] - p[1] * y[1], p[2] * y[0] - p[3]])
    return growth * y


@_model("pharmacokinetics", [100, 0, 0, 0], [1.5, 0.3, 0.8, 0.2], 48, 0.1)
def _pharmacokinetics(t, y, p):
    gut, blood, tissue, _ = y
    out = p[2] * blood - p[3] * tissue
    return jnp.stack([-p[0] * gut, p[0] * gut - p[1] * blood - out, out, blood])


@_model("SIR", [1e6 - 10, 10, 0], [0.4, 0.1], 100, 0.5, 1e-3)
def _sir(t, y, p):
    infections, recoveries = p[0] * y[0] * y[1] / 1e6, p[1] * y[1]
    return jnp.stack([-infections, infections - recoveries, recoveries])


@_model("SEIR", [1e7 - 1, 0, 1, 0], [0.5, 0.2, 0.1], 150, 0.5, 1e-3)
def _seir(t, y, p):
    a, b, c = p[0] * y[0] * y[2] / 1e7, p[1] * y[1], p[2] * y[2]
    return jnp.stack([-a, a - b, b - c, c])


@_model("FitzHugh-Nagumo", [-1, 1], [0.5, 0.08, 0.7, 0.8], 80, 0.1)
def _fitzhugh_nagumo(t, y, p):
    v, w = y
    return jnp.stack([v - v**3 / 3 - w + p[0], p[1] * (v + p[2] - p[3] * w)])


# In millivolts and milliseconds.
@_model("Hodgkin-Huxley", [-65, 0.053, 0.6, 0.318], [120, 36, 0.3, 10], 30, 0.02)
def _hodgkin_huxley(t, y, p):
    v, m, h, n = y

    def ratio(x):
        is_small = jnp.abs(x) < 1e-5
        x_safe = jnp.where(is_small, 1, x)
        return jnp.where(is_small, 1 + x / 2, x_safe / (1 - jnp.exp(-x_safe)))

    opening = (
        ratio((v + 40) / 10),
        0.07 * jnp.exp(-(v + 65) / 20),
        0.1 * ratio((v + 55) / 10),
    )
    closing = (
        4 * jnp.exp(-(v + 65) / 18),
        1 / (1 + jnp.exp(-(v + 35) / 10)),
        0.125 * jnp.exp(-(v + 65) / 80),
    )
    current = p[0] * m**3 * h * (v - 50) + p[1] * n**4 * (v + 77) + p[2] * (v + 54.4)
    gates = [a * (1 - x) - b * x for x, a, b in zip((m, h, n), opening, closing)]
    return jnp.stack([p[3] - current, *gates])


@_model("repressilator", [0, 1, 2, 20, 0, 10], [216, 20, 1], 20, 0.05)
def _repressilator(t, y, p):
    m, q = y[:3], y[3:]
    production = p[0] / (1 + (jnp.roll(q, 1) / p[1]) ** 2) + 0.2
    return jnp.concatenate([production - m, p[2] * (m - q)])


@_model("glycolysis", [0.5, 0.5, 1], [0.1, 0.6], 40, 0.1)
def _glycolysis(t, y, p):
    rate = p[0] * y[1] + y[0] ** 2 * y[1]
    return jnp.stack([rate - y[0], p[1] - rate, 0.01 * (y[0] - y[2])])


@_model("logistic, from 1e-6", [1e-6], [1], 20, 0.1, 1e-9)
def _logistic(t, y, p):
    return p * y * (1 - y)


# It has a domain.
@_model("Gompertz, from 1e-6", [1e-6], [0.5, 1], 20, 0.1, 1e-9)
def _gompertz(t, y, p):
    return p[0] * y * jnp.log(p[1] / y)


#
# Fields and networks
#

_X = np.pi * np.arange(1, 65) / 65
_RING = 2 * np.pi * np.arange(64) / 64


_field = ft.partial(_model, models=_LARGE, num_parts=(1, None))


@_field("heat", np.sin(_X) + 0.5 * np.sin(5 * _X), [0.02], 1, 0.005)
def _heat(t, y, p):
    padded = jnp.pad(y, 1)
    return p[0] * 65**2 * (padded[2:] - 2 * y + padded[:-2])


@_field("Burgers", 1 + 0.5 * np.sin(_RING), [0.01], 0.5, 0.005)
def _burgers(t, y, p):
    right, left = jnp.roll(y, -1), jnp.roll(y, 1)
    return -y * (right - left) * 32 + p[0] * 64**2 * (right - 2 * y + left)


@_field("Fisher", np.exp(-(np.arange(64) ** 2) / 18), [0.02, 1], 6, 0.05)
def _fisher(t, y, p):
    padded = jnp.pad(y, 1, mode="edge")
    diffusion = p[0] * 400 * (padded[2:] - 2 * y + padded[:-2])
    return diffusion + p[1] * y * (1 - y)


_PULSE = np.exp(-((np.arange(32) - 16) ** 2) / 18)


@_field("wave", [*_PULSE, *np.zeros(32)], [1], 10, 0.05, num_parts=(2, None))
def _wave(t, y, p):
    u = jnp.pad(y[:32], 1)
    return jnp.concatenate([y[32:], p[0] * 25 * (u[2:] - 2 * u[1:-1] + u[:-2])])


@_field("advection by FFT", np.exp(np.sin(_RING)), [1], 3, 0.02)
def _advection(t, y, p):
    waves = jnp.arange(33).at[32].set(0)
    return -p[0] * jnp.fft.irfft(1j * waves * jnp.fft.rfft(y), 64)


def _network(t, y, p):
    w1, w2 = p[:512].reshape(64, 8), p[512:].reshape(8, 64)
    return w2 @ jnp.tanh(w1 @ y)


def _weights(scale1, scale2, seed):
    rng = np.random.default_rng(seed)
    w1 = rng.normal(size=(64, 8)) * scale1 / math.sqrt(8)
    w2 = rng.normal(size=(8, 64)) * scale2 / 8
    return np.concatenate([w1.ravel(), w2.ravel()])


def _trained_weights():
    """A network that has learnt a damped rotation, by a few steps of gradient descent:
    unlike a random one it decays."""
    w = jnp.asarray(_weights(1.0, 0.5, 1))
    a = np.kron(np.eye(4), [[-1.0, 3.0], [-3.0, -1.0]])
    ys = jnp.asarray(np.random.default_rng(2).normal(size=(256, 8)))

    def loss(w):
        out = jax.vmap(lambda y: _network(0.0, y, w))(ys)
        return jnp.mean((out - ys @ a.T) ** 2)

    def descend(w, _):
        return w - 0.05 * jax.grad(loss)(w), None

    w, _ = jax.jit(lambda w: jax.lax.scan(descend, w, None, length=2000))(w)
    return w


def groups() -> list[Group]:
    y0 = np.random.default_rng(3).normal(size=8)
    # Two matrices.
    add = ft.partial(_field, num_parts=(None, 2))
    add("random network", y0, _weights(1.5, 1.5, 0), 10, 0.05)(_network)
    add("trained network", y0, _trained_weights(), 5, 0.05)(_network)
    return [Group(_SMALL), Group(_LARGE)]
