"""What `transfuse show` prints: a method's page and its recipe, read from its file without importing it."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import catalogue
from .catalogue import Method
from .core.errors import BadInput
from .core.records import PACKAGE

__all__ = ["Parameter", "Signature", "page", "recipe", "signature"]

_NOT_LITERAL = object()

# Arguments of a family's `transfer` that are not keys of the recipe: `transfuse run` supplies them.
SUPPLIED = ("model", "tokenizer", "method", "output", "scratch", "seed")


@dataclass(frozen=True)
class Parameter:
    """One argument: name, annotation and default as written (None if required), its text, how it is given."""

    name: str
    annotation: str
    default: str | None
    text: str
    positional: bool = False

    @property
    def supplied(self) -> bool:
        """Whether a family's `transfer` fills it in (the model, ...): positional, no default, not given by name."""
        return self.positional and self.default is None and not _is_name(ast.parse(self.annotation).body[0])


@dataclass(frozen=True)
class Signature:
    """The main object of a method as its file declares it."""

    name: str
    kind: str  # "class" or "function"
    parameters: tuple[Parameter, ...]
    returns: str | None = None


def page(slug: str) -> str:
    """Everything about one method as text: needs, use, measurements, explanation.

    Raises:
        BadInput: there is no such method.
    """
    method = catalogue.find(slug)
    found = signature(method)
    facts = [
        ("slug", method.slug),
        ("family", method.family),
        ("paper", f"https://arxiv.org/abs/{method.arxiv}" if method.arxiv else "none"),
        ("moves", method.moves),
        ("access", ", ".join(method.access)),
        ("reversible", "yes" if method.reversible else "no"),
        ("context", "reads extra tokens when answering" if method.context else "reads no extra tokens"),
        ("needs", f'pip install "{method.package}[{method.extra}]"' if method.extra else "nothing more"),
        ("import", f"from {method.module} import {found.name}"),
    ]
    lines = [method.title, "", *(f"{name + ':':<12}{value}" for name, value in facts)]
    lines += ["", "evidence:", *("  " + line for line in evidence_lines(method))]
    if found.parameters:
        lines += ["", f"arguments of {found.name}:"]
        for parameter in found.parameters:
            default = "" if parameter.default is None else f" = {parameter.default}"
            lines.append(f"  {parameter.name}: {parameter.annotation}{default}")
            lines += textwrap.wrap(parameter.text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, "", method.body]).rstrip()


def evidence_lines(method: Method) -> list[str]:
    """The claim, and rule and verdict per tier."""
    record = catalogue.record(method.slug)
    if record is None:
        return [f"not measured; run: transfuse evidence {method.slug}"]
    lines = textwrap.wrap("claim: " + " ".join(str(record.get("claim", "")).split()), 100)
    verdicts = method.evidence
    for tier in catalogue.TIERS:
        found = record.get("tiers", {}).get(tier)
        lines.append(
            f"{tier}: {verdicts[tier]}" + (f"; rule: {' '.join(found['rule'].split())}" if found else "")
        )
    return lines


def recipe(slug: str) -> str:
    """A recipe for `transfuse run` with every default, each under a comment that says what it is.

    A family that has no `transfer` function has no single run; the method and its arguments are then shown as
    they stand in other recipes.

    Raises:
        BadInput: there is no such method.
    """
    method = catalogue.find(slug)
    found = signature(method)
    lines = [f"# {method.title}", f"# moves: {method.moves}"]
    if method.arxiv:
        lines.append(f"# paper: https://arxiv.org/abs/{method.arxiv}")
    own = [p for p in found.parameters if not p.supplied]
    node = [f"uses: {method.slug}", *_block("with", [line for p in own for line in _entry(p)])]
    family = _transfer(method)
    if family is None or not _runs(method, found, own):
        return "\n".join(
            [*lines, f"# no single run: call {found.name} from Python, or use it in a comparison", *node]
        )
    lines += ["# a reference model (transfuse models), a folder, or a hub id", "model: smollm2-135m"]
    lines += _block("method", node)
    for parameter in family:
        lines += _entry(parameter)
    return "\n".join([*lines, f"output: runs/{method.slug}", "seed: 0"])


def _block(key: str, lines: list[str]) -> list[str]:
    return [f"{key}:", *("  " + line for line in lines)] if lines else [f"{key}: {{}}"]


def _entry(parameter: Parameter) -> list[str]:
    """A parameter as YAML: its text as a comment, then its default, or nothing where it must be filled in."""
    lines = [f"# {line}" for line in textwrap.wrap(parameter.text, 90)]
    if parameter.default is None:
        return [*lines, f"{parameter.name}:  # required: {parameter.annotation}"]
    value = _literal(parameter.default)
    if value is _NOT_LITERAL:
        return [*lines, f"# {parameter.name}: {parameter.default}  # {parameter.annotation}"]
    return [*lines, f"{parameter.name}: {_yaml(value)}  # {parameter.annotation}"]


def _runs(method: Method, found: Signature, own: list[Parameter]) -> bool:
    """Whether the family's `transfer` runs this one of its methods.

    A family that runs some only either names what those return (`RUNS`), or has a function `suits`; then it does not
    run those that are given models of their own.
    """
    text = _family_file(method).read_text(encoding="utf-8")
    if wanted := re.search(r'^RUNS = "(\w+)"', text, re.MULTILINE):
        return found.returns is not None and wanted[1] in found.returns
    return "\ndef suits(" not in text or len(own) == len(found.parameters)


def _family_file(method: Method) -> Path:
    """The family's module here, also of a method that another package brings."""
    return PACKAGE / method.family / "__init__.py"


