"""lsskd: what only this method must hold."""

from __future__ import annotations

import math

import pytest
import torch
from distilling import Case, Trained, arguments, rng, shapes
from torch import nn

from transfuse.core.errors import BadInput, NotApplicable
from transfuse.core.training import seeded
from transfuse.distill import Distiller
from transfuse.distill._base import Signal
from transfuse.distill.lsskd import (
    LSSKD,
    AuxiliaryBranch,
    Rotations,
    class_marginal,
    class_scores,
    feature_loss,
    iteration_loss,
    joint_labels,
    layer_loss,
    ramp,
    rotated,
    self_labels_loss,
)

N, M, D, TAU = 3, 2, 4, 3.0
STAGES = ("stage1", "stage2", "stage3")


def inputs(seed):
    g = rng(seed)

    def draw(*shape):
        return 2 * torch.randn(5, *shape, generator=g, dtype=torch.float64)

    found = {"final": draw(N), "old": draw(N), "labels": torch.randint(1, N, (5,), generator=g)}
    for i in (1, 2, 3):
        found[f"z{i}"], found[f"o{i}"], found[f"f{i}"] = draw(M, N * M), draw(M, N * M), draw(M, D)
    return found


def flat(x, letter):
    return [x[f"{letter}{i}"].flatten(0, 1) for i in (1, 2, 3)]


def spread(z):
    e = [torch.exp(v / TAU) for v in z]
    return [v / sum(e) for v in e]


def log(p):
    return torch.log(torch.clamp(p, min=1e-300))


def kl(p, q):
    return sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True))


def sad_by_hand(x, fixed):
    total = 0.0
    for i in (1, 2, 3):
        terms = []
        for b in range(len(x["labels"])):
            for j in range(M):
                z = x[f"z{i}"][b, j]
                terms.append(torch.log(torch.exp(z).sum()) - z[int(x["labels"][b]) * M + j])
        total = total + sum(terms) / len(terms)
    return total


def layer_by_hand(x, fixed):
    rows, total = len(x["final"]), 0.0
    for b in range(rows):
        for i in (1, 2):
            for j in range(M):
                p, q = spread(fixed[f"z{i + 1}"][b, j]), spread(x[f"z{i}"][b, j])
                total = total + kl(p, q) / (rows * M)
        shown = [spread(fixed["z3"][b, j]) for j in range(M)]
        target = [sum(shown[j][n * M + m] for j in range(M) for m in range(M)) / M for n in range(N)]
        total = total + kl(target, spread(x["final"][b])) / rows
    return 9.0 * total


def iteration_by_hand(x, fixed):
    rows, total = len(x["final"]), 0.0
    for b in range(rows):
        total = total + kl(spread(fixed["old"][b]), spread(x["final"][b])) / rows
        for i in (1, 2, 3):
            for j in range(M):
                p, q = spread(fixed[f"o{i}"][b, j]), spread(x[f"z{i}"][b, j])
                total = total + kl(p, q) / (rows * M)
    return 9.0 * total


def feature_by_hand(x, fixed):
    total, rows = 0.0, len(x["final"]) * M
    for b in range(len(x["final"])):
        for j in range(M):
            for i in (1, 2):
                total = total + sum((x[f"f{i}"][b, j] - fixed[f"f{i + 1}"][b, j]) ** 2) / rows
    return total


def agree(x):
    """All branches say what the last one says, whose classes do not depend on the rotation asked for."""
    z = x["z3"][:, :1, ::M].repeat(1, M, 1)  # [B, M, N]
    joint = z.repeat_interleave(M, -1)
    return {**x, "z1": joint, "z2": joint, "z3": joint.clone(), "final": z[:, 0].clone()}


def remembered(x):
    return {**x, "old": x["final"].clone(), **{f"o{i}": x[f"z{i}"].clone() for i in (1, 2, 3)}}


def without_class_0(x):
    changed = {name: value.clone() for name, value in x.items()}
    for name in ("final", "old"):
        changed[name][..., 0] = -torch.inf
    for name in ("z1", "z2", "z3", "o1", "o2", "o3"):
        changed[name][..., :M] = -torch.inf
    return changed


