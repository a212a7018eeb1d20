"""What every quantizer holds. Each is found in the catalogue; its own test file says how to make one.

`tests/quantize/test_<name>.py` defines `make(**options)`: the method, set up for a tiny model.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch

import transfuse
from transfuse import catalogue
from transfuse.core.errors import BadInput, TransfuseError
from transfuse.core.generate import pad_batch
from transfuse.core.models import fingerprint
from transfuse.quantize._base import PLAN_KEY, Quantized, Quantizer, layer_slots

METHODS = catalogue.methods(family="quantize")
TESTS = Path(__file__).resolve().parents[1] / "quantize"
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20, 21, 22]]
ARCHITECTURES = ["llama", "qwen2", "gemma3"]


def test_the_family_is_found():
    assert "layerwise-quant" in {m.slug for m in METHODS}


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


@pytest.fixture
def home(described):
    return importlib.import_module(described.module)


@pytest.fixture
def make(described):
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


def logits(model, rows=ROWS, side="right"):
    """Per row, the logits of its own tokens."""
    ids, mask = pad_batch(rows, 0, side=side)
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)
        ).logits
    return [found[i][mask[i].bool()] for i in range(len(rows))]


def close(one, other, atol=1e-4):
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_rounds_saves_and_loads(described, home, make, tiny_lm, tiny_tokenizer, tmp_path, architecture):
    model = tiny_lm(architecture, layers=2)
    assert isinstance(make(), Quantizer)
    done = make().quantize(model, ROWS)
    assert isinstance(done, Quantized) and done.model is model
    found = logits(model)
    assert not close(found, logits(tiny_lm(architecture, layers=2)))
    assert all(row.isfinite().all() for row in found)
    folder = done.save(tmp_path / "model", tokenizer=tiny_tokenizer)
    for loaded in (home.load(folder).model, transfuse.load(folder).model):
        assert close(logits(loaded), found)
        assert getattr(loaded.config, PLAN_KEY) == done.plan.to_dict()
    assert json.loads((folder / "transfuse.json").read_text())["method"] == described.slug
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}


def test_only_matrices_of_layers_change(make, tiny_lm):
    model, original = tiny_lm("llama", layers=2), tiny_lm("llama", layers=2)
    inside = {slot.name for slots in layer_slots(original) for slot in slots}
    make().quantize(model, ROWS)
    kept = model.state_dict()
    changed = {n for n, t in original.state_dict().items() if n not in kept or not torch.equal(kept[n], t)}
    assert changed <= inside and len(changed) > len(inside) / 2
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in inside)


def test_the_report_counts(make, tiny_lm):
    model = tiny_lm("llama", layers=2)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    inside = sum(s.parameter.numel() for slots in layer_slots(model) for s in slots)
    done = make().quantize(model, ROWS)
    report, plan = done.report, done.plan
    assert report.before == whole and report.after < report.before
    assert report.average_bits == pytest.approx(plan.average_bits)
    assert report.layers_after == pytest.approx(inside * report.stored_bits / 8)
    assert report.stored_bits > report.average_bits


def test_same_input_same_plan_whatever_the_batches(make, tiny_lm):
    one = make().quantize(tiny_lm("llama"), ROWS)
    parts = [dict(zip(("input_ids", "attention_mask"), pad_batch([row], 0))) for row in ROWS]
    ids, mask = pad_batch(ROWS, 0, side="left")
    for calib in (parts, {"input_ids": ids, "attention_mask": mask}):
        other = make().quantize(tiny_lm("llama"), calib)
        assert other.plan == one.plan and fingerprint(other.model) == fingerprint(one.model)


def test_padding_does_not_matter_afterwards(make, tiny_lm):
    model = make().quantize(tiny_lm("llama", layers=2), ROWS).model
    alone = [logits(model, [row])[0] for row in ROWS]
    assert close(logits(model), alone) and close(logits(model, side="left"), alone)


def test_bf16_and_generation(make, tiny_lm):
    model = make().quantize(tiny_lm("llama", layers=2).to(torch.bfloat16), ROWS).model
    assert model.dtype == torch.bfloat16 and all(row.isfinite().all() for row in logits(model))
    out = model.generate(
        input_ids=torch.tensor([ROWS[0]]), attention_mask=torch.ones(1, 8, dtype=torch.long), max_new_tokens=3,
        min_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert out.shape == (1, 11)


def test_bad_input_is_named_and_nothing_changes(make, tiny_lm):
    model = tiny_lm("llama", layers=2)
    before = fingerprint(model)
    for calib in ([], [[5]]):
        with pytest.raises(BadInput, match="calib") as caught:
            make().quantize(model, calib)
        assert isinstance(caught.value, TransfuseError) and "\n" not in str(caught.value)
    assert fingerprint(model) == before and not hasattr(model.config, PLAN_KEY)
    make().quantize(model, ROWS)
    with pytest.raises(BadInput, match="quantized already"):
        make().quantize(model, ROWS)


def test_its_signature_is_its_schema(described):
    """Found under its own name; everything is keyword-only, typed, with a default, and stored."""
    target = catalogue.get(described.slug)
    assert "".join(c for c in target.__name__.lower() if c.isalnum()) == described.slug.replace("-", "")
    made = target()
    for parameter in inspect.signature(target).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation is not parameter.empty
        assert getattr(made, parameter.name) == parameter.default
