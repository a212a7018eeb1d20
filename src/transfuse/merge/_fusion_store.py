"""What a source says about the training texts, captured once: top-k probabilities and the cross-entropy per sequence.

A capture that was interrupted goes on with the first missing file. A row holds what is said before each of its
predicted tokens, already in the target's tokens and vocabulary, as float16 probabilities; what they lack to 1 need not
be kept.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import IGNORED, data_identity, pad_collator, text_rows
from ..core.errors import BadInput, IncompatibleModels
from ..core.files import hash_state
from ..core.fused import head_of
from ..core.generate import check_length, pad_id_of
from ..core.rowstore import RowStore
from ..core.runs import check_number, check_positive, evaluating
from ..core.tokens import encode, locate
from ._fusion import Distributions, Rest
from ._fusion_align import Alignment, Fallback, VocabularyMap, align_distributions, same_vocabulary

__all__ = ["Reading", "SourceStore", "gathered", "rows_of"]

_STEM = "source"
_SMALL = 2**16
_ROWS = 512  # tokens whose logits are looked at together


class Reading:
    """Runs a language model, up to its head where the logits can be made a chunk at a time.

    Args:
        model: Of transformers, PEFT, or any module that returns logits `[B, L, V]`.

    Attributes:
        head: The model's head, or None: then the call returns logits.
    """

    def __init__(self, model: Any):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.head = model, head_of(inner)
        self.body: Any = model if self.head is None else inner.base_model
        self._accepted = frozenset(inspect.signature(type(self.body).forward).parameters)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.head.vocabulary if self.head is not None else int(self.model.config.vocab_size)

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """States `[B, L, D]`, or logits where there is no head."""
        device = next(self.model.parameters()).device
        mask = batch["attention_mask"]
        if hasattr(self.model.config, "get_text_config"):
            check_length(self.model, mask.shape[1], "rows")
        given = {
            "input_ids": batch["input_ids"], "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        }  # fmt: skip
        inputs: dict[str, Any] = {n: v.to(device) for n, v in given.items() if n in self._accepted}
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        output = self.body(**inputs)
        if self.head is not None:
            states: Tensor = output.last_hidden_state
            return states
        return output if isinstance(output, Tensor) else output.logits


class SourceStore:
    """A source's stored top k and cross-entropies for the rows of one data set.

    Args:
        folder: What `capture` wrote.

    Attributes:
        k: Most entries per token.
        vocabulary: The target's V.
        rows: Rows of the data set.
        aligned: Share of the predicted tokens that the source spoke about; the others are one-hot.

    Raises:
        BadInput: there is no store in the folder.
        CorruptFile: it is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._store = RowStore(folder, kind="source store", stem=_STEM)
        self.folder, self.rows = self._store.folder, self._store.rows
        self.k: int = self._store.facts["k"]
        self.vocabulary: int = self._store.facts["vocabulary"]
        self.ce = self._store.whole("ce")
        known = self._store.whole("aligned")
        self.aligned = float(known.float().mean()) if len(known) else 1.0

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids int64 and probabilities float32, `[n, k]`, before row `index`'s n predicted tokens; 0 is no entry."""
        ids, probs = self._store.row(index, "ids", "probs")
        return ids.to(torch.int64), probs.to(torch.float32)

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        dataset: Sequence[Mapping[str, Any]],
        folder: str | os.PathLike[str],
        *,
        vocabulary: int | None = None,
        tokenizer: Any = None,
        target_tokenizer: Any = None,
        k: int = 64,
        temperature: float = 1.0,
        alignment: Alignment = "bytes",
        fallback: Fallback = "next",
        vocab_map: VocabularyMap | Sequence[int] | None = None,
        batch_size: int = 8,
        shard_rows: int = 256,
    ) -> SourceStore:
        """Run a source over the data once.

        Args:
            model: A causal language model; in evaluation mode and without gradients for the duration.
            dataset: Rows of the target's tokens, `input_ids` and `labels`; tokens labelled -100 are not stored.
            folder: Where the store goes; what an interrupted capture left there is kept.
            vocabulary: The target's V; the source's own by default.
            tokenizer: The source's. Where it numbers other tokens than the target's, rows are decoded, read by the
                source in its own tokens, and brought back by `align_distributions`; its cross-entropy is a mean over
                its own tokens.
            target_tokenizer: Made the rows.
            k: Most entries per token.
            temperature: Divides the source's logits (not in its cross-entropy).
            alignment: See `align_distributions`.
            fallback: See there.
            vocab_map: See there; a `VocabularyMap` of the two tokenizers by default.
            batch_size: Rows per forward pass.
            shard_rows: Rows per file.

        Returns:
            The store, opened.

        Raises:
            BadInput: an argument out of range, no rows, or a folder that holds a store of other data or settings.
            IncompatibleModels: vocabularies that differ, and no tokenizers to map them by.
        """
        reading = Reading(model)
        width = reading.vocabulary if vocabulary is None else vocabulary
        other = tokenizer is not None and target_tokenizer is not None
        other = other and not same_vocabulary(tokenizer, target_tokenizer)
        if reading.vocabulary != width and (tokenizer is None or target_tokenizer is None):
            problem = f"entries of vocabulary, the target has {width}"
            remedy = "pass tokenizer and target_tokenizer: by them it is mapped"
            raise IncompatibleModels("source", reading.vocabulary, problem, remedy)
        check_positive(k=k)
        check_number("temperature", temperature, remedy="give 1 for the source's own")
        if len(dataset) == 0:
            raise BadInput("dataset", "[]", "has no rows", "give at least one row")
        k = min(k, reading.vocabulary, width)
        facts = {
            "k": k, "vocabulary": width, "rows": len(dataset), "data": data_identity(dataset), "shard_rows": shard_rows,
            "temperature": temperature, "other_tokenizer": [alignment, fallback] if other else None,
            "source": hash_state(model.state_dict()),
        }  # fmt: skip
        capture = _Capture(reading, width, k, temperature, batch_size)
        if other:
            mapped = VocabularyMap(tokenizer, target_tokenizer) if vocab_map is None else vocab_map
            capture.bring(tokenizer, target_tokenizer, mapped, {"alignment": alignment, "fallback": fallback})
        with evaluating(model), torch.no_grad():
            RowStore.fill(
                folder,
                facts,
                lambda first, last: capture([dataset[i] for i in range(first, last)]),
                stem=_STEM,
            )
        return cls(folder)


