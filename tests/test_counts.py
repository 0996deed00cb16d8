"""What is claimed to be cheap is counted: evaluations, traces, bytes, copies."""

import math
import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint import backward, plan, verify
from diffrax_reversible._method import controlled

from .helpers import from_term, GenericLeapfrog, relative_difference, SOLVERS


#
# Evaluations of the vector field
#


is_same = verify.Found.is_same


class Counter:
    """A vector field that counts how often it is evaluated and pulled back, when it is
    run, not when it is traced. It is linear if a `rate` is given."""

    def __init__(self, vmap_method=None, rate=None):
        self.evaluations = 0
        self.pullbacks = 0

        def count(name):
            def callback(y):
                setattr(self, name, getattr(self, name) + 1)
                return np.zeros_like(y)

            return lambda y: (
                y + jax.pure_callback(callback, y, y, vmap_method=vmap_method)
            )

        # Its derivative is made of its value, so that no evaluation is unused.
        @jax.custom_vjp
        def vector_field(y):
            y = jnp.exp(y / 4) if rate is None else rate * y
            return count("evaluations")(y)

        def fwd(y):
            out = vector_field(y)
            return out, out

        def bwd(out, grad):
            slope = out / 4 if rate is None else rate
            return (count("pullbacks")(slope * grad),)

        vector_field.defvjp(fwd, bwd)
        self.vector_field = vector_field

    def take(self):
        jax.effects_barrier()
        out = self.evaluations, self.pullbacks
        self.evaluations = self.pullbacks = 0
        return out


@pytest.fixture(autouse=True)
def _long_records(monkeypatch):
    """No step is recomputed for want of a record; and what is rebuilt is compared even
    if it is just the same."""
    monkeypatch.setattr(plan, "_PART_OF_RECORD", 1e9)
    monkeypatch.setattr(verify.Found, "is_same", lambda self, fns: jnp.array(False))


def _count(
    solver,
    controller=None,
    pair=False,
    interpolates=True,
    checkpoints=0,
    rate=None,
    num_steps=10,
):
    counter = Counter(rate=rate)
    term = diffrax.ODETerm(lambda t, y, args: counter.vector_field(y))
    terms = (term, term) if pair else term
    ts = jnp.linspace(0, 1, 4)
    saveat = diffrax.SaveAt(ts=ts) if interpolates else diffrax.SaveAt(t1=True)

    @jax.jit
    def solve(y0):
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            1 / num_steps,
            (y0, y0) if pair else y0,
            stepsize_controller=controller or diffrax.ConstantStepSize(),
            saveat=saveat,
            adjoint=dfxr.ReversibleAdjoint(checkpoints=checkpoints),
            max_steps=2 * num_steps,
        )
        loss = sum(jnp.sum(x) for x in jax.tree.leaves(sol.ys))
        return loss, sol.stats["num_steps"]

    y0 = jnp.array(0.3)
    _, num_steps = jax.block_until_ready(solve(y0))
    forward = counter.take()
    assert forward[1] == 0
    jax.block_until_ready(jax.jit(jax.grad(solve, has_aux=True))(y0))
    evaluations, pullbacks = counter.take()
    # Two of each to compare what has been rebuilt with the start.
    compared = 0 if pair or checkpoints > 0 else 2
    backward = evaluations - forward[0] - compared
    return int(num_steps), forward[0], backward, pullbacks - compared


