"""Objectives on hidden states, each against its sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_tiny
from cores import run_all
from distilling import Case, arguments, rng, rows, shapes, state
from torch import nn

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill import Distiller, prune
from transfuse.distill._base import Signal
from transfuse.distill._contrastive import Contrastive, contrastive_terms
from transfuse.distill._features import MMD, HiddenStates, mmd, state_terms
from transfuse.distill._relations import AttentionRelation, relations

MAP = torch.randn(5, 4, generator=rng(9), dtype=torch.float64)


class Fixed(nn.Module):
    """The map of the cases, in whatever dtype it is asked for."""

    def forward(self, x):
        return x @ MAP.to(x.dtype).T


def inputs(widths, tokens=5):
    def make(seed):
        g = rng(seed)
        mask = torch.ones(3, tokens, dtype=torch.long)
        mask[1, 3:] = 0
        mask[2, :2] = 0
        return {
            "student": torch.randn(3, tokens, widths[0], generator=g, dtype=torch.float64),
            "teacher": torch.randn(3, tokens, widths[1], generator=g, dtype=torch.float64),
            "attention_mask": mask,
        }

    return make


def padded(x):
    more = {}
    for key, value in x.items():
        extra = value.new_zeros((len(value), 2, *value.shape[2:]))
        more[key] = torch.cat([value, extra if key == "attention_mask" else extra + float("nan")], 1)
    return more


def states(objective, change=None):
    """The loss of an objective on one pair of layers."""

    def loss(x):
        made = objective()
        made.student_taps, made.teacher_taps = ("a",), ("b",)
        made.maps = nn.ModuleList([change or nn.Identity()])
        return made(Signal(taps={"a": x["student"]}), Signal(taps={"b": x["teacher"]}), x)["loss"]

    return loss


def vectors(x, key):
    return [x[key][b, t] for b in range(3) for t in range(x[key].shape[1]) if x["attention_mask"][b, t]]


def mean_over_tokens(per_token, mapped=False):
    def value(live, fixed):
        found = []
        for s, t in zip(vectors(live, "student"), vectors(fixed, "teacher"), strict=True):
            s = torch.stack([(MAP[i] * s).sum() for i in range(5)]) if mapped else s
            found.append(per_token(s, t))
        return torch.stack(found).mean()

    return value


def norm(v):
    return torch.sqrt((v * v).sum())


def cross_entropy(s, t):
    e, f = torch.exp(s), torch.exp(t)
    return -sum(b / f.sum() * torch.log(a / e.sum()) for a, b in zip(e, f, strict=True))


def entropy(x):
    found = [cross_entropy(t, t) for t in vectors(x, "teacher")]
    return float(torch.stack(found).mean())


def discrepancy(bandwidth, unbiased, mapped=False):
    def value(live, fixed):
        ours, theirs = vectors(live, "student"), vectors(fixed, "teacher")
        if mapped:
            ours = [MAP @ s for s in ours]
        apart = [norm(a - b) for i, a in enumerate(theirs) for b in theirs[i + 1 :]]
        width = bandwidth or sorted(apart, key=float)[(len(apart) - 1) // 2]

        def mean(xs, ys, same):
            found = [
                torch.exp(-((a - b) ** 2).sum() / (2 * width**2))
                for i, a in enumerate(xs)
                for j, b in enumerate(ys)
                if not (same and unbiased and i == j)
            ]
            return sum(found) / len(found)

        return mean(ours, ours, True) + mean(theirs, theirs, True) - 2 * mean(ours, theirs, False)

    return value


def projections(seed):
    g = rng(seed)
    found = inputs((6, 8))(seed)
    for side, (q, kv) in (("student", (6, 2)), ("teacher", (8, 8))):
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            found[f"{side}.{name}"] = torch.randn(3, 5, width, generator=g, dtype=torch.float64)
    return {k: v for k, v in found.items() if "." in k or k == "attention_mask"}


def related(**options):
    """The loss on made-up projections: 3 heads of 2 in the student, 4 of 2 in the teacher."""

    def loss(x):
        made = AttentionRelation(**options)
        made.student_taps, made.teacher_taps = (
            tuple(f"{side}.{n}" for n in "qkv") for side in ("student", "teacher")
        )
        made.attention_heads = (3, 4)
        signals = [Signal(taps={k: v for k, v in x.items() if side in k}) for side in ("student", "teacher")]
        return made(*signals, x)["loss"]

    return loss


def relation(x, b, i, columns, heads, r, kind):
    width = x.shape[-1] // heads
    part = x[b, :, r * width : (r + 1) * width]
    scores = [(part[i] * part[j]).sum() / math.sqrt(width) for j in columns]
    if kind == "raw":
        return scores
    e = [torch.exp(s) for s in scores]
    return [v / sum(e) for v in e]


def repeated(x):
    """K and V of the student: its one head three times."""
    return torch.cat([x, x, x], -1) if x.shape[-1] == 2 else x


def relation_loss(*, heads=4, kind="softmax", causal=False, weights=(1.0, 1.0, 1.0)):
    def value(live, fixed):
        total, pairs = 0.0, 0
        for b in range(3):
            real = [t for t in range(live["attention_mask"].shape[1]) if live["attention_mask"][b, t]]
            for i in real:
                columns = [j for j in real if j <= i] if causal else real
                pairs += len(columns)
                for name, weight in zip("qkv", weights, strict=True):
                    ours, theirs = repeated(live[f"student.{name}"]), fixed[f"teacher.{name}"]
                    for r in range(heads):
                        a = relation(ours, b, i, columns, heads, r, kind)
                        c = relation(theirs, b, i, columns, heads, r, kind)
                        total = total + weight / heads * sum((p - q) ** 2 for p, q in zip(a, c, strict=True))
        return total / pairs

    return value


def found_among(temperature):
    """-log of the share of a token's own state among all of the teacher's, by the exponentials of cosines."""

    def value(live, fixed):
        ours, theirs = vectors(live, "student"), vectors(fixed, "teacher")
        costs = []
        for i, s in enumerate(ours):
            weights = [torch.exp((s * t).sum() / norm(s) / norm(t) / temperature) for t in theirs]
            costs.append(-torch.log(weights[i] / sum(weights)))
        return sum(costs) / len(costs)

    return value


NO_LOGITS = {"without": {"excluded": "no logits are read"}}
LEAST = {"least": lambda x: {**x, "teacher": x["student"].clone()}}
TOKENS = {"count": lambda x: float(x["attention_mask"].sum()), "padded": padded, **NO_LOGITS}
TOGETHER = {"couples": "it compares two sets, not tokens", "padded": padded, **NO_LOGITS}
RELATED = {
    "padded": padded,
    "without": {"excluded": "no logits are read", "least": "checked with equal widths by hand"},
}


def pairs_of(causal):
    def count(x):
        n = x["attention_mask"].sum(1).double()
        return float((n * (n + 1) / 2 if causal else n * n).sum())

    return count


def apart(s, t):
    return ((s - t) ** 2).mean()


CASES = [
    Case("mse", inputs((4, 4)), states(HiddenStates), mean_over_tokens(apart), ("student",), **TOKENS, **LEAST),
    Case("l1", inputs((4, 5)), states(lambda: HiddenStates(distance="l1"), Fixed()),
         mean_over_tokens(lambda s, t: torch.abs(s - t).mean(), True), ("student",),
         **{**TOKENS, "without": {"least": "it has a corner there", "excluded": "no logits are read"}}),
    Case("cosine", inputs((4, 4)), states(lambda: HiddenStates(distance="cosine")),
         mean_over_tokens(lambda s, t: 1 - (s * t).sum() / norm(s) / norm(t)), ("student",), **TOKENS, **LEAST),
    Case("ce", inputs((4, 4)), states(lambda: HiddenStates(distance="ce", kd_weight=1.0)),
         mean_over_tokens(cross_entropy), ("student",), least_value=entropy, **TOKENS, **LEAST),
    Case("mmd", inputs((4, 4)), states(MMD), discrepancy(None, False), ("student",), **TOGETHER, **LEAST),
    Case("mmd-unbiased", inputs((4, 5)), states(lambda: MMD(bandwidth=1.7, unbiased=True), Fixed()),
         discrepancy(1.7, True, True), ("student",),
         **{**TOGETHER, "without": {"least": "it may fall below zero", "excluded": "no logits are read"}}),
    Case("contrastive", inputs((4, 4)), states(lambda: Contrastive(temperature=0.3)), found_among(0.3), ("student",),
         **{**TOGETHER, "couples": "the other tokens of the batch are the negatives",
            "without": {"least": "other states than the teacher's own may be told apart better",
                        "excluded": "no logits are read"}}),
    Case("relation", projections, related(causal=False), relation_loss(),
         ("student.q", "student.k", "student.v"), count=pairs_of(False), **RELATED),
    Case("relation-raw", projections, related(relation="raw", causal=True, heads=2, weights=(1.0, 0.5, 2.0)),
         relation_loss(kind="raw", causal=True, heads=2, weights=(1.0, 0.5, 2.0)),
         ("student.q", "student.k", "student.v"), count=pairs_of(True), **RELATED),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contract_of_a_core(case):
    run_all(case)


def test_terms_by_hand():
    s, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert float(state_terms(s, t, "mse")) == pytest.approx((4 + 9) / 2)
    assert float(state_terms(s, t, "l1")) == pytest.approx(2.5)
    assert float(state_terms(s, t, "cosine")) == pytest.approx(1 - 1 / math.sqrt(50))
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    k = [math.exp(-x / 2) for x in (1.0, 4.0)]
    both = (1 + k[1] + k[0] + k[0]) / 4
    assert float(mmd(a, b, bandwidth=1.0)) == pytest.approx((1 + k[0]) / 2 + (1 + k[1]) / 2 - 2 * both)
    assert float(mmd(a, b, bandwidth=1.0, unbiased=True)) == pytest.approx(k[0] + k[1] - 2 * both)
    assert float(mmd(a, b)) == pytest.approx(float(mmd(a, b, bandwidth=2.0)))  # the median of one distance


def test_contrastive_terms_by_hand():
    """Orthogonal states: their own at cosine 1, the others at 0; lengths do not count."""
    own = torch.eye(3, dtype=torch.float64)
    expected = -math.log(math.exp(2.0) / (math.exp(2.0) + 2))
    found = contrastive_terms(5 * own, own * torch.tensor([[1.0], [2.0], [7.0]]), 0.5)
    assert found.tolist() == pytest.approx([expected] * 3)
    crossed = contrastive_terms(own, own[[1, 2, 0]], 0.5)
    assert crossed.tolist() == pytest.approx([math.log(math.exp(2.0) + 2)] * 3)
    alike = contrastive_terms(own, own[:1].expand(3, 3), 0.5)
    assert alike.tolist() == pytest.approx([math.log(3)] * 3)


@pytest.mark.parametrize("kind", [Contrastive, MMD])
def test_most_tokens_are_spread_evenly(kind):
    x = inputs((4, 4), tokens=9)(0)
    x["attention_mask"] = torch.ones_like(x["attention_mask"])
    chosen = [round(i * 26 / 4) for i in range(5)]  # of 27
    few = {name: value.reshape(1, 27, -1)[:, chosen] for name, value in x.items() if name != "attention_mask"}
    few["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    values = [float(states(lambda: kind(max_tokens=5))(x)), float(states(kind)(few))]
    assert values[0] == pytest.approx(values[1])


def test_mmd_of_one_distribution_is_zero_on_average():
    """The unbiased estimate; the other lies above it."""
    g, values = rng(0), []
    for _ in range(300):
        a, b = torch.randn(2, 12, 3, generator=g)
        values.append([float(mmd(a, b, bandwidth=1.5, unbiased=u)) for u in (True, False)])
    means = torch.tensor(values).mean(0)
    assert abs(float(means[0])) < 0.01 < float(means[1])


def test_mmd_of_large_states():
    """A common offset changes nothing, in float32."""
    g = rng(0)
    a, b = torch.randn(2, 20, 8, generator=g)
    exact = float(mmd(a.double(), b.double()))
    assert float(mmd(a + 1000, b + 1000)) == pytest.approx(exact, rel=1e-3)


def test_relations_by_hand():
    x = torch.tensor([[[1.0, 0.0, 9.0], [2.0, 1.0, 9.0]]])  # the third entry is left over by 2 heads
    every = torch.ones(1, 2, 2, dtype=torch.bool)
    raw = relations(x, 2, every, "raw")
    assert raw[0, 0].tolist() == [[1.0, 2.0], [2.0, 4.0]] and raw[0, 1].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    soft = relations(x, 2, every)
    assert float(soft[0, 0, 0, 1]) == pytest.approx(1 / (1 + math.exp(-1)))
    causal = relations(x, 2, every.tril())
    assert causal[0, 0, 0].tolist() == [1.0, 0.0]


def test_equal_relations_cost_nothing():
    """Also after a rotation inside each head, which relations do not see."""
    x = projections(0)
    for name in "qkv":
        x[f"teacher.{name}"] = repeated(x[f"student.{name}"])
    assert float(related(causal=False, heads=3)(x)) == pytest.approx(0.0, abs=1e-12)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    for name in "qkv":
        x[f"teacher.{name}"] = (x[f"teacher.{name}"].unflatten(-1, (3, 2)) @ turn).flatten(-2)
    assert float(related(causal=False, heads=3)(x)) == pytest.approx(0.0, abs=1e-12)


def test_many_tokens_are_thinned_evenly():
    x = inputs((4, 4), tokens=40)(0)
    thin = states(lambda: MMD(max_tokens=10, bandwidth=1.0))(x)
    ours, theirs = (torch.stack(vectors(x, key)) for key in ("student", "teacher"))
    places = [round(i * (len(ours) - 1) / 9) for i in range(10)]
    assert float(thin) == pytest.approx(float(mmd(ours[places], theirs[places], bandwidth=1.0)))


def models(width=16):
    teacher = make_tiny("llama", seed=1, layers=3, vocab=60)
    return make_tiny("llama", seed=2, layers=2, hidden=width, vocab=60), teacher


def trainer(folder, objective, student=None, teacher=None, data=None, **options):
    if student is None:
        student, teacher = models()
    return Distiller(
        student=student, teacher=teacher, objective=objective, train_dataset=data or rows(8, 6, 60),
        args=arguments(folder, **options),
    )  # fmt: skip


@pytest.mark.parametrize(
    "objective",
    [HiddenStates, lambda: HiddenStates(layers=[(1, 2)], ce_weight=0.5), MMD, Contrastive, AttentionRelation],
    ids=["states", "states-and-labels", "mmd", "contrastive", "relation"],
)
def test_it_trains_and_leaves_a_bare_student(objective, tmp_path):
    runs = []
    for _ in range(2):
        made = trainer(tmp_path, objective(), max_steps=12, learning_rate=1e-2)
        teacher, before = made.model.readers[0].model, shapes(made.student)
        kept = state(teacher)
        with seeded(0):
            made.train()
        assert sum(made.losses[-2:]) < sum(made.losses[:2])
        assert shapes(made.student) == before
        assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
        runs.append(made)
    assert runs[0].losses == runs[1].losses
    if isinstance(runs[0].objective, HiddenStates):  # the maps learn, and are in checkpoints
        names = [n for n, _ in runs[0].model.named_parameters() if n.startswith("objective.maps")]
        assert names
        fresh = trainer(tmp_path, objective()).objective.maps
        assert not torch.equal(fresh[0].weight, runs[0].objective.maps[0].weight)


def test_the_layers_are_those_the_student_was_cut_out_of(tmp_path):
    _, teacher = models()
    student = prune(teacher, keep=[0, 2])
    objective = HiddenStates()
    trainer(tmp_path, objective, student, teacher)
    assert objective.student_taps == ("model.layers.0", "model.layers.1")
    assert objective.teacher_taps == ("model.layers.0", "model.layers.2")
    assert all(isinstance(m, nn.Identity) for m in objective.maps)  # equal widths
    objective = HiddenStates(project=True)
    trainer(tmp_path, objective, student, teacher)
    assert [tuple(m.weight.shape) for m in objective.maps] == [(32, 32)] * 2
    objective = AttentionRelation()
    trainer(tmp_path, objective, student, teacher)
    assert objective.student_taps == tuple(f"model.layers.1.self_attn.{n}_proj" for n in "qkv")
    assert objective.teacher_taps == tuple(f"model.layers.2.self_attn.{n}_proj" for n in "qkv")
    assert objective.attention_heads == (4, 4) and objective.causal


@pytest.mark.parametrize("objective", [lambda: HiddenStates(ce_weight=1.0), AttentionRelation])
def test_an_update_is_one_whatever_its_micro_batches(objective, tmp_path):
    """Rows of different lengths: means are over the whole update."""
    data = [row for n in (4, 7, 9, 5) for row in rows(1, n, 60, seed=n)]
    found = []
    for size, steps in ((4, 1), (1, 4)):
        made = trainer(
            tmp_path, objective(), data=data, max_steps=2, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        made.train()
        found.append(made.figures)
    for one, other in zip(*found, strict=True):
        assert all(one[name] == pytest.approx(other[name], rel=1e-4) for name in one)


def test_projections_of_other_architectures(tmp_path):
    """GPT-2 makes Q, K and V in one; an encoder sees both sides."""
    objective = AttentionRelation()
    trainer(tmp_path, objective, make_tiny("gpt2", seed=1, layers=2, vocab=60), models()[1]).train()
    assert objective.student_taps == ("transformer.h.1.attn.c_attn",)
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    objective, bert = AttentionRelation(), BertModel(config)
    objective.prepare(bert, [models()[1]])
    names = [f"encoder.layer.1.attention.self.{n}" for n in ("query", "key", "value")]
    assert list(objective.student_taps) == names and objective.causal is False
    with pytest.raises(NotApplicable, match="HiddenStates"):
        stack = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
        AttentionRelation(layers=[(0, 0)]).prepare(nn.Sequential(stack), [nn.Sequential(stack)])


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (HiddenStates, "distance", "l3"), (HiddenStates, "layers", []), (HiddenStates, "layers", [(0, -1)]),
        (HiddenStates, "kd_weight", 0.0), (MMD, "bandwidth", 0.0), (MMD, "max_tokens", 1),
        (Contrastive, "temperature", 0.0), (Contrastive, "max_tokens", 1),
        (AttentionRelation, "relation", "hard"), (AttentionRelation, "heads", 0),
        (AttentionRelation, "weights", (1.0, -1.0, 1.0)),
    ],
)  # fmt: skip
def test_bad_arguments(kind, name, value):
    with pytest.raises(BadInput, match=name):
        kind(**{name: value})


def test_misfits(tmp_path):
    student, teacher = models()
    with pytest.raises(BadInput, match="teacher"):
        trainer(tmp_path, HiddenStates(), student, [teacher, models()[1]])
    with pytest.raises(BadInput, match="layers"):
        trainer(tmp_path, HiddenStates(layers=[(0, 3)]), student, teacher)
    with pytest.raises(BadInput, match="project"):
        trainer(tmp_path, HiddenStates(project=False), student, teacher)
    with pytest.raises(BadInput, match="heads"):
        trainer(tmp_path, AttentionRelation(heads=64), student, teacher).train()
    with pytest.raises(BadInput, match="layers"):
        stack = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
        HiddenStates().prepare(stack, [teacher])
    made = HiddenStates()
    made.student_taps, made.teacher_taps = ("a",), ("b",)
    with pytest.raises(IncompatibleModels, match="tokens"):
        made.setup(Signal(taps={"a": torch.zeros(1, 2, 3)}), Signal(taps={"b": torch.zeros(1, 3, 3)}), {})
