"""The run's report: numbers, a page, a picture, a summary in markdown."""

from __future__ import annotations

from typing import Any

from tasks.publish.plots import plot_png
from tasks.publish.report_counts import defect_kinds, funnel_steps
from tasks.publish.report_data import gather
from tasks.publish.report_html import render_html
from tasks.publish.report_parts import RANKED_BY, count, escape, figure_text, headline, markdown_table, num, pct

__all__ = ["gather", "markdown", "plot_png", "render_html"]

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
    if judge := data["judge"]:
        figures += [("judge", judge["model"]), ("judgements", f"{count(judge['calls'])}, {count(judge['abstained'])} "
                                                f"comparisons abstained, {pct(judge['flip_rate'])} order flips")]
    if data["dataset"]:
        figures.append(("dataset", ", ".join(f"{count(n)} {split}" for split, n in data["dataset"].items())))
    lines += [*markdown_table(("figure", "value"), figures), ""]
    lines += _best(data)
    steps = " \u2192 ".join(f"{name} {count(n)}" for name, n in funnel_steps(data))
    lines += ["## From plan to dataset", "", steps, ""]
    if data["drops"]:
        lines += ["Not kept: " + ", ".join(f"{escape(k)} {count(n)}" for k, n in data["drops"].items()) + ".", ""]
    return "\n".join(lines)


def _best(data: dict[str, Any]) -> list[str]:
    metric, rows = data["ranked_by"], data["heuristics"][:_TOP]
    if not metric or not rows:
        return []
    head = ("#", "heuristic", f"{RANKED_BY[metric][0]} (95 % interval)", "entropy", "correct", "kept")
    table = [(h["place"], h["name"], figure_text(h, metric), num(h["embedding_entropy"]), pct(h["pass_rate"]),
              count(h["kept"])) for h in rows]
    return [f"## Best {len(rows)} heuristics", "", *markdown_table(head, table), ""]
