"""Objectives on rankings, each against loops over answers and tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import make_tiny
from cores import run_all
from distilling import Case, arguments, rng, state

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill import Distiller, Signal
from transfuse.distill._base import Reader
from transfuse.distill._likelihood import sequence_log_probs, token_log_probs
from transfuse.distill._rank import (
    DPO,
    PRO,
    RRHF,
    RewardRanking,
    dpo_loss,
    pro_loss,
    rank_collator,
    reward_loss,
    rrhf_loss,
)

# --- by loops ----------------------------------------------------------------------------------------------


def log_prob(z, labels):
    """Log-probability of a row's labelled tokens, and their number."""
    total, count = z.new_zeros(()), 0
    for t in range(len(labels) - 1):
        label = int(labels[t + 1])
        if label != -100:
            e = torch.exp(z[t])
            total, count = total + torch.log(e[label] / e.sum()), count + 1
    return total, count


def groups_of(x):
    return [
        [i for i in range(len(x["group"])) if x["group"][i] == g] for g in sorted(set(x["group"].tolist()))
    ]


def each_pair(x, rows):
    return [(i, j) for i in rows for j in rows if x["score"][i] > x["score"][j]]


def by_hand_dpo(x, fixed):
    delta = [
        log_prob(x["student"][i], x["labels"][i])[0] - log_prob(fixed["teacher"][i], x["labels"][i])[0]
        for i in range(len(x["labels"]))
    ]
    values = []
    for rows in groups_of(x):
        pairs = each_pair(x, rows)
        terms = [torch.log(1 + torch.exp(-0.1 * (delta[i] - delta[j]))) for i, j in pairs]
        values.append(sum(terms) / len(pairs) if pairs else torch.zeros(()))
    return sum(values) / len(values)


def means(x):
    found = [log_prob(x["student"][i], x["labels"][i]) for i in range(len(x["labels"]))]
    return [total / count for total, count in found], [total for total, _ in found]


def best_of(x, rows):
    return max(rows, key=lambda i: float(x["score"][i]))


def by_hand_rrhf(x, fixed):
    s, _ = means(x)
    total = 0.0
    for rows in groups_of(x):
        total = total + sum(torch.clamp(s[j] - s[i], min=0) for i, j in each_pair(x, rows))
        total = total - s[best_of(x, rows)]
    return total / len(groups_of(x))


def by_hand_pro(weight, weighted):
    def value(x, fixed):
        s, sums = means(x)
        total = 0.0
        for rows in groups_of(x):
            ranked = sorted(rows, key=lambda i: -float(x["score"][i]))
            for k in range(len(ranked) - 1):
                heat = dict.fromkeys(ranked[k:], 1.0)
                if weighted:
                    heat = {i: float(x["score"][ranked[k]]) - float(x["score"][i]) for i in ranked[k + 1 :]}
                    heat[ranked[k]] = max(heat.values())
                below = sum(torch.exp(s[i] * heat[i]) for i in ranked[k:])
                total = total - torch.log(torch.exp(s[ranked[k]] * heat[ranked[k]]) / below)
            total = total - weight * (len(rows) - 1) ** 2 * sums[best_of(x, rows)]
        return total / len(groups_of(x))

    return value


def ranked(seed):
    g = rng(seed)
    found = {
        "student": 2 * torch.randn(5, 6, 7, generator=g, dtype=torch.float64),
        "teacher": 2 * torch.randn(5, 6, 7, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, 7, (5, 6), generator=g),
        "score": torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0], dtype=torch.float64),
        "group": torch.tensor([0, 0, 0, 1, 1]),
    }
    found["labels"][:, :2] = -100
    found["labels"][1, 4:] = -100
    return found


def padded(x):
    more = dict(x)
    for key in ("student", "teacher", "labels"):
        extra = x[key].new_full((len(x[key]), 2, *x[key].shape[2:]), -100 if key == "labels" else math.nan)
        more[key] = torch.cat([x[key], extra], 1)
    return more


def excluded(x):
    changed = {key: value.clone() for key, value in x.items()}
    for key in ("student", "teacher"):
        changed[key][..., 0] = -torch.inf
    changed["labels"][changed["labels"] == 0] = 1
    return changed


def loss_of(objective):
    def loss(x):
        return objective(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)["loss"]

    return loss


def case(name, objective, reference):
    return Case(
        name, ranked, loss_of(objective), reference, ("student",), padded=padded, excluded=excluded,
        couples="answers of one prompt are compared", without={"least": "there is always a better order"},
    )  # fmt: skip


