"""The standard divergences as objectives, all of `core.divergence`'s terms at one temperature."""

from __future__ import annotations

import abc
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.divergence import (
    adaptive_terms,
    check_share,
    decoupled_terms,
    jsd_terms,
    kl_terms,
    skew_terms,
    variation_terms,
)
from ..core.errors import BadInput
from ._base import CrossEntropy, TokenObjective

__all__ = [
    "JSD",
    "AdaptiveKL",
    "CrossEntropy",
    "DecoupledKD",
    "Divergence",
    "ForwardKL",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "TotalVariation",
]

Rest = Literal["bucket", "zero"]


class Divergence(TokenObjective):
    """A divergence between the tempered distributions of student and teacher, times the squared temperature.

    With a stored teacher the student is tempered over its whole vocabulary, the teacher as far as it is known: its k
    probabilities and the mass of the rest, each to the power 1 / temperature, renormalised.

    Args:
        temperature: Divides both logits.
        kd_weight: Weight of the divergence.
        ce_weight: Weight of the cross-entropy with the labels, at temperature 1.
        rest: For a stored teacher, see `TokenObjective`.
        compile: Use `torch.compile`.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        rest: Rest = "bucket",
        compile: bool = False,
    ):
        super().__init__(kd_weight=kd_weight, ce_weight=ce_weight, rest=rest, compile=compile)
        if not 0 < temperature < math.inf:
            raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
        self.temperature = temperature

    @abc.abstractmethod
    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        """The divergence of each token, `[n]`, from log-probabilities `[n, V]`: q the student's, p the teacher's."""

    def student_temperature(self, student: Tensor, **columns: Tensor) -> float:
        return self.temperature

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        if self.temperature == 1.0:  # each pass over the vocabulary counts
            return self.between(student.log_softmax(-1), teacher.log_softmax(-1), labels)
        log_q, log_p = (torch.log_softmax(z / self.temperature, dim=-1) for z in (student, teacher))
        return self.between(log_q, log_p, labels) * self.temperature**2


class ForwardKL(Divergence):
    """KL(p || q), Hinton's loss: the student must cover all that the teacher holds possible."""

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return kl_terms(log_p, log_q)


class ReverseKL(Divergence):
    """KL(q || p): the student must stay where the teacher is. The slope passes both q."""

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return kl_terms(log_q, log_p)


class TotalVariation(Divergence):
    """0.5 sum |p - q|."""

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return variation_terms(log_q, log_p)


class JSD(Divergence):
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649); 0 is forward KL and 1 reverse KL.

    Args:
        beta: Weight of the teacher in the mixture, from 0 to 1.
        **options: Those of `Divergence`.
    """

    def __init__(self, *, beta: float = 0.5, **options: Any):
        super().__init__(**options)
        if not 0.0 <= beta <= 1.0:
            raise BadInput("beta", beta, "is not between 0 and 1", "give a share")
        self.beta = beta

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        if self.beta == 0.0:
            return kl_terms(log_p, log_q)
        if self.beta == 1.0:
            return kl_terms(log_q, log_p)
        return jsd_terms(log_q, log_p, self.beta)


class SkewKL(Divergence):
    """DistiLLM's skew KL (arXiv 2402.03898): KL(p || alpha p + (1 - alpha) q).

    Args:
        alpha: Share of the teacher in the mixture.
        **options: Those of `Divergence`.
    """

    reverse = False

    def __init__(self, *, alpha: float = 0.1, **options: Any):
        super().__init__(**options)
        check_share("alpha", alpha, "use ForwardKL or ReverseKL at the ends")
        self.alpha = alpha

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return skew_terms(log_q, log_p, self.alpha, reverse=self.reverse)


class SkewReverseKL(SkewKL):
    """DistiLLM's skew reverse KL: KL(q || (1 - alpha) p + alpha q). Arguments as for `SkewKL`."""

    reverse = True


class AdaptiveKL(Divergence):
    """AKL (arXiv 2404.02657): forward and reverse KL, weighted by where the two distributions differ.

    Args:
        mu: Cumulative teacher probability, from the least likely token up, where the head begins.
        **options: Those of `Divergence`.
    """

    def __init__(self, *, mu: float = 0.5, **options: Any):
        super().__init__(**options)
        check_share("mu", mu)
        self.mu = mu

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return adaptive_terms(log_q, log_p, self.mu)


class DecoupledKD(Divergence):
    """DKD (arXiv 2203.08679): the target class against the rest, and the other classes among themselves.

    With a stored teacher a target that is not among the k tokens is the class of the rest, so there has to be one.

    Args:
        alpha: Weight of the first part.
        beta: Weight of the second.
        **options: Those of `Divergence`.

    Raises:
        BadInput: weights that are none; `rest="zero"`, under which a target that is not stored has no class.
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 1.0, **options: Any):
        super().__init__(**options)
        if any(not 0 <= weight < math.inf for weight in (alpha, beta)) or alpha + beta == 0:
            weights = f"{alpha}, beta = {beta}"
            raise BadInput("alpha", weights, "are not weights", "give numbers from 0 up, not both 0")
        if self.rest == "zero":
            raise BadInput("rest", "zero", "leaves out targets that are not stored", 'use "bucket" with DKD')
        self.alpha, self.beta = alpha, beta

    def between(self, log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
        return decoupled_terms(log_q, log_p, labels, self.alpha, self.beta)
