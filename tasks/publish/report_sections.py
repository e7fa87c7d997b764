"""The report's sections, each from the gathered numbers to HTML. Every text of the user's is escaped."""

from __future__ import annotations

import collections
from typing import Any

from tasks.publish.report_parts import (
    DASH,
    MISSING,
    RANKED_BY,
    Row,
    count,
    esc,
    figure_text,
    halves,
    interval_bar,
    name_cell,
    num,
    pct,
    section,
    table,
)

_NO_CUT = "no truncation"
_NO_LABEL = f'<p class="soft">{MISSING}</p>'


# -- grid ------------------------------------------------------------------------------------------


def grid(data: Row) -> str:
    """Temperatures across, truncations down, the rating as colour; empty where there is no such grid."""
    metric = data["ranked_by"]
    cells: dict[tuple[str, float], Row] = {}
    for h in data["heuristics"]:
        first, *cuts = h["processors"] or [{"name": "", "params": {}}]
        if metric and h[metric] is not None and first["name"] == "temperature" and all(
                p["name"] != "temperature" for p in cuts):
            cut = " > ".join(f"{p['name']} {next(iter(p['params'].values())):g}" for p in cuts) or _NO_CUT
            cells[cut, h["temperature"]] = h
    # a heuristic beside the grid would bring an empty row and column of its own
    per_cut, per_heat = (collections.Counter(k[axis] for k in cells) for axis in (0, 1))
    cells = {k: h for k, h in cells.items() if per_cut[k[0]] > 1 and per_heat[k[1]] > 1}
    cuts, heats = sorted({c for c, _ in cells}, key=_cut_order), sorted({t for _, t in cells})
    if not metric or len(cuts) < 2 or len(heats) < 3 or len(cells) < 0.6 * len(cuts) * len(heats):
        return ""
    values = [h[metric] for h in cells.values()]
    middle = 0.0 if RANKED_BY[metric].signed else sum(values) / len(values)
    reach = max(abs(v - middle) for v in values) or 1.0
    head = "".join(f'<th scope="col">{t:g}</th>' for t in heats)
    rows = "".join(f'<tr><th class="l" scope="row">{esc(cut)}</th>' + "".join(
        _heat_cell(cells.get((cut, t)), metric, middle, reach) for t in heats) + "</tr>" for cut in cuts)
    note = (f"{RANKED_BY[metric].words.capitalize()} by temperature (across) and truncation (down): green is above "
            f"{'the average answer' if RANKED_BY[metric].signed else 'the mean'}, orange below.")
    body = f'<table class="heat"><thead><tr><th class="l"></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return section("Temperature and truncation", body, note)


def _cut_order(cut: str) -> tuple[bool, str, int, float]:
    """No truncation, then by processor, single ones first, by the parameter's value."""
    name, _, value = cut.rpartition(" ")
    return (True, name.split(" ")[0], cut.count(">"), float(value)) if cut != _NO_CUT else (False, "", 0, 0.0)


def _heat_cell(h: Row | None, metric: str, middle: float, reach: float) -> str:
    if h is None:
        return "<td></td>"
    value = h[metric] - middle
    colour = "--good" if value >= 0 else "--bad"
    strength = round(75 * abs(value) / reach)
    known = RANKED_BY[metric]
    text = pct(h[metric]) if known.share else num(h[metric], 1, known.signed)
    return (f'<td style="background:color-mix(in srgb,var({colour}) {strength}%,var(--card))" '
            f'title="{esc(h["name"])}: {esc(figure_text(h, metric))}">{text}</td>')


# -- correctness ---------------------------------------------------------------------------------


