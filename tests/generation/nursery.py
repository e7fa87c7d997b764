"""Processes that build runs and are killed: forked from one that has imported everything, as imports take seconds.

    with Nursery(model) as nursery:
        child = nursery.begin(raw, kill_at=17)
        ended = child.wait()

`kill_at` has the child kill itself (SIGKILL) just before the n-th time it changes the file system under the run's
folder: opens a file for writing, makes a temporary one, renames, removes. So every moment at which a file is half
written, or written without its manifest, can be had on purpose.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int
    """Its exit code; -9 when it was killed."""
    said: str
    """The error's message."""
    changes: list[str]
    """Changes of the file system that it made, each "what path"; the last one it was killed before."""
    grown_mib: float
    """Most memory it had, beyond what it began with; 0 when it was killed."""


class Child:
    """A process that builds a run."""

    def __init__(self, pid: int, out: Path) -> None:
        self.pid, self._out = pid, out

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return not self._out.with_suffix(".code").exists()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, most_s: float = 60) -> Ended:
        """Wait for its end. Raises TimeoutError, having killed it."""
        deadline = time.monotonic() + most_s
        while self.runs:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"process {self.pid} did not end within {most_s:g} s")
            time.sleep(0.002)
        said = json.loads(self._out.read_text()) if self._out.exists() else {"said": "", "changes": []}
        return Ended(int(self._out.with_suffix(".code").read_text()), said["said"], said["changes"],
                     said.get("grown_mib", 0.0))


class Nursery:
    """The process that children are forked from; ends with the block, and they with it."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._children: list[Child] = []

    def __enter__(self) -> Nursery:
        self._folder = tempfile.TemporaryDirectory(prefix="winnow-nursery-")
        self._process = subprocess.Popen([sys.executable, "-m", "tests.generation.nursery", str(self._model)], cwd=ROOT,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        for child in self._children:
            if child.runs:
                child.kill()
        self._process.stdin.close()
        self._process.wait(30)
        self._folder.cleanup()

    def begin(self, raw: dict[str, Any], *, kill_at: int | None = None, room: tuple[str, int] | None = None,
              stages: Sequence[str] = ("generate", "verify")) -> Child:
        """Start to build `raw`; `room`: (part of a path, bytes): from the first change there no file may have more bytes,
        to the child as a disk that is full."""
        assert self._process.stdin is not None and self._process.stdout is not None
        out = Path(self._folder.name) / f"{len(self._children)}.json"
        job = {"raw": raw, "kill_at": kill_at, "room": room, "out": str(out), "stages": list(stages)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        child = Child(int(self._process.stdout.readline()), out)
        self._children.append(child)
        return child

    def run(self, raw: dict[str, Any], *, kill_at: int | None = None, room: tuple[str, int] | None = None) -> Ended:
        """Build `raw`; how it ended."""
        return self.begin(raw, kill_at=kill_at, room=room).wait()


def _watch(folder: str, kill_at: int | None, room: tuple[str, int] | None, out: str) -> list[str]:
    """Note changes under `folder`, end before the one that is ordered, fill the disk at the one that is ordered."""
    changes: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in _CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(folder):
            return
        if event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        changes.append(f"{event} {os.fspath(path)[len(folder):]}")
        if room and room[0] in changes[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room[1], limits[1]))
        if len(changes) == kill_at:
            said = json.dumps({"said": "", "changes": changes})
            handle = os.open(out, os.O_WRONLY | os.O_CREAT)
            os.write(handle, said.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)
    return changes


def _rss_mib() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def _child(job: dict[str, Any]) -> int:
    import traceback

    from tasks.core.errors import WinnowError
    from tests.runs import build

    before = _rss_mib()
    changes = _watch(str(Path(job["raw"]["runs_dir"])), job["kill_at"], job["room"], job["out"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    code, said = 0, ""
    try:
        build(job["raw"], job["stages"])
    except WinnowError as error:
        code, said = error.exit_code, str(error)
    except BaseException:
        code, said = 1, traceback.format_exc()[-3000:]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    Path(job["out"]).write_text(json.dumps({"said": said, "changes": changes, "grown_mib": peak - before}))
    return code


def _main(model: str) -> None:
    import threading

    from tasks.core.config import ModelRef
    from tasks.core.tokenizer import load_tokenizer
    from tests import runs  # noqa: F401 (imported here, so that children need not)

    load_tokenizer(ModelRef(path=model))

    def reap(pid: int, out: Path) -> None:
        _, status = os.waitpid(pid, 0)
        written = out.with_suffix(".part")
        written.write_text(str(os.waitstatus_to_exitcode(status)))
        written.rename(out.with_suffix(".code"))

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _child(job)
            finally:
                os._exit(code)
        print(pid, flush=True)
        threading.Thread(target=reap, args=(pid, Path(job["out"])), daemon=True).start()


if __name__ == "__main__":
    _main(sys.argv[1])
