"""The report's leaderboards: of all sources, side by side for each source, and source by source."""

from __future__ import annotations

from typing import Any

from tasks.publish.report_judge import shrinkage_note
from tasks.publish.report_parts import (
    DASH,
    MISSING,
    RANKED_BY,
    Row,
    count,
    esc,
    figure,
    figure_text,
    halves,
    interval_bar,
    limits,
    mean_text,
    name_cell,
    num,
    pct,
    section,
    table,
)

_BEST = 20
_WORDS = {
    "rating": "Rating: mean Bradley-Terry strength in logits over all (prompt, seed) groups; 0 is the average text "
              "of a group, +1 beats it with a chance of 73 %.",
    "rm_score": "Reward: a raw score has its prompt's own level, so what counts is how far an answer's score lies "
                "above or below the mean of its (prompt, seed) group, in the reward model's own units; here is the "
                "mean of that.",
    "pass_rate": "No answer has a label of quality, so the share that the verifier found right decides.",
    "embedding_entropy": "No answer has a label of quality or correctness, so diversity decides the order.",
}
_INTERVALS = ("Intervals (95 %) are about the mean over more prompts like these, labelled in the same way: a prompt is "
              "one observation, however many seeds it has;")
_FEW = {"rating": "one prompt has no interval, two have a wide one, and none is narrower than the ratings' own "
                  "standard errors allow.",
        "pass_rate": "few prompts have a wide one, however many answers there are."}
_FEW_ELSE = "one prompt has no interval, two have a wide one."
_MEET = ("Heuristics whose intervals do not meet differ, whatever one label has to do with another; those that meet "
         "may differ too.")
_LUCK = "The top of a long list owes part of its lead to luck."


def leaderboard(data: Row) -> str:
    """Every heuristic, best first, with its interval; then each source beside the others."""
    metric, rows = data["ranked_by"], data["heuristics"]
    if not rows:
        return section("Leaderboard", '<p class="soft">No candidates yet.</p>')
    if not metric:
        return section("Leaderboard", f'<p class="soft">{MISSING}</p>' + ranking(rows, None, sortable=True))
    top, bottom = halves(rows)
    if not bottom:
        body = ranking(top, metric, sortable=True)
    else:
        gap = f"{len(rows) - len(top) - len(bottom)} more between, in the full list below"
        body = ranking(top, metric, bottom=bottom, gap=gap) + (
            f"<details><summary>All {len(rows)} heuristics, sortable</summary>"
            f"{ranking(rows, metric, sortable=True)}</details>")
    note = " ".join(filter(None, (_WORDS[metric], shrinkage_note(data), _INTERVALS, _FEW.get(metric, _FEW_ELSE),
                                  _MEET, _LUCK)))
    return section("Leaderboard", body, esc(note))


def ranking(rows: list[Row], metric: str | None, *, bottom: list[Row] | None = None, gap: str = "",
            sortable: bool = False) -> str:
    """A table of heuristics; `gap` stands between `rows` and `bottom`."""
    head = [("#", "wide"), ("heuristic", "name l")]
    if metric:
        head += [(RANKED_BY[metric].words, ""), ("95 % interval", "bar")]
    head += [("entropy", ""), ("self-BLEU", "wide"), ("correct", "wide"), ("kept", "wide"), ("tokens", "wide"),
             ("failed", "wide")]
    span = limits([*rows, *(bottom or [])], metric) if metric else (0.0, 1.0)

    def cells(h: Row) -> list[tuple[Any, str]]:
        out: list[tuple[Any, str]] = [(h["place"], str(h["place"])), (h["name"], name_cell(h))]
        if metric:
            out += [(h[metric], mean_text(h[metric], metric)), (h[metric], interval_bar(h, metric, span))]
        return [*out, (h["embedding_entropy"], num(h["embedding_entropy"])), (h["self_bleu"], num(h["self_bleu"], 1)),
                (h["pass_rate"], pct(h["pass_rate"])), (h["kept"], count(h["kept"])),
                (h["mean_tokens"], num(h["mean_tokens"], 0)), (h["failed"], count(h["failed"]))]

    body = [cells(h) for h in rows]
    if bottom:
        body += [[(None, esc(gap))], *(cells(h) for h in bottom)]
    return table(head, body, sortable)


# -- side by side --------------------------------------------------------------------------------


def sources_with(data: Row, metric: str | None) -> list[str]:
    """The sources, as configured, on which the metric is known."""
    return [s["name"] for s in data["sources"] if metric and any(
        (h["sources"].get(s["name"]) or {}).get(metric) is not None for h in data["heuristics"])]


