"""How far a classifier's probabilities can be trusted: calibration errors, proper scores, temperature scaling.

Everything is numpy in float64. Arrays and tensors are taken alike. Errors are fractions, not percent. Measure on the
probabilities that are served, at temperature 1: those softened for distillation are another model's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput

__all__ = [
    "Bin",
    "TemperatureScaler",
    "adaptive_ece",
    "brier",
    "classwise_ece",
    "ece",
    "nll",
    "reliability_table",
]

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """One row of a reliability table, for confidences in (low, high].

    Attributes:
        low: Lower edge, not part of the bin (0 is part of the first).
        high: Upper edge, part of the bin.
        count: Number of samples.
        confidence: Their mean confidence; NaN in an empty bin.
        accuracy: Share of them predicted right; NaN in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def ece(probs: Any, labels: Any, *, bins: int = 15) -> float:
    """Expected calibration error of the top class: sum over bins of |B| / N |accuracy(B) - confidence(B)|.

    Args:
        probs: Probabilities `[N, C]`, rows sum to 1.
        labels: True classes, integers `[N]`.
        bins: Number of bins of equal width, each (a, b]; a confidence of 0 counts to the first.

    Returns:
        From 0 to 1.

    Raises:
        BadInput: shapes that do not fit, rows that are no distribution, labels out of range.
    """
    confidence, right = _top(*_checked(probs, labels, bins))
    return _binned(confidence, right, bins)


def adaptive_ece(probs: Any, labels: Any, *, bins: int = 15) -> float:
    """As `ece`, with bins of equal numbers of samples (they differ by one where N is not a multiple).

    Samples of one confidence share their mean accuracy, so that their order does not matter.
    """
    confidence, right = _top(*_checked(probs, labels, bins))
    values, group = np.unique(confidence, return_inverse=True)
    shared = np.bincount(group, right, len(values)) / np.bincount(group, minlength=len(values))
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, bins)
    gaps = [abs(float((shared[group[rows]] - confidence[rows]).sum())) for rows in parts]
    return sum(gaps) / len(confidence)


def classwise_ece(probs: Any, labels: Any, *, bins: int = 15) -> float:
    """The mean over classes c of the error of p(c): its frequency against its probability, in bins of equal width.

    Arguments and errors as in `ece`.
    """
    p, y = _checked(probs, labels, bins)
    return float(np.mean([_binned(p[:, c], (y == c).astype(np.float64), bins) for c in range(p.shape[1])]))


def reliability_table(probs: Any, labels: Any, *, bins: int = 15) -> list[Bin]:
    """The bins behind `ece`, what a reliability diagram shows. Arguments and errors as in `ece`."""
    confidence, right = _top(*_checked(probs, labels, bins))
    edges, where = _edges(bins), _places(confidence, bins)
    rows = []
    for m in range(bins):
        inside = where == m
        count = int(inside.sum())
        means = (float(x[inside].mean()) if count else float("nan") for x in (confidence, right))
        rows.append(Bin(float(edges[m]), float(edges[m + 1]), count, *means))
    return rows


def nll(logits: Any, labels: Any) -> float:
    """Mean of -log p(label) in nats, by way of log-softmax, so that no probability rounds to 0.

    Args:
        logits: `[N, C]`; log-probabilities are logits too, probabilities are not.
        labels: True classes, integers `[N]`.

    Raises:
        BadInput: shapes that do not fit, NaN, labels out of range.
    """
    log_p, y = _log_softmax(logits, labels)
    return float(-log_p[np.arange(len(y)), y].mean())


def brier(probs: Any, labels: Any) -> float:
    """Mean of the squared distance between probabilities and the one-hot label, from 0 to 2.

    Arguments and errors as in `ece`.
    """
    p, y = _checked(probs, labels, None)
    gaps = p.copy()
    gaps[np.arange(len(y)), y] -= 1.0
    return float((gaps**2).sum(1).mean())


