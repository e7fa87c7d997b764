"""The report's sections of counts: from the plan to the dataset, and what failed on the way."""

from __future__ import annotations

from tasks.publish.report_parts import DASH, Row, count, counts_table, esc, num, pct, section, table


def funnel_steps(data: Row) -> list[tuple[str, int]]:
    """The steps from the plan to the dataset that were reached."""
    f = data["funnel"]
    steps = [(k, f[k]) for k in ("planned", "answered", "usable", "labelled")]
    if f["labelled"] is not None and f["checked"]:
        steps.append(("not found wrong", f["labelled"] - (f["checked"] - f["correct"])))
    return [(k, n) for k, n in [*steps, ("kept", f["kept"])] if n is not None]


def funnel(data: Row) -> str:
    """From planned requests to kept rows, and why rows were dropped."""
    steps = funnel_steps(data)
    whole = steps[0][1] or 1
    bars = "".join(f'<span>{esc(k)}</span><div><i style="width:{round(100 * n / whole, 2)}%"></i></div>'
                   f"<span>{count(n)}<br><small class='soft'>{pct(n / whole, 1)}</small></span>" for k, n in steps)
    body = f'<div class="fun">{bars}</div>'
    if data["drops"]:
        per = " and ".join(data["per"])
        best = "not the best" if data["top_k"] == 1 else f"not among the {data['top_k']} best"
        rule = {"below_top_k": f"{best} of their {per}", "incorrect": "found wrong by the verifier",
                "unusable": "failed, or their prompt was left out", "unlabelled": "without any label"}
        shown = {rule.get(str(k), str(k)): n for k, n in data["drops"].items()}
        body += "<h3>Not kept</h3>" + counts_table("why", shown, sum(data["drops"].values()))
    if data["dataset"]:
        body += "<p>Dataset: " + ", ".join(f"{count(n)} rows in {esc(k)}" for k, n in data["dataset"].items()) + ".</p>"
    checked = data["funnel"]["checked"]
    note = f"Correct where verified: {count(data['funnel']['correct'])} of {count(checked)}." if checked else ""
    return section("From plan to dataset", body, note)


def failures(data: Row) -> str:
    """Failed requests by kind and server, and what verification of the grid found."""
    f, v, r = data["failures"], data["verification"], data["requests"]
    kinds = defect_kinds(data)
    if f["total"]:
        body = f"<p>{count(f['total'])} of {count(r['rows'])} candidates failed ({pct(f['share'], 2)}). "
    else:
        body = f"<p>None{' left' if kinds else ''}: every request of the grid has an answer. "
    body += f"{count(r['attempts'])} requests were sent for them, {count(r['retries'])} of them again.</p>"
    if kinds:
        rows = [[(k, esc(k)), (found, count(found)), (left, count(left)), (None, esc(f["examples"].get(k) or DASH))]
                for k, found, left in kinds]
        body += table([("kind", "l"), ("before repair", ""), ("left", ""), ("an example of those left", "l")], rows)
    if f["total"] or len(data["servers"]) > 1:
        body += "<h3>By server</h3>" + _by_server(data)
    body += (f"<h3>Verification of the grid</h3><p>Policy {esc(v['policy'])}. Cells mended: {count(v['repaired'])}, "
             f"left as they are: {count(sum(v['defects'].values()))}. Prompts left out: {count(v['dropped_prompts'])}. "
             f"Answers that reached max_new_tokens: {count(v['at_max_new_tokens'])}.</p>")
    if v["cells"]:
        rows = [[(c["prompt_id"], f"<code>{esc(c['prompt_id'][:12])}</code>"), (c["heuristic"], esc(c["heuristic"])),
                 (c["seed"], esc(c["seed"])), (c["defect"], esc(c["defect"]))] for c in v["cells"]]
        body += (f"<details><summary>The first {len(rows)} defective cells</summary>"
                 + table([("prompt", "l"), ("heuristic", "l"), ("seed", ""), ("defect", "l")], rows) + "</details>")
    return section("Failures", body)


def defect_kinds(data: Row) -> list[tuple[str, int, int]]:
    """(kind, cells before repair, cells left), the most frequent first."""
    found, left = data["verification"]["found"], data["verification"]["defects"] | data["failures"]["by_kind"]
    kinds = [(k, max(found.get(k, 0), left.get(k, 0)), left.get(k, 0)) for k in found.keys() | left.keys()]
    return sorted(kinds, key=lambda kind: (-kind[1], kind[0]))


def _by_server(data: Row) -> str:
    rows = [[(s["url"], esc(s["url"]) + ("" if s["answered"] else " <small class='soft'>never answered</small>")),
             (s["rows"], count(s["rows"])), (s["failed"], count(s["failed"])), (s["tokens"], count(s["tokens"])),
             (s["mean_latency_s"], num(s["mean_latency_s"]))] for s in data["servers"]]
    return table([("server", "l"), ("rows", ""), ("failed", ""), ("tokens", "wide"), ("mean seconds", "")], rows)
