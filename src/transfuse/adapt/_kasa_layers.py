"""The layers of KaSA: PEFT's variant on a weight that is truncated already, and its regulariser."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from peft import KasaConfig, LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import KasaLinearVariant
from torch import nn

from transfuse.adapt._base import base_again, batch_share
from transfuse.core.errors import BadInput, CorruptFile, NotApplicable

__all__ = [
    "KasaLinear",
    "KasaModel",
    "Record",
    "Settings",
    "base_before",
    "kasa_delta",
    "kasa_penalty",
    "kasa_regularizer",
    "read_config",
]


def kasa_delta(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, scaling: float) -> torch.Tensor:
    """The update of a weight, `scaling * B diag(d) A` (equation 7).

    Args:
        a: `[r, m]`.
        b: `[n, r]`.
        d: `[r]`.
        scaling: alpha / r.

    Returns:
        `[n, m]`.
    """
    return scaling * (b * d) @ a


def kasa_penalty(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, *, beta: float, gamma: float
) -> torch.Tensor:
    """The regulariser of each layer: `beta |d|^2 + gamma (|B^T B - I|_F + |A A^T - I|_F)`, equations 9 to 12.

    Args:
        a: `[..., r, m]`; leading dimensions are layers of one shape.
        b: `[..., n, r]`.
        d: `[..., r]`.
        beta: Weight of the diagonal's squared norm.
        gamma: Weight of the distance from orthonormal factors: the norm, not its square.

    Returns:
        `[...]`, float32 at least.

    Raises:
        BadInput: `beta` or `gamma` is negative.
    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        if not value >= 0:
            raise BadInput(name, value, "is negative", "give 0 or more")
    a, b, d = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b, d))
    eye = torch.eye(d.shape[-1], device=d.device, dtype=d.dtype)
    apart = torch.linalg.matrix_norm(b.mT @ b - eye) + torch.linalg.matrix_norm(a @ a.mT - eye)
    return beta * d.square().sum(-1) + gamma * apart


@dataclass
class Settings(KasaConfig):
    """What PEFT's configuration has no field for; it ignores these when it reads an adapter."""

    truncate_rank: int = 8
    reduction: str = "mean"
    base_dtype: str = ""
    base_hash: str = ""
    world_hash: str = ""


OWN = ("task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save")
# Of a stored configuration: what is read, and what says nothing about the layers.
TAKEN = {
    *OWN, "kasa_config", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode",
}  # fmt: skip


def read_config(stored: Mapping[str, Any], folder: str | os.PathLike[str]) -> tuple[LoraConfig, Settings]:
    """The configuration of a saved adapter, see `adapt._base.read_adapter`.

    Raises:
        BadInput: it is of another kind.
        NotApplicable: it has options that `kasa` does not have.
        CorruptFile: its values make no configuration.
    """
    own, plain = stored.get("kasa_config"), LoraConfig()
    if own is None:
        raise BadInput("folder", str(folder), "holds another kind of adapter", "load it with PEFT")
    for name, value in stored.items():
        if name not in TAKEN and value and value != getattr(plain, name, value):
            problem = f"was trained with {name} = {value}, which is not offered"
            raise NotApplicable("folder", str(folder), problem, "load it with PEFT")
    try:
        known = {field.name for field in fields(Settings)}
        settings = Settings(**{"truncate_rank": stored["r"], **{k: v for k, v in own.items() if k in known}})
        config = LoraConfig(**{name: stored[name] for name in OWN if name in stored}, kasa_config=settings)
        if not config.target_modules or not hasattr(torch, settings.base_dtype or "float32"):
            raise ValueError("no target_modules, or no such base_dtype")
    except (AttributeError, TypeError, ValueError) as error:
        problem = f"has an unreadable adapter_config.json ({error})"
        raise CorruptFile("folder", str(folder), problem, "save the adapter again") from error
    return config, settings


@dataclass
class Record:
    """One layer before truncation; `original` is None where the base came truncated or is not kept."""

    original: torch.Tensor | None
    singular_values: torch.Tensor


