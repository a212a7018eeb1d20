"""What a comparison is: the recipe as dataclasses, the knowledge split into what is taught and what is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ..core.data import Document, Fact, read_documents, read_facts, read_qa
from ..core.errors import BadInput, CorruptFile
from ..core.files import sha256_json

__all__ = [
    "Constraints",
    "Item",
    "Job",
    "Knowledge",
    "Lesson",
    "Recipe",
    "Source",
    "bundled",
    "read_knowledge",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the knowledge is: `facts`, or `documents` with `questions` about them.

    Attributes:
        facts: File of facts.
        documents: File of documents; with facts it is optional (one is then written per subject). A fact belongs to
            the documents whose id or title is its subject.
        questions: File of questions with accepted answers.
        train_paraphrases: How many paraphrases of each fact or question carriers may learn from; the others
            are asked and never taught. A wording that is taught anywhere is asked nowhere.
    """

    facts: str | None = None
    documents: str | None = None
    questions: str | None = None
    train_paraphrases: int = 2


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the user cannot accept. Unset means no limit.

    Attributes:
        max_latency: Seconds per answer.
        max_bytes: Bytes stored by the carrier.
        max_install_seconds: Seconds to move the knowledge.
        max_memory: Peak bytes of memory while installing.
        max_tokens_read: Prompt tokens per answer.
        min_locality: Share of other answers left as they were.
        min_recall: Share of held-out paraphrases answered.
        reversible: True: the knowledge must be removable again, exactly.
        weight_access: False: the model's weights cannot be touched or added to.
        context: False: no extra text may be read at answer time.
    """

    max_latency: float | None = None
    max_bytes: int | None = None
    max_install_seconds: float | None = None
    max_memory: int | None = None
    max_tokens_read: float | None = None
    min_locality: float | None = None
    min_recall: float | None = None
    reversible: bool | None = None
    weight_access: bool | None = None
    context: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A comparison.

    Attributes:
        model: What `transfuse.load` takes; a folder may be given relative to the recipe.
        knowledge: Where the knowledge is.
        carriers: Names, or `{uses: name, with: {argument: value}, name: label}`.
        constraints: What the user cannot accept.
        title: Headline of the report.
        reference: Carrier that marks what is attainable; `gap closed` is 1 there.
        output: Folder of records, carriers and report, relative to the working folder.
        dtype: As `transfuse.load` takes it.
        device: As `transfuse.load` takes it.
        seed: Of everything that draws random numbers.
        max_new_tokens: Length limit of an answer; by default as long as the longest target, and 4 more to complete
            a sentence, 12 more to answer a question.
        chat: Put prompts into the tokenizer's chat template.
        known: File of prompts and targets the model may have known before (locality); a set is bundled.
        neutral: Text file for perplexity; one is bundled.
        anchors: Text file, a prompt a line, whose answers training carriers rehearse; a set is bundled.
        jobs: Carriers that run side by side and divide the cores among them; by default two on a CPU, one on a
            GPU. Latencies are measured beside the other carriers' work: `jobs: 1` measures them alone.
    """

    model: str
    knowledge: Source
    carriers: list[str | dict[str, Any]]
    constraints: Constraints = field(default_factory=Constraints)
    title: str = "Where should this knowledge live?"
    reference: str = "gold-context"
    output: str = "runs/compare"
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0
    max_new_tokens: int | None = None
    chat: bool = False
    known: str | None = None
    neutral: str | None = None
    anchors: str | None = None
    jobs: int | None = None


@dataclass(frozen=True)
class Item:
    """One piece of knowledge: what is taught (`prompt`, `taught`, `answers[0]`) and what is asked besides."""

    id: str
    prompt: str
    answers: tuple[str, ...]
    taught: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    subject: str | None = None
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """The side of an item that carriers may see."""

    id: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...]
    subject: str | None
    documents: tuple[str, ...]

    def fact(self) -> Fact:
        """The lesson as an editing request; one that came from a question has no subject to edit."""
        return Fact(self.subject or "", self.prompt, self.target, self.paraphrases, id=self.id)


