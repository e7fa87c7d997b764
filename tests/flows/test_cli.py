from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from flows import cli
from tests.fake_sglang import FakeSGLang
from tests.runs import make_config


@pytest.fixture
def winnow(capsys):
    """Run a command here; (exit code, stdout, stderr)."""
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def write(folder: Path, raw: dict) -> str:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def planted(raw: dict, mistake: str, folder: Path) -> dict:
    """The config with one mistake in it."""
    if mistake == "unknown key":
        raw["sceds"] = [0]
    elif mistake == "missing source":
        raw["sources"][0]["path"] = str(folder / "nowhere.jsonl")
    elif mistake == "malformed row":
        with open(raw["sources"][0]["path"], "a") as file:
            file.write('{"question": 3}\n')
    elif mistake == "wrong column":
        raw["sources"][0]["prompt_key"] = "qestion"
    elif mistake == "heuristic out of range":
        path = Path(raw["heuristics"]["files"][0])
        path.write_text(path.read_text().replace('"top_p": 0.9', '"top_p": 1.9', 1))
    elif mistake == "missing heuristics file":
        raw["heuristics"] = {"files": ["nowhere.yaml"]}
    elif mistake == "no model folder":
        raw["model"] = {"path": str(folder / "nomodel")}
    elif mistake == "no tokenizer":
        (folder / "bare").mkdir()
        raw["model"] = {"path": str(folder / "bare")}
    elif mistake == "bad range":
        raw["limits"] = {"max_failed": 2}
    elif mistake == "bad type":
        raw["seeds"] = "three"
    elif mistake == "no judge template":
        raw["quality"] = {"template": "gramm"}
    elif mistake == "verdict is not one token":
        path = folder / "judge.yaml"
        path.write_text(yaml.safe_dump({"user": "{prompt} {a} {b}", "verdicts": ["first", "second"]}))
        raw["quality"] = {"template": str(path)}
    elif mistake == "template leaves no room":
        raw["quality"] = {"template": "gram", "max_prompt_tokens": 900}
    elif mistake == "fewer told apart than kept":
        raw |= {"quality": {"top": 2}, "scoring": {"top_k": 3}}
    elif mistake == "answer without number":
        raw["sources"][0]["answer_key"] = "question"
        Path(raw["sources"][0]["path"]).write_text('{"question": "none"}\n')
    return raw


@pytest.mark.parametrize(("mistake", "said"), [
    ("unknown key", "did you mean 'seeds'?"), ("missing source", "nowhere.jsonl"), ("malformed row", "sums.jsonl:4"),
    ("wrong column", "did you mean 'question'?"), ("heuristic out of range", "sampling_pipelines.1.processors.1.params"),
    ("missing heuristics file", "nowhere.yaml"), ("no model folder", "nomodel"), ("no tokenizer", "tokenizer.json"),
    ("bad range", "limits.max_failed"), ("bad type", "seeds"), ("no judge template", "did you mean 'gram'?"),
    ("verdict is not one token", "first"), ("template leaves no room", "quality.max_prompt_tokens: 900 leave"),
    ("fewer told apart than kept", "quality.top: the best 2 are told from the rest"), ("answer without number", "sums.jsonl:1"),
])
def test_wrong_input_is_one_message_exit_code_2_and_no_request(winnow, tmp_path, tiny_model, mistake, said):
    with FakeSGLang() as server:
        path = write(tmp_path, planted(make_config(tmp_path, tiny_model, [server.url]), mistake, tmp_path))
        code, out, err = winnow("run", path)
        assert code == 2
        assert said in err
        assert "Traceback" not in err + out
        assert server.requests == []


def test_no_server_answers_is_exit_code_4(winnow, tmp_path, tiny_model):
    path = write(tmp_path, make_config(tmp_path, tiny_model, ["http://127.0.0.1:9"]))
    code, _, err = winnow("servers", "check", path)
    assert code == 4
    assert "no server of this config answers" in err
    code, _, err = winnow("run", path)
    assert code == 4
    assert "no server answers" in err
    assert "http://127.0.0.1:9" in err


def test_plan_counts_and_sends_nothing(winnow, tmp_path, tiny_model):
    with FakeSGLang() as server:
        code, out, _ = winnow("plan", write(tmp_path, make_config(tmp_path, tiny_model, [server.url])))
        assert server.requests == []
    assert code == 0
    numbers = {name: int(n.replace(",", "")) for name, n in re.findall(r"^ *([a-z ,]+?) +([\d,]+) *$", out, re.M)}
    assert numbers == {"prompts": 5, "heuristics": 4, "seeds": 2, "requests": 40, "shards": 3,
                       "judge calls, at most": 120, "new tokens, at most": 40 * 48}
    assert not (tmp_path / "runs").exists()


def test_config_shows_each_value_with_its_origin(winnow, tmp_path, tiny_model):
    path = write(tmp_path, make_config(tmp_path, tiny_model, ["http://127.0.0.1:9"]))
    code, out, _ = winnow("config", path, "--set", "scoring.top_k=7")
    assert code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert lines["scoring.top_k"] == ["scoring.top_k", "7", "--set"]
    assert lines["engine.max_workers"] == ["engine.max_workers", "4", "default"]
    assert lines["engine.shard_prompts"][1] == "2"


@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_heuristics_lists_a_grid(winnow, family):
    code, out, _ = winnow("heuristics", family)
    assert code == 0
    assert f"{396 if family == 'qwen' else 384} heuristics" in out


def test_heuristics_of_an_unknown_family_suggests_one(winnow):
    code, _, err = winnow("heuristics", "quen")
    assert code == 2
    assert "did you mean 'qwen'?" in err


def test_status_of_no_run_is_the_users_mistake(winnow, tmp_path):
    code, _, err = winnow("status", "nothing", "--runs-dir", str(tmp_path))
    assert code == 2
    assert "no such run" in err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["servers", "--help"]])
def test_help_is_there(winnow, arguments):
    code, out, _ = winnow(*arguments)
    assert code == 0
    assert "Usage" in out


def test_an_unknown_command_is_exit_code_2(winnow):
    code, _, err = winnow("rn", "x.yaml")
    assert code == 2
    assert "No such command" in err


def test_run_json_has_no_secret_of_the_server(tmp_path, tiny_model):
    from tests.runs import build

    with FakeSGLang() as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), ["generate"])
    raw = Path(ctx.store.path("run.json")).read_text()
    assert "a secret" not in raw
    facts = json.loads(raw)["servers"]["generator"][0]
    assert facts["honours_seeds"] is True
    assert facts["info"]["version"] == "fake"


def test_rates_count_the_time_in_which_shards_were_worked_on():
    from flows.status import covered

    assert covered([]) == 0
    assert covered([(0, 2), (1, 4), (1, 2), (10, 11)]) == 5


def test_status_shows_stages_rows_and_rates(winnow, tmp_path, tiny_model):
    from tests.runs import build

    with FakeSGLang(fault=lambda n, p: "400" if n == 0 else None) as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), ["generate", "verify"])
    code, out, _ = winnow("status", ctx.url)
    assert code == 0
    assert re.search(r"generate +3/3 +40 +[\d.]+$", out, re.M)
    assert re.search(r"quality +0/3 +0 +-$", out, re.M)
    assert "39 ok" in out
    assert "1 rejected" in out
    assert "defects: 1 rejected" in out
