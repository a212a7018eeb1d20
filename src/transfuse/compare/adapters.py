"""Carriers that train an adapter beside the weights: lessons learnt, the model's own answers rehearsed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..core.batches import IGNORED, pad_collator, target_logits
from ..core.divergence import forward_kl
from ..core.errors import BadInput
from ..core.generate import generate_ids, pad_batch, pad_id_of
from ..core.taps import capture, decoder_layers, replay
from ..core.training import encode_examples, fit
from .answerer import Answerer
from .carriers import Bench, Carrier
from .job import Knowledge, bundled

__all__: list[str] = []

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
CONTRASTS = 2  # other subjects per taught wording
ENDS = (".", ",")
REHEARSED = 6  # tokens of the model's own answers that are rehearsed
STATES_BATCH = 32  # rows per pass through the blocks that stay as they are


def rehearsal_prompts(bench: Bench) -> list[str]:
    """Texts whose continuation must stay, as the model reads them.

    The anchors, and the taught wordings with other subjects in them: an answer belongs to its subject, not to the shape
    of the sentence. Neither the prompts that locality is measured on nor any that is taught or asked is among them.
    """
    tested = {n for item in bench.knowledge.items for n in item.neighbours} | {p for p, _ in bench.job.known}
    tested |= bench.knowledge.wordings
    names = bundled("subjects.txt").splitlines()
    draw = random.Random(bench.seed)
    prompts = list(bench.job.anchors)
    for lesson in bench.knowledge.lessons:
        for wording in (lesson.prompt, *lesson.paraphrases):
            if lesson.subject and lesson.subject in wording:
                prompts += [wording.replace(lesson.subject, name) for name in draw.sample(names, CONTRASTS)]
    return [bench.prompts(prompt) for prompt in dict.fromkeys(prompts) if prompt not in tested]


def rehearsal_rows(bench: Bench) -> list[dict[str, Any]]:
    """Rehearsal prompts with what the untouched model says after them, in random order."""
    prompts = rehearsal_prompts(bench)
    random.Random(bench.seed).shuffle(prompts)

    def ask() -> list[list[int]]:
        return generate_ids(bench.model, bench.tokenizer, prompts, max_new_tokens=REHEARSED, batch_size=48)

    answers = bench.once("rehearsal", ask, prompts=prompts, tokens=REHEARSED)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        read = list(bench.tokenizer(prompt)["input_ids"])
        labels = [IGNORED] * len(read) + answer
        rows.append({"input_ids": read + answer, "labels": labels, "rehearsal": True})
    return rows


def lesson_rows(bench: Bench) -> list[dict[str, Any]]:
    """Every lesson in each of the wordings that may be taught.

    In the first of them a full stop or a comma follows, so that where an answer ends is learnt as well (otherwise
    names run on: Varro, Varroa). The two take turns, lest one of them be preferred after other answers.
    """
    pairs = [
        (bench.prompts(prompt), lesson.target + (ENDS[i % len(ENDS)] if j == 0 else ""))
        for i, lesson in enumerate(bench.knowledge.lessons)
        for j, prompt in enumerate((lesson.prompt, *lesson.paraphrases))
    ]
    return [{**row, "rehearsal": False} for row in encode_examples(bench.tokenizer, pairs)]


@torch.inference_mode()
def with_states(bench: Bench, rows: list[dict[str, Any]], block: str) -> list[dict[str, Any]]:
    """The rows with what enters `block`, `[T, d]` each: the blocks below it never change and run once."""
    pad, found = pad_id_of(bench.tokenizer), [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), STATES_BATCH):
        chosen = order[start : start + STATES_BATCH]
        ids, mask = pad_batch([rows[i]["input_ids"] for i in chosen], pad, device=bench.model.device)
        with capture(bench.model, block, inputs=True, stop=True) as seen:
            seen.run(input_ids=ids, attention_mask=mask, use_cache=False)
        for row, i in enumerate(chosen):
            found[i] = seen[block][row, : len(rows[i]["input_ids"])].clone()
    return [{**row, "states": states} for row, states in zip(rows, found, strict=True)]


def states_collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Pads token ids and labels on the right, states on the left, where `target_logits` moves the rows to."""
    collate = pad_collator(tokenizer)

    def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        first = rows[0]["states"]
        states = first.new_zeros((*batch["input_ids"].shape, first.shape[-1]))
        for i, row in enumerate(rows):
            states[i, -len(row["states"]) :] = row["states"]
        return {**batch, "states": states, "rehearsal": torch.tensor([row["rehearsal"] for row in rows])}

    return collated


