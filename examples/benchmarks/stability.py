"""How far reversible Runge--Kutta solvers can be trusted.

    python examples/benchmarks/stability.py [--quick] [--bases Tsit5 ...] [--steps ...]
        [--precisions ...] [--problems ...] [--controlled-only] [--output table.csv]

For every problem, wrapped solver, kind of steps and precision, and for the published
coupling of `UReversible` (0.999) and the controlled one (the default), prints

    error       at the end, against a fine reference; for the couplings relative to the
                error of the wrapped solver (with fixed steps in single precision: to
                the median of its errors with several step sizes)
    steps       accepted
    cp          checkpoints that the solver asked for
    drift       largest relative rebuild error
    gradient    relative difference to `RecursiveCheckpointAdjoint` on the same solver,
                or `error` if the gradient is refused; (in brackets) by how much it
                changes if `y0` does so by a rounding error
    vs. base    error of the gradient against the reference, relative to that of the
                wrapped solver's

and at the end how many rows needed no more than so many checkpoints, and which rows
miss the aims. All of it takes some hours, for compiling; one solver ten minutes.
"""

import argparse
import csv
import math
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffrax_reversible import diagnose, ReversibleAdjoint, UReversible


jax.config.update("jax_enable_x64", True)


def kepler(t, y, p):
    q, v = y[:2], y[2:]
    return jnp.concatenate([v, -p[0] * q / jnp.sum(q**2) ** 1.5])


def henon_heiles(t, y, p):
    q1, q2, p1, p2 = y
    return jnp.stack([p1, p2, -q1 - 2 * p[0] * q1 * q2, -q2 - p[0] * (q1**2 - q2**2)])


def lorenz(t, y, p):
    a, b, c = y
    return jnp.stack([p[0] * (b - a), a * (p[1] - c) - b, a * b - p[2] * c])


def van_der_pol(t, y, p):
    return jnp.stack([y[1], p[0] * (1 - y[0] ** 2) * y[1] - y[0]])


def heat(t, y, p):
    padded = jnp.pad(y, 1)
    return p[0] * (len(y) + 1) ** 2 * (padded[2:] - 2 * y + padded[:-2])


def network(t, y, p):
    w1, w2 = p[:512].reshape(64, 8), p[512:].reshape(8, 64)
    return w2 @ jnp.tanh(w1 @ y)


def _weights(scale1, scale2, seed=0):
    rng = np.random.default_rng(seed)
    w1 = rng.normal(size=(64, 8)) * scale1 / math.sqrt(8)
    w2 = rng.normal(size=(8, 64)) * scale2 / 8
    return np.concatenate([w1.ravel(), w2.ravel()])


def _trained_weights():
    """A network that has learnt a damped rotation, by a few steps of gradient descent:
    unlike a random one it decays."""
    w = jnp.asarray(_weights(1.0, 0.5, 1))
    a = np.kron(np.eye(4), [[-1.0, 3.0], [-3.0, -1.0]])
    ys = jnp.asarray(np.random.default_rng(2).normal(size=(256, 8)))

    def loss(w):
        out = jax.vmap(lambda y: network(0.0, y, w))(ys)
        return jnp.mean((out - ys @ a.T) ** 2)

    def descend(w, _):
        return w - 0.05 * jax.grad(loss)(w), None

    w, _ = jax.jit(lambda w: jax.lax.scan(descend, w, None, length=2000))(w)
    return w


