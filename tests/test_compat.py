"""What of diffrax is relied upon, and that it is relied upon in one place only."""

import ast
import importlib.util
import inspect
import pathlib
import re
import tomllib

import diffrax
import diffrax._integrate
import pytest

import diffrax_reversible
from diffrax_reversible import _compat


SOURCE = pathlib.Path(diffrax_reversible.__file__).parent


def test_host_is_as_expected():
    parameters = set(inspect.signature(diffrax.AbstractAdjoint.loop).parameters)
    assert parameters - {"self"} == _compat.ADJOINT_LOOP_ARGUMENTS
    assert set(inspect.signature(_compat.host_loop).parameters) == (
        _compat.LOOP_ARGUMENTS
    )
    assert diffrax.__version__ in _compat.SUPPORTED_DIFFRAX


def test_only_compat_imports_internals():
    # diffrax's own, and those of JAX and Equinox.
    private = re.compile(r"\b(diffrax|jax|equinox)\._\w+")
    files = list(SOURCE.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        if path.name == "_compat.py":
            assert set(private.findall(code)) == {"diffrax"}
        else:
            assert not private.search(code), path


def test_unstable_names_are_in_one_file():
    # Of JAX and Equinox, what is public but not promised to be kept.
    unstable = re.compile(
        r"equinox\.internal|jax\.(?:interpreters|extend|experimental)"
    )
    table = (SOURCE / "_jax_compat.py").read_text()
    used = set()
    for path in SOURCE.rglob("*.py"):
        if path.name != "_jax_compat.py":
            assert not unstable.search(path.read_text()), path
            used |= set(re.findall(r"\beqxi\.\w+", path.read_text()))
    assert used == set(re.findall(r"`(eqxi\.\w+)`", table))


# Which packages and modules each may import, beside `_compat` and `_jax_compat`.
LAYERS = ["_method", "_solver", "_registry", "_adjoint"]
SURFACE = {"_citation", "_diagnose", "_reverse_solve", "__init__"}


def test_imports_run_one_way():
    seen = set()
    for path in SOURCE.rglob("*.py"):
        relative = path.relative_to(SOURCE)
        layer = relative.with_suffix("").parts[0]
        if layer in SURFACE:
            continue
        own = LAYERS[: LAYERS.index(layer) + 1] if layer in LAYERS else []
        seen.add(layer)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            package = (SOURCE.name, *relative.parts[:-1])
            package = package[: len(package) - node.level + 1]
            names = [*package, *(node.module or "").split(".")]
            target = names[1] if names[1:2] != [""] else node.names[0].name
            assert target in {"_compat", "_jax_compat", *own}, (path, target)
    assert seen == {"_compat", "_jax_compat", *LAYERS}


def _import_compat():
    spec = importlib.util.spec_from_file_location("compat", SOURCE / "_compat.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("change", ["missing name", "other arguments", "missing field"])
def test_unsupported_host(monkeypatch, change):
    assert _import_compat().SUPPORTED_DIFFRAX == _compat.SUPPORTED_DIFFRAX
    if change == "missing name":
        monkeypatch.delattr(diffrax._integrate, "loop")
        expected = "internal name"
    elif change == "other arguments":
        monkeypatch.setattr(diffrax._integrate, "loop", lambda *, terms: None)
        expected = "arguments of the integration loop"
    else:
        monkeypatch.setattr(diffrax._integrate, "State", diffrax._integrate.SaveState)
        expected = "has no field named"
    with pytest.raises(ImportError, match=expected) as info:
        _import_compat()
    for version in _compat.SUPPORTED_DIFFRAX:
        assert version in str(info.value)


def test_typed_and_public():
    assert (SOURCE / "py.typed").exists()
    names = [x for x in vars(diffrax_reversible) if not x.startswith("_")]
    # (Put there by the hook that checks annotations.)
    names = set(names) - {"jaxtyping"}
    public = {
        "ABOBA",
        "AbstractCouplingSolver",
        "AbstractReversibleSolver",
        "AbstractSplitting",
        "AsynchronousLeapfrog",
        "BlanesMoan4",
        "BlanesMoan6",
        "Coupling",
        "diagnose",
        "Diagnosis",
        "EES25",
        "EES27",
        "ForestRuth",
        "KahanLi6",
        "KahanLi8",
        "LeapfrogMidpoint",
        "Registers",
        "register_reversible",
        "ReversibleAdjoint",
        "ReversibleHeun",
        "reverse_solve",
        "SemiImplicitEuler",
        "StepInfo",
        "StormerVerlet",
        "Suzuki4",
        "UReversible",
    }
    assert names == public
    for name in public:
        assert inspect.getdoc(getattr(diffrax_reversible, name))


def test_version():
    root = pathlib.Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert diffrax_reversible.__version__ == project["project"]["version"]
