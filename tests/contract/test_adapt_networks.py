"""What every adapter of other networks than PEFT's language models holds. Each is found in the catalogue.

`tests/adapt/test_<name>.py` defines

- `fresh()`: a small network, the same at every call;
- `adapt(base, seed=0)`: what the method makes of it, trained a little;
- `answers(adapted, rows=None)`: its answers as one tensor, one row per example; `rows` chooses examples;
- `WRONG`: name of an argument -> a function of a fresh network that gives a bad value for it.

The method's module has `save(adapted, folder)`, `load(base, folder)` and, if it is reversible, `restore(adapted)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from transfuse import catalogue, recipe
from transfuse.adapt import suits
from transfuse.core.errors import BadInput, NotApplicable, TransfuseError
from transfuse.core.files import read_tensors

METHODS = [m for m in catalogue.methods(family="adapt") if not suits(catalogue.get(m.slug))]
TESTS = Path(__file__).resolve().parents[1] / "adapt"


def test_the_others_are_found():
    assert {"exssnet", "hicropl"} <= {m.slug for m in METHODS}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture
def home(described):
    return importlib.import_module(described.module)


@pytest.fixture
def own(described):
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_has_no_run_of_its_own(described):
    """`transfuse run` trains PEFT tuners on facts; these say so instead of failing in the middle."""
    with pytest.raises(NotApplicable, match=described.slug):
        recipe.transfer_of(described)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_saves_and_loads(home, own, tmp_path):
    adapted = own.adapt(own.fresh())
    found = own.answers(adapted)
    home.save(adapted, tmp_path / "adapter")
    loaded = home.load(own.fresh(), tmp_path / "adapter")
    assert torch.equal(own.answers(loaded), found)
    assert (tmp_path / "adapter" / "transfuse.json").is_file()
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}
    home.save(loaded, tmp_path / "again")
    for file in (tmp_path / "adapter").glob("*.safetensors"):
        (one, header), (two, other) = read_tensors(file), read_tensors(tmp_path / "again" / file.name)
        assert same(one, two) and header == other


def test_it_learns_something_else_with_another_seed(own):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (own.answers(own.adapt(own.fresh(), seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_batches_do_not_matter(own):
    adapted = own.adapt(own.fresh())
    whole = own.answers(adapted)
    order = torch.arange(len(whole)).flip(0)
    assert torch.allclose(own.answers(adapted, order), whole.flip(0), atol=1e-5)
    assert torch.allclose(own.answers(adapted, order[:1]), whole[-1:], atol=1e-5)


def test_the_base_comes_back(described, home, own):
    """What the catalogue calls reversible is: bit for bit, after training."""
    base = own.fresh()
    before, flags = state(base), {name: p.requires_grad for name, p in base.named_parameters()}
    adapted = own.adapt(base)
    if not described.reversible:
        assert not hasattr(home, "restore")
        return
    back = home.restore(adapted)
    assert back is base
    assert same(state(back), before)
    assert {name: p.requires_grad for name, p in back.named_parameters()} == flags


def test_its_signature_is_its_schema(described):
    """Settings are keyword-only, typed, and have defaults."""
    target = catalogue.get(described.slug)
    parameters = inspect.signature(target).parameters.values()
    assert next(iter(parameters)).name == "model"
    settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert settings
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty, parameter.name
        assert parameter.kind is not parameter.VAR_KEYWORD, parameter.name
    assert all(p.default is not p.empty for p in settings)


def test_bad_input_is_named_and_nothing_changes(own):
    assert own.WRONG
    for argument, attempt in own.WRONG.items():
        base = own.fresh()
        before, modules = state(base), [name for name, _ in base.named_modules()]
        with pytest.raises(BadInput, match=argument) as caught:
            attempt(base)
        assert isinstance(caught.value, TransfuseError) and "\n" not in str(caught.value)
        assert same(state(base), before)
        assert [name for name, _ in base.named_modules()] == modules
