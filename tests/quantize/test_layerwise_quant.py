"""Layerwise quantization against loops in float64, brute force, hqq's own layers, and through saving and loading."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import transfuse
from transfuse import recipe
from transfuse.core import taps
from transfuse.core.errors import BadInput, CorruptFile, NotApplicable
from transfuse.core.lineage import read_lineage
from transfuse.core.models import fingerprint
from transfuse.core.packed import PACKED, read_packed, write_packed
from transfuse.core.training import generator
from transfuse.quantize._base import layer_slots
from transfuse.quantize._rounding import hqq_codes, hqq_layer
from transfuse.quantize.layerwise_quant import (
    BitPlan,
    LayerScores,
    LayerwiseQuant,
    allocate_bits,
    apply_bit_plan,
    area,
    layer_importance,
    lim,
    load,
    mean_loss,
    orders_of,
    plan_of,
    pruning_curve,
    quantization_curve,
    rtn,
    save,
    windows,
    zd,
)

ROWS = torch.randint(3, 400, (5, 12), generator=generator(0))


def make(**options):
    """A quantizer with groups that fit a tiny model, for the contract of the family."""
    return LayerwiseQuant(**{"group_size": 8, **options})


def logits(model):
    with torch.no_grad():
        return model(input_ids=ROWS).logits


def mixtral():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# --- rounding ----------------------------------------------------------------------------------------------


def rtn_loop(weight, bits, group):
    found = [[0.0] * len(weight[0]) for _ in weight]
    for r, row in enumerate(weight):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, step = min(part), (max(part) - min(part)) / (2**bits - 1)
            for c, w in enumerate(part):
                q = math.floor((w - low) / step + 0.5) if step else 0
                found[r][start + c] = low + step * min(max(q, 0), 2**bits - 1)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rtn_against_a_loop(bits):
    weight = torch.randn(6, 16, dtype=torch.float64, generator=generator(1))
    weight[2, 8:] = 0.25  # a constant group
    codes = rtn(weight, bits, 8)
    assert (
        codes.codes.shape == (6, 16) and codes.step.shape == (6, 2) and int(codes.codes.max()) == 2**bits - 1
    )
    assert torch.allclose(codes.values(torch.float64), rtn_loop(weight.tolist(), bits, 8), atol=1e-12)
    assert (codes.values(torch.float64) - weight).abs().max() <= codes.step.max() / 2 + 1e-12
    turned = rtn(weight.T, bits, 8, axis=0)
    assert torch.equal(turned.values(torch.float64), codes.values(torch.float64).T)
    half = rtn(weight.float(), bits, None, step_dtype=torch.float16)
    assert half.step.dtype == torch.float16 and half.step.shape == (6, 1)
    again = rtn(half.values(), bits, None, step_dtype=torch.float16)
    assert torch.equal(again.values(), half.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((0, 8), "bits"), ((9, 8), "bits"), ((4, 5), "does not divide the rows of 16 of weight; use 16 or 8")],
)
def test_rtn_refuses(arguments, says):
    with pytest.raises(BadInput, match=says):
        rtn(torch.zeros(2, 16), *arguments)
    with pytest.raises(BadInput, match="finite"):
        rtn(torch.full((2, 16), math.inf), 4, 8)
    with pytest.raises(BadInput, match="no matrix"):
        rtn(torch.zeros(16), 4, 8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hqq_codes_are_its_layer(bits, dtype):
    linear = torch.nn.Linear(32, 24).to(dtype)
    layer = hqq_layer(linear, bits, 8)
    codes = hqq_codes(layer)
    x = torch.randn(3, 32, generator=generator(3)).to(dtype)
    assert codes.shape == (24, 32) and int(codes.codes.max()) < 2**bits
    assert torch.equal(codes.values(dtype), layer.dequantize())
    again = hqq_layer(codes, bias=linear.bias)
    assert (
        type(again) is type(layer) and torch.equal(again(x), layer(x)) and torch.equal(again.W_q, layer.W_q)
    )
    weight = linear.weight.detach().float()
    error, nearest = (
        (each - weight).norm() for each in (codes.values().float(), rtn(weight, bits, 8).values())
    )
    assert error < 1.2 * nearest or dtype == torch.bfloat16  # its scales are of the weight's dtype


# --- scores ------------------------------------------------------------------------------------------------


def test_lim_against_a_loop_and_limits():
    before, after = (torch.randn(2, 5, 4, generator=generator(s)) for s in (4, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    total, count = 0.0, 0
    for b in range(2):
        for t in range(5):
            if mask[b, t]:
                x, y = before[b, t].double().tolist(), after[b, t].double().tolist()
                norms = math.sqrt(sum(p * p for p in x)) * math.sqrt(sum(q * q for q in y))
                total += sum(p * q for p, q in zip(x, y, strict=True)) / norms
                count += 1
    assert float(lim(before, after, mask)) == pytest.approx(-total / count, rel=1e-12)
    assert float(lim(before, 3 * before)) == pytest.approx(-1) and float(
        lim(before, -before)
    ) == pytest.approx(1)


def test_zd_by_hand():
    # mean 13/6, std 1.77: only 6 is more than one standard deviation above
    parts = [torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([2.0, 6.0])]
    assert zd(parts) == pytest.approx(1 / 6)
    assert zd([-p for p in parts]) == 0.0  # one-sided: -6 is far below
    with pytest.warns(UserWarning, match="all alike"):
        assert zd(torch.full((3, 4), 0.1)) == 0.0


def test_scores_of_a_model(tiny_lm):
    """LIM by the hidden states a plain pass reports, but for the last layer, whose report is normalised."""
    model = tiny_lm("llama")
    model.model.norm.weight.data.copy_(torch.linspace(0.1, 3, 32))
    before = fingerprint(model)
    scores = layer_importance(model, "lim", ROWS)
    with torch.no_grad():
        states = model(input_ids=ROWS, output_hidden_states=True).hidden_states
    for i in range(3):
        assert scores.values[i] == pytest.approx(float(lim(states[i], states[i + 1])), rel=1e-6)
    assert scores.values[3] != pytest.approx(float(lim(states[3], states[4])), rel=1e-3)
    assert scores.sizes == (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 96,) * 4
    assert scores.layers == tuple(f"model.layers.{i}" for i in range(4))
    assert scores.modules[0] == "self_attn.q_proj" and len(scores.modules) == 7
    weights = torch.cat(
        [p.flatten() for n, p in model.model.layers[1].named_parameters() if "proj" in n]
    ).double()
    share = ((weights - weights.mean()) / weights.std(correction=0) > 1).double().mean()
    deviations = layer_importance(model, "zd")
    assert deviations.values[1] == pytest.approx(float(share))
    assert deviations.order() == sorted(range(4), key=lambda i: -deviations.values[i])
    assert scores.order() == sorted(range(4), key=lambda i: scores.values[i])
    assert fingerprint(model) == before and not model.training


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_do_not_matter(tiny_lm, side):
    from transfuse.core.generate import pad_batch

    model = tiny_lm("qwen2", layers=2)
    rows = [ROWS[i, : 4 + 2 * i].tolist() for i in range(5)]
    expected = layer_importance(model, "lim", rows)
    ids, mask = pad_batch(rows, 0, side=side)
    one = layer_importance(model, "lim", {"input_ids": ids, "attention_mask": mask})
    parts = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(5)]
    apart = layer_importance(model, "lim", parts)
    for found in (one, apart):
        assert found.values == pytest.approx(expected.values, abs=1e-6)
    assert mean_loss(model, parts) == pytest.approx(mean_loss(model, rows), rel=1e-5)
    single = sum((len(r) - 1) * mean_loss(model, [r]) for r in rows) / sum(len(r) - 1 for r in rows)
    assert mean_loss(model, rows) == pytest.approx(single, rel=1e-5)


def test_sensitivity_is_the_loss_of_one_layer(tiny_lm):
    model = tiny_lm("llama", layers=3)
    before = fingerprint(model)
    scores = layer_importance(model, "sensitivity", ROWS, bits=(4, 2), group_size=8)
    assert fingerprint(model) == before
    assert scores.values == scores.losses[2] and set(scores.losses) == {2, 4}
    base, changed = mean_loss(model, ROWS), tiny_lm("llama", layers=3)
    apply_bit_plan(changed, BitPlan((16, 2, 16), scores.sizes, group_size=8))
    assert scores.losses[2][1] == pytest.approx(mean_loss(changed, ROWS) - base, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "calib", "says"),
    [
        ("lim", None, "holds no row"),
        ("sensitivity", [], "holds no row"),
        ("lim", [[5]], "too short"),
        ("lim", torch.ones(2, 3), "whole numbers"),
        ("lim", ["abc"], "no row of token ids"),
        ("other", ROWS, '"lim", "zd" or "sensitivity"'),
    ],
)
def test_scores_refuse(tiny_lm, method, calib, says):
    with pytest.raises(BadInput, match=says):
        layer_importance(tiny_lm("llama", layers=2), method, calib)


# --- allocation --------------------------------------------------------------------------------------------


def test_forty_layers_as_in_the_paper():
    """Thirty layers at 4 bits and ten at 2 make 3.5."""
    plan = allocate_bits([float(i) for i in range(40)], 3.5)
    assert plan.bits == (2,) * 10 + (4,) * 30 and plan.average_bits == 3.5
    assert plan.stored_bits == 4.5  # 16-bit step and offset per 32 weights
    assert plan.lowered == list(range(10))


@pytest.mark.parametrize(("high", "low"), [(4, 2), (8, 4), (4, 3), (16, 4)])
def test_equal_sizes_are_rounded_to_the_nearest(high, low):
    for layers, tenth in itertools.product((7, 30, 32), range(11)):
        target = low + (high - low) * tenth / 10
        plan = allocate_bits(list(range(layers)), target, (high, low))
        exact = layers * (high - target) / (high - low)
        assert abs(sum(b == low for b in plan.bits) - exact) <= 0.5 + 1e-9
        under = allocate_bits(list(range(layers)), target, (low, high), within=True)
        assert sum(b == low for b in under.bits) == math.ceil(exact - 1e-9)


def test_unequal_sizes_take_the_largest_average_within():
    importance, sizes = [0.3, 0.1, 0.2, 0.9], [100, 10, 300, 50]
    order = [1, 2, 0, 3]
    for target in (2.0, 2.3, 3.0, 3.5, 3.9, 4.0):
        averages = []
        for k in range(5):
            bits = [2 if i in order[:k] else 4 for i in range(4)]
            averages.append((sum(s * b for s, b in zip(sizes, bits, strict=True)) / 460, tuple(bits)))
        expected = max(a for a in averages if a[0] <= target + 1e-9)
        assert allocate_bits(importance, target, sizes=sizes).bits == expected[1]


def test_bytes_count_steps_and_offsets():
    plan = allocate_bits([1.0, 2.0, 3.0, 4.0], sizes=[64] * 4, target_bytes=140, group_size=32)
    # 4 x 64 weights: 5 bits each are 160 bytes; with two layers at 3 bits 128, with one 144
    assert plan.bits == (2, 2, 4, 4) and 64 * 4 * plan.stored_bits / 8 == 128
    assert allocate_bits([1.0] * 4, sizes=[64] * 4, target_bytes=10_000).bits == (4,) * 4


@pytest.mark.parametrize("sizes", [[1] * 6, [5, 1, 4, 4, 2, 3]])
def test_knapsack_against_all_plans(sizes):
    draw = generator(7)
    losses = {b: tuple((torch.rand(6, generator=draw) * (9 - b)).tolist()) for b in (8, 4, 2)}
    scores = LayerScores("sensitivity", losses[2], tuple(sizes), losses=losses)
    for target in (2.0, 3.1, 4.7, 8.0):
        best = min(
            sum(losses[b][i] for i, b in enumerate(bits))
            for bits in itertools.product((8, 4, 2), repeat=6)
            if sum(s * b for s, b in zip(sizes, bits, strict=True)) <= target * sum(sizes) + 1e-9
        )
        plan = allocate_bits(scores, target, (8, 4, 2), method="knapsack")
        assert sum(losses[b][i] for i, b in enumerate(plan.bits)) == pytest.approx(best)
        assert plan.average_bits <= target + 1e-9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_bits": 1.9}, "target_bits = 1.9 is outside of what .* give; use 2 to 4"),
        ({"target_bits": 4.1}, "outside"),
        ({"target_bytes": 1}, "target_bytes = 1 is outside"),
        ({"target_bits": 3, "target_bytes": 9}, "two targets"),
        ({"choices": (4,)}, "choices"),
        ({"choices": (4, 4)}, "different widths"),
        ({"choices": (4, 9)}, "1 to 8 and 16"),
        ({"choices": (8, 4, 2)}, "knapsack"),
        ({"sizes": [1, 2]}, "3 sizes"),
        ({"method": "best"}, '"greedy" or "knapsack"'),
        ({"method": "knapsack"}, "hold no losses"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_size": -8}, "group_size = -8"),
        ({"backend": "gptq"}, "backend = 'gptq' is not known; use one of rtn, hqq"),
        ({"choices": (4, True)}, "1 to 8 and 16"),
    ],
)
def test_allocation_refuses(options, says):
    with pytest.raises(BadInput, match=says):
        allocate_bits([1.0, 2.0, 3.0], **options)


# --- other tools -------------------------------------------------------------------------------------------


def named_plan(layers=12):
    bits = tuple(2 if i in (1, 10, 11) else 16 if i == 0 else 4 for i in range(layers))
    names = tuple(f"model.layers.{i}" for i in range(layers))
    return BitPlan(bits, (100,) * layers, names, ("self_attn.q_proj", "mlp.down_proj"), 32)


def test_gptqmodel_form():
    form = named_plan().to_gptqmodel_dynamic()
    assert form["bits"] == 4 and form["group_size"] == 32

    def bits_of(name):
        for pattern, change in form["dynamic"].items():
            if re.match(pattern[2:], name):
                return None if pattern.startswith("-:") else change["bits"]
        return form["bits"]

    found = [bits_of(f"model.layers.{i}.self_attn.q_proj") for i in range(12)]
    assert found == [None, 2, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2]
    assert bits_of("lm_head") == 4


def test_torchao_form():
    form = named_plan().to_torchao_fqn_config()
    assert (form["_type"], form["_version"]) == ("FqnToConfig", 1)
    entries = form["_data"]["fqn_to_config"]

    def bits_of(name):
        for pattern, config in entries.items():
            if re.fullmatch(pattern.removeprefix("re:"), name):
                return config["_data"]["weight_dtype"]["_data"]
        return None

    assert [bits_of(f"model.layers.{i}.mlp.down_proj") for i in (0, 1, 2, 10)] == [
        None,
        "int2",
        "int4",
        "int2",
    ]
    assert bits_of("model.layers.1.input_layernorm") is None and bits_of("lm_head") is None
    assert json.loads(json.dumps(form)) == form


def test_llamacpp_form():
    lines = named_plan().to_llamacpp_tensor_types()
    assert lines == [
        r"blk\.(0)\.=bf16", r"blk\.(2|3|4|5|6|7|8|9)\.=q4_k", r"blk\.(1|10|11)\.=q2_k"
    ]  # fmt: skip
    assert re.search(lines[2].partition("=")[0], "blk.1.attn_q.weight")
    assert not re.search(lines[2].partition("=")[0], "blk.111.attn_q.weight")
    assert named_plan().to_llamacpp_tensor_types({2: "iq2_xs"})[2].endswith("=iq2_xs")
    with pytest.raises(BadInput, match="7 bits have no ggml type"):
        BitPlan((7, 4), (1, 1), ("a.0", "a.1")).to_llamacpp_tensor_types()
    with pytest.raises(BadInput, match="not named"):
        BitPlan((4, 2), (1, 1)).to_gptqmodel_dynamic()


def test_plans_survive_json():
    plan = named_plan()
    assert BitPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(BadInput, match="no bit plan"):
        BitPlan.from_dict({"bits": [4]})


# --- models ------------------------------------------------------------------------------------------------


def values(model):
    """Every tensor of a model; of hqq's layers the matrix they stand for."""
    hqq = {name: layer for name, layer in model.named_modules() if hasattr(layer, "W_q")}
    plain = {
        n: t for n, t in model.state_dict().items() if not n.startswith(tuple(f"{o}." for o in hqq) or ("!",))
    }
    plain |= {f"{name}.bias": layer.bias for name, layer in hqq.items() if layer.bias is not None}
    return {**plain, **{f"{name}.weight": layer.dequantize() for name, layer in hqq.items()}}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("storage", ["plain", "packed"])
