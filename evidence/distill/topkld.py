"""Does self-distillation lift a low-bit image generator by one bit width, and are discrete tokens why it can?

The images are scikit-learn's digits: 64 tokens out of 17 grey levels, drawn one after the other for a given class.
quick: a GRU of width 96. full: four widths, and diffusion models of the same images beside them.
"""

from __future__ import annotations

import copy
import math
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from _shared import data, nets
from torch import Tensor, nn
from transformers import TrainingArguments

from transfuse.core.batches import minibatches
from transfuse.core.training import generator, loop, seeded
from transfuse.distill.survey_kd_llm import get
from transfuse.distill.topkld import (
    TopKLD,
    bake,
    bit_scaling,
    distil_qat,
    fake_quant,
    perturbation_tolerance,
)

SLUG = "topkld"
CLAIM = (
    "Quantization-aware self-distillation with TopKLD lifts a low-bit generator of discrete tokens by about one bit "
    "width (at 3 bits it beats forward and reverse KL), which post-training quantization does not; such generators "
    "lose less to quantization than diffusion models of equal full-precision quality."
)
RULE = {
    "quick": (
        "mean(topkld_2.fid) < mean(rtn_3.fid) - 3; mean(topkld_3.fid) < mean(rtn_3.fid) - 5; "
        "topkld_2.nll < rtn_3.nll in 3/3 seeds; topkld_3.nll < rtn_3.nll in 3/3 seeds"
    ),
    "full": (
        "mean(diffusion.loss_4) >= 1.5 * mean(language.loss_4); mean(diffusion.loss_3) >= 1.5 * mean(language.loss_3); "
        "mean(topkld_3.excess) <= mean(topkld_3.excess_error)"
    ),
}
SEEDS = {"quick": 3, "full": 5}
NOTES = (
    "At 3 bits the student is about one width up: distance 2.4 and 1.394 nats against 2.8 and 1.386 for 4 bits rounded "
    "and 3.5 and 1.440 for 3 bits rounded. At 2 bits it is not, and the rule's margins, stated in the unit of another "
    "classifier's features (where rounding to 2 bits costs 43, here 5.6), are out of reach: rounding to 3 bits costs "
    "1.3 here. Order of forward, reverse and TopKLD is within the spread of seeds. Tried before: 230 steps of the "
    "teacher at a constant rate of 4e-3 (full 2.6 and 1.403, 3 bits rounded 2.9 and 1.440, TopKLD 2.6 and 1.411 at 3 "
    "bits, 4.3 and 1.528 at 2), failed alike; the present rate was then chosen by the full-precision figures of seed "
    "10. There, rates of 4e-3 and 1e-2 in place of 1.5e-3 did not lift 2 bits (1.53 nats), and neither did 1000 steps "
    "of the teacher and 120 of distillation: 3.2 and 1.615 against 1.6 and 1.391 for 3 bits rounded, 7.9 and 3.063 for "
    "2 bits rounded; at 3 bits 1.4 and 1.356. Full: the two kinds do not match at full precision, where diffusion's "
    "distance is 0.33 and the tokens' 1.53, so that its relative loss has the smaller denominator; what rounding adds "
    "to the distance is larger for diffusion too, 0.67 against 0.26 at 4 bits and 4.7 against 1.6 at 3. Rounding to 3 "
    "bits costs 1.5, of which distillation takes back 1.1 to 1.2 whatever its divergence; TopKLD is the last of the "
    "three, behind forward KL by 0.09, within the standard error of 0.10."
)

LEVELS, CLASSES, PIXELS, HEAD = 17, 10, 64, 4
TEACHER_STEPS, QAT_STEPS, BATCH, SAMPLES = 280, 40, 32, 500


class DigitsForCausalLM(nn.Module):
    """Embedding, GRU, linear head over grey levels; the first token of a row says its class."""

    def __init__(self, width: int):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=LEVELS, use_cache=False)
        self.embed = nn.Embedding(LEVELS + CLASSES, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, LEVELS)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> Tensor:
        return self.head(self.body(self.embed(input_ids))[0])


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    device = "cuda" if tier == "full" and torch.cuda.is_available() else "cpu"
    world = World(seed, device)
    return quick(world) if tier == "quick" else full(world)


