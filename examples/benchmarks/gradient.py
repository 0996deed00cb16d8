"""Time and memory of the gradient of a solve, against diffrax's default adjoint.

    python examples/benchmarks/gradient.py [--quick] [--rows ...] [--output time.png]

Each row times all of its columns in turn, compiled and warmed up, in this one run, so
that the ratios mean something on any machine. All settings are the default ones.

    default         `RecursiveCheckpointAdjoint` on the solver, in ms and kB
    as it is        `ReversibleAdjoint` on the solver: ratios to the default
    by hand         loops written out in JAX that store every 32nd state
    undone          `ReversibleAdjoint` on `UReversible(solver)`, or on the solver
                    itself if it is reversible
    by hand         its arithmetic, without its control, as a loop written out in JAX

Memory is what the compiler allocates for temporaries. The rows that say "solve" are of
a solve without a gradient.
"""

import argparse
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from models import groups

from diffrax_reversible import ReversibleAdjoint, ReversibleHeun, UReversible


DEFAULT = diffrax.RecursiveCheckpointAdjoint()
OURS = ReversibleAdjoint()


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


def stencil(size=100):
    def vector_field(t, y, p):
        u = jnp.pad(y, 1)
        return p * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * y)

    return vector_field, jnp.ones((size, size)), jnp.asarray(10.0)


def sine(size=10_000):
    return lambda t, y, p: -p * jnp.sin(y), jnp.ones(size), jnp.asarray(0.5)


def everyday(name):
    """One of `models.py`, and how it is solved there with a step size controller."""
    [model] = [g.models[name] for g in groups() if name in g.names]
    problem = model.vector_field, jnp.asarray(model.y0), jnp.asarray(model.p)
    return problem, dict(pid=True, t1=model.t1, rtol=1e-6, dt0=1e-3 * model.t1)


#
# What is timed
#


def terms_of(vector_field, y0, sde, additive=False):
    term = diffrax.ODETerm(vector_field)
    if not sde:
        return term
    levy = diffrax.SpaceTimeLevyArea if additive else diffrax.BrownianIncrement
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-4, y0.shape, jr.key(1), levy)
    of_y = lambda t, y, p: diag(0.1 * (jnp.ones_like(y) if additive else jnp.cos(y)))
    noise = diffrax.ControlTerm(of_y, path)
    return diffrax.MultiTerm(term, noise)


def diag(x):
    import lineax as lx

    return lx.DiagonalLinearOperator(x)


def loss_of(
    problem,
    solver,
    adjoint,
    num_steps,
    *,
    vmap=None,
    pid=False,
    sde=False,
    additive=False,
    spread=False,
    t1=1.0,
    rtol=1e-6,
    dt0=0.01,
):
    """A function of the parameters and `y0`, and these. With `pid` the default for
    `max_steps`; and over a batch end times that differ by a factor of 4, or starts that
    do not agree on which steps are rejected."""
    vector_field, y0, params = problem
    dtype = y0.dtype
    terms = terms_of(vector_field, y0, sde, additive)
    controller = diffrax.ConstantStepSize()
    if pid:
        controller = diffrax.PIDController(rtol=rtol, atol=rtol)
    if vmap is not None:
        y0 = jnp.broadcast_to(y0, (vmap, *y0.shape))
    if spread:
        y0 = y0 + jnp.linspace(0, 0.5, len(y0), dtype=dtype)[:, None]

    def loss(params, y0):
        def solve(y0, t1):
            sol = diffrax.diffeqsolve(
                terms,
                solver,
                0.0,
                t1,
                dt0 if pid else 1 / num_steps,
                y0,
                params,
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=4096 if pid else num_steps,
            )
            return sum(jnp.sum(y**2) for y in jax.tree.leaves(sol.ys))

        end = jnp.asarray(t1, dtype)
        if vmap is None:
            return solve(y0, end)
        if pid and not spread:
            return jnp.sum(jax.vmap(solve)(y0, jnp.linspace(end / 4, end, vmap)))
        return jnp.sum(jax.vmap(solve, (0, None))(y0, end))

    return loss, (params, y0)


