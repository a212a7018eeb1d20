"""dynamic-logits-fusion: the search against a slow float64 loop over written-out distributions, identities, texts."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.generate import encode_pair, generate_texts
from transfuse.core.training import generator
from transfuse.steer.dynamic_logits_fusion import (
    DynamicLogitsFusion,
    alpha_grids,
    fuse_logits,
    moved_divergences,
)

QUERIES = ["The capital of France is", "The mayor of Port Ellery is", "A question: who built the bridge?"]
GRID = [k / 10 for k in range(21)]


def make(model, tokenizer):
    """For the family's contract: an instance, arguments for `generate`, what its first stream reads."""
    method = DynamicLogitsFusion(
        model, tokenizer, small_like(model, 5), [small_like(model, 6), small_like(model, 7)]
    )
    return method, (QUERIES,), QUERIES


def small_like(model, seed):
    """A random model of the same kind as `model`, its weights turned by a seed."""
    twin = copy.deepcopy(model)
    g = generator(seed)
    for parameter in twin.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=g) * 0.3 * parameter.data.std())
    return twin


def slow_search(base, small, experts, points):
    """One row in Python floats: P~ written out at every point, J there, the first of the best points."""

    def softmax(z):
        top = max(z)
        e = [math.exp(x - top) for x in z]
        return [x / sum(e) for x in e]

    def kl(p, q):
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)

    kept = [i for i in range(len(base)) if all(z[i] > -math.inf for z in (base, small, *experts))]
    big, s, *e = ([z[i] for i in kept] for z in (base, small, *experts))
    p, q, qs = softmax(big), softmax(s), [softmax(z) for z in e]
    costs = []
    for point in points:
        moved = softmax([x + sum(a * (z[i] - s[i]) for a, z in zip(point, e)) for i, x in enumerate(big)])
        costs.append(
            sum((kl(moved, p) - kl(each, q)) ** 2 + (kl(p, moved) - kl(q, each)) ** 2 for each in qs)
        )
    return costs


def one_hot_points(grids):
    """Zero, then one weight at a time, near ones first, then earlier experts."""
    single = [(a, t) for t, grid in enumerate(grids) for a in grid if a]
    points = [tuple(a if i == t else 0.0 for i in range(len(grids))) for a, t in sorted(single)]
    return [(0.0,) * len(grids), *points]


def logits(count, rows=8, vocab=40, seed=0, dtype=torch.float64):
    """Rows that differ in sharpness, and experts that differ from the small model by more or less."""
    g = generator(seed)
    base, small = (torch.randn(rows, vocab, generator=g, dtype=dtype) * 2 for _ in range(2))
    spread = torch.rand(rows, 1, generator=g, dtype=dtype) * 2
    return (
        base,
        small,
        [small + spread * torch.randn(rows, vocab, generator=g, dtype=dtype) for _ in range(count)],
    )


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_search_is_the_slow_loop(experts, masked):
    base, small, tuned = logits(experts, seed=experts)
    if masked:
        base[:, 3], small[1, 4], tuned[0][2, 5:9] = -math.inf, -math.inf, -math.inf
        tuned[-1][:, 30] = small[:, 30] = -math.inf
    points = one_hot_points([GRID] * experts)
    ours = fuse_logits(base, small, tuned)
    chosen = set()
    for b in range(len(base)):
        costs = slow_search(base[b].tolist(), small[b].tolist(), [z[b].tolist() for z in tuned], points)
        at = costs.index(min(costs))
        assert ours.alpha[b].tolist() == pytest.approx(points[at])
        assert float(ours.cost[b]) == pytest.approx(costs[at], rel=1e-9, abs=1e-12)
        expected = [
            x
            if any(z[b, i] == -math.inf for z in (base, small, *tuned))
            else x + sum(a * float(z[b, i] - small[b, i]) for a, z in zip(points[at], tuned))
            for i, x in enumerate(base[b].tolist())
        ]
        torch.testing.assert_close(ours.scores[b], torch.tensor(expected, dtype=torch.float64))
        chosen.add(points[at])
    assert len(chosen) > 3  # the rows do differ


