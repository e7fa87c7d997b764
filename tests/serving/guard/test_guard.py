"""A server against what it must be: a truth table for every setting, spellings, models, and what can't matter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.config import GenerationConfig, RunConfig, Settings
from tasks.core.heuristics import Heuristic, Processor
from tasks.serving.client import ServerFacts
from tasks.serving.guard import told
from tasks.serving.guard.admission import refusal
from tasks.serving.guard.guard import (
    Asked,
    Difference,
    asked_of,
    changed,
    compare,
    differences,
    expected,
    placed,
    table,
    text,
    unlike,
)
from tasks.serving.launch.launch_spec import LaunchSpec
from tests.fake_answers import SERVER_INFO

URL = "http://10.0.0.7:30000"
WARM = [Heuristic("warm", (Processor("temperature", 0.7),))]
TYPICAL = [*WARM, Heuristic("typical", (Processor("typical", 0.9),))]
COMMIT, OTHER = "a" * 40, "b" * 40
STARTED = {"enable_deterministic_inference": True, "enable_custom_logit_processor": True, "sampling_backend": "pytorch"}


def config(expect: dict[str, Any] | None = None, *, role: str = "generator", revision: str | None = None,
           model: str = "org/name", generation: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    return RunConfig.model_validate({
        "run": "r", "model": {"path": model, "revision": revision}, "sources": [{"name": "s", "path": "p.jsonl"}],
        "heuristics": {"family": "qwen"}, "generation": generation or {},
        "servers": {"generator": [{"url": URL}]} | {role: [{"url": URL, "expect": expect or {}}]}} | more)


def wanted(expect: dict[str, Any] | None = None, heuristics: list[Heuristic] = TYPICAL, *, role: str = "generator",
           **more: Any) -> Asked:
    made = config(expect, role=role, **more)
    return asked_of(made, role, getattr(made.servers, role)[0], heuristics)


def command(flags: dict[str, Any]) -> str:
    words = {f"--{name.replace('_', '-')}": value for name, value in flags.items() if value not in (None, False)}
    return " ".join(name if value is True else f"{name}={value}" for name, value in words.items())


def server(model_path: str = "org/name", *, resolved: dict[str, Any] | None = None, silent: bool = False,
           url: str = URL, generates: bool = True, context: int | None = None, **flags: Any) -> ServerFacts:
    """A server that was told `flags`, and made `resolved` of them; `silent`: it does not say what it was told."""
    flags = {"model_path": model_path} | STARTED | flags
    info = SERVER_INFO | flags | (resolved or {})
    info |= {} if silent else {"launch_command": command(flags)}
    honours = bool(info["enable_deterministic_inference"]) and told.algorithm(info["speculative_algorithm"]) == "off"
    return ServerFacts(url, model_path, honours, bool(info["enable_custom_logit_processor"]), info, generates, context)


def fields(found: list[Difference]) -> list[str]:
    return [d.field for d in found]


# --- the truth table ---

# setting: what is expected beside it, its name in /server_info, what the server was told beside it, two values
OPEN: dict[str, tuple[dict[str, Any], str, dict[str, Any], Any, Any]] = {
    "dtype": ({}, "dtype", {}, "bfloat16", "float16"),
    "context_length": ({}, "context_length", {}, 4096, 8192),
    "mask_limit": ({}, "sampling_mask_max_tokens", {}, 128, 256),
    "revision": ({}, "revision", {}, COMMIT, OTHER),
    "speculation.draft_tokens": ({"algorithm": "ngram"}, "speculative_num_draft_tokens",
                                 {"speculative_algorithm": "NGRAM"}, 16, 24),
    "speculation.max_breadth": ({"algorithm": "ngram", "min_breadth": 1}, "speculative_ngram_max_bfs_breadth",
                                {"speculative_algorithm": "NGRAM", "speculative_ngram_min_bfs_breadth": 1}, 4, 10),
    "speculation.draft_revision": ({"algorithm": "eagle", "draft_model": "d/d"}, "speculative_draft_model_revision",
                                   {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": "d/d"}, COMMIT,
                                   OTHER),
    "flags.quantization": ({}, "quantization", {}, "fp8", "awq"),
    "flags.kv-cache-dtype": ({}, "kv_cache_dtype", {}, "fp8_e5m2", "fp8_e4m3"),
    "flags.json-model-override-args": ({}, "json_model_override_args", {}, '{"a": 1}', '{"a": 2}'),
}


def ask(name: str, value: Any) -> Asked:
    beside = OPEN[name][0]
    head, _, rest = name.partition(".")
    given_mask: dict[str, Any] = {"generation": {"generator": {"sampling_mask": True}}}
    if name == "revision":
        return wanted(revision=value)
    if head == "speculation":
        return wanted({"speculation": beside | ({rest: value} if value is not None else {})}, WARM)
    if head == "flags":
        return wanted({"flags": {rest: value}} if value is not None else {})
    return wanted({name: value} if value is not None else {}, **given_mask)


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize(("asked", "was_told", "chose", "differs"), [
    (None, None, None, False), (None, "N", None, True), ("N", None, None, True), ("N", "N", None, False),
    ("N", "M", None, True),
    (None, None, "N", False),  # the server chose by itself, as it may
    ("N", None, "N", False), ("N", None, "M", True),  # ... and that is what counts
    ("N", "N", "M", True), ("N", "M", "N", False),
])
def test_none_against_explicit_differs_both_ways_and_what_the_server_resolved_counts(name, asked, was_told, chose,
                                                                                    differs):
    _, key, beside, one, other = OPEN[name]
    value = {None: None, "N": one, "M": other}
    unset: dict[str, Any] = {key: None} if value[asked] is not None and was_told is None else {}
    flags = {key: value[was_told]} if was_told else {}
    facts = server(resolved=unset | ({key: value[chose]} if chose else {}), **beside, **flags)
    found = differences(ask(name, value[asked]), facts)
    assert fields(found) == ([name] if differs else [])
    if differs:
        assert (found[0].asked, found[0].found) == (value[asked], value[chose or was_told])


@pytest.mark.parametrize(("expect", "flags", "found"), [
    ({}, {}, []),
    ({}, {"enable_deterministic_inference": False}, ["deterministic"]),
    ({"deterministic": False}, {}, ["deterministic"]),
    ({"deterministic": False}, {"enable_deterministic_inference": False}, []),
    ({}, {"enable_custom_logit_processor": False}, ["custom_processors"]),
    ({"custom_processors": False}, {}, ["custom_processors"]),
    ({}, {"sampling_backend": "flashinfer"}, ["sampling_backend"]),
    ({"deterministic": False, "sampling_backend": "flashinfer"}, {"enable_deterministic_inference": False},
     ["sampling_backend"]),
    ({}, {"sampling_backend": None}, ["sampling_backend"]),
    ({}, {"speculative_algorithm": "NGRAM"}, ["speculation"]),
    ({"speculation": "ngram"}, {}, ["speculation"]),
    ({"speculation": "ngram"}, {"speculative_algorithm": "EAGLE"}, ["speculation"]),
    ({"speculation": "ngram"}, {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4},
     ["speculation.draft_tokens"]),
])
def test_what_is_always_said_is_compared_as_it_is(expect, flags, found):
    assert fields(differences(wanted(expect), server(**flags))) == found


@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize(("role", "method", "wants"), [
    ("generator", "tournament", "generates"), ("generator", "pointwise", "generates"),
    ("judge", "tournament", "generates"), ("judge", "pointwise", "scores")])
@pytest.mark.parametrize("serves", ["generates", "scores"])
def test_a_pointwise_judge_is_a_reward_model_and_every_other_server_generates(role, method, wants, serves, flag):
    """Whether --is-embedding was given does not matter: some reward models are served as such without it."""
    asked = wanted(role=role, quality={"method": method})
    facts = server(generates=serves == "generates", **({} if flag is None else {"is_embedding": flag}))
    found = differences(asked, facts)
    assert fields(found) == ([] if wants == serves else ["kind of model"])
    if found:
        assert table(found)[0] == {
            "generates": ("kind of model", "one that generates", "an embedding or reward model",
                          "start it with a model that generates, without --is-embedding"),
            "scores": ("kind of model", "a reward model", "one that generates",
                       "start it with a reward model and --is-embedding")}[wants]
    known: dict[str, list[Any]] = {"generator": [], "judge": []}
    for lax in (False, True):
        made = config(role=role, quality={"method": method}, allow_mismatch=lax)
        assert (refusal(made, WARM, known, facts, [role]) is None) is (wants == serves)


def test_a_reward_model_of_ours_is_what_its_launch_asked_for():
    asked, spec = wanted(role="judge", quality={"method": "pointwise"}), LaunchSpec(
        "org/name", role="judge", sampling_backend="pytorch", flags={"is-embedding": True})
    assert not differences(asked, server(generates=False, is_embedding=True), spec)
    assert fields(differences(asked, server(is_embedding=True), spec)) == ["kind of model"]


def test_speculation_that_the_server_chose_by_itself_differs_from_off():
    assert fields(differences(wanted(), server(resolved={"speculative_algorithm": "EAGLE"}))) == ["speculation"]


@pytest.mark.parametrize("name", OPEN)
def test_a_server_that_does_not_say_what_it_was_told_is_noted_where_its_own_choice_would_look_the_same(name):
    _, key, beside, one, other = OPEN[name]
    shows = name in ("context_length", "revision")
    found = compare(ask(name, None), server(silent=True, **beside, **{key: one}))
    assert fields(found.differences) == ([name] if shows else [])
    assert any(name in note for note in found.notes) is not shows
    assert fields(differences(ask(name, one), server(silent=True, **beside, **{key: other}))) == [name]
    assert not differences(ask(name, one), server(silent=True, **beside, **{key: one}))
    assert not differences(ask(name, None), server(silent=True, **beside, resolved={key: None}))


# --- what can't matter ---

def test_what_cannot_matter_is_not_compared():
    draft: dict[str, Any] = {"speculative_num_draft_tokens": 9, "speculative_eagle_topk": 3}
    assert not differences(wanted(), server(**draft))  # off on both sides
    assert not differences(wanted(), server(sampling_mask_max_tokens=9))  # none is recorded
    assert not differences(wanted(heuristics=WARM), server(enable_custom_logit_processor=False))
    assert not differences(wanted({"deterministic": False}, [Heuristic("k", (Processor("top_k", 5),))]),
                           server(enable_deterministic_inference=False, enable_custom_logit_processor=False))
    assert not differences(wanted(revision=COMMIT), server("/models/name", revision=OTHER))


def test_a_judge_is_compared_on_its_own_settings_and_not_on_how_candidates_are_sampled():
    generation = {"judge": {"context_length": 4096}, "generator": {"context_length": 512, "sampling_mask": True}}
    asked = wanted({"dtype": "float16"}, role="judge", generation=generation)
    sampled = {"sampling_backend": "flashinfer", "sampling_mask_max_tokens": 8, "enable_custom_logit_processor": False}
    assert not differences(asked, server(dtype="half", context_length=4096, **sampled))
    assert fields(differences(asked, server(context_length=512, enable_deterministic_inference=False, **sampled))) == [
        "dtype", "context_length", "deterministic"]
    both = config({}, role="judge", quality={"model": {"path": "org/judge", "revision": COMMIT}})
    own = asked_of(both, "judge", both.servers.judge[0], [])
    assert fields(differences(own, server())) == ["model"]
    assert fields(differences(own, server("org/judge"))) == ["revision"]
    assert not differences(own, server("org/judge", revision=COMMIT))


def test_a_model_of_its_own_takes_the_place_of_the_roles_and_has_none_of_its_revision():
    asked = wanted({"model": "org/tuned"}, revision=COMMIT)
    assert not differences(asked, server("org/tuned"))
    assert fields(differences(asked, server())) == ["model"]
    assert fields(differences(asked, server("org/tuned", revision=COMMIT))) == ["revision"]


def test_the_roles_context_and_engine_flags_count_where_the_entry_says_nothing_else():
    generation = {"generator": {"context_length": 4096, "engine": {"kv_cache_dtype": "fp8_e5m2", "tp-size": 2}}}
    flags = {"context_length": 4096, "kv_cache_dtype": "fp8_e5m2", "tp_size": 2}
    assert not differences(wanted(generation=generation), server(**flags))
    over = {"context_length": 2048, "flags": {"--kv-cache-dtype": "fp8_e4m3", "tensor_parallel_size": 1}}
    assert fields(differences(wanted(over, generation=generation), server(**flags))) == [
        "context_length", "flags.kv-cache-dtype", "flags.tp-size"]
    assert not differences(wanted({"flags": {"sampling-backend": "flashinfer"}}), server(sampling_backend="flashinfer"))


# --- spellings ---

@pytest.mark.parametrize(("expect", "flags"), [
    *[({"dtype": "float16"}, {"dtype": word}) for word in ("half", "float16", "torch.float16", "fp16", "FP16")],
    *[({"dtype": "bfloat16"}, {"dtype": word}) for word in ("bf16", "torch.bfloat16", "bfloat16")],
    ({"dtype": "float32"}, {"dtype": "float"}), ({"dtype": "auto"}, {"dtype": "auto"}),
    *[({"speculation": "off"}, {"speculative_algorithm": word}) for word in ("NONE", "none", "off", "null", "")],
    ({"speculation": "nextn"}, {"speculative_algorithm": "EAGLE"}),
    ({"speculation": "mtp"}, {"speculative_algorithm": "NEXTN"}),
    ({"speculation": {"algorithm": "eagle", "draft_model": "d/d"}},
     {"speculative_algorithm": "NEXTN", "speculative_draft_model_path": "d/d"}),
    ({"context_length": 4096}, {"context_length": "4096"}),
    ({"flags": {"Tp_Size": "2"}}, {"tp_size": 2}), ({"flags": {"mem-fraction-static": 0.80}}, {"mem_fraction_static": "0.8"}),
    ({"flags": {"enable-x": False}}, {"enable_x": False}), ({"flags": {"kv_cache_dtype": "auto"}}, {}),
    ({"flags": {"kv-cache-dtype": "bf16"}}, {"kv_cache_dtype": "bfloat16"}),
    ({"flags": {"cuda-graph-bs": 8}}, {"cuda_graph_bs": [8]}),
])
def test_one_value_in_two_spellings_is_one_value(expect, flags):
    assert not differences(wanted(expect, WARM), server(**flags))


@pytest.mark.parametrize(("line", "flags"), [
    ("--model-path=m --dtype=half --enable-metrics", {"model-path": "m", "dtype": "half", "enable-metrics": True}),
    ("--model m --tp 2 --no-x", {"model-path": "m", "tp-size": "2", "x": False}),
    ('--json-model-override-args {"a": -1, "b": 2} --port 1', {"json-model-override-args": '{"a": -1, "b": 2}',
                                                              "port": "1"}),
    ("--dtype half --dtype float16", {"dtype": "float16"}), ("--tensor-parallel-size 4", {"tp-size": "4"}),
    ("Engine(model_path='m')", None), (None, None), ("", None), (["--x"], None),
])
def test_a_command_line_is_read_as_argparse_reads_it(line, flags):
    assert told.flags_of(line) == flags


def test_the_beginning_of_a_flags_name_is_the_flag():
    facts = server()
    facts.info["launch_command"] += " --context 512 --spec-alg"
    assert fields(differences(wanted(), facts)) == ["context_length"]


def test_a_real_servers_command_line_is_read():
    line = ("--model-path=/m/x --host=127.0.0.1 --port=44079 --device=cpu --dtype=bfloat16 --mem-fraction-static=0.3 "
            "--sampling-backend=pytorch --enable-deterministic-inference --attention-backend=torch_native")
    found = told.flags_of(line)
    assert found and (found["dtype"], found["mem-fraction-static"]) == ("bfloat16", "0.3")
    assert found["enable-deterministic-inference"] is True and len(found) == 9


# --- flags ---

def test_a_flag_is_held_against_the_resolved_value_else_against_what_was_told():
    asked = wanted({"flags": {"attention-backend": "fa3", "new-thing": 3, "fancy": True}})
    told_so = server(attention_backend="fa3", resolved={"attention_backend": "triton"}, new_thing=3, fancy=True)
    del told_so.info["new_thing"], told_so.info["fancy"]
    assert fields(differences(asked, told_so)) == ["flags.attention-backend"]
    del told_so.info["launch_command"]
    found = compare(asked, told_so)
    assert fields(found.differences) == ["flags.attention-backend"]
    assert sum("can't be checked" in note for note in found.notes) == 2


def test_what_only_the_machine_asks_for_is_no_difference():
    assert not differences(wanted(), server(attention_backend="triton", mem_fraction_static=0.7, tp_size=4, port=1))


def test_no_secret_is_shown():
    found = compare(wanted({"flags": {"max-total-tokens": 5}}), server(api_key="theirs", max_total_tokens=6))
    everything = json.dumps([[d.shown() for d in found.differences], found.notes]) + text(found.differences)
    assert fields(found.differences) == ["flags.max-total-tokens"] and "theirs" not in everything
    for flag in ("api-key", "Admin_Api_Key", "hf-token", "--ssl-keyfile-password", "watermark-config"):
        for place in (lambda f: Settings(flags=f), lambda f: GenerationConfig(engine=f)):
            with pytest.raises(ValueError, match="where no secret belongs"):
                place({flag: "mine"})


# --- models ---

CACHED = f"/root/.cache/huggingface/hub/models--org--name/snapshots/{COMMIT}"


@pytest.mark.parametrize(("model", "revision", "served", "served_revision", "found", "noted"), [
    ("org/name", None, "org/name", None, [], False),
    ("org/name", COMMIT, "org/name", COMMIT[:12], [], False),
    ("org/name", COMMIT, CACHED, None, [], False),
    ("org/name", OTHER, CACHED, None, ["revision"], False),
    ("org/name", None, CACHED, None, ["revision"], False),
    (CACHED, None, "org/name", COMMIT, [], False),
    (CACHED, None, "org/name", None, ["revision"], False),
    (CACHED, None, CACHED.replace("root", "home/me"), None, [], False),
    (CACHED, None, CACHED.replace(COMMIT, OTHER), None, ["revision"], False),
    ("org/name", COMMIT, "/mnt/models/name", None, [], True),
    ("/mnt/a/name", None, "/mnt/b/name/", None, [], True),
    ("/mnt/a/name", None, "/mnt/a/other", None, ["model"], False),
    ("org/name", None, "other/name-2", None, ["model"], False),
    ("org/name", None, CACHED.replace("name", "game"), None, ["model"], False),
])
def test_models_are_held_against_each_other_by_id_folder_and_commit(model, revision, served, served_revision, found,
                                                                    noted):
    got = compare(wanted(model=model, revision=revision), server(served, revision=served_revision))
    assert fields(got.differences) == found
    assert any("by its name alone" in note for note in got.notes) is noted


def test_folders_on_this_machine_are_the_same_if_they_are(tmp_path: Path):
    one, two = tmp_path / "a/model", tmp_path / "b/model"
    for folder in (one, two):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(one)
    here = "http://127.0.0.1:30000"
    asked = wanted(model=str(one))
    assert not compare(asked, server(str(tmp_path / "link"), url=here)).differences
    assert fields(differences(asked, server(str(two), url=here))) == ["model"]
    elsewhere = compare(asked, server(str(two)))  # on another machine the path may hold anything
    assert not elsewhere.differences and len(elsewhere.notes) == 1


def test_a_draft_model_is_the_same_folder_however_it_is_named(tmp_path: Path, monkeypatch):
    (tmp_path / "draft").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = wanted({"speculation": {"algorithm": "eagle", "draft_model": "draft"}}, WARM)
    guessing: dict[str, Any] = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(tmp_path / "draft")}
    assert not differences(asked, server(**guessing))


def test_a_server_that_names_no_model_or_does_not_generate_differs():
    assert fields(differences(wanted(), dataclasses.replace(server(), model_path=None))) == ["model"]
    assert fields(differences(wanted(), server(generates=False))) == ["kind of model"]


def test_the_models_own_context_counts_as_its_context_length():
    assert not differences(wanted({"context_length": 8192}), server(context=8192))
    found = differences(wanted({"context_length": 4096}), server(context=8192))
    assert [(d.asked, d.found) for d in found] == [(4096, 8192)]
    assert not differences(wanted(), server(context=8192))


def test_preferred_sampling_params_are_told():
    for preferred in ('{"top_k": 5}', {"top_k": 5, "repetition_penalty": 1.1}):
        found = compare(wanted(), server(preferred_sampling_params=preferred))
        assert not found.differences and "preferred_sampling_params (" in found.notes[0]


@pytest.mark.parametrize("role", ["generator", "judge"])
def test_what_a_server_lays_under_every_request_and_no_request_of_ours_names_is_a_difference(role):
    preferred = {"top_k": 5, "logit_bias": {"7": -100}, "regex": "a*"}
    (found,) = compare(wanted(role=role), server(preferred_sampling_params=json.dumps(preferred))).differences
    assert (found.field, found.found, found.start) == (
        "preferred_sampling_params", "logit_bias, regex", "without --preferred-sampling-params")
    assert fields(differences(wanted(role=role), server(enable_watermark=True))) == ["flags.enable-watermark"]


# --- for people ---

def test_a_difference_says_what_is_asked_what_is_found_and_how_to_mend_it():
    found = differences(wanted({"dtype": "bfloat16"}, revision=COMMIT),
                        server(dtype="half", context_length=512, enable_deterministic_inference=False))
    assert table(found) == [
        ("revision", COMMIT, "not set", f"start it with --revision={COMMIT}, or leave revision out"),
        ("dtype", "bfloat16", "float16", "start it with --dtype=bfloat16, or expect: {dtype: float16}"),
        ("context_length", "not set", "512", "start it without --context-length, or expect: {context_length: 512}"),
        ("deterministic", "yes", "no",
         "start it with --enable-deterministic-inference, or expect: {deterministic: false}")]
    line = " ".join(text(found).splitlines()[2].split())
    assert line == "dtype bfloat16 float16 start it with --dtype=bfloat16, or expect: {dtype: float16}"


def test_all_differences_together_are_one_line_for_the_config():
    found = differences(wanted({"mask_limit": 8, "flags": {"tp-size": 2}}),
                        server(dtype="half", enable_deterministic_inference=False, kv_cache_dtype="fp8_e5m2", tp_size=1))
    assert expected(found, {"mask_limit": 8, "flags": {"tp-size": 2}}) == (
        "expect: {mask_limit: 8, flags: {tp-size: 1, kv-cache-dtype: fp8_e5m2}, dtype: float16, deterministic: false}")
    assert "api-key: <secret>" in expected(found, {"flags": {"api-key": "hush"}})
    assert expected(found[:1], {}) == ""  # its own row says it
    assert expected([*found, *differences(wanted(revision=COMMIT), server())], {}) == ""  # not all of it can be said


@pytest.mark.parametrize(("config", "resolved"), [
    ({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({"dtype": "float32"}, "float16"),
    ({}, "float16"), ({"dtype": "float32", "model_type": "gemma2"}, "bfloat16"),
    ({"dtype": "bfloat16", "text_config": {"hidden_size": 8}}, None), (None, None)])
def test_a_dtype_that_was_left_to_sglang_is_what_it_makes_of_the_models(tmp_path, config, resolved):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    left_open = server(str(tmp_path), url="http://127.0.0.1:1", resolved={"dtype": "auto"})
    for asked in ("bfloat16", "float16", "float32"):
        found = compare(wanted({"dtype": asked}, model=str(tmp_path)), left_open)
        assert [(d.field, d.found) for d in found.differences] == ([] if asked == resolved else [("dtype", resolved)])
        assert bool(found.notes) is bool(resolved)
    assert not differences(wanted(model=str(tmp_path)), left_open)


SETTINGS = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from(["bfloat16", "float16", "float32"]), "context_length": st.sampled_from([512, 4096]),
    "deterministic": st.booleans(), "custom_processors": st.booleans(),
    "sampling_backend": st.sampled_from(["pytorch", "flashinfer"]), "mask_limit": st.sampled_from([64, 128]),
    "speculation": st.sampled_from(["off", "ngram", {"algorithm": "ngram", "draft_tokens": 16},
                                    {"algorithm": "eagle", "draft_model": "d/d", "steps": 2, "topk": 1,
                                     "draft_tokens": 3}]),
    "flags": st.dictionaries(st.sampled_from(["quantization", "kv-cache-dtype", "tp-size"]),
                             st.sampled_from(["fp8", "2"]), max_size=2)}).filter(
    lambda s: s.get("sampling_backend") != "flashinfer" or s.get("deterministic") is False)
_FLAGS = {"dtype": "dtype", "context_length": "context_length", "deterministic": "enable_deterministic_inference",
          "custom_processors": "enable_custom_logit_processor", "sampling_backend": "sampling_backend",
          "mask_limit": "sampling_mask_max_tokens"}
_DRAFT = {"draft_model": "speculative_draft_model_path", "steps": "speculative_num_steps",
          "topk": "speculative_eagle_topk", "draft_tokens": "speculative_num_draft_tokens"}
MASKS: dict[str, Any] = {"generation": {"generator": {"sampling_mask": True}}}


def started_for(expect: dict[str, Any]) -> ServerFacts:
    """A server that was told what is expected, and no more."""
    flags: dict[str, Any] = {_FLAGS[k]: v for k, v in expect.items() if k in _FLAGS}
    flags |= {k.replace("-", "_"): v for k, v in expect.get("flags", {}).items()}
    speculation = expect.get("speculation", "off")
    speculation = speculation if isinstance(speculation, dict) else {"algorithm": speculation}
    if speculation["algorithm"] != "off":
        flags["speculative_algorithm"] = speculation["algorithm"].upper()
        flags |= {_DRAFT[k]: v for k, v in speculation.items() if k in _DRAFT}
    return server(**flags)


@given(SETTINGS)
def test_a_server_started_as_asked_never_differs(expect):
    assert differences(wanted(expect, **MASKS), started_for(expect)) == []


@given(SETTINGS, SETTINGS)
def test_two_requests_differ_both_ways_or_not_at_all(one, other):
    for request in (one, other):
        request.get("flags", {}).pop("tp-size", None)  # the machine's business, unless it is asked for
    there = fields(differences(wanted(one, **MASKS), started_for(other)))
    back = fields(differences(wanted(other, **MASKS), started_for(one)))
    assert bool(there) == bool(back)
    own = {f for f in there + back if f.startswith("speculation.")}  # seen with the algorithm that they belong to
    assert set(there) - own == set(back) - own


@given(SETTINGS, SETTINGS)
def test_what_the_table_says_to_expect_is_what_the_server_is(one, other):
    facts = started_for(other)
    expect = dict(one)
    for _ in range(2):  # with another algorithm, its settings are seen
        for d in differences(wanted(expect, **MASKS), facts):
            if d.expect is None:  # asked for what the server was not told: leave it out
                head, _, name = d.field.partition(".")
                if head == "flags":
                    expect["flags"] = {k: v for k, v in expect["flags"].items() if k != name}
                elif head == d.field:
                    expect.pop(head)
                continue
            said = yaml.safe_load(d.mend.rpartition("expect: ")[2])
            expect |= said if "flags" not in said else {"flags": expect.get("flags", {}) | said["flags"]}
    assert differences(wanted(expect, **MASKS), facts) == []


# --- servers of ours ---

def test_what_the_launcher_adds_by_itself_is_not_what_was_asked_for():
    asked = wanted({"speculation": {"algorithm": "ngram", "max_breadth": 4}}, WARM)
    spec = LaunchSpec("org/name", speculation={"algorithm": "ngram", "max_breadth": 4}, sampling_backend="pytorch")
    facts = server(speculative_algorithm="NGRAM", speculative_ngram_min_bfs_breadth=1,
                   speculative_ngram_max_bfs_breadth=4, dtype="bfloat16")
    assert not differences(asked, facts, spec)
    assert fields(differences(asked, facts)) == ["dtype"]


def test_a_flag_of_ours_that_is_not_asked_for_any_more_is_a_difference():
    spec = LaunchSpec("org/name", sampling_backend="pytorch", flags={"page_size": 16})
    assert fields(differences(wanted(), server(page_size=16), spec)) == ["flags.page-size"]
    assert not differences(wanted({"flags": {"page-size": 16}}), server(page_size=16), spec)


def test_a_server_of_ours_must_stand_where_it_would_be_started():
    spec = LaunchSpec("m", device="cuda", gpu=1, mem_fraction=0.5, threads=4, port=30000)
    assert placed(spec, spec) == []
    assert placed(dataclasses.replace(spec, threads=9, port=None), spec) == []
    was = dataclasses.replace(spec, mem_fraction=None, gpu=0, port=30001)
    assert fields(placed(spec, was)) == ["gpu", "mem_fraction", "port"]
    assert fields(placed(spec, None)) == ["record"]


# --- servers against servers ---

@pytest.mark.parametrize(("key", "value", "name"), [
    ("dtype", "float16", "dtype"), ("quantization", "fp8", "flags"), ("kv_cache_dtype", "fp8_e5m2", "flags"),
    ("context_length", 64, "context_length"), ("sampling_backend", "flashinfer", "sampling_backend"),
    ("enable_deterministic_inference", False, "deterministic"), ("version", "0.6.0", "version"),
    ("enable_custom_logit_processor", False, "custom_processors"), ("attention_backend", "triton", "attention_backend"),
    ("sampling_mask_max_tokens", 8, "mask_limit"), ("speculative_algorithm", "NGRAM", "speculation"),
    ("revision", OTHER, "revision"),
])
def test_a_server_that_comes_back_otherwise_has_changed(key, value, name):
    before, now = server(), server(resolved={key: value})
    found = changed(before, now)
    assert len(found) == len(changed(now, before)) == 1
    assert found[0].field in (name, key)
    assert changed(before, dataclasses.replace(server(), url="http://b")) == []


def test_a_server_that_comes_back_as_another_kind_of_model_has_changed():
    assert fields(changed(server(), server(generates=False))) == ["kind of model"]
    assert fields(changed(server(generates=False), server())) == ["kind of model"]


def test_a_server_that_joins_may_be_another_machine_but_not_another_sampler():
    asked = wanted(heuristics=WARM)
    before = server("/here/name")
    assert changed(before, server("/there/name", attention_backend="fa3", resolved={"version": "0.6"}), asked) == []
    assert changed(before, server("/there/name", enable_custom_logit_processor=False, sampling_mask_max_tokens=4),
                   asked) == []
    found = changed(before, server("/there/other", dtype="float16"), asked)
    assert fields(found) == ["model", "dtype"]


def test_servers_of_a_role_that_are_not_alike_are_told_apart():
    assert unlike([server(), server()]) == []
    said = unlike([server(url="http://a"), server(url="http://b", dtype="bf16"), server(url="http://c", dtype="bfloat16")])
    assert said == ["dtype: not set at http://a; bfloat16 at http://b, http://c"]


# --- late ones ---

def recorded(facts: ServerFacts, **more: Any) -> dict[str, Any]:
    return {"url": facts.url, "max_in_flight": None, "model_path": facts.model_path, "info": facts.info,
            "honours_seeds": facts.honours_seeds, "custom_processors": facts.custom_processors} | more


def test_a_late_server_is_held_to_its_own_entry_and_one_that_joins_to_those_of_its_role():
    two = config(servers={"generator": [{"url": URL}, {"url": "http://b:1", "expect": {"dtype": "half"}}]})
    known = {"generator": [recorded(server(dtype="bf16"), entry=0), {"url": "http://b:1", "entry": 1}], "judge": []}

    def why(facts: ServerFacts, known: Any = known, made: RunConfig = two) -> str | None:
        return refusal(made, TYPICAL, known, facts, ["generator"])

    assert why(server(url="http://b:1", dtype="half")) is None
    said = why(server(url="http://b:1"))
    assert said and "dtype is not set, asked for float16 (start it with --dtype=float16)" in said
    assert why(server(url="http://new", dtype="bf16")) is None
    assert "dtype is float16, asked for bfloat16" in str(why(server(url="http://new", dtype="half")))
    nobody: dict[str, list[Any]] = {"generator": [], "judge": []}
    assert why(server(url="http://new"), nobody) is None
    assert "dtype" in str(why(server(url="http://new", dtype="half"), nobody))
    assert "it serves org/other, the generator's model is org/name" in str(why(server("org/other", url="http://new")))
    joined = {"generator": [recorded(server(url="http://new", dtype="half"), how="joined")], "judge": []}
    assert "dtype" in str(why(server(url="http://new", dtype="half"), joined))  # it does not vouch for itself
    lax = two.model_copy(update={"allow_mismatch": True})
    assert why(server("org/other", url="http://new", dtype="half"), made=lax) is None
    assert "custom logit processors" in str(why(server(enable_custom_logit_processor=False), made=lax))
    assert "embedding" in str(why(server(generates=False), made=lax))


def test_a_judge_among_the_generators_needs_the_judges_model_or_one_that_was_accepted():
    made = config()
    known = {"generator": [], "judge": [recorded(server("/x/accepted"))]}
    for model, fits in (("org/name", True), ("/y/accepted", True), ("org/third", False)):
        assert (refusal(made, WARM, known, server(model, url="http://n"), ["judge"]) is None) is fits
