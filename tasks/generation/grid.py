"""The grid of a shard: every (prompt, heuristic, seed) is a cell, and a cell is a number.

Numbers run prompt-major, then by heuristic, then by seed: requests that share their prompt are near each other, so
that a server's prefix cache serves them. A cell's ids are worked out when it is asked for, so that a plan of any
length takes no memory.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.context import Context
from tasks.core.config import Source
from tasks.core.heuristics import Heuristic
from tasks.core.identity import CellIds
from tasks.core.tokenizer import decode_all
from tasks.generation.prompts import read_shard

Row = dict[str, Any]

BLOCK_ROWS = 512
"""Rows (of all seeds) that are handled at once: a row group is a block, of whole prompts."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One request of the grid."""

    number: int
    candidate_id: str
    prompt: Row
    heuristic: Heuristic
    heuristic_id: str
    seed: int
    request_seed: int

    def describe(self) -> Row:
        """For people: which cell it is."""
        return {"candidate_id": self.candidate_id, "prompt_id": self.prompt["prompt_id"],
                "heuristic": self.heuristic.name, "seed": self.seed}


def _own(source: Source) -> Row:
    """What a source does to the requests of its rows: a row's id does not say which of its columns was asked, nor under
    which system prompt."""
    system = {} if source.system_prompt is None else {"system_prompt": source.system_prompt or None}
    return {"text_key": source.text_key, **system}


class Grid:
    """The cells of one shard."""

    def __init__(self, ctx: Context, shard: int) -> None:
        config = ctx.config
        self.prompts: list[Row] = read_shard(ctx.store, shard).select(
            ["prompt_id", "source", "prompt_ids"]).to_pylist()
        self.heuristics = [(h, h.id) for h in ctx.heuristics]
        self.seeds = config.seeds
        generation = ctx.generation("generator")
        self.max_new_tokens = generation["max_new_tokens"]
        self.model = config.model.path
        self._ids = {source.name: CellIds(generation["seed"], config.model.path, config.model.revision,
                                          ctx.raw["candidate_identity"] | _own(source)) for source in config.sources}
        self._per_prompt = len(self.heuristics) * len(self.seeds)
        self.block_prompts = max(1, BLOCK_ROWS // self._per_prompt)

    def __len__(self) -> int:
        return len(self.prompts) * self._per_prompt

    def cell(self, number: int) -> Cell:
        """The cell of that number."""
        at, rest = divmod(number, self._per_prompt)
        which, nth = divmod(rest, len(self.seeds))
        prompt, (heuristic, hid), seed = self.prompts[at], self.heuristics[which], self.seeds[nth]
        name, drawn = self._ids[prompt["source"]](prompt["prompt_id"], hid, seed)
        return Cell(number, name, prompt, heuristic, hid, seed, drawn)

    @property
    def blocks(self) -> int:
        """How many blocks the shard has."""
        return -(-len(self.prompts) // self.block_prompts)

    @property
    def block_cells(self) -> int:
        """Cells of a whole block."""
        return self.block_prompts * self._per_prompt

    def block(self, n: int, nth_seed: int | None = None) -> Iterator[Cell]:
        """The cells of a block in order; of one seed only where `nth_seed` says so."""
        size = self.block_cells
        first, step = (0, 1) if nth_seed is None else (nth_seed, len(self.seeds))
        return (self.cell(i) for i in range(n * size + first, min((n + 1) * size, len(self)), step))


@dataclass(frozen=True)
class Defect:
    """A cell of the grid that is not as it should be."""

    cell: Cell
    kind: str

    def describe(self) -> Row:
        """For the report: which cell and what is wrong."""
        return self.cell.describe() | {"defect": self.kind}


CHECKED = ["candidate_id", "prompt_id", "heuristic_id", "seed", "request_seed", "status", "model", "output_ids", "text",
           "finish_reason"]
"""The columns that `check` looks at."""


def check(cells: Sequence[Cell], rows: Sequence[Row], tokenizer: Any, max_new_tokens: int, model: str) -> list[Defect]:
    """Every defect of the cells: missing, duplicate, a failure's own status, wrong_cell, wrong_model, too_long,
    truncated (ended by something else than the model or max_new_tokens: a context that was full), undecodable.

    A pure function of the plan and the rows, which need the columns CHECKED.
    """
    found: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        found[row["candidate_id"]].append(row)
    texts = iter(decode_all(tokenizer, [r["output_ids"] for r in rows if r["status"] == "ok"]))
    decoded = {id(r): next(texts) for r in rows if r["status"] == "ok"}
    out = []
    for cell in cells:
        here = found[cell.candidate_id]
        if len(here) != 1:
            out.append(Defect(cell, "duplicate" if here else "missing"))
        elif kind := _defect(cell, here[0], decoded.get(id(here[0])), max_new_tokens, model):
            out.append(Defect(cell, kind))
    return out


def _defect(cell: Cell, row: Row, decoded: str | None, max_new_tokens: int, model: str) -> str | None:
    wanted = (cell.prompt["prompt_id"], cell.heuristic_id, cell.seed, cell.request_seed)
    if (row["prompt_id"], row["heuristic_id"], row["seed"], row["request_seed"]) != wanted:
        return "wrong_cell"
    if row["model"] != model:
        return "wrong_model"
    if row["status"] != "ok":
        return row["status"]
    tokens = len(row["output_ids"])
    if decoded != row["text"]:  # first: damage must not pass as an answer that is only too long
        return "undecodable"
    if tokens > max_new_tokens:
        return "too_long"
    return "truncated" if row["finish_reason"] == "length" and tokens < max_new_tokens else None
