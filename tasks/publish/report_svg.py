"""The report's two plots as inline SVG, drawn with the page's own colours so that they follow its scheme."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from tasks.publish.report_parts import (
    MISSING,
    RANKED_BY,
    Row,
    count,
    diversity_of,
    esc,
    figure,
    figure_text,
    num,
    pareto,
    pct,
    section,
    ticks,
)

_W, _H = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 14, 58
_COLOURS = 8
_WHISKERS = 30


class Axes:
    """Linear axes in a box of the SVG."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], pad: float = 0.06) -> None:
        self.x, self.y = _padded(xs, pad), _padded(ys, pad)

    def px(self, x: float) -> float:
        """Horizontal place of a value."""
        return round(_LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_W - _LEFT - _RIGHT), 1)

    def py(self, y: float) -> float:
        """Vertical place of a value."""
        return round(_H - _BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (_H - _TOP - _BOTTOM), 1)

    def frame(self, x_label: str, y_label: str) -> str:
        """Grid lines, tick labels and axis labels."""
        out = []
        for x in ticks(*self.x):
            at = self.px(x)
            out.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_H - _BOTTOM}"/>'
                       f'<text class="ax" x="{at}" y="{_H - _BOTTOM + 20}" text-anchor="middle">{_tick(x)}</text>')
        for y in ticks(*self.y):
            out.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{self.py(y)}" y2="{self.py(y)}"/>'
                       f'<text class="ax" x="{_LEFT - 6}" y="{self.py(y) + 4}" text-anchor="end">{_tick(y)}</text>')
        middle = (_H - _BOTTOM + _TOP) / 2
        out.append(f'<text class="ax" x="{(_W + _LEFT) / 2}" y="{_H - 10}" text-anchor="middle">{esc(x_label)}</text>'
                   f'<text class="ax" transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">'
                   f"{esc(y_label)}</text>")
        return "".join(out)


