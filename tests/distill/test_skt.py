"""skt: what only this method must hold."""

from __future__ import annotations

import math

import pytest
import torch
from distilling import Case, Trained, arguments, rng, shapes, state
from torch import nn

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill import Distiller, Signal
from transfuse.distill.skt import (
    SKT,
    CSRNet,
    DensityCounter,
    cost,
    on_one_grid,
    pattern_distance,
    relation_distance,
    shrink_density,
    slim,
)

NAMES = ("a", "b")
OURS, THEIRS = {"a": 2, "b": 3}, {"a": 3, "b": 2}


# --- the loss by loops ---------------------------------------------------------------------------------------


def pooled(x, factor):
    """Max-pooling with rounding up of one image's map `[C, H, W]`."""
    high, wide = (math.ceil(n / factor) for n in x.shape[1:])
    rows = []
    for c in range(x.shape[0]):
        for i in range(high):
            for j in range(wide):
                block = x[c, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
                rows.append(block.max())
    return torch.stack(rows).reshape(x.shape[0], high, wide)


def normal(x):
    """Each channel of `[C, H, W]` less its mean, over its deviation; `[C, HW]`."""
    rows = []
    for channel in x:
        mean = channel.mean()
        rows.append(((channel - mean) / torch.sqrt(((channel - mean) ** 2).mean() + 1e-5)).flatten())
    return torch.stack(rows)


def one_image(maps_s, out_s, maps_t, out_t, target, factors, mean, weights):
    """Loss of one image: lifted maps and outputs of both models."""
    n = out_s.numel() if mean else 1
    hard, soft = ((out_s - target) ** 2).sum() / n, ((out_s - out_t) ** 2).sum() / n
    intra = []
    for s, t in zip(maps_s, maps_t, strict=True):
        places = []
        for i in range(s.shape[1]):
            for j in range(s.shape[2]):
                u, v = s[:, i, j], t[:, i, j]
                places.append(1 - (u * v).sum() / (u.norm().clamp(min=1e-8) * v.norm().clamp(min=1e-8)))
        intra.append(sum(places) / (len(places) if mean else 1))
    sides = []
    for maps, out in ((maps_s, out_s), (maps_t, out_t)):
        sides.append([normal(pooled(m, f)) for m, f in zip([*maps, out], factors, strict=True)])
    inter = []
    for i in range(len(factors)):
        for j in range(i + 1, len(factors)):
            total = 0.0
            for a in range(sides[0][i].shape[0]):
                for b in range(sides[0][j].shape[0]):
                    f_s, f_t = ((x[i][a] * x[j][b]).mean() for x in sides)
                    total = total + (f_t - f_s) ** 2
            inter.append(total / (sides[0][i].shape[0] * sides[0][j].shape[0] if mean else 1))
    terms = [hard, soft, sum(intra) / (len(intra) if mean else 1), sum(inter) / (len(inter) if mean else 1)]
    return sum(w * term for w, term in zip(weights, terms, strict=True))


def raw_inputs(same):
    def inputs(seed):
        g = rng(seed)

        def maps(widths, kind):
            sizes = {"a": (7, 6), "b": (4, 3)}
            made = {
                n: torch.randn(3, c, *sizes[n], generator=g, dtype=torch.float64) for n, c in widths.items()
            }
            return {f"{kind}_{n}": x.abs() + 0.1 if same else x for n, x in made.items()}

        found = {**maps(THEIRS if same else OURS, "s"), **maps(THEIRS, "t")}
        for name in ("out_s", "out_t", "labels"):
            found[name] = torch.randn(3, 1, 4, 3, generator=g, dtype=torch.float64).abs()
        return found

    return inputs


def filters(same):
    """Weights of the lifting layers, `[C_t, C_s]` and `[C_t]` each; the identity where the channels agree."""
    if same:
        return [
            (torch.eye(c, dtype=torch.float64), torch.zeros(c, dtype=torch.float64)) for c in THEIRS.values()
        ]
    g = rng(9)
    return [
        (
            torch.randn(THEIRS[n], OURS[n], generator=g, dtype=torch.float64),
            torch.full((THEIRS[n],), 0.3).double(),
        )
        for n in NAMES
    ]


def objective(same=False, **options):
    made = SKT(student_taps=NAMES, teacher_taps=NAMES, pool=(2,), **options).double()
    for weight, bias in filters(same):
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1).double()
        layer.weight.data.copy_(weight[:, :, None, None])
        layer.bias.data.copy_(bias)
        made.lifts.append(layer)
    return made


def signals(x):
    return (
        Signal(logits=x["out_s"], taps={n: x[f"s_{n}"] for n in NAMES}),
        Signal(logits=x["out_t"], taps={n: x[f"t_{n}"] for n in NAMES}),
    )


