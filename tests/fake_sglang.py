"""A fake SGLang server: real HTTP on a loopback port, slots and a queue, faults and crashes on order.

It records every request, so that a test can say what was sent; `fault` decides per request what goes wrong. What it
answers is in tests/fake_answers.py. Its methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from aiohttp import web

from tests import fake_answers
from tests.fake_answers import FOREIGN_BODIES, REFUSALS, SERVER_INFO, WORDS

__all__ = ["WORDS", "ControlFault", "FakeSGLang", "Fault"]

Fault = Callable[[int, dict[str, Any]], str | None]
"""(number of the request, payload) -> None or a fault's name:
400 401 404 429 500 503 redirect; garbage empty_body null; abort wrong_ids wrong_vocab wrong_rid wrong_count nan;
truncate drip hang reset; crash (the whole server, see `crash`).
Of /classify too, where the wrong_count is one of answers."""

ControlFault = Callable[[str], str | None]
"""Path of a GET -> "hang", "500" or None."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeSGLang:
    """`with FakeSGLang(...) as server:` serves at `server.url` until the block ends.

    `concurrency` requests are at work at once, `delay_s` each; the rest wait in the order in which they came, and
    with `queue_limit` waiting the next one is answered 503. `retry_after` [s] goes with every 429 and 503.
    """

    def __init__(self, *, fault: Fault | None = None, delay_s: float = 0.0, deterministic: bool = True,
                 custom_processors: bool = True, model_path: str = "tiny", eos: int = 256, port: int = 0,
                 concurrency: int | None = None, queue_limit: int | None = None, retry_after: float | None = None,
                 metrics: bool = False, control_fault: ControlFault | None = None,
                 crash_down_s: float | None = None, **flags: Any) -> None:
        """`flags`: what else it is told when it is started, by the names of /server_info: dtype="float16"."""
        self.fault, self.delay_s, self.eos, self.port = fault, delay_s, eos, port
        self.concurrency, self.queue_limit, self.retry_after = concurrency, queue_limit, retry_after
        self.metrics, self.control_fault, self.crash_down_s = metrics, control_fault, crash_down_s
        self.told: dict[str, Any] = {
            "model_path": model_path, "sampling_backend": "pytorch", "enable_deterministic_inference": deterministic,
            "enable_custom_logit_processor": custom_processors, "enable_metrics": metrics,
            "max_queued_requests": queue_limit, "api_key": "a secret"} | flags
        self.info = SERVER_INFO | self.told
        self.requests: list[dict[str, Any]] = []
        self.answered: collections.Counter[str] = collections.Counter()
        self.control: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self.running = self.waiting = self.crashes = 0
        self._life = 0
        self._runner: web.AppRunner | None = None
        self._comeback: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what a test asks ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def generations(self) -> list[dict[str, Any]]:
        """The requests for candidates; the rest are judgements and scores."""
        return [r for r in self.requests if "sampling_params" in r and "token_ids_logprob" not in r]

    @property
    def judgements(self) -> list[dict[str, Any]]:
        """Each order of each pair by itself; a request holds several."""
        return [one for r in self.requests if "token_ids_logprob" in r for one in fake_answers.singles(r)]

    @property
    def classifications(self) -> list[dict[str, Any]]:
        """The requests for scores, each of many texts."""
        return [r for r in self.requests if "sampling_params" not in r]

    def write(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The whole answer to a request for a candidate."""
        return fake_answers.write(payload, self.eos)

    def judge(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The whole answer to a request for a verdict."""
        return fake_answers.judge(payload)

    @property
    def launch_command(self) -> str:
        """The flags that it was told, as SGLang joins them."""
        given = {f"--{name.replace('_', '-')}": value for name, value in self.told.items() if value not in (None, False)}
        return " ".join(flag if value is True else f"{flag}={value}" for flag, value in given.items())

    # --- its life ---

    def __enter__(self) -> FakeSGLang:
        self._reserved = _bound(self.port)  # nobody takes the port while the server is down
        self.port = self._reserved.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._die())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._reserved.close()

    def crash(self, down_s: float | None = None) -> None:
        """Like a process that dies: every connection breaks, new ones are refused.

        It listens again after `down_s` seconds (0: at once), or with None when `restart` is called.
        """
        self._do(self._crash(down_s))

    def restart(self, model_path: str | None = None, **flags: Any) -> None:
        """A new process on the same port, perhaps with another model or told otherwise."""
        flags |= {"model_path": model_path} if model_path is not None else {}
        self.told |= flags
        self.info |= flags
        self._do(self._crash(0) if self._runner else self._listen())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run on the server's loop; waits for the end, except on the loop itself."""
        if threading.current_thread() is self._thread:
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._comeback:
            self._comeback.cancel()
        if self._runner:
            return
        app = web.Application(client_max_size=64 << 20, middlewares=[self._only_alive(self._life)])
        for path in ("/model_info", "/server_info", "/v1/models", "/health", "/ready", "/metrics", "/v1/loads"):
            app.router.add_get(path, self._control)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/classify", self._generate)
        app.router.add_get("/generate", self._redirect)  # where a followed redirect ends up
        self._slots = asyncio.Semaphore(self.concurrency or 10**9)  # first come, first served
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        self._listener = _bound(self.port)
        await web.SockSite(self._runner, self._listener, backlog=2048).start()

    async def _die(self) -> None:
        runner, self._runner = self._runner, None
        if self._comeback:
            self._comeback.cancel()
        if runner is None:
            return
        self._life += 1
        self._loop.remove_reader(self._listener)
        self._listener.shutdown(socket.SHUT_RDWR)  # refuses from here on
        for _ in range(3):  # until what was accepted before is a connection that can be broken
            await asyncio.sleep(0)
        assert runner.server is not None
        for connection in runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()  # as the kernel does it for a dead process
        await runner.cleanup()

    async def _crash(self, down_s: float | None) -> None:
        self.crashes += 1
        await self._die()
        if down_s == 0:
            await self._listen()
        elif down_s is not None:
            self._comeback = self._loop.call_later(down_s, lambda: self._do(self._listen()))

    def _only_alive(self, life: int) -> Any:
        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            if life != self._life:  # accepted just before the crash
                fake_answers.reset(request.transport)
                return web.Response()
            return await handler(request)
        return check

    # --- GET ---

    async def _control(self, request: web.Request) -> web.StreamResponse:
        self.control.append(request.path)
        fault = self.control_fault(request.path) if self.control_fault else None
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "500":
            return web.json_response(REFUSALS[fault], status=500)
        if request.path == "/metrics":
            if not self.metrics:
                return web.json_response(REFUSALS["404"], status=404)
            return web.Response(text=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})
        if request.path == "/v1/loads":
            return web.json_response({"loads": [{"dp_rank": 0, "num_running_reqs": self.running,
                                                 "num_waiting_reqs": self.waiting}]})
        if request.path == "/model_info":
            return web.json_response({"model_path": self.info["model_path"],
                                      "is_generation": not self.info["is_embedding"],
                                      "preferred_sampling_params": self.info["preferred_sampling_params"]})
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": [{
                "id": self.info["model_path"], "max_model_len": self.info["context_length"] or 8192}]})
        if request.path == "/server_info":
            return web.json_response({"launch_command": self.launch_command} | self.info)
        return web.json_response({})

    def _metrics(self) -> str:
        labels = (f'{{engine_type="unified",model_name="{self.info["model_path"]}",moe_ep_rank="0",pp_rank="0",'
                  'tp_rank="0"}')
        gauges = (("num_running_reqs", "The number of running requests.", self.running),
                  ("num_queue_reqs", "The number of requests in the waiting queue.", self.waiting))
        return "".join(f"# HELP sglang:{name} {words}\n# TYPE sglang:{name} gauge\nsglang:{name}{labels} {value:.1f}\n"
                       for name, words, value in gauges)

    # --- POST /generate, /classify ---

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        payload, came = await request.json(), time.monotonic()
        number = len(self.requests)
        self.requests.append(payload)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self._full():
                return self._refuse("503", fake_answers.QUEUE_FULL)
            if refusal := self._refusal(request.path, payload):
                return web.json_response(refusal, status=400)
            async with self._slot():
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                return await self._answer(request, payload, *self._fault(request.path, number, payload), came)
        finally:
            self.in_flight -= 1

    def _refusal(self, path: str, payload: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/classify":
            return fake_answers.classify_refusal(payload, self.info)
        return fake_answers.mask_refusal(payload)

    def _fault(self, path: str, number: int, payload: dict[str, Any]) -> tuple[str | None, int]:
        """What goes wrong, and with which prompt of the request's."""
        if self.fault:
            for n, one in enumerate(fake_answers.singles(payload) if path == "/generate" else [payload]):
                if fault := self.fault(number, one):
                    return fault, n
        return None, 0

    def _full(self) -> bool:
        return (self.concurrency is not None and self.queue_limit is not None
                and self.running + self.waiting >= self.concurrency + self.queue_limit)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        slots = self._slots
        self.waiting += 1
        try:
            await slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            slots.release()

    async def _answer(self, request: web.Request, payload: dict[str, Any], fault: str | None, nth: int,
                      came: float) -> web.StreamResponse:
        if fault in REFUSALS:
            return self._refuse(fault)
        if fault in FOREIGN_BODIES:
            return web.Response(text=FOREIGN_BODIES[fault], content_type="application/json")
        if fault == "redirect":
            return await self._redirect(request)
        if fault == "crash":
            self._do(self._crash(self.crash_down_s))
        if fault == "reset":
            fake_answers.reset(request.transport)
        if fault in ("hang", "crash", "reset"):
            await asyncio.Event().wait()
        if request.path == "/classify":
            answer: Any = fake_answers.classify(payload)
            spoilt = fake_answers.spoil_scores(answer, fault)
        elif self.info["is_embedding"]:  # no refusal: the head's numbers, whatever was asked
            answer, spoilt = fake_answers.classify({"input_ids": [payload["input_ids"]]})[0], False
        else:
            answers = [self.judge(one) if "token_ids_logprob" in one else self.write(one)
                       for one in fake_answers.singles(payload)]
            for one in answers:
                one["meta_info"]["e2e_latency"] = time.monotonic() - came
            spoilt = fake_answers.spoil(answers[nth], fault)
            answer = answers if isinstance(payload["input_ids"][0], list) else answers[0]
        body = json.dumps(answer).encode()
        if fault == "truncate":
            return await fake_answers.send_half(request, body)
        if fault == "drip":
            return await fake_answers.drip(request, body)
        if fault is not None and not spoilt:
            raise ValueError(f"there is no fault {fault!r}")
        response = web.Response(body=body, content_type="application/json")
        if spoilt:
            return response
        rids = [str(one.get("rid", "")) for one in fake_answers.singles(payload)]
        self.answered.update(rids)  # before the client can look
        try:
            await response.prepare(request)
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):  # the client is gone, or this server
            self.answered.subtract(rids)
        return response

    def _refuse(self, status: str, body: Any = None) -> web.Response:
        wait = {"Retry-After": f"{self.retry_after:g}"} if self.retry_after is not None else {}
        return web.json_response(body or REFUSALS[status], status=int(status),
                                 headers=wait if status in ("429", "503") else {})

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.path})


def _bound(port: int) -> socket.socket:
    """A socket at the port that does not listen yet: until then, connections to it are refused."""
    out = socket.socket()
    out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    out.bind(("127.0.0.1", port))
    return out
