"""One of three servers is five times slower: the time to the last answer over the fluid ideal.

    .venv/bin/python benchmarks/slow_server.py

The fluid ideal is N / (sum of slots / latency): every server busy to the end. Claim: ours takes at most 1.15 of it,
where the run is long beside one slow answer. For comparison every request bound to a server in advance, as a static
round robin does (a bare loop a server, so nothing else is in the way). Requests are whole: `best possible` is what
a scheduler that knows the future would take.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import harness

LATENCIES_S = (0.05, 0.05, 0.25)
HEURISTICS = 10
GOAL = 1.15


def best_possible_s(requests: int, slots: int) -> float:
    """Least time in which the servers give so many whole answers."""
    low, high = 0.0, requests * max(LATENCIES_S)
    while high - low > 1e-6:
        middle = (low + high) / 2
        done = sum(slots * int((middle + 1e-9) / latency) for latency in LATENCIES_S)
        low, high = (low, middle) if done >= requests else (middle, high)
    return high


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, rounds=3, slots=(8, "slots a server"))
    began, slots = time.monotonic(), options.slots
    rate = sum(slots / latency for latency in LATENCIES_S)
    sizes = [round(rate * seconds / HEURISTICS) * HEURISTICS for seconds in ((1, 2, 4, 16) if options.full else (1, 3))]
    over_ideal: dict[tuple[int, str], list[float]] = {}
    slow_share: dict[int, list[float]] = {}
    with harness.workspace() as folder, harness.ours() as [worker], contextlib.ExitStack() as stack:
        servers = [stack.enter_context(harness.fake(
            latency_s=latency, concurrency=slots, tokens=options.tokens, model_path=harness.model_folder()))
            for latency in LATENCIES_S]
        payloads = harness.warm_up(worker, folder, options.tokens)
        for n in range(options.rounds):
            for requests in sizes:
                for how in ("ours", "bound") if n == 0 or options.full else ("ours",):  # bound takes four times as long
                    for server in servers:
                        server.reset()
                    if how == "ours":
                        worker.run(harness.make_config(
                            folder, [(s.url, slots) for s in servers], prompts=requests // HEURISTICS,
                            heuristics=HEURISTICS, shard_requests=200, tokens=options.tokens,
                            name=f"run-{requests}-{n}"))
                    else:
                        harness.other("bare", [s.url for s in servers], payloads, requests, slots, folder)
                    stats = [s.stats() for s in servers]
                    assert sum(s["answered"] for s in stats) == requests
                    over_ideal.setdefault((requests, how), []).append(harness.span_s(*stats) * rate / requests)
                    if how == "ours":
                        slow_share.setdefault(requests, []).append(stats[-1]["answered"] / requests)
    rows = []
    for requests in sizes:
        ours, bound = over_ideal[requests, "ours"], over_ideal[requests, "bound"]
        rows.append([requests, f"{requests / rate:.2f}", f"{best_possible_s(requests, slots) * rate / requests:.2f}",
                     harness.spread(ours), f"<= {GOAL}", harness.verdict(statistics.median(ours) <= GOAL),
                     harness.spread(bound),
                     f"{statistics.median(bound) / statistics.median(ours):.2f}",
                     f"{100 * statistics.median(slow_share[requests]):.1f}"])
    fluid = 100 / max(LATENCIES_S) * slots / rate
    harness.show(
        f"Time to the last answer / fluid ideal; 3 servers of {slots} slots at "
        f"{', '.join(f'{1e3 * s:.0f}' for s in LATENCIES_S)} ms, {options.rounds} rounds: median (min-max)",
        ["requests", "ideal [s]", "best possible", "ours", "goal", "", "bound in advance", "bound / ours",
         "slow server's share [%]"], rows,
        [f"the slow server's share in the fluid ideal is {fluid:.1f} %; took {time.monotonic() - began:.0f} s"])


if __name__ == "__main__":
    main()
