from __future__ import annotations

import itertools
import os
import subprocess
import sys
import uuid

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.errors import InputError
from tasks.core.store import Journal, Store

TABLE = pa.table({"n": [1, 2, 3]})


@pytest.fixture(params=["folder", "url"])
def store(request, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Store(str(tmp_path / "run") if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def test_a_file_stands_for_its_key_only(store):
    assert store.state("a/x.parquet", "k") == "missing"
    store.write_table("a/x.parquet", TABLE, "k", rows_ok=3)
    assert store.state("a/x.parquet", "k") == "done"
    assert store.state("a/x.parquet", "other") == "stale"
    assert store.read("a/x.parquet").equals(TABLE)
    manifest = store.manifest("a/x.parquet")
    assert (manifest.rows, manifest.facts) == (3, {"rows_ok": 3})


def test_changed_bytes_are_damage(store):
    store.write_table("x.parquet", TABLE, "k")
    with store.open("x.parquet") as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    store.fs.pipe_file(store.path("x.parquet"), bytes(content))
    assert store.state("x.parquet", "k") == "damaged"
    assert store.state("x.parquet", "k", deep=False) == "done"  # same size: only the digest tells
    store.fs.pipe_file(store.path("x.parquet"), bytes(content[:-1]))
    assert store.state("x.parquet", "k", deep=False) == "damaged"


def test_a_removed_file_is_missing_although_its_manifest_stands(store):
    store.write_table("x.parquet", TABLE, "k")
    store.fs.rm_file(store.path("x.parquet"))
    assert store.state("x.parquet", "k") == "missing"


def test_a_damaged_manifest_is_no_manifest(store):
    store.write_table("x.parquet", TABLE, "k")
    store.fs.pipe_file(store.path("manifests/x.parquet.json"), b'{"path": "x.par')
    assert store.state("x.parquet", "k") == "missing"


def test_a_failing_writer_leaves_the_old_file_or_none(tmp_path):
    store = Store(str(tmp_path / "run"))

    def tables():
        yield TABLE
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.write_batches("x.parquet", tables(), TABLE.schema, "k")
    assert os.listdir(tmp_path / "run") == []
    store.write_table("x.parquet", TABLE, "k")
    with pytest.raises(OSError, match="No space"):
        store.write_batches("x.parquet", tables(), TABLE.schema, "k2")
    assert store.state("x.parquet", "k") == "done"


def test_what_a_killed_writer_left_is_swept(tmp_path):
    store = Store(str(tmp_path / "run"))
    store.write_table("a/x.parquet", TABLE, "k")
    (tmp_path / "run/a/.abc.winnow-tmp").write_bytes(b"half")
    store.sweep()
    assert os.listdir(tmp_path / "run/a") == ["x.parquet"]
    assert store.state("a/x.parquet", "k") == "done"


def test_one_row_group_per_table(store):
    import pyarrow.parquet as pq

    store.write_batches("x.parquet", iter([TABLE, TABLE.slice(0, 1)]), TABLE.schema, "k")
    with store.open("x.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert [parquet.read_row_group(n).num_rows for n in range(parquet.num_row_groups)] == [3, 1]


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text("ab\u2028\n", max_size=5), st.text("ab\u2028\n", max_size=20), max_size=3), max_size=8), st.integers(0, 400))
def test_a_journal_cut_anywhere_keeps_every_whole_line_and_takes_more(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    content = path.read_bytes() if path.exists() else b""
    kept = content[:cut]
    if path.exists():
        path.write_bytes(kept)
    ends = itertools.accumulate(len(line) for line in content.splitlines(keepends=True))
    whole = sum(end - 1 <= cut for end in ends)  # whole but for its line's end is whole
    assert list(Journal(path)) == records[:whole]
    more = Journal(path)
    more.append({"more": "1"})
    more.close()
    assert list(Journal(path)) == [*records[:whole], {"more": "1"}]


def test_a_second_process_is_refused_the_run(tmp_path):
    store = Store(str(tmp_path / "run"))
    program = ("import sys; from tasks.core.store import Store\n"
               "from tasks.core.errors import InputError\n"
               "try:\n  with Store(sys.argv[1]).lock(): print('locked')\n"
               "except InputError as e: print(e)")
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with store.lock():
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"process {os.getpid()}" in said
        assert "--run" in said
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "locked\n"


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(InputError, match="runs_dir"):
        Store("nosuch://bucket/run")
