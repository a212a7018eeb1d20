"""Carriers that write into the weights or switch them: document adapters, editors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..core.data import Fact
from ..core.errors import BadInput, NotApplicable
from ..core.files import sha256_json
from ..core.generate import predicted_tokens
from ..core.retrieval import BM25, passage_text
from .answerer import Answerer, Plain
from .carriers import Bench, Carrier, check_k, write_documents
from .job import Knowledge

__all__: list[str] = []


class _ParametricRAG(Carrier):
    """Document adapters, merged for the documents a prompt retrieves."""

    access = ("weights", "training data")
    method = "parametric-rag"
    effort = 45.0
    shares = "parametric-rag"
    usage = (
        "from transfuse.core.data import read_documents\nfrom transfuse.core.retrieval import BM25\n"
        "from transfuse.inject.parametric_rag import AdapterStore\n\n"
        'index = BM25(read_documents("documents.jsonl"))\n'
        "found = [hit.document for hit in index.search([question], 1)[0]]\n"
        'handle = AdapterStore("adapters").apply(model, found)  # handle.rollback() takes them off again'
    )
    mode: ClassVar[Literal["parametric", "combine"]]

    def __init__(self, *, k: int = 1, rank: int = 2, alpha: float = 32.0, lr: float = 3e-4, epochs: int = 4):
        self.k, self.rank, self.alpha, self.lr, self.epochs = k, rank, alpha, lr, epochs

    def check(self, knowledge: Knowledge) -> None:
        """Every document must have a lesson to be learnt from, numbers must be in their ranges."""
        check_k(self.k, knowledge)
        for name in ("rank", "alpha", "lr", "epochs"):
            if not getattr(self, name) > 0:
                raise BadInput(name, getattr(self, name), "is not positive", "give a number above 0")
        taught = {key for item in knowledge.items for key in item.documents}
        for document in knowledge.documents:
            if document.id not in taught:
                raise NotApplicable(
                    self.name,
                    document.id,
                    "is a document no question is about",
                    "add a question or leave it out",
                )

    def install(self, bench: Bench) -> Answerer:
        """Train one adapter per document, unless the other mode's run has left them."""
        from ..inject.parametric_rag import DocumentParameterizer, Given, ParametricRAG, Triple

        triples: dict[str, list[Any]] = {}
        for lesson in bench.knowledge.lessons:
            for key in lesson.documents:
                for wording in (lesson.prompt, *lesson.paraphrases):
                    triples.setdefault(key, []).append(Triple(wording, lesson.target))

        def render(prompt: str, passages: Any) -> str:
            return bench.prompts(prompt, "\n".join(passages) or None)

        encoder = DocumentParameterizer(
            bench.model, bench.tokenizer, Given(triples), rank=self.rank, alpha=self.alpha, lr=self.lr,
            epochs=self.epochs, render=render, seed=bench.seed,
        )  # fmt: skip
        settings = [self.rank, self.alpha, self.lr, self.epochs, bench.settings]
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
    effort = 100.0


class ParametricCombine(_ParametricRAG):
    """Documents as adapters and in the prompt."""

    name, title, mode, uses_context = "parametric-rag-combine", "Parametric RAG + context", "combine", True


class _Merged(Plain):
    """Answers under the adapters of the documents that each prompt retrieves."""

    def __init__(self, bench: Bench, rag: Any, folder: Path):
        def store(target: Path) -> None:
            leavings = shutil.ignore_patterns(".*")  # and locks
            shutil.copytree(folder, target / "adapters", ignore=leavings)
            write_documents(target, bench.knowledge.documents)

        def render(prompt: str) -> str:
            hits = rag.retrieve([prompt])[0] if rag.mode == "combine" else []
            return bench.prompts(prompt, "\n".join(passage_text(hit.document) for hit in hits))

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
    usage = 'from transfuse.edit import load_edit\n\nhandle = load_edit("edit", model, tokenizer)'
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
        facts = [replace(fact, prompt=bench.prompts(fact.prompt)) for fact in facts]  # as they will be asked
        handle = edit(bench.model, bench.tokenizer, facts, method=self.name, mode=self.mode, **self.settings)
        return bench.plain(
            render=lambda prompt: bench.prompts(handle.rewrite(prompt)),
            store=lambda folder: handle.save(folder / "edit"),
        )


class FTM(_Edited):
    """Fine-tuning of one down-projection on the facts."""

    name, title, method = "ft-m", "FT-M", "ft-m"
    effort = 55.0


class ROME(_Edited):
    """Rank-one edits, one fact after another."""

    name, title, method = "rome", "ROME", "rome"
    effort = 130.0


class MEMIT(_Edited):
    """All facts at once, spread over several layers."""

    name, title, method = "memit", "MEMIT", "memit"
    effort = 80.0


class GRACE(_Edited):
    """A codebook beside one layer."""

    name, title, method = "grace", "GRACE", "grace"
