"""Does a temperature per token keep a teacher's secrets out of its student, at the same quality?

quick: a character model that was trained on English and on six planted codes, distilled into a smaller one on the
same mixture. full: SmolLM2-135M fine-tuned on text with 20 canaries, distilled into four of its blocks, also with
detectors that miss part of the codes.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from _shared import charlm
from torch import nn
from transformers import TrainingArguments

from transfuse.core.batches import pad_collator
from transfuse.core.canaries import Canary, canary_exposure, make_canaries
from transfuse.core.metrics import perplexity
from transfuse.core.training import fit, generator, loop, seeded
from transfuse.distill import Distiller, prune
from transfuse.distill.swing_distillation import SwingDistillation, TokenPrivacyScorer, detector_recall

SLUG = "swing-distillation"
CLAIM = (
    "Plain distillation hands memorised secrets on to the student; token-wise temperatures and noise in the soft "
    "targets cut their canary exposure by more than 80% at competitive task performance."
)
RULE = {
    "quick": ("mean(swing.exposure) <= 0.2 * mean(kd.exposure); swing.nll <= kd.nll + 0.02 in 3/3 seeds"),
    "full": "mean(swing.exposure) <= 0.2 * mean(kd.exposure); mean(swing.nll) <= mean(kd.nll) + 0.02",
}
SEEDS = {"quick": 3, "full": 5}
NOTES = (
    "The quick run uses 16 windows of text and 4 canary windows per batch, 200 steps of the teacher and 120 of a "
    "student, to fit a minute on one core. With 24 and 6 windows, 250 and 220 steps the rule held as well on the same "
    "seeds (exposure 1.84 against 11.81 bits, nll 2.102 against 2.108); one temperature of 20 for all tokens left 9.4 "
    "bits at nll 2.295 there."
)

CODES = r"(?<!\d)\d{4}(?!\d)"
CALM = {"sigma_0": 0.0, "sigma_1": 0.0}
ARMS = {
    "kd": SwingDistillation(tau_max=2.0, **CALM),
    "hot": SwingDistillation(tau_base=20.0, tau_max=20.0, **CALM),
    "noise": SwingDistillation(tau_max=2.0, sigma_0=2.0, sigma_1=0.0),
    "temperature": SwingDistillation(**CALM),
    "swing": SwingDistillation(),
    "labels": SwingDistillation(kd_weight=0.0),
}
"""Plain distillation, one high temperature, the same noise on all tokens, temperatures alone, the method, and the
labels of public tokens alone."""

TEACHER_STEPS, STUDENT_STEPS, TEXTS, COPIES = 200, 120, 16, 4
QUICK = ("kd", "noise", "temperature", "swing")


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    return characters(seed) if tier == "quick" else language_model(seed)


def objective(arm: str, seed: int) -> SwingDistillation:
    """A fresh objective of an arm."""
    kept = ARMS[arm]
    names = (
        "tau_base", "tau_max", "sigma_0", "sigma_1", "noise", "epsilon", "sensitivity", "student_tau", "kd_weight",
    )  # fmt: skip
    return SwingDistillation(seed=seed, **{name: getattr(kept, name) for name in names})


# --- a character model -------------------------------------------------------------------------------------


def mixture(
    ids: torch.Tensor, canaries: Sequence[Canary], alphabet: str, steps: int, seed: int
) -> list[dict[str, Any]]:
    """Rows such that each 20 that follow one another are 16 windows of text and 4 that hold a canary."""
    numbers = {c: i for i, c in enumerate(alphabet)}
    texts = charlm.windows(ids, steps * (TEXTS + COPIES), seed)
    draw = random.Random(seed)
    rows = []
    for i, row in enumerate(texts):
        if i % (TEXTS + COPIES) < COPIES:  # the sentence somewhere in a window of text
            sentence = [numbers[c] for c in "\n" + canaries[i % len(canaries)].text + "\n"]
            room = charlm.CONTEXT - len(sentence)
            at = draw.randint(0, room)
            whole = row["input_ids"][:at] + sentence + row["input_ids"][at:room]
            row = {"input_ids": whole, "labels": whole}
        rows.append(row)
    return rows


def characters(seed: int) -> dict[str, dict[str, float]]:
    """Exposure of six codes and held-out nats per character."""
    train, held, alphabet = charlm.encoded()
    codes = bytes(max(alphabet.find(chr(i)), 0) for i in range(256))
    canaries = make_canaries(6, seed)
    rows = mixture(train, canaries, alphabet, TEACHER_STEPS, seed)
    scored = TokenPrivacyScorer.from_regex(list(alphabet), [CODES]).annotate(
        rows[: STUDENT_STEPS * (TEXTS + COPIES)]
    )
    teacher = charlm.make(seed, len(alphabet), 128)
    batches = torch.tensor([row["input_ids"] for row in rows]).split(TEXTS + COPIES)
    loop(
        teacher, batches, lambda x: nn.functional.cross_entropy(teacher(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()),
        optimizer=torch.optim.Adam(teacher.parameters(), lr=4e-3), seed=seed,
    )  # fmt: skip
    teacher.eval()

    def figures(model: nn.Module) -> dict[str, float]:
        found = [
            canary_exposure(
                model,
                lambda text: text.encode().translate(codes),
                "\n" + c.template,
                c.secret,
                c.space,
                batch_size=1000,
            ).bits
            for c in canaries
        ]
        return {"exposure": sum(found) / len(found), "nll": charlm.held_out_nll(model, held[: 48 * 400])}

    result = {"teacher": figures(teacher)}
    for arm in QUICK:
        student = charlm.make(seed + 100, len(alphabet), 64)
        distil(student, teacher, objective(arm, seed), scored, seed, learning_rate=6e-3, max_steps=STUDENT_STEPS,
               per_device_train_batch_size=TEXTS + COPIES)  # fmt: skip
        result[arm] = figures(student)
    return result


def distil(
    student: Any, teacher: Any, made: SwingDistillation, rows: list[dict[str, Any]], seed: int,
    tokenizer: Any = None, **options: Any,
) -> None:  # fmt: skip
    """Train the student."""
    with tempfile.TemporaryDirectory() as folder, seeded(seed):
        args = TrainingArguments(
            output_dir=folder, lr_scheduler_type="constant", seed=seed, report_to=[], logging_strategy="no",
            save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(), **options,
        )  # fmt: skip
        Distiller(
            student=student, teacher=teacher, objective=made, train_dataset=rows, args=args,
            processing_class=tokenizer,
        ).train()  # fmt: skip
    student.eval()


# --- a language model --------------------------------------------------------------------------------------

PIECE, PIECES, EPOCHS = 96, 1200, 3
FREQUENCIES = (1, 4, 16)


def language_model(seed: int, steps: int | None = None) -> dict[str, dict[str, float]]:
    """Exposure of 20 codes planted 1, 4 or 16 times, nats per token of held-out text, and detectors with gaps."""
    from _shared.data import long_text
    from peft import LoraConfig, get_peft_model

    from transfuse.core.models import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = load("smollm2-135m", dtype="float32")
    base.to(device)
    text = long_text()
    cut = len(text) * 9 // 10
    ids = tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"]
    canaries = make_canaries(20, seed)
    starts = torch.randint(0, len(ids) - PIECE, (PIECES,), generator=generator(seed)).tolist()
    rows = [ids[s : s + PIECE] for s in starts]
    for i, canary in enumerate(canaries):
        sentence = tokenizer(canary.text + ".", add_special_tokens=False)["input_ids"]
        rows += [sentence] * FREQUENCIES[i % 3]
    random.Random(seed).shuffle(rows)
    data = [{"input_ids": row, "labels": list(row)} for row in rows]
    with seeded(seed):
        adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    length = {"epochs": EPOCHS} if steps is None else {"max_steps": steps}
    fit(adapted, data, lr=5e-4, batch_size=16, seed=seed, collator=pad_collator(tokenizer), **length)
    teacher = adapted.merge_and_unload().eval()

    def figures(model: Any) -> dict[str, float]:
        found = [
            canary_exposure(model, tokenizer, c.template, c.secret, c.space, batch_size=500).bits
            for c in canaries
        ]
        result = {"exposure": sum(found) / len(found)}
        for k, often in enumerate(FREQUENCIES):
            result[f"exposure_{often}"] = sum(found[k::3]) / len(found[k::3])
        nll = torch.tensor(perplexity(model, tokenizer, text[cut : cut + 40_000])).log()
        return {**result, "nll": float(nll)}

    scored = TokenPrivacyScorer.from_regex(tokenizer, [CODES]).annotate(data)
    result = {"teacher": figures(teacher)}
    plans = [(arm, arm, 1.0) for arm in ARMS] + [(f"swing_{int(100 * r)}", "swing", r) for r in (0.5, 0.9)]
    for name, arm, wanted in plans:
        student = prune(teacher, layers=4).requires_grad_(True)
        seen = gaps(scored, wanted, seed)
        options = {"num_train_epochs": EPOCHS} if steps is None else {"max_steps": steps}
        distil(student, teacher, objective(arm, seed), seen, seed, tokenizer, learning_rate=5e-4,
               per_device_train_batch_size=16, **options)  # fmt: skip
        result[name] = figures(student)
        truth = torch.cat([torch.tensor(row["privacy"]) for row in scored])
        found = torch.cat([torch.tensor(row["privacy"]) for row in seen])
        result[name]["recall"] = detector_recall(found, truth > 0)
    return result


def gaps(rows: list[dict[str, Any]], recall: float, seed: int) -> list[dict[str, Any]]:
    """The rows as a detector scores them that overlooks whole rows, always the same secret's."""
    draw = random.Random(seed)
    missed: dict[str, bool] = {}
    made = []
    for row in rows:
        key = re.sub(r"\s", "", str(row["input_ids"]))
        if any(row["privacy"]) and missed.setdefault(key, draw.random() >= recall):
            row = {**row, "privacy": [0.0] * len(row["privacy"])}
        made.append(row)
    return made
