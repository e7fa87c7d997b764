"""A fake SGLang server: real HTTP on a loopback port, answers that depend on the request alone, faults on order.

Not a model: words drawn by the request's seed. It records every request, so that a test can say what was
sent; `fault` decides per request what goes wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

WORDS = ["the", "answer", "is", "7", "12", "a", "lamp", "sings", "softly", "and", "rain", "falls", "on", "red", "kites", "while", "birds", "rest", "in", "shade"]

Fault = Callable[[int, dict[str, Any]], str | None]
"""(number of the request, payload) -> a fault's name or None: see `_FAULTS` and `_answer`."""


class FakeSGLang:
    """`with FakeSGLang(...) as server:` serves at `server.url` until the block ends."""

    def __init__(self, *, fault: Fault | None = None, delay_s: float = 0.0, deterministic: bool = True,
                 custom_processors: bool = True, model_path: str = "tiny", eos: int = 256, port: int = 0) -> None:
        self.fault, self.delay_s, self.eos, self.port = fault, delay_s, eos, port
        self.info = {"enable_deterministic_inference": deterministic, "version": "fake", "model_path": model_path,
                     "enable_custom_logit_processor": custom_processors, "sampling_backend": "pytorch",
                     "api_key": "a secret"}
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop: asyncio.Event

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def generations(self) -> list[dict[str, Any]]:
        """The requests for candidates; the rest are judgements."""
        return [r for r in self.requests if "token_ids_logprob" not in r]

    @property
    def judgements(self) -> list[dict[str, Any]]:
        return [r for r in self.requests if "token_ids_logprob" in r]

    def __enter__(self) -> FakeSGLang:
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/model_info", self._json({"model_path": self.info["model_path"]}))
        app.router.add_get("/server_info", self._json(self.info))
        app.router.add_get("/health", self._json({}))
        app.router.add_post("/generate", self._generate)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    @staticmethod
    def _json(value: Any) -> Any:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response(value)
        return answer

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        number = len(self.requests)
        self.requests.append(payload)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            return await self._answer(request, payload, self.fault(number, payload) if self.fault else None)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, payload: dict[str, Any], fault: str | None) -> web.StreamResponse:
        if fault in ("400", "429", "500", "503"):
            return web.json_response({"error": {"message": f"fake {fault}"}}, status=int(fault))
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "garbage":
            return web.Response(text="<html>not json</html>")
        answer = self.judge(payload) if "token_ids_logprob" in payload else self.write(payload)
        if fault == "abort":
            answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "fake abort"}
        if fault == "wrong_ids":
            answer["output_ids"] = answer["output_ids"] + [3]
        body = json.dumps(answer).encode()
        if fault == "truncate":
            response = web.StreamResponse(headers={"Content-Length": str(len(body))})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=body, content_type="application/json")

    def write(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Words by the seed, as the ids of a byte tokenizer (tests/tiny_model.py)."""
        params = payload["sampling_params"]
        rng = random.Random(json.dumps([params["sampling_seed"], payload["input_ids"]]))
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))
        ids = list(text.encode())[: params["max_new_tokens"]]
        whole = len(ids) == len(text)
        if whole and len(ids) < params["max_new_tokens"]:
            ids.append(self.eos)
        logprobs = [[-rng.random(), i, None] for i in ids]
        return {"text": bytes(i for i in ids if i < 256).decode(), "output_ids": ids, "meta_info": {
            "finish_reason": {"type": "stop" if whole else "length"}, "output_token_logprobs": logprobs,
            "prompt_tokens": len(payload["input_ids"]), "completion_tokens": len(ids)}}

    def judge(self, payload: dict[str, Any]) -> dict[str, Any]:
        """A verdict that depends on the prompt alone; 2 % of the mass goes elsewhere."""
        p = int(hashlib.sha256(json.dumps(payload["input_ids"]).encode()).hexdigest()[:8], 16) / 2**32
        p = 0.05 + 0.9 * p
        a, b = payload["token_ids_logprob"]
        entries = [[math.log(0.98 * p), a, None], [math.log(0.98 * (1 - p)), b, None]]
        return {"text": "A", "output_ids": [a], "meta_info": {
            "finish_reason": {"type": "length"}, "output_token_logprobs": [[math.log(0.98 * p), a, None]],
            "output_token_ids_logprobs": [entries], "prompt_tokens": len(payload["input_ids"]),
            "completion_tokens": 1}}