class TemperatureScaler:
    """Post-hoc calibration by one number: logits are divided by the temperature of least NLL on held-out data.

    Predicted classes stay as they are. The NLL is convex in 1 / T, and its slope, the mean of E_p[z] - z_label,
    rises with it: its root is found by bisection in log T.

    Args:
        lowest: Least temperature; reached where every prediction is right.
        highest: Largest one; reached where logits say nothing about labels.

    Attributes:
        temperature: What was found; 1 before `fit`.
    """

    def __init__(self, *, lowest: float = 1e-2, highest: float = 1e2):
        if not 0 < lowest < highest:
            raise BadInput("lowest", lowest, f"is not between 0 and highest = {highest}", "give 0 < lowest")
        self.lowest, self.highest = lowest, highest
        self.temperature = 1.0

    def fit(self, logits: Any, labels: Any) -> TemperatureScaler:
        """Find the temperature.

        Args:
            logits: Of samples that were not trained on, `[N, C]`.
            labels: Their classes, integers `[N]`.

        Returns:
            Itself.
        """
        log_p, y = _log_softmax(logits, labels)
        z = np.where(np.isfinite(log_p), log_p, 0.0)
        own = z[np.arange(len(y)), y]

        def slope(temperature: float) -> float:
            """Of the NLL by 1 / T."""
            q = np.exp(_normalised(log_p / temperature))
            return float(((q * z).sum(1) - own).mean())

        low, high = np.log(self.lowest), np.log(self.highest)
        for _ in range(100):
            middle = (low + high) / 2
            if slope(float(np.exp(middle))) > 0:  # 1 / T is too large
                low = middle
            else:
                high = middle
        self.temperature = float(np.exp((low + high) / 2))
        return self

    def __call__(self, logits: Any) -> _Array:
        """Calibrated probabilities `[N, C]` of logits `[N, C]`."""
        return np.exp(_normalised(_array(logits) / self.temperature))


def _array(values: Any) -> _Array:
    """A float64 array of a tensor (any device, any dtype), an array or lists."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _classes(labels: Any, rows: _Array, name: str) -> NDArray[np.int64]:
    y = _array(labels)
    if rows.ndim != 2 or not len(rows) or y.shape != rows.shape[:1]:
        raise BadInput(name, rows.shape, f"does not fit labels {y.shape}", "give [N, C] and N labels")
    if (y != np.floor(y)).any() or y.min() < 0 or y.max() >= rows.shape[1]:
        raise BadInput(
            "labels", (y.min(), y.max()), f"are not classes below {rows.shape[1]}", "leave out masked rows"
        )
    return y.astype(np.int64)


def _checked(probs: Any, labels: Any, bins: int | None) -> tuple[_Array, NDArray[np.int64]]:
    p = _array(probs)
    y = _classes(labels, p, "probs")
    if not ((p >= 0).all() and np.allclose(p.sum(1), 1.0, atol=1e-2)):
        raise BadInput("probs", p.shape, "are not distributions over classes", "pass softmax(logits, -1)")
    if bins is not None:
        if bins < 1:
            raise BadInput("bins", bins, "is below 1", "give a positive number")
        if len(p) < bins:
            warnings.warn(
                f"{len(p)} samples in {bins} bins say little about calibration", UserWarning, stacklevel=3
            )
    return np.minimum(p, 1.0), y


def _top(p: _Array, y: NDArray[np.int64]) -> tuple[_Array, _Array]:
    """Confidence of the predicted class, and whether it is right."""
    return p.max(1), (p.argmax(1) == y).astype(np.float64)


def _edges(bins: int) -> _Array:
    return np.linspace(0.0, 1.0, bins + 1)


def _places(values: _Array, bins: int) -> NDArray[np.intp]:
    """Number of the half-open bin (a, b] of each value; 0 lies in the first."""
    return np.maximum(np.searchsorted(_edges(bins), values, side="left") - 1, 0)


def _binned(values: _Array, hits: _Array, bins: int) -> float:
    """Sum over bins of |sum of hits - sum of values| / N."""
    where = _places(values, bins)
    gaps = np.bincount(where, hits, bins) - np.bincount(where, values, bins)
    return float(np.abs(gaps).sum() / len(values))


def _normalised(z: _Array) -> _Array:
    """Log-softmax over the last axis."""
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _log_softmax(logits: Any, labels: Any) -> tuple[_Array, NDArray[np.int64]]:
    z = _array(logits)
    y = _classes(labels, z, "logits")
    if np.isnan(z).any() or not np.isfinite(z.max(1)).all():
        raise BadInput(
            "logits", z.shape, "hold NaN or a row without a finite largest entry", "check the model"
        )
    return _normalised(z), y
