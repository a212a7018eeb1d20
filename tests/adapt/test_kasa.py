"""KaSA against loops in float64, through training, merging, saving and undoing."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from transfuse.adapt.kasa import (
    kasa,
    kasa_delta,
    kasa_penalty,
    kasa_regularizer,
    load,
    restore,
    save,
    spectral_report,
    truncate,
)
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.training import fit, generator, pad_collator, seeded

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def make(base, **options):
    """`base` with small adapters, for the contract of the family."""
    return kasa(base, **{"r": 4, **options})


def made(tiny_lm, **options):
    return make(tiny_lm("llama", layers=2), **options)


def rows(count=12):
    random = np.random.default_rng(0)
    ids = [random.integers(3, 400, random.integers(4, 12)).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": list(row)} for row in ids]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(tiny_lm, **options):
    model = made(tiny_lm, **options)
    fit(model, rows(), lr=1e-2, epochs=4, batch_size=4)
    return model


# --- the mathematics ---------------------------------------------------------------------------------------


def power_iteration_truncate(weight, rank):
    """Keep the largest components one by one, by power iteration in float64: shares nothing with an SVD."""
    rest = weight.double().numpy().copy()
    kept = np.zeros_like(rest)
    random = np.random.default_rng(0)
    for _ in range(min(rest.shape) - rank):
        v = random.normal(size=rest.shape[1])
        for _ in range(3000):
            v = rest.T @ (rest @ v)
            v /= np.linalg.norm(v)
        kept += np.outer(rest @ v, v)
        rest -= np.outer(rest @ v, v)
    return torch.from_numpy(kept)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_truncate_against_power_iteration(shape):
    weight = torch.randn(shape, generator=generator(1))
    world, left, right, values = truncate(weight, 2)
    assert world.shape == weight.shape and left.shape == (shape[0], 2) and right.shape == (2, shape[1])
    assert torch.allclose(world.double(), power_iteration_truncate(weight, 2), atol=1e-5)
    assert torch.allclose(world + left @ right, weight, atol=1e-6)
    assert values.tolist() == sorted(values.tolist(), reverse=True) and len(values) == 6 + (shape == (7, 7))
    again = torch.linalg.svdvals(world)
    assert again[-2:].max() < 1e-5 * values[0]  # k - rank components are left, in every shape
    assert again[-3] == pytest.approx(values[-3].item(), rel=1e-4)
    # Eckart-Young: what is lost is exactly the dropped part of the norm
    assert (weight - world).norm() == pytest.approx(values[-2:].norm().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_truncate_dtypes(dtype):
    weight = torch.randn(8, 12, generator=generator(2)).to(dtype)
    result = truncate(weight, 3)
    assert result.world.dtype == dtype
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (exact.U[:, :5] * exact.S[:5]) @ exact.Vh[:5]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert torch.allclose(result.world.double(), expected, atol=tolerance)
    zero = truncate(weight, 0)
    assert torch.equal(zero.world, weight)
    assert zero.left.shape == (8, 0)


@pytest.mark.parametrize("rank", [-1, 6, 7])
def test_truncate_refuses_rank(rank):
    with pytest.raises(BadInput, match="rank"):
        truncate(torch.randn(6, 9), rank)


def test_truncate_refuses_values():
    with pytest.raises(BadInput, match="finite"):
        truncate(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), 1)
    with pytest.raises(BadInput, match="matrix"):
        truncate(torch.zeros(3), 1)


def test_delta_and_penalty_against_loops():
    r, n, m, scaling, beta, gamma = 3, 5, 7, 2.0, 0.3, 0.7
    g = generator(3)
    a, b, d = torch.randn(r, m, generator=g), torch.randn(n, r, generator=g), torch.randn(r, generator=g)
    delta = torch.zeros(n, m, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            for k in range(r):
                delta[i, j] += scaling * b[i, k].item() * d[k].item() * a[k, j].item()
    assert torch.allclose(kasa_delta(a, b, d, scaling).double(), delta, atol=1e-5)

    def apart(rows):
        total = 0.0
        for i, x in enumerate(rows):
            for j, y in enumerate(rows):
                total += (sum(p * q for p, q in zip(x, y, strict=True)) - (i == j)) ** 2
        return math.sqrt(total)

    expected = beta * sum(x * x for x in d.tolist()) + gamma * (apart(b.T.tolist()) + apart(a.tolist()))
    assert kasa_penalty(a, b, d, beta=beta, gamma=gamma).item() == pytest.approx(expected, rel=1e-5)
    two = kasa_penalty(
        torch.stack([a, 2 * a]), torch.stack([b, b]), torch.stack([d, d]), beta=beta, gamma=gamma
    )
    assert two.shape == (2,)
    assert two[0].item() == pytest.approx(expected, rel=1e-5)


def test_penalty_limits():
    """Orthonormal factors and a zero diagonal cost nothing; then the diagonal's norm is that of the
    update."""
    q = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64, generator=generator(4))).Q
    d = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert kasa_penalty(q.T, q, torch.zeros_like(d), beta=1, gamma=1).item() < 1e-12
    assert kasa_penalty(q.T, q, d, beta=1, gamma=1).item() == pytest.approx(d.square().sum().item())
    assert kasa_delta(q.T, q, d, 1.0).norm() ** 2 == pytest.approx(d.square().sum().item())
    zero = kasa_penalty(q.T, torch.zeros_like(q), d, beta=0, gamma=2)  # B at its start: |0 - I| = sqrt(r)
    assert zero.item() == pytest.approx(2 * math.sqrt(3))
    with pytest.raises(BadInput, match="gamma"):
        kasa_penalty(q.T, q, d, beta=0, gamma=-1)


def test_penalty_gradient_by_finite_differences():
    g = generator(5)
    shapes = ((2, 5), (4, 2), (2,))
    inputs = tuple(torch.randn(s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes)

    def penalty(a, b, d):
        return kasa_penalty(a, b, d, beta=0.3, gamma=0.7)

    analytic = torch.autograd.grad(penalty(*inputs), inputs)
    for which, tensor in enumerate(inputs):
        for index in range(tensor.numel()):
            step = torch.zeros_like(tensor).view(-1)
            step[index] = 1e-6
            up, down = (
                penalty(*(t + sign * step.view_as(t) if i == which else t for i, t in enumerate(inputs)))
                for sign in (1, -1)
            )
            slope = (up - down) / 2e-6
            assert analytic[which].view(-1)[index].item() == pytest.approx(slope.item(), abs=1e-6)


# --- the adapted model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_starts_as_the_truncated_base(tiny_lm, architecture):
    base, expected = tiny_lm(architecture, layers=2), tiny_lm(architecture, layers=2)
    before = logits(base)
    model = kasa(base, r=4, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, layer in expected.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                layer.weight.copy_(truncate(layer.weight, 4).world)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.allclose(logits(model), before)


def test_forward_is_the_formula(tiny_lm):
    model = trained(tiny_lm, alpha=6)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    d, x = layer.lora_diag["default"].double(), torch.randn(3, 32, generator=generator(6))
    expected = x.double() @ layer.weight.double().T + (6 / 4) * ((x.double() @ a.T) * d) @ b.T
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert b.abs().max() > 0


def test_only_the_adapter_trains(tiny_lm):
    model = made(tiny_lm)
    before = state(model)
    fit(model, rows(), lr=1e-2, epochs=2, batch_size=4)
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    expected = {name for name in before if "lora_" in name}
    assert changed == expected
    assert {name.split(".")[-2] for name in changed if "diag" in name} == {"lora_diag"}
    assert len([name for name in changed if "lora_diag" in name]) == 4  # query and value of two layers


@pytest.mark.parametrize("safe", [True, False])
def test_merged_equals_unmerged(tiny_lm, safe):
    model = trained(tiny_lm)
    expected, before = logits(model), state(model)
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert kasa_regularizer(model).item() == 0
    model.unmerge_adapter()
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())


def test_bf16(tiny_lm):
    base = tiny_lm("llama", layers=2).to(torch.bfloat16)
    before = state(base)
    model = kasa(base, r=4)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = truncate(before["model.layers.0.self_attn.q_proj.weight"], 4).world
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, expected)
    assert layer.lora_diag["default"].dtype == layer.lora_A["default"].weight.dtype == torch.float32
    fit(model, rows(), lr=1e-2, epochs=2, batch_size=4)
    trained_state, found = state(model), logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), found, atol=0.3)  # of logits near 10
    model.unmerge_adapter()
    assert same(state(model), trained_state)
    assert same(state(restore(model)), before)


@pytest.mark.parametrize("merged", [False, True])
def test_restore_is_bitwise(tiny_lm, merged):
    base = tiny_lm("llama", layers=2)
    base.model.embed_tokens.weight.requires_grad_(False)
    before, expected = state(base), logits(base)
    wanted = {name for name, p in base.named_parameters() if p.requires_grad}
    model = kasa(base, r=4, target_modules="all-linear")
    fit(model, rows(), lr=1e-2, epochs=1, batch_size=4)
    if merged:
        model.merge_adapter()
    back = restore(model)
    assert type(back) is type(base)
    assert same(state(back), before)
    assert torch.equal(logits(back), expected)
    assert {name for name, p in back.named_parameters() if p.requires_grad} == wanted
    again = kasa(back, r=4)  # nothing of the adapter is left behind
    assert isinstance(again, PeftModel)


def test_restore_needs_a_copy(tiny_lm):
    model = made(tiny_lm, keep_base="none")
    with pytest.raises(BadInput, match="keep_base"):
        restore(model)
    assert logits(model).isfinite().all()  # and leaves the model in use


def classifier():
    config = AutoConfig.for_model(
        "bert", vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    with seeded(0):
        return AutoModelForSequenceClassification.from_config(config).eval()


def test_a_classifier_trains_its_head(tmp_path):
    base = classifier()
    before = state(base)
    model = kasa(base, r=4)  # query and value: PEFT's targets for BERT
    data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows())]
    fit(model, data, lr=1e-2, epochs=3, batch_size=4)
    head = model.get_submodule("base_model.model.classifier")
    assert not torch.equal(head.modules_to_save["default"].weight, before["classifier.weight"])
    expected = logits(model)
    save(model, tmp_path / "adapter")
    again = load(classifier(), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert same(state(restore(model)), before)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_trained_whole_is_not_truncated(tmp_path, merged):
    """A classifier's head, and `modules_to_save` that are targets too."""
    for targets, saved in (("all-linear", None), (["query", "value"], ["query"])):
        base = classifier()
        before, x = state(base), logits(base)
        model = kasa(base, r=4, target_modules=targets, modules_to_save=saved)
        now = state(model.base_model.model)
        kept = "classifier" if saved is None else "bert.encoder.layer.0.attention.self.query"
        assert torch.equal(now[f"{kept}.original_module.weight"], before[f"{kept}.weight"])
        data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows())]
        fit(model, data, lr=1e-2, epochs=1, batch_size=4)
        expected = logits(model)
        save(model, tmp_path / "adapter")
        assert torch.equal(logits(load(classifier(), tmp_path / "adapter")), expected)
        if merged:
            model.merge_adapter()
        back = restore(model)
        assert same(state(back), before) and torch.equal(logits(back), x)
    with pytest.raises(BadInput, match="trained whole"):
        kasa(classifier(), r=2, target_modules=["query"], modules_to_save=["query"])


