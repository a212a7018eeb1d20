"""The rules that keep it one house, read from the syntax trees. Each is also shown a file that breaks it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfuse import catalogue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transfuse"
MAX_LINES = 400
FAMILIES = set(catalogue.families())
ABOVE_FAMILIES = {"bench"}  # studies: they measure methods of other families

# What exists once, and where.
HOMES = {
    "from_pretrained": "core/models.py",
    "backward": "core/training.py",
    "register_forward_hook": "core/taps.py",
    "register_forward_pre_hook": "core/taps.py",
    "register_full_backward_hook": "core/taps.py",
    "register_module_forward_hook": "core/taps.py",
    "manual_seed": "core/training.py",
    "manual_seed_all": "core/training.py",
}
OPTIONAL = {
    "lancedb",
    "bm25s",
    "sentence_transformers",
    "openai",
    "llguidance",
    "jsonschema",
    "matplotlib",
    "jinja2",
    "pyoxigraph",
    "hqq",
    "scipy",
    "spacy",
}
PICKLE = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load"}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes(child)


def imports(node: ast.AST, place: Path) -> list[str]:
    """Dotted names a statement imports; relative ones resolved against `transfuse`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ["transfuse", *place.parts[:-1]]
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []


def violations(place: Path, source: str, package: str = "") -> list[str]:
    """What is wrong with one module.

    `place` is its path inside transfuse, `package` the text of its folder's `__init__`. Optional libraries are
    imported in functions only, and after a `require` that names the extra.
    """
    found = []
    tree = ast.parse(source)
    where = place.as_posix()
    family = place.parts[0] if len(place.parts) > 1 and place.parts[0] in FAMILIES else None
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"{where}: {len(source.splitlines())} lines, more than {MAX_LINES}")
    for word in ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"):
        if word in source:
            found.append(f"{where}: {word}")
    for node in nodes(tree):
        line = getattr(node, "lineno", 0)
        for name in imports(node, place):
            parts = name.split(".")
            if parts[0] in PICKLE:
                found.append(f"{where}:{line}: imports {name}; tensors go through safetensors")
            required = any(f'require("{parts[0]}' in text for text in (source, package))
            if parts[0] in OPTIONAL and (node in tree.body or not required):
                found.append(f"{where}:{line}: imports {name}; use core.extras.require")
            other = parts[1] if parts[0] == "transfuse" and len(parts) > 1 else None
            if family and family not in ABOVE_FAMILIES and other in FAMILIES - {family}:
                found.append(f"{where}:{line}: imports the sibling family {other}")
            if where.startswith("core/") and other and other != "core" and other != "__version__":
                found.append(f"{where}:{line}: core imports {name}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in HOMES and where != HOMES[name]:
                found.append(f"{where}:{line}: calls {name}, which belongs to {HOMES[name]}")
            if name == "step" and not node.args and where != "core/training.py":
                found.append(f"{where}:{line}: calls .step(), which belongs to core/training.py")
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(
                    f"{where}:{line}: calls {ast.unparse(node.func)}, which can run code from the file"
                )
            for keyword in node.keywords:
                if (
                    keyword.arg in ("trust_remote_code", "allow_pickle")
                    and ast.unparse(keyword.value) != "False"
                ):
                    found.append(f"{where}:{line}: {keyword.arg}")
    return sorted(set(found))


def test_the_package_keeps_the_rules():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    broken = []
    for file in files:
        package = file.with_name("__init__.py")
        around = package.read_text() if package.is_file() else ""
        broken += violations(file.relative_to(PACKAGE), file.read_text(), around)
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("place", "source", "complaint"),
    [
        ("edit/x.py", "model = AutoModel.from_pretrained('a')", "belongs to core/models.py"),
        ("edit/x.py", "loss.backward()", "belongs to core/training.py"),
        ("edit/x.py", "optimizer.step()", "belongs to core/training.py"),
        ("steer/x.py", "layer.register_forward_pre_hook(f)", "belongs to core/taps.py"),
        ("steer/x.py", "torch.manual_seed(0)", "belongs to core/training.py"),
        ("edit/x.py", "from transfuse.steer.ck_plug import CKPlug", "sibling family steer"),
        ("edit/x.py", "from ..steer import ck_plug", "sibling family steer"),
        ("edit/x.py", "from .. import steer", "sibling family steer"),
        ("edit/x.py", "def f():\n    import transfuse.inject.parametric_rag", "sibling family inject"),
        ("core/x.py", "from ..edit import rome", "core imports"),
        ("core/x.py", "from .. import catalogue", "core imports"),
        ("core/x.py", "import pickle", "safetensors"),
        ("core/x.py", "import lancedb", "core.extras.require"),
        ("core/x.py", "def f():\n    from matplotlib import pyplot", "core.extras.require"),
        ("core/x.py", 'require("jinja2", extra="report")\nimport jinja2', "core.extras.require"),
        ("core/x.py", "torch.load('a.pt')", "can run code"),
        ("core/x.py", "yaml.load(text)", "can run code"),
        ("core/models.py", "AutoModel.from_pretrained('a', trust_remote_code=True)", "trust_remote_code"),
        ("edit/x.py", "x = 1\n" * (MAX_LINES + 1), "more than"),
        ("edit/x.py", "# TO" + "DO: later", "TO" + "DO"),
        ("edit/x.py", "raise NotImplemented" + "Error", "NotImplemented"),
    ],
)
def test_a_broken_rule_is_seen(place, source, complaint):
    found = violations(Path(place), source)
    assert len(found) >= 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("core/models.py", "AutoModel.from_pretrained('a', trust_remote_code=False)"),
        ("core/training.py", "loss.backward()\noptimizer.step()\ntorch.manual_seed(0)"),
        ("edit/x.py", "from ._base import Editor\nfrom ..core.taps import capture\nfrom .rome import Rome"),
        ("bench/x.py", "from transfuse.edit.rome import Rome"),
        ("edit/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import matplotlib"),
        ("core/x.py", "lancedb = require('lancedb', extra='retrieve')"),
        ("core/x.py", 'def f():\n    require("jinja2", extra="report")\n    from jinja2 import Template'),
    ],
)
def test_what_is_allowed_passes(place, source):
    assert violations(Path(place), source) == []


