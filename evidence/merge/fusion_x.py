"""Does choosing and weighting teachers anew for every example do less harm to single tasks than fusing them all?

quick: digits, whose ten classes stand for tasks. full: character models of five domains, and two that know little.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _shared import charlm
from _shared.data import digits, long_text, split
from _shared.domains import queries, sums
from _shared.nets import MLP, learn, make
from torch import Tensor, nn
from transformers import TrainingArguments

from transfuse.core.batches import minibatches
from transfuse.core.datasets import dataset_path
from transfuse.core.training import fit, generator, loop, seeded
from transfuse.merge.fusion_x import FusionTrainer, MultiTeacherFusion, SourceStore

SLUG = "fusion-x"
CLAIM = (
    "A selection network trained with the target, which chooses sources per example and weights them, reduces "
    "knowledge interference by up to 50 % against existing fusion when sources are added, and stays stable as the "
    "pool of sources grows."
)
RULE = {
    "quick": "fusion_x.interference <= 0.7 * worse.interference; fusion_x.accuracy >= clm.accuracy",
    "full": (
        "fusion_x.nll < clm.nll in 3/3 seeds; fusion_x.interference <= mince.interference in 3/3 seeds; "
        "fusion_x_weak.nll - fusion_x.nll < mean_weak.nll - mean.nll in 3/3 seeds"
    ),
}
SEEDS = {"quick": 1, "full": 3}  # quick: totals over 5 seeds inside
NOTES = (
    "quick: five seeds are summed inside one run, because the rule asks for totals and for the worse of two of "
    "them; interference is counted over both lambdas, against the target on labels alone with the same seed. A "
    "teacher knows six classes in a row. Six variants were seen on seeds 100 to 102, which are not recorded, with "
    "all figures in view: one rate for teachers, student and selection network of 1e-3 or 3e-3, teachers of six or "
    "of two classes, and at 1e-3 also a selection network at 1e-2. Classes below labels alone were there 10 against "
    "5 (MinCE) and 9 (mean), and 9 with the faster network; with two classes 17 against 10 and 17, and 12; at 3e-3 "
    "10 against 10 and 12, with two classes 15 against 15 and 19. 3e-3 was taken because at 1e-3 labels alone end "
    "at 91.8 %, undertrained. The recorded seeds were run with these settings only. The margin is thin: one class "
    "fewer than the rule allows (10 against 12 above would fail), and a class has about 60 images, so that one "
    "image is 1.7 points. The gain in accuracy over labels alone is firm, but the mean has it too. MinCE has hardly "
    "more interference here, and without the feedback loss there is less. A network drawn anew at each call, as in "
    "the released code, does as much harm as the mean. full: targets start from random weights and are not among "
    "the sources; with seven sources tau is 0.15 x 5 / 7, because 0.15 is above 1 / 7 and the network would not be "
    "trained."
)

WITHIN = 5  # seeds of the quick tier's totals
MARGIN = 0.5  # points by which a task must be below the target trained alone to count as interfered with
LAMBDAS = (0.9, 0.5)
ARMS: dict[str, dict[str, Any]] = {
    "mince": {"mode": "mince"},
    "mean": {"mode": "mean"},
    "reward_softmax": {"mode": "reward-softmax"},
    "fusion_x": {"mode": "gate"},
    "no_feedback": {"mode": "gate", "feedback_weight": 0.0},
    "random_gate": {"mode": "random-gate"},
}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm."""
    return quick(seed) if tier == "quick" else full(seed)


# --- quick: digits -----------------------------------------------------------------------------------------

TEACHERS, GROUP = 5, 6  # a teacher knows six classes in a row, beginning with twice its number
TAUGHT, LEARNT = 900, 300
EPOCHS, BATCH, RATE = 40, 30, 3e-3


