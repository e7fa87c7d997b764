"""Servers of ours, as processes: reused where they are what is asked for, started anew where they are not, never taken
from somebody who uses them. A stand-in is started with the very flags that SGLang would get, and says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli, seats
from flows.prepare import check, open_run
from flows.servers import down, running, up
from tasks.context import Context
from tasks.core.config import RunConfig
from tasks.core.errors import InputError, UnreachableError
from tasks.core.heuristics import Heuristic, Processor
from tasks.serving.launch import launcher
from tasks.serving.launch.flags import Capabilities
from tasks.serving.launch.launch_spec import LaunchSpec, command_line
from tests.fake_answers import SERVER_INFO
from tests.runs import make_config
from tests.serving.launch.sglang_flags import HELP
from tests.serving.launch.stand_in import alive

KNOWN = Capabilities.parse(HELP + "\n  --quantization QUANTIZATION\n  --page-size PAGE_SIZE\n")
WARM = [Heuristic("warm", (Processor("temperature", 0.7),))]
STAND_IN = '''
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
words = sys.argv[2:]
info = json.loads(sys.argv[1]) | {"launch_command": " ".join(words)}
for word in words:
    name, equals, value = word[2:].partition("=")
    info[name.replace("-", "_")] = (int(value) if value.isdigit() else value) if equals else True
if "quantization" in info and info["quantization"] == "fp8":
    info["dtype"] = "bfloat16"  # what it makes of it

class Handler(BaseHTTPRequestHandler):
    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        at_work = int(os.path.exists("at-work")) * 3
        self.answer({"/model_info": {"model_path": info["model_path"], "is_generation": True}, "/server_info": info,
                     "/v1/loads": {"loads": [{"num_running_reqs": at_work, "num_waiting_reqs": 0}]}}.get(self.path, {}))
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"])); self.answer({})
    def log_message(self, *a): pass
ThreadingHTTPServer(("127.0.0.1", info["port"]), Handler).serve_forever()
'''


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder where the stand-in is what gets started; what runs in it at the end is stopped."""
    folder, script = tmp_path / "state", tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def build(spec: LaunchSpec, port: int, cache_dir: Path) -> list[str]:
        argv = command_line(spec, port, KNOWN).argv
        return [sys.executable, "-S", "-E", str(script), json.dumps(SERVER_INFO), *(w for w in argv if w[:2] == "--")]

    monkeypatch.setenv("WINNOW_STATE_DIR", str(folder))
    monkeypatch.setattr(seats, "command", build)
    yield folder
    launcher.stop_all(launcher.running(folder), 0)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Callable[..., RunConfig]:
    def make(**launch: Any) -> RunConfig:
        raw = make_config(tmp_path, tiny_model, [], labels=[])
        launch = {"device": "cpu", "python": sys.executable, "ready_timeout_s": 20} | launch
        raw["servers"] = {"generator": [{"launch": launch}]}
        return RunConfig.model_validate(raw)

    return make


class Said(list[str]):
    """What is told to whoever watches, as one text without line breaks."""

    def __contains__(self, words: object) -> bool:
        return str(words) in " ".join(" ".join(self).split())


def test_a_server_that_is_what_is_asked_for_is_reused_and_one_that_is_not_is_started_anew(state, config):
    said = Said()
    (first,) = up(config(dtype="half"), WARM, said.append)
    assert "starting SGLang" in said
    said.clear()
    (again,) = up(config(dtype="float16"), WARM, said.append)
    assert again.id == first.id
    assert f"using the generator server that runs at {first.url}" in said and "starting" not in said
    (other,) = up(config(dtype="bfloat16"), WARM, said.append)
    assert other.id != first.id and not alive(first.pid or 0)
    assert "setting asked for it is dtype bfloat16 float16" in said and "it is stopped" in said
    assert [r.id for r in launcher.running(state)] == [other.id]
    assert len(down(config())) == 1


