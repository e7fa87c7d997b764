"""A fake SGLang server that costs next to nothing: the benchmarks' other side, a process of its own.

    .venv/bin/python benchmarks/fast_fake.py --latency-s 0.05 --concurrency 64 --faults 500=0.05,reset=0.01

Prints its port and serves on loopback until it is killed. A request takes one of `--concurrency` slots for
`--latency-s`; the rest wait in arrival order, and more than `--queue` waiting are turned away with 503. Answers
are byte strings made at the start; only the request's id and its prompt's length are filled in. `GET /stats`
says what it saw, `POST /reset` forgets it. One request at a time a connection: no pipelining.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import re
import sys
import time
from collections import deque
from typing import IO, Any

from fast_answers import VARIANTS, Answers, Stats, judged

FAULTS = ("400", "429", "500", "503", "reset", "truncate", "hang", "garbage", "abort")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_JUDGED = re.compile(rb'"token_ids_logprob"\s*:\s*\[(\d+),\s*(\d+)\]')
_RIDS = re.compile(rb'"rid"\s*:\s*\[([^\]]*)\]')
_RID = re.compile(rb'"rid"\s*:\s*"([^"]*)"')
_EARLY_S = 0.0005  # uvloop's timers count in milliseconds: to the nearest one, neither late nor early on average


class Request:
    """One /generate on its way through the slots."""

    __slots__ = ("connection", "prompt_tokens", "rid", "started", "state")

    def __init__(self, connection: Connection, rid: bytes, prompt_tokens: bytes) -> None:
        self.connection, self.rid, self.prompt_tokens = connection, rid, prompt_tokens
        self.started = 0.0
        self.state = "waiting"  # then running, then over


class Together:
    """The judgements of one request: each takes a slot, and the answer is sent when all have theirs."""

    def __init__(self, connection: Connection, verdicts: tuple[bytes, bytes], prompts: list[bytes],
                 rids: list[bytes], listed: bool) -> None:
        self._connection, self._left, self._over = connection, len(rids), False
        self._answer = judged(verdicts, prompts, rids, listed)
        self.requests = [Request(self, rid, b"0") for rid in rids]  # type: ignore[arg-type]

    def send(self, _: bytes) -> None:
        """One of them has its answer."""
        self._left -= 1
        if not self._left and not self._over:
            self._connection.send(self._answer)

    def fail(self, fault: str, _: bytes) -> None:
        """One of them fails, and so all."""
        if not self._over:
            self._over = True
            self._connection.fail(fault, self._answer)

    def refuse(self, status: int, message: str) -> None:
        """One of them finds no place, and so all."""
        if not self._over:
            self._over = True
            self._connection.refuse(status, message)


class Engine:
    """Slots and the queue in front of them. The latency is one for all, so that slots end in arrival order."""

    def __init__(self, options: argparse.Namespace, loop: asyncio.AbstractEventLoop) -> None:
        self.latency_s, self.free, self.queue = options.latency_s, options.concurrency, options.queue
        self.concurrency = options.concurrency
        self.answers = Answers(options.tokens, options.model_path, options.vocab, options.latency_s, options.variants)
        self.stats = Stats()
        self._faults, self._rng = options.faults, random.Random(options.seed)
        self._loop = loop
        self._running: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._queued = 0
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, request: Request) -> None:
        """A slot, a place in the queue, or 503."""
        now = time.monotonic()
        self.stats.arrived(request.rid, now)
        if self.free:
            self._start(request, now)
        elif self._queued < self.queue:
            self._waiting.append(request)
            self._queued += 1
        else:
            request.state = "over"
            self.stats.fail("queue_full")
            request.connection.refuse(503, "The request queue is full.")
        held = self.concurrency - self.free + self._queued
        if held > self.stats.most_at_once:
            self.stats.most_at_once = held

    def gone(self, request: Request) -> None:
        """The client hung up: as SGLang does, stop working on it."""
        if request.state == "over":
            return
        self.stats.fail("hung_up")
        if request.state == "running":
            self._release(request, time.monotonic())
        else:
            request.state = "over"
            self._queued -= 1

    def _start(self, request: Request, now: float) -> None:
        self.free -= 1
        request.started, request.state = now, "running"
        self._running.append(request)
        if self._timer is None:
            self._timer = self._loop.call_later(self.latency_s, self._due)

    def _release(self, request: Request, now: float) -> None:
        self.stats.busy_slot_s += now - request.started
        request.state = "over"
        self.free += 1
        while self._waiting:
            following = self._waiting.popleft()
            if following.state == "waiting":
                self._queued -= 1
                self._start(following, now)
                return

    def _due(self) -> None:
        now = time.monotonic()
        latest = now - self.latency_s + _EARLY_S
        running = self._running
        while running and (running[0].started <= latest or running[0].state == "over"):
            request = running.popleft()
            if request.state == "running":
                self._finish(request, now)
        self._timer = None
        if running:
            self._timer = self._loop.call_later(max(0.0, running[0].started + self.latency_s - now), self._due)

    def _finish(self, request: Request, now: float) -> None:
        fault = self._fault() if self._faults else None
        if fault == "hang":
            return  # keeps its slot until the client hangs up
        self._release(request, now)
        if fault is None:
            self.stats.ok(request.rid, now)
            request.connection.send(self.answers.bytes(request.rid, request.prompt_tokens))
        else:
            self.stats.fail(fault)
            request.connection.fail(fault, self.answers.bytes(request.rid, request.prompt_tokens))

    def _fault(self) -> str | None:
        draw = self._rng.random()
        for kind, share in self._faults:
            draw -= share
            if draw < 0:
                return kind
        return None


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a benchmark's client speaks it."""

    def __init__(self, engine: Engine, info: dict[str, Any], record: Record | None) -> None:
        self._engine, self._info, self._record = engine, info, record
        self._buffer = bytearray()
        self._start = self._need = 0
        self._requests: list[Request] = []
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] (uvloop's is no asyncio.Transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for request in self._requests:
            self._engine.gone(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        while len(buffer) >= self._need:
            if not self._need:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                length = _LENGTH.search(buffer, 0, end)
                self._start = end + 4
                self._need = self._start + (int(length[1]) if length else 0)
                continue
            if buffer.startswith(b"POST /generate "):
                self._generate(buffer)
            else:
                self._other(bytes(buffer[:self._start]))
            del buffer[:self._need]
            self._need = 0

    def _generate(self, buffer: bytearray) -> None:
        start, need = self._start, self._need
        found = _RID.search(buffer, start, need)
        ids = buffer.find(b'"input_ids"', start, need)
        count = buffer.count(b",", ids, buffer.find(b"]", ids, need)) + 1 if ids >= 0 else 1
        if self._record is not None:
            self._record.add(buffer[start:need])
        if judged := _JUDGED.search(buffer, start, need):
            self._judge(bytes(buffer[start:need]), (judged[1], judged[2]))
            return
        self._requests = [Request(self, bytes(found[1]) if found else b"", b"%d" % count)]
        self._engine.submit(self._requests[0])

    def _judge(self, body: bytes, verdicts: tuple[bytes, bytes]) -> None:
        begin = body.index(b"[", body.index(b'"input_ids"'))
        if listed := body.startswith(b"[[", begin):
            rids = _RIDS.search(body)
            assert rids is not None, "several judgements come with their ids"
            prompts = body[begin + 2:body.index(b"]]", begin)].split(b"],[")
            names = [rid.strip(b'" ') for rid in rids[1].split(b",")]
        else:
            one = _RID.search(body)
            prompts, names = [body[begin + 1:body.index(b"]", begin)]], [one[1] if one else b""]
        together = Together(self, verdicts, prompts, names, listed)
        self._requests = together.requests
        for request in together.requests:
            self._engine.submit(request)

    def _other(self, head: bytes) -> None:
        method, path = head.split(b" ", 2)[:2]
        if path == b"/stats":
            self._json(self._engine.stats.json())
        elif path == b"/reset" and method == b"POST":
            self._engine.stats = Stats()
            self._json({})
        elif path == b"/model_info":
            self._json({"model_path": self._info["model_path"], "is_generation": True})
        elif path == b"/server_info":
            self._json(self._info)
        elif path in (b"/health", b"/abort_request"):
            self._json({})
        else:
            self.refuse(404, "Not Found")

    def _json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send(b"HTTP/1.1 %d OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            status, len(body), body))

    def send(self, answer: bytes) -> None:
        """Write a whole answer; the connection stays."""
        self._transport.write(answer)

    def refuse(self, status: int, message: str) -> None:
        """An error in the server's shape."""
        self._json({"error": {"message": message}}, status)

    def fail(self, fault: str, answer: bytes) -> None:
        """What goes wrong in place of the answer."""
        if fault.isdigit():
            self.refuse(int(fault), f"fake {fault}")
        elif fault == "reset":
            self._transport.abort()
        elif fault == "truncate":
            self.send(answer[:len(answer) // 2])
            self._transport.close()
        elif fault == "garbage":
            self.send(b"HTTP/1.1 200 OK\r\ncontent-length: 21\r\n\r\n<html>not JSON</html>")
        else:
            self._json({"text": "", "output_ids": [], "meta_info": {
                "finish_reason": {"type": "abort", "message": "fake abort"}}})


class Record:
    """The first requests' bodies, one a line, for clients that shall send the same."""

    def __init__(self, path: str, most: int) -> None:
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 (open as long as the process)
        self._left = most

    def add(self, body: bytes | bytearray) -> None:
        """Write a body while there is room."""
        if self._left:
            self._left -= 1
            self._file.write(bytes(body) + b"\n")
            self._file.flush()


def _faults(text: str) -> list[tuple[str, float]]:
    split = (part.partition("=") for part in text.split(",") if part)
    pairs = [(kind.strip(), float(share)) for kind, _, share in split]
    unknown = [kind for kind, _ in pairs if kind not in FAULTS]
    if unknown or sum(share for _, share in pairs) > 1:
        raise argparse.ArgumentTypeError(f"KIND=SHARE,... of {', '.join(FAULTS)}; shares sum to at most 1")
    return pairs


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--port", type=int, default=0, help="port on 127.0.0.1 (a free one)")
    add("--latency-s", type=float, default=0.02, help="seconds that a request keeps its slot")
    add("--concurrency", type=int, default=64, help="slots")
    add("--queue", type=int, default=10**9, help="most requests waiting; more get HTTP 503")
    add("--faults", type=_faults, default=[], metavar="KIND=SHARE,...", help=f"of {', '.join(FAULTS)}")
    add("--seed", type=int, default=0, help="seed of the faults")
    add("--tokens", type=int, default=64, help="tokens of an answer")
    add("--variants", type=int, default=VARIANTS, help="different answers")
    add("--model-path", default="fake", help="what /model_info says; its tokenizer.json, if there, gives the ids")
    add("--vocab", type=int, default=10**9, help="ids stay below it")
    add("--no-seeds", action="store_true", help="say that requests' seeds are not honoured")
    add("--record", metavar="FILE", help="write the first requests' bodies there, one a line")
    add("--record-most", type=int, default=500, help="how many")
    add("--until-stdin-ends", action="store_true", help="end with the process that holds stdin's other end")
    return parser.parse_args()


async def _serve(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    engine = Engine(options, loop)
    info = {
        "version": "fake", "model_path": options.model_path, "revision": None, "dtype": "float32",
        "quantization": None, "context_length": None, "max_total_num_tokens": 1 << 24,
        "max_running_requests": options.concurrency,
        "max_queued_requests": options.queue, "sampling_backend": "pytorch", "attention_backend": "fake",
        "enable_deterministic_inference": not options.no_seeds, "random_seed": 0,
        "enable_custom_logit_processor": True, "preferred_sampling_params": None, "speculative_algorithm": None,
        "tp_size": 1, "dp_size": 1, "device": "cpu", "disable_radix_cache": False, "chunked_prefill_size": -1,
        "kv_cache_dtype": "auto"}
    record = Record(options.record, options.record_most) if options.record else None
    server = await loop.create_server(lambda: Connection(engine, info, record), "127.0.0.1", options.port, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    gc.collect()
    gc.freeze()
    ended = loop.create_future()
    if options.until_stdin_ends:
        loop.add_reader(sys.stdin.fileno(), lambda: ended.done() or ended.set_result(None))
    await ended


def main() -> None:
    """Serve until killed."""
    import uvloop

    uvloop.run(_serve(_options()))


if __name__ == "__main__":
    main()
