"""Judgements kept by content, so that none is asked for twice: not after a kill, and not by another run.

One SQLite file a machine. A judgement is committed before it counts, and a commit survives the process (WAL, without a
sync each: a power cut may cost the last ones, which are then asked again). Many processes may use the file at once. It
must lie on a local disk, for SQLite's locks do not hold on every network file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import StorageError
from tasks.core.store import storage_error

log = logging.getLogger("winnow.quality")

FILE = "judgements-1.sqlite"
_BUSY_MS = 60_000
_VALUES = struct.Struct("<dd")
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN,
         sqlite3.SQLITE_PERM)


@dataclass(frozen=True, slots=True)
class Known:
    """A judgement that was made before."""

    first: float
    """P(the answer shown first is better)."""
    outside: float
    """Probability of the tokens that are no verdict."""
    run: bytes
    """Which run and shard asked for it."""


class Judgements:
    """key (bytes) -> judgement. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises StorageError when the file can't be made."""
        self.path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._database = self._open()

    def get(self, key: bytes) -> Known | None:
        """The judgement under a key; None where there is none, or it does not bear its checksum."""
        with self._telling(), self._lock:
            row = self._at_work().execute("SELECT verdict, run, crc FROM judgements WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        verdict, run, crc = row
        if len(verdict) != _VALUES.size or zlib.crc32(key + verdict + run) != crc:
            log.warning("%s: a judgement does not bear its checksum; it is asked for again", self.path)
            return None
        first, outside = _VALUES.unpack(verdict)
        return Known(first, outside, run)

    def put(self, key: bytes, known: Known) -> None:
        """Keep a judgement; it stands when this returns. Raises StorageError when it can't be written."""
        verdict = _VALUES.pack(known.first, known.outside)
        crc = zlib.crc32(key + verdict + known.run)
        with self._telling(), self._lock:
            self._at_work().execute("INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?)",
                                    (key, verdict, known.run, crc))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def remove(self) -> None:
        """Close the file and forget all that is in it; nobody else may use it."""
        self.close()
        for name in (*_files(self.path), _lock_of(self.path)):
            name.unlink(missing_ok=True)

    def _at_work(self) -> sqlite3.Connection:
        if self._database is None:
            raise RuntimeError(f"{self.path} is closed")
        return self._database

    def _open(self) -> sqlite3.Connection:
        # One at a time, in threads and processes: to turn a new file to WAL together is refused at once, and of two
        # that put a damaged file aside the second would take the first's new one.
        with self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _lock_of(self.path).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    return _connect(self.path)
                except sqlite3.DatabaseError as error:
                    if error.sqlite_errorcode & 0xFF not in (*_DAMAGED, sqlite3.SQLITE_ERROR):
                        raise
                aside = next(name for n in itertools.count(1) if not (
                    name := self.path.with_suffix(f".damaged-{n}")).exists())
                log.warning("%s: not a file of judgements any more; it is put aside as %s, and judgements are asked "
                            "for again", self.path, aside.name)
                for name in _files(self.path):
                    if name.exists():
                        name.rename(name.with_name(name.name.replace(self.path.name, aside.name)))
                return _connect(self.path)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What the disk does to the file, as an error for people."""
        try:
            yield
        except OSError as error:
            raise storage_error(error, str(self.path)) from error
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DAMAGED and self._database is not None:
                raise StorageError(f"{self.path}: damaged ({error}); remove it and run the same command again: the "
                                   "judgements that are not in a run's comparisons are asked for again") from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StorageError(f"{self.path}: another process has held it for {_BUSY_MS // 1000} s ({error}); run "
                                   "the same command again when that is over") from error
            if code not in _FULL:
                raise
            raise storage_error(OSError(errno.EIO, str(error)), str(self.path)) from error


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
    try:
        database.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("CREATE TABLE IF NOT EXISTS judgements (key BLOB PRIMARY KEY, verdict BLOB NOT NULL, "
                         "run BLOB NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID")
        database.execute("SELECT key, verdict, run, crc FROM judgements LIMIT 0")
    except BaseException:
        database.close()
        raise
    return database


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _files(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]
