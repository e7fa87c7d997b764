"""The launcher against a stand-in server: a small HTTP server in a process of its own, started as SGLang is."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.serving import launcher
from tasks.serving.launcher import LaunchFailed, LaunchSpec, ServerRecord

ROOT = Path(launcher.__file__).resolve().parents[2]
FAKE = '''
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
options = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[1:])
mode, port = options["model-path"].rpartition("/")[2], int(options["port"])
print("server_args=" + "x" * 1000, flush=True)
if mode == "oom":
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", flush=True); sys.exit(1)
if mode == "clash" and not os.path.exists("clashed"):
    open("clashed", "w").close()
    print("[Errno 98] error while attempting to bind: address already in use", flush=True); sys.exit(1)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a worker, as SGLang has
began = time.monotonic()

class Handler(BaseHTTPRequestHandler):
    def answer(self, code, body=b"{}"):
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        loading = mode == "never" or time.monotonic() - began < 0.5
        self.answer(503 if loading else 200)
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        print("asked", asked.decode(), flush=True)
        self.answer(200)
    def log_message(self, *a): pass
print("loading weights", flush=True)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder; what runs in it at the end is stopped."""
    folder = tmp_path / "state"
    folder.mkdir()
    yield folder
    for record in launcher.running(folder):
        launcher.stop(record, 1)


@pytest.fixture
def build(tmp_path: Path) -> launcher.Command:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def command(spec: LaunchSpec, port: int) -> list[str]:
        return [sys.executable, str(script), f"--model-path={spec.model}", f"--port={port}"]

    return command


def spec(mode: str = "good", **changes: object) -> LaunchSpec:
    return dataclasses.replace(LaunchSpec(model=mode, device="cpu", ready_timeout_s=20), **changes)  # type: ignore


def tree(record: ServerRecord) -> list[int]:
    root = psutil.Process(record.pid)
    return [p.pid for p in [root, *root.children(recursive=True)]]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    return condition()


# --- what is asked for, as a command line ---


def flags(argv: list[str]) -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            assert name not in out, f"{name} twice"
            out[name] = value if equals else None
    return out


def test_a_gpu_server_gets_its_flags() -> None:
    asked = LaunchSpec(model="org/name", gpu=3, dtype="bfloat16", revision="abc", context_length=4096,
                       mem_fraction=0.8, python="/py", flags={"tp_size": 2, "skip-server-warmup": True, "x": False})
    argv = launcher.command(asked, 30001)
    assert argv[:4] == ["/py", "-P", "-m", "sglang.launch_server"]
    assert flags(argv) == {
        "--model-path": "org/name", "--revision": "abc", "--host": "127.0.0.1", "--port": "30001",
        "--device": "cuda", "--base-gpu-id": "3", "--dtype": "bfloat16", "--context-length": "4096",
        "--mem-fraction-static": "0.8", "--sampling-backend": "pytorch", "--enable-deterministic-inference": None,
        "--enable-custom-logit-processor": None, "--enable-metrics": None, "--tp-size": "2",
        "--skip-server-warmup": None}


