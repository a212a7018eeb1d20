"""Students made from a model: fewer blocks, narrower MLPs, and which of the model's parts each came from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import taps
from .errors import BadInput, NotApplicable

__all__ = ["layer_map", "load_or_prune", "prune"]


def prune(
    model: Any,
    *,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    intermediate: int | None = None,
) -> Any:
    """A smaller copy of a transformers model; `model` is left alone.

    Blocks are kept whole. Of an MLP the neurons are kept whose rows and columns have the largest product of norms.
    The copy's config says its new sizes, so that it is saved and loaded like any model (which is checked), and
    `transfuse_layer_map`, the numbers of the blocks it kept.

    Args:
        model: Any transformers model with a stack of blocks.
        layers: Number of blocks kept: the first, the last, and others evenly between.
        keep: Numbers of the blocks kept, rising; in place of `layers`.
        intermediate: Width of gated or plain MLPs.

    Returns:
        The student, in the model's dtype, on its device, in training mode off.

    Raises:
        BadInput: counts out of range, or both `layers` and `keep`.
        NotApplicable: MLPs of a kind not known here, for `intermediate`; an architecture whose config cannot say
            what was cut away (the place of its dense blocks among those with experts, say).
    """
    names = taps.decoder_layers(model)
    chosen = _chosen(len(names), layers, keep)
    student = copy.deepcopy(model).eval()
    stack = student.get_submodule(names[0].rpartition(".")[0])
    assert isinstance(stack, nn.ModuleList)
    blocks = [stack[i] for i in chosen]
    del stack[len(blocks) :]
    for i, block in enumerate(blocks):
        stack[i] = block
        _set(block, "layer_idx", i)
    config: Any = student.config.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, len(blocks))
            break
    for name in ("layer_types", "no_rope_layers"):
        kinds = getattr(config, name, None)
        if kinds is not None:
            setattr(config, name, [kinds[i] for i in chosen])
    config.transfuse_layer_map = list(chosen)
    if intermediate is not None:
        for i, block in enumerate(blocks):
            _narrow(block, intermediate, f"block {i}")
        setattr(config, "ffn_dim" if hasattr(config, "ffn_dim") else "intermediate_size", intermediate)
    if not _described(student) and _described(model):
        problem = "would not be loaded as it is: its config cannot say what was cut away"
        remedy = "keep other blocks, or the whole width"
        raise NotApplicable("model", type(model).__name__, problem, remedy)
    return student


def _described(model: Any) -> bool:
    """Whether a model's config makes a model with the same parameters."""
    try:
        with torch.device("meta"):
            made = type(model)(type(model.config).from_dict(model.config.to_dict()))
    except Exception:  # whatever an architecture raises at a config that contradicts itself
        return False
    shapes = ({name: p.shape for name, p in each.named_parameters()} for each in (made, model))
    return next(shapes) == next(shapes)


def load_or_prune(spec: str | Mapping[str, Any], **options: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, whole or cut out of another.

    Args:
        spec: As `transfuse.load` takes it, or `{"prune": such a spec, "layers": 10}` with the arguments of `prune`.
        **options: Those of `transfuse.load`.

    Raises:
        BadInput: a mapping without `prune`; what the two raise.
    """
    from .models import load

    if isinstance(spec, str):
        return load(spec, **options)
    if "prune" not in spec:
        raise BadInput("spec", dict(spec), "names no model", 'give {"prune": a model, "layers": 10}')
    model, tokenizer = load(spec["prune"], **options)
    return prune(model, **{name: value for name, value in spec.items() if name != "prune"}), tokenizer


def layer_map(student: Any) -> list[int]:
    """Which of the teacher's blocks each of the student's came from; 0, 1, ... for a model that was not pruned."""
    found = getattr(student.config.get_text_config(), "transfuse_layer_map", None)
    return list(found) if found is not None else list(range(len(taps.decoder_layers(student))))


def _chosen(count: int, layers: int | None, keep: Sequence[int] | None) -> list[int]:
    if layers is not None and keep is not None:
        raise BadInput("layers", layers, f"and keep = {list(keep)} both choose blocks", "give one of them")
    if keep is not None:
        numbers = list(keep)
        if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 0 or numbers[-1] >= count:
            raise BadInput(
                "keep", numbers, f"are not rising numbers of {count} blocks", f"use 0 to {count - 1}"
            )
        return numbers
    if layers is None:
        return list(range(count))
    if not 1 <= layers <= count:
        raise BadInput("layers", layers, f"is not between 1 and the model's {count}", "keep fewer blocks")
    if layers == 1:
        return [0]
    return [round(i * (count - 1) / (layers - 1)) for i in range(layers)]


def _narrow(block: nn.Module, width: int, where: str) -> None:
    """Keep the `width` strongest neurons of a block's MLP."""
    found = {name.rpartition(".")[2]: name for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    inward = [found[name] for name in ("gate_proj", "up_proj", "fc1") if name in found]
    outward = next((found[name] for name in ("down_proj", "fc2") if name in found), None)
    if not inward or outward is None:
        raise NotApplicable("intermediate", where, "has no MLP of a known kind", "prune its blocks only")
    down: Any = block.get_submodule(outward)
    if not 1 <= width <= down.in_features:
        raise BadInput(
            "intermediate", width, f"is not between 1 and {down.in_features}", "give a smaller width"
        )
    with torch.no_grad():
        strength = down.weight.float().norm(dim=0)
        for name in inward:
            inner: Any = block.get_submodule(name)
            strength = strength * inner.weight.float().norm(dim=1)
        best = strength.topk(width).indices.sort().values
        for name in inward:
            layer: Any = block.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight[best].clone(), layer.weight.requires_grad)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[best].clone(), layer.bias.requires_grad)
            layer.out_features = width
        down.weight = nn.Parameter(down.weight[:, best].clone(), down.weight.requires_grad)
        down.in_features = width
    _set(block, "intermediate_size", width)


def _set(block: nn.Module, name: str, value: int) -> None:
    """Set what modules of a block remember about themselves."""
    for module in block.modules():
        if hasattr(module, name):
            setattr(module, name, value)
