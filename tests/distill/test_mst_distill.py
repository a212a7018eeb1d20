"""mst-distill: what only this method must hold."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from distilling import Case, Trained, rng, shapes, state
from torch import nn

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill.mst_distill import (
    DenseGate,
    FeatureMask1d,
    FeatureMask2d,
    Gate,
    MSTDistill,
    UnknownLayer,
    kd_terms,
    load_balance,
    routed_terms,
    together,
)

# --- the formulas by loops -----------------------------------------------------------------------------------


def spread(z, tau=1.0):
    powers = [torch.exp(each / tau) for each in z]
    return [each / sum(powers) for each in powers]


def kd(student, teacher, tau=4.0):
    """KD(student <- teacher) of one sample."""
    total = 0.0
    for q, p in zip(spread(student, tau), spread(teacher, tau), strict=True):
        total = total + p * (torch.log(p.clamp(min=1e-300)) - torch.log(q.clamp(min=1e-300)))
    return tau**2 * total


def stage_one(live, fixed):
    total = 0.0
    for b, label in enumerate(live["labels"].tolist()):
        names = ("student", "mm", "aux")
        for i in names:
            total = total - torch.log(spread(live[i][b])[label])
            for j in names:
                if i != j:
                    total = total + kd(live[i][b], live[j][b])  # both sides learn
    return total / len(live["labels"])


def stage_three(gate, k):
    def value(live, fixed):
        values = []
        for b in range(len(live["student"])):
            z, taught = live["student"][b], fixed["teachers"][b]
            shares, still = spread(live["gate"][b]), spread(fixed["gate"][b])
            if gate == "soft":
                values.append(kd(z, sum(c * t for c, t in zip(still, taught, strict=True))))
                continue
            best = sorted(range(len(still)), key=lambda e: -float(still[e]))[:k]
            parts = [kd(z, taught[e]) * (shares[e] if gate == "st" else 1.0) for e in best]
            values.append(sum(parts) / k)
        return torch.stack(values).mean()

    return value


def logits(g, *shape):
    return 2 * torch.randn(*shape, generator=g, dtype=torch.float64)


def first_inputs(seed):
    g = rng(seed)
    found = {name: logits(g, 4, 5) for name in ("student", "mm", "aux")}
    return {**found, "labels": torch.randint(0, 5, (4,), generator=g)}


def third_inputs(seed):
    g = rng(seed)
    return {"student": logits(g, 4, 5), "teachers": logits(g, 4, 3, 5), "gate": logits(g, 4, 3)}


def excluded(x):
    changed = {k: v.clone() for k, v in x.items()}
    for name in changed.keys() & {"student", "mm", "aux", "teachers"}:
        changed[name][..., 0] = -torch.inf
    if "labels" in changed:
        changed["labels"] = changed["labels"].clamp(min=1)
    return changed


def routed_case(name, gate, k, learns=("student",)):
    def loss(x):
        shares = torch.softmax(x["gate"].to(torch.promote_types(x["gate"].dtype, torch.float32)), 1)
        return routed_terms(x["student"], x["teachers"], shares, k=k, gate=gate)[0].mean()

    return Case(
        name, third_inputs, loss, stage_three(gate, k), learns, excluded=excluded,
        least=lambda x: {**x, "teachers": x["student"][:, None].repeat(1, 3, 1)},
        without={"padded": "each sample has one row of logits"},
    )  # fmt: skip


def balance_case(name, kind, factor):
    def reference(live, fixed):
        shares = [spread(row) for row in live["gate"]]
        count = len(shares[0])
        sums = [sum(row[e] for row in shares) for e in range(count)]
        if kind == "kl":
            value = sum((math.log(1 / count) - torch.log(each / len(shares))) / count for each in sums)
            return value / count if factor is None else value * factor
        mean = sum(sums) / count
        return torch.sqrt(sum((each - mean) ** 2 for each in sums) / (count - 1)) / mean * (factor or 1.0)

    def loss(x):
        shares = torch.softmax(x["gate"].to(torch.promote_types(x["gate"].dtype, torch.float32)), 1)
        return load_balance(shares, kind, factor=factor)

    least = (lambda x: {**x, "gate": torch.zeros_like(x["gate"])}) if kind == "kl" else None
    without = {"padded": "each sample has one row", "excluded": "the gate's own logits are finite"}
    if least is None:
        without["least"] = "a deviation has no slope where it is 0"
    return Case(
        name, third_inputs, loss, reference, ("gate",), least=least, without=without,
        couples="the balance is that of the whole batch",
    )  # fmt: skip


CASES = [
    Case(
        "together", first_inputs, lambda x: together([x["student"], x["mm"], x["aux"]], x["labels"]), stage_one,
        ("student", "mm", "aux"), excluded=excluded,
        without={"least": "the labels pull away from the others", "padded": "each sample has one row of logits"},
    ),
    routed_case("hard", "hard", 1),
    routed_case("hard-2", "hard", 2),
    routed_case("soft", "soft", 1),
    routed_case("st", "st", 2, ("student", "gate")),
    balance_case("kl", "kl", None),
    balance_case("kl-paper", "kl", 1.0),
    balance_case("cv", "cv", None),
]  # fmt: skip


# --- models of two modalities --------------------------------------------------------------------------------


class One(nn.Module):
    """Sees `left`."""

    def __init__(self, width=12):
        super().__init__()
        self.fc1, self.norm = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.fc2 = nn.Linear(width, 3)

    def forward(self, left):
        return self.fc2(torch.relu(self.norm(self.fc1(left))))


class Other(One):
    """Sees `right`."""

    def forward(self, right):
        return super().forward(right)


class Both(nn.Module):
    """Sees both, by way of a map."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)

    def forward(self, left, right):
        maps = torch.stack([left, right], 1).unflatten(2, (2, 3))
        return self.fc(self.pool(torch.relu(self.norm(self.conv(maps)))).flatten(1))


