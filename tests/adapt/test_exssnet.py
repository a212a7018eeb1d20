"""ExSSNet against loops and hand values, through learning, transfer, exporting and refusing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from transfuse.adapt.exssnet import (
    ExSSNet,
    SupermaskConv1d,
    SupermaskConv2d,
    SupermaskLinear,
    Task,
    TaskNorm,
    UnknownTask,
    average_accuracy,
    convert_to_supermask,
    forgetting,
    knn_accuracy,
    load,
    nearest_tasks,
    save,
    signed_constant,
    sparse_overlap,
    supermask,
)
from transfuse.core.batches import minibatches
from transfuse.core.errors import BadInput, CorruptFile, IncompatibleModels, NotApplicable
from transfuse.core.files import read_tensors
from transfuse.core.packed import unpack_bits
from transfuse.core.training import generator, seeded


def fresh(seed=0):
    """A small convolutional network with batch norms of both kinds."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(96, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4),
        )  # fmt: skip


def data(seed, classes=4, rows=96):
    """Images 4x4 around one prototype per class."""
    random = generator(seed)
    centres = torch.randn(classes, 1, 4, 4, generator=random)
    y = torch.arange(rows) % classes
    return centres[y] + 0.5 * torch.randn(rows, 1, 4, 4, generator=random), y


def batches(seed, classes=4):
    x, y = data(seed, classes)
    return minibatches({"x": x, "y": y}, 16, seed=seed)


QUICK = {"mask_epochs": 2, "weight_epochs": 2, "weight_lr": 0.01, "density": 0.3}


def adapt(base, seed=0, tasks=2, **options):
    learner = ExSSNet(base, **{**QUICK, "seed": seed, **options})
    for task in range(tasks):
        learner.add_task(batches(task, 4 - task), 4 - task)
    return learner


def answers(learner, rows=None):
    x = data(9)[0][slice(None) if rows is None else rows]
    return torch.cat([learner.logits(x, task) for task in range(len(learner.classes))], 1)


WRONG = {
    "density": lambda base: ExSSNet(base, density=0),
    "mode": lambda base: ExSSNet(base, mode="no"),
    "schedule": lambda base: ExSSNet(base, schedule="no"),
    "knn_transfer": lambda base: ExSSNet(base, knn_transfer="no"),
    "mask_epochs": lambda base: ExSSNet(base, mask_epochs=0),
    "weight_epochs": lambda base: ExSSNet(base, weight_epochs=1.5),
    "mask_lr": lambda base: ExSSNet(base, mask_lr=math.inf),
    "weight_lr": lambda base: ExSSNet(base, weight_lr=0.0),
    "head": lambda base: ExSSNet(base, head="1"),
    "neighbours": lambda base: ExSSNet(base, neighbours=0),
    "module": lambda base: ExSSNet(nn.ReLU()),
}


# --- masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.34, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(7, 9), (4, 3, 3, 3)])
def test_mask_against_a_loop(density, shape):
    scores = torch.randn(shape, generator=generator(1))
    scores.view(-1)[3::5] = 0.25  # ties
    flat = scores.abs().flatten().tolist()
    dropped = int((1 - density) * len(flat))
    order = sorted(range(len(flat)), key=lambda i: (flat[i], -i))  # of equals, the later goes first
    expected = [i not in order[:dropped] for i in range(len(flat))]
    assert supermask(scores, density).flatten().tolist() == expected


def test_mask_by_hand():
    scores = torch.tensor([[0.1, -3.0], [2.0, -0.2], [0.2, 0.0]])
    assert supermask(scores, 0.5).tolist() == [[False, True], [True, True], [False, False]]
    for density in (0.0, -1.0, 1.5):
        with pytest.raises(BadInput, match="density"):
            supermask(scores, density)
    with pytest.raises(BadInput, match="keeps none"):
        supermask(scores, 1e-20)


