"""Error of a solution and of its gradient against the time they take.

    python examples/benchmarks/work_precision.py [--quick] [--output work_precision.png]

For Lotka--Volterra over four periods, with fixed steps of several sizes, for every
solver and adjoint: the error of the gradient of a function of the solution at the end
with respect to all parameters, that of the function, and the median time of the two,
against a reference with `Dopri8` and very small steps.
"""

import argparse

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from gradient import DEFAULT, lotka_volterra, medians, OURS, PUBLISHED

from diffrax_reversible import (
    LeapfrogMidpoint,
    ReversibleAdjoint,
    ReversibleHeun,
    UReversible,
)


T1 = 40.0
METHODS = {
    "Heun, default": (diffrax.Heun(), DEFAULT),
    "Tsit5, default": (diffrax.Tsit5(), DEFAULT),
    "Dopri8, default": (diffrax.Dopri8(), DEFAULT),
    "UReversible(Heun)": (UReversible(diffrax.Heun()), OURS),
    "UReversible(Tsit5)": (UReversible(diffrax.Tsit5()), OURS),
    "UReversible(Dopri8)": (UReversible(diffrax.Dopri8()), OURS),
    "UReversible(Tsit5, 0.999)": (UReversible(diffrax.Tsit5(), PUBLISHED), OURS),
    "ReversibleHeun": (ReversibleHeun(), ReversibleAdjoint(drift_tolerance=None)),
    "LeapfrogMidpoint": (LeapfrogMidpoint(), ReversibleAdjoint(drift_tolerance=None)),
}


def value_and_gradient(solver, adjoint, n):
    vector_field, y0, params = lotka_volterra()

    @jax.jit
    @jax.value_and_grad
    def run(params__y0):
        params, y0 = params__y0
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            solver,
            0.0,
            T1,
            T1 / n,
            y0,
            params,
            adjoint=adjoint,
            max_steps=n,
        )
        return sum(jnp.sum(jnp.log(y)) for y in jax.tree.leaves(sol.ys))

    return lambda: jax.block_until_ready(run((params, y0)))


def error(x, y):
    flat = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
    x, y = flat(x), flat(y)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def plot(table, filename):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for name, rows in table.items():
        style = "o--" if "default" in name else "o-"
        for k, (ax, label) in enumerate(zip(axes, ("solution", "gradient"))):
            points = [(r[1 + k], 1e3 * r[3]) for r in rows if r[1 + k] < 1]
            if points:
                ax.plot(*zip(*points), style, label=name, ms=3)
            ax.set_xlabel(f"relative error of the {label}")
    for ax in axes:
        ax.set_xscale("log")
        ax.set_yscale("log")
    axes[0].set_ylabel("time of solution and gradient, ms")
    axes[1].legend(fontsize="small")
    figure.savefig(filename)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Error against time.")
    parser.add_argument("--quick", action="store_true", help="two methods, small sizes")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    methods = METHODS
    steps = (250, 500, 1000, 2000, 4000)
    if args.quick:
        methods = {k: v for k, v in METHODS.items() if "(Heun)" in k or "Heun," in k}
        steps = (250, 500)
    reference = value_and_gradient(diffrax.Dopri8(), DEFAULT, 16 * steps[-1])()
    runs = {
        (name, n): value_and_gradient(solver, adjoint, n)
        for name, (solver, adjoint) in methods.items()
        for n in steps
    }
    results = {key: run() for key, run in runs.items()}
    times = dict(zip(runs, medians(list(runs.values()), 1 if args.quick else 5)))

    print("| method | steps | error of the solution | of the gradient | time, ms |")
    print("|---|---|---|---|---|")
    table = {name: [] for name in methods}
    for (name, n), result in results.items():
        errors = [error(x, y) for x, y in zip(result, reference)]
        table[name].append((n, *errors, times[name, n]))
        cells = " | ".join(f"{x:.1e}" for x in errors)
        print(f"| {name} | {n} | {cells} | {1e3 * times[name, n]:.2f} |")
    if args.output is not None:
        plot(table, args.output)
    return table


if __name__ == "__main__":
    main()