@pytest.mark.parametrize(
    "base,stages",
    [
        (diffrax.Heun(), 2),
        (diffrax.Bosh3(), 3),
        (diffrax.Tsit5(), 6),
        (diffrax.Dopri5(scan_kind="lax"), 6),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("interpolates", [False, True])
def test_evaluations_u_reversible(base, stages, adaptive, interpolates):
    # With an error estimate too: its last stage is shared with the second increment.
    controller = diffrax.PIDController(rtol=1e-2, atol=1e-2) if adaptive else None
    n, forward, backward, pullbacks = _count(
        dfxr.UReversible(base), controller, interpolates=interpolates
    )
    assert forward == 2 * stages * n
    # (Of the last step, whose start is known, the second increment is of use for the
    # interpolation alone.)
    assert backward == 2 * stages * n - (0 if interpolates else stages)
    # The second increment is not differentiated, but for the slope at the end of the
    # step if that is a part of the interpolation.
    assert pullbacks == (stages + interpolates) * n


@pytest.mark.long
@pytest.mark.parametrize("base,stages", [(diffrax.Heun(), 2), (diffrax.Tsit5(), 6)])
def test_evaluations_where_every_state_is_kept(base, stages):
    n, forward, backward, pullbacks = _count(
        dfxr.UReversible(base), interpolates=False, checkpoints=64
    )
    assert forward == 2 * stages * n
    assert backward == pullbacks == stages * n


@pytest.mark.one_in(1)
@pytest.mark.parametrize(
    "base,stages,limit",
    [(diffrax.Heun(), 2, 2.0), (diffrax.Tsit5(), 6, 3.3), (diffrax.Dopri8(), 13, 3.7)],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("interpolates", [False, True])
def test_evaluations_at_the_limit_of_stability(base, stages, limit, interpolates):
    # The first step has `m = 1`; and of the others in a row with `m = 0` each makes the
    # second increment in the first period, and later one in each.
    periods = 4
    n, forward, backward, pullbacks = _count(
        dfxr.UReversible(base),
        interpolates=interpolates,
        checkpoints=256,
        rate=-0.95 * limit * (1 + periods * controlled._PERIOD),
        num_steps=1 + periods * controlled._PERIOD,
    )
    left_out = (periods - 1) * (controlled._PERIOD - 1)
    # (The slope at the end of the step is a part of the error estimate, or of the
    # interpolation.)
    assert forward == 2 * stages * n - (stages - 1) * left_out
    assert pullbacks == (stages + interpolates) * n
    # Not counting the steps that are made again, once: for the gradient no second
    # increment is, but for the interpolation.
    pulled = forward if interpolates else stages * n
    assert pulled <= backward <= pulled + forward


def test_evaluations_of_a_batch_at_the_limit_of_stability():
    # The second increment is made if any element needs it.
    n, period, num = 64, controlled._PERIOD, []

    def count(y):
        num.append(1)
        return np.zeros_like(y)

    def vector_field(t, y, rate):
        out = -rate * y
        return out + jax.pure_callback(count, out, out, vmap_method="expand_dims")

    @jax.jit
    @jax.vmap
    def solve(rate):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(vector_field),
            dfxr.UReversible(diffrax.Tsit5()),
            0.0,
            1.0,
            1 / (n + 1),
            jnp.array(1.0),
            rate,
            adjoint=dfxr.ReversibleAdjoint(),
            max_steps=n + 1,
        ).ys

    def evaluations(*rates):
        num.clear()
        jax.block_until_ready(solve(jnp.array(rates)))
        jax.effects_barrier()
        return len(num)

    stiff, mild = 3.0 * n, 1.0
    assert evaluations(stiff, mild) == 12 * (n + 1)
    left_out = (n // period - 1) * (period - 1)
    assert evaluations(stiff, stiff) == 12 * (n + 1) - 5 * left_out


def test_evaluations_u_reversible_with_a_number():
    n, forward, backward, pullbacks = _count(dfxr.UReversible(diffrax.Heun(), 0.999))
    assert forward == backward == pullbacks == 4 * n


@pytest.mark.long
@pytest.mark.parametrize("coupling_parameter", ["auto", 0.9])
def test_stages_in_a_loop(coupling_parameter):
    num_traces = 0

    def vector_field(t, y, args):
        nonlocal num_traces
        num_traces += 1
        a, (b, c) = y
        p, q = args
        return jnp.cos(t) * jnp.sin(p * b)[:2], (q * a[0] - b, -c)

    def gradient(scan_kind):
        base = diffrax.Tsit5(scan_kind=scan_kind)

        @jax.jit
        @jax.value_and_grad
        def run(params):
            y0, args = params
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(vector_field),
                dfxr.UReversible(base, coupling_parameter),
                0.0,
                -1.0,
                -0.2,
                y0,
                args,
                saveat=diffrax.SaveAt(ts=jnp.array([-0.3, -1.0])),
                stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
                adjoint=dfxr.ReversibleAdjoint(),
                max_steps=20,
            )
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(sol.ys))

        y0 = jnp.ones(2), (jnp.arange(3.0), jnp.array(1.5))
        out = run((y0, (jnp.array(0.8), jnp.array(1.2))))
        return out, num_traces

    expected, unrolled_traces = gradient(None)
    num_traces = 0
    ours, traces = gradient("lax")
    # The order of summation is another: a few roundings in each of a few steps.
    assert relative_difference(ours, expected) < 100 * jnp.finfo(jnp.float64).eps
    # The stages make all the difference.
    assert traces < unrolled_traces / 2


def _deep(num_layers, y):
    for _ in range(num_layers):
        y = jnp.sin(jnp.ones((y.size, y.size)) @ y)
    return y


def test_no_stage_is_fused_into_others():
    def step(y):
        term = diffrax.ODETerm(lambda t, y, args: jnp.sin(y))
        solver = dfxr.UReversible(diffrax.Tsit5(), 0.9)
        return solver.step(term, 0.0, 0.1, y, None, y, False)

    hlo = jax.jit(step).lower(jnp.ones(100)).compile().as_text()
    # (Of computations, each of which is a loop over the elements.)
    counts = [computation.count(" sine(") for computation in hlo.split("\n\n")]
    assert sum(counts) == 12
    assert max(counts) == 1


@pytest.mark.one_in(1)
@pytest.mark.parametrize("num_layers,scan", [(1, False), (100, True)])
def test_how_stages_are_made(num_layers, scan):
    num_traces = 0

    def counted(t, y, args):
        nonlocal num_traces
        num_traces += 1
        return _deep(num_layers, y)

    def step(y):
        term = diffrax.ODETerm(counted)
        solver = dfxr.UReversible(diffrax.Tsit5(), 0.9)
        return solver.step(term, 0.0, 0.1, y, None, y, False)

    jax.make_jaxpr(step)(jnp.ones(3))
    assert (num_traces < 12) == scan


def test_evaluations_reversible_heun():
    n, forward, backward, pullbacks = _count(dfxr.ReversibleHeun())
    # One more at the very start, `solver.init`, and at the very end, where the way back
    # begins.
    assert forward == n + 1
    assert backward == n + 1
    assert pullbacks == n + 1


def test_what_is_rebuilt_just_the_same(monkeypatch):
    compared = _count(dfxr.ReversibleHeun(), rate=0.0)
    monkeypatch.setattr(verify.Found, "is_same", is_same)
    n, forward, backward, pullbacks = _count(dfxr.ReversibleHeun(), rate=0.0)
    # (Of what is linear only one needs to be evaluated.)
    assert compared == (n, forward, backward + 1, pullbacks + 2)


def test_evaluations_leapfrog_midpoint():
    assert _count(dfxr.LeapfrogMidpoint()) == (10, 10, 10, 10)


def test_evaluations_semi_implicit_euler():
    assert _count(dfxr.SemiImplicitEuler(), pair=True) == (10, 20, 20, 20)


def test_evaluations_asynchronous_leapfrog():
    # One more at the very start, `solver.init`, with its pullback.
    assert _count(dfxr.AsynchronousLeapfrog()) == (10, 11, 10, 11)
    # None more where there is no need for a sync.
    assert _count(dfxr.AsynchronousLeapfrog(full_sync=True)) == (10, 11, 10, 11)


@pytest.mark.parametrize(
    "solver,stages",
    [
        (dfxr.StormerVerlet(), 1),
        (dfxr.StormerVerlet("position"), 1),
        (dfxr.BlanesMoan4(), 6),
    ],
)
def test_evaluations_splitting(solver, stages):
    # Of both vector fields; and one more at the very start and at the very end.
    n, forward, backward, pullbacks = _count(solver, pair=True)
    assert forward == pullbacks == 2 * stages * n + 1
    # What is in the middle of the first step and of the last, whose starts are known,
    # is found from there.
    assert backward == 2 * stages * n + 1 + 2 * (2 * stages - 2)


@pytest.mark.parametrize("solver,stages", [(dfxr.EES25(), 3), (dfxr.EES27(), 4)])
def test_evaluations_effectively_symmetric(solver, stages, monkeypatch):
    # A step back, and then a step to differentiate it; if the defect does not matter.
    monkeypatch.setattr(verify, "tolerance", lambda y: 1e9)
    n, forward, backward, pullbacks = _count(solver)
    assert (forward, backward, pullbacks) == (stages * n, 2 * stages * n, stages * n)


def test_evaluations_generic():
    # `backward_step`, and then `step` once more to differentiate it.
    n, forward, backward, pullbacks = _count(GenericLeapfrog())
    assert (n, forward, backward, pullbacks) == (10, 11, 20, 11)


#
# Traces
#


@pytest.mark.parametrize("name", SOLVERS)
def test_traces(name):
    case = SOLVERS[name]
    num_traces = 0

    def vector_field(t, y, args):
        nonlocal num_traces
        num_traces += 1
        return -args * y

    @jax.jit
    def gradient(y0, t1):
        # Everything that can be made anew at every call, is.
        term = diffrax.ODETerm(vector_field)

        def loss(y0):
            sol = diffrax.diffeqsolve(
                from_term(case, term),
                case.solver,
                0.0,
                t1,
                0.1,
                (y0, y0) if case.pair else y0,
                y0,
                adjoint=dfxr.ReversibleAdjoint(),
                max_steps=20,
            )
            return sum(jnp.sum(x) for x in jax.tree.leaves(sol.ys))

        return jax.grad(loss)(y0)

    gradient(jnp.array(1.0), jnp.array(1.0))
    assert num_traces > 0
    num_traces = 0
    gradient(jnp.array(2.0), jnp.array(0.5))
    assert num_traces == 0


#
# Bytes
#


def _compiled(
    solver,
    max_steps,
    batch=None,
    jumps=False,
    size=100,
    adaptive=False,
    checkpoints=8,
):
    controller = diffrax.ConstantStepSize()
    if adaptive or jumps:
        controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    if jumps:
        controller = diffrax.ClipStepSizeController(controller, jump_ts=[0.5])

    def loss(y0, args):
        def solve(y0):
            sol = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -args * jnp.sin(y)),
                solver,
                0.0,
                1.0,
                1 / max_steps,
                y0,
                args,
                stepsize_controller=controller,
                adjoint=dfxr.ReversibleAdjoint(checkpoints),
                max_steps=max_steps,
            )
            return jnp.sum(sol.ys)

        return solve(y0) if batch is None else jnp.sum(jax.vmap(solve)(y0))

    y0 = jnp.ones(size if batch is None else (batch, size))
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(y0, jnp.array(0.5)).compile()


