"""Does a mixture of specialised teachers help a student of one modality where plain cross-modal distillation hurts?

Images (MNIST, reduced to the main components) and spoken digits (log-mel with noise) are paired by label, as AV-MNIST
is made. The student of the first direction sees the image, the auxiliary teacher the sound, the multimodal one both.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import statistics
import wave

import numpy as np
import torch
from _shared.data import mnist_5k
from torch import Tensor, nn

from transfuse.core.batches import minibatches
from transfuse.core.datasets import dataset_path
from transfuse.core.training import generator, loop, seeded
from transfuse.distill.mst_distill import MSTDistill, together

SLUG = "mst-distill"
CLAIM = (
    "Teachers of other modalities, specialised by masks and routed per sample, train a unimodal student better than "
    "KD, MLLD, FitNets, OFA, RKD, CRD, DML, MGDFR and C2KD: first or second in accuracy on AV-MNIST, RAVDESS, "
    "VGGSound-50k and CrisisMMD in both directions."
)
PLAIN = ("alone", "kd_mm", "kd_aux", "kd_mean", "dml", "random", "unmasked")
RULE = {
    "quick": (
        "mean(mst.accuracy) >= mean(kd_mm.accuracy) + 2; mean(mst.accuracy) >= mean(kd_aux.accuracy) + 2; "
        "mean(mst.accuracy) >= mean(kd_mean.accuracy) + 2; mean(mst.accuracy) >= mean(alone.accuracy)"
    ),
    "full": (
        "; ".join(f"mean(mst.rank) <= mean({arm}.rank)" for arm in PLAIN)
        + "; mean(mst.accuracy) >= mean(kd_mean.accuracy) + 0.5"
    ),
}
SEEDS = {"quick": 3, "full": 5}
NOTES = (
    "Quick: above every plain arm in every seed, but by less than the two points asked over the best of them on "
    "average. Half the steps (84 of stage 1, 50 of stage 2, 250 of stage 3), tried on the same seeds to save time, "
    "left MST below all of them. Every arm keeps the student of its best validation epoch, and the sound teacher is "
    "as good as the student, so plain cross-modal distillation helps here, where the claim rests on its doing harm. "
    "Full: 1.7 points over the mean of the teachers, but second of eight by mean rank: routing at random between the "
    "same masked teachers ranks 1.85 against 2.35, at equal accuracy (90.75 and 90.76), and teachers whose masks were"
    " not trained (90.89) or students that skipped stage 1 (90.57) do as well within the seeds' spread. What helps "
    "here is several teachers, not the trained gate. The gate is the published hard one. MNIST stands for USPS."
)

BATCH, RATE, W_KL, CLASSES = 64, 1e-3, 0.2, 10
MASKED = {"mm": ["fc1", "fc2"], "aux": ["fc1", "fc2"]}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed: percent right on the test pairs."""
    if tier == "quick":
        data = pairs(seed, {"train": 500, "val": 200, "test": 1000}, energy=0.5, noise=0.8)
        arms = ("alone", "kd_mm", "kd_aux", "kd_mean", "mst", "mst_soft")
        return direction("image", data, arms, seed, steps=(167, 100, 500), width=4)
    data = pairs(seed, {"train": 1500, "val": 500, "test": 1000}, energy=0.5, noise=0.8)
    arms = (*PLAIN, "mst", "mst_soft", "mst_st", "no_s1", "no_s2")
    both = [direction(own, data, arms, seed, steps=(250, 120, 600), width=8) for own in ("image", "audio")]
    found = {
        arm: {"accuracy": statistics.mean(d[arm]["accuracy"] for d in both), "image": both[0][arm]["accuracy"],
              "audio": both[1][arm]["accuracy"]}
        for arm in both[0]
    }  # fmt: skip
    for arm in (*PLAIN, "mst"):
        found[arm]["rank"] = statistics.mean(rank(d, arm) for d in both)
    return found


def rank(figures: dict[str, dict[str, float]], arm: str) -> float:
    """Place among the baselines and the method, 1 for the best; equals share theirs."""
    own = figures[arm]["accuracy"]
    others = [figures[name]["accuracy"] for name in (*PLAIN, "mst") if name != arm]
    return 1 + sum(each > own for each in others) + 0.5 * sum(each == own for each in others)


# --- data ----------------------------------------------------------------------------------------------------


