"""Servers that join or leave a run while it goes on: `servers.json` in the run directory.

Written by `winnow servers join` and `leave`, read every few seconds by every process that works on the run, and by
the next one that resumes it.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from typing import Any

from tasks.core.store import Store

PATH = "servers.json"
Address = tuple[str, int | None]


def read(store: Store) -> dict[str, Any]:
    """{role: {join: {url: most in flight or null}, leave: [url]}}; empty where nobody joined or left."""
    try:
        raw = store.read_json(PATH)
    except ValueError:
        return {}  # being written by somebody on a file system that can't rename: the next look will see it
    return raw if isinstance(raw, dict) else {}


def apply(servers: list[Address], raw: dict[str, Any], role: str) -> list[Address]:
    """The servers of a role with those that joined and without those that left."""
    changes = raw.get(role, {})
    out = dict(servers) | dict(changes.get("join", {}))
    return [(url, limit) for url, limit in out.items() if url not in changes.get("leave", [])]


def join(store: Store, roles: list[str], url: str, max_in_flight: int | None) -> None:
    """Let a server join; one that had left comes back."""
    with _changing(store) as raw:
        for role in roles:
            changes = raw.setdefault(role, {"join": {}, "leave": []})
            changes["join"][url] = max_in_flight
            changes["leave"] = [u for u in changes["leave"] if u != url]


def leave(store: Store, roles: list[str], url: str) -> None:
    """Let a server leave once what it has in flight is done."""
    with _changing(store) as raw:
        for role in roles:
            changes = raw.setdefault(role, {"join": {}, "leave": []})
            changes["join"].pop(url, None)
            changes["leave"] = sorted({*changes["leave"], url})


@contextlib.contextmanager
def _changing(store: Store) -> Iterator[dict[str, Any]]:
    """The file's content, written back at the end; of many who join at once on a machine, none is forgotten."""
    with store.lock().path.with_name(".servers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        raw = read(store)
        yield raw
        store.write_json(PATH, raw)
