"""The mixing network of TGeo-KD, and the triangle that it reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import BadInput

__all__ = ["Features", "TrilateralWeighting", "trilateral_features"]

Features = Literal["full", "edges", "vertices"]
_WIDTHS = {"full": 9, "edges": 3, "vertices": 4}


def trilateral_features(
    student: Tensor, teacher: Tensor, target: Tensor, mean: Tensor, kind: Features = "full"
) -> Tensor:
    """What the mixing network reads: corners and squared edges, element by element.

    Args:
        student: Probabilities S, `[B, C]`.
        teacher: Probabilities P, `[B, C]`.
        target: One-hot labels G, `[B, C]`.
        mean: The teacher's mean probabilities of each sample's class, Pbar, `[B, C]`.
        kind: "full", "edges" (those at S) or "vertices".

    Returns:
        `[B, 9C]`, `[B, 3C]` or `[B, 4C]`, in the order of the module's formula.
    """
    corners = [student, teacher, target, mean]
    near = [(mean - student) ** 2, (target - student) ** 2, (teacher - student) ** 2]
    far = [(teacher - target) ** 2, (mean - target) ** 2]
    chosen = {"full": corners + near + far, "edges": near, "vertices": corners}
    return torch.cat(chosen[kind], dim=-1)


class TrilateralWeighting(nn.Module):
    """The mixing network: from student, teacher and label to a ratio per sample.

    Args:
        num_classes: C.
        hidden: Widths of its hidden layers, each followed by a leaky ReLU.
        features: What it reads; see `trilateral_features`.

    Attributes:
        means: Pbar, a buffer `[C, C]`; uniform until it is set.

    Raises:
        BadInput: an argument out of range.
    """

    means: Tensor

    def __init__(self, num_classes: int, *, hidden: Sequence[int] = (32, 16), features: Features = "full"):
        super().__init__()
        if num_classes < 2:
            raise BadInput("num_classes", num_classes, "is below 2", "give the number of classes")
        if features not in _WIDTHS:
            raise BadInput("features", features, "is not known", f"use one of {', '.join(_WIDTHS)}")
        if any(width < 1 for width in hidden):
            raise BadInput("hidden", tuple(hidden), "holds a width below 1", "give positive widths")
        self.num_classes, self.features = num_classes, features
        widths = [_WIDTHS[features] * num_classes, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.LeakyReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.register_buffer("means", torch.full((num_classes, num_classes), 1.0 / num_classes))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The ratios; they take a gradient by this network's weights only.

        Args:
            student: Logits `[B, C]`.
            teacher: Logits `[B, C]`.
            labels: int64 `[B]`.

        Returns:
            alpha `[B]`, between 0 and 1, in float32 (float64 for a network in float64).
        """
        dtype = self.means.dtype
        s, p = (torch.softmax(z.detach().to(dtype), dim=-1) for z in (student, teacher))
        target = nn.functional.one_hot(labels, self.num_classes).to(dtype)
        with torch.autocast(student.device.type, enabled=False):
            delta = trilateral_features(s, p, target, self.means[labels], self.features)
            return torch.sigmoid(self.net(delta)).squeeze(-1)
