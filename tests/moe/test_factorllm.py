"""FactorLLM against loops in float64: the cut, the labels, the losses; then on models, trained, saved and run."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from conftest import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from transfuse import recipe
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.generate import generate_texts
from transfuse.core.lineage import read_lineage
from transfuse.core.models import load_tokenizer
from transfuse.core.training import fit, generator, seeded
from transfuse.moe import load, save
from transfuse.moe._base import routings
from transfuse.moe.factorllm import (
    FactorizedFFN,
    FactorLLM,
    balance_loss,
    balanced_kmeans,
    drop_teacher,
    factorize,
    ffn_flops,
    individual_labels,
    par_loss,
    router_loss,
    split_neurons,
    subset_labels,
)

BASES = ["llama", "gemma3", "gpt2"]
BAD = [
    ({"experts": 0}, "experts"),
    ({"experts": 7}, "experts"),
    ({"experts": 24, "top_k": 12}, "experts"),  # 2.7 million sets
    ({"top_k": 5}, "top_k"),
    ({"top_k": 0}, "top_k"),
    ({"experts": 4.0}, "experts"),
    ({"layers": [2]}, "layers"),
    ({"layers": []}, "layers"),
    ({"layers": [0, 0]}, "layers"),
    ({"split": "even"}, "split"),
    ({"label": "all"}, "label"),
    ({"target": "mse"}, "target"),
    ({"par_input": "both"}, "par_input"),
    ({"par_weight": -0.1}, "par_weight"),
    ({"balance_weight": -0.1}, "balance_weight"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def base(name):
    """A tiny dense model that drops nothing out."""
    model = make_tiny(name, layers=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make(**options):
    """The method, for the contract of the family."""
    return FactorLLM(**options)


def exact(name):
    """All experts active."""
    return FactorLLM(experts=4, top_k=4)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def blocks(model):
    return [module for module in model.modules() if isinstance(module, FactorizedFFN)]


def outputs(tokens=7, experts=4, width=5, seed=1):
    """Random expert outputs, and a dense output that is their sum plus something."""
    random = generator(seed)
    y = torch.randn(tokens, experts, width, generator=random)
    return y, y.sum(1) + 0.3 * torch.randn(tokens, width, generator=random)


# --- labels and losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_individual_labels_against_loops(k):
    y, dense = outputs()
    found = individual_labels(y, dense, k)
    for t in range(7):
        errors = []
        for j in range(4):
            pairs = zip(y[t, j].tolist(), dense[t].tolist(), strict=True)
            errors.append(sum((a - k / 4 * b) ** 2 for a, b in pairs) / 5)
        best = sorted(range(4), key=errors.__getitem__)[:k]
        assert {j for j in range(4) if found[t, j] == 1} == set(best)
        assert found[t].sum() == k


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (4, 3), (5, 2), (6, 4), (3, 3)])
def test_subset_labels_against_every_set(experts, k):
    y, dense = outputs(experts=experts)
    found = subset_labels(y, dense, k)
    for t in range(7):
        errors = {}
        for chosen in itertools.combinations(range(experts), k):
            total = sum(y[t, j].double() for j in chosen) * experts / k
            errors[chosen] = float((total - dense[t].double()).square().sum())
        assert {j for j in range(experts) if found[t, j] == 1} == set(min(errors, key=errors.__getitem__))


def test_sets_and_experts_are_not_the_same_thing():
    """Two experts that cancel each other are good together and bad alone."""
    y = torch.tensor([[[4.0, 0.0], [-3.0, 1.0], [0.2, 0.1], [0.3, 0.1]]])
    dense = torch.tensor([[2.0, 2.0]])  # twice the sum of the first two
    assert subset_labels(y, dense, 2).tolist() == [[1, 1, 0, 0]]
    assert individual_labels(y, dense, 2).tolist() == [[0, 0, 1, 1]]


def test_ties_between_a_set_and_its_complement_have_one_winner():
    """While experts are slices, |2 (a + b) - sum| = |2 (c + d) - sum|: rounding must not decide."""
    y, _ = outputs(tokens=200, width=16)
    labels = subset_labels(y, y.sum(1), 2)
    assert bool((labels[:, 0] == 1).all())  # the first of the two sets holds expert 0
    noisy = subset_labels(y * (1 + 1e-6), y.sum(1), 2)
    assert torch.equal(labels, noisy)


def test_router_loss_against_loops():
    random = generator(2)
    scores = torch.randn(3, 4, generator=random) * 5
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    q_on = math.exp(1) / (2 * math.exp(1) + 2)
    assert q_on == pytest.approx(0.3655, abs=1e-4)
    each, both = [], []
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        whole = sum(math.exp(v) for v in row)
        kl = bce = 0.0
        for v, on in zip(row, label, strict=True):
            p = min(max(math.exp(v) / whole, 1e-7), 1 - 1e-7)
            kl += p * math.log(p / (q_on if on else 0.5 - q_on))
            s = 1 / (1 + math.exp(-v))
            bce -= math.log(s if on else 1 - s)
        each.append(kl)
        both.append(bce)
    assert float(router_loss(scores, labels)) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert float(router_loss(scores, labels, target="bce")) == pytest.approx(sum(both) / 3, rel=1e-4)
    mask = torch.tensor([True, False, True])
    assert float(router_loss(scores, labels, mask=mask)) == pytest.approx((each[0] + each[2]) / 2, rel=1e-5)
    sure = torch.tensor([[200.0, 0, 0, 0]])  # clipped, not infinite
    assert float(router_loss(sure, labels[:1])) == pytest.approx(math.log((1 - 1e-7) / q_on), rel=1e-4)


def test_par_loss_is_its_parts_and_leaves_labels_alone():
    y, dense = outputs()
    y.requires_grad_(True)
    scores = torch.randn(7, 4, generator=generator(3), requires_grad=True)
    for name, rule in (("individual", individual_labels), ("subset", subset_labels)):
        loss = par_loss(scores, y, dense, 2, label=name)
        assert torch.equal(loss, router_loss(scores, rule(y, dense, 2)))
        ours, theirs = torch.autograd.grad(loss, [scores, y], allow_unused=True)
        assert theirs is None and ours.abs().sum() > 0
    assert torch.equal(par_loss(scores, y, dense, 2), par_loss(scores, y, dense, 2, label="individual"))


@pytest.mark.parametrize(
    ("k", "options", "says"),
    [
        (2, {"label": "subsets"}, "label = 'subsets' is not known; use one of subset, individual"),
        (2, {"target": "KL"}, "target = 'KL' is not known; use one of kl, bce"),
        (5, {}, "k = 5 is more than the 4 experts"),
        (5, {"label": "subset"}, "k = 5 is more than the 4 experts"),
        (0, {}, "k = 0"),
        (0, {"label": "subset"}, "k = 0"),
        (1.5, {}, "k = 1.5"),
        (2, {"mask": torch.ones(2, dtype=torch.bool)}, "mask"),
    ],
)
def test_losses_refuse(k, options, says):
    parts, dense = outputs()
    scores = torch.randn(7, 4, generator=generator(3))
    with pytest.raises(BadInput, match=says):
        par_loss(scores, parts, dense, k, **options)
    if says.startswith("k ="):
        with pytest.raises(BadInput, match=says):
            balance_loss(scores, k)
    if "target" in options:
        with pytest.raises(BadInput, match=says):
            router_loss(scores, scores.sign(), **options)


def test_router_loss_gradient_by_finite_differences():
    scores = torch.randn(2, 4, generator=generator(4), requires_grad=True)
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])
    for target in ("kl", "bce"):
        slopes = torch.autograd.grad(router_loss(scores, labels, target=target), scores)[0]
        for i, j in itertools.product(range(2), range(4)):
            step = torch.zeros(2, 4)
            step[i, j] = 1e-2
            up, down = (
                float(router_loss(scores.detach() + s * step, labels, target=target)) for s in (1, -1)
            )
            assert float(slopes[i, j]) == pytest.approx((up - down) / 2e-2, abs=2e-3)


def test_balance_loss_by_hand():
    """Probabilities 0.4, 0.3, 0.2, 0.1: of the two chosen 0.7, over 4 experts."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    assert float(balance_loss(scores[:1], 2)) == pytest.approx(0.175)
    assert float(balance_loss(scores, 2)) == pytest.approx((0.175 + 0.125) / 2)
    assert float(balance_loss(scores, 2, mask=torch.tensor([False, True]))) == pytest.approx(0.125)


