"""Whatever cannot be right says so, in the user's words, and names the remedy."""

import ast
import pathlib
import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr
from diffrax_reversible._adjoint.adjoint import _check_sum_over_batch
from diffrax_reversible._adjoint.batch import Batch
from diffrax_reversible._adjoint.check import check
from diffrax_reversible._solver.asynchronous_leapfrog import _check_damping
from diffrax_reversible._solver.bases import check_base
from diffrax_reversible._solver.u_reversible import _check_coupling_parameter
from diffrax_reversible._solver.unrolled import cast_like

from .helpers import CouplingLeapfrog, GenericLeapfrog


RK = dfxr.UReversible(diffrax.Heun())
TERM = diffrax.ODETerm(lambda t, y, args: -y)


def solve(
    y0=jnp.array([1.0, 2.0]),
    *,
    terms=TERM,
    solver=RK,
    t0=0.0,
    t1=1.0,
    dt0=0.1,
    adjoint=dfxr.ReversibleAdjoint(),
    max_steps=32,
    **kwargs,
):
    return diffrax.diffeqsolve(
        terms, solver, t0, t1, dt0, y0, adjoint=adjoint, max_steps=max_steps, **kwargs
    )


class _HasSrkStep(diffrax.ShARK):
    def step(self, *args, **kwargs):
        raise NotImplementedError


class _Other(diffrax.AbstractSolver):
    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def init(self, *args):
        raise NotImplementedError

    def func(self, *args):
        raise NotImplementedError

    def step(self, *args):
        raise NotImplementedError


# What was asked for, as the user spells it, and what to use instead.
@pytest.mark.parametrize(
    "solver,asked,instead",
    [
        (diffrax.Euler(), "diffrax.Euler()", "Use `solver=diffrax.Euler()` as it is"),
        (diffrax.EulerHeun(), "diffrax.EulerHeun()", "`UReversible(diffrax.Heun())`."),
        (
            diffrax.HalfSolver(diffrax.Tsit5()),
            "diffrax.HalfSolver()",
            "if its steps are to be undone, `UReversible(diffrax.Tsit5())`.",
        ),
        (
            diffrax.HalfSolver(diffrax.ReversibleHeun()),
            "diffrax.HalfSolver()",
            "to be undone, `diffrax.ReversibleHeun()`.",
        ),
        (
            diffrax.Kvaerno3(),
            "diffrax.Kvaerno3()",
            "`solver=diffrax.Kvaerno3()` as it is, with `adjoint=ReversibleAdjoint()`.",
        ),
        (diffrax.ALIGN(0.1), "diffrax.ALIGN()", "to be undone, `ABOBA()`."),
        (_HasSrkStep(), "_HasSrkStep()", "undone, `UReversible(diffrax.Heun())`."),
        (_Other(), "_Other()", "to be undone, `UReversible(diffrax.Tsit5())`."),
    ],
    ids=repr,
)
def test_base_is_not_explicit_runge_kutta(solver, asked, instead):
    start = re.escape(f"`UReversible({asked})` is not supported, as")
    with pytest.raises(ValueError, match=f"^{start} .*{re.escape(instead)}"):
        dfxr.UReversible(solver)


def test_base_is_a_class():
    with pytest.raises(ValueError, match=r"use `UReversible\(diffrax.Tsit5\(\)\)`"):
        # (Not by the class, of which the tests check the annotations.)
        check_base(diffrax.Tsit5)


@pytest.mark.parametrize(
    "solver", [RK, dfxr.ReversibleHeun(), diffrax.LeapfrogMidpoint()]
)
def test_base_is_reversible(solver):
    with pytest.raises(ValueError, match="reversible already: use `solver="):
        dfxr.UReversible(solver)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.001, float("nan"), float("inf")])
def test_coupling_parameter_range(value):
    with pytest.raises(ValueError, match="greater than 0 and at most 1"):
        dfxr.UReversible(diffrax.Heun(), coupling_parameter=value)


class _HasStep(diffrax.Heun):
    def step(self, *args, **kwargs):
        raise NotImplementedError


class _HasOtherDenseInfo(diffrax.Heun):
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation


class _HasOtherShape(diffrax.Heun):
    @staticmethod
    def interpolation_cls(t0, t1, y0, y1, k):
        return diffrax.LocalLinearInterpolation(t0, t1, y0, k)


