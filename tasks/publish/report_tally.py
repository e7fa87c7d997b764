"""What the report counts, added up shard by shard: sums per heuristic and source, never rows.

A prompt lies in one shard with all its heuristics and seeds, so sums over prompts of per-prompt sums are
enough for means whose intervals know how many prompts there were.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl
from scipy.special import stdtrit

_Z95 = 1.959963984540054
_DIGITS = 6
_EXAMPLE_CHARS = 200

# metric -> column of its labels; what one prompt's seeds say of it is one cluster
METRICS = {"rating": "rating", "self_bleu": "self_bleu", "embedding_entropy": "embedding_entropy", "reward": "correct"}
TOTALS = ("asked", "answered", "usable", "kept", "tokens", "wrong")


def rounded(value: float | None) -> float | None:
    """The value to six decimals; None for what is no finite number."""
    return None if value is None or not math.isfinite(value) else round(float(value), _DIGITS)


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`, None where there is nothing to divide."""
    return rounded(part / whole) if part is not None and whole else None


def wilson(right: float, n: float) -> tuple[float | None, float | None]:
    """95 % score interval of a share (Wilson 1927); (None, None) without trials. `n` may be an effective size."""
    if n <= 0:
        return None, None
    p, z2 = right / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(max(0.0, p * (1 - p) / n + z2 / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def _spread(sums: Mapping[str, Any], metric: str) -> tuple[int, int, float, float]:
    """(values, clusters, mean, sum over clusters of (S_g - n_g mean)^2) from the sums of `prompt_sums`."""
    n, clusters = sums[f"{metric}_n"], sums[f"{metric}_clusters"]
    if not n:
        return 0, 0, math.nan, math.nan
    mean = sums[f"{metric}_s"] / n
    square = sums[f"{metric}_ss"] - 2 * mean * sums[f"{metric}_ns"] + mean**2 * sums[f"{metric}_nn"]
    return n, clusters, mean, max(0.0, square)


def mean_interval(sums: Mapping[str, Any], metric: str) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high): a ratio mean with the cluster-robust standard error, the prompts as clusters.

    se^2 = G/(G-1) * sum_g (S_g - n_g mean)^2 / n^2 (Cochran 1977, 2.31 and 6.12), Student's t with G-1 degrees
    of freedom. One prompt alone has a mean and no interval.
    """
    n, clusters, mean, square = _spread(sums, metric)
    if n == 0:
        return None, None, None
    if clusters < 2:
        return rounded(mean), None, None
    half = float(stdtrit(clusters - 1, 0.975)) * math.sqrt(clusters / (clusters - 1) * square) / n
    return rounded(mean), rounded(mean - half), rounded(mean + half)


def share_interval(sums: Mapping[str, Any], metric: str) -> tuple[float | None, float | None, float | None]:
    """(share, low, high): Wilson's interval at the effective sample size (Korn and Graubard 1998).

    Answers to one prompt resemble each other, so n = p(1-p)/var(p) with the prompts as clusters, at most
    the answers there are. With all right or all wrong nothing tells how alike they are: n is the prompts.
    """
    n, clusters, share, square = _spread(sums, metric)
    if n == 0:
        return None, None, None
    variance = square / n**2
    if 0 < share < 1:
        effective = min(float(n), share * (1 - share) / variance) if variance > 0 else float(n)
    else:
        effective = float(clusters)
    low, high = wilson(share * effective, effective)
    return rounded(share), rounded(low), rounded(high)


def prompt_sums(frame: pl.DataFrame) -> pl.DataFrame:
    """A row per (source, heuristic_id, prompt_id) with the counts and sums that all figures come from.

    `frame`: a shard's rows with the columns of `report_data.Gatherer._shard_rows`.
    """
    usable = pl.col("usable")
    diversity = ("self_bleu", "embedding_entropy")  # one value a (prompt, heuristic), repeated on its rows
    return frame.group_by("source", "heuristic_id", "prompt_id").agg(
        pl.len().cast(pl.Int64).alias("asked"), (pl.col("status") == "ok").sum().alias("answered"), usable.sum(),
        pl.col("kept").sum(), pl.col("completion_tokens").filter(usable).sum().alias("tokens"),
        (pl.col("reward") < 1).sum().alias("wrong"),
        *(pl.col(c).count().alias(f"{m}_n") for m, c in METRICS.items() if c not in diversity),
        *(pl.col(c).sum().alias(f"{m}_s") for m, c in METRICS.items() if c not in diversity),
        *(pl.col(c).drop_nulls().first().is_not_null().alias(f"{c}_n") for c in diversity),
        *(pl.col(c).drop_nulls().first().fill_null(0.0).alias(f"{c}_s") for c in diversity),
    ).with_columns(pl.col(c).cast(pl.Int64) for c in [*TOTALS, *(f"{m}_n" for m in METRICS)])


def cluster_sums(by_prompt: pl.DataFrame, *by: str) -> pl.DataFrame:
    """A row per key in `by`, with the prompts of `prompt_sums` as clusters."""
    wanted = [*TOTALS, *(f"{m}_{part}" for m in METRICS for part in ("n", "s"))]
    clusters = by_prompt.group_by(*by, "prompt_id").agg(pl.col(wanted).sum())
    return clusters.group_by(by).agg(pl.col(list(TOTALS)).sum(), *(e for m in METRICS for e in _cluster_sums(m)))


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
    for metric in ("rating", "self_bleu", "embedding_entropy"):
        mean, low, high = mean_interval(sums, metric)
        out |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
    share, low, high = share_interval(sums, "reward")
    return out | {"rated": int(sums["rating_n"]), "rated_prompts": int(sums["rating_clusters"]),
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


class JudgeTally:
    """The judge's own figures, from comparisons."""

    def __init__(self) -> None:
        self.reasons: collections.Counter[str] = collections.Counter()
        self.sums: collections.Counter[str] = collections.Counter()
        self._seen = False

    def add(self, pairs: pl.DataFrame, rewards: pl.DataFrame) -> None:
        """One shard's comparisons, and `candidate_id`, `reward` of its verified candidates."""
        self._seen = True
        judged = pairs.drop_nulls(["p_first", "p_second"])
        first, second = pl.col("p_first") - 0.5, pl.col("p_second") - 0.5
        seen = judged.select(
            flips=(first * second < 0).sum(), first_wins=((pl.col("p_first") + 1 - pl.col("p_second")) / 2).sum(),
            decisive=((first + second).abs()).sum()).to_dicts()[0]
        self.sums.update(seen | {  # type: ignore[arg-type]
            "pairs": pairs.height, "judged": judged.height, "outside": pairs["outside"].sum(),
            "outside_n": pairs["outside"].count()})
        self.reasons.update(_kind(r) for r in pairs.filter(pl.col("outcome").is_null())["reason"])
        known = rewards.drop_nulls("reward")
        both = judged.drop_nulls("outcome")
        for player in ("a", "b"):
            both = both.join(known.rename({"candidate_id": player, "reward": f"reward_{player}"}), on=player)
        told = both.filter(((pl.col("reward_a") >= 1) != (pl.col("reward_b") >= 1)) & (pl.col("outcome") != 0.5))
        agrees = ((told["reward_a"] >= 1) == (told["outcome"] > 0.5)).sum()
        self.sums.update(told=told.height, agrees=int(agrees))

    def figures(self) -> dict[str, Any] | None:
        """What the report says of the judge; None where it did not judge."""
        if not self._seen:
            return None
        s = self.sums
        low, high = wilson(s["agrees"], s["told"])
        return {
            "comparisons": int(s["pairs"]), "calls": 2 * int(s["pairs"]), "judged": int(s["judged"]),
            "abstained": int(s["pairs"] - s["judged"]), "reasons": dict(sorted(self.reasons.items())),
            "flips": int(s["flips"]), "flip_rate": ratio(s["flips"], s["judged"]),
            "outside": ratio(s["outside"], s["outside_n"]), "first_shown": ratio(s["first_wins"], s["judged"]),
            "decisiveness": ratio(s["decisive"], s["judged"]),
            "verifier": {"pairs": int(s["told"]), "agrees": ratio(s["agrees"], s["told"]),
                         "low": rounded(low), "high": rounded(high)} if s["told"] else None,
        }


def _kind(reason: str | None) -> str:
    """`timeout` of `timeout: no answer in 3 s; ...`: details would make every abstention its own kind."""
    return (reason or "unknown").split(";")[0].split(":")[0].strip() or "unknown"


def quantile(lengths: Iterable[tuple[int, int]], q: float) -> int | None:
    """The smallest length that a share `q` of (length, count) pairs does not exceed."""
    ordered = sorted(lengths)
    total, seen = sum(n for _, n in ordered), 0
    for length, n in ordered:
        seen += n
        if seen >= q * total:
            return length
    return None
