"""Does a chain of two rounds learn as much per expert as one round of twice the experts? Bytes of GSM8K."""

from __future__ import annotations

from typing import Any

import torch
from _shared import bytelm

from transfuse.moe._base import routings
from transfuse.moe.chain_of_experts import (
    ChainOfExperts,
    asymmetry,
    coactivation,
    concentration,
    expert_flops,
)

SLUG = "chain-of-experts"
CLAIM = (
    "With the same experts and the same work, two rounds of four experts beat one round of eight: validation loss on "
    "MetaMathQA after 1,000 steps 1.121 against 1.196 (64 experts); one shared router gives 1.244, residual around "
    "the chain only 1.175."
)
RULE = {
    "quick": (
        "coe.parameters <= 1.005 * moe.parameters in 3/3 seeds; coe.expert_flops == moe.expert_flops in 3/3 seeds; "
        "mean(coe.nll) <= mean(moe.nll) + 0.01"
    ),
    "full": (
        "mean(coe.nll) <= mean(moe.nll) - 0.01; coe.nll < moe.nll in 3/3 seeds; "
        "mean(shared_router.nll) > mean(coe.nll); mean(outer.nll) > mean(coe.nll)"
    ),
}
SEEDS = {"quick": 3, "full": 3}
NOTES = (
    "Parameters are counted up to routers, of which a chain has one per round. The shared expert runs in every round, "
    "as in the released code, so that expert_flops counts routed experts; shared_flops stands beside it. All arms, the "
    "plain one too, drop the residual stream around the block (the released code's placement), but `outer`. "
    "Rate 3e-3, constant after a tenth of warm-up; nothing was tuned."
)

SIZES: dict[str, dict[str, int]] = {
    "quick": {
        "layers": 2, "width": 64, "inner": 32, "experts": 16, "k": 4, "context": 64, "batch": 16, "steps": 400,
    },
    "full": {
        "layers": 4, "width": 256, "inner": 176, "experts": 63, "k": 8, "context": 512, "batch": 16, "steps": 3000,
    },
}  # fmt: skip
RATE = {"quick": 3e-3, "full": 3e-4}
ARMS: dict[str, dict[str, Any]] = {
    "moe": {"num_steps": 1},
    "coe": {"num_steps": 2},
    "outer": {"num_steps": 2, "residual": "outer"},
    "shared_router": {"num_steps": 2, "routers": "shared"},
}


def run(tier: str, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every arm for one seed."""
    arms = [arm for arm in ARMS if tier == "full" or arm != "shared_router"]
    return {arm: measured(arm, tier, seed) for arm in arms}


def measured(arm: str, tier: str, seed: int) -> dict[str, float]:
    """Train one arm and score it on the test problems."""
    size = SIZES[tier]
    width, inner = size["width"], size["inner"]
    model = bytelm.mixture(
        seed, "deepseek_v2", hidden_size=width, intermediate_size=inner, moe_intermediate_size=inner,
        num_hidden_layers=size["layers"], num_attention_heads=4, num_key_value_heads=4,
        n_routed_experts=size["experts"], n_shared_experts=1, num_experts_per_tok=size["k"],
        first_k_dense_replace=0, topk_method="greedy", routed_scaling_factor=1.0, q_lora_rank=None,
        kv_lora_rank=width // 4, qk_rope_head_dim=8, qk_nope_head_dim=width // 8, v_head_dim=width // 4,
        max_position_embeddings=size["context"],
    )  # fmt: skip
    method = ChainOfExperts(first_router="draw", seed=seed, **ARMS[arm])
    model = method.convert(model).to("cuda" if torch.cuda.is_available() else "cpu")
    history = bytelm.train(
        model, method, bytelm.gsm8k("train"), steps=size["steps"], batch=size["batch"],
        context=size["context"], lr=RATE[tier], seed=seed,
    )  # fmt: skip
    held = bytelm.pieces(bytelm.gsm8k("test"), size["context"], 512 if tier == "quick" else 256)
    work = expert_flops(
        width=width, inner=inner, num_experts=size["experts"], num_steps=method.num_steps,
        experts_per_step=size["k"] // method.num_steps, shared=1,
    )  # fmt: skip
    routers = sum(p.numel() for name, p in model.named_parameters() if ".routers." in name)
    figures = {
        "nll": bytelm.nll(model, held),
        "parameters": sum(p.numel() for p in model.parameters()) - routers,
        "router_parameters": routers,
        "expert_flops": work["experts"],
        "shared_flops": work["shared"],
        "train_loss": sum(history.losses[-50:]) / 50,
        "seconds": history.seconds,
    }
    if method.num_steps == 2:
        first, second = next(iter(routings(model).values()))
        counts = coactivation(first.indices, second.indices, size["experts"])
        figures |= {"asymmetry": asymmetry(counts), "concentration": concentration(counts)}
    return figures
