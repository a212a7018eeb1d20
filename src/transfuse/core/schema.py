"""JSON schema of recipes, made from the same signatures that `core.fields` checks values against."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args, get_origin

from .fields import MAPPINGS, PATHS, SEQUENCES, UNIONS, UNKNOWN, hints_of, parameters_of, plain

__all__ = ["json_schema"]


def json_schema(target: Callable[..., Any], *, given: Collection[str] = ()) -> dict[str, Any]:
    """JSON schema (2020-12) of the mapping that `check_arguments(target, ...)` accepts.

    Descriptions come from the `Args:` or `Attributes:` section of the docstring, defaults from the signature.
    """
    hints, parameters = hints_of(target), parameters_of(target)
    texts = _descriptions(target)
    properties, required = {}, []
    for name, parameter in parameters.items():
        if name in given:
            continue
        entry = _schema_of(hints.get(name, Any))
        if name in texts:
            entry["description"] = texts[name]
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
        elif (default := _json_default(parameter.default)) is not UNKNOWN:
            entry["default"] = default
        properties[name] = entry
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _json_default(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return UNKNOWN


def _schema_of(hint: Any) -> dict[str, Any]:
    hint = plain(hint)
    origin, members = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return {"anyOf": [_schema_of(m) for m in members]}
    if origin is Literal:
        return {"enum": list(members)}
    if (origin or hint) in SEQUENCES:
        if (origin or hint) is tuple and members and members[-1] is not Ellipsis:
            items: dict[str, Any] = {"prefixItems": [_schema_of(m) for m in members]}
            return {"type": "array", **items, "minItems": len(members), "maxItems": len(members)}
        return {"type": "array", "items": _schema_of(members[0])} if members else {"type": "array"}
    if (origin or hint) in MAPPINGS:
        return (
            {"type": "object", "additionalProperties": _schema_of(members[1])}
            if members
            else {"type": "object"}
        )
    simple = {float: "number", int: "integer", bool: "boolean", str: "string", type(None): "null"}
    if hint in simple:
        return {"type": simple[hint]}
    if hint in PATHS or origin is os.PathLike:
        return {"type": "string"}
    if dataclasses.is_dataclass(hint):
        return json_schema(typing.cast(Any, hint))
    if hint is UNKNOWN or (isinstance(hint, type) and hint not in (object, Any)):
        uses = {"uses": {"type": "string"}, "with": {"type": "object"}}
        return {"type": "object", "properties": uses, "required": ["uses"], "additionalProperties": False}
    return {}


def _descriptions(target: Callable[..., Any]) -> dict[str, str]:
    sources = [inspect.getdoc(target) or ""]
    if isinstance(target, type):
        sources.append(inspect.getdoc(inspect.getattr_static(target, "__init__")) or "")
    found: dict[str, str] = {}
    for text in sources:
        section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", text, flags=re.MULTILINE)
        for entry in re.finditer(
            r"^ {4}(\w+)(?: \(.*?\))?: ((?:.*\n?)(?: {5,}.*\n?)*)", section[1] if section else "", re.M
        ):
            found.setdefault(entry[1], " ".join(entry[2].split()))
    return found
