"""Round axis ticks, and labels beside points without overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Box", "place_labels", "ticks"]


class Box(NamedTuple):
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area shared with `other`."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest to `(x, y)`."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round values that lie in [low, high]."""
    span = max(high - low, 1e-9)
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _candidates(x: float, y: float, width: float, height: float, radius: float) -> list[tuple[float, Box]]:
    """Places for a label, each with what it costs in itself: near is better, right of the point is best."""
    own = Box(x - radius - 2, y - radius - 2, x + radius + 2, y + radius + 2)
    places = []
    for ring, distance in enumerate((4.0, 12.0, 22.0, 34.0, 48.0, 64.0, 84.0, 108.0)):
        for step in range(16):
            angle = step * math.tau / 16
            reach = radius + distance
            cx = x + math.cos(angle) * (reach + width / 2)
            cy = y + math.sin(angle) * (reach + height / 2)
            box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            cost = 3.0 * ring + 1.5 * (1 - math.cos(angle)) / 2 + 0.6 * abs(math.sin(angle))
            if not box.overlap(own):
                places.append((cost, box))
    return sorted(places)


def _crosses(
    a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], d: tuple[float, float]
) -> bool:
    def side(p: tuple[float, float], q: tuple[float, float], r: tuple[float, float]) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _through(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    """Whether a leader from `start` to `end` runs through `box` (more than a pixel deep)."""
    first, last = 0.0, 1.0
    for a, b, low, high in (
        (start[0], end[0], box.left + 1, box.right - 1),
        (start[1], end[1], box.top + 1, box.bottom - 1),
    ):
        if a == b:
            if not low < a < high:
                return False
            continue
        one, other = sorted(((low - a) / (b - a), (high - a) / (b - a)))
        first, last = max(first, one), min(last, other)
        if first >= last:
            return False
    return True


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    *,
    radii: Sequence[float],
    taken: Sequence[Box] = (),
) -> list[Box]:
    """A place for each point's label: inside `bounds`, off marks, other labels and `taken`, as near as can be.

    Each label in turn moves to its cheapest place given the others, until none moves; of three orders to begin
    with, the one that ends best is taken.

    Args:
        points: Centres of the marks.
        sizes: (width, height) of the labels.
        bounds: Where labels may lie.
        radii: Of the marks.
        taken: What else must stay free.
    """
    marks = [Box(x - r - 2, y - r - 2, x + r + 2, y + r + 2) for (x, y), r in zip(points, radii, strict=True)]
    options = [_candidates(*p, *size, r) for p, size, r in zip(points, sizes, radii, strict=True)]

    def cost(chosen: Sequence[Box | None], i: int, own: float, box: Box, least: float) -> float:
        outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(bounds)
        total = own + 10.0 * outside
        start, end = points[i], box.nearest(*points[i])
        apart = math.dist(start, end) - radii[i]
        for j, mark in enumerate(marks):
            if j == i or points[j] == points[i]:
                continue
            total += 4.0 * box.overlap(mark) + (8.0 if _through(start, end, mark) else 0.0)
            if math.dist(points[j], box.nearest(*points[j])) - radii[j] < apart + 5:
                total += 12.0  # it would read as the other mark's label
        total += sum(2.0 * box.overlap(other) for other in taken)
        for j, other in enumerate(chosen):
            if j == i or other is None:
                continue
            if total >= least:
                break  # it cannot become the cheapest
            grown = Box(other.left - 3, other.top - 1, other.right + 3, other.bottom + 1)
            total += 6.0 * box.overlap(grown)
            theirs = points[j], other.nearest(*points[j])
            if _through(start, end, other) or _through(*theirs, box):
                total += 25.0
            elif _crosses(start, end, *theirs):
                total += 15.0
        return total

    def settle(order: Sequence[int]) -> tuple[float, list[Box]]:
        chosen: list[Box | None] = [None] * len(points)
        spent = [0.0] * len(points)
        for _ in range(12):
            moved = False
            for i in order:
                best, least = options[i][0][1], math.inf
                for own, box in options[i]:
                    if own >= least:
                        break  # places are sorted by what they cost in themselves
                    if (total := cost(chosen, i, own, box, least)) < least:
                        best, least = box, total
                moved, chosen[i], spent[i] = moved or best != chosen[i], best, least
            if not moved:
                break
        return sum(spent), [box for box in chosen if box is not None]

    by_x = sorted(range(len(points)), key=lambda i: points[i])
    return min(
        (settle(order) for order in (by_x, by_x[::-1], range(len(points)))), key=lambda found: found[0]
    )[1]