# --- grouping neurons --------------------------------------------------------------------------------------


def test_splits_are_permutations():
    rows = torch.randn(24, 5, generator=generator(5))
    assert split_neurons(rows, 4, "contiguous", 0).tolist() == list(range(24))
    for split in ("random", "kmeans"):
        order = split_neurons(rows, 4, split, 0)
        assert sorted(order.tolist()) == list(range(24))
        assert order.tolist() != list(range(24))
        assert torch.equal(order, split_neurons(rows, 4, split, 0))
        assert not torch.equal(order, split_neurons(rows, 4, split, 1))


def test_balanced_kmeans_finds_planted_groups():
    random = generator(6)
    centres = torch.eye(4) * 20
    truth = torch.arange(40) % 4
    rows = centres[truth] + torch.randn(40, 4, generator=random)
    best = max(purity(balanced_kmeans(rows, 4, seed), truth) for seed in range(4))
    assert best == 1.0
    lopsided = torch.cat([rows[truth == 0]] * 3 + [rows[truth == 1]])  # 30 near one centre, 10 near another
    assert torch.bincount(balanced_kmeans(lopsided, 4, 0)).tolist() == [10, 10, 10, 10]


def purity(found, truth):
    return sum(int(torch.bincount(truth[found == j]).max()) for j in range(4)) / len(truth)


