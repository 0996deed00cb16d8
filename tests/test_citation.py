"""`diffrax.citation` knows the papers of our methods, without duplicates."""

import re

import diffrax
import jax.numpy as jnp
import pytest

import diffrax_reversible as dfxr

from .helpers import CouplingLeapfrog


def keys(capsys, **kwargs):
    """The keys of the BibTeX entries that are printed."""
    diffrax.citation(**kwargs)
    return re.findall(r"^\s*@\w+\{(.*),", capsys.readouterr().out, re.M)


SOLVERS = {
    dfxr.ABOBA(): {"leimkuhler2013rational"},
    dfxr.AsynchronousLeapfrog(): {"mutze2013asynchronous", "zhuang2021mali"},
    dfxr.BlanesMoan4(): {"blanes2002practical"},
    dfxr.BlanesMoan6(): {"blanes2002practical"},
    dfxr.EES25(): {"shmelev2025explicit"},
    dfxr.EES27(): {"shmelev2025explicit"},
    dfxr.ForestRuth(): {"forest1990fourth"},
    dfxr.KahanLi6(): {"kahan1997composition"},
    dfxr.KahanLi8(): {"kahan1997composition"},
    dfxr.LeapfrogMidpoint(): {"shampine2009stability"},
    dfxr.ReversibleHeun(): {"kidger2021efficient"},
    dfxr.SemiImplicitEuler(): {"hairer2006geometric"},
    dfxr.StormerVerlet(): {"hairer2003geometric"},
    dfxr.Suzuki4(): {"suzuki1990fractal"},
    # And of the solver that is wrapped.
    dfxr.UReversible(diffrax.Tsit5()): {"mccallum2024efficient", "tsitouras2011runge"},
    # Two papers.
    dfxr.UReversible(diffrax.Dopri5()): {
        "mccallum2024efficient",
        "dormand1980family",
        "shampine1986some",
    },
}


def test_every_solver_is_here():
    abstract = {"AbstractCouplingSolver", "AbstractReversibleSolver"}
    abstract |= {"AbstractSplitting"}
    public = {
        name
        for name, x in vars(dfxr).items()
        if isinstance(x, type) and issubclass(x, dfxr.AbstractReversibleSolver)
    }
    assert {type(solver).__name__ for solver in SOLVERS} == public - abstract


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_solver(solver, capsys):
    # What diffrax says of any explicit solver.
    always = keys(capsys, solver=diffrax.Bosh3())
    found = keys(capsys, solver=solver)
    assert set(found) - set(always) == SOLVERS[solver]
    # With the adjoint there is its own paper, and nothing is said twice.
    found = keys(capsys, solver=solver, adjoint=dfxr.ReversibleAdjoint())
    assert set(found) - set(always) == SOLVERS[solver] | {"mccallum2024efficient"}
    assert len(found) == len(set(found))


def test_a_call_of_diffeqsolve(capsys):
    # As its documentation has it: with `citation` in place of `diffeqsolve`.
    diffrax.citation(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ReversibleHeun(),
        0,
        1,
        0.1,
        jnp.array(1.0),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        adjoint=dfxr.ReversibleAdjoint(),
    )
    out = capsys.readouterr().out
    assert out.count("kidger2021efficient") == 1
    assert out.count("mccallum2024efficient") == 1
    assert "`ReversibleAdjoint`" in out


def test_others_are_left_alone(capsys):
    # One without a reference; a wrapper that is not reversible; and none at all.
    for kwargs in (
        dict(solver=CouplingLeapfrog()),
        dict(solver=diffrax.HalfSolver(dfxr.ReversibleHeun())),
        dict(adjoint=diffrax.DirectAdjoint()),
        dict(),
    ):
        found = keys(capsys, **kwargs)
        assert "kidger2021on" in found
        assert "mccallum2024efficient" not in found
        assert "kidger2021efficient" not in found
