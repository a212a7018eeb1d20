"""A student trained by ratios that are themselves trained: the slope through a virtual step, and the two optimizers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.errors import BadInput, NotApplicable
from ._base import logits_of, model_inputs

__all__ = ["Alternating", "Turns", "as_loss", "check_data", "epoch_of", "held_out_rows", "mixing_slopes"]


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
        exact: Differentiate through the step; False takes a central difference along the validation slope.

    Returns:
        The loss, a scalar without gradient, and one slope per parameter of `mixing`.
    """
    theta = {n: p.detach().requires_grad_() for n, p in student.named_parameters() if p.requires_grad}
    names, values = list(theta), list(theta.values())
    omega = list(mixing.parameters())
    with (
        sdpa_kernel(SDPBackend.MATH) if exact else contextlib.nullcontext()
    ):  # others have no second derivative
        logits = _virtual(student, theta, batch)
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
        value = _validation(student, moved, held)
        return value.detach(), list(torch.autograd.grad(value, omega, allow_unused=True))
    moved = {n: t.detach().requires_grad_() for n, t in moved.items()}
    value = _validation(student, moved, held)
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
            kd, ce = terms(_virtual(student, place, batch))
            ends.append(kd - ce)
    weights = -inner_lr / (2 * width) * (ends[0] - ends[1]) / len(ends[0])
    return value.detach(), list(torch.autograd.grad((alpha * weights.to(alpha.dtype)).sum(), omega))


def _virtual(student: nn.Module, parameters: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
    """The student's logits with other parameters, in its present mode; statistics and random state stay."""
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    inputs = model_inputs(student, batch)
    devices = {t.device for t in parameters.values() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        return logits_of(functional_call(student, (dict(parameters), buffers), (), inputs))


def _validation(student: nn.Module, parameters: Mapping[str, Tensor], held: Mapping[str, Any]) -> Tensor:
    logits = _virtual(student, parameters, held)
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
    """

    def __init__(self, batches: int, every: int):
        self.batches, self.every = batches, every
        self.flags = [flag for i in range(batches) for flag in ([False, True] if i % every == 0 else [True])]

    def inner(self, update: int) -> bool:
        """Whether update number `update`, from 0, is one of the student."""
        return self.flags[update % len(self.flags)]

    def count(self, updates: int) -> int:
        """How many of the first `updates` are the student's."""
        epochs, rest = divmod(updates, len(self.flags))
        return epochs * self.batches + sum(self.flags[:rest])

    def items(self, train: Iterable[Any], validation: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """An epoch: a training batch and a validation batch for the mixing network, a training batch for the student.

        Raises:
            BadInput: the epoch has another number of batches.
        """
        held = itertools.cycle(list(validation))
        seen = 0
        for seen, batch in enumerate(train, 1):
            if (seen - 1) % self.every == 0:
                yield {"batch": batch, "held": next(held)}
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


def held_out_rows(student: nn.Module, train: Iterable[Any], validation: Iterable[Any]) -> None:
    """Refuse empty validation data, and warn of rows that are trained on.

    Raises:
        BadInput: there is no validation batch.

    Warns:
        UserWarning: inputs of validation rows that are, bit for bit, among those of the training rows.
    """
    held = [digest for batch in validation for digest in _digests(student, batch)]
    if not held:
        raise BadInput("validation", 0, "rows are no data", "hold out some labelled samples")
    seen = {digest for batch in train for digest in _digests(student, batch)}
    shared = sum(digest in seen for digest in held)
    if shared:
        told = (
            f"{shared} of {len(held)} validation rows are in the training data: their labels are learned by heart, "
            "and the ratios fall towards the labels; hold them out"
        )
        warnings.warn(told, UserWarning, stacklevel=3)


def _digests(student: nn.Module, batch: Mapping[str, Any]) -> list[bytes]:
    """A hash of each row's inputs, without its padding."""
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
        found.append(digest.digest())
    return found
