from typing import ClassVar, final

import diffrax
from jaxtyping import PyTree

from .splitting import AbstractSplitting, composition


_weight = 1 / (2 - 2 ** (1 / 3))
_kicks, _drifts = composition((_weight, 1 - 2 * _weight, _weight))


@final
class ForestRuth(AbstractSplitting):
    r"""The method of Forest & Ruth, also known as Yoshida's of order 4: symplectic,
    with its reverse.

    Three Stormer--Verlet steps, the second of them backwards, for `terms=(term_1,
    term_2)` and `y=(p, q)`, arranged as for [`diffrax.SemiImplicitEuler`][]. Each step
    makes 3 evaluations of each vector field, and as many with their pullback on the
    backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state is the
    evaluation that neighbouring steps share. Has no error estimate. Dense output is of
    order 2. For more see [`diffrax_reversible.AbstractSplitting`][].

    It is the cheapest method of order 4, but its sub-steps are long (the longest is
    -1.7 steps): for the same work the error of [`diffrax_reversible.BlanesMoan4`][] is
    some ten times smaller.

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

    def order(self, terms: PyTree[diffrax.AbstractTerm]) -> int:
        return 4


ForestRuth.__init__.__doc__ = """**Arguments:** None"""