UNPADDED = "images have no padding"
CASES = [
    Case("sad", inputs, lambda x: self_labels_loss(flat(x, "z"), x["labels"], M), sad_by_hand,
         ("z1", "z2", "z3"), excluded=without_class_0,
         without={"least": "the least cross-entropy is at infinity", "padded": UNPADDED}),
    Case("layer", inputs, lambda x: layer_loss(x["final"], flat(x, "z"), M, TAU), layer_by_hand,
         ("final", "z1", "z2"), least=agree, excluded=without_class_0, without={"padded": UNPADDED}),
    Case("iteration", inputs,
         lambda x: iteration_loss(x["final"], flat(x, "z"), x["old"], flat(x, "o"), TAU), iteration_by_hand,
         ("final", "z1", "z2", "z3"), least=remembered, excluded=without_class_0,
         without={"padded": UNPADDED}),
    Case("feature", inputs, lambda x: feature_loss(flat(x, "f")), feature_by_hand, ("f1", "f2"),
         least=lambda x: {**x, "f1": x["f3"].clone(), "f2": x["f3"].clone()},
         without={"padded": UNPADDED, "excluded": "features are no logits"}),
]  # fmt: skip


class Net(nn.Module):
    """Three stages and a head; the last stage has a block that keeps its size."""

    def __init__(self, blocks=1):
        super().__init__()

        def conv(a, b, stride):
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        self.stage1, self.stage2 = conv(1, 4, 1), conv(4, 6, 2)
        more = [conv(8, 8, 1) for _ in range(blocks - 1)]
        self.stage3 = nn.Sequential(conv(6, 8, 2), *more) if more else conv(6, 8, 2)
        self.head = nn.Linear(8, N)

    def forward(self, pixel_values):
        x = self.stage3(self.stage2(self.stage1(pixel_values)))
        return self.head(x.mean((2, 3)))


def net(seed=0, blocks=1):
    with seeded(seed):
        return Net(blocks)


def pictures(count=24, side=8, seed=0):
    """A bright bar at the top, the left or the middle."""
    g = rng(seed)
    images = 0.2 * torch.randn(count, 1, side, side, generator=g)
    labels = torch.randint(0, N, (count,), generator=g)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0][[slice(0, 2), slice(3, 5), slice(6, 8)][label]] += 1
    return [{"pixel_values": a, "labels": b} for a, b in zip(images, labels, strict=True)]


def made(folder="unused", seed=0, student=None, objective=None, count=4, **options):
    student = student or net(seed)
    objective = objective or LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES, transforms=count)
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 12, "seed": seed}
    return Distiller(
        student=student, objective=objective, data_collator=Rotations(count), train_dataset=pictures(),
        args=arguments(folder, **{**settings, **options}),
    )  # fmt: skip


def train(seed):
    trainer = made(seed=seed, max_steps=36, learning_rate=2e-2)
    before = shapes(trainer.student)
    with seeded(seed):
        trainer.train()
    return Trained(trainer.losses, trainer.objective.export(), before)


def signal(objective, student, images):
    from transfuse.core import taps

    with taps.capture(student, STAGES, grad=True) as seen:
        logits = student(images)
    return Signal(logits=logits, taps=dict(seen))


def test_images_and_labels_are_stacked_in_one_order():
    image = torch.arange(9.0).view(1, 1, 3, 3)
    images = torch.cat([image, image + 100])
    turned = rotated(images)
    assert torch.equal(turned[::4], images)
    assert torch.equal(turned[5][0], torch.rot90(images[1][0], 1))
    assert torch.equal(turned[3][0], torch.rot90(images[0][0], 3))
    assert joint_labels(torch.tensor([2, 0])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    batch = Rotations(4)([{"pixel_values": i, "labels": n} for i, n in zip(images, (2, 0), strict=True)])
    assert torch.equal(batch["pixel_values"], turned)
    assert batch["labels"].tolist() == [2, -100, -100, -100, 0, -100, -100, -100]


def test_class_marginal_and_scores_by_hand():
    """One image, two rotations shown; columns are class 0 at rotation 0 and 1, class 1 at rotation 0 and 1."""
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.2, 0.2]], dtype=torch.float64)
    found = class_marginal(2.0 * q.log(), count=2, tau=2.0).exp()
    assert torch.allclose(found, torch.tensor([[0.45, 0.55]], dtype=torch.float64))
    assert torch.allclose(class_scores(q, 2), torch.tensor([[0.9, 1.1]], dtype=torch.float64))


def test_the_ramp_starts_in_the_second_epoch():
    assert ramp(1, 10) == 0.0
    assert ramp(2, 10) == pytest.approx(0.16)
    assert ramp(10, 10) == pytest.approx(0.8)


