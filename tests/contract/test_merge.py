"""What merging holds: static merges here by hand, the family's methods through their own test files.

`tests/merge/test_<name>.py` defines

- `make(base, experts, tokenizer, *, seed=0)`: what the method makes of tiny models that are fine-tunes of `base`: a
  module in evaluation mode, called like the base (`input_ids`, `attention_mask`), whose output has `logits`. A pack
  is applied to a copy of the base, a training is run for a few steps.
- `save(made, folder, tokenizer)` and `load(folder, base)`: to disk and back; `base` is a fresh copy of the base.
- `undo(made)`, for methods that the catalogue calls reversible: the base again.
- `IDENTITY`: whether experts that equal the base give the base.
- `ALIKE`: whether experts must have the base's shapes.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import transfuse
from transfuse import catalogue
from transfuse.core.errors import BadInput, TransfuseError
from transfuse.core.generate import pad_batch
from transfuse.core.models import fingerprint
from transfuse.core.shards import INDEX, Checkpoint
from transfuse.core.training import generator
from transfuse.merge import METHODS as STATIC
from transfuse.merge import Plan, merge

METHODS = catalogue.methods(family="merge")
TESTS = Path(__file__).resolve().parents[1] / "merge"
ROWS = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24, 25, 26, 27]]
OPTIONS = {
    "slerp": {"t": 0.25},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}


def finetuned(base, seed, scale=0.05):
    """A copy of a model whose weights have moved a little."""
    model, random = copy.deepcopy(base), generator(seed)
    for parameter in model.parameters():
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=random))
    return model


@pytest.fixture
def family(tiny_lm):
    base = tiny_lm("llama", layers=2)
    return base, [finetuned(base, 1), finetuned(base, 2)]


def folders(base, models, tokenizer, place):
    found = []
    for name, model in zip(("base", "one", "two"), (base, *models), strict=True):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        found.append(place / name)
    return found[0], found[1:]


# --- static merges -----------------------------------------------------------------------------------------


def by_hand(method, base, models, density=1.0, t=0.5):
    """One tensor in float64, one element at a time where that is the definition."""
    base, models = base.double(), [model.double() for model in models]
    if method == "linear":
        return sum(models) / len(models)
    if method == "slerp":
        a, b = (model.flatten() for model in models)
        angle = torch.arccos(a @ b / (a.norm() * b.norm()))
        if abs(float(angle.cos())) > 0.9995:
            return (1 - t) * models[0] + t * models[1]
        return (torch.sin((1 - t) * angle) * models[0] + torch.sin(t * angle) * models[1]) / torch.sin(angle)
    changes = [model - base for model in models]
    if method == "task_arithmetic":
        return base + 0.4 * sum(changes)
    assert method == "ties"
    kept = []
    for change in changes:
        order = change.abs().flatten().sort(descending=True).values
        kept.append(
            torch.where(change.abs() >= order[max(1, int(density * len(order))) - 1], change, 0.0).flatten()
        )
    merged = torch.zeros_like(kept[0])
    for i in range(len(merged)):
        values = [float(change[i]) for change in kept]
        agreeing = [v for v in values if v * sum(values) > 0]
        merged[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return base + merged.view_as(base)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_static_merges_by_hand(family, method):
    base, models = family
    options = OPTIONS.get(method, {}) | ({"scope": "tensor"} if method == "ties" else {})
    found = merge(base=base, models=models, method=method, **options)
    names = ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
    hand = {"density": 0.3, "t": 0.25}
    for name in names:
        states = [m.state_dict()[name] for m in (base, *models)]
        wanted = by_hand(method, states[0], states[1:], **hand)
        assert torch.allclose(found[name].double(), wanted, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", STATIC)
def test_identical_models_merge_to_themselves(tiny_lm, method, dtype):
    base = tiny_lm("llama", layers=1).to(dtype)
    found = merge(base=base, models=[base, copy.deepcopy(base)], method=method)
    for name, tensor in found.items():
        own = base.state_dict()[name]
        assert (
            torch.equal(tensor, own) if dtype == torch.bfloat16 else torch.allclose(tensor, own, rtol=1e-6)
        ), name


@pytest.mark.parametrize("method", STATIC)
def test_shards_and_their_order_change_nothing(family, tiny_tokenizer, tmp_path, method):
    """Folders in any cut give what models in memory give, and the result in any cut loads alike."""
    base, models = family
    options = OPTIONS.get(method, {})
    whole, parts = folders(base, models, tiny_tokenizer, tmp_path)
    tensors = load_file(parts[1] / "model.safetensors")
    (parts[1] / "model.safetensors").unlink()
    names = list(reversed(list(tensors)))
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        chosen = {name: tensors[name] for name in names if where[name] == file}
        save_file(chosen, parts[1] / file, metadata={"format": "pt"})
    (parts[1] / INDEX).write_text(json.dumps({"weight_map": where}))

    wanted = merge(base=base, models=models, method=method, **options)
    for size in (10**9, 20_000):
        target = tmp_path / f"out-{size}"
        merge(base=whole, models=parts, method=method, output=target, shard_bytes=size, **options)
        found = Checkpoint(target)
        assert found.infos.keys() == wanted.keys()
        assert all(torch.equal(found.tensor(name), wanted[name]) for name in wanted)
        assert len(list(target.glob("*.safetensors"))) == (1 if size == 10**9 else len(set(
            json.loads((target / INDEX).read_text())["weight_map"].values())))  # fmt: skip


def test_the_result_loads_and_says_where_it_came_from(family, tiny_tokenizer, tmp_path):
    base, models = family
    whole, parts = folders(base, models, tiny_tokenizer, tmp_path)
    target = merge(
        base=whole, models=parts, method="task_arithmetic", output=tmp_path / "out", dtype="bfloat16"
    )
    model, tokenizer = transfuse.load(target, dtype="float32")
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    wanted = merge(base=base, models=models, method="task_arithmetic", dtype="bfloat16")
    assert all(torch.equal(model.state_dict()[n], t.float()) for n, t in wanted.items())
    record = json.loads((target / "transfuse.json").read_text())
    assert record["method"] == "task-arithmetic" and record["arguments"]["scaling"] == 0.4
    assert record["input_sha256"] == {
        "base": fingerprint(whole), "models[0]": fingerprint(parts[0]), "models[1]": fingerprint(parts[1])
    }  # fmt: skip


def test_a_dry_run_writes_nothing(family, tiny_tokenizer, tmp_path):
    base, models = family
    whole, parts = folders(base, models, tiny_tokenizer, tmp_path)
    plan = merge(base=whole, models=parts, method="ties", output=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan) and not (tmp_path / "out").exists()
    assert plan.bytes_written == Checkpoint(whole).nbytes
    assert plan.bytes_read == 3 * 3 * Checkpoint(whole).nbytes
    assert "ties" in str(plan) and str(parts[1]) in str(plan)


# --- the methods -------------------------------------------------------------------------------------------


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture
def home(described):
    """The method's own test file."""
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(model, rows, side="right"):
    """Per row, the logits of its own tokens."""
    ids, mask = pad_batch(rows, 0, side=side)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return [found[i][mask[i].bool()] for i in range(len(rows))]


