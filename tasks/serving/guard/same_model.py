"""Which model is served: folders, hub ids and places in the hub's cache, held against each other."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tasks.core.config_servers import is_loopback


def is_folder(path: str) -> bool:
    """Whether a model is named by its folder, and not by an id or its place in the hub's cache."""
    if snapshot(path)[1]:
        return False
    with contextlib.suppress(OSError):
        if Path(path).expanduser().is_dir():
            return True
    return path.startswith(("/", ".", "~")) or path.count("/") > 1


def snapshot(path: str) -> tuple[str, str | None]:
    """(id, commit) of a folder in the hub's cache; (the path, None) of anything else."""
    if found := re.search(r"models--([^/]+)/snapshots/([0-9a-f]{40})/?$", path):
        return found[1].replace("--", "/", 1), found[2]
    return path, None


def same_commit(one: str, other: Any) -> bool:
    """Whether two commits are one, the shorter being a beginning of the other."""
    short, full = sorted((one, str(other)), key=len)
    return bool(re.fullmatch(r"[0-9a-f]{7,40}", short)) and full.startswith(short)


def same_model(wanted: str, served: str | None, url: str) -> tuple[bool, bool]:
    """(whether a server serves the model, whether by the last part of its name alone).

    A folder on another machine can't be looked into: there, and where an id meets a folder, the name decides.
    """
    if not served:
        return False, False
    if snapshot(wanted)[0] == snapshot(served)[0]:
        return True, False
    with contextlib.suppress(OSError):
        here, there = Path(wanted).expanduser(), Path(served).expanduser()
        if is_loopback(urlsplit(url).hostname or "") and here.is_dir() and there.is_dir():
            return here.resolve() == there.resolve(), False
    return Path(snapshot(wanted)[0]).name == Path(snapshot(served)[0]).name, True
