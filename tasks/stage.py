"""The one shape of every per-shard stage, and what resuming means for it.

A stage maps a shard to files. `key` says from what: the settings that matter and the digests of the
files it reads. A shard is done exactly if all its files stand for that key.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from tasks.context import Context
from tasks.core.identity import digest
from tasks.core.store import Store

log = logging.getLogger("winnow.stage")


class Stage(Protocol):
    """What `flows` runs, one task per shard."""

    @property
    def name(self) -> str:
        """The stage's name, in files and progress."""
        ...

    @property
    def unit(self) -> str:
        """What `size` counts."""
        ...

    def outputs(self, ctx: Context, shard: int) -> list[str]:
        """The files of a shard, relative to the run."""
        ...

    def key(self, ctx: Context, shard: int) -> str:
        """What the files are made from; callable once the stages before have run."""
        ...

    def size(self, ctx: Context, shard: int) -> int:
        """How many units the shard has, for progress."""
        ...

    def run(self, ctx: Context, shard: int) -> None:
        """Make the files; advances `ctx.progress` under the stage's name."""
        ...


def shard_file(folder: str, shard: int) -> str:
    """`<folder>/shard-0007.parquet`."""
    return f"{folder}/shard-{shard:04d}.parquet"


def inputs_key(store: Store, stage: str, version: int, inputs: list[str], *settings: Any) -> str:
    """Digest of a stage's settings and of the bytes of the files it reads."""
    found = [(m.sha256 if (m := store.manifest(path)) else None) for path in inputs]
    return digest(stage, version, found, *settings)


def is_done(stage: Stage, ctx: Context, shard: int, deep: bool = False) -> bool:
    """Whether every file of the shard stands for the stage's key."""
    key = stage.key(ctx, shard)
    done = True
    for path in stage.outputs(ctx, shard):
        state = ctx.store.state(path, key, deep=deep)
        if state == "damaged":
            log.warning("%s: its bytes are not what its manifest says; it is made again", ctx.store.display(path))
            ctx.store.forget(path)
        done = done and state == "done"
    return done


def ensure(stage: Stage, ctx: Context, shard: int) -> str:
    """Make the shard's files unless they stand; `made` or `reused`."""
    if is_done(stage, ctx, shard, deep=True):
        ctx.progress.advance(stage.name, stage.size(ctx, shard), already=True)
        return "reused"
    began = time.monotonic()
    stage.run(ctx, shard)
    for path in stage.outputs(ctx, shard):
        ctx.store.annotate(path, seconds=time.monotonic() - began)
    return "made"
