"""A student trained by ratios that are themselves trained: the slope through a virtual step, and the two optimizers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import BadInput, NotApplicable
from ._base import logits_of, model_inputs

__all__ = [
    "Alternating",
    "Turns",
    "as_loss",
    "check_data",
    "check_labels",
    "check_optimizer",
    "epoch_of",
    "held_out_rows",
    "mixing_slopes",
]


def mixing_slopes(
    student: nn.Module,
    mixing: nn.Module,
    batch: Mapping[str, Any],
    teacher: Tensor,
    held: Mapping[str, Any],
    *,
    terms: Callable[[Tensor], tuple[Tensor, Tensor]],
    inner_lr: float,
    exact: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """The validation loss after one virtual step of the student, and its slope by the mixing network.

    Args:
        student: A classifier; its parameters, buffers and mode, and the random state, are left as they are.
        mixing: (student logits, teacher logits, labels) -> ratios `[B]`.
        batch: Training samples with `labels`.
        teacher: The teacher's logits of them, `[B, C]`.
        held: Validation samples with `labels`.
        terms: From the student's logits of the batch to the terms whose weights are the ratio and 1 - ratio, `[B]`.
        inner_lr: Length of the virtual step of plain gradient descent.
        exact: Differentiate through the step; False takes a central difference along the validation slope, with the
            student in float32 at least: in bf16 the shift would be lost in rounding.

    Returns:
        The loss, a scalar without gradient, and one slope per parameter of `mixing`.
    """
    said = functools.partial(_virtual, student, wide=not exact)
    theta = {
        n: (p.detach() if exact else _wide(p.detach())).requires_grad_()
        for n, p in student.named_parameters()
        if p.requires_grad
    }
    names, values = list(theta), list(theta.values())
    omega = list(mixing.parameters())
    with (
        sdpa_kernel(SDPBackend.MATH) if exact else contextlib.nullcontext()
    ):  # others have no second derivative
        logits = said(theta, batch)
    alpha = mixing(logits, teacher, batch["labels"])
    kd, ce = terms(logits)
    used = alpha if exact else alpha.detach()
    loss = (used * kd + (1.0 - used) * ce).mean()
    slopes = torch.autograd.grad(loss, values, create_graph=exact, allow_unused=True)
    moved = {
        n: t if slope is None else t.detach() - inner_lr * slope
        for n, t, slope in zip(names, values, slopes, strict=True)
    }
    if exact:
        value = _validation(said(moved, held), held)
        return value.detach(), list(torch.autograd.grad(value, omega, allow_unused=True))
    moved = {n: t.detach().requires_grad_() for n, t in moved.items()}
    value = _validation(said(moved, held), held)
    ahead = torch.autograd.grad(value, list(moved.values()), allow_unused=True)
    norm = torch.sqrt(sum((v.float().square().sum() for v in ahead if v is not None), torch.zeros(())))
    if not norm > 0:
        return value.detach(), [None] * len(omega)
    width = 0.01 / float(norm)
    ends = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            place = {
                n: t if v is None else t + sign * width * v
                for n, t, v in zip(names, values, ahead, strict=True)
            }
            kd, ce = terms(said(place, batch))
            ends.append(kd - ce)
    weights = -inner_lr / (2 * width) * (ends[0] - ends[1]) / len(ends[0])
    return value.detach(), list(torch.autograd.grad((alpha * weights.to(alpha.dtype)).sum(), omega))


def _virtual(
    student: nn.Module, parameters: Mapping[str, Tensor], batch: Mapping[str, Any], *, wide: bool = False
) -> Tensor:
    """The student's logits with other parameters, in its present mode; statistics and random state stay.

    With `wide` everything is in float32 at least.
    """
    fit = _wide if wide else (lambda value: value)
    still = {name: p.detach() for name, p in student.named_parameters() if name not in parameters}
    still |= {name: buffer.clone() for name, buffer in student.named_buffers()}
    held = {name: fit(value) for name, value in {**still, **parameters}.items()}
    inputs = {name: fit(value) for name, value in model_inputs(student, batch).items()}
    places = {t.device for t in parameters.values()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[d for d in places if d.type == "cuda"]))
        if wide:
            for kind in {place.type for place in places}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        return logits_of(functional_call(student, held, (), inputs))


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.promote_types(value.dtype, torch.float32)) if floating else value


def _validation(logits: Tensor, held: Mapping[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), held["labels"]
    )


def as_loss(value: Tensor, parameters: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Tensor:
    """A scalar of this value whose gradient by `parameters` is `slopes`."""
    loss = value.detach()
    for parameter, slope in zip(parameters, slopes, strict=True):
        if slope is not None:
            loss = loss + ((parameter - parameter.detach()) * slope.detach()).sum()
    return loss


class Alternating(torch.optim.Optimizer):
    """Two optimizers as one, for updates that give a gradient to the parameters of one of them at a time.

    A parameter without gradient is left alone by torch's optimizers, its momentum and weight decay as well.

    Args:
        first: An optimizer.
        second: One over other parameters.

    Raises:
        BadInput: a parameter that both hold.
    """

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        held = [{id(p) for group in each.param_groups for p in group["params"]} for each in (first, second)]
        if held[0] & held[1]:
            raise BadInput("optimizer", type(first).__name__, "holds the other's parameters", "separate them")
        self.parts = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state."""
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    def step(self, closure: Any = None) -> Any:
        """A step of both."""
        value = None
        for part in self.parts:
            value = part.step(closure)
        return value

    def load_state_dict(self, state_dict: Any) -> None:
        """As any optimizer's."""
        super().load_state_dict(state_dict)
        self._share()


