"""Low-rank factors around a model's linear layers: attach, exchange, merge by rank, detach.

PEFT's LoRA layers do the arithmetic: `y = W x + s B (A x)` with A and B in float32 whatever the base's dtype.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import BadInput, CorruptFile, IncompatibleModels
from ..core.files import atomic_dir, check_writable, read_tensors, write_tensors
from ..core.lineage import read_lineage, write_lineage
from ..core.models import fingerprint
from ..core.training import generator
from ._base import Handle

__all__ = [
    "AdapterHandle",
    "Factors",
    "LoraSlot",
    "check_base",
    "initial_factors",
    "merge_adapters",
    "pack",
    "target_modules",
    "unpack",
]

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name -> (A `[r, in]`, B `[out, r]`), float32."""

_NAME = "slot"
_PEFT_PREFIX = "base_model.model."


def merge_adapters(
    adapters: Sequence[Factors], *, scale: float, weights: Sequence[float] | None = None
) -> Factors:
    """Sum adapters exactly, by concatenating their ranks.

    `sum_i w_i s B_i A_i = B_cat A_cat` with `A_cat = [w_1 s A_1; ...; w_k s A_k]` of shape `[sum r_i, in]`
    and `B_cat = [B_1 ... B_k]` of shape `[out, sum r_i]`: nothing is approximated, and the result is applied
    with scale 1.

    Args:
        adapters: One or more adapters over the same modules.
        scale: s = alpha / r of the adapters.
        weights: w, one per adapter; 1 each by default.

    Raises:
        BadInput: no adapter, or a number of weights that is not the number of adapters.
        IncompatibleModels: the adapters cover different modules or shapes.
    """
    if not adapters:
        raise BadInput("adapters", [], "is empty", "give at least one adapter")
    chosen = [1.0] * len(adapters) if weights is None else list(weights)
    if len(chosen) != len(adapters):
        raise BadInput("weights", chosen, f"are not {len(adapters)} numbers", "give one per adapter")
    modules = list(adapters[0])
    for i, adapter in enumerate(adapters):
        if adapter.keys() != adapters[0].keys() or any(
            _outer(adapter[m]) != _outer(adapters[0][m]) for m in modules
        ):
            raise IncompatibleModels(
                f"adapters[{i}]", len(adapter), "does not cover the modules of adapters[0]",
                "merge adapters of one store",
            )  # fmt: skip
    return {
        module: (
            torch.cat([w * scale * adapter[module][0] for w, adapter in zip(chosen, adapters)]),
            torch.cat([adapter[module][1] for adapter in adapters], dim=1),
        )
        for module in modules
    }