def columns(count=48, seed=0):
    g = rng(seed)
    labels = torch.arange(count) % 3
    centre = torch.randn(3, 6, generator=rng(7))
    left = centre[labels] + 1.5 * torch.randn(count, 6, generator=g)
    right = centre[labels].flip(1) + 0.5 * torch.randn(count, 6, generator=g)
    return {"left": left, "right": right, "labels": labels}


LAYERS = {"both": ["norm", "pool"], "other": ["fc1"]}


def method(seed=0, layers=None, teachers=None, **options):
    with seeded(seed):
        student, both, other = One(), Both(), Other()
    settings = {"epochs": (3, 2, 12), "lr": 5e-3, "batch_size": 16, "seed": seed, **options}
    return MSTDistill(
        student, teachers or {"both": both, "other": other}, mask_layers=layers or LAYERS, **settings
    )


def train(seed):
    made = method(seed)
    before = shapes(made.student)
    made.initialise(columns())
    kept = [(state(model), model) for model in made.teachers.values()]
    made.specialise(columns(), columns(24, 1))
    kept += [(state(made.masks), made.masks)]
    done = made.distil(columns(), columns(24, 1))
    return Trained(done.losses, made.student, before, kept)


# --- tests ---------------------------------------------------------------------------------------------------


def test_values_by_hand():
    """KD of (ln 3, 0) towards (0, 0) at temperature 1: 0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25)."""
    ours, theirs = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(kd_terms(ours, theirs, tau=1.0)) == pytest.approx(expected)
    assert float(kd_terms(4 * ours, theirs)) == pytest.approx(16 * expected)
    shares = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    uneven = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(load_balance(shares)) == pytest.approx(uneven / 2)  # the code's
    assert float(load_balance(shares, factor=1.0)) == pytest.approx(uneven)  # the paper's
    assert float(load_balance(shares, "cv")) == pytest.approx(math.sqrt(0.5) / 1.0)
    assert load_balance(torch.tensor([[1.0, 0.0]])).isfinite()  # clamped


