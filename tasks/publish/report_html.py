"""The report as one HTML file that opens anywhere, offline: the answer first, then what it rests on."""

from __future__ import annotations

from typing import Any

from tasks.publish import report_boards as boards
from tasks.publish import report_counts as counts
from tasks.publish import report_sections as sections
from tasks.publish.report_judge import judge
from tasks.publish.report_parts import count, esc, headline, pct, short
from tasks.publish.report_style import CSS, JS
from tasks.publish.report_svg import lengths, tradeoff


def render_html(data: dict[str, Any]) -> str:
    """The whole page from what `gather` returned."""
    body = [
        _header(data), boards.leaderboard(data), boards.side_by_side(data), tradeoff(data), sections.grid(data),
        sections.correctness(data), boards.sources(data), judge(data), counts.funnel(data), lengths(data),
        counts.failures(data), sections.samples(data), sections.provenance(data),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(data['run'])}: report</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(body)}</main><script>{JS}</script></body></html>\n")


def _header(data: dict[str, Any]) -> str:
    verb = "scored" if data["reward_model"] else "judged"
    judged = f", {verb} by {esc(data['judge_model'])}" if data["judge_model"] else ""
    failed = data["failures"]["total"]
    tiles = [
        (count(len(data["heuristics"])), "heuristics"), (count(data["prompts"]), "prompts"),
        (count(data["seeds"]), "seeds" if data["seeds"] != 1 else "seed"),
        (short(data["requests"]["rows"]), "candidates"),
        (f"{count(failed)}", f"failed ({pct(data['failures']['share'], 1)})" if failed else "failed"),
        (short(data["requests"]["completion_tokens"]), "tokens written"),
    ]
    if data["funnel"]["checked"]:
        tiles.append((pct(data["funnel"]["correct"] / data["funnel"]["checked"]), "of checked answers right"))
    if data["funnel"]["kept"] is not None:
        tiles.append((count(data["funnel"]["kept"]), "rows kept"))
    found = "".join(f"<li>{esc(line)}</li>" for line in headline(data))
    return (f"<header><h1>{esc(data['run'])}: which sampling heuristics win, and at what cost in diversity</h1>"
            f'<p class="soft">{esc(data["model"])}{judged}; begun {esc(data["created"] or "at an unknown time")}</p>'
            f'<ul class="lead">{found}</ul><div class="tiles">'
            + "".join(f'<div class="tile"><b>{value}</b><span>{esc(label)}</span></div>' for value, label in tiles)
            + "</div></header>")
