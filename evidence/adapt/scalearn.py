"""Does scaling the adapters of other tasks help a new task with few examples, and do few scales suffice?

quick: eight yes-or-no questions about digits, on a frozen denoiser. full: six about LC-QuAD's questions, on MiniLM.
"""

from __future__ import annotations

import functools
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _shared import data
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from transfuse.adapt.scalearn import ScaLearnLinear, bottleneck, save, scalearn
from transfuse.core.data import read_rows
from transfuse.core.datasets import dataset_path
from transfuse.core.generate import pad_batch
from transfuse.core.models import load
from transfuse.core.training import generator, optimise, seeded

SLUG = "scalearn"
CLAIM = (
    "Learning only how much of each source adapter to add reaches AdapterFusion with 0.35 % of its parameters and "
    "beats the task's own adapter: GLUE average with RoBERTa-base 85.36 against 85.01 and 83.83, SuperGLUE 75.55 "
    "against 73.60 and 73.19; with 8 numbers in all (Uniform++), 85.14 and 74.93."
)
SAME = (
    "scalearn.accuracy >= adapter.accuracy + 0.02 in {n}/{n} seeds; "
    "scalearn.accuracy >= fusion.accuracy - 0.005 in {n}/{n} seeds; "
    "scalearn.parameters <= 0.05 * fusion.parameters in {n}/{n} seeds; "
    "uniform_shared.accuracy >= adapter.accuracy in {n}/{n} seeds"
)
RULE = {"quick": SAME.format(n=3), "full": SAME.format(n=5)}
SEEDS = {"quick": 3, "full": 5}
NOTES = (
    "Quick: of the eight attributes the first five are targets; their own adapters are never among the sources. "
    "Accuracies are means over the two classes. Learning rates of the two baselines are the best of three each "
    "(adapter 1e-3, 3e-3, 6e-3; fusion 3e-4, 1e-3, 3e-3) on seed 7, which is not recorded; the others have the "
    "paper's 6e-3. Fusion's starting values were made the published ones after that choice. `average` is the same "
    "model with every scale fixed at 1 / S, so that its head alone is trained; so is `soup`'s, on one adapter whose "
    "weights are the mean of all sources' (their inputs are the same, so none is nearer to the target). The full tier "
    "computes under bfloat16 autocast, all arms alike. There 32 examples teach a head little, whatever is under it: "
    "ScaLearn is the best on average (0.627; adapter 0.620, soup 0.606, average 0.605), but the adapter is ahead in "
    "two of five seeds and within the margin in a third. Fusion stays near chance (0.518) at the rate chosen on digits."
)

EXAMPLES, BATCH = 32, 8
RATE = {"adapter": 1e-3, "fusion": 3e-3}  # the others: the paper's 6e-3
ARMS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "fusion": {"variant": "fusion"},
    "average": {"variant": "uniform", "init_scale": 1.0},
    "soup": {},
    "scalearn": {},
    "uniform": {"variant": "uniform"},
    "uniform_shared": {"variant": "uniform", "share_layers": True},
}


