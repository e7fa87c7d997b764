from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest

from tasks.core.errors import UnreachableError
from tasks.core.tokenizer import decode
from tests.fake_sglang import FakeSGLang
from tests.runs import build, expecting, make_config

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
        ctx = build(expecting(make_config(tmp_path, tiny_model, [server.url]), deterministic=False), GENERATE)
        assert {r["seed_effective"] for r in rows_of(ctx)} == {False}


def test_failures_are_rows_and_repair_mends_what_can_be_mended(tmp_path, tiny_model):
    kinds = ["500", "truncate", "garbage", "400", "abort"]

    def fault(n: int, payload: dict) -> str | None:
        cell = payload["sampling_params"]["sampling_seed"]  # the cell's own, so that a retry fails as well
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
                server.crash()
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


# --- whoever serves, however it is cut into shards ---


def with_cuts(raw: dict) -> dict:
    """The config with heuristics of which every cut is one that the engine has itself."""
    path = Path(raw["heuristics"]["files"][0])
    cuts = {"min_p": {"min_p": 0.05}, "top_p": {"top_p": 0.9}, "top_k": {"top_k": 20}}
    path.write_text(json.dumps({"sampling_pipelines": [
        {"name": name, "processors": [{"name": "temperature", "params": {"temperature": 0.8}},
                                      {"name": name, "params": params}]} for name, params in cuts.items()]}))
    return raw


def test_servers_and_shards_do_not_change_a_row(tmp_path, tiny_model):
    with FakeSGLang() as one, FakeSGLang() as two, FakeSGLang() as three:
        servers = [one.url, two.url, three.url]
        runs = [build(make_config(tmp_path / str(n), tiny_model, servers[:n], engine={"shard_prompts": size}), GENERATE)
                for n, size in ((1, 5), (2, 1), (3, 2))]
        assert all(server.generations for server in (one, two, three))
    assert [ctx.shards for ctx in runs] == [1, 5, 3]
    wanted, *others = ([{k: v for k, v in row.items() if k != "dialect"} for row in rows_of(ctx, stable=True)]
                       for ctx in runs)
    assert others == [wanted, wanted]  # prompt by prompt, so the order is the same too


def test_seeds_and_heuristics_in_another_order_change_no_row(tmp_path, tiny_model):
    def by_id(ctx) -> dict[str, dict]:
        return {r["candidate_id"]: r for r in rows_of(ctx, stable=True)}

    with FakeSGLang() as server:
        one = by_id(build(make_config(tmp_path / "one", tiny_model, [server.url], seeds=[0, 1, 7]), GENERATE))
        raw = make_config(tmp_path / "two", tiny_model, [server.url], seeds=[7, 0, 1])
        path = Path(raw["heuristics"]["files"][0])
        grid = json.loads(path.read_text())
        grid["sampling_pipelines"].reverse()
        path.write_text(json.dumps(grid))
        assert by_id(build(raw, GENERATE)) == one


@pytest.mark.parametrize("honours", [True, False])
def test_seed_effective_is_what_the_server_does(tmp_path, tiny_model, honours):
    with FakeSGLang(deterministic=honours, fault=lambda n, p: "400" if n % 7 == 0 else None) as server:
        raw = expecting(make_config(tmp_path, tiny_model, [server.url]), deterministic=honours)
        rows = rows_of(build(raw, GENERATE))
    assert {r["seed_effective"] for r in rows} == {honours}
    assert {r["status"] for r in rows} == {"ok", "rejected"}


def test_each_row_of_a_mixed_fleet_tells_its_own_servers_truth(tmp_path, tiny_model):
    """Native cuts kill a server that honours seeds, or tie its rows to their neighbours': they go to the other only."""
    with FakeSGLang(deterministic=True, delay_s=0.002) as seeded, FakeSGLang(deterministic=False, delay_s=0.002) as plain:
        raw = with_cuts(make_config(tmp_path, tiny_model, [seeded.url, plain.url], seeds=[0, 1, 2, 3]))
        expecting(raw, deterministic=False, only=[plain.url])
        for server in raw["servers"]["generator"]:
            server["max_in_flight"] = 3
        # what failed at one of them is tried at the other, compiled anew
        tried: collections.Counter[str] = collections.Counter()

        def once(n: int, payload: dict) -> str | None:
            tried[payload["rid"]] += 1
            return "500" if payload["sampling_params"]["sampling_seed"] % 3 == 0 and tried[payload["rid"]] == 1 else None

        seeded.fault = plain.fault = once
        rows = rows_of(build(raw, GENERATE))
        sent = {server.url: {r["rid"]: r for r in server.generations} for server in (seeded, plain)}
    assert min(len(s) for s in sent.values()) > 5
    assert set(sent[seeded.url]) & set(sent[plain.url])
    for payload in sent[seeded.url].values():
        params = payload["sampling_params"]
        assert (params["min_p"], params["top_k"], params["top_p"]) == (0.0, -1, 1.0)
        assert payload["custom_logit_processor"]
    assert {p["sampling_params"]["min_p"] for p in sent[plain.url].values()} == {0.0, 0.05}
    assert len(rows) == 60
    for row in rows:
        payload = sent[row["server"]][row["candidate_id"]]
        assert row["status"] == "ok"
        assert row["seed_effective"] is (row["server"] == seeded.url)
        assert json.loads(row["sampling_params"]) == payload["sampling_params"]
        assert payload["sampling_params"]["sampling_seed"] == row["request_seed"]
        assert row["dialect"] == ("sequential" if row["server"] == seeded.url else "joint")
