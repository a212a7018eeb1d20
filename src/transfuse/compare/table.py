"""What the terminal shows while a comparison runs: a row per finished carrier, the stage, the time left."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from .job import Job

__all__ = ["Table"]

_COLUMNS = (
    "carrier",
    "prompt",
    "paraphrase",
    "gap closed",
    "locality",
    "ppl x",
    "install",
    "stored",
    "latency",
    "tokens",
)
_WIDTHS = (24, 7, 11, 11, 9, 6, 9, 9, 8, 7)


def _number(value: Any, pattern: str = "{:.2f}") -> str:
    if isinstance(value, dict):
        value = value["mean"]
    return "-" if value is None else pattern.format(value)


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def row(record: dict[str, Any]) -> list[str]:
    """A record's cells."""
    return [
        record["carrier"],
        _number(record["recall"]["prompt"]),
        _number(record["recall"]["paraphrase"]),
        _number(record.get("gap_closed")),
        _number(record["locality"]["all"]),
        _number(record["perplexity_ratio"]),
        _number(record["install_seconds"], "{:.1f} s"),
        _size(record["stored_bytes"]),
        _number(record["latency_seconds"], "{:.2f} s"),
        _number(record["tokens_read"], "{:.0f}"),
    ]


class Table:
    """Prints rows as carriers finish; on a terminal, a status line shows the stage and the time left."""

    def __init__(self, job: Job, labels: list[str], *, quiet: bool):
        self.quiet, self.labels = quiet, labels
        self.live = not quiet and sys.stdout.isatty()
        counts = f"{len(job.knowledge.items)} {job.knowledge.kind}, {len(labels)} carriers"
        self.heading = f"{job.recipe.title}\n{job.recipe.model}, {counts}"
        self.done, self.all, self.left, self.began = 0, 0.0, 0.0, 0.0
        self.stages: dict[str, str] = {}

    def __enter__(self) -> Table:
        self._print(self.heading)
        self._print(self._line(list(_COLUMNS)))
        self._print("-" * (sum(_WIDTHS) + len(_WIDTHS) - 1))
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        self._clear()
        if kind is not None and issubclass(kind, (KeyboardInterrupt, Exception)):
            self._print(
                f"stopped after {self.done} of {len(self.labels)}; finished carriers are kept: run it again to go on"
            )

    @staticmethod
    def _line(cells: list[str]) -> str:
        first, *rest = cells
        return " ".join(
            [first.ljust(_WIDTHS[0]), *(c.rjust(w) for c, w in zip(rest, _WIDTHS[1:], strict=True))]
        )

    def _print(self, text: str) -> None:
        if not self.quiet:
            self._clear()
            print(text, flush=True)

    def _clear(self) -> None:
        if self.live:
            sys.stdout.write("\r\x1b[2K")
            sys.stdout.flush()

    def begin(self, label: str, *, left: float) -> None:
        """A carrier starts; `left` is the rough effort of all that are at work or still to come."""
        if not self.all:
            self.all, self.began = left, time.perf_counter()
        self.left = left
        self.stages[label] = "begin"

    def stage(self, label: str, name: str) -> None:
        """A carrier at work has reached a stage."""
        self.stages[label] = name
        if self.live:
            self._clear()
            shown = ", ".join(f"{label}: {stage}" for label, stage in self.stages.items())
            sys.stdout.write(f"  {shown} ...  {self.remaining()}")
            sys.stdout.flush()

    def remaining(self) -> str:
        """Time left, from the pace so far."""
        made, spent = self.all - self.left, time.perf_counter() - self.began
        seconds = self.left * (spent / made if made > 0 else 1.0)
        return f"about {int(seconds // 60)} min {int(seconds % 60):02d} s left ({self.done} of {len(self.labels)} done)"

    def add(self, record: dict[str, Any], *, cached: bool = False) -> None:
        """A carrier is finished."""
        self.done += 1
        self.stages.pop(record["carrier"], None)
        if record["status"] != "done":
            self._print(f"{record['carrier'].ljust(_WIDTHS[0])} {record['status']}: {record['reason']}")
        else:
            self._print(self._line(row(record)) + ("  (kept)" if cached else ""))

    def close(self, report: Path) -> None:
        """Everything is written."""
        self._print(f"report: {report}")