@pytest.mark.parametrize(
    "base,message",
    [
        (_HasStep(), r"`_HasStep` has a `step` of its own"),
        (_HasOtherDenseInfo(), r"needs `_HasOtherDenseInfo.interpolation_cls`"),
        (_HasOtherShape(), r"needs `_HasOtherShape.interpolation_cls`"),
    ],
)
def test_base_is_not_as_diffrax_has_it(base, message):
    with pytest.raises(ValueError, match=message):
        dfxr.UReversible(base)


@pytest.mark.parametrize("solver", [dfxr.ReversibleHeun, dfxr.LeapfrogMidpoint])
@pytest.mark.parametrize("interpolation", ["cubic", None])
def test_interpolation(solver, interpolation):
    with pytest.raises(ValueError, match='must be "hermite" or "linear"'):
        solver(interpolation=interpolation)


def test_coupling_parameter_bounds_allowed():
    for value in (1, 1.0, 1e-3):
        assert dfxr.UReversible(diffrax.Heun(), value).coupling_parameter == value


@pytest.mark.parametrize("base", [diffrax.Tsit5(), diffrax.Midpoint()])
def test_sde_needs_stratonovich(base):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), jax.random.key(0))
    terms = diffrax.MultiTerm(
        TERM, diffrax.ControlTerm(lambda t, y, args: 0.1 * y, path)
    )
    if isinstance(base, diffrax.AbstractStratonovichSolver):
        assert solve(jnp.array(1.0), terms=terms, solver=dfxr.UReversible(base)).ys
    else:
        # diffrax itself warns of this.
        with (
            pytest.warns(UserWarning, match="not marked as converging"),
            pytest.raises(ValueError, match=r"UReversible\(diffrax.Heun\(\)\)"),
        ):
            solve(jnp.array(1.0), terms=terms, solver=dfxr.UReversible(base))


@pytest.mark.parametrize(
    "solver,remedy",
    [
        (diffrax.Tsit5(), r"Use `UReversible\(diffrax.Tsit5\(\)\)`"),
        (diffrax.Euler(), r"Use `UReversible\(diffrax.Heun\(\)\)`"),
        (diffrax.HalfSolver(diffrax.Tsit5()), r"UReversible\(diffrax.Tsit5\(\)\)"),
    ],
)
def test_solver_is_not_reversible(solver, remedy):
    # What undoes steps refuses it, and the adjoint does not.
    arguments = (TERM, solver, 0.0, 1.0, 0.1, jnp.ones(2))
    with pytest.raises(ValueError, match=remedy):
        dfxr.diagnose(*arguments)
    assert jnp.all(solve(solver=solver).ys > 0)


def test_unsafe_brownian_path():
    path = diffrax.UnsafeBrownianPath((), jax.random.key(0))
    terms = diffrax.ControlTerm(lambda t, y, args: y, path)
    with pytest.raises(ValueError, match="VirtualBrownianTree"):
        solve(jnp.array(1.0), terms=terms)


class _OwnController(diffrax.AbstractStepSizeController):
    """Constant steps, of a size that it has from the user."""

    dt: jax.Array

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + self.dt, None

    def adapt_step_size(self, t0, t1, *args):
        return True, t1, t1 + self.dt, False, None, diffrax.RESULTS.successful


def test_controller_of_another_kind():
    def loss(dt):
        return jnp.sum(solve(stepsize_controller=_OwnController(dt)).ys)

    assert loss(jnp.array(0.1)) > 0
    with pytest.raises(NotImplementedError, match="not one of diffrax's own"):
        jax.grad(loss)(jnp.array(0.1))


class _Skips(_OwnController):
    """Leaves out a part of the time."""

    def adapt_step_size(self, t0, t1, *args):
        return True, t1 + 0.01, t1 + self.dt, False, None, diffrax.RESULTS.successful


@pytest.mark.parametrize("checkpoints", [0, 6, "auto"])
def test_controller_that_leaves_out_time(checkpoints):
    # Such steps are recomputed: it is not recorded where they start.
    def gradient(adjoint):
        controller = _Skips(jnp.array(0.07))
        saveat = diffrax.SaveAt(ts=jnp.linspace(0, 1, 7))
        loss = lambda y0: jnp.sum(
            solve(y0, saveat=saveat, stepsize_controller=controller, adjoint=adjoint).ys
        )
        return jax.jit(jax.grad(loss))(jnp.array([1.0, 2.0]))

    ours = gradient(dfxr.ReversibleAdjoint(checkpoints))
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    # A few roundings in each of some ten steps.
    assert jnp.all(jnp.abs(ours / expected - 1) < 100 * jnp.finfo(float).eps)


