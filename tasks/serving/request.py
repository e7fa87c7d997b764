"""A request on its way from the plan to its outcome, and the stream it comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from tasks.serving.client import Reply, ServerFacts, SGLangClient
from tasks.serving.failures import RequestFailed
from tasks.serving.server import Server


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: a reply, or the last failure; either is a row."""

    reply: Reply | None
    failure: RequestFailed | None
    attempts: int
    """Times it was sent."""
    server: str | None
    facts: ServerFacts | None
    """What the server that answered last says of itself."""


@dataclass(eq=False, slots=True)
class Request:
    """One request, from the plan to its outcome."""

    build: Callable[[ServerFacts], bytes]
    """The body for the server that was chosen."""
    settle: Callable[[Outcome], None]
    """Called once, with the outcome."""
    rid: str | None = None
    crashes: int = 0
    """Crashes of servers that it was in flight at, also in an earlier process."""
    suspected: Callable[[int], None] | None = None
    """Called with `crashes` when it grows, so that the next process may know."""
    masked: Callable[[ServerFacts], bool] | None = None
    """Whether the body for that server asks for its sampling mask; None: never."""
    ask: Callable[[SGLangClient, bytes, float], Coroutine[Any, Any, Reply]] | None = None
    """How the body is sent and its answer read (client, body, seconds that it may take); None: by /generate."""
    divisible: bool = False
    """Whoever asks makes smaller requests of it where it fails. So a crash or a timeout settles it at once: sent again
    whole it would be poison, or out of time, and all that is in it with what did it."""
    sent: int = field(default=0, init=False)
    resets: int = field(default=0, init=False)
    strikes: int = field(default=0, init=False)
    spent_s: float = field(default=0.0, init=False)
    last: Server | None = field(default=None, init=False)
    source: Source | None = field(default=None, init=False)
    facts: ServerFacts | None = field(default=None, init=False)  # of `last`, when it was sent there

    def counts_what(self, whole: Request, failure: RequestFailed) -> None:
        """This is a part of `whole`, which failed: what was spent on that was spent on this. A refusal that may be
        about another part is no strike."""
        self.spent_s, self.strikes = whole.spent_s, whole.strikes if failure.rule.again else 0


@dataclass(eq=False)
class Source:
    """A stream of requests, of one shard: pulled from when a place is free."""

    requests: Iterator[Request]
    left: int
    done: asyncio.Future[None]
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    open: int = 0
    exhausted: bool = False

    def fail(self, error: BaseException) -> None:
        if isinstance(error, StopIteration):  # a future refuses it, and who waits would wait for ever
            error = RuntimeError(f"a callback raised {error!r}")
        if not self.done.done():
            self.done.set_exception(error)