X = np.pi * np.arange(1, 65) / 65
Y8 = np.random.default_rng(3).normal(size=8)
# vector field, y0, parameters, final time, fixed step
PROBLEMS = {
    "oscillator T=100": (
        lambda t, y, p: jnp.stack([y[1], -p[0] * y[0]]),
        [1.0, 0.0],
        [1.0],
        100.0,
        0.05,
    ),
    "Kepler e=0.3": (kepler, [0.7, 0, 0, math.sqrt(1.3 / 0.7)], [1.0], 60.0, 0.02),
    "Kepler e=0.9": (kepler, [0.1, 0, 0, math.sqrt(1.9 / 0.1)], [1.0], 20.0, 0.0025),
    "Henon-Heiles": (henon_heiles, [0.0, 0.1, 0.4, 0.2], [1.0], 60.0, 0.05),
    "Lorenz T=5": (lorenz, [1.0, 1.0, 1.0], [10.0, 28.0, 8 / 3], 5.0, 0.01),
    "Lorenz T=15": (lorenz, [1.0, 1.0, 1.0], [10.0, 28.0, 8 / 3], 15.0, 0.005),
    "Van der Pol 5": (van_der_pol, [2.0, 0.0], [5.0], 10.0, 0.01),
    "Van der Pol 20": (van_der_pol, [2.0, 0.0], [20.0], 20.0, 0.005),
    "y' = -5y": (lambda t, y, p: -p[0] * y, [1.0], [5.0], 10.0, 0.01),
    "y' = -50y": (lambda t, y, p: -p[0] * y, [1.0], [50.0], 4.0, 0.01),
    "slow/fast": (
        lambda t, y, p: jnp.stack([-p[0] * y[0] + y[1], -p[1] * y[1]]),
        [1.0, 1.0],
        [0.1, 20.0],
        10.0,
        0.01,
    ),
    "Lotka-Volterra": (
        lambda t, y, p: jnp.stack(
            [y[0] * (p[0] - p[1] * y[1]), y[1] * (p[2] * y[0] - p[3])]
        ),
        [30.0, 4.0],
        [0.55, 0.028, 0.026, 0.84],
        20.0,
        0.05,
    ),
    "Duffing": (
        lambda t, y, p: jnp.stack(
            [y[1], y[0] - y[0] ** 3 - p[0] * y[1] + p[1] * jnp.cos(t)]
        ),
        [0.1, 0.0],
        [0.25, 0.3],
        40.0,
        0.05,
    ),
    "FitzHugh-Nagumo": (
        lambda t, y, p: jnp.stack(
            [y[0] - y[0] ** 3 / 3 - y[1] + p[0], p[1] * (y[0] + p[2] - p[3] * y[1])]
        ),
        [-1.0, 1.0],
        [0.5, 0.08, 0.7, 0.8],
        80.0,
        0.1,
    ),
    "heat, 64 points": (heat, np.sin(X) + 0.5 * np.sin(5 * X), [0.02], 1.0, 0.005),
    "random network": (network, Y8, _weights(1.5, 1.5), 10.0, 0.05),
    "trained network": (network, Y8, _trained_weights, 5.0, 0.05),
    "Brownian motion": (None, [1.0], [-0.5, 0.5], 2.0, 0.01),
}
BASES = ("Heun", "Bosh3", "Tsit5", "Dopri5", "Dopri8")
COUPLINGS = {"published": 0.999, "controlled": "auto"}


def path_of(dtype):
    shape = jax.ShapeDtypeStruct((), dtype)
    return diffrax.VirtualBrownianTree(0.0, 2.0, 1e-3, shape, jax.random.key(0))


def terms_of(name, dtype):
    vector_field, *_ = PROBLEMS[name]
    if vector_field is not None:
        return diffrax.ODETerm(lambda t, y, p: vector_field(t, y, p).astype(y.dtype))
    return diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, p: p[0] * y),
        diffrax.ControlTerm(lambda t, y, p: p[1] * y, path_of(dtype)),
    )


def data_of(name, dtype):
    _, y0, p, t1, step = PROBLEMS[name]
    p = p() if callable(p) else p
    return jnp.asarray(y0, dtype), jnp.asarray(p, dtype), t1, step


class Refused(Exception):
    pass


def gradient(name, solver, adjoint, kind, dtype, rtol, max_steps, noise=False):
    """`(y1, stats, result), (gradient of y0, of p), others`, where `others` is, if
    `noise`, the gradient at a `y0` that differs by rounding. May raise `Refused`."""
    y0, p, t1, step = data_of(name, dtype)
    if kind == "fixed":
        controller, dt0 = diffrax.ConstantStepSize(), step
    else:
        controller, dt0 = diffrax.PIDController(rtol=rtol, atol=rtol), 0.01

    @eqx.filter_jit
    def run(params):
        def loss(params):
            y0, p = params
            sol = diffrax.diffeqsolve(
                terms_of(name, dtype),
                solver,
                # If these were double precision then diffrax would promote `y0` to it.
                jnp.asarray(0, dtype),
                jnp.asarray(t1, dtype),
                jnp.asarray(dt0, dtype),
                y0,
                p,
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=max_steps,
                throw=False,
            )
            assert sol.ys is not None
            [y1] = sol.ys
            weights = jnp.cos(jnp.arange(y1.size, dtype=dtype))
            return jnp.sum(weights * y1), (y1, sol.stats, sol.result)

        return jax.value_and_grad(loss, has_aux=True)(params)

    try:
        (_, aux), grads = run((y0, p))
        others = None
        if noise:
            signs = 1 - 2 * (jnp.arange(y0.size, dtype=dtype) % 2)
            _, others = run((y0 * (1 + jnp.finfo(dtype).eps * signs), p))
        return jax.block_until_ready((aux, grads, others))
    except Exception as error:
        if "backward pass" not in str(error):
            raise
        raise Refused from error


