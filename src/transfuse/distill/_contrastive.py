"""A contrastive distance of hidden states: of all the teacher's states in the batch, a token finds its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput
from ._base import Signal
from ._features import HiddenStates, thinned

__all__ = ["Contrastive", "contrastive_terms"]


def contrastive_terms(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE with the other rows as negatives: -log softmax_j(cos(s_i, t_j) / temperature) at j = i.

    Args:
        student: `[n, D]`.
        teacher: Of the same shape, its rows beside the student's.
        temperature: Divides the cosines.

    Returns:
        `[n]`, at least 0; log n where all rows of the teacher are alike.
    """
    ours, theirs = (nn.functional.normalize(x, dim=-1) for x in (student, teacher))
    return -torch.log_softmax(ours @ theirs.T / temperature, -1).diagonal()


class Contrastive(HiddenStates):
    """InfoNCE between W h_S and h_T, a mean over the batch's tokens that are not padding and over pairs of layers.

    A token's own state in the teacher is the positive, those of all other tokens of the batch are the negatives: so it
    is a figure of the batch (of a micro-batch on one process), not a sum over tokens. Only directions count, and only
    as far as they tell tokens apart: where MSE asks for equal states, this asks for the teacher's neighbourhoods.

    Args:
        temperature: Divides the cosines; the default is that of contrastive representation distillation.
        max_tokens: Most tokens of a batch, spread evenly over it: time and memory grow with their square.
        project: Put a map between; None where the widths differ.
        layers: As for `LayerObjective`, like the following.
        kd_weight: Weight of the distance.
        ce_weight: Weight of the cross-entropy with the labels.

    Raises:
        BadInput: an argument out of range.
    """

    additive = False

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        max_tokens: int = 1024,
        project: bool | None = None,
        layers: Sequence[tuple[int, int]] | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        super().__init__(project=project, layers=layers, kd_weight=kd_weight, ce_weight=ce_weight)
        if not 0 < temperature < float("inf"):
            raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
        if max_tokens < 2:
            raise BadInput("max_tokens", max_tokens, "is below 2", "give more")
        self.temperature, self.max_tokens = temperature, max_tokens

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """None."""
        return {}

    def distance(self, student: Signal, teacher: Signal, batch: Mapping[str, Any]) -> Tensor:
        pairs = [thinned(*each, self.max_tokens) for each in self.chosen(student, teacher, batch)]
        return torch.stack([contrastive_terms(*each, self.temperature).mean() for each in pairs]).mean()
