"""Layers whose weights every task shares and each task sees through a binary mask of its own."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import generator

__all__ = [
    "LAYERS",
    "MASKED",
    "NORMS",
    "SupermaskConv1d",
    "SupermaskConv2d",
    "SupermaskLinear",
    "TaskNorm",
    "UnknownTask",
    "known_task",
    "signed_constant",
    "supermask",
]


class UnknownTask(BadInput, KeyError):
    """A task that was never learnt."""

    __str__ = Exception.__str__  # KeyError shows the representation of its text


def known_task(task: Any, count: int) -> int:
    """`task` as an index.

    Raises:
        UnknownTask: it is no integer in [0, count).
    """
    try:
        number = -1 if isinstance(task, bool) else operator.index(task)
    except TypeError:
        number = -1
    if not 0 <= number < count:
        raise UnknownTask("task", task, f"is not one of the {count} learnt", "learn it first")
    return number


def supermask(scores: Tensor, density: float) -> Tensor:
    """The mask of the largest |scores|.

    The int((1 - density) n) smallest of the n are left out. Among equals the earlier ones (in memory order) are kept.

    Args:
        scores: Any shape, floating.
        density: Share kept, in (0, 1].

    Returns:
        bool, of the same shape.

    Raises:
        BadInput: density is out of range, or nothing is left.
    """
    if not 0 < density <= 1:
        raise BadInput("density", density, "is not in (0, 1]", "give the share of weights a task keeps")
    flat = scores.detach().abs().flatten()
    kept = flat.numel() - int((1 - density) * flat.numel())
    if kept == 0:
        raise BadInput("density", density, f"keeps none of {flat.numel()} weights", "raise it")
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:kept]] = True
    return mask.view(scores.shape)


def signed_constant(weight: Tensor) -> Tensor:
    """Signs of `weight`, of one size: sqrt(2 / fan in), so that ReLU layers keep the scale of their input.

    A weight that is exactly 0 has no sign and stays 0, as in SupSup's code.
    """
    return weight.sign() * math.sqrt(2.0 / weight[0].numel())


class _Supermask(nn.Module):
    """What the masked layers share. A task is open (its scores decide) until `close` stores its mask."""

    weight: Tensor
    _kind: type[nn.Module]

    def _prepare(self, density: float, num_tasks: int, seed: int) -> None:
        supermask(self.weight, density)  # refuses a density that empties the layer
        self.density = density
        self.task = 0
        self.scores = nn.ParameterList()
        self.free: Tensor | None = None
        with torch.no_grad():
            self.weight.copy_(signed_constant(self.weight))
        self.weight.requires_grad_(False)
        random = generator(seed)
        for _ in range(num_tasks):
            self.add_task(random)

    def add_task(self, random: torch.Generator) -> int:
        """Open a task with random scores, uniform in +-1 / sqrt(fan in); returns its number."""
        scores = torch.empty(self.weight.shape)
        nn.init.kaiming_uniform_(scores, a=math.sqrt(5), generator=random)
        self.scores.append(nn.Parameter(scores.to(self.weight), requires_grad=False))
        self.task = len(self.scores) - 1
        return self.task

    def drop_task(self) -> None:
        """Forget the latest task, open or closed."""
        task = len(self.scores) - 1
        self.scores = nn.ParameterList(list(self.scores)[:-1])
        self._buffers.pop(f"mask_{task}", None)
        self.task = max(0, task - 1)

    def close(self) -> None:
        """Store the mask of the present task for good."""
        self.register_buffer(f"mask_{self.task}", self.mask(self.task))

    def mask(self, task: int) -> Tensor:
        """The mask of a task, bool in the shape of the weight."""
        task = known_task(task, len(self.scores))
        stored = self._buffers.get(f"mask_{task}")
        return supermask(self.scores[task], self.density) if stored is None else stored

    def free_mask(self, task: int) -> Tensor:
        """What the mask of `task` keeps and no earlier task's does."""
        free = self.mask(task).clone()
        for earlier in range(task):
            free &= ~self.mask(earlier)
        return free

    def masked_weight(self) -> Tensor:
        """The weight as the present task sees it, W * m.

        Scores that require a gradient get that of the straight-through estimator, sign(S) * dL/d(W m) * W. A weight
        that requires one gets it where `free` is set, and exactly zero elsewhere.
        """
        mask, scores = self.mask(self.task).to(self.weight.dtype), self.scores[self.task]
        if scores.requires_grad:
            size = scores.abs()
            mask = mask + (size - size.detach())  # the same value, with the gradient of |S|
        weight: Tensor = self.weight
        if self.free is not None:
            weight = torch.where(self.free, weight, weight.detach())
        return weight * mask

    def extra_repr(self) -> str:
        """Density and number of tasks behind the layer's own description."""
        return f"{self._kind.extra_repr(self)}, density={self.density:g}, tasks={len(self.scores)}"


