"""The parameters of a predator--prey model, and how well they are known.

Lotka--Volterra is fitted to the Hudson's Bay pelt counts of hare and lynx by
`optimistix.least_squares` with the method of Levenberg and Marquardt, as it comes. That
differentiates the residuals in forward mode. Then their Hessian is computed, by
`jax.hessian`: forward over reverse mode. Both are derivatives of one `diffeqsolve` by
`diffrax.Tsit5()` with `ReversibleAdjoint()`: with diffrax's default adjoint either
would be an error.

Populations are positive, and the noise in a count is about proportional to it. So the
residuals are those of the logarithms of counts, and what is fitted are the logarithms
of the four rates and of both populations in 1900.

The Laplace approximation takes the posterior to be normal around the optimum. Its
covariance is the inverse of the Hessian, in units of the variance of the noise. The
band in the picture is that of solutions drawn from it.

Run as `python least_squares.py [--quick] [--output PATH]`.
"""

import argparse

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
from hare_lynx import LOG_COUNTS, YEARS
from jaxtyping import Array, Float

from diffrax_reversible import ReversibleAdjoint


jax.config.update("jax_enable_x64", True)

NAMES = (
    "birth of hares",
    "eating of hares",
    "birth of lynx",
    "death of lynx",
    "hares in 1900",
    "lynx in 1900",
)
# The rates per year; and thousands of pelts.
GUESS = jnp.log(jnp.array([0.5, 0.03, 0.03, 0.8, 30.0, 4.0]))


def solve(
    params: Float[Array, " 6"], times: Float[Array, " times"]
) -> Float[Array, "times 2"]:
    """The logarithms of both populations."""

    def vector_field(t, y, rates):
        hares, lynx = jnp.exp(y)
        birth, eaten, eating, death = rates
        return jnp.stack([birth - eaten * lynx, eating * hares - death])

    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Tsit5(),
        YEARS[0],
        YEARS[-1],
        dt0=None,
        y0=params[4:],
        args=jnp.exp(params[:4]),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        adjoint=ReversibleAdjoint(),
    )
    assert sol.ys is not None
    return sol.ys


def residuals(params: Float[Array, " 6"], args: None = None) -> Float[Array, "..."]:
    del args
    return solve(params, jnp.asarray(YEARS)) - LOG_COUNTS


def fit(max_steps: int) -> tuple[Float[Array, " 6"], int]:
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    sol = optx.least_squares(residuals, solver, GUESS, max_steps=max_steps)
    return sol.value, int(sol.stats["num_steps"])


@jax.jit
def curvature(
    params: Float[Array, " 6"],
) -> tuple[Float[Array, "6 6"], Float[Array, "6 6"]]:
    """The Hessian of half the sum of squares, and its approximation by Gauss and
    Newton."""
    hessian = jax.hessian(lambda x: 0.5 * jnp.sum(residuals(x) ** 2))(params)
    jacobian = jax.jacfwd(residuals)(params).reshape(-1, params.size)
    return hessian, jacobian.T @ jacobian


def plot(params, draws, filename):
    times = jnp.linspace(YEARS[0], YEARS[-1], 200)
    many = jax.jit(jax.vmap(lambda x: solve(x, times)))(draws)
    low, high = np.exp(np.percentile(many, [5, 95], axis=0))
    best = np.exp(solve(params, times))
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for k, (name, color) in enumerate((("hare", "tab:green"), ("lynx", "tab:brown"))):
        ax.plot(YEARS, np.exp(LOG_COUNTS[:, k]), "o", ms=3, color=color)
        ax.plot(times, best[:, k], color=color, label=name)
        ax.fill_between(times, low[:, k], high[:, k], color=color, alpha=0.25, lw=0)
    ax.set_xlabel("year")
    ax.set_ylabel("thousands of pelts")
    ax.set_title("the best fit, and where nine tenths of the posterior are", size=9)
    ax.legend()
    figure.savefig(filename)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few draws only")
    parser.add_argument("--output", default="least_squares.png")
    args = parser.parse_args(argv)

    params, num_steps = fit(max_steps=64)
    r = residuals(params)
    variance = jnp.sum(r**2) / (r.size - params.size)
    hessian, gauss_newton = curvature(params)
    covariance = variance * jnp.linalg.inv(hessian)
    errors = jnp.sqrt(jnp.diag(covariance))
    print(f"{num_steps} steps; residuals of {100 * jnp.sqrt(variance):.0f}%")
    for name, x, error in zip(NAMES, params, errors, strict=True):
        print(f"{name:16} {jnp.exp(x):8.4f} +- {100 * error:.1f}%")
    ratio = jnp.sqrt(jnp.diag(jnp.linalg.inv(gauss_newton)) * variance) / errors
    print(
        f"by Gauss and Newton, errors of {jnp.min(ratio):.2f} to {jnp.max(ratio):.2f}"
        " times as much"
    )
    factor = jnp.linalg.cholesky(covariance)
    normal = jr.normal(jr.key(0), (20 if args.quick else 400, params.size))
    plot(params, params + normal @ factor.T, args.output)
    return params, errors, gauss_newton, hessian


if __name__ == "__main__":
    main()
