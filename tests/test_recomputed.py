"""Solvers that do not undo their steps: of which every state is recomputed.

The registry gives each of them the generic tests, against forward mode. Here are what
`ReversibleAdjoint` is given, what it costs, and solvers and terms of another kind.
"""

import functools as ft
import re

import diffrax
import equinox.internal as eqxi
import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import coupling_pullback, plan, recomputed, slots
from diffrax_reversible._method import explicit_rk

from .derivatives import agree, everything
from .helpers import relative_difference
from .test_counts import Counter
from .test_gradient import TOL, weighted_sum


CHECKPOINTING = diffrax.RecursiveCheckpointAdjoint()
W = jnp.array([[0.3, -1.2], [1.1, 0.2]])
Y0 = jnp.array([0.7, -0.2])
PID = diffrax.PIDController(rtol=1e-3, atol=1e-5)


def _field(t, y, w):
    return jnp.tanh(w @ y) * (1 + 0.3 * jnp.sin(t)) - 0.5 * y


def _solve(adjoint, params, *, solver=diffrax.Heun(), terms=None, **kwargs):
    y0, w = params
    options: dict = dict(
        saveat=diffrax.SaveAt(t1=True), max_steps=64, stepsize_controller=PID, dt0=0.1
    )
    options.update(kwargs)
    dt0 = options.pop("dt0")
    terms = diffrax.ODETerm(_field) if terms is None else terms
    return diffrax.diffeqsolve(
        terms, solver, 0.0, 1.3, dt0, y0, w, adjoint=adjoint, **options
    )


#
# How many states are stored
#


@hyp.given(st.integers(0, 10_000), st.none() | st.integers(1, 10_000))
def test_states_are_shared_out(num, max_steps):
    for is_undone in (False, True):
        if is_undone:
            num_slots, length = plan.share_out_undone(num, max_steps)
        else:
            num_slots, length = plan.share_out_recomputed(float(num), max_steps)
        assert num_slots >= 0 and length >= 1
        assert num_slots + length <= max(num, 1)
        # If each step can be recomputed once alone, then that is how it is.
        if max_steps is not None and num**2 >= 4 * max_steps and num > 1:
            assert (num_slots + 1) * length >= max_steps
        if is_undone:
            # See `Keeping`.
            assert length % 2 == 1
        elif max_steps is not None and num >= max_steps:
            # None is recomputed.
            assert (num_slots, length) == (0, max_steps)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 6, 10, 64, 1000, 4095, 4096])
def test_checkpoints_of_diffrax(max_steps):
    loop = lambda y: eqxi.while_loop(
        lambda y: y < 2.0,
        lambda y: 1.1 * y,
        y,
        kind="checkpointed",
        max_steps=max_steps,
    )
    # There are arrays with one number for each, and no others.
    jaxpr = str(jax.make_jaxpr(jax.grad(loop))(1.0))
    sizes = {int(n) for n in re.findall(r"f64\[(\d+)\]", jaxpr)}
    assert max(sizes) == plan.num_checkpoints_of_host(max_steps)


@ft.cache
def _by_checkpointing(solver, kwargs):
    loss = lambda params: weighted_sum(
        _solve(CHECKPOINTING, params, solver=solver, **dict(kwargs)).ys
    )
    return jax.jit(jax.value_and_grad(loss))((Y0, W))


@pytest.mark.parametrize("checkpoints", [0, 1, 2, 3, 7, 64, "auto"])
def test_checkpoints(checkpoints):
    # Some forty steps: from one that is recomputed from the start, each time, to all.
    kwargs = (("dt0", 1 / 31), ("stepsize_controller", diffrax.ConstantStepSize()))
    loss = lambda params: weighted_sum(
        _solve(dfxr.ReversibleAdjoint(checkpoints), params, **dict(kwargs)).ys
    )
    ours = jax.jit(jax.value_and_grad(loss))((Y0, W))
    # The same sums in another order.
    assert relative_difference(ours, _by_checkpointing(diffrax.Heun(), kwargs)) < TOL


