"""A small run directory with seeded random labels, written as the stages write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tasks.context import Context
from tasks.core import schema
from tasks.core.config import RunConfig
from tasks.core.heuristics import Heuristic, Processor, expand
from tasks.core.identity import prompt_id
from tasks.core.store import Store
from tasks.publish.score import LABELS, Moments, lead, score_shard
from tasks.stage import shard_file
from tests.asked import generation
from tests.plain_ids import candidate_id, request_seed

Row = dict[str, Any]
SCRIPT = "<script>alert(1)</script>"
KINDS = ("timeout", "server_error", "empty")
WORDS = ("river", "stone", "light", "morning", "answer", "because", "seven", "walks", "quietly", "a", "the", "of",
         "green", "number", "town", "song", "window", "paper", "slow", "and", "then", "we")


def some_heuristics(count: int) -> list[Heuristic]:
    """Heuristics of a family's grid; one has a name that wants to be HTML."""
    grid = expand("llama", [])
    chosen = [grid[n * 37 % len(grid)] for n in range(min(count - 1, len(grid)))]  # 37 has no factor in common with 384
    return [*chosen, Heuristic(f"{SCRIPT} | cut & $run$", (Processor("temperature", 0.9), Processor("top_p", 0.77)))]


def make_run(folder: Path, *, heuristics: int = 12, prompts: int = 12, seeds: int = 3, shards: int = 2,
             labels: tuple[str, ...] = ("quality", "diversity", "verifiers"), verified_sources: bool = True,
             failures: float = 0.04, seed: int = 0, quality: dict[str, Any] | None = None, more_sources: int = 0,
             rated: bool = True) -> Context:
    """Write the run and open it. `more_sources`: beyond three; `rated`: whether quality could be labelled."""
    config = RunConfig.model_validate({
        "run": "synthetic", "runs_dir": str(folder), "model": {"path": "models/tiny", "revision": "abc123"},
        "sources": [
            {"name": "stories", "path": "s.jsonl", "diversity": True, "license": "CC-BY-4.0"},
            {"name": "sums", "path": "g.jsonl", "license": "MIT"} | (
                {"answer_key": "answer", "verifier": "gsm8k"} if verified_sources else {}),
            {"name": "chat", "path": "c.jsonl"},
            *({"name": f"a-source-of-some-length-{n}", "path": f"{n}.jsonl"} for n in range(more_sources)),
        ],
        "quality": quality or {},
        "heuristics": {"files": ["h.yaml"]}, "seeds": list(range(seeds)), "labels": list(labels),
        "generation": {"generator": {"max_new_tokens": 64}}, "engine": {"shard_prompts": -(-prompts // shards)},
    })
    chosen = some_heuristics(heuristics)
    store = Store(config.url)
    store.write_json("run.json", {
        "config": config.model_dump(mode="json"), "shards": shards, "created": "2026-01-02T03:04:05+00:00",
        "heuristics": [{"name": h.name, "aliases": list(h.aliases),
                        "processors": [{"name": p.name, "params": p.params} for p in h.processors]} for h in chosen],
        "servers": {"generator": [{"url": "http://127.0.0.1:1", "max_in_flight": 8, "honours_seeds": True},
                                  {"url": "http://127.0.0.1:2", "max_in_flight": 8, "honours_seeds": False,
                                   "info": {"version": "0.5.23", "dtype": "float32", "model_path": "/home/me/tiny"}},
                                  {"url": "http://127.0.0.1:4", "max_in_flight": None}],
                    "judge": [{"url": "http://127.0.0.1:3", "max_in_flight": 8, "honours_seeds": True}]},
        "generation": {"generator": generation(max_new_tokens=64).recorded()},
        "templates": {"generator": {"digest": "0a1b", "origin": "tokenizer", "stamps_date": True, "date": "2024-07-26",
                                    "system_prompt": None}},
        "versions": {"winnow": "0.1.0", "python": "3.11.9", "sglang": "0.5.23"},
    })
    writer = _Writer(store, config, chosen, np.random.default_rng(seed), failures, rated)
    writer.prompts(prompts, shards)
    for shard in range(shards):
        writer.shard(shard)
    writer.scores(shards)
    return Context(config.url)


class _Writer:
    def __init__(self, store: Store, config: RunConfig, heuristics: list[Heuristic], rng: np.random.Generator,
                 failures: float, rated: bool) -> None:
        self.store, self.config, self.rng, self.failures, self.rated = store, config, rng, failures, rated
        self.chosen = [(h, h.id, float(rng.normal(0, 0.6)), float(rng.uniform(0.3, 1.0))) for h in heuristics]
        self.by_shard: list[list[Row]] = []
        self.frames: list[pl.DataFrame] = []
        self.of_groups: dict[tuple[Any, ...], Row] = {}

    def prompts(self, count: int, shards: int) -> None:
        sources = self.config.sources
        rows = []
        for n in range(count):
            source = sources[n % len(sources)]
            text = f"{SCRIPT} Prompt {n}: " + " ".join(self.rng.choice(WORDS, 12))
            rows.append({
                "prompt_id": prompt_id(source.name, {"n": n}), "source": source.name, "prompt": text,
                "messages": [{"role": "user", "content": text}], "prompt_ids": [1, 2, 3],
                "ground_truth": f"#### {n}" if source.verifier else None, "verifier": source.verifier,
                "diversity": source.diversity, "copies": 1, "origin": f"{source.path}:{n + 1}"})
        size = self.config.engine.shard_prompts
        self.by_shard = [rows[s * size:(s + 1) * size] for s in range(shards)]
        facts = {s.name: {"rows": count, "prompts": len([r for r in rows if r["source"] == s.name]), "copies": 0,
                          "malformed": 0, "examples": []} for s in sources}
        self.store.write_batches("prompts.parquet", (schema.table(r, schema.PROMPTS) for r in self.by_shard),
                                 schema.PROMPTS, "k", shards=shards, sources=facts)

    def shard(self, shard: int) -> None:
        prompts = self.by_shard[shard]
        rows = [self._candidate(p, h, hid, seed) for p in prompts for h, hid, _, _ in self.chosen
                for seed in self.config.seeds]
        usable = [r for r in rows if r["usable"]]
        bad = [r for r in rows if not r["usable"]]
        defects = {k: sum(r["status"] == k for r in bad) for k in KINDS if any(r["status"] == k for r in bad)}
        self.store.write_table(
            shard_file("verified", shard), schema.table(rows, schema.VERIFIED), "k", planned=len(rows),
            usable=len(usable), defects=defects, repaired=1, dropped_prompts=[],
            found={k: defects.get(k, 0) + (k == "timeout") for k in {*defects, "timeout"}},
            at_max_new_tokens=sum(r.get("completion_tokens") == 64 for r in rows),
            cells=[{"candidate_id": r["candidate_id"], "prompt_id": r["prompt_id"], "heuristic": SCRIPT,
                    "seed": r["seed"], "defect": r["status"]} for r in bad[:5]],
            tokens=sum(r.get("completion_tokens") or 0 for r in rows), attempts=sum(r["attempts"] for r in rows))
        self.frames.append(self._labels(shard, prompts, rows, usable))

    def _candidate(self, prompt: Row, h: Heuristic, hid: str, seed: int) -> Row:
        rng, config = self.rng, self.config
        cid = candidate_id(prompt["prompt_id"], hid, seed, config.model.path, config.model.revision, {})
        failed = rng.random() < self.failures
        row = {"candidate_id": cid, "prompt_id": prompt["prompt_id"], "heuristic_id": hid, "seed": seed,
               "source": prompt["source"], "prompt_ids": [1, 2, 3], "attempts": int(rng.integers(1, 3)),
               "server": f"http://127.0.0.1:{rng.integers(1, 3)}", "model": config.model.path,
               "request_seed": request_seed(config.run_seed, prompt["prompt_id"], hid, seed),
               "seed_effective": True, "dialect": "joint", "sampling_params": "{}"}
        if failed:
            kind = str(rng.choice(KINDS))
            return row | {"status": kind, "error": f"{kind}: {SCRIPT}", "usable": False}
        length = int(min(64, rng.geometric(1 / 30)))
        text = " ".join(rng.choice(WORDS, length))
        return row | {"status": "ok", "usable": True, "text": text, "output_ids": list(range(length)),
                      "output_logprobs": [-1.0] * length, "finish_reason": "length" if length == 64 else "stop",
                      "completion_tokens": length, "latency_s": float(rng.uniform(0.1, 2))}

    def _labels(self, shard: int, prompts: list[Row], rows: list[Row], usable: list[Row]) -> pl.DataFrame:
        rng, wanted = self.rng, self.config.labels
        strength = {hid: (q, d) for _, hid, q, d in self.chosen}
        labels: dict[str, Row] = {r["candidate_id"]: {} for r in rows}
        if "quality" in wanted:
            for r in usable:
                level = strength[r["heuristic_id"]][0] + float(rng.normal(0, 0.7))
                labels[r["candidate_id"]] |= self._pointwise(r, level) if (
                    self.config.quality.method == "pointwise") else self._rated(r, level)
            self._write("quality", shard, usable, labels, schema.QUALITY, calls=7 * (shard + 1), spared=shard)
            if self.config.quality.method == "tournament":
                self._comparisons(shard, usable)
        if "diversity" in wanted:
            diverse = {p["prompt_id"] for p in prompts if p["diversity"]}
            rows_of = [r for r in usable if r["prompt_id"] in diverse]
            several, of_group = len(self.config.seeds) > 1, {}
            for r in rows_of:
                d = strength[r["heuristic_id"]][1]
                of_group.setdefault((r["prompt_id"], r["heuristic_id"]), {
                    "self_bleu": 100 * (1 - d) * float(rng.uniform(0.8, 1)) if several else None,
                    "embedding_entropy": d * float(rng.uniform(0.8, 1)) if several else None,
                    "diversity_texts": len(self.config.seeds)})
                labels[r["candidate_id"]] |= of_group[r["prompt_id"], r["heuristic_id"]]
            self._write("diversity", shard, rows_of, labels, schema.DIVERSITY)
        if "verifiers" in wanted:
            checked = {p["prompt_id"] for p in prompts if p["verifier"]}
            rows_of = [r for r in usable if r["prompt_id"] in checked]
            for r in rows_of:
                silent = rng.random() < 0.05
                labels[r["candidate_id"]] |= {
                    "reward": None if silent else float(rng.random() < 0.5 + strength[r["heuristic_id"]][0] / 3),
                    "verdict_reason": "timeout: 10 s" if silent else None}
            self._write("verifiers", shard, rows_of, labels, schema.VERDICTS)
        every = (*LABELS, "reliability")
        return pl.DataFrame([{k: r[k] for k in ("candidate_id", "prompt_id", "seed", "usable")}
                             | {c: labels[r["candidate_id"]].get(c) for c in every} for r in rows],
                            schema_overrides=dict.fromkeys(every, pl.Float64)).with_columns(lead("rm_score"))

    def _rated(self, row: Row, level: float) -> Row:
        """The columns of a tournament; those of its group are drawn once a group."""
        player = {"player": row["candidate_id"], "comparisons": 0}
        if not self.rated:
            return player | {"rating_flags": "disconnected"}
        of_group = self.of_groups.setdefault((row["prompt_id"], row["seed"]), {
            "settled": [True, False, None][self.rng.integers(3)], "reliability": float(self.rng.beta(6, 2)),
            "prior_sd": float(self.rng.uniform(0.5, 1.5)), "dispersion": float(self.rng.uniform(0.2, 1)),
            "rating_flags": "separated, not_converged" if self.rng.random() < 0.2 else None})
        return player | of_group | {"rating": level, "rating_se": float(self.rng.uniform(0.3, 0.9)),
                                    "comparisons": int(self.rng.integers(1, 9))}

    def _pointwise(self, row: Row, level: float) -> Row:
        """A score at the prompt's own level, a hundred times the spread within a prompt, or a reason."""
        if not self.rated or self.rng.random() < 0.05:
            return {"rm_reason": f"timeout: {SCRIPT}"}
        own = self.of_groups.setdefault((row["prompt_id"],), {"level": float(self.rng.normal(0, 100))})
        return {"rm_score": own["level"] + level}

    def _write(self, name: str, shard: int, rows: list[Row], labels: dict[str, Row], columns: Any, **facts: Any) -> None:
        table = schema.table(({"candidate_id": r["candidate_id"]} | {
            k: v for k, v in labels[r["candidate_id"]].items() if k in columns.names} for r in rows), columns)
        self.store.write_table(shard_file(f"labels/{name}", shard), table, "k", **facts)

    def _comparisons(self, shard: int, usable: list[Row]) -> None:
        rng, groups, out = self.rng, {}, []
        for r in usable:
            groups.setdefault((r["prompt_id"], r["seed"]), []).append(r["candidate_id"])
        for (pid, seed), ids in groups.items():
            for a, b in zip(ids[::2], ids[1::2], strict=False):
                row: Row = {"prompt_id": pid, "seed": seed, "round": 0, "a": a, "b": b, "judge": "j", "template": "t"}
                if rng.random() < 0.03:
                    out.append(row | {"reason": "timeout: no answer"})
                    continue
                p = rng.uniform(0.1, 0.9, 2)
                out.append(row | {"p_first": float(p[0]), "p_second": float(p[1]), "outcome": float(p.mean()),
                                  "outside": 0.01})
        self.store.write_table(shard_file("comparisons", shard), schema.table(out, schema.COMPARISONS), "k")

    def scores(self, shards: int) -> None:
        """Scores of all shards, and the dataset's row counts by way of its files."""
        if not self.config.labels:
            return
        stats = {name: Moments() for name in LABELS}
        for frame in self.frames:
            stats = {name: moments + Moments.of(frame[name]) for name, moments in stats.items()}
        self.store.write_bytes("scores/stats.json", json.dumps({}).encode(), "k")
        kept: list[Row] = []
        for shard in range(shards):
            scores = score_shard(self.frames[shard], stats, self.config.scoring)
            self.store.write_table(shard_file("scores", shard), scores.to_arrow().cast(schema.SCORES), "k")
            kept += self._dataset_rows(shard, scores)
        split = max(1, len(kept) // 10)
        columns = schema.with_signatures(schema.DATASET, {"rating": "bradley-terry|judge:j", "self_bleu": "BLEU|x"})
        for name, part in {"train": kept[split:], "validation": kept[:split]}.items():
            self.store.write_table(f"dataset/{name}.parquet", schema.table(part, columns), "k")

    def _dataset_rows(self, shard: int, scores: pl.DataFrame) -> list[Row]:
        known = set(schema.DATASET.names)
        prompts = {p["prompt_id"]: p for p in self.by_shard[shard]}
        of = {h.id: h for h, _, _, _ in self.chosen}
        rows = {r["candidate_id"]: r for r in self.store.read(shard_file("verified", shard)).to_pylist()}
        labels = {r["candidate_id"]: r for r in self.frames[shard].to_dicts()}
        out = []
        for score in scores.filter("kept").to_dicts():
            row = rows[score["candidate_id"]]
            h = of[row["heuristic_id"]]
            full = prompts[row["prompt_id"]] | labels[row["candidate_id"]] | score | row | {
                "heuristic": h.name, "processors": [{"name": p.name, "value": float(p.value), "min_tokens_to_keep": 1}
                                                    for p in h.processors]}
            out.append({k: v for k, v in full.items() if k in known})
        return out
