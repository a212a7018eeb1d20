"""LoRAMoE: several LoRA experts per linear layer, mixed by a router, so that tuning keeps world knowledge.

:arxiv: 2312.09979
:moves: training data -> experts and routers beside the weights
:access: weights, training data
:reversible: yes
:context: no

Instruction tuning on much data erases facts that a model knew. Here the model is frozen, and each projection of its
feed-forward blocks gets N low-rank experts, all of which are used, and a router that reads the projection's input:

    w_t = softmax(R x_t)                                        over the N experts, in float32
    y_t = W x_t + bias + (alpha / r) sum_i w_t,i B_i A_i dropout(x_t)

A and R start as LoRA's A does, B at zero: the first forward pass is that of the base. Training adds a *localized
balancing constraint* per layer, for which each sample is of type 1 (a question about world knowledge) or 0 (any
other task). Of the mass q[s, i] that a sample gives to an expert over its tokens:

    I[s, i] = 1 + delta where type 1 meets the first half of the experts, or type 0 the second;  else 1 - delta
    loss    = task + beta * sum over layers of Var(I q) / (Mean(I q)^2 + 1e-10)

The two halves then serve the two types. As q tends to 1 / I, knowledge is served by the *second* half. With
`delta=0` all experts are balanced alike; with `beta=0` nothing is. Answering needs no types.

Paper and code. The loss follows the authors' code, with the mean squared: so it does not depend on the length of the
samples. Their code counts padding as well; here it does not (`count_padding=True` does). Their example script has
delta = beta = 0, which switches the constraint off; the defaults here are 0.1 and 0.1. Disabling adapters gives the
base's output, which theirs refuses. Theirs draws a dropout mask for each expert; here a layer's experts share one.

The types travel beside the model's arguments: as `task_types` in a batch (`collator` puts them there, from the rows'
`task_type`), or by `with task_types([1, 0, 0]):`. In training mode the model adds the constraint to the loss that it
returns, so that a plain `Trainer` includes it; for losses computed outside, `balance(model)` gives that of the latest
forward pass. It is a statistic of the batch: with gradient accumulation each batch has its own, and with several
processes each process. Per layer, N r (m + n) + N m parameters are trained; one LoRA of rank N r has nearly as many.

The mixture depends on the input, so it cannot be merged into a weight.

    model, tokenizer = transfuse.load("smollm2-135m")
    adapted = loramoe(model, r=4, num_experts=8)
    fit(adapted, rows, lr=2e-4, epochs=1, collator=collator(tokenizer))    # rows with task_type 1 or 0
    save(adapted, "adapter")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from transfuse.adapt._base import (
    Targets,
    base_again,
    check_modules,
    fill_adapter,
    read_adapter,
    refuse_adapted,
    target_names,
    task_type,
    write_adapter,
)
from transfuse.adapt._loramoe_layers import (
    FEED_FORWARD,
    LoraMoeConfig,
    LoraMoeLinear,
    LoraMoeModel,
    check_targets,
    check_types,
    expert_mixture,
    localized_balancing_loss,
    route,
    route_mass,
    task_types,
    typed,
    watched,
)
from transfuse.core.batches import pad_collator
from transfuse.core.errors import BadInput
from transfuse.core.runs import evaluating
from transfuse.core.training import seeded

__all__ = [
    "LoraMoeConfig",
    "LoraMoeLinear",
    "LoraMoeModel",
    "balance",
    "collator",
    "expert_mixture",
    "load",
    "localized_balancing_loss",
    "loramoe",
    "restore",
    "route",
    "route_mass",
    "router_report",
    "save",
    "task_types",
]

OWN = ("r", "lora_alpha", "num_experts", "lora_dropout", "blc_alpha", "blc_weight", "count_padding")


def loramoe(
    model: PreTrainedModel | nn.Module,
    *,
    r: int = 4,
    alpha: float = 32,
    num_experts: int = 8,
    target_modules: Targets = None,
    delta: float = 0.1,
    beta: float = 0.1,
    dropout: float = 0.05,
    count_padding: bool = False,
    modules_to_save: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Put experts and routers on a model's linear layers.

    Args:
        model: A transformers model, or any module with linear layers (name them in `target_modules`). Its weights
            are frozen and do not change.
        r: Rank of each expert.
        alpha: The experts' sum is scaled by alpha / r.
        num_experts: Experts per layer; even, unless `delta` is 0.
        target_modules: Names or endings of linear layers, a regular expression, or "all-linear"; None takes
            `gate_proj`, `up_proj` and `down_proj`.
        delta: How far the two halves of the experts are kept apart, in [0, 1).
        beta: Weight of the balancing constraint.
        dropout: On the experts' input; the router reads it whole.
        count_padding: Let padding count in the constraint, as the authors' code does.
        modules_to_save: Further modules to train whole.
        seed: Of the adapter's initial values.

    Returns:
        A PEFT model: save it with `save`, undo it with `restore`. Merging it raises NotApplicable.

    Raises:
        BadInput: an argument out of range, a rank that is not below a target's smaller side, no target by that name.
        NotApplicable: a target that is no plain linear layer, quantised, tied, or on the meta device.
    """
    refuse_adapted(model)
    config = LoraMoeConfig(
        task_type=task_type(model),
        r=r,
        lora_alpha=alpha,
        num_experts=num_experts,
        lora_dropout=dropout,
        target_modules=list(FEED_FORWARD) if target_modules is None else target_names(model, target_modules),
        blc_alpha=delta,
        blc_weight=beta,
        count_padding=count_padding,
        modules_to_save=check_modules(model, modules_to_save),
    )
    check_targets(model, config)
    with seeded(seed):
        return get_peft_model(model, config)


