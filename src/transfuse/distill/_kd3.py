"""Parts of KD3: the selection, the exchange of statistics, the shared classifier."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.errors import BadInput
from ..core.fields import suggest
from ..core.files import hash_state
from ._base import frozen, logits_of

__all__ = [
    "MixDistribution",
    "NoLinearHead",
    "NothingSelected",
    "Selection",
    "SharedHead",
    "check_modules",
    "check_pool",
    "identity_of",
    "install",
    "last_linear",
    "mix_distribution",
    "outputs",
    "select",
    "suited",
]


class NothingSelected(BadInput, RuntimeError):
    """No image of the pool can be trusted."""


class NoLinearHead(BadInput, TypeError):
    """A network whose classifier was not found."""


@dataclass(frozen=True)
class Selection:
    """What an epoch is trained on.

    Attributes:
        kept: Which images, bool `[U]`.
        thresholds: Least confidence per class, `[C]`; infinite for a class that is never predicted.
        coverage: Share of the classes of which something is kept.
    """

    kept: Tensor
    thresholds: Tensor
    coverage: float


def select(probabilities: Tensor, rho: float | None = 0.5, *, floor: float = 1.5) -> Selection:
    """Keep the top `rho` of the images predicted as each class, by confidence, and none below floor / C.

    The threshold of a class is the (1 - rho) quantile of its images' confidences: with n of them the number
    floor((n - 1) rho) + 1 is kept, and what ties with the last one. A class that is never predicted is skipped.

    Args:
        probabilities: p, `[U, C]`.
        rho: Share kept; None keeps all, whatever their confidence.
        floor: Least confidence, times 1 / C.

    Raises:
        NothingSelected: fewer than two images are kept; the confidences are shown in ten bins.
    """
    images, classes = probabilities.shape
    confidence, predicted = probabilities.max(-1)
    thresholds = torch.full_like(probabilities[0], torch.inf)
    if rho is None:
        kept = torch.ones_like(predicted, dtype=torch.bool)
        thresholds = torch.zeros_like(thresholds)
    else:
        for c in predicted.unique().tolist():
            own = confidence[predicted == c]
            count = math.floor((len(own) - 1) * rho + 1e-9) + 1
            thresholds[c] = own.topk(count).values[-1]
        kept = (confidence >= thresholds[predicted]) & (confidence >= floor / classes)
    if int(kept.sum()) < 2:
        bins = torch.histc(confidence.float().cpu(), bins=10, min=0.0, max=1.0).int().tolist()
        shown = ", ".join(f"{i / 10:.1f}-{(i + 1) / 10:.1f}: {n}" for i, n in enumerate(bins))
        problem = f"images of {images} reach {floor:g} / {classes} (confidences {shown})"
        raise NothingSelected(
            "pool", int(kept.sum()), problem, "lower floor, raise rho, or crawl other images"
        )
    coverage = len(predicted[kept].unique()) / classes
    return Selection(kept, thresholds, coverage)


def mix_distribution(x: Tensor, partner: Tensor, share: Tensor, eps: float = 1e-6) -> Tensor:
    """Give each map channel statistics between its own and its partner's.

    Args:
        x: `[B, C, H, W]`.
        partner: Which row each row mixes with, int64 `[B]`.
        share: l, the weight of its own statistics, `[B]`.
        eps: Added to standard deviations.

    Returns:
        s_mix (x - mu) / s + mu_mix, in x's dtype. No gradient reaches a row through its partner's statistics.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = exact.mean((2, 3), keepdim=True)
    spread = exact.std((2, 3), keepdim=True, correction=0) + eps
    own = share.to(exact.dtype).view(-1, 1, 1, 1)
    mixed_mean = own * mean + (1 - own) * mean.detach()[partner]
    mixed_spread = own * spread + (1 - own) * spread.detach()[partner]
    return (mixed_spread * (exact - mean) / spread + mixed_mean).to(x.dtype)


