"""Static merges: tensor functions against slow loops in float64, limits, seeds, arguments out of range."""

from __future__ import annotations

import math

import pytest
import torch

from transfuse.core.errors import BadInput
from transfuse.core.training import generator
from transfuse.merge import METHODS, merge
from transfuse.merge._methods import DareLinear, DareTies, Linear, Slerp, TaskArithmetic, Ties, make_static
from transfuse.merge._static import disjoint_mean, drop, kth_magnitudes, slerp_coefficients, weighted_sum


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def states(count=2, seed=0, shape=(40, 30)):
    base = {
        "a": numbers(*shape, seed=seed),
        "b": numbers(17, seed=seed + 1),
        "c": numbers(5, 4, 3, seed=seed + 2),
    }
    models = [
        {k: v + 0.1 * numbers(*v.shape, seed=10 * i + 7) for k, v in base.items()} for i in range(count)
    ]
    return base, models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32(dtype):
    tensors, weights = [numbers(64, seed=i).to(dtype) for i in range(3)], [0.2, -0.5, 1.3]
    found = weighted_sum(tensors, weights)
    wanted = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-6)
    assert [t.dtype for t in tensors] == [dtype] * 3


def test_slerp_by_hand():
    assert slerp_coefficients(0.0, 1.0, 2.0, 0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert slerp_coefficients(0.0, 1.0, 1.0, 1 / 3) == pytest.approx((math.sqrt(3) / 2, 0.5))
    assert slerp_coefficients(1.0, 1.0, 1.0, 0.3) == pytest.approx((0.7, 0.3))  # parallel
    assert slerp_coefficients(0.0, 0.0, 1.0, 0.3) == pytest.approx((0.7, 0.3))  # a zero vector
    base, models = states()
    for t, model in ((0.0, models[0]), (1.0, models[1])):
        found = merge(models=models, method="slerp", t=t)
        assert all(torch.allclose(found[k], model[k], atol=1e-6) for k in base)
    orthogonal = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 1.0])}]
    assert merge(models=orthogonal, method="slerp", t=0.5)["x"].norm() == pytest.approx(1.0)


def test_signs_are_elected_by_mass_and_the_mean_is_over_those_that_agree():
    deltas = [
        torch.tensor([3.0, 1.0, 0.0, 2.0]),
        torch.tensor([-1.0, 1.0, 5.0, -2.0]),
        torch.tensor([1.0, -4.0, 0.0, 0.0]),
    ]
    assert disjoint_mean(deltas, [1, 1, 1]).tolist() == [2.0, -4.0, 5.0, 0.0]
    assert disjoint_mean(deltas, [1, 1, 1], normalize=False).tolist() == [4.0, -4.0, 5.0, 0.0]
    assert disjoint_mean(deltas, [1, 6, 1]).tolist() == [-1.0, 1.0, 5.0, -2.0]
    assert disjoint_mean(deltas[:2], [3, 1])[0].item() == 3.0
    # The last column cancels: no sign is elected, or the positive one, also where nothing is left.
    assert disjoint_mean(deltas, [1, 1, 1], tie=1.0).tolist() == [2.0, -4.0, 5.0, 2.0]
    assert disjoint_mean([torch.zeros(2)] * 2, [1, 1], tie=1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_changes_that_cancel(method):
    base, models = (
        {"x": torch.zeros(3)},
        [{"x": torch.tensor([2.0, -1.0, 1.0])}, {"x": torch.tensor([-2.0, 1, 1])}],
    )
    found = [
        merge(base=base, models=models, method=method, density=1.0, tie=t)["x"] for t in ("none", "positive")
    ]
    assert [x.tolist() for x in found] == [[0.0, 0.0, 1.0], [2.0, 1.0, 1.0]]


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.5, 0.999, 1.0])
def test_the_kth_magnitude_is_exact_over_pieces(share):
    streams = [
        numbers(1000, seed=3),
        numbers(1000, seed=4).mul_(1e-20),
        torch.zeros(1000),
        numbers(1000).round_(),
    ]
    found = kth_magnitudes(lambda: zip(*(s.split(77) for s in streams), strict=True), [share] * 4)
    for stream, threshold in zip(streams, found, strict=True):
        order = stream.abs().sort(descending=True).values
        k = max(1, int(share * len(stream)))
        assert threshold == (0.0 if share == 1 else float(order[k - 1]))
    with pytest.raises(BadInput, match="NaN"):
        kth_magnitudes(lambda: [[torch.tensor([1.0, math.nan])]], [0.5])
    with pytest.raises(BadInput, match="infinity"):
        kth_magnitudes(lambda: [[torch.tensor([1.0, -math.inf])]], [0.5])


def test_ties_over_the_model_and_over_a_tensor():
    """Over the model, a tensor whose changes are small keeps nothing; over a tensor, it keeps its share."""
    base = {"large": torch.zeros(100), "small": torch.zeros(100)}
    models = [
        {"large": 10 * numbers(100, seed=i), "small": 0.01 * numbers(100, seed=9 + i)} for i in range(2)
    ]
    whole = merge(base=base, models=models, method="ties", density=0.3)
    each = merge(base=base, models=models, method="ties", density=0.3, scope="tensor")
    assert whole["small"].count_nonzero() == 0 and each["small"].count_nonzero() >= 30
    every = torch.cat([models[0]["large"], models[0]["small"]]).abs().sort(descending=True).values
    kept = models[0]["large"].abs() >= every[59]
    alone = merge(base=base, models=models[:1], method="ties", density=0.3)
    assert torch.equal(alone["large"], torch.where(kept, models[0]["large"], 0))


