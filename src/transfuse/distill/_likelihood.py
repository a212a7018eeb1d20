"""Log-probabilities of given tokens, without ever holding a batch's whole logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.batches import IGNORED
from ._base import Signal

__all__ = ["sequence_log_probs", "token_log_probs"]

_CHUNK_BYTES = 64 * 2**20  # one float32 copy of a chunk of logits
_LEAST_ROWS = 64


def token_log_probs(signal: Signal, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The log-probability of each labelled token given those before it.

    A chunk of tokens has logits at any moment; they are made again in the backward pass.

    Args:
        signal: Hidden states and head, or logits, `[N, T, .]`; row t speaks about the token at t + 1.
        labels: int64 `[N, T]`, -100 where there is none.
        temperature: Divides the logits.

    Returns:
        `[N, T - 1]`, float32 (float64 for float64 logits): column t is about the token at t + 1, 0 where unlabelled.
    """
    target = labels[:, 1:]
    keep = target != IGNORED
    where = keep.nonzero(as_tuple=True)
    head = signal.head if signal.hidden is not None else None
    source = signal.hidden if head is not None else signal.whole()
    assert source is not None

    def piece(rows: Tensor, tokens: Tensor) -> Tensor:
        logits = head(rows) if head is not None else rows
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        return torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    width = head.vocabulary if head is not None else source.shape[-1]
    size = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * width))
    pairs = zip(source[:, :-1][where].split(size), target[where].split(size), strict=True)
    values = torch.cat(
        [checkpoint(piece, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    )
    return values.new_zeros(keep.shape).index_put(where, values)


def sequence_log_probs(signal: Signal, labels: Tensor, *, mean: bool = False) -> Tensor:
    """The log-probability of each row's labelled tokens together, `[N]`; with `mean`, divided by their number.

    Args:
        signal: As for `token_log_probs`.
        labels: int64 `[N, T]`, -100 where there is none.
        mean: Per token.
    """
    total = token_log_probs(signal, labels).sum(1)
    return total / (labels[:, 1:] != IGNORED).sum(1).clamp_min(1) if mean else total