def test_dense_predictions_average_their_places():
    g = rng(0)
    z, t = logits(g, 2, 3, 4, 5), logits(g, 2, 3, 4, 5)
    whole = kd_terms(z, t).mean()
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (z, t)]
    assert float(whole) == pytest.approx(float(kd_terms(*flat).mean()))
    terms, chosen = routed_terms(z, torch.stack([t, z], 1), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    assert chosen.flatten().tolist() == [0, 1] and float(terms[1]) == pytest.approx(0.0, abs=1e-12)
    soft, _ = routed_terms(z, torch.stack([t, z], 1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), gate="soft")
    assert float(soft.mean()) == pytest.approx(float(whole))
    assert DenseGate(3, 4)(z.float()).shape == (2, 4)
    assert [p.shape for p in Gate(5, 4).parameters()] == [(10, 5), (10,), (4, 10), (4,)]
    gate = Gate(5, 4)  # nothing between: it is linear
    x = torch.randn(2, 5, generator=g)
    assert torch.allclose(gate(2 * x) - gate(x), gate(x) - gate(0 * x), atol=1e-5)


def slopes_of_gate(gate):
    x = third_inputs(0)
    g = x["gate"].requires_grad_()
    student, teachers = (x[name].requires_grad_() for name in ("student", "teachers"))
    terms, _ = routed_terms(student, teachers, torch.softmax(g, 1), gate=gate)
    found = torch.autograd.grad(terms.mean(), [g, x["teachers"], x["student"]], allow_unused=True)
    assert found[1] is None and found[2] is not None
    return found[0]


def test_which_rule_teaches_the_gate():
    assert slopes_of_gate("hard") is None
    assert slopes_of_gate("soft") is None
    assert slopes_of_gate("random") is None
    assert float(slopes_of_gate("st").abs().sum()) > 0


def test_the_balance_moves_the_student_too():
    """The gate reads logits that are not detached."""
    made = method(epochs=(1, 0, 4), w_task=0.0, w_kl=0.0, w_lb=1.0)
    made.initialise(columns())
    made.specialise(columns())
    before = state(made.student)
    made.distil(columns())
    assert not torch.equal(before["fc1.weight"], made.student.fc1.weight)


def by_hand(mask, z):
    """MaskNet of a vector, written out with its parameters."""
    width, token = z.shape[1], mask.token
    tokens = (z @ mask.embed.weight.T + mask.embed.bias).reshape(len(z), width, token)
    q, k, v = (tokens @ mask.attention.in_proj_weight.T + mask.attention.in_proj_bias).chunk(3, -1)
    heads, size = mask.attention.num_heads, token // mask.attention.num_heads
    mixed = []
    for i in range(heads):
        a, b, c = (x[..., i * size : (i + 1) * size] for x in (q, k, v))
        mixed.append(torch.softmax(a @ b.transpose(1, 2) / math.sqrt(size), -1) @ c)
    out = torch.cat(mixed, -1) @ mask.attention.out_proj.weight.T + mask.attention.out_proj.bias
    return torch.sigmoid(out @ mask.head.weight.T + mask.head.bias).squeeze(-1)


def test_a_mask_against_its_formula():
    mask = FeatureMask1d(14).double()
    assert mask.token == 14 // 6 * 3 == 6
    z = logits(rng(1), 3, 14)
    assert torch.allclose(mask(z), by_hand(mask, z))
    maps = FeatureMask2d(7).double().eval()
    x = logits(rng(2), 3, 7, 6, 5)
    pooled = maps.reduce(x)
    assert pooled.shape == (3, 7, 1, 1)
    assert [m.stride for m in maps.reduce if isinstance(m, nn.Conv2d)] == [(2, 2), (1, 1)]
    assert torch.allclose(maps(x), by_hand(maps.mask, pooled.flatten(1)))
    assert FeatureMask1d(24, heads=2, factor=3).token == 8


def test_each_route_masks_one_layer_and_leaves_no_hook():
    made = method(epochs=(1, 1, 1))
    data = columns()
    made.initialise(data)
    made.specialise(data)
    assert made.routes == [("both", "norm"), ("both", "pool"), ("other", "fc1")]
    assert isinstance(made.masks[0], FeatureMask2d) and isinstance(
        made.masks[1], FeatureMask1d
    )  # 1x1 is a vector
    both = made.teachers["both"].eval()
    with torch.no_grad():
        plain = both(data["left"], data["right"])
        masked = made._specialists(data)
        seen = torch.stack([data["left"], data["right"]], 1).unflatten(2, (2, 3))
        maps = both.pool(torch.relu(both.norm(both.conv(seen))))
        share = made.masks[1](maps.flatten(1))
        assert torch.allclose(masked[1], both.fc(maps.flatten(1) * share), atol=1e-6)
        assert len(masked) == 3 and not torch.allclose(masked[0], plain)
        assert torch.equal(both(data["left"], data["right"]), plain)
    assert not any(m._forward_hooks for net in made.teachers.values() for m in net.modules())


def test_stage_two_draws_the_teachers_to_the_student_and_keeps_the_best_epoch():
    made = method(epochs=(3, 12, 0), lr=1e-2)
    data, held = columns(), columns(24, 1)
    made.initialise(data)
    kept = [state(m) for m in (made.student, *made.teachers.values())]
    made.specialise(data, held)
    figures = made.stages.mask_validation
    assert len(figures) == 12 and min(figures) < figures[0]
    for model in made.teachers.values():
        model.eval()
    with torch.no_grad():
        goal = made.student.eval()(held["left"])
        now = sum(float(kd_terms(out, goal).mean()) for out in made._specialists(held))
    assert now == pytest.approx(min(figures), rel=1e-4)
    for before, model in zip(kept, (made.student, *made.teachers.values()), strict=True):
        assert all(
            torch.equal(value, model.state_dict()[name]) for name, value in before.items()
        )  # BN statistics too


def test_the_best_student_is_kept_and_the_weights_decay():
    weights = []
    made = method(epochs=(1, 1, 5), lr=5e-2, kl_every=3, lb_every=2, w_task=0.0, w_lb=0.0)
    data, held = columns(), columns(24, 1)
    done = made.fit(data, held)
    assert done.kept == done.validation.index(min(done.validation))
    with torch.no_grad():
        said = made.student.eval()(held["left"])
    assert float(nn.functional.cross_entropy(said, held["labels"])) == pytest.approx(
        min(done.validation), rel=1e-5
    )
    assert all(sum(shares) == pytest.approx(1.0) for shares in done.routing) and len(done.routing) == 5
    for decay in (1.0, 0.5):  # with a student that hardly moves, the loss is the weight times a constant
        slow = method(
            epochs=(1, 1, 7), lr=1e-12, w_task=0.0, w_lb=0.0, kl_decay=decay, kl_every=3, batch_size=48
        )
        weights.append(slow.fit(data).student)
    ratio = [b / a for a, b in zip(*weights, strict=True)]
    assert ratio == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25], rel=1e-3)
    uneven = method(epochs=(1, 1, 4), lr=1e-12, w_task=0.0, w_kl=0.0, lb_decay=0.9, lb_every=2, batch_size=48)
    losses = uneven.fit(data).student
    assert [each / losses[0] for each in losses] == pytest.approx([1.0, 0.9, 0.9, 0.81], rel=1e-3)


