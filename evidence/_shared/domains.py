"""SmolLM2-135M beside a tiny language model with its tokenizer: two output languages, training, scoring."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse.core import lockstep
from transfuse.core.batches import encode_examples, minibatches, target_loss
from transfuse.core.datasets import dataset_path
from transfuse.core.generate import encode_pair, pad_batch
from transfuse.core.streams import Stream
from transfuse.core.training import generator, loop, seeded

Pairs = list[tuple[str, str]]

PROMPT = "Question: {q}\n{kind}:"
WINDOW = 48  # tokens of a row of plain text


def queries() -> Pairs:
    """LC-QuAD 1: 1,000 (prompt with a question, SPARQL query)."""
    rows = json.loads(dataset_path("lcquad1-test.json").read_text(encoding="utf-8"))
    return [
        (
            PROMPT.format(q=row["corrected_question"].strip(), kind="SPARQL"),
            " ".join(row["sparql_query"].split()),
        )
        for row in rows
    ]


def sums(count: int, seed: int) -> Pairs:
    """(prompt with a sum in words and figures, a sentence that works it out)."""
    a, b = torch.randint(10, 99, (2, count), generator=generator(seed)).tolist()
    people = ("Ada", "Bo", "Cem", "Dina", "Eli", "Fay")
    things = ("pears", "coins", "books", "stones", "cards")
    return [
        (
            PROMPT.format(
                q=f"{people[i % 6]} has {x} {things[i % 5]} and gets {y} more. How many are there?",
                kind="Working",
            ),
            f"{x} + {y} = ({x // 10 * 10} + {y // 10 * 10}) + ({x % 10} + {y % 10}) = "
            f"{x // 10 * 10 + y // 10 * 10} + {x % 10 + y % 10} = {x + y} {things[i % 5]} ;",
        )
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def shuffled(pairs: Pairs, seed: int) -> Pairs:
    """In an order that the seed decides."""
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator(seed)).tolist()]


def tiny(seed: int, vocabulary: int) -> Any:
    """A random Llama, 256 wide with 4 layers."""
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _train(model: Any, columns: dict[str, Tensor], *, steps: int, lr: float, seed: int, batch: int) -> Any:
    """AdamW in bf16 autocast, weights in float32."""
    rule = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    rows = minibatches(columns, batch, seed=seed, drop_last=True)
    epochs = -(-steps // (len(columns["input_ids"]) // batch))
    left = [steps]

    def batches(epoch: int) -> Any:
        for each in rows(epoch):
            if left[0] > 0:
                left[0] -= 1
                yield each

    def loss(each: dict[str, Tensor]) -> Tensor:
        width = int(each["attention_mask"].sum(1).max())
        with torch.autocast(each["input_ids"].device.type, dtype=torch.bfloat16):
            return target_loss(model, {name: column[:, :width] for name, column in each.items()})

    loop(model, batches, loss, optimizer=rule, epochs=epochs, clip=1.0, seed=seed)
    return model.eval()


def read(
    model: Any, tokenizer: Any, text: str, *, steps: int, seed: int, lr: float = 1e-3, batch: int = 8
) -> Any:
    """Train on windows of plain text, in place."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    columns = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    return _train(model, columns, steps=steps, lr=lr, seed=seed, batch=batch)


def tuned(
    model: Any, tokenizer: Any, pairs: Pairs, *, steps: int, seed: int, lr: float = 1e-3, batch: int = 8
) -> Any:
    """A copy trained on the targets of (prompt, target) pairs."""
    examples = encode_examples(tokenizer, pairs)
    ids, mask = pad_batch([row["input_ids"] for row in examples], 0)
    labels, _ = pad_batch([row["labels"] for row in examples], -100)
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return _train(copy.deepcopy(model), columns, steps=steps, lr=lr, seed=seed, batch=batch)


def with_lora(model: Any) -> Any:
    """A copy of the model with a fresh LoRA adapter of rank 16 on attention, to be trained directly."""
    from peft import LoraConfig, get_peft_model

    with seeded(0):
        modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return get_peft_model(copy.deepcopy(model), LoraConfig(r=16, lora_alpha=32, target_modules=modules))


def scored(
    models: Sequence[Any],
    ways: Mapping[str, Callable[[list[Tensor]], Tensor]],
    tokenizer: Any,
    pairs: Pairs,
    *,
    batch: int = 8,
) -> dict[str, float]:
    """Nats per token of the targets under several combinations of the models, each model read once."""
    coded = sorted((encode_pair(tokenizer, *pair) for pair in pairs), key=lambda ids: len(ids[1]))
    totals, count = dict.fromkeys(ways, 0.0), 0
    for start in range(0, len(coded), batch):
        part = coded[start : start + batch]
        ids, mask = pad_batch([prompt for prompt, _ in part], 0, side="left")
        forced, kept = pad_batch([target for _, target in part], 0)
        at = [0]

        def every(
            logits: list[Tensor], forced: Tensor = forced, kept: Tensor = kept, at: list[int] = at
        ) -> Tensor:
            rows = kept[:, at[0]].bool()
            gold = forced[rows, at[0]][:, None]
            for name, way in ways.items():
                said = way([z[rows] for z in logits]).log_softmax(-1).gather(1, gold)
                totals[name] -= float(said.sum())
            at[0] += 1
            return logits[0]

        lockstep.follow([Stream(model, ids, mask) for model in models], every, forced)
        count += int(kept.sum())
    return {name: total / count for name, total in totals.items()}
