"""The run's report: numbers, a page, a picture, a summary in markdown."""

from __future__ import annotations

from typing import Any

from tasks.publish.plots import plot_png
from tasks.publish.report_boards import half_width, sources_with
from tasks.publish.report_counts import defect_kinds, funnel_steps
from tasks.publish.report_data import gather
from tasks.publish.report_html import render_html
from tasks.publish.report_judge import how_rated, judge_lines, shrinkage_note
from tasks.publish.report_parts import (
    DASH,
    RANKED_BY,
    count,
    escape,
    figure_text,
    headline,
    markdown_table,
    mean_text,
    num,
    pct,
)

__all__ = ["best_by_source", "gather", "markdown", "plot_png", "render_html"]

_TOP = 5


def markdown(data: dict[str, Any]) -> str:
    """A short summary: what was found, key figures, the best heuristics, the funnel."""
    lines = [f"# {escape(data['run'])}", "", *(f"- {escape(line)}" for line in headline(data)), ""]
    figures = [("model", data["model"]), ("prompts", count(data["prompts"])),
               ("heuristics x seeds", f"{count(len(data['heuristics']))} x {count(data['seeds'])}"),
               ("candidates", count(data["requests"]["rows"])),
               ("failed", f"{count(data['failures']['total'])} ({pct(data['failures']['share'], 2)})"),
               ("sent", f"{count(data['requests']['attempts'])} requests, {count(data['requests']['retries'])} again"),
               ("tokens written", count(data["requests"]["completion_tokens"])),
               ("answers at max_new_tokens", count(data["verification"]["at_max_new_tokens"]))]
    if kinds := defect_kinds(data):
        figures.insert(5, ("found by verification", ", ".join(
            f"{k} {count(found)}" + (f" ({count(left)} left)" if left < found else "") for k, found, left in kinds)))
    if data["dataset"]:
        figures.append(("dataset", ", ".join(f"{count(n)} {split}" for split, n in data["dataset"].items())))
    lines += [*markdown_table(("figure", "value"), figures), ""]
    lines += [*_best(data), *best_by_source(data, _TOP), *_judged(data)]
    steps = " \u2192 ".join(f"{name} {count(n)}" for name, n in funnel_steps(data))
    lines += ["## From plan to dataset", "", steps, ""]
    if data["drops"]:
        lines += ["Not kept: " + ", ".join(f"{escape(k)} {count(n)}" for k, n in data["drops"].items()) + ".", ""]
    return "\n".join(lines)


def _best(data: dict[str, Any]) -> list[str]:
    metric, rows = data["ranked_by"], data["heuristics"][:_TOP]
    if not metric or not rows:
        return []
    head = ("#", "heuristic", f"{RANKED_BY[metric].words} (95 % interval)", "entropy", "correct", "kept")
    table = [(h["place"], h["name"], figure_text(h, metric), num(h["embedding_entropy"]), pct(h["pass_rate"]),
              count(h["kept"])) for h in rows]
    note = [escape(shrinkage_note(data)), ""] if shrinkage_note(data) else []
    return [f"## Best {len(rows)} heuristics", "", *markdown_table(head, table), "", *note]


def best_by_source(data: dict[str, Any], most: int) -> list[str]:
    """The best heuristics with their means on each source, as markdown; nothing where there are not two sources."""
    metric, names = data["ranked_by"], sources_with(data, data["ranked_by"])
    if not metric or len(names) < 2:
        return []

    def cell(row: dict[str, Any] | None) -> str:
        if not row or row[metric] is None:
            return DASH
        return f"{mean_text(row[metric], metric)} {half_width(row, metric)}".strip()

    rows = [h for h in data["heuristics"][:most] if h[metric] is not None]
    table = [(h["name"], cell(h), *(cell(h["sources"].get(n)) for n in names)) for h in rows]
    return [f"## {RANKED_BY[metric].words.capitalize()} by source", "",
            *markdown_table(("heuristic", "all", *names), table), "",
            "95 % intervals, a prompt as one observation; none where there was one prompt only.", ""]


def _judged(data: dict[str, Any]) -> list[str]:
    if not (lines := judge_lines(data)):
        return []
    title = "The reward model" if data["reward_model"] else "The judge"
    return [f"## {title}", "", *markdown_table(("figure", "value"), lines), "", escape(" ".join(how_rated(data))), ""]