def test_any_module_with_linear_layers(tmp_path):
    with seeded(0):
        base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5))
    before, x = state(base), torch.randn(3, 8, generator=generator(7))
    model = kasa(base, r=2, target_modules=["0", "2"])
    expected = torch.tanh(x @ truncate(before["0.weight"], 2).world.T + before["0.bias"])
    expected = expected @ truncate(before["2.weight"], 2).world.T + before["2.bias"]
    assert torch.allclose(model(x), expected, atol=1e-6)
    with pytest.raises(BadInput, match="target_modules"):
        kasa(restore(model), r=2)  # no architecture to take a default from
    assert same(state(base), before)


def test_same_seed_same_adapter(tiny_lm):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = made(tiny_lm, seed=3), made(tiny_lm, seed=3), made(tiny_lm, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert same(state(one), state(two))
    assert not same(state(one), state(other))


def test_truncate_rank_is_its_own(tiny_lm):
    base = tiny_lm("llama", layers=1)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    for cut in (0, 2, 9):
        model = kasa(tiny_lm("llama", layers=1), r=4, truncate_rank=cut)
        found = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert torch.equal(found.weight, truncate(weight, cut).world)
        assert found.lora_A["default"].weight.shape == (4, 32)


# --- the regulariser ---------------------------------------------------------------------------------------


def reference_regularizer(model, beta, gamma):
    total, layers = 0.0, 0
    named = dict(model.named_parameters())
    for name, d in named.items():
        if "lora_diag" in name:
            a = named[name.replace("lora_diag.default", "lora_A.default.weight")].detach().double()
            b = named[name.replace("lora_diag.default", "lora_B.default.weight")].detach().double()
            eye = torch.eye(len(d), dtype=torch.float64)
            total += beta * float((d.detach().double() ** 2).sum())
            total += gamma * float((b.T @ b - eye).norm() + (a @ a.T - eye).norm())
            layers += 1
    return total, layers


def test_regularizer_values(tiny_lm):
    model = trained(tiny_lm, beta=0.5, gamma=0.25)  # queries and values differ in shape: two groups
    total, layers = reference_regularizer(model, 0.5, 0.25)
    assert layers == 4
    assert kasa_regularizer(model).item() == pytest.approx(total / layers, rel=1e-5)
    assert kasa_regularizer(model, reduction="sum").item() == pytest.approx(total, rel=1e-5)
    assert model.base_model._get_kasa_loss().item() == pytest.approx(total, rel=1e-5)  # PEFT's own
    other, _ = reference_regularizer(model, 0.0, 2.0)
    assert kasa_regularizer(model, beta=0, gamma=2.0).item() == pytest.approx(other / layers, rel=1e-5)
    with model.disable_adapter():
        assert kasa_regularizer(model).item() == 0
    kasa_regularizer(model).backward()
    grown = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grown == {name for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises(BadInput, match="KaSA"):
        kasa_regularizer(tiny_lm("llama", layers=1))


def test_the_models_loss_includes_it_in_training_only(tiny_lm):
    model = made(tiny_lm, beta=0.5, gamma=0.25)
    collate = pad_collator(0)
    batch = collate(rows(4))
    plain = model.eval()(**batch).loss.item()
    assert model.train()(**batch).loss.item() - plain == pytest.approx(
        kasa_regularizer(model).item(), abs=1e-5
    )
    assert model(input_ids=IDS).loss is None
    first, *_ = model(**batch, return_dict=False)
    assert first.item() == pytest.approx(plain + kasa_regularizer(model).item(), abs=1e-5)
    with model.disable_adapter():
        assert model(**batch).loss.item() == model.eval()(**batch).loss.item()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_plain_trainer_includes_it(tmp_path, tiny_lm, accumulation):
    """One update of an ordinary Trainer, with and without: the losses differ by the regulariser, exactly
    once."""

    def run(beta, gamma):
        model = made(tiny_lm, beta=beta, gamma=gamma)
        penalty = kasa_regularizer(model).item()
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulation, save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=pad_collator(0))
        return trainer.train().training_loss, penalty

    (with_it, penalty), (without, nothing) = run(0.5, 0.25), run(0.0, 0.0)
    assert nothing == 0 and penalty > 1
    assert with_it - without == pytest.approx(penalty, rel=1e-4)


def test_regularizer_pulls_towards_orthonormal_factors(tiny_lm):
    model = made(tiny_lm, beta=0.0, gamma=10.0, dropout=0.1)
    start = kasa_regularizer(model).item()
    fit(model, rows(), lr=2e-2, epochs=30, batch_size=12, schedule="constant")
    assert kasa_regularizer(model).item() < 0.3 * start


# --- saving ------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path, tiny_lm):
    model = trained(tiny_lm, beta=0.5, reduction="sum", truncate_rank=6)
    expected = logits(model)
    save(model, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "transfuse.json", "README.md"}
    again = load(tiny_lm("llama", layers=2), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert kasa_regularizer(again).item() == kasa_regularizer(model).item()
    assert not any(p.requires_grad for p in again.parameters())
    assert same(state(restore(again)), state(tiny_lm("llama", layers=2)))
    more = load(tiny_lm("llama", layers=2), tmp_path / "adapter", trainable=True)
    assert {n for n, p in more.named_parameters() if p.requires_grad} == {
        n for n in dict(more.named_parameters()) if "lora_" in n
    }


def test_load_truncates_once(tmp_path, tiny_lm):
    model = trained(tiny_lm)
    expected = logits(model)
    save(model, tmp_path)
    truncated = model.unload()  # the base as PEFT leaves it
    again = load(truncated, tmp_path)
    assert torch.equal(logits(again), expected)
    with pytest.raises(BadInput, match="no copy"):
        restore(again)


def test_load_knows_its_base(tmp_path, tiny_lm):
    model = trained(tiny_lm)
    save(model, tmp_path)
    with pytest.raises(IncompatibleModels, match="other weights"):
        load(tiny_lm("llama", layers=2, seed=1), tmp_path)
    base = tiny_lm("llama", layers=2)
    with pytest.raises(BadInput, match="already"):
        load(kasa(base, r=2), tmp_path)
    wide = load(tiny_lm("llama", layers=2).double(), tmp_path)  # the same values in another dtype
    assert torch.allclose(logits(wide).float(), logits(model), atol=1e-4)


def test_numbers_of_numpy_are_saved(tmp_path, tiny_lm):
    model = made(tiny_lm, r=np.int64(4), alpha=np.float32(8), beta=np.float32(0.5))
    save(model, tmp_path / "a")
    again = load(tiny_lm("llama", layers=2), tmp_path / "a")
    assert torch.equal(logits(again), logits(model.eval()))
    assert kasa_regularizer(again).item() == kasa_regularizer(model).item()


def test_the_card_tells_what_peft_would_drop(tmp_path, tiny_lm):
    for rank, told in ((4, False), (0, True)):
        save(made(tiny_lm, truncate_rank=rank), tmp_path / str(rank))
        card = (tmp_path / str(rank) / "README.md").read_text()
        assert ("PEFT alone would drop 4 of their components, where 0" in card) == told


@pytest.mark.parametrize("keep_base", ["copy", "none"])
@pytest.mark.parametrize("damage", ["lost", "head", "shape"])
def test_a_failed_load_leaves_the_base_as_it_was(tmp_path, damage, keep_base):
    from transfuse.core.files import read_tensors, write_tensors

    save(kasa(classifier(), r=2), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors, _ = read_tensors(file)
    name = next(key for key in tensors if ("classifier" if damage == "head" else "lora_diag") in key)
    wrong = {name: torch.zeros(3)} if damage == "shape" else {}
    write_tensors(file, {key: value for key, value in tensors.items() if key != name} | wrong)
    base = classifier()
    frozen = base.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = state(base)
    with pytest.raises(IncompatibleModels, match="folder"):
        load(base, tmp_path / "a", keep_base=keep_base)
    assert same(before, state(base)) and not hasattr(base, "peft_config")
    assert [p for p in base.parameters() if not p.requires_grad] == [frozen]
    write_tensors(file, tensors)
    loaded = load(base, tmp_path / "a", keep_base=keep_base)
    if keep_base == "none":
        with pytest.raises(BadInput, match="no copy"):
            restore(loaded)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "4"),
        ("lora_alpha", None),
        ("target_modules", None),
        ("kasa_config", "x"),
        ("kasa_config", {"beta": -1.0}),
        ("kasa_config", {"base_hash": "0", "base_dtype": "float3"}),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path, tiny_lm, name, value):
    save(made(tiny_lm), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(CorruptFile, match=r"adapter_config\.json"):
        load(tiny_lm("llama", layers=2), tmp_path)


def test_peft_loads_it(tmp_path, tiny_lm):
    model = trained(tiny_lm)
    save(model, tmp_path)
    plain = PeftModel.from_pretrained(tiny_lm("llama", layers=2), tmp_path)
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def pefts(tiny_lm, folder, **options):
    """PEFT's own KaSA adapter, saved by PEFT."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], kasa_config=KasaConfig(), task_type="CAUSAL_LM", **options
    )
    with seeded(0):
        theirs = get_peft_model(tiny_lm("llama", layers=2), config)
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_it_loads_pefts(tmp_path, tiny_lm, options):
    theirs = pefts(tiny_lm, tmp_path, **options)
    ours = load(tiny_lm("llama", layers=2), tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {"v_proj": 2}},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["v_proj"]},
    ],
)
def test_load_refuses_what_it_does_not_offer(tmp_path, tiny_lm, options):
    pefts(tiny_lm, tmp_path, **options)
    base = tiny_lm("llama", layers=2)
    before = state(base)
    with pytest.raises(NotApplicable, match=next(iter(options))):
        load(base, tmp_path)
    assert same(before, state(base))


def test_load_refuses(tmp_path, tiny_lm):
    base = tiny_lm("llama", layers=2)
    before = state(base)
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        load(base, tmp_path)
    save(made(tiny_lm), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps({**stored, "kasa_config": None}))
    with pytest.raises(BadInput, match="another kind"):
        load(base, tmp_path / "a")
    config.write_text("{")
    with pytest.raises(CorruptFile, match="unreadable"):
        load(base, tmp_path / "a")
    config.write_text(json.dumps(stored))
    whole = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(CorruptFile, match="safetensors"):
        load(base, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(CorruptFile, match="lacks"):
        load(base, tmp_path / "a")
    assert same(before, state(base))


# --- errors and report -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 16}, "r = 16.*v_proj"),  # the value projection is 16 x 32
        ({"r": 0}, "r"),
        ({"truncate_rank": 16}, "truncate_rank"),
        ({"truncate_rank": -1}, "truncate_rank"),
        ({"beta": -1e-4}, "beta"),
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"beta": math.inf}, "beta"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"r": 2.5}, "r"),
        ({"truncate_rank": 1.5}, "truncate_rank"),
        ({"modules_to_save": ["nope"]}, "modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"reduction": "max"}, "reduction"),
        ({"keep_base": "disk"}, "keep_base"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": "0.1"}, "dropout"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["query"]}, "target_modules.*q_proj"),
    ],
)
def test_refuses(tiny_lm, options, named):
    base = tiny_lm("llama", layers=2)
    before = state(base)
    with pytest.raises(BadInput, match=named) as caught:
        kasa(base, **options)
    assert "\n" not in str(caught.value)
    assert same(before, state(base))  # nothing was truncated


def test_refuses_layers_it_cannot_truncate(tiny_lm):
    with pytest.raises(NotApplicable, match="Conv1D"):
        kasa(tiny_lm("gpt2", layers=1), target_modules=["c_attn"])
    with pytest.raises(NotApplicable, match="Embedding"):
        kasa(tiny_lm("llama", layers=1), target_modules=["embed_tokens"])
    with pytest.raises(NotApplicable, match="meta"):
        kasa(tiny_lm("llama", layers=1).to("meta"))
    tied = tiny_lm("llama", layers=1)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(NotApplicable, match="shares"):
        kasa(tied, target_modules=["lm_head"])
    quantised = tiny_lm("llama", layers=1)
    layer = quantised.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(NotApplicable, match="quantised"):
        kasa(quantised, r=4)
    broken = tiny_lm("llama", layers=1)
    broken.model.layers[0].self_attn.v_proj.weight.data[0, 0] = math.inf
    with pytest.raises(BadInput, match=r"v_proj.*finite"):
        kasa(broken, r=4)
    with pytest.raises(BadInput, match="already"):
        kasa(kasa(tiny_lm("llama", layers=1), r=2), r=2)


def test_spectral_report(tiny_lm):
    base = tiny_lm("llama", layers=2)
    weight = base.model.layers[1].self_attn.v_proj.weight.detach().double()
    before = spectral_report(base, rank=4)
    after = spectral_report(kasa(base, r=4))
    assert [row.name for row in before] == [row.name for row in after]
    row = next(row for row in after if row.name == "model.layers.1.self_attn.v_proj")
    values = torch.linalg.svdvals(weight)
    assert (row.shape, row.rank) == ((16, 32), 4)
    energy = float(values[12:].square().sum() / weight.square().sum())
    assert row.tail_energy == pytest.approx(energy, rel=1e-4)
    assert (row.smallest_kept, row.largest_dropped) == pytest.approx(
        (values[11].item(), values[12].item()), rel=1e-4
    )
    assert before[3].tail_energy == pytest.approx(after[3].tail_energy, rel=1e-4)
    with pytest.raises(BadInput, match="rank"):
        spectral_report(tiny_lm("llama", layers=1), rank=16)
    with pytest.raises(BadInput, match="dropped nothing"):
        spectral_report(kasa(tiny_lm("llama", layers=1), r=2, truncate_rank=0))


def test_what_needs_an_adapted_model_says_so(tmp_path, tiny_lm):
    base = tiny_lm("llama", layers=1)
    lora = get_peft_model(tiny_lm("llama", layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    for call in (restore, spectral_report, functools.partial(save, folder=tmp_path)):
        with pytest.raises(BadInput, match="KaSA"):
            call(lora)
    for call in (restore, functools.partial(save, folder=tmp_path)):
        with pytest.raises(BadInput, match="KaSA"):
            call(base)
