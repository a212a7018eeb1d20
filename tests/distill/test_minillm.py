"""MiniLLM: advantages, clipping, weights and masks, against loops; the sampling, and a short run."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import make_tiny
from cores import run_all
from distilling import Case, arguments, rng, rows, state

from transfuse.core.batches import pad_collator
from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill import Distiller, Signal
from transfuse.distill._minillm import (
    MiniLLM,
    OnPolicyReverseKL,
    RewardMinusKL,
    Rollouts,
    advantages,
    clipped_terms,
    mixed_logits,
)

# --- by loops ----------------------------------------------------------------------------------------------


def spread(z):
    e = [torch.exp(x) for x in z]
    return [x / sum(e) for x in e]


def by_hand(gamma=1.0, single=True, inclusive=False, lm=1.0, clip=0.2, weigh=False):
    def value(live, fixed):
        samples, texts = [], []
        for b in range(len(live["labels"])):
            where = [t for t in range(1, 6) if int(live["labels"][b, t]) != -100]
            plain = bool(live["plain"][b].any())
            reward = {}
            for t in where:
                p = spread(fixed["teacher"][b, t - 1])
                reward[t] = float(torch.log(p[int(live["labels"][b, t])])) - float(
                    live["old_log_probs"][b, t]
                )
            for t in where:
                label = int(live["labels"][b, t])
                q, p = spread(live["student"][b, t - 1]), spread(fixed["teacher"][b, t - 1])
                if plain:
                    texts.append(-lm * torch.log(q[label]))
                    continue
                later = [k for k in where if k > t or (inclusive and k == t)]
                weights = [gamma ** (k - t) for k in later]
                a = sum(w * reward[k] for w, k in zip(weights, later, strict=True))
                a = a / sum(weights) if sum(weights) else 0.0
                importance = float(live["importance"][b, t])
                ratio = q[label] / math.exp(float(live["old_log_probs"][b, t])) * importance
                total = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - clip, 1 + clip))
                if single:
                    exact = sum(x * (torch.log(x) - torch.log(y)) for x, y in zip(q, p, strict=True))
                    total = total + exact * (importance if weigh else 1.0)
                samples.append(total)
        return sum(samples) / len(samples) + (sum(texts) / len(texts) if texts else 0.0)

    return value


def drawn(seed):
    g = rng(seed)
    found = {
        "student": torch.randn(4, 6, 7, generator=g, dtype=torch.float64),
        "teacher": torch.randn(4, 6, 7, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, 7, (4, 6), generator=g),
        "importance": 0.75 + 0.5 * torch.rand(4, 6, generator=g, dtype=torch.float64),
        "plain": torch.zeros(4, 6, dtype=torch.long),
    }
    found["labels"][:, :2] = -100
    found["labels"][1, 4:] = -100
    found["plain"][3] = 1
    log_q = found["student"].log_softmax(-1)
    label = found["labels"].clamp_min(0).unsqueeze(-1)
    own = torch.nn.functional.pad(log_q[:, :-1].gather(-1, label[:, 1:]).squeeze(-1), (1, 0))
    found["old_log_probs"] = own + 0.1 * torch.randn(4, 6, generator=g, dtype=torch.float64)
    return found


def padded(x):
    more = {}
    for key, value in x.items():
        fill = {"labels": -100, "student": math.nan, "teacher": math.nan, "plain": 0}.get(key, 3.0)
        more[key] = torch.cat([value, value.new_full((4, 2, *value.shape[2:]), fill)], 1)
    more["plain"][3] = 1
    return more


def excluded(x):
    changed = {key: value.clone() for key, value in x.items()}
    for key in ("student", "teacher"):
        changed[key][..., 0] = -torch.inf
    changed["labels"][changed["labels"] == 0] = 1
    return changed


def loss_of(objective):
    return lambda x: objective(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)["loss"]


def case(name, objective, reference):
    return Case(
        name, drawn, loss_of(objective), reference, ("student",), padded=padded, excluded=excluded,
        couples="samples and plain text have means of their own",
        without={"least": "the sampled part has a slope wherever rewards differ"},
    )  # fmt: skip


CASES = [
    case("minillm", MiniLLM(), by_hand()),
    case("gamma", MiniLLM(gamma=0.7, lm_weight=0.5, clip=0.1), by_hand(gamma=0.7, lm=0.5, clip=0.1)),
    case("inclusive", MiniLLM(gamma=0.7, inclusive=True), by_hand(gamma=0.7, inclusive=True)),
    case("weighed", MiniLLM(weigh_single=True), by_hand(weigh=True)),
    case("per-token", OnPolicyReverseKL(), by_hand(gamma=0.0, single=False, inclusive=True)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cores(case):
    run_all(case)


# --- hand-worked -------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 9.0]])
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    assert advantages(rewards, mask).tolist() == [[0.0, 3.0, 4.0, 0.0, 0.0]]
    half = advantages(rewards, mask, 0.5)
    assert half[0, 1] == pytest.approx((0.5 * 2 + 0.25 * 4) / 0.75)
    assert advantages(rewards, mask, 0.0).abs().sum() == 0.0
    whole = advantages(rewards, mask, inclusive=True)
    assert whole.tolist() == [[0.0, pytest.approx(7 / 3), 3.0, 4.0, 0.0]]
    assert advantages(rewards, mask, 0.0, inclusive=True).tolist() == [[0.0, 1.0, 2.0, 4.0, 0.0]]
    assert advantages(rewards, mask, normalise=False).tolist() == [[0.0, 6.0, 4.0, 0.0, 0.0]]
    assert advantages(rewards, mask, 0.5, normalise=False).tolist() == [[0.0, 2.0, 2.0, 0.0, 0.0]]
    summed = advantages(rewards, mask, 0.5, inclusive=True, normalise=False)
    assert summed.tolist() == [[0.0, 3.0, 4.0, 4.0, 0.0]]


def test_the_clip_by_hand():
    log_q = torch.log(torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]))
    gain = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    found = clipped_terms(log_q, torch.zeros(5), gain, torch.ones(5), 0.2)
    assert found.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -2.2])
    weighed = clipped_terms(log_q[:1], torch.zeros(1), gain[:1], torch.tensor([0.6]), 0.2)
    assert float(weighed) == pytest.approx(-0.9)


def test_the_mixture_by_hand():
    z = 3 * torch.randn(2, 4, 9, dtype=torch.float64)
    z[0, :, 0] = -torch.inf
    found = mixed_logits(z[0], z[1], 0.2).exp()
    assert torch.allclose(found, 0.2 * z[1].softmax(-1) + 0.8 * z[0].softmax(-1))


def test_its_expected_slope_is_that_of_whole_texts():
    """Over all texts of length 3, weighed by their probability: the slope of KL(q || p), by enumeration."""
    vocabulary, length = 3, 3
    g = rng(4)
    tables = torch.randn(
        2, length, vocabulary, generator=g, dtype=torch.float64
    )  # next tokens by place alone
    texts = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    q = tables[0].clone().requires_grad_()
    log_q, log_p = q.log_softmax(-1), tables[1].log_softmax(-1)
    of = [sum(table[t, texts[:, t]] for t in range(length)) for table in (log_q, log_p)]
    (expected,) = torch.autograd.grad((of[0].exp() * (of[0] - of[1])).sum(), q)
    weights = of[0].exp().detach()
    sums = torch.zeros_like(q)
    for text, weight in zip(texts, weights, strict=True):
        labels = torch.cat([torch.tensor([-100]), text]).unsqueeze(0)
        live = tables[0].clone().requires_grad_()
        pad = live.new_zeros(1, vocabulary)
        own = torch.nn.functional.pad(log_q.detach().gather(-1, text.unsqueeze(-1)).T, (1, 0))
        batch = {"labels": labels, "old_log_probs": own}
        # without length normalisation the sum over later tokens is the mean times their number
        for t in range(length):
            single = MiniLLM(gamma=0.0)(
                Signal(logits=torch.cat([live, pad]).unsqueeze(0)),
                Signal(logits=torch.cat([tables[1], pad]).unsqueeze(0)),
                batch,
            )["loss"]
            if t == 0:
                sums += weight * length * torch.autograd.grad(single, live)[0]
        gains = advantages((log_p - log_q.detach()).gather(-1, text.unsqueeze(-1)).T, torch.ones(1, length))
        later = gains[0] * torch.tensor([2.0, 1.0, 0.0])
        chosen = live.log_softmax(-1).gather(-1, text.unsqueeze(-1)).squeeze(-1)
        terms = clipped_terms(chosen, chosen.detach(), later, torch.ones(length), 0.2)
        sums += weight * torch.autograd.grad(terms.sum(), live)[0]
    assert torch.allclose(sums, expected, atol=1e-10)


def test_an_unpromising_teacher_can_be_bounded():
    x = drawn(1)
    x["teacher"] = 100 * x["teacher"]
    found = MiniLLM(reward_clip=2.0)(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)
    assert abs(float(found["reward"])) <= 2.0


# --- the samples -------------------------------------------------------------------------------------------


def sampler(**options):
    student, teacher = make_tiny("llama", seed=1, layers=1), make_tiny("llama", seed=2, layers=2)
    settings = {"max_new_tokens": 6, "prompt_tokens": None, **options}
    return student, teacher, settings


def sharp(seed, vocab):
    """A tiny model whose distributions are far from flat."""
    model = make_tiny("llama", seed=seed, layers=1, vocab=vocab)
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    return model


def batch_of(count=3, vocab=400):
    return pad_collator(0)(rows(count, vocab=vocab))


def test_samples_keep_what_they_were_worth():
    """old_log_probs and importance from whole logits; the end counts, padding and prompt do not."""
    student, teacher, settings = sampler()
    student.generation_config.eos_token_id = list(range(3, 120))  # so that some texts end early
    policy = Rollouts(teacher, **settings)
    with seeded(1):
        found = policy.replace(student, batch_of(8), progress=0.0)
    labels, ids = found["labels"], found["input_ids"]
    assert (labels[:, :2] == -100).all() and (labels[:, 2] != -100).all()
    lengths = (labels != -100).sum(1)
    assert lengths.min() < 6
    for row, text in zip(labels.tolist(), ids.tolist(), strict=True):
        kept = [i for i, label in enumerate(row) if label != -100]
        assert kept == list(range(2, 2 + len(kept)))
        assert [text[i] for i in kept] == [row[i] for i in kept]
        ends = [i for i in kept if 3 <= row[i] < 120]
        assert ends == ([kept[-1]] if ends else []) and (ends or len(kept) == 6)
    inputs = {"input_ids": ids, "attention_mask": found["attention_mask"]}
    log_q, log_p = (m(**inputs).logits.log_softmax(-1)[:, :-1] for m in (student, teacher))
    chosen = labels[:, 1:].clamp_min(0).unsqueeze(-1)
    q, p = (z.gather(-1, chosen).squeeze(-1) for z in (log_q, log_p))
    keep = labels[:, 1:] != -100
    assert torch.allclose(found["old_log_probs"][:, 1:][keep], q[keep], atol=1e-4)
    expected = q.exp() / (0.2 * p.exp() + 0.8 * q.exp())
    assert torch.allclose(found["importance"][:, 1:][keep], expected[keep], atol=1e-4)
    assert (found["importance"][:, 1:][~keep] == 1).all() and (
        found["old_log_probs"][:, 1:][~keep] == 0
    ).all()


def test_samples_follow_the_mixture():
    """The first token of many samples, against the mixture's probabilities."""
    student, teacher = sharp(1, 12), sharp(2, 12)
    policy = Rollouts(teacher, alpha=0.5, max_new_tokens=1)
    student.generation_config.eos_token_id = None
    student.config.eos_token_id = None
    ids = torch.tensor([[5, 7, 3]]).repeat(4000, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    with seeded(0):
        found = policy.replace(student, batch, progress=0.0)["labels"][:, 3]
    p, q = (m(input_ids=ids[:1]).logits[0, -1].softmax(-1) for m in (teacher, student))
    share = torch.bincount(found, minlength=12) / 4000
    assert float((share - 0.5 * (p + q)).abs().max().detach()) < 0.03
    assert float((share - q).abs().max().detach()) > 0.1


def test_without_mixture_the_weights_are_one():
    student, teacher, settings = sampler()
    for policy in (Rollouts(teacher, alpha=0.0, **settings), Rollouts(**settings)):
        with seeded(0):
            found = policy.replace(student, batch_of(), progress=0.0)
        assert (found["importance"] == 1).all()


def test_sampling_hotter_is_weighed():
    student, _, settings = sampler(temperature=2.0)
    with seeded(0):
        found = Rollouts(**settings).replace(student, batch_of(), progress=0.0)
    log_q = student(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits[:, :-1]
    chosen = found["labels"][:, 1:].clamp_min(0).unsqueeze(-1)
    cold, hot = ((z.log_softmax(-1).gather(-1, chosen).squeeze(-1).exp()) for z in (log_q, log_q / 2.0))
    keep = found["labels"][:, 1:] != -100
    assert torch.allclose(found["importance"][:, 1:][keep], (cold / hot)[keep], rtol=1e-3)


def test_samples_are_used_again_by_updates_not_micro_batches():
    student, teacher, settings = sampler()
    policy = Rollouts(teacher, reuse=2, **settings)
    found = []
    with seeded(0):
        for update in range(3):
            found += [policy.replace(student, batch_of(), progress=update / 3) for _ in range(2)]
    same = [[torch.equal(a["input_ids"], b["input_ids"]) for b in found] for a in found]
    assert same[0] == [True, False, True, False, False, False]
    assert same[1] == [False, True, False, True, False, False]


def test_another_student_or_run_gets_its_own_samples():
    student, teacher, settings = sampler()
    other = make_tiny("llama", seed=9, layers=1)
    policy = Rollouts(teacher, reuse=3, **settings)
    found = [policy.replace(model, batch_of(), progress=at)["input_ids"]
             for model, at in ((student, 0.0), (student, 0.5), (other, 0.5), (other, 0.75), (other, 0.0))]  # fmt: skip
    assert [torch.equal(a, b) for a, b in itertools.pairwise(found)] == [True, False, True, False]


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [(400, 60), (60, 400)])
def test_truncated_vocabularies_bound_the_samples(tmp_path, alpha, sizes):
    student, teacher = (make_tiny("llama", seed=2 - i, layers=1, vocab=v) for i, v in enumerate(sizes))
    policy = Rollouts(teacher, alpha=alpha, max_new_tokens=16)
    made = Distiller(
        student=student, teacher=teacher, objective=MiniLLM(), policy=policy, align_vocab="truncate",
        train_dataset=[{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}] * 8,
        args=arguments(tmp_path, max_steps=2),
    )  # fmt: skip
    made.train()
    found = policy.sampled(student, made.data_collator([made.train_dataset[i] for i in range(8)]))
    assert int(found["labels"].max()) < 60
    with torch.no_grad():
        log_q = student(input_ids=found["input_ids"]).logits[:, :-1, :60].log_softmax(-1)
    expected = log_q.gather(-1, found["labels"][:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    keep = found["labels"][:, 1:] != -100
    assert torch.allclose(found["old_log_probs"][:, 1:][keep], expected[keep], atol=1e-4)


def test_shares_are_exact_in_double():
    x = {name: value for name, value in drawn(0).items() if name != "plain"}
    x["labels"][:, 0] = -100
    keep = int((x["labels"] != -100).sum())
    found = MiniLLM(gamma=0.0)(Signal(logits=x["student"]), Signal(logits=x["teacher"]), x)
    log_q, log_p = (x[name].log_softmax(-1)[:, :-1] for name in ("student", "teacher"))
    exact = (log_q.exp() * (log_q - log_p)).sum(-1)[x["labels"][:, 1:] != -100].sum() / keep
    assert float(found["single"]) == pytest.approx(float(exact), rel=1e-13)


def test_plain_text_without_labels_is_learnt_whole():
    student, teacher, settings = sampler()
    ids = list(range(3, 23))
    found = Rollouts(teacher, plain=[{"input_ids": ids}], **settings).replace(
        student, batch_of(), progress=0.0
    )
    assert found["labels"][-1, : len(ids)].tolist() == ids


def test_plain_text_is_put_below():
    student, teacher, settings = sampler()
    text = [{"input_ids": list(range(3, 23)), "labels": list(range(3, 23))}]
    with seeded(0):
        found = Rollouts(teacher, plain=text, **settings).replace(student, batch_of(), progress=0.0)
    assert found["input_ids"].shape == (6, 20)
    assert all(value.shape == (6, 20) for value in found.values())
    assert (found["plain"][:3] == 0).all() and (found["plain"][3:] == 1).all()
    assert found["labels"][3].tolist() == list(range(3, 23))
    counts = MiniLLM().totals(found)
    assert int(counts["text_tokens"]) == 3 * 19
    assert int(counts["sample_tokens"]) == int((found["labels"][:3] != -100).sum())


def test_sampling_leaves_mode_and_gradients_alone():
    student, teacher, settings = sampler()
    student.train()
    before = state(student)
    with seeded(0):
        Rollouts(teacher, **settings).replace(student, batch_of(), progress=0.0)
    assert student.training and all(p.grad is None for p in student.parameters())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


# --- through the trainer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MiniLLM, OnPolicyReverseKL])
def test_the_student_comes_nearer(kind):
    """The KL on its own samples falls; it keeps its own parameters; the teacher is untouched."""
    student, teacher = sharp(1, 40), sharp(2, 40)
    kept, names = state(teacher), list(student.state_dict())

    def distance():
        with seeded(7):
            own = Rollouts(max_new_tokens=8).replace(student, batch_of(64, 40), progress=0.0)
        inputs = {"input_ids": own["input_ids"], "attention_mask": own["attention_mask"]}
        with torch.no_grad():
            log_q, log_p = (m(**inputs).logits.log_softmax(-1)[:, :-1] for m in (student, teacher))
        return float((log_q.exp() * (log_q - log_p)).sum(-1)[own["labels"][:, 1:] != -100].mean())

    before = distance()
    with seeded(0):
        made = Distiller(
            student=student, teacher=teacher, objective=kind(lm_weight=0.1), train_dataset=rows(12, vocab=40),
            policy=Rollouts(teacher, max_new_tokens=8, plain=rows(4, vocab=40)),
            args=arguments("unused", max_steps=40, per_device_train_batch_size=12),
        )  # fmt: skip
        made.train()
    assert distance() < 0.8 * before
    assert list(student.state_dict()) == names
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    assert not any("policy" in name for name in made.model.state_dict())


def threes(batch):
    """A reward: how many of a sample's tokens are below 10."""
    return ((batch["labels"] != -100) & (batch["labels"] < 10)).sum(1).float()


def test_a_reward_counts_at_the_last_token():
    student, teacher, settings = sampler(plain=rows(2))
    with seeded(0):
        found = Rollouts(reward=threes, **settings).replace(student, batch_of(), progress=0.0)
    assert torch.equal(found["bonus"][:3].sum(1), threes(found)[:3])
    assert (found["bonus"][3:] == 0).all()
    for row, labels in zip(found["bonus"][:3], found["labels"][:3], strict=True):
        last = int((labels != -100).nonzero()[-1])
        assert float(row.abs().sum()) == float(row[last])
    signals = [Signal(logits=m(input_ids=found["input_ids"]).logits.detach()) for m in (student, teacher)]
    value = RewardMinusKL(kl_weight=0.0, lm_weight=0.0)(*signals, found)["loss"]
    lengths = (found["labels"][:3] != -100).sum(1)
    assert float(value) == pytest.approx(
        -float((threes(found)[:3] * lengths).sum() / lengths.sum()), rel=1e-3
    )
    with pytest.raises(BadInput, match="reward"):
        Rollouts(reward=lambda batch: torch.zeros(1), **settings).replace(student, batch_of(), progress=0.0)
    with pytest.raises(BadInput, match="reward"):
        RewardMinusKL()(*signals, {k: v for k, v in found.items() if k != "bonus"})


def test_a_reward_is_pursued_and_the_reference_holds_back():
    rewards = []
    for weight in (0.0, 5.0):
        student, reference = sharp(1, 40), sharp(1, 40)
        with seeded(0):
            made = Distiller(
                student=student, teacher=reference, objective=RewardMinusKL(kl_weight=weight),
                policy=Rollouts(reward=threes, max_new_tokens=6), train_dataset=rows(12, vocab=40),
                args=arguments("unused", max_steps=30, per_device_train_batch_size=12),
            )  # fmt: skip
            made.train()
        with seeded(3):
            own = Rollouts(max_new_tokens=6).replace(student, batch_of(64, 40), progress=0.0)
            before = Rollouts(max_new_tokens=6).replace(reference, batch_of(64, 40), progress=0.0)
        rewards.append(float(threes(own).mean() - threes(before).mean()))
    assert rewards[0] > 1.0
    assert rewards[1] < 0.5 * rewards[0]


def test_micro_batches_and_one_batch_agree():
    """Sums over the update's tokens, whatever they were cut into."""
    student, teacher, settings = sampler()
    text = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))}]
    with seeded(0):
        whole = Rollouts(teacher, plain=text, **settings).replace(student, batch_of(4), progress=0.0)
    objective = MiniLLM()
    whole["labels"][1, 5:] = -100
    signals = [
        {key: Signal(logits=m(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits[part])
         for key, m in (("student", student), ("teacher", teacher))}
        for part in (slice(None), [0, 1, 4], [2, 3, 5, 6, 7])
    ]  # fmt: skip
    totals = objective.totals(whole)
    values = []
    for pair, part in zip(signals, (slice(None), [0, 1, 4], [2, 3, 5, 6, 7]), strict=True):
        batch = {**{name: value[part] for name, value in whole.items()}, **totals}
        found = objective(pair["student"], pair["teacher"], batch)
        values.append({k: float(v.detach()) for k, v in found.items()})
    for name in values[0]:
        assert values[1][name] + values[2][name] == pytest.approx(values[0][name], rel=1e-4, abs=1e-6)


def test_bad_input():
    weights = [("lm_weight", -1.0), ("lm_weight", math.nan), ("kl_weight", math.inf)]
    for name, given in (("gamma", 1.5), ("clip", -0.1), *weights, ("reward_clip", 0.0)):
        with pytest.raises(BadInput, match=name):
            MiniLLM(**{name: given})
    assert Rollouts().alpha == 0.0
    for name, given in (("alpha", 1.0), ("alpha", 0.5), ("reuse", 0), ("plain", []), ("max_new_tokens", 0)):
        with pytest.raises(BadInput, match=name):
            Rollouts(**{name: given})
    x = drawn(0)
    with pytest.raises(BadInput, match="Rollouts"):
        MiniLLM()(Signal(logits=x["student"]), Signal(logits=x["teacher"]), {"labels": x["labels"]})
    sparse = Signal(sparse=(x["labels"].unsqueeze(-1), torch.zeros(4, 6, 1)))
    with pytest.raises(NotApplicable, match="teacher"):
        MiniLLM()(Signal(logits=x["student"]), sparse, x)
