"""topkld: the loss, the quantizer it trains through, and the laws it is measured by."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_tiny
from distilling import Trained, arguments, rows, shapes, state, token_case
from torch import nn
from torch.nn.utils import parametrize

from transfuse.core.divergence import forward_kl, reverse_kl
from transfuse.core.errors import BadInput
from transfuse.core.training import generator, seeded
from transfuse.distill._base import Signal
from transfuse.distill._fake_quant import FakeQuant, float_table
from transfuse.distill.topkld import (
    TopKLD,
    bake,
    bit_scaling,
    distil_qat,
    fake_quant,
    head_mask,
    mass_terms,
    perturbation_tolerance,
    quantize,
)


def spread(z):
    e = [torch.exp(x) for x in z]
    return [x / sum(e) for x in e]


def d(a, b):
    return a * torch.log(a / b) - a + b


def by_hand(k, variant, weight):
    """One token, from the definition; the head by sorting."""

    def value(z, fixed, label, more):
        p, q = spread(more["teacher"]), spread(z)
        head = sorted(range(len(p)), key=lambda v: (-float(p[v]), v))[:k]
        tail = [v for v in range(len(p)) if v not in head]
        if variant == "head_forward":
            return sum(d(p[v], q[v]) for v in head) + weight * sum(d(q[v], p[v]) for v in tail)
        if variant == "head_reverse":
            return sum(d(q[v], p[v]) for v in head) + weight * sum(d(p[v], q[v]) for v in tail)
        whole = sum(p[v] * torch.log(p[v] / q[v]) for v in range(len(p)))
        return whole + weight * sum(d(q[v], p[v]) for v in head)

    return value


CASES = [
    token_case(f"{variant}-{k}", lambda k=k, v=variant, w=weight: TopKLD(k=k, variant=v, tail_weight=w),
               by_hand(k, variant, weight))
    for variant, k, weight in [
        ("head_forward", 3, 1.0), ("head_forward", 6, 0.4), ("head_reverse", 2, 0.7),
        ("full_forward_plus_head_reverse", 4, 1.5),
    ]
]  # fmt: skip


def train(seed):
    """Four-bit weights and eight-bit activations of a small language model."""
    teacher = make_tiny("llama", seed=1, layers=1)
    kept, before = state(teacher), shapes(teacher)
    with seeded(seed):
        student, losses = distil_qat(
            teacher=teacher, objective=TopKLD(k=20), train_dataset=rows(), bits=4, activations=8,
            args=arguments("unused", seed=seed, max_steps=25, learning_rate=2e-3),
        )  # fmt: skip
    return Trained(losses, student, before, [(kept, teacher)])


def loss_of(objective, student, teacher, **more):
    labels = torch.randint(0, 5, student.shape[:2], generator=generator(0))
    return objective(Signal(logits=student), Signal(logits=teacher), {"labels": labels, **more})["loss"]


def pair(seed=0, shape=(3, 6, 9)):
    g = generator(seed)
    return [2 * torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2)]


# --- the loss ----------------------------------------------------------------------------------------------


def test_a_token_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), k = 1."""
    p = torch.tensor([[[0.5, 0.25, 0.25]] * 2], dtype=torch.float64).log()
    q = torch.tensor([[[0.25, 0.5, 0.25]] * 2], dtype=torch.float64).log()
    ln2 = math.log(2)
    expected = {
        "head_forward": (0.5 * ln2 - 0.25) + (0.5 * ln2 - 0.25),
        "head_reverse": (-0.25 * ln2 + 0.25) + (-0.25 * ln2 + 0.25),
        "full_forward_plus_head_reverse": (0.5 * ln2 - 0.25 * ln2) + (-0.25 * ln2 + 0.25),
    }
    for variant, value in expected.items():
        assert float(loss_of(TopKLD(k=1, variant=variant), q, p)) == pytest.approx(value), variant


