"""Tiny random mixtures of experts of several architectures."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse.core.training import seeded

BASES = ["mixtral", "qwen2_moe", "deepseek_v2"]
SIZES = {
    "mixtral": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "deepseek_v2": {
        "n_routed_experts": 6, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "topk_method": "greedy", "routed_scaling_factor": 1.5,
    },
}  # fmt: skip


def base(name, **options):
    """A random mixture of experts with six experts of which a token sees two."""
    config = AutoConfig.for_model(
        name, vocab_size=60, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, num_experts_per_tok=2, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, **{**SIZES[name], **options},
    )  # fmt: skip
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(4.0)
    return model.eval()
