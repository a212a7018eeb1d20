"""Putting masked layers and task-wise norms into a network, and what such a network must not hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import seeded

from ._supermasks import (
    LAYERS,
    MASKED,
    NORMS,
    SupermaskConv1d,
    SupermaskConv2d,
    SupermaskLinear,
    TaskNorm,
    signed_constant,
    supermask,
)

__all__ = ["check_ready", "convert_to_supermask", "maskable", "masked_layers"]


def maskable(module: nn.Module) -> list[str]:
    """Names of the masked layers, or of those that will be where there are none yet."""
    plain = [name for name, layer in module.named_modules() if type(layer) in LAYERS]
    return list(masked_layers(module)) or plain


def masked_layers(module: nn.Module) -> dict[str, SupermaskLinear | SupermaskConv1d | SupermaskConv2d]:
    """The masked layers by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MASKED)}


def convert_to_supermask(module: nn.Module, density: float = 0.1) -> nn.Module:
    """Put masked layers and task-wise batch norms in the place of a network's own, in place.

    Linear layers and convolutions keep the signs of their weights, at one size per layer (`signed_constant`); their
    biases go, since tasks could not share them. Batch norms of 1, 2 or 3 dimensions, synchronised ones too, lose
    their affine parameters. All other parameters are frozen.

    Args:
        module: Any network with `nn.Linear`, `nn.Conv1d` or `nn.Conv2d` layers, the output layer among them.
        density: Share of each layer's weights in a task's mask.

    Returns:
        `module`.

    Raises:
        BadInput: density empties a layer (named), there is no layer to mask, or `module` is converted already.
        NotApplicable: a layer or weight stands in two places, or another module keeps running statistics.
    """
    places = list(module.named_modules(remove_duplicate=False))
    found = {name: layer for name, layer in places if type(layer) in LAYERS}
    if masked_layers(module):
        raise BadInput("module", type(module).__name__, "is converted already", "pass the plain network")
    if not found or "" in found:
        problem = "is itself a layer" if found else "has no linear layer or convolution"
        raise BadInput("module", type(module).__name__, problem, "pass a network that holds such layers")
    norms = {name: layer for name, layer in places if _is_plain(layer)}
    shared = [layer.weight for layer in found.values()], list(norms.values())
    if any(len({id(part) for part in parts}) < len(parts) for parts in shared):
        problem, remedy = "has layers that share a weight, or a layer in two places", "untie them first"
        raise NotApplicable("module", type(module).__name__, problem, remedy)
    _refuse_statistics(module, norms)
    for name, layer in found.items():
        try:
            supermask(layer.weight, density)
        except BadInput as error:
            raise BadInput("density", density, f"{error.problem} at {name}", error.remedy) from error
    with seeded(0):  # layers draw weights, which are replaced: the caller's random state is left alone
        made = {name: _converted(layer, density) for name, layer in {**found, **norms}.items()}
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer)
    return module.requires_grad_(False)


def _converted(layer: Any, density: float) -> nn.Module:
    if isinstance(layer, NORMS):
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


def check_ready(model: nn.Module, tasks: int) -> None:
    """Refuse a converted network with another number of tasks than `tasks`, or with statistics that they would share.

    Raises:
        BadInput: a layer or norm holds fewer tasks or more.
        NotApplicable: a module other than the `TaskNorm`s keeps running statistics.
    """
    kept: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        if isinstance(part, TaskNorm):
            kept |= {f"{name}.norms.{i}": norm for i, norm in enumerate(part.norms)}
        if isinstance(part, (*MASKED, TaskNorm)):
            found = len(part.norms if isinstance(part, TaskNorm) else part.scores)
            if found != tasks:
                problem = f"holds tasks at {name}: {found}, not {tasks}"
                remedy = "go on with the learner that added them, or give a network without tasks"
                raise BadInput("model", type(model).__name__, problem, remedy)
    _refuse_statistics(model, kept)


def _refuse_statistics(module: nn.Module, known: dict[str, nn.Module]) -> None:
    """Learning a task moves running statistics, and with them the answers of earlier tasks."""
    for name, layer in module.named_modules():
        if name not in known and _keeps_statistics(layer):
            problem = "keeps running statistics, which tasks would share"
            remedy = "use a batch norm of torch.nn, or a norm without running statistics"
            raise NotApplicable("module", f"{name} ({type(layer).__name__})", problem, remedy)


def _is_plain(layer: nn.Module) -> bool:
    """Whether it computes what one of torch's batch norms does."""
    forwards: list[Any] = [kind.forward for kind in NORMS]
    plain = isinstance(layer, NORMS) and type(layer).forward in forwards
    return plain and not isinstance(layer, LazyModuleMixin)


def _keeps_statistics(layer: nn.Module) -> bool:
    names = [name for name, _ in layer.named_buffers(recurse=False)]
    running = any(name.startswith("running_") or name == "num_batches_tracked" for name in names)
    return running or bool(getattr(layer, "track_running_stats", False))
