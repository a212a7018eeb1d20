"""FusionX: loss and gradients against loops in float64, alignment against slow definitions, stores, training."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import SENTENCES, make_tiny
from torch import nn
from transformers import TrainingArguments

from transfuse.core.batches import pad_collator
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.fused import Head
from transfuse.core.models import fingerprint
from transfuse.core.models import load as load_model
from transfuse.core.training import generator, seeded
from transfuse.merge._fusion_align import edit_distances, same_vocabulary, warp
from transfuse.merge._fusion_store import Reading
from transfuse.merge.fusion_x import (
    Distributions,
    FusionTrainer,
    FusionX,
    MultiTeacherFusion,
    SelectionGate,
    SourceStore,
    VocabularyMap,
    align_distributions,
    cv_squared,
    gathered,
)

IDENTITY = False
ALIKE = False
SETTINGS = {"max_steps": 3, "batch_size": 2, "accumulation": 2, "block": 24, "lr": 1e-3, "top_k": 16}


def make(base, experts, tokenizer, *, seed=0):
    fusion = FusionX(copy.deepcopy(base), sources=experts, seed=seed, **SETTINGS)
    made = fusion.fit(SENTENCES, tokenizer).eval()
    made.fusion_x = fusion
    return made


def save(made, folder, tokenizer):
    made.fusion_x.save_pretrained(folder, tokenizer)


def load(folder, base):
    base.load_state_dict(load_model(folder).model.state_dict())  # the base's own kind of attention
    return base


# --- the loss, by hand and by loops ------------------------------------------------------------------------

B, L, V, N = 3, 5, 7, 4


def case(seed=0):
    """Logits, labels with gaps, N dense sources and their cross-entropies, in float64."""
    g = generator(seed)
    logits = 2 * torch.randn(B, L, V, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (B, L), generator=g)
    labels[0, :2], labels[2, 3:] = -100, -100
    sources = [
        torch.softmax(2 * torch.randn(B, L, V, generator=g, dtype=torch.float64), -1) for _ in range(N)
    ]
    ce = 2 * torch.rand(B, N, generator=g, dtype=torch.float64)
    return logits, labels, sources, ce


def fusion_of(seed=0, **options):
    """A loss whose gate is far from its start, in float64."""
    with seeded(seed):
        made = MultiTeacherFusion(N, **options).double()
    if made.gate is not None:
        with torch.no_grad():
            made.gate.third.weight.mul_(100)
            made.gate.third.bias.add_(torch.tensor([0.6, 0.0, -0.9, 0.2]))
    return made


def gate_by_loops(gate, reward):
    """g of one sequence, number by number."""

    def layer(linear, x):
        rows, bias = linear.weight.tolist(), linear.bias.tolist()
        return [
            sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(rows, bias, strict=True)
        ]

    def gelu(x):
        return [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]

    z = layer(gate.third, gelu(layer(gate.second, gelu(layer(gate.first, reward)))))
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def by_loops(made, logits, labels, sources, ce, *, kept=None):
    """The whole loss with Python's numbers; `kept` fixes the selection."""
    weights = []
    for b in range(B):
        r = [math.exp(-float(v)) for v in ce[b]]
        if made.mode == "gate":
            g = gate_by_loops(made.gate, r)
            chosen = [v > made.threshold for v in g] if kept is None else kept[b]
            if not any(chosen):
                chosen = [v == max(g) for v in g]
            w = [v if c else 0.0 for v, c in zip(g, chosen, strict=True)]
            weights.append([v / (sum(w) + 1e-8) for v in w])
        elif made.mode == "mean":
            weights.append([1 / N] * N)
        elif made.mode == "mince":
            weights.append([float(v == max(r)) for v in r])
        else:
            weights.append([math.exp(v) / sum(math.exp(u) for u in r) for v in r])
    lm = fusion = count = 0.0
    for b, t in itertools.product(range(B), range(L - 1)):
        label = int(labels[b, t + 1])
        if label == -100:
            continue
        z = logits[b, t].tolist()
        log_p = [v - math.log(sum(math.exp(u) for u in z)) for v in z]
        fused = [sum(weights[b][i] * float(sources[i][b, t, v]) for i in range(N)) for v in range(V)]
        lm -= log_p[label]
        fusion -= sum(q * p for q, p in zip(fused, log_p, strict=True))
        if made.loss == "kl":
            fusion += sum(q * math.log(q) for q in fused)
        count += 1
    importance = [sum(w[i] for w in weights) for i in range(N)]
    mean = sum(importance) / N
    variance = sum((v - mean) ** 2 for v in importance) / (N - 1)
    feedback = variance / (mean**2 + 1e-10) if made.mode == "gate" else 0.0
    loss = (
        made.lm_weight * lm / count + (1 - made.lm_weight) * fusion / count + made.feedback_weight * feedback
    )
    return {
        "loss": loss,
        "lm": lm / count,
        "fusion": fusion / count,
        "feedback": feedback,
        "weights": weights,
    }


