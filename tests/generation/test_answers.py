"""What a shard's journal and damaged files still give, through real runs against a fake server."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.context import Context
from tasks.core.errors import InputError, InterruptedRun, StorageError
from tasks.generation import grid as grid_module
from tasks.generation.answers import Answers
from tasks.generation.candidates import Candidates
from tasks.generation.grid import Grid
from tasks.generation.prompts import read_shard
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

GENERATE = ["generate", "verify"]
VOLATILE = ("latency_s", "attempts", "server")
FILE = "candidates/seed=0/shard-0000.parquet"


def stable(ctx: Context, pattern: str = "candidates/*/*.parquet") -> dict[str, list[dict]]:
    """Every row of every file, in order, without what differs from run to run."""
    return {path: ctx.store.read(path).drop_columns(list(VOLATILE)).to_pylist() for path in ctx.store.glob(pattern)}


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    with FakeSGLang() as server:
        yield server


@pytest.fixture
def one_shard(tmp_path, tiny_model, server, monkeypatch) -> tuple[dict, Context, dict, dict]:
    """A finished run of one shard with five row groups a seed: (config, context, candidates, verified)."""
    monkeypatch.setattr(grid_module, "BLOCK_ROWS", 8)
    raw = make_config(tmp_path, tiny_model, [server.url], engine={"shard_prompts": 5})
    ctx = build(raw, GENERATE)
    assert pq.ParquetFile(ctx.store.path(FILE)).num_row_groups == 5
    out = raw, ctx, stable(ctx), stable(ctx, "verified/*.parquet")
    server.requests.clear()
    return out


def rewrite(ctx: Context, change: Callable[[pa.Table], pa.Table], path: str = FILE) -> None:
    """What somebody does who opens the file, changes it and writes it back."""
    table = change(pq.read_table(ctx.store.path(path)))
    pq.write_table(table, ctx.store.path(path))


def without(n: int) -> Callable[[pa.Table], pa.Table]:
    return lambda t: pa.concat_tables([t.slice(0, n), t.slice(n + 1)])


def edited(n: int, column: str, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(column)
        values = table.column(at).to_pylist()
        values[n] = value
        return table.set_column(at, table.field(at), pa.array(values, table.field(at).type))
    return change


def swapped(one: int, other: int) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        order = list(range(table.num_rows))
        order[one], order[other] = order[other], order[one]
        return table.take(order)
    return change


@pytest.mark.parametrize(("change", "lost"), [
    (without(7), [7]), (without(0), [0]), (without(19), [19]), (swapped(3, 12), []),
    (lambda t: pa.concat_tables([t.slice(0, 6), t.slice(5)]), [5]), (lambda t: pa.concat_tables([t, t.slice(2, 1)]), [2]),
    (edited(4, "text", "made up"), [4]), (edited(4, "output_ids", [72, 105]), [4]), (edited(4, "output_ids", None), [4]),
    (edited(4, "output_ids", [72, -1]), [4]), (edited(4, "output_logprobs", [0.0]), [4]), (edited(4, "text", None), [4]),
    (edited(4, "status", "timeout"), [4]), (edited(4, "request_seed", 1), [4]), (edited(4, "prompt_ids", [1]), [4]),
    (edited(4, "candidate_id", "0" * 32), [4]), (edited(4, "model", "another"), [4]), (edited(4, "source", None), [4]),
    (lambda t: t.slice(0, 0), list(range(20))), (lambda t: t.drop_columns(["text"]), list(range(20))),
], ids=["row deleted", "first row deleted", "last row deleted", "rows swapped", "row twice in a row", "row twice, far apart",
        "text edited", "ids edited", "ids gone", "ids negative", "logprobs cut", "text gone", "status edited", "seed edited",
        "prompt edited", "id edited", "model edited", "source gone", "no rows", "a column gone"])
def test_a_file_that_was_rewritten_is_made_right_with_only_its_wrong_rows_asked_again(
        one_shard, server, caplog, change, lost):
    raw, ctx, before, verified = one_shard
    rewrite(ctx, change)
    with caplog.at_level(logging.WARNING, "winnow"):
        again = build(raw, GENERATE)
    wanted = [before[FILE][n]["candidate_id"] for n in lost]
    assert sorted(r["rid"] for r in server.requests) == sorted(wanted)
    assert stable(again) == before
    assert stable(again, "verified/*.parquet") == verified
    assert FILE in caplog.text
    if len(lost) == 1:
        row = before[FILE][lost[0]]
        heuristic = next(h.name for h in again.heuristics if h.id == row["heuristic_id"])
        assert f"prompt {row['prompt_id'][:12]}, {heuristic}, seed 0" in caplog.text


@pytest.mark.parametrize("group", [0, 2, 4])
def test_a_flipped_byte_in_a_row_group_costs_that_row_group_and_is_said(one_shard, server, caplog, group):
    raw, ctx, before, _ = one_shard
    path = Path(ctx.store.path(FILE))
    column = pq.ParquetFile(path).metadata.row_group(group).column(before[FILE][0].keys().__len__() // 2)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 4
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "winnow"):
        again = build(raw, GENERATE)
    assert sorted(r["rid"] for r in server.requests) == sorted(r["candidate_id"] for r in before[FILE][4 * group:][:4])
    assert stable(again) == before
    assert f"row group {group} is lost" in caplog.text
    assert "4 candidates are missing" in caplog.text


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999])
def test_a_file_cut_short_is_made_again_and_said_so(one_shard, server, caplog, keep):
    raw, ctx, before, _ = one_shard
    path = Path(ctx.store.path(FILE))
    content = path.read_bytes()
    path.write_bytes(content[:int(keep if keep in (0, 1) else keep * len(content))])
    with caplog.at_level(logging.WARNING, "winnow"):
        again = build(raw, GENERATE)
    assert len(server.requests) == 20
    assert stable(again) == before
    assert f"{FILE}: nothing of it can be read" in caplog.text


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_file_of_another_run_is_not_taken_for_this_ones(one_shard, server, tiny_model, tmp_path, with_manifest):
    raw, ctx, before, _ = one_shard
    other = build(raw | {"run": "other", "run_seed": 1}, GENERATE)
    server.requests.clear()
    for path in [FILE, *([f"manifests/{FILE}.json"] if with_manifest else [])]:
        shutil.copy(other.store.path(path), ctx.store.path(path))
    assert stable(build(raw, GENERATE)) == before
    assert len(server.requests) == 20


def test_rows_under_another_chat_template_are_not_taken_for_this_ones(one_shard, server, tmp_path):
    raw, ctx, before, _ = one_shard
    model = tmp_path / "other/tiny"
    shutil.copytree(raw["model"]["path"], model)
    other_template(model)
    other = build(raw | {"run": "other", "model": {"path": str(model)}}, GENERATE)
    server.requests.clear()
    rows = pq.read_table(other.store.path(FILE)).to_pylist()
    assert [r["prompt_ids"] for r in rows] != [r["prompt_ids"] for r in before[FILE]]
    # a careful forger: everything but the prompt's ids is this run's
    pq.write_table(pq.read_table(ctx.store.path(FILE)).set_column(
        5, "prompt_ids", pa.array([r["prompt_ids"] for r in rows], pa.list_(pa.int32()))), ctx.store.path(FILE))
    assert stable(build(raw, GENERATE)) == before
    assert len(server.requests) == 20


def other_template(model: Path) -> None:
    path = next(p for p in (model / "chat_template.jinja", model / "tokenizer_config.json") if p.exists())
    path.write_text(path.read_text().replace("assistant", "scribe"))


def test_wrong_bytes_in_verified_are_made_right_without_a_request(one_shard, server, caplog):
    raw, ctx, before, verified = one_shard
    path = Path(ctx.store.path("verified/shard-0000.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "winnow"):
        again = build(raw, GENERATE)
    assert server.requests == []
    assert "verified/shard-0000.parquet" in caplog.text
    assert (stable(again), stable(again, "verified/*.parquet")) == (before, verified)


def test_wrong_bytes_in_the_prompts_are_made_right_without_a_request(one_shard, server, caplog):
    raw, ctx, before, verified = one_shard
    path = Path(ctx.store.path("prompts.parquet"))
    good = pq.read_table(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "winnow"):
        again = build(raw, GENERATE)
    assert "prompts.parquet: its bytes are not what its manifest says" in caplog.text
    assert pq.read_table(path).equals(good)
    assert server.requests == []
    assert (stable(again), stable(again, "verified/*.parquet")) == (before, verified)


def test_answers_that_were_cut_or_failed_are_kept_when_a_neighbour_is_lost(tmp_path, tiny_model, server):
    """Asking for them again would repeat what was answered."""
    server.fault = lambda n, p: "400" if p["sampling_params"]["sampling_seed"] % 4 == 0 else None
    whole = server.write

    def cut(payload: dict) -> dict:
        answer = whole(payload)
        if payload["sampling_params"]["sampling_seed"] % 4 == 1:  # a context that was full
            answer["meta_info"]["finish_reason"] = {"type": "length"}
        return answer

    server.write = cut  # type: ignore[method-assign]
    raw = make_config(tmp_path, tiny_model, [server.url], engine={"shard_prompts": 5}, limits={"incomplete_prompts": "keep"})
    ctx = build(raw, GENERATE)
    before, facts = stable(ctx), ctx.store.manifest("verified/shard-0000.parquet").facts
    assert facts["defects"]["truncated"] > 3
    assert facts["defects"]["rejected"] > 3
    server.requests.clear()
    rewrite(ctx, without(3))
    again = build(raw, GENERATE)
    assert [r["rid"] for r in server.requests] == [before[FILE][3]["candidate_id"]]
    assert stable(again) == before


# --- the journal ---


@pytest.fixture
def stopped(tmp_path, tiny_model, server, monkeypatch) -> tuple[dict, Path]:
    """A run that was stopped with all of its one shard answered and no file written; (config, its journal)."""
    raw = make_config(tmp_path, tiny_model, [server.url], engine={"shard_prompts": 5})

    def stop(*_: object) -> None:
        raise InterruptedRun("stopped")

    with monkeypatch.context() as patch, pytest.raises(InterruptedRun):
        patch.setattr("tasks.generation.candidates.write_seed", stop)
        build(raw, ["generate"])
    server.requests.clear()
    path = Path(raw["runs_dir"]) / "test/journal/candidates/shard-0000.jsonl"
    assert len(path.read_bytes().splitlines()) == 40
    return raw, path


def plain(tmp_path: Path, tiny_model: Path, server: FakeSGLang, **changes: object) -> dict[str, list[dict]]:
    """The rows of a run that nobody disturbed."""
    out = stable(build(make_config(tmp_path / "calm", tiny_model, [server.url], engine={"shard_prompts": 5}) | changes, GENERATE))
    server.requests.clear()
    return out


def test_answers_in_a_journal_are_not_asked_again(stopped, server, tmp_path, tiny_model):
    wanted = plain(tmp_path, tiny_model, server)
    assert stable(build(stopped[0], GENERATE)) == wanted
    assert server.requests == []
    assert not stopped[1].exists()


@pytest.mark.parametrize("spoil", [
    lambda lines: [*lines[:-1], lines[-1][:-20]], lambda lines: [*lines[:-1], lines[-1][:-1] + b"\x00" * 4096],
    lambda lines: [b"garbage\n", *lines[:-1], b"{}\n", b"[]\n"],
    lambda lines: [*lines[:-1], changed(lines[-1], id="0" * 32)], lambda lines: [*lines[:-1], changed(lines[-1], cell=None)],
    lambda lines: [*lines[:-1], changed(lines[-1], of="another seed")],
    lambda lines: [*lines[:-1], changed(lines[-1], cell=10**6, id=7)],
], ids=["torn", "zeros", "garbage", "another id", "no cell and no number", "another seed", "an id that is none"])
def test_a_line_that_is_not_whole_or_not_of_this_plan_is_asked_again_and_no_other(
        stopped, server, tmp_path, tiny_model, spoil, request):
    raw, path = stopped
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(spoil(lines)))
    wanted = plain(tmp_path, tiny_model, server)
    assert stable(build(raw, GENERATE)) == wanted
    found_by_its_id = "no cell" in request.node.callspec.id
    assert [r["rid"] for r in server.requests] == ([] if found_by_its_id else [json.loads(lines[-1])["id"]])


def changed(line: bytes, **values: object) -> bytes:
    return orjson.dumps(json.loads(line) | values) + b"\n"


def test_another_chat_template_is_another_run(server, tmp_path, tiny_model):
    """Stopped in the first shard, the template mended, run again: answers to the old prompt must not be mixed in."""
    moved = tmp_path / "moved" / tiny_model.name
    shutil.copytree(tiny_model, moved)
    raw = make_config(tmp_path, moved, [server.url], run="moved", engine={"shard_prompts": 5})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRun):
        def stop(*_: object) -> None:
            raise InterruptedRun("stopped")
        patch.setattr("tasks.generation.candidates.write_seed", stop)
        build(raw, ["generate"])
    server.requests.clear()
    other_template(moved)
    forget_tokenizers()
    with pytest.raises(InputError, match=r"generation\.generator\.chat_template: was '\w{32}', now '\w{32}'"):
        build(raw, GENERATE)
    assert not server.requests
    prompts = read_shard(build(raw | {"run": "again"}, GENERATE).store, 0)
    assert len(server.requests) == 40
    assert prompts.column("prompt_ids") != read_shard(Context(f"{tmp_path}/runs/moved").store, 0).column("prompt_ids")


def forget_tokenizers() -> None:
    from tasks.core import tokenizer

    tokenizer._load.cache_clear()


def test_heuristics_in_another_order_lose_no_answer(stopped, server, tmp_path):
    raw, _ = stopped
    path = Path(raw["heuristics"]["files"][0])
    grid = json.loads(path.read_text())
    grid["sampling_pipelines"].reverse()
    path.write_text(json.dumps(grid))
    ctx = build(raw, GENERATE)
    assert server.requests == []
    order = [h.id for h in ctx.heuristics] * 5
    assert [r["heuristic_id"] for r in stable(ctx)[FILE]] == order
    grid["sampling_pipelines"].reverse()
    path.write_text(json.dumps(grid))  # and back, now with files that stand
    ctx = build(raw, GENERATE)
    assert server.requests == []
    assert [r["heuristic_id"] for r in stable(ctx)[FILE]] == [h.id for h in ctx.heuristics] * 5


@pytest.fixture
def answers(stopped) -> Iterator[Answers]:
    ctx = Context(f"{stopped[0]['runs_dir']}/test")
    found = Answers(ctx.store.journal(Candidates().journal(0)), Grid(ctx, 0))
    yield found
    found.journal.close()


def test_the_last_answer_of_a_cell_counts(answers):
    cell = answers.grid.cell(7)
    answers.add(cell, {"status": "timeout"})
    answers.add(cell, {"status": "ok", "server": "x"})
    assert answers.get(7)["server"] == "x"
    again = Answers(answers.journal, answers.grid)
    assert again.get(7) == answers.get(7)
    assert again.have().sum() == 40
    assert [again.get(n)["id"] for n in range(40)] == [answers.grid.cell(n).candidate_id for n in range(40)]


def test_suspicion_of_a_crash_outlives_the_process_and_is_no_answer(answers):
    answers.journal.remove()
    fresh = Answers(answers.journal, answers.grid)
    fresh.suspect(fresh.grid.cell(3), 1)
    assert not Answers(answers.journal, answers.grid).have().any()
    assert Answers(answers.journal, answers.grid).crashes == {3: 1}


def test_a_cell_whose_answer_found_no_room_is_still_owed(answers, monkeypatch):
    answers.journal.remove()
    fresh = Answers(answers.journal, answers.grid)
    monkeypatch.setattr(fresh.journal, "path", Path("/dev/full"))
    with pytest.raises(StorageError):
        fresh.add(fresh.grid.cell(3), {"status": "ok"})
    assert not fresh.have().any()
