"""SKT: a density counter a quarter as wide, taught where its teacher is active and how the layers correlate.

:arxiv: 2003.10120
:moves: a density counter's maps, activations and relations between layers -> a narrow counter's weights
:access: logits, hidden, weights, training data
:reversible: no
:context: no

A counter is a fully convolutional network whose output map, summed, is the number of objects in an image. Student and
teacher are tapped at the same depths. Above each tap of the student a 1x1 convolution with ReLU lifts its channels to
the teacher's; these layers belong to the objective and the student is kept without them. With S_l and T_l the lifted
and the teacher's maps of tap l, and the two output maps as one more map each:

    L_cos = sum over taps l and places p of 1 - cos(S_l[:, p], T_l[:, p])                     (intra-layer patterns)
    L_fsp = sum over pairs i < j of || F_ij(T) - F_ij(S) ||_F^2,  F_ij = X_i X_j^T / (h w)    (inter-layer relations)
    L     = ||S(x) - y||^2 + ||S(x) - T(x)||^2 + lambda_inter L_fsp + lambda_intra L_cos

For L_fsp all maps are brought to one grid (the first taps by max-pooling that rounds up, kernel = stride = `pool`) and
normalised per image and channel (no affine, eps 1e-5) to X `[C, h w]`. The output map is in L_fsp, not in L_cos.

The authors' code computes F of the first image of a batch only, which is right for the batches of 1 that it uses.
Here every term is computed per image and averaged over the images of a batch, so that a batch of 1 gives the code's
value and the balance of the terms does not depend on the batch. All terms are sums over places, so the weights of 0.5
change their meaning with the size of a crop: `reduction="sum"` keeps that, `"mean"` divides each term by how many
numbers it adds up. A place where all channels are 0 has cosine 0 and costs 1, as torch's eps has it. Targets must not
be negative; `shrink_density` therefore cuts off the little that cubic interpolation undershoots.

    from transfuse.distill import Distiller
    from transfuse.distill.skt import SKT, CSRNet, DensityCounter, slim

    teacher = CSRNet()  # with trained weights
    student = slim(teacher, 4)
    Distiller(student=student, teacher=teacher, objective=SKT(), train_dataset=rows).train()  # labels: density maps
    counts = DensityCounter(student).predict(images)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ._base import Objective, Signal
from ._counters import CSRNET_TAPS, CSRNet, DensityCounter, cost, he, shrink_density, slim

__all__ = [
    "CSRNET_TAPS",
    "SKT",
    "CSRNet",
    "DensityCounter",
    "cost",
    "on_one_grid",
    "pattern_distance",
    "relation_distance",
    "relations",
    "shrink_density",
    "slim",
]


Reduction = Literal["sum", "mean"]


def pattern_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, reduction: Reduction = "sum"
) -> Tensor:
    """IntraPT: how far the directions of the channel vectors are apart, place by place.

    Args:
        student: Lifted maps, `[B, C_l, H_l, W_l]` each.
        teacher: The teacher's, of the same shapes.
        reduction: "sum" over places and taps; "mean" over the places of a tap, then over taps.

    Returns:
        `[B]`.

    Raises:
        IncompatibleModels: another number of maps, or maps of other shapes.
    """
    _same_maps(student, teacher)
    angles = [1.0 - nn.functional.cosine_similarity(s, t, dim=1).flatten(1) for s, t in zip(student, teacher)]
    if reduction == "sum":
        return torch.stack([angle.sum(1) for angle in angles]).sum(0)
    return torch.stack([angle.mean(1) for angle in angles]).mean(0)


def on_one_grid(maps: Sequence[Tensor], pool: Sequence[int]) -> list[Tensor]:
    """Max-pool map l by kernel = stride = `pool[l]`, rounding up; those beyond `pool` stay as they are.

    Args:
        maps: `[B, C_l, H_l, W_l]` each.
        pool: Factors, from the first map on.

    Raises:
        IncompatibleModels: the grids still differ.
        BadInput: the grid has one place only, where there is no variance to divide by.
    """
    found = [
        nn.functional.max_pool2d(each, pool[i], pool[i], ceil_mode=True) if i < len(pool) else each
        for i, each in enumerate(maps)
    ]
    for i, each in enumerate(found):
        if each.shape[-2:] != found[-1].shape[-2:]:
            sizes = (tuple(each.shape[-2:]), tuple(found[-1].shape[-2:]))
            raise IncompatibleModels(
                "pool", tuple(pool), f"leaves map {i} and the last at {sizes[0]} and {sizes[1]}",
                "give each tap the factor between its grid and the output's",
            )  # fmt: skip
    if found[-1].shape[-2] * found[-1].shape[-1] == 1:
        raise BadInput("images", (1, 1), "is a grid of one place, which has no variance", "use larger images")
    return found


def relations(maps: Sequence[Tensor]) -> list[Tensor]:
    """Dense FSP: `F_ij` of every pair i < j of maps on one grid, per image.

    Args:
        maps: `[B, C_l, h, w]` each; normalised here per image and channel.

    Returns:
        For each i but the last, `[B, C_i, C_{i+1} + ... + C_n]`: its matrices with all later maps, side by side.
    """
    places = maps[0].shape[-2] * maps[0].shape[-1]
    flat = [nn.functional.instance_norm(each, eps=1e-5).flatten(2) for each in maps]
    return [flat[i] @ torch.cat(flat[i + 1 :], 1).transpose(1, 2) / places for i in range(len(flat) - 1)]


def relation_distance(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, reduction: Reduction = "sum"
) -> Tensor:
    """InterRT: squared Frobenius distance of the relations, pair by pair.

    Args:
        student: Maps on one grid, `[B, C_l, h, w]` each (see `on_one_grid`).
        teacher: The teacher's, of the same shapes.
        reduction: "sum" over entries and pairs; "mean" over the entries of a pair, then over pairs.

    Returns:
        `[B]`.

    Raises:
        IncompatibleModels: another number of maps, or maps of other shapes.
    """
    _same_maps(student, teacher)
    squares = [(a - b).square().sum(1) for a, b in zip(relations(teacher), relations(student), strict=True)]
    if reduction == "sum":
        return torch.cat(squares, 1).sum(1)
    widths = [each.shape[1] for each in student]
    pairs = [
        block.sum(1) / (widths[i] * block.shape[1])
        for i, row in enumerate(squares)
        for block in row.split(widths[i + 1 :], 1)
    ]
    return torch.stack(pairs).mean(0)


def _same_maps(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != len(teacher):
        raise IncompatibleModels(
            "student", len(student), f"maps, the teacher has {len(teacher)}", "tap both at the same depths"
        )
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise IncompatibleModels(
                f"student: map {i}", tuple(ours.shape), f"is not the teacher's {tuple(theirs.shape)}",
                "tap both at the same depths, with equal strides and rounding",
            )  # fmt: skip


class SKT(Objective):
    """Structured knowledge transfer between two density counters, run by `Distiller`.

    Rows hold the models' inputs and `labels`, the density map `[1, h, w]`. The lifting layers are trained beside the
    student and are in checkpoints; the student that is kept has none.

    Args:
        student_taps: Names of the student's modules, from the input on.
        teacher_taps: The teacher's at the same depths.
        pool: Pooling of the first taps for the relations.
        lambda_intra: Weight of the patterns.
        lambda_inter: Weight of the relations.
        lambda_hard: Weight of the target density.
        lambda_soft: Weight of the teacher's density.
        reduction: "sum" as published, or "mean".

    Raises:
        BadInput: taps that do not pair, weights below 0, an unknown reduction.
    """

    def __init__(
        self,
        *,
        student_taps: Sequence[str] = CSRNET_TAPS,
        teacher_taps: Sequence[str] = CSRNET_TAPS,
        pool: Sequence[int] = (8, 4, 2),
        lambda_intra: float = 0.5,
        lambda_inter: float = 0.5,
        lambda_hard: float = 1.0,
        lambda_soft: float = 1.0,
        reduction: Reduction = "sum",
    ):
        super().__init__(student_taps=student_taps, teacher_taps=teacher_taps)
        if len(student_taps) != len(teacher_taps) or not student_taps:
            problem = f"taps cannot be paired with the teacher's {len(teacher_taps)}"
            raise BadInput("student_taps", len(student_taps), problem, "name one module of each per depth")
        for name in (*student_taps, *teacher_taps):
            if any(sign in name for sign in "*?["):
                raise BadInput(
                    "taps", name, "is a wildcard, which has no order", "name the modules one by one"
                )
        if len(pool) > len(student_taps) or not all(isinstance(n, int) and n >= 1 for n in pool):
            raise BadInput(
                "pool", tuple(pool), f"does not fit {len(student_taps)} taps", "give counts from 1 up"
            )
        weights = {"lambda_intra": lambda_intra, "lambda_inter": lambda_inter, "lambda_hard": lambda_hard}
        for name, value in (*weights.items(), ("lambda_soft", lambda_soft)):
            if not value >= 0:
                raise BadInput(name, value, "is not a weight", "give a number from 0 up")
        if reduction not in ("sum", "mean"):
            raise BadInput("reduction", reduction, "is not known", 'use "sum" or "mean"')
        self.pool, self.reduction = tuple(pool), reduction
        self.lambda_intra, self.lambda_inter = lambda_intra, lambda_inter
        self.lambda_hard, self.lambda_soft = lambda_hard, lambda_soft
        self.lifts = nn.ModuleList()

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Make the lifting layers (He normal by fan-out, no bias at first) and refuse what does not fit.

        Raises:
            IncompatibleModels: grids that differ between the models, or after pooling.
            BadInput: a target that is missing, negative or on another grid.
            NotApplicable: several teachers.
        """
        assert teacher is not None
        if any(name not in teacher.taps for name in self.teacher_taps):
            problem = "has no maps to compare with: those of several teachers cannot be averaged"
            raise NotApplicable("teacher", sorted(teacher.taps), problem, "give one teacher")
        ours, theirs = _tapped(student, self.student_taps), _tapped(teacher, self.teacher_taps)
        self.lifts = nn.ModuleList()
        for s, t in zip(ours, theirs, strict=True):
            layer = nn.Conv2d(s.shape[1], t.shape[1], 1)
            he(layer)
            self.lifts.append(layer)
        self.lifts.to(ours[0].device)
        self(student, teacher, batch)

    def evaluation(self, student: Signal, batch: Mapping[str, Any]) -> Tensor:
        """The target's term alone: the squared error of the density, summed or averaged over places as in training."""
        ours, target = self._density(student, batch)
        return self._over((ours - target).square()).mean()

    def lifted(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps with the teacher's channels: ReLU(1x1 convolution)."""
        if not len(self.lifts):
            raise BadInput(
                "objective", "SKT", "has no lifting layers yet", "run it by Distiller, or call setup"
            )
        found = []
        for layer, each in zip(self.lifts, maps, strict=True):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            weight, bias = layer.weight.to(each.dtype), layer.bias.to(each.dtype)
            found.append(torch.relu(nn.functional.conv2d(each, weight, bias)))
        return found

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert teacher is not None
        ours, target = self._density(student, batch)
        theirs = _exact(teacher.whole())
        _same_maps([ours], [theirs])
        parts = {"hard": self._over((ours - target).square()), "soft": self._over((ours - theirs).square())}
        weights = {"hard": self.lambda_hard, "soft": self.lambda_soft}
        if self.lambda_intra or self.lambda_inter:
            with torch.autocast(ours.device.type, enabled=False):
                taught = [_exact(each) for each in _tapped(teacher, self.teacher_taps)]
                lifted = self.lifted([_exact(each) for each in _tapped(student, self.student_taps)])
                if self.lambda_intra:
                    parts["intra"] = pattern_distance(lifted, taught, reduction=self.reduction)
                if self.lambda_inter:
                    maps = [
                        on_one_grid([*some, last], self.pool)
                        for some, last in ((lifted, ours), (taught, theirs))
                    ]
                    parts["inter"] = relation_distance(*maps, reduction=self.reduction)
            weights |= {"intra": self.lambda_intra, "inter": self.lambda_inter}
        found = {name: value.mean() for name, value in parts.items()}
        loss = torch.stack([found[name] * weights[name] for name in found]).sum()
        return {"loss": loss, **found}

    def _over(self, errors: Tensor) -> Tensor:
        flat = errors.flatten(1)
        return flat.sum(1) if self.reduction == "sum" else flat.mean(1)

    def _density(self, student: Signal, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The student's map and the target."""
        ours = _exact(student.whole())
        if "labels" not in batch:
            raise BadInput("labels", sorted(batch), "is a column the rows lack", "add a density map to each")
        target = batch["labels"].to(device=ours.device, dtype=ours.dtype)
        if target.shape != ours.shape:
            sizes = (tuple(target.shape), tuple(ours.shape))
            raise BadInput("labels", sizes[0], f"is not the student's map {sizes[1]}", "see shrink_density")
        if bool((target < 0).any()):
            raise BadInput("labels", float(target.min()), "is a negative density", "clamp the target at 0")
        return ours, target


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tapped(signal: Signal, names: Sequence[str]) -> list[Tensor]:
    maps = [signal.taps[name] for name in names]
    for name, each in zip(names, maps, strict=True):
        if each.dim() != 4:
            raise NotApplicable(
                name, tuple(each.shape), "is no map [B, C, H, W]", "tap a convolutional stage"
            )
    return maps
