"""What the methods of this family share: conversions, what their blocks remember, and folders that load again.

A method of this family is one of two kinds:

- a *conversion* is a class whose keyword-only arguments it stores, and whose `convert(model)` puts other
  feed-forward or expert blocks into a transformers model, in place. Its blocks are plain `nn.Module`s that answer
  with one tensor, so the model goes on training, generating and answering as before. Where the method says that
  nothing changes (all experts active, a chain of one step), the logits are those of the model before.
- a *placement* decides where experts live. Its plan has `permute_experts(model)`, which leaves the logits alone.

A block remembers the routing decisions of its latest pass (`routings`); from them come auxiliary losses, which
`loss` adds to the model's own. `core.training.fit(model, rows, loss=method.loss, ...)` trains a converted model.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.utils import GENERATION_CONFIG_NAME

from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels
from transfuse.core.files import atomic_dir, atomic_write, check_writable, read_tensors, write_tensors
from transfuse.core.lineage import jsonable, write_lineage

__all__ = ["MARK", "Conversion", "Latest", "Routing", "flat_mask", "load", "routings", "save"]

MARK = "transfuse_moe"
"""Entry of a converted model's configuration: class, method and arguments."""

_WARNED: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Routing:
    """One decision of a router for T tokens.

    Attributes:
        logits: `[T, N]` float32, before the softmax.
        indices: `[T, K]` int64, the experts chosen.
        weights: `[T, K]`, what their outputs are multiplied by.
    """

    logits: Tensor
    indices: Tensor
    weights: Tensor

    @property
    def probabilities(self) -> Tensor:
        """`[T, N]` float32."""
        return self.logits.softmax(-1)


class Latest(list[Any]):
    """What a block remembers of its latest pass, one entry per step.

    A copy of the block starts with an empty one: tensors that belong to a graph cannot be copied.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Latest:
        return Latest()


def routings(model: nn.Module) -> dict[str, list[Routing]]:
    """Decisions of the latest forward pass by block, in the model's order: one per step of the block."""
    found = {name: getattr(module, "latest", None) for name, module in model.named_modules()}
    return {name: list(latest) for name, latest in found.items() if isinstance(latest, Latest) and latest}


def flat_mask(mask: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """A batch's attention mask as bool `[T]`, all true where there is none.

    Raises:
        BadInput: it has another number of positions than `tokens`.
    """
    if mask is None:
        return torch.ones(tokens, dtype=torch.bool, device=device)
    if mask.numel() != tokens:
        raise BadInput("mask", tuple(mask.shape), f"does not cover {tokens} tokens", "give the batch's mask")
    return mask.reshape(-1).to(device).bool()


class Conversion(ABC):
    """A method that replaces blocks of a model; constructors only store."""

    slug: ClassVar[str]

    @abstractmethod
    def install(self, model: Any, *, fresh: bool) -> None:
        """Put the blocks into `model`; all checks come before the first change.

        Args:
            model: A transformers model.
            fresh: Whether new parameters are to be drawn. False when their values are about to be loaded.
        """

    def convert(self, model: Any) -> Any:
        """Put this method's blocks into a transformers model, in place, and return it.

        Raises:
            BadInput: the model was converted before, or an argument does not fit it.
            NotApplicable: the model's blocks are of another kind than the method needs.
        """
        done = getattr(getattr(model, "config", None), MARK, None)
        if done is not None:
            raise BadInput(
                "model", type(model).__name__, f"was converted by {done['method']}", "load it afresh"
            )
        self.install(model, fresh=True)
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # transformers would look for routers that are gone
        entry = {"class": type(model).__name__, "method": self.slug, "arguments": jsonable(self.arguments)}
        setattr(model.config, MARK, entry)
        return model

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self)).parameters)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"

    def auxiliary(self, model: Any, mask: Tensor | None = None) -> Tensor:
        """The method's own loss terms, weighted, for the latest forward pass of a model in training mode.

        Args:
            model: A model this method converted.
            mask: The pass's attention mask `[B, S]`; padding takes no part.

        Returns:
            A float32 scalar.
        """
        _warn_untaught(self, model)
        return torch.zeros((), device=next(model.parameters()).device)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The model's own loss plus `auxiliary`: what `core.training.fit` takes as `loss`."""
        own = model(**batch).loss
        return own + self.auxiliary(model, batch.get("attention_mask"))

    def measurements(self, model: Any) -> dict[str, float]:
        """Figures worth keeping beside a saved model."""
        return {}


