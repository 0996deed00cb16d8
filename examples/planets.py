"""Weighs the outer planets by their pull on each other and on the Sun.

The data are sixty years of positions of the four outer planets, from the analytical
ephemeris of Simon et al. (1994) that comes with `pyerfa`. The model is the Sun and four
point masses, whose equations of motion are solved by a symplectic method. What is
fitted, to the positions alone, is the four masses, starting from zero, together with
all initial positions and velocities: 28 parameters.

Symplectic methods are reversible as they stand: there is no second copy of the
solution, and the memory of a gradient with `ReversibleAdjoint()` hardly grows with the
number of steps. Here first *and* second derivatives are used. The Hessian, by forward
over reverse mode, makes the fit one of few steps, by Newton's method with the damping
of Levenberg and Marquardt; and its inverse tells how well each of the masses is
determined.

What to expect: the ephemeris is good to an arcminute, that is to 1e-3 or 1e-4 of a
position (`SIGMA` below). What Jupiter and Saturn do is a hundred times as much, and
their masses come out to a per cent or two. Uranus and Neptune are 20 times lighter than
Jupiter and move little in sixty years: a few per cent and some ten per cent. The error
bars count the errors of the ephemeris as independent of each other. They are not, being
the neglected terms of a series; so the bars are too small.

Run as `python planets.py [--quick] [--output PATH]`.
"""

import argparse

import diffrax
import equinox as eqx
import erfa
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from tqdm import tqdm

from diffrax_reversible import BlanesMoan4, ReversibleAdjoint


PLANETS = ("Jupiter", "Saturn", "Uranus", "Neptune")
# Of the Sun to the planet with its moons, as in the ephemeris DE405 of JPL.
KNOWN_MASSES = 1 / np.array([1047.3486, 3497.898, 22902.98, 19412.24])
# The gravitational constant of Gauss, squared: of the Sun in au^3/day^2. The inner
# planets are far inside and so just add to the mass in the middle.
GM = 0.01720209895**2 * (1 + 1 / 6023600 + 1 / 408523.71 + 1 / 328900.56 + 1 / 3098708)
YEAR = 365.25
# The error of a coordinate, in au: from the RMS errors of the positions against DE200
# over 1960--2025 that are given in the documentation of `plan94`.
SIGMA = np.array([71700, 199000, 564000, 158000]) / 1.495978707e8 / np.sqrt(3)
# The units of the parameters: of the masses, positions and velocities.
MASS_UNIT, POSITION_UNIT, VELOCITY_UNIT = 1e-4, 1e-3, 1e-6


class Parameters(eqx.Module):
    masses: Array
    positions: Array
    velocities: Array


def ephemeris(days):
    """Heliocentric positions and velocities at days since the first of January 1965, of
    shape `(len(days), 4, 3)`, in au and au/day."""
    data = erfa.plan94(2438761.5, np.asarray(days)[:, None], np.arange(5, 9))
    return np.array(data["p"]), np.array(data["v"])


def accelerations(t, q, masses):
    del t
    separations = q[None, :] - q[:, None]
    squares = jnp.sum(separations**2, axis=-1) + jnp.eye(len(q))
    return GM * jnp.einsum("j,ijk->ik", masses, separations / squares[..., None] ** 1.5)


def solve(parameters, days, step):
    """Heliocentric positions, of shape `(len(days), 4, 3)`."""
    sun = jnp.zeros((1, 3))
    masses = jnp.concatenate([jnp.ones(1), MASS_UNIT * parameters.masses])
    positions, velocities = ephemeris([0.0])
    q = positions[0] + POSITION_UNIT * parameters.positions
    p = velocities[0] + VELOCITY_UNIT * parameters.velocities
    sol = diffrax.diffeqsolve(
        (diffrax.ODETerm(accelerations), diffrax.ODETerm(lambda t, p, args: p)),
        BlanesMoan4(),
        t0=0.0,
        t1=days[-1],
        dt0=step,
        y0=(jnp.concatenate([sun, p]), jnp.concatenate([sun, q])),
        args=masses,
        saveat=diffrax.SaveAt(ts=days),
        max_steps=round(days[-1] / step),
        adjoint=ReversibleAdjoint(),
    )
    assert sol.ys is not None
    _, q = sol.ys
    return q[:, 1:] - q[:, :1]


