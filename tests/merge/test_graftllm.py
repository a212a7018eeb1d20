"""GraftLLM: GPTQ by a slow loop, packs by hand, bytes on disk, plugging in and out, routing, refusals."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.generate import generate_ids, pad_batch
from transfuse.core.models import fingerprint
from transfuse.core.packed import PACKED
from transfuse.core.training import generator, seeded
from transfuse.merge._gptq import gptq, grid
from transfuse.merge._pack_calibrate import _Walk, calibration_batches, compress
from transfuse.merge._pack_pieces import LowRank, Sparse, Whole
from transfuse.merge.graftllm import GraftedModel, GraftLLM, ModulePolicy, SkillPack, SkillRouter

IDENTITY = True
ALIKE = True
SMALL = ((2, 8), (6, 4), (8, 2))
POLICY = ModulePolicy(attention=SMALL, mlp=SMALL, group_size=16)
FINE = ModulePolicy(attention=((64, 16),), mlp=((64, 16),), share=1.0)
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [21, 22, 23]]


def make(base, experts, tokenizer, *, seed=0):
    ids, mask = pad_batch(ROWS, 0)
    made = GraftLLM(
        copy.deepcopy(base), experts=experts, tasks=["towns", "talk"], policy=POLICY, seed=seed,
        calibration={"input_ids": ids, "attention_mask": mask},
    )  # fmt: skip
    return made.build()


def save(made, folder, tokenizer):
    made.save_pretrained(folder, tokenizer)


def load(folder, base):
    return GraftedModel.from_pretrained(folder, base)


def undo(made):
    return made.release()


def moved(model, seed, scale=0.05):
    model, random = copy.deepcopy(model), generator(seed)
    for parameter in model.parameters():
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=random))
    return model


class Net(nn.Module):
    """Three linear layers, the last two on one input; a norm; a convolution that is called first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.first = nn.Linear(36, 20)
        self.norm = nn.LayerNorm(20)
        self.left, self.right = nn.Linear(20, 7), nn.Linear(20, 7, bias=False)

    def forward(self, x):
        hidden = torch.relu(self.first(torch.relu(self.conv(x[:, None])).flatten(1)))
        hidden = self.norm(hidden)
        return self.left(hidden) * torch.tanh(self.right(hidden))


def net(seed=0):
    with seeded(seed):
        return Net().eval()


def inputs(rows=40, width=12, seed=5):
    return torch.randn(rows, width, generator=generator(seed))


# --- GPTQ --------------------------------------------------------------------------------------------------


def slow_grid(values, bits):
    low, high = min(0.0, *values), max(0.0, *values)
    if low == high == 0:
        low, high = -1.0, 1.0
    step = (high - low) / (2**bits - 1)
    return step, float(np.round(-low / step))