class MixDistribution(nn.Module):
    """`mix_distribution` with a random partner and l ~ Beta(beta, beta) per row; for images or feature maps.

    Args:
        beta: Small values keep one side's statistics nearly whole.
        eps: Added to standard deviations.
    """

    def __init__(self, beta: float = 0.1, *, eps: float = 1e-6):
        super().__init__()
        if not beta > 0:
            raise BadInput("beta", beta, "is not positive", "give a number above 0")
        self.beta, self.eps = beta, eps

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same; draws from the global random state."""
        partner = torch.randperm(len(x), device=x.device)
        parameter = torch.full((len(x),), self.beta, device=x.device)
        share = torch.distributions.Beta(parameter, parameter).sample()
        return mix_distribution(x, partner, share, self.eps)


class SharedHead(nn.Module):
    """A head that projects features and hands them to another network's frozen classifier.

    Args:
        projector: psi, `[B, D_s]` to `[B, D_t]`; trained.
        classifier: The other network's; a frozen copy is kept, bias included.
    """

    def __init__(self, projector: nn.Module, classifier: nn.Module):
        super().__init__()
        self.projector = projector
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> SharedHead:
        """The classifier stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Logits of `[B, D_s]`."""
        return self.classifier(self.projector(features))


def install(run: Any, width: int) -> nn.Module:
    """Make psi and, if it is to be shared, put it and the teacher's classifier in the student head's place.

    Args:
        run: A `KD3`.
        width: D_t.

    Returns:
        psi.
    """
    example = run.pool[:2]
    _, phi = outputs(run.student, example, run.student_head)
    psi = run.projector
    if psi is None:
        psi = nn.Sequential(nn.Linear(phi.shape[-1], width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
    parameter = next(run.student.parameters())
    psi = psi.to(device=parameter.device, dtype=parameter.dtype)
    _check_projector(psi, phi.to(parameter), width)
    if run.share_classifier:
        classifier = run.teacher.get_submodule(run.teacher_head)
        shared = SharedHead(psi, classifier).to(device=parameter.device, dtype=parameter.dtype)
        owner, _, name = run.student_head.rpartition(".")
        setattr(run.student.get_submodule(owner), name, shared)
    return psi


@torch.no_grad()
def _check_projector(psi: nn.Module, phi: Tensor, width: int) -> None:
    try:
        with frozen(psi):
            problem = None if (shape := tuple(psi(phi).shape)) == (len(phi), width) else f"gives {shape}"
    except RuntimeError as error:
        problem = f"cannot read the student's features ({error})"
    if problem:
        remedy = f"map {phi.shape[-1]} features to the teacher's {width}"
        raise BadInput("projector", type(psi).__name__, problem, remedy)


def check_pool(pool: Tensor) -> None:
    """Refuse what is no stack of images.

    Raises:
        BadInput: another number of axes, no image, or images of whole numbers.
    """
    if pool.dim() != 4 or len(pool) == 0:
        raise BadInput("pool", tuple(pool.shape), "is no stack of images", "give images [U, C, H, W]")
    if not pool.is_floating_point():
        raise BadInput("pool", pool.dtype, "holds no floating-point images", "scale them, say pool / 255")


def check_modules(run: Any) -> None:
    """Refuse modules that do not exist, heads that read no features, and a place to perturb that is no map.

    Args:
        run: A `KD3`.

    Raises:
        BadInput: one of them.
    """
    wanted = [(run.teacher, "teacher_head", True), (run.student, "student_head", True)]
    if run.perturb_at is not None:
        wanted.append((run.student, "perturb_at", False))
    for model, argument, head in wanted:
        name = getattr(run, argument)
        names = [each for each, _ in model.named_modules() if each]
        if name not in names:
            remedy = suggest(name, names, "list them with model.named_modules()")
            raise BadInput(argument, name, f"is no module of {type(model).__name__}", remedy)
        with torch.no_grad(), frozen(model), taps.capture(model, name, inputs=head) as seen:
            model(suited(run.pool[:2], model))
        shape = tuple(seen[name].shape) if name in seen else None
        if head and (shape is None or len(shape) != 2):
            raise BadInput(argument, name, f"reads {shape}, not features [B, D]", "name the classifier")
        if not head and (shape is None or len(shape) != 4):
            raise BadInput(argument, name, f"gives {shape}, not maps [B, C, H, W]", "name a convolution")


def identity_of(run: Any, **more: Any) -> dict[str, Any]:
    """What a run of KD3 is recognised by: its settings, its teacher and its pool.

    Args:
        run: A `KD3`.
        more: Arguments of `fit`.
    """
    names = (
        "teacher_head", "student_head", "rho", "floor", "warmup", "follow_student", "share_classifier", "tau",
        "weights", "temperature", "perturb_at",
    )  # fmt: skip
    settings = {name: getattr(run, name) for name in names}
    made = {"beta": run.mix.beta, "projector": repr(run.projector), "augment": run.augment is not None}
    hashes = {"teacher": hash_state(run.teacher.state_dict()), "pool": hash_state({"pool": run.pool})}
    return {"kd3": {**settings, **made, **more, **hashes}}


def suited(images: Tensor, model: nn.Module) -> Tensor:
    """Images on a model's device and in its dtype."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return images.to(device=parameter.device, dtype=parameter.dtype)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, head: str, size: int = 512) -> tuple[Tensor, Tensor]:
    """Logits `[B, C]` and the head's input `[B, D]`, in evaluation mode, without gradient, on the images' device."""
    logits, features = [], []
    with frozen(model), taps.capture(model, head, inputs=True) as seen:
        for part in images.split(size):
            logits.append(logits_of(model(suited(part, model))).to(images.device))
            features.append(seen[head].to(images.device))
    return torch.cat(logits), torch.cat(features)


def last_linear(model: nn.Module, images: Tensor, role: str) -> str:
    """Name of the last linear layer that has one output per class.

    Raises:
        NoLinearHead: there is none.
    """
    with torch.no_grad(), frozen(model):
        classes = logits_of(model(suited(images, model))).shape[-1]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not names or not names[-1]:
        problem = f"has no linear layer with {classes} outputs whose weights could be read"
        raise NoLinearHead(role, type(model).__name__, problem, f"name its classifier by {role}_head")
    return names[-1]
