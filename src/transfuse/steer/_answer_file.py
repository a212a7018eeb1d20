"""A file of questions and a file of triples to a file of answers: what a recipe runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transfuse.core.data import read_qa
from transfuse.core.errors import BadInput
from transfuse.core.extras import require
from transfuse.core.files import atomic_dir, atomic_write
from transfuse.core.lineage import write_lineage
from transfuse.steer._answers import QueryResult, score
from transfuse.steer._graph_index import KGIndex
from transfuse.steer._graph_tokens import add_query_tokens

__all__ = ["answer_questions"]


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: str | os.PathLike[str],
    graph: str | os.PathLike[str],
    output: str | os.PathLike[str],
    variables: Sequence[str] = ("uri", "x"),
    max_new_tokens: int = 128,
    batch_size: int = 8,
    **settings: Any,
) -> Path:
    """Answer a file of questions from a file of triples.

    Writes `answers.jsonl` into `output`, a line per question: id, question, sparql, answers, accepted, status.

    Args:
        model: Trained to write flat queries.
        tokenizer: Its tokenizer.
        questions: File of questions with accepted answers, as `core.data.read_qa` reads it.
        graph: N-Triples, Turtle, RDF/XML and whatever else pyoxigraph reads, by the ending of its name.
        output: Folder of the result; replaced at once.
        variables: Those the model was trained with.
        max_new_tokens: Most tokens of a query.
        batch_size: Questions decoded together.
        **settings: Of `Sparkle`.

    Raises:
        BadInput: a graph that cannot be read or links nothing, a tokenizer without the words of the queries.
    """
    from transfuse.steer.sparkle import Sparkle

    ox = require("pyoxigraph", extra="graph")
    asked = read_qa(questions)
    size = len(tokenizer)
    add_query_tokens(tokenizer, variables)
    if len(tokenizer) > size:
        raise BadInput(
            "tokenizer", type(tokenizer).__name__, "lacks words of the query language",
            "train the model with them first: extend(model, tokenizer), Sparkle.examples",
        )  # fmt: skip
    store = ox.Store()
    try:
        store.load(path=os.fspath(graph))
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput("graph", os.fspath(graph), f"cannot be read ({error})", "give .nt or .ttl") from error
    index = KGIndex.from_store(store, tokenizer, variables=variables)
    sparkle = Sparkle(model, tokenizer, index, store, **settings)
    answered = sparkle.answer(
        [qa.question for qa in asked], max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    found = cast("list[QueryResult]", answered)
    rows = [
        {"id": qa.id, "question": qa.question, "sparql": result.sparql, "answers": list(result.answers),
         "accepted": list(qa.answers), "status": result.status}
        for qa, result in zip(asked, found)
    ]  # fmt: skip
    scores = score(found, [[qa.answers] for qa in asked])
    target = Path(output)
    with atomic_dir(target) as made:
        atomic_write(made / "answers.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        write_lineage(
            made, method="sparkle", inputs={"questions": Path(questions), "graph": Path(graph)},
            measurements=dict(scores._asdict()),
        )  # fmt: skip
    return target