@pytest.mark.parametrize(("before", "now", "differs"), [
    ({"context_length": 512}, {}, "context_length not set 512"),
    ({}, {"context_length": 512}, "context_length 512 not set"),
    ({"max_total_tokens": 512}, {}, "max_total_tokens not set 512"),
    ({"flags": {"page-size": 16}}, {}, "flags.page-size not set 16"),
    ({"custom_processors": False}, {}, None),  # no heuristic needs them
    *[(guessing, guessing, None) for guessing in (
        {"device": "cuda", "speculation": {"algorithm": "ngram", "max_breadth": 4}},)],  # the launcher adds its min
    ({"device": "cuda", "mem_fraction": 0.5}, {"device": "cuda"}, "mem_fraction not set 0.5"),
])
def test_what_a_server_of_ours_was_started_with_decides(state, config, before, now, differs):
    said = Said()
    (first,) = up(config(**before), WARM, said.append)
    (then,) = up(config(**now), WARM, said.append)
    assert (then.id != first.id) is bool(differs)
    assert differs is None or differs in said


def test_a_server_that_works_for_someone_else_is_not_stopped(state, config):
    (first,) = up(config(), WARM, Said().append)
    (state / "at-work").touch()
    with pytest.raises(UnreachableError, match=r"works on 3 requests for someone else:(.|\n)*dtype") as refused:
        up(config(dtype="half"), WARM, Said().append)
    assert refused.value.exit_code == 4 and alive(first.pid or 0)
    assert [r.id for r in up(config(), WARM, Said().append)] == [first.id]  # what is asked for may be used by two


def test_what_sglang_makes_of_a_setting_is_seen_after_the_start(state, config):
    asked = config(dtype="float16", flags={"quantization": "fp8"})
    with pytest.raises(InputError, match=r"SGLang made something else of it") as refused:
        up(asked, WARM, Said().append)
    assert "dtype" in str(refused.value) and "bfloat16" in str(refused.value)
    assert launcher.running(state) == []
    up(asked.model_copy(update={"allow_mismatch": True}), WARM, Said().append)
    assert len(launcher.running(state)) == 1


def test_a_flag_that_its_sglang_lacks_is_recorded_and_no_reason_to_start_it_anew(state, config):
    asked = config(flags={"of-another-version": 3})
    (first,) = up(asked, WARM, Said().append)
    assert "--of-another-version=3" not in first.command
    assert [r.id for r in up(asked, WARM, Said().append)] == [first.id]
    ctx = open_run(check(asked, {}))
    with running(ctx, Said().append):
        (found,) = Context(ctx.url).raw["servers"]["generator"]
    assert found["mismatch"] == [{"field": "flags.of-another-version", "asked": 3, "found": None}]
    assert [r.id for r in up(config(), WARM, Said().append)] == [first.id]  # without it, it is the same server


def test_a_run_uses_ours_leaves_them_and_records_what_they_are(state, config):
    asked = config(dtype="half")
    (first,) = up(asked, WARM, Said().append)
    ctx = open_run(check(asked, {}))
    with running(ctx, Said().append):
        (found,) = Context(ctx.url).raw["servers"]["generator"]
    assert (found["url"], found["how"], found["mismatch"]) == (first.url, "reused", [])
    assert found["asked"]["dtype"] == "float16" and found["info"]["dtype"] == "float16"
    assert alive(first.pid or 0)  # it was there before
    down(asked)
    with running(ctx, (said := Said()).append):
        (found,) = Context(ctx.url).raw["servers"]["generator"]
        assert found["how"] == "launched"
    assert f"stopping {found['url']}" in said and launcher.running(state) == []


def test_one_that_was_left_over_is_ended_and_said(state, config, monkeypatch):
    (first,) = up(config(), WARM, Said().append)
    monkeypatch.setattr(seats.launcher, "reap", lambda folder: [first])
    up(config(), WARM, (said := Said()).append)
    assert f"ended the generator server at {first.url}" in said


def test_check_says_what_a_run_would_do(state, config, tmp_path, capsys):
    path = tmp_path / "config.yaml"

    def checked(**launch: Any) -> tuple[int, str]:
        path.write_text(yaml.safe_dump(config(**launch).model_dump(mode="json", exclude_unset=True)))
        with pytest.raises(SystemExit) as ended:
            cli.main(["servers", "check", str(path)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((said.out + said.err).split())

    code, said = checked()
    assert code == 4 and "not running: would be launched" in said
    (first,) = up(config(), WARM, Said().append)
    code, said = checked()
    assert code == 0 and "would be reused" in said and first.url in said
    code, said = checked(dtype="half")
    assert code == 0 and "would be restarted" in said and "dtype float16 not set" in said
    assert alive(first.pid or 0)
    (state / "at-work").touch()
    assert "differs, at work (3): would stay" in checked(dtype="half")[1]