def _bytes_per_step(**kwargs):
    # Whole rows of the record. (If it is short, something else takes more.)
    few, many = 160 * 31, 320 * 31
    temp = [
        _compiled(max_steps=n, checkpoints=62, **kwargs)
        .memory_analysis()
        .temp_size_in_bytes
        for n in (few, many)
    ]
    per_step = (temp[1] - temp[0]) / (many - few)
    return per_step, temp[0] - per_step * few


RK = dfxr.UReversible(diffrax.Heun())


@pytest.mark.long
@pytest.mark.parametrize(
    "kwargs,expected",
    [
        # The time of an even step, and the coupling, in a byte each.
        (dict(solver=RK), 2),
        (dict(solver=dfxr.UReversible(diffrax.Heun(), 0.999)), 1),
        (dict(solver=dfxr.ReversibleHeun()), 1),
        # The step before is recorded by the solver.
        (dict(solver=dfxr.LeapfrogMidpoint()), 9),
        # A batch that makes the same steps records them once.
        (dict(solver=dfxr.ReversibleHeun(), batch=8), 1),
        # Each element of a batch has its own couplings.
        (dict(solver=RK, batch=8), 1 + 8),
        # Times that were chosen.
        (dict(solver=RK, batch=8, adaptive=True), 8 * 9),
        (dict(solver=RK, jumps=True), 18),
    ],
)
def test_memory(kwargs, expected):
    per_step, constant = _bytes_per_step(**kwargs)
    # (Besides, for each segment of 31 there are a number, a time, a length and a mark.)
    batch = kwargs.get("batch") or 1
    assert 0 < per_step - expected <= 21 * batch / 31 + 0.01
    # And a few copies of `y`, of 800 bytes each; and those that are stored, of which
    # each has two or three.
    copies = 130 + 3 * 65
    assert constant < copies * 800 * batch


