"""Ask an installed SGLang which flags it has; the answer is kept while that SGLang stays as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.serving.launch.flags import Capabilities, LaunchFailed, Option

log = logging.getLogger("winnow.servers")

_FORMAT = 1
# Quick to run: SGLang is found and looked at, not imported.
_IDENTITY = """
import importlib.metadata, importlib.util, pathlib, sys
folder = pathlib.Path(next(iter(importlib.util.find_spec("sglang").submodule_search_locations)))
print(sys.version, folder, importlib.metadata.version("sglang"))
for file in [folder / "srt" / "server_args.py", *sorted((folder / "srt" / "arg_groups").rglob("*.py"))]:
    print(file, file.stat().st_size, file.stat().st_mtime_ns)
"""
_KNOWN: dict[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], Capabilities] = {}
_ONE_AT_A_TIME = threading.Lock()


def probe(start: Sequence[str], env: Mapping[str, str] | None = None, *, cache_dir: Path | None = None,
          timeout_s: float = 180) -> Capabilities:
    """What `start` (an interpreter and what it runs) answers to --help, with `env` beside this process's environment.

    That takes SGLang 10 s, so it is asked once in a process, and once on a machine where `cache_dir` is given. Raises
    LaunchFailed where no flags come out.
    """
    extra = dict(env or {})
    place = (tuple(start), tuple(sorted(extra.items())))
    with _ONE_AT_A_TIME:
        if place not in _KNOWN:
            key = _identity(start, extra) if cache_dir else None
            file = cache_dir / f"sglang-flags-{key}.json" if cache_dir and key else None
            kept = _kept(file) if file else None
            _KNOWN[place] = kept or _asked(start, extra, timeout_s)
            if file and not kept:
                _keep(file, _KNOWN[place])
        return _KNOWN[place]


def _asked(start: Sequence[str], extra: Mapping[str, str], timeout_s: float) -> Capabilities:
    try:
        done = _run([*start, "--help"], extra, timeout_s)
    except OSError as error:
        raise LaunchFailed(f"cannot run {start[0]} ({error.strerror}): check launch.python") from None
    except subprocess.TimeoutExpired:
        raise LaunchFailed(f"{' '.join(start)} --help did not answer within {timeout_s:g} s") from None
    known = Capabilities.parse(done.stdout)
    if done.returncode == 0 and known.options:
        return known
    text = f"{done.stdout}\n{done.stderr}"
    cause = (": its Python has no SGLang; run `make install-sglang`, or name an interpreter that has it "
             "(launch.python)" if "No module named 'sglang'" in text or "No module named sglang" in text else "")
    end = "\n".join(f"  | {line[:300]}" for line in [line for line in text.splitlines() if line.strip()][-15:])
    how = f"ended with code {done.returncode}" if done.returncode else "names no flags"
    raise LaunchFailed(f"{' '.join(start)} --help {how}{cause}\n{end}")


def _run(argv: Sequence[str], extra: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    # Columns and colours come from the environment, and neither is wanted here.
    env = {**os.environ, **extra, "COLUMNS": "100", "PYTHON_COLORS": "0"}
    return subprocess.run(list(argv), env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s,
                          encoding="utf-8", errors="replace", check=False)


# --- the answer on disk ---


def _identity(start: Sequence[str], extra: Mapping[str, str]) -> str | None:
    """A key that changes when this SGLang, or how it is started, does; None where that cannot be told."""
    try:
        done = _run([start[0], "-P", "-c", _IDENTITY], extra, 60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    files = [(word, stat.st_size, stat.st_mtime_ns) for word in start
             if (path := Path(word)).is_file() and (stat := path.stat())]
    said = json.dumps([_FORMAT, list(start), sorted(extra.items()), files, done.stdout])
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _kept(file: Path) -> Capabilities | None:
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        options = tuple(Option(tuple(row["names"]), row["value"], row["choices"] and tuple(row["choices"]))
                        for row in rows)
    except (OSError, ValueError, TypeError, KeyError):  # torn or not ours: ask again
        return None
    return Capabilities(options) if options else None


def _keep(file: Path, known: Capabilities) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps([dataclasses.asdict(option) for option in known.options]))
        partial.replace(file)
    except OSError as error:  # asked again next time
        log.debug("cannot keep SGLang's flags in %s: %s", file, error)
        with contextlib.suppress(OSError):
            partial.unlink()
