"""What the fast fake server answers, made beforehand, and what it counts."""

from __future__ import annotations

import json
import math
import random
import struct
import time
import zlib
from pathlib import Path
from typing import Any

WORDS = ["the", "answer", "is", "seven", "and", "a", "lamp", "that", "sings", "softly", "while", "rain", "falls", "on",
         "red", "kites", "over", "quiet", "harbour", "where", "birds", "rest", "in", "shade", "because", "every",
         "story", "has", "to", "end", "somewhere", "before", "night"]
VARIANTS = 64


class Answers:
    """Whole answers but for id and prompt length; which one a request gets depends on its id alone."""

    def __init__(self, tokens: int, model_path: str, vocab: int, latency_s: float, variants: int = VARIANTS) -> None:
        self._parts = [_parts(*answer, latency_s) for answer in _texts(tokens, model_path, vocab, variants)]

    def bytes(self, rid: bytes, prompt_tokens: bytes) -> bytes:
        """The HTTP answer."""
        before, between, after, size = self._parts[zlib.crc32(rid) % len(self._parts)]
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b%b%b%b%b" % (
            size + len(rid) + len(prompt_tokens), before, rid, between, prompt_tokens, after)


def _parts(text: str, ids: list[int], logprobs: list[float], latency_s: float) -> tuple[bytes, bytes, bytes, int]:
    meta = {"id": "@RID", "finish_reason": {"type": "length", "length": len(ids)},
            "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=True)],
            "prompt_tokens": "@PROMPT", "completion_tokens": len(ids), "cached_tokens": 0, "weight_version": "default",
            "e2e_latency": latency_s}
    raw = json.dumps({"text": text, "output_ids": ids, "meta_info": meta}, separators=(",", ":")).encode()
    before, rest = raw.split(b"@RID")
    between, after = rest.split(b'"@PROMPT"')
    return before, between, after, len(before) + len(between) + len(after)


def _texts(tokens: int, model_path: str, vocab: int, variants: int) -> list[tuple[str, list[int], list[float]]]:
    """(text, ids, logprobs), ids of the model's tokenizer; letters as bytes where there is no tokenizer."""
    encode = decode = None
    if (file := Path(model_path) / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        decode = tokenizer.decode
    out = []
    for n in range(variants):
        rng = random.Random(n)
        text = " ".join(rng.choices(WORDS, k=tokens + 1))
        ids = (encode(text) if encode else list(text.encode()))[:tokens]
        if max(ids) >= vocab:
            raise SystemExit(f"--vocab {vocab}: the tokenizer's ids go up to {max(ids)}")
        logprobs = [struct.unpack("f", struct.pack("f", -rng.expovariate(1)))[0] for _ in ids]  # as torch's float32
        out.append((decode(ids) if decode else bytes(ids).decode(), ids, logprobs))
    return out


def judged(verdicts: tuple[bytes, bytes], prompts: list[bytes], rids: list[bytes], listed: bool) -> bytes:
    """The HTTP answer to judgements, a list or a single one. A verdict depends on the prompt's ids alone; 2 % of the
    mass go elsewhere."""
    out = []
    for prompt, rid in zip(prompts, rids, strict=True):
        first = 0.05 + 0.9 * zlib.crc32(prompt) / 2**32
        a, b = math.log(0.98 * first), math.log(0.98 * (1 - first))
        out.append(b'{"text":"A","output_ids":[%b],"meta_info":{"id":"%b","finish_reason":{"type":"length","length":1},'
                   b'"output_token_logprobs":[[%f,%b,null]],"output_token_ids_logprobs":[[[%f,%b,null],[%f,%b,null]]],'
                   b'"prompt_tokens":1,"completion_tokens":1}}' % (
                       verdicts[0], rid, a, verdicts[0], a, verdicts[0], b, verdicts[1]))
    body = b"[" + b",".join(out) + b"]" if listed else out[0]
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class Stats:
    """What the server saw since the start or the last reset. Times are of the machine's monotonic clock."""

    def __init__(self) -> None:
        self.requests = self.answered = self.sent_again = self.answered_again = 0
        self.most_at_once = 0
        self.failed: dict[str, int] = {}
        self.busy_slot_s = 0.0
        self.first_request: float | None = None
        self.last_request: float | None = None
        self.last_answer: float | None = None
        self.cpu_from = time.process_time()
        self._seen: set[bytes] = set()
        self._answered: set[bytes] = set()

    def arrived(self, rid: bytes, now: float) -> None:
        """Count a request."""
        self.requests += 1
        self.last_request = now
        if self.first_request is None:
            self.first_request = now
        if rid in self._seen:
            self.sent_again += 1
        self._seen.add(rid)

    def ok(self, rid: bytes, now: float) -> None:
        """Count a whole answer."""
        self.answered += 1
        self.last_answer = now
        if rid in self._answered:
            self.answered_again += 1
        self._answered.add(rid)

    def fail(self, kind: str) -> None:
        """Count a request that got none."""
        self.failed[kind] = self.failed.get(kind, 0) + 1

    def json(self) -> dict[str, Any]:
        """All of it; `cpu_s` is this process's."""
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "cpu_from"}
        return shown | {"distinct": len(self._seen), "cpu_s": time.process_time() - self.cpu_from}
