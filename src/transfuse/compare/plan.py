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


def _recall(record: Record) -> float | None:
    """Share of held-out paraphrases answered; of prompts, where no paraphrase was held out."""
    recall = record["recall"]
    return _mean(recall["paraphrase"] if recall["paraphrase"] is not None else recall["prompt"])


def _asked(record: Record) -> str:
    held_out = record["recall"]["paraphrase"] is not None
    return "of the held-out paraphrases" if held_out else "of the prompts (no paraphrase was held out)"


_LIMITS: tuple[
    tuple[str, str, Callable[[Record], float | None], Callable[[float, float], bool], str], ...
] = (
    ("max_latency", "latency", lambda r: _mean(r["latency_seconds"]), operator.le, "s per answer"),
    ("max_bytes", "stores", lambda r: r["stored_bytes"], operator.le, "bytes"),
    ("max_install_seconds", "takes", lambda r: r["install_seconds"], operator.le, "s to install"),
    ("max_memory", "needs", lambda r: r["install_peak_bytes"], operator.le, "bytes of memory"),
    ("max_tokens_read", "reads", lambda r: r["tokens_read"], operator.le, "tokens per answer"),
    ("min_locality", "keeps", lambda r: _mean(r["locality"]["all"]), operator.ge, "of other answers"),
    ("min_recall", "answers", _recall, operator.ge, "of what was asked"),
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
        if limit is None:
            continue
        if value is None:
            return f"was not measured ({name} is {limit:.3g})"
        if not fits(value, limit):
            return f"{verb} {value:.3g} {unit} ({name} is {limit:.3g})"
    return None


def score(record: Record, base: Record | None) -> float:
    """Gap closed times locality: what was gained, discounted by what was damaged.

    Without a gap to close, what is answered beyond the untouched model takes its place.
    """
    gained = _mean(record["gap_closed"])
    if gained is None:
        gained = (_recall(record) or 0.0) - ((_recall(base) or 0.0) if base is not None else 0.0)
    kept = _mean(record["locality"]["all"])
    return gained * (1.0 if kept is None else kept)


def recommend(records: Sequence[Record], constraints: Constraints, reference: str) -> dict[str, Any]:
    """Choose among the measured carriers that keep the constraints, by gap closed times locality.

    The untouched model and the reference (which is told which document holds the answer) are no candidates, nor is
    what answers no more than the untouched model. A carrier that lacks the figure of a constraint does not keep it.
    Of carriers within 0.02 of the best score, the one with the shortest latency is chosen.

    Returns:
        `{"carrier": name or None, "reasons": [...], "excluded": [{"carrier", "reason"}], "runner_up": name or None}`.
    """
    out: list[dict[str, str]] = []
    candidates: list[Record] = []
    base = next((r for r in records if r["status"] == "done" and r.get("baseline")), None)

    def worth(record: Record) -> float:
        return score(record, base)

    for record in records:
        name = record["carrier"]
        if record["status"] != "done":
            out.append(
                {"carrier": name, "reason": f"{record['status']}: {record.get('reason') or ''}".strip(": ")}
            )
        elif record.get("baseline"):
            out.append({"carrier": name, "reason": "is the untouched model"})
        elif record.get("uses", name) == reference:
            out.append(
                {"carrier": name, "reason": "is the reference: it is told which text holds the answer"}
            )
        elif (why := excluded(record, constraints)) is not None:
            out.append({"carrier": name, "reason": why})
        elif worth(record) <= 0:
            why = (
                "it closes none of the gap"
                if record["gap_closed"]
                else "it answers no more than the untouched model"
            )
            out.append({"carrier": name, "reason": f"moved no knowledge: {why}"})
        else:
            candidates.append(record)
    candidates.sort(key=worth, reverse=True)
    gapless = [] if any(r.get("gap_closed") for r in records) else [
        f"There is no gap to close: {reference} answers no more than the untouched model, or one of them was not "
        "measured. What counts is what a carrier answers beyond the untouched model."
    ]  # fmt: skip
    if not candidates:
        reasons = [
            *gapless,
            "No carrier keeps every constraint and answers more than the untouched model; each is named below, with "
            "what speaks against it.",
        ]
        return {"carrier": None, "reasons": reasons, "excluded": out, "runner_up": None}
    near = [r for r in candidates if worth(candidates[0]) - worth(r) <= 0.02]
    best = min(near, key=lambda r: _mean(r["latency_seconds"]) or 0.0)
    others = [r for r in candidates if r is not best]
    gap, kept, ratio = _mean(best["gap_closed"]), _mean(best["locality"]["all"]), best["perplexity_ratio"]
    reasons = [
        *gapless,
        f"It answers {_recall(best) or 0:.0%} {_asked(best)}"
        + (f" and closes {gap:.0%} of the gap to {reference}." if gap is not None else "."),
        (
            "Nothing was asked that shows whether other answers stayed as they were"
            if kept is None
            else f"It leaves {kept:.0%} of other answers as they were"
        )
        + (
            "; perplexity on neutral text is no longer finite."
            if ratio is None
            else f"; perplexity on neutral text changes by a factor of {ratio:.3g}."
        ),
        f"It takes {best['install_seconds']:.3g} s to install, stores {best['stored_bytes'] / 1e6:.3g} MB, reads "
        f"{best['tokens_read']:.3g} tokens and takes {_mean(best['latency_seconds']) or 0:.3g} s per answer.",
    ]
    if others:
        second = others[0]
        reasons.append(
            f"Next is {second['carrier']}, with {worth(second):.2f} against {worth(best):.2f} in "
            f"{'gap closed' if gap is not None else 'what is gained'} times locality."
            + (" It is slower." if worth(second) > worth(best) else "")
        )
    return {
        "carrier": best["carrier"],
        "reasons": reasons,
        "excluded": out,
        "runner_up": others[0]["carrier"] if others else None,
    }
