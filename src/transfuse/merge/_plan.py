"""What a merge will do, checked before any of it is done."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.errors import BadInput, IncompatibleModels
from ..core.files import check_writable
from ..core.shards import SHARD_BYTES, ShardWriter, TensorInfo, check_space
from ._methods import StaticMerge, make_static
from ._opening import open_source
from ._sources import Source

__all__ = ["Plan", "Vocabulary", "check_output", "plan_merge", "wanted_dtype"]

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_WRITTEN = {*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}

Vocabulary = Literal["same", "base"]


@dataclass(frozen=True)
class Plan:
    """What a merge will do; nothing was written. Its text is a table for people.

    Attributes:
        method: The method, with its checked arguments.
        name: What it is called.
        base: The base, if there is one.
        models: The models.
        infos: What is written: name -> dtype and shape.
        kept: Names that are copied from the base (or the first model): integer buffers, and what was excluded.
        fitted: Names whose rows differ in number, with the rows of each model.
        shards: Per file, the names in it.
    """

    method: StaticMerge
    name: str
    base: Source | None
    models: Sequence[Source]
    infos: Mapping[str, TensorInfo]
    kept: Sequence[str]
    fitted: Mapping[str, Sequence[int]]
    shards: Mapping[str, Sequence[str]]

    @property
    def primary(self) -> Source:
        """Whose names, shapes, configuration and tokenizer the result has."""
        return self.base if self.base is not None else self.models[0]

    @property
    def sources(self) -> list[Source]:
        """All that is read: the base, where the method works on differences to it, and the models."""
        return [*([self.base] if self.base is not None and self.method.needs_base else []), *self.models]

    @property
    def bytes_written(self) -> int:
        """Bytes of the result's tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of the sources' tensors, times the passes over them."""
        return self.method.passes * sum(source.nbytes for source in self.sources)

    def __str__(self) -> str:
        largest = max(self.infos.values(), key=lambda info: info.nbytes)
        lines = [f"{self.name}: {self.method}"]
        lines += [
            f"  {'base' if s is self.base else 'model':<6} {s.spec}  {_gb(s.nbytes)}" for s in self.sources
        ]
        lines += [
            f"  {len(self.infos) - len(self.kept)} tensors are merged, {len(self.kept)} are taken over as they are",
            f"  {_gb(self.bytes_read)} are read in {self.method.passes} pass(es), {_gb(self.bytes_written)} written "
            f"in {len(self.shards)} file(s); largest tensor {largest.shape}, {_gb(largest.nbytes)}",
        ]
        lines += [
            f"  {name}: {list(rows)} rows become {self.infos[name].rows}"
            for name, rows in self.fitted.items()
        ]
        return "\n".join(lines)


def plan_merge(
    *,
    models: Sequence[Any],
    base: Any = None,
    method: str | StaticMerge = "linear",
    dtype: str | torch.dtype = "auto",
    vocabulary: Vocabulary = "same",
    exclude: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    **arguments: Any,
) -> Plan:
    """Check everything that `merge` will need, and say what it will do. Arguments as there.

    Raises:
        BadInput: an argument, or a model that does not fit; see `merge`.
    """
    _check_shard_bytes(shard_bytes)
    if isinstance(models, (str, os.PathLike, Mapping)) or not isinstance(models, Sequence):
        raise BadInput("models", models, "is not a list", "give a list of models")
    made = make_static(method, arguments, len(models))
    name = method if isinstance(method, str) else re.sub(r"(?<=.)(?=[A-Z])", "_", type(made).__name__).lower()
    if made.needs_base and base is None:
        raise BadInput(
            "base", None, f"is missing: {name} merges differences to it", "give the model they come from"
        )
    if vocabulary not in ("same", "base"):
        raise BadInput("vocabulary", vocabulary, "is unknown", 'use "same" or "base"')
    wanted = wanted_dtype(dtype)
    root = None if base is None else open_source(base, "base")
    opened = [open_source(model, f"models[{i}]", root) for i, model in enumerate(models)]
    primary = opened[0] if root is None else root
    patterns = _patterns(exclude)
    infos: dict[str, TensorInfo] = {}
    kept, fitted = [], {}
    for key, info in primary.infos.items():
        number = info.dtype.is_floating_point
        if (number and info.dtype not in _FLOATS) or info.dtype.is_complex:
            raise BadInput(
                key, str(info.dtype), "is a dtype that is not merged", "convert the models to bf16 first"
            )
        if not number or any(pattern.search(key) for pattern in patterns):
            kept.append(key)
            infos[key] = TensorInfo(wanted, info.shape) if number and wanted is not None else info
            continue
        for source in opened:
            _check_fit(key, primary, source, vocabulary)
        counts = [source.infos[key].rows for source in opened]
        if set(counts) != {info.rows}:
            fitted[key] = counts
        infos[key] = info if wanted is None else TensorInfo(wanted, info.shape)
    for source in opened:
        surplus = [
            key
            for key, info in source.infos.items()
            if key not in primary.infos
            and info.dtype.is_floating_point
            and not any(p.search(key) for p in patterns)
        ]
        if surplus:
            raise IncompatibleModels(
                source.label,
                surplus[0],
                f"is in {source.spec} and not in {primary.spec}",
                "merge models of one kind",
            )
        _check_tokens(primary, source)
    shards = ShardWriter("", infos, shard_bytes).shards
    return Plan(made, name.replace("-", "_"), root, opened, infos, kept, fitted, shards)


def _check_fit(name: str, primary: Source, source: Source, vocabulary: str) -> None:
    if name not in source.infos:
        problem = f"is in {primary.spec} and not in {source.spec}"
        raise IncompatibleModels(source.label, name, problem, "merge models of one architecture")
    own, other = primary.infos[name], source.infos[name]
    if other.dtype not in _FLOATS:
        raise BadInput(
            source.label, f"{name}: {other.dtype}", "is a dtype that is not merged", "convert it to bf16"
        )
    if own.shape == other.shape:
        return
    tokens = own.shape[1:] == other.shape[1:] and (own.rows, other.rows) == (primary.tokens, source.tokens)
    if not tokens:
        problem = f"is {list(other.shape)} in {source.spec} and {list(own.shape)} in {primary.spec}"
        raise IncompatibleModels(source.label, name, problem, "merge models of one architecture")
    if vocabulary != "base":
        problem = f"has {other.rows} tokens in {source.spec} and {own.rows} in {primary.spec}"
        raise IncompatibleModels(
            source.label, name, problem, 'pass vocabulary="base" to keep the base\'s tokens'
        )


def _check_tokens(primary: Source, source: Source) -> None:
    """The tokens that two models share have the same numbers."""
    if primary.folder is None or source.folder is None or primary.folder == source.folder:
        return
    files = [place / "tokenizer.json" for place in (primary.folder, source.folder)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    from ..core.models import load_tokenizer  # on need: it imports transformers

    own, other = (load_tokenizer(file.parent).get_vocab() for file in files)
    for token, number in own.items():
        if token in other and other[token] != number:
            problem = f"is token {other[token]} in {source.spec} and {number} in {primary.spec}"
            raise IncompatibleModels(source.label, token, problem, "merge models that share a tokenizer")


def check_output(plan: Plan, output: str | os.PathLike[str]) -> Path:
    """The output folder, new or empty, on a disk with room for it.

    Raises:
        BadInput: it holds something; a tensor whose dtype is not written.
        Unavailable: too little room.
    """
    for name, info in plan.infos.items():
        if info.dtype not in _WRITTEN:
            raise BadInput(name, str(info.dtype), "is a dtype that is not written", "convert it to int64")
    target = check_writable(output, "output")
    if target.is_dir() and any(target.iterdir()):
        raise BadInput("output", str(target), "is not empty", "choose another folder, or remove this one")
    check_space(target, plan.bytes_written)
    return target


def _check_shard_bytes(size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise BadInput("shard_bytes", size, "is not a count of bytes", f"give a whole number, {SHARD_BYTES}")


def wanted_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype by its name; None for "auto".

    Raises:
        BadInput: it is none that weights have.
    """
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or found not in _FLOATS:
        raise BadInput("dtype", dtype, "is unknown", 'use "auto", "float32", "bfloat16" or "float16"')
    return found


def _patterns(exclude: Sequence[str]) -> list[re.Pattern[str]]:
    """The regular expressions of `exclude`.

    Raises:
        BadInput: no list, something in it that is no text, or no regular expression.
    """
    if isinstance(exclude, (str, bytes)) or not isinstance(exclude, (Sequence, Set)):
        raise BadInput("exclude", exclude, "is not a list", "write ['classifier'], or () for nothing")
    return [_pattern(text) for text in exclude]


def _pattern(text: Any) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise BadInput("exclude", text, "is not text", "write e.g. 'classifier'")
    try:
        return re.compile(text)
    except re.error as error:
        raise BadInput(
            "exclude", text, f"is no regular expression ({error})", "write e.g. 'classifier'"
        ) from error


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f} GB"
