from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from tasks.context import Context
from tasks.core import schema
from tasks.core.config import RunConfig
from tasks.publish import card as card_module
from tasks.publish.card import card
from tasks.publish.report import gather
from tests.publish.synthetic import SCRIPT, make_run


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(ctx: Context) -> dict[str, Any]:
    return gather(ctx)


@pytest.fixture(scope="module")
def text(ctx: Context, data: dict[str, Any]) -> str:
    return card(ctx, data, data["dataset"])


def _front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def _load(ctx: Context, splits: dict[str, int], cache: Path) -> Any:
    import datasets

    Path(ctx.store.path(card_module.PATH)).write_text(card(ctx, gather(ctx), splits), encoding="utf-8")
    datasets.disable_progress_bars()
    return datasets.load_dataset(ctx.store.path("dataset"), cache_dir=str(cache))


def test_datasets_loads_the_folder_with_its_card(ctx: Context, data: dict[str, Any], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    loaded = _load(ctx, data["dataset"], tmp_path)
    assert {split: rows.num_rows for split, rows in loaded.items()} == data["dataset"]
    assert loaded["train"].column_names == schema.DATASET.names
    written = pl.read_parquet(ctx.store.path("dataset/train.parquet"))
    assert loaded["train"][0]["output_ids"] == written["output_ids"][0].to_list()
    assert loaded["train"][0]["processors"] == written["processors"][0].to_list()


def test_datasets_loads_a_folder_with_only_a_train_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    ctx = make_run(tmp_path, prompts=3, shards=1)
    ctx.store.remove("dataset/validation.parquet")
    loaded = _load(ctx, {"train": 8, "validation": 0}, tmp_path / "cache")
    assert list(loaded) == ["train"]


def test_front_matter_has_what_the_hub_reads(text: str) -> None:
    head = _front_matter(text)
    assert head["license"] == "other" and head["size_categories"] == ["n<1K"]
    assert head["configs"] == [{"config_name": "default", "data_files": [
        {"split": "train", "path": "train.parquet"}, {"split": "validation", "path": "validation.parquet"}]}]
    sizes = [card_module._SIZES[n][1] for n in range(3)]
    assert sizes == ["n<1K", "1K<n<10K", "10K<n<100K"]


def test_a_size_on_the_border_is_in_the_upper_category(ctx: Context) -> None:
    of = {n: card_module.front_matter(ctx, {"train": n})["size_categories"][0] for n in (999, 1000, 10**8)}
    assert of == {999: "n<1K", 1000: "1K<n<10K", 10**8: "n>100M"}


def test_every_column_source_and_heuristic_is_on_the_card(ctx: Context, text: str) -> None:
    for field in schema.DATASET:
        assert f"| {field.name} | " in text
    for source in ctx.config.sources:
        assert f"| {source.name} | {source.path} | {source.license or 'not stated'} |" in text
    for h in ctx.heuristics[:-1]:
        assert f"| {h.name} | {h.describe()} |" in text
    assert "| rating | bradley-terry\\|judge:j |" in text  # from the metadata of the written file
    assert "| sglang | 0.5.23 |" in text and "honours_seeds False; version 0.5.23; dtype float32" in text


def test_counts_are_those_of_the_report(data: dict[str, Any], text: str) -> None:
    assert f"| kept | {data['funnel']['kept']} |" in text
    assert f"| incorrect | {data['drops']['incorrect']} |" in text
    assert "33 in `train`, 3 in `validation`" in text


def test_a_server_that_never_answered_is_named_as_such(text: str) -> None:
    assert "- generator 3: never answered\n" in text and text.count("never answered") == 1


def test_failures_before_repair_attempts_and_cut_answers_are_on_the_card(data: dict[str, Any], text: str) -> None:
    found, verified = data["verification"]["found"], data["verification"]
    for kind, n in found.items():
        assert f"| {kind} | {n} | {verified['defects'].get(kind, 0)} |" in text
    assert f"{data['requests']['attempts']} requests were sent" in text
    assert "2 failed cells were mended" in text
    assert f"{verified['at_max_new_tokens']} answers end where `max_new_tokens` cut them" in text


def test_recorded_masks_are_a_known_limit_where_they_are_recorded(tmp_path: Path, text: str) -> None:
    ctx = make_run(tmp_path, prompts=3, shards=1, heuristics=3)
    raw = json.loads(Path(ctx.store.path("run.json")).read_text())
    raw["config"]["generation"]["generator"]["sampling_mask"] = True
    ctx.store.write_json("run.json", raw)
    assert "recorded for native top_k only" in card(Context(ctx.url), gather(ctx), {"train": 1})
    assert "recorded for native top_k only" not in text


def test_servers_that_were_not_what_was_asked_for_are_a_known_limit(tmp_path: Path, text: str) -> None:
    ctx = make_run(tmp_path, prompts=3, shards=1, heuristics=3)
    raw = json.loads(Path(ctx.store.path("run.json")).read_text())
    for server in raw["servers"]["generator"][:2]:
        server["mismatch"] = [{"field": "dtype", "asked": "float32", "found": "bfloat16"}]
    raw["servers_differ"] = {"generator": ["version: 0.5.23 at http://a; 0.5.22 at http://b"]}
    ctx.store.write_json("run.json", raw)
    found = card(Context(ctx.url), gather(ctx), {"train": 1})
    assert "a generator server was used with dtype bfloat16, the run asked for float32 (2 of them)." in found
    assert "Servers of one role were unlike in 1 settings" in found and "http://a" not in found
    assert "the run asked for" not in text and "unlike" not in text


def test_what_every_request_said_is_on_the_card_with_its_origin(text: str) -> None:
    assert "| max_new_tokens | 64 | config |" in text
    assert "| repetition_penalty | 1.0 | default |" in text
    assert "Chat template `0a1b` (tokenizer, told the date 2024-07-26 whatever the day)" in text


def test_names_cannot_become_html_and_addresses_stay_private(text: str) -> None:
    assert SCRIPT not in text and "&lt;script>" in text
    assert "127.0.0.1" not in text and "/home/me" not in text


def test_the_config_on_the_card_builds_the_same_dataset(ctx: Context, text: str) -> None:
    written = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    again = RunConfig.model_validate(written)
    assert again.identity() == ctx.config.identity()


def test_a_judge_that_only_a_server_names_is_in_the_config_on_the_card(tmp_path: Path) -> None:
    ctx = make_run(tmp_path, prompts=3, shards=1, heuristics=3)
    raw = json.loads(Path(ctx.store.path("run.json")).read_text())
    raw["config"]["servers"]["judge"] = [{"launch": {"model": "models/judge"}}]
    ctx.store.write_json("run.json", raw)
    ctx = Context(ctx.url)
    assert RunConfig.model_validate(card_module.rebuild_config(ctx)).judge_model.path == "models/judge"


def test_a_run_that_says_little_of_itself_still_has_a_card(tmp_path: Path) -> None:
    ctx = make_run(tmp_path, prompts=3, shards=1, heuristics=3, labels=("quality",), seeds=1)
    for key in ("versions", "created", "servers"):
        del ctx.raw[key]
    text = card(ctx, gather(ctx), {})
    assert "configs" not in _front_matter(text) and "None" not in text and "nan" not in text.split()
    assert "not true for" not in text


def test_seeds_that_were_not_honoured_are_a_known_limit(ctx: Context, data: dict[str, Any]) -> None:
    told = data | {"requests": data["requests"] | {"seed_effective": {"true": 300, "false": 110}}}
    assert "`seed_effective` is not true for 110 of 410 answers" in card(ctx, told, data["dataset"])
