"""Quality labels without model time: CPU a row, and the share of the judge server's ceiling that is used.

    .venv/bin/python benchmarks/labelling.py

Claim: a tournament costs at most 1.0 ms of this process's CPU a rated candidate (prompts put together, requests,
answers, cache, schedule, fit, Parquet), and keeps a judge server at 0.9 of its ceiling (slots / latency). The judge
tosses: nothing settles early, so the calls are the most that the schedule takes. Baseline: what a script does for a
judgement (the prompt rendered and encoded whole, one `requests.post` each in a thread pool), in the same round.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from pathlib import Path

import harness

LATENCY_S = 0.05


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, rounds=2, tokens=250, players=(64, "candidates in a tournament"),
                              prompts=(16, "tournaments a round; with --full four times as many"),
                              slots=(64, "judgements that the server works on at once"))
    prompts, began = options.prompts * (4 if options.full else 1), time.monotonic()
    schedules = ("top_k", "ranking")
    row_ms: dict[str, list[float]] = {s: [] for s in schedules}
    call_ms: dict[str, list[float]] = {s: [] for s in (*schedules, "script")}
    share: dict[str, list[float]] = {s: [] for s in schedules}
    calls: dict[str, float] = {}
    rows = prompts * options.players
    with harness.workspace() as folder, harness.ours() as [worker], contextlib.ExitStack() as stack:
        writer = stack.enter_context(harness.fake(latency_s=0.002, concurrency=256, tokens=options.tokens,
                                                  model_path=harness.model_folder(), variants=2048))
        judge = stack.enter_context(harness.fake(latency_s=LATENCY_S, concurrency=options.slots,
                                                 model_path=harness.model_folder()))
        for n in range(options.rounds + 1):  # the first warms up
            for schedule in schedules:
                raw = harness.make_config(folder, [(writer.url, 64)], prompts=prompts if n else 2,
                                          heuristics=options.players, tokens=options.tokens, name=f"{schedule}-{n}",
                                          shard_requests=rows)
                raw["servers"]["judge"] = [{"url": judge.url, "max_in_flight": options.slots}]
                raw |= {"labels": ["quality"], "quality": {"schedule": schedule, "cache": "off"}}
                judge.reset()
                done = worker.run(raw)
                if not n:
                    continue
                assert done["usable"] == rows
                stats = judge.stats()
                calls[schedule] = stats["answered"] / rows
                row_ms[schedule].append(1e3 * done["label_cpu_s"] / rows)
                call_ms[schedule].append(1e3 * done["label_cpu_s"] / stats["answered"])
                share[schedule].append(stats["answered"] / harness.span_s(stats) / (options.slots / LATENCY_S))
            if n:
                texts = folder / "texts.json"
                texts.write_text(json.dumps(_texts(folder / f"runs/ranking-{n}")))
                count = rows // 4
                done = harness.other("judge", [judge.url], texts, count, options.slots, folder)
                assert done["answered"] == count
                call_ms["script"].append(1e3 * done["cpu_s"] / count)
    median = statistics.median
    table = []
    for schedule in schedules:
        table += [
            [f"{schedule}: CPU a row [ms]", harness.spread(row_ms[schedule]), "<= 1.0",
             harness.verdict(median(row_ms[schedule]) <= 1.0)],
            [f"{schedule}: judge calls a row", f"{calls[schedule]:.1f}", "", ""],
            [f"{schedule}: CPU a call [ms]", harness.spread(call_ms[schedule], 3), "", ""],
            [f"{schedule}: share of the judge's ceiling", harness.spread(share[schedule]), ">= 0.9",
             harness.verdict(median(share[schedule]) >= 0.9)]]
    ratios = [s / o for s, o in zip(call_ms["script"], call_ms["top_k"], strict=True)]
    table += [["script: CPU a call [ms]", harness.spread(call_ms["script"], 3), "", ""],
              ["script / ours (top_k), a call", harness.spread(ratios, 1), "", ""]]
    harness.show(
        f"Labelling {prompts} tournaments of {options.players} candidates of {options.tokens} tokens, {options.rounds} "
        f"rounds, judge {options.slots} x {1e3 * LATENCY_S:.0f} ms, tokenizer {harness.model_folder().name}: median "
        "(min-max)", ["", "measured", "goal", ""], table, [f"took {time.monotonic() - began:.0f} s"])


def _texts(run: Path) -> list[str]:
    """Some of the run's candidates."""
    import pyarrow.parquet as pq

    return pq.read_table(run / "verified/shard-0000.parquet", columns=["text"])["text"].to_pylist()[:500]


if __name__ == "__main__":
    main()
