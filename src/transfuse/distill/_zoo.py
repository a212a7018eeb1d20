"""Small tools between models of one label space: who is surer, calibration, averages of weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.batches import IGNORED
from ..core.errors import BadInput, IncompatibleModels
from ..core.training import seeded
from ._base import Reader, frozen
from ._flips import Batches, Prepare, labels_of

__all__ = ["calibrate", "choose", "compared", "confidence", "follow", "soup", "widened"]


def confidence(logits: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0) -> Tensor:
    """How sure a model is of each row: the probability of the true class, or without labels the largest one.

    Args:
        logits: `[n, C]`; computed in float32 at least.
        labels: int64 `[n]`, or None.
        temperature: Divides the logits.

    Returns:
        `[n]`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    p = torch.softmax(logits, -1)
    return p.amax(-1) if labels is None else p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _odds(logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """The log-odds of `confidence`, log p - log(1 - p): it orders as p does, also where p rounds to 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    index = (logits.argmax(-1) if labels is None else labels).unsqueeze(-1)
    others = torch.logsumexp(logits.scatter(-1, index, -torch.inf), -1)
    return logits.gather(-1, index).squeeze(-1) - others


@torch.no_grad()
def choose(
    frozen_student: Tensor,
    teachers: Iterable[Tensor],
    labels: Tensor | None = None,
    *,
    temperatures: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """For every row, the logits of the surest of all models (section 4.2); of equals, the first.

    Args:
        frozen_student: Logits `[n, C]` of the student at its start.
        teachers: Logits of each teacher, the same shape; taken one after the other.
        labels: True classes `[n]` (supervised), or None.
        temperatures: One for the student and each teacher, for the comparison alone.

    Returns:
        The target logits `[n, C]`, and whose they are, int64 `[n]`: 0 the student's, k those of teacher k.

    Raises:
        BadInput: another number of temperatures than of models.
    """
    heat = itertools.chain(temperatures or (), itertools.repeat(1.0))
    best, target, count = _odds(frozen_student, labels, next(heat)), frozen_student, 1
    who = torch.zeros(best.shape, dtype=torch.int64, device=best.device)
    for k, logits in enumerate(teachers, 1):
        sure, count = _odds(logits, labels, next(heat)), k + 1
        better = sure > best
        best = torch.where(better, sure, best)
        target = torch.where(better.unsqueeze(-1), logits, target)
        who = who.masked_fill(better, k)
    if temperatures is not None and len(temperatures) != count:
        problem = f"entries, for {count} models"
        raise BadInput(
            "temperatures", len(temperatures), problem, "give the student's first, then each teacher's"
        )
    return target, who


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which a model's probabilities fit labels best (least cross-entropy), within 0.01 to 100.

    The cross-entropy is convex in 1 / T; the root of its slope is found by bisection. 1 where T changes nothing.

    Args:
        logits: `[n, C]` on samples the model was not trained on; -inf is a class that is ruled out.
        labels: `[n]`; rows with -100 are left out, and so are those whose class is ruled out: no temperature fits them.

    Raises:
        BadInput: logits that are NaN or infinite, labels that do not pair up, or no row that is left.
    """
    z = logits.detach().double()
    if bool((z.isnan() | (z == torch.inf)).any()):
        raise BadInput("logits", tuple(z.shape), "hold NaN or infinity", "give a model's finite logits")
    if z.shape[:-1] != labels.shape:
        raise BadInput(
            "labels", tuple(labels.shape), f"do not pair up with {tuple(z.shape)}", "give one per row"
        )
    keep = labels != IGNORED
    z, labels = z[keep], labels[keep].unsqueeze(-1)
    fits = z.gather(-1, labels).squeeze(-1) > -torch.inf
    z, labels = z[fits], labels[fits]
    if not len(z):
        raise BadInput("labels", keep.numel(), "rows, none with a class to fit", "label some")
    z = z - z.amax(-1, keepdim=True)
    if not bool(((z < 0) & z.isfinite()).any()):
        return 1.0
    gold = z.gather(-1, labels).mean()
    z = z.clamp_min(torch.finfo(z.dtype).min)  # 0 log 0 = 0
    low, high = -2.0, 2.0  # log10 of the inverse temperature
    for _ in range(60):
        middle = (low + high) / 2
        expected = (torch.softmax(z * 10**middle, -1) * z).sum(-1).mean()
        low, high = (middle, high) if float(expected - gold) < 0 else (low, middle)
    return float(10 ** -((low + high) / 2))


def soup(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several state dicts of one architecture; whole numbers are the first one's.

    Raises:
        BadInput: no state dict.
        IncompatibleModels: other names or shapes.
    """
    if not states:
        raise BadInput("states", "[]", "have no mean", "give at least one state dict")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    for k, found in enumerate(shapes):
        if found != shapes[0]:
            odd = sorted(name for name in found | shapes[0] if found.get(name) != shapes[0].get(name))[0]
            problem = f"has another {odd!r} than the first"
            raise IncompatibleModels(
                f"states[{k}]", tuple(found.get(odd, ())), problem, "average one architecture"
            )
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first.clone()
        for name, first in states[0].items()
    }


def widened(model: nn.Module) -> nn.Module:
    """A copy with its floating numbers in float32 at least: steps of 1 - tau are lost in half precision."""
    made = copy.deepcopy(model)
    for value in itertools.chain(made.parameters(), made.buffers()):
        if value.is_floating_point():
            value.data = value.data.to(torch.promote_types(value.dtype, torch.float32))
    return made


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, tau: float) -> None:
    """theta_slow <- tau theta_slow + (1 - tau) theta, buffers too; whole numbers are copied."""
    now = fast.state_dict()
    for name, value in slow.state_dict().items():
        if value.is_floating_point():
            value.lerp_(now[name].to(value.dtype), 1.0 - tau)
        else:
            value.copy_(now[name])


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
        labels_of(batch, causal=reader.causal, needed=labels)
    for k, size in enumerate(sizes[1:]):
        if size != sizes[0]:
            problem = f"logits of teacher {k}, the student has {tuple(sizes[0])}"
            remedy = "use models of one label space or vocabulary"
            raise IncompatibleModels("teachers", tuple(size), problem, remedy)
    return int(sizes[0][0])