def test_stored_logits_change_nothing():
    ends = []
    for precompute in (True, False):
        made = method(precompute=precompute)
        made.fit(columns())
        ends.append(made.stages.student)
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_teacher_without_masks_and_the_other_routes():
    data = columns()
    plain = method(layers={"both": [], "other": []}, epochs=(2, 1, 2))
    done = plain.fit(data)
    assert done.masks == [] and len(plain.routes) == 2
    with torch.no_grad():
        both = plain.teachers["both"].eval()(data["left"], data["right"])
        assert torch.equal(plain._specialists(data)[0], both)
    for gate in ("soft", "st", "random"):
        assert all(
            math.isfinite(x) for x in method(gate=gate, k=2, balance="cv", epochs=(1, 1, 2)).fit(data).student
        )
    skipped = method(epochs=(0, 0, 1))
    before = copy.deepcopy(skipped.teachers["both"].state_dict())
    assert skipped.fit(data).together == []
    assert torch.equal(before["fc.weight"], skipped.teachers["both"].fc.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 4}, "k = 4"), ({"k": 0}, "k = 0"), ({"gate": "top"}, "gate"), ({"balance": "var"}, "balance"),
        ({"tau": 0.0}, "tau"), ({"w_kl": -1.0}, "w_kl"), ({"epochs": (1, 1)}, "epochs"), ({"lr": 0.0}, "lr"),
        ({"layers": {"both": ["norm"]}}, "mask_layers"), ({"batch_size": 0}, "batch_size"),
        ({"layers": {"both": ["fc9"], "other": []}}, r"fc9.*does not exist; use one of conv, norm, pool, fc"),
    ],
)  # fmt: skip
def test_bad_settings(options, message):
    with pytest.raises(BadInput, match=message):
        method(**options)


