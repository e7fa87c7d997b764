"""What becomes of a run when its settings change, or when run.json is all that is left of what they named."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli, terminal
from flows.prepare import Plan, check, open_run
from tasks.context import Context, release
from tasks.core.chat_template import ChatTemplate
from tasks.core.config import RunConfig
from tasks.core.errors import InputError
from tasks.core.resolve import load_config, recorded_run
from tasks.generation.grid import Grid
from tasks.labels.quality.judge import Judge
from tasks.labels.quality.labeller import QualityLabeller
from tests.fake_sglang import FakeSGLang
from tests.runs import build, expecting, make_config

JUDGE = {"user": "{prompt}\n1: {a}\n2: {b}\nBest?", "verdicts": ["1", "2"], "assistant_prefix": ""}
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
STAMPED = "It is {{ strftime_now('%d %b %Y') }}.\n" + PLAIN
NOWHERE = "http://127.0.0.1:9"


def changed(raw: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with `a__b__0=value` set at a.b.0."""
    raw = copy.deepcopy(raw)
    for key, value in values.items():
        target: Any = raw
        *path, last = key.split("__")
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        target[last] = value
    return raw


def opened(raw: dict[str, Any]) -> Context:
    plan = check(RunConfig.model_validate(raw), {})
    with plan.prompts:
        ctx = open_run(plan)
    release(ctx.url)
    return ctx


def ids(ctx: Context) -> dict[tuple[str, str], set[tuple[str, int]]]:
    """(candidate id, request seed) by source and heuristic."""
    out: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for shard in range(ctx.shards):
        grid = Grid(ctx, shard)
        for cell in map(grid.cell, range(len(grid))):
            out.setdefault((cell.prompt["source"], cell.heuristic.name), set()).add((cell.candidate_id, cell.request_seed))
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_model) -> tuple[dict[str, Any], Context]:
    """A config of two sources and four heuristics, and a run of it that stands at its first request."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(tiny_model, folder / "model/tiny")
    (folder / "model/tiny/generation_config.json").write_text('{"top_k": 20}')
    raw = make_config(folder, folder / "model/tiny", [NOWHERE])
    return raw, opened(raw)


# What a change does to ids: none, all, or those of some sources and heuristics; and to a run of that name.
HARMLESS: dict[str, Any] = {
    "servers__generator__0__url": "http://127.0.0.1:8", "servers__generator__0__expect": {"dtype": "half"},
    "servers__generator__0__max_in_flight": 3, "allow_mismatch": True, "servers__judge": [{"url": "http://127.0.0.1:7"}],
    "generation__generator__template_date": "2025-01-01", "generation__judge__template_date": "2025-01-01",
    "generation__generator__context_length": 4000,
    "generation__generator__system_prompt": "", "generation__generator__frequency_penalty": -0.0,
    "generation__generator__seed": 0, "generation__generator__temperature": None, "generation__generator__min_p": 0.0,
    "diversity__device": "cuda", "diversity__batch_size": 3, "verifiers__workers": 4, "verifiers__time_limit_s": 3,
    "limits__max_failed": 0.5, "limits__request_timeout_s": 7, "limits__attempts": 2, "limits__request_deadline_s": 9,
    "limits__wait_for_servers_s": 1, "engine__max_workers": 2, "model__path": None}
NO_ID: dict[str, Any] = {
    "sources__0__license": "x", "sources__0__diversity": False, "labels": ["verifiers"], "quality__extra_rounds": 2,
    "quality__template": "gram", "quality__max_prompt_tokens": 1500, "quality__prior_sd": 1.0, "engine__shard_prompts": 3,
    "scoring__weights__quality": 0.5, "scoring__top_k": 2, "scoring__per": ["prompt"], "scoring__incorrect": "keep",
    "dataset__validation": 0.2, "dataset__license": "y", "limits__incomplete_prompts": "keep",
    "generation__generator__sampling_mask": True, "diversity__embedding_model": "x"}
EVERY_ID: dict[str, Any] = {
    "run_seed": 1, "model__revision": "abc", **{f"generation__generator__{k}": v for k, v in {
        "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2, "seed": 4, "max_new_tokens": 7,
        "min_new_tokens": 1, "stop": ["x"], "stop_token_ids": [5], "ignore_eos": True, "chat_template": PLAIN,
        "system_prompt": "Hi.", "min_p": 0.2, "engine": {"kv-cache-dtype": "fp8_e5m2"}}.items()}}
SOME_IDS: dict[str, tuple[Any, set[tuple[str, str]]]] = {
    # the heuristics that lack it, or the source that it is said of
    "generation__generator__temperature": (0.4, {(s, "typical") for s in ("sums", "stories")}),
    "generation__generator__top_k": (7, {(s, h) for s in ("sums", "stories") for h in ("warm", "nucleus", "typical")}),
    "generation__generator__top_p": (0.6, {(s, h) for s in ("sums", "stories") for h in ("warm", "typical")}),
    "heuristics__fill_from_model": (True, {(s, h) for s in ("sums", "stories") for h in ("warm", "nucleus", "typical")}),
    "sources__0__system_prompt": ("Hi.", {("sums", h) for h in ("warm", "nucleus", "typical", "cut then heat")}),
    "sources__1__prompt_key": ("title", {("stories", h) for h in ("warm", "nucleus", "typical", "cut then heat")})}


def beside(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with one change; a source that is read by another column has that column before and after."""
    if key == "model__path":  # the same folder under the same name: nothing is changed
        return raw
    return changed(raw, **{key: value})


