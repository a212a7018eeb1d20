"""Where a transformers mixture-of-experts model routes: its expert blocks, their routers and shared experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import NotApplicable
from transfuse.core.runs import evaluating
from transfuse.core.training import generator

__all__ = ["ExpertSite", "choose", "expert_sites", "shared_part"]


@dataclass(frozen=True)
class ExpertSite:
    """One expert block, as the newer models of transformers build them.

    Attributes:
        name: Of the block in the model.
        block: It has `gate` (a router that returns logits, weights, indices) and `experts` (called with tokens,
            indices and weights), and perhaps shared experts.
        top_k: Experts per token.
        num_experts: Routed experts.
        width: Length of a token's vector.
        normalise: Whether the chosen experts' weights are divided by their sum.
        scale: What they are multiplied by.
    """

    name: str
    block: Any
    top_k: int
    num_experts: int
    width: int
    normalise: bool
    scale: float


def shared_part(block: Any) -> Callable[[Tensor], Tensor] | None:
    """What every token gets from a block beside its experts, if anything."""
    mlp = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    gate = getattr(block, "shared_expert_gate", None)
    if mlp is None:
        return None
    if gate is None:
        return mlp
    return lambda x: torch.sigmoid(gate(x)) * mlp(x)


def choose(logits: Tensor, k: int, *, normalise: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k most probable experts and their weights.

    Args:
        logits: float32 `[T, N]`.
        k: Experts per token.
        normalise: Divide the weights by their sum.
        scale: What they are multiplied by.

    Returns:
        Weights float32 and indices int64, both `[T, k]`.
    """
    weights, indices = logits.softmax(-1).topk(k, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, indices


def expert_sites(model: nn.Module, *, check: bool = True) -> list[ExpertSite]:
    """The expert blocks of a model, in its order.

    Args:
        model: A transformers model.
        check: Try one block of each class on random input.

    Raises:
        NotApplicable: there is none, or one that routes by other rules than softmax and top k.
    """
    sites, tried = [], set()
    for name, block in model.named_modules():
        gate, experts = getattr(block, "gate", None), getattr(block, "experts", None)
        if not isinstance(gate, nn.Module) or not isinstance(experts, nn.Module):
            continue
        if isinstance(experts, nn.ModuleList) or not hasattr(gate, "top_k"):
            continue
        found: Any = gate
        # Mixtral's router has no such entry and always divides.
        normalise = bool(getattr(found, "norm_topk_prob", type(gate).__name__.startswith("Mixtral")))
        scale = float(getattr(found, "routed_scaling_factor", 1.0))
        experts_count, width = (int(size) for size in found.weight.shape)
        site = ExpertSite(name, block, int(found.top_k), experts_count, width, normalise, scale)
        if check and type(block) not in tried and not _routes_so(site):
            problem = f"({type(block).__name__}) does not route by softmax and top k alone"
            raise NotApplicable(
                "model", name, problem, "give a Mixtral-, Qwen-MoE-, OLMoE- or DeepSeek-V2-like model"
            )
        tried.add(type(block))
        sites.append(site)
    if not sites:
        problem = "has no block of experts"
        raise NotApplicable(
            "model", type(model).__name__, problem, "give a mixture-of-experts model of transformers"
        )
    return sites


@torch.no_grad()
def _routes_so(site: ExpertSite) -> bool:
    """Whether the block's output is what this module thinks it is, on random tokens."""
    block, weight = site.block, site.block.gate.weight
    x = torch.randn(16, site.width, generator=generator(0)).to(weight.device, weight.dtype)
    try:
        with evaluating(block):
            logits = nn.functional.linear(x.float(), weight.float())
            weights, indices = choose(logits, site.top_k, normalise=site.normalise, scale=site.scale)
            ours = block.experts(x, indices, weights.to(x.dtype))
            shared = shared_part(block)
            if shared is not None:
                ours = ours + shared(x)
            theirs = block(x[None])[0]
            far = (ours - theirs).float().norm(dim=-1) > 0.05 * theirs.float().norm(dim=-1) + 1e-12
            return bool(far.float().mean() <= 0.25)  # in half precision a close call may go the other way
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
