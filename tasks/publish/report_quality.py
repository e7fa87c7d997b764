"""What the report says of the quality labels, added up shard by shard: the judge, its tournaments, or a reward model.

Sums and counts, and four numbers a (prompt, seed) group for the quantiles.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tasks.publish.intervals import ratio, rounded, share_interval

Row = dict[str, Any]
COMPARISON_COLUMNS = ["prompt_id", "a", "b", "p_first", "p_second", "outcome", "outside", "reason"]
GROUP = ("prompt_id", "seed")
_OF_GROUP = ("settled", "reliability", "prior_sd", "dispersion", "rating_flags")
_QUANTILES = {"p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9}
_BINS = 10


def distribution(values: npt.ArrayLike) -> Row | None:
    """n, mean, least, most and quantiles (linear between neighbours); None without values."""
    every = np.asarray(values, float)
    if not len(every):
        return None
    found = dict(zip(_QUANTILES, np.quantile(every, list(_QUANTILES.values())).tolist(), strict=True))
    return {"n": len(every), **{k: rounded(v) for k, v in (
        {"mean": every.mean(), "least": every.min()} | found | {"most": every.max()}).items()}}


class Sums(collections.defaultdict[str, Any]):
    """Sums by name, 0 where nothing was added."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, **values: Any) -> None:
        """Add to each."""
        for name, value in values.items():
            self[name] += value


class Agreement:
    """How often the better of two answers is the right one, of pairs with one right and one wrong answer."""

    def __init__(self) -> None:
        self._sums = Sums()

    def add(self, pairs: pl.DataFrame) -> None:
        """Columns prompt_id (each in one call only), n (pairs), right (the right one was preferred), undecided."""
        prompts = pairs.group_by("prompt_id").agg(pl.col("n", "right", "undecided").sum()).filter(pl.col("n") > 0)
        n, s = prompts["n"].cast(pl.Float64), prompts["right"] + 0.5 * prompts["undecided"]
        self._sums.add(x_n=n.sum(), x_s=s.sum(), x_clusters=prompts.height, x_nn=(n * n).sum(), x_ss=(s * s).sum(),
                       x_ns=(n * s).sum(), undecided=prompts["undecided"].sum())

    def figures(self) -> Row | None:
        """Pairs, prompts, undecided pairs (each counts half) and the share with its interval, prompts as clusters."""
        if not self._sums["x_n"]:
            return None
        found = dict(self._sums) | {k: int(self._sums[k]) for k in ("x_n", "x_clusters", "undecided")}
        share, low, high = share_interval(found, "x")
        return {"pairs": found["x_n"], "prompts": found["x_clusters"], "undecided": found["undecided"],
                "agrees": share, "low": low, "high": high}


class JudgeTally:
    """The judge's own figures, from comparisons."""

    def __init__(self) -> None:
        self.reasons: collections.Counter[str] = collections.Counter()
        self.sums = Sums()
        self.agreement = Agreement()
        self._seen = False

    def add(self, pairs: pl.DataFrame, rewards: pl.DataFrame) -> None:
        """One shard's comparisons (COMPARISON_COLUMNS), and `candidate_id`, `reward` of its verified candidates."""
        self._seen = True
        judged = pairs.drop_nulls(["p_first", "p_second"])
        first, second = pl.col("p_first") - 0.5, pl.col("p_second") - 0.5
        seen = judged.select(
            flips=(first * second < 0).sum(), first_wins=((pl.col("p_first") + 1 - pl.col("p_second")) / 2).sum(),
            decisive=((first + second).abs()).sum()).to_dicts()[0]
        self.sums.add(**seen, pairs=pairs.height, judged=judged.height, outside=pairs["outside"].sum(),
                      outside_n=pairs["outside"].count())
        self.reasons.update(kind(r) for r in pairs.filter(pl.col("outcome").is_null())["reason"])
        known = rewards.drop_nulls("reward").select("candidate_id", right=pl.col("reward") >= 1)
        both = judged.drop_nulls("outcome")
        for player in ("a", "b"):
            both = both.join(known.rename({"candidate_id": player, "right": f"right_{player}"}), on=player)
        told = both.filter(pl.col("right_a") != pl.col("right_b"))
        undecided = pl.col("outcome") == 0.5
        self.agreement.add(told.select(
            "prompt_id", n=pl.lit(1), undecided=undecided.cast(pl.Int64),
            right=(~undecided & (pl.col("right_a") == (pl.col("outcome") > 0.5))).cast(pl.Int64)))

    def figures(self) -> Row | None:
        """What the report says of the judge; None where it did not judge."""
        if not self._seen:
            return None
        s = self.sums
        return {
            "comparisons": int(s["pairs"]), "judged": int(s["judged"]), "abstained": int(s["pairs"] - s["judged"]),
            "abstained_share": ratio(s["pairs"] - s["judged"], s["pairs"]),
            "reasons": dict(sorted(self.reasons.items())),
            "flips": int(s["flips"]), "flip_rate": ratio(s["flips"], s["judged"]),
            "outside": ratio(s["outside"], s["outside_n"]), "first_shown": ratio(s["first_wins"], s["judged"]),
            "decisiveness": ratio(s["decisive"], s["judged"]), "verifier": self.agreement.figures(),
        }


