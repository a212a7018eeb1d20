"""Values from YAML or JSON checked against Python signatures: types, unknown and missing names.

A class's or function's own signature is the schema: there is no second description to keep in step. `where`
names the value in messages; write it as a file (`"run.yaml:"`) or a dotted path (`"run.yaml: method.with"`).
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import difflib
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .errors import BadInput

__all__ = ["Node", "at", "check_arguments", "check_value", "from_mapping", "suggest", "uses_and_with"]

T = TypeVar("T")
Resolver = Callable[[Any, str], Any]

UNIONS = (Union, types.UnionType)
SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable,
              collections.abc.Collection, collections.abc.Set)  # fmt: skip
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
PATHS = (Path, os.PathLike)
UNKNOWN = object()  # an annotation that cannot be evaluated at run time


@dataclass(frozen=True)
class Node:
    """A checked `{uses: ..., with: ...}`: what will be called, with which arguments. Nothing is built yet."""

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    where: str

    def values(self) -> dict[str, Any]:
        """The arguments, with nested nodes built."""
        return {name: _built(value) for name, value in self.arguments.items()}

    def build(self, **given: Any) -> Any:
        """Call the target with its arguments, nested nodes first, and with those the caller gives."""
        return self.target(**given, **self.values())


def _built(value: Any) -> Any:
    if isinstance(value, Node):
        return value.build()
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_built(item) for item in value)
    return {k: _built(v) for k, v in value.items()} if isinstance(value, dict) else value


def at(where: str, key: Any) -> str:
    """`where` extended by one key or index: `at("a.yaml:", "model")`, `at("a.yaml: rows", 3)`."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    return f"{where}{' ' if where.endswith(':') else '.' if where else ''}{key}"


def suggest(name: Any, known: Collection[str], otherwise: str) -> str:
    """A remedy: the nearest known name when there is one, else `otherwise`."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass (or any class with a typed constructor) from a mapping, checking every value.

    Args:
        cls: Its fields' annotations decide what is accepted; nested dataclasses take nested mappings.
        mapping: As read from YAML or JSON.
        where: What messages call the mapping.

    Raises:
        BadInput: not a mapping; an unknown, missing or wrongly typed field (by its dotted path).
    """
    return cls(**{name: _built(value) for name, value in check_arguments(cls, mapping, where).items()})


def check_arguments(
    target: Callable[..., Any],
    mapping: Mapping[str, Any] | None,
    where: str = "",
    *,
    given: Collection[str] = (),
    resolve: Resolver | None = None,
) -> dict[str, Any]:
    """Check a mapping as the keyword arguments of `target`, and return them with the types it asks for.

    Args:
        target: A class or function with annotated parameters.
        mapping: Argument names and values; None stands for none.
        where: What messages call the mapping.
        given: Parameters that the caller supplies: neither required nor allowed in the mapping.
        resolve: Turns the name in a nested `{uses: name, with: ...}` into a class or function; without it
            nested nodes are refused.

    Returns:
        Arguments; nested `uses` are `Node`s.
    """
    if not isinstance(mapping, Mapping):
        if mapping is not None:
            raise BadInput(
                where or "recipe", mapping, f"is {_kind(mapping)}, not a mapping", "write `name: value` lines"
            )
        mapping = {}
    parameters = parameters_of(target)
    open_names = [name for name in parameters if name not in given]
    for key in mapping:
        if key not in open_names:
            known = ", ".join(open_names) or "none"
            remedy = suggest(key, open_names, f"known here: {known}")
            raise BadInput(at(where, key), mapping[key], "is not a known field", remedy)
    hints = hints_of(target)
    checked = {}
    for name in open_names:
        hint = hints.get(name, Any)
        if name in mapping:
            checked[name] = check_value(mapping[name], hint, at(where, name), resolve=resolve)
        elif parameters[name].default is inspect.Parameter.empty:
            raise BadInput(at(where, name), None, "is missing", f"add {name}: {_wanted(hint)}")
    return checked


