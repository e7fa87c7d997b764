"""Fan-out: every (prompt, heuristic, seed) of a shard asked once; an answer or a failure, each is a row.

Finished requests are appended to a journal, one line each, so that a killed run repeats only what was in
flight; when a seed's cells are all there they become a Parquet file and the journal goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.context import Context
from tasks.core import schema
from tasks.core.heuristics import Heuristic
from tasks.core.identity import candidate_id, digest, request_seed
from tasks.core.tokenizer import decode
from tasks.generation.prompts import read_shard
from tasks.serving.compile import Compiled, compile_heuristic
from tasks.serving.pool import Outcome, gather_all
from tasks.stage import shard_file

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One request of the grid."""

    candidate_id: str
    prompt: Row
    heuristic: Heuristic
    seed: int
    request_seed: int


def plan(ctx: Context, prompts: Iterable[Row]) -> Iterator[Cell]:
    """The grid of the prompts, prompt-major: a prompt's requests share their prefix in the server's cache."""
    config = ctx.config
    generation = config.generation.model_dump(mode="json")
    heuristics = [(h, h.id) for h in ctx.heuristics]
    for prompt in prompts:
        pid = prompt["prompt_id"]
        for heuristic, hid in heuristics:
            for seed in config.seeds:
                yield Cell(
                    candidate_id(pid, hid, seed, config.model.path, config.model.revision, generation),
                    prompt, heuristic, seed, request_seed(config.run_seed, pid, hid, seed))


class Requester:
    """Turns cells into requests and outcomes into rows."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.pool = ctx, ctx.pool("generator")
        self._compiled: dict[str, Compiled] = {h.id: compile_heuristic(h, ctx.honours_seeds) for h in ctx.heuristics}
        self._honours = {f["url"]: f["honours_seeds"] for f in ctx.raw["servers"]["generator"]}

    def payload(self, cell: Cell) -> Row:
        """The request: ids in, every sampling field explicit, a seed of its own."""
        compiled = self._compiled[cell.heuristic.id]
        body = {
            "input_ids": cell.prompt["prompt_ids"],
            "sampling_params": compiled.sampling_params(self.ctx.config.generation, cell.request_seed),
            "rid": cell.candidate_id, "return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0,
            "stream": False,
        }
        return body | ({"custom_logit_processor": compiled.processor} if compiled.processor else {})

    async def ask(self, cell: Cell) -> Row:
        """One cell asked; the row, whatever came of it. Raises UnreachableError when no server is left."""
        payload = self.payload(cell)
        outcome = await self.pool.generate(payload)
        return self.row(cell, payload, outcome)

    def row(self, cell: Cell, payload: Row, outcome: Outcome) -> Row:
        """The candidate row of an outcome."""
        row: Row = {
            "candidate_id": cell.candidate_id, "prompt_id": cell.prompt["prompt_id"],
            "heuristic_id": cell.heuristic.id, "seed": cell.seed, "source": cell.prompt["source"],
            "prompt_ids": cell.prompt["prompt_ids"], "attempts": outcome.attempts, "server": outcome.server,
            "model": self.ctx.config.model.path, "request_seed": cell.request_seed,
            "seed_effective": self._honours.get(outcome.server or "", None),
            "dialect": self._compiled[cell.heuristic.id].dialect,
            "sampling_params": json.dumps(payload["sampling_params"], sort_keys=True),
        }
        if outcome.failure is not None:
            return row | {"status": outcome.failure.kind, "error": str(outcome.failure)}
        reply = outcome.reply
        assert reply is not None
        text = decode(self.ctx.tokenizer, reply.output_ids)
        empty = not text.strip()
        return row | {
            "output_ids": reply.output_ids, "text": text, "output_logprobs": reply.logprobs,
            "finish_reason": reply.finish_reason, "latency_s": reply.latency_s,
            "completion_tokens": len(reply.output_ids), "status": "empty" if empty else "ok",
            "error": "the answer has no text" if empty else None,
        }


async def ask_all(requester: Requester, cells: Iterable[Cell], done: Callable[[Row], None]) -> None:
    """Ask for all cells with as many in flight as the servers take; `done` gets each row as it comes.

    Only that many requests exist at a time, however long the plan. The first exception stops all.
    """
    waiting = iter(cells)

    async def work() -> None:
        for cell in waiting:
            done(await requester.ask(cell))

    await gather_all(work() for _ in range(requester.pool.capacity))


class Candidates:
    """The stage: `candidates/seed=<s>/shard-<n>.parquet`."""

    name, unit = "generate", "requests"

    def path(self, seed: int, shard: int) -> str:
        """The file of one seed and shard."""
        return shard_file(f"candidates/seed={seed}", shard)

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """One file a seed."""
        return [self.path(seed, shard) for seed in ctx.config.seeds]

    def key(self, ctx: Context, shard: int) -> str:
        """The shard's prompts as sent, and all that shapes an answer."""
        prompts = read_shard(ctx.store, shard)
        config = ctx.config
        return digest("candidates", 1, prompts.column("prompt_id").to_pylist(),
                      prompts.column("prompt_ids").to_pylist(), [h.id for h in ctx.heuristics], config.run_seed,
                      config.model.model_dump(), config.generation.model_dump())

    def size(self, ctx: Context, shard: int) -> int:
        """Requests."""
        full = ctx.config.engine.shard_prompts
        prompts = min(full, ctx.raw["prompts"] - shard * full)
        return prompts * len(ctx.heuristics) * len(ctx.config.seeds)

    def run(self, ctx: Context, shard: int) -> None:
        """Ask for what the journals lack, then write each seed's file."""
        cells = list(plan(ctx, read_shard(ctx.store, shard).to_pylist()))
        key = self.key(ctx, shard)
        journals = {s: ctx.store.journal(f"candidates/seed={s}/shard-{shard:04d}.jsonl") for s in ctx.config.seeds}
        owed = {c.candidate_id for c in cells}
        for seed in ctx.config.seeds:
            if ctx.store.state(self.path(seed, shard), key) == "done":
                had = {c.candidate_id for c in cells if c.seed == seed}
            else:
                had = owed & {row["candidate_id"] for row in journals[seed]}
            owed -= had
            ctx.progress.advance(self.name, len(had), already=True)

        def done(row: Row) -> None:
            journals[row["seed"]].append(row)
            ctx.progress.advance(self.name, failed=row["status"] != "ok", tokens=row.get("completion_tokens") or 0)

        requester = Requester(ctx)
        try:
            ctx.loop.run(lambda: ask_all(requester, (c for c in cells if c.candidate_id in owed), done))
        finally:
            for journal in journals.values():
                journal.close()
        for seed, journal in journals.items():
            if ctx.store.state(self.path(seed, shard), key) != "done":
                rows = {row["candidate_id"]: row for row in journal}
                write_seed(ctx, shard, seed, [rows[c.candidate_id] for c in cells if c.seed == seed], key)
            journal.remove()


def write_seed(ctx: Context, shard: int, seed: int, rows: list[Row], key: str) -> None:
    """Write one seed's file in plan order, its counts by status in the manifest."""
    statuses: dict[str, int] = {}
    for row in rows:
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
    ctx.store.write_table(Candidates().path(seed, shard), schema.table(rows, schema.CANDIDATES), key,
                          statuses=statuses)


def read_candidates(ctx: Context, shard: int) -> pa.Table:
    """A shard's candidates of all seeds."""
    return pa.concat_tables([ctx.store.read(path) for path in Candidates().outputs(ctx, shard)])
