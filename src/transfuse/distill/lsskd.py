"""LSSKD: a network teaches itself, its deep branches the shallow ones and its last epoch the present one.

:arxiv: 2506.07055
:moves: an image classifier's deeper stages and its earlier self -> its own weights
:access: logits, hidden, weights, training data
:reversible: no
:context: no

There is no teacher. Branches hang on the L stages of a backbone g; branch l runs copies of the stages above its own
(the last one an extra stage that keeps the size), pools to a feature f_l and answers z_l, one joint question: which
of N classes, and which of M rotations (column n M + j for class n under rotation j). Every image enters in M
rotations, one after the other, so that rows 0, M, 2M, ... are the images as they are. With q_l = softmax(z_l / tau),
p = softmax(g / tau) and sg stopping gradients, the loss is the sum of

    cls        CE(g(x), y)                                                              upright images alone
    sad        sum_l CE(z_l(t_j x), y M + j)                                            mean over images and rotations
    layer      tau^2 ( sum_{l<L} KL(sg q_{l+1} || q_l) + KL(sg qbar_L || p) )           times lam_kl
    iteration  tau^2 ( KL(p' || p) + sum_l KL(q'_l || q_l) )                            times lam_kl alpha_e
    feature    sum_{l<L} mean |f_l - sg f_{l+1}|^2                                      times lam_f

qbar_L(n) sums q_L over the rotation asked for and averages it over the rotations shown. Primes mark the network as it
was at the end of the epoch before, in evaluation mode; alpha_e = alpha_T e / E in epoch e of E, and 0 in the first.
All gradients reach the backbone. After training the branches are thrown away: the student is the backbone that came
in, with the same parameters, and costs nothing more.

The paper gives no code and leaves details open. Branches and temperature follow its ancestor HSAKD, where the branches
of a separate teacher guide the student's and the student's have no labels; here the network is its own teacher and
every branch also learns labels. The weights lam_kl = 1 and lam_f = 0.01, the ramp (PS-KD's) and features compared
after pooling are choices of this module. A branch starts from its stages' present weights.

    from transfuse.distill import Distiller
    from transfuse.distill.lsskd import LSSKD, Rotations

    objective = LSSKD(student, images[:2], stages=("layer1", "layer2", "layer3"))
    trainer = Distiller(student=student, objective=objective, data_collator=Rotations(4), train_dataset=rows)
    trainer.train()
    student = objective.export()
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import taps
from ..core.batches import IGNORED
from ..core.divergence import kl_terms
from ..core.errors import BadInput
from ..core.runs import evaluating
from ..core.training import seeded
from ._base import Objective, Signal, frozen, logits_of, model_inputs
from ._lsskd import AuxiliaryBranch, Memory, activations, answers_of

__all__ = [
    "LSSKD",
    "AuxiliaryBranch",
    "Rotations",
    "class_marginal",
    "class_scores",
    "feature_loss",
    "iteration_loss",
    "joint_labels",
    "layer_loss",
    "ramp",
    "rotated",
    "self_labels_loss",
]


def rotated(images: Tensor, count: int = 4) -> Tensor:
    """Each image followed by its rotations by 90, 180, ... degrees: `[B, C, H, H]` to `[B count, C, H, H]`.

    Raises:
        BadInput: images that are not square, or a count that is not 1 to 4.
    """
    if not 1 <= count <= 4:
        raise BadInput("count", count, "is not between 1 and 4 quarter turns", "use 4")
    if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
        remedy = "crop or pad the images to squares [B, C, H, H]"
        raise BadInput(
            "images", tuple(images.shape), "are not a batch of squares, which turning needs", remedy
        )
    return torch.stack([torch.rot90(images, j, (2, 3)) for j in range(count)], 1).flatten(0, 1)


def joint_labels(labels: Tensor, count: int = 4) -> Tensor:
    """Class and rotation as one label, y count + j: int64 `[B]` to `[B count]`, in the order of `rotated`."""
    turns = torch.arange(count, device=labels.device)
    return (labels.unsqueeze(1) * count + turns).flatten()


def class_marginal(logits: Tensor, count: int = 4, tau: float = 3.0) -> Tensor:
    """Log qbar: the classes of a branch, summed over the rotation asked for, averaged over those shown.

    Args:
        logits: z of a branch, `[B M, N M]`, float32 or float64.
        count: M.
        tau: Temperature.

    Returns:
        Log-probabilities `[B, N]`.
    """
    log_q = torch.log_softmax(logits / tau, -1)
    apart = log_q.view(-1, count, log_q.shape[-1] // count, count)  # [B, shown, N, asked]
    return torch.logsumexp(apart, (1, 3)) - math.log(count)


def class_scores(logits: Tensor, count: int = 4) -> Tensor:
    """Class scores of a branch over all rotations shown and asked for: sums of `[B M, N M]`, as `[B, N]`."""
    return logits.reshape(-1, count, logits.shape[-1] // count, count).sum((1, 3))


def self_labels_loss(branches: Sequence[Tensor], labels: Tensor, count: int = 4) -> Tensor:
    """`sad`: cross-entropy of every branch with the joint labels, summed over branches.

    Args:
        branches: z_1 ... z_L, each `[B M, N M]`.
        labels: Classes, int64 `[B]`.
        count: M.

    Returns:
        A scalar.
    """
    joint = joint_labels(labels, count)
    return torch.stack([nn.functional.cross_entropy(_exact(z), joint) for z in branches]).sum()


def layer_loss(final: Tensor, branches: Sequence[Tensor], count: int = 4, tau: float = 3.0) -> Tensor:
    """`layer`: each branch follows the next deeper one, and the final classifier the deepest branch's classes.

    Args:
        final: g of the upright images, `[B, N]`.
        branches: z_1 ... z_L, each `[B M, N M]`.
        count: M.
        tau: Temperature.

    Returns:
        A scalar, tau^2 included.
    """
    logs = [torch.log_softmax(_exact(z) / tau, -1) for z in branches]
    parts = [kl_terms(deep.detach(), own).mean() for own, deep in itertools.pairwise(logs)]
    target = class_marginal(_exact(branches[-1]).detach(), count, tau)
    parts.append(kl_terms(target, torch.log_softmax(_exact(final) / tau, -1)).mean())
    return tau**2 * torch.stack(parts).sum()


def iteration_loss(
    final: Tensor,
    branches: Sequence[Tensor],
    final_before: Tensor,
    branches_before: Sequence[Tensor],
    tau: float = 3.0,
) -> Tensor:
    """`iteration`: final classifier and branches follow what they said an epoch ago.

    Args:
        final: g of the upright images, `[B, N]`.
        branches: z_1 ... z_L, each `[B M, N M]`.
        final_before: g of the earlier network; takes no gradient.
        branches_before: z_1 ... z_L of the earlier network; the same.
        tau: Temperature.

    Returns:
        A scalar, tau^2 included.
    """
    parts = []
    pairs = zip((final, *branches), (final_before, *branches_before), strict=True)
    for own, before in pairs:
        log_p = torch.log_softmax(_exact(before).detach() / tau, -1)
        parts.append(kl_terms(log_p, torch.log_softmax(_exact(own) / tau, -1)).mean())
    return tau**2 * torch.stack(parts).sum()


def feature_loss(features: Sequence[Tensor]) -> Tensor:
    """`feature`: squared distance of each pooled feature `[B M, D]` to the next deeper one, mean over rows."""
    exact = [_exact(f) for f in features]
    pairs = itertools.pairwise(exact)
    return torch.stack([(own - deep.detach()).square().sum(-1).mean() for own, deep in pairs]).sum()


def ramp(epoch: int, total: int, alpha_T: float = 0.8) -> float:
    """alpha_e of epoch e = 1 ... E: alpha_T e / E, but 0 in the first, which has no earlier self."""
    return 0.0 if epoch <= 1 else alpha_T * epoch / total


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Rotations:
    """A collator that turns every image: `pixel_values` become those of `rotated`.

    Labels keep their place at the upright image; its turned copies have the label -100, which cross-entropy leaves
    out. So an evaluation with this collator still measures upright images alone.

    Args:
        count: M, 1 to 4 quarter turns.
        name: Column of the images.
    """

    def __init__(self, count: int = 4, *, name: str = "pixel_values"):
        if not 1 <= count <= 4:
            raise BadInput("count", count, "is not between 1 and 4 quarter turns", "use 4")
        self.count, self.name = count, name

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of an image `[C, H, H]` and `labels`."""
        images = torch.stack([torch.as_tensor(row[self.name]) for row in rows])
        labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
        return {self.name: rotated(images, self.count), "labels": self.labels(labels)}

    def labels(self, labels: Tensor) -> Tensor:
        """Classes `[B]` as `[B count]`, -100 at every turned image."""
        spread = labels.new_full((len(labels), self.count), IGNORED)
        spread[:, 0] = labels
        return spread.flatten()


