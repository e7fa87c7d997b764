"""Answers of SGLang's /generate and /classify: read strictly, so that what is wrong is a failure and never a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.serving.failures import RequestFailed
from tasks.serving.sampling_mask import read_mask


@dataclass(frozen=True, slots=True)
class Reply:
    """What /generate or /classify answered, checked."""

    output_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    meta: dict[str, Any]
    latency_s: float
    kept_ids: list[list[int]] | None = None
    """The sampling mask, where it was asked for."""
    kept_logprobs: list[float] | None = None
    scores: list[Any] | None = None
    """Of /classify, for each text what the server says of it: the list of the model's numbers, one per label."""


def parse(body: bytes, latency_s: float, rid: str | None, vocab: int | None, masked: bool) -> Reply:
    try:
        raw = orjson.loads(body)
        meta = raw["meta_info"]
        reason = meta["finish_reason"]
        if reason is None:
            raise TypeError("the answer is not finished: finish_reason is null")
        kind = reason["type"] if isinstance(reason, dict) else reason
        if not isinstance(kind, str):
            raise TypeError("finish_reason has no type")
        if kind == "abort":
            said = reason.get("message") if isinstance(reason, dict) else None
            raise RequestFailed("aborted", str(said or "the server aborted the request"))
        ids = raw["output_ids"]
        _check_ids(ids, meta, rid, vocab)
        logprobs = None
        if entries := meta.get("output_token_logprobs"):
            if [entry[1] for entry in entries] != ids:
                raise TypeError("the ids of output_token_logprobs are not output_ids")
            logprobs = [float(entry[0]) for entry in entries]
            if not math.isfinite(sum(logprobs)):
                raise TypeError("a log-probability is not finite")
        kept, kept_logprobs = _kept(meta, len(ids), vocab) if masked else (None, None)
        return Reply(ids, logprobs, kind, meta, latency_s, kept, kept_logprobs)
    except RequestFailed:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise RequestFailed("bad_response", f"not an answer of SGLang: {said}") from error


def _check_ids(ids: Any, meta: Any, rid: str | None, vocab: int | None) -> None:
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int} or (ids and min(ids) < 0):
        raise TypeError("output_ids is not a list of token ids")
    if vocab is not None and ids and max(ids) >= vocab:
        raise TypeError(f"token id {max(ids)} is outside the vocabulary of {vocab}")
    if rid is not None and meta.get("id") not in (None, rid):
        raise TypeError(f"the answer is to another request ({str(meta['id'])[:64]})")
    if meta.get("completion_tokens") not in (None, len(ids)):
        raise TypeError(f"{len(ids)} output_ids, but completion_tokens says {meta['completion_tokens']}")


def _kept(meta: Any, tokens: int, vocab: int | None) -> tuple[list[list[int]], list[float] | None]:
    kept, logprobs = read_mask(meta)
    if len(kept) != tokens:
        raise TypeError(f"{len(kept)} sampling masks for {tokens} output_ids")
    if vocab is not None and kept and (largest := max(map(max, kept))) >= vocab:
        raise TypeError(f"the sampling mask's id {largest} is outside the vocabulary of {vocab}")
    return kept, logprobs


def parse_scores(body: bytes, latency_s: float, rids: Sequence[str], *, strict: bool, part: str = "embedding",
                 ) -> tuple[Reply, bool]:
    """The answer of /classify to the texts `rids`, and whether it bears these ids; `strict`: it must.

    Raises RequestFailed: bad_response, or aborted if the server gave up any of them.
    """
    try:
        raw = orjson.loads(body)
        if not isinstance(raw, list) or len(raw) != len(rids):
            raise TypeError(f"{len(raw) if isinstance(raw, list) else 'no list of'} answers to {len(rids)} texts")
        for item in raw:
            reason = item["meta_info"]["finish_reason"]
            if isinstance(reason, dict) and reason.get("type") == "abort":
                raise RequestFailed("aborted", str(reason.get("message") or "the server aborted the request"))
        ids = [item["meta_info"].get("id") for item in raw]
        echoed = ids == list(rids)
        if not echoed and (strict or not set(rids).isdisjoint(ids)):
            raise TypeError("the answers are to other texts, or in another order")
        return Reply([], None, "length", {}, latency_s, scores=[item[part] for item in raw]), echoed
    except RequestFailed:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise RequestFailed("bad_response", f"not an answer of SGLang: {said}") from error
