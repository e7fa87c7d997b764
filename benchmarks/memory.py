"""Peak memory against rows: our process beside its imports and tokenizer, for plans of two shapes.

    .venv/bin/python benchmarks/memory.py

Claim: at most 300 MiB beside imports and tokenizer, and as much for a million rows as for ten thousand. A process a
size; what it holds after its imports, the tokenizer and a run of a few requests is taken off its peak. `wide`: few
prompts x many heuristics x seeds; `long`: as many prompts as rows, one heuristic, one seed.
"""

from __future__ import annotations

import time

import harness

GOAL_MIB = 300


def grid(shape: str, rows: int) -> dict[str, int]:
    """Prompts, heuristics and seeds of a shape."""
    if shape == "wide":
        return {"prompts": rows // 250, "heuristics": 50, "seeds": 5}
    return {"prompts": rows, "heuristics": 1, "seeds": 1}


def main() -> None:
    """Measure and print."""
    options = harness.options(__doc__, shard=(500, "requests a shard"))
    sizes = (10_000, 100_000, 1_000_000) if options.full else (4_000, 16_000)  # from twice what is worked on at once
    began, table = time.monotonic(), []
    with harness.workspace() as folder, harness.fake(
            latency_s=0.01, concurrency=64, tokens=options.tokens, model_path=harness.model_folder()) as server:
        for shape in ("wide", "long"):
            added: dict[int, float] = {}
            with harness.ours(1 if options.full else len(sizes)) as workers:
                for n, rows in enumerate(sizes):
                    if n >= len(workers):
                        workers.append(harness.Ours())
                    harness.warm_up(workers[n], folder, options.tokens, name=f"warm-{shape}-{rows}", prompts=1)
                    server.reset()  # or it would remember every id
                    done = workers[n].run(harness.make_config(
                        folder, [(server.url, 64)], tokens=options.tokens, shard_requests=options.shard,
                        name=f"{shape}-{rows}", **grid(shape, rows)))
                    workers[n].stop()
                    assert done["usable"] == rows
                    added[rows] = done["peak_rss_mib"] - done["rss_before_mib"]
                    table.append([f"{shape}, {rows:,} rows", f"{done['rss_before_mib']:.0f}", f"{added[rows]:.0f}",
                                  f"<= {GOAL_MIB}", harness.verdict(added[rows] <= GOAL_MIB),
                                  f"{added[rows] / added[sizes[0]]:.2f}", f"{done['wall_s']:.0f}"])
    harness.show(
        f"Peak memory beside imports and tokenizer; {options.tokens} tokens, shards of {options.shard}, 4 at once",
        ["", "before [MiB]", "added at most [MiB]", "goal", "", f"/ at {sizes[0]:,} rows", "wall [s]"], table,
        [f"took {time.monotonic() - began:.0f} s" + ("" if options.full else "; --full goes to a million rows")])


if __name__ == "__main__":
    main()
