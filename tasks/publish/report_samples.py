"""Rows of the report to read: the best of the dataset, each with the lowest-rated answer of its group."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

import polars as pl

from tasks.context import Context
from tasks.core.identity import digest
from tasks.generation.prompts import read_shard
from tasks.publish.intervals import rounded
from tasks.stage import shard_file

_SAMPLES, _SAMPLE_CHARS = 6, 600

Row = dict[str, Any]


class Samples:
    """The best kept rows of each source so far: scores and ids, texts are read at the end."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self._best: dict[str, list[tuple[float, str, int, str]]] = {}

    def add(self, frame: pl.DataFrame, shard: int) -> None:
        """Keep the shard's best rows per source in the running; equal scores are drawn by the run's seed."""
        rows = frame.filter(pl.col("kept") & pl.col("score").is_not_null())
        # a prompt shows once: its best row
        rows = rows.sort("score", "candidate_id", descending=[True, False]).unique(
            "prompt_id", keep="first", maintain_order=True)
        for source, score, cid in rows.select("source", "score", "candidate_id").iter_rows():
            lot = digest("sample", self.ctx.config.run_seed, cid)
            pool = self._best.setdefault(source, [])
            heapq.heappush(pool, (rounded(score) or 0.0, lot, shard, cid))
            if len(pool) > _SAMPLES:
                heapq.heappop(pool)

    def rows(self, read: Callable[[int], pl.DataFrame], quality: str) -> list[Row]:
        """Highest-scored kept rows, the sources in turn, each with its group's lowest-scored answer.

        `read(shard)`: its rows as `add` got them; `quality`: the column that says which answer is the lowest.
        """
        pools = [sorted(self._best[s.name], reverse=True) for s in self.ctx.config.sources if s.name in self._best]
        turns = (p for turn in itertools.zip_longest(*pools) for p in turn if p is not None)
        chosen = list(itertools.islice(turns, _SAMPLES))
        by_shard: dict[int, dict[str, Row]] = {}
        for shard in sorted({shard for _, _, shard, _ in chosen}):
            by_shard[shard] = self._rows(shard, read(shard), quality, [cid for _, _, s, cid in chosen if s == shard])
        return [by_shard[shard][cid] for _, _, shard, cid in chosen]

    def _rows(self, shard: int, frame: pl.DataFrame, quality: str, wanted: list[str]) -> dict[str, Row]:
        frame = frame.filter("usable").with_columns(pl.col("score").cast(pl.Float64))
        groups = {(r["prompt_id"], r["seed"]): r for r in frame.filter(pl.col("candidate_id").is_in(wanted)).to_dicts()}
        worst: dict[str, Row] = {}
        for row in frame.drop_nulls(quality).sort(quality, "candidate_id").to_dicts():
            if (best := groups.get((row["prompt_id"], row["seed"]))) and best["candidate_id"] not in worst:
                worst[best["candidate_id"]] = row
        needed = {*wanted, *(r["candidate_id"] for r in worst.values())}
        read = pl.from_arrow(self.ctx.store.read(shard_file("verified", shard), ["candidate_id", "text"]))
        assert isinstance(read, pl.DataFrame)
        texts = dict(read.filter(pl.col("candidate_id").is_in(list(needed))).iter_rows())
        prompts = {p["prompt_id"]: p for p in read_shard(self.ctx.store, shard).to_pylist()}
        names = {h.id: h.name for h in self.ctx.heuristics}

        def shown(row: Row) -> Row:
            return {"heuristic": names.get(row["heuristic_id"], row["heuristic_id"]),
                    "text": cut(texts[row["candidate_id"]]), "rating": rounded(row["rating"]),
                    "rm_score": rounded(row["rm_score"]), "reward": rounded(row["reward"]),
                    "score": rounded(row["score"])}

        out = {}
        for row in groups.values():
            prompt, other = prompts[row["prompt_id"]], worst.get(row["candidate_id"])
            differs = other is not None and texts[other["candidate_id"]] != texts[row["candidate_id"]]
            out[row["candidate_id"]] = {
                "source": row["source"], "seed": row["seed"], "prompt": cut(prompt["prompt"]),
                "ground_truth": cut(prompt["ground_truth"], 200), **shown(row),
                "worst": shown(other) if other is not None and differs else None}
        return out


def cut(text: str | None, chars: int = _SAMPLE_CHARS) -> str | None:
    """The text, cut with an ellipsis after `chars` characters."""
    return text if text is None or len(text) <= chars else text[:chars].rstrip() + " \u2026"
