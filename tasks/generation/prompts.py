"""Prompts: sources read, checked, folded, rendered, and laid out in shards.

`prompts.parquet` holds one row group per shard, so that a shard's prompts are read without the rest.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import schema
from tasks.core.config import RunConfig, Source
from tasks.core.errors import InputError, did_you_mean
from tasks.core.identity import canonical, digest, prompt_id
from tasks.core.store import Store
from tasks.core.tokenizer import fingerprint, render
from tasks.labels.verifiers import check_ground_truth

log = logging.getLogger("winnow.prompts")

PATH = "prompts.parquet"
ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 5


class Malformed(Exception):
    """A row that is no prompt; the message says why."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as read, before tokens."""

    prompt_id: str
    source: str
    messages: list[dict[str, str]]
    ground_truth: str | None
    verifier: str | None
    diversity: bool
    origin: str


@dataclass
class SourceCount:
    """What reading a source brought."""

    rows: int = 0
    prompts: int = 0
    copies: int = 0
    malformed: list[str] = field(default_factory=list)
    malformed_count: int = 0


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
    """(`file:line`, row or what is wrong with it) for each row. Raises InputError if it can't be opened."""
    path = source.path
    try:
        if path.endswith((".jsonl", ".jsonl.gz", ".json")):
            yield from _read_jsonl(path)
        elif path.endswith(".parquet"):
            with fsspec.open(path, "rb") as file:
                parquet = pq.ParquetFile(file, pre_buffer=False)  # see Store.read
                rows = (r for batch in parquet.iter_batches(1024, use_threads=False) for r in batch.to_pylist())
                yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))
        else:
            yield from _read_hub(source)
    except FileNotFoundError:
        raise InputError(f"sources: {source.name}: no such file: {path}") from None
    except (OSError, pa.ArrowException, ImportError) as error:
        raise InputError(f"sources: {source.name}: cannot read {path}: {error}") from error


def _read_jsonl(path: str) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
    with fsspec.open(path, "rb", compression="infer") as file:  # binary: only \n ends a row, U+2028 does not
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield f"{path}:{n}", row if isinstance(row, dict) else Malformed("not a JSON object")
            except ValueError as error:
                yield f"{path}:{n}", Malformed(f"not valid JSON: {error}")


def _read_hub(source: Source) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
    import datasets

    name = source.path.removeprefix("hf://datasets/")
    if not Path(name).is_dir() and ("/" not in name or name.startswith((".", "/"))):
        raise InputError(f"sources: {source.name}: {source.path}: must end in .jsonl or .parquet, be the id of a "
                         f"dataset (OWNER/NAME), or be a folder that is there (looked in {Path.cwd()})")
    try:
        rows = datasets.load_dataset(name, split=source.split, revision=source.revision)
    except Exception as error:  # hub, network and format errors of many libraries
        raise InputError(f"sources: {source.name}: cannot load dataset {name}: {error}") from error
    for n, row in enumerate(rows):
        yield f"{name}[{source.split}]: row {n}", dict(row)  # type: ignore[arg-type]


def parse_row(row: dict[str, Any], source: Source, system_prompt: str | None, origin: str) -> Prompt:
    """A prompt from a source's row. Raises Malformed."""
    row = json.loads(json.dumps(row, default=_plain))
    key = source.text_key
    if key not in row:
        raise Malformed(f"no key '{key}'{did_you_mean(key, list(row))} The row has: {', '.join(row) or 'nothing'}.")
    messages = _messages(row[key]) if source.messages_key else _user_message(row[key], key)
    system = source.system_prompt if source.system_prompt is not None else system_prompt
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    truth = _ground_truth(row, source)
    if source.verifier and (problem := check_ground_truth(source.verifier, truth or "")):
        raise Malformed(f"{source.verifier}: {problem}")
    try:
        identity = prompt_id(source.name, row)
    except ValueError as error:
        raise Malformed(f"cannot be written as JSON: {error}") from error
    return Prompt(identity, source.name, messages, truth, source.verifier, source.diversity, origin)


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    return str(value)


def _user_message(text: Any, key: str) -> list[dict[str, str]]:
    if not isinstance(text, str) or not text.strip():
        raise Malformed(f"'{key}' must be a text, is {json.dumps(text)[:60]}")
    return [{"role": "user", "content": text}]


