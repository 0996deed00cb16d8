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
SURFACE = {
    "_backwards",
    "_citation",
    "_diagnose",
    "_drift",
    "_reverse_solve",
    "__init__",
}


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
    names = {x for x in vars(diffrax_reversible) if not x.startswith("_")}
    # (Put there by the hook that checks annotations.)
    names = names - {"jaxtyping"}
    assert sorted(names) == sorted(diffrax_reversible.__all__)


PUBLIC = {
    name: getattr(diffrax_reversible, name) for name in diffrax_reversible.__all__
}


def _arguments(fn):
    parameters = list(inspect.signature(fn).parameters)
    return [x for x in parameters if x not in ("self", "cls")]


def _documents(doc, names):
    """Whether each has an item in a list of the docstring, which some may share."""
    items = re.findall(r"^\s*- (`.*?`):", doc, re.M)
    found = set(re.findall(r"`(\w+)`", " ".join(items)))
    return set(names) <= found


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name):
    x = PUBLIC[name]
    doc = x.__doc__
    assert doc
    # The first paragraph says what it is, and is no longer than three lines.
    summary, *_ = inspect.cleandoc(doc).split("\n\n")
    assert len(summary.splitlines()) <= 3
    if not inspect.isclass(x):
        # (`diagnose` documents what differs from `diffeqsolve`.)
        assert "**Arguments:**" in doc and "**Returns:**" in doc
        assert name == "diagnose" or _documents(doc, _arguments(x))
    elif inspect.isabstract(x) or name.startswith("Abstract"):
        assert not _arguments(x)
    elif issubclass(x, tuple) or name == "Diagnosis":
        fields = x._fields if issubclass(x, tuple) else x.__dataclass_fields__
        assert "**Attributes:**" in doc and _documents(doc, fields)
    else:
        assert x.__init__.__doc__.startswith("**Arguments:**")
        assert _documents(x.__init__.__doc__, _arguments(x))


CLASSES = [name for name, x in PUBLIC.items() if inspect.isclass(x)]


@pytest.mark.parametrize("name", CLASSES)
def test_methods_documented(name):
    # Those that are new in this class: others are documented where they are.
    x = PUBLIC[name]
    inherited = set().union(*map(dir, x.__bases__))
    for attribute, method in vars(x).items():
        is_new = not attribute.startswith("_") and attribute not in inherited
        if is_new and inspect.isfunction(method):
            assert method.__doc__, attribute


def test_diagnose_takes_what_diffeqsolve_takes():
    def kinds(fn):
        parameters = inspect.signature(fn).parameters.values()
        return [(p.name, p.kind, p.default is p.empty) for p in parameters]

    assert kinds(diffrax_reversible.diagnose) == kinds(diffrax.diffeqsolve)


def test_table_of_solvers():
    """In the docstring of the package: it has each of them, and the right orders."""
    rows = re.findall(r"^(\w+)\(.*?\) +(\w+) ", diffrax_reversible.__doc__ or "", re.M)
    solvers = {
        name
        for name, x in PUBLIC.items()
        if inspect.isclass(x)
        and issubclass(x, diffrax.AbstractSolver)
        and not name.startswith("Abstract")
    }
    assert {name for name, _ in rows} == solvers
    for name, order in rows:
        if name != "UReversible":
            assert PUBLIC[name]().order(None) == int(order), name


def test_version():
    root = pathlib.Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert diffrax_reversible.__version__ == project["project"]["version"]