def by_hand(problem, base, num_steps, undone, vmap=None, sde=False):
    """Fixed steps. If `undone` then `UReversible(base)` with nothing damped, and its
    backward pass, with the difference of the two copies as a constant; or
    `ReversibleHeun`."""
    vector_field, y0, params = problem
    terms = terms_of(vector_field, y0, sde)
    if isinstance(base, ReversibleHeun):
        solve = reversible_heun_by_hand(terms, num_steps)
    elif undone:
        solve = u_reversible_by_hand(terms, base.tableau, num_steps)
    else:
        solve = recomputed_by_hand(terms, base.tableau, num_steps)
    if vmap is not None:
        y0 = jnp.broadcast_to(y0, (vmap, *y0.shape))

    def loss(params, y0):
        one = lambda y0: jnp.sum(solve(y0, params)[0] ** 2)
        return one(y0) if vmap is None else jnp.sum(jax.vmap(one)(y0))

    return loss, (params, y0)


def make_increment(terms, tableau, h):
    # Not the stage that only an error estimate needs.
    stages = tableau.num_stages - (1 if tableau.fsal else 0)

    def increment(t, y, p, control, sign):
        ks = []
        for i in range(stages):
            c = tableau.c[i - 1].item() if i > 0 else 0.0
            row = tableau.a_lower[i - 1] if i > 0 else []
            yi = y
            for a, k in zip(row, ks):
                if a != 0:
                    yi = yi + sign * a.item() * k
            ks.append(terms.vf_prod(t + sign * c * h, yi, p, control))
        return sum(sign * b.item() * k for b, k in zip(tableau.b_sol, ks) if b != 0)

    return increment