def check_value(value: Any, hint: Any, where: str, *, resolve: Resolver | None = None) -> Any:
    """Check one value against a type hint; returns it in the type asked for (list -> tuple, text -> Path).

    A bool is no number, a whole number is a float, text is no list. Unions take the first member that fits.
    """
    hint = plain(hint)
    if isinstance(value, Mapping) and "uses" in value and not _takes_mapping(hint):
        return _node(value, hint, where, resolve)
    if hint in (Any, object, inspect.Parameter.empty) or isinstance(hint, TypeVar):
        return value
    origin = get_origin(hint)
    if origin in UNIONS:
        return _check_union(value, hint, where, resolve)
    if origin is Literal:
        choices = get_args(hint)
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        remedy = suggest(value, [c for c in choices if isinstance(c, str)], f"give {_wanted(hint)}")
        raise BadInput(where, value, f"is not {_wanted(hint)}", remedy)
    if (origin or hint) in SEQUENCES:
        return _check_sequence(value, origin or hint, get_args(hint), where, resolve)
    if (origin or hint) in MAPPINGS:
        if not isinstance(value, Mapping):
            raise _mismatch(value, hint, where)
        key_hint, item_hint = get_args(hint) or (Any, Any)
        return {
            check_value(k, key_hint, f"{where} (key)"): check_value(
                v, item_hint, at(where, k), resolve=resolve
            )
            for k, v in value.items()
        }
    return _check_scalar(value, hint, where)


def _check_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint in (None, type(None)):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # no NaN
            with contextlib.suppress(OverflowError):  # a whole number that no float holds
                return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (bool, str):
        if isinstance(value, hint):
            return value
    elif hint in PATHS or get_origin(hint) is os.PathLike:
        if isinstance(value, (str, os.PathLike)) and str(value):
            return Path(os.path.expanduser(value))
    elif hint is UNKNOWN:
        raise BadInput(
            where, value, "has a type that no recipe can hold", "leave it out, or call from Python"
        )
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return from_mapping(hint, value, where)
    raise _mismatch(value, hint, where)


def _check_union(value: Any, hint: Any, where: str, resolve: Resolver | None) -> Any:
    errors = []
    members = sorted(
        get_args(hint), key=lambda member: type(value) is not member
    )  # an exact type comes first
    for member in members:
        try:
            return check_value(value, member, where, resolve=resolve)
        except BadInput as error:
            errors.append((member, error))
    # A mapping or list that nearly fits one member deserves that member's message, not a list of types.
    inner = [error for _, error in errors if error.argument != where]
    guesses = [error for _, error in errors if error.remedy.startswith("did you mean")]
    if len(inner) == 1:
        raise inner[0]
    remedy = guesses[0].remedy if guesses else _quote_hint(value, hint) or f"give {_wanted(hint)}"
    raise BadInput(where, value, f"is {_kind(value)}, not {_wanted(hint)}", remedy)


def _check_sequence(
    value: Any, kind: Any, items: tuple[Any, ...], where: str, resolve: Resolver | None
) -> Any:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (list, tuple, set, frozenset)):
        raise BadInput(where, value, f"is {_kind(value)}, not a list", "write it as [a, b]")
    if kind is tuple and items and items[-1] is not Ellipsis:
        if len(value) != len(items):
            raise BadInput(
                where, value, f"has {len(value)} items, not {len(items)}", f"give {len(items)} items"
            )
        hints = list(items)
    else:
        hints = [items[0] if items else Any] * len(value)
    checked = [check_value(v, h, at(where, i), resolve=resolve) for i, (v, h) in enumerate(zip(value, hints))]
    if kind in (tuple, set, frozenset):
        return kind(checked)
    return checked


def _node(value: Mapping[str, Any], hint: Any, where: str, resolve: Resolver | None) -> Node:
    if resolve is None:
        raise BadInput(where, dict(value), "cannot hold `uses`", f"give {_wanted(hint)}")
    name, arguments = uses_and_with(value, where)
    target = resolve(name, at(where, "uses"))
    wanted = [m for m in (get_args(hint) if get_origin(hint) in UNIONS else (hint,)) if isinstance(m, type)]
    if isinstance(target, type) and wanted and not any(_is_subclass(target, kind) for kind in wanted):
        raise BadInput(
            at(where, "uses"), value["uses"], f"is a {target.__name__}, not {_wanted(hint)}", "use another"
        )
    return Node(target, check_arguments(target, arguments, at(where, "with"), resolve=resolve), where)