def test_signed_constant():
    weight = torch.tensor([[0.3, -0.1], [-2.0, 0.7]])
    assert torch.equal(signed_constant(weight), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))  # sqrt(2 / 2)
    with seeded(0):
        layer = nn.Conv2d(4, 8, 3, groups=2)
        found = signed_constant(layer.weight)
        assert found.abs().unique().item() == pytest.approx(math.sqrt(2 / 18))  # fan in: 2 x 3 x 3
        wide = signed_constant(nn.Linear(400, 300).weight)
    assert signed_constant(torch.tensor([[0.5, 0.0]])).tolist() == [[1.0, 0.0]]  # a zero has no sign
    x = torch.randn(200, 400, generator=generator(2))
    assert torch.relu(x @ wide.T).square().mean().item() == pytest.approx(
        1.0, rel=0.1
    )  # relu keeps the scale


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_layers_and_their_gradient(kind):
    """Forward as the plain layer with W m; scores get sign(S) dL/d(W m) W, for weights outside the mask as well."""
    random = generator(3)
    layer, x = {
        "linear": (SupermaskLinear(5, 4, density=0.3, num_tasks=2), torch.randn(3, 5, generator=random)),
        "conv1d": (
            SupermaskConv1d(2, 4, 3, padding=1, groups=2, density=0.3, num_tasks=2),
            torch.randn(2, 2, 6, generator=random),
        ),
        "conv2d": (
            SupermaskConv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect", density=0.3, num_tasks=2),
            torch.randn(2, 2, 6, 6, generator=random),
        ),
    }[kind]
    layer, x = layer.double(), x.double()
    assert layer.bias is None and not any(p.requires_grad for p in layer.parameters())
    plain = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d}[kind]
    arguments = {
        "linear": ((5, 4), {}),
        "conv1d": ((2, 4, 3), {"padding": 1, "groups": 2}),
        "conv2d": ((2, 3, 3), {"stride": 2, "padding": 1, "padding_mode": "reflect"}),
    }[kind]
    for task in (0, 1):
        layer.task = task
        scores = layer.scores[task].requires_grad_(True)
        reference = plain(*arguments[0], **arguments[1], bias=False).double()
        reference.weight = nn.Parameter(layer.weight.detach() * supermask(scores, 0.3))
        out = layer(x)
        assert torch.equal(out, reference(x))
        (gradient,) = torch.autograd.grad(out.square().sum(), scores)
        (direct,) = torch.autograd.grad(reference(x).square().sum(), reference.weight)
        assert torch.allclose(gradient, scores.detach().sign() * direct * layer.weight, atol=1e-12)
        assert (gradient != 0).sum() > supermask(scores, 0.3).sum()
    assert "density=0.3, tasks=2" in repr(layer)


