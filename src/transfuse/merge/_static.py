"""Static merges as functions of tensors: sums, arcs, trimming, dropping, signs; in float32, or float64 where one is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadInput

__all__ = [
    "check_half",
    "disjoint_mean",
    "drop",
    "generators",
    "kth_magnitudes",
    "slerp_coefficients",
    "task_vectors",
    "trim",
    "weighted_sum",
    "wide_dtype",
]


def wide_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """What tensors of any floating dtypes are calculated in: float32, or float64 where one of them is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_half(name: str, wide: Tensor, narrow: Tensor, remedy: str) -> None:
    """Refuse numbers that became infinite in float16; other dtypes pass unseen.

    Args:
        name: What the message calls it.
        wide: The numbers.
        narrow: The same, as they are kept.
        remedy: What to do about it.

    Raises:
        BadInput: there is one.
    """
    if narrow.dtype == torch.float16 and bool((lost := narrow.isinf() & wide.isfinite()).any()):
        raise BadInput(name, float(wide[lost].abs().max()), "is too large for float16", remedy)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i, for tensors of one shape and any floating dtypes."""
    total = torch.empty(tensors[0].shape, dtype=wide_dtype(tensors))
    scratch = torch.empty_like(total) if len(tensors) > 1 else total
    total.copy_(tensors[0]).mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        scratch.copy_(tensor)
        total.add_(scratch, alpha=weight)
    return total


def task_vectors(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """What each model adds to the base, theta_i - theta_0, all in one dtype."""
    wide = base.to(wide_dtype([base, *models]))
    return [model.to(wide.dtype, copy=True).sub_(wide) for model in models]


def slerp_coefficients(dot: float, norm_a: float, norm_b: float, t: float) -> tuple[float, float]:
    """Factors of two vectors for the point a share `t` along the arc between them.

    Where they are nearly parallel (|cos| > 0.9995), or one is zero, the point on the line: (1 - t, t).
    """
    cosine = dot / (norm_a * norm_b) if norm_a > 0 and norm_b > 0 else 1.0
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def trim(delta: Tensor, threshold: float) -> Tensor:
    """`delta` with what is smaller than `threshold` in magnitude set to zero."""
    below = float(np.nextafter(np.float32(threshold), np.float32(-1)))  # hardshrink keeps what is above
    return torch.nn.functional.hardshrink(delta, below)


def drop(delta: Tensor, density: float, random: torch.Generator, *, rescale: bool = True) -> Tensor:
    """`delta` with a random share `density` of its elements kept and, with `rescale`, divided by `density`."""
    if density == 1:
        return delta
    kept = torch.where(torch.rand(delta.shape, generator=random) < density, delta, 0)
    return kept / density if rescale else kept


def generators(seed: int, name: str, count: int) -> list[torch.Generator]:
    """One random source per model for a tensor: each depends on seed, the tensor's name and the model's place."""
    from ..core.training import generator  # on need: it imports transformers

    keys = [hashlib.sha256(f"{seed}/{i}/{name}".encode()).digest()[:8] for i in range(count)]
    return [generator(int.from_bytes(key, "big") >> 1) for key in keys]


def disjoint_mean(
    deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True, tie: float = 0.0
) -> Tensor:
    """Per element, the weighted mean over the deltas whose sign is that of the weighted sum.

    Zeros have no say.

    Args:
        deltas: Tensors of one shape and dtype.
        weights: Positive numbers.
        normalize: Divide by the weights of those that take part; False leaves the sum.
        tie: The sign elected where the sum is zero: 0, none, so that the result is zero; or 1.
    """
    # Masks are kept as numbers: torch is many times slower where dtypes are mixed.
    elected = weighted_sum(deltas, weights).sign_()
    if tie:
        elected.masked_fill_(elected == 0, tie)
    total, share = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.mul(delta, elected).sign_().clamp_(min=0)
        total.addcmul_(delta, agrees, value=weight)
        share.add_(agrees, alpha=weight)
    return total.div_(share.clamp_(min=min(weights))) if normalize else total


def kth_magnitudes(pieces: Callable[[], Iterable[Sequence[Tensor]]], shares: Sequence[float]) -> list[float]:
    """For each of several streams of numbers, the k-th largest magnitude, k = max(1, int(share * count)); exact.

    The bits of a float32 magnitude sort like the number, so two histograms of 16 bits each find it: the streams are
    gone through twice, and no more than one piece is held.

    Args:
        pieces: The streams side by side, piece by piece; looked at in float32.
        shares: Of each stream, in (0, 1].

    Returns:
        The magnitudes; 0 for a share of 1 or an empty stream.

    Raises:
        BadInput: NaN or infinity in a stream.
    """
    upper = [_Histogram(1 << 15) for _ in shares]
    for piece in pieces():
        for histogram, numbers in zip(upper, piece, strict=True):
            histogram.add(_bits(numbers) >> 16)
    bins, left = [], []
    for histogram, share in zip(upper, shares, strict=True):
        counts = histogram.counts()
        if counts[0x7F80:].any():  # the largest exponent
            raise BadInput("models", "NaN or infinity", "cannot be trimmed", "check the models' weights")
        place, rest = _from_above(counts, max(1, int(share * int(counts.sum()))))
        bins.append(place)
        left.append(rest)
    lower = [_Histogram(1 << 16) for _ in shares]
    for piece in pieces():
        for histogram, numbers, place in zip(lower, piece, bins, strict=True):
            bits = _bits(numbers)
            histogram.add(bits[bits >> 16 == place] & 0xFFFF)
    found = []
    for histogram, share, place, rest in zip(lower, shares, bins, left, strict=True):
        low, _ = _from_above(histogram.counts(), rest)
        bits = np.array((place << 16) + low, dtype=np.int32)
        found.append(0.0 if share == 1 or place < 0 else float(bits.view(np.float32)))
    return found


def _bits(numbers: Tensor) -> Any:
    """The bits of the magnitudes, int32."""
    return numbers.float().abs().reshape(-1).numpy().view(np.int32)


def _from_above(counts: Any, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest, and its place in there, from 1; (-1, 0) where all are too few."""
    above = counts[::-1].cumsum()
    place = int(np.searchsorted(above, wanted))
    return len(counts) - 1 - place, wanted - (int(above[place - 1]) if place else 0)


class _Histogram:
    """Counts of small whole numbers; they are gathered first, because counting costs as much as there are bins."""

    def __init__(self, bins: int):
        self._counts, self._waiting, self._filled = np.zeros(bins, np.int64), np.empty(1 << 20, np.uint16), 0

    def add(self, numbers: Any) -> None:
        for start in range(0, len(numbers), len(self._waiting)):
            part = numbers[start : start + len(self._waiting)]
            if self._filled + len(part) > len(self._waiting):
                self.counts()
            self._waiting[self._filled : self._filled + len(part)] = part
            self._filled += len(part)

    def counts(self) -> Any:
        self._counts += np.bincount(self._waiting[: self._filled], minlength=len(self._counts))
        self._filled = 0
        return self._counts