@pytest.mark.filterwarnings("ignore:threshold")
@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("mode", ["gate", "mince", "mean", "reward-softmax"])
@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.9])
def test_the_loss_by_loops(mode, loss, threshold):
    logits, labels, sources, ce = case()
    made = fusion_of(threshold=threshold, feedback_weight=0.7, lm_weight=0.6, loss=loss, mode=mode)
    found = made(logits, labels, sources, ce)
    wanted = by_loops(made, logits, labels, sources, ce)
    for name in ("loss", "lm", "fusion", "feedback"):
        value = float(getattr(found, name).detach())
        assert value == pytest.approx(wanted[name], rel=1e-9, abs=1e-12), name
    assert torch.allclose(found.weights, torch.tensor(wanted["weights"], dtype=torch.float64), atol=1e-12)
    if mode == "gate":
        heard = found.selected.sum(-1).tolist()
        assert heard == ([N] * B if threshold == 0 else [1] * B if threshold == 0.9 else heard)
        assert threshold != 0.15 or any(1 < n < N for n in heard)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_gradients_by_finite_differences(loss):
    logits, labels, sources, ce = case(3)
    made = fusion_of(3, threshold=0.2, lm_weight=0.3, loss=loss)
    logits.requires_grad_(True)
    found = made(logits, labels, sources, ce)
    assert 0 < int(found.selected.sum()) < B * N
    inputs = [logits, *made.gate.parameters()]
    gradients = torch.autograd.grad(found.loss, inputs)
    kept, step = found.selected.tolist(), 1e-5  # the mask is fixed: no gradient passes it
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert float(gradient.abs().max()) > 1e-4
        for place in range(0, tensor.numel(), max(1, tensor.numel() // 9)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.view(-1)[place] += sign * step
                    values.append(by_loops(made, logits.detach(), labels, sources, ce, kept=kept)["loss"])
                    tensor.view(-1)[place] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert float(gradient.view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_the_gate_hears_fusion_and_feedback_alone():
    logits, labels, sources, ce = case()
    for options, silent in (({"feedback_weight": 0.0, "lm_weight": 1.0}, True), ({"lm_weight": 1.0}, False)):
        made = fusion_of(**options)
        loss = made(logits, labels, sources, ce).loss
        gradients = torch.autograd.grad(loss, list(made.gate.parameters()))
        assert all(float(g.abs().max()) == 0 for g in gradients) == silent


def test_the_feedback_by_hand():
    assert float(cv_squared(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx((1 / 3) / (4 / 3) ** 2)
    assert float(cv_squared(torch.tensor([3.0, 3.0]))) == 0.0
    assert float(cv_squared(torch.tensor([5.0]))) == 0.0


def test_one_source():
    logits, labels, sources, ce = case()
    made = MultiTeacherFusion(1).double()
    found = made(logits.requires_grad_(True), labels, sources[:1], ce[:, :1])
    assert float(found.feedback.detach()) == 0.0 and torch.allclose(
        found.weights, torch.ones(B, 1, dtype=torch.float64)
    )
    assert torch.autograd.grad(found.loss, logits)[0].isfinite().all()
    mean = MultiTeacherFusion(1, mode="mean").double()(logits, labels, sources[:1], ce[:, :1])
    assert float(found.fusion.detach()) == pytest.approx(float(mean.fusion.detach()), rel=1e-7)


def test_it_starts_near_equal_weights():
    with seeded(1):
        gate = SelectionGate(5)
    found = gate(torch.exp(-torch.rand(6, 5, generator=generator(0))))
    assert torch.allclose(found, torch.full((6, 5), 0.2), atol=0.01) and found.dtype == torch.float32
    assert [tuple(p.weight.shape) for p in (gate.first, gate.second, gate.third)] == [
        (10, 5),
        (5, 10),
        (5, 5),
    ]


def test_a_threshold_that_leaves_one_source_is_told():
    """From equal scores each text then hears one source with weight 1, and no gradient reaches the gate."""
    logits, labels, sources, ce = case()
    with pytest.warns(UserWarning, match="nothing to learn from"):
        made = MultiTeacherFusion(N, threshold=0.3).double()
    found = made(logits, labels, sources, ce)
    assert found.selected.sum(-1).tolist() == [1] * B
    gradients = torch.autograd.grad(found.loss, list(made.gate.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-6
    lower = MultiTeacherFusion(N, threshold=0.75 / N).double()(logits, labels, sources, ce)
    assert lower.selected.all()


def test_a_random_gate_is_new_every_time_and_learns_nothing():
    logits, labels, sources, ce = case()
    made = MultiTeacherFusion(N, mode="random-gate", threshold=0.0)
    assert not list(made.parameters())
    with seeded(0):
        first, second = (made(logits.requires_grad_(True), labels, sources, ce) for _ in range(2))
    with seeded(0):
        again = made(logits, labels, sources, ce)
    assert not torch.equal(first.weights, second.weights) and torch.equal(first.weights, again.weights)
    assert not first.weights.requires_grad and float(first.feedback) > 0
    assert float(torch.autograd.grad(first.loss, logits)[0].abs().max()) > 0


def test_a_classifier():
    """Logits `[B, C]` with one class each: what a language model of one position gives."""
    logits, labels, sources, ce = case()
    made = fusion_of()
    found = made(logits[:, 0], labels[:, -2].clamp_min(0), [each[:, 0] for each in sources], ce)
    padded = torch.stack([torch.zeros(B, dtype=torch.int64), labels[:, -2].clamp_min(0)], 1)
    again = made(logits[:, :2], padded, [each[:, :2] for each in sources], ce)
    assert float(found.loss.detach()) == pytest.approx(float(again.loss.detach()), rel=1e-12)


def test_batches_and_padding_do_not_matter():
    """With the count of tokens given, language modelling and fusion of parts add up to those of the whole."""
    logits, labels, sources, ce = case(5)
    made = fusion_of()
    items = int((labels[:, 1:] != -100).sum())
    whole = made(logits, labels, sources, ce)
    parts = [
        made(logits[rows], labels[rows], [each[rows] for each in sources], ce[rows], items=items)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    for name in ("lm", "fusion"):
        total = sum(float(getattr(part, name).detach()) for part in parts)
        assert total == pytest.approx(float(getattr(whole, name).detach()), rel=1e-10)

    def pad(x, fill, side):
        extra = x.new_full((B, 3, *x.shape[2:]), fill)
        return torch.cat([x, extra] if side == "right" else [extra, x], 1)

    first = labels[:, 0].clone()
    for side in ("right", "left"):
        marked = labels.clone()
        marked[:, 0] = first if side == "right" else -100  # nothing but padding comes before it
        found = made(
            pad(logits, math.nan, side),
            pad(marked, -100, side),
            [pad(e, math.nan, side) for e in sources],
            ce,
        )
        assert float(found.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-10)
    assert float(made(logits, torch.full_like(labels, -100), sources, ce).lm.detach()) == 0.0


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("rest", ["spread", "renormalise"])
def test_the_largest_and_the_rest(rest, loss):
    """Stored entries give what the distributions written out give, ids that sources share included."""
    logits, labels, sources, ce = case(2)
    ids, probs, written = [], [], []
    for n, each in enumerate(sources):
        top = each.topk(2 + n % 2, -1)
        values = top.values
        left = (1 - values.sum(-1, keepdim=True)) / (V - values.shape[-1])
        if rest == "renormalise":
            values, left = values / values.sum(-1, keepdim=True), torch.zeros_like(left)
        written.append(left.expand(B, L, V).scatter(-1, top.indices, values))
        pad = 3 - top.values.shape[-1]
        ids.append(nn.functional.pad(top.indices, (0, pad)))
        probs.append(nn.functional.pad(top.values, (0, pad)))
    stored = Distributions.top_k(torch.stack(ids, -2), torch.stack(probs, -2), V, rest)
    made = fusion_of(loss=loss, lm_weight=0.2)
    logits.requires_grad_(True)
    inputs = [logits, *made.gate.parameters()]
    found = []
    for given in (stored, written):
        out = made(logits, labels, given, ce)
        found.append([out.loss.detach(), *torch.autograd.grad(out.loss, inputs)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_states_and_a_head_give_what_logits_give():
    g = generator(4)
    _, labels, sources, ce = case(4)
    states = torch.randn(B, L, 6, generator=g, dtype=torch.float64).requires_grad_(True)
    weight = torch.randn(V, 6, generator=g, dtype=torch.float64).requires_grad_(True)
    made = fusion_of()
    inputs = [states, weight, *made.gate.parameters()]
    found = []
    for given, head in ((states, Head(weight)), (states @ weight.T, None)):
        loss = made(given, labels, sources, ce, head=head).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs, retain_graph=True)])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True))


def test_few_logits_at_a_time(monkeypatch):
    import transfuse.merge._fusion as module

    logits, labels, sources, ce = case(6)
    made = fusion_of()
    logits.requires_grad_(True)
    found = []
    for least, size in ((16, 64 * 2**20), (3, 1)):
        monkeypatch.setattr(module, "_LEAST_ROWS", least)
        monkeypatch.setattr(module, "_CHUNK_BYTES", size)
        loss = made(logits, labels, sources, ce).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, [logits, *made.gate.parameters()])))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


def test_impossible_tokens_cost_nothing_where_no_source_names_them():
    logits, labels, sources, ce = case()
    labels = labels.clamp(max=V - 2)
    sources = [each[..., :-1] / each[..., :-1].sum(-1, keepdim=True) for each in sources]
    sources = [nn.functional.pad(each, (0, 1)) for each in sources]
    logits[..., -1] = -math.inf
    logits.requires_grad_(True)
    found = fusion_of(loss="kl")(logits, labels, sources, ce)
    assert found.loss.isfinite() and torch.autograd.grad(found.loss, logits)[0].isfinite().all()


def test_importance_over_the_update():
    """Micro-batches told of the whole update have its feedback; by themselves they have another."""
    logits, labels, sources, ce = case()
    whole = fusion_of()(logits, labels, sources, ce)
    made = fusion_of(importance="update")
    for b in range(B):
        rows = slice(b, b + 1)
        given = (logits[rows], labels[rows], [each[rows] for each in sources], ce[rows])
        told, alone = made(*given, update_ce=ce), made(*given)
        assert float(told.feedback.detach()) == pytest.approx(float(whole.feedback.detach()), rel=1e-12)
        assert float(alone.feedback.detach()) != pytest.approx(float(whole.feedback.detach()), rel=1e-3)


def test_importance_as_a_running_mean():
    logits, labels, sources, ce = case()
    made = fusion_of(importance="ema", ema_decay=0.75).train()
    plain = made.weigh(ce)[0].detach().mean(0)
    assert float(made(logits, labels, sources, ce).feedback.detach()) == pytest.approx(
        float(cv_squared(plain))
    )
    other = made.weigh(ce.flip(0, 1))[0].detach().mean(0)
    found = made(logits, labels, sources, ce.flip(0, 1)).feedback
    running = 0.75 * 0.25 * plain + 0.25 * other
    assert float(found.detach()) == pytest.approx(float(cv_squared(running)), rel=1e-9)
    assert torch.allclose(made.running, running) and "running" in made.state_dict()
    made.eval()(logits, labels, sources, ce)
    assert torch.allclose(made.running, running)
    assert "running" not in MultiTeacherFusion(2).state_dict()


def test_half_precision():
    logits, labels, sources, ce = case()
    half = logits.to(torch.bfloat16).requires_grad_(True)
    made = MultiTeacherFusion(N)
    found = made(half, labels, [each.float() for each in sources], ce.float())
    wanted = made(half.detach().float(), labels, [each.float() for each in sources], ce.float())
    assert found.loss.dtype == torch.float32 and torch.equal(found.loss, wanted.loss)
    assert made.weigh(ce.float())[0].dtype == torch.float32


def test_what_the_loss_refuses():
    logits, labels, sources, ce = case()
    made = MultiTeacherFusion(N)
    with pytest.raises(BadInput, match=f"sources = {N - 1} are not the {N}"):
        made(logits, labels, sources[1:], ce)
    with pytest.raises(BadInput, match="ce ="):
        made(logits, labels, sources, ce[:, 1:])
    broken = ce.clone()
    broken[1, 2] = math.nan
    with pytest.raises(BadInput, match="no cross-entropy"):
        made(logits, labels, sources, broken)
    for factor, fine in ((1.0005, True), (1.002, False), (math.nan, False)):
        given = [sources[0] * factor, *sources[1:]]
        if fine:
            made(logits, labels, given, ce)
        else:
            with pytest.raises(BadInput, match="sum of a distribution"):
                made(logits, labels, given, ce)
    with pytest.raises(IncompatibleModels, match="the target has 7"):
        made(logits, labels, [each[..., :-1] for each in sources], ce)
    beyond = Distributions(
        torch.full((B, L, N, 1), V), torch.ones(B, L, N, 1), torch.zeros(B, L, N)
    )  # an id that the target does not have
    with pytest.raises(IncompatibleModels, match="beyond the target's vocabulary"):
        made(logits, labels, beyond, ce)
    with pytest.raises(BadInput, match="sum of probabilities"):
        Distributions.top_k(torch.zeros(1, 2, 1, dtype=torch.int64), torch.full((1, 2, 1), 1.1), V)
    with pytest.raises(BadInput, match="rest"):
        Distributions.top_k(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1), V, "drop")
    for options in (
        {"threshold": 1.0}, {"threshold": -0.1}, {"lm_weight": 1.1}, {"feedback_weight": -1.0}, {"loss": "mse"},
        {"mode": "best"}, {"importance": "all"}, {"ema_decay": 1.0},
    ):  # fmt: skip
        with pytest.raises(BadInput, match=next(iter(options))):
            MultiTeacherFusion(2, **options)
    for build in (MultiTeacherFusion, SelectionGate):
        with pytest.raises(BadInput, match="n_sources"):
            build(0)


# --- alignment ---------------------------------------------------------------------------------------------


def levenshtein(a, b):
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a):
        rows.append([i + 1])
        for j, y in enumerate(b):
            rows[-1].append(min(rows[-1][j] + 1, rows[-2][j + 1] + 1, rows[-2][j] + (x != y)))
    return rows[-1][-1]