def test_weight_gradient_stays_in_the_free_part():
    layer = SupermaskLinear(6, 5, density=0.5, num_tasks=2)
    layer.task = 0
    layer.close()
    layer.task = 1
    free = layer.free_mask(1)
    assert torch.equal(free, layer.mask(1) & ~layer.mask(0)) and 0 < free.sum() < layer.mask(1).sum()
    x = torch.randn(4, 6, generator=generator(4))
    plain = layer(x)
    layer.weight.requires_grad_(True)
    (whole,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    layer.free = free
    assert torch.equal(layer(x), plain)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    assert torch.equal(gradient, whole * free)


def test_convert():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    base = fresh()
    signs = base[4].weight.sign()
    x, expected = data(0)[0], fresh()
    network = convert_to_supermask(base, 1.0)
    assert network is base and torch.equal(before, torch.get_rng_state())
    assert [type(layer) for layer in network] == [
        SupermaskConv2d, TaskNorm, nn.ReLU, nn.Flatten, SupermaskLinear, TaskNorm, nn.ReLU, SupermaskLinear,
    ]  # fmt: skip
    assert torch.equal(network[4].weight.sign(), signs) and network[4].bias is None
    assert not any(p.requires_grad for p in network.parameters())
    for layer in network:
        if hasattr(layer, "add_task"):
            layer.add_task(*([generator(0)] if hasattr(layer, "weight") else []))
    with torch.no_grad():  # at density 1 it is the plain network with these weights and no biases
        for i in (0, 4, 7):
            expected[i].weight.copy_(network[i].weight)
            if expected[i].bias is not None:
                expected[i].bias.zero_()
        assert torch.allclose(network(x), expected(x), atol=1e-6)
        assert torch.allclose(network.eval()(x), expected.eval()(x), atol=1e-6)


def test_convert_refuses():
    with pytest.raises(BadInput, match="already"):
        convert_to_supermask(convert_to_supermask(fresh()))
    with pytest.raises(BadInput, match="layer"):
        convert_to_supermask(nn.Linear(3, 3))
    with pytest.raises(BadInput, match="at 4"):
        convert_to_supermask(nn.Sequential(*[nn.ReLU()] * 4, nn.Linear(3, 3)), 1e-20)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(NotApplicable, match="share"):
        convert_to_supermask(tied)
    layer = SupermaskLinear(3, 2)
    with pytest.raises(UnknownTask, match="task"):
        layer(torch.zeros(1, 3))


class Cube(nn.Module):
    """Its hidden features pass a norm as `[rows, 12, *room]`."""

    def __init__(self, norm, room=()):
        super().__init__()
        with seeded(0):
            self.first, self.norm, self.last = nn.Linear(16, 12), norm, nn.Linear(12, 4)
        self.room = room

    def forward(self, x):
        hidden = (
            self.first(x.flatten(1)).reshape(len(x), 12, *[1] * len(self.room)).expand(-1, -1, *self.room)
        )
        return self.last(torch.relu(self.norm(hidden).flatten(2).mean(2) if self.room else self.norm(hidden)))


class Renamed(nn.BatchNorm1d):
    """As many libraries have: a constructor of its own, the same computation."""

    def __init__(self, width):
        super().__init__(width, affine=False)


class Doubled(nn.BatchNorm1d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("norm", "room"),
    [
        (nn.BatchNorm1d(12), (3,)), (nn.BatchNorm2d(12), (1, 2)), (nn.BatchNorm3d(12), (1, 2, 1)),
        (nn.SyncBatchNorm(12), ()), (Renamed(12), ()), (nn.BatchNorm1d(12, track_running_stats=False), ()),
    ],
    ids=lambda part: type(part).__name__,
)  # fmt: skip
def test_no_running_norm_forgets(norm, room):
    learner = ExSSNet(Cube(norm, room), **QUICK)
    assert type(learner.model.norm) is TaskNorm
    learner.add_task(batches(0), 4)
    kept = learner.logits(data(9)[0], 0)
    learner.add_task(batches(1), 4)
    assert torch.equal(learner.logits(data(9)[0], 0), kept)


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm1d(12, track_running_stats=True), Doubled(12), nn.LazyBatchNorm1d()],
    ids=lambda norm: type(norm).__name__,
)
def test_other_running_statistics_are_refused(norm):
    network = Cube(norm)
    before = list(network.modules())
    with pytest.raises(NotApplicable, match=rf"norm \({type(norm).__name__}\).* running statistics"):
        ExSSNet(network)
    assert list(network.modules()) == before
    with pytest.raises(NotApplicable, match="batch norm"):
        TaskNorm(nn.InstanceNorm1d(12))


def test_a_network_of_masked_layers_by_hand():
    network = nn.Sequential(nn.Flatten(), SupermaskLinear(16, 12, density=0.5), nn.BatchNorm1d(12))
    network.append(SupermaskLinear(12, 4, density=0.5))
    with pytest.raises(NotApplicable, match=r"2 \(BatchNorm1d\)"):
        ExSSNet(network)
    network[2] = TaskNorm(network[2])
    assert ExSSNet(network, **QUICK).add_task(batches(0), 4) == 0


def test_layers_in_two_places_are_refused():
    for part in (nn.Linear(16, 16), nn.BatchNorm1d(16)):
        network = nn.ModuleDict({"a": part, "b": nn.Sequential(part, nn.Linear(16, 4))})
        with pytest.raises(NotApplicable, match="two places"):
            convert_to_supermask(network)


