"""Chain-of-Experts: experts of one layer work one after another, each round newly routed.

:arxiv: 2506.18945
:moves: what some experts computed -> other experts of the same layer
:access: weights, training data
:reversible: no
:context: no

A block of experts runs C rounds. Each round routes the result of the one before by a router of its own and adds what
the chosen experts, and the shared one, make of it; experts are the same in every round:

    s_t    = softmax(R_t x_{t-1})                                    in float32, x_0 the block's input
    x_t    = sum over the K' largest of s_tk E_k(x_{t-1}) + shared(x_{t-1}) + x_{t-1},    t = 1 ... C
    result = x_C

With K' = K/C the experts' work per token is that of a plain block which chooses K; C = 1 is the plain block. The
number of ways to combine experts grows from C(N, K) to C(N, K')^C.

The result replaces the residual stream: h = x + attention(norm(x)), z = norm'(h), and the layer returns the chain on
z, without h. This is the released code's placement (`residual="inner"`), also for its plain baseline. "outer" returns
h plus a chain without inner residuals, which is the usual place of a block; "both" has the two. A pretrained model
loses its residual stream under "inner", so `convert` warns there: this is an architecture to be trained.

Weights of the chosen experts are their probabilities, not divided by their sum, as in the released code. They shrink
as N grows, and that is part of the recipe; `gates="model"` keeps the model's own rule instead.

Balance, per round and sequence b of S tokens, summed over rounds and layers and weighted by alpha:

    L_t = mean over b of sum over i of c[b, i] p[b, i]
          with c the (token, slot) pairs that use i, over S K'/N, and p the mean of s_t

The code slips it into the gradient and reports the loss without it; here `loss` adds it, which gives the same
gradient. Padding is left out of both factors. Ablations: `routers="shared"` (one router, asked anew in every round, as
in the code), `routers="fixed"` (its first answer is used throughout, as in the paper's equation 8).

Blocks are those of transformers: experts keep their weights and their fast grouped products.

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", ...))
    method = ChainOfExperts(num_steps=2, first_router="draw")
    method.convert(model)
    fit(model, rows, loss=method.loss, lr=3e-4, max_steps=1000, warmup=0.1, schedule="constant")
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.runs import check_positive
from transfuse.core.training import seeded
from transfuse.moe._base import Conversion, Latest, flat_mask
from transfuse.moe._chain import (
    asymmetry,
    chain,
    coactivation,
    combination_gain,
    concentration,
    expert_flops,
    sequence_balance,
    steps_of,
)
from transfuse.moe._experts import ExpertSite, expert_sites, shared_part

__all__ = [
    "ChainBlock",
    "ChainOfExperts",
    "asymmetry",
    "chain",
    "coactivation",
    "combination_gain",
    "concentration",
    "expert_flops",
    "sequence_balance",
    "steps_of",
]

Residual = Literal["inner", "outer", "both"]
Routers = Literal["independent", "shared", "fixed"]

CHOICES = {
    "residual": ("inner", "outer", "both"),
    "routers": ("independent", "shared", "fixed"),
    "gates": ("softmax", "model"),
    "first_router": ("keep", "draw"),
}
LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


# --- the block ---------------------------------------------------------------------------------------------


class ChainBlock(nn.Module):
    """A block of experts that runs in rounds; takes over the modules of the block it replaces.

    Args:
        site: That block.
        method: The settings.
        k: Experts per token and round.
    """

    def __init__(self, site: ExpertSite, method: ChainOfExperts, k: int):
        super().__init__()
        for name, module in site.block.named_children():
            if name != "gate":
                self.add_module(name, module)
        count = method.num_steps if method.routers == "independent" else 1
        like = site.block.gate.weight
        self.routers = nn.ParameterList(nn.Parameter(torch.empty_like(like)) for _ in range(count))
        self.k, self.rounds, self.fixed = k, method.num_steps, method.routers == "fixed"
        self.inner = method.residual != "outer"
        self.normalise, self.scale = site.normalise, site.scale
        if method.gates == "softmax":
            self.normalise, self.scale = False, 1.0
        self.latest, self.shape = Latest(), torch.Size()

    def draw(self, first: Tensor | None, seed: int) -> None:
        """Draw the routers (Kaiming uniform, a = sqrt 5), or take the first as given."""
        with seeded(seed), torch.no_grad():
            for router in self.routers:
                nn.init.kaiming_uniform_(router, a=math.sqrt(5))
            if first is not None:
                self.routers[0].copy_(first)

    def forward(self, hidden_states: Tensor) -> Tensor:
        matrices = list(self.routers)
        y, decisions = chain(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            matrices if len(matrices) == self.rounds else matrices * self.rounds,
            self.get_submodule("experts"),
            k=self.k,
            shared=shared_part(self),
            residual=self.inner,
            fixed=self.fixed,
            normalise=self.normalise,
            scale=self.scale,
        )
        self.latest[:], self.shape = decisions, hidden_states.shape[:-1]
        return y.view(hidden_states.shape)


class _ChainLayer:
    """A decoder layer that returns its block's output without the residual stream around it."""

    def forward(self: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **arguments)
        return self.mlp(self.post_attention_layernorm(hidden_states + attended))


