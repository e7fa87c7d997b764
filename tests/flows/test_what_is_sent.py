"""Every field of every request, as a server sees it: whose config it follows, and that nothing is left to the server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.context import Context
from tasks.core.errors import InputError
from tests.fake_sglang import FakeSGLang
from tests.runs import build, expecting, make_config

ONE = {"sampling_pipelines": [{"name": "plain", "processors": []},
                              {"name": "warm", "processors": [{"name": "temperature", "params": {"temperature": 0.7}}]}]}
FIELDS: dict[str, Any] = {
    "temperature": 0.4, "top_k": 7, "top_p": 0.6, "min_p": 0.2, "frequency_penalty": 0.5, "presence_penalty": -0.5,
    "repetition_penalty": 1.3, "seed": 11, "max_new_tokens": 3, "min_new_tokens": 1, "stop": ["END"],
    "stop_token_ids": [9], "ignore_eos": True, "chat_template": "{% for m in messages %}<{{ m['content'] }}>{% endfor %}",
    "system_prompt": "Be brief.",
}
SENT = {"temperature", "top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "skip_special_tokens",
        "spaces_between_special_tokens", "no_stop_trim", "sampling_seed"}


def small(folder: Path, model: Path, urls: list[str], generation: dict[str, Any] | None = None, **changes: Any
          ) -> dict[str, Any]:
    """Two prompts, two heuristics, one seed; generators and judges apart, on servers that ignore seeds."""
    raw = make_config(folder, model, urls[:1], seeds=[0], labels=["quality"], **changes)
    (folder / "heuristics.yaml").write_text(json.dumps(ONE))
    raw["sources"] = raw["sources"][1:]
    raw["generation"] = generation or {}
    expecting(raw, deterministic=False)
    raw["servers"]["judge"] = [{"url": urls[1], "expect": {"deterministic": False}}]
    return raw


def payloads(folder: Path, model: Path, generation: dict[str, Any] | None = None, **changes: Any) -> tuple[Context, list, list]:
    """(the run, what its generator was sent, what its judge was sent), in one order."""
    with FakeSGLang(deterministic=False) as writer, FakeSGLang(deterministic=False) as judge:
        ctx = build(small(folder, model, [writer.url, judge.url], generation, **changes))
        assert not writer.judgements and not judge.generations
        return ctx, in_order(writer.generations), in_order(judge.judgements)


def in_order(sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the candidates' ids, of which the generation config is a part."""
    plain = [{k: v for k, v in payload.items() if k != "rid"} for payload in sent]
    return sorted(plain, key=lambda p: json.dumps(p, sort_keys=True))


@pytest.fixture(scope="module")
def before(tmp_path_factory, tiny_model):
    return payloads(tmp_path_factory.mktemp("before"), tiny_model)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_judge_changes_what_the_judge_is_sent_and_nothing_else(before, tmp_path, tiny_model, field):
    value = False if field == "ignore_eos" else FIELDS[field]
    _, written, judged = payloads(tmp_path, tiny_model, {"judge": {field: value}})
    assert written == before[1]
    assert judged != before[2] and len(judged) == len(before[2])
    if field in SENT:
        assert {json.dumps(p["sampling_params"][field]) for p in judged} == {json.dumps(value)}
    elif field == "seed":
        assert {p["sampling_params"]["sampling_seed"] for p in judged} == {11}
    else:
        assert {json.dumps(p["input_ids"]) for p in judged}.isdisjoint(json.dumps(p["input_ids"]) for p in before[2])


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_generator_changes_what_the_generator_is_sent_and_every_id(before, tmp_path, tiny_model, field):
    ctx, written, _ = payloads(tmp_path, tiny_model, {"generator": {field: FIELDS[field]}})
    assert written != before[1] and len(written) == len(before[1]) == 4
    if field in ("temperature", "top_k", "top_p", "min_p"):
        seen = [p["sampling_params"][field] if "custom_params" not in p["sampling_params"] else
                p["sampling_params"]["custom_params"]["winnow"] for p in written]
        assert any(FIELDS[field] == s or (isinstance(s, list) and FIELDS[field] in s) for s in seen)
    elif field in SENT:
        assert {json.dumps(p["sampling_params"][field]) for p in written} == {json.dumps(FIELDS[field])}
    ids = [{r["candidate_id"] for r in rows_of(c)} for c in (before[0], ctx)]
    own = 2 if field == "temperature" else 0  # `warm` has a temperature of its own: the same candidates as before
    assert len(ids[0] & ids[1]) == own


def rows_of(ctx: Context) -> list[dict[str, Any]]:
    return [r for path in ctx.store.glob("candidates/*/*.parquet") for r in ctx.store.read(path).to_pylist()]


def test_every_field_is_sent_whatever_the_role(before):
    for payload in [*before[1], *before[2]]:
        assert set(payload["sampling_params"]) - {"custom_params"} == SENT
        assert all(v is not None for v in payload["sampling_params"].values())
    assert {p["sampling_params"]["max_new_tokens"] for p in before[2]} == {1}


def with_file(model: Path, folder: Path, text: str) -> Path:
    made = folder / "models/tiny"
    shutil.copytree(model, made)
    (made / "generation_config.json").write_text(text)
    return made