def epoch_of(batches: Iterable[Any] | Callable[[int], Iterable[Any]], number: int) -> Iterable[Any]:
    """The batches of an epoch, of what `core.training.loop` takes."""
    return batches(number) if callable(batches) else batches


class Turns:
    """The order of updates: one of the mixing network, then the student's, until it is due again.

    Args:
        batches: Training batches per epoch.
        every: Updates of the student per update of the mixing network; each epoch begins with one of the latter.
        held: Validation batches per pass.
    """

    def __init__(self, batches: int, every: int, held: int):
        self.batches, self.every, self.held = batches, every, held
        self.flags = [flag for i in range(batches) for flag in ([False, True] if i % every == 0 else [True])]

    def inner(self, update: int) -> bool:
        """Whether update number `update`, from 0, is one of the student."""
        return self.flags[update % len(self.flags)]

    def count(self, updates: int) -> int:
        """How many of the first `updates` are the student's."""
        epochs, rest = divmod(updates, len(self.flags))
        return epochs * self.batches + sum(self.flags[:rest])

    def items(
        self, train: Iterable[Any], validation: Callable[[int], Iterable[Any]], epoch: int
    ) -> Iterator[dict[str, Any]]:
        """An epoch: a training batch and a validation batch for the mixing network, a training batch for the student.

        Args:
            train: The epoch's batches.
            validation: From the number of a pass to its batches, always the same ones. Passes go on over epochs.
            epoch: Its number.

        Raises:
            BadInput: the epoch, or a pass over the validation data, has another number of batches.
        """
        due = epoch * sum(not flag for flag in self.flags)
        number, row = -1, list[Any]()
        seen = 0
        for seen, batch in enumerate(train, 1):
            if (seen - 1) % self.every == 0:
                if due // self.held != number:
                    number = due // self.held
                    row = list(validation(number))
                    if len(row) != self.held:
                        problem = f"batches follow a pass of {self.held}"
                        raise BadInput("validation", len(row), problem, "give equal epochs")
                yield {"batch": batch, "held": row[due % self.held]}
                due += 1
            yield {"batch": batch}
        if seen != self.batches:
            raise BadInput("train", seen, f"batches follow an epoch of {self.batches}", "give equal epochs")


