from typing import ClassVar, final

from .._compat import Terms
from .splitting import AbstractSplitting, composition, palindrome


_kicks_6, _drifts_6 = composition(
    palindrome(
        (
            0.39216144400731413928,
            0.33259913678935943860,
            -0.70624617255763935981,
            0.082213596293550800230,
        ),
        0.79854399093482996340,
    )
)
_kicks_8, _drifts_8 = composition(
    palindrome(
        (
            0.13020248308889008088,
            0.56116298177510838456,
            -0.38947496264484728641,
            0.15884190655515560090,
            -0.39590389413323757734,
            0.18453964097831570709,
            0.25837438768632204729,
            0.29501172360931029887,
        ),
        -0.60550853383003451170,
    )
)


@final
class KahanLi6(AbstractSplitting):
    """Kahan & Li's symplectic method of order 6, with its reverse. For comparisons:
    [`diffrax_reversible.BlanesMoan6`][] is the method of order 6 to use.

    A splitting with 10 kicks and 9 drifts for `terms=(term_1, term_2)` and `y=(p, q)`,
    arranged as for [`diffrax.SemiImplicitEuler`][], and of order 6. Has no error
    estimate. Cannot solve SDEs.

    Each step makes 9 evaluations of each vector field, and as many with their pullback
    on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state
    is one evaluation, which neighbouring steps share, of the shape of `p` or of `q`.
    Dense output is of order 4, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    It consists of nine Stormer--Verlet steps.

    ??? cite "Reference"

        ```bibtex
        @article{kahan1997composition,
            title={Composition constants for raising the orders of unconventional
                   schemes for ordinary differential equations},
            author={Kahan, William and Li, Ren-Cang},
            journal={Mathematics of Computation},
            volume={66},
            number={219},
            pages={1089--1099},
            year={1997},
        }
        ```
    """

    kicks: ClassVar[tuple[float, ...]] = _kicks_6
    drifts: ClassVar[tuple[float, ...]] = _drifts_6

    def order(self, terms: Terms) -> int:
        return 6


@final
class KahanLi8(AbstractSplitting):
    """Kahan & Li's symplectic method of order 8, with its reverse. Use it for the most
    accurate solutions of N-body problems and the like.

    A splitting with 18 kicks and 17 drifts for `terms=(term_1, term_2)` and `y=(p, q)`,
    arranged as for [`diffrax.SemiImplicitEuler`][], and of order 8. Has no error
    estimate. Cannot solve SDEs.

    Each step makes 17 evaluations of each vector field, and as many with their pullback
    on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state
    is one evaluation, which neighbouring steps share, of the shape of `p` or of `q`.
    Dense output is of order 4, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    It consists of seventeen Stormer--Verlet steps. For the same work its energy error
    is smaller than that of [`diffrax_reversible.BlanesMoan6`][] where both are below
    about 1e-10. It takes long to compile, as all of its 35 sub-steps are.

    ??? cite "Reference"

        ```bibtex
        @article{kahan1997composition,
            title={Composition constants for raising the orders of unconventional
                   schemes for ordinary differential equations},
            author={Kahan, William and Li, Ren-Cang},
            journal={Mathematics of Computation},
            volume={66},
            number={219},
            pages={1089--1099},
            year={1997},
        }
        ```
    """

    kicks: ClassVar[tuple[float, ...]] = _kicks_8
    drifts: ClassVar[tuple[float, ...]] = _drifts_8

    def order(self, terms: Terms) -> int:
        return 8


KahanLi6.__init__.__doc__ = """**Arguments:** None"""
KahanLi8.__init__.__doc__ = """**Arguments:** None"""