def test_edit_distances():
    words = [b"", b"a", b"kitten", b"sitting", b" the", b"\xc3\xa9t\xc3\xa9", b"aaaa", b"baaa"]
    width = max(map(len, words))
    table = np.stack([np.frombuffer(w.ljust(width, b"a"), dtype=np.uint8) for w in words]).astype(np.int16)
    lengths = np.array([len(w) for w in words])
    for word in words:
        assert edit_distances(word, table, lengths).tolist() == [levenshtein(word, other) for other in words]
    assert levenshtein(b"kitten", b"sitting") == 3


def slow_warp(cost):
    """All by its recurrence, the steps back taken one at a time."""
    m, n = len(cost), len(cost[0])
    total = {(i, j): math.inf for i in range(-1, m) for j in range(-1, n)}
    for i, j in itertools.product(range(m), range(n)):
        best = min(total[i - 1, j], total[i, j - 1], total[i - 1, j - 1])
        total[i, j] = cost[i][j] + (0 if (i, j) == (0, 0) else best)
    i, j, path = m - 1, n - 1, [(m - 1, n - 1)]
    while (i, j) != (0, 0):
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda place: total[place])
        path.append((i, j))
    return path[::-1]


def test_warping():
    random = np.random.default_rng(0)
    for shape in ((1, 1), (1, 4), (5, 1), (4, 6), (7, 5)):
        for _ in range(5):
            cost = random.integers(0, 4, shape).astype(float)
            assert warp(cost) == slow_warp(cost.tolist())


