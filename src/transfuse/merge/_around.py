"""A module around a model that stands in for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Around"]


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
