"""The run's result as one picture, for a README and for artifacts that take no HTML."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from tasks.publish.report_parts import RANKED_BY, Row, diversity_of, figure, pareto

_INK, _SOFT, _BLUE, _ORANGE = "#1c2126", "#6b757e", "#0072b2", "#d55e00"
_SHOWN = 14
_NAME_CHARS = 34
_LINE = 18  # pixels that a name needs


def plot_png(data: dict[str, Any]) -> bytes:
    """Leaderboard and quality against diversity side by side, 1200 x 500 pixels; the first alone where
    diversity is not labelled.

    Built on a Figure of its own, without pyplot's global state, so that any thread may call it.
    """
    canvas = FigureCanvasAgg(Figure(figsize=(12, 5), dpi=100, facecolor="white", layout="constrained"))
    if diversity_of(data) and data["ranked_by"] != "embedding_entropy":
        left, right = canvas.figure.subplots(1, 2, width_ratios=(1.15, 1))
        _tradeoff(right, data)
    else:
        left = canvas.figure.subplots()
    _leaderboard(left, data)
    out = io.BytesIO()
    canvas.figure.savefig(out, format="png", metadata={"Software": None})  # no version in it: same data, same bytes
    return out.getvalue()


def _plain(text: str) -> str:
    """One short line."""
    line = " ".join(text.split())
    return line if len(line) <= _NAME_CHARS else line[:_NAME_CHARS - 1] + "\u2026"


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    axes.tick_params(colors=_SOFT, labelsize=9)
    axes.grid(color="#e4e6e2", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _nothing(axes: Axes, title: str, words: str) -> None:
    _style(axes, title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, ha="center", va="center", color=_SOFT, transform=axes.transAxes)


def _leaderboard(axes: Axes, data: Row) -> None:
    metric = data["ranked_by"]
    rows = [h for h in data["heuristics"] if metric and h[metric] is not None]
    if not rows:
        _nothing(axes, "Leaderboard", "not labelled")
        return
    shown, title = rows, f"Heuristics by {RANKED_BY[metric].words} (95 % intervals)"
    if len(rows) > _SHOWN:
        shown = [*rows[:_SHOWN - 4], *rows[-4:]]
        title = f"Best {_SHOWN - 4} and last 4 of {len(rows)} heuristics by {RANKED_BY[metric].words}"
    for n, h in enumerate(shown):
        _, low, high = figure(h, metric)
        colour = _BLUE if n < _SHOWN - 4 or len(rows) <= _SHOWN else _ORANGE
        if low is not None and high is not None:
            axes.plot([low, high], [n, n], color=colour, alpha=0.4, linewidth=4, solid_capstyle="round")
        axes.plot([h[metric]], [n], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(shown)), [f"{h['place']}. {_plain(h['name'])}" for h in shown])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a $ in a name is no formula
    axes.invert_yaxis()
    if RANKED_BY[metric].signed:
        axes.axvline(0, color=_SOFT, linewidth=1)
    means = [h[metric] for h in shown]
    reach = 2.5 * max(abs(m) for m in means) or 1.0
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -reach), min(high, reach))
    axes.set_xlabel(RANKED_BY[metric].axis, color=_SOFT, fontsize=9)
    _style(axes, title)


def _tradeoff(axes: Axes, data: Row) -> None:
    quality, diversity = data["ranked_by"], "embedding_entropy"
    shown = [h for h in data["heuristics"] if h[quality] is not None and h[diversity] is not None]
    if not shown:
        _nothing(axes, "Quality against diversity", "no heuristic has both")
        return
    points = [(h[diversity], h[quality]) for h in shown]
    front = pareto(points)
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=28, color=_BLUE, alpha=0.55, linewidths=0)
    axes.plot([points[n][0] for n in front], [points[n][1] for n in front], "o--", color=_ORANGE, linewidth=1.2,
              markersize=7)
    axes.margins(0.1, 0.14)
    axes.set_xlabel("embedding entropy (nats), more diverse to the right", color=_SOFT, fontsize=9)
    axes.set_ylabel(RANKED_BY[quality].axis.split(";")[0], color=_SOFT, fontsize=9)
    _style(axes, "Quality against diversity")
    _name_front(axes, [(shown[n]["name"], points[n]) for n in front])


def _name_front(axes: Axes, front: list[tuple[str, tuple[float, float]]]) -> None:
    """Name the front's ends, then what lies between, but none where a name stands already."""
    axes.autoscale_view()
    order = sorted(range(len(front)), key=lambda n: min(n, len(front) - 1 - n))
    middle, taken = sum(axes.get_xlim()) / 2, []
    for n in order:
        name, (x, y) = front[n]
        height = axes.transData.transform((x, y))[1]
        if any(abs(height - other) < _LINE for other in taken):
            continue
        taken.append(height)
        on_right = x < middle
        text = axes.annotate(_plain(name), (x, y), xytext=(9 if on_right else -9, 6), fontsize=9, color=_INK,
                             textcoords="offset points", ha="left" if on_right else "right", parse_math=False)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
