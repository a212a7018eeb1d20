"""Distillation: what a teacher knows moved into a student's weights, by objectives on one trainer."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..core.pruning import layer_map, prune
    from ._base import Objective, Signal, TokenObjective
    from ._distiller import Distiller
    from ._policy import AdaptivePolicy, Policy
    from ._store import LogitStore

_HOMES = {
    "AdaptivePolicy": "._policy",
    "Distiller": "._distiller",
    "LogitStore": "._store",
    "Objective": "._base",
    "Policy": "._policy",
    "Signal": "._base",
    "TokenObjective": "._base",
    "layer_map": "..core.pruning",
    "prune": "..core.pruning",
}

__all__ = [
    "AdaptivePolicy",
    "Distiller",
    "LogitStore",
    "Objective",
    "Policy",
    "Signal",
    "TokenObjective",
    "layer_map",
    "prune",
    "suits",
    "transfer",
    "vet",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: they import torch
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def suits(target: Any) -> bool:
    """Whether `transfer` runs what a method's name stands for: an objective, or a function that makes one."""
    from ._base import Objective

    if isinstance(target, type):
        return issubclass(target, Objective)
    return "Objective" in str(getattr(target, "__annotations__", {}).get("return", ""))


def vet(target: Any, arguments: dict[str, Any], where: str) -> None:
    """Check a recipe's arguments of an objective that it takes by name; see `_recipes`."""
    from ._recipes import check_objective
    from .survey_kd_llm import survey_kd_llm

    if target is survey_kd_llm:
        check_objective(arguments, where)


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
    teacher: str | None = None,
    scratch: Path | None = None,
    seed: int = 0,
    block: int = 256,
    lr: float = 1e-4,
    epochs: int = 1,
    max_steps: int | None = None,
    batch_size: int = 4,
    accumulation: int = 1,
    schedule: Literal["constant", "linear", "cosine"] = "cosine",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    on_policy: float = 0.0,
    stored_top_k: int | None = None,
    align_vocab: Literal["refuse", "truncate"] = "refuse",
    max_held_out: int = 200,
    save_every: int | None = 100,
) -> Path:
    """What `transfuse run` does with an objective: train the student, measure it before and after, save it.

    Args:
        model: The student; a recipe names it under `student`, also as `{prune: smollm2-135m, layers: 10}`.
        tokenizer: Its tokenizer.
        method: An objective.
        output: Folder that `from_pretrained` loads.
        texts: File to learn from: plain text, or records with `text` or with `prompt` and `target`.
        dataset: A data set's name in its place (see `transfuse datasets`).
        held_out: File that perplexity is measured on; by default the last twentieth of the rows.
        held_out_dataset: A data set's name in its place.
        teacher: The teacher, as `transfuse.load` takes it.
        scratch: Folder of the checkpoints from which an interrupted run goes on.
        seed: Of the data order, dropout and sampling.
        block: Tokens per row of plain text.
        lr: Peak learning rate of AdamW.
        epochs: Passes over the rows.
        max_steps: Updates to make, in place of `epochs`.
        batch_size: Rows per batch and process.
        accumulation: Batches per update.
        schedule: Learning rate after warm-up.
        warmup: Updates of linear warm-up; below 1, a share of all.
        weight_decay: Decoupled.
        clip: Largest norm of the gradient; None for no clipping.
        on_policy: Probability that a batch becomes the student's own samples (GKD).
        stored_top_k: Run the teacher once, store its top k per token on disk, and train from there.
        align_vocab: "truncate" where the vocabularies differ by padding rows only.
        max_held_out: Most rows that perplexity is measured on.
        save_every: Updates between checkpoints; None writes one at the end only.
    """
    from ._transfer import distil

    names = (
        "block", "lr", "epochs", "max_steps", "batch_size", "accumulation", "schedule", "warmup", "weight_decay",
        "clip", "on_policy", "stored_top_k", "align_vocab", "max_held_out", "save_every",
    )  # fmt: skip
    given = locals()
    return distil(
        model, tokenizer, method=method, output=output, texts=texts, dataset=dataset, held_out=held_out,
        held_out_dataset=held_out_dataset, teacher=teacher, scratch=scratch, seed=seed,
        options={name: given[name] for name in names},
    )  # fmt: skip