def case(name, mean, same, weights=(1.0, 1.0, 0.5, 0.5)):
    options = dict(zip(("lambda_hard", "lambda_soft", "lambda_intra", "lambda_inter"), weights, strict=True))

    def loss(x):
        made = objective(same, reduction="mean" if mean else "sum", **options)
        return made(*signals(x), x)["loss"]

    def reference(live, fixed):
        values = []
        for b in range(len(live["labels"])):
            lifted = []
            for n, (weight, bias) in zip(NAMES, filters(same), strict=True):
                x = live[f"s_{n}"][b]
                rows = [
                    torch.relu((weight[c, :, None, None] * x).sum(0) + bias[c]) for c in range(len(weight))
                ]
                lifted.append(torch.stack(rows))
            taught = [fixed[f"t_{n}"][b] for n in NAMES]
            values.append(
                one_image(lifted, live["out_s"][b], taught, fixed["out_t"][b], fixed["labels"][b], (2, 1, 1), mean,
                          weights)
            )  # fmt: skip
        return torch.stack(values).mean()

    def least(x):
        copied = {f"t_{n}": x[f"s_{n}"].clone() for n in NAMES}
        return {**x, **copied, "out_t": x["out_s"].clone(), "labels": x["out_s"].clone()}

    without = {"padded": "maps of a batch have one size", "excluded": "the outputs are densities, not logits"}
    if not same:
        without["least"] = "random lifting layers cannot say what the teacher does: see the other case"
    return Case(
        name,
        raw_inputs(same),
        loss,
        reference,
        ("s_a", "s_b", "out_s"),
        least=least if same else None,
        without=without,
    )


CASES = [
    case("sum", mean=False, same=False),
    case("mean", mean=True, same=True),
    case("intra", mean=False, same=False, weights=(1.0, 0.0, 2.0, 0.0)),
    case("inter", mean=True, same=False, weights=(0.0, 1.0, 0.0, 3.0)),
]


# --- a small pair of counters --------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.near = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)
        )
        self.far = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=2, dilation=2), nn.ReLU())
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, pixel_values):
        return self.out(self.far(self.near(pixel_values)))


TAPS = ("near.1", "near.2", "far.1")


def data(count=12, size=11):
    """Images with bright dots and their density at stride 2."""
    g = rng(3)
    images = (torch.rand(count, 1, size, size, generator=g) > 0.93).float()
    targets = nn.functional.avg_pool2d(images, 2, ceil_mode=True, divisor_override=1)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, targets, strict=True)]


def trainer(folder, seed=0, **options):
    with seeded(1):
        teacher = Counter(8)
    student = slim(teacher, 4, seed=seed)
    settings = {"student_taps": TAPS, "teacher_taps": TAPS, "pool": (2,)}
    with seeded(seed):
        made = Distiller(
            student=student, teacher=teacher, objective=SKT(**settings, **options), train_dataset=data(),
            args=arguments(folder, seed=seed, max_steps=40, learning_rate=1e-2),
        )  # fmt: skip
    return made, teacher, student


def train(seed):
    made, teacher, student = trainer("unused", seed)
    kept, before = state(teacher), shapes(student)
    with seeded(seed):
        made.train()
    return Trained(made.losses, student, before, [(kept, teacher)])


# --- tests ---------------------------------------------------------------------------------------------------


def test_patterns_by_hand():
    s = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).reshape(1, 2, 1, 2)  # (1, 1) and (0, 0)
    t = torch.tensor([[1.0, 3.0], [0.0, 4.0]]).reshape(1, 2, 1, 2)  # (1, 0) and (3, 4)
    assert float(pattern_distance([s], [t])) == pytest.approx(
        1 - 1 / math.sqrt(2) + 1
    )  # nothing against (3, 4): 1
    assert float(pattern_distance([s, s], [t, t], reduction="mean")) == pytest.approx(1 - 0.5 / math.sqrt(2))


def test_relations_by_hand():
    """Two one-channel maps that rise together, against two that rise apart: F is 1 and -1."""
    up = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2) * 1e3  # so that the eps does not count
    assert float(relation_distance([up, up], [up, -up])) == pytest.approx(4.0, rel=1e-5)
    assert float(relation_distance([up, up, up], [up, up, -up])) == pytest.approx(8.0, rel=1e-5)
    assert float(relation_distance([up, up, up], [up, up, -up], reduction="mean")) == pytest.approx(
        8 / 3, rel=1e-5
    )
    assert float(relation_distance([up, up], [5 * up + 7, 0.1 * up])) == pytest.approx(0.0, abs=1e-6)


