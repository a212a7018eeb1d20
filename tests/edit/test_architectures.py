"""Editors on architectures with ways of their own: blocks that return tuples, flat or in-place MLPs, no KV cache."""

from __future__ import annotations

import pytest
import torch
from conftest import SENTENCES

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput
from transfuse.core.models import fingerprint
from transfuse.edit import edit, load_edit
from transfuse.edit._objective import Objective
from transfuse.edit._sites import find_sites
from transfuse.edit._statistics import covariance
from transfuse.edit._values import editing, search

FACT = Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld")
HOW = {"lr": 0.5, "steps": 2, "weight_decay": 1e-3, "kl_factor": 0.0625, "clamp": 4.0, "stop_below": 0.0}
SMALL = {"statistics": SENTENCES, "tokens": 400, "ridge": 0.05, "prefixes": 2, "steps": 2}
EDITORS = {
    "rome": {"layer": 6, **SMALL},
    "memit": {"layers": [5, 6], **SMALL},
    "ft-l": {"layer": 6, "steps": 2},
    "ft-m": {"layer": 6, "steps": 2},
    "lora": {"steps": 2},
    "grace": {"layer": 6, "steps": 2},
}


def build(name, layers=8):
    """A random model: `opt`, `falcon`, `gptj`, `bloom`, `gpt_neox` or `lfm2`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    own = {
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
        "gptj": {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 512, "rotary_dim": 4},
        "bloom": {"n_layer": layers, "n_head": 4},
        "gpt_neox": {"intermediate_size": 96, "max_position_embeddings": 512},
        "lfm2": {
            "intermediate_size": 96, "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"] * (layers // 2),
        },
    }.get(name, {})  # fmt: skip
    if name != "gptj":
        own["hidden_size"] = 32
    if name not in ("gptj", "bloom"):
        own |= {"num_hidden_layers": layers, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **own)).float()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(4.0)
    return model.eval()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("architecture", ["opt", "falcon", "gptj", "bloom", "gpt_neox"])
def test_edits_high_in_the_stack(tiny_tokenizer, tmp_path, architecture, method):
    model = build(architecture)
    before, ids = fingerprint(model), torch.tensor([tiny_tokenizer(FACT.prompt)["input_ids"]])
    plain = model(ids).logits
    with edit(model, tiny_tokenizer, FACT, method=method, **EDITORS[method]) as handle:
        edited = model(ids).logits
        handle.save(tmp_path / "delta")
    assert fingerprint(model) == before and not torch.equal(edited, plain)
    with load_edit(tmp_path / "delta", model, tiny_tokenizer):
        assert torch.equal(model(ids).logits, edited)


@pytest.mark.parametrize("architecture", ["opt", "falcon", "gptj", "gpt_neox"])
def test_the_old_value_is_what_the_weights_give_for_the_key(tiny_tokenizer, architecture):
    """Also where the block adds the attention's output to the MLP's in place (falcon)."""
    model = build(architecture)
    (site,) = find_sites(model, [3])
    with editing(model):
        found = search(
            model,
            tiny_tokenizer,
            [[FACT]],
            site,
            site,
            prefixes=("",),
            objective=Objective(**HOW),
            whole=True,
        )
        own = search(model, tiny_tokenizer, [[FACT]], site, site, prefixes=("",), objective=Objective(**HOW))
    assert found.place == site.block and own.place == site.module  # nothing rescales these MLPs' outputs
    bias = site.bias(model)
    value = site.matrix(model) @ own.keys[0] + (0 if bias is None else bias)
    torch.testing.assert_close(own.start[0], value, rtol=1e-4, atol=1e-5)


def test_keys_of_a_flat_mlp_are_counted_without_padding(tiny_tokenizer):
    model = build("opt")
    together = covariance(model, tiny_tokenizer, [2], text=SENTENCES[:2], cache=False)[2]
    apart = [covariance(model, tiny_tokenizer, [2], text=[t], cache=False)[2] for t in SENTENCES[:2]]
    assert together.count == sum(each.count for each in apart)
    wanted = sum(each.matrix * each.count for each in apart) / together.count
    torch.testing.assert_close(together.matrix, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_blocks_without_keys_and_values_are_refused(tiny_tokenizer, monkeypatch, method):
    model = build("lfm2")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model was run"))
    with pytest.raises(BadInput, match=r"blocks without keys and values \(conv\); edit it by ft-m"):
        edit(model, tiny_tokenizer, FACT, method=method, **EDITORS[method])


def test_float16_does_not_overflow_where_values_are_large(tiny_lm, tiny_tokenizer):
    """The place of MEMIT's values does not change with the dtype."""
    model = tiny_lm("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(6000)
    (site,) = find_sites(model.half(), [1])
    with editing(model):
        found = search(
            model,
            tiny_tokenizer,
            [[FACT]],
            site,
            site,
            prefixes=("",),
            objective=Objective(**HOW),
            whole=True,
        )
    assert found.start.abs().max() > 1024  # 64 times that is beyond float16
    assert found.place == site.block
