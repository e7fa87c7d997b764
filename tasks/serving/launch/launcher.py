"""Start SGLang servers, wait until they generate, find them again, and stop only what was started here.

Every server leaves a record and a log in the state folder (see `records`). A leashed server ends with the process that
started it, however that dies (see `leash`); the others run on. Whatever was killed and when, what remains of a server
is known by its record: `reap` ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tasks.serving.launch import diagnosis, places, processes, records
from tasks.serving.launch.launch_spec import LaunchFailed, LaunchSpec, command, environment
from tasks.serving.launch.leash import GRACE_S, LeashedProcess, start_leashed
from tasks.serving.launch.places import busy, in_place_of
from tasks.serving.launch.records import ServerRecord, spec_of

__all__ = ["LaunchFailed", "LaunchSpec", "ServerRecord", "busy", "command", "in_place_of", "reap", "running", "spec_of",
           "start", "start_all", "stop", "stop_all"]

log = logging.getLogger("winnow.servers")

OnWait = Callable[[float, str], None]
Command = Callable[[LaunchSpec, int], list[str]]
_Held = LeashedProcess | subprocess.Popen[bytes]
_POLL_S = 0.25
_PORT_ATTEMPTS = 3
_SETTLED_S = 5.0  # a process that was being started when its starter was killed carries its mark by then
# What this process holds, by record: letting go of a leash ends its server, letting go of a child leaves a zombie.
_HELD: dict[str, _Held] = {}


class _PortTaken(LaunchFailed):
    """Another process listens on the port."""


def start(spec: LaunchSpec, state_dir: Path, *, leashed: bool, on_wait: OnWait | None = None,
          build: Command = command) -> ServerRecord:
    """Start one server and wait until it generates; see `start_all`."""
    return start_all([spec], state_dir, leashed=leashed, on_wait=on_wait, build=build)[0]


def start_all(specs: Sequence[LaunchSpec], state_dir: Path, *, leashed: bool, on_wait: OnWait | None = None,
              build: Command = command) -> list[ServerRecord]:
    """Start all servers, then wait for all; if one fails, all of them are stopped.

    `on_wait(seconds, last line of the log)` is called while waiting. Raises LaunchFailed, before anything starts if
    another run's server holds a GPU that one of these wants.
    """
    places.refuse_held(specs, state_dir)
    started: dict[int, ServerRecord] = {}
    try:
        ports = _ports(specs)
        commands = [build(spec, port) for spec, port in zip(specs, ports, strict=True)]  # all, before any starts
        for n, (spec, port, argv) in enumerate(zip(specs, ports, commands, strict=True)):
            started[n] = _spawn(spec, port, argv, state_dir, leashed)
        for n, spec in enumerate(specs):
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                try:
                    started[n] = _await(spec, started[n], on_wait)
                    break
                except _PortTaken as error:  # somebody took it between our look and the server's start
                    stop(started.pop(n))
                    if spec.port or attempt == _PORT_ATTEMPTS:
                        raise LaunchFailed(str(error)) from None
                    port = _ports([spec])[0]
                    started[n] = _spawn(spec, port, build(spec, port), state_dir, leashed)
    except BaseException:
        stop_all(started.values())
        raise
    return [started[n] for n in range(len(specs))]


def running(state_dir: Path) -> list[ServerRecord]:
    """Our servers of which anything lives, those of other runs too."""
    kept = records.kept(state_dir)
    alive = records.living(kept)
    return [r for r in kept if alive.get(r.id)]


def reap(state_dir: Path, grace_s: float = GRACE_S) -> list[ServerRecord]:
    """End orphans, and forget servers of which nothing lives; the orphans that it ended.

    An orphan's owner is gone, and it is one that should have ended with it (leashed), that was never seen to generate
    (its owner was killed while it waited), or whose root has died. A server whose owner lives is never touched.
    """
    kept = records.kept(state_dir)
    alive = records.living(kept)
    orphans = []
    for record in kept:
        if alive.get(record.id):
            if not record.owned and (record.leashed or not record.ready or record.root is None):
                orphans.append(record)
        elif record.processes or (not record.owned and record.age_s > _SETTLED_S):
            records.remove(record)
    stop_all(orphans, grace_s)
    return orphans


def stop(record: ServerRecord, grace_s: float = GRACE_S) -> bool:
    """End all that the record identifies and all that this started, then forget it. False if nothing of it lived.

    SIGTERM first, SIGKILL to what is left after `grace_s` seconds.
    """
    held = _HELD.pop(record.id, None)
    lived = bool(_living(record))
    if isinstance(held, LeashedProcess) and held.poll() is None:
        held.stop(grace_s)
    left = processes.end(lambda: _living(record), grace_s)
    if held is not None:
        held.poll()
    if left:
        log.warning("the %s server at %s can't be ended: processes %s still run", record.role, record.url,
                    ", ".join(str(p.pid) for p in left))
    else:
        records.remove(record)
    return lived


def stop_all(servers: Iterable[ServerRecord], grace_s: float = GRACE_S) -> None:
    """Stop servers at once: each takes seconds to end in order."""
    if servers := list(servers):
        with ThreadPoolExecutor(len(servers)) as stopping:
            list(stopping.map(lambda server: stop(server, grace_s), servers))


# --- the parts ---

def _living(record: ServerRecord) -> list[psutil.Process]:
    return records.living([record]).get(record.id, [])


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


def _spawn(spec: LaunchSpec, port: int, argv: list[str], state_dir: Path, leashed: bool) -> ServerRecord:
    """Start a server. Its record is there before it is: see `reap`."""
    now, mark = datetime.now(UTC), secrets.token_hex(8)
    state_dir = state_dir.resolve()
    record = ServerRecord(
        id=mark, role=spec.role, url=f"http://{f'[{spec.host}]' if ':' in spec.host else spec.host}:{port}", port=port,
        machine=processes.here(), boot=processes.boot(), owner=processes.identify(os.getpid()), leashed=leashed,
        ready=False, processes=(), devices=places.devices(spec), command=argv, spec=records.spec_dump(spec),
        spec_digest=spec.digest, log=str(state_dir / f"{spec.role}-{port}-{now:%Y%m%dT%H%M%S}-{mark[:6]}.log"),
        started_at=now.isoformat(timespec="seconds"))
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        records.write(record)
        held = _HELD[mark] = _run(argv, os.environ | environment(spec) | processes.marked(mark), record)
        record = dataclasses.replace(record, processes=(processes.identify(held.pid),))
        records.write(record)
        return record
    except BaseException as error:
        stop(record)
        if isinstance(error, OSError):
            raise LaunchFailed(f"the {spec.role} server can't be started: {error}; check launch.python, and the space "
                               f"and rights of {state_dir}") from error
        raise


def _run(argv: list[str], env: dict[str, str], record: ServerRecord) -> _Held:
    path = Path(record.log)
    if record.leashed:
        return start_leashed(argv, env=env, log_path=path, cwd=path.parent)
    with path.open("ab") as output:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                                cwd=path.parent, start_new_session=True)


def _await(spec: LaunchSpec, record: ServerRecord, on_wait: OnWait | None) -> ServerRecord:
    """Return when the server generates tokens. Raises LaunchFailed when it ends or the deadline passes."""
    began = time.monotonic()
    held = _HELD[record.id]
    while True:
        elapsed = time.monotonic() - began
        record = _seen(record)
        if (code := held.poll()) is not None:
            raise _failed(f"the {spec.role} server ended with code {code} before it was ready", spec, record, code)
        if elapsed > spec.ready_timeout_s:
            raise _failed(f"the {spec.role} server was not ready after {spec.ready_timeout_s:g} s", spec, record)
        if on_wait:
            on_wait(elapsed, (diagnosis.last_lines(Path(record.log), 1) or [""])[0])
        left = max(1.0, spec.ready_timeout_s - elapsed)
        if places.get(record.url + "/health_generate", min(30.0, left)) is not None:
            if not _listens(record):
                raise _PortTaken(f"the {spec.role} server was not started: another process answers at {record.url}")
            if _warmed_up(spec, record, left):
                return _seen(record, ready=True)
        time.sleep(_POLL_S)


def _seen(record: ServerRecord, **changes: bool) -> ServerRecord:
    """The record with the processes that live now, kept on disk if that says something new."""
    now = dataclasses.replace(record, processes=records.seen(record), **changes)
    if now != record:
        try:
            records.write(now)
        except OSError as error:  # what is on disk is enough to find the server again
            log.warning("the record %s can't be written: %s", record.path, error)
    return now


def _listens(record: ServerRecord) -> bool:
    """Whether it is this server that has the port: another's, started at the same moment, may answer there."""
    for identity in records.seen(record):
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                sockets = psutil.Process(identity.pid).net_connections("tcp")
            except psutil.AccessDenied:
                return True  # not for us to know
            if any(s.status == psutil.CONN_LISTEN and s.laddr and s.laddr.port == record.port for s in sockets):
                return True
    return False


def _warmed_up(spec: LaunchSpec, record: ServerRecord, timeout_s: float) -> bool:
    """One sampled token, as the requests to come want it: what SGLang compiles at first use is compiled here."""
    if spec.embeds:
        return True
    body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "sampling_seed": 0}}
    # it answers: what it thinks of the request is its own matter, unless it is still starting
    return places.post(record.url + "/generate", body, timeout_s) not in (None, 503)


def _failed(what: str, spec: LaunchSpec, record: ServerRecord, code: int | None = None) -> LaunchFailed:
    path = Path(record.log)
    draft = spec.speculation.get("draft_model")
    cause = diagnosis.cause(diagnosis.read_end(path), code, str(draft) if draft else None)
    kind = _PortTaken if cause == diagnosis.PORT_TAKEN else LaunchFailed
    end = "\n".join(f"  | {line}" for line in diagnosis.last_lines(path, 15))
    return kind(f"{what}{f': {cause}' if cause else ''}\n{end}\n  log: {record.log}")
