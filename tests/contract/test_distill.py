"""What every method of the family distill holds. Each is found in the catalogue; its test file shows its cores.

`tests/distill/test_<name>.py` defines `CASES`, a list of `distilling.Case`, and `train(seed)`, a short run of the
method's own trainer that returns `distilling.Trained`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from pathlib import Path

import pytest
import torch

from transfuse import catalogue

METHODS = catalogue.methods(family="distill")
TESTS = Path(__file__).resolve().parents[1] / "distill"


def load(slug: str):
    path = TESTS / f"test_{slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"shown_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown_or_error(slug: str):
    try:
        return load(slug)
    except Exception as error:  # told by the test of that method, so that the others can run
        return error


SHOWN = {method.slug: shown_or_error(method.slug) for method in METHODS}
CASES = [(slug, case) for slug, module in SHOWN.items() for case in getattr(module, "CASES", ())]
SEEDS = (0, 1)


@pytest.fixture(params=CASES, ids=lambda pair: f"{pair[0]}-{pair[1].name}")
def case(request):
    return request.param[1]


@pytest.fixture(params=METHODS, ids=lambda m: m.slug)
def described(request):
    return request.param


def live(case, inputs):
    """The inputs with gradients where the case learns."""
    return {k: v.clone().requires_grad_() if k in case.learns else v for k, v in inputs.items()}


def value_and_slopes(case, inputs):
    inputs = live(case, inputs)
    loss = case.loss(inputs)
    slopes = torch.autograd.grad(loss, [inputs[k] for k in case.learns], allow_unused=True)
    return loss.detach(), dict(zip(case.learns, slopes, strict=True))


def test_the_family_is_found_and_shows_its_cores(described):
    shown = SHOWN[described.slug]
    assert not isinstance(shown, Exception), f"{described.slug}: {shown!r}"
    assert shown.CASES, f"{described.slug} shows no numeric core"
    for case in shown.CASES:
        for name in ("least", "padded", "excluded"):
            if getattr(case, name) is None:
                assert len(case.without.get(name, "")) > 10, f"{case.name}: why has it no {name}?"


def test_value_against_an_independent_implementation(case):
    for seed in SEEDS:
        inputs = case.inputs(seed)
        value = case.loss(inputs)
        assert value.dim() == 0
        assert float(value) == pytest.approx(float(case.reference(inputs, inputs)), rel=1e-8, abs=1e-10)


def test_gradient_against_finite_differences_of_that(case):
    """Along random directions; what the method detaches stays fixed in the differences."""
    for seed in SEEDS:
        inputs = case.inputs(seed)
        _, slopes = value_and_slopes(case, inputs)
        generator = torch.Generator().manual_seed(seed + 100)
        for name in case.learns:
            assert slopes[name] is not None, f"no gradient reaches {name}"
            direction = torch.randn(inputs[name].shape, generator=generator, dtype=inputs[name].dtype)
            step = 1e-5
            ends = [
                float(case.reference({**inputs, name: inputs[name] + sign * step * direction}, inputs))
                for sign in (1, -1)
            ]
            expected = (ends[0] - ends[1]) / (2 * step)
            found = float((slopes[name] * direction).sum())
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-7), name


def test_a_split_of_the_batch(case):
    inputs = case.inputs(2)
    size = len(next(iter(inputs.values())))
    parts = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(size)]
    if case.couples:
        assert len(case.couples) > 10
        return
    counts = [case.count(part) for part in parts]
    total = sum(float(case.loss(p)) * n for p, n in zip(parts, counts, strict=True) if n) / sum(counts)
    assert total == pytest.approx(float(case.loss(inputs)), rel=1e-9, abs=1e-12)


def test_the_order_of_the_batch(case):
    inputs = case.inputs(3)
    size = len(next(iter(inputs.values())))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    moved = {k: v[order] for k, v in inputs.items()}
    assert float(case.loss(moved)) == pytest.approx(float(case.loss(inputs)), rel=1e-9, abs=1e-12)


def test_padding(case):
    if case.padded is None:
        return  # the reason is asserted above
    inputs = case.inputs(4)
    value, slopes = value_and_slopes(case, inputs)
    more, grown = value_and_slopes(case, case.padded(inputs))
    assert float(more) == pytest.approx(float(value), rel=1e-9, abs=1e-12)
    for name in case.learns:
        own = grown[name][tuple(slice(0, n) for n in slopes[name].shape)]
        assert torch.allclose(own, slopes[name], atol=1e-10)
        assert float(grown[name].nan_to_num(nan=7e7).abs().sum()) == pytest.approx(
            float(own.abs().sum()), rel=1e-6
        ), "a gradient reaches the padding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(case, dtype):
    """Computed from rounded inputs, not with rounded arithmetic."""
    exact = case.inputs(5)
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in exact.items()}
    again = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
    value, slopes = value_and_slopes(case, rounded)
    assert float(value) == pytest.approx(float(case.loss(again)), rel=2e-3, abs=2e-4)
    assert all(slope.isfinite().all() and slope.dtype == dtype for slope in slopes.values())


def test_the_minimum(case):
    """Where the student says what it is taught, the loss is least and its slope is zero."""
    if case.least is None:
        return
    inputs = case.least(case.inputs(6))
    value, slopes = value_and_slopes(case, inputs)
    assert float(value) == pytest.approx(case.least_value(inputs), abs=1e-9)
    assert all(float(slope.abs().max()) < 1e-7 for slope in slopes.values())


def test_excluded_tokens(case):
    """Logits of -inf give no NaN, in value or slope."""
    if case.excluded is None:
        return
    value, slopes = value_and_slopes(case, case.excluded(case.inputs(7)))
    if case.excluded_value is None:
        assert math.isfinite(float(value))
    else:
        assert float(value) == pytest.approx(case.excluded_value)
    assert not any(slope.isnan().any() for slope in slopes.values())


def test_it_trains_repeats_and_leaves_teachers_alone(described):
    """A short run lowers the loss, gives the same weights again, and what is kept is the bare student."""
    runs = [SHOWN[described.slug].train(seed) for seed in (0, 0)]
    run = runs[0]
    tenth = max(1, len(run.losses) // 10)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert sum(run.losses[-tenth:]) < sum(run.losses[:tenth])
    kept = {name: tuple(p.shape) for name, p in run.student.named_parameters()}
    assert kept == run.shapes
    states = [each.student.state_dict() for each in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for before, module in run.untouched:
        after = module.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_signature_is_its_schema(described):
    """Found under its own name; what it takes beside models is keyword-only, typed, with a default."""
    target = catalogue.get(described.slug)
    signature = inspect.signature(target)
    assert signature.parameters
    for parameter in signature.parameters.values():
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter.name
        assert parameter.annotation is not parameter.empty, parameter.name
