"""Finds the conductivity of a plate from how heat has spread in it.

The heat equation on a square with insulated edges, `u' = div(k grad u)`, on 100 x 100
cells and over 10^4 steps. Known are the temperatures at the start and at the end;
sought is the map of conductivities `k`, by gradient descent through the solve. It is
parametrised by the logarithms on a coarse grid of 12 x 12 points.

To keep all steps for the backward pass takes most of a gigabyte. The memory of each
method is what the compiler says that it needs, so nothing has to be run that does not
fit:

- `RecursiveCheckpointAdjoint(checkpoints=num_steps + 1)` keeps every step;
- `RecursiveCheckpointAdjoint()`, the default of diffrax, keeps about the square root of
  twice their number, and computes the others again;
- `ReversibleAdjoint()` stores up to 32 states, and recomputes what else is needed;
- `ReversibleAdjoint(checkpoints=24)` stores a few more than the fit needs.

The heat equation forgets. So it cannot be undone from its end alone, and here a state
is wanted for every five hundred steps or more: `sol.stats["num_checkpoints"]` says so.
The steps are well below the limit of stability. Close to it a step forgets some fifty
times as much. (Nor would one solve this problem by so many steps for the sake of
accuracy. What is shown is what a gradient through so many steps takes.)

The solver is `AsynchronousLeapfrog(full_sync=True)`, of two evaluations a step; the
other adjoints are given `diffrax.Heun()`, which is of the same order and cost.

Run as `python heat_equation.py [--quick] [--output PATH]`.
"""

import argparse
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from diffrax_reversible import AsynchronousLeapfrog, ReversibleAdjoint


# Of `8 k dt / dx^2` at the largest conductivity. The limit of stability is 2.
STEP_SIZE = 0.02
LARGEST = 4.0
COARSE = 12


def vector_field(t, u, k):
    """The fluxes through the sides of each cell, of unit size, with the mean of the
    conductivities at both sides."""
    del t
    fluxes_0 = 0.5 * (k[1:] + k[:-1]) * (u[1:] - u[:-1])
    fluxes_1 = 0.5 * (k[:, 1:] + k[:, :-1]) * (u[:, 1:] - u[:, :-1])
    return jnp.diff(jnp.pad(fluxes_0, ((1, 1), (0, 0))), axis=0) + jnp.diff(
        jnp.pad(fluxes_1, ((0, 0), (1, 1))), axis=1
    )


def true_conductivity(size):
    """Two discs in a plate, one of four times its conductivity and one of a quarter,
    with soft edges."""
    x, y = np.meshgrid(*2 * [(np.arange(size) + 0.5) / size], indexing="ij")
    disc = lambda a, b, r: 1 / (1 + np.exp((np.hypot(x - a, y - b) - r) / 0.03))
    return jnp.array(LARGEST ** (disc(0.3, 0.35, 0.17) - disc(0.65, 0.65, 0.2)))


def initial_temperature(size):
    """White noise, smoothed a little."""
    kernel = np.exp(-((np.arange(-6, 7) / 2) ** 2) / 2)
    kernel = jnp.array(np.outer(kernel, kernel))
    noise = jr.normal(jr.key(0), (size, size))
    smooth = jax.scipy.signal.convolve(noise, kernel, mode="same")
    return smooth / jnp.std(smooth)


def conductivity(parameters, size):
    return jnp.exp(jax.image.resize(parameters, (size, size), "cubic"))


def solve(k, u0, num_steps, solver, adjoint):
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        t0=0.0,
        t1=num_steps * STEP_SIZE / (8 * LARGEST),
        dt0=STEP_SIZE / (8 * LARGEST),
        y0=u0,
        args=k,
        # Rounding may make it one step more.
        max_steps=num_steps + 1,
        adjoint=adjoint,
    )
    assert sol.ys is not None
    return sol.ys[0], sol.stats.get("num_checkpoints", 0)


def loss_fn(parameters, u0, u1, num_steps, solver, adjoint):
    """The mean square of the difference, relative to that of the temperature."""
    u, num_checkpoints = solve(
        conductivity(parameters, len(u0)), u0, num_steps, solver, adjoint
    )
    return jnp.mean((u - u1) ** 2) / jnp.mean(u1**2), num_checkpoints


def methods(num_steps):
    ours = AsynchronousLeapfrog(full_sync=True)
    every = diffrax.RecursiveCheckpointAdjoint(checkpoints=num_steps + 1)
    return {
        "every step": (diffrax.Heun(), every),
        "default": (diffrax.Heun(), diffrax.RecursiveCheckpointAdjoint()),
        "ours": (ours, ReversibleAdjoint()),
        "ours, checkpoints=24": (ours, ReversibleAdjoint(checkpoints=24)),
    }


def compile_gradient(u0, num_steps, solver, adjoint):
    gradient = lambda p, u0, u1: jax.value_and_grad(loss_fn, has_aux=True)(
        p, u0, u1, num_steps, solver, adjoint
    )
    parameters = jnp.zeros((COARSE, COARSE))
    return jax.jit(gradient).lower(parameters, u0, u0).compile()


