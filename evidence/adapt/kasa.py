"""Does dropping the smallest singular components before adapting help, and when does it hurt?

quick: a linear map whose smallest components are noise by construction, and the control where they are signal;
then the mechanics on a real encoder. full: CoLA with that encoder, against LoRA, truncation + LoRA and PiSSA.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from transfuse.adapt.kasa import kasa, kasa_regularizer, truncate
from transfuse.core.datasets import dataset_path
from transfuse.core.models import load
from transfuse.core.training import fit, generator, optimise, pad_collator, seeded

SLUG = "kasa"
CLAIM = (
    "Dropping a weight's r smallest singular components, then learning the update in SVD form, beats LoRA of the "
    "same rank: GLUE average with RoBERTa-base 86.3 against 85.2 (CoLA Mcc 65.8), with gains where the base "
    "weight's tail is noise."
)
RULE = {
    "quick": (
        "kasa.planted_mse <= 0.2 * lora.planted_mse in 3/3 seeds; kasa.merge_gap <= 1e-4 in 3/3 seeds; "
        "kasa.foreign_changes == 0 in 3/3 seeds; kasa.finite_losses == 1 in 3/3 seeds"
    ),
    "full": "mean(kasa.mcc) >= mean(lora.mcc) - 0.5",
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "The full tier trains under bfloat16 autocast, all arms alike, and is scored in float32. In its five epochs no arm "
    "gets far: in seed 0 all but PiSSA call every sentence acceptable. KaSA is the slowest (5.3 points of Mcc behind "
    "LoRA on average, and behind it in both seeds in which either learnt anything), PiSSA the fastest (25.4 on "
    "average). Truncation does not explain it, for truncation with plain LoRA ends where LoRA does; what is left is "
    "the update's form, whose factors learn at a rate scaled by a random diagonal, and its regulariser. The paper "
    "trains for 100 epochs, not five. No setting was changed after the first run. bfloat16 is not why: in float32 "
    "seed 1 gives KaSA 12.2 and LoRA 24.7 (13.5 and 23.9 here)."
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, ALPHA, RATE, BATCH = 8, 16, 4e-4, 32
WIDTH, SAMPLES, NOISE = 64, 256, 0.1
EPOCHS = 5


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    if tier == "full":
        return {arm: cola(arm, seed) for arm in ("kasa", "lora", "truncated_lora", "pissa")}
    arms = ("kasa", "lora", "truncated_lora", "milora")
    figures = {
        arm: {"planted_mse": regression(arm, seed, True), "control_mse": regression(arm, seed, False)}
        for arm in arms
    }
    figures["kasa"].update(mechanics(seed))
    return figures


# --- a linear map with a known tail ------------------------------------------------------------------------


def regression(arm: str, seed: int, planted: bool) -> float:
    """Test error of an adapted linear map; `planted` says whether the smallest components of its weight are noise.

    The weight has 56 singular values from 5 to 1 and 8 of 0.6. The target is an update of rank 4 on top of the 56
    (planted), or of all 64 (control). The error is that of the map itself, free of observation noise.
    """
    random = generator(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random)).Q for _ in range(2))
    values = torch.cat([torch.linspace(5, 1, WIDTH - RANK), torch.full((RANK,), 0.6)])
    left, right = (torch.linalg.qr(torch.randn(WIDTH, 4, generator=random)).Q for _ in range(2))
    kept = values.clone()
    if planted:
        kept[-RANK:] = 0
    target = (u * kept) @ v.T + left @ right.T
    inputs = torch.randn(SAMPLES, WIDTH, generator=random)
    outputs = inputs @ target.T + NOISE * torch.randn(SAMPLES, WIDTH, generator=random)
    base = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False))
    base[0].weight.data = (u * values) @ v.T
    model = adapt(arm, base, ["0"], seed)

    def loss() -> torch.Tensor:
        error = torch.nn.functional.mse_loss(model(inputs), outputs)
        return error + kasa_regularizer(model) if arm == "kasa" else error

    optimise([p for p in model.parameters() if p.requires_grad], loss, lr=5e-3, steps=400, optimizer="adamw")
    found = model.merge_and_unload()[0].weight.detach()
    return float((found - target).square().sum() / WIDTH)  # mean over outputs, inputs being standard normal


def adapt(arm: str, base: Any, targets: list[str], seed: int, task: str | None = None) -> Any:
    """The adapted model of an arm; every arm has rank 8 and scale 2."""
    if arm == "kasa":
        return kasa(base, r=RANK, alpha=ALPHA, target_modules=targets, seed=seed)
    minor = {}
    layers = {name: layer for name, layer in base.named_modules() if name.rpartition(".")[2] in targets}
    if arm in ("truncated_lora", "milora"):
        for name, layer in layers.items():
            layer.weight.data, *factors = truncate(layer.weight.data, RANK)
            minor[name] = factors
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=targets,
        task_type=task,
        init_lora_weights="pissa" if arm == "pissa" else True,
    )
    with seeded(seed):
        model = get_peft_model(base, config)
    if arm == "milora":  # the update starts as what was dropped, split evenly over its two factors
        for name, (left, right, values) in minor.items():
            layer = model.base_model.model.get_submodule(name)
            root = (values[-RANK:] * layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.data = right * values[-RANK:, None] / root[:, None]
            layer.lora_B["default"].weight.data = left / root
    return model


# --- a real encoder ----------------------------------------------------------------------------------------


def sentences(name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of CoLA: token ids and whether the sentence is acceptable."""
    lines = dataset_path(f"cola/{name}.tsv").read_text(encoding="utf-8").splitlines()
    fields = [line.split("\t") for line in lines]
    return [{"input_ids": tokenizer(row[3])["input_ids"], "labels": int(row[1])} for row in fields]


