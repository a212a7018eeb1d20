"""RMoE: cells against torch's and against loops, the state's way through the layers, analyses, variants."""

from __future__ import annotations

import copy
import itertools
import math

import mixtures
import pytest
import torch
from torch import nn

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import fit, generator, seeded
from transfuse.moe import load, save
from transfuse.moe._base import routings
from transfuse.moe.rmoe import (
    Cell,
    RecurrentRouter,
    RMoE,
    RouterState,
    cosine_logits,
    expert_similarity,
    gru_step,
    router_entropy,
    router_gradient_norms,
    routing_mutual_information,
    switch_balance,
)

BASES = mixtures.BASES
base = mixtures.base
BAD = [
    ({"router": "gate"}, "router"),
    ({"head": "cosine"}, "head"),
    ({"state_size": 0}, "state_size"),
    ({"balance": -0.1}, "balance"),
    ({"logit_residual": math.nan}, "logit_residual"),
    ({"router": "mlp", "shared_projector": True}, "shared_projector = True has no effect with router='mlp'"),
    ({"router": "linear", "head": "xmoe"}, "head"),
]
KINDS = ["gru", "rnn", "lstm", "linear", "mlp", "cosine", "xmoe", "random"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def make(**options):
    """A small state, for the contract of the family."""
    return RMoE(**{"state_size": 8, **options})


def exact(name):
    """The model's own linear router."""
    return RMoE(router="linear", normalise=None)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def routers(model):
    return [module for module in model.modules() if isinstance(module, RecurrentRouter)]


# --- cells -------------------------------------------------------------------------------------------------


def gru_loop(x, h, w_ih, w_hh, b_ih, b_hh):
    """The equations, number by number, in float64."""
    p = len(h)
    a = [sum(float(w_ih[i, j]) * x[j] for j in range(p)) + float(b_ih[i]) for i in range(3 * p)]
    b = [sum(float(w_hh[i, j]) * h[j] for j in range(p)) + float(b_hh[i]) for i in range(3 * p)]
    out = []
    for i in range(p):
        r = 1 / (1 + math.exp(-(a[i] + b[i])))
        u = 1 / (1 + math.exp(-(a[p + i] + b[p + i])))
        n = math.tanh(a[2 * p + i] + r * b[2 * p + i])
        out.append((1 - u) * n + u * h[i])
    return out


def test_gru_against_loops_and_torch():
    random = generator(0)
    x, h = (torch.randn(3, 4, generator=random) for _ in range(2))
    w_ih, w_hh = (torch.randn(12, 4, generator=random) for _ in range(2))
    b_ih, b_hh = (torch.randn(12, generator=random) for _ in range(2))
    found = gru_step(x, h, w_ih, w_hh, b_ih, b_hh)
    for t in range(3):
        expected = gru_loop(x[t].tolist(), h[t].tolist(), w_ih, w_hh, b_ih, b_hh)
        assert found[t].tolist() == pytest.approx(expected, abs=1e-5)
    theirs = nn.GRUCell(4, 4)
    theirs.load_state_dict({"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh})
    assert torch.allclose(found, theirs(x, h), atol=2e-7)


@pytest.mark.parametrize(
    ("kind", "theirs"), [("gru", nn.GRUCell), ("rnn", nn.RNNCell), ("lstm", nn.LSTMCell)]
)
def test_cells_are_torchs(kind, theirs):
    cell, reference = Cell(kind, 6), theirs(6, 6)
    cell.load_state_dict(reference.state_dict())
    x = torch.randn(5, 6, generator=generator(1))
    state = cell.zeros(x)
    for _ in range(3):
        state = cell(x, state)
    expected = None
    for _ in range(3):
        expected = reference(x, expected)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state, expected, strict=True))


def test_a_cell_is_drawn_with_zero_biases():
    cell = Cell("gru", 16)
    with seeded(0):
        cell.draw()
    assert float(cell.bias_ih.abs().max()) == float(cell.bias_hh.abs().max()) == 0
    assert float(cell.weight_ih.detach().abs().max()) <= 0.25
    assert float(cell.weight_ih.detach().std()) == pytest.approx(0.25 / math.sqrt(3), rel=0.1)


# --- routers -----------------------------------------------------------------------------------------------


def stack(layers=3, tokens=5, **options):
    """Routers of a few layers with a common cell, and their inputs."""
    state, cell, made = RouterState(layers), None, []
    for i in range(layers):
        router = RecurrentRouter(6, 4, 2, i, state_size=3, cell=cell, state=state, **options)
        router.draw(i)
        cell = getattr(router, "cell", None)
        made.append(router)
    random = generator(2)
    return made, [torch.randn(tokens, 6, generator=random) for _ in range(layers)]


def run(made, inputs):
    return [router(x) for router, x in zip(made, inputs, strict=True)]


def test_the_state_runs_through_the_layers():
    made, inputs = stack()
    found = run(made, inputs)
    h = [[0.0] * 3 for _ in range(5)]
    cell = made[0].cell
    parts = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    for router, x, (scores, gates, chosen) in zip(made, inputs, found, strict=True):
        assert router.cell is cell
        for t in range(5):
            inside = [float(row @ x[t]) for row in router.projector.weight]
            h[t] = gru_loop(inside, h[t], *parts)
            expected = [sum(float(w) * v for w, v in zip(row, h[t], strict=True)) for row in router.weight]
            assert scores[t].tolist() == pytest.approx(expected, abs=1e-5)
            p = [math.exp(v) for v in expected]
            best = sorted(range(4), key=lambda j: -p[j])[:2]
            assert chosen[t].tolist() == best
            assert gates[t].tolist() == pytest.approx(
                [p[j] / (p[best[0]] + p[best[1]]) for j in best], abs=1e-5
            )


def path(made, inputs):
    """d logits of the last layer / d input of the first, by way of the routers alone."""
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    last = run(made, leaves)[-1][0]
    found = torch.autograd.grad(last.sin().sum(), leaves, allow_unused=True)
    return [0.0 if g is None else float(g.abs().sum()) for g in found]


def test_only_a_passed_state_carries_gradients():
    assert all(value > 0 for value in path(*stack()))
    for options in ({"pass_state": False}, {"detach_state": True}):
        *below, last = path(*stack(**options))
        assert below == [0.0, 0.0]
        assert last > 0
    changed = [float((run(*stack(**o))[-1][0] - run(*stack())[-1][0]).detach().abs().max()) for o in
               ({"pass_state": False}, {"detach_state": True})]  # fmt: skip
    assert changed[0] > 1e-3
    assert changed[1] == 0  # detaching changes gradients, not values
    residual = path(*stack(pass_state=False, logit_residual=0.5))
    assert all(value > 0 for value in residual)


def test_logit_residual_adds_the_layer_below():
    made, inputs = stack(pass_state=False)
    plain = [scores for scores, _, _ in run(made, inputs)]
    for router in made:
        router.logit_residual = 0.5
    found = [scores for scores, _, _ in run(made, inputs)]
    expected = plain[0]
    for own, got in zip(plain[1:], found[1:], strict=True):
        expected = own + 0.5 * expected
        assert torch.allclose(got, expected, atol=1e-6)


def test_recurrent_gradient_by_finite_differences():
    made, inputs = stack()
    x = inputs[0].clone().requires_grad_(True)

    def value(first):
        return run(made, [first, *inputs[1:]])[-1][0].square().sum()

    slopes = torch.autograd.grad(value(x), x)[0]
    for t, j in itertools.product(range(2), range(6)):
        step = torch.zeros_like(x)
        step[t, j] = 1e-2
        up, down = (float(value(x.detach() + s * step).detach()) for s in (1, -1))
        assert float(slopes[t, j]) == pytest.approx((up - down) / 2e-2, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_meet(kind):
    """Each token's routing is its own: order and company do not matter."""
    made, inputs = stack(router=kind)
    whole = run(made, inputs)[-1][0]
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(run(made, [x[order] for x in inputs])[-1][0], whole[order], atol=1e-6)
    assert torch.allclose(run(made, [x[:2] for x in inputs])[-1][0], whole[:2], atol=1e-6)


def test_routers_compared_with():
    x = torch.randn(5, 6, generator=generator(3))
    mlp, cosine, xmoe, random = (stack(layers=1, router=k)[0][0] for k in ("mlp", "cosine", "xmoe", "random"))
    inner = x @ mlp.projector.weight.T
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    assert torch.allclose(mlp(x)[0], gelu @ mlp.weight.T, atol=1e-5)
    found = cosine(x)[0].detach()
    for t, j in itertools.product(range(5), range(4)):
        a, b = x[t].tolist(), cosine.weight[j].tolist()
        size = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        expected = sum(p * q for p, q in zip(a, b, strict=True)) / size / 0.07
        assert float(found[t, j]) == pytest.approx(expected, rel=1e-4)
    assert xmoe.weight.shape == (4, 16) and xmoe.temperature.requires_grad
    assert torch.allclose(xmoe(x)[0], cosine_logits(x @ xmoe.reduce.weight.T, xmoe.weight, 0.07), atol=1e-5)
    assert not any(p.requires_grad for p in random.parameters())


def test_half_precision_keeps_the_cell_in_float32():
    model = make().convert(base("mixtral").to(torch.bfloat16))
    first = routers(model)[0]
    assert first.cell.weight_ih.dtype == torch.float32
    assert first.weight.dtype == torch.bfloat16
    scores, gates, _ = first(torch.randn(4, 32, generator=generator(4)).bfloat16())
    assert scores.dtype == torch.float32 and gates.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first(torch.randn(4, 32, generator=generator(4)))[0].dtype == torch.float32


def test_a_state_of_another_batch_is_refused():
    made, inputs = stack()
    made[0](inputs[0])
    with pytest.raises(BadInput, match=r"state = 5 is not the 3 tokens of layer 1"):
        made[1](inputs[1][:3])
    for wrong in ({"top_k": 5}, {"top_k": 0}, {"top_k": 2, "state_size": 0}):
        with pytest.raises(BadInput, match="state_size = 0" if "state_size" in wrong else "top_k = "):
            RecurrentRouter(6, 4, **wrong)
    assert copy.deepcopy(made[0]).state.cells == [None] * 3


# --- balance and analyses ----------------------------------------------------------------------------------


def test_switch_balance_against_loops():
    random = generator(5)
    layers = [torch.randn(6, 4, generator=random) for _ in range(2)]
    mask = torch.tensor([True, True, False, True, True, False])
    for kept in (mask, None):
        rows = [row for z in layers for t, row in enumerate(z) if kept is None or kept[t]]
        total = 0.0
        for n in range(4):
            share = sum(n in row.topk(2).indices.tolist() for row in rows) / len(rows)
            total += 4 * share * sum(float(row.softmax(-1)[n]) for row in rows) / len(rows)
        assert float(switch_balance(layers, 2, mask=kept)) == pytest.approx(total, rel=1e-5)
    flat = [torch.arange(4.0).roll(i).expand(1, 4) * 1e-6 for i in range(4)]  # every expert in turn
    assert float(switch_balance(flat, 2)) == pytest.approx(2, rel=1e-4)
    assert switch_balance([z.half() * 3000 for z in layers], 2).isfinite()


def information(a, b):
    """Mutual information of two lists of codes, from counted pairs."""
    n, total = len(a), 0.0
    for x in set(a):
        for y in set(b):
            both = sum(p == x and q == y for p, q in zip(a, b, strict=True)) / n
            if both:
                total += both * math.log(both / (a.count(x) / n) / (b.count(y) / n))
    return total


def test_mutual_information_against_counting():
    random = generator(6)
    a, b = (torch.randn(9, 8, generator=random).softmax(-1) for _ in range(2))
    expected = (
        sum(
            information(
                [min(int(v * 100), 99) for v in x.tolist()], [min(int(v * 100), 99) for v in y.tolist()]
            )
            for x, y in zip(a, b, strict=True)
        )
        / 9
    )
    assert routing_mutual_information(a, b) == pytest.approx(expected, rel=1e-6)
    assert routing_mutual_information(b, a) == pytest.approx(expected, rel=1e-6)
    flat = torch.full((9, 8), 1 / 8)
    assert routing_mutual_information(a, flat) == pytest.approx(0, abs=1e-12)
    one = torch.eye(8)[:1]
    assert routing_mutual_information(one, one) == pytest.approx(
        -(1 / 8) * math.log(1 / 8) - (7 / 8) * math.log(7 / 8)
    )
    shuffled = torch.arange(8).flip(0)  # the same experts under other numbers say as much
    assert routing_mutual_information(a[:, shuffled], b[:, shuffled]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(BadInput, match="probabilities_b"):
        routing_mutual_information(a, b[:, :4])
    with pytest.raises(BadInput, match="bins = 0"):
        routing_mutual_information(a, b, bins=0)
    with pytest.raises(BadInput, match=r"probabilities_a = .* is not .* of some tokens"):
        routing_mutual_information(a[:0], b[:0])


def test_mutual_information_agrees_with_sklearn():
    from sklearn.metrics import mutual_info_score

    a, b = (torch.randn(4, 16, generator=generator(7 + i)).mul(2).softmax(-1) for i in range(2))
    codes = [[(row * 100).long().tolist() for row in p] for p in (a, b)]
    expected = sum(mutual_info_score(x, y) for x, y in zip(*codes, strict=True)) / 4
    assert routing_mutual_information(a, b) == pytest.approx(expected, rel=1e-6)


def test_entropy_and_similarity():
    found = router_entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]))
    assert found.tolist() == pytest.approx([math.log(4), 0])
    experts = base("mixtral").model.layers[0].mlp.experts
    vectors = []
    for e in range(6):
        parts = [*experts.gate_up_proj[e].chunk(2), experts.down_proj[e].T]
        means = [part.detach().double().mean(0) for part in parts]
        vectors.append(torch.cat([m / m.norm() for m in means]))
    expected = sum(float(a @ b) for a in vectors for b in vectors) / 36
    assert expert_similarity(experts) == pytest.approx(expected, rel=1e-4)
    experts.gate_up_proj.data[:] = experts.gate_up_proj.data[:1]
    experts.down_proj.data[:] = experts.down_proj.data[:1]
    assert expert_similarity(experts) == pytest.approx(3, rel=1e-5)
    model = base("mixtral")
    blocks = [layer.mlp for layer in model.model.layers]
    assert expert_similarity(blocks[0]) == expert_similarity(blocks[0].experts)
    each = [expert_similarity(block) for block in blocks]
    assert expert_similarity(model) == pytest.approx(sum(each) / 3, rel=1e-6)
    with pytest.raises(NotApplicable, match="no stacked experts"):
        expert_similarity(blocks[0].gate)


