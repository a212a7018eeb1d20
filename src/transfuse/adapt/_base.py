"""What adapters share: which layers they sit on, and folders that PEFT can load.

An adapter method is a function `method(model, *, r=..., target_modules=..., seed=0) -> PeftModel` beside
`save` and `load`. What it returns merges and unmerges, trains nothing but its own parameters, and starts
from the same values for the same seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transfuse.core.errors import BadInput, CorruptFile, NotApplicable
from transfuse.core.files import atomic_dir, atomic_write, check_writable, read_tensors, write_tensors
from transfuse.core.lineage import write_lineage

__all__ = [
    "LayerSpectrum",
    "Targets",
    "layer_spectrum",
    "linear_targets",
    "read_adapter",
    "target_names",
    "task_type",
    "weights_hash",
    "write_adapter",
]

Targets = str | Sequence[str] | None
"""Names or endings of layers, a regular expression, "all-linear", or None for the architecture's usual
ones."""


def target_names(model: nn.Module, targets: Targets) -> str | list[str]:
    """`targets` as PEFT's configuration takes them: "all-linear" and None spelt out.

    Raises:
        BadInput: empty, or None for an architecture without usual targets.
    """
    if targets == "all-linear":
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        names = {
            n for n, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
        }
        return sorted({name.rpartition(".")[2] for name in names})
    if targets is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in DEFAULT_TARGETS:
            raise BadInput(
                "target_modules", None, f"has no default for {kind}", "name the linear layers to adapt"
            )
        return list(DEFAULT_TARGETS[kind])
    if not targets:
        raise BadInput("target_modules", targets, "is empty", "name the linear layers to adapt")
    return targets if isinstance(targets, str) else list(targets)


def linear_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Linear]:
    """The layers that `targets` (see `target_names`) name, in the model's order.

    Raises:
        BadInput: nothing matches.
        NotApplicable: a match that is not a plain `nn.Linear`: transposed (GPT-2's Conv1D), another kind of
            layer, quantised, on the meta device, or with a weight that another layer shares.
    """

    def named(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    found = {name: layer for name, layer in model.named_modules() if named(name)}
    if not found:
        endings = sorted(
            {n.rpartition(".")[2] for n, layer in model.named_modules() if type(layer) is nn.Linear}
        )
        raise BadInput(
            "target_modules", targets, "matches no layer", f"linear layers here: {', '.join(endings)}"
        )
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, layer in found.items():
        problem, remedy = "", "target nn.Linear layers"
        weight = getattr(layer, "weight", None)
        if isinstance(layer, Conv1D):
            problem = "is a Conv1D, which stores its weight transposed"
        elif not isinstance(layer, nn.Linear):
            problem = f"is a {type(layer).__name__}, not a linear layer"
        elif type(layer) is not nn.Linear or not _plain(weight):
            problem, remedy = "is quantised or of a special kind", "load the model in float32 or bfloat16"
        elif weight is not None and weight.is_meta:
            problem, remedy = "is on the meta device: it has no values to decompose", "load the weights first"
        elif shared[id(weight)] > 1:
            problem, remedy = "shares its weight with another layer", "untie it, or leave it out"
        if problem:
            raise NotApplicable("target_modules", name, problem, remedy)
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


def _plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.is_floating_point()


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task, by its class; None for one without a head."""
    kinds = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    return next((kind for end, kind in kinds.items() if type(model).__name__.endswith(end)), None)


def weights_hash(layers: Mapping[str, nn.Linear], dtype: torch.dtype) -> str:
    """SHA-256 over names and weights of `layers`, seen in `dtype`."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        weight = layers[name].weight.detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class LayerSpectrum:
    """One row of a spectral report.

    Attributes:
        name: The layer.
        shape: (out, in).
        rank: Singular components dropped.
        tail_energy: Share of the squared Frobenius norm they hold.
        smallest_kept: Singular value just above the cut.
        largest_dropped: Singular value just below it. Where the two nearly agree, the direction that goes is
            down to rounding, and results may differ between machines.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    tail_energy: float
    smallest_kept: float
    largest_dropped: float


def layer_spectrum(name: str, weight: torch.Tensor, values: torch.Tensor, rank: int) -> LayerSpectrum:
    """What dropping the `rank` smallest of a weight's singular `values` (largest first) takes away.

    Raises:
        BadInput: `rank` is not between 1 and one less than their number.
    """
    if not 0 < rank < len(values):
        raise BadInput("rank", rank, f"is not in (0, {len(values)}) at {name}", "give a smaller rank")
    energy, kept = values.double().square(), len(values) - rank
    return LayerSpectrum(
        name,
        (weight.shape[0], weight.shape[1]),
        rank,
        float(energy[kept:].sum() / energy.sum()),
        float(values[kept - 1]),
        float(values[kept]),
    )


def write_adapter(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    method: str,
    arguments: Mapping[str, Any],
    summary: str,
    usage: str,
) -> Path:
    """Write the active adapter as a folder PEFT loads, with its lineage, in one rename.

    Raises:
        BadInput: the folder cannot be written.
    """
    target = check_writable(folder, "folder")
    config = model.peft_config[model.active_adapter].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    base = config.get("base_model_name_or_path")
    with atomic_dir(target) as work:
        write_tensors(work / "adapter_model.safetensors", get_peft_model_state_dict(model))
        atomic_write(
            work / "adapter_config.json", json.dumps({**config, "inference_mode": True}, indent=2) + "\n"
        )
        write_lineage(
            work, method=method, arguments=arguments, base_model=base or None, summary=summary, usage=usage
        )
    return target


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of an adapter folder.

    Raises:
        BadInput: there is no adapter.
        CorruptFile: it cannot be read.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        raise BadInput(
            "folder", str(path), "holds no adapter_config.json", "give the folder of a saved adapter"
        )
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        remedy = "save the adapter again"
        raise CorruptFile(
            "folder", str(path), f"has an unreadable adapter_config.json ({error})", remedy
        ) from error
    if not (path / "adapter_model.safetensors").is_file():
        raise CorruptFile("folder", str(path), "lacks adapter_model.safetensors", "save the adapter again")
    return config, read_tensors(path / "adapter_model.safetensors")[0]
