from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.context import Context
from tasks.core.heuristics import Heuristic, Processor
from tasks.generation import grid as grid_module
from tasks.generation.grid import Cell, Grid, check
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode()


def defects(cells: list[Cell], rows: list[dict]) -> dict[str, str]:
    return {d.cell.candidate_id: d.kind for d in check(cells, rows, Bytes(), 8, "m")}


H = Heuristic("h", (Processor("temperature", 1.0),))
CELLS = [Cell(n, f"c{n}", {"prompt_id": f"p{n}"}, H, H.id, 0, n) for n in range(6)]


def row(cell: Cell, **changes) -> dict:
    return {"candidate_id": cell.candidate_id, "prompt_id": cell.prompt["prompt_id"], "heuristic_id": H.id, "seed": 0,
            "request_seed": cell.request_seed, "status": "ok", "model": "m", "output_ids": list(b"hi"), "text": "hi",
            "finish_reason": "stop"} | changes


DEFECTS = {
    "missing": lambda c: [], "duplicate": lambda c: [row(c), row(c)], "timeout": lambda c: [row(c, status="timeout")],
    "undecodable": lambda c: [row(c, text="ho")], "too_long": lambda c: [row(c, output_ids=list(b"x" * 9), text="x" * 9)],
    "wrong_cell": lambda c: [row(c, request_seed=99)], "wrong_model": lambda c: [row(c, model="another")],
    "truncated": lambda c: [row(c, finish_reason="length")], None: lambda c: [row(c)],
}


@given(st.lists(st.sampled_from(list(DEFECTS)), min_size=6, max_size=6))
def test_each_defect_is_found_in_its_cell_and_nowhere_else(kinds):
    rows = [r for cell, kind in zip(CELLS, kinds, strict=True) for r in DEFECTS[kind](cell)]
    assert defects(CELLS, rows) == {c.candidate_id: k for c, k in zip(CELLS, kinds, strict=True) if k}


def test_an_answer_as_long_as_it_may_be_is_no_defect():
    assert defects(CELLS[:1], [row(CELLS[0], output_ids=list(b"x" * 8), text="x" * 8, finish_reason="length")]) == {}


def test_an_edited_text_is_damage_however_long_the_answer_is():
    long = row(CELLS[0], output_ids=list(b"x" * 9), text="y")
    assert defects(CELLS[:1], [long]) == {"c0": "undecodable"}


def test_rows_of_other_cells_are_no_defect_of_these():
    assert defects(CELLS[:2], [row(c) for c in CELLS]) == {}


def test_a_defect_names_its_cell():
    (defect,) = check(CELLS[:1], [], Bytes(), 8, "m")
    assert defect.describe() == {"candidate_id": "c0", "prompt_id": "p0", "heuristic": "h", "seed": 0,
                                 "defect": "missing"}


# --- the stage, over a shard of many row groups ---

STAGES = ["generate", "verify"]
FILE = "verified/shard-0000.parquet"


def kind(request_seed: int) -> int:
    return request_seed % 8


def kind_of(payload: dict[str, Any]) -> int:
    return kind(payload["sampling_params"]["sampling_seed"])


class Faulty:
    """Of eight cells one is always refused, one always fails, and one fails once."""

    def __init__(self) -> None:
        self.sent: collections.Counter[str] = collections.Counter()

    def __call__(self, _: int, payload: dict[str, Any]) -> str | None:
        self.sent[payload["rid"]] += 1
        if kind_of(payload) == 2 and self.sent[payload["rid"]] > 1:
            return None
        return {0: "400", 1: "500", 2: "500"}.get(kind_of(payload))


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch):
    """Build one shard of ten row groups, with some cells that fail; (context, rows, manifest's facts, sent)."""
    monkeypatch.setattr(grid_module, "BLOCK_ROWS", 8)

    def make(policy: str, fault: Any = None, name: str = "test") -> tuple[Context, list[dict], dict[str, Any], Any]:
        with FakeSGLang(fault=(fault := fault or Faulty())) as server:
            raw = make_config(tmp_path, tiny_model, [server.url], run=name, engine={"shard_prompts": 5}, seeds=[2, 0, 1],
                              limits={"attempts": 1, "incomplete_prompts": policy})
            ctx = build(raw, STAGES)
        manifest = ctx.store.manifest(FILE)
        assert manifest is not None
        return ctx, ctx.store.read(FILE).to_pylist(), manifest.facts, fault
    return make


@pytest.mark.parametrize("policy", ["repair", "keep", "drop"])
def test_rows_are_in_plan_order_whole_prompts_a_row_group(run, policy):
    ctx, rows, facts, _ = run(policy)
    grid = Grid(ctx, 0)
    assert [r["candidate_id"] for r in rows] == [grid.cell(n).candidate_id for n in range(len(grid))]
    parquet = pq.ParquetFile(ctx.store.path(FILE))
    assert [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)] == [12] * 5
    for nth, seed in enumerate(grid.seeds):
        path = f"candidates/seed={seed}/shard-0000.parquet"
        of_seed = [r for r in rows if r["seed"] == seed]
        assert [r | {"usable": None} for r in of_seed] == [
            r | {"usable": None} for r in ctx.store.read(path).to_pylist()]
        assert [r["candidate_id"] for r in of_seed] == [c.candidate_id for b in range(grid.blocks)
                                                        for c in grid.block(b, nth)]
    assert facts["planned"] == 60
    assert facts["usable"] == sum(r["usable"] for r in rows)


