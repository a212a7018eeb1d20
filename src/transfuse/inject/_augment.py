"""Documents to training sequences: rewrites, questions, their order, and how a question is put to the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from ..core.data import QA, Document
from ..core.errors import BadInput
from ..core.generate import chat_text
from ..core.llm import Backend
from ..core.retrieval import passage_text

__all__ = [
    "Augmentation",
    "Augmenter",
    "Given",
    "LLMAugmenter",
    "Render",
    "Triple",
    "chat_prompt",
    "cloze_prompt",
    "extract_answer",
    "plain_prompt",
    "plan",
    "prompt_for",
    "target",
]

_TOP_K = 50  # as published

Render = Callable[[str, Sequence[str]], str]
"""(question, passages) -> the text the model continues with its answer."""


@dataclass(frozen=True)
class Triple:
    """A question about a document, its short answer, and optionally the answer as a full sentence."""

    question: str
    answer: str
    statement: str = ""


@dataclass(frozen=True)
class Augmentation:
    """What one document is learnt from, besides its own text."""

    triples: tuple[Triple, ...]
    rewrites: tuple[str, ...] = ()


class Augmenter(Protocol):
    """Makes the material a document is learnt from."""

    def augment(self, documents: Sequence[Document]) -> list[Augmentation | None]:
        """One augmentation per document; None where none could be made, and the document is then skipped."""
        ...

    def keys(self, documents: Sequence[Document]) -> list[Any]:
        """What `augment` would make each from, JSON-able: a document is learnt again when this changes."""
        ...


class Given:
    """Questions and rewrites that are already known.

    Args:
        triples: Document id -> its triples (a document without id goes by its `hash`).
        rewrites: Document id -> its text in other words.

    Raises:
        BadInput: a document has no triple, or one with an empty part.
    """

    def __init__(
        self,
        triples: Mapping[str, Sequence[Triple]],
        rewrites: Mapping[str, Sequence[str]] | None = None,
    ):
        self.triples = {name: tuple(items) for name, items in triples.items()}
        self.rewrites = {name: tuple(items) for name, items in (rewrites or {}).items()}

    @classmethod
    def from_qa(cls, questions: Sequence[QA], rewrites: Mapping[str, Sequence[str]] | None = None) -> Given:
        """From questions that name their documents; the first accepted answer is the one learnt."""
        triples: dict[str, list[Triple]] = {}
        for question in questions:
            for name in question.document_ids:
                triples.setdefault(name, []).append(Triple(question.question, question.answers[0]))
        return cls(triples, rewrites)

    def _of(self, document: Document) -> Augmentation:
        names = [name for name in (document.id, document.hash) if name is not None]
        triples = next((self.triples[name] for name in names if name in self.triples), ())
        if not triples:
            raise BadInput(
                "triples", document.id or document.title or document.text[:40], "has no question and answer",
                "give at least one triple for this document, by its id",
            )  # fmt: skip
        for i, triple in enumerate(triples):
            if not triple.question.strip() or not triple.answer.strip():
                raise BadInput(
                    f"triples[{names[0]!r}][{i}]", triple, "has an empty part", "give question and answer"
                )
        rewrites = next((self.rewrites[name] for name in names if name in self.rewrites), ())
        return Augmentation(triples, tuple(text for text in rewrites if text.strip()))

    def augment(self, documents: Sequence[Document]) -> list[Augmentation | None]:
        """The known material of each document."""
        return [self._of(document) for document in documents]

    def keys(self, documents: Sequence[Document]) -> list[Any]:
        """The material itself."""
        return [asdict(self._of(document)) for document in documents]


class LLMAugmenter:
    """A language model rewrites each document and asks questions about it.

    Answers that are not the wanted JSON, or hold no usable question, are asked for again with other seeds; a
    document that never succeeds gives None.

    Args:
        backend: Who writes (`core.llm`): the model that is to learn, or a better one. Wrap it in
            `core.llm.cached` so that an interrupted run does not ask twice.
        rewrites: n, paraphrases per document.
        questions: m, triples per document.
        retries: Further attempts for a document's questions.
        temperature: Of the sampling.
        top_k: Likeliest tokens that are sampled from, 0 for all. None takes the published 50, but leaves it to a
            server, which may have no such setting.
        max_tokens: Length limit of one rewrite or one list of questions.
        seed: Of the sampling.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        rewrites: int = 1,
        questions: int = 3,
        retries: int = 3,
        temperature: float = 0.7,
        top_k: int | None = None,
        max_tokens: int = 512,
        seed: int = 0,
    ):
        if questions < 1:
            raise BadInput("questions", questions, "is not a positive number", "ask for at least one")
        for name, value in (("rewrites", rewrites), ("retries", retries), ("top_k", top_k)):
            if value is not None and value < 0:
                raise BadInput(name, value, "is negative", "use 0 or more")
        self.backend, self.rewrites, self.questions, self.retries = backend, rewrites, questions, retries
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.top_k = (_TOP_K if backend.takes_top_k else 0) if top_k is None else top_k

    def keys(self, documents: Sequence[Document]) -> list[Any]:
        """The writer and its settings: what is sampled is not known beforehand."""
        settings = [
            self.rewrites, self.questions, self.temperature, self.top_k, self.max_tokens, self.seed
        ]  # fmt: skip
        return [[self.backend.identity, *settings]] * len(documents)

    def augment(self, documents: Sequence[Document]) -> list[Augmentation | None]:
        """Ask for all documents at once, then again for those that failed."""
        passages = [passage_text(document) for document in documents]
        triples: list[tuple[Triple, ...]] = [()] * len(passages)
        for attempt in range(self.retries + 1):
            waiting = [i for i, found in enumerate(triples) if not found]
            if not waiting:
                break
            answers = self.backend.complete(
                [_ASK.format(count=self.questions, passage=passages[i]) for i in waiting],
                max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k or None,
                schema=_schema(self.questions), seed=self.seed + attempt,
            )  # fmt: skip
            for i, answer in zip(waiting, answers):
                triples[i] = _triples(answer.parsed, self.questions)
        made = [i for i, found in enumerate(triples) if found]
        asked = [_REWRITE.format(passage=passages[i]) for i in made for _ in range(self.rewrites)]
        written = self.backend.complete(
            asked, max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k or None,
            seed=self.seed,
        )  # fmt: skip
        results: list[Augmentation | None] = [None] * len(passages)
        for place, i in enumerate(made):
            texts = [c.text.strip() for c in written[place * self.rewrites : (place + 1) * self.rewrites]]
            results[i] = Augmentation(triples[i], tuple(text for text in texts if text))
        return results


