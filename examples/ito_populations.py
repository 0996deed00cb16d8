"""Fit an Ito SDE to hares and lynxes, by the likelihood of a simulated year.

    python examples/ito_populations.py [--quick] [--output ito_populations.png]

The pelts that the Hudson's Bay Company counted from 1900 to 1920, as in `hare_lynx.py`.
There all that does not fit is put down to counting. Here it is the dynamics themselves
that are noisy, in proportion to each population: Lotka--Volterra with
`sigma_hare hare dW_1` and `sigma_lynx lynx dW_2`, in the sense of Ito, so by a solver
that is for such equations, `ItoMilstein`, as it is. (It could not be undone.)

From the counts of each year many paths go on for a year. The likelihood of the next
counts is that of a normal distribution, of their logarithms, with the mean and the
covariance of the paths at the end. The noise is drawn once and for all, so that the
likelihood is a smooth function of the parameters, which is differentiated along the
paths.

Prints the rates, both noises, the log-likelihood beside that of "as last year, give or
take", and time and memory of a gradient beside those of `RecursiveCheckpointAdjoint`.
"""

import argparse

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optax
from hare_lynx import COUNTS, LOG_COUNTS, YEARS
from pinene import compare

from diffrax_reversible import ReversibleAdjoint


jax.config.update("jax_enable_x64", True)

NAMES = ("alpha", "beta", "gamma", "delta", "sigma_hare", "sigma_lynx")
START = jnp.log(jnp.array([0.5, 0.03, 0.8, 0.03, 0.3, 0.3]))


def drift(t, y, p):
    hare, lynx = y
    alpha, beta, gamma, delta, _, _ = p
    return jnp.stack([(alpha - beta * lynx) * hare, (delta * hare - gamma) * lynx])


def diffusion(t, y, p):
    return lx.DiagonalLinearOperator(p[4:] * y)


def year(p, y0, key, steps, adjoint):
    """The logarithms of both populations, a year after they were `y0`."""
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, (2,), key)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
    )
    sol = diffrax.diffeqsolve(
        terms, diffrax.ItoMilstein(), 0.0, 1.0, 1 / steps, y0, p, adjoint=adjoint
    )
    assert sol.ys is not None
    # (A step of Milstein's may go below zero, if seldom.)
    return jnp.log(jnp.maximum(sol.ys[0], 1e-3))


def simulate(log_p, keys, steps, adjoint):
    """Of each year and each path."""
    p = jnp.exp(log_p)
    one = lambda y0, key: year(p, y0, key, steps, adjoint)
    of_year = jax.vmap(one, (None, 0))
    return jax.vmap(of_year)(jnp.asarray(COUNTS[:-1]), keys)


def minus_log_likelihood(log_p, keys, steps, adjoint):
    paths = simulate(log_p, keys, steps, adjoint)
    mean = jnp.mean(paths, axis=1)
    covariance = jax.vmap(lambda x: jnp.cov(x, rowvar=False))(paths)
    logpdf = jax.vmap(jax.scipy.stats.multivariate_normal.logpdf)
    return -jnp.sum(logpdf(jnp.asarray(LOG_COUNTS[1:]), mean, covariance))


def fit(keys, steps, updates):
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, updates))

    @jax.jit
    def update(log_p, state):
        value, grad = jax.value_and_grad(minus_log_likelihood)(
            log_p, keys, steps, ReversibleAdjoint()
        )
        change, state = optimiser.update(grad, state)
        return optax.apply_updates(log_p, change), state, value

    log_p, state = START, optimiser.init(START)
    values = []
    for _ in range(updates):
        log_p, state, value = update(log_p, state)
        values.append(float(value))
    return log_p, values


def plot(log_p, keys, steps, filename):
    from matplotlib.figure import Figure

    paths = simulate(log_p, keys, steps, ReversibleAdjoint())
    low, middle, high = jnp.exp(jnp.percentile(paths, jnp.array([5, 50, 95.0]), axis=1))
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for i, name in enumerate(("hare", "lynx")):
        (line,) = ax.plot(YEARS, COUNTS[:, i], "o", label=name)
        color = line.get_color()
        ax.plot(YEARS[1:], middle[:, i], color=color)
        ax.fill_between(YEARS[1:], low[:, i], high[:, i], color=color, alpha=0.2)
    ax.set_yscale("log")
    ax.set_ylabel("thousands of pelts")
    ax.set_title("A year ahead, by an Ito SDE: median, and 90% of the paths")
    ax.legend()
    figure.savefig(filename)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fits an Ito SDE to two populations.")
    parser.add_argument("--quick", action="store_true", help="few paths and updates")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    paths, steps, updates, repeats = (128, 32, 300, 10)
    if args.quick:
        paths, steps, updates, repeats = (8, 8, 20, 1)

    keys = jr.split(jr.key(0), (len(YEARS) - 1, paths))
    log_p, values = fit(keys, steps, updates)
    for name, x in zip(NAMES, jnp.exp(log_p)):
        print(f"{name:10s} {x:.4f}")
    # A random walk of the logarithms, each with its own variance.
    change = jnp.diff(jnp.asarray(LOG_COUNTS), axis=0)
    walk = jax.scipy.stats.norm.logpdf(change, 0, jnp.std(change, axis=0))
    print(f"log-likelihood: {-values[-1]:.1f}, as last year {jnp.sum(walk):.1f}")
    loss = lambda x, adjoint: minus_log_likelihood(x, keys, steps, adjoint)
    table = compare(loss, log_p, repeats)
    (expected, *_), (grad, *_) = table.values()
    difference = jnp.max(jnp.abs(grad - expected)) / jnp.max(jnp.abs(expected))
    for name, (_, milliseconds, kilobytes) in table.items():
        print(f"{name:27s} {milliseconds:8.1f} ms {kilobytes:8.0f} kB")
    print(f"their gradients differ by {difference:.0e}")
    if args.quick:
        print("This was a smoke test.")
    if args.output is not None:
        plot(log_p, keys, steps, args.output)
    return values, table


if __name__ == "__main__":
    main()
