"""Exact gradients of diffrax's solves, with any solver; and reversible solvers, with
which their memory hardly grows with the number of steps.

Change one argument of `diffrax.diffeqsolve`, the adjoint:

```python
diffrax.diffeqsolve(..., adjoint=ReversibleAdjoint())
```

and the solver too, to `UReversible(diffrax.Tsit5())`, if memory is what is short.

Reversible solvers:

```
solver                    order  evals  back  y    adapt  SDE   decay  choose it for
------------------------  -----  -----  ----  ---  -----  ----  -----  ---------------
UReversible(ode_solver)   base   2s     2s    2    yes    base  base   everything
UReversible(sde_solver)   base   2s     2s    2    base   only  base   SDEs, accurate
UReversible(base, 0.999)  base   2s     2s    2    yes    base  no     comparisons
ReversibleHeun()          2      1      1     3    yes    yes   sync   SDEs
AsynchronousLeapfrog()    2      1      1     2    yes    yes   sync   costly fields
LeapfrogMidpoint()        2      1      1     2    no     no    sync   oscillations
SemiImplicitEuler()       1      1      1     1    no     no    base   as diffrax's
StormerVerlet()           2      1      1     1.5  no     yes   base   N bodies
ForestRuth()              4      3      3     1.5  no     no    base   N bodies
Suzuki4()                 4      5      5     1.5  no     no    base   N bodies
BlanesMoan4()             4      6      6     1.5  no     no    base   N bodies
BlanesMoan6()             6      10     10    1.5  no     no    base   N bodies
KahanLi6()                6      9      9     1.5  no     no    base   N bodies
KahanLi8()                8      17     17    1.5  no     no    base   N bodies
ABOBA()                   2      1      2     1    no     only  yes    Langevin
EES25()                   2      3      6     1    yes    yes   base   little memory
EES27()                   2      4      8     1    yes    yes   base   little memory
```

- `order`: Of the solution. `base` is that of the solver that is wrapped. For SDEs the
    strong order is 0.5, or 1 with commutative noise; 2 for `ABOBA`; and that of the
    wrapped solver for `UReversible`: 1.5 with `ShARK` (additive noise) and `SlowRK`
    (commutative noise), 1 with `Heun` (commutative noise), 0.5 with `SPaRK` (any).
- `evals`, `back`: Evaluations of the vector field in a step, forwards and on the
    backward pass. A wrapped solver has `s` stages; splittings evaluate each of their
    two terms so often.
- `y`: The memory of `y` and the solver state, in units of that of `y`.
- `adapt`: Whether it has an error estimate, for adaptive step sizes.
- `SDE`: Whether it solves SDEs, in the Stratonovich sense. (An Ito solution is not
    undone by going back along the same path. Take an Ito solver as it is.)
- `decay`: Whether it is stable where the solution decays: `base`, as an explicit solver
    is; `sync`, with the option `full_sync=True` alone.

All but `EES25` and `EES27` are reversible exactly, that is to rounding. Those from
`SemiImplicitEuler` to `KahanLi8` are symplectic splittings for `terms=(term_1, term_2)`
and `y=(p, q)`, with `term_1` a function of `q` and `term_2` of `p`. `ABOBA` takes
diffrax's `UnderdampedLangevinDriftTerm` and `UnderdampedLangevinDiffusionTerm`.
`ReversibleHeun`, `LeapfrogMidpoint` and `SemiImplicitEuler` make the same steps as
diffrax's solvers of these names, whose instances `ReversibleAdjoint` accepts as they
are. Output at `SaveAt(ts=...)` is of the order of the solver, up to 5, without further
evaluations.

Write a solver of your own as a subclass of `AbstractSplitting`, with nothing but
coefficients; of `AbstractCouplingSolver`, as a sequence of affine couplings; or of
`AbstractReversibleSolver`, with a `step` and a `backward_step`.

`diagnose` shows how well a solve is undone, and `reverse_solve` undoes a finished one.
"""

from . import _compat as _compat  # Checks the installed version of diffrax. # isort: skip
from importlib.metadata import version as _version

from . import _citation as _citation  # Adds to `diffrax.citation`.
from ._adjoint.adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._diagnose import diagnose as diagnose, Diagnosis as Diagnosis
from ._method.affine import (
    Coupling as Coupling,
    Registers as Registers,
    StepInfo as StepInfo,
)
from ._method.base import AbstractReversibleSolver as AbstractReversibleSolver
from ._method.coupling import AbstractCouplingSolver as AbstractCouplingSolver
from ._registry import register_reversible as register_reversible
from ._reverse_solve import reverse_solve as reverse_solve
from ._solver.aboba import ABOBA as ABOBA
from ._solver.asynchronous_leapfrog import (
    AsynchronousLeapfrog as AsynchronousLeapfrog,
)
from ._solver.blanes_moan import (
    BlanesMoan4 as BlanesMoan4,
    BlanesMoan6 as BlanesMoan6,
)
from ._solver.effectively_symmetric import EES25 as EES25, EES27 as EES27
from ._solver.forest_ruth import ForestRuth as ForestRuth
from ._solver.kahan_li import KahanLi6 as KahanLi6, KahanLi8 as KahanLi8
from ._solver.leapfrog_midpoint import LeapfrogMidpoint as LeapfrogMidpoint
from ._solver.reversible_heun import ReversibleHeun as ReversibleHeun
from ._solver.semi_implicit_euler import SemiImplicitEuler as SemiImplicitEuler
from ._solver.splitting import AbstractSplitting as AbstractSplitting
from ._solver.stormer_verlet import StormerVerlet as StormerVerlet
from ._solver.suzuki import Suzuki4 as Suzuki4
from ._solver.u_reversible import UReversible as UReversible


__version__ = _version("diffrax-reversible")

__all__ = [
    "ABOBA",
    "AbstractCouplingSolver",
    "AbstractReversibleSolver",
    "AbstractSplitting",
    "AsynchronousLeapfrog",
    "BlanesMoan4",
    "BlanesMoan6",
    "Coupling",
    "diagnose",
    "Diagnosis",
    "EES25",
    "EES27",
    "ForestRuth",
    "KahanLi6",
    "KahanLi8",
    "LeapfrogMidpoint",
    "register_reversible",
    "Registers",
    "reverse_solve",
    "ReversibleAdjoint",
    "ReversibleHeun",
    "SemiImplicitEuler",
    "StepInfo",
    "StormerVerlet",
    "Suzuki4",
    "UReversible",
]
