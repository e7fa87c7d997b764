"""The numbers of a run, gathered shard by shard into one JSON-able mapping. Missing is None, never NaN."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import polars as pl

from tasks.context import Context
from tasks.core.heuristics import Heuristic
from tasks.core.identity import digest
from tasks.generation.prompts import PATH as PROMPTS
from tasks.publish.intervals import ratio, rounded
from tasks.publish.report_quality import COMPARISON_COLUMNS, GroupTally, JudgeTally, RewardModelTally, kind
from tasks.publish.report_samples import Samples
from tasks.publish.report_tally import CENTRED, HeuristicTally, RequestTally, figures, quantile
from tasks.publish.score import lead
from tasks.stage import shard_file

_COLUMNS = ["candidate_id", "prompt_id", "heuristic_id", "seed", "source", "finish_reason", "status", "error",
            "attempts", "server", "latency_s", "seed_effective", "dialect", "completion_tokens", "usable"]
_LABELS = {"quality": ("rating", "rating_se", "comparisons", "rating_flags", "settled", "reliability", "prior_sd",
                       "dispersion", "rm_score", "rm_reason"),
           "diversity": ("self_bleu", "embedding_entropy"), "verifiers": ("reward", "verdict_reason")}
_TYPES: dict[str, Any] = {"verdict_reason": pl.String, "dropped": pl.String, "kept": pl.Boolean, "settled": pl.Boolean,
                          "rating_flags": pl.String, "rm_reason": pl.String, "comparisons": pl.Int32}
_BINS = 25
_NAMED = 20
_FACTS = ("planned", "usable", "repaired", "tokens", "attempts", "at_max_new_tokens")  # of a verified shard's manifest

Row = dict[str, Any]


def gather(ctx: Context) -> dict[str, Any]:
    """All numbers of the report; memory is one shard's rows, a row per heuristic and source, a few numbers a group."""
    return Gatherer(ctx).gather()


