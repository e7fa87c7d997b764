"""Start SGLang servers, wait until they answer, find them again, and stop only what was started here.

Every server leaves a record (`<state_dir>/<role>-<port>.json`) and a log beside it. A leashed server ends with the
process that started it, however that dies (see `leash`); the others run on and are found again by their record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tasks.serving.launch_spec import LaunchFailed, LaunchSpec, command, environment, interpreter
from tasks.serving.leash import GRACE_S, LeashedProcess, end_tree, start_leashed

__all__ = ["LaunchFailed", "LaunchSpec", "ServerRecord", "command", "environment", "find_reusable", "interpreter",
           "running", "start", "start_all", "stop"]

OnWait = Callable[[float, str], None]
Command = Callable[[LaunchSpec, int], list[str]]
_POLL_S = 0.25
_PORT_ATTEMPTS = 3
# What this process holds: letting go of a leash ends its server, letting go of a child leaves a zombie.
_HELD: dict[int, LeashedProcess | subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class ServerRecord:
    """A server that was started here, as kept on disk. `pid` is the root of its process tree."""

    role: str
    url: str
    pid: int
    create_time: float
    command: list[str]
    spec_digest: str
    spec: dict[str, Any]
    log: str
    started_at: str
    leashed: bool


def start(spec: LaunchSpec, state_dir: Path, *, leashed: bool, on_wait: OnWait | None = None,
          build: Command = command) -> ServerRecord:
    """Start one server and wait until it generates; see `start_all`."""
    return start_all([spec], state_dir, leashed=leashed, on_wait=on_wait, build=build)[0]


def start_all(specs: Sequence[LaunchSpec], state_dir: Path, *, leashed: bool, on_wait: OnWait | None = None,
              build: Command = command) -> list[ServerRecord]:
    """Start all servers, then wait for all; if one fails, all of them are stopped.

    `on_wait(seconds, last line of the log)` is called while waiting. Raises LaunchFailed.
    """
    started: dict[int, ServerRecord] = {}
    try:
        for n, (spec, port) in enumerate(zip(specs, _ports(specs), strict=True)):
            started[n] = _spawn(spec, port, state_dir, leashed, build)
        for n, spec in enumerate(specs):
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                try:
                    _await(spec, started[n], on_wait)
                    break
                except _PortTaken as error:  # somebody took it between our look and the server's start
                    stop(started.pop(n))
                    if spec.port or attempt == _PORT_ATTEMPTS:
                        raise LaunchFailed(str(error)) from None
                    started[n] = _spawn(spec, _ports([spec])[0], state_dir, leashed, build)
    except BaseException:
        for record in started.values():
            stop(record)
        raise
    return [started[n] for n in range(len(specs))]


def running(state_dir: Path) -> list[ServerRecord]:
    """The records whose process lives and is the one that was started (pid and creation time)."""
    return [r for r in map(_read, sorted(state_dir.glob("*.json"))) if r is not None and _process(r) is not None]


def find_reusable(spec: LaunchSpec, state_dir: Path, taken: Collection[str] = ()) -> ServerRecord | None:
    """A running server that was started for the same settings, answers, outlives whoever started it, and is none of
    the URLs `taken` (two equal specs ask for two servers)."""
    for record in running(state_dir):
        if record.url in taken:
            continue
        if record.leashed:
            continue  # another run's: it ends with that run
        same_place = spec.port is None or record.url.endswith(f":{spec.port}")
        if record.spec_digest == spec.digest and same_place and _get(record.url + "/model_info", 5) is not None:
            return record
    return None


def stop(record: ServerRecord, grace_s: float = GRACE_S) -> bool:
    """End what the record identifies, its whole process tree, and remove the record. False if it was gone."""
    process, held = _process(record), _HELD.pop(record.pid, None)
    if process is not None:
        if isinstance(held, LeashedProcess):
            held.stop(grace_s)
        end_tree(process, grace_s)
    if held is not None:
        held.poll()
    path = Path(record.log).parent / _name(record.role, record.url)
    if (kept := _read(path)) and (kept.pid, kept.create_time) == (record.pid, record.create_time):
        path.unlink(missing_ok=True)
    return process is not None


# --- the parts ---

def _ports(specs: Sequence[LaunchSpec]) -> list[int]:
    """A port for each server, all different, none taken at this moment."""
    with contextlib.ExitStack() as held:
        out = []
        for spec in specs:
            probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in spec.host else socket.AF_INET))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((spec.host, spec.port or 0))
            except OSError as error:
                raise LaunchFailed(f"launch.port: cannot listen on {spec.host}:{spec.port} ({error.strerror}); choose "
                                   "another, or leave it out for a free one") from None
            out.append(probe.getsockname()[1])
        return out


def _spawn(spec: LaunchSpec, port: int, state_dir: Path, leashed: bool, build: Command) -> ServerRecord:
    argv, env = build(spec, port), os.environ | environment(spec)
    now = datetime.now(UTC)
    state_dir = state_dir.resolve()
    state_dir.mkdir(parents=True, exist_ok=True)
    log_path = state_dir / f"{spec.role}-{port}-{now:%Y%m%dT%H%M%S}.log"
    if leashed:
        held = start_leashed(argv, env=env, log_path=log_path, cwd=state_dir)
    else:
        with log_path.open("ab") as output:
            held = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                                    cwd=state_dir, start_new_session=True)
    _HELD[held.pid] = held
    record = ServerRecord(
        role=spec.role, url=f"http://{f'[{spec.host}]' if ':' in spec.host else spec.host}:{port}", pid=held.pid,
        create_time=psutil.Process(held.pid).create_time(), command=argv, spec_digest=spec.digest,
        spec=dataclasses.asdict(spec), log=str(log_path), started_at=now.isoformat(timespec="seconds"),
        leashed=leashed)
    path = state_dir / _name(record.role, record.url)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(record), indent=1))
    partial.replace(path)
    return record


def _name(role: str, url: str) -> str:
    return f"{role}-{url.rpartition(':')[2]}.json"


def _read(path: Path) -> ServerRecord | None:
    try:
        return ServerRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # torn, foreign or from another version: not ours to act on
        return None


def _process(record: ServerRecord) -> psutil.Process | None:
    """The record's process, or None if it ended or its pid belongs to another process now."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.create_time) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _await(spec: LaunchSpec, record: ServerRecord, on_wait: OnWait | None) -> None:
    """Return when the server generates tokens. Raises LaunchFailed when it ends or the deadline passes."""
    began = time.monotonic()
    held = _HELD[record.pid]
    ready = warm = False
    while not warm:
        elapsed = time.monotonic() - began
        if (code := held.poll()) is not None:
            raise _diagnosed(f"the {spec.role} server ended with code {code} before it was ready", record)
        if elapsed > spec.ready_timeout_s:
            raise _diagnosed(f"the {spec.role} server was not ready after {spec.ready_timeout_s:g} s", record)
        if on_wait:
            on_wait(elapsed, (_tail(record, 1) or [""])[0])
        left = max(1.0, spec.ready_timeout_s - elapsed)
        ready = ready or _get(record.url + "/health_generate", min(30.0, left)) is not None
        warm = ready and _warmed_up(spec, record, left)
        if not warm:
            time.sleep(_POLL_S)


