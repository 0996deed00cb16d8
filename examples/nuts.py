"""The posterior of the rates of a predator--prey model, by Hamiltonian Monte Carlo.

The model and the data are those of `least_squares.py`: Lotka--Volterra, and the
Hudson's Bay pelt counts of hare and lynx. Here the noise in a count is log-normal, with
a spread that is sampled as well, and the prior of every parameter is wide: normal in
its logarithm. The sampler is NUTS, as in BlackJAX; each of its steps is a gradient of
`diffeqsolve`, by `diffrax.Tsit5()` with `ReversibleAdjoint()`. Several chains run side
by side, under `jax.vmap`.

While it warms up the sampler proposes rates for which the equations cannot be solved in
a sensible number of steps. That must not end the chain. So the solve is made with
`throw=False`, and where it failed the log-density is minus infinity, and its gradient
zero. (Select the solution as well as the log-density, before anything is computed from
it: what is not finite is not finite times zero either.) The proposal is then rejected.
To show that this happens, the gradient is also taken at points drawn from the prior.
At some of them a step is tried that is so long that the vector field overflows, and is
rejected. There the gradient of diffrax's default adjoint is not a number.

Run as `python nuts.py [--quick] [--output PATH]`.
"""

import argparse
import functools as ft

import blackjax
import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib.pyplot as plt
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction
from blackjax.mcmc.hmc import HMCState
from hare_lynx import LOG_COUNTS, YEARS
from jaxtyping import Array, Bool, Float
from least_squares import fit, GUESS, NAMES, residuals

from diffrax_reversible import ReversibleAdjoint


jax.config.update("jax_enable_x64", True)

PRIOR_MEAN = jnp.append(GUESS, jnp.log(0.3))
PRIOR_SPREAD = 1.0


def log_density(
    params: Float[Array, " 7"],
    adjoint: diffrax.AbstractAdjoint = ReversibleAdjoint(),
) -> Float[Array, ""]:
    """Of the posterior, up to a constant. The parameters are the logarithms of those of
    `least_squares.py` and of the spread of the noise."""

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
        y0=params[4:6],
        args=jnp.exp(params[:4]),
        saveat=diffrax.SaveAt(ts=jnp.asarray(YEARS)),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        adjoint=adjoint,
        max_steps=128,
        throw=False,
    )
    solved = sol.result == diffrax.RESULTS.successful
    assert sol.ys is not None
    log_counts = jnp.where(solved, sol.ys, LOG_COUNTS)
    r = (log_counts - LOG_COUNTS) / jnp.exp(params[6])
    log_likelihood = -0.5 * jnp.sum(r**2) - r.size * params[6]
    log_prior = -0.5 * jnp.sum(((params - PRIOR_MEAN) / PRIOR_SPREAD) ** 2)
    return jnp.where(solved, log_likelihood + log_prior, -jnp.inf)


gradients = jax.jit(jax.vmap(jax.value_and_grad(log_density)))


@ft.partial(jax.jit, static_argnums=(2, 3))
@ft.partial(jax.vmap, in_axes=(0, 0, None, None))
def sample(
    key, state: HMCState, num_warmup: int, num_samples: int
) -> tuple[Float[Array, "draws 7"], Bool[Array, " draws"]]:
    """One chain, warm-up included: its draws, and whether each was a divergence.

    Only the step size is adapted. For all that is sampled are logarithms, and each is
    known to about a tenth: there is no need of a mass matrix.
    """
    kernel = blackjax.nuts.build_kernel()
    inverse_mass = jnp.ones(PRIOR_MEAN.size)
    init, update, final = dual_averaging_adaptation(0.8)

    def step(carry, xs):
        state, adaptation = carry
        i, key = xs
        warm = i >= num_warmup
        size = jnp.where(warm, final(adaptation), jnp.exp(adaptation.log_step_size))
        state, info = kernel(key, state, log_density, size, inverse_mass, 6)
        adapted = update(adaptation, info.acceptance_rate)
        adaptation = jtu.tree_map(ft.partial(jnp.where, warm), adaptation, adapted)
        return (state, adaptation), (state.position, info.is_divergent)

    num = num_warmup + num_samples
    xs = (jnp.arange(num), jr.split(key, num))
    return jax.lax.scan(step, (state, init(1.0)), xs)[1]


