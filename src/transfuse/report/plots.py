"""The page's pictures as PNG files, drawn by matplotlib in the page's colours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .scatter import Scatter, scatter
from .view import COSTS, QUALITIES, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["losses", "plots"]

INSIDE, READS, PICK, LIMIT = "#2463a9", "#b8560f", "#1d5428", "#a3262a"
INK, QUIET, RULE = "#191c20", "#59626e", "#dfe3e8"
_RC: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": RULE, "xtick.color": QUIET, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
}  # fmt: skip
_BARS = ("recall.prompt", "recall.paraphrase", "locality.all")


def plots(rows: Sequence[Row], context: Mapping[str, Any]) -> dict[str, bytes]:
    """`pareto`, `recall` and `costs` as PNG bytes (Agg; no display is needed)."""
    import matplotlib as mpl

    with mpl.rc_context(_RC):
        return {
            "pareto": _png(_pareto(rows, context)),
            "recall": _png(_recall([row for row in rows if row.done])),
            "costs": _png(_costs([row for row in rows if row.done])),
        }


def losses(values: Sequence[float], perplexity: Mapping[str, float] | None = None) -> bytes:
    """The loss of each update, with its running mean, as PNG bytes.

    Args:
        values: One per update.
        perplexity: `before` and `after` the run, for the heading.
    """
    import matplotlib as mpl

    width = max(1, len(values) // 20)
    mean = [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    with mpl.rc_context(_RC):
        figure = _figure(8, 4)
        axes = figure.add_axes((0.09, 0.13, 0.88, 0.75))
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=RULE, linewidth=1.0)
        axes.plot(steps, mean, color=INSIDE, linewidth=1.8)
        axes.set_xlabel("update")
        axes.set_ylabel("loss")
        if perplexity is not None:
            text = "held-out perplexity {before:.4g} before, {after:.4g} after".format(**perplexity)
            axes.set_title(text, loc="left", fontsize=10, color=QUIET)
        return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": "transfuse"})
    return stream.getvalue()


def _empty(text: str) -> Figure:
    figure = _figure(8, 2)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=QUIET)
    return figure


def _colour(row: Row) -> str:
    return READS if row.context else INSIDE


def _mark(axes: Axes, row: Row, x: float, y: float) -> None:
    if row.recommended:
        axes.plot([x], [y], "o", ms=17, mfc="none", mec=PICK, mew=1.6, zorder=4)
    face, edge = ("white", _colour(row)) if row.yardstick else (_colour(row), "white")
    axes.plot([x], [y], "D" if row.context else "o", ms=8 if row.context else 9, mfc=face, mec=edge,
              mew=1.6 if row.yardstick else 0.8, zorder=5)  # fmt: skip


def _pareto(rows: Sequence[Row], context: Mapping[str, Any]) -> Figure:
    """The scatter's geometry is the page's, in pixels; the axes are those pixels."""
    from matplotlib.patheffects import withStroke
    from matplotlib.textpath import TextPath

    def width(text: str) -> float:
        return float(TextPath((0, 0), text, size=12.5).get_extents().width)

    scene = scatter(
        rows, context.get("constraints") or {}, width=1000, height=560, text_width=width, line=17,
        margins=(74, 20, 54, 60),
    )  # fmt: skip
    if scene is None:
        return _empty("No carrier has both gap closed and locality")
    figure = _figure(scene.width / 100, scene.height / 100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, scene.width), ylim=(scene.height, 0))
    axes.axis("off")
    _frame(axes, scene)
    for mark in scene.marks:
        for ends, fixed, across in ((mark.spread_x, mark.y, True), (mark.spread_y, mark.x, False)):
            if ends:
                xs, ys = (ends, (fixed, fixed)) if across else ((fixed, fixed), ends)
                axes.plot(xs, ys, color=_colour(mark.row), lw=1, alpha=0.2, zorder=0.5)
        if mark.label.leader:
            x1, y1, x2, y2 = mark.label.leader
            axes.plot((x1, x2), (y1, y2), color=QUIET, lw=0.7, zorder=3)
        _mark(axes, mark.row, mark.x, mark.y)
        axes.text(mark.label.x, mark.label.y, mark.label.text, ha="center", va="center", fontsize=9, zorder=6,
                  fontweight="bold" if mark.row.recommended else "normal",
                  bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
                  path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip
    _legend(axes, scene)
    return figure


def _frame(axes: Axes, scene: Scatter) -> None:
    plot = scene.plot
    for x, text in scene.x_ticks:
        axes.plot((x, x), (plot.top, plot.bottom), color=RULE, lw=0.8, zorder=0)
        axes.text(x, plot.bottom + 15, text, ha="center", va="center", color=QUIET, fontsize=9)
    for y, text in scene.y_ticks:
        axes.plot((plot.left, plot.right), (y, y), color=RULE, lw=0.8, zorder=0)
        axes.text(plot.left - 8, y, text, ha="right", va="center", color=QUIET, fontsize=9)
    axes.text(
        plot.right, scene.height - 14, "gap closed →", ha="right", va="center", fontweight="bold", fontsize=9
    )
    axes.text(plot.left - 48, plot.top - 18, "↑ locality", va="center", fontweight="bold", fontsize=9)
    if scene.front:
        xs, ys = zip(*scene.front, strict=True)
        axes.fill((*xs, plot.left), (*ys, plot.bottom), color=INSIDE, alpha=0.04, lw=0, zorder=0)
        axes.plot(xs, ys, color=QUIET, lw=1.1, zorder=1)
    if scene.reference is not None:
        axes.plot((scene.reference,) * 2, (plot.top, plot.bottom), color=QUIET, lw=0.8, ls=":", zorder=1)
    if scene.limit is not None:
        axes.plot((plot.left, plot.right), (scene.limit,) * 2, color=LIMIT, lw=1, ls="--", zorder=1)
        axes.text(plot.left + 6, scene.limit + 10, scene.limit_text, color=LIMIT, va="center", fontsize=8.5)


def _legend(axes: Axes, scene: Scatter) -> None:
    from matplotlib.lines import Line2D

    def dot(marker: str, colour: str, face: str, size: float = 7) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, mfc=face, ms=size)

    handles = [
        (dot("o", INSIDE, INSIDE), "answers from the model alone"),
        (dot("D", READS, READS, 6), "reads extra text when answering"),
        (dot("o", QUIET, "white"), "hollow: a yardstick, not a choice"),
        (Line2D([], [], color=QUIET, lw=1.1), "Pareto front"),
    ]
    if any(mark.row.recommended for mark in scene.marks):
        handles.append((dot("o", PICK, "none", 11), "recommended"))
    axes.legend(
        *zip(*handles, strict=True), loc="upper left", bbox_to_anchor=(scene.plot.left - 8, 2),
        bbox_transform=axes.transData, ncols=len(handles), frameon=False, fontsize=8.5, labelcolor=QUIET,
        handletextpad=0.3, columnspacing=1.1, borderpad=0.3,
    )  # fmt: skip


def _panels(rows: Sequence[Row], count: int, width: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side, a line per carrier; names stand beside the first."""
    longest = max(len(row.title) for row in rows)
    side = min(3.2, 0.35 + 0.078 * longest)
    height = 0.9 + 0.34 * len(rows)
    figure = _figure(side + width * count + 0.2, height)
    grid = figure.add_gridspec(
        1, count, left=side / figure.get_figwidth(), right=1 - 0.2 / figure.get_figwidth(),
        top=1 - 0.55 / height, bottom=0.35 / height, wspace=0.14,
    )  # fmt: skip
    panels = [figure.add_subplot(grid[0, i]) for i in range(count)]
    for i, axes in enumerate(panels):
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [row.title for row in rows] if i == 0 else [])
        axes.tick_params(axis="y", length=0)
        for label, row in zip(axes.get_yticklabels(), rows, strict=False):
            label.set_fontweight("bold" if row.recommended else "normal")
    return figure, panels