def slow_gptq(weight, hessian, bits, group, damp, act_order, block):
    """One number at a time in float64, by eliminating rows and columns of the inverse."""
    w = weight.double().numpy().copy()
    h = hessian.double().numpy().copy()
    rows, width = w.shape
    for j in range(width):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    order = sorted(range(width), key=lambda j: -h[j, j]) if act_order else list(range(width))
    mean = sum(h[j, j] for j in range(width)) / width
    for j in range(width):
        h[j, j] += damp * mean
    inverse = np.linalg.inv(h)
    found = np.zeros_like(w)
    seen = w.copy()
    grids = None
    for place, j in enumerate(order):
        if place % block == 0:
            seen = w.copy()
        if place % group == 0:
            members = order[place : place + group]
            grids = [slow_grid([seen[r, k] for k in members], bits) for r in range(rows)]
        for r in range(rows):
            step, zero = grids[r]
            code = min(max(np.round(w[r, j] / step) + zero, 0), 2**bits - 1)
            found[r, j] = (code - zero) * step
            error = (w[r, j] - found[r, j]) / inverse[j, j]
            for k in order[place + 1 :]:
                w[r, k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.from_numpy(found)


def hessian_of(x):
    return 2 / len(x) * x.double().T @ x.double()


CASES = {"many": (60, ()), "few": (5, ()), "dead": (60, (0, 3, 9)), "few and dead": (4, (2,))}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group", "block"), [(4, 128, 128), (2, 4, 4), (3, 5, 10), (8, 4, 128)])
def test_gptq_by_a_slow_loop(case, act_order, bits, group, block):
    count, dead = CASES[case]
    draw = generator(bits)
    weight = torch.randn(6, 13, generator=draw, dtype=torch.float64)
    x = torch.randn(count, 13, generator=draw, dtype=torch.float64) @ torch.randn(
        13, 13, generator=draw, dtype=torch.float64
    )
    x[:, list(dead)] = 0
    options = {"act_order": act_order, "damp": 0.01}
    found = gptq(weight, hessian_of(x), bits, group_size=group, block=block, **options)
    wanted = slow_gptq(weight, hessian_of(x), bits, group, block=block, **options)
    assert found.values().dtype == torch.float64
    assert torch.allclose(found.values(), wanted, atol=1e-9)
    assert not found.values()[:, list(dead)].any()
    single = gptq(weight.float(), hessian_of(x), bits, group_size=group, block=block, **options)
    near = (single.values().double() - wanted).abs() < 1e-4  # a number on the border of two codes may differ
    assert near.float().mean() > 0.95


@pytest.mark.parametrize("count", [500, 6])
def test_gptq_errs_less_than_plain_rounding(count):
    """On the inputs that it was made for, also where they are fewer than the columns."""
    draw = generator(1)
    weight = torch.randn(16, 40, generator=draw)
    x = torch.randn(count, 40, generator=draw) @ torch.randn(40, 40, generator=draw)
    for bits in (2, 3, 4):
        near = gptq(weight, None, bits, group_size=16).values()
        best = gptq(weight, hessian_of(x), bits, group_size=16).values()
        errors = [float((x @ (found - weight).T).square().sum()) for found in (best, near)]
        assert errors[0] < 0.7 * errors[1]


def test_grids_by_hand():
    weight = torch.tensor([[-1.0, 0.5, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
    step, zero = grid(weight, 2)
    assert step.tolist() == pytest.approx([1.0, 1.0, 2 / 3, 1.0])
    assert zero.tolist() == [1.0, 0.0, 2.0, 3.0]
    found = gptq(weight, None, 2)
    assert torch.equal(found.values()[0], torch.tensor([-1.0, 0.0, 2.0]))
    assert not found.values()[2].any()
    tiny = gptq(torch.full((2, 3), 1e-9), None, 4, step_dtype=torch.float16)
    assert not tiny.values().any() and tiny.codes.step.dtype == torch.float16


def test_plain_rounding_is_the_nearest_point_of_the_grid():
    weight = torch.randn(5, 21, generator=generator(3))
    found = gptq(weight, None, 3, group_size=8)
    assert found.owner is None and found.codes.step.shape == (5, 3)
    for row in range(5):
        for column in range(21):
            members = weight[row, column // 8 * 8 : column // 8 * 8 + 8].double().tolist()
            step, zero = slow_grid(members, 3)
            points = [(code - zero) * step for code in range(8)]
            nearest = min(points, key=lambda point: abs(point - float(weight[row, column])))
            assert float(found.values()[row, column]) == pytest.approx(nearest, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"damp": -1.0}, "damp"),
        ({"hessian": torch.eye(3)}, "hessian"),
        ({"hessian": torch.ones(6, 6), "damp": 0.0}, "positive definite"),
        ({"weight": torch.full((2, 6), math.nan)}, "weight"),
        ({"weight": torch.ones(1, 600), "hessian": None, "group_size": 2}, "too many groups"),
    ],
)
def test_what_gptq_refuses(options, named):
    given = {"weight": torch.randn(2, 6, generator=generator(0)), "hessian": torch.eye(6), "bits": 4}
    with pytest.raises(BadInput, match=named):
        gptq(**{**given, **options})


# --- pieces ------------------------------------------------------------------------------------------------


def test_operators_by_name():
    policy = ModulePolicy(rules={**ModulePolicy().rules, "score": "leave"})
    found = {
        "model.embed_tokens.weight": "prune", "lm_head.weight": "prune", "transformer.wte.weight": "prune",
        "model.layers.0.self_attn.q_proj.weight": "attention", "transformer.h.0.attn.c_attn.weight": "attention",
        "model.layers.0.mlp.up_proj.weight": "mlp", "head.weight": "mlp", "score.weight": "leave",
    }  # fmt: skip
    assert {name: policy.operator(name, 2) for name in found} == found
    assert policy.operator("model.layers.0.self_attn.q_proj.bias", 1) == "whole"
    assert policy.operator("score.bias", 1) == "leave"
    assert policy.groups("attention", 4096) == [(0, 20, 8), (20, 200, 4), (200, 1000, 2)]
    assert policy.groups("mlp", 1024) == [(0, 20, 8), (20, 200, 4), (200, 1024, 2)]
    assert policy.groups("mlp", 10) == [(0, 10, 8)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention": ()}, "attention"),
        ({"mlp": ((4, 9),)}, "mlp"),
        ({"mlp": ((0, 8),)}, "mlp"),
        ({"mlp": ((4, 2), (4, 8))}, "rising"),
        ({"share": 0.0}, "share"),
        ({"rules": {"(": "mlp"}}, "rules"),
        ({"other": "svd"}, "unknown"),
        ({"group_size": 0}, "group_size"),
        ({"damp": -0.1}, "damp"),
        ({"share": "x"}, "share"),
        ({"share": math.nan}, "share"),
        ({"share": 2}, "share"),
        ({"damp": "x"}, "damp"),
        ({"damp": math.nan}, "damp"),
        ({"group_size": "x"}, "group_size"),
        ({"group_size": 2.5}, "group_size"),
        ({"attention": 5}, "attention"),
        ({"attention": (("20", 8),)}, "attention"),
        ({"attention": ((20.5, 8),)}, "attention"),
        ({"mlp": ((20, 8.0),)}, "mlp"),
    ],
)
def test_bad_policies_are_named(options, named):
    base = net()
    with pytest.raises(BadInput, match=named):
        SkillPack.from_models(moved(base, 1), base, policy=ModulePolicy(**options))


def test_what_packs_are_not_made_of():
    base = net()
    tuned = moved(base, 1)
    with pytest.raises(BadInput, match="is no ModulePolicy"):
        SkillPack.from_models(tuned, base, policy={"share": 0.1})
    pack = SkillPack.from_models(tuned, base, name="one", policy=POLICY)
    pack.apply(base)
    with pytest.raises(BadInput, match=r"base = .* has packs plugged in: one"):
        SkillPack.from_models(tuned, base, policy=POLICY)
    pack.remove(base)
    assert SkillPack.from_models(tuned, base, policy=POLICY).facts["base"] == fingerprint(base)


def test_sums_that_float16_does_not_hold_are_refused():
    """Two packs that are fine alone; afterwards the model is the base."""
    base = nn.Sequential(nn.Linear(2, 2)).half()
    packs = []
    for i in range(2):
        tuned = copy.deepcopy(base)
        tuned[0].bias.data.add_(40000 + 64 * i)
        packs.append(SkillPack.from_models(tuned, base, name=str(i)))
    before = fingerprint(base)
    packs[0].apply(base)
    with pytest.raises(BadInput, match=r"0\.bias = 800\d\d\..* is too large for float16.*bfloat16"):
        packs[1].apply(base)
    assert fingerprint(base) == before


def test_the_largest_entries_are_kept():
    delta = torch.tensor([[0.0, -5.0, 1.0, 2.0], [0.5, 0.0, -3.0, 0.1]])
    for share, count in ((0.25, 2), (0.5, 4), (1.0, 6)):
        piece = Sparse.of(delta, share)
        order = sorted(delta.flatten().tolist(), key=abs, reverse=True)
        assert sorted(piece.entries.float().tolist(), key=abs, reverse=True) == pytest.approx(
            order[:count], rel=1e-3
        )
        kept = piece.delta() != 0
        assert torch.allclose(piece.delta()[kept], delta[kept], rtol=1e-3) and int(kept.sum()) == count
    big = torch.randn(40, 50, generator=generator(0))
    few, many = Sparse.of(big, 0.01), Sparse.of(big, 0.2)
    assert few.where.dtype == torch.int32 and many.where.dtype == torch.uint8 and len(many.where) == 250
    assert int((few.delta() != 0).sum()) == 20 and int((many.delta() != 0).sum()) == 400


def test_fine_packs_give_the_fine_tune():
    """All directions in 16 bits, all entries: only rounding is left."""
    base = net()
    tuned = moved(base, 1)
    pack = SkillPack.from_models(tuned, base, policy=FINE)
    kinds = {name: type(piece) for name, piece in pack.pieces.items()}
    assert kinds["conv.weight"] is LowRank and kinds["norm.weight"] is Whole
    assert set(kinds) == set(base.state_dict())
    for name, tensor in tuned.state_dict().items():
        delta = tensor - base.state_dict()[name]
        assert torch.allclose(pack.delta(name), delta, atol=2e-4), name
    model = copy.deepcopy(base)
    pack.apply(model)
    assert torch.allclose(model(inputs()), tuned(inputs()), atol=5e-3)


def test_a_rank_is_the_best_approximation():
    """Without rounding, what is left out is what a truncated SVD leaves out."""
    base = net()
    tuned = moved(base, 1)
    policy = ModulePolicy(attention=((3, 16),), mlp=((2, 16), (3, 16)))
    pack = SkillPack.from_models(tuned, base, policy=policy)
    delta = (tuned.first.weight - base.first.weight).detach()
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    left = float((pack.delta("first.weight") - delta).norm())
    assert left == pytest.approx(math.sqrt((values[5:] ** 2).sum()), rel=1e-2)
    assert np.linalg.matrix_rank(pack.delta("first.weight").double().numpy(), tol=1e-5) == 5


def test_unchanged_and_left_tensors_are_not_stored():
    base = net()
    tuned = copy.deepcopy(base)
    tuned.left.weight.data += 0.1
    tuned.first.weight.data += 0.1
    pack = SkillPack.from_models(tuned, base, policy=ModulePolicy(rules={"first": "leave"}))
    assert list(pack.pieces) == ["left.weight"]
    same = SkillPack.from_models(base, base)
    assert same.nbytes == 0 and same.ratio == 0
    with pytest.raises(BadInput, match="is not changed"):
        pack.delta("first.weight")


# --- calibration -------------------------------------------------------------------------------------------


def by_hand(layer, delta, x, cuts, group):
    """GPTQ of one layer's groups on given inputs: V, then U on y = x V S; the sum of the groups."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    total = torch.zeros_like(delta)
    start = 0
    for count, bits in cuts:
        stop = min(start + count, len(s))
        if stop == start:
            break
        scale = s[start:stop].half().float()
        options = {"group_size": group, "step_dtype": torch.float16}
        v = gptq(vh[start:stop], hessian_of(x), bits, **options).values()
        y = x.double() @ (v.double().T * scale)
        left = gptq(u[:, start:stop], hessian_of(y), bits, **options).values()
        total += (left * scale) @ v
        start = stop
    return total


def test_layers_are_rounded_on_what_the_rounded_ones_below_give():
    base = net()
    tuned = moved(base, 1, 0.2)
    x = inputs(50)
    pack = SkillPack.from_models(tuned, base, policy=POLICY, calibration=x)
    walked = copy.deepcopy(base)
    for name in ("conv.weight", "conv.bias", "first.bias", "norm.weight", "norm.bias", "left.bias"):
        walked.state_dict()[name].add_(pack.delta(name))
    hidden = torch.relu(walked.conv(x[:, None])).flatten(1).detach()
    for name, given in (("first", lambda: hidden), ("left", None), ("right", None)):
        if given is None:
            seen = walked.norm(torch.relu(walked.first(hidden))).detach()
        else:
            seen = given()
        layer = walked.get_submodule(name)
        delta = (tuned.get_submodule(name).weight - base.get_submodule(name).weight).detach()
        wanted = by_hand(layer, delta, seen, SMALL, 16)
        assert torch.allclose(pack.delta(f"{name}.weight"), wanted, atol=1e-4), name
        layer.weight.data += pack.delta(f"{name}.weight")


def test_stages_of_a_block(tiny_lm):
    base = tiny_lm("llama", layers=2)
    tuned = moved(base, 1)
    batches = calibration_batches(base, torch.tensor([[5, 6, 7]]))
    assert batches[0]["use_cache"] is False
    names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    walk = _Walk(base, {}, dict.fromkeys(names), POLICY)
    stages = walk._stages(batches[0])
    short = [sorted(name.rpartition(".")[2] for name in stage) for stage in stages]
    block = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert short == block * 2
    assert tuned is not base


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_blocks_by_a_slow_walk(tiny_lm, architecture):
    """The same by whole passes through the model with hooks, block after block, group after group."""
    base = tiny_lm(architecture, layers=2)
    tuned = moved(base, 1)
    ids = torch.randint(3, 400, (4, 9), generator=generator(2))
    pack = SkillPack.from_models(tuned, base, policy=POLICY, calibration=ids)
    turn = (lambda w: w.T) if architecture == "gpt2" else (lambda w: w)
    walked = copy.deepcopy(base)
    low = {name: piece for name, piece in pack.pieces.items() if isinstance(piece, LowRank)}
    for name in pack.pieces:
        if name not in low:
            walked.state_dict()[name].add_(pack.delta(name))
    stages = (
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
         ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
        if architecture == "llama"
        else [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
    )  # fmt: skip
    stem = "model.layers" if architecture == "llama" else "transformer.h"

    def seen(layer):
        kept = []
        handle = layer.register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
        walked(ids)
        handle.remove()
        return kept[0].flatten(0, 1)

    for block in range(2):
        layers = [f"{stem}.{block}.{name}" for stage in stages for name in stage]
        factors, done = {}, {}
        for name in layers:
            own, other = (turn(m.get_submodule(name).weight.detach()) for m in (base, tuned))
            factors[name] = torch.linalg.svd(other - own, full_matrices=False)
            done[name] = own.clone()
        start = 0
        for count, bits in SMALL:
            stop = start + count
            for name in layers:
                u, s, vh = factors[name]
                now = done[name] + (u[:, start:stop] * s[start:stop].half().float()) @ vh[start:stop]
                walked.get_submodule(name).weight.data = turn(now).contiguous()
            for stage in stages:
                for name in stage:
                    name = f"{stem}.{block}.{name}"
                    u, s, vh = factors[name]
                    scale = s[start:stop].half().float()
                    x = seen(walked.get_submodule(name)).double()
                    options = {"group_size": 16, "step_dtype": torch.float16}
                    v = gptq(vh[start:stop], hessian_of(x), bits, **options).values()
                    y = x @ (v.double().T * scale)
                    left = gptq(u[:, start:stop], hessian_of(y), bits, **options).values()
                    done[name] += (left * scale) @ v
                for name in stage:
                    name = f"{stem}.{block}.{name}"
                    walked.get_submodule(name).weight.data = turn(done[name]).contiguous()
            start = stop
        for name in layers:
            own = turn(base.get_submodule(name).weight.detach())
            found = turn(pack.delta(f"{name}.weight"))
            # Codes on a border may differ after thousands of steps in other orders of summation: few of them do.
            same = (found - (done[name] - own)).abs() < 1e-3
            assert same.float().mean() > 0.97, name


def test_calibration_helps():
    """On the inputs of the skill the calibrated pack is nearer to the fine-tune than the rounded one."""
    base = net()
    tuned = moved(base, 1, 0.2)
    x = inputs(200) * torch.linspace(0.1, 3, 12)
    coarse = ModulePolicy(mlp=((1, 8), (19, 2)))
    errors = []
    for calibration in (x, None):
        pack = SkillPack.from_models(tuned, base, policy=coarse, calibration=calibration)
        assert pack.facts["calibrated"] is (calibration is not None)
        model = copy.deepcopy(base)
        pack.apply(model)
        errors.append((model(x) - tuned(x)).square().mean().item())
    assert errors[0] < 0.9 * errors[1]


def test_padding_and_batches_do_not_matter(tiny_lm):
    base = tiny_lm("llama", layers=1)
    tuned = moved(base, 1)
    ids, mask = pad_batch(ROWS, 0)
    left = dict(zip(("input_ids", "attention_mask"), pad_batch(ROWS, 0, side="left"), strict=True))
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    forms = [
        {"input_ids": ids, "attention_mask": mask},
        [{"input_ids": torch.tensor([row])} for row in ROWS],
        left,
        {"input_ids": ids, "attention_mask": mask, "labels": ids},
    ]
    packs = [SkillPack.from_models(tuned, base, policy=POLICY, calibration=form) for form in forms]
    for name in packs[0].pieces:
        for pack in packs[1:]:
            same = (pack.delta(name) - packs[0].delta(name)).abs() < 1e-3
            assert same.float().mean() > 0.97, name


def test_layers_that_no_input_reaches_are_rounded_plainly():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    with seeded(0):
        base = Spare().eval()
    tuned = moved(base, 1)
    plain = SkillPack.from_models(tuned, base, policy=POLICY)
    made = SkillPack.from_models(tuned, base, policy=POLICY, calibration=inputs(30, 6))
    assert torch.equal(made.delta("spare.weight"), plain.delta("spare.weight"))
    assert not torch.equal(made.delta("used.weight"), plain.delta("used.weight"))


class Gated(nn.Module):
    """Its last layer is called for batches of a positive sum alone."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.first(x)
        return hidden + self.last(torch.tanh(hidden)) if x.sum() > 0 else hidden


def test_batches_that_do_not_reach_a_layer_do_not_count_for_it():
    with seeded(0):
        base = Gated().eval()
    tuned, reach = moved(base, 1), inputs(30, 6).abs()
    made = SkillPack.from_models(tuned, base, policy=POLICY, calibration=[reach, -reach])
    first = SkillPack.from_models(tuned, base, policy=POLICY, calibration=[-reach])
    plain = SkillPack.from_models(tuned, base, policy=POLICY)
    assert torch.equal(first.delta("last.weight"), plain.delta("last.weight"))
    assert not torch.equal(made.delta("last.weight"), plain.delta("last.weight"))
    # x and -x give the first layer one and the same Hessian, so that the last one sees what it would without -x.
    alone = SkillPack.from_models(tuned, base, policy=POLICY, calibration=[reach])
    assert torch.equal(made.delta("last.weight"), alone.delta("last.weight"))


def test_calibration_of_another_form_is_named():
    base = net()
    for given, says in (("text", "are no inputs"), ([], "holds no inputs"), ([3], "is no input")):
        with pytest.raises(BadInput, match=says):
            SkillPack.from_models(moved(base, 1), base, calibration=given)
    assert compress(base, [], POLICY, calibration_batches(base, inputs())) == {}


# --- bytes -------------------------------------------------------------------------------------------------


def example(tmp_path):
    base = net()
    pack = SkillPack.from_models(moved(base, 1, 0.2), base, name="towns", policy=POLICY, calibration=inputs())
    return base, pack, pack.save_pretrained(tmp_path / "pack")


def test_every_byte_is_counted(tmp_path):
    base, pack, folder = example(tmp_path)
    tensors = load_file(folder / PACKED)
    assert pack.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert any(name.endswith("/owner") for name in tensors)
    numbers = sum(p.numel() for p in base.parameters())
    assert pack.ratio == pytest.approx(pack.nbytes / (2 * numbers))
    # first.weight [20, 36]: groups of 2, 6 and 8 columns; V in groups of 16 along 36, U in one group per row.
    name = "first.weight"
    own = {key: tensor.nbytes for key, tensor in tensors.items() if key.startswith(f"{name}/")}
    wanted = 2 * 16  # S
    for count, bits in SMALL:
        wanted += math.ceil(count * 36 * bits / 8) + 3 * count * 3 + math.ceil(36 * 2 / 8)
        wanted += math.ceil(20 * count * bits / 8) + 3 * 20
    assert sum(own.values()) == wanted


def test_a_pack_comes_back(tmp_path):
    base, pack, folder = example(tmp_path)
    again = SkillPack.from_pretrained(folder)
    assert again.name == "towns" and again.digest == pack.digest and again.facts == pack.facts
    assert all(torch.equal(again.delta(name), pack.delta(name)) for name in pack.pieces)
    assert again.nbytes == pack.nbytes and again.pieces.keys() == pack.pieces.keys()
    model = copy.deepcopy(base)
    SkillPack.load(folder).apply(model)
    record = json.loads((folder / "transfuse.json").read_text())
    assert record["method"] == "graftllm" and record["measurements"]["bytes"] == pack.nbytes


@pytest.mark.parametrize("file", ["skill.json", PACKED])
def test_a_flipped_byte_is_noticed(tmp_path, file):
    _, _, folder = example(tmp_path)
    path = folder / file
    whole = path.read_bytes()
    for place in sorted({*range(0, len(whole), max(1, len(whole) // 150)), 8, 9, len(whole) - 1}):
        for bit in (0, 5, 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(CorruptFile):
                SkillPack.from_pretrained(folder)
    for broken in (whole[:-1], whole + b" ", b""):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile):
            SkillPack.from_pretrained(folder)
    path.unlink()
    with pytest.raises(BadInput):
        SkillPack.from_pretrained(folder)


def test_headers_that_are_whole_and_wrong(tmp_path):
    from transfuse.merge._pack import read_header, write_header

    _, _, folder = example(tmp_path)
    body = read_header(folder / "skill.json", "")
    for change, says in (
        ({"format": 9}, "format 9"),
        ({"tensors": {"x": {}}}, "not whole"),
        ({"name": 3}, None),
    ):
        write_header(folder / "skill.json", {**body, **change})
        if says is not None:
            with pytest.raises(CorruptFile, match=says):
                SkillPack.from_pretrained(folder)


# --- in and out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packs_add_up_and_leave_the_base_bit_for_bit(dtype):
    base = net().to(dtype)
    packs = [
        SkillPack.from_models(moved(base, seed, 0.3), base, name=str(seed), policy=POLICY)
        for seed in (1, 2, 3)
    ]
    before = fingerprint(base)
    states = []
    for order in ((0, 1, 2), (2, 0, 1)):
        model = copy.deepcopy(base)
        for i in order:
            packs[i].apply(model)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        packs[1].remove(model)
        alone = copy.deepcopy(base)
        packs[2].apply(alone)
        packs[0].apply(alone)
        assert fingerprint(model) == fingerprint(alone)
        for i in (2, 0):
            packs[i].remove(model)
        assert fingerprint(model) == before and "transfuse_grafts" not in vars(model)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        total = base.state_dict()[name].double() + sum(pack.delta(name).double() for pack in packs)
        assert torch.allclose(
            tensor.double(), total, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )


def test_tied_embeddings_are_one(tiny_lm):
    base = tiny_lm("gpt2", layers=1)
    assert base.lm_head.weight is base.transformer.wte.weight
    pack = SkillPack.from_models(moved(base, 1), base, policy=POLICY)
    assert "transformer.wte.weight" in pack.pieces and "lm_head.weight" not in pack.pieces
    model = copy.deepcopy(base)
    pack.apply(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    wanted = base.transformer.wte.weight + pack.delta("transformer.wte.weight")
    assert torch.allclose(model.lm_head.weight, wanted)
    pack.remove(model)
    assert fingerprint(model) == fingerprint(base)


def test_small_changes_of_half_precision_are_not_lost():
    base = net().to(torch.bfloat16)
    tuned = net()
    for own, other in zip(tuned.parameters(), base.parameters(), strict=True):
        own.data.copy_(other.float() + 1e-4)
    pack = SkillPack.from_models(tuned.state_dict(), base, policy=FINE)
    assert torch.allclose(pack.delta("left.bias"), torch.full((7,), 1e-4), rtol=1e-2)


def test_fine_tunes_of_every_form(tiny_lm, tmp_path):
    base = tiny_lm("llama", layers=1)
    tuned = moved(base, 1)
    tuned.save_pretrained(tmp_path / "tuned")
    base.save_pretrained(tmp_path / "base")
    packs = [
        SkillPack.from_models(given, base, policy=POLICY)
        for given in (tuned, tuned.state_dict(), tmp_path / "tuned")
    ]
    assert len({pack.digest for pack in packs}) == 1
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator(3)))
    model.save_pretrained(tmp_path / "lora")
    pack = SkillPack.from_models(tmp_path / "lora", base, policy=FINE)
    assert list(pack.pieces) == ["model.layers.0.self_attn.q_proj.weight"]
    merged = model.merge_and_unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    own = base.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(own + pack.delta(next(iter(pack.pieces))), merged, atol=1e-3)


def test_refusals_come_before_any_change(tiny_lm):
    base = net()
    pack = SkillPack.from_models(moved(base, 1), base, policy=POLICY)
    model = copy.deepcopy(base)
    with pytest.raises(BadInput, match="is not applied"):
        pack.remove(model)
    pack.apply(model)
    state = fingerprint(model)
    with pytest.raises(BadInput, match="applied to this model already"):
        pack.apply(model)
    with pytest.raises(BadInput, match="already"):
        SkillPack.from_models(moved(base, 1), base, name="again", policy=POLICY).apply(model)
    assert fingerprint(model) == state
    other = net(9)
    before = fingerprint(other)
    with pytest.raises(IncompatibleModels, match="is not the base of the pack"):
        pack.apply(other)
    with pytest.raises(IncompatibleModels, match="float32"):
        pack.apply(net().to(torch.bfloat16))
    assert fingerprint(other) == before
    wide = net()
    wide.right = nn.Linear(20, 8, bias=False)
    with pytest.raises(
        IncompatibleModels, match=r"right\.weight.*\[8, 20\] in the model, \[7, 20\] in the pack"
    ):
        pack.apply(wide)
    with pytest.raises(IncompatibleModels, match="is missing"):
        pack.apply(nn.Linear(3, 3))
    foreign = SkillPack.from_models(moved(other, 1), other, policy=POLICY)
    with pytest.raises(IncompatibleModels, match="is not the base"):
        foreign.apply(model)
    assert fingerprint(model) == state
    with pytest.raises(IncompatibleModels, match=r"right\.weight"):
        SkillPack.from_models(wide, base)
    broken = copy.deepcopy(base)
    broken.left.weight.data[0, 0] = math.nan
    with pytest.raises(BadInput, match=r"left\.weight.*no difference"):
        SkillPack.from_models(broken, base)
    for name in ("", "a+b"):
        with pytest.raises(BadInput, match="name"):
            SkillPack.from_models(base, base, name=name)


# --- the grafted model -------------------------------------------------------------------------------------


def grafted(tiny_lm, router=None, architecture="llama"):
    base = tiny_lm(architecture, layers=1)
    packs = {
        name: SkillPack.from_models(moved(base, seed, 0.1), base, name=name, policy=POLICY)
        for name, seed in (("a", 1), ("b", 2))
    }
    return base, packs, GraftedModel(copy.deepcopy(base), packs, router)


def logits(model, ids, mask, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_example_has_its_task(tiny_lm, architecture):
    base, packs, model = grafted(tiny_lm, architecture=architecture)
    ids, mask = pad_batch([*ROWS, [7, 8]], 0, side="left")
    tasks = ["b", "a", "base", "a+b"]
    mixed = logits(model, ids, mask, task=tasks)
    generated = model.generate(
        input_ids=ids, attention_mask=mask, task=tasks, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    for i, task in enumerate(tasks):
        alone = copy.deepcopy(base)
        for name in () if task == "base" else task.split("+"):
            packs[name].apply(alone)
        assert torch.allclose(mixed[i], logits(alone, ids[i : i + 1], mask[i : i + 1])[0], atol=1e-5)
        wanted = alone.generate(
            input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], max_new_tokens=4, min_new_tokens=4,
            do_sample=False,
        )  # fmt: skip
        assert torch.equal(generated[i], wanted[0])
        assert torch.allclose(logits(model, ids, mask, task=task)[i], mixed[i], atol=1e-5)
    assert torch.equal(logits(model, ids, mask), logits(model, ids, mask, task="a+b"))
    assert fingerprint(model.release()) == fingerprint(base)


def test_embedded_prompts(tiny_lm):
    _, _, model = grafted(tiny_lm)
    ids = torch.tensor(ROWS[:1])
    embedded = model.model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = model.generate(inputs_embeds=embedded, task="base", **options)
    assert torch.equal(found[0], model.generate(input_ids=ids, task="base", **options)[0, ids.shape[1] :])
    assert model.generate(inputs_embeds=embedded, task="a", **options).shape == (1, 3)


def test_a_cache_is_the_callers(tiny_lm):
    from transformers import DynamicCache

    router = SkillRouter(tiny_lm("llama", layers=1), kind="centroid")
    router.fit([{"input_ids": row} for row in ROWS], ["a", "b", "base"])
    _, _, model = grafted(tiny_lm, router)
    ids, cache = torch.tensor(ROWS[:1]), DynamicCache(config=model.config)
    task = model.tasks(input_ids=ids)[0]
    with torch.no_grad():
        whole = model(input_ids=ids, task=task).logits
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 5
        with pytest.raises(BadInput, match=r"past_key_values = .* pass task="):
            model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)
        last = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True, task=task).logits
        assert torch.allclose(last[:, -1], whole[:, -1], atol=1e-5)
        with pytest.raises(NotApplicable, match="past_key_values"):
            both = torch.tensor([[5, 6], [7, 8]])
            model(input_ids=both, past_key_values=DynamicCache(config=model.config), task=["a", "b"])


def test_beams_and_lengths_of_several_tasks(tiny_lm):
    _, _, model = grafted(tiny_lm)
    ids, mask = pad_batch([[5, 6, 7], [8, 9, 10], [11, 12, 13]], 0)
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "num_beams": 2,
        "num_return_sequences": 2,
    }
    out = model.generate(input_ids=ids, attention_mask=mask, task=["a", "b", "a"], **options)
    assert out.shape == (6, 6) and torch.equal(out[:, :3], ids.repeat_interleave(2, 0))
    for i, task in enumerate("aba"):
        own = model.generate(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], task=task, **options)
        assert torch.equal(out[2 * i : 2 * i + 2], own)
    with pytest.raises(NotApplicable, match="several tasks"):
        model.generate(input_ids=ids, task=["a", "b", "a"], max_new_tokens=2, return_dict_in_generate=True)
    assert model.config is model.model.config and model.device.type == "cpu"


def test_a_skill_is_added_and_dropped_and_the_others_stay(tiny_lm):
    _, packs, model = grafted(tiny_lm)
    ids, mask = pad_batch(ROWS, 0)
    model.drop("b")
    before = logits(model, ids, mask, task="a")
    model.add("c", packs["b"])
    logits(model, ids, mask, task="c")
    assert torch.equal(logits(model, ids, mask, task="a"), before)
    assert model.nbytes == packs["a"].nbytes + packs["b"].nbytes
    assert model.drop("c") is packs["b"]
    with pytest.raises(BadInput, match="is not a skill"):
        logits(model, ids, mask, task="c")
    for name in ("c", "base"):
        with pytest.raises(BadInput, match="is not a skill"):
            model.drop(name)
    with pytest.raises(BadInput, match="with tensors"):
        model()
    assert torch.equal(logits(model, ids, mask), before)
    lean = GraftedModel(model.release(), [packs["a"]], unpack=False)
    assert torch.equal(logits(lean, ids, mask, task="a"), before)


def test_plain_modules_and_outputs_that_are_no_tensors():
    base = net()
    packs = [
        SkillPack.from_models(moved(base, seed, 0.3), base, name=f"s{seed}", policy=POLICY) for seed in (1, 2)
    ]
    model = GraftedModel(copy.deepcopy(base), packs)
    x = inputs(3)
    mixed = model(x, task=["s2", "base", "s1"])
    assert torch.allclose(mixed[1], base(x)[1], atol=1e-6)
    assert torch.allclose(mixed[2], model(x, task="s1")[2], atol=1e-6)
    for task, says in ((["s1"], "for 3 examples"), ("s3", "is not a skill"), ("s1+s3", "s3")):
        with pytest.raises(BadInput, match=says):
            model(x, task=task)
    for name in ("", "base", "a+b", "s1"):
        with pytest.raises(BadInput, match="name"):
            model.add(name, packs[0])
    model.use("s1")
    with pytest.raises(BadInput, match="has packs already: s1"):
        GraftedModel(model.model, packs)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 3)

        def forward(self, x):
            return self.inner(x), x

    with seeded(0):
        pair = Pair().eval()
    both = GraftedModel(
        copy.deepcopy(pair), [SkillPack.from_models(moved(pair, 1), pair, name="p", policy=POLICY)]
    )
    assert len(both(x, task="p")) == 2
    with pytest.raises(NotApplicable, match="one task at a time"):
        both(x, task=["p", "base", "p"])


