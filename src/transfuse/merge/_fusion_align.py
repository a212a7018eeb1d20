"""Next-token distributions of a source with a tokenizer of its own, brought to the target's tokens and vocabulary.

Two things have to be matched: places (after which tokens have both models read the same text?) and entries (which of
the target's tokens stands for which of the source's?). Places are matched by the bytes that tokens cover, or as FuseLLM
(arXiv 2401.10491) does, by time warping over edit distances. Entries are matched where they are the same string, else
by the least edit distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadInput, IncompatibleModels
from ..core.tokens import align, locate, pieces, shared_vocabulary

__all__ = [
    "AlignedTopK",
    "Alignment",
    "Fallback",
    "VocabularyMap",
    "align_distributions",
    "edit_distances",
    "same_vocabulary",
    "warp",
]

Alignment = Literal["bytes", "edit"]
Fallback = Literal["next", "current"]

_BINS = 32  # of the byte counts that bound an edit distance from below
_FIRST = 64  # candidates of least bound that are measured first


@dataclass(frozen=True)
class AlignedTopK:
    """A source's top k after each of the target's tokens.

    Attributes:
        ids: Of the target's vocabulary, int64 `[n, k]`; no id twice in a row among entries above -inf.
        log_probs: Float32 `[n, k]`; -inf where nothing is listed.
        aligned: bool `[n]`: whether a row is the source's, or one-hot for want of a place that both models reach.
    """

    ids: Tensor
    log_probs: Tensor
    aligned: Tensor


def same_vocabulary(ours: Any, theirs: Any) -> bool:
    """Whether two tokenizers number the same tokens alike."""
    return ours is theirs or ours.get_vocab() == theirs.get_vocab()


def edit_distances(word: bytes, table: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Levenshtein distances of one string to many.

    Args:
        word: The string.
        table: Bytes of the others, int `[C, W]`, filled up at the end with anything.
        lengths: Their lengths, int `[C]`.

    Returns:
        int64 `[C]`.
    """
    steps = np.arange(table.shape[1] + 1, dtype=np.int16)
    row = np.broadcast_to(steps, (len(table), len(steps)))
    for i, byte in enumerate(word):
        lowest = np.empty(row.shape, dtype=np.int16)
        lowest[:, 0] = i + 1
        np.minimum(row[:, 1:] + 1, row[:, :-1] + (table != byte), out=lowest[:, 1:])
        row = np.minimum.accumulate(lowest - steps, axis=1) + steps  # insertions, all at once
    return row[np.arange(len(table)), lengths].astype(np.int64)


