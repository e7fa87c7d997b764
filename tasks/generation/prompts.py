"""Prompts: sources folded into one set, rendered, and laid out in shards. A million take the memory of a few.

`prompts.parquet` holds one row group per shard, so that a shard's prompts are read without the rest. Where there
would be thousands of row groups, several shards share one: a writer holds what it knows of each in memory (some
20 kB), and every reader parses it all.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from tasks.core import schema
from tasks.core.chat_template import ChatTemplate
from tasks.core.config import RunConfig, Source
from tasks.core.errors import InputError, StorageError
from tasks.core.identity import digest
from tasks.core.store import Store
from tasks.core.tokenizer import fingerprint, render
from tasks.generation.sources import Malformed, Prompt, parse_row, read_rows

log = logging.getLogger("winnow.prompts")

PATH = "prompts.parquet"
_SHOWN = 5
_RENDERED_AT_ONCE = 32  # enough for the tokenizer's threads; more only holds more of its long-winded encodings
_CACHE_KIB = 16 * 1024
_ROW_GROUPS = 1024  # at most


@dataclass
class SourceCount:
    """What reading a source brought."""

    rows: int = 0
    prompts: int = 0
    copies: int = 0
    malformed: list[str] = field(default_factory=list)
    malformed_count: int = 0


class PromptSet:
    """Prompts in the order of their first appearance, equal ones folded; kept on disk, not in memory.

    They lie in a nameless SQLite file in the temporary directory, which is gone with `close`, with the
    object or with the process. Length, digest and counts outlive it.
    """

    def __init__(self) -> None:
        self.sources: dict[str, SourceCount] = {}
        self.with_system = 0
        self._count = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._database = _nameless_database()
        self._database.execute("CREATE TABLE prompts (n INTEGER PRIMARY KEY, id BLOB UNIQUE, copies INTEGER, "
                               "origin TEXT, body BLOB)")
        self._database.execute("BEGIN")  # and no commit: nobody else reads it, and nothing is to survive

    def add(self, prompt: Prompt) -> bool:
        """Take a prompt in; False if it is a copy of one that is there."""
        key = bytes.fromhex(prompt.prompt_id)
        body = json.dumps([prompt.source, prompt.messages, prompt.ground_truth, prompt.verifier, prompt.diversity],
                          ensure_ascii=False, allow_nan=False).encode()
        new = self._database.execute("INSERT OR IGNORE INTO prompts (id, copies, origin, body) VALUES (?, 1, ?, ?)",
                                     (key, prompt.origin, body)).rowcount
        if not new:
            self._database.execute("UPDATE prompts SET copies = copies + 1 WHERE id = ?", (key,))
            return False
        self._hash.update(key + body + b"\n")
        self._count += 1
        self.with_system += any(m["role"] == "system" for m in prompt.messages)
        return True

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prompt]:
        rows = self._database.execute("SELECT id, copies, origin, body FROM prompts ORDER BY n")
        for key, copies, origin, body in rows:
            source, messages, truth, verifier, diversity = json.loads(body)
            yield Prompt(key.hex(), source, messages, truth, verifier, diversity, origin, copies)

    @property
    def digest(self) -> str:
        """Digest of all prompts in order: what they ask and how they are checked, not where they stand."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Let go of the prompts themselves."""
        self._database.close()

    def __enter__(self) -> PromptSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nameless_database() -> sqlite3.Connection:
    handle, path = tempfile.mkstemp(prefix="winnow-prompts-", suffix=".sqlite")
    os.close(handle)
    try:  # a flow may go on in another thread than the one it was checked in, but never in two at once
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    finally:
        os.unlink(path)  # the open file lives on; whatever ends the process, nothing is left behind
    # without a journal, which would need the file's name
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE_KIB}"):
        database.execute(f"PRAGMA {pragma}")
    return database


def read_prompts(config: RunConfig) -> PromptSet:
    """All prompts of the config's sources; the caller closes the set.

    Raises InputError that lists the malformed rows by file and line, unless their source skips them.
    """
    with contextlib.ExitStack() as on_error:
        try:
            prompts = on_error.enter_context(PromptSet())
            for source in config.sources:
                count = prompts.sources[source.name] = SourceCount()
                _read_source(source, config.generation.generator.system_prompt, prompts, count)
                _judge_source(source, count)
        except sqlite3.Error as error:
            raise StorageError(f"the prompts cannot be laid aside in {tempfile.gettempdir()}: {error}; make room, "
                               "or set TMPDIR to a larger folder, and run the same command again") from error
        if not prompts:
            raise InputError("sources: no prompts in any source")
        on_error.pop_all()
    return prompts