@pytest.mark.parametrize("checkpoints", [5, "auto"])
def test_no_bound_on_the_number_of_steps(checkpoints):
    loss = lambda params: weighted_sum(
        _solve(
            dfxr.ReversibleAdjoint(checkpoints),
            params,
            solver=diffrax.Tsit5(),
            max_steps=None,
        ).ys
    )
    ours = jax.jit(jax.value_and_grad(loss))((Y0, W))
    assert relative_difference(ours, _by_checkpointing(diffrax.Tsit5(), ())) < TOL


def _count(solver, num_steps, checkpoints="auto"):
    counter = Counter()
    term = diffrax.ODETerm(lambda t, y, args: counter.vector_field(y))

    @jax.jit
    @jax.value_and_grad
    def gradient(y0):
        return diffrax.diffeqsolve(
            term,
            solver,
            0.0,
            1.0,
            1 / num_steps,
            y0,
            adjoint=dfxr.ReversibleAdjoint(checkpoints),
            max_steps=4096,
        ).ys[0]

    jax.block_until_ready(gradient(jnp.array(0.3)))
    return counter.take()


@pytest.mark.parametrize(
    "solver,stages,has_slope",
    [
        (diffrax.Heun(), 2, False),
        (diffrax.Tsit5(), 6, True),
        (diffrax.Euler(), 1, False),
    ],
)
def test_evaluations(solver, stages, has_slope):
    n = 16
    evaluations, pullbacks = _count(solver, n)
    # A step is made twice: in the solve, and with a pullback. And a slope at both ends
    # of the solve, and at the start of a segment, of no steps.
    assert evaluations == 2 * stages * n + (3 if has_slope else 0)
    assert pullbacks == stages * n + (2 if has_slope else 0)


def test_evaluations_of_segments():
    # Of 20 steps each; and nothing is recomputed of the last 20.
    n = 50
    evaluations, pullbacks = _count(diffrax.Heun(), n, 40)
    assert evaluations == 2 * (n + 30 + n)
    assert pullbacks == 2 * n


def test_evaluations_if_all_states_are_stored():
    n = 50
    evaluations, pullbacks = _count(diffrax.Heun(), n, 4096)
    assert evaluations == 2 * (n + n)
    assert pullbacks == 2 * n


def test_evaluations_with_few_states():
    # From the start, for each segment of one step but for the last.
    n = 8
    evaluations, pullbacks = _count(diffrax.Heun(), n, 0)
    assert evaluations == 2 * (n + n * (n - 1) // 2 + n)
    assert pullbacks == 2 * n


def _bytes(adjoint, y0, field, solver, max_steps, batch, controller):
    def loss(y0, w):
        one = lambda y0: jnp.sum(
            diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                0.0,
                1.0,
                0.01,
                y0,
                w,
                adjoint=adjoint,
                max_steps=max_steps,
                stepsize_controller=controller,
            ).ys
        )
        return jnp.sum(jax.vmap(one)(y0)) if batch else one(y0)

    y0 = jnp.broadcast_to(y0, (batch, *y0.shape)) if batch else y0
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(y0, jnp.array(0.5)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "size,batch,max_steps", [(2, None, 4096), (1000, None, 4096), (2, 32, 4096)]
)
def test_memory(size, batch, max_steps):
    # Of a solve with adaptive steps, for each element of a batch.
    arguments = (
        jnp.ones(size),
        lambda t, y, w: -w * jnp.sin(y),
        diffrax.Tsit5(),
        max_steps,
        batch,
        PID,
    )
    assert _bytes(dfxr.ReversibleAdjoint(), *arguments) < _bytes(
        CHECKPOINTING, *arguments
    )


