"""Finding documents for a question: BM25 in memory, and dense vectors in an embedded LanceDB store.

Both take `Document` records and answer `search(queries, k)` with the k best per query, best first; equal
scores keep the documents' order, so results do not change from run to run.
"""

from __future__ import annotations

import json
import numbers
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from .data import Document
from .errors import BadInput, CorruptFile
from .extras import require
from .files import atomic_write, check_writable, disk_guard, locked, sha256_json

__all__ = ["BM25", "Answer", "Hit", "Retriever", "VectorIndex", "passage_text"]

EXACT_BELOW = 50_000
"""Up to this many documents every vector is compared; above, LanceDB builds an inverted-file index."""

_TABLE = "documents"
_COLUMNS = ["row", "vector"]
_STORE_ERRORS = (ValueError, OSError, RuntimeError)  # what LanceDB raises for missing or damaged files
_PROBE = "The quick brown fox jumps over the lazy dog."


class Hit(NamedTuple):
    """A document found for a query, and its score (larger is better)."""

    document: Document
    score: float


@dataclass(frozen=True)
class Answer:
    """What a question-answering method returns.

    Attributes:
        text: The answer as generated.
        citations: The documents it rests on, best first.
        trace: JSON-able record of how it came about.
    """

    text: str
    citations: tuple[Hit, ...] = ()
    trace: dict[str, Any] = field(default_factory=dict)


