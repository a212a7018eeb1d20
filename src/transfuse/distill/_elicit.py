"""Knowledge out of a language model as text: label, expand, curate, feedback, self_train.

Each asks a `core.llm` backend (a local model, a server, a script) and returns a `datasets.Dataset` of plain columns:

    prompt, target [, ...]          to be learnt from: `core.batches.encode_examples`, then `Distiller`
    prompt, chosen, rejected        preferences: `preference_rows`, then `Distiller` with `DPO`

    teacher = cached(Local(*load("smollm2-135m")), "answers")
    solved = label(teacher, problems, kind="reasoning", samples=4, temperature=0.7)

Every request is determined by the arguments and the answers before it, seeds included, so with a backend in
`core.llm.cached` an interrupted call starts again where it was, and a finished one costs nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..core.errors import BadInput
from ..core.llm import Backend
from ..core.runs import check_positive
from ._elicit_parts import (
    CORRECT,
    CURATE,
    EVOLVE,
    EXPAND,
    JUDGE,
    REASON,
    REWRITE,
    SCORE,
    Verifier,
    accepted,
    answered,
    check_samples,
    check_threshold,
    final_answer,
    is_right,
    items_of,
    preference_rows,
    rouge_l,
    sampled,
    score_in,
    table,
    tasks_in,
    usable_task,
    verdict_in,
)

__all__ = ["curate", "expand", "feedback", "label", "preference_rows", "rouge_l", "self_train"]

Items = Sequence[str | Mapping[str, Any]]
_CHOICE = {"enum": ["A", "B", "tie"]}
_POINTS = {"enum": [0, 1, 2, 3, 4, 5]}


def label(
    teacher: Backend,
    items: Items,
    *,
    kind: Literal["answer", "reasoning"] = "answer",
    instruction: str = "",
    samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    verifier: Verifier | None = None,
) -> Any:
    """Labelling: the teacher answers given prompts.

    Rows with an `answer` keep only labels that reach it, by normalised comparison of the whole answer, or of what
    stands after "Answer:" in reasoning; rows without one keep all.

    Args:
        teacher: Who answers.
        items: Prompts, or dicts with `prompt` and optionally `answer`, a text or several accepted ones.
        kind: "answer", or "reasoning": steps, then a line "Answer: ...". Replies without that line are dropped.
        instruction: Put before each prompt when asking; it is not in the result.
        samples: Answers drawn per prompt; equal ones are kept once. More than 1 needs a temperature.
        max_tokens: Length limit of an answer; longer ones are dropped.
        temperature: Of the sampling.
        seed: Of the sampling.
        verifier: Decides in place of the comparison: gets the row and the final answer.

    Returns:
        `prompt`, `target`, `answer` (the final one).

    Raises:
        BadInput: no rows, a row without a prompt, another kind, or samples at temperature 0.
    """
    rows = items_of(items)
    check_samples(samples, temperature)
    if kind not in ("answer", "reasoning"):
        raise BadInput("kind", kind, "is not known", 'use "answer" or "reasoning"')
    asked = []
    for row in rows:
        prompt = f"{instruction}\n\n{row['prompt']}" if instruction else row["prompt"]
        asked += [REASON.format(prompt=prompt) if kind == "reasoning" else prompt] * samples
    replies = teacher.complete(asked, max_tokens=max_tokens, temperature=temperature, seed=seed)
    found: dict[tuple[int, str], dict[str, str]] = {}
    for place, reply in enumerate(replies):
        number, text = place // samples, reply.text.strip()
        final = final_answer(text) if kind == "reasoning" else text
        if text and final and not reply.truncated and accepted(rows[number], final, verifier):
            row = {"prompt": rows[number]["prompt"], "target": text, "answer": final}
            found.setdefault((number, text), row)
    return table(list(found.values()), "prompt", "target", "answer")


def expand(
    teacher: Backend,
    seeds: Items,
    *,
    count: int,
    kind: Literal["self-instruct", "evolve"] = "self-instruct",
    demonstrations: int = 8,
    own: int = 2,
    per_request: int = 4,
    threshold: float = 0.7,
    rounds: int | None = None,
    max_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
) -> Any:
    """Expansion: new prompts from given ones, then their answers.

    "self-instruct" (arXiv 2212.10560) shows tasks, some of them already its own, and keeps new ones whose ROUGE-L with
    every task so far is below the threshold. "evolve" (arXiv 2304.12244) rewrites a task to be harder, or into a rarer
    one of its field; what came out is rewritten further.

    Args:
        teacher: Who writes.
        seeds: Prompts to begin with.
        count: New prompts wanted; fewer come back when `rounds` are over.
        kind: See above.
        demonstrations: Tasks shown per request.
        own: How many of these are new ones, once there are enough; at most all of them.
        per_request: New tasks asked for per request.
        threshold: Of ROUGE-L; rewriting only refuses the same words again.
        rounds: Most requests; 4 per prompt wanted by default.
        max_tokens: Length limit of a request's reply and of an answer.
        temperature: Of the sampling.
        seed: Of the sampling and of what is shown.

    Returns:
        `prompt`, `target`, `parent` (the task it was rewritten from; empty for self-instruct).

    Raises:
        BadInput: no seeds, or a number out of range.
    """
    if kind not in ("self-instruct", "evolve"):
        raise BadInput("kind", kind, "is not known", 'use "self-instruct" or "evolve"')
    given = {"count": count, "demonstrations": demonstrations, "per_request": per_request}
    check_positive(**given, rounds=rounds)
    if own < 0:
        raise BadInput("own", own, "is negative", "give a number from 0 up")
    check_threshold(threshold)
    pool = [row["prompt"] for row in items_of(seeds, argument="seeds")]
    first, draws = len(pool), random.Random(seed)
    fresh: list[dict[str, str]] = []
    for attempt in range(4 * count if rounds is None else rounds):
        if len(fresh) >= count:
            break
        if kind == "evolve":
            parent = draws.choice(pool)
            way = EVOLVE[draws.choice(sorted(EVOLVE))]
            request = REWRITE.format(way=way, prompt=parent)
        else:
            parent = ""
            news = draws.sample(pool[first:], min(own, demonstrations, len(pool) - first))
            shown = [*draws.sample(pool[:first], min(demonstrations - len(news), first)), *news]
            listed = "\n".join(f"{i}. {task}" for i, task in enumerate(shown, 1))
            request = EXPAND.format(shown=listed, count=per_request)
        [reply] = teacher.complete(
            [request], max_tokens=max_tokens, temperature=temperature, seed=seed + attempt
        )
        tasks = [reply.text.strip()] if kind == "evolve" else tasks_in(reply.text)
        if reply.truncated:
            tasks = tasks[:-1]  # the last one is cut off
        for task in tasks:
            limit = threshold if kind == "self-instruct" else 1.0
            if len(fresh) < count and usable_task(task) and all(rouge_l(task, old) < limit for old in pool):
                pool.append(task)
                fresh.append({"prompt": task, "parent": parent})
    return answered(teacher, fresh, ("parent",), max_tokens, temperature, seed)


def curate(
    teacher: Backend,
    *,
    topics: Sequence[str],
    personas: Sequence[str] = ("",),
    difficulties: Sequence[str] = ("easy", "hard"),
    per_cell: int = 1,
    threshold: float = 0.7,
    max_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
) -> Any:
    """Curation: questions from meta-information alone, one cell of topic x persona x difficulty at a time.

    Args:
        teacher: Who writes.
        topics: What about.
        personas: As asked by whom; "" for nobody in particular.
        difficulties: Words put before "question".
        per_cell: Questions per cell.
        threshold: Questions whose ROUGE-L with an earlier one reaches it are dropped.
        max_tokens: Length limit of a question and of an answer.
        temperature: Of the sampling.
        seed: Of the sampling.

    Returns:
        `prompt`, `target`, `topic`, `persona`, `difficulty`.

    Raises:
        BadInput: an empty list, a threshold that is no share, or per_cell below 1 or above it at temperature 0.
    """
    for name, values in (("topics", topics), ("personas", personas), ("difficulties", difficulties)):
        if isinstance(values, str) or len(values) == 0:
            raise BadInput(name, values, "is not a list", "give at least one entry")
    check_samples(per_cell, temperature, "per_cell")
    check_threshold(threshold)
    cells = list(itertools.product(topics, personas, difficulties))
    asked = []
    for topic, persona, difficulty in cells:
        who = f", as {persona} would ask it" if persona else ""
        asked += [CURATE.format(topic=topic, persona=who, difficulty=difficulty)] * per_cell
    replies = teacher.complete(asked, max_tokens=max_tokens, temperature=temperature, seed=seed)
    fresh: list[dict[str, str]] = []
    for place, reply in enumerate(replies):
        topic, persona, difficulty = cells[place // per_cell]
        text = reply.text.strip()
        new = all(rouge_l(text, row["prompt"]) < threshold for row in fresh)
        if usable_task(text) and not reply.truncated and new:
            fresh.append({"prompt": text, "topic": topic, "persona": persona, "difficulty": difficulty})
    more = ("topic", "persona", "difficulty")
    return answered(teacher, fresh, more, max_tokens, temperature, seed)


def feedback(
    teacher: Backend,
    items: Items,
    *,
    kind: Literal["pairs", "correct"] = "pairs",
    student: Backend | None = None,
    samples: int = 2,
    constrained: bool = False,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> Any:
    """Feedback: the teacher judges or corrects what the student wrote.

    "pairs": the teacher sees two answers to a prompt in both orders, and a preference counts only if it is the same in
    both. "correct": the teacher says that an answer is right, and the row is left out, or gives a corrected one.

    Args:
        teacher: Who judges, without sampling.
        items: Prompts, if `student` answers them here; else dicts with `prompt` and `candidates`, the student's
            answers (for "correct" each of them is a row).
        kind: See above.
        student: Who answers.
        samples: Answers of the student per prompt.
        constrained: Hold the judge to its three words by a schema (needs the extra "serve").
        max_tokens: Length limit of an answer.
        temperature: Of the student's sampling.
        seed: Of the student's sampling.

    Returns:
        "pairs": `prompt`, `chosen`, `rejected`. "correct": `prompt`, `target`, `student`.

    Raises:
        BadInput: rows without candidates and no student, or another kind.
    """
    if kind not in ("pairs", "correct"):
        raise BadInput("kind", kind, "is not known", 'use "pairs" or "correct"')
    rows = items_of(items) if student is not None else items_of(items, "candidates")
    if student is not None:
        rows = sampled(student, rows, samples, max_tokens, temperature, seed)
    if kind == "correct":
        written = [(row["prompt"], text) for row in rows for text in dict.fromkeys(row["candidates"])]
        asked = [CORRECT.format(prompt=prompt, answer=text) for prompt, text in written]
        replies = teacher.complete(asked, max_tokens=max_tokens, seed=seed)
        fixed = [
            {"prompt": prompt, "target": reply.text.strip(), "student": text}
            for (prompt, text), reply in zip(written, replies, strict=True)
            if reply.text.strip() and not reply.truncated and not is_right(reply.text, text)
        ]
        return table(fixed, "prompt", "target", "student")
    pairs = [
        (row["prompt"], *two)
        for row in rows
        for two in itertools.combinations(dict.fromkeys(row["candidates"]), 2)
    ]
    asked = []
    for prompt, a, b in pairs:
        asked += [JUDGE.format(prompt=prompt, first=x, second=y) for x, y in ((a, b), (b, a))]
    schema = _CHOICE if constrained else None
    replies = teacher.complete(asked, max_tokens=16, schema=schema, seed=seed)
    said = [r.parsed if constrained else verdict_in(r.text) for r in replies]
    found = []
    for i, (prompt, a, b) in enumerate(pairs):
        both = (said[2 * i], said[2 * i + 1])
        if both == ("A", "B"):
            found.append({"prompt": prompt, "chosen": a, "rejected": b})
        elif both == ("B", "A"):
            found.append({"prompt": prompt, "chosen": b, "rejected": a})
    return table(found, "prompt", "chosen", "rejected")


def self_train(
    student: Backend,
    items: Items,
    *,
    kind: Literal["verify", "reward", "spin"] = "verify",
    verifier: Verifier | None = None,
    samples: int = 4,
    constrained: bool = False,
    max_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
) -> Any:
    """Self-knowledge: the student's own answers, filtered.

    "verify": those that are right are learnt. "reward" (arXiv 2401.10020): the student rates its answers from 0 to 5,
    and its best is preferred to its worst where these differ. "spin" (arXiv 2401.01335): the given answer is preferred
    to each of its own.

    Args:
        student: Who answers.
        items: Prompts; dicts with `answer` for "verify" without a verifier, with `target` for "spin".
        kind: See above.
        verifier: Whether an answer is right: gets the row and the text. By default the final answer after "Answer:",
            or else the whole text, is compared with `answer`.
        samples: Answers per prompt.
        constrained: Hold the ratings to a number by a schema (needs the extra "serve").
        max_tokens: Length limit of an answer; longer ones are dropped.
        temperature: Of the sampling.
        seed: Of the sampling.

    Returns:
        "verify": `prompt`, `target`. Else `prompt`, `chosen`, `rejected`, for "reward" with `chosen_score` and
        `rejected_score`.

    Raises:
        BadInput: rows that lack what the kind needs, another kind, or samples at temperature 0.
    """
    needs = {"verify": () if verifier else ("answer",), "reward": (), "spin": ("target",)}
    if kind not in needs:
        raise BadInput("kind", kind, "is not known", f"use one of {', '.join(needs)}")
    rows = items_of(items, *needs[kind])
    drawn = sampled(student, rows, samples, max_tokens, temperature, seed)
    if kind == "spin":
        pairs = [
            {"prompt": row["prompt"], "chosen": row["target"], "rejected": text}
            for row in drawn
            for text in row["candidates"]
            if text.split() != row["target"].split()
        ]
        return table(pairs, "prompt", "chosen", "rejected")
    if kind == "verify":
        kept = [
            {"prompt": row["prompt"], "target": text}
            for row in drawn
            for text in row["candidates"]
            if accepted(row, text if verifier else final_answer(text) or text, verifier)
        ]
        return table(kept, "prompt", "target")
    asked = [SCORE.format(prompt=r["prompt"], answer=text) for r in drawn for text in r["candidates"]]
    schema = _POINTS if constrained else None
    replies = student.complete(asked, max_tokens=32, schema=schema, seed=seed)
    points = iter(r.parsed if constrained else score_in(r.text) for r in replies)
    found = []
    for row in drawn:
        rated = [(next(points), text) for text in row["candidates"]]
        known = [(float(score), text) for score, text in rated if score is not None]
        if len(known) > 1:
            high, low = max(known, key=lambda x: x[0]), min(known, key=lambda x: x[0])
            if high[0] > low[0]:
                pair = {"prompt": row["prompt"], "chosen": high[1], "rejected": low[1]}
                found.append({**pair, "chosen_score": high[0], "rejected_score": low[0]})
    return table(found, "prompt", "chosen", "rejected", numbers=("chosen_score", "rejected_score"))
