from typing import ClassVar, final

from .._compat import Terms
from .splitting import AbstractSplitting, palindrome


# S_6 of the reference.
_a_4 = (0.0792036964311957, 0.353172906049774, -0.0420650803577195)
_b_4 = (0.209515106613362, -0.143851773179818)
# S_10 of the reference.
_a_6 = (
    0.0502627644003922,
    0.413514300428344,
    0.0450798897943977,
    -0.188054853819569,
    0.541960678450780,
)
_b_6 = (0.148816447901042, -0.132385865767784, 0.067307604692185, 0.432666402578175)


def _odd(half: tuple[float, ...]) -> tuple[float, ...]:
    return palindrome(half, 1 - 2 * sum(half))


def _even(half: tuple[float, ...]) -> tuple[float, ...]:
    return palindrome((*half, 0.5 - sum(half)))


@final
class BlanesMoan4(AbstractSplitting):
    r"""Blanes & Moan's symplectic method of order 4, with its reverse. Of the methods
    of order 4, use this one: for N-body problems and molecular dynamics.

    A splitting with 7 kicks and 6 drifts for `terms=(term_1, term_2)` and `y=(p, q)`,
    arranged as for [`diffrax.SemiImplicitEuler`][], and of order 4. Has no error
    estimate. Cannot solve SDEs.

    Each step makes 6 evaluations of each vector field, and as many with their pullback
    on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state
    is one evaluation, which neighbouring steps share, of the shape of `p` or of `q`.
    Dense output is of order 3, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    Its coefficients were optimised for a small error. The kinetic energy need not be
    quadratic, as it must be for methods of Nystrom's type.

    ??? cite "Reference"

        ```bibtex
        @article{blanes2002practical,
            title={Practical symplectic partitioned {R}unge--{K}utta and
                   {R}unge--{K}utta--{N}ystr{\"o}m methods},
            author={Blanes, Sergio and Moan, Per Christian},
            journal={Journal of Computational and Applied Mathematics},
            volume={142},
            number={2},
            pages={313--330},
            year={2002},
        }
        ```
    """

    kicks: ClassVar[tuple[float, ...]] = _odd(_a_4)
    drifts: ClassVar[tuple[float, ...]] = _even(_b_4)

    def order(self, terms: Terms) -> int:
        return 4


@final
class BlanesMoan6(AbstractSplitting):
    r"""Blanes & Moan's symplectic method of order 6, with its reverse. Of the methods
    of order 6, use this one: for very accurate solutions of N-body problems.

    A splitting with 11 kicks and 10 drifts for `terms=(term_1, term_2)` and `y=(p, q)`,
    arranged as for [`diffrax.SemiImplicitEuler`][], and of order 6. Has no error
    estimate. Cannot solve SDEs.

    Each step makes 10 evaluations of each vector field, and as many with their pullback
    on the backward pass of [`diffrax_reversible.ReversibleAdjoint`][]. The solver state
    is one evaluation, which neighbouring steps share, of the shape of `p` or of `q`.
    Dense output is of order 3, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    Its coefficients were optimised for a small error. The kinetic energy need not be
    quadratic, as it must be for methods of Nystrom's type.

    ??? cite "Reference"

        ```bibtex
        @article{blanes2002practical,
            title={Practical symplectic partitioned {R}unge--{K}utta and
                   {R}unge--{K}utta--{N}ystr{\"o}m methods},
            author={Blanes, Sergio and Moan, Per Christian},
            journal={Journal of Computational and Applied Mathematics},
            volume={142},
            number={2},
            pages={313--330},
            year={2002},
        }
        ```
    """

    kicks: ClassVar[tuple[float, ...]] = _odd(_a_6)
    drifts: ClassVar[tuple[float, ...]] = _even(_b_6)

    def order(self, terms: Terms) -> int:
        return 6


BlanesMoan4.__init__.__doc__ = """**Arguments:** None"""
BlanesMoan6.__init__.__doc__ = """**Arguments:** None"""
