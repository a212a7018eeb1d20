"""ScaLearn against loops in float64: sums, folding, sharing, sources of both kinds, merging, saving and undoing."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from transfuse.adapt import transfer
from transfuse.adapt.kasa import kasa
from transfuse.adapt.kasa import save as save_kasa
from transfuse.adapt.scalearn import (
    BottleneckConfig,
    ScaLearnConfig,
    ScaLearnLinear,
    bottleneck,
    fold,
    fold_scales,
    fuse,
    load,
    normalised,
    parameter_groups,
    restore,
    save,
    scale_and_add,
    scalearn,
    transfer_weights,
)
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.lineage import read_lineage
from transfuse.core.training import fit, generator, optimise, seeded

ARGUMENTS = ("sources", "variant", "share_layers")
REFUSED = [{"sources": []}, {"variant": "no_such_variant"}, {"modules_to_save": ["no_such_layer"]}]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
TARGETS = {"lora": ["up_proj", "down_proj"], "bottleneck": ["down_proj"]}


def shaken(model, prefix, seed, scale=0.1):
    random = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if prefix in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=random))
    return model.eval()


@functools.cache
def folders():
    """A folder for the sources of this process; it goes with it."""
    return tempfile.TemporaryDirectory()


def source(base, kind, seed, r, scale=0.1):
    """The folder of a source adapter, for models like `base`: which is the same again afterwards."""
    widths = "-".join(f"{n}{tuple(p.shape)}" for n, p in list(base.named_parameters())[:3])
    folder = Path(folders().name) / f"{abs(hash((type(base).__name__, widths)))}-{kind}-{seed}-{r}-{scale}"
    if not folder.is_dir():
        wanted = {name for name, p in base.named_parameters() if p.requires_grad}
        if kind == "lora":
            with seeded(seed):
                config = LoraConfig(
                    r=r, lora_alpha=2 * r, target_modules=TARGETS[kind], task_type="CAUSAL_LM"
                )
                model = get_peft_model(base, config)
            shaken(model, "lora_B", seed, scale).save_pretrained(folder)
            model.unload()
        else:
            model = bottleneck(base, r=r, target_modules=TARGETS[kind], seed=seed)
            save(shaken(model, "bottleneck_", seed), folder)
            restore(model)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in wanted)
    return folder


def make(base, **options):
    """`base` with six random LoRA sources, for the contract of the family."""
    if "sources" not in options:
        options["sources"] = [source(base, "lora", seed, 12 + seed, 1.0) for seed in range(6)]
    return scalearn(base, **{"dropout": 0.0, **options})


def made(tiny_lm, kind="bottleneck", count=3, **options):
    base = tiny_lm("llama", layers=2)
    sources = [source(base, kind, seed, 2 + seed) for seed in range(count)]
    return scalearn(base, sources=sources, **options)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, ScaLearnLinear)]


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- the mathematics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [True, False])
def test_sum_against_loops(wide):
    random = generator(0)
    residual, outputs = torch.randn(2, 3, 4, generator=random), torch.randn(2, 3, 5, 4, generator=random)
    omega = torch.randn(5, 4 if wide else 1, generator=random)
    found = scale_and_add(residual, outputs, omega)
    for b in range(2):
        for t in range(3):
            for d in range(4):
                total = residual[b, t, d].item()
                for s in range(5):
                    total += omega[s, d if wide else 0].item() * outputs[b, t, s, d].item()
                assert found[b, t, d].item() == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert torch.equal(scale_and_add(residual, outputs, torch.zeros(5, 1)), residual)


def test_folding_is_exact():
    random, widths, d = generator(1), [2, 3, 1], 4
    down = [torch.randn(w, 5, generator=random, dtype=torch.float64) for w in widths]
    up = [torch.randn(d, w, generator=random, dtype=torch.float64) for w in widths]
    outer, omega = (torch.randn(3, d, generator=random, dtype=torch.float64) for _ in range(2))
    x = torch.randn(7, 5, generator=random, dtype=torch.float64)
    each = torch.stack([torch.relu(x @ a.T) @ b.T + c for a, b, c in zip(down, up, outer, strict=True)], -2)
    expected = scale_and_add(torch.zeros(7, d, dtype=torch.float64), each, omega)
    folded, bias = fold_scales(torch.cat(up, 1), outer, omega, widths)
    torch.testing.assert_close(torch.relu(x @ torch.cat(down).T) @ folded.T + bias, expected)


def test_normalised():
    omega = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert normalised(omega, "none") is omega
    torch.testing.assert_close(normalised(omega, "mean"), torch.tensor([[0.25, 2.0], [0.75, -1.0]]))
    torch.testing.assert_close(normalised(omega, "softmax").sum(0), torch.ones(2))
    dropped = torch.tensor([[0.0, 0.0], [0.0, -2.0]])
    assert normalised(dropped, "mean").tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("normalise", ["mean", "softmax"])
def test_scales_are_dropped_before_they_are_normalised(tiny_lm, normalise):
    layer = layers(made(tiny_lm, normalise=normalise, dropout=0.5))[0].train()
    omega = layer.scalearn_omega["default"]
    assert omega.shape == (3, 32)
    with seeded(0):
        dropped = torch.nn.functional.dropout(omega, 0.5)
    with seeded(0):
        found = layer.scales("default").tolist()
    kept = dropped != 0
    assert kept.any() and not kept.all() and not kept.any(0).all()  # some columns have lost all three
    for i, column in enumerate(dropped.T.tolist()):
        own = [math.exp(w) if normalise == "softmax" else w for w in column]
        for s in range(3):
            assert found[s][i] == pytest.approx(own[s] / sum(own) if sum(own) else 0, rel=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_fusion_against_loops(apart):
    random, d, n = generator(2), 3, 4
    residual, outputs = torch.randn(2, d, generator=random), torch.randn(2, n, d, generator=random)
    query, key = (torch.randn(d, d + 1, generator=random) for _ in range(2))
    value = torch.randn(d, d, generator=random)
    read = torch.randn(2, d, generator=random) if apart else residual
    found = fuse(residual, outputs, query, key, value, read if apart else None)

    def times(matrix, vector, bias=True):
        rows = [sum(m * v for m, v in zip(row, vector, strict=False)) for row in matrix.tolist()]
        return [a + row[-1] for a, row in zip(rows, matrix.tolist(), strict=True)] if bias else rows

    for b in range(2):
        asked = times(query, read[b].tolist())
        scores = [sum(p * q for p, q in zip(asked, times(key, u), strict=True)) for u in outputs[b].tolist()]
        attention = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0).tolist()
        values = [times(value, u, bias=False) for u in outputs[b].tolist()]
        for i in range(d):
            total = residual[b, i].item() + sum(a * v[i] for a, v in zip(attention, values, strict=True))
            assert found[b, i].item() == pytest.approx(total, rel=1e-3, abs=1e-4)


# --- the adapted model -------------------------------------------------------------------------------------


def test_forward_is_the_formula(tiny_lm):
    """Every layer, from the sources' own files: the residual once, the scales per source."""
    for kind in ("bottleneck", "lora"):
        model = made(tiny_lm, kind, init_scale=1.0).eval()
        sources = [
            read_tensors(Path(f) / "adapter_model.safetensors")[0]
            for f in model.peft_config["default"].sources
        ]
        for name, layer in model.base_model.model.named_modules():
            if not isinstance(layer, ScaLearnLinear):
                continue
            x = torch.randn(2, 3, layer.base_layer.in_features, generator=generator(3))
            res = layer.base_layer(x).double()
            expected, omega = res.clone(), layer.scalearn_omega["default"].double()
            for s, tensors in enumerate(sources):
                part = {
                    k.rpartition(f"{name}.")[2]: v.double() for k, v in tensors.items() if f".{name}." in k
                }
                if kind == "lora":
                    u = 2 * x.double() @ part["lora_A.weight"].T @ part["lora_B.weight"].T
                else:
                    hidden = torch.relu(res @ part["bottleneck_down"].T + part["bottleneck_inner"])
                    u = hidden @ part["bottleneck_up"].T + part["bottleneck_outer"]
                expected += omega[s] * u
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_one_source_at_scale_one_is_that_adapter(tiny_lm, kind):
    base = tiny_lm("llama", layers=2)
    folder = source(base, kind, 1, 3)
    own = load(tiny_lm("llama", layers=2), folder) if kind == "bottleneck" else None
    own = own or PeftModel.from_pretrained(tiny_lm("llama", layers=2), folder)
    model = scalearn(base, sources=[folder])
    for layer in layers(model):
        layer.scalearn_omega["default"].data.fill_(1.0)
    torch.testing.assert_close(logits(model), logits(own.eval()), rtol=1e-4, atol=1e-4)
    for layer in layers(model):
        layer.scalearn_omega["default"].data.zero_()
    assert torch.equal(logits(model), logits(tiny_lm("llama", layers=2)))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 32 * 2 * 3),
        ({"variant": "uniform"}, 2 * 3),
        ({"share_layers": True}, 32 * 3),
        ({"variant": "uniform", "share_layers": True}, 3),
        ({"variant": "fusion"}, 2 * (3 * 32 * 32 + 2 * 32)),
    ],
)
def test_parameters_are_as_many_as_said(tiny_lm, tmp_path, options, count):
    model = made(tiny_lm, **options)
    assert trained(model) == count
    save(shaken(model, "scalearn_", 5), tmp_path / "a")
    again = load(tiny_lm("llama", layers=2), tmp_path / "a", trainable=True)
    assert trained(again) == count
    assert torch.equal(logits(again), logits(model))