@pytest.mark.parametrize(
    ("backend", "architecture", "dtype"),
    [
        ("rtn", "llama", torch.float32),
        ("rtn", "gemma3", torch.bfloat16),
        ("hqq", "qwen2", torch.float32),
        ("hqq", "llama", torch.bfloat16),
    ],
)
def test_a_saved_model_is_the_same(tiny_lm, tiny_tokenizer, tmp_path, backend, architecture, dtype, storage):
    model = tiny_lm(architecture).to(dtype)
    quantized = make(backend=backend, target_bits=3.0, importance="zd").quantize(model)
    expected, plan = values(model), quantized.plan
    assert sorted(plan.bits) == [2, 2, 4, 4] and quantized.report.average_bits == 3.0
    folder = quantized.save(tmp_path / "m", tokenizer=tiny_tokenizer, storage=storage)
    again = load(folder).model
    assert plan_of(again) == plan and again.dtype == dtype and same(values(again), expected)
    assert same(values(transfuse.load(folder).model), expected)
    own = {name for name, layer in again.named_modules() if hasattr(layer, "W_q")}
    assert len(own) == (28 if (storage, backend) == ("packed", "hqq") else 0)
    assert torch.allclose(logits(again), logits(model), atol=1e-4 if dtype == torch.float32 else 0.2)
    if storage == "plain":
        assert same(values(AutoModelForCausalLM.from_pretrained(folder)), expected)
    else:
        whole = sum(t.numel() * t.element_size() for t in expected.values())
        assert (folder / PACKED).stat().st_size < 0.95 * whole
    assert json.loads((folder / "config.json").read_text())["transfuse_bit_plan"]["bits"] == list(plan.bits)
    with pytest.raises(BadInput, match="quantized already"):
        make().quantize(again, ROWS)


