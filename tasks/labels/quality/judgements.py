"""Which judgements are the same, where they are kept, and how many a run has asked for."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from tasks.context import Context
from tasks.core.config import ModelRef, RunConfig
from tasks.core.config_servers import Settings
from tasks.core.errors import InputError, StorageError
from tasks.core.identity import digest
from tasks.core.store import Store
from tasks.labels.quality.cache import FILE, Judgements, Known

log = logging.getLogger("winnow.quality")

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


class Keeper:
    """The judgements of one shard's judge: found again by content, and counted.

    Two judgements are one if the judge (model, revision or the files of its folder, engine settings), the request but
    for its texts, and the texts are. Where the judge's weights can't be named (a hub model without a revision, a folder
    without weights, a server that is not what is expected) its judgements are not for other runs.
    """

    def __init__(self, ctx: Context, shard: int, *request: Any) -> None:
        """`request`: all that shapes an answer but the judge and the texts."""
        # the folder alone would not do: begun anew under its name, it is another run
        run = digest("run", ctx.store.root, ctx.raw["created"], size=8)
        self._run = bytes.fromhex(run) + shard.to_bytes(4, "big")
        judge, shared = _judge(ctx)
        self._base = hashlib.blake2b(digest("judgement", judge, None if shared else run, *request).encode(),
                                     digest_size=16)
        folder = cache_folder(ctx.config, ctx.store)
        path = folder / FILE if folder else ctx.store.journal(f"quality/shard-{shard:04d}.sqlite").path
        self._for_others = folder is not None
        self._judgements = Judgements(path)
        self.calls = 0
        """Judge calls that were made for the shard, also by a process before."""
        self.spared = 0
        """Judgements that another run (or another shard, of the same prompt under another source) had made."""
        self._counted: set[bytes] = set()

    def key(self, *texts: str) -> bytes:
        """The judgement's key; (16,) bytes."""
        hasher = self._base.copy()
        for text in texts:
            content = text.encode(errors="surrogatepass")
            hasher.update(len(content).to_bytes(8, "little"))
            hasher.update(content)
        return hasher.digest()

    def get(self, key: bytes) -> tuple[float, float] | None:
        """What was kept under a key."""
        known = self._judgements.get(key)
        if known is None:
            return None
        if key not in self._counted:
            self._counted.add(key)
            if known.run == self._run:
                self.calls += 1
            else:
                self.spared += 1
        return known.first, known.outside

    def put(self, key: bytes, first: float, outside: float = 0.0) -> None:
        """Keep an answer. Raises StorageError."""
        self._judgements.put(key, Known(first, outside, self._run))
        self._counted.add(key)
        self.calls += 1

    def failed(self) -> None:
        """Count a call that gave nothing."""
        self.calls += 1

    def close(self, *, done: bool) -> None:
        """Close the file; `done`: the shard's files stand, so what is for nobody else goes."""
        if done and not self._for_others:
            self._judgements.remove()
        else:
            self._judgements.close()


def cache_folder(config: RunConfig, store: Store) -> Path | None:
    """Where judgements are kept for other runs; None where they are not."""
    named = config.quality.cache
    if named == "off":
        return None
    if named is not None:
        return Path(named).expanduser()
    if store.local:
        return Path(store.root).parent / ".judgements"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "winnow" / "judgements"


def check_cache(config: RunConfig, store: Store) -> None:
    """Raises InputError where judgements can't be kept: before candidates are made, and not after."""
    if "quality" not in config.labels or (folder := cache_folder(config, store)) is None:
        return
    try:
        Judgements(folder / FILE).close()
    except StorageError as error:
        why = error.__cause__ or error
        raise InputError(f"quality.cache: {folder} can't hold judgements ({why}): name a folder on a local disk that "
                         "can be written, or off") from error


def _judge(ctx: Context) -> tuple[list[Any], bool]:
    """What the judge is, and whether that names its weights."""
    config = ctx.config
    told = {digest("settings", server.settings.model_dump(mode="json", include=set(Settings.model_fields)))
            for server in config.servers.judge or config.servers.generator}
    mismatch = any(server.get("mismatch") for server in ctx.raw["servers"]["judge"])
    weights = _weights(config.judge_model)
    return [config.judge_model.model_dump(), weights, sorted(told)], weights is not None and not mismatch


def _weights(model: ModelRef) -> Any:
    """The revision of a hub model, or what tells a folder's files from those of another day; None: can't be told."""
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        return None if model.is_local else model.revision
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in (*_WEIGHTS, ".json", ".model", ".txt", ".jinja"):
                stat = path.stat()
                found.append([path.name, stat.st_size, stat.st_mtime_ns])
    return found if any(Path(name).suffix in _WEIGHTS for name, *_ in found) else None