def gathered(
    stores: Sequence[SourceStore], batch: Mapping[str, Tensor], rest: Rest = "spread"
) -> tuple[Distributions, Tensor]:
    """What all sources say on a batch with `labels` `[B, L]` and `row` `[B]`, and their cross-entropies `[B, N]`.

    Raises:
        BadInput: a row predicts another number of tokens than when it was captured.
    """
    where = (batch["labels"][:, 1:] != IGNORED).cpu()
    rows = batch["row"].tolist()
    shape = (*where.shape, len(stores), max(store.k for store in stores))
    ids, probs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    wanted = where.sum(1).tolist()
    for n, store in enumerate(stores):
        found = [store.row(index) for index in rows]
        for index, count, (theirs, _) in zip(rows, wanted, found, strict=True):
            if len(theirs) != count:
                problem = f"predicts {count} tokens, {len(theirs)} are stored"
                raise BadInput(f"row {index}", count, problem, "capture the data set as it is trained on")
        ids[:, :, n, : store.k][where] = torch.cat([each for each, _ in found])
        probs[:, :, n, : store.k][where] = torch.cat([each for _, each in found])
    ce = torch.stack([store.ce[batch["row"].cpu()] for store in stores], -1)
    return Distributions.top_k(ids, probs, stores[0].vocabulary, rest), ce


