"""ft-l: how far does fine-tuning get inside its box, asked for all target tokens at once?"""

from __future__ import annotations

from functools import lru_cache

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "ft-l"
CLAIM = (
    "FT-L is the weak baseline of the study. Llama-2-7B-chat, edit success / locality in percent: recent "
    "facts 55.8 / 43.7, ZsRE 53.9 / 73.4, counterfacts 45.2 / 50.5, where FT-M has 100 / 64.3, 99.98 / "
    "89.8, 100 / 76.8."
)
RULE = {
    "quick": "mean(ft_l.edit_success) <= mean(ft_m.edit_success) - 0.2",
    "full": "mean(ft_l.edit_success) <= mean(ft_m.edit_success) - 0.2; mean(ft_l.edit_success) <= 0.8",
}
NOTES = (
    "SmolLM2-135M-Instruct in float32; 2 (quick) or 10 (full) CounterFact records in every seed, one at a "
    "time. `ft_l_free` is FT-L without its box: with targets of one token its loss is that of FT-M."
)


@lru_cache
def loaded():
    return load("smollm2-135m", dtype="float32"), read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """FT-L with and without its box, and FT-M, on the seed's records."""
    (model, tokenizer), records = loaded()
    count = 2 if tier == "quick" else 10
    facts = records[seed * count : (seed + 1) * count]
    how = {"layer": 24, "steps": 15} if tier == "quick" else {}
    arms = {
        "ft_l": {"method": "ft-l", **how},
        "ft_l_free": {"method": "ft-l", "eps": 1e9, **how},
        "ft_m": {"method": "ft-m", **how},
    }
    return {
        arm: evaluate_edits(model, tokenizer, facts, generated_tokens=20, **each).means
        for arm, each in arms.items()
    }