def encoder(seed: int) -> tuple[Any, Any]:
    """MiniLM-L6 with a new head, the same one for every arm of a seed."""
    with seeded(seed):
        return load("minilm", task="sequence-classification", num_labels=2, dtype="float32", device=DEVICE)


def mechanics(seed: int) -> dict[str, float]:
    """One epoch on 1,000 sentences: the losses, what changed, and whether merging changes the answers."""
    base, tokenizer = encoder(seed)
    rows = sentences("in_domain_train", tokenizer)[:1000]
    model = adapt("kasa", base, ["query", "value"], seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history = fit(
        model, rows, lr=RATE, epochs=1, batch_size=BATCH, warmup=0.06, seed=seed, group_by_length=True
    )
    foreign = sum(
        not torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    )
    batch = {name: value.to(DEVICE) for name, value in pad_collator(tokenizer)(rows[:64]).items()}
    del batch["labels"]
    with torch.no_grad():
        apart = model(**batch).logits
        merged = model.merge_and_unload()(**batch).logits
    return {
        "first_loss": history.losses[0],
        "last_loss": statistics.mean(history.losses[-8:]),
        "finite_losses": float(all(math.isfinite(value) for value in history.losses)),
        "foreign_changes": float(foreign),
        "merge_gap": float((apart - merged).abs().max()),
    }


def cola(arm: str, seed: int) -> dict[str, float]:
    """Train on CoLA and score the last epoch on its in-domain development part (527 sentences)."""
    base, tokenizer = encoder(seed)
    model = adapt(arm, base, ["query", "value"], seed, task="SEQ_CLS")
    rows = sentences("in_domain_train", tokenizer)
    held = sentences("in_domain_dev", tokenizer)
    collate, guesses = pad_collator(tokenizer), []
    # Without autocast's cache, which would keep the first weights until the context ends.
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        history = fit(
            model,
            rows,
            lr=RATE,
            epochs=EPOCHS,
            batch_size=BATCH,
            warmup=0.06,
            seed=seed,
            group_by_length=True,
        )
    with torch.inference_mode():
        for start in range(0, len(held), 64):
            batch = {name: value.to(DEVICE) for name, value in collate(held[start : start + 64]).items()}
            del batch["labels"]
            guesses += model(**batch).logits.argmax(-1).tolist()
    truth = [row["labels"] for row in held]
    return {
        "mcc": 100 * matthews(truth, guesses),
        "accuracy": 100 * statistics.mean(float(a == b) for a, b in zip(truth, guesses, strict=True)),
        "last_loss": statistics.mean(history.losses[-50:]),
        "seconds": history.seconds,
    }


def matthews(truth: list[int], guesses: list[int]) -> float:
    """Matthews correlation of two binary labellings; 0 where either is constant."""
    counts = {(a, b): 0 for a in (0, 1) for b in (0, 1)}
    for pair in zip(truth, guesses, strict=True):
        counts[pair] += 1
    tp, tn, fp, fn = counts[1, 1], counts[0, 0], counts[0, 1], counts[1, 0]
    scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(scale) if scale else 0.0
