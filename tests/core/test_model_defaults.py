from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.core.config import ModelRef
from tasks.core.config_generation import GenerationConfig
from tasks.core.errors import InputError, UnreachableError
from tasks.core.heuristics import parse_processor
from tasks.core.model_defaults import KNOWN, ModelDefaults, from_recorded, read_model_defaults
from tests.fake_hub import FakeHub

A, B = "a" * 40, "b" * 40
REPO = "tiny/model"
FILE = "generation_config.json"


def folder(tmp_path: Path, raw: Any) -> ModelRef:
    (tmp_path / FILE).write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return ModelRef(path=str(tmp_path))


def read(tmp_path: Path, raw: Any) -> ModelDefaults:
    found = read_model_defaults(folder(tmp_path, raw))
    assert found is not None
    return found


# --- what the file says ------------------------------------------------------------------------------------------

LLAMA = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6,
         "top_p": 0.9, "transformers_version": "4.45.0.dev0"}
QWEN = {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "transformers_version": "4.37.0"}
GEMMA_2 = {"_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
           "pad_token_id": 0, "transformers_version": "4.42.0.dev0"}
GEMMA_3 = {"bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106],
           "pad_token_id": 0, "top_k": 64, "top_p": 0.95, "transformers_version": "4.50.0.dev0"}
SMOLLM2 = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "transformers_version": "4.42.3"}


@pytest.mark.parametrize(("raw", "fields", "processors"), [
    (LLAMA, {"temperature": 0.6, "top_p": 0.9, "stop_token_ids": [128001, 128008, 128009]}, (("top_p", 0.9),)),
    (QWEN, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "stop_token_ids": [151645, 151643]},
     (("top_k", 20), ("top_p", 0.8))),
    (GEMMA_2, {"stop_token_ids": [1, 107]}, ()),
    (GEMMA_3, {"top_k": 64, "top_p": 0.95, "stop_token_ids": [1, 106]}, (("top_k", 64), ("top_p", 0.95))),
    (SMOLLM2, {"stop_token_ids": [2]}, ()),
], ids=["llama-3.2", "qwen2.5", "gemma-2", "gemma-3", "smollm2"])
def test_what_the_makers_of_known_models_recommend(tmp_path: Path, raw: dict, fields: dict, processors: tuple) -> None:
    found = read(tmp_path, raw)
    assert (found.fields, found.processors, found.notes) == (fields, processors, ())
    assert found.raw == raw
    assert (found.source, found.commit, found.cached) == (f"{tmp_path}/{FILE}", None, False)


@pytest.mark.parametrize(("raw", "fields", "processors"), [
    ({}, {}, ()),
    ({"temperature": None, "top_k": None, "eos_token_id": None, "do_sample": None, "num_beams": None}, {}, ()),
    ({"temperature": 1}, {"temperature": 1.0}, ()),
    ({"top_k": 0}, {"top_k": -1}, ()),
    ({"top_k": -1}, {"top_k": -1}, ()),
    ({"top_k": 50.0}, {"top_k": 50}, (("top_k", 50),)),
    ({"top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 1.0}, {"top_p": 1.0, "min_p": 0.0}, ()),
    ({"eta_cutoff": 0.001, "epsilon_cutoff": 0.002, "typical_p": 0.9, "min_p": 0.1, "top_p": 0.8, "top_k": 7},
     {"min_p": 0.1, "top_p": 0.8, "top_k": 7},
     (("top_k", 7), ("top_p", 0.8), ("min_p", 0.1), ("typical", 0.9), ("epsilon", 0.002), ("eta", 0.001))),
    ({"max_new_tokens": 100, "min_new_tokens": 0}, {"max_new_tokens": 100, "min_new_tokens": 0}, ()),
    ({"eos_token_id": 7}, {"stop_token_ids": [7]}, ()),
    ({"eos_token_id": [9, 7, 9]}, {"stop_token_ids": [9, 7]}, ()),
    ({"eos_token_id": []}, {}, ()),
    ({"stop_strings": "END"}, {"stop": ["END"]}, ()),
    ({"stop_strings": ["b", "a", "b"]}, {"stop": ["b", "a"]}, ()),
    ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}, ()),
    ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}, ()),
])
def test_keys_become_request_fields_and_cuts(tmp_path: Path, raw: dict, fields: dict, processors: tuple) -> None:
    found = read(tmp_path, raw)
    assert (found.fields, found.processors, found.notes) == (fields, processors, ())
    assert all(type(v) is type(fields[k]) for k, v in found.fields.items())