def quick(seed: int) -> dict[str, dict[str, float]]:
    """Sums of interference over seeds and both lambdas, means of accuracy; `worse` is the worse of MinCE and mean."""
    runs = [one_seed(s) for s in range(WITHIN * seed, WITHIN * (seed + 1))]
    arms: dict[str, dict[str, float]] = {}
    for arm in runs[0]:
        arms[arm] = {}
        for name in runs[0][arm]:
            values = [found[arm][name] for found in runs]
            total = name.startswith(("interference", "size"))
            arms[arm][name] = sum(values) if total else sum(values) / len(values)
        for name in ("interference", "accuracy"):
            arms[arm] |= {f"{name}_{i}": found[arm][name] for i, found in enumerate(runs)}
    arms["worse"] = dict(max(arms["mince"], arms["mean"], key=lambda found: found["interference"]))
    return arms


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    """Every arm on one split of the digits, from one initial student and in one order of its images."""
    x, y = digits()
    taught, learnt, tested = split(len(x), (TAUGHT, LEARNT, len(x) - TAUGHT - LEARNT), seed)
    teachers = [teacher(x[taught], y[taught], i, seed) for i in range(TEACHERS)]
    with torch.no_grad():
        said = torch.stack([torch.softmax(net(x[learnt]), -1) for net in teachers], 1)
        ce = (
            -said.gather(2, y[learnt].view(-1, 1, 1).expand(-1, TEACHERS, 1))
            .squeeze(2)
            .clamp_min(1e-30)
            .log()
        )
        own = [class_scores(net(x[tested]), y[tested]) for net in teachers]
    columns = {"x": x[learnt], "y": y[learnt], "said": said, "ce": ce}

    def trained(lm_weight: float, **options: Any) -> tuple[Tensor, float]:
        student = make(seed, MLP, 64, 48, 48, 10)
        with seeded(seed):
            fusion = MultiTeacherFusion(TEACHERS, lm_weight=lm_weight, **options)
        heard: list[float] = []

        def step(batch: dict[str, Tensor]) -> Tensor:
            found = fusion(student(batch["x"]), batch["y"], batch["said"].unbind(1), batch["ce"])
            heard.append(float(found.selected.float().sum(-1).mean()))
            return found.loss

        both = nn.ModuleDict({"student": student, "fusion": fusion})
        optimizer = torch.optim.Adam(both.parameters(), lr=RATE)
        loop(
            both, minibatches(columns, BATCH, seed=seed), step, optimizer=optimizer, epochs=EPOCHS, seed=seed
        )
        last = heard[-LEARNT // BATCH :]
        with torch.no_grad():
            return class_scores(student(x[tested]), y[tested]), sum(last) / len(last)

    def overall(scores: Tensor) -> float:
        return float((scores * y[tested].bincount(minlength=10)).sum() / len(tested))

    alone, _ = trained(1.0, mode="mean")
    arms = {
        "clm": {"accuracy": overall(alone), "interference": 0.0},
        "teachers": {"accuracy": sum(map(overall, own)) / TEACHERS, "interference": 0.0},
    }
    for arm, options in ARMS.items():
        arms[arm] = {"accuracy": 0.0, "interference": 0.0, "size": 0.0}
        for lm_weight in LAMBDAS:
            scores, heard = trained(lm_weight, **options)
            below = (alone - scores).clamp_min(0)
            below = torch.where(below > MARGIN, below, 0.0)
            mark = f"_at_{round(100 * lm_weight)}"
            figures = {"interference": float((below > 0).sum()), "size": float(below.sum())}
            arms[arm]["accuracy"] += overall(scores) / len(LAMBDAS)
            arms[arm] |= {f"accuracy{mark}": overall(scores), f"teachers{mark}": heard}
            for name, value in figures.items():
                arms[arm][name] += value
                arms[arm][name + mark] = value
    return arms


def teacher(images: Tensor, labels: Tensor, number: int, seed: int) -> nn.Module:
    """Trained on its classes alone; of the last one's labels half are replaced by any of the ten."""
    known = ((labels - 2 * number) % 10) < GROUP
    images, labels = images[known], labels[known]
    if number == TEACHERS - 1:
        random = generator(seed)
        chosen = torch.randperm(len(labels), generator=random)[: len(labels) // 2]
        labels = labels.index_put((chosen,), torch.randint(0, 10, (len(chosen),), generator=random))
    net = make(100 * seed + number, MLP, 64, 64, 10)
    return learn(net, images, labels, steps=30 * (len(labels) // 32), lr=3e-3, batch_size=32, seed=seed)


def class_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Percent right per class, `[10]`."""
    right = (logits.argmax(-1) == labels).float()
    return 100 * torch.stack([right[labels == c].mean() for c in range(10)])


# --- full: character models --------------------------------------------------------------------------------

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
DOMAIN_CHARS = 200_000
WIDTH, CONTEXT = 64, 48
SIZES = {"source": 500, "weak": 30, "steps": 1000, "rows": 6000, "batch": 16}  # steps, rows of the mixture
LEARNING = 3e-3
FULL_ARMS: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether the weak sources are heard
    "clm": ({"mode": "mean", "lm_weight": 1.0}, False),
    "mince": ({"mode": "mince"}, False),
    "mean": ({"mode": "mean"}, False),
    "fusion_x": ({"mode": "gate"}, False),
    "mince_weak": ({"mode": "mince"}, True),
    "mean_weak": ({"mode": "mean"}, True),
    "fusion_x_weak": ({"mode": "gate", "threshold": 0.15 * 5 / 7}, True),  # the same share of 1 / N
}


@functools.cache
def domains() -> dict[str, Tensor]:
    """Character ids of five kinds of text."""
    import argparse
    import ast
    import asyncio.base_events
    import datetime
    import decimal
    import typing

    modules: Sequence[ModuleType] = (argparse, typing, ast, asyncio.base_events, decimal, datetime, inspect)
    facts = json.loads(dataset_path("counterfact/edit.json").read_text(encoding="utf-8"))
    texts = {
        "prose": long_text(),
        "code": "\n".join(inspect.getsource(module) for module in modules),
        "sparql": "\n".join(query for _, query in queries()),
        "arithmetic": "\n".join(f"{prompt} {target}" for prompt, target in sums(2000, 0)),
        "json": "\n".join(json.dumps(fact) for fact in facts[:400]),
    }
    place = {char: i for i, char in enumerate(ALPHABET)}
    return {
        name: torch.tensor([place[char] for char in text if char in place][:DOMAIN_CHARS])
        for name, text in texts.items()
    }


def full(seed: int, sizes: dict[str, int] = SIZES) -> dict[str, dict[str, float]]:
    """NLL per domain; a domain is interfered with where it is 0.005 nats (half a point) above the target alone."""
    train = {name: ids[: len(ids) * 9 // 10] for name, ids in domains().items()}
    held = {name: ids[len(ids) * 9 // 10 :] for name, ids in domains().items()}

    def source(number: int, ids: Tensor, steps: int) -> nn.Module:
        model = charlm.make(100 * seed + number, len(ALPHABET), WIDTH)
        rows = charlm.windows(ids, 16 * steps, 100 * seed + number, CONTEXT)
        fit(model, rows, lr=LEARNING, max_steps=steps, batch_size=16, loss=next_character, seed=seed)
        return model

    sources = [source(i, ids, sizes["source"]) for i, ids in enumerate(train.values())]
    sources += [source(5 + i, train[name], sizes["weak"]) for i, name in enumerate(("prose", "json"))]
    each = sizes["rows"] // len(train)
    mixture = [
        row for i, ids in enumerate(train.values()) for row in charlm.windows(ids, each, seed + i, CONTEXT)
    ]
    arms: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        stores = [
            SourceStore.capture(model, mixture, Path(place) / str(i), k=16, batch_size=64)
            for i, model in enumerate(sources)
        ]
        arms["sources"] = {
            name: charlm.held_out_nll(model, held[name], CONTEXT)
            for name, model in zip(train, sources, strict=False)
        }
        for arm, (options, weak) in FULL_ARMS.items():
            heard = stores if weak else stores[: len(train)]
            target = charlm.make(seed, len(ALPHABET), WIDTH)
            with seeded(seed):
                fusion = MultiTeacherFusion(len(heard), **options)
                args = TrainingArguments(
                    output_dir=place, per_device_train_batch_size=sizes["batch"], max_steps=sizes["steps"],
                    learning_rate=LEARNING, adam_beta2=0.99, lr_scheduler_type="cosine", report_to=[], seed=seed,
                    logging_strategy="no", save_strategy="no", disable_tqdm=True, use_cpu=True,
                )  # fmt: skip
                trainer = FusionTrainer(
                    model=target, fusion=fusion, sources=heard, train_dataset=mixture, args=args
                )
                trainer.train()
            target.eval()
            found = {name: charlm.held_out_nll(target, ids, CONTEXT) for name, ids in held.items()}
            above = [found[name] - arms["clm"][name] for name in held] if arm != "clm" else []
            figures = {
                name: value for name, value in trainer.figures[-1].items() if name.startswith("weight")
            }
            arms[arm] = {
                "nll": sum(found.values()) / len(found), **found, **figures,
                "teachers": trainer.figures[-1]["teachers"],
                "interference": float(sum(value > MARGIN / 100 for value in above)),
                "size": sum(value for value in above if value > MARGIN / 100),
            }  # fmt: skip
    return arms


def next_character(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the characters after the first."""
    logits = model(batch["input_ids"])[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
