"""The one shape of every labeller: reads a verified shard, writes a table keyed by candidate.

A labeller is a stage (`tasks.stage.Stage`) with a schema. No labeller imports another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from tasks.context import Context
from tasks.generation.verify import read_verified
from tasks.stage import inputs_key, shard_file


class Labeller:
    """Base of the labellers: files, keys and sizes; a labeller adds `settings` and `run`."""

    name: str
    unit: str = "candidates"
    version: int = 1
    schema: pa.Schema

    def settings(self, ctx: Context) -> Any:
        """The part of the config that decides the labels."""
        raise NotImplementedError

    def signatures(self, ctx: Context) -> dict[str, str]:
        """Metric signature (versions, settings) by column, for the dataset's schema."""
        raise NotImplementedError

    def path(self, shard: int) -> str:
        """The labels of one shard."""
        return shard_file(f"labels/{self.name}", shard)

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """The labels; a labeller may write more beside them."""
        return [self.path(shard)]

    def key(self, ctx: Context, shard: int) -> str:
        """The verified shard's bytes and the settings."""
        return inputs_key(ctx.store, self.name, self.version, [shard_file("verified", shard)], self.settings(ctx))

    def size(self, ctx: Context, shard: int) -> int:
        """Usable candidates."""
        manifest = ctx.store.manifest(shard_file("verified", shard))
        return int(manifest.facts["usable"]) if manifest else 0

    def run(self, ctx: Context, shard: int) -> None:
        """Label the shard and write the table."""
        raise NotImplementedError


Group = tuple[tuple[Any, ...], list[dict[str, Any]]]


def blocks(ctx: Context, shard: int, columns: Iterable[str], by: tuple[str, ...]) -> Iterator[list[Group]]:
    """The usable rows of a shard (only `columns` and the keys) by group, each in file order; a block of whole prompts
    at a time, so that no more than a block is held."""
    for table in read_verified(ctx, shard, dict.fromkeys([*by, "candidate_id", *columns])):
        out: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            out.setdefault(tuple(row[k] for k in by), []).append(row)
        yield list(out.items())


def groups(ctx: Context, shard: int, columns: Iterable[str], by: tuple[str, ...]) -> dict[tuple[Any, ...], list[dict]]:
    """All groups of `blocks` at once."""
    return dict(group for block in blocks(ctx, shard, columns, by) for group in block)
