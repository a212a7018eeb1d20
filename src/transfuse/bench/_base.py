"""What a benchmark or study returns: figures for each record, and their means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.metrics import bootstrap_interval

__all__ = ["Evaluation", "Interval", "summarise"]


class Interval(NamedTuple):
    """Mean over the records that have the figure, its 95 % bootstrap interval, and how many those are."""

    mean: float
    low: float
    high: float
    size: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        records: One mapping for each record: its label under "record", figures by name, texts.
        summary: Figure -> `Interval`.
    """

    records: list[dict[str, Any]]
    summary: dict[str, Interval]

    @property
    def means(self) -> dict[str, float]:
        """Figure -> mean."""
        return {name: interval.mean for name, interval in self.summary.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "records": [dict(record) for record in self.records],
            "summary": {name: interval._asdict() for name, interval in self.summary.items()},
        }


def summarise(records: Sequence[Mapping[str, Any]]) -> Evaluation:
    """Means over `records` of every number in them, each over the records that have it."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                columns.setdefault(name, []).append(float(value))
    summary = {name: Interval(*bootstrap_interval(values), len(values)) for name, values in columns.items()}
    return Evaluation([dict(record) for record in records], summary)
