"""Injection: documents and knowledge bases moved into adapters or weights."""

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
    documents: str | os.PathLike[str],
    method: Callable[..., Any],
    output: str | os.PathLike[str],
    scratch: Path,
    seed: int = 0,
    training: str | os.PathLike[str] | None = None,
    questions: str | os.PathLike[str] | None = None,
    rank: int = 2,
    alpha: float = 32.0,
    lr: float = 3e-4,
    epochs: int = 1,
    max_length: int = 3000,
) -> Path:
    """What `transfuse run` does with parametric RAG: encode documents into adapters, then answer questions.

    Writes `store/` (the adapters), `documents.jsonl` and, if questions are asked, `answers.jsonl`.

    Args:
        model: Left as it is.
        tokenizer: Its tokenizer.
        documents: File of documents.
        method: Takes model, retriever, store and tokenizer and returns an object with `answers(questions)`.
        output: Folder of the result; replaced at once.
        scratch: Folder where adapters, and what the model wrote for them, survive an interruption.
        seed: Of the adapters' common start, and of what the model writes.
        training: File of questions the documents are learnt from, `document_ids` naming theirs; by default the
            model writes its own.
        questions: File of questions to answer at the end.
        rank: Of the adapters.
        alpha: Their scale is alpha / rank.
        lr: Learning rate.
        epochs: Passes over a document's sequences.
        max_length: Longest sequence, in tokens.
    """
    import json
    import shutil
    from dataclasses import asdict

    from ..core.data import read_documents, read_qa
    from ..core.files import atomic_dir, atomic_write
    from ..core.lineage import write_lineage
    from ..core.llm import Local, cached
    from ..core.metrics import contains_answer, token_f1
    from ..core.retrieval import BM25
    from ._augment import Augmenter, Given, LLMAugmenter, extract_answer
    from ._encode import DocumentParameterizer

    texts = read_documents(documents)
    asked = read_qa(questions) if questions is not None else []
    writer = cached(Local(model, tokenizer), scratch / "answers")
    augmenter: Augmenter = LLMAugmenter(writer, seed=seed)
    if training is not None:
        augmenter = Given.from_qa(read_qa(training, argument="training"))
    encoder = DocumentParameterizer(
        model, tokenizer, augmenter,
        rank=rank, alpha=alpha, lr=lr, epochs=epochs, max_length=max_length, seed=seed,
    )  # fmt: skip
    store = encoder.encode(texts, scratch / "store")
    measured: dict[str, Any] = {"documents": len(texts), "skipped": len(store.skipped)}
    rows = []
    if asked:
        answered = method(model, BM25(texts), store, tokenizer).answers([qa.question for qa in asked])
        for qa, answer in zip(asked, answered):
            short = extract_answer(answer.text)
            rows.append(
                {"id": qa.id, "question": qa.question, "answer": short, "text": answer.text,
                 "accepted": qa.answers, "documents": [hit.document.id for hit in answer.citations]}
            )  # fmt: skip
        measured["f1"] = sum(token_f1(row["answer"], row["accepted"]) for row in rows) / len(rows)
        measured["contains_answer"] = sum(contains_answer(r["text"], r["accepted"]) for r in rows) / len(rows)
    target = Path(output)
    with atomic_dir(target) as made:
        shutil.copytree(store.folder, made / "store", ignore=shutil.ignore_patterns(".*"))
        for name, lines in (("documents", [asdict(document) for document in texts]), ("answers", rows)):
            if lines:
                text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
                atomic_write(made / f"{name}.jsonl", text + "\n")
        write_lineage(
            made,
            method="parametric-rag",
            inputs={
                name: Path(value)
                for name, value in (
                    ("documents", documents),
                    ("training", training),
                    ("questions", questions),
                )
                if value is not None
            },
            measurements=measured,
            summary="An adapter per document, to be summed into the base model when a question retrieves it.",
            usage=(
                'documents = read_documents("documents.jsonl")\n'
                'rag = ParametricRAG(model, BM25(documents), AdapterStore("store"), tokenizer)'
            ),
        )
    return target