def close(found, wanted, tolerance=1e-4):
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(found, wanted, strict=True))


def test_the_family_is_found():
    assert "twin-merging" in {m.slug for m in METHODS}


def test_inputs_stay_as_they_were(home, family, tiny_tokenizer):
    base, experts = family
    before = [fingerprint(model) for model in (base, *experts)]
    home.make(base, experts, tiny_tokenizer)
    assert [fingerprint(model) for model in (base, *experts)] == before


def test_same_seed_same_result(home, family, tiny_tokenizer):
    base, experts = family
    runs = [logits(home.make(base, experts, tiny_tokenizer, seed=seed), ROWS) for seed in (3, 3)]
    assert close(*runs, tolerance=0)


def test_batch_and_padding_do_not_matter(home, family, tiny_tokenizer):
    base, experts = family
    made = home.make(base, experts, tiny_tokenizer)
    alone = [logits(made, [row])[0] for row in ROWS]
    for side in ("right", "left"):
        assert close(logits(made, ROWS, side), alone), side


def test_saved_and_loaded(home, family, tiny_tokenizer, tmp_path):
    base, experts = family
    made = home.make(base, experts, tiny_tokenizer)
    home.save(made, tmp_path / "made", tiny_tokenizer)
    loaded = home.load(tmp_path / "made", copy.deepcopy(base))
    assert close(logits(loaded, ROWS), logits(made, ROWS), tolerance=0)
    assert (tmp_path / "made" / "transfuse.json").is_file()
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}


def test_experts_like_the_base_give_the_base(home, family, tiny_tokenizer):
    base, _ = family
    if home.IDENTITY:
        made = home.make(base, [copy.deepcopy(base), copy.deepcopy(base)], tiny_tokenizer)
        assert close(logits(made, ROWS), logits(base, ROWS))


def test_the_base_comes_back(described, home, family, tiny_tokenizer):
    if not described.reversible:
        assert not hasattr(home, "undo")
        return
    base, experts = family
    before = fingerprint(base)
    made = home.make(base, experts, tiny_tokenizer)
    assert not close(logits(made, ROWS), logits(base, ROWS), tolerance=1e-6)
    assert fingerprint(home.undo(made)) == before


def test_bf16(home, family, tiny_tokenizer):
    base, experts = (family[0].to(torch.bfloat16), [m.to(torch.bfloat16) for m in family[1]])
    made = home.make(base, experts, tiny_tokenizer)
    assert all(row.isfinite().all() for row in logits(made, ROWS))


def test_it_generates(home, family, tiny_tokenizer):
    base, experts = family
    made = home.make(base, experts, tiny_tokenizer)
    ids, mask = pad_batch(ROWS, 0, side="left")
    out = made.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert out.shape == (len(ROWS), ids.shape[1] + 3)


def test_models_of_another_shape_are_refused(home, family, tiny_lm, tiny_tokenizer):
    base, experts = family
    if not home.ALIKE:
        return
    before = fingerprint(base)
    with pytest.raises(BadInput) as caught:
        home.make(base, [experts[0], tiny_lm("llama", layers=2, hidden=48)], tiny_tokenizer)
    assert isinstance(caught.value, TransfuseError) and "\n" not in str(caught.value)
    assert fingerprint(base) == before


def test_its_signature_is_its_schema(described):
    """Found under its own name; what is not a model is keyword-only, typed, with a default."""
    target = catalogue.get(described.slug)
    assert "".join(c for c in target.__name__.lower() if c.isalnum()) == described.slug.replace("-", "")
    for parameter in inspect.signature(target).parameters.values():
        assert parameter.annotation is not parameter.empty, parameter.name
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default is not parameter.empty, parameter.name