def test_statistics_follow_the_network():
    for move in (True, False):
        network = fresh() if move else fresh().double()
        learner = ExSSNet(network, **QUICK)
        if move:
            network.double()
        x, y = data(0)
        learner.add_task([(x.double(), y)], 4)
        assert {norm.norms[0].running_mean.dtype for norm in learner.norms} == {torch.float64}
        assert learner.logits(x.double(), 0).dtype == torch.float64


def test_statistics_belong_to_a_task():
    norm = TaskNorm(nn.BatchNorm1d(3, momentum=0.5)).train()
    norm.add_task()
    x = torch.randn(8, 3, generator=generator(5)) + 2
    assert torch.allclose(norm(x).mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(norm.norms[0].running_mean, x.mean(0) / 2)
    norm.close()
    kept = norm.norms[0].running_mean.clone()
    norm(x + 5)
    assert torch.equal(norm.norms[0].running_mean, kept)
    norm.add_task()
    assert torch.equal(norm.norms[1].running_mean, torch.zeros(3))
    norm.drop_task()
    assert norm.task == 0 and len(norm.norms) == 1


# --- tasks in a row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exclusive", "shared", "masks_only"])
def test_what_moves_and_what_does_not(mode):
    learner = adapt(fresh(), tasks=1, mode=mode)
    x = data(9)[0]
    first = learner.logits(x, 0)
    before = {name: layer.weight.clone() for name, layer in learner.layers.items()}
    statistics = [norm.norms[0].state_dict() for norm in learner.norms]
    statistics = [{key: value.clone() for key, value in each.items()} for each in statistics]
    learner.add_task(batches(1), 4)
    learner.add_task(batches(2), 4)
    assert torch.equal(learner.logits(x, 0), first) == (mode != "shared")
    for name, layer in learner.layers.items():
        moved = layer.weight != before[name]
        if mode == "masks_only":
            assert not moved.any()
        else:
            assert moved.any()
            assert not (moved & ~(layer.mask(1) | layer.mask(2))).any()
            assert (moved & layer.mask(0)).any() == (mode == "shared")
    for norm, kept in zip(learner.norms, statistics, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in norm.norms[0].state_dict().items())


def test_every_earlier_task_keeps_its_bits():
    learner, x, kept = ExSSNet(fresh(), **QUICK), data(9)[0], []
    for task in range(4):
        learner.add_task(batches(task), 4)
        for earlier, expected in enumerate(kept):
            assert torch.equal(learner.logits(x, earlier), expected)
        kept.append(learner.logits(x, task))
    assert all(layer.free is None for layer in learner.layers.values())


def test_it_learns_and_heads_are_cut():
    learner = ExSSNet(fresh(), **{**QUICK, "mask_epochs": 6, "weight_epochs": 6})
    tasks = [Task(batches(t, 4 - t), [data(t, 4 - t)], 4 - t) for t in range(2)]
    matrix = learner.learn(tasks)
    assert matrix[1, 0] == matrix[0, 0] > 0.9 and matrix[1, 1] > 0.9 and matrix[0, 1].isnan()
    assert average_accuracy(matrix) == pytest.approx(float(matrix[1].mean())) and forgetting(matrix) == 0
    assert learner.logits(data(0)[0], 1).shape == (96, 3)
    assert learner.predict(data(0)[0], 1).max() < 3
    with pytest.raises(BadInput, match="tasks"):
        learner.learn(tasks)
    for wrong in (-1, 2, "0"):
        with pytest.raises(KeyError, match=r"task = .* is not one of the 2 learnt"):
            learner.predict(data(0)[0], wrong)


def test_a_full_network_warns_and_skips():
    learner = adapt(fresh(), tasks=1, density=1.0)
    before = {name: layer.weight.clone() for name, layer in learner.layers.items()}
    with pytest.warns(UserWarning, match="task 1 has no weight"):
        learner.add_task(batches(1), 4)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in learner.layers.items())


