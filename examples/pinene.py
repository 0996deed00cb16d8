"""Fit the rates of a chemical reaction to measurements, through an implicit solver.

    python examples/pinene.py [--quick] [--output pinene.png]

alpha-pinene isomerises in the heat, to dipentene and allo-ocimene, and that on to
beta-pyronene and a dimer. There are eight measurements of all five over ten hours, by
Fuguitt and Hawkins (1947), as printed by Box, Hunter, MacGregor and Erjavec (1973); the
five rates are one of the oldest problems of parameter estimation [1]. An intermediate
that reacts fast makes such systems stiff, so the solver is an implicit one, `Kvaerno5`,
as it is. Nothing has to be reversible: the adjoint is the one argument that differs
from diffrax's default.

The rates are fitted in forward mode, by the method of Levenberg and Marquardt. Prints
them beside the published ones; and the gradient of the sum of squares in reverse mode,
its time and its memory, beside those of `RecursiveCheckpointAdjoint`.

[1] Dolan, More, Munson: Benchmarking Optimization Software with COPS 3.0. 2004.
"""

import argparse
import time
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import optimistix

from diffrax_reversible import ReversibleAdjoint


jax.config.update("jax_enable_x64", True)

NAMES = ("alpha-pinene", "dipentene", "allo-ocimene", "pyronene", "dimer")
# In minutes, and in percent.
TIMES = jnp.array([1230.0, 3060, 4920, 7800, 10680, 15030, 22620, 36420])
MEASURED = jnp.array(
    [
        [88.35, 76.4, 65.1, 50.4, 37.5, 25.9, 14.0, 4.5],
        [7.3, 15.6, 23.1, 32.9, 42.7, 49.1, 57.4, 63.1],
        [2.3, 4.5, 5.3, 6.0, 6.0, 5.9, 5.1, 3.8],
        [0.4, 0.7, 1.1, 1.5, 1.9, 2.2, 2.6, 2.9],
        [1.75, 2.8, 5.8, 9.3, 12.0, 17.0, 21.0, 25.7],
    ]
).T
PUBLISHED = jnp.array([5.926e-5, 2.963e-5, 2.047e-5, 2.745e-4, 3.998e-5])
START = jnp.array([100.0, 0, 0, 0, 0])


def reaction(t, y, rates):
    a, b, c, d, e = rates
    pinene, _, ocimene, _, dimer = y
    return jnp.stack(
        [
            -(a + b) * pinene,
            a * pinene,
            b * pinene - (c + d) * ocimene + e * dimer,
            c * ocimene,
            d * ocimene - e * dimer,
        ]
    )


def solve(log_rates, adjoint, ts, tol) -> Any:
    return diffrax.diffeqsolve(
        diffrax.ODETerm(reaction),
        diffrax.Kvaerno5(),
        0.0,
        TIMES[-1],
        None,
        START,
        jnp.exp(log_rates),
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        adjoint=adjoint,
    ).ys


def residuals(log_rates, adjoint, tol):
    return solve(log_rates, adjoint, TIMES, tol) - MEASURED


def loss(log_rates, adjoint, tol):
    return jnp.sum(residuals(log_rates, adjoint, tol) ** 2)


def compare(loss, params, repeats):
    """Of `loss(params, adjoint)`: gradient, time in milliseconds, and temporary memory
    in kB, with both adjoints."""
    out = {}
    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), ReversibleAdjoint()):
        gradient = jax.jit(jax.grad(lambda x, a=adjoint: loss(x, a)))
        compiled = gradient.lower(params).compile()
        grad = jax.block_until_ready(compiled(params))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(params))
            times.append(time.perf_counter() - start)
        analysis = compiled.memory_analysis()
        assert analysis is not None
        kilobytes = analysis.temp_size_in_bytes / 1e3
        out[type(adjoint).__name__] = grad, 1e3 * min(times), kilobytes
    return out


def plot(log_rates, tol, filename):
    from matplotlib.figure import Figure

    ts = jnp.linspace(0, TIMES[-1], 100)
    ys = solve(log_rates, ReversibleAdjoint(), ts, tol)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for i, name in enumerate(NAMES):
        (line,) = ax.plot(ts / 60, ys[:, i], label=name)
        ax.plot(TIMES / 60, MEASURED[:, i], "o", color=line.get_color())
    ax.set_xlabel("hours")
    ax.set_ylabel("percent")
    ax.set_title("Isomerisation of alpha-pinene, and the fit")
    ax.legend()
    figure.savefig(filename)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fits the rates of a reaction.")
    parser.add_argument("--quick", action="store_true", help="a loose tolerance, once")
    parser.add_argument("--output", help="where to save a plot")
    args = parser.parse_args(argv)
    tol, repeats = (1e-4, 1) if args.quick else (1e-8, 20)

    start = jnp.log(jnp.full(5, 5e-5))
    fit = optimistix.least_squares(
        lambda x, _: residuals(x, ReversibleAdjoint(), tol),
        optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-6),
        start,
    ).value
    rates = jnp.exp(fit)
    print("rate      fitted     published")
    for k, (rate, published) in enumerate(zip(rates, PUBLISHED)):
        print(f"p{k + 1}     {rate:.3e}   {published:.3e}")
    table = compare(lambda x, adjoint: loss(x, adjoint, tol), start, repeats)
    for name, (grad, milliseconds, kilobytes) in table.items():
        print(f"{name:27s} {milliseconds:7.2f} ms {kilobytes:6.1f} kB  {grad}")
    if args.output is not None:
        plot(fit, tol, args.output)
    return rates, table


if __name__ == "__main__":
    main()
