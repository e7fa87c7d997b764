"""How values are resolved, against a plain model of the rule in the README; and what YAML, --set and JSON make of it."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.core.config import RunConfig
from tasks.core.config_file import as_yaml
from tasks.core.config_generation import ALIASES, ROLES, GeneratorConfig, RoleLessKey
from tasks.core.errors import InputError
from tasks.core.generation import Value, complete, resolve_role
from tasks.core.heuristics import FAMILIES, Heuristic, Processor, family_grid, parse_processor, read_file
from tasks.core.model_defaults import ModelDefaults
from tasks.core.resolve import flatten, load_config
from tasks.core.section import is_secret
from tasks.serving.compile import compile_heuristic

GOOD = """\
run: mine
model: {path: some/model}
sources:
  - {name: sums, path: sums.jsonl}
heuristics: {family: qwen}
"""


@contextlib.contextmanager
def config_file(text: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RoleLessKey)
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        yield path


def load(text: str, sets: list[str] | None = None, run: str | None = None) -> tuple[RunConfig, dict[str, str], Path]:
    with config_file(GOOD + text) as path:
        return *load_config(path, sets, run), path


# --- precedence, field by field ---

SENT: dict[str, Any] = {
    "temperature": [0.0, 0.5, 1.0], "top_k": [-1, 7], "top_p": [1.0, 0.5], "min_p": [0.0, 0.25],
    "frequency_penalty": [0.0, 0.5], "presence_penalty": [-0.5], "repetition_penalty": [1.0, 1.5], "seed": [0, 3],
    "max_new_tokens": [100, 200], "min_new_tokens": [0, 9], "stop": [[], ["END"]], "stop_token_ids": [[], [3]],
    "ignore_eos": [True, False]}
NEUTRAL = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
           "repetition_penalty": 1.0, "max_new_tokens": 250, "min_new_tokens": 0, "stop": [], "stop_token_ids": [],
           "ignore_eos": False}
VERDICT = NEUTRAL | {"max_new_tokens": 1, "ignore_eos": True}
IN_FILE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "stop_token_ids", "stop")
PLACES = ("alias", *ROLES)


def layer(but: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: st.sampled_from([*values, None]) for name, values in SENT.items()
                                               if name not in but})


LAYERS = st.fixed_dictionaries({place: layer() for place in PLACES})


def layer_yaml(given: dict[str, dict[str, Any]], first: int) -> tuple[str, dict[tuple[str, str], int]]:
    """A `generation` section, a key a line, and the lines."""
    lines, at = ["generation:"], {}
    for place in PLACES:
        if place != "alias" and given[place]:
            lines.append(f"  {place}:")
        for name, value in given[place].items():
            lines.append(f"  {'' if place == 'alias' else '  '}{name}: {json.dumps(value)}")
            at[place, name] = first + len(lines) - 1
    return ("\n".join(lines) + "\n" if at else ""), at


def wanted(role: str, name: str, sets: dict[str, Any], file: dict[str, Any], at: dict[tuple[str, str], int], path: Path,
           model: dict[str, Any]) -> Value:
    """The README's rule: --set, the role's config (its own key before one that stands for several), the model's file,
    the neutral value. (Heuristics come in below.)"""
    stands = role in ALIASES[name]
    for layers, where in ((sets, "--set"), (file, "file")):
        for place in (role, "alias"):
            if name in layers[place] and (place == role or stands):
                value = layers[place][name]
                if value is not None:
                    note = f" (generation.{name})" if place == "alias" else ""
                    return Value(value, "set", "--set") if where == "--set" else Value(
                        value, "config", f"{path}:{at[place, name]}{note}")
                return below(role, name, model)  # null: as if nobody had said anything
    return below(role, name, model)


def below(role: str, name: str, model: dict[str, Any]) -> Value:
    if name == "seed":
        return Value(5, "default", "run_seed") if role == "generator" else Value(0, "default", "default")
    if role == "judge":
        return Value(VERDICT[name], "method", "a verdict is read from the judge's own probabilities")
    return Value(model[name], "model", "m/file.json") if name in model else Value(NEUTRAL[name], "default", "default")


def of_file(given: dict[str, Any], more: tuple[tuple[str, float], ...] = ()) -> ModelDefaults:
    cuts = tuple((n, given[n]) for n in ("top_k", "top_p", "min_p") if n in given and given[n] != NEUTRAL[n])
    return ModelDefaults(source="m/file.json", commit=None, cached=False, raw={}, fields=dict(given), notes=(),
                         processors=() if given.get("temperature") == 0 else cuts + more)


MODEL_FILE = st.fixed_dictionaries({}, optional={n: st.sampled_from(SENT[n]) for n in IN_FILE}).map(
    # as it is read: a greedy file has no cuts
    lambda f: {n: v for n, v in f.items() if f.get("temperature") != 0 or n not in ("top_k", "top_p", "min_p")})


@settings(max_examples=60)
@given(LAYERS, LAYERS, MODEL_FILE, st.randoms(use_true_random=False))
def test_every_field_and_its_origin_are_those_of_the_rule(file, sets, model, shuffle):
    text, at = layer_yaml(file, first=GOOD.count("\n") + 2)
    options = [f"generation.{name if place == 'alias' else f'{place}.{name}'}={json.dumps(value)}"
               for place in PLACES for name, value in sets[place].items()]
    shuffle.shuffle(options)  # in whatever order they stand on the command line
    config, origins, path = load("run_seed: 5\n" + text, options)
    for role in ROLES:
        expected = {name: wanted(role, name, sets, file, at, path, model) for name in SENT}
        if expected["min_new_tokens"].value > expected["max_new_tokens"].value:
            with pytest.raises(InputError, match=f"generation.{role}: min_new_tokens is 9"):
                resolve_role(role, config.generation.role(role), origins, of_file(model), config.run_seed)
            continue
        found = resolve_role(role, config.generation.role(role), origins, of_file(model), config.run_seed)
        assert found.values_from == expected


# --- and what that makes of a heuristic ---

STEPS = {"temperature": [0.0, 0.7, 1.0], "top_k": [1, 9], "top_p": [0.3, 1.0], "min_p": [0.0, 0.05], "typical": [0.9],
         "epsilon": [1e-3], "eta": [1e-3]}
CHAIN = st.lists(st.sampled_from(list(STEPS)), unique=True, max_size=4).flatmap(
    lambda names: st.tuples(*(st.tuples(st.just(n), st.sampled_from(STEPS[n]), st.sampled_from([1, 3])) for n in names)))
OWN = st.fixed_dictionaries({}, optional={n: st.sampled_from(SENT[n]) for n in ("temperature", "top_k", "top_p", "min_p")})


@settings(max_examples=200)
@given(CHAIN, OWN, OWN, MODEL_FILE, st.booleans(), st.booleans())
@example(chain=(), sets={}, own={}, model={"temperature": 0.0}, typical=True, fill=False)
@example(chain=(("top_p", 1.0, 1),), sets={}, own={}, model={"top_k": 7}, typical=False, fill=False)
@example(chain=(("top_k", 9, 3), ("temperature", 0.7, 1)), sets={"top_k": 7}, own={}, model={}, typical=False, fill=False)
def test_what_a_heuristic_executes_is_what_the_rule_says(chain, sets, own, model, typical, fill):
    heuristic = Heuristic("h", tuple(Processor(n, v, 1 if n == "temperature" else keep) for n, v, keep in chain))
    defaults = of_file(model, (("typical", 0.8),) if typical else ())
    origins = {f"generation.generator.{n}": "--set" for n in sets} | {
        f"generation.generator.{n}": "run.yaml:1" for n in own if n not in sets}
    found = resolve_role("generator", GeneratorConfig(**(own | sets)), origins, defaults)
    done = complete(heuristic, found, defaults, fill)

    named = {n: v for n, v, _ in chain}
    takes = fill or not chain
    says: dict[str, float] = {}
    for name in STEPS:
        value = sets.get(name, named.get(name, own.get(name)))
        if value is None and takes:
            value = dict(defaults.processors).get(name, model.get(name) if name == "temperature" else None)
        if value is not None and (value != NEUTRAL.get(name) or (name == "temperature" and name in named)):
            says[name] = value
    if says.get("temperature") == 0:
        says = {"temperature": 0.0}
    assert {p.name: p.value for p in done.processors} == says
    # order: the heuristic's own stay as they stood, each with what it keeps
    stay = [(n, keep) for n, _, keep in chain if n in says]
    assert [(p.name, p.min_tokens_to_keep) for p in done.processors if p.name in named] == [
        (n, 1 if n == "temperature" else keep) for n, keep in stay]
    if "temperature" in says and "temperature" not in named:
        assert done.processors[0].name == "temperature"
    added = [p.name for p in done.processors if p.name not in named and p.name != "temperature"]
    assert added == sorted(added, key=list(STEPS).index)  # Hugging Face's order
    if done.processors and len(stay) == len(chain):  # nothing was left out, for a file to fill in
        assert complete(done, found, defaults, fill) == done
    # and the request says the same, natively or step by step
    for honours in (False, True):
        sent = compile_heuristic(done, honours)
        if sent.custom_params is None:
            assert {"temperature": sent.temperature, "top_k": sent.top_k, "top_p": sent.top_p, "min_p": sent.min_p} == {
                n: says.get(n, NEUTRAL[n]) for n in ("temperature", "top_k", "top_p", "min_p")}
            assert set(says) <= {"temperature", "top_k", "top_p", "min_p"}
        else:
            assert (sent.temperature, sent.top_k, sent.top_p, sent.min_p) == (1.0, -1, 1.0, 0.0)
            flat = json.dumps(sent.custom_params)
            assert all(str(float(p.value)).rstrip("0") in flat or str(p.value) in flat for p in done.processors)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_has_the_files_cuts_in_every_family_and_nothing_else_has(family):
    file = of_file({"temperature": 0.6, "top_k": 7, "top_p": 0.5})
    found = resolve_role("generator", GeneratorConfig(), {}, file)
    for h in family_grid(family, file.processors):
        done = complete(h, found, file, False)
        assert done == h
        cuts = [(p.name, p.value) for p in done.processors[1:]]
        assert (cuts == [("top_k", 7), ("top_p", 0.5)]) == h.name.startswith("official"), h
        filled = complete(h, found, file, True)
        assert filled.processors[: len(h.processors)] == h.processors  # its own first, as they stand
        assert {"top_k", "top_p"} <= {p.name for p in filled.processors}


def test_minus_zero_and_a_cut_that_cuts_nothing_are_no_heuristics_of_their_own():
    def of(*steps: dict[str, Any]) -> Heuristic:
        return Heuristic("h", tuple(parse_processor(s, "here") for s in steps))

    zero, minus = ({"name": "temperature", "params": {"temperature": v}} for v in (0.0, -0.0))
    assert of(zero).id == of(minus).id
    warm, all_of_it = {"name": "temperature", "params": {"temperature": 0.7}}, {"name": "top_p", "params": {"top_p": 1}}
    neutral = resolve_role("generator", GeneratorConfig(), {}, None)
    assert complete(of(warm, all_of_it), neutral, None, False).id == of(warm).id
    ids = [resolve_role("generator", GeneratorConfig(frequency_penalty=v), {}, None).identity() for v in (0.0, -0.0)]
    assert json.dumps(ids[0]) == json.dumps(ids[1])


def test_heuristics_are_read_by_the_same_yaml_as_the_config(tmp_path):
    path = tmp_path / "h.yaml"
    path.write_text("\ufeffsampling_pipelines:\r\n  - {name: é, processors: [{name: eta, params: {epsilon: 1e-3}}]}\r\n",
                    encoding="utf-8")
    assert [(h.name, h.describe()) for h in read_file(path)] == [("é", "eta 0.001")]
    for bad, said in (("{name: x, weight: .nan, processors: []}", "weight: nan"), ("[", "line 3: "),
                      ("{name: x, processors: [{name: top_p, params: {top_p: .inf}}]}", "inf is out of range"),
                      ("{name: x, processors: [{name: top_k, params: {top_k: 2001-13-01}}]}", "line 2: month must be")):
        path.write_text(f"sampling_pipelines:\n  - {bad}\n")
        with pytest.raises(InputError, match=said):
            read_file(path)


# --- origins ---

def test_the_short_forms_have_the_lines_of_what_they_stand_for():
    config, origins, path = load("servers:\n  - url: http://a:1\n    expect: {dtype: half}\n  - launch:\n"
                                 "      speculation: ngram\n")
    assert [s.url for s in config.servers.generator] == ["http://a:1", None]
    assert origins["servers.generator.0.url"] == f"{path}:7"
    assert origins["servers.generator.0.expect.dtype"] == f"{path}:8"
    assert origins["servers.generator.1.launch.speculation.algorithm"] == f"{path}:10"
    assert origins["servers.generator.1.launch.device"] == "default"
    with pytest.raises(InputError, match=r"run.yaml:8: unknown key 'servers.generator.0.expekt', did you mean 'expect'"):
        load("servers:\n  - url: http://a:1\n    expekt: {dtype: half}\n")


@pytest.mark.parametrize("servers", ["servers: [{url: 'http://a:1'}]\n", "servers: {generator: [{url: 'http://a:1'}]}\n"])
@pytest.mark.parametrize("key", ["servers.0.url", "servers.generator.0.url"])
def test_a_server_is_overridden_by_either_spelling(servers, key):
    config, origins, _ = load(servers, [f"{key}=http://b:2"])
    assert config.servers.generator[0].url == "http://b:2"
    assert origins["servers.generator.0.url"] == "--set"
    config, _, _ = load("", ["servers=[{url: 'http://c:3'}]", f"{key}=http://b:2"])
    assert config.servers.generator[0].url == "http://b:2"


def test_what_an_anchor_names_twice_is_two_things():
    text = "generation:\n  max_new_tokens: 9\n  generator: &g {top_k: 5}\n  judge: *g\n"
    config, _, _ = load(text, ["generation.generator.top_p=0.5", "generation.generator.engine.page-size=4"])
    assert config.generation.generator.top_p == 0.5 and config.generation.judge.top_p is None
    assert config.generation.judge.max_new_tokens is None  # a writer's key alone
    config, _, _ = load("generation: {engine: {page-size: 4}}\n", ["generation.judge.engine.kv-cache-dtype=bf16"])
    assert config.generation.generator.engine == {"page-size": 4}
    assert config.generation.judge.engine == {"page-size": 4, "kv-cache-dtype": "bf16"}
    config, _, _ = load("servers: {generator: &s [{url: 'http://a:1'}], judge: *s}\n", ["servers.judge.0.url=http://b:2"])
    assert (config.servers.generator[0].url, config.servers.judge[0].url) == ("http://a:1", "http://b:2")


def test_a_merged_mapping_has_the_lines_of_its_own_keys_and_of_what_it_merges():
    text = ("generation:\n  generator: &g\n    top_k: 5\n    engine: {page-size: 4}\n  judge:\n    <<: *g\n    top_p: 0.5\n"
            "    engine: {kv-cache-dtype: bf16}\n")
    config, origins, path = load(text)
    assert config.generation.judge.top_k == 5
    assert {k: o for k, o in origins.items() if k.startswith("generation.judge") and o != "default"} == {
        "generation.judge.top_k": f"{path}:8", "generation.judge.top_p": f"{path}:12",
        "generation.judge.engine.kv-cache-dtype": f"{path}:13"}


def test_a_mapping_that_is_set_is_the_origin_of_what_it_holds_alone():
    config, origins, path = load("seeds: [0, 1]\n", [
        "generation={temperature: 0.5, generator: {top_k: 4}}", "sources.0={name: x, path: y}", "seeds.1=7"])
    assert config.generation.judge.temperature == 0.5 and config.seeds == [0, 7]
    found = {k for k, o in origins.items() if o.startswith("--set")}
    assert found == {"generation.generator.temperature", "generation.judge.temperature", "generation.generator.top_k",
                     "sources.0.name", "sources.0.path", "seeds"}
    assert origins["generation.generator.template_date"] == "default" and origins["run"] == f"{path}:1"


@pytest.mark.parametrize("turn", [1, -1])
def test_an_override_without_a_role_is_not_lost_beside_one_of_a_whole_section(turn):
    for whole in ("generation={generator: {max_new_tokens: 4}}", "generation.judge={max_new_tokens: 4}"):
        config, _, _ = load("", ["generation.top_p=0.3", whole][::turn])
        assert (config.generation.generator.top_p, config.generation.judge.top_p) == (0.3, 0.3)
    config, _, _ = load("", ["generation.top_p=0.3", "generation.judge={top_p: 0.9}"][::turn])
    assert (config.generation.generator.top_p, config.generation.judge.top_p) == (0.3, 0.9)
    config, _, _ = load("", ["generation.engine.page-size=4", "generation.judge.engine={kv-cache-dtype: bf16}"][::turn])
    assert config.generation.generator.engine == {"page-size": 4}
    assert config.generation.judge.engine == {"kv-cache-dtype": "bf16"}


# --- YAML as people write it ---

@pytest.mark.parametrize(("text", "sets", "said"), [
    ("generation: {generator: {template_date: 2024-13-45}}\n", [], r"run.yaml:6: not valid YAML: month must be in 1..12"),
    ("", ["generation.generator.template_date=2024-13-01"], r"--set generation.+ the value is not valid YAML: month must"),
    ("a: &a {b: *a}\n", [], "an alias .* stands inside of what it names"),
    ("generation: " + "[" * 1200, [], "nested too deeply"),
    ("", ["seeds=" + "[" * 1200], "nested too deeply"),
    ("generation: {generator: {temperature: yes}}\n", [], r"run.yaml:6: generation.generator.temperature: must be a number, not"),
    ("seeds: [true]\n", [], "run.yaml:6: seeds: must be a number"), ("run_seed: off\n", [], "run_seed: must be a number"),
    ("quality: {prior_sd: .inf}\n", [], "quality.prior_sd: must be a number of logits from 0.001 to 1000, or auto"),
    ("limits: {request_timeout_s: .nan}\n", [], "limits.request_timeout_s: input should be"),
    (f"seeds: [{10**30}]\n", [], r"seeds: must be 0 or more, and below 2\*\*62"),
    (f"run_seed: {10**400}\n", [], "run_seed: input should be less than"),
    (f"run_seed: 1{'0' * 5000}\n", [], "run.yaml:6: not valid YAML: Exceeds the limit"),
    ('generation: {generator: {system_prompt: "\\ud800"}}\n', [], "system_prompt: has half of a surrogate pair"),
    ('generation: {generator: {stop: ["a", "\\udfff"]}}\n', [], "stop: has half of a surrogate pair"),
    ("", ["sources.².limit=1"], "must be a number from 0 to 0"), ("", ["sources.-1.limit=1"], "must be a number from 0 to 0"),
    ("", ["model.revision=1234567"], r"model.revision: input should be a valid string \(given: 1234567\); put it in quotes"),
    ("", ["generation.generator=null"], "--set: generation.generator: a mapping is needed"),
    ("", ["seeds="], "--set: seeds: input should be a valid list"), ("", ["=1"], "write key.path=value"),
    ("", ["seeds=!!python/object:os.system x"], "could not determine a constructor"),
    ("1: x\n", [], "1: keys should be strings"), ("? [a]\n: 3\n", [], "run.yaml:6: not valid YAML: found unhashable key"),
    ("engine: {task_runner: Threads}\n", [], "unknown value 'Threads', did you mean 'threads'"),
    ("labels: [no]\n", [], "labels.0: unknown value False"),
    ("generation: {generator: {template_date: 2024-12-01T10:00:00}}\n", [], "template_date: datetimes provided to dates"),
])
def test_a_trap_is_an_error_with_its_place(text, sets, said):
    with pytest.raises(InputError, match=said):
        load(text, sets)


@pytest.mark.parametrize("text", ["template_date: 2024-12-01", "template_date: '2024-12-01'", 'template_date: "2024-12-01"'])
def test_a_date_is_one_however_it_is_written(text):
    assert load(f"generation: {{generator: {{{text}}}}}\n")[0].generation.generator.template_date == datetime.date(2024, 12, 1)


@pytest.mark.parametrize("name", ["2024", "no", "2024-01-01", "1e3", "null"])
def test_a_runs_name_on_the_command_line_is_text_whatever_it_looks_like(name):
    config, origins, _ = load("", run=name)
    assert (config.run, origins["run"]) == (name, "--run")


def test_windows_lines_and_a_byte_order_mark_change_nothing():
    text = (GOOD + "seeds: [0, 2]\ngeneration: {generator: {top_k: 5}}\n")
    plain, origins, _ = load("seeds: [0, 2]\ngeneration: {generator: {top_k: 5}}\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        config, other = load_config(path)
    assert config == plain
    assert [o.rpartition(":")[2] for o in other.values()] == [o.rpartition(":")[2] for o in origins.values()]


# --- secrets ---

@pytest.mark.parametrize("flag", ["api-key", "API_KEY", "--api-key", "admin-api-key", "apikey", "HF_TOKEN", "hf-token",
                                  "hftoken", "ssl-keyfile-password", "password", "secret", "otlp-headers", "credentials"])
@pytest.mark.parametrize("where", ["generation: {%s}", "generation: {judge: {%s}}", "servers: [{launch: {%s}}]",
                                   "servers: [{url: 'http://a:1', expect: {%s}}]"])
def test_a_flag_that_holds_a_secret_is_refused_and_not_repeated(flag, where):
    key = "engine" if "generation" in where else "flags"
    with pytest.raises(InputError, match="no secret belongs") as caught:
        load(where % f"{key}: {{{flag}: hunter2}}" + "\n")
    assert "hunter2" not in str(caught.value) and is_secret(flag)


@pytest.mark.parametrize("text", [
    "servers: [{url: 'http://me:hunter2@a:1'}]\n", "servers: [{url: 'https://hunter2@a:1'}]\n",
    "runs_dir: 'ftp://me:hunter2@a/runs'\n",
    "servers: [{launch: {flags: {otlp-traces-endpoint: 'http://me:hunter2@a:1'}}}]\n"])
def test_an_address_with_a_password_is_refused_and_not_repeated(text):
    with pytest.raises(InputError) as caught:
        load(text)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        load("", ["sources.0.path=https://me:hunter2@a/x.jsonl"])
    assert "hunter2" not in str(caught.value) and "no secret belongs" in str(caught.value)
    assert load("", ["sources.0.path=sftp://me@a/x.jsonl"])[0].sources[0].path == "sftp://me@a/x.jsonl"


@pytest.mark.parametrize("flag", ["tokenizer-mode", "page-size", "max-total-tokens", "kv-cache-dtype", "ssl-certfile",
                                  "skip-tokenizer-init", "swa-full-tokens-ratio"])
def test_a_flag_that_only_sounds_like_one_is_not_refused(flag):
    assert not is_secret(flag)


# --- as Prefect hands it over ---

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
FLOAT = st.floats(0.01, 1)
FLAGS = st.dictionaries(st.sampled_from(["page-size", "kv-cache-dtype", "x"]), st.one_of(
    TEXT.filter(lambda t: "@" not in t), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


GENERATION = {
    "temperature": st.floats(0, 100), "top_k": st.sampled_from([-1, 1, 2**31 - 1]), "top_p": FLOAT, "min_p": FLOAT,
    "frequency_penalty": st.floats(-2, 2), "repetition_penalty": FLOAT, "seed": st.integers(0, 2**62 - 1),
    "max_new_tokens": st.integers(50, 99), "min_new_tokens": st.integers(0, 50), "stop": st.lists(TEXT, max_size=2),
    "stop_token_ids": st.lists(st.integers(0, 99), max_size=2), "ignore_eos": st.booleans(),
    "context_length": st.integers(16, 99), "chat_template": TEXT, "template_date": st.dates(), "system_prompt": TEXT,
    "engine": FLAGS}
SETTINGS = {
    "model": TEXT, "dtype": st.sampled_from(["half", "bf16", "auto"]), "custom_processors": st.booleans(),
    "context_length": st.integers(16, 99), "mask_limit": st.integers(2, 99), "flags": FLAGS,
    "speculation": st.sampled_from(["off", None, False, "ngram", {"algorithm": "eagle", "draft_model": "d"},
                                    {"algorithm": "ngram", "min_breadth": 1, "max_breadth": 4}])}
SERVER = st.one_of(
    some(expect=some(**SETTINGS), max_in_flight=st.integers(1, 9)).map(lambda s: s | {"url": "http://a:1"}),
    some(launch=some(**SETTINGS, gpus=st.lists(st.integers(0, 7)), port=st.integers(1, 9), mem_fraction=st.just(0.5)))
    .map(lambda s: s | {"launch": s.get("launch", {})}))
CONFIG = some(
    run_seed=st.integers(0, 2**62 - 1), seeds=st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=3, unique=True),
    allow_mismatch=st.booleans(), runs_dir=TEXT.filter(lambda t: "@" not in t),
    servers=st.one_of(st.lists(SERVER, min_size=1, max_size=2), some(generator=st.lists(SERVER, min_size=1, max_size=2))),
    generation=some(generator=some(**GENERATION, sampling_mask=st.booleans()), judge=some(**GENERATION)),
    labels=st.lists(st.sampled_from(["quality", "diversity", "verifiers"]), unique=True),
    quality=some(prior_sd=st.floats(1e-3, 1e3), template=TEXT, model=st.just({"path": "j", "revision": "r"})),
    scoring=some(top_k=st.integers(1, 2**70), per=st.sampled_from([["prompt"], ["prompt", "seed"]])),
    limits=some(max_failed=st.floats(0, 1), attempts=st.integers(1, 9)),
    heuristics=some(family=st.sampled_from(FAMILIES), files=st.lists(TEXT, max_size=2), fill_from_model=st.booleans()),
).map(lambda c: {"run": "r", "model": {"path": "m"}, "sources": [{"name": "s", "path": "p.jsonl"}], "heuristics": {}} | c)


@settings(max_examples=25)
@given(CONFIG)
@example({"run": "r", "model": {"path": "m"}, "sources": [{"name": "s", "path": "p.jsonl"}], "heuristics": {},
          "runs_dir": "a\x85b"})
@example({"run": "r", "model": {"path": "m"}, "sources": [{"name": "s", "path": "p.jsonl"}],
          "heuristics": {"family": "llama", "files": ["0E0", "1e-3"]}})
def test_a_config_is_the_same_after_json_after_yaml_and_after_itself(raw):
    config = RunConfig.model_validate(raw)
    text = config.model_dump_json()
    assert RunConfig.model_validate_json(text) == config
    assert RunConfig.model_validate_json(text).identity() == config.identity()
    plain = config.model_dump(mode="json")
    VALIDATOR.validate(plain)
    assert RunConfig.model_validate(plain) == config
    assert all(isinstance(v, (str, int, float, bool, list, dict, type(None))) for v in flatten(plain).values())
    assert not any(isinstance(v, float) and not math.isfinite(v) for v in flatten(plain).values())
    with config_file(as_yaml(plain)) as path:
        assert load_config(path)[0] == config


SCHEMA = RunConfig.model_json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_form_that_a_ui_makes_of_the_config_takes_the_demo():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for name in ("demo", "gpu"):
        raw = yaml.safe_load((Path(__file__).parents[2] / f"configs/{name}.yaml").read_text(encoding="utf-8"))
        jsonschema.validate(raw, SCHEMA)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(raw | {"sedes": [0]}, SCHEMA)


def test_a_judge_that_is_expected_to_serve_a_model_is_asked_in_that_models_tokens():
    raw = {"run": "r", "model": {"path": "m"}, "sources": [{"name": "s", "path": "p.jsonl"}], "heuristics": {}}
    judge = {"url": "http://a:1", "expect": {"model": "owner/judge"}}
    assert RunConfig.model_validate(raw | {"servers": {"judge": [judge]}}).judge_model.path == "owner/judge"
    named = raw | {"servers": {"judge": [judge]}, "quality": {"model": {"path": "owner/other"}}}
    assert RunConfig.model_validate(named).judge_model.path == "owner/other"
