"""The numbers of a run, gathered shard by shard into one JSON-able mapping. Missing is None, never NaN."""

from __future__ import annotations

import collections
import heapq
import itertools
from typing import Any

import polars as pl

from tasks.context import Context
from tasks.core.heuristics import Heuristic
from tasks.core.identity import digest
from tasks.generation.prompts import PATH as PROMPTS
from tasks.generation.prompts import read_shard
from tasks.publish.report_tally import (
    HeuristicTally,
    JudgeTally,
    RequestTally,
    figures,
    quantile,
    ratio,
    rounded,
)
from tasks.stage import shard_file

_COLUMNS = ["candidate_id", "prompt_id", "heuristic_id", "seed", "source", "finish_reason", "status", "error",
            "attempts", "server", "latency_s", "seed_effective", "dialect", "completion_tokens", "usable"]
_LABELS = {"quality": ("rating", "rating_se"), "diversity": ("self_bleu", "embedding_entropy"),
           "verifiers": ("reward", "verdict_reason")}
_TYPES = {"verdict_reason": pl.String, "dropped": pl.String, "kept": pl.Boolean}
_BINS = 25
_SAMPLES, _SAMPLE_CHARS = 6, 600
_NAMED = 20
_FACTS = ("planned", "usable", "repaired", "tokens", "attempts", "at_max_new_tokens")  # of a verified shard's manifest

Row = dict[str, Any]


def gather(ctx: Context) -> dict[str, Any]:
    """All numbers of the report; memory is one shard's rows and a row per heuristic and source."""
    return Gatherer(ctx).gather()


