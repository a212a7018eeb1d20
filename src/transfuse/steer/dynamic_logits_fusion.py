"""Dynamic logits fusion: small experts move a large model as far from itself as tuning moved them.

:arxiv: 2406.15480
:moves: what several small experts learnt -> a large model's answers
:access: logits
:reversible: yes
:context: no

A large model L, a small model S and experts S_1 .. S_T tuned from it decode in step. As in proxy-tuning, what
tuning changed in an expert's logits is added to the large model's; how much of it is solved for, anew for each
token and each row of a batch: the weights for which the large model moves away from itself, in KL divergence of
either direction, as far as the experts moved away from S.

    P, Q, Q_t = softmax of the logits of L, S, S_t       P~ = softmax(L + sum_t alpha_t (S_t - S))
    J(alpha)  = sum_t (KL(P~ | P) - KL(Q_t | Q))^2 + (KL(P | P~) - KL(Q | Q_t))^2

J is evaluated on a grid, 0 to 2 in steps of 0.1 for each expert. With several experts one of them is chosen per
token, while J holds the distances of all; `one_expert_per_step=False` searches the whole product of the grids,
which is 21^T points. Between equal values of J the weight nearer to 0 wins, then the earlier expert.

No P~ is ever written out for the search. With d = sum_t alpha_t (S_t - S) and A = log E_P[exp d],

    KL(P | P~) = A - E_P[d]            KL(P~ | P) = E_P~[d] - A

For one expert, `refine=True` goes on from the best point of the grid to the minimum beside it, by bisection on
the slope of J.

There is no published code. The appendix of the paper once pairs the two directions crosswise; the pairing of its
main text is used. Its pseudo-code sets the running minimum once for all tokens; here each token has its own. The
search is at temperature 1; processors, temperature and top-p act on the result. Tokens that one of the models
rules out (-inf) are left out of the search and keep the large model's logit.

    model, tokenizer = transfuse.load("large")
    fused = DynamicLogitsFusion(model, tokenizer, "small", ["small-law", "small-medicine"])
    fused.generate("Who may inherit?")
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transfuse.core.divergence import kl_terms
from transfuse.core.errors import BadInput
from transfuse.steer._experts import Model, WithExperts, cropped

__all__ = ["CHUNK_BYTES", "DynamicLogitsFusion", "Fused", "alpha_grids", "fuse_logits", "moved_divergences"]

CHUNK_BYTES = 16 * 2**20
"""Size of the largest `[B, points, V]` tensor that a search makes (one point, if that alone is larger)."""

_HALVINGS = 24  # of an interval of two steps, when refining

Ranges = tuple[float, float] | Sequence[tuple[float, float]]


class Fused(NamedTuple):
    """One step for a batch.

    Attributes:
        scores: `[B, V]` float32.
        alpha: `[B, T]` float32, the weight of each expert.
        cost: `[B]` float32, J there.
    """

    scores: Tensor
    alpha: Tensor
    cost: Tensor


def alpha_grids(alpha_range: Ranges, step: float, experts: int) -> list[list[float]]:
    """The multiples of `step` within each expert's range, 0 among them.

    Args:
        alpha_range: Least and greatest weight, for all experts or one pair per expert.
        step: Distance of neighbours, above 0.
        experts: Their number T.

    Raises:
        BadInput: no experts, a range without 0, a step that is not positive, ranges for another number.
    """
    if not (step > 0 and math.isfinite(step)):
        raise BadInput("step", step, "is not a distance", "give a number above 0; the paper uses 0.1")
    slack = 1e-9  # 2 / 0.1 is to give 20 steps
    return [
        [
            round(k * step, 12)
            for k in range(math.ceil(low / step - slack), math.floor(high / step + slack) + 1)
        ]
        for low, high in _ranges(alpha_range, experts)
    ]


def _ranges(alpha_range: Ranges, experts: int) -> list[tuple[float, float]]:
    if experts < 1:
        raise BadInput("experts", [], "is empty", "give at least one expert")
    pair = len(alpha_range) == 2 and all(isinstance(end, (int, float)) for end in alpha_range)
    ranges: list[Any] = [alpha_range] * experts if pair else list(alpha_range)
    if len(ranges) != experts:
        remedy = "give one (low, high) for all, or one for each"
        raise BadInput("alpha_range", alpha_range, f"does not hold {experts} ranges", remedy)
    for low, high in ranges:
        if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high):
            raise BadInput("alpha_range", (low, high), "does not hold 0", "let it begin at 0, as (0, 2) does")
    return [(float(low), float(high)) for low, high in ranges]


@functools.lru_cache(maxsize=16)
def _points(grids: tuple[tuple[float, ...], ...], one: bool) -> Tensor:
    """The points of the search but for 0, `[C, T]` float64: nearest to it first, then those of earlier experts."""
    if one:
        single = sorted((abs(a), t, a) for t, grid in enumerate(grids) for a in grid if a)
        points = [tuple(a if i == t else 0.0 for i in range(len(grids))) for _, t, a in single]
    else:
        points = [point for point in itertools.product(*grids) if any(point)]
        points.sort(key=lambda p: (round(sum(map(abs, p)), 9), tuple(-abs(a) for a in p), p))
    return torch.tensor(points, dtype=torch.float64).reshape(-1, len(grids))


def moved_divergences(log_p: Tensor, offsets: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far weights move a distribution: KL(P | P~) and KL(P~ | P) for P~ ~ P exp(sum_t alpha_t offset_t).

    Args:
        log_p: `[B, V]` log-probabilities of P.
        offsets: `[B, T, V]`, 0 where P is 0; their mean under P should be near 0, else digits are lost.
        points: `[C, T]` weights for all rows, or `[B, C, T]`.

    Returns:
        The two divergences `[B, C]` in nats, and the offsets' means under P~, `[B, C, T]`.
    """
    points = points.expand(len(log_p), *points.shape[-2:])
    x = torch.baddbmm(log_p[:, None], points, offsets)  # [B, C, V], the one tensor of that size
    top = x.amax(-1, keepdim=True)
    weights = x.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    a = (total.log() + top)[..., 0]
    means = torch.bmm(weights, offsets.transpose(1, 2)) / total
    at_rest = torch.bmm(log_p.exp()[:, None], offsets.transpose(1, 2))  # [B, 1, T]
    forward, reverse = a - (points * at_rest).sum(-1), (points * means).sum(-1) - a
    return forward.clamp_min(0), reverse.clamp_min(0), means