@pytest.mark.parametrize(("raw", "fields", "note"), [
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "typical_p": 0.9}, {"temperature": 0.0},
     "temperature, top_p, typical_p: of no effect, as do_sample is false"),
    ({"temperature": 0.0, "top_k": 5}, {"temperature": 0.0}, "top_k: of no effect, as temperature is 0"),
])
def test_greedy_has_no_cuts_and_says_which_were_there(tmp_path: Path, raw: dict, fields: dict, note: str) -> None:
    found = read(tmp_path, raw)
    assert (found.fields, found.processors, found.notes) == (fields, (), (note,))


@pytest.mark.parametrize(("raw", "notes"), [
    ({"num_beams": 4, "suppress_tokens": [1], "max_length": 4096},
     ["num_beams, suppress_tokens, max_length: left out, SGLang's /generate has nothing like it"]),
    ({"max_length": 4096, "max_new_tokens": 5, "min_length": 3, "min_new_tokens": 2}, []),
    ({"min_length": 3, "max_new_tokens": 5}, ["min_length: left out, SGLang's /generate has nothing like it"]),
    ({"num_beams": 1, "no_repeat_ngram_size": 0, "guidance_scale": 1.0, "bad_words_ids": [], "penalty_alpha": 0.0,
      "sequence_bias": {}, "encoder_repetition_penalty": 1.0, "token_healing": False, "min_length": 0}, []),
    ({"temprature": 0.5}, ["unknown key 'temprature', left out, did you mean 'temperature'?"]),
    ({"zzz": None, "qqqq": {}}, ["unknown key 'qqqq', left out."]),
    ({"presence_penalty": 1.5}, ["presence_penalty: no key of generation_config.json, left out; set generation.ROLE.presence_penalty to have it"]),
    ({"use_cache": False, "output_scores": True, "num_return_sequences": 3, "bos_token_id": 5}, []),
])
def test_keys_that_cannot_be_had_and_unknown_ones_are_named(tmp_path: Path, raw: dict, notes: list[str]) -> None:
    assert list(read(tmp_path, raw).notes) == notes