class Gatherer:
    """One pass over the run's shards."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.tally, self.requests, self.samples = HeuristicTally(), RequestTally(), Samples(ctx)
        self.judge, self.groups, self.reward_model = JudgeTally(), GroupTally(), RewardModelTally()
        self.funnel: collections.Counter[str] = collections.Counter()
        self.drops: collections.Counter[str] = collections.Counter()
        self.unverified: collections.Counter[str] = collections.Counter()
        self.labels: set[str] = set()
        self.scored, self.shards = False, 0

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
            "ranked_by": _ranked_by(heuristics), "overall": self._figures_of_all(sums) if sums else None,
            "funnel": self._funnel(), "drops": dict(sorted(self.drops.items())),
            "failures": self._failures(), "requests": self._requests(), "lengths": self._lengths(),
            "heuristics": heuristics, "sources": self._sources(), "quality": self._quality(),
            "judge": self._judge(), "reward_model": self._reward_model(),
            "unverified": dict(sorted(self.unverified.items())), "verification": self._verification(),
            "dataset": self._dataset(), "samples": self.samples.rows(self._shard_rows, self._quality_column),
            "servers": self._servers(),
            "versions": ctx.raw.get("versions") or {},
        }

    # -- reading ---------------------------------------------------------------------------------

    def _add(self, shard: int) -> None:
        frame = self._shard_rows(shard)
        self.tally.add(frame)
        self.requests.add(frame)
        usable = frame.filter("usable")
        has_label = pl.any_horizontal(pl.col(c).is_not_null() for c in
                                      ("rating", "rm_score", "self_bleu", "embedding_entropy", "reward"))
        self.funnel.update(
            rows=frame.height, answered=int((frame["status"] == "ok").sum()), usable=usable.height,
            labelled=usable.filter(has_label).height, checked=usable["reward"].count(),
            correct=int((usable["reward"] >= 1).sum()), kept=int(frame["kept"].sum()))
        self.drops.update(dict(frame.drop_nulls("dropped").group_by("dropped").len().iter_rows()))
        silent = frame.filter(pl.col("reward").is_null() & pl.col("verdict_reason").is_not_null())
        self.unverified.update(kind(r) for r in silent["verdict_reason"])
        if self.ctx.store.exists(shard_file("labels/quality", shard)) and "quality" in self.ctx.config.labels:
            self._add_quality(frame, shard)
        self.samples.add(frame, shard)

    def _add_quality(self, frame: pl.DataFrame, shard: int) -> None:
        if self._pointwise:
            self.reward_model.add(frame)
            return
        self.groups.add(frame)
        comparisons = shard_file("comparisons", shard)
        if self.ctx.store.exists(comparisons):
            self.judge.add(self._read(comparisons, COMPARISON_COLUMNS), frame.select("candidate_id", "reward"))

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
        return frame.with_columns(
            pl.col("kept").fill_null(False), correct=(pl.col("reward") >= 1).cast(pl.Int64),
            rm_lead=lead("rm_score"))

    # -- putting together ------------------------------------------------------------------------

    @property
    def _pointwise(self) -> bool:
        return self.ctx.config.quality.method == "pointwise"

    @property
    def _quality_column(self) -> str:
        return "rm_score" if self._pointwise else "rating"

    def _figures(self, sums: Row) -> Row:
        return figures(sums) | ({} if self.scored else {"kept": None, "kept_share": None})

    def _figures_of_all(self, sums: Row) -> Row:
        """Without the figures that are 0 over all heuristics, whatever they are."""
        centred = {f"{metric}{end}" for metric in CENTRED for end in ("", "_low", "_high")}
        return {k: v for k, v in self._figures(sums).items() if k not in centred}

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
                | {"figures": self._figures_of_all(rows[s.name]) if s.name in rows else None}
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

    def _quality(self) -> Row | None:
        """How quality was labelled: the settings, who judged, and the judge calls that it took."""
        if "quality" not in self.labels:
            return None
        config = self.ctx.config
        judge = config.judge_model
        return {"model": judge.path, "revision": judge.revision, "judged_itself": judge == config.model,
                **config.quality.model_dump(exclude={"model", "cache"}), "top": config.quality_top, **self._calls()}

    def _calls(self) -> Row:
        """Calls of this run, and verdicts that judgements of other runs spared; None where a shard does not say."""
        manifests = [self.ctx.store.manifest(shard_file("labels/quality", n)) for n in range(self.ctx.shards)]
        facts = [m.facts for m in manifests if m]
        sums = {k: sum(f[k] for f in facts) if facts and all(k in f for f in facts) else None
                for k in ("calls", "spared")}
        rated = sum(row["rating_n"] or row["rm_score_n"] for row in self.tally.by_source().values())
        return sums | {"rated": rated, "calls_per_candidate": ratio(sums["calls"], rated)}

    def _judge(self) -> Row | None:
        found = self.judge.figures()
        return found | self.groups.figures() if found and "quality" in self.labels else None

    def _reward_model(self) -> Row | None:
        return self.reward_model.figures() if "quality" in self.labels and self._pointwise else None

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


def _about(heuristic: Heuristic) -> Row:
    cuts = [p.name for p in heuristic.processors if p.name != "temperature"]
    heat = [p.value for p in heuristic.processors if p.name == "temperature"]
    return {"id": heuristic.id, "name": heuristic.name, "aliases": list(heuristic.aliases),
            "description": heuristic.describe(), "family": " + ".join(cuts) or "no truncation",
            "temperature": heat[0] if len(heat) == 1 else (1.0 if not heat else None),
            "processors": [{"name": p.name, "params": p.params} for p in heuristic.processors]}


def _ranked_by(heuristics: list[Row]) -> str | None:
    """What heuristics are ranked by: the best label there is."""
    for key in ("rating", "rm_score", "pass_rate", "embedding_entropy"):
        if any(h[key] is not None for h in heuristics):
            return key
    return None