def uses_and_with(value: Any, where: str) -> tuple[str, Any]:
    """The name and the unchecked arguments in `{uses: name, with: {...}}`.

    Raises:
        BadInput: it is of another form.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("uses"), str):
        raise BadInput(where, value, "names nothing to use", "write {uses: <name>, with: {...}}")
    for key in value:
        if key not in ("uses", "with"):
            raise BadInput(at(where, key), value[key], "is not a known field", "give only `uses` and `with`")
    return value["uses"], value.get("with")


def _takes_mapping(hint: Any) -> bool:
    """Whether a plain mapping is a value of this type, so that a key `uses` in it is the user's own."""
    if get_origin(hint) in UNIONS:
        return any(_takes_mapping(plain(member)) for member in get_args(hint))
    return (get_origin(hint) or hint) in MAPPINGS


def takes_path(hint: Any) -> bool:
    """Whether a value of this type may be a path."""
    return any(
        member in PATHS or getattr(member, "__origin__", None) is os.PathLike
        for member in get_args(hint) or (hint,)
    )


def beside(base: Path, value: Any, hint: Any) -> Any:
    """The file or folder of that name in `base`, if the type takes paths and one is there; also in lists, mappings."""
    for member in get_args(hint) if get_origin(hint) in UNIONS else (hint,):
        kind, inner = get_origin(member), get_args(member)
        if isinstance(value, list) and kind in SEQUENCES:
            return [beside(base, item, inner[0]) for item in value]
        if isinstance(value, dict) and kind in MAPPINGS:
            return {key: beside(base, item, inner[1]) for key, item in value.items()}
    named = isinstance(value, (str, Path)) and takes_path(hint)
    return base / value if named and (base / value).exists() else value


def takes_text(hint: Any) -> bool:
    """Whether a value of this type may be text, or a list of texts."""
    if get_origin(hint) in SEQUENCES:
        return any(takes_text(member) for member in get_args(hint))
    return str in (get_args(hint) or (hint,))


def _is_subclass(target: type, kind: type) -> bool:
    try:
        return issubclass(target, kind)
    except TypeError:  # a protocol with data members cannot be checked on the class
        return True


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    fixed = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    )
    return {n: p for n, p in inspect.signature(target).parameters.items() if p.kind not in fixed}


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Evaluated annotations, one by one: a name imported for type checkers only must not spoil the others."""
    owners = [target]
    if isinstance(target, type):
        owners = [c for c in reversed(target.__mro__) if dataclasses.is_dataclass(c)]
        owners = owners or [inspect.getattr_static(target, "__init__")]
    hints: dict[str, Any] = {}
    for owner in owners:
        module = inspect.getmodule(owner)
        names = {**vars(module)} if module else {}
        names.update(getattr(owner, "__globals__", {}))
        for name, annotation in (inspect.get_annotations(owner) or {}).items():
            holder = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                hints[name] = typing.get_type_hints(holder, globalns=names)[name]
            except (NameError, AttributeError, TypeError):
                hints[name] = UNKNOWN
    return hints


def plain(hint: Any) -> Any:
    if get_origin(hint) is typing.Annotated:
        return plain(get_args(hint)[0])
    return plain(hint.__supertype__) if hasattr(hint, "__supertype__") else hint


def _mismatch(value: Any, hint: Any, where: str) -> BadInput:
    remedy = _quote_hint(value, hint) or f"give {_wanted(hint)}"
    return BadInput(where, value, f"is {_kind(value)}, not {_wanted(hint)}", remedy)


def _quote_hint(value: Any, hint: Any) -> str:
    members = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    return "put it in quotes" if str in members and isinstance(value, (bool, int, float)) else ""


def _kind(value: Any) -> str:
    for kind, name in ((bool, "true/false"), (int, "a whole number"), (float, "a number"), (str, "text"),
                       (type(None), "empty"), (Mapping, "a mapping"), ((list, tuple), "a list")):  # fmt: skip
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"


def _wanted(hint: Any) -> str:
    """What a hint accepts, in words."""
    hint = plain(hint)
    origin, members = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(_wanted(m) for m in members))
    if origin is Literal:
        return ("one of " if len(members) > 1 else "") + ", ".join(repr(m) for m in members)
    if (origin or hint) in SEQUENCES:
        inner = [m for m in members if m is not Ellipsis]
        return "a list" + (f" of {_wanted(inner[0])}" if len(inner) == 1 and inner[0] is not Any else "")
    if (origin or hint) in MAPPINGS:
        return "a mapping"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    if hint in PATHS or origin is os.PathLike:
        return "a path"
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(f.name for f in dataclasses.fields(hint) if f.init)}"
    if hint is UNKNOWN or hint in (Any, object, inspect.Parameter.empty):
        return "a value"
    return f"{{uses: <{getattr(hint, '__name__', str(hint))}>}}"
