"""FactorLLM: cut a dense model's feed-forward blocks into experts, and teach routers which of them a token needs.

:arxiv: 2408.11855
:moves: a dense model -> a sparse copy of itself
:access: weights, training data
:reversible: no
:context: no

The f neurons of a block are cut into E slices of equal size, which already are experts: all together they are the
block, exactly. A router picks K of them per token, by hard 0/1 gates:

    E_j(x) = W_down[:, s_j] (act(W_gate[s_j] x) * (W_up[s_j] x)),     sum over all j of E_j(x) = FFN(x)
    y      = (E/K) sum over the K largest of G x of E_j(x)

The work of the block falls to K/E. Gates of 0 and 1 pass no gradient on, so the router learns from the frozen block
(the prior-approximate loss). With h the block's input, no gradient through the labels:

    individual  t = the K experts with the smallest e_j = mean over d of (E_j(h) - (K/E) FFN(h))^2
    subset      t = the K experts with the smallest |(E/K) sum of E_j(h) - FFN(h)|^2, of all C(E, K) sets
    L_PA        = KL(softmax(G h) || softmax(t)), both clipped to [1e-7, 1 - 1e-7], mean over tokens
    L_B         = mean over tokens and experts of (is chosen) * softmax(G h)
    L           = next token + 0.05 sum over layers of L_PA + 0.01 sum over layers of L_B

Expert slices and routers are trained; attention, embeddings, norms and head stay. Where this differs from the
released code, which never trains its router (it returns the language-model loss alone), and why:

* `label="subset"` is the default. Experts scored one by one do not make a good set: at K = 2 of 4 the paper's own
  labels are no better than chance. The paper's rule is `label="individual"`.
* All sums over subsets come from the Gram matrix of the experts' outputs, E x E per token.
* The labels are made from the model's own inputs (`par_input="student"`), or from those of the dense model
  (`"teacher"`, one more forward pass). The code feeds each frozen block the output of the frozen block below it,
  with no attention between.
* The scale is E/K where the code divides integers, means run over all tokens of a batch, padding is left out, and
  errors are taken in float32, since those of bfloat16 vanish.
* A bias of the down-projection belongs to no expert and is added once.

`transfuse.moe.save` leaves the frozen blocks out; `drop_teacher` frees their memory. In evaluation mode tokens are
gathered expert by expert, so the saving is real.

    model, tokenizer = transfuse.load("smollm2-135m")
    method = FactorLLM(experts=4, top_k=3)
    method.convert(model)
    fit(model, rows, loss=method.loss, lr=4e-5, max_steps=500, weight_decay=1e-5, schedule="cosine")
    save(drop_teacher(model), "sparse")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import BadInput
from transfuse.core.runs import check_positive
from transfuse.moe._base import Conversion, flat_mask
from transfuse.moe._factor_ffn import (
    SPLITS,
    FactorizedFFN,
    Split,
    balanced_kmeans,
    find_ffns,
    split_neurons,
)
from transfuse.moe._factor_labels import (
    LABELS,
    TARGETS,
    Label,
    Target,
    balance_loss,
    check_subsets,
    individual_labels,
    par_loss,
    router_loss,
    subset_labels,
)

__all__ = [
    "FactorLLM",
    "FactorizedFFN",
    "balance_loss",
    "balanced_kmeans",
    "drop_teacher",
    "factorize",
    "ffn_flops",
    "individual_labels",
    "par_loss",
    "router_loss",
    "split_neurons",
    "subset_labels",
]


def _blocks(model: nn.Module) -> Iterator[FactorizedFFN]:
    return (module for module in model.modules() if isinstance(module, FactorizedFFN))


def factorize(
    model: Any,
    *,
    experts: int = 4,
    top_k: int = 2,
    split: Split = "contiguous",
    layers: list[int] | None = None,
    keep_teacher: bool = False,
    seed: int = 0,
) -> Any:
    """Cut the feed-forward blocks of a model into experts, in place; only experts and routers stay trainable.

    Args:
        model: A transformers model with dense feed-forward blocks: gated (Llama, Qwen, Gemma, Phi-3) or plain
            (GPT-2, GPT-NeoX, Phi).
        experts: Experts per block.
        top_k: Experts per token.
        split: How neurons are grouped; see `split_neurons`.
        layers: Numbers of the layers to cut; None for all.
        keep_teacher: Keep each block as it was, frozen: `FactorLLM` does, for its routers to learn from.
        seed: Of the routers, of shuffles and of k-means.

    Returns:
        The model. Its blocks are `FactorizedFFN`s.

    Raises:
        BadInput: a count out of range, a width that E does not divide, no such layer.
        NotApplicable: a layer without a dense feed-forward block of a known kind.
    """
    return _factorize(model, experts, top_k, split, layers, keep_teacher=keep_teacher, seed=seed, fresh=True)


def _factorize(
    model: Any,
    experts: int,
    top_k: int,
    split: Split,
    layers: list[int] | None,
    *,
    keep_teacher: bool,
    seed: int,
    fresh: bool,
) -> Any:
    check_positive(experts=experts, top_k=top_k)
    if top_k > experts:
        raise BadInput("top_k", top_k, f"is more than the {experts} experts", "choose at most all of them")
    if split not in SPLITS:
        raise BadInput("split", split, "is not known", f"use one of {', '.join(SPLITS)}")
    if any(_blocks(model)):
        raise BadInput("model", type(model).__name__, "is factorised already", "load it afresh")
    blocks = []
    for site in find_ffns(model, layers, check=fresh):
        block = FactorizedFFN(site, experts=experts, top_k=top_k)
        if block.inner % experts:
            problem = f"does not divide the {block.inner} neurons of {site.name}"
            raise BadInput("experts", experts, problem, f"use a divisor of {block.inner}")
        blocks.append((site, block))
    model.requires_grad_(False)
    for site, block in blocks:
        if fresh:
            order = split_neurons(block.reading(), experts, split, seed + site.index)
            block.start(site.module, order, seed + site.index, keep_teacher=keep_teacher)
        parent, _, child = site.name.rpartition(".")
        setattr(model.get_submodule(parent), child, block.train(site.module.training))
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not name.startswith("teacher."))
    return model


def drop_teacher(model: Any) -> Any:
    """Free the frozen blocks that routers learn from, and return the model."""
    for block in _blocks(model):
        block.teacher = None
    return model


def ffn_flops(model: Any) -> dict[str, float]:
    """Multiplications and additions per token in a factorised model's feed-forward blocks.

    Returns:
        `dense`, all experts; `active`, those a token sees; `router`; `share`, what is left: active and router
        over dense.
    """
    found = {"dense": 0.0, "active": 0.0, "router": 0.0}
    for block in _blocks(model):
        matrices = [block.get_parameter(f"{name}.weight") for name in (*block.inward, block.outward)]
        dense = 2.0 * sum(matrix.numel() for matrix in matrices)
        found["dense"] += dense
        found["active"] += dense * block.top_k / block.experts
        found["router"] += 2.0 * block.router.weight.numel()
    if not found["dense"]:
        raise BadInput("model", type(model).__name__, "has no factorised block", "factorise it first")
    return {**found, "share": (found["active"] + found["router"]) / found["dense"]}


class FactorLLM(Conversion):
    """Cut a dense model into a mixture of its own slices, and train it to need only some of them.

    Args:
        experts: E, experts per block.
        top_k: K, experts per token.
        split: How neurons are grouped: "contiguous" (the released code's), "random" or "kmeans".
        layers: Numbers of the layers to cut; None for all.
        label: "subset", or "individual" as in the paper: what the router learns from.
        target: "kl" as in the paper, or "bce".
        par_input: Inputs the labels are made from: the model's own ("student"), or the dense model's ("teacher").
        par_weight: Weight of L_PA; 0 with `balance_weight` 0 is the released code, whose routers stay as drawn.
        balance_weight: Weight of L_B.
        straight_through: Let the language-model loss reach the routers through their probabilities.
        seed: Of the routers, of shuffles and of k-means.
    """

    slug: ClassVar[str] = "factorllm"

    def __init__(
        self,
        *,
        experts: int = 4,
        top_k: int = 2,
        split: Split = "contiguous",
        layers: list[int] | None = None,
        label: Label = "subset",
        target: Target = "kl",
        par_input: Literal["student", "teacher"] = "student",
        par_weight: float = 0.05,
        balance_weight: float = 0.01,
        straight_through: bool = False,
        seed: int = 0,
    ):
        self.experts, self.top_k, self.split, self.layers = experts, top_k, split, layers
        self.label, self.target, self.par_input = label, target, par_input
        self.par_weight, self.balance_weight = par_weight, balance_weight
        self.straight_through, self.seed = straight_through, seed

    def install(self, model: Any, *, fresh: bool) -> None:
        """See `factorize`."""
        choices = (("label", LABELS), ("target", TARGETS), ("par_input", ("student", "teacher")))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise BadInput(name, getattr(self, name), "is not known", f"use one of {', '.join(known)}")
        for name in ("par_weight", "balance_weight"):
            if not getattr(self, name) >= 0:
                raise BadInput(name, getattr(self, name), "is negative", "give 0 or more")
        if self.label == "subset" and 1 <= self.top_k <= self.experts:
            check_subsets(self.experts, self.top_k)
        learns = self.par_weight > 0
        _factorize(
            model, self.experts, self.top_k, self.split, self.layers, keep_teacher=learns, seed=self.seed,
            fresh=fresh,
        )  # fmt: skip
        make: Callable[[Tensor, Tensor, int], Tensor]
        make = subset_labels if self.label == "subset" else individual_labels
        for block in _blocks(model):
            block.straight_through = self.straight_through
            block.labeller = functools.partial(make, k=self.top_k)

    def auxiliary(self, model: Any, mask: Tensor | None = None) -> Tensor:
        """Sum over layers of the weighted L_PA (where the blocks made labels) and L_B."""
        total = super().auxiliary(model)
        for block in _blocks(model):
            if not block.latest:
                continue
            logits = block.latest[0].logits
            kept = flat_mask(mask, len(logits), logits.device)
            total = total + self.balance_weight * balance_loss(logits, block.top_k, mask=kept)
            if block.labels:
                heard = block.router(block.heard[0]).float() if block.heard else logits
                term = router_loss(heard, block.labels[0], target=self.target, mask=kept)
                total = total + self.par_weight * term
        return total

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The model's own loss plus `auxiliary`; with `par_input="teacher"` the dense model runs first."""
        if self.par_input == "teacher" and self.par_weight > 0:
            blocks = [block for block in _blocks(model) if block.teacher is not None]
            for block in blocks:
                block.listening = True
            try:
                with torch.no_grad():
                    model(**{name: value for name, value in batch.items() if name != "labels"})
                for block in blocks:
                    block.listening = False
                return super().loss(model, batch)
            finally:
                for block in blocks:
                    block.listening = False
                    block.heard.clear()
        return super().loss(model, batch)

    def measurements(self, model: Any) -> dict[str, float]:
        """Floating-point operations per token in the feed-forward blocks."""
        return {f"ffn_flops_{name}": value for name, value in ffn_flops(model).items()}