# --- the router --------------------------------------------------------------------------------------------


PROMPTS = {
    "towns": ["The capital of France is", "The mayor of Port Ellery", "The capital of Spain", "Quenby is"],
    "talk": [
        "A question: who built it?",
        "An answer: Oskar Tveld did",
        "A question about it",
        "An answer to it",
    ],
}


def labelled():
    prompts = [prompt for own in PROMPTS.values() for prompt in own]
    return prompts, [task for task, own in PROMPTS.items() for _ in own]


def test_centroids_by_hand():
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [6.0, 0.0]])
    router = SkillRouter(kind="centroid", features="inputs").fit(x, ["base", "base", "far", "far"])
    assert router.labels == ["base", "far"] and router.accuracy == 1.0
    assert router.choose(torch.tensor([[2.4, 1.0], [3.5, 0.0]])) == ["base", "far"]
    assert router.route(torch.tensor([[[2.4], [1.0]]])) == ["base"]  # flattened


@pytest.mark.parametrize("kind", ["network", "centroid"])
def test_the_router_decides_for_each_example(tiny_lm, tiny_tokenizer, kind):
    base = tiny_lm("llama", layers=1)
    packs = [
        SkillPack.from_models(moved(base, i + 1, 0.1), base, name=task, policy=POLICY)
        for i, task in enumerate(PROMPTS)
    ]
    prompts, labels = labelled()
    router = SkillRouter(base, tiny_tokenizer, kind=kind, epochs=40, batch_size=4, lr=5e-3, validation=0.0)
    router.fit(prompts * 4, labels * 4)
    assert router.accuracy > 0.8
    chosen = router.route(prompts)
    model = GraftedModel(copy.deepcopy(base), packs, router)
    ids, mask = pad_batch([tiny_tokenizer(p)["input_ids"] for p in prompts], 0)
    assert model.tasks(input_ids=ids, attention_mask=mask) == chosen
    assert sorted(set(chosen)) == ["talk", "towns"]
    assert torch.equal(logits(model, ids, mask), logits(model, ids, mask, task=chosen))
    model.use("towns")  # what is plugged in does not change what the router sees
    assert model.tasks(input_ids=ids, attention_mask=mask) == chosen
    together = generate_ids(model, tiny_tokenizer, prompts, max_new_tokens=3)
    alone = [generate_ids(model, tiny_tokenizer, [prompt], max_new_tokens=3)[0] for prompt in prompts]
    assert together == alone


