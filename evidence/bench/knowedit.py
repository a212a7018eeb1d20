"""knowedit: do the editors rank as in the study, on a small model and CounterFact?"""

from __future__ import annotations

from functools import lru_cache

import torch

from transfuse.bench.knowedit import evaluate_edits, read_records
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load

SLUG = "knowedit"
CLAIM = (
    "No editor wins everywhere. Llama-2-7B-chat on WikiData-counterfact, edit success / locality in "
    "percent: FT-M 100 / 76.8, FT-L 45.2 / 50.5, AdaLoRA 100 / 70.3, ROME 98.6 / 52.0, MEMIT 98.1 / 46.6, "
    "in-context editing 69.8 / 32.4. FT-M is a strong baseline and FT-L a weak one; GRACE does not "
    "generalise to paraphrases but leaves everything else alone."
)
RULE = {
    "quick": ("mean(ft_m.edit_success) >= mean(ft_l.edit_success) + 0.2; mean(grace.locality) >= 0.95"),
    "full": (
        "mean(ft_m.edit_success) >= 0.9; mean(rome.edit_success) >= 0.9; mean(memit.edit_success) >= 0.9; "
        "mean(grace.edit_success) >= 0.9; mean(ft_l.edit_success) <= mean(ft_m.edit_success) - 0.2; "
        "mean(rome.paraphrase_success) >= mean(grace.paraphrase_success) + 0.2; mean(grace.locality) >= "
        "mean(ft_m.locality) + 0.05"
    ),
}
NOTES = (
    "SmolLM2-135M-Instruct in float32, other CounterFact records in every seed, edited one at a time and rolled back."
    " Locality compares the model's predictions before and after the edit where the record's answer about the "
    "neighbour stands. CounterFact has no portability questions: that part of the study is not measured here. Text is"
    " 20 tokens long for exact match and fluency. MEMIT's `lam` is 1500, chosen on records 100 to 107, which no seed "
    "has. Full: ten records per seed. MEMIT takes 27 of the 30, exactly what the rule asks, ROME 28; with the drift "
    "measured as KL(unedited || edited), the opposite of what is published, MEMIT took 26 (the rule failed by one) "
    "and ROME 27. Their edits carry over to few paraphrases (0.32, 0.30); LoRA's and in-context editing's do (0.90, "
    "0.75), at the cost of the neighbours (0.00, 0.12)."
)

QUICK = {
    "ft_l": {"method": "ft-l", "layer": 24, "steps": 15},
    "ft_m": {"method": "ft-m", "layer": 24, "steps": 15},
    "grace": {"method": "grace", "layer": 24, "steps": 15},
}
FULL = {
    "none": {"method": None},
    "ft_l": {"method": "ft-l"},
    "ft_m": {"method": "ft-m"},
    "lora": {"method": "lora"},
    "rome": {"method": "rome"},
    "memit": {"method": "memit", "lam": 1500.0},
    "grace": {"method": "grace"},
    "grace_target": {"method": "grace", "replacement": "replace_target"},
    "ike": {"method": "ike"},
}
POOL = slice(5000, 5100)  # facts to demonstrate with, far from those edited


@lru_cache
def loaded():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load("smollm2-135m", dtype="float32", device=device)
    return model, read_records(dataset_path("counterfact/edit.json"))


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every editor on the seed's records."""
    (model, tokenizer), records = loaded()
    count = 2 if tier == "quick" else 10
    facts = records[seed * count : (seed + 1) * count]
    figures = {}
    for arm, how in (QUICK if tier == "quick" else FULL).items():
        if how["method"] == "ike":
            how = {**how, "demonstrations": records[POOL]}
        result = evaluate_edits(model, tokenizer, facts, generated_tokens=20, **how)
        figures[arm] = result.means
    return figures