def check_data(train: Any, validation: Any) -> None:
    """Refuse what the two levels cannot be trained on.

    Raises:
        BadInput: no validation data; iterators, which can be gone through only once.
        NotApplicable: more than one process.
    """
    if validation is None:
        remedy = "hold out some labelled samples: the ratios are learned from them"
        raise BadInput("validation", None, "is missing", remedy)
    for name, value in (("train", train), ("validation", validation)):
        if isinstance(value, Iterator):
            kind = type(value).__name__
            raise BadInput(name, kind, "can be gone through only once", "give a list or loader")
    count = PartialState().num_processes
    if count > 1:  # in an update, either network has no gradient; processes would share zeros for it
        raise NotApplicable("student", f"{count} processes", "train it at once", "use one process")


def check_labels(batch: Mapping[str, Any], classes: int, argument: str) -> Tensor:
    """The labels of a batch, on the CPU.

    Raises:
        BadInput: they are not one class below `classes` per sample.
    """
    labels: Tensor = batch["labels"].detach().cpu()
    whole = labels.dim() == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        problem = f"has labels that are not classes below {classes}"
        shown = f"{labels.dtype} {tuple(labels.shape)}"
        raise BadInput(argument, shown, problem, "give one class number per sample")
    return labels


def check_optimizer(optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Refuse an optimizer of something else.

    Raises:
        BadInput: it holds no parameter, or one that is not the student's.
    """
    own = {id(p) for p in student.parameters()}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if not held or any(each not in own for each in held):
        problem, remedy = "is not over the student's parameters", "make it of student.parameters()"
        raise BadInput("optimizer", type(optimizer).__name__, problem, remedy)


def held_out_rows(
    student: nn.Module, train: Iterable[Any], validation: Iterable[Any], classes: int | None = None
) -> tuple[int, str]:
    """Refuse validation data that are none, and warn of rows that are trained on.

    Args:
        student: Whose inputs make a row.
        train: An epoch of batches.
        validation: The same.
        classes: Check the validation labels to be classes below it.

    Returns:
        The number of validation batches, and a text that differs when rows or labels do, whatever their order.

    Raises:
        BadInput: there is no validation batch, or a label that is no class.

    Warns:
        UserWarning: inputs of validation rows that are, bit for bit, among those of the training rows.
    """
    held, count = Counter[tuple[bytes, str]](), 0
    for batch in validation:
        count += 1
        if classes is not None:
            check_labels(batch, classes, "validation")
        held.update(_digests(student, batch))
    if not held:
        raise BadInput("validation", 0, "rows are no data", "hold out some labelled samples")
    learnt = Counter(digest for batch in train for digest in _digests(student, batch))
    seen = {row for row, _ in learnt}
    shared = sum(times for (row, _), times in held.items() if row in seen)
    if shared:
        told = (
            f"{shared} of {held.total()} validation rows are in the training data: their labels are learned by heart, "
            "and the ratios fall towards the labels; hold them out"
        )
        warnings.warn(told, UserWarning, stacklevel=3)
    known = hashlib.sha256(repr([sorted(rows.items()) for rows in (learnt, held)]).encode())
    return count, known.hexdigest()


def _digests(student: nn.Module, batch: Mapping[str, Any]) -> list[tuple[bytes, str]]:
    """A hash of each row's inputs, without its padding, and its label."""
    inputs = {name: value for name, value in model_inputs(student, batch).items() if name != "position_ids"}
    mask = inputs.get("attention_mask")
    found = []
    for i in range(len(batch["labels"])):
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(inputs):
            row = inputs[name][i]
            if mask is not None and row.shape[:1] == mask.shape[1:]:
                row = row[mask[i].bool()]
            digest.update(row.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found.append((digest.digest(), repr(batch["labels"][i].tolist())))
    return found
