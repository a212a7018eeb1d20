"""What goes into a merge, seen alike: model folders, loaded models, state dicts (LoRA adapters: `_adapters`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, CorruptFile, NotApplicable
from ..core.files import hash_state, hash_weights
from ..core.shards import Checkpoint, TensorInfo

__all__ = ["CONV1D", "FolderSource", "Source", "StateSource", "read_json"]

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
"""Types of models some of whose linear layers store their weights `[in, out]`."""


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

    @functools.cached_property
    def transposed(self) -> frozenset[str] | None:
        """Weights that layers store `[in, out]`; None where the layers are not known."""
        return None

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


class FolderSource(Source):
    """A folder with safetensors and a configuration."""

    def __init__(self, label: str, folder: Path):
        self._checkpoint = Checkpoint(folder)
        super().__init__(label, self._checkpoint.infos, read_json(folder), folder)
        if "quantization_config" in self.config:
            raise NotApplicable(label, str(folder), "is quantised", "merge the models it was made from")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._checkpoint.rows(name, start, stop)

    @functools.cached_property
    def transposed(self) -> frozenset[str] | None:
        if self.config.get("model_type") not in CONV1D:
            return None
        import transformers

        kind = getattr(transformers, (self.config.get("architectures") or [""])[0], None)
        if kind is None:
            return None
        with torch.device("meta"):
            return _transposed(kind(kind.config_class.from_dict(self.config)))

    def hash(self) -> str:
        assert self.folder is not None
        return hash_weights(self.folder)


class StateSource(Source):
    """Tensors in memory. Of tensors that share their memory the first is kept."""

    def __init__(
        self,
        label: str,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        module: nn.Module | None = None,
    ):
        self._module = module
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

    @functools.cached_property
    def transposed(self) -> frozenset[str] | None:
        return None if self._module is None else _transposed(self._module)

    def hash(self) -> str:
        return hash_state(self._state)


def _transposed(model: nn.Module) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D  # on need: it imports transformers

    return frozenset(
        f"{place}.weight" for place, module in model.named_modules() if isinstance(module, Conv1D)
    )


def read_json(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        CorruptFile: it cannot be read.
    """
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
