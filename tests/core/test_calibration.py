"""core.calibration: values by hand, slow loops, limits, bad input."""

from __future__ import annotations

import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from transfuse.core.calibration import (
    TemperatureScaler,
    adaptive_ece,
    brier,
    classwise_ece,
    ece,
    nll,
    reliability_table,
)
from transfuse.core.errors import BadInput


def sample(seed, count=200, classes=4, scale=2.0):
    random = np.random.default_rng(seed)
    z = scale * random.normal(size=(count, classes))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return z, p, random.integers(0, classes, size=count)


def slow(values, hits, bins):
    """Half-open bins (a, b], one sample at a time."""
    total = 0.0
    for m in range(bins):
        low, high = m / bins, (m + 1) / bins
        inside = [
            i
            for i, v in enumerate(values)
            if (v > low or (m == 0 and v == 0)) and (v <= high or m == bins - 1)
        ]
        if inside:
            accuracy = sum(hits[i] for i in inside) / len(inside)
            confidence = sum(values[i] for i in inside) / len(inside)
            total += len(inside) / len(values) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bins", [1, 7, 15])
def test_against_slow_loops(seed, bins):
    z, p, y = sample(seed)
    top = [max(row) for row in p]
    right = [float(list(row).index(max(row)) == label) for row, label in zip(p, y, strict=True)]
    assert ece(p, y, bins=bins) == pytest.approx(slow(top, right, bins), abs=1e-12)
    each = [slow(p[:, c], [float(label == c) for label in y], bins) for c in range(4)]
    assert classwise_ece(p, y, bins=bins) == pytest.approx(sum(each) / 4, abs=1e-12)
    order = sorted(range(len(y)), key=lambda i: top[i])
    sizes = [len(y) // bins + (m < len(y) % bins) for m in range(bins)]
    total, start = 0.0, 0
    for size in sizes:
        rows, start = order[start : start + size], start + size
        total += abs(sum(right[i] for i in rows) / size - sum(top[i] for i in rows) / size) * size / len(y)
    assert adaptive_ece(p, y, bins=bins) == pytest.approx(total, abs=1e-12)
    assert nll(z, y) == pytest.approx(-sum(math.log(p[i][c]) for i, c in enumerate(y)) / len(y))
    squares = [sum((p[i][c] - (c == label)) ** 2 for c in range(4)) for i, label in enumerate(y)]
    assert brier(p, y) == pytest.approx(sum(squares) / len(y))


def test_four_samples_by_hand():
    # bins of a half: 0.5 lies in the first, 0.9, 0.7 and 0.6 in the second with 2 of 3 right
    p, y = [[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.5, 0.5]], [0, 1, 1, 1]
    with pytest.warns(UserWarning, match="4 samples in 15 bins"):
        ece(p, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ece(p, y, bins=2) == pytest.approx((0.5 + abs(2 - 2.2)) / 4)
        low, high = reliability_table(p, y, bins=2)
    assert (low.low, low.high, low.count, low.confidence, low.accuracy) == (0.0, 0.5, 1, 0.5, 0.0)
    assert (high.count, high.confidence, high.accuracy) == (3, pytest.approx(2.2 / 3), pytest.approx(2 / 3))
    assert brier(p, y) == pytest.approx((2 * 0.01 + 2 * 0.49 + 2 * 0.16 + 2 * 0.25) / 4)
    # bins of two samples: (0.5, 0.6) and (0.7, 0.9)
    assert adaptive_ece(p, y, bins=2) == pytest.approx((abs(1 - 1.1) + abs(1 - 1.6)) / 4)


def test_edges_belong_to_the_bin_below():
    counts = [row.count for row in reliability_table([[1.0, 0.0], [0.6, 0.4], [0.8, 0.2]], [0, 0, 0], bins=3)]
    assert counts == [0, 1, 2]
    p = [[0.6, 0.2, 0.2]] * 5  # 0.6 = 3/5 and 0.2 = 1/5 are edges
    assert [row.count for row in reliability_table(p, [0] * 5, bins=5)] == [0, 0, 5, 0, 0]
    assert math.isnan(reliability_table(p, [0] * 5, bins=5)[0].accuracy)
    # a probability of exactly 0 is in the first bin: class 1 never comes and is never expected
    assert classwise_ece([[1.0, 0.0]] * 3, [0, 0, 0], bins=3) == 0.0


def test_limits():
    y = [0, 1, 2, 0]
    sure = np.eye(3)[y]
    assert ece(sure, y, bins=4) == adaptive_ece(sure, y, bins=4) == classwise_ece(sure, y, bins=4) == 0.0
    assert brier(sure, y) == 0.0 and brier(sure, [1, 2, 0, 1]) == 2.0
    assert ece(sure, [1, 2, 0, 1], bins=4) == 1.0
    assert nll(1e4 * (sure - 1), y) == pytest.approx(0.0)
    assert nll(1e4 * sure, [1, 2, 0, 1]) == pytest.approx(1e4)  # no log(0)


def test_ties_do_not_depend_on_the_order():
    p = np.array([[0.8, 0.2]] * 6)
    values = {
        adaptive_ece(p, y, bins=3) for y in ([0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0])
    }
    assert len(values) == 1 and values.pop() == pytest.approx(0.3)


def test_brier_of_a_vocabulary_needs_no_square_matrix():
    classes = 40_000  # squared in float64: 12.8 GB
    tracemalloc.start()
    found = brier(np.full((2, classes), 1 / classes), [0, classes - 1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == pytest.approx(1 - 1 / classes) and peak < 1e8


def test_tensors_of_any_kind():
    z, p, y = sample(3)
    assert ece(torch.tensor(p), torch.tensor(y)) == ece(p, y) == ece(p.tolist(), y.tolist())
    rough = torch.tensor(p).bfloat16()
    assert ece(rough, y) == pytest.approx(ece(p, y), abs=0.02)
    assert nll(torch.tensor(z, requires_grad=True), torch.tensor(y)) == nll(z, y)
    assert nll(np.log(p), y) == pytest.approx(nll(z, y))


class TestTemperature:
    def test_it_undoes_a_scaling(self):
        """Labels drawn from softmax(z): logits 3 z ask for T = 3."""
        random = np.random.default_rng(0)
        z = 2 * random.normal(size=(20_000, 3))
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        y = [random.choice(3, p=row) for row in p]
        scaler = TemperatureScaler().fit(3 * z, y)
        assert scaler.temperature == pytest.approx(3.0, rel=0.05)
        assert ece(scaler(3 * z), y) < 0.02 < 0.1 < ece(TemperatureScaler()(3 * z), y)

    def test_it_is_the_least_of_a_grid(self):
        z, _, y = sample(4, scale=3.0)
        y[:120] = z[:120].argmax(1)
        scaler = TemperatureScaler().fit(z, y)
        best = min(nll(z / t, y) for t in np.geomspace(0.05, 50, 4001))
        assert nll(z / scaler.temperature, y) <= best + 1e-12
        assert (scaler(z).argmax(1) == z.argmax(1)).all()

    def test_bounds(self):
        z = np.array([[5.0, 0.0], [0.0, 5.0], [4.0, 1.0]])
        assert TemperatureScaler(lowest=0.1).fit(z, [0, 1, 0]).temperature == pytest.approx(0.1)
        assert TemperatureScaler(highest=7.0).fit(z, [1, 0, 1]).temperature == pytest.approx(7.0)

    def test_an_excluded_class_stays_out(self):
        z = np.array([[1.0, 0.0, -np.inf], [0.0, 2.0, -np.inf], [0.5, 0.0, -np.inf]])
        scaler = TemperatureScaler().fit(z, [0, 1, 1])
        assert math.isfinite(scaler.temperature) and (scaler(z)[:, 2] == 0).all()

    def test_bad_input(self):
        with pytest.raises(BadInput, match="lowest"):
            TemperatureScaler(lowest=0.0)
        with pytest.raises(BadInput, match="logits"):
            TemperatureScaler().fit([[math.nan, 1.0]], [0])


@pytest.mark.parametrize(
    ("probs", "labels", "bins", "name"),
    [
        ([[0.5, 0.5]], [0, 1], 1, "probs"),
        ([0.5, 0.5], [0, 1], 1, "probs"),
        ([[2.0, -1.0]], [0], 1, "probs"),
        ([[0.3, 0.3]], [0], 1, "probs"),
        ([[math.nan, 1.0]], [0], 1, "probs"),
        ([[0.5, 0.5]], [2], 1, "labels"),
        ([[0.5, 0.5]], [-100], 1, "labels"),
        ([[0.5, 0.5]], [0.5], 1, "labels"),
        ([[0.5, 0.5]], [0], 0, "bins"),
        (np.zeros((0, 2)), [], 1, "probs"),
    ],
)
def test_bad_input(probs, labels, bins, name):
    with pytest.raises(BadInput, match=name):
        ece(probs, labels, bins=bins)
