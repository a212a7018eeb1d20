"""What `transfuse run` does with a conversion: rows from texts, training, figures before and after, the folder."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from transfuse.core.batches import pad_collator, text_split
from transfuse.core.datasets import file_or_dataset
from transfuse.core.errors import BadInput
from transfuse.core.lineage import amend_lineage, input_hash
from transfuse.core.runs import evaluating
from transfuse.core.training import fit
from transfuse.core.workshop import tell
from transfuse.moe._base import Conversion, save

__all__ = ["learn", "mean_nll"]

TOLD_EVERY = 5.0  # seconds between lines of progress


@torch.no_grad()
def mean_nll(model: Any, rows: list[dict[str, list[int]]], batch_size: int = 4) -> float:
    """Mean negative log-likelihood per labelled token of training rows, in nats; in evaluation mode."""
    device = next(model.parameters()).device
    collate, total, count = pad_collator(0), 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = {k: v.to(device) for k, v in collate(rows[start : start + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def learn(
    model: Any,
    tokenizer: Any,
    *,
    method: Any,
    output: str | os.PathLike[str],
    texts: os.PathLike[str] | None,
    dataset: str | None,
    held_out: os.PathLike[str] | None,
    held_out_dataset: str | None,
    scratch: Path | None,
    seed: int,
    block: int,
    epochs: int,
    max_steps: int | None,
    max_held_out: int,
    options: dict[str, Any],
) -> Path:
    """The body of `moe.transfer`."""
    if not isinstance(method, Conversion):
        raise BadInput("method", type(method).__name__, "is no conversion", "give one, such as FactorLLM()")
    source = file_or_dataset(texts, dataset, "texts")
    held = None
    if held_out is not None or held_out_dataset is not None:
        held = file_or_dataset(held_out, held_out_dataset, "held_out")
    rows, kept = text_split(tokenizer, source, held, block, max_held_out)
    before = mean_nll(model, kept)
    method.convert(model)
    converted = mean_nll(model, kept)
    found = {"perplexity_before": math.exp(before), "perplexity_converted": math.exp(converted)}
    tell(f"held-out perplexity {math.exp(before):.2f}, converted {math.exp(converted):.2f}")
    if max_steps != 0:
        length: dict[str, Any] = {"epochs": epochs} if max_steps is None else {"max_steps": max_steps}
        history = fit(
            model, rows, loss=method.loss, seed=seed, output_dir=scratch, on_step=_Told(), **length, **options
        )
        after = math.exp(mean_nll(model, kept))
        found |= {"perplexity_after": after, "first_loss": history.losses[0], "last_loss": history.losses[-1]}
        found |= {"updates": history.steps, "training_seconds": round(history.seconds, 3)}
        tell(f"held-out perplexity {after:.2f} after {history.steps} updates")
    target = save(model, output, tokenizer=tokenizer, measurements={**found, **method.measurements(model)})
    amend_lineage(
        target, seed=seed, inputs={"texts": str(source)}, input_sha256={"texts": input_hash(source)}
    )
    return target


class _Told:
    """A line of progress on standard error every few seconds."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self, made: int, of: int, loss: float) -> None:
        now = time.perf_counter()
        if now - self.last >= TOLD_EVERY or made == of:
            self.last = now
            tell(f"step {made}/{of}, loss {loss:.4f}")
