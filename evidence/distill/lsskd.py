"""Does a network that teaches itself across depth, rotations and epochs learn more from few images?

quick: silhouettes of animals, 50 per class, against labels alone, rotated copies as plain augmentation, and PS-KD.
full: CIFAR-10 and a tenth of its images; also label smoothing, deep supervision, BYOT, and the method without each of
its terms (on the tenth). On a GPU ResNet-20 and 10,000 images, on a CPU ResNet-8 and 4,000; fewer epochs and seeds than
a paper would have.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _shared import data, nets
from torch import Tensor, nn
from transformers import TrainingArguments

from transfuse.core.training import generator, seeded
from transfuse.distill import Distiller, Objective, Signal
from transfuse.distill.lsskd import LSSKD, Rotations, ramp, rotated

SLUG = "lsskd"
CLAIM = (
    "A network that teaches itself across depth, rotations and epochs gains 4.54 points on average over PS-KD and "
    "1.14 over SSKD on CIFAR-100, most with few images, at no cost when it is used."
)
RULE = {
    "quick": (
        "mean(lsskd.accuracy) >= mean(ce.accuracy) + 1.0; mean(lsskd.accuracy) >= mean(ps_kd.accuracy) + 0.5"
    ),
    "full": (
        "mean(lsskd.all) >= mean(ce.all); mean(lsskd.all) >= mean(ce_rotated.all); "
        "mean(lsskd.all) >= mean(smoothing.all); mean(lsskd.all) >= mean(deep_supervision.all); "
        "mean(lsskd.all) >= mean(byot.all); mean(lsskd.all) >= mean(ps_kd.all); "
        "mean(lsskd.few) >= mean(ce.few); mean(lsskd.few) >= mean(ce_rotated.few); "
        "mean(lsskd.few) >= mean(smoothing.few); mean(lsskd.few) >= mean(deep_supervision.few); "
        "mean(lsskd.few) >= mean(byot.few); mean(lsskd.few) >= mean(ps_kd.few) + 1.0; "
        "lsskd.extra_parameters == 0 in 3/3 seeds; lsskd.export_gap == 0 in 3/3 seeds"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "Two hundred updates leave this small network underfitted (about 70 % right on its own 500 images), and every "
    "further loss then slows it. Tried on seeds 100 and 101, which are not recorded: learning rates 0.05 and 0.2, Adam "
    "at 3e-3 and 1e-2. Tried on seed 100: without layer, iteration, feature, both KLs and feature, or all; sad and KL "
    "weights of 0.3 (63.6 against 63.3 of labels alone); upright images normalised apart from turned ones (no gain); "
    "batch norm measured anew on upright images (worse). PS-KD also stays below labels alone. With 800 updates the "
    "order turns on seed 100, if by less than the rule asks: 76.4 against 76.0 of labels alone and 75.2 of PS-KD. So "
    "the defaults were kept. Full, on a CPU (620 updates under "
    "bfloat16): on 400 images above all baselines, as the rule asks, by 0.1 (label smoothing) to 1.2 (PS-KD, deep "
    "supervision) and 9.5 (rotated copies), though without sad, layer or iteration terms it is better still (41.4, "
    "41.3, 40.8); on 4,000 images it is behind label smoothing, labels alone and deep supervision."
)

TURNS = 4
BASELINES = ("ce", "ce_rotated", "ps_kd")
MORE = ("smoothing", "deep_supervision", "byot")
PARTS = {"no_sad": "lam_sad", "no_layer": "lam_layer", "no_iteration": "alpha_T", "no_feature": "lam_f"}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    if tier == "quick":
        return quick(seed)
    return full(seed)


def quick(seed: int) -> dict[str, dict[str, float]]:
    """50 silhouettes per class, three stages of 8, 16, 32 channels, 200 updates of 32 images."""
    images, labels = data.animal_shapes()
    order = torch.randperm(len(labels), generator=generator(seed))
    few = torch.cat([order[labels[order] == c][:50] for c in range(10)])
    held = torch.ones(len(labels), dtype=torch.bool)
    held[few] = False
    train, test = (images[few], labels[few]), (images[held], labels[held])
    figures = {}
    for arm in (*BASELINES, "lsskd"):
        student = nets.make(seed, nets.CNN, (8, 16, 32))
        stages = ("stage1", "stage2", "stage3")
        figures[arm] = teach(arm, student, stages, *train, steps=200, batch_size=32, seed=seed)
        figures[arm]["accuracy"] = nets.accuracy(student, *test)
    return figures


# On either device: blocks of the network, images, images per batch and epochs with all of them, then with a tenth.
SCALES = {"cuda": (3, 10_000, (256, 15), (64, 30)), "cpu": (1, 4_000, (64, 10), (32, 48))}


def full(
    seed: int, *, scale: tuple[int, int, tuple[int, int], tuple[int, int]] | None = None, tested: int = 10_000
) -> dict[str, dict[str, float]]:
    """A ResNet on CIFAR-10 images and on a tenth of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks, count, *plans = scale or SCALES[device]
    images, labels = (x.to(device) for x in data.cifar10("train", 50_000))
    test = [x.to(device) for x in data.cifar10("test", tested)]
    mean, spread = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    order = torch.randperm(len(labels), generator=generator(seed))[:count].to(device)
    test[0] = (test[0] - mean) / spread
    figures: dict[str, dict[str, float]] = {}
    subsets = {"all": order, "few": order[: count // 10]}
    for (metric, rows), (batch_size, passes) in zip(subsets.items(), plans, strict=True):
        train = (images[rows] - mean) / spread, labels[rows]
        parts = PARTS if metric == "few" else ()
        for arm in (*BASELINES, *MORE, "lsskd", *parts):
            student = nets.make(seed, nets.ResNet, blocks).to(device, memory_format=torch.channels_last)
            steps = passes * -(-len(rows) // batch_size)
            stages = ("layer1", "layer2", "layer3")
            more = teach(
                arm,
                student,
                stages,
                *train,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                crop=True,
                bf16=True,
            )
            figures.setdefault(arm, {}).update(more)
            figures[arm][metric] = nets.accuracy(student, *test)
    return figures


# --- one training run ----------------------------------------------------------------------------------------


def teach(
    arm: str,
    student: nn.Module,
    stages: Sequence[str],
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    crop: bool = False,
    bf16: bool = False,
) -> dict[str, float]:
    """Train `student` in place by the arm's objective; all arms share optimizer, steps, order and schedule."""
    blank = copy.deepcopy(student)
    objective, turns, spread_labels = objective_of(arm, student, stages, images[:2], seed)
    parameters = [*student.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    ends = [round(steps * share) for share in (150 / 240, 180 / 240, 210 / 240)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, ends, gamma=0.1)
    with tempfile.TemporaryDirectory() as folder, seeded(seed):
        Distiller(
            student=student, objective=objective, optimizers=(optimizer, schedule),
            data_collator=Batches(images, labels, turns, spread_labels, crop),
            train_dataset=[{"index": i} for i in range(len(labels))],
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=batch_size, max_steps=steps, max_grad_norm=0.0,
                seed=seed, bf16=bf16, use_cpu=not images.is_cuda, dataloader_pin_memory=False,
                report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
            ),
        ).train()  # fmt: skip
    if not isinstance(objective, LSSKD):
        return {}
    exported = objective.export()
    blank.load_state_dict(exported.state_dict())
    with torch.no_grad():
        gap = float((blank.eval()(images[:64]) - exported.eval()(images[:64])).abs().max())
    sizes = [sum(p.numel() for p in net.parameters()) for net in (exported, blank)]
    return {"extra_parameters": float(sizes[0] - sizes[1]), "export_gap": gap}


def objective_of(
    arm: str, student: nn.Module, stages: Sequence[str], images: Tensor, seed: int
) -> tuple[Objective, int, bool]:
    """The arm's objective, its rotations per image, and whether turned images have the upright one's label."""
    if arm in ("lsskd", *PARTS):
        options: dict[str, Any] = {PARTS[arm]: 0.0} if arm in PARTS else {}
        return LSSKD(student, images, stages=stages, seed=seed, **options), TURNS, False
    if arm == "deep_supervision":  # branches that know classes alone
        return LSSKD(student, images, stages=stages, transforms=1, lam_kl=0, lam_f=0, seed=seed), 1, False
    if arm == "byot":
        return BYOT(LSSKD(student, images, stages=stages, transforms=1, seed=seed)), 1, False
    if arm == "ps_kd":
        return PSKD(student), 1, False
    return Labels(0.1 if arm == "smoothing" else 0.0), TURNS if arm == "ce_rotated" else 1, True


class Batches:
    """Rows chosen on the images' own device, cropped and mirrored at random, and turned."""

    def __init__(self, images: Tensor, labels: Tensor, turns: int, spread: bool, crop: bool):
        self.images, self.labels, self.spread, self.crop = images, labels, spread, crop
        self.rotations = Rotations(turns)

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        index = torch.tensor([row["index"] for row in rows], device=self.images.device)
        images, labels = self.images[index], self.labels[index]
        if self.crop:
            images = jittered(images)
        turns = self.rotations.count
        named = labels.repeat_interleave(turns) if self.spread else self.rotations.labels(labels)
        return {"pixel_values": rotated(images, turns), "labels": named}


def jittered(images: Tensor, pad: int = 4) -> Tensor:
    """Each image shifted by up to `pad` pixels and mirrored half of the time."""
    count, _, side, _ = images.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, count, 1)).to(images.device)
    ramp_ = torch.arange(side, device=images.device)
    rows, columns = shifts[0] + ramp_, shifts[1] + ramp_
    mirrored = torch.rand(count, 1).to(images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    wide = nn.functional.pad(images, (pad,) * 4)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return wide[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# --- baselines -----------------------------------------------------------------------------------------------


class Labels(Objective):
    """Cross-entropy with labels, smoothed or not."""

    needs_teacher = False

    def __init__(self, smoothing: float):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy
        return {"loss": loss(student.whole().float(), batch["labels"], label_smoothing=self.smoothing)}


class PSKD(Objective):
    """Labels softened by what the network of the last epoch says, more and more (PS-KD)."""

    needs_teacher = False

    def __init__(self, student: nn.Module):
        super().__init__()
        self.before = [copy.deepcopy(student)]  # in a list: not trained
        self.alpha = 0.0

    def on_epoch(self, student: nn.Module, epoch: int, total: int) -> None:
        self.before[0].load_state_dict(student.state_dict())
        self.before[0].eval()
        self.alpha = ramp(epoch + 1, total, 0.8)

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        logits = student.whole().float()
        target = nn.functional.one_hot(batch["labels"], logits.shape[-1]).float()
        if self.alpha:
            with torch.no_grad():
                said = self.before[0](batch["pixel_values"]).float().softmax(-1)
            target = (1 - self.alpha) * target + self.alpha * said
        return {"loss": nn.functional.cross_entropy(logits, target)}


class BYOT(Objective):
    """Branches learn labels, the final classifier's softened answers and its features (Be Your Own Teacher)."""

    needs_teacher = False

    def __init__(self, base: LSSKD, share: float = 0.3, weight: float = 0.03, tau: float = 3.0):
        super().__init__(student_taps=base.student_taps)
        self.branches = base.branches
        self.share, self.weight, self.tau = share, weight, tau

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        final, labels = student.whole().float(), batch["labels"]
        deepest = student.taps[self.student_taps[-1]].float().mean((2, 3)).detach()
        soft = (final.detach() / self.tau).softmax(-1)
        loss = nn.functional.cross_entropy(final, labels)
        for branch, name in zip(self.branches[:-1], self.student_taps, strict=False):
            feature, z = branch(student.taps[name])
            z = z.float()
            loss = loss + (1 - self.share) * nn.functional.cross_entropy(z, labels)
            told = nn.functional.cross_entropy(z / self.tau, soft) * self.tau**2
            apart = (feature.float() - deepest).square().sum(-1).mean()
            loss = loss + self.share * told + self.weight * apart
        return {"loss": loss}