def test_float32_finds_the_same_weights():
    base, small, tuned = logits(2, rows=40, vocab=300, dtype=torch.float32)
    ours = fuse_logits(base, small, tuned)
    exact = fuse_logits(base.double(), small.double(), [z.double() for z in tuned])
    assert ours.scores.dtype == torch.float32
    torch.testing.assert_close(ours.cost.double(), exact.cost, rtol=1e-3, atol=1e-4)
    assert (ours.alpha == exact.alpha.float()).float().mean() > 0.95
    half = fuse_logits(base.bfloat16(), small.bfloat16(), [z.bfloat16() for z in tuned])
    wide = fuse_logits(
        base.bfloat16().float(), small.bfloat16().float(), [z.bfloat16().float() for z in tuned]
    )
    assert half.scores.dtype == torch.float32
    assert torch.equal(half.scores, wide.scores)


def test_all_combinations():
    """The product of two grids, against the slow loop over all 121 points."""
    base, small, tuned = logits(2, rows=4, vocab=12, seed=3)
    ours = fuse_logits(base, small, tuned, alpha_range=(0.0, 1.0), one_expert_per_step=False)
    grid = [k / 10 for k in range(11)]
    points = list(itertools.product(grid, grid))
    single = fuse_logits(base, small, tuned, alpha_range=(0.0, 1.0))
    both = False
    for b in range(4):
        costs = slow_search(base[b].tolist(), small[b].tolist(), [z[b].tolist() for z in tuned], points)
        assert ours.alpha[b].tolist() == pytest.approx(points[costs.index(min(costs))])
        both |= bool((ours.alpha[b] > 0).all())
    assert both
    assert (ours.cost <= single.cost + 1e-12).all()


def test_divergences_without_writing_the_distribution_out():
    base, _, tuned = logits(2, rows=3, vocab=30)
    log_p = base.log_softmax(-1)
    offsets = torch.stack(tuned, 1)
    points = torch.tensor([[0.3, 0.0], [0.0, 1.7], [0.5, 0.9]], dtype=torch.float64)
    forward, reverse, means = moved_divergences(log_p, offsets, points)
    for b, c in itertools.product(range(3), range(3)):
        moved = (log_p[b] + points[c] @ offsets[b]).log_softmax(-1)
        p, m = log_p[b].exp(), moved.exp()
        assert float(forward[b, c]) == pytest.approx(float((p * (log_p[b] - moved)).sum()))
        assert float(reverse[b, c]) == pytest.approx(float((m * (moved - log_p[b])).sum()))
        torch.testing.assert_close(means[b, c], offsets[b] @ m)


def test_an_expert_that_learnt_nothing_has_no_weight():
    """Q_t = Q: alpha 0 and the large model's own scores, also where logits differ by a constant."""
    base, small, tuned = logits(1, dtype=torch.float32)
    for same in (small, small + 3.0, small - 117.3):
        ours = fuse_logits(base, small, [same, same])
        assert not ours.alpha.any()
        assert not ours.cost.any()
        assert torch.equal(ours.scores, base)
    mixed = fuse_logits(base, small, [small + 3.0, tuned[0]])
    assert not mixed.alpha[:, 0].any()
    assert mixed.alpha[:, 1].any()


@pytest.mark.parametrize("refine", [False, True])
def test_where_both_models_are_one_the_expert_answers(refine):
    """T = 1 and P = Q: alpha 1, J 0, and P~ is the expert's distribution."""
    _, small, tuned = logits(1, rows=12)
    ours = fuse_logits(small + 5.0, small, tuned, refine=refine)
    torch.testing.assert_close(ours.alpha, torch.ones_like(ours.alpha))
    assert ours.cost.max() < 1e-20
    torch.testing.assert_close(ours.scores.softmax(-1), tuned[0].softmax(-1))