@pytest.fixture(scope="module")
def other_tokenizer():
    """A byte-level tokenizer with other numbers than `tiny_tokenizer`, whose tokens may reach over spaces."""
    return byte_level(320, ["</end>", "<begin>"], "</end>", "<begin>")


def byte_level(size, special, eos, bos):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=eos)


def strings_of(tokenizer):
    """What each id stands for in a byte-level tokenizer, by decoding it alone."""
    raw = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    from transfuse.core.tokens import _byte_characters

    back = {char: byte for byte, char in _byte_characters().items()}
    special = set(tokenizer.all_special_ids)
    return [None if i in special else bytes(back[char] for char in piece) for i, piece in enumerate(raw)]


def test_the_vocabulary_map_by_brute_force(tiny_tokenizer, other_tokenizer):
    for source, target in ((tiny_tokenizer, other_tokenizer), (other_tokenizer, tiny_tokenizer)):
        theirs, ours = strings_of(source), strings_of(target)
        found = VocabularyMap(source, target)(np.arange(len(source)))
        exact = VocabularyMap(source, target, nearest=False)(np.arange(len(source)))
        for number, word in enumerate(theirs):
            if word is None:
                continue
            distances = [(levenshtein(word, other), i) for i, other in enumerate(ours) if other is not None]
            assert found[number] == min(distances)[1], word
            assert exact[number] == (min(distances)[1] if min(distances)[0] == 0 else -1)
        assert found[source.eos_token_id] == target.eos_token_id
        assert found[source.bos_token_id] == target.bos_token_id
    assert not same_vocabulary(tiny_tokenizer, other_tokenizer)
    assert VocabularyMap(tiny_tokenizer, other_tokenizer)(np.array([[5, 7]])).shape == (1, 2)


def rows_of(tokenizer, count, k=6, seed=0):
    """Made-up top k of `count` places."""
    g = generator(seed)
    log_p = torch.log_softmax(3 * torch.randn(count, len(tokenizer), generator=g), -1)
    top = log_p.topk(k, -1)
    return top.indices, top.values


TEXT = "The mayor of Port Ellery was born in Quenby, in 1687. A bridge: Oskar é"


def test_alignment_by_bytes(tiny_tokenizer, other_tokenizer):
    """A place has the source's row exactly where both tokenizations have a border, in the target's ids."""
    theirs, ours = (tok(TEXT)["input_ids"] for tok in (other_tokenizer, tiny_tokenizer))
    ids, values = rows_of(other_tokenizer, len(theirs))
    to_ours = VocabularyMap(other_tokenizer, tiny_tokenizer)
    said = align_distributions(other_tokenizer, tiny_tokenizer, (theirs, ours), (ids, values), to_ours)
    ends = [list(itertools.accumulate(len(strings_of(tok)[i]) for i in row))
            for tok, row in ((other_tokenizer, theirs), (tiny_tokenizer, ours))]  # fmt: skip
    assert 0 < int(said.aligned.sum()) < len(ours) and len(theirs) != len(ours)
    for t, end in enumerate(ends[1]):
        assert bool(said.aligned[t]) == (end in ends[0])
        got = {
            int(i): float(v.exp())
            for i, v in zip(said.ids[t], said.log_probs[t], strict=True)
            if v > -math.inf
        }
        if end not in ends[0]:
            assert got == {ours[min(t + 1, len(ours) - 1)]: 1.0}
            continue
        s, wanted = ends[0].index(end), {}
        for number, value in zip(ids[s].tolist(), values[s].tolist(), strict=True):
            own = int(to_ours(np.array([number]))[0])
            if own >= 0:
                wanted[own] = wanted.get(own, 0.0) + math.exp(value)
        assert got == pytest.approx(wanted, rel=1e-5)