def temporary_megabytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def timed(compiled, *args):
    start = time.perf_counter()
    out = jax.block_until_ready(compiled(*args))
    return out, time.perf_counter() - start


def fit(gradient, u0, u1, num_iterations):
    optim = optax.adam(optax.cosine_decay_schedule(0.2, num_iterations))
    parameters = jnp.zeros((COARSE, COARSE))
    opt_state = optim.init(parameters)
    losses = []
    num_checkpoints = 0
    bar = tqdm(range(num_iterations), desc="conductivity")
    for _ in bar:
        (loss, n), grads = gradient(parameters, u0, u1)
        updates, opt_state = optim.update(grads, opt_state)
        parameters = optax.apply_updates(parameters, updates)
        losses.append(loss.item())
        num_checkpoints = max(num_checkpoints, int(n))
        bar.set_postfix(loss=f"{losses[-1]:.2e}", checkpoints=int(n))
    return parameters, losses, num_checkpoints


def plot(memory, u0, u1, k, found, path):
    fig, axes = plt.subplot_mosaic(
        [["before", "after", "memory"], ["true", "found", "memory"]],
        figsize=(12, 6),
        width_ratios=[1, 1, 1.4],
        layout="constrained",
    )
    hottest = np.max(np.abs(u0))
    for name, title, values, cmap, limit in (
        ("before", "temperature before", u0, "coolwarm", hottest),
        ("after", "and after", u1, "coolwarm", hottest),
        ("true", "conductivity ($\\log_2$)", np.log2(k), "viridis", 2.5),
        ("found", "as found", np.log2(found), "viridis", 2.5),
    ):
        image = axes[name].imshow(values, cmap=cmap, vmin=-limit, vmax=limit)
        axes[name].set_title(title)
        axes[name].set_axis_off()
        if name in ("after", "found"):
            fig.colorbar(image, ax=axes[name])
    for name, sizes in memory.items():
        axes["memory"].plot(list(sizes), list(sizes.values()), "o-", label=name)
    axes["memory"].set_xscale("log")
    axes["memory"].set_yscale("log")
    axes["memory"].set_xlabel("steps")
    axes["memory"].set_ylabel("memory of a gradient (MB)")
    axes["memory"].grid(alpha=0.3)
    axes["memory"].legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Finds the conductivity of a plate by the heat equation."
    )
    parser.add_argument("--quick", action="store_true", help="fewer cells and steps")
    parser.add_argument(
        "--output", default="heat_equation.png", help="path of the figure"
    )
    args = parser.parse_args(argv)
    if args.quick:
        print("This is a smoke test: it stops long before there is a result.")

    jax.config.update("jax_enable_x64", True)

    size, num_iterations = (20, 5) if args.quick else (100, 60)
    all_num_steps = (200,) if args.quick else (100, 1000, 10_000)
    num_steps = all_num_steps[-1]
    names = ["default", "ours"] if args.quick else list(methods(num_steps))

    u0 = initial_temperature(size)
    memory = {name: {} for name in names}
    compiled = {}
    bar = tqdm([(n, name) for n in all_num_steps for name in names], desc="compiling")
    for n, name in bar:
        bar.set_postfix(steps=n, method=name)
        # Only those of the largest number of steps are kept, and two of them run.
        compiled[name] = compile_gradient(u0, n, *methods(n)[name])
        memory[name][n] = temporary_megabytes(compiled[name])

    k = true_conductivity(size)
    # By the other solver, whose error is another one.
    u1, _ = eqx.filter_jit(solve)(k, u0, num_steps, *methods(num_steps)["default"])

    parameters, losses, num_checkpoints = fit(compiled["ours"], u0, u1, num_iterations)
    found = conductivity(parameters, size)
    error = jnp.sqrt(jnp.mean(jnp.log(found / k) ** 2)).item()
    initial_error = jnp.sqrt(jnp.mean(jnp.log(k) ** 2)).item()

    # (Far from the optimum, where there is a gradient to compare.)
    guess = jnp.zeros((COARSE, COARSE))
    (_, grads), seconds = timed(compiled["ours"], guess, u0, u1)
    (_, other_grads), default_seconds = timed(compiled["default"], guess, u0, u1)
    norm = jnp.linalg.norm
    difference = (norm(grads - other_grads) / norm(other_grads)).item()

    print("\nMemory of a gradient, in MB")
    for name, sizes in memory.items():
        cells = ", ".join(f"{n} steps: {x:.1f}" for n, x in sizes.items())
        print(f"  {name:20} {cells}")
    print(f"Time of a gradient: {seconds:.1f} s; default {default_seconds:.1f} s")
    print(f"First gradient, difference between the two solvers: {difference:.1e}")
    print(f"States wanted: at most {num_checkpoints}")
    print(f"Loss: {losses[0]:.2e} -> {losses[-1]:.2e}")
    print(f"RMS error of log(k): {initial_error:.3f} -> {error:.3f}")

    plot(memory, u0, u1, k, found, args.output)
    print(f"\nWrote {args.output}")
    return dict(
        memory=memory,
        losses=losses,
        num_checkpoints=num_checkpoints,
        difference=difference,
        errors=(initial_error, error),
    )


if __name__ == "__main__":
    main()