@pytest.mark.parametrize(("raw", "words"), [
    ({"temperature": -0.1}, "temperature: -0.1, must be a number, at least 0 and at most 100"),
    ({"temperature": True}, "temperature: True, must be a number"),
    ({"temperature": "0.7"}, "temperature: '0.7', must be a number"),
    ({"top_p": 0}, "top_p: 0, must be a number, above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p: 1.5, must be a number, above 0 and at most 1"),
    ({"top_k": -2}, "top_k: -2, must be a whole number, at least -1"),
    ({"top_k": 2.5}, "top_k: 2.5, must be a whole number"),
    ({"top_k": 2**31}, "top_k: 2147483648, must be a whole number, at least -1 and below 2147483648"),
    ({"min_p": [0.1]}, "min_p: [0.1], must be a number"),
    ({"repetition_penalty": 2.5}, "repetition_penalty: 2.5, must be a number, above 0 and at most 2"),
    ({"typical_p": 0.0}, "typical_p: 0.0 is out of range, must be between 0 and 1"),
    ({"typical_p": True}, "typical_p: True is out of range"),
    ({"eta_cutoff": -1}, "eta_cutoff: -1 is out of range, must be between 0 and 1"),
    ({"epsilon_cutoff": 2}, "epsilon_cutoff: 2 is out of range, must be between 0 and 1"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0, must be a whole number, at least 1"),
    ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens (4) is above max_new_tokens (3)"),
    ({"eos_token_id": "2"}, "eos_token_id: '2', must be a token id"),
    ({"eos_token_id": [1, True]}, "eos_token_id: [1, True], must be a token id"),
    ({"eos_token_id": [[1]]}, "eos_token_id: [[1]], must be a token id"),
    ({"eos_token_id": [1, -1]}, "eos_token_id: [1, -1], must be a token id (a whole number of 0 or more)"),
    ({"stop_strings": ""}, "stop_strings: '', must be a text that is not empty"),
    ({"stop_strings": ["a", 1]}, "stop_strings: ['a', 1], must be a text"),
    ({"stop_strings": "\ud800"}, "stop_strings: '\\ud800', must be a text"),
    ({"do_sample": 0}, "do_sample: 0, must be true or false"),
    ('{"top_p": NaN}', "not valid JSON: NaN is no finite number"),
    ('{"top_p": 1e999}', "not valid JSON: 1e999 is no finite number"),
    ('{"eta_cutoff": 1' + "0" * 400 + "}", "too large a number"),
    ('{"top_k": ' + "1" * 5000 + "}", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("", "not valid JSON"),
    ('{"top_p": 0.9', "not valid JSON"),
    ("[1]", "must hold a mapping"),
    ("null", "must hold a mapping"),
])
def test_a_bad_value_is_refused_by_file_key_value_and_range(tmp_path: Path, raw: Any, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_model_defaults(folder(tmp_path, raw), "quality.model.path")
    assert str(error.value).startswith("quality.model.path: ")
    assert f"{tmp_path}/{FILE}" in str(error.value)
    assert words in str(error.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.floats(0, 1) | st.text(max_size=3)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.dictionaries(st.sampled_from(sorted(KNOWN)) | st.text(max_size=12), VALUES, max_size=6))
def test_any_mapping_is_read_or_refused_and_what_is_read_is_valid(tmp_path: Path, raw: dict[str, Any]) -> None:
    try:
        found = read(tmp_path, raw)
    except InputError:
        return
    GenerationConfig.model_validate(found.fields, strict=True)
    json.dumps(found.fields, ensure_ascii=False, allow_nan=False).encode()
    assert from_recorded(json.loads(json.dumps(found.recorded(), allow_nan=False))) == found
    assert not (found.fields.get("temperature") == 0 and found.processors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.fixed_dictionaries({}, optional={
    "temperature": st.floats(0.1, 2), "top_k": st.integers(0, 99), "top_p": st.floats(0.1, 1) | st.just(1), "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.1, 1) | st.just(1.0), "epsilon_cutoff": st.floats(0, 0.9) | st.sampled_from((0, 1.0)),
    "eta_cutoff": st.floats(0, 0.9) | st.sampled_from((0, 1.0))}))
def test_the_cuts_are_the_ones_that_hugging_face_makes_in_its_order(tmp_path: Path, raw: dict[str, float]) -> None:
    from transformers import GenerationConfig as Theirs
    from transformers import GenerationMixin

    attribute = {"TopK": "top_k", "TopP": "top_p", "MinP": "min_p", "Typical": "mass", "Epsilon": "epsilon", "Eta": "epsilon"}
    mixin: Any = GenerationMixin()
    made = mixin._get_logits_processor(Theirs(do_sample=True, **raw), input_ids_seq_length=1)
    names = [type(p).__name__.removesuffix("LogitsWarper") for p in made]
    theirs = [(n, float(getattr(p, attribute[n]))) for n, p in zip(names, made, strict=True) if n != "Temperature"]
    ours = [(n.title().replace("_", ""), float(v)) for n, v in read(tmp_path, raw).processors]
    theirs = [(n, v) for n, v in theirs if (n, v) != ("MinP", 0.0)]  # a min_p of 0 cuts nothing
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], rel=1e-6)  # theirs are 32-bit
    for name, value in read(tmp_path, raw).processors:
        parameter = {"typical": "mass", "eta": "epsilon"}.get(name, name)
        assert parse_processor({"name": name, "params": {parameter: value}}, "").value == value


def test_every_key_of_the_installed_transformers_is_known() -> None:
    from transformers import GenerationConfig as Theirs

    assert set(Theirs().to_dict()) - KNOWN == set()


# --- a folder ----------------------------------------------------------------------------------------------------

def test_the_demo_model_s_own_file_is_read() -> None:
    path = Path(__file__).parents[2] / "data/models/SmolLM2-135M-Instruct"
    if not (path / FILE).exists():
        pytest.skip("the demo's model is not here (make demo-model)")
    found = read_model_defaults(ModelRef(path=str(path)))
    assert found is not None
    assert found.fields == {"stop_token_ids": [2]}


def test_a_folder_without_the_file_is_no_error_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks")
    assert read_model_defaults(ModelRef(path=str(tmp_path))) is None
    assert FILE in caplog.text
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_a_missing_folder_and_an_unreadable_file_are_not_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path: no model folder at .*/nowhere"):
        read_model_defaults(ModelRef(path=str(tmp_path / "nowhere")))
    (tmp_path / FILE).symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=f"cannot read .*{FILE}"):
        read_model_defaults(ModelRef(path=str(tmp_path)))
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(InputError, match=f"cannot read .*{FILE}"):
        read_model_defaults(ModelRef(path=str(tmp_path)))


