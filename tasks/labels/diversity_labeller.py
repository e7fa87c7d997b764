"""Diversity: self-BLEU and embedding entropy of each (prompt, heuristic) across seeds."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tasks.context import Context
from tasks.core import schema
from tasks.generation.prompts import read_shard
from tasks.labels.base import Labeller, groups
from tasks.labels.diversity import SELF_BLEU_SIGNATURE, Embedder, embedding_entropy, self_bleu


@lru_cache(maxsize=2)
def _embedder(model: str | None, device: str, batch_size: int) -> Embedder:
    # one model a process, however many shards are labelled at once
    return Embedder(model, device, batch_size)


class DiversityLabeller(Labeller):
    """`labels/diversity/`; every candidate of a group carries the group's values."""

    name, schema = "diversity", schema.DIVERSITY

    def settings(self, ctx: Context) -> Any:
        """The embedding model and the metric's signature."""
        return [self._embedder(ctx).name, SELF_BLEU_SIGNATURE]

    def signatures(self, ctx: Context) -> dict[str, str]:
        """sacrebleu's signature and the embedding model."""
        return {"self_bleu": SELF_BLEU_SIGNATURE, "embedding_entropy": f"von-neumann|nats|{self._embedder(ctx).name}"}

    def _embedder(self, ctx: Context) -> Embedder:
        config = ctx.config.diversity
        return _embedder(config.embedding_model, config.device, config.batch_size)

    def run(self, ctx: Context, shard: int) -> None:
        """Embed the texts of all groups in one go, then measure group by group."""
        wanted = {p["prompt_id"] for p in read_shard(ctx.store, shard).select(["prompt_id", "diversity"]).to_pylist()
                  if p["diversity"]}
        everything = groups(ctx, shard, ["text"], by=("prompt_id", "heuristic_id"))
        chosen = {g: rows for g, rows in everything.items() if g[0] in wanted}
        texts = [row["text"] for rows in chosen.values() if len(rows) > 1 for row in rows]
        vectors = dict(zip(texts, self._embedder(ctx).encode(texts), strict=True)) if texts else {}
        out = []
        for rows in chosen.values():
            own = [row["text"] for row in rows]
            entropy = embedding_entropy([vectors[t] for t in own]) if len(own) > 1 else None
            values = {"self_bleu": self_bleu(own), "embedding_entropy": entropy, "diversity_texts": len(own)}
            out += [{"candidate_id": row["candidate_id"], **values} for row in rows]
        ctx.store.write_table(self.path(shard), schema.table(out, self.schema), self.key(ctx, shard))
        ctx.progress.advance(self.name, self.size(ctx, shard))