def test_the_best_epoch_is_kept():
    """The validation labels are wrong on purpose: training only hurts, so early states win."""
    x, y = data(0)
    learner = ExSSNet(fresh(), **{**QUICK, "mask_epochs": 3, "weight_epochs": 3, "weight_lr": 0.05})
    wrong = [(x, (y + 1) % 4)]
    learner.add_task(batches(0), 4, validation=wrong)
    curve = learner.curves[0]
    assert len(curve["masks"]) == len(curve["weights"]) == 3
    assert learner.accuracy(wrong, 0) == max(curve["masks"] + curve["weights"])
    weights = [layer.weight.abs().unique() for layer in learner.layers.values()]
    if max(curve["weights"]) <= max(curve["masks"]):
        assert all(len(each) == 1 for each in weights)  # as before phase 2


def test_cosine_ends_lower():
    """The first epoch is the same; the rate of a later one is not."""
    ends = {s: adapt(fresh(), tasks=1, schedule=s, mask_epochs=3) for s in ("cosine", "constant")}
    firsts = {
        s: adapt(fresh(), tasks=1, schedule=s, mask_epochs=1, mode="masks_only")
        for s in ("cosine", "constant")
    }
    assert torch.equal(answers(firsts["cosine"]), answers(firsts["constant"]))
    assert not torch.equal(answers(ends["cosine"]), answers(ends["constant"]))


def test_a_failure_leaves_no_trace():
    learner = adapt(fresh(), tasks=1)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    x, y = data(1)
    late = [(x[:16], y[:16] % 2), (x[16:], y[16:])]  # the second batch has labels out of range
    with pytest.raises(BadInput, match="labels"):
        learner.add_task(late, 2)
    after = learner.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert learner.classes == [4] and not any(p.requires_grad for p in learner.model.parameters())
    assert learner.add_task(batches(1), 4) == 1
    for classes, argument, given in (
        (1, "num_classes", batches(1)),
        (5, "num_classes", batches(1)),
        (4, "batches", []),
    ):
        with pytest.raises(BadInput, match=argument):
            learner.add_task(given, classes)
    assert learner.classes == [4, 4] and len(learner.layers["0"].scores) == 2
    with pytest.raises(BadInput, match="head"):
        ExSSNet(learner.model, head="1")


def test_tasks_of_another_learner_are_refused(tmp_path):
    learner = adapt(fresh(), tasks=1)
    save(learner, tmp_path / "a")
    other = adapt(fresh(seed=1), tasks=1)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    for again in (lambda: ExSSNet(other.model, **QUICK), lambda: load(other.model, tmp_path / "a")):
        with pytest.raises(BadInput, match=r"model = .* holds tasks at 0: 1, not 0"):
            again()
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    opened = nn.Sequential(nn.Flatten(), SupermaskLinear(16, 4, density=0.5, num_tasks=2))
    with pytest.raises(BadInput, match=r"model = .* holds tasks at 1: 2, not 0"):
        ExSSNet(opened)
    network = convert_to_supermask(fresh(), 0.3)
    first, second = ExSSNet(network, **QUICK), ExSSNet(network, **QUICK)
    first.add_task(batches(0), 4)
    with pytest.raises(BadInput, match=r"model = .* holds tasks at 0: 1, not 0"):
        second.add_task(batches(0), 4)
    assert first.add_task(batches(1), 4) == 1
    assert torch.equal(answers(load(convert_to_supermask(fresh(), 0.3), tmp_path / "a")), answers(learner))


@pytest.mark.parametrize("task", [5, -1, "a", None, 1.0, True])
def test_an_unknown_task_is_a_key_error(tmp_path, task):
    learner = adapt(fresh())
    x, file = data(9)[0], tmp_path / "task.safetensors"
    for ask in (
        lambda: learner.logits(x, task), lambda: learner.predict(x, task), lambda: learner.masks(task),
        lambda: learner.export_task(task, file), lambda: learner.accuracy(batches(0), task),
    ):  # fmt: skip
        with pytest.raises(UnknownTask, match=r"task = .* is not one of the 2 learnt") as caught:
            ask()
        assert isinstance(caught.value, KeyError) and isinstance(caught.value, BadInput)
    assert not file.exists()
    with pytest.raises(UnknownTask, match="task"):
        learner.layers["0"].mask(task)


