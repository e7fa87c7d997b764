"""The grid checked: every (prompt, heuristic, seed) there exactly once, whole, decodable and answered.

Policy `repair` asks for bad cells once more; `drop` leaves a prompt with bad cells out; `keep` keeps it
with holes. Failures stay rows under every policy; what is not `usable` is never labelled or published.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.context import Context
from tasks.core import schema
from tasks.generation.answers import Answers, write_seed
from tasks.generation.candidates import Candidates, Requester
from tasks.generation.grid import CHECKED, Cell, Defect, Grid, Row, check
from tasks.stage import inputs_key, shard_file

log = logging.getLogger("winnow.verify")

# asking again can't help: the same request gets the same answer, or may not be sent again
FINAL = ("empty", "rejected", "poison", "truncated", "too_long")
_NAMED = 50


class Verified:
    """The stage: `verified/shard-<n>.parquet`, the candidates of all seeds in plan order, with `usable`.

    A row group is a block of the grid: whole prompts, all heuristics and seeds of each.
    """

    name, unit = "verify", "candidates"

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """One file a shard."""
        return [shard_file("verified", shard)]

    def key(self, ctx: Context, shard: int) -> str:
        """The candidates' bytes and the policy."""
        return inputs_key(ctx.store, "verified", 2, Candidates().outputs(ctx, shard),
                          ctx.config.limits.incomplete_prompts)

    def size(self, ctx: Context, shard: int) -> int:
        """Cells of the grid."""
        return Candidates().size(ctx, shard)

    def run(self, ctx: Context, shard: int) -> None:
        """Check, repair by policy, write."""
        ctx.store.journal(Candidates().journal(shard)).remove()  # the files stand: a kill may have left it
        grid = Grid(ctx, shard)
        repair = ctx.config.limits.incomplete_prompts == "repair"
        again = ctx.store.journal(f"repair/shard-{shard:04d}.jsonl")
        mended = 0
        try:
            if again.path.exists():  # a process was killed while it repaired
                raise _Mendable
            defects = self._write(ctx, grid, shard, mended, stop_at_mendable=repair)
        except _Mendable:
            before = self._check(ctx, grid, shard)
            asked = self._repair(ctx, shard, Answers(again, grid), [d for d in before if d.kind not in FINAL])
            mended = len(asked - {d.cell.number for d in self._check(ctx, grid, shard)})
            first = collections.Counter(d.kind for d in before)
            defects = self._write(ctx, grid, shard, mended, found_first=first)
            log.info("shard %d: %d of %d defective cells mended", shard, mended, mended + len(defects))
            again.remove()  # not before: a kill until here must not have what failed again asked a third time
        ctx.progress.advance(self.name, len(grid), defects=len(defects), repaired=mended)

    def _check(self, ctx: Context, grid: Grid, shard: int) -> list[Defect]:
        out = []
        for b in range(grid.blocks):
            out += _defects(ctx, grid, list(grid.block(b)), _read_block(ctx, shard, b))
        return out

    def _write(self, ctx: Context, grid: Grid, shard: int, repaired: int, stop_at_mendable: bool = False,
               found_first: Mapping[str, int] | None = None) -> list[Defect]:
        """Check and write, block by block; the defects. Raises _Mendable at the first, where that is wanted.

        `found_first`: the kinds of defects that there were before a repair.
        """
        defects: list[Defect] = []
        dropped: set[str] = set()
        counts: collections.Counter[str] = collections.Counter()

        def tables() -> Iterator[pa.Table]:
            for b in range(grid.blocks):
                table = _read_block(ctx, shard, b)
                cells = list(grid.block(b))
                found = _defects(ctx, grid, cells, table)
                if stop_at_mendable and any(d.kind not in FINAL for d in found):
                    raise _Mendable
                defects.extend(found)
                if ctx.config.limits.incomplete_prompts == "drop":
                    dropped.update(d.cell.prompt["prompt_id"] for d in found)
                yield _usable(grid, cells, table, {d.cell.candidate_id for d in found}, dropped, counts)

        def kinds() -> dict[str, int]:
            return dict(collections.Counter(d.kind for d in defects))

        ctx.store.write_batches(
            self.outputs(ctx, shard)[0], tables(), schema.VERIFIED, self.key(ctx, shard),
            planned=len(grid), usable=lambda: counts["usable"],
            defects=kinds, found=lambda: kinds() if found_first is None else dict(found_first), repaired=repaired,
            cells=lambda: [d.describe() for d in defects[:_NAMED]], dropped_prompts=lambda: sorted(dropped),
            tokens=lambda: counts["tokens"], attempts=lambda: counts["attempts"],
            at_max_new_tokens=lambda: counts["at_max_new_tokens"])
        return defects

    def _repair(self, ctx: Context, shard: int, answers: Answers, defects: list[Defect]) -> set[int]:
        """Ask for the defective cells again and write the files of their seeds anew; the cells asked, also by a process
        that was killed since."""
        grid, have = answers.grid, answers.have()
        wanted = {d.cell.number for d in defects}
        owed = sorted(n for n in wanted if not have[n])
        before = self._attempts(ctx, grid, shard, defects)
        key = Candidates().key(ctx, shard)
        try:
            Requester(ctx, grid, answers, "repair", before).ask(owed, len(owed))
            for nth in sorted({grid.seeds.index(d.cell.seed) for d in defects}):
                path = Candidates().path(grid.seeds[nth], shard)
                write_seed(ctx, path, key, grid, nth, lambda n: answers.get(n) if n in wanted else None,
                           _Standing(ctx, path, grid).get)
        finally:
            answers.journal.close()
        return set(np.flatnonzero(answers.have()).tolist())

    def _attempts(self, ctx: Context, grid: Grid, shard: int, defects: list[Defect]) -> dict[int, int]:
        """How often each defective cell was sent already."""
        wanted = {d.cell.candidate_id: d.cell.number for d in defects}
        out: dict[int, int] = {}
        for path in {Candidates().path(d.cell.seed, shard) for d in defects}:
            table = ctx.store.read(path, ["candidate_id", "attempts"])
            for name, attempts in zip(*(table.column(c).to_pylist() for c in table.column_names), strict=True):
                if name in wanted:
                    out[wanted[name]] = attempts or 0
        return out


