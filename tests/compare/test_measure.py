"""Measurements by hand."""

from __future__ import annotations

import pytest

from transfuse.compare.job import Constraints
from transfuse.compare.measure import answered, closed
from transfuse.compare.plan import recommend


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("Ines Varro, who", ["Ines Varro"], True),
        ("the great Ines Varro.", ["ines varro"], True),
        ("Ines\nVarro", ["Ines Varro"], False),
        ("Ines Varros", ["Ines Varro"], False),
        ("", ["Ines Varro"], False),
        ("a copper bell!", ["the copper bell"], True),
        ("1687.", ["1867", "1687"], True),
    ],
)
def test_answered(text, answers, right):
    assert answered(text, answers) is right


def items(prompt, paraphrase):
    return {"prompt": prompt, "paraphrase": paraphrase}


def test_gap_closed_by_hand():
    base = items([0.0, 0.0], [0.0, 0.5])
    reference = items([1.0, 1.0], [1.0, 1.0])
    assert closed(reference, base, reference)["mean"] == 1.0
    assert closed(base, base, reference)["mean"] == 0.0
    half = closed(items([1.0, 1.0], [0.75, 0.5]), base, reference)
    assert half["mean"] == pytest.approx((0.625 - 0.25) / (1.0 - 0.25))
    assert half["low"] <= half["mean"] <= half["high"]
    assert closed(reference, base, base) is None  # nothing to close


def test_items_without_paraphrases_count_by_their_prompt():
    base, reference = items([0.0], [None]), items([1.0], [None])
    assert closed(items([1.0], [None]), base, reference)["mean"] == 1.0


def record(name, recall, locality, **changes):
    figure = {"mean": recall, "low": recall, "high": recall, "n": 4}
    return {
        "carrier": name, "status": "done", "reason": None, "baseline": False, "uses_context": False,
        "access": ["weights"], "reversible": True, "recall": {"prompt": figure, "paraphrase": figure},
        "gap_closed": figure, "locality": {"all": {"mean": locality}}, "perplexity_ratio": 1.0,
        "install_seconds": 10.0, "install_peak_bytes": 1e9, "stored_bytes": 1e6,
        "latency_seconds": {"mean": 0.5}, "tokens_read": 12.0, **changes,
    }  # fmt: skip


def test_recommendation_weighs_gain_against_damage():
    records = [record("strong", 0.9, 0.5), record("careful", 0.8, 0.95), record("gold-context", 1.0, 1.0)]
    found = recommend(records, Constraints(), "gold-context")
    assert found["carrier"] == "careful" and found["runner_up"] == "strong"
    assert {e["carrier"] for e in found["excluded"]} == {"gold-context"}


@pytest.mark.parametrize(
    ("constraints", "why"),
    [
        ({"max_latency": 0.4}, "max_latency"),
        ({"max_bytes": 1000}, "max_bytes"),
        ({"max_install_seconds": 5.0}, "max_install_seconds"),
        ({"max_memory": 10}, "max_memory"),
        ({"max_tokens_read": 10.0}, "max_tokens_read"),
        ({"min_locality": 0.99}, "min_locality"),
        ({"min_recall": 0.95}, "min_recall"),
        ({"weight_access": False}, "weights"),
    ],
)
def test_each_constraint_excludes(constraints, why):
    found = recommend([record("lora", 0.9, 0.9)], Constraints(**constraints), "gold-context")
    assert found["carrier"] is None
    assert why in found["excluded"][0]["reason"]


def test_context_and_reversibility_exclude():
    records = [record("bm25", 0.9, 0.9, uses_context=True), record("burnt", 0.9, 0.9, reversible=False)]
    assert recommend(records, Constraints(context=False), "x")["carrier"] == "burnt"
    assert recommend(records, Constraints(reversible=True), "x")["carrier"] == "bm25"


def test_failures_and_the_useless_are_named_not_chosen():
    failed = record("rome", 0, 0, status="failed", reason="ran out of memory")
    found = recommend([failed, record("nothing", 0.0, 1.0)], Constraints(), "gold-context")
    assert found["carrier"] is None
    reasons = {e["carrier"]: e["reason"] for e in found["excluded"]}
    assert "ran out of memory" in reasons["rome"] and "none of the gap" in reasons["nothing"]
