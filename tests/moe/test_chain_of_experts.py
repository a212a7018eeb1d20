"""Chain-of-Experts against loops in float64, and in the layers of mixture-of-experts models."""

from __future__ import annotations

import math
import warnings

import mixtures
import pytest
import torch
from conftest import make_tiny

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.taps import capture
from transfuse.core.training import fit, generator
from transfuse.moe import load, save
from transfuse.moe._base import routings
from transfuse.moe._experts import expert_sites
from transfuse.moe.chain_of_experts import (
    ChainBlock,
    ChainOfExperts,
    asymmetry,
    chain,
    coactivation,
    combination_gain,
    concentration,
    expert_flops,
    sequence_balance,
    steps_of,
)

BASES = mixtures.BASES
base = mixtures.base
BAD = [
    ({"num_steps": 0}, "num_steps"),
    ({"num_steps": 3}, "num_steps"),
    ({"experts_per_step": 7}, "experts_per_step"),
    ({"experts_per_step": 0}, "experts_per_step"),
    ({"residual": "none"}, "residual"),
    ({"routers": "one"}, "routers"),
    ({"gates": "top"}, "gates"),
    ({"first_router": "new"}, "first_router"),
    ({"balance": -1.0}, "balance"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def make(**options):
    """Two rounds of one expert each, all routers drawn, for the contract of the family."""
    return ChainOfExperts(**{"first_router": "draw", **options})


def exact(name):
    """One round where the layer's own residual stays: the plain block."""
    return ChainOfExperts(num_steps=1, residual="outer", gates="model")


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def blocks(model):
    return [module for module in model.modules() if isinstance(module, ChainBlock)]


# --- the rounds --------------------------------------------------------------------------------------------


def weights(experts=5, width=4, inner=3, seed=0):
    random = generator(seed)
    return (
        0.4 * torch.randn(s, generator=random) for s in ((experts, 2 * inner, width), (experts, width, inner))
    )


def dispatch(gate_up, down):
    """Experts as a function of tokens, indices and weights: one token and slot at a time, in the tokens' dtype."""

    def run(x, indices, gates):
        rows = []
        for t in range(len(x)):
            y = torch.zeros_like(x[t])
            for slot, e in enumerate(indices[t].tolist()):
                g, u = (gate_up[e].to(x.dtype) @ x[t]).chunk(2)
                y = y + gates[t, slot] * (down[e].to(x.dtype) @ (g * torch.sigmoid(g) * u))
            rows.append(y)
        return torch.stack(rows)

    return run


def reference(x, routers, gate_up, down, k, *, shared, residual, fixed):
    """The same in float64, written out."""
    rows, sets = [], []
    for token in x.double():
        first, chosen = None, []
        for router in routers:
            scores = [float(row @ token) for row in router.double()]
            top = max(scores)
            p = [math.exp(s - top) for s in scores]
            p = [v / sum(p) for v in p]
            pick = sorted(range(len(p)), key=lambda i: -p[i])[:k]
            pairs = [(i, p[i]) for i in pick]
            first = first or pairs
            if fixed:
                pairs = first
            y = torch.zeros_like(token)
            for e, share in pairs:
                g, u = (gate_up[e].double() @ token).chunk(2)
                y += share * (down[e].double() @ (g / (1 + (-g).exp()) * u))
            if shared:
                y = y + 0.5 * token.sin()
            chosen.append({e for e, _ in pairs})
            token = y + token if residual else y
        rows.append(token)
        sets.append(chosen)
    return torch.stack(rows), sets


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_rounds_against_loops(rounds, shared, residual, fixed):
    gate_up, down = weights()
    x = torch.randn(6, 4, generator=generator(1))
    routers = [torch.randn(5, 4, generator=generator(2 + i)) for i in range(rounds)]
    found, steps = chain(
        x, routers, dispatch(gate_up, down), k=2, residual=residual, fixed=fixed,
        shared=(lambda t: 0.5 * t.sin()) if shared else None,
    )  # fmt: skip
    expected, sets = reference(x, routers, gate_up, down, 2, shared=shared, residual=residual, fixed=fixed)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert len(steps) == rounds
    for t in range(6):
        assert [set(step.indices[t].tolist()) for step in steps] == sets[t]


def test_weights_are_probabilities_unless_asked():
    gate_up, down = weights()
    x, router = torch.randn(6, 4, generator=generator(1)), torch.randn(5, 4, generator=generator(2))
    seen = []

    def experts(x, indices, gates):
        seen.append(gates)
        return dispatch(gate_up, down)(x, indices, gates)

    chain(x, [router], experts, k=2)
    chain(x, [router], experts, k=2, normalise=True, scale=1.5)
    assert bool((seen[0].sum(-1) < 1).all())
    assert torch.allclose(seen[1].sum(-1), torch.full((6,), 1.5))
    assert torch.allclose(seen[0] / seen[0].sum(-1, keepdim=True) * 1.5, seen[1])


def test_the_gradient_reaches_earlier_routers():
    """Through the second round's routing alone: its experts see x_1, its router too."""
    gate_up, down = weights()
    x = torch.randn(6, 4, generator=generator(1)).double()
    routers = [torch.randn(5, 4, generator=generator(2 + i)).double().requires_grad_(True) for i in range(2)]
    _, steps = chain(x, routers, dispatch(gate_up.double(), down.double()), k=2)
    for which, expected in ((0, True), (1, False)):
        found = torch.autograd.grad(
            steps[which].logits.sin().sum(), routers, retain_graph=True, allow_unused=True
        )
        assert [g is not None for g in found] == [True, not expected] if which == 0 else [True, True]


def test_chain_gradient_by_finite_differences():
    gate_up, down = weights(experts=3)
    x = torch.randn(2, 4, generator=generator(1))
    routers = [torch.randn(3, 4, generator=generator(2 + i)).requires_grad_(True) for i in range(2)]

    def value(first):
        return chain(x, [first, routers[1]], dispatch(gate_up, down), k=3)[0].square().sum()

    slopes = torch.autograd.grad(value(routers[0]), routers[0])[0]
    for i in range(3):
        for j in range(4):
            step = torch.zeros(3, 4)
            step[i, j] = 1e-2
            up, down_ = (float(value(routers[0].detach() + s * step).detach()) for s in (1, -1))
            assert float(slopes[i, j]) == pytest.approx((up - down_) / 2e-2, rel=0.05, abs=2e-2)


# --- balance and counts ------------------------------------------------------------------------------------


def test_sequence_balance_against_loops():
    random = generator(3)
    p = torch.randn(3, 5, 4, generator=random).softmax(-1)
    chosen = p.topk(2).indices
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    each = []
    for b in range(3):
        kept = [s for s in range(5) if mask[b, s]]
        total = 0.0
        for i in range(4):
            count = sum(int(e) == i for s in kept for e in chosen[b, s])
            mean = sum(float(p[b, s, i]) for s in kept) / len(kept)
            total += count / (len(kept) * 2 / 4) * mean
        each.append(total)
    assert float(sequence_balance(p, chosen, mask)) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert float(sequence_balance(p[:1], chosen[:1])) == pytest.approx(each[0], rel=1e-5)
    mask[2] = 0  # a sequence of nothing takes no part
    assert float(sequence_balance(p, chosen, mask)) == pytest.approx(sum(each[:2]) / 2, rel=1e-5)


def test_sequence_balance_limits():
    even = torch.full((1, 4, 4), 0.25)
    assert float(sequence_balance(even, torch.arange(4)[None, :, None])) == pytest.approx(1)
    one = torch.tensor([1.0, 0, 0, 0]).expand(1, 4, 4)
    assert float(sequence_balance(one, torch.zeros(1, 4, 1, dtype=torch.long))) == pytest.approx(4)


def test_counting():
    assert combination_gain(64, 4, 2) == pytest.approx(math.comb(64, 4) ** 2 / math.comb(64, 8))
    assert round(math.comb(64, 4) ** 2 / math.comb(64, 8), 1) == 91.2
    assert combination_gain(5, 1, 2) == 25 / 10
    assert combination_gain(7, 3, 1) == 1
    assert combination_gain(256, 32, 8) == math.inf
    for wrong in (4.5, True):
        with pytest.raises(BadInput, match="whole number"):
            combination_gain(7, wrong, 1)
    with pytest.raises(BadInput, match="experts_per_step"):
        combination_gain(7, 4, 2)
    assert steps_of(8, 2) == 4
    for k, rounds in ((8, 3), (8, 0), (2, 4)):
        with pytest.raises(BadInput, match="num_steps"):
            steps_of(k, rounds)
    plain = expert_flops(width=8, inner=4, num_experts=16, experts_per_step=4, num_steps=1, shared=1)
    chained = expert_flops(width=8, inner=4, num_experts=16, experts_per_step=2, num_steps=2, shared=1)
    assert plain == {"experts": 4 * 6 * 32, "shared": 6 * 32, "routers": 2 * 16 * 8}
    assert chained["experts"] == plain["experts"]
    assert chained["shared"] == 2 * plain["shared"]


def test_coactivation_against_loops():
    random = generator(4)
    first, second = (torch.rand(50, 5, generator=random).topk(2).indices for _ in range(2))
    expected = torch.zeros(5, 5, dtype=torch.long)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        for i in a:
            for j in b:
                expected[i, j] += 1
    assert torch.equal(coactivation(first, second, 5), expected)
    assert asymmetry(torch.eye(3)) == 0
    assert asymmetry(torch.tensor([[0, 1], [0, 0]])) == 1
    assert concentration(torch.ones(4, 4)) == pytest.approx(0)
    assert concentration(torch.tensor([[5, 0], [0, 0]])) == pytest.approx(1)


# --- in models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("residual", ["inner", "outer", "both"])
def test_where_the_residual_goes(name, residual):
    """inner drops the stream around the block, outer has no other, both has two."""
    model = make(residual=residual, num_steps=2).convert(base(name))
    site = blocks(model)[-1]
    where = next(n for n, module in model.named_modules() if module is site)
    layer = where.rpartition(".")[0]
    with (
        capture(model, [layer, where]) as out,
        capture(model, [where, f"{layer}.post_attention_layernorm"], inputs=True) as into,
    ):
        logits(model)
        out, into = dict(out), dict(into)
    z, h = into[where], into[f"{layer}.post_attention_layernorm"]
    shared = getattr(site, "shared_experts", None) or getattr(site, "shared_expert", None)
    gate = getattr(site, "shared_expert_gate", None)

    def beside(x):
        return shared(x) if gate is None else torch.sigmoid(gate(x)) * shared(x)

    x = z.flatten(0, 1)
    with torch.no_grad():
        for router in site.routers:
            p, chosen = (x @ router.T).softmax(-1).topk(1)
            y = site.experts(x, chosen, p)
            y = y if shared is None else y + beside(x)
            x = y if residual == "outer" else y + x
    x = x.view(z.shape)
    assert torch.allclose(out[where], x, atol=1e-4)
    assert torch.allclose(out[layer], x if residual == "inner" else h + x, atol=1e-4)


@pytest.mark.parametrize("routers", ["independent", "shared", "fixed"])
def test_routers_and_parameters(routers):
    """Rounds add nothing but routers."""
    plain = base("mixtral")
    size = sum(p.numel() for p in plain.parameters())
    model = make(num_steps=2, routers=routers).convert(base("mixtral"))
    more = sum(p.numel() for p in model.parameters()) - size
    assert more == (3 * 6 * 32 if routers == "independent" else 0)
    logits(model)
    for steps in routings(model).values():
        assert len(steps) == 2
        same = torch.equal(steps[0].logits, steps[1].logits)
        assert same == (routers == "fixed")
    again = make(num_steps=2, routers=routers).auxiliary(model)
    terms = [float(make(balance=1.0).auxiliary(model))]
    assert float(again) == pytest.approx(1e-3 * terms[0], rel=1e-5)


def test_the_first_router_is_kept():
    model, plain = ChainOfExperts().convert(base("mixtral")), base("mixtral")
    for site, block in zip(expert_sites(plain), blocks(model), strict=True):
        assert torch.equal(block.routers[0], site.block.gate.weight)
        assert not torch.equal(block.routers[1], site.block.gate.weight)
        bound = 1 / math.sqrt(32)
        assert float(block.routers[1].detach().abs().max()) <= bound
        assert float(block.routers[1].detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert block.k == 1


def test_a_pretrained_model_is_warned_about():
    model = base("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChainOfExperts().convert(base("mixtral"))
        model.config._name_or_path = "a-model"
        ChainOfExperts(residual="outer").convert(model)
    model = base("mixtral")
    model.config._name_or_path = "a-model"
    with pytest.warns(UserWarning, match="residual stream"):
        ChainOfExperts().convert(model)


def test_dense_layers_stay():
    """DeepSeek's first layer has no experts: it keeps its block and its residual stream."""
    model = make().convert(base("deepseek_v2"))
    assert len(blocks(model)) == 2
    assert type(model.model.layers[0]).__name__ == "DeepseekV2DecoderLayer"
    assert type(model.model.layers[1]).__name__ == "ChainDeepseekV2DecoderLayer"


@pytest.mark.parametrize("routers", ["shared", "fixed"])
def test_variants_load_again(tmp_path, routers):
    method = make(routers=routers, residual="both", gates="model", experts_per_step=2)
    model = method.convert(base("qwen2_moe"))
    fit(model, [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}], loss=method.loss, lr=1e-2, max_steps=2)
    save(model, tmp_path)
    loaded = load(tmp_path)
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))


def test_refuses_other_models():
    with pytest.raises(NotApplicable, match="no block of experts"):
        ChainOfExperts().convert(make_tiny("llama", layers=1))
    grouped = base("deepseek_v2", topk_method="group_limited_greedy", n_group=3, topk_group=1)
    with pytest.raises(NotApplicable, match="softmax and top k"):
        ChainOfExperts().convert(grouped)
    odd = base("mixtral")
    for layer in odd.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    with pytest.raises(NotApplicable, match="another form"):
        ChainOfExperts().convert(odd)
    with pytest.raises(BadInput, match="mask"):
        method = make()
        model = method.convert(base("mixtral"))
        logits(model)
        method.auxiliary(model, torch.ones(1, 3))


@pytest.mark.parametrize("counts", [torch.zeros(3, 3), torch.ones(1, 1)])
def test_nothing_to_concentrate(counts):
    with pytest.raises(BadInput, match=r"counts = .* has no pairs to compare"):
        concentration(counts)


def test_routing_stays_in_float32_under_autocast():
    random = generator(8)
    x, router = torch.randn(2048, 256, generator=random), torch.randn(64, 256, generator=random) / 16
    _, plain = chain(x, [router], lambda x, i, w: x, k=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = chain(x, [router], lambda x, i, w: x, k=4)
    assert found[0].logits.dtype == torch.float32
    assert torch.equal(found[0].indices, plain[0].indices)