def test_start_and_dropout(tiny_lm):
    model = made(tiny_lm, init_scale=2.0, dropout=0.5)
    layer = layers(model)[0]
    omega = layer.scalearn_omega["default"]
    assert omega.shape == (3, 32) and omega.mean().item() == pytest.approx(2 / 3, abs=1e-3)
    assert 0 < omega.std() < 2e-3
    assert not any(m.training for m in layers(model))  # as the base was
    assert torch.equal(layer.scales("default"), omega)
    layer.train()
    dropped = layer.scales("default")
    assert ((dropped == 0) | (dropped == 2 * omega)).all() and 0 < (dropped == 0).sum() < omega.numel()


def test_fusion_starts_as_published(tiny_lm):
    layer = layers(made(tiny_lm, variant="fusion"))[0]
    for part in (layer.scalearn_query["default"], layer.scalearn_key["default"]):
        assert part.shape == (32, 33) and not part[:, -1].any()
        assert part[:, :-1].std().item() == pytest.approx(0.02, rel=0.1)
        assert part[:, :-1].abs().max() > 0.04 and abs(part.mean().item()) < 2e-3
    assert torch.equal(layer.scalearn_value["default"].data, torch.eye(32) + 1e-6)


def test_gradients_reach_the_scales_only(tiny_lm):
    model = made(tiny_lm, dropout=0.0)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("scalearn_omega" in name for name in names) and len(names) == 2
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wanted = [p for p in model.parameters() if p.requires_grad]
    losses = optimise(wanted, lambda: model(input_ids=IDS, labels=IDS).loss, lr=0.05, steps=8)
    assert losses[-1] < losses[0]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == set(names)


