"""memit: does an edit written through the covariance of keys hold, and carry over to paraphrases?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "memit"
LAM = 1500.0
CLAIM = (
    "Edits spread over several layers succeed about as often as ROME's. Llama-2-7B-chat, edit success / locality in "
    "percent: recent facts 97.1 / 52.2, ZsRE 95.4 / 48.3, counterfacts 98.1 / 46.6."
)
RULE = {
    "quick": "mean(memit.edit_success) >= 0.9",
    "full": "mean(memit.edit_success) >= 0.9; mean(together.edit_success) >= 0.9",
}
NOTES = (
    "SmolLM2-135M-Instruct in float32; 2 (quick) or 10 (full) CounterFact records in every seed, one at a time; "
    "`together` writes all of a seed's records at once. `lam` is 1500: on eight records that no seed has (100 to "
    "107) the published 15000, 5000 and 1500 gave an edit success of 0.25, 0.625 and 1.0, all with locality 1. "
    "Until values were those of the whole block, as in the paper, this run failed with 0.667 whatever `lam` was."
)


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """The editor on the seed's records, beside the unedited model and, in the full tier, all its records at once."""
    (model, tokenizer), records = loaded()
    count = 2 if tier == "quick" else 10
    facts = records[seed * count : (seed + 1) * count]
    arms = {"none": {"method": None}, "memit": {"method": "memit", "lam": LAM}}
    if tier == "full":
        arms |= {"together": {"method": "memit", "lam": LAM, "mode": "batch"}}
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
