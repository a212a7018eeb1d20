"""The carriers: where knowledge can live. Each turns a fresh model and the lessons into something that answers."""

from __future__ import annotations

import copy
import difflib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.data import Document
from ..core.errors import BadInput, NotApplicable
from ..core.files import atomic_write, locked, sha256_json
from ..core.retrieval import BM25, VectorIndex, passage_text
from .answerer import Answerer, Plain, Prompts
from .job import Job, Knowledge

__all__ = ["Bench", "Carrier", "carriers", "find_carrier"]


class Bench:
    """What a carrier works with: a freshly loaded model, the lessons, and how prompts are written.

    Attributes:
        model, tokenizer: Loaded for this carrier alone; it may change them.
        job: The recipe and its inputs. Carriers learn from `knowledge.lessons` only.
        knowledge: The job's knowledge.
        prompts: Writes prompts down.
        seed: Of everything that draws random numbers.
        settings: All that decides a carrier's work besides its own arguments.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, fingerprint: str = ""
    ):
        self.model, self.tokenizer, self.job = model, tokenizer, job
        self.knowledge, self.seed = job.knowledge, job.recipe.seed
        self.settings = {**job.settings, "model": fingerprint}
        self.prompts = Prompts(tokenizer, job.knowledge.kind, job.recipe.chat)
        self._workshop: Path | None = None
        self._borrowed: list[float] = []

    def once(self, name: str, make: Callable[[], Any], **arguments: Any) -> Any:
        """What `make()` returns (JSON-able), made by the first carrier that needs it and kept for the others.

        Each carrier that uses it is charged the seconds that it took.
        """
        key = sha256_json([name, arguments, self.settings])[:12]
        file = self.job.folder / "work" / f"{name}-{key}.json"
        waiting = time.perf_counter()
        with locked(file.with_suffix(".lock")):  # a carrier at work beside this one may be making it
            if file.is_file():
                kept = json.loads(file.read_text(encoding="utf-8"))
                self._borrowed.append(kept["seconds"] - (time.perf_counter() - waiting))
                return kept["value"]
            start = time.perf_counter()
            value = make()
            atomic_write(file, json.dumps({"seconds": time.perf_counter() - start, "value": value}))
        return value

    def workshop(self, key: str) -> Path:
        """A folder in the output, kept between carriers and runs, for work that several can use or resume.

        What installing costs there adds up over runs, so that a carrier that finds the work done reports its price.
        """
        self._workshop = self.job.folder / "work" / key
        self._workshop.mkdir(parents=True, exist_ok=True)
        return self._workshop

    def account(self, seconds: float, peak: int) -> tuple[float, int]:
        """Seconds and peak bytes of an installation, with what it found done: by `once`, in the workshop."""
        seconds += sum(self._borrowed)
        if self._workshop is None:
            return seconds, peak
        ledger = self._workshop / "spent.json"
        if ledger.is_file():
            spent = json.loads(ledger.read_text(encoding="utf-8"))
            seconds, peak = seconds + spent["seconds"], max(peak, spent["peak"])
        atomic_write(ledger, json.dumps({"seconds": seconds, "peak": peak}))
        return seconds, peak

    def beside(self, model: PreTrainedModel, name: str) -> Bench:
        """The same for another model, called `name`; what it borrows is this one's debt."""
        other = copy.copy(self)
        other.model = model
        other.settings = {**self.settings, "model": f"{self.settings['model']} beside {name}"}
        return other

    def plain(self, **parts: Any) -> Plain:
        """An answerer that reads the bare prompt, on this bench's model unless told otherwise."""
        return Plain(**{"model": self.model, "tokenizer": self.tokenizer, "render": self.prompts, **parts})


