"""Distillation of small language models on English prose: characters with a GRU student, tokens with SmolLM2-135M."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from transfuse import load
from transfuse.core.training import seeded
from transfuse.distill import Distiller, Objective, Policy, prune
from transfuse.distill._base import logits_of

from . import charlm
from .data import long_text

RATE, BATCH = 3e-3, 20
TEACHER_STEPS, WARM_STEPS, STEPS = 200, 60, 100
SAMPLES = 800

Rows = Sequence[dict[str, list[int]]]


@dataclass(frozen=True)
class Scale:
    """How much of SmolLM2-135M a device can bear: `batch` rows of `tokens` per update, `held` rows to judge by."""

    tokens: int
    batch: int
    held: int


SCALES = {"cuda": Scale(tokens=128, batch=16, held=128), "cpu": Scale(tokens=64, batch=8, held=64)}


@dataclass
class Setting:
    """Where every arm of a seed starts.

    Attributes:
        teacher: Trained, in evaluation mode.
        student: Warmed up on the labels; arms train copies.
        rows: Training rows of the arms.
        held: Held-out ids.
        device: Where models train.
        batch: Rows per update.
        bf16: Whether the arms train under bfloat16 autocast.
    """

    teacher: nn.Module
    student: nn.Module
    rows: Rows
    held: Tensor
    device: str
    batch: int = BATCH
    bf16: bool = False


def best_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def trained(
    model: Any,
    rows: Rows,
    *,
    steps: int,
    seed: int,
    teacher: Any = None,
    objective: Objective | str = "cross-entropy",
    policy: Policy | None = None,
    lr: float = RATE,
    batch: int = BATCH,
    bf16: bool = False,
    device: str = "cpu",
    **options: Any,
) -> Any:
    """Train `model` at a constant rate and put it into evaluation mode."""
    with tempfile.TemporaryDirectory() as folder, seeded(seed):
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, learning_rate=lr,
            lr_scheduler_type="constant", seed=seed, report_to=[], logging_strategy="no", save_strategy="no",
            disable_tqdm=True, use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
            bf16=bf16,
        )  # fmt: skip
        trainer = Distiller(
            student=model, teacher=teacher, objective=objective, train_dataset=rows, args=args,
            policy=policy, **options,
        )  # fmt: skip
        trainer.train()
    return model.eval()


def llama(seed: int, vocabulary: int, width: int, layers: int) -> Any:
    """A Llama of random weights that depend on the seed alone."""
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def characters(
    seed: int,
    *,
    size: tuple[int, int] | None = None,
    teacher_steps: int = TEACHER_STEPS,
    warm_steps: int = WARM_STEPS,
    steps: int = STEPS,
    rate: float = RATE,
    device: str = "cpu",
) -> Setting:
    """A teacher on characters, GRU of width 128 with 2 layers or Llama of `size` (width, layers); a GRU-32 student."""
    train, held, alphabet = charlm.encoded()
    many = charlm.windows(train, teacher_steps * BATCH, seed)
    if size is None:
        teacher: Any = charlm.make(seed, len(alphabet), 128, 2)
    else:
        teacher = llama(seed, len(alphabet), *size)
    lr, bf16 = (rate, False) if size is None else (1e-3, device == "cpu")
    trained(teacher.to(device), many, steps=teacher_steps, seed=seed, lr=lr, bf16=bf16, device=device)
    rows = charlm.windows(train, max(steps, warm_steps) * BATCH, seed + 1)
    student = charlm.make(seed + 1, len(alphabet), 32)
    trained(student.to(device), rows, steps=warm_steps, seed=seed, lr=rate, device=device)
    return Setting(teacher, student, rows, held, device)


@torch.no_grad()
def nll(model: Any, pieces: Tensor, device: str, *, first: int = 1, rows: int = 128) -> float:
    """Mean nats per token of rows `[N, T]`, from their token `first` on; `rows` at a time."""
    total = 0.0
    for part in pieces.split(rows):
        part = part.to(device)
        logits = logits_of(model(part))[:, first - 1 : -1].float()
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), part[:, first:].flatten(), reduction="sum")
        )
    return total / (pieces.shape[0] * (pieces.shape[1] - first))


def judged(student: Any, setting: Setting, seed: int, count: int = SAMPLES) -> dict[str, float]:
    """Held-out nats per character, and those of the student's own samples under the teacher."""
    found = {"nll": charlm.held_out_nll(student.cpu(), setting.held)}
    own = charlm.samples(student, setting.held, count, seed)
    found["sample_nll"] = nll(setting.teacher, own, setting.device)
    return found


def arm(
    setting: Setting, objective: Objective | str, seed: int, *, steps: int = STEPS, **options: Any
) -> Any:
    """A copy of the warmed-up student after its training with `objective` by the teacher."""
    options.setdefault("teacher", setting.teacher)
    return trained(
        copy.deepcopy(setting.student).to(setting.device), setting.rows, steps=steps, seed=seed,
        objective=objective, batch=setting.batch, bf16=setting.bf16, device=setting.device, **options,
    )  # fmt: skip


# --- SmolLM2-135M ------------------------------------------------------------------------------------------


def smollm(seed: int, *, layers: int = 6, steps: int = 100) -> Setting:
    """SmolLM2-135M as teacher of a student cut out of it and warmed up for `steps`, on tokens of the same prose.

    Raises:
        Unavailable: the model is neither in the cache nor to be fetched; nothing was trained then.
    """
    device = best_device()
    scale, bf16 = SCALES[device], device == "cpu"
    teacher, tokenizer = load("smollm2-135m", dtype="bfloat16", device=device)
    ids = torch.tensor(tokenizer(long_text(), verbose=False)["input_ids"])
    cut = len(ids) * 9 // 10
    rows = charlm.windows(ids[:cut], steps * scale.batch, seed, scale.tokens)
    held = ids[cut:].unfold(0, scale.tokens, scale.tokens)[: scale.held]
    student = prune(teacher, layers=layers).float()
    trained(student, rows, steps=steps, seed=seed, lr=5e-4, batch=scale.batch, bf16=bf16, device=device)
    return Setting(teacher, student, rows, held, device, scale.batch, bf16)


@torch.no_grad()
def judged_tokens(student: Any, setting: Setting, seed: int) -> dict[str, float]:
    """The same figures as `judged`, per token; samples continue 8 held-out tokens of every row to 64."""
    device = setting.device
    found = {"nll": nll(student.to(device), setting.held, device, rows=8)}
    starts = setting.held[:, :8].to(device)
    with seeded(seed), torch.autocast(device, torch.bfloat16, enabled=setting.bf16):
        own = student.generate(
            input_ids=starts, attention_mask=torch.ones_like(starts), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, min_new_tokens=56, max_new_tokens=56, pad_token_id=0, use_cache=True,
        )  # fmt: skip
    found["sample_nll"] = nll(setting.teacher, own, device, first=8, rows=8)
    return found
