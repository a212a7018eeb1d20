"""A character language model on English prose, small enough to be trained in seconds; a Trainer takes it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from transfuse.core.training import generator, seeded

from .data import long_text

CONTEXT = 48


def encoded() -> tuple[Tensor, Tensor, str]:
    """Training and held-out character ids (90 / 10), and the alphabet."""
    text = long_text()
    alphabet = "".join(sorted(set(text)))
    ids = torch.tensor([alphabet.index(c) for c in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], alphabet


class GRUForCausalLM(nn.Module):
    """Embedding, GRU, linear head; called like a language model of transformers."""

    def __init__(self, vocabulary: int, width: int, layers: int = 1):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocabulary, use_cache=False)
        self.embed = nn.Embedding(vocabulary, width)
        self.body = nn.GRU(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Tensor:
        return self.head(self.body(self.embed(input_ids))[0])


def make(seed: int, vocabulary: int, width: int, layers: int = 1) -> GRUForCausalLM:
    """A model whose initial weights depend on the seed alone."""
    with seeded(seed):
        return GRUForCausalLM(vocabulary, width, layers)


def windows(ids: Tensor, count: int, seed: int, context: int = CONTEXT) -> list[dict[str, list[int]]]:
    """Random windows as training rows: `context` characters, of which all but the first are predicted."""
    starts = torch.randint(0, len(ids) - context, (count,), generator=generator(seed))
    rows = [ids[s : s + context].tolist() for s in starts.tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]


@torch.no_grad()
def held_out_nll(model: nn.Module, ids: Tensor, context: int = CONTEXT) -> float:
    """Mean nats per character over consecutive windows."""
    count = len(ids) // context
    pieces = ids[: count * context].view(count, context)
    logits = torch.cat([model(part)[:, :-1] for part in pieces.split(256)])
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten()))


@torch.no_grad()
def samples(model: GRUForCausalLM, ids: Tensor, count: int, seed: int, context: int = CONTEXT) -> Tensor:
    """Characters sampled from the model, `[count, context]`, each begun with one character of the text."""
    random = generator(seed)
    start = ids[torch.randint(0, len(ids), (count,), generator=random)]
    rows, state = [start], None
    for _ in range(context - 1):
        out, state = model.body(model.embed(rows[-1].unsqueeze(1)), state)
        p = torch.softmax(model.head(out[:, -1]), -1)
        rows.append(torch.multinomial(p, 1, generator=random).squeeze(1))
    return torch.stack(rows, 1)


@torch.no_grad()
def nll_of(model: nn.Module, rows: Tensor) -> float:
    """Mean nats per character of given rows."""
    logits = model(rows)[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
