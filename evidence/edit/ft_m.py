"""ft-m: is plain teacher-forced fine-tuning of one matrix a strong baseline?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "ft-m"
CLAIM = (
    "FT-M is a strong baseline. Llama-2-7B-chat, edit success of FT-M / FT-L in percent: recent facts 100 "
    "/ 55.8, ZsRE 99.98 / 53.9, counterfacts 100 / 45.2; locality 64.3 / 43.7, 89.8 / 73.4, 76.8 / 50.5."
)
RULE = {
    "quick": "mean(ft_m.edit_success) >= mean(ft_l.edit_success) + 0.2",
    "full": (
        "mean(ft_m.edit_success) >= 0.9; mean(ft_m.edit_success) >= mean(ft_l.edit_success) + 0.2; "
        "mean(ft_m.edit_success) >= mean(none.edit_success) + 0.2"
    ),
}
NOTES = "SmolLM2-135M-Instruct in float32; 2 (quick) or 10 (full) CounterFact records in every seed, one at a time."


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """The unedited model, FT-L and FT-M on the seed's records; quick edits near the top, in few steps."""
    (model, tokenizer), records = loaded()
    count = 2 if tier == "quick" else 10
    facts = records[seed * count : (seed + 1) * count]
    how = {"layer": 24, "steps": 15} if tier == "quick" else {}
    arms = {"none": {"method": None}, "ft_l": {"method": "ft-l", **how}, "ft_m": {"method": "ft-m", **how}}
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
