"""Carriers that change or extend weights: adapters, document adapters, editors."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..core.batches import IGNORED, pad_collator, target_logits
from ..core.data import Fact
from ..core.divergence import forward_kl
from ..core.errors import BadInput, NotApplicable
from ..core.generate import generate_texts, predicted_tokens
from ..core.training import encode_examples, fit
from .answerer import Answerer, Plain
from .carriers import Bench, Carrier, write_documents
from .job import Knowledge, bundled

__all__: list[str] = []

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
CONTRASTS = 3  # other subjects per taught wording
REHEARSED = 6  # tokens of the model's own answers that are rehearsed


def rehearsal_prompts(bench: Bench) -> list[str]:
    """Prompts whose answers must stay: the anchors, and the taught wordings with other subjects in them.

    The second kind teaches that an answer belongs to its subject, not to the shape of the sentence. None of the
    prompts that locality is measured on is among them.
    """
    tested = {n for item in bench.knowledge.items for n in item.neighbours} | {p for p, _ in bench.job.known}
    names = bundled("subjects.txt").splitlines()
    draw = random.Random(bench.seed)
    prompts = list(bench.job.anchors)
    for lesson in bench.knowledge.lessons:
        for wording in (lesson.prompt, *lesson.paraphrases):
            if lesson.subject and lesson.subject in wording:
                prompts += [wording.replace(lesson.subject, name) for name in draw.sample(names, CONTRASTS)]
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in tested]


def rehearsal_rows(bench: Bench) -> list[dict[str, Any]]:
    """Rehearsal prompts with the answers the untouched model gives to them, in random order."""
    prompts = [bench.prompts(prompt) for prompt in rehearsal_prompts(bench)]
    random.Random(bench.seed).shuffle(prompts)
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


def rehearsing_loss(model: Any, batch: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
    """Cross-entropy on lessons plus `weight` times KL(untouched || adapted) on rehearsed answers.

    Each is a mean over its tokens.
    """
    rehearsal = batch.pop("rehearsal").bool()
    logits, labels = target_logits(model, batch)
    loss = logits.sum() * 0.0
    if bool((~rehearsal).any()):
        mine, gold = logits[~rehearsal].flatten(0, 1), labels[~rehearsal].flatten()
        loss = loss + torch.nn.functional.cross_entropy(mine, gold, ignore_index=IGNORED)
    if bool(rehearsal.any()):
        with torch.no_grad(), model.disable_adapter():
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
        target_modules: Endings of the adapted layers' names; by default the feed-forward projections of
            llama-type models.
    """

    access = ("weights", "training data")
    effort = 60.0

    def __init__(
        self, *, rank: int = 16, alpha: int = 32, lr: float = 2e-3, epochs: int = 12, rehearsal: float = 0.7,
        kl_weight: float = 2.0, batch_size: int = 12, target_modules: list[str] | None = None,
    ):  # fmt: skip
        self.rank, self.alpha, self.lr, self.epochs = rank, alpha, lr, epochs
        self.rehearsal, self.kl_weight, self.batch_size = rehearsal, kl_weight, batch_size
        self.target_modules = target_modules or list(FEED_FORWARD)

    def teach(
        self, bench: Bench, adapt: Callable[[Any], Any], store: Callable[[Any, Path], Any], **options: Any
    ) -> Answerer:
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
            loss=lambda model, batch: rehearsing_loss(model, batch, self.kl_weight),
            collator=lambda batch: {**collate(batch), "rehearsal": torch.tensor([r["rehearsal"] for r in batch])},
            **options,
        )  # fmt: skip
        return bench.plain(model=adapted, store=lambda folder: store(adapted, folder / "adapter"))