def test_rounded_values_and_sizes(tiny_lm):
    model, original = tiny_lm("llama"), tiny_lm("llama")
    report = apply_bit_plan(model, BitPlan((4, 2, 16, 4), (12288,) * 4, group_size=8))
    for (name, value), source in zip(model.named_parameters(), original.parameters(), strict=True):
        layer = re.match(r"model\.layers\.(\d)\..*proj", name)
        bits = (4, 2, 16, 4)[int(layer[1])] if layer else 16
        wanted = source if bits == 16 else rtn(source, bits, 8, step_dtype=torch.float16).values()
        assert torch.equal(value, wanted), name
    size = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 96
    assert report.layers_before == 4 * 4 * size
    assert report.layers_after == size * (4 + 2 + 4) // 8 + 3 * size // 8 * 4 + 4 * size
    assert report.other == 4 * (2 * 400 * 32 + 9 * 32)
    assert report.before == sum(4 * p.numel() for p in original.parameters())
    assert report.average_bits == 26 / 4 and report.stored_bits == pytest.approx((10 + 3 * 4 + 32) / 4)


def test_a_whole_model_fits_its_bytes(tiny_lm):
    model = tiny_lm("llama")
    least = make(target_bits=2).quantize(tiny_lm("llama"), ROWS).report.after
    done = make(target_bytes=least + 4000).quantize(model, ROWS)
    assert least < done.report.after <= least + 4000
    with pytest.raises(BadInput, match="target_bytes"):
        make(target_bytes=100_000 if least > 100_000 else least - 1).quantize(tiny_lm("llama"), ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": None},
        {"choices": (16, 4)},
        {"backend": "hqq"},
        {"backend": "hqq", "choices": (16, 3)},
        {"backend": "hqq", "group_size": None},
        {"choices": (3, 2)},
    ],
)
def test_bytes_are_what_rounding_takes(tiny_lm, options, dtype):
    """Whole rows have steps too, hqq's have the weights' dtype, and a layer left alone keeps its own."""
    high, low = options.get("choices", (4, 2))
    zd_of = {"importance": "zd", **options}
    ends = [
        make(target_bits=b, **zd_of).quantize(tiny_lm("llama").to(dtype)).report.after for b in (high, low)
    ]
    for share in (0.3, 0.55):
        budget = round(ends[1] + share * (ends[0] - ends[1]))
        done = make(target_bytes=budget, **zd_of).quantize(tiny_lm("llama").to(dtype))
        assert done.report.after <= budget < done.report.after + (ends[0] - ends[1]) / 4 + 1
        assert done.plan.stored_bits == pytest.approx(done.report.stored_bits, rel=1e-12)
        assert plan_of(done.model) == done.plan
    with pytest.raises(BadInput, match=f"target_bytes = {ends[1] - 1} is less .*; use {ends[1]} or more"):
        make(target_bytes=ends[1] - 1, **zd_of).quantize(tiny_lm("llama").to(dtype))


