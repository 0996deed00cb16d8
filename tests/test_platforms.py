"""Derivatives are lowered for accelerators too, in every mode."""

import os
import subprocess
import sys

import pytest


# In a process of its own, as Equinox reads the variable when it is imported. (An error
# is raised by a callback, which cannot be exported.)
PROGRAM = """
import diffrax
import diffrax_reversible as dfxr
import jax
import jax.export
import jax.numpy as jnp

controller = diffrax.ConstantStepSize()
terms = diffrax.ODETerm(lambda t, y, p: -p * jnp.sin(y))
y0 = jnp.ones(2)
if is_pair:
    terms, y0 = (terms, terms), (y0, y0)
else:
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)

def loss(p, y0):
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        1.0,
        0.1,
        y0,
        p,
        stepsize_controller=controller,
        adjoint=dfxr.ReversibleAdjoint(),
    )
    return sum(jnp.sum(y) for y in jax.tree.leaves(sol.ys))

forward = lambda p, y0: jax.jvp(lambda p: loss(p, y0), (p,), (p,))
for derivative in (jax.grad(loss, (0, 1)), forward, jax.hessian(loss)):
    export = jax.export.export(jax.jit(derivative), platforms=["cuda", "rocm", "tpu"])
    export(jnp.asarray(0.5), y0).mlir_module()
print("exported")
"""


@pytest.mark.parametrize(
    "solver",
    [
        "diffrax.Tsit5()",
        "diffrax.Kvaerno3()",
        "dfxr.ReversibleHeun()",
        "dfxr.StormerVerlet()",
        "dfxr.UReversible(diffrax.Heun())",
    ],
)
def test_export(solver):
    program = PROGRAM.replace("solver,\n", f"{solver},\n", 1)
    program = program.replace("is_pair", str("Stormer" in solver), 1)
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "EQX_ON_ERROR": "nan"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "exported\n", run.stderr
