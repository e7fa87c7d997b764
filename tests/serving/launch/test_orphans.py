"""kill -9 of whoever starts a server, at every moment: what is left of it is found by its record and ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tasks.serving.launch import launcher
from tasks.serving.launch.launcher import ServerRecord
from tests.serving.launch.stand_in import alive, builder, kill, spec, starter, tree, within


def started(state: Path) -> ServerRecord:
    """The one server, once its worker runs and the record knows of it."""
    assert within(20, lambda: any(len(r.processes) >= 2 + r.leashed for r in launcher.running(state)))
    return launcher.running(state)[0]


def test_kill_nine_of_the_starter_ends_its_leashed_server(state: Path) -> None:
    run = starter(state, leashed=True)
    assert run.stdout and run.stdout.readline()
    record = launcher.running(state)[0]
    pids = tree(record)
    assert len(pids) == 3
    kill(run.pid)
    run.communicate()
    assert within(10, lambda: not any(alive(pid) for pid in pids))
    assert launcher.running(state) == []
    assert launcher.reap(state) == [] and not list(state.glob("*.json"))
    assert Path(record.log).exists()


def test_of_a_run_killed_together_with_its_leash_nothing_is_left(state: Path) -> None:
    run = starter(state, "stubborn", leashed=True)
    assert run.stdout and run.stdout.readline()
    record = launcher.running(state)[0]
    leash, *others = record.processes
    assert len(others) == 2
    kill(run.pid, leash.pid)
    run.communicate()
    assert all(alive(p.pid) for p in others)  # no leash is left to kill what ignores SIGTERM
    assert launcher.reap(state, 0.2) == [record]
    assert not any(alive(p.pid) for p in others)
    assert launcher.running(state) == [] and not list(state.glob("*.json")) and Path(record.log).exists()


def test_a_server_whose_leash_alone_was_killed_is_its_runs_to_stop(state: Path, tmp_path: Path) -> None:
    record = launcher.start(spec("stubborn"), state, leashed=True, build=builder(tmp_path))
    leash, *others = record.processes
    kill(leash.pid)
    assert launcher.reap(state, 0.2) == []  # its owner, this process, lives
    assert all(alive(p.pid) for p in others) and launcher.running(state) == [record]
    assert launcher.stop(record, 0.2) is True
    assert not any(alive(p.pid) for p in others)


def test_a_server_that_was_never_ready_is_ended_once_its_starter_is_gone(state: Path) -> None:
    up = starter(state, "never", leashed=False)
    record = started(state)
    pids = tree(record)
    assert not record.ready and len(pids) == 2
    assert launcher.reap(state, 1) == [] and all(alive(pid) for pid in pids)  # somebody waits for it
    kill(up.pid)
    up.communicate()
    assert launcher.in_place_of(spec(), state) == []
    assert launcher.reap(state, 1) == [record]
    assert not any(alive(pid) for pid in pids) and not list(state.glob("*.json"))


def test_a_server_that_no_record_names_yet_is_found_by_its_mark(state: Path) -> None:
    up = starter(state, "good", leashed=False, killed="after the start")
    assert up.wait() == -signal.SIGKILL
    up.communicate()
    assert within(5, lambda: launcher.running(state))
    record = launcher.running(state)[0]
    assert record.processes == () and record.pid is None and not record.ready
    pids = tree(record)
    assert pids
    assert launcher.reap(state, 1) == [record]
    assert not any(alive(pid) for pid in pids) and not list(state.glob("*.json"))


def test_a_record_without_a_server_is_forgotten_when_none_can_come(state: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    up = starter(state, leashed=True, killed="before the start")
    assert up.wait() == -signal.SIGKILL
    up.communicate()
    monkeypatch.setattr(launcher, "_SETTLED_S", 60)
    assert launcher.reap(state) == [] and len(list(state.glob("*.json"))) == 1  # it may just come into being
    monkeypatch.setattr(launcher, "_SETTLED_S", -60)
    assert launcher.reap(state) == [] and not list(state.glob("*.json"))


def test_a_server_left_running_on_purpose_is_kept_until_its_root_dies(state: Path) -> None:
    up = starter(state, leashed=False, stay=False)
    url = up.communicate()[0].strip()
    assert launcher.reap(state) == []
    found = launcher.in_place_of(spec(), state)
    assert [r.url for r in found] == [url] and not found[0].owned
    root, worker = found[0].processes
    kill(root.pid)
    assert within(5, lambda: not alive(root.pid)) and alive(worker.pid)
    assert launcher.in_place_of(spec(), state) == []
    assert launcher.reap(state, 1) == found
    assert not alive(worker.pid)


def test_a_child_that_lost_its_parents_and_left_its_session_is_still_found(state: Path, tmp_path: Path) -> None:
    record = launcher.start(spec(), state, leashed=False, build=builder(tmp_path))
    server, worker = record.processes
    os.kill(server.pid, signal.SIGKILL)
    assert within(5, lambda: psutil.Process(worker.pid).ppid() != server.pid)
    began = time.monotonic()
    assert launcher.stop(record, 5) is True
    assert not alive(worker.pid) and time.monotonic() - began < 4