def test_every_folder_of_the_package_is_known():
    """A folder is a family or named in NOT_FAMILIES, and the skeleton script agrees."""
    folders = {f.name for f in PACKAGE.iterdir() if (f / "__init__.py").is_file()}
    assert folders - set(catalogue.NOT_FAMILIES) == FAMILIES
    assert set(catalogue.NOT_FAMILIES) < folders
    script = runpy.run_path(str(ROOT / "scripts" / "new_method.py"))
    assert script["NOT_FAMILIES"] == catalogue.NOT_FAMILIES


def undocumented(module) -> list[str]:
    """Public functions, classes and methods of a module that have no text of their own or inherited."""
    found = []
    for name in getattr(module, "__all__", []):
        value = getattr(module, name, undocumented)
        if value is undocumented:
            found.append(f"{module.__name__}.{name} is in __all__ and nowhere else")
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if (inspect.isclass(value) or inspect.isfunction(value)) and not inspect.getdoc(value):
            found.append(f"{module.__name__}.{name}")
        for member, attribute in vars(value).items() if inspect.isclass(value) else ():
            kinds = (property, classmethod, staticmethod)
            if member[0] == "_" or not (isinstance(attribute, kinds) or inspect.isfunction(attribute)):
                continue
            if not any(getattr(vars(base).get(member), "__doc__", None) for base in value.__mro__):
                found.append(f"{module.__name__}.{name}.{member}")
    return found


def test_public_names_exist_and_are_documented():
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "transfuse.")]
    missing = [entry for name in names for entry in undocumented(importlib.import_module(name))]
    assert not missing, "\n" + "\n".join(missing)


def test_an_undocumented_method_is_seen():
    class Base:
        """B."""

        def said(self):
            """Said."""

    class Thing(Base):
        """T."""

        def said(self):
            return 1

        def unsaid(self):
            return 2

    module = type(importlib)("made_up")
    Thing.__module__ = "made_up"
    module.Thing, module.__all__ = Thing, ["Thing"]
    assert undocumented(module) == ["made_up.Thing.unsaid"]
