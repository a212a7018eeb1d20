"""A module around a model that stands in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BadInput

__all__ = ["Around", "check_prompt", "examples_of", "prompt_of"]

_CACHES = ("past_key_values", "cache_params")
_PROMPT = {
    "inputs": "input_ids", "input_ids": "input_ids", "inputs_embeds": "inputs_embeds",
    "attention_mask": "attention_mask",
}  # fmt: skip


class Around(nn.Module):
    """What it has not, `model`, which subclasses set, has: `config`, `generation_config`, ..."""

    model: Any

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = next(self.model.parameters()).device
        return device


def examples_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The number of examples of a call: rows of its token ids, embeddings, or first tensor.

    Raises:
        BadInput: there is no tensor.
    """
    named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise BadInput("input_ids", None, "is missing", "call it with tensors, one row per example")


def prompt_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of `generate`, those that `forward` takes and the choice of a task depends on."""
    found = {own: kwargs[name] for name, own in _PROMPT.items() if kwargs.get(name) is not None}
    if "input_ids" in found:
        found.pop("inputs_embeds", None)
    return found


def check_prompt(args: Sequence[Any], kwargs: Mapping[str, Any], argument: str) -> None:
    """Refuse a call that goes on from a cache: what is chosen depends on the whole prompt.

    Args:
        args: Of the call.
        kwargs: Of the call.
        argument: By which it could say what to choose.

    Raises:
        BadInput: there is a cache with something in it.
    """
    for value in (*args, *(kwargs.get(name) for name in _CACHES)):
        length = getattr(value, "get_seq_length", None)
        if int(length()) if length is not None else isinstance(value, tuple) and value:
            problem = "holds a part of the prompt, which the router has to see whole"
            raise BadInput("past_key_values", type(value).__name__, problem, f"pass {argument}=")
