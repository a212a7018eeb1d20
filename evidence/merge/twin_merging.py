"""Does routing between low-rank changes give back what static merging loses?

quick: digits under six transforms, each with labels of its own. full: four LoRA fine-tunes of SmolLM2-135M.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _shared.data import digits, split
from _shared.nets import MLP, accuracy, learn, make
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from transfuse.core.generate import generate_texts
from transfuse.core.models import load
from transfuse.core.training import encode_examples, fit, generator, seeded
from transfuse.merge import merge
from transfuse.merge.twin_merging import TwinMergedModel, TwinMerging, normalised_score

SLUG = "twin-merging"
CLAIM = (
    "Routing each input between low-rank exclusive parts on top of a shared merge closes most of the gap between "
    "static merging and the fine-tuned experts: normalised score 95.8 against 58.3 for task arithmetic and 47.4 for "
    "TIES on eight GLUE tasks with RoBERTa-base; 28.34 points above the best static merge (abstract)."
)
RULE = {
    "quick": (
        "twin_10.normalised >= best_static.normalised + 25 in 3/3 seeds; "
        "twin_100.normalised >= twin_10.normalised - 1 in 3/3 seeds"
    ),
    "full": "twin.normalised >= task_arithmetic.normalised + 10",
}
SEEDS = {"quick": 3, "full": 1}
NOTES = (
    "quick: with the paper's router batch of 1024, fifty epochs over 1,620 inputs are fifty updates; the router then "
    "knew 68 % of the test inputs and the first part of the rule held in one of three seeds (42.0, 47.1, 48.6 against "
    "18.4, 21.3, 24.9 plus 25). A batch of 32 gives about as many updates as the paper's 44,000 inputs do; it was "
    "chosen among 1024, 256, 64 and 32 by the router's accuracy on its held-out inputs with the seeds 10 and 11, which "
    "are not recorded. Static merges have their scaling chosen on held-out digits, and the best of them is the best "
    "on the test digits."
)

SCALINGS = (0.1, 0.2, 0.3, 0.5, 0.8)
BATCH, RATE = 64, 1e-3
ROUTER_BATCH = 32
FEATURES = "3"  # the last hidden layer's activation


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    return quick(seed) if tier == "quick" else full(seed)


# --- quick: digits -----------------------------------------------------------------------------------------


def transforms() -> dict[str, Callable[[Tensor], Tensor]]:
    """Six views of an 8x8 image `[N, 64]`."""
    image = lambda x: x.view(-1, 8, 8)  # noqa: E731
    return {
        "identity": lambda x: x,
        "quarter": lambda x: image(x).rot90(1, (1, 2)).flatten(1),
        "mirror": lambda x: image(x).flip(2).flatten(1),
        "upside": lambda x: image(x).flip(1).flatten(1),
        "negative": lambda x: 1 - x,
        "transpose": lambda x: image(x).transpose(1, 2).flatten(1),
    }


def quick(seed: int) -> dict[str, dict[str, float]]:
    """A base on plain digits for 8 epochs, an expert per view and label order for 12; all layers are merged."""
    x, y = digits()
    train, routed, held, tested = split(len(x), (1000, 300, 197, 300), seed)
    views = transforms()
    orders = {task: torch.randperm(10, generator=generator(100 * seed + i)) for i, task in enumerate(views)}

    def trained(net: nn.Module, task: str | None, epochs: int) -> nn.Module:
        inputs, labels = x[train], y[train]
        if task is not None:
            inputs, labels = views[task](inputs), orders[task][labels]
        steps = epochs * (len(train) // BATCH)
        return learn(net, inputs, labels, steps=steps, lr=RATE, batch_size=BATCH, seed=seed)

    base = trained(make(seed, MLP, 64, 128, 128, 10), None, 8)
    experts = {task: trained(copy.deepcopy(base), task, 12) for task in views}

    def scores(part: Tensor, answer: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        found = {}
        with torch.no_grad():
            for task, view in views.items():
                right = answer(view(x[part]), task).argmax(-1) == orders[task][y[part]]
                found[task] = 100.0 * float(right.float().mean())
        return found

    own = {
        part: scores(rows, lambda q, task: experts[task](q))
        for part, rows in (("held", held), ("test", tested))
    }

    def figure(answer: Callable[[Tensor, str], Tensor], rows: str = "test") -> float:
        return normalised_score(scores(held if rows == "held" else tested, answer), own[rows])

    def static(method: str, **options: Any) -> nn.Module:
        net = copy.deepcopy(base)
        net.load_state_dict(merge(base=base, models=list(experts.values()), method=method, **options))
        return net

    candidates = {
        "average": [static("linear")],
        "task_arithmetic": [static("task_arithmetic", scaling=scaling) for scaling in SCALINGS],
        "ties": [static("ties", scaling=scaling) for scaling in SCALINGS],
        "dare": [static("dare_linear", density=0.3, scaling=scaling, seed=seed) for scaling in SCALINGS],
    }
    # Each baseline's scaling is the best on the held-out part; the best static merge is the best on the test part.
    chosen = {
        arm: max(nets, key=lambda net: figure(lambda q, _: net(q), "held"))
        for arm, nets in candidates.items()
    }
    arms = {arm: {"normalised": figure(lambda q, _, net=net: net(q))} for arm, net in chosen.items()}
    arms["base"] = {"normalised": figure(lambda q, _: base(q))}
    arms["best_static"] = {"normalised": max(arms[arm]["normalised"] for arm in candidates)}

    inputs = {task: view(x[routed]) for task, view in views.items()}
    twin = TwinMerging(base, experts, exclude=(), features=FEATURES, batch_size=ROUTER_BATCH, seed=seed)
    twin.fit_router(inputs)
    for arm, rank in (("twin_10", 0.1), ("twin_25", 0.25), ("twin_100", 1.0)):
        twin.rank = rank
        model = twin.build()
        arms[arm] = {
            "normalised": figure(lambda q, _, m=model: m(q)),
            "router": router_accuracy(model, {task: view(x[tested]) for task, view in views.items()}),
            "oracle": figure(lambda q, task, m=model: m(q, routing=m.one_hot(task))),
            "uniform": figure(lambda q, _, m=model: m(q, routing=torch.full((len(views),), 1 / len(views)))),
            "shared_alone": figure(lambda q, _, m=model: m(q, routing=torch.zeros(len(views)))),
            "top_1": figure(lambda q, _, m=model: m(q, routing=hard(m, q))),
            "bytes": float(model.exclusive_bytes),
        }
    arms["experts"] = {
        "normalised": 100.0, "accuracy": sum(own["test"].values()) / len(views),
        "base_accuracy": accuracy(base, x[tested], y[tested]),
    }  # fmt: skip
    return arms


@torch.no_grad()
def hard(model: TwinMergedModel, inputs: Tensor) -> Tensor:
    """The router's first choice, whole."""
    weights = model.routing_weights(inputs)
    return nn.functional.one_hot(weights.argmax(-1), weights.shape[1]).float()


