"""A stored teacher's top k and a student over one small vocabulary: the k tokens, and all others as one class."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reduced"]


def reduced(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    rest: str,
    temperature: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both models over the vocabulary "the k stored tokens, and all others", as logits; and the labels in it.

    Under a temperature T the student is tempered over its whole vocabulary before its others are summed: with q =
    softmax(z / T) the result is T log q, which divided by T is log q. Of the teacher only p at T = 1 is known; log p
    divided by T stands for p^(1/T), renormalised, the others' mass as if it were one token's: an approximation.

    Args:
        student: Logits `[n, V]`.
        ids: int64 `[n, k]`.
        log_probs: The teacher's log-probabilities of them, `[n, k]`.
        labels: int64 `[n]`.
        rest: "bucket" or "zero", see `TokenObjective`.
        temperature: T, what both results will be divided by: a number, or `[n]`.

    Returns:
        Student and teacher `[n, k + 1]` ("zero": `[n, k]`), and each label's place in them: that of all others, where
        it is not stored. Under "zero" such a label has no place; k - 1 stands for it.
    """
    heat = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    plain = not isinstance(heat, Tensor) and heat == 1.0
    log_q = torch.log_softmax(student if plain else student / heat, -1)
    ours, theirs = log_q.gather(-1, ids), log_probs.to(log_q.dtype)
    found = ids == labels.unsqueeze(-1)
    where = torch.where(found.any(-1), found.int().argmax(-1), ids.shape[-1] - (rest == "zero"))
    if rest == "bucket":
        ours, theirs = (torch.cat([x, _leftover(x)], -1) for x in (ours, theirs))
    return ours if plain else ours * heat, theirs, where


def _leftover(log_p: Tensor) -> Tensor:
    """log(1 - sum p), at least log 1e-7 so that its slope stays finite."""
    return torch.log((1.0 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-7))