def half_width(row: Row, metric: str) -> str:
    """`±0.30`, `55 to 77 %` where the interval is not even, empty where there is none."""
    mean, low, high = figure(row, metric)
    if mean is None or low is None or high is None:
        return ""
    return f"{100 * low:.0f} to {pct(high)}" if RANKED_BY[metric].share else f"\u00b1{num(high - mean)}"


def side_by_side(data: Row) -> str:
    """Heuristics down, sources across, each mean with its interval; empty where there are not two sources."""
    metric, names = data["ranked_by"], sources_with(data, data["ranked_by"])
    if not metric or len(names) < 2:
        return ""
    rows = [h for h in data["heuristics"] if h[metric] is not None]
    middle = _middle(rows, metric)
    values = sorted(abs(v - middle) for h in rows for v in _means(h, names, metric))
    reach = values[int(0.95 * (len(values) - 1))] or 1.0  # a source with one prompt would fade all others
    top, bottom = halves(rows)

    def board(shown: list[Row], last: list[Row], sortable: bool) -> str:
        between = f"{len(rows) - len(shown) - len(last)} more between, in the full list below"
        gap = [[(None, esc(between))]] if last else []
        head = [("heuristic", "name l"), ("all", "cell"), *((name, "cell") for name in names)]
        lines = [_line(h, names, metric, middle, reach) for h in [*shown, *last]]
        return f'<div class="scroll">{table(head, [*lines[:len(shown)], *gap, *lines[len(shown):]], sortable)}</div>'

    body = board(top, bottom, sortable=not bottom)
    if bottom:
        body += f"<details><summary>All {len(rows)} heuristics, sortable</summary>{board(rows, [], True)}</details>"
    what = "its 95 % interval" if RANKED_BY[metric].share else "half its 95 % interval (\u00b1)"
    words = RANKED_BY[metric].words.capitalize()
    note = (f"{words} on each source and {what}, prompts as the observations; where that is missing there was "
            f"one prompt, or nothing that varied. Of {count(len(values))} intervals about one in twenty misses: a "
            "surprising cell wants a second look.")
    return section("Leaderboard by source", body, esc(note))


def _middle(rows: list[Row], metric: str) -> float:
    return 0.0 if RANKED_BY[metric].signed else sum(h[metric] for h in rows) / len(rows)


def _means(h: Row, names: list[str], metric: str) -> list[float]:
    found = [h[metric], *((h["sources"].get(n) or {}).get(metric) for n in names)]
    return [v for v in found if v is not None]


def _line(h: Row, names: list[str], metric: str, middle: float, reach: float) -> list[tuple[Any, str]]:
    out: list[tuple[Any, str]] = [(h["name"], f'<small class="soft">{h["place"]}</small> {name_cell(h)}')]
    for row in (h, *(h["sources"].get(n) for n in names)):
        if not row or row[metric] is None:
            out.append((None, DASH))
            continue
        lead = row[metric] - middle
        strength = round(45 * min(1.0, abs(lead) / reach))
        out.append((row[metric], f'<div class="{"up" if lead >= 0 else "dn"}" style="--v:{strength}%">'
                                 f"{mean_text(row[metric], metric)}<small>{half_width(row, metric)}</small></div>"))
    return out


# -- source by source ----------------------------------------------------------------------------


def sources(data: Row) -> str:
    """What came of each source, and its own leaderboard."""
    metric, rows, boards = data["ranked_by"], [], []
    for s in data["sources"]:
        f = s["figures"]
        own = [h | h["sources"][s["name"]] for h in data["heuristics"] if s["name"] in h["sources"]]
        own = sorted((h for h in own if metric and h[metric] is not None), key=lambda h: -h[metric])
        best = f"{esc(own[0]['name'])} <small class='soft'>{esc(figure_text(own[0], metric))}</small>" if own else DASH
        left_out = f" <small class='soft'>{count(s['malformed'])} malformed left out</small>" if s["malformed"] else ""
        rows.append([(s["name"], esc(s["name"])), (s["prompts"], count(s["prompts"]) + left_out),
                     (None, count(f["usable"]) if f else DASH), (None, pct(f["pass_rate"]) if f else DASH),
                     (None, num(f["embedding_entropy"]) if f else DASH), (None, count(f["kept"]) if f else DASH),
                     (None, best)])
        if own:
            places = [h | {"place": n} for n, h in enumerate(own[:_BEST], 1)]
            boards.append(f"<details><summary>{esc(s['name'])}: the best {len(places)}</summary>"
                          f"{ranking(places, metric, sortable=True)}</details>")
    head = [("source", "l"), ("prompts", ""), ("usable", "wide"), ("correct", "wide"), ("entropy", "wide"),
            ("kept", ""), ("best heuristic", "l")]
    return section("By source", table(head, rows) + "".join(boards))
