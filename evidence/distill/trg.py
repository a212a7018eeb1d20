"""Do relations between tokens of a batch help a student where single images are dominated by frequent classes?

quick: long-tailed Animal-Shape-MNIST, a convolutional teacher and a student a quarter as wide. full: long-tailed and
balanced CIFAR-10, ResNet-20 to ResNet-8, against other relational losses and with each term left out.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _shared import data, nets
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from transfuse.core.training import generator
from transfuse.distill import Distiller, Signal
from transfuse.distill.survey_kd_llm import get
from transfuse.distill.trg import TRG

SLUG = "trg"
CLAIM = (
    "Distilling the graph of tokens beats distillation of logits and of relations between whole images (KD, RKD, CRD, "
    "IRG, HKD) on CIFAR-100 and ImageNet, and by more on their long-tailed versions; the paper's figures could not be "
    "confirmed."
)
RULE = {
    "quick": "mean(trg.accuracy) >= mean(kd.accuracy) + 0.3; mean(trg.tail) >= mean(kd.tail)",
    "full": (
        "mean(trg.accuracy) >= mean(kd.accuracy) + 0.5; mean(trg.accuracy) >= mean(irg.accuracy) + 0.3; "
        "mean(trg.balanced) >= mean(kd.balanced) - 0.2"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "The first half of the rule holds, the second does not: on rare classes TRG ends about one point below KD. In 200 "
    "steps the small student has hardly met them: in two of three seeds KD and TRG both score 0 there, and on average "
    "labels alone beat both. The students' rate, 0.04, was picked on two other seeds by KD and labels alone out of "
    "0.005 to 0.08 (cosine or constant); at lower rates with a cosine these score 0 on the rare third. TRG's own "
    "weights are its defaults, not tuned. full uses 15 epochs and 3 seeds to fit its ten minutes. These notes were "
    "written after the first run, nothing else was changed."
)

CLASSES = 10
QUICK = {"most": 300, "factor": 20, "batch": 32, "steps": 200, "rate": 4e-2, "teacher_steps": 300}
FULL = {
    "most": 2000,
    "factor": 50,
    "balanced": 1000,
    "batch": 128,
    "epochs": 15,
    "rate": 4e-3,
    "teacher_epochs": 20,
}
Rows = tuple[Tensor, Tensor]


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed: percent right on a balanced test set, and on thirds of the classes."""
    return quick(seed) if tier == "quick" else full(seed)


def quick(seed: int) -> dict[str, dict[str, float]]:
    """CE, KD and TRG on silhouettes."""
    images, labels = data.animal_shapes()
    train, test = long_tailed(labels, QUICK["most"], QUICK["factor"], 300, seed)
    train_rows, test_rows = (images[train], labels[train]), (images[test], labels[test])
    teacher = nets.make(seed, nets.CNN, (16, 32, 64))
    nets.learn(
        teacher, *train_rows, steps=QUICK["teacher_steps"], lr=5e-3, batch_size=QUICK["batch"], seed=seed
    )  # fmt: skip
    layers = {"student_layer": "stage3", "teacher_layer": "stage3"}
    arms = {"ce": cross_entropy(), "kd": plain(), "trg": TRG(tokens_per_image=8, seed=seed, **layers)}
    figures = {}
    for arm, objective in arms.items():
        student = nets.make(seed + 100, nets.CNN, (4, 8, 16))
        seconds = distil(
            student, teacher, objective, train_rows, seed, steps=QUICK["steps"], batch=QUICK["batch"],
            rate=QUICK["rate"],
        )  # fmt: skip
        figures[arm] = {**scores(student, *test_rows), "ms_per_step": 1000 * seconds / QUICK["steps"]}
    figures["teacher"] = scores(teacher, *test_rows)
    return figures


def full(seed: int) -> dict[str, dict[str, float]]:
    """All arms on long-tailed CIFAR-10; KD, IRG and TRG on a balanced part."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = data.cifar10()
    test = tuple(column.to(device) for column in data.cifar10("test"))
    tail, _ = long_tailed(labels, FULL["most"], FULL["factor"], 0, seed)
    even, _ = long_tailed(labels, FULL["balanced"], 1, 0, seed)
    figures: dict[str, dict[str, float]] = {}
    for part, chosen in (("tail", tail), ("even", even)):
        rows = (images[chosen], labels[chosen])
        per_epoch = -(-len(chosen) // FULL["batch"])
        teacher = nets.make(seed, nets.ResNet, 3).to(device)
        distil(
            teacher, None, cross_entropy(), rows, seed, steps=FULL["teacher_epochs"] * per_epoch,
            batch=FULL["batch"], rate=FULL["rate"], collate=Moved(seed),
        )  # fmt: skip
        if part == "tail":
            figures["teacher"] = scores(teacher, *test)
        for arm, objective in objectives(seed).items():
            if part == "even" and arm not in ("kd", "irg", "trg"):
                continue
            student = nets.make(seed + 100, nets.ResNet, 1).to(device)
            steps = FULL["epochs"] * per_epoch
            seconds = distil(
                student, teacher, objective, rows, seed, steps=steps, batch=FULL["batch"], rate=FULL["rate"],
                collate=Moved(seed),
            )  # fmt: skip
            if part == "tail":
                figures[arm] = {**scores(student, *test), "ms_per_step": 1000 * seconds / steps}
            else:
                figures[arm]["balanced"] = nets.accuracy(student, *test)
    return figures


def objectives(seed: int) -> dict[str, Any]:
    """The arms; every one but `ce` has the labels and the tempered KL with the teacher in common."""
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
    trg = functools.partial(TRG, tokens_per_image=4, seed=seed)
    return {
        "ce": cross_entropy(),
        "kd": plain(),
        "rkd": Pooled(extra=rkd, weight=1.0, **off),
        "sp": Pooled(extra=similarity, weight=3000.0, **off),
        "crd": Pooled(seed=seed, **{**off, "gamma": 0.8}, tau_start=0.07),
        "irg": Pooled(seed=seed, alpha=0.0),
        "trg": trg(),
        "trg_no_inner": trg(alpha=0.0),
        "trg_no_local": trg(beta=0.0),
        "trg_no_global": trg(gamma=0.0),
        "trg_fixed_tau": trg(tau_start=0.07),
    }


def cross_entropy() -> Any:
    """Labels alone."""
    return get("forward-kl", kd_weight=0.0, ce_weight=1.0)


def plain() -> Any:
    """KD: labels and the tempered KL, the same as TRG's without its graph."""
    return get("forward-kl", temperature=4.0, kd_weight=1.0, ce_weight=1.0)


