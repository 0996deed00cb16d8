"""The gradient of shared parameters is summed over a batch within the backward pass,
where that is what it is, and nowhere else."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint.linear import AbstractLinear, apply

from .helpers import GenericLeapfrog, relative_difference
from .test_counts import Counter
from .test_gradient import TOL, weighted_sum


RK = dfxr.UReversible(diffrax.Heun())
PUBLISHED = dfxr.UReversible(diffrax.Heun(), 0.999)
HEUN = dfxr.ReversibleHeun()
CONSTANT = diffrax.ConstantStepSize()
PID = diffrax.PIDController(rtol=1e-2, atol=1e-3)
B = 3
W = jnp.array([[-0.6, 1.4], [-1.1, 0.2]])
# Of different sizes, so that step counts differ where steps are adaptive.
Y0 = jnp.array([[0.1, 0.2], [1.0, -0.5], [3.0, 2.0]])
S = jnp.array([0.5, 1.0, 2.0])
ADJOINT = dfxr.ReversibleAdjoint(sum_over_batch=True)


def _loss(solver, controller, saveat, w, y0, s, adjoint=ADJOINT, throw=True):
    args = {"w": w, "label": "args", "count": jnp.array(2)}

    def vector_field(t, y, args):
        return args["count"] * (1 + 0.2 * t) * jnp.tanh(args["w"] @ y) - s * y

    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        0.0,
        1.0,
        0.2,
        y0,
        args,
        saveat=saveat(w),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=128,
        throw=throw,
    )
    return weighted_sum(sol.ys)


def _end(w):
    return diffrax.SaveAt(t1=True)


def _times(w):
    return diffrax.SaveAt(ts=jnp.array([0.0, 0.1, 0.5, 0.55]))


# Which closes over a parameter, and has one that the vector field has too.
def _function(w):
    fn = lambda t, y, args: jnp.sin(args["w"] @ w @ y)
    return diffrax.SaveAt(ts=jnp.array([0.1, 0.5]), steps=True, fn=fn)


def _one_by_one(loss, w, y0, s):
    """Gradients of each element of the batch."""
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    grads = [gradient(w, y0[i], s[i]) for i in range(len(y0))]
    return jtu.tree_map(lambda *xs: jnp.stack(xs), *grads)


def _summed(grads):
    grad_w, *others = grads
    return (jnp.sum(grad_w, 0), *others)


def _total(loss, axes=(None, 0, 0), **kwargs):
    return lambda *x: jnp.sum(jax.vmap(loss, axes, **kwargs)(*x))


@pytest.mark.long
@pytest.mark.parametrize(
    "solver,controller,saveat",
    [
        (dfxr.UReversible(diffrax.Tsit5(), 0.999), CONSTANT, _end),
        (RK, PID, _function),
        (HEUN, CONSTANT, _function),
        # What is carried from step to step is selected for each element.
        (HEUN, PID, _function),
        (GenericLeapfrog(), CONSTANT, _times),
    ],
    ids=["published", "controlled", "evaluate", "evaluate-adaptive", "generic"],
)
def test_sum(solver, controller, saveat):
    loss = ft.partial(_loss, solver, controller, saveat)
    each = _one_by_one(loss, W, Y0, S)
    argnums = (0, 1, 2)
    summed = jax.jit(jax.grad(_total(loss), argnums))(W, Y0, S)
    assert relative_difference(summed, _summed(each)) < TOL
    if saveat is not _times:
        # Of each element: they are to be kept apart.
        per_example = jax.jit(jax.vmap(jax.grad(loss, argnums), (None, 0, 0)))
        assert relative_difference(per_example(W, Y0, S), each) < TOL


@pytest.mark.long
@pytest.mark.parametrize("controller", [CONSTANT, PID], ids=["constant", "PID"])
def test_sum_without_throw(controller):
    # What is marked as unknown, where it is, is marked for the sum as a whole.
    loss = ft.partial(_loss, RK, controller, _end, throw=False)
    summed = jax.jit(jax.grad(_total(loss), (0, 1, 2)))(W, Y0, S)
    assert relative_difference(summed, _summed(_one_by_one(loss, W, Y0, S))) < TOL


def _shared_loss(kind, solver, sum_over_batch, w, t1, x):
    """Of which something does not depend on `x`."""

    def vector_field(t, y, w):
        # The first element may be shared by the batch, and acts on the second.
        return {"a": -w * y["a"] * (1 + t), "b": jnp.sin(w * y["b"]) + x * y["a"]}

    saveat = {
        "y": diffrax.SaveAt(t1=True),
        "steps": diffrax.SaveAt(steps=True),
        "ts": diffrax.SaveAt(ts=jnp.array([0.2, 0.7, 1.0]) * t1),
        "dense": diffrax.SaveAt(dense=True),
    }[kind]
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solver,
        0.0,
        t1,
        0.2,
        {"a": jnp.array(1.0), "b": jnp.array(0.5)},
        w,
        saveat=saveat,
        adjoint=dfxr.ReversibleAdjoint(sum_over_batch=sum_over_batch),
        max_steps=8,
    )
    if kind == "dense":
        ts, ys = sol.t1, sol.evaluate(0.4)
    else:
        ts, ys = sol.ts, sol.ys
    total = lambda x: jnp.sum(jnp.where(jnp.isfinite(x), x, 0) ** 2)
    return {"a": total(ys["a"]), "b": total(ys["b"]), "ts": total(ts)}


# What is used of the results: if only what the batch shares, nothing is batched in the
# gradients of the outputs.
@pytest.mark.long
@pytest.mark.parametrize("used", ["a", "ab ts"])
@pytest.mark.parametrize(
    "kind,solver",
    [
        ("y", PUBLISHED),
        ("ts", PUBLISHED),
        ("steps", HEUN),
        ("dense", PUBLISHED),
        # Whose control is of all of `y`, so that all of it is batched.
        ("y", RK),
        ("y", GenericLeapfrog()),
    ],
    ids=["y", "ts", "steps", "dense", "controlled", "generic"],
)
def test_what_the_batch_shares(kind, solver, used):
    def loss(sum_over_batch, w, t1, x):
        out = _shared_loss(kind, solver, sum_over_batch, w, t1, x)
        return sum(value for name, value in out.items() if name in used)

    w, t1, xs = jnp.array(0.6), jnp.array(0.9), jnp.array([0.1, -0.4, 0.8])
    # Of each element, outside of any batch.
    one = ft.partial(jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0), False)
    each = jtu.tree_map(lambda *g: jnp.stack(g), *[one(w, t1, x) for x in xs])
    expected = (jnp.sum(each[0]), jnp.sum(each[1]), each[2])
    for sum_over_batch in (False, True):
        fn = ft.partial(loss, sum_over_batch)
        batched = jax.grad(_total(fn, (None, None, 0)), (0, 1, 2))
        assert relative_difference(jax.jit(batched)(w, t1, xs), expected) < TOL
        per_example = jax.vmap(jax.grad(fn, (0, 1, 2)), (None, None, 0))
        assert relative_difference(jax.jit(per_example)(w, t1, xs), each) < TOL


@pytest.mark.long
@pytest.mark.parametrize("sum_over_batch", [False, True])
def test_what_the_batches_share(sum_over_batch):
    # Two batches, of which the inner one is over `x` and the outer one over `w`; and
    # the other way around; within the derivative or outside of it.
    def loss(w, t1, x):
        out = _shared_loss("y", PUBLISHED, sum_over_batch, w, t1, x)
        return out["a"] + 2 * out["b"] + out["ts"]

    gradient = lambda fn: jax.grad(fn, (0, 1, 2))
    t1 = jnp.array(0.9)
    ws, xs = jnp.array([0.6, -0.3]), jnp.array([0.1, -0.4, 0.8])
    one = jax.jit(gradient(loss))
    w_grads, t1_grads, x_grads = (
        jnp.stack(g).reshape(2, 3)
        for g in zip(*[one(w, t1, x) for w in ws for x in xs])
    )
    over_x, over_w = (None, None, 0), (0, None, None)
    expected = (w_grads.sum(1), t1_grads.sum(), x_grads.sum(0))
    for inner, outer in ((over_x, over_w), (over_w, over_x)):
        ours = jax.jit(gradient(_total(_total(loss, inner), outer)))(ws, t1, xs)
        assert relative_difference(ours, expected) < TOL
    mixed = jax.jit(jax.vmap(gradient(_total(loss, over_x)), over_w))(ws, t1, xs)
    expected = (w_grads.sum(1), t1_grads.sum(1), x_grads)
    assert relative_difference(mixed, expected) < TOL
    mixed = jax.jit(jax.vmap(gradient(_total(loss, over_w)), over_x))(ws, t1, xs)
    expected = (w_grads.T, t1_grads.sum(0), x_grads.sum(0))
    assert relative_difference(mixed, expected) < TOL

    # Forward over reverse. (The compiler of JAX 0.5.3 fails a check of its own on it.)
    if jax.__version_info__ < (0, 6):
        return
    batched = gradient(_total(loss, over_x))
    tangents = (jnp.array(1.0), jnp.array(0.5), jnp.array([0.3, 1.0, -2.0]))
    _, ours = jax.jit(lambda *x: jax.jvp(batched, x, tangents))(ws[0], t1, xs)
    second = jax.jit(lambda *x: jax.jvp(gradient(loss), *x)[1])
    each = [second((ws[0], t1, x), (*tangents[:2], t)) for x, t in zip(xs, tangents[2])]
    w_grads, t1_grads, x_grads = (jnp.stack(g) for g in zip(*each))
    expected = (w_grads.sum(), t1_grads.sum(), x_grads)
    assert relative_difference(ours, expected) < TOL


class _Scaled(AbstractLinear):
    """The product of a number that a batch shares with a sum over others."""

    def __init__(self, sizes, is_transposed=False):
        self.sizes = sizes
        self.is_transposed = is_transposed

    def shapes(self, linear, others):
        return linear

    def __call__(self, linear, others, batch):
        [t], [x] = linear, others
        if self.is_transposed:
            self.sizes.append([marked.level.size for marked in batch])
        return [t * jnp.sum(x)]

    def transpose(self, given, perturbed):
        return _Scaled(self.sizes, not self.is_transposed)

    def differentiate(self, linear, others, tangents):
        [t], [dx] = linear, tangents.values()
        return [t * jnp.sum(dx)]


def _sum(fn):
    return lambda w, x: jnp.sum(jax.vmap(fn, (None, 0))(w, x))


def _of_each(fn):
    return jax.vmap(fn, (None, 0))


@pytest.mark.parametrize(
    "nesting,expected",
    [
        (lambda fn: _of_each(jax.grad(fn)), []),
        (lambda fn: jax.grad(_sum(fn)), [3]),
        (lambda fn: _of_each(jax.grad(_sum(fn))), [2]),
        (lambda fn: jax.grad(_sum(_sum(fn))), [2, 3]),
        (lambda fn: lambda w, x: jax.jvp(jax.grad(_sum(fn)), (w, x), (w, x))[0], [3]),
    ],
)
@pytest.mark.parametrize("jit", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_levels(nesting, expected, jit):
    # Those batches are found that are within the derivative, the innermost first. (A
    # solve is always compiled; so this is of something else.)
    sizes = []

    @jax.custom_jvp
    def scaled(w, x):
        return w * jnp.sum(x)

    @scaled.defjvp
    def _(primals, tangents):
        (w, x), (t, _) = primals, tangents
        return scaled(w, x), apply(_Scaled(sizes), [t], [x])[0]

    fn = jit(scaled)
    x = jnp.ones((3, 2))
    out = nesting(lambda w, x: fn(w, x))(jnp.array(2.0), x)
    assert sizes[-1] == expected
    assert jnp.allclose(jnp.sum(jnp.asarray(out)), 6)


#
# All nestings of batches, derivatives and others, with one solve
#


_plain = ft.partial(_loss, PUBLISHED, PID, _function)
WS = jnp.stack([W, -W])
ARGNUMS = (0, 1, 2)


@pytest.fixture(scope="module")
def table():
    """Gradients for all of `WS`, and of `Y0` and `S`."""
    grads = [_one_by_one(_plain, w, Y0, S) for w in WS]
    return jtu.tree_map(lambda *xs: jnp.stack(xs), *grads)


def _nested(loss):
    return _total(_total(loss), (0, None, None))


def _in_a_loop(*x, fn=_plain):
    add = lambda total, _: (total + fn(*x), None)
    return jax.lax.scan(add, 0.0, length=1)[0]


def _sum_all(table):
    gw, gy, gs = table
    return jnp.sum(gw, 1), jnp.sum(gy, 0), jnp.sum(gs, 0)


def _of_one(fn, wrap=lambda fn: fn):
    """As all of these, for the first of `WS`, with a shared `w`."""
    return (
        lambda: jax.jit(jax.grad(wrap(fn), ARGNUMS))(W, Y0, S),
        lambda t: _summed(jtu.tree_map(lambda x: x[0], t)),
    )


NESTINGS = {
    "batch of batches": (
        lambda: jax.jit(jax.grad(_nested(_plain), ARGNUMS))(WS, Y0, S),
        _sum_all,
    ),
    # (Of which the outer one is over `y0` and `s`, and the inner one over parameters.)
    "batch of batches of parameters": (
        lambda: jax.jit(jax.grad(_total(_total(_plain, (0, None, None))), ARGNUMS))(
            WS, Y0, S
        ),
        _sum_all,
    ),
    "batch of gradients of batches": (
        lambda: jax.jit(jax.vmap(jax.grad(_total(_plain), ARGNUMS), (0, None, None)))(
            WS, Y0, S
        ),
        lambda t: (jnp.sum(t[0], 1), t[1], t[2]),
    ),
    "batch of both": (
        lambda: jax.jit(jax.grad(_total(_plain, (2, 1, 0)), ARGNUMS))(
            jnp.stack([W, W, -W], -1), Y0.T, S
        ),
        lambda t: (
            jnp.stack([t[0][0, 0], t[0][0, 1], t[0][1, 2]], -1),
            jnp.stack([t[1][0, 0], t[1][0, 1], t[1][1, 2]], -1),
            jnp.stack([t[2][0, 0], t[2][0, 1], t[2][1, 2]]),
        ),
    ),
    "batch of parameters": (
        lambda: jax.jit(jax.grad(_total(_plain, (0, None, None)), ARGNUMS))(
            WS, Y0[1], S[1]
        ),
        lambda t: (t[0][:, 1], jnp.sum(t[1][:, 1], 0), jnp.sum(t[2][:, 1], 0)),
    ),
    "batch of one": (
        lambda: jax.jit(jax.grad(_total(_plain), ARGNUMS))(W, Y0[2:], S[2:]),
        lambda t: (t[0][0, 2], t[1][0, 2:], t[2][0, 2:]),
    ),
    "compiled within": _of_one(_total(jax.jit(_plain)), jax.jit),
    "checkpoint": _of_one(_total(jax.checkpoint(_plain)), jax.checkpoint),
    "in a loop": _of_one(ft.partial(_in_a_loop, fn=_total(_plain))),
    "loops in a batch": _of_one(_total(_in_a_loop)),
    "no parameters": (
        lambda: jax.jit(jax.grad(_total(_plain), 1))(W, Y0, S),
        lambda t: t[1][0],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", NESTINGS)
def test_nested(name, table):
    actual, expected = NESTINGS[name]
    assert relative_difference(actual(), expected(table)) < TOL


@pytest.mark.long
def test_without_jit(table):
    expected = _summed(jtu.tree_map(lambda x: x[0], table))
    ours = jax.grad(_total(_plain), ARGNUMS)(W, Y0, S)
    assert relative_difference(ours, expected) < TOL


@pytest.mark.exhaustive
def test_second_derivatives():
    # The products of the Hessian of a sum are the sum of those of Hessians.
    tangents = (jnp.cos(W), jnp.zeros_like(Y0), jnp.zeros_like(S))

    def product(fn, *x):
        x, dx = x[:3], x[3:]
        return jax.jvp(jax.grad(fn, ARGNUMS), x, dx)[1]

    of_batch = jax.jit(ft.partial(product, _total(_plain)))(W, Y0, S, *tangents)
    axes = (None, 0, 0)
    each = jax.jit(jax.vmap(ft.partial(product, _plain), (*axes, *axes)))
    assert relative_difference(of_batch, _summed(each(W, Y0, S, *tangents))) < TOL


#
# Other batches
#


@pytest.mark.long
def test_named_axis():
    # All elements are coupled, so that the batch is one solve of a larger equation.
    def loss(mean, w, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(y @ w) - mean(y)),
            PUBLISHED,
            0.0,
            1.0,
            0.2,
            y0,
            w,
            adjoint=ADJOINT,
            max_steps=8,
        )
        return jnp.sum(jnp.sin(sol.ys))

    batched = _total(
        ft.partial(loss, lambda y: jax.lax.pmean(y, "i")), (None, 0), axis_name="i"
    )
    together = ft.partial(loss, lambda y: jnp.mean(y, 0, keepdims=True))
    ours, expected = (
        jax.jit(jax.grad(fn, argnums=(0, 1)))(W, Y0) for fn in (batched, together)
    )
    assert relative_difference(ours, expected) < TOL


@pytest.mark.long
def test_unsaved_places():
    # What is saved of one element has no finite derivative where another is then.
    def loss(p, ts, t1):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: -p * y),
            RK,
            0.0,
            t1,
            0.1,
            jnp.array([1.0]),
            p,
            saveat=diffrax.SaveAt(
                ts=ts, fn=lambda t, y, p: y * jnp.sqrt(p * (t - ts[0]) + 1e-9)
            ),
            adjoint=ADJOINT,
            max_steps=16,
        )
        return weighted_sum(sol.ys)

    ts = jnp.array([[0.35, 0.45], [0.55, 0.95]])
    t1 = jnp.array([0.5, 1.0])
    p = jnp.array(0.5)
    summed = jax.jit(jax.grad(_total(loss)))(p, ts, t1)
    single = jax.jit(jax.grad(loss))
    expected = single(p, ts[0], t1[0]) + single(p, ts[1], t1[1])
    assert relative_difference(summed, expected) < TOL


@pytest.mark.exhaustive
def test_events_and_noise():
    # Each element has its own event, and its own Brownian motion.
    def loss(w, key, level):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(w @ y) + 1),
            diffrax.ControlTerm(
                lambda t, y, w: lx.DiagonalLinearOperator(0.1 * jnp.cos(w[0])), path
            ),
        )
        sol = diffrax.diffeqsolve(
            terms,
            HEUN,
            0.0,
            1.0,
            0.1,
            jnp.array([0.2, -0.3]),
            w,
            adjoint=ADJOINT,
            event=diffrax.Event(lambda t, y, args, **kwargs: y[0] > level),
            max_steps=16,
        )
        return weighted_sum(sol.ys)

    keys = jax.random.split(jax.random.key(0), 3)
    levels = jnp.array([0.4, 0.9, 5.0])
    summed = jax.jit(jax.grad(_total(loss)))(W, keys, levels)
    single = jax.jit(jax.grad(loss))
    expected = sum(single(W, k, x) for k, x in zip(keys, levels))
    assert relative_difference(summed, expected) < TOL


#
# What it is for
#


def _gradient(solver, controller, sum_over_batch, vector_field=None, **kwargs):
    """Of an element of a batch, with respect to a large matrix."""
    if vector_field is None:
        vector_field = lambda w, y: jnp.tanh(w @ y)

    def loss(w, y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: vector_field(w, y)),
            solver,
            0.0,
            1.0,
            0.1,
            y0,
            w,
            stepsize_controller=controller,
            adjoint=dfxr.ReversibleAdjoint(sum_over_batch=sum_over_batch),
            max_steps=16,
        )
        return jnp.sum(sol.ys)

    return jax.jit(jax.grad(_total(loss, (None, 0), **kwargs)))


NUM, WIDTH = 16, 64


def _compiled(*args, **kwargs):
    w, y0 = jnp.eye(WIDTH), jnp.ones((NUM, WIDTH))
    return _gradient(*args, **kwargs).lower(w, y0).compile()


@pytest.mark.long
@pytest.mark.parametrize(
    "solver,controller",
    [(PUBLISHED, CONSTANT), (RK, PID), (HEUN, CONSTANT), (GenericLeapfrog(), CONSTANT)],
    ids=["published", "controlled", "evaluate", "generic"],
)
def test_memory(solver, controller):
    one = 8 * WIDTH**2
    for sum_over_batch in (True, False):
        compiled = _compiled(solver, controller, sum_over_batch)
        has_all = f"f64[{NUM},{WIDTH},{WIDTH}]" in compiled.as_text()
        size = compiled.memory_analysis().temp_size_in_bytes
        assert has_all == (not sum_over_batch)
        assert (size > NUM * one) == (not sum_over_batch)


@pytest.mark.long
def test_by_default(monkeypatch):
    def lowered(sum_over_batch, width):
        w, y0 = jnp.eye(width), jnp.ones((NUM, width))
        return _gradient(PUBLISHED, CONSTANT, sum_over_batch).lower(w, y0).as_text()

    # That of a matrix.
    summed, not_summed = lowered(True, 8), lowered(False, 8)
    assert lowered("auto", 8) == summed != not_summed
    # As many parameters as there are numbers in `y` are not worth it.
    assert lowered("auto", 2) == lowered(False, 2)
    # Several devices may each have a part of the batch.
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    jax.clear_caches()
    assert lowered("auto", 8) == not_summed


def test_not_over_devices():
    # Or else they would exchange their sums in every step.
    compiled = _compiled(PUBLISHED, CONSTANT, True, spmd_axis_name="x")
    assert f"f64[{NUM},{WIDTH},{WIDTH}]" in compiled.as_text()


@pytest.mark.long
@pytest.mark.parametrize(
    "solver,controller", [(RK, PID), (HEUN, CONSTANT)], ids=["controlled", "evaluate"]
)
def test_evaluations(solver, controller):
    counts = []
    for sum_over_batch in (True, False):
        counter = Counter(vmap_method="broadcast_all")
        vector_field = lambda w, y: counter.vector_field(jnp.sin(w @ y))
        gradient = _gradient(solver, controller, sum_over_batch, vector_field)
        jax.block_until_ready(gradient(W, Y0))
        counts.append(counter.take())
    assert counts[0] == counts[1]
    # There are some.
    assert min(counts[0]) >= 10