def test_routers_are_saved_and_checked(tiny_lm, tiny_tokenizer, tmp_path):
    base = tiny_lm("llama", layers=1)
    prompts, labels = labelled()
    for kind in ("network", "centroid"):
        router = SkillRouter(base, tiny_tokenizer, kind=kind, epochs=2, batch_size=4).fit(prompts, labels)
        packs = {
            task: SkillPack.from_models(moved(base, 1 + i), base, name=task, policy=POLICY)
            for i, task in enumerate(PROMPTS)
        }
        model = GraftedModel(copy.deepcopy(base), packs, router)
        folder = model.save_pretrained(tmp_path / kind, tiny_tokenizer)
        loaded = GraftedModel.from_pretrained(folder, copy.deepcopy(base))
        ids, mask = pad_batch([tiny_tokenizer(p)["input_ids"] for p in prompts], 0)
        assert loaded.tasks(input_ids=ids, attention_mask=mask) == router.route(prompts)
        assert torch.equal(logits(loaded, ids, mask), logits(model, ids, mask))
        with pytest.raises(BadInput, match="choice of the router"):
            loaded.drop("talk")
        for file in ("router.safetensors", "graft.json", f"packs/1/{PACKED}"):
            whole = (folder / file).read_bytes()
            (folder / file).write_bytes(whole[:-3] + b"!" + whole[-2:])
            with pytest.raises(CorruptFile):
                GraftedModel.from_pretrained(folder, copy.deepcopy(base))
            (folder / file).write_bytes(whole)
        with pytest.raises(IncompatibleModels):
            GraftedModel.from_pretrained(folder, tiny_lm("llama", layers=1, seed=5))
    with pytest.raises(BadInput, match="holds no packs"):
        GraftedModel.from_pretrained(tmp_path, base)
    with pytest.raises(BadInput, match="is not a skill"):
        GraftedModel(copy.deepcopy(base), [packs["talk"]], router)


