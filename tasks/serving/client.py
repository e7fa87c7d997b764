"""One SGLang server: requests out, typed replies and typed failures back."""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from tasks.serving.failures import RequestFailed
from tasks.serving.guard.told import algorithm
from tasks.serving.replies import Reply, parse, parse_scores

__all__ = ["Reply", "SGLangClient", "ServerFacts"]

_JSON = {"Content-Type": "application/json"}
# uvicorn drops a connection that was idle for 5 s; reusing one at that moment would lose the request
_KEEP_ALIVE_S = 4.0
_CONNECT_S = 10.0
_SERVER_INFO_S = 30.0  # its scheduler answers between two steps: 13 s were seen during a long prefill


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself."""

    url: str
    model_path: str | None
    honours_seeds: bool
    custom_processors: bool
    info: dict[str, Any]
    generates: bool = True
    """Not an embedding or reward model."""
    context: int | None = None
    """Longest sequence in tokens, as resolved."""

    @property
    def speculation(self) -> str | None:
        """The speculative decoding algorithm, which ignores custom processors and min_p; None when off."""
        found = algorithm(self.info.get("speculative_algorithm"))
        return None if found == "off" else found

    @property
    def metrics(self) -> bool:
        """Whether GET /metrics answers."""
        return bool(self.info.get("enable_metrics"))

    @property
    def max_running(self) -> int | None:
        """Requests that the server runs at once; more wait in its queue."""
        found = self.info.get("max_running_requests")
        for state in self.info.get("internal_states") or []:
            if isinstance(state, dict):
                found = state.get("effective_max_running_requests_per_dp") or found
        if not isinstance(found, int) or found < 1:
            return None
        return found * max(1, self.info.get("dp_size") or 1)


class _Connector(aiohttp.TCPConnector):
    """Knows when its newest connection was made: behind it may be another process than before."""

    newest = 0.0

    async def _create_connection(self, *args: Any, **kwargs: Any) -> Any:
        made = await super()._create_connection(*args, **kwargs)
        self.newest = time.monotonic()
        return made


class SGLangClient:
    """Talks to one server; one instance per event loop."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._generate_url = self.url + "/generate"
        self._connector: _Connector | None = None
        self._requests: aiohttp.ClientSession | None = None
        self._control: aiohttp.ClientSession | None = None
        self._echoes = False  # its answers have borne the request's id

    @property
    def newest_connection(self) -> float:
        """When (monotonic seconds) the newest connection for requests was made; 0.0 before the first."""
        return self._connector.newest if self._connector else 0.0

    def _open(self) -> aiohttp.ClientSession:
        # two sessions: a question about the server must neither wait for requests nor count as one's connection
        if self._requests is None:
            self._connector = _Connector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            self._requests = aiohttp.ClientSession(connector=self._connector, auto_decompress=True)
        return self._requests

    async def close(self) -> None:
        """Close the connections; requests in flight are aborted by the server."""
        for session in (self._requests, self._control):
            if session is not None:
                await session.close()
        self._requests = self._control = self._connector = None

    async def _get(self, path: str, timeout_s: float) -> bytes:
        if self._control is None:
            self._control = aiohttp.ClientSession(connector=aiohttp.TCPConnector(keepalive_timeout=_KEEP_ALIVE_S))
        try:
            async with self._control.get(self.url + path, timeout=aiohttp.ClientTimeout(total=timeout_s),
                                         allow_redirects=False) as answer:
                body = await answer.read()
        except TimeoutError as error:
            raise RequestFailed("timeout", f"{path}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed("unreachable", f"{path}: {_words(error)}") from error
        if answer.status != 200:
            kind = "overloaded" if answer.status in (429, 503) else "server_error"
            raise RequestFailed(kind, f"{path} answered {answer.status}")
        return body

    async def get(self, path: str, timeout_s: float = 10) -> Any:
        """GET a JSON document. Raises RequestFailed."""
        try:
            return orjson.loads(await self._get(path, timeout_s))
        except ValueError as error:
            raise RequestFailed("server_error", f"{path} did not answer in JSON") from error

    async def facts(self) -> ServerFacts:
        """Model and resolved settings. Raises RequestFailed."""
        model, info, context = await asyncio.gather(
            self.get("/model_info"), self.get("/server_info", _SERVER_INFO_S), self._context())
        for path, found in (("/model_info", model), ("/server_info", info)):
            if not isinstance(found, dict):
                raise RequestFailed("server_error", f"{self.url} is not an SGLang server: {path} is no mapping")
        # seeds want the pytorch sampler; speculation draws its tokens by other means
        honours = (bool(info.get("enable_deterministic_inference"))
                   and algorithm(info.get("speculative_algorithm")) == "off"
                   and info.get("sampling_backend") in (None, "pytorch", "ascend"))
        return ServerFacts(self.url, model.get("model_path"), honours, bool(info.get("enable_custom_logit_processor")),
                           info, model.get("is_generation") is not False, context)

    async def _context(self) -> int | None:
        """The longest sequence that /v1/models names; None where it does not say."""
        try:
            found = (await self.get("/v1/models"))["data"][0]["max_model_len"]
        except (RequestFailed, KeyError, IndexError, TypeError):
            return None
        return found if isinstance(found, int) else None

    async def load(self) -> tuple[float, float] | None:
        """(requests that run, requests that wait) as /metrics has them; None where it does not say."""
        text = (await self._get("/metrics", 5)).decode(errors="replace")
        found: dict[str, float] = {}
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in ("sglang:num_running_reqs", "sglang:num_queue_reqs"):
                try:
                    found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])  # a line per dp rank
                except ValueError:
                    return None
        if len(found) != 2:
            return None
        return found["sglang:num_running_reqs"], found["sglang:num_queue_reqs"]

    async def generate(self, body: bytes, timeout_s: float, *, rid: str | None = None, vocab: int | None = None,
                       masked: bool = False) -> Reply:
        """POST /generate. Raises RequestFailed for everything but a whole, well-formed answer.

        `rid`: the request's id, which the answer must bear too if this server has ever done so (something between us
        may number requests its own way); `vocab`: its ids must lie below; `masked`: it must have the
        sampling mask, which the request asks for.
        """
        content, latency_s = await self._post(self._generate_url, body, timeout_s)
        reply = parse(content, latency_s, rid if self._echoes else None, vocab, masked)
        self._echoes = self._echoes or (rid is not None and reply.meta.get("id") == rid)
        return reply

    async def generate_each(self, body: bytes, timeout_s: float, *, rids: Sequence[str]) -> Reply:
        """POST /generate with a list of prompts, whose ids are `rids`: a reply with `scores`, the `meta_info` of each.

        Raises RequestFailed for everything but a whole, well-formed answer, as `generate` does.
        """
        content, latency_s = await self._post(self._generate_url, body, timeout_s)
        reply, echoed = parse_scores(content, latency_s, rids, strict=self._echoes, part="meta_info")
        self._echoes = self._echoes or echoed
        return reply

    async def classify(self, body: bytes, timeout_s: float, *, rids: Sequence[str]) -> Reply:
        """POST /classify with a list of texts, whose ids are `rids`: a reply with `scores`, one for each.

        Raises RequestFailed for everything but a whole, well-formed answer, as `generate` does.
        """
        content, latency_s = await self._post(self.url + "/classify", body, timeout_s)
        reply, echoed = parse_scores(content, latency_s, rids, strict=self._echoes)
        self._echoes = self._echoes or echoed
        return reply

    async def _post(self, url: str, body: bytes, timeout_s: float) -> tuple[bytes, float]:
        """The body of an answer with status 200, and the seconds that it took."""
        started = time.monotonic()
        try:
            async with self._open().post(
                    url, data=body, headers=_JSON, allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)) as answer:
                content = await answer.read()
                status = answer.status
        except aiohttp.ConnectionTimeoutError as error:
            raise RequestFailed("unreachable", f"no connection within {_CONNECT_S:g} s") from error
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no whole answer within {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            if error.os_error.errno in (errno.EMFILE, errno.ENFILE):  # it is us: fewer connections are the mend
                raise RequestFailed("overloaded", f"too many open files here (ulimit -n): {error}") from error
            raise RequestFailed("unreachable", _words(error)) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
            raise RequestFailed("disconnected", _words(error)) from error
        except aiohttp.ClientError as error:  # a body cut short, headers that are none
            raise RequestFailed("bad_response", _words(error)) from error
        if status != 200:
            raise _refusal(status, content, answer.headers.get("Retry-After"))
        return content, time.monotonic() - started


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _refusal(status: int, body: bytes, retry_after: str | None) -> RequestFailed:
    message = f"HTTP {status}: {_message(body)}"
    if status in (429, 503):
        return RequestFailed("overloaded", message, retry_after_s=_seconds(retry_after))
    if status == 408:
        return RequestFailed("timeout", message)
    # 401, 403, 404, 405 and redirects are about the address, not about the request
    if 400 <= status < 500 and status not in (401, 403, 404, 405):
        return RequestFailed("rejected", message)
    return RequestFailed("server_error", message)


def _seconds(retry_after: str | None) -> float | None:
    try:
        value = float(retry_after or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _message(body: bytes) -> str:
    """The text of an error in any of the server's three shapes."""
    try:
        raw = orjson.loads(body)
    except ValueError:
        return body[:300].decode(errors="replace")
    if isinstance(raw, dict):
        inner = raw.get("error", raw)
        raw = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(raw)[:300]
