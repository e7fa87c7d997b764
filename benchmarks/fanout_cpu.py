"""CPU per request: ours all in, a bare aiohttp loop, and threads with `requests` as the seed project does it.

    .venv/bin/python benchmarks/fanout_cpu.py

Claim: a request costs at most 0.3 ms of this process's CPU all in (plan, request, parse, journal, decode, Parquet,
verify), at most twice a bare loop that posts the same payloads and parses the answers, and at most a quarter of
`requests` in a thread pool. Ours is what a run takes beyond a run of one request; imports are in neither. The others
are measured from their first request to their last, without their imports.
"""

from __future__ import annotations

import statistics
import time

import harness


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, rounds=3, requests=(4000, "requests a round; threads do a quarter"),
                              in_flight=(64, "requests in flight"))
    requests = options.requests * (5 if options.full else 1)
    heuristics, began = 20, time.monotonic()
    ms: dict[str, list[float]] = {"ours": [], "bare": [], "threads": [], "server": []}
    fixed: list[float] = []
    with harness.workspace() as folder, harness.ours() as [worker]:
        payloads = harness.warm_up(worker, folder, options.tokens)
        settings = {"latency_s": 0.02, "concurrency": options.in_flight, "tokens": options.tokens,
                    "model_path": harness.model_folder()}
        for n in range(options.rounds):
            def grid(prompts: int, url: str, name: str) -> dict:
                return harness.make_config(folder, [(url, options.in_flight)], prompts=prompts, heuristics=heuristics,
                                           tokens=options.tokens, name=name)

            with harness.fake(**settings) as server:
                one = harness.make_config(folder, [(server.url, options.in_flight)], prompts=1, heuristics=1,
                                          tokens=options.tokens, name=f"one-{n}")
                fixed.append(worker.run(one)["cpu_s"])
                server.reset()
                done = worker.run(grid(requests // heuristics, server.url, f"run-{n}"))
                assert done["usable"] == requests
                ms["ours"].append(1e3 * (done["cpu_s"] - fixed[-1]) / requests)
                ms["server"].append(1e3 * server.stats()["cpu_s"] / requests)
            for how, count in (("bare", requests), ("threads", requests // 4)):
                with harness.fake(**settings) as server:
                    done = harness.other(how, [server.url], payloads, count, options.in_flight, folder)
                assert done["answered"] == count
                ms[how].append(1e3 * done["cpu_s"] / count)
    to_bare = [a / b for a, b in zip(ms["ours"], ms["bare"], strict=True)]
    to_threads = [c / a for a, c in zip(ms["ours"], ms["threads"], strict=True)]
    median = statistics.median
    harness.show(
        f"CPU per request, {options.in_flight} in flight, {options.tokens} tokens with logprobs, {requests} requests x "
        f"{options.rounds} rounds, tokenizer {harness.model_folder().name}: median (min-max)",
        ["", "measured", "goal", ""],
        [["ours, all in [ms]", harness.spread(ms["ours"], 3), "<= 0.3", harness.verdict(median(ms["ours"]) <= 0.3)],
         ["bare aiohttp loop [ms]", harness.spread(ms["bare"], 3), "", ""],
         ["requests + threads [ms]", harness.spread(ms["threads"], 3), "", ""],
         ["ours / bare loop", harness.spread(to_bare), "<= 2", harness.verdict(median(to_bare) <= 2)],
         ["threads / ours", harness.spread(to_threads), ">= 4", harness.verdict(median(to_threads) >= 4)]],
        [f"beside it: a run's fixed CPU {1e3 * median(fixed):.0f} ms, imports and tokenizer "
         f"{worker.ready()['cpu_s']:.1f} s, the fake server {1e3 * median(ms['server']):.0f} us a request (goal < 60); "
         f"took {time.monotonic() - began:.0f} s"])


if __name__ == "__main__":
    main()
