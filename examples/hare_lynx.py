"""Fits two models to the Hudson's Bay pelt counts of hare and lynx, 1900--1920.

The first is Lotka--Volterra and the second a small neural ODE. Both are solved by
`diffrax.Tsit5()` with adaptive steps, and trained with `adjoint=ReversibleAdjoint()`.
Nothing else differs from any other use of diffrax. At the end the time and memory of a
gradient are printed beside those of diffrax's default adjoint.

Populations are positive, and the noise in a count is about proportional to it. So both
models live in log-populations and are fitted there by least squares, which is maximum
likelihood for log-normal noise. The rates of Lotka--Volterra are positive too, and are
fitted through their logarithms. The count of 1900 is as noisy as any other, so the
initial condition is fitted as well.

The neural ODE has more parameters than there are data. That it fits better is no
evidence for it: the point is only that it can be trained.

Run as `python hare_lynx.py [--quick] [--output PATH]`.
"""

import argparse
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.ticker import FixedLocator, NullLocator
from tqdm import tqdm

from diffrax_reversible import ReversibleAdjoint


YEARS = np.arange(1900.0, 1921.0)
# In thousands of pelts.
# fmt: off
HARE = [
    30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1,
    40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7,
]
LYNX = [
    4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4,
    8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6,
]
# fmt: on
COUNTS = np.stack([HARE, LYNX], axis=1)
LOG_COUNTS = np.log(COUNTS)


class LotkaVolterra(eqx.Module):
    """The equations

    `hare' = alpha hare - beta hare lynx` and `lynx' = delta hare lynx - gamma lynx`,

    in terms of `y = (log hare, log lynx)`.
    """

    log_rates: Array

    def __init__(self, alpha, beta, gamma, delta):
        self.log_rates = jnp.log(jnp.array([alpha, beta, gamma, delta]))

    def __call__(self, t, y, args):
        del t, args
        alpha, beta, gamma, delta = jnp.exp(self.log_rates)
        hare, lynx = jnp.exp(y)
        return jnp.stack([alpha - beta * lynx, delta * hare - gamma])

    def summary(self) -> dict[str, float]:
        rates = jnp.exp(self.log_rates).tolist()
        return dict(zip(("alpha", "beta", "gamma", "delta"), rates))


class NeuralVectorField(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        mlp = eqx.nn.MLP(2, 2, width_size=16, depth=1, activation=jnp.tanh, key=key)
        # Start close to `y' = 0`, for which the gradient neither grows nor vanishes.
        self.mlp = eqx.tree_at(
            lambda m: (m.layers[-1].weight, m.layers[-1].bias),
            mlp,
            replace_fn=lambda x: 0.1 * x,
        )

    def __call__(self, t, y, args):
        del t, args
        mean = LOG_COUNTS.mean(axis=0)
        std = LOG_COUNTS.std(axis=0)
        return std * self.mlp((y - mean) / std)

    def summary(self) -> dict[str, float]:
        leaves = jtu.tree_leaves(eqx.filter(self.mlp, eqx.is_inexact_array))
        return {"number of weights and biases": sum(x.size for x in leaves)}


class Model(eqx.Module):
    vector_field: LotkaVolterra | NeuralVectorField
    y0: Array

    @eqx.filter_jit
    def __call__(self, ts, adjoint=ReversibleAdjoint()):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            diffrax.Tsit5(),
            t0=YEARS[0],
            t1=ts[-1],
            dt0=None,
            y0=self.y0,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            adjoint=adjoint,
        )
        return sol.ys

    def summary(self) -> dict[str, float]:
        hare, lynx = jnp.exp(self.y0).tolist()
        initial = {"hare in 1900": hare, "lynx in 1900": lynx}
        return {**self.vector_field.summary(), **initial}


def loss_fn(model, last_year):
    """The mean square of the residuals up to and including `last_year`."""
    # Do not solve beyond the last year. The years after it are moved to it rather than
    # cut off, so that the shapes are static and we compile once.
    log_populations = model(jnp.minimum(YEARS, last_year))
    squares = jnp.mean((log_populations - LOG_COUNTS) ** 2, axis=1)
    return jnp.mean(squares, where=YEARS <= last_year)


