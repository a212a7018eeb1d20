"""The report of a comparison: one self-contained page, and the same pictures as PNG files."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.extras import require
from ..core.files import atomic_write, check_writable
from .scatter import scatter
from .view import COSTS, QUALITIES, Row, limits, number, rows_of, seconds, size

__all__ = ["write_losses", "write_report"]

HERE = Path(__file__).parent
SAMPLES = 40  # answers shown per carrier
_BARS = ("recall.prompt", "recall.paraphrase", "locality.all")
_STATS = ("recall.paraphrase", "locality.all", "gap_closed", "stored_bytes", "latency_seconds", "tokens_read")


def write_report(
    records: Sequence[Mapping[str, Any]], context: Mapping[str, Any], folder: str | Path
) -> Path:
    """Write `report.html` and `plots/{pareto,recall,costs}.png` into `folder`.

    The page holds everything it shows and may load nothing (its content security policy says so).

    Args:
        records: One mapping per carrier, as in `records.jsonl`. A figure is a number, a mapping with `mean`, `low`
            and `high`, or None; missing fields count as None.
        context: What the records share: `title`, `model`, `knowledge`, `constraints`, `recommendation`,
            `reference`, `versions`, `hardware`, `seconds`, `created`, `recipe`.
        folder: Where to write; created when missing.

    Returns:
        The page's path.

    Raises:
        BadInput: the folder cannot be written.
        MissingExtra: matplotlib or jinja2 is not installed.
    """
    target = check_writable(folder, "folder")
    require("jinja2", extra="report")
    require("matplotlib", extra="report")
    from .plots import plots

    rows = rows_of(records, context)
    page = _page(rows, context).encode("utf-8", "replace")
    for name, image in plots(rows, context).items():
        atomic_write(target / "plots" / f"{name}.png", image)
    atomic_write(target / "report.html", page)
    return target / "report.html"


def write_losses(folder: str | Path) -> Path:
    """Draw the losses in a run's `training.json` into `loss.png` beside it; returns the picture's path.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", extra="report")
    from .plots import losses

    record = json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
    target = Path(folder) / "loss.png"
    atomic_write(target, losses(record["losses"], record.get("perplexity")))
    return target


def _page(rows: Sequence[Row], context: Mapping[str, Any]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters["px"] = lambda value: f"{value:.1f}".removesuffix(".0")
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    constraints = context.get("constraints") or {}
    advice = context.get("recommendation") or {}
    titles = {row.carrier: row.title for row in rows}
    metrics = {metric.key: metric for metric in (*QUALITIES, *COSTS)}
    done = [row for row in rows if row.done]
    return environment.get_template("page.html.j2").render(
        title=context.get("title") or "Comparison",
        lead=_lead(rows, context),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        done=done,
        missed=[row for row in rows if not row.done],
        chosen=next((row for row in done if row.recommended), None),
        limits=limits(constraints),
        reasons=advice.get("reasons") or [],
        excluded=[(titles.get(e.get("carrier"), e.get("carrier")), e.get("reason"))
                  for e in advice.get("excluded") or []],
        wide=scatter(rows, constraints, width=1072, height=520),
        medium=scatter(rows, constraints, width=740, height=470),
        narrow=scatter(rows, constraints, width=400, height=560),
        reference=titles.get(context.get("reference") or ""),
        qualities=QUALITIES,
        costs=COSTS,
        bars=[metrics[key] for key in _BARS],
        stats=[metrics[key] for key in _STATS],
        most=SAMPLES,
        lineage=_lineage(context),
        recipe=context.get("recipe"),
        folders=[_folder(row) for row in rows],
    )  # fmt: skip


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _lead(rows: Sequence[Row], context: Mapping[str, Any]) -> list[str]:
    model, knowledge = context.get("model") or {}, context.get("knowledge") or {}
    what = [f"{knowledge[kind]} {kind}" for kind in ("facts", "questions") if knowledge.get(kind)]
    into = f" into {model['spec']}" if model.get("spec") else ""
    count = (
        f"{len(rows)} way{'' if len(rows) == 1 else 's'} to move {' and '.join(what) or 'knowledge'}{into}"
    )
    missed = sum(not row.done for row in rows)
    took, asked = context.get("seconds"), knowledge.get("paraphrases_tested")
    ends = [
        f"asked in {asked} wordings never taught" if asked else "",
        f"{missed} not measured" if missed else "",
        f"{seconds(took)} of measuring, carrier by carrier" if isinstance(took, (int, float)) else "",
        str(context.get("created") or "")[:10],
    ]
    return [count, *(end for end in ends if end)]


def _folder(row: Row) -> tuple[Row, str, str, str]:
    arguments = row.record.get("arguments") or {}
    shown = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in arguments.items())
    total = row.record.get("seconds")
    return (
        row,
        row.record.get("folder") or "–",
        shown or "defaults",
        seconds(total) if total is not None else "–",
    )


def _lineage(context: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings with their (name, value) pairs, None left out."""
    groups = [
        ("Model", "model"),
        ("Knowledge", "knowledge"),
        ("Hardware", "hardware"),
        ("Software", "versions"),
    ]
    found = []
    for heading, key in groups:
        pairs = [
            (_words(k), _shown(k, v)) for k, v in (context.get(key) or {}).items() if v not in (None, [], "")
        ]
        found.append((heading, pairs))
    run = [("created", context.get("created")), ("reference", context.get("reference"))]
    found.append(("Run", [(key, str(value)) for key, value in run if value]))
    return found


def _words(key: str) -> str:
    return {"sha256": "SHA-256", "memory_bytes": "memory", "spec": "name", "cpu": "CPU", "gpus": "GPUs"}.get(
        key, key.replace("_", " ")
    )


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return size(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
