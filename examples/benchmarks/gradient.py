"""Time and memory of the gradient of a solve, against diffrax's default adjoint.

Each row times both in turn, compiled and warmed up, in this one run; so that the ratios
mean something on any machine. Memory is what the compiler allocates for temporaries.

Run as `python gradient.py [--quick]`.
"""

import argparse
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from diffrax_reversible import ReversibleAdjoint, ReversibleHeun, UReversible


DEFAULT = diffrax.RecursiveCheckpointAdjoint()
OURS = ReversibleAdjoint()


def mlp_problem():
    mlp = eqx.nn.MLP(16, 16, 64, 2, activation=jnp.tanh, key=jr.key(0))
    params, static = eqx.partition(mlp, eqx.is_array)
    return lambda t, y, p: eqx.combine(p, static)(y), jnp.ones(16), params


def batched_mlp_problem(batch):
    vector_field, y0, params = mlp_problem()
    batched = lambda t, y, p: jax.vmap(vector_field, (None, 0, None))(t, y, p)
    return batched, jnp.broadcast_to(y0, (batch, *y0.shape)), params


def lotka_volterra_problem():
    def vector_field(t, y, p):
        hare, lynx = y
        a, b, c, d = p
        return jnp.array([a * hare - b * hare * lynx, d * hare * lynx - c * lynx])

    params = tuple(jnp.array(x) for x in (0.55, 0.28, 0.84, 0.26))
    return vector_field, jnp.array([3.0, 0.4]), params


def sine_problem(size):
    return lambda t, y, p: -p * jnp.sin(y), jnp.ones(size), jnp.array(0.5)


def compile_gradient(problem, solver, adjoint, num_steps, vmap=False):
    vector_field, y0, params = problem
    if vmap:
        y0 = jnp.broadcast_to(y0, (vmap, *y0.shape))

    def loss(params, y0):
        def solve(y0):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(vector_field),
                solver,
                0.0,
                1.0,
                1 / num_steps,
                y0,
                params,
                adjoint=adjoint,
                max_steps=num_steps,
            )
            return sum(jnp.sum(y**2) for y in jax.tree.leaves(sol.ys))

        return jnp.sum(jax.vmap(solve)(y0)) if vmap else solve(y0)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    start = time.perf_counter()
    compiled = gradient.lower(params, y0).compile()
    compile_time = time.perf_counter() - start
    run = lambda: jax.block_until_ready(compiled(params, y0))
    memory = compiled.memory_analysis()
    assert memory is not None
    return run, compile_time, memory.temp_size_in_bytes


def medians(runs, repeats):
    """Median times. The runs take turns, so that all meet the same disturbances."""
    for run in runs:
        run()
    times = np.zeros((repeats, len(runs)))
    for i in range(repeats):
        for j, run in enumerate(runs):
            start = time.perf_counter()
            run()
            times[i, j] = time.perf_counter() - start
    return np.median(times, axis=0)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Times the gradient of a solve.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    repeats = 1 if args.quick else 5
    num_steps = 20 if args.quick else 1000
    batch = 4 if args.quick else 128

    tsit5, u_tsit5 = diffrax.Tsit5(), UReversible(diffrax.Tsit5())
    heun = ReversibleHeun()
    mlp, lv = mlp_problem(), lotka_volterra_problem()
    rows = [
        ("MLP, Tsit5", mlp, tsit5, u_tsit5, {}),
        (f"MLP, Tsit5, vmap over {batch}", mlp, tsit5, u_tsit5, dict(vmap=batch)),
        (
            f"MLP, Tsit5, {batch} inside y",
            batched_mlp_problem(batch),
            tsit5,
            u_tsit5,
            {},
        ),
        ("Lotka--Volterra, Tsit5", lv, tsit5, u_tsit5, {}),
        ("MLP, ReversibleHeun", mlp, heun, heun, {}),
        ("Lotka--Volterra, ReversibleHeun", lv, heun, heun, {}),
    ]
    print(f"Gradient of {num_steps} steps: RecursiveCheckpointAdjoint on the solver,")
    print("ReversibleAdjoint on its reversible form, and the ratio of the two.\n")
    print("| problem | default, ms | ours, ms | ratio | compiling, ratio |")
    print("|---|---|---|---|---|")
    if args.quick:
        rows = rows[-1:]
    ratios = {}
    for name, problem, solver, reversible, kwargs in rows:
        run0, compile0, _ = compile_gradient(
            problem, solver, DEFAULT, num_steps, **kwargs
        )
        run1, compile1, _ = compile_gradient(
            problem, reversible, OURS, num_steps, **kwargs
        )
        time0, time1 = medians([run0, run1], repeats)
        ratios[name] = time1 / time0
        print(
            f"| {name} | {1e3 * time0:.1f} | {1e3 * time1:.1f} | {time1 / time0:.2f} "
            f"| {compile1 / compile0:.2f} |",
            flush=True,
        )

    size = 100 if args.quick else 10_000
    print(f"\nTemporary memory in MB, y of {size} float64.\n")
    print("| steps | default | ours |")
    print("|---|---|---|")
    memory = {}
    for n in (10,) if args.quick else (100, 1000, 10_000, 100_000):
        _, _, bytes0 = compile_gradient(sine_problem(size), tsit5, DEFAULT, n)
        _, _, bytes1 = compile_gradient(sine_problem(size), u_tsit5, OURS, n)
        memory[n] = bytes0, bytes1
        print(f"| {n} | {bytes0 / 1e6:.2f} | {bytes1 / 1e6:.2f} |", flush=True)
    return ratios, memory


if __name__ == "__main__":
    main()