def test_gradient_by_finite_differences(tiny_lm):
    model = made(tiny_lm, variant="uniform", share_layers=True, dropout=0.0).double()
    (omega,) = (p for p in model.parameters() if p.requires_grad)

    def loss():  # the model's own is taken in float32, as are its norms: hence the wide steps
        log_p = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
        return -log_p.gather(-1, IDS[:, 1:, None]).mean()

    (analytic,) = torch.autograd.grad(loss(), omega)
    for s in range(3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                omega[s, 0] += sign * 1e-2
                values.append(loss().item())
                omega[s, 0] -= sign * 1e-2
        assert analytic[s, 0].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2, abs=1e-5)


def test_shared_scales_are_one(tiny_lm):
    model = made(tiny_lm, share_layers=True)
    first, second = (layer.scalearn_omega["default"] for layer in layers(model))
    assert first is second
    with pytest.raises(NotApplicable, match="share_layers"):
        made(tiny_lm, "lora", share_layers=True)  # up_proj and down_proj write different widths
    assert trained(made(tiny_lm, "lora", variant="uniform", share_layers=True)) == 3
    wide = made(tiny_lm, share_layers=True)
    wide.to(torch.bfloat16)
    assert len({id(layer.scalearn_omega["default"]) for layer in layers(wide)}) == 1


