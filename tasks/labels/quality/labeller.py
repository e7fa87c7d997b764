"""Quality: the candidates of each (prompt, seed) play a Swiss tournament and get Bradley-Terry ratings.

Equal texts share one player. All tournaments of a shard play at once, so that the judge stays busy while
one of them waits for its round.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from tasks.context import Context
from tasks.core import schema
from tasks.core.identity import digest
from tasks.generation.prompts import read_shard
from tasks.labels.base import Labeller, groups
from tasks.labels.quality import bradley_terry
from tasks.labels.quality.judge import Judge, Verdict, sampling_params, template_of
from tasks.labels.quality.swiss import Swiss
from tasks.serving.loop import gather_all
from tasks.stage import shard_file

Row = dict[str, Any]


def transcript(messages: list[Row]) -> str:
    """What the judge sees as the prompt: the user's text, or the whole exchange where there was one.

    The system message is left out: it is the same for all players.
    """
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in turns)


class QualityLabeller(Labeller):
    """`labels/quality/` and `comparisons/`."""

    name, unit, schema = "quality", "judge calls", schema.QUALITY

    def settings(self, ctx: Context) -> Any:
        """Method, template, judge and the seed of the pairings."""
        quality = ctx.config.quality
        return [quality.model_dump(exclude={"model", "template"}), template_of(ctx).digest,
                ctx.chat_template("judge").digest, sampling_params(ctx), ctx.config.judge_model.model_dump(),
                ctx.config.run_seed]

    def signatures(self, ctx: Context) -> dict[str, str]:
        """Judge, template and model of the ratings."""
        quality = ctx.config.quality
        template = template_of(ctx)
        text = (f"bradley-terry|map:normal|prior_sd:{quality.prior_sd:g}|pairing:swiss+{quality.extra_rounds}|orders:2|"
                f"judge:{ctx.config.judge_model.path}|template:{template.name}:{template.digest}")
        return {"rating": text, "rating_se": text}

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """Ratings and the comparisons they were fitted to."""
        return [self.path(shard), shard_file("comparisons", shard)]

    def size(self, ctx: Context, shard: int) -> int:
        """Judge calls if no text stands twice: two orders of every pair."""
        sizes = collections.Counter((r["prompt_id"], r["seed"]) for g in _groups(ctx, shard).values() for r in g)
        return sum(planned_calls(n, ctx.config.quality.extra_rounds) for n in sizes.values())

    def run(self, ctx: Context, shard: int) -> None:
        """Play every group, fit, write."""
        prompts = {p["prompt_id"]: transcript(p["messages"]) for p in read_shard(ctx.store, shard).to_pylist()}
        work = list(_groups(ctx, shard).items())
        judge = Judge(ctx, shard)
        played: dict[tuple[Any, ...], list[Row]] = {}

        async def play_all() -> None:
            waiting = iter(work)

            async def table() -> None:
                for (prompt_id, seed), rows in waiting:
                    played[prompt_id, seed] = await _play(ctx, judge, prompts[prompt_id], prompt_id, seed, rows)

            pairs = max(1, min(len(rows) for _, rows in work) // 2)
            tables = math.ceil(1.5 * judge.pool.places / (2 * pairs)) + 1
            await gather_all(table() for _ in range(min(tables, len(work))))

        try:
            if work:
                ctx.loop.run(play_all)
        except BaseException:
            judge.close(done=False)
            raise
        labels = [row for group, rows in work
                  for row in rate(rows, played[group], ctx.config.quality.prior_sd)]
        key = self.key(ctx, shard)
        comparisons = [row for group, _ in work for row in played[group]]
        ctx.store.write_table(shard_file("comparisons", shard), schema.table(comparisons, schema.COMPARISONS), key)
        ctx.store.write_table(self.path(shard), schema.table(labels, schema.QUALITY), key)
        judge.close(done=True)


def _groups(ctx: Context, shard: int) -> dict[tuple[Any, ...], list[Row]]:
    return groups(ctx, shard, ["text"], by=("prompt_id", "seed"))


def planned_calls(players: int, extra_rounds: int) -> int:
    """Judge calls of one tournament: two orders of every pair of every round."""
    return Swiss([str(n) for n in range(players)], 0, extra_rounds=extra_rounds).rounds * (players // 2) * 2


def players_of(rows: list[Row]) -> dict[str, str]:
    """text -> the candidate that stands for it: the lowest id among equal texts."""
    out: dict[str, str] = {}
    for row in rows:
        out[row["text"]] = min(out.get(row["text"], row["candidate_id"]), row["candidate_id"])
    return out


async def _play(ctx: Context, judge: Judge, prompt: str, prompt_id: str, seed: int, rows: list[Row]) -> list[Row]:
    """All rounds of one group; the comparisons as rows."""
    texts = {player: text for text, player in players_of(rows).items()}
    extra = ctx.config.quality.extra_rounds
    swiss = Swiss(list(texts), int(digest("pairing", ctx.config.run_seed, prompt_id, seed, size=4), 16),
                  extra_rounds=extra)
    out: list[Row] = []
    while pairs := swiss.next_round():
        verdicts = await gather_all(judge.compare(prompt, texts[a], texts[b]) for a, b in pairs)
        for (a, b), (first, second) in zip(pairs, verdicts, strict=True):
            row = comparison(a, b, first, second)
            swiss.record(a, b, row["outcome"])
            out.append(row | {"prompt_id": prompt_id, "seed": seed, "round": swiss.rounds_started - 1,
                              "judge": ctx.config.judge_model.path, "template": judge.template.digest})
    # what equal texts saved was planned: say it is done
    ctx.progress.advance("quality", max(0, planned_calls(len(rows), extra) - 2 * len(out)))
    return out


def comparison(a: str, b: str, first: Verdict, second: Verdict) -> Row:
    """The row of a pair: `first` has a shown first, `second` has b shown first."""
    p_first = first.first
    p_second = None if second.first is None else 1.0 - second.first
    outcome = (p_first + p_second) / 2 if p_first is not None and p_second is not None else None
    outside = [v.outside for v in (first, second) if v.outside is not None]
    reasons = dict.fromkeys(v.reason for v in (first, second) if v.reason)
    return {"a": a, "b": b, "p_first": p_first, "p_second": p_second, "outcome": outcome,
            "outside": sum(outside) / len(outside) if outside else None, "reason": "; ".join(reasons) or None}


def rate(rows: list[Row], comparisons: list[Row], prior_sd: float) -> list[Row]:
    """Quality rows of one group's candidates (schema QUALITY); null where a text was never judged."""
    player = players_of(rows)
    index = {p: n for n, p in enumerate(sorted(player.values()))}
    judged = [c for c in comparisons if c["outcome"] is not None]
    fit = bradley_terry.fit(
        len(index), np.array([index[c["a"]] for c in judged], dtype=np.int64),
        np.array([index[c["b"]] for c in judged], dtype=np.int64),
        np.array([c["outcome"] for c in judged], dtype=np.float64), prior_sd=prior_sd)
    rating, se = fit.rating.tolist(), fit.se.tolist()
    flags = ", ".join(name for name, on in [("disconnected", not fit.connected), ("separated", fit.separated),
                                            ("not_converged", not fit.converged)] if on) or None
    out = []
    for row in rows:
        stands = player[row["text"]]
        n = index[stands]
        out.append({"candidate_id": row["candidate_id"], "rating": rating[n], "rating_se": se[n],
                    "comparisons": int(fit.comparisons[n]), "rating_flags": flags, "player": stands})
    return out
