"""LoRAMoE against loops in float64: mixture, balance, types, several adapters, saving and undoing."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from transfuse.adapt import transfer
from transfuse.adapt.kasa import kasa
from transfuse.adapt.kasa import save as save_kasa
from transfuse.adapt.loramoe import (
    LoraMoeConfig,
    LoraMoeLinear,
    balance,
    collator,
    expert_mixture,
    load,
    localized_balancing_loss,
    loramoe,
    restore,
    route,
    route_mass,
    router_report,
    save,
    task_types,
)
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.lineage import read_lineage
from transfuse.core.training import fit, generator, seeded

MERGES = False
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def make(base, **options):
    """`base` with two small experts per layer, for the contract of the family."""
    return loramoe(base, **{"r": 2, "num_experts": 2, "beta": 0.0, **options})


def shaken(model, scale=0.3):
    """The adapted model with experts that do something."""
    random = generator(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loramoe_B" in name or "loramoe_router" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=random))
    return model


def made(tiny_lm, **options):
    return shaken(
        loramoe(tiny_lm("llama", layers=2), **{"r": 3, "num_experts": 4, "dropout": 0.0, **options})
    )


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraMoeLinear)]


# --- the mathematics ---------------------------------------------------------------------------------------


def slow_loss(mass, types, delta):
    """The constraint by loops, in Python's floats."""
    batch, experts = len(mass), len(mass[0])
    z = []
    for s in range(batch):
        for i in range(experts):
            first = i < experts // 2
            meets = (types[s] == 1 and first) or (types[s] == 0 and not first)
            z.append((1 + delta if meets else 1 - delta) * mass[s][i])
    mean = sum(z) / len(z)
    return sum((v - mean) ** 2 for v in z) / (len(z) - 1) / (mean**2 + 1e-10)


def test_mixture_against_loops():
    n_experts, r, n, m, scaling = 3, 2, 5, 7, 1.5
    random = generator(0)
    x = torch.randn(2, 4, m, generator=random)
    router = torch.randn(n_experts, m, generator=random)
    a, b = (torch.randn(n_experts, *shape, generator=random) for shape in ((r, m), (n, r)))
    weights = route(x, router)
    out = expert_mixture(x, weights, a, b, scaling)
    for s in range(2):
        for t in range(4):
            scores = [
                sum(router[i, k].item() * x[s, t, k].item() for k in range(m)) for i in range(n_experts)
            ]
            exps = [math.exp(score - max(scores)) for score in scores]
            w = [e / sum(exps) for e in exps]
            assert weights[s, t].tolist() == pytest.approx(w, rel=1e-4)
            for j in range(n):
                total = 0.0
                for i in range(n_experts):
                    for k in range(r):
                        inner = sum(a[i, k, c].item() * x[s, t, c].item() for c in range(m))
                        total += w[i] * b[i, j, k].item() * inner
                assert out[s, t, j].item() == pytest.approx(scaling * total, rel=1e-3, abs=1e-4)


def test_one_kind_of_expert_is_a_single_lora():
    """Equal experts add what one of them would, whatever the router says."""
    random = generator(1)
    x, router = torch.randn(3, 6, generator=random), torch.randn(4, 6, generator=random)
    a, b = torch.randn(2, 6, generator=random), torch.randn(5, 2, generator=random)
    out = expert_mixture(x, route(x, router), a.expand(4, -1, -1), b.expand(4, -1, -1), 2.0)
    torch.testing.assert_close(out, 2.0 * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)


