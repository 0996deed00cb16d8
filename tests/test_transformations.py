"""Transformations of JAX, around a solve and within it, give what they give with
diffrax's adjoints: every mode of differentiation, batches, `jit`, `checkpoint`, `scan`,
callbacks, several devices."""

import functools as ft
import inspect
import os
import re
import subprocess
import sys
import textwrap

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
import pytest

import diffrax_reversible as dfxr

from .derivatives import ADJOINT, agree
from .helpers import relative_difference, short_records
from .test_counts import _loop_bodies
from .test_gradient import TOL, weighted_sum


RK = dfxr.UReversible(diffrax.Heun())
PUBLISHED = dfxr.UReversible(diffrax.Heun(), 0.999)
HEUN = diffrax.ReversibleHeun()
PID = diffrax.PIDController(rtol=1e-2, atol=1e-2)
CONSTANT = diffrax.ConstantStepSize()
TS = jnp.array([0.1, 0.6])
W = jnp.array([[-0.6, 1.4], [-1.1, 0.2]])
Y0 = jnp.array([1.0, 0.4])


def solve(adjoint, w, y0, solver=RK, controller=PID, **kwargs):
    kwargs = dict(t0=0.0, t1=1.0, dt0=0.2, max_steps=16) | kwargs
    kwargs.setdefault("saveat", diffrax.SaveAt(t1=True, ts=TS))
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y) * (1 + 0.2 * t)),
        solver,
        y0=y0,
        args=w,
        stepsize_controller=controller,
        adjoint=adjoint,
        **kwargs,
    )


def ys(adjoint, w, y0, *args, **kwargs):
    return solve(adjoint, w, y0, *args, **kwargs).ys


def loss_of(adjoint, w, y0, *args, **kwargs):
    return weighted_sum(ys(adjoint, w, y0, *args, **kwargs))


#
# First derivatives in other forms
#


@pytest.mark.long
@pytest.mark.parametrize(
    "solver,controller", [(RK, PID), (HEUN, CONSTANT)], ids=["UReversible", "Heun"]
)
def test_jacobian(solver, controller):
    # A batch of gradients, of one and the same solve.
    fn = lambda adjoint: lambda w, y0: ys(adjoint, w, y0, solver, controller)
    ours = jax.jit(jax.jacrev(fn(ADJOINT), argnums=(0, 1)))(W, Y0)
    forward = jax.jacfwd(fn(diffrax.ForwardMode()), argnums=(0, 1))
    assert relative_difference(ours, jax.jit(forward)(W, Y0)) < TOL


def test_pulled_back_twice():
    # One solve, and its pullback called more than once, outside of `jit`.
    out, pull = jax.vjp(lambda y0: ys(ADJOINT, W, y0), Y0)
    g = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    (one,), (two,) = pull(g), pull(2 * g)
    assert relative_difference(two, 2 * one) < TOL
    _, tangent = jax.jvp(
        lambda y0: ys(diffrax.ForwardMode(), W, y0), (Y0,), (jnp.ones(2),)
    )
    assert abs(jnp.sum(one) - jnp.vdot(g, tangent)) < TOL


@pytest.mark.long
def test_equinox():
    class Model(eqx.Module):
        w: jax.Array
        solver: diffrax.AbstractSolver
        adjoint: diffrax.AbstractAdjoint
        name: str

        def __call__(self, y0):
            return ys(self.adjoint, self.w, y0, self.solver)

    def loss(adjoint, params):
        w, y0 = params
        model = Model(w, RK, adjoint, "model")
        return weighted_sum(eqx.filter_vmap(model)(jnp.stack([y0, 2 * y0])))

    agree(loss, (W, Y0))
    model = Model(W, RK, ADJOINT, "model")
    grad = eqx.filter_jit(eqx.filter_grad(lambda m: weighted_sum(m(Y0))))(model)
    assert jnp.all(grad.w != 0)
    out = eqx.filter_closure_convert(model, Y0)(Y0)
    assert relative_difference(out, model(Y0)) < TOL