def _messages(raw: Any) -> list[dict[str, str]]:
    if not isinstance(raw, list) or not raw:
        raise Malformed("messages must be a list of {role, content}")
    for n, message in enumerate(raw):
        if not isinstance(message, dict) or message.get("role") not in ROLES or \
                not isinstance(message.get("content"), str):
            raise Malformed(f"message {n} must be {{role: {'|'.join(ROLES)}, content: text}}, is "
                            f"{json.dumps(message)[:80]}")
    if raw[-1]["role"] not in ("user", "tool"):
        raise Malformed("the last message must be the user's: it is what gets answered")
    return [{"role": m["role"], "content": m["content"]} for m in raw]


def _ground_truth(row: dict[str, Any], source: Source) -> str | None:
    if source.verifier is None:
        return None
    wanted = [source.answer_key] if source.answer_key else ["instruction_id_list", "kwargs"]
    for key in wanted:
        if key not in row:
            raise Malformed(f"no key '{key}' for the verifier{did_you_mean(str(key), list(row))}")
    if source.answer_key:
        return str(row[source.answer_key])
    return canonical({key: row[key] for key in wanted})


def read_prompts(config: RunConfig) -> tuple[list[Prompt], dict[str, int], dict[str, SourceCount]]:
    """All prompts in order, copies per prompt_id, and counts per source.

    Raises InputError that lists the malformed rows by file and line, unless their source skips them.
    """
    prompts: dict[str, Prompt] = {}
    copies: dict[str, int] = {}
    counts: dict[str, SourceCount] = {}
    for source in config.sources:
        count = counts[source.name] = SourceCount()
        for origin, row in itertools.islice(read_rows(source), source.limit):
            count.rows += 1
            try:
                if isinstance(row, Malformed):
                    raise row
                prompt = parse_row(row, source, config.generation.system_prompt, origin)
            except Malformed as error:
                count.malformed_count += 1
                if len(count.malformed) < _SHOWN:
                    count.malformed.append(f"{origin}: {error}")
                continue
            copies[prompt.prompt_id] = copies.get(prompt.prompt_id, 0) + 1
            if prompts.setdefault(prompt.prompt_id, prompt) is prompt:
                count.prompts += 1
            else:
                count.copies += 1
        _judge_source(source, count)
    if not prompts:
        raise InputError("sources: no prompts in any source")
    return list(prompts.values()), copies, counts


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


def write_prompts(store: Store, config: RunConfig, prompts: list[Prompt], copies: dict[str, int],
                  counts: dict[str, SourceCount], tokenizer: Any) -> int:
    """Render and write `prompts.parquet`, a row group a shard; returns the number of shards.

    A file that stands for the same prompts and tokenizer is left as it is. The caller has compared the
    config with the run's, so a file that stands for other prompts means that a source changed.
    """
    size = config.engine.shard_prompts
    key = digest("prompts", 1, [p.prompt_id for p in prompts], [p.messages for p in prompts],
                 [[p.ground_truth, p.verifier, p.diversity] for p in prompts], fingerprint(tokenizer), size)
    shards = shard_count(len(prompts), size)
    state = store.state(PATH, key)
    if state == "done":
        return shards
    if state == "stale" and store.glob("candidates/*/*.parquet"):
        raise InputError(f"{store.display()}: the prompts, their answers or the tokenizer changed since this run began "
                         "(a file in sources was edited?); put them back, or choose another name with --run")

    def tables() -> Iterator[pa.Table]:
        for n in range(shards):
            rows = ({
                "prompt_id": p.prompt_id, "source": p.source, "messages": p.messages,
                "prompt": next((m["content"] for m in reversed(p.messages) if m["role"] == "user"), None),
                "prompt_ids": render(tokenizer, p.messages), "ground_truth": p.ground_truth, "verifier": p.verifier,
                "diversity": p.diversity, "copies": copies[p.prompt_id], "origin": p.origin,
            } for p in prompts[n * size:(n + 1) * size])
            yield schema.table(rows, schema.PROMPTS)

    facts = {name: {"rows": c.rows, "prompts": c.prompts, "copies": c.copies, "malformed": c.malformed_count,
                    "examples": c.malformed} for name, c in counts.items()}
    store.write_batches(PATH, tables(), schema.PROMPTS, key, shards=shards, sources=facts)
    return shards


def read_shard(store: Store, shard: int) -> pa.Table:
    """The prompts of one shard."""
    return store.read(PATH, row_group=shard)