def test_scores_of_a_model_know_its_bytes(tiny_lm):
    model = tiny_lm("llama", layers=2)
    scores = layer_importance(model, "zd")
    plan = allocate_bits(scores, target_bytes=10**6, choices=(16, 4), backend="hqq", group_size=8)
    assert plan.bits == (16, 16) and plan.stored_bits == 32  # of float32 weights
    four = allocate_bits(scores, 4, (16, 4), backend="hqq", group_size=8)
    assert four.stored_bits == 4 + 2 * 32 / 8
    assert BitPlan.from_dict(four.to_dict()) == four
    older = {key: value for key, value in four.to_dict().items() if key != "stored"}
    assert BitPlan.from_dict(older).bits == four.bits


@pytest.mark.parametrize("value", [-7e4, math.nan])
@pytest.mark.parametrize("backend", ["rtn", "hqq"])
def test_a_matrix_that_cannot_be_rounded_changes_nothing(tiny_lm, value, backend):
    model = tiny_lm("llama")
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = value if backend == "rtn" else math.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = BitPlan((4, 2, 4, 2), (1,) * 4, group_size=8, backend=backend)
    with pytest.raises(BadInput, match=r"model\.layers\.3\.mlp\.up_proj\.weight = \(96, 32\) is not finite"):
        apply_bit_plan(model, plan)
    assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in model.state_dict().items())
    assert not hasattr(model.config, "transfuse_bit_plan")