def test_has_aux():
    # The whole solution as an auxiliary output.
    def fn(w):
        sol = solve(ADJOINT, w, Y0, saveat=diffrax.SaveAt(t1=True, dense=True))
        return jnp.sum(sol.ys), sol

    grad, sol = eqx.filter_jit(eqx.filter_grad(fn, has_aux=True))(W)
    assert jnp.all(grad != 0)
    assert relative_difference(sol.evaluate(1.0), sol.ys[0]) < TOL
    assert sol.stats["num_accepted_steps"] > 0


@pytest.mark.long
def test_without_jit():
    with jax.disable_jit():
        grad = jax.grad(lambda y0: loss_of(ADJOINT, W, y0, max_steps=8))(Y0)
    expected = jax.jit(jax.grad(lambda y0: loss_of(ADJOINT, W, y0, max_steps=8)))(Y0)
    assert relative_difference(grad, expected) < TOL


def test_stop_gradient():
    def loss(adjoint, params):
        w, y0 = params
        first = jax.lax.stop_gradient(ys(adjoint, w, y0))
        return loss_of(adjoint, w, first[0] + y0)

    agree(loss, (W, Y0))


#
# Batches
#


B = jnp.array([0.3, 1.0, 2.0])


@pytest.mark.long
@pytest.mark.parametrize("over", ["w", "y0", "times", "solver_state", "none"])
def test_batch_over(over):
    # Of one argument, and of a gradient with respect to others; per example.
    def single(w, y0, scale):
        kwargs = {}
        if over == "times":
            kwargs = dict(t1=scale, saveat=diffrax.SaveAt(ts=TS * scale, t1=True))
        elif over == "w":
            w = scale * w
        elif over == "y0":
            y0 = scale * y0
        elif over == "solver_state":
            term = diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y))
            state = HEUN.init(term, 0.0, 0.2, scale * y0, w)
            kwargs = dict(solver=HEUN, controller=CONSTANT, solver_state=state)
        return loss_of(ADJOINT, w, y0, **kwargs)

    gradient = jax.grad(single, argnums=(0, 1))
    axes = (None, None, None if over == "none" else 0)
    scale = B[0] if over == "none" else B
    batched = jax.jit(jax.vmap(gradient, axes, axis_size=3))(W, Y0, scale)
    one = jax.jit(gradient)
    for i in range(3):
        expected = one(W, Y0, B[0] if over == "none" else B[i])
        assert relative_difference([x[i] for x in batched], expected) < TOL


@pytest.mark.long
def test_batch_of_batches():
    # vmap(grad(sum of vmap)), each over something else, with per-element steps.
    def loss(adjoint, params):
        w, y0 = params
        inner = lambda w: jnp.sum(
            jax.vmap(lambda s: loss_of(adjoint, w, s * y0), out_axes=0)(B)
        )
        return weighted_sum(jax.vmap(inner, in_axes=1)(jnp.stack([w, 2 * w], 1)))

    agree(loss, (W, Y0))


#
# Control flow around
#


@pytest.mark.parametrize(
    "policy",
    [
        None,
        jax.checkpoint_policies.everything_saveable,
        jax.checkpoint_policies.dots_saveable,
    ],
    ids=["nothing", "everything", "dots"],
)
def test_checkpoint(policy):
    def loss(adjoint, params):
        w, y0 = params
        fn = lambda y: ys(adjoint, w, y, HEUN, CONSTANT)[-1]
        fn = jax.checkpoint(fn, policy=policy)
        return weighted_sum(fn(jnp.sin(fn(y0))))

    agree(loss, (W, Y0))


@pytest.mark.exhaustive
def test_in_a_branch():
    def loss(adjoint, params):
        w, y0 = params

        def one(scale):
            return jax.lax.cond(
                scale > 0.5,
                lambda y: ys(adjoint, w, y)[-1],
                lambda y: ys(adjoint, w, y, HEUN, CONSTANT)[0],
                scale * y0,
            )

        return weighted_sum(jax.lax.map(one, B)) + weighted_sum(jax.vmap(one)(B))

    agree(loss, (W, Y0))


