"""Programs of several solves, each differentiated with respect to something else.

JAX keeps what it has traced, and makes from it the derivative that is asked for next:
nothing that one of them leaves behind may get into another. So here the functions under
`jax.jit` are made once and shared by all programs; and whatever was done before, every
gradient is that of `RecursiveCheckpointAdjoint`.
"""

import functools as ft
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

import diffrax_reversible as dfxr

from .helpers import GenericLeapfrog, relative_difference


TOL = 1e-9


class Inputs(NamedTuple):
    """All that a solve depends on; or which axis of each is that of a batch."""

    y: Any = None
    # Two leaves of `args`.
    k: Any = None
    w: Any = None
    # The vector field closes over it.
    c: Any = None
    # The end of the solve, by which its steps are scaled.
    t: Any = None


INPUTS = Inputs(
    jnp.array([0.4, -0.2]),
    jnp.array(0.8),
    jnp.array([1.1, -0.7]),
    jnp.array([0.3, 0.5]),
    jnp.array(0.9),
)
EVERYTHING = frozenset(Inputs._fields)
# What any two of them have in common is one of them, so that there are few to compile.
SUBSETS = [
    EVERYTHING,
    frozenset({"k", "w", "c"}),
    frozenset({"y"}),
    frozenset(),
]


class Case(NamedTuple):
    solver: diffrax.AbstractSolver
    saveat: diffrax.SaveAt
    adjoint: diffrax.AbstractAdjoint
    # How it is called: keys in `ours`.
    ways: tuple[str, ...]


END = diffrax.SaveAt(t1=True)
TS = diffrax.SaveAt(ts=jnp.array([0.3, 0.8]))
ADJOINT = dfxr.ReversibleAdjoint()
SUM = dfxr.ReversibleAdjoint(sum_over_batch=True)
U = dfxr.UReversible
CASES = {
    "auto": Case(U(diffrax.Heun()), END, ADJOINT, ("jit",)),
    "heun": Case(dfxr.ReversibleHeun(), END, ADJOINT, ("jit", "checkpoint")),
    # There are two ways of pulling back through its steps: if `t` varies, the other.
    "midpoint": Case(dfxr.LeapfrogMidpoint(), TS, ADJOINT, ("direct",)),
    "user": Case(GenericLeapfrog(), TS, SUM, ("jit", "vmap of vmap", "scan")),
}


class Field(eqx.Module):
    c: Any

    def __call__(self, t, y, args):
        return -args["k"] * jnp.tanh(args["w"] * y[::-1] + self.c * t)


def solve(case, adjoint, inputs, closes_over=False):
    field = Field(inputs.c)
    # The module is the same at every call, but for its arrays, so `diffeqsolve` finds
    # it traced; and the function never is.
    vector_field = (lambda t, y, args: field(t, y, args)) if closes_over else field
    # Four steps. (With a constant step size, where they end would be constant for us.)
    step_ts = inputs.t * jnp.linspace(0.0, 1.0, 5)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        case.solver,
        0.0,
        inputs.t,
        None,
        inputs.y,
        dict(k=inputs.k, w=inputs.w),
        stepsize_controller=diffrax.StepTo(step_ts),
        saveat=case.saveat,
        adjoint=adjoint,
        max_steps=5,
    ).ys


def new(name):
    """A function of `Inputs` of which JAX knows nothing yet."""
    case = CASES[name]
    return jax.jit(ft.partial(solve, case, case.adjoint, closes_over=True))


shared = ft.cache(new)


@ft.cache
def reference(name):
    # Always differentiated with respect to everything, so that it is compiled once.
    fn = ft.partial(solve, CASES[name], diffrax.RecursiveCheckpointAdjoint())
    run = jax.jit(fn)
    pull = jax.jit(lambda inputs, grad: jax.vjp(fn, inputs)[1](grad))
    out = jax.custom_vjp(lambda inputs: run(inputs))
    out.defvjp(lambda inputs: (run(inputs), inputs), pull)
    return out


#
# Ways to call a solve. For the reference batches and scans are unrolled
#


SCALES = (1.0, 0.6)
OVER_Y, OVER_K = Inputs(y=0), Inputs(k=0)


def _scaled(name, inputs):
    return [inputs._replace(**{name: s * getattr(inputs, name)}) for s in SCALES]


def _stacked(name, inputs):
    values = jnp.stack([getattr(x, name) for x in _scaled(name, inputs)])
    return inputs._replace(**{name: values})


def _unrolled(name, fn):
    return lambda inputs: jnp.stack([fn(x) for x in _scaled(name, inputs)])


def _next(inputs, out):
    return inputs._replace(y=inputs.y + 0.2 * jnp.mean(out.reshape(-1, 2), axis=0))


