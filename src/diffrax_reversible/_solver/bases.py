"""Which solvers [`diffrax_reversible.UReversible`][] can wrap, and what to use in place
of a solver that is refused, spelled as the user would."""

from typing import Any, cast

import diffrax

from .._method.base import AbstractReversibleSolver
from .._method.interpolation import has_own_interpolation


_FOR_LANGEVIN = (diffrax.ALIGN, diffrax.QUICSORT, diffrax.ShOULD)
_FOR_SDES = (diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver)
# Of strong order 1/2, and 1 if the noise commutes, as the second needs it: as `Heun`.
_STRATONOVICH = (diffrax.EulerHeun, diffrax.StratonovichMilstein)
# Those that `ReversibleAdjoint` accepts as they are.
_ACCEPTED = (
    diffrax.LeapfrogMidpoint,
    diffrax.ReversibleHeun,
    diffrax.SemiImplicitEuler,
)


def spelling(solver: Any) -> str:
    """The name of the class of `solver`, as in the user's code."""
    cls = solver if isinstance(solver, type) else type(solver)
    is_host = getattr(diffrax, cls.__name__, None) is cls
    return f"diffrax.{cls.__name__}" if is_host else cls.__name__


# None of the functions below uses `isinstance`, which looks through wrappers such as
# `HalfSolver`.


def is_srk(solver: Any) -> bool:
    return issubclass(type(solver), diffrax.AbstractSRK)


def is_reversible(solver: Any) -> bool:
    return issubclass(type(solver), AbstractReversibleSolver) or (
        type(solver) in _ACCEPTED
    )


def is_implicit(solver: Any) -> bool:
    return issubclass(type(solver), diffrax.AbstractImplicitSolver)


def is_given_by_tableau(solver: Any) -> bool:
    """Whether it is an explicit Runge--Kutta solver, for ODEs, all of which is in its
    tableau."""
    return not is_srk(solver) and _why_not_given_by_tableau(solver) is None


def instead_of(solver: Any) -> str | None:
    """What to use in place of a solver that is not reversible. `None` if nothing here
    can take its place."""
    if is_implicit(solver):
        return None
    if issubclass(type(solver), diffrax.HalfSolver):
        inner = solver.solver
        return f"{spelling(inner)}()" if is_reversible(inner) else instead_of(inner)
    if _why_not_given_by_tableau(solver) is None:
        return f"UReversible({spelling(solver)}())"
    if type(solver) in _FOR_LANGEVIN:
        return "ABOBA()"
    if is_srk(solver) or issubclass(type(solver), _FOR_SDES):
        # (It needs no Levy area. `diffrax.Euler` is one of these.)
        return "UReversible(diffrax.Heun())"
    return "UReversible(diffrax.Tsit5())"


def note_on_sdes(solver: Any) -> str:
    """What else to know of what to use instead, for an SDE."""
    if type(solver) in _STRATONOVICH:
        return (
            " (If this is an SDE: `diffrax.Heun` converges to the same solution as "
            f"`{spelling(solver)}`, with the same strong order.)"
        )
    if not issubclass(type(solver), diffrax.AbstractItoSolver):
        return ""
    return (
        f" (If this is an SDE: `{spelling(solver)}` converges to the Ito solution and "
        "reversible solvers converge to the Stratonovich solution, so convert the "
        "drift.)"
    )


def check_base(solver: Any) -> None:
    if isinstance(solver, type):
        name = spelling(solver)
        raise ValueError(
            f"`UReversible({name})` was given a class, and needs an instance: use "
            f"`UReversible({name}())`."
        )
    name = spelling(solver)
    if is_reversible(solver):
        raise ValueError(
            f"`UReversible({name}(...))` is not needed, as `{name}` is reversible "
            f"already: use `solver={name}(...)`."
        )
    why_not = _why_not_given_by_tableau(solver)
    if why_not is not None:
        instead, remedy = instead_of(solver), ""
        if instead is not None:
            remedy = f"; or, if its steps are to be undone, `{instead}`"
        raise ValueError(
            f"`UReversible({name}())` is not supported, as `{name}` {why_not}. Use "
            f"`solver={name}()` as it is, with `adjoint=ReversibleAdjoint()`{remedy}."
            f"{note_on_sdes(solver)}"
        )
    if not is_srk(solver):
        has_own_interpolation(cast(diffrax.AbstractERK, solver))


def _why_not_given_by_tableau(solver: Any) -> str | None:
    """Why its steps cannot be made from its tableau, if they cannot."""
    if is_implicit(solver):
        return "is implicit"
    host = diffrax.AbstractSRK if is_srk(solver) else diffrax.AbstractERK
    if not issubclass(type(solver), host):
        return (
            "is not an explicit Runge--Kutta solver (a subclass of "
            "`diffrax.AbstractERK` or `diffrax.AbstractSRK`)"
        )
    tableaus = (diffrax.ButcherTableau, diffrax.StochasticButcherTableau)
    if not isinstance(solver.tableau, tableaus):
        return "has several tableaus"
    if type(solver).step is not host.step:
        return "has a `step` of its own, and not that of its tableau"
    return None
