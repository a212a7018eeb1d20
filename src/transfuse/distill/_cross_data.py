"""Batches of one text in two tokenizers' tokens, and which rows of the two models' logits belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.batches import IGNORED
from ..core.errors import BadInput
from ..core.generate import encode_pair, pad_batch, pad_id_of
from ..core.tokens import align, encode, locate

__all__ = ["CrossCollator", "Merge", "Side", "pair_rows"]

Merge = Literal["observed", "bayesian"]


class CrossCollator:
    """Makes batches for a student and a teacher with tokenizers of their own, from texts.

    A row is a text (`"..."` or `{"text": "..."}`), all of which is predicted; a prompt and a target (a pair, or
    `{"prompt": ..., "target": ...}`), of which the target is; or what `encode` returned. A prompt may be a list of
    chat messages, which each tokenizer puts into its own template.

    A batch has `input_ids`, `attention_mask`, `labels` and `groups` `[B, T]` for the student and the same with the
    prefix `teacher_` `[B, T']` for the teacher, int64, padded on the right. Tokens with one number in `groups` and
    `teacher_groups` of a row of the batch cover the same bytes; -1 is no group.

    Args:
        student_tokenizer: The student's.
        teacher_tokenizer: The teacher's.
        max_length: Longest sequence on either side, in its tokens; what is beyond is cut off. None for no limit.
        end: Append each tokenizer's end-of-text token; the two are one group.

    Raises:
        BadInput: `end` without an end-of-text token; a row of another kind; chat messages without a template.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        end: bool = False,
    ):
        self.tokenizers = (student_tokenizer, teacher_tokenizer)
        if end and any(each.eos_token_id is None for each in self.tokenizers):
            raise BadInput("end", end, "needs end-of-text tokens", "set eos_token or end=False")
        if max_length is not None and max_length < 2:
            raise BadInput("max_length", max_length, "leaves nothing to predict", "give 2 or more")
        self.max_length, self.end = max_length, end

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of some rows."""
        encoded = self.encode(rows)
        batch = {}
        for prefix, tokenizer in zip(("", "teacher_"), self.tokenizers, strict=True):
            fills = {"input_ids": pad_id_of(tokenizer), "labels": IGNORED, "groups": -1}
            for name, fill in fills.items():
                values, mask = pad_batch([row[prefix + name] for row in encoded], fill)
                batch[prefix + name] = values
            batch[f"{prefix}attention_mask"] = mask
        return batch

    def encode(self, rows: Sequence[Any]) -> list[dict[str, list[int]]]:
        """Rows with both sides' columns, to be kept and collated later.

        Returns:
            One dict of int lists per row: the columns of a batch but the attention masks, without padding.
        """
        return [row if _is_encoded(row) else self._encode(row) for row in rows]

    def _encode(self, row: Any) -> dict[str, list[int]]:
        prompt, target = _parts(row)
        found: dict[str, list[int]] = {}
        spans = []
        for prefix, tokenizer in zip(("", "teacher_"), self.tokenizers, strict=True):
            before, after, where, size = _side(tokenizer, prompt, target)
            if self.end:
                after = [*after, int(tokenizer.eos_token_id)]
                where = np.concatenate([where, [[size, size]]])
            room = None if self.max_length is None else max(self.max_length - len(before), 0)
            after, where = after[:room], where[:room]
            ids = [*before, *after][: self.max_length]
            found[f"{prefix}input_ids"] = ids
            found[f"{prefix}labels"] = [*[IGNORED] * len(before), *after][: len(ids)]
            if prompt is None:
                found[f"{prefix}labels"][0] = IGNORED  # nothing comes before it
            spans.append((len(ids) - len(after), where))
        for prefix, (skipped, _), group in zip(
            ("", "teacher_"), spans, align(spans[0][1], spans[1][1]), strict=True
        ):
            found[f"{prefix}groups"] = [*[-1] * skipped, *group.tolist()]
        return found


def _is_encoded(row: Any) -> bool:
    return isinstance(row, Mapping) and "teacher_input_ids" in row


def _parts(row: Any) -> tuple[Any, str]:
    """Prompt (None for plain text) and target of a row."""
    if isinstance(row, str):
        return None, row
    if isinstance(row, Mapping):
        if "text" in row:
            return None, row["text"]
        if "prompt" in row and "target" in row:
            return row["prompt"], row["target"]
    elif isinstance(row, Sequence) and len(row) == 2:
        return row[0], row[1]
    raise BadInput("rows", row, "is no text and no pair of prompt and target", "give one of these")


def _side(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, target: str
) -> tuple[list[int], list[int], np.ndarray, int]:
    """Ids before the predicted text, its ids, where these lie in it, and its bytes."""
    if not target.strip():
        raise BadInput("rows", target, "is empty", "give some text")
    if prompt is None:
        ((ids, where),) = encode(tokenizer, [target])
        return [], ids, where, len(target.encode())
    if isinstance(prompt, str):
        prompt, target = prompt.rstrip(" "), target.strip()
        gap = "" if not prompt or prompt[-1].isspace() else " "
        before, after = encode_pair(tokenizer, prompt, target)
        text = gap + target
        return before, after, locate(tokenizer, after, text), len(text.encode())
    if tokenizer.chat_template is None:
        raise BadInput(
            "prompt", prompt, "needs a chat template", "set tokenizer.chat_template, or give texts"
        )
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    ((ids, where),) = encode(tokenizer, [target], add_special_tokens=False)
    return list(before), ids, where, len(target.encode())


@dataclass(frozen=True)
class Side:
    """One model's predicted tokens.

    Attributes:
        where: Row of the batch and place of the logits that predict each token, int64 `[N]` both.
        tokens: Their ids, int64 `[N]`.
        group: Number of each token's group, -1 for none, int64 `[N]`.
        base: For each group, which of the N gives the distribution, int64 `[G]`.
    """

    where: tuple[Tensor, Tensor]
    tokens: Tensor
    group: Tensor
    base: Tensor

    @property
    def others(self) -> Tensor:
        """Which of the N enter as factors."""
        other = self.group >= 0
        other[self.base] = False
        return other.nonzero().squeeze(-1)


def _count(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def pair_rows(
    labels: Tensor, groups: Tensor, teacher_labels: Tensor, teacher_groups: Tensor, merge: Merge = "observed"
) -> tuple[Side, Side]:
    """Which rows of logits meet.

    A group takes part if it has tokens on both sides and all of them are predicted: labelled, and not the first of
    their sequence.

    Args:
        labels: The student's, int64 `[B, T]`, -100 where nothing is predicted.
        groups: Group of each token, counted from 0 in each row of the batch; -1 for none.
        teacher_labels: The teacher's labels `[B, T']`.
        teacher_groups: Its tokens' groups, of the same numbering.
        merge: "observed" or "bayesian".

    Returns:
        The student's labelled tokens and the teacher's grouped ones.
    """
    sides = ((labels, groups), (teacher_labels, teacher_groups))
    most = max(int(each.max()) if each.numel() else -1 for _, each in sides) + 1
    usable = torch.ones(len(labels), most, dtype=torch.bool, device=labels.device)
    for marks, each in sides:
        free = marks == IGNORED
        free[:, :1] = True
        place = each.clamp_min(0)
        for wrong, at_least in ((free & (each >= 0), 0), (each >= 0, 1)):
            found = torch.zeros(usable.shape, dtype=torch.long, device=labels.device)
            found = found.scatter_add(1, place, wrong.long()) if most else found
            usable &= (found == 0) if at_least == 0 else (found > 0)
    number = (usable.flatten().cumsum(0) - 1).masked_fill(~usable.flatten(), -1).view_as(usable)
    total = int(usable.sum())
    found_sides = []
    for student, (marks, each) in zip((True, False), sides, strict=True):
        named = number.gather(1, each.clamp_min(0)) if most else torch.full_like(each, -1)
        named = torch.where(each >= 0, named, -1)[:, 1:]
        keep = (marks[:, 1:] != IGNORED) if student else (named >= 0)
        where = keep.nonzero(as_tuple=True)
        group = named[where]
        index, inside = _count(group), group >= 0
        start = torch.full((total,), len(group) if merge == "observed" else -1, device=labels.device)
        base = start.scatter_reduce(
            0, group[inside], index[inside], "amin" if merge == "observed" else "amax"
        )
        found_sides.append(Side((where[0], where[1]), marks[:, 1:][where], group, base))
    return found_sides[0], found_sides[1]
