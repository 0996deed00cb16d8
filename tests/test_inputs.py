"""Whatever diffrax takes as `y0`, `args` and `terms` is taken, with the gradient that
`RecursiveCheckpointAdjoint` gives: any PyTree, any precision, any kind of term, and
vector fields that do whatever they like."""

import contextlib
import functools as ft
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import diffrax_reversible as dfxr

from .derivatives import ADJOINT, agree, everything
from .helpers import from_term, relative_difference, SmoothPath, SOLVERS
from .test_gradient import TOL, weighted_sum


RK = dfxr.UReversible(diffrax.Heun())
HEUN = diffrax.ReversibleHeun()
BOTH = pytest.mark.parametrize("solver", [RK, HEUN], ids=["UReversible", "Heun"])
PID = diffrax.PIDController(rtol=1e-2, atol=1e-2)
TS = jnp.array([0.3, 0.8])


def solve(adjoint, terms, y0, args=None, solver=RK, controller=PID, **kwargs):
    if not isinstance(terms, diffrax.AbstractTerm):
        terms = diffrax.ODETerm(terms)
    kwargs = dict(t0=0.0, t1=1.0, dt0=0.2, max_steps=32) | kwargs
    kwargs.setdefault("saveat", diffrax.SaveAt(t1=True, ts=TS))
    return diffrax.diffeqsolve(
        terms,
        solver,
        y0=y0,
        args=args,
        stepsize_controller=controller,
        adjoint=adjoint,
        **kwargs,
    )


def spiral(t, y, args):
    """For any PyTree: every leaf by itself, and all of them together."""
    leaves = jtu.tree_leaves(y)
    total = sum([jnp.sum(x) for x in leaves], 0.0)
    return jtu.tree_map(lambda x: jnp.sin(total * args + x) * jnp.cos(t), y)


#
# y0
#


class Pair(NamedTuple):
    q: Any
    p: Any


class State(eqx.Module):
    position: Any
    other: Any
    name: str = eqx.field(static=True, default="state")


Y0S = {
    "float": 0.7,
    "zero-dim": jnp.array(0.7),
    "numpy": np.array([0.3, -0.4]),
    "numpy-scalar": np.float64(0.3),
    "int": 1,
    "int-array": jnp.array([1, 2], jnp.int32),
    "some-ints": (jnp.array([1, 2]), 0.5, jnp.array([0.1])),
    "none": {"a": None, "b": jnp.array([0.3]), "c": (None, 0.2)},
    "empty": [jnp.zeros((0, 3)), jnp.array([[0.1, 0.2]])],
    "named-tuple": Pair(jnp.array([0.1]), jnp.array([[0.2]])),
    "module": State(jnp.array([0.1, 0.4]), {"deeper": [jnp.array(0.3)]}),
    "weak": jnp.asarray(0.5) * 1.0,
}