def compare_at(
    points: Float[Array, "points 7"], ours: Float[Array, "points 7"]
) -> tuple[int, float]:
    """How many gradients by the default adjoint are not finite, and how much the others
    differ from ours."""
    loss = lambda x: log_density(x, diffrax.RecursiveCheckpointAdjoint())
    default = jax.jit(jax.vmap(jax.grad(loss)))(points)
    finite = jnp.all(jnp.isfinite(default), axis=1)
    norm = lambda x: jnp.linalg.norm(x, axis=1)
    differences = norm(ours - default) / (norm(ours) + norm(default))
    return int(jnp.sum(~finite)), float(jnp.nanmedian(differences))


def plot(draws, filename):
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for chain in draws:
        axes[0].plot(jnp.exp(chain[:, 0]), lw=0.5)
        axes[1].plot(jnp.exp(chain[:, 0]), jnp.exp(chain[:, 3]), ".", ms=2)
    axes[0].set_xlabel("draw")
    axes[0].set_ylabel(f"{NAMES[0]}, per year")
    axes[1].set_xlabel(f"{NAMES[0]}, per year")
    axes[1].set_ylabel(f"{NAMES[3]}, per year")
    figure.suptitle(f"{len(draws)} chains, after their warm-up", size=9)
    figure.savefig(filename)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", default="nuts.png")
    args = parser.parse_args(argv)
    num_chains, num_warmup, num_samples = (2, 40, 40) if args.quick else (4, 500, 1000)

    key_points, key_chains = jr.split(jr.key(0))
    normal = jr.normal(key_points, (200 if args.quick else 1000, PRIOR_MEAN.size))
    points = PRIOR_MEAN + PRIOR_SPREAD * normal
    values, grads = gradients(points)
    failed = jnp.isneginf(values)
    num_failed = int(jnp.sum(failed))
    num_zero = int(jnp.sum(jnp.all(grads[failed] == 0, axis=1)))
    num_bad = int(jnp.sum(~jnp.all(jnp.isfinite(grads), axis=1)))
    print(f"{len(points)} points of the prior: {num_failed} solves failed.")
    print(f"{num_zero} of their gradients are zero; {num_bad} of all are not finite.")
    if not args.quick:
        num, difference = compare_at(points, grads)
        print(f"With diffrax's defaults {num} are not finite.")
        print(f"Half of the others differ from ours by less than {difference:.0e}.")

    # Each chain starts at the best of its share of the points.
    shape = (num_chains, len(points) // num_chains)
    best = jnp.argmax(values.reshape(shape), axis=1) + shape[1] * jnp.arange(num_chains)
    start = HMCState(points[best], values[best], grads[best])
    keys = jr.split(key_chains, num_chains)
    draws, diverged = sample(keys, start, num_warmup, num_samples)
    draws = draws[:, num_warmup:]
    in_warmup, after = jnp.split(diverged, [num_warmup], axis=1)
    num_after = int(jnp.sum(after))
    print(f"{jnp.sum(in_warmup)} divergences in the warm-up, {num_after} after it.")
    if args.quick:
        print("This was a smoke test: far too few draws for a posterior.")
    else:
        best_fit, _ = fit(max_steps=64)
        r = residuals(best_fit)
        noise = jnp.sqrt(jnp.sum(r**2) / (r.size - best_fit.size))
        best_fit = jnp.append(jnp.exp(best_fit), noise)
        flat = jnp.exp(draws).reshape(-1, draws.shape[-1])
        low, high = jnp.percentile(flat, jnp.array([5, 95]), axis=0)
        ess = effective_sample_size(draws)
        rhat = potential_scale_reduction(draws)
        columns = (flat.mean(0), low, high, best_fit, ess, rhat)
        heads = ("mean", "5%", "95%", "least squares", "effective draws", "r-hat")
        print(f"{'':16}" + "".join(f"{x:>16}" for x in heads))
        for name, *row in zip((*NAMES, "spread of noise"), *columns, strict=True):
            values = [f"{x:16.4f}" for x in row[:4]]
            print(f"{name:16}" + "".join(values) + f"{row[4]:16.0f}{row[5]:16.3f}")
    plot(draws, args.output)
    return dict(draws=draws, failed=num_failed, zero=num_zero, bad=num_bad)


if __name__ == "__main__":
    main()