def test_ties_with_everything_kept_is_the_mean_of_what_agrees():
    base, models = states(3)
    found = merge(base=base, models=models, method="ties", density=1.0, scaling=0.5)
    changes = [m["a"].double() - base["a"].double() for m in models]
    elected = sum(changes).sign()
    total = sum(torch.where(c.sign() == elected, c, 0) for c in changes)
    count = sum((c.sign() == elected).double() for c in changes)
    assert torch.allclose(found["a"].double(), base["a"] + 0.5 * total / count.clamp_min(1), atol=1e-6)


def test_dropping_keeps_a_share_and_its_expectation():
    delta = torch.ones(200_000)
    kept = drop(delta, 0.25, generator(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    assert set(drop(delta, 0.25, generator(0), rescale=False).unique().tolist()) == {0.0, 1.0}
    assert drop(delta, 1.0, generator(0)) is delta


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_what_is_dropped_depends_on_seed_name_and_model(method, monkeypatch):
    base, models = states(2, shape=(64, 48))
    one, again, other = (merge(base=base, models=models, method=method, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in base)
    assert not torch.equal(one["a"], other["a"])
    monkeypatch.setattr("transfuse.merge._engine.BLOCK", 100)
    monkeypatch.setattr("transfuse.merge._engine.SLICE", 37)
    assert all(
        torch.equal(one[k], tensor) for k, tensor in merge(base=base, models=models, method=method).items()
    )
    changed = merge(base=base, models=[models[0], models[0]], method=method, density=0.3)["a"] - base["a"]
    share = changed.ne(0).float().mean().item()
    assert share == pytest.approx(1 - 0.7**2, abs=0.05)  # the two masks are independent


def test_limits():
    base, models = states(3)
    equal = merge(models=models, method="linear")
    assert torch.allclose(equal["a"], sum(m["a"] for m in models) / 3, atol=1e-6)
    heavy = merge(models=models, method="linear", weights=[2, 0, 0])
    assert torch.allclose(heavy["a"], models[0]["a"])
    summed = merge(models=models, method="linear", weights=[1, 1, -1], normalize=False)
    assert torch.allclose(summed["a"], models[0]["a"] + models[1]["a"] - models[2]["a"], atol=1e-6)
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        still = merge(base=base, models=models, method=method, scaling=0.0)
        assert all(torch.equal(still[k], base[k]) for k in base)
    one = merge(base=base, models=models[:1], method="task_arithmetic", scaling=1.0)
    assert torch.allclose(one["a"], models[0]["a"], atol=1e-6)
    mean = merge(base=base, models=models, method="task_arithmetic", scaling=1.0, normalize=True)
    assert torch.allclose(mean["a"], equal["a"], atol=1e-6)
    whole = merge(base=base, models=models, method="dare_linear", density=1.0)
    assert torch.equal(whole["a"], merge(base=base, models=models, method="task_arithmetic")["a"])


def test_the_order_of_equal_models_does_not_matter():
    base, models = states(3)
    for method in ("linear", "task_arithmetic", "ties"):
        found = [merge(base=base, models=list(m), method=method) for m in (models, models[::-1])]
        assert all(torch.allclose(found[0][k], found[1][k], atol=1e-6) for k in base)


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    [
        ("ties", {"density": 0.0}, "density"),
        ("ties", {"density": 1.5}, "density"),
        ("ties", {"density": [0.2]}, "density"),
        ("ties", {"weights": [1.0, -1.0]}, r"weights\[1\]"),
        ("ties", {"scope": "layer"}, "scope"),
        ("ties", {"tie": "negative"}, "tie"),
        ("dare_ties", {"tie": "negative"}, "tie"),
        ("ties", {"scaling": math.inf}, "scaling"),
        ("dare_ties", {"density": -0.1}, "density"),
        ("dare_linear", {"weights": [1.0]}, "weights"),
        ("linear", {"weights": [1.0, -1.0]}, "sum to zero"),
        ("linear", {"weights": [1.0, math.inf]}, r"weights\[1\]"),
        ("linear", {"density": 0.5}, "density"),
        ("slerp", {"t": 1.5}, "t = 1.5"),
        ("task_arithmetic", {"scalling": 0.5}, "did you mean 'scaling'"),
        ("tise", {}, "did you mean 'ties'"),
        ("stock", {}, "use one of linear"),
    ],
)
def test_bad_arguments_are_named(method, arguments, named):
    base, models = states(2)
    with pytest.raises(BadInput, match=named):
        merge(base=base, models=models, method=method, **arguments)


def test_methods_and_their_names():
    named = {
        "linear": Linear, "slerp": Slerp, "task_arithmetic": TaskArithmetic, "ties": Ties,
        "dare_linear": DareLinear, "dare_ties": DareTies,
    }  # fmt: skip
    assert named == METHODS
    assert make_static("task-arithmetic", {"scaling": 0.3}, 2) == TaskArithmetic(scaling=0.3)
    assert make_static(Ties(density=0.5), {}, 2) == Ties(density=0.5)
    with pytest.raises(BadInput, match="beside a method"):
        make_static(Ties(), {"density": 0.5}, 2)
    with pytest.raises(BadInput, match="models = 0"):
        make_static("linear", {}, 0)
    with pytest.raises(BadInput, match="not two"):
        make_static("slerp", {}, 3)