def fit(model, num_steps, learning_rate, first_window, name):
    """Runs Adam. For the first half of the steps the data is a window that grows evenly
    from the first `first_window` years to all of them. Returns also the losses, for all
    of the data, before and after."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    # The gradient is large when a year is new.
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @eqx.filter_jit
    def make_step(model, opt_state, last_year):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, last_year)
        updates, opt_state = optim.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    windows = np.linspace(first_window, len(YEARS), max(num_steps // 2, 1), dtype=int)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    # (Reuses what has been compiled.)
    full_loss = lambda model: make_step(model, opt_state, YEARS[-1])[-1].item()
    initial_loss = full_loss(model)
    bar = tqdm(range(num_steps), desc=name)
    for i in bar:
        window = windows[min(i, len(windows) - 1)]
        last_year = YEARS[window - 1]
        model, opt_state, loss = make_step(model, opt_state, last_year)
        bar.set_postfix(loss=f"{loss.item():.4f}", until=int(last_year))
    return model, initial_loss, full_loss(model)


def cost(model, adjoint, repeats=100):
    """The time of a gradient of the loss in ms, and its memory in kB."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    @jax.grad
    def gradient(params):
        log_populations = eqx.combine(params, static)(YEARS, adjoint)
        return jnp.mean((log_populations - LOG_COUNTS) ** 2)

    compiled = gradient.lower(params).compile()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params))
        times.append(time.perf_counter() - start)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return 1e3 * min(times), analysis.temp_size_in_bytes / 1e3


def plot(models, ts, path):
    fig, axes = plt.subplot_mosaic(
        [["hare", "phase"], ["lynx", "phase"]], figsize=(11, 5), layout="constrained"
    )

    def draw(ts, populations, **kwargs):
        hare, lynx = populations.T
        axes["hare"].plot(ts, hare, **kwargs)
        axes["lynx"].plot(ts, lynx, **kwargs)
        axes["phase"].plot(hare, lynx, **kwargs)

    draw(YEARS, COUNTS, ls="", marker="o", color="black", zorder=3, label="data")
    for (name, model), color in zip(models.items(), ("tab:blue", "tab:orange")):
        draw(ts, np.exp(model(ts)), lw=2, color=color, label=name)
    for i in (0, -1):
        axes["phase"].annotate(
            f"{YEARS[i]:.0f}", COUNTS[i], (6, -4), textcoords="offset points"
        )

    for ax in axes.values():
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes["phase"].set_xscale("log")
    axes["hare"].sharex(axes["lynx"])
    axes["hare"].tick_params(labelbottom=False)
    axes["lynx"].set_xticks(YEARS[::4])
    axes["lynx"].set_xlabel("year")
    for species in ("hare", "lynx"):
        axes[species].set_ylabel(f"{species} (thousands)")
    axes["phase"].set_xlabel("hare (thousands)")
    axes["phase"].set_ylabel("lynx (thousands)")
    for axis in (axes["phase"].xaxis, *(ax.yaxis for ax in axes.values())):
        axis.set_major_locator(FixedLocator([5, 10, 20, 40, 80]))
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_locator(NullLocator())
    handles, labels = axes["phase"].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    fig.suptitle("Hare and lynx pelts of the Hudson's Bay Company")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Fits two models to the pelt counts of hare and lynx."
    )
    parser.add_argument("--quick", action="store_true", help="take only a few steps")
    parser.add_argument("--output", default="hare_lynx.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.quick:
        print("This is a smoke test: it stops long before there is a result.")

    # The tolerances are close to single precision.
    jax.config.update("jax_enable_x64", True)

    y0 = jnp.array(LOG_COUNTS[0])
    lotka_volterra = Model(LotkaVolterra(0.55, 0.028, 0.84, 0.026), y0)
    neural_ode = Model(NeuralVectorField(jr.key(0)), y0)
    # The rates above are good enough to use all the data from the start. The neural ODE
    # knows nothing yet. If a long stretch of data is new to it then it first learns to
    # settle at the mean.
    setups = {
        "Lotka-Volterra": (lotka_volterra, 20 if args.quick else 300, len(YEARS)),
        "neural ODE": (neural_ode, 60 if args.quick else 1500, 5),
    }
    ts = np.linspace(YEARS[0], YEARS[-1], 401)
    adjoints = (ReversibleAdjoint(), diffrax.RecursiveCheckpointAdjoint())
    models = {}
    results = {}
    for name, (model, num_steps, first_window) in setups.items():
        model, initial_loss, loss = fit(model, num_steps, 0.02, first_window, name)
        models[name] = model
        results[name] = dict(
            initial_loss=initial_loss,
            loss=loss,
            costs={type(x).__name__: cost(model, x) for x in adjoints},
            parameters=model.summary(),
        )

    for name, result in results.items():
        print(f"\n{name}")
        for key, value in result["parameters"].items():
            print(f"  {key}: {value:.4g}")
        print(f"  loss: {result['initial_loss']:.4f} -> {result['loss']:.4f}")
        for which, (milliseconds, kilobytes) in result["costs"].items():
            print(f"  a gradient, {which}: {milliseconds:.2g} ms, {kilobytes:.0f} kB")

    plot(models, ts, args.output)
    print(f"\nWrote {args.output}")
    return results


if __name__ == "__main__":
    main()