def test_a_plan_of_a_wider_model_is_refused(tiny_lm):
    plan = make(target_bits=3, importance="zd").plan(tiny_lm("llama"))
    wider = tiny_lm("llama", hidden=64)
    with pytest.raises(BadInput, match="sizes of another model"):
        apply_bit_plan(wider, plan)
    unknown = allocate_bits([1.0, 2.0, 3.0, 4.0], 3.0, group_size=8)
    assert apply_bit_plan(wider, unknown).average_bits == 3  # sizes of ones are no one's


def test_knapsack_of_three_widths(tiny_lm):
    done = make(target_bits=3.7, choices=(8, 4, 2), importance="sensitivity", allocation="knapsack").quantize(
        tiny_lm("llama"), ROWS
    )
    assert done.report.average_bits <= 3.7 and len(done.plan.bits) == 4


def test_expert_stacks_and_conv1d_count_as_weights(tiny_lm, tmp_path, tiny_tokenizer):
    model = mixtral()
    slots = layer_slots(model)
    assert [s.attribute for s in slots[0]][-2:] == ["gate_up_proj", "down_proj"] and len(slots[0]) == 6
    before, router = logits(model), model.model.layers[0].mlp.gate.weight.clone()
    make(target_bits=3).quantize(model, ROWS)
    assert torch.equal(model.model.layers[0].mlp.gate.weight, router)
    assert not torch.allclose(logits(model), before)
    for storage in ("plain", "packed"):
        folder = save(model, tmp_path / storage, tokenizer=tiny_tokenizer, storage=storage)
        assert same(values(load(folder).model), values(model))
    with pytest.raises(NotApplicable, match="linear layers only"):
        make(backend="hqq").quantize(mixtral(), ROWS)
    gpt = tiny_lm("gpt2", layers=2)
    weight = gpt.transformer.h[0].mlp.c_fc.weight.clone()
    apply_bit_plan(gpt, BitPlan((3, 3), (1, 1), group_size=8))
    expected = rtn(weight.T.contiguous(), 3, 8, step_dtype=torch.float16).values().T
    assert torch.equal(gpt.transformer.h[0].mlp.c_fc.weight, expected)


