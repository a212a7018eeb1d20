"""Steering: knowledge moved at decoding time, no weight changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["transfer"]


def transfer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: str | os.PathLike[str],
    documents: str | os.PathLike[str],
    method: Callable[..., Any],
    output: str | os.PathLike[str],
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> Path:
    """What `transfuse run` does with a steering method: answer questions that come with documents.

    Writes `answers.jsonl` into `output`, a line per question: question, context, answer, accepted answers.

    Args:
        model: Left as it is.
        tokenizer: Its tokenizer.
        questions: File of questions with accepted answers; `document_ids` name the context of each.
        documents: File of documents with ids.
        method: Takes model and tokenizer and returns an object with `generate(queries, contexts, ...)`.
        output: Folder of the result; replaced at once.
        max_new_tokens: Length limit of an answer.
        batch_size: Questions decoded together.

    Raises:
        BadInput: a question names a document that is not there.
    """
    import json

    from ..core.data import read_documents, read_qa
    from ..core.errors import BadInput
    from ..core.files import atomic_dir, atomic_write
    from ..core.lineage import write_lineage
    from ..core.metrics import contains_answer, exact_match

    texts = {document.id: document.text for document in read_documents(documents)}
    asked = read_qa(questions)
    for i, qa in enumerate(asked):
        for key in qa.document_ids:
            if key not in texts:
                raise BadInput(
                    f"questions[{i}]: document_ids", key, "is no document's id", "use ids of documents"
                )
    contexts = ["\n\n".join(texts[key] for key in qa.document_ids) for qa in asked]
    steered = method(model, tokenizer)
    answers = steered.generate(
        [qa.question for qa in asked], contexts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    rows = [
        {"id": qa.id, "question": qa.question, "context": context, "answer": answer, "accepted": qa.answers}
        for qa, context, answer in zip(asked, contexts, answers)
    ]
    measured = {
        "contains_answer": sum(contains_answer(a, qa.answers) for a, qa in zip(answers, asked)) / len(asked),
        "exact_match": sum(exact_match(a, qa.answers) for a, qa in zip(answers, asked)) / len(asked),
    }
    target = Path(output)
    with atomic_dir(target) as made:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        atomic_write(made / "answers.jsonl", "\n".join(lines) + "\n")
        write_lineage(
            made,
            method=type(steered).__module__.rpartition(".")[2].replace("_", "-"),
            inputs={"questions": Path(questions), "documents": Path(documents)},
            measurements=measured,
        )
    return target
