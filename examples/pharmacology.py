"""How fast an antibody binds to its target, and how fast both are cleared.

The model is target-mediated drug disposition. An antibody is infused every other week,
and spreads to the tissue and back. It binds to a target, which the body makes and
clears; the complex is cleared too. Binding is much faster than all else while there is
much of the drug, so the equations are somewhat stiff. And all is in one array: hundreds
of the drug and hundredths of the target, so the tolerance must suit the small. The
infusions start and end at `jump_ts`, so that no step goes across.

The data are simulated: free drug, free target and complex, with log-normal noise of
10%. `optimistix.least_squares` fits the logarithms of the parameters by the method of
Levenberg and Marquardt, in forward mode. And the gradient is taken in reverse mode.
Both are derivatives of one solve by `diffrax.Tsit5()` with `ReversibleAdjoint()`, and
should agree to rounding. The time and memory of the second are printed beside those of
diffrax's default adjoint.

Run as `python pharmacology.py [--quick] [--output PATH]`.
"""

import argparse
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float
from pinene import compare

from diffrax_reversible import ReversibleAdjoint


jax.config.update("jax_enable_x64", True)

# What is simulated. Rates are per day, and concentrations in nM.
PARAMETERS = {
    "clearing of the drug": 0.06,
    "drug to the tissue": 0.3,
    "tissue to the drug": 0.2,
    "binding, per nM": 0.4,
    "unbinding": 0.8,
    "clearing of the target": 0.7,
    "clearing of the complex": 0.25,
    "target at the start": 4.0,
}
TRUE = jnp.log(jnp.array(list(PARAMETERS.values())))
NOISE = 0.1
STATES = ("free drug", "drug in the tissue", "free target", "complex")
OBSERVED = np.array([0, 2, 3])
STARTS = np.array([1.0, 15.0, 29.0, 43.0])
DOSES = np.array([20.0, 20.0, 150.0, 150.0])
INFUSION = 1 / 24


def vector_field(t, y, params):
    clear, to_tissue, back, bind, unbind, clear_target, clear_complex, start = params
    drug, tissue, target, both = y
    infused = jnp.sum(jnp.where((t >= STARTS) & (t < STARTS + INFUSION), DOSES, 0))
    to_tissue = to_tissue * drug - back * tissue
    bound = bind * drug * target - unbind * both
    return jnp.stack(
        [
            infused / INFUSION - clear * drug - to_tissue - bound,
            to_tissue,
            clear_target * (start - target) - bound,
            bound - clear_complex * both,
        ]
    )


def solve(
    log_params: Float[Array, " 8"],
    days: Float[Array, " days"],
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
) -> tuple[Float[Array, "days 4"], dict[str, Any]]:
    params = jnp.exp(log_params)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Tsit5(),
        0.0,
        days[-1],
        dt0=None,
        y0=jnp.zeros(4).at[2].set(params[-1]),
        args=params,
        saveat=diffrax.SaveAt(ts=days),
        stepsize_controller=diffrax.ClipStepSizeController(
            diffrax.PIDController(rtol=1e-5, atol=1e-7),
            jump_ts=jnp.concatenate([STARTS, STARTS + INFUSION]),
        ),
        adjoint=adjoint,
        max_steps=16384,
    )
    assert sol.ys is not None
    return sol.ys, sol.stats


def plot(days, ys, data, filename):
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for k, state in enumerate(OBSERVED):
        [line] = ax.plot(days, ys[:, state], lw=1, label=STATES[state])
        ax.plot(days, jnp.exp(data[:, k]), "o", ms=3, color=line.get_color())
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.01)
    ax.set_xlabel("day")
    ax.set_ylabel("nM")
    ax.set_title("simulated data and the fit", size=9)
    ax.legend()
    figure.savefig(filename)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", default="pharmacology.png")
    args = parser.parse_args(argv)

    # Also some hours after the start of each infusion.
    hours = (STARTS[:, None] + np.array([0.1, 0.2, 0.3, 0.5])).ravel()
    regular = np.arange(2.0, 90.0, 1.5)
    days = np.sort(np.concatenate([hours, regular]))
    days = jnp.asarray(days[days < 10] if args.quick else days)
    solve_jitted = jax.jit(solve)
    exact, stats = solve_jitted(TRUE, days)
    noise = NOISE * jr.normal(jr.key(0), (len(days), len(OBSERVED)))
    data = jnp.log(exact[:, OBSERVED]) + noise
    guess = TRUE + 0.5 * (-1) ** jnp.arange(TRUE.size)
    print(f"{stats['num_steps']} steps")

    def residuals(x, adjoint=ReversibleAdjoint()):
        ys, _ = solve(x, days, adjoint)
        return jnp.ravel(jnp.log(ys[:, OBSERVED]) - data)

    @jax.jit
    def linearise(x):
        return residuals(x), jax.jacfwd(residuals)(x)

    r, jacobian = linearise(guess)
    forward = jacobian.T @ r
    norm = jnp.linalg.norm
    results = {}
    loss = lambda x, adjoint: jnp.sum(residuals(x, adjoint) ** 2) / 2
    for name, (reverse, *cost) in compare(loss, guess, repeats=20).items():
        results[name] = float(norm(reverse - forward) / norm(forward))
        milliseconds, kilobytes = cost
        print(
            f"gradient, {name}: {milliseconds:.2f} ms, {kilobytes:.1f} kB;"
            f" off from forward mode by {results[name]:.0e}"
        )

    if args.quick:
        print("This was a smoke test: derivatives only, and no fit.")
        fitted = TRUE
    else:
        solver = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
        sol = optx.least_squares(lambda x, _: residuals(x), solver, guess)
        fitted = sol.value
        r, jacobian = linearise(fitted)
        hessian = jacobian.T @ jacobian
        variance = jnp.sum(r**2) / (r.size - TRUE.size)
        errors = jnp.sqrt(variance * jnp.diag(jnp.linalg.inv(hessian)))
        off = fitted - TRUE
        print(f"{sol.stats['num_steps']} steps; residuals {100 * variance**0.5:.1f}%")
        print(f"{'':24}    true   guess  fitted   std. error   off by std. errors")
        for name, x, y, z, e in zip(PARAMETERS, TRUE, guess, fitted, errors):
            values = "".join(f"{float(jnp.exp(value)):8.3f}" for value in (x, y, z))
            print(f"{name:24}{values}{100 * e:12.1f}%{(z - x) / e:+21.1f}")
        chi_squared = off @ hessian @ off / variance
        print(f"All together: chi squared of {chi_squared:.1f} for {off.size}.")
    plot(days, solve_jitted(fitted, days)[0], data, args.output)
    return results


if __name__ == "__main__":
    main()