def test_a_batch_is_the_mean_of_its_images():
    """Not the first image's relations for all, which is what the published code computes."""
    x = raw_inputs(False)(0)
    alone = [
        float(objective()(*signals(part), part)["inter"])
        for part in ({k: v[i : i + 1] for k, v in x.items()} for i in range(3))
    ]
    assert len({round(value, 6) for value in alone}) == 3
    assert float(objective()(*signals(x), x)["inter"]) == pytest.approx(sum(alone) / 3)


def test_places_at_the_rim_are_pooled_too():
    x = torch.zeros(1, 1, 5, 5)
    x[..., 4, 4] = 9.0
    pooled_x, other = on_one_grid([x, torch.zeros(1, 1, 3, 3)], (2,))
    assert pooled_x.shape == other.shape and float(pooled_x[..., 2, 2]) == 9.0


def test_the_lifting_layers_learn_and_stay_behind(tmp_path):
    made, teacher, student = trainer(tmp_path)
    before = [layer.weight.clone() for layer in made.objective.lifts]
    assert [layer.weight.shape[:2] for layer in made.objective.lifts] == [(8, 2), (8, 2), (16, 4)]
    made.train()
    assert all(not torch.equal(a, b.weight) for a, b in zip(before, made.objective.lifts, strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    made.save_model(str(tmp_path / "student"))
    from safetensors.torch import load_file

    fresh = slim(teacher, 4, seed=5)
    fresh.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))  # no key is left over
    images = torch.stack([row["pixel_values"] for row in data(3)])
    assert torch.equal(fresh(images), student(images))
    assert not any(module._forward_hooks for net in (teacher, student) for module in net.modules())


def test_evaluation_is_the_densitys_own(tmp_path):
    made, _, student = trainer(tmp_path)
    rows = data(4)
    errors = [(student(row["pixel_values"][None]) - row["labels"]).square().sum() for row in rows]
    assert made.evaluate(rows)["eval_loss"] == pytest.approx(float(sum(errors)) / 4, rel=1e-5)


def test_an_objective_used_before_makes_new_lifting_layers(tmp_path):
    made, teacher, _ = trainer(tmp_path)
    first = [layer.weight for layer in made.objective.lifts]
    for ratio in (4, 2):
        again = Distiller(student=slim(teacher, ratio), teacher=teacher, objective=made.objective,
                          train_dataset=data(), args=arguments(tmp_path, max_steps=1))  # fmt: skip
        again.train()
        assert all(new.weight is not old for new, old in zip(again.objective.lifts, first, strict=True))


def test_rows_and_teachers_that_do_not_serve(tmp_path):
    made, teacher, student = trainer(tmp_path)
    given = {"student": student, "objective": made.objective, "args": arguments(tmp_path)}
    with pytest.raises(NotApplicable, match="several teachers"):
        Distiller(teacher=[teacher, slim(teacher, 1)], train_dataset=data(), **given)
    with pytest.raises(BadInput, match="labels"):
        bare = [{"pixel_values": row["pixel_values"]} for row in data()]
        Distiller(teacher=teacher, train_dataset=bare, **given)
    assert DensityCounter(student).predict([]).shape == (0,)


def test_a_weight_of_zero_drops_its_term():
    x = raw_inputs(False)(1)
    found = objective(lambda_intra=0.0, lambda_inter=0.0)(*signals(x), x)
    assert set(found) == {"loss", "hard", "soft"}
    assert float(found["loss"]) == pytest.approx(float(found["hard"] + found["soft"]))
    bare = SKT(
        student_taps=NAMES, teacher_taps=NAMES, pool=(2,), lambda_intra=0.0, lambda_inter=0.0, lambda_soft=0.0
    )
    hard = bare(*signals(x), x)["loss"]
    assert float(hard) == pytest.approx(float((x["out_s"] - x["labels"]).square().sum() / 3))


def test_the_published_networks():
    """16.26 M and 1.02 M parameters, 205.88 and 13.09 G operations at 576x864 (which count a little more)."""
    teacher = CSRNet()
    student = slim(teacher, 4)
    for net, millions, giga in ((teacher, 16.26, 205.88), (student, 1.02, 13.09)):
        parameters, operations = cost(net, (1, 3, 576, 864))
        assert parameters / 1e6 == pytest.approx(millions, abs=0.005)
        assert operations / 1e9 == pytest.approx(giga, rel=0.01)
    widths = {
        n: sorted({m.out_channels for m in slim(teacher, n).modules() if isinstance(m, nn.Conv2d)})[1:]
        for n in (2, 3, 4, 5)
    }
    assert widths[2][1:] == [64, 128, 256] and widths[3][1:] == [43, 85, 171]
    assert widths[4] == [16, 32, 64, 128] and widths[5] == [13, 26, 51, 102]
    assert student(torch.rand(1, 3, 33, 40)).shape == (1, 1, 5, 5)  # rounded up