def test_rows_and_the_order_of_experts_do_not_matter():
    base, small, tuned = logits(3, rows=10, dtype=torch.float32)
    whole = fuse_logits(base, small, tuned)
    for b in range(10):
        row = fuse_logits(base[b : b + 1], small[b : b + 1], [z[b : b + 1] for z in tuned])
        assert torch.equal(row.alpha[0], whole.alpha[b])
        torch.testing.assert_close(row.scores[0], whole.scores[b])
    for order in itertools.permutations(range(3)):
        turned = fuse_logits(base, small, [tuned[t] for t in order])
        assert torch.equal(turned.alpha, whole.alpha[:, list(order)])
        assert torch.equal(turned.cost, whole.cost)
        torch.testing.assert_close(turned.scores, whole.scores)
    twice = fuse_logits(base, small, [tuned[0], tuned[0]])  # equal experts: the first one is taken
    assert twice.alpha[:, 0].any()
    assert not twice.alpha[:, 1].any()


def test_constants_do_not_matter():
    base, small, tuned = logits(2, rows=6)
    ours = fuse_logits(base, small, tuned)
    moved = fuse_logits(base + 4.0, small - 9.0, [tuned[0] + 1.0, tuned[1] - 30.0])
    torch.testing.assert_close(moved.alpha, ours.alpha)
    torch.testing.assert_close(moved.scores.softmax(-1), ours.scores.softmax(-1))


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return out


def test_the_grid_is_cut_into_chunks():
    base, small, tuned = logits(2, rows=3, vocab=500, dtype=torch.float32)
    one = base.numel() * 4
    sizes, found = [], []
    for limit in (5 * one, 10**9):
        with Largest() as largest:
            found.append(fuse_logits(base, small, tuned, chunk_bytes=limit))
        sizes.append(largest.bytes)
    assert sizes == [5 * one, 40 * one]
    assert torch.equal(found[0].alpha, found[1].alpha)
    assert torch.equal(found[0].scores, fuse_logits(base, small, tuned, chunk_bytes=1).scores)


def test_refining_reaches_the_minimum():
    """As good as a grid a thousand times as fine, in its range, and never worse than the coarse grid."""
    base, small, tuned = logits(1, rows=10, vocab=30, seed=2)
    coarse, ours = (fuse_logits(base, small, tuned, refine=r) for r in (False, True))
    fine = fuse_logits(base, small, tuned, step=1e-4)
    assert (ours.cost <= coarse.cost).all()
    assert (ours.cost < coarse.cost).any()
    assert (ours.cost <= fine.cost + 1e-8).all()
    torch.testing.assert_close(ours.alpha, fine.alpha, rtol=0, atol=2e-4)
    narrow = fuse_logits(base, small, tuned, refine=True, alpha_range=(0.0, 0.55))
    assert narrow.alpha.max() <= 0.55
    assert narrow.alpha.max() > 0.5  # beyond the last multiple of the step


def test_grids():
    assert alpha_grids((0.0, 2.0), 0.1, 2) == [pytest.approx(GRID)] * 2
    assert alpha_grids([(0.0, 0.55), (-0.2, 0.1)], 0.1, 2) == [
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
        [-0.2, -0.1, 0.0, 0.1],
    ]
    assert alpha_grids((0, 0), 0.1, 1) == [[0.0]]
    base, small, tuned = logits(2)
    narrowed = fuse_logits(base, small, tuned, alpha_range=[(0.0, 0.0), (0.0, 0.3)])
    assert not narrowed.alpha[:, 0].any()
    assert narrowed.alpha[:, 1].max() <= 0.3
    around = fuse_logits(
        base, small, tuned, alpha_range=(-2.0, 0.1)
    )  # below 0 an expert's effect is reversed
    grid = sorted((k / 10 for k in range(-20, 2)), key=abs)
    points = [(0.0, 0.0), *((a, 0.0) if t == 0 else (0.0, a) for a in grid if a for t in (0, 1))]
    for b in range(len(base)):
        costs = slow_search(base[b].tolist(), small[b].tolist(), [z[b].tolist() for z in tuned], points)
        assert around.alpha[b].tolist() == pytest.approx(points[costs.index(min(costs))])
    assert around.alpha.min() < -0.3


