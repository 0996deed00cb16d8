"""`nox -s tests` runs the tests; `nox` alone runs all that CI does."""

import pathlib
import re

import nox


nox.options.sessions = ["tests", "lint", "types", "lowest"]

DIFFRAX = ["0.7.0", "0.7.1", "0.7.2"]


# Compiling takes most of the time, which these halve. (What they leave out is tested by
# `lowest`, which does without.)
FAST = {
    "XLA_FLAGS": " ".join(
        ["--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0"]
    )
}


def _pytest(session: nox.Session, *args: str, env: dict[str, str] = FAST) -> None:
    # Two processes share the work well.
    command = ("pytest", "-n", "2", "--dist", "worksteal", *args, *session.posargs)
    session.run(*command, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, with the newest of everything."""
    session.install("-e", ".[tests,examples]")
    _pytest(session)


# A part of the tests, for other versions of what they depend on.
PART = (
    "tests/test_compat.py",
    "tests/test_errors.py",
    "tests/test_user_solvers.py",
    "tests/test_gradient.py",
    "tests/test_vmap.py",
    "tests/test_batch.py",
    "-k",
    "not (gradient or vmap or batch) or closed_over or resumed or host_instances "
    "or scan or finished or subs or test_mark or test_sum",
    # Old versions of the dependencies warn of each other.
    "-W",
    "default",
)


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("diffrax", DIFFRAX)
def matrix(session: nox.Session, diffrax: str) -> None:
    """A part of the tests, with each supported version of diffrax and of Python."""
    session.install("-e", ".[tests]", f"diffrax=={diffrax}")
    _pytest(session, *PART)


@nox.session
def lowest(session: nox.Session) -> None:
    """A part of the tests, with the oldest supported version of everything."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["tests"]
    lowest = [re.sub(r">=([\w.]+).*", r"==\1", x) for x in wanted]
    session.install("-e", ".", *lowest)
    _pytest(session, *PART, env={})


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
    """Gradients over all combinations of solver, controller, `SaveAt` and terms."""
    session.install("-e", ".[tests,examples]")
    _pytest(session, "-m", "exhaustive")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Thousands of solves, drawn from all that can be combined."""
    session.install("-e", ".[tests,examples]")
    _pytest(session, "tests/test_fuzz.py", "-m", "exhaustive or not exhaustive")


@nox.session
def lint(session: nox.Session) -> None:
    session.install("ruff>=0.9")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.install("-e", ".[tests,examples]", "pyright>=1.1.400")
    session.run("pyright")


@nox.session
def bench(session: nox.Session) -> None:
    """All benchmarks but the study of stability, which takes hours."""
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