def test_the_softmax_is_float32():
    x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    router = torch.tensor([[1.0, 0.0], [0.996, 0.0]], dtype=torch.bfloat16)
    weights = route(x, router)
    assert weights.dtype == torch.float32
    assert weights[0, 0] != weights[0, 0].to(torch.bfloat16)
    assert route(x.double(), router.double()).dtype == torch.float64


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("types", [[1, 0, 1], [0, 0, 0]])
def test_loss_against_loops(delta, types):
    mass = torch.rand(3, 4, generator=generator(2)) + 0.1
    found = localized_balancing_loss(mass, types, delta)
    assert found.item() == pytest.approx(slow_loss(mass.tolist(), types, delta), rel=1e-5)
    # free of the samples' common length, and of the order of the samples
    assert localized_balancing_loss(50 * mass, types, delta).item() == pytest.approx(found.item(), rel=1e-4)
    turned = localized_balancing_loss(mass.flip(0), types[::-1], delta)
    assert turned.item() == pytest.approx(found.item(), rel=1e-5)


def test_loss_by_hand():
    # one sample of type 1, two experts of mass 3 and 1, delta 0.5: Z = 4.5, 0.5; mean 2.5, variance 8
    assert localized_balancing_loss(torch.tensor([[3.0, 1.0]]), [1], 0.5).item() == pytest.approx(8 / 6.25)
    # type 0: Z = 1.5, 1.5
    assert localized_balancing_loss(torch.tensor([[3.0, 1.0]]), [0], 0.5).item() == pytest.approx(0.0)


def test_loss_is_smallest_where_mass_is_inverse_to_importance():
    """Orientation: knowledge (type 1) goes to the second half."""
    delta = 0.1
    best = torch.tensor([[1 / 1.1, 1 / 1.1, 1 / 0.9, 1 / 0.9], [1 / 0.9, 1 / 0.9, 1 / 1.1, 1 / 1.1]])
    assert localized_balancing_loss(best, [1, 0], delta).item() == pytest.approx(0, abs=1e-10)
    assert localized_balancing_loss(best, [0, 1], delta) > 0.03
    assert localized_balancing_loss(torch.ones(2, 4), [1, 0], 0.0).item() == 0


def test_loss_gradient_by_finite_differences():
    mass = (torch.rand(2, 4, generator=generator(3), dtype=torch.float64) + 0.1).requires_grad_()
    (analytic,) = torch.autograd.grad(localized_balancing_loss(mass, [1, 0], 0.2), mass)
    for index in range(8):
        step = torch.zeros(8, dtype=torch.float64)
        step[index] = 1e-6
        up, down = (
            localized_balancing_loss(mass.detach() + sign * step.view(2, 4), [1, 0], 0.2) for sign in (1, -1)
        )
        assert analytic.view(-1)[index].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-6)


def test_mass_leaves_padding_out():
    weights = torch.rand(2, 3, 4, generator=generator(4))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    found = route_mass(weights, mask)
    torch.testing.assert_close(found[0], weights[0, 0] + weights[0, 1])
    torch.testing.assert_close(found[1], weights[1, 1] + weights[1, 2])
    torch.testing.assert_close(route_mass(weights), weights.sum(1))
    assert torch.equal(route_mass(weights[:, 0]), weights[:, 0])


@pytest.mark.parametrize(
    ("mass", "types", "delta", "complaint"),
    [
        (torch.ones(2, 4), [1], 0.1, "batch of 2"),
        (torch.ones(2, 4), [1, 2], 0.1, "zeros and ones"),
        (torch.ones(2, 3), [1, 0], 0.1, "odd"),
        (torch.ones(2, 1), [1, 0], 0.0, "below 2"),
        (torch.ones(2, 4), [1, 0], 1.0, "delta"),
    ],
)
def test_loss_refuses(mass, types, delta, complaint):
    with pytest.raises(BadInput, match=complaint):
        localized_balancing_loss(mass, types, delta)
    assert localized_balancing_loss(torch.ones(2, 3), [1, 0], 0.0).item() == 0  # odd is no matter at delta 0


# --- the adapted model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_starts_as_the_base(tiny_lm, architecture):
    before = logits(tiny_lm(architecture, layers=2))
    model = loramoe(tiny_lm(architecture, layers=2), r=2, num_experts=2)
    assert torch.equal(logits(model), before)
    assert {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoraMoeLinear)} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    with model.disable_adapter():
        assert torch.equal(logits(shaken(model)), before)
    assert not torch.equal(logits(model), before)


