from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.core.errors import UnreachableError
from tasks.core.tokenizer import decode
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

GENERATE = ["generate", "verify"]
VOLATILE = ("latency_s", "attempts", "server")


def rows_of(ctx, stable: bool = False) -> list[dict]:
    out = [r for n in range(ctx.shards) for r in ctx.store.read(f"verified/shard-{n:04d}.parquet").to_pylist()]
    return [{k: v for k, v in r.items() if k not in VOLATILE} for r in out] if stable else out


def test_every_cell_is_asked_once_with_ids_and_a_seed_of_its_own(tmp_path, tiny_model):
    with FakeSGLang() as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), GENERATE)
        rows, sent = rows_of(ctx), server.generations
    assert len(rows) == len(sent) == 5 * 4 * 2
    assert len({(r["prompt_id"], r["heuristic_id"], r["seed"]) for r in rows}) == 40
    assert len({r["sampling_params"]["sampling_seed"] for r in sent}) == 40
    assert all("text" not in r and r["input_ids"][0] == 257 for r in sent)
    by_rid = {r["rid"]: r for r in sent}
    for row in rows:
        request = by_rid[row["candidate_id"]]
        assert row["prompt_ids"] == request["input_ids"]
        assert json.loads(row["sampling_params"]) == request["sampling_params"]
        assert row["request_seed"] == request["sampling_params"]["sampling_seed"]
        assert row["text"] == decode(ctx.tokenizer, row["output_ids"])
        assert len(row["output_logprobs"]) == len(row["output_ids"]) == row["completion_tokens"]
        assert (row["status"], row["seed_effective"], row["usable"]) == ("ok", True, True)


def test_the_answer_does_not_depend_on_shards_servers_or_order(tmp_path, tiny_model):
    with FakeSGLang() as a, FakeSGLang() as b:
        one = build(make_config(tmp_path / "1", tiny_model, [a.url], engine={"shard_prompts": 5}), GENERATE)
        two = build(make_config(tmp_path / "2", tiny_model, [a.url, b.url], engine={"shard_prompts": 1}), GENERATE)
        assert sorted(rows_of(one, stable=True), key=str) == sorted(rows_of(two, stable=True), key=str)


def test_a_server_that_ignores_seeds_is_recorded_as_such(tmp_path, tiny_model):
    with FakeSGLang(deterministic=False) as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), GENERATE)
        assert {r["seed_effective"] for r in rows_of(ctx)} == {False}


def test_failures_are_rows_and_repair_mends_what_can_be_mended(tmp_path, tiny_model):
    kinds = ["500", "truncate", "garbage", "400", "abort"]

    def fault(n: int, payload: dict) -> str | None:
        cell = int(payload["rid"][:8], 16)  # of its content, so that a retry fails as well
        return kinds[cell % 10] if cell % 10 < 5 else None

    with FakeSGLang(fault=fault) as server:
        raw = make_config(tmp_path, tiny_model, [server.url], limits={"attempts": 2, "incomplete_prompts": "keep"})
        ctx = build(raw, GENERATE)
        rows = rows_of(ctx)
        statuses = collections.Counter(r["status"] for r in rows)
        assert len(rows) == 40
        assert statuses["ok"] + sum(n for k, n in statuses.items() if k != "ok") == 40
        assert set(statuses) >= {"ok", "server_error", "bad_response", "rejected", "aborted"}
        assert all((r["status"] == "ok") == r["usable"] == (r["error"] is None) for r in rows)
        server.fault = None
        mended = rows_of(build(raw | {"run": "again", "limits": {"incomplete_prompts": "repair"}}, GENERATE))
        assert {r["status"] for r in mended} == {"ok"}


def test_repair_asks_for_exactly_the_failed_cells(tmp_path, tiny_model):
    with FakeSGLang(fault=lambda n, p: "500" if n in (3, 11) else None) as server:
        raw = make_config(tmp_path, tiny_model, [server.url], limits={"attempts": 1, "incomplete_prompts": "repair"})
        ctx = build(raw, GENERATE)
        asked = collections.Counter(r["rid"] for r in server.generations)
        assert sorted(asked.values()) == [1] * 38 + [2] * 2
        twice = {rid for rid, n in asked.items() if n == 2}
        assert {r["candidate_id"] for r in rows_of(ctx) if r["attempts"] == 2} == twice
        facts = [ctx.store.manifest(f"verified/shard-{n:04d}.parquet").facts for n in range(ctx.shards)]
        assert (sum(f["repaired"] for f in facts), sum(f["usable"] for f in facts)) == (2, 40)


