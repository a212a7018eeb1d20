"""Checks of numbers and labels that adapters share."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import BadInput

__all__ = ["check_labels", "check_number"]


def check_number(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is no finite number above 0 (or 0, with `zero`), naming the argument.

    Raises:
        BadInput: it is not.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise BadInput(name, value, "is no finite number", "give one")
    if value < 0 or (value == 0 and not zero):
        problem = "is negative" if zero else "is not positive"
        raise BadInput(name, value, problem, "give 0 or more" if zero else "give a number above 0")


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