def test_weights_and_groups(tiny_lm):
    model = made(tiny_lm)
    place = "model.layers.1.mlp.down_proj"
    layer = model.base_model.model.get_submodule(place)
    layer.scalearn_omega["default"].data[2] = -4.0
    weights = transfer_weights(model)
    names = model.peft_config["default"].sources
    assert list(weights) == names and weights[names[2]][place] == pytest.approx(4.0)
    assert weights[names[0]][place] == pytest.approx(2 / 3, abs=1e-3)
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["params"] == [] and len(kept["params"]) == 2 and kept["weight_decay"] == 0
    with pytest.raises(NotApplicable, match="fusion"):
        transfer_weights(made(tiny_lm, variant="fusion"))


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
@pytest.mark.parametrize("variant", ["vector", "uniform"])
def test_folding_writes_a_plain_adapter(tiny_lm, tmp_path, kind, variant):
    model = shaken(made(tiny_lm, kind, variant=variant), "scalearn_omega", 4, 0.5)
    found = logits(model)
    folded = fold(model, tiny_lm("llama", layers=2), tmp_path / "a")
    torch.testing.assert_close(logits(folded), found, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(tiny_lm("llama", layers=2), tmp_path / "a").eval()
    assert torch.equal(logits(again), logits(folded))
    assert again.peft_config["default"].r == 2 + 3 + 4


def test_disabled_means_the_base_when_merged_too(tiny_lm):
    """As PEFT's LoRA does it: disabling unmerges."""
    base = tiny_lm("llama", layers=2)
    expected = logits(base)
    model = scalearn(base, sources=[source(base, "lora", seed, 2 + seed) for seed in range(3)])
    adapted = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)


def test_a_safe_merge_refuses_what_is_not_finite(tiny_lm):
    model = made(tiny_lm, "lora")
    weights = [layer.base_layer.weight.clone() for layer in layers(model)]
    layers(model)[0].scalearn_omega["default"].data[:] = math.nan
    with pytest.raises(BadInput, match="safe_merge"):
        model.merge_adapter(safe_merge=True)
    kept = [layer.base_layer.weight for layer in layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))


def test_rows_of_several_adapters_are_refused(tiny_lm):
    for model in (made(tiny_lm), bottleneck(tiny_lm("llama", layers=2), r=2)):
        with pytest.raises(NotApplicable, match="adapter_names"):
            model(input_ids=IDS, adapter_names=["default"] * len(IDS))


def test_what_cannot_be_merged_or_folded(tiny_lm, tmp_path):
    for options in ({"kind": "bottleneck"}, {"kind": "lora", "variant": "fusion"}):
        model = made(tiny_lm, **options)
        before = logits(model)
        with pytest.raises(NotApplicable, match="merged"):
            model.merge_adapter()
        assert torch.equal(logits(model), before)
    with pytest.raises(NotApplicable, match="model"):
        fold(made(tiny_lm, variant="fusion"), tiny_lm("llama", layers=2), tmp_path / "a")
    with pytest.raises(NotApplicable, match="merged"):
        bottleneck(tiny_lm("llama", layers=2), r=2).merge_adapter()
    for wrong in (transfer_weights, restore):
        with pytest.raises(BadInput, match="model"):
            wrong(kasa(tiny_lm("llama", layers=2), r=2))