@pytest.mark.long
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA evaluates it once then")
def test_memory_of_wide_layers():
    # What is within the stages is much larger than `y`: it is recomputed, one by one.
    w = jnp.linspace(0.1, 1, 32)

    def loss(adjoint, solver, max_steps, y0, c):
        sol = diffrax.diffeqsolve(
            # (That the weights are closed over makes no difference.)
            diffrax.ODETerm(
                lambda t, y, _: jnp.tanh((y @ w[None]) @ c) @ c.T @ w[:, None]
            ),
            solver,
            *(0.0, 1.0, 0.2),
            y0,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        return jnp.sum(sol.ys**2)

    def gradient(adjoint, solver=diffrax.Tsit5(), max_steps=8):
        fn = ft.partial(loss, adjoint, solver, max_steps)
        grad = jax.jit(jax.grad(fn, (0, 1)))
        arguments = jnp.linspace(-1, 1, 128)[:, None], jnp.eye(32) / 8
        compiled = grad.lower(*arguments).compile()
        return compiled(*arguments), compiled.memory_analysis().temp_size_in_bytes

    expected, default = gradient(CHECKPOINTING)
    for solver in (
        diffrax.Tsit5(),
        diffrax.Tsit5(scan_kind="lax"),
        dfxr.UReversible(diffrax.Tsit5()),
    ):
        grad, num_bytes = gradient(dfxr.ReversibleAdjoint(), solver)
        assert relative_difference(grad, expected) < TOL
        assert num_bytes < 1.75 * default
    # With many more steps there is room for all stages of a step.
    _, few = gradient(dfxr.ReversibleAdjoint())
    _, more = gradient(dfxr.ReversibleAdjoint(), max_steps=10_000)
    assert more > 1.5 * few


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Tsit5(),
        diffrax.Tsit5(scan_kind="lax"),
        dfxr.UReversible(diffrax.Bosh3()),
    ],
    ids=["unrolled", "in a loop", "undone"],
)
def test_stages_that_are_recomputed(solver, monkeypatch):
    # Of a system as small as this one they would not be.
    monkeypatch.setattr(plan, "_OF_LOOPS", 0)
    monkeypatch.setattr(plan, "_PART", 1.0)
    monkeypatch.setattr(plan, "_PART_OF_CONSTS", 0.0)
    seen, terms = [], explicit_rk.Checkpointed
    check = lambda x: seen.append(x) or terms(x)
    for module in (recomputed, coupling_pullback):
        monkeypatch.setattr(module, "Checkpointed", check)
    kwargs = dict(
        solver=solver,
        saveat=diffrax.SaveAt(ts=jnp.array([0.45, 0.8]), t1=True, dense=True),
        stepsize_controller=diffrax.ClipStepSizeController(
            PID, jump_ts=jnp.array([0.6])
        ),
    )
    agree(
        lambda adjoint, params: everything(_solve(adjoint, params, **kwargs)), (Y0, W)
    )
    assert len(seen) > 0


def test_effects_within_wide_layers():
    # JAX makes no effect twice, so that these stages cannot be recomputed.
    w = jnp.linspace(0.1, 1, 32)[None]

    def field(t, y, c):
        jax.experimental.io_callback(lambda t: None, None, jax.lax.stop_gradient(t))
        return jnp.tanh(c * y @ w) @ w.T

    def loss(adjoint, c):
        y0, term = jnp.ones((64, 1)), diffrax.ODETerm(field)
        sol = diffrax.diffeqsolve(
            *(term, diffrax.Tsit5(), 0.0, 1.0, 0.2, y0, c),
            adjoint=adjoint,
            max_steps=8,
        )
        return jnp.sum(sol.ys**2)

    grads = [
        jax.jit(jax.grad(ft.partial(loss, adjoint)))(0.3)
        for adjoint in (CHECKPOINTING, dfxr.ReversibleAdjoint())
    ]
    assert relative_difference(*grads) < TOL


#
# Solvers and terms of other kinds
#


