"""A real SGLang on the CPU with the demo's model, as Winnow or as somebody else starts it, and what it is asked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.prepare import check, open_run
from flows.servers import running
from tasks.context import Context, release
from tasks.core.resolve import load_config, recorded_run
from tasks.pipeline import stage
from tasks.serving.launch import launcher
from tasks.serving.launch.launch_spec import CPU_LAUNCHER
from tasks.serving.launch.launcher import LaunchSpec
from tasks.stage import ensure


@contextlib.contextmanager
def launched(model: Path, folder: Path, build: launcher.Command = launcher.command, **asked: Any) -> Iterator[str]:
    """A server's address, while it runs."""
    spec = LaunchSpec(model=str(model), device="cpu", ready_timeout_s=300, **asked)
    record = launcher.start(spec, folder, leashed=True, build=build)
    try:
        yield record.url
    finally:
        launcher.stop(record)


@contextlib.contextmanager
def by_hand(model: Path, folder: Path, *words: str) -> Iterator[str]:
    """The address of a server as somebody else starts it: what it needs on a CPU, custom processors, and `words`."""
    def build(_: LaunchSpec, port: int) -> list[str]:
        return [sys.executable, str(CPU_LAUNCHER), f"--model-path={model}", f"--port={port}", "--device=cpu",
                "--attention-backend=torch_native", "--sampling-backend=pytorch", "--grammar-backend=none",
                "--disable-overlap-schedule", "--cuda-graph-backend-decode=disabled",
                "--cuda-graph-backend-prefill=disabled", "--mem-fraction-static=0.3", "--max-total-tokens=8192",
                "--enable-custom-logit-processor", *words]

    with launched(model, folder, build) as url:
        yield url


def generated(path: Path, sets: list[str] | None = None, run: str | None = None
              ) -> tuple[Context, list[dict[str, Any]]]:
    """The candidates of a config file as the command line would have them, sorted by id, and their run."""
    resolved, origins = load_config(path, sets, run)
    with (plan := check(resolved, origins, recorded_run(path))).prompts:
        ctx = open_run(plan)
    try:
        with running(ctx, print) as served:
            for shard in range(served.shards):
                ensure(stage("generate"), served, shard)
    finally:
        release(ctx.url)
    rows = [r for p in ctx.store.glob("candidates/*/*.parquet") for r in ctx.store.read(p).to_pylist()]
    return Context(ctx.url), sorted(rows, key=lambda r: r["candidate_id"])