@pytest.mark.parametrize("blocks", [1, 3])
def test_branches_are_copies_of_the_stages_above(blocks):
    student = net(blocks=blocks).eval()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES)
    images = torch.randn(3, 1, 8, 8)
    x = student.stage1(images)
    below = [x, student.stage2(x), student.stage3(student.stage2(x))]
    objective.branches.eval()
    features = [branch(value)[0] for branch, value in zip(objective.branches, below, strict=True)]
    answers = [branch(value)[1] for branch, value in zip(objective.branches, below, strict=True)]
    deepest = below[2].mean((2, 3))
    assert torch.allclose(features[0], deepest, atol=1e-6) and torch.allclose(features[1], deepest, atol=1e-6)
    assert all(f.shape == (3, 8) for f in features) and all(z.shape == (3, 4 * N) for z in answers)
    extra = objective.branches[2].stages[0]
    assert extra(below[2]).shape == below[2].shape
    if blocks == 3:  # the blocks of the last stage that keep its size
        assert torch.allclose(extra(below[2]), student.stage3[1:](below[2]))
    own = {id(p) for p in student.parameters()}
    assert not any(id(p) in own for p in objective.parameters())
    assert isinstance(objective.branches[0], AuxiliaryBranch)


def test_the_loss_is_the_sum_of_its_parts_and_only_upright_images_are_classified():
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES, lam_kl=0.5, lam_f=0.1)
    objective.on_epoch(student, 0, 4)
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    batch = {"pixel_values": rotated(images), "labels": Rotations(4).labels(labels)}
    first = objective(signal(objective, student, batch["pixel_values"]), None, batch)
    assert "iteration" not in first
    parts = first["cls"] + first["sad"] + 0.5 * first["layer"] + 0.1 * first["feature"]
    assert torch.allclose(first["loss"], parts)
    whole = student(batch["pixel_values"])
    assert torch.allclose(first["cls"], nn.functional.cross_entropy(whole[::4], labels))
    objective.on_epoch(student, 1, 4)  # alpha = 0.8 * 2 / 4
    second = objective(signal(objective, student, batch["pixel_values"]), None, batch)
    assert second["iteration"] > 0  # the memory is in evaluation mode, the student in training mode
    assert torch.allclose(second["loss"], parts + 0.5 * 0.4 * second["iteration"])


@pytest.mark.parametrize("term", ["lam_sad", "lam_layer", "lam_kl", "lam_f", "alpha_T"])
def test_each_term_can_be_left_out(term):
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES, **{term: 0.0})
    for epoch in (0, 1):
        objective.on_epoch(student, epoch, 4)
    images = torch.randn(4, 1, 8, 8)
    batch = {"pixel_values": rotated(images), "labels": Rotations(4).labels(torch.tensor([0, 1, 2, 0]))}
    found = objective(signal(objective, student, batch["pixel_values"]), None, batch)
    weights = {"cls": 1.0, "sad": 1.0, "layer": 1.0, "feature": 0.01, "iteration": 0.4}
    gone = {"lam_sad": ["sad"], "lam_layer": ["layer"], "lam_kl": ["layer", "iteration"],
            "lam_f": ["feature"], "alpha_T": ["iteration"]}[term]  # fmt: skip
    rest = sum(found[name] * weight for name, weight in weights.items() if name not in gone)
    assert torch.allclose(found["loss"], rest)


def test_memory_is_last_epochs_network_without_gradient_in_evaluation_mode():
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES)
    images = torch.randn(2, 1, 8, 8)
    objective.train()
    assert not any(module.training for module in objective.before.modules())
    assert not list(objective.before.parameters())
    objective.on_epoch(student, 0, 3)
    with torch.no_grad():
        student.head.weight.add_(1.0)
        objective.branches[0].head.bias.add_(1.0)
    objective.on_epoch(student, 1, 3)
    kept = student.eval()(images)
    with torch.no_grad():
        student.head.weight.add_(1.0)
    assert torch.allclose(objective.before.student(images), kept)
    now = objective.before.branches[0].head.bias
    assert torch.equal(now, objective.branches[0].head.bias) and not now.requires_grad
    objective.on_epoch(student, 1, 3)  # a resumed epoch keeps what was remembered
    assert torch.allclose(objective.before.student(images), kept)
    objective.on_epoch(student, 2, 3)
    assert torch.equal(objective.before.student.head.weight, student.head.weight)


def test_a_running_memory():
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES, memory=0.75)
    values = []
    for epoch in range(3):
        objective.on_epoch(student, epoch, 3)
        values.append(float(objective.before.student.head.bias[0]))
        with torch.no_grad():
            student.head.bias.add_(1.0)
    start = values[0]
    assert values[1:] == pytest.approx([start + 1.0, 0.75 * (start + 1.0) + 0.25 * (start + 2.0)])