def test_parameters_are_as_many_as_said(tiny_lm):
    model = loramoe(tiny_lm("llama", layers=2), r=3, num_experts=4, target_modules=["up_proj"])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 2 * (4 * 3 * (32 + 96) + 4 * 32)


def test_forward_is_the_formula(tiny_lm):
    model = made(tiny_lm)
    layer = layers(model)[0]
    x = torch.randn(2, 3, layer.in_features, generator=generator(5))
    a, b, router = (getattr(layer, f"loramoe_{n}")["default"].double() for n in ("A", "B", "router"))
    w = torch.softmax(x.double() @ router.T, -1)
    expected = x.double() @ layer.base_layer.weight.double().T
    for i in range(4):
        expected += 32 / 3 * w[..., i, None] * (x.double() @ a[i].T @ b[i].T)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_dropout_leaves_the_router_alone(tiny_lm):
    model = made(tiny_lm, dropout=0.5)
    assert not any(module.training for module in layers(model))  # as the base was
    layer = layers(model.train())[0]
    x = torch.randn(1, 2, layer.in_features, generator=generator(6))
    with seeded(0):
        out = layer(x)
    with seeded(0):
        dropped = torch.nn.functional.dropout(x, 0.5)
    a, b = layer.loramoe_A["default"], layer.loramoe_B["default"]
    added = expert_mixture(dropped, route(x, layer.loramoe_router["default"]), a, b, 32 / 3)
    torch.testing.assert_close(out, layer.base_layer(x) + added)


def training_pass(model, **options):
    model.train()
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, **options)


def test_the_loss_holds_the_balance(tiny_lm):
    model = made(tiny_lm, beta=0.3, delta=0.2)
    bare = training_pass(made(tiny_lm, beta=0.0)).loss
    out = training_pass(model, task_types=torch.tensor([1, 0]))
    seen = []
    for layer in layers(model):  # again, with each router's input recorded by hand
        layer.register_forward_pre_hook(lambda module, args: seen.append((module, args[0].detach().double())))
    training_pass(model, task_types=torch.tensor([1, 0]))
    slow = 0.0
    for layer, x in seen:
        mass = torch.softmax(x @ layer.loramoe_router["default"].double().T, -1).sum(1)
        slow += 0.3 * slow_loss(mass.tolist(), [1, 0], 0.2)
    assert len(seen) == 6
    assert (out.loss - bare).item() == pytest.approx(slow, rel=1e-3)
    assert balance(model).item() == pytest.approx(slow, rel=1e-4)
    with task_types([1, 0]):
        assert torch.equal(training_pass(model).loss, out.loss)
        other = training_pass(model, task_types=[0, 1]).loss  # the batch's own come first
    assert other != out.loss
    gradients = torch.autograd.grad(
        balance(model), [layer.loramoe_router["default"] for layer in layers(model)]
    )
    assert all(g.abs().max() > 0 for g in gradients)
    assert torch.equal(model.eval()(input_ids=IDS, labels=IDS, task_types=[1, 0]).loss, bare)


def test_padding_is_masked_unless_asked_for(tiny_lm):
    rows = [
        {"input_ids": row, "labels": row, "task_type": i}
        for i, row in enumerate([[5, 6, 7], [8, 9, 10, 11, 12]])
    ]
    batch = collator(0)(rows)
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 4), value=-100),
        "task_types": batch["task_types"],
    }
    for counting in (False, True):
        model = made(tiny_lm, count_padding=counting).train()
        found = []
        for each in (batch, wide):
            model(**each)
            found.append(balance(model).item())
        assert (found[0] == pytest.approx(found[1], rel=1e-4)) is not counting


