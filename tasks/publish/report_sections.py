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
    interval_bar,
    limits,
    num,
    pct,
    section,
    table,
)

_SHOWN = 20
_NO_CUT = "no truncation"
_NO_LABEL = f'<p class="soft">{MISSING}</p>'


def _name(h: Row) -> str:
    """The name, and the processors where the name does not say them in its own order."""
    said = sorted(h["name"].replace(",", " ").split()) == sorted(h["description"].replace(" > ", " ").split())
    return esc(h["name"]) + ("" if said else f"<small>{esc(h['description'])}</small>")


def _halves(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The first and last rows of a list that is too long to show; all and none of one that is not."""
    return (rows, []) if len(rows) <= 2 * _SHOWN else (rows[:_SHOWN], rows[-_SHOWN:])


# -- leaderboard ---------------------------------------------------------------------------------


def leaderboard(data: Row) -> str:
    """Every heuristic, best first, with its interval."""
    metric, rows = data["ranked_by"], data["heuristics"]
    if not rows:
        return section("Leaderboard", '<p class="soft">No candidates yet.</p>')
    if not metric:
        return section("Leaderboard", _NO_LABEL + ranking(rows, None, sortable=True))
    top, bottom = _halves(rows)
    if not bottom:
        body = ranking(top, metric, sortable=True)
    else:
        gap = f"{len(rows) - 2 * _SHOWN} more between, in the full list below"
        body = ranking(top, metric, bottom=bottom, gap=gap) + (
            f"<details><summary>All {len(rows)} heuristics, sortable</summary>"
            f"{ranking(rows, metric, sortable=True)}</details>")
    words = {
        "rating": "Rating: mean Bradley-Terry strength in logits over all (prompt, seed) groups; 0 is the average "
                  "answer of a group, +1 beats it with a chance of 73 %.",
        "pass_rate": "Quality is not labelled, so the share of answers that the verifier found right decides.",
        "embedding_entropy": "Neither quality nor correctness is labelled, so diversity decides the order.",
    }[metric]
    note = (f"{words} Lines are 95 % intervals that treat each prompt as one observation, however many seeds it has. "
            "The top of a long list owes part of its lead to luck.")
    return section("Leaderboard", body, note)


def ranking(rows: list[Row], metric: str | None, *, bottom: list[Row] | None = None, gap: str = "",
            sortable: bool = False) -> str:
    """A table of heuristics; `gap` stands between `rows` and `bottom`."""
    head = [("#", "wide"), ("heuristic", "name l")]
    if metric:
        head += [(RANKED_BY[metric][0], ""), ("95 % interval", "bar")]
    head += [("entropy", ""), ("self-BLEU", "wide"), ("correct", "wide"), ("kept", "wide"), ("tokens", "wide"),
             ("failed", "wide")]
    span = limits([*rows, *(bottom or [])], metric) if metric else (0.0, 1.0)

    def cells(h: Row) -> list[tuple[Any, str]]:
        out: list[tuple[Any, str]] = [(h["place"], str(h["place"])), (h["name"], _name(h))]
        if metric:
            text = pct(h[metric]) if metric == "pass_rate" else num(h[metric], 2, metric == "rating")
            out += [(h[metric], text), (h[metric], interval_bar(h, metric, span))]
        return [*out, (h["embedding_entropy"], num(h["embedding_entropy"])), (h["self_bleu"], num(h["self_bleu"], 1)),
                (h["pass_rate"], pct(h["pass_rate"])), (h["kept"], count(h["kept"])),
                (h["mean_tokens"], num(h["mean_tokens"], 0)), (h["failed"], count(h["failed"]))]

    body = [cells(h) for h in rows]
    if bottom:
        body += [[(None, esc(gap))], *(cells(h) for h in bottom)]
    return table(head, body, sortable)


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
    middle = 0.0 if metric == "rating" else sum(values) / len(values)
    reach = max(abs(v - middle) for v in values) or 1.0
    head = "".join(f'<th scope="col">{t:g}</th>' for t in heats)
    rows = "".join(f'<tr><th class="l" scope="row">{esc(cut)}</th>' + "".join(
        _heat_cell(cells.get((cut, t)), metric, middle, reach) for t in heats) + "</tr>" for cut in cuts)
    note = (f"{RANKED_BY[metric][0].capitalize()} by temperature (across) and truncation (down): green is above "
            f"{'the average answer' if metric == 'rating' else 'the mean'}, orange below.")
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
    text = pct(h[metric]) if metric == "pass_rate" else num(h[metric], 1, metric == "rating")
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

    def cells(h: Row) -> list[tuple[Any, str]]:
        return [(h["name"], _name(h)), (h["pass_rate"], pct(h["pass_rate"])),
                (h["pass_rate"], interval_bar(h, "pass_rate", (0.0, 1.0))),
                (h["correct"], f"{count(h['correct'])} of {count(h['checked'])}"),
                (h["rating"], num(h["rating"], 2, True))]

    head = [("heuristic", "name l"), ("correct", ""), ("95 % interval", "bar"), ("answers", "wide"), ("rating", "wide")]
    top, bottom = _halves(rows)
    body = table(head, [cells(h) for h in top], sortable=not bottom)
    if bottom:
        gap = [(None, f"{len(rows) - 2 * _SHOWN} more between")]
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


# -- judge, sources, samples ---------------------------------------------------------------------


def judge(data: Row) -> str:
    """What the comparisons say of the judge itself."""
    j = data["judge"]
    if not j:
        return section("The judge", _NO_LABEL)
    first = j["first_shown"]
    bias = "" if first is None else (
        "no preference for a place" if abs(first - 0.5) < 0.02 else
        f"a preference for the answer shown {'first' if first > 0.5 else 'second'}; both orders are asked and averaged")
    lines = [
        ("judge", f"{esc(j['model'])}, template {esc(j['template'])}"),
        ("comparisons", f"{count(j['comparisons'])}, {count(j['calls'])} judgements"),
        ("abstained", f"{count(j['abstained'])}" + "".join(f"; {esc(k)} {count(n)}" for k, n in j["reasons"].items())),
        ("order flips", f"{pct(j['flip_rate'], 1)} of pairs: the winner changed when the two answers changed places "
                        "(0 % is a judge that ignores order, 50 % a coin)"),
        ("first shown", f"wins with {pct(first, 1)} on average: {bias}" if first is not None else DASH),
        ("decisiveness", f"{num(j['decisiveness'])} (0 always undecided, 1 always certain)"),
        ("outside the verdicts", f"{pct(j['outside'], 1)} of the probability is on tokens that are no verdict"),
        ("mean error of one rating", f"{num(j['mean_rating_se'])} logits"),
    ]
    if agreed := j["verifier"]:
        share = f"{pct(agreed['agrees'])} ({pct(agreed['low'])} to {pct(agreed['high'])})"
        lines.append(("agrees with the verifier", f"{share} of {count(agreed['pairs'])} pairs with one right and "
                      "one wrong answer (50 % is a coin)"))
    return section("The judge", "<dl>" + "".join(f"<dt>{esc(k)}</dt><dd>{v}</dd>" for k, v in lines) + "</dl>")


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
            places = [h | {"place": n} for n, h in enumerate(own[:_SHOWN], 1)]
            boards.append(f"<details><summary>{esc(s['name'])}: the best {len(places)}</summary>"
                          f"{ranking(places, metric, sortable=True)}</details>")
    head = [("source", "l"), ("prompts", ""), ("usable", "wide"), ("correct", "wide"), ("entropy", "wide"),
            ("kept", ""), ("best heuristic", "l")]
    return section("By source", table(head, rows) + "".join(boards))


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
    rating = "not rated" if s["rating"] is None else f"rating {num(s['rating'], 2, True)}"
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
