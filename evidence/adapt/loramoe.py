"""Do experts with a localized balance learn a new task without losing facts, as LoRA does and full tuning does not?

quick: a small decoder that knows 400 made-up facts is tuned on a digit task, with a few questions about half of the
subjects; the other half is asked about. full: SmolLM2-135M tuned on school mathematics with a few factual questions; on
a CPU a quarter as many, and every arm under bfloat16 autocast.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse.adapt.kasa import kasa, kasa_regularizer
from transfuse.adapt.loramoe import FEED_FORWARD, balance, collator, loramoe, router_report, task_types
from transfuse.compare.job import bundled
from transfuse.core.batches import encode_examples
from transfuse.core.data import read_rows
from transfuse.core.datasets import dataset_path
from transfuse.core.generate import target_matches
from transfuse.core.models import load
from transfuse.core.training import fit, generator, optimise, seeded

SLUG = "loramoe"
CLAIM = (
    "As instruction data grows, plain tuning loses closed-book answers sharply; LoRAMoE keeps them and improves on the "
    "tasks beyond a single LoRA, its two groups of experts serving the two types of data."
)
RULE = {
    "quick": (
        "loramoe.recall >= full.recall + 0.1 in 3/3 seeds; loramoe.task >= lora.task - 0.03 in 3/3 seeds; "
        "loramoe.gap >= 0.1 in 3/3 seeds; unbalanced.gap < loramoe.gap in 3/3 seeds"
    ),
    "full": (
        "mean(loramoe.retained) >= mean(full.retained) + 0.1; mean(loramoe.retained) >= mean(lora.retained) - 0.02"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "Quick: one pretrained decoder for all seeds, which draw the halves, the batches and the adapters. Learning rates"
    " (1e-3 full, 2e-3 adapters) were set before any run. Seed 7, which is not recorded, was run once, with 900 steps"
    " of pretraining; they were then cut to 500 for time, and `gap`, until then the mean over layers of absolute "
    "differences (0.18 without the constraint, 0.09 with it), became the difference of the halves' mean shares, in "
    "which opposite layers cancel. The third rule asks for the constraint's own limit: with delta = 0.1 its minimum "
    "is where the first half's share differs by exactly 0.1 between the types, and trained routers end just below. A "
    "larger delta would pass; the rule and the paper's delta stay. A single LoRA keeps the facts as well as LoRAMoE "
    "does: what separates either from full tuning here is the frozen base. Full, on a CPU (144 problems and 16 "
    "questions twice, 40 updates under bfloat16, all arms at one rate, 2e-4; `gentle` is full tuning at 2e-5): too "
    "little training for the claim to show. Full tuning forgets 3.3% of the 40 facts known, all adapters and `gentle`"
    " none, so ten points are not there to be kept. LoRAMoE also learns less than a LoRA of the same size (.705 of "
    "the task's tokens against .750; untouched .679, full tuning .782). KaSA of that rank on the feed-forward layers "
    "loses three quarters of the facts (.258 kept), because it drops 32 components of each matrix before any "
    "training, and 40 updates do not bring them back. The routers' gap of 0.034 shows that they have only begun to "
    "part. Of the 70 facts asked, the model completes 40 before any training."
)

SUBJECTS, RELATIONS, OBJECTS, DIGITS = 100, 4, 40, 10
SUBJECT, RELATION = 10, 10 + SUBJECTS
OBJECT = RELATION + RELATIONS
DIGIT = OBJECT + RELATIONS * OBJECTS
FILL, QUESTION, ANSWER, COPY, SORT, IS = range(DIGIT + DIGITS, DIGIT + DIGITS + 6)
VOCABULARY = IS + 1
LENGTH = 4  # digits of the new task
STEPS, BATCH, PRETRAINING, PRETRAINING_BATCH = 600, 16, 500, 64
RATE = {"full": 1e-3, "lora": 2e-3, "loramoe": 2e-3, "unbalanced": 2e-3}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    if tier == "full":
        arms = ("base", "full", "gentle", "lora", "kasa", "unbalanced", "loramoe")
        return {arm: real(arm, seed) for arm in arms}
    return {arm: small(arm, seed) for arm in ("base", "full", "lora", "unbalanced", "loramoe")}


def adapt(arm: str, model: Any, seed: int, *, rank: int, experts: int) -> Any:
    """The model of an arm. A single LoRA has the rank of all experts together, and the same scale as each."""
    if arm in ("loramoe", "unbalanced"):
        beta = 0.1 if arm == "loramoe" else 0.0
        return loramoe(model, r=rank, num_experts=experts, alpha=2 * rank, beta=beta, dropout=0.0, seed=seed)
    if arm == "kasa":
        return kasa(model, r=rank * experts, alpha=2 * rank * experts, target_modules=FEED_FORWARD, seed=seed)
    if arm == "lora":
        config = LoraConfig(
            r=rank * experts,
            lora_alpha=2 * rank * experts,
            target_modules=list(FEED_FORWARD),
            task_type="CAUSAL_LM",
        )
        with seeded(seed):
            return get_peft_model(model, config)
    return model


# --- a small decoder ---------------------------------------------------------------------------------------


def facts() -> Tensor:
    """The object of each subject and relation, `[subjects, relations]`."""
    return torch.randint(OBJECTS, (SUBJECTS, RELATIONS), generator=generator(0))


def triples(chosen: Tensor, count: int, draw: torch.Generator) -> list[Tensor]:
    """Tokens of subject, relation and object of facts drawn about the chosen subjects."""
    s = chosen[torch.randint(len(chosen), (count,), generator=draw)]
    r = torch.randint(RELATIONS, (count,), generator=draw)
    return [SUBJECT + s, RELATION + r, OBJECT + OBJECTS * r + facts()[s, r]]


def digits(count: int, draw: torch.Generator) -> Tensor:
    """Strings of different digits, `[count, LENGTH]`."""
    return torch.rand(count, DIGITS, generator=draw).argsort(1)[:, :LENGTH]


def lines(kind: str, count: int, draw: torch.Generator, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and labels `[count, 11]`: statements, questions, or digits to be copied or sorted."""
    ids = torch.full((count, 2 * LENGTH + 3), FILL)
    labels = torch.full_like(ids, -100)
    if kind in ("statement", "question"):
        s, r, o = triples(chosen, count, draw)
        gap = torch.randint(
            2, 5, (count,), generator=draw
        )  # fillers between relation and object: none to two
        place = gap if kind == "statement" else torch.full_like(gap, 4)
        row = torch.arange(count)
        head = (
            [s, r]
            if kind == "statement"
            else [torch.full_like(s, QUESTION), s, r, torch.full_like(s, ANSWER)]
        )
        ids[:, : len(head)] = torch.stack(head, 1)
        ids[row, place] = o
        labels[row, place] = o
        return ids, labels
    given = digits(count, draw)
    wanted = given if kind == "copy" else given.sort(1).values
    ids[:, 0], ids[:, LENGTH + 1] = (COPY if kind == "copy" else SORT), IS
    ids[:, 1 : LENGTH + 1], ids[:, LENGTH + 2 : -1] = DIGIT + given, DIGIT + wanted
    labels[:, LENGTH + 2 : -1] = DIGIT + wanted
    return ids, labels


