"""The run directory: whole files with manifests, journals, resume.

A Parquet or JSON file appears whole or not at all (written aside, synced, renamed) and its manifest
comes last. A manifest says from what the file was made (`key`) and what it is (`sha256`), so a file
stands exactly if its manifest does, the key is the one wanted and the bytes match. Manifests lie in
a tree of their own, so that every data folder holds nothing but data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.errors import InputError, StorageError
from tasks.core.identity import digest

log = logging.getLogger("winnow.store")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

State = Literal["done", "missing", "stale", "damaged"]


@dataclass(frozen=True)
class Manifest:
    """What is known of a file that stands."""

    path: str
    key: str
    sha256: str
    size: int
    rows: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    written_at: float = 0.0


class Store:
    """A run directory at a local path or an fsspec URL."""

    def __init__(self, url: str) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"runs_dir: cannot open {url}: {error}") from error
        self.url = url
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, relative: str) -> str:
        """Full path of a file of the run, in its file system's terms."""
        return f"{self.root}/{relative}"

    def display(self, relative: str = "") -> str:
        """The path as a user would write it."""
        return f"{self.url.rstrip('/')}/{relative}".rstrip("/")

    def exists(self, relative: str) -> bool:
        """Whether the file or folder is there."""
        return self.fs.exists(self.path(relative))

    def glob(self, pattern: str) -> list[str]:
        """Relative paths that match, sorted."""
        cut = len(self.root) + 1
        return sorted(p[cut:] for p in self.fs.glob(self.path(pattern)))

    # -- reading ---------------------------------------------------------------------------------

    def open(self, relative: str) -> IO[bytes]:
        """A readable binary file."""
        return self.fs.open(self.path(relative), "rb")

    def read(self, relative: str, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
        """A Parquet file, or one of its row groups."""
        # Arrow's threads must not hold Python buffers: one that is let go of while the interpreter ends
        # aborts the process (exit code 134). So a local file is read natively, another without threads.
        with contextlib.ExitStack() as stack:
            if self.local:
                parquet = pq.ParquetFile(self.path(relative))
            else:
                parquet = pq.ParquetFile(stack.enter_context(self.open(relative)), pre_buffer=False)
            if row_group is None:
                return parquet.read(columns=columns, use_threads=self.local)
            return parquet.read_row_group(row_group, columns=columns, use_threads=False)  # small: threads cost more

    def row_groups(self, relative: str) -> int:
        """How many row groups a Parquet file has."""
        if self.local:
            return pq.read_metadata(self.path(relative)).num_row_groups
        with self.open(relative) as file:
            return pq.read_metadata(file).num_row_groups

    def salvage(self, relative: str) -> Iterator[pa.Table]:
        """The row groups of a Parquet file that can't be trusted as a whole: those whose checksums hold."""
        try:
            with self.open(relative) as file:
                content = pa.py_buffer(file.read())
            groups = pq.ParquetFile(content, page_checksum_verification=True).num_row_groups
        except (OSError, ValueError, pa.ArrowException) as error:
            log.warning("%s: nothing of it can be read: %s", self.display(relative), _first_line(error))
            return
        for n in range(groups):
            try:
                yield pq.ParquetFile(content, page_checksum_verification=True).read_row_group(n, use_threads=False)
            except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name that is no UTF-8 any more
                log.warning("%s: row group %d is lost: %s", self.display(relative), n, _first_line(error))

    def read_json(self, relative: str) -> Any:
        """A JSON file, or None where there is none."""
        try:
            with self.open(relative) as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def manifest(self, relative: str) -> Manifest | None:
        """The file's manifest, or None."""
        try:
            raw = self.read_json(_manifest_path(relative))
        except ValueError:
            log.warning("%s: its manifest is damaged; the file will be made again", relative)
            return None
        try:
            return Manifest(**raw) if raw else None
        except TypeError:  # JSON, but no manifest
            log.warning("%s: its manifest is damaged; the file will be made again", relative)
            return None

    def state(self, relative: str, key: str, deep: bool = True) -> State:
        """Whether the file stands for `key`; `deep` reads it and compares digests."""
        manifest = self.manifest(relative)
        if manifest is None or not self.exists(relative):
            return "missing"
        if manifest.key != key:
            return "stale"
        if self.fs.size(self.path(relative)) != manifest.size:
            return "damaged"
        return "damaged" if deep and self._sha256(relative) != manifest.sha256 else "done"

    def _sha256(self, relative: str) -> str:
        hasher = hashlib.sha256()
        with self.open(relative) as file:
            while block := file.read(1 << 20):
                hasher.update(block)
        return hasher.hexdigest()

    # -- writing ---------------------------------------------------------------------------------

    def write_table(self, relative: str, table: pa.Table, key: str, **facts: Any) -> Manifest:
        """Write a Parquet file and its manifest."""
        return self.write_batches(relative, iter([table]), table.schema, key, **facts)

    def write_batches(self, relative: str, tables: Iterator[pa.Table], schema: pa.Schema, key: str,
                      **facts: Any) -> Manifest:
        """Write tables as they come, a row group each, into one Parquet file; then its manifest.

        A fact may be a function: it is called once all tables are written.
        """
        rows = 0
        with self._writing(relative), self._target(relative) as out:
            # By name: Arrow must not hold a Python file, which it would close from a thread of its own, perhaps while
            # the interpreter ends (seen after a disk had filled: a segmentation fault in place of the exit code).
            # Checksums: what is left of a damaged file can then be told from what is lost.
            with pq.ParquetWriter(out.name, schema, compression="zstd", write_page_checksum=True,
                                  use_dictionary=_repetitive(schema)) as writer:  # pyright: ignore[reportArgumentType]
                for table in tables:
                    rows += table.num_rows
                    writer.write_table(table, row_group_size=max(1, table.num_rows))
            known = {name: fact() if callable(fact) else fact for name, fact in facts.items()}
            return self._publish(relative, out, key, rows, known)

    def _target(self, relative: str) -> Any:
        return _aside(self.path(relative)) if self.local else tempfile.NamedTemporaryFile(dir=self._scratch())

    @contextlib.contextmanager
    def _writing(self, relative: str) -> Iterator[None]:
        """A disk that is full is an error with a message for people."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise storage_error(error, self.display(relative)) from error
            raise

    def write_bytes(self, relative: str, content: bytes, key: str, **facts: Any) -> Manifest:
        """Write any file and its manifest."""
        with self._writing(relative), io.BytesIO(content) if not self.local else _aside(self.path(relative)) as out:
            if self.local:
                out.write(content)
            return self._publish(relative, out, key, None, facts)

    def write_json(self, relative: str, value: Any) -> None:
        """Write a JSON file, whole or not at all, without a manifest."""
        content = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if not self.local:
            self.fs.pipe_file(self.path(relative), content)
            return
        with self._writing(relative), _aside(self.path(relative)) as out:
            out.write(content)
            out.commit()

    def _publish(self, relative: str, out: Any, key: str, rows: int | None, facts: dict[str, Any]) -> Manifest:
        out.flush()
        out.seek(0)
        hasher, size = hashlib.sha256(), 0
        while block := out.read(1 << 20):
            hasher.update(block)
            size += len(block)
        # a manifest that speaks of the old bytes must never stand beside the new ones
        self.forget(relative)
        if self.local:
            out.commit()
        else:
            out.seek(0)
            with self.fs.open(self.path(relative), "wb") as target:
                shutil.copyfileobj(out, target, 1 << 20)
        manifest = Manifest(relative, key, hasher.hexdigest(), size, rows, facts, time.time())
        self.write_json(_manifest_path(relative), asdict(manifest))
        return manifest

    def annotate(self, relative: str, **facts: Any) -> None:
        """Add facts to the manifest of a file that stands."""
        if manifest := self.manifest(relative):
            self.write_json(_manifest_path(relative), asdict(manifest) | {"facts": manifest.facts | facts})

    def forget(self, relative: str) -> None:
        """Remove the file's manifest: it is owed again."""
        if self.fs.exists(path := self.path(_manifest_path(relative))):
            self.fs.rm_file(path)

    def remove(self, relative: str) -> None:
        """Remove a file and its manifest."""
        self.forget(relative)
        if self.exists(relative):
            self.fs.rm_file(self.path(relative))

    # -- this machine's side ---------------------------------------------------------------------

    def _scratch(self) -> Path:
        """A local folder for what can't be appended to or renamed over a URL."""
        base = Path(self.root) if self.local else (
            Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "winnow" / digest(self.url))
        with self._writing(""):
            base.mkdir(parents=True, exist_ok=True)
        return base

    def journal(self, relative: str) -> Journal:
        """The journal of that name; local even where the run directory is not."""
        return Journal(self._scratch() / "journal" / relative)

    def sweep(self) -> None:
        """Remove what a killed writer left half-written."""
        if self.local and os.path.isdir(self.root):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    if name.startswith(".") and name.endswith(_ASIDE):
                        os.unlink(os.path.join(folder, name))

    def lock(self) -> RunLock:
        """An exclusive lock on the run, for the life of this process."""
        return RunLock(self._scratch() / ".lock", self.display())


_ASIDE = ".winnow-tmp"


def _repetitive(schema: pa.Schema) -> list[str]:
    """The columns for which a dictionary pays: texts often repeat, numbers and lists of numbers never do."""
    return [field.name for field in schema if pa.types.is_string(field.type)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _manifest_path(relative: str) -> str:
    return f"manifests/{relative}.json"


class _aside:
    """A file written beside its place; `commit` syncs it and renames it there, else it is removed."""

    def __init__(self, target: str) -> None:
        self.target, folder = target, os.path.dirname(target)
        os.makedirs(folder, exist_ok=True)
        handle, self.name = tempfile.mkstemp(prefix=".", suffix=_ASIDE, dir=folder)
        self.file = os.fdopen(handle, "w+b")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _aside:
        return self

    def commit(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.chmod(self.name, 0o644)  # mkstemp's 0600 would hide the dataset from other users
        os.replace(self.name, self.target)
        folder = os.open(os.path.dirname(self.target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()  # which writes what is buffered, and so fails once more on a full disk
        finally:
            if os.path.exists(self.name):
                os.unlink(self.name)


class Journal:
    """An append-only JSONL file of finished requests; a torn line is owed again.

    Records are found again by their place, (offset, size) of their line in bytes, so that a long journal is never held
    in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._reader: IO[bytes] | None = None
        self._end = 0
        self._queued: list[bytes] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The whole lines; what a kill tore is skipped."""
        return (record for _, record in self.scan())

    def scan(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """The whole lines, each with its place; what a kill tore is skipped."""
        if not self.path.exists():
            return
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    # no proper part of an object's JSON is JSON: a torn line never parses
                    record = orjson.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict):
                    yield (offset, len(line)), record
                else:
                    log.warning("%s: a torn line at byte %d is asked for again", self.path, offset)
                offset += len(line)

    def at(self, offset: int, size: int) -> dict[str, Any]:
        """The record at a place."""
        if self._reader is None:
            self._reader = self.path.open("rb", buffering=0)
        return orjson.loads(os.pread(self._reader.fileno(), size, offset))

    def append(self, record: dict[str, Any]) -> tuple[int, int]:
        """Write one line with a single system call, so that a kill loses at most that line; its place.

        Raises StorageError when it can't be written.
        """
        place = self.queue(record)
        self.flush()
        return place

    def queue(self, record: dict[str, Any]) -> tuple[int, int]:
        """Hold a line back until `flush`, so that several become one system call; the place it will have."""
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        if self._file is None:
            self._open()
        offset = self._end
        self._queued.append(line)
        self._end += len(line)
        return offset, len(line)

    def flush(self) -> None:
        """Write what was queued. Raises StorageError when it can't be written."""
        if not self._queued:
            return
        lines, self._queued = self._queued, []
        if self._file is None:
            self._open()
        assert self._file is not None
        try:
            _write(self._file, b"".join(lines))
        except OSError as error:
            self.close()  # it may end in a torn line now
            raise storage_error(error, str(self.path)) from error

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._end = self._file.tell()
            if self._end and not _ends_line(self.path):
                _write(self._file, b"\n")  # close the torn line, or it would eat ours
                self._end += 1
        except OSError as error:
            self.close()
            raise storage_error(error, str(self.path)) from error

    def close(self) -> None:
        """Close the file, without what is queued; `append` and `at` open it again."""
        self._queued.clear()
        for file in (self._file, self._reader):
            if file is not None:
                file.close()
        self._file = self._reader = None

    def remove(self) -> None:
        """Forget everything: the file that it led to stands."""
        self.close()
        self.path.unlink(missing_ok=True)


def _write(file: IO[bytes], content: bytes) -> None:
    """All of it in one call, or OSError: a disk that fills takes a part of a line and says so by the count alone."""
    written = file.write(content)
    if written != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def storage_error(error: OSError, path: str) -> StorageError:
    """What to tell a person when nothing can be written at `path`."""
    return StorageError(f"{path}: cannot be written: {error.strerror or error}; what was written stands: make room and "
                        "run the same command again to go on")


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class RunLock:
    """One process a run: two writers would spoil each other's journals."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        import fcntl

        try:
            self._file = self.path.open("a+")
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise storage_error(error, str(self.path)) from error
            raise
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            raise InputError(f"{self.run}: already being worked on by {owner}; wait for it, or choose another "
                             "name with --run") from None
        with contextlib.suppress(OSError):  # a full disk: the name is for people, the lock holds without it
            self._file.truncate(0)
            os.write(self._file.fileno(), f"process {os.getpid()}".encode())
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
