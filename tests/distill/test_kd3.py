"""kd3: what only this method must hold."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from distilling import Case, Trained, rng, shapes, state
from torch import nn

from transfuse.core.errors import BadInput, IncompatibleModels
from transfuse.core.training import seeded
from transfuse.distill.kd3 import (
    KD3,
    MixDistribution,
    NothingSelected,
    SharedHead,
    alignment_loss,
    combined,
    contrast_loss,
    gradient_importance,
    importance,
    mix_distribution,
    select,
    share_of_student,
    soft_label_loss,
)

C, D = 3, 4


def inputs(seed):
    g = rng(seed)
    names = {"z_s": C, "z_t": C, "u": D, "v": D, "phi": D}
    found = {n: 2 * torch.randn(5, k, generator=g, dtype=torch.float64) for n, k in names.items()}
    found["w"] = torch.randn(5, C, D, generator=g, dtype=torch.float64)  # one classifier per row
    found["c"] = torch.randint(0, C, (5,), generator=g)
    return found


def spread(z, tau=1.0):
    e = [torch.exp(v / tau) for v in z]
    return [v / sum(e) for v in e]


def log(p):
    return torch.log(torch.clamp(p, min=1e-300))


def soft_by_hand(x, fixed):
    total = 0.0
    for b in range(len(x["z_s"])):
        p, q = spread(fixed["z_t"][b], 4.0), spread(x["z_s"][b], 4.0)
        total = total + 16.0 * sum(a * (log(a) - log(c)) for a, c in zip(p, q, strict=True))
    return total / len(x["z_s"])


def weights(x):
    rows = [importance(w, c.view(1)) for w, c in zip(x["w"], x["c"], strict=True)]
    return torch.cat(rows)


def align_by_hand(x, fixed):
    total = 0.0
    for b in range(len(x["u"])):
        row = [abs(float(v)) for v in fixed["w"][b, int(x["c"][b])]]
        for d in range(D):
            w = D * row[d] / sum(row)
            total = total + (w * (x["u"][b, d] - fixed["phi"][b, d])) ** 2
    return total / len(x["u"])


def contrast_by_hand(x, fixed):
    def unit(v):
        return v / torch.sqrt((v * v).sum())

    rows = len(x["u"])
    alike = [[(unit(x["u"][i]) * unit(x["v"][j])).sum() / 0.1 for j in range(rows)] for i in range(rows)]
    total = 0.0
    for i in range(rows):
        total = total - torch.log(torch.exp(alike[i][i]) / sum(torch.exp(a) for a in alike[i]))
        total = total - torch.log(torch.exp(alike[i][i]) / sum(torch.exp(alike[j][i]) for j in range(rows)))
    return total / (2 * rows)


def without_class_0(x):
    changed = {name: value.clone() for name, value in x.items()}
    changed["z_s"][:, 0] = changed["z_t"][:, 0] = -torch.inf
    return changed


UNPADDED, FEATURES = "images have no padding", "features are no logits"
CASES = [
    Case("soft-labels", inputs, lambda x: soft_label_loss(x["z_s"], x["z_t"], 4.0), soft_by_hand, ("z_s",),
         least=lambda x: {**x, "z_s": x["z_t"].clone()}, excluded=without_class_0,
         without={"padded": UNPADDED}),
    Case("alignment", inputs, lambda x: alignment_loss(x["u"], x["phi"], weights(x)), align_by_hand, ("u",),
         least=lambda x: {**x, "u": x["phi"].clone()}, without={"padded": UNPADDED, "excluded": FEATURES}),
    Case("contrast", inputs, lambda x: contrast_loss(x["u"], x["v"], 0.1), contrast_by_hand, ("u", "v"),
         couples="the other rows of the batch are the negatives",
         without={"least": "it falls as long as rows move apart", "padded": UNPADDED, "excluded": FEATURES}),
]  # fmt: skip


class Net(nn.Module):
    """One convolution, a mean, a linear head (or two)."""

    def __init__(self, width, classes=C, deep=False):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)
        if deep:
            self.head = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, classes))

    def forward(self, pixel_values):
        return self.head(self.late(self.early(pixel_values)).mean((2, 3)))


def net(width, seed=0, **options):
    with seeded(seed):
        return Net(width, **options)


def pool(count=48, seed=0):
    return torch.randn(count, 1, 8, 8, generator=rng(seed))


def made(teacher=None, student=None, count=48, **options):
    options = {"floor": 0.0, **options}
    return KD3(teacher or net(8, seed=1), student or net(4, seed=2), pool(count), **options)


def train(seed):
    run = made(rho=0.8)
    kept = state(run.teacher)
    history = run.fit(epochs=6, batch_size=8, seed=seed)
    psi = {"head.projector.0.weight": (8, 4), "head.projector.1.weight": (8,), "head.projector.1.bias": (8,)}
    shared = {"head.classifier.weight": (C, 8), "head.classifier.bias": (C,)}
    body = {name: shape for name, shape in shapes(net(4)).items() if not name.startswith("head")}
    return Trained(history.losses, run.student, {**body, **psi, **shared}, [(kept, run.teacher)])


def test_the_students_share_grows_after_the_warm_up():
    assert [share_of_student(e, 10) for e in range(4)] == pytest.approx([0.0, 0.0, 0.1, 0.15])
    assert share_of_student(9, 10) == pytest.approx(0.45)
    z = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert combined(*z, 0.5).tolist()[0] == pytest.approx([0.625, 0.375])


def test_selection_by_hand():
    """Class 0: 0.9, 0.8, 0.7, 0.6 (two kept); class 1: 0.7, 0.6, 0.55 (two kept); class 2: 0.40 < 1.5 / 3."""
    first = [0.9, 0.8, 0.7, 0.6]
    second = [0.55, 0.7, 0.6]
    p = [[a, 1 - a, 0.0] for a in first] + [[0.0, a, 1 - a] for a in second] + [[0.3, 0.3, 0.4]]
    found = select(torch.tensor(p), 0.5)
    assert found.kept.tolist() == [True, True, False, False, False, True, True, False]
    assert found.thresholds.tolist() == pytest.approx([0.8, 0.6, 0.4])
    assert found.coverage == pytest.approx(2 / 3)
    assert select(torch.tensor(p), None).kept.all()


@pytest.mark.parametrize("rho", [0.1, 0.3, 0.5, 0.7, 1.0])
def test_the_threshold_is_the_quantile(rho):
    for count in (4, 9, 11, 20):
        confidence = 0.6 + 0.3 * torch.rand(count, generator=rng(count), dtype=torch.float64)
        p = torch.stack([confidence, 1 - confidence], 1)
        expected = confidence >= torch.quantile(confidence, 1 - rho) - 1e-12
        if int(expected.sum()) >= 2:
            assert torch.equal(select(p, rho, floor=0.0).kept, expected)


def test_a_class_that_never_appears_is_skipped():
    p = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.3, 0.0]])
    found = select(p, 1.0)
    assert found.kept.all() and found.coverage == pytest.approx(1 / 3)
    assert found.thresholds[1:].isinf().all()


def test_nothing_selected_shows_the_confidences():
    p = torch.full((40, 10), 0.1)
    with pytest.raises(RuntimeError, match=r"0\.1-0\.2: 40"):
        select(p, 0.5)
    with pytest.raises(NothingSelected):
        made(floor=3.0).fit(epochs=1, batch_size=8)


def test_importance_by_hand():
    w = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    assert importance(w, torch.tensor([0, 1])).tolist() == [[0.5, 1.5], [1.0, 1.0]]
    features = torch.randn(4, 2, generator=rng(0))
    top = (features @ w.T).argmax(-1)
    assert torch.allclose(gradient_importance(lambda f: f @ w.T, features), importance(w, top))


def test_mixed_statistics_by_hand():
    x = torch.randn(3, 2, 4, 4, generator=rng(0), dtype=torch.float64)
    partner, share = torch.tensor([1, 2, 0]), torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64)
    found = mix_distribution(x, partner, share)
    for b in range(3):
        for c in range(2):
            own, other = x[b, c], x[partner[b], c]
            mean = share[b] * own.mean() + (1 - share[b]) * other.mean()
            s, s_other = ((m - m.mean()).square().mean().sqrt() + 1e-6 for m in (own, other))
            spread = share[b] * s + (1 - share[b]) * s_other
            assert torch.allclose(found[b, c], spread * (own - own.mean()) / s + mean)
    assert torch.allclose(found[1], x[1])
    flat = mix_distribution(torch.ones(2, 1, 3, 3), torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))
    assert flat.isfinite().all()  # a map without spread


def test_no_gradient_through_the_partners_statistics():
    x = torch.randn(2, 1, 3, 3, generator=rng(1), requires_grad=True)
    found = mix_distribution(x, torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))
    (slope,) = torch.autograd.grad(found[0].square().sum(), x)
    assert float(slope[0].abs().sum()) > 0 and float(slope[1].abs().sum()) == 0


def test_mix_distribution_repeats_under_a_seed_and_keeps_dtype():
    mix, x = MixDistribution(0.1), torch.randn(6, 2, 4, 4)
    with seeded(3):
        first = mix(x)
    with seeded(3):
        assert torch.equal(first, mix(x))
    assert mix(x.bfloat16()).dtype == torch.bfloat16
    assert not torch.allclose(first, x)


def test_contrast_is_symmetric_and_falls_with_agreement():
    u, v = torch.randn(2, 6, 5, generator=rng(2))
    assert torch.allclose(contrast_loss(u, v), contrast_loss(v, u))
    assert contrast_loss(u, u) < contrast_loss(u, v)
    assert torch.allclose(contrast_loss(3 * u, v), contrast_loss(u, v))


def test_the_students_head_is_the_teachers_and_does_not_move():
    run = made()
    run.fit(epochs=2, batch_size=8)
    head = run.student.head
    assert isinstance(head, SharedHead)
    for name in ("weight", "bias"):
        mine, theirs = getattr(head.classifier, name), getattr(run.teacher.head, name)
        assert torch.equal(mine, theirs) and mine is not theirs and not mine.requires_grad
    images = pool(3, seed=9)
    student = run.student
    phi = student.late(student.early(images)).mean((2, 3))
    expected = head.projector(phi) @ run.teacher.head.weight.T + run.teacher.head.bias
    assert torch.allclose(student(images), expected, atol=1e-6)
    grown = sum(p.numel() for p in student.parameters()) - sum(p.numel() for p in net(4).parameters())
    assert grown == (8 * 4 + 2 * 8) + (8 * C + C) - (4 * C + C)  # psi and W, less its own head


def test_without_sharing_the_bare_student_comes_out():
    run = made(share_classifier=False)
    before = shapes(run.student)
    run.fit(epochs=2, batch_size=8)
    assert shapes(run.student) == before and isinstance(run.student.head, nn.Linear)


def test_the_loss_is_the_weighted_sum_and_the_teacher_sees_no_perturbation():
    run = made(weights=(0.5, 2.0, 0.3))
    seen = []
    run.fit(epochs=1, batch_size=8)
    from transfuse.core import taps

    with torch.no_grad():
        z, phi = run.teacher.eval()(run.pool[:8]), run.teacher.late(run.teacher.early(run.pool[:8]))
        phi = phi.mean((2, 3))
    batch = {"x": run.pool[:8], "z": z, "phi": phi, "c": z.argmax(-1)}
    with taps.watch(run.teacher, lambda call: seen.append(call)):
        found = run._loss(batch, run.student.head.projector)
    assert not seen
    expected = 0.5 * found["kd"] + 2.0 * found["align"] + 0.3 * found["con"]
    assert torch.allclose(found["loss"], expected)
    psi = run.student.head.projector(run.student.late(run.student.early(run.pool[:8])).mean((2, 3)))
    w = importance(run.teacher.head.weight, batch["c"])
    assert torch.allclose(found["align"], alignment_loss(psi, phi, w), atol=1e-6)


@pytest.mark.parametrize("at", [None, "early"])
def test_perturbing_an_image_or_a_feature_map(at):
    run = made(perturb_at=at, weights=(0.0, 0.0, 1.0))
    history = run.fit(epochs=2, batch_size=8)
    assert all(math.isfinite(loss) for loss in history.losses)


def test_selection_is_dynamic_and_includes_the_teacher():
    """After the warm-up the student has a say; without it, the selection stays the teacher's."""
    for follow in (True, False):
        run = made(rho=0.5, follow_student=follow)
        run.fit(epochs=5, batch_size=8, lr=0.2)
        kept = [s.kept for s in run.selections]
        assert len(kept) == 5 and torch.equal(kept[0], kept[1])
        assert any(not torch.equal(kept[0], k) for k in kept[2:]) is follow
    with torch.no_grad():
        p = run.teacher.eval()(run.pool).softmax(-1)
    assert torch.equal(select(p, 0.5, floor=0.0).kept, kept[0])


