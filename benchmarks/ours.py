"""Winnow's stages (generate, verify, labels) without Prefect, in a process that is measured from outside.

    .venv/bin/python benchmarks/ours.py

Says `{"ready": ...}` once everything is imported; then builds each config that comes as a line of JSON on standard
input, and answers with a line of CPU seconds, wall seconds and memory. Shards go to threads as the flow sends them to
tasks: a window of them, each generated, then verified.
"""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STAGES = ("generate", "verify")


def build(raw: dict[str, Any]) -> dict[str, Any]:
    """Build the run of a config; what it took, from its first check to its last file."""
    from flows.prepare import check, open_run
    from flows.servers import running
    from tasks.context import Context, release
    from tasks.core.config import RunConfig
    from tasks.pipeline import stage
    from tasks.stage import ensure

    rss = rss_mib()
    began, cpu = time.monotonic(), cpu_s()
    ctx = open_run(check(RunConfig.model_validate(raw), {}))
    opened = cpu_s() - cpu
    try:
        with running(ctx, lambda _: None) as served:
            run_shards(lambda name, shard: ensure(stage(name), served, shard), served.shards,
                       served.config.engine.max_workers)
            before = time.monotonic(), cpu_s()
            for label in served.config.labels:
                run_shards(lambda name, shard: ensure(stage(name), served, shard), served.shards,
                           served.config.engine.max_workers, (label,))
            labels = {"label_wall_s": time.monotonic() - before[0], "label_cpu_s": cpu_s() - before[1]}
    finally:
        release(ctx.url)
    del ctx
    return labels | {"wall_s": time.monotonic() - began, "cpu_s": cpu_s() - cpu, "opened_cpu_s": opened,
            "rss_before_mib": rss, "rss_after_mib": rss_mib(), "peak_rss_mib": peak_rss_mib(),
            "usable": usable(Context(f"{raw['runs_dir']}/{raw['run']}"))}


def run_shards(work: Callable[[str, int], Any], shards: int, workers: int, stages: tuple[str, ...] = STAGES) -> None:
    """Every stage of every shard, at most two shards a worker begun."""
    waiting = iter(range(shards))
    pending: dict[Future[Any], tuple[int, tuple[str, ...]]] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            for shard in itertools.islice(waiting, 2 * workers - len(pending)):
                pending[pool.submit(work, stages[0], shard)] = (shard, stages[1:])
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                shard, left = pending.pop(future)
                future.result()
                if left:
                    pending[pool.submit(work, left[0], shard)] = (shard, left[1:])


def usable(ctx: Any) -> int:
    """Rows of the run that are answered and whole."""
    found = [ctx.store.manifest(path) for path in ctx.store.glob("verified/*.parquet")]
    return sum(m.facts["usable"] for m in found if m)


def cpu_s() -> float:
    """CPU seconds of this process and its children that ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both)


def rss_mib() -> float:
    """Resident memory now."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def peak_rss_mib() -> float:
    """Most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Import, say so, build what is asked for until standard input ends."""
    import logging

    import flows.prepare
    import flows.servers  # noqa: F401
    import tasks.pipeline  # noqa: F401 (imported here, so that a run's first seconds are not imports)
    from tasks.core.config import ModelRef
    from tasks.core.tokenizer import load_tokenizer

    logging.getLogger().addHandler(logging.NullHandler())  # warnings of faults on order would only cost time
    load_tokenizer(ModelRef(path=sys.argv[1]))
    out = sys.stdout
    print(json.dumps({"ready": True, "cpu_s": cpu_s(), "rss_mib": rss_mib()}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(build(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
