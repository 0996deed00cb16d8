from collections.abc import Callable

import diffrax

from ._method.base import AbstractReversibleSolver
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
    """Teaches [`diffrax_reversible.ReversibleAdjoint`][] to accept instances of a
    solver class that has no `backward_step` itself.

    **Arguments:**

    - `host_solver_cls`: The class. Its instances are recognised by their exact type.
    - `convert`: A function that takes an instance and returns an
        [`diffrax_reversible.AbstractReversibleSolver`][]. It is run in place of the
        instance: so it must make the same steps, and have the same solver state and
        the same dense information.

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


def to_reversible(
    solver: diffrax.AbstractSolver, user: str = "`adjoint=ReversibleAdjoint()`"
) -> AbstractReversibleSolver:
    # Not `isinstance`, which looks through wrappers such as `HalfSolver`.
    if issubclass(type(solver), AbstractReversibleSolver):
        return solver  # pyright: ignore[reportReturnType]
    if type(solver) in _registry:
        return _registry[type(solver)](solver)
    name = type(solver).__name__
    if issubclass(type(solver), (diffrax.AbstractERK, diffrax.AbstractSRK)):
        remedy = f"use `solver=UReversible({name}())`"
    else:
        remedy = (
            "use a reversible solver, for example `solver=UReversible(diffrax.Tsit5())`"
        )
    if "adjoint" in user:
        remedy += (
            ". Or use `adjoint=diffrax.RecursiveCheckpointAdjoint()`, which accepts "
            "any solver"
        )
    raise ValueError(
        f"{user} needs a reversible solver, and `{name}` is not one: {remedy}."
    )
