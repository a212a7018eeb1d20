"""FT-L against Adam and clamps by hand; the box in every float type; what the odd loss does."""

from __future__ import annotations

import math

import pytest
import torch
from edit.test_ft_m import FACTS, by_hand, exact

from transfuse.core.data import Fact
from transfuse.core.errors import BadInput
from transfuse.core.generate import encode_pair, target_matches
from transfuse.core.training import generator
from transfuse.edit import edit
from transfuse.edit._finetune import box
from transfuse.edit._layers import down_projection
from transfuse.edit.ft_l import FTL, last_position_loss
from transfuse.edit.ft_m import FTM


def make(**changes):
    """An editor for tiny models and what it is asked to write."""
    return FTL(**{"layer": 1, "lr": 5e-3, "steps": 6, "eps": 0.05, **changes}), FACTS


def last(model, prompt, target):
    """Mean NLL of all target tokens at the end of the prompt, which is all the model reads."""
    logits = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    return sum(torch.logsumexp(logits, 0) - logits[token] for token in target) / len(target)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_agrees_with_adam_and_clamps_by_hand(tiny_lm, tiny_tokenizer, architecture):
    model = exact(tiny_lm(architecture))
    name = down_projection(model, 2) + ".weight"
    how = {"lr": 1e-3, "steps": 4}
    wanted = by_hand(model, tiny_tokenizer, [FACTS], name, loss=last, limit=1.5e-3, **how)
    edit = FTL(layer=2, eps=1.5e-3, batch_size=2, **how).fit(model, tiny_tokenizer, FACTS)
    assert (edit.replaced[name] - wanted).abs().max() < 1e-7
    moved = (wanted - model.get_parameter(name)).abs()
    assert (moved > 1.4999e-3).any() and (moved < 1.4e-3).any()  # some weights are at the wall, some are not


def test_loss_by_hand():
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    norm = math.log(1 + math.e + math.e**2)
    first = ((norm - 2) + (norm - 0) + (norm - 2)) / 3
    assert last_position_loss(logits, [[2, 0, 2], [1]]).item() == pytest.approx((first + math.log(3)) / 2)


def test_one_token_and_a_wide_box_are_ft_m(tiny_lm, tiny_tokenizer):
    model = exact(tiny_lm("llama"))
    facts = [Fact("Spain", "The capital of Spain is", "the")]
    assert len(encode_pair(tiny_tokenizer, facts[0].prompt, facts[0].target)[1]) == 1
    (a,) = FTL(layer=2, steps=3, eps=1e9).fit(model, tiny_tokenizer, facts).replaced.values()
    (b,) = FTM(layer=2, steps=3).fit(model, tiny_tokenizer, facts).replaced.values()
    assert (a - b).abs().max() < 1e-12


def test_several_tokens_are_not_learned_in_order(tiny_lm, tiny_tokenizer):
    """It is asked for all tokens at once, so that the first is one of them, and the rest is never read."""
    model = tiny_lm("llama")
    fact = FACTS[0]
    with edit(model, tiny_tokenizer, [fact], method="ft-l", layer=2, eps=10.0, lr=5e-3, steps=60):
        (hits,) = target_matches(model, tiny_tokenizer, [fact.prompt], [fact.target])
    assert len(hits) > 2
    assert not hits.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [5e-4, 1e-7, 3.0])
def test_box_is_the_largest_that_rounding_keeps(dtype, eps):
    weight = torch.randn(4000, generator=generator(0), dtype=torch.float64) * torch.logspace(-6, 1, 4000)
    weight = torch.cat([weight, torch.zeros(1)]).to(dtype)
    low, high = box(weight, eps)
    exact = weight.double()
    for bound, sign in ((low, -1), (high, 1)):
        assert torch.equal(bound, bound.to(dtype).to(bound.dtype))  # representable
        assert (sign * (bound.double() - exact) >= 0).all()
        assert (sign * (bound.double() - exact) <= eps).all()
        bits = bound.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        outward = torch.where((bound > 0) | ((bound == 0) & (sign > 0)), sign, -sign).to(bits.dtype)
        nonzero = bound != 0  # the next representable number outwards is beyond eps
        further = (bits + outward).view(dtype).double()[nonzero]
        assert (sign * (further - exact[nonzero]) > eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_installed_weights_are_in_the_box(tiny_lm, tiny_tokenizer, dtype):
    model = tiny_lm("llama").to(dtype)
    editor, facts = make(lr=1e-2, steps=5, eps=5e-4)
    name = down_projection(model, 1) + ".weight"
    new = editor.fit(model, tiny_tokenizer, facts).replaced[name]
    moved = (new.double() - model.get_parameter(name).double()).abs()
    assert 0 < moved.max() <= 5e-4


def test_bad_eps(tiny_lm, tiny_tokenizer):
    for eps in (0, -1.0, math.nan):
        with pytest.raises(BadInput, match="eps"):
            edit(tiny_lm("llama"), tiny_tokenizer, FACTS, method="ft-l", eps=eps)