class SupermaskLinear(_Supermask, nn.Linear):
    """A linear layer without bias whose weight each task sees through its own mask.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        density: Share of the weights in a task's mask.
        num_tasks: Tasks opened at once; more can be added.
        seed: Of the scores.
        options: `device` and `dtype`.

    Raises:
        BadInput: density is out of range.
    """

    _kind = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, *, density: float = 0.1, num_tasks: int = 0, seed: int = 0,
        **options: Any,
    ):  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, bias=False, **options)
        self._prepare(density, num_tasks, seed)

    def forward(self, input: Tensor) -> Tensor:
        """The product with the masked weight."""
        return F.linear(input, self.masked_weight())


class SupermaskConv2d(_Supermask, nn.Conv2d):
    """A 2-d convolution without bias whose kernel each task sees through its own mask.

    Args:
        arguments: Those of `nn.Conv2d`.
        density: Share of the weights in a task's mask.
        num_tasks: Tasks opened at once; more can be added.
        seed: Of the scores.
        options: Those of `nn.Conv2d` but `bias`.

    Raises:
        BadInput: density is out of range.
    """

    _kind = nn.Conv2d

    def __init__(
        self, *arguments: Any, density: float = 0.1, num_tasks: int = 0, seed: int = 0, **options: Any
    ):
        nn.Conv2d.__init__(self, *arguments, **{**options, "bias": False})
        self._prepare(density, num_tasks, seed)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the masked kernel."""
        return self._conv_forward(input, self.masked_weight(), None)


class SupermaskConv1d(_Supermask, nn.Conv1d):
    """A 1-d convolution without bias whose kernel each task sees through its own mask; as `SupermaskConv2d`."""

    _kind = nn.Conv1d

    def __init__(
        self, *arguments: Any, density: float = 0.1, num_tasks: int = 0, seed: int = 0, **options: Any
    ):
        nn.Conv1d.__init__(self, *arguments, **{**options, "bias": False})
        self._prepare(density, num_tasks, seed)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution with the masked kernel."""
        return self._conv_forward(input, self.masked_weight(), None)


MASKED = (SupermaskLinear, SupermaskConv1d, SupermaskConv2d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class TaskNorm(nn.Module):
    """Batch norm without affine parameters, with the running statistics of each task apart.

    A closed task's statistics are used in training mode too, and never change.

    Args:
        norm: The batch norm it stands for: its width, momentum, eps, device and dtype.

    Raises:
        NotApplicable: it is none of torch.nn's.
    """

    like: Tensor

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        kind: Any = next((kind for kind in NORMS if isinstance(norm, kind)), None)
        if kind is None:
            problem, remedy = "is no batch norm of torch.nn", "give one"
            raise NotApplicable("norm", type(norm).__name__, problem, remedy)
        self.kind, self.width, self.task, self.closed = kind, norm.num_features, 0, set[int]()
        self.options = {"eps": norm.eps, "momentum": norm.momentum, "affine": False}
        if isinstance(norm, nn.SyncBatchNorm):
            self.options["process_group"] = norm.process_group
        given = (tensor for tensor in (norm.running_mean, norm.weight) if tensor is not None)
        like = next(given, torch.empty(0)).detach()
        self.register_buffer("like", like.new_empty(0), persistent=False)  # goes where the network goes
        self.norms = nn.ModuleList()

    def add_task(self) -> None:
        """Open a task with fresh statistics."""
        norm = self.kind(self.width, **self.options, device=self.like.device, dtype=self.like.dtype)
        self.norms.append(norm.train(self.training))
        self.task = len(self.norms) - 1

    def drop_task(self) -> None:
        """Forget the latest task."""
        self.norms = nn.ModuleList(list(self.norms)[:-1])
        self.closed.discard(len(self.norms))
        self.task = max(0, len(self.norms) - 1)

    def close(self) -> None:
        """Keep the present task's statistics as they are."""
        self.closed.add(self.task)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the present task's statistics."""
        norm: Any = self.norms[known_task(self.task, len(self.norms))]
        if self.task not in self.closed:
            return norm(input)
        return F.batch_norm(input, norm.running_mean, norm.running_var, training=False, eps=norm.eps)