@pytest.mark.parametrize("name", Y0S)
def test_y0(name):
    # Alternating, so that each solver and controller meets all kinds of them.
    i = list(Y0S).index(name)
    solver = [RK, HEUN][i % 2]
    controller = [PID, diffrax.ConstantStepSize()][(i // 2) % 2]

    def loss(adjoint, params):
        y0, scale = params
        sol = solve(adjoint, spiral, y0, scale, solver, controller)
        return weighted_sum(sol.ys)

    agree(loss, (Y0S[name], jnp.array(0.8)))


def test_gradient_of_integers():
    # `allow_int=True`: no gradient, and no error.
    def loss(adjoint, params):
        y0, args = params
        field = lambda t, y, args: jnp.sin(args[1] * y) * args[0]
        return weighted_sum(solve(adjoint, field, y0, args).ys)

    params = (jnp.array([1, 2]), (jnp.array(3), jnp.array(0.7)))
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.jit(jax.grad(ft.partial(loss, ADJOINT), allow_int=True))
        grad = gradient(params)
    assert grad[0].dtype == jax.dtypes.float0
    assert grad[1][0].dtype == jax.dtypes.float0
    assert jnp.isfinite(grad[1][1]) and grad[1][1] != 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Complex dtype support:UserWarning")
@pytest.mark.parametrize(
    "solver,controller,save_at",
    [
        (RK, diffrax.ConstantStepSize(), diffrax.SaveAt(t1=True, ts=TS)),
        (HEUN, PID, diffrax.SaveAt(steps=True, t1=True)),
        (diffrax.LeapfrogMidpoint(), diffrax.ConstantStepSize(), None),
    ],
    ids=["UReversible", "ReversibleHeun", "LeapfrogMidpoint"],
)
def test_complex(solver, controller, save_at):
    def loss(adjoint, params):
        y0, w = params
        field = lambda t, y, w: jnp.tanh(w @ y) * jax.lax.complex(jnp.cos(t), t)
        kwargs = {} if save_at is None else {"saveat": save_at}
        ys = solve(adjoint, field, y0, w, solver, controller, **kwargs).ys
        return weighted_sum(jnp.real(ys)) + weighted_sum(jnp.imag(ys) ** 2)

    y0 = jnp.array([0.3 + 0.2j, -0.1 + 0.5j])
    w = jnp.array([[0.2 - 0.7j, 0.5], [0.1j, -0.4 + 0.3j]])
    agree(loss, (y0, w))


@pytest.mark.long
@BOTH
def test_leaves_of_different_precision(solver):
    # Times in single precision, or diffrax would make all of `y` of their precision.
    def loss(adjoint, params):
        y0, scale = params

        def field(t, y, args):
            a, b = y
            total = jnp.sum(a).astype(b.dtype) + jnp.sum(b)
            da = jnp.sin(a * total.astype(a.dtype)) * scale.astype(a.dtype)
            return da, jnp.cos(b * total) * scale

        f32 = lambda x: jnp.array(x, jnp.float32)
        sol = solve(
            adjoint,
            field,
            y0,
            None,
            solver,
            diffrax.ConstantStepSize(),
            t0=f32(0.0),
            t1=f32(1.0),
            dt0=f32(0.2),
            saveat=diffrax.SaveAt(t1=True, ts=TS.astype(jnp.float32)),
        )
        a, b = sol.ys
        assert a.dtype == jnp.float32 and b.dtype == jnp.float64
        return weighted_sum(a.astype(b.dtype)) + weighted_sum(b)

    y0 = (jnp.array([0.1, 0.4], jnp.float32), jnp.array([0.3]))
    with jax.numpy_dtype_promotion("standard"):
        agree(loss, (y0, jnp.array(0.8)), tol=1e-4)


def _without_x64():
    # By either of its names.
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    return jax.experimental.disable_x64()


@pytest.mark.long
@pytest.mark.parametrize("event", [False, True], ids=["end", "event"])
@pytest.mark.parametrize("promotion", ["strict", "standard"])
def test_single_precision(promotion, event):
    # As JAX is set up by default: without double precision anywhere.
    def loss(adjoint, params):
        y0, args, t1 = params
        kwargs = {}
        if event:
            kwargs["event"] = diffrax.Event(
                lambda t, y, args, **kwargs: y[0] - args[1],
                optx.Newton(1e-4, 1e-4),
            )
        sol = solve(
            adjoint,
            lambda t, y, args: jnp.stack([y[1], -args[0] * y[0]]),
            y0,
            args,
            t1=t1,
            saveat=diffrax.SaveAt(t1=True, ts=[0.1, 0.2]),
            **kwargs,
        )
        assert sol.ys.dtype == sol.ts.dtype == jnp.float32
        return weighted_sum(sol.ys)

    with _without_x64(), jax.numpy_dtype_promotion(promotion):
        params = (jnp.array([1.0, 0.2]), jnp.array([1.5, 0.6]), 1.0)
        grads = [
            jax.jit(jax.grad(ft.partial(loss, adjoint)))(params)
            for adjoint in (ADJOINT, diffrax.RecursiveCheckpointAdjoint())
        ]
        ours, expected = ([x[0], x[1]] for x in grads)
        assert all(x.dtype == jnp.float32 for x in ours)
        # Some tens of steps with some tens of roundings each.
        assert relative_difference(ours, expected) < 1e-3


# Without leaves, or with nothing in them. (Such a `y0` is also the whole of a stage, an
# increment, a register, ...: and `None` must not be taken for one that is not there.)
NOTHING = [
    None,
    *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ({}, jnp.zeros((0,)))),
]


# (An implicit solver has nothing to solve for then, and diffrax refuses it.)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in SOLVERS.items()
        if not issubclass(type(case.solver), diffrax.AbstractImplicitSolver)
    ],
)
@pytest.mark.parametrize("y0", NOTHING, ids=["None", "dict", "size-0"])
def test_nothing_to_solve(y0, name):
    case = SOLVERS[name]
    drift = diffrax.ODETerm(lambda t, y, w: jtu.tree_map(lambda x: w * x, y))
    if case.noise is not None:
        # (diffrax's product of a diffusion and a control takes no `None`.)
        y0 = jnp.zeros((0,))
        diffusion = lambda t, y, w: jnp.ones((0,))
        path = SmoothPath((), jnp.float64)
        drift = diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path))
    terms, y0 = ((drift, drift), (y0, y0)) if case.pair else (drift, y0)

    def loss(adjoint, w):
        sol = diffrax.diffeqsolve(
            terms,
            case.solver,
            0.0,
            1.0,
            0.5,
            y0,
            w,
            saveat=diffrax.SaveAt(
                ts=[0.3], steps=True, fn=lambda t, y, w: (y, jnp.cos(t * w))
            ),
            adjoint=adjoint,
            max_steps=4,
        )
        ys, cosine = sol.ys
        assert jtu.tree_structure(ys) == jtu.tree_structure(y0)
        return jnp.sum(jnp.where(jnp.isfinite(cosine), cosine, 0))

    # It need not be zero, as what is saved may depend on anything.
    w = jnp.array(0.7)
    expected = -sum(t * jnp.sin(t * w) for t in (0.3, 0.5, 1.0))
    for adjoint in (ADJOINT, diffrax.RecursiveCheckpointAdjoint()):
        grad = jax.jit(jax.grad(ft.partial(loss, adjoint)))(w)
        assert abs(grad - expected) < TOL


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("coupling", ["auto", 0.999])
def test_half_precision(coupling, dtype):
    # Outside of `jax.jit` a constant in `bfloat16`, as the zero of a coupling, is an
    # array of NumPy's, of no kind that NumPy knows.
    solver = dfxr.UReversible(diffrax.Heun(), coupling)
    # (With other times diffrax would promote `y`.)
    t0, t1, dt0 = jnp.array([0, 1, 0.125], dtype)

    def loss(adjoint, params):
        y0s, w = params
        total = jnp.zeros((), dtype)
        for y0 in y0s:
            sol = solve(
                adjoint,
                lambda t, y, w: w * y,
                y0,
                w,
                solver,
                diffrax.ConstantStepSize(),
                t0=t0,
                t1=t1,
                dt0=dt0,
                saveat=diffrax.SaveAt(t1=True),
            )
            total = total + jnp.sum(sol.ys)
        return total

    params = ((jnp.array(2, dtype), jnp.array([1, 0.5], dtype)), jnp.array(-1, dtype))
    ours, expected = (
        jax.grad(ft.partial(loss, adjoint))(params)
        for adjoint in (
            dfxr.ReversibleAdjoint(),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    for x, y in zip(jtu.tree_leaves(ours), jtu.tree_leaves(expected), strict=True):
        assert x.dtype == dtype
        # Of eight steps.
        tol = 16 * float(jnp.finfo(dtype).eps)
        assert relative_difference(x.astype(float), y.astype(float)) < tol


#
# args
#


@pytest.mark.long
def test_args_with_other_things():
    # Strings, functions, modules, keys, booleans and integers.
    class Parameters(eqx.Module):
        w: Any
        activation: Any
        depth: int
        name: str = eqx.field(static=True)

    def field(t, y, args):
        assert args["label"] == "label"
        p, flag, unused = args["p"], args["flag"], args["none"]
        assert unused is None
        for _ in range(p.depth):
            y = p.activation(p.w @ y)
        noise = jax.random.normal(args["key"], y.shape)
        return jnp.where(flag, y + noise, 0.0) + args["table"][args["index"]]

    def loss(adjoint, params):
        y0, args = params
        return everything(solve(adjoint, field, y0, args))

    args = {
        "p": Parameters(jnp.array([[0.1, -0.9], [0.5, 0.3]]), jnp.tanh, 2, "p"),
        "label": "label",
        "none": None,
        "flag": jnp.array([True, False]),
        "key": jax.random.key(3),
        "table": jnp.array([[0.1, 0.2], [0.3, 0.4]]),
        "index": jnp.array(1),
    }
    _, grad = agree(loss, (jnp.array([0.2, -0.6]), args))
    # One that is not used has a zero.
    assert jnp.all((grad[1]["table"] != 0) == jnp.array([[False], [True]]))


@pytest.mark.long
@BOTH
def test_network(solver):
    # In the vector field as a module, and in a closure, and in `args`.
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    network = ft.partial(eqx.nn.MLP, 2, 2, 4, 1, activation=jnp.tanh)

    class Field(eqx.Module):
        net: eqx.nn.MLP
        power: int

        def __call__(self, t, y, args):
            return self.net(y) ** self.power

    def loss(adjoint, params):
        a, b, c, y0 = params
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(Field(a, 1)),
            diffrax.ODETerm(lambda t, y, args: b(y) * jnp.sin(t)),
            diffrax.ODETerm(lambda t, y, args: args(y)),
        )
        return weighted_sum(solve(adjoint, terms, y0, c, solver).ys)

    params = (network(key=k1), network(key=k2), network(key=k3), jnp.array([0.1, 0.9]))
    _, grad = agree(loss, params)
    assert all(jnp.any(x != 0) for x in jtu.tree_leaves(grad))


def test_nothing_depends_on_it():
    # Neither y0 nor args matter, and an array that matters has nothing to do with y.
    def loss(adjoint, params):
        y0, args, slope = params
        field = lambda t, y, args: slope * jnp.ones(2)
        sol = solve(adjoint, field, jax.lax.stop_gradient(y0), args)
        return weighted_sum(sol.ys)

    _, grad = agree(loss, (jnp.ones(2), {"a": jnp.array(1.0)}, jnp.array(0.3)))
    assert jnp.all(grad[0] == 0) and grad[1]["a"] == 0 and grad[2] != 0


@pytest.mark.parametrize("value", [1.0, np.array([1.0, 2.0]), jnp.array([1, 1])])
def test_vector_field_of_constants(value):
    # Python's numbers, NumPy's arrays, integers.
    def loss(adjoint, y0):
        with jax.numpy_dtype_promotion("standard"):
            field = lambda t, y, args: value
            sol = solve(adjoint, field, y0, None, controller=diffrax.ConstantStepSize())
        return weighted_sum(sol.ys)

    agree(loss, jnp.array(0.3) if isinstance(value, float) else jnp.array([0.3, 0.1]))


#
# terms
#


class Scaled(diffrax.AbstractTerm):
    """A term of another kind: what it evaluates to, and its control, are PyTrees."""

    rate: Any
    reach: float = eqx.field(static=True)

    def vf(self, t, y, args):
        return {"f": jnp.tanh(self.rate * y["y"]), "g": None}

    def contr(self, t0, t1, **kwargs):
        return [t1 - t0, jnp.sin(t1) - jnp.sin(t0)]

    def prod(self, vf, control):
        h, s = control
        return {"y": vf["f"] * (h + self.reach * s)}


@BOTH
@pytest.mark.parametrize("controller", [PID, diffrax.ConstantStepSize()], ids=type)
def test_term_of_the_user(solver, controller):
    def loss(adjoint, params):
        y0, rate, other = params
        terms = diffrax.MultiTerm(Scaled(rate, 0.3), Scaled(other, -0.2))
        return weighted_sum(solve(adjoint, terms, y0, None, solver, controller).ys)

    params = ({"y": jnp.array([[0.3, -0.1]])}, jnp.array(1.2), jnp.array([[0.4, 0.9]]))
    agree(loss, params)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["to_ode", "cubic", "solution"])
