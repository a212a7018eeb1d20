"""RMoE: a small recurrent state runs through the layers, so that each router knows what those below decided.

:arxiv: 2408.06793
:moves: routing decisions of lower layers -> routers of higher layers
:access: weights, training data
:reversible: no
:context: no

The router of a mixture of experts decides layer by layer, each on its own. Here a cell shared by all layers carries a
state of p numbers per token through the depth of the network (not along the sequence):

    x'_i = P_i z_i                       a projection d -> p per layer, z_i the input of layer i's experts
    h_i  = GRU(x'_i, h_{i-1})            one cell for all layers, h_0 = 0, as torch's GRUCell
    p_i  = softmax(G_i h_i)              in float32; the k largest are chosen and divided by their sum
    y_i  = sum of p_ij E_j(z_i)          experts still see z_i

h_i keeps its graph: gradients that reach router i go on to the routers below it, and that is the point. Tokens do not
meet in the state, so generation needs no cache for it. It costs L d p + 6 p^2 + 6 p + L N (p - d) parameters more.

Balance, weight 0.01: N sum over n of f_n P_n over the tokens of all layers, f_n the share of tokens that use expert n
(summed over the k slots: about k when balanced), P_n its mean probability. Padding is left out, which the released
code does not do.

Where paper and code differ: the chosen weights are divided by their sum as in the code (`normalise=False` leaves
them); p = 128 is the paper's, biases start at zero. Layers without experts pass the state on. Variants and baselines:
`pass_state=False` (the cell starts from zeros in every layer), `detach_state`, `logit_residual` (adds a share of the
logits below), `shared_projector`, cells "rnn" and "lstm", `head="xmoe"`; routers "linear", "mlp", "cosine", "xmoe" and
"random" (drawn and never trained).

`convert` exchanges the routers of a transformers model; its experts stay as they are. A linear router is the model's
own; with `normalise=None` as well nothing changes.

Each forward pass in training needs its own backward pass before the next one if activations are checkpointed: what is
computed again reads the states of the latest pass. Reentrant checkpointing cuts the recurrent gradient and is refused.

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", ...))
    method = RMoE(state_size=64)
    method.convert(model)
    fit(model, rows, loss=method.loss, lr=4e-4, max_steps=1000)
    routing_mutual_information(*(steps[0].probabilities for steps in list(routings(model).values())[:2]))
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.runs import check_positive
from transfuse.moe._base import Conversion, flat_mask
from transfuse.moe._experts import expert_sites
from transfuse.moe._recurrent import (
    CELLS,
    Cell,
    RecurrentRouter,
    RouterKind,
    RouterState,
    check_graph,
    cosine_logits,
    gru_step,
)

__all__ = [
    "Cell",
    "RMoE",
    "RecurrentRouter",
    "RouterState",
    "cosine_logits",
    "expert_similarity",
    "gru_step",
    "router_entropy",
    "router_gradient_norms",
    "routing_mutual_information",
    "switch_balance",
]

ROUTERS = ("gru", "rnn", "lstm", "linear", "mlp", "cosine", "xmoe", "random")


# --- losses and analyses -----------------------------------------------------------------------------------


def switch_balance(logits: list[Tensor], k: int, *, mask: Tensor | None = None) -> Tensor:
    """N sum over n of f_n P_n over the tokens of all layers: about k when every expert gets as much.

    Args:
        logits: `[T, N]` of each layer; taken to float32.
        k: Experts per token.
        mask: bool `[T]`, the tokens that count; None for all.

    Returns:
        A float32 scalar.
    """
    every = tuple(layer.float() for layer in logits)
    return load_balancing_loss_func(every, every[0].shape[-1], k, mask)


def routing_mutual_information(probabilities_a: Tensor, probabilities_b: Tensor, *, bins: int = 100) -> float:
    """How much one layer's routing says about another's: mean over tokens, in nats.

    For each token, the N probabilities of either layer are put into equal bins on [0, 1]; the mutual information is
    that of the two lists of N bins. With n_ab the number of experts in the same bins as expert i in both layers, it
    is the mean over i of log(N n_ab / (n_a n_b)).

    Args:
        probabilities_a: `[T, N]`.
        probabilities_b: `[T, N]`, of the same tokens.
        bins: Number of bins.

    Raises:
        BadInput: the shapes differ, there is no token, or no bin.
    """
    check_positive(bins=bins)
    if probabilities_a.dim() != 2 or not probabilities_a.numel():
        shape = tuple(probabilities_a.shape)
        raise BadInput(
            "probabilities_a", shape, "is not [T, N] of some tokens", "give a layer's probabilities"
        )
    if probabilities_a.shape != probabilities_b.shape:
        shapes = tuple(probabilities_a.shape), tuple(probabilities_b.shape)
        raise BadInput(
            "probabilities_b", shapes[1], f"is not {shapes[0]}", "give the same tokens and experts"
        )
    total, count = 0.0, probabilities_a.shape[-1]
    for one, two in zip(probabilities_a.split(1024), probabilities_b.split(1024), strict=True):
        a, b = ((p.float() * bins).long().clamp(0, bins - 1) for p in (one, two))
        same_a, same_b = (c[:, :, None] == c[:, None, :] for c in (a, b))
        n_a, n_b, n_ab = (same.sum(-1).double() for same in (same_a, same_b, same_a & same_b))
        total += float((count * n_ab / (n_a * n_b)).log().mean(-1).sum())
    return total / len(probabilities_a)


def router_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each token's routing in nats: `[T, N]` -> `[T]`."""
    p = probabilities.float()
    return -torch.special.xlogy(p, p).sum(-1)