def test_an_unknown_layer_is_a_key_error_that_lists_the_names():
    with pytest.raises(KeyError) as caught:
        method(layers={"both": ["fc9"], "other": []})
    assert isinstance(caught.value, UnknownLayer) and isinstance(caught.value, BadInput)
    assert "fc9" in str(caught.value) and "use one of conv, norm, pool, fc" in str(caught.value)
    assert not str(caught.value).startswith(("'", '"'))


@pytest.mark.parametrize("gate", ["hard", "soft", "st", "random"])
def test_double_precision(gate):
    """The gate takes the student's precision, float32 at least."""
    data = {name: value.double() if value.is_floating_point() else value for name, value in columns().items()}
    made = method(gate=gate, epochs=(1, 1, 2))
    for model in (made.student, *made.teachers.values()):
        model.double()
    done = made.fit(data, data)
    assert all(math.isfinite(loss) for loss in [*done.together, *done.masks, *done.student])
    assert all(p.dtype == torch.float64 for p in made.gate_net.parameters())


def test_bad_data_and_models():
    made, data = method(), columns()
    with pytest.raises(BadInput, match="pair the modalities"):
        made.fit({**data, "right": data["right"][:-1]})
    with pytest.raises(BadInput, match="pair the modalities"):
        made.fit({"left": data["left"], "right": data["right"]})
    with pytest.raises(BadInput, match="no input of Other"):
        made.fit({"left": data["left"], "labels": data["labels"]})
    with pytest.raises(BadInput, match="specialise"):
        made.distil(data)
    with pytest.raises(BadInput, match="student itself"):
        MSTDistill(made.student, {"a": made.student}, mask_layers={"a": []})
    made.teachers["other"].fc2 = nn.Linear(12, 4)
    with pytest.raises(IncompatibleModels, match="other"):
        made.fit(data)


@pytest.mark.parametrize("left", [1, 2])
def test_a_last_batch_of_one_row_joins_the_one_before(left):
    data = {name: column[: 16 + left] for name, column in columns().items()}
    done = method(epochs=(1, 1, 1), batch_size=8).fit(data, data)
    assert len(done.together) == len(done.masks) == len(done.student) == left + 1


def test_bad_masks(recwarn):
    with pytest.raises(BadInput, match="too few"):
        FeatureMask1d(5)
    with pytest.raises(BadInput, match="heads"):
        FeatureMask1d(12, heads=0)
    with torch.device("meta"):
        FeatureMask1d(340)  # 340 * 168 * 340 is 19.4 M
        assert len(recwarn) == 0
        with pytest.warns(UserWarning, match="105 M"):
            FeatureMask1d(596)
    made = method(layers={"both": [], "other": ["fc1"]})
    made.teachers["other"].fc1 = nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (3, 4)))
    made.teachers["other"].norm = nn.Flatten()
    with pytest.raises(NotApplicable, match="mask_layers"):
        made.specialise(columns())
