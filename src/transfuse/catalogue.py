"""What methods there are. The file system is the registry: one module each, described by its docstring.

A method is a module `transfuse/<family>/<name>.py` whose name does not start with `_`. Its slug is the name
with hyphens (`ck_plug` is `ck-plug`); both spellings are accepted everywhere. The docstring opens with a
title line and a field list, which are read from the text of the file: nothing is imported, so looking a
method up costs milliseconds.

Other packages add methods through the entry-point group `transfuse.methods`: the entry's name is the slug,
its value the dotted path of a module of the same form whose field list also has `:family:`.

    [project.entry-points."transfuse.methods"]
    my-method = "my_package.my_method"
"""

from __future__ import annotations

import ast
import importlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core.errors import BadInput, TransfuseError
from .core.records import PACKAGE, evidence_root, read_record, slug_of

__all__ = [
    "ACCESS",
    "TIERS",
    "Method",
    "evidence_root",
    "families",
    "find",
    "get",
    "methods",
    "read",
    "record",
]

ACCESS = ("text", "logits", "hidden", "weights", "training data")
"""What a method may need of a model, from least to most."""

TIERS = ("quick", "full")
"""Tiers of evidence: about a minute; minutes on a GPU and up to an hour on a CPU."""

ENTRY_POINTS = "transfuse.methods"
NOT_FAMILIES = ("core", "compare", "report")  # packages that hold no methods

_DOCSTRING = re.compile(r'(?:\s|#[^\n]*\n)*(r?"""(?:[^"\\]|\\.|"(?!""))*""")', re.DOTALL | re.IGNORECASE)
_FIELD = re.compile(r":(\w+):[ \t]*(.*)")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Method:
    """A method as its module describes it.

    Attributes:
        slug: Name on the command line (`ck-plug`).
        family: Folder it lives in (`steer`).
        title: First line of the docstring, without the full stop.
        moves: What moves from where to where.
        access: What it needs of the model, from `ACCESS`.
        reversible: Whether the model can be restored exactly.
        context: Whether it reads extra context tokens when answering.
        arxiv: Identifier of the paper, or None.
        extra: Optional dependency group it needs, or None.
        module: Dotted path of the module.
        path: The module's file.
        body: The rest of the docstring.
        package: Distribution that brings it.
    """

    slug: str
    family: str
    title: str
    moves: str
    access: tuple[str, ...]
    reversible: bool
    context: bool
    arxiv: str | None
    extra: str | None
    module: str
    path: Path
    body: str
    package: str = "transfuse"

    @property
    def evidence(self) -> dict[str, str]:
        """Verdict per tier: `passed`, `failed`, `not measured`, or `outdated` (the file changed since)."""
        found = record(self.slug) or {}
        tiers = found.get("tiers", {})
        return {tier: _verdict(tiers.get(tier), self.path) for tier in TIERS}

    def describe(self) -> dict[str, Any]:
        """The public facts as JSON-able values (`transfuse methods --json`)."""
        return {
            "slug": self.slug,
            "title": self.title,
            "family": self.family,
            "arxiv": self.arxiv,
            "moves": self.moves,
            "access": list(self.access),
            "reversible": self.reversible,
            "context": self.context,
            "extra": self.extra,
            "module": self.module,
            "package": self.package,
            "evidence": self.evidence,
        }


def families() -> list[str]:
    """Names of the method families, sorted: the sub-packages but those in `NOT_FAMILIES`."""
    return sorted(
        entry.name
        for entry in PACKAGE.iterdir()
        if entry.name not in NOT_FAMILIES and entry.name[0] not in "_." and (entry / "__init__.py").is_file()
    )


def methods(family: str | None = None) -> list[Method]:
    """All methods, sorted by family and slug.

    Args:
        family: Restrict the list to one family.

    Raises:
        BadInput: unknown family, or a module of this package whose field list is malformed.

    A malformed method of another package is left out with a warning, so that it cannot take the others down.
    """
    found = {method.slug: method for method in _own()}
    for method in _third_party():
        if method.slug in found:
            warnings.warn(f"{method.package}: the slug {method.slug!r} is taken; left out", stacklevel=2)
        else:
            found[method.slug] = method
    listed = sorted(found.values(), key=lambda method: (method.family, method.slug))
    if family is None:
        return listed
    known = sorted({*families(), *(method.family for method in listed)})
    if family not in known:
        raise BadInput("family", family, "is not a family", _nearest(family, known))
    return [method for method in listed if method.family == family]