class ChainOfExperts(Conversion):
    """Let the experts of each block of a mixture-of-experts model run in rounds.

    Args:
        num_steps: C, rounds.
        experts_per_step: K', experts per token and round; None divides the model's K by C, for the same work.
        routers: "independent", one per round; "shared", one for all; "fixed", its first choice for all.
        residual: Where the input is added: "inner" (to every round; the layer's own is dropped), "outer" (around the
            chain, as the layer does) or "both".
        gates: Weights of the chosen experts: "softmax", their probabilities as they are, or the "model"'s own rule.
        first_router: "keep" the model's router for the first round, or "draw" that one too.
        balance: alpha, weight of the balance term.
        seed: Of the routers that are drawn.
    """

    slug: ClassVar[str] = "chain-of-experts"

    def __init__(
        self,
        *,
        num_steps: int = 2,
        experts_per_step: int | None = None,
        routers: Routers = "independent",
        residual: Residual = "inner",
        gates: Literal["softmax", "model"] = "softmax",
        first_router: Literal["keep", "draw"] = "keep",
        balance: float = 1e-3,
        seed: int = 0,
    ):
        self.num_steps, self.experts_per_step, self.routers = num_steps, experts_per_step, routers
        self.residual, self.gates, self.first_router = residual, gates, first_router
        self.balance, self.seed = balance, seed

    def install(self, model: Any, *, fresh: bool) -> None:
        """Replace every expert block by a `ChainBlock`."""
        check_positive(num_steps=self.num_steps, experts_per_step=self.experts_per_step)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BadInput(name, getattr(self, name), "is not known", f"use one of {', '.join(known)}")
        if not self.balance >= 0:
            raise BadInput("balance", self.balance, "is negative", "give 0 or more")
        sites = expert_sites(model, check=fresh)
        counts = []
        for site in sites:
            k = self.experts_per_step or steps_of(site.top_k, self.num_steps)
            if k > site.num_experts:
                problem = f"is more than the {site.num_experts} experts of {site.name}"
                raise BadInput("experts_per_step", k, problem, "choose fewer")
            layer = model.get_submodule(site.name.rpartition(".")[0])
            if self.residual == "inner" and (
                not all(hasattr(layer, part) for part in LAYER) or layer.mlp is not site.block
            ):
                problem = f"is in a layer of another form ({type(layer).__name__})"
                raise NotApplicable("model", site.name, problem, 'use residual="outer"')
            counts.append(k)
        if fresh and self.residual == "inner" and model.config._name_or_path:
            warnings.warn(
                'residual="inner" drops the residual stream that a pretrained model was trained with; '
                'train it, or use residual="outer"',
                stacklevel=3,
            )
        for number, (site, k) in enumerate(zip(sites, counts, strict=True)):
            block = ChainBlock(site, self, k).train(site.block.training)
            if fresh:
                block.draw(
                    site.block.gate.weight if self.first_router == "keep" else None, self.seed + number
                )
            parent, _, child = site.name.rpartition(".")
            layer = model.get_submodule(parent)
            setattr(layer, child, block)
            if self.residual == "inner":
                kind = type(layer)
                layer.__class__ = type(f"Chain{kind.__name__}", (_ChainLayer, kind), {})

    def auxiliary(self, model: Any, mask: Tensor | None = None) -> Tensor:
        """The weighted sum of the balance terms of all rounds and blocks."""
        total = super().auxiliary(model)
        for block in model.modules():
            if isinstance(block, ChainBlock) and block.latest:
                kept = flat_mask(mask, block.shape.numel(), total.device).view(block.shape)
                rounds = block.latest[:1] if block.fixed else block.latest
                for step in rounds:
                    p, chosen = (t.view(*block.shape, -1) for t in (step.probabilities, step.indices))
                    total = total + self.balance * sequence_balance(p, chosen, kept)
        return total