def expert_similarity(model: Any) -> float:
    """How alike the experts of a block are: the mean of the Gram matrix of their mean keys and values.

    Per expert, the means over its neurons of what they read (gate and up matrix) and of what they write are each
    divided by their norm and joined.

    Args:
        model: A model, of which the mean over its blocks is taken, one block, or its `experts`, with `gate_up_proj`
            `[N, 2 f, d]` and `down_proj` `[N, d, f]`.

    Raises:
        NotApplicable: it holds no such experts.
    """
    found = [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")]
    if not found:
        remedy = "give a mixture of experts of transformers"
        raise NotApplicable("model", type(model).__name__, "holds no stacked experts", remedy)
    return sum(_similarity(experts) for experts in found) / len(found)


def _similarity(experts: Any) -> float:
    with torch.no_grad():
        gate, up = experts.gate_up_proj.float().chunk(2, dim=1)
        means = [gate.mean(1), up.mean(1), experts.down_proj.float().mean(2)]
        vectors = torch.cat([nn.functional.normalize(mean, dim=-1) for mean in means], dim=-1)
        return float((vectors @ vectors.T).mean())


def router_gradient_norms(method: RMoE, model: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Norm of the routers' gradient by source: the language-model loss, and the balance term.

    Args:
        method: What converted the model.
        model: In training mode.
        batch: With labels.

    Returns:
        `lm` and `balance`.
    """
    routers = [m for m in model.modules() if isinstance(m, RecurrentRouter)]
    wanted = list({id(p): p for m in routers for p in m.parameters() if p.requires_grad}.values())
    own = model(**batch).loss
    parts = {"lm": own, "balance": method.auxiliary(model, batch.get("attention_mask"))}
    found = {}
    for name, loss in parts.items():
        gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        found[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return found


# --- the conversion ----------------------------------------------------------------------------------------


class RMoE(Conversion):
    """Give a mixture-of-experts model routers that know what the layers below decided.

    Args:
        router: "gru", "rnn" or "lstm"; or one to compare with: "linear" (the model's own), "mlp", "cosine", "xmoe",
            "random".
        state_size: p, length of the state; also the inner width of "mlp".
        pass_state: Whether a layer reads the state below it.
        detach_state: Cut the gradient between layers.
        logit_residual: Share of the layer below's logits that is added to the layer's own.
        shared_projector: One projection d -> p for all layers.
        head: How states become logits: "linear", or "xmoe", cosines in 16 dimensions.
        normalise: Divide the weights of the chosen experts by their sum; None as the model does.
        balance: Weight of the balance term.
        train_routers: False freezes routers and cell, as for fine-tuning the rest.
        seed: Of what is drawn.
    """

    slug: ClassVar[str] = "rmoe"

    def __init__(
        self,
        *,
        router: RouterKind = "gru",
        state_size: int = 128,
        pass_state: bool = True,
        detach_state: bool = False,
        logit_residual: float = 0.0,
        shared_projector: bool = False,
        head: Literal["linear", "xmoe"] = "linear",
        normalise: bool | None = True,
        balance: float = 0.01,
        train_routers: bool = True,
        seed: int = 0,
    ):
        self.router, self.state_size, self.pass_state = router, state_size, pass_state
        self.detach_state, self.logit_residual, self.shared_projector = (
            detach_state,
            logit_residual,
            shared_projector,
        )
        self.head, self.normalise, self.balance = head, normalise, balance
        self.train_routers, self.seed = train_routers, seed

    def install(self, model: Any, *, fresh: bool) -> None:
        """Exchange the router of every expert block."""
        check_positive(state_size=self.state_size)
        for name, known in (("router", ROUTERS), ("head", ("linear", "xmoe"))):
            if getattr(self, name) not in known:
                raise BadInput(name, getattr(self, name), "is not known", f"use one of {', '.join(known)}")
        if not self.balance >= 0:
            raise BadInput("balance", self.balance, "is negative", "give 0 or more")
        if not math.isfinite(self.logit_residual):
            raise BadInput(
                "logit_residual", self.logit_residual, "is not finite", "give a share, such as 0.5"
            )
        if fresh and self.router not in CELLS:
            for name, plain in (("shared_projector", False), ("head", "linear")):
                if getattr(self, name) != plain:
                    problem = f"has no effect with router={self.router!r}"
                    raise BadInput(name, getattr(self, name), problem, f"use one of {', '.join(CELLS)}")
        sites = expert_sites(model, check=fresh)
        state = RouterState(len(sites))
        cell = projector = None
        for number, site in enumerate(sites):
            gate = site.block.gate
            router = RecurrentRouter(
                site.width, site.num_experts, site.top_k, number, router=self.router,
                state_size=self.state_size, cell=cell, projector=projector, state=state,
                pass_state=self.pass_state, detach_state=self.detach_state,
                logit_residual=self.logit_residual, head=self.head,
                normalise=site.normalise if self.normalise is None else self.normalise,
                scale=site.scale if self.normalise is None else 1.0,
            )  # fmt: skip
            if fresh:
                if self.router == "linear":
                    with torch.no_grad():
                        router.weight.copy_(gate.weight)
                else:
                    router.draw(self.seed + number)
            router.to(gate.weight.device, gate.weight.dtype)
            if self.router in CELLS:
                cell = router.cell.float()  # a small part that every layer multiplies errors by
                projector = router.projector if self.shared_projector else None
            if not self.train_routers:
                router.requires_grad_(False)
            site.block.gate = router.train(gate.training)

    def auxiliary(self, model: Any, mask: Tensor | None = None) -> Tensor:
        """The weighted balance term over all layers.

        Raises:
            NotApplicable: routers learn, but the pass left no graph.
        """
        routers = [m for m in model.modules() if isinstance(m, RecurrentRouter) and m.latest]
        if not routers:
            return super().auxiliary(model)
        logits = [router.latest[0].logits for router in routers]
        learns = any(router.training and router.weight.requires_grad for router in routers)
        if self.balance and learns and torch.is_grad_enabled():
            check_graph(logits[-1], "logits of the routers")
        kept = None if mask is None else flat_mask(mask, len(logits[0]), logits[0].device)
        return self.balance * switch_balance(logits, routers[0].top_k, mask=kept)
