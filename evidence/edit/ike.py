"""ike: does a model take a new fact from its prompt, and does it then answer other questions as before?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "ike"
CLAIM = (
    "In-context editing takes up most facts and has the worst locality of all editors. Llama-2-7B-chat, "
    "edit success / locality in percent: recent facts 60.7 / 33.3, ZsRE 66.0 / 23.1, counterfacts 69.8 / "
    "32.4."
)
RULE = (
    "mean(ike.edit_success) >= 0.6; mean(ike.edit_success) >= mean(none.edit_success) + 0.4; "
    "mean(ike.locality) <= 0.6"
)
NOTES = (
    "SmolLM2-135M-Instruct in float32; 2 (quick) or 10 (full) CounterFact records in every seed, one at a "
    "time; 16 demonstrations from 30 (quick) or 100 (full) other records. `alone` says the new fact "
    "without demonstrations."
)


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """IKE with and without demonstrations, beside the unedited model."""
    (model, tokenizer), records = loaded()
    count, pool = (2, 30) if tier == "quick" else (10, 100)
    facts = records[seed * count : (seed + 1) * count]
    arms = {
        "none": {"method": None},
        "alone": {"method": "ike"},
        "ike": {"method": "ike", "demonstrations": records[5000 : 5000 + pool]},
    }
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
