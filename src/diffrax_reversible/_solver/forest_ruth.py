from typing import ClassVar, final

from .._compat import Terms
from .splitting import AbstractSplitting, composition


_weight = 1 / (2 - 2 ** (1 / 3))
_kicks, _drifts = composition((_weight, 1 - 2 * _weight, _weight))


@final
class ForestRuth(AbstractSplitting):
    """The symplectic method of order 4 of Forest & Ruth, and of Yoshida, with its
    reverse. Use it where evaluations a step matter most: it is the cheapest of order 4.

    A splitting with 4 kicks and 3 drifts for `terms=(term_1, term_2)` and `y=(p, q)`,
    arranged as for [`diffrax.SemiImplicitEuler`][], and of order 4. Has no error
    estimate. Cannot solve SDEs.

    Each step makes 3 evaluations of each vector field, and as many with their pullback
    on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state
    is one evaluation, which neighbouring steps share, of the shape of `p` or of `q`.
    Dense output is of order 2, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    It consists of three Stormer--Verlet steps, the second of them backwards. These are
    long (the longest is -1.7 steps): for the same work the error of
    [`diffrax_reversible.BlanesMoan4`][] is some ten times smaller.

    ??? cite "Reference"

        ```bibtex
        @article{forest1990fourth,
            title={Fourth-order symplectic integration},
            author={Forest, Etienne and Ruth, Ronald D.},
            journal={Physica D: Nonlinear Phenomena},
            volume={43},
            number={1},
            pages={105--117},
            year={1990},
        }
        ```
    """

    kicks: ClassVar[tuple[float, ...]] = _kicks
    drifts: ClassVar[tuple[float, ...]] = _drifts

    def order(self, terms: Terms) -> int:
        return 4


ForestRuth.__init__.__doc__ = """**Arguments:** None"""
