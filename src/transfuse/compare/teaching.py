"""Carriers that change or extend weights: adapters, document adapters, editors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.batches import IGNORED, pad_collator, target_logits
from ..core.divergence import forward_kl
from ..core.generate import generate_texts
from ..core.training import encode_examples, fit
from .answerer import Answerer
from .carriers import Bench, Carrier

__all__: list[str] = []

REHEARSED = 8  # tokens of the model's own answers that are rehearsed


def rehearsal_rows(bench: Bench) -> list[dict[str, Any]]:
    """Anchors with the answers the untouched model gives to them, marked as rehearsal.

    Anchors are prompts about other things; none of the prompts that locality is measured on is among them.
    """
    tested = {n for item in bench.knowledge.items for n in item.neighbours} | {p for p, _ in bench.job.known}
    prompts = [bench.prompts(anchor) for anchor in bench.job.anchors if anchor not in tested]
    answers = generate_texts(bench.model, bench.tokenizer, prompts, max_new_tokens=REHEARSED, batch_size=48)
    own = [(p, a) for p, a in zip(prompts, answers, strict=True) if a.strip()]
    return [{**row, "rehearsal": True} for row in encode_examples(bench.tokenizer, own)]


def lesson_rows(bench: Bench) -> list[dict[str, Any]]:
    """Every lesson in each of the wordings that may be taught."""
    pairs = [
        (bench.prompts(prompt), lesson.target)
        for lesson in bench.knowledge.lessons
        for prompt in (lesson.prompt, *lesson.paraphrases)
    ]
    return [{**row, "rehearsal": False} for row in encode_examples(bench.tokenizer, pairs)]


def rehearsing_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy on lessons plus KL(untouched || adapted) on rehearsed answers, each a mean over its tokens."""
    rehearsal = batch.pop("rehearsal").bool()
    logits, labels = target_logits(model, batch)
    loss = logits.sum() * 0.0
    if bool((~rehearsal).any()):
        mine, gold = logits[~rehearsal].flatten(0, 1), labels[~rehearsal].flatten()
        loss = loss + torch.nn.functional.cross_entropy(mine, gold, ignore_index=IGNORED)
    if bool(rehearsal.any()):
        with torch.no_grad(), model.disable_adapter():
            own, _ = target_logits(model, batch)
        keep = labels[rehearsal] != IGNORED
        loss = loss + forward_kl(logits[rehearsal], own[rehearsal], mask=keep)
    return loss


class _Adapter(Carrier):
    """An adapter trained on the lessons while it rehearses what the model said before."""

    access = ("weights", "training data")
    effort = 60.0

    def __init__(
        self, *, rank: int, alpha: int, lr: float, epochs: int, rehearsal: float, batch_size: int,
        target_modules: str | list[str],
    ):  # fmt: skip
        self.rank, self.alpha, self.lr, self.epochs = rank, alpha, lr, epochs
        self.rehearsal, self.batch_size, self.target_modules = rehearsal, batch_size, target_modules

    def teach(self, bench: Bench, adapt: Callable[[Any], Any], **options: Any) -> Answerer:
        """Wrap the bench's model with `adapt`, train on the lessons, and answer with the result."""
        lessons = lesson_rows(bench)
        rows = lessons * self.epochs
        if self.rehearsal:
            anchors = rehearsal_rows(bench)
            wanted = int(len(rows) * self.rehearsal)
            rows += (anchors * (wanted // len(anchors) + 1))[:wanted]
        collate = pad_collator(bench.tokenizer)
        adapted = adapt(bench.model)
        fit(
            adapted, rows, lr=self.lr, epochs=1, batch_size=self.batch_size, warmup=0.05, seed=bench.seed,
            loss=rehearsing_loss,
            collator=lambda batch: {**collate(batch), "rehearsal": torch.tensor([r["rehearsal"] for r in batch])},
            **options,
        )  # fmt: skip
        return bench.plain(model=adapted, store=lambda folder: adapted.save_pretrained(folder))


class LoRA(_Adapter):
    """Low-rank adapters (PEFT), trained on the lessons with rehearsal.

    Args:
        rank: Rank of each adapter.
        alpha: Numerator of the scaling alpha / rank.
        lr: Peak learning rate of AdamW, falling linearly.
        epochs: How often each wording of a lesson is seen.
        rehearsal: Rehearsed answers per lesson row; 0 for none.
        batch_size: Rows per update.
        target_modules: What PEFT adapts.
    """

    name, title = "lora", "LoRA"

    def __init__(
        self, *, rank: int = 16, alpha: int = 32, lr: float = 3e-4, epochs: int = 10, rehearsal: float = 0.5,
        batch_size: int = 12, target_modules: str | list[str] = "all-linear",
    ):  # fmt: skip
        super().__init__(
            rank=rank, alpha=alpha, lr=lr, epochs=epochs, rehearsal=rehearsal, batch_size=batch_size,
            target_modules=target_modules,
        )  # fmt: skip

    def install(self, bench: Bench) -> Answerer:
        """Train the adapter."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules, task_type="CAUSAL_LM"
        )
        return self.teach(bench, lambda model: get_peft_model(model, config))
