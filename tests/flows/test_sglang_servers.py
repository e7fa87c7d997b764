"""Real SGLang servers on the CPU: one started by hand otherwise than the run asks for, and one of ours that is reused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.prepare import check, open_run
from flows.servers import running
from tasks.context import Context, release
from tasks.core.resolve import load_config, recorded_run
from tasks.pipeline import stage
from tasks.serving.launch import launcher
from tasks.serving.launch.launch_spec import CPU_LAUNCHER, ROOT
from tasks.serving.launch.launcher import LaunchSpec
from tasks.serving.sglang_cpu import ensure_demo_model
from tasks.stage import ensure

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
HEURISTICS = {"sampling_pipelines": [
    {"name": "plain", "processors": []},
    {"name": "warm", "processors": [{"name": "temperature", "params": {"temperature": 0.8}}]},
    {"name": "typical", "processors": [{"name": "typical", "params": {"mass": 0.9}}]}]}


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_demo_model(ROOT / "data/models/SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def by_hand(model, tmp_path_factory) -> Iterator[str]:
    """As somebody else would start it: a dtype, custom processors, and no word of seeds."""
    def build(spec: LaunchSpec, port: int) -> list[str]:
        return [sys.executable, str(CPU_LAUNCHER), f"--model-path={model}", f"--port={port}", "--device=cpu",
                "--dtype=bfloat16", "--enable-custom-logit-processor", "--attention-backend=torch_native",
                "--sampling-backend=pytorch", "--grammar-backend=none", "--disable-overlap-schedule",
                "--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled",
                "--mem-fraction-static=0.3", "--max-total-tokens=8192"]

    record = launcher.start(LaunchSpec(model=str(model), device="cpu", ready_timeout_s=300),
                            tmp_path_factory.mktemp("hand"), leashed=True, build=build)
    yield record.url
    launcher.stop(record)


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    yield folder
    for record in launcher.running(folder):
        launcher.stop(record, 1)


@pytest.fixture(autouse=True)
def _own_state(state, monkeypatch):
    monkeypatch.setenv("WINNOW_STATE_DIR", str(state))


def config(folder: Path, model: Path, server: dict[str, Any], **changes: Any) -> Path:
    (folder / "stories.jsonl").write_text('{"prompt": "Tell of rain."}\n{"prompt": "Tell of a lamp."}\n')
    (folder / "heuristics.yaml").write_text(json.dumps(HEURISTICS))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({
        "run": "test", "runs_dir": str(folder / "runs"), "model": {"path": str(model)},
        "servers": {"generator": [server]}, "sources": [{"name": "stories", "path": str(folder / "stories.jsonl")}],
        "heuristics": {"files": [str(folder / "heuristics.yaml")]}, "seeds": [0, 1, 2], "labels": [],
        "generation": {"generator": {"max_new_tokens": 8}}} | changes))
    return path


def built(path: Path, sets: list[str] | None = None, run: str | None = None) -> tuple[Context, list[dict[str, Any]]]:
    """Candidates of a config, as the command line would have them; the rows."""
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
    return Context(ctx.url), rows


def test_a_server_started_otherwise_is_refused_with_a_table_whose_mend_works(by_hand, model, tmp_path, winnow):
    path = config(tmp_path, model, {"url": by_hand})
    for command in (("run", str(path)), ("servers", "check", str(path))):
        code, said = winnow(*command)
        assert code == 2
        for words in ("deterministic", "dtype", "not set", "bfloat16"):
            assert words in said
    assert not list((tmp_path / "runs/test").glob("candidates/*"))
    ctx, rows = built(config(tmp_path, model, {"url": by_hand, "expect": {"deterministic": False, "dtype": "bf16"}}))
    assert [(r["status"], r["seed_effective"]) for r in rows] == [("ok", False)] * 18
    (found,) = ctx.raw["servers"]["generator"]
    assert found["mismatch"] == [] and found["how"] == "given"
    ctx, rows = built(config(tmp_path, model, {"url": by_hand}), ["allow_mismatch=true"], "allowed")
    assert {d["field"] for d in ctx.raw["servers"]["generator"][0]["mismatch"]} == {"deterministic", "dtype"}
    assert {r["status"] for r in rows} == {"ok"}


def test_ours_is_started_once_used_again_repeats_itself_and_goes_away(state, model, tmp_path, winnow):
    launch = {"device": "cpu", "dtype": "bfloat16", "max_total_tokens": 8192, "ready_timeout_s": 300}
    path = config(tmp_path, model, {"launch": launch})
    code, said = winnow("servers", "up", str(path))
    assert code == 0, said
    (record,) = launcher.running(state)
    tree = [p.pid for p in psutil.Process(record.pid).children(recursive=True)]
    assert len(tree) >= 2
    assert "would be reused" in winnow("servers", "check", str(path))[1]
    said = winnow("servers", "check", str(path), "--set", "servers.generator.0.launch.dtype=float32")[1]
    assert "would be restarted" in said and "float32" in said

    ctx, rows = built(path)
    assert ctx.raw["servers"]["generator"][0]["how"] == "reused"
    assert [(r["status"], r["seed_effective"]) for r in rows] == [("ok", True)] * 18
    # id for id and bit for bit from run.json alone
    (tmp_path / "heuristics.yaml").unlink()
    _, again = built(Path(ctx.store.path("run.json")), run="again")
    assert [(r["candidate_id"], r["output_ids"]) for r in again] == [(r["candidate_id"], r["output_ids"]) for r in rows]
    # greedy: every heuristic is one, and no seed matters
    _, greedy = built(Path(ctx.store.path("run.json")), ["generation.generator.temperature=0"], "greedy")
    assert len(greedy) == 6 and {r["status"] for r in greedy} == {"ok"}
    assert len({(r["prompt_id"], tuple(r["output_ids"])) for r in greedy}) == 2
    assert [r.url for r in launcher.running(state)] == [record.url]

    code, said = winnow("servers", "down", str(ctx.store.path("run.json")))
    assert code == 0 and record.url in said
    assert not launcher.running(state) and not any(map(psutil.pid_exists, [*tree, record.pid]))
