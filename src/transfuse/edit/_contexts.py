"""A fact in several contexts: prefixes written by the model itself, token rows, where the subject ends.

All rows of a `Chunk` are shifted so that the subject's last token is in one column. What stands before it is
not changed by an edit at that token, in any block, because attention is causal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput
from ..core.generate import check_length, encode_pair, pad_batch, pad_id_of, plain_generation
from ..core.training import seeded

__all__ = [
    "Chunk",
    "Row",
    "encode",
    "lay_out",
    "rows_of",
    "sample_ids",
    "sample_prefixes",
    "subject_end",
    "subject_token",
]

_OPENINGS = ("The", "Therefore", "Because", "I", "You")
_LENGTHS = (5, 10)  # tokens of a prefix, opening word included


@torch.no_grad()
def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    seed: int,
    top_k: int = 0,
) -> list[list[int]]:
    """Text sampled from the model at temperature 1: token ids, `starts` included, cut at the end of text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        starts: Rows of token ids to continue, at least one token each.
        new_tokens: Most tokens added to each row.
        seed: Of the sampling; the global random state is as before afterwards.
        top_k: Sample among this many best tokens; 0 for all.
    """
    pad = pad_id_of(tokenizer)
    ids, mask = pad_batch(starts, pad, side="left", device=model.device)
    end = tokenizer.eos_token_id
    with seeded(seed), plain_generation(model, pad=pad, ends=[] if end is None else [end]):
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=top_k, max_new_tokens=new_tokens
        )
    rows = []
    for start, new in zip(starts, out[:, ids.shape[1] :].tolist(), strict=True):
        rows.append([*start, *(new[: new.index(end)] if end in new else new)])
    return rows


def sample_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int = 20, seed: int = 0
) -> tuple[str, ...]:
    """Contexts to put before a prompt: "" and `count` short texts by the model itself, each ending in ". ".

    Half of them are 5 tokens long, half 10; sampled among the 5 best tokens, after five common opening words.

    Raises:
        BadInput: `count` is negative.
    """
    if count < 0:
        raise BadInput("prefixes", count, "is negative", "give 0 or more")
    found = [""]
    for i, length in enumerate(_LENGTHS):
        numbers = range(count * i // len(_LENGTHS), count * (i + 1) // len(_LENGTHS))
        starts = [list(tokenizer(_OPENINGS[n % len(_OPENINGS)])["input_ids"]) for n in numbers]
        if starts:
            rows = sample_ids(model, tokenizer, starts, new_tokens=length - 1, seed=seed + i, top_k=5)
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            found += [" ".join(text.split()) + ". " for text in texts]
    return tuple(found)


def subject_end(fact: Fact) -> int:
    """One past the subject's last character in the prompt. Of several places the last one counts.

    Places that are part of a longer word ("Iran" in "Iranian") count only where there is no other.
    """
    subject = fact.subject.strip()
    places = re.finditer(rf"(?<!\w)(?={re.escape(subject)}(?!\w))", fact.prompt)
    start = max((place.start() for place in places), default=fact.prompt.rindex(subject))
    return start + len(subject)


def subject_token(
    tokenizer: PreTrainedTokenizerBase, text: str, end: int, ids: Sequence[int], *, first: bool = False
) -> int:
    """Index in `ids` of the token that holds character `end - 1` of `text`, the subject's last.

    Args:
        tokenizer: A fast tokenizer (offsets are needed).
        text: The text whose tokens begin with `ids`.
        end: One past the subject's last character.
        ids: Tokens of `text`, or of its beginning.
        first: Of a character of several bytes, spread over several tokens, take the first and not the last.

    Raises:
        BadInput: the tokenizer gives no offsets, or the character is not in `ids`.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            "tokenizer", type(tokenizer).__name__, "gives no character offsets", "use a fast tokenizer"
        )
    encoded = tokenizer(text, return_offsets_mapping=True)
    if list(encoded["input_ids"][: len(ids)]) == list(ids):
        for index in range(len(ids)) if first else reversed(range(len(ids))):
            start, stop = encoded["offset_mapping"][index]
            if start < end <= stop:
                return index
    raise BadInput("subject", text[:end], "has no token of its own", "check the tokenizer's offsets")


@dataclass(frozen=True)
class Row:
    """One context of one fact.

    Attributes:
        ids: Tokens the model reads: context and prompt, and the target but for its last token.
        position: Index of the subject's last token.
        answer: The target's tokens; the k-th is predicted at index `len(ids) - len(answer) + k`.
    """

    ids: list[int]
    position: int
    answer: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, target: str) -> tuple[list[int], list[int], str]:
    """Tokens of a prompt, tokens of its target, and a text whose tokens begin with the prompt's."""
    text = text.rstrip(" ")
    before, after = encode_pair(tokenizer, text, target)
    joint = text + ("" if text[-1].isspace() else " ") + target.strip()
    same = tokenizer(joint)["input_ids"][: len(before)] == before
    return before, after, joint if same else text


def rows_of(tokenizer: PreTrainedTokenizerBase, fact: Fact, prefixes: Sequence[str]) -> list[Row]:
    """The fact after each prefix. Where the subject stands twice in the prompt, see `subject_end`."""
    rows = []
    for prefix in prefixes:
        before, after, text = encode(tokenizer, prefix + fact.prompt, fact.target)
        end = len(prefix) + subject_end(fact)
        rows.append(Row(before + after[:-1], subject_token(tokenizer, text, end, before), after))
    return rows


def essence_row(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> Row:
    """The prompt "{subject} is a", cut after the subject, whose next-token distribution should stay."""
    subject = fact.subject.strip()
    text = f"{subject} is a"
    ids = list(tokenizer(text)["input_ids"])
    position = subject_token(tokenizer, text, len(subject), ids)
    return Row(ids[: position + 1], position, [])


@dataclass(frozen=True)
class Chunk:
    """Rows side by side, padded on both sides, the subject's last token in column `cut`.

    Attributes:
        ids: int64 `[B, T]`.
        mask: int64 `[B, T]`, 0 on padding.
        positions: int64 `[B, T]`, each row's own positions.
        cut: Column of the subject's last token.
        owner: int64 `[B]`, which fact (of those laid out together) a row belongs to.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cut: int
    owner: torch.Tensor

    def select(self, rows: torch.Tensor, *, columns: slice = slice(None)) -> Chunk:
        """Some rows (`[b]`, int64) and columns; `cut` stays a column of the whole."""
        return replace(
            self,
            ids=self.ids[rows, columns],
            mask=self.mask[rows, columns],
            positions=self.positions[rows, columns],
            owner=self.owner[rows],
        )

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}

    def unflat(self, value: torch.Tensor) -> torch.Tensor:
        """What a module saw of these rows, as `[B, T, width]`: some architectures' MLPs (OPT) read `[B T, width]`."""
        return value.reshape(*self.ids.shape, value.shape[-1])


def lay_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], owner: Sequence[int]
) -> Chunk:
    """Put `rows` into a `Chunk` on the model's device.

    Raises:
        BadInput: a row exceeds the model's positions.
    """
    check_length(model, max(len(row.ids) for row in rows))
    cut = max(row.position for row in rows)
    width = cut + max(len(row.ids) - row.position for row in rows)
    ids = torch.full((len(rows), width), pad_id_of(tokenizer), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(cut - row.position, cut - row.position + len(row.ids))
        ids[i, where] = torch.tensor(row.ids)
        mask[i, where] = 1
    device = model.device
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return Chunk(ids.to(device), mask.to(device), positions.to(device), cut, torch.tensor(owner).to(device))
