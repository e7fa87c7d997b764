from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.core.config_generation import RoleLessKey
from tasks.core.errors import InputError
from tasks.core.resolve import load_config

GOOD = """\
run: mine
model: {path: some/model}
sources:
  - {name: sums, path: sums.jsonl, prompt_key: question, answer_key: answer, verifier: gsm8k}
heuristics: {family: qwen}
seeds: [0, 1]
generation: {generator: {max_new_tokens: 64}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("old", "new", "line", "said"), [
    ("seeds:", "seed:", 6, ["unknown key 'seed'", "did you mean 'seeds'?"]),
    ("verifier: gsm8k", "verifer: gsm8k", 4, ["sources.0.verifer", "did you mean 'verifier'?"]),
    ("verifier: gsm8k", "verifier: gsm8", 4, ["unknown value 'gsm8'", "did you mean 'gsm8k'?"]),
    ("family: qwen", "family: qwn", 5, ["heuristics.family", "did you mean 'qwen'?"]),
    ("max_new_tokens: 64", "max_new_tokens: 0", 7, ["generation.generator.max_new_tokens", "given: 0"]),
    ("max_new_tokens: 64", "max_new_tokens: many", 7, ["generation.generator.max_new_tokens", "integer", "given: 'many'"]),
    ("max_new_tokens: 64", "max_new_tokens: 64, min_new_tokens: 65", 7, ["min_new_tokens (65)", "(64)"]),
    ("seeds: [0, 1]", "seeds: [0, 0]", 6, ["seeds", "given twice: 0"]),
    ("seeds: [0, 1]", "seeds: []", 6, ["seeds", "at least 1"]),
    (", answer_key: answer", "", 4, ["verifier gsm8k needs answer_key"]),
    ("run: mine", "run: my run", 1, ["run:", "'my run'"]),
    ("run: mine", "run: mine\nrun: yours", 2, ["'run' is given twice"]),
    ("run: mine", "run: mine\nservers: {generator: [{url: 'http://a:1', launch: {}}]}", 2, ["either url", "or launch"]),
    ("run: mine", "run: mine\nservers: {generator: [{url: 'http://me:pw@a:1'}]}", 2, ["servers.generator.0.url"]),
    ("run: mine", "run: mine\nservers: {generator: [{launch: {host: 0.0.0.0}}]}", 2, ["0.0.0.0", "allow_public"]),
    ("run: mine", "run: mine\nscoring: {per: [seed]}", 2, ["[prompt, seed] or [prompt]"]),
    ("run: mine", "run: mine\nlabels: [quality, corpus_match]", 2, ["labels.1", "corpus_match"]),
    ("[0, 1]", "[0, 1", 7, ["not valid YAML"]),
])
def test_a_mistake_is_named_with_file_line_key_and_mend(tmp_path, old, new, line, said):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}:"), message
    for words in said:
        assert words in message


def test_all_mistakes_are_reported_at_once(tmp_path):
    path = write(tmp_path, GOOD.replace("seeds", "sedes").replace("qwen", "lama"))
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_key_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"the key 'model' is missing \(The model that candidates come from"):
        load_config(write(tmp_path, GOOD.replace("model: {path: some/model}\n", "")))


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"no\.yaml: no such config file"):
        load_config(tmp_path / "no.yaml")


def test_every_value_has_its_origin(tmp_path):
    path = write(tmp_path, GOOD)
    config, origins = load_config(path, ["scoring.top_k=3", "sources.0.limit=7"], run="other")
    assert (config.run, config.scoring.top_k, config.sources[0].limit) == ("other", 3, 7)
    assert origins["run"] == "--run"
    assert origins["scoring.top_k"] == origins["sources.0.limit"] == "--set"
    assert origins["generation.generator.max_new_tokens"] == f"{path}:7"
    assert origins["generation.generator.min_new_tokens"] == "default"
    assert origins["sources.0.name"] == f"{path}:4"


@pytest.mark.parametrize(("override", "said"), [
    ("scoring.top_k", "write key.path=value"), ("sources.5.limit=1", "must be a number from 0 to 0"),
    ("run.name=x", "has no keys"), ("scoring.topk=2", "did you mean 'top_k'?"),
])
def test_a_wrong_override_is_refused(tmp_path, override, said):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, GOOD), [override])
    assert said in str(caught.value)


def test_a_plain_list_of_servers_is_the_generators(tmp_path):
    path = write(tmp_path, GOOD + "servers: [{url: 'http://a:1'}, {url: 'http://b:2'}]\n")
    servers = load_config(path)[0].servers
    assert [s.url for s in servers.generator] == ["http://a:1", "http://b:2"]
    assert servers.judge == []
    with pytest.raises(InputError, match=r"run.yaml:8: unknown key 'servers.generator.0.ulr', did you mean 'url'"):
        load_config(write(tmp_path, GOOD + "servers: [{ulr: 'http://a:1'}]\n"))


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    config, _ = load_config(write(tmp_path, GOOD + "limits: {max_failed: 1e-3}\n"))
    assert config.limits.max_failed == 0.001


def test_servers_and_workers_are_not_part_of_the_identity(tmp_path):
    path = write(tmp_path, GOOD)
    base = load_config(path)[0].identity()
    same = load_config(path, ["engine.max_workers=9", "limits.attempts=9", "servers.generator=[{url: 'http://a:1'}]",
                              "run=x", "runs_dir=elsewhere"])[0].identity()
    assert json.dumps(base) == json.dumps(same)
    for change in ("seeds=[0, 2]", "run_seed=1", "scoring.top_k=2"):
        assert load_config(path, [change])[0].identity() != base


def test_every_field_is_documented():
    from pydantic import BaseModel

    from tasks.core import config, config_generation, config_servers

    modules = (config, config_generation, config_servers)
    sections = [c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, BaseModel)]
    undocumented = [f"{c.__name__}.{n}" for c in sections for n, f in c.model_fields.items() if not f.description]
    assert len(sections) > 10
    assert undocumented == []


ROLES = GOOD.replace("{generator: {max_new_tokens: 64}}", "%s")


@pytest.mark.parametrize(("generation", "sets", "generator", "judge"), [
    ("{temperature: 0.5}", [], 0.5, 0.5),
    ("{temperature: 0.5, judge: {temperature: 0.1}}", [], 0.5, 0.1),
    ("{temperature: 0.5, generator: {temperature: 0.9}}", [], 0.9, 0.5),
    ("{generator: {temperature: 0.9}}", [], 0.9, None),
    ("{}", ["generation.temperature=0.3"], 0.3, 0.3),
    ("{generator: {temperature: 0.9}}", ["generation.temperature=0.3"], 0.3, 0.3),
    ("{temperature: 0.5}", ["generation.judge.temperature=0.2"], 0.5, 0.2),
    ("{temperature: 0.5}", ["generation.judge.temperature=0.2", "generation.temperature=0.3"], 0.3, 0.2),
    ("{temperature: 0.5, judge: {temperature: null}}", [], 0.5, None),
])
def test_a_key_without_a_role_stands_for_the_roles_that_have_none_of_their_own(tmp_path, generation, sets, generator, judge):
    config, _ = load_config(write(tmp_path, ROLES % generation), sets)
    assert (config.generation.generator.temperature, config.generation.judge.temperature) == (generator, judge)


def test_what_only_a_writer_needs_does_not_reach_the_judge(tmp_path):
    text = "{max_new_tokens: 9, min_new_tokens: 1, stop: [x], stop_token_ids: [3], ignore_eos: true, " \
           "system_prompt: Hi, sampling_mask: true, top_k: 4, context_length: 99, chat_template: t.jinja, " \
           "engine: {kv-cache-dtype: bf16}}"
    generation = load_config(write(tmp_path, ROLES % text))[0].generation
    assert generation.generator.model_dump(exclude_none=True, exclude={"template_date"}) == {
        "max_new_tokens": 9, "min_new_tokens": 1, "stop": ["x"], "stop_token_ids": [3], "ignore_eos": True,
        "system_prompt": "Hi", "sampling_mask": True, "top_k": 4, "context_length": 99, "chat_template": "t.jinja",
        "engine": {"kv-cache-dtype": "bf16"}}
    assert generation.judge.model_dump(exclude_none=True, exclude={"template_date"}) == {
        "top_k": 4, "context_length": 99, "chat_template": "t.jinja", "engine": {"kv-cache-dtype": "bf16"}}


def test_a_key_without_a_role_is_deprecated_and_keeps_its_origin(tmp_path):
    path = write(tmp_path, ROLES % "{temperature: 0.5, engine: {page-size: 4}, judge: {temperature: 0.1}}")
    with pytest.warns(RoleLessKey, match=r"run.yaml:7: generation.temperature is deprecated; write "
                                         r"generation.generator.temperature and generation.judge.temperature") as said:
        config, origins = load_config(path, ["generation.top_p=0.9"])
    assert len(said) == 3
    assert origins["generation.generator.temperature"] == f"{path}:7 (generation.temperature)"
    assert origins["generation.judge.temperature"] == f"{path}:7"
    assert origins["generation.judge.engine.page-size"] == f"{path}:7 (generation.engine)"
    assert origins["generation.judge.top_p"] == "--set"
    assert config.generation.judge.top_p == 0.9
    assert issubclass(RoleLessKey, DeprecationWarning)
    with pytest.raises(InputError, match=rf"{path}:7 \(generation.temperature\): generation.generator.temperature"):
        load_config(write(tmp_path, ROLES % "{temperature: -1}"))


@pytest.mark.parametrize("text", ["none", "None", "NONE", "' none '", "disable", "'Disabled '", "OFF", "off", "false", "no",
                                  "null"])
def test_every_word_for_off_is_off(tmp_path, text):
    config, _ = load_config(write(tmp_path, GOOD + f"servers: [{{launch: {{speculation: {text}}}}}]\n"))
    assert config.servers.generator[0].settings.speculation.algorithm == "off"


@pytest.mark.parametrize(("key", "text", "meant"), [
    ("dtype", "half", "float16"), ("dtype", "' BF16 '", "bfloat16"), ("dtype", "torch.float32", "float32"),
    ("dtype", "AUTO", "auto"), ("device", "GPU", "cuda"), ("sampling_backend", "PyTorch", "pytorch"),
])
def test_aliases_are_one_word(tmp_path, key, text, meant):
    config, _ = load_config(write(tmp_path, GOOD + f"servers: [{{launch: {{{key}: {text}}}}}]\n"))
    assert getattr(config.servers.generator[0].launch, key) == meant


@pytest.mark.parametrize(("launch", "said"), [
    ("speculation: engram", ["speculation.algorithm", "unknown value 'engram'", "did you mean 'ngram'"]),
    ("speculation: auto", ["unknown value 'auto'"]), ("speculation: true", ["unknown value True"]),
    ("dtype: int8", ["dtype", "unknown value 'int8'"]), ("dtype: none", ["unknown value 'none'"]),
    ("speculation: eagle", ["needs draft_model"]),
    ("speculation: {algorithm: eagle, draft_model: d, steps: 3}", ["belong together", "topk and draft_tokens are missing"]),
    ("speculation: {algorithm: ngram, min_breadth: 5, max_breadth: 2}", ["min_breadth (5) is above max_breadth (2)"]),
    ("speculation: {algorithm: ngram, draft_tokens: 4}", ["draft_tokens (4) is below max_breadth (10)"]),
    ("speculation: {algorithm: ngram, max_breadth: 13}", ["draft_tokens (12) is below max_breadth (13)"]),
    ("speculation: ngram, device: cpu", ["speculation needs a GPU"]),
    ("sampling_backend: flashinfer", ["SGLang samples with pytorch where it honours seeds"]),
    ("speculation: {algorithm: off, draft_tokens: 3}", ["draft_tokens: is of no use with algorithm off"]),
])
def test_an_unknown_or_impossible_setting_of_a_server_is_an_error_never_a_default(tmp_path, launch, said):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, GOOD + f"servers: [{{launch: {{{launch}}}}}]\n"))
    for words in said:
        assert words in str(caught.value)


def test_a_judge_does_not_speculate(tmp_path):
    text = GOOD + "servers: {judge: [{launch: {speculation: ngram}}]}\n"
    with pytest.raises(InputError, match="speculation is for generators"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -0.1), ("temperature", 101), ("top_k", 0), ("top_k", -2), ("top_p", 0), ("top_p", 1.1), ("min_p", 1.1),
    ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 2.1),
    ("seed", -1), ("max_new_tokens", 0), ("min_new_tokens", -1), ("stop_token_ids", "[-1]"), ("context_length", 8),
    ("template_date", "yesterday"),
])
def test_a_value_out_of_range_is_named_before_anything_is_sent(tmp_path, field, value):
    with pytest.raises(InputError, match=rf"run.yaml:7: generation\.judge.*{field}|run.yaml:7: generation\.judge: {field}"):
        load_config(write(tmp_path, ROLES % f"{{judge: {{{field}: {value}}}}}"))