def test_gradient_of_tolerances_is_zero():
    # As with every other adjoint: diffrax stops it.
    @jax.grad
    def gradient(rtol):
        controller = diffrax.PIDController(rtol=rtol, atol=1e-3)
        return jnp.sum(solve(stepsize_controller=controller).ys)

    assert gradient(jnp.array(1e-3)) == 0


def _loss(y0, **kwargs):
    return jnp.sum(solve(y0, **kwargs).ys ** 2)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_third_derivatives(transform):
    with pytest.raises(NotImplementedError, match="has no third derivatives"):
        transform(jax.jacfwd(jax.hessian(_loss)))(jnp.ones(2))


def test_forward_mode_of_step_ts():
    def loss(step_ts):
        pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        controller = diffrax.ClipStepSizeController(pid, step_ts=step_ts)
        return jnp.sum(solve(stepsize_controller=controller).ys)

    with pytest.raises(NotImplementedError, match="with respect to `ClipStepSize"):
        jax.jacfwd(loss)(jnp.array([0.25]))


@pytest.mark.parametrize("checkpoints", [-1, True])
def test_checkpoints(checkpoints):
    with pytest.raises(ValueError, match="nonnegative integer"):
        dfxr.ReversibleAdjoint(checkpoints=checkpoints)


def test_register_reversible():
    with pytest.raises(ValueError, match="subclass of `diffrax.AbstractSolver`"):
        dfxr.register_reversible(int, lambda x: x)


def test_registered():
    class Mine(diffrax.Heun):
        pass

    from diffrax_reversible._registry import as_reversible

    assert as_reversible(Mine()) is None
    dfxr.register_reversible(Mine, lambda _: dfxr.LeapfrogMidpoint())
    # Not run as itself, for its state is another: only the lookup is shown here.
    assert type(as_reversible(Mine())) is dfxr.LeapfrogMidpoint


def test_backward_step_of_another_structure():
    class Wrong(dfxr.AbstractReversibleSolver):
        term_structure = diffrax.ODETerm
        interpolation_cls = diffrax.LocalLinearInterpolation

        def init(self, *args):
            return GenericLeapfrog().init(*args)

        def func(self, *args):
            return GenericLeapfrog().func(*args)

        def step(self, *args):
            return GenericLeapfrog().step(*args)

        def backward_step(self, *args):
            y0, dense_info, state = GenericLeapfrog().backward_step(*args)
            return y0.astype(jnp.float32), dense_info, state

    with pytest.raises(ValueError, match="Wrong.backward_step` must return `y0`"):
        solve(solver=Wrong())


def test_coupling_that_reads_what_it_updates():
    class Wrong(dfxr.AbstractCouplingSolver):
        term_structure = diffrax.ODETerm
        interpolation_cls = diffrax.LocalLinearInterpolation

        def init(self, *args):
            return None

        def func(self, terms, t0, y0, args):
            return terms.vf(t0, y0, args)

        def split(self, y, solver_state):
            return dfxr.Registers((y,))

        def merge(self, registers):
            return registers.registers[0], None

        def couplings(self):
            return (dfxr.Coupling(0, lambda step, registers: (0.1 * registers[0], {})),)

        def finish(self, registers0, registers1, infos):
            return None, dict(y0=registers0[0], y1=registers1[0])

    with pytest.raises(TypeError, match="NoneType"):
        solve(solver=Wrong())


#
# Steps that cannot be undone
#

JUMPS = diffrax.ClipStepSizeController(
    diffrax.PIDController(rtol=1e-2, atol=1e-2), jump_ts=[0.2, 0.4, 0.6]
)


def _jumping(checkpoints):
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(t < 0.4, -y, 2 * jnp.sin(y)))

    def loss(y0):
        sol = solve(
            y0,
            terms=term,
            solver=dfxr.ReversibleHeun(),
            stepsize_controller=JUMPS,
            adjoint=dfxr.ReversibleAdjoint(checkpoints=checkpoints),
        )
        return jnp.sum(sol.ys)

    return loss


