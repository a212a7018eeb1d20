"""What was computed once for every row of a data set, on disk: a row's entries are as many as the row wants.

A folder with `index.json`, which says what the store is of, and safetensors shards of a few hundred rows, each written
at once. Filling it again goes on with the first missing shard; rows are read by memory map.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import BadInput, CorruptFile
from .files import atomic_write, check_writable, write_tensors

__all__ = ["RowStore"]

_INDEX = "index.json"

Shard = Callable[[int, int], Mapping[str, Tensor]]
"""Tensors of rows `first` to `last - 1`: entries one row after the other, with int64 `starts` `[last - first + 1]`."""


class RowStore:
    """A filled store.

    Args:
        folder: What `fill` wrote.
        kind: What messages call it: "logit store".
        stem: Of the shards' names.

    Attributes:
        facts: What it is of, as given to `fill`.
        rows: Rows of the data set.
        entries: Of all rows together.

    Raises:
        BadInput: there is no store in the folder.
        CorruptFile: it is not complete, or a file of it cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, kind: str, stem: str):
        self.folder = Path(os.path.expanduser(folder))
        if not (self.folder / _INDEX).is_file():
            raise BadInput("folder", str(folder), f"holds no {kind}", "capture one there")
        self.facts = _facts(self.folder)
        try:
            self.rows, self._shard_rows = int(self.facts["rows"]), int(self.facts["shard_rows"])
        except KeyError as error:
            raise BadInput("folder", str(folder), f"holds no {kind}", "capture one elsewhere") from error
        paths = [self.folder / _name(stem, i) for i in range(-(-self.rows // self._shard_rows))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            remedy = "run the capture again: it goes on"
            raise CorruptFile("folder", str(folder), f"lacks {missing[0]}", remedy)
        self.nbytes = sum(path.stat().st_size for path in paths)
        self._open: list[Any] = []
        self._starts: list[list[int]] = []
        for path in paths:
            try:
                self._open.append(safe_open(str(path), framework="pt"))
                self._starts.append(self._open[-1].get_tensor("starts").tolist())
            except (SafetensorError, OSError) as error:
                remedy = f"remove {path.name} and run the capture again"
                raise CorruptFile("folder", str(path), f"is not readable ({error})", remedy) from error
        self.entries = sum(starts[-1] for starts in self._starts)

    def row(self, index: int, *names: str) -> tuple[Tensor, ...]:
        """The entries of a row in the tensors `names`.

        Raises:
            BadInput: there is no such row.
        """
        if not 0 <= index < self.rows:
            raise BadInput("row", index, "is not in the store", f"use 0 to {self.rows - 1}")
        number, place = divmod(index, self._shard_rows)
        piece = slice(*self._starts[number][place : place + 2])
        return tuple(self._open[number].get_slice(name)[piece] for name in names)

    def whole(self, name: str) -> Tensor:
        """A tensor over all shards."""
        return torch.cat([stream.get_tensor(name) for stream in self._open])

    @staticmethod
    def fill(
        folder: str | os.PathLike[str],
        facts: Mapping[str, Any],
        make: Shard,
        *,
        stem: str,
        on_shard: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make the shards that are missing.

        Args:
            folder: Where the store goes.
            facts: What it is of, to be written as JSON; `rows` and `shard_rows` among them.
            make: Makes a shard.
            stem: Of the shards' names.
            on_shard: Called with the number of rows done and in all.

        Raises:
            BadInput: the folder cannot be written, or holds a store of other facts.
            CorruptFile: its index cannot be read, so that nobody knows what its shards are of.
        """
        target = check_writable(folder, "folder")
        target.mkdir(parents=True, exist_ok=True)
        index = target / _INDEX
        written = json.dumps(facts, indent=1)
        wanted = json.loads(written)
        if index.is_file() and {**wanted, **_facts(target)} != wanted:  # an older index may say less
            raise BadInput("folder", str(folder), "holds a store of other data or settings", "choose another")
        atomic_write(index, written + "\n")
        rows, shard_rows = facts["rows"], facts["shard_rows"]
        for first in range(0, rows, shard_rows):
            path, last = target / _name(stem, first // shard_rows), min(first + shard_rows, rows)
            if not path.is_file():
                write_tensors(path, make(first, last))
            if on_shard is not None:
                on_shard(last, rows)


def _facts(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no mapping")
        return found
    except ValueError as error:
        problem, remedy = f"has an unreadable {_INDEX}", "remove the folder and capture again"
        raise CorruptFile("folder", str(folder), problem, remedy) from error


def _name(stem: str, number: int) -> str:
    return f"{stem}-{number:05d}.safetensors"
