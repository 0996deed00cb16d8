from . import _compat as _compat  # Checks the installed version of diffrax. # isort: skip
from importlib.metadata import version as _version

from . import _citation as _citation  # Adds to `diffrax.citation`.
from ._adjoint.adjoint import ReversibleAdjoint as ReversibleAdjoint
from ._diagnose import diagnose as diagnose, Diagnosis as Diagnosis
from ._method.base import AbstractReversibleSolver as AbstractReversibleSolver
from ._method.coupling import (
    AbstractCouplingSolver as AbstractCouplingSolver,
    Coupling as Coupling,
    Registers as Registers,
    StepInfo as StepInfo,
)
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
