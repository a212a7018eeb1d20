"""Twin-Merging: mixed layers against explicit weights per example, ranks and products by hand, routing, heads, disk."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.files import read_tensors, write_tensors
from transfuse.core.generate import generate_ids, pad_batch
from transfuse.core.models import fingerprint
from transfuse.core.models import load as load_model
from transfuse.core.training import generator, seeded
from transfuse.merge import merge
from transfuse.merge._base import by_task
from transfuse.merge._mixing import low_rank_mix
from transfuse.merge._router import Router, encode, train_router
from transfuse.merge._twin_model import masked_mean
from transfuse.merge.twin_merging import (
    TwinMergedModel,
    TwinMerger,
    TwinMerging,
    normalised_score,
    product_svd,
    rank_of,
    truncated_svd,
)

IDENTITY = True
ALIKE = True
PROMPTS = {
    "towns": ["The capital of France is", "The mayor of Port Ellery", "The capital of Spain", "Quenby is"],
    "talk": [
        "A question: who built it?",
        "An answer: Oskar Tveld did",
        "A question about it",
        "An answer to it",
    ],
}


def make(base, experts, tokenizer, *, seed=0):
    twin = TwinMerging(base, experts, tasks=["towns", "talk"], rank=4, seed=seed, epochs=3, batch_size=4)
    return twin.fit_router({task: prompts * 3 for task, prompts in PROMPTS.items()}, tokenizer).build()


def save(made, folder, tokenizer):
    made.save_pretrained(folder, tokenizer)


def load(folder, base):
    return TwinMergedModel.from_pretrained(folder, base)


def moved(model, seed, scale=0.05):
    model, random = copy.deepcopy(model), generator(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(scale * torch.randn(tensor.shape, generator=random))
    return model


class Net(nn.Module):
    """A convolution with its batch norm, a linear layer, a layer norm, two heads of one shape."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.inner = nn.Linear(5, 6)
        self.gain = nn.LayerNorm(6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.classifier(self.gain(torch.relu(self.inner(hidden))))


def net(seed=0):
    with seeded(seed):
        return Net().eval()


def shares(rows, tasks, seed=0):
    return torch.rand(rows, tasks, generator=generator(seed)).softmax(-1)


def explicit(base, experts, weights, options, name_of=lambda n: n):
    """Per example, a float64 state dict by the paper's equations, written out with numpy."""
    own = base.state_dict()
    states = []
    for row in weights.tolist():
        state = {}
        for name, tensor in own.items():
            theta0 = tensor.double().numpy()
            if (
                any(part in name for part in options.get("exclude", ("classifier", "bias")))
                or tensor.dtype == torch.int64
            ):
                state[name] = tensor.double() if tensor.is_floating_point() else tensor
                continue
            each = [e.state_dict()[name].double().numpy() for e in experts]
            shared = theta0 + options.get("scaling", 0.3) * sum(t - theta0 for t in each)
            total = shared.copy()
            for share, theta in zip(row, each, strict=True):
                change = theta - shared
                if change.ndim >= 2:
                    flat = change.reshape(len(change), -1)
                    u, s, vh = np.linalg.svd(flat, full_matrices=False)
                    rank = options["rank"]
                    count = rank if isinstance(rank, int) else max(1, round(rank * len(s)))
                    count = min(count, len(s))
                    change = ((u[:, :count] * s[:count]) @ vh[:count]).reshape(change.shape)
                total = total + share * change
            state[name] = torch.from_numpy(total)
        states.append(state)
    return states


# --- the numbers -------------------------------------------------------------------------------------------


def test_ranks():
    assert [rank_of(0.1, size) for size in (20, 25, 100, 4, 1)] == [2, 2, 10, 1, 1]
    assert [rank_of(0.1, size, "floor") for size in (20, 25, 100, 4)] == [1, 2, 9, 1]
    assert (rank_of(1.0, 7), rank_of(1.0, 7, "floor"), rank_of(8, 20), rank_of(8, 5)) == (7, 7, 8, 5)
    for rank in (0, -1, 0.0, 1.5, 8.0, True):
        with pytest.raises(BadInput, match="rank"):
            rank_of(rank, 10)


def test_the_svd_is_the_best_approximation():
    matrix = torch.randn(9, 6, generator=generator(0))
    u, s, v, kept = truncated_svd(matrix, 2)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert torch.allclose(s.double(), torch.from_numpy(values[:2]), atol=1e-5)
    assert kept == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), abs=1e-6)
    error = (matrix - (u * s) @ v.T).norm()
    assert float(error) == pytest.approx(math.sqrt((values[2:] ** 2).sum()), abs=1e-5)
    u, s, v, kept = truncated_svd(matrix, 6)
    assert torch.allclose((u * s) @ v.T, matrix, atol=1e-5) and kept == pytest.approx(1.0)
    assert truncated_svd(torch.zeros(3, 2), 1)[3] == 1.0