class LoRA(_Adapter):
    """Low-rank adapters (PEFT), trained on the lessons with rehearsal."""

    name, title = "lora", "LoRA"

    def install(self, bench: Bench) -> Answerer:
        """Train the adapter."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=self.target_modules, task_type="CAUSAL_LM"
        )
        return self.teach(
            bench,
            lambda model: get_peft_model(model, config),
            lambda adapted, folder: adapted.save_pretrained(folder),
        )


class KaSA(_Adapter):
    """Knowledge-aware singular-value adapters, trained on the lessons with rehearsal.

    The rank is also the number of singular components dropped; what the adapters are kept close to is the
    truncated model.

    Args:
        beta: Weight of the diagonal's norm.
        gamma: Weight of orthogonality.
        rank, alpha, lr, epochs, rehearsal, kl_weight, batch_size, target_modules: As for `lora`.
    """

    name, title, method = "kasa", "KaSA", "kasa"

    def __init__(
        self, *, beta: float = 1e-4, gamma: float = 1e-3, rank: int = 8, alpha: int = 16, lr: float = 2e-3,
        epochs: int = 12, rehearsal: float = 0.7, kl_weight: float = 2.0, batch_size: int = 12,
        target_modules: list[str] | None = None,
    ):  # fmt: skip
        super().__init__(
            rank=rank, alpha=alpha, lr=lr, epochs=epochs, rehearsal=rehearsal, kl_weight=kl_weight,
            batch_size=batch_size, target_modules=target_modules,
        )  # fmt: skip
        self.beta, self.gamma = beta, gamma

    def install(self, bench: Bench) -> Answerer:
        """Truncate the weights and train the adapters."""
        from ..adapt.kasa import kasa, kasa_regularizer, save

        def adapt(model: Any) -> Any:
            return kasa(
                model, r=self.rank, alpha=self.alpha, target_modules=self.target_modules, beta=self.beta,
                gamma=self.gamma, seed=bench.seed,
            )  # fmt: skip

        return self.teach(bench, adapt, save, extra_loss=kasa_regularizer)


class _ParametricRAG(Carrier):
    """Document adapters, merged for the documents a prompt retrieves."""

    access = ("weights", "training data")
    method = "parametric-rag"
    effort = 45.0
    mode: ClassVar[Literal["parametric", "combine"]]

    def __init__(self, *, k: int = 1, rank: int = 2, alpha: float = 32.0, lr: float = 3e-4, epochs: int = 6):
        self.k, self.rank, self.alpha, self.lr, self.epochs = k, rank, alpha, lr, epochs

    def check(self, knowledge: Knowledge) -> None:
        """Every document must have a lesson to be learnt from."""
        taught = {item.document for item in knowledge.items}
        for document in knowledge.documents:
            if document.id not in taught:
                raise NotApplicable(
                    self.name,
                    document.id,
                    "is a document no question is about",
                    "add a question or leave it out",
                )
        if not 1 <= self.k <= len(knowledge.documents):
            raise BadInput(
                "k", self.k, f"does not fit {len(knowledge.documents)} documents", "use 1 up to that many"
            )

    def install(self, bench: Bench) -> Answerer:
        """Train one adapter per document, unless the other mode's run has left them."""
        from ..core.files import sha256_json
        from ..core.retrieval import BM25
        from ..inject.parametric_rag import DocumentParameterizer, Given, ParametricRAG, Triple

        triples: dict[str, list[Any]] = {}
        for lesson in bench.knowledge.lessons:
            for wording in (lesson.prompt, *lesson.paraphrases):
                triples.setdefault(str(lesson.document), []).append(Triple(wording, lesson.target))

        def render(prompt: str, passages: Any) -> str:
            return bench.prompts(prompt, "\n".join(passages) or None)

        encoder = DocumentParameterizer(
            bench.model, bench.tokenizer, Given(triples), rank=self.rank, alpha=self.alpha, lr=self.lr,
            epochs=self.epochs, render=render, seed=bench.seed,
        )  # fmt: skip
        settings = [self.rank, self.alpha, self.lr, self.epochs, bench.job.settings]
        folder = bench.workshop(f"parametric-rag-{sha256_json(settings)[:12]}")
        store = encoder.encode(bench.knowledge.documents, folder / "adapters")
        index = BM25(bench.knowledge.documents)
        rag = ParametricRAG(
            bench.model, index, store, bench.tokenizer, mode=self.mode, k=self.k, render=render
        )
        return _Merged(bench, rag, folder / "adapters")


