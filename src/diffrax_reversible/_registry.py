from collections.abc import Callable
from typing import Literal

import diffrax

from ._method.base import AbstractReversibleSolver
from ._solver.bases import instead_of, note_on_sdes, spelling
from ._solver.leapfrog_midpoint import LeapfrogMidpoint
from ._solver.reversible_heun import ReversibleHeun
from ._solver.semi_implicit_euler import SemiImplicitEuler


_registry: dict[
    type[diffrax.AbstractSolver],
    Callable[[diffrax.AbstractSolver], AbstractReversibleSolver],
] = {}


def register_reversible(
    host_solver_cls: type,
    convert: Callable[[diffrax.AbstractSolver], AbstractReversibleSolver],
) -> None:
    """Makes [`diffrax_reversible.ReversibleAdjoint`][] accept the instances of a solver
    class that has no `backward_step` itself, such as one from another library.

    **Arguments:**

    - `host_solver_cls`: The class. Its instances are recognised by their exact type.
    - `convert`: A function that takes an instance and returns an
        [`diffrax_reversible.AbstractReversibleSolver`][]. That is run in place of the
        instance: so it must make the same steps, and have the same solver state and the
        same dense information.

    **Returns:**

    `None`. A later call with the same class replaces an earlier one.

    **Raises:**

    - `ValueError` if `host_solver_cls` is not a solver class.
    """
    if not (
        isinstance(host_solver_cls, type)
        and issubclass(host_solver_cls, diffrax.AbstractSolver)
    ):
        raise ValueError(
            "`register_reversible(host_solver_cls, ...)` needs a subclass of "
            f"`diffrax.AbstractSolver`; got {host_solver_cls}. Pass the class, and "
            "not an instance of it."
        )
    _registry[host_solver_cls] = convert


register_reversible(
    diffrax.ReversibleHeun, lambda _: ReversibleHeun(interpolation="linear")
)
register_reversible(diffrax.SemiImplicitEuler, lambda _: SemiImplicitEuler())
register_reversible(
    diffrax.LeapfrogMidpoint, lambda _: LeapfrogMidpoint(interpolation="linear")
)


def as_reversible(solver: diffrax.AbstractSolver) -> AbstractReversibleSolver | None:
    """The solver that undoes its steps, if there is one."""
    # Not `isinstance`, which looks through wrappers such as `HalfSolver`.
    if issubclass(type(solver), AbstractReversibleSolver):
        return solver  # pyright: ignore[reportReturnType]
    if type(solver) in _registry:
        return _registry[type(solver)](solver)
    return None


def to_reversible(
    solver: diffrax.AbstractSolver, user: Literal["diagnose", "reverse_solve"]
) -> AbstractReversibleSolver:
    """The same, for what needs one."""
    reversible = as_reversible(solver)
    if reversible is not None:
        return reversible
    instead = instead_of(solver)
    if user == "reverse_solve":
        if instead in (None, "ABOBA()"):
            instead = "UReversible(diffrax.Heun())"
        if instead.startswith("UReversible"):
            # Without a number some steps cannot be undone.
            instead = f"{instead.removesuffix(')')}, 0.999)"
        remedy = f"`{instead}`, in the solve to be undone too"
    else:
        remedy = f"`{instead or 'UReversible(diffrax.Tsit5())'}`"
    raise ValueError(
        f"`{user}` needs a reversible solver, as it undoes steps, which "
        f"`{spelling(solver)}` is not. Use {remedy}.{note_on_sdes(solver)}"
    )
