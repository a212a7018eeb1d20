"""TAID: distil towards a target that moves from the student's own distribution to the teacher's.

:arxiv: 2501.16937
:moves: a teacher's next-token distributions -> a student's weights
:access: logits, weights, training data
:reversible: no
:context: no

A student much smaller than its teacher averages over the teacher's modes under forward KL and drops most of them
under reverse KL. Here the target is a blend, in logit space, of the student's own present logits and the teacher's;
t says how far the blend has come:

    p_t = softmax((1 - t) stopgrad(z_s) + t z_t)         J = mean over tokens of KL(p_t || q)

The slope of a token's loss by z_s is q - p_t. t starts at t_start and never falls; it follows a line to t_end at
least, and runs ahead of it while the objective improves. After update n of N:

    delta = (J_{n-1} - J_n) / (J_{n-1} + 1e-15), clamped to [-1, 1]
    m     <- beta m + (1 - beta) delta
    t     <- min(t_end, max(t_start + (t_end - t_start) n / N, t + alpha sigmoid(m) (1 - t)))

Where this differs from the authors' code, it follows the paper: t moves once per update of the optimizer, by the
mean of J over micro-batches and processes, and never in evaluation (the code moves it at every forward pass, on
every process by itself). What the rule watches is the cross-entropy -sum p_t log q as in the code (`track="ce"`), or
the KL (`track="kl"`); both have the same slope. A relative change is clamped, so that a J near zero cannot throw t.
alpha counts only beside the line's slope 1/N, and the paper's runs have alpha N near 6: `alpha="auto"` is 6 / N. Its
own 5e-4 does next to nothing in a few hundred updates.

    from transfuse.distill import Distiller
    from transfuse.distill.taid import TAID

    trainer = Distiller(student=student, teacher=teacher, objective=TAID(t_start=0.2), train_dataset=rows)
    trainer.train()
    trainer.save_model("student")
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.divergence import floored, kl_terms
from ..core.errors import BadInput
from ._base import TokenObjective

__all__ = ["TAID", "blend", "next_t"]


def blend(student: Tensor, teacher: Tensor, t: Tensor | float) -> Tensor:
    """The moving target (eq. 4): log-probabilities of softmax((1 - t) z_s + t z_t), without gradient.

    Args:
        student: Logits `[..., V]`.
        teacher: Logits of the same shape.
        t: From 0, the student's distribution, to 1, the teacher's.

    Returns:
        `[..., V]`. A token that either side excludes (a logit of -inf) is excluded unless its weight is 0.
    """
    share = torch.as_tensor(t, dtype=student.dtype, device=student.device)
    ours, theirs = student.detach(), teacher.detach()
    mixed = torch.where(share < 1, (1 - share) * ours, 0.0) + torch.where(share > 0, share * theirs, 0.0)
    return torch.log_softmax(mixed, dim=-1)


def next_t(
    t: float,
    momentum: float,
    previous: float | None,
    loss: float,
    *,
    step: int,
    total: int,
    t_start: float,
    t_end: float,
    alpha: float,
    beta: float,
) -> tuple[float, float]:
    """One step of the schedule (algorithm 1).

    Args:
        t: Its present value.
        momentum: Of the relative improvements.
        previous: J of the update before; None at the first, which leaves t where it is.
        loss: J of this update.
        step: Number of this update, from 1.
        total: Number of updates.
        t_start: Where t begins.
        t_end: Where it ends.
        alpha: Size of an adaptive step.
        beta: Decay of the momentum.

    Returns:
        The new t and momentum.
    """
    if previous is None:
        return t, momentum
    change = max(-1.0, min(1.0, (previous - loss) / (previous + 1e-15)))
    momentum = beta * momentum + (1.0 - beta) * change
    line = t_start + (t_end - t_start) * step / total
    ahead = t + alpha / (1.0 + math.exp(-momentum)) * (1.0 - t)
    return min(t_end, max(line, ahead)), momentum


class TAID(TokenObjective):
    """Temporally adaptive interpolated distillation.

    Its state (t, the momentum and the last J) is part of a checkpoint.

    Args:
        t_start: First share of the teacher in the target: 0.4 or, between models of similar size, 0.2.
        t_end: Last one.
        alpha: Size of an adaptive step; "auto" is 6 / number of updates. 0 leaves the line alone.
        beta: Decay of the momentum.
        track: What the schedule watches: "ce", -sum p_t log q, or "kl".
        kd_weight: Weight of J.
        ce_weight: Weight of the cross-entropy with the labels.
        rest: For a stored teacher, see `TokenObjective`.
        compile: Use `torch.compile`.

    Raises:
        BadInput: an argument out of range.
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(
        self,
        *,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float | Literal["auto"] = "auto",
        beta: float = 0.99,
        track: Literal["ce", "kl"] = "ce",
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        rest: Literal["bucket", "zero"] = "bucket",
        compile: bool = False,
    ):
        super().__init__(kd_weight=kd_weight, ce_weight=ce_weight, rest=rest, compile=compile)
        for name, value, low in (("t_start", t_start, 0.0), ("t_end", t_end, t_start), ("beta", beta, 0.0)):
            if not low <= value <= 1.0:
                raise BadInput(name, value, f"is not between {low:g} and 1", "give a share")
        if t_start == 1.0 or t_end == 0.0:
            raise BadInput("t_start", t_start, f"to t_end = {t_end} is no way", "start below 1, end above 0")
        if alpha != "auto" and not 0.0 <= alpha <= 1.0:
            raise BadInput("alpha", alpha, "is not between 0 and 1", 'give a step size, or "auto"')
        if track not in ("ce", "kl"):
            raise BadInput("track", track, "is not known", 'use "ce" or "kl"')
        self.t_start, self.t_end, self.alpha, self.beta, self.track = t_start, t_end, alpha, beta, track
        for name, value in (("t", t_start), ("momentum", 0.0), ("previous", math.nan)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        log_p = blend(student, teacher, self.t)
        log_q = torch.log_softmax(student, dim=-1)
        if self.track == "kl":
            return kl_terms(log_p, log_q)
        return -(log_p.exp() * floored(log_q)).sum(-1)

    def on_step(self, figures: Mapping[str, float], step: int, total: int) -> None:
        """Move t; see `next_t`. With kd_weight = 0 there is no J to watch, and t stays.

        Raises:
            BadInput: the number of updates is not known.
        """
        if not self.kd_weight:
            return
        if not total > 0:
            raise BadInput(
                "total", total, "updates: TAID's line needs their number", "set max_steps or epochs"
            )
        previous = None if math.isnan(float(self.previous)) else float(self.previous)
        alpha = 6.0 / total if self.alpha == "auto" else self.alpha
        t, momentum = next_t(
            float(self.t), float(self.momentum), previous, figures["kd"], step=step, total=total,
            t_start=self.t_start, t_end=self.t_end, alpha=alpha, beta=self.beta,
        )  # fmt: skip
        self.t.fill_(t)
        self.momentum.fill_(momentum)
        self.previous.fill_(figures["kd"])

    def extra_repr(self) -> str:
        """For `print`."""
        settings: dict[str, Any] = {"t_start": self.t_start, "t_end": self.t_end, "alpha": self.alpha}
        return ", ".join(f"{name}={value}" for name, value in settings.items())
