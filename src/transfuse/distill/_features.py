"""Objectives on hidden states: the states themselves, and their distribution.

Layers of the student are laid beside layers of the teacher: pairs of block numbers, by default those each of the
student's blocks was cut out of (`layer_map`). Where widths differ, a linear map without bias takes the student's
states to the teacher's width; the maps train along and stay in the objective.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.errors import BadInput, IncompatibleModels
from ..core.pruning import layer_map
from ._base import CrossEntropy, Objective, Signal

__all__ = [
    "MMD",
    "HiddenStates",
    "LayerObjective",
    "mmd",
    "state_terms",
    "thinned",
]

Distance = Literal["mse", "l1", "cosine", "ce"]


def state_terms(student: Tensor, teacher: Tensor, distance: Distance = "mse") -> Tensor:
    """The distance of two states.

    Args:
        student: `[n, D]`.
        teacher: Of the same shape.
        distance: "mse" and "l1", means over the width; "cosine", 1 - cosine; "ce", the cross-entropy
            -sum softmax(h_T) log softmax(h_S) over the width.

    Returns:
        `[n]`.
    """
    if distance == "mse":
        return (student - teacher).square().mean(-1)
    if distance == "l1":
        return (student - teacher).abs().mean(-1)
    if distance == "cosine":
        return 1.0 - nn.functional.cosine_similarity(student, teacher, dim=-1)
    return -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1)


def mmd(
    student: Tensor, teacher: Tensor, *, bandwidth: float | None = None, unbiased: bool = False
) -> Tensor:
    """Squared maximum mean discrepancy of two sets under k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    Args:
        student: `[n, D]`.
        teacher: `[m, D]`.
        bandwidth: None for the median distance between two of the teacher's states.
        unbiased: Leave the pairs of a state with itself out (Gretton et al. 2012, eq. 3); the value may then be below
            zero. Otherwise (eq. 5) it never is, and is zero for equal sets.

    Returns:
        Scalar.
    """
    inside = [_squares(each, each) for each in (student, teacher)]
    if bandwidth is None:
        apart = torch.triu_indices(len(teacher), len(teacher), 1, device=teacher.device)
        others = inside[1].detach()[apart[0], apart[1]]
        scale = (others.median() if len(others) else others.new_ones(())).clamp_min(1e-12)
    else:
        scale = teacher.new_tensor(bandwidth**2)
    own, theirs, both = (torch.exp(-each / (2 * scale)) for each in (*inside, _squares(student, teacher)))
    means = []
    for kernel in (own, theirs):
        n = len(kernel)
        means.append((kernel.sum() - n) / max(n * (n - 1), 1) if unbiased else kernel.mean())
    return means[0] + means[1] - 2 * both.mean()


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances; not by way of the products, which lose them between states of large norm."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def thinned(student: Tensor, teacher: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most so many of the rows `[n, D]` and `[n, D']`, the same of both, spread evenly."""
    if len(student) <= most:
        return student, teacher
    places = torch.linspace(0, len(student) - 1, most, device=student.device).round().long()
    return student[places], teacher[places]


