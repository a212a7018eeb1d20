"""MiniLLM (arXiv 2306.08543): reverse KL between whole texts, on the student's own samples, by policy gradient.

The student q writes texts y, and its loss is the KL from q to the teacher p of whole texts. Its slope has two parts.
What the choice of the token at t costs at t itself is known exactly, the reverse KL over the whole vocabulary. What it
brings for later tokens is estimated from the sample: with R_k = log p(y_k) - log q(y_k),

    A_t = sum_{k > t} gamma^(k - t) R_k / sum_{k > t} gamma^(k - t)          (gamma = 1: the mean of what comes later)
    L   = mean_t [ KL(q(.|y_<t) || p(.|y_<t)) + max(-A_t r_t, -A_t clip(r_t, 1 - eps, 1 + eps)) ] + c L_LM

r_t is the ratio of q(y_t) now to when the text was sampled, times the weight q(y_t) / p~(y_t) where the sample came
from the mixture p~ = 0.2 p + 0.8 q, which keeps degenerate texts away. L_LM is the cross-entropy on plain text. The end
of text counts, what is padded after it does not. `Rollouts` draws the samples.

    rollouts = Rollouts(teacher, max_new_tokens=64, plain=rows_of_plain_text)
    Distiller(student=student, teacher=teacher, objective=MiniLLM(), policy=rollouts, train_dataset=prompts)

The authors' code sums rewards from k = t on (`inclusive=True`), which counts the reward at t twice beside the exact
part, and standardises the advantages of a batch (not offered); neither is in the paper's equations. With
`single_step=False` there is no exact part, the sum begins at k = t, and gamma = 0 leaves each token its own reward: the
plain on-policy reverse KL, `OnPolicyReverseKL`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.batches import IGNORED
from ..core.divergence import floored, kl_terms
from ..core.errors import BadInput, NotApplicable
from ._base import Objective, Signal, TokenObjective
from ._likelihood import token_log_probs
from ._rollouts import Rollouts, at_tokens, mixed_logits

__all__ = [
    "MiniLLM",
    "OnPolicyReverseKL",
    "RewardMinusKL",
    "Rollouts",
    "advantages",
    "clipped_terms",
    "mixed_logits",
]


def advantages(
    rewards: Tensor, mask: Tensor, gamma: float = 1.0, *, inclusive: bool = False, normalise: bool = True
) -> Tensor:
    """Discounted mean of what comes after each token.

    Args:
        rewards: `[B, T]`, of the sampled tokens.
        mask: `[B, T]`, bool: which are tokens of the sample; a run of them in each row.
        gamma: Discount, from 0 to 1.
        inclusive: Begin with the token itself (k >= t); gamma = 0 then gives the rewards back.
        normalise: Divide by the sum of the discounts; False leaves the discounted sum.

    Returns:
        `[B, T]`, 0 where masked and where nothing comes after.
    """
    keep = mask.bool()
    values = rewards.masked_fill(~keep, 0.0)
    weights = keep.to(values.dtype)
    total = torch.zeros_like(values[:, 0])
    weight = torch.zeros_like(total)
    columns = []
    for t in reversed(range(values.shape[1])):
        # What is after t, with discounts from 1 on: the factor gamma it lacks falls out of the mean.
        after = total / weight.clamp_min(1e-30) * (gamma > 0) if normalise else gamma * total
        total, weight = values[:, t] + gamma * total, weights[:, t] + gamma * weight
        columns.append((total / weight.clamp_min(1e-30) if normalise else total) if inclusive else after)
    return torch.stack(columns[::-1], 1).masked_fill(~keep, 0.0)


def clipped_terms(log_q: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, clip: float) -> Tensor:
    """PPO's loss of each token: max(-A r, -A clip(r, 1 - eps, 1 + eps)) with r = exp(log_q - old) weight.

    Args:
        log_q: Log-probability of the sampled token now, `[n]`; the slope passes through it.
        old: The same when it was sampled.
        advantage: A.
        weight: Importance weight q / p~ of the sampling; 1 for the student's own samples.
        clip: eps.
    """
    ratio = torch.exp(log_q - old) * weight
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip))


class MiniLLM(Objective):
    """Reverse KL of whole texts on the batches of `Rollouts`; see the module's text.

    Samples and plain text are each averaged over their tokens of the whole update.

    Args:
        gamma: Discount of later rewards; 1 is the paper's length-normalised sum, 0 leaves the exact part alone.
        clip: PPO's eps.
        single_step: Take the token's own reward exactly, over the whole vocabulary.
        inclusive: Begin the sum of rewards at the token itself; None: only without `single_step`.
        normalise: Divide the sum of rewards by that of the discounts.
        kl_weight: Factor on log p - log q, in the rewards and the exact part; beside it stands what `Rollouts` says a
            sample is worth.
        lm_weight: Weight of the cross-entropy on plain text.
        weigh_single: Weigh the exact part by the importance too (the paper's equation; its code does not).
        reward_clip: Largest size of a reward; None for no limit.

    Raises:
        BadInput: an argument out of range.
    """

    needs_logits = False
    additive = True

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        clip: float = 0.2,
        single_step: bool = True,
        inclusive: bool | None = None,
        normalise: bool = True,
        kl_weight: float = 1.0,
        lm_weight: float = 1.0,
        weigh_single: bool = False,
        reward_clip: float | None = None,
    ):
        super().__init__()
        for name, value in (("gamma", gamma), ("clip", clip)):
            if not 0.0 <= value <= 1.0:
                raise BadInput(name, value, "is not between 0 and 1", "give a share")
        for name, value in (("kl_weight", kl_weight), ("lm_weight", lm_weight)):
            if not 0.0 <= value < math.inf:
                raise BadInput(name, value, "is not a weight", "give a number from 0 up")
        if reward_clip is not None and not reward_clip > 0:
            raise BadInput("reward_clip", reward_clip, "is not positive", "give a number above 0, or None")
        self.gamma, self.single_step, self.reward_clip = gamma, single_step, reward_clip
        self.inclusive = not single_step if inclusive is None else inclusive
        self.normalise, self.kl_weight = normalise, kl_weight
        self.parts = _Parts(clip, lm_weight, kl_weight if single_step else 0.0, weigh_single)

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch of `Rollouts`.

        Raises:
            BadInput: the batch is not one of `Rollouts`.
            NotApplicable: a stored teacher.
        """
        if "old_log_probs" not in batch:
            raise BadInput("policy", None, "gave no samples", "pass policy=Rollouts(teacher) to the trainer")
        if teacher is None or teacher.sparse is not None:
            raise NotApplicable("teacher", "stored top-k", "does not score samples", "use a teacher model")
        labels = batch["labels"]
        sample, text = _kinds(batch)
        counts = {name: batch.get(name, own).clamp_min(1) for name, own in self.totals(batch).items()}
        with torch.no_grad():
            theirs = floored(at_tokens(token_log_probs(teacher, labels)))
            rewards = theirs - batch["old_log_probs"].to(theirs.dtype)
            if self.reward_clip is not None:
                rewards = rewards.clamp(-self.reward_clip, self.reward_clip)
            rewards = self.kl_weight * rewards + batch.get("bonus", 0.0)
            how = {"inclusive": self.inclusive, "normalise": self.normalise}
            gains = advantages(rewards, sample, self.gamma, **how)
            texts, samples = (1 / counts[name].double() for name in ("text_tokens", "sample_tokens"))
            scale = torch.where(text, texts, samples).to(theirs.dtype)
        weight = batch.get("importance", torch.ones_like(gains))
        more = {**batch, "importance": weight, "advantage": gains, "plain": text, "scale": scale, "items": 1}
        found = self.parts(student, teacher if self.single_step else None, more)
        found["reward"] = rewards.masked_fill(~sample, 0.0).sum() / counts["sample_tokens"]
        return found

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Predicted tokens of samples and of plain text."""
        sample, text = _kinds(batch)
        return {"sample_tokens": sample.sum(), "text_tokens": text.sum()}


def _kinds(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Which tokens are predicted and of a sample, and which are predicted and of plain text, `[B, T]` bool."""
    predicted = batch["labels"] != IGNORED
    predicted[:, 0] = False  # nothing comes before a first token
    if "plain" not in batch:
        return predicted, torch.zeros_like(predicted)
    plain = batch["plain"].bool()
    return predicted & ~plain, predicted & plain


class _Parts(TokenObjective):
    """The terms of each token, with everything about it in columns."""

    columns = ("old_log_probs", "importance", "advantage", "plain", "scale")

    def __init__(self, clip: float, lm_weight: float, single_weight: float, weigh_single: bool):
        super().__init__()
        self.clip, self.lm_weight = clip, lm_weight
        self.single_weight, self.weigh_single = single_weight, weigh_single

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        return self.combine(student, teacher, labels, **columns)["loss"]

    def combine(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ids: Tensor | None = None,
        log_probs: Tensor | None = None,
        **columns: Tensor,
    ) -> dict[str, Tensor]:
        """Scaled parts, "single", "long" and "lm" beside "loss", `[n]` each."""
        log_q = torch.log_softmax(student, -1)
        chosen = log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        plain, nothing = columns["plain"], torch.zeros_like(chosen)
        old, gain, weight = (columns[name] for name in ("old_log_probs", "advantage", "importance"))
        long = clipped_terms(torch.where(plain, nothing, chosen), old, gain, weight, self.clip)
        parts = {"long": torch.where(plain, nothing, long)}
        if self.single_weight and teacher is not None:
            exact = self.single_weight * kl_terms(log_q, torch.log_softmax(teacher, -1))
            parts["single"] = torch.where(plain, nothing, exact * weight if self.weigh_single else exact)
        parts["lm"] = torch.where(plain, -self.lm_weight * chosen, nothing)
        parts = {name: value * columns["scale"] for name, value in parts.items()}
        return {"loss": torch.stack(list(parts.values())).sum(0), **parts}


class OnPolicyReverseKL(MiniLLM):
    """On-policy reverse KL with each sampled token's log p - log q as its reward: MiniLLM with gamma = 0.

    Its expected slope is that of the exact part of `MiniLLM`; it needs no whole rows of the teacher.

    Args:
        clip: PPO's eps.
        lm_weight: Weight of the cross-entropy on plain text.
        reward_clip: Largest size of a reward; None for no limit.
    """

    def __init__(self, *, clip: float = 0.2, lm_weight: float = 1.0, reward_clip: float | None = None):
        super().__init__(
            gamma=0.0, single_step=False, clip=clip, lm_weight=lm_weight, reward_clip=reward_clip
        )


class RewardMinusKL(MiniLLM):
    """Reinforcement learning with a reward model: E[r] - b KL(q || reference), a sum over whole texts.

    The trainer's `teacher` is the reference; the reward is given to `Rollouts(reward=...)`, e.g. a model trained with
    `RewardRanking` on a teacher's rankings. Each token's advantage is all that comes from it on.

    Args:
        kl_weight: b.
        clip: PPO's eps.
        lm_weight: Weight of the cross-entropy on plain text.
    """

    def __init__(self, *, kl_weight: float = 0.1, clip: float = 0.2, lm_weight: float = 1.0):
        super().__init__(
            kl_weight=kl_weight, clip=clip, lm_weight=lm_weight, single_step=False, normalise=False
        )

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch of `Rollouts` with a reward.

        Raises:
            BadInput: the samples carry no reward.
        """
        if "old_log_probs" in batch and "bonus" not in batch:
            raise BadInput("reward", None, "was not given", "pass policy=Rollouts(reward=model)")
        return super().forward(student, teacher, batch)