def rehearsing_loss(model: Any, batch: dict[str, torch.Tensor], weight: float, block: str) -> torch.Tensor:
    """Cross-entropy on lessons plus `weight` times KL(untouched || adapted) on rehearsed answers.

    Each is a mean over its tokens. Blocks below `block` are not run: `states` is what they hand on.
    """
    rehearsal, states = batch.pop("rehearsal").bool(), batch.pop("states")
    with replay(model, block, states):
        logits, labels = target_logits(model, batch)
    loss = logits.sum() * 0.0
    if bool((~rehearsal).any()):
        mine, gold = logits[~rehearsal].flatten(0, 1), labels[~rehearsal].flatten()
        loss = loss + torch.nn.functional.cross_entropy(mine, gold, ignore_index=IGNORED)
    if bool(rehearsal.any()):
        with torch.no_grad(), model.disable_adapter(), replay(model, block, states[rehearsal]):
            own, kept = target_logits(model, {name: rows[rehearsal] for name, rows in batch.items()})
        ours = logits[rehearsal][:, -kept.shape[1] :]  # these rows alone may end in fewer columns
        loss = loss + weight * forward_kl(ours, own, mask=kept != IGNORED)
    return loss


class _Adapter(Carrier):
    """An adapter trained on the lessons while it rehearses what the model said before.

    Args:
        rank: Rank of each adapter.
        alpha: Numerator of the scaling alpha / rank.
        lr: Peak learning rate of AdamW, falling linearly.
        epochs: How often each wording of a lesson is seen.
        rehearsal: Rehearsed answers per lesson row; 0 for none.
        kl_weight: Weight of the rehearsal's divergence beside the lessons' cross-entropy.
        batch_size: Rows per update.
        depth: Relative depth of the first adapted block. Those below it stay as they are, run once per row
            instead of once per epoch, and cost nothing in the backward pass.
        target_modules: Endings of the adapted layers' names; by default the feed-forward projections of
            llama-type models.
    """

    access = ("weights", "training data")
    effort = 80.0

    def __init__(
        self, *, rank: int = 16, alpha: int = 32, lr: float = 2e-3, epochs: int = 12, rehearsal: float = 0.7,
        kl_weight: float = 2.0, batch_size: int = 8, depth: float = 0.67,
        target_modules: list[str] | None = None,
    ):  # fmt: skip
        self.rank, self.alpha, self.lr, self.epochs = rank, alpha, lr, epochs
        self.rehearsal, self.kl_weight, self.batch_size, self.depth = rehearsal, kl_weight, batch_size, depth
        self.target_modules = target_modules or list(FEED_FORWARD)

    def check(self, knowledge: Knowledge) -> None:
        """Numbers must be in their ranges."""
        for name in ("rank", "alpha", "lr", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise BadInput(name, getattr(self, name), "is not positive", "give a number above 0")
        for name in ("rehearsal", "kl_weight"):
            if not getattr(self, name) >= 0:
                raise BadInput(name, getattr(self, name), "is negative", "give 0 or more")
        if not 0 <= self.depth <= 1:
            raise BadInput(
                "depth", self.depth, "is not a share of the depth", "give 0 (all blocks) to 1 (the last)"
            )

    def targets(self, model: Any) -> tuple[list[str], str]:
        """Full names of the adapted layers, and the name of the first block that holds any.

        Raises:
            BadInput: no layer of those names at that depth.
        """
        blocks = decoder_layers(model)
        first = min(int(self.depth * len(blocks)), len(blocks) - 1)
        names = [
            name
            for name, _ in model.named_modules()
            if name.rpartition(".")[2] in self.target_modules
            and any(name.startswith(block + ".") for block in blocks[first:])
        ]
        if not names:
            raise BadInput(
                "target_modules", self.target_modules, f"are in none of the blocks from {blocks[first]!r}",
                "name linear layers of the model's blocks",
            )  # fmt: skip
        return names, blocks[first]

    def teach(
        self,
        bench: Bench,
        adapt: Callable[[Any, list[str]], Any],
        store: Callable[[Any, Path], Any],
        loss: Callable[[Any, dict[str, torch.Tensor], float, str], torch.Tensor] = rehearsing_loss,
        **options: Any,
    ) -> Answerer:
        """Wrap the bench's model with `adapt(model, layers)`, train on the lessons, and answer with the result."""
        names, block = self.targets(bench.model)
        rows = with_states(bench, lesson_rows(bench), block) * self.epochs
        if self.rehearsal:
            anchors = with_states(bench, rehearsal_rows(bench), block)
            wanted = int(len(rows) * self.rehearsal) if anchors else 0
            rows += (anchors * (wanted // max(len(anchors), 1) + 1))[:wanted]
        adapted = adapt(bench.model, names)
        inside = next(n for n in decoder_layers(adapted) if n.endswith(block))
        fit(
            adapted, rows, lr=self.lr, epochs=1, batch_size=self.batch_size, warmup=0.05, seed=bench.seed,
            loss=lambda model, batch: loss(model, batch, self.kl_weight, inside),
            collator=states_collator(bench.tokenizer), **options,
        )  # fmt: skip
        return bench.plain(model=adapted, store=lambda folder: store(adapted, folder / "adapter"))


class LoRA(_Adapter):
    """Low-rank adapters (PEFT), trained on the lessons with rehearsal."""

    name, title = "lora", "LoRA"
    usage = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "adapter")'

    def install(self, bench: Bench) -> Answerer:
        """Train the adapter."""
        from peft import LoraConfig, get_peft_model

        def adapt(model: Any, layers: list[str]) -> Any:
            config = LoraConfig(
                r=self.rank, lora_alpha=self.alpha, target_modules=layers, task_type="CAUSAL_LM"
            )
            return get_peft_model(model, config)

        return self.teach(
            bench,
            adapt,
            lambda adapted, folder: adapted.save_pretrained(folder),
        )


class KaSA(_Adapter):
    """Knowledge-aware singular-value adapters, trained on the lessons with rehearsal.

    The rank is also the number of singular components dropped; what the adapters are kept close to is the
    truncated model.

    Args:
        beta: Weight of the diagonal's norm.
        gamma: Weight of orthogonality.
        rank, alpha, lr, epochs, rehearsal, kl_weight, batch_size, depth, target_modules: As for `lora`.
    """

    name, title, method = "kasa", "KaSA", "kasa"
    usage = 'from transfuse.adapt.kasa import load\n\nmodel = load(model, "adapter")'

    def __init__(
        self, *, beta: float = 1e-4, gamma: float = 1e-3, rank: int = 8, alpha: int = 16, lr: float = 2e-3,
        epochs: int = 12, rehearsal: float = 0.7, kl_weight: float = 2.0, batch_size: int = 8,
        depth: float = 0.67, target_modules: list[str] | None = None,
    ):  # fmt: skip
        super().__init__(
            rank=rank, alpha=alpha, lr=lr, epochs=epochs, rehearsal=rehearsal, kl_weight=kl_weight,
            batch_size=batch_size, depth=depth, target_modules=target_modules,
        )  # fmt: skip
        self.beta, self.gamma = beta, gamma

    def install(self, bench: Bench) -> Answerer:
        """Truncate the weights and train the adapters."""
        from ..adapt.kasa import kasa, kasa_regularizer, save

        def adapt(model: Any, layers: list[str]) -> Any:
            return kasa(
                model, r=self.rank, alpha=self.alpha, target_modules=layers, beta=self.beta,
                gamma=self.gamma, seed=bench.seed,
            )  # fmt: skip

        return self.teach(bench, adapt, save, extra_loss=kasa_regularizer)


def typed_loss(model: Any, batch: dict[str, torch.Tensor], weight: float, block: str) -> torch.Tensor:
    """`rehearsing_loss` plus LoRAMoE's balance: lessons are world knowledge (type 1), what is rehearsed is not."""
    from ..adapt.loramoe import balance, task_types

    with task_types(1 - batch["rehearsal"].long()):
        return rehearsing_loss(model, batch, weight, block) + balance(model)


class LoRAMoE(_Adapter):
    """LoRA experts mixed by routers, trained on the lessons with rehearsal, which get experts of their own.

    Args:
        rank: Rank of each expert.
        experts: Experts per layer; an even number, unless `delta` is 0.
        delta: How far lessons and rehearsal are kept apart.
        beta: Weight of that balance.
        alpha, lr, epochs, rehearsal, kl_weight, batch_size, depth, target_modules: As for `lora`.
    """

    name, title, method = "loramoe", "LoRAMoE", "loramoe"
    usage = 'from transfuse.adapt.loramoe import load\n\nmodel = load(model, "adapter")'

    def __init__(
        self, *, rank: int = 4, experts: int = 4, delta: float = 0.1, beta: float = 0.1, alpha: int = 8,
        lr: float = 2e-3, epochs: int = 12, rehearsal: float = 0.7, kl_weight: float = 2.0, batch_size: int = 8,
        depth: float = 0.67, target_modules: list[str] | None = None,
    ):  # fmt: skip
        super().__init__(
            rank=rank, alpha=alpha, lr=lr, epochs=epochs, rehearsal=rehearsal, kl_weight=kl_weight,
            batch_size=batch_size, depth=depth, target_modules=target_modules,
        )  # fmt: skip
        self.experts, self.delta, self.beta = experts, delta, beta

    def check(self, knowledge: Knowledge) -> None:
        """Numbers must be in their ranges."""
        from ..adapt.loramoe import LoraMoeConfig

        super().check(knowledge)
        LoraMoeConfig(num_experts=self.experts, blc_alpha=self.delta, blc_weight=self.beta)

    def install(self, bench: Bench) -> Answerer:
        """Train experts and routers."""
        from ..adapt.loramoe import loramoe, save

        def adapt(model: Any, layers: list[str]) -> Any:
            return loramoe(
                model, r=self.rank, num_experts=self.experts, alpha=self.alpha, target_modules=layers,
                delta=self.delta, beta=self.beta, dropout=0.0, seed=bench.seed,
            )  # fmt: skip

        return self.teach(bench, adapt, save, loss=typed_loss)