class LayerObjective(Objective):
    """Reads blocks of student and teacher in pairs.

    Args:
        layers: Pairs (student's block, teacher's block), counted from 0; None for `layer_map(student)`.
        kd_weight: Weight of the distance.
        ce_weight: Weight of the cross-entropy with the labels.

    Raises:
        BadInput: weights below 0.
    """

    needs_logits = False

    def __init__(
        self,
        *,
        layers: Sequence[tuple[int, int]] | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        super().__init__()
        if not 0 < kd_weight < math.inf or not 0 <= ce_weight < math.inf:
            weights = f"{kd_weight}, ce_weight = {ce_weight}"
            raise BadInput("kd_weight", weights, "are not weights", "give numbers above 0 and from 0 up")
        if layers is not None and (not layers or any(len(pair) != 2 or min(pair) < 0 for pair in layers)):
            raise BadInput("layers", layers, "are not pairs of blocks", "give [(0, 1), ...] or leave it out")
        self.layers = None if layers is None else [(int(a), int(b)) for a, b in layers]
        self.kd_weight, self.ce_weight = kd_weight, ce_weight
        self.labelled = CrossEntropy()

    def default(self, student: Any, ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
        """The pairs where none are given, from the names of the blocks."""
        if not hasattr(student, "config"):
            raise BadInput("layers", None, "cannot be told of a model without config", "give pairs of blocks")
        return list(enumerate(layer_map(student)))

    def prepare(
        self, student: nn.Module, teachers: Sequence[nn.Module], tokenizer: Any = None, theirs: Any = None
    ) -> None:
        """Name the blocks.

        Raises:
            BadInput: not one teacher, or blocks that are not there.
        """
        if len(teachers) != 1:
            raise BadInput(
                "teacher", f"{len(teachers)} models", "are not one whose states are read", "give one"
            )
        names = [taps.decoder_layers(model) for model in (student, teachers[0])]
        pairs = self.layers if self.layers is not None else self.default(student, *names)
        for side, stack, whose in zip(zip(*pairs, strict=True), names, ("student", "teacher"), strict=True):
            if max(side) >= len(stack):
                raise BadInput(
                    "layers", max(side), f"is no block of the {whose}'s {len(stack)}", "give others"
                )
        chosen = [[stack[pair[i]] for pair in pairs] for i, stack in enumerate(names)]
        self.student_taps, self.teacher_taps = (tuple(names) for names in chosen)

    def mask(self, batch: Mapping[str, Any], like: Tensor) -> Tensor:
        """Bool `[B, T]`: which places of the taps are not padding."""
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != like.shape[:2]:
            return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        return mask.bool()

    @abc.abstractmethod
    def distance(self, student: Signal, teacher: Signal, batch: Mapping[str, Any]) -> Tensor:
        """The scalar that `kd_weight` weighs."""

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert teacher is not None
        found = {"kd": self.distance(student, teacher, batch)}
        loss = self.kd_weight * found["kd"]
        if self.ce_weight:
            found["ce"] = self.labelled(student, None, batch)["loss"]
            loss = loss + self.ce_weight * found["ce"]
        return {"loss": loss, **found}


class HiddenStates(LayerObjective):
    """Distance between W h_S and h_T, a mean over pairs of layers and over tokens that are not padding.

    Args:
        distance: "mse", "l1", "cosine" or "ce", see `state_terms`.
        project: Put a map W between; None where the widths differ.
        layers: As for `LayerObjective`, like the following.
        kd_weight: Weight of the distance.
        ce_weight: Weight of the cross-entropy with the labels.

    Raises:
        BadInput: an argument out of range.
    """

    additive = True

    def __init__(
        self,
        *,
        distance: Distance = "mse",
        project: bool | None = None,
        layers: Sequence[tuple[int, int]] | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        super().__init__(layers=layers, kd_weight=kd_weight, ce_weight=ce_weight)
        if distance not in ("mse", "l1", "cosine", "ce"):
            raise BadInput("distance", distance, "is not known", 'use "mse", "l1", "cosine" or "ce"')
        self.kind, self.project = distance, project
        self.maps = nn.ModuleList()

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Make the maps.

        Raises:
            BadInput: widths that differ, with `project=False`.
            IncompatibleModels: numbers of tokens that differ.
        """
        assert teacher is not None
        self.maps = nn.ModuleList()
        for ours, theirs in self.pairs(student, teacher):
            if ours.shape[:2] != theirs.shape[:2]:
                raise IncompatibleModels(
                    "teacher", tuple(theirs.shape), f"states, the student has {tuple(ours.shape)}",
                    "give both the same tokens",
                )  # fmt: skip
            widths = ours.shape[-1], theirs.shape[-1]
            if widths[0] == widths[1] and not self.project:
                self.maps.append(nn.Identity())
            elif self.project is False:
                raise BadInput(
                    "project", False, f"leaves widths {widths}", "leave it out, or use equal widths"
                )
            else:
                self.maps.append(nn.Linear(*widths, bias=False))

    def pairs(self, student: Signal, teacher: Signal) -> list[tuple[Tensor, Tensor]]:
        """The states of each pair of layers, `[B, T, D]`."""
        names = zip(self.student_taps, self.teacher_taps, strict=True)
        return [(student.taps[a], teacher.taps[b]) for a, b in names]

    def chosen(
        self, student: Signal, teacher: Signal, batch: Mapping[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        """The same without padding, mapped to one width, in float32: `[n, D]`."""
        found = []
        for (ours, theirs), change in zip(self.pairs(student, teacher), self.maps, strict=True):
            keep = self.mask(batch, ours)
            ours, theirs = (x[keep].to(torch.promote_types(x.dtype, torch.float32)) for x in (ours, theirs))
            with torch.autocast(ours.device.type, enabled=False):
                found.append((change(ours), theirs.detach().to(ours.dtype)))
        return found

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tokens that are not padding."""
        return {"attended": batch["attention_mask"].sum()} if "attention_mask" in batch else {}

    def distance(self, student: Signal, teacher: Signal, batch: Mapping[str, Any]) -> Tensor:
        terms = [state_terms(*each, self.kind).sum() for each in self.chosen(student, teacher, batch)]
        count = batch.get("attended")
        if count is None:
            count = max(int(self.mask(batch, next(iter(student.taps.values()))).sum()), 1)
        return torch.stack(terms).mean() / count


class MMD(HiddenStates):
    """Maximum mean discrepancy between the tokens' states, a mean over pairs of layers.

    The two sets are the batch's tokens that are not padding; it is a figure of the batch, not a sum over tokens. The
    biased estimate is the default: it is zero where student and teacher agree, and never below.

    Args:
        bandwidth: Of the kernel; None for the median distance between two of the teacher's states in the batch.
        unbiased: Leave out pairs of a state with itself, see `mmd`.
        max_tokens: Most tokens of a batch, spread evenly over it: time and memory grow with their square.
        project: Put a map between; None where the widths differ.
        layers: As for `LayerObjective`, like the following.
        kd_weight: Weight of the discrepancy.
        ce_weight: Weight of the cross-entropy with the labels.

    Raises:
        BadInput: an argument out of range.
    """

    additive = False

    def __init__(
        self,
        *,
        bandwidth: float | None = None,
        unbiased: bool = False,
        max_tokens: int = 1024,
        project: bool | None = None,
        layers: Sequence[tuple[int, int]] | None = None,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        super().__init__(project=project, layers=layers, kd_weight=kd_weight, ce_weight=ce_weight)
        if bandwidth is not None and not bandwidth > 0:
            raise BadInput(
                "bandwidth", bandwidth, "is not positive", "give a number above 0, or leave it out"
            )
        if max_tokens < 2:
            raise BadInput("max_tokens", max_tokens, "is below 2", "give more")
        self.bandwidth, self.unbiased, self.max_tokens = bandwidth, unbiased, max_tokens

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """None."""
        return {}

    def distance(self, student: Signal, teacher: Signal, batch: Mapping[str, Any]) -> Tensor:
        values = []
        for ours, theirs in self.chosen(student, teacher, batch):
            few = thinned(ours, theirs, self.max_tokens)
            values.append(mmd(*few, bandwidth=self.bandwidth, unbiased=self.unbiased))
        return torch.stack(values).mean()
