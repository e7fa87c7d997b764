"""The launcher against a stand-in server: started, awaited, recorded, refused, stopped."""

from __future__ import annotations

import dataclasses
import http.server
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.serving.launch import launcher, processes
from tasks.serving.launch.launcher import LaunchFailed, LaunchSpec
from tests.serving.launch.stand_in import ROOT, alive, builder, spec, starter, tree


@pytest.fixture
def build(tmp_path: Path) -> launcher.Command:
    return builder(tmp_path)


def test_a_server_is_started_awaited_recorded_and_stopped(state: Path, build: launcher.Command) -> None:
    seen: list[str] = []
    record = launcher.start(spec(), state, leashed=True, on_wait=lambda s, line: seen.append(line), build=build)
    assert "loading weights" in seen
    assert launcher.running(state) == [record]
    assert record.ready and record.owner == processes.identify(os.getpid())
    assert launcher.spec_of(record) == spec() and record.spec_digest == spec().digest
    assert "sampling_seed" in Path(record.log).read_text()  # the warm-up went through the sampler
    pids = tree(record)
    assert len(pids) == 3  # leash, server, worker
    assert sorted(p.pid for p in record.processes) == pids and record.pid == record.processes[0].pid
    assert launcher.stop(record, 2) is True
    assert not any(alive(pid) for pid in pids)
    assert launcher.running(state) == [] and not list(state.glob("*.json"))
    assert Path(record.log).exists()
    assert launcher.stop(record) is False


def test_servers_start_together_on_ports_of_their_own(state: Path, build: launcher.Command) -> None:
    records = launcher.start_all([spec(), spec(role="judge"), spec("other")], state, leashed=True, build=build)
    assert len({r.url for r in records}) == 3
    assert [(r.role, r.spec["model"]) for r in records] == [("generator", "good"), ("judge", "good"),
                                                            ("generator", "other")]


def test_one_that_fails_takes_the_others_down(state: Path, build: launcher.Command) -> None:
    with pytest.raises(LaunchFailed) as failed:
        launcher.start_all([spec(), spec("oom")], state, leashed=True, build=build)
    message = str(failed.value)
    assert "out of memory: lower launch.mem_fraction" in message
    assert "Tried to allocate 2 GiB" in message and "xxxxx" not in message
    assert str(state) in message.rsplit("log: ")[1]
    assert launcher.running(state) == []


@pytest.mark.parametrize("leashed", [True, False])
def test_a_server_that_is_killed_while_it_starts_is_said_to_lack_memory(state: Path, build: launcher.Command,
                                                                        leashed: bool) -> None:
    with pytest.raises(LaunchFailed, match=r"ended with code (-9|137) before it was ready: it was killed.*memory"):
        launcher.start(spec("killed"), state, leashed=leashed, build=build)


def test_a_command_line_that_is_refused_stops_all_before_any_starts(state: Path, build: launcher.Command) -> None:
    def choosy(asked: LaunchSpec, port: int) -> list[str]:
        if asked.role == "judge":
            raise LaunchFailed("launch.flags: no")
        return build(asked, port)

    with pytest.raises(LaunchFailed, match=r"launch\.flags: no"):
        launcher.start_all([spec(), spec(role="judge")], state, leashed=True, build=choosy)
    assert list(state.iterdir()) == []


def test_a_server_that_never_answers_fails_at_its_deadline(state: Path, build: launcher.Command) -> None:
    began = time.monotonic()
    with pytest.raises(LaunchFailed, match="not ready after 1 s"):
        launcher.start(spec("never", ready_timeout_s=1), state, leashed=True, build=build)
    assert time.monotonic() - began < 6
    assert launcher.running(state) == []


@pytest.mark.parametrize("leashed", [True, False])
def test_an_interpreter_that_is_not_there_is_said(state: Path, leashed: bool) -> None:
    with pytest.raises(LaunchFailed, match=r"check launch\.python"):
        launcher.start(spec(), state, leashed=leashed, build=lambda spec, port: ["/no/such/python", "-c", "1"])
    assert not list(state.glob("*.json"))