def test_a_record_that_is_not_one_is_refused() -> None:
    with pytest.raises(InputError, match="cached"):
        from_recorded({"source": "x"})
    with pytest.raises(InputError, match="as a run records them"):
        from_recorded(dict.fromkeys(("source", "commit", "cached", "raw", "fields", "processors", "notes")))


# --- the hub -----------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def short_and_direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.add(REPO, A, json.dumps(QWEN))
        yield server


def ask(hub: FakeHub, tmp_path: Path, revision: str | None = None, path: str = REPO) -> ModelDefaults | None:
    return read_model_defaults(ModelRef(path=path, revision=revision), endpoint=hub.url, cache_dir=tmp_path)


def test_a_hub_model_s_file_is_read_with_its_commit(hub: FakeHub, tmp_path: Path) -> None:
    found = ask(hub, tmp_path)
    assert found is not None
    assert found.fields["top_k"] == 20
    assert (found.source, found.commit, found.cached) == (f"hub:{REPO}@{A}/{FILE}", A, False)
    assert found.notes == ()


def test_the_pinned_revision_is_read_not_the_newest(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, B, json.dumps(LLAMA))
    assert [getattr(ask(hub, tmp_path, r), "commit", None) for r in (A, None, "main", B)] == [A, B, B, B]
    hub.add(REPO, "c" * 40, json.dumps(GEMMA_3), branch="v2")
    found = ask(hub, tmp_path, "v2")
    assert found is not None and found.fields["top_k"] == 64
    assert not any("/resolve/main/" in path for _, path in hub.requests[-4:])


def test_a_branch_that_moved_is_read_anew_and_a_pinned_commit_is_not_asked_for_again(hub: FakeHub, tmp_path: Path) -> None:
    ask(hub, tmp_path)
    hub.add(REPO, B, json.dumps(LLAMA))
    found = ask(hub, tmp_path)
    assert found is not None and (found.commit, found.fields["temperature"]) == (B, 0.6)
    before = len(hub.requests)
    again = ask(hub, tmp_path, B)
    assert again == found
    assert len(hub.requests) == before


