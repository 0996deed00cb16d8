from typing import ClassVar, final

from .._compat import Terms
from .splitting import AbstractSplitting, composition, palindrome


_weight = 1 / (4 - 4 ** (1 / 3))
_kicks, _drifts = composition(palindrome((_weight, _weight), 1 - 4 * _weight))


@final
class Suzuki4(AbstractSplitting):
    """Suzuki's symplectic method of order 4, with its reverse. Use it where a vector
    field must not be evaluated at times outside of the step.

    A splitting with 6 kicks and 5 drifts for `terms=(term_1, term_2)` and `y=(p, q)`,
    arranged as for [`diffrax.SemiImplicitEuler`][], and of order 4. Has no error
    estimate. Cannot solve SDEs.

    Each step makes 5 evaluations of each vector field, and as many with their pullback
    on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state
    is one evaluation, which neighbouring steps share, of the shape of `p` or of `q`.
    Dense output is of order 3, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    It consists of five Stormer--Verlet steps, the third of them backwards. No sub-step
    goes out of the step.

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

    def order(self, terms: Terms) -> int:
        return 4


Suzuki4.__init__.__doc__ = """**Arguments:** None"""
