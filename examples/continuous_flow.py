"""Learns a density in two dimensions by a continuous normalising flow.

A sample is carried to a standard normal one by a neural ODE, and along with it goes the
change of its log-density, which is the integral of the divergence of the vector field.
In two dimensions the divergence costs little and is computed exactly. (FFJORD, by
Grathwohl et al. 2019, estimates it by random vectors in many.) The data are the two
moons of scikit-learn, with noise, and a new batch is drawn for every step.

Every sample is a solve of its own, by `diffrax.Bosh3()` with adaptive steps, and
`jax.vmap` makes a batch of them; the gradient is that of `ReversibleAdjoint()`. At the
end the density is summed over the plane, where it has to come to one: this is true of
any flow, but not if its divergence or its solution were wrong.

Run as `python continuous_flow.py [--quick] [--output PATH]`.
"""

import argparse

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_moons
from tqdm import tqdm

from diffrax_reversible import ReversibleAdjoint


NOISE = 0.1
# The moons are scaled by their mean and standard deviation, but for the noise.
MEAN, STD = np.array([0.5, 0.25]), np.array([0.87, 0.5])
# Of the scaled data, but for the ends: uniform along two semicircles of radius 1, and
# normal across. No density can have a smaller negative log-likelihood than that.
ENTROPY = np.log(2 * np.pi * NOISE * np.sqrt(2 * np.pi * np.e)) - np.log(STD).sum()
# Of the plane, all that has any density.
EXTENT = 3.5


class Flow(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, width, key):
        self.mlp = eqx.nn.MLP(3, 2, width, 2, jnp.tanh, key=key)

    def velocity(self, t, x):
        return self.mlp(jnp.append(x, t))

    def vector_field(self, t, y, args):
        del args
        x, _ = y
        # Both columns of the Jacobian along with the velocity.
        push = lambda v: jax.jvp(lambda x: self.velocity(t, x), (x,), (v,))
        velocity, columns = jax.vmap(push, out_axes=(None, 0))(jnp.eye(2))
        return velocity, jnp.trace(columns)

    def solve(self, y0, t0, t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            diffrax.Bosh3(),
            t0=t0,
            t1=t1,
            dt0=None,
            y0=y0,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
            max_steps=1000,
            adjoint=ReversibleAdjoint(),
        )
        assert sol.ys is not None
        x, change = sol.ys
        return x[0], change[0]

    def log_density(self, x):
        z, change = self.solve((x, jnp.array(0.0)), 0.0, 1.0)
        return -0.5 * z @ z - jnp.log(2 * jnp.pi) + change

    def sample(self, key):
        z = jr.normal(key, (2,))
        x, _ = self.solve((z, jnp.array(0.0)), 1.0, 0.0)
        return x


def draw_moons(size, seed):
    x, _ = make_moons(size, noise=NOISE, random_state=seed)
    return (x - MEAN) / STD


def loss_fn(flow, x):
    return -jnp.mean(jax.vmap(flow.log_density)(x))


def train(flow, num_steps, batch_size):
    optim = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))

    @eqx.filter_jit
    def make_step(flow, opt_state, x):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(flow, x)
        updates, opt_state = optim.update(grads, opt_state)
        return eqx.apply_updates(flow, updates), opt_state, loss

    opt_state = optim.init(eqx.filter(flow, eqx.is_inexact_array))
    losses = []
    bar = tqdm(range(num_steps), desc="flow")
    for i in bar:
        x = draw_moons(batch_size, i)
        flow, opt_state, loss = make_step(flow, opt_state, x)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return flow, losses


def gaussian_loss(x, x_test):
    """What the best normal distribution achieves."""
    residuals = x_test - x.mean(axis=0)
    covariance = np.cov(x.T)
    squares = np.einsum("ij,ij->i", residuals @ np.linalg.inv(covariance), residuals)
    return np.mean(squares) / 2 + np.linalg.slogdet(2 * np.pi * covariance)[1] / 2


@eqx.filter_jit
def log_densities(flow, x):
    return jax.vmap(flow.log_density)(x)


def plot(losses, baseline, density, samples, data, path):
    fig, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    axes[0].plot(losses)
    axes[0].axhline(baseline, ls="--", color="black", label="normal distribution")
    axes[0].axhline(ENTROPY, ls=":", color="black", label="entropy of the data")
    axes[0].set_xlabel("step of the training")
    axes[0].set_ylabel("negative log-likelihood")
    axes[0].legend()
    square = dict(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axes[2].imshow(density, origin="lower", extent=extent, cmap="magma")
    for ax, points, title in (
        (axes[1], data, "data"),
        (axes[2], None, "density"),
        (axes[3], samples, "samples of the flow"),
    ):
        if points is not None:
            ax.plot(*points.T, ".", ms=2)
        ax.set(title=title, **square)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Learns a density by a continuous normalising flow."
    )
    parser.add_argument("--quick", action="store_true", help="take only a few steps")
    parser.add_argument(
        "--output", default="continuous_flow.png", help="path of the figure"
    )
    args = parser.parse_args(argv)
    if args.quick:
        print("This is a smoke test: it stops long before there is a result.")

    jax.config.update("jax_enable_x64", True)

    width, num_steps, batch_size, size = (
        (16, 30, 64, 60) if args.quick else (48, 1000, 256, 160)
    )
    flow = Flow(width, jr.key(0))
    flow, losses = train(flow, num_steps, batch_size)
    # As many as there are points of the grid, so that we compile once.
    x_test = draw_moons(size**2, num_steps)
    loss = -jnp.mean(log_densities(flow, x_test)).item()
    baseline = gaussian_loss(draw_moons(size**2, num_steps + 1), x_test)

    side = np.linspace(-EXTENT, EXTENT, size)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    density = np.exp(log_densities(flow, grid))
    integral = np.sum(density).item() * (side[1] - side[0]) ** 2
    keys = jr.split(jr.key(1), 500 if args.quick else 2000)
    samples = eqx.filter_jit(eqx.filter_vmap(flow.sample))(keys)

    print(f"\nNegative log-likelihood of new samples: {loss:.3f} nats")
    print(f"  of the best normal distribution: {baseline:.3f} nats")
    print(f"  the entropy of the data, about: {ENTROPY:.3f} nats")
    print(f"Integral of the density: {integral:.4f}")

    density = density.reshape(size, size)
    plot(losses, baseline, density, samples, x_test[:2000], args.output)
    print(f"\nWrote {args.output}")
    return dict(
        losses=losses,
        loss=loss,
        baseline=baseline,
        integral=integral,
    )


if __name__ == "__main__":
    main()