class GroupTally:
    """What the tournaments reached, group by group, and what they spent on a candidate."""

    def __init__(self) -> None:
        self._groups: list[pl.DataFrame] = []
        self._comparisons: collections.Counter[int] = collections.Counter()
        self._se = [0.0, 0]

    def add(self, frame: pl.DataFrame) -> None:
        """One shard's rows with their quality labels."""
        usable = frame.filter("usable")
        rated = usable.drop_nulls("rating")
        self._groups.append(usable.group_by("source", *GROUP).agg(
            *(pl.col(c).drop_nulls().first() for c in _OF_GROUP), rated=pl.col("rating").count()).drop(GROUP))
        self._comparisons.update(rated["comparisons"].drop_nulls().to_list())
        self._se[0] += float(rated["rating_se"].sum())
        self._se[1] += rated["rating_se"].count()

    def figures(self) -> Row:
        """Over all groups, and the same by source under `by_source`."""
        every = pl.concat(self._groups) if self._groups else pl.DataFrame(
            schema={"source": pl.String, "settled": pl.Boolean, "reliability": pl.Float64, "prior_sd": pl.Float64,
                    "dispersion": pl.Float64, "rating_flags": pl.String, "rated": pl.UInt32})
        spent = list(self._comparisons.elements())
        return {"rated": int(every["rated"].sum()), "mean_rating_se": ratio(*self._se),
                "comparisons_per_candidate": distribution(spent), "groups": _of_groups(every),
                "by_source": {str(source): _of_groups(part) for (source,), part in sorted(every.group_by("source"))}}


def _of_groups(groups: pl.DataFrame) -> Row:
    """Groups, those settled of those with something to settle, and how reliability and fit are distributed."""
    reliability = groups["reliability"].drop_nulls().to_numpy()
    flags: collections.Counter[str] = collections.Counter()
    for text in groups["rating_flags"].drop_nulls():
        flags.update(text.split(", "))
    told, settled = groups["settled"].count(), int(groups["settled"].sum())
    bins = np.histogram(np.clip(reliability, 0, 1), bins=_BINS, range=(0, 1))[0].tolist() if len(reliability) else None
    return {"n": groups.height, "rated": int((groups["rated"] > 0).sum()), "to_settle": told, "settled": settled,
            "settled_share": ratio(settled, told), "reliability": distribution(reliability),
            "reliability_bins": bins, "flags": dict(sorted(flags.items())),
            **{k: distribution(groups[k].drop_nulls().to_numpy()) for k in ("prior_sd", "dispersion")}}


class RewardModelTally:
    """The scores of a pointwise reward model."""

    def __init__(self) -> None:
        self.reasons: collections.Counter[str] = collections.Counter()
        self.agreement = Agreement()
        self._sums = Sums()

    def add(self, frame: pl.DataFrame) -> None:
        """One shard's rows with rm_score, rm_lead (over its group's mean) and rm_reason."""
        usable = frame.filter("usable")
        scored = usable.drop_nulls("rm_score")
        self.reasons.update(kind(r) for r in usable.filter(pl.col("rm_score").is_null())["rm_reason"])
        groups = scored.group_by(GROUP).len()
        self._sums.add(n=scored.height, groups=groups.height, s=scored["rm_score"].sum(),
                       ss=(scored["rm_score"] ** 2).sum(), within=(scored["rm_lead"] ** 2).sum())
        # pairs of one right and one wrong answer of a group, told by ranks (Mann and Whitney 1947)
        known = scored.drop_nulls("reward").with_columns(right=pl.col("reward") >= 1).with_columns(
            rank=pl.col("rm_score").rank("average").over(GROUP))
        of_each = {"r": pl.col("right").sum().cast(pl.Int64), "w": (~pl.col("right")).sum().cast(pl.Int64)}
        equal = known.group_by(*GROUP, "rm_score").agg(**of_each).group_by(GROUP).agg(
            undecided=(pl.col("r") * pl.col("w")).sum())
        told = known.group_by(GROUP).agg(ranks=pl.col("rank").filter("right").sum(), **of_each).join(equal, on=GROUP)
        self.agreement.add(told.select(
            "prompt_id", "undecided", n=pl.col("r") * pl.col("w"),
            right=pl.col("ranks") - pl.col("r") * (pl.col("r") + 1) / 2 - pl.col("undecided") / 2))

    def figures(self) -> Row:
        """Counts, spread over the run and within groups, agreement with the verifier."""
        s, n = self._sums, self._sums["n"]
        mean = s["s"] / n if n else None
        variance = max(0.0, s["ss"] / n - mean**2) if mean is not None else None
        return {"scored": int(n), "unscored": sum(self.reasons.values()), "reasons": dict(sorted(self.reasons.items())),
                "groups": int(s["groups"]), "mean": rounded(mean),
                "sd": rounded(None if variance is None else variance**0.5),
                "sd_in_group": rounded((s["within"] / n) ** 0.5 if n else None), "verifier": self.agreement.figures()}


def kind(reason: str | None) -> str:
    """`timeout` of `timeout: no answer in 3 s; ...`: details would make every abstention its own kind."""
    return (reason or "unknown").split(";")[0].split(":")[0].strip() or "unknown"