@pytest.mark.long
def test_scan_with_an_event():
    # Several solves, of which each ends at its own event, and others in a batch.
    def loss(adjoint, params):
        w, y0 = params

        def body(y, level):
            event = diffrax.Event(
                lambda t, y, args, **kwargs: y[0] - level,
                optx.Newton(1e-8, 1e-8),
            )
            sol = solve(adjoint, w, y, event=event, saveat=diffrax.SaveAt(t1=True))
            return sol.ys[0] + 0.1, sol.ts[0]

        _, ts = jax.lax.scan(body, y0, jnp.array([1.2, 3.0, 0.9]))
        return weighted_sum(ts) + weighted_sum(body(y0, 1.1))

    agree(loss, (W, Y0))


@pytest.mark.long
def test_training_loop():
    # Gradient descent within one compiled loop.
    target = jnp.array([0.2, 0.9])

    def train(adjoint):
        def body(w, _):
            fn = lambda w: jnp.sum((ys(adjoint, w, Y0)[-1] - target) ** 2)
            value, grad = jax.value_and_grad(fn)(w)
            return w - 0.2 * grad, value

        return jax.lax.scan(body, W, length=5)

    ours = jax.jit(ft.partial(train, ADJOINT))()
    expected = jax.jit(ft.partial(train, diffrax.RecursiveCheckpointAdjoint()))()
    assert relative_difference(ours, expected) < TOL
    assert ours[1][-1] < 0.8 * ours[1][0]


@pytest.mark.exhaustive
def test_shooting():
    # By Newton's method, whose Jacobians are derivatives in forward mode; and then the
    # derivative of its root, which is one of either mode, with no second derivative.
    target = jnp.array([0.3, 0.2])

    def shoot(w, adjoint):
        fn = lambda y0, w: ys(adjoint, w, y0, RK, CONSTANT)[-1] - target
        return optx.root_find(fn, optx.Newton(1e-10, 1e-10), Y0, w).value

    start = jax.jit(ft.partial(shoot, adjoint=ADJOINT))(W)
    assert jnp.max(jnp.abs(ys(ADJOINT, W, start, RK, CONSTANT)[-1] - target)) < 1e-8
    ours = jax.jit(jax.jacrev(ft.partial(shoot, adjoint=ADJOINT)))(W)
    forward = ft.partial(shoot, adjoint=diffrax.DirectAdjoint())
    assert relative_difference(ours, jax.jit(jax.jacfwd(forward))(W)) < 1e-8


#
# Forward mode, and second derivatives
#


@pytest.mark.long
@pytest.mark.parametrize(
    "solver,controller,kwargs",
    [
        (PUBLISHED, PID, dict(saveat=diffrax.SaveAt(dense=True, ts=TS))),
        (PUBLISHED, CONSTANT, dict(saveat=diffrax.SaveAt(steps=True))),
        (HEUN, PID, {}),
    ],
    ids=["dense", "steps", "ReversibleHeun"],
)
def test_hessian_vector_product(solver, controller, kwargs):
    def value(adjoint, w, y0):
        sol = solve(adjoint, w, y0, solver, controller, **kwargs)
        out = weighted_sum(sol.ys)
        if sol.interpolation is not None:
            out = out + weighted_sum(sol.evaluate(0.37))
        return out

    tangents = (jnp.cos(W), jnp.sin(3 * Y0))

    def product(mode, adjoint):
        fn = mode(ft.partial(value, adjoint), argnums=(0, 1))
        return jax.jit(lambda *x: jax.jvp(fn, x, tangents)[1])(W, Y0)

    ours = product(jax.grad, ADJOINT)
    expected = product(jax.jacfwd, diffrax.ForwardMode())
    assert relative_difference(ours, expected) < TOL


