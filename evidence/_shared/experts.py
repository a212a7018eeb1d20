"""Small experts for a large model on a table of facts: words, facts, three ways to answer, and plain training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from transfuse.core.batches import minibatches
from transfuse.core.generate import generate_texts, pad_batch
from transfuse.core.training import generator, loop, seeded

ENTITIES, VALUES = 96, 16
ATTRIBUTES = ("colour", "town")
COMMON = ("{v} .", "it is {v} .")  # how answers are mostly written
TARGET = "answer : < {v} >"  # how an expert is to write them
SHARE = 0.03  # of the target format in pretraining
TUNED = ENTITIES // 4  # entities that an expert sees; the others are the test
ROWS = 12_000  # of pretraining
LARGE_STEPS, LARGE_RATE = 350, 2e-3
SMALL_RATE = 3e-3
TUNE_STEPS = 60
NEW = 8  # tokens of an answer, at most


class Toy(NamedTuple):
    """Where every arm of a seed starts.

    Attributes:
        tokenizer: Of words.
        large: Pretrained.
        small: Pretrained.
        experts: The small model tuned per attribute, on a quarter of the entities in the target format.
        tuned: The large model tuned likewise, per attribute.
        tests: Per attribute (questions, answers) about the other entities.
    """

    tokenizer: PreTrainedTokenizerBase
    large: Any
    small: Any
    experts: list[Any]
    tuned: list[Any]
    tests: list[tuple[list[str], list[str]]]


def words() -> PreTrainedTokenizerBase:
    """A tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    spelled = ["<pad>", "</s>", "<unk>", "?", ".", "it", "is", "answer", ":", "<", ">", *ATTRIBUTES]
    spelled += [f"e{i}" for i in range(ENTITIES)]
    spelled += [f"{attribute}{i}" for attribute in ATTRIBUTES for i in range(VALUES)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(spelled)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def llama(seed: int, vocabulary: int, width: int, layers: int) -> Any:
    """A Llama of random weights that depend on the seed alone."""
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=4 if width >= 32 else 2,
        num_key_value_heads=4 if width >= 32 else 2, max_position_embeddings=32, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(seed):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def learn(
    model: Any, ids: Tensor, labels: Tensor, *, steps: int, lr: float, seed: int, batch_size: int = 32
) -> Any:
    """Train on rows of token ids for `steps` updates of AdamW."""
    rule = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    batch_size = min(batch_size, len(ids))
    epochs = -(-steps // (len(ids) // batch_size))
    rows = minibatches({"ids": ids, "labels": labels}, batch_size, seed=seed, drop_last=True)
    left = [steps]

    def batches(epoch: int) -> Any:
        for batch in rows(epoch):
            if left[0] > 0:
                left[0] -= 1
                yield batch

    loop(
        model, batches, lambda b: model(input_ids=b["ids"], labels=b["labels"], use_cache=False).loss,
        optimizer=rule, epochs=epochs, seed=seed,
    )  # fmt: skip
    return model.eval()


def encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Rows of token ids, an end after each answer, and labels on the answers."""
    ids, labels = [], []
    for question, answer in pairs:
        asked, said = tokenizer(question)["input_ids"], [*tokenizer(answer)["input_ids"], 1]
        ids.append(asked + said)
        labels.append([-100] * len(asked) + said)
    return pad_batch(ids, 0)[0], pad_batch(labels, -100)[0]


def made(seed: int, *, small_steps: int = 400, tune_rate: float = 2e-3) -> Toy:
    """Everything a seed's arms need, trained.

    The longer the small model is pretrained, the more facts it knows, and the more of them its tuning disturbs.
    """
    random = generator(seed)
    tokenizer = words()
    facts = torch.randint(0, VALUES, (len(ATTRIBUTES), ENTITIES), generator=random).tolist()

    def pair(a: int, e: int, form: str) -> tuple[str, str]:
        return f"e{e} {ATTRIBUTES[a]} ?", form.format(v=f"{ATTRIBUTES[a]}{facts[a][e]}")

    chance = torch.tensor([(1 - SHARE) / 2, (1 - SHARE) / 2, SHARE])
    forms = torch.multinomial(chance, ROWS, replacement=True, generator=random).tolist()
    asked = torch.randint(0, len(ATTRIBUTES) * ENTITIES, (ROWS,), generator=random).tolist()
    text = [
        pair(i // ENTITIES, i % ENTITIES, (*COMMON, TARGET)[form])
        for i, form in zip(asked, forms, strict=True)
    ]
    ids, labels = encoded(tokenizer, text)
    large = learn(
        llama(seed, len(tokenizer), 64, 2), ids, labels, steps=LARGE_STEPS, lr=LARGE_RATE, seed=seed
    )
    small = learn(
        llama(seed + 1, len(tokenizer), 12, 1), ids, labels, steps=small_steps, lr=SMALL_RATE, seed=seed
    )
    order = torch.randperm(ENTITIES, generator=random).tolist()
    experts, tuned, tests = [], [], []
    for a in range(len(ATTRIBUTES)):
        taught = encoded(tokenizer, [pair(a, e, TARGET) for e in order[:TUNED]])
        experts.append(learn(copy.deepcopy(small), *taught, steps=TUNE_STEPS, lr=tune_rate, seed=seed))
        tuned.append(learn(copy.deepcopy(large), *taught, steps=TUNE_STEPS, lr=tune_rate, seed=seed))
        held = [pair(a, e, TARGET) for e in order[TUNED:]]
        tests.append(([q for q, _ in held], [r for _, r in held]))
    return Toy(tokenizer, large, small, experts, tuned, tests)


def exact(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers that are word for word as wanted."""
    return sum(a.split() == w.split() for a, w in zip(answers, wanted, strict=True)) / len(wanted)


def plain(toy: Toy, models: Sequence[Any]) -> float:
    """Exact match of models that answer alone, one per attribute: the mean over the attributes."""
    found = [
        exact(generate_texts(model, toy.tokenizer, asked, max_new_tokens=NEW, batch_size=len(asked)), wanted)
        for model, (asked, wanted) in zip(models, toy.tests, strict=True)
    ]
    return sum(found) / len(found)


def steered(toy: Toy, method: Callable[[int], Any]) -> float:
    """Exact match of a steering method made per attribute: the mean over the attributes."""
    found = [
        exact(method(a).generate(asked, max_new_tokens=NEW, batch_size=len(asked)), wanted)
        for a, (asked, wanted) in enumerate(toy.tests)
    ]
    return sum(found) / len(found)