def test_plain_distillation_is_a_special_case():
    run = made(rho=None, share_classifier=False, weights=(1.0, 0.0, 0.0))
    history = run.fit(epochs=3, batch_size=8, max_steps=4)
    assert history.steps == 12 and run.selections[0].kept.all()


def test_a_head_that_is_not_linear():
    teacher = net(8, seed=1, deep=True)
    run = made(teacher=teacher, teacher_head="head")
    run.fit(epochs=1, batch_size=8)
    assert torch.equal(run.student.head.classifier[2].weight, teacher.head[2].weight)
    phi = torch.rand(4, 8, generator=rng(0))
    assert torch.allclose(run._importance(phi, torch.zeros(4).long()), gradient_importance(teacher.head, phi))
    assert all(p.requires_grad for p in teacher.parameters())
    assert made(teacher=copy.deepcopy(teacher)).teacher_head == "head.2"


def test_augmented_images_are_shown_to_both():
    run = made(augment=lambda x: x.flip(-1))
    assert run.fit(epochs=1, batch_size=8).steps


def test_it_resumes_its_trajectory(tmp_path):
    """Stopped within an epoch: its selection comes from the checkpoint, and the weights end bit for bit the same."""
    whole = made()
    losses = whole.fit(epochs=4, batch_size=4).losses
    cut = made()
    calls = []

    class Stop(Exception):
        pass

    def stop(module, args):  # once per step
        calls.append(1)
        if len(calls) > len(losses) - 3:
            raise Stop

    assert len(losses) > 18
    cut.mix.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        cut.fit(epochs=4, batch_size=4, output_dir=tmp_path, save_every=5)
    again = made()
    history = again.fit(epochs=4, batch_size=4, output_dir=tmp_path, save_every=5)
    assert history.resumed_at and history.losses == losses
    ends = [run.student.state_dict() for run in (whole, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path):
    def fit(seed=0, **options):
        run = KD3(net(8, seed=1), net(4, seed=2), pool(seed=seed), floor=0.0, **options)
        return run.fit(epochs=1, batch_size=8, output_dir=tmp_path)

    fit()
    assert fit().resumed_at
    for other in ({"tau": 1.0}, {"rho": None}, {"weights": (1.0, 0.0, 0.0)}, {"seed": 1}):
        with pytest.raises(BadInput, match="other arguments"):
            fit(**other)


def test_models_and_pool_may_differ_in_dtype():
    run = made(teacher=net(8, seed=1).bfloat16())
    assert run.fit(epochs=2, batch_size=8).steps
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    run = made(student=net(4, seed=2).bfloat16(), augment=lambda x: x.flip(-1))
    assert run.fit(epochs=2, batch_size=8).steps
    assert {p.dtype for p in run.student.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_student_stays_on_its_device():
    run = made(student=net(4, seed=2).cuda())
    run.fit(epochs=2, batch_size=8)
    assert {p.device.type for p in run.student.parameters()} == {"cuda"} and run.pool.device.type == "cpu"


def test_the_pool_moves_nothing_but_itself(monkeypatch):
    """The student's device is not the pool's to choose: no module is moved in `fit` but what `fit` makes."""
    moved = []
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, **k: (moved.append(self), to(self, *a, **k))[1])
    run = made()
    run.fit(epochs=1, batch_size=8)
    assert not any(run.student in module.modules() for module in moved)


def test_sure_predictions_are_still_told_apart():
    z = torch.zeros(20, C)
    z[:, 0] = torch.linspace(20.0, 30.0, 20)
    assert select(combined(z, z, 0.0), 0.5).kept.tolist() == [False] * 10 + [True] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"teacher_head": "he*"}, "teacher_head"), ({"teacher_head": "late"}, "teacher_head"),
     ({"student_head": "early.0"}, "student_head"), ({"perturb_at": "head"}, "perturb_at"),
     ({"weights": (math.inf, 1.0, 1.0)}, "weights"), ({"tau": math.inf}, "tau")],
)  # fmt: skip
def test_modules_that_cannot_serve(options, message):
    with pytest.raises(BadInput, match=message):
        made(**options)