def test_alignment_by_warping(tiny_tokenizer, other_tokenizer):
    """FuseLLM's rules, written out: one partner of the same or the mapped string, the likeliest of repeated ids."""
    theirs, ours = (tok(TEXT)["input_ids"] for tok in (other_tokenizer, tiny_tokenizer))
    ids, values = rows_of(other_tokenizer, len(theirs), k=80)
    source, target = strings_of(other_tokenizer), strings_of(tiny_tokenizer)
    words = [[strings[i] for i in row] for strings, row in ((source, theirs), (target, ours))]
    bare = [[w.replace(b" ", b"") for w in each] for each in words]
    path = slow_warp([[levenshtein(a, b) for b in bare[1]] for a in bare[0]])
    to_ours = VocabularyMap(other_tokenizer, tiny_tokenizer)
    table = to_ours(np.arange(len(other_tokenizer))).tolist()
    repeated = 0
    for fallback, shift in (("next", 1), ("current", 0)):
        said = align_distributions(
            other_tokenizer,
            tiny_tokenizer,
            (theirs, ours),
            (ids, values),
            table,
            alignment="edit",
            fallback=fallback,
        )
        for t in range(len(ours)):
            partners = [s for s, place in path if place == t]
            fits = len(partners) == 1 and (
                words[0][partners[0]] == words[1][t] or table[theirs[partners[0]]] == ours[t]
            )
            got = [
                (int(i), float(v))
                for i, v in zip(said.ids[t], said.log_probs[t], strict=True)
                if v > -math.inf
            ]
            assert bool(said.aligned[t]) == fits
            if not fits:
                assert got == [(ours[min(t + shift, len(ours) - 1)], 0.0)]
                continue
            wanted = {}
            for number, value in zip(ids[partners[0]].tolist(), values[partners[0]].tolist(), strict=True):
                repeated += table[number] in wanted
                if table[number] >= 0:
                    wanted.setdefault(table[number], value)
            assert list(dict(got)) == list(wanted) and dict(got) == pytest.approx(wanted)
        assert 0 < int(said.aligned.sum()) < len(ours)
    assert repeated > 0


def test_one_tokenizer_needs_no_alignment(tiny_tokenizer):
    ids = tiny_tokenizer(TEXT)["input_ids"]
    top = rows_of(tiny_tokenizer, len(ids))
    said = align_distributions(tiny_tokenizer, copy.deepcopy(tiny_tokenizer), (ids, ids), top, None)
    assert said.aligned.all() and torch.equal(said.ids, top[0]) and torch.equal(said.log_probs, top[1])


def test_tokens_that_do_not_spell_the_text_are_warped(tiny_tokenizer, other_tokenizer):
    theirs, ours = (tok(TEXT)["input_ids"] for tok in (other_tokenizer, tiny_tokenizer))
    given = (other_tokenizer, tiny_tokenizer, (theirs, ours), rows_of(other_tokenizer, len(theirs)))
    to_ours = VocabularyMap(other_tokenizer, tiny_tokenizer)
    found = align_distributions(*given, to_ours, text="Something else")
    wanted = align_distributions(*given, to_ours, alignment="edit")
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.aligned, wanted.aligned)


def test_what_alignment_refuses(tiny_tokenizer, other_tokenizer):
    theirs, ours = (tok(TEXT)["input_ids"] for tok in (other_tokenizer, tiny_tokenizer))
    top = rows_of(other_tokenizer, len(theirs))
    both = (other_tokenizer, tiny_tokenizer)
    with pytest.raises(IncompatibleModels, match=r"vocab_map = .* there is no map"):
        align_distributions(*both, (theirs, ours), top)
    mapped = dict.fromkeys(range(400), 5)
    with pytest.raises(BadInput, match="row per token"):
        align_distributions(*both, (theirs[1:], ours), top, mapped)
    for option in ("alignment", "fallback"):
        with pytest.raises(BadInput, match=option):
            align_distributions(*both, (theirs, ours), top, mapped, **{option: "other"})


# --- stores ------------------------------------------------------------------------------------------------


def data(tokenizer, block=20):
    rows = []
    for text in SENTENCES:
        ids = tokenizer(text)["input_ids"]
        rows += [
            {"input_ids": ids[i : i + block], "labels": ids[i : i + block]} for i in range(0, len(ids), block)
        ]
    rows = [row for row in rows if len(row["input_ids"]) > 1]
    rows[1] = {**rows[1], "labels": [-100] * 4 + rows[1]["input_ids"][4:]}
    return rows


def test_a_store_holds_the_largest(tiny_tokenizer, tmp_path):
    model, rows = make_tiny("llama", seed=1, layers=2), data(tiny_tokenizer)
    model.train()
    store = SourceStore.capture(model, rows, tmp_path / "s", k=8, batch_size=3, shard_rows=4)
    assert model.training and store.aligned == 1.0 and store.k == 8 and store.rows == len(rows)
    model.eval()
    for i, row in enumerate(rows):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        places = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]
        ids, probs = store.row(i)
        assert torch.allclose(probs, log_p[places].exp().topk(8, -1).values, atol=5e-4)
        assert torch.allclose(log_p[places].exp().gather(-1, ids), probs, atol=5e-4)
        nll = [-float(log_p[t, row["labels"][t + 1]]) for t in places]
        assert float(store.ce[i]) == pytest.approx(sum(nll) / len(nll), rel=1e-4)