def recomputed_by_hand(terms, tableau, num_steps, length=32):
    """By JAX's own derivative of two nested loops: of which the outer one stores the
    state at every `length`th step, and the inner one at every step."""
    h = 1 / num_steps
    increment = make_increment(terms, tableau, h)

    def solve(y0, p):
        def step(y, number):
            # (Those beyond the last, in the last segment, have no effect.)
            i = jnp.minimum(number, num_steps - 1)
            t0 = jnp.asarray(i * h, y.dtype)
            control = terms.contr(t0, jnp.asarray((i + 1) * h, y.dtype))
            y1 = y + increment(t0, y, p, control, 1)
            return jnp.where(number < num_steps, y1, y), None

        @jax.checkpoint
        def segment(y, j):
            numbers = j * length + jnp.arange(length)
            return jax.lax.scan(jax.checkpoint(step), y, numbers)

        y, _ = jax.lax.scan(segment, y0, jnp.arange(-(-num_steps // length)))
        return y, None

    return solve


def u_reversible_by_hand(terms, tableau, num_steps):
    h = 1 / num_steps
    increment = make_increment(terms, tableau, h)

    def times(i, y):
        return jnp.asarray(i * h, y.dtype), jnp.asarray((i + 1) * h, y.dtype)

    @jax.custom_vjp
    def solve(y0, p):
        def body(carry):
            i, y, d = carry
            t0, t1 = times(i, y)
            control = terms.contr(t0, t1)
            psi = increment(t0, y - d, p, control, 1)
            y, d = y + psi, d + psi
            return i + 1, y, d + increment(t1, y, p, control, -1)

        carry = (0, y0, jnp.zeros_like(y0))
        return jax.lax.while_loop(lambda c: c[0] < num_steps, body, carry)[1:]

    def fwd(y0, p):
        out = solve(y0, p)
        return out, (out, p)

    def bwd(residuals, grads):
        (y, d), p = residuals
        grad_y, _ = grads

        def body(carry):
            i, y, d, gy, gp = carry
            t0, t1 = times(i - 1, y)
            control = terms.contr(t0, t1)
            d = d - increment(t1, y, p, control, -1)
            shift = lambda z, p: increment(t0, z, p, control, 1)
            psi, pull = jax.vjp(shift, y - d, p)
            new_gy, new_gp = pull(gy)
            gy, gp = gy + new_gy, jax.tree.map(jnp.add, gp, new_gp)
            return i - 1, y - psi, d - psi, gy, gp

        carry = (num_steps, y, d, grad_y, jax.tree.map(jnp.zeros_like, p))
        return jax.lax.while_loop(lambda c: c[0] > 0, body, carry)[-2:]

    solve.defvjp(fwd, bwd)
    return solve


def reversible_heun_by_hand(terms, num_steps):
    """Of `(y, z)`, from half-step to half-step on the way back: then one evaluation of
    the vector field, with its pullback, makes up a step."""
    h = 1 / num_steps

    @jax.custom_vjp
    def solve(y0, p):
        def body(carry):
            i, t, y, z, k = carry
            y = y + 0.5 * k
            z = 2 * y - z
            k = terms.vf_prod(t + h, z, p, h)
            return i + 1, t + h, y + 0.5 * k, z, k

        carry = (0, 0.0, y0, y0, terms.vf_prod(0.0, y0, p, h))
        return jax.lax.while_loop(lambda c: c[0] < num_steps, body, carry)[2:4]

    def fwd(y0, p):
        out = solve(y0, p)
        return out, (out, p)

    def bwd(residuals, grads):
        (y, z), p = residuals
        grad_y, _ = grads

        def pull(t, z, gy, gz, gp, weight):
            k, pull = jax.vjp(lambda z, p: terms.vf_prod(t, z, p, h), z, p)
            new_gz, new_gp = pull(weight * gy)
            return weight * k, gz + new_gz, jax.tree.map(jnp.add, gp, new_gp)

        def body(carry):
            i, t, y, z, gy, gz, gp = carry
            weight = jnp.where(i == num_steps, 0.5, 1.0)
            k, gz, gp = pull(t, z, gy, gz, gp, weight)
            y = y - k
            return i - 1, t - h, y, 2 * y - z, gy + 2 * gz, -gz, gp

        gp = jax.tree.map(jnp.zeros_like, p)
        carry = (num_steps, 1.0, y, z, grad_y, jnp.zeros_like(grad_y), gp)
        carry = jax.lax.while_loop(lambda c: c[0] > 0, body, carry)
        _, t, _, z, gy, gz, gp = carry
        _, gz, gp = pull(t, z, gy, gz, gp, 0.5)
        return gy + gz, gp

    solve.defvjp(fwd, bwd)
    return solve


def compile_gradient(loss, arguments, differentiate=True):
    """A function that runs it, the compiled gradient, and the time that tracing and
    compiling took on all cores together."""
    function = jax.jit(jax.grad(loss, argnums=(0, 1)) if differentiate else loss)
    start = time.process_time()
    compiled = function.lower(*arguments).compile()
    seconds = time.process_time() - start
    return lambda: jax.block_until_ready(compiled(*arguments)), compiled, seconds


def temporary_bytes(compiled):
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def medians(runs, repeats):
    """Median times. The runs take turns, so that all meet the same disturbances; and
    more of them if they are short."""
    for run in runs:
        run()
    start = time.perf_counter()
    for run in runs:
        run()
    in_half_a_second = int(0.5 / (time.perf_counter() - start))
    repeats = max(repeats, min(in_half_a_second, 30 * repeats))
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
    """Problem, plain solver, number of steps, options."""
    tsit5, heun, reversible_heun = diffrax.Tsit5(), diffrax.Heun(), ReversibleHeun()
    single, few = jnp.float32, n // 5
    out = {}
    for base in (tsit5, diffrax.Dopri5(), heun):
        name = type(base).__name__
        out[f"MLP, {name}"] = mlp(), base, n, {}
        out[f"MLP, {name}, vmap {batch}"] = mlp(), base, few, dict(vmap=batch)
        out[f"MLP, {name}, {batch} in y"] = mlp(batch), base, few, {}
    network = mlp(dtype=single)
    out["MLP, Tsit5, float32"] = network, tsit5, n, {}
    out[f"MLP, Tsit5, vmap {batch}, float32"] = network, tsit5, few, dict(vmap=batch)
    out[f"MLP, Tsit5, {batch} in y, float32"] = mlp(batch, single), tsit5, few, {}
    wide = mlp(4 * batch, single, width=256)
    out[f"MLP of width 256, Tsit5, {4 * batch} in y, float32"] = wide, tsit5, few, {}
    wide = mlp(width=256)
    out[f"MLP of width 256, Tsit5, vmap {batch}"] = wide, tsit5, few, dict(vmap=batch)
    pid = dict(vmap=batch, pid=True, t1=20.0)
    out[f"MLP, Tsit5, PID, vmap {batch}"] = mlp(), tsit5, n, pid
    out["MLP, SDE, Heun"] = mlp(), heun, n, dict(sde=True)
    out["Lotka--Volterra, Tsit5"] = lotka_volterra(), tsit5, n, {}
    out[f"Lotka--Volterra, Tsit5, PID, vmap {batch}"] = (
        *(lotka_volterra(), tsit5, n),
        pid,
    )
    out["stencil of 100 x 100, Tsit5"] = stencil(), tsit5, few, {}
    out["sine of 10^4 numbers, Tsit5"] = sine(), tsit5, few, {}
    for name in ("Van der Pol 20", "heat", "Burgers", "pharmacokinetics"):
        problem, options = everyday(name)
        out[f"{name}, Tsit5, PID"] = problem, tsit5, n, options
    problem, options = everyday("Van der Pol 20")
    options = dict(options, vmap=batch // 2)
    out["Van der Pol 20, Tsit5, PID, vmap 64"] = problem, tsit5, n, options
    options = dict(options, spread=True)
    out["Van der Pol 20, Tsit5, PID, 64 starts"] = problem, tsit5, n, options
    root_finder = diffrax.VeryChord(rtol=1e-6, atol=1e-8)
    kvaerno5 = diffrax.Kvaerno5(root_finder=root_finder)
    for name in ("Van der Pol 20", "Robertson", "heat"):
        problem, options = everyday(name)
        out[f"{name}, Kvaerno5"] = problem, kvaerno5, n, options
    additive = dict(sde=True, additive=True)
    out["MLP, SDE, EulerHeun"] = mlp(), diffrax.EulerHeun(), n, dict(sde=True)
    out["MLP, SDE, ShARK"] = mlp(), diffrax.ShARK(), few, additive
    out["MLP, ReversibleHeun"] = mlp(), reversible_heun, n, {}
    out["Lotka--Volterra, ReversibleHeun"] = lotka_volterra(), reversible_heun, n, {}
    for name, problem in (("MLP", mlp()), ("Lotka--Volterra", lotka_volterra())):
        out[f"solve, {name}, Tsit5"] = problem, tsit5, n, dict(solve=True)
    return out


COLUMNS = ("default", "as it is", "by hand", "undone", "by hand, undone")


def measure(problem, base, num_steps, options, repeats):
    """Times of those columns that there are in seconds, and bytes."""
    options = dict(options)
    differentiate = not options.pop("solve", False)
    is_explicit = isinstance(base, diffrax.AbstractERK)
    is_reversible = isinstance(base, ReversibleHeun)
    losses = {"default": loss_of(problem, base, DEFAULT, num_steps, **options)}
    if not is_reversible:
        losses["as it is"] = loss_of(problem, base, OURS, num_steps, **options)
    if is_explicit or is_reversible:
        solver = base if is_reversible else UReversible(base)
        losses["undone"] = loss_of(problem, solver, OURS, num_steps, **options)
        if options.keys() <= {"vmap", "sde"}:
            arguments = (problem, base, num_steps)
            if not is_reversible:
                losses["by hand"] = by_hand(*arguments, False, **options)
            losses["by hand, undone"] = by_hand(*arguments, True, **options)
    both = {k: compile_gradient(*x, differentiate)[:2] for k, x in losses.items()}
    times = medians([run for run, _ in both.values()], repeats)
    sizes = [temporary_bytes(compiled) for _, compiled in both.values()]
    return dict(zip(both, times)), dict(zip(both, sizes))


# Everyday problems, for the picture.
PICTURED = {
    "Lotka--Volterra, Tsit5": "two numbers, 1000 steps",
    "MLP, Tsit5": "a network, 1000 steps",
    "MLP, Tsit5, vmap 128": "a network, a batch of 128",
    "Van der Pol 20, Tsit5, PID": "Van der Pol, adaptive steps",
    "Robertson, Kvaerno5": "stiff kinetics, implicit",
    "MLP, SDE, Heun": "a network with noise",
}


def save(figure, filename, lines):
    """With the lines of the table in it that it was drawn from."""
    metadata = {"Description": "\n".join(lines)}
    figure.savefig(filename, dpi=150, metadata=metadata)


def number(x):
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def versions():
    return f"JAX {jax.__version__}, diffrax {diffrax.__version__}"


def plot(table, filename, lines):
    from matplotlib.figure import Figure

    if PICTURED.keys() <= table.keys():
        table = {PICTURED[k]: table[k] for k in PICTURED}
        lines = [x for x in lines if x.split(" | ")[0].removeprefix("| ") in PICTURED]
    figure = Figure(figsize=(9, 0.35 * len(table) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(table))
    for i, (ax, label) in enumerate(zip(axes, ("time", "memory"))):
        for k, column in enumerate(("as it is", "undone")):
            color = ("tab:green", "tab:blue")[k]
            name = ("the solver as it is", "`UReversible(solver)`")[k]
            ratios = [
                row[i].get(column, np.nan) / row[i]["default"] for row in table.values()
            ]
            hand = "by hand" if k == 0 else "by hand, undone"
            by_hand = [
                row[i].get(hand, np.nan) / row[i]["default"] for row in table.values()
            ]
            height = places + 0.35 * k
            ax.barh(height, ratios, 0.3, color=color, label=name)
            ax.plot(by_hand, height, "|", color="k", label="by hand" if k else None)
        ax.set_xlabel(label)
        ax.axvline(1, color="tab:gray", lw=1, label="the default adjoint")
    axes[0].set_yticks(places + 0.17, list(table))
    axes[0].invert_yaxis()
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize="small")
    title = "A gradient with `ReversibleAdjoint()`, relative to the default adjoint"
    figure.suptitle(f"{title}\ntwo cores of a CPU, {versions()}", fontsize=9)
    save(figure, filename, lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Times the gradient of a solve.")
    parser.add_argument("--quick", action="store_true", help="one row, of a small size")
    parser.add_argument("--rows", nargs="+", help="those that have one of these words")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    repeats, batch, n = (1, 4, 20) if args.quick else (7, 128, 1000)
    wanted = rows(batch, n)
    if args.quick:
        wanted = {k: v for k, v in wanted.items() if "Volterra, Rev" in k}
    if args.rows is not None:
        wanted = {k: v for k, v in wanted.items() if any(w in k for w in args.rows)}

    print("Time, and memory in brackets: of the default in ms and kB, else as ratios.")
    print(f"{versions()}.\n")
    print(f"| gradient of | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    table, lines = {}, []
    for name, (problem, base, num_steps, options) in wanted.items():
        times, sizes = measure(problem, base, num_steps, options, repeats)
        table[name] = times, sizes
        own, num_bytes = times["default"], sizes["default"]
        cells = [name, f"{number(1e3 * own)} ({number(num_bytes / 1e3)})"]
        for x in COLUMNS[1:]:
            has = x in times
            ratios = f"{times[x] / own:.2f} ({sizes[x] / num_bytes:.2g})" if has else ""
            cells.append(ratios)
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if args.output is not None:
        plot(table, args.output, lines)
    return table


if __name__ == "__main__":
    main()