@pytest.mark.parametrize("key", HARMLESS)
def test_what_shapes_no_token_changes_no_id_and_may_change_under_way(small, key):
    raw, before = small
    now = opened(beside(raw, key, HARMLESS[key]))
    assert ids(now) == ids(before)
    assert now.raw["identity"] == before.raw["identity"]


@pytest.mark.parametrize("key", [*NO_ID, *EVERY_ID, *SOME_IDS])
def test_what_shapes_a_token_is_in_the_ids_and_what_shapes_the_dataset_in_the_run(small, key):
    raw, before = small
    value = SOME_IDS[key][0] if key in SOME_IDS else (NO_ID | EVERY_ID)[key]
    if key == "sources__1__prompt_key":
        path = Path(raw["sources"][1]["path"]).with_name("titled.jsonl")
        path.write_text("".join(json.dumps({"prompt": f"Tell of {n}.", "title": n}) + "\n" for n in ("rain", "a lamp")))
        raw = changed(raw, run="titled", sources__1__path=str(path))
        before = opened(raw)
    now = beside(raw, key, value)
    with pytest.raises(InputError, match=r"was begun with another config:\n  .+: was .+, now .+"):
        opened(now)
    other = opened(now | {"run": f"other-{key.replace('_', '-')}"})
    was, became = ids(before), ids(other)
    differ = {k for k in was if was[k] != became[k]}
    assert differ == (set() if key in NO_ID else set(was) if key in EVERY_ID else SOME_IDS[key][1])
    assert all(not {c for c, _ in was[k]} & {c for c, _ in became[k]} for k in differ)


JUDGED: dict[str, Any] = {
    "temperature": 0.4, "top_k": 7, "top_p": 0.6, "frequency_penalty": 0.5, "presence_penalty": 0.5, "seed": 4,
    "repetition_penalty": 1.2, "max_new_tokens": 7, "min_new_tokens": 1, "stop": ["x"], "stop_token_ids": [5],
    "ignore_eos": False, "chat_template": PLAIN, "system_prompt": "Judge well."}


@pytest.mark.parametrize("field", JUDGED)
def test_a_field_of_the_judge_remakes_the_labels_and_no_candidate(small, field):
    raw, before = small
    now = changed(raw, **{f"generation__judge__{field}": JUDGED[field]})
    with pytest.raises(InputError, match=r"was begun with another config:\n  generation.judge."):
        opened(now)
    other = opened(now | {"run": f"judged-{field.replace('_', '-')}"})
    assert ids(other) == ids(before)
    assert other.raw["candidate_identity"] == before.raw["candidate_identity"]
    assert QualityLabeller().settings(other) != QualityLabeller().settings(before)


