"""Folders that hold a network and the masks of its tasks, a bit per weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels
from transfuse.core.files import atomic_dir, check_writable, disk_guard, read_tensors, write_tensors
from transfuse.core.lineage import write_lineage
from transfuse.core.packed import pack_bits, unpack_bits
from transfuse.core.training import generator

from ._supermasks import MASKED, TaskNorm

if TYPE_CHECKING:
    from .exssnet import ExSSNet

__all__ = ["load_tasks", "save_tasks", "write_task"]

SHARED = "shared.safetensors"


def write_task(learner: ExSSNet, task: int, path: Path) -> Path:
    """Write the masks of a task, packed, with its statistics and, where tasks may start from them, its scores."""
    tensors: dict[str, Tensor] = {}
    for name, layer in learner.layers.items():
        tensors[f"mask|{name}"] = pack_bits(layer.mask(task).to(torch.uint8), 1)
        if learner.knn_transfer is not None:
            tensors[f"scores|{name}"] = layer.scores[task]
    for name, module in learner.model.named_modules():
        if isinstance(module, TaskNorm):
            tensors |= {f"norm|{name}|{key}": value for key, value in module.norms[task].state_dict().items()}
    header = {"task": task, "num_classes": learner.classes[task], "shapes": _shapes(learner.model)}
    with disk_guard(path):
        write_tensors(path, tensors, header)
    return path


def save_tasks(learner: ExSSNet, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write the shared network and every task, in one rename."""
    target = check_writable(folder, "folder")
    with atomic_dir(target) as work:
        header = {
            "settings": dict(settings), "tasks": len(learner.classes), "shapes": _shapes(learner.model),
        }  # fmt: skip
        write_tensors(work / SHARED, _shared(learner.model), header)
        for task in range(len(learner.classes)):
            write_task(learner, task, work / f"task-{task}.safetensors")
        write_lineage(
            work,
            method="exssnet",
            arguments=settings,
            seed=settings["seed"],
            summary="Tasks that share one network through masks. A task's file holds a bit per weight.",
            usage='learner = transfuse.adapt.exssnet.load(network, "this folder")',
        )
    return target


def load_tasks(make: Callable[[dict[str, Any]], ExSSNet], model: nn.Module, folder: Path) -> ExSSNet:
    """What `save_tasks` wrote; `make` builds the learner from its settings."""
    if not (folder / SHARED).is_file():
        raise BadInput("folder", str(folder), f"holds no {SHARED}", "give the folder of saved tasks")
    tensors, header = read_tensors(folder / SHARED)
    try:
        settings, count, _ = header["settings"], int(header["tasks"]), header["shapes"]
        files = [read_tensors(folder / f"task-{task}.safetensors") for task in range(count)]
    except (KeyError, TypeError, BadInput) as error:
        remedy = "save the tasks again"
        raise CorruptFile("folder", str(folder), f"is not whole ({error})", remedy) from error
    shapes = _shapes(model)  # compared before the network is converted
    differ = [n for n in {**header["shapes"], **shapes} if shapes.get(n) != header["shapes"].get(n)]
    if differ:
        problem = f"differs at {differ[0]}: {shapes.get(differ[0])}, not {header['shapes'].get(differ[0])}"
        raise IncompatibleModels("model", type(model).__name__, problem, "give the same architecture")
    learner = make(settings)
    own = _shared(model)
    if own.keys() != tensors.keys():
        name = sorted(own.keys() ^ tensors.keys())[0]
        raise IncompatibleModels(
            "model", type(model).__name__, f"differs at {name}", "give the same architecture"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for stored, facts in files:
            _open_task(learner, stored, facts)
    return learner


def _open_task(learner: ExSSNet, stored: dict[str, Tensor], facts: dict[str, Any]) -> None:
    for name, layer in learner.layers.items():
        task = layer.add_task(generator(0))
        bits = unpack_bits(stored[f"mask|{name}"], 1, layer.weight.numel())
        mask = bits.view(layer.weight.shape).to(layer.weight.device)
        layer.scores[task].copy_(stored.get(f"scores|{name}", mask.to(layer.weight)))
        layer.register_buffer(f"mask_{task}", mask.bool())
    for name, module in learner.model.named_modules():
        if isinstance(module, TaskNorm):
            module.add_task()
            prefix = f"norm|{name}|"
            state = {key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(prefix)}
            module.norms[module.task].load_state_dict(state)
            module.close()
    learner.classes.append(int(facts["num_classes"]))
    learner.curves.append({"masks": [], "weights": []})
    learner.sources.append([])


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of the layers that are masked, or would be."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, *MASKED)
    return {name: list(layer.weight.shape) for name, layer in model.named_modules() if type(layer) in kinds}


def _shared(model: nn.Module) -> dict[str, Tensor]:
    """The network's own tensors: all but scores, masks and statistics of tasks."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".scores." not in name and ".norms." not in name and ".mask_" not in name
    }
