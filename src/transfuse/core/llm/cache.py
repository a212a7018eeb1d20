"""Answers kept on disk."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from ..files import atomic_write, check_writable, sha256_json
from .backend import Backend, Completion, Options, Row

__all__ = ["cached"]

_FLUSH = 64  # answers fetched between two writes: what an interruption can lose


class _Cached(Backend):
    def __init__(self, backend: Backend, folder: Path) -> None:
        super().__init__()
        self.backend, self.folder = backend, folder
        self.ranks, self.takes_top_k = backend.ranks, backend.takes_top_k

    @property
    def identity(self) -> str:
        return self.backend.identity

    def _answer(self, rows: list[Row], options: Options) -> list[Completion]:
        shared = {
            "backend": self.identity,
            **asdict(options),
            "schema": None if options.schema is None else json.dumps(options.schema),  # its order matters
        }
        if not options.top:
            del shared["top"]  # answers have no such field: their names are older than it
        if options.top_k is None:
            del shared["top_k"]  # likewise
        files = []
        for row in rows:
            key = sha256_json({**shared, "messages": row.messages, "draw": row.draw})
            files.append(self.folder / key[:2] / f"{key}.json")
        found = [_stored(file) for file in files]
        missing = [i for i, completion in enumerate(found) if completion is None]
        for start in range(0, len(missing), _FLUSH):
            chosen = missing[start : start + _FLUSH]
            fresh = self.backend._answer([rows[i] for i in chosen], options)
            self.backend.usage.add(fresh)
            for i, completion in zip(chosen, fresh, strict=True):
                record = {"messages": rows[i].messages, **asdict(completion)}
                atomic_write(files[i], json.dumps(record, ensure_ascii=False, indent=1))
                found[i] = completion
        return [completion for completion in found if completion is not None]


def _stored(file: Path) -> Completion | None:
    """The answer in a cache file; None where there is none, or none that can be read."""
    try:
        record = json.loads(file.read_bytes())
        record.pop("messages")
        record["top"] = tuple((str(token), float(value)) for token, value in record.get("top", ()))
        return replace(Completion(**record), cached=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def cached(backend: Backend, folder: str | os.PathLike[str]) -> Backend:
    """`backend` with its answers kept in `folder`, one JSON file each, named by backend and request.

    A request made before is read, not asked again; sampled answers too: draw others with another `seed`.
    Answers are written as they come in: an interrupted call loses at most a few dozen. `usage` of the result
    counts answers from the cache apart.

    Raises:
        BadInput: the folder cannot be written.
    """
    return _Cached(backend, check_writable(folder, "folder"))
