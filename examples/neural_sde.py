"""Forecasts the yearly number of sunspots, 1700--2008, with a neural SDE.

What is shown is how to train an SDE with `ReversibleHeun()` and `ReversibleAdjoint()`.
The Brownian path is a `diffrax.VirtualBrownianTree`, which can be queried once more on
the backward pass, and the solution is that of Stratonovich.

A linear map of the last 22 years makes the hidden state now. That follows an SDE
for the next 11 years, and a linear map of it is the forecast: each Brownian path gives
another one. What is minimised is the energy score of these samples `X, X'` and of what
happened, `x`,

`E |X - x| - E |X - X'| / 2`.

It is least in expectation if the samples have the distribution of `x`, so neither
likelihoods nor a discriminator are needed. The counts enter by their square roots, as
is usual, for then the noise in them is about even.

The last 70 years are held out. Of them the score is reported for the SDE, and for three
simple forecasts: an autoregression of order 9, simulated with Gaussian noise, which is
the textbook's model of this series; a random part of the training data; and "as it was
11 years before". The first of these wins, and the SDE comes second. There are no more
than 239 numbers to learn from, and the cycles since are larger than any of those.

`ReversibleHeun` is unstable on what decays too fast for the step size. So at the end
the same paths are solved with plain `diffrax.Heun()` and a quarter of the step size:
the scores should agree.

Run as `python neural_sde.py [--quick] [--output PATH]`.
"""

import argparse
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array
from statsmodels.datasets import sunspots
from tqdm import tqdm

from diffrax_reversible import ReversibleAdjoint, ReversibleHeun


PAST = 22
FUTURE = 11
HELD_OUT = 70
DT = 0.5
NOISE_SIZE = 2
NUM_SAMPLES = 64


def load_data():
    """The years, and the series on the scale of the model; its last `HELD_OUT` numbers
    have had no part in anything."""
    data: Any = sunspots.load_pandas().data
    roots = np.sqrt(data["SUNACTIVITY"].to_numpy())
    training = roots[:-HELD_OUT]
    return data["YEAR"].to_numpy(), (roots - training.mean()) / training.std()


def windows(series, stride=1):
    """Stretches of `PAST` and `FUTURE` years, one in a row."""
    length = PAST + FUTURE
    starts = range(0, len(series) - length + 1, stride)
    return np.stack([series[i : i + length] for i in starts])


class Drift(eqx.Module):
    """A linear map plus a network, so that the network has little left to do."""

    linear: eqx.nn.Linear
    mlp: eqx.nn.MLP

    def __call__(self, y):
        return self.linear(y) + self.mlp(y)


class NeuralSDE(eqx.Module):
    initial: eqx.nn.Linear
    drift: Drift
    diffusion: eqx.nn.MLP
    readout: eqx.nn.Linear
    hidden_size: int = eqx.field(static=True)

    def __init__(self, hidden_size, width_size, key):
        keys = jr.split(key, 5)
        mlp = lambda out_size, key: eqx.nn.MLP(
            hidden_size,
            out_size,
            width_size,
            1,
            activation=jnp.tanh,
            final_activation=jnp.tanh,
            key=key,
        )
        self.initial = eqx.nn.Linear(PAST, hidden_size, key=keys[0])
        self.drift = Drift(
            eqx.nn.Linear(hidden_size, hidden_size, key=keys[1]),
            mlp(hidden_size, keys[2]),
        )
        self.diffusion = mlp(hidden_size * NOISE_SIZE, keys[4])
        self.readout = eqx.nn.Linear(hidden_size, 1, key=keys[3])
        self.hidden_size = hidden_size

    def __call__(self, past, key, *, solver, adjoint, dt) -> Array:
        """The next `FUTURE` years, of one sample."""
        path = diffrax.VirtualBrownianTree(
            0.0, FUTURE, tol=DT / 8, shape=(NOISE_SIZE,), key=key
        )
        shape = (self.hidden_size, NOISE_SIZE)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: self.drift(y)),
                diffrax.ControlTerm(
                    lambda t, y, args: self.diffusion(y).reshape(shape), path
                ),
            ),
            solver,
            t0=0.0,
            t1=float(FUTURE),
            dt0=dt,
            y0=self.initial(past),
            saveat=diffrax.SaveAt(ts=jnp.arange(1.0, FUTURE + 1)),
            adjoint=adjoint,
            max_steps=None if dt < DT else round(FUTURE / DT) + 1,
        )
        assert sol.ys is not None
        return jax.vmap(self.readout)(sol.ys)[:, 0]


def sample(
    model,
    past,
    num_samples,
    key,
    solver: diffrax.AbstractSolver = ReversibleHeun(),
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
    dt=DT,
):
    """Forecasts for a batch, of shape `(batch, num_samples, FUTURE)`."""
    keys = jr.split(key, len(past) * num_samples)
    samples = jax.vmap(
        lambda past, key: model(past, key, solver=solver, adjoint=adjoint, dt=dt)
    )(jnp.repeat(past, num_samples, axis=0), keys)
    return samples.reshape(len(past), num_samples, FUTURE)


def norm(x):
    """The Euclidean norm over the last axis, with a gradient at zero."""
    return jnp.sqrt(jnp.sum(x**2, axis=-1) + 1e-12)


def energy_score(samples, x):
    """For each of a batch, from `samples` of shape `(batch, n, FUTURE)`. Unbiased."""
    n = samples.shape[1]
    to_data = jnp.mean(norm(samples - x[:, None]), axis=1)
    among = norm(samples[:, :, None] - samples[:, None, :])
    among = jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0, among), axis=(1, 2))
    return to_data - 0.5 * among / (n * (n - 1))