class _Variant(KasaLinearVariant):
    """PEFT's KaSA arithmetic on a weight that is truncated already, with an exact unmerge."""

    @staticmethod
    def init(module: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if not hasattr(module, "lora_diag"):
            module.lora_diag = nn.ParameterDict()
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_diag")
        like = module.lora_A[adapter_name].weight
        module.lora_diag[adapter_name] = nn.Parameter(
            torch.randn(module.r[adapter_name], device=like.device, dtype=like.dtype)
        )

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        factors = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        exact = torch.promote_types(orig_weight.dtype, torch.float32)
        a, b, d = (t.detach().to(exact) for t in (*factors, module.lora_diag[active_adapter]))
        module.before_merge.append(orig_weight.detach().clone())
        delta = kasa_delta(a, b, d, module.scaling[active_adapter])
        return (orig_weight.to(exact) + delta).to(orig_weight.dtype)  # rounded once

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data.copy_(_Variant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return module.before_merge.pop().to(orig_weight.device)


class KasaLinear(LoraLinear):
    """PEFT's LoRA layer with the variant above, its `record` and what the weight was before merging."""

    record: Record | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.before_merge: list[torch.Tensor] = []

    @property
    def lora_variants(self) -> dict[Any, Any]:
        return {(): None, ("kasa_config",): _Variant}


class KasaModel(LoraModel):
    """PEFT's LoRA tuner, which in training adds the regulariser to the loss the model returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if not self.training or kwargs.get("labels") is None:
            return output
        penalty = kasa_regularizer(self) * batch_share(self.model, kwargs)
        if isinstance(output, tuple):
            return (output[0] + penalty, *output[1:])
        output["loss"] = output["loss"] + penalty
        return output


def kasa_regularizer(
    model: nn.Module,
    *,
    beta: float | None = None,
    gamma: float | None = None,
    reduction: Literal["mean", "sum"] | None = None,
) -> torch.Tensor:
    """The regulariser of a model's active KaSA adapters, to add to a loss computed outside the model.

    Models made by `kasa` add it to their own loss while training; use this for label smoothing,
    distillation and other losses computed outside, or with PEFT's own KaSA models.

    Args:
        model: A PEFT model with KaSA layers.
        beta: As in `kasa`; None takes the adapter's.
        gamma: As in `kasa`; None takes the adapter's.
        reduction: As in `kasa`; None takes the adapter's.

    Returns:
        A float32 scalar with gradients to A, B and d. Zero where the adapters are disabled or merged.

    Raises:
        BadInput: the model has no KaSA layer.
    """
    groups: dict[Any, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = defaultdict(list)
    present, how = False, reduction
    for module in model.modules():
        if not isinstance(module, LoraLayer) or not hasattr(module, "lora_diag"):
            continue
        present = True
        for name in module.active_adapters:
            if name in module.lora_diag and not (module.disable_adapters or module.merged):
                a, b, d = module.lora_A[name].weight, module.lora_B[name].weight, module.lora_diag[name]
                groups[name, a.shape, b.shape, a.device].append((a, b, d))
    if not present:
        raise BadInput(
            "model", type(model).__name__, "has no KaSA layer", "make it with transfuse.adapt.kasa.kasa"
        )
    total, count, configs = torch.zeros(()), 0, _configs(model)
    for (name, *_), members in groups.items():
        own = configs[name].kasa_config
        how = reduction or getattr(own, "reduction", "mean")
        a, b, d = (torch.stack(tensors) for tensors in zip(*members, strict=True))
        weights = {"beta": own.beta if beta is None else beta, "gamma": own.gamma if gamma is None else gamma}
        total = total.to(a.device) + kasa_penalty(a, b, d, **weights).sum()
        count += len(members)
    return total / count if how != "sum" and count else total


def base_before(model: Any) -> Any:
    """Take the adapters off and put back the weights from before truncation, where they were kept."""
    parts = model.base_model.model.named_modules()
    records = {name: part.record for name, part in parts if isinstance(part, KasaLinear)}
    base = base_again(model, KasaModel)
    with torch.no_grad():
        for name, record in records.items():
            if record is not None and record.original is not None:
                base.get_submodule(name).weight.copy_(record.original)
    return base


def _configs(model: Any) -> dict[str, LoraConfig]:
    """PEFT's configurations by adapter name, of a PEFT model or its tuner."""
    return model.peft_config