class _Mendable(Exception):
    """A defect that asking again may mend."""


def _read_block(ctx: Context, shard: int, b: int) -> pa.Table:
    """The candidates of a block, seed by seed."""
    return pa.concat_tables([ctx.store.read(path, row_group=b) for path in Candidates().outputs(ctx, shard)])


def _defects(ctx: Context, grid: Grid, cells: list[Cell], table: pa.Table) -> list[Defect]:
    return check(cells, table.select(CHECKED).to_pylist(), ctx.tokenizer, grid.max_new_tokens, grid.model)


def _usable(grid: Grid, cells: list[Cell], table: pa.Table, bad: set[str], dropped: set[str],
            counts: collections.Counter[str]) -> pa.Table:
    """The candidates of a block in plan order, with `usable`."""
    places = {cell.candidate_id: cell.number for cell in cells}
    names = table.column("candidate_id").to_pylist()
    order = np.argsort([places.get(name, len(grid)) for name in names], kind="stable")
    table = table.take(order).combine_chunks()
    seen, usable = set(bad), []
    columns = [table.column(c).to_pylist() for c in ("candidate_id", "prompt_id", "finish_reason", "completion_tokens",
                                                     "attempts")]
    for name, prompt, reason, tokens, attempts in zip(*columns, strict=True):
        # a second row of a cell is as little usable as one that the plan does not know
        good = name not in seen and name in places and prompt not in dropped
        seen.add(name)
        usable.append(good)
        counts["usable"] += good
        counts["tokens"] += tokens or 0
        counts["attempts"] += attempts or 0
        counts["at_max_new_tokens"] += reason == "length" and tokens == grid.max_new_tokens
    return table.append_column(schema.VERIFIED.field("usable"), pa.array(usable, pa.bool_())).cast(schema.VERIFIED)


class _Standing:
    """The rows of a seed's file, read block by block in the order they are asked for."""

    def __init__(self, ctx: Context, path: str, grid: Grid) -> None:
        self._ctx, self._path, self._grid = ctx, path, grid
        self._block = -1
        self._rows: dict[str, Row] = {}

    def get(self, number: int) -> Row | None:
        """The cell's row."""
        if (block := number // self._grid.block_cells) != self._block:
            rows: list[dict[str, Any]] = self._ctx.store.read(self._path, row_group=block).to_pylist()
            self._block, self._rows = block, {r["candidate_id"]: r for r in rows}
        return self._rows.get(self._grid.cell(number).candidate_id)


def read_verified(ctx: Context, shard: int, columns: Iterable[str] | None = None) -> Iterator[pa.Table]:
    """The usable rows of a shard's verified candidates (all columns, or those named), a block of whole prompts at a
    time."""
    path = shard_file("verified", shard)
    wanted = None if columns is None else list(dict.fromkeys([*columns, "usable"]))
    for block in range(ctx.store.row_groups(path)):
        table = ctx.store.read(path, columns=wanted, row_group=block)
        table = table.filter(table.column("usable"))
        yield table if columns is None else table.select(list(columns))