@dataclass
class Setting:
    """A base model and tasks on it: `labels[task]`, with the rows of `inputs` that serve for what."""

    base: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    train: Tensor
    test: Tensor
    targets: list[str]
    places: Any
    head: str
    width: int
    source_steps: int
    epochs: int


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy of every arm over the targets, and what it trains besides the head."""
    setting = digits(seed) if tier == "quick" else questions(seed)
    found: dict[str, list[tuple[float, int]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        for task in setting.labels:
            model = bottleneck(
                setting.base(),
                r=setting.width,
                target_modules=setting.places,
                modules_to_save=[setting.head],
                seed=seed,
            )
            learn(
                model,
                setting,
                task,
                setting.train,
                steps=setting.source_steps,
                lr=3e-3,
                batch=BATCH * 4,
                seed=seed,
            )
            save(model, Path(scratch) / task)
        for task in setting.targets:
            sources = [Path(scratch) / name for name in setting.labels if name != task]
            rows = few(setting, task, seed)
            for arm in ARMS:
                found[arm].append(transfer(arm, setting, task, rows, sources, seed))
    return {
        arm: {"accuracy": statistics.mean(a for a, _ in pairs), "parameters": float(pairs[0][1])}
        for arm, pairs in found.items()
    }


def few(setting: Setting, task: str, seed: int) -> Tensor:
    """Training rows of a target: `EXAMPLES`, half of each class."""
    order = setting.train[torch.randperm(len(setting.train), generator=generator(50 + seed))]
    kinds = setting.labels[task][order]
    return torch.cat([order[kinds == kind][: EXAMPLES // 2] for kind in (0, 1)])


def transfer(
    arm: str, setting: Setting, task: str, rows: Tensor, sources: list[Path], seed: int
) -> tuple[float, int]:
    """Accuracy of an arm on a target, and its trained parameters without the head."""
    if arm in ("adapter", "soup"):
        model = bottleneck(
            setting.base(),
            r=setting.width,
            target_modules=setting.places,
            modules_to_save=[setting.head],
            seed=seed,
        )
        if arm == "soup":
            average_weights(model, sources, setting.head)
    else:
        model = scalearn(
            setting.base(), sources=sources, modules_to_save=[setting.head], seed=seed, **ARMS[arm]
        )
    if arm == "average":
        for module in model.modules():
            if isinstance(module, ScaLearnLinear):
                module.scalearn_omega.requires_grad_(False)
    own = sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n
    )
    steps = setting.epochs * (EXAMPLES // BATCH)
    learn(model, setting, task, rows, steps=steps, lr=RATE.get(arm, 6e-3), batch=BATCH, seed=seed)
    test = setting.test
    with torch.inference_mode():
        best = logits(model, setting, test).argmax(-1)
    right = (best == setting.labels[task][test]).float()
    kinds = setting.labels[task][test]
    return statistics.mean(float(right[kinds == kind].mean()) for kind in (0, 1)), own


def average_weights(model: PeftModel, sources: list[Path], head: str) -> None:
    """Give the model's adapter the mean of the sources' weights, and freeze it (AdapterSoup)."""
    stored = [load_file(folder / "adapter_model.safetensors") for folder in sources]
    own = get_peft_model_state_dict(model)
    for name in own:
        if f".{head}." not in name:
            own[name] = sum(each[name] for each in stored) / len(stored)
    set_peft_model_state_dict(model, own)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            parameter.requires_grad_(False)


def logits(model: nn.Module, setting: Setting, rows: Tensor) -> Tensor:
    """`[B, 2]`."""
    batch = {name: value[rows] for name, value in setting.inputs.items()}
    mask = batch.get("attention_mask")
    if mask is None:
        return model(**batch)
    longest = int(mask.sum(1).max())
    # Without autocast's cache, which would keep the first weights where a context lasts.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = model(**{name: value[:, :longest] for name, value in batch.items()}).logits
    return out.float()


def learn(
    model: nn.Module,
    setting: Setting,
    task: str,
    rows: Tensor,
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> None:
    """Adam on balanced batches, at a constant rate."""
    draw, labels = generator(seed), setting.labels[task]
    weights = 1 / labels[rows].bincount(minlength=2).float()[labels[rows]]
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        chosen = rows[torch.multinomial(weights, batch, generator=draw)]
        return nn.functional.cross_entropy(logits(model, setting, chosen), labels[chosen])

    model.train()
    with seeded(seed):
        optimise(trained, loss, lr=lr, steps=steps)
    model.eval()


# --- digits ------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Three residual blocks of width 64; `head` reads the last."""

    def __init__(self, out: int = 64):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(64, 128) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(128, 64) for _ in range(3))
        self.head = nn.Linear(64, out)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = pixel_values
        for up, down in zip(self.up, self.down, strict=True):
            h = h + down(torch.relu(up(h)))
        return self.head(h)


