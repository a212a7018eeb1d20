"""The tuner of ScaLearn: finished adapters of a layer, frozen, and the scales that are learnt for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from transfuse.adapt._base import linear_targets, new_kind, register
from transfuse.adapt._bottleneck import (
    BottleneckModel,
    apart,
    last_linear,
    places,
    read_source,
    same_places,
)
from transfuse.core.errors import BadInput, CorruptFile, NotApplicable

__all__ = [
    "NORMALISE",
    "VARIANTS",
    "ScaLearnConfig",
    "ScaLearnLinear",
    "ScaLearnModel",
    "fold_scales",
    "fuse",
    "normalised",
    "scale_and_add",
]

VARIANTS = ("vector", "uniform", "fusion")
NORMALISE = ("none", "mean", "softmax")
PARTS = ("down", "inner", "up", "outer")


def scale_and_add(residual: torch.Tensor, outputs: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """A layer's output with scaled adapters, `residual + sum_s omega_s * U_s`; the residual is added once.

    Args:
        residual: `[..., d]`.
        outputs: `[..., S, d]`, what each source adds, without its own residual.
        omega: `[S, d]`, or `[S, 1]` for one number per source.

    Returns:
        `[..., d]`.
    """
    return residual + (outputs * omega).sum(-2)


def normalised(omega: torch.Tensor, how: str) -> torch.Tensor:
    """Scales `[S, d]` as they are ("none"), divided by their sum over sources ("mean"), or their softmax.

    Zeros in all sources, which dropout leaves now and then, stay zeros when divided.
    """
    if how == "none":
        return omega
    if how == "softmax":
        return torch.softmax(omega, 0)
    total = omega.sum(0, keepdim=True)
    return omega / total.masked_fill((omega == 0).all(0, keepdim=True), 1)


def fold_scales(
    up: torch.Tensor, outer: torch.Tensor, omega: torch.Tensor, widths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One adapter's up-projection and bias that do what the scaled sources do together, exactly.

    Args:
        up: `[d, R]`, the sources' side by side, R being the sum of their `widths`.
        outer: `[S, d]`, their biases.
        omega: `[S, d]` or `[S, 1]`.
        widths: Columns of each source.

    Returns:
        `[d, R]` and `[d]`.
    """
    counts = torch.tensor(widths, device=omega.device)
    return up * omega.repeat_interleave(counts, 0).mT, (omega * outer).sum(0)


def fuse(
    residual: torch.Tensor,
    outputs: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    h: torch.Tensor | None = None,
) -> torch.Tensor:
    """AdapterFusion: `residual + sum_s a_s V U_s` with `a = softmax_s((Q h + q) . (K U_s + k))`.

    Args:
        residual: `[..., d]`.
        outputs: `[..., S, d]`.
        query: `[d, d + 1]`, Q and its bias as the last column.
        key: `[d, d + 1]`, likewise.
        value: `[d, d]`.
        h: `[..., d]`, what the adapters read; None where that is the residual.

    Returns:
        `[..., d]`.
    """
    asked = nn.functional.linear(residual if h is None else h, query[:, :-1], query[:, -1])
    offered = nn.functional.linear(outputs, key[:, :-1], key[:, -1])
    attention = torch.softmax((offered * asked.unsqueeze(-2)).sum(-1, keepdim=True), -2)
    return residual + (attention * (outputs @ value.mT)).sum(-2)


