"""Share of a server's ceiling that is used: ours against a bare aiohttp loop that posts the same payloads.

    .venv/bin/python benchmarks/ceiling.py

The ceiling is slots / latency requests a second. Claim: with as many requests in flight as the server has slots, ours
reaches at least 0.95 of what the bare loop reaches, all of our work included (journal, Parquet, verify). Counted at
the server, from the first request to the last answer.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import harness

CELLS = [(slots, latency_s) for slots in (64, 256) for latency_s in (0.05, 0.2)]
HEURISTICS = 16  # divides the slots: whole prompts, and no slot is idle in the last wave
GOAL = 0.95


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, rounds=2, seconds=(2, "seconds a cell, at the ceiling"),
                              most=(4000, "most requests a cell; with --full ten times as many"))
    seconds, most = options.seconds * (5 if options.full else 1), options.most * (10 if options.full else 1)
    counts = [max(1, round(min(most, slots / latency_s * seconds) / slots)) * slots for slots, latency_s in CELLS]
    shares: list[dict[str, list[float]]] = [{"ours": [], "bare": []} for _ in CELLS]
    began = time.monotonic()
    with harness.workspace() as folder, harness.ours() as [worker], contextlib.ExitStack() as stack:
        servers = [stack.enter_context(harness.fake(latency_s=latency_s, concurrency=slots, tokens=options.tokens,
                                                    model_path=harness.model_folder())) for slots, latency_s in CELLS]
        payloads = harness.warm_up(worker, folder, options.tokens)
        for n in range(options.rounds):
            for (slots, latency_s), server, requests, share in zip(CELLS, servers, counts, shares, strict=True):
                for how in ("ours", "bare"):
                    server.reset()
                    if how == "ours":
                        worker.run(harness.make_config(
                            folder, [(server.url, slots)], prompts=requests // HEURISTICS, heuristics=HEURISTICS,
                            tokens=options.tokens, name=f"run-{slots}-{latency_s}-{n}"))
                    else:
                        harness.other("bare", [server.url], payloads, requests, slots, folder)
                    stats = server.stats()
                    assert stats["answered"] == requests
                    share[how].append(requests / harness.span_s(stats) / (slots / latency_s))
    rows = []
    for (slots, latency_s), requests, share in zip(CELLS, counts, shares, strict=True):
        ratios = [a / b for a, b in zip(share["ours"], share["bare"], strict=True)]
        rows.append([
            f"{slots} in flight, {1e3 * latency_s:.0f} ms", f"{slots / latency_s:.0f}", requests,
            harness.spread(share["ours"]), harness.spread(share["bare"]), harness.spread(ratios), f">= {GOAL}",
            harness.verdict(statistics.median(ratios) >= GOAL)])
    harness.show(
        f"Share of the server's ceiling, {options.tokens} tokens, {options.rounds} rounds: median (min-max)",
        ["", "ceiling [1/s]", "requests", "ours", "bare loop", "ours / bare loop", "goal", ""], rows,
        [f"where the bare loop is far below 1, one core does not reach the ceiling; took "
         f"{time.monotonic() - began:.0f} s"])


if __name__ == "__main__":
    main()
