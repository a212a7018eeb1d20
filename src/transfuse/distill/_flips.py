"""What one model gets right that another gets wrong: flips of predictions, per class, and how many were transferred."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.batches import IGNORED
from ..core.errors import BadInput, IncompatibleModels
from ._base import Reader, frozen

__all__ = [
    "Batches",
    "Flips",
    "Prepare",
    "aligned",
    "complementarity",
    "prediction_flips",
    "same_classes",
    "transfer_rate",
]

Batches = Iterable[Mapping[str, Any]] | Callable[[int], Iterable[Mapping[str, Any]]]
Prepare = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Flips:
    """How the answers of two models differ; "before" is the first one, "after" the second.

    Attributes:
        positive: Share of samples the first gets wrong and the second right (rho_pos).
        negative: Share the first gets right and the second wrong (rho_neg).
        accuracy_before: Of the first; `accuracy_after - accuracy_before` is `positive - negative`.
        accuracy_after: Of the second.
        positive_counts: Positive flips of each class, float64 `[C]`.
        negative_counts: Negative flips of each class.
    """

    positive: float
    negative: float
    accuracy_before: float
    accuracy_after: float
    positive_counts: Tensor
    negative_counts: Tensor

    @property
    def entropy(self) -> float:
        """Entropy in nats of the positive flips over classes; NaN without any flip."""
        total = float(self.positive_counts.sum())
        if total == 0:
            return math.nan
        share = self.positive_counts[self.positive_counts > 0] / total
        return float(-(share * share.log()).sum())

    def top_share(self, percent: float) -> float:
        """Share of the positive flips in the richest `percent` % of the classes (rounded up); NaN without any."""
        _check_percent(percent)
        total = float(self.positive_counts.sum())
        count = math.ceil(len(self.positive_counts) * percent / 100)
        return float(self._sorted()[0][:count].sum()) / total if total else math.nan

    def top_classes(self, percent: float) -> list[int]:
        """The fewest classes, richest first, that together hold `percent` % of the positive flips."""
        _check_percent(percent)
        counts, order = self._sorted()
        enough = counts.cumsum(0) >= counts.sum() * percent / 100 - 1e-9
        return order[: int(enough.int().argmax()) + 1].tolist() if float(counts.sum()) else []

    def _sorted(self) -> tuple[Tensor, Tensor]:
        found = torch.sort(self.positive_counts, descending=True, stable=True)
        return found.values, found.indices


def _check_percent(percent: float) -> None:
    if not 0 < percent <= 100:
        raise BadInput("percent", percent, "is not above 0 and up to 100", "give a percentage")


def prediction_flips(before: Tensor, after: Tensor, labels: Tensor, *, classes: int | None = None) -> Flips:
    """Compare two sets of predictions with the truth.

    Args:
        before: Predicted classes of the first model, int64 `[N]`.
        after: Of the second, `[N]`.
        labels: True classes, `[N]`; rows with -100 are left out.
        classes: Number of classes; one more than the largest number seen by default.

    Raises:
        BadInput: unequal lengths, or no labelled row.
    """
    before, after, labels = (torch.as_tensor(x).flatten().cpu() for x in (before, after, labels))
    if not len(before) == len(after) == len(labels):
        sizes = (len(before), len(after), len(labels))
        raise BadInput("labels", sizes, "rows of the three do not pair up", "give one per sample")
    keep = labels != IGNORED
    if not bool(keep.any()):
        raise BadInput("labels", len(labels), "rows, none with a class", "label some")
    before, after, labels = before[keep], after[keep], labels[keep]
    first, second = before == labels, after == labels
    size = int(torch.stack([before, after, labels]).max()) + 1 if classes is None else classes

    def share(which: Tensor) -> float:
        return float(which.double().mean())

    def counts(which: Tensor) -> Tensor:
        return torch.bincount(labels[which], minlength=size).double()

    won, lost = ~first & second, first & ~second
    return Flips(share(won), share(lost), share(first), share(second), counts(won), counts(lost))


def transfer_rate(start: Tensor, end: Tensor, teacher: Tensor, labels: Tensor) -> float:
    """How much of what the teacher had to offer arrived, in percent.

    100 times what the student gained over its own start in those classes where the teacher had positive flips
    over that start, divided by the number of these flips. Gains on other samples of these classes count, so that
    it can pass 100. NaN where the teacher has none.

    Args:
        start: The student's predictions before the transfer, int64 `[N]`.
        end: After it.
        teacher: The teacher's.
        labels: True classes; rows with -100 are left out.

    Raises:
        BadInput: unequal lengths, or no labelled row.
    """
    each = [torch.as_tensor(x).cpu() for x in (start, end, teacher, labels)]
    if not all(x.numel() for x in each):
        raise BadInput("labels", [x.numel() for x in each], "rows: some have none", "give one per sample")
    classes = int(torch.stack([x.max() for x in each]).max()) + 1
    offered = prediction_flips(start, teacher, labels, classes=classes).positive_counts
    gained = prediction_flips(start, end, labels, classes=classes).positive_counts
    total = float(offered.sum())
    return 100.0 * float(gained[offered > 0].sum()) / total if total else math.nan


def aligned(
    logits: Tensor, labels: Tensor | None, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The predicted rows of a batch: logits `[n, C]` and their classes `[n]`.

    Args:
        logits: `[B, C]`, or `[B, T, C]` per token.
        labels: `[B]` or `[B, T]`; -100 leaves a row out. None keeps all that are not padding.
        causal: The logits at t speak about the label at t + 1.
        mask: `[B, T]`, 0 where a token is padding.
    """
    if labels is None and mask is not None and mask.shape == logits.shape[:-1]:
        return logits[mask.bool()], None
    if causal:
        logits = logits[:, :-1]
        labels = None if labels is None else labels[:, 1:]
    if labels is None:
        return logits.flatten(0, -2), None
    keep = labels != IGNORED
    return logits[keep], labels[keep]