# --- in models ---------------------------------------------------------------------------------------------


def test_layers_share_the_cell_and_are_counted():
    plain, model = base("mixtral"), make().convert(base("mixtral"))
    found = routers(model)
    assert len({id(router.cell) for router in found}) == 1
    assert len({id(router.projector) for router in found}) == 3
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == 3 * 32 * 8 + 6 * 64 + 6 * 8 + 3 * 6 * (8 - 32)
    shared = make(shared_projector=True).convert(base("mixtral"))
    assert len({id(router.projector) for router in routers(shared)}) == 1
    dense_first = make().convert(base("deepseek_v2"))
    assert [router.layer_idx for router in routers(dense_first)] == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_router_learns_saves_and_loads(tmp_path, kind):
    method = make(router=kind, head="xmoe" if kind == "rnn" else "linear", shared_projector=kind == "lstm")
    model = method.convert(base("qwen2_moe"))
    before = copy.deepcopy([p.detach() for router in routers(model) for p in router.parameters()])
    data = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    losses = fit(model, data, loss=method.loss, lr=1e-2, max_steps=8).losses
    assert losses[-1] < losses[0]
    after = [p for router in routers(model) for p in router.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert not any(moved) if kind == "random" else sum(moved) >= len(moved) - 2
    save(model, tmp_path)
    loaded = load(tmp_path)
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_that_reports_its_routers_still_has_a_loss():
    """transformers would look for the routers it knows."""
    model = make().convert(base("mixtral", output_router_logits=True))
    assert model(input_ids=IDS, labels=IDS).loss.isfinite()


def test_frozen_routers_stay():
    method = make(train_routers=False)
    model = method.convert(base("mixtral"))
    before = copy.deepcopy(routers(model)[0].state_dict())
    fit(model, [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], loss=method.loss, lr=1e-2, max_steps=2)
    after = routers(model)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_balance_term_and_gradient_norms():
    method = make()
    model = method.convert(base("mixtral")).train()
    batch = {"input_ids": IDS, "labels": IDS}
    total = float(method.loss(model, batch).detach())
    own = float(model(**batch).loss.detach())
    steps = [s[0].logits for s in routings(model).values()]
    assert total == pytest.approx(own + 0.01 * float(switch_balance(steps, 2).detach()), rel=1e-5)
    norms = router_gradient_norms(method, model, batch)
    assert norms["lm"] > 0 and norms["balance"] > 0
    twice = router_gradient_norms(make(balance=0.02), model, batch)
    assert twice["balance"] == pytest.approx(2 * norms["balance"], rel=1e-3)
    assert twice["lm"] == pytest.approx(norms["lm"], rel=1e-3)


def gradients(model, loss):
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_checkpointed_gradients_are_right_or_refused(balance):
    method, batch = make(balance=balance), {"input_ids": IDS, "labels": IDS}
    model = method.convert(base("mixtral")).train()
    expected = gradients(model, method.loss(model, batch))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, method.loss(model, batch))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(NotApplicable, match=r"without a graph.*use_reentrant"):
        method.loss(model, batch).backward()
    model.eval()
    with torch.no_grad():
        assert method.loss(model, batch).isfinite()