def test_both_directions_everywhere_make_the_two_kls():
    """Masses cancel over the whole vocabulary: head and swapped variant of weight 1 add up to both KLs."""
    student, teacher = pair()
    both = sum(loss_of(TopKLD(k=4, variant=v), student, teacher) for v in ("head_forward", "head_reverse"))
    ours, theirs = student[:, :-1], teacher[:, :-1]
    assert float(both) == pytest.approx(float(forward_kl(ours, theirs) + reverse_kl(ours, theirs)))
    whole = loss_of(TopKLD(k=4, variant="full_forward_plus_head_reverse", tail_weight=0.0), student, teacher)
    assert float(whole) == pytest.approx(float(forward_kl(ours, theirs)))


def test_every_part_is_positive_and_a_bare_partial_sum_is_not():
    student, teacher = (torch.log_softmax(z, -1) for z in pair(1, (200, 1, 9)))
    parts = mass_terms(student, teacher)
    assert float(parts.min()) >= -1e-12 and float(mass_terms(student, student).abs().max()) < 1e-12
    head = head_mask(teacher, 3)
    student = torch.log_softmax(2 * teacher, -1)  # too much on the head
    bare = (teacher.exp() * (teacher - student)).masked_fill(~head, 0.0).sum(-1)
    assert float(bare.min()) < -0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_only_one_side_rules_out(dtype):
    """log 0 counts as the log of the smallest normal number; a probability that underflows counts as none."""
    tiny = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}[dtype]
    log_a = torch.tensor([math.log(0.25), -2000.0, -torch.inf, -2000.0, -torch.inf], dtype=dtype)
    log_b = torch.tensor([-torch.inf, -torch.inf, -torch.inf, math.log(0.5), math.log(0.5)], dtype=dtype)
    expected = [0.25 * (math.log(0.25) - math.log(tiny)) - 0.25, 0.0, 0.0, 0.5, 0.5]
    found = mass_terms(log_a.requires_grad_(), log_b.requires_grad_())
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    slopes = torch.autograd.grad(found.sum(), [log_a, log_b])
    assert slopes[0].tolist() == pytest.approx(
        [0.25 * (math.log(0.25) - math.log(tiny)), 0, 0, 0, 0], rel=1e-6
    )
    assert slopes[1].tolist() == pytest.approx([0, 0, 0, 0.5, 0.5])  # -a + b, and none from what is floored
    for variant in ("head_forward", "head_reverse", "full_forward_plus_head_reverse"):
        for side in (0, 1):
            z = [x.to(dtype) for x in pair()]
            z[side][..., 2] = -torch.inf
            z[0].requires_grad_()
            loss = loss_of(TopKLD(k=3, variant=variant), *z)
            assert 0 < float(loss.detach()) < math.inf
            assert torch.autograd.grad(loss, z[0])[0].isfinite().all()


