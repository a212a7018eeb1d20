"""Checks of numbers and labels that adapters share."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_number

__all__ = ["check_labels", "check_number"]


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not one class number per row.

    Raises:
        BadInput: none at all, another shape than `[rows]`, no integers, or one outside [0, classes).
    """
    if labels.dim() != 1 or len(labels) == 0:
        raise BadInput(
            "labels", tuple(labels.shape), "is not the shape [rows]", "give a class number per row"
        )
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise BadInput("labels", str(labels.dtype), "is no kind of integer", "give class numbers, int64")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        problem = f"are not all in [0, {classes})"
        raise BadInput("labels", sorted(set(labels.tolist())), problem, "number the classes from 0")
