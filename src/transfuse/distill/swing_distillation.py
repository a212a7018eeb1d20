"""Swing distillation: a temperature per token, high where the token is private, and noise in the soft targets.

:arxiv: 2212.08349
:moves: a teacher's next-token distributions, but not its secrets -> a student's weights
:access: logits, weights, training data
:reversible: no
:context: no

A teacher hands secrets that it memorised on to its student through its soft targets. Here every position has a score
r in [0, 1], how likely the token to be predicted is private, and from it a temperature and a size of noise:

    tau   = tau_base (tau_max / tau_base)^r              sigma = sigma_0 + sigma_1 r
    p     = softmax((z_t + sigma noise) / tau)           q = softmax(z_s / tau)
    L_kd  = tau_base^2 mean over tokens of KL(p || q)
    L     = kd_weight L_kd + (1 - kd_weight) mean over tokens of [r < 1/2] CE(z_s, y)

Where r is 0 this is ordinary distillation at tau_base; where it is 1 the target is nearly flat, and the student
learns next to nothing from it. The factor is tau_base^2 for all tokens: with a token's own tau^2 the slopes of private
tokens would be blown up again, which undoes the protection. A large temperature on both sides also makes those slopes
small, by about 1/tau^2; with `student_tau="base"` the student keeps tau_base and is pushed to flat predictions there.
Labels never count where r is 1/2 or more, and add nothing to their mean. Noise carries no gradient. It is drawn anew
in every forward pass from `seed` and the number of passes so far, which is part of a checkpoint.

The paper names token-wise temperatures driven by the likelihood of privacy, and noise in the targets. No code is
published and the shapes of tau(r) and sigma(r) could not be confirmed: they are this module's. `epsilon` makes the
noise sensitivity/epsilon for all tokens, the form of a privacy budget; no differential privacy follows from it.
A private token that the scorer misses leaks as before: measure `detector_recall`, and `core.canaries.canary_exposure`.

    from transfuse.distill import Distiller
    from transfuse.distill.swing_distillation import SwingDistillation, TokenPrivacyScorer

    scorer = TokenPrivacyScorer.from_regex(tokenizer, [r"[0-9]{4}"])
    trainer = Distiller(
        student=student, teacher=teacher, objective=SwingDistillation(), train_dataset=scorer.annotate(rows)
    )
    trainer.train()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.batches import IGNORED
from ..core.divergence import kl_terms
from ..core.errors import BadInput
from ..core.training import generator
from ._base import Signal, TokenObjective
from ._privacy import PATTERNS, TokenPrivacyScorer, detector_recall

__all__ = [
    "PATTERNS",
    "SwingDistillation",
    "TokenPrivacyScorer",
    "detector_recall",
    "swing_temperature",
    "swing_terms",
]


def swing_temperature(privacy: Tensor, tau_base: float, tau_max: float) -> Tensor:
    """tau_base (tau_max / tau_base)^r, elementwise: tau_base at 0, tau_max at 1, a straight line in log tau."""
    return tau_base * (tau_max / tau_base) ** privacy


def swing_terms(
    student: Tensor,
    teacher: Tensor,
    privacy: Tensor,
    *,
    tau_base: float,
    tau_max: float,
    noise: Tensor | None = None,
    student_tau: Literal["swing", "base"] = "swing",
) -> Tensor:
    """tau_base^2 KL(p || q) of each token, with the token's own temperature.

    Args:
        student: Logits `[n, V]`.
        teacher: Logits of the same shape; no gradient reaches them.
        privacy: r, `[n]`.
        tau_base: Temperature at r = 0.
        tau_max: Temperature at r = 1.
        noise: Added to the teacher's logits, `[n, V]`.
        student_tau: "swing", the token's temperature for the student too, or "base", tau_base.

    Returns:
        `[n]`.
    """
    tau = swing_temperature(privacy.to(student.dtype), tau_base, tau_max).unsqueeze(-1)
    target = teacher.detach() if noise is None else teacher.detach() + noise.detach()
    log_p = torch.log_softmax(target / tau, -1)
    log_q = torch.log_softmax(student / (tau if student_tau == "swing" else tau_base), -1)
    return tau_base**2 * kl_terms(log_p, log_q)


class SwingDistillation(TokenObjective):
    """Distillation with token-wise temperatures and noise.

    With a stored teacher the student is tempered over its whole vocabulary; the teacher's k probabilities and the mass
    of the rest get the noise and the temperature, which for the rest is an approximation.

    Reads the column `privacy`: scores in [0, 1], `[B, T]`, of the tokens of `labels` at the same places (for a
    classifier `[B]`, whose rows with label -100 are left out); `TokenPrivacyScorer.annotate` makes it. Its state is
    the number of passes made.

    Args:
        tau_base: Temperature of public tokens.
        tau_max: Temperature of tokens that are certainly private.
        sigma_0: Size of the noise on public tokens, in units of logits.
        sigma_1: What certainly private tokens have on top of it.
        noise: "gaussian" (standard deviation sigma) or "laplace" (scale sigma).
        epsilon: Privacy budget: noise of size sensitivity/epsilon on every token in place of sigma_0 + sigma_1 r.
        sensitivity: See `epsilon`.
        student_tau: The student's temperature: "swing", that of the token, or "base", tau_base.
        kd_weight: Weight of the distillation, at most 1; the labels of tokens that are not private have the rest.
        rest: For a stored teacher, see `TokenObjective`.
        seed: Of the noise.

    Raises:
        BadInput: an argument out of range; in training, scores that are missing, of another shape, or outside [0, 1].
    """

    columns = ("privacy",)
    draws: Tensor

    def __init__(
        self,
        *,
        tau_base: float = 2.0,
        tau_max: float = 20.0,
        sigma_0: float = 0.1,
        sigma_1: float = 4.0,
        noise: Literal["gaussian", "laplace"] = "gaussian",
        epsilon: float | None = None,
        sensitivity: float = 1.0,
        student_tau: Literal["swing", "base"] = "swing",
        kd_weight: float = 1.0,
        rest: Literal["bucket", "zero"] = "bucket",
        seed: int = 0,
    ):
        if not 0.0 <= kd_weight <= 1.0:
            raise BadInput("kd_weight", kd_weight, "is not between 0 and 1", "the labels have what is left")
        super().__init__(kd_weight=kd_weight, ce_weight=1.0 - kd_weight, rest=rest)
        for name, value in (("tau_base", tau_base), ("tau_max", tau_max)):
            if not 0 < value < math.inf:
                raise BadInput(name, value, "is not a temperature", "give a positive number")
        if not tau_max >= tau_base:
            raise BadInput(
                "tau_max", tau_max, f"is below tau_base = {tau_base:g}", "give a higher temperature"
            )
        for name, value in (("sigma_0", sigma_0), ("sigma_1", sigma_1), ("sensitivity", sensitivity)):
            if not 0 <= value < math.inf:
                raise BadInput(name, value, "is not a size of noise", "give a number from 0 up; 0 is none")
        if epsilon is not None and not epsilon > 0:
            raise BadInput("epsilon", epsilon, "is not positive", "give a budget, or None")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise BadInput("seed", seed, "is not a whole number from 0 up", "give such a seed")
        if noise not in ("gaussian", "laplace"):
            raise BadInput("noise", noise, "is not known", 'use "gaussian" or "laplace"')
        if student_tau not in ("swing", "base"):
            raise BadInput("student_tau", student_tau, "is not known", 'use "swing" or "base"')
        self.tau_base, self.tau_max, self.student_tau = tau_base, tau_max, student_tau
        self.sigma_0, self.sigma_1, self.noise = sigma_0, sigma_1, noise
        self.epsilon, self.sensitivity, self.seed = epsilon, sensitivity, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._random: torch.Generator | None = None

    def sigma(self, privacy: Tensor) -> Tensor:
        """Size of the noise of tokens with these scores."""
        privacy = privacy.to(torch.promote_types(privacy.dtype, torch.float32))
        if self.epsilon is not None:
            return torch.full_like(privacy, self.sensitivity / self.epsilon)
        return self.sigma_0 + self.sigma_1 * privacy

    def student_temperature(self, student: Tensor, **columns: Tensor) -> Tensor | float:
        if self.student_tau == "base":
            return self.tau_base
        return swing_temperature(columns["privacy"].to(student.dtype), self.tau_base, self.tau_max)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        privacy = columns["privacy"].to(student.dtype)
        return swing_terms(
            student, teacher, privacy, tau_base=self.tau_base, tau_max=self.tau_max,
            noise=self._draw(student, self.sigma(privacy)), student_tau=self.student_tau,
        )  # fmt: skip

    def combine(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        **columns: Tensor,
    ) -> dict[str, Tensor]:
        """As everywhere, without the labels of private tokens."""
        found = super().combine(student, teacher, labels, ids, log_probs, **columns)
        if "ce" in found:
            found["ce"] = torch.where(columns["privacy"] < 0.5, found["ce"], 0.0)
            found["loss"] = self.ce_weight * found["ce"]
            if "kd" in found:
                found["loss"] = found["loss"] + self.kd_weight * found["kd"]
        return found

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        labels, privacy = batch["labels"], batch.get("privacy")
        if privacy is None or privacy.shape != labels.shape:
            shown = None if privacy is None else tuple(privacy.shape)
            remedy = "add the column with TokenPrivacyScorer.annotate"
            raise BadInput("privacy", shown, f"is not one score per label {tuple(labels.shape)}", remedy)
        counted = privacy[labels != IGNORED]
        inside = (counted >= 0) & (counted <= 1)
        if not bool(inside.all()):
            wrong = float(counted[~inside][0])
            raise BadInput("privacy", wrong, "is not between 0 and 1", "give likelihoods of being private")
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        mixed = np.random.SeedSequence([self.seed, rank, int(self.draws)]).generate_state(1)[0]
        self._random = generator(int(mixed), labels.device)
        self.draws += 1
        return super().forward(*_labelled(student, teacher, batch))

    def _draw(self, like: Tensor, sigma: Tensor) -> Tensor | None:
        """Noise of the shape of `like`, `[n, V]`; None where there is none."""
        if (self.epsilon is None and self.sigma_0 == self.sigma_1 == 0) or not len(like):
            return None
        random = self._random or generator(self.seed, like.device)
        drawn = torch.empty(like.shape, device=like.device, dtype=like.dtype)
        if self.noise == "gaussian":
            drawn.normal_(generator=random)
        else:
            drawn.exponential_(generator=random)
            drawn *= 1 - 2 * torch.empty_like(drawn).bernoulli_(0.5, generator=random)
        return sigma.unsqueeze(-1) * drawn

    def extra_repr(self) -> str:
        """For `print`."""
        return f"tau_base={self.tau_base}, tau_max={self.tau_max}, sigma=({self.sigma_0}, {self.sigma_1})"


def _labelled(
    student: Signal, teacher: Signal | None, batch: Mapping[str, Any]
) -> tuple[Signal, Signal | None, Mapping[str, Any]]:
    """A classifier's rows that have a class, as the labelled tokens of a language model; tokens stay as they are."""
    labels = batch["labels"]
    keep = labels != IGNORED
    if labels.dim() != 1 or bool(keep.all()):
        return student, teacher, batch

    def kept(signal: Signal) -> Signal:
        if signal.sparse is not None:
            return Signal(sparse=(signal.sparse[0][keep], signal.sparse[1][keep]))
        return Signal(logits=signal.whole()[keep])

    rows = {**batch, "labels": labels[keep], "privacy": batch["privacy"][keep]}
    return kept(student), None if teacher is None else kept(teacher), rows
