"""Processes that can be told apart after whoever started them is gone, and ending them.

A process is known by its id and the time of its start, never by its name: ids are used again. What is not known that
way (yet) is found by the mark that every process of a server carries in its environment.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "WINNOW_SERVER"
# A process that names itself (SGLang's scheduler and detokenizer do) would write over its environment.
_KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
_ROUNDS = 5


@dataclass(frozen=True)
class Identity:
    """A process: its id and when it started, in seconds since boot (Linux; elsewhere since 1970)."""

    pid: int
    created: float


def identify(pid: int) -> Identity:
    """Raises OSError or psutil.Error if there is no such process."""
    if sys.platform == "linux":  # since boot: no correction of the clock makes it another process
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return Identity(pid, int(stat.rpartition(b")")[2].split()[19]) / os.sysconf("SC_CLK_TCK"))
    return Identity(pid, psutil.Process(pid).create_time())


def find(identity: Identity) -> psutil.Process | None:
    """The process, or None if it ended or its id belongs to another one now."""
    try:
        process = psutil.Process(identity.pid)
        same = identify(identity.pid) == identity
        return process if same and not _ended(process) else None
    except (OSError, psutil.Error, ValueError):
        return None


def marked(mark: str) -> dict[str, str]:
    """What a server's environment needs so that its processes are found by `mark`."""
    return {MARK: mark, **_KEEP_ENVIRONMENT}


def by_mark(marks: Collection[str]) -> dict[str, list[psutil.Process]]:
    """The living processes that carry each mark."""
    out: dict[str, list[psutil.Process]] = {mark: [] for mark in marks}
    for pid in psutil.pids() if out else ():
        with contextlib.suppress(psutil.Error, OSError):  # others' processes: not for us to read
            process = psutil.Process(pid)
            mark = process.environ().get(MARK)
            if mark in out and not _ended(process):
                out[mark].append(process)
    return out


def with_descendants(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes and all they started, each once; without this process and those it descends from."""
    this = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            for process in [root, *root.children(recursive=True)]:
                if process.pid not in this and not _ended(process):
                    found.setdefault(process.pid, process)
    return list(found.values())


def end(roots: Callable[[], Iterable[psutil.Process]], grace_s: float) -> list[psutil.Process]:
    """End what `roots()` finds and all it started: SIGTERM, and after `grace_s` seconds SIGKILL; what is left.

    psutil compares the time of start before each signal, so an id that is used again is never hit.
    """
    processes = with_descendants(roots())
    for process in processes if grace_s > 0 else ():
        _signal(process, signal.SIGTERM)
    _wait(processes, grace_s)
    for _ in range(_ROUNDS):  # what is killed while it forks leaves a child for the next round
        processes = with_descendants([*roots(), *processes])
        if not processes:
            return []
        for process in processes:
            _signal(process, signal.SIGKILL)
        _wait(processes, 2)
    return with_descendants([*roots(), *processes])


def here() -> str:
    """The machine, as far as process ids mean the same: host and process namespace."""
    with contextlib.suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def boot() -> str:
    """This start of the machine; before it, all processes were others. Empty where it has no name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return True


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.Error):  # gone, or another user's
        process.send_signal(number)


def _wait(processes: list[psutil.Process], timeout_s: float) -> None:
    """Until all have ended; one that its parent has not asked after yet (a zombie) has."""
    with contextlib.suppress(psutil.Error):
        psutil.wait_procs(processes, timeout=timeout_s)