_ASK = """Write {count} questions that the passage below answers. Each must make sense to a reader who does not \
see the passage, so name the people and things it is about. For each give the shortest exact answer and the \
answer as one complete sentence.

Passage:
{passage}

Reply with JSON: {{"questions": [{{"question": ..., "answer": ..., "full_answer": ...}}]}}"""

_REWRITE = """Say the passage below in different words and another sentence order. Keep every name, number, \
date and technical term exactly as it is, leave nothing out and add nothing. Reply with the new passage only.

Passage:
{passage}"""


def _schema(count: int) -> dict[str, Any]:
    parts = ("question", "answer", "full_answer")
    item = {
        "type": "object",
        "properties": {part: {"type": "string"} for part in parts},
        "required": list(parts),
        "additionalProperties": False,
    }
    listed = {"type": "array", "items": item, "minItems": 1, "maxItems": count}
    return {
        "type": "object",
        "properties": {"questions": listed},
        "required": ["questions"],
        "additionalProperties": False,
    }


def _triples(parsed: Any, count: int) -> tuple[Triple, ...]:
    found: dict[str, Triple] = {}
    for item in (parsed or {}).get("questions", []):
        question, answer = item["question"].strip(), item["answer"].strip()
        if question and answer:
            found.setdefault(question, Triple(question, answer, item["full_answer"].strip()))
    return tuple(found.values())[:count]