def _read_source(source: Source, system_prompt: str | None, prompts: PromptSet, count: SourceCount) -> None:
    for origin, row in itertools.islice(read_rows(source), source.limit):
        count.rows += 1
        try:
            if isinstance(row, Malformed):
                raise row
            prompt = parse_row(row, source, system_prompt, origin)
        except Malformed as error:
            count.malformed_count += 1
            if len(count.malformed) < _SHOWN:
                count.malformed.append(f"{origin}: {error}")
            continue
        if prompts.add(prompt):
            count.prompts += 1
        else:
            count.copies += 1


def _judge_source(source: Source, count: SourceCount) -> None:
    if count.malformed_count:
        more = count.malformed_count - len(count.malformed)
        lines = "\n".join(f"  {m}" for m in count.malformed) + (f"\n  and {more} more" if more else "")
        if source.on_malformed == "error":
            raise InputError(f"sources: {source.name}: {count.malformed_count} of {count.rows} rows are malformed:\n"
                             f"{lines}\nMend them, or leave them out with on_malformed: skip.")
        log.warning("%s: %d malformed rows left out:\n%s", source.name, count.malformed_count, lines)
    if count.rows == 0:
        raise InputError(f"sources: {source.name}: {source.path} has no rows")


def shard_count(prompts: int, shard_prompts: int) -> int:
    """Shards that hold so many prompts."""
    return -(-prompts // shard_prompts)


def write_prompts(store: Store, config: RunConfig, prompts: PromptSet, tokenizer: Any,
                  template: ChatTemplate | None = None) -> int:
    """Render and write `prompts.parquet`, a row group a shard; returns the number of shards.

    `template`: in place of the tokenizer's own. The manifest's facts have the longest prompt's tokens.

    A file that stands for the same prompts and tokenizer is left as it is. The caller has compared the
    config with the run's, so a file that stands for other prompts means that a source changed.
    """
    size = config.engine.shard_prompts
    key = digest("prompts", 3, prompts.digest, fingerprint(tokenizer), template.digest if template else None, size)
    shards = shard_count(len(prompts), size)
    state = store.state(PATH, key)
    if state == "done":
        return shards
    if state == "damaged":
        log.warning("%s: its bytes are not what its manifest says; it is made again", store.display(PATH))
    if state == "stale" and store.glob("candidates/*/*.parquet"):
        raise InputError(f"{store.display()}: the prompts, their answers or the tokenizer changed since this run began "
                         "(a file in sources was edited?); put them back, or choose another name with --run")
    facts = {name: {"rows": c.rows, "prompts": c.prompts, "copies": c.copies, "malformed": c.malformed_count,
                    "examples": c.malformed} for name, c in prompts.sources.items()}
    longest = 0

    def measured() -> Iterator[dict[str, Any]]:
        nonlocal longest
        for row in _rows(prompts, tokenizer, template):
            longest = max(longest, len(row["prompt_ids"]))
            yield row

    rows = measured()
    tables = (schema.table(itertools.islice(rows, size), schema.PROMPTS) for _ in range(shards))
    together = -(-shards // _ROW_GROUPS)
    groups = (pa.concat_tables(itertools.islice(tables, together)) for _ in range(0, shards, together))
    store.write_batches(PATH, groups, schema.PROMPTS, key, shards=shards, shard_prompts=size,
                        shards_per_row_group=together, sources=facts, longest=lambda: longest)
    return shards


def _rows(prompts: Iterable[Prompt], tokenizer: Any, template: ChatTemplate | None) -> Iterator[dict[str, Any]]:
    rest = iter(prompts)
    while some := list(itertools.islice(rest, _RENDERED_AT_ONCE)):
        for p, ids in zip(some, render(tokenizer, [p.messages for p in some], template), strict=True):
            yield {
                "prompt_id": p.prompt_id, "source": p.source, "messages": p.messages,
                "prompt": next((m["content"] for m in reversed(p.messages) if m["role"] == "user"), None),
                "prompt_ids": ids, "ground_truth": p.ground_truth, "verifier": p.verifier, "diversity": p.diversity,
                "copies": p.copies, "origin": p.origin,
            }


def read_shard(store: Store, shard: int) -> pa.Table:
    """The prompts of one shard."""
    manifest = store.manifest(PATH)
    facts = manifest.facts if manifest else {}
    together = facts.get("shards_per_row_group", 1)
    group = store.read(PATH, row_group=shard // together)
    return group if together == 1 else group.slice(shard % together * facts["shard_prompts"], facts["shard_prompts"])
