"""LoRA and AdaLoRA: against PEFT's own wrapper and the merged weights; on and off without a trace."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from edit.test_ft_m import FACTS, sure

from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.generate import encode_pair, target_matches, target_nll
from transfuse.core.models import fingerprint
from transfuse.core.training import seeded
from transfuse.edit import edit
from transfuse.edit.lora import LoRA, LoraEdit


def make(**changes):
    """An editor for tiny models and what it is asked to write."""
    return LoRA(**{"rank": 4, "steps": 8, "batch_size": 2, **changes}), FACTS


def ids():
    return torch.arange(3, 20)[None]


@pytest.mark.parametrize("adaptive", [False, True])
def test_agrees_with_pefts_own_loop(tiny_lm, tiny_tokenizer, adaptive):
    """The same seed, one fact, torch's Adam on `get_peft_model`; without dropout, which draws numbers."""
    model = tiny_lm("llama")
    editor, _ = make(dropout=0.0, seed=3, adaptive=adaptive, stop_below=0.0)
    made = editor.fit(model, tiny_tokenizer, FACTS[:1])
    common = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    common["task_type"] = "CAUSAL_LM"  # of PEFT's wrappers, only this one passes AdaLoRA's penalty on
    if adaptive:
        config = peft.AdaLoraConfig(**common, target_r=4, init_r=6, total_step=8, tinit=0, tfinal=2, deltaT=1)
    else:
        config = peft.LoraConfig(**common)
    with seeded(3):
        theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="edit0")
    theirs.eval()
    adam = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=5e-3)
    prompt, target = encode_pair(tiny_tokenizer, FACTS[0].prompt, FACTS[0].target)
    row = torch.tensor([prompt + target])
    labels = torch.tensor([[-100] * len(prompt) + target])
    for step in range(8):
        theirs(input_ids=row, labels=labels).loss.backward()
        adam.step()
        if adaptive:
            theirs.base_model.update_and_allocate(step + 1)
        adam.zero_grad()
    wanted = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if "lora_" in n}
    assert len(wanted) == len([k for k in made.adapter if not k.endswith("ranknum")]) > 0
    for name, value in wanted.items():
        module, _, part = name.partition(".lora_")
        ours = made.adapter[f"{module}::lora_{part[0]}"]
        assert (ours - value).abs().max() < 1e-5
        assert part[0] != "B" or value.abs().max() > 1e-3  # it moved


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_is_the_low_rank_update_of_the_weights(tiny_lm, tiny_tokenizer, architecture):
    model = tiny_lm(architecture)
    editor, facts = make()
    made = editor.fit(model, tiny_tokenizer, facts)
    merged = copy.deepcopy(model)
    modules = {key.partition("::")[0] for key in made.adapter}
    with torch.no_grad():
        for name in modules:
            change = 32 / 4 * made.adapter[f"{name}::lora_B"] @ made.adapter[f"{name}::lora_A"]
            weight = merged.get_submodule(name).weight
            weight += change.T if architecture == "gpt2" else change
    plain = model(ids()).logits
    made.attach(model)
    assert (model(ids()).logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(ids()).logits, merged(ids()).logits, rtol=1e-4, atol=1e-4)
    made.detach(model)
    assert torch.equal(model(ids()).logits, plain)