@pytest.mark.exhaustive
def test_hessian_in_a_batch():
    def hessian(mode, adjoint):
        fn = lambda y0: loss_of(adjoint, W, y0, PUBLISHED, PID)
        return jax.jit(jax.vmap(jax.jacfwd(mode(fn))))(jnp.outer(B, Y0))

    ours = hessian(jax.grad, ADJOINT)
    expected = hessian(jax.jacfwd, diffrax.ForwardMode())
    assert relative_difference(ours, expected) < TOL


DX = (jnp.cos(W), jnp.sin(3 * Y0))


def _along(fn):
    return lambda *x: jax.jvp(fn, x, DX)[1]


def _sum_of_gradient(fn):
    gradient = jax.grad(fn, argnums=(0, 1))
    return lambda *x: sum(jnp.vdot(g, d) for g, d in zip(gradient(*x), DX))


MODES = {
    "jvp": _along,
    "jacfwd": lambda fn: jax.jacfwd(fn, argnums=(0, 1)),
    "linearize": lambda fn: lambda *x: jax.linearize(fn, *x)[1](*DX),
    "transpose": lambda fn: (
        lambda *x: jax.linear_transpose(jax.linearize(fn, *x)[1], *x)(jnp.array(1.0))
    ),
    "jvp of grad": lambda fn: _along(jax.grad(fn, argnums=(0, 1))),
    "hessian": lambda fn: jax.hessian(fn, argnums=(0, 1)),
    "grad of grad": lambda fn: jax.grad(_sum_of_gradient(fn), argnums=(0, 1)),
    "jacrev of grad": lambda fn: jax.jacrev(jax.grad(fn, argnums=1), argnums=(0, 1)),
    "grad of jvp": lambda fn: jax.grad(_along(fn), argnums=(0, 1)),
    "jvp of jvp": lambda fn: _along(_along(fn)),
}
AROUND = {
    "jit": jax.jit,
    "vmap": lambda fn: (
        lambda w, y0: jax.jit(jax.vmap(fn, (None, 0)))(
            w, jnp.stack([y0, 0.7 * y0, 2 * y0])
        )
    ),
    "scan": lambda fn: jax.jit(
        lambda *x: jax.lax.scan(lambda c, _: (c, fn(*x)), 0.0, length=2)[1]
    ),
}
WITHIN = {
    "": lambda fn: fn,
    "vmap": lambda fn: (
        lambda w, y0: jnp.sum(
            jax.vmap(fn, (None, 0))(w, jnp.stack([y0, 0.7 * y0, 2 * y0]))
        )
    ),
    "checkpoint": jax.checkpoint,
    "scan": lambda fn: (
        lambda *x: jax.lax.scan(lambda c, _: (c + fn(*x), None), 0.0, length=2)[0]
    ),
}


@ft.cache
def _in_mode(is_ours, solver, mode, around, within):
    def value(w, y0):
        adjoint = ADJOINT if is_ours else diffrax.DirectAdjoint()
        out = solve(adjoint, w, y0, solver, PID, max_steps=16)
        return weighted_sum(out.ys)

    return AROUND[around](MODES[mode](WITHIN[within](value)))(W, Y0)


@pytest.mark.long
@pytest.mark.parametrize(
    "mode,around,within",
    [
        *[(mode, "jit", "") for mode in MODES],
        ("jvp", "vmap", "vmap"),
        ("jacfwd", "scan", "checkpoint"),
        ("hessian", "jit", "vmap"),
        ("hessian", "vmap", "scan"),
        ("grad of grad", "vmap", "vmap"),
        ("grad of jvp", "scan", "vmap"),
        ("jvp of grad", "vmap", "checkpoint"),
    ],
)
def test_modes(mode, around, within):
    # (Of a solver whose second copy counts as a constant, and what is rebuilt from it.)
    ours, expected = (_in_mode(x, RK, mode, around, within) for x in (True, False))
    assert relative_difference(ours, expected) < 1e-9


@pytest.mark.parametrize("solver", [PUBLISHED, HEUN], ids=["published", "Heun"])
@pytest.mark.parametrize("mode", ["jvp", "hessian"])
def test_modes_of_other_solvers(solver, mode):
    ours, expected = (_in_mode(x, solver, mode, "jit", "") for x in (True, False))
    assert relative_difference(ours, expected) < 1e-9


