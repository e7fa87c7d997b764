from __future__ import annotations

import pytest

from flows import build
from flows.prepare import check, open_run
from tasks.core.config import RunConfig
from tasks.core.errors import InputError
from tasks.generation.prompts import read_shard
from tests.runs import make_config


def test_what_was_checked_is_taken_once_and_only_for_its_own_config(tmp_path, tiny_model, monkeypatch):
    raw = make_config(tmp_path, tiny_model, ["http://127.0.0.1:9"])
    config = RunConfig.model_validate(raw)
    plan = check(config, {})
    monkeypatch.setattr(build, "checked", plan)
    assert build._take_checked(RunConfig.model_validate(config.model_dump())) is plan
    assert build._take_checked(config) is None
    monkeypatch.setattr(build, "checked", plan)
    assert build._take_checked(RunConfig.model_validate(raw | {"seeds": [5]})) is None


def test_checking_writes_nothing_in_the_run(tmp_path, tiny_model):
    config = RunConfig.model_validate(make_config(tmp_path, tiny_model, ["http://127.0.0.1:9"]))
    with check(config, {}).prompts:
        assert not (tmp_path / "runs").exists()


def test_an_edited_source_is_refused_once_there_are_candidates_and_taken_over_before(tmp_path, tiny_model):
    config = RunConfig.model_validate(make_config(tmp_path, tiny_model, ["http://127.0.0.1:9"]))
    ctx = open_run(check(config, {}))
    assert ctx.raw["prompts"] == 5
    with (tmp_path / "stories.jsonl").open("a") as file:
        file.write('{"prompt": "Tell of snow."}\n')
    ctx = open_run(check(config, {}))
    assert (ctx.raw["prompts"], ctx.raw["shards"]) == (6, 3)
    assert read_shard(ctx.store, 2).column("prompt").to_pylist() == ["Tell of rain.", "Tell of snow."]
    folder = tmp_path / "runs/test/candidates/00000"
    folder.mkdir(parents=True)
    (folder / "0.parquet").write_bytes(b"")
    (tmp_path / "stories.jsonl").write_text('{"prompt": "Tell of hail."}\n')
    with pytest.raises(InputError, match="a file in sources was edited"):
        open_run(check(config, {}))
