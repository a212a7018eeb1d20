"""Where knowledge is written: the down-projection of a block's MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core.errors import BadInput
from ..core.taps import decoder_layers
from ._base import WeightEdit, editable
from ._layers import block_name, depth, down_projection

__all__ = ["Site", "edit_of", "find_sites"]

_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Site:
    """One MLP down-projection W, `[d, m]` in the field's notation.

    Attributes:
        index: Number of the block.
        block: Name of the block.
        module: Name of the down-projection.
        weight: Name of its weight parameter.
        transposed: The weight is stored as `[m, d]` (`Conv1D`).
        width: d, the length of a value.
        inner: m, the length of a key.
    """

    index: int
    block: str
    module: str
    weight: str
    transposed: bool
    width: int
    inner: int

    def matrix(self, model: nn.Module) -> torch.Tensor:
        """W as `[d, m]`: a view of the parameter."""
        weight = model.get_parameter(self.weight).detach()
        return weight.T if self.transposed else weight

    def bias(self, model: nn.Module) -> torch.Tensor | None:
        """The down-projection's bias `[d]`, if it has one."""
        bias = getattr(model.get_submodule(self.module), "bias", None)
        return None if bias is None else bias.detach()


def find_sites(
    model: PreTrainedModel, layers: Sequence[int], module: str | None = None, *, writing: bool = False
) -> list[Site]:
    """The down-projections of blocks `layers`.

    Args:
        model: A decoder.
        layers: Numbers of blocks.
        module: Name of the down-projection inside a block; found by its usual names when None.
        writing: Refuse the last block: what is written there at the subject reaches no later token; and blocks that
            carry a state instead of keys and values, beside which the search cannot run.

    Raises:
        BadInput: no such block or module, or a weight that cannot be edited (quantized, tied, not a matrix).
    """
    last = len(decoder_layers(model)) - 1
    if writing and last in layers:
        raise BadInput(
            "layer", last, "is the last block, from which no later token is reached", "edit a lower one"
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENDING
    if writing and kinds:
        raise BadInput(
            "model", type(model).__name__, f"has blocks without keys and values ({', '.join(sorted(kinds))})",
            "edit it by ft-m, lora or grace",
        )  # fmt: skip
    return [_site(model, depth(model, layer, 0.0), module) for layer in layers]


def _site(model: PreTrainedModel, index: int, module: str | None) -> Site:
    name = down_projection(model, index, module)
    weight = editable(model, f"{name}.weight")
    transposed = isinstance(model.get_submodule(name), Conv1D)
    width, inner = reversed(weight.shape) if transposed else weight.shape
    return Site(index, block_name(model, index), name, f"{name}.weight", transposed, int(width), int(inner))


def edit_of(updates: Sequence[tuple[Site, torch.Tensor, torch.Tensor]]) -> WeightEdit:
    """The edit that adds `left [d, r] @ right [r, m]` to each site's W; factors are stored in float32.

    Factors are laid out contiguously, so that a stored edit gives the same sums, bit by bit, when loaded.
    """
    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for site, left, right in updates:
        pair = (right.T, left.T) if site.transposed else (left, right)
        first, second = (t.detach().to("cpu", torch.float32).contiguous() for t in pair)
        low_rank[site.weight] = first, second
    return WeightEdit(low_rank=low_rank)
