"""What Prefect adds to the wall time: `winnow run` against the same stages without it.

    .venv/bin/python benchmarks/prefect_share.py

Claim: at 2,000 requests a shard, at most 1 %, between the first request at the server and the last answer. Before and
after, a run starts Python, imports, and tells the Prefect server of its flow: those seconds are named beside it. The
server is the slow side, as it is in a real run; a standing Prefect server takes both cores' rest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness

HEURISTICS = 20
GOAL_PERCENT = 1.0


def winnow_run(raw: dict, folder: Path) -> float:
    """The whole command; its wall seconds."""
    path = folder / f"{raw['run']}.yaml"
    path.write_text(json.dumps(raw))  # JSON is YAML
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "flows.cli", "run", str(path)], cwd=harness.ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"winnow run ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, rounds=2, shards=(3, "shards; with --full four times as many"),
                              shard=(2000, "requests a shard"), workers=(2, "shards at once"))
    shards, slots, latency_s = options.shards * (4 if options.full else 1), 40, 0.05
    began = time.monotonic()
    span: dict[str, list[float]] = {"prefect": [], "without": []}
    whole: list[float] = []
    from flows.prefect_server import prefect_api

    with harness.workspace() as folder, harness.ours() as [worker]:
        os.environ |= {"PREFECT_HOME": str(folder / "prefect"), "WINNOW_STATE_DIR": str(folder / "state")}
        os.environ.pop("PREFECT_API_URL", None)
        with prefect_api(folder / "prefect.log", lambda _: None), harness.fake(
                latency_s=latency_s, concurrency=slots, tokens=options.tokens,
                model_path=harness.model_folder()) as server:
            harness.warm_up(worker, folder, options.tokens)
            for n in range(options.rounds):
                for how in ("without", "prefect") if n % 2 == 0 else ("prefect", "without"):
                    raw = harness.make_config(
                        folder, [(server.url, slots)], prompts=shards * options.shard // HEURISTICS,
                        heuristics=HEURISTICS, tokens=options.tokens, shard_requests=options.shard,
                        workers=options.workers, name=f"{how}-{n}")
                    server.reset()
                    if how == "prefect":
                        whole.append(winnow_run(raw, folder))
                    else:
                        worker.run(raw)
                    stats = server.stats()
                    assert stats["answered"] == shards * options.shard
                    span[how].append(harness.span_s(stats))
    added = [100 * (a / b - 1) for a, b in zip(span["prefect"], span["without"], strict=True)]
    around = [w - s for w, s in zip(whole, span["prefect"], strict=True)]
    ideal = shards * options.shard * latency_s / slots
    harness.show(
        f"From the first request to the last answer, {shards} shards of {options.shard} requests, {options.workers} at "
        f"once, {options.rounds} rounds: median (min-max)",
        ["", "measured", "goal", ""],
        [["winnow run [s]", harness.spread(span["prefect"]), "", ""],
         ["the same stages without Prefect [s]", harness.spread(span["without"]), "", ""],
         ["Prefect adds [%]", harness.spread(added), f"<= {GOAL_PERCENT:g}",
          harness.verdict(statistics.median(added) <= GOAL_PERCENT)],
         ["Prefect adds a shard [ms]", harness.spread(
             [1e3 * (a - b) / shards for a, b in zip(span["prefect"], span["without"], strict=True)], 0), "", ""]],
        [f"beside it: {statistics.median(around):.1f} s of the command before the first request and after the last; "
         f"the server's ceiling takes {ideal:.1f} s; took {time.monotonic() - began:.0f} s"])


if __name__ == "__main__":
    main()
