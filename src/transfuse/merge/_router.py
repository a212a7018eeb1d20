"""A small network that says which task an input is of, from a frozen model's features."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..core import taps
from ..core.batches import minibatches
from ..core.errors import BadInput
from ..core.generate import pad_batch, pad_id_of
from ..core.runs import check_number, check_positive
from ..core.training import generator, loop, seeded

__all__ = ["Router", "check_training", "encode", "input_batches", "masked_mean", "train_router"]

_OF_CACHES = ("past_key_values", "cache_params", "cache_position")


class Router(nn.Sequential):
    """Linear, batch norm, leaky ReLU and dropout, twice; then a linear layer to the tasks.

    Args:
        width: d, length of a feature vector; hidden layers have 2 d.
        tasks: T.
        dropout: Share of hidden values dropped in training.
    """

    def __init__(self, width: int, tasks: int, *, dropout: float = 0.5):
        hidden = 2 * width

        def stage(before: int) -> list[nn.Module]:
            return [nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(dropout)]

        super().__init__(*stage(width), *stage(hidden), nn.Linear(hidden, tasks))

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        last = self[-1]
        assert isinstance(last, nn.Linear)
        return last.out_features


def check_training(lr: float, epochs: int, batch_size: int, validation: float, seed: int) -> None:
    """Refuse what a router cannot be trained with.

    Raises:
        BadInput: names the argument.
    """
    check_number("lr", lr, remedy="give 5e-4")
    check_positive(epochs=epochs, batch_size=batch_size)
    if batch_size == 1:
        raise BadInput("batch_size", 1, "is too few for a batch norm", "give 2 or more")
    check_number("validation", validation, zero=True, remedy="give the share of rows to hold out, 0.1")
    if validation >= 1:
        raise BadInput(
            "validation", validation, "is not in [0, 1)", "give the share of rows to hold out, 0.1"
        )
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise BadInput("seed", seed, "is not an integer from 0 to 2**32 - 1", "give such a seed")


def train_router(
    features: Tensor,
    labels: Tensor,
    *,
    tasks: int,
    lr: float = 5e-4,
    epochs: int = 50,
    batch_size: int = 1024,
    validation: float = 0.1,
    seed: int = 0,
) -> tuple[Router, float]:
    """Train by cross-entropy with AdamW, its rate falling along a line, and keep the best epoch.

    Args:
        features: `[N, d]`.
        labels: int64 `[N]`, numbers of tasks.
        tasks: T.
        lr: Learning rate at the start.
        epochs: Passes over the data.
        batch_size: Rows per update; fewer where there are fewer.
        validation: Share of the rows held out to choose the epoch by; 0 keeps the last.
        seed: Of the initial weights, the held-out rows, the order and dropout.

    Returns:
        The router in evaluation mode, and its accuracy on the held-out rows (on all, without any).

    Raises:
        BadInput: fewer than two rows to train on, or arguments out of range.
    """
    check_training(lr, epochs, batch_size, validation, seed)
    order = torch.randperm(len(labels), generator=generator(seed))
    held = order[: int(validation * len(labels))]
    kept = order[len(held) :]
    if len(kept) < 2:
        raise BadInput("inputs_by_task", len(labels), "inputs are too few", "give a hundred or more per task")
    features = features.float()
    with seeded(seed):
        router = Router(features.shape[1], tasks)
    rows = min(batch_size, len(kept))
    data = {"x": features[kept], "y": labels[kept]}
    batches = minibatches(data, rows, seed=seed, drop_last=True)  # batch norm cannot take a batch of one
    per_epoch = len(kept) // rows
    rule = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(rule, 1.0, 0.0, total_iters=epochs * per_epoch)
    chosen = held if len(held) else order
    best, weights = -1.0, router.state_dict()

    def judge(step: int, _: float) -> None:
        nonlocal best, weights
        if step % per_epoch or (not len(held) and step < epochs * per_epoch):
            return
        router.eval()
        with torch.no_grad():
            right = (router(features[chosen]).argmax(-1) == labels[chosen]).float().mean()
        router.train()
        if float(right) > best:
            best = float(right)
            weights = {name: tensor.clone() for name, tensor in router.state_dict().items()}

    loop(
        router, batches, lambda batch: cross_entropy(router(batch["x"]), batch["y"]), optimizer=rule,
        scheduler=schedule, epochs=epochs, seed=seed, on_step=judge,
    )  # fmt: skip
    router.load_state_dict(weights)
    return router.eval().requires_grad_(False), best


def input_batches(
    inputs: Any, tokenizer: Any, most: int, task: str, rows: int = 64
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Positional and keyword arguments for a model, some rows at a time.

    Args:
        inputs: A tensor, tensors by name, texts, or token rows.
        tokenizer: For texts.
        most: Rows taken, from the first on.
        task: What messages call them.
        rows: Per batch.

    Raises:
        BadInput: something else, or texts without a tokenizer.
    """
    where = f"inputs_by_task[{task!r}]"
    columns = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not columns or (isinstance(columns[0], Tensor) and not columns[0].numel()):
        raise BadInput(where, type(inputs).__name__, "holds no inputs", "give a hundred or more")
    if isinstance(inputs, Tensor):
        yield from (((part,), {}) for part in inputs[:most].split(rows))
        return
    if isinstance(inputs, Mapping):
        count = min(most, len(next(iter(inputs.values()))))
        for start in range(0, count, rows):
            yield (), {name: value[start : min(start + rows, count)] for name, value in inputs.items()}
        return
    if isinstance(inputs, str) or not isinstance(inputs, Sequence) or not inputs:
        raise BadInput(
            where, type(inputs).__name__, "are no inputs", "give a tensor, tensors by name, or texts"
        )
    if tokenizer is None and any(isinstance(row, str) for row in inputs):
        raise BadInput("tokenizer", None, "is missing for texts", "pass the base's tokenizer")
    chosen = list(inputs[:most])
    for i, row in enumerate(chosen):
        if not isinstance(row, str) and (not isinstance(row, Mapping) or "input_ids" not in row):
            raise BadInput(
                f"{where}[{i}]", row, "is no text and has no input_ids", "give texts or token rows"
            )
    ids = [tokenizer(row)["input_ids"] if isinstance(row, str) else row["input_ids"] for row in chosen]
    pad = 0 if tokenizer is None else pad_id_of(tokenizer)
    for start in range(0, len(ids), rows):
        padded, mask = pad_batch(ids[start : start + rows], pad)
        yield (), {"input_ids": padded, "attention_mask": mask}


