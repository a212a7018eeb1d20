"""Adapters: tuners that `peft.get_peft_model` accepts; prompts and masks for networks of other kinds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ._kinds import suits

__all__ = ["suits", "transfer"]

RUNS = "PeftModel"  # what a function must return for `transfer` to run it


def __getattr__(name: str) -> Any:
    if name == "suits":
        from ._kinds import suits

        return suits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    facts: str | os.PathLike[str],
    method: Callable[..., Any],
    output: str | os.PathLike[str],
    scratch: Path | None = None,
    seed: int = 0,
    paraphrases: bool = True,
    lr: float = 4e-4,
    epochs: int = 10,
    batch_size: int = 8,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    save_every: int | None = None,
) -> Path:
    """What `transfuse run` does with an adapter: train it on facts, save it as a folder PEFT loads.

    Args:
        model: Gets the adapter, and keeps it.
        tokenizer: Its tokenizer.
        facts: File of facts; the loss is on the targets' tokens.
        method: Takes the model and returns it with an adapter; its module has a `save`.
        output: Folder of the adapter; replaced at once.
        scratch: Folder of the checkpoints from which an interrupted training goes on.
        seed: Of the data order and of dropout.
        paraphrases: Train on the facts' paraphrases as well as on their prompts.
        lr: Peak learning rate; it falls along a line.
        epochs: Passes over the examples.
        batch_size: Examples per update.
        weight_decay: Decoupled.
        warmup: Updates of linear warm-up; below 1, a share of all.
        save_every: Updates between checkpoints; None writes one at the end only.
    """
    import sys

    from ..core.data import read_facts
    from ..core.generate import target_matches
    from ..core.lineage import amend_lineage, input_hash
    from ..core.training import encode_examples, fit, pad_collator

    learnt = read_facts(facts)
    pairs = [
        (prompt, fact.target)
        for fact in learnt
        for prompt in (fact.prompt, *(fact.paraphrases if paraphrases else ()))
    ]
    home = sys.modules[getattr(method, "func", method).__module__]
    collator = getattr(home, "collator", pad_collator)(tokenizer)  # some methods' batches hold more
    adapted = method(model)
    history = fit(
        adapted, encode_examples(tokenizer, pairs), lr=lr, epochs=epochs, batch_size=batch_size,
        weight_decay=weight_decay, warmup=warmup, seed=seed, collator=collator, output_dir=scratch,
        save_every=save_every,
    )  # fmt: skip
    hits = target_matches(adapted, tokenizer, [f.prompt for f in learnt], [f.target for f in learnt])
    target: Path = home.save(adapted, output)
    amend_lineage(
        target,
        inputs={"facts": str(facts)},
        input_sha256={"facts": input_hash(facts)},
        measurements={
            "first_loss": history.losses[0],
            "last_loss": history.losses[-1],
            "updates": history.steps,
            "prompt_recall": sum(bool(hit.all()) for hit in hits) / len(hits),
        },
    )
    return target
