"""Real SGLang servers on the CPU: one started by hand otherwise than the run asks for, and one of ours that is reused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tasks.serving.launch import launcher
from tests.flows.real_sglang import by_hand, generated

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
HEURISTICS = {"sampling_pipelines": [
    {"name": "plain", "processors": []},
    {"name": "warm", "processors": [{"name": "temperature", "params": {"temperature": 0.8}}]},
    {"name": "typical", "processors": [{"name": "typical", "params": {"mass": 0.9}}]}]}


@pytest.fixture(scope="module")
def others(model, tmp_path_factory) -> Iterator[str]:
    """A dtype, and no word of seeds."""
    with by_hand(model, tmp_path_factory.mktemp("hand"), "--dtype=bfloat16") as url:
        yield url


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    yield folder
    launcher.stop_all(launcher.running(folder), 1)


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


def test_a_server_started_otherwise_is_refused_with_a_table_whose_mend_works(others, model, tmp_path, winnow):
    path = config(tmp_path, model, {"url": others})
    for command in (("run", str(path)), ("servers", "check", str(path))):
        code, said = winnow(*command)
        assert code == 2
        for words in ("deterministic", "dtype", "not set", "bfloat16"):
            assert words in said
    assert not list((tmp_path / "runs/test").glob("candidates/*"))
    ctx, rows = generated(config(tmp_path, model, {"url": others, "expect": {"deterministic": False, "dtype": "bf16"}}))
    assert [(r["status"], r["seed_effective"]) for r in rows] == [("ok", False)] * 18
    (found,) = ctx.raw["servers"]["generator"]
    assert found["mismatch"] == [] and found["how"] == "given"
    ctx, rows = generated(config(tmp_path, model, {"url": others}), ["allow_mismatch=true"], "allowed")
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

    ctx, rows = generated(path)
    assert ctx.raw["servers"]["generator"][0]["how"] == "reused"
    assert [(r["status"], r["seed_effective"]) for r in rows] == [("ok", True)] * 18
    # id for id and bit for bit from run.json alone
    (tmp_path / "heuristics.yaml").unlink()
    _, again = generated(Path(ctx.store.path("run.json")), run="again")
    assert [(r["candidate_id"], r["output_ids"]) for r in again] == [(r["candidate_id"], r["output_ids"]) for r in rows]
    # greedy: every heuristic is one, and no seed matters
    _, greedy = generated(Path(ctx.store.path("run.json")), ["generation.generator.temperature=0"], "greedy")
    assert len(greedy) == 6 and {r["status"] for r in greedy} == {"ok"}
    assert len({(r["prompt_id"], tuple(r["output_ids"])) for r in greedy}) == 2
    assert [r.url for r in launcher.running(state)] == [record.url]

    code, said = winnow("servers", "down", str(ctx.store.path("run.json")))
    assert code == 0 and record.url in said
    assert not launcher.running(state) and not any(map(psutil.pid_exists, [*tree, record.pid]))
