"""One phase of learning a task: which parameters move, and which epoch is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput
from transfuse.core.training import loop

from ._arguments import check_labels

if TYPE_CHECKING:
    from .exssnet import ExSSNet

__all__ = ["Batches", "Phase", "pairs"]

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
"""Batches that can be gone through once per epoch, or a function of the epoch that gives them (`minibatches`); each
a pair (inputs, labels) or a mapping with `x` and `y`."""


def _check_batches(batches: Any, argument: str) -> None:
    """Refuse what gives its batches only once, or none ever: every epoch goes through them again."""
    remedy = "give a list, a DataLoader, or a function of the epoch"
    if isinstance(batches, Iterator):
        raise BadInput(argument, type(batches).__name__, "can be gone through only once", remedy)
    if not callable(batches) and not isinstance(batches, Iterable):
        raise BadInput(argument, batches, "holds no batches", remedy)


def pairs(batches: Batches, number: int, argument: str = "batches") -> Iterator[tuple[Any, Tensor]]:
    """The pairs of one epoch.

    Raises:
        BadInput: there are none.
    """
    empty = True
    for batch in batches(number) if callable(batches) else batches:
        empty = False
        yield (batch["x"], batch["y"]) if isinstance(batch, Mapping) else (batch[0], batch[1])
    if empty:
        remedy = "give at least one, and something that can be gone through again"
        raise BadInput(argument, type(batches).__name__, f"gives no batch in epoch {number}", remedy)


class Phase:
    """Training of one task with Adam: the last epoch's state, or the best on the validation data.

    Raises:
        BadInput: batches that can be gone through only once.
    """

    def __init__(self, learner: ExSSNet, num_classes: int, batches: Batches, validation: Batches | None):
        _check_batches(batches, "batches")
        if validation is not None:
            _check_batches(validation, "validation")
        self.learner, self.num_classes, self.batches, self.validation = (
            learner, num_classes, batches, validation,
        )  # fmt: skip

    def __call__(
        self, parameters: list[Any], lr: float, epochs: int, from_start: bool = False
    ) -> list[float]:
        """Train; `from_start` lets the state before the first epoch win. Returns the validation accuracies."""
        optimizer = torch.optim.Adam(parameters, lr=lr)
        moving = [*parameters, *(b for norm in self.learner.norms for b in norm.norms[norm.task].buffers())]
        curve: list[float] = []
        best: tuple[float, list[Tensor]] = (-1.0, [])

        def judge() -> float:
            nonlocal best
            assert self.validation is not None
            right = self._accuracy(self.validation)
            if right > best[0]:
                best = (right, [tensor.detach().clone() for tensor in moving])
            return right

        def epoch(number: int) -> Iterator[tuple[Any, Tensor]]:
            if self.learner.schedule == "cosine":
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * number / epochs)) / 2
            yield from pairs(self.batches, number)
            if self.validation is not None:  # reached after the epoch's last update
                curve.append(judge())

        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            if from_start and self.validation is not None:
                judge()
            loop(
                self.learner.model, epoch, self._loss, optimizer=optimizer, epochs=epochs,
                seed=self.learner.seed,
            )  # fmt: skip
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        with torch.no_grad():
            for tensor, kept in zip(moving, best[1], strict=False):
                tensor.copy_(kept)
        return curve

    def _loss(self, batch: tuple[Any, Tensor]) -> Tensor:
        x, y = batch
        check_labels(y, self.num_classes)
        return nn.functional.cross_entropy(self.learner.model(x)[:, : self.num_classes], y.long())

    def _accuracy(self, batches: Batches) -> float:
        right = total = 0
        for x, y in pairs(batches, 0, "validation"):
            guesses = self.learner.evaluated(x)[:, : self.num_classes].argmax(-1)
            right, total = right + int((guesses.cpu() == y.cpu()).sum()), total + len(y)
        return right / total
