"""What came back for the cells of a shard, on disk as it comes: a line an answer, found again by its place.

Only where each answer lies is held in memory (16 bytes a cell), so that a shard of any length is written to Parquet
block by block, in the plan's order, whatever the order in which the answers came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.context import Context
from tasks.core import schema
from tasks.core.errors import StorageError
from tasks.core.identity import digest
from tasks.core.store import Journal, Store
from tasks.core.tokenizer import decode_all
from tasks.generation.grid import BLOCK_ROWS, CHECKED, Cell, Grid, Row, check

log = logging.getLogger("winnow.generate")

_DAMAGE = ("duplicate", "wrong_cell", "wrong_model", "undecodable")
_SENT = ("prompt_ids", "source", "output_logprobs", "completion_tokens", "error")
_KEPT = ("output_ids", "output_logprobs", "kept_logprobs", "finish_reason", "status", "error", "attempts", "server",
         "latency_s", "seed_effective", "dialect", "sampling_params")
_KEPT_IDS = schema.CANDIDATES.field("kept_ids").type


class Answers:
    """The journal of one shard's answers."""

    def __init__(self, journal: Journal, grid: Grid) -> None:
        self.journal, self.grid = journal, grid
        self._places = np.zeros((len(grid), 2), dtype=np.int64)  # offset and size; size 0: no answer
        self._sent: tuple[Row | None, str] = (None, "")
        self._numbers: dict[str, int] | None = None
        self._flushing = False
        self.failed: StorageError | None = None
        """Why nothing more can be kept; whatever is still sent would be sent in vain."""
        self.crashes: dict[int, int] = {}
        """Crashes of servers that a cell without an answer was in flight at."""
        strange = 0
        for place, record in journal.scan():
            number = self._number(record)
            if number is None:
                strange += 1
            elif "crashes" in record:
                self.crashes[number] = record["crashes"]
            else:
                self._places[number] = place
        if strange:
            log.warning("%s: %d lines are not of this plan and count for nothing", journal.path, strange)

    def _number(self, record: Row) -> int | None:
        """The cell that a record is of; None: of no cell of this plan."""
        number, name = record.get("cell"), record.get("id")
        if not isinstance(number, int) or not 0 <= number < len(self.grid) \
                or self.grid.cell(number).candidate_id != name:
            if self._numbers is None:  # the heuristics may have come in another order then
                cells = map(self.grid.cell, range(len(self.grid)))
                self._numbers = {cell.candidate_id: cell.number for cell in cells}
            number = self._numbers.get(name) if isinstance(name, str) else None
        return number if number is not None and self._tag(self.grid.cell(number)) == record.get("of") else None

    def _tag(self, cell: Cell) -> str:
        """Of what was sent, that which has no part in `candidate_id`: the prompt's ids, which a chat template shapes,
        and the seed."""
        if self._sent[0] is not cell.prompt:  # neighbours share their prompt
            self._sent = (cell.prompt, digest(cell.prompt["prompt_ids"], size=8))
        return f"{self._sent[1]}-{cell.request_seed:x}"

    def _record(self, cell: Cell) -> Row:
        return {"cell": cell.number, "id": cell.candidate_id, "of": self._tag(cell)}

    def have(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which cells have an answer."""
        return self._places[:, 1] > 0

    def add(self, cell: Cell, answer: Row) -> None:
        """Keep an answer, in the columns of a candidate row. Raises StorageError.

        On an event loop, what comes in one turn is written at its end: before the requests that take the places of
        those answered are sent, so that a kill costs no more than what is in flight. A system call each would let
        other threads in between every two answers.
        """
        if self.failed:
            raise self.failed
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._places[cell.number] = self.journal.append(self._record(cell) | answer)
            return
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        self._places[cell.number] = self.journal.queue(self._record(cell) | answer)

    def _flush(self) -> None:
        self._flushing = False
        try:
            self.journal.flush()
        except StorageError as error:
            self.failed = error

    def settled(self) -> None:
        """Everything is on disk now. Raises StorageError if it is not."""
        self._flush()
        if self.failed:
            raise self.failed

    def suspect(self, cell: Cell, crashes: int) -> None:
        """Keep that a server crashed with the cell in flight, for the next process. Raises StorageError."""
        self.crashes[cell.number] = crashes
        self.journal.append(self._record(cell) | {"crashes": crashes})

    def get(self, number: int) -> Row | None:
        """The cell's answer."""
        offset, size = self._places[number].tolist()
        return self.journal.at(offset, size) if size else None


class Leftovers:
    """Candidate rows of a seed's file that stands (or stood), found by cell."""

    def __init__(self, tables: list[pa.Table], places: dict[int, tuple[int, int]]) -> None:
        self._tables, self._places = tables, places

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def get(self, number: int) -> Row | None:
        """The cell's row."""
        if number not in self._places:
            return None
        table, row = self._places[number]
        return self._tables[table].slice(row, 1).to_pylist()[0]


def salvage(store: Store, path: str, grid: Grid, nth_seed: int, tokenizer: Any) -> Leftovers:
    """What is still good of a file that does not stand: rows whose checksums hold and that are what the server answered
    to a cell of the plan, sent as it would be sent now. Failures and cut answers are kept too: verification's to judge.
    """
    numbers = {cell.candidate_id: cell.number for b in range(grid.blocks) for cell in grid.block(b, nth_seed)}
    tables: list[pa.Table] = []
    places: dict[int, tuple[int, int]] = {}
    for table in store.salvage(path):
        if not table.schema.equals(schema.CANDIDATES):  # names and types have no checksum
            log.warning("%s: a row group has not the columns of candidates and is lost", store.display(path))
            continue
        tables.append(table)
        for start in range(0, table.num_rows, BLOCK_ROWS):
            rows = table.slice(start, BLOCK_ROWS).select([*CHECKED, *_SENT]).to_pylist()
            known = {i: n for i, r in enumerate(rows) if (n := numbers.get(r["candidate_id"])) is not None
                     and _of_one_piece(grid.cell(n), r)}
            found = check([grid.cell(n) for n in known.values()], [rows[i] for i in known], tokenizer,
                          grid.max_new_tokens, grid.model)
            bad = {d.cell.number for d in found if d.kind in _DAMAGE}
            places |= {n: (len(tables) - 1, start + i) for i, n in known.items() if n not in bad}
    if places:
        log.warning("%s: %d of %d candidates are whole and kept", store.display(path), len(places), len(numbers))
    return Leftovers(tables, places)


def _of_one_piece(cell: Cell, row: Row) -> bool:
    """Whether the row is of the prompt as it is sent now (a chat template may have changed), and its parts agree."""
    ids, logprobs, status = row["output_ids"], row["output_logprobs"], row["status"]
    if (row["prompt_ids"], row["source"]) != (cell.prompt["prompt_ids"], cell.prompt["source"]):
        return False
    if (row["error"] is None) != (status == "ok") or (ids is not None) != (status in ("ok", "empty")):
        return False
    if ids is None:
        return row["text"] is row["completion_tokens"] is logprobs is None
    return (all(i is not None and i >= 0 for i in ids) and row["completion_tokens"] == len(ids)
            and (logprobs is None or len(logprobs) == len(ids)))


def write_seed(ctx: Context, path: str, key: str, grid: Grid, nth_seed: int,
               find: Callable[[int], Row | None], old: Callable[[int], Row | None]) -> None:
    """Write one seed's file in plan order, block by block; `find`: a cell's new answer, `old`: its row of before.

    The manifest has counts by status and the tokens.
    """
    statuses: dict[str, int] = {}
    tokens = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal tokens
        for b in range(grid.blocks):
            rows = _rows(ctx, grid.block(b, nth_seed), find, old)
            for row in rows:
                statuses[row["status"]] = statuses.get(row["status"], 0) + 1
                tokens += row["completion_tokens"] or 0
            yield schema.table(rows, schema.CANDIDATES)

    ctx.store.write_batches(path, tables(), schema.CANDIDATES, key, statuses=statuses, tokens=lambda: tokens)


def _rows(ctx: Context, cells: Iterator[Cell], find: Callable[[int], Row | None], old: Callable[[int], Row | None]
          ) -> list[Row]:
    """The candidate rows of the cells."""
    out: list[Row] = []
    answered: list[Row] = []
    for cell in cells:
        answer = find(cell.number)
        if answer is None:
            row = old(cell.number)
            assert row is not None, "a cell without an answer"
            out.append(row)
            continue
        prompt = cell.prompt
        row = {"candidate_id": cell.candidate_id, "prompt_id": prompt["prompt_id"], "heuristic_id": cell.heuristic_id,
               "seed": cell.seed, "source": prompt["source"], "prompt_ids": prompt["prompt_ids"],
               "model": ctx.config.model.path, "request_seed": cell.request_seed, "completion_tokens": None}
        row |= {name: answer.get(name) for name in _KEPT}
        if (kept := answer.get("kept_ids")) is not None:  # many small lists: in arrow's form at a tenth of the memory
            row["kept_ids"] = pa.scalar(kept, _KEPT_IDS)
        out.append(row)
        if row["output_ids"] is not None:
            answered.append(row)
    for row, text in zip(answered, decode_all(ctx.tokenizer, [r["output_ids"] for r in answered]), strict=True):
        row["text"], row["completion_tokens"] = text, len(row["output_ids"])
        if row["status"] == "ok" and not text.strip():
            row["status"], row["error"] = "empty", "the answer has no text"
    return out
