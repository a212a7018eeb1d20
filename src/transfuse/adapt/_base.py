"""What adapters share: which layers they sit on, new kinds of them in PEFT, and folders that PEFT can load.

An adapter method is a function `method(model, *, r=..., target_modules=..., seed=0) -> PeftModel` beside
`save` and `load`. What it returns merges and unmerges, trains nothing but its own parameters, and starts
from the same values for the same seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_peft_model_state_dict, register_peft_method, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.files import atomic_dir, atomic_write, check_writable, read_tensors, write_tensors
from transfuse.core.lineage import jsonable, write_lineage

__all__ = [
    "LayerSpectrum",
    "Targets",
    "Tuner",
    "base_again",
    "batch_share",
    "check_modules",
    "fill_adapter",
    "is_target",
    "layer_spectrum",
    "linear_targets",
    "new_kind",
    "read_adapter",
    "refuse_adapted",
    "register",
    "target_names",
    "task_type",
    "trained_whole",
    "weights_hash",
    "write_adapter",
]

HEADS = ("classifier", "score")  # what PEFT trains whole in every sequence classifier

Targets = str | Sequence[str] | None
"""Names or endings of layers, a regular expression, "all-linear", or None for the architecture's usual
ones."""


def new_kind(name: str) -> PeftType:
    """The `PeftType` called `name`, made if there is none.

    PEFT's registry takes new methods, but only under names in its enumeration, so the name is put there first.
    """
    upper = name.upper()
    if upper not in PeftType.__members__:
        kind = str.__new__(PeftType, upper)
        kind._name_, kind._value_ = upper, upper
        type.__setattr__(PeftType, upper, kind)
        PeftType._member_names_.append(upper)
        PeftType._member_map_[upper] = kind
        PeftType._value2member_map_[upper] = kind
    return PeftType(upper)


def register(name: str, config: type[PeftConfig], tuner: type[Tuner]) -> None:
    """Make `get_peft_model` and `PeftModel.from_pretrained` know a kind of adapter; once per process."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if new_kind(name) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=tuner)


class Tuner(BaseTuner):
    """A tuner that remembers which parameters were trained before it came (see `base_again`)."""

    target_module_mapping: Mapping[str, list[str]] = {}
    trainable_before: set[str] | None = None

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Any = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is not None:
            problem, remedy = "are not told apart row by row", "make a batch for each, with set_adapter"
            raise NotApplicable("adapter_names", adapter_names, problem, remedy)
        yield

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if self.trainable_before is None:
            self.trainable_before = {name for name, p in model.named_parameters() if p.requires_grad}


def batch_share(model: Any, inputs: Mapping[str, Any]) -> Any:
    """What of an update's targets is in this batch: a Trainer adds batches up over the count of all of them.

    Args:
        model: The transformers model, whose loss may predict the next token.
        inputs: Of its forward pass: `labels`, and `num_items_in_batch`, without which a batch is all of it.
    """
    total, labels = inputs.get("num_items_in_batch"), inputs["labels"]
    if total is None:
        return 1.0
    shifted = getattr(model, "loss_type", None) == "ForCausalLM" and labels.dim() > 1
    counted = inputs.get("shift_labels", labels[..., 1:] if shifted else labels)
    return (counted != -100).sum() / total


def refuse_adapted(model: Any) -> None:
    """Raises BadInput if `model` holds adapters."""
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise BadInput("model", type(model).__name__, "holds adapters already", "give the base model")


def base_again(model: PeftModel, kind: type[BaseTuner]) -> Any:
    """Take adapters off: the base model as it was, modules trained whole and `requires_grad` included.

    Args:
        model: Adapted.
        kind: Its tuner, which has `trainable_before`.

    Raises:
        BadInput: the adapters are of another kind.
    """
    tuner: Any = getattr(model, "base_model", None)
    if not isinstance(tuner, kind):
        raise BadInput("model", type(model).__name__, "has no such adapters", "pass what the method returned")
    for name, module in list(tuner.model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # before PEFT does, which wants each to have one weight
            parent, _, child = name.rpartition(".")
            setattr(tuner.model.get_submodule(parent), child, module.original_module)
    base = tuner.unload()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in (tuner.trainable_before or ()))
    return base


