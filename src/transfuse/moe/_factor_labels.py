"""What FactorLLM's routers learn from: labels made by the frozen block, and the losses on them."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_positive
from transfuse.moe._base import flat_mask

__all__ = [
    "LABELS",
    "TARGETS",
    "Label",
    "Target",
    "balance_loss",
    "check_subsets",
    "individual_labels",
    "par_loss",
    "router_loss",
    "subset_labels",
]

MOST_SUBSETS = 20_000
LABELS = ("subset", "individual")
TARGETS = ("kl", "bce")

Label = Literal["subset", "individual"]
Target = Literal["kl", "bce"]


def individual_labels(outputs: Tensor, dense: Tensor, k: int) -> Tensor:
    """The k experts that are each nearest to a share K/E of the dense output (the paper's labels).

    Args:
        outputs: `[T, E, d]`, what each expert says.
        dense: `[T, d]`, what the block says.
        k: Experts per token.

    Returns:
        float32 `[T, E]` of zeros and ones, k ones per row.

    Raises:
        BadInput: k is not from 1 to E.
    """
    _check_k(k, outputs.shape[1])
    share = k / outputs.shape[1]
    errors = (outputs.float() - share * dense.float()[:, None]).square().mean(-1)
    return torch.zeros_like(errors).scatter(1, errors.topk(k, largest=False).indices, 1.0)


@functools.cache
def _subsets(experts: int, k: int) -> Tensor:
    """All sets of k experts as zeros and ones, `[C(E, k), E]`."""
    rows = torch.zeros(math.comb(experts, k), experts)
    for row, chosen in zip(rows, itertools.combinations(range(experts), k), strict=True):
        row[list(chosen)] = 1.0
    return rows


def subset_labels(outputs: Tensor, dense: Tensor, k: int) -> Tensor:
    """The k experts whose scaled sum is nearest to the dense output, of all sets of k.

    With s = E/k, G the Gram matrix of the outputs and b their products with the dense output, the error of a set C is
    `s^2 sum over i, j in C of G_ij - 2 s sum over j in C of b_j` and a constant. Of sets that are equally near, the
    first counts. At k = E/2 every set is as near as its complement while the experts are still slices of the block,
    and without that rule rounding would make the labels.

    Args:
        outputs: `[T, E, d]`.
        dense: `[T, d]`.
        k: Experts per token; C(E, k) is at most 20,000.

    Returns:
        float32 `[T, E]` of zeros and ones, k ones per row.

    Raises:
        BadInput: there are too many sets, or k is not from 1 to E.
    """
    experts = outputs.shape[1]
    _check_k(k, experts)
    check_subsets(experts, k)
    y, target = outputs.float(), dense.float()
    scale = experts / k
    sets = _subsets(experts, k).to(y.device)
    gram = torch.einsum("tid,tjd->tij", y, y).flatten(1)
    inner = torch.einsum("tid,td->ti", y, target)
    pairs = (sets[:, :, None] * sets[:, None, :]).flatten(1)
    labels = []
    for some, product in zip(gram.split(1024), inner.split(1024), strict=True):
        errors = scale**2 * some @ pairs.T - 2 * scale * product @ sets.T
        slack = 1e-5 * scale**2 * k * some.abs().amax(1, keepdim=True)
        nearest = errors <= errors.amin(1, keepdim=True) + slack
        labels.append(sets[nearest.float().argmax(1)])  # the first of them
    return torch.cat(labels)


def check_subsets(experts: int, k: int) -> None:
    """Refuse more sets of k experts than can be tried.

    Raises:
        BadInput: there are.
    """
    check_positive(experts=experts, top_k=k)
    if math.comb(experts, k) > MOST_SUBSETS:
        problem = f"has {math.comb(experts, k):,} sets of {k}, more than {MOST_SUBSETS:,}"
        raise BadInput("experts", experts, problem, 'use label="individual"')


def router_loss(
    logits: Tensor, labels: Tensor, *, target: Target = "kl", mask: Tensor | None = None
) -> Tensor:
    """How far a router is from its labels, in nats, mean over tokens.

    Args:
        logits: `[T, E]` of the router.
        labels: `[T, E]` of zeros and ones.
        target: "kl" is KL(p || q) with p the router's and q the labels' softmax, both clipped to [1e-7, 1 - 1e-7];
            "bce" the binary cross-entropy of each expert, summed over experts.
        mask: bool `[T]`, the tokens that count; None for all.

    Raises:
        BadInput: an unknown target, or a mask of other tokens.
    """
    _check_known("target", target, TARGETS)
    if target == "kl":
        p, q = (t.float().softmax(-1).clamp(1e-7, 1 - 1e-7) for t in (logits, labels))
        each = (p * (p / q).log()).sum(-1)
    else:
        every = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        each = every.sum(-1)
    return _mean(each, mask)


def par_loss(
    router_logits: Tensor,
    expert_outputs: Tensor,
    dense_output: Tensor,
    k: int,
    *,
    label: Label = "individual",
    target: Target = "kl",
    mask: Tensor | None = None,
) -> Tensor:
    """The prior-approximate loss L_PA of one layer.

    Args:
        router_logits: `[T, E]`.
        expert_outputs: `[T, E, d]`.
        dense_output: `[T, d]`.
        k: Experts per token.
        label: See `individual_labels` and `subset_labels`.
        target: See `router_loss`.
        mask: bool `[T]`, the tokens that count; None for all.

    Raises:
        BadInput: an unknown label or target, k not from 1 to E, or a mask of other tokens.
    """
    _check_known("label", label, LABELS)
    _check_known("target", target, TARGETS)
    make = subset_labels if label == "subset" else individual_labels
    labels = make(expert_outputs.detach(), dense_output.detach(), k)
    return router_loss(router_logits, labels, target=target, mask=mask)


def balance_loss(logits: Tensor, k: int, *, mask: Tensor | None = None) -> Tensor:
    """L_B: mean over tokens and experts of the probability of those chosen.

    Args:
        logits: `[T, E]`.
        k: Experts per token.
        mask: bool `[T]`, the tokens that count; None for all.

    Raises:
        BadInput: k is not from 1 to E, or a mask of other tokens.
    """
    _check_k(k, logits.shape[-1])
    p = logits.float().softmax(-1)
    return _mean(p.topk(k).values.sum(-1) / p.shape[-1], mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    kept = flat_mask(mask, values.numel(), values.device)
    return (values * kept).sum() / kept.sum().clamp_min(1)


def _check_k(k: int, experts: int) -> None:
    check_positive(k=k)
    if k > experts:
        raise BadInput("k", k, f"is more than the {experts} experts", "choose at most all of them")


def _check_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInput(name, value, "is not known", f"use one of {', '.join(known)}")
