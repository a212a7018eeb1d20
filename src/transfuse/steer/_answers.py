"""Answers of a graph, and how sets of answers are scored."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from transfuse.core.errors import BadInput
from transfuse.core.extras import require
from transfuse.steer._flat_sparql import to_sparql
from transfuse.steer._graph_index import KGIndex

__all__ = ["Answer", "QueryResult", "Scores", "answer_f1", "execute", "first_answered", "hits_at_1", "score"]

_NOT_RUN = (SyntaxError, ValueError, OSError, RuntimeError)  # what a query may fail with; BadInput is one

Answer = str | tuple[str, ...]
"""An IRI, a literal's text, "true" or "false"; a tuple of them where a query selects several variables."""


class QueryResult(NamedTuple):
    """What came of a question.

    Attributes:
        sparql: The query that was taken: the first with an answer, else the first that ran; where none ran, the
            first that could be written down, or None.
        answers: Its answers, each once.
        status: "answered"; "empty", if some query ran and none had an answer; "inexecutable", if none ran.
        flat: The generated string behind `sparql`, or the first one.
    """

    sparql: str | None
    answers: tuple[Answer, ...]
    status: Literal["answered", "empty", "inexecutable"]
    flat: str


def execute(store: Any, sparql: str) -> tuple[Answer, ...]:
    """Run a query on a `pyoxigraph.Store`: its answers, each once, in the store's order.

    Unbound values are left out; an ASK query has one answer, "true" or "false".

    Raises:
        SyntaxError: the query cannot be parsed.
        OSError, RuntimeError, ValueError: it cannot be evaluated.
    """
    ox = require("pyoxigraph", extra="graph")
    found = store.query(sparql)
    if isinstance(found, ox.QueryBoolean):
        return ("true" if found else "false",)
    rows = (tuple(term.value for term in solution if term is not None) for solution in found)
    return tuple(dict.fromkeys(row[0] if len(row) == 1 else row for row in rows if row))


def first_answered(
    queries: Sequence[Sequence[int]], index: KGIndex, tokenizer: PreTrainedTokenizerBase, store: Any
) -> QueryResult:
    """Run queries in turn: the first with an answer, else the first that ran.

    Args:
        queries: Token ids of flat queries, best first.
        index: For the IRIs.
        tokenizer: Of the ids.
        store: A `pyoxigraph.Store`.
    """
    ran: QueryResult | None = None
    failed: list[tuple[str | None, str]] = []
    for ids in dict.fromkeys(map(tuple, queries)):
        flat, sparql = index.tokens.decode(tokenizer, ids), None
        try:
            sparql = to_sparql(ids, index, tokenizer)
            answers = execute(store, sparql)
        except _NOT_RUN:
            failed.append((sparql, flat))
            continue
        if answers:
            return QueryResult(sparql, answers, "answered", flat)
        ran = ran or QueryResult(sparql, (), "empty", flat)
    first = next((pair for pair in failed if pair[0]), (failed or [(None, "")])[0])
    return ran or QueryResult(first[0], (), "inexecutable", first[1])


def answer_f1(predicted: Collection[Answer], gold: Collection[Answer]) -> float:
    """F1 of two sets, 0 to 1; 0 where either is empty."""
    a, b = set(predicted), set(gold)
    shared = len(a & b)
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def hits_at_1(
    predicted: Collection[Answer], gold: Collection[Answer], *, draws: int = 100, seed: int = 0
) -> float:
    """Share of uniform draws from the predicted set that are gold; 0 where it is empty."""
    if draws < 1:
        raise BadInput("draws", draws, "draws nothing", "give 1 or more")
    pool, right = sorted(set(predicted), key=str), set(gold)
    source = random.Random(seed)
    return sum(source.choice(pool) in right for _ in range(draws)) / draws if pool else 0.0


class Scores(NamedTuple):
    """Means over questions that have gold answers, each 0 to 1.

    Attributes:
        f1: F1 of the answer sets.
        exact_match: Share with F1 = 1.
        hits_at_1: Share of draws from the answers that are gold.
        inexecutable: Share where no query ran.
        invalid: Share where some query ran and none had an answer.
        questions: How many counted.
    """

    f1: float
    exact_match: float
    hits_at_1: float
    inexecutable: float
    invalid: float
    questions: int


def score(
    results: Sequence[QueryResult],
    gold: Sequence[Sequence[Collection[Answer]]],
    *,
    draws: int = 100,
    seed: int = 0,
) -> Scores:
    """Score results against gold answers.

    Args:
        results: One per question.
        gold: Per question the answers of each of its parses; the parse of best F1 counts, also for hits at 1. A
            question whose parses have no answers is left out.
        draws: As of `hits_at_1`.
        seed: As of `hits_at_1`.

    Raises:
        BadInput: lists that do not pair, or no question with gold answers.
    """
    if len(results) != len(gold):
        raise BadInput(
            "gold", len(gold), f"does not pair with {len(results)} results", "give one per question"
        )
    kept = [(result, [set(p) for p in parses if p]) for result, parses in zip(results, gold)]
    kept = [(result, parses) for result, parses in kept if parses]
    if not kept:
        raise BadInput("gold", len(gold), "holds no answers", "give the gold answers of some question")
    best = [
        (result, max(parses, key=lambda parse: answer_f1(result.answers, parse))) for result, parses in kept
    ]
    f1 = [answer_f1(result.answers, parse) for result, parse in best]
    hits = [hits_at_1(result.answers, parse, draws=draws, seed=seed) for result, parse in best]
    n = len(kept)
    return Scores(
        f1=sum(f1) / n,
        exact_match=sum(value == 1.0 for value in f1) / n,
        hits_at_1=sum(hits) / n,
        inexecutable=sum(result.status == "inexecutable" for result, _ in kept) / n,
        invalid=sum(result.status == "empty" for result, _ in kept) / n,
        questions=n,
    )
