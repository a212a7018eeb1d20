"""ScaLearn: reuse adapters trained on other tasks by learning only how much of each to add.

:arxiv: 2310.01217
:moves: several trained adapters -> a new task, through a scale per adapter and layer
:access: weights, training data
:reversible: yes
:context: no

Adapters of source tasks sit on the same layers of one frozen model. For a new task each layer adds all of them, each
scaled by a vector (or one number) that is learnt; adapters and model stay as they are:

    out_l = res + sum over sources s of omega_l,s * U_l,s

U is what an adapter adds, without its residual, which comes once. A bottleneck adapter after the feed-forward block
adds U = W_up relu(W_down h + b) + c. In models like BERT and RoBERTa, where one module with `dense`, `dropout` and
`LayerNorm` ends a block, it reads the normalised sum:

    res = dropout(W x + bias)    h = LayerNorm(res + input)    the block's output: LayerNorm(out + input)

Elsewhere, as in decoders, which normalise before a block and which the paper does not use, h = res = the block's
output, before it is added to the residual stream. For LoRA adapters, which the paper does not use either,
U = (alpha / r) B A x and res = W x + bias. Scales are free: they may be negative and need not sum to one (the paper
finds softmax and mean normalisation worse: `normalise`). They start around 2 / S; in training, dropout is put on the
scales themselves, before any normalisation. If the new task has an adapter of its own, it is one more source.

    variant     share_layers   trained per task    d = 768, 12 layers, 8 sources
    "vector"    no             d L S               73,728      ScaLearn
    "uniform"   no             L S                 96          ScaLearnUniform
    "vector"    yes            d S                 6,144       ScaLearn++
    "uniform"   yes            S                   8           ScaLearnUniform++
    "fusion"                   3 d^2 L (+ 2 d L)   21.2 M      AdapterFusion, the baseline

Paper and code agree. The optional penalty on the scales and the option without residual, both off there, are left
out. `share_layers` is one parameter that all layers use. AdapterFusion's query reads h; its query and key start from
N(0, 0.02) with biases zero, its value from the identity + 1e-6. Its authors' code also has dropout on the attention
scores, with the model's rate, and a penalty that keeps the value near the identity: neither is used here.

Folders of adapters are the sources: those that PEFT's LoRA wrote, and bottleneck adapters (`bottleneck`, here). They
are read once; what `save` writes holds them. `fold` writes one plain adapter that does the same as all of them
together, and LoRA sources can be merged into the weights. Give training no weight decay (`parameter_groups`), and a
learning rate of 6e-3, as the paper does, also for the head.

    first = bottleneck(model, r=24, modules_to_save=["classifier"])     # trained on each source task, and saved
    adapted = scalearn(model, sources=["nli", "paraphrase"], modules_to_save=["classifier"])
    fit(adapted, rows, lr=6e-3, epochs=30, batch_size=32)
    transfer_weights(adapted)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from transfuse.adapt._base import (
    Targets,
    base_again,
    fill_adapter,
    read_adapter,
    refuse_adapted,
    target_names,
    task_type,
    write_adapter,
)
from transfuse.adapt._bottleneck import BottleneckConfig, BottleneckModel, places
from transfuse.adapt._scalearn_layers import (
    ScaLearnConfig,
    ScaLearnLinear,
    ScaLearnModel,
    fold_scales,
    fuse,
    normalised,
    scale_and_add,
)
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import seeded

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "ScaLearnConfig",
    "ScaLearnLinear",
    "ScaLearnModel",
    "bottleneck",
    "fold",
    "fold_scales",
    "fuse",
    "load",
    "normalised",
    "parameter_groups",
    "restore",
    "save",
    "scale_and_add",
    "scalearn",
    "transfer_weights",
]


def bottleneck(
    model: PreTrainedModel | nn.Module,
    *,
    r: int = 48,
    target_modules: Targets = None,
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Put bottleneck adapters after linear layers, or at the ends of BERT-type blocks: sources to be.

    Args:
        model: A transformers model, or any module with linear layers. Its weights are frozen.
        r: Width of the bottleneck (the paper's is a sixteenth of the model's: 48 of 768).
        target_modules: Names or endings of linear layers, a regular expression, or "all-linear"; None takes the last
            one of each feed-forward block, for BERT- and for llama-type models. One that ends a BERT-type block
            stands for that end, with dropout and LayerNorm.
        modules_to_save: Further modules to train whole.
        seed: Of the initial values. The adapters add nothing at first.

    Raises:
        BadInput: `r` below 1, no target by that name, no such module to save.
        NotApplicable: a target that is no plain linear layer.
    """
    refuse_adapted(model)
    _check_modules(model, modules_to_save)
    targets = places(model, None if target_modules is None else target_names(model, target_modules))
    config = BottleneckConfig(
        task_type=task_type(model), r=r, target_modules=targets,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
    )  # fmt: skip
    with seeded(seed):
        return get_peft_model(model, config)