def by_hand_reward(x, fixed):
    r = x["student"].squeeze(1)
    values = []
    for rows in groups_of(x):
        pairs = each_pair(x, rows)
        values.append(sum(torch.log(1 + torch.exp(r[j] - r[i])) for i, j in pairs) / len(pairs))
    return sum(values) / len(values)


CASES = [
    case("dpo", DPO(), by_hand_dpo),
    case("rrhf", RRHF(), by_hand_rrhf),
    case("pro", PRO(), by_hand_pro(0.0, False)),
    case("pro-weighted", PRO(sft_weight=0.05, weighted=True), by_hand_pro(0.05, True)),
    Case(
        "reward",
        lambda seed: {**ranked(seed), "student": ranked(seed)["student"][:, 0, :1]},
        lambda x: RewardRanking()(Signal(logits=x["student"]), None, x)["loss"],
        by_hand_reward,
        ("student",),
        couples="answers of one prompt are compared",
        without=dict.fromkeys(("least", "padded", "excluded"), "one number per text, no tokens"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cores(case):
    run_all(case)


# --- hand-worked -------------------------------------------------------------------------------------------


def test_values_by_hand():
    scores, group = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long)
    policy, reference = torch.tensor([-2.0, -3.0]), torch.tensor([-2.5, -1.5])
    # delta_w = 0.5, delta_l = -1.5
    assert float(dpo_loss(policy, reference, scores, group, 0.5)) == pytest.approx(
        math.log(1 + math.exp(-1.0))
    )
    assert float(dpo_loss(policy, policy, scores, group)) == pytest.approx(math.log(2))
    assert float(reward_loss(torch.tensor([1.0, 3.0]), scores, group)) == pytest.approx(
        math.log(1 + math.exp(2))
    )
    assert float(rrhf_loss(torch.tensor([-1.0, -0.25]), scores, group)) == pytest.approx(0.75)
    assert float(rrhf_loss(torch.tensor([-0.25, -1.0]), scores, group)) == 0.0
    three = torch.tensor([math.log(0.2), math.log(0.5), math.log(0.3)])
    value = pro_loss(three, torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3, dtype=torch.long))
    assert float(value) == pytest.approx(-math.log(0.2) - math.log(0.5 / 0.8))


def test_ties_and_other_prompts_do_not_count():
    scores, group = torch.tensor([1.0, 1.0, 0.0, 5.0]), torch.tensor([0, 0, 1, 2])
    values = torch.randn(4, requires_grad=True)
    for loss in (
        dpo_loss(values, torch.zeros(4), scores, group),
        rrhf_loss(values, scores, group),
        reward_loss(values, scores, group),
    ):
        assert float(loss.detach()) == 0.0
        assert float(torch.autograd.grad(loss, values, retain_graph=True)[0].abs().sum()) == 0.0


def test_pro_ranks_ties_as_they_are_written():
    values = torch.zeros(3, requires_grad=True)
    pro_loss(values, torch.ones(3), torch.zeros(3, dtype=torch.long)).backward()
    assert values.grad.tolist() == pytest.approx([-2 / 3, 1 / 3 - 1 / 2, 1 / 3 + 1 / 2])


def test_rrhf_sums_or_averages_the_best_answer():
    x = ranked(3)
    _, sums = means(x)
    whole = RRHF(rank_weight=0.0, sft="sum")
    expected = -(sums[1] + sums[3]) / 2
    assert float(loss_of(whole)(x)) == pytest.approx(float(expected))


# --- no whole logits ---------------------------------------------------------------------------------------


def test_hidden_states_and_logits_agree(monkeypatch):
    from transfuse.distill import _likelihood

    model = make_tiny("llama", seed=3, layers=1).double()
    ids = torch.randint(3, 400, (4, 70), generator=rng(0))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 40:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = []
    gather = torch.log_softmax
    monkeypatch.setattr(_likelihood, "_CHUNK_BYTES", 1)  # chunks of 64 tokens

    def watched(z, **k):
        sizes.append(len(z))
        return gather(z, **k)

    slopes = []
    for fuse in (True, False):
        signal = Reader(model, fuse=fuse)(batch, grad=True)
        assert (signal.hidden is not None) is fuse
        if fuse:
            monkeypatch.setattr(torch, "log_softmax", watched)
        value = token_log_probs(signal, labels)
        monkeypatch.setattr(torch, "log_softmax", gather)
        weights = torch.randn(value.shape, generator=rng(1), dtype=value.dtype)
        found = torch.autograd.grad((value * weights).sum(), list(model.parameters()))
        slopes.append([value, *found])
    assert max(sizes) == 64 and len(sizes) > 3
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*slopes, strict=True))
    assert float(slopes[0][0][1, 39:].abs().sum()) == 0.0
    total, mean = (sequence_log_probs(signal, labels, mean=m) for m in (False, True))
    assert torch.allclose(total, mean * torch.tensor([67, 37, 67, 67]))