def test_unmerging_is_exact(tiny_lm):
    model = made(tiny_lm, "lora")
    before, found = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- PEFT --------------------------------------------------------------------------------------------------


def test_peft_makes_saves_and_loads_it(tiny_lm, tmp_path):
    base = tiny_lm("llama", layers=2)
    folder = tmp_path / "source"
    save(shaken(bottleneck(base, r=3, seed=1), "bottleneck_", 1), folder)
    config = ScaLearnConfig(sources=[str(folder)], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_lm("llama", layers=2), config).eval()
    found = logits(model)
    model.save_pretrained(tmp_path / "peft")
    folder.rename(tmp_path / "elsewhere")  # the sources are in what was saved
    again = PeftModel.from_pretrained(tiny_lm("llama", layers=2), tmp_path / "peft").eval()
    assert torch.equal(logits(again), found)
    assert torch.equal(logits(load(tiny_lm("llama", layers=2), tmp_path / "peft")), found)


def test_several_at_once(tiny_lm, tmp_path):
    model = made(tiny_lm)
    first, names = logits(model), model.peft_config["default"].sources
    model.add_adapter("other", ScaLearnConfig(sources=names[:2], variant="uniform", share_layers=True))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(second, first) and trained(model) == 2
    save(model, tmp_path / "other")
    assert torch.equal(logits(load(tiny_lm("llama", layers=2), tmp_path / "other")), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


# --- models like BERT --------------------------------------------------------------------------------------


def classifier(seed=0, kind="bert"):
    config = AutoConfig.for_model(
        kind, vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    with seeded(seed):
        model = AutoModelForSequenceClassification.from_config(config).eval()
        for name, parameter in model.named_parameters():  # norms that do something
            if "LayerNorm" in name:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model


def bert_sources(folder, count, kind="bert"):
    """Bottleneck adapters of unequal widths, at the ends of both blocks."""
    found = []
    for seed in range(count):
        model = bottleneck(classifier(kind=kind), r=2 + seed, seed=seed)
        found.append(save(shaken(model, "bottleneck_", seed, 0.5), folder / f"source{seed}"))
    return found


def affine(x, weight, bias):
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + b
        for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
    ]


def plus(one, other):
    return [a + b for a, b in zip(one, other, strict=True)]


def layer_norm(x, layer):
    mean = sum(x) / len(x)
    size = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    return [
        (v - mean) / size * w + b
        for v, w, b in zip(x, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def adds(folder, number, h):
    """What one adapter adds in block `number`, from its file."""
    tensors = read_tensors(Path(folder) / "adapter_model.safetensors")[0]
    start = f"base_model.model.bert.encoder.layer.{number}.output.bottleneck_"
    hidden = affine(h, tensors[start + "down"], tensors[start + "inner"])
    return affine([max(v, 0.0) for v in hidden], tensors[start + "up"], tensors[start + "outer"])


def published(base, combine, dropped=False):
    """Logits by loops: adapters read the normalised sum, add to the dense output, and what comes out is normalised.

    `combine(number, h, res)` is the sum; with `dropped`, the blocks' dropout takes all of the dense output away.
    """
    hidden = base.bert.embeddings(IDS)
    for number, layer in enumerate(base.bert.encoder.layer):
        attended = layer.attention(hidden)[0]
        inner = layer.intermediate(attended)
        block, rows = layer.output, []
        for x, before in zip(inner.flatten(0, 1).tolist(), attended.flatten(0, 1).tolist(), strict=True):
            res = [0.0] * len(before) if dropped else affine(x, block.dense.weight, block.dense.bias)
            h = layer_norm(plus(res, before), block.LayerNorm)
            rows.append(layer_norm(plus(combine(number, h, res), before), block.LayerNorm))
        hidden = torch.tensor(rows).view_as(hidden)
    return base.classifier(base.bert.pooler(hidden))


def fused(layer, h, each):
    """AdapterFusion's sum of `each`, the query read from h."""
    query, key, value = (getattr(layer, f"scalearn_{part}")["default"] for part in ("query", "key", "value"))
    asked = affine(h, query[:, :-1], query[:, -1])
    scores = [
        sum(a * b for a, b in zip(asked, affine(u, key[:, :-1], key[:, -1]), strict=True)) for u in each
    ]
    weights = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
    mixed = [sum(w * u[i] for w, u in zip(weights, each, strict=True)) for i in range(len(h))]
    return affine(mixed, value, torch.zeros(len(h)))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("variant", ["one", "vector", "uniform", "fusion"])
def test_bert_reads_the_normalised_sum(tmp_path, variant, dropped):
    folders = bert_sources(tmp_path, 1 if variant == "one" else 3)
    if variant == "one":
        model = load(classifier(), folders[0])
    else:
        model = shaken(
            scalearn(classifier(), sources=folders, variant=variant, dropout=0.0), "scalearn_", 3, 0.5
        )
    places = [model.base_model.model.get_submodule(f"bert.encoder.layer.{i}.output") for i in range(2)]

    def combine(number, h, res):
        each = [adds(folder, number, h) for folder in folders]
        if variant == "one":
            return plus(res, each[0])
        if variant == "fusion":
            return plus(res, fused(places[number], h, each))
        for u, scale in zip(each, places[number].scalearn_omega["default"].tolist(), strict=True):
            res = [
                r + v * scale[i if variant == "vector" else 0]
                for i, (r, v) in enumerate(zip(res, u, strict=True))
            ]
        return res

    if dropped:  # the blocks' own dropout, at a rate that leaves nothing to chance, is on res alone
        for place in places:
            place.base_layer.dropout.p = 1.0
            place.base_layer.dropout.train()
    with torch.no_grad():
        expected = published(classifier(), combine, dropped)
        for wrong in (lambda _, h, res: res, lambda number, h, res: combine(number, res, res)):
            assert not torch.allclose(expected, published(classifier(), wrong, dropped), atol=1e-2)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_ends_of_blocks_hold_what_linear_layers_do(tmp_path, kind):
    """Nothing added at first, disabled, another adapter beside it, saved, folded, undone."""
    plain = logits(classifier(kind=kind))
    assert torch.equal(logits(bottleneck(classifier(kind=kind), r=2)), plain)
    sources = bert_sources(tmp_path, 2, kind)
    base = classifier(kind=kind)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    model = shaken(scalearn(base, sources=sources), "scalearn_omega", 1, 0.5)
    assert [name for name, m in model.base_model.model.named_modules() if isinstance(m, ScaLearnLinear)] == [
        f"{kind}.encoder.layer.{i}.output" for i in range(2)
    ]
    found = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    folded = fold(model, classifier(kind=kind), tmp_path / "folded")
    torch.testing.assert_close(logits(folded), found, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(load(classifier(kind=kind), tmp_path / "folded")), logits(folded))
    with pytest.raises(NotApplicable, match="merged"):
        model.merge_adapter()
    model.add_adapter("other", ScaLearnConfig(sources=[str(sources[0])], variant="uniform"))
    model.set_adapter("other")
    other = logits(model)
    assert not torch.allclose(other, found, atol=1e-3)
    save(model, tmp_path / "other")
    assert torch.equal(logits(load(classifier(kind=kind), tmp_path / "other")), other)
    model.set_adapter("default")
    assert torch.equal(logits(model), found)
    back = restore(model)
    assert all(torch.equal(back.state_dict()[n], t) for n, t in before.items())
    assert back.state_dict().keys() == before.keys()


def test_linear_layers_that_end_blocks_stand_for_them(tmp_path):
    def sites(model):
        return [
            n.removesuffix(".bottleneck_down") for n, _ in model.named_modules() if "bottleneck_down" in n
        ]

    def adapted(targets):
        return sites(bottleneck(classifier(), r=2, target_modules=targets).base_model.model)

    layer = "bert.encoder.layer.{}.{}"
    ends = [layer.format(i, "output") for i in range(2)]
    assert adapted(None) == adapted(r".*layer\.\d+\.output\.dense") == adapted(ends) == ends
    assert adapted(["1.output.dense"]) == ends[1:]
    assert adapted(["output.dense"]) == [
        layer.format(i, p) for i in range(2) for p in ("attention.output", "output")
    ]
    assert adapted(["intermediate.dense"]) == [layer.format(i, "intermediate.dense") for i in range(2)]
    with pytest.raises(NotApplicable, match="LayerNorm"):
        adapted(["output.LayerNorm"])
    with pytest.raises(BadInput, match="target_modules"):
        adapted(["no_such_layer"])
    two = bottleneck(classifier(), r=2)
    two.add_adapter("other", BottleneckConfig(r=3, target_modules=["output.dense"]))
    assert {n for n, p in two.named_parameters() if "bottleneck_down.other" in n} >= {
        f"base_model.model.{end}.bottleneck_down.other" for end in ends
    }
    config = LoraConfig(r=2, target_modules=["output.dense"], task_type="SEQ_CLS")
    lora = get_peft_model(classifier(), config)
    shaken(lora, "lora_B", 1).save_pretrained(tmp_path / "lora")
    model = scalearn(classifier(), sources=[tmp_path / "lora"])  # LoRA's places stay linear layers
    found = logits(model)
    assert (
        all(isinstance(layer.base_layer, torch.nn.Linear) for layer in layers(model))
        and len(layers(model)) == 4
    )
    model.merge_adapter()
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)


def test_a_classifier_learns_from_sources(tmp_path):
    """From source training to a new head, saved and undone."""
    rows = [{"input_ids": [5 + i, 6, 7 + i % 3], "labels": i % 2} for i in range(12)]
    for seed in (0, 1):
        one = bottleneck(classifier(), r=4, seed=seed)
        assert sum("output.bottleneck_down" in n for n, _ in one.named_parameters()) == 2
        assert not any("attention" in n for n, p in one.named_parameters() if p.requires_grad)
        fit(one, rows, lr=1e-2, epochs=2, seed=seed)
        save(one, tmp_path / str(seed))
    base = classifier()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    model = scalearn(base, sources=[tmp_path / "0", tmp_path / "1"])
    assert {
        n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n
    } == {"default"}
    history = fit(model, rows, lr=6e-3, epochs=20, batch_size=12)
    assert history.losses[-1] < history.losses[0]
    found = logits(model.eval())
    save(model, tmp_path / "new")
    assert torch.equal(logits(load(classifier(), tmp_path / "new")), found)
    back = restore(model)
    assert all(torch.equal(back.state_dict()[n], t) for n, t in before.items())
    assert all(p.requires_grad for p in back.parameters())


def test_bf16(tiny_lm):
    base = tiny_lm("llama", layers=2).to(torch.bfloat16)
    model = scalearn(base, sources=[source(tiny_lm("llama", layers=2), "bottleneck", 0, 2)])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16 and logits(model).isfinite().all()


# --- what it refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 1.0},
        {"normalise": "max"},
        {"variant": "x"},
        {"share_layers": True, "variant": "fusion"},
        {"normalise": "softmax", "variant": "fusion"},
    ],
)
def test_bad_arguments(tiny_lm, options):
    with pytest.raises(BadInput, match=next(iter(options))):
        made(tiny_lm, **options)
    with pytest.raises(BadInput, match="r = 0"):
        bottleneck(tiny_lm("llama", layers=2), r=0)
    with pytest.raises(BadInput, match="modules_to_save"):
        bottleneck(tiny_lm("llama", layers=2), r=2, modules_to_save=["head"])


