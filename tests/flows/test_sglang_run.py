"""A whole run on a real SGLang server: the CPU, SmolLM2-135M, all seven processors, judged by itself."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tasks.context import Context
from tasks.core.tokenizer import decode
from tasks.serving.launch import launcher
from tasks.serving.launch.launcher import LaunchSpec
from tests.flows.real_sglang import launched
from tests.runs import build

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
VOLATILE = ("latency_s", "attempts", "server")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[str]:
    with launched(model, tmp_path_factory.mktemp("servers"), dtype="bfloat16", max_total_tokens=32768) as url:
        yield url


def small(folder: Path, url: str, run: str, **changes) -> dict:
    """The demo's config, five prompts of five kinds, short answers."""
    raw = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    raw |= {"run": run, "runs_dir": str(folder), "servers": {
        "generator": [{"url": url, "max_in_flight": 16, "expect": {"dtype": "bfloat16"}}]}}
    for source in raw["sources"]:
        source |= {"limit": 1, "path": str(ROOT / source["path"])}
    raw["model"]["path"] = str(ROOT / raw["model"]["path"])
    raw["heuristics"]["files"] = [str(ROOT / f) for f in raw["heuristics"]["files"]]
    raw["generation"]["generator"]["max_new_tokens"] = 16
    return raw | changes


def verified(ctx: Context) -> list[dict]:
    return [r for n in range(ctx.shards) for r in ctx.store.read(f"verified/shard-{n:04d}.parquet").to_pylist()]


def stable(rows: list[dict]) -> list[dict]:
    return sorted(({k: v for k, v in r.items() if k not in VOLATILE} for r in rows), key=lambda r: r["candidate_id"])


@pytest.fixture(scope="module")
def run(server, tmp_path_factory) -> Context:
    return build(small(tmp_path_factory.mktemp("runs"), server, "calm"))


def test_every_row_is_real_text_decoded_from_its_ids(run):
    rows = verified(run)
    assert len(rows) == 5 * 8 * 2
    assert [r["status"] for r in rows] == ["ok"] * 80
    for row in rows:
        assert row["text"] == decode(run.tokenizer, row["output_ids"])
        assert row["seed_effective"] is True
        assert len(row["output_logprobs"]) == len(row["output_ids"]) <= 16
    assert len({r["request_seed"] for r in rows}) == 80
    assert len({r["text"] for r in rows}) > 60
    used = {p for r in rows for p in json.loads(r["sampling_params"]).get("custom_params", {}).get("winnow", [])[::3]}
    assert used == {"temperature", "top_k", "top_p", "min_p", "typical", "epsilon", "eta"}


def test_every_group_is_judged_and_rated(run):
    rows = [r for n in range(run.shards) for r in run.store.read(f"labels/quality/shard-{n:04d}.parquet").to_pylist()]
    assert len(rows) == 80
    assert all(r["rating"] is not None and r["rating_se"] > 0 for r in rows)
    pairs = [r for n in range(run.shards) for r in run.store.read(f"comparisons/shard-{n:04d}.parquet").to_pylist()]
    assert all(p["outcome"] is not None and 0 <= p["outside"] < 0.9 for p in pairs)
    kept = run.store.read("dataset/train.parquet").num_rows
    assert kept > 0


def test_the_same_run_in_other_shards_and_another_concurrency_is_the_same_byte_for_byte(run, server, tmp_path):
    raw = small(tmp_path, server, "again", engine={"shard_prompts": 2}, labels=[])
    raw["servers"]["generator"][0]["max_in_flight"] = 5
    assert stable(verified(build(raw, ["generate", "verify"]))) == stable(verified(run))


def test_a_run_killed_with_its_own_server_leaves_nothing_behind_and_completes(run, model, tmp_path):
    raw = small(tmp_path, "http://x", "killed", labels=[])
    raw["servers"] = {"generator": [{"launch": {"device": "cpu", "dtype": "bfloat16", "max_total_tokens": 32768},
                                     "max_in_flight": 16}]}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw))
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.cli", "run", str(config)]

    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    journals = tmp_path / "killed/journal"
    while process.poll() is None and sum(p.stat().st_size for p in journals.rglob("*.jsonl")) < 20_000:
        time.sleep(0.1)
    assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 5  # SGLang's processes and the private Prefect server
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stable(verified(Context(str(tmp_path / "killed")))) == stable(verified(run))


def test_a_server_killed_and_restarted_in_the_middle_costs_no_row(run, server, model, tmp_path):
    spec = LaunchSpec(model=str(model), device="cpu", dtype="bfloat16", max_total_tokens=32768, ready_timeout_s=300)
    folder = tmp_path / "servers"
    victim = launcher.start(spec, folder, leashed=True)
    again = LaunchSpec(**{**dataclasses.asdict(spec), "port": int(victim.url.rpartition(":")[2])})
    raw = small(tmp_path, server, "disturbed", labels=[])
    raw["servers"]["generator"] = [{"url": url, "max_in_flight": 8, "expect": {"dtype": "bfloat16"}}
                                   for url in (server, victim.url)]
    journals, records = tmp_path / "disturbed/journal", [victim]

    def kill_and_restart() -> None:
        while sum(p.stat().st_size for p in journals.rglob("*.jsonl")) < 15_000:
            time.sleep(0.05)
        processes = [*psutil.Process(victim.pid).children(recursive=True), psutil.Process(victim.pid)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)
        launcher.stop(victim)
        records.append(launcher.start(again, folder, leashed=True))

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    try:
        rows = verified(build(raw, ["generate", "verify"]))
    finally:
        killer.join(300)
        launcher.stop(records[-1])
    assert stable(rows) == stable(verified(run))
    assert len(records) == 2  # it was killed before the work was done
    assert {r["server"] for r in rows} == {server, victim.url}
    assert max(r["attempts"] for r in rows) == 2