def find(slug: str) -> Method:
    """The method called `slug` (`ck-plug` or `ck_plug`), without importing it.

    Raises:
        BadInput: there is none; the message names the nearest ones.
    """
    if not isinstance(slug, str):
        raise BadInput("method", slug, "is not a name", "give a slug, such as 'ck-plug'")
    wanted = slug_of(slug)
    own = [path for path in _files() if slug_of(path.stem) == wanted]
    if own:
        return read(own[0])
    listed = methods()
    for method in listed:
        if method.slug == wanted:
            return method
    raise BadInput("method", slug, "is not a method", _nearest(wanted, [method.slug for method in listed]))


def get(slug: str) -> Any:
    """Import the method called `slug` and return its main object, a class or a function.

    The main object is the class or function in the module's `__all__` that spells the slug (`CKPlug` for
    `ck-plug`; case and punctuation do not count), or else the first one there that the module itself defines.

    Raises:
        BadInput: there is no such method, or it is another package's and cannot be imported.
    """
    method = find(slug)
    try:
        module = importlib.import_module(method.module)
    except Exception as error:
        if method.package == "transfuse" or isinstance(error, TransfuseError):
            raise
        problem = f"of {method.package} cannot be imported ({type(error).__name__}: {error})"
        raise BadInput("method", slug, problem, "repair that package") from error
    names = getattr(module, "__all__", ())
    own = [
        name for name in names if getattr(getattr(module, name, None), "__module__", None) == module.__name__
    ]
    if not own:
        remedy = "list the method's class or function there"
        raise BadInput(f"{method.module}: __all__", names, "names nothing that is defined there", remedy)
    return getattr(module, main_name(method.slug, own))


def main_name(slug: str, names: list[str]) -> str:
    """Which of the public `names` that a module defines is the method itself; see `get`."""

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    return next((name for name in names if letters(name) == letters(slug)), names[0])


def record(slug: str) -> dict[str, Any] | None:
    """The evidence record of `slug`, or None if it was never measured.

    Raises:
        CorruptFile: the record cannot be read.
    """
    return read_record(slug, evidence_root())


def read(
    path: Path, *, slug: str | None = None, module: str | None = None, package: str = "transfuse"
) -> Method:
    """Read a method from its file, without importing it.

    Args:
        path: The module's file, `<family>/<name>.py`.
        slug: Its slug; the file's name by default.
        module: Its dotted path; `transfuse.<family>.<name>` by default.
        package: Distribution that brings it.

    Raises:
        BadInput: there is no docstring, or its field list is malformed; names the file and the field.
    """
    place = f"{path.parent.name}/{path.name}"
    title, fields, body = _front_matter(path, place)
    foreign = package != "transfuse"
    required = {"moves", "access", "reversible", "context"} | ({"family"} if foreign else set())
    allowed = required | {"arxiv", "extra"}
    for name, value in fields.items():
        if name not in allowed:
            raise BadInput(f"{place}: {name}", value, "is an unknown field", _nearest(name, sorted(allowed)))
        if not value:
            raise BadInput(f"{place}: {name}", value, "is empty", "fill it in")
    for name in sorted(required - fields.keys()):
        raise BadInput(f"{place}: {name}", None, "is missing", f"add `:{name}:` under the docstring's title")
    access = tuple(" ".join(part.split()) for part in fields["access"].split(","))
    for part in access:
        if part not in ACCESS:
            raise BadInput(f"{place}: access", part, "is unknown", "use some of: " + ", ".join(ACCESS))
    arxiv = fields.get("arxiv")
    if arxiv is not None and not _ARXIV.fullmatch(arxiv):
        raise BadInput(f"{place}: arxiv", arxiv, "is not an arXiv identifier", "write it like 2202.05262")
    return Method(
        slug=slug_of(slug or path.stem),
        family=fields["family"] if foreign else path.parent.name,
        title=title.rstrip("."),
        moves=fields["moves"],
        access=access,
        reversible=_yes(fields, "reversible", place),
        context=_yes(fields, "context", place),
        arxiv=arxiv,
        extra=fields.get("extra"),
        module=module or f"transfuse.{path.parent.name}.{path.stem}",
        path=path,
        body=body,
        package=package,
    )


