"""The whole flow under Prefect, from the command line, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tasks.context import Context
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

ROOT = Path(__file__).parents[2]


def start(config: Path, home: Path, *more: str, api: str | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"PREFECT_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"}
    environment.pop("PREFECT_API_URL", None)
    if api:
        environment["PREFECT_API_URL"] = api
    return subprocess.Popen([sys.executable, "-m", "flows.cli", "run", str(config), *more], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=100)
    return process.returncode, said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One Prefect database for the module: making it takes seconds."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def api(home):
    """A standing Prefect server."""
    from flows.prefect_server import prefect_api

    before = {k: os.environ.get(k) for k in ("PREFECT_HOME", "PREFECT_API_URL")}
    os.environ["PREFECT_HOME"] = str(home)
    os.environ.pop("PREFECT_API_URL", None)
    try:
        with prefect_api(home / "server.log", print) as url:
            yield url
    finally:
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


def dataset(folder: Path) -> list[dict]:
    ctx = Context(str(folder / "runs/test"))
    parts = [ctx.store.read(path).to_pylist() for path in ctx.store.glob("dataset/*.parquet")]
    return [row for part in parts for row in part]


def ask(api: str, path: str) -> list[dict]:
    """Everything of a kind that the Prefect server knows."""
    request = urllib.request.Request(f"{api}/{path}/filter", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.mark.timeout(180)
def test_a_run_from_start_to_dataset_interrupted_and_resumed(tmp_path, tiny_model, home, api, winnow):
    with FakeSGLang(delay_s=0.05) as server:
        raw = make_config(tmp_path, tiny_model, [server.url])
        raw["servers"]["generator"][0]["max_in_flight"] = 2
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(raw))

        process = start(config, home)
        while len(server.requests) < 12 and process.poll() is None:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        code, said = finish(process)
        assert code == 130, said
        assert "run the same command again" in said
        assert "Traceback" not in said
        _, alive = psutil.wait_procs(children, timeout=15)
        assert alive == []

        raw["servers"]["generator"][0]["max_in_flight"] = 8
        config.write_text(yaml.safe_dump(raw))
        code, said = finish(start(config, home, api=api))
        assert code == 0, said
        assert api.removesuffix("/api") in said
        assert "Traceback" not in said
        assert len(server.generations) <= 40 + 2
        rows = dataset(tmp_path)
        assert len({(r["prompt_id"], r["seed"]) for r in rows}) == len(rows) > 0
        lines = [log["message"] for log in ask(api, "logs") if log["name"] == "winnow.stages"]
        assert sum("generate shard" in line for line in lines) >= 3
        assert "generate shard" in said
        assert {("test-generate-verify", "progress"), ("test-servers", "table")} <= {
            (a["key"], a["type"]) for a in ask(api, "artifacts")}

        sent = len(server.requests)
        code, said = winnow("run", str(config))
        assert code == 0
        assert "is finished already" in said
        assert str(tmp_path / "runs/test/dataset") in said.replace(" ", "")
        assert len(server.requests) == sent

        code, said = winnow("run", str(config), "--set", "seeds=[0, 2]")
        assert code == 2
        assert "seeds: was [0, 1], now [0, 2]" in said
    card = (tmp_path / "runs/test/dataset/README.md").read_text()
    assert card.startswith("---\n")
    assert json.loads((tmp_path / "runs/test/report.json").read_text())
    assert "<html" in (tmp_path / "runs/test/report.html").read_text()


@pytest.mark.timeout(120)
def test_too_many_failures_end_with_exit_code_3(tmp_path, tiny_model, home, api, winnow):
    with FakeSGLang(fault=lambda n, p: "400" if "rid" in p and int(p["rid"][:2], 16) < 90 else None) as server:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(make_config(tmp_path, tiny_model, [server.url], labels=["verifiers"])))
        code, said = finish(start(config, home, api=api))
        assert code == 3, said
        assert "limits.max_failed" in said
        assert "rejected" in said
        code, said = winnow("run", str(config))  # finished, and it says again how
        assert code == 3
        assert "is finished already" in said


@pytest.mark.timeout(60)
def test_a_prefect_server_that_does_not_answer_is_exit_code_4(tmp_path, tiny_model, home):
    with FakeSGLang() as server:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(make_config(tmp_path, tiny_model, [server.url])))
        environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
        done = subprocess.run([sys.executable, "-m", "flows.cli", "run", str(config)], cwd=ROOT, text=True,
                              capture_output=True, env=environment)
        assert done.returncode == 4
        assert "PREFECT_API_URL" in done.stderr
        assert server.requests == []


def rows_of(raw: dict[str, Any]) -> list[list[dict]]:
    store = Context(f"{raw['runs_dir']}/test").store
    return [store.read(path).drop_columns(["latency_s", "attempts", "server"]).to_pylist()
            for path in store.glob("candidates/*/*.parquet") + store.glob("verified/*.parquet")]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="sets another process's limits, which only Linux can")
@pytest.mark.timeout(120)
def test_a_full_disk_ends_a_run_with_a_message_and_130_and_room_lets_it_go_on(tmp_path, tiny_model, home, api):
    in_flight = 2
    with FakeSGLang(delay_s=0.1) as server:
        calm = make_config(tmp_path / "calm", tiny_model, [server.url], labels=[])
        build(calm, ["generate", "verify"])
        server.requests.clear()
        server.answered.clear()
        raw = make_config(tmp_path, tiny_model, [server.url], labels=[])
        raw["servers"]["generator"][0]["max_in_flight"] = in_flight
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(raw))

        process = start(config, home, api=api)
        while len(server.requests) < 9 and process.poll() is None:
            time.sleep(0.01)
        # no file of the process may grow beyond this: to a writer as a disk that is full
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        code, said = finish(process)
        assert code == 130, said
        assert str(tmp_path / "runs/test/") in said
        assert "make room and run the same command again to go on" in said
        assert "Traceback" not in said
        assert len(server.requests) < 20  # nobody tried it again and again
        folder = tmp_path / "runs/test"
        assert not list(folder.rglob("*.winnow-tmp"))

        build(raw, ["generate", "verify"])
        # each of three shards finds out for itself
        assert sum(n - 1 for n in server.answered.values()) <= in_flight + 3
    assert rows_of(raw) == rows_of(calm)
    assert not list(folder.rglob("*.jsonl"))