@functools.cache
def spoken() -> tuple[Tensor, Tensor, Tensor]:
    """Log-mel `[3000, 1, 32, 30]` with mean 0 and deviation 1, digits, and whether a recording is of the test part."""
    import pyarrow.parquet as pq

    table = pq.read_table(dataset_path("spoken-digits.parquet"))
    filters, window = mel_filters(), torch.hann_window(256)
    frames = []
    for row in table["audio"].to_pylist():
        with wave.open(io.BytesIO(row["bytes"])) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 2**15
        power = (
            torch.stft(torch.from_numpy(sound), 256, 128, window=window, return_complex=True).abs().square()
        )
        mel = torch.log(filters @ power + 1e-6)
        frames.append(nn.functional.interpolate(mel[None], size=30, mode="linear", align_corners=False))
    found = torch.stack(frames)
    takes = torch.tensor([int(take) for take in table["take"].to_pylist()])
    return (found - found.mean()) / found.std(), torch.tensor(table["label"].to_pylist()), takes < 5


def mel_filters(count: int = 32, size: int = 256, rate: int = 8000) -> Tensor:
    """Triangles evenly spaced on the mel scale, `[count, size / 2 + 1]`."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, size // 2 + 1)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(rise, fall))).float()


def pairs(seed: int, sizes: dict[str, int], *, energy: float, noise: float) -> dict[str, dict[str, Tensor]]:
    """Columns `image`, `audio`, `labels` of each part; images and recordings of two parts are never the same.

    Images keep the main components of the training part that hold `energy` of its variance; sounds get noise.
    """
    images, digits = mnist_5k()
    sounds, words, test_part = spoken()
    random = generator(seed)
    order = torch.randperm(len(images), generator=random)
    free = (~test_part).nonzero().flatten()
    free = free[torch.randperm(len(free), generator=random)]
    held = len(free) // 5
    recordings = {"val": free[:held], "train": free[held:], "test": test_part.nonzero().flatten()}
    found, start = {}, 0
    for name, count in sizes.items():
        chosen = order[start : start + count]
        start += count
        heard = torch.empty(count, dtype=torch.long)
        for digit in range(CLASSES):
            own = (digits[chosen] == digit).nonzero().flatten()
            some = recordings[name][words[recordings[name]] == digit]
            heard[own] = some[torch.randint(0, len(some), (len(own),), generator=random)]
        sound = sounds[heard] + noise * torch.randn(count, 1, 32, 30, generator=random)
        found[name] = {"image": images[chosen], "audio": sound, "labels": digits[chosen]}
    flat = found["train"]["image"].flatten(1)
    mean = flat.mean(0)
    _, values, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    share = (values**2).cumsum(0) / (values**2).sum()
    axes = axes[: int((share < energy).sum()) + 1]
    for part in found.values():
        seen = part["image"].flatten(1)
        part["image"] = (mean + (seen - mean) @ axes.T @ axes).view(-1, 1, 28, 28)
    return found


# --- networks ------------------------------------------------------------------------------------------------


class Tower(nn.Sequential):
    """Two convolutions of stride 2: `[B, 1, H, W]` to a vector."""

    def __init__(self, width: int):
        super().__init__(
            nn.Conv2d(1, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )


class Head(nn.Module):
    """The layers after the towers, 64 and 32 wide."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, 64), nn.Linear(64, 32), nn.Linear(32, CLASSES)

    def decide(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Image(Head):
    """Sees the image."""

    def __init__(self, width: int):
        super().__init__(2 * width * 7 * 7)
        self.tower = Tower(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.decide(self.tower(image))


class Audio(Head):
    """Hears the sound."""

    def __init__(self, width: int):
        super().__init__(2 * width * 8 * 8)
        self.tower = Tower(width)

    def forward(self, audio: Tensor) -> Tensor:
        return self.decide(self.tower(audio))


class Multimodal(Head):
    """Sees and hears."""

    def __init__(self, width: int):
        super().__init__(2 * width * (7 * 7 + 8 * 8))
        self.eye, self.ear = Tower(width), Tower(width)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        return self.decide(torch.cat([self.eye(image), self.ear(audio)], 1))


class Mean(nn.Module):
    """The mean of the two teachers' logits."""

    def __init__(self, mm: nn.Module, aux: nn.Module, other: str):
        super().__init__()
        self.mm, self.aux, self.other = mm, aux, other

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        return (
            self.mm(image=image, audio=audio) + self.aux({"image": image, "audio": audio}[self.other])
        ) / 2


# --- arms ----------------------------------------------------------------------------------------------------


def direction(own, data, arms, seed, *, steps, width) -> dict[str, dict[str, float]]:
    """Every arm with a student that sees `own`; each student makes as many updates, S1 and S3 together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = {name: {key: x.to(device) for key, x in part.items()} for name, part in data.items()}
    per_epoch = -(-len(data["train"]["labels"]) // BATCH)
    s1, s2, s3 = (round(n / per_epoch) for n in steps)
    kinds = {"image": Image, "audio": Audio}
    other = "audio" if own == "image" else "image"
    with seeded(seed):
        student, aux, mm = (
            net.to(device) for net in (kinds[own](width), kinds[other](2 * width), Multimodal(2 * width))
        )

    def fitted(student, teachers, epochs, layers=None, **options):
        student, teachers = copy.deepcopy((student, teachers))
        layers = layers or {name: [] for name in teachers}
        settings = {"epochs": epochs, "lr": RATE, "batch_size": BATCH, "seed": seed, "w_kl": W_KL, **options}
        method = MSTDistill(student, teachers, mask_layers=layers, **settings)
        method.fit(data["train"], data["val"])
        return method

    def by_labels(net):
        """Labels alone; the frozen network that the class asks for has no weight."""
        return fitted(net, {"idle": copy.deepcopy(net)}, (0, 0, s1 + s3), w_kl=0.0, w_lb=0.0).student

    def score(net) -> dict[str, float]:
        wanted = {key: x for key, x in data["test"].items() if key in net.forward.__code__.co_varnames}
        with torch.no_grad():
            return {
                "accuracy": 100
                * float((net.eval()(**wanted).argmax(1) == data["test"]["labels"]).float().mean())
            }

    learned = {"mm": by_labels(mm), "aux": by_labels(aux)}
    found = {f"teacher_{name}": score(net) for name, net in learned.items()}
    group = {"mm": mm, "aux": aux}
    makers = {
        "alone": lambda: by_labels(student),
        "kd_mm": lambda: fitted(student, {"mm": learned["mm"]}, (0, 0, s1 + s3)).student,
        "kd_aux": lambda: fitted(student, {"aux": learned["aux"]}, (0, 0, s1 + s3)).student,
        "kd_mean": lambda: (
            fitted(student, {"mean": Mean(learned["mm"], learned["aux"], other)}, (0, 0, s1 + s3)).student
        ),
        "no_s1": lambda: fitted(student, learned, (0, s2, s1 + s3), MASKED).student,
        "no_s2": lambda: fitted(student, group, (s1, 0, s3), MASKED).student,
    }
    for arm, make in makers.items():
        if arm in arms:
            found[arm] = score(make())
    if "dml" in arms:
        found["dml"] = score(cotrained(student, list(group.values()), data, s1 + s3, seed))
    start = fitted(student, group, (s1, s2, 0), MASKED)
    gates = {"mst": "hard", "mst_soft": "soft", "mst_st": "st", "random": "random"}
    for arm, gate in gates.items():
        if arm in arms:
            again = copy.deepcopy(start)
            again.gate, again.epochs = gate, (0, 0, s3)
            again.distil(data["train"], data["val"])
            found[arm] = score(again.student)
    if "unmasked" in arms:
        found["unmasked"] = score(fitted(start.student, start.teachers, (0, 0, s3)).student)
    return found


def said(net: nn.Module, columns: dict[str, Tensor]) -> Tensor:
    """What a network answers to those of its inputs that are there."""
    return net(**{name: columns[name] for name in inspect.signature(net.forward).parameters})


def cotrained(student, teachers, data, epochs, seed) -> nn.Module:
    """Stage 1 alone; like every arm, the student of the epoch with the lowest validation cross-entropy."""
    models = nn.ModuleList(copy.deepcopy([student, *teachers]))
    batches = minibatches(data["train"], BATCH, seed=seed)
    best: list = [float("inf"), None]

    def epoch(number):
        yield from batches(number)
        net = copy.deepcopy(models[0]).eval()
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(said(net, data["val"]), data["val"]["labels"]))
        if loss < best[0]:
            best[:] = [loss, net]

    def step(batch):
        return together([said(model, batch) for model in models], batch["labels"])

    loop(
        models,
        epoch,
        step,
        optimizer=torch.optim.Adam(models.parameters(), lr=RATE),
        epochs=epochs,
        seed=seed,
    )
    return best[1]