def _implicit_explicit():
    explicit = diffrax.ODETerm(_field)
    implicit = diffrax.ODETerm(lambda t, y, w: -w[0, 0] * y)
    terms = diffrax.MultiTerm(explicit, implicit)
    return dict(solver=diffrax.KenCarp3(), terms=terms)


def _ito():
    path = diffrax.VirtualBrownianTree(0.0, 1.3, 0.05, (), jax.random.key(0))
    noise = diffrax.ControlTerm(lambda t, y, w: w[0, 0] * jnp.cos(y), path)
    return dict(
        solver=diffrax.ItoMilstein(),
        terms=diffrax.MultiTerm(diffrax.ODETerm(_field), noise),
        stepsize_controller=diffrax.ConstantStepSize(),
    )


KINDS = {
    "IMEX": _implicit_explicit,
    "Ito": _ito,
    "implicit, an event": lambda: dict(
        solver=diffrax.Kvaerno5(),
        event=diffrax.Event(
            lambda t, y, args, **kwargs: y[0] - 0.6, optimistix.Newton(1e-10, 1e-10)
        ),
    ),
    "jumps": lambda: dict(
        solver=diffrax.Bosh3(),
        stepsize_controller=diffrax.ClipStepSizeController(
            PID, jump_ts=jnp.array([0.45, 0.9]), step_ts=jnp.array([0.7])
        ),
        saveat=diffrax.SaveAt(ts=jnp.array([0.45, 0.8]), steps=2, t0=True),
    ),
    "solver state": lambda: dict(
        solver=diffrax.Tsit5(), saveat=diffrax.SaveAt(t1=True, solver_state=True)
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    kwargs = KINDS[kind]()
    controller = kwargs.get("stepsize_controller")
    if isinstance(controller, diffrax.ClipStepSizeController):
        # (Of times of output at steps that a controller has chosen it is refused.)
        of = lambda sol: weighted_sum(sol.ys)
    elif kwargs["solver"] == diffrax.Tsit5():
        of = lambda sol: weighted_sum((sol.ys, sol.solver_state[1]))
    else:
        of = everything
    agree(lambda adjoint, params: of(_solve(adjoint, params, **kwargs)), (Y0, W))


@pytest.mark.long
def test_langevin():
    drift = diffrax.UnderdampedLangevinDriftTerm(0.7, 1.1, lambda x, w: w @ x)
    path = diffrax.VirtualBrownianTree(
        0.0, 1.3, 0.05, (2,), jax.random.key(0), diffrax.SpaceTimeTimeLevyArea
    )
    noise = diffrax.UnderdampedLangevinDiffusionTerm(0.7, 1.1, path)

    def gradient(adjoint):
        loss = lambda params: weighted_sum(
            _solve(
                adjoint,
                ((params[0], params[0][::-1]), params[1]),
                solver=diffrax.ShOULD(0.1),
                terms=diffrax.MultiTerm(drift, noise),
                stepsize_controller=diffrax.ConstantStepSize(),
            ).ys
        )
        return jax.jit(jax.value_and_grad(loss))((Y0, W))

    ours, expected = gradient(dfxr.ReversibleAdjoint()), gradient(CHECKPOINTING)
    assert relative_difference(ours, expected) < TOL


def test_resumed_with_another_slope():
    # The first stage of a solve that is resumed is what it is given, whatever that is.
    def loss(adjoint, params):
        y0, w, slope = params
        return weighted_sum(
            _solve(
                adjoint,
                (y0, w),
                solver=diffrax.Tsit5(),
                solver_state=(jnp.array(False), slope),
            ).ys
        )

    _, (_, _, grad) = agree(loss, (Y0, W, jnp.array([0.4, -1.0])))
    assert jnp.all(grad != 0)


def test_no_steps():
    @jax.jit
    def solve(t1):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_field),
            diffrax.Tsit5(),
            0.0,
            t1,
            0.1,
            Y0,
            W,
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            adjoint=dfxr.ReversibleAdjoint(),
        )

    first_step, slope = solve(0.0).solver_state
    assert first_step and jnp.all(slope == 0)
    first_step, slope = solve(0.1).solver_state
    assert not first_step and jnp.all(slope != 0)


