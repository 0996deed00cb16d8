from typing import final, Literal

import diffrax

from .._compat import PyTree, RealScalarLike, Terms
from .splitting import AbstractSplitting


@final
class StormerVerlet(AbstractSplitting, diffrax.AbstractStratonovichSolver[PyTree]):
    r"""The Stormer--Verlet or leapfrog method: of order 2 and symplectic, with its
    reverse. Use it for N-body problems and molecular dynamics.

    For `terms=(term_1, term_2)` and `y=(p, q)`, arranged as for
    [`diffrax.SemiImplicitEuler`][]. Has no error estimate. When used to solve SDEs,
    converges to the Stratonovich solution, with strong order 0.5.

    Each step makes one evaluation of each vector field, as the last one is kept for the
    next step; and one evaluation of each with its pullback on the backward pass of
    [`diffrax_reversible.ReversibleAdjoint`][]. The solver state is that evaluation, of
    the shape of `p` or of `q`. For an SDE a step queries the Brownian motion twice.
    Dense output is quadratic in the variable that moves at both ends, and 1st order
    linear in the other, without further evaluations. See
    [`diffrax_reversible.AbstractSplitting`][] for more.

    **How it works.** In the velocity form (kick, drift, kick) a step is

    $p \leftarrow p + \frac{h}{2} f_1(t_0, q)$

    $q \leftarrow q + h f_2(t_0 + \frac{h}{2}, p)$

    $p \leftarrow p + \frac{h}{2} f_1(t_1, q)$

    and in the position form (drift, kick, drift) the two change places.

    ??? cite "Reference"

        ```bibtex
        @article{hairer2003geometric,
            title={Geometric numerical integration illustrated by the
                   {S}t{\"o}rmer--{V}erlet method},
            author={Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
            journal={Acta Numerica},
            volume={12},
            pages={399--450},
            year={2003},
        }
        ```
    """

    form: Literal["velocity", "position"]

    def __init__(self, form: str = "velocity"):
        if form not in ("velocity", "position"):
            raise ValueError(
                '`StormerVerlet(form=...)` must be "velocity" or "position"; got '
                f"{form!r}."
            )
        self.form = form

    @property
    def kicks(self) -> tuple[float, ...]:
        return (0.5, 0.5) if self.form == "velocity" else (1.0,)

    @property
    def drifts(self) -> tuple[float, ...]:
        return (1.0,) if self.form == "velocity" else (0.5, 0.5)

    def order(self, terms: Terms) -> int:
        return 2

    def strong_order(self, terms: Terms) -> RealScalarLike:
        return 0.5


StormerVerlet.__init__.__doc__ = """**Arguments:**

- `form`: `"velocity"`, for a kick at both ends of a step; or `"position"`, for a drift
    at both ends.

**Raises:**

- `ValueError` if `form` is neither.
"""
