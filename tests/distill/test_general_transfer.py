"""general-transfer: what only this method must hold."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from distilling import Case, Trained, rng, rows, shapes, state
from torch import nn

from transfuse.core.batches import minibatches, pad_collator
from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.training import generator, seeded
from transfuse.distill._flips import aligned
from transfuse.distill.general_transfer import (
    GeneralTransfer,
    calibrate,
    choose,
    complementarity,
    confidence,
    prediction_flips,
    soup,
    transfer_loss,
    transfer_rate,
)


def softmax_by_hand(z):
    e = torch.exp(z - z.detach().max())
    return e / e.sum()


def kl_by_hand(p, q):
    total = torch.zeros((), dtype=q.dtype)
    for v in range(len(p)):
        if float(p[v]) > 0:
            total = total + p[v] * (torch.log(p[v]) - torch.log(q[v]))
    return total


def teacher_by_hand(models, label):
    """Index of the surest model, the first of equals; `label` None is unsupervised."""
    sure = [softmax_by_hand(z) for z in models]
    sure = [float(p.max()) if label is None else float(p[label]) for p in sure]
    best = 0
    for k in range(1, len(sure)):
        if sure[k] > sure[best]:
            best = k
    return best


def logits_case(name, *, supervised, temperature=1.0, alpha=1.0, legacy=False, teachers=1):
    """[B, C] logits; the target is chosen among the frozen student and the teachers."""
    names = [f"teacher{k}" for k in range(teachers)]

    def inputs(seed):
        g = rng(seed)
        made = {
            key: 2 * torch.randn(6, 5, generator=g, dtype=torch.float64)
            for key in ("student", "frozen", *names)
        }
        return {**made, "labels": torch.randint(0, 5, (6,), generator=g)}

    def loss(x):
        gold = x["labels"] if supervised else None
        target, _ = choose(x["frozen"], [x[n] for n in names], gold)
        return transfer_loss(
            x["student"], target, x["labels"], temperature=temperature, alpha=alpha,
            legacy_double_softmax=legacy,
        )  # fmt: skip

    def reference(live, fixed):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(live["labels"])):
            label = int(live["labels"][i])
            models = [fixed["frozen"][i], *(fixed[n][i] for n in names)]
            target = models[teacher_by_hand(models, label if supervised else None)]
            divergence = kl_by_hand(
                softmax_by_hand(target / temperature), softmax_by_hand(live["student"][i] / temperature)
            )
            p = softmax_by_hand(live["student"][i])
            q = softmax_by_hand(p) if legacy else p
            total = total + alpha * temperature**2 * divergence - (1 - alpha) * torch.log(q[label])
        return total / len(live["labels"])

    def least(x):
        return {**x, **dict.fromkeys(["frozen", *names], x["student"])}

    def excluded(x):
        changed = {key: value.clone() for key, value in x.items()}
        for key in ("student", "frozen", *names):
            changed[key][:, 0] = -torch.inf
        changed["labels"].clamp_(min=1)
        return changed

    why = {"padded": "a classifier's batch has no padding; the token case has"}
    if alpha < 1:
        why["least"] = "the labels pull away from the teacher"
    return Case(
        name, inputs, loss, reference, ("student",), least=least if alpha == 1 else None, excluded=excluded,
        without=why,
    )  # fmt: skip


def token_wise():
    """[B, T, V] logits of causal models, masked labels."""

    def inputs(seed):
        g = rng(seed)
        made = {
            key: 2 * torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
            for key in ("student", "frozen", "teacher")
        }
        labels = torch.randint(0, 7, (3, 5), generator=g)
        labels[0, :2] = -100
        labels[2, 3:] = -100
        return {**made, "labels": labels}

    def loss(x):
        student, frozen, teacher = (
            aligned(x[key], x["labels"], causal=True)[0] for key in ("student", "frozen", "teacher")
        )
        gold = aligned(x["student"], x["labels"], causal=True)[1]
        return transfer_loss(student, choose(frozen, [teacher], gold)[0], gold)

    def reference(live, fixed):
        values = []
        for b in range(live["labels"].shape[0]):
            for t in range(1, live["labels"].shape[1]):
                label = int(live["labels"][b, t])
                if label == -100:
                    continue
                models = [fixed["frozen"][b, t - 1], fixed["teacher"][b, t - 1]]
                target = models[teacher_by_hand(models, label)]
                values.append(kl_by_hand(softmax_by_hand(target), softmax_by_hand(live["student"][b, t - 1])))
        return torch.stack(values).mean()

    def padded(x):
        more = {}
        for key, value in x.items():
            extra = value.new_full((3, 2, *value.shape[2:]), -100 if key == "labels" else 0)
            more[key] = torch.cat([value, extra + (0 if key == "labels" else math.nan)], 1)
        return {**more, "labels": more["labels"].long()}

    def excluded(x):
        changed = {key: value.clone() for key, value in x.items()}
        for key in ("student", "frozen", "teacher"):
            changed[key][..., 0] = -torch.inf
        changed["labels"][changed["labels"] == 0] = 1
        return changed

    return Case(
        "tokens", inputs, loss, reference, ("student",), padded=padded, excluded=excluded,
        least=lambda x: {**x, "frozen": x["student"], "teacher": x["student"]},
        count=lambda x: float((x["labels"][:, 1:] != -100).sum()),
    )  # fmt: skip


CASES = [
    logits_case("labels", supervised=True),
    logits_case("confidence", supervised=False, temperature=2.0),
    logits_case("xe-kl", supervised=True, alpha=0.5),
    logits_case("legacy", supervised=True, alpha=0.68, legacy=True),
    logits_case("three-teachers", supervised=True, teachers=3),
    logits_case("three-teachers-unsupervised", supervised=False, teachers=3, temperature=0.5),
    token_wise(),
]


class Net(nn.Sequential):
    def __init__(self, seed, width=8, drop=0.0, norm=False):
        with seeded(seed):
            middle = [nn.BatchNorm1d(width)] if norm else [nn.Dropout(drop)]
            super().__init__(nn.Linear(6, width), *middle, nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x):
        return super().forward(x)


def data(count=48, seed=0, labels=True):
    x = torch.randn(count, 6, generator=generator(seed))
    columns = {"x": x, "labels": x[:, :4].argmax(-1)} if labels else {"x": x}
    return minibatches(columns, 12, seed=seed)


def train(seed):
    student, teachers = Net(1), [Net(2, 16), Net(3, 5)]
    kept = [(state(teacher), teacher) for teacher in teachers]
    before = shapes(student)
    stages = GeneralTransfer(student, teachers).fit(data(seed=seed), epochs=12, lr=0.1, seed=seed)
    return Trained(stages[0].history.losses, student, before, kept)


# --- the study -------------------------------------------------------------------------------------------


def test_flips_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    before = torch.tensor([0, 1, 1, 0, 0, 0, 2, 3])
    after = torch.tensor([0, 0, 2, 2, 2, 2, 0, 3])
    flips = prediction_flips(before, after, labels)
    assert flips.positive == 3 / 8 and flips.negative == 2 / 8  # a change between two wrong ones is neither
    assert flips.positive_counts.tolist() == [1, 0, 2, 0]
    assert flips.negative_counts.tolist() == [0, 1, 1, 0]
    assert flips.accuracy_after - flips.accuracy_before == pytest.approx(flips.positive - flips.negative)
    assert flips.entropy == pytest.approx(-(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3))
    assert flips.top_share(25) == pytest.approx(2 / 3) and flips.top_share(26) == 1.0
    assert flips.top_classes(50) == [2] and flips.top_classes(100) == [2, 0]  # not one too many
    assert math.isnan(prediction_flips(labels, labels, labels).entropy)
    assert math.isnan(prediction_flips(labels, labels, labels).top_share(10))
    assert prediction_flips(labels, labels, labels).top_classes(10) == []
    mirrored = prediction_flips(after, before, labels)
    assert (mirrored.positive, mirrored.negative) == (flips.negative, flips.positive)


def test_masked_rows_and_more_than_a_thousand_classes():
    labels = torch.tensor([1500, -100, 3])
    flips = prediction_flips(torch.tensor([0, 1, 3]), torch.tensor([1500, 2, 3]), labels)
    assert flips.positive == 0.5 and len(flips.positive_counts) == 1501
    with pytest.raises(BadInput, match="labels"):
        prediction_flips(torch.tensor([0]), torch.tensor([1]), torch.tensor([-100]))
    with pytest.raises(BadInput, match="pair up"):
        prediction_flips(torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([0]))
    for percent in (0, 101):
        with pytest.raises(BadInput, match="percent"):
            flips.top_share(percent)


def test_transfer_rate_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    start = torch.tensor([1, 1, 0, 0, 1, 0])
    teacher = torch.tensor([0, 0, 1, 0, 1, 0])  # offers two flips, both in class 0
    end = torch.tensor([0, 1, 0, 1, 1, 2])  # gains one each in classes 0, 1, 2: only class 0 counts
    assert transfer_rate(start, end, teacher, labels) == pytest.approx(50.0)
    assert transfer_rate(start, teacher, teacher, labels) == pytest.approx(100.0)
    assert transfer_rate(start, start, teacher, labels) == 0.0
    assert math.isnan(transfer_rate(start, end, start, labels))
    nothing = labels[:0]
    for given in ((nothing,) * 4, (start, end, teacher, nothing), (start, end[:3], teacher, labels)):
        with pytest.raises(BadInput, match="labels"):
            transfer_rate(*given)


def test_the_study_of_two_models_runs_in_evaluation_mode_and_restores_it():
    a, b = Net(1, drop=0.9).train(), Net(2, drop=0.9)
    batches = list(data()(0))
    flips = complementarity(a, b, batches)
    assert a.training and all(p.requires_grad for p in a.parameters())
    x, y = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    first, second = a.eval()(x).argmax(-1) == y, b.eval()(x).argmax(-1) == y
    assert flips.positive == pytest.approx(float((~first & second).double().mean()))
    assert flips.negative == pytest.approx(float((first & ~second).double().mean()))
    with pytest.raises(BadInput, match="labels"):
        complementarity(a, b, data(labels=False))
    loader = torch.utils.data.DataLoader(
        [{"x": row, "labels": label} for row, label in zip(x, y, strict=True)], batch_size=8, shuffle=True
    )
    with pytest.raises(BadInput, match="shuffle"):
        complementarity(a, b, loader)


def test_the_study_compares_label_spaces():
    wide = Net(2)
    wide[3] = nn.Linear(8, 6)
    with pytest.raises(IncompatibleModels, match="label space"):
        complementarity(Net(1), wide, data())
    pair = [Net(1), Net(1)]
    for model, names in zip(pair, ("abcd", "dcba"), strict=True):
        model.config = SimpleNamespace(id2label=dict(enumerate(names)))
    with pytest.raises(IncompatibleModels, match="class"):
        complementarity(*pair, data())


def test_the_study_of_language_models_counts_tokens():
    models = [make_tiny("llama", seed=i, layers=1) for i in (1, 2)]
    batch = pad_collator(0)([{**row, "labels": row["labels"][: 10 - i]} for i, row in enumerate(rows(3))])
    batch["labels"][1, 5] = -100
    flips = complementarity(*models, [batch])
    keep = batch["labels"][:, 1:] != -100
    truth = batch["labels"][:, 1:][keep]
    right = [m(batch["input_ids"]).logits[:, :-1].argmax(-1)[keep] == truth for m in models]
    assert flips.accuracy_before == pytest.approx(float(right[0].double().mean()))
    assert flips.positive == pytest.approx(float((~right[0] & right[1]).double().mean()))


# --- the choice ------------------------------------------------------------------------------------------


def test_the_choice_by_hand():
    frozen = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    teacher = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    target, who = choose(frozen, [teacher], labels)
    assert who.tolist() == [1, 0, 0]  # surer and right; sure and wrong; a tie is the student's
    assert torch.equal(target, torch.stack([teacher[0], frozen[1], frozen[2]]))
    assert choose(frozen, [teacher])[1].tolist() == [1, 1, 0]  # without labels the over-confident one wins
    assert choose(frozen, [teacher], temperatures=[1.0, 4.0])[1].tolist() == [0, 0, 0]  # calibrated
    assert confidence(teacher[:1], temperature=3.0).item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_several_teachers_and_the_first_of_equals():
    z = torch.tensor([[1.0, 0.0]])
    _, who = choose(z, [2 * z, 3 * z, 3 * z, z], torch.tensor([0]))
    assert who.tolist() == [2]


def test_calibration_finds_the_temperature_that_made_the_labels():
    g = generator(0)
    z = 3 * torch.randn(20_000, 5, generator=g, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(z / 2.5, -1), 1, generator=g).squeeze(1)
    assert calibrate(z, labels) == pytest.approx(2.5, rel=0.05)
    assert calibrate(z / 2.5, labels) == pytest.approx(1.0, rel=0.05)
    assert calibrate(z, z.argmax(-1)) == pytest.approx(0.01)  # the bound


def test_calibration_leaves_out_what_no_temperature_fits():
    """Rows without a class, classes that are ruled out, and rows whose class is ruled out."""
    g = generator(0)
    z = 3 * torch.randn(5_000, 4, generator=g, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(z[:, :3] / 2.5, -1), 1, generator=g).squeeze(1)
    wanted = calibrate(z[:, :3], labels)
    z[:, 3] = -math.inf
    assert calibrate(z, labels) == pytest.approx(wanted) == pytest.approx(2.5, rel=0.1)
    more = torch.cat([labels, torch.tensor([-100, 3])])
    assert calibrate(torch.cat([z, z[:2]]), more) == pytest.approx(wanted)
    assert calibrate(torch.tensor([[0.0, -math.inf], [1.0, -math.inf]]), torch.tensor([0, 0])) == 1.0
    assert calibrate(torch.zeros(3, 2), torch.tensor([0, 1, 1])) == 1.0
    for logits, bad in (
        (z[:0], labels[:0]),
        (z[:2], torch.tensor([-100, -100])),
        (z[:1], torch.tensor([3])),
        (z[:2], labels[:3]),
        (z[:2] * math.nan, labels[:2]),
    ):
        with pytest.raises(BadInput, match=r"labels|logits"):
            calibrate(logits, bad)


def test_the_surer_of_two_sure_models():
    """Probabilities that float32 rounds to 1 still differ, and so do those that it rounds to 0."""
    ours, theirs = torch.tensor([[20.0, 0.0], [0.0, 200.0]]), torch.tensor([[40.0, 0.0], [0.0, 120.0]])
    assert choose(ours, [theirs], torch.tensor([0, 0]))[1].tolist() == [1, 1]
    assert choose(ours, [theirs])[1].tolist() == [1, 0]
    masked = torch.tensor([[5.0, -math.inf]])
    assert choose(masked, [masked], torch.tensor([0]))[1].tolist() == [0]


def test_temperatures_for_other_models_are_refused():
    z = torch.zeros(2, 3)
    for temperatures in ([1.0, 1.0], [1.0] * 4, []):
        with pytest.raises(BadInput, match="temperatures"):
            choose(z, (z for _ in range(2)), temperatures=temperatures)


def test_soup_is_the_mean():
    states = [Net(i, norm=True).state_dict() for i in (1, 2, 3)]
    mean = soup(states)
    assert torch.allclose(mean["0.weight"], sum(s["0.weight"] for s in states) / 3)
    assert mean["1.num_batches_tracked"].dtype == torch.int64
    assert mean.keys() == states[0].keys()
    for wrong in (
        [],
        [{"a": torch.ones(2)}, {"b": torch.ones(2)}],
        [{"a": torch.ones(2)}, {"a": torch.ones(3)}],
    ):
        with pytest.raises(BadInput, match="states"):
            soup(wrong)


# --- training --------------------------------------------------------------------------------------------


def one_step(student, teacher, x, y, partition, lr=0.5, **options):
    GeneralTransfer(student, teacher, partition=partition, **options).fit(
        [{"x": x, "labels": y}], epochs=2, lr=lr, momentum=0.0, weight_decay=0.0
    )
    return [p.detach() for p in student.parameters()]


def by_autograd(student, teacher, x, y, partition, lr=0.5):
    """Two steps; the choice is made by the student at its start."""
    start = copy.deepcopy(student).eval()
    fixed, theirs = start(x).detach(), teacher.eval()(x).detach()
    p, q = torch.softmax(theirs, -1), torch.softmax(fixed, -1)
    row = torch.arange(len(y))
    mask = {
        "labels": p[row, y] > q[row, y],
        "confidence": p.max(-1).values > q.max(-1).values,
        "none": torch.ones(len(y), dtype=torch.bool),
        "student": torch.zeros(len(y), dtype=torch.bool),
    }[partition]
    target = torch.softmax(torch.where(mask[:, None], theirs, fixed), -1)
    for _ in range(2):
        z = torch.log_softmax(student(x), -1)
        loss = (target * (target.log() - z)).sum() / len(x)
        slopes = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(student.parameters(), slopes, strict=True):
                parameter -= lr * slope
    return list(student.parameters())


@pytest.mark.parametrize("partition", ["labels", "confidence", "none", "student"])
def test_two_steps_against_autograd(partition):
    """With the mask of the frozen student, not of the one that moves."""
    x = 2 * torch.randn(20, 6, generator=generator(3))
    y = x[:, :4].argmax(-1)
    found = one_step(Net(1), Net(2), x, y, partition)
    expected = by_autograd(Net(1), Net(2), x, y, partition)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    moved = max(float((a - b.detach()).abs().max()) for a, b in zip(found, Net(1).parameters(), strict=True))
    assert (moved < 1e-6) == (partition == "student")  # nothing to learn from oneself


def test_the_frozen_copy_is_in_evaluation_mode_and_the_student_is_not():
    """Self-distillation of a student with dropout: its loss is not zero, because the target has none."""
    stages = GeneralTransfer(Net(1, drop=0.5).eval(), Net(2), partition="student").fit(
        data(), epochs=1, lr=0.0
    )
    assert min(stages[0].history.losses) > 1e-3
    teacher = Net(2, drop=0.5).train()
    x = torch.randn(9, 6, generator=generator(0))
    y = x[:, :4].argmax(-1)
    found = one_step(Net(1), teacher, x, y, "none")
    expected = by_autograd(Net(1), copy.deepcopy(teacher), x, y, "none")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert teacher.training


def test_batch_norm_statistics_stay_on_request():
    for freeze in (True, False):
        student = Net(1, norm=True)
        before = student[1].running_mean.clone()
        GeneralTransfer(student, Net(2), freeze_batchnorm=freeze).fit(data(), epochs=1)
        assert torch.equal(student[1].running_mean, before) == freeze
        assert student[1].training


def test_sequence_refreshes_the_frozen_copy_and_the_optimizer():
    teachers = [Net(2), Net(3)]
    whole = Net(1)
    stages = GeneralTransfer(whole, teachers, mode="sequential").fit(data(), epochs=2, lr=0.2)
    parts = Net(1)
    for teacher in teachers:
        GeneralTransfer(parts, teacher).fit(data(), epochs=2, lr=0.2)
    assert [stage.teachers for stage in stages] == [(0,), (1,)]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_the_order_of_a_sequence():
    good, bad = Net(2), Net(3)
    GeneralTransfer(good, Net(9), partition="none", alpha=0.0).fit(data(), epochs=20, lr=0.5)
    for order, expected in (("given", [1, 0]), ("ascending", [1, 0]), ("descending", [0, 1])):
        teachers = [good, bad] if order != "given" else [bad, good]
        stages = GeneralTransfer(Net(1), teachers, mode="sequential", order=order).fit(data(), epochs=1)
        numbers = [stage.teachers[0] for stage in stages]
        assert numbers == ([0, 1] if order == "given" else expected)


@pytest.mark.parametrize("order", ["given", "ascending", "descending"])
def test_the_global_random_state_stays(order):
    x = torch.randn(24, 6, generator=generator(0))
    loader = torch.utils.data.DataLoader(
        [{"x": row, "labels": row[:4].argmax(-1)} for row in x], batch_size=12, shuffle=True
    )
    student, teachers = Net(1), [Net(2), Net(3)]
    before = torch.get_rng_state()
    GeneralTransfer(student, teachers, mode="sequential", order=order).fit(loader, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_soup_averages_separate_transfers():
    teachers = [Net(2), Net(3)]
    found, ends = Net(1), []
    GeneralTransfer(found, teachers, mode="soup").fit(data(), epochs=2, lr=0.2)
    for teacher in teachers:
        ends.append(Net(1))
        GeneralTransfer(ends[-1], teacher).fit(data(), epochs=2, lr=0.2)
    expected = soup([end.state_dict() for end in ends])
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.items())


def test_slow_weights_by_hand():
    """tau and the interval; the slow weights are what is kept, and they start at the student's start."""
    fast: list[dict] = []
    student = Net(1)
    theta = state(student)
    plain = Net(1)
    GeneralTransfer(plain, Net(2), alpha=0.68).fit(
        data(), epochs=2, lr=0.2, on_step=lambda *_: fast.append(state(plain))
    )
    GeneralTransfer(student, Net(2), alpha=0.68, tau=0.75, every=3).fit(data(), epochs=2, lr=0.2)
    for n, now in enumerate(fast, 1):
        if n % 3 == 0:
            theta = {name: 0.75 * value + 0.25 * now[name] for name, value in theta.items()}
    assert len(fast) == 8
    assert all(torch.allclose(student.state_dict()[name], value, atol=1e-7) for name, value in theta.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_slow_weights_move_in_half_precision(dtype):
    """Steps of 1 - tau are smaller than a half precision's digits: they are summed in float32."""
    fast: list[dict] = []
    student, teacher = (Net(i).to(dtype) for i in (1, 2))
    theta = {name: value.double() for name, value in state(student).items()}
    batches = [{key: v.to(dtype) if key == "x" else v for key, v in batch.items()} for batch in data()(0)]
    method = GeneralTransfer(student, teacher, alpha=0.68, tau=0.999, every=1)
    method.fit(batches, epochs=30, lr=0.5, on_step=lambda *_: fast.append(state(student)))
    for now in fast:
        theta = {name: 0.999 * value + 0.001 * now[name].double() for name, value in theta.items()}
    start = Net(1).to(dtype).state_dict()
    assert any(not torch.equal(value.to(dtype), start[name]) for name, value in theta.items())
    for name, value in student.state_dict().items():
        assert value.dtype == dtype
        close = {"rtol": 8e-3, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-12}
        assert torch.allclose(value.double(), theta[name], **close), name


def test_the_papers_rates_are_scaled_by_the_batch():
    """1e-4 per 256 rows; 2 slow steps per 256 rows become 43 at 12."""
    losses = []
    for lr in (None, 1e-4 * 12 / 256):
        losses.append(GeneralTransfer(Net(1), Net(2)).fit(data(), epochs=2, lr=lr)[0].history.losses)
    assert losses[0] == losses[1]
    student = Net(1)
    GeneralTransfer(student, Net(2), tau=0.5).fit(data(), epochs=10)  # 40 updates
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), Net(1).parameters(), strict=True))
    GeneralTransfer(student, Net(2), tau=0.5).fit(data(), epochs=11)  # 44 updates
    assert not torch.equal(student[0].weight, Net(1)[0].weight)