#
# Side effects
#


@pytest.mark.parametrize("mode", [jax.grad, jax.jacfwd])
def test_ordered_effects(mode, capfd):
    def loss(y0):
        def vector_field(t, y, args):
            jax.debug.print("at {}", t, ordered=True)
            return -y

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            RK,
            0.0,
            1.0,
            0.5,
            y0,
            adjoint=ADJOINT,
            max_steps=2,
        )
        return jnp.sum(sol.ys)

    gradient = jax.block_until_ready(jax.jit(mode(loss))(Y0))
    assert jnp.allclose(gradient, 0.625**2)
    assert capfd.readouterr().out.count("at ") >= 8


@pytest.mark.long
@pytest.mark.parametrize(
    "make,batched",
    [(diffrax.TextProgressMeter, True), (diffrax.TqdmProgressMeter, False)],
    ids=["text", "tqdm"],
)
def test_progress_meter(make, batched, capfd):
    if make is diffrax.TqdmProgressMeter:
        pytest.importorskip("tqdm")
        meter = make(refresh_steps=2)
    else:
        meter = make(minimum_increase=0.3)

    def one(adjoint, scale, w, **kwargs):
        return loss_of(adjoint, w, scale * Y0, max_steps=64, dt0=0.05, **kwargs)

    def gradient(**kwargs):
        fn = ft.partial(one, ADJOINT, **kwargs)
        if batched:
            return jax.jit(jax.vmap(jax.grad(fn, argnums=1), (0, None)))(B, W)
        return jax.jit(jax.grad(fn, argnums=1))(B[0], W)

    expected = gradient()
    capfd.readouterr()
    ours = gradient(progress_meter=meter)
    jax.block_until_ready(ours)
    jax.effects_barrier()
    captured = capfd.readouterr()
    shown = captured.out + captured.err
    # Once, as the way back is no solve.
    assert len(re.findall(r"(?<!\d)0\.00%", shown)) >= 1
    assert "100.00%" in shown
    assert relative_difference(ours, expected) < TOL


def test_progress_of_repeated_steps(monkeypatch):
    # They are made again on the way back, and that is no progress.
    short_records(monkeypatch)
    seen = []

    class Meter(diffrax.AbstractProgressMeter):
        def init(self):
            return None

        def step(self, state, progress):
            jax.debug.callback(lambda p: seen.append(float(p)), progress)

        def close(self, state):
            pass

    def loss(max_steps):
        kwargs = dict(dt0=0.02, max_steps=max_steps, progress_meter=Meter())
        return lambda w: loss_of(ADJOINT, w, Y0, HEUN, CONSTANT, **kwargs)

    grad = jax.jit(jax.grad(loss(None)))(W)
    jax.effects_barrier()
    assert len(seen) == 50
    assert relative_difference(grad, jax.jit(jax.grad(loss(64)))(W)) < TOL


@pytest.mark.long
def test_callback_in_a_vector_field():
    seen = []

    def loss(adjoint, y0):
        def field(t, y, args):
            jax.debug.callback(lambda t: seen.append(float(t)), t)
            return jnp.sin(y)

        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field), RK, 0.0, 1.0, 0.25, y0, adjoint=adjoint, max_steps=8
        )
        return jnp.sum(sol.ys)

    grad = jax.jit(jax.grad(ft.partial(loss, ADJOINT)))(Y0)
    jax.effects_barrier()
    assert min(seen) == 0 and max(seen) == 1
    expected = jax.jit(jax.jacfwd(ft.partial(loss, diffrax.ForwardMode())))(Y0)
    assert relative_difference(grad, expected) < TOL


