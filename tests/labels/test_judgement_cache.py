"""Judgements that are kept: whole or not at all, for every process, never another's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from tasks.core.errors import StorageError
from tasks.labels.quality.cache import Judgements, Known

ONE = Known(0.1234567890123456789, 3e-9, b"run-one!")


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def test_a_judgement_is_found_again_to_the_last_bit(tmp_path):
    kept = Judgements(tmp_path / "new" / "folder" / "j.sqlite")
    assert kept.get(key(1)) is None
    kept.put(key(1), ONE)
    kept.put(key(2), Known(1.0, 0.0, b""))
    kept.put(key(2), Known(0.0, 5e-324, b"x"))
    kept.close()
    again = Judgements(kept.path)
    assert again.get(key(1)) == ONE
    assert again.get(key(2)) == Known(0.0, 5e-324, b"x")
    assert again.get(key(3)) is None


WRITER = """
import sys
from pathlib import Path
from tasks.labels.quality.cache import Judgements, Known
kept = Judgements(Path(sys.argv[1]))
for n in range(10**9):
    kept.put(n.to_bytes(16, "big"), Known(n, n / 2, b"w"))
    print(n, flush=True)
"""


def test_what_was_kept_survives_kill_9(tmp_path):
    path = tmp_path / "j.sqlite"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout
    said = [int(writer.stdout.readline()) for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)
    said += [int(line) for line in writer.stdout.read().split(b"\n")[:-1]]
    writer.wait()
    kept = Judgements(path)
    assert [kept.get(key(n)) for n in said] == [Known(n, n / 2, b"w") for n in said]
    kept.put(key(0), ONE)
    assert kept.get(key(0)) == ONE


def _fill(path: str, start: int) -> None:
    from pathlib import Path

    kept = Judgements(Path(path))
    for n in range(start, start + 200):
        kept.put(key(n), Known(n, 0, b"p"))


def test_processes_and_threads_write_at_once(tmp_path):
    path = tmp_path / "j.sqlite"
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=_fill, args=(str(path), 1000 * p)) for p in range(3)]
    for process in processes:
        process.start()
    kept = Judgements(path)
    threads = [threading.Thread(target=lambda t=t: [kept.put(key(n), Known(n, 0, b"t"))
                                                    for n in range(10_000 * t, 10_000 * t + 100)]) for t in (1, 2)]
    for worker in threads:
        worker.start()
    for worker in (*threads, *processes):
        worker.join()
    numbers = [1000 * p + n for p in range(3) for n in range(200)] + [10_000 * t + n for t in (1, 2) for n in range(100)]
    assert all((found := kept.get(key(n))) and found.first == n for n in numbers)


def test_a_flipped_bit_is_no_judgement(tmp_path, caplog):
    kept = Judgements(tmp_path / "j.sqlite")
    kept.put(key(1), ONE)
    with sqlite3.connect(kept.path) as other:
        (verdict,) = other.execute("SELECT verdict FROM judgements").fetchone()
        other.execute("UPDATE judgements SET verdict = ?", (bytes([verdict[0] ^ 1]) + verdict[1:],))
    assert kept.get(key(1)) is None
    assert "checksum" in caplog.text
    kept.put(key(1), ONE)
    assert kept.get(key(1)) == ONE


def test_a_file_that_is_no_database_is_put_aside(tmp_path, caplog):
    path = tmp_path / "j.sqlite"
    path.write_bytes(b"not SQLite at all, but long enough to be taken for a header" * 50)
    kept = Judgements(path)
    kept.put(key(1), ONE)
    assert kept.get(key(1)) == ONE
    assert "put aside" in caplog.text
    assert [p.read_bytes()[:10] for p in tmp_path.glob("*damaged*") if p.stat().st_size] == [b"not SQLite"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Judgements(tmp_path / "file" / "j.sqlite")


def test_a_full_disk_says_where(tmp_path):
    kept = Judgements(tmp_path / "j.sqlite")
    kept._at_work().execute("PRAGMA max_page_count = 4")
    with pytest.raises(StorageError, match=r"j\.sqlite: cannot be written.*make room"):
        for n in range(10_000):
            kept.put(key(n), ONE)
    assert kept.get(key(0)) == ONE


@pytest.mark.parametrize("damaged", [False, True])
def test_shards_that_open_it_at_the_same_moment_share_one_file(tmp_path, damaged):
    for attempt in range(15):
        path = tmp_path / str(attempt) / "j.sqlite"
        if damaged:
            path.parent.mkdir()
            path.write_bytes(b"no database " * 500)
        start, errors = threading.Barrier(4), []

        def shard(n: int, path=path, start=start, errors=errors) -> None:
            start.wait()
            try:
                Judgements(path).put(key(n), Known(n, 0, b"s"))
            except Exception as error:
                errors.append(error)

        workers = [threading.Thread(target=shard, args=(n,)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors
        kept = Judgements(path)
        assert [kept.get(key(n)) for n in range(4)] == [Known(n, 0, b"s") for n in range(4)]
        assert len(list(path.parent.glob("*damaged*"))) == damaged


def test_another_table_of_that_name_is_put_aside(tmp_path):
    path = tmp_path / "j.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE judgements (mine TEXT)")
    other.close()
    kept = Judgements(path)
    kept.put(key(1), ONE)
    assert kept.get(key(1)) == ONE and list(tmp_path.glob("*damaged*"))
