"""The injectors' contract: `apply(model, request)` attaches knowledge to a model and returns a handle.

A handle is active from the moment it exists. `rollback()` leaves the model as it was, bitwise; `save` writes
what was added, never the model, and `load` puts it onto the same model again.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

__all__ = ["Handle", "Injector"]


class Handle(ABC):
    """Knowledge attached to `model`. As a context manager it rolls back when the block ends, also on error.

    Attributes:
        model: The model that was given, the same object.
        active: Whether the knowledge is attached now.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.active = model, True

    @abstractmethod
    def _detach(self) -> None:
        """Take the knowledge out of `model`."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the addition as safetensors with its lineage; replaces `folder` atomically.

        Raises:
            BadInput: it was rolled back, or the folder cannot be written.
        """

    @classmethod
    @abstractmethod
    def load(cls, model: PreTrainedModel, folder: str | os.PathLike[str]) -> Handle:
        """Attach what `save` wrote.

        Raises:
            IncompatibleModels: it was made for another model.
            CorruptFile: the folder cannot be read.
        """

    def rollback(self) -> None:
        """Detach; calling it again does nothing."""
        if self.active:
            self.active = False
            self._detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.rollback()


class Injector(ABC):
    """Turns a request (documents, triples, a graph) into knowledge attached to a model."""

    @abstractmethod
    def apply(self, model: PreTrainedModel, request: Any) -> Handle:
        """Attach; the model is untouched when this raises."""