def test_a_date_is_in_the_ids_where_a_template_stamps_it(small):
    raw, _ = small
    raw = changed(raw, run="stamped", generation__generator__chat_template=STAMPED)
    before = opened(raw)
    later = changed(raw, generation__generator__template_date="2025-01-01")
    with pytest.raises(InputError, match=r"generation.generator.chat_template: was"):
        opened(later)
    now = opened(later | {"run": "later"})
    for ctx, day in ((before, "26 Jul 2024"), (now, "01 Jan 2025")):
        texts = [ctx.tokenizer.decode(p["prompt_ids"]) for p in ctx.store.read("prompts.parquet").to_pylist()]
        assert texts and all(t.startswith(f"It is {day}.\n") for t in texts)
    assert all(a.isdisjoint(b) for a, b in zip(ids(before).values(), ids(now).values(), strict=True))


# --- run.json and nothing else ---

@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model) -> tuple[Path, list[dict[str, Any]]]:
    """A finished run over files of every kind: its run.json, and what its servers were sent."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model, folder / "model/tiny")
    (folder / "model/tiny/generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [256, 7]}')
    (folder / "chat.jinja").write_text(STAMPED)
    (folder / "judge.yaml").write_text(yaml.safe_dump(JUDGE))
    with FakeSGLang(deterministic=False) as server:
        raw = make_config(folder, folder / "model/tiny", [server.url], seeds=[0], labels=["quality"])
        raw["sources"] = raw["sources"][1:]
        raw |= {"generation": {"generator": {"chat_template": str(folder / "chat.jinja"), "system_prompt": "Déjà vu 🌧"},
                               "judge": {"top_p": 0.5}}}
        raw["quality"] |= {"template": str(folder / "judge.yaml")}
        expecting(raw, deterministic=False)
        ctx = build(raw)
    release(ctx.url)
    assert ctx.store.glob("candidates/*/*.parquet") and ctx.raw["servers"]["generator"][0]["model_path"]
    return Path(ctx.store.path("run.json")), list(server.requests)


@pytest.fixture
def alone(finished, tmp_path) -> Path:
    """The run.json of a finished run, all that it names gone but sources and model."""
    recorded, _ = finished
    folder = recorded.parents[2]
    for name in ("heuristics.yaml", "chat.jinja", "judge.yaml", "model/tiny/generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    copied = tmp_path / "run.json"
    shutil.copy(recorded, copied)
    return copied


def planned(path: Path, sets: list[str] | None = None, run: str | None = None) -> tuple[Plan, Context]:
    config, origins = load_config(path, sets, run)
    plan = check(config, origins, recorded_run(path))
    with plan.prompts:
        ctx = open_run(plan)
    release(ctx.url)
    return plan, ctx


@pytest.mark.parametrize("crlf", [False, True])
def test_it_goes_on_under_its_own_name_while_its_candidates_stand(alone, finished, crlf):
    if crlf:
        alone.write_bytes(b"\xef\xbb\xbf" + alone.read_bytes().replace(b"\n", b"\r\n"))
    before = json.loads(finished[0].read_text(encoding="utf-8"))
    _, ctx = planned(alone, ["limits.attempts=2"])
    assert {k for k in before if before[k] != ctx.raw[k]} <= {"config", "origins"}
    planned(alone)
    assert json.loads(finished[0].read_text(encoding="utf-8")) == before


@pytest.mark.parametrize(("override", "kept"), [
    ("limits.max_failed=0.5", True), ("servers=[{url: 'http://127.0.0.1:8'}]", True),
    ("servers.generator.0.max_in_flight=2", True), ("generation.judge.top_p=0.9", True), ("seeds=[7]", False),
    ("generation.generator.template_date=2025-01-01", False), ("generation.generator.top_p=0.5", False),
    ("generation.temperature=0.3", False), ("generation.generator.system_prompt=Hi.", False), ("generation={generator: {max_new_tokens: 3}}", None),
    ("generation.generator.chat_template=null", False), ("quality.template=few_shot", True), ("heuristics.family=generic", None),
    ("generation.generator.engine.page-size=4", False), ("labels=[]", True),
])
def test_every_kind_of_override_is_applied_to_it(alone, finished, override, kept):
    was = ids(Context(str(finished[0].parent)))
    _, now = planned(alone, [override], "again")
    became = ids(now)
    shutil.rmtree(now.url)
    if kept is not None:
        same = {k: v for k, v in became.items() if was.get(k) == v}
        assert (same == was) if kept else not same
    if "template_date" in override:  # the recorded template, told another day; its file is gone
        assert now.chat_template("generator").source == STAMPED and str(now.chat_template("generator").date) == "2025-01-01"
    if kept is not True:
        with pytest.raises(InputError, match="was begun with another config"):
            planned(alone, [override])


@pytest.mark.parametrize("key", ["config", "origins", "inputs", "identity", "prompts", "prompts_digest", "tokenizer"])
def test_one_of_another_version_is_refused_by_what_it_lacks(alone, key, capsys, monkeypatch):
    raw = json.loads(alone.read_text(encoding="utf-8"))
    for spoilt in ({k: v for k, v in raw.items() if k != key}, raw | {key: None}):
        alone.write_text(json.dumps(spoilt))
        if key == "config" and "config" not in spoilt:
            continue  # then it is no run.json: its keys are named as unknown
        with pytest.raises(InputError, match=f"run.json: a run.json of another version of Winnow .*, without {key};"):
            planned(alone)
    monkeypatch.setattr(terminal.console, "stderr", True)
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(alone)])
    assert caught.value.code == 2


@pytest.mark.parametrize(("path", "value"), [
    ("heuristics", [{"path": "x"}]), ("heuristics", 3), ("generation_config", {"content": {}}), ("chat_templates", []),
    ("chat_templates", {"generator": {"name": {}}, "judge": 3}), ("judge_template", {"name": "few_shot"})])
def test_one_whose_inputs_are_others_is_refused_or_read_anew(alone, path, value):
    raw = json.loads(alone.read_text(encoding="utf-8"))
    raw["inputs"][path] = value
    alone.write_text(json.dumps(raw))
    with pytest.raises(InputError):
        planned(alone, run="again")


@pytest.mark.parametrize("spoil", [
    lambda t: t[: len(t) // 2], lambda t: "", lambda t: "[]", lambda t: "null", lambda t: t + "}",
    lambda t: t.replace('"run_seed": 0', '"run_seed": NaN'), lambda t: t.replace('"run_seed": 0', f'"run_seed": {10**60}'),
    lambda t: t.replace('"prior_sd": "auto"', '"prior_sd": Infinity'), lambda t: t.replace("Déjà", "\\ud800"),
    lambda t: t.replace('"extra_rounds": 1', '"extra_rounds": 1, "more": 2'), lambda t: "\x00" * 64,
])
def test_a_torn_or_senseless_one_is_an_error_of_the_input(alone, spoil):
    text = alone.read_text(encoding="utf-8")
    assert spoil(text) != text
    alone.write_text(spoil(text), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^({re.escape(str(alone))}|config|run.json)\b"):
        planned(alone, run="again")


def test_no_secret_of_the_environment_reaches_a_runs_folder(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    ctx = opened(make_config(tmp_path, tiny_model, [NOWHERE]))
    for path in Path(ctx.url).rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


# --- what `winnow config` says is what is sent ---

def test_what_config_prints_is_what_a_server_is_sent(finished, alone, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "out", terminal.Console(highlight=False, width=400))
    with pytest.raises(SystemExit):
        cli.main(["config", str(alone)])
    shown = capsys.readouterr().out.partition("sent with every request")[2]
    rows = [re.match(r"(generator|judge)\s+(\w+)\s+(.*?)\s{2,}(.+)$", line.strip()) for line in shown.splitlines()]
    said = {(m[1], m[2]): m[3] for m in rows if m}
    assert len(said) == 26
    for role, sent in (("generator", [r for r in finished[1] if "token_ids_logprob" not in r]),
                       ("judge", [r for r in finished[1] if "token_ids_logprob" in r])):
        assert sent
        for name in {n for r, n in said if r == role} - {"seed"}:
            if role == "judge" or name not in ("temperature", "top_k", "top_p", "min_p"):
                assert {str(r["sampling_params"][name]) for r in sent} == {said[role, name]}, (role, name)
    seeds = [r["sampling_params"]["sampling_seed"] for r in finished[1] if "token_ids_logprob" in r]
    assert {str(s) for s in seeds} == {said["judge", "seed"]}


# --- the judge reads the first place ---

def test_a_verdict_is_that_of_the_first_place_however_much_the_judge_may_write():
    judge = Judge.__new__(Judge)
    judge._verdicts = (65, 66)
    places = [[[-0.1, 65, None], [-3.0, 66, None]], [[-9.0, 65, None], [-0.01, 66, None]]]
    first = judge.read({"output_token_ids_logprobs": places}).value
    assert first is not None and first > 0.9
    places.pop(0)
    then = judge.read({"output_token_ids_logprobs": places}).value
    assert then is not None and then < 0.1
    places.clear()
    assert "no_verdict" in (judge.read({"output_token_ids_logprobs": places}).reason or "")


# --- chat templates of all sorts, each role its own ---

TOOLS = ("{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% if documents is defined and documents %}docs{% endif %}"
         "{% if builtin_tools is defined %}builtin{% endif %}" + PLAIN)
NO_TOOL_TURN = ("{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
                "{{ m['content'] }}\n{% endfor %}")


def chats(folder: Path, model: Path, template: str) -> dict[str, Any]:
    raw = make_config(folder, model, [NOWHERE], seeds=[0])
    turns = [{"role": r, "content": c} for r, c in (("system", "Sé breve."), ("user", "Look it up."), ("assistant", "…"),
                                                    ("tool", "42"), ("user", "So?"))]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"m": m}) + "\n" for m in (turns, turns[1:2], turns[:4])))
    raw["sources"] = [{"name": "chats", "path": str(folder / "chats.jsonl"), "messages_key": "m"}]
    return changed(raw, generation__generator__chat_template=template, generation__generator__system_prompt="Be kind.",
                   generation__judge__chat_template=STAMPED)


def test_each_role_has_its_own_template_and_chats_of_many_roles_are_rendered_whole(tmp_path, tiny_model):
    ctx = opened(chats(tmp_path, tiny_model, TOOLS))
    texts = [ctx.tokenizer.decode(p["prompt_ids"]) for p in ctx.store.read("prompts.parquet").to_pylist()]
    assert texts == ["<system>Sé breve.\n<user>Look it up.\n<assistant>…\n<tool>42\n<user>So?\n",
                     "<system>Be kind.\n<user>Look it up.\n",
                     "<system>Sé breve.\n<user>Look it up.\n<assistant>…\n<tool>42\n"]
    roles = {role: ctx.chat_template(role) for role in ("generator", "judge")}
    assert [(roles[r].source, roles[r].stamps_date) for r in roles] == [(TOOLS, False), (STAMPED, True)]
    assert isinstance(roles["judge"], ChatTemplate) and str(roles["judge"].date) == "2024-07-26"


@pytest.mark.parametrize(("template", "said"), [
    (NO_TOOL_TURN, "no tools here.*turns: system, user, assistant, tool"),
    ("{{ now().year }}" + PLAIN, "generation.generator.chat_template, line 1: it fails: 'now' is undefined"),
])
def test_a_template_that_cannot_take_a_chat_is_an_error_before_the_run_is_there(tmp_path, tiny_model, template, said):
    with pytest.raises(InputError, match=said):
        opened(chats(tmp_path, tiny_model, template))
    assert not (tmp_path / "runs/test/run.json").exists()