def test_products_are_decomposed_without_the_matrix():
    random = generator(1)
    factors = [(torch.randn(12, k, generator=random), torch.randn(k, 8, generator=random)) for k in (2, 3)]
    rows = [[0.7, -0.3], [0.0, 1.0], [0.0, 0.0]]
    for rank in (1, 3, 9):
        for weights, (u, s, v, kept) in zip(rows, product_svd(factors, rows, rank), strict=True):
            matrix = sum(w * (a @ b) for w, (a, b) in zip(weights, factors, strict=True))
            u2, s2, v2, kept2 = truncated_svd(matrix, min(rank, 5))
            assert torch.allclose((u * s) @ v.T, (u2 * s2) @ v2.T, atol=1e-4)
            assert kept == pytest.approx(kept2, abs=1e-5)


def test_the_mix_by_a_loop():
    random = generator(2)
    x = torch.randn(3, 4, 5, generator=random)
    u, s, v = (torch.randn(*shape, generator=random) for shape in ((2, 6, 2), (2, 2), (2, 5, 2)))
    weights = shares(3, 2)
    found = low_rank_mix(x, weights, u.transpose(0, 1).flatten(1), s, v.transpose(0, 1).flatten(1))
    for b in range(3):
        for n in range(4):
            wanted = torch.zeros(6, dtype=torch.float64)
            for t in range(2):
                matrix = (u[t] * s[t]).double() @ v[t].double().T
                wanted += float(weights[b, t]) * (matrix @ x[b, n].double())
            assert torch.allclose(found[b, n].double(), wanted, atol=1e-5)


def test_means_over_tokens():
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert masked_mean(hidden).tolist() == [[2.0, 3.0], [8.0, 9.0]]
    assert masked_mean(hidden, torch.tensor([[1, 0, 0], [0, 1, 1]])).tolist() == [[0.0, 1.0], [9.0, 10.0]]
    many = torch.full((1, 5000, 1), 1.001).to(torch.bfloat16)
    assert masked_mean(many, torch.ones(1, 5000)).item() == pytest.approx(float(many[0, 0, 0]))
    assert masked_mean(torch.ones(2, 5, 3, 3)).shape == (2, 5)


def test_normalised_scores():
    assert normalised_score({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}) == pytest.approx(75.0)
    for scores, experts in (({"a": 1.0}, {"b": 1.0}), ({}, {}), ({"a": 1.0}, {"a": 0.0})):
        with pytest.raises(BadInput):
            normalised_score(scores, experts)


