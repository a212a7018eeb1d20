"""Learning from a teacher's ranking of several answers to one prompt: DPO, RRHF, PRO, reward models.

A row of the data is a prompt with K >= 2 answers, each written out with its prompt:

    {"input_ids": [[...], ...], "labels": [[...], ...], "score": [s_1, ..., s_K]}

where a higher score is a better answer and only the answers' tokens are labelled. `rank_collator` puts the answers of a
batch under each other, with the number of their prompt in `group`; `Distiller` takes it as `data_collator`.

    Distiller(student=model, teacher=copy.deepcopy(model), objective=DPO(beta=0.1), train_dataset=rows,
              data_collator=rank_collator(tokenizer))

Each loss is a mean over prompts; prompts whose answers are all tied count, with nothing to learn from their order but
for PRO, a chain over all ranks: to it tied answers are ranked as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.batches import IGNORED, pad_collator
from ..core.errors import BadInput, IncompatibleModels, NotApplicable
from ._base import Objective, Signal
from ._likelihood import sequence_log_probs

__all__ = [
    "DPO",
    "PRO",
    "RRHF",
    "RewardRanking",
    "dpo_loss",
    "preferences",
    "pro_loss",
    "rank_collator",
    "reward_loss",
    "rrhf_loss",
]


def preferences(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (better, worse) of every pair of one prompt whose scores differ.

    Args:
        scores: `[N]`, higher is better.
        group: int64 `[N]`, the prompt each row answers.

    Returns:
        Two int64 tensors `[P]`.
    """
    together = group.unsqueeze(1) == group.unsqueeze(0)
    better, worse = (together & (scores.unsqueeze(1) > scores.unsqueeze(0))).nonzero(as_tuple=True)
    return better, worse


def _mean_of_pairs(values: Tensor, rows: Tensor, group: Tensor) -> Tensor:
    """Mean over prompts of the mean over a prompt's pairs; `rows` names a row of each pair."""
    names, place = group.unique(return_inverse=True)
    owner = place[rows]
    counts = torch.bincount(owner, minlength=len(names)).clamp_min(1)
    return (values / counts[owner]).sum() / len(names)


def dpo_loss(policy: Tensor, reference: Tensor, scores: Tensor, group: Tensor, beta: float = 0.1) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta (delta_w - delta_l)), delta = log q(y) - log q_ref(y).

    With more than two answers, a mean over a prompt's pairs.

    Args:
        policy: The student's log-probability of each answer, `[N]`.
        reference: The reference model's, `[N]`.
        scores: `[N]`.
        group: int64 `[N]`.
        beta: Strength of the pull towards the reference.
    """
    delta = policy - reference
    better, worse = preferences(scores, group)
    return _mean_of_pairs(-logsigmoid(beta * (delta[better] - delta[worse])), better, group)


def reward_loss(rewards: Tensor, scores: Tensor, group: Tensor) -> Tensor:
    """A reward model's loss (arXiv 2203.02155, eq. 1): -log sigmoid(r_w - r_l), a mean over a prompt's pairs.

    Args:
        rewards: The model's, `[N]`.
        scores: The teacher's, `[N]`: only their order counts.
        group: int64 `[N]`.
    """
    better, worse = preferences(scores, group)
    return _mean_of_pairs(-logsigmoid(rewards[better] - rewards[worse]), better, group)


def rrhf_loss(mean_log_probs: Tensor, scores: Tensor, group: Tensor) -> Tensor:
    """RRHF's ranking part (arXiv 2304.05302, eq. 2): the sum of max(0, s_l - s_w) over a prompt's pairs.

    Args:
        mean_log_probs: Log-probability per token of each answer (s), `[N]`.
        scores: `[N]`.
        group: int64 `[N]`.
    """
    better, worse = preferences(scores, group)
    gaps = (mean_log_probs[worse] - mean_log_probs[better]).clamp_min(0)
    return gaps.sum() / len(group.unique())


def pro_loss(mean_log_probs: Tensor, scores: Tensor, group: Tensor, *, weighted: bool = False) -> Tensor:
    """PRO's ranking part (arXiv 2306.17492): for every rank, -log softmax of its answer among it and all below.

    Args:
        mean_log_probs: Log-probability per token of each answer, `[N]`.
        scores: `[N]`; ties keep their order.
        group: int64 `[N]`.
        weighted: Multiply the log-probability of a worse answer by how far its score lies below the rank's, and the
            rank's own by the largest of these gaps (the paper's eq. 8).
    """
    names = group.unique()
    total = mean_log_probs.sum() * 0.0
    for name in names:
        rows = (group == name).nonzero().squeeze(-1)
        order = rows[scores[rows].argsort(descending=True, stable=True)]
        values, marks = mean_log_probs[order], scores[order].to(mean_log_probs.dtype)
        for k in range(len(order) - 1):
            rest = values[k:]
            if weighted:
                gaps = marks[k] - marks[k + 1 :]
                rest = rest * torch.cat([gaps.max().reshape(1), gaps])
            total = total + torch.logsumexp(rest, 0) - rest[0]
    return total / len(names)


def _best(scores: Tensor, group: Tensor) -> Tensor:
    """The row of each prompt's best answer, the first of equals."""
    found = []
    for name in group.unique():
        rows = (group == name).nonzero().squeeze(-1)
        found.append(rows[scores[rows].argmax()])
    return torch.stack(found)