def correctness(data: Row) -> str:
    """Verifier pass rate by heuristic and by source."""
    rows = [h for h in data["heuristics"] if h["pass_rate"] is not None]
    if not rows:
        why = "" if "verifiers" in data["labels"] else _NO_LABEL
        return section("Correctness", why or '<p class="soft">No source has a verifier.</p>')
    rows.sort(key=lambda h: (-h["pass_rate"], h["place"]))
    quality = "rm_score" if data["reward_model"] else "rating"

    def cells(h: Row) -> list[tuple[Any, str]]:
        return [(h["name"], name_cell(h)), (h["pass_rate"], pct(h["pass_rate"])),
                (h["pass_rate"], interval_bar(h, "pass_rate", (0.0, 1.0))),
                (h["correct"], f"{count(h['correct'])} of {count(h['checked'])}"),
                (h[quality], num(h[quality], 2, True))]

    head = [("heuristic", "name l"), ("correct", ""), ("95 % interval", "bar"), ("answers", "wide"),
            ("reward" if quality == "rm_score" else "rating", "wide")]
    top, bottom = halves(rows)
    body = table(head, [cells(h) for h in top], sortable=not bottom)
    if bottom:
        gap = [(None, f"{len(rows) - len(top) - len(bottom)} more between")]
        body = table(head, [*map(cells, top), gap, *map(cells, bottom)]) + (
            f"<details><summary>All {len(rows)} heuristics, sortable</summary>"
            f"{table(head, [cells(h) for h in rows], sortable=True)}</details>")
    silent = sum(data["unverified"].values())
    why = ", ".join(f"{esc(k)} {count(n)}" for k, n in data["unverified"].items())
    f = data["funnel"]
    note = (f"Of {count(f['checked'])} answers that a verifier decided, {count(f['correct'])} are right. "
            "Wilson intervals, for as many independent answers as the prompts' spread shows."
            + (f" Without a verdict: {count(silent)} ({why})." if silent else ""))
    return section("Correctness", body, note)


# -- samples, provenance --------------------------------------------------------------------------


def samples(data: Row) -> str:
    """A few of the best rows to read, each with the lowest-rated answer to the same prompt."""
    if not data["samples"]:
        return section("Rows to read", '<p class="soft">Nothing is kept yet.</p>')
    out = []
    for s in data["samples"]:
        truth = f'<p class="note">Expected: {esc(s["ground_truth"])}</p>' if s["ground_truth"] else ""
        other = ""
        if s["worst"]:
            other = (f"<details><summary>The lowest-rated answer of the same group</summary>{_sampled(s['worst'])}"
                     f'<div class="text worst">{esc(s["worst"]["text"])}</div></details>')
        out.append(f'<div class="sample"><p class="soft">{esc(s["source"])}, seed {esc(s["seed"])}</p>'
                   f'<div class="text">{esc(s["prompt"])}</div>{truth}{_sampled(s)}'
                   f'<div class="text answer">{esc(s["text"])}</div>{other}</div>')
    return section("Rows to read", "".join(out), "Highest-scored kept rows, the sources in turn; long texts are cut.")


def _sampled(s: Row) -> str:
    reward = "" if s["reward"] is None else f", {'right' if s['reward'] >= 1 else 'wrong'} by the verifier"
    known = [(k, s[column]) for k, column in (("rating", "rating"), ("reward", "rm_score")) if s[column] is not None]
    rating = ", ".join(f"{k} {num(v, 2, True)}" for k, v in known) or "not rated"
    return f'<p class="note"><b>{esc(s["heuristic"])}</b>: {rating}{reward}</p>'


def provenance(data: Row) -> str:
    """Model, versions, how requests were sampled: what one needs to make the run again."""
    r = data["requests"]
    honoured = collections.Counter(r["seed_effective"])
    seeds = ("every answer" if set(honoured) == {"true"} else "no answer" if "true" not in honoured
             else f"{count(honoured['true'])} of {count(sum(honoured.values()))} answers")
    weights = ", ".join(f"{esc(k)} {v:g}" for k, v in data["weights"].items())
    lines = [
        ("model", f"{esc(data['model'])}, revision {esc(data['revision'] or 'not pinned')}"),
        ("config", f"<code>{esc(data['config_digest'])}</code>"), ("created", esc(data["created"] or DASH)),
        ("requests", f"{count(r['rows'])} planned, sent {count(r['attempts'])} times, {count(r['retries'])} retries"),
        ("seeds honoured", f"by the server for {seeds}"),
        ("dialects", ", ".join(f"{esc(k)} {count(n)}" for k, n in r["dialects"].items()) or DASH),
        ("score weights", weights), ("shards", count(data["shards"])),
        ("versions", ", ".join(f"{esc(k)} {esc(v)}" for k, v in data["versions"].items()) or DASH),
    ]
    return section("Provenance", "<dl>" + "".join(f"<dt>{esc(k)}</dt><dd>{v}</dd>" for k, v in lines) + "</dl>")