@dataclass
class ScaLearnConfig(PeftConfig):
    """What `get_peft_model` takes; `scalearn` makes one.

    Attributes:
        sources: Folders of the source adapters; read once, since what is saved holds them.
        variant: "vector", "uniform" or "fusion".
        share_layers: One set of scales for all layers.
        dropout: On the scales.
        init_scale: They start around this over the number of sources.
        normalise: "none", "mean" or "softmax" over sources.
        kind: Of the sources; found out.
        widths: Their bottlenecks or ranks by layer; found out.
        target_modules: The layers that they sit on; found out.
        modules_to_save: Modules to train whole: a task's head.
    """

    sources: list[str] = field(default_factory=list)
    variant: str = "vector"
    share_layers: bool = False
    dropout: float = 0.3
    init_scale: float = 2.0
    normalise: str = "none"
    kind: str = ""
    widths: dict[str, list[int]] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = new_kind("scalearn")
        for name, value, known in (
            ("variant", self.variant, VARIANTS),
            ("normalise", self.normalise, NORMALISE),
        ):
            if value not in known:
                raise BadInput(name, value, "is not known", f"use one of {', '.join(known)}")
        if not 0 <= self.dropout < 1:
            raise BadInput("dropout", self.dropout, "is not in [0, 1)", "give a probability")
        if not self.sources:
            raise BadInput("sources", self.sources, "is empty", "give folders of trained adapters")
        if self.variant == "fusion" and (self.share_layers or self.normalise != "none"):
            argument = "share_layers" if self.share_layers else "normalise"
            raise BadInput(argument, getattr(self, argument), "has no meaning for fusion", "leave it out")

    def read(self) -> dict[str, dict[str, Any]]:
        """The sources' tensors by layer, and what the fields say about them."""
        found = [read_source(folder) for folder in self.sources]
        same_places(found, self.sources)
        layers: dict[str, dict[str, Any]] = {}
        for name in found[0].layers:
            parts = [source.layers[name] for source in found]
            self.widths[name] = [len(p["down"]) for p in parts]
            layers[name] = {
                "down": torch.cat([p["down"] for p in parts]),
                "inner": torch.cat([p["inner"] for p in parts]),
                "up": torch.cat([p["up"] for p in parts], 1),
                "outer": torch.stack([p["outer"] for p in parts]),
            }
        self.kind, self.target_modules = found[0].kind, list(layers)
        return layers


class ScaLearnLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer or end of a block (see `apart`), source adapters side by side, and how to combine them."""

    adapter_layer_names = ("scalearn_omega", "scalearn_query", "scalearn_key", "scalearn_value")
    other_param_names = (
        "scalearn_down",
        "scalearn_inner",
        "scalearn_up",
        "scalearn_outer",
        "settings",
        "widths",
    )
    base_layer: Any
    scalearn_omega: Any
    scalearn_value: Any
    scalearn_down: Any
    scalearn_inner: Any
    scalearn_up: Any
    scalearn_outer: Any
    active_adapters: list[str]
    set_adapter: Any
    _active_adapter: str | list[str]

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for part in PARTS:
            setattr(self, f"scalearn_{part}", BufferDict(persistent=True))
        self.settings: dict[str, ScaLearnConfig] = {}
        self.widths: dict[str, list[int]] = {}
        self.before_merge: list[torch.Tensor] = []
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    def update_layer(
        self,
        name: str,
        config: ScaLearnConfig,
        key: str,
        tensors: dict[str, Any] | None,
        shared: nn.Parameter | None,
    ) -> None:
        """Add the adapter `name`: its sources' `tensors` (zeros, if they are to be loaded) and what is learnt."""
        linear = last_linear(self.base_layer)
        d, device, widths = linear.out_features, linear.weight.device, config.widths[key]
        if tensors is None:
            n, total = len(widths), sum(widths)
            read = linear.in_features if config.kind == "lora" else d
            shapes = {"down": (total, read), "inner": (total,), "up": (d, total), "outer": (n, d)}
            tensors = {part: torch.zeros(shape) for part, shape in shapes.items()}
        for part in PARTS:
            getattr(self, f"scalearn_{part}")[name] = tensors[part].to(device)
        self.settings[name], self.widths[name] = config, widths
        if config.variant == "fusion":
            for part in ("query", "key"):
                drawn = 0.02 * torch.randn(d, d + 1)
                drawn[:, -1] = 0  # the bias
                getattr(self, f"scalearn_{part}")[name] = nn.Parameter(drawn.to(device))
            self.scalearn_value[name] = nn.Parameter((torch.eye(d) + 1e-6).to(device))
        else:
            self.scalearn_omega[name] = start(config, len(widths), d, device) if shared is None else shared
        self.set_adapter(self.active_adapters)

    def scales(self, name: str) -> torch.Tensor:
        """The scales as they are used: in training with dropout, and then normalised. `[S, d]` or `[S, 1]`."""
        config = self.settings[name]
        omega = nn.functional.dropout(self.scalearn_omega[name], config.dropout, self.training)
        return normalised(omega, config.normalise)

    def folded(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Up-projection and bias of one adapter that stands for all (see `fold_scales`)."""
        return fold_scales(
            self.scalearn_up[name], self.scalearn_outer[name], self.scales(name), self.widths[name]
        )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the combined sources of each active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        h, out, close = apart(self.base_layer, x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return h
        for name in self.active_adapters:
            if name not in self.settings:
                continue
            down, inner = self.scalearn_down[name], self.scalearn_inner[name]
            lora = self.settings[name].kind == "lora"
            hidden = nn.functional.linear((x if lora else h).to(down.dtype), down, inner)
            hidden = hidden if lora else torch.relu(hidden)
            if self.settings[name].variant == "fusion":
                ups = self.scalearn_up[name].split(self.widths[name], 1)
                pieces = hidden.split(self.widths[name], -1)
                outputs = torch.stack([piece @ up.mT for piece, up in zip(pieces, ups, strict=True)], -2)
                outputs = outputs + self.scalearn_outer[name]
                query, key, value = (getattr(self, part)[name] for part in self.adapter_layer_names[1:])
                total = fuse(out.to(down.dtype), outputs, query, key, value, h.to(down.dtype))
                out = total.to(out.dtype)
            else:
                out = out + nn.functional.linear(hidden, *self.folded(name)).to(out.dtype)
        return close(out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add LoRA sources, as scaled, to the weight."""
        for name in adapter_names or self.active_adapters:
            if name not in self.settings or name in self.merged_adapters:
                continue
            config = self.settings[name]
            if config.kind != "lora" or config.variant == "fusion":
                problem = "cannot be merged: what its sources add is not linear in the layer's input"
                raise NotApplicable("merge", config.variant, problem, "keep the adapter, or fold its scales")
            weight = self.base_layer.weight
            exact = torch.promote_types(weight.dtype, torch.float32)
            self.before_merge.append(weight.detach().clone())
            mode = self.training
            self.eval()
            delta = self.folded(name)[0].to(exact) @ self.scalearn_down[name].to(exact)
            self.train(mode)
            if safe_merge and not bool(torch.isfinite(delta).all()):
                self.before_merge.pop()
                raise BadInput("safe_merge", name, "holds numbers that are not finite", "train it again")
            weight.data = (weight.data.to(exact) + delta.detach()).to(weight.dtype)  # rounded once
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the weight from before merging back, bit for bit."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.base_layer.weight.data = self.before_merge.pop()


def start(config: ScaLearnConfig, count: int, d: int, device: torch.device) -> nn.Parameter:
    """Scales drawn around `init_scale / S`, in float32."""
    shape = (count, d if config.variant == "vector" else 1)
    return nn.Parameter((config.init_scale / count + 0.001 * torch.randn(shape)).to(device))


class ScaLearnModel(BottleneckModel):
    """The tuner: reads the sources, puts them on their layers, and shares the scales where that is asked for."""

    prefix = "scalearn_"
    tuner_layer_cls = ScaLearnLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        self._read = None if peft_config.widths else peft_config.read()
        self._shared: list[nn.Parameter] = []
        if peft_config.kind == "bottleneck":
            peft_config.target_modules = places(self.model, peft_config.target_modules)
        elif not any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            linear_targets(self.model, peft_config.target_modules)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name, tensors in (self._read or {}).items():
            if (target := modules.get(name)) is None:
                problem = f"sit on {name}, which the model lacks"
                raise BadInput("sources", peft_config.sources, problem, "give adapters of this base model")
            layer: nn.Linear = last_linear(
                target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            )
            read = layer.in_features if peft_config.kind == "lora" else layer.out_features
            wanted, found = (read, layer.out_features), (tensors["down"].shape[1], tensors["up"].shape[0])
            if wanted != found:
                problem = f"read and write {found} values at {name}, where the model has {wanted}"
                raise BadInput("sources", peft_config.sources, problem, "give adapters of this base model")

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._read, self._shared = None, []

    def _update(self, layer: Any, adapter_name: str, config: Any, key: str) -> None:
        if key not in config.widths:
            raise CorruptFile("widths", sorted(config.widths), f"lack {key}", "save the adapter again")
        shared = None
        if config.share_layers:
            linear = last_linear(layer.base_layer)
            d = linear.out_features
            if not self._shared:
                self._shared.append(start(config, len(config.widths[key]), d, linear.weight.device))
            shared = self._shared[0]
            if config.variant == "vector" and shared.shape[1] != d:
                problem = "needs layers of one width for scales per dimension"
                raise NotApplicable("share_layers", True, problem, 'use variant="uniform"')
        tensors = None if self._read is None else self._read[key]
        layer.update_layer(adapter_name, config, key, tensors, shared)


register("scalearn", ScaLearnConfig, ScaLearnModel)
