"""Merging without ever holding a model: tensors are read by rows, merged, and written to shards as they come."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.files import atomic_dir
from ..core.lineage import amend_lineage, write_lineage
from ..core.shards import SHARD_BYTES, ShardWriter, row_blocks
from ._methods import Piece, Pieces, StaticMerge
from ._plan import Plan, Vocabulary, check_output, plan_merge, wanted_dtype
from ._sources import Source
from ._static import check_half, wide_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["merge", "merged_tensors"]

BLOCK = 1 << 20  # elements read and written at a time
SLICE = 32_000  # elements merged at a time: they stay in the cache, and torch starts no threads for so few
_LARGER = 'pass dtype="bfloat16", or load the models in it'
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_COPIED = {"transfuse.json", "adapter_config.json", "model.safetensors.index.json", "training.json"}


def merge(
    *,
    models: Sequence[Any],
    base: Any = None,
    method: str | StaticMerge = "linear",
    output: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    vocabulary: Vocabulary = "same",
    exclude: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
    checksums: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dry_run: bool = False,
    **arguments: Any,
) -> Any:
    """Merge models of one architecture into one, and write a folder that `transfuse.load` takes.

    Reads and writes a few rows at a time: memory does not grow with the models. The result appears at once, by a
    rename, with the base's configuration and tokenizer, its lineage and a model card.

    Args:
        models: What is merged: loaded models, state dicts, folders, names as `transfuse.load` takes them, LoRA
            adapters (folders, or "model+adapter"), which count as the base with the adapter merged in.
        base: The model they were fine-tuned from; for "linear" and "slerp" it only gives names and tokenizer.
        method: "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", or such an object.
        output: Folder of the result, new or empty; None returns the tensors.
        dtype: Of the result: "auto" (the base's), "float32", "bfloat16", "float16".
        vocabulary: "same" refuses models with other numbers of tokens; "base" keeps the base's tokens, cuts off a
            model's further rows, and takes rows that a model lacks from the base.
        exclude: Regular expressions; tensors in whose name one is found stay as the base has them.
        shard_bytes: Largest file of the result.
        checksums: Record a SHA-256 of every input, read while the merge runs.
        tokenizer: Put beside the result; by default that of the base's folder.
        dry_run: Return the plan and write nothing.
        **arguments: Those of the method: `weights`, `density`, `scaling`, `t`, ...; see `transfuse.merge.METHODS`.

    Returns:
        The folder's path; the tensors by name without `output`; a `Plan` for a dry run.

    Raises:
        BadInput: an argument out of range, or of another method; a number that float16 does not hold.
        IncompatibleModels: models of other architectures or vocabularies; the message names the tensor or token.
        Unavailable: too little disk.
    """
    plan = plan_merge(
        models=models, base=base, method=method, dtype=dtype, vocabulary=vocabulary, exclude=exclude,
        shard_bytes=shard_bytes, **arguments,
    )  # fmt: skip
    if dry_run:
        if output is not None:
            check_output(plan, output)
        return plan
    if output is None:
        return merged_tensors(plan)
    target = check_output(plan, output)
    started = time.perf_counter()
    hashes = _Hashes(plan.sources if checksums else [])
    with atomic_dir(target) as work:
        writer = ShardWriter(work, plan.infos, shard_bytes)
        survey = plan.method.survey(lambda: _whole(plan), len(plan.models))
        writer.write(lambda name: _rows(plan, name, survey))
        _copy_rest(plan, work, wanted_dtype(dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        write_lineage(
            work,
            method=plan.name.replace("_", "-"),
            arguments={**_fields(plan.method), "dtype": str(dtype), "vocabulary": vocabulary, "exclude": list(exclude)},
            base_model=None if plan.base is None else plan.base.spec,
            measurements={"bytes": plan.bytes_written, "tensors": len(plan.infos),
                          "seconds": round(time.perf_counter() - started, 3)},
            summary=f"{len(plan.models)} models merged into one ({plan.name.replace('_', ' ')}).",
            usage=f'import transfuse\n\nmodel, tokenizer = transfuse.load("{target}")',
        )  # fmt: skip
        amend_lineage(
            work,
            inputs={source.label: source.spec for source in plan.sources},
            input_sha256=hashes.result(),
        )
        if target.is_dir():
            target.rmdir()  # it is empty
    return target


def merged_tensors(plan: Plan) -> dict[str, Tensor]:
    """The tensors of a planned merge, in memory."""
    survey = plan.method.survey(lambda: _whole(plan), len(plan.models))
    return {name: _joined(plan, name, survey) for name in plan.infos}


# --- reading and merging -----------------------------------------------------------------------------------


def _pieces(plan: Plan, name: str) -> Iterator[Piece]:
    """A tensor in flat pieces, from its first element to its last."""
    for start, stop in row_blocks(plan.primary.infos[name], BLOCK):
        models = [_fitted(plan.primary, model, name, start, stop).reshape(-1) for model in plan.models]
        base = None
        if plan.base is not None and plan.method.needs_base:
            base = plan.base.rows(name, start, stop).reshape(-1)
        for first in range(0, len(models[0]), SLICE):
            part = slice(first, first + SLICE)
            yield Piece(None if base is None else base[part], [model[part] for model in models])


def _fitted(primary: Source, model: Source, name: str, start: int, stop: int) -> Tensor:
    """Rows of a model; those that it lacks are the primary's."""
    count = model.infos[name].rows
    if stop <= count:
        return model.rows(name, start, stop)
    if start >= count:
        return primary.rows(name, start, stop)
    own, others = model.rows(name, start, count), primary.rows(name, count, stop)
    wide = wide_dtype([own, others])
    return torch.cat([own.to(wide), others.to(wide)])


def _whole(plan: Plan) -> Iterator[Pieces]:
    for name in plan.infos:
        if name not in plan.kept:
            yield functools.partial(_pieces, plan, name)


def _joined(plan: Plan, name: str, survey: Any) -> Tensor:
    pieces = [piece.reshape(-1) for piece in _rows(plan, name, survey)]
    info = plan.infos[name]
    return torch.cat(pieces).view(info.shape) if pieces else torch.empty(info.shape, dtype=info.dtype)


def _rows(plan: Plan, name: str, survey: Any) -> Iterator[Tensor]:
    """A tensor of the result in flat parts, from its first element to its last."""
    info = plan.infos[name]
    if name in plan.kept:
        for start, stop in row_blocks(info, BLOCK):
            rows = plan.primary.rows(name, start, stop)
            kept = rows.to(info.dtype)
            check_half(name, rows, kept, _LARGER)
            yield kept
        return
    state = plan.method.begin(name, lambda: _pieces(plan, name), len(plan.models), survey)
    ready, filled = torch.empty(min(BLOCK, info.numel), dtype=info.dtype), 0
    for piece in _pieces(plan, name):
        merged = plan.method.combine(piece, state)
        if filled + len(merged) > len(ready):
            yield ready[:filled]
            ready, filled = torch.empty_like(ready), 0
        part = ready[filled : filled + len(merged)]
        part.copy_(merged)
        check_half(name, merged, part, _LARGER)
        filled += len(merged)
    if filled:
        yield ready[:filled]


# --- the rest of the folder --------------------------------------------------------------------------------


def _copy_rest(plan: Plan, work: Path, dtype: torch.dtype | None) -> None:
    """Configuration, generation settings and tokenizer of the primary."""
    folder = plan.primary.folder
    if folder is not None:
        for file in sorted({file for pattern in _COPIED for file in folder.glob(pattern)}):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, work / file.name)
    config = dict(plan.primary.config)
    if config:
        if dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(dtype).removeprefix("torch.")
        (work / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def _fields(method: StaticMerge) -> dict[str, Any]:
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}


class _Hashes:
    """Hashes of the sources, taken by threads, one per core, while they are merged.

    Daemons, for a merge that fails should not wait for them.
    """

    def __init__(self, sources: Sequence[Source]):
        self._found = {source.label: "" for source in sources}
        self._error: BaseException | None = None
        count = min(len(sources), os.cpu_count() or 1)
        parts = [sources[first::count] for first in range(count)]
        self._threads = [threading.Thread(target=self._work, args=(part,), daemon=True) for part in parts]
        for thread in self._threads:
            thread.start()

    def _work(self, sources: Sequence[Source]) -> None:
        try:
            for source in sources:
                self._found[source.label] = source.hash()
        except BaseException as error:
            self._error = error

    def result(self) -> dict[str, str]:
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._found