def _table(words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    table = np.full((len(words), max(lengths, default=0)), -1, dtype=np.int16)
    for i, word in enumerate(words):
        table[i, : len(word)] = np.frombuffer(word, dtype=np.uint8)
    return table, lengths


def _counts(table: np.ndarray) -> np.ndarray:
    """How often each bin of bytes occurs, int16 `[C, bins]`, for strings of one length."""
    found = np.zeros((len(table), _BINS), dtype=np.int16)
    for column in table.T:
        np.add.at(found, (np.arange(len(table)), column % _BINS), 1)
    return found


class VocabularyMap:
    """For each of the source's ids the target's: the same string, else the one of least edit distance.

    Strings are the bytes that tokens stand for, so that a space is a space however it is written. The special tokens
    that begin, end, pad and stand for unknown go with their like; other special tokens and empty ones with nothing
    (-1). Of equal distances the lowest id is taken. An id is looked up when it is first asked for and then kept;
    candidates are taken by length, and only those measured whose byte counts allow as small a distance as the best.

    Args:
        source: The source's tokenizer.
        target: The target's.
        nearest: Map by edit distance too; False leaves what has no equal string at -1.
    """

    def __init__(self, source: Any, target: Any, *, nearest: bool = True):
        self._pieces, self._special = pieces(source)
        strings, special = pieces(target)
        self._found: dict[int, int] = {}
        for role in ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id"):
            ours, theirs = getattr(target, role, None), getattr(source, role, None)
            if ours is not None and theirs is not None:
                self._found.setdefault(int(theirs), int(ours))
        equal = zip(*(ids.tolist() for ids in shared_vocabulary(source, target)), strict=True)
        self._found.update(equal)
        self.nearest = nearest
        by_length: dict[int, list[int]] = {}
        for number, piece in enumerate(strings):
            if piece and not special[number]:
                by_length.setdefault(len(piece), []).append(number)
        self._buckets: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for length, numbers in by_length.items():
            table, _ = _table([strings[number] for number in numbers])
            self._buckets[length] = (np.array(numbers, dtype=np.int64), table, _counts(table))

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The target's ids of some of the source's, int64 of the same shape; -1 for none."""
        each, places = np.unique(ids, return_inverse=True)
        mapped = np.array([self._of(int(number)) for number in each], dtype=np.int64)
        return mapped[places].reshape(np.shape(ids))

    def _of(self, number: int) -> int:
        if number not in self._found:
            inside = 0 <= number < len(self._pieces) and bool(self._pieces[number])
            plain = inside and not self._special[number] and self.nearest
            self._found[number] = self._closest(self._pieces[number]) if plain else -1
        return self._found[number]

    def _closest(self, word: bytes) -> int:
        own = _counts(_table([word])[0])
        best, chosen = np.iinfo(np.int64).max, -1
        for length in sorted(self._buckets, key=lambda size: (abs(size - len(word)), size)):
            if abs(length - len(word)) > best:
                break
            numbers, table, counts = self._buckets[length]
            more = np.maximum(counts - own, 0).sum(1)
            bound = np.maximum(more, more + len(word) - length)  # bytes only the one has, only the other
            order = np.argsort(bound, kind="stable")
            for part in (order[:_FIRST], order[_FIRST:]):
                part = part[bound[part] <= best]
                if not len(part):
                    continue
                distance = edit_distances(word, table[part], np.full(len(part), length))
                least = int(distance.min())
                lowest = int(numbers[part[distance == least]].min())
                if least < best or (least == best and lowest < chosen):
                    best, chosen = least, lowest
        return chosen


def warp(cost: np.ndarray) -> list[tuple[int, int]]:
    """Dynamic time warping: the path of least summed cost from the first pair to the last.

    Of equal steps back the diagonal is taken first, then that along the rows.

    Args:
        cost: `[m, n]`.

    Returns:
        Pairs (i, j), rising.
    """
    m, n = cost.shape
    total = np.full((m + 1, n + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(m + n - 1):
        i = np.arange(max(0, diagonal - n + 1), min(m, diagonal + 1))
        j = diagonal - i
        before = np.minimum(np.minimum(total[i, j + 1], total[i + 1, j]), total[i, j])
        total[i + 1, j + 1] = cost[i, j] + before
    i, j, path = m, n, []
    total[0, 0] = np.inf
    while i > 1 or j > 1:
        path.append((i - 1, j - 1))
        step = int(np.argmin([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]]))
        i, j = i - (step != 2), j - (step != 1)
    return [(0, 0), *reversed(path)]


def align_distributions(
    source_tokenizer: Any,
    target_tokenizer: Any,
    ids: tuple[Sequence[int], Sequence[int]],
    topk: tuple[Tensor, Tensor],
    vocab_map: VocabularyMap | Mapping[int, int] | Sequence[int] | np.ndarray | None = None,
    *,
    text: str | None = None,
    alignment: Alignment = "bytes",
    fallback: Fallback = "next",
) -> AlignedTopK:
    """What a source says after each of the target's tokens, in the target's vocabulary.

    "bytes": a place of the target goes with the source's where both have read the same bytes of the text (the last
    tokens of a group of `core.tokens.align`), and probabilities whose ids map to one are added. Where the tokens do
    not spell the text, "edit" stands in. "edit", as FuseLLM: tokens are paired by `warp` over the edit distances of
    their strings without spaces; a token of the target with exactly one partner, of the same string or mapped to it,
    takes the partner's row, and of ids that map to one the likeliest is kept. All other rows are one-hot.

    Args:
        source_tokenizer: Made the source's ids.
        target_tokenizer: Made the target's.
        ids: The source's tokens (m of them) and the target's (n) of one text.
        topk: The source's ids int64 `[m, k]` and their log-probabilities `[m, k]` by falling probability; row s
            speaks about what follows token s. In "edit", logits do as well.
        vocab_map: From the source's ids to the target's, -1 or absent for none; None where the vocabulary is the same.
        text: The text; by default what the target's ids decode to.
        alignment: "bytes" or "edit".
        fallback: Which token a one-hot row names: the "next" one, which the row is about, or the "current" one, as
            the released code has it.

    Raises:
        BadInput: no token, rows that do not match them, or an unknown option.
        IncompatibleModels: no map between different vocabularies.
    """
    theirs, ours = (list(each) for each in ids)
    numbers, scores = (np.asarray(part.detach().cpu()) for part in topk)
    if not theirs or not ours or numbers.shape != scores.shape or len(numbers) != len(theirs):
        shapes = (len(theirs), len(ours), numbers.shape)
        raise BadInput("topk", shapes, "does not have a row per token", "give the source's rows of this text")
    for name, value, known in (("alignment", alignment, Alignment), ("fallback", fallback, Fallback)):
        if value not in get_args(known):
            raise BadInput(name, value, "is not known", f"use one of {', '.join(get_args(known))}")
    same = same_vocabulary(source_tokenizer, target_tokenizer)
    if vocab_map is None and not same:
        sizes = (len(source_tokenizer), len(target_tokenizer))
        remedy = "pass VocabularyMap(source_tokenizer, target_tokenizer)"
        raise IncompatibleModels(
            "vocab_map", sizes, "entries of vocabulary differ, and there is no map", remedy
        )
    mapped = _lookup(vocab_map, numbers)
    if vocab_map is None and theirs == ours:
        place = np.arange(len(ours))
    else:
        spans = (
            _spans(source_tokenizer, target_tokenizer, theirs, ours, text) if alignment == "bytes" else None
        )
        if spans is not None:
            place = _by_bytes(*spans)
        else:
            alignment = "edit"
            own = _lookup(vocab_map, np.asarray(theirs, dtype=np.int64))
            place = _by_warping(source_tokenizer, target_tokenizer, theirs, ours, own)
    keep = max(numbers.shape[1], 1)
    found = np.zeros((len(ours), keep), dtype=np.int64)
    values = np.full((len(ours), keep), -np.inf, dtype=np.float32)
    aligned = np.zeros(len(ours), dtype=bool)
    for t, s in enumerate(place.tolist()):
        row_ids, row = _merged(mapped[s], scores[s], add=alignment == "bytes") if s >= 0 else ((), ())
        aligned[t] = len(row_ids) > 0
        if aligned[t]:
            found[t, : len(row_ids)], values[t, : len(row)] = row_ids, row
        else:
            found[t, 0], values[t, 0] = ours[min(t + 1, len(ours) - 1) if fallback == "next" else t], 0.0
    return AlignedTopK(*(torch.from_numpy(part) for part in (found, values, aligned)))


def _lookup(vocab_map: Any, numbers: np.ndarray) -> np.ndarray:
    if vocab_map is None:
        return numbers.astype(np.int64)
    if isinstance(vocab_map, VocabularyMap):
        return vocab_map(numbers)
    if isinstance(vocab_map, Mapping):
        return np.vectorize(lambda number: vocab_map.get(int(number), -1), otypes=[np.int64])(numbers)
    table = np.asarray(vocab_map, dtype=np.int64)
    return np.where(numbers < len(table), table[np.minimum(numbers, len(table) - 1)], -1)


def _merged(ids: np.ndarray, scores: np.ndarray, *, add: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids without -1 and without repetition in the order of their first appearance, with their scores."""
    kept = (ids >= 0) & (scores > -np.inf)
    ids, scores = ids[kept], scores[kept]
    each, first, places = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    if not add:
        return each[order], scores[first][order]
    sums = np.full(len(each), -np.inf)
    np.logaddexp.at(sums, places, scores.astype(np.float64))
    return each[order], sums[order]