def plan(
    document: Document,
    augmentation: Augmentation,
    *,
    kind: Literal["code", "product"] = "code",
    cot: bool = False,
) -> list[tuple[tuple[str, ...], str, str]]:
    """The sequences one document is learnt from, in order.

    Args:
        document: The document.
        augmentation: Its triples, m of them, and rewrites.
        kind: "code": the first ceil(m / 2) questions each with the original and then each rewrite, the others
            without a passage (5 sequences for m = 3 and one rewrite). "product": every question with every
            text.
        cot: Learn the full sentence instead of the short answer.

    Returns:
        (passages, question, target) per sequence; the target ends in a full stop.
    """
    if kind not in ("code", "product"):
        raise BadInput("plan", kind, "is unknown", 'use "code" or "product"')
    texts = [passage_text(document), *augmentation.rewrites]
    count = len(augmentation.triples)
    with_passage = count if kind == "product" else (count + 1) // 2
    sequences: list[tuple[tuple[str, ...], str, str]] = []
    for i, triple in enumerate(augmentation.triples):
        goal = target(triple, cot=cot)
        if i < with_passage:
            sequences.extend(((text,), triple.question, goal) for text in texts)
        else:
            sequences.append(((), triple.question, goal))
    return sequences


def target(triple: Triple, *, cot: bool = False) -> str:
    """What is learnt as the answer: the short one, or with `cot` the sentence, ending in a full stop."""
    return _ended((triple.statement if cot else "") or triple.answer, ".")


def _ended(text: str, mark: str) -> str:
    text = text.strip()
    return text if text.endswith(mark) else text + mark


def _listed(passages: Sequence[str]) -> str:
    return "".join(f"Passage {i}: {text}\n" for i, text in enumerate(passages, 1))


def plain_prompt(question: str, passages: Sequence[str] = (), *, cot: bool = False) -> str:
    """Passages, question and the start of an answer, for a model without a chat template."""
    asked = f"{_listed(passages)}Question: {_ended(question, '?')}\nAnswer:"
    return asked if cot else f"{asked} The answer is"


def cloze_prompt(prompt: str, passages: Sequence[str] = ()) -> str:
    """Passages, then a sentence to complete ("The mayor of Quenby is") on a line of its own."""
    return "\n".join([*passages, prompt])


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, passages: Sequence[str] = (), *, cot: bool = False
) -> str:
    """Passages and question as a user message under the model's chat template, and the start of the reply."""
    asked = f"Question: {_ended(question, '?')}"
    if passages:
        told = "Answer from the passages and from what you know yourself."
        asked = f"{told}\n{_listed(passages)}\n{asked}"
    if cot:
        asked += "\nThink step by step, and end with: the answer is ..."
    text = chat_text(tokenizer, asked)
    return text if cot else f"{text}The answer is"


def prompt_for(tokenizer: PreTrainedTokenizerBase, *, cot: bool = False) -> Render:
    """The tokenizer's own way to be asked: its chat template, else the plain prompt."""
    if tokenizer.chat_template:
        return lambda question, passages: chat_prompt(tokenizer, question, passages, cot=cot)
    return lambda question, passages: plain_prompt(question, passages, cot=cot)


def extract_answer(text: str, *, cot: bool = False) -> str:
    """The short answer in a generated text, as the paper scores it: up to the first full stop, line end or comma.

    With `cot` it begins after the first "the answer is" (in these letters), where that occurs. Unlike the published
    code this leaves colons at its beginning out, so that "the answer is: Paris" is a bare answer too.
    """
    rest = text.partition("the answer is")[2] if cot and "the answer is" in text else text
    return re.split(r"[.\n,]", rest.strip().lstrip(": \n"), maxsplit=1)[0].strip()
