"""What is measured of every carrier, in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..core.generate import encode_pair
from ..core.metrics import bootstrap_interval, contains_answer, gap_closed
from .answerer import Answerer
from .job import Job, Knowledge

__all__ = ["answered", "baseline", "measure"]

TIMED = 5  # answers timed one by one
KNOWN = 40  # facts known before that are asked again
CONTINUED = 4  # tokens of the base's own answers that must stay


def answered(text: str, answers: Sequence[str]) -> bool:
    """Whether the first line of generated text contains an accepted answer, as whole words.

    Case, punctuation and articles are ignored.
    """
    return contains_answer(text.strip().partition("\n")[0], list(answers))


def length_of_answers(job: Job, tokenizer: Any) -> int:
    """New tokens allowed per answer."""
    if job.recipe.max_new_tokens is not None:
        return job.recipe.max_new_tokens
    targets = [a for item in job.knowledge.items for a in item.answers]
    extra = 4 if job.knowledge.kind == "facts" else 12
    return max(len(encode_pair(tokenizer, "A", target)[1]) for target in targets) + extra


def baseline(job: Job, base: Answerer, max_new_tokens: int) -> dict[str, Any]:
    """What the untouched model does, kept for the other carriers: its own answers where nothing should change.

    Prompts that are taught or asked are left out, for there something should.
    """
    changing = job.knowledge.wordings
    asked = [(prompt, target) for prompt, target in job.known if prompt not in changing]
    found = base.generate([prompt for prompt, _ in asked], CONTINUED + 2)
    known = [p for (p, t), text in zip(asked, found, strict=True) if answered(text, [t])][:KNOWN]
    beside = [
        (i, n) for i, item in enumerate(job.knowledge.items) for n in item.neighbours if n not in changing
    ]
    neighbours = [n for _, n in beside]
    owners = [i for i, _ in beside] + [len(job.knowledge.items) + i for i in range(len(known))]
    prompts = [*neighbours, *known]
    continuations = [text.strip() for text in base.generate(prompts, CONTINUED)]
    kept = [i for i, text in enumerate(continuations) if text]
    groups = ["neighbours"] * len(neighbours) + ["unrelated"] * len(known)
    predicted = base.predictions([prompts[i] for i in kept], [continuations[i] for i in kept])
    return {
        "prompts": [prompts[i] for i in kept],
        "continuations": [continuations[i] for i in kept],
        "groups": [groups[i] for i in kept],
        "owners": [owners[i] for i in kept],
        "tokens": [tokens.tolist() for tokens in predicted],
        "perplexity": base.perplexity(job.neutral),
        "prompt": base.generate([item.prompt for item in job.knowledge.items], max_new_tokens),
    }


def _interval(values: Sequence[float]) -> dict[str, float] | None:
    if not len(values):
        return None
    mean, low, high = bootstrap_interval([float(v) for v in values])
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


def _kept(values: Sequence[float], owners: Sequence[int]) -> dict[str, float] | None:
    """Mean and interval of prompts, of which those of one item stand or fall together: items are resampled."""
    if not len(values):
        return None
    sums: dict[int, list[float]] = {}
    for value, owner in zip(values, owners, strict=True):
        total = sums.setdefault(owner, [0.0, 0.0])
        total[0], total[1] = total[0] + value, total[1] + 1.0
    totals, counts = _resampled(np.asarray(list(sums.values()))).T
    low, high = np.percentile(totals / counts, [2.5, 97.5])
    mean = float(np.mean(values))
    return {"mean": mean, "low": min(float(low), mean), "high": max(float(high), mean), "n": len(values)}


def _resampled(table: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """Column means `[resamples, C]` of rows `[N, C]` drawn with replacement."""
    draws = np.random.default_rng(0).integers(0, len(table), (resamples, len(table)))
    return np.stack([table[rows].mean(0) for rows in draws])


def recall_by_item(job: Job, answerer: Answerer, max_new_tokens: int) -> dict[str, Any]:
    """Per item: was the prompt answered, and which share of its held-out paraphrases."""
    knowledge = job.knowledge
    asked = [(i, p) for i, item in enumerate(knowledge.items) for p in (item.prompt, *item.asked)]
    texts = answerer.generate([p for _, p in asked], max_new_tokens)
    hits = [answered(t, knowledge.items[i].answers) for (i, _), t in zip(asked, texts, strict=True)]
    prompt: list[float] = []
    paraphrase: list[float | None] = []
    answers: list[str] = []
    at = 0
    for item in knowledge.items:
        prompt.append(float(hits[at]))
        answers.append(texts[at])
        rest = hits[at + 1 : at + 1 + len(item.asked)]
        paraphrase.append(float(np.mean(rest)) if rest else None)
        at += 1 + len(item.asked)
    return {"prompt": prompt, "paraphrase": paraphrase, "answers": answers}


def measure(
    job: Job, answerer: Answerer, base: dict[str, Any], max_new_tokens: int, told: Callable[[str], None]
) -> dict[str, Any]:
    """Recall, locality, perplexity, latency and reading cost of one carrier.

    Returns:
        The measured fields of a record, and `per_item` (what `gap closed` and its interval are made from).
    """
    knowledge = job.knowledge
    told("recall")
    recall = recall_by_item(job, answerer, max_new_tokens)
    told("locality")
    predicted = answerer.predictions(base["prompts"], base["continuations"]) if base["prompts"] else []
    same = [
        float(np.mean([a == b for a, b in zip(p.tolist(), q, strict=True)]))
        for p, q in zip(predicted, base["tokens"], strict=True)
    ]
    rows = list(zip(same, base["owners"], base["groups"], strict=True))

    def kept(*groups: str) -> dict[str, float] | None:
        chosen = [(value, owner) for value, owner, group in rows if group in groups]
        return _kept([value for value, _ in chosen], [owner for _, owner in chosen])

    told("perplexity")
    surprise = answerer.perplexity(job.neutral)
    told("latency")
    prompts = [p for item in knowledge.items for p in (item.asked or (item.prompt,))]
    step = max(1, len(prompts) // TIMED)
    timed = prompts[::step][:TIMED]
    answerer.generate(timed[:1], max_new_tokens)  # first calls allocate
    seconds = []
    for prompt in timed:
        start = time.perf_counter()
        answerer.generate([prompt], max_new_tokens)
        seconds.append(time.perf_counter() - start)
    asked = [value for value in recall["paraphrase"] if value is not None]
    return {
        "recall": {"prompt": _interval(recall["prompt"]), "paraphrase": _interval(asked)},
        "locality": {
            "neighbours": kept("neighbours"),
            "unrelated": kept("unrelated"),
            "all": kept("neighbours", "unrelated"),
        },
        "perplexity": surprise,
        "perplexity_ratio": surprise / base["perplexity"],
        "latency_seconds": _interval(seconds),
        "tokens_read": float(np.mean(answerer.tokens_read(prompts))),
        "samples": _samples(knowledge, base["prompt"], recall["answers"]),
        "per_item": {"prompt": recall["prompt"], "paraphrase": recall["paraphrase"]},
    }


def _samples(knowledge: Knowledge, before: Sequence[str], after: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for item, old, new in zip(knowledge.items, before, after, strict=True):
        ok = answered(new, item.answers)
        first = [text.strip().partition("\n")[0] for text in (old, new)]
        rows.append(
            {
                "prompt": item.prompt,
                "target": item.answers[0],
                "before": first[0],
                "after": first[1],
                "ok": ok,
            }
        )
    return rows


def closed(
    method: dict[str, Any], base: dict[str, Any], reference: dict[str, Any]
) -> dict[str, float | None] | None:
    """Gap closed, (method - base) / (reference - base), on held-out paraphrases where there are any.

    None where the reference is not above the base: then there is no gap, and the quotient would praise damage. The
    interval resamples items, keeping each item's three results together; it has no ends where more than 2.5 % of the
    samples show no gap.
    """
    rows = []
    for i in range(len(method["prompt"])):
        key = "paraphrase" if method["paraphrase"][i] is not None else "prompt"
        rows.append([method[key][i], base[key][i], reference[key][i]])
    table = np.asarray(rows, dtype=float)
    _, below, above = table.mean(0)
    if above <= below:
        return None
    point = float(gap_closed(*table.mean(0)))
    means = _resampled(table)
    gaps = means[:, 2] - means[:, 1]
    if (gaps <= 0).mean() > 0.025:
        return {"mean": point, "low": None, "high": None, "n": len(table)}
    ratios = (means[:, 0] - means[:, 1])[gaps > 0] / gaps[gaps > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"mean": point, "low": float(low), "high": float(high), "n": len(table)}