# --- mixing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"rank": 0.5}, {"rank": 2, "scaling": 0.5}, {"rank": 1.0, "exclude": ("classifier",)}]
)
def test_every_example_is_answered_with_its_own_weights(options):
    base = net()
    experts = [moved(base, seed) for seed in (1, 2, 3)]
    twin = TwinMerging(base, experts, features="inner", **options).build().double()
    x = torch.randn(4, 2, 8, 8, generator=generator(5), dtype=torch.float64)
    weights = shares(4, 3).double()
    found = twin(x, routing=weights)
    for i, state in enumerate(explicit(base, experts, weights, options)):
        alone = torch.func.functional_call(copy.deepcopy(base).double(), state, (x[i : i + 1],))
        assert torch.allclose(found[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3"])
def test_language_models_are_mixed_token_by_token(tiny_lm, architecture):
    base = tiny_lm(architecture, layers=1)
    experts = [moved(base, seed, 0.03) for seed in (1, 2)]
    options = {"rank": 3, "exclude": ()}
    twin = TwinMerging(base, experts, **options).build()
    ids, mask = pad_batch([[5, 6, 7, 8], [11, 12, 13, 14]], 0)
    weights = shares(2, 2)
    with torch.no_grad():
        found = twin(input_ids=ids, attention_mask=mask, routing=weights).logits
    for i, state in enumerate(explicit(base, experts, weights, options)):
        alone = copy.deepcopy(base)
        alone.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        with torch.no_grad():
            wanted = alone(input_ids=ids[i : i + 1]).logits[0]
        assert torch.allclose(found[i], wanted, atol=2e-4)


@pytest.mark.parametrize("strategy", ["magnitude", "random"])
def test_sparse_changes(tiny_lm, strategy):
    base = net()
    experts = [moved(base, seed) for seed in (1, 2)]
    twin = TwinMerging(base, experts, strategy=strategy, rank=0.25, features="inner").build()
    weights = shares(3, 2)
    kept = {n: p["delta"] for n, p in twin._exclusives.items()}
    shared = merge(
        base=base, models=experts, method="task_arithmetic", scaling=0.3, exclude=["classifier", "bias"]
    )
    for name in ("conv.weight", "inner.weight"):
        delta = experts[0].state_dict()[name] - shared[name]
        count = int(0.25 * delta.numel())
        if strategy == "magnitude":
            assert kept[name][0].count_nonzero() == count
            assert torch.allclose(
                kept[name][0].abs().sum(), delta.abs().flatten().topk(count).values.sum(), atol=1e-4
            )
        else:
            chosen = kept[name][0] != 0
            assert torch.allclose(kept[name][0][chosen], 4 * delta[chosen], atol=1e-5)
            assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.2)
    assert torch.allclose(kept["gain.weight"][1], experts[1].gain.weight - shared["gain.weight"], atol=1e-6)
    x = torch.randn(3, 2, 8, 8, generator=generator(5))
    found = twin(x, routing=weights)
    for i, row in enumerate(weights):
        state = {
            n: shared[n] + torch.einsum("t,t...->...", row, kept[n]) if n in kept else shared[n]
            for n in shared
        }
        assert torch.allclose(
            found[i], torch.func.functional_call(base, state, (x[i : i + 1],))[0], atol=1e-5
        )
    again = TwinMerging(base, experts, strategy=strategy, rank=0.25, features="inner").build()
    assert all(torch.equal(again._exclusives[n]["delta"], d) for n, d in kept.items())
    one = TwinMerging(base, experts, strategy=strategy, rank=1, features="inner").build()  # a count, no share
    left = one._exclusives["inner.weight"]["delta"][0]
    assert left.count_nonzero() / left.numel() == pytest.approx(1 / min(left.shape), abs=0.15)


def test_limits():
    """All directions and one-hot routing give the expert; no change in any expert gives the base; zeros the shared."""
    base = net()
    experts = [moved(base, seed) for seed in (1, 2)]
    x = torch.randn(3, 2, 8, 8, generator=generator(5))
    twin = TwinMerging(
        base, {"a": experts[0], "b": experts[1]}, rank=1.0, exclude=(), features="inner"
    ).build()
    for task, expert in zip("ab", experts, strict=True):
        assert torch.allclose(twin(x, routing=twin.one_hot(task)), expert(x), atol=1e-4)
    shared = merge(base=base, models=experts, method="task_arithmetic", scaling=0.3)
    assert torch.allclose(
        twin(x, routing=torch.zeros(2)), torch.func.functional_call(base, shared, (x,)), atol=1e-6
    )
    ties = TwinMerging(
        base, experts, shared="ties", scaling=1.0, rank=1.0, exclude=(), features="inner"
    ).build()
    assert torch.allclose(ties(x, routing=ties.one_hot("1")), experts[1](x), atol=1e-4)
    same = TwinMerging(base, [base, base], features="inner").build()
    assert same._exclusives == {} and torch.equal(same(x, routing=torch.tensor([0.5, 0.5])), base(x))


def test_experts_as_states_models_and_folders_are_alike(tiny_lm, tmp_path):
    base = tiny_lm("llama", layers=1)
    experts = [moved(base, seed) for seed in (1, 2)]
    for i, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / str(i))
    given = [experts, [e.state_dict() for e in experts], [tmp_path / "0", str(tmp_path / "1")]]
    found = [TwinMerging(base, models, rank=2).build() for models in given]
    first = found[0]._exclusives
    for twin in found[1:]:
        assert all(torch.equal(twin._exclusives[n][p], first[n][p]) for n in first for p in first[n])