class Carrier(ABC):
    """One way to give a model knowledge. Subclasses with a `name` are found by it.

    Class attributes:
        name: What recipes say.
        title: What reports say.
        access: What of the model it needs: "text", "logits", "hidden", "weights", "training data".
        uses_context: Whether it reads extra text when answering.
        reversible: Whether the knowledge can be removed again, exactly.
        method: Slug of the method behind it, if it is one of the catalogue's.
        effort: Rough seconds on one core; the longest begin first.
        shares: Name of work that it leaves for others in `Bench.workshop`; two of one name take turns.
        usage: Lines for the model card that load what was stored.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    access: ClassVar[tuple[str, ...]] = ("text",)
    uses_context: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    method: ClassVar[str | None] = None
    effort: ClassVar[float] = 15.0
    shares: ClassVar[str | None] = None
    usage: ClassVar[str] = ""

    known: ClassVar[dict[str, type[Carrier]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Carrier.known[cls.name] = cls

    def check(self, knowledge: Knowledge) -> None:
        """Raise `NotApplicable` if this kind of knowledge cannot be carried; nothing is loaded yet."""

    def needs(self) -> tuple[str, ...]:
        """`access`, as the arguments decide it."""
        return self.access

    def models(self) -> tuple[str, ...]:
        """Further models that its arguments name, as `transfuse.load` takes them; their weights decide the figures."""
        return ()

    @abstractmethod
    def install(self, bench: Bench) -> Answerer:
        """Move the knowledge; everything done here is what installing costs."""


def carriers() -> dict[str, type[Carrier]]:
    """Every carrier by name, third parties' (entry points `transfuse.carriers`) included."""
    from importlib.metadata import entry_points

    from . import adapters, steering, writers  # noqa: F401  register the carriers that change or extend weights

    for entry in entry_points(group="transfuse.carriers"):
        if entry.name not in Carrier.known:
            entry.load()
    return dict(Carrier.known)


def find_carrier(name: str, where: str = "carriers") -> type[Carrier]:
    """The carrier called `name`; `ck_plug` and `ck-plug` are the same.

    Raises:
        BadInput: there is none; the nearest name is suggested.
    """
    known = carriers()
    key = name.replace("_", "-")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        raise BadInput(
            where, name, "is no carrier", f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
        )
    return known[key]


class NoCarrier(Carrier):
    """The untouched model: what it answers without the knowledge."""

    name, title = "none", "Nothing moved"
    effort = 8.0

    def install(self, bench: Bench) -> Answerer:
        """Nothing to do."""
        return bench.plain()


class GoldContext(Carrier):
    """The right documents in the prompt: what is attainable by reading. A reference, not a deployable carrier.

    Prompts that are about none of the knowledge are asked without context.
    """

    name, title, uses_context = "gold-context", "Gold context", True
    effort = 12.0

    def install(self, bench: Bench) -> Answerer:
        """Remember which documents each prompt belongs to."""
        home = {
            prompt: shown(bench.knowledge.about(item))
            for item in bench.knowledge.items
            for prompt in (item.prompt, *item.taught, *item.asked)
        }
        return bench.plain(
            render=lambda prompt: bench.prompts(prompt, home.get(prompt)),
            store=lambda folder: write_documents(folder, bench.knowledge.documents),
        )

    def check(self, knowledge: Knowledge) -> None:
        """Some item must say which document holds it."""
        if not any(item.documents for item in knowledge.items):
            raise NotApplicable(
                "gold-context",
                knowledge.kind,
                "do not say which document holds their answer",
                "add document_ids to the questions" if knowledge.kind == "questions"
                else "give documents whose id or title is a fact's subject, or none",
            )  # fmt: skip


def shown(documents: Sequence[Document]) -> str:
    """What a prompt shows of documents: their texts, each under its title unless the text says that itself."""
    return "\n".join(d.text if d.title in d.text else passage_text(d) for d in documents)


def check_k(k: int, knowledge: Knowledge) -> None:
    """Refuse to retrieve more documents than there are."""
    if not 1 <= k <= len(knowledge.documents):
        raise BadInput("k", k, f"does not fit {len(knowledge.documents)} documents", "use 1 up to that many")


def write_documents(folder: Path, documents: Sequence[Document]) -> None:
    """Store documents as JSON lines."""
    lines = [
        json.dumps({"id": d.id, "title": d.title, "text": d.text}, ensure_ascii=False) for d in documents
    ]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class _Retrieved(Carrier):
    """Documents found for each prompt, put before it."""

    uses_context = True
    effort = 14.0

    def __init__(self, *, k: int = 1):
        self.k = k

    def check(self, knowledge: Knowledge) -> None:
        """There must be at least k documents."""
        check_k(self.k, knowledge)

    @abstractmethod
    def index(self, bench: Bench) -> Any:
        """The retriever, over the job's documents."""

    def install(self, bench: Bench) -> Answerer:
        """Build the index."""
        index = self.index(bench)
        found = Contexts(index, self.k)
        return bench.plain(
            render=lambda prompt: bench.prompts(prompt, found(prompt)),
            store=lambda folder: write_documents(folder, bench.knowledge.documents),
        )