def test_fits_that_cannot_be():
    with pytest.raises(BadInput, match="batch_size"):
        made().fit(epochs=1, batch_size=1)
    for psi in (nn.Linear(4, 5), nn.Linear(3, 8)):
        with pytest.raises(BadInput, match="projector"):
            made(projector=psi).fit(epochs=1, batch_size=8)
    with pytest.raises(BadInput, match="floating"):
        KD3(net(8), net(4), pool().to(torch.uint8))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rho", 0.0), ("rho", 1.5), ("tau", 0.0), ("beta", 0.0), ("temperature", -1.0), ("weights", (1.0, 1.0)),
     ("weights", (0.0, 0.0, 0.0)), ("weights", (1.0, -1.0, 0.0)), ("floor", -1.0), ("warmup", -1)],
)  # fmt: skip
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        made(**{name: value})


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="one batch of 64"):
        made().fit(epochs=1, batch_size=64)
    with pytest.raises(BadInput, match="head"):
        made(teacher_head="heat")
    with pytest.raises(BadInput, match="early"):
        made(perturb_at="earli")
    with pytest.raises(IncompatibleModels, match="label space"):
        made(student=net(4, classes=5)).fit(epochs=1, batch_size=8)
    with pytest.raises(BadInput, match="pool"):
        KD3(net(8), net(4), torch.zeros(0, 1, 8, 8))
    teacher = net(8)
    with pytest.raises(BadInput, match="copy"):
        KD3(teacher, teacher, pool())
    teacher.head = nn.Conv1d(8, C, 1)
    teacher.forward = lambda x: teacher.head(teacher.late(teacher.early(x)).mean((2, 3)).unsqueeze(-1))[
        ..., 0
    ]
    with pytest.raises(TypeError, match="teacher_head"):
        made(teacher=teacher)
