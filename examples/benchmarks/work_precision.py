"""Error of a solution and of its gradient against the time they take.

    python examples/benchmarks/work_precision.py [--quick] [--output work_precision.png]

On three problems, with fixed steps of several sizes, for some of the solvers that fit:
a Kepler orbit of eccentricity 0.3, over four periods; Van der Pol's equation with
`mu = 3`, over a time of 10; and a pendulum with additive noise, over a time of 4, on 16
paths.

The error of the gradient of a function of the solution at the end with respect to the
initial value and a parameter, that of the solution, and the median time of the two;
against a reference with very small steps (of the stochastic problem on the same paths).
`--` where the gradient is refused, or the solution lost.
"""

import argparse
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gradient import DEFAULT, medians, OURS

import diffrax_reversible as dfxr
from diffrax_reversible import UReversible


CHECKPOINTS = "RecursiveCheckpointAdjoint"
METHODS = {
    f"Heun + {CHECKPOINTS}": (diffrax.Heun(), DEFAULT),
    f"Tsit5 + {CHECKPOINTS}": (diffrax.Tsit5(), DEFAULT),
    f"Dopri8 + {CHECKPOINTS}": (diffrax.Dopri8(), DEFAULT),
    # The others with `ReversibleAdjoint`.
    "UReversible(Heun)": (UReversible(diffrax.Heun()), OURS),
    "UReversible(Tsit5)": (UReversible(diffrax.Tsit5()), OURS),
    "UReversible(Dopri8)": (UReversible(diffrax.Dopri8()), OURS),
    "ReversibleHeun": (dfxr.ReversibleHeun(), OURS),
    "AsynchronousLeapfrog": (dfxr.AsynchronousLeapfrog(), OURS),
    "EES25": (dfxr.EES25(), OURS),
    "StormerVerlet": (dfxr.StormerVerlet(), OURS),
    "BlanesMoan4": (dfxr.BlanesMoan4(), OURS),
    "KahanLi8": (dfxr.KahanLi8(), OURS),
}


class Problem(NamedTuple):
    """`dp = force(q, param) dt + noise dW`, `dq = velocity(p, q, param) dt`."""

    force: Any
    velocity: Any
    p0: list[float]
    q0: list[float]
    param: float
    t1: float
    steps: tuple[int, ...]
    # At most seven, or nobody can tell them apart.
    methods: list[str]
    reference: tuple[Any, int]
    noise: float = 0.0
    num_paths: int = 1


FINE = (250, 500, 1000, 2000, 4000)
PROBLEMS = {
    "Kepler orbit": Problem(
        force=lambda p, q, k: -k * q / jnp.sum(q**2) ** 1.5,
        velocity=lambda p, q, k: p,
        p0=[0.0, 1.3**0.5],
        q0=[1.0, 0.0],
        param=1.0,
        t1=8 * np.pi / 0.7**1.5,
        steps=FINE,
        methods=[
            f"Tsit5 + {CHECKPOINTS}",
            f"Dopri8 + {CHECKPOINTS}",
            "UReversible(Tsit5)",
            "UReversible(Dopri8)",
            "StormerVerlet",
            "BlanesMoan4",
            "KahanLi8",
        ],
        reference=(diffrax.Dopri8(), 64_000),
    ),
    "Van der Pol": Problem(
        force=lambda p, q, mu: mu * (1 - q**2) * p - q,
        velocity=lambda p, q, mu: p,
        p0=[0.0],
        q0=[2.0],
        param=3.0,
        t1=10.0,
        steps=FINE,
        methods=list(METHODS)[:6],
        reference=(diffrax.Dopri8(), 64_000),
    ),
    "pendulum with noise": Problem(
        force=lambda p, q, k: -k * jnp.sin(q),
        velocity=lambda p, q, k: p,
        p0=[0.5],
        q0=[1.0],
        param=2.0,
        t1=4.0,
        steps=(32, 64, 128, 256, 512),
        methods=[
            f"Heun + {CHECKPOINTS}",
            "UReversible(Heun)",
            "ReversibleHeun",
            "AsynchronousLeapfrog",
            "StormerVerlet",
            "EES25",
        ],
        reference=(diffrax.Heun(), 8192),
        noise=0.5,
        num_paths=16,
    ),
}


