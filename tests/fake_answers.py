"""What the fake SGLang server answers: whole answers that depend on the request alone, and every way to spoil them.

Not a model: words drawn by the request's seed, as the ids of a byte tokenizer (tests/tiny_model.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import socket
import struct
from typing import Any

from aiohttp import web

WORDS = ["the", "answer", "is", "7", "12", "a", "lamp", "sings", "softly", "and", "rain", "falls", "on", "red", "kites",
         "while", "birds", "rest", "in", "shade"]

Answer = dict[str, Any]
DRIP_S = 0.05
BEYOND_ANY_VOCABULARY = 10**9
REFUSALS: dict[str, Any] = {
    "401": {"error": "Unauthorized"}, "404": {"detail": "Not Found"},
    **{status: {"error": {"message": f"fake {status}"}} for status in ("400", "429", "500", "503")}}
QUEUE_FULL = {"object": "error", "message": "The request queue is full.", "type": "503", "param": None, "code": 503}
SERVER_INFO: dict[str, Any] = {
    "version": "fake", "revision": None, "dtype": "auto", "quantization": None, "context_length": None,
    "kv_cache_dtype": "auto", "attention_backend": "flashinfer", "json_model_override_args": "{}",
    "sampling_mask_max_tokens": 4096, "preferred_sampling_params": None, "is_embedding": False,
    "speculative_algorithm": None, "speculative_draft_model_path": None,
    "speculative_draft_model_revision": None, "speculative_num_steps": None, "speculative_eagle_topk": None,
    "speculative_num_draft_tokens": None, "speculative_ngram_min_bfs_breadth": 1,
    "speculative_ngram_max_bfs_breadth": 10, "tp_size": 1, "dp_size": 1, "random_seed": 42}
"""Of /server_info, what SGLang says unless it is told otherwise."""
FOREIGN_BODIES = {"garbage": "<html>not json</html>", "empty_body": "", "null": "null"}


def write(payload: dict[str, Any], eos: int) -> Answer:
    """A candidate: three to nine words by the seed and the prompt."""
    params = payload["sampling_params"]
    rng = random.Random(json.dumps([params["sampling_seed"], payload["input_ids"]]))
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))
    ids = list(text.encode())[: params["max_new_tokens"]]
    whole = len(ids) == len(text)
    if whole and len(ids) < params["max_new_tokens"]:
        ids.append(eos)
    logprobs = [[-rng.random(), i, None] for i in ids]
    meta = {"id": payload.get("rid"), "finish_reason": {"type": "stop" if whole else "length"},
            "output_token_logprobs": logprobs, "prompt_tokens": len(payload["input_ids"]),
            "completion_tokens": len(ids), "e2e_latency": 0.0}
    if payload.get("return_sampling_mask"):
        kept = min(params["top_k"], 3)
        meta |= {"output_token_sampling_mask": [[(i + n) % 257 for n in range(kept)] for i in ids],
                 "output_token_sampling_logprobs": [entry[0] / 2 if kept > 1 else 0.0 for entry in logprobs],
                 "output_token_sampling_mask_length": len(ids)}
    return {"text": bytes(i for i in ids if i < 256).decode(), "output_ids": ids, "meta_info": meta}


def mask_refusal(payload: dict[str, Any]) -> dict[str, Any] | None:
    """The body of the 400 for a request whose sampling mask cannot be had."""
    if not payload.get("return_sampling_mask"):
        return None
    if payload.get("custom_logit_processor"):
        return {"error": {"message": "return_sampling_mask only supports DisallowedTokensLogitsProcessor among custom "
                                     "logit processors."}}
    top_k = payload["sampling_params"].get("top_k", 1 << 30)
    if not 1 <= top_k <= 4096:
        return {"error": {"message": "return_sampling_mask requires top_k=1 for greedy sampling or finite 1 < top_k <= "
                                     f"4096; got top_k={top_k}. Lower top_k or increase --sampling-mask-max-tokens."}}
    return None


def judge(payload: dict[str, Any]) -> Answer:
    """A verdict that depends on the prompt alone; 2 % of the mass goes elsewhere."""
    p = int(hashlib.sha256(json.dumps(payload["input_ids"]).encode()).hexdigest()[:8], 16) / 2**32
    p = 0.05 + 0.9 * p
    a, b = payload["token_ids_logprob"]
    entries = [[math.log(0.98 * p), a, None], [math.log(0.98 * (1 - p)), b, None]]
    return {"text": "A", "output_ids": [a], "meta_info": {
        "id": payload.get("rid"), "finish_reason": {"type": "length"},
        "output_token_logprobs": [[math.log(0.98 * p), a, None]], "output_token_ids_logprobs": [entries],
        "prompt_tokens": len(payload["input_ids"]), "completion_tokens": 1, "e2e_latency": 0.0}}


def singles(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """A request as one for each of its prompts."""
    ids, rids = payload["input_ids"], payload.get("rid")
    if not ids or not isinstance(ids[0], list):
        return [payload]
    return [payload | {"input_ids": one, "rid": rids[n] if rids else None} for n, one in enumerate(ids)]


def score(ids: list[int]) -> float:
    """A reward model's scalar, by the text's ids."""
    return int(hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8], 16) / 2**30 - 2.0


def classify(payload: dict[str, Any]) -> list[Answer]:
    """The answers to a list of texts, in its order."""
    texts = payload["input_ids"]
    rids = payload.get("rid") or [f"{n:032x}" for n in range(len(texts))]
    return [{"embedding": [score(ids)], "meta_info": {"id": rid, "finish_reason": {"type": "length", "length": 0},
                                                      "prompt_tokens": len(ids), "e2e_latency": 0.0}}
            for ids, rid in zip(texts, rids, strict=True)]


def classify_refusal(payload: dict[str, Any], info: dict[str, Any]) -> dict[str, Any] | None:
    """The body of a 400, in the words of SGLang 0.5.23."""
    rids = payload.get("rid") or []
    if len(set(rids)) < len(rids):
        return {"error": {"message": f"Duplicate request IDs detected within the request: {rids[:1]}"}}
    if not info["is_embedding"]:
        return {"error": {"message": "This model does not appear to be an embedding model by default. Please add "
                                     "`--is-embedding` when launching the server or try another model."}}
    longest = max(map(len, payload["input_ids"]))
    if longest >= (most := info["context_length"] or 8192):
        return {"error": {"message": f"The input ({longest} tokens) is longer than the model's context length ({most} "
                                     "tokens)."}}
    return None


def spoil_scores(answers: list[Answer], fault: str | None) -> bool:
    """Make the answers of /classify wrong, in place; False if the fault is none of these."""
    if fault == "abort":
        answers[-1]["meta_info"]["finish_reason"] = {"type": "abort", "message": "fake abort"}
    elif fault == "wrong_count":
        answers.pop()
    elif fault == "wrong_rid":
        answers.reverse()
    elif fault == "nan":
        answers[0]["embedding"][0] = math.nan
    else:
        return False
    return True


def spoil(answer: Answer, fault: str | None) -> bool:
    """Make a whole answer wrong, in place; False if the fault is none of these."""
    meta = answer["meta_info"]
    if fault == "abort":
        meta["finish_reason"] = {"type": "abort", "message": "fake abort"}
    elif fault == "wrong_ids":
        answer["output_ids"] = answer["output_ids"] + [3]
    elif fault == "wrong_vocab":
        answer["output_ids"] = [i + BEYOND_ANY_VOCABULARY for i in answer["output_ids"]]
        for entry in meta["output_token_logprobs"]:
            entry[1] += BEYOND_ANY_VOCABULARY
    elif fault == "wrong_rid":
        meta["id"] = f"not-{meta['id']}"
    elif fault == "wrong_count":
        meta["completion_tokens"] += 1
    elif fault == "nan":
        meta["output_token_logprobs"][0][0] = math.nan
    else:
        return False
    return True


async def send_half(request: web.Request, body: bytes) -> web.StreamResponse:
    """A body cut short: the connection ends in its middle."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


async def drip(request: web.Request, body: bytes) -> web.StreamResponse:
    """Headers at once, then a byte every 50 ms; the last byte never comes."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
    await response.prepare(request)
    for n in range(len(body) - 1):
        await response.write(body[n : n + 1])
        await asyncio.sleep(DRIP_S)
    await asyncio.Event().wait()
    return response


def reset(transport: asyncio.BaseTransport | None) -> None:
    """End a connection with a TCP reset, as a crash with unread requests does."""
    if not isinstance(transport, asyncio.Transport):
        return
    with_socket = transport.get_extra_info("socket")
    if with_socket is not None and with_socket.fileno() >= 0:
        with_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
