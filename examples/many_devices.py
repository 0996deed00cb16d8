"""Trains a neural ODE on all devices at once, and in several processes if wanted.

What is shown is data parallelism. The batch is split over all devices of a mesh, by
`jax.sharding`, and the parameters are on each of them. There is nothing in the solve
that knows of this: JAX splits the computation where the data are split, and adds up the
gradients, once in each step of training. So each device holds the reversible solver's
state for its own trajectories, and no memory for their steps.

The trajectories are those of damped oscillators, with noise in their observations. At
the start the gradient of all of the data is computed on a single device as well. The
two should differ by rounding alone, and it is an error if they do not.

With `--processes 2` the script starts itself twice, as if on two machines. They find
each other by `jax.distributed`; each makes its own part of the data, and all of their
devices form one mesh. On a real cluster each machine starts its own process instead,
and calls `jax.distributed.initialize()`.

A CPU counts as one device, unless
`XLA_FLAGS=--xla_force_host_platform_device_count=4` makes it several. (They share its
cores, so it is not faster for that.)

Run as `python many_devices.py [--quick] [--processes N] [--output PATH]`.
"""

import argparse
import socket
import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from tqdm import tqdm

from diffrax_reversible import ReversibleAdjoint, ReversibleHeun


TS = np.linspace(0, 3, 16)
NOISE = 0.05
TIMEOUT = 600


class NeuralODE(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, y0) -> Array:
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: self.mlp(y)),
            ReversibleHeun(),
            t0=TS[0],
            t1=TS[-1],
            dt0=0.1,
            y0=y0,
            saveat=diffrax.SaveAt(ts=jnp.asarray(TS)),
            adjoint=ReversibleAdjoint(),
            max_steps=64,
        )
        assert sol.ys is not None
        return sol.ys


def oscillators(indices):
    """The starts of the oscillators with these numbers, and noisy observations."""
    rngs = [np.random.default_rng(i) for i in indices]
    y0s = np.stack([rng.uniform(-2, 2, size=2) for rng in rngs])
    noise = np.stack([rng.normal(size=(len(TS), 2)) for rng in rngs])
    # Turned clockwise, which is position and velocity for a frequency of one.
    turned = np.exp((-0.2 - 1j) * TS) * (y0s[:, :1] + 1j * y0s[:, 1:])
    return y0s, np.stack([turned.real, turned.imag], axis=-1) + NOISE * noise


@eqx.filter_value_and_grad
def loss_and_grad(model, y0s, ys):
    return jnp.mean((jax.vmap(model)(y0s) - ys) ** 2)


def put(tree, sharding):
    """The arrays of `tree` with the given sharding. Each process gives what it has: its
    part of what is split, and all of what is not."""
    dynamic, static = eqx.partition(tree, eqx.is_array)
    dynamic = jtu.tree_map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
        dynamic,
    )
    return eqx.combine(dynamic, static)


def relative_difference(a, b):
    """The largest, relative to the largest entry of each array."""
    difference = 0.0
    for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b)):
        # (What is not split has the same value everywhere.)
        x, y = np.asarray(x.addressable_data(0)), np.asarray(y)
        difference = max(difference, float(np.max(np.abs(x - y)) / np.max(np.abs(y))))
    return difference


def train(args):
    """What each process does."""
    devices = np.array(jax.devices())
    is_first = jax.process_index() == 0
    mesh = Mesh(devices, ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    whole = NamedSharding(mesh, PartitionSpec())

    per_device = 8 if args.quick else 64
    batch_size = per_device * len(devices)
    num_steps = 10 if args.quick else 500
    # The part of this process. (In a mesh its devices are next to each other.)
    mine = np.split(np.arange(batch_size), jax.process_count())[jax.process_index()]
    y0s, ys = put(oscillators(mine), split)

    mlp = eqx.nn.MLP(2, 2, width_size=32, depth=1, activation=jnp.tanh, key=jr.key(0))
    # The same in all processes, as it comes from the same key.
    one_model = NeuralODE(mlp)
    model = put(one_model, whole)
    optim = optax.adam(optax.cosine_decay_schedule(0.01, num_steps))
    opt_state = put(optim.init(eqx.filter(one_model, eqx.is_inexact_array)), whole)

    @eqx.filter_jit
    def make_step(model, opt_state, y0s, ys):
        loss, grads = loss_and_grad(model, y0s, ys)
        updates, opt_state = optim.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss, grads

    *_, grads = make_step(model, opt_state, y0s, ys)
    difference = None
    if is_first:
        # On one device, with all of the data.
        one_gradient = eqx.filter_jit(loss_and_grad)
        _, expected = one_gradient(one_model, *oscillators(np.arange(batch_size)))
        difference = relative_difference(grads, expected)
        print(
            f"The gradients of {batch_size} trajectories on {len(devices)} devices in "
            f"{jax.process_count()} processes and on one differ by {difference:.1e}.",
            flush=True,
        )
        # Rounding in sums of some thousand numbers, in another order.
        if not difference < 1e-12:
            raise RuntimeError("The gradients differ by more than rounding.")

    losses = []
    bar = tqdm(range(num_steps), desc="neural ODE", disable=not is_first)
    for _ in bar:
        model, opt_state, loss, _ = make_step(model, opt_state, y0s, ys)
        losses.append(loss.addressable_data(0).item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}")

    if is_first:
        print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f} (the noise: {NOISE**2:.4f})")
        plot(losses, args.output)
        print(f"Wrote {args.output}", flush=True)
    return {"difference": difference, "losses": losses, "devices": len(devices)}


def plot(losses, path):
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(losses, label=f"trained on {jax.device_count()} devices")
    ax.axhline(NOISE**2, color="gray", ls=":", label="noise in the observations")
    ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel("mean square error")
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def start_processes(args):
    """Runs this script once for each process, and waits for all of them."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    command = [sys.executable, __file__, "--processes", str(args.processes)]
    command += ["--output", args.output, "--coordinator", coordinator]
    command += ["--quick"] if args.quick else []
    # (A failed process makes those that wait for it fail too.)
    children = [
        subprocess.Popen([*command, "--process-id", str(i)])
        for i in range(args.processes)
    ]
    try:
        codes = [child.wait(timeout=TIMEOUT) for child in children]
    finally:
        for child in children:
            child.kill()
    if any(codes):
        raise RuntimeError(f"The processes ended with {codes}.")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Trains on all devices.")
    parser.add_argument("--quick", action="store_true", help="take only a few steps")
    parser.add_argument("--processes", type=int, default=1, help="how many to start")
    parser.add_argument("--output", default="many_devices.png", help="path of figure")
    # Of the processes that are started.
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.processes > 1 and args.process_id is None:
        return start_processes(args)
    # So that rounding is not taken for an error, nor an error for rounding.
    jax.config.update("jax_enable_x64", True)
    if args.process_id is not None:
        # How CPUs exchange data. (GPUs and TPUs have their own ways.)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    return train(args)


if __name__ == "__main__":
    main()