def test_slim_keeps_norms_and_depthwise_layers_in_step():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 1, 1)
    ).double()  # fmt: skip
    student = slim(model, 4)
    assert student(torch.rand(1, 3, 9, 9).double()).shape == (1, 1, 5, 5)
    assert [m.groups for m in student if isinstance(m, nn.Conv2d)] == [1, 4, 1] and student[
        1
    ].num_features == 4
    assert model[0].out_channels == 16
    assert torch.equal(slim(model, 4, seed=2)[0].weight, slim(model, 4, seed=2)[0].weight)
    with pytest.raises(NotApplicable, match="Linear"):
        slim(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Linear(2, 2)), 2)
    with pytest.raises(NotApplicable, match="groups"):
        slim(nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), 2)
    with pytest.raises(BadInput, match=r"ratio = 0\.25"):
        slim(model, 0.25)


def test_targets_and_counts():
    grid = torch.arange(48.0)
    bell = torch.exp(-((grid[:, None] - 20) ** 2 + (grid[None] - 27) ** 2) / (2 * 8.0**2))
    density = (bell / bell.sum())[None, None]
    small = shrink_density(density, 8)
    assert small.shape == (1, 1, 6, 6) and float(small.sum()) == pytest.approx(1.0, abs=0.03)
    assert shrink_density(torch.rand(1, 1, 17, 9), 8).shape == (1, 1, 3, 2)
    sharp = torch.zeros(1, 1, 16, 16)
    sharp[..., 1, 3] = 1.0
    assert float(shrink_density(sharp, 4).min()) == 0.0
    kept = shrink_density(sharp, 4, clamp=False)
    assert float(kept.min()) < 0.0 and torch.equal(kept.clamp_min(0.0), shrink_density(sharp, 4))
    with pytest.raises(BadInput, match="stride"):
        shrink_density(density, 6)
    counter = Counter(2).train()
    images = torch.rand(2, 1, 8, 8)
    counts = DensityCounter(counter, scale=10.0).predict(images)
    assert torch.allclose(counts, counter(images).sum((1, 2, 3)) / 10, atol=1e-6)
    assert torch.allclose(DensityCounter(counter, scale=10.0).predict(list(images)), counts, atol=1e-6)
    assert counter.training and not counts.requires_grad
    with pytest.raises(BadInput, match="scale"):
        DensityCounter(counter, scale=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_taps": ("a",), "teacher_taps": ("a", "b")}, r"student_taps = 1 .* 2"),
        ({"student_taps": (), "teacher_taps": ()}, "student_taps"),
        ({"student_taps": ("a*",), "teacher_taps": ("a",), "pool": ()}, "wildcard"),
        ({"pool": (0,)}, "pool"),
        ({"pool": (2,) * 9}, "pool"),
        ({"lambda_intra": -1.0}, "lambda_intra"),
        ({"lambda_soft": -1.0}, "lambda_soft"),
        ({"reduction": "none"}, "reduction"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(BadInput, match=message):
        SKT(**options)


def test_bad_maps_and_targets():
    x = raw_inputs(False)(2)
    with pytest.raises(BadInput, match=r"labels = -0\.5"):
        objective()(*signals(x), {**x, "labels": x["labels"].index_fill(3, torch.tensor([1]), -0.5)})
    with pytest.raises(BadInput, match="labels"):
        objective()(*signals(x), {**x, "labels": x["labels"][..., :2]})
    with pytest.raises(IncompatibleModels, match=r"\(3, 3, 7, 6\).*\(3, 3, 6, 6\)"):
        objective()(*signals({**x, "t_a": x["t_a"][:, :, :6]}), x)
    with pytest.raises(IncompatibleModels, match=r"\(7, 6\) and \(4, 3\)"):
        on_one_grid([x["s_a"], x["out_s"]], ())
    with pytest.raises(BadInput, match="one place"):
        on_one_grid([torch.rand(1, 2, 2, 2), torch.rand(1, 1, 1, 1)], (2,))
    with pytest.raises(IncompatibleModels, match="student = 1 maps, the teacher has 2"):
        pattern_distance([x["t_a"]], [x["t_a"], x["t_b"]])
    with pytest.raises(BadInput, match="lifting"):
        SKT(student_taps=NAMES, teacher_taps=NAMES, pool=(2,))(*signals(x), x)
    flat = {**x, "s_a": x["s_a"].mean((2, 3))}
    with pytest.raises(NotApplicable, match="map"):
        objective()(*signals(flat), x)
