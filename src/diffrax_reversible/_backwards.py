"""What diffrax is given to undo a solve: a solver whose steps are those of
`backward_step`, and a step size controller that goes back from time to time.

The host integrates over reversed time, and here that is reversed once more: so
`backward_step` is called with the very terms and times that `step` was called with.
"""

from collections.abc import Callable
from typing import final

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._compat import PyTree, Terms, WrapTerm
from ._method.base import AbstractReversibleSolver


def with_recorded(solver, state: PyTree, values: list[Array]) -> PyTree:
    if len(values) == 0:
        return state
    return eqx.tree_at(lambda s: jtu.tree_leaves(solver.recorded(s)), state, values)


def _reversed(terms: Terms) -> Terms:
    """The terms of a solve over reversed time, as those of the solve to be undone."""
    is_wrapped = lambda x: isinstance(x, WrapTerm)
    return jtu.tree_map(
        lambda x: WrapTerm(x.term, -x.direction), terms, is_leaf=is_wrapped
    )


@final
class Backwards(AbstractReversibleSolver, diffrax.AbstractStratonovichSolver):
    """Undoes steps, and so is undone by making them. Its state has the number of steps
    that are left. (Marked, for the host not to warn, as if for one kind of SDEs: it
    makes no step of its own.)"""

    solver: AbstractReversibleSolver
    recorded_values: list[Array]

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Callable[..., diffrax.AbstractLocalInterpolation]:
        return _ReversedInterpolation(self.solver.interpolation_cls)

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        assert False  # `reverse_solve` passes the state.

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        state, index = solver_state
        index = index - 1
        # (An element of a batch that is done makes steps before the first.)
        values = [x[jnp.maximum(index, 0)] for x in self.recorded_values]
        y1, dense_info, state = self.solver.backward_step(
            _reversed(terms),
            -t1,
            -t0,
            y0,
            args,
            with_recorded(self.solver, state, values),
            False,
        )
        return y1, None, dense_info, (state, index), diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, solver_state, made_jump):
        del made_jump
        state, index = solver_state
        y0, _, dense_info, state, _ = self.solver.step(
            _reversed(terms), -t1, -t0, y1, args, state, False
        )
        return y0, dense_info, (state, index + 1)


class _ReversedInterpolation(eqx.Module):
    interpolation_cls: Callable[..., diffrax.AbstractLocalInterpolation] = eqx.field(
        static=True
    )

    def __call__(self, *, t0, t1, **dense_info):
        return _Reversed(self.interpolation_cls(t0=-t1, t1=-t0, **dense_info))


class _Reversed(diffrax.AbstractLocalInterpolation):
    interpolation: diffrax.AbstractLocalInterpolation

    @property
    def t0(self):
        return -self.interpolation.t1

    @property
    def t1(self):
        return -self.interpolation.t0

    def evaluate(self, t0, t1=None, left=True):
        t1 = None if t1 is None else -t1
        return self.interpolation.evaluate(-t0, t1, not left)

    def derivative(self, t, left=True):
        out = self.interpolation.derivative(-t, not left)
        return jtu.tree_map(lambda x: -x, out)


class Retrace(diffrax.AbstractStepSizeController):
    """Steps from `ts[last]` to the one before, and so on."""

    ts: Array
    last: Array

    def wrap(self, direction):
        return Retrace(self.ts * direction, self.last)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        del terms, t0, t1, y0, dt0, args, func, error_order
        index = jnp.maximum(self.last - 1, 0)
        # diffrax takes the smaller of this and the end, and the derivative of both if
        # they are the same.
        return jnp.where(index == 0, jnp.inf, self.ts[index]), index

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        del t0, y0, y1_candidate, args, y_error, error_order
        index = jnp.maximum(controller_state - 1, 0)
        return True, t1, self.ts[index], False, index, diffrax.RESULTS.successful