@dataclass(frozen=True)
class Knowledge:
    """Everything a comparison moves and asks.

    Attributes:
        kind: "facts" (prompts are completed) or "questions" (prompts are answered).
        items: What is asked.
        documents: The texts that hold it.
    """

    kind: Literal["facts", "questions"]
    items: tuple[Item, ...]
    documents: tuple[Document, ...]

    @property
    def lessons(self) -> list[Lesson]:
        """What carriers may learn from: no tested paraphrase, no neighbour."""
        return [Lesson(i.id, i.prompt, i.answers[0], i.taught, i.subject, i.documents) for i in self.items]

    @property
    def wordings(self) -> set[str]:
        """Every prompt that is taught or asked: what a carrier is there to change."""
        return {text for i in self.items for text in (i.prompt, *i.taught, *i.asked)}

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        return sha256_json(asdict(self))

    def about(self, item: Item) -> list[Document]:
        """The documents that hold an item, in the order of `documents`."""
        return [d for d in self.documents if d.id in item.documents]


@dataclass(frozen=True)
class Job:
    """A checked recipe with its inputs read: all that a carrier's process needs besides the model."""

    recipe: Recipe
    knowledge: Knowledge
    known: tuple[tuple[str, str], ...]
    neutral: str
    anchors: tuple[str, ...]
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the measurements, apart from the carrier itself."""
        recipe = self.recipe
        return {
            "knowledge": self.knowledge.hash,
            "known": sha256_json(self.known),
            "neutral": sha256_json(self.neutral),
            "anchors": sha256_json(self.anchors),
            **{k: getattr(recipe, k) for k in ("dtype", "device", "seed", "max_new_tokens", "chat")},
        }


def bundled(name: str) -> str:
    """Text of one of the files shipped for comparisons: `anchors.txt`, `known.jsonl`, `neutral.txt`."""
    return (resources.files("transfuse.compare") / "data" / name).read_text(encoding="utf-8")


def read_knowledge(source: Source, base: Path) -> Knowledge:
    """Read and split the knowledge; file names are relative to `base`.

    Raises:
        BadInput: neither facts nor questions, questions without documents, a document id that is not there.
    """
    if source.train_paraphrases < 0:
        raise BadInput(
            "knowledge.train_paraphrases", source.train_paraphrases, "is negative", "give 0 or more"
        )
    if (source.facts is None) == (source.questions is None):
        raise BadInput("knowledge", asdict(source), "needs facts or questions", "give exactly one of the two")
    if source.questions is not None and source.documents is None:
        raise BadInput(
            "knowledge.documents", None, "is missing", "questions need the documents they are about"
        )
    documents = _documents(source, base)
    items: list[Item] = []
    n = source.train_paraphrases
    if source.facts is not None:
        facts = read_facts(_file(source.facts, base), argument="knowledge.facts")
        documents = documents or _written(facts)
        for i, fact in enumerate(facts):
            home = tuple(str(d.id) for d in documents if fact.subject in (d.id, d.title))
            taught, asked = _split(fact.prompt, fact.paraphrases, n)
            items.append(
                Item(
                    fact.id or f"f{i + 1}", fact.prompt, (fact.target,), taught, asked, fact.neighbours,
                    fact.subject, home,
                )
            )  # fmt: skip
        return Knowledge("facts", _apart(items), documents)
    assert source.questions is not None
    ids = {document.id for document in documents}
    for i, qa in enumerate(read_qa(_file(source.questions, base), argument="knowledge.questions")):
        for key in qa.document_ids:
            if key not in ids:
                raise BadInput(
                    f"knowledge.questions[{i}]: document_ids",
                    key,
                    "is no document's id",
                    "use ids from documents",
                )
        taught, asked = _split(qa.question, qa.paraphrases, n)
        items.append(
            Item(
                qa.id or f"q{i + 1}",
                qa.question,
                qa.answers,
                taught,
                asked,
                qa.neighbours,
                None,
                qa.document_ids,
            )
        )
    return Knowledge("questions", _apart(items), documents)


def _split(prompt: str, paraphrases: Sequence[str], n: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Other wordings of a prompt, each once: the first `n`, which may be taught, and the rest, which is asked."""
    others = [text for text in dict.fromkeys(paraphrases) if text != prompt]
    return tuple(others[:n]), tuple(others[n:])


