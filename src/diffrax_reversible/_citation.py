"""What `diffrax.citation` says of the solvers and the adjoint of this package."""

import inspect
import re
from typing import Any

from ._adjoint.adjoint import ReversibleAdjoint
from ._compat import citation_rules
from ._method.base import AbstractReversibleSolver
from ._solver.u_reversible import UReversible


def _references(method: Any) -> list[str]:
    """The BibTeX in the docstring of its class, as diffrax reads it."""
    found = re.findall(r"```bibtex([^`]*)```", type(method).__doc__ or "")
    return [inspect.cleandoc(x) for x in found]


# One rule for the solver and the adjoint, so that what they share is printed once. (A
# rule with `**kwargs` is given all that `citation` is, and need not be given any.)
@citation_rules.append
def _reversible(solver: Any = None, adjoint: Any = None, **kwargs: Any) -> str | None:
    del kwargs
    methods = []
    # Not `isinstance`, which looks through wrappers such as `HalfSolver`.
    if issubclass(type(solver), AbstractReversibleSolver):
        methods.append(solver)
    if issubclass(type(solver), UReversible):
        methods.append(solver.solver)
    if isinstance(adjoint, ReversibleAdjoint):
        methods.append(adjoint)
    users: dict[str, list[str]] = {}
    for method in methods:
        for reference in _references(method):
            users.setdefault(reference, []).append(f"`{type(method).__name__}`")
    cites = (
        f"% You are using {' and '.join(names)}, for which see:\n{reference}"
        for reference, names in users.items()
    )
    return "\n\n".join(cites) or None