def test_policy_drop_leaves_out_prompts_with_failed_cells(tmp_path, tiny_model):
    with FakeSGLang(fault=lambda n, p: "400" if n == 0 else None) as server:
        raw = make_config(tmp_path, tiny_model, [server.url], limits={"incomplete_prompts": "drop"})
        rows = rows_of(build(raw, GENERATE))
        bad = {r["prompt_id"] for r in rows if r["status"] != "ok"}
        assert len(rows) == 40
        assert {r["prompt_id"] for r in rows if not r["usable"]} == bad
        assert len(bad) == 1


def test_a_finished_run_sends_nothing_and_a_lost_file_only_itself(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url])
        ctx = build(raw, GENERATE)
        before = rows_of(ctx, stable=True)
        server.requests.clear()
        build(raw, GENERATE)
        assert server.requests == []
        ctx.store.remove("candidates/seed=1/shard-0001.parquet")
        again = build(raw, GENERATE)
        assert len(server.requests) == 2 * 4
        assert rows_of(again, stable=True) == before


def test_a_file_with_other_bytes_is_made_again_and_said_so(tmp_path, tiny_model, caplog):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url])
        ctx = build(raw, GENERATE)
        before = rows_of(ctx, stable=True)
        path = Path(ctx.store.path("candidates/seed=0/shard-0000.parquet"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        with caplog.at_level("WARNING", logger="winnow"):
            again = build(raw, GENERATE)
        assert "candidates/seed=0/shard-0000.parquet" in caplog.text
        assert rows_of(again, stable=True) == before


def test_with_no_server_left_nothing_is_written_off(tmp_path, tiny_model):
    raw = make_config(tmp_path, tiny_model, [])
    with FakeSGLang() as server:
        raw["servers"] = {"generator": [{"url": server.url, "max_in_flight": 4}]}
        raw["limits"] = {"wait_for_servers_s": 0.5}
        gone = False

        def fault(n: int, payload: dict) -> str | None:
            nonlocal gone
            if n == 10:
                gone = True
                server._loop.call_soon_threadsafe(server._stop.set)
            return "hang" if gone else None

        server.fault = fault
        with pytest.raises(UnreachableError):
            build(raw, GENERATE)
        answered = len(server.generations)
    with FakeSGLang() as server:
        raw["servers"] = {"generator": [{"url": server.url}]}
        rows = rows_of(build(raw, GENERATE))
        assert {r["status"] for r in rows} == {"ok"}
        assert len(server.generations) + answered - 40 <= 5  # what was in flight, at most


PROGRAM = """
import json, sys
sys.path.insert(0, {root!r})
from tests.runs import build
build(json.load(open(sys.argv[1])), ["generate", "verify"])
print("finished", flush=True)
"""


def test_a_run_killed_again_and_again_equals_an_undisturbed_one(tmp_path, tiny_model):
    root = str(Path(__file__).parents[2])
    with FakeSGLang(delay_s=0.08) as server:
        undisturbed = rows_of(build(make_config(tmp_path / "calm", tiny_model, [server.url]), GENERATE), stable=True)
        server.requests.clear()
        raw = make_config(tmp_path / "killed", tiny_model, [server.url])
        raw["servers"]["generator"][0]["max_in_flight"] = 2
        path = tmp_path / "raw.json"
        path.write_text(json.dumps(raw))
        kills = 0
        for n in (3, 9, 20, 31):
            process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(root=root), str(path)], cwd=root)
            while process.poll() is None and len(server.requests) < n + kills * 2:
                time.sleep(0.01)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.wait()
        ctx = build(raw, GENERATE)
        assert kills == 4
        assert rows_of(ctx, stable=True) == undisturbed
        assert len(server.requests) <= 40 + kills * 2  # sent twice: at most what was in flight
        assert not Path(ctx.store.path("journal")).exists() or not any(Path(ctx.store.path("journal")).rglob("*.jsonl"))