class World:
    """Images of a seed, split, and the classifier whose features they are compared by."""

    def __init__(self, seed: int, device: str):
        images, labels = data.digits()
        chosen = data.split(len(images), (1500, 297), seed)
        self.seed, self.device = seed, device
        rows = torch.cat([(LEVELS + labels).unsqueeze(1), (images * (LEVELS - 1)).round().long()], 1)
        self.train, self.test = (rows[part] for part in chosen)
        net = nets.make(seed, nets.MLP, PIXELS, 64, 32, CLASSES)
        nets.learn(net, images[chosen[0]], labels[chosen[0]], steps=400, lr=2e-3, batch_size=64, seed=seed)
        self.features = net[:-1].to(device)  # up to the last hidden layer
        self.real = self.moments(images[chosen[0]].to(device))

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the features of images `[n, 64]` in [0, 1]."""
        x = nn.Sequential.forward(self.features, images).double()
        return x.mean(0), torch.cov(x.T) + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)

    def distance(self, images: Tensor) -> float:
        """Frechet distance of Gaussians between the features of images and of the training images."""
        (m, s), (n, t) = self.real, self.moments(images)
        values, vectors = torch.linalg.eigh(s)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
        return float((m - n).square().sum() + s.trace() + t.trace() - 2 * cross)

    def figures(self, model: nn.Module, count: int = SAMPLES) -> dict[str, float]:
        """Distance of samples, and nats per pixel of the images held out."""
        return {"fid": self.distance(draw(model, count, self.seed, self.device)), "nll": self.nll(model)}

    @torch.no_grad()
    def nll(self, model: nn.Module) -> float:
        """Nats per pixel of the images held out."""
        rows = self.test.to(self.device)
        return float(nn.functional.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


@torch.no_grad()
def draw(model: Any, count: int, seed: int, device: str) -> Tensor:
    """Images `[count, 64]` in [0, 1], as many of each class."""
    random = generator(seed, device)
    token = LEVELS + torch.arange(count, device=device) % CLASSES
    pixels, state = [], None
    for _ in range(PIXELS):
        out, state = model.body(model.embed(token.unsqueeze(1)), state)
        token = torch.multinomial(torch.softmax(model.head(out[:, -1]), -1), 1, generator=random).squeeze(1)
        pixels.append(token)
    return torch.stack(pixels, 1).float() / (LEVELS - 1)


def teach(world: World, width: int, steps: int) -> nn.Module:
    """A generator trained on the images."""
    model = nets.make(world.seed, DigitsForCausalLM, width).to(world.device)
    batches = minibatches({"x": world.train}, BATCH, seed=world.seed, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    epochs = max(1, round(steps / (len(world.train) // BATCH)))
    last = epochs * (len(world.train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 20, (last - i) / (0.4 * last))
    )

    def step(batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["x"])[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["x"][:, 1:].flatten())

    loop(
        model, batches, step, optimizer=optimizer, scheduler=schedule, epochs=epochs, clip=1.0, seed=world.seed
    )  # fmt: skip
    return model.eval()


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy rounded to nearest."""
    return bake(fake_quant(copy.deepcopy(model), bits=bits))


def lifted(world: World, teacher: nn.Module, objective: Any, bits: int, steps: int) -> nn.Module:
    """A copy trained through the rounding."""
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in world.train.tolist()]
    with tempfile.TemporaryDirectory() as folder, seeded(world.seed):
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1.5e-3,
            lr_scheduler_type="constant", seed=world.seed, report_to=[], logging_strategy="no",
            save_strategy="no", disable_tqdm=True, use_cpu=world.device == "cpu",
        )  # fmt: skip
        student, _ = distil_qat(
            teacher=teacher, objective=objective, train_dataset=rows, bits=bits, args=args
        )  # fmt: skip
    return student


def objectives() -> dict[str, Any]:
    """Fresh objectives by name."""
    return {"forward": get("forward-kl"), "reverse": get("reverse-kl"), "topkld": TopKLD(k=HEAD)}


def quick(world: World) -> dict[str, dict[str, float]]:
    """The full-precision model, four rounded ones, and three objectives at 3 and 2 bits."""
    teacher = teach(world, 96, TEACHER_STEPS)
    result = {"full": world.figures(teacher)}
    for bits in (8, 4, 3, 2):
        result[f"rtn_{bits}"] = world.figures(rounded(teacher, bits))
    for bits in (3, 2):
        for name, objective in objectives().items():
            student = lifted(world, teacher, objective, bits, QAT_STEPS)
            result[f"{name}_{bits}"] = world.figures(student)
    batch = {"input_ids": world.test}
    for bits in (4, 3):
        found = perturbation_tolerance(
            teacher, rounded(teacher, bits), batch, layer="body", random=generator(world.seed)
        )
        result[f"rtn_{bits}"].update({name: found[name] for name in ("latent_error", "unchanged")})
    return result


# --- four widths, and diffusion ----------------------------------------------------------------------------

WIDTHS = (48, 96, 192, 384)
MANY, LONG, LONG_QAT, DIFFUSION_STEPS, TIMES = 4000, 600, 120, 4000, 100