class ParametricOwn(_ParametricRAG):
    """Documents as adapters, the prompt alone."""

    name, title, mode = "parametric-rag", "Parametric RAG", "parametric"


class ParametricCombine(_ParametricRAG):
    """Documents as adapters and in the prompt."""

    name, title, mode, uses_context = "parametric-rag-combine", "Parametric RAG + context", "combine", True


class _Merged(Plain):
    """Answers under the adapters of the documents that each prompt retrieves."""

    def __init__(self, bench: Bench, rag: Any, folder: Path):
        def store(target: Path) -> None:
            shutil.copytree(folder, target / "adapters")
            write_documents(target, bench.knowledge.documents)

        def render(prompt: str) -> str:
            hits = rag.retrieve([prompt])[0]
            shown = "\n".join(hit.document.text for hit in hits) if rag.mode == "combine" else None
            return bench.prompts(prompt, shown)

        super().__init__(bench.model, bench.tokenizer, render, store)
        self.rag = rag

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [answer.text for answer in self.rag.answers(list(prompts), max_new_tokens=max_new_tokens)]

    def predictions(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[torch.Tensor]:
        def follow(rendered: Sequence[str], places: Sequence[int]) -> list[torch.Tensor]:
            return predicted_tokens(self.model, self.tokenizer, rendered, [continuations[i] for i in places])

        found: list[torch.Tensor] = self.rag.measure(list(prompts), follow)
        return found

    def perplexity(self, text: str) -> float:
        """With the adapters that the text itself retrieves."""
        inner = super().perplexity
        found: list[float] = self.rag.measure([text], lambda rendered, places: [inner(text)])
        return found[0]


class _Edited(Carrier):
    """Facts written by an editor.

    Args:
        wordings: Also write the wordings that may be taught, each as a request of its own.
        settings: The editor's hyperparameters.
    """

    access = ("weights",)
    effort = 30.0
    mode: ClassVar[Literal["batch", "sequential"]] = "batch"

    def __init__(self, *, wordings: bool = False, settings: dict[str, Any] | None = None):
        self.wordings, self.settings = wordings, settings or {}

    def check(self, knowledge: Knowledge) -> None:
        """Editors need subjects, and hyperparameters they know."""
        from ..edit import editor

        if any(item.subject is None for item in knowledge.items):
            raise NotApplicable(
                self.name,
                knowledge.kind,
                "have no subjects to edit",
                "give the knowledge as facts with subjects",
            )
        editor(self.name, **self.settings)

    def install(self, bench: Bench) -> Answerer:
        """Edit the model."""
        from ..edit import edit

        facts = [lesson.fact() for lesson in bench.knowledge.lessons]
        if self.wordings:
            facts += [
                Fact(fact.subject, wording, fact.target, id=f"{fact.id}-{i}")
                for fact in list(facts)
                for i, wording in enumerate(fact.paraphrases)
                if fact.subject in wording
            ]
        handle = edit(bench.model, bench.tokenizer, facts, method=self.name, mode=self.mode, **self.settings)
        return bench.plain(
            render=lambda prompt: bench.prompts(handle.rewrite(prompt)),
            store=lambda folder: handle.save(folder / "edit"),
        )


class FTM(_Edited):
    """Fine-tuning of one down-projection on the facts."""

    name, title, method = "ft-m", "FT-M", "ft-m"


class ROME(_Edited):
    """Rank-one edits, one fact after another."""

    name, title, method = "rome", "ROME", "rome"


class MEMIT(_Edited):
    """All facts at once, spread over several layers."""

    name, title, method = "memit", "MEMIT", "memit"


class GRACE(_Edited):
    """A codebook beside one layer."""

    name, title, method = "grace", "GRACE", "grace"
