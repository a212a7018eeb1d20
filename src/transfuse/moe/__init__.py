"""Mixtures of experts: dense models cut into experts, other ways to route and chain them, where to place them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ._base import Conversion, load, save

_HOMES = {"Conversion": "._base", "load": "._base", "save": "._base"}

__all__ = ["Conversion", "load", "save", "suits", "transfer"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: they import torch
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def suits(target: Any) -> bool:
    """Whether `transfer` runs what a method's name stands for: a conversion."""
    from ._base import Conversion

    return isinstance(target, type) and issubclass(target, Conversion)


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Any,
    output: str | os.PathLike[str],
    texts: os.PathLike[str] | None = None,
    dataset: str | None = None,
    held_out: os.PathLike[str] | None = None,
    held_out_dataset: str | None = None,
    scratch: Path | None = None,
    seed: int = 0,
    block: int = 256,
    lr: float = 4e-5,
    epochs: int = 1,
    max_steps: int | None = None,
    batch_size: int = 4,
    accumulation: int = 1,
    schedule: Literal["constant", "linear", "cosine"] = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 1e-5,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float | None = 1.0,
    max_held_out: int = 100,
    save_every: int | None = 100,
) -> Path:
    """What `transfuse run` does with a conversion: convert the model, train it on texts, measure it, save it.

    The training's defaults are FactorLLM's. Published for Chain-of-Experts: lr 3e-4, a constant schedule, warmup 0.1,
    weight_decay 0.01; for RMoE (large): lr 4.2e-4, warmup 2000, weight_decay 0.1.

    Args:
        model: Converted in place.
        tokenizer: Its tokenizer.
        method: A conversion.
        output: Folder that `transfuse.moe.load` reads.
        texts: File to learn from: plain text, or records with `text` or with `prompt` and `target`.
        dataset: A data set's name in its place (see `transfuse datasets`).
        held_out: File that perplexity is measured on; by default the last twentieth of the rows.
        held_out_dataset: A data set's name in its place.
        scratch: Folder of the checkpoints from which an interrupted run goes on.
        seed: Of the data order and of dropout.
        block: Tokens per row of plain text.
        lr: Peak learning rate of AdamW.
        epochs: Passes over the rows.
        max_steps: Updates to make, in place of `epochs`; 0 converts and trains nothing.
        batch_size: Rows per batch.
        accumulation: Batches per update.
        schedule: Learning rate after warm-up.
        warmup: Updates of linear warm-up; below 1, a share of all.
        weight_decay: Decoupled.
        betas: AdamW's.
        clip: Largest norm of the gradient; None for no clipping.
        max_held_out: Most rows that perplexity is measured on.
        save_every: Updates between checkpoints; None writes one at the end only.
    """
    from ._transfer import learn

    options = {
        "lr": lr, "batch_size": batch_size, "accumulation": accumulation, "schedule": schedule,
        "warmup": warmup, "weight_decay": weight_decay, "betas": betas, "clip": clip, "save_every": save_every,
    }  # fmt: skip
    return learn(
        model, tokenizer, method=method, output=output, texts=texts, dataset=dataset, held_out=held_out,
        held_out_dataset=held_out_dataset, scratch=scratch, seed=seed, block=block, epochs=epochs,
        max_steps=max_steps, max_held_out=max_held_out, options=options,
    )  # fmt: skip
