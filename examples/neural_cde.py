"""Forecasts carbon dioxide at Mauna Loa, 1958--2001, with a neural CDE.

A controlled differential equation is solved by `diffrax.Heun()`, and trained with
`ReversibleAdjoint()`. The control is an interpolation of the data, which may come at
any times: the vector field is driven by it through `diffrax.ControlTerm(...).to_ode()`.

The data are weekly and have gaps. To make it harder half of the weeks of each year are
hidden at random. From what is left of a year, with its times, the value half a year
later is forecast, relative to the last one seen. For this the season has to be told
from the shape of the curve.

The model is trained on windows from before 1985 and tested on those after, and the root
mean square error is reported in parts per million. With it are those of two simple
forecasts from the same data: that nothing will change, and ridge regression on the
series with its gaps filled in linearly, its penalty chosen on the last five years
before 1985. That one does well, for a seasonal cycle on a trend is a linear recurrence,
and the CDE, which has to find this out, does as well.

At the end the test is repeated with a quarter of the step size: the errors should
agree.

Run as `python neural_cde.py [--quick] [--output PATH]`.
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
from statsmodels.datasets import co2
from tqdm import tqdm

from diffrax_reversible import ReversibleAdjoint


# In weeks.
WINDOW = 52
AHEAD = 26
FIRST_TEST_YEAR = 1985
# About what the values in a window vary by, in parts per million.
SCALE = 3.0
# The time of the control runs from 0 to 1.
STEP = 1 / WINDOW


def load_data():
    """The years, and the weekly values, of which some are missing (NaN)."""
    data: Any = co2.load_pandas().data["co2"]  # pyright: ignore
    years = data.index.year + (data.index.day_of_year - 1) / 365.25
    return years.to_numpy(), data.to_numpy()


def make_windows(years, values, rng):
    """Windows that begin at each week, with a random half of them hidden.

    Returns the weeks at which they begin, the values relative to the last one that is
    seen, that last value, and what is to be forecast.
    """
    starts, xs, lasts, targets = [], [], [], []
    for i in range(len(values) - WINDOW - AHEAD):
        x = values[i : i + WINDOW + 1].copy()
        target = values[i + WINDOW + AHEAD]
        hidden = rng.random(len(x)) < 0.5
        # Both ends are seen, so that it is an interpolation.
        hidden[[0, -1]] = False
        x[hidden] = np.nan
        if np.isnan([x[0], x[-1], target]).any():
            continue
        starts.append(i)
        xs.append((x - x[-1]) / SCALE)
        lasts.append(x[-1])
        targets.append((target - x[-1]) / SCALE)
    return np.array(starts), np.array(xs), np.array(lasts), np.array(targets)


@jax.jit
@jax.vmap
def interpolate(x):
    """Cubic Hermite interpolation of the values that are there, and of time."""
    ts = jnp.linspace(0, 1, WINDOW + 1)
    return diffrax.backward_hermite_coefficients(ts, jnp.stack([ts, x], axis=-1))


class NeuralCDE(eqx.Module):
    initial: eqx.nn.MLP
    mlp: eqx.nn.MLP
    readout: eqx.nn.Linear
    hidden_size: int = eqx.field(static=True)

    def __init__(self, hidden_size, width_size, key):
        keys = jr.split(key, 3)
        self.initial = eqx.nn.MLP(2, hidden_size, width_size, 1, key=keys[0])
        # Of a bounded vector field, as is usual for CDEs.
        self.mlp = eqx.nn.MLP(
            hidden_size,
            hidden_size * 2,
            width_size,
            1,
            activation=jax.nn.softplus,
            final_activation=jnp.tanh,
            key=keys[1],
        )
        self.readout = eqx.nn.Linear(hidden_size, "scalar", key=keys[2])
        self.hidden_size = hidden_size

    def vector_field(self, t, y, args):
        return self.mlp(y).reshape(self.hidden_size, 2)

    def __call__(self, coefficients, dt) -> Array:
        ts = jnp.linspace(0, 1, WINDOW + 1)
        control = diffrax.CubicInterpolation(ts, coefficients)
        sol = diffrax.diffeqsolve(
            diffrax.ControlTerm(self.vector_field, control).to_ode(),
            diffrax.Heun(),
            t0=0.0,
            t1=1.0,
            dt0=dt,
            y0=self.initial(control.evaluate(0.0)),
            adjoint=ReversibleAdjoint(),
            max_steps=round(1 / dt) + 1,
        )
        assert sol.ys is not None
        return self.readout(sol.ys[0])


def forecast(model, coefficients, dt=STEP):
    return jax.vmap(lambda c: model(c, dt))(coefficients)


def fit(model, windows, targets, num_steps, batch_size):
    schedule = optax.cosine_decay_schedule(0.01, num_steps)
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss_fn(model, x, target):
        return jnp.mean((forecast(model, interpolate(x)) - target) ** 2)

    @eqx.filter_jit
    def make_step(model, opt_state, x, target):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, target)
        updates, opt_state = optim.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)
    losses = []
    bar = tqdm(range(num_steps), desc="neural CDE")
    for _ in bar:
        batch = rng.integers(len(windows), size=batch_size)
        model, opt_state, loss = make_step(
            model, opt_state, windows[batch], targets[batch]
        )
        losses.append(loss.item())
        bar.set_postfix(rmse=f"{SCALE * np.sqrt(np.mean(losses[-50:])):.2f} ppm")
    return model


def ridge(windows, targets, is_validation, test):
    """Forecasts for `test` by ridge regression on the filled-in windows."""
    weeks = np.arange(WINDOW + 1)

    def features(windows):
        filled = [
            np.interp(weeks, weeks[~np.isnan(x)], x[~np.isnan(x)]) for x in windows
        ]
        return np.column_stack([filled, np.ones(len(windows))])

    def solve(x, y, penalty):
        return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)

    x = features(windows)
    train, held = ~is_validation, is_validation
    error = lambda w: np.mean((x[held] @ w - targets[held]) ** 2)
    penalties = 10.0 ** np.arange(-3, 4)
    best = min(penalties, key=lambda p: error(solve(x[train], targets[train], p)))
    return features(test) @ solve(x, targets, best)


def plot(years, values, test_years, forecasts, truth, path):
    fig, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 7), sharex=True, layout="constrained"
    )
    top.plot(years, values, color="black", lw=1, label="data")
    for (name, x), color in zip(forecasts.items(), ("tab:orange", "tab:blue")):
        top.plot(test_years, x, ".", ms=2, color=color, label=name)
        bottom.plot(test_years, x - truth, ".", ms=2, color=color, label=name)
    top.set_xlim(FIRST_TEST_YEAR, years[-1])
    top.set_ylim(np.nanmin(truth) - 3, np.nanmax(truth) + 3)
    top.set_ylabel("CO2 (ppm)")
    bottom.set_ylabel("error (ppm)")
    bottom.set_xlabel("year")
    top.legend()
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Forecasts CO2 with a neural CDE.")
    parser.add_argument("--quick", action="store_true", help="take only a few steps")
    parser.add_argument("--output", default="neural_cde.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.quick:
        print("This is a smoke test: it stops long before there is a result.")

    years, values = load_data()
    starts, windows, lasts, targets = make_windows(
        years, values, np.random.default_rng(0)
    )
    target_years = years[starts + WINDOW + AHEAD]
    # No window of the test has anything in common with one of the training.
    is_train = target_years < FIRST_TEST_YEAR
    is_test = years[starts] >= FIRST_TEST_YEAR
    is_validation = target_years[is_train] >= FIRST_TEST_YEAR - 5

    model = NeuralCDE(hidden_size=16, width_size=32, key=jr.key(0))
    num_steps, batch_size = (30, 16) if args.quick else (2000, 64)
    windows = windows.astype(np.float32)
    targets = targets.astype(np.float32)
    model = fit(model, windows[is_train], targets[is_train], num_steps, batch_size)

    test, truth = windows[is_test], targets[is_test]
    predict = eqx.filter_jit(forecast)
    coefficients = interpolate(test)
    forecasts = {
        "neural CDE": np.asarray(predict(model, coefficients)),
        "ridge regression": ridge(
            windows[is_train], targets[is_train], is_validation, test
        ),
        "no change": np.zeros_like(truth),
        "neural CDE, a quarter of the step size": np.asarray(
            predict(model, coefficients, STEP / 4)
        ),
    }
    results = {
        name: SCALE * float(np.sqrt(np.mean((x - truth) ** 2)))
        for name, x in forecasts.items()
    }

    print(f"\nRoot mean square error of {len(test)} forecasts, in ppm")
    for name, value in results.items():
        print(f"  {name}: {value:.3f}")

    shown = {
        name: lasts[is_test] + SCALE * forecasts[name]
        for name in ("neural CDE", "ridge regression")
    }
    plot(
        years,
        values,
        target_years[is_test],
        shown,
        lasts[is_test] + SCALE * truth,
        args.output,
    )
    print(f"\nWrote {args.output}")
    return results


if __name__ == "__main__":
    main()
