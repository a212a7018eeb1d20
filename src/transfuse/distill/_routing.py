"""Terms of cross-modal distillation from several teachers: co-training, routing, balance; and the routers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.divergence import kl_terms

__all__ = [
    "Balance",
    "Best",
    "DenseGate",
    "Gate",
    "Route",
    "Stages",
    "cross_entropy",
    "kd_terms",
    "load_balance",
    "routed_terms",
    "together",
]

Route = Literal["hard", "soft", "st", "random"]
Balance = Literal["kl", "cv"]


def kd_terms(student: Tensor, teacher: Tensor, *, tau: float = 4.0) -> Tensor:
    """KD(student <- teacher) of each sample; gradients pass to both sides.

    Args:
        student: Logits `[B, C]`, or `[B, C, ...]` of a dense prediction, whose places are averaged.
        teacher: The same of the teacher.
        tau: Temperature.

    Returns:
        `[B]`, float32 (float64 for float64 logits).
    """
    log_q, log_p = (
        torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1) / tau, dim=-1)
        for x in (student, teacher)
    )
    return tau**2 * kl_terms(log_p, log_q).reshape(len(log_q), -1).mean(1)


def together(logits: Sequence[Tensor], labels: Tensor, *, tau: float = 4.0) -> Tensor:
    """The loss of stage 1: every model's cross-entropy, and KD over every ordered pair.

    Args:
        logits: `[B, C]` of each model.
        labels: int64 `[B]`.
        tau: Temperature.

    Returns:
        A scalar, a mean over the batch.
    """
    total = torch.stack([cross_entropy(each, labels) for each in logits]).sum()
    for i, ours in enumerate(logits):
        for j, theirs in enumerate(logits):
            if i != j:
                total = total + kd_terms(ours, theirs, tau=tau).mean()
    return total


def routed_terms(
    student: Tensor, teachers: Tensor, shares: Tensor, *, k: int = 1, gate: Route = "hard", tau: float = 4.0
) -> tuple[Tensor, Tensor]:
    """The distillation term of stage 3 for each sample.

    Args:
        student: Logits `[B, C]` or `[B, C, ...]`.
        teachers: Logits `[B, E, C]` or `[B, E, C, ...]`; they take no gradient.
        shares: c, `[B, E]`.
        k: Teachers per sample; "soft" takes all.
        gate: The rule, see the module's text.
        tau: Temperature.

    Returns:
        `[B]`, and the teachers chosen, int64 `[B, k]` ("soft": the largest k, for the record).
    """
    taught = teachers.detach()
    chosen = (torch.rand_like(shares) if gate == "random" else shares).topk(k, dim=1).indices
    if gate == "soft":
        weights = shares.detach().reshape(*shares.shape, *(1,) * (taught.dim() - 2))
        return kd_terms(student, (weights * taught).sum(1), tau=tau), chosen
    rows = torch.arange(len(taught), device=taught.device)
    total = torch.zeros(len(taught), device=taught.device)
    for rank in range(k):
        term = kd_terms(student, taught[rows, chosen[:, rank]], tau=tau)
        total = total + (term * shares[rows, chosen[:, rank]] if gate == "st" else term)
    return total / k, chosen


def load_balance(shares: Tensor, kind: Balance = "kl", *, factor: float | None = None) -> Tensor:
    """How uneven a batch is routed.

    Args:
        shares: c, `[B, E]`.
        kind: "kl", KL(uniform || mean over the batch), or "cv", deviation over mean of the sums.
        factor: Multiplies it; None is 1 / E for "kl", as the authors' code divides, and 1 for "cv".

    Returns:
        A scalar, 0 where all teachers are used alike.
    """
    if kind == "cv":
        sums = shares.sum(0)
        return sums.std() / sums.mean() * (1.0 if factor is None else factor)
    count = shares.shape[1]
    mean = shares.mean(0).clamp_min(1e-12)
    divergence = (-math.log(count) - mean.log()).sum() / count
    return divergence * (1.0 / count if factor is None else factor)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """With the labels, in float32 at least; a mean."""
    return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


class Gate(nn.Sequential):
    """GateNet: two linear maps with nothing between, from logits `[B, C]` to `[B, E]`."""

    def __init__(self, classes: int, routes: int):
        super().__init__(nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, routes))


class DenseGate(nn.Sequential):
    """GateNet of dense predictions, from logits `[B, C, H, W]` to `[B, E]`."""

    def __init__(self, classes: int, routes: int):
        wide = 2 * classes
        super().__init__(
            nn.Conv2d(classes, wide, 1), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, routes),
        )  # fmt: skip


@dataclass
class Stages:
    """What a run did.

    Attributes:
        together: Losses of stage 1.
        masks: Losses of stage 2, the sum over the masks.
        student: Losses of stage 3.
        mask_validation: Sum of the masks' losses on the validation data after each epoch.
        validation: The student's cross-entropy there after each epoch of stage 3.
        routing: After each epoch of stage 3, the share of samples each specialised teacher taught.
        kept: The epoch of stage 3 whose student was kept; None is the last one.
    """

    together: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    student: list[float] = field(default_factory=list)
    mask_validation: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    routing: list[list[float]] = field(default_factory=list)
    kept: int | None = None


class Best:
    """The state of a model at its lowest figure."""

    def __init__(self, model: nn.Module, figures: list[float]):
        self.model, self.figures = model, figures
        self.state: dict[str, Any] | None = None
        self.epoch: int | None = None

    def see(self, figure: float, epoch: int) -> None:
        """Note an epoch's figure."""
        if not self.figures or figure < min(self.figures):
            self.state, self.epoch = copy.deepcopy(self.model.state_dict()), epoch
        self.figures.append(figure)

    def restore(self) -> int | None:
        """Go back to it, if there is one; its epoch."""
        if self.state is not None:
            self.model.load_state_dict(self.state)
        return self.epoch
