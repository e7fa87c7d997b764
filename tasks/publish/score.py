"""From labels to one score a candidate: z-scores over the run, weighed, filtered, ranked in their group.

Two numbers per label (mean and standard deviation over the run) are all the global state; the rest
happens inside a shard, where every group is whole.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from tasks.context import Context
from tasks.core import schema
from tasks.core.config import Scoring
from tasks.core.identity import digest
from tasks.labels import labellers
from tasks.stage import inputs_key, shard_file

STATS = "scores/stats.json"
LABELS = {"rating": "quality", "rm_score": "quality", "embedding_entropy": "diversity", "self_bleu": "diversity",
          "reward": "verifiers"}
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations; `+` joins two disjoint samples (Chan et al. 1979)."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def __add__(self, other: Moments) -> Moments:
        if not self.n or not other.n:
            return self if self.n else other
        n, delta = self.n + other.n, other.mean - self.mean
        return Moments(n, self.mean + delta * other.n / n, self.m2 + other.m2 + delta**2 * self.n * other.n / n)

    @property
    def sd(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.m2 / self.n) if self.n else 0.0

    @classmethod
    def of(cls, column: pl.Series) -> Moments:
        """Moments of a column's values, nulls left out."""
        values = column.drop_nulls().cast(pl.Float64)
        if not len(values):
            return cls()
        mean = float(values.mean())  # type: ignore[arg-type]
        return cls(len(values), mean, float(((values - mean) ** 2).sum()))


Stats = dict[str, Moments]


def labelled(ctx: Context, shard: int) -> pl.DataFrame:
    """A shard's verified rows with every label column; what was not labelled is null. rm_score is its `lead`."""
    frame = _frame(ctx, shard_file("verified", shard), ["candidate_id", "prompt_id", "seed", "usable"])
    for name in ctx.config.labels:
        columns = ["candidate_id", *(c for c, labeller in LABELS.items() if labeller == name)]
        frame = frame.join(_frame(ctx, shard_file(f"labels/{name}", shard), columns), on="candidate_id", how="left")
    missing = [pl.lit(None, pl.Float64).alias(c) for c in LABELS if c not in frame.columns]
    return frame.with_columns(missing).with_columns(lead("rm_score"))


def lead(column: str) -> pl.Expr:
    """How far a value lies above the mean of its (prompt, seed), in the column's name; as a rating does by itself.

    A raw score has its prompt's own level, which tells no candidates apart and would drown what does.
    """
    value, mean = pl.col(column), pl.col(column).mean().over("prompt_id", "seed")
    equal = (value - mean).abs() <= _ROUNDING * mean.abs()  # a mean of equal values need not be equal to them
    return pl.when(equal).then(0.0).otherwise(value - mean).alias(column)


def _frame(ctx: Context, path: str, columns: list[str]) -> pl.DataFrame:
    frame = pl.from_arrow(ctx.store.read(path, columns))
    assert isinstance(frame, pl.DataFrame)
    return frame


