"""What every training run shares: its record, its checks, the folder it goes on from."""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoints import clear_checkpoints, last_checkpoint, load_checkpoint
from .errors import BadInput, TrainingDiverged
from .files import check_writable

__all__ = [
    "History",
    "check_finite",
    "check_number",
    "check_positive",
    "discard_run",
    "evaluating",
    "open_run",
    "training_mode",
]


@dataclass(frozen=True)
class History:
    """What a training run did.

    Attributes:
        losses: The loss of each update, from the first one on (also those made before a resumption).
        seconds: Wall time of this process's part.
        resumed_at: Updates that came from a checkpoint; 0 for a run from the start.
    """

    losses: list[float]
    seconds: float
    resumed_at: int

    @property
    def steps(self) -> int:
        """Updates made in all."""
        return len(self.losses)


def check_finite(loss: torch.Tensor, step: int, lr: float | None = None) -> float:
    """The loss as a number.

    Raises:
        BadInput: it is not one number.
        TrainingDiverged: it is NaN or infinite.
    """
    if loss.numel() != 1:
        raise BadInput("loss", tuple(loss.shape), "is not a scalar", "return the mean over the batch")
    value = float(loss.detach())
    if not math.isfinite(value):
        hint = "" if lr is None else f" (now {lr:g})"
        raise TrainingDiverged(
            f"the loss is {value} at step {step}; lower the learning rate{hint} or check the data"
        )
    return value


def check_positive(**values: int | None) -> None:
    """Refuse a count that is below 1 or no whole number, naming the argument; None passes.

    Raises:
        BadInput: one is.
    """
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise BadInput(name, value, "is not a whole number", "give a positive whole number")
        if value < 1:
            raise BadInput(name, value, "is below 1", "give a positive number")


def check_number(name: str, value: Any, *, zero: bool = False, remedy: str | None = None) -> None:
    """Refuse what is no finite number above 0 (or 0, with `zero`), naming the argument.

    Raises:
        BadInput: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise BadInput(name, value, "is not a finite number", remedy or "give one")
    if value < 0 or (value == 0 and not zero):
        problem = "is negative" if zero else "is not positive"
        raise BadInput(name, value, problem, remedy or f"give {'0 or more' if zero else 'a number above 0'}")


@contextlib.contextmanager
def training_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into training mode and give every submodule its own mode back afterwards."""
    with _modes_kept(model):
        model.train()
        yield


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode and give every submodule its own mode back afterwards."""
    with _modes_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def _modes_kept(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def open_run(
    output_dir: str | os.PathLike[str] | None, identity: Mapping[str, Any], resume: bool
) -> tuple[Path | None, Path | None]:
    """The checkpoint folder of a run and the checkpoint to go on from, either of which may be None.

    Raises:
        BadInput: the folder cannot be written, or holds a checkpoint whose run had another `identity`.
    """
    if output_dir is None:
        return None, None
    folder = check_writable(output_dir, "output_dir")
    if not resume:
        clear_checkpoints(folder)
    last = last_checkpoint(folder)
    if last is not None and load_checkpoint(last).get("identity") != json.loads(json.dumps(identity)):
        remedy = "choose another folder or pass resume=False"
        raise BadInput("output_dir", str(folder), "holds a checkpoint of a run with other arguments", remedy)
    clear_checkpoints(folder, keep=last)
    return folder, last


def discard_run(folder: Path | None) -> None:
    """Remove a run's checkpoints, and its folder when that leaves it empty."""
    if folder is not None and folder.is_dir():
        clear_checkpoints(folder)
        if not any(folder.iterdir()):
            folder.rmdir()
