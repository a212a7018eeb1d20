"""A long document cut down to the chunks that bear on a question, by vectors or by words."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from transfuse.core.data import Document
from transfuse.core.errors import BadInput
from transfuse.core.models import load_encoder
from transfuse.core.retrieval import BM25, VectorIndex

__all__ = ["BM25ChunkRetriever", "Chunk", "ChunkRetriever"]

LEAST_TOKENS, SHARE = 4096, 24  # the short context holds max(4096, |C| / 24) tokens


class Chunk(NamedTuple):
    """A piece of a document.

    Attributes:
        text: As it stands in the document.
        number: Its place among the document's chunks, from 0.
        tokens: Its length in tokens of the reading model.
        score: How near it is to the question; larger is nearer.
    """

    text: str
    number: int
    tokens: int
    score: float


class ChunkRetriever:
    """Keeps the chunks of a document whose sentence vectors are nearest to the question.

    The best chunks by cosine similarity are kept, as many as fit `max_tokens`; those below `threshold` are
    left out. Chunks are given back in the document's order. An encoder that reads fewer tokens than a chunk
    has (MiniLM reads 256) is given the chunk in parts, and the nearest part counts.

    The index of the last document is kept for the next question about it.

    Args:
        encoder: A sentence encoder's name or folder, or an object with `encode(list of texts) -> [n, width]`.
        chunk_tokens: Tokens per chunk, of the reading model's tokenizer.
        threshold: Least cosine similarity of a chunk that is kept.
        max_tokens: Most tokens kept in all, but always one chunk; None: max(4096, a 24th of the document).
    """

    def __init__(
        self,
        encoder: Any = "minilm",
        chunk_tokens: int = 512,
        threshold: float = 0.3,
        *,
        max_tokens: int | None = None,
    ):
        self.encoder, self.chunk_tokens = encoder, chunk_tokens
        self.threshold, self.max_tokens = threshold, max_tokens
        self._loaded: tuple[Any, Any] | None = None
        self._last: tuple[Any, Any] | None = None

    def __call__(self, query: str, document: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The kept chunks as one text; a line break stands where something was left out between two.

        Arguments and errors as in `chunks`.
        """
        kept = self.chunks(query, document, tokenizer)
        text = kept[0].text
        for before, chunk in pairwise(kept):
            text += chunk.text if chunk.number == before.number + 1 else "\n" + chunk.text
        return text

    def chunks(self, query: str, document: str, tokenizer: PreTrainedTokenizerBase) -> list[Chunk]:
        """The chunks of `document` that are kept for `query`, in the document's order.

        Where no chunk reaches the threshold the best one is kept, with a warning.

        Raises:
            BadInput: an empty query or document, a length that is not one.
        """
        self.check()
        for name, text in (("query", query), ("document", document)):
            if not text.strip():
                raise BadInput(name, text, "is empty", "give some text")
        pieces, total = self._cut(document, tokenizer)
        scores = self._scores(query, tuple(text for text, _ in pieces))
        found = [Chunk(text, i, tokens, scores[i]) for i, (text, tokens) in enumerate(pieces)]
        ranked = sorted(found, key=lambda chunk: (-chunk.score, chunk.number))
        best = ranked[0]
        kept = [chunk for chunk in ranked if chunk.score >= self.threshold]
        if not kept:
            warnings.warn(
                f"no chunk reaches the threshold {self.threshold}: the best one is used, at {best.score:.3f}",
                stacklevel=2,
            )
            kept = [best]
        limit = max(LEAST_TOKENS, total / SHARE) if self.max_tokens is None else self.max_tokens
        kept = kept[: math.ceil(limit / self.chunk_tokens)]
        while len(kept) > 1 and sum(chunk.tokens for chunk in kept) > limit:
            kept.pop()
        return sorted(kept, key=lambda chunk: chunk.number)

    def check(self) -> None:
        """Refuse settings that keep nothing.

        Raises:
            BadInput: naming the setting.
        """
        for name in ("chunk_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(name, value, "is not a length", "give 1 token or more")
        if math.isnan(self.threshold):
            raise BadInput(
                "threshold", self.threshold, "is not a similarity", "give a number; the paper: 0.3"
            )

    def _cut(self, document: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[tuple[str, int]], int]:
        """Pieces (text, tokens) of `chunk_tokens` each, which joined are the document; and its tokens in all."""
        size = self.chunk_tokens
        options = {"add_special_tokens": False, "verbose": False}
        if not tokenizer.is_fast:
            ids = tokenizer(document, **options)["input_ids"]
            parts = [ids[start : start + size] for start in range(0, len(ids), size)]
            return [(tokenizer.decode(part), len(part)) for part in parts], len(ids)
        offsets = tokenizer(document, return_offsets_mapping=True, **options)["offset_mapping"]
        starts = list(range(0, len(offsets), size))
        places = [0, *(offsets[start][0] for start in starts[1:]), len(document)]
        return [
            (document[a:b], min(size, len(offsets) - start))
            for start, (a, b) in zip(starts, pairwise(places))
        ], len(offsets)

    def _scores(self, query: str, texts: tuple[str, ...]) -> list[float]:
        """Per chunk its nearest part's score."""
        if self._last is None or self._last[0] != (self._identity(), texts):
            parts = [
                Document(part, id=str(i))
                for i, text in enumerate(texts)
                for part in self._parts(text)
                if part.strip()
            ]
            self._last = (self._identity(), texts), self._index(parts)
        index = self._last[1]
        scores = [-math.inf] * len(texts)
        for document, score in index.search([query], len(index.documents))[0]:
            scores[int(document.id)] = max(scores[int(document.id)], score)
        return scores

    def _identity(self) -> Any:
        return self.encoder

    def _index(self, documents: Sequence[Document]) -> Any:
        return VectorIndex(documents, encoder=self._model())

    def _model(self) -> Any:
        if not isinstance(self.encoder, (str, os.PathLike)):
            return self.encoder
        if self._loaded is None or self._loaded[0] != self.encoder:
            self._loaded = self.encoder, load_encoder(self.encoder)
        return self._loaded[1]

    def _parts(self, text: str) -> list[str]:
        """Texts of as many words each that the encoder can read whole."""
        model = self._model()
        limit, tokenizer = getattr(model, "max_seq_length", None), getattr(model, "tokenizer", None)
        if not limit or tokenizer is None:
            return [text]
        tokens = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
        if tokens <= limit:
            return [text]
        words = text.split()
        size = math.ceil(len(words) / math.ceil(1.2 * tokens / limit))  # words differ in tokens: some room
        return [" ".join(words[start : start + size]) for start in range(0, len(words), size)]


class BM25ChunkRetriever(ChunkRetriever):
    """Keeps the chunks of a document that share words with the question (BM25). Needs no encoder.

    Args:
        chunk_tokens: Tokens per chunk, of the reading model's tokenizer.
        threshold: Least BM25 score of a chunk that is kept; chunks without a common word never are.
        max_tokens: Most tokens kept in all, but always one chunk; None: max(4096, a 24th of the document).
        stopwords: Language code of the words that do not count, or None.
    """

    def __init__(
        self,
        chunk_tokens: int = 512,
        threshold: float = 0.0,
        *,
        max_tokens: int | None = None,
        stopwords: str | None = "en",
    ):
        super().__init__(None, chunk_tokens, threshold, max_tokens=max_tokens)
        self.stopwords = stopwords

    def _scores(self, query: str, texts: tuple[str, ...]) -> list[float]:
        return [score if score > 0 else -math.inf for score in super()._scores(query, texts)]

    def _identity(self) -> Any:
        return self.stopwords

    def _index(self, documents: Sequence[Document]) -> Any:
        return BM25(documents, stopwords=self.stopwords)

    def _parts(self, text: str) -> list[str]:
        return [text]
