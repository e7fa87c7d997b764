"""What the report and the card say of how quality was labelled: in words, as figures, as a section of the page."""

from __future__ import annotations

from tasks.publish.report_parts import DASH, MISSING, Row, count, esc, num, pct, section, table

_ALL = "all"


def how_rated(data: Row) -> list[str]:
    """How ratings (or scores) came about, as the run was configured: sentences of plain text."""
    q = data["quality"]
    if not q:
        return []
    who = f"{q['model']}{' at ' + q['revision'] if q['revision'] else ''} ({_whose(data)})"
    if q["method"] == "pointwise":
        return [f"{who} scored each answer by itself (method pointwise); a score is the model's scalar as its server "
                "gave it. It has the prompt's own level: compare answers to one prompt only."]
    after = f"{q['rounds']} rounds" if q["rounds"] else f"ceil(log2(players)) + {q['extra_rounds']} rounds"
    if q["schedule"] == "top_k":
        after = f"as many comparisons as {after} have" if q["rounds"] else (
            f"two fifths of the comparisons of {after} (small groups: players + {2 * q['top']}, if that is more)")
    if q["schedule"] == "top_k":
        plays = f"The tournament spends its comparisons on who is among the best {q['top']} (schedule top_k)"
        until = (f"{pct(q['confidence'], _digits(q['confidence']))} of the best named were expected to be of the true "
                 "best")
    else:
        plays = "The tournament ranks everyone in Swiss rounds (schedule ranking)"
        until = (f"its ratings explained {pct(q['reliability'], _digits(q['reliability']))} of the variance of the "
                 "true ones")
    ends = f"it ended once {until}, at the latest after {after}" if q["stop"] == "settled" else f"it took {after}"
    prior = "estimated for each group from its own comparisons (auto)" if q["prior_sd"] == "auto" else (
        f"given as {q['prior_sd']:g} logits")
    fitted = f"the posterior mode under a normal prior whose standard deviation is {prior}"
    if q["solver"] == "choix":
        fitted = f"the maximum of the likelihood (solver choix), or of a group that has none {fitted}"
    return [
        f"{who} compared pairs of answers to the same prompt and seed (template {q['template']}), each pair in both "
        "orders; a verdict is a probability, and equal texts are one player.",
        f"{plays}; {ends}.",
        "A rating is the Bradley-Terry strength in logits, mean 0 over the distinct texts of its (prompt, seed): "
        f"{fitted}; each comparison has the weight 1 / dispersion.",
    ]


def _whose(data: Row) -> str:
    q = data["quality"]
    if q["judged_itself"]:
        return "the model that wrote the answers: it judged itself"
    return "the model that wrote the answers, at another revision" if q["model"] == data["model"] else (
        "another model than the one that wrote the answers")


def _digits(share: float) -> int:
    """Decimals that a share in per cent needs: 95 %, 99.5 %."""
    return 0 if round(100 * share, 6) == round(100 * share) else 1


def shrinkage_note(data: Row) -> str:
    """What a reader of ratings must know of the schedule; empty where there is nothing."""
    q, spent = data["quality"], data["judge"]["comparisons_per_candidate"] if data["judge"] else None
    if data["ranked_by"] != "rating" or q["schedule"] != "top_k" or not spent or spent["least"] == spent["most"]:
        return ""
    return ("Losers are compared less (schedule top_k), so the prior draws their ratings towards 0: distances in the "
            "lower part of the list are understated.")


def judge_lines(data: Row) -> list[tuple[str, str]]:
    """(label, figure) of all that was measured of the judge or the reward model: plain text."""
    return _reward_lines(data) if data["reward_model"] else _judge_lines(data) if data["judge"] else []


def _judge_lines(data: Row) -> list[tuple[str, str]]:
    q, j, groups = data["quality"], data["judge"], data["judge"]["groups"]
    first = j["first_shown"]
    bias = "" if first is None else (
        "no preference for a place" if abs(first - 0.5) < 0.02 else
        f"a preference for the answer shown {'first' if first > 0.5 else 'second'}; both orders are asked, and in the "
        "mean of their log-odds it cancels")
    spent = j["comparisons_per_candidate"]
    lines = [
        ("judge", f"{q['model']}, template {q['template']}; {_whose(data)}"),
        ("comparisons", f"{count(j['comparisons'])} pairs" + (
            f"; comparisons that a rated candidate was in: {_spread(spent, 1)}" if spent else "")),
        ("judge calls", _calls(q, "verdicts")),
        ("abstained", f"{count(j['abstained'])} comparisons ({pct(j['abstained_share'], 1)})" + _reasons(j["reasons"])),
        ("order flips", f"{pct(j['flip_rate'], 1)} of pairs: the winner changed when the two answers changed places "
                        "(0 % is a judge that ignores order, 50 % a coin)"),
        ("first shown", f"wins with {pct(first, 1)} on average: {bias}" if first is not None else DASH),
        ("decisiveness", f"{num(j['decisiveness'])} (0 always undecided, 1 always certain)"),
        ("outside the verdicts", f"{pct(j['outside'], 2)} of the probability is on tokens that are no verdict"),
    ]
    return [*lines, *_group_lines(q, groups, j["mean_rating_se"]), *_agreement(j["verifier"], "compared pairs")]


