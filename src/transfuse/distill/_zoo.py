"""Small tools between models of one label space: calibration, averages of weights, names of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, IncompatibleModels
from ..core.training import seeded
from ._base import Reader, frozen
from ._flips import Batches, Prepare, labels_of

__all__ = ["calibrate", "compared", "follow", "same_classes", "soup"]


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which a model's probabilities fit labels best (least cross-entropy), within 0.01 to 100.

    The cross-entropy is convex in 1 / T; the root of its slope is found by bisection.

    Args:
        logits: `[n, C]` on samples the model was not trained on.
        labels: `[n]`.
    """
    z = logits.detach().double()
    z = z - z.amax(-1, keepdim=True)
    gold = z.gather(-1, labels.unsqueeze(-1)).mean()
    low, high = -2.0, 2.0  # log10 of the inverse temperature
    for _ in range(60):
        middle = (low + high) / 2
        expected = (torch.softmax(z * 10**middle, -1) * z).sum(-1).mean()
        low, high = (middle, high) if float(expected - gold) < 0 else (low, middle)
    return float(10 ** -((low + high) / 2))


def soup(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several state dicts of one architecture; whole numbers are the first one's."""
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first.clone()
        for name, first in states[0].items()
    }


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    """theta_slow <- tau theta_slow + (1 - tau) theta, buffers too; whole numbers are copied."""
    now = fast.state_dict()
    for name, value in slow.state_dict().items():
        if value.is_floating_point():
            value.lerp_(now[name].to(value.dtype), 1.0 - tau)
        else:
            value.copy_(now[name])


def same_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse classifiers of transformers whose classes have other names or another order.

    Raises:
        IncompatibleModels: a class of the same number has two names. Names that were never given do not count.
    """
    ours, theirs = (getattr(getattr(model, "config", None), "id2label", None) for model in (student, teacher))
    if not ours or not theirs or Reader(student, fuse=False).causal:
        return
    unnamed = [{i: f"LABEL_{i}" for i in names} for names in (ours, theirs)]
    if ours == unnamed[0] or theirs == unnamed[1]:
        return
    for i in ours:
        if ours[i] != theirs.get(i):
            problem = f"is {theirs.get(i)!r} to the teacher and {ours[i]!r} to the student"
            raise IncompatibleModels("class", i, problem, "bring the labels into one order")


def compared(
    models: Sequence[nn.Module],
    inputs: Sequence[Prepare | None],
    batches: Batches,
    *,
    labels: bool,
    seed: int,
) -> int:
    """Run all models on the first batch and compare their logits.

    Args:
        models: The student, then its teachers.
        inputs: What each does to a batch first.
        batches: The data; looking at them moves no random state.
        labels: Whether they must have some.
        seed: Of the look.

    Returns:
        The batch's number of rows.

    Raises:
        BadInput: no batch, or no labels.
        IncompatibleModels: another number of classes.
    """
    with seeded(seed):
        batch = next(iter(batches(0) if callable(batches) else batches), None)
    if batch is None:
        raise BadInput("batches", "[]", "have no rows", "give at least one batch")
    sizes = []
    for model, prepare in zip(models, inputs, strict=True):
        reader = Reader(model, fuse=False)
        with frozen(model):
            sizes.append(reader(batch if prepare is None else prepare(batch), grad=False).whole().shape)
        if labels and labels_of(batch, causal=reader.causal) is None:
            raise BadInput("batches", sorted(batch), "have no labels", 'add `labels`, or use "confidence"')
    for k, size in enumerate(sizes[1:]):
        if size != sizes[0]:
            problem = f"logits of teacher {k}, the student has {tuple(sizes[0])}"
            remedy = "use models of one label space or vocabulary"
            raise IncompatibleModels("teachers", tuple(size), problem, remedy)
    return int(sizes[0][0])
