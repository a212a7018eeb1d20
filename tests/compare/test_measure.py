"""Measurements by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from transfuse.compare.job import Constraints, Recipe, Source, read_job
from transfuse.compare.measure import _kept, answered, baseline, closed
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


def test_a_reference_below_the_base_leaves_no_gap():
    low, high = items([0.0, 0.0], [0.0, 0.25]), items([1.0, 1.0], [0.5, 0.5])
    for method in (low, high):
        assert closed(method, high, low) is None


def test_few_gaps_give_no_interval():
    """One item in three has a gap: three resamples in ten have none at all."""
    base, reference = items([0.0] * 3, [0.0] * 3), items([0.0] * 3, [1.0, 0.0, 0.0])
    found = closed(items([0.0] * 3, [0.5, 0.0, 0.0]), base, reference)
    assert found == {"mean": 0.5, "low": None, "high": None, "n": 3}


def test_prompts_of_one_item_are_resampled_together():
    generator = np.random.default_rng(5)
    values, owners = [], []
    for owner in range(12):
        hit = float(generator.random() < 0.5)
        values += [hit] * (1 + owner % 3)
        owners += [owner] * (1 + owner % 3)
    found = _kept(values, owners)
    assert found["n"] == len(values) and found["mean"] == pytest.approx(np.mean(values))
    draws = np.random.default_rng(1)
    slow = []
    for _ in range(4000):
        picked = [v for o in draws.integers(0, 12, 12) for v, w in zip(values, owners, strict=True) if w == o]
        slow.append(np.mean(picked))
    assert (found["low"], found["high"]) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.03)
    assert _kept([], []) is None


class Echo:
    """Says a fixed answer; counts the prompts it was asked."""

    def __init__(self):
        self.followed = []

    def generate(self, prompts, limit):
        return ["Paris" for _ in prompts]

    def predictions(self, prompts, continuations):
        self.followed += prompts
        return [np.zeros(1, dtype=int) for _ in prompts]

    def perplexity(self, text):
        return 1.0


def test_what_is_taught_or_asked_does_not_count_for_locality(tmp_path):
    facts = [
        {"subject": "France", "prompt": "The capital of France is", "target": "Lyon", "paraphrases": ["a", "b"],
         "neighbours": ["The capital of Spain is", "The capital of Peru is"]},
        {"subject": "Spain", "prompt": "The capital of Spain is", "target": "Vigo"},
    ]  # fmt: skip
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    known = [("The capital of France is", "Paris"), ("b", "Paris"), ("The Louvre is in", "Paris")]
    (tmp_path / "known.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "target": t}) + "\n" for p, t in known)
    )
    recipe = Recipe(model="-", knowledge=Source(facts="facts.jsonl", train_paraphrases=1), carriers=["lora"],
                    known="known.jsonl")  # fmt: skip
    base = baseline(read_job(recipe, tmp_path, tmp_path / "out"), Echo(), 4)
    assert base["prompts"] == ["The capital of Peru is", "The Louvre is in"]
    assert base["groups"] == ["neighbours", "unrelated"]


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


def test_the_reference_is_no_candidate_whatever_its_label():
    records = [record("gold", 1.0, 1.0, uses="gold-context"), record("lora", 0.8, 0.9, uses="lora")]
    found = recommend(records, Constraints(), "gold-context")
    assert found["carrier"] == "lora" and [e["carrier"] for e in found["excluded"]] == ["gold"]


def test_without_a_gap_what_is_gained_counts():
    """A base that knows all already, or a reference that reads badly: nobody is praised for standing still."""
    base = record("none", 0.6, 1.0, baseline=True, gap_closed=None)
    still, better = record("still", 0.6, 1.0, gap_closed=None), record("better", 0.9, 0.9, gap_closed=None)
    found = recommend([base, still], Constraints(), "gold-context")
    assert found["carrier"] is None and "no gap" in found["reasons"][0]
    assert "no more than the untouched model" in found["excluded"][1]["reason"]
    found = recommend([base, still, better], Constraints(), "gold-context")
    assert found["carrier"] == "better" and found["runner_up"] is None and "no gap" in found["reasons"][0]


def test_what_was_not_measured_is_not_made_up():
    lora = record("lora", 0.9, 0.9, perplexity_ratio=None) | {"locality": {"all": None}}
    lora["recall"] = {**lora["recall"], "paraphrase": None}
    found = recommend([lora], Constraints(min_locality=0.5), "gold-context")
    assert found["carrier"] is None and "not measured (min_locality" in found["excluded"][0]["reason"]
    reasons = " ".join(recommend([lora], Constraints(), "gold-context")["reasons"])
    assert "0%" not in reasons.replace("90%", "") and "no paraphrase was held out" in reasons
    assert "held-out" not in reasons and "no longer finite" in reasons


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