def _spans(
    source: Any, target: Any, theirs: Sequence[int], ours: Sequence[int], text: str | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Bytes of the text under each token of the target and of the source; None where they do not spell it."""
    try:
        if text is None:
            text = str(target.decode(ours, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return locate(target, ours, text), locate(source, theirs, text)
    except BadInput:
        return None


def _by_bytes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each of our tokens the one of theirs after which both have read the same; -1 for none."""
    groups, others = align(ours, theirs)
    ends = {group: s for s, group in enumerate(others.tolist()) if group >= 0}
    last = {group: t for t, group in enumerate(groups.tolist()) if group >= 0}
    place = np.full(len(ours), -1, dtype=np.int64)
    for group, t in last.items():
        place[t] = ends[group]
    return place


def _by_warping(
    source: Any, target: Any, theirs: Sequence[int], ours: Sequence[int], mapped: np.ndarray
) -> np.ndarray:
    """The same by time warping; `mapped` are the target's ids of `theirs`."""
    strings = [
        [names[i] for i in each] for names, each in ((pieces(source)[0], theirs), (pieces(target)[0], ours))
    ]
    plain = [[string.replace(b" ", b"") for string in each] for each in strings]
    kinds = [list(dict.fromkeys(each)) for each in plain]
    table, lengths = _table(kinds[1])
    distances = np.stack([edit_distances(word, table, lengths) for word in kinds[0]])
    rows, columns = (
        [{word: i for i, word in enumerate(k)}[w] for w in p] for k, p in zip(kinds, plain, strict=True)
    )
    partners: list[list[int]] = [[] for _ in ours]
    for s, t in warp(distances[np.ix_(rows, columns)].astype(np.float64)):
        partners[t].append(s)
    place = np.full(len(ours), -1, dtype=np.int64)
    for t, found in enumerate(partners):
        if len(found) == 1:
            s = found[0]
            equal = strings[0][s] == strings[1][t] or (t == 0 and b" " + strings[0][s] == strings[1][t])
            if equal or mapped[s] == ours[t]:
                place[t] = s
    return place
