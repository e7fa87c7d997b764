"""Servers that others run, over HTTP: used where they are what the config expects, refused where they are not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from flows.prepare import check, open_run
from flows.servers import running
from tasks.context import Context
from tasks.core.config import RunConfig
from tasks.core.errors import InputError
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

GENERATE = ["generate"]


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("WINNOW_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def write(tmp_path, tiny_model):
    """A config file with these generators (url -> expect)."""
    def make(generators: dict[str, Any], **changes: Any) -> str:
        raw = make_config(tmp_path, tiny_model, [], **changes)
        raw["servers"] = {"generator": [{"url": u, "expect": e} for u, e in generators.items()]}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return make


def recorded(ctx: Context, role: str = "generator") -> list[dict[str, Any]]:
    return Context(ctx.url).raw["servers"][role]


def test_a_server_that_is_not_what_is_expected_is_exit_code_2_and_gets_no_request(winnow, write):
    with FakeSGLang(dtype="half") as one, FakeSGLang(context_length=512) as two:
        path = write({one.url: {"dtype": "bfloat16"}, two.url: {}})
        code, said = winnow("run", path)
        assert code == 2
        for words in (f"servers.generator.0: {one.url}", f"servers.generator.1: {two.url}",
                      "setting asked for it is to mend",
                      "dtype bfloat16 float16 start it with --dtype=bfloat16, or expect: {dtype: float16}",
                      "context_length not set 512 start it without --context-length, or expect: {context_length: 512}",
                      "--allow-mismatch"):
            assert words in said
        assert one.requests == two.requests == []
        code, said = winnow("servers", "check", path)
        assert code == 2
        assert "dtype bfloat16 float16 start it with --dtype=bfloat16, or expect: {dtype: float16}" in said
        code, said = winnow("servers", "check", path, "--allow-mismatch")
        assert code == 0 and "differs, allowed" in said
        whole = "all at once: expect: {dtype: float16, mask_limit: 9}"
        path = write({one.url: {"dtype": "bfloat16", "mask_limit": 9}, two.url: {"context_length": 512}})
        assert whole in winnow("run", path)[1] and whole in winnow("servers", "check", path)[1]
        assert winnow("servers", "check", write({one.url: {"dtype": "half"}, two.url: {"context_length": 512}}))[0] == 0


def test_a_judge_whose_context_is_too_short_for_its_prompts_is_refused_before_a_candidate_is_asked_for(
        tmp_path, tiny_model):
    with FakeSGLang() as writer, FakeSGLang(context_length=1024) as judge:
        raw = make_config(tmp_path, tiny_model, [writer.url])
        raw["servers"]["judge"] = [{"url": judge.url, "expect": {"context_length": 1024}}]
        with pytest.raises(InputError, match=r"servers\.judge: http.*takes 1024 tokens.*may be 1600 long.*to 1023 or less"):
            build(raw, GENERATE)
        assert writer.requests == judge.requests == []
        raw["quality"] = {"max_prompt_tokens": 1023}
        ctx = build(raw | {"run": "short"}, ["generate", "verify", "quality"])
        assert max(len(r["input_ids"]) for r in judge.judgements) <= 1023
        assert ctx.store.read("labels/quality/shard-0000.parquet").column("rating").null_count == 0


def test_a_mismatch_that_is_allowed_is_recorded_and_the_server_works(tmp_path, tiny_model, caplog):
    with FakeSGLang(dtype="half", preferred_sampling_params='{"top_k": 3}') as server:
        raw = make_config(tmp_path, tiny_model, [server.url], labels=[])
        with pytest.raises(InputError, match="dtype"):
            build(raw, GENERATE)
        ctx = build(raw | {"allow_mismatch": True}, GENERATE)
        assert len(server.generations) == 40
    (found,) = recorded(ctx)
    assert found["mismatch"] == [{"field": "dtype", "asked": None, "found": "float16"}]
    assert (found["how"], found["entry"], found["asked"]["dtype"]) == ("given", 0, None)
    assert any("preferred_sampling_params" in note for note in found["notes"])
    assert found["info"]["dtype"] == "half" and found["context"] == 8192
    assert "allowed (allow_mismatch)" in caplog.text


def test_a_run_records_what_was_asked_and_what_was_found_and_no_secret(tmp_path, tiny_model):
    flags = {"tp-size": 2}
    with FakeSGLang(tp_size=2, sampling_mask_max_tokens=64, api_key="hidden") as server:
        raw = make_config(tmp_path, tiny_model, [], labels=[])
        raw["servers"] = {"generator": [{"url": server.url, "expect": {"mask_limit": 64, "flags": flags}}]}
        raw["allow_mismatch"] = True
        ctx = build(raw, GENERATE)
    (found,) = recorded(ctx)
    assert found["asked"]["flags"] == {"tp-size": 2}
    assert found["asked"]["mask_limit"] == 64 and "mask_limit" in found["asked"]["ignored"]
    assert found["info"]["sampling_mask_max_tokens"] == 64 and found["info"]["tp_size"] == 2
    assert "api_key" not in found["info"] and "launch_command" not in found["info"]
    assert "hidden" not in json.dumps(found)


def test_a_judge_is_held_to_its_own_settings(tmp_path, tiny_model):
    with FakeSGLang() as writer, FakeSGLang(dtype="half", sampling_backend="flashinfer") as judge:
        raw = make_config(tmp_path, tiny_model, [], labels=["quality"])
        entry: dict[str, Any] = {"url": judge.url}
        raw["servers"] = {"generator": [{"url": writer.url}], "judge": [entry]}
        with pytest.raises(InputError, match=r"servers\.judge\.0: (.|\n)*dtype") as refused:
            build(raw, GENERATE)
        assert "servers.generator" not in str(refused.value) and "sampling_backend" not in str(refused.value)
        entry["expect"] = {"dtype": "float16"}
        ctx = build(raw, GENERATE)
    assert recorded(ctx, "judge")[0]["asked"]["dtype"] == "float16"
    assert recorded(ctx)[0]["asked"]["dtype"] is None


def test_an_embedding_model_is_no_generator(tmp_path, tiny_model):
    with FakeSGLang(is_embedding=True) as server:
        with pytest.raises(InputError, match="one that generates"):
            build(make_config(tmp_path, tiny_model, [server.url], labels=[]), GENERATE)
        assert server.requests == []


def test_a_judges_model_that_no_server_has_is_said(tmp_path, tiny_model):
    from tests.tiny_model import make_tiny_model

    other = make_tiny_model(tmp_path / "judge-model")
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], labels=["quality"])
        raw["quality"]["model"] = {"path": str(other)}
        with pytest.raises(InputError, match=r"quality\.model: .*there is no servers\.judge"):
            build(raw, GENERATE)


def test_servers_that_are_not_alike_are_told_and_recorded(tmp_path, tiny_model, caplog):
    with FakeSGLang() as one, FakeSGLang(attention_backend="fa3") as two:
        ctx = build(make_config(tmp_path, tiny_model, [one.url, two.url], labels=[]), GENERATE)
    said = [r.getMessage() for r in caplog.records if "are not alike" in r.getMessage()]
    assert len(said) == 1
    assert f"attention_backend: flashinfer at {one.url}; fa3 at {two.url}" in said[0]
    assert Context(ctx.url).raw["servers_differ"]["generator"] == [
        f"attention_backend: flashinfer at {one.url}; fa3 at {two.url}"]


def test_a_server_that_comes_up_late_must_be_what_its_entry_expects(tmp_path, tiny_model):
    with FakeSGLang(delay_s=0.02) as one, FakeSGLang() as late, FakeSGLang(delay_s=0.02) as fine:
        raw = make_config(tmp_path, tiny_model, [one.url, late.url, fine.url], labels=[])
        raw["servers"]["generator"][0]["max_in_flight"] = 1
        raw["servers"]["generator"][2]["max_in_flight"] = 1
        late.crash()
        fine.crash()
        one.fault = lambda n, p: [late.restart(dtype="half"), fine.restart(), None][-1] if n == 3 else None
        ctx = build(raw, GENERATE)
        assert late.generations == []
        assert len(one.generations) + len(fine.generations) == 40 and fine.generations
    found = {s["url"]: s for s in recorded(ctx)}
    assert found[fine.url]["mismatch"] == [] and found[fine.url]["entry"] == 2


def test_one_that_joins_must_run_as_those_that_are_there(winnow, tmp_path, tiny_model):
    with FakeSGLang(dtype="half") as one, FakeSGLang() as two, FakeSGLang(dtype="float16") as three:
        raw = make_config(tmp_path, tiny_model, [one.url], labels=[])
        raw["servers"]["generator"][0]["expect"] = {"dtype": "half"}
        ctx = build(raw, GENERATE)
        code, said = winnow("servers", "join", ctx.url, two.url)
        assert code == 2 and "dtype is not set, asked for float16" in said
        assert winnow("servers", "join", ctx.url, three.url)[0] == 0


def test_one_that_joins_a_run_that_allows_a_mismatch_is_let_in_said_and_recorded(winnow, tmp_path, tiny_model):
    with FakeSGLang() as one, FakeSGLang(dtype="half") as two:
        raw = make_config(tmp_path, tiny_model, [one.url], labels=[], allow_mismatch=True)
        ctx = open_run(check(RunConfig.model_validate(raw), {}))
        with running(ctx, lambda _: None):
            code, said = winnow("servers", "join", ctx.url, two.url)
        assert code == 0 and "dtype is float16, asked for not set; let in nevertheless" in said
        one.crash()
        ctx = build(raw, GENERATE)
        assert len(two.generations) == 40
    assert {s["url"]: s.get("mismatch") for s in recorded(ctx)}[two.url] == [
        {"field": "dtype", "asked": None, "found": "float16"}]


@pytest.mark.parametrize(("flags", "said"), [
    ({"dtype": "half"}, "dtype is float16"),
    ({"kv_cache_dtype": "fp8_e5m2"}, "is fp8_e5m2"),
    ({"model_path": "second"}, "it serves second"),
])
def test_a_server_that_comes_back_otherwise_gets_no_more_work(tmp_path, tiny_model, caplog, flags, said):
    with FakeSGLang(delay_s=0.01) as server, FakeSGLang(delay_s=0.1) as other:
        raw = make_config(tmp_path, tiny_model, [server.url, other.url], labels=[])
        for entry in raw["servers"]["generator"]:
            entry["max_in_flight"] = 2
        server.fault = lambda n, _: server.restart(**flags) if n == 4 else None
        build(raw, GENERATE)
        assert len(server.generations) <= 10  # what was sent before it was asked who it is
        assert sum(other.answered.values()) >= 34
    assert any(said in r.getMessage() for r in caplog.records)
