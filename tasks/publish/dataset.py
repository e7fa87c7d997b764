"""The published dataset: the kept candidates with their prompts and labels, split by prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from tasks.context import Context
from tasks.core import schema
from tasks.core.identity import digest
from tasks.generation.prompts import read_shard
from tasks.labels import labellers
from tasks.stage import inputs_key, shard_file

FOLDER = "dataset"


def split_prompts(prompt_ids: set[str], share: float, run_seed: int) -> set[str]:
    """The prompts of the validation split: the share (rounded up, never all) with the lowest digests."""
    count = min(math.ceil(share * len(prompt_ids)), len(prompt_ids) - 1)
    return set(sorted(prompt_ids, key=lambda p: digest("split", run_seed, p))[:max(0, count)])


def write_dataset(ctx: Context) -> dict[str, int]:
    """Write `dataset/{train,validation}.parquet`, a row group a shard; rows per split.

    A split without rows is not written (and one from an earlier config is removed).
    """
    scores = [shard_file("scores", n) for n in range(ctx.shards)]
    config = ctx.config
    key = inputs_key(ctx.store, "dataset", 1, scores, config.dataset.validation, config.run_seed)
    kept = set()
    for path in scores:
        table = ctx.store.read(path, ["prompt_id", "kept"])
        kept |= set(table.filter(table.column("kept")).column("prompt_id").to_pylist())
    validation = split_prompts(kept, config.dataset.validation, config.run_seed)
    signatures: dict[str, str] = {}
    for labeller in labellers(config.labels):
        signatures |= labeller.signatures(ctx)
    columns = schema.with_signatures(schema.DATASET, signatures)
    counts = {}
    for split, prompts in {"train": kept - validation, "validation": validation}.items():
        path = f"{FOLDER}/{split}.parquet"
        if not prompts:
            ctx.store.remove(path)
        elif ctx.store.state(path, key) != "done":
            ctx.store.write_batches(path, _tables(ctx, prompts, columns), columns, key)
        manifest = ctx.store.manifest(path)
        counts[split] = (manifest.rows or 0) if manifest else 0
    return counts


def _tables(ctx: Context, prompts: set[str], columns: pa.Schema) -> Iterator[pa.Table]:
    for shard in range(ctx.shards):
        rows = [row for row in kept_rows(ctx, shard) if row["prompt_id"] in prompts]
        if rows:
            yield schema.table(rows, columns)


def kept_rows(ctx: Context, shard: int) -> Iterator[dict[str, Any]]:
    """The dataset rows (schema DATASET) of one shard, in the candidates' order."""
    scores = ctx.store.read(shard_file("scores", shard))
    parts = {row["candidate_id"]: row for row in scores.filter(scores.column("kept")).to_pylist()}
    for labeller in labellers(ctx.config.labels):
        labels = ctx.store.read(labeller.path(shard))
        for row in labels.to_pylist():
            if row["candidate_id"] in parts:
                parts[row["candidate_id"]] |= row
    prompts = {p["prompt_id"]: p for p in read_shard(ctx.store, shard).to_pylist()}
    heuristics = {h.id: h for h in ctx.heuristics}
    wanted = set(schema.DATASET.names)
    candidates = ctx.store.read(shard_file("verified", shard))
    kept = pa.array([c in parts for c in candidates.column("candidate_id").to_pylist()])
    for candidate in candidates.filter(kept).to_pylist():
        heuristic = heuristics[candidate["heuristic_id"]]
        row = prompts[candidate["prompt_id"]] | parts[candidate["candidate_id"]] | candidate | {
            "heuristic": heuristic.name,
            "processors": [{"name": p.name, "value": float(p.value), "min_tokens_to_keep": p.min_tokens_to_keep}
                           for p in heuristic.processors],
        }
        yield {k: v for k, v in row.items() if k in wanted}