def check_modules(model: nn.Module, names: Sequence[str] | None) -> list[str] | None:
    """`modules_to_save` as PEFT's configuration takes it.

    Raises:
        BadInput: a bare string, or a name that no module has.
    """
    if isinstance(names, str):
        raise BadInput("modules_to_save", names, "is no list of names", f"give [{names!r}]")
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in names or () if name.rpartition(".")[2] not in present]
    if missing:
        raise BadInput("modules_to_save", missing[0], "is no module of the model", "name the task's head")
    return list(names) if names else None


def trained_whole(name: str, model: nn.Module, modules_to_save: Sequence[str] | None) -> bool:
    """Whether PEFT trains the layer `name` itself, and so puts no adapter on it, whatever is targeted."""
    kept = [*(modules_to_save or ()), *(HEADS if task_type(model) == "SEQ_CLS" else ())]
    return any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in kept)


def target_names(model: nn.Module, targets: Targets) -> str | list[str]:
    """`targets` as PEFT's configuration takes them: "all-linear" and None spelt out.

    Raises:
        BadInput: empty, or None for an architecture without usual targets.
    """
    if targets == "all-linear":
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        names = {
            n
            for n, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head and not trained_whole(n, model, None)
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


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether `targets` (see `target_names`), a regular expression or names and endings, name the layer `name`."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def linear_targets(
    model: nn.Module, targets: str | Sequence[str], modules_to_save: Sequence[str] | None = None
) -> dict[str, nn.Linear]:
    """The layers that `targets` (see `target_names`) name and that get adapters, in the model's order.

    Raises:
        BadInput: nothing matches, or all that does is trained whole.
        NotApplicable: a match that is not a plain `nn.Linear`: transposed (GPT-2's Conv1D), another kind of
            layer, quantised, on the meta device, or with a weight that another layer shares.
    """
    found = {name: layer for name, layer in model.named_modules() if is_target(name, targets)}
    if not found:
        endings = sorted(
            {n.rpartition(".")[2] for n, layer in model.named_modules() if type(layer) is nn.Linear}
        )
        raise BadInput(
            "target_modules", targets, "matches no layer", f"linear layers here: {', '.join(endings)}"
        )
    found = {n: layer for n, layer in found.items() if not trained_whole(n, model, modules_to_save)}
    if not found:
        remedy = "take it out of modules_to_save, or target other layers"
        raise BadInput("target_modules", targets, "matches only what is trained whole", remedy)
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
    config = jsonable(model.peft_config[model.active_adapter].to_dict())
    base = config.get("base_model_name_or_path")
    with atomic_dir(target) as work:
        tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        # Layers may share a tensor, which safetensors refuses to store twice.
        write_tensors(work / "adapter_model.safetensors", {name: t.clone() for name, t in tensors.items()})
        atomic_write(
            work / "adapter_config.json", json.dumps({**config, "inference_mode": True}, indent=2) + "\n"
        )
        write_lineage(
            work, method=method, arguments=arguments, base_model=base or None, summary=summary, usage=usage
        )
    return target


def fill_adapter(model: PeftModel, tensors: Mapping[str, torch.Tensor], folder: Any, prefix: str) -> None:
    """Put an adapter's stored tensors into the model's active adapter.

    Raises:
        IncompatibleModels: names or shapes differ.
    """
    name, remedy = "", "load the base model that it was trained on"
    try:
        result = set_peft_model_state_dict(model, dict(tensors))
        missing = [key for key in result.missing_keys if prefix in key]
        name = next(iter([*result.unexpected_keys, *missing]), "")
    except RuntimeError as error:
        raise IncompatibleModels(
            "folder", str(folder), "holds tensors of other shapes than this model's", remedy
        ) from error
    except KeyError as error:  # a module trained whole
        raise IncompatibleModels("folder", str(folder), f"lacks {error}", remedy) from error
    if name:
        raise IncompatibleModels("folder", str(folder), f"does not fit the model at {name}", remedy)


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
        if config["peft_type"] == "LORA":
            float(config["lora_alpha"] / LoraConfig(r=config["r"]).r)
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        remedy = "save the adapter again"
        raise CorruptFile(
            "folder", str(path), f"has an unreadable adapter_config.json ({error})", remedy
        ) from error
    if not (path / "adapter_model.safetensors").is_file():
        raise CorruptFile("folder", str(path), "lacks adapter_model.safetensors", "save the adapter again")
    return config, read_tensors(path / "adapter_model.safetensors")[0]
