"""lora: does an adapter trained on one fact learn it, and at what cost to its neighbours?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "lora"
CLAIM = (
    "The adapter always learns its fact, and changes others with it. AdaLoRA on Llama-2-7B-chat, edit "
    "success / locality in percent: recent facts 100 / 56.4, ZsRE 100 / 75.8, counterfacts 100 / 70.3."
)
RULE = {
    "quick": "mean(lora.edit_success) >= 0.9; mean(lora.locality) <= 0.95",
    "full": (
        "mean(lora.edit_success) >= 0.9; mean(adalora.edit_success) >= 0.9; mean(lora.locality) <= 0.95; "
        "mean(adalora.locality) <= 0.95"
    ),
}
NOTES = "SmolLM2-135M-Instruct in float32; 1 (quick) or 5 (full) CounterFact records in every seed, one at a time."


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """LoRA, and in the full tier AdaLoRA, on the seed's records."""
    (model, tokenizer), records = loaded()
    count = 1 if tier == "quick" else 5
    facts = records[seed * count : (seed + 1) * count]
    arms = {"none": {"method": None}, "lora": {"method": "lora"}}
    if tier == "full":
        arms["adalora"] = {"method": "lora", "adaptive": True}
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