def relative(x, y):
    # Each of `y0` and `p` relative to its largest element.
    out = 0.0
    for a, b in zip(x, y):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.max(np.abs(b))
        difference = np.max(np.abs(a - b))
        out = max(out, difference / scale if scale > 0 else difference)
    return out if np.isfinite(out) else math.inf


def reference(name):
    if PROBLEMS[name][0] is None:
        # Of geometric Brownian motion, in closed form.
        def exact(params):
            y0, p = params
            path = path_of(jnp.float64)
            return jnp.sum(y0 * jnp.exp(p[0] * 2.0 + p[1] * path.evaluate(0.0, 2.0)))

        y0, p, *_ = data_of(name, jnp.float64)
        value, grads = jax.value_and_grad(exact)((y0, p))
        return jnp.array([value]), grads
    (y1, _, result), grads, _ = gradient(
        name,
        diffrax.Dopri8(),
        diffrax.RecursiveCheckpointAdjoint(),
        "PID",
        jnp.float64,
        1e-13,
        200_000,
    )
    assert result == diffrax.RESULTS.successful
    return y1, grads


def typical_error(name, base, dtype, max_steps, error):
    """The median over some step sizes. Where rounding dominates, a single error may be
    small by chance."""
    y0, p, t1, step = data_of(name, dtype)

    @jax.jit
    def run(dt0):
        sol = diffrax.diffeqsolve(
            terms_of(name, dtype),
            base,
            jnp.asarray(0, dtype),
            jnp.asarray(t1, dtype),
            dt0,
            y0,
            p,
            max_steps=round(1.1 * max_steps),
            adjoint=diffrax.ForwardMode(),
        )
        assert sol.ys is not None
        return sol.ys[0]

    factors = (1, 0.99, 0.98, 0.97, 0.96)
    return np.median([error(run(jnp.asarray(step * f, dtype))) for f in factors])


def study(name, base_name, kind, precision, ref, couplings):
    dtype = jnp.dtype(precision)
    base = getattr(diffrax, base_name)()
    sde = PROBLEMS[name][0] is None
    # A rough path, or a method of order two, would take very many steps.
    rtol = 1e-3 if sde else 1e-4 if precision == "float32" else 1e-6
    _, _, t1, step = data_of(name, dtype)
    most = 30_000 if base_name == "Heun" else 8000
    max_steps = round(t1 / step) + 1 if kind == "fixed" else most

    def solve(solver, adjoint, noise=False):
        return gradient(name, solver, adjoint, kind, dtype, rtol, max_steps, noise)

    backprop = diffrax.RecursiveCheckpointAdjoint()
    (y1, stats, base_result), grads, _ = solve(base, backprop)
    ref_y1, ref_grads = ref
    error = lambda y: float(np.max(np.abs(np.asarray(y, np.float64) - ref_y1)))
    base_error, base_grad_error = error(y1), relative(grads, ref_grads)
    if kind == "fixed" and precision == "float32" and not sde:
        base_error = typical_error(name, base, dtype, max_steps, error)
    base_steps = int(stats["num_accepted_steps"])
    row = dict(
        problem=name,
        base=base_name,
        steps=kind,
        precision=precision,
        base_error=base_error,
        base_steps=base_steps,
        base_grad_error=base_grad_error,
        base_failed=base_result != diffrax.RESULTS.successful,
    )
    # What the aims allow on top: 1e-12, or the like in single precision.
    floor = 1e-12 if precision == "float64" else 1e-5
    for label in couplings:
        parameter = COUPLINGS[label]
        solver = UReversible(base, parameter)
        cell: dict[str, float | str]
        cell = dict(drift=math.nan, noise=math.nan, gradient=math.nan, vs_base=math.nan)
        if label == "published":
            # However wrong its gradient is.
            out = solve(solver, ReversibleAdjoint(drift_tolerance=None))
            (y1, stats, result), grads, _ = out
        else:
            (y1, stats, result), same, others = solve(solver, backprop, noise=True)
            cell["noise"] = relative(others, same)
            try:
                _, grads, _ = solve(solver, ReversibleAdjoint(checkpoints=512))
                cell["gradient"] = relative(grads, same)
            except Refused:
                grads, cell["gradient"] = None, "error"
        cell["steps"] = int(stats["num_accepted_steps"])
        cell["error"] = error(y1) / (base_error + floor / 3)
        if result != diffrax.RESULTS.successful and not row["base_failed"]:
            cell["error"] = math.inf
        cell["cp"] = int(stats.get("num_checkpoints", -1))
        if grads is not None:
            ours = relative(grads, ref_grads)
            cell["vs_base"] = ours / (base_grad_error + 100 * floor)
        if label == "controlled":
            y0, p, t1, step = data_of(name, dtype)
            pid = diffrax.PIDController(rtol=rtol, atol=rtol)
            found = diagnose(
                terms_of(name, dtype),
                solver,
                jnp.asarray(0, dtype),
                jnp.asarray(t1, dtype),
                jnp.asarray(step if kind == "fixed" else 0.01, dtype),
                y0,
                p,
                stepsize_controller=diffrax.ConstantStepSize()
                if kind == "fixed"
                else pid,
                max_steps=max_steps,
            )
            cell["cp"] = found.num_checkpoints
            cell["drift"] = float(np.max(found.drift))
        row |= {f"{label}_{k}": v for k, v in cell.items()}
    return row


