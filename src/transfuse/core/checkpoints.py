"""Checkpoints of a training run without pickle: safetensors for every tensor, JSON for the rest.

A checkpoint is a folder `checkpoint-<step>` that holds the trainable weights and persistent buffers, the
optimizer's and scheduler's state, the random states and the position in the data. It appears whole or not at
all, and the one before it is removed only afterwards, so a process killed at any moment leaves a usable one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import BadInput, CorruptFile, IncompatibleModels
from .files import atomic_dir, atomic_write, read_tensors, write_tensors

__all__ = [
    "clear_checkpoints",
    "last_checkpoint",
    "load_checkpoint",
    "load_rng",
    "load_weights",
    "read_json",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "trained_tensors",
]

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "state.json"


def rng_state() -> dict[str, Any]:
    """Random states of python, numpy and torch (every CUDA device), as tensors and JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": [version, gauss],
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "numpy_rest": [name, position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index, device in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda.{index}"] = device
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA states of devices that are not there are left out."""
    version, gauss = state["python_rest"]
    random.setstate((version, tuple(state["python"].tolist()), gauss))
    name, position, has_gauss, cached = state["numpy_rest"]
    np.random.set_state((name, state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training can change: parameters that take a gradient, and persistent buffers."""
    kept = set(model.state_dict(keep_vars=True))
    tensors: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors.update({name: b for name, b in model.named_buffers() if name in kept})
    return tensors


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Only looks, so that a run in progress may be asked."""
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return max(found)[1] if found else None


def clear_checkpoints(folder: Path, *, keep: Path | None = None) -> None:
    """Remove every checkpoint in `folder` but `keep`, and what a killed process left: only for the run itself.

    A checkpoint is hidden before its files go, so that one killed here leaves no half of it to be found.
    """
    for path in folder.glob("checkpoint-*"):
        if path != keep and _NAME.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # another process of the run was first
                os.replace(path, Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=folder)))
    for rest in folder.glob(".checkpoint-*"):
        shutil.rmtree(rest, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    values: Mapping[str, Any],
    extra: Mapping[str, str] | None = None,
    states: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write `folder/checkpoint-<step>` and remove older ones.

    Args:
        folder: Folder of the run.
        step: Updates made so far.
        model: Its trained tensors are saved.
        optimizer: Any torch optimizer: tensors of its state go to safetensors, the rest to JSON.
        scheduler: A learning-rate scheduler or None; its state must be JSON-able (torch's are).
        values: JSON-able facts about the run: its arguments, position, losses.
        extra: Text files to put beside, by name.
        states: Named random states besides the current one.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"checkpoint-{step}"
    record = optimizer.state_dict()
    tensors, plain = _split(record["state"])
    rng = {
        f"{name}/{k}": v for name, s in {"now": rng_state(), **(states or {})}.items() for k, v in s.items()
    }
    rng_tensors = {key: value for key, value in rng.items() if isinstance(value, torch.Tensor)}
    state = {
        "step": step,
        "values": dict(values),
        "optimizer": {"state": plain, "param_groups": record["param_groups"]},
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "rng": {key: value for key, value in rng.items() if key not in rng_tensors},
    }
    with atomic_dir(target, mark=_STATE) as work:
        write_tensors(work / "model.safetensors", trained_tensors(model))
        write_tensors(work / "optimizer.safetensors", tensors)
        write_tensors(work / "rng.safetensors", rng_tensors)
        for name, text in (extra or {}).items():
            atomic_write(work / name, text)
        atomic_write(work / _STATE, json.dumps(state, default=_number))
    clear_checkpoints(folder, keep=target)
    return target


def load_checkpoint(folder: Path, *, optimizer: Any = None, scheduler: Any = None) -> dict[str, Any]:
    """Load optimizer and scheduler from a checkpoint folder and return its `values`, with `step` added.

    Raises:
        CorruptFile: a file is missing or unreadable.
        IncompatibleModels: the optimizer has other parameters than the one saved.
    """
    state = read_json(folder)
    if optimizer is not None:
        tensors = _read_tensors(folder, "optimizer")
        joined = _join(tensors, state["optimizer"]["state"])
        try:
            optimizer.load_state_dict({"state": joined, "param_groups": state["optimizer"]["param_groups"]})
        except ValueError as error:
            raise IncompatibleModels(
                "output_dir",
                str(folder),
                f"was written with other parameters ({error})",
                "use another folder",
            ) from error
        # torch casts states to their parameter's dtype; those kept in float32 beside bfloat16 would be rounded.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, entries in joined.items():
            own = optimizer.state[parameters[index]]
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    own[key] = value.to(own[key].device)
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])
    return {**state["values"], "step": state["step"]}


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Copy a checkpoint's weights into `model`, bit for bit.

    Raises:
        CorruptFile: the file is missing or unreadable.
        IncompatibleModels: names, shapes or dtypes differ from the model's trainable tensors.
    """
    tensors = _read_tensors(folder, "model")
    own = trained_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        mine, theirs = own.get(name), tensors.get(name)
        if mine is None or theirs is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise IncompatibleModels(
                "output_dir",
                str(folder),
                f"does not fit the model at {name}",
                "use another folder or resume=False",
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def load_rng(folder: Path, name: str = "now") -> dict[str, Any]:
    """Put back the random state called `name` of a checkpoint, and return it."""
    every = {**_read_tensors(folder, "rng"), **read_json(folder)["rng"]}
    state = {key[len(name) + 1 :]: value for key, value in every.items() if key.startswith(name + "/")}
    set_rng_state(state)
    return state


def read_json(folder: Path, name: str = _STATE) -> Any:
    """Content of one of a checkpoint's JSON files.

    Raises:
        CorruptFile: it is missing or unreadable.
    """
    with _told(folder / name) as path:
        return json.loads(path.read_text())


def _read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    with _told(folder / f"{name}.safetensors") as path:
        return read_tensors(path)[0]


@contextlib.contextmanager
def _told(path: Path) -> Iterator[Path]:
    """Whatever is wrong with a checkpoint's file, the remedy is the same."""
    try:
        yield path
    except (OSError, ValueError) as error:
        problem = error.problem if isinstance(error, BadInput) else f"cannot be read ({error})"
        remedy = "delete the checkpoint or pass resume=False"
        raise CorruptFile("output_dir", str(path), problem, remedy) from error


def _split(
    state: Mapping[int, Mapping[str, Any]],
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Optimizer state by parameter number -> (tensors by "number.key", the rest as JSON-able dicts)."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state.items():
        plain[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[str(index)][key] = value
    return tensors, plain


def _join(
    tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    state = {int(index): dict(entries) for index, entries in plain.items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state[int(index)][key] = tensor
    return state


def _number(value: Any) -> Any:
    """JSON for numpy and zero-dimensional torch numbers; anything else cannot be put in a checkpoint."""
    if isinstance(value, (torch.Tensor, np.generic)) and np.ndim(value) == 0:
        return value.item()
    raise BadInput(
        "checkpoint", value, "is not a number, text, list or dict", "keep such state out of the optimizer"
    )
