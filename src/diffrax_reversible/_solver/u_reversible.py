import functools as ft
import math
from collections.abc import Callable
from typing import Any, cast, final, Literal, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import (
    Args,
    BoolScalarLike,
    DenseInfo,
    is_sde,
    PyTree,
    RealScalarLike,
    Term,
    Terms,
    VF,
    Y,
)
from .._method import controlled as controlled
from .._method.affine import Coupling, Registers, StepInfo
from .._method.coupling import AbstractCouplingSolver
from .._method.explicit_rk import (
    explicit_rk_increment,
    Increment,
    num_evaluations,
    uses_last_stage,
)
from .._method.interpolation import has_own_interpolation
from .._method.srk import srk_control, srk_increment
from .._method.tree import stop_gradient
from .bases import check_base, spelling


_SolverState: TypeAlias = PyTree


@final
class UReversible(
    AbstractCouplingSolver[_SolverState], diffrax.AbstractWrappedSolver[_SolverState]
):
    r"""Makes an explicit Runge--Kutta solver, for ODEs or SDEs, algebraically
    reversible.

    The solver to try first, with [`diffrax_reversible.ReversibleAdjoint`][]:
    `UReversible(diffrax.Tsit5())` for ODEs, `UReversible(diffrax.Heun())` for
    Stratonovich SDEs.

    Has the order and the stability of the wrapped solver, and its embedded error
    estimate, so that step sizes can be adaptive. Each step makes `2s` evaluations of
    the vector field, where `s` is the number of stages of the wrapped solver (6 for
    [`diffrax.Tsit5`][]: a last stage that only its error estimate needs does not count,
    as it is shared with the other half of the step). Each step of the backward pass
    makes `2s` evaluations too, `s` of them with a pullback (and one more for output at
    times between steps); or all of them, if `coupling_parameter` is a number.

    At the limit of stability, as on a stiff problem, no step can be undone, and so the
    second half of most of them is left out: they make `s + 1` evaluations (or `s`, of a
    stochastic Runge--Kutta solver). So it is after 16 such steps in a row, and then in
    all but each 16th; of a batch, where it is so for all elements. On the backward pass
    these steps are recomputed, and `s` evaluations are made with a pullback (`s + 1` if
    there is output at times between steps). (So a vector field may not wait for other
    devices there, as for a `jax.lax.pmean` within `jax.shard_map`, if steps of these
    differ.)

    A second copy `z` of the solution is carried along, so that `y` and the solver state
    take twice the memory of `y`. The solver state is `(y - z, code, account)`. Here `y
    - z` has the structure, shapes and dtypes of `y`. `code` is the coupling $m$ below
    (and where that is 0, since how many steps), as a `uint8`; it is the one byte that
    is recorded for every step. `account` is of two `float32` numbers (three for an
    SDE), from which the next coupling is chosen. If `coupling_parameter` is a number
    then the solver state is `z`.

    Uses the interpolation of the wrapped solver for dense/ts output, without further
    evaluations: of order 5 for `Tsit5` and `Dopri5`, 6 for `Dopri8`; and one less for
    the derivative. Where the wrapped solver has linear interpolation, or the cubic of
    diffrax's lower order solvers, 3rd order Hermite interpolation with the slopes at
    both ends takes its place. (For `Midpoint` and `Ralston` that gives a derivative of
    order 2, in place of 1.)

    When used to solve SDEs, converges to the Stratonovich solution, and needs a wrapped
    solver that does. That may be a stochastic Runge--Kutta solver, such as
    [`diffrax.ShARK`][] for additive, [`diffrax.SlowRK`][] for commutative and
    [`diffrax.SPaRK`][] for general noise. The strong order is that of the wrapped
    solver for this kind of noise. Here `s` counts the drifts and diffusions in its
    stages (of additive noise, one diffusion at either end of the step). The Brownian
    motion needs the Levy area that the wrapped solver does, and is queried once a step,
    and once more on the backward pass. Dense output is linear. In solves from a later
    to an earlier time the steps differ from those of diffrax's own solvers (0.7.2),
    which take the drift with the wrong sign there.

    !!! warning

        On a dissipative problem steps are damped to stay stable. A damped step discards
        information, so rounding errors grow in the backward pass. The solver estimates
        by how much, and has a state stored before that is too much: at none or few
        steps on a conservative problem, at very many on a strongly dissipative one. See
        `sol.stats["num_checkpoints"]` and [`diffrax_reversible.diagnose`][].

    !!! warning

        The second half of a step evaluates the vector field a little off the solution.
        What is not finite there is left out, but an error that the vector field raises
        itself, by `equinox.error_if`, is an error.

    !!! warning

        With a number as the coupling, $y - z$ is multiplied by about $\lambda e^{-ah}$
        in each step along a component of the solution that behaves like $e^{at}$. So on
        every component that decays it **grows**, and in time spoils the solution; or,
        with adaptive steps, it makes the steps so small that `max_steps` is reached.

    **How it works.** Let $\Psi_h(t, y)$ be the increment of the wrapped solver over a
    step of size $h$. With $z_0 = y_0$, a step is

    $z' = m z_n + (1 - m) y_n$

    $y_{n+1} = y_n + \Psi_h(t_n, z')$

    $z_{n+1} = z' - \Psi_{-h}(t_{n+1}, y_{n+1})$

    It is undone by solving these for $z'$, $y_n$ and $z_n$, in this order. The coupling
    $m = m_n$ is chosen anew for each step, from $y$, $z$ and the error estimate: 1 as
    long as $y - z$ is small, and otherwise what makes it small again. So the solution
    does not depend on the adjoint, nor on rejected steps. When a step is differentiated
    $m$ is a constant, and so is $y_n - z_n$: the derivative is that of a step of the
    wrapped solver from $z'$. (It is the same for all adjoints, but not for finite
    differences of a coarse solve.) Order, stability and the growth of rounding errors
    are derived in the module `diffrax_reversible._method.controlled`, and the strong
    order in `diffrax_reversible._method.srk`.

    If `coupling_parameter` is a number $\lambda$ then a step is that of the reference,

    $y_{n+1} = \lambda y_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n)$

    $z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, y_{n+1})$

    ??? cite "Reference"

        ```bibtex
        @article{mccallum2024efficient,
            title={Efficient, Accurate and Stable Gradients for Neural {ODE}s},
            author={McCallum, Sam and Foster, James},
            journal={arXiv preprint arXiv:2410.11648},
            year={2024}
        }
        ```
    """

    solver: diffrax.AbstractERK | diffrax.AbstractSRK
    coupling_parameter: float | Literal["auto"] = "auto"

    def __init__(
        self,
        solver: diffrax.AbstractSolver[Any],
        coupling_parameter: float | int | Literal["auto"] = "auto",
    ):
        check_base(solver)
        self.solver = solver  # pyright: ignore[reportAttributeAccessIssue]
        self.coupling_parameter = _check_coupling_parameter(coupling_parameter)

    @property
    def _is_srk(self) -> bool:
        return isinstance(self.solver, diffrax.AbstractSRK)

    @property
    def _tableau(self) -> Any:
        return self.solver.tableau

    @property
    def term_structure(self) -> Any:
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractLocalInterpolation]:
        if self._is_srk or has_own_interpolation(self.solver):
            return self.solver.interpolation_cls
        return diffrax.ThirdOrderHermitePolynomialInterpolation

    @property
    def term_compatible_contr_kwargs(self) -> Any:
        return self.solver.term_compatible_contr_kwargs

    # diffrax's other adjoints set this field on whatever says that it is a Runge--Kutta
    # solver, as a wrapper around one does.
    @property
    def scan_kind(self) -> Any:
        return self.solver.scan_kind

    def order(self, terms: Terms) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.strong_order(terms)

    def error_order(self, terms: Terms) -> RealScalarLike | None:
        return self.solver.error_order(terms)

    @property
    def _interpolates_with_slope(self) -> bool:
        """Whether the slope at the end of the step goes into `dense_info`."""
        if self._is_srk:
            return False
        return not (
            has_own_interpolation(self.solver) and uses_last_stage(self._tableau)
        )

    @property
    def _num_unrolled(self) -> int:
        return 1 if self._is_srk else num_evaluations(self._tableau)

    @property
    def _controlled(self) -> bool:
        return self.coupling_parameter == "auto"

    def init(
        self,
        terms: Term,
        t0: RealScalarLike,
        t1: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> _SolverState:
        is_stratonovich = isinstance(self.solver, diffrax.AbstractStratonovichSolver)
        noisy = is_sde(terms) or self._is_srk
        if noisy and not is_stratonovich:
            name = spelling(self.solver)
            raise ValueError(
                f"`UReversible({name}())` cannot solve an SDE, as `{name}` is not "
                "marked as converging to the Stratonovich solution. Use "
                "`UReversible(diffrax.Heun())`, or for strong order 1.5 with additive "
                "noise `UReversible(diffrax.ShARK())`."
            )
        if self._is_srk:
            # Checks the diffusion; as does this, which is what it lacks.
            self.solver.init(cast(Any, terms), t0, t1, y0, args)
            eqx.filter_eval_shape(_check_product, terms, t0, t1, y0, args)
        if self._controlled:
            code, account = controlled.init(noisy)
            return jtu.tree_map(jnp.zeros_like, y0), code, account
        return y0

    def func(
        self,
        terms: Term,
        t0: RealScalarLike,
        y0: Y,
        args: Args,
    ) -> VF:
        return self.solver.func(cast(Any, terms), t0, y0, args)

    def split(self, y: PyTree, solver_state: Any) -> Registers:
        if self._controlled:
            difference, _, account = solver_state
            return Registers((y, difference), memo=account)
        return Registers((y, solver_state))

    def merge(self, registers: Registers) -> tuple[PyTree, Any]:
        y, other = registers.registers
        if self._controlled:
            return y, (other, registers.fixed, registers.memo)
        return y, other

    def recorded(self, solver_state: Any) -> Any:
        if self._controlled:
            _, code, _ = solver_state
            return code
        return ()

    def wants_checkpoint(
        self,
        solver_state: _SolverState,
        new_solver_state: _SolverState,
        made_jump: BoolScalarLike,
    ) -> BoolScalarLike:
        del solver_state, made_jump
        if self._controlled:
            difference, _, account = new_solver_state
            return controlled.wants_checkpoint(account, difference)
        return False

    @property
    def constants(self) -> tuple[int, ...]:
        return (1,) if self._controlled else ()

    def couplings(self) -> tuple[Coupling, ...]:
        if self._controlled:
            # Of `y` and `d = y - z`. As a number of its own `d` can be small to a
            # precision that the difference of two numbers does not have.
            return (
                Coupling(1, None, scale=controlled.coupling),
                Coupling(0, self._advance, also=1),
                Coupling(1, self._advance_difference),
            )
        return (
            Coupling(0, self._advance_y, scale=cast(float, self.coupling_parameter)),
            Coupling(1, self._advance_z),
        )

    def _advance(self, step: StepInfo, registers: tuple[PyTree, ...]):
        # `y - d`, in the place of `y`.
        z0, _ = registers
        return self._go(step, z0)

    def _advance_difference(self, step: StepInfo, registers: tuple[PyTree, ...]):
        y1, _ = registers
        slope = None
        if self._interpolates_with_slope:
            # All else is a constant. Without the derivative of this one, that of the
            # interpolation would be wrong.
            slope = step.terms.vf_prod(step.t1, y1, step.args, step.control)
        constants = stop_gradient((step, y1, slope))

        def make():
            shift, info = self._return(*constants)
            shift = jtu.tree_map(controlled.zero_unless_finite, shift)
            return shift, info if slope is None else {}

        # (A stage is like an increment, and has been traced.)
        struct = jax.eval_shape(make) if slope is None else (slope, {})
        zeros = lambda: jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), struct)
        shift, info = controlled.unless_left_out(step.fixed, make, zeros)
        return shift, info if slope is None else dict(k=slope)

    def _advance_y(self, step: StepInfo, registers: tuple[PyTree, ...]):
        _, z0 = registers
        shift, info = self._go(step, z0)
        weight = 1 - cast(float, self.coupling_parameter)
        if weight != 0:
            shift = jtu.tree_map(lambda z, p: weight * z + p, z0, shift)
        return shift, info

    def _advance_z(self, step: StepInfo, registers: tuple[PyTree, ...]):
        y1, _ = registers
        shift, info = self._return(step, y1)
        return jtu.tree_map(lambda p: -p, shift), info

    def control(
        self,
        terms: Terms,
        t0: RealScalarLike,
        t1: RealScalarLike,
        fixed: PyTree,
    ) -> PyTree:
        if self._is_srk:
            return srk_control(self._tableau, terms, t0, t1)
        return terms.contr(t0, t1)

    def _increment(
        self, step: StepInfo, y: PyTree, sign: int, first: PyTree = None
    ) -> Increment:
        t_from, t_to = (step.t0, step.t1) if sign == 1 else (step.t1, step.t0)
        if self._is_srk:
            increment = srk_increment
        else:
            scan = None if self.scan_kind is None else True
            increment = ft.partial(explicit_rk_increment, scan=scan, first=first)
        return increment(
            self._tableau,
            step.terms,
            t_from,
            t_to,
            y,
            step.args,
            step.control,
            sign,
        )

    def _go(self, step: StepInfo, y: PyTree):
        psi = self._increment(step, y, 1)
        return psi.increment, dict(k=psi.k, error=psi.error)

    def _return(self, step: StepInfo, y: PyTree, first: PyTree = None):
        psi = self._increment(step, y, -1, first)
        return psi.increment, dict(k=psi.k[0])

    def finish(
        self,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[Y | None, DenseInfo]:
        y0, other0 = registers0
        y1, _ = registers1
        *_, info0, info1 = infos
        k = info0["k"]
        y_error = info0["error"]
        if self._is_srk:
            return y_error, dict(y0=y0, y1=y1)
        if not uses_last_stage(self._tableau):
            # The last stage is at `(t1, z0 + Psi)`; `(t1, y1)` is as close to it as `y`
            # is to `z`, and has been evaluated anyway.
            b_error = self._tableau.b_error[-1].item()
            y_error = jtu.tree_map(lambda e, k: e + b_error * k, y_error, info1["k"])
            k = (*k, info1["k"])
        if not has_own_interpolation(self.solver):
            return y_error, dict(y0=y0, y1=y1, k0=k[0], k1=info1["k"])
        k = jtu.tree_map(lambda *x: jnp.stack(x), *k)
        if not self._controlled:
            # `y1` is `(1 - lambda) (z0 - y0)` away from `y0 + Psi`. A number added to
            # all of the stages adds a line, from zero to that number.
            weight = 1 - cast(float, self.coupling_parameter)
            k = jtu.tree_map(lambda k, y, z: k + weight * (z - y)[None], k, y0, other0)
        return y_error, dict(y0=y0, y1=y1, k=k)

    def steer(
        self,
        fixed: PyTree,
        memo: PyTree,
        registers0: tuple[PyTree, ...],
        registers1: tuple[PyTree, ...],
        y_error: Y | None,
        infos: tuple[dict[str, PyTree], ...],
    ) -> tuple[PyTree, PyTree]:
        if not self._controlled:
            return fixed, memo
        y0, _ = registers0
        y1, difference1 = registers1
        *_, info0, info1 = infos
        slopes = info0["k"][0], info1["k"]
        if not controlled.has_error_estimate(self._tableau):
            order = self.solver.order(cast(Any, None))
            y_error = controlled.error_from_slopes(*slopes, order)
        return controlled.update(
            controlled.reference_factor(self._tableau),
            fixed,
            memo,
            difference1,
            y_error,
            y0,
            y1,
            None if controlled.is_noisy(memo) else slopes,
        )


UReversible.__init__.__doc__ = """**Arguments:**

- `solver`: The solver to wrap; an instance of any [`diffrax.AbstractERK`][] or
    [`diffrax.AbstractSRK`][] that is given by its tableau. The stages of an ODE solver
    are unrolled, or made by a loop if they have more than 1000 operations in all (or,
    other than on CPUs, if the vector field is made of pointwise operations alone).
    `Tsit5(scan_kind="lax")` always makes them by a loop (of one kind, whichever is
    given), so that the vector field is compiled 3 times in a step and not `2s` times.
    Use that for vector fields that take long to compile.
- `coupling_parameter`: `"auto"`, for a coupling that is chosen in each step; or the
    number `lambda` of the reference, with `0 < coupling_parameter <= 1`. The smaller
    the number, the better are `y` and `z` kept together, and the faster do rounding
    errors grow on the backward pass: by `1 / coupling_parameter` in each step.

**Raises:**

- `ValueError` if `solver` is not an explicit Runge--Kutta solver, for ODEs or for SDEs,
    that is given by its tableau; if its `interpolation_cls` is not called like those of
    diffrax; if `coupling_parameter` is out of its range; and, when a solve starts, for
    an SDE with a wrapped solver that is not a [`diffrax.AbstractStratonovichSolver`][].
"""


def _check_coupling_parameter(value) -> float | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    try:
        as_float = float(value)
    except (TypeError, ValueError) as e:  # includes traced values
        raise ValueError(
            '`UReversible(coupling_parameter=...)` must be "auto", or a number that is '
            f"known when the solver is made (not a traced array); got {value}."
        ) from e
    if not (math.isfinite(as_float) and 0 < as_float <= 1):
        raise ValueError(
            "`UReversible(coupling_parameter=...)` must be greater than 0 and at most "
            f'1, or "auto"; got {value}.'
        )
    return as_float


def _check_product(terms, t0, t1, y0, args):
    """That what the diffusion and the control make is of the shape of `y`."""
    _, diffusion = terms.terms
    return diffusion.vf_prod(t0, y0, args, diffusion.contr(t0, t1))
