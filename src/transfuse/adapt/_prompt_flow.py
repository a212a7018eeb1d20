"""Prompts of two encoders that refine each other: proxies per layer, and a mapper in each direction."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_number, check_positive
from transfuse.core.training import generator, seeded

__all__ = ["CrossModalPromptLearner", "Flow", "HiCroPLConfig", "KnowledgeMapper", "LayerKnowledgeProxy"]

Flow = Literal["differentiable", "inplace", "independent"]
"""Where mapped prompts go: into this pass; over the parameters (the released code); nowhere, no prompt is mapped."""


@dataclass(frozen=True, kw_only=True)
class HiCroPLConfig:
    """Sizes and weights of the method.

    Attributes:
        n_ctx: Context tokens per layer and encoder, n.
        depth: Layers with prompts of their own, D.
        cross_layer: First layer whose text prompts are refined by visual ones, K; below it text refines vision.
        distill_weight: Weight of staying near the frozen features, lambda.
        heads: Attention heads of proxies and mappers.
        flow: See `Flow`.
    """

    n_ctx: int = 16
    depth: int = 12
    cross_layer: int = 6
    distill_weight: float = 12.0
    heads: int = 8
    flow: Flow = "differentiable"

    def check(self, text_width: int, vision_width: int, blocks: int) -> None:
        """Refuse what does not fit encoders of these widths and, the shallower of both, this many blocks.

        Raises:
            BadInput: a field out of range, named.
        """
        check_positive(n_ctx=self.n_ctx, heads=self.heads, depth=self.depth, cross_layer=self.cross_layer)
        check_number("distill_weight", self.distill_weight, zero=True)
        if self.depth > blocks:
            problem = f"is more than the {blocks} blocks of the shallower encoder"
            raise BadInput("depth", self.depth, problem, f"give at most {blocks}")
        if not 1 <= self.cross_layer < self.depth:
            problem = f"is not in [1, {self.depth - 1}], depth being {self.depth}"
            raise BadInput("cross_layer", self.cross_layer, problem, "give a layer between")
        if self.flow not in ("differentiable", "inplace", "independent"):
            remedy = "use differentiable, inplace or independent"
            raise BadInput("flow", self.flow, "is not known", remedy)
        for width in (text_width, vision_width):
            if width % self.heads:
                remedy = "give a divisor of both encoders' widths"
                raise BadInput("heads", self.heads, f"does not divide the width {width}", remedy)


class LayerKnowledgeProxy(nn.Module):
    """One token that sums up a layer's prompts: s' = ln2(s + MHA(ln1(s), ln1(P), ln1(P))).

    Parameters are named as in the released code.

    Args:
        width: d.
        heads: Of the attention; divides d.
    """

    def __init__(self, width: int, heads: int = 8):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, proxy: Tensor, prompts: Tensor) -> Tensor:
        """`proxy` `[1, d]` and `prompts` `[n, d]` to `[1, d]`."""
        seen = self.ln_1(prompts)
        found: Tensor = proxy + self.attn(self.ln_1(proxy), seen, seen, need_weights=False)[0]
        return self.ln_2(found)


class _QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class KnowledgeMapper(nn.Module):
    """Prompts of one encoder that look at the proxies of the other.

        Q, K, V = Wq q, Wk kv, Wv kv;   u = Q + MHA(ln1(Q), ln1(K), ln1(V));   out = u + FFN(ln2(u))

    with FFN from width a to 4 a and back, QuickGELU between. Parameters are named as in the released code.

    Args:
        width: a, of the queries and the output.
        source: b, of the proxies.
        heads: Of the attention; divides a.
    """

    def __init__(self, width: int, source: int, heads: int = 8):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.linear_q = nn.Linear(width, width)
        self.linear_k, self.linear_v = nn.Linear(source, width), nn.Linear(source, width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        parts: list[tuple[str, nn.Module]] = [
            ("c_fc", nn.Linear(width, 4 * width)), ("gelu", _QuickGELU()), ("c_proj", nn.Linear(4 * width, width)),
        ]  # fmt: skip
        self.ffn = nn.Sequential(OrderedDict(parts))

    def forward(self, queries: Tensor, proxies: Tensor) -> Tensor:
        """`queries` `[m, a]` and `proxies` `[k, b]` to `[m, a]`."""
        q, k, v = self.linear_q(queries), self.linear_k(proxies), self.linear_v(proxies)
        mixed: Tensor = q + self.attn(self.ln_1(q), self.ln_1(k), self.ln_1(v), need_weights=False)[0]
        return mixed + self.ffn(self.ln_2(mixed))


class CrossModalPromptLearner(nn.Module):
    """Prompts of both encoders for layers 0 to D - 1, and what lets them refine each other.

        V_l <- M_t2v(V_0 .. V_{K-1};  proxies of P_0 .. P_{K-1})          for l < K
        P_l <- M_v2t(P_K .. P_{D-1};  proxies of V_K .. V_{D-1})          for l >= K

    Every query sees the proxies of all layers of its stage. Everything is float32 whatever the encoders are.

    Args:
        config: Sizes.
        text_width: Of the text encoder's hidden states.
        vision_width: Of the vision encoder's.
        first: P_0 to start from, `[n, text width]`; None draws it like the others, N(0, 0.02). Proxies start N(0, 1).
        seed: Of all initial values.
    """

    def __init__(
        self,
        config: HiCroPLConfig,
        text_width: int,
        vision_width: int,
        *,
        first: Tensor | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.config = config
        random = generator(seed)
        crossed, depth, heads = config.cross_layer, config.depth, config.heads

        def drawn(count: int, rows: int, width: int, deviation: float) -> nn.ParameterList:
            some = (torch.randn(rows, width, generator=random) * deviation for _ in range(count))
            return nn.ParameterList([nn.Parameter(tensor) for tensor in some])

        self.text_prompts = drawn(depth, config.n_ctx, text_width, 0.02)
        self.visual_prompts = drawn(depth, config.n_ctx, vision_width, 0.02)
        self.text_proxies = drawn(crossed, 1, text_width, 1.0)
        self.visual_proxies = drawn(depth - crossed, 1, vision_width, 1.0)
        if first is not None:
            self.text_prompts[0] = nn.Parameter(first.detach().float().clone())
        with seeded(seed):
            self.text_lkps = nn.ModuleList(LayerKnowledgeProxy(text_width, heads) for _ in range(crossed))
            self.visual_lkps = nn.ModuleList(
                LayerKnowledgeProxy(vision_width, heads) for _ in range(depth - crossed)
            )
            self.text_to_vision = KnowledgeMapper(vision_width, text_width, heads)
            self.vision_to_text = KnowledgeMapper(text_width, vision_width, heads)

    def mapped(self) -> tuple[Tensor, Tensor]:
        """Refined visual prompts `[K, n, vision width]` and refined text prompts `[D - K, n, text width]`."""
        n, crossed = self.config.n_ctx, self.config.cross_layer
        text, vision = list(self.text_prompts), list(self.visual_prompts)
        early = [f(s, p) for f, s, p in zip(self.text_lkps, self.text_proxies, text[:crossed], strict=True)]
        late = [
            f(s, p) for f, s, p in zip(self.visual_lkps, self.visual_proxies, vision[crossed:], strict=True)
        ]
        seen = self.text_to_vision(torch.cat(vision[:crossed]), torch.cat(early))
        said = self.vision_to_text(torch.cat(text[crossed:]), torch.cat(late))
        return seen.unflatten(0, (crossed, n)), said.unflatten(0, (-1, n))

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Text and visual prompts of every layer, D tensors `[n, width]` each.

        With `flow="inplace"` the mapped prompts replace the parameters they came from, at every call: mappers and
        proxies get no gradient, and two calls differ.
        """
        crossed = self.config.cross_layer
        if self.config.flow == "differentiable":
            seen, said = self.mapped()
            return [*self.text_prompts[:crossed], *said], [*seen, *self.visual_prompts[crossed:]]
        if self.config.flow == "inplace":
            with torch.no_grad():
                seen, said = self.mapped()
                for parameter, new in zip(self.visual_prompts[:crossed], seen, strict=True):
                    parameter.copy_(new)
                for parameter, new in zip(self.text_prompts[crossed:], said, strict=True):
                    parameter.copy_(new)
        return list(self.text_prompts), list(self.visual_prompts)