PROGRAM = """
    import json, sys
    sys.path[:0] = [{tests!r}, {tests!r} + "/distill"]
    from test_general_transfer import GeneralTransfer, Net, data
    from accelerate import PartialState

    student, ends = Net(1), []
    for epochs in (10, 11):
        history = GeneralTransfer(student, Net(2), tau=0.5).fit(data(), epochs=epochs)[0].history
        ends.append(float((student[0].weight - Net(1)[0].weight).abs().max()))
    if PartialState().is_main_process:
        print("RESULT " + json.dumps([history.losses, ends, PartialState().num_processes]))
"""


def test_the_papers_rates_count_every_process(tmp_path):
    """Two processes with 12 rows each make 24 an update, as two batches of one process do: rate and slow steps."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(tests=str(Path(__file__).resolve().parents[1]))))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=240
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    losses, ends, processes = json.loads(lines[0][7:])
    assert processes == 2 and len(losses) == 22  # a slow step every 21 updates: 512 / 24
    assert ends[0] == 0.0 < ends[1]
    student = Net(1)
    alone = GeneralTransfer(student, Net(2), tau=0.5).fit(data(), epochs=11, accumulation=2)
    assert losses == pytest.approx(alone[0].history.losses, rel=1e-5)
    assert not torch.equal(student[0].weight, Net(1)[0].weight)


def test_it_resumes_with_its_slow_weights(tmp_path):
    class Stop(Exception):
        pass

    def stop(count, loss):
        if count == 5:
            raise Stop

    def run(folder, on_step=None):
        student = Net(1)
        method = GeneralTransfer(student, [Net(2), Net(3)], mode="sequential", tau=0.9, every=1)
        method.fit(data(), epochs=2, lr=0.2, output_dir=folder, save_every=2, on_step=on_step)
        return student

    whole = run(None)
    with pytest.raises(Stop):
        run(tmp_path / "run", stop)
    again = run(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    def fit(teacher=2, **options):
        method = GeneralTransfer(Net(1), Net(teacher), **options)
        return method.fit(data(), epochs=1, lr=0.1, output_dir=tmp_path)

    fit()
    assert fit()[0].history.resumed_at
    for other in ({"alpha": 0.5}, {"temperature": 2.0}, {"partition": "confidence"}, {"teacher": 3}):
        with pytest.raises(BadInput, match="other arguments"):
            fit(**other)


def test_labels_are_not_needed_for_confidence():
    student = Net(1)
    stages = GeneralTransfer(student, Net(2), partition="confidence").fit(
        data(labels=False), epochs=1, lr=0.1
    )
    assert 0 < stages[0].teacher_share < 1
    assert not torch.equal(student[0].weight, Net(1)[0].weight)
    for options in ({"partition": "labels"}, {"partition": "none", "alpha": 0.5}):
        with pytest.raises(BadInput, match="labels"):
            GeneralTransfer(Net(1), Net(2), **options).fit(data(labels=False))


def test_a_later_batch_without_labels():
    batches = [dict(next(iter(data()(0)))), {"x": torch.zeros(3, 6)}]
    for options in ({}, {"partition": "none", "alpha": 0.5}):
        with pytest.raises(BadInput, match="labels"):
            GeneralTransfer(Net(1), Net(2), **options).fit(batches, epochs=1)


class Tagger(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with seeded(seed):
            self.table = nn.Embedding(9, 4)

    def forward(self, input_ids):
        return self.table(input_ids)


def test_padding_without_labels_does_not_count():
    ids = torch.randint(1, 9, (3, 5), generator=generator(0))
    found = []
    for left, right in ((0, 0), (0, 3), (2, 1)):
        batch = {
            key: nn.functional.pad(value, (left, right))
            for key, value in {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.items()
        }
        student = Tagger(1)
        method = GeneralTransfer(student, Tagger(2), partition="confidence")
        stages = method.fit([batch], epochs=2, lr=0.5, weight_decay=0.0)
        found.append((stages[0].history.losses, stages[0].teacher_share))
        assert torch.equal(student.table.weight[0], Tagger(1).table.weight[0])
    for losses, share in found[1:]:
        assert losses == pytest.approx(found[0][0]) and share == found[0][1]


def test_language_models_token_by_token():
    """Only labelled tokens, and padding does not matter."""
    teacher = make_tiny("llama", seed=1, layers=2)
    collate, ends = pad_collator(0), []
    examples = rows(4)
    examples[0] = {key: value[:6] for key, value in examples[0].items()}
    for extra in (0, 4):
        batch = collate(examples)
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[key] = nn.functional.pad(batch[key], (0, extra), value=fill)
        student = make_tiny("llama", seed=2, layers=1)
        stages = GeneralTransfer(student, teacher).fit([batch], epochs=3, lr=0.1)
        assert stages[0].history.losses[-1] < stages[0].history.losses[0]
        assert 0 < stages[0].teacher_share < 1
        ends.append(student)
    pairs = zip(ends[0].parameters(), ends[1].parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    batch = collate(examples)
    del batch["labels"]  # the tokens are their own labels
    GeneralTransfer(make_tiny("llama", seed=2, layers=1), teacher).fit([batch], epochs=1)


def test_each_model_has_its_own_inputs():
    double = lambda batch: {**batch, "x": 2 * batch["x"]}  # noqa: E731
    x = torch.randn(9, 6, generator=generator(0))
    y = x[:, :4].argmax(-1)
    teacher = Net(2)
    twice = copy.deepcopy(teacher)
    twice[0].weight.data *= 2
    found = one_step(Net(1), teacher, x, y, "labels", inputs=[None, double])
    expected = one_step(Net(1), twice, x, y, "labels")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("partition", {"partition": "best"}),
        ("mode", {"mode": "cascade"}),
        ("order", {"order": "random"}),
        ("alpha", {"alpha": 1.5}),
        ("temperature", {"temperature": 0.0}),
        ("tau", {"tau": 1.0}),
        ("every", {"every": 0}),
        ("calibration", {"calibration": [1.0]}),
        ("calibration", {"calibration": [1.0, -1.0]}),
        ("inputs", {"inputs": [None, None, None]}),
    ],
)
def test_bad_input(name, options):
    with pytest.raises(BadInput, match=name):
        GeneralTransfer(Net(1), Net(2), **options)


def test_bad_models():
    student = Net(1)
    with pytest.raises(BadInput, match="teachers"):
        GeneralTransfer(student, [])
    with pytest.raises(BadInput, match="itself"):
        GeneralTransfer(student, [Net(2), student])
    with pytest.raises(BadInput, match="partition"):
        GeneralTransfer(student, [Net(2), Net(3)], partition="none")
    wide = Net(2)
    wide[3] = nn.Linear(8, 5)
    with pytest.raises(IncompatibleModels, match="label space"):
        GeneralTransfer(student, wide).fit(data())
    with pytest.raises(BadInput, match="optimizer"):
        GeneralTransfer(student, Net(2)).fit(data(), optimizer="lion")
    with pytest.raises(BadInput, match="batches"):
        GeneralTransfer(student, Net(2)).fit([])
    for options in ({"accumulation": 0}, {"epochs": 0}, {"save_every": 0}, {"accumulation": 1.5}):
        with pytest.raises(BadInput, match=next(iter(options))):
            GeneralTransfer(student, Net(2)).fit(data(), **options)


def test_classes_in_another_order_are_refused(tiny_tokenizer):
    def named(seed, *names):
        made = Net(seed)
        made.config = SimpleNamespace(id2label=dict(enumerate(names)))
        return made

    ours = named(1, "cat", "dog")
    with pytest.raises(IncompatibleModels, match="dog"):
        GeneralTransfer(ours, named(2, "dog", "cat"))
    GeneralTransfer(ours, named(2, "cat", "dog"))
    GeneralTransfer(ours, named(2, "LABEL_0", "LABEL_1"))  # never named
    other = copy.deepcopy(tiny_tokenizer)
    GeneralTransfer(Net(1), Net(2), tokenizer=tiny_tokenizer, teacher_tokenizers=[other])
    vocabulary = {**tiny_tokenizer.get_vocab()}
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other.get_vocab = lambda: vocabulary
    with pytest.raises(IncompatibleModels, match="teacher_tokenizer"):
        GeneralTransfer(Net(1), Net(2), tokenizer=tiny_tokenizer, teacher_tokenizers=[other])