def masked_mean(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens in float32: `[B, N, d]` and a mask `[B, N]` to `[B, d]`; `[B, d]` stays as it is."""
    hidden = hidden.float()
    if hidden.dim() == 2:
        return hidden
    if hidden.dim() > 3:
        hidden = hidden.flatten(2).transpose(1, 2)  # [B, channels, ...]
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


@torch.no_grad()
def encode(model: nn.Module, features: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """A model's features of its inputs, averaged over tokens, float32 `[B, d]`.

    Caches are left alone: the model neither reads nor fills those of the call.

    Args:
        model: Any module.
        features: Module whose output they are; None for a transformers model's last hidden state.
        args: Positional arguments of the model.
        kwargs: The others.

    Raises:
        BadInput: no `features` for a model that has no backbone.
    """
    device = next(model.parameters()).device
    args = tuple(value.to(device) if isinstance(value, Tensor) else _uncached(value) for value in args)
    kwargs = {
        n: value.to(device) if isinstance(value, Tensor) else value
        for n, value in kwargs.items()
        if n not in _OF_CACHES
    }
    mask = kwargs.get("attention_mask")
    if features is not None:
        with taps.capture(model, features) as seen:
            model(*args, **kwargs)
        return masked_mean(seen[features], mask)
    backbone = getattr(model, "base_model", None)
    if backbone is None:
        raise BadInput("features", None, f"is missing for a {type(model).__name__}", "name a module")
    known = inspect.signature(backbone.forward).parameters
    given = {name: value for name, value in kwargs.items() if name in known}
    if (
        "position_ids" in known
        and "position_ids" not in given
        and mask is not None
        and _starts_late(backbone, mask)
    ):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if "use_cache" in known:
        given["use_cache"] = False
    return masked_mean(backbone(*args, **given).last_hidden_state, mask)


def _uncached(value: Any) -> Any:
    return None if hasattr(value, "get_seq_length") else value


def _starts_late(backbone: nn.Module, mask: Tensor) -> bool:
    """Whether rows are padded on the left and the model does not count its positions from the first token itself."""
    if mask.dim() != 2 or bool(mask[:, 0].all()):
        return False
    places = (m for name, m in backbone.named_modules() if name.endswith("position_embeddings"))
    return not any(getattr(place, "padding_idx", None) is not None for place in places)
