"""Hold a command on a leash: when the process that started it is gone, so is the command.

    python -m tasks.serving.launch.leash [--grace SECONDS] [--parent PID] -- CMD...      (or by this file's path)

The leash runs CMD in a session of its own and waits. It ends CMD, SIGTERM first and SIGKILL after the
grace time, on SIGTERM, SIGINT, SIGHUP or SIGQUIT, or when its stdin pipe reaches its end: the kernel closes the
pipe however the parent died, kill -9 included. Everything CMD started ends with it, also what went into
a session of its own. The leash exits with CMD's exit code when CMD ends by itself.

Only the standard library and psutil: the file is run by path, in environments without this project.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

GRACE_S = 10.0
_POLL_S = 0.2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STOPPED = 128 + signal.SIGTERM  # the exit code when the leash itself ended the command


class LeashedProcess:
    """A command on a leash, held as long as this object and this process live.

    `pid` is the leash's: its tree holds the command and all that the command started.
    """

    def __init__(self, leash: subprocess.Popen[bytes]) -> None:
        self._leash = leash
        self.pid: int = leash.pid

    def poll(self) -> int | None:
        """The command's exit code, or None while it runs."""
        return self._leash.poll()

    def stop(self, grace_s: float = GRACE_S) -> int:
        """End the command (SIGTERM, after `grace_s` seconds SIGKILL) and return the leash's exit code."""
        pipe = self._leash.stdin
        if pipe is not None and not pipe.closed:
            try:
                pipe.write(f"{grace_s}\n".encode())  # the pipe's last word is the grace time
                pipe.close()
            except BrokenPipeError:  # the leash is gone already
                pass
        try:
            return self._leash.wait(grace_s + 5)
        except subprocess.TimeoutExpired:
            end_tree(psutil.Process(self.pid), 0)
            return self._leash.wait()


def start_leashed(cmd: Sequence[str], *, env: dict[str, str], log_path: Path, cwd: Path | None = None,
                  grace_s: float = GRACE_S) -> LeashedProcess:
    """Start `cmd` so that it ends with this process, its output appended to `log_path`.

    `env` is the command's whole environment. The caller keeps the returned object: letting go of it
    closes the pipe, which ends the command.
    """
    # -E -P: the command's PYTHONPATH and this folder are not for the leash
    leash = [sys.executable, "-E", "-P", str(Path(__file__).resolve()),
             "--grace", str(grace_s), "--parent", str(os.getpid()), "--", *cmd]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(leash, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env,
                                   cwd=cwd, start_new_session=True, bufsize=0)
    return LeashedProcess(process)


def end_tree(root: psutil.Process, grace_s: float) -> None:
    """End `root` and all its descendants: SIGTERM, and SIGKILL to those left after `grace_s` seconds.

    psutil compares each process's creation time before it signals, so a reused pid is never hit.
    """
    processes = _tree(root)
    for process in processes if grace_s > 0 else []:
        _signal(process, signal.SIGTERM)
    psutil.wait_procs(processes, timeout=grace_s)
    _kill(processes)


def _kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to those alive and to children they had in the meantime."""
    left = [p for process in processes for p in _tree(process)]
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)] if root.is_running() else []
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _end_descendants(command: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the command, its process group and whatever else descends from this leash."""
    this = psutil.Process()
    processes = this.children(recursive=True)
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while processes and time.monotonic() < deadline:
        command.poll()  # reaps it
        _, processes = psutil.wait_procs(this.children(recursive=True), timeout=_POLL_S)
    for _ in range(5):  # a process killed while it forks leaves a child for the next round
        if not (processes := this.children(recursive=True)):
            return
        _kill(processes)


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere orphans and a killed leash are not covered, the rest is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _tie_to(leash: int) -> None:
    """Runs in the child before exec: SIGTERM for the command if the leash itself is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != leash:  # it was, a moment ago
        os._exit(_STOPPED)


def _pipe_message(parent: int) -> bytes | None:
    """What came through the stdin pipe within a poll; b"" means that the parent is gone."""
    if os.getppid() != parent:  # a fork of the parent may still hold the pipe open
        return b""
    readable, _, _ = select.select([0], [], [], _POLL_S)
    return os.read(0, 4096) if readable else None


def _grace_from(message: bytes, default: float) -> float:
    try:
        return float(message)
    except ValueError:
        return default


def hold(cmd: Sequence[str], grace_s: float, parent: int) -> int:
    """Run `cmd` until it ends, the process `parent` is gone or a signal comes. Returns the exit code."""
    asked: list[int] = []
    # SIGQUIT: what SGLang's workers send to their parent when they fail, and that is the leash once their own is gone
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda received, _frame: asked.append(received))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become children of the leash: none is lost
    this = os.getpid()
    command = subprocess.Popen(cmd, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=lambda: _tie_to(this))
    last_word, code = b"", None
    while code is None and not asked:
        message = _pipe_message(parent)
        if message == b"":
            break
        last_word += message or b""
        code = command.poll()
    _end_descendants(command, _grace_from(last_word, grace_s))
    if code is None:
        return _STOPPED
    return code if code >= 0 else 128 - code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run a command that ends when this process's stdin does.")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--parent", type=int, help="pid of who holds the pipe (default: the parent process)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- CMD...")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command after --")
    try:
        return hold(command, options.grace, options.parent or os.getppid())
    except OSError as error:
        print(f"leash: {error}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