def test_vocabularies_are_cropped_or_refused():
    base, small, tuned = logits(1)
    wider = torch.nn.functional.pad(tuned[0], (0, 7), value=50.0)
    padded = torch.nn.functional.pad(small, (0, 2), value=-math.inf)
    assert torch.equal(fuse_logits(base, padded, [wider]).scores, fuse_logits(base, small, tuned).scores)
    with pytest.raises(IncompatibleModels, match=r"experts\[0\] = \(8, 39\) scores fewer than the 40"):
        fuse_logits(base, small, [tuned[0][:, :-1]])
    with pytest.raises(IncompatibleModels, match="small"):
        fuse_logits(base, small[:, :-1], tuned)


def test_bad_settings_are_refused_before_decoding(tiny_lm, tiny_tokenizer, monkeypatch):
    model = tiny_lm("llama", layers=1)
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model ran"))
    two = [model, model]
    wrong = [
        ([], {}, "experts = [] is empty"),
        (two, {"step": 0.0}, "step = 0.0"),
        (two, {"step": -0.1}, "step = -0.1"),
        (two, {"step": math.nan}, "step = nan"),
        (two, {"alpha_range": (0.1, 2.0)}, "alpha_range = (0.1, 2.0) does not hold 0"),
        (two, {"alpha_range": (-1.0, -0.5)}, "alpha_range"),
        (two, {"alpha_range": (0.0, math.inf)}, "alpha_range"),
        (two, {"alpha_range": [(0.0, 1.0)] * 3}, "alpha_range"),
        (two, {"refine": True}, "refine = True does not work with 2 experts"),
        (two, {"prompt": "Q:"}, "prompt = 'Q:' lacks {query}"),
        (two, {"expert_template": "Q:"}, "expert_template = 'Q:' lacks {query}"),
        (two, {"expert_template": "chat"}, "chat = True needs a chat template"),
    ]
    for experts, settings, message in wrong:
        method = DynamicLogitsFusion(model, tiny_tokenizer, model, experts, **settings)
        for call in (lambda m=method: m.generate("q"), lambda m=method: m.follow("q", "a")):
            with pytest.raises(BadInput) as caught:
                call()
            assert str(caught.value).startswith(message)
    method = DynamicLogitsFusion(model, tiny_tokenizer, model, two)
    with pytest.raises(BadInput, match=r"queries.*empty"):
        method.generate([])
    with pytest.raises(BadInput, match="512 positions"):
        method.generate("the mayor of Port Ellery " * 100, max_new_tokens=4)
    with pytest.raises(NotApplicable):
        method.generate("a", num_return_sequences=2)
    with pytest.raises(BadInput, match="base"):
        fuse_logits(torch.zeros(4), torch.zeros(4), [torch.zeros(4)])
    with pytest.raises(BadInput, match="small"):
        fuse_logits(torch.zeros(2, 4), torch.zeros(3, 4), [torch.zeros(2, 4)])


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def fused(request, tiny_lm, tiny_tokenizer):
    model = tiny_lm(request.param, layers=2)
    return make(model, tiny_tokenizer)[0]


@torch.no_grad()
def test_answers_are_the_slow_loop(fused):
    """Full forwards for each token, one row at a time; every note of every step."""
    answers = fused.generate(QUERIES, max_new_tokens=8, details=True)
    used = set()
    for query, found in zip(QUERIES, answers):
        ids = fused.tokenizer(query)["input_ids"]
        delta, alpha, expert, cost = found.trace
        for t, token in enumerate(found.tokens.tolist()):
            models = (fused.model, fused.small, *fused.experts)
            z = [m(torch.tensor([ids])).logits[:, -1].double() for m in models]
            step = fuse_logits(z[0], z[1], z[2:])
            assert token == step.scores.argmax()
            torch.testing.assert_close(alpha[t], step.alpha[0].float())
            torch.testing.assert_close(cost[t], step.cost[0].float(), rtol=1e-3, atol=1e-4)
            gained = step.scores.softmax(-1)[0, token] - z[0].softmax(-1)[0, token]
            assert float(delta[t]) == pytest.approx(float(gained), abs=1e-4)
            assert expert[t] == (int(alpha[t].argmax()) if alpha[t].any() else -1)
            used.add(int(expert[t]))
            ids = [*ids, token]
    assert {0, 1} <= used


