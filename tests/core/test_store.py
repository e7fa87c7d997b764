from __future__ import annotations

import contextlib
import itertools
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.errors import InputError, StorageError
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
    store.write_batches("x.parquet", iter([TABLE, TABLE.slice(0, 1)]), TABLE.schema, "k")
    with store.open("x.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert [parquet.read_row_group(n).num_rows for n in range(parquet.num_row_groups)] == [3, 1]


RECORDS = st.lists(st.dictionaries(st.text("ab\u2028\n\x00", max_size=5),
                                   st.text("ab\u2028\n\x00", max_size=20) | st.integers(0, 9), max_size=3), max_size=8)


def fill(path: Path, records: list[dict]) -> bytes:
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    return path.read_bytes() if path.exists() else b""


def goes_on(path: Path, whole: list[dict]) -> None:
    """The journal has these records, takes one more, and finds each of them at its place."""
    assert list(Journal(path)) == whole
    journal = Journal(path)
    place = journal.append({"more": 1})
    assert journal.at(*place) == {"more": 1}
    journal.close()
    again = list(Journal(path).scan())
    assert [record for _, record in again] == [*whole, {"more": 1}]
    assert [journal.at(*place) for place, _ in again] == [*whole, {"more": 1}]
    assert again[-1][0] == place
    journal.close()


@given(RECORDS, st.integers(0, 400))
def test_a_journal_cut_anywhere_keeps_every_whole_line_and_takes_more(tmp_path_factory, records, cut):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    content = fill(path, records)
    path.write_bytes(content[:cut])
    ends = itertools.accumulate(len(line) for line in content.splitlines(keepends=True))
    goes_on(path, records[:sum(end - 1 <= cut for end in ends)])  # whole but for its line's end is whole


def test_a_last_line_torn_at_any_byte_is_owed_again(tmp_path):
    path = tmp_path / "j.jsonl"
    records = [{"n": n, "ids": [1, 23, n], "text": "\u00e9 \u2028", "inner": {"a": [{}, None]}} for n in range(3)]
    content = fill(path, records)
    begin = content.rindex(b"\n", 0, -1) + 1
    for cut in range(begin, len(content)):
        path.write_bytes(content[:cut])
        goes_on(path, records if cut == len(content) - 1 else records[:2])


@given(RECORDS, st.integers(1, 5000), st.integers(0, 40))
def test_zeros_that_a_crashed_machine_leaves_at_the_end_count_for_nothing(tmp_path_factory, records, zeros, cut):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    content = fill(path, [*records, {"last": "x" * 30}])
    path.write_bytes(content[:-cut - 1] + b"\x00" * zeros)
    goes_on(path, records)


@given(st.lists(st.sampled_from([b"", b"[1]", b"3", b"null", b"{", b"}", b'{"a":1}{"b":2}', b"\xff\xfe", b"{'a': 1}",
                                 b'{"a":NaN}', b"\x00"]), max_size=5), RECORDS)
def test_lines_that_are_no_record_are_passed_over(tmp_path_factory, garbage, records):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    fill(path, records[:1])
    with path.open("ab") as file:
        file.writelines(line + b"\n" for line in garbage)
    fill(path, records[1:])
    goes_on(path, records)


def test_what_two_processes_wrote_one_after_the_other_is_all_there(tmp_path):
    path = tmp_path / "j.jsonl"
    program = "import sys; from tests.core.test_store import fill; from pathlib import Path\n" \
              "fill(Path(sys.argv[1]), [{'of': 'another', 'n': n} for n in range(3)])"
    fill(path, [{"n": 0}])
    with path.open("ab") as file:
        file.write(b'{"torn')
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    goes_on(path, [{"n": 0}, *({"of": "another", "n": n} for n in range(3))])


@contextlib.contextmanager
def room(most: int) -> Iterator[None]:
    """No file of this process may grow beyond `most` bytes: to a writer as a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@given(st.integers(0, 120))
def test_a_journal_on_a_full_disk_says_so_and_goes_on_once_there_is_room(tmp_path_factory, most):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    records = [{"n": n, "text": "x" * 20} for n in range(4)]
    lines, journal, kept = [len(orjson.dumps(r)) + 1 for r in records], Journal(path), []
    with room(most):
        for record in records:
            try:
                journal.append(record)
                kept.append(record)
            except StorageError as error:
                assert str(path) in str(error)
                assert "make room" in str(error)
    fits = sum(end <= most for end in itertools.accumulate(lines))
    assert kept == records[:fits]
    whole = fits + any(end == most + 1 for end in itertools.accumulate(lines))  # all but its line's end was written
    goes_on(path, records[:whole])


def test_a_device_without_room_is_a_storage_error():
    with pytest.raises(StorageError, match=r"/dev/full: cannot be written: No space left"):
        Journal(Path("/dev/full")).append({"n": 1})


@pytest.mark.parametrize("most", [0, 4, 200, 5000, 40_000])
def test_a_table_on_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, most):
    store = Store(str(tmp_path / "run"))
    rng = numpy.random.default_rng(0)
    table = pa.table({"n": rng.integers(0, 2**60, 10_000)})
    small = pa.table({"n": [1]})
    store.write_table("a/x.parquet", small, "old")
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with room(most), pytest.raises(StorageError, match=r"a/x\.parquet: cannot be written"):
        store.write_batches("a/x.parquet", iter([table.slice(0, 2000), table.slice(2000)]), table.schema, "new")
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
    assert store.state("a/x.parquet", "old") == "done"
    assert store.read("a/x.parquet").equals(small)
    store.write_table("a/x.parquet", table, "new")
    assert store.read("a/x.parquet").equals(table)


@pytest.mark.parametrize("write", [
    lambda store: store.write_json("a/x.json", {"text": "x" * 9000}),
    lambda store: store.write_bytes("a/x.json", b"x" * 9000, "new"),
    lambda store: store.write_bytes("a/x.json", b"x", "new", fact="x" * 9000),  # the bytes find room, their manifest not
])
def test_bytes_on_a_full_disk_leave_nothing_half_written(tmp_path, write):
    store = Store(str(tmp_path / "run"))
    store.write_bytes("a/x.json", b"old", "old")
    with room(4000), pytest.raises(StorageError, match=r"a/x\.json"):
        write(store)
    assert not list((tmp_path / "run").rglob(".*"))
    assert store.state("a/x.json", "old") in ("done", "missing")
    assert store.state("a/x.json", "new") != "done"


def test_a_run_can_be_locked_on_a_full_disk(tmp_path):
    store = Store(str(tmp_path / "run"))
    with store.lock():
        pass
    with room(0), store.lock(), pytest.raises(InputError, match="already being worked on"), store.lock():
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"{}", b'{"path": 1}', b'{"sha256": "x", "more": 2}',
                                     b"\xff\xfe", b"null"])
def test_what_is_no_manifest_makes_the_file_owed_again(store, content):
    store.write_table("x.parquet", TABLE, "k")
    store.fs.pipe_file(store.path("manifests/x.parquet.json"), content)
    assert store.state("x.parquet", "k") == "missing"


@settings(max_examples=60)
@given(st.data())
def test_salvage_gives_what_was_written_or_nothing_of_each_row_group(tmp_path_factory, data):
    store = Store(str(tmp_path_factory.mktemp("run")))
    groups = [pa.table({"n": [10 * g + i for i in range(4)], "text": [f"{g}-{i}" * 9 for i in range(4)]}) for g in range(3)]
    store.write_batches("x.parquet", iter(groups), groups[0].schema, "k")
    path = Path(store.path("x.parquet"))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)):]
    path.write_bytes(content)
    assert store.state("x.parquet", "k") == "damaged"
    for found in store.salvage("x.parquet"):  # names of columns have no checksum: the caller compares the schema
        if found.num_rows and found.schema.equals(groups[0].schema):
            assert any(found.equals(group) for group in groups)


def test_a_columns_name_that_is_no_text_any_more_is_damage(tmp_path):
    store = Store(str(tmp_path / "run"))
    store.write_table("x.parquet", pa.table({"quality": [1]}), "k")
    path = Path(store.path("x.parquet"))
    path.write_bytes(path.read_bytes().replace(b"quality", b"qua\xffity"))
    assert list(store.salvage("x.parquet")) == []


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