def test_controlled(kind):
    ts = jnp.array([0.0, 0.3, 0.7, 1.0])

    def loss(adjoint, params):
        y0, xs, w = params
        if kind == "cubic":
            coeffs = diffrax.backward_hermite_coefficients(ts, xs)
            path = diffrax.CubicInterpolation(ts, coeffs)
        elif kind == "to_ode":
            path = diffrax.LinearInterpolation(ts, xs)
        else:
            field = lambda t, y, args: args @ y
            save_at = diffrax.SaveAt(dense=True)
            path = solve(adjoint, field, xs[1], w, saveat=save_at)
        term = diffrax.ControlTerm(
            lambda t, y, args: jnp.outer(jnp.tanh(args @ y), jnp.cos(y)), path
        )
        if kind == "to_ode":
            term = term.to_ode()
        return weighted_sum(solve(adjoint, term, y0, w).ys)

    xs = jnp.array([[0.0, 0.3], [0.5, -0.2], [0.4, 0.6], [1.0, 0.1]])
    w = jnp.array([[0.3, 0.8], [-0.6, 0.1]])
    _, grad = agree(loss, (jnp.array([0.4, 0.7]), xs, w))
    assert all(jnp.any(x != 0) for x in grad)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["operator", "diagonal"])
@BOTH
def test_diffusion_as_an_operator(kind, solver):
    shape = (2,)
    # One of them of a kind that has more in it than the solver asks for.
    area = diffrax.BrownianIncrement
    if kind == "operator":
        area = diffrax.SpaceTimeLevyArea
    path = diffrax.VirtualBrownianTree(
        0.0, 1.0, 0.1, shape, jax.random.key(0), levy_area=area
    )

    def loss(adjoint, params):
        y0, (mu, sigma) = params
        if kind == "operator":
            noise = lambda t, y, args: lx.DiagonalLinearOperator(sigma * jnp.sin(y))
            diffusion = diffrax.ControlTerm(noise, path)
        else:
            diffusion = diffrax.WeaklyDiagonalControlTerm(
                lambda t, y, args: sigma * jnp.sin(y), path
            )
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: mu * jnp.cos(y)), diffusion
        )
        controller = diffrax.ConstantStepSize()
        return weighted_sum(solve(adjoint, terms, y0, None, solver, controller).ys)

    context = contextlib.nullcontext()
    if kind == "diagonal":
        context = pytest.warns(Warning, match="WeaklyDiagonalControlTerm")
    with context:
        agree(loss, (jnp.array([0.3, 0.8]), jnp.array([0.5, 0.4])))