def test_no_steps_change_nothing(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    plain = model(ids()).logits
    editor, facts = make(steps=0)
    with edit(model, tiny_tokenizer, facts, method=editor):
        assert torch.equal(model(ids()).logits, plain)


def test_all_steps_are_made_unless_an_end_is_asked_for(tiny_lm, tiny_tokenizer):
    """After 60 updates the loss is below 1e-3: as many as wanted follow, or none with such an end."""
    model = sure(tiny_lm("llama"))

    def learnt(steps, **changes):
        how = {"steps": steps, "dropout": 0.0, "lr": 2e-2, "batch_size": 1, **changes}
        return LoRA(**how).fit(model, tiny_tokenizer, FACTS[:1]).adapter

    def same(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    assert same(learnt(60, stop_below=1e-3), learnt(64, stop_below=1e-3))
    assert not same(learnt(60), learnt(64))
    assert same(learnt(64), learnt(64, stop_below=0.0))


def test_adaptive_prunes_to_the_rank(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make(adaptive=True, steps=12)
    made = editor.fit(model, tiny_tokenizer, facts)
    left = [int((value != 0).sum()) for key, value in made.adapter.items() if key.endswith("lora_E")]
    assert len(left) == 8 and max(left) <= 6
    assert sum(left) == 4 * 8
    made.attach(model)
    first = model(ids()).logits
    assert torch.equal(model(ids()).logits, first)


def test_dropout_ends_with_training(tiny_lm, tiny_tokenizer):
    """Training draws dropout; the installed adapter never does, whatever mode the model was in."""
    model = tiny_lm("llama").train()
    editor, facts = make(dropout=0.5)
    other, _ = make(dropout=0.0)
    a, b = editor.fit(model, tiny_tokenizer, facts), other.fit(model, tiny_tokenizer, facts)
    assert any((a.adapter[k] - b.adapter[k]).abs().max() > 1e-4 for k in a.adapter)
    assert all(module.training for module in model.modules())
    model.eval()
    a.attach(model)
    assert torch.equal(model(ids()).logits, model(ids()).logits)


def test_the_fact_is_learned(tiny_lm, tiny_tokenizer):
    model = sure(tiny_lm("llama"))
    editor, facts = make(steps=60)
    with edit(model, tiny_tokenizer, facts, method=editor):
        hits = target_matches(model, tiny_tokenizer, [f.prompt for f in facts], [f.target for f in facts])
    assert all(hit.all() for hit in hits)


def test_adapters_add_up_and_come_off_one_by_one(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make()
    prompts, targets = [f.prompt for f in facts], [f.target for f in facts]
    names = [name for name, _ in model.named_modules()]
    plain = model(ids()).logits
    first = editor.fit(model, tiny_tokenizer, facts[:1])
    first.attach(model)
    with_first = model(ids()).logits
    second = editor.fit(model, tiny_tokenizer, facts[1:])
    assert torch.equal(model(ids()).logits, with_first)  # fitting left the first one as it was
    alone = target_nll(model, tiny_tokenizer, prompts[1:], targets[1:])[0].mean()
    second.attach(model)
    assert not torch.equal(model(ids()).logits, with_first)
    assert target_nll(model, tiny_tokenizer, prompts[1:], targets[1:])[0].mean() < alone
    second.detach(model)
    assert torch.equal(model(ids()).logits, with_first)
    first.detach(model)
    assert torch.equal(model(ids()).logits, plain)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")


def test_attaching_draws_no_random_numbers(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    editor, facts = make(steps=1)
    state = torch.get_rng_state()
    with edit(model, tiny_tokenizer, facts, method=editor):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("state", ["merged", "switched off"])
def test_adapters_that_do_not_run_are_refused_and_stay(tiny_lm, tiny_tokenizer, state):
    """PEFT would unmerge them for good; ours would be off beside adapters that are."""
    model = tiny_lm("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    own = peft.get_peft_model(model, config)
    editor, facts = make(steps=1)
    made = editor.fit(model, tiny_tokenizer, facts)
    own.merge_adapter() if state == "merged" else own.base_model.disable_adapter_layers()
    before = fingerprint(model)
    with pytest.raises(BadInput, match=f"adapters that are {state}"):
        edit(model, tiny_tokenizer, facts, method=editor)
    with pytest.raises(BadInput, match=f"adapters that are {state}"):
        made.attach(model)
    assert fingerprint(model) == before


def test_half_precision_keeps_the_adapter_in_float32(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama").to(torch.bfloat16)
    editor, facts = make()
    made = editor.fit(model, tiny_tokenizer, facts)
    assert {value.dtype for value in made.adapter.values()} == {torch.float32}
    made.attach(model)
    assert model(ids()).logits.dtype == torch.bfloat16


def test_another_model_is_refused(tiny_lm, tiny_tokenizer):
    editor, facts = make()
    made = editor.fit(tiny_lm("llama"), tiny_tokenizer, facts)
    other = tiny_lm("llama", hidden=64)
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(IncompatibleModels):
        LoraEdit.restore(made.tensors(), made.meta()).attach(other)
    assert [name for name, _ in other.named_modules()] == names


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
        ({"lr": 0}, "lr"),
        ({"steps": 4, "adaptive": True}, "steps"),
        ({"targets": ["query"]}, "targets.*q_proj"),
    ],
)
def test_bad_hyperparameters(tiny_lm, tiny_tokenizer, changes, named):
    editor, facts = make(**changes)
    with pytest.raises(BadInput, match=named):
        edit(tiny_lm("llama"), tiny_tokenizer, facts, method=editor)
