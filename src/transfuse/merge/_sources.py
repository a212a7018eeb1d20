"""What goes into a merge, seen alike: model folders, loaded models, state dicts, and LoRA adapters on a base."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from ..core.files import hash_state, hash_weights, read_tensors, sha256_json
from ..core.shards import Checkpoint, TensorInfo

__all__ = ["AdapterSource", "Source", "open_source"]

_NEW_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that change the weights under the adapter
_NOT_PRODUCTS = {
    "use_dora": "is a DoRA", "alora_invocation_tokens": "is switched on by tokens",
    "layer_replication": "repeats layers", "target_parameters": "changes parameters without a layer of their own",
    "trainable_token_indices": "trains single tokens",
}  # fmt: skip


class Source:
    """Named tensors of a model, read some rows at a time.

    Args:
        label: What messages call it.
        infos: Name -> dtype and shape.
        config: The model's configuration, empty where there is none.
        folder: Where it lies, if it does.

    Attributes:
        spec: What the user gave, as text.
    """

    def __init__(
        self, label: str, infos: Mapping[str, TensorInfo], config: Mapping[str, Any], folder: Path | None
    ):
        self.label, self.config, self.folder = label, dict(config), folder
        self.spec = str(folder) if folder is not None else label
        self.infos = dict(infos)
        for name in _tied(self.infos, self.config):
            del self.infos[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop - 1` of a tensor."""
        raise NotApplicable("source", self.label, "holds no tensors", "give a model")

    def tensor(self, name: str) -> Tensor:
        """A whole tensor; may share memory with its source."""
        return self.rows(name, 0, self.infos[name].rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def tokens(self) -> int | None:
        """Rows of its embedding, as its configuration says."""
        inner = self.config.get("text_config")
        return self.config.get("vocab_size") or (
            inner.get("vocab_size") if isinstance(inner, Mapping) else None
        )

    def hash(self) -> str:
        """A hash over its weights; the same as `core.models.fingerprint`."""
        raise NotApplicable("source", self.label, "holds no tensors", "give a model")


class _FolderSource(Source):
    def __init__(self, label: str, folder: Path):
        self._checkpoint = Checkpoint(folder)
        super().__init__(label, self._checkpoint.infos, _read_config(folder), folder)
        if "quantization_config" in self.config:
            raise NotApplicable(label, str(folder), "is quantised", "merge the models it was made from")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._checkpoint.rows(name, start, stop)

    def hash(self) -> str:
        assert self.folder is not None
        return hash_weights(self.folder)


class _StateSource(Source):
    """Tensors in memory. Of tensors that share their memory the first is kept."""

    def __init__(self, label: str, state: Mapping[str, Tensor], config: Mapping[str, Any]):
        self._state: dict[str, Tensor] = {}
        seen: set[tuple[Any, ...]] = set()
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise BadInput(
                    f"{label}[{name!r}]", type(tensor).__name__, "is no tensor", "give tensors by name"
                )
            key = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tuple(tensor.shape),
                tensor.stride(),
            )
            if tensor.numel() and key in seen:
                continue
            seen.add(key)
            self._state[name] = tensor.detach()
        infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._state.items()}
        super().__init__(label, infos, config, None)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._state[name]
        return (tensor[start:stop] if tensor.dim() else tensor).cpu()

    def hash(self) -> str:
        return hash_state(self._state)