@ft.cache
def ours(name, way):
    case, fn = CASES[name], shared(name)
    over_y = jax.vmap(fn, (OVER_Y,))
    over_both = jax.vmap(over_y, (OVER_K,))

    def body(inputs, _):
        out = fn(inputs)
        return _next(inputs, out), out

    return {
        "jit": fn,
        "direct": ft.partial(solve, case, case.adjoint),
        "checkpoint": jax.checkpoint(fn),
        "vmap of vmap": lambda x: over_both(_stacked("k", _stacked("y", x))),
        # (Without `jit` it would be compiled at every call.)
        "scan": jax.jit(lambda x: lax.scan(body, x, None, length=2)[1]),
    }[way]


@ft.cache
def theirs(name, way):
    fn = reference(name)

    def twice(inputs):
        out = fn(inputs)
        return jnp.stack([out, fn(_next(inputs, out))])

    return {
        "vmap of vmap": _unrolled("k", _unrolled("y", fn)),
        "scan": twice,
    }.get(way, fn)


#
# Programs
#


class Solve(NamedTuple):
    name: str
    way: str
    # Of its inputs those that are not behind `stop_gradient`.
    varies: frozenset[str] = EVERYTHING


class Program(NamedTuple):
    solves: tuple[Solve, ...]
    # With respect to what it is differentiated.
    wrt: frozenset[str] = EVERYTHING
    # Whether each solve starts near where the one before ended.
    is_chained: bool = False

    def losses(self, call, inputs):
        """A number for each of the solves, that are made as `call(name, way)`."""
        out = []
        for name, way, varies in self.solves:
            ys = call(name, way)(_where(varies, inputs, lax.stop_gradient(inputs)))
            weights = jnp.arange(1.0, 1.0 + ys.size).reshape(ys.shape)
            out.append(jnp.sum(weights * ys**2))
            if self.is_chained:
                inputs = _next(inputs, ys)
        return jnp.stack(out)

    def split(self, call, inputs):
        """`losses`, as a function of that with respect to which it is differentiated;
        and that."""
        rest = _where(self.wrt, Inputs(), inputs)

        def losses(part):
            return self.losses(call, _where(self.wrt, part, rest))

        return losses, _where(self.wrt, inputs, Inputs())

    def value_and_grad(self, call, inputs):
        losses, part = self.split(call, inputs)
        return jax.value_and_grad(lambda x: jnp.sum(losses(x)))(part)


def _where(names, inputs, others):
    return Inputs(
        *[x if n in names else y for n, x, y in zip(Inputs._fields, inputs, others)]
    )


def assert_same(x, y):
    for a, b in zip(jtu.tree_leaves(x), jtu.tree_leaves(y), strict=True):
        assert relative_difference(a, b) < TOL


def draw_subset(wrt=False):
    return st.sampled_from([x for x in SUBSETS if x or not wrt])


def draw_program():
    calls = [(name, way) for name, case in CASES.items() for way in case.ways]
    solves = st.lists(
        st.builds(
            lambda call, varies: Solve(*call, varies),
            st.sampled_from(calls),
            draw_subset(),
        ),
        min_size=1,
        max_size=2,
    )
    return st.builds(Program, solves.map(tuple), draw_subset(wrt=True), st.booleans())


def draw_inputs():
    return st.sampled_from([0.0, 0.1]).map(
        lambda s: jtu.tree_map(lambda x: (1 + s) * x, INPUTS)
    )


@ft.cache
def hessian(name, is_ours):
    if is_ours:
        fn = shared(name)
    else:
        fn = ft.partial(solve, CASES[name], diffrax.DirectAdjoint())

    def loss(y, inputs):
        return jnp.sum(fn(inputs._replace(y=y)) ** 3)

    out = jax.hessian(loss)
    return out if is_ours else jax.jit(out)


FORWARD = ["jvp", "jacfwd", "linearize"]
SECOND = ["hessian", "grad of grad"]