class LSSKD(Objective):
    """Layered self-supervised self-distillation, for a `Distiller` without teacher and with `Rotations`.

    The branches are its parameters and train beside the student; the network of the epoch before is part of its
    state, and so of a checkpoint.

    Args:
        student: The image classifier that is trained.
        images: One or more images `[B, C, H, H]` to see the activations' sizes on.
        stages: Its stages, in order: modules that each take what the one before returns.
        transforms: M, the rotations shown, 1 to 4.
        tau: Temperature.
        alpha_T: Weight of `iteration` in the last epoch, 0 to 1.
        lam_kl: Weight of `layer` and `iteration`.
        lam_f: Weight of `feature`.
        lam_layer: A further weight of `layer`; 0 takes it out.
        lam_sad: Weight of `sad`.
        memory: Share of the older memory that stays when an epoch ends: 0 is a snapshot, more is a running mean.
        seed: Of the branches' new weights.

    Raises:
        BadInput: fewer than two stages, unknown ones, a temperature or weight out of range, images not square.
        NotApplicable: stages that do not follow each other.
    """

    needs_teacher = False
    student: nn.Module
    alpha: Tensor
    seen: Tensor

    def __init__(
        self,
        student: nn.Module,
        images: Tensor,
        *,
        stages: Sequence[str] = ("layer1", "layer2", "layer3"),
        transforms: int = 4,
        tau: float = 3.0,
        alpha_T: float = 0.8,
        lam_kl: float = 1.0,
        lam_f: float = 0.01,
        lam_layer: float = 1.0,
        lam_sad: float = 1.0,
        memory: float = 0.0,
        seed: int = 0,
    ):
        stages = tuple(stages)
        if len(stages) < 2:
            raise BadInput("stages", stages, "are too few", "name two or more, from shallow to deep")
        super().__init__(student_taps=stages)
        if not 1 <= transforms <= 4:
            raise BadInput("transforms", transforms, "is not between 1 and 4 quarter turns", "use 4")
        if not tau > 0:
            raise BadInput("tau", tau, "is not positive", "give a temperature above 0")
        for name, value in (
            ("lam_kl", lam_kl),
            ("lam_f", lam_f),
            ("lam_layer", lam_layer),
            ("lam_sad", lam_sad),
        ):
            if not value >= 0:
                raise BadInput(name, value, "is not a weight", "give a number from 0 up")
        for name, value, most in (("alpha_T", alpha_T, 1.0), ("memory", memory, 0.999)):
            if not 0.0 <= value <= most:
                raise BadInput(name, value, f"is not between 0 and {most:g}", "give a share")
        self.count, self.tau, self.alpha_T, self.keep = transforms, tau, alpha_T, memory
        self.lam_kl, self.lam_f, self.lam_layer, self.lam_sad = lam_kl, lam_f, lam_layer, lam_sad
        seen, classes = activations(student, rotated(images[:2], transforms), stages)
        with seeded(seed):
            self.branches = nn.ModuleList(
                AuxiliaryBranch.from_stages(student, stages, i, seen[stages[-1]], classes * transforms)
                for i in range(len(stages))
            )
        self.__dict__["student"] = student  # not registered: its parameters keep one owner
        self.before = Memory(student, self.branches)
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Refuse batches that were not turned."""
        labels, rows = batch["labels"], len(student.whole())
        turned = len(labels) == rows and rows % self.count == 0
        if not turned or bool((labels.view(-1, self.count)[:, 1:] != IGNORED).any()):
            problem = f"with {rows} rows of logits are not those of {self.count} rotations per image"
            raise BadInput("labels", labels.tolist(), problem, f"use data_collator=Rotations({self.count})")

    def on_epoch(self, student: nn.Module, epoch: int, total: int) -> None:
        """Remember the network as the last epoch left it; set alpha. A resumed epoch keeps what was remembered."""
        if epoch == 0:
            self.seen.fill_(0)
        elif epoch > int(self.seen):
            self.before.follow(student, self.branches, self.keep if int(self.seen) else 0.0)
            self.seen.fill_(epoch)
        self.alpha.fill_(ramp(epoch + 1, total, self.alpha_T))

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        final, labels = _exact(student.whole())[:: self.count], batch["labels"][:: self.count]
        features, answers = answers_of(self.branches, [student.taps[name] for name in self.student_taps])
        found = {
            "cls": nn.functional.cross_entropy(final, labels),
            "sad": self_labels_loss(answers, labels, self.count),
            "layer": layer_loss(final, answers, self.count, self.tau),
            "feature": feature_loss(features),
        }
        weights = {
            "cls": 1.0,
            "sad": self.lam_sad,
            "layer": self.lam_kl * self.lam_layer,
            "feature": self.lam_f,
        }
        alpha = float(self.alpha)
        if alpha and self.lam_kl:
            final_before, answers_before = self._earlier(batch)
            found["iteration"] = iteration_loss(final, answers, final_before, answers_before, self.tau)
            weights["iteration"] = self.lam_kl * alpha
        used = [found[name] * weight for name, weight in weights.items() if weight]
        return {"loss": torch.stack(used).sum(), **found}

    @torch.no_grad()
    def _earlier(self, batch: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """Final logits of the upright images and the branches' answers, from memory."""
        old = self.before.student
        with taps.capture(old, self.student_taps) as seen:
            final = logits_of(old(**model_inputs(old, batch)))[:: self.count]
        branches: Any = self.before.branches
        return final, answers_of(branches, [seen[name] for name in self.student_taps])[1]

    @torch.no_grad()
    def scores(self, images: Tensor) -> list[Tensor]:
        """Class scores `[B, N]` of each branch over all rotations of `images` `[B, C, H, H]`, in evaluation mode."""
        with frozen(self.student), taps.capture(self.student, self.student_taps) as seen:
            self.student(rotated(images, self.count))
        with evaluating(self.branches):
            answers = answers_of(self.branches, [seen[name] for name in self.student_taps])[1]
        return [class_scores(z, self.count) for z in answers]

    def export(self) -> nn.Module:
        """The bare backbone: the student that came in, which never held more than its own parameters."""
        return self.student

    def extra_repr(self) -> str:
        """For `print`."""
        return f"stages={self.student_taps}, transforms={self.count}, tau={self.tau}, alpha_T={self.alpha_T}"