class Gatherer:
    """One pass over the run's shards."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.tally, self.requests, self.judge = HeuristicTally(), RequestTally(), JudgeTally()
        self.funnel: collections.Counter[str] = collections.Counter()
        self.drops: collections.Counter[str] = collections.Counter()
        self.unverified: collections.Counter[str] = collections.Counter()
        self.labels: set[str] = set()
        self.scored, self.shards = False, 0
        self.rating_se: list[float] = [0.0, 0.0]
        self.best: dict[str, list[tuple[float, str, int, str]]] = {}

    def gather(self) -> dict[str, Any]:
        """Read every shard, then put the figures together."""
        ctx, config = self.ctx, self.ctx.config
        for shard in range(ctx.shards):
            if ctx.store.exists(shard_file("verified", shard)):
                self._add(shard)
                self.shards += 1
        heuristics = self._heuristics()
        sums = self.tally.overall()
        prompts = ctx.store.manifest(PROMPTS)
        return {
            "run": config.run, "created": ctx.raw.get("created"),
            "config_digest": ctx.raw.get("config_digest") or digest(config.identity()),
            "model": config.model.path, "revision": config.model.revision,
            "judge_model": config.judge_model.path if "quality" in self.labels else None,
            "labels": sorted(self.labels), "prompts": prompts.rows if prompts else None,
            "seeds": len(config.seeds), "shards": ctx.shards, "shards_verified": self.shards,
            "top_k": config.scoring.top_k,
            "per": list(config.scoring.per), "weights": config.scoring.weights.model_dump(),
            "incorrect": config.scoring.incorrect,
            "max_new_tokens": ctx.generation("generator")["max_new_tokens"],
            "ranked_by": _ranked_by(heuristics), "overall": self._figures(sums) if sums else None,
            "funnel": self._funnel(), "drops": dict(sorted(self.drops.items())),
            "failures": self._failures(), "requests": self._requests(), "lengths": self._lengths(),
            "heuristics": heuristics, "sources": self._sources(), "judge": self._judge(),
            "unverified": dict(sorted(self.unverified.items())), "verification": self._verification(),
            "dataset": self._dataset(), "samples": self._samples(), "servers": self._servers(),
            "versions": ctx.raw.get("versions") or {},
        }

    # -- reading ---------------------------------------------------------------------------------

    def _add(self, shard: int) -> None:
        frame = self._shard_rows(shard)
        self.tally.add(frame)
        self.requests.add(frame)
        usable = frame.filter("usable")
        has_label = pl.any_horizontal(pl.col(c).is_not_null() for c in
                                      ("rating", "self_bleu", "embedding_entropy", "reward"))
        self.funnel.update(
            rows=frame.height, answered=int((frame["status"] == "ok").sum()), usable=usable.height,
            labelled=usable.filter(has_label).height, checked=usable["reward"].count(),
            correct=int((usable["reward"] >= 1).sum()), kept=int(frame["kept"].sum()))
        self.drops.update(dict(frame.drop_nulls("dropped").group_by("dropped").len().iter_rows()))
        silent = frame.filter(pl.col("reward").is_null() & pl.col("verdict_reason").is_not_null())
        self.unverified.update(r.split(":")[0] for r in silent["verdict_reason"])
        self.rating_se[0] += float(frame["rating_se"].sum())
        self.rating_se[1] += frame["rating_se"].count()
        comparisons = shard_file("comparisons", shard)
        if "quality" in self.ctx.config.labels and self.ctx.store.exists(comparisons):
            pairs = self._read(comparisons, ["a", "b", "p_first", "p_second", "outcome", "outside", "reason"])
            self.judge.add(pairs, frame.select("candidate_id", "reward"))
        self._consider(frame, shard)

    def _read(self, path: str, columns: list[str]) -> pl.DataFrame:
        frame = pl.from_arrow(self.ctx.store.read(path, columns))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def _shard_rows(self, shard: int) -> pl.DataFrame:
        """A shard's verified rows with labels and scores; what is not there is null."""
        frame = self._read(shard_file("verified", shard), _COLUMNS)
        wanted: list[tuple[str, tuple[str, ...]]] = [
            (f"labels/{name}", columns) for name, columns in _LABELS.items() if name in self.ctx.config.labels]
        for folder, columns in [*wanted, ("scores", ("score", "kept", "dropped"))]:
            path = shard_file(folder, shard)
            if self.ctx.store.exists(path):
                frame = frame.join(self._read(path, ["candidate_id", *columns]), on="candidate_id", how="left",
                                   maintain_order="left")
                self.scored = self.scored or folder == "scores"
                self.labels |= {folder.removeprefix("labels/")} & set(_LABELS)
        every = [c for columns in _LABELS.values() for c in columns] + ["score", "kept", "dropped"]
        frame = frame.with_columns(pl.lit(None, _TYPES.get(c, pl.Float64)).alias(c)
                                   for c in every if c not in frame.columns)
        kept = pl.col("kept").fill_null(False)
        return frame.with_columns(kept, correct=(pl.col("reward") >= 1).cast(pl.Int64))

    # -- putting together ------------------------------------------------------------------------

    def _figures(self, sums: Row) -> Row:
        return figures(sums) | ({} if self.scored else {"kept": None, "kept_share": None})

    def _heuristics(self) -> list[Row]:
        """Every heuristic with its figures, best first."""
        overall, by_source = self.tally.by_heuristic(), self.tally.by_heuristic_and_source()
        out = []
        for heuristic in self.ctx.heuristics:
            if (sums := overall.get(heuristic.id)) is None:
                continue
            sources = {s.name: self._figures(by_source[heuristic.id, s.name]) for s in self.ctx.config.sources
                       if (heuristic.id, s.name) in by_source}
            out.append(_about(heuristic) | self._figures(sums) | {"sources": sources})
        rank = _ranked_by(out)
        out.sort(key=lambda h: (h[rank] is None, -(h[rank] or 0.0)) if rank else (False, 0.0))
        return [{"place": n} | h for n, h in enumerate(out, 1)]

    def _sources(self) -> list[Row]:
        manifest = self.ctx.store.manifest(PROMPTS)
        read = manifest.facts.get("sources", {}) if manifest else {}
        rows = self.tally.by_source()
        return [{"name": s.name, "verifier": s.verifier, "diversity": s.diversity, "license": s.license,
                 "prompts": None, "rows": None, "copies": None, "malformed": None}
                | {k: read.get(s.name, {}).get(k) for k in ("prompts", "rows", "copies", "malformed")}
                | {"figures": self._figures(rows[s.name]) if s.name in rows else None}
                for s in self.ctx.config.sources]

    def _funnel(self) -> Row:
        f, prompts = self.funnel, self.ctx.store.manifest(PROMPTS)
        cells = len(self.ctx.heuristics) * len(self.ctx.config.seeds)
        labelled = f["labelled"] if self.labels else None
        checked = f["checked"] if "verifiers" in self.labels else None
        return {"planned": (prompts.rows or 0) * cells if prompts else f["rows"], "answered": f["answered"],
                "usable": f["usable"], "labelled": labelled, "checked": checked,
                "correct": f["correct"] if checked is not None else None,
                "kept": f["kept"] if self.scored else None}

    def _failures(self) -> Row:
        r = self.requests
        return {"total": sum(r.kinds.values()), "share": ratio(sum(r.kinds.values()), r.counts["rows"]),
                "by_kind": dict(sorted(r.kinds.items())), "examples": dict(sorted(r.examples.items())),
                "by_server": {url: int(s["failed"]) for url, s in sorted(r.servers.items()) if s["failed"]}}

    def _requests(self) -> Row:
        r = self.requests
        return {"rows": r.counts["rows"], "attempts": r.counts["attempts"],
                "retries": r.counts["attempts"] - r.counts["sent"], "completion_tokens": r.counts["tokens"],
                "finish_reasons": dict(sorted(r.finish.items())), "seed_effective": dict(sorted(r.seeds.items())),
                "dialects": dict(sorted(r.dialects.items()))}

    def _lengths(self) -> Row | None:
        """Completion lengths in tokens: quantiles, and a histogram by finish reason."""
        by_reason = self.requests.lengths
        every = list(itertools.chain.from_iterable(c.items() for c in by_reason.values()))
        if not every:
            return None
        longest = max(length for length, _ in every)
        width = -(-(longest + 1) // _BINS)
        bins = {reason: [0] * (longest // width + 1) for reason in sorted(by_reason)}
        for reason, counts in by_reason.items():
            for length, n in counts.items():
                bins[reason][length // width] += n
        total = sum(n for _, n in every)
        return {"n": total, "mean": rounded(sum(length * n for length, n in every) / total), "longest": longest,
                "median": quantile(every, 0.5), "p90": quantile(every, 0.9), "bin_width": width, "bins": bins}

    def _judge(self) -> Row | None:
        found = self.judge.figures()
        if found is None or "quality" not in self.labels:
            return None
        return {"model": self.ctx.config.judge_model.path, "template": self.ctx.config.quality.template} | found | {
            "mean_rating_se": ratio(*self.rating_se)}

    def _manifests(self) -> list[Any]:
        found = (self.ctx.store.manifest(shard_file("verified", n)) for n in range(self.ctx.shards))
        return [m for m in found if m]

    def _verification(self) -> Row:
        """What the checks of the grid found, over all shards: `found` before repair, `defects` after it."""
        counts: collections.Counter[str] = collections.Counter()
        defects: collections.Counter[str] = collections.Counter()
        found: collections.Counter[str] = collections.Counter()
        cells: list[Row] = []
        for manifest in self._manifests():
            facts = manifest.facts
            counts.update({k: facts.get(k) or 0 for k in _FACTS})
            counts["dropped_prompts"] += len(facts.get("dropped_prompts") or ())
            defects.update(facts.get("defects") or {})
            found.update(facts.get("found") or facts.get("defects") or {})
            cells += (facts.get("cells") or [])[:_NAMED - len(cells)]
        return {"policy": self.ctx.config.limits.incomplete_prompts,
                **{k: int(counts[k]) for k in (*_FACTS, "dropped_prompts")},
                "found": dict(sorted(found.items())), "defects": dict(sorted(defects.items())), "cells": cells}

    def _dataset(self) -> dict[str, int]:
        manifests = {s: self.ctx.store.manifest(f"dataset/{s}.parquet") for s in ("train", "validation")}
        return {split: m.rows or 0 for split, m in manifests.items() if m}

    def _servers(self) -> list[Row]:
        """Who generated, by address; rows that no server answered are under `unknown`.

        Servers of the run that have no row stand there too; `answered`: whether it ever said what it is.
        """
        out = []
        for record in (self.ctx.raw.get("servers") or {}).get("generator") or []:
            if record["url"] not in self.requests.servers:
                out.append({"url": record["url"], "rows": 0, "failed": 0, "tokens": 0, "mean_latency_s": None,
                            "answered": "honours_seeds" in record})
        for url, s in sorted(self.requests.servers.items()):
            out.append({"url": url, "rows": int(s["rows"]), "failed": int(s["failed"]), "tokens": int(s["tokens"]),
                        "mean_latency_s": ratio(s["latency_s"], s["timed"]), "answered": True})
        return sorted(out, key=lambda s: s["url"])

    # -- samples ---------------------------------------------------------------------------------

    def _consider(self, frame: pl.DataFrame, shard: int) -> None:
        """Keep the shard's best rows per source in the running; equal scores are drawn by the run's seed."""
        rows = frame.filter(pl.col("kept") & pl.col("score").is_not_null())
        # a prompt shows once: its best row
        rows = rows.sort("score", "candidate_id", descending=[True, False]).unique(
            "prompt_id", keep="first", maintain_order=True)
        for source, score, cid in rows.select("source", "score", "candidate_id").iter_rows():
            lot = digest("sample", self.ctx.config.run_seed, cid)
            pool = self.best.setdefault(source, [])
            heapq.heappush(pool, (rounded(score) or 0.0, lot, shard, cid))
            if len(pool) > _SAMPLES:
                heapq.heappop(pool)

    def _samples(self) -> list[Row]:
        """Highest-scored kept rows, the sources in turn, each with its group's lowest-scored answer."""
        pools = [sorted(self.best[s.name], reverse=True) for s in self.ctx.config.sources if s.name in self.best]
        turns = (p for turn in itertools.zip_longest(*pools) for p in turn if p is not None)
        chosen = list(itertools.islice(turns, _SAMPLES))
        by_shard: dict[int, dict[str, Row]] = {}
        for shard in sorted({shard for _, _, shard, _ in chosen}):
            by_shard[shard] = self._sample_rows(shard, [cid for _, _, s, cid in chosen if s == shard])
        return [by_shard[shard][cid] for _, _, shard, cid in chosen]

    def _sample_rows(self, shard: int, wanted: list[str]) -> dict[str, Row]:
        frame = self._shard_rows(shard).filter("usable").with_columns(pl.col("score").cast(pl.Float64))
        groups = {(r["prompt_id"], r["seed"]): r for r in frame.filter(pl.col("candidate_id").is_in(wanted)).to_dicts()}
        worst: dict[str, Row] = {}
        for row in frame.drop_nulls("rating").sort("rating", "candidate_id").to_dicts():
            if (best := groups.get((row["prompt_id"], row["seed"]))) and best["candidate_id"] not in worst:
                worst[best["candidate_id"]] = row
        needed = {*wanted, *(r["candidate_id"] for r in worst.values())}
        texts = dict(self._read(shard_file("verified", shard), ["candidate_id", "text"]).filter(
            pl.col("candidate_id").is_in(list(needed))).iter_rows())
        prompts = {p["prompt_id"]: p for p in read_shard(self.ctx.store, shard).to_pylist()}
        names = {h.id: h.name for h in self.ctx.heuristics}

        def shown(row: Row) -> Row:
            return {"heuristic": names.get(row["heuristic_id"], row["heuristic_id"]),
                    "text": cut(texts[row["candidate_id"]]), "rating": rounded(row["rating"]),
                    "reward": rounded(row["reward"]), "score": rounded(row["score"])}

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


def _about(heuristic: Heuristic) -> Row:
    cuts = [p.name for p in heuristic.processors if p.name != "temperature"]
    heat = [p.value for p in heuristic.processors if p.name == "temperature"]
    return {"id": heuristic.id, "name": heuristic.name, "aliases": list(heuristic.aliases),
            "description": heuristic.describe(), "family": " + ".join(cuts) or "no truncation",
            "temperature": heat[0] if len(heat) == 1 else (1.0 if not heat else None),
            "processors": [{"name": p.name, "params": p.params} for p in heuristic.processors]}


def _ranked_by(heuristics: list[Row]) -> str | None:
    """What heuristics are ranked by: the best label there is."""
    for key in ("rating", "pass_rate", "embedding_entropy"):
        if any(h[key] is not None for h in heuristics):
            return key
    return None