def test_repair_asks_for_what_may_be_mended_once_and_counts_what_was(run):
    _, rows, facts, fault = run("repair")
    of_cell = {r["candidate_id"]: kind(r["request_seed"]) for r in rows}
    kinds = collections.Counter(of_cell.values())
    assert min(kinds[n] for n in range(3)) > 0
    assert all(n == (2 if of_cell[rid] in (1, 2) else 1) for rid, n in fault.sent.items())
    assert facts["repaired"] == kinds[2]
    assert facts["defects"] == {"rejected": kinds[0], "server_error": kinds[1]}
    assert facts["attempts"] == 60 + kinds[1] + kinds[2] == sum(r["attempts"] for r in rows)
    assert [r["status"] for r in rows] == [
        {0: "rejected", 1: "server_error"}.get(kind(r["request_seed"]), "ok") for r in rows]
    assert all(r["usable"] == (r["status"] == "ok") for r in rows)


def test_repaired_rows_equal_those_of_a_run_without_faults_and_stand_where_they_do(run):
    def mendable(_: int, payload: dict[str, Any]) -> str | None:
        sent[payload["rid"]] += 1
        return "500" if kind_of(payload) < 5 and sent[payload["rid"]] == 1 else None

    sent: collections.Counter[str] = collections.Counter()
    _, wanted, _, _ = run("repair", lambda n, p: None, "calm")
    _, rows, facts, _ = run("repair", mendable)
    volatile = dict.fromkeys(("latency_s", "attempts", "server"))
    assert [r | volatile for r in rows] == [r | volatile for r in wanted]
    assert (facts["repaired"], facts["defects"]) == (sum(n > 1 for n in sent.values()), {})
    assert facts["repaired"] > 20


def test_what_failed_is_asked_once_and_keeps_its_prompt_under_keep(run):
    _, rows, facts, fault = run("keep")
    assert set(fault.sent.values()) == {1}
    assert facts["repaired"] == 0
    assert facts["dropped_prompts"] == []
    assert facts["usable"] == 60 - sum(facts["defects"].values())
    assert all(r["usable"] == (r["status"] == "ok") for r in rows)


def test_a_prompt_with_a_bad_cell_is_left_out_under_drop(run):
    _, rows, facts, _ = run("drop", lambda n, p: "400" if n in (0, 59) else None)
    bad = {r["prompt_id"] for r in rows if r["status"] == "rejected"}
    assert len(rows) == 60
    assert sorted(bad) == facts["dropped_prompts"]
    assert {r["prompt_id"] for r in rows if not r["usable"]} == bad
    assert all(not r["usable"] for r in rows if r["prompt_id"] in bad)
    assert facts["usable"] == 60 - 12 * len(bad) > 0


def test_the_manifest_names_the_bad_cells(run):
    ctx, rows, facts, _ = run("keep")
    names = {h.id: h.name for h in ctx.heuristics}
    assert facts["cells"] == [
        {"candidate_id": r["candidate_id"], "prompt_id": r["prompt_id"], "heuristic": names[r["heuristic_id"]],
         "seed": r["seed"], "defect": r["status"]} for r in rows if r["status"] != "ok"]
    assert json.loads(Path(ctx.store.path(f"manifests/{FILE}.json")).read_text())["facts"]["cells"] == facts["cells"]


def test_answers_that_end_at_the_limit_are_counted(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], engine={"shard_prompts": 5}, generation={"max_new_tokens": 20})
        ctx = build(raw, STAGES)
    rows = ctx.store.read(FILE).to_pylist()
    cut = [r for r in rows if r["finish_reason"] == "length"]
    assert 0 < len(cut) < len(rows)
    assert all(len(r["output_ids"]) == 20 and r["usable"] for r in cut)
    manifest = ctx.store.manifest(FILE)
    assert manifest is not None
    assert manifest.facts["at_max_new_tokens"] == len(cut)
    assert manifest.facts["tokens"] == sum(len(r["output_ids"]) for r in rows)


def test_answers_without_text_are_rows_that_nobody_asks_for_again(tmp_path, tiny_model):
    with FakeSGLang() as server:
        whole = server.write

        def silent(payload: dict[str, Any]) -> dict[str, Any]:
            answer = whole(payload)
            if kind_of(payload) == 0:
                answer["output_ids"] = [server.eos]
                answer["meta_info"] |= {"output_token_logprobs": [[-0.5, server.eos, None]], "completion_tokens": 1}
            return answer

        server.write = silent  # type: ignore[method-assign]
        ctx = build(make_config(tmp_path, tiny_model, [server.url], engine={"shard_prompts": 5}), STAGES)
        assert len(server.requests) == 40
    rows = ctx.store.read(FILE).to_pylist()
    empty = [r for r in rows if r["status"] == "empty"]
    assert {r["candidate_id"] for r in empty} == {r["candidate_id"] for r in rows if kind(r["request_seed"]) == 0} != set()
    assert all(r["error"] and r["output_ids"] == [256] and not r["usable"] for r in empty)
