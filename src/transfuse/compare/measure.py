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
    """What the untouched model does, kept for the other carriers: its own answers where nothing should change."""
    known_prompts = [prompt for prompt, _ in job.known]
    found = base.generate(known_prompts, CONTINUED + 2)
    known = [p for (p, t), text in zip(job.known, found, strict=True) if answered(text, [t])][:KNOWN]
    neighbours = [n for item in job.knowledge.items for n in item.neighbours]
    prompts = [*neighbours, *known]
    continuations = [text.strip() for text in base.generate(prompts, CONTINUED)]
    kept = [i for i, text in enumerate(continuations) if text]
    groups = ["neighbours"] * len(neighbours) + ["unrelated"] * len(known)
    predicted = base.predictions([prompts[i] for i in kept], [continuations[i] for i in kept])
    return {
        "prompts": [prompts[i] for i in kept],
        "continuations": [continuations[i] for i in kept],
        "groups": [groups[i] for i in kept],
        "tokens": [tokens.tolist() for tokens in predicted],
        "perplexity": base.perplexity(job.neutral),
        "prompt": base.generate([item.prompt for item in job.knowledge.items], max_new_tokens),
    }


def _interval(values: Sequence[float]) -> dict[str, float] | None:
    if not len(values):
        return None
    mean, low, high = bootstrap_interval([float(v) for v in values])
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


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
    groups = base["groups"]
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
            "neighbours": _interval([s for s, g in zip(same, groups, strict=True) if g == "neighbours"]),
            "unrelated": _interval([s for s, g in zip(same, groups, strict=True) if g == "unrelated"]),
            "all": _interval(same),
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
    method: dict[str, Any], base: dict[str, Any], reference: dict[str, Any], resamples: int = 2000
) -> dict[str, float] | None:
    """Gap closed, (method - base) / (reference - base), on held-out paraphrases where there are any.

    The interval resamples items, keeping each item's three results together.
    """
    rows = []
    for i in range(len(method["prompt"])):
        key = "paraphrase" if method["paraphrase"][i] is not None else "prompt"
        rows.append([method[key][i], base[key][i], reference[key][i]])
    table = np.asarray(rows, dtype=float)
    point = gap_closed(*table.mean(0))
    if not np.isfinite(point):
        return None
    draws = np.random.default_rng(0).integers(0, len(table), (resamples, len(table)))
    means = table[draws].mean(1)  # [resamples, 3]
    gaps = means[:, 2] - means[:, 1]
    ratios = (means[:, 0] - means[:, 1])[gaps > 0] / gaps[gaps > 0]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"mean": float(point), "low": float(low), "high": float(high), "n": len(table)}
