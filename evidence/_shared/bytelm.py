"""Language models on bytes: texts as byte ids, tiny mixtures of experts, their training and their loss."""

from __future__ import annotations

import functools
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse.core.datasets import dataset_path
from transfuse.core.training import fit, seeded

from . import charlm


def _ids(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


@functools.cache
def wikitext(part: str) -> Tensor:
    """Bytes of WikiText-2's "valid" or "test" text."""
    return _ids(dataset_path(f"wikitext-2/{part}.txt").read_text(encoding="utf-8"))


@functools.cache
def gsm8k(part: str) -> Tensor:
    """Bytes of GSM8K's "train" or "test" questions, each followed by its answer."""
    table = pq.read_table(dataset_path(f"gsm8k/{part}.parquet"))
    pairs = zip(*(table[name].to_pylist() for name in ("question", "answer")), strict=True)
    return _ids("\n\n".join(f"{question}\n{answer}" for question, answer in pairs))


def mixture(seed: int, kind: str, **sizes: Any) -> Any:
    """A mixture of experts of transformers with random weights that depend on the seed alone."""
    config = AutoConfig.for_model(
        kind, vocab_size=256, pad_token_id=None, bos_token_id=None, eos_token_id=None, **sizes
    )
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(
    model: Any, method: Any, ids: Tensor, *, steps: int, batch: int, context: int, lr: float, seed: int
) -> Any:
    """Train on random windows at a constant rate after a tenth of warm-up; return the history."""
    rows = charlm.windows(ids, steps * batch, seed, context)
    return fit(
        model, rows, loss=method.loss, lr=lr, max_steps=steps, batch_size=batch, schedule="constant",
        warmup=0.1, weight_decay=0.01, seed=seed,
    )  # fmt: skip


def pieces(ids: Tensor, context: int, count: int) -> Tensor:
    """`count` windows `[count, context]`, spread evenly over a text."""
    starts = torch.linspace(0, len(ids) - context - 1, count).long()
    return torch.stack([ids[s : s + context] for s in starts.tolist()])


@torch.no_grad()
def nll(model: Any, windows: Tensor) -> float:
    """Mean nats per byte of windows `[N, T]`, all bytes but each first."""
    model.eval()
    device, total = next(model.parameters()).device, 0.0
    for part in windows.split(64):
        part = part.to(device)
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
    return total / (windows.shape[0] * (windows.shape[1] - 1))
