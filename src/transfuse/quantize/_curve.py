"""Curves: what a model loses as its layers are lowered one after the other, in any order, or left out altogether."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import taps
from ..core.errors import BadInput
from ._base import batches_of, layer_slots, refuse_quantized
from ._rounding import FULL, Versions, check_rounding

__all__ = ["Point", "area", "pruning_curve", "quantization_curve"]


@dataclass(frozen=True)
class Point:
    """One model of a curve.

    Attributes:
        order: Name of the order.
        lowered: Number of layers lowered or left out.
        fraction: The same as a share of all layers.
        average_bits: Of the layers' weights; of a pruned model, those it keeps count as `high`, the others as 0.
        value: What was measured.
    """

    order: str
    lowered: int
    fraction: float
    average_bits: float
    value: float


def quantization_curve(
    model: Any,
    orders: Mapping[str, Sequence[int]],
    eval_fn: Callable[[Any], float],
    *,
    high: int = 4,
    low: int = 2,
    steps: int | Sequence[int] | None = None,
    backend: str = "rtn",
    group_size: int | None = 32,
) -> list[Point]:
    """Lower 0, 1, ..., L layers in each order and measure each model; `model` ends as it began.

    Sets of layers that orders share are measured once.

    Args:
        model: A transformers model.
        orders: Name -> numbers of all layers, the first to be lowered first (`LayerScores.order`, `orders_of`).
        eval_fn: What is measured, of the model.
        high: Bits of layers that are not lowered; 16 for the original.
        low: Bits of those that are.
        steps: Numbers of layers to measure at, or into how many equal steps the whole is cut (10: every tenth); None
            for every number.
        backend: What rounds.
        group_size: Weights that share a step and an offset.

    Raises:
        BadInput: an order that is not of all layers, more steps than layers.
    """
    refuse_quantized(model)
    layers = layer_slots(model)
    if not low < high:
        raise BadInput("low", low, f"is not below high = {high}", "give fewer bits")
    for width in (high, low):
        check_rounding(layers, [width] * len(layers), backend, group_size)
    counts = _counts(orders, steps, len(layers))
    sizes = [sum(slot.parameter.numel() for slot in slots) for slots in layers]
    seen: dict[frozenset[int], float] = {}
    points = []
    with Versions(layers, backend, group_size) as versions:
        for name, order in orders.items():
            for count in counts:
                chosen = frozenset(order[:count])
                if chosen not in seen:
                    versions.set({i: low if i in chosen else high for i in range(len(layers))})
                    seen[chosen] = float(eval_fn(model))
                bits = sum(s * (low if i in chosen else high) for i, s in enumerate(sizes)) / sum(sizes)
                points.append(Point(name, count, count / len(layers), bits, seen[chosen]))
    return points


def pruning_curve(
    model: Any,
    orders: Mapping[str, Sequence[int]],
    eval_fn: Callable[[Any], float],
    *,
    high: int = 4,
    steps: int | Sequence[int] | None = None,
    backend: str = "rtn",
    group_size: int | None = 32,
) -> list[Point]:
    """The same with layers left out in place of lowered: their input goes on to the next. Arguments as above.

    A model of no layer at all is not measured.
    """
    refuse_quantized(model)
    layers = layer_slots(model)
    check_rounding(layers, [high] * len(layers), backend, group_size)
    counts = [c for c in _counts(orders, steps, len(layers)) if c < len(layers)]
    sizes = [sum(slot.parameter.numel() for slot in slots) for slots in layers]
    tupled = _tupled(model)
    seen: dict[frozenset[int], float] = {}
    points = []
    with Versions(layers, backend, group_size) as versions:
        if high != FULL:
            versions.set(dict.fromkeys(range(len(layers)), high))
        for name, order in orders.items():
            for count in counts:
                chosen = frozenset(order[:count])
                if chosen not in seen:
                    with taps.skip(model, chosen, tupled=tupled):
                        seen[chosen] = float(eval_fn(model))
                bits = high * sum(s for i, s in enumerate(sizes) if i not in chosen) / sum(sizes)
                points.append(Point(name, count, count / len(layers), bits, seen[chosen]))
    return points


def area(points: Sequence[Point], order: str, *, until: float = 1.0) -> float:
    """Area under an order's curve of values over fractions from 0 to `until`, by the trapezium rule.

    Raises:
        BadInput: fewer than two points of that order there.
    """
    found = sorted((p.fraction, p.value) for p in points if p.order == order and p.fraction <= until + 1e-9)
    if len(found) < 2:
        raise BadInput("order", order, f"has {len(found)} points up to {until}", "measure at more steps")
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(found))


def _counts(orders: Mapping[str, Sequence[int]], steps: int | Sequence[int] | None, layers: int) -> list[int]:
    for name, order in orders.items():
        if sorted(order) != list(range(layers)):
            raise BadInput(
                f"orders[{name!r}]", list(order), f"does not name each of {layers} layers once", "mend it"
            )
    if not orders:
        raise BadInput("orders", {}, "is empty", "give an order of the layers")
    if steps is None:
        return list(range(layers + 1))
    if isinstance(steps, int):
        if not 1 <= steps <= layers:
            raise BadInput("steps", steps, f"are more than the model's {layers} layers", f"use 1 to {layers}")
        return [round(i * layers / steps) for i in range(steps + 1)]
    counts = sorted(set(steps))
    if not counts or counts[0] < 0 or counts[-1] > layers:
        raise BadInput("steps", list(steps), f"are not numbers of {layers} layers", f"use 0 to {layers}")
    return counts


def _tupled(model: Any) -> bool:
    """Whether the blocks of this architecture return tuples."""
    import torch

    names = taps.decoder_layers(model)
    batch = batches_of([[0, 0]], next(model.parameters()).device)[0]
    with torch.no_grad(), taps.capture(model, names[0], stop=True) as store:
        store.run(**batch, use_cache=False)
    return bool(store.tuples)