def _nearest(word: str, known: list[str]) -> str:
    """The remedy of an unknown name."""
    from .core.fields import suggest

    return suggest(word, known, "choose one of: " + ", ".join(known))


def docstring_of(path: Path) -> str:
    """The docstring of a Python file, dedented, or ''; only the head of the file is parsed where possible."""
    source = path.read_text(encoding="utf-8")
    head = _DOCSTRING.match(source)
    return ast.get_docstring(ast.parse(head.group(1) if head else source)) or ""


def _front_matter(path: Path, place: str) -> tuple[str, dict[str, str], str]:
    """Title, fields and body of a module's docstring."""
    try:
        lines = docstring_of(path).split("\n")
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput("module", place, f"cannot be read ({error})", "repair the file") from error
    title = lines[0].strip()
    if not title:
        raise BadInput(
            f"{place}: docstring", "", "is missing", "open the module with a title and a field list"
        )
    fields: dict[str, str] = {}
    name = None
    position = 1
    while position < len(lines) and not lines[position].strip():
        position += 1
    while position < len(lines) and (line := lines[position]).strip():
        if match := _FIELD.fullmatch(line.rstrip()):
            name = match.group(1)
            if name in fields:
                raise BadInput(f"{place}: {name}", match.group(2), "is given twice", "keep one")
            fields[name] = match.group(2).strip()
        elif name is not None and line[0] in " \t":
            fields[name] = f"{fields[name]} {line.strip()}".strip()
        else:
            raise BadInput(
                f"{place}: docstring", line, "is not a field", "write `:name: value` lines, then a blank line"
            )
        position += 1
    body = re.sub(r"[ \t]*# doctest: \+SKIP", "", "\n".join(lines[position:]))
    return title, fields, body.strip()


def _yes(fields: dict[str, str], name: str, place: str) -> bool:
    value = fields[name]
    if value not in ("yes", "no"):
        raise BadInput(f"{place}: {name}", value, "is neither yes nor no", "write yes or no")
    return value == "yes"


def _files() -> Iterator[Path]:
    """Files of this package's methods."""
    for family in families():
        for path in sorted((PACKAGE / family).glob("*.py")):
            if not path.name.startswith("_"):
                yield path


def _own() -> Iterator[Method]:
    return (read(path) for path in _files())


def _third_party() -> Iterator[Method]:
    """Methods that other installed packages declare."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        package = entry.dist.name if entry.dist else "another package"
        try:
            yield read(_locate(entry.module), slug=entry.name, module=entry.module, package=package)
        except Exception as error:  # whatever is wrong over there
            warnings.warn(f"{package}: method {entry.name!r} left out: {error}", stacklevel=2)


def _locate(module: str) -> Path:
    """File of a module, found without importing it or its parents."""
    from importlib.util import find_spec

    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None:
        raise ImportError(f"no module named {top!r}")
    if not rest:
        candidates = [Path(spec.origin)] if spec.origin else []
    else:
        folders = [Path(folder).joinpath(*rest) for folder in spec.submodule_search_locations or ()]
        candidates = [
            file for folder in folders for file in (folder.with_suffix(".py"), folder / "__init__.py")
        ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ImportError(f"no module named {module!r}")


def _verdict(tier: dict[str, Any] | None, path: Path) -> str:
    """Verdict of one tier of a record against the method's file as it is now."""
    from .core.files import sha256_file

    if not tier:
        return "not measured"
    if tier.get("method_sha256") != sha256_file(path):
        return "outdated"
    return str(tier.get("verdict", "not measured"))
