"""grace: does a codebook learn every fact and leave everything else alone?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "grace"
CLAIM = (
    "A codebook beside one layer takes edit after edit without touching unrelated inputs; it does not "
    "generalise to paraphrases, whose keys lie outside the radii. (The study lists GRACE among its "
    "editors; its table has no row for it.)"
)
RULE = {
    "quick": "mean(grace.locality) >= 0.95; mean(grace.edit_success) >= mean(none.edit_success) + 0.2",
    "full": (
        "mean(grace.edit_success) >= 0.9; mean(grace.locality) >= 0.95; mean(grace.locality) >= "
        "mean(ft_m.locality) + 0.05; mean(together.edit_success) >= 0.9; mean(together.locality) >= 0.95"
    ),
}
NOTES = (
    "SmolLM2-135M-Instruct in float32; 2 (quick) or 10 (full) CounterFact records in every seed. `grace` "
    "edits them one at a time, `together` keeps all of a seed's edits in one codebook. `target` lets a "
    "value stand for as many tokens as the target has: edit success is the same, but the text after the "
    "target is the model's own again, as fluency shows."
)


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """GRACE one edit at a time and all together, beside the unedited model and FT-M."""
    (model, tokenizer), records = loaded()
    count = 2 if tier == "quick" else 10
    facts = records[seed * count : (seed + 1) * count]
    how = {"layer": 24, "steps": 15} if tier == "quick" else {}
    arms = {"none": {"method": None}, "grace": {"method": "grace", **how}}
    if tier == "full":
        arms |= {
            "together": {"method": "grace", "mode": "batch"},
            "target": {"method": "grace", "replacement": "replace_target"},
            "ft_m": {"method": "ft-m"},
        }
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
