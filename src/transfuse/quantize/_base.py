"""What quantizers share: which tensors a layer's weights are, what is measured on them, and what a model weighs.

A method of this family is a class with keyword-only arguments and a method `quantize(model, calib=None)` that rounds
the model's layers in place and returns a `Quantized`: the model, its `BitPlan` (which layer has how many bits) and a
`SizeReport`. The plan stays with the model, under `transfuse_bit_plan` in its configuration, so that a saved folder
says what it is. Embeddings, norms, biases and the output head are never rounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.batches import IGNORED, target_loss
from ..core.data import read_documents
from ..core.errors import BadInput, CorruptFile, NotApplicable
from ..core.generate import pad_batch
from ..core.taps import decoder_layers

if TYPE_CHECKING:
    from ._plan import BitPlan

__all__ = [
    "PLAN_KEY",
    "Calibration",
    "Quantized",
    "Quantizer",
    "SizeReport",
    "Slot",
    "batches_of",
    "layer_slots",
    "mean_loss",
    "module_names",
    "read_texts",
    "refuse_quantized",
    "windows",
]

PLAN_KEY = "transfuse_bit_plan"
"""Name of the plan in a model's configuration."""

Calibration = Tensor | Sequence[Sequence[int]] | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Token ids `[N, T]`, rows of ids of any lengths, or batches with `input_ids` and `attention_mask`."""

ROWS = 4  # per forward pass


@dataclass(frozen=True)
class Slot:
    """One matrix (or stack of expert matrices) of a layer.

    Attributes:
        name: Of the tensor, as in the state dict.
        module: That holds it.
        attribute: Its name there.
        axis: The axis that runs over inputs, along which weights share a scale.
    """

    name: str
    module: nn.Module
    attribute: str
    axis: int

    @property
    def parameter(self) -> nn.Parameter:
        """The tensor."""
        found = getattr(self.module, self.attribute)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def owner(self) -> str:
        """Name of the module."""
        return self.name.rpartition(".")[0]

    @property
    def width(self) -> int:
        """Length of a row: number of inputs."""
        return int(self.parameter.shape[self.axis])


@dataclass(frozen=True)
class SizeReport:
    """What a model weighs, before and after, in bytes.

    Attributes:
        average_bits: Per rounded weight, codes only.
        stored_bits: With scales and offsets.
        layers_before: All matrices of the layers, as they were.
        layers_after: The same, packed.
        other: Embeddings, norms, biases, the head: what is left alone.
    """

    average_bits: float
    stored_bits: float
    layers_before: int
    layers_after: int
    other: int

    @property
    def before(self) -> int:
        """The whole model as it was."""
        return self.layers_before + self.other

    @property
    def after(self) -> int:
        """The whole model, packed."""
        return self.layers_after + self.other


@dataclass
class Quantized:
    """A model whose layers were rounded in place.

    Attributes:
        model: The model.
        plan: Bits per layer.
        report: Sizes.
    """

    model: Any
    plan: BitPlan
    report: SizeReport

    def save(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Write the model as a folder; options as in `transfuse.quantize.layerwise_quant.save`."""
        from ._store import save

        return save(self.model, folder, **options)


@runtime_checkable
class Quantizer(Protocol):
    """A method of this family."""

    def quantize(self, model: Any, calib: Calibration | None = None) -> Quantized:
        """Round the layers of `model` in place.

        Args:
            model: A transformers model.
            calib: What the model is measured on, for methods that measure.
        """


def layer_slots(model: nn.Module) -> list[list[Slot]]:
    """The matrices of each layer: of linear layers, and stacks of expert matrices; routers' own are left out.

    Raises:
        BadInput: no stack of blocks.
        NotApplicable: a layer holds no matrix: it was quantized by another library, or is of an unknown kind.
    """
    layers, seen = [], set()
    for prefix in decoder_layers(model):
        slots = []
        for path, module in model.get_submodule(prefix).named_modules():
            for attribute, axis in _matrices(module):
                parameter = getattr(module, attribute)
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    name = ".".join(part for part in (prefix, path, attribute) if part)
                    slots.append(Slot(name, module, attribute, axis))
        if not slots:
            raise NotApplicable(
                "model",
                prefix,
                "holds no matrix of floating-point numbers",
                "start from an unquantized model",
            )
        layers.append(slots)
    return layers