@torch.no_grad()
def router_accuracy(model: TwinMergedModel, inputs: Mapping[str, Any]) -> float:
    """Share of inputs whose task has the largest weight."""
    right = [(model.routing_weights(x).argmax(-1) == i).float() for i, x in enumerate(inputs.values())]
    return float(torch.cat(right).mean())


# --- full: LoRA fine-tunes of SmolLM2-135M -----------------------------------------------------------------


def pairs(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Question and answer texts of a synthetic task; no two alike."""
    dice = random.Random(f"{task}/{seed}")
    people = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena"]
    things = [
        "river",
        "bridge",
        "city",
        "film",
        "book",
        "lake",
        "song",
        "tower",
        "ship",
        "school",
        "island",
        "garden",
    ]
    links = ["author", "owner", "maker", "founder", "painter", "builder", "editor", "keeper"]
    good = ["wonderful", "brilliant", "lovely", "excellent", "charming", "superb"]
    bad = ["dreadful", "boring", "awful", "terrible", "clumsy", "poor"]

    def one() -> tuple[str, str]:
        if task == "sparql":
            link, thing = dice.choice(links), f"{dice.choice(things)}_{dice.randrange(100)}"
            return f"Query for the {link} of {thing}:", f"SELECT ?x WHERE {{ :{thing} :{link} ?x }}"
        if task == "sums":
            a, b = dice.randrange(25), dice.randrange(25)
            return f"Compute {a} + {b} =", str(a + b)
        if task == "capitals":
            words = [dice.choice(people).lower(), dice.choice(things), dice.choice(links)]
            return f"Write in capitals: {' '.join(words)} ->", " ".join(words).upper()
        kind, words = dice.choice([("positive", good), ("negative", bad)])
        return f"Review: a {dice.choice(words)} {dice.choice(things)} by {dice.choice(people)}. Mood:", kind

    found: dict[tuple[str, str], None] = {}
    while len(found) < count:
        found[one()] = None
    return list(found)


TASKS = ("sparql", "sums", "capitals", "mood")
TRAIN, TEST, ROUTED, STEPS, ROWS = 320, 32, 200, 40, 8
RANK = 8


def full(seed: int) -> dict[str, dict[str, float]]:
    """Four adapters on SmolLM2-135M, merged as products; exact answers of greedy decoding."""
    base, tokenizer = load("smollm2-135m", dtype="bfloat16")
    data = {task: pairs(task, TRAIN + TEST, seed) for task in TASKS}
    with tempfile.TemporaryDirectory() as place:
        folders = [adapter(base, tokenizer, data[task][:TRAIN], seed, Path(place) / task) for task in TASKS]
        tests = {task: data[task][TRAIN:] for task in TASKS}
        own = {}
        for task, folder in zip(TASKS, folders, strict=True):
            expert = static(base, [folder], "task_arithmetic", scaling=1.0)
            own[task] = exact(expert, tokenizer, tests[task])

        def figure(model: Any) -> dict[str, float]:
            found = {task: exact(model, tokenizer, rows) for task, rows in tests.items()}
            return {"normalised": normalised_score(found, own), **found}

        arms = {
            "experts": {"normalised": 100.0, **own},
            "base": figure(base),
            "average": figure(static(base, folders, "linear")),
            "task_arithmetic": figure(static(base, folders, "task_arithmetic", scaling=0.3)),
            "ties": figure(static(base, folders, "ties", density=0.2, scaling=1.0)),
        }
        twin = TwinMerging(base, folders, tasks=TASKS, rank=RANK, batch_size=256, seed=seed)
        prompts = {task: [question for question, _ in data[task][:ROUTED]] for task in TASKS}
        model = twin.fit_router(prompts, tokenizer).build()
        arms["twin"] = {**figure(model), "bytes": float(model.exclusive_bytes)}
        chosen = [
            model.routing_weights(**encoded(tokenizer, [q for q, _ in tests[t]])).argmax(-1) for t in TASKS
        ]
        right = [(found == i).float() for i, found in enumerate(chosen)]
        arms["twin"]["router"] = float(torch.cat(right).mean())
    return arms


def adapter(base: Any, tokenizer: Any, rows: Sequence[tuple[str, str]], seed: int, folder: Path) -> Path:
    """A LoRA of the paper's rank 32 and alpha 16, trained on one task."""
    config = LoraConfig(r=32, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    with seeded(seed):
        model = get_peft_model(copy.deepcopy(base), config)
    examples = encode_examples(tokenizer, rows, end=True)
    fit(model, examples, lr=1e-3, max_steps=STEPS, batch_size=ROWS, seed=seed)
    model.save_pretrained(folder)
    return folder


def static(base: Any, folders: Sequence[Path], method: str, **options: Any) -> Any:
    """A copy of the base with the statically merged weights."""
    model = copy.deepcopy(base)
    model.load_state_dict(merge(base=base, models=list(folders), method=method, **options), strict=False)
    return model


def encoded(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts as a padded batch."""
    found = tokenizer(list(prompts), return_tensors="pt", padding=True)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def exact(model: Any, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> float:
    """Percent of greedy answers that are word for word right."""
    answers = generate_texts(model, tokenizer, [q for q, _ in rows], max_new_tokens=24)
    return 100.0 * sum(a.strip() == t for a, (_, t) in zip(answers, rows, strict=True)) / len(rows)