def test_adapters_are_merged_as_products(tiny_lm, tmp_path):
    """Through their factors, the same as through whole matrices."""
    base = tiny_lm("llama", layers=1)
    folders, merged = [], []
    for seed in (1, 2):
        model = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"])
        )
        random = generator(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=random))
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
        merged.append(model.merge_and_unload())
    by_factors, by_matrices = (TwinMerging(base, models, rank=4, scaling=0.4) for models in (folders, merged))
    one, other = by_factors.build(), by_matrices.build()
    changed = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    assert set(one._exclusives) == changed == set(other._exclusives)
    for name in changed:
        for a, b in zip(*(range(2), range(2)), strict=True):
            products = [(t._exclusives[name]["U"][a] * t._exclusives[name]["S"][b]) @ t._exclusives[name]["V"][a].T
                        for t in (one, other)]  # fmt: skip
            assert torch.allclose(*products, atol=1e-4)
    for task in ("0", "1"):
        for figure in ("change", "beyond", "kept"):
            assert by_factors.report[task][figure] == pytest.approx(
                by_matrices.report[task][figure], rel=1e-3
            )


def test_the_report_and_a_foreign_expert():
    base = net()
    near, far = moved(base, 1, 0.01), moved(base, 2, 5.0)
    twin = TwinMerging(base, [near, near], rank=1.0, scaling=0.3, features="inner", exclude=())
    twin.build()
    state = base.state_dict()
    numbers = [n for n, t in state.items() if t.is_floating_point()]
    change = math.sqrt(sum(float((near.state_dict()[n] - state[n]).square().sum()) for n in numbers))
    norm = math.sqrt(sum(float(state[n].square().sum()) for n in numbers))
    assert twin.report["0"]["change"] == pytest.approx(change / norm, rel=1e-3)
    assert twin.report["0"]["beyond"] == pytest.approx(0.4, rel=1e-3)  # 1 - 2 * 0.3
    assert twin.report["0"]["kept"] == pytest.approx(1.0, rel=1e-3)
    with pytest.warns(UserWarning, match="expert 1 differs from the base"):
        TwinMerging(base, [near, far], features="inner").build()


# --- the router --------------------------------------------------------------------------------------------


def test_the_router_is_the_papers():
    router = Router(8, 3)
    kinds = [type(layer).__name__ for layer in router]
    stage = ["Linear", "BatchNorm1d", "LeakyReLU", "Dropout"]
    assert kinds == [*stage, *stage, "Linear"]
    assert [tuple(router[i].weight.shape) for i in (0, 4, 8)] == [(16, 8), (16, 16), (3, 16)]
    assert router.tasks == 3 and router[3].p == 0.5


def test_the_router_learns_and_keeps_its_best_epoch():
    random = generator(0)
    labels = torch.randint(0, 3, (600,), generator=random)
    centres = 2 * torch.randn(3, 8, generator=random)
    features = centres[labels] + 0.3 * torch.randn(600, 8, generator=random)
    state = torch.get_rng_state()
    router, accuracy = train_router(features, labels, tasks=3, lr=5e-3, epochs=10, batch_size=128)
    assert accuracy > 0.95 and not router.training
    assert (router(features).argmax(-1) == labels).float().mean() > 0.95
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = train_router(features, labels, tasks=3, lr=5e-3, epochs=10, batch_size=128)
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), again.parameters(), strict=True))
    _, last = train_router(features, labels, tasks=3, lr=5e-3, epochs=10, batch_size=128, validation=0.0)
    assert last > 0.95
    with pytest.raises(BadInput, match="validation"):
        train_router(features, labels, tasks=3, validation=1.0)
    with pytest.raises(BadInput, match="too few"):
        train_router(features[:1], labels[:1], tasks=3)


def test_routing_temperature_and_top_k(tiny_lm, tiny_tokenizer):
    base = tiny_lm("llama", layers=1)
    made = make(base, [moved(base, 1), moved(base, 2)], tiny_tokenizer)
    ids, mask = pad_batch([[5, 6, 7], [9, 8]], 0)
    plain = made.routing_weights(input_ids=ids, attention_mask=mask)
    assert torch.allclose(plain.sum(-1), torch.ones(2))
    logits = plain.log()
    made.temperature = 0.25
    sharp = made.routing_weights(input_ids=ids, attention_mask=mask)
    assert torch.allclose(sharp, (logits / 0.25).softmax(-1), atol=1e-6)
    made.top_k = 1
    assert torch.equal(
        made.routing_weights(input_ids=ids, attention_mask=mask), (plain == plain.amax(-1, True)).float()
    )
    made.train()
    assert not made.router.training and made.model.training  # batch norm must not see a batch of one
    made.routing_weights(input_ids=ids[:1], attention_mask=mask[:1])