def rank_collator(tokenizer: Any) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """A collator of rows with several answers each; see the module's text.

    Args:
        tokenizer: The tokenizer whose padding token fills up, or that token's id.

    Returns:
        From rows to `input_ids`, `attention_mask`, `labels` `[N, T]`, `score` float32 `[N]` and `group` int64 `[N]`,
        N being the number of answers in all.

    Raises:
        BadInput: when called: a row without two answers, or with unequal numbers of answers and scores.
    """
    collate = pad_collator(tokenizer)

    def flat(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answers, scores, group = [], [], []
        for i, row in enumerate(rows):
            count = len(row["score"])
            if count < 2 or len(row["input_ids"]) != count or len(row["labels"]) != count:
                sizes = f"{len(row['input_ids'])} answers, {len(row['labels'])} labels and {count} scores"
                raise BadInput(
                    "score", sizes, "are no ranking", "give 2 answers or more, and a score to each"
                )
            for ids, labels in zip(row["input_ids"], row["labels"], strict=True):
                answers.append({"input_ids": list(ids), "labels": list(labels)})
            scores += [float(score) for score in row["score"]]
            group += [i] * count
        batch = collate(answers)
        return {**batch, "score": torch.tensor(scores), "group": torch.tensor(group)}

    return flat


class _Ranking(Objective):
    """What the three objectives on sequences share."""

    needs_teacher = False
    needs_logits = False
    additive = True
    columns = ("score", "group")

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Prompts of a batch."""
        return {"prompts": torch.tensor(len(batch["group"].unique()))}

    def shared(self, batch: Mapping[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the batch's prompts as its share of a mean over those of the whole update."""
        if "prompts" not in batch:
            return found
        share = len(batch["group"].unique()) / batch["prompts"]
        return {name: value * share for name, value in found.items()}


class DPO(_Ranking):
    """Direct preference optimisation on a teacher's preferences; `teacher` of the trainer is the reference model.

    Logged beside the loss: `accuracy`, the share of pairs that the student orders as the scores do, by delta.

    Args:
        beta: Strength of the pull towards the reference.

    Raises:
        BadInput: beta is not positive.
    """

    needs_teacher = True

    def __init__(self, *, beta: float = 0.1):
        super().__init__()
        if not 0 < beta < math.inf:
            raise BadInput("beta", beta, "is not positive", "give a number above 0")
        self.beta = beta

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if teacher is None or teacher.sparse is not None:
            raise NotApplicable("teacher", "stored top-k", "scores no text", "give the reference model")
        scores, group = batch["score"], batch["group"]
        policy = sequence_log_probs(student, batch["labels"])
        with torch.no_grad():
            reference = sequence_log_probs(teacher, batch["labels"])
        loss = dpo_loss(policy, reference, scores, group, self.beta)
        better, worse = preferences(scores, group)
        delta = (policy - reference).detach()
        right = (delta[better] > delta[worse]).to(loss.dtype)
        return self.shared(batch, {"loss": loss, "accuracy": right.mean() if len(right) else right.sum()})


class RRHF(_Ranking):
    """Rank responses by their own likelihood: hinge on the order, and fine-tuning on the best answer.

    The paper adds both parts with weight 1; the authors' training script weighs the ranking by 100.

    Args:
        rank_weight: Weight of the ranking part.
        sft_weight: Weight of the best answer's negative log-likelihood.
        sft: That likelihood per token ("mean") or of the whole answer ("sum", the paper's eq. 3).

    Raises:
        BadInput: weights below 0 or both 0, another `sft`.
    """

    def __init__(
        self, *, rank_weight: float = 1.0, sft_weight: float = 1.0, sft: Literal["mean", "sum"] = "mean"
    ):
        super().__init__()
        _check_weights(rank_weight, sft_weight)
        if sft not in ("mean", "sum"):
            raise BadInput("sft", sft, "is not known", 'use "mean" or "sum"')
        self.rank_weight, self.sft_weight, self.sft = rank_weight, sft_weight, sft

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        scores, group = batch["score"], batch["group"]
        total, mean = _both(student, batch["labels"])
        rank = rrhf_loss(mean, scores, group)
        best = -(total if self.sft == "sum" else mean)[_best(scores, group)].mean()
        loss = self.rank_weight * rank + self.sft_weight * best
        return self.shared(batch, {"loss": loss, "rank": rank, "sft": best})


class PRO(_Ranking):
    """Preference ranking optimisation: the whole ranking as a chain of choices.

    Args:
        sft_weight: Weight of the best answer's negative log-likelihood, times (K - 1)^2 of K answers; the paper adds
            it with 0.05.
        sft: That likelihood of the whole answer ("sum") or per token ("mean").
        weighted: Weigh by the scores' gaps; see `pro_loss`.

    Raises:
        BadInput: a weight below 0, another `sft`.
    """

    def __init__(
        self, *, sft_weight: float = 0.0, sft: Literal["mean", "sum"] = "sum", weighted: bool = False
    ):
        super().__init__()
        _check_weights(1.0, sft_weight)
        if sft not in ("mean", "sum"):
            raise BadInput("sft", sft, "is not known", 'use "mean" or "sum"')
        self.sft_weight, self.sft, self.weighted = sft_weight, sft, weighted

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        scores, group = batch["score"], batch["group"]
        total, mean = _both(student, batch["labels"])
        rank = pro_loss(mean, scores, group, weighted=self.weighted)
        chosen = _best(scores, group)
        sizes = (group.unsqueeze(0) == group[chosen].unsqueeze(1)).sum(1)
        best = -(total if self.sft == "sum" else mean)[chosen]
        sft = (best * (sizes - 1) ** 2).mean()
        loss = rank + self.sft_weight * sft
        return self.shared(batch, {"loss": loss, "rank": rank, "sft": best.mean()})


class RewardRanking(Objective):
    """A reward model from a teacher's rankings: the student is a sequence classifier with one output.

    Logged beside the loss: `accuracy`, the share of pairs in the teacher's order.
    """

    needs_teacher = False
    columns = ("score", "group")

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        logits = student.whole()
        if logits.dim() != 2 or logits.shape[1] != 1:
            problem = "is not one number per text"
            remedy = 'load it as "sequence-classification" with num_labels=1'
            raise IncompatibleModels("student", tuple(logits.shape), problem, remedy)
        rewards = logits.squeeze(1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = reward_loss(rewards, batch["score"], batch["group"])
        better, worse = preferences(batch["score"], batch["group"])
        right = (rewards[better] > rewards[worse]).to(loss.dtype)
        return {"loss": loss, "accuracy": right.mean() if len(right) else right.sum()}


def _check_weights(rank: float, sft: float) -> None:
    if not (0 <= rank < math.inf and 0 <= sft < math.inf) or rank + sft == 0:
        raise BadInput(
            "sft_weight", f"{rank}, {sft}", "are not weights", "give numbers from 0 up, not both 0"
        )


def _both(student: Signal, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer, and the same per token."""
    total = sequence_log_probs(student, labels)
    return total, total / (labels[:, 1:] != IGNORED).sum(1).clamp_min(1)
