"""Is `UReversible(base)` what `base` is?

    python examples/benchmarks/stability.py [--quick] [--bases Tsit5 ...] [--steps ...]
        [--precisions ...] [--models ...] [--output table.csv] [--plot picture.png]

For every model of `models.py`, wrapped solver, kind of steps and precision, with the
default settings on both sides, prints of each

    steps       accepted
    error       of the component that it is largest of, at the end, against a fine
                reference; relative to that component
    gradient    the same of the gradient, by components of `y0` and of the parameters,
                against that of the reference

and then the ratios that matter: of the errors, component by component, the largest one;
how many states were wanted; and by how much, relative to each component, the gradient
of `ReversibleAdjoint` differs from that of `RecursiveCheckpointAdjoint` on the same
solver. A field, or a matrix of weights, is one component: of its many points there is
always one at which the error of a solver happens to vanish. For the same reason the
error of the base solver is the larger one of two runs, the other of which has a step
that is smaller by one in a thousand, or a tolerance smaller by one in a hundred.

A star marks a row that misses an aim: a component's error above 1.5 times that of the
base solver, of the gradient above 2 times (where that of the base solver is below 10%),
steps that differ by more than 2% and by more than those of the two runs, gradients of
the two adjoints that differ by more than 1e-6 (1e-3 in single precision). What rounding
does is allowed on top. One solver takes some ten minutes.
"""

import argparse
import csv
import functools as ft
import math
import warnings
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from models import Group, groups

from diffrax_reversible import ReversibleAdjoint, UReversible


jax.config.update("jax_enable_x64", True)

BASES = ("Heun", "Bosh3", "Tsit5", "Dopri5", "Dopri8")
MAX_STEPS = 8192
DEFAULT = diffrax.RecursiveCheckpointAdjoint()
OURS = ReversibleAdjoint()


class Result(NamedTuple):
    y1: np.ndarray
    # Of `y0` and of the parameters.
    gradient: np.ndarray
    steps: int
    wanted: int
    is_successful: bool


@ft.cache
def _compiled(group: Group, solver, adjoint, kind: str, dtype, max_steps: int):
    controller = diffrax.ConstantStepSize()

    @jax.jit
    def run(index, y0, p, t1, dt0, rtol, atol, weights):
        nonlocal controller
        if kind == "PID":
            controller = diffrax.PIDController(rtol=rtol, atol=atol)

        def loss(params):
            y0, p = params
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(group.vector_field),
                solver,
                # If it were double precision then diffrax would promote `y0` to it.
                jnp.zeros((), dtype),
                t1,
                dt0,
                y0,
                (index, p),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=max_steps,
                throw=False,
            )
            assert sol.ys is not None
            is_successful = sol.result == diffrax.RESULTS.successful
            return jnp.sum(weights * sol.ys[0]), (sol.ys[0], sol.stats, is_successful)

        return jax.value_and_grad(loss, has_aux=True)((y0, p))

    return run


def solve(
    group,
    name,
    solver,
    adjoint,
    kind,
    dtype,
    rtol,
    weights,
    max_steps=MAX_STEPS,
    step=1.0,
) -> Result:
    model = group.models[name]
    run = _compiled(group, solver, adjoint, kind, dtype, max_steps)
    y0, p = group.data(name)
    # (In single precision tolerances are a hundred times as large.)
    atol = model.atol * rtol / 1e-6
    dt0 = step * (model.step if kind == "fixed" else 1e-3 * model.t1)
    floats = (y0, p, model.t1, dt0, rtol, atol, weights)
    floats = [jnp.asarray(x, dtype) for x in floats]
    (_, (y1, stats, is_successful)), grads = run(group.names.index(name), *floats)
    n, num_parameters = model.y0.size, model.p.size
    gradient = [grads[0][:n], grads[1][:num_parameters]]
    return Result(
        np.asarray(y1[:n], np.float64),
        np.concatenate([np.asarray(g, np.float64) for g in gradient]),
        int(stats["num_accepted_steps"]),
        int(stats.get("num_checkpoints", 0)),
        bool(is_successful),
    )


