"""Bottleneck adapters as PEFT methods: what they add to a layer's output, their tuner, and adapters read as sources."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from transfuse.adapt._base import Tuner, is_target, linear_targets, new_kind, read_adapter, register
from transfuse.core.errors import BadInput, CorruptFile, NotApplicable
from transfuse.core.loras import changed_base, no_product

__all__ = [
    "BottleneckConfig",
    "BottleneckLinear",
    "BottleneckModel",
    "Source",
    "apart",
    "last_linear",
    "places",
    "read_source",
]

BLOCK = r"(.*\.)?layer\.\d+\.output"  # where BERT-type models end a feed-forward block


def ends_block(module: nn.Module) -> bool:
    """Whether it is `LayerNorm(dropout(dense(x)) + input)`, by which BERT-type models end their blocks."""
    parts = dict(module.named_children())
    if parts.keys() != {"dense", "dropout", "LayerNorm"}:
        return False
    return isinstance(parts["dense"], nn.Linear) and isinstance(parts["LayerNorm"], nn.LayerNorm)


def last_linear(layer: Any) -> nn.Linear:
    """The linear layer whose output adapters on `layer` add to: itself, or the one in the end of a block."""
    found: nn.Linear = layer.dense if ends_block(layer) else layer
    return found


def apart(
    layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A layer's pass, taken apart where bottleneck adapters come in.

    Args:
        layer: A linear layer, or the end of a block (see `ends_block`).
        x: What it is called with.
        args: Likewise: for the end of a block, the block's residual input.
        kwargs: Likewise.

    Returns:
        h, which adapters read; res, which they add to; and what turns the sum into the layer's output.
    """
    if not ends_block(layer):
        out = layer(x, *args, **kwargs)
        return out, out, lambda total: total
    before = args[0] if args else kwargs["input_tensor"]
    res = layer.dropout(layer.dense(x))

    def close(total: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = layer.LayerNorm(total + before)
        return normed

    return close(res), res, close


def places(model: nn.Module, targets: str | Sequence[str] | None) -> str | list[str]:
    """Where bottleneck adapters go: on the linear layers named, or on the end of a block instead of its linear layer.

    Args:
        model: May have adapters already.
        targets: As `linear_targets` takes them; blocks' ends may be named themselves. None: the feed-forward blocks.

    Raises:
        BadInput: nothing matches.
        NotApplicable: a match that is no plain linear layer.
    """
    plain = {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if not isinstance(module, BaseTunerLayer)
    }
    ends = [name for name, module in plain.items() if ends_block(module)]
    if targets is None:
        targets = BLOCK if any(is_target(name, BLOCK) for name in ends) else ["down_proj"]
    inside = {f"{name}.dense": name for name in ends}
    found = dict.fromkeys(inside.get(name, name) for name in plain if ends and is_target(name, targets))
    chosen: str | list[str] = list(found) or (targets if isinstance(targets, str) else list(targets))
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        linear_targets(model, [f"{name}.dense" if name in ends else name for name in found] or chosen)
    return chosen


@dataclass
class BottleneckConfig(PeftConfig):
    """What `get_peft_model` takes for a bottleneck adapter.

    Attributes:
        r: Width of the bottleneck.
        target_modules: Names or endings of the linear layers that adapters come after, or a regular expression;
            where such a layer ends a block of a BERT-type model, the end as a whole is put here.
        modules_to_save: Further modules to train whole.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = new_kind("bottleneck")
        if self.r < 1:
            raise BadInput("r", self.r, "is below 1", "give the width of the bottleneck")


class BottleneckLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer, or end of a block, with `res + W_up relu(W_down h + b) + c` per adapter (see `apart`)."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_inner", "bottleneck_up", "bottleneck_outer")
    bottleneck_down: Any
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _active_adapter: str | list[str]

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    def update_layer(self, name: str, config: BottleneckConfig) -> None:
        """Add the adapter `name`, which adds nothing yet."""
        linear = last_linear(self.base_layer)
        width, like = linear.out_features, linear.weight
        make: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        bound = 1 / math.sqrt(width)
        values = {
            "down": torch.empty((config.r, width), **make).uniform_(-bound, bound),
            "inner": torch.zeros(config.r, **make),
            "up": torch.zeros((width, config.r), **make),
            "outer": torch.zeros(width, **make),
        }
        for part, value in values.items():
            getattr(self, f"bottleneck_{part}")[name] = nn.Parameter(value)
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with what the active adapters add."""
        h, out, close = apart(self.base_layer, x, *args, **kwargs)
        if self.disable_adapters:
            return h
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, inner, up, outer = (getattr(self, part)[name] for part in self.adapter_layer_names)
                hidden = torch.relu(nn.functional.linear(h.to(down.dtype), down, inner))
                out = out + nn.functional.linear(hidden, up, outer).to(out.dtype)
        return close(out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotApplicable."""
        raise NotApplicable("merge", "bottleneck", "cannot be merged: it is not linear", "keep the adapter")


class BottleneckModel(Tuner):
    """The tuner of bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config.target_modules = places(self.model, peft_config.target_modules)
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        if ends_block(new_module):  # put back: it has no weight of its own, which PEFT would hand on
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        layer = target
        if not isinstance(layer, self.tuner_layer_cls):
            if not isinstance(target, nn.Linear) and not ends_block(target):
                remedy = "target the layers that the first adapter sits on"
                raise NotApplicable("target_modules", current_key, "is no linear layer", remedy)
            layer = self.tuner_layer_cls(target)
            layer._active_adapter = list(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
        self._update(layer, adapter_name, peft_config, current_key)

    def _update(self, layer: Any, adapter_name: str, config: Any, key: str) -> None:
        layer.update_layer(adapter_name, config)


register("bottleneck", BottleneckConfig, BottleneckModel)


@dataclass
class Source:
    """One adapter read as a source.

    Attributes:
        kind: "bottleneck" (reads the layer's output, through a ReLU; see `apart`) or "lora" (reads its input).
        layers: Layer -> `down` `[r, in]`, `inner` `[r]`, `up` `[d, r]` and `outer` `[d]`, in float32; LoRA's
            scaling is in `up`, and its `inner` and `outer` are zero.
    """

    kind: str
    layers: dict[str, dict[str, torch.Tensor]]


def read_source(folder: Any) -> Source:
    """A saved LoRA or bottleneck adapter.

    Raises:
        BadInput: no adapter there.
        CorruptFile: it cannot be read, or holds numbers that are not finite.
        NotApplicable: an adapter of another kind or variant.
    """
    config, tensors = read_adapter(folder)
    kind = str(config.get("peft_type", "")).lower()
    used = [name for name in ("alpha_pattern", "fan_in_fan_out") if config.get(name)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    more, start = no_product(config), changed_base(config)
    used += [more[0]] if more else []
    used += [f"init_lora_weights={start}"] if start else []
    if kind not in ("lora", "bottleneck") or used:
        found = f"is of the kind {kind or 'unknown'}" + (f" with {used[0]}" if used else "")
        raise NotApplicable("sources", str(folder), found, "give plain LoRA or bottleneck adapters")
    names = {"lora_A.weight": "down", "lora_B.weight": "up"} if kind == "lora" else {}
    names |= {f"bottleneck_{part}": part for part in ("down", "inner", "up", "outer")}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((end for end in names if key.endswith("." + end)), None)
        if ending is None and ("lora_" in key or "trainable_tokens" in key):
            found = f"holds more than factors of linear layers ({key})"
            raise NotApplicable("sources", str(folder), found, "give plain LoRA or bottleneck adapters")
        if ending is None:
            continue  # a head trained with it
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptFile(
                "sources", str(folder), f"holds numbers that are not finite at {key}", "train it again"
            )
        layer = key.removeprefix("base_model.model.").removesuffix("." + ending)
        layers.setdefault(layer, {})[names[ending]] = tensor.float()
    if not layers:
        raise CorruptFile("sources", str(folder), "holds no layer", "save the adapter again")
    for parts in layers.values():
        r = parts["down"].shape[0]
        if kind == "lora":
            root = math.sqrt(r) if config.get("use_rslora") else r
            parts["up"] = parts["up"] * (config["lora_alpha"] / root)
        parts.setdefault("inner", torch.zeros(r))
        parts.setdefault("outer", torch.zeros(len(parts["up"])))
    return Source(kind, layers)


def same_places(sources: Sequence[Source], folders: Sequence[Any]) -> None:
    """Raises NotApplicable unless all sources are of one kind and sit on the same layers, equally wide."""
    first = sources[0]
    shapes = {name: (p["down"].shape[1], p["up"].shape[0]) for name, p in first.layers.items()}
    for source, folder in zip(sources, folders, strict=True):
        own = {name: (p["down"].shape[1], p["up"].shape[0]) for name, p in source.layers.items()}
        if source.kind != first.kind or own != shapes:
            problem = f"sits elsewhere than {folders[0]}"
            raise NotApplicable(
                "sources", str(folder), problem, "give adapters of one kind on the same layers"
            )
