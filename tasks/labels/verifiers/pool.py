"""Verify many texts in worker processes, each text under a hard time limit.

A worker is a fresh interpreter with a socket (no fork: threads and torch in this process do not matter,
and any thread may use the pool). A text that hangs or crashes its worker costs one verdict without a score
and one new process; every other verdict stands, in the order of the jobs.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from tasks.labels.verifiers import frames
from tasks.labels.verifiers.base import Verdict

logger = logging.getLogger(__name__)

Job = tuple[str, str, str]
"""(kind, text, ground truth)"""

_COMMAND = (sys.executable, "-m", "tasks.labels.verifiers.worker")
_ROOT = Path(__file__).resolve().parents[3]
# A start is an interpreter, a first job the import of its libraries: seconds on a busy machine, not minutes.
_START_LIMIT_S = 120.0


class WorkerStartError(RuntimeError):
    """A worker ended before it could take a job: the environment is broken, not a text."""


class VerifierPool:
    """Worker processes that verify texts.

    workers: processes at most; they start when there is a job for them and stay for later runs.
    time_limit_s: wall-clock seconds one text may take, imports not counted.
    command: how a worker is started; it speaks as `worker.py` describes.
    """

    def __init__(self, workers: int, time_limit_s: float, *, command: Sequence[str] = _COMMAND) -> None:
        if workers < 1 or not time_limit_s > 0:
            raise ValueError(f"workers must be at least 1 and time_limit_s above 0, not {workers} and {time_limit_s}")
        self._workers = workers
        self._time_limit_s = time_limit_s
        self._command = tuple(command)
        self._closed = False
        self._live: set[_Worker] = set()
        self._lock = threading.Lock()
        # One entry a process: an idle worker, or None where one has yet to be started.
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._slots.put(None)

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verify all jobs and return their verdicts in order; several threads may run at once.

        Only the jobs in hand are serialised, one a worker. Raises WorkerStartError when no worker can be
        started, RuntimeError when the pool is closed.
        """
        verdicts: list[Verdict] = [Verdict(None, None, "error: not verified")] * len(jobs)
        positions = iter(range(len(jobs)))
        taking = threading.Lock()
        failed = threading.Event()

        def serve() -> None:
            try:
                while not failed.is_set():
                    with taking:
                        position = next(positions, None)
                    if position is None:
                        return
                    verdicts[position] = self._verify(jobs[position])
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(max_workers=self._workers, thread_name_prefix="verifier-pool") as threads:
            serving = [threads.submit(serve) for _ in range(min(self._workers, len(jobs)))]
            try:
                for future in serving:
                    future.result()
            finally:
                failed.set()
        return verdicts

    def close(self) -> None:
        """Kill the workers. A run in progress raises RuntimeError."""
        with self._lock:
            self._closed = True
            live, self._live = self._live, set()
        for worker in live:
            worker.kill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _verify(self, job: Job) -> Verdict:
        worker = self._slots.get()
        try:
            if worker is None or not worker.alive:
                worker = self._start()
            verdict = worker.verify(job, self._time_limit_s)
            if not worker.alive:
                with self._lock:
                    self._live.discard(worker)
                    if self._closed:
                        raise RuntimeError("the verifier pool was closed")
                logger.warning("verifier %s: %s; its worker is replaced", job[0], verdict.reason)
            return verdict
        finally:
            self._slots.put(worker if worker is not None and worker.alive else None)

    def _start(self) -> _Worker:
        worker = _Worker(self._command)
        with self._lock:
            if not self._closed:
                self._live.add(worker)
                return worker
        worker.kill()
        raise RuntimeError("the verifier pool is closed")


class _Worker:
    """One worker process and the socket to it; used by one thread at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=_environment()
            )
        self.alive = True
        self._connection.settimeout(_START_LIMIT_S)
        try:
            frames.receive(self._connection)
        except (EOFError, OSError):
            self.kill()
            raise WorkerStartError(
                f"a verifier worker ended at once ({_ending(self._process.returncode)}); run "
                f"`{' '.join(command)} < /dev/null` to see why"
            ) from None

    def verify(self, job: Job, time_limit_s: float) -> Verdict:
        """The verdict on one job; when it hangs or crashes the process, one without a score, and not `alive`."""
        kind, text, ground_truth = job
        message = {"kind": kind, "text": text, "ground_truth": ground_truth, "time_limit_s": time_limit_s}
        try:
            self._connection.settimeout(_START_LIMIT_S)
            frames.send(self._connection, message)
            reply = frames.receive(self._connection)
            if "started" in reply:
                self._connection.settimeout(time_limit_s)
                reply = frames.receive(self._connection)
            return Verdict(**reply)
        except TimeoutError:
            self.kill()
            return Verdict(None, None, "timeout")
        except (EOFError, OSError):
            ending = self._await_ending()
            self.kill()
            return Verdict(None, None, f"crashed: {ending}")
        except BaseException:
            self.kill()  # a message was cut short: nothing on this socket can be trusted any more
            raise

    def kill(self) -> None:
        """End the process, whatever it is doing, and reap it."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _await_ending(self) -> str:
        try:
            return _ending(self._process.wait(timeout=5.0))
        except subprocess.TimeoutExpired:
            return "closed its connection"


def _ending(returncode: int) -> str:
    return f"exit {returncode}" if returncode >= 0 else signal.Signals(-returncode).name


def _environment() -> dict[str, str]:
    """This process's environment, with the repository importable and one thread a worker.

    The hash seed is fixed so that a symbolic comparison takes the same course in every worker.
    """
    path = os.environ.get("PYTHONPATH")
    extra = {"PYTHONPATH": f"{_ROOT}{os.pathsep}{path}" if path else str(_ROOT)}
    return {**os.environ, **extra, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