def test_a_batch_of_several_stores(tiny_tokenizer, tmp_path):
    """Stores of any k give dense sources' loss; all entries of a small vocabulary are the model itself."""
    rows = data(tiny_tokenizer)
    models = [make_tiny("llama", seed=seed, layers=1) for seed in (1, 2)]
    stores = [SourceStore.capture(m, rows, tmp_path / str(i), k=(400, 390)[i]) for i, m in enumerate(models)]
    chosen = [3, 1, 0]
    batch = pad_collator(0)([rows[i] for i in chosen])
    batch["row"] = torch.tensor(chosen)
    sources, ce = gathered(stores, batch)
    student = make_tiny("llama", seed=3, layers=1)(
        **{k: batch[k] for k in ("input_ids", "attention_mask")}
    ).logits
    dense = [
        m(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.softmax(-1).detach()
        for m in models
    ]
    made = MultiTeacherFusion(2, lm_weight=0.0, loss="kl")
    found, wanted = (made(student, batch["labels"], given, ce) for given in (sources, dense))
    assert float(found.loss.detach()) == pytest.approx(float(wanted.loss.detach()), rel=2e-3)
    with pytest.raises(BadInput, match="are stored"):
        gathered(stores, {**batch, "row": torch.tensor([4, 1, 0])})


def test_a_source_with_its_own_tokenizer(tiny_tokenizer, other_tokenizer, tmp_path):
    model, rows = make_tiny("gpt2", seed=1, layers=1, vocab=320), data(tiny_tokenizer)
    store = SourceStore.capture(
        model,
        rows,
        tmp_path / "s",
        vocabulary=400,
        tokenizer=other_tokenizer,
        target_tokenizer=tiny_tokenizer,
        k=12,
    )
    assert 0.1 < store.aligned < 1.0 and store.vocabulary == 400
    for i in (0, 1):
        text = tiny_tokenizer.decode(rows[i]["input_ids"])
        ids = other_tokenizer(text)["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        begin = len(tiny_tokenizer.decode(rows[i]["input_ids"][:4])) if i == 1 else 0
        ends = list(itertools.accumulate(len(other_tokenizer.decode([t])) for t in ids))
        nll = [-float(log_p[t, ids[t + 1]]) for t in range(len(ids) - 1) if ends[t] >= begin]
        assert float(store.ce[i]) == pytest.approx(sum(nll) / len(nll), rel=1e-4)
        said = align_distributions(
            other_tokenizer, tiny_tokenizer, (ids, rows[i]["input_ids"]), tuple(log_p.topk(12, -1))[::-1],
            VocabularyMap(other_tokenizer, tiny_tokenizer), text=text,
        )  # fmt: skip
        keep = [t for t, label in enumerate(rows[i]["labels"][1:]) if label != -100]
        found, probs = store.row(i)
        assert torch.equal(found, said.ids[keep]) and torch.allclose(
            probs, said.log_probs[keep].exp(), atol=5e-4
        )


def test_rows_that_fill_up_a_vocabulary_are_cut_off(tiny_tokenizer, tmp_path):
    """One tokenizer, but logits beyond its tokens: the source speaks about the target's alone."""
    wide, rows = make_tiny("llama", seed=1, layers=1, vocab=408), data(tiny_tokenizer)
    store = SourceStore.capture(
        wide,
        rows,
        tmp_path / "s",
        vocabulary=400,
        k=400,
        tokenizer=tiny_tokenizer,
        target_tokenizer=tiny_tokenizer,
    )
    with torch.no_grad():
        logits = wide(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0, :-1, :400]
    ids, probs = store.row(0)
    assert torch.allclose(logits.softmax(-1).gather(-1, ids), probs, atol=5e-4)


def test_an_interrupted_capture_goes_on(tiny_tokenizer, tmp_path):
    model, rows = make_tiny("llama", seed=1, layers=1), data(tiny_tokenizer)
    store = SourceStore.capture(model, rows, tmp_path / "s", k=4, shard_rows=4)
    shards = sorted(store.folder.glob("source-*.safetensors"))
    before, stamp = shards[1].read_bytes(), shards[0].stat().st_mtime_ns
    shards[1].unlink()
    with pytest.raises(CorruptFile, match="source-00001"):
        SourceStore(tmp_path / "s")
    SourceStore.capture(model, rows, tmp_path / "s", k=4, shard_rows=4)
    assert shards[0].stat().st_mtime_ns == stamp and shards[1].read_bytes() == before


def test_what_stores_refuse(tiny_tokenizer, other_tokenizer, tmp_path):
    model, rows = make_tiny("llama", seed=1, layers=1), data(tiny_tokenizer)
    small = make_tiny("llama", seed=1, layers=1, vocab=320)
    store = SourceStore.capture(model, rows, tmp_path / "s", k=4)
    with pytest.raises(BadInput, match="other data"):
        SourceStore.capture(make_tiny("llama", seed=2, layers=1), rows, tmp_path / "s", k=4)
    with pytest.raises(IncompatibleModels, match=r"320 entries of vocabulary, the target has 400"):
        SourceStore.capture(small, rows, tmp_path / "x", vocabulary=400)
    for options, says in (
        ({"k": 0}, "k = 0 is below 1"),
        ({"temperature": 0.0}, "temperature = 0.0 is not positive"),
    ):
        with pytest.raises(BadInput, match=says):
            SourceStore.capture(model, rows, tmp_path / "x", **options)
    with pytest.raises(BadInput, match="no rows"):
        SourceStore.capture(model, [], tmp_path / "x")
    empty = [{"input_ids": [1, 2], "labels": [1, 2]}]  # special tokens only: no text
    with pytest.raises(BadInput, match="no text for the source"):
        SourceStore.capture(
            small,
            empty,
            tmp_path / "y",
            vocabulary=400,
            tokenizer=other_tokenizer,
            target_tokenizer=tiny_tokenizer,
        )
    with pytest.raises(BadInput, match="not in the store"):
        store.row(len(rows))
    with pytest.raises(BadInput, match="no source store"):
        SourceStore(tmp_path / "nothing")
    (tmp_path / "s" / "index.json").write_text("{")
    with pytest.raises(CorruptFile, match="unreadable"):
        SourceStore(tmp_path / "s")


# --- training ----------------------------------------------------------------------------------------------


def arguments(folder, **more):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3,
        "report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "seed": 0,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **more})


def sharp(seed):
    """A random model that is surer of itself."""
    model = make_tiny("llama", seed=seed, layers=1)
    model.lm_head.weight.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tiny_tokenizer):
    folder, rows = tmp_path_factory.mktemp("stores"), data(tiny_tokenizer)
    return [
        SourceStore.capture(sharp(seed), rows, folder / str(seed), k=12)
        for seed in (1, 2, 9)  # the last is the target's own
    ]


def trainer(folder, stores, rows, *, fusion=None, settings=None, **more):
    if fusion is None:
        with seeded(1):
            fusion = MultiTeacherFusion(3, lm_weight=0.5)
    return FusionTrainer(
        model=sharp(9), fusion=fusion, sources=stores, train_dataset=rows, args=arguments(folder, **(settings or {})),
        **more,
    )  # fmt: skip


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def close(one, other, atol=0.0):
    return all(torch.allclose(one[name], other[name], rtol=0, atol=atol) for name in one)


def test_the_gate_is_trained_with_the_target(tiny_tokenizer, stores, tmp_path):
    """It turns to the source that the target agrees with most: its own original distribution."""
    with seeded(1):
        fusion = MultiTeacherFusion(3, lm_weight=0.5, feedback_weight=0.1)
    settings = {"max_steps": 30}
    made = trainer(tmp_path, stores, data(tiny_tokenizer), fusion=fusion, gate_lr=0.02, settings=settings)
    before = weights(made)
    made.train()
    after = weights(made)
    for name in ("fusion.gate.first.weight", "fusion.gate.third.weight", "target.lm_head.weight"):
        assert not torch.equal(before[name], after[name]), name
    assert made.optimizer.param_groups[-1]["initial_lr"] == 0.02
    held = sum(len(group["params"]) for group in made.optimizer.param_groups)
    assert held == len(list(made.model.parameters())) == len(set(map(id, made.model.parameters())))
    first, last = made.figures[0], made.figures[-1]
    assert len(made.figures) == 30 == len(made.losses) and last["lm"] < first["lm"]
    total = 0.5 * first["lm"] + 0.5 * first["fusion"] + 0.1 * first["feedback"]
    assert first["loss"] == pytest.approx(total, rel=1e-5)
    assert first["loss"] == pytest.approx(made.losses[0], rel=1e-5)
    assert [first[f"weight_{i}"] for i in range(3)] == pytest.approx([1 / 3] * 3, abs=0.01)
    assert last["weight_2"] > 0.4 and 1 <= last["teachers"] <= 3


def test_micro_batches_do_not_matter(tiny_tokenizer, stores, tmp_path):
    """Every token weighs the same, and the feedback is that of the whole update."""
    rows, ends = data(tiny_tokenizer)[:8], []
    stored = [
        SourceStore.capture(make_tiny("llama", seed=s, layers=1), rows, tmp_path / str(s), k=12)
        for s in (1, 2)
    ]
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        with seeded(1):
            fusion = MultiTeacherFusion(2, lm_weight=0.5, importance="update", threshold=0.0)
            with torch.no_grad():
                fusion.gate.third.weight.mul_(300)
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
                    "max_steps": 3, "optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0}  # fmt: skip
        made = trainer(tmp_path / "run", stored, rows, fusion=fusion, settings=settings)
        made.train()
        ends.append((weights(made), made.losses, made.figures[-1]))
    assert ends[0][2]["feedback"] > 1e-4
    for found, losses, figures in ends[1:]:
        assert close(found, ends[0][0], 5e-6) and losses == pytest.approx(ends[0][1], rel=1e-5)
        assert figures == pytest.approx(ends[0][2], rel=1e-4)


@pytest.mark.parametrize("importance", ["batch", "ema"])
def test_resumed_it_ends_with_the_same_weights(tiny_tokenizer, stores, tmp_path, importance):
    rows, ends = data(tiny_tokenizer), []
    for stop in (None, 3):
        settings = {
            "save_strategy": "steps",
            "save_steps": 3,
            "max_steps": 6,
            "gradient_accumulation_steps": 2,
        }
        place = tmp_path / str(stop)

        def fresh(place=place, settings=settings):
            with seeded(1):
                fusion = MultiTeacherFusion(3, lm_weight=0.5, importance=importance)
            return trainer(place, stores, rows, fusion=fusion, settings=settings, gate_lr=0.01)

        made = fresh()
        if stop is not None:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step == stop  # noqa: B023

            made.add_callback(Stop())
            made.train()
            made = fresh()
            made.train(resume_from_checkpoint=str(place / f"checkpoint-{stop}"))
        else:
            made.train()
        ends.append((weights(made), dict(made.model.named_buffers()), made.losses))
    assert close(ends[0][0], ends[1][0]) and ends[0][2] == ends[1][2] and len(ends[0][2]) == 6
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])
    assert not {p.suffix for p in tmp_path.rglob("*")} & {".bin", ".pt", ".pth", ".pkl"}