# --- through the trainer -----------------------------------------------------------------------------------


def prompts(count=6, answers=3):
    g = rng(5)
    found = []
    for _ in range(count):
        prompt = torch.randint(3, 400, (4,), generator=g).tolist()
        texts = [torch.randint(3, 400, (3 + i,), generator=g).tolist() for i in range(answers)]
        found.append({
            "input_ids": [prompt + text for text in texts],
            "labels": [[-100] * 4 + text for text in texts],
            "score": [float(i) for i in range(answers)],
        })  # fmt: skip
    return found


@pytest.mark.parametrize("objective", [DPO(), RRHF(), PRO(sft_weight=0.05)], ids=["dpo", "rrhf", "pro"])
def test_the_order_is_learnt_and_the_reference_stays(objective):
    student = make_tiny("llama", seed=1, layers=1)
    reference = copy.deepcopy(student)
    before = state(reference)
    with seeded(0):
        made = Distiller(
            student=student, teacher=reference if objective.needs_teacher else None, objective=objective,
            train_dataset=prompts(), data_collator=rank_collator(0),
            args=arguments("unused", max_steps=30, per_device_train_batch_size=3, learning_rate=1e-3),
        )  # fmt: skip
        made.train()
    assert sum(made.losses[-3:]) < 0.8 * sum(made.losses[:3])
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
    batch = rank_collator(0)(prompts())
    score = sequence_log_probs(Reader(student)(batch, grad=False), batch["labels"], mean=True).view(6, 3)
    old = sequence_log_probs(Reader(reference)(batch, grad=False), batch["labels"], mean=True).view(6, 3)
    assert ((score - old).diff(dim=1) > 0).float().mean() > 0.9


def test_micro_batches_count_by_their_prompts():
    """Two prompts in one batch, or in two micro-batches of an update: the same weights come out."""
    ends = []
    for size, accumulation in ((3, 1), (1, 3)):
        student = make_tiny("llama", seed=1, layers=1)
        made = Distiller(
            student=student, objective=RRHF(), train_dataset=prompts(3), data_collator=rank_collator(0),
            args=arguments(
                "unused", max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
            ),
        )  # fmt: skip
        made.train()
        ends.append((state(student), made.losses))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)
    assert all(torch.allclose(ends[0][0][n], v, atol=2e-4) for n, v in ends[1][0].items())


def test_a_reward_model_is_learnt():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    with seeded(2):
        model = LlamaForSequenceClassification(config)
    with seeded(0):
        made = Distiller(
            student=model, objective=RewardRanking(), train_dataset=prompts(),
            data_collator=rank_collator(0),
            args=arguments("unused", max_steps=40, per_device_train_batch_size=6),
        )  # fmt: skip
        made.train()
    assert made.figures[-1]["accuracy"] == 1.0
    assert made.losses[-1] < 0.3 * made.losses[0]


def test_bad_input():
    with pytest.raises(BadInput, match="beta"):
        DPO(beta=0.0)
    with pytest.raises(BadInput, match="sft"):
        RRHF(sft="most")
    with pytest.raises(BadInput, match="sft_weight"):
        PRO(sft_weight=-1.0)
    with pytest.raises(BadInput, match="score"):
        rank_collator(0)([{"input_ids": [[1, 2]], "labels": [[1, 2]], "score": [1.0]}])
    with pytest.raises(BadInput, match="score"):
        rank_collator(0)([{"input_ids": [[1], [2]], "labels": [[1], [2]], "score": [1.0, 2.0, 3.0]}])
    x = ranked(0)
    sparse = Signal(sparse=(x["labels"].unsqueeze(-1), torch.zeros(5, 6, 1)))
    with pytest.raises(NotApplicable, match="reference"):
        DPO()(Signal(logits=x["student"]), sparse, x)
    with pytest.raises(IncompatibleModels, match="num_labels=1"):
        RewardRanking()(Signal(logits=torch.zeros(5, 2)), None, x)