def _custom(x):
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    return sine(x)


def _loops(x):
    x, _ = jax.lax.scan(lambda c, a: (jnp.sin(c + a), None), x, jnp.arange(3.0))
    return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)


def _solves(x):
    matrix = jnp.eye(2) * 2 + jnp.outer(x, x)
    operator = lx.MatrixLinearOperator(matrix)
    return jnp.linalg.solve(matrix, x) + lx.linear_solve(operator, jnp.cos(x)).value


def _roots(x):
    return optx.root_find(
        lambda z, x: z + 0.3 * jnp.sin(z) - x, optx.Newton(1e-10, 1e-10), x, x
    ).value


def _rematerialised(x):
    return jax.checkpoint(lambda x: jnp.sin(x) * jnp.exp(-(x**2)))(x)


def _jitted(x):
    return jax.jit(jnp.sin)(x) + jax.vmap(lambda x: x**2)(x)


def _gradient(x):
    return -jax.grad(lambda x: jnp.sum(jnp.cos(x)) * x[0])(x)


def _indexed(x):
    return x.at[jnp.argmax(x)].add(0.3)[jnp.array([1, 0])]


@pytest.mark.parametrize(
    "inner",
    [
        _custom,
        _loops,
        _solves,
        _roots,
        _rematerialised,
        _jitted,
        _gradient,
        _indexed,
    ],
)
def test_what_a_vector_field_may_do(inner):
    solver = HEUN if inner in (_custom, _solves, _gradient) else RK

    def loss(adjoint, params):
        y0, w = params
        # By `args` and by closure alike.
        field = lambda t, y, args: jnp.tanh(inner(w @ y) + inner(args * y))
        return weighted_sum(solve(adjoint, field, y0, w[0], solver).ys)

    w = jnp.array([[0.3, 0.8], [-0.6, 0.1]])
    params = (jnp.array([0.4, 0.7]), w)
    if inner is _custom:
        # Which forward mode cannot differentiate.
        ours, expected = (
            jax.jit(jax.grad(ft.partial(loss, adjoint)))(params)
            for adjoint in (ADJOINT, diffrax.RecursiveCheckpointAdjoint())
        )
        assert relative_difference(ours, expected) < TOL
    else:
        agree(loss, params)