def show(row):
    line = f"{row['base']:6} {row['problem']:16} {row['steps']:5} {row['precision']}"
    line += f" | {row['base_error']:.0e} ({row['base_steps']})"
    for label in COUPLINGS:
        if f"{label}_error" not in row:
            continue
        get = lambda k: row[f"{label}_{k}"]
        grad = get("gradient")
        grad = grad if isinstance(grad, str) else f"{grad:.0e}"
        line += f" | {label} {get('error'):.2g}x ({get('steps')}) {get('cp')} cp"
        line += f" drift {get('drift'):.0e} grad {grad} ({get('noise'):.0e})"
        line += f" vs. base {get('vs_base'):.2g}x"
    print(line, flush=True)


def misses(row):
    """Which aims a row of the controlled coupling misses."""
    out = []
    if row["base_failed"]:
        # At `max_steps`; there is nothing to compare with.
        return out
    fixed, double = row["steps"] == "fixed", row["precision"] == "float64"
    if row["controlled_error"] > (10 if fixed and not double else 3):
        out.append("error")
    if not fixed and row["controlled_steps"] > 1.05 * row["base_steps"]:
        out.append("steps")
    if row["controlled_gradient"] == "error":
        out.append("refused")
    else:
        # No better than what a rounding error in `y0` makes of it, say ten of them.
        aim = max(1e-6 if double else 1e-3, 10 * row["controlled_noise"])
        if row["controlled_gradient"] > aim:
            out.append("gradient")
        if row["controlled_vs_base"] > 5:
            out.append("gradient vs. base")
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rows only")
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--steps", nargs="+", default=["fixed", "PID"])
    parser.add_argument("--precisions", nargs="+", default=["float64", "float32"])
    parser.add_argument("--controlled-only", action="store_true")
    parser.add_argument("--output", help="where to write the table as CSV")
    args = parser.parse_args(argv)
    if args.quick:
        args.bases, args.precisions, args.steps = ["Tsit5"], ["float64"], ["PID"]
        args.problems = ["y' = -5y", "Lotka-Volterra"]

    rows = []
    for name in args.problems:
        ref = reference(name)
        for base in args.bases:
            if PROBLEMS[name][0] is None and base != "Heun":
                continue
            couplings = ["controlled"] if args.controlled_only else list(COUPLINGS)
            for precision in args.precisions:
                for kind in args.steps:
                    with warnings.catch_warnings():
                        # diffrax warns that float32 tolerances are small, and the like.
                        warnings.simplefilter("ignore")
                        row = study(name, base, kind, precision, ref, couplings)
                    rows.append(row)
                    show(row)
                    if args.output is not None:
                        with open(args.output, "w", newline="") as file:
                            writer = csv.DictWriter(file, list(row))
                            writer.writeheader()
                            writer.writerows(rows)
        jax.clear_caches()

    counts = np.array([row["controlled_cp"] for row in rows])
    for n in (0, 4, 8, 16, 32, 64):
        share = np.mean((counts >= 0) & (counts <= n))
        print(f"{share:.0%} of {len(rows)} rows need at most {n} checkpoints")
    for row in rows:
        if found := misses(row):
            label = f"{row['base']} {row['problem']} {row['steps']} {row['precision']}"
            print(f"missed: {label}: {', '.join(found)}")
    return rows


if __name__ == "__main__":
    main()