def _apart(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items without held-out wordings that another item teaches."""
    taught = {text for item in items for text in (item.prompt, *item.taught)}
    return tuple(replace(item, asked=tuple(t for t in item.asked if t not in taught)) for item in items)


def _file(name: str, base: Path) -> Path:
    path = Path(os.path.expanduser(name))
    return path if path.is_absolute() else base / path


def _documents(source: Source, base: Path) -> tuple[Document, ...]:
    if source.documents is None:
        return ()
    found = read_documents(_file(source.documents, base), argument="knowledge.documents")
    taken = {d.id for d in found}

    def unnamed(i: int) -> str:
        name = f"d{i + 1}"
        return f"{name}-unnamed" if name in taken else name

    return tuple(Document(d.text, d.title, d.id or unnamed(i)) for i, d in enumerate(found))


def _written(facts: Sequence[Fact]) -> tuple[Document, ...]:
    """One document per subject: its facts as sentences, in the wording of their prompts."""
    by_subject: dict[str, list[str]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(f"{fact.prompt} {fact.target}.")
    return tuple(Document(" ".join(sentences), subject, subject) for subject, sentences in by_subject.items())


def read_job(recipe: Recipe, base: Path, folder: Path) -> Job:
    """Read every file a recipe names.

    Raises:
        BadInput: a number is out of range, a file is missing or malformed.
    """
    _check_numbers(recipe)
    knowledge = read_knowledge(recipe.knowledge, base)

    def text(name: str | None, argument: str, default: str) -> str:
        if name is None:
            return bundled(default)
        path = _file(name, base)
        if not path.is_file():
            raise BadInput(argument, name, "does not exist", "give a text file, or leave it out")
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise CorruptFile(argument, name, f"is not UTF-8 text ({error})", "save it as UTF-8") from error

    known = [json.loads(line) for line in bundled("known.jsonl").splitlines()]
    if recipe.known is not None:
        known = _known(_file(recipe.known, base))
    neutral = text(recipe.neutral, "neutral", "neutral.txt")
    if len(neutral.split()) < 50:
        raise BadInput("neutral", recipe.neutral, "has fewer than 50 words", "give a longer text")
    anchors = tuple(
        line.strip() for line in text(recipe.anchors, "anchors", "anchors.txt").splitlines() if line.strip()
    )
    return Job(recipe, knowledge, tuple((k["prompt"], k["target"]) for k in known), neutral, anchors, folder)


def _check_numbers(recipe: Recipe) -> None:
    if not 0 <= recipe.seed < 2**32:
        raise BadInput("seed", recipe.seed, "is not from 0 to 2**32 - 1", "give such a number")
    for name in ("jobs", "max_new_tokens"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise BadInput(name, value, "is below 1", "give 1 or more, or leave it out")
    for name, value in asdict(recipe.constraints).items():
        if isinstance(value, bool) or value is None:
            continue
        if value < 0:
            raise BadInput(f"constraints.{name}", value, "is negative", "give 0 or more, or leave it out")
        if name.startswith("min_") and value > 1:
            raise BadInput(f"constraints.{name}", value, "is no share", "give a number from 0 to 1")


def _known(path: Path) -> list[Mapping[str, str]]:
    facts = read_qa([{"question": p, "answers": [t]} for p, t in _pairs(path)], argument="known")
    return [{"prompt": qa.question, "target": qa.answers[0]} for qa in facts]


def _pairs(path: Path) -> list[tuple[Any, Any]]:
    from ..core.data import read_rows

    pairs = []
    for place, row in read_rows(path, "known"):
        if not isinstance(row, Mapping) or "prompt" not in row or "target" not in row:
            raise BadInput(f"known: {place}", row, "is no record", "give prompt and target")
        pairs.append((row["prompt"], row["target"]))
    return pairs
