"""Sources: rows read one after the other, each checked and made a prompt. Memory does not grow with their number."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.config import Source
from tasks.core.errors import InputError, did_you_mean
from tasks.core.identity import canonical, prompt_id
from tasks.labels.verifiers import check_ground_truth

ROLES = ("system", "user", "assistant", "tool")


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
    copies: int = 1


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any] | Malformed]]:
    """(`file:line`, row or what is wrong with it) for each row. Raises InputError if it can't be opened."""
    path = source.path
    try:
        if path.endswith((".jsonl", ".jsonl.gz", ".json")):
            yield from _read_jsonl(path)
        elif path.endswith(".parquet"):
            with fsspec.open(path, "rb") as file:
                # see Store.read; with a buffer, or it holds a whole row group
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
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
