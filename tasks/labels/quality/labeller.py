"""Quality: the candidates of each (prompt, seed) play a tournament, or get a scalar each from a reward model.

Groups are read a block of prompts at a time, and as many of them play at once as keep the judges busy: the rounds of
one never wait for another's.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from tasks.context import Context
from tasks.core import schema
from tasks.core.config import RunConfig
from tasks.generation.prompts import read_shard
from tasks.labels.base import Group, Labeller, blocks
from tasks.labels.quality.judge import Judge, sampling_params, template_of
from tasks.labels.quality.pointwise import RewardModel
from tasks.labels.quality.tournament import planned_calls, play, players_of, rules_of
from tasks.stage import shard_file

Row = dict[str, Any]
Label = Callable[[tuple[Any, ...], list[Row]], Awaitable[tuple[list[Row], list[Row]]]]
"""A group to its rows of COMPARISONS and QUALITY."""

_KEYS = ("prompt_id", "seed")
_CELLS = 25_000_000
"""Most cells of the covariance matrices of all tournaments at work: some 250 MB."""
_LOOK_S = 0.2
"""How soon more groups begin when the servers turn out to take more."""


def transcript(messages: list[Row]) -> str:
    """What the judge sees as the prompt: the user's text, or the whole exchange where there was one.

    The system message is left out: it is the same for all players.
    """
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in turns)


class QualityLabeller(Labeller):
    """`labels/quality/` and, of a tournament, `comparisons/`."""

    name, unit, schema, version = "quality", "judge calls", schema.QUALITY, 2

    def settings(self, ctx: Context) -> Any:
        """Method, judge, what it is asked, and the seed of the pairings."""
        quality = ctx.config.quality
        judge = [ctx.config.judge_model.model_dump(), ctx.chat_template("judge").digest]
        if quality.method == "pointwise":
            return [quality.method, quality.max_prompt_tokens, *judge, RewardModel.settings(ctx)]
        return [asdict(rules_of(ctx.config)), quality.solver, quality.max_prompt_tokens, template_of(ctx).digest,
                sampling_params(ctx), ctx.config.run_seed, *judge]

    def signatures(self, ctx: Context) -> dict[str, str]:
        """Judge, template and model of the labels."""
        quality = ctx.config.quality
        if quality.method == "pointwise":
            return {"rm_score": RewardModel.signature(ctx)}
        template = template_of(ctx)
        prior = quality.prior_sd if quality.prior_sd == "auto" else f"{quality.prior_sd:g}"
        rounds = f"log2+{quality.extra_rounds}" if quality.rounds is None else quality.rounds
        aim = (f"top:{ctx.config.quality_top}@{quality.confidence:g}" if quality.schedule == "top_k"
               else f"reliability:{quality.reliability:g}")
        fitted = f"map:normal|prior_sd:{prior}" if quality.solver == "newton" else f"ml:choix|else:map:prior_sd:{prior}"
        text = (f"bradley-terry|{fitted}|schedule:{quality.schedule}|{aim}|"
                f"stop:{quality.stop}|rounds:{rounds}|orders:2:mean-log-odds|judge:{ctx.config.judge_model.pinned}|"
                f"template:{template.name}:{template.digest}")
        return {"rating": text, "rating_se": text, "reliability": text}

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """Labels and, of a tournament, the comparisons that the ratings were fitted to."""
        return [self.path(shard), *([shard_file("comparisons", shard)]
                                    if ctx.config.quality.method == "tournament" else [])]

    def size(self, ctx: Context, shard: int) -> int:
        """Judgements that the labels took or, before they stand, the most that they can take: if no text stands twice
        and no tournament ends early, two orders of every pair."""
        manifest = ctx.store.manifest(self.path(shard))
        if manifest and manifest.key == self.key(ctx, shard):
            return manifest.facts["calls"] + manifest.facts["spared"]
        sizes = collections.Counter(tuple(row[k] for k in _KEYS) for block in blocks(ctx, shard, [], _KEYS)
                                    for _, rows in block for row in rows)
        return sum(calls_of(n, ctx.config) for n in sizes.values())

    def run(self, ctx: Context, shard: int) -> None:
        """Label every group and write."""
        prompts = {p["prompt_id"]: p["messages"] for p in read_shard(ctx.store, shard).to_pylist()}
        pointwise = ctx.config.quality.method == "pointwise"
        judge: Judge | RewardModel = RewardModel(ctx, shard) if pointwise else Judge(ctx, shard)

        async def label(group: tuple[Any, ...], rows: list[Row]) -> tuple[list[Row], list[Row]]:
            prompt_id, seed = group
            if isinstance(judge, Judge):
                return await play(ctx, judge, transcript(prompts[prompt_id]), prompt_id, seed, rows)
            return [], await _scored(ctx, judge, prompts[prompt_id], rows)

        async def label_all() -> list[tuple[pa.Table, pa.Table]]:
            return await _label_all(blocks(ctx, shard, ["text"], _KEYS), label, lambda: judge.pool.places)

        try:
            made = ctx.loop.run(label_all)
        except BaseException:
            judge.kept.close(done=False)
            raise
        key, facts = self.key(ctx, shard), {"calls": judge.kept.calls, "spared": judge.kept.spared}
        if not pointwise:
            ctx.store.write_batches(shard_file("comparisons", shard), (c for c, _ in made), schema.COMPARISONS, key)
        ctx.store.write_batches(self.path(shard), (q for _, q in made), schema.QUALITY, key, **facts)
        judge.kept.close(done=True)


def calls_of(candidates: int, config: RunConfig) -> int:
    """Most judge calls of one group."""
    return candidates if config.quality.method == "pointwise" else planned_calls(candidates, config)


async def _label_all(work: Iterator[list[Group]], label: Label, places: Callable[[], int],
                     ) -> list[tuple[pa.Table, pa.Table]]:
    """(comparisons, labels) of each block in order. So many groups are at work that the servers stay full (`places`
    requests at once) even when each group waits for a single pair, as far as memory allows."""
    made: dict[int, dict[int, tuple[list[Row], list[Row]]]] = {}
    tables: dict[int, tuple[pa.Table, pa.Table]] = {}
    at_work: dict[asyncio.Task[None], int] = {}  # and the cells of its matrices

    async def one(block: int, number: int, of: int, group: Group) -> None:
        done = made.setdefault(block, {})
        done[number] = await label(*group)
        if len(done) == of:
            del made[block]
            tables[block] = await asyncio.to_thread(_tables, [done[n] for n in range(of)])

    unread = _numbered(work)
    following = await asyncio.to_thread(next, unread, None)  # which may read a block
    try:
        while at_work or following:
            while following and len(at_work) < places() + 2:
                cells = len(following[3][1]) ** 2
                if at_work and sum(at_work.values()) + cells > _CELLS:
                    break
                at_work[asyncio.create_task(one(*following))] = cells
                following = await asyncio.to_thread(next, unread, None)
            ended, _ = await asyncio.wait(at_work, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                del at_work[task]
            await asyncio.gather(*ended)  # which raises the first failure, and has seen the others
    finally:
        for task in at_work:
            task.cancel()
        await asyncio.gather(*at_work, return_exceptions=True)
    return [tables[n] for n in sorted(tables)]


def _numbered(work: Iterator[list[Group]]) -> Iterator[tuple[int, int, int, Group]]:
    for block, found in enumerate(work):
        for number, group in enumerate(found):
            yield block, number, len(found), group


def _tables(labelled: list[tuple[list[Row], list[Row]]]) -> tuple[pa.Table, pa.Table]:
    return (schema.table((row for played, _ in labelled for row in played), schema.COMPARISONS),
            schema.table((row for _, labels in labelled for row in labels), schema.QUALITY))


async def _scored(ctx: Context, judge: RewardModel, messages: list[Row], rows: list[Row]) -> list[Row]:
    """The rows of a group whose texts are scored one by one; equal texts once."""
    player = players_of(rows)
    found = dict(zip(player, await judge.score(messages, list(player)), strict=True))
    ctx.progress.spare("quality", len(rows) - len(player))
    return [{"candidate_id": row["candidate_id"], "player": player[row["text"]],
             "rm_score": found[row["text"]].score, "rm_reason": found[row["text"]].reason} for row in rows]