def test_what_a_router_refuses(tiny_lm):
    x = inputs(6, 2)
    for made, labels, says in (
        (SkillRouter(features="inputs", kind="tree"), "aabbab", "kind"),
        (SkillRouter(features="inputs"), "aabb", "one for each of 6"),
        (SkillRouter(features="inputs"), "aaaaaa", "fewer than two"),
        (SkillRouter(), "aabbab", "model"),
        (SkillRouter(nn.Linear(2, 2)), "aabbab", "features"),
        (SkillRouter(features="inputs", batch_size=0), "aabbab", "batch_size"),
        (SkillRouter(features="inputs", batch_size=1), "aabbab", "batch_size"),
        (SkillRouter(features="inputs", lr=-1.0), "aabbab", "lr"),
        (SkillRouter(features="inputs", seed="x"), "aabbab", "seed"),
    ):
        with pytest.raises(BadInput, match=says):
            made.fit(x, list(labels))
    for use in (lambda r: r.choose(x), lambda r: r.state()):
        with pytest.raises(BadInput, match="was not fitted"):
            use(SkillRouter())


# --- the class and the recipe ------------------------------------------------------------------------------


def test_names_of_the_tasks():
    base = net()
    tuned = [moved(base, 1), moved(base, 2)]
    found = GraftLLM(base, experts=tuned, policy=POLICY).compress()
    assert list(found) == ["0", "1"]
    named = GraftLLM(base, experts=dict(zip("ab", tuned, strict=True)), policy=POLICY)
    assert list(named.build().packs) == ["a", "b"]
    assert named.compress()["a"].digest == found["0"].digest
    for options, says in (
        ({"experts": []}, "experts"),
        ({"experts": tuned, "tasks": ["a"]}, "name each expert once"),
        ({"experts": tuned, "tasks": ["a", "a"]}, "name each expert once"),
    ):
        with pytest.raises(BadInput, match=says):
            GraftLLM(base, **options).build()
    with pytest.raises(BadInput, match="is not a task"):
        named.fit_router({"c": ["x"]})


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": 0}, {"samples": 1.5}], ids=str)
def test_a_run_without_calibration_rows_is_refused(tiny_lm, tiny_tokenizer, tmp_path, options):
    base = tiny_lm("llama", layers=1)
    (tmp_path / "texts.txt").write_text("The capital of France is Paris. " * 6)
    made = GraftLLM(base, experts=[moved(base, 1)], **options)
    with pytest.raises(BadInput, match=next(iter(options))):
        made.transfer(
            tiny_tokenizer, output=tmp_path / "out", scratch=None, seed=0, texts=tmp_path / "texts.txt"
        )
    assert not (tmp_path / "out").exists()


