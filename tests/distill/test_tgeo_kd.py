"""tgeo-kd: what only this method must hold."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import pytest
import torch
from conftest import make_tiny
from distilling import Case, Trained, rng, shapes, state
from torch import nn

from transfuse.core.batches import minibatches
from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill._bilevel import Alternating, Turns, mixing_slopes
from transfuse.distill.tgeo_kd import (
    TGeoKD,
    TrilateralWeighting,
    both_terms,
    class_means,
    mixed_terms,
    trilateral_features,
)

C = 4


def softmax(z, temperature=1.0):
    e = [torch.exp(x / temperature) for x in z]
    return [x / sum(e) for x in e]


def weighting(features="full"):
    with seeded(3):
        made = TrilateralWeighting(C, hidden=(6, 5), features=features).double()
        made.means.copy_(torch.softmax(torch.randn(C, C), -1))
    return made


def alpha_by_hand(made, z, w, label):
    """The ratio of one sample, one number at a time."""
    s, p, mean = softmax(z), softmax(w), made.means[label]
    g = [float(c == label) for c in range(C)]
    corners = [s, p, g, mean]
    near = [[(a - b) ** 2 for a, b in zip(side, s, strict=True)] for side in (mean, g, p)]
    far = [[(a - b) ** 2 for a, b in zip(side, g, strict=True)] for side in (p, mean)]
    parts = {"full": corners + near + far, "edges": near, "vertices": corners}[made.features]
    x = [float(value) for part in parts for value in part]
    layers = [layer for layer in made.net if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        x = [sum(a * b for a, b in zip(row, x, strict=True)) + bias for row, bias in rows]
        if i < len(layers) - 1:
            x = [v if v > 0 else 0.01 * v for v in x]
    return 1 / (1 + math.exp(-x[0]))


def inputs(seed):
    g = rng(seed)
    return {
        "student": 2 * torch.randn(6, C, generator=g, dtype=torch.float64),
        "teacher": 2 * torch.randn(6, C, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, C, (6,), generator=g),
    }


def product(made, temperature):
    def loss(x):
        alpha = made(x["student"], x["teacher"], x["labels"]).detach()
        return mixed_terms(x["student"], x["teacher"], x["labels"], alpha, temperature).mean()

    return loss


def by_hand(made, temperature):
    def reference(live, fixed):
        total = 0.0
        for z, still, w, label in zip(
            live["student"], fixed["student"], fixed["teacher"], live["labels"].tolist(), strict=True
        ):
            alpha = alpha_by_hand(made, still, w, label)
            pairs = zip(softmax(w, temperature), softmax(z, temperature), strict=True)
            kd = temperature**2 * sum(p * (torch.log(p) - torch.log(q)) for p, q in pairs)
            total = total + alpha * kd - (1 - alpha) * torch.log(softmax(z)[label])
        return total / len(live["labels"])

    return reference


def excluded(x):
    changed = {key: value.clone() for key, value in x.items()}
    changed["student"][:, 0] = changed["teacher"][:, 0] = -torch.inf
    changed["labels"][changed["labels"] == 0] = 1
    return changed


def case(features, temperature):
    made = weighting(features)
    return Case(
        features, inputs, product(made, temperature), by_hand(made, temperature), ("student",), excluded=excluded,
        without={"padded": "one class per sample, nothing to pad", "least": "labels pull away from the teacher"},
    )  # fmt: skip


CASES = [case("full", 2.0), case("edges", 1.5), case("vertices", 1.0)]


class Net(nn.Module):
    """A classifier with the layers that need care in a virtual step: batch norm and dropout."""

    def __init__(self, width=8, drop=0.0, norm=True):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.last = nn.Linear(width, C)

    def forward(self, pixel_values):
        return self.last(self.drop(torch.tanh(self.norm(self.first(pixel_values)))))


def net(seed, **options):
    with seeded(seed):
        return Net(**options)


def data(count=64, seed=0):
    g = rng(seed)
    x = torch.randn(count, 6, generator=g)
    return {"pixel_values": x, "labels": (x @ torch.randn(6, C, generator=rng(9))).argmax(-1)}


def batches(count=64, size=16, seed=0):
    return minibatches(data(count, seed), size, seed=seed)


def method(seed=0, student=None, **options):
    return TGeoKD(student or net(seed), net(7).eval(), num_classes=C, seed=seed, **options)


def train(seed):
    made = method(seed)
    kept, before = state(made.teacher), shapes(made.student)
    history = made.fit(batches(), batches(32, seed=5), epochs=10, lr=2e-2)
    return Trained(history.losses, made.student, before, [(kept, made.teacher)])


def test_the_features_in_their_order():
    s, p, g, m = (torch.tensor([row]) for row in ([0.2, 0.8], [0.5, 0.5], [1.0, 0.0], [0.9, 0.1]))
    near, far = [0.49, 0.49, 0.64, 0.64, 0.09, 0.09], [0.25, 0.25, 0.01, 0.01]
    corners = [0.2, 0.8, 0.5, 0.5, 1.0, 0.0, 0.9, 0.1]
    for kind, expected in (("full", corners + near + far), ("edges", near), ("vertices", corners)):
        assert trilateral_features(s, p, g, m, kind)[0].tolist() == pytest.approx(expected)


def test_class_means_by_hand():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.0, 1.0, 0.0]])
    found = class_means(p, torch.tensor([0, 0, 1]), 3)
    assert torch.allclose(found, torch.tensor([[0.7, 0.15, 0.15], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_class_means_come_from_the_training_labels():
    made, x = method(), data()
    x["labels"][x["labels"] == 3] = 2
    assert made.measure(minibatches(x, 10, seed=0)(0)) == 7
    expected = class_means(torch.softmax(made.teacher(x["pixel_values"]), -1), x["labels"], C).detach()
    assert torch.allclose(made.mixing.means, expected, atol=1e-6)
    assert made.mixing.means[3].tolist() == [0.25] * 4


def test_ends_of_the_ratio():
    x = inputs(0)
    kd, ce = both_terms(x["student"], x["teacher"], x["labels"], 2.0)
    for end, expected in ((1.0, kd), (0.0, ce)):
        alpha = torch.full((6,), end, dtype=torch.float64)
        assert torch.equal(mixed_terms(x["student"], x["teacher"], x["labels"], alpha, 2.0), expected)
    assert torch.allclose(ce, nn.functional.cross_entropy(x["student"], x["labels"], reduction="none"))


def outer(student, made, exact, inner_lr=0.5):
    batch = {name: value.double() if name == "pixel_values" else value for name, value in data(12).items()}
    held = {name: value.double() if name == "pixel_values" else value for name, value in data(10, 4).items()}
    said = 2 * torch.randn(12, C, generator=rng(1), dtype=torch.float64)
    value, slopes = mixing_slopes(
        student, made, batch, said, held, terms=lambda z: both_terms(z, said, batch["labels"], 2.0),
        inner_lr=inner_lr, exact=exact,
    )  # fmt: skip
    return value, slopes, batch, said, held


@pytest.mark.parametrize("exact", [True, False])
def test_the_outer_slope_against_finite_differences(exact):
    """A real step on a copy of the student, with ratios from shifted mixing weights; the ratio's features are fixed."""
    student, made = net(1).double(), weighting()
    _, slopes, batch, said, held = outer(student, made, exact)

    def after(mixing):
        copied = copy.deepcopy(student)
        z = copied(batch["pixel_values"])
        alpha = mixing(z, said, batch["labels"]).detach()
        loss = mixed_terms(z, said, batch["labels"], alpha, 2.0).mean()
        found = torch.autograd.grad(loss, list(copied.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(copied.parameters(), found, strict=True):
                parameter.sub_(0.5 * slope)
            return float(nn.functional.cross_entropy(copied(held["pixel_values"]), held["labels"]))

    expected, largest = 0.0, max(float(slope.abs().max()) for slope in slopes)
    assert largest > 1e-6
    for index in range(len(slopes)):
        direction = torch.randn(slopes[index].shape, generator=rng(index), dtype=torch.float64)
        ends = []
        for sign in (1e-4, -1e-4):
            moved = copy.deepcopy(made)
            with torch.no_grad():
                list(moved.parameters())[index].add_(sign * direction)
            ends.append(after(moved))
        expected = (ends[0] - ends[1]) / 2e-4
        found = float((slopes[index] * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5 if exact else 2e-2, abs=1e-9 if exact else 1e-5)


def test_the_virtual_step_leaves_everything_as_it_was():
    """Weights, batch-norm statistics, mode, gradients and random state; dropout masks are those of the real step."""
    student = net(1, drop=0.5).train()
    made = method(student=student)
    before, drawn = state(student), torch.get_rng_state()
    for unroll in ("exact", "difference"):
        made.unroll = unroll
        loss = made.outer_step(data(12), data(10, 4))
        slopes = torch.autograd.grad(
            loss, [*made.mixing.parameters(), *student.parameters()], allow_unused=True
        )
        count = len(list(made.mixing.parameters()))
        assert all(slope is not None for slope in slopes[:count]) and all(s is None for s in slopes[count:])
        assert torch.equal(torch.get_rng_state(), drawn) and student.training and student.norm.training
        assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
        assert all(p.grad is None for p in [*student.parameters(), *made.teacher.parameters()])


def test_the_inner_step_reaches_the_student_alone():
    made = method()
    loss = made.inner_step(data(12))
    slopes = torch.autograd.grad(
        loss,
        [*made.student.parameters(), *made.mixing.parameters(), *made.teacher.parameters()],
        allow_unused=True,
    )
    count = len(list(made.student.parameters()))
    assert all(s is not None for s in slopes[:count]) and all(s is None for s in slopes[count:])
    assert made.figures[-1]["alpha_q05"] <= made.figures[-1]["alpha_q50"] <= made.figures[-1]["alpha_q95"]


def test_one_update_of_each_by_hand():
    """The mixing network moves first, the student by the ratios that it gives then."""
    student = net(1, norm=False)
    made = method(student=student, inner_lr=0.5, mixing_lr=0.1, mixing_weight_decay=0.05)
    x, held = data(12), data(10, 4)
    mixing, old = copy.deepcopy(made.mixing), copy.deepcopy(student)
    own = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    made.fit([x], [held], optimizer=own)
    mixing.means.copy_(made.mixing.means)
    said = made.teacher(x["pixel_values"]).detach()
    _, slopes = mixing_slopes(
        old,
        mixing,
        x,
        said,
        held,
        terms=lambda z: both_terms(z, said, x["labels"], 2.0),
        inner_lr=0.5,
        exact=True,
    )
    rate = torch.tensor(0.1)
    for parameter, slope, new in zip(mixing.parameters(), slopes, made.mixing.parameters(), strict=True):
        g = slope + 0.05 * parameter.detach()
        parameter.data -= rate * g / (g.abs() + 1e-8)  # Adam's first step
        assert torch.allclose(parameter, new, atol=1e-5)
    z = old(x["pixel_values"])
    alpha = made.mixing(z, said, x["labels"]).detach()
    loss = mixed_terms(z, said, x["labels"], alpha, 2.0).mean()
    for p, slope, new in zip(
        old.parameters(), torch.autograd.grad(loss, list(old.parameters())), student.parameters(), strict=True
    ):
        assert torch.allclose(p - 0.2 * (slope + 0.1 * p), new, atol=1e-6)


def test_it_learns_whom_to_trust():
    """Labels of two classes are shuffled, and the teacher knows these two only: the ratio follows."""
    x = data(160)
    noisy = x["labels"] < 2
    truth = x["labels"].clone()
    x["labels"][noisy] = torch.randint(0, 2, (int(noisy.sum()),), generator=rng(3))

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, C, generator=rng(9)))

        def forward(self, pixel_values):
            z = pixel_values @ self.weight
            return torch.cat([z[:, :2], torch.full_like(z[:, 2:], -3.0)], 1)

    made = TGeoKD(net(0, width=24, norm=False), Half(), num_classes=C)
    made.fit(minibatches(x, 32, seed=0), minibatches(data(96, 5), 96, seed=0), epochs=20, lr=1e-2)
    with torch.no_grad():
        alpha = made.mixing(made.student(x["pixel_values"]), made.teacher(x["pixel_values"]), x["labels"])
    assert float(alpha[noisy & (x["labels"] != truth)].mean()) > float(alpha[~noisy].mean()) + 0.6


def test_the_order_of_updates():
    order = Turns(5, 2, held=2)
    items = list(order.items([10, 11, 12, 13, 14], lambda number: ["a", "b"], 0))
    assert [(item["batch"], item.get("held")) for item in items] == [
        (10, "a"), (10, None), (11, None), (12, "b"), (12, None), (13, None), (14, "a"), (14, None)
    ]  # fmt: skip
    assert [order.inner(i) for i in range(9)] == ["held" not in item for item in items] + [False]
    assert [order.count(i) for i in (0, 1, 2, 8, 9, 10)] == [0, 0, 1, 5, 5, 6]
    seen = []
    made = method(outer_every=2)
    history = made.fit(
        batches(), batches(32, seed=5), epochs=2, on_step=lambda n, loss: seen.append((n, loss))
    )
    assert seen == list(enumerate(history.losses, 1)) and history.steps == len(made.figures) == 8
    with pytest.raises(BadInput, match="train"):
        list(order.items([1, 2], lambda number: ["a", "b"], 0))
    with pytest.raises(BadInput, match="validation"):
        list(order.items([1, 2, 3, 4, 5], lambda number: ["a"], 0))


def test_validation_goes_on_over_the_epochs(tmp_path):
    """All of it is used, a pass over several epochs is one order, and a resumed run sees the same batches."""
    order = Turns(2, 1, held=3)
    passes = [["a", "b", "c"], ["d", "e", "f"]]
    held = [x["held"] for e in range(3) for x in order.items([1, 2], passes.__getitem__, e) if "held" in x]
    assert held == ["a", "b", "c", "d", "e", "f"]

    class Stop(Exception):
        pass

    def fit(stop=None, **options):
        made, seen = method(student=net(1, drop=0.3)), []
        outer_step = made.outer_step
        made.outer_step = lambda x, held: (
            seen.append(float(held["pixel_values"][0, 0])), outer_step(x, held)
        )[1]  # fmt: skip

        def told(number, loss):
            if number == stop:
                raise Stop

        loader = torch.utils.data.DataLoader(
            [dict(zip(data(40, 5), row, strict=True)) for row in zip(*data(40, 5).values(), strict=True)],
            batch_size=5, shuffle=True,
        )  # fmt: skip
        train = batches(), loader
        losses = None
        with contextlib.suppress(Stop):
            losses = made.fit(*train, epochs=4, on_step=told, **options).losses
        return losses, seen

    losses, seen = fit()
    assert len(seen) == 16 and len({*seen[:8]}) == len({*seen[8:]}) == 8
    fit(stop=7, output_dir=tmp_path, save_every=5)
    again, rest = fit(output_dir=tmp_path, save_every=5)
    assert again == losses and rest == seen[-len(rest) :]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    def fit(data_seed=0, **options):
        return method(**options).fit(batches(seed=data_seed), batches(32, seed=5), output_dir=tmp_path)

    fit()
    assert fit().resumed_at
    for other in ({"temperature": 3.0}, {"inner_lr": 0.5}, {"unroll": "difference"}, {"data_seed": 1}):
        with pytest.raises(BadInput, match="other arguments"):
            fit(**other)


@pytest.mark.parametrize("frozen_part", [False, True])
def test_a_difference_in_half_precision(frozen_part):
    """The shifted students are computed in float32: as near to the exact slope as a float32 student's."""
    with seeded(0):
        deep = [nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, C)]
    wide = nn.Sequential(*deep)
    if frozen_part:
        wide[0].requires_grad_(False)

    class Reads(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixel_values):
            return self.inner(pixel_values)

    made, found = weighting().float(), []
    for kind, exact in ((torch.float32, True), (torch.bfloat16, False)):
        x, held = (
            {**each, "pixel_values": each["pixel_values"].to(kind)} for each in (data(32), data(32, 4))
        )
        said = 2 * torch.randn(32, C, generator=rng(1))
        _, slopes = mixing_slopes(
            Reads(copy.deepcopy(wide).to(kind)), made, x, said, held, inner_lr=0.1, exact=exact,
            terms=lambda z, said=said, x=x: both_terms(z, said, x["labels"], 2.0),
        )  # fmt: skip
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_it_resumes_its_trajectory(tmp_path, kind):
    def made():
        found = method(student=net(1, drop=0.3))
        rule = {
            "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        }[kind](found.student.parameters())
        return found, rule

    class Stop(Exception):
        pass

    def stop(number, loss):
        if number == 7:
            raise Stop

    data = (batches(), batches(32, seed=5))
    whole, rule = made()
    losses = whole.fit(*data, epochs=3, optimizer=rule).losses
    first, rule = made()
    with pytest.raises(Stop):
        first.fit(*data, epochs=3, optimizer=rule, output_dir=tmp_path, save_every=5, on_step=stop)
    second, rule = made()
    history = second.fit(*data, epochs=3, optimizer=rule, output_dir=tmp_path, save_every=5)
    assert history.losses == losses and history.resumed_at == 5
    for one, two in ((whole.student, second.student), (whole.mixing, second.mixing)):
        ends = one.state_dict(), two.state_dict()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_transformers_classifier():
    """Scaled-dot-product kernels have no second derivative: the plain one is used in the virtual step."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=C, attn_implementation="sdpa",
    )  # fmt: skip
    with seeded(0):
        student, teacher = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    g = rng(0)

    def some(count):
        ids = torch.randint(0, 50, (count, 7), generator=g)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.randint(0, C, (count,), generator=g),
        }

    train, held = [some(6), some(6)], [some(5)]
    for unroll in ("exact", "difference"):
        made = TGeoKD(student, teacher, num_classes=C, unroll=unroll, inner_lr=0.1)
        before = state(made.mixing)
        assert all(math.isfinite(loss) for loss in made.fit(train, held, epochs=2).losses)
        assert not torch.equal(before["net.0.weight"], made.mixing.state_dict()["net.0.weight"])


def test_a_mixing_network_that_does_not_learn():
    made = method(mixing_lr=0.0)
    before = state(made.mixing)["net.0.weight"]
    made.fit(batches(), batches(32, seed=5))
    assert torch.equal(before, made.mixing.net[0].weight)
    assert 0.3 < made.figures[-1]["alpha"] < 0.7


def test_two_optimizers_are_one():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    both = Alternating(torch.optim.SGD([a], lr=0.5, weight_decay=1.0), torch.optim.Adam([b], lr=0.1))
    a.grad = torch.ones(2)
    both.step()
    assert a.tolist() == [0.0, 0.0] and b.tolist() == [1.0, 1.0]
    a.grad, b.grad = None, torch.ones(2)
    both.load_state_dict(copy.deepcopy(both.state_dict()))
    both.step()
    assert a.tolist() == [0.0, 0.0] and b.tolist() == pytest.approx([0.9, 0.9])
    with pytest.raises(BadInput, match="optimizer"):
        Alternating(torch.optim.SGD([a], lr=0.5), torch.optim.SGD([a], lr=0.5))


def test_validation_rows_that_are_trained_on_are_told():
    made, x = method(), data(32)
    with pytest.warns(UserWarning, match="8 of 24 validation rows"):
        held = {name: torch.cat([x[name][:8], data(16, 3)[name]]) for name in x}
        made.fit([x], [held])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.fit([x], [data(16, 3)])


def test_padding_does_not_hide_a_shared_row():
    from transfuse.distill._bilevel import held_out_rows

    class Reads(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    def one(*rows):
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(rows))}

    with pytest.warns(UserWarning, match="1 of 1"):
        held_out_rows(Reads(), [one([4, 5, 6], [1, 2])], [one([1, 2])])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0), ("inner_lr", -1.0), ("outer_every", 0), ("mixing_lr", -0.1), ("unroll", "two"),
        ("outer_every", 1.5), ("temperature", math.inf), ("num_classes", 2.5),
        ("features", "angles"), ("hidden", (0,)), ("mixing_weight_decay", math.nan), ("num_classes", 1),
    ],
)  # fmt: skip
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        TGeoKD(net(0), net(1), **{"num_classes": C, name: value})


def test_what_cannot_be_trained():
    x, student = data(16), net(0)
    with pytest.raises(ValueError, match="validation"):
        method().fit([x], None)
    with pytest.raises(BadInput, match="validation"):
        method().fit([x], [])
    with pytest.raises(BadInput, match="train"):
        method().fit([], [x])
    with pytest.raises(BadInput, match="only once"):
        method().fit(iter([x]), [x])
    with pytest.raises(BadInput, match="labels that are not classes"):
        method().fit([{**x, "labels": x["labels"] + 1}], [data(8, 3)])
    with pytest.raises(BadInput, match=r"validation = .* labels that are not classes"):
        method().fit([x], [{**data(8, 3), "labels": torch.full((8,), -1)}])
    with pytest.raises(BadInput, match="labels that are not classes"):
        method().fit([{**x, "labels": x["labels"].float()}], [data(8, 3)])
    with pytest.raises(BadInput, match="optimizer"):
        method().fit([x], [data(8, 3)], optimizer=torch.optim.SGD(net(3).parameters(), lr=0.1))
    wide = net(0)
    wide.last = nn.Linear(8, C + 1)
    with pytest.raises(IncompatibleModels, match="student"):
        method(student=wide).fit([x], [data(8, 3)])
    with pytest.raises(BadInput, match="teacher"):
        TGeoKD(student, student, num_classes=C)
    with pytest.raises(NotApplicable, match="student"):
        TGeoKD(make_tiny("llama", layers=1), net(0), num_classes=C)
    with pytest.raises(IncompatibleModels, match="classes"):
        TGeoKD(net(0), net(1), num_classes=C + 1).fit([x], [data(8, 3)])