def scalearn(
    model: PreTrainedModel | nn.Module,
    *,
    sources: Sequence[str | os.PathLike[str]] = (),
    variant: Literal["vector", "uniform", "fusion"] = "vector",
    share_layers: bool = False,
    dropout: float = 0.3,
    init_scale: float = 2.0,
    normalise: Literal["none", "mean", "softmax"] = "none",
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Put source adapters on their base model, frozen, with scales to be learnt.

    Args:
        model: The base model that the sources were trained on. Its weights are frozen.
        sources: Folders of adapters, all LoRA or all bottleneck adapters, on the same layers; ranks may differ.
        variant: A scale per dimension, one number per source, or AdapterFusion's attention.
        share_layers: One set of scales for all layers.
        dropout: On the scales.
        init_scale: They start around this over the number of sources, with standard deviation 0.001.
        normalise: Divide them by their sum over sources, or take their softmax.
        modules_to_save: Modules to train whole: the head of the new task. That of a sequence classifier always is.
        seed: Of the initial values.

    Returns:
        A PEFT model: save it with `save`, undo it with `restore`, and, with LoRA sources, merge it.

    Raises:
        BadInput: no sources, one that is no adapter or not of this model, an argument out of range, no such module.
        CorruptFile: a source cannot be read or is not finite.
        NotApplicable: sources of different kinds or places, or of a kind that is not offered.
    """
    refuse_adapted(model)
    _check_modules(model, modules_to_save)
    config = ScaLearnConfig(
        task_type=task_type(model), sources=[str(folder) for folder in sources], variant=variant,
        share_layers=share_layers, dropout=dropout, init_scale=init_scale, normalise=normalise,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
    )  # fmt: skip
    with seeded(seed):
        return get_peft_model(model, config)


def _check_modules(model: nn.Module, names: Sequence[str] | None) -> None:
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in names or () if name.rpartition(".")[2] not in present]
    if missing:
        raise BadInput("modules_to_save", missing[0], "is no module of the model", "name the task's head")


def restore(model: PeftModel) -> Any:
    """Take the adapters off; works on merged models too. The base model is what it was, bit for bit.

    Raises:
        BadInput: the model has neither ScaLearn nor bottleneck adapters.
    """
    for layer in model.modules():
        if isinstance(layer, ScaLearnLinear):
            layer.unmerge()
    return base_again(model, BottleneckModel)


def save(model: PeftModel, folder: str | os.PathLike[str]) -> Path:
    """Write the active adapter, sources included, as PEFT's files; also for `bottleneck` adapters.

    Raises:
        BadInput: the folder cannot be written.
    """
    config = model.peft_config[model.active_adapter]
    composed = isinstance(config, ScaLearnConfig)
    names = (
        ("sources", "variant", "share_layers", "dropout", "init_scale", "normalise") if composed else ("r",)
    )
    return write_adapter(
        model,
        folder,
        method="scalearn",
        arguments={name: value for name, value in asdict(config).items() if name in names},
        summary="Source adapters and the scales they are added with."
        if composed
        else "A bottleneck adapter.",
        usage='model = transfuse.adapt.scalearn.load(base_model, "this folder")',
    )


def load(
    model: PreTrainedModel | nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False
) -> PeftModel:
    """Put what `save` wrote on its base model. The sources' own folders are not needed.

    Args:
        model: The base.
        folder: Written by `save`, or by PEFT.
        trainable: Whether training is to go on.

    Raises:
        BadInput: no adapter there, or of another kind.
        CorruptFile: it cannot be read.
        IncompatibleModels: its tensors do not fit the model.
    """
    refuse_adapted(model)
    stored, tensors = read_adapter(folder)
    kinds: dict[Any, Any] = {"SCALEARN": ScaLearnConfig, "BOTTLENECK": BottleneckConfig}
    if stored.get("peft_type") not in kinds:
        raise BadInput("folder", str(folder), "holds another kind of adapter", "load it with PEFT")
    kind = kinds[stored["peft_type"]]
    known = {f.name for f in fields(kind)} - {"peft_type", "inference_mode"}
    config = kind(**{name: value for name, value in stored.items() if name in known})
    adapted = get_peft_model(model, config)
    fill_adapter(adapted, tensors, folder, adapted.base_model.prefix)
    adapted.base_model.requires_grad_(False)
    adapted.set_adapter(adapted.active_adapter, inference_mode=not trainable)
    return adapted.eval()


def _layers(model: Any) -> dict[str, ScaLearnLinear]:
    inner = getattr(getattr(model, "base_model", None), "model", nn.Identity())
    found = {name: layer for name, layer in inner.named_modules() if isinstance(layer, ScaLearnLinear)}
    if not found:
        raise BadInput(
            "model", type(model).__name__, "has no ScaLearn layer", "pass what scalearn() returned"
        )
    return found


@torch.no_grad()
def transfer_weights(model: PeftModel) -> dict[str, dict[str, float]]:
    """How much each source is used: source -> layer -> mean absolute scale.

    Raises:
        BadInput: the model has no ScaLearn adapters.
        NotApplicable: AdapterFusion, whose weights depend on the input.
    """
    layers, name = _layers(model), model.active_adapter
    config = model.peft_config[name]
    if config.variant == "fusion":
        raise NotApplicable("variant", "fusion", "has no scales", "read a ScaLearn model")
    means = {
        place: normalised(layer.scalearn_omega[name], config.normalise).abs().mean(1).tolist()
        for place, layer in layers.items()
        if name in layer.settings
    }
    return {
        source: {place: row[i] for place, row in means.items()} for i, source in enumerate(config.sources)
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: scales, biases and norms without weight decay, the rest with it."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1 and "scalearn_omega" not in name].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


@torch.no_grad()
def fold(model: PeftModel, base: PreTrainedModel | nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Write one plain adapter that does what the scaled sources do together; its width is the sum of theirs.

    Args:
        model: With ScaLearn adapters.
        base: Another copy of the base model; it gets the new adapter. A head of its own is not carried over.
        folder: A LoRA adapter, for LoRA sources, which PEFT loads; or else a bottleneck adapter.

    Returns:
        `base` with the adapter.

    Raises:
        BadInput: the model has no ScaLearn adapters; the folder cannot be written.
        NotApplicable: AdapterFusion; sources whose widths differ from layer to layer.
    """
    layers, name = _layers(model), model.active_adapter
    config = model.peft_config[name]
    totals = {sum(widths) for widths in config.widths.values()}
    if config.variant == "fusion" or len(totals) > 1:
        problem = "depends on the input" if config.variant == "fusion" else "differs in width between layers"
        raise NotApplicable("model", config.variant, problem, "keep the composed adapter")
    lora, total = config.kind == "lora", totals.pop()
    common = {"r": total, "target_modules": list(config.widths), "task_type": config.task_type}
    adapted = get_peft_model(
        base, LoraConfig(lora_alpha=total, **common) if lora else BottleneckConfig(**common)
    )
    model.eval()
    for place, layer in layers.items():
        target: Any = adapted.base_model.model.get_submodule(place)
        up, outer = layer.folded(name)
        if lora:
            target.lora_A["default"].weight.copy_(layer.scalearn_down[name])
            target.lora_B["default"].weight.copy_(up)
            continue
        values = {
            "down": layer.scalearn_down[name],
            "inner": layer.scalearn_inner[name],
            "up": up,
            "outer": outer,
        }
        for part, value in values.items():
            getattr(target, f"bottleneck_{part}")["default"].copy_(value)
    write_adapter(
        adapted,
        folder,
        method="scalearn",
        arguments={"sources": config.sources, "r": total},
        summary="Several adapters folded into one.",
        usage='model = peft.PeftModel.from_pretrained(base_model, "this folder")',
    )
    return adapted.eval()