def test_features_are_the_mean_last_hidden_state_of_the_shared_model(tiny_lm, tiny_tokenizer):
    base = tiny_lm("llama", layers=1)
    experts = [moved(base, 1), moved(base, 2)]
    made = make(base, experts, tiny_tokenizer)
    shared = copy.deepcopy(base)
    shared.load_state_dict(merge(base=base, models=experts, method="task_arithmetic", scaling=0.3))
    ids, mask = pad_batch([[5, 6, 7], [9, 8]], 0)
    with torch.no_grad():
        hidden = shared(input_ids=ids[1:, :2], output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(made.encode(input_ids=ids, attention_mask=mask)[1], hidden[0].mean(0), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["roberta", "bert", "llama"])
def test_features_of_padded_rows_are_those_of_each_alone(tiny_lm, kind, side):
    """RoBERTa counts its positions itself, from the padding id on; others are told, for rows padded on the left."""
    if kind == "llama":
        model = tiny_lm("llama", layers=1)
    else:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.for_model(
            kind, vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=20, pad_token_id=1,
        )  # fmt: skip
        with seeded(0):
            model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [[5, 6, 7, 8, 9], [11, 12, 13]]
    ids, mask = pad_batch(rows, 1, side=side)
    found = encode(model, None, (), {"input_ids": ids, "attention_mask": mask})
    for row, features in zip(rows, found, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
        assert torch.allclose(features, hidden.mean(0), atol=1e-5)


def test_a_cache_is_the_callers(tiny_lm, tiny_tokenizer):
    """The router leaves it alone, and does not choose from a part of the prompt."""
    from transformers import DynamicCache

    base = tiny_lm("llama", layers=1)
    made = make(base, [moved(base, 1), moved(base, 2)], tiny_tokenizer)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    weights, whole = made.routing_weights(input_ids=ids[:, :4]), None
    with torch.no_grad():
        whole = made(input_ids=ids, routing=weights).logits
        for options in ({}, {"cache_position": torch.arange(4)}):
            cache = DynamicCache(config=base.config)
            made(input_ids=ids[:, :4], past_key_values=cache, use_cache=True, **options)
            assert cache.get_seq_length() == 4
        with pytest.raises(BadInput, match=r"past_key_values = .* pass routing="):
            made(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
        last = made(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True, routing=weights).logits
    assert torch.allclose(last[:, -1], whole[:, -1], atol=1e-5) and cache.get_seq_length() == 5


def test_the_examples_of_a_call_are_counted_by_its_tensors(tiny_lm, tiny_tokenizer):
    base = tiny_lm("llama", layers=1)
    made = make(base, [moved(base, 1), moved(base, 2)], tiny_tokenizer)
    ids, even = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([0.5, 0.5])
    wanted = made(input_ids=ids, routing=even).logits
    assert torch.equal(made(use_cache=False, input_ids=ids, routing=even).logits, wanted)
    place = torch.arange(3)[None]
    assert torch.allclose(made(position_ids=place, input_ids=ids, routing=even).logits, wanted, atol=1e-5)
    with pytest.raises(BadInput, match="input_ids = None is missing"):
        made(use_cache=False, routing=even)
    given = made.one_hot("talk", 2)
    embedded = base.get_input_embeddings()(
        ids
    )  # as it was before the merge, and no expert's: only lengths count
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert made.generate(inputs_embeds=embedded, routing=given, **options).shape == (2, 2)
    assert made.generate(inputs_embeds=embedded, **options).shape == (2, 2)


class Places(nn.Module):
    """Learned positions, looked up once for all examples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(12, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))))


def test_embeddings_that_all_examples_share_are_not_mixed_up():
    with seeded(0):
        base = Places().eval()
    experts = [moved(base, 1, 0.3), moved(base, 2, 0.3)]
    made = TwinMerging(base, experts, rank=1.0, features="inner", exclude=()).build()
    ids, each = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.eye(2)
    with torch.no_grad():
        with pytest.raises(NotApplicable, match="without an axis of examples"):
            made(ids, routing=each)  # four positions, two examples: neither two nor four rows of weights fit
        alone = torch.cat([made(ids[i : i + 1], routing=each[i]) for i in range(2)])
        wanted = torch.cat([expert(ids[i : i + 1]) for i, expert in enumerate(experts)])
        assert torch.allclose(alone, wanted, atol=1e-5)
        assert torch.allclose(made(ids, routing=each[0]), experts[0](ids), atol=1e-5)


def test_generation_keeps_the_routing_of_the_prompt(tiny_lm, tiny_tokenizer):
    """Greedy and with beams, each row is continued as its own model would."""
    base = tiny_lm("llama", layers=1)
    experts = [moved(base, 1), moved(base, 2)]
    made = make(base, experts, tiny_tokenizer)
    ids, mask = pad_batch([[5, 6, 7, 8], [11, 12, 13]], 0, side="left")
    weights = made.routing_weights(input_ids=ids, attention_mask=mask)
    options = {"max_new_tokens": 6, "do_sample": False}
    for beams in (1, 3):
        out = made.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **options)
        given = made.generate(input_ids=ids, attention_mask=mask, num_beams=beams, routing=weights, **options)
        assert torch.equal(out, given)
        for i, state in enumerate(explicit(base, experts, weights, {"rank": 4})):
            alone = copy.deepcopy(base)
            alone.load_state_dict({name: tensor.float() for name, tensor in state.items()})
            own = ids[i : i + 1, mask[i].argmax() :]
            wanted = alone.generate(
                input_ids=own, attention_mask=torch.ones_like(own), num_beams=beams, **options
            )
            new = wanted[0, own.shape[1] :].tolist()
            assert out[i, ids.shape[1] :].tolist()[: len(new)] == new


def test_it_answers_like_any_model(tiny_lm, tiny_tokenizer):
    base = tiny_lm("llama", layers=1)
    made = make(base, [moved(base, 1), moved(base, 2)], tiny_tokenizer)
    assert made.config is made.model.config
    prompts = [prompt for task in PROMPTS.values() for prompt in task]
    together = generate_ids(made, tiny_tokenizer, prompts, max_new_tokens=4)
    alone = [generate_ids(made, tiny_tokenizer, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert together == alone
    ids = torch.tensor([tiny_tokenizer(prompts[0])["input_ids"]])
    assert (
        made.generate(inputs=ids, max_new_tokens=4)[0, ids.shape[1] :].tolist()[: len(alone[0])] == alone[0]
    )


def test_inputs_of_every_form_train_the_same_router(tiny_lm, tiny_tokenizer):
    base = tiny_lm("llama", layers=1)
    experts = [moved(base, 1), moved(base, 2)]
    texts = {task: prompts[:1] * 12 for task, prompts in PROMPTS.items()}
    rows = {
        t: [{"input_ids": tiny_tokenizer(p)["input_ids"]} for p in prompts] for t, prompts in texts.items()
    }
    padded = {t: dict(zip(("input_ids", "attention_mask"), pad_batch([r["input_ids"] for r in own], 0), strict=True))
              for t, own in rows.items()}  # fmt: skip
    found = []
    for inputs in (texts, rows, padded):
        twin = TwinMerging(base, experts, tasks=list(PROMPTS), rank=2, epochs=2)
        twin.fit_router(inputs, tiny_tokenizer)
        found.append(twin.build().router[0].weight)
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2])


# --- heads, disk -------------------------------------------------------------------------------------------


def test_a_task_brings_its_head():
    base = net()
    experts = {"a": moved(base, 1), "b": moved(base, 2)}
    experts["b"].classifier = nn.Linear(6, 7)  # another number of classes
    twin = TwinMerging(base, experts, rank=1.0, features="inner").build()
    x = torch.randn(3, 2, 8, 8, generator=generator(5))
    before = twin(x, routing=torch.zeros(2))
    for task in "ab":
        found = twin(x, routing=twin.one_hot(task), task=task)
        assert torch.allclose(found, experts[task](x), atol=1e-4)
    assert twin(x, routing=torch.zeros(2), task="b").shape == (3, 7)
    assert torch.equal(twin(x, routing=torch.zeros(2)), before)
    with pytest.raises(BadInput, match="is not a task"):
        twin(x, routing=torch.zeros(2), task="c")


def test_a_plain_module_is_saved_and_loaded(tmp_path):
    base = net()
    experts = {"a": moved(base, 1), "b": moved(base, 2)}
    x = torch.randn(6, 2, 8, 8, generator=generator(5))
    twin = TwinMerging(base, experts, rank=0.5, features="inner", epochs=2, temperature=0.5, top_k=1)
    made = twin.fit_router({"a": x, "b": x + 1}).build()
    made.save_pretrained(tmp_path / "made")
    loaded = TwinMergedModel.from_pretrained(tmp_path / "made", net(9))
    assert (loaded.tasks, loaded.features, loaded.temperature, loaded.top_k) == (["a", "b"], "inner", 0.5, 1)
    for task in (None, "a", "b"):
        assert torch.equal(loaded(x, task=task), made(x, task=task))
    assert loaded.exclusive_bytes == made.exclusive_bytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_folder_loads_by_itself_and_its_shared_model_alone(tiny_lm, tiny_tokenizer, tmp_path, architecture):
    base = tiny_lm(architecture, layers=1)
    experts = [moved(base, 1), moved(base, 2)]
    made = make(base, experts, tiny_tokenizer)
    made.save_pretrained(tmp_path / "made", tiny_tokenizer)
    loaded = TwinMergedModel.from_pretrained(tmp_path / "made")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(
        loaded(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5
    )  # other attention
    alone = load_model(tmp_path / "made").model
    with torch.no_grad():
        shared = made(input_ids=ids, routing=torch.zeros(2)).logits
        assert torch.allclose(alone(input_ids=ids).logits, shared, atol=1e-5)


def test_damaged_and_foreign_folders_are_named(tmp_path):
    base = net()
    made = TwinMerging(base, [moved(base, 1), moved(base, 2)], features="inner").build()
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(BadInput, match=r"twin\.safetensors"):
        TwinMergedModel.from_pretrained(tmp_path)
    other = net()
    other.inner = nn.Linear(5, 7)
    with pytest.raises(IncompatibleModels, match=r"inner\.weight"):
        TwinMergedModel.from_pretrained(tmp_path / "made", other)
    file = tmp_path / "made" / "twin.safetensors"
    tensors, facts = read_tensors(file)
    write_tensors(file, tensors, {**facts, "format": 99})
    with pytest.raises(CorruptFile, match="another format"):
        TwinMergedModel.from_pretrained(tmp_path / "made", net())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        TwinMergedModel.from_pretrained(tmp_path / "made", net())


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank_rounding": "up"}, "rank_rounding"),
        ({"strategy": "prune"}, "strategy"),
        ({"shared": "tise"}, "did you mean 'ties'"),
        ({"scaling": math.inf}, "scaling"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 3}, "top_k"),
        ({"tasks": ["a"]}, "tasks"),
        ({"tasks": ["a", "a"]}, "tasks"),
        ({"exclude": ["("]}, "exclude"),
        ({"exclude": "bias"}, "exclude = 'bias' is not a list"),
        ({"rank": "8"}, "rank"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": -3}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"epochs": 2.5}, "epochs"),
        ({"seed": "x"}, "seed"),
        ({"temperature": math.inf}, "temperature"),
        ({"max_inputs": -5}, "max_inputs"),
        ({"top_k": 1.5}, "top_k"),
        ({"scaling": math.nan}, "scaling = nan is not a finite number"),
    ],
)
def test_bad_arguments_are_named(options, named):
    base = net()
    twin = TwinMerging(base, [moved(base, 1), moved(base, 2)], **{"features": "inner", **options})
    before = fingerprint(base)
    with pytest.raises(BadInput, match=named):
        twin.build()
    assert fingerprint(base) == before


def test_bad_inputs_are_named(tiny_lm):
    base = net()
    experts = [moved(base, 1), moved(base, 2)]
    with pytest.raises(BadInput, match="fewer than two"):
        TwinMerging(base, experts[:1]).build()
    with pytest.raises(BadInput, match="base"):
        TwinMerging(base.state_dict(), experts).build()
    other = net()
    other.inner = nn.Linear(5, 7)
    with pytest.raises(IncompatibleModels, match=r"experts\[1\].*inner\.weight"):
        TwinMerging(base, [experts[0], other]).build()
    with pytest.raises(IncompatibleModels, match=r"embed_tokens\.weight|lm_head\.weight"):
        TwinMerging(
            tiny_lm("llama", layers=1), [tiny_lm("llama", layers=1), tiny_lm("llama", layers=1, vocab=390)]
        ).build()
    twin = TwinMerging(base, experts, features="inner")
    for inputs, says in (
        ({"0": torch.ones(2, 2, 8, 8)}, "every expert"),
        ({"0": "text", "1": "text"}, "are no inputs"),
        ({"0": ["text"], "1": ["text"]}, "tokenizer"),
        ({"0": {}, "1": {}}, "holds no inputs"),
        ({"0": torch.zeros(0, 2, 8, 8), "1": torch.ones(2, 2, 8, 8)}, "holds no inputs"),
        ({"0": [{"x": [1]}], "1": [{"x": [1]}]}, r"inputs_by_task\['0'\]\[0\] = .* no input_ids"),
    ):
        with pytest.raises(BadInput, match=says):
            twin.fit_router(inputs)
    made = twin.build()
    with pytest.raises(BadInput, match="was not trained"):
        made(torch.ones(1, 2, 8, 8))
    with pytest.raises(BadInput, match="routing"):
        made(torch.ones(3, 2, 8, 8), routing=torch.ones(2, 2))
    with pytest.raises(BadInput, match="features"):
        TwinMerging(base, experts).fit_router({"0": torch.ones(2, 2, 8, 8), "1": torch.ones(2, 2, 8, 8)})


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Bilinear(3, 3, 2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 3)])}),
        nn.ModuleDict({"relative_attention_bias": nn.Embedding(8, 2)}),
    ],
    ids=["bilinear", "grouped", "expert", "distances"],
)
def test_layers_that_cannot_be_mixed_are_named(layer):
    base = Odd(layer)
    with pytest.raises(NotApplicable, match="exclude it"):
        TwinMerging(base, [moved(base, 1), moved(base, 2)], exclude=()).build()
    kept = TwinMerging(base, [moved(base, 1), moved(base, 2)], exclude=["inner"]).build()
    assert kept._exclusives == {}


def test_names_of_the_class():
    assert TwinMerger is TwinMerging


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"task": "a", "prompt": "x"}], "fewer than two tasks"),
        ([{"task": "a", "prompt": " "}, {"task": "b", "prompt": "x"}], "no prompt"),
        ([{"prompt": "x"}], "no task"),
        (["x"], "no task"),
    ],
)
def test_prompts_by_task(rows, says):
    with pytest.raises(BadInput, match=says):
        by_task(rows)
    assert by_task([{"task": t, "prompt": p} for t, p in ("ax", "by", "az")]) == {"a": ["x", "z"], "b": ["y"]}


def test_from_a_recipe(tiny_lm, tiny_tokenizer, tmp_path):
    """`transfuse run`: experts and prompts in, a folder out that loads and routes."""
    import json

    from transfuse.recipe import run

    base = tiny_lm("llama", layers=1)
    for name, model in (("base", base), ("one", moved(base, 1)), ("two", moved(base, 2))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    lines = [json.dumps({"task": t, "prompt": p}) for t, prompts in PROMPTS.items() for p in prompts * 3]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    recipe = {
        "model": str(tmp_path / "base"),
        "method": {"uses": "twin-merging",
                   "with": {"experts": [str(tmp_path / "one"), str(tmp_path / "two")], "rank": 2, "epochs": 2}},
        "prompts": str(tmp_path / "prompts.jsonl"),
    }  # fmt: skip
    folder = run(recipe, output=tmp_path / "out")
    made = TwinMergedModel.from_pretrained(folder)
    assert made.tasks == list(PROMPTS)
    assert made.routing_weights(input_ids=torch.tensor([[5, 6]])).shape == (1, 2)
    record = json.loads((folder / "transfuse.json").read_text())
    assert record["method"] == "twin-merging" and record["arguments"]["rank"] == 2
    with pytest.raises(NotApplicable, match="is not read"):
        run({**recipe, "texts": str(tmp_path / "prompts.jsonl")}, output=tmp_path / "out2")
    missing = {k: v for k, v in recipe.items() if k != "prompts"}
    with pytest.raises(BadInput, match="prompts"):
        run(missing, output=tmp_path / "out2")
