"""A stand-in server, started as SGLang is: a small HTTP server in a process of its own, with a worker in a session of
its own. And who starts it, in a process that can be killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tasks.serving.launch import launcher, places, processes, records
from tasks.serving.launch.launcher import LaunchSpec, ServerRecord

ROOT = Path(launcher.__file__).resolve().parents[3]
FAKE = '''
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
options = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[1:])
mode, port = options["model-path"].rpartition("/")[2], int(options["port"])
print("server_args=" + "x" * 1000, flush=True)
if mode == "oom":
    print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", flush=True); sys.exit(1)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "late":
    time.sleep(600)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, lambda *a: print("asked to end", flush=True))
began = time.monotonic()

class Handler(BaseHTTPRequestHandler):
    def answer(self, code, body=b"{}"):
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        loading = mode == "never" or time.monotonic() - began < 0.3
        self.answer(503 if loading else 200)
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        print("asked", asked.decode(), flush=True)
        self.answer(200)
    def log_message(self, *a): pass
server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
subprocess.Popen(["sleep", "600"], start_new_session=True)  # a worker, as SGLang has
print("loading weights", flush=True)
server.serve_forever()
'''
STARTER = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
from tests.serving.launch import stand_in
from tasks.serving.launch import launcher
state, mode, leashed, killed, port = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4], sys.argv[5]
run, ports = launcher._run, launcher._ports
def stop_there(*args):
    held = run(*args) if killed == "after the start" else None
    while held and killed == "after the start" and not launcher._living(args[-1]):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
if killed != "no":
    launcher._run = stop_there
if port != "None":
    def first(specs):
        launcher._ports = ports
        return [int(port)]
    launcher._ports = first
record = launcher.start(stand_in.spec(mode), state, leashed=leashed, build=stand_in.builder(state.parent))
print(record.url, flush=True)
if sys.argv[6] == "stay":
    time.sleep(600)
"""


def spec(mode: str = "good", **changes: object) -> LaunchSpec:
    """A spec for the stand-in; `mode` is how it behaves: good, oom, killed, never, late or stubborn."""
    return dataclasses.replace(LaunchSpec(model=mode, device="cpu", ready_timeout_s=20), **changes)  # type: ignore


def builder(folder: Path) -> launcher.Command:
    """What starts the stand-in, kept in `folder`."""
    script = folder / "fake.py"
    if not script.exists():
        script.write_text(FAKE)
    return lambda spec, port: [sys.executable, "-S", "-E", str(script), f"--model-path={spec.model}", f"--port={port}"]


def starter(state: Path, mode: str = "good", *, leashed: bool, killed: str = "no", port: int | None = None,
            stay: bool = True) -> subprocess.Popen[str]:
    """A process that starts the stand-in, prints its url and stays (or not). `killed`: kills itself "before the start"
    or "after the start" of the server, when the record says nothing of its process yet. `port`: what it takes for a
    free port at first."""
    builder(state.parent)
    words = [str(state), mode, str(leashed), killed, str(port), "stay" if stay else "go"]
    return subprocess.Popen([sys.executable, "-c", STARTER, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree(record: ServerRecord) -> list[int]:
    """The ids of all that lives of a server."""
    alive = records.living([record])[record.id]
    return sorted({q.pid for p in alive for q in [p, *p.children(recursive=True)]})


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def kill(*pids: int) -> None:
    """kill -9, all at once."""
    for pid in pids:  # stopped first: none sees another die
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def kept_record(folder: Path, asked: LaunchSpec, *, root: int, port: int = 31000, leashed: bool = False,
                owner: int | None = None, **fields: Any) -> ServerRecord:
    """A record, kept, of a server whose root is the process `root`; without `owner` it is this process's."""
    mark = f"{port:016x}"
    record = ServerRecord(
        id=mark, role=asked.role, url=f"http://127.0.0.1:{port}", port=port, machine=processes.here(),
        boot=processes.boot(), owner=processes.identify(owner or os.getpid()), leashed=leashed, ready=True,
        processes=(processes.identify(root),), devices=places.devices(asked), command=["x"],
        spec=records.spec_dump(asked), spec_digest=asked.digest, log=str(folder / f"{asked.role}-{port}-{mark}.log"),
        started_at="2026-01-01T00:00:00+00:00")
    record = dataclasses.replace(record, **fields)
    records.write(record)
    return record
