"""Time of the gradient of a solve, against diffrax's default adjoint.

    python examples/benchmarks/gradient.py [--quick] [--rows ...] [--output time.png]

Each row times all of its columns in turn, compiled and warmed up, in this one run, so
that the ratios mean something on any machine:

    default     `RecursiveCheckpointAdjoint` on the plain solver, in milliseconds
    published   `ReversibleAdjoint` on `UReversible(solver, 0.999)`, or on the solver
                itself if it is reversible: ratio to the default
    ours        the same with the controlled coupling, `UReversible(solver)`
    by hand     the arithmetic of `published` as a loop written out in JAX
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
PUBLISHED = 0.999


#
# Problems: a vector field, y0, and parameters
#


def mlp(batch=None, dtype=jnp.float64, depth=2, width=64):
    network = eqx.nn.MLP(
        16, 16, width, depth, activation=jnp.tanh, key=jr.key(0), dtype=dtype
    )
    params, static = eqx.partition(network, eqx.is_array)
    y0 = jnp.ones(16, dtype)
    if batch is None:
        return lambda t, y, p: eqx.combine(p, static)(y), y0, params
    field = lambda t, y, p: jax.vmap(eqx.combine(p, static))(y)
    return field, jnp.broadcast_to(y0, (batch, 16)), params


def lotka_volterra(dtype=jnp.float64):
    def vector_field(t, y, p):
        hare, lynx = y
        a, b, c, d = p
        return jnp.stack([a * hare - b * hare * lynx, d * hare * lynx - c * lynx])

    params = tuple(jnp.asarray(x, dtype) for x in (0.55, 0.28, 0.84, 0.26))
    return vector_field, jnp.asarray([3.0, 0.4], dtype), params


#
# What is timed
#


def loss_of(problem, solver, adjoint, num_steps, *, vmap=None, pid=False, sde=False):
    """A function of the parameters and `y0`, and these."""
    vector_field, y0, params = problem
    dtype = y0.dtype
    terms = diffrax.ODETerm(vector_field)
    if sde:
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-4, y0.shape, jr.key(1))
        noise = diffrax.ControlTerm(lambda t, y, p: diag(0.1 * jnp.cos(y)), path)
        terms = diffrax.MultiTerm(terms, noise)
    controller = diffrax.ConstantStepSize()
    if pid:
        controller = diffrax.PIDController(rtol=1e-5, atol=1e-7)
    if vmap is not None:
        # Under `pid` these are end times: the numbers of steps differ by a factor of 4.
        y0 = jnp.broadcast_to(y0, (vmap, *y0.shape))

    def loss(params, y0):
        def solve(y0, t1):
            sol = diffrax.diffeqsolve(
                terms,
                solver,
                0.0,
                t1,
                0.01 if pid else 1 / num_steps,
                y0,
                params,
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=num_steps,
            )
            return sum(jnp.sum(y**2) for y in jax.tree.leaves(sol.ys))

        one = jnp.asarray(1.0, dtype)
        if vmap is None:
            return solve(y0, one)
        if pid:
            return jnp.sum(jax.vmap(solve)(y0, jnp.linspace(5, 20, vmap, dtype=dtype)))
        return jnp.sum(jax.vmap(solve, (0, None))(y0, one))

    return loss, (params, y0)


def diag(x):
    import lineax as lx

    return lx.DiagonalLinearOperator(x)


def by_hand(problem, base, num_steps, vmap=None):
    """The published method with fixed steps, and its fused backward pass."""
    vector_field, y0, params = problem
    tableau, c0 = base.tableau, PUBLISHED
    # Not the stage that only an error estimate needs.
    stages = tableau.num_stages - (1 if tableau.fsal else 0)
    h = 1 / num_steps

    def increment(t, y, p, sign):
        ks = []
        for i in range(stages):
            c = tableau.c[i - 1].item() if i > 0 else 0.0
            row = tableau.a_lower[i - 1] if i > 0 else []
            yi = y
            for a, k in zip(row, ks):
                if a != 0:
                    yi = yi + sign * a.item() * k
            ks.append(h * vector_field(t + sign * c * h, yi, p))
        return sum(sign * b.item() * k for b, k in zip(tableau.b_sol, ks) if b != 0)

    @jax.custom_vjp
    def solve(y0, p):
        def body(carry):
            i, t, y, z = carry
            y = c0 * y + ((1 - c0) * z + increment(t, z, p, 1))
            z = z - increment(t + h, y, p, -1)
            return i + 1, t + h, y, z

        carry = (0, 0.0, y0, y0)
        return jax.lax.while_loop(lambda c: c[0] < num_steps, body, carry)[2:]

    def fwd(y0, p):
        out = solve(y0, p)
        return out, (out, p)

    def bwd(residuals, grads):
        (y, z), p = residuals

        def body(carry):
            i, t, y, z, gy, gz, gp = carry
            psi, pull = jax.vjp(lambda y, p: increment(t, y, p, -1), y, p)
            z = z + psi
            new_gy, new_gp = pull(-gz)
            gy, gp = gy + new_gy, jax.tree.map(jnp.add, gp, new_gp)
            shift = lambda z, p: (1 - c0) * z + increment(t - h, z, p, 1)
            value, pull = jax.vjp(shift, z, p)
            y = (y - value) / c0
            new_gz, new_gp = pull(gy)
            gz, gp = gz + new_gz, jax.tree.map(jnp.add, gp, new_gp)
            return i - 1, t - h, y, z, c0 * gy, gz, gp

        zeros = jax.tree.map(jnp.zeros_like, p)
        carry = (num_steps, 1.0, y, z, *grads, zeros)
        *_, gy, gz, gp = jax.lax.while_loop(lambda c: c[0] > 0, body, carry)
        return gy + gz, gp

    solve.defvjp(fwd, bwd)
    if vmap is not None:
        y0 = jnp.broadcast_to(y0, (vmap, *y0.shape))

    def loss(params, y0):
        one = lambda y0: jnp.sum(solve(y0, params)[0] ** 2)
        return one(y0) if vmap is None else jnp.sum(jax.vmap(one)(y0))

    return loss, (params, y0)


def compile_gradient(loss, arguments):
    """A function that runs it, the compiled gradient, and how long compiling took."""
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    start = time.perf_counter()
    compiled = gradient.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(compiled(*arguments)), compiled, seconds


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


#
# The table
#


def rows(batch, n):
    """Problem, plain solver, number of steps, options, adjoint of the plain solver."""
    tsit5, heun = diffrax.Tsit5(), ReversibleHeun()
    single = jnp.float32
    out = {}
    for base in (tsit5, diffrax.Dopri5(), diffrax.Heun()):
        name = type(base).__name__
        out[f"MLP, {name}"] = mlp(), base, n, {}, DEFAULT
        out[f"MLP, {name}, vmap {batch}"] = mlp(), base, n, dict(vmap=batch), DEFAULT
        out[f"MLP, {name}, {batch} in y"] = mlp(batch), base, n, {}, DEFAULT
    out["MLP, Tsit5, float32"] = mlp(dtype=single), tsit5, n, {}, DEFAULT
    out[f"MLP, Tsit5, vmap {batch}, float32"] = (
        *(mlp(dtype=single), tsit5, n),
        *(dict(vmap=batch), DEFAULT),
    )
    out[f"MLP of width 256, Tsit5, vmap {batch}"] = (
        *(mlp(width=256), tsit5, n // 4),
        *(dict(vmap=batch), DEFAULT),
    )
    out["Lotka--Volterra, Tsit5"] = lotka_volterra(), tsit5, n, {}, DEFAULT
    out[f"Lotka--Volterra, Tsit5, PID, vmap {batch}"] = (
        *(lotka_volterra(), tsit5, n),
        *(dict(vmap=batch, pid=True), DEFAULT),
    )
    out["MLP, Tsit5, equal memory"] = (
        *(mlp(), tsit5, 10 * n),
        *({}, diffrax.RecursiveCheckpointAdjoint(checkpoints=4)),
    )
    out["MLP, ReversibleHeun"] = mlp(), heun, n, {}, DEFAULT
    out["Lotka--Volterra, ReversibleHeun"] = lotka_volterra(), heun, n, {}, DEFAULT
    out["SDE, MLP, Heun"] = mlp(), diffrax.Heun(), n, dict(sde=True), DEFAULT
    return out


def measure(problem, base, num_steps, options, default, repeats):
    """Times of the columns in seconds: default, published, ours, by hand."""
    losses = [loss_of(problem, base, default, num_steps, **options)]
    if isinstance(base, ReversibleHeun):
        losses.append(loss_of(problem, base, OURS, num_steps, **options))
    else:
        for solver in (UReversible(base, PUBLISHED), UReversible(base)):
            losses.append(loss_of(problem, solver, OURS, num_steps, **options))
        if options.keys() <= {"vmap"}:
            losses.append(by_hand(problem, base, num_steps, **options))
    runs = [compile_gradient(*loss)[0] for loss in losses]
    times = list(medians(runs, repeats))
    if isinstance(base, ReversibleHeun):
        times.insert(2, np.nan)
    return times + [np.nan] * (4 - len(times))


def plot(table, filename):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(table) + 1.2), layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(table)), list(table))
    ax.invert_yaxis()
    ax.axvline(1, color="tab:gray", lw=1)
    for k, label in ((1, "published coupling"), (2, "controlled coupling")):
        ratios = [times[k] / times[0] for times in table.values()]
        ax.barh(np.arange(len(table)) + 0.4 * k - 0.6, ratios, 0.4, label=label)
    ax.set_xlabel("time of a gradient, relative to diffrax's default adjoint")
    ax.legend()
    figure.savefig(filename)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Times the gradient of a solve.")
    parser.add_argument("--quick", action="store_true", help="one row, of a small size")
    parser.add_argument("--rows", nargs="+", help="those that have one of these words")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    repeats, batch, n = (1, 4, 20) if args.quick else (5, 128, 1000)
    wanted = rows(batch, n)
    if args.quick:
        wanted = {k: v for k, v in wanted.items() if "Volterra, Rev" in k}
    if args.rows is not None:
        wanted = {k: v for k, v in wanted.items() if any(w in k for w in args.rows)}

    print("| gradient of a solve | default, ms | published | ours | by hand |")
    print("|---|---|---|---|---|")
    table = {}
    for name, row in wanted.items():
        problem, base, steps, options, default = row
        times = measure(problem, base, steps, options, default, repeats)
        table[name] = times
        ratios = [f"{x / times[0]:.2f}" if x == x else "" for x in times[1:]]
        print(f"| {name} | {1e3 * times[0]:.1f} | " + " | ".join(ratios) + " |")
    if args.output is not None:
        plot(table, args.output)
    return table


if __name__ == "__main__":
    main()