def test_baselines_train_without_a_gate(tiny_tokenizer, stores, tmp_path):
    rows, ends = data(tiny_tokenizer), []
    for mode in ("mince", "mean", "reward-softmax", "random-gate"):
        fusion = MultiTeacherFusion(3, mode=mode, lm_weight=0.2)
        with seeded(3):
            made = trainer(tmp_path, stores, rows, fusion=fusion)
            made.train()
        ends.append(weights(made)["target.lm_head.weight"])
        assert made.figures[-1]["teachers"] == (1 if mode == "mince" else pytest.approx(3))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(ends, 2))


def test_evaluation_and_what_is_saved(tiny_tokenizer, stores, tmp_path):
    rows = data(tiny_tokenizer)
    made = trainer(tmp_path / "run", stores, rows, eval_dataset=rows[:5], processing_class=tiny_tokenizer)
    made.target.eval()
    total = count = 0.0
    for row in rows[:5]:
        with torch.no_grad():
            log_p = made.target(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t in range(len(row["labels"]) - 1):
            if row["labels"][t + 1] != -100:
                total, count = total - float(log_p[t, row["labels"][t + 1]]), count + 1
    for rows_per_batch in (1, 2, 5):
        made.args.per_device_eval_batch_size = rows_per_batch
        for extra in ([], [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]):
            found = made.evaluate([*rows[:5], *extra])["eval_loss"]
            assert found == pytest.approx(total / count, rel=1e-5)
    assert math.isnan(made.evaluate(extra)["eval_loss"])
    made.train()
    made.save_model(str(tmp_path / "saved"))
    model, tokenizer = load_model(tmp_path / "saved")
    assert (
        fingerprint(model) == fingerprint(made.target) and tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    )


def test_models_without_a_known_head(tiny_tokenizer):
    """A module that returns logits as they are is read as it is."""

    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    model = make_tiny("llama", seed=1, layers=1)
    batch = pad_collator(0)(data(tiny_tokenizer)[:3])
    with torch.no_grad():
        fused, plain = Reading(model), Reading(Plain(model))
        assert plain.head is None and fused.head is not None
        assert torch.allclose(plain(batch), fused.head(fused(batch)), atol=1e-4)


def test_what_the_trainer_refuses(tiny_tokenizer, stores, tmp_path):
    rows = data(tiny_tokenizer)
    with pytest.raises(BadInput, match="are not the 3 of the loss"):
        trainer(tmp_path, stores[:2], rows)
    with pytest.raises(BadInput, match="rows are stored"):
        trainer(tmp_path, stores, rows[1:])
    with pytest.raises(BadInput, match="no rows"):
        trainer(tmp_path, stores, [])
    with pytest.raises(BadInput, match="gate_lr"):
        trainer(tmp_path, stores, rows, fusion=MultiTeacherFusion(3, mode="mean"), gate_lr=0.1)
    with pytest.raises(IncompatibleModels, match="400 entries"):
        FusionTrainer(
            model=make_tiny("llama", layers=1, vocab=408), fusion=MultiTeacherFusion(3), sources=stores,
            train_dataset=rows, args=arguments(tmp_path),
        )  # fmt: skip


# --- the method --------------------------------------------------------------------------------------------


def test_from_texts_to_a_folder(tiny_tokenizer, other_tokenizer, tmp_path):
    """Sources by folder, one of them with a tokenizer of its own; the same again from what was stored."""
    for name, model, tokenizer in (
        ("one", make_tiny("llama", seed=1, layers=1), tiny_tokenizer),
        ("two", make_tiny("gpt2", seed=2, layers=1, vocab=320), other_tokenizer),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES * 2))
    ends = []
    for turn in range(2):
        fusion = FusionX(
            make_tiny("llama", seed=9, layers=1),
            sources=[tmp_path / "one", str(tmp_path / "two")],
            **SETTINGS,
        )
        out = fusion.transfer(
            tiny_tokenizer,
            output=tmp_path / "out",
            scratch=tmp_path / "scratch",
            seed=5,
            texts=tmp_path / "texts.jsonl",
        )
        ends.append((fingerprint(load_model(out).model), fusion.report["losses"]))
        if turn == 0:  # the last checkpoint alone is left: the run is not made again
            assert len(fusion.report["figures"]) == 3
    assert ends[0] == ends[1] and len(ends[0][1]) == 3
    record = json.loads((out / "transfuse.json").read_text())
    assert record["method"] == "fusion-x" and record["seed"] == 5 and record["arguments"]["threshold"] == 0.15
    names = {"texts": "texts.jsonl", "sources[0]": "one", "sources[1]": "two"}
    assert record["inputs"] == {key: str(tmp_path / name) for key, name in names.items()}
    assert record["input_sha256"].keys() == names.keys()
    assert record["input_sha256"]["sources[0]"] == fingerprint(tmp_path / "one")
    assert [s["aligned"] < 1 for s in record["measurements"]["sources"]] == [False, False, True]
    assert record["measurements"]["perplexity_before"] > 1