def test_any_integer_names_a_task(tmp_path):
    learner, x = adapt(fresh()), data(9)[0]
    for task in (np.int64(1), torch.tensor(1)):
        assert torch.equal(learner.logits(x, task), learner.logits(x, 1))
        assert torch.equal(learner.masks(task)["0"], learner.masks(1)["0"])
        header = read_tensors(learner.export_task(task, tmp_path / "one.safetensors"))[1]
        assert header["task"] == 1


def test_data_that_cannot_be_learnt_from():
    learner, (x, y) = adapt(fresh(), tasks=1), data(1)
    once, many = (pair for pair in [(x, y)] * 3), [(x, y)]
    spent = iter(many)
    for given, options, argument in (
        (once, {}, "batches = 'generator' can be gone through only once"),
        (lambda epoch: spent, {}, "batches.* gives no batch in epoch"),
        (None, {}, "batches"),
        ([], {}, "batches"),
        (many, {"validation": []}, "validation.* gives no batch"),
        (many, {"validation": iter(many)}, "validation.* only once"),
        (many, {"num_classes": 2.5}, "num_classes"),
        ([(x, y.float())], {}, "labels = 'torch.float32'"),
        ([(x, nn.functional.one_hot(y))], {}, "labels"),
        ([(x, y == 1)], {}, "labels"),
    ):
        with pytest.raises(BadInput, match=argument):
            learner.add_task(given, **{"num_classes": 4, **options})
    assert next(once) is not None and learner.classes == [4]
    with pytest.raises(BadInput, match="gives no batch"):
        learner.accuracy([], 0)
    assert learner.add_task([(x, y.int())], np.int64(4)) == 1 and type(learner.classes[1]) is int


def test_after_a_failure_the_same_task_answers():
    learner, x = adapt(fresh(), knn_transfer="best", neighbours=3), data(9)[0]
    learner.logits(x, 0)
    stood = learner.evaluated(x)
    for given in ([], [(x, torch.full((len(x),), 4))], [*[data(1)] * 3, (x, torch.full((len(x),), 4))]):
        with pytest.raises(BadInput):
            learner.add_task(given, 4)
        assert torch.equal(learner.evaluated(x), stood)
    assert {part.task for part in (*learner.layers.values(), *learner.norms)} == {0}


# --- transfer and measures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [1, 3, 200])
def test_knn_against_scikit_learn(neighbours):
    x = torch.randn(60, 5, generator=generator(6))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0.3).long()
    known = int(0.66 * 60)
    judge = KNeighborsClassifier(min(neighbours, known)).fit(x[:known].numpy(), y[:known].numpy())
    expected = float((judge.predict(x[known:].numpy()) == y[known:].numpy()).mean())
    assert knn_accuracy(x, y, neighbours) == pytest.approx(expected)


def test_knn_refuses():
    with pytest.raises(BadInput, match="features"):
        knn_accuracy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    for wrong in (0, 1.5):
        with pytest.raises(BadInput, match="neighbours"):
            knn_accuracy(torch.zeros(9, 2), torch.zeros(9, dtype=torch.long), wrong)


@pytest.mark.parametrize(
    ("accuracies", "sources", "expected"),
    [
        ([0.3, 0.6, 0.6], "best", [1]), ([0.5, 0.4], "best", []), ([0.5, 0.4], "always", [0]),
        ([0.51, 0.4, 0.9], "all", [0, 2]), ([0.1], "all", []), ([], "always", []),
    ],
)  # fmt: skip
def test_nearest_tasks(accuracies, sources, expected):
    assert nearest_tasks(accuracies, 2, sources) == expected


