from . import _compat as _compat  # Checks the installed version of diffrax. # isort: skip
from ._adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._coupling import (
    AbstractCouplingSolver as AbstractCouplingSolver,
    Coupling as Coupling,
    Registers as Registers,
    StepInfo as StepInfo,
)
from ._diagnose import diagnose as diagnose, Diagnosis as Diagnosis
from ._registry import register_reversible as register_reversible
from ._solver.base import AbstractReversibleSolver as AbstractReversibleSolver
from ._solver.leapfrog_midpoint import LeapfrogMidpoint as LeapfrogMidpoint
from ._solver.reversible_heun import ReversibleHeun as ReversibleHeun
from ._solver.semi_implicit_euler import SemiImplicitEuler as SemiImplicitEuler
from ._solver.u_reversible import UReversible as UReversible