class Pooled(TRG):
    """One node per image, the mean of its tokens, and further terms on those."""

    def __init__(
        self, *, extra: Callable[[Tensor, Tensor], Tensor] | None = None, weight: float = 0.0, **options: Any
    ):
        super().__init__(**options)
        self.extra, self.extra_weight = extra, weight

    def tokens(self, student: Signal, teacher: Signal) -> tuple[Tensor, Tensor]:
        """`[B, 1, D]` of each."""
        ours, theirs = super().tokens(student, teacher)
        return ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """TRG's terms on the pooled nodes, and the further one."""
        assert teacher is not None
        found = super().forward(student, teacher, batch)
        if self.extra is not None:
            ours, theirs = self.tokens(student, teacher)
            found["loss"] = found["loss"] + self.extra_weight * self.extra(ours[:, 0], theirs[:, 0])
        return found


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational KD (arXiv 1904.05068): distances by 25, angles by 50."""
    distances, angles = [], []
    for x in (student, teacher):
        apart = torch.cdist(x, x)
        distances.append(apart / apart[apart > 0].mean().clamp_min(1e-12))
        rays = functional.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=-1)
        angles.append(rays @ rays.transpose(1, 2))
    return 25 * functional.smooth_l1_loss(*distances) + 50 * functional.smooth_l1_loss(*angles)


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving KD (arXiv 1907.09682): row-normalised Gram matrices."""
    ours, theirs = (functional.normalize(x @ x.T, dim=-1) for x in (student, teacher))
    return (ours - theirs).square().mean()


# --- data and training ----------------------------------------------------------------------------------------


def long_tailed(labels: Tensor, most: int, factor: float, test: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices with `most` factor^(-c / (C - 1)) images of class c, and `test` others of every class."""
    kept, held = [], []
    for c in range(CLASSES):
        own = (labels == c).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator(1000 * seed + c))]
        kept.append(own[: round(most * factor ** (-c / (CLASSES - 1)))])
        held.append(own[len(own) - test :])
    return torch.cat(kept), torch.cat(held)


class Moved:
    """Collates images shifted by up to four pixels and mirrored by chance."""

    def __init__(self, seed: int):
        self.random = generator(seed)

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        images = functional.pad(torch.stack([row["pixel_values"] for row in rows]), (4, 4, 4, 4))
        size = images.shape[-1] - 8
        x, y, mirror = (torch.randint(0, n, (len(rows),), generator=self.random).tolist() for n in (9, 9, 2))
        found = [image[:, j : j + size, i : i + size] for image, i, j in zip(images, x, y, strict=True)]
        found = [image.flip(-1) if m else image for image, m in zip(found, mirror, strict=True)]
        return {"pixel_values": torch.stack(found), "labels": torch.stack([row["labels"] for row in rows])}


def distil(
    student: nn.Module, teacher: nn.Module | None, objective: Any, rows: Rows, seed: int, *, steps: int, batch: int,
    rate: float, collate: Any = None,
) -> float:  # fmt: skip
    """Train the student; returns the seconds it took."""
    args = TrainingArguments(
        output_dir="unused", per_device_train_batch_size=batch, max_steps=steps, learning_rate=rate, seed=seed,
        lr_scheduler_type="cosine", logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_drop_last=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Distiller(
        student=student, teacher=teacher, objective=objective, train_dataset=data.rows(*rows), args=args,
        data_collator=collate,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def scores(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent right on all classes and on the frequent, middle and rare ones (4, 3 and 3 of them)."""
    found = {"accuracy": nets.accuracy(model, images, labels)}
    for name, low, high in (("head", 0, 4), ("medium", 4, 7), ("tail", 7, 10)):
        chosen = (labels >= low) & (labels < high)
        found[name] = nets.accuracy(model, images[chosen], labels[chosen])
    return found
