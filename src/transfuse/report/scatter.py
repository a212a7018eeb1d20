"""Where each carrier lies between knowledge gained and answers damaged: geometry of the picture, for page and plot."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .geometry import Box, place_labels, ticks
from .view import Row, front, interval, percent

__all__ = ["Label", "Mark", "Scatter", "scatter"]

RADIUS, HALO = 6.0, 11.0  # of a mark, and of the ring round the recommended one


@dataclass(frozen=True)
class Label:
    """A text in a box; `leader` runs from the mark to it where it lies apart."""

    box: Box
    text: str
    leader: tuple[float, float, float, float] | None

    @property
    def x(self) -> float:
        """Where the text is centred."""
        return (self.box.left + self.box.right) / 2

    @property
    def y(self) -> float:
        """The middle of the line."""
        return (self.box.top + self.box.bottom) / 2


@dataclass(frozen=True)
class Mark:
    """A carrier's point, its two intervals in pixels, and its label."""

    row: Row
    x: float
    y: float
    label: Label
    spread_x: tuple[float, float] | None
    spread_y: tuple[float, float] | None
    about: str


@dataclass(frozen=True)
class Scatter:
    """All a renderer needs, in pixels; y grows downwards."""

    width: float
    height: float
    plot: Box
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    front: list[tuple[float, float]]
    limit: float | None
    limit_text: str
    reference: float | None
    left_out: list[Row]


def text_width(text: str) -> float:
    """Pixels a 13 px label takes in the widest of the page's fonts, roughly; wide characters count twice."""
    return sum(13.0 if unicodedata.east_asian_width(c) in "WF" else 7.3 for c in text)


def _axis(values: Sequence[float], floor: float, ceiling: float, least: float) -> tuple[float, float]:
    """A range that holds the values and `ceiling`, at least `least` long, with a little air."""
    low, high = min([*values, floor]), max([*values, ceiling])
    low = min(low, high - least)
    air = 0.05 * (high - low)
    return low - air, high + air


def scatter(
    rows: Sequence[Row],
    constraints: Mapping[str, Any],
    *,
    width: float,
    height: float,
    text_width: Callable[[str], float] = text_width,
    line: float = 16.0,
    margins: tuple[float, float, float, float] = (34.0, 18.0, 50.0, 52.0),
) -> Scatter | None:
    """Lay the picture out.

    Args:
        rows: As `rows_of` gives them.
        constraints: The user's; a least locality becomes a line.
        width: Of the whole picture, in pixels.
        height: Likewise.
        text_width: Pixels a label's text takes.
        line: Height of a label, in pixels.
        margins: Above, right of, below and left of the plot.

    Returns:
        The picture, or None when no carrier has both figures.
    """
    points = [(row, row.mean("gap_closed"), row.mean("locality.all")) for row in rows if row.done]
    known = [(row, x, y) for row, x, y in points if x is not None and y is not None]
    if not known:
        return None
    top, right, bottom, left = margins
    plot = Box(left, top, width - right, height - bottom)
    least = interval(constraints.get("min_locality"))
    floor = min([1.0, *([least.mean] if least else [])])
    x_low, x_high = _axis([x for _, x, _ in known], 0.0, 1.0, 0.5)
    y_low, y_high = _axis([y for _, _, y in known], floor, 1.0, 0.05)

    def at_x(value: float) -> float:
        return plot.left + (value - x_low) / (x_high - x_low) * (plot.right - plot.left)

    def at_y(value: float) -> float:
        return plot.bottom - (value - y_low) / (y_high - y_low) * (plot.bottom - plot.top)

    limit = at_y(least.mean) if least and y_low < least.mean < y_high else None
    limit_text = f"your limit: locality ≥ {percent(least.mean)}" if least else ""
    taken = []
    if limit is not None:
        taken.append(Box(plot.left, limit, plot.left + text_width(limit_text) + 10, limit + line))
        taken.append(Box(plot.left, limit - 1, plot.right, limit + 1))
    reference = next((at_x(x) for row, x, _ in known if row.role == "reference"), None)
    centres = [(at_x(x), at_y(y)) for _, x, y in known]
    texts = [_short(row.title) for row, _, _ in known]
    inside = Box(plot.left + 3, plot.top + 1, plot.right - 2, plot.bottom - 2)
    sizes = [(text_width(text) + 4, line) for text in texts]
    radii = [HALO if row.recommended else RADIUS for row, _, _ in known]
    boxes = place_labels(centres, sizes, inside, radii=radii, taken=taken)
    marks = []
    for (row, _, _), (x, y), text, box in zip(known, centres, texts, boxes, strict=True):
        spreads = []
        for key, at, low, high in (
            ("gap_closed", at_x, plot.left, plot.right),
            ("locality.all", at_y, plot.top, plot.bottom),
        ):
            value = row.cells[key].value
            ends = None
            if value and value.low is not None and value.high is not None and value.low != value.high:
                one, other = sorted((at(value.low), at(value.high)))
                ends = max(one, low), min(other, high)
            spreads.append(ends)
        label = _label(box, text, x, y, HALO if row.recommended else RADIUS)
        marks.append(Mark(row, x, y, label, spreads[0], spreads[1], _about(row)))
    edge = [
        (at_x(row.mean("gap_closed") or 0.0), at_y(row.mean("locality.all") or 0.0)) for row in front(rows)
    ]
    drawn = {id(row) for row, _, _ in known}
    return Scatter(
        width, height, plot,
        [(at_x(t), percent(t)) for t in ticks(x_low, x_high, 6)],
        [(at_y(t), percent(t)) for t in ticks(y_low, min(y_high, 1.0), 6)],
        marks, _staircase(edge, plot), limit, limit_text, reference,
        [row for row in rows if row.done and id(row) not in drawn],
    )  # fmt: skip


def _short(title: str) -> str:
    return title if len(title) <= 30 else title[:29].rstrip() + "…"


def _label(box: Box, text: str, x: float, y: float, radius: float) -> Label:
    near = box.nearest(x, y)
    dx, dy = near[0] - x, near[1] - y
    length = (dx * dx + dy * dy) ** 0.5
    if length < radius + 9:
        return Label(box, text, None)
    start = x + dx / length * (radius + 1), y + dy / length * (radius + 1)
    return Label(box, text, (*start, *near))


def _about(row: Row) -> str:
    gap, kept = row.cells["gap_closed"], row.cells["locality.all"]
    how = "reads extra text when answering" if row.context else "reads no extra text"
    return f"{row.title}: gap closed {gap.text}, locality {kept.text}, {how}"


def _staircase(edge: Sequence[tuple[float, float]], plot: Box) -> list[tuple[float, float]]:
    """The border of what the front dominates, from the left axis to the bottom one."""
    if not edge:
        return []
    path = [(plot.left, edge[0][1])]
    for i, (x, y) in enumerate(edge):
        path.append((x, y))
        path.append((x, edge[i + 1][1] if i + 1 < len(edge) else plot.bottom))
    return path