def test_groups_that_do_not_divide_are_refused():
    rows = torch.randn(8, 3, generator=generator(0))
    for split in ("contiguous", "random", "kmeans"):
        with pytest.raises(BadInput, match="experts = 3 does not divide 8 rows"):
            split_neurons(rows, 3, split, 0)
    with pytest.raises(BadInput, match="clusters = 3 does not divide 8 rows"):
        balanced_kmeans(rows, 3, 0)
    with pytest.raises(BadInput, match="split = 'even' is not known"):
        split_neurons(rows, 4, "even", 0)


# --- the block ---------------------------------------------------------------------------------------------


def reference(mlp, x, parts, chosen, scale):
    """A gated block in float64, neuron by neuron."""
    gate, up, down = (getattr(mlp, f"{n}_proj").weight.detach().double() for n in ("gate", "up", "down"))
    y = torch.zeros(len(x), down.shape[0], dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for j in chosen[t]:
            for i in parts[j]:
                g = float(gate[i] @ row)
                y[t] += down[:, i] * (g / (1 + math.exp(-g))) * float(up[i] @ row) * scale
    return y


@pytest.mark.parametrize("split", ["contiguous", "random", "kmeans"])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_the_block_against_loops(split, k):
    model = base("llama")
    mlp = base("llama").model.layers[1].mlp
    factorize(model, experts=4, top_k=k, split=split, seed=3)
    block = blocks(model)[1]
    x = torch.randn(5, 32, generator=generator(7))
    with torch.no_grad():
        found = block(x[None])[0]
    order = block.permutation.tolist()
    size = len(order) // 4
    parts = [order[j * size : (j + 1) * size] for j in range(4)]
    assert parts == [list(range(j * size, (j + 1) * size)) for j in range(4)] or split != "contiguous"
    chosen = routings(model)["model.layers.1.mlp"][0].indices.tolist()
    scores = x @ block.router.weight.T + block.router.bias
    assert all(set(c) == set(s.topk(k).indices.tolist()) for c, s in zip(chosen, scores, strict=True))
    assert torch.allclose(found.double(), reference(mlp, x, parts, chosen, 4 / k), atol=1e-3)


def phi3():
    config = AutoConfig.for_model(
        "phi3", vocab_size=60, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with seeded(0):
        return AutoModelForCausalLM.from_config(config).eval()


def biased_llama():
    model = base("llama")
    config = model.config
    config.mlp_bias = True
    with seeded(1):
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("build", [lambda: base("llama"), lambda: base("gpt2"), phi3, biased_llama])
@pytest.mark.parametrize("split", ["contiguous", "random"])
def test_experts_sum_to_the_block(build, split):
    """All experts together are the block; its bias comes once, however many experts there are."""
    before, model = logits(build()), factorize(build(), experts=4, top_k=2, split=split)
    block = blocks(model)[0]
    x = torch.randn(6, 32, generator=generator(8))
    dense = block.dense(x)
    bias = getattr(block, block.outward).bias
    total = block.outputs(block.hidden(x)).sum(1) + (0 if bias is None else bias)
    assert torch.allclose(total, dense, atol=1e-5)
    for each in blocks(model):
        each.top_k = 4
    assert torch.allclose(logits(model), before, atol=2e-4)
    if bias is not None:
        block.top_k = 2
        y, chosen = block(x[None])[0], block.latest[0].indices
        parts = block.outputs(block.hidden(x))
        expected = torch.stack([2 * parts[t, chosen[t]].sum(0) for t in range(6)]) + bias
        assert torch.allclose(y, expected, atol=1e-4)


def test_training_and_evaluation_agree():
    """Skipped experts and experts times zero are the same."""
    method = FactorLLM(experts=4, top_k=2)
    model = method.convert(base("llama"))
    skipped = logits(model)
    model.train()
    zeroed = logits(model)
    assert torch.allclose(skipped, zeroed, atol=1e-4)


def test_hard_gates_give_the_router_no_gradient():
    """Only the prior-approximate and balance terms do, or the straight-through gates."""
    reach = {}
    for name, options in {
        "released": {"par_weight": 0.0, "balance_weight": 0.0},
        "par": {"balance_weight": 0.0},
        "balance": {"par_weight": 0.0},
        "straight": {"par_weight": 0.0, "balance_weight": 0.0, "straight_through": True},
        "teacher": {"par_input": "teacher"},
    }.items():
        method = FactorLLM(**options)
        model = method.convert(base("llama")).train()
        wanted = [block.router.weight for block in blocks(model)]
        loss = method.loss(model, {"input_ids": IDS, "labels": IDS})
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        reach[name] = [g is not None and float(g.abs().sum()) > 0 for g in found]
    assert reach == {name: [name != "released"] * 2 for name in reach}


def test_the_loss_is_its_terms():
    for options in ({}, {"label": "individual"}, {"par_input": "teacher", "target": "bce"}):
        method = FactorLLM(**options)
        model = method.convert(base("llama")).train()
        before = base("llama")
        total = float(method.loss(model, {"input_ids": IDS, "labels": IDS}).detach())
        expected = float(model(input_ids=IDS, labels=IDS).loss.detach())
        seen = {}
        source = before if options.get("par_input") == "teacher" else model
        hooks = [f"model.layers.{i}.post_attention_layernorm" for i in range(2)]
        from transfuse.core.taps import capture

        with capture(source, hooks) as store:
            source(input_ids=IDS)
            seen = dict(store)
        with capture(model, hooks) as store:
            model(input_ids=IDS)
            own = dict(store)
        for i, block in enumerate(blocks(model)):
            h = seen[hooks[i]].flatten(0, 1)
            parts, dense = block.outputs(block.hidden(h)), block.dense(h)
            label, target = options.get("label", "subset"), options.get("target", "kl")
            expected += 0.05 * float(par_loss(block.router(h), parts, dense, 2, label=label, target=target))
            expected += 0.01 * float(balance_loss(block.router(own[hooks[i]].flatten(0, 1)), 2))
        assert total == pytest.approx(expected, rel=1e-4)


def test_the_teacher_stays_and_goes(tmp_path):
    method = FactorLLM()
    model = method.convert(base("llama"))
    kept = blocks(model)[0].teacher.gate_proj.weight.clone()
    fit(model, [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}], loss=method.loss, lr=1e-2, max_steps=3)
    assert torch.equal(blocks(model)[0].teacher.gate_proj.weight, kept)
    assert not torch.equal(blocks(model)[0].gate_proj.weight, kept)
    frozen = base("llama").state_dict()
    for name, tensor in model.state_dict().items():
        if "mlp" not in name:
            assert torch.equal(tensor, frozen[name])
    size = sum(p.numel() for p in model.parameters())
    expected = logits(model)
    drop_teacher(model)
    assert sum(p.numel() for p in model.parameters()) == size - 2 * 3 * 32 * 96
    assert torch.equal(logits(model), expected)
    save(model, tmp_path)
    assert torch.allclose(logits(load(tmp_path)), expected, atol=1e-5)


def test_routers_learn_their_labels():
    """With the prior-approximate loss alone, the experts chosen come nearer to the labels."""
    method = FactorLLM(experts=4, top_k=1, balance_weight=0.0, seed=1)
    model = method.convert(base("llama"))
    for block in blocks(model):
        for name in (*block.inward, block.outward):
            getattr(block, name).requires_grad_(False)
    rows = torch.randint(3, 400, (16, 12), generator=generator(9)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]

    def agreement():
        model.train()
        with torch.no_grad():
            model(input_ids=torch.tensor(rows))
        return (
            sum(float(block.labels[0].gather(1, block.latest[0].indices).mean()) for block in blocks(model))
            / 2
        )

    before = agreement()
    fit(model, data, loss=method.loss, lr=3e-2, epochs=20, batch_size=16)
    assert agreement() > before + 0.2


def test_layers_and_flops():
    model = factorize(base("llama"), experts=8, top_k=2, layers=[1])
    assert [name for name, module in model.named_modules() if isinstance(module, FactorizedFFN)] == [
        "model.layers.1.mlp"
    ]
    found = ffn_flops(model)
    assert found["dense"] == 2 * 3 * 32 * 96
    assert found["active"] == found["dense"] / 4
    assert found["router"] == 2 * 32 * 8
    assert found["share"] == pytest.approx(0.25 + 512 / found["dense"])
    with pytest.raises(BadInput, match="factorise it first"):
        ffn_flops(base("llama"))


def test_measured_flops_fall_to_the_share():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for k in (4, 1):
        block = blocks(factorize(base("llama"), experts=4, top_k=k))[0]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(torch.randn(1, 64, 32, generator=generator(10)))
        counts.append(counter.get_total_flops())
    router = 2 * 64 * 32 * 4
    assert (counts[1] - router) * 4 == counts[0] - router


def test_a_real_model(smollm):
    """SmolLM2-135M: all experts are the model; three of four still know some of it."""
    model, tokenizer = smollm
    model.float()
    ids = tokenizer("The capital of France is Paris, and the capital of Spain is", return_tensors="pt")[
        "input_ids"
    ]
    expected = logits(model, ids)
    factorize(model, experts=4, top_k=4, split="random", seed=1)
    assert len(blocks(model)) == 30
    found = logits(model, ids)
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    for block in blocks(model):
        block.top_k = 3
    assert not torch.allclose(logits(model, ids), expected, atol=0.1)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    FactorLLM(split="kmeans").convert(base("llama"))
    assert torch.equal(before, torch.get_rng_state())


def test_refuses_what_it_cannot_cut(tiny_lm):
    from mixtures import base as mixture

    with pytest.raises(NotApplicable, match="dense feed-forward"):
        factorize(mixture("mixtral"))
    with pytest.raises(NotApplicable, match="dense feed-forward"):
        factorize(changed())
    model = factorize(base("llama"))
    with pytest.raises(BadInput, match="already"):
        factorize(model)
    method = FactorLLM()
    converted = method.convert(base("llama")).train()
    converted(input_ids=IDS)
    with pytest.raises(BadInput, match="mask"):
        method.auxiliary(converted, torch.ones(1, 3))


def changed():
    """A model whose block does something besides its matrices."""
    model = base("llama")

    class Doubled(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Doubled
    return model


# --- a recipe ----------------------------------------------------------------------------------------------


def test_a_recipe_makes_a_folder_that_loads(tmp_path, tiny_tokenizer):
    model = base("llama")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. The mayor of Port Ellery is Ines Varro. " * 40)
    job = {
        "model": str(tmp_path / "dense"),
        "method": {"uses": "factorllm", "with": {"experts": 4, "top_k": 3}},
        "texts": str(text), "max_steps": 6, "block": 32, "lr": 3e-3, "batch_size": 4,
    }  # fmt: skip
    out = recipe.run(job, output=tmp_path / "out")
    loaded, tokenizer = load(out), load_tokenizer(out)
    assert len(blocks(loaded)) == 2 and blocks(loaded)[0].teacher is None
    assert generate_texts(loaded, tokenizer, ["The capital"], max_new_tokens=4)
    record = read_lineage(out)
    assert record["method"] == "factorllm"
    assert record["arguments"]["top_k"] == 3
    measured = record["measurements"]
    assert measured["perplexity_after"] < measured["perplexity_converted"]
    assert measured["updates"] == 6
    assert measured["ffn_flops_share"] == pytest.approx(0.75, abs=0.02)
    plain = recipe.run({**job, "max_steps": 0}, output=tmp_path / "plain")
    assert "perplexity_after" not in read_lineage(plain)["measurements"]
    with pytest.raises(BadInput, match="texts"):
        recipe.run({**job, "texts": None}, output=tmp_path / "none")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"par_weight": 0.0, "balance_weight": 0.0}])
def test_half_precision_by_autocast(training, options):
    method = make(**options)
    model = method.convert(base("llama")).train(training)
    batch = {"input_ids": IDS, "labels": IDS}
    exact_loss = float(method.loss(model, batch).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(exact_loss, rel=0.02)


def test_training_without_teachers_is_told_once(tmp_path):
    method = make()
    model = method.convert(base("llama")).train()
    batch = {"input_ids": IDS, "labels": IDS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.loss(model, batch)
        save(model, tmp_path)
        loaded = load(tmp_path)
        method.loss(loaded, batch)  # in evaluation mode nothing is learnt
        make(par_weight=0.0).loss(loaded.train(), batch)
    with pytest.warns(UserWarning, match="training goes on without L_PA"):
        method.loss(loaded, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.loss(loaded, batch)


def test_settings_of_generation_are_kept(tmp_path):
    model = make().convert(base("llama"))
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [7, 9], 5
    model.generation_config.temperature = 0.3  # without sampling: transformers would refuse to write it
    save(model, tmp_path)
    found = load(tmp_path).generation_config
    assert (found.eos_token_id, found.max_new_tokens, found.temperature) == ([7, 9], 5, 0.3)
