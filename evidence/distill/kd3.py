"""Can foreign images teach a student better when those are chosen that teacher and student trust?

quick: the teacher knows MNIST; the pool holds digits and letters of printed fonts, slanted, scaled and inverted.
full: the teacher knows CIFAR-10; the pool holds other CIFAR-10 images in other styles and as many unrelated pictures.
All arms make the same number of updates. The full tier has fewer of them than a paper would, and fewer yet on a CPU,
and one teacher for all seeds.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import data, nets
from torch import Tensor, nn

from transfuse.core.datasets import dataset_path
from transfuse.core.extras import require
from transfuse.core.training import generator
from transfuse.distill.kd3 import KD3

SLUG = "kd3"
CLAIM = (
    "With crawled images in place of the teacher's data, selecting those that teacher and student trust, sharing the "
    "teacher's classifier and contrasting exchanged statistics reaches 95.21 on CIFAR-10 (+0.37 over the best other "
    "method) and 78.44 on CIFAR-100 (+1.40); selection alone brings about 5 points."
)
RULE = {
    "quick": (
        "mean(kd3.accuracy) >= mean(kd_all.accuracy) + 2.0; mean(kd3.accuracy) >= mean(kd_random.accuracy) + 2.0"
    ),
    "full": (
        "mean(kd3.accuracy) >= mean(kd_all.accuracy) + 1.0; "
        "mean(no_selection.accuracy) <= mean(kd3.accuracy) + 0.2; "
        "mean(no_dynamics.accuracy) <= mean(kd3.accuracy) + 0.2; "
        "mean(no_sharing.accuracy) <= mean(kd3.accuracy) + 0.2; "
        "mean(no_alignment.accuracy) <= mean(kd3.accuracy) + 0.2; "
        "mean(no_contrast.accuracy) <= mean(kd3.accuracy) + 0.2; "
        "mean(kd3.kept_in_class) >= 1.3 * mean(kd3.pool_in_class)"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "The weight of alignment, 0.003 (near 0.4 of a mean over 128 features), and Adam at 3e-3 for all arms were "
    "chosen on seeds 100 and 101, which are not among those recorded; six settings of the two weights were compared "
    "there. The arm even_weights has the module's defaults (1, 1, 0.1): on those seeds it lost 1.5 and 2.7 points to "
    "plain distillation on the whole pool, because the alignment, a sum over features, drowns the soft labels in 300 "
    "updates. Projectors without batch norm were far worse. The margin is thin, and plain distillation on what the "
    "teacher alone selects (kd_confident) brings most of it. Selection does not work by finding digits: what is kept "
    "holds about 51 % of them, the pool 50 %. On seeds 100 and 101, with an alignment of 0.01, the method gave 87.8 "
    "and 92.1 with selection, 87.0 and 92.8 without. Networks with batch norm, SGD at 0.05 and smaller glyphs were "
    "given up on seed 100, where every student stayed near chance. Full, on a CPU (400 updates of 64 images under "
    "bfloat16, a teacher of 12,500 images): 6.9 points over plain distillation on the whole pool, which no part alone "
    "explains: it loses 1.5 without sharing and 0.8 without selection, and gains 3.0 without alignment, 1.9 without "
    "the student's say in the selection, 0.4 without contrast. What is kept holds 49 % images of the teacher's classes;"
    " the pool holds 50 %."
)

PLAIN = {"rho": None, "share_classifier": False, "weights": (1.0, 0.0, 0.0)}
BASELINES: dict[str, dict[str, Any]] = {
    "kd_all": PLAIN,
    "kd_random": PLAIN,  # on a random half of the pool
    "kd_confident": {**PLAIN, "rho": 0.5, "follow_student": False},
    "simkd": {"rho": None, "weights": (0.0, 1.0, 0.0)},
}
WHOLE: dict[str, Any] = {"weights": (1.0, 0.003, 0.1)}
REMOVALS: dict[str, dict[str, Any]] = {
    "no_selection": {**WHOLE, "rho": None},
    "no_dynamics": {**WHOLE, "follow_student": False},
    "no_sharing": {**WHOLE, "share_classifier": False},
    "no_alignment": {"weights": (1.0, 0.0, 0.1)},
    "no_contrast": {"weights": (1.0, 0.003, 0.0)},
}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    return quick(seed) if tier == "quick" else full(seed)


def arm(
    teacher: nn.Module, student: nn.Module, pool: Tensor, known: Tensor, *, steps: int, batch_size: int,
    seed: int, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Distil, in epochs of 20 updates where the selection allows it; what was kept in the last one."""
    method = KD3(teacher, student, pool, teacher_head="head", student_head="head", **options)
    share = 1.0 if method.rho is None else 0.9 * method.rho
    per_epoch = max(1, min(steps // 15, int(share * len(pool)) // batch_size))
    method.fit(
        epochs=-(-steps // per_epoch), batch_size=batch_size, max_steps=per_epoch, seed=seed,
        optimizer=lambda trained: torch.optim.Adam(trained, lr=3e-3),
    )  # fmt: skip
    kept = method.selections[-1].kept
    return {
        "kept": float(kept.float().mean()),
        "kept_in_class": float(known[kept].float().mean()),
        "pool_in_class": float(known.float().mean()),
    }


# --- quick: MNIST and printed glyphs -------------------------------------------------------------------------


def quick(seed: int) -> dict[str, dict[str, float]]:
    """A teacher on 4,000 digits; students a quarter as wide, 300 updates on 3,000 glyphs."""
    images, labels = data.mnist_5k()
    train, test = data.split(len(labels), (4000, 1000), seed)
    held = images[test], labels[test]
    teacher = nets.make(seed, LeNet, 16)
    nets.learn(teacher, images[train], labels[train], steps=400, lr=1e-3, batch_size=64, seed=seed)
    pool, known = glyphs()
    half = torch.randperm(len(pool), generator=generator(seed))[: len(pool) // 2]
    figures = {"teacher": {"accuracy": nets.accuracy(teacher, *held)}}
    arms = {**BASELINES, "even_weights": {}, "kd3": WHOLE}
    del arms["simkd"]  # in the full tier alone
    for name, options in arms.items():
        rows = half if name == "kd_random" else slice(None)
        student = nets.make(seed + 1, LeNet, 4)
        figures[name] = arm(
            teacher, student, pool[rows], known[rows], steps=300, batch_size=64, seed=seed, **options
        )
        figures[name]["accuracy"] = nets.accuracy(student, *held)
    return figures


class LeNet(nn.Module):
    """Two 5x5 convolutions with maxima over 2x2, a hidden layer, and `head`; no statistics of batches."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * width, 8 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8 * width, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.body(pixel_values))


@functools.cache
def glyphs(count: int = 3000) -> tuple[Tensor, Tensor]:
    """Printed digits and letters, half each, `[N, 1, 28, 28]`, and which are digits; half have dark ink."""
    matplotlib = require("matplotlib", extra="report")
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = [p for p in sorted(folder.glob("*.ttf")) if p.stem in FONTS or p.stem.startswith("STIXGeneral")]
    names += [p for p in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in p.stem]
    fonts = [ImageFont.truetype(str(path), 40) for path in names]
    random = np.random.default_rng(0)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    drawn = []
    for i in range(count):
        text = str(random.integers(10)) if i % 2 == 0 else letters[random.integers(len(letters))]
        font = fonts[random.integers(len(fonts))]
        sheet = Image.new("L", (64, 64))
        ImageDraw.Draw(sheet).text((32, 32), text, fill=255, font=font, anchor="mm")
        angle, shear = random.uniform(-0.35, 0.35), random.uniform(-0.3, 0.3)
        zoom = 64 / 28 * random.uniform(0.55, 1.0)
        cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
        matrix = np.array([[cos, -sin + shear * cos], [sin, cos + shear * sin]])
        shift = 32 - matrix @ (14 + random.uniform(-2, 2, size=2))
        row = (*matrix[0], shift[0], *matrix[1], shift[1])
        sheet = sheet.transform((28, 28), Image.Transform.AFFINE, row, Image.Resampling.BILINEAR)
        pixels = np.asarray(sheet, dtype=np.float32) / 255
        drawn.append(1 - pixels if random.random() < 0.5 else pixels)
    known = torch.arange(count) % 2 == 0
    return torch.from_numpy(np.stack(drawn)).unsqueeze(1), known


FONTS = ("cmr10", "cmb10", "cmss10", "cmtt10")


# --- full: CIFAR-10 in other styles, and other things ----------------------------------------------------------


# On either device: images of the teacher, updates of a student, images per update.
SCALES = {"cuda": (25_000, 800, 128), "cpu": (12_500, 400, 64)}


def full(
    seed: int, *, scale: tuple[int, int, int] | None = None, tested: int = 10_000
) -> dict[str, dict[str, float]]:
    """ResNet-20 on `count` images; ResNet-8 by a pool of 0.8 `count`, half of it other images in other styles."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without its cache, which would keep the first weights until the context ends.
    with torch.autocast(device, torch.bfloat16, enabled=device == "cpu", cache_enabled=False):
        return compared(seed, device, *(scale or SCALES[device]), tested)


def compared(
    seed: int, device: str, count: int, steps: int, batch_size: int, tested: int
) -> dict[str, dict[str, float]]:
    """Every arm's figures."""
    teacher, pool, known, own = cifar_world(device, count, tested)
    test = own[2], own[3]
    order = torch.randperm(len(pool), generator=generator(seed)).to(device)
    figures = {"teacher": {"accuracy": nets.accuracy(teacher, *test)}}
    arms: dict[str, dict[str, Any]] = {**BASELINES, "kd3": WHOLE, **REMOVALS, "kd3_25": WHOLE, "kd3_5": WHOLE}
    parts = {"kd_random": 0.5, "kd3_25": 0.25, "kd3_5": 0.05}
    for name, options in arms.items():
        rows = order[: int(parts.get(name, 1.0) * len(pool))]
        student = network(seed, 1, device)
        figures[name] = arm(
            teacher,
            student,
            pool[rows],
            known[rows],
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            **options,
        )
        figures[name]["accuracy"] = nets.accuracy(student, *test)
    student = network(seed, 1, device)
    nets.learn(student, own[0], own[1], steps=steps, lr=3e-3, batch_size=batch_size, seed=seed)
    figures["own_data"] = {"accuracy": nets.accuracy(student, *test)}
    return figures


def network(seed: int, blocks: int, device: str) -> nn.Module:
    """A ResNet that keeps a pixel's channels together in memory, where convolutions are faster."""
    return nets.make(seed, nets.ResNet, blocks).to(device, memory_format=torch.channels_last)


@functools.cache
def cifar_world(device: str, count: int, tested: int) -> tuple[nn.Module, Tensor, Tensor, tuple[Tensor, ...]]:
    """The teacher, the pool, which of it is in class, and the teacher's images, labels, and the test set."""
    foreign = count * 2 // 5
    images, labels = data.cifar10("train", count + foreign)
    test = data.cifar10("test", tested)
    mean, spread = images[:count].mean((0, 2, 3), keepdim=True), images[:count].std((0, 2, 3), keepdim=True)
    pool = torch.cat([restyled(images[count:]), unrelated(foreign)])
    known = torch.arange(len(pool)) < foreign
    normal = [((x - mean) / spread).to(device) for x in (images[:count], pool, test[0])]
    own = (normal[0], labels[:count].to(device), normal[2], test[1].to(device))
    teacher = network(0, 3, device)
    nets.learn(teacher, own[0], own[1], steps=count * 20 // 256, lr=3e-3, batch_size=min(256, count), seed=0)
    return teacher, normal[1], known.to(device), own


def restyled(images: Tensor) -> Tensor:
    """Each image in one of four styles, in turn: few tones, turned hues, blurred, or drawn in lines."""
    random = generator(0)
    out = images.clone()
    out[0::4] = (images[0::4] * 3).round() / 3
    turn = 1.0 + 4.0 * torch.rand(len(out[1::4]), generator=random)
    k = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    matrix = cos * torch.eye(3) + (1 - cos) * k + sin * cross  # a rotation about the grey axis
    out[1::4] = torch.einsum("bij,bjhw->bihw", matrix, images[1::4]).clamp(0, 1)
    blur = nn.functional.avg_pool2d
    out[2::4] = blur(blur(images[2::4], 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
    grey = images[3::4].mean(1, keepdim=True)
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    edges = nn.functional.conv2d(
        nn.functional.pad(grey, (1, 1, 1, 1), "replicate"), torch.stack([sobel, sobel.T]).unsqueeze(1)
    )
    out[3::4] = (1 - edges.norm(dim=1, keepdim=True)).clamp(0, 1).expand(-1, 3, -1, -1)
    return out


def unrelated(count: int) -> Tensor:
    """Emoji of neither animals nor places and vehicles (two fifths), silhouettes, and digits, as `[N, 3, 32, 32]`."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(dataset_path("emoji-64.parquet")).to_pylist()
    sheets = []
    for row in table:
        if row["category"].split()[0] in ("Animals", "Travel"):
            continue
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA").resize((32, 32))
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        sheets.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
    emoji = torch.from_numpy(np.stack(sheets)).permute(0, 3, 1, 2).float() / 255
    sizes = count - 2 * (count * 3 // 10), count * 3 // 10, count * 3 // 10
    found = []
    for source, size in zip((emoji, data.animal_shapes()[0], data.mnist_5k()[0]), sizes, strict=True):
        rows = torch.randint(len(source), (size,), generator=generator(1))
        some = source[rows]
        if some.shape[1] == 1:
            some = nn.functional.pad(some, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        found.append(some)
    return torch.cat(found)
