"""Does the recurrent state tie the layers' routing together, and do gradients run along it? Bytes of WikiText-2."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from _shared import bytelm

from transfuse.core.training import generator
from transfuse.moe._base import routings
from transfuse.moe.rmoe import (
    RecurrentRouter,
    RMoE,
    expert_similarity,
    router_entropy,
    routing_mutual_information,
)

SLUG = "rmoe"
CLAIM = (
    "Routers that share a recurrent state over depth learn better: enwiki8 test BPC 1.116 against 1.128 of plain "
    "routers (36M parameters, 8 layers), with cross-layer mutual information of routing 0.88 to 1.12 against 0.16 to "
    "0.22; without passing the state (NP) 1.123, without its gradient 1.133."
)
RULE = {
    "quick": (
        "rmoe.mutual_information >= 1.5 * smoe.mutual_information in 3/3 seeds; rmoe.path_gradient > 0 in 3/3 seeds; "
        "np.path_gradient == 0 in 3/3 seeds; detach.path_gradient == 0 in 3/3 seeds; "
        "mean(rmoe.bpc) <= mean(smoe.bpc) + 0.02; rmoe.parameters <= 1.05 * smoe.parameters in 3/3 seeds"
    ),
    "full": (
        "mean(rmoe.bpc) < mean(smoe.bpc); mean(rmoe.bpc) < mean(np.bpc); rmoe.bpc < np.bpc in 2/3 seeds"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "The rule on mutual information fails, and more steps or other seeds do not change that: with 8 experts after a "
    "few hundred steps routing is flat, probabilities fall into many different bins of 100, and lists of 8 numbers "
    "that are all different share log 8 nats whether they depend on each other or not. by_chance is the same figure "
    "with each token's experts shuffled, and it is as large. The paper's figures are of plain routers after 80,000 "
    "steps, which put all on one expert. A first run of this tier made 160 steps per arm to stay within two minutes; "
    "the rules on mutual information and on bpc failed (bpc 3.164 against 3.137). Tried then at the 300 steps asked "
    "for, on a seed that is not recorded: bpc 2.878 against 2.876, mutual information 1.36 against 1.61. Steps were "
    "put back to 300, and the two arms that only the gradient rule reads are trained for the first seed only; "
    "nothing else was changed."
)

SIZES: dict[str, dict[str, int]] = {
    "quick": {
        "layers": 6, "width": 48, "inner": 32, "experts": 8, "k": 2, "state": 16, "context": 64, "batch": 16,
        "steps": 300,
    },
    "full": {
        "layers": 12, "width": 256, "inner": 256, "experts": 16, "k": 2, "state": 64, "context": 512, "batch": 16,
        "steps": 6000,
    },
}  # fmt: skip
RATE = {"quick": 3e-3, "full": 7e-4}
ARMS: dict[str, dict[str, Any]] = {
    "smoe": {"router": "linear"},
    "rmoe": {},
    "np": {"pass_state": False},
    "detach": {"detach_state": True},
}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed; quick trains `np` and `detach`, which no rule on losses reads, once."""
    figures = {}
    for arm in ARMS:
        if tier == "quick" and seed > 0 and arm in ("np", "detach"):
            model, _ = made(arm, tier, seed)
            figures[arm] = {"path_gradient": path_gradient(model)}
        else:
            figures[arm] = measured(arm, tier, seed)
    return figures


def made(arm: str, tier: str, seed: int) -> tuple[Any, RMoE]:
    """An untrained model with the arm's routers, and the method."""
    size = SIZES[tier]
    model = bytelm.mixture(
        seed, "mixtral", hidden_size=size["width"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=size["experts"], num_experts_per_tok=size["k"],
        max_position_embeddings=size["context"],
    )  # fmt: skip
    method = RMoE(state_size=size["state"], seed=seed, **ARMS[arm])
    return method.convert(model).to("cuda" if torch.cuda.is_available() else "cpu"), method


def measured(arm: str, tier: str, seed: int) -> dict[str, float]:
    """Train one arm on the validation text and score it on the test text."""
    size = SIZES[tier]
    model, method = made(arm, tier, seed)
    history = bytelm.train(
        model, method, bytelm.wikitext("valid"), steps=size["steps"], batch=size["batch"],
        context=size["context"], lr=RATE[tier], seed=seed,
    )  # fmt: skip
    held = bytelm.pieces(bytelm.wikitext("test"), size["context"], 512 if tier == "quick" else 256)
    bpc = bytelm.nll(model, held) / math.log(2)
    with torch.no_grad():
        model(input_ids=held[:64].to(next(model.parameters()).device))
    p = [steps[0].probabilities for steps in routings(model).values()]
    pairs = list(itertools.combinations(p, 2))
    chance = [(a, shuffled(b, number)) for number, (a, b) in enumerate(pairs)]
    blocks = [layer.mlp.experts for layer in model.model.layers]
    return {
        "bpc": bpc,
        "mutual_information": sum(routing_mutual_information(a, b) for a, b in pairs) / len(pairs),
        "by_chance": sum(routing_mutual_information(a, b) for a, b in chance) / len(pairs),
        "entropy": sum(float(router_entropy(layer).mean()) for layer in p) / len(p),
        "selected": sum(float(layer.topk(size["k"]).values.sum(-1).mean()) for layer in p) / len(p),
        "similarity": sum(expert_similarity(block) for block in blocks) / len(blocks),
        "path_gradient": path_gradient(model),
        "parameters": sum(q.numel() for q in model.parameters()),
        "train_loss": sum(history.losses[-50:]) / 50,
        "seconds": history.seconds,
    }


def shuffled(probabilities: torch.Tensor, seed: int) -> torch.Tensor:
    """Each token's experts in a random order: what is left of the mutual information is no dependence."""
    noise = torch.rand(probabilities.shape, generator=generator(seed))
    return probabilities.gather(1, noise.argsort(1).to(probabilities.device))


def path_gradient(model: Any) -> float:
    """|d logits of the last router / d input of the first|, with every layer's input given: no residual stream."""
    routers = [m for m in model.modules() if isinstance(m, RecurrentRouter)]
    device, width = routers[0].weight.device, routers[0].hidden_size
    random = generator(0)
    inputs = [torch.randn(16, width, generator=random).to(device).requires_grad_(True) for _ in routers]
    last = [router(z)[0] for router, z in zip(routers, inputs, strict=True)][-1]
    found = torch.autograd.grad(last.sin().sum(), inputs[0], allow_unused=True)[0]
    return 0.0 if found is None else float(found.norm())