def _warn_untaught(method: Conversion, model: nn.Module) -> None:
    """Say once for a model that its blocks lack the teachers which a term of the loss needs."""
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "teacher")]
    if not (model.training and blocks and getattr(method, "par_weight", 0) > 0 and model not in _WARNED):
        return
    if all(block.teacher is None for block in blocks):
        _WARNED.add(model)
        problem = "the frozen blocks that routers learn from are gone (a saved model does not keep them)"
        warnings.warn(
            f"{problem}: training goes on without L_PA; convert the dense model again", stacklevel=4
        )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once where several names share one; teachers are left out."""
    kept = set(model.state_dict(keep_vars=True))
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update({name: tensor for name, tensor in model.named_buffers() if name in kept})
    return {name: tensor for name, tensor in tensors.items() if ".teacher." not in name}


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    measurements: Mapping[str, Any] | None = None,
) -> Path:
    """Write a converted model as a folder that `load` reads, with its lineage, in one rename.

    A teacher that a block still holds for training is not written: loaded again, a FactorLLM model trains without L_PA.

    Args:
        model: What a conversion returned.
        folder: Replaced at once.
        tokenizer: Written beside it.
        measurements: Figures worth keeping.

    Raises:
        BadInput: the model is not a converted one, or the folder cannot be written.
    """
    target = check_writable(folder, "folder")
    mark = getattr(getattr(model, "config", None), MARK, None)
    if mark is None:
        raise BadInput("model", type(model).__name__, "was not converted by this family", "convert it first")
    with atomic_dir(target) as work:
        write_tensors(work / "model.safetensors", _stored(model))
        # Under the model's own type other loaders would build its usual blocks and fill them with noise.
        stored = json.loads(model.config.to_json_string())
        config = {**stored, "model_type": f"{MARK}_{model.config.model_type}"}
        atomic_write(work / "config.json", json.dumps(config, indent=2) + "\n")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.to_json_file(work / GENERATION_CONFIG_NAME)
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        write_lineage(
            work,
            method=mark["method"],
            arguments=mark["arguments"],
            base_model=model.config._name_or_path or None,
            measurements=measurements,
            summary=f"A model whose blocks {mark['method']} replaced.",
            usage='model = transfuse.moe.load("this folder")',
        )
    return target


def _generation(path: Path) -> Any:
    """The settings of generation that `save` wrote, if it did."""
    if not path.is_file():
        return None
    try:
        return transformers.GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptFile("folder", str(path), f"cannot be read ({error})", "save the model again") from error


def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Any:
    """The converted model of a folder that `save` wrote, in evaluation mode, in the dtypes it was saved in.

    Raises:
        BadInput: no such folder.
        CorruptFile: it cannot be read.
        IncompatibleModels: its tensors are not those of the blocks it names.
    """
    from transfuse import catalogue

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise BadInput("folder", str(path), "holds no config.json", "give a folder that transfuse wrote")
    try:
        stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
        mark, kind = stored.pop(MARK), stored.pop("model_type").removeprefix(f"{MARK}_")
        method = catalogue.get(mark["method"])(**mark["arguments"])
        config = transformers.AutoConfig.for_model(kind, **stored)
        build = getattr(transformers, mark["class"])
        generation = _generation(path / GENERATION_CONFIG_NAME)
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"has no readable entry {MARK} ({type(error).__name__}: {error})"
        raise CorruptFile("folder", str(path), problem, "save the model again") from error
    tensors, _ = read_tensors(path / "model.safetensors")
    with no_init_weights():
        model = build(config)
    model.tie_weights()
    method.install(model, fresh=False)
    expected = _stored(model)
    for name in sorted(expected.keys() ^ tensors.keys()):
        where = "lacks" if name in expected else "has the unknown tensor"
        raise IncompatibleModels("folder", str(path), f"{where} {name}", "save the model again")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            problem = f"holds {name} of shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            raise IncompatibleModels("folder", str(path), problem, "save the model again")
        # Copied: where a file's tensors happen to lie in memory decides how products are rounded.
        tensor.data = tensors[name].to(tensor.data.device, copy=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation
    setattr(model.config, MARK, mark)
    return model.to(device).eval()
