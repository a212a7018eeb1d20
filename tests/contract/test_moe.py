"""What every method of this family holds. Each is found in the catalogue; its own test file says how to make one.

A conversion's `tests/moe/test_<name>.py` defines
    BASES: names of the models it takes, as `base` knows them;
    base(name): a fresh tiny random model in float32, in evaluation mode, with at least 30 token ids;
    make(**options): the method, set up so that converting changes the logits;
    exact(name): the method set up so that converting that model leaves its logits alone;
    BAD: (options, the argument that is named) pairs that `convert` refuses on every one of BASES.
A placement's defines
    BASES, base(name): as above;
    make(model, rows): a plan for the model, from the routing of `rows` (lists of token ids), that moves experts.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from transfuse import catalogue
from transfuse.core.errors import BadInput
from transfuse.core.generate import pad_batch
from transfuse.core.training import fit
from transfuse.moe import load, save
from transfuse.moe._base import Conversion, routings

METHODS = catalogue.methods(family="moe")
TESTS = Path(__file__).resolve().parents[1] / "moe"
ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15], [21, 22, 23, 24, 25]]
DATA = [{"input_ids": row, "labels": list(row)} for row in ROWS]


def is_conversion(described):
    main = catalogue.get(described.slug)
    return inspect.isclass(main) and issubclass(main, Conversion)


def home(described):
    path = TESTS / f"test_{described.slug.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"make_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(conversions):
    chosen = [(m, home(m)) for m in METHODS if is_conversion(m) == conversions]
    return [pytest.param((t, name), id=f"{m.slug}-{name}") for m, t in chosen for name in t.BASES]


each_conversion = pytest.mark.parametrize("case", cases(True))
each_placement = pytest.mark.parametrize("case", cases(False))


def test_the_family_is_found():
    assert {"factorllm", "chain-of-experts", "rmoe"} <= {m.slug for m in METHODS if is_conversion(m)}


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(model, rows=ROWS, side="right"):
    """Per row, the logits of its own tokens."""
    ids, mask = pad_batch(rows, 0, side=side)
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)
        ).logits
    return [found[i][mask[i].bool()] for i in range(len(rows))]


def near(one, other, atol=1e-4):
    return all(torch.allclose(a, b, atol=atol, rtol=1e-4) for a, b in zip(one, other, strict=True))


def made(case, **options):
    tests, name = case
    return tests.make(**options).convert(tests.base(name))


def train(method, model, **options):
    settings = {"lr": 3e-3, "max_steps": 20, "batch_size": 3, "schedule": "constant", **options}
    return fit(model, DATA, loss=method.loss, **settings)


def batch(side="right"):
    ids, mask = pad_batch(ROWS, 0, side=side)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


# --- conversions -------------------------------------------------------------------------------------------


@each_conversion
def test_what_is_called_exact_is(case):
    tests, name = case
    expected = logits(tests.base(name))
    model = tests.exact(name).convert(tests.base(name))
    assert near(logits(model), expected, atol=1e-5 * max(float(row.abs().max()) for row in expected))
    assert not near(logits(made(case)), expected)  # and what is not, is not


@each_conversion
def test_it_learns_saves_and_loads(case, tmp_path):
    tests, name = case
    method = tests.make()
    model = method.convert(tests.base(name))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    before = state(model)
    losses = train(method, model).losses
    assert losses[-1] < losses[0] - 0.1
    changed = {n for n, tensor in state(model).items() if not torch.equal(tensor, before[n])}
    assert changed & {n for n, _ in model.named_parameters()} <= trainable
    assert any("router" in n or "gate." in n for n in changed) or method.auxiliary(model) == 0

    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    loaded.set_attn_implementation(model.config._attn_implementation)
    assert all(torch.equal(a, b) for a, b in zip(logits(loaded), logits(model), strict=True))
    assert type(loaded) is type(tests.base(name))
    assert (tmp_path / "model" / "transfuse.json").is_file()
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}
    save(loaded, tmp_path / "again")
    files = [tmp_path / where / "model.safetensors" for where in ("model", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@each_conversion
def test_batch_and_padding_do_not_matter(case):
    model = made(case)
    alone = [logits(model, [row])[0] for row in ROWS]
    for side in ("right", "left"):
        assert near(logits(model, ROWS, side), alone)


@each_conversion
def test_padding_takes_no_part_in_the_loss(case):
    """The auxiliary terms of a batch padded on either side are those of its rows, and depend on the mask."""
    tests, name = case
    method = tests.make()
    model = method.convert(tests.base(name)).train()
    found = []
    for side in ("right", "left"):
        given = batch(side)
        model(**given)
        found.append(float(method.auxiliary(model, given["attention_mask"])))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != pytest.approx(float(method.auxiliary(model)), rel=1e-6)


@each_conversion
def test_gradients_are_finite_and_stay_with_the_trainable(case):
    tests, name = case
    method = tests.make()
    model = method.convert(tests.base(name)).train()
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(method.loss(model, batch()), list(wanted.values()), allow_unused=True)
    reached = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
    assert all(g.isfinite().all() for g in reached.values())
    assert all(float(g.abs().sum()) > 0 for n, g in reached.items() if "experts" in n or "mlp" in n)
    assert len(reached) > 0.7 * len(wanted)
    copy.deepcopy(model)  # what the blocks remember of a pass does not stand in the way


@each_conversion
def test_gradient_checkpointing_changes_nothing(case):
    tests, name = case
    method = tests.make()
    model = method.convert(tests.base(name)).train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(method.loss(model, batch()), wanted, allow_unused=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = torch.autograd.grad(method.loss(model, batch()), wanted, allow_unused=True)
    for one, two in zip(plain, again, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, atol=1e-5)


@each_conversion
def test_same_seed_same_model(case):
    one, two, other = (state(made(case, seed=seed)) for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, other)


@each_conversion
def test_bf16(case):
    tests, name = case
    method = tests.make()
    model = method.convert(tests.base(name).to(torch.bfloat16))
    assert train(method, model, lr=1e-4, max_steps=2).losses[-1] < 20
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    found = logits(model)
    assert found[0].dtype == torch.bfloat16
    assert all(row.isfinite().all() for row in found)


@each_conversion
def test_it_generates(case):
    model = made(case)
    ids = torch.tensor([ROWS[0]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    out = model.generate(input_ids=ids, pad_token_id=0, eos_token_id=None, **options)
    plain = model.generate(input_ids=ids, pad_token_id=0, eos_token_id=None, use_cache=False, **options)
    assert out.shape == (1, len(ROWS[0]) + 4)
    assert torch.equal(out, plain)


@each_conversion
def test_decisions_are_remembered(case):
    model = made(case)
    logits(model)
    decisions = routings(model)
    assert decisions
    for steps in decisions.values():
        for step in steps:
            tokens, experts = step.logits.shape
            assert tokens == len(ROWS) * len(ROWS[0])
            assert step.indices.shape == step.weights.shape
            assert step.logits.dtype == torch.float32
            assert int(step.indices.min()) >= 0 and int(step.indices.max()) < experts
            assert all(len(set(row)) == len(row) for row in step.indices.tolist())


@each_conversion
def test_bad_input_is_named_and_nothing_changes(case):
    tests, name = case
    model = tests.base(name)
    before, modules = state(model), [(n, type(m)) for n, m in model.named_modules()]
    for options, argument in tests.BAD:
        with pytest.raises(BadInput, match=f"^{argument}") as caught:
            tests.make(**options).convert(model)
        assert "\n" not in str(caught.value)
    assert same(state(model), before)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    converted = tests.make().convert(model)
    with pytest.raises(BadInput, match="was converted"):
        tests.make().convert(converted)


@pytest.mark.parametrize("described", [m for m in METHODS if is_conversion(m)], ids=lambda m: m.slug)
def test_its_signature_is_its_schema(described):
    """Constructors take keyword-only, typed arguments with defaults, and store them."""
    main = catalogue.get(described.slug)
    parameters = inspect.signature(main).parameters
    assert main.slug == described.slug
    assert {"seed"} <= set(parameters)
    method = main()
    for name, parameter in parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY, name
        assert parameter.annotation is not parameter.empty, name
        assert getattr(method, name) == parameter.default, name
    assert eval(repr(method), {main.__name__: main}).arguments == method.arguments


def test_folders_that_cannot_be_read(case_folder):
    folder, break_it, message = case_folder
    break_it(folder)
    with pytest.raises(BadInput, match=message):
        load(folder)


BREAKS = {
    "no folder": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "no readable entry"),
    "another model": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "entry"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-9]
        ),
        "safetensors",
    ),
}


@pytest.fixture(params=BREAKS)
def case_folder(request, tmp_path):
    described = next(m for m in METHODS if is_conversion(m))
    tests = home(described)
    save(tests.make().convert(tests.base(tests.BASES[0])), tmp_path / "model")
    return tmp_path / "model", *BREAKS[request.param]


def test_a_plain_model_is_not_saved(tiny_lm, tmp_path):
    with pytest.raises(BadInput, match="convert it first"):
        save(tiny_lm("llama", layers=1), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- placements --------------------------------------------------------------------------------------------


@each_placement
def test_permuting_experts_leaves_the_logits_alone(case):
    tests, name = case
    model = tests.base(name)
    expected, before = logits(model), state(model)
    plan = tests.make(model, ROWS)
    assert same(state(model), before)  # solving changes nothing
    plan.permute_experts(model)
    assert not same(state(model), before)
    assert near(logits(model), expected)
    for side in ("right", "left"):
        assert near(logits(model, ROWS, side), expected)