def fit(loss_fn, x, num_steps):
    """Newton's method. The Hessian gets a multiple of its diagonal added, more after a
    step that would have made things worse and less after one that did not."""

    @jax.jit
    def derivatives(x):
        value_and_grad = jax.value_and_grad(loss_fn)
        differentiate = lambda v: jax.jvp(value_and_grad, (x,), (v,))
        outputs, (_, hessian) = jax.vmap(differentiate, out_axes=(None, 0))(
            jnp.eye(len(x))
        )
        return *outputs, hessian

    damping = 1e-2
    loss, grad, hessian = derivatives(x)
    losses = [loss.item()]
    bar = tqdm(range(num_steps), desc="planets")
    for _ in bar:
        matrix = hessian + damping * jnp.diag(jnp.abs(jnp.diag(hessian)))
        new_x = x - jnp.linalg.solve(matrix, grad)
        new_loss, new_grad, new_hessian = derivatives(new_x)
        if new_loss <= loss:
            x, loss, grad, hessian = new_x, new_loss, new_grad, new_hessian
            damping = damping / 10
        else:
            damping = damping * 10
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4g}")
    return x, hessian, losses


def plot(days, distances, masses, errors, path):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = ("tab:orange", "tab:olive", "tab:cyan", "tab:blue")
    for k, (planet, color) in enumerate(zip(PLANETS, colors)):
        # The first observation is what the initial guess starts from.
        for name, style in (("massless", ":"), ("fitted", "-")):
            y = distances[name][1:, k]
            label = planet if name == "fitted" else None
            left.plot(1965 + days[1:] / YEAR, y, style, color=color, label=label)
        ratio = 100 * (masses[k] / KNOWN_MASSES[k] - 1)
        error = 100 * errors[k] / KNOWN_MASSES[k]
        right.errorbar(k, ratio, error, fmt="o", color=color, capsize=5)
    left.set_yscale("log")
    left.set_xlabel("year")
    left.set_ylabel("distance from the ephemeris (au)")
    left.set_title("dotted: massless planets; solid: fitted")
    left.legend(ncols=2)
    right.axhline(0, color="black", lw=1)
    right.set_xticks(range(4), PLANETS)
    right.set_xlim(-0.5, 3.5)
    right.set_ylabel("fitted mass, off the known one by (%)")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fits the masses of the planets.")
    parser.add_argument("--quick", action="store_true", help="fewer years and steps")
    parser.add_argument("--output", default="planets.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.quick:
        print("This is a smoke test: it stops long before there is a result.")

    jax.config.update("jax_enable_x64", True)

    num_years, step, num_steps = (20, 200, 5) if args.quick else (60, 50, 10)
    days = np.arange(0, num_years * YEAR, 200.0)
    observed, _ = ephemeris(days)
    guess = Parameters(jnp.zeros(4), jnp.zeros((4, 3)), jnp.zeros((4, 3)))
    x, unravel = ravel_pytree(guess)

    def loss_fn(x):
        residuals = (solve(unravel(x), days, step) - observed) / SIGMA[:, None]
        return 0.5 * jnp.mean(residuals**2)

    x, hessian, losses = fit(loss_fn, x, num_steps)
    parameters = unravel(x)
    masses = MASS_UNIT * np.asarray(parameters.masses)
    # The inverse Hessian is the covariance, once scaled by the residuals that are left.
    variances = 2 * losses[-1] / observed.size * jnp.diag(jnp.linalg.inv(hessian))
    errors = MASS_UNIT * np.sqrt(np.asarray(variances[:4]))
    solve_jit = jax.jit(lambda p: solve(p, days, step))
    distances = {
        name: np.linalg.norm(solve_jit(p) - observed, axis=-1)
        for name, p in (("massless", guess), ("fitted", parameters))
    }

    print("\nMasses of the Sun to the planet's")
    for k, planet in enumerate(PLANETS):
        ratio = masses[k] / KNOWN_MASSES[k] - 1
        print(
            f"  {planet:8} {1 / masses[k]:7.0f}, known {1 / KNOWN_MASSES[k]:5.0f}: "
            f"mass off by {ratio:+.1%}, error bar {errors[k] / KNOWN_MASSES[k]:.1%}"
        )
    print("\nRMS distance from the ephemeris, in au")
    for name, distance in distances.items():
        rms = np.sqrt(np.mean(distance**2, axis=0))
        print(f"  {name}: " + ", ".join(f"{x:.1e}" for x in rms))

    plot(days, distances, masses, errors, args.output)
    print(f"\nWrote {args.output}")
    return dict(losses=losses, masses=dict(zip(PLANETS, masses / KNOWN_MASSES)))


if __name__ == "__main__":
    main()
