"""What editors share beside their contract: layers by depth, encoded facts, checked numbers, a model held still."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Fact
from ..core.errors import BadInput
from ..core.generate import check_length, encode_pair
from ..core.runs import evaluating
from ..core.taps import contiguous_head, decoder_layers

__all__ = ["block_name", "check_number", "depth", "down_projection", "encode_facts", "still"]

# The MLP's second linear map, as the architectures of transformers call it inside a block.
_DOWN = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "mlp.fc2",
    "feed_forward.w2",
    "fc2",
)


def depth(model: PreTrainedModel, layer: int | None, fraction: float) -> int:
    """Index of the block to edit: `layer`, or the one at `fraction` of the model's depth.

    Papers give the layer of one model; `fraction` carries it over (block 21 of Llama's 32 is 21/32).

    Raises:
        BadInput: `layer` is not one of the model's blocks.
    """
    count = len(decoder_layers(model))
    if layer is None:
        return min(round(fraction * count), count - 1)
    if isinstance(layer, bool) or not isinstance(layer, numbers.Integral) or not 0 <= layer < count:
        raise BadInput("layer", layer, "is not a block of the model", f"give an index from 0 to {count - 1}")
    return int(layer)


def block_name(model: PreTrainedModel, layer: int) -> str:
    """Name of block `layer` (`model.layers.20`)."""
    return decoder_layers(model)[layer]


def down_projection(model: PreTrainedModel, layer: int, module: str | None = None) -> str:
    """Name of the module that is the MLP's down-projection in block `layer`.

    Args:
        model: A decoder.
        layer: Index of the block.
        module: Its name inside the block, where it is not one of the usual names.

    Raises:
        BadInput: the block has no such linear map, or its weights are packed (quantized).
    """
    block = block_name(model, layer)
    inner = dict(model.get_submodule(block).named_modules())
    linear = [n for n, m in inner.items() if isinstance(getattr(m, "weight", None), torch.Tensor)]
    linear = [n for n in linear if inner[n].weight.dim() == 2]
    names = (module,) if module is not None else _DOWN
    for name in names:
        if name in linear:
            return f"{block}.{name}"
    if packed := next((n for n in names if n in inner and not any(inner[n].children())), None):
        raise BadInput(
            "model", f"{block}.{packed}", f"is a {type(inner[packed]).__name__} without a weight matrix",
            "load the model unquantized, in bf16 or float32, to edit it",
        )  # fmt: skip
    raise BadInput(
        "module", module, f"names no MLP down-projection of {type(model).__name__}",
        f"give module=..., one of {', '.join(linear)}",
    )  # fmt: skip


@contextlib.contextmanager
def still(model: PreTrainedModel) -> Iterator[None]:
    """Run a block with every module in eval mode (each gets its own mode back) and a contiguous head."""
    with evaluating(model), contiguous_head(model):
        yield


def encode_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, target ids) of each fact, in order.

    Raises:
        BadInput: a fact is longer than the model's positions; the record is named.
    """
    pairs = [encode_pair(tokenizer, fact.prompt, fact.target) for fact in facts]
    for i, (fact, (prompt, target)) in enumerate(zip(facts, pairs)):
        check_length(model, len(prompt) + len(target), f"facts[{i}] ({fact.label})")
    return pairs


def check_number(
    argument: str, value: float, *, least: float, above: bool = False, whole: bool = False
) -> None:
    """Refuse a hyperparameter below `least` (or equal to it, with `above`), NaN included; or not `whole`.

    Raises:
        BadInput: with the argument's name and the allowed range.
    """
    good = not isinstance(value, bool) and isinstance(value, numbers.Integral if whole else numbers.Real)
    if not (good and (value > least if above else value >= least)):
        kind, bound = "a whole number" if whole else "a number", "above" if above else "of at least"
        raise BadInput(argument, value, "is out of range", f"give {kind} {bound} {least}")