class Contexts:
    """Retrieved text per prompt; each prompt is looked up at every call, as it would be in use."""

    def __init__(self, index: Any, k: int):
        self.index, self.k = index, k

    def __call__(self, prompt: str) -> str:
        """The k best documents, best first, as `shown`."""
        return shown([hit.document for hit in self.index.search([prompt], self.k)[0]])


class BM25Context(_Retrieved):
    """Retrieval by BM25, the found text in the prompt."""

    name, title = "bm25-context", "Retrieved context (BM25)"

    def index(self, bench: Bench) -> Any:
        """BM25 in memory."""
        return BM25(bench.knowledge.documents)


class VectorContext(_Retrieved):
    """Retrieval by sentence vectors in LanceDB, the found text in the prompt.

    Args:
        k: Documents per prompt.
        encoder: Sentence encoder, as `transfuse.core.models.load_encoder` takes it.
    """

    name, title = "vector-context", "Retrieved context (vectors)"
    effort = 25.0

    def __init__(self, *, k: int = 1, encoder: str = "minilm"):
        super().__init__(k=k)
        self.encoder = encoder

    def models(self) -> tuple[str, ...]:
        """The encoder."""
        return (self.encoder,)

    def index(self, bench: Bench) -> Any:
        """An embedded vector store."""
        return VectorIndex(bench.knowledge.documents, encoder=self.encoder)


class CKPlugCarrier(Carrier):
    """BM25 context, weighed against the model's memory token by token.

    Args:
        alpha: Weight of memory in [0, 1], or "adaptive".
        k: Documents per prompt.
    """

    name, title, uses_context, method = "ck-plug", "CK-PLUG over BM25", True, "ck-plug"
    access = ("logits",)
    effort = 25.0

    def __init__(self, *, alpha: float | Literal["adaptive"] = "adaptive", k: int = 1):
        self.alpha, self.k = alpha, k

    def check(self, knowledge: Knowledge) -> None:
        """Alpha must be a weight, and there must be at least k documents."""
        check_k(self.k, knowledge)
        if self.alpha != "adaptive" and not 0 <= self.alpha <= 1:
            raise BadInput("alpha", self.alpha, "is not a weight", 'give a number from 0 to 1, or "adaptive"')

    def install(self, bench: Bench) -> Answerer:
        """Build the index; the model stays as it is."""
        from ..steer.ck_plug import CKPlug

        steered = CKPlug(
            bench.model,
            bench.tokenizer,
            alpha=self.alpha,
            prompt=bench.prompts.template,
            chat=bench.job.recipe.chat,
        )
        return _Steered(bench, steered, Contexts(BM25(bench.knowledge.documents), self.k))


class _Steered(Plain):
    """Answers of a two-stream decoder."""

    def __init__(self, bench: Bench, steered: Any, contexts: Contexts):
        super().__init__(
            bench.model, bench.tokenizer, lambda prompt: bench.prompts(prompt, contexts(prompt)),
            lambda folder: write_documents(folder, bench.knowledge.documents),
        )  # fmt: skip
        self.steered, self.contexts, self.prompts = steered, contexts, bench.prompts
        self.query = bench.prompts.query

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        queries = [self.query(p) for p in prompts]
        contexts = [self.contexts(p) for p in prompts]
        answers: list[str] = self.steered.generate(queries, contexts, max_new_tokens=max_new_tokens)
        return answers

    def predictions(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[Any]:
        queries = [self.query(p) for p in prompts]
        found: list[Any] = self.steered.follow(
            queries, [self.contexts(p) for p in prompts], list(continuations)
        )
        return found

    def tokens_read(self, prompts: Sequence[str]) -> list[int]:
        alone = [len(self.tokenizer(self.prompts(p))["input_ids"]) for p in prompts]  # the second stream's
        return [a + b for a, b in zip(super().tokens_read(prompts), alone, strict=True)]