def test_cache_batch_and_order_do_not_matter(fused):
    answers = fused.generate(QUERIES, max_new_tokens=8)
    assert fused.generate(QUERIES, max_new_tokens=8, use_cache=False) == answers
    assert fused.generate(QUERIES, max_new_tokens=8, batch_size=1) == answers
    assert fused.generate(QUERIES[0], max_new_tokens=8) == answers[0]
    fused.experts = fused.experts[::-1]
    assert fused.generate(QUERIES, max_new_tokens=8) == answers


def test_without_what_experts_learnt_the_large_model_answers(fused):
    plain = generate_texts(fused.model, fused.tokenizer, QUERIES, max_new_tokens=8)
    assert fused.neutral().generate(QUERIES, max_new_tokens=8) == plain
    assert fused.generate(QUERIES, max_new_tokens=8) != plain
    fused.experts = [fused.small, fused.small]
    assert fused.generate(QUERIES, max_new_tokens=8) == plain


def test_one_expert_of_the_large_model_itself_answers_alone(fused):
    """P = Q in all steps: the fusion is the expert."""
    expert = fused.experts[0]
    fused.small, fused.experts = fused.model, [expert]
    answers = fused.generate(QUERIES, max_new_tokens=8)
    assert answers == generate_texts(expert, fused.tokenizer, QUERIES, max_new_tokens=8)


def test_following_scores_given_tokens(fused):
    targets = [" Quenby", " Ines Varro", " Oskar"]
    for query, target, found in zip(QUERIES, targets, fused.follow(QUERIES, targets)):
        ids, wanted = encode_pair(fused.tokenizer, query, target)
        assert found.logprobs.shape == found.predictions.shape == (len(wanted),)
        for t, token in enumerate(wanted):
            with torch.no_grad():
                models = (fused.model, fused.small, *fused.experts)
                z = [m(torch.tensor([ids + wanted[:t]])).logits[:, -1] for m in models]
            scores = fuse_logits(z[0], z[1], z[2:]).scores[0]
            assert float(found.logprobs[t]) == pytest.approx(float(scores.log_softmax(-1)[token]), abs=1e-3)
            assert found.predictions[t] == scores.argmax()


def test_examples_in_the_large_models_prompt_alone(fused):
    """In-context examples beside experts: the small models read the question without them."""
    fused.prompt, fused.expert_template = "Paris is in France. {query}", "{query}"
    found = fused.generate(QUERIES[:1], max_new_tokens=1, details="logits")[0]
    texts = [fused.prompt.replace("{query}", QUERIES[0]), *QUERIES[:1] * 3]
    for z, model, text in zip(found.trace[4:], (fused.model, fused.small, *fused.experts), texts):
        with torch.no_grad():
            alone = model(torch.tensor([fused.tokenizer(text)["input_ids"]])).logits[0, -1]
        torch.testing.assert_close(z[0], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        fuse_logits(*(z[:1] for z in found.trace[4:6]), [z[:1] for z in found.trace[6:]]).scores.argmax(-1),
        found.tokens,
    )


def test_smollm_with_experts_that_learnt_nothing(smollm):
    """In float32 (bf16 rounds batches differently): token for token what the model itself generates."""
    model, tokenizer = smollm
    model.float()
    query = "The capital of Spain is"
    method = DynamicLogitsFusion(model, tokenizer, model, [model])
    found = method.generate([query], max_new_tokens=5, details=True)[0]
    assert found.text == generate_texts(model, tokenizer, [query], max_new_tokens=5)[0]
    assert not found.trace[1].any()