def test_a_server_whose_record_cannot_be_written_is_not_left_behind(state: Path, build: launcher.Command,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    whole, written = launcher.records.write, []

    def full(record: launcher.ServerRecord) -> None:
        if record.processes:
            written.append(record)
            raise OSError(28, "No space left on device")
        whole(record)

    monkeypatch.setattr(launcher.records, "write", full)
    with pytest.raises(LaunchFailed, match="No space left on device"):
        launcher.start(spec(), state, leashed=False, build=build)
    assert not alive(written[0].processes[0].pid)
    assert not list(state.glob("*.json"))


# --- ports ---


def test_a_port_that_is_taken_is_said_before_anything_starts(state: Path, build: launcher.Command) -> None:
    record = launcher.start(spec(), state, leashed=True, build=build)
    with pytest.raises(LaunchFailed, match=rf"launch\.port: cannot listen on 127\.0\.0\.1:{record.port}"):
        launcher.start(spec("other", port=record.port), state, leashed=True, build=build)
    assert launcher.running(state) == [record]


class _Stranger(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_whoever_else_answers_on_the_port_is_not_taken_for_the_server(state: Path, build: launcher.Command,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Stranger)
    threading.Thread(target=stranger.serve_forever, args=(0.02,), daemon=True).start()
    free, given = launcher._ports, iter([stranger.server_port])
    monkeypatch.setattr(launcher, "_ports", lambda specs: [port] if (port := next(given, None)) else free(specs))

    def loading(asked: LaunchSpec, port: int) -> list[str]:  # on the stranger's port it does not get to listen
        return build(dataclasses.replace(asked, model="late") if port == stranger.server_port else asked, port)

    try:
        record = launcher.start(spec(), state, leashed=True, build=loading)
        assert record.port != stranger.server_port
        assert launcher.running(state) == [record] and len(list(state.glob("*.log"))) == 2
    finally:
        stranger.shutdown()
        stranger.server_close()


def test_two_runs_that_choose_one_port_at_once_get_two_servers(state: Path) -> None:
    port = launcher._ports([spec()])[0]
    both = [starter(state, leashed=True, port=port) for _ in range(2)]
    try:
        urls = {p.stdout.readline().strip() for p in both if p.stdout}
        assert len(urls) == 2 and f"http://127.0.0.1:{port}" in urls
        records = launcher.running(state)
        assert {r.url for r in records} == urls and len(list(state.glob("*.json"))) == 2
        assert {r.owner.pid for r in records} == {p.pid for p in both}
    finally:
        for p in both:
            p.kill()
            p.communicate()


def test_a_port_that_was_lost_costs_who_has_it_nothing(state: Path, build: launcher.Command,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)
    monkeypatch.setattr(launcher, "datetime", SimpleNamespace(now=lambda zone: now))  # both in one second
    first = launcher.start(spec(), state, leashed=False, build=build)
    free, given = launcher._ports, iter([first.port])
    monkeypatch.setattr(launcher, "_ports", lambda specs: [port] if (port := next(given, None)) else free(specs))
    second = launcher.start(spec(), state, leashed=False, build=build)
    assert {r.id: r for r in launcher.running(state)} == {first.id: first, second.id: second}
    assert "in use" not in Path(first.log).read_text()


# --- stopping what was started, and nothing else ---


def test_a_reused_pid_is_never_stopped(state: Path, build: launcher.Command) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        real = launcher.start(spec(), state, leashed=True, build=build)
        its = processes.identify(stranger.pid)
        earlier = dataclasses.replace(its, created=its.created - 0.01)
        stale = dataclasses.replace(real, id="0" * 16, processes=(earlier,), log=str(state / "stale.log"))
        assert launcher.stop(stale) is False
        assert stranger.poll() is None
        assert launcher.running(state) == [real]  # nor is another server's record taken away
        assert launcher.stop(dataclasses.replace(stale, processes=(its,)), 1) is True
        assert stranger.poll() is not None  # it was the time of its start that kept it alive
    finally:
        stranger.kill()
        stranger.wait()


def test_who_stops_a_server_from_within_its_environment_lives_on(state: Path, build: launcher.Command) -> None:
    record = launcher.start(spec(), state, leashed=False, build=build)
    code = ("import sys; from pathlib import Path; from tasks.serving.launch import launcher\n"
            "print([launcher.stop(r, 1) for r in launcher.running(Path(sys.argv[1]))])")
    done = subprocess.run([sys.executable, "-c", code, str(state)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | processes.marked(record.id))
    assert done.stdout == "[True]\n" and done.returncode == 0, done.stderr
    assert launcher.running(state) == []


def test_what_will_not_end_is_killed_after_the_grace_time(state: Path, build: launcher.Command) -> None:
    record = launcher.start(spec("stubborn"), state, leashed=False, build=build)
    pids = tree(record)
    began = time.monotonic()
    assert launcher.stop(record, 0.5) is True
    assert 0.4 < time.monotonic() - began < 5
    assert not any(alive(pid) for pid in pids)
    assert "asked to end" in Path(record.log).read_text()
