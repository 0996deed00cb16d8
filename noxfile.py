"""`nox -s tests` runs the tests, `nox -s quick` some of them, `nox -s long` those that
take longest; `nox` alone runs what CI does, except for `older`, which needs another
Python."""

import os
import pathlib
import re
import subprocess

import nox


nox.options.sessions = ["tests", "long", "lint", "types", "lowest"]

DIFFRAX = ["0.7.0", "0.7.1", "0.7.2"]


# Compiling takes most of the time, which these halve. (What they leave out is tested by
# `lowest`, which does without.)
FAST = ("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0")


def _fast(session: nox.Session) -> dict[str, str]:
    # They come and go with versions of JAX, and one that it does not know ends the
    # process, as soon as anything is computed.
    def is_known(flag):
        command = [f"{session.bin}/python", "-c", "import jax; jax.numpy.ones(1) + 1"]
        environment = {**os.environ, "XLA_FLAGS": flag}
        run = subprocess.run(command, env=environment, capture_output=True)
        return run.returncode == 0

    known = [flag for flag in FAST if is_known(flag)]
    session.log(f"XLA knows {len(known)} of the {len(FAST)} flags to compile faster.")
    return {"XLA_FLAGS": " ".join(known)}


def _pytest(session: nox.Session, *args: str, fast: bool = True) -> None:
    # Two processes share the work well.
    command = ("pytest", "-n", "2", "--dist", "worksteal", *args, *session.posargs)
    session.run(*command, env=_fast(session) if fast else {})


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, with the newest of everything that there is for this Python."""
    session.install("-e", ".[tests,examples]")
    _pytest(session)


@nox.session
def long(session: nox.Session) -> None:
    """The tests that take longest, in twenty minutes."""
    session.install("-e", ".[tests,examples]")
    _pytest(session, "-m", "long and not exhaustive")


# Of each promise something.
QUICK = (
    "tests/test_aboba.py::test_gradient",
    "tests/test_batch.py::test_levels",
    "tests/test_citation.py",
    "tests/test_compat.py",
    "tests/test_counts.py::test_evaluations_u_reversible",
    "tests/test_errors.py",
    "tests/test_examples.py::test_docstring_example",
    "tests/test_examples.py::test_readme",
    "tests/test_gradient.py::test_closed_over",
    "tests/test_gradient.py::test_finite_differences",
    "tests/test_gradient.py::test_float32",
    "tests/test_gradient.py::test_solver_controller_term",
    "tests/test_budget.py::test_steps_recomputed",
    "tests/test_near_reversible.py::test_order_of_gradient",
    "tests/test_order.py::test_order",
    "tests/test_order.py::test_order_splitting",
    "tests/test_recomputed.py::test_checkpoints",
    "tests/test_round_trip.py",
    "tests/test_save_at.py::test_dense",
    "tests/test_save_at.py::test_fn",
    "tests/test_stability.py::test_published_coupling_fails",
    "tests/test_stability.py::test_few_checkpoints",
    "tests/test_stochastic.py::test_gradient",
    "tests/test_transformations.py::test_checkpoint",
    "tests/test_transformations.py::test_modes_of_other_solvers",
    "tests/test_transformations.py::test_has_aux",
    "tests/test_transformations.py::test_pulled_back_twice",
    "tests/test_transformations.py::test_stop_gradient",
    "tests/test_vmap.py::test_vmap",
)


@nox.session
def quick(session: nox.Session) -> None:
    """Something of each promise, in about five minutes."""
    session.install("-e", ".[tests,examples]")
    _pytest(session, *QUICK)


# A part of the tests, for other versions of what they depend on.
PART = (
    "tests/test_compat.py",
    "tests/test_errors.py",
    "tests/test_user_solvers.py",
    "tests/test_gradient.py",
    "tests/test_vmap.py",
    "tests/test_batch.py",
    "tests/test_recomputed.py::test_checkpoints",
    "tests/test_recomputed.py::test_kinds",
    "tests/test_transformations.py::test_modes_of_other_solvers",
    "-m",
    "not exhaustive",
    "-k",
    "not (gradient or vmap or batch) or closed_over or resumed or host_instances "
    "or scan or finished or subs or other_solvers or test_levels or test_sum or share",
)
# Old versions of the dependencies warn of each other.
OLD = ("-W", "default")


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("diffrax", DIFFRAX)
def matrix(session: nox.Session, diffrax: str) -> None:
    """A part of the tests, with each supported version of diffrax and of Python."""
    session.install("-e", ".[tests]", f"diffrax=={diffrax}")
    _pytest(session, *PART, *OLD)


@nox.session
def older(session: nox.Session) -> None:
    """A part of the tests, with a Python for which there are no new versions of JAX."""
    session.install("-e", ".[tests]")
    session.run("python", "-m", "pip", "list")
    _pytest(session, *PART)


@nox.session
def lowest(session: nox.Session) -> None:
    """A part of the tests, with the oldest supported version of everything."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["tests"]
    lowest = [re.sub(r">=([\w.]+).*", r"==\1", x) for x in wanted]
    session.install("-e", ".", *lowest)
    _pytest(session, *PART, *OLD, fast=False)


@nox.session
def package(session: nox.Session) -> None:
    """A part of the tests, from the wheel that is built from the sdist."""
    session.install("build", "twine")
    dist = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", dist)
    built = [str(x) for x in pathlib.Path(dist).glob("diffrax_reversible-*")]
    session.run("twine", "check", "--strict", *built)
    [wheel] = [x for x in built if x.endswith(".whl")]
    session.install(f"{wheel}[tests]")
    _pytest(session, *PART)


@nox.session
def exhaustive(session: nox.Session) -> None:
    """The other cases of all tests, and all combinations of what a solve is made of.
    Takes hours."""
    session.install("-e", ".[tests,examples]")
    _pytest(session, "-m", "exhaustive")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Thousands of solves, drawn from all that can be combined."""
    session.install("-e", ".[tests,examples]")
    _pytest(session, "tests/test_fuzz.py", "-m", "exhaustive or not exhaustive")


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff>=0.17")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.install("-e", ".[tests,examples]", "pyright>=1.1.400")
    session.run("pyright")


@nox.session
def bench(session: nox.Session) -> None:
    """All benchmarks but the study of stability, which takes 40 minutes."""
    session.install("-e", ".[examples]")
    for name in ("gradient", "memory", "compiling", "work_precision"):
        picture = f"{session.create_tmp()}/{name}.png"
        session.run("python", f"examples/benchmarks/{name}.py", "--output", picture)


@nox.session
def examples(session: nox.Session) -> None:
    """The examples, at their full size."""
    session.install("-e", ".[examples]")
    for name, *options in (
        ("hare_lynx",),
        ("least_squares",),
        ("nuts",),
        ("pinene",),
        ("ito_populations",),
        ("pharmacology",),
        ("neural_ode_float32",),
        ("digits_neural_ode",),
        ("planets",),
        ("continuous_flow",),
        ("heat_equation",),
        ("neural_cde",),
        ("neural_sde",),
        ("many_devices", "--processes", "2"),
    ):
        picture = f"{session.create_tmp()}/{name}.png"
        session.run("python", f"examples/{name}.py", *options, "--output", picture)