def _warmed_up(spec: LaunchSpec, record: ServerRecord, timeout_s: float) -> bool:
    """One sampled token, as the requests to come want it: what SGLang compiles at first use is compiled here."""
    if spec.embeds:
        return True
    body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "sampling_seed": 0}}
    request = urllib.request.Request(record.url + "/generate", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            return response.status == 200
    except urllib.error.HTTPError as error:
        return error.code != 503  # it answers; what it thinks of the request is its own matter
    except (OSError, ValueError):
        return False


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is not for our own servers


def _get(url: str, timeout_s: float) -> bytes | None:
    try:
        with _OPENER.open(url, timeout=timeout_s) as response:
            return response.read() if response.status == 200 else None
    except (OSError, ValueError):
        return None


# --- saying what went wrong ---

_CAUSES = (
    (r"address already in use|port \d+ is (already|not available)", "its port is taken"),
    (r"out of memory|OutOfMemoryError|Not enough memory|Cannot allocate memory",
     "out of memory: lower launch.mem_fraction, use a smaller model or free the device"),
    (r"gated repo|401 Client Error|Unauthorized", "the model needs an access token: set HF_TOKEN"),
    (r"is not a valid model identifier|Repository Not Found|does not appear to have a file named|"
     r"is not a local folder|couldn't connect to .*huggingface|OfflineModeIsEnabled|LocalEntryNotFound",
     "no such model: check launch.model (a folder, or an id that this machine can download)"),
    (r"No module named '?sglang", "its Python has no SGLang: check launch.python"),
    (r"unrecognized arguments|invalid choice|expected one argument|ambiguous option",
     "SGLang does not know a flag: check launch.flags"),
    (r"No CUDA GPUs are available|no NVIDIA driver|libcuda\.so|invalid device ordinal|No accelerator",
     "no usable GPU: check launch.gpus and the driver, or set launch.device: cpu"),
    (r"No module named '?([\w.]+)", "a package is missing in the server's environment"),
)


class _PortTaken(LaunchFailed):
    """Another process listens on the port."""


def _diagnosed(what: str, record: ServerRecord) -> LaunchFailed:
    text = _text(record)
    cause = next((cause for pattern, cause in _CAUSES if re.search(pattern, text, re.IGNORECASE)), None)
    kind = _PortTaken if cause == "its port is taken" else LaunchFailed
    end = "\n".join(f"  | {line}" for line in _tail(record, 15))
    return kind(f"{what}{f': {cause}' if cause else ''}\n{end}\n  log: {record.log}")


def _text(record: ServerRecord) -> str:
    """The end of the log, without the line that repeats all 500 settings."""
    try:
        with Path(record.log).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 200_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if "server_args=" not in line)


def _tail(record: ServerRecord, lines: int) -> list[str]:
    return [line[:300] for line in _text(record).splitlines() if line.strip()][-lines:]
