"""What hangs on a backbone that teaches itself: branches of copied stages, and the memory of an epoch ago."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.errors import NotApplicable
from ._base import frozen, logits_of

__all__ = ["AuxiliaryBranch", "Memory", "activations", "answers_of", "pooled"]


class AuxiliaryBranch(nn.Module):
    """Stages in a row, a global mean over positions, and a linear classifier of class and rotation.

    Args:
        stages: What runs on the tapped activation.
        width: D, of the pooled feature.
        answers: N M.
    """

    def __init__(self, stages: Sequence[nn.Module], width: int, answers: int):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(width, answers)

    @classmethod
    def from_stages(
        cls, backbone: nn.Module, stages: Sequence[str], index: int, deepest: Tensor, answers: int
    ) -> AuxiliaryBranch:
        """The branch of stage `index`: copies of the stages above it, or, of the last, one that keeps its size.

        Args:
            backbone: Where the stages are.
            stages: Their names.
            index: Of the tapped stage, from 0.
            deepest: An activation of the last stage, `[B, D, h, w]`, `[B, T, D]` or `[B, D]`.
            answers: N M.
        """
        found = [backbone.get_submodule(name) for name in stages]
        above = [copy.deepcopy(stage) for stage in found[index + 1 :]] or [_extra(found[-1], deepest)]
        example = next(found[-1].parameters(), deepest)
        branch = cls(above, pooled(deepest).shape[-1], answers).train()
        return branch.to(device=example.device, dtype=example.dtype).requires_grad_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled feature `[B, D]` and joint logits `[B, N M]`."""
        for stage in self.stages:
            x = _tensor(stage(x))
        feature = pooled(x)
        return feature, self.head(feature)


def pooled(x: Tensor) -> Tensor:
    """The mean over positions: `[B, D, h, w]`, `[B, T, D]` or `[B, D]` to `[B, D]`."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _extra(stage: nn.Module, deepest: Tensor) -> nn.Module:
    """A stage on top of the last one: a copy of it or of its blocks after the first, else a convolution."""
    candidates = [stage]
    if isinstance(stage, nn.Sequential) and len(stage) > 1:
        candidates.append(stage[1:])
    for candidate in candidates:
        try:
            with torch.no_grad(), frozen(candidate):
                fits = _tensor(candidate(deepest)).shape == deepest.shape
        except (RuntimeError, TypeError, ValueError):  # made for fewer channels
            fits = False
        if fits and any(True for _ in candidate.parameters()) and _mixes(candidate):
            return copy.deepcopy(candidate)
    if deepest.dim() == 4:
        width = deepest.shape[1]
        return nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
    width = deepest.shape[-1]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU())


def _mixes(module: nn.Module) -> bool:
    """More than normalisation and activation."""
    return any(p.dim() > 1 for p in module.parameters())


class Memory(nn.Module):
    """A network and its branches as they were; buffers, so that checkpoints hold them and optimizers do not."""

    def __init__(self, student: nn.Module, branches: nn.Module):
        super().__init__()
        self.student, self.branches = (copy.deepcopy(part).eval() for part in (student, branches))
        for part in self.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    del part._parameters[name]
                    part.register_buffer(name, parameter.detach())

    def train(self, mode: bool = True) -> Memory:
        """Always in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, branches: nn.Module, keep: float) -> None:
        """Become `keep` of itself and the rest of the present network."""
        for own, now in ((self.student, student), (self.branches, branches)):
            present = now.state_dict()
            for name, value in own.state_dict().items():
                new = present[name].to(value.device)
                value.copy_(torch.lerp(new, value, keep) if value.is_floating_point() and keep else new)


def answers_of(branches: nn.ModuleList, tapped: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each branch's pooled features and joint logits."""
    found = [branch(x) for branch, x in zip(branches, tapped, strict=True)]
    return [feature for feature, _ in found], [z for _, z in found]


def activations(
    student: nn.Module, images: Tensor, stages: Sequence[str]
) -> tuple[Mapping[str, Tensor], int]:
    """The stages' outputs, checked to follow each other, and the number of classes."""
    device = next(student.parameters()).device
    with torch.no_grad(), frozen(student), taps.capture(student, stages) as seen:
        classes = logits_of(student(images.to(device))).shape[-1]
        for low, high in itertools.pairwise(stages):
            below, above = seen[low].clone(), seen[high].clone()
            try:
                again = _tensor(student.get_submodule(high)(below))
                follows = again.shape == above.shape and torch.allclose(again, above, rtol=1e-3, atol=1e-4)
            except (RuntimeError, TypeError, ValueError):
                follows = False
            if not follows:
                remedy = "name all stages in order, from one that is not followed by other modules"
                raise NotApplicable("stages", (low, high), "do not follow each other directly", remedy)
    return seen, classes