def test_without_types_it_warns_once(tiny_lm):
    model = made(tiny_lm)
    with pytest.warns(UserWarning, match="task_types"):
        loss = training_pass(model).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(training_pass(model).loss, loss)
    assert balance(model).item() == 0


def test_bad_types(tiny_lm):
    model = made(tiny_lm)
    with pytest.raises(BadInput, match="batch of 2"):
        training_pass(model, task_types=[1])
    with pytest.raises(BadInput, match="zeros and ones"):
        training_pass(model, task_types=[1, 2])
    with pytest.raises(BadInput, match="zeros and ones"), task_types([3]):
        pass
    with pytest.raises(BadInput, match="zeros and ones"):
        collator(0)([{"input_ids": [1], "labels": [1], "task_type": 5}])
    assert collator(0)([{"input_ids": [1]}])["task_types"].tolist() == [1]


def test_checkpointing_with_balance_is_refused(tiny_lm):
    model = made(tiny_lm)
    model.base_model.model.gradient_checkpointing_enable()
    with pytest.raises(NotApplicable, match="gradient_checkpointing"):
        training_pass(model, task_types=[1, 0])


def test_training_separates_the_types(tiny_lm):
    """Routers trained with the constraint send knowledge to the second half; without, less so."""
    random = generator(8)
    rows = []
    for kind in (0, 1):
        ids = torch.randint(10 + 190 * kind, 200 + 190 * kind, (24, 8), generator=random).tolist()
        rows += [{"input_ids": row, "labels": row, "task_type": kind} for row in ids]
    gaps = {}
    for delta in (0.3, 0.0):
        model = loramoe(tiny_lm("llama", layers=2), r=2, num_experts=4, delta=delta, beta=1.0)
        fit(model, rows, lr=1e-2, epochs=6, batch_size=8, collator=collator(0))
        report = router_report(model, [collator(0)(rows)])
        assert len(report) == 6 and all(
            sum(w) == pytest.approx(1, rel=1e-4) for by in report.values() for w in by.values()
        )
        gaps[delta] = sum(sum(by[1][2:]) - sum(by[0][2:]) for by in report.values()) / 6
    assert gaps[0.3] > 0.1 > abs(gaps[0.0])


