"""Learning tasks in a row: which earlier task is near, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_positive

__all__ = ["Sources", "average_accuracy", "forgetting", "knn_accuracy", "nearest_tasks", "sparse_overlap"]

Sources = Literal["best", "always", "all"]
"""Which earlier tasks' scores start a new one: the best above chance, the best, the mean of all above chance."""


def knn_accuracy(features: Tensor, labels: Tensor, neighbours: int = 200) -> float:
    """How well a k-nearest-neighbour vote among the first 66 % of the rows names the labels of the others.

    Euclidean distances; of classes with equally many votes the smallest wins. k is at most the number of rows voting.

    Args:
        features: `[n, d]`.
        labels: int64 `[n]`.
        neighbours: k.

    Returns:
        Share right.

    Raises:
        BadInput: fewer than three rows, or k below 1.
    """
    check_positive(neighbours=neighbours)
    known = int(0.66 * len(features))
    if known < 1 or known == len(features):
        raise BadInput("features", len(features), "are too few rows to split", "give at least three")
    votes = torch.cdist(features[known:].double(), features[:known].double())
    near = labels[:known][votes.topk(min(neighbours, known), largest=False).indices]
    counts = torch.nn.functional.one_hot(near, int(labels.max()) + 1).sum(1)
    return float((counts.argmax(1) == labels[known:]).double().mean())


def nearest_tasks(accuracies: Sequence[float], num_classes: int, sources: Sources = "best") -> list[int]:
    """The tasks whose scores start the next one, by the k-nearest-neighbour accuracies of their masks.

    Args:
        accuracies: One per earlier task.
        num_classes: Of the new task; 1 / num_classes is chance.
        sources: See `Sources`.

    Returns:
        Numbers of tasks; none where no task passes.
    """
    if not accuracies:
        return []
    best = max(range(len(accuracies)), key=accuracies.__getitem__)
    passed = [i for i, accuracy in enumerate(accuracies) if accuracy > 1 / num_classes]
    if sources == "all":
        return passed
    return [best] if sources == "always" or best in passed else []


def average_accuracy(matrix: Tensor) -> float:
    """Mean accuracy over all tasks after the last one: the mean of the last row of `[T, T]`."""
    return float(matrix[-1].mean())


def forgetting(matrix: Tensor) -> float:
    """Mean over the earlier tasks of (best accuracy before the last task was learnt - accuracy at the end).

    Args:
        matrix: `[T, T]`: row i holds the accuracies on tasks 0 to i after task i was learnt; the rest is not read.

    Returns:
        0 for a single task; negative where learning on helped.
    """
    last = len(matrix) - 1
    lost = [float(matrix[task:last, task].max() - matrix[last, task]) for task in range(last)]
    return sum(lost) / len(lost) if lost else 0.0


def sparse_overlap(masks: Sequence[Sequence[Tensor]]) -> list[float]:
    """Per task, the share of its kept weights that some earlier task keeps too.

    Args:
        masks: One bool tensor per layer, for each task.
    """
    shares, used = [], [torch.zeros_like(mask) for mask in masks[0]]
    for task in masks:
        common = sum(int((mask & before).sum()) for mask, before in zip(task, used, strict=True))
        shares.append(common / sum(int(mask.sum()) for mask in task))
        used = [mask | before for mask, before in zip(task, used, strict=True)]
    return shares