def test_gradients_of_the_branches_reach_the_backbone_and_not_the_memory():
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES)
    images = rotated(torch.randn(2, 1, 8, 8))
    batch = {"pixel_values": images, "labels": Rotations(4).labels(torch.tensor([0, 1]))}
    found = objective(signal(objective, student, images), None, batch)
    for part in ("sad", "layer", "feature"):
        (slope,) = torch.autograd.grad(found[part], student.stage1[0].weight, retain_graph=True)
        assert float(slope.abs().sum()) > 0, part
    (head,) = torch.autograd.grad(found["sad"], student.head.weight, allow_unused=True)
    assert head is None


def test_the_export_is_the_plain_backbone():
    trainer = made()
    before = shapes(trainer.student)
    trainer.train()
    exported = trainer.objective.export()
    assert exported is trainer.student and shapes(exported) == before
    plain = net()
    plain.load_state_dict(exported.state_dict())
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(plain.eval()(images), exported.eval()(images))


def test_evaluation_counts_upright_images_alone():
    trainer = made(max_steps=3)
    trainer.train()
    data = pictures(10, seed=5)
    images, labels = (torch.stack([row[name] for row in data]) for name in ("pixel_values", "labels"))
    value = trainer.evaluate(data)["eval_loss"]
    student = trainer.student.eval()
    batches = [slice(0, 8), slice(8, 10)]
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(student(images[b]), labels[b], reduction="none") for b in batches
        ]
    assert value == pytest.approx(float(torch.cat(losses).mean()), rel=0.05)


def test_it_resumes_its_trajectory(tmp_path):
    """Stopped within an epoch: the memory comes from the checkpoint, and the run ends bit for bit the same."""
    whole = made(tmp_path / "whole")
    whole.train()
    first = made(tmp_path / "cut", save_strategy="steps", save_steps=5)

    class Stop(Exception):
        pass

    def stop(*_):
        if first.state.global_step == 7:
            raise Stop

    first.objective.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        first.train()
    second = made(tmp_path / "cut", save_strategy="steps", save_steps=5)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    assert second.losses == whole.losses
    ends = [each.model.state_dict() for each in (whole, second)]
    assert any(name.startswith("objective.before") for name in ends[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_scores_of_branches():
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES)
    images = torch.randn(2, 1, 8, 8)
    found = objective.scores(images)
    assert len(found) == 3 and all(s.shape == (2, N) for s in found)
    student.eval()
    objective.branches.eval()
    z = objective.branches[0](student.stage1(rotated(images)))[1]
    expected = sum(z[r::4].view(2, N, 4)[:, :, j] for r in range(4) for j in range(4))
    assert torch.allclose(found[0], expected, atol=1e-5)


def test_bfloat16():
    student = net().bfloat16()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16), stages=STAGES)
    images = rotated(torch.randn(2, 1, 8, 8)).bfloat16()
    batch = {"pixel_values": images, "labels": Rotations(4).labels(torch.tensor([0, 1]))}
    for epoch in (0, 1):
        objective.on_epoch(student, epoch, 2)
    found = objective(signal(objective, student, images), None, batch)
    assert all(
        value.dtype == torch.float32 and math.isfinite(float(value.detach())) for value in found.values()
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("stages", ("stage1",)), ("tau", 0.0), ("alpha_T", 1.5), ("lam_kl", -1.0), ("lam_f", -1.0),
     ("transforms", 5), ("memory", 1.0), ("lam_sad", -0.1), ("lam_layer", -0.1)],
)  # fmt: skip
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        LSSKD(net(), torch.zeros(2, 1, 8, 8), **{"stages": STAGES, name: value})


def test_models_and_images_that_do_not_fit():
    with pytest.raises(ValueError, match="squares"):
        LSSKD(net(), torch.zeros(2, 1, 8, 6), stages=STAGES)
    with pytest.raises(BadInput, match="stage2"):
        LSSKD(net(), torch.zeros(2, 1, 8, 8), stages=("stage1", "stag2"))
    with pytest.raises(NotApplicable, match="follow each other"):
        LSSKD(net(), torch.zeros(2, 1, 8, 8), stages=("stage1", "stage3"))
    with pytest.raises(BadInput, match="count"):
        Rotations(0)


def test_batches_that_were_not_turned_are_refused():
    student = net()
    objective = LSSKD(student, torch.zeros(2, 1, 8, 8), stages=STAGES)
    with pytest.raises(BadInput, match="Rotations"):
        Distiller(student=student, objective=objective, train_dataset=pictures(), args=arguments("unused"))
    with pytest.raises(BadInput, match="Rotations"):
        made(student=student, objective=objective, count=2)