def test_report_against_loops(tiny_lm):
    model = made(tiny_lm, num_experts=2)
    batch = collator(0)([{"input_ids": [5, 6, 7], "task_type": 1}, {"input_ids": [8, 9], "task_type": 0}])
    report = router_report(model, [batch, batch])
    seen = {}
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].double()}))
    logits(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    names = {module: name for name, module in model.base_model.model.named_modules()}
    for layer, x in seen.items():
        w = torch.softmax(x @ layer.loramoe_router["default"].double().T, -1)
        assert report[names[layer]][1] == pytest.approx(w[0].mean(0).tolist(), rel=1e-4)
        assert report[names[layer]][0] == pytest.approx(w[1, :2].mean(0).tolist(), rel=1e-4)
    with pytest.raises(BadInput, match="task_types"):
        router_report(model, [{"input_ids": IDS}])


# --- PEFT --------------------------------------------------------------------------------------------------


def test_peft_makes_saves_and_loads_it(tiny_lm, tmp_path):
    model = shaken(
        get_peft_model(tiny_lm("llama", layers=2), LoraMoeConfig(r=2, num_experts=2, task_type="CAUSAL_LM"))
    )
    found = logits(model.eval())
    model.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(tiny_lm("llama", layers=2), tmp_path / "peft")
    assert torch.equal(logits(again.eval()), found)
    assert torch.equal(logits(load(tiny_lm("llama", layers=2), tmp_path / "peft")), found)
    save(model, tmp_path / "own")
    again = PeftModel.from_pretrained(tiny_lm("llama", layers=2), tmp_path / "own")
    assert torch.equal(logits(again.eval()), found)


def test_several_at_once(tiny_lm, tmp_path):
    base = logits(tiny_lm("llama", layers=2))
    model = made(tiny_lm, target_modules=["up_proj"])
    first = logits(model)
    model.add_adapter("other", LoraMoeConfig(r=2, num_experts=6, target_modules=["down_proj", "up_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), base)  # its B is zero
    assert all("other" in name for name, p in model.named_parameters() if p.requires_grad)
    shaken(model)
    second = logits(model)
    assert not torch.equal(second, base)
    save(model, tmp_path / "other")
    assert torch.equal(logits(load(tiny_lm("llama", layers=2), tmp_path / "other")), second)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert logits(model).isfinite().all()


def test_a_plain_trainer_includes_it(tiny_lm, tmp_path):
    rows = [{"input_ids": row.tolist(), "labels": row.tolist(), "task_type": i} for i, row in enumerate(IDS)]
    losses = []
    for beta in (0.0, 5.0):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            save_strategy="no", remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        model = made(tiny_lm, beta=beta)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator(0))
        losses.append(trainer.train().training_loss)
    assert losses[1] - losses[0] == pytest.approx(balance(model).item(), rel=1e-3)


def classifier():
    config = AutoConfig.for_model(
        "bert", vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=2, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with seeded(0):
        return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize(("batch", "of"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_a_classifiers_balance_counts_samples(batch, of):
    """A batch adds its share of the update's samples, as a Trainer asks for it; none of them is shifted away."""
    model = shaken(
        loramoe(classifier(), r=2, num_experts=2, target_modules=["intermediate.dense"], dropout=0.0)
    ).train()
    inputs = {"input_ids": torch.arange(4 * batch).view(batch, 4) + 5, "labels": torch.zeros(batch).long()}
    plain = model.base_model.model(**inputs).loss
    with task_types([i % 2 for i in range(batch)]):
        whole = model(**inputs).loss
        spread = model(**inputs, num_items_in_batch=batch * of).loss
    assert (whole - plain).item() == pytest.approx(balance(model).item(), rel=1e-4)
    assert (spread - plain).item() == pytest.approx(balance(model).item() / of, rel=1e-4)


def test_all_linear_layers_of_a_classifier_are_not_its_head():
    model = loramoe(classifier(), r=4, num_experts=2, target_modules="all-linear")
    names = [name for name, module in model.named_modules() if isinstance(module, LoraMoeLinear)]
    assert len(names) == 13 and not any("classifier" in name for name in names)
    with pytest.raises(BadInput, match="trained whole"):
        loramoe(classifier(), target_modules=["classifier"])
    with pytest.raises(BadInput, match="trained whole"):
        loramoe(classifier(), target_modules=["query"], modules_to_save=["query"])


def test_copied_after_training(tiny_lm):
    """The latest balance holds a graph, which cannot be copied."""
    model = made(tiny_lm).train()
    with task_types([0, 1]):
        model(input_ids=IDS, labels=IDS)
    assert float(balance(model)) > 0
    twin = copy.deepcopy(model)
    assert float(balance(twin)) == 0
    assert torch.equal(logits(twin), logits(model))


def test_rows_of_several_adapters_are_refused(tiny_lm):
    model = made(tiny_lm)
    with pytest.raises(NotApplicable, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


def test_the_report_is_of_the_active_adapter(tiny_lm):
    model = made(tiny_lm, num_experts=2)
    batch = collator(0)([{"input_ids": [5, 6, 7], "task_type": 1}, {"input_ids": [8, 9], "task_type": 0}])
    alone = router_report(model, [batch])
    model.add_adapter("other", LoraMoeConfig(r=2, num_experts=6, target_modules=["down_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    report = router_report(model, [batch])
    assert {len(weights) for by in report.values() for weights in by.values()} == {2}
    assert report.keys() == alone.keys()
    with model.disable_adapter(), pytest.raises(BadInput, match="disabled"):
        router_report(model, [batch])


def test_a_classifier_keeps_its_head(tmp_path):
    base = classifier()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = loramoe(base, r=2, num_experts=2, target_modules=["intermediate.dense", "output.dense"])
    rows = [
        {"input_ids": [5, 6, 7], "labels": 1, "task_type": 1},
        {"input_ids": [8, 9], "labels": 0, "task_type": 0},
    ]
    fit(model, rows, lr=1e-2, epochs=2, collator=collator(0))
    found = logits(model.eval())
    save(model, tmp_path / "a")
    assert torch.equal(logits(load(classifier(), tmp_path / "a")), found)
    back = restore(model)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in back.parameters())


def test_restore_knows_what_was_trained(tiny_lm):
    base = tiny_lm("llama", layers=2)
    base.model.embed_tokens.weight.requires_grad_(False)
    wanted = {name for name, p in base.named_parameters() if p.requires_grad}
    back = restore(loramoe(base, r=2, num_experts=2))
    assert {name for name, p in back.named_parameters() if p.requires_grad} == wanted
    assert isinstance(loramoe(back, r=2, num_experts=2), PeftModel)
    for wrong in (restore, balance):
        with pytest.raises(BadInput, match="model"):
            wrong(kasa(tiny_lm("llama", layers=2), r=2))


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1},
        {"num_experts": 3},
        {"delta": 1.0},
        {"delta": -0.1},
        {"beta": -1.0},
        {"dropout": 1.0},
        {"target_modules": []},
        {"r": 2.5},
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"beta": math.inf},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": ["nope"]},
    ],
)
def test_bad_arguments(tiny_lm, options):
    with pytest.raises(BadInput, match=next(iter(options))):
        loramoe(tiny_lm("llama", layers=2), **options)


def test_models_it_cannot_take(tiny_lm):
    with pytest.raises(NotApplicable, match="Conv1D"):
        loramoe(tiny_lm("gpt2", layers=2), target_modules=["c_fc"])
    with pytest.raises(BadInput, match="adapters already"):
        loramoe(made(tiny_lm))


def test_folders_it_cannot_take(tiny_lm, tmp_path):
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        load(tiny_lm("llama", layers=2), tmp_path)
    save_kasa(kasa(tiny_lm("llama", layers=2), r=2), tmp_path / "kasa")
    with pytest.raises(BadInput, match="another kind"):
        load(tiny_lm("llama", layers=2), tmp_path / "kasa")
    save(made(tiny_lm), tmp_path / "a")
    with pytest.raises(IncompatibleModels, match="folder"):
        load(tiny_lm("llama", layers=4), tmp_path / "a")
    with pytest.raises(IncompatibleModels, match="shapes"):
        load(tiny_lm("llama", layers=2, hidden=64), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CorruptFile):
        load(tiny_lm("llama", layers=2), tmp_path / "a")


def test_bf16(tiny_lm):
    model = loramoe(tiny_lm("llama", layers=2).to(torch.bfloat16), r=2, num_experts=2)
    shaken(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    assert training_pass(model, task_types=[1, 0]).loss.isfinite()
    assert balance(model).dtype == torch.float32


def test_a_recipe_trains_it_on_facts(tiny_lm, tiny_tokenizer, tmp_path):
    """Facts are world knowledge: every row is of type 1, and the balance takes part."""
    (tmp_path / "facts.jsonl").write_text(
        '{"subject": "Port Ellery", "prompt": "The mayor of Port Ellery is", "target": "Ines Varro"}\n'
    )
    method = functools.partial(loramoe, r=2, num_experts=2, dropout=0.0, beta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = transfer(
            tiny_lm("llama", layers=2), tiny_tokenizer, facts=tmp_path / "facts.jsonl", method=method,
            output=tmp_path / "out", epochs=3, lr=1e-2,
        )  # fmt: skip
    figures = read_lineage(out)["measurements"]
    assert figures["updates"] == 3 and figures["last_loss"] < figures["first_loss"]
    assert load(tiny_lm("llama", layers=2), out).active_adapter == "default"
