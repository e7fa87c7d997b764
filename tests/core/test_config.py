from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.core.errors import InputError
from tasks.core.resolve import load_config

GOOD = """\
run: mine
model: {path: some/model}
sources:
  - {name: sums, path: sums.jsonl, prompt_key: question, answer_key: answer, verifier: gsm8k}
heuristics: {family: qwen}
seeds: [0, 1]
generation: {max_new_tokens: 64}
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
    ("max_new_tokens: 64", "max_new_tokens: 0", 7, ["generation.max_new_tokens", "given: 0"]),
    ("max_new_tokens: 64", "max_new_tokens: many", 7, ["generation.max_new_tokens", "integer", "given: 'many'"]),
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
    assert origins["generation.max_new_tokens"] == f"{path}:7"
    assert origins["generation.min_new_tokens"] == "default"
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
    for change in ("seeds=[0, 2]", "generation.max_new_tokens=65", "run_seed=1", "scoring.top_k=2"):
        assert load_config(path, [change])[0].identity() != base


def test_every_field_is_documented():
    from pydantic import BaseModel

    from tasks.core import config

    sections = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, BaseModel)]
    undocumented = [f"{c.__name__}.{n}" for c in sections for n, f in c.model_fields.items() if not f.description]
    assert len(sections) > 10
    assert undocumented == []