@pytest.mark.exhaustive
def test_solve_in_a_vector_field():
    # Both of them by us.
    def loss(adjoint, params):
        y0, w = params

        def field(t, y, w):
            inner = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda s, z, args: jnp.sin(z + args)),
                HEUN,
                0.0,
                0.5,
                0.25,
                y,
                w,
                adjoint=adjoint,
                max_steps=4,
            )
            return inner.ys[0] - y

        sol = solve(adjoint, field, y0, w, RK, diffrax.ConstantStepSize(), max_steps=8)
        return weighted_sum(sol.ys)

    agree(loss, (jnp.array([0.4, 0.7]), jnp.array([0.2, -0.5])))


def test_error_in_a_vector_field():
    # Of the user's, at run time, and with the user's words.
    def loss(limit, y0):
        def field(t, y, args):
            return eqx.error_if(y, jnp.any(y > limit), "y is too large for me")

        return jnp.sum(
            solve(ADJOINT, field, y0, controller=diffrax.ConstantStepSize()).ys
        )

    gradient = eqx.filter_jit(jax.grad(loss, argnums=1))
    # y' = y, by Heun's method.
    growth = jax.block_until_ready(gradient(100.0, jnp.ones(2)))
    assert jnp.all(growth > 2)
    with pytest.raises(RuntimeError, match="too large for me"):
        jax.block_until_ready(gradient(1.5, jnp.ones(2)))


