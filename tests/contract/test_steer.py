"""What every steering method holds. Each is found in the catalogue; its own test file says how to make one.

`tests/steer/test_<name>.py` defines `make(model, tokenizer)` -> `(method, inputs, first)`: an instance that
changes something, the positional arguments of its `generate`, and the texts its first stream reads.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from transfuse import catalogue
from transfuse.core.errors import NotApplicable
from transfuse.core.generate import generate_texts, pad_batch
from transfuse.core.training import generator
from transfuse.steer._base import Combining, Steer

METHODS = catalogue.methods(family="steer")
SEARCH = {
    "ck-plug",
    "dynamic-logits-fusion",
    "proxy-tuning",
    "sparkle",
}  # these decode through core.lockstep: with beams too
TESTS = Path(__file__).resolve().parents[1] / "steer"


def test_the_family_is_found():
    assert "ck-plug" in {m.slug for m in METHODS}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture(params=["llama", "gpt2", "qwen2", "gemma3"])
def case(request, described, tiny_lm, tiny_tokenizer):
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = tiny_lm(request.param, layers=2)
    return model, tiny_tokenizer, *module.make(model, tiny_tokenizer)


def test_it_says_what_it_needs(described):
    assert "logits" in described.access
    assert described.reversible


def test_neutral_is_the_plain_model(case):
    model, tokenizer, method, inputs, first = case
    assert isinstance(method, Steer)
    plain = method.neutral().generate(*inputs, max_new_tokens=10)
    assert plain == generate_texts(model, tokenizer, first, max_new_tokens=10)
    assert plain != method.generate(*inputs, max_new_tokens=10)  # and the instance itself is not neutral


def test_cache_and_batches_do_not_matter(case):
    _, _, method, inputs, _ = case
    answers = method.generate(*inputs, max_new_tokens=10)
    assert method.generate(*inputs, max_new_tokens=10, use_cache=False) == answers
    for size in (1, 2):
        assert method.generate(*inputs, max_new_tokens=10, batch_size=size) == answers


def test_no_weight_changes(case):
    model, _, method, inputs, _ = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method.generate(*inputs, max_new_tokens=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_rows_are_combined_one_by_one(case):
    _, _, method, _, _ = case
    if not isinstance(method, Combining):
        return  # one stream: nothing is combined
    streams = [torch.randn(3, 50, generator=generator(seed)) * 3 for seed in range(method.streams)]
    whole = method.combine([z.clone() for z in streams])
    rows = torch.cat([method.combine([z[b : b + 1] for z in streams]) for b in range(3)])
    assert whole.shape == (3, 50)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, rows)


def searched(described, method, inputs, **options):
    """Answers of a search with three beams; None where the method refuses, which those in SEARCH may not."""
    try:
        return method.generate(*inputs, max_new_tokens=10, num_beams=3, **options)
    except NotApplicable:
        assert described.slug not in SEARCH
        return None


@pytest.mark.parametrize("options", [{}, {"length_penalty": 2.0, "early_stopping": True}])
def test_neutral_beams_are_those_of_the_plain_model(described, case, options):
    model, tokenizer, method, inputs, first = case
    answers = searched(described, method.neutral(), inputs, **options)
    ids, mask = pad_batch([tokenizer(text)["input_ids"] for text in first], 0, side="left")
    plain = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=10, num_beams=3, **options
    )[:, ids.shape[1] :]
    texts = [text.lstrip(" ") for text in tokenizer.batch_decode(plain, skip_special_tokens=True)]
    assert answers in (None, texts)


def test_beams_do_not_depend_on_cache_and_batches(described, case):
    _, _, method, inputs, _ = case
    answers = searched(described, method, inputs)
    assert searched(described, method, inputs, use_cache=False) == answers
    assert searched(described, method, inputs, batch_size=1) == answers


def test_modes_that_cannot_be_right_are_refused(case):
    _, _, method, inputs, _ = case
    modes = [{"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}]
    if isinstance(method, Combining):
        modes.append({"num_beams": 2, "do_sample": True})
    for options in modes:
        with pytest.raises(NotApplicable):
            method.generate(*inputs, max_new_tokens=2, **options)