#
# Batches and modes
#


@pytest.mark.parametrize(
    "solver,sums",
    [(diffrax.Tsit5(), False), (diffrax.Kvaerno3(), True)],
    ids=["Tsit5", "Kvaerno3"],
)
def test_batch_with_steps_of_their_own(solver, sums):
    scales = jnp.linspace(0.2, 8.0, 4)
    ours = dfxr.ReversibleAdjoint(checkpoints=6, sum_over_batch=sums)

    def gradient(adjoint):
        def loss(w):
            one = lambda scale: weighted_sum(
                _solve(adjoint, (scale * Y0, w * scale), solver=solver).ys
            )
            return jnp.sum(jax.vmap(one)(scales))

        return jax.jit(jax.grad(loss))(W)

    assert relative_difference(gradient(ours), gradient(CHECKPOINTING)) < TOL


@pytest.mark.parametrize("undoes", [False, True])
def test_batch_stores_together(undoes, monkeypatch):
    # Each element has rejected steps of its own, and the first is at rest.
    solver = dfxr.UReversible(diffrax.Heun()) if undoes else diffrax.Heun()
    num_stores, num = [], 9
    add = slots.Keeping.add

    def counted(keeping, k, number, state, pred):
        jax.debug.callback(lambda x: num_stores.append(bool(x)), eqxi.unvmap_any(pred))
        return add(keeping, k, number, state, pred)

    monkeypatch.setattr(slots.Keeping, "add", counted)

    def loss(adjoint, mu):
        def one(y0):
            field = lambda t, y, mu: jnp.stack(
                [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]]
            )
            sol = diffrax.diffeqsolve(
                *(diffrax.ODETerm(field), solver, 0.0, 6.0, 0.5, y0, mu),
                stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-3),
                adjoint=adjoint,
                max_steps=256,
            )
            stats = sol.stats
            return jnp.sum(sol.ys), (stats["num_steps"], stats["num_accepted_steps"])

        starts = jnp.stack([jnp.linspace(0.0, 2.5, 4), jnp.linspace(0.0, 1.0, 4)], 1)
        out, stats = jax.vmap(one)(starts)
        return jnp.sum(out), stats

    def gradient(adjoint):
        grad = jax.jit(jax.grad(ft.partial(loss, adjoint), has_aux=True))
        out = grad(6.0)
        jax.effects_barrier()
        return out

    grad, (attempted, accepted) = gradient(dfxr.ReversibleAdjoint(checkpoints=num))
    expected, _ = gradient(CHECKPOINTING)
    assert relative_difference(grad, expected) < TOL
    share_out = plan.share_out_undone if undoes else plan.share_out_recomputed
    _, length = share_out(num if undoes else float(num), 256)
    assert jnp.sum(attempted - accepted) > 2 * length
    # Fewer than there would be one by one.
    most = jnp.max(attempted) // length
    assert 3 <= sum(num_stores) <= most < jnp.sum((accepted - 1) // length)


@pytest.mark.parametrize("every", [1, 2])
def test_batch_stores_within_segments(every):
    # What is stored when a segment is recomputed may lie within one before it. (Steps
    # are short next to the time, and small next to `y`: if one were taken for another
    # then nothing else would tell.)
    @ft.partial(jax.jit, static_argnums=0)
    def gradient(adjoint, theta, dt0, tol):
        def loss(theta, dt0, tol):
            field = lambda t, y, theta: theta * jnp.sin(70 * (t - 1000.0)) + 1e-9 * y
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                dfxr.UReversible(diffrax.Heun()),
                *(1000.0, 1000.2, dt0, jnp.array([1e4]), theta),
                stepsize_controller=diffrax.PIDController(rtol=0, atol=tol),
                adjoint=adjoint,
                max_steps=300,
            )
            return jnp.sum(sol.ys)

        return jax.vmap(jax.grad(loss))(theta, dt0, tol)

    batch = (
        jnp.linspace(1.0, 2.0, 6),
        jnp.array([1e-1, 2e-3, 5e-2, 1e-3, 2e-2, 1e-1]),
        jnp.array([1e-6, 1e-4, 1e-7, 1e-5, 1e-3, 3e-6]),
    )
    ours = dfxr.ReversibleAdjoint(checkpoints=5, checkpoint_every=every)
    grads = [gradient(adjoint, *batch) for adjoint in (ours, CHECKPOINTING)]
    # Numbers of 1e4 in which steps change the sixth digit.
    assert jnp.all(jnp.abs(grads[0] - grads[1]) < 1e-6 * jnp.abs(grads[1]))


