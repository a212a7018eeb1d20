"""Merges written down: our own YAML, whose keys are the arguments of `merge`, and the common kinds of mergekit's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..core.errors import BadInput, NotApplicable
from ..core.fields import at, check_value, from_mapping, suggest, uses_and_with
from ..core.shards import SHARD_BYTES
from ..core.strict_yaml import load
from ._methods import METHODS, make_static

__all__ = ["read_config"]


@dataclass(frozen=True, kw_only=True)
class _Config:
    """Our own form, besides `method: ties` or `method: {uses: ties, with: {density: 0.2}}`; see `merge` for the keys.

    Attributes:
        models: Folders, names, adapters.
        base: The model they come from.
        output: Folder of the result.
        dtype: Of the result.
        vocabulary: Whose tokens stay.
        exclude: Regular expressions of names.
        shard_bytes: Largest file.
        checksums: Whether the inputs are hashed.
    """

    models: list[str]
    base: str | None = None
    output: str | None = None
    dtype: str = "auto"
    vocabulary: Literal["same", "base"] = "same"
    exclude: list[str] = field(default_factory=list)
    shard_bytes: int = SHARD_BYTES
    checksums: bool = True


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `merge` that a YAML file (or what one would hold) stands for.

    A file with `merge_method` is mergekit's. Folders are looked for beside the file first. What DARE keeps is divided
    by its density, as in the paper and in mergekit until its rescaling was made to keep the sum of magnitudes. Where
    changes are tied at TIES's threshold all are kept, as the paper's code does; mergekit keeps exactly `density` of
    them.

    Raises:
        BadInput: an unknown or wrong key, by its dotted path.
        NotApplicable: a part of mergekit's format that is not offered here.
    """
    mapping = load(source)
    path = None if isinstance(source, Mapping) else Path(source).expanduser()
    where, beside = ("", Path()) if path is None else (f"{path.name}:", path.parent)
    if "merge_method" in mapping:
        return _mergekit(mapping, where, beside)
    method, arguments = mapping.pop("method", "linear"), None
    config = from_mapping(_Config, mapping, where)
    given = {f.name: getattr(config, f.name) for f in fields(_Config)}
    if isinstance(method, Mapping):
        method, arguments = uses_and_with(method, at(where, "method"))
    given["method"] = make_static(method, arguments or {}, len(config.models))
    return _located(given, beside)


def _located(given: dict[str, Any], beside: Path) -> dict[str, Any]:
    """Models as folders beside the file where there are such folders."""

    def place(name: str) -> str:
        return "+".join(str(beside / part) if (beside / part).is_dir() else part for part in name.split("+"))

    base = given.get("base")
    return {
        **given,
        "models": [place(m) for m in given["models"]],
        "base": None if base is None else place(base),
    }


# --- mergekit ----------------------------------------------------------------------------------------------

_READ = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "name",
)
_IGNORED = ("chat_template",)
_PER_MODEL = ("weight", "density")


def _mergekit(mapping: Mapping[str, Any], where: str, beside: Path) -> dict[str, Any]:
    for key in mapping:
        if key in _IGNORED:
            warnings.warn(f"{at(where, key)} is ignored", stacklevel=3)
        elif key not in _READ:
            raise NotApplicable(
                at(where, key), mapping[key], "is not offered", "give whole models under `models`"
            )
    kind = mapping["merge_method"]
    if not isinstance(kind, str) or kind not in METHODS:
        raise BadInput(
            at(where, "merge_method"),
            kind,
            "is not offered",
            suggest(kind, METHODS, f"use {', '.join(METHODS)}"),
        )
    base = mapping.get("base_model")
    if base is not None:
        base = check_value(base, str, at(where, "base_model"))
    shared = _parameters(mapping.get("parameters"), at(where, "parameters"), _known(kind))
    models, own = [], []
    rows = check_value(mapping.get("models"), list[dict[str, Any]], at(where, "models"))
    for i, row in enumerate(rows):
        place = at(at(where, "models"), i)
        for key in row:
            if key not in ("model", "parameters"):
                raise NotApplicable(
                    at(place, key), row[key], "is not offered", "give `model` and `parameters`"
                )
        name = check_value(row.get("model"), str, at(place, "model"))
        if name == base and kind not in ("linear", "slerp"):
            continue  # it adds nothing to itself
        models.append(name)
        own.append({**shared, **_parameters(row.get("parameters"), at(place, "parameters"), _PER_MODEL)})
    if kind == "linear" and base is not None and base not in models:
        if "weight" not in shared:
            problem = "is one of the models that are averaged, and has no weight"
            raise BadInput(at(where, "base_model"), base, problem, "add it to `models`, or leave it out")
        models.append(base)
        own.append(shared)
    arguments = _arguments(kind, shared, own, where)
    if kind == "slerp" and base is not None:
        if len(models) == 2 and base not in models:
            raise BadInput(at(where, "base_model"), base, "is not among the models", "name one of the two")
        if len(models) == 2 or (len(models) == 1 and models != [base]):
            models = [base, next((m for m in models if m != base), base)]
    source = mapping.get("tokenizer_source", "base")
    if source not in ("base", base):
        raise NotApplicable(at(where, "tokenizer_source"), source, "is not offered", 'write "base"')
    given = {
        "models": models,
        "base": base,
        "method": make_static(kind, arguments, len(models)),
        "dtype": mapping.get("out_dtype") or mapping.get("dtype") or "auto",
        "vocabulary": "base" if "tokenizer_source" in mapping else "same",
    }
    return _located(given, beside)


def _known(kind: str) -> tuple[str, ...]:
    if kind == "slerp":
        return ("t",)
    if kind == "linear":
        return (*_PER_MODEL[:1], "normalize")
    return (*_PER_MODEL, "normalize", "lambda", *(("rescale",) if kind.startswith("dare") else ()))


def _parameters(value: Any, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for key, item in ({} if value is None else check_value(value, dict[str, Any], where)).items():
        if key == "int8_mask":
            warnings.warn(f"{at(where, key)} is ignored: masks are not kept", stacklevel=4)
        elif key not in known:
            raise BadInput(
                at(where, key), item, "is not a known parameter", suggest(key, known, f"use {known}")
            )
        elif not isinstance(item, (int, float)):
            raise NotApplicable(at(where, key), item, "varies over the layers", "give one number")
        else:
            found[key] = item
    return found


def _arguments(kind: str, shared: dict[str, Any], own: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Our arguments, with mergekit's defaults for what is not given."""
    if kind == "slerp":
        if "t" not in shared:
            raise BadInput(at(where, "parameters.t"), None, "is missing", "add parameters: {t: 0.5}")
        return {"t": float(shared["t"])}
    for i, row in enumerate(own):
        if "weight" not in row:
            raise BadInput(
                f"{at(where, 'models')}[{i}].parameters.weight", None, "is missing", "add a weight"
            )
    arguments: dict[str, Any] = {
        "weights": [float(row["weight"]) for row in own],
        "normalize": bool(shared.get("normalize", kind in ("linear", "ties"))),
    }
    if kind == "linear":
        return arguments
    arguments["scaling"] = float(shared.get("lambda", 1.0))
    if kind != "task_arithmetic":
        arguments["density"] = [float(row.get("density", 1.0)) for row in own]
    if kind == "ties":
        arguments["scope"] = "tensor"
    if kind in ("ties", "dare_ties"):
        arguments["tie"] = "positive"
    if "rescale" in shared and kind.startswith("dare"):
        arguments["rescale"] = bool(shared["rescale"])
    return arguments