@pytest.mark.parametrize("checkpoints", [0, 2])
def test_few_checkpoints(checkpoints):
    y0 = jnp.array([1.0, 2.0])
    ours, expected = [
        eqx.filter_jit(jax.grad(_jumping(n)))(y0) for n in (checkpoints, 4)
    ]
    assert jnp.allclose(ours, expected, rtol=1e-12)


class Forgetful(dfxr.AbstractReversibleSolver):
    """Asks for checkpoints at every third step, and its `backward_step` is wrong
    there."""

    term_structure = diffrax.ODETerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        return (GenericLeapfrog().init(terms, t0, t1, y0, args), 0)

    def func(self, *args):
        return GenericLeapfrog().func(*args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, i = solver_state
        *rest, inner, result = GenericLeapfrog().step(
            terms, t0, t1, y0, args, inner, made_jump
        )
        return *rest, (inner, i + 1), result

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        inner, i = solver_state
        y0, dense_info, inner = GenericLeapfrog().backward_step(
            terms, t0, t1, y1, args, inner, made_jump
        )
        y0 = jnp.where(i % 3 == 0, jnp.nan, y0)
        return y0, dense_info, (inner, i)

    def recorded(self, solver_state):
        return solver_state[1]

    def needs_checkpoint(self, solver_state, new_solver_state, made_jump):
        return solver_state[1] % 3 == 0


@pytest.mark.parametrize("batched", [False, True])
def test_user_solver_with_checkpoints(batched):
    def loss(y0, w, solver):
        term = diffrax.ODETerm(lambda t, y, args: jnp.sin(w * y))
        sol = solve(y0, terms=term, solver=solver)
        return jnp.sum(sol.ys)

    def gradient(solver):
        fn = lambda y0, w: loss(y0, w, solver)
        fn = jax.grad(fn, argnums=(0, 1))
        return eqx.filter_jit(jax.vmap(fn, (0, None)) if batched else fn)

    y0 = jnp.array([1.0, 2.0])
    y0 = jnp.stack([y0, 2 * y0]) if batched else y0
    w = jnp.array(1.5)
    ours = gradient(Forgetful())(y0, w)
    expected = gradient(CouplingLeapfrog())(y0, w)
    for x, y in zip(ours, expected):
        # Ten steps of a few roundings each.
        assert jnp.allclose(x, y, rtol=1e3 * jnp.finfo(jnp.float64).eps, atol=0)


#
# All messages
#

SOURCE = pathlib.Path(dfxr.__file__).parent
# What raises an error at run time is given its message.
RAISING = {"error_if", "branched_error_if", "nondifferentiable_backward"}


def _text(node, names):
    """All literals in an expression; `{}` for what is known at run time only."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.Name):
        return names.get(node.id, "{}")
    if isinstance(node, ast.FormattedValue):
        name = isinstance(node.value, ast.Name)
        return _text(node.value, names) if name else "{}"
    return "".join(_text(child, names) for child in ast.iter_child_nodes(node))


def _messages():
    """Of every exception that is made in the source, and of every `error_if`."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
                name = ast.unparse(node.targets[0])
                names[name] = names.get(name, "") + _text(node.value, names)
        for node in ast.walk(tree):
            where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Raise):
                # Neither an exception without a message, nor one that is passed on.
                assert isinstance(node.exc, ast.Call), where
            if isinstance(node, ast.Call):
                *_, name = ast.unparse(node.func).split(".")
                if name.endswith("Error") or name in RAISING:
                    arguments = [*node.args, *(k.value for k in node.keywords)]
                    yield where, "".join(_text(x, names) for x in arguments)


class _Method(dfxr.AbstractSplitting):
    form: str

    @property
    def kicks(self):
        return {"sum": (1.1,), "order": (0.3, 0.7), "zero": (0.5, 0.0, 0.5)}.get(
            self.form, (1.0,)
        )

    @property
    def drifts(self):
        one = {"number": (1.0,), "order": (1.0,)}
        return one.get(self.form, (0.5, 0.5))

    def order(self, terms):
        return 2


class _HasTableaus(diffrax.Heun):
    term_structure = diffrax.MultiTerm[tuple[diffrax.ODETerm, diffrax.ODETerm]]
    tableau = diffrax.MultiButcherTableau(diffrax.Heun.tableau, diffrax.Heun.tableau)


class _GivesStages(diffrax.Heun):
    @staticmethod
    def interpolation_cls(t0, t1, y0, y1, k):
        return diffrax.LocalLinearInterpolation(t0=t0, t1=t1, y0=k, y1=k)


