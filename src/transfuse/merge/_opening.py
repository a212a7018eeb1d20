"""Whatever may be merged, opened: models in memory and on disk, state dicts, adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import BadInput
from ..core.files import read_tensors
from ._adapters import AdapterSource, peft_source
from ._sources import FolderSource, Source, StateSource, read_json

__all__ = ["open_source"]


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
    if isinstance(value, nn.Module):
        return _module_source(value, label, base)
    if isinstance(value, Mapping):
        return StateSource(label, value, {})
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
        config = read_json(folder, "adapter_config.json")
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
    return FolderSource(label, folder)


def _module_source(model: nn.Module, label: str, base: Source | None) -> Source:
    if hasattr(model, "peft_config") and label != "base":
        return peft_source(model, label, base)
    state = model.state_dict()
    if any(".base_layer." in name for name in state):
        remedy = "give a fresh copy, or what its unload() returns"
        raise BadInput(label, type(model).__name__, "has adapters of PEFT in its layers", remedy)
    config: Any = getattr(model, "config", None)
    known = config.to_dict() if hasattr(config, "to_dict") else {}
    whole = {**known, "architectures": [type(model).__name__]} if known else {}
    return StateSource(label, state, whole, model)
