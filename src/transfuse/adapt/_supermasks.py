"""Layers whose weights every task shares and each task sees through a binary mask of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import generator, seeded

__all__ = [
    "MASKED",
    "SupermaskConv1d",
    "SupermaskConv2d",
    "SupermaskLinear",
    "TaskNorm",
    "UnknownTask",
    "convert_to_supermask",
    "signed_constant",
    "supermask",
]


class UnknownTask(BadInput, KeyError):
    """A task that was never learnt."""

    __str__ = Exception.__str__  # KeyError shows the representation of its text


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
    """Signs of `weight`, of one size: sqrt(2 / fan in), so that ReLU layers keep the scale of their input."""
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
        if self.task >= len(self.scores):
            raise UnknownTask("task", self.task, f"is not one of {len(self.scores)}", "add it first")
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


class TaskNorm(nn.Module):
    """Batch norm without affine parameters, with the running statistics of each task apart.

    A closed task's statistics are used in training mode too, and never change.

    Args:
        norm: The batch norm it stands for: its width, momentum and eps.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.width, self.momentum, self.eps = norm.num_features, norm.momentum, norm.eps
        self.kind, self.task, self.closed = type(norm), 0, set[int]()
        self.device = None if norm.running_mean is None else norm.running_mean.device
        self.norms = nn.ModuleList()

    def add_task(self) -> None:
        """Open a task with fresh statistics."""
        norm = self.kind(self.width, eps=self.eps, momentum=self.momentum, affine=False, device=self.device)
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
        norm: Any = self.norms[self.task]
        if self.task not in self.closed:
            return norm(input)
        return F.batch_norm(input, norm.running_mean, norm.running_var, training=False, eps=self.eps)


def convert_to_supermask(module: nn.Module, density: float = 0.1) -> nn.Module:
    """Put masked layers and task-wise batch norms in the place of a network's own, in place.

    Linear layers and convolutions keep the signs of their weights, at one size per layer (`signed_constant`); their
    biases go, since tasks could not share them. Batch norms lose their affine parameters. All other parameters are
    frozen.

    Args:
        module: Any network with `nn.Linear`, `nn.Conv1d` or `nn.Conv2d` layers, the output layer among them.
        density: Share of each layer's weights in a task's mask.

    Returns:
        `module`.

    Raises:
        BadInput: density empties a layer (named), there is no layer to mask, or `module` is converted already.
        NotApplicable: two layers share a weight.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    found = {name: layer for name, layer in module.named_modules() if type(layer) in kinds}
    if any(isinstance(layer, _Supermask) for layer in module.modules()):
        raise BadInput("module", type(module).__name__, "is converted already", "pass the plain network")
    if not found or "" in found:
        problem = "is itself a layer" if found else "has no linear layer or convolution"
        raise BadInput("module", type(module).__name__, problem, "pass a network that holds such layers")
    if len({id(layer.weight) for layer in found.values()}) < len(found):
        raise NotApplicable(
            "module", type(module).__name__, "has layers that share a weight", "untie them first"
        )
    for name, layer in found.items():
        try:
            supermask(layer.weight, density)
        except BadInput as error:
            raise BadInput(
                "density", density, f"{error.problem} at {name or 'the layer'}", error.remedy
            ) from error
    for name, layer in module.named_modules():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
            found[name] = layer
    with seeded(
        0
    ):  # layers draw initial weights, which are replaced: the caller's random state is left alone
        made = {name: _converted(layer, density) for name, layer in found.items()}
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)
    return module.requires_grad_(False)


def _converted(layer: Any, density: float) -> nn.Module:
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return TaskNorm(layer).train(layer.training)
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    made: Any
    if isinstance(layer, nn.Linear):
        made = SupermaskLinear(layer.in_features, layer.out_features, density=density, **like)
    else:
        kind = SupermaskConv2d if isinstance(layer, nn.Conv2d) else SupermaskConv1d
        made = kind(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, padding_mode=layer.padding_mode, density=density, **like,
        )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(signed_constant(layer.weight))
    return made.train(layer.training)
