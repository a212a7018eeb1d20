"""The recommendation: which carrier, under the user's constraints, and why."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .job import Constraints

__all__ = ["excluded", "recommend"]

Record = Mapping[str, Any]


def _mean(value: Any) -> float | None:
    return value["mean"] if isinstance(value, Mapping) else value


def _paraphrase(record: Record) -> float | None:
    recall = record["recall"]
    return _mean(recall["paraphrase"] if recall["paraphrase"] is not None else recall["prompt"])


_LIMITS: tuple[
    tuple[str, str, Callable[[Record], float | None], Callable[[float, float], bool], str], ...
] = (
    ("max_latency", "latency", lambda r: _mean(r["latency_seconds"]), operator.le, "s per answer"),
    ("max_bytes", "stores", lambda r: r["stored_bytes"], operator.le, "bytes"),
    ("max_install_seconds", "takes", lambda r: r["install_seconds"], operator.le, "s to install"),
    ("max_memory", "needs", lambda r: r["install_peak_bytes"], operator.le, "bytes of memory"),
    ("max_tokens_read", "reads", lambda r: r["tokens_read"], operator.le, "tokens per answer"),
    ("min_locality", "keeps", lambda r: _mean(r["locality"]["all"]), operator.ge, "of other answers"),
    ("min_recall", "answers", _paraphrase, operator.ge, "of held-out paraphrases"),
)


def excluded(record: Record, constraints: Constraints) -> str | None:
    """Why a measured carrier cannot be chosen, or None."""
    if constraints.reversible and not record["reversible"]:
        return "cannot be removed again"
    if constraints.weight_access is False and "weights" in record["access"]:
        return "needs access to the weights"
    if constraints.context is False and record["uses_context"]:
        return "reads extra text at answer time"
    for name, verb, value_of, fits, unit in _LIMITS:
        limit, value = getattr(constraints, name), value_of(record)
        if limit is None or value is None:
            continue
        if not fits(value, limit):
            return f"{verb} {value:.3g} {unit} ({name} is {limit:.3g})"
    return None


def score(record: Record) -> float:
    """Gap closed times locality: what was gained, discounted by what was damaged."""
    gained = _mean(record["gap_closed"])
    kept = _mean(record["locality"]["all"])
    return (gained if gained is not None else _paraphrase(record) or 0.0) * (1.0 if kept is None else kept)


def recommend(records: Sequence[Record], constraints: Constraints, reference: str) -> dict[str, Any]:
    """Choose among the measured carriers that keep the constraints, by gap closed times locality.

    The untouched model and the reference (which is told which document holds the answer) are no candidates. Of
    carriers within 0.02 of the best score, the one with the shortest latency is chosen.

    Returns:
        `{"carrier": name or None, "reasons": [...], "excluded": [{"carrier", "reason"}], "runner_up": name or None}`.
    """
    out: list[dict[str, str]] = []
    candidates: list[Record] = []
    for record in records:
        name = record["carrier"]
        if record["status"] != "done":
            out.append(
                {"carrier": name, "reason": f"{record['status']}: {record.get('reason') or ''}".strip(": ")}
            )
        elif name == reference:
            out.append(
                {"carrier": name, "reason": "is the reference: it is told which text holds the answer"}
            )
        elif record.get("baseline"):
            out.append({"carrier": name, "reason": "is the untouched model"})
        elif (why := excluded(record, constraints)) is not None:
            out.append({"carrier": name, "reason": why})
        elif score(record) <= 0:
            out.append({"carrier": name, "reason": "moved no knowledge: it closes none of the gap"})
        else:
            candidates.append(record)
    candidates.sort(key=score, reverse=True)
    if not candidates:
        reasons = [
            "No carrier keeps every constraint and closes part of the gap; loosen one of those named below."
        ]
        return {"carrier": None, "reasons": reasons, "excluded": out, "runner_up": None}
    near = [r for r in candidates if score(candidates[0]) - score(r) <= 0.02]
    best = min(near, key=lambda r: _mean(r["latency_seconds"]) or 0.0)
    others = [r for r in candidates if r is not best]
    gap = _mean(best["gap_closed"])
    reasons = [
        f"It answers {_paraphrase(best) or 0:.0%} of the held-out paraphrases"
        + (f" and closes {gap:.0%} of the gap to {reference}." if gap is not None else "."),
        f"It leaves {_mean(best['locality']['all']) or 0:.0%} of other answers as they were; perplexity on neutral "
        f"text changes by a factor of {best['perplexity_ratio']:.3g}.",
        f"It takes {best['install_seconds']:.3g} s to install, stores {best['stored_bytes'] / 1e6:.3g} MB, reads "
        f"{best['tokens_read']:.3g} tokens and takes {_mean(best['latency_seconds']) or 0:.3g} s per answer.",
    ]
    if others:
        second = others[0]
        reasons.append(
            f"Next is {second['carrier']}, with {score(second):.2f} against {score(best):.2f} in gap closed times "
            "locality."
        )
    return {
        "carrier": best["carrier"],
        "reasons": reasons,
        "excluded": out,
        "runner_up": others[0]["carrier"] if others else None,
    }