def restore(model: PeftModel) -> Any:
    """Take the adapters off. The base model's weights never changed.

    Raises:
        BadInput: the model has no LoRAMoE adapters.
    """
    return base_again(model, LoraMoeModel)


def save(model: PeftModel, folder: str | os.PathLike[str]) -> Path:
    """Write the active adapter as PEFT's files; PEFT loads them too, once this module is imported.

    Raises:
        BadInput: the folder cannot be written.
    """
    config = model.peft_config[model.active_adapter]
    return write_adapter(
        model,
        folder,
        method="loramoe",
        arguments={name: getattr(config, name) for name in OWN},
        summary="LoRAMoE: experts and routers to put beside a base model's weights.",
        usage='model = transfuse.adapt.loramoe.load(base_model, "this folder")',
    )


def load(
    model: PreTrainedModel | nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False
) -> PeftModel:
    """Put a saved adapter on its base model.

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
    if stored.get("peft_type") != "LORAMOE":
        raise BadInput("folder", str(folder), "holds another kind of adapter", "load it with PEFT")
    known = {f.name for f in fields(LoraMoeConfig)} - {"peft_type", "inference_mode"}
    config = LoraMoeConfig(**{name: value for name, value in stored.items() if name in known})
    check_targets(model, config)
    adapted = get_peft_model(model, config)
    fill_adapter(adapted, tensors, folder, LoraMoeModel.prefix)
    adapted.base_model.requires_grad_(False)
    adapted.set_adapter(adapted.active_adapter, inference_mode=not trainable)
    return adapted.eval()


def collator(tokenizer: Any, *, default: int = 1) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """A collator that also hands on what each sample is: `task_types`, int64 `[B]`, from the rows' `task_type`.

    Args:
        tokenizer: Its padding token fills up (or that token's id).
        default: Type of rows that do not say: by default, world knowledge.
    """
    pad = pad_collator(tokenizer)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**pad(rows), "task_types": typed(rows, default)}

    return collate


def balance(model: Any) -> torch.Tensor:
    """The constraint in the latest training pass, times beta, summed over layers: for losses computed outside.

    Do not add it to a loss that the model returned, which holds it.

    Returns:
        A scalar with gradients to the routers; zero where no types were known, or `beta` is 0.

    Raises:
        BadInput: the model has no LoRAMoE adapters.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, LoraMoeModel):
        raise BadInput(
            "model", type(model).__name__, "has no LoRAMoE adapters", "pass what loramoe() returned"
        )
    return next(tuner.parameters()).new_zeros(()) if tuner.balance is None else tuner.balance


@torch.no_grad()
def router_report(
    model: PeftModel, batches: Iterable[Mapping[str, Any]]
) -> dict[str, dict[int, list[float]]]:
    """How the routers of the active adapter treat the two types of samples, without dropout.

    Args:
        model: With LoRAMoE adapters.
        batches: Model inputs with `task_types` (see `collator`); padding is left out by `attention_mask`.

    Returns:
        Layer -> type -> the mean weight of each expert over that type's tokens; the weights add up to 1.

    Raises:
        BadInput: a batch without types, or a model without such adapters, or with them disabled.
    """
    balance(model)
    layers = {id(m): n for n, m in model.base_model.model.named_modules() if isinstance(m, LoraMoeLinear)}
    sums: dict[str, dict[int, torch.Tensor]] = {name: {} for name in layers.values()}
    with evaluating(model):
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "task_types")}
            if "task_types" not in batch:
                remedy = "make them with collator(tokenizer)"
                raise BadInput("batches", sorted(batch), "lack task_types", remedy)
            with watched(inputs.get("attention_mask")) as masses:
                model(**inputs)
            own = {layer: mass for (layer, name), mass in masses.items() if name == model.active_adapter}
            if not own:
                raise BadInput("model", type(model).__name__, "has its adapters disabled", "enable them")
            for layer, mass in own.items():
                types = check_types(batch["task_types"], len(mass)).to(mass.device)
                for kind in types.unique().tolist():
                    found = sums[layers[layer]]
                    found[kind] = found.get(kind, 0) + mass[types == kind].sum(0)
    return {
        name: {kind: (mass / mass.sum()).tolist() for kind, mass in sorted(found.items())}
        for name, found in sums.items()
    }
