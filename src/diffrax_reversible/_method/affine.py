"""The couplings of which [`diffrax_reversible.AbstractCouplingSolver`][] makes steps,
and what they act on."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import Args, PyTree, RealScalarLike, Terms
from .tree import tree_add


class StepInfo(NamedTuple):
    """What a coupling is told of the step that it is a part of: the `step` in
    `Coupling(shift=...)`, called as `shift(step, registers)`.

    **Attributes:**

    - `terms`: The terms of the differential equation, as in `step`.
    - `t0`, `t1`: The start and the end of the step.
    - `args`: Any extra arguments passed to the vector field.
    - `control`: The result of [`diffrax_reversible.AbstractCouplingSolver.control`][].
    - `fixed`: What [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects
        of the solver state, at the start of the step.
    - `value`: In a solver with `has_evaluate`, and there in the first and the last
        coupling, the result of [`diffrax_reversible.AbstractCouplingSolver.evaluate`][]
        at the start and at the end of the step. Otherwise `None`.
    """

    terms: Terms
    t0: RealScalarLike
    t1: RealScalarLike
    args: Args
    control: PyTree
    fixed: PyTree
    value: PyTree = None


class Registers(NamedTuple):
    """`y` and the solver state, taken apart into what couplings update (the
    *registers*) and what they do not. [`diffrax_reversible.AbstractCouplingSolver`][]
    has the methods `split`, which returns it, and `merge`, which takes it.

    **Attributes:**

    - `registers`: A tuple with a PyTree of arrays for each register. A coupling updates
        `registers[coupling.register]`.
    - `value`: In a solver with `has_evaluate`, the most recent result of
        [`diffrax_reversible.AbstractCouplingSolver.evaluate`][]. Otherwise `None`.
    - `fixed`: What [`diffrax_reversible.AbstractReversibleSolver.recorded`][] selects
        of the solver state. `split` must leave it `None`; `merge` finds it here.
    - `memo`: What the solver keeps only to choose how it makes its coming steps. It is
        neither undone nor recorded: on the backward pass it stays as it was at the end
        of the solve.
    """

    registers: tuple[PyTree, ...]
    value: PyTree = None
    fixed: PyTree = None
    memo: PyTree = None


def _times(scale: Any, x: Any):
    """`scale * x`, of the dtype of `x`."""
    return (scale.astype(x.dtype) if eqx.is_array(scale) else scale) * x


def _over(scale: Any, x: Any):
    return x / (scale.astype(x.dtype) if eqx.is_array(scale) else scale)


def _is_one(scale: RealScalarLike) -> bool:
    return isinstance(scale, float) and scale == 1.0


class Coupling(eqx.Module):
    r"""An affine coupling: one register is scaled, and shifted by a function of the
    others. [`diffrax_reversible.AbstractCouplingSolver`][] makes its steps of them.

    A coupling updates

    $x_i \leftarrow \alpha x_i + \phi(x_j, j \neq i)$ with $\alpha \neq 0$

    and is undone by $x_i \leftarrow (x_i - \phi) / \alpha$, whatever $\phi$ is. A
    gradient $g$ is pulled back by $g_j \leftarrow g_j + (\partial \phi / \partial
    x_j)^T g_i$ and then $g_i \leftarrow \alpha g_i$, so that a single VJP of $\phi$
    gives both the value that undoes the coupling and the map for the gradient.
    """

    register: int = eqx.field(static=True)
    shift: (
        Callable[[StepInfo, tuple[PyTree, ...]], tuple[PyTree, dict[str, PyTree]]]
        | None
    ) = eqx.field(static=True)
    # A number or a function. (Checked below, with a message better than a checker's.)
    scale: Any = eqx.field(static=True, default=1.0)
    also: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        if self.also is not None and not (
            _is_one(self.scale) and self.also != self.register
        ):
            raise ValueError(
                "`Coupling(also=...)` must be a register other than "
                "`Coupling(register=...)`, and needs `scale=1.0`, as both are"
                f" shifted; got `also={self.also}`, `register={self.register}`, "
                f"`scale={self.scale}`."
            )
        if callable(self.scale):
            return
        if not isinstance(self.scale, (int, float)):
            raise ValueError(
                "`Coupling(scale=...)` must be a Python number, or a function of "
                f"`StepInfo.fixed` that returns a scalar; got {self.scale}."
            )
        if self.scale == 0:
            raise ValueError(
                "`Coupling(scale=0)` cannot be undone. Use a nonzero `scale`."
            )

    def scale_at(self, fixed: PyTree) -> Any:
        """The factor in a step with this `StepInfo.fixed`."""
        return self.scale(fixed) if callable(self.scale) else self.scale

    def shift_at(
        self, step: StepInfo, others: tuple[PyTree, ...]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """What `shift` returns, if there is one."""
        return (None, {}) if self.shift is None else self.shift(step, others)

    def scaled(self, registers: Sequence[PyTree], scale: RealScalarLike) -> PyTree:
        """The register that it updates, before that is shifted."""
        x = registers[self.register]
        return x if _is_one(scale) else jtu.tree_map(lambda x: _times(scale, x), x)

    def apply(
        self, registers: list[PyTree], scale: RealScalarLike, shift: PyTree
    ) -> None:
        """Updates `registers`, in place."""
        registers[self.register] = self.scaled(registers, scale)
        if self.shift is not None:
            for j in self.updated:
                registers[j] = jtu.tree_map(lambda x, s: x + s, registers[j], shift)

    def undo(
        self, registers: list[PyTree], scale: RealScalarLike, shift: PyTree
    ) -> None:
        """The inverse of `apply`.

        Of what was at rest, as an increment was less than half of the spacing of
        numbers, it is exact: the spacing may be another on the other side, and there
        may be a kink."""
        undone = ft.partial(self._undone, scale)
        for j in self.updated:
            if self.shift is None:
                registers[j] = jtu.tree_map(undone, registers[j])
            else:
                registers[j] = jtu.tree_map(undone, registers[j], shift)

    def _undone(self, scale: RealScalarLike, x1: Any, shift: Any = None) -> Any:
        x0, again = x1, x1
        if not _is_one(scale):
            again = _times(scale, again)
        if shift is not None:
            x0, again = x0 - shift, again + shift
        if not _is_one(scale):
            x0 = _over(scale, x0)
        return jnp.where(again == x1, x1, x0)

    def pull_scale(self, grads: list[PyTree], scale: RealScalarLike) -> None:
        """The part of the pullback that does not go through `shift`."""
        if not _is_one(scale):
            i = self.register
            grads[i] = jtu.tree_map(lambda g: _times(scale, g), grads[i])

    @property
    def updated(self) -> tuple[int, ...]:
        """The registers that it updates."""
        return (self.register,) if self.also is None else (self.register, self.also)

    def others(self, registers: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """What `shift` is given for `registers`."""
        # `None` in its own place, so that a coupling that reads what it updates, and so
        # could not be undone, fails when it is traced.
        out = [None if i in self.updated else x for i, x in enumerate(registers)]
        if self.also is not None:
            out[self.register] = jtu.tree_map(
                lambda x, y: x - y, registers[self.register], registers[self.also]
            )
        return tuple(out)

    def grad_shift(self, grads: list[PyTree]) -> PyTree:
        """The gradient of what `shift` returned."""
        if self.also is None:
            return grads[self.register]
        return tree_add(grads[self.register], grads[self.also])

    def add_others(self, grads: list[PyTree], new: tuple[PyTree, ...]) -> None:
        """The transpose of `others`, added to `grads` in place."""
        for i, g in enumerate(new):
            grads[i] = tree_add(grads[i], g)
        if self.also is not None:
            minus = jtu.tree_map(lambda g: -g, new[self.register])
            grads[self.also] = tree_add(grads[self.also], minus)


Coupling.__init__.__doc__ = """**Arguments:**

- `register`: Which register is updated: an index into the `registers` of
    [`diffrax_reversible.Registers`][].
- `shift`: The function $\\phi$, called as `shift(step, registers)`, with a
    [`diffrax_reversible.StepInfo`][] and the tuple of all registers, in which the one
    that is updated is `None`. Should return a pair: the increment, of the structure,
    shapes and dtypes of the register, and a dictionary with whatever else
    [`diffrax_reversible.AbstractCouplingSolver.finish`][] needs from this coupling.
    Usually a bound method of the solver. If it is `None` then the register is only
    scaled.
- `scale`: The factor $\\alpha$; must not be zero. Either a Python number, or a function
    that takes `StepInfo.fixed` and returns a scalar. (Such a function may return zero
    in a step for which `needs_checkpoint` is true; or `wants_checkpoint`, if no shift
    before it in that step depends on the register.)
- `also`: Another register, to which the same increment is added. What `shift` is given
    in the place of `register` is then the difference of the two, `registers[register] -
    registers[also]`, which does not change. For solvers that keep a second copy of a
    register as its difference from it. Needs `scale=1`.

**Raises:**

- `ValueError` if `scale` is zero, or neither a number nor a function; and if `also` is
    `register`, or given with a `scale`.
"""
