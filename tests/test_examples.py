"""The examples run, at their small size; and so does the code in the README."""

import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import matplotlib
import pytest
from PIL import Image


ROOT = pathlib.Path(__file__).parents[1]
matplotlib.use("Agg")


def _load(name):
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def users_settings():
    # The tests are stricter than what users have.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture
def run_quick(users_settings, tmp_path):
    def run(name):
        output = tmp_path / "picture.png"
        results = _load(name).main(["--quick", "--output", str(output)])
        assert output.read_bytes().startswith(b"\x89PNG")
        return results

    return run


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", ["gradient.png", "memory.png"])
def test_pictures_are_as_new_as_their_tables(name):
    # A picture holds the rows that it was drawn from.
    folder = ROOT / "examples" / "benchmarks"
    rows = Image.open(folder / name).text["Description"].splitlines()
    assert len(rows) > 0
    # (There those in which we lose are bold.)
    text = (folder / "README.md").read_text().replace("**", "")
    assert set(rows) <= set(text.splitlines())


def test_hare_lynx(run_quick, capsys):
    for result in run_quick("hare_lynx.py").values():
        assert result["loss"] < result["initial_loss"]
        assert all(x > 0 for cost in result["costs"].values() for x in cost)
    assert "alpha" in capsys.readouterr().out


@pytest.mark.long
def test_least_squares(run_quick, monkeypatch, capsys):
    # (It takes the data from `hare_lynx.py`.)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    params, errors, gauss_newton, hessian = run_quick("least_squares.py")
    rates = jnp.exp(params[:4])
    assert jnp.allclose(rates, jnp.array([0.54, 0.027, 0.024, 0.8]), rtol=0.05)
    assert jnp.all((errors > 0.05) & (errors < 0.2))
    assert jnp.max(jnp.abs(hessian - hessian.T)) < 1e-6 * jnp.max(jnp.abs(hessian))
    assert jnp.max(jnp.abs(hessian / gauss_newton - 1)) < 2
    assert "birth of hares" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_nuts(run_quick, monkeypatch, capsys):
    # (It takes the data from `hare_lynx.py`.)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    results = run_quick("nuts.py")
    # Those that failed have a gradient of zero, and neither they nor any other one that
    # is not finite.
    assert results["zero"] == results["failed"] > 0
    assert results["bad"] == 0
    # The chains were not ended.
    assert jnp.all(jnp.isfinite(results["draws"]))
    assert jnp.all(jnp.std(results["draws"], axis=1) > 0)
    assert "smoke test" in capsys.readouterr().out


@pytest.mark.long
def test_pharmacology(run_quick, monkeypatch, capsys):
    # (It takes `compare` from `pinene.py`.)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    results = run_quick("pharmacology.py")
    # In forward mode it is the derivative of the same steps.
    assert results["ReversibleAdjoint"] < 1e-12
    assert results["RecursiveCheckpointAdjoint"] < 1e-12
    assert "smoke test" in capsys.readouterr().out


@pytest.mark.long
def test_pinene(run_quick, capsys):
    rates, table = run_quick("pinene.py")
    (expected, *_), (grad, *_) = table.values()
    # The same steps, and the same root finder.
    assert jnp.max(jnp.abs(grad / expected - 1)) < 1e-9
    assert (
        jnp.max(jnp.abs(rates / jnp.array([5.9e-5, 3e-5, 2e-5, 2.7e-4, 4e-5]) - 1))
        < 0.1
    )
    assert "published" in capsys.readouterr().out


