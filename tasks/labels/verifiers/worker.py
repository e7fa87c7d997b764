"""The process that verifies: `python -m tasks.labels.verifiers.worker`, its standard input a socket.

It sends `{"ready": true}` once. For every job `{kind, text, ground_truth, time_limit_s}` it sends
`{"started": true}`, when imports are done and the clock runs, and then the fields of the verdict.

It ends when its parent does: at the end of the stream when idle, and by a kernel alarm when it hangs. The
alarm keeps its default action, which ends the process: a regular expression holds the interpreter lock and
would never let a Python handler run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import select
import signal
import socket
from typing import Any

from tasks.labels.verifiers import base, frames

# A symbolic answer can ask for more memory than there is; the job that does so fails alone.
_MEMORY_BYTES = 4 << 30
# The pool kills at the limit; the alarm is for a worker whose pool is gone.
_ALARM_GRACE_S = 2.0
_ORPHAN_CHECK_S = 5.0


def main() -> None:
    """Serve jobs until the stream ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the pool decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # a lower limit stands already, or the system has none
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    parent = os.getppid()
    connection = socket.socket(fileno=os.dup(0))
    with contextlib.suppress(EOFError, ConnectionError):
        frames.send(connection, {"ready": True})
        while _awaits_job(connection, parent):
            frames.send(connection, _answer(connection, frames.receive(connection)))


def _awaits_job(connection: socket.socket, parent: int) -> bool:
    """Wait for a job; False once the parent is gone though a forked sibling of ours keeps the stream open."""
    while not select.select([connection], [], [], _ORPHAN_CHECK_S)[0]:
        if os.getppid() != parent:
            return False
    return True


def _answer(connection: socket.socket, job: dict[str, Any]) -> dict[str, Any]:
    try:
        base.prepare(job["kind"], job["ground_truth"])
        frames.send(connection, {"started": True})
        signal.setitimer(signal.ITIMER_REAL, job["time_limit_s"] + _ALARM_GRACE_S)
        verdict = base.verify(job["kind"], job["text"], job["ground_truth"])
    except (ValueError, ImportError, MemoryError) as error:
        verdict = base.Verdict(None, None, base.describe(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return dataclasses.asdict(verdict)


if __name__ == "__main__":
    main()
