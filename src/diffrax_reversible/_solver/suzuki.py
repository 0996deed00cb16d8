from typing import ClassVar, final

import diffrax
from jaxtyping import PyTree

from .splitting import AbstractSplitting, composition, palindrome


_weight = 1 / (4 - 4 ** (1 / 3))
_kicks, _drifts = composition(palindrome((_weight, _weight), 1 - 4 * _weight))


@final
class Suzuki4(AbstractSplitting):
    r"""Suzuki's method of order 4: symplectic, with its reverse.

    Five Stormer--Verlet steps, the third of them backwards, for `terms=(term_1,
    term_2)` and `y=(p, q)`, arranged as for [`diffrax.SemiImplicitEuler`][]. Each step
    makes 5 evaluations of each vector field, and as many with their pullback on the
    backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state is the
    evaluation that neighbouring steps share. Has no error estimate. Dense output is of
    order 3. For more see [`diffrax_reversible.AbstractSplitting`][].

    No sub-step goes out of the step.

    ??? cite "Reference"

        ```bibtex
        @article{suzuki1990fractal,
            title={Fractal decomposition of exponential operators with applications to
                   many-body theories and {M}onte {C}arlo simulations},
            author={Suzuki, Masuo},
            journal={Physics Letters A},
            volume={146},
            number={6},
            pages={319--323},
            year={1990},
        }
        ```
    """

    kicks: ClassVar[tuple[float, ...]] = _kicks
    drifts: ClassVar[tuple[float, ...]] = _drifts

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        return 4


Suzuki4.__init__.__doc__ = """**Arguments:** None"""
