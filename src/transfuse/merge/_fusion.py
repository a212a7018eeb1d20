"""FusionX's selection network and loss: several sources' distributions, weighted anew for every example."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.batches import IGNORED
from ..core.errors import BadInput, IncompatibleModels
from ..core.fused import Head

__all__ = [
    "Distributions",
    "FusionLossOutput",
    "Importance",
    "Loss",
    "Mode",
    "MultiTeacherFusion",
    "Rest",
    "SelectionGate",
    "cv_squared",
]

Mode = Literal["gate", "mince", "mean", "reward-softmax", "random-gate"]
Loss = Literal["ce", "kl"]
Importance = Literal["batch", "update", "ema"]
Rest = Literal["spread", "renormalise"]

TOLERANCE = 1e-3  # on the sum of a distribution
_CHUNK_BYTES = 64 * 2**20  # one float32 copy of a chunk of logits
_LEAST_ROWS = 16


@dataclass(frozen=True)
class Distributions:
    """What N sources say at each position, sparse: T_v = floor + sum_j values_j [ids_j = v].

    Attributes:
        ids: int64 `[B, L, N, k]` (`[B, N, k]` for a classifier); row t speaks about the token at t + 1.
        values: Float, of the same shape; 0 where nothing is listed.
        floor: Float `[B, L, N]` (`[B, N]`): what every entry of the vocabulary has at least.
    """

    ids: Tensor
    values: Tensor
    floor: Tensor

    @property
    def count(self) -> int:
        """N."""
        return self.ids.shape[-2]

    @classmethod
    def dense(cls, sources: Sequence[Tensor]) -> Distributions:
        """From N tensors of probabilities `[B, L, V]` or `[B, C]`, for small vocabularies."""
        values = torch.stack(list(sources), -2)
        ids = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
        return cls(ids, values, values.new_zeros(values.shape[:-1]))

    @classmethod
    def top_k(cls, ids: Tensor, probs: Tensor, vocabulary: int, rest: Rest = "spread") -> Distributions:
        """From the largest probabilities of each source.

        Args:
            ids: int64 `[..., N, k]`, no id twice in a row.
            probs: Float `[..., N, k]`; entries of probability 0 are not listed, whatever their id.
            vocabulary: V.
            rest: What becomes of 1 - sum p: "spread" evenly over the entries that are not listed, or "renormalise",
                p divided by its sum.

        Raises:
            BadInput: probabilities below 0 or beyond a sum of 1; an unknown `rest`.
        """
        if rest not in get_args(Rest):
            raise BadInput("rest", rest, "is not known", f"use one of {', '.join(get_args(Rest))}")
        total = probs.sum(-1, keepdim=True)
        if not bool((probs >= 0).all() & (total <= 1 + TOLERANCE).all()):
            raise BadInput(
                "probs", float(total.max()), "is no sum of probabilities", "give a softmax's entries"
            )
        listed = probs > 0
        free = vocabulary - listed.sum(-1, keepdim=True)
        if rest == "renormalise":
            free = torch.zeros_like(free)
        left = torch.where(free > 0, (1 - total).clamp_min(0), 0.0)
        floor = left / free.clamp_min(1)
        scaled = probs * ((1 - left) / total.clamp_min(torch.finfo(probs.dtype).tiny))
        return cls(ids, torch.where(listed, scaled - floor, 0.0), floor.squeeze(-1))

    def rows(self, where: tuple[Tensor, ...], like: Tensor) -> Distributions:
        """Those of chosen positions, `[n, N, ...]`, in the dtype and on the device of `like`."""
        at = tuple(index.to(self.ids.device) for index in where)
        dtype = torch.promote_types(like.dtype, torch.float32)
        values, floor = (part[at].to(device=like.device, dtype=dtype) for part in (self.values, self.floor))
        return Distributions(self.ids[at].to(like.device), values, floor)


@dataclass(frozen=True)
class FusionLossOutput:
    """The loss of a batch and what it was made of.

    Attributes:
        loss: lambda lm + (1 - lambda) fusion + beta feedback, a scalar.
        lm: Cross-entropy with the gold labels, a mean over predicted tokens.
        fusion: Of the target with the fused distribution, a mean over predicted tokens.
        feedback: CV^2 of the sources' importance.
        weights: w, float `[B, N]`.
        selected: Which sources an example listens to, bool `[B, N]`.
    """

    loss: Tensor
    lm: Tensor
    fusion: Tensor
    feedback: Tensor
    weights: Tensor
    selected: Tensor


class SelectionGate(nn.Module):
    """g = softmax(W3 GELU(W2 GELU(W1 r))) with W1: N -> 2N, W2: 2N -> N, W3: N -> N, with biases, in float32.

    Args:
        n_sources: N.
        uniform_start: Start W3 near 0, so that every source begins with about 1 / N; False leaves torch's own
            initialisation.
    """

    def __init__(self, n_sources: int, *, uniform_start: bool = True):
        super().__init__()
        if n_sources < 1:
            raise BadInput("n_sources", n_sources, "is below 1", "give the number of sources")
        self.first = nn.Linear(n_sources, 2 * n_sources, dtype=torch.float32)
        self.second = nn.Linear(2 * n_sources, n_sources, dtype=torch.float32)
        self.third = nn.Linear(n_sources, n_sources, dtype=torch.float32)
        if uniform_start:
            with torch.no_grad():
                self.third.weight.mul_(0.01)
                self.third.bias.zero_()

    def forward(self, rewards: Tensor) -> Tensor:
        """Scores `[B, N]`, rows of which sum to 1, from rewards `[B, N]`."""
        with torch.autocast(rewards.device.type, enabled=False):
            hidden = nn.functional.gelu(self.first(rewards.to(self.first.weight.dtype)))
            return torch.softmax(self.third(nn.functional.gelu(self.second(hidden))), -1)


def cv_squared(importance: Tensor) -> Tensor:
    """Var(I) / (mean(I)^2 + 1e-10) over N sources `[N]`, the variance unbiased; 0 for one source."""
    if len(importance) == 1:
        return importance.sum() * 0.0
    return importance.var() / (importance.mean().square() + 1e-10)


class MultiTeacherFusion(nn.Module):
    """The target's loss under N sources; see the module `transfuse.merge.fusion_x` for the equations.

    Args:
        n_sources: N.
        threshold: tau: sources of a smaller score are not heard; below it all, the best one is. 0 is plain weighting.
            Where one source is heard its weight is 1 whatever its score, and no gradient reaches the gate: from
            its equal start it learns only with tau below 1 / N (the default 0.15 suits up to six sources).
        feedback_weight: beta.
        lm_weight: lambda.
        loss: "ce", cross-entropy with the fused distribution, or "kl", that less the distribution's entropy.
        mode: "gate", the trained network; or a baseline without it: "mince", the source of the largest reward;
            "mean"; "reward-softmax", softmax(r); "random-gate", a network drawn anew at every call and never trained,
            as the released code has it. Those but the last have no feedback.
        importance: Over what the feedback sums w: the "batch"; the "update" with all its micro-batches, where
            `forward` is told of them; or "ema", a running mean of batches, at which its value and slope are taken.
        ema_decay: Of that mean.

    Attributes:
        gate: The `SelectionGate` of mode "gate", else None.
    """

    def __init__(
        self,
        n_sources: int,
        threshold: float = 0.15,
        feedback_weight: float = 0.5,
        lm_weight: float = 0.9,
        *,
        loss: Loss = "ce",
        mode: Mode = "gate",
        importance: Importance = "batch",
        ema_decay: float = 0.9,
    ):
        super().__init__()
        choices = (("loss", loss, Loss), ("mode", mode, Mode), ("importance", importance, Importance))
        for name, value, known in choices:
            if value not in get_args(known):
                raise BadInput(name, value, "is not known", f"use one of {', '.join(get_args(known))}")
        if n_sources < 1:
            raise BadInput("n_sources", n_sources, "is below 1", "give the number of sources")
        if not 0 <= threshold < 1:
            raise BadInput("threshold", threshold, "is not in [0, 1)", "give 0 for no selection")
        if not 0 <= lm_weight <= 1:
            raise BadInput("lm_weight", lm_weight, "is not from 0 to 1", "give a share")
        if not feedback_weight >= 0:
            raise BadInput("feedback_weight", feedback_weight, "is below 0", "give 0 for no feedback")
        if not 0 <= ema_decay < 1:
            raise BadInput("ema_decay", ema_decay, "is not in [0, 1)", "give a share such as 0.9")
        if mode == "gate" and n_sources > 1 and threshold * n_sources >= 1:
            warnings.warn(
                f"threshold = {threshold:g} is not below 1 / {n_sources}: from equal scores one source is heard per "
                "text, and the gate has nothing to learn from; use a smaller one",
                stacklevel=2,
            )
        self.n_sources, self.threshold, self.feedback_weight = n_sources, threshold, feedback_weight
        self.lm_weight, self.loss, self.mode = lm_weight, loss, mode
        self.importance, self.ema_decay = importance, ema_decay
        self.gate = SelectionGate(n_sources) if mode == "gate" else None
        self.running: Tensor
        self.register_buffer("running", torch.zeros(n_sources), persistent=importance == "ema")

    def weigh(self, ce: Tensor) -> tuple[Tensor, Tensor]:
        """Weights w `[B, N]` and the selection, bool `[B, N]`, from the sources' cross-entropies `[B, N]`."""
        rewards = torch.exp(-ce)
        if self.mode in ("mince", "mean", "reward-softmax"):
            everyone = torch.ones_like(rewards, dtype=torch.bool)
            if self.mode == "mean":
                return torch.full_like(rewards, 1 / self.n_sources), everyone
            if self.mode == "reward-softmax":
                return torch.softmax(rewards, -1), everyone
            best = nn.functional.one_hot(rewards.argmax(-1), self.n_sources)
            return best.to(rewards.dtype), best.bool()
        if self.gate is not None:
            scores = self.gate(rewards)
        else:
            with torch.no_grad():
                scores = SelectionGate(self.n_sources, uniform_start=False).to(rewards.device)(rewards)
        selected = scores.detach() > self.threshold
        best = nn.functional.one_hot(scores.detach().argmax(-1), self.n_sources).bool()
        selected = torch.where(selected.any(-1, keepdim=True), selected, best)
        kept = scores * selected
        return kept / (kept.sum(-1, keepdim=True) + 1e-8), selected

    def feedback(self, weights: Tensor, update_ce: Tensor | None = None) -> Tensor:
        """CV^2 of the importance of the sources, see `importance`."""
        if self.mode not in ("gate", "random-gate"):
            return weights.sum() * 0.0
        if self.importance == "update" and update_ce is not None and self.gate is not None:
            weights = self.weigh(update_ce)[0]
        if self.importance != "ema":
            return cv_squared(weights.sum(0))
        mean = weights.mean(0)
        smooth = self.ema_decay * self.running + (1 - self.ema_decay) * mean.detach()
        if self.training:
            self.running.copy_(smooth)
        return cv_squared(smooth + mean - mean.detach())

    def forward(
        self,
        student: Tensor,
        labels: Tensor,
        sources: Distributions | Sequence[Tensor],
        ce: Tensor,
        *,
        head: Head | None = None,
        items: Tensor | int | None = None,
        update_ce: Tensor | None = None,
        share: float = 1.0,
    ) -> FusionLossOutput:
        """The loss of a batch.

        Args:
            student: The target's logits `[B, L, V]` (a classifier's `[B, C]`), or with `head` its states `[B, L, D]`:
                logits then exist for a chunk of tokens at a time.
            labels: int64 `[B, L]`, -100 where nothing is predicted; logits at t predict label t + 1. Classes `[B]`.
            sources: `Distributions`, or N tensors of probabilities like the logits.
            ce: The sources' mean cross-entropy on each sequence, in nats, `[B, N]`.
            head: The target's head.
            items: Predicted tokens that sums are divided by, of a whole update for one; those of the batch by default.
            update_ce: Cross-entropies of all the update's sequences `[B', N]`, for `importance="update"`.
            share: Of the feedback in the loss, 1 / accumulation where it comes once per micro-batch.

        Raises:
            BadInput: another number of sources; a cross-entropy that is none (NaN); distributions that do not sum
                to 1 within 1e-3.
            IncompatibleModels: distributions over another vocabulary.
        """
        vocabulary = student.shape[-1] if head is None else head.vocabulary
        if not isinstance(sources, Distributions):
            self._check_count("sources", len(sources))
            if any(source.shape[-1] != vocabulary for source in sources):
                widths = [source.shape[-1] for source in sources]
                remedy = "map each vocabulary to the target's (align_distributions)"
                raise IncompatibleModels("sources", widths, f"entries, the target has {vocabulary}", remedy)
            sources = Distributions.dense(sources)
        self._check_count("sources", sources.count)
        if ce.shape != (len(labels), self.n_sources):
            shape = (len(labels), self.n_sources)
            raise BadInput("ce", tuple(ce.shape), f"is not {shape}", "give one per sequence and source")
        for each in (ce, update_ce):
            if each is not None and not bool((each >= 0).all()):
                raise BadInput("ce", "NaN or negative", "is no cross-entropy", "measure the sources again")
        where: tuple[Tensor, ...]
        if labels.dim() == 1:
            where, gold = (torch.arange(len(labels), device=labels.device),), labels
        else:
            keep = labels[:, 1:] != IGNORED
            where, gold = keep.nonzero(as_tuple=True), labels[:, 1:][keep]
            student = student[:, :-1]
        rows = student[tuple(index.to(student.device) for index in where)]
        said = sources.rows(where, rows)
        _check(said, vocabulary)
        terms = _terms(rows, gold.to(rows.device), said, head)
        wide = ce.to(device=rows.device, dtype=torch.promote_types(ce.dtype, torch.float32))
        weights, selected = self.weigh(wide)
        per_token = weights[where[0].to(rows.device)].to(terms.dtype)
        fused = (per_token * terms[:, 1:]).sum(-1)
        if self.loss == "kl":
            fused = fused - _entropy(said, per_token, vocabulary)
        count = max(len(gold), 1) if items is None else items
        lm, fusion = terms[:, 0].sum() / count, fused.sum() / count
        others = None if update_ce is None else update_ce.to(wide)
        feedback = self.feedback(weights, others)
        loss = self.lm_weight * lm + (1 - self.lm_weight) * fusion + self.feedback_weight * share * feedback
        return FusionLossOutput(loss, lm, fusion, feedback, weights, selected)

    def _check_count(self, name: str, count: int) -> None:
        if count != self.n_sources:
            raise BadInput(name, count, f"are not the {self.n_sources} announced", "give one per source")


