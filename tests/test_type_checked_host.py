"""diffrax itself checked at run time against its annotations, as it is in its own
tests, and may be in a user's. What it is handed by an adjoint or a solver, and what is
made of its own classes in between, must then be of the types that it declares."""

import os
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.long
def test_gradients():
    # In a process of its own, as whatever is imported already is not checked any more.
    script = """
        from jaxtyping import install_import_hook

        with install_import_hook("diffrax", "beartype.beartype"):
            import diffrax

        import jax
        import jax.numpy as jnp
        import optimistix as optx

        jax.config.update("jax_enable_x64", True)
        import diffrax_reversible as dfxr

        try:
            diffrax.SaveAt(t1="no boolean")
        except TypeError:
            pass
        else:
            raise AssertionError("diffrax is not checked")

        RK = dfxr.UReversible(diffrax.Tsit5())
        PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        ODE = diffrax.ODETerm(lambda t, y, args: -args * y)
        path = diffrax.VirtualBrownianTree(
            0.0, 1.0, 0.1, jax.ShapeDtypeStruct((), jnp.float64), jax.random.key(0)
        )
        noise = diffrax.ControlTerm(lambda t, y, args: 0.1 * args * y, path)
        SDE = diffrax.MultiTerm(ODE, noise)

        def solve(y0, args, adjoint, terms=ODE, solver=RK, **kwargs):
            return diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, 0.25, y0, args, adjoint=adjoint, max_steps=16,
                **kwargs,
            )

        def saved(*args):
            subs = (
                diffrax.SubSaveAt(t0=True, ts=jnp.array([0.3, 0.7])),
                diffrax.SubSaveAt(steps=True, fn=lambda t, y, args: t * y * args),
            )
            sol = solve(*args, saveat=diffrax.SaveAt(subs=subs, solver_state=True))
            steps = sol.ys[1]
            (d, *_) = sol.solver_state
            total = jnp.sum(jnp.where(jnp.isfinite(steps), steps, 0))
            return total + jnp.sum(sol.ys[0]) + jnp.sum(d)

        def event(*args):
            sol = solve(
                *args,
                saveat=diffrax.SaveAt(t1=True, dense=True),
                stepsize_controller=PID,
                event=diffrax.Event(
                    lambda t, y, args, **kwargs: jnp.sum(y) - 0.7,
                    optx.Newton(1e-8, 1e-8),
                ),
            )
            return jnp.sum(sol.ts) + jnp.sum(sol.evaluate(0.1))

        def clipped(*args):
            controller = diffrax.ClipStepSizeController(
                PID, step_ts=[0.2], jump_ts=[0.6], store_rejected_steps=4
            )
            return jnp.sum(solve(*args, stepsize_controller=controller).ys)

        def noisy(*args):
            saveat = diffrax.SaveAt(ts=[0.6])
            sol = solve(*args, SDE, dfxr.ReversibleHeun(), saveat=saveat)
            return jnp.sum(sol.ys)

        # Tracing is enough: that is when types are checked.
        def gradient(loss):
            def total(params):
                y0s, args = params
                solve = lambda y0: loss(y0, args, dfxr.ReversibleAdjoint())
                return jnp.sum(jax.vmap(solve)(y0s))

            params = (jnp.array([1.0, 1.2]), jnp.array(0.9))
            return jax.eval_shape(jax.grad(total), params)

        for loss in (saved, event, clipped, noisy):
            gradient(loss)
        print("done")
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().endswith("done")