@functools.cache
def denoiser(seed: int) -> dict[str, Tensor]:
    """Weights of blocks that take noise off digits, without labels."""
    with seeded(seed):
        model = Denoiser()
    images, draw = data.digits()[0], generator(seed)

    def loss() -> Tensor:
        clean = images[torch.randint(len(images), (64,), generator=draw)]
        noisy = clean + 0.4 * torch.randn(clean.shape, generator=draw)
        return nn.functional.mse_loss(model(noisy), clean)

    optimise(list(model.parameters()), loss, lr=1e-3, steps=1500)
    return {name: value for name, value in model.state_dict().items() if "head" not in name}


def digits(seed: int) -> Setting:
    """Attributes of digits: 800 images for the sources, 597 to test."""
    images, classes = data.digits()
    train, test = data.split(len(images), (800, 597), seed)
    members = {
        "even": (0, 2, 4, 6, 8), "five_or_more": (5, 6, 7, 8, 9), "prime": (2, 3, 5, 7), "loop": (0, 6, 8, 9),
        "by_three": (0, 3, 6, 9), "three_or_more": (3, 4, 5, 6, 7, 8, 9), "square": (0, 1, 4, 9),
        "seven_or_more": (7, 8, 9),
    }  # fmt: skip
    labels = {name: torch.isin(classes, torch.tensor(own)).long() for name, own in members.items()}

    def base() -> nn.Module:
        with seeded(seed):
            model = Denoiser(2)
        model.load_state_dict(denoiser(seed), strict=False)
        return model.eval()

    return Setting(
        base, {"pixel_values": images}, labels, train, test, list(labels)[:5], ["down.0", "down.1", "down.2"], "head",
        8, 400, 60,
    )  # fmt: skip


# --- questions ---------------------------------------------------------------------------------------------

GOOD = ["wonderful", "superb", "charming", "brilliant", "delightful", "excellent", "splendid", "lovely"]
BAD = ["dreadful", "awful", "tedious", "horrible", "clumsy", "miserable", "dull", "terrible"]
THINGS = ["film", "book", "meal", "concert", "hotel", "journey", "game", "speech", "garden", "bridge"]


def questions(seed: int) -> Setting:
    """Five properties of LC-QuAD's questions, and of a made-up opinion that follows each."""
    rows = [row for _, row in read_rows(dataset_path("lcquad1-test.json"), "data")]
    draw = random.Random(0)
    good = [draw.random() < 0.5 for _ in rows]
    texts = []
    for row, liked in zip(rows, good, strict=True):
        one, other = draw.sample(THINGS, 2)
        opinion = f"The {one} near the {other} was {draw.choice(GOOD if liked else BAD)}."
        texts.append(f"{row['corrected_question']} {opinion}")
    properties: dict[str, Callable[[Any], bool]] = {
        "which_or_what": lambda row: row["corrected_question"].lower().startswith(("which", "what")),
        "typed_template": lambda row: int(row["sparql_template_id"]) >= 100,
        "many_answers": lambda row: len(row["answers"]) > 1,
        "count": lambda row: "COUNT" in row["sparql_query"].upper(),
        "two_hops": lambda row: "?x" in row["sparql_query"],
    }
    labels = {name: torch.tensor([int(has(row)) for row in rows]) for name, has in properties.items()}
    labels["opinion"] = torch.tensor(good).long()
    _, tokenizer = load("minilm", task="sequence-classification", num_labels=2, dtype="float32")
    ids, mask = pad_batch([tokenizer(text)["input_ids"] for text in texts], 0)
    train, test = data.split(len(rows), (600, 300), seed)

    def base() -> nn.Module:
        with seeded(seed):
            return load("minilm", task="sequence-classification", num_labels=2, dtype="float32")[0]

    return Setting(
        base, {"input_ids": ids, "attention_mask": mask}, labels, train, test, list(labels),
        r".*layer\.\d+\.output\.dense", "classifier", 24, 100, 15,
    )  # fmt: skip
