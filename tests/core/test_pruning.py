"""core.pruning: smaller copies of real architectures, and that they are saved and loaded like any model."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.pruning import layer_map, load_or_prune, prune

IDS = torch.tensor([[5, 6, 7, 8, 9]])
EXPERTS = {
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
}
LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_kept_blocks_are_the_models_own(architecture, tmp_path):
    model = make_tiny(architecture, layers=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = prune(model, layers=3)
    assert layer_map(student) == [0, 2, 4] and layer_map(model) == [0, 1, 2, 3, 4]
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert layer_map(again) == [0, 2, 4]
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, student(IDS).logits, atol=1e-5)
        cached = student.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        plain = student.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)  # the blocks know their place in the cache


def test_all_blocks_is_the_model():
    model = make_tiny("llama", layers=4)
    for student in (prune(model), prune(model, layers=4), prune(model, keep=[0, 1, 2, 3])):
        assert torch.equal(student(IDS).logits, model(IDS).logits)
    assert layer_map(prune(model, layers=1)) == [0]
    assert layer_map(prune(model, keep=[1, 3])) == [1, 3]


def test_weak_neurons_go_first(tmp_path):
    model = make_tiny("llama", layers=2)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 10:40] = 0.0  # these neurons do nothing
    student = prune(model, intermediate=66)
    assert student.config.intermediate_size == 66
    with torch.no_grad():
        assert torch.allclose(student(IDS).logits, model(IDS).logits, atol=1e-4)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, student(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": 0}, "layers = 0"),
        ({"layers": 5}, "model's 4"),
        ({"layers": 2, "keep": [0, 1]}, "both choose"),
        ({"keep": [1, 0]}, "rising"),
        ({"keep": [0, 4]}, "rising numbers of 4"),
        ({"keep": []}, "rising"),
        ({"intermediate": 0}, "intermediate = 0"),
        ({"intermediate": 97}, "between 1 and 96"),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises(BadInput, match=says):
        prune(make_tiny("llama"), **arguments)


@pytest.mark.parametrize(
    ("kind", "config", "arguments"),
    [
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}, {"intermediate": 8, "layers": 2}),
        ("phi", {"intermediate_size": 32}, {"intermediate": 8, "layers": 2}),
        ("deepseek_v3", EXPERTS | LATENT | {"first_k_dense_replace": 2}, {"keep": [0, 1, 3]}),
        ("deepseek_v3", EXPERTS | LATENT | {"first_k_dense_replace": 2}, {"keep": [0, 2, 3]}),
        ("qwen2_moe", EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2}, {"keep": [1, 3]}),
        (
            "qwen2_moe",
            EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24},
            {"intermediate": 8},
        ),
        (
            "gpt_neo",
            {"num_layers": 4, "num_heads": 2, "attention_types": [[["global", "local"], 2]]},
            {"layers": 2},
        ),
    ],
)
def test_what_is_pruned_is_loaded_as_it_is_or_refused(kind, config, arguments, tmp_path):
    size = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
    made = AutoConfig.for_model(kind, **(config if kind == "gpt_neo" else size | config))
    model = AutoModelForCausalLM.from_config(made).eval()
    fits = kind in ("opt", "phi") or arguments == {"keep": [0, 1, 3]}
    if not fits:
        with pytest.raises(NotApplicable, match="config cannot say"):
            prune(model, **arguments)
        return
    student, ids = prune(model, **arguments), torch.randint(3, 60, (2, 5))
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, student(input_ids=ids).logits, atol=1e-5)


def test_a_spec_without_a_model():
    with pytest.raises(BadInput, match="names no model"):
        load_or_prune({"layers": 2})


def test_mlps_of_another_kind():
    with pytest.raises(NotApplicable, match="prune its blocks only"):
        prune(make_tiny("gpt2"), intermediate=16)