def test_groups_that_do_not_fit_change_nothing(tiny_lm):
    model = tiny_lm("llama")
    before = fingerprint(model)
    for options in ({"group_size": 24}, {"group_size": 5}, {"choices": (4, 9)}, {"backend": "other"}):
        with pytest.raises(BadInput):
            LayerwiseQuant(**{"group_size": 8, **options}).quantize(model, ROWS)
    with pytest.raises(BadInput, match="model of 4"):
        apply_bit_plan(model, BitPlan((4, 2), (1, 1), group_size=8))
    with pytest.raises(BadInput, match="sizes of another model"):
        apply_bit_plan(model, BitPlan((4, 2, 4, 4), (1, 2, 1, 1), ("a", "b", "c", "d"), group_size=8))
    with pytest.raises(BadInput, match="carries no bit plan"):
        save(model, "nowhere")
    assert fingerprint(model) == before


def test_hqq_would_drop_groups(tiny_lm):
    """hqq packs four groups of two bits into a byte and forgets what is left over."""
    model = tiny_lm("llama", layers=2, hidden=24)
    with pytest.raises(NotApplicable, match="cannot pack"):
        LayerwiseQuant(backend="hqq", group_size=4).quantize(model, ROWS)


def test_a_broken_packed_folder(tiny_lm, tiny_tokenizer, tmp_path):
    model = tiny_lm("llama", layers=2)
    make(target_bits=3).quantize(model, ROWS)
    folder = save(model, tmp_path / "m", tokenizer=tiny_tokenizer, storage="packed")
    matrices, others, header = read_packed(folder)
    assert BitPlan.from_dict(header["plan"]) == plan_of(model)
    del others["model.norm.weight"]
    write_packed(folder, matrices, others)
    with pytest.raises(CorruptFile, match="lacks 1 weights"):
        transfuse.load(folder)
    (folder / PACKED).write_bytes((folder / PACKED).read_bytes()[:1000])
    with pytest.raises(CorruptFile):
        transfuse.load(folder)