def full(
    world: World, widths: tuple[int, ...] = WIDTHS, many: int = MANY, long: int = LONG, qat: int = LONG_QAT,
    diffusion: int = DIFFUSION_STEPS,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """What rounding costs a generator of tokens and one by diffusion; the objectives at 3 bits over the widths."""
    teachers = [teach(world, width, long) for width in widths]
    painters = [paint(world, 2 * width, diffusion) for width in widths]
    result: dict[str, dict[str, float]] = {"language": {}, "diffusion": {}}
    kinds = {
        "language": (teachers, lambda model: world.distance(draw(model, many, world.seed, world.device))),
        "diffusion": (painters, lambda model: world.distance(diffuse(model, many, world.seed, world.device))),
    }
    for kind, (models, score) in kinds.items():
        whole = [score(model) for model in models]
        result[kind]["fid"] = sum(whole) / len(whole)
        table = bit_scaling(models, (8, 4, 3), score)
        for bits in (8, 4, 3):
            found = [row["metric"] for row in table.rows if row["bits"] == bits]
            lost = [(now - before) / before for now, before in zip(found, whole)]
            result[kind][f"loss_{bits}"] = sum(lost) / len(lost)
            result[kind][f"exponent_{bits}"] = table.exponents[bits][1]
    scores: dict[str, list[float]] = {}
    for teacher in teachers:
        for name, objective in objectives().items():
            student = lifted(world, teacher, objective, 3, qat)
            scores.setdefault(f"{name}_3", []).append(world.figures(student, many)["fid"])
        scores.setdefault("rtn_3", []).append(world.figures(rounded(teacher, 3), many)["fid"])
    for name, values in scores.items():
        result[name] = {"fid": sum(values) / len(values)}
    gaps = torch.tensor([a - b for a, b in zip(scores["topkld_3"], scores["forward_3"])])
    # One standard error over the widths of five seeds, from this seed's spread.
    error = float(gaps.std()) / math.sqrt(len(gaps) * SEEDS["full"])
    result["topkld_3"].update({"excess": float(gaps.mean()), "excess_error": error})
    return result


class Painter(nn.Module):
    """Predicts the noise in an image `[n, 64]` from the image, the time and the class."""

    def __init__(self, width: int):
        super().__init__()
        self.time, self.kind = nn.Embedding(TIMES, width), nn.Embedding(CLASSES, width)
        self.inward, self.middle = nn.Linear(PIXELS, width), nn.Linear(width, width)
        self.outward = nn.Linear(width, PIXELS)

    def forward(self, x: Tensor, t: Tensor, kind: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.inward(x) + self.time(t) + self.kind(kind))
        return self.outward(hidden + nn.functional.silu(self.middle(hidden)))


def kept(device: str) -> Tensor:
    """Share of the image's variance left after each step."""
    return torch.cumprod(1 - torch.linspace(1e-3, 0.1, TIMES, device=device), 0)


def paint(world: World, width: int, steps: int) -> nn.Module:
    """A diffusion model trained on the images."""
    model = nets.make(world.seed, Painter, width).to(world.device)
    share = kept(world.device)
    batches = minibatches({"x": world.train}, 128, seed=world.seed, drop_last=True)

    def step(batch: dict[str, Tensor]) -> Tensor:
        x = 2 * batch["x"][:, 1:].float() / (LEVELS - 1) - 1
        t = torch.randint(0, TIMES, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        a = share[t].unsqueeze(1)
        return nn.functional.mse_loss(
            model(a.sqrt() * x + (1 - a).sqrt() * noise, t, batch["x"][:, 0] - LEVELS), noise
        )

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    epochs = max(1, round(steps / (len(world.train) // 128)))
    loop(model, batches, step, optimizer=optimizer, epochs=epochs, seed=world.seed)
    return model.eval()


@torch.no_grad()
def diffuse(model: nn.Module, count: int, seed: int, device: str) -> Tensor:
    """Images `[count, 64]` in [0, 1] by ancestral sampling, rounded to grey levels as the data are."""
    random = generator(seed, device)
    share = kept(device)
    kind = torch.arange(count, device=device) % CLASSES
    x = torch.randn(count, PIXELS, generator=random, device=device)
    for t in range(TIMES - 1, -1, -1):
        before = share[t - 1] if t else torch.ones((), device=device)
        step = 1 - share[t] / before
        noise = model(x, torch.full((count,), t, device=device), kind)
        x = (x - step / (1 - share[t]).sqrt() * noise) / (1 - step).sqrt()
        if t:
            x = x + step.sqrt() * torch.randn(x.shape, generator=random, device=device)
    return (((x + 1) / 2).clamp(0, 1) * (LEVELS - 1)).round() / (LEVELS - 1)