def module_names(layers: Sequence[str], slots: Sequence[Sequence[Slot]]) -> tuple[str, ...]:
    """Names, inside of a layer, of the modules that hold matrices, in the order of their first appearance."""
    found: dict[str, None] = {}
    for prefix, each in zip(layers, slots, strict=True):
        found.update(dict.fromkeys(slot.owner.removeprefix(f"{prefix}.") for slot in each))
    return tuple(found)


def _matrices(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of a module's own matrices, and the axis of each that runs over inputs."""
    if isinstance(module, (nn.Linear, Conv1D)):
        if module.weight.is_floating_point():
            yield "weight", 0 if isinstance(module, Conv1D) else -1
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.is_floating_point() and hasattr(module, "num_experts"):
            yield name, -2 if getattr(module, "is_transposed", False) else -1


def refuse_quantized(model: Any) -> None:
    """Raises BadInput for a model that carries a plan already."""
    if getattr(getattr(model, "config", None), PLAN_KEY, None) is not None:
        raise BadInput("model", type(model).__name__, "is quantized already", "start from the original")


def batches_of(calib: Any, device: torch.device | str) -> list[dict[str, Tensor]]:
    """Calibration data as batches of `input_ids` and `attention_mask`, four rows each, padded on the right.

    Raises:
        BadInput: no rows, or rows of fewer than two tokens.
    """
    remedy = "give token ids [N, T], rows of ids, or batches with input_ids"
    rows: list[list[int]] = []
    for part in [calib] if isinstance(calib, (Mapping, Tensor)) else calib or []:
        ids = part.get("input_ids") if isinstance(part, Mapping) else part
        if isinstance(ids, Tensor):
            if ids.dim() not in (1, 2) or ids.is_floating_point():
                raise BadInput("calib", tuple(ids.shape), "are not rows of whole numbers", remedy)
            mask = part.get("attention_mask") if isinstance(part, Mapping) else None
            mask = torch.ones_like(ids) if mask is None else mask
            rows += [
                row[kept.bool()].tolist()
                for row, kept in zip(ids.view(-1, ids.shape[-1]), mask.view(-1, ids.shape[-1]))
            ]
        elif isinstance(ids, Sequence) and all(isinstance(i, int) for i in ids):
            rows.append(list(ids))
        else:
            raise BadInput("calib", type(part).__name__, "is no row of token ids", remedy)
    if not rows:
        raise BadInput("calib", None if calib is None else [], "holds no row", remedy)
    if (short := min(len(row) for row in rows)) < 2:
        raise BadInput("calib", short, "tokens are too short a row", "give two tokens or more")
    found = []
    for start in range(0, len(rows), ROWS):
        ids, mask = pad_batch(rows[start : start + ROWS], 0, device=device)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@torch.no_grad()
def mean_loss(model: Any, calib: Any) -> float:
    """Mean negative log-likelihood per predicted token of `calib`, in nats; the model's mode is restored."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    try:
        for batch in batches_of(calib, next(model.parameters()).device):
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            predicted = int((batch["attention_mask"].sum(1) - 1).sum())
            total += predicted * float(target_loss(model, {**batch, "labels": labels}))
            count += predicted
    finally:
        model.train(training)
    return total / count


def windows(
    tokenizer: Any, texts: str | Sequence[str], count: int, length: int, argument: str = "texts"
) -> Tensor:
    """`count` windows of `length` tokens, spread evenly over the texts joined by blank lines: `[count, length]`.

    Raises:
        BadInput: the texts are too short.
    """
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if count < 1 or length < 2 or len(ids) < count * length:
        raise BadInput(
            argument,
            f"{len(ids)} tokens",
            f"do not make {count} windows of {length}",
            "give more text, or ask for less",
        )
    apart = (len(ids) - length) / max(count - 1, 1)
    starts = [int(i * apart) for i in range(count)]
    return torch.tensor([ids[s : s + length] for s in starts])


def read_texts(source: str | os.PathLike[str], argument: str = "texts") -> list[str]:
    """Texts of a plain file (`.txt`, `.md`) or of records with `text`.

    Raises:
        BadInput: no such file, or no text.
        CorruptFile: it cannot be read.
    """
    path = Path(source)
    if path.suffix not in (".txt", ".md"):
        return [document.text for document in read_documents(path, argument=argument)]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFile(argument, str(path), "is not UTF-8 text", "give a plain text file") from error
    except OSError as error:
        raise BadInput(
            argument, str(path), f"cannot be read ({error.strerror})", "give a text file"
        ) from error
    if not text.strip():
        raise BadInput(argument, str(path), "is empty", "give a file with text")
    return [text]
