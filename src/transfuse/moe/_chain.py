"""The arithmetic of a chain of experts: its rounds, their balance, and what can be read off its decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_positive
from transfuse.moe._base import Routing
from transfuse.moe._experts import choose

__all__ = [
    "asymmetry",
    "chain",
    "coactivation",
    "combination_gain",
    "concentration",
    "expert_flops",
    "sequence_balance",
    "steps_of",
]


def chain(
    x: Tensor,
    routers: Sequence[Tensor],
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    k: int,
    shared: Callable[[Tensor], Tensor] | None = None,
    residual: bool = True,
    fixed: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, list[Routing]]:
    """Run tokens through the rounds of a chain.

    Args:
        x: `[T, d]`.
        routers: One matrix `[N, d]` per round.
        experts: Called with tokens `[T, d]`, indices `[T, k]` and weights `[T, k]`; returns the weighted sum `[T, d]`.
        k: Experts per token and round.
        shared: What every token gets in every round.
        residual: Add each round's input to its output.
        fixed: Use the first round's choice and weights in all rounds.
        normalise: Divide the weights of the chosen experts by their sum.
        scale: What the weights are multiplied by.

    Returns:
        `[T, d]`, and the decision of each round.
    """
    decisions: list[Routing] = []
    for router in routers:
        if not (fixed and decisions):
            with torch.autocast(x.device.type, enabled=False):
                logits = nn.functional.linear(x.float(), router.float())
                weights, indices = choose(logits, k, normalise=normalise, scale=scale)
            decision = Routing(logits, indices, weights)
        y = experts(x, decision.indices, decision.weights.to(x.dtype))
        if shared is not None:
            y = y + shared(x)
        x = y + x if residual else y
        decisions.append(decision)
    return x, decisions


def sequence_balance(probabilities: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """The balance term of one round, without its weight: 1 for even routing, more the less even it is.

    Args:
        probabilities: `[B, S, N]`.
        indices: `[B, S, K]`, the experts chosen.
        mask: bool `[B, S]`; padding is not counted, and sequences of nothing else take no part. None for all.

    Returns:
        A float32 scalar.
    """
    p = probabilities.float()
    sequences, _, experts = p.shape
    kept = torch.ones(p.shape[:2], device=p.device) if mask is None else mask.to(p.device).float()
    length = kept.sum(1, keepdim=True)
    slots = kept[..., None].expand(indices.shape).reshape(sequences, -1)
    counts = torch.zeros(sequences, experts, device=p.device).scatter_add(
        1, indices.reshape(sequences, -1), slots
    )
    counts = counts / (length * indices.shape[-1] / experts).clamp_min(1e-9)
    mean = (p * kept[..., None]).sum(1) / length.clamp_min(1)
    real = (length > 0).float().squeeze(1)
    return ((counts * mean).sum(1) * real).sum() / real.sum().clamp_min(1)


def steps_of(top_k: int, num_steps: int) -> int:
    """K' = K / C, experts per round at the same work.

    Raises:
        BadInput: C is below 1 or does not divide K.
    """
    check_positive(num_steps=num_steps)
    if top_k % num_steps:
        problem = f"does not divide the {top_k} experts that a token has"
        raise BadInput("num_steps", num_steps, problem, "give experts_per_step, or a divisor")
    return top_k // num_steps


def combination_gain(num_experts: int, experts_per_step: int, num_steps: int) -> float:
    """How many more combinations of experts a chain has than one choice of as many: C(N, K')^C / C(N, K'C).

    Infinite where a float cannot hold it.

    Raises:
        BadInput: more experts are chosen than there are.
    """
    check_positive(num_experts=num_experts, experts_per_step=experts_per_step, num_steps=num_steps)
    if experts_per_step * num_steps > num_experts:
        problem = f"times {num_steps} is more than {num_experts} experts"
        raise BadInput("experts_per_step", experts_per_step, problem, "choose fewer")
    chained = math.comb(num_experts, experts_per_step) ** num_steps
    try:
        return chained / math.comb(num_experts, experts_per_step * num_steps)
    except OverflowError:
        return math.inf


def expert_flops(
    *, width: int, inner: int, num_experts: int, experts_per_step: int, num_steps: int, shared: int = 0
) -> dict[str, int]:
    """Multiplications and additions per token in a block of gated experts.

    Args:
        width: d.
        inner: f, neurons of an expert.
        num_experts: N.
        experts_per_step: K'.
        num_steps: C.
        shared: Shared experts of the same size.

    Returns:
        `experts`, `shared` and `routers`, over all rounds.
    """
    one = 6 * width * inner
    return {
        "experts": num_steps * experts_per_step * one,
        "shared": num_steps * shared * one,
        "routers": num_steps * 2 * num_experts * width,
    }


def coactivation(first: Tensor, second: Tensor, num_experts: int) -> Tensor:
    """Tokens whose first round used expert i and whose second used j.

    Args:
        first: int64 `[T, K]`.
        second: int64 `[T, K]`.
        num_experts: N.

    Returns:
        int64 `[N, N]`.
    """
    one, two = (
        torch.zeros(len(indices), num_experts, device=indices.device).scatter(1, indices, 1.0)
        for indices in (first, second)
    )
    return (one.T @ two).round().long()


def asymmetry(counts: Tensor) -> float:
    """Share of a co-activation matrix that is not matched by its transpose, from 0 to 1."""
    a = counts.double()
    return float((a - a.T).abs().sum() / (2 * a.sum()).clamp_min(1))


def concentration(counts: Tensor) -> float:
    """How far co-activation is from uniform: 1 - entropy / log N^2, 0 for uniform, 1 for a single pair.

    Raises:
        BadInput: nothing was counted, or there is one expert only.
    """
    if counts.numel() < 2 or not float(counts.sum()) > 0:
        problem = "has no pairs to compare"
        raise BadInput("counts", tuple(counts.shape), problem, "count two rounds: coactivation(...)")
    p = counts.double().flatten() / counts.sum()
    return 1 - float(-torch.special.xlogy(p, p).sum() / math.log(p.numel()))
