"""What is kept of a server on disk, and telling its processes apart."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.serving.launch import launcher, processes, records
from tasks.serving.launch.launch_spec import LaunchSpec
from tasks.serving.launch.records import ServerRecord
from tests.serving.launch.stand_in import kept_record, within

SPEC = LaunchSpec(model="m", role="judge", device="cuda", gpu=1, dtype="bfloat16", mem_fraction=0.5,
                  speculation={"algorithm": "eagle", "draft_model": "d", "steps": 3},
                  flags={"tp-size": 2, "x": True, "y": 0.5, "z": "w"})


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def record(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> ServerRecord:
    """A kept record of a process that lives."""
    return kept_record(tmp_path, SPEC, root=sleeper.pid)


def changed(record: ServerRecord, **fields: object) -> None:
    """The record's file with other fields."""
    record.path.write_text(json.dumps(json.loads(record.path.read_text()) | fields))


def test_what_is_written_is_what_is_read(tmp_path: Path, record: ServerRecord) -> None:
    assert records.kept(tmp_path) == [record]
    assert launcher.running(tmp_path) == [record]
    assert records.spec_of(record) == SPEC


@pytest.mark.parametrize("spoil", [
    lambda r: r.path.write_bytes(r.path.read_bytes()[:200]),
    lambda r: r.path.write_text("[]"),
    lambda r: r.path.write_bytes(b"\xff\x00"),
    lambda r: r.path.write_text(json.dumps({"role": r.role, "url": r.url, "pid": r.pid, "create_time": 1.5})),
    lambda r: changed(r, processes=[{"pid": str(r.pid), "created": 1.5}]),
    lambda r: changed(r, processes=[{"pid": 1, "created": processes.identify(1).created}]),
    lambda r: changed(r, machine="elsewhere"),
    lambda r: (r.path.unlink(), r.path.mkdir()),
], ids=["torn", "no record", "no text", "an older version's", "not of its types", "process 1", "another machine's",
        "a folder"])
def test_a_file_that_is_no_record_of_ours_is_never_acted_on(tmp_path: Path, record: ServerRecord,
                                                            spoil: Callable[[ServerRecord], object],
                                                            sleeper: subprocess.Popen[bytes]) -> None:
    spoil(record)
    assert launcher.running(tmp_path) == [] and launcher.reap(tmp_path) == []
    assert record.path.exists() and sleeper.poll() is None


def test_a_record_from_before_a_restart_of_the_machine_names_no_process(tmp_path: Path, record: ServerRecord,
                                                                        sleeper: subprocess.Popen[bytes]) -> None:
    changed(record, boot="another")
    assert launcher.running(tmp_path) == []
    assert launcher.stop(records.kept(tmp_path)[0], 0) is False and sleeper.poll() is None
    assert not record.path.exists()


def test_a_record_of_which_nothing_lives_is_forgotten(tmp_path: Path, record: ServerRecord,
                                                      sleeper: subprocess.Popen[bytes]) -> None:
    Path(record.log).touch()
    sleeper.kill()
    sleeper.wait()
    assert launcher.reap(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == [Path(record.log).name]


def test_a_folder_that_was_moved_still_knows_its_servers(tmp_path: Path, record: ServerRecord,
                                                         sleeper: subprocess.Popen[bytes]) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    record.path.rename(moved / record.path.name)
    found = launcher.running(moved)
    assert [r.id for r in found] == [record.id] and found[0].log == str(moved / Path(record.log).name)
    launcher.stop(found[0], 1)
    assert sleeper.poll() is not None and not list(moved.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, record: ServerRecord,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(path: Path, data: bytes) -> int:
        path.open("wb").write(data[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="No space"):
        records.write(dataclasses.replace(record, ready=False))
    assert records.kept(tmp_path) == [record]


# --- the spec of another version ---


def test_a_spec_that_lacks_a_setting_takes_its_default(record: ServerRecord) -> None:
    older = {k: v for k, v in record.spec.items() if k not in ("speculation", "mask_limit")}
    assert records.spec_of(dataclasses.replace(record, spec=older)) == dataclasses.replace(SPEC, speculation={})


@pytest.mark.parametrize("change", [{"of_tomorrow": 1}, {"device": "abacus"}, {"flags": 5}, {"port": "x"}])
def test_a_spec_that_is_not_understood_is_none(record: ServerRecord, change: dict[str, object]) -> None:
    assert records.spec_of(dataclasses.replace(record, spec=record.spec | change)) is None


def test_a_spec_without_a_model_is_none(record: ServerRecord) -> None:
    assert records.spec_of(dataclasses.replace(record, spec={})) is None


# --- processes ---


def test_a_process_is_known_by_its_id_and_the_time_of_its_start(sleeper: subprocess.Popen[bytes]) -> None:
    its = processes.identify(sleeper.pid)
    found = processes.find(its)
    assert found is not None and found.pid == sleeper.pid
    assert processes.find(dataclasses.replace(its, created=its.created + 0.01)) is None
    sleeper.kill()
    assert within(5, lambda: processes.find(its) is None)  # a zombie is not running
    sleeper.wait()
    assert processes.find(its) is None


RENAMED = """
import sys, time
import setproctitle
setproctitle.setproctitle("another::name" * 3)
print("renamed", flush=True)
time.sleep(600)
"""


def test_a_process_that_names_itself_keeps_its_mark() -> None:
    pytest.importorskip("setproctitle")
    process = subprocess.Popen([sys.executable, "-c", RENAMED], stdout=subprocess.PIPE,
                               env=os.environ | processes.marked("some mark"))
    try:
        assert process.stdout and process.stdout.readline() == b"renamed\n"
        assert [p.pid for p in processes.by_mark(["some mark", "none"])["some mark"]] == [process.pid]
    finally:
        process.kill()
        process.communicate()