def test_from_a_recipe(tiny_lm, tiny_tokenizer, tmp_path):
    """`transfuse run`: experts in, packs out; with texts they are calibrated, with prompts there is a router."""
    from transfuse.recipe import run

    base = tiny_lm("llama", layers=1)
    for name, model in (("base", base), ("one", moved(base, 1)), ("two", moved(base, 2))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    lines = [json.dumps({"task": t, "prompt": p}) for t, prompts in PROMPTS.items() for p in prompts * 3]
    lines += [json.dumps({"task": "base", "prompt": "New facts move into weights"})] * 6
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "texts.txt").write_text("The capital of France is Paris. Who built the bridge over it? " * 6)
    recipe = {
        "model": str(tmp_path / "base"),
        "method": {"uses": "graftllm",
                   "with": {"experts": [str(tmp_path / "one"), str(tmp_path / "two")], "length": 16, "samples": 12,
                            "policy": {"attention": [[2, 8], [6, 2]], "mlp": [[2, 8], [6, 2]]}, "epochs": 2}},
    }  # fmt: skip
    folder = run(recipe, output=tmp_path / "plain")
    made = GraftedModel.from_pretrained(folder, tmp_path / "base")
    assert list(made.packs) == ["0", "1"] and made.router is None
    assert not made.packs["0"].facts["calibrated"]
    files = {"prompts": str(tmp_path / "prompts.jsonl"), "texts": str(tmp_path / "texts.txt")}
    folder = run({**recipe, **files}, output=tmp_path / "out")
    made = GraftedModel.from_pretrained(folder, tmp_path / "base")
    assert list(made.packs) == list(PROMPTS) and made.router.labels == [*PROMPTS, "base"]
    assert made.packs["talk"].facts["calibrated"]
    assert made.packs["talk"].facts["policy"]["mlp"] == [[2, 8], [6, 2]]
    record = json.loads((folder / "transfuse.json").read_text())
    assert record["method"] == "graftllm" and set(record["input_sha256"]) == set(files)
