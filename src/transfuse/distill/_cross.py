"""Objectives between models that do not share a tokenizer: universal logit distillation and its hybrid.

Both models read one text in their own tokens. Tokens are grouped so that a group covers the same bytes on both sides
(`core.tokens.align`), and each group becomes one distribution on each side, over that side's vocabulary. The row of
logits before a token is the one that predicts it. From a group of several tokens x_1 .. x_k with rows r_1 .. r_k:

    observed    p = p(. | r_1) p(x_2 | r_2) ... p(x_k | r_k)
    bayesian    p = p(x_1 | r_1) ... p(x_{k-1} | r_{k-1}) p(. | r_k)

neither sums to one. The student's gradient passes all factors.

    collator = CrossCollator(tokenizer, teacher_tokenizer)
    Distiller(student=student, teacher=teacher, objective=ULD(), data_collator=collator, train_dataset=texts)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.batches import IGNORED
from ..core.divergence import jsd_terms, kl_terms
from ..core.errors import BadInput, NotApplicable
from ..core.fused import fused_sums
from ..core.tokens import shared_vocabulary
from ._base import Objective, Signal, at_least_one
from ._cross_data import CrossCollator, Merge, Side, pair_rows

__all__ = ["ULD", "CrossCollator", "HybridULD", "hybrid_terms", "pair_rows", "uld_terms"]

_CHUNK_BYTES = 64 * 2**20  # one float32 copy of a chunk of logits
_LEAST_ROWS = 16


def uld_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Sum over ranks of |q_(i) - p_(i)|, both sorted from the largest down, the shorter filled up with zeros.

    Args:
        log_q: The student's log-probabilities `[n, V]`; they need not sum to one.
        log_p: The teacher's, `[n, V']`.

    Returns:
        `[n]`.
    """
    q, p = (each.exp().sort(dim=-1, descending=True).values for each in (log_q, log_p))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (nn.functional.pad(each, (0, width - each.shape[-1])) for each in (q, p))
    return (q - p).abs().sum(-1)


