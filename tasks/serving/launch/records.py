"""What is kept on disk of each server that was started here: `<role>-<port>-<id>.json`, its log beside it.

A record is written before its server's process starts, and again as the process and those it starts in turn appear:
whenever whoever starts a server is killed, the next one finds all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter, ValidationError

from tasks.serving.launch import processes
from tasks.serving.launch.launch_spec import LaunchSpec
from tasks.serving.launch.processes import Identity

log = logging.getLogger("winnow.servers")


@dataclass(frozen=True)
class ServerRecord:
    """A server that was started here."""

    id: str
    """Of its own; the processes carry it in their environment (processes.MARK)."""
    role: str
    url: str
    port: int
    machine: str
    boot: str
    owner: Identity
    """The process that started it."""
    leashed: bool
    """Whether it is to end with its owner."""
    ready: bool
    """Whether it was ever seen to generate."""
    processes: tuple[Identity, ...]
    """The root and those it started, as last seen; none while it is being started."""
    devices: tuple[str, ...]
    """Its GPUs, as CUDA_VISIBLE_DEVICES names them; none on the CPU."""
    command: list[str]
    spec: dict[str, Any]
    spec_digest: str
    log: str
    started_at: str

    @property
    def pid(self) -> int | None:
        """The root of its process tree (a leashed one's is its leash)."""
        return self.processes[0].pid if self.processes else None

    @property
    def path(self) -> Path:
        """Where the record is kept."""
        return Path(self.log).with_suffix(".json")

    @property
    def root(self) -> psutil.Process | None:
        """The living root."""
        return processes.find(self.processes[0]) if self.processes and self.boot == processes.boot() else None

    @property
    def owned(self) -> bool:
        """Whether the process that started it lives."""
        return self.boot == processes.boot() and processes.find(self.owner) is not None

    @property
    def age_s(self) -> float:
        """Seconds since it was started, by the clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.started_at)).total_seconds()


_RECORD = TypeAdapter(ServerRecord)
_SPEC = TypeAdapter(LaunchSpec)


def write(record: ServerRecord) -> None:
    """Keep it: the whole of it or, whatever happens, what was there before. Raises OSError."""
    partial = record.path.with_suffix(".partial")
    partial.write_bytes(_RECORD.dump_json(record, indent=1))
    partial.replace(record.path)


def remove(record: ServerRecord) -> None:
    """Keep it no longer; its log stays."""
    record.path.unlink(missing_ok=True)


def kept(state_dir: Path) -> list[ServerRecord]:
    """This machine's records, oldest first. What is torn, foreign or of another version is not ours to act on."""
    found = []
    for path in state_dir.glob("*.json"):
        with contextlib.suppress(OSError, ValidationError):
            record = _RECORD.validate_json(path.read_bytes(), strict=True)
            if record.machine == processes.here() and all(p.pid > 1 for p in record.processes):
                # the folder may have been moved since
                found.append(dataclasses.replace(record, log=str(path.resolve().with_suffix(".log"))))
    return sorted(found, key=lambda r: (r.started_at, r.id))


def living(records: Iterable[ServerRecord]) -> dict[str, list[psutil.Process]]:
    """What lives of each record's processes, by the record's id: those recorded, those that carry its mark."""
    this_boot = [r for r in records if r.boot == processes.boot()]
    out = processes.by_mark([r.id for r in this_boot])
    for record in this_boot:
        known = {p.pid for p in out[record.id]}
        found = [process for identity in record.processes if (process := processes.find(identity))]
        out[record.id] += [p for p in found if p.pid not in known]
    return out


def seen(record: ServerRecord) -> tuple[Identity, ...]:
    """The root, whether it lives or not, and what lives of its tree."""
    alive = processes.with_descendants(p for i in record.processes if (p := processes.find(i)))
    found = set()
    for process in alive:
        with contextlib.suppress(OSError, psutil.Error):
            found.add(processes.identify(process.pid))
    root = record.processes[:1]
    return (*root, *sorted(found.difference(root), key=lambda i: (i.created, i.pid)))


def spec_dump(spec: LaunchSpec) -> dict[str, Any]:
    """The spec as JSON has it."""
    return _SPEC.dump_python(spec, mode="json")


def spec_of(record: ServerRecord) -> LaunchSpec | None:
    """What it was started with; None where this version can't say (another version's record)."""
    if record.spec.keys() - {f.name for f in dataclasses.fields(LaunchSpec)}:
        return None  # it was told something that we know nothing of
    try:
        return _SPEC.validate_python(record.spec)
    except ValidationError:
        return None