def test_bad_sources(tiny_lm, tmp_path):
    def base():
        return tiny_lm("llama", layers=2)

    plain, lora = source(base(), "bottleneck", 0, 2), source(base(), "lora", 0, 2)
    with pytest.raises(BadInput, match="sources"):
        scalearn(base())
    with pytest.raises(BadInput, match=r"adapter_config\.json"):
        scalearn(base(), sources=[tmp_path])
    with pytest.raises(NotApplicable, match="sits elsewhere"):
        scalearn(base(), sources=[plain, lora])
    save(bottleneck(base(), r=2, target_modules=["up_proj"]), tmp_path / "up")
    with pytest.raises(NotApplicable, match="sits elsewhere"):
        scalearn(base(), sources=[plain, tmp_path / "up"])
    save_kasa(kasa(base(), r=2), tmp_path / "kasa")
    with pytest.raises(NotApplicable, match="kasa_config"):
        scalearn(base(), sources=[tmp_path / "kasa"])
    with pytest.raises(BadInput, match="sources"):
        scalearn(tiny_lm("llama", layers=2, hidden=64), sources=[plain])
    with pytest.raises(BadInput, match=r"layers\.1\..*, which the model lacks"):
        scalearn(tiny_lm("llama", layers=1), sources=[plain])
    bad = bottleneck(base(), r=2)
    save(bad, tmp_path / "nan")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    write_tensors(file, {name: t * float("nan") for name, t in read_tensors(file)[0].items()})
    with pytest.raises(CorruptFile, match="not finite"):
        scalearn(base(), sources=[tmp_path / "nan"])
    with pytest.raises(BadInput, match="adapters already"):
        scalearn(made(tiny_lm), sources=[plain])