class Reference(NamedTuple):
    y1: np.ndarray
    gradient: np.ndarray
    # Every component of `y1` has its say in the gradient.
    weights: np.ndarray

    def errors(self, model, found: Result) -> tuple[np.ndarray, np.ndarray]:
        """Of each component of `y1`, and of the gradient; relative to its size."""
        parts = model.parts()
        y_parts = parts[: self.y1.size]
        size = largest(y_parts, self.y1)
        error = largest(y_parts, found.y1 - self.y1) / np.where(size == 0, 1, size)
        size = largest(parts, self.gradient)
        # (Next to a large one a small one does not count.)
        num = len(error)
        for x in (size[:num], size[num:]):
            x[:] = np.maximum(x, 1e-6 * (np.max(x, initial=0) or 1))
        return error, largest(parts, found.gradient - self.gradient) / size


def largest(parts: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The largest absolute value in each part."""
    out = np.zeros(max(parts) + 1)
    np.maximum.at(out, parts, np.abs(x))
    return out


@ft.cache
def reference(group: Group, name: str) -> Reference:
    fine = (group, name, diffrax.Dopri8(), DEFAULT, "PID", jnp.float64, 1e-12)
    y1 = solve(*fine, np.ones(group.size), 30_000).y1
    model = group.models[name]
    sizes = np.where(y1 == 0, 1, np.abs(y1))
    # (What has decayed to nothing is not what a loss looks at.)
    sizes = np.maximum(sizes, 1e-9 * np.max(np.abs(model.y0)))
    weights = np.zeros(group.size)
    weights[: y1.size] = np.cos(np.arange(y1.size)) / sizes
    found = solve(*fine, weights, 30_000)
    assert found.is_successful
    return Reference(y1, found.gradient, weights)


def study(group: Group, name: str, base, kind: str, precision: str) -> dict:
    dtype = jnp.dtype(precision)
    is_double = dtype == jnp.float64
    ref, model = reference(group, name), group.models[name]
    # Of an adaptive method of order two there would be very many steps.
    rtol = 1e-6 if is_double and type(base) is not diffrax.Heun else 1e-4

    def run(solver, adjoint, shrink=0.0):
        options = (rtol * (1 - 10 * shrink), ref.weights, MAX_STEPS, 1 - shrink)
        found = solve(group, name, solver, adjoint, kind, dtype, *options)
        return found, *ref.errors(model, found)

    solver = UReversible(base)
    theirs, base_error, base_gradient = run(base, DEFAULT)
    again, other_error, other_gradient = run(base, DEFAULT, 1e-3)
    base_error = np.maximum(base_error, other_error)
    base_gradient = np.maximum(base_gradient, other_gradient)
    ours, error, gradient = run(solver, OURS)
    same, *_ = run(solver, DEFAULT)
    # What rounding may do on top.
    floor = 30 * float(jnp.finfo(dtype).eps)
    gradient_floor = 1e-9 if is_double else 1e-4
    ratio = np.max(error / (base_error + floor))
    is_known = base_gradient < 0.1
    gradient_ratio = np.max(
        np.where(is_known, gradient / (base_gradient + gradient_floor), 0)
    )
    _, difference = ref._replace(gradient=same.gradient).errors(model, ours)
    difference = np.max(difference)
    row = dict(
        model=name,
        base=type(base).__name__,
        kind=kind,
        precision=precision,
        base_steps=theirs.steps,
        base_error=np.max(base_error),
        base_gradient=np.max(base_gradient),
        steps=ours.steps,
        error=np.max(error),
        gradient=np.max(gradient),
        ratio=ratio,
        gradient_ratio=gradient_ratio,
        wanted=ours.wanted,
        difference=difference,
        works=theirs.is_successful and bool(np.all(np.isfinite(base_gradient))),
    )
    aims = {
        "error": ratio <= 1.5,
        # (Where no component of the base solver's is known, there is none to compare.)
        "gradient": gradient_ratio <= 2,
        "steps": abs(ours.steps - theirs.steps)
        <= max(0.02 * theirs.steps, 1, abs(again.steps - theirs.steps)),
        # (Where it is infinite it has no digits.)
        "adjoint": difference <= (1e-6 if is_double else 1e-3) or not np.all(is_known),
    }
    return {**row, "missed": " ".join(k for k, holds in aims.items() if not holds)}


def show(row: dict) -> None:
    line = "{model:20} {base:6} {kind:5} {precision} | {base_steps:5} {base_error:.0e} "
    line += "{base_gradient:.0e} | {steps:5} {error:.0e} {gradient:.0e} | {ratio:7.2g} "
    line += "{gradient_ratio:7.2g} {wanted:5} {difference:.0e}"
    star = f" * {row['missed']}" if row["missed"] else ""
    print(line.format(**row) + (star if row["works"] else " -"), flush=True)


def plot(rows: list[dict], filename: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    versions = f"JAX {jax.__version__}, diffrax {diffrax.__version__}"
    title = f"`UReversible(base)` next to `base`, on {len(rows)} solves; {versions}"
    figure.suptitle(title, fontsize=9)
    left, right = figure.subplots(1, 2)
    for ax, key, aim in ((left, "ratio", 1.5), (right, "gradient_ratio", 2)):
        for precision, marker in (("float64", "o"), ("float32", "x")):
            found = [r for r in rows if r["precision"] == precision]
            wanted = [max(r["wanted"], 0.5) for r in found]
            ratios = [np.clip(r[key], 1e-2, 1e3) for r in found]
            ax.plot(wanted, ratios, marker, markersize=3, alpha=0.5, label=precision)
        ax.axhline(aim, color="black", linewidth=0.5)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("states wanted")
    left.set_title("error of the worst component,\nours / base solver", fontsize=9)
    right.set_title("the same of the gradient", fontsize=9)
    left.legend()
    figure.savefig(filename, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rows only")
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--steps", nargs="+", default=["fixed", "PID"])
    parser.add_argument("--precisions", nargs="+", default=["float64", "float32"])
    parser.add_argument("--output", help="where to write the table as CSV")
    parser.add_argument("--plot", help="where to save a picture")
    args = parser.parse_args(argv)
    if args.quick:
        args.bases, args.precisions, args.steps = ["Tsit5"], ["float64"], ["PID"]
        args.models = ["y' = -5y", "Lotka-Volterra"]

    all_rows = []
    for group in groups():
        names = [x for x in group.names if args.models is None or x in args.models]
        for base in args.bases:
            for precision in args.precisions:
                for kind in args.steps:
                    for name in names:
                        base_solver = getattr(diffrax, base)()
                        with warnings.catch_warnings():
                            # diffrax warns that tolerances are small, and the like.
                            warnings.simplefilter("ignore")
                            row = study(group, name, base_solver, kind, precision)
                        all_rows.append(row)
                        show(row)
                # (Or the process runs out of memory mappings.)
                jax.clear_caches()
            if args.output is not None and all_rows:
                with open(args.output, "w", newline="") as file:
                    writer = csv.DictWriter(file, list(all_rows[0]))
                    writer.writeheader()
                    writer.writerows(all_rows)

    rows = [row for row in all_rows if row["works"]]
    good = sum(not row["missed"] for row in rows)
    print(f"{good} of {len(rows)} rows on which the base solver works meet all aims")
    for aim in ("error", "gradient", "steps", "adjoint"):
        print(f"{sum(aim in row['missed'] for row in rows)} miss that of the {aim}")
    for n in (0, 4, 16, 64, 256):
        share = np.mean([row["wanted"] <= n for row in rows])
        print(f"{share:.0%} want at most {n} states")
    for key in ("ratio", "gradient_ratio"):
        # (Where it is zero no component is known.)
        ratios = [row[key] for row in rows if 0 < row[key] < math.inf]
        median, high = np.percentile(ratios, [50, 95])
        print(f"{key}: median {median:.2g}, 95% are below {high:.2g}")
    if args.plot is not None:
        plot(rows, args.plot)
    return all_rows


if __name__ == "__main__":
    main()
