"""Small parts of the report: numbers as text, bars, tables, what the numbers say in words."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
MISSING = '<span class="none">not labelled</span>'
DASH = "\u2013"
MINUS = "\u2212"
_SHOWN = 20


class Metric(NamedTuple):
    """What heuristics can be ranked by: its words, the prefix of its interval's keys, its axis, how to print it."""

    words: str
    prefix: str
    axis: str
    signed: bool = False
    share: bool = False


RANKED_BY = {
    "rating": Metric("mean rating", "rating", "mean rating (logits); 0 is the average of a group", signed=True),
    "rm_score": Metric("mean lead in reward", "rm_score", "reward above the group's mean", signed=True),
    "pass_rate": Metric("verifier pass rate", "pass", "share of right answers", share=True),
    "embedding_entropy": Metric("embedding entropy", "embedding_entropy", "embedding entropy (nats)"),
}


def esc(value: Any) -> str:
    """Any value as HTML text; quotes are escaped too, so that it may stand in an attribute."""
    return html.escape(str(value))


def num(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """`1.25`, `+1.25` if signed; a dash for None."""
    if value is None:
        return DASH
    value = round(value, digits) + 0.0  # no -0.0
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return text.replace("-", MINUS)


def count(value: int | None) -> str:
    """`12,345`; a dash for None."""
    return DASH if value is None else f"{value:,}"


def pct(share: float | None, digits: int = 0) -> str:
    """`12 %`, its space unbreakable; a dash for None."""
    return DASH if share is None else f"{100 * share:.{digits}f}\u00a0%"


def short(value: int | None) -> str:
    """`950`, `12.3 k`, `4.5 M`."""
    if value is None:
        return DASH
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{value:,}"


def figure(row: Row, metric: str) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high) of a metric in RANKED_BY."""
    prefix = RANKED_BY[metric].prefix
    return row[metric], row[f"{prefix}_low"], row[f"{prefix}_high"]


def mean_text(mean: float | None, metric: str) -> str:
    """A metric's mean alone: `+0.91`, a pass rate in per cent."""
    return pct(mean) if RANKED_BY[metric].share else num(mean, 2, RANKED_BY[metric].signed)


def figure_text(row: Row, metric: str, label: str = "") -> str:
    """`+0.91 (+0.55 to +1.26)`, a pass rate in per cent; `label` stands before the interval."""
    mean, low, high = figure(row, metric)
    share, signed = RANKED_BY[metric].share, RANKED_BY[metric].signed
    digits, scale, unit = (0, 100, "\u00a0%") if share else (2, 1, "")
    if mean is None:
        return DASH
    text = num(scale * mean, digits, signed) + unit
    if low is None or high is None:
        return text
    return f"{text} ({label}{num(scale * low, digits, signed)} to {num(scale * high, digits, signed)}{unit})"


def escape(value: Any) -> str:
    """A text on one line that markdown and HTML show as it is."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\|`*[":
        line = line.replace(mark, f"\\{mark}")
    return line


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a markdown table; every cell is escaped."""
    lines = ["| " + " | ".join(map(escape, cells)) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def limits(rows: Iterable[Row], metric: str) -> tuple[float, float]:
    """The range that bars of a metric span: 0 to 1 for shares, else all intervals and 0."""
    if RANKED_BY[metric].share:
        return 0.0, 1.0
    values = [0.0, *(v for row in rows for v in figure(row, metric) if v is not None)]
    # one heuristic seen on two prompts may have a huge interval; the bars are for the means
    means = [row[metric] for row in rows if row[metric] is not None] or [0.0]
    reach = max(abs(m) for m in means) * 2.5 or 1.0
    return max(min(values), -reach), min(max(values), reach)


def interval_bar(row: Row, metric: str, span: tuple[float, float]) -> str:
    """A dot on a line, its 95 % interval and zero, as HTML that scales with its cell."""
    mean, low, high = figure(row, metric)
    if mean is None:
        return ""

    def at(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - span[0]) / ((span[1] - span[0]) or 1.0))), 2)

    zero = f'<u style="left:{at(0.0)}%"></u>' if span[0] < 0 else ""
    line = "" if low is None or high is None else (
        f'<i style="left:{at(low)}%;width:{round(at(high) - at(low), 2)}%"></i>')
    return f'<div class="iv" title="{esc(figure_text(row, metric))}">{zero}{line}<b style="left:{at(mean)}%"></b></div>'


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[tuple[Any, str]]], sortable: bool = False) -> str:
    """A table. `head`: (label, class); `rows`: (sort value, inner HTML) per cell, or one cell across."""
    cells = "".join(f'<th class="{cls}" scope="col">{esc(label)}</th>' for label, cls in head)
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(f'<tr class="gap"><td colspan="{len(head)}">{row[0][1]}</td></tr>')
            continue
        body.append("<tr>" + "".join(
            f'<td class="{cls}" data-v="{"" if value is None else esc(value)}">{inner}</td>'
            for (_, cls), (value, inner) in zip(head, row, strict=True)) + "</tr>")
    kind = ' class="sortable"' if sortable else ""
    return f"<table{kind}><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def name_cell(h: Row) -> str:
    """A heuristic's name, and its processors where the name does not say them in its own order."""
    said = sorted(h["name"].replace(",", " ").split()) == sorted(h["description"].replace(" > ", " ").split())
    return esc(h["name"]) + ("" if said else f"<small>{esc(h['description'])}</small>")


def halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The first and last rows of a list that is too long to show; all and none of one that is not."""
    return (rows, []) if len(rows) <= 2 * _SHOWN else (rows[:_SHOWN], rows[-_SHOWN:])


def section(title: str, body: str, note: str = "") -> str:
    """One box of the page."""
    about = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{esc(title)}</h2>{about}{body}</section>"


def counts_table(title: str, counts: dict[str, int], total: int | None = None) -> str:
    """A two- or three-column table of counts, the largest first."""
    share = [] if not total else [("share", "")]
    rows = [[(k, esc(k)), (n, count(n)), *([(n, pct(n / total, 1))] if total else [])]
            for k, n in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))]
    return table([(title, "l"), ("count", ""), *share], rows)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def diversity_of(data: Row) -> str | None:
    """The diversity measure that plots show."""
    labelled = any(h["embedding_entropy"] is not None for h in data["heuristics"])
    return "embedding_entropy" if labelled else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point equals or beats in both coordinates, by falling first one.

    Of equal points the first is on the front.
    """
    order = sorted(range(len(points)), key=lambda n: (-points[n][0], -points[n][1], n))
    front: list[int] = []
    best = -math.inf
    for n in order:
        if points[n][1] > best:
            best = points[n][1]
            front.append(n)
    return front


def tied(data: Row) -> list[Row]:
    """Heuristics whose interval reaches the winner's, the winner left out."""
    metric, rows = data["ranked_by"], data["heuristics"]
    if not metric or not rows:
        return []
    low = figure(rows[0], metric)[1]
    return [h for h in rows[1:] if h[metric] is not None
            and (low is None or (high := figure(h, metric)[2]) is None or high >= low)]


def headline(data: Row) -> list[str]:
    """What the run found, in a few plain sentences (text, not HTML)."""
    metric, rows = data["ranked_by"], data["heuristics"]
    partial = [] if data["shards_verified"] == data["shards"] else [
        f"The run is not complete: {data['shards_verified']} of {data['shards']} shards are verified, and all that "
        "follows is about those."]
    if not metric:
        return [*partial, "Nothing is labelled yet: the report has counts, lengths and failures only."]
    best, others = rows[0], len(tied(data))
    rated = sum(h[metric] is not None for h in rows) - 1
    lead = figure_text(best, metric, "95 % interval: ")
    out = [*partial, f"{best['name']} has the highest {RANKED_BY[metric].words}, {lead}."]
    if rated > 0:
        out[-1] += (f" {others} of the other {rated} can't be told apart from it (their intervals reach its own)."
                   if others else " Its interval lies above that of every other.")
    if RANKED_BY[metric].signed and diversity_of(data):
        out.append(_cost(best, rows, metric))
    if metric != "pass_rate" and (checked := [h for h in rows if h["pass_rate"] is not None]):
        right = max(checked, key=lambda h: (h["pass_rate"], -h["place"]))
        own = "" if best["pass_rate"] is None or best is right else (
            f"; {best['name']} has {figure_text(best, 'pass_rate')}")
        out.append(f"Most often correct: {right['name']} with {figure_text(right, 'pass_rate')}{own}.")
    judge = data["judge"]
    if judge and (judge["flip_rate"] or 0) > 0.3:
        out.append(f"Read ratings with care: in {pct(judge['flip_rate'])} of the pairs the judge's verdict changed "
                   "with the order that the answers were shown in.")
    return out


def _cost(best: Row, rows: list[Row], metric: str) -> str:
    """What the winner costs in diversity."""
    known = [h for h in rows if h["embedding_entropy"] is not None]
    most = max(known, key=lambda h: h["embedding_entropy"])
    if best is most:
        return f"It is also the most diverse (embedding entropy {num(best['embedding_entropy'])} nats)."
    own = best["embedding_entropy"]
    cost = "Its own diversity is not labelled" if own is None else (
        f"Its embedding entropy is {num(own)} nats, {pct(own / most['embedding_entropy'])} of the most diverse one's"
        if most["embedding_entropy"] > 0 else "All answers are alike")
    return (f"{cost}: {most['name']} has {num(most['embedding_entropy'])} nats at a "
            f"{RANKED_BY[metric].words} of {num(most[metric], 2, True)}.")
