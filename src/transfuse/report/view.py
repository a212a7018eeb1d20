"""Records as what page and plots show: figures read, sorted, compared, written in units people read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = [
    "COSTS",
    "QUALITIES",
    "Cell",
    "Interval",
    "Metric",
    "Row",
    "front",
    "interval",
    "limits",
    "number",
    "percent",
    "rows_of",
    "seconds",
    "size",
]

NARROW = "\u00a0"  # a no-break space: a figure and its unit stay on one line
_DONE = "done"


class Interval(NamedTuple):
    """A mean with its 95 % interval; `low` and `high` are None where only one figure was measured."""

    mean: float
    low: float | None = None
    high: float | None = None


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def interval(value: Any) -> Interval | None:
    """A record's figure: a number, or a mapping with mean, low and high; None where nothing finite is there."""
    if not isinstance(value, Mapping):
        mean = _finite(value)
        return None if mean is None else Interval(mean)
    mean, low, high = (_finite(value.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return None
    return Interval(mean, low, high) if low is not None and high is not None else Interval(mean)


def percent(value: float) -> str:
    """A share: `0.957` as `96 %`; what is not quite all or nothing is not rounded to it."""
    if 0.0005 <= abs(value) < 0.005 or 0.995 <= value < 0.9995:
        return f"{100 * value:.1f}{NARROW}%".replace("-", "−")
    return f"{round(100 * value)}{NARROW}%".replace("-", "−")


def _whole(value: float) -> str:
    return f"{round(100 * value)}{NARROW}%".replace("-", "−")


def seconds(value: float) -> str:
    """A duration: `0.24 s`, `21 s`, `2 min 05 s`, `1 h 02 min`."""
    if value < 0.001:
        return f"0{NARROW}s" if value == 0 else f"<{NARROW}1{NARROW}ms"
    if value < 0.0995:
        return f"{1000 * value:.0f}{NARROW}ms"
    if value < 9.95:
        return f"{value:.2f}{NARROW}s" if value < 0.995 else f"{value:.1f}{NARROW}s"
    whole = round(value)
    if whole < 60:
        return f"{whole}{NARROW}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min{NARROW}{rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h{NARROW}{minutes % 60:02d}{NARROW}min"


def size(value: float) -> str:
    """Bytes in decimal units: `4.1 kB`, `1.9 MB`, `1.24 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            shown = value / scale
            return f"{shown:.0f}{NARROW}{unit}" if shown >= 99.95 else f"{shown:.3g}{NARROW}{unit}"
    return f"{value:.0f}{NARROW}B"


def number(value: float) -> str:
    """A count that may be a mean: `9.4`, `122`, `134,515,008`."""
    return f"{value:,.0f}" if value >= 99.95 or value == round(value) else f"{value:.1f}"


def factor(value: float) -> str:
    """A ratio: `1.06 ×`."""
    return f"{value:.2f}{NARROW}×" if value < 99.5 else f"{value:,.0f}{NARROW}×"


@dataclass(frozen=True)
class Metric:
    """A column: where its figure lies in a record, how it is written, which end is better (+1 high, -1 low)."""

    key: str
    name: str
    about: str
    write: Callable[[float], str]
    better: int


QUALITIES = (
    Metric("gap_closed", "Gap closed", "0 % is the untouched model, 100 % the reference", percent, 1),
    Metric("recall.prompt", "Recall, prompt", "taught prompts answered", percent, 1),
    Metric("recall.paraphrase", "Recall, paraphrases", "held-out wordings answered", percent, 1),
    Metric("locality.all", "Locality", "other answers left as they were", percent, 1),
    Metric("locality.neighbours", "Neighbours", "locality on related prompts", percent, 1),
    Metric("locality.unrelated", "Unrelated", "locality on facts known before", percent, 1),
    Metric("perplexity_ratio", "Perplexity", "on neutral text, times the untouched model's", factor, -1),
)
COSTS = (
    Metric("install_seconds", "Install", "time to move the knowledge", seconds, -1),
    Metric("install_peak_bytes", "Peak memory", "while installing", size, -1),
    Metric("stored_bytes", "Stored", "on disk, beside the model", size, -1),
    Metric("latency_seconds", "Latency", "per answer, one at a time", seconds, -1),
    Metric("tokens_read", "Tokens read", "prompt tokens per answer", number, -1),
)


@dataclass
class Cell:
    """One figure as shown. `share` is its length against the column's longest, `best` marks the column's best."""

    value: Interval | None
    text: str
    spread: str = ""
    share: float = 0.0
    best: bool = False


@dataclass
class Row:
    """A carrier as shown.

    Attributes:
        record: As measured.
        key: An id that is safe in a page.
        role: "candidate"; "untouched" or "reference" for the two yardsticks.
        cells: By metric key.
    """

    record: Mapping[str, Any]
    key: str
    role: str
    recommended: bool
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def carrier(self) -> str:
        """Name in recipe and records."""
        return str(self.record.get("carrier", "?"))

    @property
    def title(self) -> str:
        """What is shown as its name."""
        return str(self.record.get("title") or self.carrier)

    @property
    def status(self) -> str:
        """`done`, `failed` or `not applicable`."""
        return str(self.record.get("status") or "failed")

    @property
    def done(self) -> bool:
        """Whether it was measured."""
        return self.status == _DONE

    @property
    def context(self) -> bool:
        """Whether it reads extra text when answering."""
        return bool(self.record.get("uses_context"))

    @property
    def yardstick(self) -> bool:
        """Whether it is there to compare with, and cannot be chosen."""
        return self.role != "candidate"

    def mean(self, key: str) -> float | None:
        """A figure's mean."""
        value = self.cells[key].value
        return None if value is None else value.mean


def _look_up(record: Mapping[str, Any], key: str) -> Any:
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _role(record: Mapping[str, Any], reference: Any) -> str:
    if record.get("baseline") or record.get("uses", record.get("carrier")) == "none":
        return "untouched"
    return "reference" if reference in (record.get("carrier"), record.get("uses")) else "candidate"


def rows_of(records: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> list[Row]:
    """Every record as a row: measured ones first, by gap closed; then those that failed or did not apply."""
    chosen = (context.get("recommendation") or {}).get("carrier")
    rows = []
    for i, record in enumerate(records):
        name = record.get("carrier")
        row = Row(
            record, f"c{i}", _role(record, context.get("reference")), chosen is not None and name == chosen
        )
        for metric in (*QUALITIES, *COSTS):
            row.cells[metric.key] = _cell(metric, interval(_look_up(record, metric.key)))
        rows.append(row)
    for metric in (*QUALITIES, *COSTS):
        _compare(metric, rows)
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[bool, bool, float, float]:
    gap, recall = row.mean("gap_closed"), row.mean("recall.paraphrase")
    return (not row.done, gap is None, -(gap or 0.0), -(recall or 0.0))


def _cell(metric: Metric, value: Interval | None) -> Cell:
    if value is None:
        return Cell(None, "–")
    spread = ""
    if value.low is not None and value.high is not None and value.low != value.high:
        write = _whole if metric.write is percent else metric.write
        ends = [write(end) for end in (value.low, value.high)]
        unit = ends[1].partition(NARROW)[2]
        if unit and ends[0].endswith(NARROW + unit):
            ends[0] = ends[0][: -len(unit) - 1]
        spread = f"{ends[0]}–{ends[1]}" if "−" not in ends[0] else f"{ends[0]} to {ends[1]}"
    return Cell(value, metric.write(value.mean), spread)


def _compare(metric: Metric, rows: Sequence[Row]) -> None:
    """Mark the best candidates of a column (as written: figures that read the same tie) and scale its bars."""
    measured = [row.cells[metric.key] for row in rows if row.done and row.cells[metric.key].value]
    top = max((cell.value.mean for cell in measured if cell.value), default=0.0)
    for cell in measured:
        if cell.value and top > 0:
            cell.share = max(0.0, cell.value.mean) / top
    rivals = [row.cells[metric.key] for row in rows if row.done and not row.yardstick]
    means = [cell.value.mean for cell in rivals if cell.value]
    if len(means) < 2 or max(means) == min(means):
        return
    best = metric.write(max(means) if metric.better > 0 else min(means))
    for cell in rivals:
        cell.best = cell.text == best


def front(rows: Sequence[Row], x: str = "gap_closed", y: str = "locality.all") -> list[Row]:
    """The candidates no other candidate beats in both figures, by falling `y`: the Pareto front."""
    points = [(row.mean(x), row.mean(y), row) for row in rows if row.done and not row.yardstick]
    known = [(a, b, row) for a, b, row in points if a is not None and b is not None]
    kept = [
        (a, b, row)
        for a, b, row in known
        if not any((c >= a and d >= b) and (c > a or d > b) for c, d, _ in known)
    ]
    return [row for _, _, row in sorted(kept, key=lambda point: (point[0], -point[1]))]


_LIMITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "max_latency": ("latency ≤ {}", seconds),
    "max_bytes": ("stored ≤ {}", size),
    "max_install_seconds": ("install ≤ {}", seconds),
    "max_memory": ("peak memory ≤ {}", size),
    "max_tokens_read": ("tokens read ≤ {}", number),
    "min_locality": ("locality ≥ {}", percent),
    "min_recall": ("paraphrase recall ≥ {}", percent),
}
_FLAGS = {
    ("reversible", True): "can be removed again",
    ("weight_access", False): "no access to weights",
    ("context", False): "no extra text when answering",
}


def limits(constraints: Mapping[str, Any]) -> list[str]:
    """The user's constraints, in words."""
    words = []
    for name, value in constraints.items():
        limit = _finite(value)
        if name in _LIMITS and limit is not None:
            pattern, write = _LIMITS[name]
            words.append(pattern.format(write(limit)))
        elif (name, value) in _FLAGS:
            words.append(_FLAGS[name, value])
        elif value is not None and (name, not value) not in _FLAGS:
            words.append(f"{name} = {value}")
    return words