def _outer(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    return pair[0].shape[1], pair[1].shape[0]


def target_modules(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The linear layers whose name ends in one of `targets`: name -> (in features, out features).

    Raises:
        BadInput: a target matches nothing, or no linear layer; or the model carries adapters already.
    """
    if not targets or isinstance(targets, str):
        raise BadInput("targets", targets, "is not a list of names", 'give one such as ["down_proj"]')
    if getattr(model, "peft_config", None) is not None:
        raise BadInput(
            "model", type(model).__name__, "carries adapters already", "merge or unload them first"
        )
    found: dict[str, tuple[int, int]] = {}
    unused = set(targets)
    for name, module in model.named_modules():
        ending = name.rpartition(".")[2]
        if ending not in targets:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":  # GPT-2 keeps its weights transposed
            found[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
        else:
            kind = type(module).__name__
            raise BadInput("targets", ending, f"names a {kind}", "name linear layers only")
        unused.discard(ending)
    if unused:
        raise BadInput(
            "targets", sorted(unused), f"match no layer of {type(model).__name__}",
            "name its feed-forward projections (see model.named_modules())",
        )  # fmt: skip
    return found


def initial_factors(shapes: Mapping[str, tuple[int, int]], *, rank: int, seed: int) -> Factors:
    """A fresh adapter: A uniform in +-1/sqrt(in) (PEFT's choice), B zero.

    Drawn on the CPU in the modules' order, so that equal seeds give equal factors on every device.

    Args:
        shapes: Module name -> (in features, out features).
        rank: r.
        seed: Of the draw.
    """
    random = generator(seed)
    factors: Factors = {}
    for name, (inputs, outputs) in shapes.items():
        bound = 1.0 / math.sqrt(inputs)
        a = torch.empty(rank, inputs).uniform_(-bound, bound, generator=random)
        factors[name] = (a, torch.zeros(outputs, rank))
    return factors


def pack(factors: Factors, prefix: str = "") -> dict[str, torch.Tensor]:
    """Factors as named tensors, `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    named: dict[str, torch.Tensor] = {}
    for module, (a, b) in factors.items():
        named[f"{prefix}{module}.lora_A.weight"], named[f"{prefix}{module}.lora_B.weight"] = a, b
    return named


def unpack(tensors: Mapping[str, torch.Tensor], path: str, prefix: str = "") -> Factors:
    """The inverse of `pack`.

    Raises:
        CorruptFile: the tensors are not pairs of low-rank factors; the message names `path`.
    """
    factors: Factors = {}
    ending = ".lora_A.weight"
    for name, a in tensors.items():
        if name.startswith(prefix) and name.endswith(ending):
            module = name[len(prefix) : -len(ending)]
            b = tensors.get(f"{prefix}{module}.lora_B.weight")
            if b is not None and a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]:
                factors[module] = (a.float(), b.float())
    if not factors or 2 * len(factors) != len(tensors):
        raise CorruptFile("adapter", path, "does not hold pairs of low-rank factors", "make it again")
    return factors


class LoraSlot:
    """Room for one adapter around a model's layers, for the length of a `with` block.

    The layers are put in once; `fill` then exchanges the adapter, at the cost of copying its numbers. On
    exit, also after an error (one on entry included), the model has its own modules back and its parameters
    their `requires_grad`.

    Args:
        model: The base model.
        targets: Last parts of the names of the layers to surround.
        rank: Rank of the adapters to come.
        scale: What `B A x` is multiplied by.

    Raises:
        BadInput: see `target_modules`.
    """

    def __init__(self, model: PreTrainedModel, *, targets: Sequence[str], rank: int, scale: float):
        self.model, self.targets, self.rank, self.scale = model, list(targets), rank, scale
        self.shapes = target_modules(model, targets)
        self._layers: dict[str, Any] = {}

    def __enter__(self) -> LoraSlot:
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._own = {name: self.model.get_submodule(name) for name in self.shapes}
        try:
            self._surround()
        except BaseException:  # memory that does not suffice, a layer that PEFT refuses, an interrupt
            self.__exit__()
            raise
        return self

    def _surround(self) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=self.targets, lora_dropout=0.0)
        # Built without storage, hence without drawing random numbers; the factors are real before any use.
        LoraModel(self.model, config, _NAME, low_cpu_mem_usage=True)
        self._layers = {name: self.model.get_submodule(name) for name in self.shapes}
        for name, (inputs, outputs) in self.shapes.items():
            layer = self._layers[name]
            device = self._own[name].weight.device
            layer.train(self._own[name].training)
            layer.scaling[_NAME] = self.scale
            layer.lora_A[_NAME].weight = nn.Parameter(torch.zeros(self.rank, inputs, device=device))
            layer.lora_B[_NAME].weight = nn.Parameter(torch.zeros(outputs, self.rank, device=device))

    def __exit__(self, *exc: object) -> None:
        for name, module in self._own.items():
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, module)
        self.model.__dict__.pop("peft_config", None)  # PEFT's mark that there are adapters
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        del self._flags, self._own
        self._layers = {}

    def _pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        return {
            name: (layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
            for name, layer in self._layers.items()
        }

    def fill(self, factors: Factors) -> None:
        """Put in another adapter.

        Raises:
            IncompatibleModels: it does not fit the layers; the one before stays.
        """
        pairs = self._pairs()
        fits = factors.keys() == pairs.keys() and all(
            a.shape == pairs[name][0].shape and b.shape == pairs[name][1].shape
            for name, (a, b) in factors.items()
        )
        if not fits:
            raise IncompatibleModels(
                "adapter", f"{len(factors)} modules", "does not fit the model's layers",
                "use the model it was made for",
            )  # fmt: skip
        with torch.no_grad():
            for name, (a, b) in factors.items():
                pairs[name][0].copy_(a)
                pairs[name][1].copy_(b)

    def factors(self) -> Factors:
        """A copy of the present adapter, on the CPU."""
        return {name: (a.detach().cpu().clone(), b.detach().cpu().clone())
                for name, (a, b) in self._pairs().items()}  # fmt: skip

    def parameters(self) -> list[nn.Parameter]:
        """What training changes: all A and B."""
        return [parameter for pair in self._pairs().values() for parameter in pair]


class AdapterHandle(Handle):
    """A (merged) adapter attached to a model; saved as a folder that PEFT also loads."""

    def __init__(
        self,
        model: PreTrainedModel,
        factors: Factors,
        *,
        base: str,
        method: str,
        inputs: Mapping[str, Any] | None = None,
    ):
        targets = list(dict.fromkeys(name.rpartition(".")[2] for name in factors))
        rank = next(iter(factors.values()))[0].shape[0]
        self._slot = LoraSlot(model, targets=targets, rank=rank, scale=1.0)
        self._slot.__enter__()
        try:
            self._slot.fill(factors)
        except BaseException:
            self._slot.__exit__()
            raise
        self.base, self.method, self.inputs = base, method, dict(inputs or {})
        super().__init__(model)

    def _detach(self) -> None:
        self._slot.__exit__()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `adapter_model.safetensors` and `adapter_config.json` (PEFT's layout) with the lineage.

        Raises:
            BadInput: it was rolled back, or the folder cannot be written.
        """
        from peft import LoraConfig

        if not self.active:
            raise BadInput("handle", self.method, "was rolled back", "save before rolling back")
        target = check_writable(folder, "folder")
        rank, name = self._slot.rank, getattr(self.model.config, "_name_or_path", "")
        with atomic_dir(target) as made:
            LoraConfig(
                r=rank, lora_alpha=rank, target_modules=self._slot.targets, lora_dropout=0.0,
                task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=name or None,
            ).save_pretrained(made)  # fmt: skip
            named = pack(self._slot.factors(), _PEFT_PREFIX)
            write_tensors(made / "adapter_model.safetensors", named, {"base": self.base})
            inputs = {"model": self.base, **self.inputs}
            write_lineage(made, method=self.method, inputs=inputs, base_model=name)
        return target

    @classmethod
    def load(cls, model: PreTrainedModel, folder: str | os.PathLike[str]) -> AdapterHandle:
        """Attach what `save` wrote.

        Raises:
            IncompatibleModels: it was made for another model.
            CorruptFile: a file cannot be read.
        """
        path = Path(folder)
        tensors, header = read_tensors(path / "adapter_model.safetensors")
        check_base(model, header.get("base"), str(path))
        record = read_lineage(path)
        factors = unpack(tensors, str(path), _PEFT_PREFIX)
        inputs = {key: value for key, value in record["inputs"].items() if key != "model"}
        return cls(model, factors, base=header["base"], method=record["method"], inputs=inputs)


def check_base(model: PreTrainedModel, base: Any, where: str, known: str | None = None) -> str:
    """The model's fingerprint, if it is `base`; `known` spares computing it.

    Raises:
        IncompatibleModels: what lies at `where` was made for another model.
    """
    own = known or fingerprint(model)
    if own != base:
        raise IncompatibleModels(
            "model", own[:12], f"is not the model that {where} was made for ({str(base)[:12]})",
            "load that model, or encode the documents again",
        )  # fmt: skip
    return own
