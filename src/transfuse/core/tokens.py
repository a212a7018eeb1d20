"""One text under two tokenizers: where each token lies, which belong together, which strings both know.

Places are UTF-8 bytes of the text. Special tokens (begin, end, turns of a chat) have empty spans, also where the text
spells them out. A group is the least run of tokens on both sides that covers the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from .errors import BadInput

__all__ = ["align", "align_positions", "encode", "locate", "pieces", "shared_vocabulary"]

_START = "\u2581"  # what sentencepiece writes for a space


def pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[list[bytes], np.ndarray]:
    """What each id stands for.

    Byte-level tokens are read back to their bytes, sentencepiece's marks to spaces and its `<0xNN>` to single bytes.
    Other tokens (WordPiece) are as the vocabulary has them. Special tokens are their names.

    Returns:
        The bytes by id, and bool `[ids]`: whether a token is special.
    """
    return _pieces(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _pieces(tokenizer: Any, size: int) -> tuple[list[bytes], np.ndarray]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = "" if backend is None else f"{backend.pre_tokenizer!r} {backend.decoder!r} {backend.normalizer!r}"
    added = getattr(tokenizer, "added_tokens_decoder", {})
    count = max([*vocabulary.values(), -1]) + 1
    found, special = [b""] * count, np.zeros(count, dtype=bool)
    back = {ord(char): byte for byte, char in _byte_characters().items()}
    for piece, number in vocabulary.items():
        if number in added:
            found[number] = piece.replace(_START, " ").encode() if _START in parts else piece.encode()
        elif "ByteLevel" in parts or hasattr(tokenizer, "byte_decoder"):
            plain = piece.translate(back)
            found[number] = plain.encode("latin-1" if max(plain, default="") < "\u0100" else "utf-8")
        elif _START in parts and len(piece) == 6 and piece.startswith("<0x"):
            found[number] = bytes([int(piece[3:5], 16)])
        else:
            found[number] = (piece.replace(_START, " ") if _START in parts else piece).encode()
    for number in {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}:
        if 0 <= number < count:
            special[number] = True
    return found, special


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: those that print are themselves, the others follow from 256."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def locate(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    text: str,
    offsets: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Where in a text its tokens lie.

    Found from the tokens' own bytes where these spell the text, which also tells apart the pieces of one character;
    a space that the tokenizer put before the text is passed over. Otherwise (normalised text, WordPiece) from the
    character offsets of a fast tokenizer.

    Args:
        tokenizer: Made `ids` of `text`.
        ids: Token ids; special ones may stand anywhere, and the end may be cut off.
        text: The text.
        offsets: Character offsets of `ids`, if they are known.

    Returns:
        int64 `[n, 2]`: first byte, and the byte after the last.

    Raises:
        BadInput: the tokens do not spell the text, and offsets cannot be had.
    """
    found, special = pieces(tokenizer)
    data = text.encode()
    spans = _walk(ids, found, special, data)
    if spans is not None:
        return spans
    if offsets is None and tokenizer.is_fast:
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        plain = [i for i, number in enumerate(ids) if not special[number]]
        if again["input_ids"] == [ids[i] for i in plain]:
            where: list[tuple[int, int]] = [(0, 0)] * len(ids)
            for i, span in zip(plain, again["offset_mapping"], strict=True):
                where[i] = span
            offsets = where
    if offsets is None:
        raise BadInput("text", text, "is not what the tokens spell", "give the text that was tokenized")
    return _from_characters(ids, special, text, offsets)


def _walk(ids: Sequence[int], found: list[bytes], special: np.ndarray, data: bytes) -> np.ndarray | None:
    """Follow the text token by token; None where a token is not what comes next."""
    spans = np.zeros((len(ids), 2), dtype=np.int64)
    at, started = 0, False
    for i, number in enumerate(ids):
        piece, begin = found[number], at
        if data.startswith(piece, at):
            at += len(piece)
        elif not special[number]:
            if started or piece[:1] != b" " or not data.startswith(piece[1:], at):
                return None
            at += len(piece) - 1
        started = started or not special[number]
        spans[i] = begin, begin if special[number] else at
    return spans


def _from_characters(
    ids: Sequence[int], special: np.ndarray, text: str, offsets: Sequence[tuple[int, int]]
) -> np.ndarray:
    sizes = [len(char.encode()) for char in text]
    before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
    spans = before[np.asarray(offsets, dtype=np.int64).reshape(-1, 2)]
    at = 0
    for i, number in enumerate(ids):
        if special[number] or spans[i, 0] == spans[i, 1]:
            spans[i] = at
        at = int(max(at, spans[i, 1]))
    return spans


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[tuple[list[int], np.ndarray]]:
    """Token ids of each text, with their places (see `locate`)."""
    if not texts:
        return []
    options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    found = tokenizer(list(texts), add_special_tokens=add_special_tokens, **options)
    offsets = found.get("offset_mapping", [None] * len(texts))
    return [
        (list(ids), locate(tokenizer, ids, text, where))
        for ids, text, where in zip(found["input_ids"], texts, offsets, strict=True)
    ]