def _check(said: Distributions, vocabulary: int) -> None:
    totals = said.values.sum(-1) + vocabulary * said.floor
    if totals.numel() and not bool(((totals - 1).abs() <= TOLERANCE).all()):
        worst = float(totals.flatten()[(totals - 1).abs().nan_to_num(torch.inf).argmax()])
        raise BadInput("sources", worst, "is the sum of a distribution, not 1", "give probabilities")
    if said.ids.numel() and int(said.ids.max()) >= vocabulary:
        problem = f"is beyond the target's vocabulary of {vocabulary}"
        raise IncompatibleModels("sources", int(said.ids.max()), problem, "map the vocabulary first")


def _terms(rows: Tensor, gold: Tensor, said: Distributions, head: Head | None) -> Tensor:
    """Per token: -log p of the gold token, and the cross-entropy with each source, `[n, 1 + N]`."""

    def piece(part: Tensor, gold: Tensor, ids: Tensor, values: Tensor, floor: Tensor) -> Tensor:
        logits = part if head is None else head(part)
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        at = log_p.gather(-1, ids.flatten(1)).view(ids.shape).masked_fill(values == 0, 0.0)
        found = -(values * at).sum(-1)
        if bool((floor > 0).any()):
            found = found - floor * log_p.sum(-1, keepdim=True).expand_as(floor).masked_fill(floor == 0, 0.0)
        return torch.cat([-log_p.gather(-1, gold.unsqueeze(-1)), found], -1)

    vocabulary = rows.shape[-1] if head is None else head.vocabulary
    size = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * vocabulary))
    columns = (rows, gold, said.ids, said.values, said.floor)
    if head is None and len(rows) <= size:
        return piece(*columns)
    chunks = zip(*(column.split(size) for column in columns), strict=True)
    return torch.cat([checkpoint(piece, *chunk, use_reentrant=False) for chunk in chunks])


def _entropy(said: Distributions, weights: Tensor, vocabulary: int) -> Tensor:
    """Entropy of the fused distribution at each token, `[n]`; ids that several sources list are added up."""
    floor = (weights * said.floor).sum(-1, keepdim=True)
    ids, order = said.ids.flatten(1).sort(-1)
    excess = (weights.unsqueeze(-1) * said.values).flatten(1).gather(-1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    number = new.cumsum(-1) - 1
    fused = floor + torch.zeros_like(excess).scatter_add(-1, number, excess)
    listed = new.sum(-1, keepdim=True)
    real = (torch.arange(ids.shape[-1], device=ids.device) < listed) & (fused > 0)
    fused = torch.where(real, fused, 1.0)
    low = torch.where(floor > 0, floor, 1.0)
    return -(fused * fused.log()).sum(-1) - ((vocabulary - listed) * floor * low.log()).squeeze(-1)
