"""A teacher on disk: the top-k of its next-token distributions, captured once and read by memory map.

A capture that was interrupted goes on with the first missing file. Ids take two bytes where the vocabulary allows it
and log-probabilities two (float16): k = 64 costs 256 bytes per token at V <= 65,536.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.batches import IGNORED, data_identity, pad_collator
from ..core.errors import BadInput
from ..core.rowstore import RowStore
from ._base import Reader, Signal, frozen

__all__ = ["LogitStore"]

_STEM = "top"
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
        self._store = RowStore(folder, kind="logit store", stem=_STEM)
        self.folder, self.rows, self.tokens = self._store.folder, self._store.rows, self._store.entries
        self.k: int = self._store.facts["k"]
        self.vocabulary: int = self._store.facts["vocabulary"]
        self.data: str = self._store.facts["data"]

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per stored token."""
        return self._store.nbytes / max(self.tokens, 1)

    def check_rows(self, dataset: Sequence[Any]) -> None:
        """Refuse a data set that is not the one of the store, as far as token ids tell. Older stores hold none.

        Raises:
            BadInput: another number of rows, other rows, or rows in another order.
        """
        remedy = "capture the data set that is trained on"
        if self.rows != len(dataset):
            raise BadInput("teacher", self.rows, f"rows are stored, the data has {len(dataset)}", remedy)
        stored: str | None = self._store.facts.get("ids")
        found = None if stored is None else _ids_of(dataset)
        if found is not None and found != stored:
            raise BadInput("teacher", str(self.folder), "is of other rows, or of another order", remedy)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids int64 `[n, k]` and log-probabilities float32 `[n, k]` of row `index`'s n predicted tokens."""
        ids, values = self._store.row(index, "ids", "log_probs")
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
        facts = {
            "k": k, "vocabulary": vocabulary, "rows": len(dataset), "data": data_identity(dataset),
            "shard_rows": shard_rows, "ids": _ids_of(dataset),
        }  # fmt: skip
        collate = collator or pad_collator(0)

        def make(first: int, last: int) -> dict[str, Tensor]:
            return _captured(reader, [dataset[i] for i in range(first, last)], k, batch_size, collate)

        with frozen(model):
            RowStore.fill(folder, facts, make, stem=_STEM, on_shard=on_shard)
        return cls(folder)


def _ids_of(dataset: Sequence[Any]) -> str | None:
    """A hash of all rows' token ids, in order; None where rows have none yet."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        row = dataset[i]
        if not isinstance(row, Mapping) or "input_ids" not in row:
            return None
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        digest.update(f"{ids.shape}".encode() + ids.tobytes())
    return digest.hexdigest()


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