def _recall(rows: Sequence[Row]) -> Figure:
    if not rows:
        return _empty("No carrier was measured")
    metrics = [metric for key in _BARS for metric in QUALITIES if metric.key == key]
    figure, panels = _panels(rows, 3, 3.0)
    for axes, metric in zip(panels, metrics, strict=True):
        axes.set_title(metric.name, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, 1.16)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "", "50 %", "", "100 %"], fontsize=8)
        axes.grid(axis="x", color=RULE, lw=0.7)
        axes.set_axisbelow(True)
        for i, row in enumerate(rows):
            cell = row.cells[metric.key]
            if cell.value is None:
                axes.text(0.02, i, "not measured", va="center", fontsize=8, color=QUIET)
                continue
            mean, low, high = cell.value
            axes.barh(
                i, mean, height=0.56, color="white" if row.yardstick else _colour(row), ec=_colour(row), lw=1
            )
            if low is not None and high is not None and low != high:
                spread = [[mean - min(low, mean)], [max(high, mean) - mean]]
                for colour, width in (("white", 3.2), (INK, 1.2)):
                    axes.errorbar(mean, i, xerr=spread, fmt="none", ecolor=colour, elinewidth=width,
                                  capsize=2.5, capthick=width)  # fmt: skip
            axes.text(max(mean, high or 0) + 0.02, i, cell.text, va="center", fontsize=8, color=QUIET)
    return figure


def _costs(rows: Sequence[Row]) -> Figure:
    if not rows:
        return _empty("No carrier was measured")
    figure, panels = _panels(rows, len(COSTS), 1.75)
    for axes, metric in zip(panels, COSTS, strict=True):
        axes.set_title(metric.name, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, 1.75)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        for i, row in enumerate(rows):
            cell = row.cells[metric.key]
            face = "white" if row.yardstick else _colour(row)
            axes.barh(i, cell.share, height=0.56, color=face, ec=_colour(row), lw=1 if cell.share else 0)
            axes.text(cell.share + 0.05, i, cell.text, va="center", fontsize=8, color=QUIET)
    return figure