class AdapterSource(Source):
    """A base with a LoRA adapter merged in: W + s B A, the product taken row by row when read.

    Args:
        label: What messages call it.
        config: The adapter's configuration.
        tensors: Its tensors.
        base: What it sits on.
        folder: Where it lies, if it does.

    Raises:
        NotApplicable: an adapter that is more than a product on top of the base's weights.
        IncompatibleModels: it changes a tensor that the base lacks, or one of another shape.
    """

    def __init__(
        self,
        label: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        base: Source,
        folder: Path | None = None,
    ):
        super().__init__(label, base.infos, base.config, base.folder)
        self.spec = str(folder or label)
        self.base, self._tensors, self._adapter = base, dict(tensors), dict(config)
        self._check_kind(label, config)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = re.sub(r"^base_model\.model\.", "", key)
            match = re.fullmatch(r"(.+)\.lora_(A|embedding_A)(?:\.weight)?", name)
            if match:
                other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
                if other not in tensors:
                    raise CorruptFile(label, other, "is missing", "save the adapter again")
                self._add(match[1], tensor, tensors[other], match[2] == "embedding_A")
            elif re.search(r"\.lora_(B|embedding_B)(\.weight)?$", name) is None:
                place = re.sub(r"\.(modules_to_save|base_layer|original_module)(\.default)?\.", ".", name)
                if ".lora_" in name or place not in self.infos:
                    raise IncompatibleModels(
                        label, key, "is in the adapter and not in the base", "give its own base"
                    )
                self._fits(place, tuple(tensor.shape))
                self._whole[place] = tensor

    def _check_kind(self, label: str, config: Mapping[str, Any]) -> None:
        kind = str(config.get("peft_type", "")).rpartition(".")[2]
        if kind != "LORA":
            raise NotApplicable(label, kind, "is not a LoRA", "merge the adapter into its base first")
        for key, problem in _NOT_PRODUCTS.items():
            if config.get(key):
                raise NotApplicable(label, config[key], problem, "merge the adapter into its base first")
        start = str(config.get("init_lora_weights", True)).lower()
        if start.startswith(_NEW_BASE):
            raise NotApplicable(
                label, start, "changed the base at its start", "convert the adapter to a plain LoRA"
            )

    def _add(self, module: str, a: Tensor, b: Tensor, embedding: bool) -> None:
        name = f"{module}.weight"
        if name not in self.infos:
            raise IncompatibleModels(
                self.label, name, "is in the adapter and not in the base", "give its own base"
            )
        rank = a.shape[0]
        alpha = _of_module(self._adapter.get("alpha_pattern"), module, self._adapter.get("lora_alpha", rank))
        scale = alpha / (math.sqrt(rank) if self._adapter.get("use_rslora") else rank)
        left, right = b.float() * scale, a.float()
        if embedding or self._adapter.get("fan_in_fan_out"):
            left, right = right.T, left.T
        self._fits(name, (left.shape[0], right.shape[1]))
        self._factors[name] = (left.contiguous(), right.contiguous())

    def _fits(self, name: str, shape: tuple[int, ...]) -> None:
        if self.infos[name].shape != shape:
            problem = f"is {shape} in the adapter and {self.infos[name].shape} in the base"
            raise IncompatibleModels(self.label, name, problem, "give the adapter's own base")

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(s B [m, r], A [r, n]) of a matrix that the adapter changes, float32."""
        return self._factors.get(name)

    @property
    def replaced(self) -> list[str]:
        """Names of the tensors that the adapter holds whole."""
        return list(self._whole)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        whole = self._whole.get(name)
        rows = self.base.rows(name, start, stop) if whole is None else whole[start:stop].cpu()
        if name not in self._factors:
            return rows
        left, right = self._factors[name]
        return torch.addmm(rows.float(), left[start:stop].cpu(), right.cpu())

    def hash(self) -> str:
        return sha256_json([self.base.hash(), hash_state(self._tensors), self._adapter.get("lora_alpha")])


def open_source(value: Any, label: str, base: Source | None = None) -> Source:
    """`value` as a source.

    Args:
        value: A `PreTrainedModel` or any module, a state dict, a PEFT model with a LoRA, a model's folder or name as
            `transfuse.load` takes it, the folder of a LoRA adapter, or "model+adapter".
        label: What messages call it.
        base: What an adapter sits on; by default the base its configuration names.

    Raises:
        BadInput: something else, or a folder that holds no model.
    """
    if isinstance(value, Source):
        return value
    if hasattr(value, "peft_config"):
        return _peft_source(value, label, base)
    if isinstance(value, nn.Module):
        config: Any = getattr(value, "config", None)
        known = config.to_dict() if hasattr(config, "to_dict") else {}
        return _StateSource(
            label, value.state_dict(), {**known, "architectures": [type(value).__name__]} if known else {}
        )
    if isinstance(value, Mapping):
        return _StateSource(label, value, {})
    if not isinstance(value, (str, os.PathLike)):
        raise BadInput(
            label, type(value).__name__, "is no model", "give a model, a state dict, a folder or a name"
        )
    text = os.fspath(value)
    if "+" in text and not Path(text).expanduser().exists():
        under, _, adapter = text.partition("+")
        return open_source(adapter, label, open_source(under, label))
    folder = Path(text).expanduser()
    if (folder / "adapter_config.json").is_file():
        config = _read_config(folder, "adapter_config.json")
        tensors, _ = read_tensors(folder / "adapter_model.safetensors")
        if base is None:
            named = config.get("base_model_name_or_path")
            if not named:
                raise BadInput(label, text, "is an adapter that names no base", "pass base=")
            base = open_source(named, f"{label}: base_model_name_or_path")
        return AdapterSource(label, config, tensors, base, folder)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        from ..core.models import (
            resolve,  # on need: it imports transformers, which takes longer than a small merge
        )

        folder = resolve(value)
    return _FolderSource(label, folder)


def _peft_source(model: Any, label: str, base: Source | None) -> Source:
    from peft.utils import get_peft_model_state_dict

    if base is None:
        raise BadInput(label, type(model).__name__, "is an adapter on a model in memory", "pass base=")
    config = model.peft_config[model.active_adapter].to_dict()
    return AdapterSource(label, config, get_peft_model_state_dict(model), base)


def _read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(
            "model", str(folder / name), f"is not readable ({error})", "save it again"
        ) from error


def _tied(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[str]:
    """Output embeddings that the configuration ties to the input embedding: stored or not, they are one tensor."""
    if not config.get("tie_word_embeddings"):
        return []
    shapes = {i.shape for n, i in infos.items() if n.endswith(("embed_tokens.weight", "wte.weight"))}
    heads = [name for name in infos if name == "lm_head.weight" or name.endswith(".lm_head.weight")]
    return [name for name in heads if infos[name].shape in shapes]


def _of_module(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The entry of a PEFT pattern for a module: its keys are ends of names."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