def align(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group the tokens of two tokenizations that cover the same bytes.

    Walking along both, the side whose token ends earlier goes on, and a group closes where both end; in other words,
    groups lie between the borders that both sides have. Bytes that one side leaves out (spaces of WordPiece, what
    only one of them holds for a special token) do not hinder it. Of empty spans at one place the first goes with the
    first, and so on. In n log n.

    Args:
        ours: Spans int64 `[n, 2]` in the order of the tokens.
        theirs: Spans `[m, 2]` of the other side, over the same bytes.

    Returns:
        int64 `[n]` and `[m]`: the number of each token's group, rising from 0; -1 for a token without partner.
    """
    ours, theirs = (np.asarray(each, dtype=np.int64).reshape(-1, 2) for each in (ours, theirs))
    common = np.intersect1d(_borders(ours), _borders(theirs))
    width = len(ours) + len(theirs) + 2
    keys = [_keys(each, common, width) for each in (ours, theirs)]
    both = np.intersect1d(keys[0], keys[1])
    both = both[both >= 0]
    numbers = []
    for key in keys:
        place = np.searchsorted(both, key).clip(max=max(len(both) - 1, 0))
        found = (both[place] == key) if len(both) else np.zeros(len(key), dtype=bool)
        numbers.append(np.where(found, place, -1).astype(np.int64))
    return numbers[0], numbers[1]


def _borders(spans: np.ndarray) -> np.ndarray:
    """Bytes where a token begins or ends and that lie inside none."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    if not len(spans):
        return np.zeros(0, dtype=np.int64)
    start, end = spans.T
    reached = np.concatenate([[-1], np.maximum.accumulate(end)[:-1]])
    ahead = np.concatenate([np.minimum.accumulate(start[::-1])[::-1][1:], [end.max()]])
    return np.unique(np.concatenate([start[start >= reached], end[end <= ahead]]))


def _keys(spans: np.ndarray, common: np.ndarray, width: int) -> np.ndarray:
    """A number per token that is the same for tokens of one group; -1 where no border follows."""
    start, end = spans.T
    segment = np.searchsorted(common, end)
    inside = segment < len(common)
    limit = common[segment.clip(max=len(common) - 1)] if len(common) else end
    keys = np.where(inside, limit * width, -1)
    empty = np.flatnonzero(start == end)
    place = start[empty]
    keys[empty] = place * width + 1 + np.arange(len(empty)) - np.searchsorted(place, place)
    return keys


def align_positions(ours: int, theirs: int) -> tuple[np.ndarray, np.ndarray]:
    """The plain alignment: the i-th token with the i-th, up to the shorter side; -1 beyond. As `align` returns."""
    shorter = min(ours, theirs)
    first, second = (
        np.where(np.arange(n) < shorter, np.arange(n), -1).astype(np.int64) for n in (ours, theirs)
    )
    return first, second


def shared_vocabulary(
    ours: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase,
    *,
    by: Literal["text", "piece"] = "text",
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that are the same string in both vocabularies, each used once.

    Args:
        ours: A tokenizer.
        theirs: Another.
        by: What is compared: "text", the bytes a token stands for, so that a space is a space however it is written;
            or "piece", the vocabularies' own spelling.

    Returns:
        int64 `[k]` and `[k]`: the ids, side by side, by rising id of `ours`.
    """
    if by not in ("text", "piece"):
        raise BadInput("by", by, "is not known", 'use "text" or "piece"')
    first, second = (_strings(each, by) for each in (ours, theirs))
    pairs = sorted((number, second[key]) for key, number in first.items() if key in second)
    table = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _strings(tokenizer: PreTrainedTokenizerBase, by: str) -> dict[Any, int]:
    vocabulary = tokenizer.get_vocab()
    if by == "piece":
        return dict(vocabulary)
    found, special = pieces(tokenizer)
    names = {number: piece for piece, number in vocabulary.items()}
    strings: dict[Any, int] = {}
    # Two tokens may stand for one string (a letter and its byte): the one spelt out comes first.
    for number in sorted(vocabulary.values(), key=lambda i: (names[i].startswith("<0x"), i)):
        strings.setdefault((found[number], bool(special[number])), number)
    return strings
