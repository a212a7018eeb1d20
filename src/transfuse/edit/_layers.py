"""Where editors write: blocks by depth, their MLP's down-projection, and a model held still while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..core.errors import BadInput
from ..core.taps import decoder_layers

__all__ = ["block_name", "depth", "down_projection", "hidden_size", "still"]

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
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise BadInput("layer", layer, "is not a block of the model", f"give an index from 0 to {count - 1}")
    return layer


def block_name(model: PreTrainedModel, layer: int) -> str:
    """Name of block `layer` (`model.layers.20`)."""
    return decoder_layers(model)[layer]


def down_projection(model: PreTrainedModel, layer: int) -> str:
    """Name of the module that is the MLP's down-projection in block `layer`.

    Raises:
        BadInput: the block has no dense MLP under a known name.
    """
    block = block_name(model, layer)
    inner = dict(model.get_submodule(block).named_modules())
    for name in _DOWN:
        if isinstance(getattr(inner.get(name), "weight", None), torch.Tensor):
            return f"{block}.{name}"
    raise BadInput(
        "model", type(model).__name__, f"has no dense MLP down-projection in {block}",
        "choose a model with one of " + ", ".join(_DOWN),
    )  # fmt: skip


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return int(model.config.get_text_config().hidden_size)


@contextlib.contextmanager
def still(model: PreTrainedModel) -> Iterator[None]:
    """Run a block with every module in eval mode; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