def test_the_target_as_a_source(tiny_tokenizer):
    base, source = make_tiny("llama", seed=9, layers=1), make_tiny("llama", seed=1, layers=1)
    before = fingerprint(source)
    counts = []
    for include in (True, False):
        fusion = FusionX(copy.deepcopy(base), sources=[source], include_target=include, **SETTINGS)
        fusion.fit(SENTENCES, tiny_tokenizer)
        counts.append(len(fusion.report["sources"]))
    assert counts == [2, 1] and fingerprint(source) == before


def test_a_source_in_memory_with_its_tokenizer(tiny_tokenizer, other_tokenizer):
    source = {"model": make_tiny("gpt2", seed=2, layers=1, vocab=320), "tokenizer": other_tokenizer}
    fusion = FusionX(make_tiny("llama", seed=9, layers=1), sources=[source], **SETTINGS)
    fusion.fit(data(tiny_tokenizer), tiny_tokenizer)
    assert fusion.report["sources"][1]["aligned"] < 1


def test_a_run_of_another_kind_is_not_gone_on_with(tiny_tokenizer, tmp_path):
    sources = [make_tiny("llama", seed=1, layers=1)]
    FusionX(make_tiny("llama", seed=9, layers=1), sources=sources, **SETTINGS).fit(
        SENTENCES, tiny_tokenizer, scratch=tmp_path
    )
    with pytest.raises(BadInput, match="other arguments"):
        FusionX(make_tiny("llama", seed=9, layers=1), sources=sources, **{**SETTINGS, "lr": 2e-3}).fit(
            SENTENCES, tiny_tokenizer, scratch=tmp_path
        )


def test_what_it_refuses(tiny_tokenizer, tmp_path):
    base, source = make_tiny("llama", seed=9, layers=1), make_tiny("llama", seed=1, layers=1)
    before = fingerprint(base)
    for options, match in (
        ({"sources": []}, "sources = .* are none"),
        ({"sources": ["no such model"]}, "neither a folder"),
        ({"sources": [3]}, "is no model"),
        ({"sources": [{"model": source}]}, "other keys"),
        ({"sources": [base]}, "cannot stay as it is"),
        ({"sources": [source], "lr": 0.0}, "lr"),
        ({"sources": [source], "top_k": 0}, "top_k"),
        ({"sources": [source], "threshold": 1.0}, "threshold"),
        ({"sources": [source], "mode": "best"}, "mode"),
        ({"sources": [source], "top_k": 2.5}, "top_k"),
    ):
        with pytest.raises(BadInput, match=match):
            FusionX(base, **{**SETTINGS, **options}).fit(SENTENCES, tiny_tokenizer)
    for options in (
        {"schedule": "foo"}, {"alignment": "foo"}, {"rest": "foo"}, {"warmup": -1}, {"warmup": math.nan}, {"lr": 0.0},
        {"lr": "x"}, {"lr": math.inf}, {"clip": -1.0}, {"weight_decay": -1.0}, {"temperature": 0.0},
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"^{next(iter(options))} = "):
            FusionX(base, sources=[source], **{**SETTINGS, **options})
    with pytest.raises(BadInput, match="held_out = 1 rows have no label"):
        FusionX(base, sources=[source], **SETTINGS).fit(
            SENTENCES, tiny_tokenizer, held_out=[{"input_ids": [5, 6], "labels": [-100, -100]}]
        )
    for texts, match in (([], "no row"), ([3], r"texts\[0\]"), (tmp_path / "none.txt", "none.txt")):
        with pytest.raises((BadInput, OSError), match=match):
            FusionX(base, sources=[source], **SETTINGS).fit(texts, tiny_tokenizer)
    with pytest.raises(NotApplicable, match="no model of transformers"):
        FusionX(nn.Linear(2, 2), sources=[source], **SETTINGS).fit(SENTENCES, tiny_tokenizer)
    with pytest.raises(IncompatibleModels, match="tokenizer"):
        narrow = make_tiny("llama", seed=1, layers=1, vocab=320)
        FusionX(base, sources=[narrow], **SETTINGS).fit(SENTENCES, tiny_tokenizer)
    assert fingerprint(base) == before
