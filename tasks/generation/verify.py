"""The grid checked: every (prompt, heuristic, seed) there exactly once, whole, decodable and answered.

Policy `repair` asks for bad cells once more; `drop` leaves a prompt with bad cells out; `keep` keeps it
with holes. Failures stay rows under every policy; what is not `usable` is never labelled or published.
"""

from __future__ import annotations

import collections
import logging
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.context import Context
from tasks.core import schema
from tasks.core.tokenizer import decode
from tasks.generation.candidates import Candidates, Cell, Requester, Row, ask_all, plan, read_candidates, write_seed
from tasks.generation.prompts import read_shard
from tasks.stage import inputs_key, shard_file

log = logging.getLogger("winnow.verify")

# asking again can't help: the same request gets the same answer, or may not be sent again
FINAL = ("empty", "rejected", "poison")
_NAMED = 50


@dataclass(frozen=True)
class Defect:
    """A cell of the grid that is not as it should be."""

    cell: Cell
    kind: str

    def describe(self) -> dict[str, Any]:
        """For the report: which cell and what is wrong."""
        return {"candidate_id": self.cell.candidate_id, "prompt_id": self.cell.prompt["prompt_id"],
                "heuristic": self.cell.heuristic.name, "seed": self.cell.seed, "defect": self.kind}


def check(cells: list[Cell], rows: list[Row], tokenizer: Any, max_new_tokens: int) -> list[Defect]:
    """Every defect of the grid: missing, duplicate, a failure's own status, undecodable, too_long, wrong_cell.

    A pure function of the plan and the rows.
    """
    found: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        found[row["candidate_id"]].append(row)
    return [Defect(c, kind) for c in cells if (kind := _defect(c, found[c.candidate_id], tokenizer, max_new_tokens))]


def _defect(cell: Cell, rows: list[Row], tokenizer: Any, max_new_tokens: int) -> str | None:
    if len(rows) != 1:
        return "duplicate" if rows else "missing"
    row = rows[0]
    if row["status"] != "ok":
        return row["status"]
    wanted = (cell.prompt["prompt_id"], cell.heuristic.id, cell.seed, cell.request_seed)
    if (row["prompt_id"], row["heuristic_id"], row["seed"], row["request_seed"]) != wanted:
        return "wrong_cell"
    if len(row["output_ids"]) > max_new_tokens:
        return "too_long"
    return "undecodable" if decode(tokenizer, row["output_ids"]) != row["text"] else None


class Verified:
    """The stage: `verified/shard-<n>.parquet`, the candidates of all seeds with `usable`."""

    name, unit = "verify", "candidates"

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """One file a shard."""
        return [shard_file("verified", shard)]

    def key(self, ctx: Context, shard: int) -> str:
        """The candidates' bytes and the policy."""
        return inputs_key(ctx.store, "verified", 1, Candidates().outputs(ctx, shard),
                          ctx.config.limits.incomplete_prompts)

    def size(self, ctx: Context, shard: int) -> int:
        """Cells of the grid."""
        return Candidates().size(ctx, shard)

    def run(self, ctx: Context, shard: int) -> None:
        """Check, repair by policy, write."""
        config = ctx.config
        cells = list(plan(ctx, read_shard(ctx.store, shard).to_pylist()))
        rows = read_candidates(ctx, shard).to_pylist()
        limit = config.generation.max_new_tokens
        defects = check(cells, rows, ctx.tokenizer, limit)
        repaired = 0
        mendable = [d for d in defects if d.kind not in FINAL]
        if mendable and config.limits.incomplete_prompts == "repair":
            rows = self._repair(ctx, shard, cells, rows, mendable)
            left = check(cells, rows, ctx.tokenizer, limit)
            repaired, defects = len(defects) - len(left), left
            log.info("shard %d: %d of %d defective cells mended", shard, repaired, repaired + len(left))
        bad = {d.cell.candidate_id for d in defects}
        dropped = sorted({d.cell.prompt["prompt_id"] for d in defects}) if (
            config.limits.incomplete_prompts == "drop") else []
        seen: set[str] = set()
        for row in rows:
            row["usable"] = not (row["candidate_id"] in bad or row["candidate_id"] in seen
                                 or row["prompt_id"] in dropped)
            seen.add(row["candidate_id"])
        kinds = collections.Counter(d.kind for d in defects)
        ctx.store.write_table(
            self.outputs(ctx, shard)[0], schema.table(rows, schema.VERIFIED), self.key(ctx, shard),
            planned=len(cells), usable=sum(r["usable"] for r in rows), defects=dict(kinds), repaired=repaired,
            cells=[d.describe() for d in defects[:_NAMED]], dropped_prompts=dropped,
            tokens=sum(r["completion_tokens"] or 0 for r in rows),
            attempts=sum(r["attempts"] or 0 for r in rows))
        ctx.progress.advance(self.name, len(cells), defects=len(defects), repaired=repaired)

    def _repair(self, ctx: Context, shard: int, cells: list[Cell], rows: list[Row], defects: list[Defect]) -> list[Row]:
        """Ask for the defective cells again and write the seeds' files anew; all rows in plan order."""
        wanted = {d.cell.candidate_id for d in defects}
        kept = {r["candidate_id"]: r for r in rows if r["candidate_id"] not in wanted}
        before = {r["candidate_id"]: r["attempts"] or 0 for r in rows}

        def done(row: Row) -> None:
            row["attempts"] += before.get(row["candidate_id"], 0)
            kept[row["candidate_id"]] = row

        requester = Requester(ctx)
        ctx.loop.run(lambda: ask_all(requester, (d.cell for d in defects), done))
        key = Candidates().key(ctx, shard)
        for seed in sorted({d.cell.seed for d in defects}):
            write_seed(ctx, shard, seed, [kept[c.candidate_id] for c in cells if c.seed == seed], key)
        return [kept[c.candidate_id] for c in cells]


def read_verified(ctx: Context, shard: int, usable: bool = True) -> pa.Table:
    """A shard's verified rows; only the usable ones unless asked otherwise."""
    table = ctx.store.read(shard_file("verified", shard))
    return table.filter(table.column("usable")) if usable else table