def make_terms(problem, is_pair, key):
    force, velocity = problem.force, problem.velocity

    def whole(t, y, k):
        p, q = jnp.split(y, 2)
        return jnp.concatenate([force(p, q, k), velocity(p, q, k)])

    def noisy(term, size):
        if problem.noise == 0:
            return term
        # Of a depth that resolves the steps of the reference.
        path = diffrax.VirtualBrownianTree(0.0, problem.t1, 2e-4, (), key)
        noise = jnp.where(jnp.arange(size) < len(problem.p0), problem.noise, 0.0)
        control = diffrax.ControlTerm(lambda t, y, k: noise, path)
        return diffrax.MultiTerm(term, control)

    if is_pair:
        kick = diffrax.ODETerm(lambda t, q, k: force(None, q, k))
        drift = diffrax.ODETerm(lambda t, p, k: velocity(p, None, k))
        return noisy(kick, len(problem.p0)), drift
    return noisy(diffrax.ODETerm(whole), 2 * len(problem.p0))


def value_and_gradient(problem, method, n):
    """A function that returns the solution at the end, and a gradient."""
    solver, adjoint = method
    is_pair = isinstance(solver, (dfxr.AbstractSplitting, dfxr.SemiImplicitEuler))

    def loss(param__y0, key):
        param, (p0, q0) = param__y0
        sol = diffrax.diffeqsolve(
            make_terms(problem, is_pair, key),
            solver,
            0.0,
            problem.t1,
            problem.t1 / n,
            (p0, q0) if is_pair else jnp.concatenate([p0, q0]),
            param,
            adjoint=adjoint,
            max_steps=n,
        )
        y1 = jnp.concatenate([jnp.ravel(y) for y in jax.tree.leaves(sol.ys)])
        return jnp.sum(jnp.sin(y1)), y1

    grad = jax.grad(loss, has_aux=True)
    run = jax.jit(jax.vmap(grad, (None, 0)) if problem.num_paths > 1 else grad)
    y0 = (jnp.asarray(problem.p0), jnp.asarray(problem.q0))
    keys = jr.split(jr.key(0), problem.num_paths)
    keys = keys if problem.num_paths > 1 else keys[0]
    inputs = (jnp.asarray(problem.param), y0)
    return lambda: jax.block_until_ready(run(inputs, keys)[::-1])


def error(x, y):
    flat = lambda tree: np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
    x, y = flat(x), flat(y)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def measure(problem, quick):
    """Rows `(steps, error of the solution, of the gradient, time)` of each method."""
    names, steps, (solver, fine) = problem.methods, problem.steps, problem.reference
    if quick:
        names = [
            n for n in names if n in (f"Heun + {CHECKPOINTS}", "UReversible(Heun)")
        ]
        steps, fine = (100,), 500
    reference = value_and_gradient(problem, (solver, DEFAULT), fine)()
    runs = {
        (name, n): value_and_gradient(problem, METHODS[name], n)
        for name in names
        for n in steps
    }
    results = {}
    for key, run in runs.items():
        try:
            results[key] = run()
        except (RuntimeError, ValueError) as e:
            if "ReversibleAdjoint" not in str(e):
                raise
    runs = [runs[key] for key in results]
    times = dict(zip(results, medians(runs, 1 if quick else 5)))
    table = {name: [] for name in names}
    for name in names:
        for n in steps:
            row = [np.nan] * 3
            if (name, n) in results:
                errors = [error(x, y) for x, y in zip(results[name, n], reference)]
                row = [*errors, times[name, n]]
            table[name].append((n, *row))
    return table


def plot(tables, filename):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    all_axes: Any = figure.subplots(1, len(tables), squeeze=False)
    for ax, (title, table) in zip(all_axes[0], tables.items()):
        for name, rows in table.items():
            points = [(r[2], 1e3 * r[3]) for r in rows if r[2] < 1]
            if points:
                style = "o--" if CHECKPOINTS in name else "o-"
                ax.plot(*zip(*points), style, label=name, markersize=4)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("relative error of the gradient")
        ax.set_title(title)
        if ax.lines:
            ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    all_axes[0][0].set_ylabel("time of solution and gradient, ms")
    figure.savefig(filename, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Error against time.")
    parser.add_argument("--quick", action="store_true", help="two methods, small sizes")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    tables = {}
    for title, problem in PROBLEMS.items():
        if args.quick and "UReversible(Heun)" not in problem.methods:
            continue
        tables[title] = measure(problem, args.quick)
        print(f"\n{title}\n")
        print("| method | steps | error of the solution | of the gradient | time, ms |")
        print("|---|---|---|---|---|")
        for name, rows in tables[title].items():
            for n, *errors, seconds in rows:
                cells = [f"{x:.1e}" for x in errors] + [f"{1e3 * seconds:.2f}"]
                cells = ["--"] * 3 if np.isnan(seconds) else cells
                print(f"| {name} | {n} | {' | '.join(cells)} |", flush=True)
    if args.output is not None:
        plot(tables, args.output)
    return tables


if __name__ == "__main__":
    main()