def score_shard(frame: pl.DataFrame, stats: Stats, scoring: Scoring) -> pl.DataFrame:
    """The scores (schema SCORES) of the whole groups in `frame` (columns of `labelled`).

    score = sum(w_i z_i) / sum(w_i) over the labels that are not null; null when there is none. A constant
    label has z = 0: it tells candidates apart by nothing. Quality is z(rating), or z(rm_score) in a run without
    ratings (method pointwise). Diversity is the mean of z(embedding_entropy) and -z(self_bleu). With
    `incorrect: drop`, reward < 1 is dropped before ranking.
    """
    def z(name: str) -> pl.Expr:
        moments = stats[name]
        if moments.sd == 0:
            return pl.when(pl.col(name).is_not_null()).then(0.0)
        return (pl.col(name) - moments.mean) / moments.sd

    weights = {"z_quality": scoring.weights.quality, "z_diversity": scoring.weights.diversity,
               "z_correctness": scoring.weights.correctness}
    quality = "rating" if stats["rating"].n else "rm_score"
    frame = frame.with_columns(
        z_quality=z(quality), z_correctness=z("reward"),
        z_diversity=pl.mean_horizontal(z("embedding_entropy"), -z("self_bleu")),
    )
    there = {name: pl.col(name).is_not_null().cast(pl.Float64) * w for name, w in weights.items()}
    total = pl.sum_horizontal(there.values())
    frame = frame.with_columns(score=pl.when(total > 0).then(
        pl.sum_horizontal(pl.col(name).fill_null(0.0) * w for name, w in weights.items()) / total))
    incorrect = (pl.col("reward") < 1).fill_null(False) if scoring.incorrect == "drop" else pl.lit(False)
    frame = frame.with_columns(dropped=pl.when(~pl.col("usable")).then(pl.lit("unusable"))
                               .when(incorrect).then(pl.lit("incorrect"))
                               .when(pl.col("score").is_null()).then(pl.lit("unlabelled")))
    group = ["prompt_id", "seed"] if "seed" in scoring.per else ["prompt_id"]
    order = frame.with_row_index("row").filter(pl.col("dropped").is_null()).sort(
        [*group, "score", "candidate_id"], descending=[*(False for _ in group), True, False])
    ranks = order.with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over(group)).select("row", "rank")
    frame = frame.with_row_index("row").join(ranks, on="row", how="left", maintain_order="left")
    below = (pl.col("rank") > scoring.top_k).fill_null(False)
    return frame.with_columns(
        dropped=pl.when(below).then(pl.lit("below_top_k")).otherwise(pl.col("dropped")),
        kept=pl.col("rank").is_not_null() & ~below,
    ).select(schema.SCORES.names)


class Scores:
    """The stage: `scores/shard-<n>.parquet`. Needs `write_stats` first."""

    name, unit = "score", "candidates"

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """One file a shard."""
        return [shard_file("scores", shard)]

    def key(self, ctx: Context, shard: int) -> str:
        """The shard's labels, the run's moments and the scoring config."""
        return inputs_key(ctx.store, "scores", 1, [*_inputs(ctx, shard), STATS], ctx.config.scoring.model_dump())

    def size(self, ctx: Context, shard: int) -> int:
        """Verified rows."""
        manifest = ctx.store.manifest(shard_file("verified", shard))
        return manifest.rows or 0 if manifest else 0

    def run(self, ctx: Context, shard: int) -> None:
        """Score and write."""
        frame = labelled(ctx, shard)
        scores = score_shard(frame, read_stats(ctx), ctx.config.scoring)
        table = scores.to_arrow().cast(schema.SCORES)
        dropped = {str(k): n for k, n in scores.drop_nulls("dropped").group_by("dropped").len().iter_rows()}
        ctx.store.write_table(self.outputs(ctx, shard)[0], table, self.key(ctx, shard),
                              kept=int(scores["kept"].sum()), dropped=dropped)
        ctx.progress.advance(self.name, frame.height, kept=int(scores["kept"].sum()))


def _inputs(ctx: Context, shard: int) -> list[str]:
    return [shard_file("verified", shard), *(labeller.path(shard) for labeller in labellers(ctx.config.labels))]


def write_stats(ctx: Context) -> None:
    """Mean and standard deviation of every label over the run's usable rows."""
    key = digest("stats", 2, [inputs_key(ctx.store, "stats", 2, _inputs(ctx, n)) for n in range(ctx.shards)])
    if ctx.store.state(STATS, key) == "done":
        return
    stats: Stats = dict.fromkeys(LABELS, Moments())
    for shard in range(ctx.shards):
        frame = labelled(ctx, shard).filter("usable")
        stats = {name: moments + Moments.of(frame[name]) for name, moments in stats.items()}
    raw: dict[str, Any] = {name: asdict(m) | {"sd": m.sd} for name, m in stats.items()}
    ctx.store.write_bytes(STATS, json.dumps(raw, indent=1).encode() + b"\n", key)


def read_stats(ctx: Context) -> Stats:
    """What `write_stats` wrote."""
    return {name: Moments(m["n"], m["mean"], m["m2"]) for name, m in ctx.store.read_json(STATS).items()}
