"""rome: does an edit written through the covariance of keys hold, and carry over to paraphrases?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "rome"
CLAIM = (
    "Edits succeed and carry over to paraphrases, but neighbours move with them. Llama-2-7B-chat, edit success / "
    "locality in percent: recent facts 97.2 / 54.8, ZsRE 96.8 / 53.7, counterfacts 98.6 / 52.0."
)
RULE = {
    "quick": "mean(rome.edit_success) >= 0.9",
    "full": (
        "mean(rome.edit_success) >= 0.9; mean(rome.paraphrase_success) >= mean(grace.paraphrase_success) + 0.2"
    ),
}
NOTES = "SmolLM2-135M-Instruct in float32; 2 (quick) or 10 (full) CounterFact records in every seed, one at a time."


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """The editor on the seed's records, beside the unedited model and, in the full tier, GRACE."""
    (model, tokenizer), records = loaded()
    count = 2 if tier == "quick" else 10
    facts = records[seed * count : (seed + 1) * count]
    arms = {"none": {"method": None}, "rome": {"method": "rome"}}
    if tier == "full":
        arms |= {"grace": {"method": "grace"}}
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