# --- curves ------------------------------------------------------------------------------------------------


def test_curves_measure_what_plans_do(tiny_lm):
    model = tiny_lm("llama", layers=3)
    before = fingerprint(model)
    scores = layer_importance(model, "zd")
    orders = orders_of(scores, random=1, seed=1)
    assert orders["reverse"] == scores.order()[::-1] and sorted(orders["random_0"]) == [0, 1, 2]
    assert orders_of(scores, random=1, seed=1) == orders
    assert orders["last_to_first"] == orders["first_to_last"][::-1] == [2, 1, 0]
    calls = []

    def judge(each):
        calls.append(1)
        return mean_loss(each, ROWS[:2])

    points = quantization_curve(model, orders, judge, group_size=8)
    assert fingerprint(model) == before and len(points) == 5 * 4
    sets = {frozenset(order[:k]) for order in orders.values() for k in range(4)}
    assert len(calls) == len(sets) < len(points)
    for point in points[:4]:
        lowered = orders["zd"][: point.lowered]
        plan = BitPlan(tuple(2 if i in lowered else 4 for i in range(3)), (1,) * 3, group_size=8)
        copy = tiny_lm("llama", layers=3)
        apply_bit_plan(copy, plan)
        assert point.value == pytest.approx(mean_loss(copy, ROWS[:2]), rel=1e-6)
        assert point.average_bits == plan.average_bits and point.fraction == point.lowered / 3
    first = [p.value for p in points if p.order == "zd"]
    assert area(points, "zd") == pytest.approx(sum((a + b) / 6 for a, b in itertools.pairwise(first)))
    assert area(points, "zd", until=0.7) == pytest.approx(
        sum((a + b) / 6 for a, b in itertools.pairwise(first[:3]))
    )
    with pytest.raises(BadInput, match="has 1 points"):
        area(points, "zd", until=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_pruned_layers_are_gone(tiny_lm, architecture):
    from transfuse.core.pruning import prune

    model = tiny_lm(architecture)
    before = fingerprint(model)
    points = pruning_curve(model, {"own": [2, 0, 1, 3]}, lambda m: mean_loss(m, ROWS), high=16, group_size=8)
    assert fingerprint(model) == before and [p.lowered for p in points] == [0, 1, 2, 3]
    for point, keep in zip(points[1:], ([0, 1, 3], [1, 3], [3]), strict=True):
        assert point.value == pytest.approx(mean_loss(prune(model, keep=keep), ROWS), rel=1e-5)
    names = taps.decoder_layers(model)
    with taps.skip(model, [1]):
        assert taps.decoder_layers(model) == names
    with pytest.raises(BadInput, match="not blocks"), taps.skip(model, [4]):
        pass


def test_curves_with_hqq_and_steps(tiny_lm):
    points = quantization_curve(
        tiny_lm("llama", layers=2), {"own": [0, 1]}, lambda m: mean_loss(m, ROWS), high=16, steps=1, backend="hqq",
        group_size=8,
    )  # fmt: skip
    assert [p.lowered for p in points] == [0, 2]
    other = tiny_lm("llama", layers=2)
    apply_bit_plan(other, BitPlan((2,) * 2, (1,) * 2, group_size=8, backend="hqq"))
    assert points[-1].value == pytest.approx(mean_loss(other, ROWS), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 5}, "more than the model's 4 layers"),
        ({"steps": [0, 7]}, "not numbers of 4 layers"),
        ({"orders": {"a": [0, 1, 2, 2]}}, "does not name each"),
        ({"orders": {}}, "is empty"),
        ({"low": 4}, "not below"),
    ],
)
def test_curves_refuse(tiny_lm, options, says):
    arguments = {"orders": {"a": [0, 1, 2, 3]}, "group_size": 8, **options}
    with pytest.raises(BadInput, match=says):
        quantization_curve(tiny_lm("llama"), arguments.pop("orders"), lambda m: 0.0, **arguments)