def test_a_cpu_server_gets_what_a_cpu_needs(tmp_path: Path) -> None:
    asked = LaunchSpec(model=str(tmp_path), device="cpu", threads=2, python="/py")
    argv = launcher.command(asked, 1)
    assert argv[1].endswith("sglang_cpu/launch.py")
    got = flags(argv)
    assert got["--attention-backend"] == "torch_native" and got["--model-path"] == str(tmp_path)
    environment = launcher.environment(asked)
    assert environment["OMP_NUM_THREADS"] == "2" and environment["KMP_BLOCKTIME"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in launcher.environment(dataclasses.replace(asked, model="org/name"))


@given(st.dictionaries(st.sampled_from(["dtype", "mem-fraction-static", "mem_fraction_static", "sampling_backend",
                                        "attention-backend", "tp-size", "enable_metrics"]),
                       st.one_of(st.booleans(), st.integers(0, 9), st.sampled_from(["a", "-1"]))),
       st.sampled_from(["cpu", "cuda"]), st.booleans(), st.none() | st.floats(0.1, 0.9))
def test_no_flag_stands_twice_and_the_users_wins(extra: dict[str, bool | int | str], device: str, seeds: bool,
                                                 fraction: float | None) -> None:
    asked = LaunchSpec(model="org/name", device=device, deterministic=seeds, mem_fraction=fraction,  # type: ignore
                       python="/py", flags=extra)
    got = flags(launcher.command(asked, 1))
    for name, value in {n.replace("_", "-"): v for n, v in extra.items()}.items():
        assert (got.get(f"--{name}", "off") == ("off" if value is False else None if value is True else str(value)))


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::", "some.name"])
def test_custom_processors_on_a_public_address_need_a_yes(host: str) -> None:
    asked = LaunchSpec(model="org/name", host=host, python="/py")
    with pytest.raises(LaunchFailed, match="allow_public"):
        launcher.command(asked, 1)
    assert flags(launcher.command(dataclasses.replace(asked, allow_public=True), 1))["--host"] == host
    launcher.command(dataclasses.replace(asked, custom_processors=False), 1)


@pytest.mark.parametrize("name", ["host", "--host", "hos", "port", "model", "model_path",
                                  "enable_custom_logit_processor", "enable-custom"])
def test_flags_cannot_go_around_a_key_of_the_config(name: str) -> None:
    with pytest.raises(LaunchFailed, match="key of its own"):
        launcher.command(LaunchSpec(model="org/name", python="/py", flags={name: "0.0.0.0"}), 1)


def test_a_model_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchFailed, match=r"no folder .*nowhere"):
        launcher.command(LaunchSpec(model="./nowhere", python="/py"), 1)


def test_without_sglang_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tasks.serving.launch_spec.ROOT", tmp_path)
    with pytest.raises(LaunchFailed, match="make install-sglang"):
        launcher.interpreter(LaunchSpec(model="org/name"))


def test_the_digest_tells_settings_apart_and_not_ports() -> None:
    base = LaunchSpec(model="org/name")
    assert dataclasses.replace(base, port=5, ready_timeout_s=1).digest == base.digest
    others = [dataclasses.replace(base, **{k: v}) for k, v in
              {"model": "b", "dtype": "float32", "gpu": 1, "role": "judge", "flags": {"x": 1}}.items()]
    assert len({base.digest, *(o.digest for o in others)}) == 6


# --- life and death ---


def test_a_server_is_started_awaited_recorded_and_stopped(state: Path, build: launcher.Command) -> None:
    seen: list[str] = []
    record = launcher.start(spec(), state, leashed=True, on_wait=lambda s, line: seen.append(line), build=build)
    assert "loading weights" in seen
    assert launcher.running(state) == [record]
    assert record.spec["model"] == "good" and record.spec_digest == spec().digest
    assert "sampling_seed" in Path(record.log).read_text()  # the warm-up went through the sampler
    pids = tree(record)
    assert len(pids) == 3  # leash, server, worker
    assert launcher.stop(record, 2) is True
    assert not any(alive(pid) for pid in pids)
    assert launcher.running(state) == [] and not list(state.glob("*.json"))
    assert Path(record.log).exists()
    assert launcher.stop(record) is False


def test_servers_start_together_on_ports_of_their_own(state: Path, build: launcher.Command) -> None:
    began = time.monotonic()
    records = launcher.start_all([spec(), spec(role="judge"), spec("other")], state, leashed=True, build=build)
    assert len({r.url for r in records}) == 3
    assert [(r.role, r.spec["model"]) for r in records] == [("generator", "good"), ("judge", "good"),
                                                            ("generator", "other")]
    assert time.monotonic() - began < 10