class Retriever(Protocol):
    """Anything that finds documents."""

    documents: list[Document]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best documents of each query, best first."""
        ...


def _checked(documents: Sequence[Document]) -> list[Document]:
    found = list(documents)
    if not found:
        raise BadInput("documents", [], "is empty", "give at least one document")
    for i, document in enumerate(found):
        if not document.text.strip():
            raise BadInput(f"documents[{i}]: text", document.text, "is empty", "leave the document out")
    return found


def _check_query(queries: Sequence[str], k: int, available: int) -> list[str]:
    if isinstance(queries, str):
        raise BadInput("queries", queries, "is one text, not a list", "write [query]")
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1:
        raise BadInput("k", k, "is not a positive number", "ask for at least one document")
    if k > available:
        raise BadInput("k", k, f"exceeds the {available} documents of the index", f"use k <= {available}")
    for i, query in enumerate(queries):
        if not isinstance(query, str):
            raise BadInput(f"queries[{i}]", query, f"is {type(query).__name__}, not text", "give a string")
        if not query.strip():
            raise BadInput(f"queries[{i}]", query, "is empty", "give some text")
    return list(queries)


def passage_text(document: Document) -> str:
    """Title and text as one passage, the title on a line of its own."""
    return f"{document.title}\n{document.text}" if document.title else document.text


class BM25:
    """Okapi BM25 over titles and texts, in memory (bm25s; Lucene's variant of the weights).

    Words are lower-cased runs of word characters, single letters and digits included, accents composed (NFC); a
    query whose words stand in no document scores 0 everywhere.

    Args:
        documents: What to search, at least one.
        k1: How soon repeated words stop counting.
        b: How much long documents are discounted, 0 to 1.
        stopwords: Language code of the words to leave out ("en", "de", ...), or None.

    Raises:
        BadInput: no documents, an empty one, or none with a word that is not a stop word; `k1` that is negative,
            `b` outside 0 to 1, a language without a list of stop words.
        MissingExtra: bm25s is not installed.
    """

    def __init__(
        self, documents: Sequence[Document], *, k1: float = 1.2, b: float = 0.75, stopwords: str | None = "en"
    ):
        self.documents = _checked(documents)
        if not 0 <= k1 < float("inf"):
            raise BadInput("k1", k1, "is not a number from 0", "give 1.2")
        if not 0 <= b <= 1:
            raise BadInput("b", b, "is not between 0 and 1", "give 0.75")
        self._library = require("bm25s", extra="retrieve")
        self._stopwords: str | list[str] = stopwords or []
        tokens = self._tokens([passage_text(document) for document in self.documents])
        if not any(tokens):
            raise BadInput(
                "documents", len(self.documents), "hold nothing but stop words", "pass stopwords=None"
            )
        self._index = self._library.BM25(k1=k1, b=b)
        self._index.index(tokens, show_progress=False)

    def _tokens(self, texts: list[str]) -> list[list[str]]:
        try:
            return self._library.tokenize(
                [unicodedata.normalize("NFC", text) for text in texts],
                stopwords=self._stopwords,
                token_pattern=r"(?u)\b\w+\b",  # the default drops words of one letter
                return_ids=False,
                show_progress=False,
            )
        except ValueError as error:  # a language it does not know
            raise BadInput("stopwords", self._stopwords, f"cannot be used ({error})", "pass None") from error

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best documents of each query, best first.

        Raises:
            BadInput: an empty query, or k beyond the number of documents.
        """
        wanted = _check_query(queries, k, len(self.documents))
        results = []
        for words in self._tokens(wanted) if wanted else []:
            if words:
                scores = self._index.get_scores(words)
            else:  # nothing but stop words
                scores = np.zeros(len(self.documents), dtype=np.float32)
            results.append([Hit(self.documents[i], float(scores[i])) for i in _best(scores, k)])
        return results


def _best(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest scores, descending; ties in index order. Linear in the number of scores."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= least)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:k].tolist()


class VectorIndex:
    """Cosine search over sentence vectors in an embedded LanceDB table.

    Below 50,000 documents every vector is compared (exact); above, an inverted-file index is built and the
    search is approximate. With a `folder` the vectors are kept there: the next process opens them instead of
    encoding again, after checking that they belong to the same documents and the same encoder. One process
    writes at a time (file lock).

    Args:
        documents: What to search, at least one.
        encoder: A sentence encoder's name or folder (see `core.models.load_encoder`), or an object with
            `encode(list of texts) -> array [n, width]`.
        folder: Where to keep the vectors; None keeps them in memory.
        batch_size: Texts encoded at a time.

    Raises:
        BadInput: no documents, an empty one, or a folder that holds another index or a table of the user's own.
        CorruptFile: the folder's index cannot be read.
        MissingExtra: LanceDB or sentence-transformers is not installed.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        encoder: Any = "minilm",
        folder: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
    ):
        self.documents = _checked(documents)
        self._library = require("lancedb", extra="retrieve")
        self.encoder, self.batch_size = encoder, batch_size
        self.folder = None if folder is None else check_writable(folder, "folder")
        self._model = encoder
        if isinstance(encoder, (str, os.PathLike)):
            from .models import load_encoder

            self._model = load_encoder(encoder)
        if self.folder is None:
            self._table = self._create(self._library.connect("memory://"))
        else:
            with locked(self.folder / ".lock"):
                self._table = self._open_or_create(self.folder)

    def _encode(self, texts: list[str]) -> np.ndarray:
        vectors = [
            np.asarray(self._model.encode(texts[i : i + self.batch_size]), dtype=np.float32)
            for i in range(0, len(texts), self.batch_size)
        ]
        joined = np.concatenate(vectors)
        norms = np.linalg.norm(joined, axis=1, keepdims=True)
        if not np.isfinite(joined).all() or not (norms > 0).all():
            raise BadInput(
                "encoder", self.encoder, "gave a vector that is zero or not finite", "use another encoder"
            )
        return joined / norms

    def _create(self, base: Any) -> Any:
        import pyarrow

        vectors = self._encode([passage_text(document) for document in self.documents])
        table = pyarrow.table(
            {
                "row": pyarrow.array(np.arange(len(vectors))),
                "vector": pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(vectors.ravel()), vectors.shape[1]
                ),
            }
        )
        self._drop(base)
        made = base.create_table(_TABLE, data=table)
        if len(vectors) >= EXACT_BELOW:
            flat = require("lancedb.index", extra="retrieve").IvfFlat(distance_type="cosine")
            made.create_index("vector", config=flat)
        return made

    def _drop(self, base: Any) -> None:
        """Drop what a process that was killed while indexing left, but no table of the user's own."""
        try:
            columns = base.open_table(_TABLE).schema.names
        except _STORE_ERRORS:  # there is none, or half a one
            columns = _COLUMNS
        if columns != _COLUMNS:
            problem = f"holds a table {_TABLE!r} that is no index"
            raise BadInput("folder", str(self.folder), problem, "choose another folder")
        base.drop_table(_TABLE, ignore_missing=True)

    def _open_or_create(self, folder: Path) -> Any:
        """The table in `folder`. Its card, index.json, is written last: a half-made index is made again."""
        card = folder / "index.json"
        hashes = sha256_json([document.hash for document in self.documents])
        probe = self._encode([_PROBE])[0]
        if not card.exists():
            with disk_guard(folder):
                table = self._create(self._library.connect(str(folder)))
            atomic_write(
                card,
                json.dumps(
                    {"documents": hashes, "count": len(self.documents), "encoder": str(self.encoder),
                     "probe": [round(float(x), 6) for x in probe]}
                ),
            )  # fmt: skip
            return table
        try:
            kept = json.loads(card.read_text(encoding="utf-8"))
            known, count, stored = kept["documents"], kept["count"], np.asarray(kept["probe"], np.float32)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise CorruptFile(
                "folder", str(card), "is not the card of an index", "delete the folder and index again"
            ) from error
        if known != hashes:
            raise BadInput(
                "folder", str(folder), f"indexes other documents ({count} of them)", "choose another folder"
            )
        # The same text must land on the same vector, whatever the encoder is called.
        if stored.shape != probe.shape or float(stored @ probe) < 0.999:
            raise BadInput(
                "folder", str(folder), f"was made with another encoder ({kept.get('encoder')})",
                "use that encoder or choose another folder",
            )  # fmt: skip
        try:
            table = self._library.connect(str(folder)).open_table(_TABLE)
            rows = table.count_rows()
        except _STORE_ERRORS as error:
            raise self._lost() from error
        if rows != count:
            raise CorruptFile(
                "folder", str(folder), f"holds {rows} vectors, not {count}",
                "delete the folder and index again",
            )  # fmt: skip
        return table

    def _lost(self) -> CorruptFile:
        return CorruptFile(
            "folder", str(self.folder), "has lost vectors", "delete the folder and index again"
        )

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """The k best documents of each query by cosine similarity, best first.

        Raises:
            BadInput: an empty query, or k beyond the number of documents.
            CorruptFile: the folder's vectors were damaged.
        """
        wanted = _check_query(queries, k, len(self.documents))
        results: list[list[Hit]] = []
        for start in range(0, len(wanted), self.batch_size):
            vectors = self._encode(wanted[start : start + self.batch_size])
            try:
                found = (
                    self._table.search(vectors, vector_column_name="vector")
                    .distance_type("cosine").limit(k).select(["row", "_distance"]).to_arrow()
                )  # fmt: skip
            except _STORE_ERRORS as error:
                raise self._lost() from error
            numbers = found.column("query_index").to_pylist() if len(vectors) > 1 else [0] * found.num_rows
            rows: list[list[tuple[float, int]]] = [[] for _ in vectors]
            for query, row, distance in zip(
                numbers, found.column("row").to_pylist(), found.column("_distance").to_pylist()
            ):
                rows[query].append((1.0 - distance, row))
            for row_hits in rows:
                row_hits.sort(key=lambda pair: (-pair[0], pair[1]))
                results.append([Hit(self.documents[row], score) for score, row in row_hits])
        return results