def fit(model, data, num_steps, batch_size, key):
    # Weight decay and few steps: there are no more than 239 numbers to learn from.
    schedule = optax.cosine_decay_schedule(0.01, num_steps)
    optim = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.3)
    )

    def loss_fn(model, batch, key):
        past, future = batch[:, :PAST], batch[:, PAST:]
        return jnp.mean(energy_score(sample(model, past, 4, key), future))

    @eqx.filter_jit
    def make_step(model, opt_state, batch, key):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch, key)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optim.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, loss

    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)
    losses = []
    bar = tqdm(range(num_steps), desc="neural SDE")
    for key in jr.split(key, num_steps):
        batch = jnp.asarray(data[rng.integers(len(data), size=batch_size)])
        model, opt_state, loss = make_step(model, opt_state, batch, key)
        losses.append(loss.item())
        bar.update()
        bar.set_postfix(score=f"{np.mean(losses[-50:]):.3f}")
    bar.close()
    return model, losses


def autoregression(series, past, num_samples, order=9):
    """Samples of an autoregression that is fitted to `series` by least squares."""
    rng = np.random.default_rng(1)
    columns = [series[i : len(series) - order + i] for i in range(order)]
    design = np.stack([*columns, np.ones(len(series) - order)], axis=1)
    target = series[order:]
    coefficients, *_ = np.linalg.lstsq(design, target)
    residuals = target - design @ coefficients
    std = np.sqrt(np.sum(residuals**2) / (len(target) - order - 1))
    x = np.repeat(past[:, None, -order:], num_samples, axis=1)
    for _ in range(FUTURE):
        mean = x[..., -order:] @ coefficients[:-1] + coefficients[-1]
        new = mean + std * rng.standard_normal(mean.shape)
        x = np.concatenate([x, new[..., None]], axis=-1)
    return x[..., order:]


def plot(years, series, starts, samples, losses, path):
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(10, 7), layout="constrained")
    top.plot(years, series, color="black", lw=1, label="data")
    for i, x in zip(starts, samples):
        future = years[i + PAST - 1 : i + PAST + FUTURE]
        now = np.full((len(x), 1), series[i + PAST - 1])
        x = np.concatenate([now, x], axis=1)
        low, mid, high = np.quantile(x, [0.1, 0.5, 0.9], axis=0)
        label = dict(label="neural SDE: median, and 8 of 10") if i == starts[0] else {}
        top.plot(future, mid, color="tab:orange", **label)
        top.fill_between(future, low, high, color="tab:orange", alpha=0.25, lw=0)
        top.plot(future, x[:4].T, color="tab:orange", lw=0.4)
    top.axvline(years[-HELD_OUT], color="gray", ls=":", label="held out from here")
    top.set_xlim(years[-HELD_OUT - 60], years[-1])
    top.set_xlabel("year")
    top.set_ylabel("root of sunspots, standardised")
    top.legend(loc="upper left")
    bottom.semilogy(losses, lw=0.5)
    bottom.set_xlabel("training step")
    bottom.set_ylabel("energy score of a batch")
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Forecasts sunspots with a neural SDE."
    )
    parser.add_argument("--quick", action="store_true", help="take only a few steps")
    parser.add_argument("--output", default="neural_sde.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.quick:
        print("This is a smoke test: it stops long before there is a result.")

    # Rounding errors grow on the way back, along what decays on the way forward.
    jax.config.update("jax_enable_x64", True)

    years, series = load_data()
    training = series[:-HELD_OUT]
    # What is forecast is held out, and what it is forecast from need not be.
    start = len(training) - PAST
    test = windows(series[start:])
    past, future = test[:, :PAST], test[:, PAST:]

    init_key, fit_key, key = jr.split(jr.key(0), 3)
    model = NeuralSDE(hidden_size=6, width_size=16, key=init_key)
    num_steps, batch_size = (20, 8) if args.quick else (300, 32)
    num_samples = 16 if args.quick else NUM_SAMPLES

    score = lambda samples: jnp.mean(energy_score(jnp.asarray(samples), future)).item()
    sde = eqx.filter_jit(sample)
    untrained = score(sde(model, past, num_samples, key))
    model, losses = fit(model, windows(training), num_steps, batch_size, fit_key)
    samples = sde(model, past, num_samples, key)
    fine = sde(
        model,
        past,
        num_samples,
        key,
        diffrax.Heun(),
        diffrax.RecursiveCheckpointAdjoint(),
        DT / 4,
    )
    rng = np.random.default_rng(2)
    climate = windows(training)[:, PAST:]
    climate = climate[rng.integers(len(climate), size=(len(test), num_samples))]
    results = {
        "neural SDE": score(samples),
        "the same, with Heun and a quarter of the step size": score(fine),
        "neural SDE, untrained": untrained,
        "autoregression of order 9": score(autoregression(training, past, num_samples)),
        "random part of the training data": score(climate),
        # No spread, so that this is a distance.
        "as it was 11 years before": jnp.mean(
            norm(past[:, PAST - FUTURE :] - future)
        ).item(),
    }

    print(f"\nEnergy score of {len(test)} forecasts of held out data (less is better)")
    for name, value in results.items():
        print(f"  {name}: {value:.3f}")

    every = FUTURE + 1
    starts = [start + i for i in range(0, len(test), every)]
    plot(years, series, starts, np.asarray(samples[::every]), losses, args.output)
    print(f"\nWrote {args.output}")
    return {**results, "losses": losses}


if __name__ == "__main__":
    main()