def _cost(forward: Tensor, reverse: Tensor, targets: Tensor) -> Tensor:
    """J `[B, C]` from divergences `[B, C]` and targets `[B, T, 2]`; the experts' order changes no digit."""
    terms = (forward[..., None] - targets[:, None, :, 0]) ** 2 + (
        reverse[..., None] - targets[:, None, :, 1]
    ) ** 2
    return terms.sort(-1).values.sum(-1)


def fuse_logits(
    base: Tensor,
    small: Tensor,
    experts: Sequence[Tensor],
    *,
    alpha_range: Ranges = (0.0, 2.0),
    step: float = 0.1,
    one_expert_per_step: bool = True,
    refine: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Fused:
    """Solve for the experts' weights, row by row, and add their offsets.

    Args:
        base: `[B, V]` logits of the large model, any floating dtype.
        small: `[B, V or more]` logits of the small one; what is beyond V is cut off.
        experts: T of the same kind.
        alpha_range: Least and greatest weight, 0 between them; one pair, or one per expert.
        step: Of the grid: its points are multiples of it.
        one_expert_per_step: At most one weight differs from 0.
        refine: After the grid, bisect to the minimum beside its best point; for one expert.
        chunk_bytes: See `CHUNK_BYTES`.

    Returns:
        Scores, weights and J. Rows whose weights are all 0 have exactly `base` as scores.

    Raises:
        BadInput: no experts, a range without 0, a step that is not positive, `refine` with several experts,
            rows that do not pair.
        IncompatibleModels: a small model scores fewer than V tokens.
    """
    grids = _check(len(experts), alpha_range, step, refine)
    if base.dim() != 2:
        raise BadInput("base", tuple(base.shape), "is not a batch", "give [B, V]")
    names = {f"experts[{t}]": z for t, z in enumerate(experts)}
    plain, before, *after = cropped(base, small=small, **names)
    present = torch.stack([plain, before, *after]).ne(-math.inf).all(0)  # [B, V], in all of them
    log_p, log_q, *log_qt = (
        z.masked_fill(~present, -math.inf).log_softmax(-1) for z in (plain, before, *after)
    )
    raw = torch.stack([(z - before).masked_fill(~present, 0.0) for z in after], 1)  # [B, T, V]
    p = log_p.exp()[:, None]
    offsets = (raw - (p * raw).sum(-1, keepdim=True)).masked_fill(~present[:, None], 0.0)
    targets = torch.stack(
        [torch.stack([kl_terms(log_q, each), kl_terms(each, log_q)], -1) for each in log_qt], 1
    ).clamp_min(0)
    # Logits that differ by a constant are one distribution: what rounding leaves of it is no distance.
    size = torch.stack([z.masked_fill(~present, 0.0).abs().amax(-1) for z in (before, *after)], 1)
    noise = 4 * torch.finfo(raw.dtype).eps * (size[:, 1:] + size[:, :1])
    same = offsets.abs().amax(-1) <= noise
    offsets, targets = offsets.masked_fill(same[..., None], 0.0), targets.masked_fill(same[..., None], 0.0)

    still = torch.zeros_like(targets[:, :1, 0])
    best = _cost(still, still, targets)[:, 0]  # where nothing moves
    alpha = torch.zeros_like(targets[..., 0])
    search = _points(tuple(map(tuple, grids)), one_expert_per_step).to(plain)
    for points in search.split(max(1, chunk_bytes // (plain.numel() * plain.element_size()))):
        if not len(points):  # 0 alone is on the grid
            break
        forward, reverse, _ = moved_divergences(log_p, offsets, points)
        cost, at = _cost(forward, reverse, targets).min(-1)
        better = cost < best
        best, alpha = torch.where(better, cost, best), torch.where(better[:, None], points[at], alpha)
    if refine:
        low, high = _ranges(alpha_range, 1)[0]
        best, alpha = _refined(log_p, offsets, targets, best, alpha, step, low, high)
    return Fused(plain + torch.einsum("bt,btv->bv", alpha, raw), alpha, best)


def _refined(
    log_p: Tensor, offsets: Tensor, targets: Tensor, best: Tensor, alpha: Tensor, step: float, low: float,
    high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Bisect on the slope of J within a step of each row's best point; kept where J becomes smaller."""
    left, right = (alpha - step).clamp_min(low), (alpha + step).clamp_max(high)  # [B, 1]
    squares = offsets**2
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        forward, reverse, mean = moved_divergences(log_p, offsets, middle[:, None])
        shifted = (log_p + middle * offsets[:, 0]).softmax(-1)
        variance = (shifted * squares[:, 0]).sum(-1, keepdim=True) - mean[..., 0] ** 2
        at_rest = (log_p.exp() * offsets[:, 0]).sum(-1, keepdim=True)
        slope = (forward - targets[..., 0]) * (mean[..., 0] - at_rest)
        slope = slope + (reverse - targets[..., 1]) * middle * variance
        left, right = torch.where(slope < 0, middle, left), torch.where(slope < 0, right, middle)
    middle = (left + right) / 2
    forward, reverse, _ = moved_divergences(log_p, offsets, middle[:, None])
    cost = _cost(forward, reverse, targets)[:, 0]
    better = cost < best
    return torch.where(better, cost, best), torch.where(better[:, None], middle, alpha)


def _check(experts: int, alpha_range: Ranges, step: float, refine: bool) -> list[list[float]]:
    grids = alpha_grids(alpha_range, step, experts)
    if refine and experts > 1:
        raise BadInput("refine", refine, f"does not work with {experts} experts", "leave it out, or give one")
    return grids


class DynamicLogitsFusion(WithExperts):
    """A large model steered by small experts, with weights found at each token.

    As `model.generate(**inputs, custom_generate=DynamicLogitsFusion(...))` it takes `expert_input_ids` and
    `expert_attention_mask`, `[B, S]` prompts that all the small models read in place of the usual ones: where
    the large model's prompt holds examples that they need not see.

    Args:
        model: The large causal language model; it is not changed.
        tokenizer: Its tokenizer.
        small: The small model from which the experts were tuned: a model, (model, tokenizer), or what
            `transfuse.load` takes. One that is loaded here gets the large model's dtype and device.
        experts: The tuned small models, given likewise. A merge of several is one of them.
        alpha_range: Least and greatest weight, for all experts or one pair per expert.
        step: Of the grid of weights.
        one_expert_per_step: Choose one expert per token; else every combination of grid points is tried.
        refine: With one expert, go on from the grid by bisection.
        prompt: How a query is written down for the large model, with `{query}`.
        chat: Put the text into the large model's chat template.
        system: System message of that chat.
        expert_template: How the small models are asked: a text with `{query}`, or "chat" for the chat template
            of the small model's tokenizer; None: as the large one is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        small: PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | str | os.PathLike[str],
        experts: Sequence[
            PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | str | os.PathLike[str]
        ],
        *,
        alpha_range: tuple[float, float] | Sequence[tuple[float, float]] = (0.0, 2.0),
        step: float = 0.1,
        one_expert_per_step: bool = True,
        refine: bool = False,
        prompt: str = "{query}",
        chat: bool = False,
        system: str | None = None,
        expert_template: str | None = None,
    ):
        self.model, self.tokenizer, self.small, self.experts = model, tokenizer, small, experts
        self.alpha_range, self.step = alpha_range, step
        self.one_expert_per_step, self.refine = one_expert_per_step, refine
        self.prompt, self.chat, self.system = prompt, chat, system
        self.expert_template = expert_template
        self._ready = {}

    @property
    def streams(self) -> int:  # type: ignore[override]
        """2 + T: the large model, the small one, the experts."""
        return 2 + len(self.experts)

    def neutral(self) -> DynamicLogitsFusion:
        """A copy whose only weight is 0."""
        plain = copy.copy(self)
        plain.alpha_range = (0.0, 0.0)
        return plain

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Scores `[B, V]` from the logits of large model, small model and experts."""
        return self._fuse(logits).scores

    def _step(self, logits: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scores, and as notes the weights `[B, T]`, the expert with the largest (-1: none) and J."""
        fused = self._fuse(logits)
        chosen = fused.alpha.abs().argmax(-1).masked_fill((fused.alpha == 0).all(-1), -1)
        return fused.scores, (fused.alpha, chosen, fused.cost)

    def _fuse(self, logits: list[Tensor]) -> Fused:
        return fuse_logits(
            logits[0], logits[1], logits[2:], alpha_range=self.alpha_range, step=self.step,
            one_expert_per_step=self.one_expert_per_step, refine=self.refine,
        )  # fmt: skip

    def _check(self) -> None:
        _check(len(self.experts), self.alpha_range, self.step, self.refine)

    def _others(self) -> list[tuple[str, Model, bool]]:
        experts = [(f"experts[{t}]", given, True) for t, given in enumerate(self.experts)]
        return [("small", self.small, True), *experts]
