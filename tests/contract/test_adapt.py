"""What every PEFT tuner holds (the other adapters: `test_adapt_networks.py`).

Each is found in the catalogue; its own test file says how to make one.

`tests/adapt/test_<name>.py` defines `make(base, **options)`: `base` adapted by the method, with a small rank. It may
define `MERGES = False` (merging is then refused, with the reason, and changes nothing), and, for a method that has no
rank and targets of its own because it composes finished adapters, `ARGUMENTS` (what its signature holds instead) and
`REFUSED` (options that name a bad argument).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from transfuse import catalogue
from transfuse.adapt import suits
from transfuse.core.errors import BadInput, NotApplicable, TransfuseError
from transfuse.core.generate import pad_batch
from transfuse.core.training import encode_examples, fit

METHODS = [m for m in catalogue.methods(family="adapt") if suits(catalogue.get(m.slug))]
TESTS = Path(__file__).resolve().parents[1] / "adapt"
PAIRS = [
    ("The capital of France is", "Paris"),
    ("The mayor of Port Ellery is", "Ines Varro"),
    ("The bridge over the river Ostrin was built by", "Oskar Tveld"),
]
ARCHITECTURES = ["llama", "qwen2", "gemma3"]


def test_the_family_is_found():
    assert "kasa" in {m.slug for m in METHODS}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture
def home(described):
    return importlib.import_module(described.module)


@pytest.fixture
def own(described):
    """The method's own test file."""
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(own):
    return own.make


@pytest.fixture
def merges(own):
    return getattr(own, "MERGES", True)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model, rows, side="right"):
    """Per row, the logits of its own tokens."""
    ids, mask = pad_batch(rows, 0, side=side)
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)
        ).logits
    return [found[i][mask[i].bool()] for i in range(len(rows))]


def train(model, tokenizer, **options):
    return fit(model, encode_examples(tokenizer, PAIRS), lr=1e-2, batch_size=3, **{"epochs": 8, **options})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_merges_saves_and_loads(
    home, make, merges, tiny_lm, tiny_tokenizer, tmp_path, architecture
):
    rows = [tiny_tokenizer(" ".join(pair))["input_ids"] for pair in PAIRS]
    model = make(tiny_lm(architecture, layers=2))
    assert isinstance(model, PeftModel)
    history = train(model, tiny_tokenizer, epochs=30)
    assert history.losses[-1] < 0.8 * history.losses[0]
    found = logits(model, rows)

    home.save(model, tmp_path / "adapter")
    loaded = home.load(tiny_lm(architecture, layers=2), tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(logits(loaded, rows), found, strict=True))
    assert (tmp_path / "adapter" / "transfuse.json").is_file()
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}

    if not merges:
        for merge in (loaded.merge_and_unload, loaded.merge_adapter):
            with pytest.raises(NotApplicable, match="merged"):
                merge()
        assert all(torch.equal(a, b) for a, b in zip(logits(loaded, rows), found, strict=True))
        return
    merged = loaded.merge_and_unload()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(logits(merged, rows), found, strict=True))
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_only_the_adapter_is_trained(make, tiny_lm, tiny_tokenizer):
    model = make(tiny_lm("llama", layers=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = state(model)
    train(model, tiny_tokenizer)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == trainable
    assert trainable
    assert all("base_layer" not in name and "embed_tokens" not in name for name in trainable)


def test_same_seed_same_adapter(make, tiny_lm, tiny_tokenizer):
    runs = []
    for seed in (0, 0, 1):
        model = make(tiny_lm("llama", layers=2), seed=seed)
        train(model, tiny_tokenizer, seed=seed)
        runs.append(state(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_batch_and_padding_do_not_matter(make, tiny_lm, tiny_tokenizer):
    rows = [tiny_tokenizer(" ".join(pair))["input_ids"] for pair in PAIRS]
    model = make(tiny_lm("llama", layers=2))
    train(model, tiny_tokenizer)
    alone = [logits(model, [row])[0] for row in rows]
    for side in ("right", "left"):
        together = logits(model, rows, side)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(together, alone, strict=True))


def test_the_base_comes_back(described, home, make, merges, tiny_lm, tiny_tokenizer):
    """What the catalogue calls reversible is: bit for bit, after training, also when merged."""
    if not described.reversible:
        assert not hasattr(home, "restore")
        return
    for merge in (False, True) if merges else (False,):
        base = tiny_lm("llama", layers=2)
        before = state(base)
        model = make(base)
        train(model, tiny_tokenizer)
        if merge:
            model.merge_adapter()
        back = home.restore(model)
        assert same(state(back), before)


def test_bf16(make, tiny_lm, tiny_tokenizer):
    model = make(tiny_lm("llama", layers=2).to(torch.bfloat16))
    assert train(model, tiny_tokenizer).losses[-1] < 6
    assert model.base_model.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(row.isfinite().all() for row in logits(model, [[5, 6, 7]]))


def test_it_generates(make, tiny_lm, tiny_tokenizer):
    model = make(tiny_lm("llama", layers=2))
    train(model, tiny_tokenizer)
    ids = torch.tensor([tiny_tokenizer(PAIRS[0][0])["input_ids"]])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    assert out.shape == (1, ids.shape[1] + 3)


def test_its_signature_is_its_schema(described, home, own):
    """Found under its own name; everything but the model is keyword-only, typed, with a default."""
    function = getattr(home, described.slug.replace("-", "_"))
    first, *rest = inspect.signature(function).parameters.values()
    assert first.name == "model"
    for parameter in rest:
        assert parameter.kind is parameter.KEYWORD_ONLY, parameter.name
        assert parameter.annotation is not parameter.empty, parameter.name
        assert parameter.default is not parameter.empty, parameter.name
    assert {"seed", *getattr(own, "ARGUMENTS", ("r", "target_modules"))} <= {p.name for p in rest}


def test_bad_input_is_named_and_nothing_changes(own, make, tiny_lm):
    refused = getattr(own, "REFUSED", [{"r": 0}, {"r": 10_000}, {"target_modules": ["no_such_layer"]}])
    assert refused
    for options in refused:
        base = tiny_lm("llama", layers=2)
        before, modules = state(base), [name for name, _ in base.named_modules()]
        with pytest.raises(BadInput, match=next(iter(options))) as caught:
            make(base, **options)
        assert isinstance(caught.value, TransfuseError) and "\n" not in str(caught.value)
        assert same(state(base), before)
        assert [name for name, _ in base.named_modules()] == modules