@pytest.mark.long
def test_ito_populations(run_quick, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    values, table = run_quick("ito_populations.py")
    assert values[-1] < values[0]
    (expected, *_), (grad, *_) = table.values()
    assert jnp.max(jnp.abs(grad / expected - 1)) < 1e-9
    assert "smoke test" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_neural_ode_float32(run_quick, capsys):
    results = run_quick("neural_ode_float32.py")
    assert results["dtype"] == "float32"
    assert results["bad"] == 0
    assert results["after"] < 0.8 * results["before"]
    # Rounding, also of the errors from which steps are chosen.
    assert all(x < 1e-2 for values in results["at"].values() for x in values)
    assert "smoke test" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_digits_neural_ode(run_quick):
    results = run_quick("digits_neural_ode.py")
    # By chance it is 0.1.
    assert results["accuracy"] > 0.5
    assert results["losses"][-1] < results["losses"][0]
    for rows in results["table"].values():
        for megabytes, seconds in rows.values():
            assert megabytes > 0
            assert seconds > 0


@pytest.mark.exhaustive
def test_planets(run_quick):
    results = run_quick("planets.py")
    assert results["losses"][-1] < 1e-3 * results["losses"][0]
    # 20 years are too few for the other two.
    assert abs(results["masses"]["Jupiter"] - 1) < 0.05
    assert abs(results["masses"]["Saturn"] - 1) < 0.1


@pytest.mark.exhaustive
def test_continuous_flow(run_quick):
    results = run_quick("continuous_flow.py")
    assert results["loss"] < results["losses"][0]
    assert abs(results["integral"] - 1) < 0.01


@pytest.mark.exhaustive
def test_heat_equation(run_quick):
    results = run_quick("heat_equation.py")
    before, after = results["errors"]
    assert after < 0.8 * before
    # Two methods of the same order, at a step size where both have almost converged.
    assert results["difference"] < 1e-8


@pytest.mark.exhaustive
def test_neural_sde(run_quick, capsys):
    results = run_quick("neural_sde.py")
    assert results["neural SDE"] < results["neural SDE, untrained"]
    # The same paths, with smaller steps.
    fine = results["the same, with Heun and a quarter of the step size"]
    assert abs(fine - results["neural SDE"]) < 0.2 * fine
    assert "autoregression" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_neural_cde(run_quick, capsys):
    results = run_quick("neural_cde.py")
    assert results["neural CDE"] < results["no change"]
    fine = results["neural CDE, a quarter of the step size"]
    assert abs(fine - results["neural CDE"]) < 0.2 * fine
    assert "ridge" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_many_devices(tmp_path):
    # Two processes, of two devices each. The gradients are compared there.
    output = tmp_path / "loss.png"
    flags = "--xla_force_host_platform_device_count=2"
    out = subprocess.run(
        [sys.executable, ROOT / "examples" / "many_devices.py"]
        + ["--quick", "--processes", "2", "--output", output],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "on 4 devices in 2 processes and on one differ by" in out.stdout
    before, after = re.findall(r"loss: (\S+) -> (\S+)", out.stdout)[0]
    assert float(after) < float(before)


@pytest.mark.parametrize("name", ["gradient", "memory", "compiling", "work_precision"])
@pytest.mark.usefixtures("users_settings")
def test_benchmark(name, tmp_path, capsys, monkeypatch):
    # They import from each other.
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    output = tmp_path / "plot.png"
    table = _load(f"benchmarks/{name}.py").main(["--quick", "--output", str(output)])
    assert len(table) > 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("|") > 10


@pytest.mark.usefixtures("users_settings")
def test_readme(capsys):
    namespace = {}
    text = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(snippets) == 2
    for code in snippets:
        exec(compile(code, "README.md", "exec"), namespace)
        assert capsys.readouterr().out.splitlines() == re.findall(
            r"^print\(.*\)  # (.*)", code, re.M
        )
    assert jnp.all(jnp.isfinite(namespace["grads"].field.layers[0].weight))


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 1200
    # What it points to is there.
    for path in re.findall(r"\]\(([^:)]+)\)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.usefixtures("users_settings")
def test_docstring_example():
    from diffrax_reversible import AbstractCouplingSolver

    # (From Python 3.13 on the compiler strips what docstrings are indented by.)
    doc = inspect.getdoc(AbstractCouplingSolver)
    assert doc is not None
    [code] = re.findall(r"```python\n(.*?)```", doc, re.S)
    namespace = {}
    exec(textwrap.dedent(code), namespace)
    solver = namespace["AsynchronousLeapfrog"]()
    import diffrax

    import diffrax_reversible as dfxr

    def solve(y0):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            solver,
            0.0,
            1.0,
            0.01,
            y0,
            adjoint=dfxr.ReversibleAdjoint(),
        )
        return sol.ys[0]

    # Second order, with a small constant.
    value, grad = jax.value_and_grad(solve)(jnp.array(1.0))
    assert abs(value - jnp.exp(-1)) < 1e-4
    assert abs(grad - jnp.exp(-1)) < 1e-4