def test_memory_of_parameters():
    # Their gradient is made where it is returned, and nothing else is of their size.
    def loss(params, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, params: jnp.tanh(params @ y)),
            RK,
            0.0,
            1.0,
            1 / 64,
            y0,
            params,
            adjoint=dfxr.ReversibleAdjoint(checkpoints=2),
            max_steps=64,
        )
        return jnp.sum(sol.ys)

    params, y0 = jnp.eye(64), jnp.ones(64)
    compiled = jax.jit(jax.grad(loss)).lower(params, y0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params.nbytes


def test_no_more_slots_than_steps():
    def size(n):
        compiled = _compiled(RK, n, checkpoints=100)
        return compiled.memory_analysis().temp_size_in_bytes

    # Each has two numbers for each in `y`, of 800 bytes. (Of 60 steps there are at most
    # four segments of 16.)
    assert 12 * 1600 < size(60) - size(4) < 21 * 1600


def _loop_bodies(hlo: str):
    bodies = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    for name in bodies:
        start = re.search(rf"^%?{re.escape(name)} .*{{$", hlo, re.MULTILINE)
        assert start is not None
        yield hlo[start.end() : hlo.index("\n}", start.end())]


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_copies_of_the_record(adaptive):
    batch, rows = 8, 39
    compiled = _compiled(RK, 31 * rows, batch=batch, adaptive=adaptive, checkpoints=62)
    hlo = compiled.as_text()
    dtype = "f64" if adaptive else "s8"
    dims = (f"{rows},31", f"{batch},{rows},31", f"{rows},31,{batch}")
    shapes = tuple(f"{dtype}[{x}]" for x in dims)
    assert any(shape in hlo for shape in shapes)
    num_bodies = 0
    for body in _loop_bodies(hlo):
        num_bodies += 1
        for line in body.splitlines():
            result = line.partition("=")[2].strip()
            if result.startswith(shapes):
                assert not re.search(r"\b(copy|select)\(", result), line
    assert num_bodies >= 2


def test_no_copies_of_the_slots():
    num_slots, _ = plan.share_out_undone(13, 200)
    hlo = _compiled(RK, 200, checkpoints=13).as_text()
    slots = f"f64[{num_slots},100]"
    assert slots in hlo
    for body in _loop_bodies(hlo):
        for line in body.splitlines():
            result = line.partition("=")[2].strip()
            assert not re.match(rf"{re.escape(slots)}\S* copy\(", result), line


def test_the_body_is_batched_less_often(monkeypatch):
    # That of the backward pass, and those of the loops in it.
    num = 0

    @jax.custom_batching.custom_vmap
    def slope(y):
        return -y

    @slope.def_vmap
    def _(axis_size, in_batched, y):
        nonlocal num
        num += 1
        return -y, in_batched[0]

    def loss(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: slope(jax.lax.stop_gradient(y)) - y),
            dfxr.UReversible(diffrax.Heun()),
            0.0,
            1.0,
            0.01,
            y0,
            adjoint=dfxr.ReversibleAdjoint(),
            max_steps=100,
        )
        return jnp.sum(sol.ys)

    def count():
        nonlocal num
        num = 0
        jax.jit(jax.vmap(jax.grad(loss))).lower(jnp.ones((3, 2)))
        return num

    ours = count()
    monkeypatch.setattr(backward, "as_batched", lambda tree, like: tree)
    # (It was 46 for 78.)
    assert 0 < ours < 0.8 * count()


@pytest.mark.parametrize("solver", [RK, dfxr.UReversible(diffrax.Heun(), 0.999)])
def test_inner_loops_are_small(solver):
    # Those over steps, forwards, back, and making them again: XLA runs a loop with
    # little overhead only if it touches no array of more than 512 bytes. (Whether the
    # second increment is made again is a branch, which costs less than that.)
    hlo = _compiled(solver, max_steps=1000, size=2).as_text()
    num_small = 0
    for body in _loop_bodies(hlo):
        shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", body)
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        num_small += largest <= 64
    assert num_small >= 3