# --- recipes -----------------------------------------------------------------------------------------------


def test_windows(tiny_tokenizer):
    text = "A question: who built the bridge? " * 30
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = windows(tiny_tokenizer, text, 3, 10)
    assert rows.shape == (3, 10) and rows[0].tolist() == ids[:10] and rows[2].tolist() == ids[-10:]
    with pytest.raises(BadInput, match="do not make"):
        windows(tiny_tokenizer, "short", 3, 10)


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_a_run_leaves_a_model_that_loads(tiny_lm, tiny_tokenizer, tmp_path, storage):
    tiny_lm("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("New facts move from documents into weights, and back. " * 40)
    out = recipe.run(
        {
            "model": str(tmp_path / "model"),
            "method": {"uses": "layerwise-quant", "with": {"target_bits": 3.0, "group_size": 8, "choices": [4, 2]}},
            "texts": str(tmp_path / "text.txt"), "windows": 2, "length": 32, "held_out_tokens": 60, "storage": storage,
        },
        output=tmp_path / "out",
    )  # fmt: skip
    record = read_lineage(out)
    found = record["measurements"]
    assert found["average_bits"] == 3.0 and found["bytes_packed"] < found["bytes_before"]
    assert (
        found["perplexity_after"] > 0 and found["perplexity_before"] > 0 and record["input_sha256"]["texts"]
    )
    model = transfuse.load(out).model
    forms = json.loads((out / "bit_plan.json").read_text())
    assert BitPlan.from_dict(forms["plan"]) == plan_of(model) and forms["llamacpp"][0].startswith("blk")
    with pytest.raises(BadInput, match="texts"):
        recipe.run({"model": str(tmp_path / "model"), "method": "layerwise-quant"}, output=tmp_path / "other")


def test_bf16_and_warnings(tiny_lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = make(importance="zd").quantize(tiny_lm("llama").to(torch.bfloat16))
    assert logits(done.model).isfinite().all() and done.plan.scored == "zd"