def test_a_pass_without_graph_before_the_backward_pass_is_refused():
    """What is computed again would read the other pass's states."""
    method, batch = make(), {"input_ids": IDS, "labels": IDS}
    model = method.convert(base("mixtral")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**batch).loss
    logits(model, IDS.flip(0))
    with pytest.raises(NotApplicable, match="state of the layer below"):
        loss.backward()


def test_detached_and_frozen_states_need_no_graph():
    for options in ({"detach_state": True}, {"pass_state": False}, {"train_routers": False}):
        method = make(balance=0.0, **options)
        model = method.convert(base("mixtral")).train()
        expected = gradients(model, method.loss(model, {"input_ids": IDS, "labels": IDS}))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        loss = method.loss(model, {"input_ids": IDS, "labels": IDS})
        loss.backward()
        found = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad
        ]
        if options != {"train_routers": False}:  # there gradients still run through the frozen cell
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_random_routers_are_never_trained(tmp_path):
    model = make(router="random").convert(base("mixtral"))
    save(model, tmp_path)
    assert not any(p.requires_grad for r in routers(load(tmp_path)) for p in r.parameters())


def test_a_linear_router_changes_nothing_without_normalise():
    for name in BASES:
        before = logits(base(name))
        assert torch.equal(logits(RMoE(router="linear", normalise=None).convert(base(name))), before)
    plain = logits(base("qwen2_moe"))  # does not divide by the sum
    assert not torch.allclose(logits(RMoE(router="linear").convert(base("qwen2_moe"))), plain, atol=1e-3)


def test_weights_are_divided_by_their_sum_or_not():
    for normalise in (True, False):
        model = make(normalise=normalise).convert(base("qwen2_moe"))
        logits(model)
        sums = next(iter(routings(model).values()))[0].weights.sum(-1)
        assert torch.allclose(sums, torch.ones_like(sums)) == normalise