class _Capture:
    """A shard's tensors from its rows."""

    def __init__(self, reading: Reading, width: int, k: int, temperature: float, batch_size: int):
        self.reading, self.width, self.k = reading, width, k
        self.temperature, self.batch_size = temperature, batch_size
        self.tokenizers: tuple[Any, Any] | None = None

    def bring(self, source: Any, target: Any, vocab_map: Any, options: Mapping[str, Any]) -> None:
        """Read the rows' texts in the source's tokens."""
        self.tokenizers, self.vocab_map, self.options = (source, target), vocab_map, options

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        parts: list[tuple[Tensor, Tensor, Tensor, float]] = []
        for at in range(0, len(rows), self.batch_size):
            few = list(rows[at : at + self.batch_size])
            parts += self._same(few) if self.tokenizers is None else self._other(few, *self.tokenizers)
        ids, probs, known, ce = zip(*parts, strict=True)
        starts = torch.tensor([0, *(len(part) for part in ids)]).cumsum(0)
        kind = torch.uint16 if self.width <= _SMALL else torch.int32
        return {
            "ids": torch.cat(ids).to(kind), "probs": torch.cat(probs).half(), "aligned": torch.cat(known),
            "ce": torch.tensor(ce, dtype=torch.float32), "starts": starts,
        }  # fmt: skip

    def _top(self, states: Tensor, gold: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and log-probabilities of the k likeliest, and -log p of the gold token, for states `[n, ...]`."""
        found: list[tuple[Tensor, ...]] = []
        for piece, wanted in zip(states.split(_ROWS), gold.split(_ROWS), strict=True):
            logits = piece.float() if self.reading.head is None else self.reading.head(piece)
            logits = logits[:, :width]  # beyond it: rows that fill up a vocabulary
            nll = nn.functional.cross_entropy(logits, wanted, reduction="none")
            top = torch.log_softmax(logits / self.temperature, -1).topk(min(self.k, logits.shape[-1]), dim=-1)
            found.append((top.indices.cpu(), top.values.cpu(), nll.cpu()))
        ids, values, nll = (torch.cat(part) for part in zip(*found, strict=True))
        return ids, values, nll

    def _same(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        batch = pad_collator(0)(rows)
        states = self.reading(batch)
        keep = batch["labels"][:, 1:] != IGNORED
        where = tuple(index.to(states.device) for index in keep.nonzero(as_tuple=True))
        gold = batch["labels"][:, 1:][keep].to(states.device)
        counts = keep.sum(1).tolist()
        parts = [part.split(counts) for part in self._top(states[where], gold, self.width)]
        return [
            (ids, values.exp(), torch.ones(len(ids), dtype=torch.bool), _mean(nll))
            for ids, values, nll in zip(*parts, strict=True)
        ]

    def _other(
        self, rows: Sequence[Mapping[str, Any]], source: Any, target: Any
    ) -> list[tuple[Tensor, Tensor, Tensor, float]]:
        texts = [
            str(target.decode(row["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for row in rows
        ]
        encoded = encode(source, texts)
        for text, (ids, _) in zip(texts, encoded, strict=True):
            if not ids:
                raise BadInput("dataset", text, "has no text for the source to read", "leave such rows out")
        batch = pad_collator(pad_id_of(source))([{"input_ids": ids} for ids, _ in encoded])
        states = self.reading(batch)
        found = []
        for i, (row, text, (ids, spans)) in enumerate(zip(rows, texts, encoded, strict=True)):
            gold = torch.tensor([*ids[1:], ids[-1]], device=states.device)
            top_ids, values, nll = self._top(states[i, : len(ids)], gold, self.reading.vocabulary)
            said = align_distributions(
                source,
                target,
                (ids, row["input_ids"]),
                (top_ids, values),
                self.vocab_map,
                text=text,
                **self.options,
            )
            keep = torch.tensor(row["labels"][1:]) != IGNORED
            begin = _first_byte(target, row, text)
            counted = torch.tensor([int(start) >= begin for start, _ in spans[1:]], dtype=torch.bool)
            probs = said.log_probs[:-1][keep].exp() * (said.ids[:-1][keep] < self.width)
            found.append((said.ids[:-1][keep], probs, said.aligned[:-1][keep], _mean(nll[:-1][counted])))
        return found


def _first_byte(tokenizer: Any, row: Mapping[str, Any], text: str) -> int:
    """Where the predicted part of a row begins in its text; 0 where that cannot be told."""
    try:
        spans = locate(tokenizer, row["input_ids"], text)
    except BadInput:
        return 0
    labelled = [
        int(start) for (start, _), label in zip(spans, row["labels"], strict=True) if label != IGNORED
    ]
    return min(labelled, default=0)


def _mean(nll: Tensor) -> float:
    return float(nll.double().mean()) if len(nll) else 0.0


def rows_of(texts: Any, tokenizer: Any, block: int) -> list[Any]:
    """Rows with `input_ids` and `labels`.

    Args:
        texts: A file, as `core.batches.text_rows` reads it; texts; or such rows.
        tokenizer: For texts.
        block: Tokens per row, at most.

    Raises:
        BadInput: something else, or no row.
    """
    if isinstance(texts, (str, os.PathLike)):
        return text_rows(tokenizer, texts, block)
    rows: list[Any] = []
    for i, text in enumerate(texts):
        if isinstance(text, str):
            ids = tokenizer(text, verbose=False)["input_ids"]
            pieces = [ids[at : at + block] for at in range(0, len(ids), block)]
            rows += [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]
        elif isinstance(text, Mapping) and {"input_ids", "labels"} <= set(text):
            rows.append({name: list(text[name]) for name in ("input_ids", "labels")})
        else:
            raise BadInput(f"texts[{i}]", text, "is no text and no row", "give texts, or ids and labels")
    if not rows:
        raise BadInput("texts", "[]", "hold no row", "give longer texts")
    return rows