@pytest.mark.long
def test_hessian():
    def loss(adjoint, y0):
        saveat = diffrax.SaveAt(ts=jnp.array([0.5, 1.3]))
        return weighted_sum(
            _solve(adjoint, (y0, W), solver=diffrax.Tsit5(), saveat=saveat).ys
        )

    ours = ft.partial(loss, dfxr.ReversibleAdjoint())
    expected = jax.jit(jax.jacfwd(jax.jacfwd(ft.partial(loss, diffrax.ForwardMode()))))
    expected = expected(Y0)
    # Of about twenty steps, and the second derivatives are of size 1.
    assert np.max(np.abs(jax.jit(jax.hessian(ours))(Y0) - expected)) < TOL


class OwnInit(diffrax.Tsit5):
    def init(self, terms, t0, t1, y0, args):
        return super().init(terms, t0, t1, y0, args)


def test_init_of_its_own():
    def loss(adjoint, params):
        return weighted_sum(_solve(adjoint, params, solver=OwnInit()).ys)

    agree(loss, (Y0, W))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("max_steps", [9, 15, 24])
def test_runs_out_with_a_rejected_step(max_steps):
    # That is not to take the place of one that is needed.
    def solve(adjoint, params, max_steps):
        vector_field = lambda t, y, w: jnp.where(t > 0.5, 1e3 * jnp.cos(1e5 * t), w @ y)
        return _solve(
            adjoint,
            params,
            solver=diffrax.Bosh3(),
            terms=diffrax.ODETerm(vector_field),
            dt0=0.01,
            max_steps=max_steps,
            throw=False,
        )

    before, after = [
        solve(diffrax.ForwardMode(), (Y0, W), n) for n in (max_steps - 1, max_steps)
    ]
    assert before.stats["num_accepted_steps"] == after.stats["num_accepted_steps"]

    def loss(adjoint, params):
        return weighted_sum(solve(adjoint, params, max_steps).ys)

    agree(loss, (Y0, W), adjoint=dfxr.ReversibleAdjoint(checkpoints=3))


@pytest.mark.long
@pytest.mark.one_in(1)
@pytest.mark.parametrize("solver", [diffrax.Heun(), dfxr.ReversibleHeun()])
def test_a_jump_where_a_step_ends(solver):
    # A step that is recomputed ends just where it did, or it is on the other side. (So
    # it is by default, for some of these.)
    def loss(y0, jump):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: jnp.where(t >= jump, 0.003, 0.0) * y),
            solver,
            0.0,
            300.0,
            1.0,
            y0,
            adjoint=dfxr.ReversibleAdjoint(checkpoints=12),
            max_steps=300,
        )
        return sol.ys[0] ** 2

    jumps = jnp.arange(40.0, 260.0)
    one = jax.value_and_grad(loss)
    each = jax.jit(lambda jumps: jax.lax.map(lambda jump: one(0.5, jump), jumps))
    values, grads = each(jumps)
    # The loss is homogeneous.
    eps = jnp.finfo(jnp.float64).eps
    assert np.allclose(grads, 2 * values / 0.5, rtol=300 * 100 * eps, atol=0)