def labels_of(batch: Mapping[str, Any], *, causal: bool, needed: bool = False) -> Tensor | None:
    """The batch's labels; without any, a language model's are its own tokens.

    Raises:
        BadInput: there are none, and they are needed.
    """
    found = batch.get("labels")
    if found is None and causal:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    if found is None and needed:
        raise BadInput("batches", sorted(batch), "have no labels", "add a column `labels` to every batch")
    return found


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


@torch.no_grad()
def predictions(
    model: nn.Module, batches: Batches, prepare: Prepare | None = None
) -> tuple[Tensor, Tensor, int]:
    """A model's classes and the true ones over a data set, int64 `[N]` each, in evaluation mode; and their number.

    Raises:
        BadInput: the batches have no labels.
    """
    reader = Reader(model, fuse=False)
    guesses, truth, width = [], [], 0
    with frozen(model):
        for batch in batches(0) if callable(batches) else batches:
            labels = labels_of(batch, causal=reader.causal, needed=True)
            assert labels is not None
            logits = reader(batch if prepare is None else prepare(batch), grad=False).whole()
            width = logits.shape[-1]
            rows, classes = aligned(logits.to(labels.device), labels, causal=reader.causal)
            assert classes is not None
            guesses.append(rows.argmax(-1).cpu())
            truth.append(classes.cpu())
    if not guesses:
        raise BadInput("batches", "[]", "have no rows", "give at least one batch")
    return torch.cat(guesses), torch.cat(truth), width


def accuracy(model: nn.Module, batches: Batches, prepare: Prepare | None = None) -> float:
    """Share of a data set that a model gets right."""
    guesses, labels, _ = predictions(model, batches, prepare)
    return float((guesses == labels).double().mean())


def complementarity(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    inputs: tuple[Prepare | None, Prepare | None] = (None, None),
) -> Flips:
    """What `teacher` knows that `student` does not, and the reverse, on labelled data (section 3 of the paper).

    Args:
        student: A model that returns logits; a language model's tokens count as samples.
        teacher: Another with the same classes.
        batches: Batches with `labels`, in an order that does not change from one pass to the next.
        inputs: Each model's own preparation of a batch, where the two want different inputs.

    Raises:
        BadInput: no labels, or an order that changed between the passes.
        IncompatibleModels: other names of classes, or another number of them.
    """
    same_classes(student, teacher)
    (before, labels, ours), (after, again, theirs) = (
        predictions(model, batches, prepare)
        for model, prepare in zip((student, teacher), inputs, strict=True)
    )
    if ours != theirs:
        problem = f"classes of the teacher, the student has {ours}"
        raise IncompatibleModels("teacher", theirs, problem, "use models of one label space or vocabulary")
    if not torch.equal(labels, again):
        raise BadInput("batches", len(labels), "rows came in another order for the teacher", "do not shuffle")
    return prediction_flips(before, after, labels)