def test_one_that_fails_takes_the_others_down(state: Path, build: launcher.Command) -> None:
    with pytest.raises(LaunchFailed) as failed:
        launcher.start_all([spec(), spec("oom")], state, leashed=True, build=build)
    message = str(failed.value)
    assert "out of memory: lower launch.mem_fraction" in message
    assert "Tried to allocate 2 GiB" in message and "xxxxx" not in message
    assert str(state) in message.rsplit("log: ")[1]
    assert launcher.running(state) == []


def test_a_server_that_never_answers_fails_at_its_deadline(state: Path, build: launcher.Command) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchFailed, match="not ready after 1 s"):
        launcher.start(spec("never", ready_timeout_s=1), state, leashed=True, build=build)
    assert time.monotonic() - began < 6
    assert launcher.running(state) == []


def test_a_port_taken_meanwhile_is_exchanged_for_another(state: Path, build: launcher.Command) -> None:
    record = launcher.start(spec("clash"), state, leashed=True, build=build)
    assert launcher.running(state) == [record]
    assert len(list(state.glob("*.log"))) == 2


def test_a_port_that_is_taken_is_said_before_anything_starts(state: Path, build: launcher.Command) -> None:
    record = launcher.start(spec(), state, leashed=True, build=build)
    port = int(record.url.rpartition(":")[2])
    with pytest.raises(LaunchFailed, match=f"launch.port: cannot listen on 127.0.0.1:{port}"):
        launcher.start(spec("other", port=port), state, leashed=True, build=build)
    assert launcher.running(state) == [record]


def test_an_unleashed_server_outlives_its_starter_and_is_found_again(state: Path, build: launcher.Command,
                                                                     tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tasks.serving import launcher
def build(spec, port): return [sys.executable, {str(tmp_path / 'fake.py')!r}, "--model-path=good", f"--port={{port}}"]
spec = launcher.LaunchSpec(model="good", device="cpu", ready_timeout_s=20)
launcher.start(spec, Path({str(state)!r}), leashed=False, build=build)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    found = launcher.find_reusable(spec(), state)
    assert found is not None and alive(found.pid) and not found.leashed
    assert launcher.find_reusable(spec(dtype="float32"), state) is None
    pids = tree(found)
    assert launcher.stop(found, 2) is True
    assert not any(alive(pid) for pid in pids)


def test_kill_nine_of_the_starter_ends_its_leashed_servers(state: Path, build: launcher.Command,
                                                           tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from tasks.serving import launcher
def build(spec, port): return [sys.executable, {str(tmp_path / 'fake.py')!r}, "--model-path=good", f"--port={{port}}"]
spec = launcher.LaunchSpec(model="good", device="cpu", ready_timeout_s=20)
launcher.start(spec, Path({str(state)!r}), leashed=True, build=build)
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert within(15, lambda: any("asked" in log.read_text() for log in state.glob("*.log")))
    pids = tree(launcher.running(state)[0])
    assert launcher.find_reusable(spec(), state) is None  # it may end at any moment, with its starter
    starter.kill()
    starter.wait()
    assert within(10, lambda: not any(alive(pid) for pid in pids))
    assert launcher.running(state) == []


def test_a_reused_pid_is_never_stopped(state: Path, build: launcher.Command) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        real = launcher.start(spec(), state, leashed=True, build=build)
        stale = dataclasses.replace(real, pid=stranger.pid, create_time=real.create_time - 3600)
        assert launcher.stop(stale) is False
        assert stranger.poll() is None
        assert launcher.running(state) == [real]  # nor is another server's record taken away
    finally:
        stranger.kill()
        stranger.wait()


def test_a_server_that_died_is_not_reused(state: Path, build: launcher.Command) -> None:
    record = launcher.start(spec(), state, leashed=False, build=build)
    os.kill(record.pid, signal.SIGKILL)
    assert within(5, lambda: launcher.running(state) == [])
    assert launcher.find_reusable(spec(), state) is None


def test_a_torn_or_foreign_record_is_passed_over(state: Path) -> None:
    (state / "generator-1.json").write_text('{"role": "gener')
    (state / "generator-2.json").write_text(json.dumps({"pid": 1}))
    assert launcher.running(state) == []