def test_other_transformations_of_a_compiled_gradient():
    # Lowered and compiled ahead of time, and exported to be called elsewhere.
    gradient = jax.jit(jax.grad(ft.partial(loss_of, ADJOINT), argnums=(0, 1)))
    expected = gradient(W, Y0)
    compiled = gradient.lower(W, Y0).compile()
    assert relative_difference(compiled(W, Y0), expected) == 0
    shapes = eqx.filter_eval_shape(gradient, W, Y0)
    assert jtu.tree_map(jnp.shape, shapes) == jtu.tree_map(jnp.shape, expected)


#
# Many devices
#


@pytest.mark.long
def test_many_devices():
    # The number of devices is fixed when JAX starts.
    script = """
        import functools as ft
        import diffrax, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        import diffrax_reversible as dfxr

        jax.config.update("jax_enable_x64", True)
        assert jax.device_count() == 4
        # With axes that JAX takes care of: with those of an explicit mesh diffrax
        # itself does not work.
        mesh = Mesh(np.array(jax.devices()), ("x",))

        def loss(solver, controller, w, y0, sum_over_batch=True):
            def one(y0):
                sol = diffrax.diffeqsolve(
                    diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y)),
                    solver, 0.0, 1.0, 0.2, y0, w,
                    saveat=diffrax.SaveAt(ts=jnp.array([0.3, 1.0])),
                    stepsize_controller=controller,
                    adjoint=dfxr.ReversibleAdjoint(sum_over_batch=sum_over_batch),
                    max_steps=32,
                )
                return jnp.sum(jnp.sin(sol.ys))
            return jnp.sum(jax.vmap(one)(y0))

        w = jnp.array([[-0.6, 1.4], [-1.1, 0.2]])
        y0 = jnp.linspace(0.1, 3, 16).reshape(8, 2)
        split = NamedSharding(mesh, P("x"))
        whole = NamedSharding(mesh, P())
        shard_map = getattr(jax, "shard_map", None)
        if shard_map is None:
            from jax.experimental.shard_map import shard_map

        for solver, controller in [
            (dfxr.UReversible(diffrax.Heun()), diffrax.PIDController(1e-3, 1e-3)),
            (diffrax.ReversibleHeun(), diffrax.ConstantStepSize()),
        ]:
            gradient = jax.grad(ft.partial(loss, solver, controller), argnums=(0, 1))
            expected = jax.jit(gradient)(w, y0)
            sharded = jax.jit(gradient, in_shardings=(whole, split))
            ours = sharded(jax.device_put(w, whole), jax.device_put(y0, split))
            for a, b in zip(ours, expected):
                assert jnp.max(jnp.abs(a - b)) < 1e-10

            def local(w, y0):
                # Of this shard alone, and then of all.
                gw, gy = gradient(w, y0)
                return gw[None], gy

            mapped = jax.jit(shard_map(
                local, mesh=mesh, in_specs=(P(), P("x")), out_specs=(P("x"), P("x")),
                **CHECK,
            ))
            gw, gy = mapped(w, y0)
            assert jnp.max(jnp.abs(jnp.sum(gw, 0) - expected[0])) < 1e-10
            assert jnp.max(jnp.abs(gy - expected[1])) < 1e-10

        # (With the last of them, of which all elements make the same steps.)
        for sum_over_batch in (True, False):
            gradient = jax.grad(ft.partial(
                loss, solver, controller, sum_over_batch=sum_over_batch
            ))
            hlo = jax.jit(gradient, in_shardings=(whole, split)).lower(w, y0)
            bodies = list(_loop_bodies(hlo.compile().as_text()))
            # (Of booleans there are some: what a batch decides together.)
            sums = [re.search("f64.* all-reduce[(]", body) for body in bodies]
            assert any(sums) == sum_over_batch
        print("done")
    """
    # What is replicated is for the user to say; the argument was renamed in JAX 0.6.
    script = textwrap.dedent(script)
    check = "check_vma" if hasattr(jax, "shard_map") else "check_rep"
    script = script.replace("**CHECK", f"{check}=False")
    script = f"import re\n{inspect.getsource(_loop_bodies)}\n{script}"
    env = dict(os.environ)
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    env["JAX_PLATFORMS"] = "cpu"
    out = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().endswith("done")
