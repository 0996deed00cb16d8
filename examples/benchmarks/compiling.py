"""Time to trace and compile a gradient, and to import the package.

    python examples/benchmarks/compiling.py [--quick] [--output compiling.png]

Against `RecursiveCheckpointAdjoint` on the plain solver, for networks of two and of 64
layers, in seconds of all cores together, several times in turn with nothing cached: of
the solver as it is, of `UReversible(solver)`, and of that with the stages in a loop,
`UReversible(solver(scan_kind="lax"))`. And in new processes, how much longer it
takes to import `diffrax_reversible` than `diffrax`.
"""

import argparse
import subprocess
import sys
import time

import diffrax
import jax
import numpy as np
from gradient import compile_gradient, DEFAULT, loss_of, mlp, OURS

from diffrax_reversible import UReversible


COLUMNS = {
    "default": (lambda base: base, DEFAULT),
    "as it is": (lambda base: base, OURS),
    "undone": (UReversible, OURS),
    "undone, in a loop": (lambda base: UReversible(type(base)(scan_kind="lax")), OURS),
}


def import_time(module, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def plot(table, filename):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(table) + 1.2), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(table)), list(table))
    ax.axvline(1, color="tab:gray", lw=1)
    for k, name in enumerate(list(COLUMNS)[1:]):
        ratios = [times[k + 1] / times[0] for times in table.values()]
        ax.barh(np.arange(len(table)) + 0.27 * (k - 1), ratios, 0.27, label=name)
    ax.set_xlabel("time to compile, relative to diffrax's default adjoint")
    ax.legend()
    figure.savefig(filename)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Times compiling and importing.")
    parser.add_argument("--quick", action="store_true", help="one row, once")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    repeats = 1 if args.quick else 3
    table = {}
    print(f"| gradient of a solve | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for depth in (2,) if args.quick else (2, 64):
        for base in (
            (diffrax.Heun(),)
            if args.quick
            else (
                diffrax.Heun(),
                diffrax.Tsit5(),
            )
        ):
            times = np.zeros((repeats, len(COLUMNS)))
            for i in range(repeats):
                for j, (convert, adjoint) in enumerate(COLUMNS.values()):
                    jax.clear_caches()
                    loss = loss_of(mlp(depth=depth), convert(base), adjoint, 100)
                    _, _, times[i, j] = compile_gradient(*loss)
            name = f"{depth} layers, {type(base).__name__}"
            first, *others = table[name] = np.median(times, axis=0)
            ratios = " | ".join(f"{x / first:.2f}" for x in others)
            print(f"| {name} | {first:.2f} | {ratios} |", flush=True)
    both, host = (
        import_time(module, 1 if args.quick else 5)
        for module in ("diffrax_reversible", "diffrax")
    )
    print(f"\nImporting: {1e3 * (both - host):.0f} ms more than diffrax.")
    if args.output is not None:
        plot(table, args.output)
    return table


if __name__ == "__main__":
    main()
