"""Steering: knowledge moved at decoding time, no weight changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..core.data import QA

__all__ = ["needs", "transfer"]


def needs(target: Any) -> list[str]:
    """Which optional arguments of `transfer` a method cannot do without: documents, if it reads contexts."""
    return ["documents"] if _reads_contexts(target) else []


def _reads_contexts(method: Any) -> bool:
    import inspect

    return "contexts" in inspect.signature(getattr(method, "generate", method)).parameters


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: str | os.PathLike[str],
    documents: str | os.PathLike[str] | None = None,
    method: Callable[..., Any],
    output: str | os.PathLike[str],
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> Path:
    """What `transfuse run` does with a steering method: answer questions, from documents where it reads any.

    Writes `answers.jsonl` into `output`, a line per question: question, context (if it is read), answer,
    accepted answers.

    Args:
        model: Left as it is.
        tokenizer: Its tokenizer.
        questions: File of questions with accepted answers; `document_ids` name the context of each.
        documents: File of documents with ids; for methods that read them, and only for those.
        method: Takes model and tokenizer and returns an object with `generate(queries, contexts, ...)` or
            `generate(queries, ...)`.
        output: Folder of the result; replaced at once.
        max_new_tokens: Length limit of an answer.
        batch_size: Questions decoded together.

    Raises:
        BadInput: no documents for a method that reads them, or a question names one that is not there.
        NotApplicable: documents for a method that reads none.
    """
    import json

    from ..core.data import read_qa
    from ..core.errors import BadInput, NotApplicable
    from ..core.files import atomic_dir, atomic_write
    from ..core.lineage import write_lineage
    from ..core.metrics import contains_answer, exact_match

    steered = method(model, tokenizer)
    slug = type(steered).__module__.rpartition(".")[2].replace("_", "-")
    reads = _reads_contexts(steered)
    if reads and documents is None:
        raise BadInput("documents", None, f"is missing: {slug} reads them", "add a file of documents")
    if documents is not None and not reads:
        raise NotApplicable("documents", str(documents), f"is not read by {slug}", "leave it out")
    asked = read_qa(questions)
    queries = [qa.question for qa in asked]
    given: list[list[str]] = [queries]
    if documents is not None:
        given.append(_contexts(asked, documents))
    answers = steered.generate(*given, max_new_tokens=max_new_tokens, batch_size=batch_size)
    rows = []
    for i, (qa, answer) in enumerate(zip(asked, answers, strict=True)):
        row = {"id": qa.id, "question": qa.question, "answer": answer, "accepted": qa.answers}
        rows.append(row | {"context": given[1][i]} if reads else row)
    measured = {
        "contains_answer": sum(contains_answer(a, qa.answers) for a, qa in zip(answers, asked)) / len(asked),
        "exact_match": sum(exact_match(a, qa.answers) for a, qa in zip(answers, asked)) / len(asked),
    }
    inputs = {"questions": questions, "documents": documents}
    target = Path(output)
    with atomic_dir(target) as made:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        atomic_write(made / "answers.jsonl", "\n".join(lines) + "\n")
        write_lineage(
            made,
            method=slug,
            inputs={name: Path(value) for name, value in inputs.items() if value is not None},
            measurements=measured,
        )
    return target


def _contexts(asked: list[QA], documents: str | os.PathLike[str]) -> list[str]:
    """For each question the texts of the documents it names."""
    from ..core.data import read_documents
    from ..core.errors import BadInput

    texts = {document.id: document.text for document in read_documents(documents)}
    for i, qa in enumerate(asked):
        for key in qa.document_ids:
            if key not in texts:
                raise BadInput(
                    f"questions[{i}]: document_ids", key, "is no document's id", "use ids of documents"
                )
    return ["\n\n".join(texts[key] for key in qa.document_ids) for qa in asked]