def hybrid_terms(
    log_q: Tensor, log_p: Tensor, ours: Tensor, theirs: Tensor, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """GOLD's two parts: shared tokens by generalised JSD, the others by `uld_terms`; neither is renormalised.

    Args:
        log_q: The student's log-probabilities `[n, V]`.
        log_p: The teacher's, `[n, V']`.
        ours: The student's ids of the shared tokens, int64 `[k]`.
        theirs: The teacher's ids of the same, int64 `[k]`.
        beta: Weight of the teacher in the mixture; 0 is forward KL and 1 reverse KL over the shared tokens.

    Returns:
        Of shared and of other tokens, `[n]` each.
    """
    same_q, same_p = log_q[:, ours], log_p[:, theirs]
    if beta == 0.0:
        shared = kl_terms(same_p, same_q)
    elif beta == 1.0:
        shared = kl_terms(same_q, same_p)
    else:
        shared = jsd_terms(same_q, same_p, beta)
    rest = [_others(each.shape[-1], used) for each, used in ((log_q, ours), (log_p, theirs))]
    return shared, uld_terms(log_q[:, rest[0]], log_p[:, rest[1]])


def _others(size: int, used: Tensor) -> Tensor:
    left = torch.ones(size, dtype=torch.bool, device=used.device)
    left[used] = False
    return left.nonzero().squeeze(-1)


class _Rows:
    """Chosen rows of a model's logits, made when asked for."""

    def __init__(self, signal: Signal, where: tuple[Tensor, Tensor]):
        self.head = signal.head if signal.hidden is not None else None
        source = signal.hidden if self.head is not None else signal.whole()
        assert source is not None
        self.values = source[where]
        self.vocabulary = source.shape[-1] if self.head is None else self.head.vocabulary

    def log_probs(self, index: Tensor, temperature: float) -> Tensor:
        """`[n, V]`, float32 or float64."""
        rows = self.values[index]
        logits = self.head(rows) if self.head is not None else rows
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.log_softmax(logits / temperature, dim=-1)

    def of_tokens(self, index: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Log-probability of one token in each of some rows, `[n]`, a chunk at a time."""
        parts = [
            self.log_probs(i, temperature).gather(-1, token.unsqueeze(-1)).squeeze(-1)
            for i, token in zip(*(x.split(_chunk(self.vocabulary)) for x in (index, tokens)), strict=True)
        ]
        return torch.cat(parts)


def _chunk(vocabulary: int) -> int:
    return max(_LEAST_ROWS, _CHUNK_BYTES // (4 * vocabulary))


class ULD(Objective):
    """Universal logit distillation (arXiv 2402.12030): cross-entropy + 1.5 times the distance of sorted probabilities.

    The batch comes from a `CrossCollator`. The distance is a mean over groups, the cross-entropy a mean over labelled
    tokens, both of the whole update.

    Args:
        alignment: "bytes": groups that cover the same bytes; or "plain": the i-th predicted token with the i-th, up
            to the shorter side.
        merge: How the tokens of a group become one distribution, "observed" or "bayesian".
        temperature: Divides both logits; the distance is multiplied by its square.
        kd_weight: Weight of the distance.
        ce_weight: Weight of the cross-entropy, at temperature 1.

    Raises:
        BadInput: an argument out of range.
    """

    needs_logits = False
    cross_vocabulary = True
    additive = True
    columns = ("groups", "teacher_labels", "teacher_groups")

    def __init__(
        self,
        *,
        alignment: Literal["bytes", "plain"] = "bytes",
        merge: Merge = "observed",
        temperature: float = 1.0,
        kd_weight: float = 1.5,
        ce_weight: float = 1.0,
    ):
        super().__init__()
        for name, value, known in (
            ("alignment", alignment, ("bytes", "plain")), ("merge", merge, ("observed", "bayesian")),
        ):  # fmt: skip
            if value not in known:
                raise BadInput(name, value, "is not known", f'use "{known[0]}" or "{known[1]}"')
        if not 0 < temperature < math.inf:
            raise BadInput("temperature", temperature, "is not positive", "give a number above 0")
        if not 0 < kd_weight < math.inf or not 0 <= ce_weight < math.inf:
            weights = f"{kd_weight}, ce_weight = {ce_weight}"
            raise BadInput("kd_weight", weights, "are not weights", "give numbers above 0 and from 0 up")
        self.alignment, self.merge, self.temperature = alignment, merge, temperature
        self.kd_weight, self.ce_weight = kd_weight, ce_weight

    def between(self, log_q: Tensor, log_p: Tensor) -> dict[str, Tensor]:
        """What two merged distributions, as log-probabilities `[n, V]` and `[n, V']`, cost: "kd" and parts, `[n]`."""
        return {"kd": uld_terms(log_q, log_p)}

    def sides(self, batch: Mapping[str, Any]) -> tuple[Side, Side]:
        """The rows that meet, see `pair_rows`."""
        labels, theirs = batch["labels"], batch["teacher_labels"]
        if self.alignment == "bytes":
            return pair_rows(labels, batch["groups"], theirs, batch["teacher_groups"], self.merge)
        order = [((x != IGNORED).cumsum(1) - 1).masked_fill(x == IGNORED, -1) for x in (labels, theirs)]
        return pair_rows(labels, order[0], theirs, order[1], self.merge)

    def totals(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The number of groups."""
        ours, _ = self.sides(batch)
        return {"aligned": torch.tensor(len(ours.base), device=ours.group.device)}

    def setup(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> None:
        """Refuse a teacher that cannot be read in its own tokens."""
        if teacher is None or teacher.sparse is not None:
            raise NotApplicable(
                "teacher",
                "stored top-k",
                "is in the student's tokens",
                "use a teacher model and CrossCollator",
            )

    def forward(self, student: Signal, teacher: Signal | None, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        self.setup(student, teacher, batch)
        assert teacher is not None
        ours, theirs = self.sides(batch)
        rows, reference = _Rows(student, ours.where), _Rows(teacher, theirs.where)
        partner = torch.full_like(ours.group, -1).scatter(0, ours.base, theirs.base)
        with torch.no_grad():
            factors = [_factors(r, side, self.temperature) for r, side in ((rows, ours), (reference, theirs))]
            slopes = self._slopes(rows, reference, ours, partner, factors)
        items, aligned = batch.get("items"), batch.get("aligned")
        items = at_least_one(len(ours.group) if items is None else items)
        aligned = at_least_one(len(ours.base) if aligned is None else aligned)

        def terms(logits: Tensor, _: None, **columns: Tensor) -> dict[str, Tensor]:
            return self._terms(logits, reference, items=items, aligned=aligned, **columns)

        columns = {
            "labels": ours.tokens, "group": ours.group, "partner": partner, "slope": slopes,
            "ours": factors[0][ours.group] if len(factors[0]) else slopes,
            "theirs": factors[1][ours.group] if len(factors[1]) else slopes,
        }  # fmt: skip
        if rows.head is not None:
            return fused_sums(terms, rows.values, rows.head, columns=columns, chunk_bytes=_CHUNK_BYTES)
        return _sums(terms, rows.values, columns)

    def _terms(
        self, logits: Tensor, reference: _Rows, *, labels: Tensor, group: Tensor, partner: Tensor,
        slope: Tensor, ours: Tensor, theirs: Tensor, items: Any, aligned: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of a chunk of labelled tokens: where one carries a group's distribution, the group; each one's own CE."""
        found: dict[str, Tensor] = {}
        log_q = torch.log_softmax(logits / self.temperature, dim=-1)
        base = (partner >= 0).nonzero().squeeze(-1)
        merged = self._merged(log_q[base], ours[base], reference, partner[base], theirs[base])
        scale = self.temperature**2 / aligned
        for name, value in merged.items():
            found[name] = torch.zeros_like(ours, dtype=value.dtype).index_add(0, base, value * scale)
        # What a factor does to its group's distance: no value of its own, the right gradient.
        own = log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        found["kd"] = found["kd"] + slope * torch.where(slope != 0, own - own.detach(), 0.0) * scale
        total = self.kd_weight * found["kd"]
        if self.ce_weight:
            found["ce"] = nn.functional.cross_entropy(logits, labels, reduction="none") / items
            total = total + self.ce_weight * found["ce"]
        return {"loss": total, **found}

    def _merged(
        self, log_q: Tensor, ours: Tensor, reference: _Rows, partner: Tensor, theirs: Tensor
    ) -> dict[str, Tensor]:
        log_p = reference.log_probs(partner, self.temperature).detach().to(log_q.dtype)
        return self.between(log_q + ours.unsqueeze(-1), log_p + theirs.unsqueeze(-1))

    def _slopes(
        self, rows: _Rows, reference: _Rows, ours: Side, partner: Tensor, factors: list[Tensor]
    ) -> Tensor:
        """For each token that is a factor: the derivative of its group's distance by its log-probability."""
        slopes = torch.zeros(len(ours.group), dtype=factors[0].dtype, device=ours.group.device)
        others = ours.others
        if not len(others):
            return slopes
        by_group = torch.zeros_like(factors[0])
        for group in ours.group[others].unique().split(_chunk(max(rows.vocabulary, reference.vocabulary))):
            log_q = rows.log_probs(ours.base[group], self.temperature)
            partners, theirs = partner[ours.base[group]], factors[1][group]

            def cost(factor: Tensor, log_q: Tensor = log_q, at: Any = (partners, theirs)) -> Tensor:
                return self._merged(log_q, factor, reference, *at)["kd"].sum()

            by_group[group] = torch.func.grad(cost)(factors[0][group])
        slopes[others] = by_group[ours.group[others]]
        return slopes


def _factors(rows: _Rows, side: Side, temperature: float) -> Tensor:
    """For each group, the sum of the log-probabilities of its tokens but the base, `[G]`."""
    wide = torch.promote_types(rows.values.dtype, torch.float32)
    sums = torch.zeros(len(side.base), dtype=wide, device=side.group.device)
    others = side.others
    if not len(others):
        return sums
    return sums.index_add(0, side.group[others], rows.of_tokens(others, side.tokens[others], temperature))


def _sums(
    terms: Callable[..., dict[str, Tensor]], logits: Tensor, columns: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """As `fused_sums`, from whole logits: chunks are made again in the backward pass."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    names: list[str] = []

    def piece(rows: Tensor, cut: dict[str, Tensor]) -> Tensor:
        found = terms(rows.to(wide), None, **cut)
        names[:] = found
        return torch.stack([value.sum() for value in found.values()])

    size = _chunk(logits.shape[-1])
    total: Any = 0.0
    for start in range(0, max(len(logits), 1), size):
        cut = {name: column[start : start + size] for name, column in columns.items()}
        total = total + checkpoint(piece, logits[start : start + size], cut, use_reentrant=False)
    return {
        name: value if name == "loss" else value.detach() for name, value in zip(names, total, strict=True)
    }


class HybridULD(ULD):
    """GOLD's hybrid: tokens that are the same string in both vocabularies by JSD, the others by sorted distance.

    Args:
        vocabulary: The ids of the shared tokens, student's and teacher's, int `[k]` each; None to find them from the
            two tokenizers that `Distiller` is given (`processing_class`, `teacher_tokenizer`).
        by: What makes two tokens one, where they are found from the tokenizers: "text", the bytes they stand for, so
            that a space is a space however a vocabulary writes it; or "piece", the vocabularies' own spelling, as TRL
            pairs them.
        beta: Weight of the teacher in JSD's mixture. At 0 and 1, forward and reverse KL, which over a part of the
            vocabulary may fall below zero.
        shared_weight: Weight of the shared tokens; None for their share of the teacher's vocabulary.
        other_weight: Weight of the others; None for the rest to 1.
        alignment: As for `ULD`, like the following.
        merge: "observed" or "bayesian".
        temperature: Divides both logits.
        kd_weight: Weight of the two parts together.
        ce_weight: Weight of the cross-entropy.

    Raises:
        BadInput: an argument out of range, or one weight without the other.
    """

    ours: Tensor
    theirs: Tensor

    def __init__(
        self,
        *,
        vocabulary: tuple[Sequence[int], Sequence[int]] | None = None,
        by: Literal["text", "piece"] = "text",
        beta: float = 0.5,
        shared_weight: float | None = None,
        other_weight: float | None = None,
        alignment: Literal["bytes", "plain"] = "bytes",
        merge: Merge = "observed",
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
    ):
        super().__init__(
            alignment=alignment,
            merge=merge,
            temperature=temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
        )
        if by not in ("text", "piece"):
            raise BadInput("by", by, "is not known", 'use "text" or "piece"')
        if not 0.0 <= beta <= 1.0:
            raise BadInput("beta", beta, "is not between 0 and 1", "give a share")
        if (shared_weight is None) != (other_weight is None):
            weights = f"{shared_weight}, other_weight = {other_weight}"
            raise BadInput("shared_weight", weights, "are one weight of two", "give both, or neither")
        self.beta, self.shared_weight, self.other_weight = beta, shared_weight, other_weight
        self.given, self.by = vocabulary is not None, by
        for name, ids in zip(("ours", "theirs"), vocabulary or ((), ()), strict=True):
            self.register_buffer(name, torch.as_tensor(ids, dtype=torch.long), persistent=False)
        if len(self.ours) != len(self.theirs):
            sizes = f"{len(self.ours)} and {len(self.theirs)} ids"
            raise BadInput("vocabulary", sizes, "are not pairs", "give one list as long as the other")

    def prepare(
        self, student: nn.Module, teachers: Sequence[nn.Module], tokenizer: Any = None, theirs: Any = None
    ) -> None:
        """Find the shared tokens.

        Raises:
            BadInput: neither the ids nor the tokenizers are given.
        """
        if self.given:
            return
        if tokenizer is None or theirs is None:
            remedy = "pass processing_class and teacher_tokenizer to Distiller, or the ids"
            raise BadInput("vocabulary", None, "cannot be found without the tokenizers", remedy)
        pairs = shared_vocabulary(tokenizer, theirs, by=self.by)
        self.ours, self.theirs = (torch.from_numpy(ids) for ids in pairs)

    def between(self, log_q: Tensor, log_p: Tensor) -> dict[str, Tensor]:
        ours, theirs = (ids.to(log_q.device) for ids in (self.ours, self.theirs))
        shared, other = hybrid_terms(log_q, log_p, ours, theirs, self.beta)
        share = len(theirs) / log_p.shape[-1]
        first = share if self.shared_weight is None else self.shared_weight
        second = 1.0 - share if self.other_weight is None else self.other_weight
        return {"kd": first * shared + second * other, "shared": shared, "other": other}