def _padded(values: Sequence[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    reach = (high - low) or abs(high) or 1.0
    return low - pad * reach, high + pad * reach


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")


def _svg(body: str, about: str) -> str:
    return f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{esc(about)}">{body}</svg>'


def tradeoff(data: Row) -> str:
    """Quality against diversity, a dot per heuristic, with the Pareto front."""
    quality = data["ranked_by"] if data["ranked_by"] != "embedding_entropy" else None
    diversity = diversity_of(data)
    shown = [h for h in data["heuristics"] if quality and diversity and h[quality] is not None and
             h[diversity] is not None]
    if not shown or not quality or not diversity:
        missing = "Diversity needs two seeds or more and a source with diversity: true." if not diversity else ""
        return section("Quality against diversity", f'<p class="soft">{MISSING}. {missing}</p>')
    points = [(h[diversity], h[quality]) for h in shown]
    front = pareto(points)
    colour = _colours(shown)
    whiskers = len(shown) <= _WHISKERS
    ends = [v for h in shown for v in figure(h, quality) if v is not None] if whiskers else [p[1] for p in points]
    axes = Axes([p[0] for p in points], ends)
    body = axes.frame("embedding entropy (nats): more diverse to the right", RANKED_BY[quality].axis.split(";")[0])
    corners = [(axes.px(points[n][0]), axes.py(points[n][1])) for n in front]
    body += '<polyline class="front" points="' + " ".join(f"{x},{y}" for x, y in corners) + '"/>'
    body += "".join(_dot(h, axes, p, colour[h["family"]], quality, whiskers)
                    for h, p in reversed(list(zip(shown, points, strict=True))))
    for n, (x, y) in enumerate(corners, 1):
        body += f'<text class="num" x="{x + 8}" y="{max(y - 8, _TOP + 10)}">{n}</text>'
    by_colour: dict[int, list[str]] = {}
    for family, c in colour.items():
        by_colour.setdefault(c, []).append(family)
    legend = "".join(f'<span><i style="background:var(--c{c})"></i>{esc(f[0] if len(f) == 1 else "others")}</span>'
                     for c, f in sorted(by_colour.items()))
    listed = "".join(f"<li>{esc(shown[n]['name'])} <small class='soft'>{esc(figure_text(shown[n], quality))}, entropy "
                     f"{num(points[n][0])}</small></li>" for n in front)
    where = ", ".join(s["name"] for s in data["sources"] if s["diversity"])
    measured = "correctness where there is a verifier" if quality == "pass_rate" else "quality on all sources"
    note = (f"Up is better, right is more diverse. No heuristic beats those on the dashed line in both. "
            f"Diversity is measured across seeds on: {esc(where)}; {measured}.")
    return section("Quality against diversity", '<div class="two"><div>'
                   + _svg(body, "Scatter of quality against diversity by heuristic")
                   + f'<div class="legend">{legend}</div></div><div><h3>The front, from most diverse to best</h3>'
                   f"<ol>{listed}</ol></div></div>", note)


def _colours(rows: Sequence[Row]) -> dict[str, int]:
    """A colour per family of truncation; the rarest share the last one."""
    families = collections.Counter(h["family"] for h in rows)
    order = sorted(families, key=lambda f: (-families[f], f))
    return {f: min(n, _COLOURS - 1) for n, f in enumerate(order)}


def _dot(h: Row, axes: Axes, point: tuple[float, float], colour: int, quality: str, whiskers: bool) -> str:
    x, y = axes.px(point[0]), axes.py(point[1])
    _, low, high = figure(h, quality)
    error = ""
    if whiskers and low is not None and high is not None:
        error = (f'<line class="err" stroke="var(--c{colour})" x1="{x}" x2="{x}" y1="{axes.py(low)}" '
                 f'y2="{axes.py(high)}"/>')
    about = f"{h['name']}: {figure_text(h, quality)}, entropy {num(point[0])}"
    return (f'{error}<circle cx="{x}" cy="{y}" r="5" fill="var(--c{colour})" fill-opacity=".85">'
            f"<title>{esc(about)}</title></circle>")


def lengths(data: Row) -> str:
    """How long answers are and why they ended."""
    found = data["lengths"]
    if not found:
        return section("Completion lengths", '<p class="soft">No answers yet.</p>')
    width, bins = found["bin_width"], found["bins"]
    size = max(len(b) for b in bins.values())
    totals = [sum(b[n] for b in bins.values() if n < len(b)) for n in range(size)]
    axes = Axes([0, size * width], [0, max(totals)], pad=0.0)
    body = axes.frame("tokens", "answers")
    order = sorted(bins, key=lambda r: (r != "stop", r))
    for n in range(size):
        base = 0
        for c, reason in enumerate(order):
            if not (height := bins[reason][n]):
                continue
            x0, x1, y0, y1 = axes.px(n * width), axes.px((n + 1) * width), axes.py(base), axes.py(base + height)
            about = f"{n * width} to {(n + 1) * width - 1} tokens, {esc(reason)}: {count(height)}"
            body += (f'<rect x="{x0}" y="{y1}" width="{round(max(1.0, x1 - x0 - 1), 1)}" height="{round(y0 - y1, 1)}" '
                     f'fill="var(--c{c % _COLOURS})"><title>{about}</title></rect>')
            base += height
    reasons = data["requests"]["finish_reasons"]
    legend = "".join(f'<span><i style="background:var(--c{c % _COLOURS})"></i>{esc(r)}: {count(reasons.get(r))} '
                     f"({pct((reasons.get(r) or 0) / found['n'], 1)})</span>" for c, r in enumerate(order))
    note = (f"Median {count(found['median'])} tokens, mean {num(found['mean'], 1)}, nine in ten at most "
            f"{count(found['p90'])}; the limit is {count(data['max_new_tokens'])} (max_new_tokens), which "
            f"{count(data['verification']['at_max_new_tokens'])} answers reached: finish reason <code>length</code>.")
    return section("Completion lengths", _svg(body, "Histogram of completion lengths by finish reason")
                   + f'<div class="legend">{legend}</div>', note)