def _group_lines(q: Row, groups: Row, mean_se: float | None) -> list[tuple[str, str]]:
    """What the tournaments reached; what no group has is left out."""
    aim = (f"{pct(q['confidence'], _digits(q['confidence']))} of the best {q['top']} expected to be right"
           if q["schedule"] == "top_k" else f"a reliability of {num(q['reliability'])}")
    lines = []
    if groups["to_settle"]:
        lines.append(("groups settled", f"{count(groups['settled'])} of {count(groups['to_settle'])} "
                                        f"({pct(groups['settled_share'])}) reached their aim, {aim}"))
    if groups["reliability"]:
        lines.append(("reliability of a group", f"{_spread(groups['reliability'])}: share of the variance of the true "
                                                "ratings that the ratings explain, as the fit estimates it"))
    if groups["prior_sd"]:
        lines.append(("prior's deviation in the fit",
                      f"{_spread(groups['prior_sd'], unit=' logits')}, estimated group by group"
                      if q["prior_sd"] == "auto" else f"{q['prior_sd']:g} logits, as given"))
    if groups["dispersion"]:
        lines.append(("dispersion", f"{_spread(groups['dispersion'])}; 1 means that outcomes scatter like coin tosses"))
    if mean_se is not None:
        lines.append(("standard error of a rating", f"{num(mean_se)} logits on average"))
    if groups["flags"]:
        told = ", ".join(f"{k} in {count(n)} of {count(groups['n'])} groups" for k, n in groups["flags"].items())
        lines.append(("leaning on the prior", told))
    return lines


def _reward_lines(data: Row) -> list[tuple[str, str]]:
    q, m = data["quality"], data["reward_model"]
    lines = [("reward model", f"{q['model']}; {_whose(data)}"), ("scored", f"{count(m['scored'])} answers"),
             ("texts sent", _calls(q, "scores")),
             ("without a score", f"{count(m['unscored'])}" + _reasons(m["reasons"]))]
    if m["scored"]:
        lines.append(("scores", f"mean {num(m['mean'])}, standard deviation {num(m['sd'])} over the run and "
                                f"{num(m['sd_in_group'])} within a (prompt, seed) group"))
    return [*lines, *_agreement(m["verifier"], "pairs within a group")]


def _agreement(told: Row | None, pairs: str) -> list[tuple[str, str]]:
    if not told:
        return []
    undecided = f"; {count(told['undecided'])} undecided, each counts half" if told["undecided"] else ""
    return [("agrees with the verifier",
             f"{pct(told['agrees'])} (95 % interval: {pct(told['low'])} to {pct(told['high'])}) of "
             f"{count(told['pairs'])} {pairs} of a right and a wrong answer, from {prompts(told['prompts'])} "
             f"(50 % is a coin){undecided}")]


def prompts(n: int) -> str:
    """`1 prompt`, `12 prompts`."""
    return f"{count(n)} prompt{'s' if n != 1 else ''}"


def _calls(q: Row, unit: str) -> str:
    if q["calls"] is None:
        return "not recorded"
    spared = f"; {count(q['spared'])} more {unit} known from other runs" if q["spared"] else ""
    per = f", {num(q['calls_per_candidate'])} a rated candidate" if q["rated"] else ""
    return f"{count(q['calls'])} by this run{per}{spared}"


def _reasons(reasons: dict[str, int]) -> str:
    return "".join(f"; {k} {count(n)}" for k, n in reasons.items())


def _spread(found: Row, digits: int = 2, unit: str = "") -> str:
    """`0.81 on average (median 0.84, eight in ten between 0.60 and 0.93)`, `3.0 each`."""
    mean, median, low, high = (num(found[k], digits) for k in ("mean", "median", "p10", "p90"))
    if found["least"] == found["most"]:
        return f"{mean}{unit} each"
    return f"{mean}{unit} on average (median {median}, eight in ten between {low} and {high})"


# -- the page's section --------------------------------------------------------------------------


def judge(data: Row) -> str:
    """What was measured of the judge, and the reliability of its ratings by source."""
    lines = judge_lines(data)
    if not lines:
        return section("The judge", f'<p class="soft">{MISSING}</p>')
    body = "<dl>" + "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in lines) + "</dl>"
    title = "The reward model" if data["reward_model"] else "The judge"
    return section(title, body + _reliability(data), esc(" ".join(how_rated(data))))


def _reliability(data: Row) -> str:
    """Groups, settled ones and reliability by source, with histograms."""
    if not data["judge"] or not data["judge"]["groups"]["reliability"]:
        return ""
    by_source = data["judge"]["by_source"]
    names = [s["name"] for s in data["sources"] if s["name"] in by_source] if len(by_source) > 1 else []
    rows = [(_ALL, data["judge"]["groups"]), *((name, by_source[name]) for name in names)]
    head = [("source", "l"), ("groups", ""), ("settled", ""), ("reliability", ""), ("lowest tenth", "wide"),
            ("median", "wide"), ("highest tenth", "wide"), ("from 0 to 1", "l")]
    cells = []
    for name, g in rows:
        r = g["reliability"] or dict.fromkeys(("mean", "p10", "median", "p90"))
        cells.append([(name, esc(name)), (g["n"], count(g["n"])), (g["settled_share"], pct(g["settled_share"])),
                      *((r[k], num(r[k])) for k in ("mean", "p10", "median", "p90")),
                      (None, _histogram(g["reliability_bins"]))])
    return "<h3>Reliability by source</h3>" + table(head, cells)


def _histogram(bins: list[int] | None) -> str:
    if not bins:
        return ""
    bars = "".join(f'<i style="height:{round(100 * n / max(bins))}%" title="{k / len(bins):g} to '
                   f'{(k + 1) / len(bins):g}: {count(n)} groups"></i>' for k, n in enumerate(bins))
    return f'<div class="bins">{bars}</div>'
