"""A LoRA adapter on a base, seen as the model that it makes of it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from ..core.files import hash_state, sha256_json
from ..core.loras import changed_base, no_product
from ._sources import CONV1D, Source

__all__ = ["AdapterSource", "peft_source"]

# Ends of the names of input embeddings that heads are tied to.
_INPUTS = ("embed_tokens.weight", "wte.weight")


class AdapterSource(Source):
    """A base with a LoRA adapter merged in: W + s B A, the product taken row by row when read.

    Args:
        label: What messages call it.
        config: The adapter's configuration.
        tensors: Its tensors.
        base: What it sits on.
        folder: Where it lies, if it does.
        transposed: Weights that layers store `[in, out]`; by default the base's, or as their shapes say.

    Raises:
        NotApplicable: an adapter that is more than a product on top of the base's weights, or a square product of
            which it is not known how the layer stores it.
        IncompatibleModels: it changes a tensor that the base lacks, or one of another shape.
    """

    def __init__(
        self,
        label: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        base: Source,
        folder: Path | None = None,
        transposed: frozenset[str] | None = None,
    ):
        super().__init__(label, base.infos, base.config, base.folder)
        self.spec = str(folder or label)
        self._given = transposed
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
                head = place.endswith("lm_head.weight") and place not in self.infos
                if head and config.get("ensure_weight_tying"):
                    continue  # the embedding's, once more
                if ".lora_" in name or place not in self.infos:
                    raise IncompatibleModels(
                        label, key, "is in the adapter and not in the base", "give its own base"
                    )
                if ".base_layer." not in name:
                    self._check_tie(place)
                self._fits(place, tuple(tensor.shape))
                self._whole[place] = tensor

    def _check_kind(self, label: str, config: Mapping[str, Any]) -> None:
        kind = str(config.get("peft_type", "")).rpartition(".")[2]
        if kind != "LORA":
            raise NotApplicable(label, kind, "is not a LoRA", "merge the adapter into its base first")
        if (more := no_product(config)) is not None:
            raise NotApplicable(label, config[more[0]], more[1], "merge the adapter into its base first")
        if (start := changed_base(config)) is not None:
            raise NotApplicable(
                label, start, "changed the base at its start", "convert the adapter to a plain LoRA"
            )

    def _check_tie(self, place: str) -> None:
        """PEFT trains a copy of the embedding; the head that is tied to it stays as it was."""
        kind = str((self.config.get("architectures") or ["LMHeadModel"])[0])
        tied = self.config.get("tie_word_embeddings") and kind.endswith(("ForCausalLM", "LMHeadModel"))
        if tied and place.endswith(_INPUTS) and not self._adapter.get("ensure_weight_tying"):
            problem = "is replaced by the adapter, and the head tied to it is not"
            raise NotApplicable(self.label, place, problem, "train with ensure_weight_tying=True")

    @functools.cached_property
    def transposed(self) -> frozenset[str] | None:
        return self.base.transposed if self._given is None else self._given

    def _is_transposed(self, name: str, shape: tuple[int, int]) -> bool:
        """Whether a product `[out, in]` is the other way round in the base. PEFT's flag for all is the last layer's."""
        if self.transposed is not None:
            return name in self.transposed
        if shape[0] != shape[1]:
            return self.infos[name].shape == shape[::-1]
        if self._adapter.get("fan_in_fan_out") or self.config.get("model_type") in CONV1D:
            problem = "is square, and may be stored as it is or transposed"
            raise NotApplicable(self.label, name, problem, "give the base as a loaded model")
        return False

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
        if embedding or self._is_transposed(name, (left.shape[0], right.shape[1])):
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
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return torch.addmm(wide, left[start:stop].to(wide), right.to(wide))

    def hash(self) -> str:
        return sha256_json([self.base.hash(), hash_state(self._tensors), self._adapter.get("lora_alpha")])


def peft_source(model: Any, label: str, base: Source | None) -> Source:
    """The active adapter of a model in memory.

    Args:
        model: A PEFT model, or one into whose layers PEFT or transformers put adapters.
        label: What messages call it.
        base: What it sits on.

    Raises:
        BadInput: no base, or not one active adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    if base is None:
        raise BadInput(label, type(model).__name__, "is an adapter on a model in memory", "pass base=")
    layers = {place: layer for place, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    active = dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters)
    names = list(active or model.peft_config)
    if len(names) != 1:
        raise BadInput(label, names, "are active and not one adapter", "call set_adapter with one name")
    config = model.peft_config[names[0]].to_dict()
    tensors = get_peft_model_state_dict(model, adapter_name=names[0])
    transposed = frozenset(
        f"{place.removeprefix('base_model.model.')}.weight"
        for place, layer in layers.items()
        if getattr(layer, "fan_in_fan_out", False)
    )
    return AdapterSource(label, config, tensors, base, transposed=transposed)


def _of_module(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The entry of a PEFT pattern for a module: its keys are ends of names."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
