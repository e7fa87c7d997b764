from __future__ import annotations

import duckdb
from hypothesis import given
from hypothesis import strategies as st

from tasks.core import schema
from tasks.publish.dataset import split_prompts
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config


@given(st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=30), st.floats(0, 0.99), st.integers(0, 5))
def test_a_split_has_its_share_and_never_all(prompts, share, seed):
    validation = split_prompts(prompts, share, seed)
    assert validation < prompts
    assert len(validation) >= min(share * len(prompts), len(prompts) - 1)
    assert validation == split_prompts(set(sorted(prompts, reverse=True)), share, seed)


def test_the_dataset_holds_the_kept_rows_whole_and_splits_by_prompt(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], dataset={"validation": 0.3}, scoring={"incorrect": "keep"})
        ctx = build(raw)
    kept = {r["candidate_id"] for n in range(ctx.shards)
            for r in ctx.store.read(f"scores/shard-{n:04d}.parquet").to_pylist() if r["kept"]}
    parts = {s: ctx.store.read(f"dataset/{s}.parquet") for s in ("train", "validation")}
    rows = {s: t.to_pylist() for s, t in parts.items()}
    assert len(kept) == 5 * 2
    assert {r["candidate_id"] for part in rows.values() for r in part} == kept
    assert sum(map(len, rows.values())) == len(kept)
    assert not {r["prompt_id"] for r in rows["train"]} & {r["prompt_id"] for r in rows["validation"]}
    assert len({r["prompt_id"] for r in rows["validation"]}) == 2  # 30 % of 5, rounded up
    for table in parts.values():
        assert table.schema.equals(schema.DATASET)
        assert b"judge:" in table.schema.field("rating").metadata[b"signature"]
        assert table.schema.field("rating").metadata[b"description"]
    row = next(r for r in rows["train"] + rows["validation"] if r["heuristic"] == "cut then heat")
    assert [(p["name"], p["value"]) for p in row["processors"]] == [("top_k", 20), ("top_p", 0.9), ("temperature", 1.4)]
    assert row["messages"][-1] == {"role": "user", "content": row["prompt"]}
    assert row["self_bleu"] is row["corpus_coverage"] is None  # not labelled: null
    assert row["rank"] == 1


def test_duckdb_reads_the_files(tmp_path, tiny_model):
    with FakeSGLang() as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]))
    path = ctx.store.path("dataset/*.parquet")
    ((kept, best),) = duckdb.sql(f"select count(*), max(rank) from '{path}'").fetchall()
    assert kept > 0
    assert best == 1
    grid = ctx.store.path("candidates/*/*.parquet")
    assert duckdb.sql(f"select count(*) from '{grid}'").fetchall() == [(40,)]


def test_a_lost_split_is_owed_again(tmp_path, tiny_model):
    from tasks.pipeline import pending
    from tasks.publish.dataset import write_dataset

    with FakeSGLang() as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]))
    for name in ("report.json", "dataset/README.md"):
        ctx.store.write_bytes(name, b"{}", "k")
    ctx.raw["finished"] = {"at": "now", "problem": None}
    assert pending(ctx) == []
    before = ctx.store.read("dataset/train.parquet")
    ctx.store.fs.rm_file(ctx.store.path("dataset/train.parquet"))
    assert pending(ctx) == ["dataset"]
    write_dataset(ctx)
    assert ctx.store.read("dataset/train.parquet").equals(before)
    assert pending(ctx) == []
