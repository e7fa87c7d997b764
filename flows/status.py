"""How far a run is, read from its folder alone."""

from __future__ import annotations

import collections
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows import words
from tasks.context import Context
from tasks.core.store import Manifest
from tasks.generation.candidates import Candidates
from tasks.pipeline import stage, stages_of
from tasks.stage import is_done, shard_file

_FRESH_S = 60.0


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    name: str
    shards_done: int
    shards: int
    rows: int
    seconds: float | None
    """Seconds in which at least one shard was worked on, the last try of each; None before the first."""


def stage_statuses(ctx: Context) -> list[StageStatus]:
    """Every stage in order."""
    out = []
    for name in stages_of(ctx.config):
        made, done = stage(name), 0
        manifests: list[Manifest] = []
        for shard in range(ctx.shards):
            done += is_done(made, ctx, shard)
            found = [ctx.store.manifest(path) for path in made.outputs(ctx, shard)]
            manifests += [m for m in (found if name == Candidates.name else found[:1]) if m]
        spans = [(m.written_at - m.facts["seconds"], m.written_at) for m in manifests if "seconds" in m.facts]
        out.append(StageStatus(name, done, ctx.shards, sum(m.rows or 0 for m in manifests), covered(spans) or None))
    return out


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass(frozen=True)
class CandidateCounts:
    """The requests of a run so far."""

    statuses: dict[str, int]
    """Rows in files by status: `ok` first, then the kinds of failure."""
    tokens: int
    """New tokens in files, where their manifests say."""
    tokens_per_s: float | None
    """Over the time in which those files were made; None where that is not known."""
    journalled: int
    """Answered, their files not written yet."""


def candidate_counts(ctx: Context) -> CandidateCounts:
    """Candidates by status in finished files, and finished requests still in journals."""
    statuses: collections.Counter[str] = collections.Counter()
    tokens = journalled = 0
    spans = []
    for shard in range(ctx.shards):
        manifests = _standing(ctx, shard)
        for m in manifests:
            statuses.update(m.facts.get("statuses") or {})
            if (n := m.facts.get("tokens")) and "seconds" in m.facts:
                tokens += n
                spans.append((m.written_at - m.facts["seconds"], m.written_at))
        if len(manifests) < len(ctx.config.seeds):
            journalled += max(0, journal_lines(ctx, shard) - sum(m.rows or 0 for m in manifests))
    ordered = {"ok": statuses.pop("ok", 0), **{kind: statuses[kind] for kind in words.in_order(statuses)}}
    seconds = covered(spans)
    return CandidateCounts({k: n for k, n in ordered.items() if n}, tokens, tokens / seconds if seconds else None,
                           journalled)


def worker(ctx: Context) -> int | None:
    """The process on this machine that works on the run now, by the run's lock."""
    try:
        owner = ctx.store.lock().path.read_text().split()
    except OSError:
        return None
    pid = int(owner[-1]) if owner and owner[-1].isdigit() else None
    return pid if pid is not None and psutil.pid_exists(pid) else None


def answered(ctx: Context, shard: int) -> int:
    """Requests of a shard that need not be sent again, by its files and its journal."""
    rows = sum(m.rows or 0 for m in _standing(ctx, shard))
    return max(rows, journal_lines(ctx, shard))


def answers_per_s(ctx: Context, over_s: float = 1.5) -> float | None:
    """How fast the journals grow, watched for `over_s` seconds; None where nobody works on the run now."""
    before = [(path, _size(path)) for shard in range(ctx.shards) if _fresh(path := _journal(ctx, shard))]
    if not before:
        return None
    began = time.monotonic()
    time.sleep(over_s)
    lines = sum(_lines(path, start=size) for path, size in before)
    return lines / (time.monotonic() - began) if lines else None


def journal_lines(ctx: Context, shard: int) -> int:
    """Finished requests in a shard's journal: its whole lines, counted and not read."""
    return _lines(_journal(ctx, shard))


def _standing(ctx: Context, shard: int) -> list[Manifest]:
    return [m for path in Candidates().outputs(ctx, shard) if (m := ctx.store.manifest(path))]


def _journal(ctx: Context, shard: int) -> Path:
    return ctx.store.journal(f"candidates/shard-{shard:04d}.jsonl").path


def _lines(path: Path, start: int = 0) -> int:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:  # not begun, or finished a moment ago
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _fresh(path: Path) -> bool:
    """Whether somebody wrote to it within the last seconds."""
    try:
        return time.time() - path.stat().st_mtime < _FRESH_S
    except FileNotFoundError:
        return False


def defects(ctx: Context) -> tuple[collections.Counter[str], list[dict[str, Any]]]:
    """What verification found wrong and could not mend: counts by kind, and the first cells."""
    kinds: collections.Counter[str] = collections.Counter()
    cells: list[dict[str, Any]] = []
    for shard in range(ctx.shards):
        manifest = ctx.store.manifest(shard_file("verified", shard))
        if manifest:
            kinds.update(manifest.facts.get("defects") or {})
            cells += manifest.facts.get("cells") or []
    return kinds, cells
