"""What the report counts, added up shard by shard: sums per heuristic and source, never rows.

A prompt lies in one shard with all its heuristics and seeds, so sums over prompts of per-prompt sums are
enough for means whose intervals know how many prompts there were.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from tasks.publish.intervals import mean_interval, ratio, share_interval

_EXAMPLE_CHARS = 200

# metric -> column of its labels; what one prompt's seeds say of it is one cluster
METRICS = {"rating": "rating", "rm_score": "rm_lead", "self_bleu": "self_bleu",
           "embedding_entropy": "embedding_entropy", "reward": "correct"}
CENTRED = ("rating", "rm_score")  # 0 in every group, so that a mean over all heuristics says nothing
TOTALS = ("asked", "answered", "usable", "kept", "tokens", "wrong")
ERRORS = "rating_v"  # sum of the squared standard errors of the ratings


def prompt_sums(frame: pl.DataFrame) -> pl.DataFrame:
    """A row per (source, heuristic_id, prompt_id) with the counts and sums that all figures come from.

    `frame`: a shard's rows with the columns of `report_data.Gatherer._shard_rows`.
    """
    usable = pl.col("usable")
    diversity = ("self_bleu", "embedding_entropy")  # one value a (prompt, heuristic), repeated on its rows
    return frame.group_by("source", "heuristic_id", "prompt_id").agg(
        pl.len().cast(pl.Int64).alias("asked"), (pl.col("status") == "ok").sum().alias("answered"), usable.sum(),
        pl.col("kept").sum(), pl.col("completion_tokens").filter(usable).sum().alias("tokens"),
        (pl.col("reward") < 1).sum().alias("wrong"), (pl.col("rating_se") ** 2).sum().alias(ERRORS),
        *(pl.col(c).count().alias(f"{m}_n") for m, c in METRICS.items() if c not in diversity),
        *(pl.col(c).sum().alias(f"{m}_s") for m, c in METRICS.items() if c not in diversity),
        *(pl.col(c).drop_nulls().first().is_not_null().alias(f"{c}_n") for c in diversity),
        *(pl.col(c).drop_nulls().first().fill_null(0.0).alias(f"{c}_s") for c in diversity),
    ).with_columns(pl.col(c).cast(pl.Int64) for c in [*TOTALS, *(f"{m}_n" for m in METRICS)])


def cluster_sums(by_prompt: pl.DataFrame, *by: str) -> pl.DataFrame:
    """A row per key in `by`, with the prompts of `prompt_sums` as clusters."""
    wanted = [*TOTALS, ERRORS, *(f"{m}_{part}" for m in METRICS for part in ("n", "s"))]
    clusters = by_prompt.group_by(*by, "prompt_id").agg(pl.col(wanted).sum())
    return clusters.group_by(by).agg(pl.col(*TOTALS, ERRORS).sum(), *(e for m in METRICS for e in _cluster_sums(m)))


def _cluster_sums(metric: str) -> list[pl.Expr]:
    n, s = pl.col(f"{metric}_n").cast(pl.Int64), pl.col(f"{metric}_s").cast(pl.Float64)
    return [n.sum(), s.sum(), (n > 0).cast(pl.Int64).sum().alias(f"{metric}_clusters"),
            (n * n).sum().alias(f"{metric}_nn"), (s * s).sum().alias(f"{metric}_ss"),
            (n * s).sum().alias(f"{metric}_ns")]


class HeuristicTally:
    """Sums per (source, heuristic), and per source over all heuristics."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], pl.DataFrame] = {}

    def add(self, frame: pl.DataFrame) -> None:
        """One shard's rows."""
        by_prompt = prompt_sums(frame)
        for by in (("source", "heuristic_id"), ("source",)):
            sums = cluster_sums(by_prompt, *by)
            known = [self._sums[by]] if by in self._sums else []
            self._sums[by] = pl.concat([*known, sums]).group_by(by).agg(pl.all().sum())

    def by_heuristic(self) -> dict[str, dict[str, Any]]:
        """Sums over all sources by heuristic_id."""
        if not self._sums:
            return {}
        sums = self._sums["source", "heuristic_id"].drop("source").group_by("heuristic_id").agg(pl.all().sum())
        return {row["heuristic_id"]: row for row in sums.to_dicts()}

    def by_heuristic_and_source(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Sums by (heuristic_id, source)."""
        rows = self._sums["source", "heuristic_id"].to_dicts() if self._sums else []
        return {(row["heuristic_id"], row["source"]): row for row in rows}

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Sums over all heuristics by source."""
        rows = self._sums["source",].to_dicts() if self._sums else []
        return {row["source"]: row for row in rows}

    def overall(self) -> dict[str, Any] | None:
        """Sums over everything."""
        return self._sums["source",].drop("source").sum().to_dicts()[0] if self._sums else None


def figures(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one heuristic, or of one heuristic on one source, from its sums."""
    out: dict[str, Any] = {k: int(sums[k]) for k in ("asked", "answered", "usable", "kept")}
    out |= {"failed": out["asked"] - out["answered"], "kept_share": ratio(sums["kept"], sums["usable"]),
            "mean_tokens": ratio(sums["tokens"], sums["usable"])}
    for metric in (*CENTRED, "self_bleu", "embedding_entropy"):
        mean, low, high = mean_interval(sums, metric)
        out |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
    share, low, high = share_interval(sums, "reward")
    quality = "rating" if sums["rating_n"] else "rm_score"
    return out | {"rated": int(sums[f"{quality}_n"]), "rated_prompts": int(sums[f"{quality}_clusters"]),
                  "pass_rate": share, "pass_low": low, "pass_high": high, "checked": int(sums["reward_n"]),
                  "correct": int(sums["reward_s"]), "wrong": int(sums["wrong"])}


class RequestTally:
    """Failures, servers, lengths and finish reasons."""

    def __init__(self) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        self.finish: collections.Counter[str] = collections.Counter()
        self.lengths: dict[str, collections.Counter[int]] = {}
        self.servers: dict[str, collections.Counter[str]] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.seeds: collections.Counter[str] = collections.Counter()
        self.dialects: collections.Counter[str] = collections.Counter()

    def add(self, frame: pl.DataFrame) -> None:
        """One shard's rows."""
        sent = frame.filter(pl.col("attempts") > 0)
        self.counts.update(rows=frame.height, attempts=int(sent["attempts"].sum()), sent=sent.height,
                           tokens=int(frame["completion_tokens"].sum()))
        failed = frame.filter(pl.col("status") != "ok")
        self.kinds.update(_counted(failed["status"]))
        for kind, error in failed.drop_nulls("error").unique("status", keep="first", maintain_order=True).select(
                "status", "error").iter_rows():
            self.examples.setdefault(kind, error[:_EXAMPLE_CHARS])
        answered = frame.filter(pl.col("status") == "ok")
        self.finish.update(_counted(answered["finish_reason"]))
        for reason, length, n in answered.drop_nulls("completion_tokens").group_by(
                "finish_reason", "completion_tokens").len().iter_rows():
            self.lengths.setdefault(reason or "unknown", collections.Counter())[length] += n
        self.seeds.update(_counted(answered["seed_effective"].cast(pl.String)))
        self.dialects.update(_counted(answered["dialect"]))
        for row in frame.group_by("server").agg(
                pl.len().alias("rows"), (pl.col("status") != "ok").sum().alias("failed"),
                pl.col("completion_tokens").sum().alias("tokens"), pl.col("latency_s").sum().alias("latency_s"),
                pl.col("latency_s").count().alias("timed")).to_dicts():
            self.servers.setdefault(row.pop("server") or "unknown", collections.Counter()).update(row)


def _counted(column: pl.Series) -> dict[str, int]:
    counts = collections.Counter("unknown" if v is None else str(v) for v in column)
    return dict(counts)


def quantile(lengths: Iterable[tuple[int, int]], q: float) -> int | None:
    """The smallest length that a share `q` of (length, count) pairs does not exceed."""
    ordered = sorted(lengths)
    total, seen = sum(n for _, n in ordered), 0
    for length, n in ordered:
        seen += n
        if seen >= q * total:
            return length
    return None
