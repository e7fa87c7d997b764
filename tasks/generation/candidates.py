"""Fan-out: every (prompt, heuristic, seed) of a shard asked once; an answer or a failure, each is a row.

Answers are journalled as they come, so that a killed run repeats only what was in flight; when all of a shard's cells
have one, they become a Parquet file a seed and the journal goes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import orjson

from tasks.context import Context
from tasks.core.identity import digest
from tasks.generation.answers import Answers, Leftovers, salvage, write_seed
from tasks.generation.grid import Cell, Grid
from tasks.generation.prompts import read_shard
from tasks.serving.client import ServerFacts
from tasks.serving.compile import Template, compile_heuristic, largest_mask
from tasks.serving.request import Outcome, Request
from tasks.stage import shard_file

log = logging.getLogger("winnow.generate")


class Requester:
    """Turns cells into requests and outcomes into answers."""

    def __init__(self, ctx: Context, grid: Grid, answers: Answers, stage: str,
                 attempts_before: Mapping[int, int] | None = None) -> None:
        """`stage`: whose progress it is; `attempts_before`: by cell, when cells are asked again."""
        self.ctx, self.grid, self.answers, self.stage = ctx, grid, answers, stage
        self._before = attempts_before or {}
        self._generation = ctx.generation("generator")
        self._templates: dict[tuple[str, bool, int], Template] = {}
        self._wants_masks = ctx.config.generation.generator.sampling_mask
        self._prompt: tuple[Any, str] = (None, "")

    def ask(self, numbers: Iterable[int], count: int) -> None:
        """Ask for the cells, with as many in flight as the servers take; returns when each has its answer.

        Only those in flight exist at a time, however long the plan. Raises UnreachableError, StorageError.
        """
        pool = self.ctx.pool("generator")
        try:
            self.ctx.loop.run(lambda: pool.ask_all(self._requests(numbers), count))
        finally:
            self.answers.settled()

    def _requests(self, numbers: Iterable[int]) -> Iterator[Request]:
        masked = self._masked if self._wants_masks else None
        for number in numbers:
            cell = self.grid.cell(number)
            yield Request(partial(self._body, cell), partial(self._settle, cell), rid=cell.candidate_id,
                          crashes=self.answers.crashes.get(number, 0), suspected=partial(self.answers.suspect, cell),
                          masked=masked and partial(masked, cell))

    def _template(self, cell: Cell, facts: ServerFacts) -> Template:
        largest = largest_mask(facts) if self._wants_masks else 0
        kind = (cell.heuristic_id, facts.honours_seeds, largest)
        known = self._templates.get(kind)
        if known is None:
            compiled = compile_heuristic(cell.heuristic, facts.honours_seeds)
            known = Template(compiled, self._generation, compiled.masked(largest))
            self._templates[kind] = known
        return known

    def _masked(self, cell: Cell, facts: ServerFacts) -> bool:
        return self._template(cell, facts).masked

    def _body(self, cell: Cell, facts: ServerFacts) -> bytes:
        if self.answers.failed:  # the disk filled with the answers whose places this one and its like take
            raise self.answers.failed
        if self._prompt[0] is not cell.prompt:  # neighbours share their prompt
            self._prompt = (cell.prompt, orjson.dumps(cell.prompt["prompt_ids"]).decode())
        template = self._template(cell, facts)
        return template.body(self._prompt[1], cell.candidate_id, cell.request_seed)

    def _settle(self, cell: Cell, outcome: Outcome) -> None:
        facts, reply, failure = outcome.facts, outcome.reply, outcome.failure
        answer: dict[str, Any] = {
            "status": failure.kind if failure else "ok", "error": str(failure) if failure else None,
            "attempts": outcome.attempts + self._before.get(cell.number, 0), "server": outcome.server}
        if facts is not None:
            template = self._template(cell, facts)
            answer |= {"seed_effective": facts.honours_seeds, "dialect": template.compiled.dialect,
                       "sampling_params": template.sampling_params(cell.request_seed)}
        if reply is not None:
            answer |= {"output_ids": reply.output_ids, "output_logprobs": reply.logprobs,
                       "finish_reason": reply.finish_reason, "latency_s": reply.latency_s}
            if reply.kept_ids is not None:
                answer |= {"kept_ids": reply.kept_ids, "kept_logprobs": reply.kept_logprobs}
        self.answers.add(cell, answer)
        self.ctx.progress.advance(self.stage, failure=failure.kind if failure else None,
                                  tokens=len(reply.output_ids) if reply else 0)


class Candidates:
    """The stage: `candidates/seed=<s>/shard-<n>.parquet`."""

    name, unit = "generate", "requests"

    def path(self, seed: int, shard: int) -> str:
        """The file of one seed and shard."""
        return shard_file(f"candidates/seed={seed}", shard)

    def journal(self, shard: int) -> str:
        """Where the answers of a shard that is not whole yet lie."""
        return f"candidates/shard-{shard:04d}.jsonl"

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """One file a seed."""
        return [self.path(seed, shard) for seed in ctx.config.seeds]

    def key(self, ctx: Context, shard: int) -> str:
        """The shard's prompts as sent, and all that shapes an answer."""
        prompts = read_shard(ctx.store, shard)
        config = ctx.config
        return digest("candidates", 4, prompts.column("prompt_id").to_pylist(),
                      prompts.column("prompt_ids").to_pylist(), [h.id for h in ctx.heuristics], config.run_seed,
                      config.model.model_dump(), ctx.raw["candidate_identity"],
                      config.generation.generator.sampling_mask)

    def size(self, ctx: Context, shard: int) -> int:
        """Requests."""
        full = ctx.config.engine.shard_prompts
        prompts = min(full, ctx.raw["prompts"] - shard * full)
        return prompts * len(ctx.heuristics) * len(ctx.config.seeds)

    def run(self, ctx: Context, shard: int) -> None:
        """Ask for what is neither in the journal nor in a file, then write each seed's file."""
        grid, key = Grid(ctx, shard), self.key(ctx, shard)
        answers = Answers(ctx.store.journal(self.journal(shard)), grid)
        owed = ~answers.have()
        making: dict[int, Leftovers | None] = {}  # the seeds whose file is to be written, and what is left of it
        for nth, seed in enumerate(grid.seeds):
            path = self.path(seed, shard)
            if ctx.store.state(path, key) == "done":
                owed[nth::len(grid.seeds)] = False
                continue
            making[nth] = None
            if ctx.store.exists(path):
                making[nth] = left = salvage(ctx.store, path, grid, nth, ctx.tokenizer)
                self._name_lost(ctx, path, grid, nth, left, answers)
                owed[list(left)] = False
        count = int(owed.sum())
        ctx.progress.advance(self.name, len(grid) - count, already=True)
        try:
            Requester(ctx, grid, answers, self.name).ask(map(int, np.flatnonzero(owed)), count)
            for nth, left in making.items():
                write_seed(ctx, self.path(grid.seeds[nth], shard), key, grid, nth, answers.get,
                           left.get if left else lambda _: None)
        finally:
            answers.journal.close()
        answers.journal.remove()

    def _name_lost(self, ctx: Context, path: str, grid: Grid, nth: int, left: Leftovers, answers: Answers) -> None:
        """Say which cells of a file are gone, when they are few."""
        have = answers.have()
        cells = (cell for b in range(grid.blocks) for cell in grid.block(b, nth))
        lost = [c for c in cells if c.number not in left and not have[c.number]]
        if list(left) and lost:
            names = "; ".join(f"prompt {c.prompt['prompt_id'][:12]}, {c.heuristic.name}, seed {c.seed}"
                              for c in lost[:5])
            log.warning("%s: %d candidates are missing and asked for again: %s%s", ctx.store.display(path), len(lost),
                        names, "; …" if len(lost) > 5 else "")
