"""The guard with a real SGLang on the CPU that somebody else started."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.core.errors import InputError
from tasks.publish.card import card
from tasks.publish.report_data import gather
from tasks.serving.launch import launcher
from tests import runs
from tests.flows.real_sglang import by_hand, generated

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
HEURISTICS = {"sampling_pipelines": [
    {"name": "bare", "processors": []},
    {"name": "nucleus", "processors": [{"name": "temperature", "params": {"temperature": 1.0}},
                                       {"name": "top_p", "params": {"top_p": 0.9}}]}]}


@pytest.fixture(scope="module")
def others(model, tmp_path_factory) -> Iterator[str]:
    """A context length, seeds, and no word of the dtype."""
    words = ("--context-length", "4096", "--enable-deterministic-inference")
    with by_hand(model, tmp_path_factory.mktemp("hand"), *words) as url:
        yield url


@pytest.fixture
def state(tmp_path, monkeypatch) -> Iterator[Path]:
    """A state folder; what runs in it at the end is stopped."""
    folder = tmp_path / "state"
    monkeypatch.setenv("WINNOW_STATE_DIR", str(folder))
    yield folder
    launcher.stop_all(launcher.running(folder), 1)


@pytest.fixture
def config(tmp_path, model) -> Callable[..., dict[str, Any]]:
    """A raw config of three prompts and two heuristics over one server."""
    def make(server: dict[str, Any], **changes: Any) -> dict[str, Any]:
        raw = runs.make_config(tmp_path, model, [])
        (tmp_path / "heuristics.yaml").write_text(json.dumps(HEURISTICS))
        return raw | {"servers": {"generator": [server]}, "sources": raw["sources"][:1], "labels": [],
                      "generation": {"generator": {"max_new_tokens": 8}}, "limits": {"wait_for_servers_s": 30}} | changes

    return make


@pytest.fixture
def write(tmp_path, config) -> Callable[..., str]:
    def make(server: dict[str, Any], **changes: Any) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config(server, **changes)))
        return str(path)

    return make


# --- one that somebody else started ---

@pytest.mark.parametrize(("expect", "differs"), [
    ({"context_length": 4096}, None),
    ({"context_length": 4096, "dtype": "bf16"}, None),  # what SGLang made of auto
    ({"context_length": 4096, "dtype": "float32"}, "dtype float32 bfloat16 start it with --dtype=float32"),
    ({}, "context_length not set 4096 start it without --context-length"),
    ({"context_length": 8192}, "context_length 8192 4096 start it with --context-length=8192"),
    ({"context_length": 4096, "deterministic": False}, "deterministic no yes start it without --enable-deterministic"),
    ({"context_length": 4096, "mask_limit": 64}, "mask_limit 64 4096 start it with --sampling-mask-max-tokens=64"),
    ({"context_length": 4096, "mask_limit": 4096}, None),
    ({"context_length": 4096, "speculation": "ngram"}, "speculation NGRAM off"),
    ({"context_length": 4096, "flags": {"attention-backend": "triton"}}, "flags.attention-backend triton torch_native"),
    ({"context_length": 4096, "flags": {"attention_backend": "torch_native", "tp": 1}}, None),
])
def test_what_a_real_server_resolved_is_what_counts(others, state, write, winnow, expect, differs):
    masks = {"generation": {"generator": {"max_new_tokens": 8, "sampling_mask": True}}}
    code, said = winnow("servers", "check", write({"url": others, "expect": expect}, **masks))
    assert (code, "as asked for" in said) == ((2, False) if differs else (0, True)), said
    assert differs is None or differs in said


def test_the_mend_that_a_refusal_prints_works_when_it_is_pasted(others, state, write, winnow):
    code, said = winnow("run", write({"url": others, "expect": {"dtype": "float32", "flags": {"page-size": 4}}}))
    assert code == 2
    pasted = yaml.safe_load(re.search(r"all at once: (expect: \{.*\}) Start it as", said)[1])  # type: ignore[index]
    path = write({"url": others} | pasted)
    assert winnow("servers", "check", path)[0] == 0
    ctx, rows = generated(Path(path), run="pasted")
    assert [(r["status"], r["seed_effective"]) for r in rows] == [("ok", True)] * 12
    (found,) = ctx.raw["servers"]["generator"]
    assert (found["how"], found["mismatch"]) == ("given", [])
    assert (found["asked"]["dtype"], found["info"]["dtype"], found["context"]) == ("bfloat16", "auto", 4096)
    assert any("left to SGLang, which makes bfloat16 of it" in note for note in found["notes"])


def test_a_mismatch_that_is_allowed_is_in_run_json_and_on_the_card(others, state, config):
    raw = config({"url": others, "expect": {"dtype": "float32"}}, labels=["verifiers"], run="allowed",
                 scoring={"incorrect": "keep"})
    with pytest.raises(InputError, match="context_length"):
        runs.build(raw)
    ctx = runs.build(raw | {"allow_mismatch": True})
    (found,) = ctx.raw["servers"]["generator"]
    assert found["mismatch"] == [{"field": "dtype", "asked": "float32", "found": "bfloat16"},
                                 {"field": "context_length", "asked": None, "found": 4096}]
    said = card(ctx, gather(ctx), {"train": 1}).replace("\\", "")
    assert "a generator server was used with dtype bfloat16, the run asked for float32." in said
    assert "a generator server was used with context_length 4096, the run left that to SGLang." in said
    assert "a judge server" not in said  # none had work


def test_greedy_by_generation_config_is_the_engines_greedy_and_run_json_repeats_it(
        others, state, write, model, tmp_path):
    shutil.copytree(model, tmp_path / "greedy")
    (tmp_path / "greedy/generation_config.json").write_text(
        json.dumps({"do_sample": False, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [2], "pad_token_id": 2}))
    path = write({"url": others, "expect": {"context_length": 4096, "model": str(model)}},
                 seeds=[0, 1, 2]).replace("run.yaml", "greedy.yaml")
    raw = yaml.safe_load((tmp_path / "run.yaml").read_text()) | {"model": {"path": str(tmp_path / "greedy")}}
    Path(path).write_text(yaml.safe_dump(raw))
    ctx, rows = generated(Path(path), run="greedy")
    assert [r["status"] for r in rows] == ["ok"] * 18  # not one was refused with a 400
    names = {h["id"]: h["name"] for h in ctx.raw["heuristics"]}
    bare = [r for r in rows if names[r["heuristic_id"]] == "bare"]
    told = {(r["prompt_id"], tuple(r["prompt_ids"]), tuple(r["output_ids"])) for r in bare}
    assert len(bare) == 9 and len(told) == 3  # whatever the seed
    assert len({tuple(r["output_ids"]) for r in rows if r not in bare}) > 6
    for _, prompt_ids, output_ids in told:
        own = {"temperature": 0, "max_new_tokens": 8, "repetition_penalty": 1.05}
        answer = post(others, {"input_ids": prompt_ids, "sampling_params": own})
        assert tuple(answer["output_ids"]) == output_ids

    (tmp_path / "heuristics.yaml").unlink()
    (tmp_path / "greedy/generation_config.json").unlink()
    _, again = generated(Path(ctx.store.path("run.json")), run="again")
    kept = ("candidate_id", "output_ids", "output_logprobs", "sampling_params")
    assert [[r[k] for k in kept] for r in again] == [[r[k] for k in kept] for r in rows]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