def test_a_model_without_the_file_is_no_error_and_says_so(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks")
    hub.add(REPO, A, None)
    assert ask(hub, tmp_path) is None
    assert [(r.levelname, FILE in r.getMessage()) for r in caplog.records] == [("INFO", True)]


@pytest.mark.parametrize(("fault", "revision", "path", "words"), [
    (None, None, "no/such", ["no such model, or a private one", "no/such at revision main", "HF_TOKEN"]),
    (None, "v9", REPO, ["no such revision", f"{REPO} at revision v9"]),
    (None, None, "not an/id", ["'not an/id' is no id of a model"]),
    ("gated", None, REPO, ["gated", "accept its terms", REPO]),
    ("disabled", None, REPO, ["disabled", REPO]),
    ("401", None, REPO, ["answered 401", "HF_TOKEN"]),
    ("403", None, REPO, ["answered 403", "HF_TOKEN"]),
])
def test_a_model_that_cannot_be_had_is_the_user_s_to_mend(hub: FakeHub, tmp_path: Path, fault: str | None, revision: str | None, path: str, words: list[str]) -> None:
    hub.fault = lambda n, method: fault
    with pytest.raises(InputError) as error:
        ask(hub, tmp_path, revision, path)
    assert str(error.value).startswith("model.path: ")
    assert [w for w in words if w not in str(error.value)] == []


FAULTS = ["hang", "500", "503", "429", "404", "portal", "refused", "offline"]


def break_off(hub: FakeHub, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "refused":
        hub.stop()
        monkeypatch.setattr(hub, "stop", lambda: None)
    elif fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.fault = lambda n, method: fault


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_out_of_reach_is_an_error_that_says_so_at_once(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    break_off(hub, fault, monkeypatch)
    start = time.monotonic()
    with pytest.raises(UnreachableError) as error:
        ask(hub, tmp_path)
    assert time.monotonic() - start < 3
    for words in ("model.path", hub.url, f"{FILE} of {REPO} at revision main", "HF_ENDPOINT", "name a folder"):
        assert words in str(error.value)
    assert ("HF_HUB_OFFLINE" in str(error.value)) == (fault == "offline")
    assert ("not a Hugging Face hub" in str(error.value)) == (fault == "portal")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_earlier_download_stands_in_and_says_so(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    fresh = ask(hub, tmp_path)
    assert fresh is not None and fresh.notes == ()
    break_off(hub, fault, monkeypatch)
    found = ask(hub, tmp_path)
    assert found is not None
    assert (found.cached, found.commit, found.fields, found.source) == (True, A, fresh.fields, fresh.source)
    assert len(found.notes) == 1 and "earlier download" in found.notes[0] and A in found.notes[0]
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name.startswith("tasks")]
    assert len(warned) == 1 and hub.url in warned[0]
    with pytest.raises(UnreachableError):  # another revision than the one that was downloaded
        ask(hub, tmp_path, "v2")
    pinned = ask(hub, tmp_path, A)  # that commit for ever: nothing to warn of
    assert pinned is not None and (pinned.cached, pinned.notes) == (False, ())


def test_a_file_known_to_be_missing_stays_missing_out_of_reach_and_says_so(hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.add(REPO, A, None)
    assert ask(hub, tmp_path) is None
    hub.fault = lambda n, method: "500"
    caplog.clear()
    assert ask(hub, tmp_path) is None
    assert [r.levelname for r in caplog.records if r.name.startswith("tasks")] == ["WARNING"]
    assert ask(hub, tmp_path, A) is None  # pinned: for ever


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_stops_answering_half_way_hands_out_no_old_copy_in_silence(hub: FakeHub, tmp_path: Path, method: str) -> None:
    ask(hub, tmp_path)
    hub.add(REPO, B, json.dumps(LLAMA))
    start = len(hub.requests)
    hub.fault = lambda n, m: "500" if m == method and n > start + 2 else None
    found = ask(hub, tmp_path)
    assert found is not None and found.cached and len(found.notes) == 1


def test_a_cache_that_cannot_be_written_is_not_a_network_error(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="HF_HUB_CACHE"):
        ask(hub, tmp_path / "file")


def test_a_hub_file_that_is_wrong_names_model_and_commit(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, B, '{"top_p": 2}')
    with pytest.raises(InputError, match=rf"model\.path: hub:{REPO}@{B}/{FILE}: top_p: 2, must be"):
        ask(hub, tmp_path)


@pytest.mark.parametrize("offline", [False, True])
def test_a_password_in_the_hub_s_address_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UnreachableError) as error:
        read_model_defaults(ModelRef(path=REPO), endpoint="http://me:secret@127.0.0.1:9", cache_dir=tmp_path)
    assert "secret" not in str(error.value) and "127.0.0.1:9" in str(error.value)


def test_the_hub_s_environment_variables_count_and_a_folder_needs_no_hub_client(hub: FakeHub, tmp_path: Path) -> None:
    script = ("import sys\n"
              "from tasks.core.config import ModelRef\n"
              "from tasks.core.model_defaults import read_model_defaults\n"
              "assert read_model_defaults(ModelRef(path='.')) is None and 'huggingface_hub' not in sys.modules\n"
              f"found = read_model_defaults(ModelRef(path={REPO!r}))\n"
              "print(found.commit, found.cached)")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))} | {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path), "TQDM_POSITION": "-1", "PYTHONPATH": str(Path(__file__).parents[2])}
    told = []
    for offline in ("0", "1"):
        done = subprocess.run([sys.executable, "-c", script], env=env | {"HF_HUB_OFFLINE": offline}, cwd=tmp_path,
                              capture_output=True, text=True, check=True)
        told.append(done.stdout.strip())
        assert "%" not in done.stderr  # no progress bar for a file of a few lines
    assert told == [f"{A} False", f"{A} True"]


def test_nothing_of_a_record_is_lost_on_the_way_through_json(tmp_path: Path) -> None:
    found = read(tmp_path, QWEN | {"num_beams": 3, "oops": [1, {"a": None}]})
    assert json.loads(json.dumps(found.recorded())) == found.recorded()
    back = from_recorded(json.loads(json.dumps(found.recorded())))
    assert back == found
    assert isinstance(back.processors, tuple) and isinstance(back.processors[0], tuple) and isinstance(back.notes, tuple)