def test_ties_go_to_the_smaller_ids():
    p = torch.tensor([[3.0, 1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    expected = [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    assert head_mask(p, 3).int().tolist() == expected
    none = torch.full((1, 4), -torch.inf)
    none[0, 2] = 0.0
    assert head_mask(none, 2).int().tolist() == [[1, 0, 1, 0]]


def test_the_tail_has_its_weight():
    student, teacher = pair()
    values = [float(loss_of(TopKLD(k=3, tail_weight=w), student, teacher)) for w in (0.0, 1.0, 3.0)]
    assert values[2] - values[0] == pytest.approx(3 * (values[1] - values[0]))


def stored(log_p, k):
    top = torch.log_softmax(log_p, -1).topk(k, dim=-1)
    return Signal(sparse=(top.indices, top.values))


def test_a_stored_teacher():
    """Its k tokens are the head wherever the rest's mass is larger than theirs; the rest is one class of the tail."""
    student, teacher = pair(2)
    teacher = teacher / 20  # nearly flat: the bucket is the largest class
    labels = torch.randint(0, 5, student.shape[:2], generator=generator(0))
    found = TopKLD(k=2)(Signal(logits=student), stored(teacher, 3), {"labels": labels})["loss"]
    p, q = (
        torch.softmax(teacher, -1)[:, :-1].reshape(-1, 9),
        torch.softmax(student, -1)[:, :-1].reshape(-1, 9),
    )
    total = 0.0
    for a, b in zip(p, q):
        top = a.topk(3).indices.tolist()
        a, b = ([x[i] for i in top] + [1 - sum(x[i] for i in top)] for x in (a, b))
        total += sum(d(a[i], b[i]) for i in (0, 1)) + sum(d(b[i], a[i]) for i in (2, 3))
    assert float(found) == pytest.approx(float(total / len(p)), rel=1e-6)
    for k, rest in ((4, "bucket"), (3, "zero")):
        with pytest.raises(BadInput, match="stored"):
            TopKLD(k=k, rest=rest)(Signal(logits=student), stored(teacher, 3), {"labels": labels})


@pytest.mark.parametrize(
    ("name", "given"),
    [("k", {"k": 0}), ("k", {"k": 2.5}), ("variant", {"variant": "tail"}), ("tail_weight", {"tail_weight": -1.0})],
)  # fmt: skip
def test_bad_input(name, given):
    with pytest.raises(BadInput, match=name):
        TopKLD(**given)


def test_a_head_as_large_as_the_vocabulary_is_refused():
    for k in (9, 900):
        with pytest.raises(ValueError, match="k = "):
            loss_of(TopKLD(k=k), *pair())


# --- the quantizer -----------------------------------------------------------------------------------------


def nearest(value, table):
    """The nearest entry, the smaller in size of two."""
    best = min(table, key=lambda t: (abs(abs(value) - t), t))
    return math.copysign(best, value) if best else 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_by_a_loop(bits):
    w = torch.randn(5, 7, generator=generator(bits), dtype=torch.float64)
    w[3] = 0.0
    found = quantize(w, bits=bits)
    top = 2 ** (bits - 1) - 1
    for row, ours in zip(w.tolist(), found.tolist()):
        s = max(abs(x) for x in row) / top
        expected = [s * max(-top, min(top, round(x / s))) if s else 0.0 for x in row]
        assert ours == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(quantize(found, bits=bits), found)


def test_one_bit_is_a_sign_and_a_mean():
    w = torch.tensor([[0.5, -1.5, 1.0], [-2.0, 0.0, -4.0]])
    assert quantize(w, bits=1).tolist() == [[1.0, -1.0, 1.0], [-2.0, 2.0, -2.0]]


def test_float_formats():
    assert float_table("e2m1") == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert float_table("E3M0") == (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    assert float_table("e2m0") == (0, 1, 2, 4)
    for bits, fmt in ((4, None), (4, "e3m0"), (3, None), (8, None), (6, "e2m3"), (2, None)):
        w = torch.randn(4, 9, generator=generator(bits), dtype=torch.float64)
        table = float_table(fmt or {4: "e2m1", 3: "e2m0", 8: "e4m3", 2: "e1m0"}[bits])
        assert len(table) == 2 ** (bits - 1)
        for row, ours in zip(w.tolist(), quantize(w, bits=bits, scheme="fp", fmt=fmt).tolist()):
            s = max(abs(x) for x in row) / table[-1]
            assert ours == pytest.approx([s * nearest(x / s, table) for x in row], abs=1e-12)


def test_a_scale_per_token_for_activations():
    x = torch.randn(2, 3, 8, generator=generator(0), dtype=torch.float64)
    found = quantize(x, bits=4, axis=-1)
    for b in range(2):
        for t in range(3):
            assert torch.allclose(found[b, t], quantize(x[b, t][None], bits=4)[0])


def test_gradients_pass_straight_and_stop_outside_the_range():
    w = torch.tensor([[0.3, -0.9, 2.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    for scheme, fmt in (("int_sym_channel", None), ("fp", "e2m1")):
        free = quantize(w, bits=4, scheme=scheme, fmt=fmt)
        assert torch.autograd.grad((free * weights).sum(), w)[0].tolist() == weights.tolist()
    clamped = quantize(w, bits=3, scale=torch.tensor([[0.25]], dtype=torch.float64))  # largest value 0.75
    assert clamped.tolist() == [[0.25, -0.75, 0.75]]
    (slope,) = torch.autograd.grad((clamped * weights).sum(), w)
    assert slope.tolist() == [[1.0, 0.0, 0.0]]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.body = nn.GRU(6, 6, 2, batch_first=True)
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids):
        return self.head(self.body(self.norm(self.embed(input_ids)))[0])


def small(seed=0):
    with seeded(seed):
        return Small()


MATRICES = {"embed.weight", "head.weight", *(f"body.weight_{a}_l{i}" for a in ("ih", "hh") for i in (0, 1))}


def test_what_is_rounded_and_what_is_not():
    """Embedding, recurrent and linear matrices; biases and norms stay. Baking leaves the bare names and shapes."""
    model, before = small(), state(small())
    ids = torch.randint(0, 11, (3, 5), generator=generator(0))
    fake_quant(model, bits=3)
    through = model(ids)
    bake(model)
    after = state(model)
    assert after.keys() == before.keys() and shapes(model) == shapes(small())
    for name, tensor in before.items():
        expected = quantize(tensor, bits=3) if name in MATRICES else tensor
        assert torch.allclose(after[name], expected), name
    assert torch.allclose(model(ids), through, atol=1e-6)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_recurrent_weights_are_rounded_anew_after_an_update():
    model = fake_quant(small(), bits=4)
    ids = torch.randint(0, 11, (3, 5), generator=generator(0))
    first = model(ids)
    latent = dict(model.named_parameters())["body.parametrizations.weight_hh_l0.original"]
    (slope,) = torch.autograd.grad(first.square().sum(), latent)
    assert float(slope.abs().sum()) > 0
    with torch.no_grad():
        latent.add_(0.5 * torch.randn(latent.shape, generator=generator(1)))
    assert not torch.allclose(model(ids), first)
    assert torch.allclose(model(ids), bake(model)(ids), atol=1e-6)


def test_layers_can_be_left_alone():
    model = fake_quant(small(), bits=2, skip=["head", "emb*"])
    names = dict(model.named_parameters())
    assert "head.weight" in names and "embed.weight" in names and "body.weight_hh_l0" not in names
    with pytest.raises(BadInput, match="matches no module"):
        fake_quant(small(), bits=2, skip=["heads"])


def test_a_tied_matrix_is_left_alone_at_both_ends():
    model = make_tiny("gpt2", layers=1)
    assert model.lm_head.weight is model.transformer.wte.weight
    before, ids = state(model), torch.randint(0, 400, (2, 6), generator=generator(0))
    fake_quant(model, bits=2, skip=["lm_head"])
    through = model(ids).logits
    assert torch.allclose(bake(model)(ids).logits, through, atol=1e-4)
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_what_is_inside_a_skipped_module_is_left_alone():
    model = fake_quant(nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Linear(4, 2)), bits=2, skip=["0"])
    assert [name for name, _ in model.named_parameters() if "original" in name] == [
        "1.parametrizations.weight.original"
    ]


def test_scales_belong_to_output_channels():
    """One output channel a hundred times the others, which do not lose their codes to it."""
    from transformers.pytorch_utils import Conv1D

    layers = [Conv1D(5, 3), nn.ConvTranspose2d(4, 6, 2), nn.ConvTranspose1d(4, 6, 3, groups=2)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.normal_(generator=generator(3))[:, 0] *= 100
        weight, groups = layer.weight.detach().clone(), getattr(layer, "groups", 1)
        rounded = fake_quant(nn.Sequential(layer), bits=3)[0].weight
        per = len(weight) // groups
        for g in range(groups):
            for j in range(weight.shape[1]):
                own = weight[g * per : (g + 1) * per, j]
                expected = quantize(own.reshape(1, -1), bits=3).view_as(own)
                assert torch.allclose(rounded[g * per : (g + 1) * per, j], expected)
    model = make_tiny("gpt2", layers=1)
    fake_quant(model, bits=4)
    assert parametrize.is_parametrized(model.transformer.h[0].mlp.c_fc)


def test_activations_are_rounded_in_copies_too():
    layer = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(3, 2, 1))
    fake_quant(layer, bits=8, activations=4)
    x = torch.randn(5, 6, generator=generator(0))
    weight = quantize(layer[0].parametrizations.weight.original, bits=8)
    assert torch.allclose(layer[0](x), quantize(x, bits=4, axis=-1) @ weight.T + layer[0].bias, atol=1e-6)
    image = torch.randn(2, 3, 4, 4, generator=generator(1))
    rounded = quantize(image.permute(0, 2, 3, 1), bits=4, axis=-1).permute(0, 3, 1, 2)
    kernel = quantize(layer[1].parametrizations.weight.original, bits=8)
    assert torch.allclose(layer[1](image), nn.functional.conv2d(rounded, kernel, layer[1].bias), atol=1e-6)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other[0].parametrizations.weight.original.zero_()
    assert torch.allclose(other[0](x), other[0].bias.expand(5, 4))
    assert not torch.allclose(layer[0](x), other[0](x))


def test_tied_weights_stay_tied():
    model = make_tiny("gpt2", layers=1)
    ids = torch.randint(0, 400, (2, 6), generator=generator(0))
    fake_quant(model, bits=6)
    inner, head = model.transformer.wte.parametrizations.weight, model.lm_head.parametrizations.weight
    assert inner.original is head.original
    through = model(ids).logits
    assert torch.allclose(bake(model)(ids).logits, through, atol=1e-4)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: fake_quant(small(), bits=0), "bits"),
        (lambda: fake_quant(small(), bits=3, scheme="nf"), "scheme"),
        (lambda: fake_quant(small(), bits=7, scheme="fp"), "bits"),
        (lambda: fake_quant(small(), bits=4, scheme="fp", fmt="e4m3"), "fmt"),
        (lambda: fake_quant(small(), bits=4, fmt="e2m1"), "fmt"),
        (lambda: fake_quant(small(), bits=4, scheme="fp", fmt="fp4"), "fmt"),
        (lambda: fake_quant(small(), bits=4, activations=0), "bits"),
        (lambda: fake_quant(nn.LayerNorm(3), bits=4), "matrix"),
        (lambda: fake_quant(fake_quant(small(), bits=4), bits=4), "quantized already"),
        (lambda: FakeQuant(0), "bits"),
    ],
)  # fmt: skip
def test_bad_quantizers(call, name):
    with pytest.raises(BadInput, match=name):
        call()


# --- training through it -----------------------------------------------------------------------------------


def test_training_recovers_what_rounding_lost():
    """The baked student says what the teacher says better than the rounded teacher does; the teacher is as it was."""
    teacher = make_tiny("llama", seed=1, layers=1)
    before = state(teacher)
    data = rows(16)
    student, _ = distil_qat(
        teacher=teacher, objective=TopKLD(k=20), train_dataset=data, bits=3,
        args=arguments("unused", max_steps=30, learning_rate=2e-3, per_device_train_batch_size=8),
    )  # fmt: skip
    rounded = bake(fake_quant(copy.deepcopy(teacher), bits=3))
    ids = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        wanted = teacher(ids).logits
        gaps = [float(forward_kl(each(ids).logits, wanted)) for each in (student, rounded)]
    assert gaps[0] < 0.7 * gaps[1]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    for name, tensor in student.named_parameters():
        if tensor.dim() == 2:
            assert all(len(row.round(decimals=5).unique()) <= 7 for row in tensor.detach()), (
                name
            )  # codes of 3 bits


def test_a_quantized_teacher_is_refused():
    with pytest.raises(BadInput, match="original"):
        distil_qat(
            teacher=fake_quant(make_tiny("llama", layers=1), bits=4), objective=TopKLD(k=5), train_dataset=rows(),
            bits=4,
        )  # fmt: skip


def test_the_objective_is_handed_back_as_it_was():
    objective = TopKLD(k=5)
    distil_qat(
        teacher=make_tiny("llama", layers=1), objective=objective, train_dataset=rows(), bits=4, skip=["lm_head"],
        args=arguments("unused", max_steps=1),
    )  # fmt: skip
    assert objective.needs_logits is False


# --- the laws ----------------------------------------------------------------------------------------------


def test_a_power_law_is_fitted():
    """A made-up metric with known exponents, read from the size of the model."""
    models = [nn.Sequential(nn.Linear(n, n, bias=False)) for n in (4, 8, 16, 32)]

    def metric(model):
        layer = model[0]
        bits, size = layer.parametrizations.weight[0].bits, layer.weight.numel()
        return 5.0 * (bits * size) ** (-0.5 if bits == 4 else -0.25)

    found = bit_scaling(models, [4, 8], metric)
    assert found.exponents[4] == pytest.approx((math.log(5.0), -0.5))
    assert found.exponents[8] == pytest.approx((math.log(5.0), -0.25))
    assert found.predicted(4, 100.0) == pytest.approx(0.5)
    assert found.best(1000.0) == 4 and found.best(0.01) == 8
    assert len(found.rows) == 8
    row = next(r for r in found.rows if r["bits"] == 8 and r["model"] == 1)
    assert (row["parameters"], row["total_bits"], row["compute_bits"]) == (64, 512, 2 * 64 * 8 * 16)  # W8A16
    assert all(not parametrize.is_parametrized(model[0]) for model in models)
    with pytest.raises(BadInput, match="models = 1"):
        bit_scaling(models[:1], [4, 8], metric).best(1000.0)
    sizes = [r["total_bits"] for r in found.envelope()]
    values = [r["metric"] for r in found.envelope()]
    assert (
        sizes == sorted(sizes) and values == sorted(values, reverse=True) and len(set(values)) == len(values)
    )


def test_sizes_count_what_is_not_rounded():
    model = small()
    matrices = sum(p.numel() for name, p in model.named_parameters() if name in MATRICES)
    rest = sum(p.numel() for p in model.parameters()) - matrices
    (row,) = bit_scaling([model], [3], lambda m: 1.0).rows
    assert row["total_bits"] == 3 * matrices + 16 * rest
    assert row["compute_bits"] == 2 * 3 * 16 * (matrices - model.embed.weight.numel())
    assert math.isnan(bit_scaling([model], [3], lambda m: 1.0).exponents[3][1])
    for wrong in (lambda: bit_scaling([], [3], len), lambda: bit_scaling([model], [3], lambda m: 0.0)):
        with pytest.raises(BadInput):
            wrong()


def test_activations_are_rounded_where_their_width_is_given():
    """Bits of both sides multiply; by default activations have 16 and stay as they are."""
    x, outputs = torch.tensor([[1.0, 0.3, -0.55]]), []
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    nn.init.eye_(model[0].weight)

    def metric(rounded):
        outputs.append(rounded(x)[0].tolist())
        return 1.0

    (wide,) = bit_scaling([model], [4], metric).rows
    (narrow,) = bit_scaling([model], [4], metric, activation_bits=3).rows
    assert (wide["compute_bits"], narrow["compute_bits"]) == (2 * 9 * 4 * 16, 2 * 9 * 4 * 3)
    assert wide["total_bits"] == narrow["total_bits"] == 36
    assert outputs[0] == pytest.approx([1.0, 0.3, -0.55])
    assert outputs[1] == pytest.approx([1.0, 1 / 3, -2 / 3])  # steps of a third
    with pytest.raises(BadInput, match="activation_bits"):
        bit_scaling([model], [4], metric, activation_bits=0)


def test_a_discrete_token_forgives_small_errors():
    model = small()
    batch = {"input_ids": torch.randint(0, 11, (20, 12), generator=generator(0))}
    found = {
        bits: perturbation_tolerance(
            model, fake_quant(small(), bits=bits), batch, layer="body", random=generator(1)
        )
        for bits in (2, 8)
    }
    assert found[8]["latent_error"] < 0.05 < found[2]["latent_error"]
    assert found[8]["unchanged"] > found[2]["unchanged"] and found[8]["unchanged"] > 0.97
    same = perturbation_tolerance(model, small(), batch, layer="body", random=generator(1))
    assert same == {"latent_error": 0.0, "unchanged": 1.0, "unchanged_top": 1.0}
