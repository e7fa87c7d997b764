"""How far a run is, read from its folder alone."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

from tasks.context import Context
from tasks.core.store import Manifest
from tasks.generation.candidates import Candidates
from tasks.pipeline import stage, stages_of
from tasks.stage import is_done, shard_file


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


def candidate_counts(ctx: Context) -> tuple[collections.Counter[str], int]:
    """Candidates by status in finished files, and finished requests still in journals."""
    statuses: collections.Counter[str] = collections.Counter()
    journalled = 0
    for shard in range(ctx.shards):
        for seed in ctx.config.seeds:
            manifest = ctx.store.manifest(Candidates().path(seed, shard))
            if manifest:
                statuses.update(manifest.facts["statuses"])
            else:
                journal = ctx.store.journal(f"candidates/seed={seed}/shard-{shard:04d}.jsonl")
                journalled += sum(1 for _ in journal)
    return statuses, journalled


def defects(ctx: Context) -> tuple[collections.Counter[str], list[dict[str, Any]]]:
    """What verification found wrong and could not mend: counts by kind, and the first cells."""
    kinds: collections.Counter[str] = collections.Counter()
    cells: list[dict[str, Any]] = []
    for shard in range(ctx.shards):
        manifest = ctx.store.manifest(shard_file("verified", shard))
        if manifest:
            kinds.update(manifest.facts["defects"])
            cells += manifest.facts["cells"]
    return kinds, cells
