"""ExSSNet: tasks share one fixed network through masks; each trains only weights no earlier mask uses.

:arxiv: 2210.10209
:moves: a row of tasks -> masks and unused weights of one network
:access: weights, training data
:reversible: no
:context: no

A task t gets scores S of each layer's shape, and from them a mask that keeps the largest share rho of |S| in each
layer. It sees the weights as W * m. Learning it has two phases:

    1. scores:   W stays; dS = sign(S) * dL/d(W m) * W   (straight through the choice of the largest)
    2. weights:  the mask stays; W changes where f = m and not (m_1 or ... or m_{t-1}), and nowhere else

What an earlier mask keeps is never touched: the network answers earlier tasks with the same bits as before. A task
costs one bit per weight and its batch-norm statistics. `mode="masks_only"` leaves out phase 2 (SupSup);
`mode="shared"` lets phase 2 change all of m (SSNeT), and earlier tasks with it.

With `knn_transfer` a new task may start from an earlier one's scores: the inputs of the output layer under each
earlier mask, on the new task's data, are judged by a nearest-neighbour vote, and the best mask starts the new one if
it beats chance.

Which task an input belongs to must be known when answering. Converting a network (`convert_to_supermask`) drops
biases, gives all weights of a layer one size (zeros stay), and gives batch norms statistics per task.

Beside the authors' code: scores and weights have learning rates of their own (there the weights' rate serves both);
averaging scores over several tasks leaves these as they were (there the first is overwritten); earlier tasks'
batch-norm statistics do not move while features are compared; the second schedule there, which reads an accuracy as
if it were a loss, is left out. With validation data each phase keeps its best epoch, phase 2 the state it began with
if no epoch is better.

    learner = ExSSNet(network, density=0.1, mask_epochs=6, weight_epochs=6)
    first = learner.add_task(minibatches({"x": images, "y": labels}, 64, seed=0), num_classes=10)
    second = learner.add_task(other_batches, num_classes=5)
    learner.predict(images, first)
    save(learner, "tasks")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_positive, evaluating
from transfuse.core.taps import capture
from transfuse.core.training import generator

from ._arguments import check_number
from ._continual import (
    Sources,
    average_accuracy,
    forgetting,
    knn_accuracy,
    nearest_tasks,
    sparse_overlap,
)
from ._conversion import check_ready, convert_to_supermask, maskable, masked_layers
from ._subnet_store import load_tasks, save_tasks, write_task
from ._subnet_training import Batches, Phase, pairs
from ._supermasks import (
    SupermaskConv1d,
    SupermaskConv2d,
    SupermaskLinear,
    TaskNorm,
    UnknownTask,
    known_task,
    signed_constant,
    supermask,
)

__all__ = [
    "ExSSNet",
    "SupermaskConv1d",
    "SupermaskConv2d",
    "SupermaskLinear",
    "Task",
    "TaskNorm",
    "UnknownTask",
    "average_accuracy",
    "convert_to_supermask",
    "forgetting",
    "knn_accuracy",
    "load",
    "nearest_tasks",
    "save",
    "signed_constant",
    "sparse_overlap",
    "supermask",
]


class Task(NamedTuple):
    """What `ExSSNet.learn` takes for one task.

    Attributes:
        train: Batches to learn from.
        test: Batches to score on.
        num_classes: Classes, numbered from 0.
        validation: Batches that choose the best epoch of each phase; None keeps the last.
    """

    train: Batches
    test: Batches
    num_classes: int
    validation: Batches | None = None


class ExSSNet:
    """A network that learns tasks one after the other, each in its own mask.

    Args:
        model: The network; it answers `model(x)` with logits `[batch, most classes of a task]`. Converted in place
            unless it is already; one whose layers hold tasks is refused.
        density: Share of each layer's weights in a mask; that of a converted network is kept.
        mode: "exclusive" (ExSSNet), "shared" (SSNeT) or "masks_only" (SupSup).
        mask_lr: Adam's learning rate for scores.
        weight_lr: Adam's learning rate for weights; there is no weight decay.
        mask_epochs: Passes over a task's data in phase 1.
        weight_epochs: Passes in phase 2.
        schedule: Learning rate over a phase: along half a cosine, epoch by epoch, or constant.
        knn_transfer: Which earlier tasks' scores may start a new one (see `Sources`); None for random scores.
        neighbours: Votes of the nearest-neighbour test.
        head: Name of the output layer, whose input that test compares; by default the last masked layer.
        seed: Of the scores and of dropout.

    Attributes:
        classes: Number of classes of each task learnt.
        curves: Per task, the validation accuracies after each epoch of "masks" and "weights".
        sources: Per task, the tasks it started from.

    Raises:
        BadInput: an argument out of range; a network without layers to mask, or with tasks.
        NotApplicable: a network with shared layers, or running statistics that cannot be kept per task.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float = 0.1,
        mode: Literal["exclusive", "shared", "masks_only"] = "exclusive",
        mask_lr: float = 0.01,
        weight_lr: float = 0.001,
        mask_epochs: int = 50,
        weight_epochs: int = 50,
        schedule: Literal["cosine", "constant"] = "cosine",
        knn_transfer: Sources | None = None,
        neighbours: int = 200,
        head: str | None = None,
        seed: int = 0,
    ):
        for name, value, allowed in (
            ("mode", mode, ("exclusive", "shared", "masks_only")),
            ("schedule", schedule, ("cosine", "constant")),
            ("knn_transfer", knn_transfer, (None, "best", "always", "all")),
        ):
            if value not in allowed:
                raise BadInput(name, value, "is not known", f"use one of {', '.join(map(str, allowed))}")
        check_positive(mask_epochs=mask_epochs, weight_epochs=weight_epochs, neighbours=neighbours)
        for name, rate in (("mask_lr", mask_lr), ("weight_lr", weight_lr)):
            check_number(name, rate)
        masked = maskable(model)
        if head is not None and head not in masked:
            raise BadInput("head", head, "is not a masked layer", f"use one of {', '.join(masked)}")
        if not masked_layers(model):
            convert_to_supermask(model, density)
        check_ready(model, 0)
        self.model, self.mode, self.schedule, self.knn_transfer = model, mode, schedule, knn_transfer
        self.mask_lr, self.weight_lr = mask_lr, weight_lr
        self.mask_epochs, self.weight_epochs = mask_epochs, weight_epochs
        self.neighbours, self.seed = neighbours, seed
        self.head = masked[-1] if head is None else head
        self.layers = masked_layers(model)
        self.density = next(iter(self.layers.values())).density
        self.norms = [layer for layer in model.modules() if isinstance(layer, TaskNorm)]
        self.classes: list[int] = []
        self.curves: list[dict[str, list[float]]] = []
        self.sources: list[list[int]] = []

    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, but the network."""
        names = (
            "density", "mode", "mask_lr", "weight_lr", "mask_epochs", "weight_epochs", "schedule",
            "knn_transfer", "neighbours", "head", "seed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    # --- learning ------------------------------------------------------------------------------------------

    def add_task(self, batches: Batches, num_classes: int, *, validation: Batches | None = None) -> int:
        """Learn a task; the network, the task it stands at included, is as before if that fails.

        Args:
            batches: Its data, which every epoch goes through again.
            num_classes: Its classes, numbered from 0.
            validation: Data that choose the best epoch of each phase; None keeps the last.

        Returns:
            The task's number, from 0.

        Raises:
            BadInput: no batches, or an iterator that gives them only once; labels that are no integers below
                `num_classes`; more classes than outputs; tasks in the network that are not this learner's.
            TrainingDiverged: the loss became NaN or infinite.
        """
        check_positive(num_classes=num_classes)
        if num_classes < 2:
            raise BadInput("num_classes", num_classes, "is below 2", "give the number of classes")
        fit = Phase(self, num_classes, batches, validation)
        check_ready(self.model, len(self.classes))
        task, random = len(self.classes), generator(100_003 * self.seed + len(self.classes))
        before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        stood = [part.task for part in self._parts()]
        for layer in self.layers.values():
            layer.add_task(random)
        for norm in self.norms:
            norm.add_task()
        curves: dict[str, list[float]] = {"masks": [], "weights": []}
        try:
            outputs = self.evaluated(next(pairs(batches, 0))[0]).shape[-1]
            if outputs < num_classes:
                remedy = "give the network an output for each class of the largest task"
                raise BadInput("num_classes", num_classes, f"exceeds the {outputs} outputs", remedy)
            sources = self._start(batches, task, num_classes) if self.knn_transfer and task else []
            scores: list[Tensor] = [layer.scores[task] for layer in self.layers.values()]
            curves["masks"] = fit(scores, self.mask_lr, self.mask_epochs)
            for layer in self.layers.values():
                layer.close()
            if self.mode != "masks_only":
                curves["weights"] = self._train_weights(fit, task)
            for norm in self.norms:
                norm.close()
        except BaseException:
            for part, at in zip(self._parts(), stood, strict=True):
                part.drop_task()
                part.task = at
            with torch.no_grad():
                for name, layer in self.layers.items():
                    layer.weight.copy_(before[name])
            raise
        self.classes.append(int(num_classes))
        self.curves.append(curves)
        self.sources.append(sources)
        return task

    def _train_weights(self, fit: Phase, task: int) -> list[float]:
        """Phase 2. Adam without decay does not move an entry whose gradients are all zero."""
        exclusive = self.mode == "exclusive"
        free = {n: x.free_mask(task) if exclusive else x.mask(task) for n, x in self.layers.items()}
        if not any(bool(mask.any()) for mask in free.values()):
            warnings.warn(
                f"task {task} has no weight of its own left; only its mask is trained", stacklevel=3
            )
            return []
        before = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.free = free[name]
            curve = fit([x.weight for x in self.layers.values()], self.weight_lr, self.weight_epochs, True)
        finally:
            for layer in self.layers.values():
                layer.free = None
        for name, layer in self.layers.items():
            assert torch.equal(layer.weight[~free[name]], before[name][~free[name]]), f"{name} moved"
        return curve

    def _start(self, batches: Batches, task: int, num_classes: int) -> list[int]:
        """Start a task's scores from those of the nearest earlier tasks; returns which."""
        rows = list(pairs(batches, 0))
        rows = rows[: math.ceil(0.2 * len(rows)) + 1]
        labels = torch.cat([y for _, y in rows]).cpu()
        accuracies = []
        for earlier in range(task):
            self._select(earlier)
            features = []
            with capture(self.model, self.head, inputs=True) as seen:
                for x, _ in rows:
                    self.evaluated(x)
                    features.append(seen[self.head].flatten(1).cpu())
            accuracies.append(knn_accuracy(torch.cat(features), labels, self.neighbours))
        self._select(task)
        assert self.knn_transfer is not None
        chosen = nearest_tasks(accuracies, num_classes, self.knn_transfer)
        if chosen:
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.scores[task].copy_(torch.stack([layer.scores[i] for i in chosen]).mean(0))
        return chosen

    def learn(self, tasks: Sequence[Task]) -> Tensor:
        """Learn tasks in a row and score every task learnt so far after each.

        Returns:
            Accuracies `[T, T]`, float64: row i after task i, NaN where a task was not learnt yet. See
            `average_accuracy` and `forgetting`.
        """
        if self.classes:
            raise BadInput("tasks", len(self.classes), "were learnt before", "start from a new network")
        matrix = torch.full((len(tasks), len(tasks)), torch.nan, dtype=torch.float64)
        for i, task in enumerate(tasks):
            self.add_task(task.train, task.num_classes, validation=task.validation)
            for j in range(i + 1):
                matrix[i, j] = self.accuracy(tasks[j].test, j)
        return matrix

    # --- answering -----------------------------------------------------------------------------------------

    def logits(self, x: Any, task: int) -> Tensor:
        """Logits of a task for a batch of inputs, `[batch, classes of the task]`.

        Raises:
            UnknownTask: (a `KeyError`) there is no such task.
        """
        task = known_task(task, len(self.classes))
        self._select(task)
        return self.evaluated(x)[:, : self.classes[task]]

    def predict(self, x: Any, task: int) -> Tensor:
        """Classes, int64 `[batch]`.

        Raises:
            UnknownTask: (a `KeyError`) there is no such task.
        """
        return self.logits(x, task).argmax(-1)

    def accuracy(self, batches: Batches, task: int) -> float:
        """Share of a task's examples that are answered right.

        Raises:
            UnknownTask: (a `KeyError`) there is no such task.
            BadInput: no batches.
        """
        task = known_task(task, len(self.classes))
        rows = [(self.predict(x, task).cpu(), y.cpu()) for x, y in pairs(batches, 0)]
        guesses, truth = (torch.cat(column) for column in zip(*rows, strict=True))
        return float((guesses == truth).double().mean())

    def masks(self, task: int) -> dict[str, Tensor]:
        """The masks of a task, by layer.

        Raises:
            UnknownTask: (a `KeyError`) there is no such task.
        """
        task = known_task(task, len(self.classes))
        return {name: layer.mask(task) for name, layer in self.layers.items()}

    def export_task(self, task: int, path: str | Path) -> Path:
        """Write what belongs to one task alone (safetensors): its masks, a bit per weight, and its statistics.

        Raises:
            UnknownTask: (a `KeyError`) there is no such task.
        """
        return write_task(self, known_task(task, len(self.classes)), Path(path))

    def _select(self, task: int) -> None:
        for part in self._parts():
            part.task = task

    def _parts(self) -> list[Any]:
        return [*self.layers.values(), *self.norms]

    @torch.no_grad()
    def evaluated(self, x: Any) -> Tensor:
        """The network's output under the masks it stands at, in evaluation mode."""
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            found: Tensor = self.model(x.to(device) if isinstance(x, Tensor) else x)
        return found


def save(learner: ExSSNet, folder: str | Path) -> Path:
    """Write the network and its tasks: `shared.safetensors`, and `task-<number>.safetensors` as `export_task` does.

    The scores are written too where later tasks may start from them (`knn_transfer`).

    Raises:
        BadInput: the folder cannot be written.
    """
    return save_tasks(learner, Path(folder), learner.settings())


def load(model: nn.Module, folder: str | Path) -> ExSSNet:
    """Put saved tasks on a network of the same architecture, converted already or not, that has no tasks.

    Raises:
        BadInput: no saved tasks there, or tasks in the network.
        CorruptFile: a file cannot be read.
        IncompatibleModels: the network is another one.
    """
    return load_tasks(lambda settings: ExSSNet(model, **settings), model, Path(folder))
