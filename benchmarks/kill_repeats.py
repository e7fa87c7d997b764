"""kill -9 at random moments: requests answered twice, and whether the result is that of an undisturbed run.

    .venv/bin/python benchmarks/kill_repeats.py

Claim: a kill repeats at most the requests that were in flight, and the rows are those of a run that nobody killed
(but for latency, attempts and server, which are each run's own). The moments are shares of the requests answered,
drawn by the seed; a kill also falls on files being written, as shards are small.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import harness

VOLATILE = ("latency_s", "attempts", "server")
HEURISTICS = 10


def rows(run: Path) -> dict[str, dict]:
    """Verified rows by candidate_id, without what differs from run to run."""
    import pyarrow.parquet as pq

    out: dict[str, dict] = {}
    for path in sorted((run / "verified").glob("*.parquet")):
        table = pq.read_table(path)
        for row in table.select([c for c in table.column_names if c not in VOLATILE]).to_pylist():
            assert row["candidate_id"] not in out, f"{row['candidate_id']} twice"
            out[row["candidate_id"]] = row
    return out


def killed_run(workers: list[harness.Ours], raw: dict, server: harness.FakeServer, moments: list[float],
               rng: random.Random) -> tuple[int, int]:
    """Build `raw`, killed at each moment (a number of answers); (requests sent again, answered again)."""
    server.reset()
    for worker, moment in zip(workers, moments, strict=False):
        worker.begin(raw)
        while server.stats()["answered"] < moment and worker.process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        worker.stop()
    workers[-1].run(raw)
    stats = server.stats()
    return stats["sent_again"], stats["answered_again"]


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, rounds=1, kills=(3, "kills a round"), requests=(2000, "requests"),
                              in_flight=(32, "requests in flight"), seed=(0, "seed of the moments"))
    kills = options.kills * (3 if options.full else 1)
    began, table = time.monotonic(), []
    with harness.workspace() as folder, harness.fake(
            latency_s=0.02, concurrency=options.in_flight, tokens=options.tokens,
            model_path=harness.model_folder()) as server:
        def grid(name: str) -> dict:
            return harness.make_config(folder, [(server.url, options.in_flight)], heuristics=HEURISTICS, name=name,
                                       prompts=options.requests // HEURISTICS, tokens=options.tokens,
                                       shard_requests=200)

        for n in range(options.rounds):
            rng = random.Random(options.seed + n)
            moments = sorted(rng.uniform(0.02, 0.98) * options.requests for _ in range(kills))
            with harness.ours(kills + 1) as workers:  # all started now: their imports take seconds
                if n == 0:
                    workers[-1].run(grid("undisturbed"))
                    undisturbed = rows(folder / "runs/undisturbed")
                    assert len(undisturbed) == options.requests
                sent, answered = killed_run(workers, grid(f"killed-{n}"), server, moments, rng)
            equal = rows(folder / f"runs/killed-{n}") == undisturbed
            bound = kills * options.in_flight
            table.append([f"seed {options.seed + n}", ", ".join(f"{m:.0f}" for m in moments), sent, answered, bound,
                          f"{answered / bound:.2f}", "<= 1", harness.verdict(sent <= bound and equal),
                          "equal" if equal else "DIFFERENT"])
    harness.show(
        f"{kills} kills in a run of {options.requests} requests, {options.in_flight} in flight",
        ["", "killed after answers", "sent again", "answered again", "in flight x kills", "share", "goal", "", "rows"],
        table, [f"took {time.monotonic() - began:.0f} s"])


if __name__ == "__main__":
    main()
