"""The engine's sampling mask on its way from an answer to the dataset."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks.context import Context
from tasks.core import schema
from tasks.core.errors import InputError
from tests.fake_sglang import FakeSGLang
from tests.runs import build, expecting, make_config

HEAT = {"name": "temperature", "params": {"temperature": 0.8}}
CUTS = {"plain": {}, "ranked": {"top_k": 20}, "nucleus": {"top_p": 0.9}, "both": {"top_k": 20, "top_p": 0.9}}


def config(folder: Path, model: Path, urls: list[str], mask: bool = True, deterministic: bool = False,
           **changes: Any) -> dict[str, Any]:
    raw = make_config(folder, model, urls, generation={"generator": {"max_new_tokens": 48, "sampling_mask": mask}},
                      **changes)
    expecting(raw, deterministic=deterministic)
    pipelines = [{"name": name, "processors": [HEAT, *({"name": n, "params": {n: v}} for n, v in cuts.items())]}
                 for name, cuts in CUTS.items()]
    (folder / "heuristics.yaml").write_text(json.dumps({"sampling_pipelines": pipelines}))
    return raw


def rows_of(ctx: Context) -> list[dict[str, Any]]:
    names = {h.id: h.name for h in ctx.heuristics}
    rows = [r for n in range(ctx.shards) for r in ctx.store.read(f"verified/shard-{n:04d}.parquet").to_pylist()]
    return [r | {"heuristic": names[r["heuristic_id"]]} for r in rows]


def test_what_was_kept_comes_with_every_row_of_a_native_top_k_and_with_no_other(tmp_path, tiny_model, caplog):
    caplog.set_level(logging.INFO)
    with FakeSGLang(deterministic=False) as server:
        ctx = build(config(tmp_path, tiny_model, [server.url]))
        asked = [r for r in server.generations if "return_sampling_mask" in r]
        answers = {tuple(r["input_ids"]): server.write(r)["meta_info"] for r in asked[:1]}
    assert {r["sampling_params"]["top_k"] for r in asked} == {20}
    rows = rows_of(ctx)
    assert [r["status"] for r in rows] == ["ok"] * 40
    for row in rows:
        if row["heuristic"] == "ranked":
            assert len(row["kept_ids"]) == len(row["kept_logprobs"]) == len(row["output_ids"])
            assert all(i in kept for i, kept in zip(row["output_ids"], row["kept_ids"], strict=True))
        else:
            assert row["kept_ids"] is None and row["kept_logprobs"] is None
    assert len(asked) == sum(r["kept_ids"] is not None for r in rows) == 10
    (prompt, meta), = answers.items()
    found = next(r for r in rows if tuple(r["prompt_ids"]) == prompt and r["request_seed"] == asked[0]["sampling_params"]["sampling_seed"])
    assert found["kept_ids"] == meta["output_token_sampling_mask"]
    assert found["kept_logprobs"] == pytest.approx(meta["output_token_sampling_logprobs"])
    train = ctx.store.read("dataset/train.parquet")
    assert train.schema.field("kept_ids").type == pa.list_(pa.list_(pa.int32()))
    kept = {r["candidate_id"]: r["kept_ids"] for r in rows}
    assert all(kept[r["candidate_id"]] == r["kept_ids"] for r in train.to_pylist())
    said = [r.getMessage() for r in caplog.records if "generation.generator.sampling_mask" in r.getMessage()]
    assert len(said) == 1 and "1 heuristic (ranked) of 4, on 1 of 1 servers" in said[0]


def test_where_no_server_can_record_it_the_log_says_so_and_the_run_is_as_without(tmp_path, tiny_model, caplog):
    with FakeSGLang() as server:
        ctx = build(config(tmp_path, tiny_model, [server.url], deterministic=True), ["generate", "verify"])
        assert not any("return_sampling_mask" in r for r in server.requests)
    assert all(r["status"] == "ok" and r["kept_ids"] is None for r in rows_of(ctx))
    said = [r.getMessage() for r in caplog.records if "generation.generator.sampling_mask" in r.getMessage()]
    assert len(said) == 1 and "no mask will be recorded" in said[0]


def test_nothing_is_asked_or_said_unless_it_is_wanted(tmp_path, tiny_model, caplog):
    with FakeSGLang(deterministic=False) as server:
        ctx = build(config(tmp_path, tiny_model, [server.url], mask=False), ["generate", "verify"])
        assert not any("return_sampling_mask" in r for r in server.requests)
    assert all(r["kept_ids"] is None for r in rows_of(ctx))
    assert "sampling_mask" not in caplog.text


class BadMasks(FakeSGLang):
    """Spoils the sampling mask of the first `bad` answers that have one."""

    def __init__(self, spoil: str, bad: int) -> None:
        super().__init__(deterministic=False)
        self.spoil, self.bad = spoil, bad

    def write(self, payload: dict[str, Any]) -> dict[str, Any]:
        answer = super().write(payload)
        meta = answer["meta_info"]
        if "output_token_sampling_mask" in meta and self.bad > 0:
            self.bad -= 1
            if self.spoil == "none":
                del meta["output_token_sampling_mask"]
            elif self.spoil == "short":
                meta["output_token_sampling_mask"].pop()
            elif self.spoil == "other id":
                meta["output_token_sampling_mask"][0] = [(answer["output_ids"][0] + 1) % 256]
            elif self.spoil == "beyond the vocabulary":
                meta["output_token_sampling_mask"][0].append(10**6)
        return answer


@pytest.mark.parametrize("spoil", ["none", "short", "other id", "beyond the vocabulary"])
def test_an_answer_with_a_bad_mask_is_asked_for_again(tmp_path, tiny_model, spoil):
    with BadMasks(spoil, 3) as server:
        ctx = build(config(tmp_path, tiny_model, [server.url]), ["generate", "verify"])
        assert len(server.generations) == 43
    rows = rows_of(ctx)
    assert [r["status"] for r in rows] == ["ok"] * 40
    assert sum(r["attempts"] for r in rows) == 43
    assert all((r["kept_ids"] is not None) == (r["heuristic"] == "ranked") for r in rows)


def test_a_server_that_never_gives_a_right_mask_brings_failures_of_kind_bad_response(tmp_path, tiny_model):
    with BadMasks("none", 10**6) as server:
        ctx = build(config(tmp_path, tiny_model, [server.url], limits={"attempts": 2, "incomplete_prompts": "keep"}),
                    ["generate", "verify"])
    bad = [r for r in rows_of(ctx) if r["status"] != "ok"]
    assert {(r["heuristic"], r["status"]) for r in bad} == {("ranked", "bad_response")}
    assert len(bad) == 10 and "no sampling mask" in bad[0]["error"]


def test_recording_changes_no_id_and_no_token(tmp_path, tiny_model):
    found = []
    for mask in (False, True):
        with FakeSGLang(deterministic=False) as server:
            rows = rows_of(build(config(tmp_path / str(mask), tiny_model, [server.url], mask), ["generate", "verify"]))
        found.append({r["candidate_id"]: (r["request_seed"], r["output_ids"]) for r in rows})
    assert found[0] == found[1] and len(found[0]) == 40


def test_a_run_does_not_begin_to_record_in_its_middle(tmp_path, tiny_model):
    with FakeSGLang(deterministic=False) as server:
        build(config(tmp_path, tiny_model, [server.url], mask=False), ["generate"])
        with pytest.raises(InputError, match=r"generation\.generator\.sampling_mask"):
            build(config(tmp_path, tiny_model, [server.url], mask=True), ["generate"])


def test_rows_with_and_without_a_mask_make_one_table():
    kept = schema.CANDIDATES.field("kept_ids").type
    must = {"candidate_id": "c", "prompt_id": "p", "heuristic_id": "h", "seed": 0, "status": "ok"}
    rows = [must | {"kept_ids": pa.scalar([[1, 2], [3]], kept)}, must, must | {"kept_ids": [[4]]}]
    assert schema.table(rows, schema.CANDIDATES).column("kept_ids").to_pylist() == [[[1, 2], [3]], None, [[4]]]
