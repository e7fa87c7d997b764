"""One SGLang server: requests out, typed replies and typed failures back."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import aiohttp


class RequestFailed(Exception):
    """A request that brought no usable answer.

    `kind` is the status a row gets if this was the last attempt; `retry` whether another attempt may
    help; `server_down` whether the server itself is gone; `crashed` whether it may have been this
    request that did it.
    """

    def __init__(self, kind: str, message: str, *, retry: bool = True, server_down: bool = False,
                 crashed: bool = False, overloaded: bool = False) -> None:
        super().__init__(message)
        self.kind, self.retry, self.server_down = kind, retry, server_down
        self.crashed, self.overloaded = crashed, overloaded


@dataclass(frozen=True)
class Reply:
    """What /generate answered, checked."""

    output_ids: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: str
    meta: dict[str, Any]
    server: str
    latency_s: float


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself."""

    url: str
    model_path: str | None
    honours_seeds: bool
    custom_processors: bool
    info: dict[str, Any]


class SGLangClient:
    """Talks to one server; one instance per event loop. Holds no state but its connections."""

    def __init__(self, url: str, timeout_s: float, connections: int) -> None:
        self.url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections + 4, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self._session

    async def close(self) -> None:
        """Close the connections; requests in flight are aborted by the server."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, path: str, timeout_s: float = 10) -> Any:
        """GET a JSON document. Raises RequestFailed."""
        try:
            async with self._open().get(self.url + path, timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise RequestFailed("server_error", f"{path} answered {answer.status}")
                return json.loads(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RequestFailed("server_error", f"{path}: {_words(error)}", server_down=True) from error
        except ValueError as error:
            raise RequestFailed("server_error", f"{path} did not answer in JSON") from error

    async def facts(self) -> ServerFacts:
        """Model and resolved settings. Raises RequestFailed."""
        model, info = await asyncio.gather(self.get("/model_info"), self.get("/server_info"))
        if not isinstance(model, dict) or not isinstance(info, dict):
            raise RequestFailed("server_error", f"{self.url} is not an SGLang server: /server_info is no mapping")
        return ServerFacts(
            self.url, model.get("model_path"), bool(info.get("enable_deterministic_inference")),
            bool(info.get("enable_custom_logit_processor")), info)

    async def generate(self, payload: dict[str, Any]) -> Reply:
        """POST /generate. Raises RequestFailed for everything but a whole, well-formed answer."""
        started = time.monotonic()
        try:
            async with self._open().post(self.url + "/generate", json=payload) as answer:
                body = await answer.read()
                status = answer.status
        except TimeoutError as error:
            raise RequestFailed("timeout", f"no answer within {self._timeout.total:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed("unreachable", _words(error), server_down=True) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
            raise RequestFailed("disconnected", _words(error), server_down=True, crashed=True) from error
        except aiohttp.ClientError as error:  # a body cut short
            raise RequestFailed("bad_response", _words(error)) from error
        if status != 200:
            raise _refusal(status, body)
        return _parse(body, self.url, time.monotonic() - started)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _refusal(status: int, body: bytes) -> RequestFailed:
    message = f"HTTP {status}: {_message(body)}"
    if status in (429, 503):
        return RequestFailed("overloaded", message, overloaded=True)
    if 400 <= status < 500:
        return RequestFailed("rejected", message, retry=False)
    return RequestFailed("server_error", message)


def _message(body: bytes) -> str:
    """The text of an error in any of the server's three shapes."""
    try:
        raw = json.loads(body)
    except ValueError:
        return body[:300].decode(errors="replace")
    if isinstance(raw, dict):
        inner = raw.get("error", raw)
        raw = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(raw)[:300]


def _parse(body: bytes, url: str, latency_s: float) -> Reply:
    try:
        raw = json.loads(body)
        meta = raw["meta_info"]
        reason = meta["finish_reason"]
        kind = reason["type"] if isinstance(reason, dict) else str(reason)
        if kind == "abort":
            said = reason.get("message") if isinstance(reason, dict) else None
            raise RequestFailed("aborted", str(said or "the server aborted the request"))
        ids = raw["output_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise TypeError("output_ids is not a list of token ids")
        logprobs = None
        if entries := meta.get("output_token_logprobs"):
            logprobs = [_finite(entry[0]) for entry in entries]
            if [entry[1] for entry in entries] != ids:
                raise TypeError("the ids of output_token_logprobs are not output_ids")
        return Reply(ids, logprobs, str(raw.get("text", "")), kind, meta, url, latency_s)
    except RequestFailed:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RequestFailed("bad_response", f"not an answer of SGLang: {_words(error)}") from error


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a log-probability is {number}")
    return number
