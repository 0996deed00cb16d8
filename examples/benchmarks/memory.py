"""Memory and time of a gradient against the number of steps.

    python examples/benchmarks/memory.py [--quick] [--output memory.png]

For `y' = -a sin(y)` with `y` of 10^3 numbers, solved by `Tsit5` with fixed steps and
all settings as they come: what the compiler allocates for temporaries (exact, and free
of noise), and the median time, of `RecursiveCheckpointAdjoint`, and of
`ReversibleAdjoint` on the solver as it is and on `UReversible` of it.
"""

import argparse
import math

import diffrax
import jax
import jax.numpy as jnp
from gradient import (
    compile_gradient,
    DEFAULT,
    loss_of,
    medians,
    number,
    OURS,
    save,
    temporary_bytes,
    versions,
)

from diffrax_reversible import UReversible


COLUMNS = {
    "RecursiveCheckpointAdjoint": (diffrax.Tsit5(), DEFAULT),
    "ReversibleAdjoint": (diffrax.Tsit5(), OURS),
    "UReversible + ReversibleAdjoint": (UReversible(diffrax.Tsit5()), OURS),
}


def plot(table, filename, lines):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    title = "Gradient of `y' = -a sin(y)`, 1000 numbers, `Tsit5`; two cores of a CPU"
    figure.suptitle(f"{title}, {versions()}", fontsize=9)
    left, right = figure.subplots(1, 2)
    steps = list(table)
    for k, name in enumerate(COLUMNS):
        color = ("tab:gray", "tab:green", "tab:blue")[k]
        for ax, i, unit in ((left, 0, 1e6), (right, 1, 1)):
            values = [table[n][k][i] / unit for n in steps]
            ax.plot(steps, values, "o-", color=color, label=name)
    left.set_ylabel("memory of a gradient, MB")
    right.set_ylabel("time of a gradient, s")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("steps")
        ax.set_xlim(0.8 * steps[0], 1.25 * steps[-1])
    left.legend(fontsize="small")
    save(figure, filename, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Memory of the gradient of a solve.")
    parser.add_argument("--quick", action="store_true", help="a small size")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    size = 100 if args.quick else 1000
    steps = (10, 20) if args.quick else (100, 1000, 10_000, 100_000)
    problem = (lambda t, y, p: -p * jnp.sin(y), jnp.ones(size), jnp.array(0.5))

    print(f"Temporary memory, and time; y of {size} numbers.\n")
    heads = [f"{name}, {unit}" for unit in ("kB", "ms") for name in COLUMNS]
    print("| steps | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    table, lines = {}, []
    for n in steps:
        compiled = [
            compile_gradient(*loss_of(problem, solver, adjoint, n))
            for solver, adjoint in COLUMNS.values()
        ]
        # (Longer ones would take minutes.)
        is_timed = n <= 10_000
        runs = [run for run, _, _ in compiled]
        times = medians(runs, 3) if is_timed else [math.nan] * len(runs)
        sizes = [temporary_bytes(c) for _, c, _ in compiled]
        table[n] = list(zip(sizes, times))
        cells = [f"{b / 1e3:.0f}" for b in sizes]
        cells += [number(1e3 * t) if is_timed else "" for t in times]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if args.output is not None:
        plot(table, args.output, lines)
    return table


if __name__ == "__main__":
    main()