class _Wrong(CouplingLeapfrog):
    """A coupling solver with one thing wrong."""

    which: str = "split"

    @property
    def has_evaluate(self):
        return self.which != "split"

    def split(self, y, solver_state):
        registers = super().split(y, solver_state)
        return registers._replace(fixed=1) if self.which == "split" else registers

    def couplings(self):
        return super().couplings()[:2]


def _check(**kwargs):
    fine = dict(
        y=jnp.ones(2),
        event_is_lost=None,
        is_lost=jnp.array(False),
        throw=True,
        batch=Batch((), ()),
    )
    return check(jnp.ones(2), {}, jnp.ones(2), **{**fine, **kwargs})


def _sde(solver):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (), jax.random.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: y, path)
    if solver.term_structure == diffrax.AbstractTerm:
        terms, y0 = noise, jnp.array(1.0)
    else:
        terms, y0 = (noise, TERM), (jnp.array(1.0), jnp.array(1.0))
    solver.init(terms, 0.0, 0.1, y0, None)


# How to provoke each message, told by a part of it that is in no other. A string is the
# name of the test that does so.
PROVOKED = {
    # Arguments.
    "`ReversibleAdjoint(checkpoints=...)` must be": lambda: dfxr.ReversibleAdjoint(
        checkpoints=-1
    ),
    "`ReversibleAdjoint(checkpoint_every=...)` must be": lambda: dfxr.ReversibleAdjoint(
        checkpoint_every=0
    ),
    "(drift_tolerance=...)` must be": "test_reverse_solve.py::test_refused",
    # (Not by the class, of which the tests check the annotations.)
    "`ReversibleAdjoint(sum_over_batch=...)` must be": lambda: _check_sum_over_batch(1),
    "needs a subclass of `diffrax.AbstractSolver`": lambda: dfxr.register_reversible(
        int, lambda x: x
    ),
    '(interpolation=...)` must be "hermite" or': lambda: dfxr.ReversibleHeun(
        interpolation="cubic"
    ),
    "`StormerVerlet(form=...)` must be": lambda: dfxr.StormerVerlet("leapfrog"),
    "`AsynchronousLeapfrog(damping=...)` must be a number": lambda: _check_damping(
        None
    ),
    "`AsynchronousLeapfrog(damping=0.5)` discards": lambda: dfxr.AsynchronousLeapfrog(
        damping=0.5
    ),
    "`AsynchronousLeapfrog(damping=...)` must be greater": (
        lambda: dfxr.AsynchronousLeapfrog(damping=2)
    ),
    "`AsynchronousLeapfrog(damping=..., full_sync=True)`": (
        lambda: dfxr.AsynchronousLeapfrog(damping=0.9, full_sync=True)
    ),
    '`UReversible(coupling_parameter=...)` must be "auto"': (
        lambda: _check_coupling_parameter(None)
    ),
    "`UReversible(coupling_parameter=...)` must be greater than 0": (
        lambda: dfxr.UReversible(diffrax.Heun(), 2)
    ),
    "was given a class, and needs an instance": "test_base_is_a_class",
    "is reversible already: use `solver": lambda: dfxr.UReversible(RK),
    ")` is not supported, as `": lambda: dfxr.UReversible(_HasTableaus()),
    ".interpolation_cls` fails: ": lambda: dfxr.UReversible(_HasOtherDenseInfo()),
    ".interpolation_cls` gives ": lambda: dfxr.UReversible(_GivesStages()),
    "`Coupling(also=...)` must be a register other": lambda: dfxr.Coupling(
        0, lambda step, registers: (None, {}), also=0
    ),
    "`Coupling(scale=...)` must be a Python number": lambda: dfxr.Coupling(
        0, lambda step, registers: (None, {}), scale="half"
    ),
    "`Coupling(scale=0)` cannot be undone": lambda: dfxr.Coupling(
        0, lambda step, registers: (None, {}), scale=0.0
    ),
    "must differ in length by one": lambda: _Method("number"),
    "must add up to 1": lambda: _Method("sum"),
    "must be a palindrome": lambda: _Method("order"),
    "must not have zeros in it": lambda: _Method("zero"),
    "`diagnose(..., max_steps=None)`": lambda: dfxr.diagnose(
        TERM, RK, 0.0, 1.0, 0.1, jnp.ones(2), max_steps=None
    ),
    # When a solve starts.
    "needs a reversible solver, as it": lambda: dfxr.diagnose(
        TERM, diffrax.Tsit5(), 0.0, 1.0, 0.1, jnp.ones(2)
    ),
    "`adjoint=ReversibleAdjoint()` does not support `diffrax.Unsafe": lambda: solve(
        terms=diffrax.ControlTerm(
            lambda t, y, args: y,
            diffrax.UnsafeBrownianPath((), jax.random.key(0)),
        ),
        y0=jnp.array(1.0),
    ),
    "cannot be promoted to that of": lambda: cast_like(
        jnp.ones(2, jnp.float64), jnp.ones(2, jnp.float32)
    ),
    "marked as converging to the Stratonovich": lambda: _sde(
        dfxr.UReversible(diffrax.Tsit5())
    ),
    "neither to its Ito nor to its Stratonovich": lambda: _sde(
        dfxr.AsynchronousLeapfrog(damping=0.9)
    ),
    "sub-steps go backwards in time": lambda: _sde(dfxr.ForestRuth()),
    "`ABOBA()` needs the space-time Levy area": "test_aboba.py::test_refused",
    "`ABOBA()` needs `gamma` and `u` to be the same": "test_aboba.py::test_refused",
    ".split` must not set `Registers.fixed`": lambda: solve(solver=_Wrong()),
    "has_evaluate` needs two couplings, or": lambda: _Wrong(
        which="couplings"
    ).checked_couplings(),
    "is true, but `": lambda: _Wrong(which="evaluate").evaluate(
        TERM, 0.0, (jnp.ones(2),), None
    ),
    ".backward_step` must return `": "test_backward_step_of_another_structure",
    # When it is differentiated.
    "holds that is not one of diffrax's own": "test_controller_of_another_kind",
    "has no third derivatives": "test_third_derivatives",
    "cannot differentiate in forward mode with respect": "test_forward_mode_of_step_ts",
    # When its gradient has been computed. (By solves: elsewhere.)
    "cannot differentiate output at steps": "test_times.py::test_chosen_steps",
    "could not recompute the states of this": lambda: jax.block_until_ready(
        _check(is_lost=jnp.array(True))
    ),
    "must ask for the same increments": "test_brownian.py::test_other_increments",
    "The gradient is not finite": "test_stability.py::test_gradient_not_finite",
    "stops at `max_steps` with a rejected step": (
        "test_events.py::test_last_step_rejected"
    ),
    # When it is undone.
    **{
        part: f"test_reverse_solve.py::{test}"
        for part, test in {
            "`reverse_solve` does not support `diffrax.UnsafeBro": "test_refused",
            "`SaveAt(made_jump=True)`": "test_refused",
            "`ReversibleAdjoint()`, which is the default": "test_refused",
            "`reverse_solve` does not support `max_steps=None`": "test_refused",
            "state a part is not known if the solve was resumed": "test_resumed",
            "needs exactly one of `dt0` and `step_ts`": "test_refused",
            "where a step discards information": "test_refused",
            "has a state, without which its steps cannot be": "test_refused",
            "both `recorded` and `steer`": "test_steered",
            "must be the ends of all steps from": "test_wrong_steps",
            "did not make as many steps as the solve had": "test_steps_too_short",
            "in a state with which no solve starts": "test_drift",
        }.items()
    },
    # When the package is imported.
    "in which {}. Install a supported version": "test_compat.py::test_unsupported_host",
}


def test_every_message_is_listed():
    messages = dict(_messages())
    assert len(messages) > 30
    for where, message in messages.items():
        assert any(part in message for part in PROVOKED), f"{where}: {message}"
        # It names what was asked for, as the user spells it.
        assert "`" in message, f"{where}: {message}"
    for part in PROVOKED:
        found = [where for where, message in messages.items() if part in message]
        assert len(found) == 1, f"{part}: {found}"


@pytest.mark.parametrize("part", PROVOKED)
def test_message(part):
    provoke = PROVOKED[part]
    if isinstance(provoke, str):
        *file, name = provoke.split("::")
        path = pathlib.Path(__file__).with_name(*file) if file else __file__
        assert f"def {name}(" in pathlib.Path(path).read_text()
        return
    errors = (ValueError, NotImplementedError, RuntimeError)
    with pytest.raises(errors, match=re.escape(part)):
        provoke()