@pytest.mark.parametrize("sources", ["best", "always", "all"])
def test_transfer_starts_from_earlier_scores(sources):
    learner = adapt(fresh(), tasks=2, knn_transfer=sources, neighbours=3, mode="masks_only")
    stored = {name: [s.clone() for s in layer.scores] for name, layer in learner.layers.items()}
    learner.mask_lr = 1e-12  # so that the scores stay where they started
    learner.add_task(batches(0), 4)  # the first task's data again
    chosen = learner.sources[2]
    assert chosen and (sources != "best" or len(chosen) == 1)
    for name, layer in learner.layers.items():
        mean = sum(stored[name][i].double() for i in chosen) / len(chosen)
        assert torch.allclose(layer.scores[2].double(), mean, atol=1e-6)
        assert all(torch.equal(layer.scores[i], stored[name][i]) for i in range(2))  # none overwritten
    assert ExSSNet(fresh(), **QUICK).sources == []


def test_measures_by_hand():
    nan = math.nan
    matrix = torch.tensor([[0.9, nan, nan], [0.95, 0.8, nan], [0.7, 0.85, 0.6]], dtype=torch.float64)
    assert average_accuracy(matrix) == pytest.approx((0.7 + 0.85 + 0.6) / 3)
    assert forgetting(matrix) == pytest.approx(((0.95 - 0.7) + (0.8 - 0.85)) / 2)
    assert forgetting(matrix[:1, :1]) == 0
    masks = [[torch.tensor([True, True, False, False])], [torch.tensor([False, True, True, False])]]
    assert sparse_overlap([*masks, [torch.tensor([False, False, True, True])]]) == [0.0, 0.5, 0.5]


# --- files -------------------------------------------------------------------------------------------------------


def test_export_is_one_bit_per_weight(tmp_path):
    learner = adapt(fresh())
    path = learner.export_task(1, tmp_path / "one.safetensors")
    tensors, header = read_tensors(path)
    assert header["task"] == 1 and header["num_classes"] == 3
    for name, mask in learner.masks(1).items():
        packed = tensors[f"mask|{name}"]
        assert packed.numel() == (mask.numel() + 7) // 8
        assert torch.equal(unpack_bits(packed, 1, mask.numel()).bool(), mask.flatten())
    assert torch.equal(tensors["norm|1|running_mean"], learner.norms[0].norms[1].running_mean)
    assert not any(name.startswith("scores") for name in tensors)
    with pytest.raises(KeyError, match="task"):
        learner.export_task(2, tmp_path / "two.safetensors")


@pytest.mark.parametrize("transfer", [None, "best"])
def test_a_loaded_network_learns_on(tmp_path, transfer):
    learner = adapt(fresh(), knn_transfer=transfer)
    save(learner, tmp_path / "a")
    loaded = load(fresh(seed=3), tmp_path / "a")
    for each in (learner, loaded):
        each.add_task(batches(5), 4)
    assert torch.equal(answers(learner), answers(loaded))


def test_loading_refuses(tmp_path):
    save(adapt(fresh()), tmp_path / "a")
    with pytest.raises(BadInput, match="folder"):
        load(fresh(), tmp_path / "none")
    with pytest.raises(IncompatibleModels, match="differs at"):
        load(fresh()[:5], tmp_path / "a")
    renamed = nn.Sequential(*fresh()[:5], nn.BatchNorm1d(24, affine=False), nn.PReLU(), fresh()[7])
    with pytest.raises(IncompatibleModels, match=r"differs at 6\.weight"):
        load(renamed, tmp_path / "a")
    other = fresh()
    other[7] = nn.Linear(24, 5)
    with pytest.raises(IncompatibleModels, match="differs at 7: "):
        load(other, tmp_path / "a")
    (tmp_path / "a" / "task-1.safetensors").unlink()
    with pytest.raises(CorruptFile, match="not whole"):
        load(fresh(), tmp_path / "a")
    with pytest.raises(BadInput, match="folder"):
        save(adapt(fresh(), tasks=1), tmp_path / "a" / "task-0.safetensors" / "x")
