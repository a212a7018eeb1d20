"""What a method of the family distill shows to the contract tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass
class Case:
    """One numeric core, with an independent implementation of it.

    Attributes:
        name: Of the case.
        inputs: Random inputs of a seed, float64; integer tensors where they belong. The first axis is the batch.
        loss: The product's scalar loss on such inputs.
        reference: The same by loops or plain formulas, written without the product. Gets the inputs twice: live
            ones, and fixed ones for everything that takes no gradient (targets, weights).
        learns: Inputs that take a gradient.
        least: Changes inputs so that the student equals what it learns from.
        least_value: The loss there.
        padded: Adds padding that must not matter.
        excluded: Puts -inf into logits; the loss must stay finite, or equal `excluded_value`.
        excluded_value: See `excluded`.
        count: Weight of a part of the batch when the batch is split.
        couples: Why a split of the batch changes the loss, where it does.
        without: For every one of least, padded, excluded that is None: why.
    """

    name: str
    inputs: Callable[[int], Inputs]
    loss: Callable[[Inputs], Tensor]
    reference: Callable[[Inputs, Inputs], Tensor | float]
    learns: tuple[str, ...]
    least: Callable[[Inputs], Inputs] | None = None
    least_value: Callable[[Inputs], float] = lambda inputs: 0.0
    padded: Callable[[Inputs], Inputs] | None = None
    excluded: Callable[[Inputs], Inputs] | None = None
    excluded_value: float | None = None
    count: Callable[[Inputs], float] = lambda inputs: float(len(next(iter(inputs.values()))))
    couples: str = ""
    without: dict[str, str] = field(default_factory=dict)


@dataclass
class Trained:
    """What a short real training run by the method's own trainer left.

    Attributes:
        losses: Of the updates.
        student: The model a user keeps.
        shapes: Parameter names and shapes of the bare student before training.
        untouched: Teachers and other frozen modules, as (state before, module) pairs.
    """

    losses: list[float]
    student: nn.Module
    shapes: dict[str, tuple[int, ...]]
    untouched: list[tuple[Inputs, nn.Module]] = field(default_factory=list)


def state(module: nn.Module) -> Inputs:
    """A copy of a module's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's parameters."""
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def rng(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def token_case(
    name: str,
    objective: Callable[[], object],
    per_token: Callable[[Tensor, Tensor, int, Inputs], Tensor],
    **options,
) -> Case:
    """A case of a token objective on a language model's logits `[B, T, V]`, with masked labels.

    Args:
        name: Of the case.
        objective: Makes the objective.
        per_token: The loss of one token by hand: student logits `[V]` (live), fixed inputs' student logits `[V]`,
            teacher logits are in `fixed["teacher"]`... see `reference` below: called with (live z_s, fixed z_s, label,
            {"teacher": z_t and the columns at that token}).
        **options: Further attributes of the case.
    """
    from transfuse.distill._base import Signal

    columns = options.pop("columns", None)

    def inputs(seed: int) -> Inputs:
        g = rng(seed)
        found = {
            "student": 2 * torch.randn(3, 5, 7, generator=g, dtype=torch.float64),
            "teacher": 2 * torch.randn(3, 5, 7, generator=g, dtype=torch.float64),
            "labels": torch.randint(0, 7, (3, 5), generator=g),
        }
        found["labels"][0, :2] = -100
        found["labels"][2, 3:] = -100
        if columns is not None:
            found.update(columns(g, 3, 5))
        return found

    def loss(x: Inputs) -> Tensor:
        made = objective()
        return made(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)["loss"]

    def reference(live: Inputs, fixed: Inputs) -> Tensor:
        values = []
        for b in range(live["labels"].shape[0]):
            for t in range(live["labels"].shape[1] - 1):
                label = int(live["labels"][b, t + 1])
                if label != -100:
                    extra = {
                        k: v[b, t + 1] for k, v in fixed.items() if k not in ("student", "teacher", "labels")
                    }
                    extra["teacher"] = fixed["teacher"][b, t]
                    values.append(per_token(live["student"][b, t], fixed["student"][b, t], label, extra))
        return torch.stack(values).mean()

    def padded(x: Inputs) -> Inputs:
        more = {}
        for key, value in x.items():
            extra = value.new_full((value.shape[0], 2, *value.shape[2:]), -100 if key == "labels" else 0)
            if key in ("student", "teacher"):
                extra = extra + float("nan")
            more[key] = torch.cat([value, extra], 1)
        return more

    def excluded(x: Inputs) -> Inputs:
        changed = {key: value.clone() for key, value in x.items()}
        changed["student"][..., 0] = -torch.inf
        changed["teacher"][..., 0] = -torch.inf
        changed["labels"][changed["labels"] == 0] = 1
        return changed

    settings = {
        "least": lambda x: {**x, "teacher": x["student"].clone()},
        "padded": padded,
        "excluded": excluded,
        "count": lambda x: float((x["labels"][:, 1:] != -100).sum()),
        **options,
    }
    return Case(name, inputs, loss, reference, ("student",), **settings)


def rows(count=12, length=10, vocab=400, seed=0):
    """Random sequences whose first two tokens are not predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


def arguments(folder, **options):
    """Quiet `TrainingArguments` of a short run."""
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 3e-3,
        "report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **options})