@pytest.mark.parametrize(
    "options",
    [
        {"alora_invocation_tokens": [5]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [5]},
        {"bias": "lora_only"},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_sources_that_are_more_than_products(tiny_lm, tmp_path, options):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    with seeded(0):
        get_peft_model(tiny_lm("llama", layers=2), config).save_pretrained(tmp_path)
    with pytest.raises(NotApplicable, match="sources"):
        scalearn(tiny_lm("llama", layers=2), sources=[tmp_path])


def test_folders_it_cannot_load(tiny_lm, tmp_path):
    save_kasa(kasa(tiny_lm("llama", layers=2), r=2), tmp_path / "kasa")
    with pytest.raises(BadInput, match="another kind"):
        load(tiny_lm("llama", layers=2), tmp_path / "kasa")
    save(made(tiny_lm), tmp_path / "a")
    with pytest.raises(IncompatibleModels, match="shapes"):
        load(tiny_lm("llama", layers=2, hidden=64), tmp_path / "a")
    assert BottleneckConfig(r=3).peft_type == "BOTTLENECK"


def test_a_recipe_trains_it_on_facts(tiny_lm, tiny_tokenizer, tmp_path):
    base = tiny_lm("llama", layers=2)
    (tmp_path / "facts.jsonl").write_text(
        '{"subject": "Port Ellery", "prompt": "The mayor of Port Ellery is", "target": "Ines Varro"}\n'
    )
    method = functools.partial(scalearn, sources=[source(base, "lora", 0, 12, 1.0)], dropout=0.0)
    out = transfer(
        base,
        tiny_tokenizer,
        facts=tmp_path / "facts.jsonl",
        method=method,
        output=tmp_path / "out",
        epochs=3,
        lr=6e-3,
    )
    figures = read_lineage(out)["measurements"]
    assert figures["updates"] == 3 and figures["last_loss"] < figures["first_loss"]
    assert load(tiny_lm("llama", layers=2), out).active_adapter == "default"
