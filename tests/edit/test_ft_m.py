"""FT-M against Adam written out by hand on full float64 passes; caching, mini-batches, half precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput, TrainingDiverged
from transfuse.core.generate import encode_pair, target_nll
from transfuse.core.models import fingerprint
from transfuse.edit import edit
from transfuse.edit._layers import depth, down_projection
from transfuse.edit.ft_m import FTM, target_loss

FACTS = [
    Fact("Port Ellery", "The mayor of Port Ellery is", "Oskar Tveld"),
    Fact("Spain", "The capital of Spain is", "Quenby"),
]


def make(**changes):
    """An editor for tiny models and what it is asked to write."""
    return FTM(**{"layer": 1, "lr": 5e-3, "steps": 6, **changes}), FACTS


def exact(model):
    """float64 throughout (eager attention would take its softmax in float32)."""
    model.set_attn_implementation("sdpa")
    return model.double()


def by_hand(model, tokenizer, batches, name, *, lr, steps, loss, limit=None):
    """Adam on one weight: full passes, one row at a time, moments and clamps written out."""
    model = copy.deepcopy(model)
    weight = model.get_parameter(name)
    start = weight.detach().clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for count in range(1, steps * len(batches) + 1):
        losses = []
        for fact in batches[(count - 1) % len(batches)]:
            prompt, target = encode_pair(tokenizer, fact.prompt, fact.target)
            losses.append(loss(model, prompt, target))
        gradient = torch.autograd.grad(sum(losses) / len(losses), weight)[0]
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient * gradient
        with torch.no_grad():
            weight -= lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
            if limit is not None:
                for i in range(weight.shape[0]):
                    for j in range(weight.shape[1]):
                        low, high = start[i, j] - limit, start[i, j] + limit
                        weight[i, j] = min(max(weight[i, j], low), high)
    return weight.detach()


def forced(model, prompt, target):
    """Mean NLL of the target's tokens, each after the ones before it, from passes of their own."""
    losses = []
    for i, token in enumerate(target):
        logits = model(torch.tensor([prompt + target[:i]]), use_cache=False).logits[0, -1]
        losses.append(torch.logsumexp(logits, 0) - logits[token])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_agrees_with_adam_by_hand(tiny_lm, tiny_tokenizer, architecture):
    model = exact(tiny_lm(architecture))
    name = down_projection(model, 2) + ".weight"
    wanted = by_hand(model, tiny_tokenizer, [FACTS], name, lr=1e-3, steps=3, loss=forced)
    edit = FTM(layer=2, lr=1e-3, steps=3, batch_size=2).fit(model, tiny_tokenizer, FACTS)
    assert (wanted - model.get_parameter(name)).abs().max() > 1e-3
    assert (edit.replaced[name] - wanted).abs().max() < 1e-7


def test_mini_batches_take_turns(tiny_lm, tiny_tokenizer):
    model = exact(tiny_lm("llama"))
    name = down_projection(model, 3) + ".weight"
    wanted = by_hand(model, tiny_tokenizer, [FACTS[:1], FACTS[1:]], name, lr=1e-3, steps=2, loss=forced)
    edit = FTM(layer=3, lr=1e-3, steps=2, batch_size=1).fit(model, tiny_tokenizer, FACTS)
    assert (edit.replaced[name] - wanted).abs().max() < 1e-7


def test_loss_by_hand():
    logits = torch.tensor([[[9.0, 9.0, 9.0], [0.0, 1.0, 2.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    first = math.log(1 + math.e + math.e**2) - 2  # row 0 has one target token, at its last position
    second = (math.log(math.e + 2) - 1 + math.log(3)) / 2
    assert target_loss(logits, [[2], [0, 1]]).item() == pytest.approx((first + second) / 2)


def test_no_steps_and_low_losses_change_nothing(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    name = down_projection(model, 1) + ".weight"
    for changes in ({"steps": 0}, {"stop_below": 1e9}):
        editor, facts = make(**changes)
        assert torch.equal(editor.fit(model, tiny_tokenizer, facts).replaced[name], model.get_parameter(name))


def sure(model):
    """A tiny random model whose logits are wide enough to be sure of something."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def test_the_fact_is_learned_in_one_weight(tiny_lm, tiny_tokenizer):
    model = sure(tiny_lm("llama"))
    editor, facts = make(layer=3, steps=40)
    before = {n: p.clone() for n, p in model.named_parameters()}
    prompts, targets = [f.prompt for f in facts], [f.target for f in facts]
    with edit(model, tiny_tokenizer, facts, method=editor):
        after = torch.cat(target_nll(model, tiny_tokenizer, prompts, targets))
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [down_projection(model, 3) + ".weight"]
    assert after.mean() < 0.1


def test_bfloat16_keeps_small_steps(tiny_lm, tiny_tokenizer):
    """Steps of 1e-5 are far below bf16's resolution of these weights: only a float32 copy sums them up."""
    model = tiny_lm("llama").to(torch.bfloat16)
    editor, facts = make(lr=1e-5, steps=60, batch_size=2)
    name = down_projection(model, 1) + ".weight"
    new = editor.fit(model, tiny_tokenizer, facts).replaced[name]
    assert new.dtype == torch.bfloat16
    moved = (new.float() - model.get_parameter(name).float()).abs()
    assert 1e-4 < moved.mean() < 7e-4


def test_default_layer_is_at_two_thirds(tiny_lm):
    model = tiny_lm("llama", layers=4)
    assert depth(model, None, 21 / 32) == 3
    assert depth(tiny_lm("llama", layers=1), None, 21 / 32) == 0
    assert depth(model, 0, 21 / 32) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"steps": -1}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"layer": 4}, "layer"),
        ({"layer": -1}, "layer"),
        ({"layer": True}, "layer"),
        ({"module": "mlp.nothing"}, "module"),
    ],
)
def test_bad_hyperparameters(tiny_lm, tiny_tokenizer, changes, named):
    model = tiny_lm("llama")
    editor, facts = make(**changes)
    with pytest.raises(BadInput, match=named):
        edit(model, tiny_tokenizer, facts, method=editor)


def test_too_long_a_fact_is_named(tiny_lm, tiny_tokenizer):
    long = Fact("Spain", "Spain " * 600 + "is", "Madrid", id="f7")
    with pytest.raises(BadInput, match=r"facts\[0\] \(f7\).*512 positions"):
        edit(tiny_lm("llama"), tiny_tokenizer, [long], method="ft-m")


def test_quantized_and_meta_weights_are_refused(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    model.is_quantized = True
    with pytest.raises(BadInput, match="quantized"):
        edit(model, tiny_tokenizer, FACTS, method="ft-m")
    with pytest.raises(BadInput, match="meta device"):
        FTM().check(tiny_lm("llama").to("meta"), tiny_tokenizer, FACTS)


def test_divergence_leaves_the_model(tiny_lm, tiny_tokenizer):
    model = tiny_lm("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    before = fingerprint(model)
    with pytest.raises(TrainingDiverged):
        edit(model, tiny_tokenizer, FACTS, method="ft-m")
    assert fingerprint(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