def _transfer(method: Method) -> list[Parameter] | None:
    """What the family's `transfer` asks for besides what `transfuse run` supplies; None if it has none."""
    path = _family_file(method)
    if not path.is_file():  # a family of another package's own
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = _definition(tree, "transfer")
    if not isinstance(node, ast.FunctionDef):
        return None
    found = _of_function(node, ast.get_docstring(node) or "", tree)
    return [parameter for parameter in found if parameter.name not in SUPPLIED]


def signature(method: Method) -> Signature:
    """Name, kind and parameters of a method's main object, from its source.

    A class's parameters are those of `__init__`, or its fields if it is a dataclass; both may come from a
    base class in the same module or in a module imported relatively.

    Raises:
        BadInput: the module has no `__all__`, or does not define the object it names.
    """
    place = f"{method.path.parent.name}/{method.path.name}"
    tree = ast.parse(method.path.read_text(encoding="utf-8"))
    names = [name for name in _exports(tree) if _definition(tree, name)]
    if not names:
        remedy = "list the public names of the module, a class or function of its own among them"
        raise BadInput(f"{place}: __all__", _exports(tree), "names nothing that is defined there", remedy)
    name = catalogue.main_name(method.slug, names)
    node = _definition(tree, name)
    if isinstance(node, ast.ClassDef):
        return Signature(name, "class", tuple(_of_class(node, tree, method.path)))
    assert isinstance(node, ast.FunctionDef)
    parameters = tuple(_of_function(node, ast.get_docstring(node) or "", tree))
    return Signature(name, "function", parameters, ast.unparse(node.returns) if node.returns else None)


def _exports(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _definition(tree: ast.Module, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    return None


def _of_class(node: ast.ClassDef, tree: ast.Module, path: Path) -> list[Parameter]:
    texts = ast.get_docstring(node) or ""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(item, texts + "\n\n" + (ast.get_docstring(item) or ""), tree)
    inherited: list[Parameter] = []
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (found := _base(base.id, tree, path)):
            inherited = [*inherited, *_of_class(*found)]
    decorators = [
        text for decorator in node.decorator_list if "dataclass" in (text := ast.unparse(decorator))
    ]
    if not decorators:
        return inherited
    positional = "kw_only=True" not in decorators[0]
    described = _described(texts)
    own = [
        Parameter(
            item.target.id,
            _source(item.annotation, tree),
            None if item.value is None else _source(item.value, tree),
            described.get(item.target.id, ""),
            positional,
        )
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]
    merged = {parameter.name: parameter for parameter in [*inherited, *own]}
    return list(merged.values())


def _base(name: str, tree: ast.Module, path: Path) -> tuple[ast.ClassDef, ast.Module, Path] | None:
    """The class called `name` in this module, or in the module it is imported from relatively."""
    node = _definition(tree, name)
    if isinstance(node, ast.ClassDef):
        return node, tree, path
    for item in tree.body:
        if (
            isinstance(item, ast.ImportFrom)
            and item.level
            and any((a.asname or a.name) == name for a in item.names)
        ):
            folder = path.parents[item.level - 1]
            file = folder.joinpath(*(item.module or "__init__").split(".")).with_suffix(".py")
            if file.is_file():
                return _base(name, ast.parse(file.read_text(encoding="utf-8")), file)
    return None


def _of_function(node: ast.FunctionDef, docstring: str, tree: ast.Module) -> list[Parameter]:
    described = _described(docstring)
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    pairs = [
        *zip(plain, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return [
        Parameter(
            argument.arg,
            _source(argument.annotation, tree) if argument.annotation else "Any",
            None if default is None else _source(default, tree),
            described.get(argument.arg, ""),
            argument in plain,
        )
        for argument, default in pairs
        if argument.arg not in ("self", "cls")
    ]


def _source(node: ast.expr, tree: ast.Module) -> str:
    """An expression as written; a constant or alias of the module as its value."""
    if isinstance(node, ast.Name):
        for item in tree.body:
            if isinstance(item, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == node.id for t in item.targets
            ):
                return ast.unparse(item.value)
    return ast.unparse(node)


def _described(docstring: str) -> dict[str, str]:
    """Texts of the arguments in a Google-style docstring."""
    found: dict[str, str] = {}
    name = None
    for section in re.findall(
        r"^(?:Args|Attributes):\n((?:[ \t]+\S.*\n?|[ \t]*\n)+)", docstring, re.MULTILINE
    ):
        for line in textwrap.dedent(section).split("\n"):
            if match := re.match(r"\*{0,2}(\w+)(?: \(.*?\))?:\s*(.*)", line):
                name = match.group(1)
                found[name] = match.group(2)
            elif name and line.strip():
                found[name] += " " + line.strip()
    return found


def _is_name(node: ast.AST) -> bool:
    """Whether an annotation takes text, or a list of texts: as in `recipe`."""
    if isinstance(node, ast.Expr):
        return _is_name(node.value)
    if isinstance(node, ast.BinOp):
        return _is_name(node.left) or _is_name(node.right)
    if isinstance(node, ast.Subscript):
        return ast.unparse(node.value) in ("Sequence", "list", "tuple") and _is_name(node.slice)
    return isinstance(node, ast.Name) and node.id == "str"


def _literal(source: str) -> Any:
    try:
        return ast.literal_eval(source)
    except ValueError:
        return _NOT_LITERAL


def _yaml(value: Any) -> str:
    """A literal on one line; JSON is YAML."""
    if isinstance(value, (set, tuple)):
        value = list(value)
    text = json.dumps(value, ensure_ascii=False)
    # YAML reads 4e-05 as text.
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text
