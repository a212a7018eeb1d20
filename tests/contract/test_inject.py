"""What every injector holds. Each is found in the catalogue; its own test file says how to make one.

`tests/inject/test_<name>.py` defines `make(model, tokenizer, folder)` -> `(injector, request)`: an injector that
was prepared for `model` (files go under `folder`), and a request that changes what the model says.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from transfuse import catalogue
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.inject._base import Handle, Injector

METHODS = catalogue.methods(family="inject")
TESTS = Path(__file__).resolve().parents[1] / "inject"


def test_the_family_is_found():
    assert "parametric-rag" in {m.slug for m in METHODS}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def case(request, described, tiny_lm, tiny_tokenizer, tmp_path):
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = tiny_lm(request.param, layers=2)
    ids = torch.tensor([tiny_tokenizer("The mayor of Port Ellery is")["input_ids"]])
    return model, ids, *module.make(model, tiny_tokenizer, tmp_path / "made"), tmp_path


def state(model):
    """All that must come back: names, classes, modes, weights, flags."""
    return (
        [(name, type(m), m.training) for name, m in model.named_modules()],
        {name: t.clone() for name, t in model.state_dict().items()},
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        sorted(model.__dict__),
    )


def same(one, other):
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
        and one[2:] == other[2:]
    )


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_it_says_what_it_needs(described):
    assert described.access
    assert described.reversible


def test_apply_changes_and_rollback_restores(case):
    model, ids, injector, request, _ = case
    assert isinstance(injector, Injector)
    before, plain = state(model), logits(model, ids)
    handle = injector.apply(model, request)
    assert isinstance(handle, Handle)
    assert handle.active
    assert handle.model is model
    assert (logits(model, ids) - plain).abs().max() > 1e-4
    handle.rollback()
    assert not handle.active
    assert same(before, state(model))
    assert torch.equal(logits(model, ids), plain)
    handle.rollback()
    assert same(before, state(model))


def test_an_error_inside_the_block_restores(case):
    model, _, injector, request, _ = case
    before = state(model)
    with pytest.raises(ZeroDivisionError), injector.apply(model, request):
        raise ZeroDivisionError
    assert same(before, state(model))


def test_save_and_load_give_the_same_logits(case):
    model, ids, injector, request, folder = case
    with injector.apply(model, request) as handle:
        injected = logits(model, ids)
        handle.save(folder / "saved")
    assert (folder / "saved" / "transfuse.json").is_file()
    assert not list((folder / "saved").glob("*.bin"))
    before = state(model)
    with type(handle).load(model, folder / "saved") as again:
        assert torch.equal(logits(model, ids), injected)
        again.save(folder / "twice")
    assert same(before, state(model))
    with pytest.raises(BadInput, match="rolled back"):
        handle.save(folder / "late")
    assert not (folder / "late").exists()


def test_another_model_is_refused_and_left_alone(case, tiny_lm):
    model, _, injector, request, folder = case
    with injector.apply(model, request) as handle:
        handle.save(folder / "saved")
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    before = state(model)
    with pytest.raises(IncompatibleModels):
        injector.apply(model, request)
    with pytest.raises(IncompatibleModels):
        type(handle).load(model, folder / "saved")
    assert same(before, state(model))
