"""A teacher on disk: the top-k of its next-token distributions, captured once and read by memory map.

A folder of safetensors shards, one for every few hundred rows of the data set, each written at once; a capture
that was interrupted goes on with the first missing shard. Ids take two bytes where the vocabulary allows it and
log-probabilities two (float16): k = 64 costs 256 bytes per token at V <= 65,536.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.batches import IGNORED, data_identity, pad_collator
from ..core.errors import BadInput, CorruptFile
from ..core.files import atomic_write, check_writable, write_tensors
from ._base import Reader, Signal, frozen

__all__ = ["LogitStore"]

_INDEX = "index.json"
_SMALL = 2**16


class LogitStore:
    """Stored top-k log-probabilities of a teacher for the rows of one data set.

    Args:
        folder: What `capture` wrote.

    Attributes:
        k: Entries per token.
        vocabulary: The teacher's V.
        rows: Rows of the data set.
        tokens: Predicted tokens stored.

    Raises:
        BadInput: there is no store in the folder.
        CorruptFile: it is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / _INDEX).read_text())
        except OSError as error:
            raise BadInput(
                "folder", str(folder), "holds no logit store", "make one with LogitStore.capture"
            ) from error
        except ValueError as error:
            raise CorruptFile(
                "folder", str(folder), f"has an unreadable {_INDEX}", "capture again"
            ) from error
        self.k, self.vocabulary, self.rows = index["k"], index["vocabulary"], index["rows"]
        self.data: str = index["data"]
        self._shard_rows: int = index["shard_rows"]
        self._open: dict[int, Any] = {}
        self._starts: dict[int, list[int]] = {}
        missing = [path.name for path in self._shards() if not path.is_file()]
        if missing:
            raise CorruptFile(
                "folder", str(folder), f"lacks {missing[0]}", "run the capture again: it goes on"
            )
        self.tokens = sum(self._offsets(number)[-1] for number in range(len(self._shards())))

    def _shards(self) -> list[Path]:
        return [self.folder / _shard_name(i) for i in range(-(-self.rows // self._shard_rows))]

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per stored token."""
        return sum(path.stat().st_size for path in self._shards()) / max(self.tokens, 1)

    def _offsets(self, number: int) -> list[int]:
        if number not in self._open:
            stream = safe_open(str(self.folder / _shard_name(number)), framework="pt")
            self._open[number] = stream
            self._starts[number] = stream.get_tensor("starts").tolist()
        return self._starts[number]

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids int64 `[n, k]` and log-probabilities float32 `[n, k]` of row `index`'s n predicted tokens."""
        number, place = divmod(index, self._shard_rows)
        if not 0 <= index < self.rows:
            raise BadInput("row", index, "is not in the store", f"use 0 to {self.rows - 1}")
        starts = self._offsets(number)
        piece = slice(starts[place], starts[place + 1])
        ids, values = (self._open[number].get_slice(name)[piece] for name in ("ids", "log_probs"))
        return ids.to(torch.int64), values.to(torch.float32)

    def signal(self, batch: Mapping[str, Any]) -> Signal:
        """The stored teacher's word on a batch with `labels` `[B, T]` and `row` `[B]`, numbers of the data set.

        Raises:
            BadInput: a row predicts another number of tokens than when it was captured.
        """
        labels = batch["labels"]
        ids = torch.zeros(*labels.shape, self.k, dtype=torch.int64)
        values = torch.zeros(*labels.shape, self.k)
        where = labels[:, 1:] != IGNORED
        for i, index in enumerate(batch["row"].tolist()):
            found, log_probs = self.row(index)
            places = where[i].nonzero().squeeze(-1).cpu()
            if len(places) != len(found):
                problem = f"predicts {len(places)} tokens, {len(found)} are stored"
                raise BadInput(
                    f"row {index}", len(places), problem, "capture the data set as it is trained on"
                )
            ids[i, places], values[i, places] = found, log_probs
        return Signal(sparse=(ids.to(labels.device), values.to(labels.device)))

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        dataset: Sequence[Mapping[str, Any]],
        folder: str | os.PathLike[str],
        *,
        k: int = 64,
        batch_size: int = 8,
        shard_rows: int = 256,
        collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        on_shard: Callable[[int, int], None] | None = None,
    ) -> LogitStore:
        """Run the teacher over the data once and store its k likeliest next tokens.

        Args:
            model: A causal language model.
            dataset: Rows with `input_ids` and `labels`; tokens labelled -100 are not stored.
            folder: Where the store goes; what an interrupted capture left there is kept.
            k: Entries per token.
            batch_size: Rows per forward pass.
            shard_rows: Rows per file.
            collator: Makes a batch of rows; pads on the right by default.
            on_shard: Called with the number of rows done and in all.

        Returns:
            The store, opened.

        Raises:
            BadInput: k out of range, no rows, or a folder that holds a store of other data or another k.
        """
        reader = Reader(model)
        config: Any = model.config
        vocabulary = reader.head.vocabulary if reader.head is not None else int(config.vocab_size)
        if not 0 < k < vocabulary:
            raise BadInput("k", k, f"is not between 1 and V - 1 = {vocabulary - 1}", "store fewer entries")
        if len(dataset) == 0:
            raise BadInput("dataset", "[]", "has no rows", "give at least one row")
        target = check_writable(folder, "folder")
        target.mkdir(parents=True, exist_ok=True)
        facts = {
            "k": k, "vocabulary": vocabulary, "rows": len(dataset), "data": data_identity(dataset),
            "shard_rows": shard_rows,
        }  # fmt: skip
        if (target / _INDEX).is_file() and json.loads((target / _INDEX).read_text()) != facts:
            raise BadInput("folder", str(folder), "holds a store of other data or settings", "choose another")
        atomic_write(target / _INDEX, json.dumps(facts, indent=1) + "\n")
        collate = collator or pad_collator(0)
        with frozen(model):
            for first in range(0, len(dataset), shard_rows):
                path = target / _shard_name(first // shard_rows)
                last = min(first + shard_rows, len(dataset))
                if not path.is_file():
                    rows = [dataset[i] for i in range(first, last)]
                    write_tensors(path, _captured(reader, rows, k, batch_size, collate))
                if on_shard is not None:
                    on_shard(last, len(dataset))
        return cls(target)


def _shard_name(number: int) -> str:
    return f"top-{number:05d}.safetensors"


def _captured(
    reader: Reader, rows: Sequence[Mapping[str, Any]], k: int, batch_size: int, collate: Callable[..., Any]
) -> dict[str, Tensor]:
    """Ids, log-probabilities and row starts of a shard's rows."""
    device = next(reader.model.parameters()).device
    ids, values, starts = [], [], [0]
    for at in range(0, len(rows), batch_size):
        batch = {name: value.to(device) for name, value in collate(list(rows[at : at + batch_size])).items()}
        keep = batch["labels"][:, 1:] != IGNORED
        signal = reader(batch, grad=False)
        states = (signal.hidden if signal.hidden is not None else signal.whole())[:, :-1][keep]
        for piece in states.split(512):
            logits = piece.float() if signal.head is None else signal.head(piece)
            top = logits.topk(k, dim=-1)
            values.append((top.values - logits.logsumexp(-1, keepdim=True)).half().cpu())
            ids.append(top.indices.to(torch.uint16 if logits.shape[-1] <= _SMALL else torch.int32).cpu())
        starts += (starts[-1] + keep.sum(1).cumsum(0)).tolist()
    return {"ids": torch.cat(ids), "log_probs": torch.cat(values), "starts": torch.tensor(starts)}