def test_the_models_own_file_is_applied_to_the_request_and_saved_as_sent(tmp_path, tiny_model):
    model = with_file(tiny_model, tmp_path, json.dumps({
        "do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [256, 7],
        "no_repeat_ngram_size": 3, "tempreature": 2}))
    ctx, written, judged = payloads(tmp_path, model)
    plain = [p["sampling_params"] for p in written if p["sampling_params"]["top_k"] == 20]
    warm = [p["sampling_params"] for p in written if p["sampling_params"]["top_k"] == -1]
    assert [p["temperature"] for p in plain] == [0.6, 0.6] and [p["temperature"] for p in warm] == [0.7, 0.7]
    assert {(p["repetition_penalty"], tuple(p["stop_token_ids"])) for p in plain + warm} == {(1.05, (256, 7))}
    assert {(p["sampling_params"]["repetition_penalty"], p["sampling_params"]["top_k"]) for p in judged} == {(1.0, -1)}
    sent = json.loads(Path(ctx.store.path("generation_config.json")).read_text())
    assert (sent["generator"]["repetition_penalty"], sent["model"]["as_read"]["top_k"]) == (1.05, 20)
    assert ctx.raw["generation"]["generator"]["repetition_penalty"] == {
        "value": 1.05, "layer": "model", "from": f"{model}/generation_config.json"}
    by_name = {h.name: h.describe() for h in ctx.heuristics}
    assert by_name == {"plain": "temperature 0.6 > top_k 20", "warm": "temperature 0.7"}


def test_a_model_that_does_not_sample_is_asked_for_its_likeliest_tokens(tmp_path, tiny_model):
    _, written, _ = payloads(tmp_path, with_file(tiny_model, tmp_path, '{"do_sample": false}'))
    assert sorted(p["sampling_params"]["temperature"] for p in written) == [0.0, 0.0, 0.7, 0.7]


@pytest.mark.parametrize(("text", "said"), [
    ('{"top_p": 1.7}', ["generation_config.json", "top_p", "1.7"]), ("not json", ["generation_config.json", "JSON"]),
    ('{"eos_token_id": 99999}', ["stop_token_ids", "99999", "generation_config.json"]),
])
def test_a_bad_file_is_refused_by_name_before_anything_is_sent(tmp_path, tiny_model, text, said):
    with FakeSGLang() as server, pytest.raises(InputError) as caught:
        build(make_config(tmp_path, with_file(tiny_model, tmp_path, text), [server.url]))
    assert not server.requests
    for words in said:
        assert words in str(caught.value)


def test_a_template_that_stamps_the_day_is_told_a_fixed_one(tmp_path, tiny_model):
    stamped = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
               "Today: {{ date_string }}\n{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    ctx, written, _ = payloads(tmp_path, tiny_model, {"generator": {"chat_template": stamped}})
    texts = {ctx.tokenizer.decode(p["input_ids"]) for p in written}
    assert len(texts) == 2 and all(t.startswith("Today: 26 Jul 2024\n") for t in texts)
    found = ctx.raw["templates"]["generator"]
    assert (found["stamps_date"], found["date"], found["origin"]) == (True, "2024-07-26", "config")
    assert ctx.raw["templates"]["judge"]["stamps_date"] is False


def test_prompts_that_do_not_fit_the_context_are_refused_before_anything_is_sent(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], labels=[],
                          generation={"generator": {"max_new_tokens": 40, "context_length": 60}})
        with pytest.raises(InputError, match=r"the longest prompt has \d+ tokens, and 40 new ones do not fit into 60"):
            build(raw)
        assert not server.requests


@pytest.mark.parametrize("speculation", ["ngram", {"algorithm": "nextn"}])
def test_speculation_is_refused_with_heuristics_that_it_would_ignore(tmp_path, tiny_model, speculation):
    raw = make_config(tmp_path, tiny_model, [], labels=[])
    raw["servers"] = {"generator": [{"launch": {"speculation": speculation}}]}
    with pytest.raises(InputError, match=r"servers.generator.0.launch.speculation: \w+ silently ignores custom logit "
                                         r"processors and min_p, which 3 heuristics \(nucleus, typical, cut then heat"):
        build(raw)


REFUSING = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ m['content'] }}\n{% endfor %}")
DROPPING = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("role", ["generator", "judge"])
def test_a_system_prompt_that_the_template_refuses_is_an_error_and_one_that_it_drops_is_said(tmp_path, tiny_model, role, caplog):
    with FakeSGLang() as server:
        def raw(template: str) -> dict[str, Any]:
            return make_config(tmp_path, tiny_model, [server.url], labels=["quality"],
                               generation={role: {"chat_template": template, "system_prompt": "Be brief."}})
        with pytest.raises(InputError, match=f"generation.{role}.chat_template: .* a system turn, and the chat template of"):
            build(raw(REFUSING))
        assert not server.requests
        build(raw(DROPPING), ["generate"])
    assert "leaves it out without a word" in caplog.text


@pytest.mark.parametrize(("generation", "said"), [
    ({"judge": {"context_length": 99}}, "generation.judge.context_length: there is no servers.judge"),
    ({"judge": {"engine": {"page-size": 4}}}, "generation.judge.engine: there is no servers.judge"),
    ({"judge": {"min_p": 0.1}}, "generation.judge.min_p .*SGLang dies of a min_p where it honours seeds"),
    ({"generator": {"stop_token_ids": [99999]}}, r"stop_token_ids \(config\): \[99999\] are no token ids"),
])
def test_what_could_do_nothing_or_harm_is_refused(tmp_path, tiny_model, generation, said):
    with pytest.raises(InputError, match=said):
        build(make_config(tmp_path, tiny_model, ["http://127.0.0.1:9"], generation=generation))


def test_a_day_that_no_template_is_told_is_said_to_change_nothing(tmp_path, tiny_model, caplog):
    generation = {"generator": {"template_date": "2025-01-01"}}
    with FakeSGLang() as server:
        build(make_config(tmp_path, tiny_model, [server.url], labels=[], generation=generation), ["generate"])
    assert "generation.generator.template_date: its chat template stamps no date" in caplog.text
