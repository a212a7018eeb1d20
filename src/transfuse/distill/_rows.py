"""Rows on their way into a batch: their numbers, and the columns that an objective reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Collator", "Numbered"]


class Numbered(torch.utils.data.Dataset):
    """A data set whose rows know their number."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "row": index}


class Collator:
    """Keeps row numbers and an objective's columns, which a tokenizer's collator drops.

    A column with one value per token is put where `attention_mask` says that the row's tokens are, 0 elsewhere;
    other columns of unequal lengths, and those of batches without a mask, are padded on the right.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], columns: Sequence[str]):
        self.collate, self.columns = collate, columns

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = dict(self.collate(rows))
        if not isinstance(rows[0], Mapping):  # texts: all there is comes from the collator
            return batch
        if "row" in rows[0]:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        for name in self.columns:
            if name in rows[0] and name not in batch:
                values = [torch.as_tensor(row[name]) for row in rows]
                ragged = values[0].dim() > 0
                batch[name] = _placed(values, batch.get("attention_mask")) if ragged else torch.stack(values)
        return batch


def _placed(values: list[Tensor], mask: Any) -> Tensor:
    """Rows of unequal lengths as one tensor: at the places that the mask counts, if these are as many."""
    lengths = [len(row) for row in values]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.bool().sum(-1).tolist() != lengths:
        return nn.utils.rnn.pad_sequence(values, batch_first=True)
    found = values[0].new_zeros(*mask.shape, *values[0].shape[1:])
    found[mask.bool()] = torch.cat(values)
    return found