@pytest.mark.exhaustive
def test_every_solver_takes_a_float():
    # And of a pair of them, for the partitioned ones.
    for name, case in SOLVERS.items():
        if name.startswith("user"):
            continue
        term = diffrax.ODETerm(lambda t, y, args: -args * y)

        @jax.jit
        @jax.grad
        def gradient(y0):
            sol = diffrax.diffeqsolve(
                from_term(case, term),
                case.solver,
                0,
                1,
                0.5,
                (y0, 0.3) if case.pair else y0,
                0.4,
                adjoint=ADJOINT,
                max_steps=4,
            )
            return sum(jnp.sum(x) for x in jtu.tree_leaves(sol.ys))

        assert 0.3 < gradient(1.0) < 1, name


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "complex128")])
@pytest.mark.filterwarnings("ignore:Complex dtype support:UserWarning")
def test_terms_of_a_lower_dtype(dtypes):
    # They are promoted when they are added to `y`.
    low, high = dtypes
    ts = jnp.linspace(0, 1, 3, dtype=low)
    path = diffrax.LinearInterpolation(ts, jnp.array([0.0, 1.0, 0.5], low))

    def gradient(adjoint):
        def loss(params):
            p, y0 = params
            term = diffrax.ControlTerm(
                lambda t, y, args: (p * jnp.sin(jnp.real(y))).astype(low), path
            )
            solver = dfxr.UReversible(diffrax.Bosh3(), 0.9)
            sol = diffrax.diffeqsolve(
                term, solver, 0.0, 1.0, 0.1, y0, adjoint=adjoint, max_steps=16
            )
            return jnp.sum(jnp.abs(sol.ys) ** 2)

        params = (jnp.array(0.7), jnp.array([1.0, 0.3], high))
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(jax.grad(loss))(params)

    ours = gradient(dfxr.ReversibleAdjoint())
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    # Of ten steps, of the lower precision, or the tolerance of all gradients.
    tol = 50 * float(jnp.finfo(low).eps) if low == "float32" else TOL
    assert relative_difference(ours, expected) < tol