def blank() -> Any:
    """A decoder of four layers, untrained."""
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=96, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, pad_token_id=FILL,
        tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(0):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@functools.cache
def knowing() -> dict[str, Tensor]:
    """Weights of a decoder that knows the facts as statements, and how to copy digits; the same for every seed."""
    model, draw, everyone = blank(), generator(1), torch.arange(SUBJECTS)

    def loss() -> Tensor:
        parts = [lines("statement", PRETRAINING_BATCH, draw, everyone), lines("copy", 16, draw, everyone)]
        ids, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return model(input_ids=ids, labels=labels).loss

    optimise(list(model.parameters()), loss, lr=2e-3, steps=PRETRAINING, optimizer="adamw")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def small(arm: str, seed: int) -> dict[str, float]:
    """Tune on nine tenths of sorting and one tenth of questions about half of the subjects, then ask about the rest."""
    model = blank()
    model.load_state_dict(knowing())
    draw = generator(100 + seed)
    order = torch.randperm(SUBJECTS, generator=draw)
    asked, held = order[: SUBJECTS // 2], order[SUBJECTS // 2 :]
    model = adapt(arm, model, seed, rank=4, experts=4)
    model.train()
    typed = arm in ("loramoe", "unbalanced")

    def loss() -> Tensor:
        kinds = (torch.rand(BATCH, generator=draw) < 0.1).long()
        sets = [lines(kind, BATCH, draw, asked) for kind in ("sort", "question")]
        ids, labels = (torch.where(kinds[:, None].bool(), b, a) for a, b in zip(*sets, strict=True))
        with task_types(kinds):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            return found + balance(model) if typed else found

    if arm != "base":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimise(trained, loss, lr=RATE[arm], steps=STEPS, optimizer="adamw")
    model.eval()
    test = generator(200 + seed)
    figures = {
        "recall": right(model, *lines("question", 400, test, held)),
        "recall_asked": right(model, *lines("question", 400, test, asked)),
        "statements": right(model, *lines("statement", 400, test, held)),
        "task": right(model, *lines("sort", 400, test, held)),
    }
    if typed:
        batches = [
            {"input_ids": lines(kind, 200, test, held)[0], "task_types": torch.full((200,), number)}
            for number, kind in enumerate(("sort", "question"))
        ]
        figures["gap"] = gap(router_report(model, batches))
    return figures


def gap(report: dict[str, dict[int, list[float]]]) -> float:
    """How far the first half's share, mean over layers, differs between the types; at the balance's minimum, delta."""
    halves = [statistics.mean(sum(w[kind][: len(w[kind]) // 2]) for w in report.values()) for kind in (0, 1)]
    return abs(halves[0] - halves[1])


@torch.no_grad()
def right(model: Any, ids: Tensor, labels: Tensor) -> float:
    """Share of rows of which every labelled token is the likeliest."""
    best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    wanted = labels[:, 1:]
    return float(((best == wanted) | (wanted == -100)).all(1).float().mean())


# --- SmolLM2-135M ------------------------------------------------------------------------------------------


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = {"cuda": (540, 60), "cpu": (144, 16)}  # to train on: problems, questions
HELD = 20  # of either, for the figures
GENTLE = 2e-5  # a usual rate of full tuning; all other arms have that of adapters


def real(arm: str, seed: int, rows: tuple[int, int] | None = None) -> dict[str, float]:
    """Tune on problems of GSM8K and questions of ZsRE; of the facts known before, how many are completed still?

    Also: the likeliest tokens that are right in answers to held-out problems and questions.
    """
    model, tokenizer = load("smollm2-135m", dtype="float32", device=DEVICE)
    known = [json.loads(line) for line in bundled("known.jsonl").splitlines()]
    pick, (problems, questions) = random.Random(seed), rows or ROWS[DEVICE]
    school = [row for _, row in read_rows(dataset_path("gsm8k/train.parquet"), "data")]
    world = json.loads(dataset_path("zsre/train-1k.json").read_text())
    pairs = [
        [(row["question"] + "\n", row["answer"]) for row in pick.sample(school, problems + HELD)],
        [(row["src"], row["answers"][0]) for row in pick.sample(world, questions + HELD)],
    ]
    sets = [
        [{**row, "task_type": kind} for row in encode_examples(tokenizer, part, max_length=1024, end=True)]
        for kind, part in enumerate(pairs)
    ]

    def right(pairs: list[tuple[str, str]]) -> list[float]:
        return [
            float(hit.float().mean()) for hit in target_matches(model, tokenizer, *zip(*pairs, strict=True))
        ]

    def recalled() -> list[bool]:
        return [share == 1 for share in right([(fact["prompt"], fact["target"]) for fact in known])]

    before = recalled()
    model = adapt(arm, model, seed, rank=4, experts=8)
    typed = arm in ("loramoe", "unbalanced")
    if arm != "base":
        extra = {"extra_loss": kasa_regularizer} if arm == "kasa" else {}
        # Without autocast's cache, which would keep the first weights until the context ends.
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            fit(
                model, [row for part in sets for row in part[:-HELD]], lr=GENTLE if arm == "gentle" else 2e-4,
                epochs=2, batch_size=8, schedule="cosine", warmup=0.03, seed=seed, group_by_length=True,
                collator=collator(tokenizer) if typed else None, **extra,
            )  # fmt: skip
    figures = {
        "known": float(sum(before)),
        "retained": statistics.mean(b for a, b in zip(before, recalled(), strict=True) if a),
        "task_tokens": statistics.mean(right(pairs[0][-HELD:])),
        "question_tokens": statistics.mean(right(pairs[1][-HELD:])),
    }
    if typed:
        batches = [collator(tokenizer)(part[-HELD:]) for part in sets]
        figures["gap"] = gap(router_report(model, [{k: v.to(DEVICE) for k, v in b.items()} for b in batches]))
    return figures
