"""Training examples: (prompt, target) pairs to token ids and labels, padding, a repeatable order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .data import read_rows
from .errors import BadInput
from .files import hash_state
from .generate import encode_pair, pad_batch, pad_id_of
from .runs import check_positive

__all__ = [
    "IGNORED",
    "EpochOrder",
    "data_identity",
    "encode_examples",
    "minibatches",
    "own_generators",
    "pad_collator",
    "target_logits",
    "target_loss",
    "text_rows",
    "text_split",
]

IGNORED = -100
"""Label of a position that takes no part in the loss (the convention of `torch` and `transformers`)."""


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    loss_on: Literal["target", "all"] = "target",
    max_length: int | None = None,
    truncate: bool = False,
    end: bool = False,
) -> list[dict[str, list[int]]]:
    """Token ids and labels for causal-language-model training.

    Prompt and target meet as in `core.generate.encode_pair`: one space between them, which belongs to the
    target. An empty prompt is allowed and gives plain text. Labels are aligned with the ids (models shift
    them themselves).

    Args:
        tokenizer: The model's tokenizer.
        pairs: (prompt, target) texts.
        loss_on: `"target"` masks the prompt with -100; `"all"` learns prompt and target.
        max_length: Longest sequence allowed, in tokens; None for no limit.
        truncate: Shorten the *beginning* of what is too long instead of refusing it. The target is never cut.
        end: Append the end-of-text token to the target, so that the model also learns to stop.

    Returns:
        One dict per pair: `input_ids` and `labels`, int lists of equal length.

    Raises:
        BadInput: an empty target; a sequence beyond `max_length`; `end` without an end-of-text token.
    """
    if loss_on not in ("target", "all"):
        raise BadInput("loss_on", loss_on, "is not known", 'use "target" or "all"')
    if end and tokenizer.eos_token_id is None:
        raise BadInput(
            "end", end, "needs a tokenizer with an end-of-text token", "set eos_token or end=False"
        )
    examples = []
    for index, (prompt, target) in enumerate(pairs):
        before, after = encode_pair(tokenizer, prompt, target)
        if end:
            after = [*after, tokenizer.eos_token_id]
        excess = 0 if max_length is None else len(before) + len(after) - max_length
        if excess > 0:
            if not truncate or excess > len(before):
                remedy = "shorten it or raise max_length" if truncate else "shorten it or pass truncate=True"
                shown = f"{len(before) + len(after)} tokens"
                raise BadInput(f"pairs[{index}]", shown, f"exceeds max_length = {max_length}", remedy)
            before = before[excess:]
        masked = [IGNORED] * len(before) if loss_on == "target" else before
        examples.append({"input_ids": before + after, "labels": [*masked, *after]})
    return examples


def text_rows(
    tokenizer: Any, source: str | os.PathLike[str], block: int, argument: str = "texts"
) -> list[dict[str, list[int]]]:
    """Training rows from a file.

    Args:
        tokenizer: The tokenizer of the model that learns.
        source: Plain text (`.txt`), cut into blocks; or records (`.jsonl`, `.json`, `.parquet`) with `text`, each cut
            into blocks, or with `prompt` and `target`, of which the target is learnt.
        block: Tokens per block; the end of a text that fills less than an eighth of a block is left out.
        argument: How messages call the source.

    Raises:
        BadInput: no such file, another ending, no UTF-8, a record without these fields, or no row at all.
    """
    path = Path(source)
    check_positive(block=block)
    if path.suffix in (".txt", ".md"):
        try:
            texts = [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                argument, str(path), f"cannot be read ({error})", "give a text in UTF-8"
            ) from error
        pairs: list[tuple[str, str]] = []
    else:
        texts, pairs = [], []
        for place, row in read_rows(path, argument):
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                texts.append(row["text"])
            elif isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "target")):
                pairs.append((row["prompt"], row["target"]))
            else:
                raise BadInput(place, row, "has neither text nor prompt and target", "add the field")
    rows = encode_examples(tokenizer, pairs, max_length=block, truncate=True, end=True) if pairs else []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), block):
            piece = ids[start : start + block]
            if len(piece) >= max(2, block // 8):
                rows.append({"input_ids": piece, "labels": piece})
    if not rows:
        raise BadInput(argument, str(source), f"gives no row of {block} tokens", "give longer texts")
    return rows


def text_split(
    tokenizer: Any, texts: Path, held_out: Path | None, block: int, limit: int
) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Rows to learn from and at most `limit` to measure on, see `text_rows`.

    Without a file of their own, the latter are the last twentieth of the rows, which is then not learnt.

    Raises:
        BadInput: as `text_rows`; too little text to hold any out.
    """
    rows = text_rows(tokenizer, texts, block)
    if held_out is not None:
        return rows, text_rows(tokenizer, held_out, block, "held_out")[:limit]
    cut = max(1, len(rows) // 20)
    if len(rows) <= cut:
        raise BadInput("texts", cut, "row is too little to hold any out", "give more text, or held_out")
    return rows[:-cut], rows[-cut:][:limit]


def pad_collator(
    tokenizer: PreTrainedTokenizerBase | int,
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """A collator that pads on the right to the longest row of the batch.

    Rows carry `input_ids` and, optionally, `labels`: a list or 1-d tensor per row (padded with -100) or one class
    number. Other fields are left out.
    The result holds int64 tensors `input_ids`, `attention_mask` and `labels` `[B, T]` (class numbers: `[B]`).

    Args:
        tokenizer: The tokenizer whose padding token fills up, or that token's id.
    """
    pad = tokenizer if isinstance(tokenizer, int) else pad_id_of(tokenizer)

    def listed(value: Any) -> Any:
        return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids, mask = pad_batch([listed(row["input_ids"]) for row in rows], pad)
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in rows[0]:
            labels = [listed(row["labels"]) for row in rows]
            whole = isinstance(labels[0], (list, tuple))
            batch["labels"] = pad_batch(labels, IGNORED)[0] if whole else torch.tensor(labels)
        return batch

    return collate


def target_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a causal language model where the targets are, for batches whose targets come last.

    Tokens are moved to the right-hand side first, so that the columns holding targets are few, and the head is
    applied to those only. With short answers after longer prompts this saves most of its time and memory.

    Args:
        model: A causal language model or a PEFT model around one.
        batch: `input_ids`, `attention_mask`, `labels`, int64 `[B, T]`, padded on either side.

    Returns:
        `(logits float32 [B, n, V], labels int64 [B, n])`, aligned: logits at j predict label j; -100 where there
        is nothing to predict.
    """
    mask = batch["attention_mask"]
    width = mask.shape[1]
    moved = mask.argsort(dim=1, stable=True)  # [B, T]: where each column comes from
    ids, labels = batch["input_ids"].gather(1, moved), batch["labels"].gather(1, moved)
    mask = mask.gather(1, moved)
    labels = labels.masked_fill(mask.cumsum(1) <= 1, IGNORED)  # nothing predicts a row's first token
    labelled = (labels != IGNORED).any(0).nonzero()
    first = int(labelled[0]) if len(labelled) else width
    # Columns are chosen by a tensor, not a slice: a strided slice makes the head a batch of small products.
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        logits_to_keep=torch.arange(first - 1, width - 1, device=mask.device),
        use_cache=False,
    ).logits
    return logits.float(), labels[:, first:]


def target_loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy on the labelled tokens, in nats: the model's own loss, by way of `target_logits`.

    Returns:
        Scalar float32, the mean over labelled tokens.
    """
    logits, labels = target_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def data_identity(dataset: Any) -> str:
    """A text that differs when the data do: a `datasets.Dataset`'s fingerprint, or a hash of every row."""
    fingerprint = getattr(dataset, "_fingerprint", None)
    if fingerprint is not None:
        return str(fingerprint)
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        digest.update(repr(_described(dataset[i])).encode())
    return f"{len(dataset)}:{digest.hexdigest()}"


def _described(value: Any) -> Any:
    """What `repr` tells in full: tensors and arrays print a few digits of a few entries only."""
    if isinstance(value, Mapping):
        return {key: _described(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)) and not all(type(item) in (int, str) for item in value):
        return [_described(item) for item in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), hash_state({"": value})
    if isinstance(value, np.ndarray):
        content = value.tolist() if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()
        return str(value.dtype), value.shape, content
    return value


class EpochOrder(torch.utils.data.Sampler[int]):
    """A shuffled order that depends on `seed` and the epoch alone: a resumed run sees the same batches.

    Args:
        count: Number of examples.
        seed: Seed of the order. The global random state is neither read nor changed.
        lengths: Length of each example. When given, examples of like length share a batch (within windows of
            50 batches of the shuffled order, and the batches are shuffled again), which saves padding.
        batch_size: Examples per batch; matters with `lengths` only.
    """

    def __init__(self, count: int, *, seed: int, lengths: Sequence[int] | None = None, batch_size: int = 1):
        self.count, self.seed, self.lengths, self.batch_size = count, seed, lengths, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order `iter` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(self.count).tolist()
        if self.lengths is None:
            return iter(order)
        window = 50 * self.batch_size
        batches: list[list[int]] = []
        short: list[list[int]] = []
        for start in range(0, self.count, window):
            rows = sorted(order[start : start + window], key=self.lengths.__getitem__)
            for i in range(0, len(rows), self.batch_size):
                batch = rows[i : i + self.batch_size]
                (batches if len(batch) == self.batch_size else short).append(batch)
        mixed = [batches[i] for i in random.permutation(len(batches)).tolist()]
        return iter([i for batch in (*mixed, *short) for i in batch])  # a short batch stays last


def own_generators(batches: Any) -> list[torch.Generator]:
    """The random generators that a `DataLoader` or its sampler draws its order from, other than the global one."""
    parts = [batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)]
    parts.append(getattr(parts[-1], "sampler", None))
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def minibatches(
    columns: Mapping[str, torch.Tensor], batch_size: int, *, seed: int, drop_last: bool = False
) -> Callable[[int], Iterator[dict[str, torch.Tensor]]]:
    """Shuffled batches of a data set held in tensors, as `core.training.loop` takes them.

    Args:
        columns: Tensors of one length, cut along their first axis.
        batch_size: Rows per batch.
        seed: With the epoch's number, decides the order; the global random state is left alone.
        drop_last: Leave out a last batch that is short. Otherwise one of a single row, which batch norms cannot read,
            is joined to the batch before it.

    Returns:
        A function from the number of an epoch to its batches.

    Raises:
        BadInput: no rows (or fewer than one batch, with `drop_last`), or columns of unequal length.
    """
    sizes = {name: len(column) for name, column in columns.items()}
    count = next(iter(sizes.values()), 0)
    if len(set(sizes.values())) > 1:
        raise BadInput("columns", sizes, "differ in length", "give one row per example to each")
    if count < (batch_size if drop_last else 1):
        raise BadInput("columns", count, f"rows are less than one batch of {batch_size}", "give more rows")

    def epoch(number: int) -> Iterator[dict[str, torch.Tensor]]:
        order = EpochOrder(count, seed=seed)
        order.set_epoch(number)
        chosen = torch.tensor(list(order))
        parts = list(chosen.split(batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1 < batch_size and not drop_last:
            parts[-2:] = [torch.cat(parts[-2:])]
        for rows in parts:
            if len(rows) >= batch_size or not drop_last:
                yield {name: column[rows] for name, column in columns.items()}

    return epoch
