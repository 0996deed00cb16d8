"""A neural ODE trained in single precision, for thousands of updates.

Single precision has seven digits, and one bad gradient in thousands could spoil a
training. So a spiral is learnt from short pieces of it (simulated, with noise), by
`diffrax.Tsit5()` with adaptive steps and `ReversibleAdjoint()`, all as they come. Every
gradient is checked to be finite. Now and then it is compared with that in double
precision, and so is that of diffrax's default adjoint.

Both should be off by about as much. (Towards the end that is a per cent: the gradient
is small then, and as rounding enters the estimates of errors the steps are not quite
the same. For this reason the two differ from each other, too, in single precision.)

Run as `python neural_ode_float32.py [--quick] [--output PATH]`.
"""

import argparse

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from diffrax_reversible import ReversibleAdjoint


# For the comparison. All that is trained or trained on is of single precision.
jax.config.update("jax_enable_x64", True)

OURS = ReversibleAdjoint()
DEFAULT = diffrax.RecursiveCheckpointAdjoint()
BATCH = 32


class NeuralODE(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, dtype=jnp.float32, key=key)

    def __call__(
        self, ts: Float[Array, " times"], y0: Float[Array, " 2"], adjoint=OURS
    ) -> Float[Array, "times 2"]:
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: self.mlp(y)),
            diffrax.Tsit5(),
            t0=ts[0],
            t1=ts[-1],
            dt0=None,
            y0=y0,
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-5),
            adjoint=adjoint,
        )
        assert sol.ys is not None and sol.ys.dtype == y0.dtype
        return sol.ys


def simulate(key, num: int, length: int):
    """Pieces of a spiral with noise, in double precision: the times, and
    `(num, length, 2)`."""
    ts = jnp.linspace(0, 25, 1001)
    matrix = jnp.array([[-0.1, 2.0], [-2.0, -0.1]])
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: matrix @ y**3),
        diffrax.Tsit5(),
        ts[0],
        ts[-1],
        dt0=None,
        y0=jnp.array([2.0, 0.0]),
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-7),
    )
    assert sol.ys is not None
    key_start, key_noise = jr.split(key)
    starts = jr.randint(key_start, (num, 1), 0, len(ts) - 4 * length)
    pieces = sol.ys[starts + 4 * jnp.arange(length)]
    noise = 0.02 * jr.normal(key_noise, pieces.shape)
    return ts[: 4 * length : 4], pieces + noise


@eqx.filter_jit
def gradient(model, ts, pieces, adjoint=OURS):
    def loss(model):
        solve = lambda y0: model(ts, y0, adjoint)
        return jnp.mean((jax.vmap(solve)(pieces[:, 0]) - pieces) ** 2)

    return eqx.filter_value_and_grad(loss)(model)


def convert(tree, dtype):
    is_array = eqx.is_inexact_array
    return jtu.tree_map(lambda x: x.astype(dtype) if is_array(x) else x, tree)


def compare(*single) -> list[float]:
    """How much the gradient differs from that in double precision, with either
    adjoint."""
    flat = lambda x, adjoint: ravel_pytree(gradient(x[0], x[1], x[2], adjoint)[1])[0]
    exact = flat([convert(x, jnp.float64) for x in single], DEFAULT)
    off = lambda x: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))
    return [off(flat(single, adjoint)) for adjoint in (OURS, DEFAULT)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--output", default="neural_ode_float32.png")
    args = parser.parse_args(argv)
    num_updates = 100 if args.quick else 5000

    key_data, key_model = jr.split(jr.key(0))
    data = simulate(key_data, 512, 20)
    ts, pieces = (x.astype(jnp.float32) for x in data)
    model = NeuralODE(key_model)
    optim = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(model, opt_state, grads):
        finite = jnp.all(jnp.isfinite(ravel_pytree(grads)[0]))
        updates, opt_state = optim.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, finite

    losses, finite = [], []
    batches = np.random.default_rng(0).integers(len(pieces), size=(num_updates, BATCH))
    first = pieces[:BATCH]
    at = {}
    for i, batch in enumerate(batches):
        if i in (0, num_updates // 2):
            at[i] = compare(model, ts, first)
        loss, grads = gradient(model, ts, pieces[batch])
        model, opt_state, is_finite = update(model, opt_state, grads)
        losses.append(loss)
        finite.append(is_finite)
    at[num_updates] = compare(model, ts, first)

    losses = np.array(losses)
    num_bad = num_updates - int(np.sum(finite))
    window = num_updates // 10
    before, after = losses[:window].mean(), losses[-window:].mean()
    print(f"{num_updates} updates in {losses.dtype}; {num_bad} gradients not finite")
    print(f"loss, mean of a tenth: {before:.5f} -> {after:.5f} (noise: 0.0004)")
    print("Gradients in single precision differ from those in double by")
    heads = [type(x).__name__ for x in (OURS, DEFAULT)]
    print(f"{'updates':>8}" + "".join(f"{x:>28}" for x in heads))
    for i, values in at.items():
        print(f"{i:8}" + "".join(f"{x:28.0e}" for x in values))
    if args.quick:
        print("This was a smoke test: the spiral is not learnt yet.")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    axes[0].semilogy(losses, lw=0.5)
    axes[0].set_xlabel("update")
    axes[0].set_ylabel("loss")
    solved = jax.jit(jax.vmap(lambda y0: model(ts, y0)))(first[:12, 0])
    for piece, ys in zip(first, solved):
        axes[1].plot(*piece.T, ".", ms=2, color="black")
        axes[1].plot(*ys.T, lw=1)
    axes[1].set_title("pieces of the spiral, and what was learnt", size=9)
    figure.savefig(args.output)
    plt.close(figure)
    return dict(bad=num_bad, before=before, after=after, at=at, dtype=losses.dtype)


if __name__ == "__main__":
    main()
