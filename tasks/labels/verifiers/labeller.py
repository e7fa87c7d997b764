"""Correctness: each candidate of a source with a verifier, checked in worker processes."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from tasks.context import Context
from tasks.core import schema
from tasks.generation.prompts import read_shard
from tasks.generation.verify import read_verified
from tasks.labels.base import Labeller
from tasks.labels.verifiers import VerifierPool


class VerifierLabeller(Labeller):
    """`labels/verifiers/`: one row per candidate whose prompt has a verifier."""

    name, schema = "verifiers", schema.VERDICTS

    def settings(self, ctx: Context) -> Any:
        """The time limit: it decides which verdicts are null."""
        return ctx.config.verifiers.time_limit_s

    def signatures(self, ctx: Context) -> dict[str, str]:
        """Versions of the checkers."""
        math_verify = importlib.metadata.version("math-verify")
        return {
            "reward": f"winnow-verifiers:{self.version}|math-verify:{math_verify}|"
            f"time_limit_s:{ctx.config.verifiers.time_limit_s:g}"
        }

    def run(self, ctx: Context, shard: int) -> None:
        """Check and write."""
        checks = {
            p["prompt_id"]: (p["verifier"], p["ground_truth"])
            for p in read_shard(ctx.store, shard).select(["prompt_id", "verifier", "ground_truth"]).to_pylist()
            if p["verifier"]
        }
        tables = read_verified(ctx, shard, ["candidate_id", "prompt_id", "text"])
        rows = [row for table in tables for row in table.to_pylist()]
        rows = [row for row in rows if row["prompt_id"] in checks]
        jobs = [(checks[r["prompt_id"]][0], r["text"], checks[r["prompt_id"]][1]) for r in rows]
        verdicts = []
        if jobs:
            limits = ctx.config.verifiers
            with VerifierPool(limits.workers, limits.time_limit_s) as pool:
                verdicts = pool.run(jobs)
        out = [
            {
                "candidate_id": row["candidate_id"],
                "reward": v.score,
                "reward_loose": v.loose,
                "extracted": v.extracted,
                "verdict_reason": v.reason,
            }
            for row, v in zip(rows, verdicts, strict=True)
        ]
        ctx.store.write_table(self.path(shard), schema.table(out, self.schema), self.key(ctx, shard))
        right = sum(v.score == 1 for v in verdicts)
        ctx.progress.advance(self.name, self.size(ctx, shard), correct=right, checked=len(out))