class Machine(stateful.RuleBasedStateMachine):
    pullbacks = stateful.Bundle("pullbacks")

    @stateful.rule(program=draw_program(), inputs=draw_inputs())
    def value_and_grad_in_jit(self, program, inputs):
        # Traced as by `jax.jit`, but that would compile all of it each time. So most of
        # what is compiled has been before.
        jaxpr, struct = jax.make_jaxpr(
            lambda x: program.value_and_grad(ours, x), return_shape=True
        )(inputs)
        out = jex.core.jaxpr_as_fun(jaxpr)(*inputs)
        out = jtu.tree_unflatten(jtu.tree_structure(struct), out)
        assert_same(out, program.value_and_grad(theirs, inputs))

    @stateful.rule(target=pullbacks, program=draw_program(), inputs=draw_inputs())
    def vjp(self, program, inputs):
        value, pull = jax.vjp(*program.split(ours, inputs))
        expected_value, expected_pull = jax.vjp(*program.split(theirs, inputs))
        assert_same(value, expected_value)
        return len(program.solves), pull, expected_pull

    @stateful.rule(pullback=pullbacks, only=st.sampled_from([0, 1, None]))
    def pull(self, pullback, only):
        num_solves, pull, expected_pull = pullback
        grad = jnp.arange(1.0, 1.0 + num_solves)
        if only is not None:
            grad = jnp.where(jnp.arange(num_solves) == only, grad, 0)
        assert_same(pull(grad), expected_pull(grad))

    @stateful.rule(
        how=st.sampled_from([*FORWARD, *SECOND, "vmap of grad", "refused"]),
        name=st.sampled_from(["heun", "user"]),
        wrt=draw_subset(wrt=True),
        inputs=draw_inputs(),
    )
    def differentiate_otherwise(self, how, name, wrt, inputs):
        if how in SECOND:
            out = second(how, inputs.y, inputs)
            expected = hessian("user", False)(inputs.y, inputs)
            if how == "grad of grad":
                expected = jnp.sum(expected, axis=0)
        elif how == "vmap of grad":
            program = Program((Solve("user", "jit"),), wrt)
            grad = ft.partial(program.value_and_grad, ours)
            out = jax.vmap(grad, (OVER_K,))(_stacked("k", inputs))
            each = [program.value_and_grad(theirs, x) for x in _scaled("k", inputs)]
            expected = jtu.tree_map(lambda *xs: jnp.stack(xs), *each)
        elif how == "refused":
            out = expected = refuse(shared(name), wrt)
        else:
            out = forward(how, shared(name), wrt, inputs)
            program = Program((Solve(name, "jit"),), wrt)
            _, expected = program.value_and_grad(theirs, inputs)
            if how != "jacfwd":
                part = _where(wrt, inputs, Inputs())
                pairs = map(jtu.tree_leaves, (part, expected))
                expected = sum(map(jnp.vdot, *pairs))
        assert_same(out, expected)


def second(how, y, inputs):
    if how == "hessian":
        return hessian("user", True)(y, inputs)
    fn = shared("user")
    gradient = jax.grad(lambda y: jnp.sum(fn(inputs._replace(y=y)) ** 3))
    return jax.grad(lambda y: jnp.sum(gradient(y)))(y)


def forward(how, fn, wrt, inputs):
    losses, part = Program((Solve("", ""),), wrt).split(lambda *_: fn, inputs)
    loss = lambda x: jnp.sum(losses(x))
    if how == "jacfwd":
        return jax.jacfwd(loss)(part)
    if how == "jvp":
        return jax.jvp(loss, (part,), (part,))[1]
    return jax.linearize(loss, part)[1](part)


def refuse(fn, wrt):
    losses, part = Program((Solve("", ""),), wrt).split(lambda *_: fn, INPUTS)

    def times(fn):
        return lambda x: jax.jvp(fn, (x,), (part,))[1]

    with pytest.raises(NotImplementedError, match="third derivatives"):
        times(times(times(lambda x: jnp.sum(losses(x)))))(part)


# What has been traced stays from one example to the next, so a failure need not happen
# again in a shorter one.
Machine.TestCase.settings = hypothesis.settings(
    max_examples=3,
    stateful_step_count=10,
    phases=[hypothesis.Phase.generate],
    report_multiple_bugs=False,
)
TestPrograms = pytest.mark.long(Machine.TestCase)


#
# The smallest programs in which one derivative got into another
#


NAMES = ["auto", "heun"]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen_first", [False, True])
@pytest.mark.one_in(3)
def test_two_solves_one_frozen(name, frozen_first):
    solves = (Solve(name, "jit"), Solve(name, "jit", frozenset({"y"})))
    program = Program(solves[::-1] if frozen_first else solves)
    fn = new(name)
    grad = jax.jit(lambda x: program.value_and_grad(lambda *_: fn, x))
    assert_same(grad(INPUTS), program.value_and_grad(theirs, INPUTS))


def _vjp(program, fn):
    """By `fn`, and the function that compares what it pulls back."""
    _, pull = jax.vjp(*program.split(lambda *_: fn, INPUTS))
    _, expected = jax.vjp(*program.split(theirs, INPUTS))
    one = jnp.ones(len(program.solves))
    return lambda: assert_same(pull(one), expected(one))


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES, "midpoint"])
def test_two_pullbacks(name):
    solves, fn = (Solve(name, "jit"),), new(name)
    first = _vjp(Program(solves), fn)
    second = _vjp(Program(solves, frozenset({"y"})), fn)
    first()
    second()
    first()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.one_in(2)
def test_after_a_refused_call(name):
    solves, fn = (Solve(name, "jit"),), new(name)
    pulled = _vjp(Program(solves), fn)
    refuse(fn, frozenset({"y"}))
    pulled()
    _vjp(Program(solves, frozenset({"k", "w"})), fn)()
