"""The servers of a pool: who joins, who is down, who works; asked in the background while there is work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from tasks.serving.client import ServerFacts
from tasks.serving.failures import RequestFailed
from tasks.serving.server import Server

log = logging.getLogger("winnow.pool")

_METRICS_EVERY_S = 2.0
_REFUSALS = 3  # in a row, with nothing else in flight: it does not work


@dataclass(frozen=True)
class Limits:
    """How long a pool tries."""

    attempts: int
    """Strikes until a request is a failure."""
    timeout_s: float
    """Seconds until an attempt counts as timed out."""
    deadline_s: float
    """Seconds of attempts and pauses until a request is a failure."""
    wait_s: float
    """Seconds without any server that works until the pool gives up."""


class Fleet:
    """Servers and their admission. Lives on the pool's event loop."""

    def __init__(self, servers: Iterable[tuple[str, int | None]], limits: Limits,
                 admit: Callable[[ServerFacts], str | None], changed: Callable[[], None]) -> None:
        """`servers`: (url, most requests in flight or None); `admit`: why a server can't be used, or None;
        `changed`: called when a server may take work that could not before."""
        self.limits, self._admit, self._changed = limits, admit, changed
        self.servers: list[Server] = []
        self.places = 1  # requests that the servers take at once; as of the last tick
        self.hold_below = 0.0  # with fewer requests left a free place may be better left free; as of the last tick
        self._background: set[asyncio.Task[Any]] = set()
        self._next_metrics = 0.0
        self._alive_at = time.monotonic()
        self._waiting = 0  # requests not begun, as of the last tick
        self.update(servers)

    def update(self, servers: Iterable[tuple[str, int | None]]) -> None:
        """Make these the servers: new ones join, others leave once what they have in flight is done."""
        wanted = {url.rstrip("/"): ceiling for url, ceiling in servers}
        for server in self.servers:
            if server.url not in wanted and server.state != "left":
                log.warning("%s leaves; %d requests there are waited for", server.url, server.in_flight)
                server.state, server.note = "left", "taken out of the run"
        here = {s.url: s for s in self.servers}
        for url, ceiling in wanted.items():
            if url in here:  # also one that left: what it has in flight still counts against its limit
                here[url].joins(ceiling)
            else:
                self.servers.append(Server(url, ceiling, self.limits.timeout_s))
        self.places = max(1, sum(s.limit for s in self.servers if s.state != "left"))

    def working(self) -> list[Server]:
        """The servers that may be given work now or once a place is free."""
        now = time.monotonic()
        return [s for s in self.servers if s.takes_work and s.paused_until <= now]

    def others_work(self, server: Server) -> bool:
        """Whether another server works without faults."""
        return any(s.takes_work and not s.faults_in_a_row for s in self.servers if s is not server)

    def woke(self) -> None:
        """There is work again after there was none: the time without it does not count."""
        self._alive_at = time.monotonic()

    def tick(self, left: int) -> str | None:
        """Ask whoever is due; `left`: requests not begun yet. Why nothing can be expected any more, or None."""
        now = time.monotonic()
        for server in self.servers:
            if server.state in ("joining", "down", "unfit") and server.ask_at <= now:
                server.ask_at = now + 60.0  # until the answer says otherwise
                self.spawn(self._ask_facts(server))
        if now >= self._next_metrics:
            self._next_metrics = now + _METRICS_EVERY_S
            for server in self.servers:
                if server.state == "up" and server.facts and server.facts.metrics:
                    self.spawn(self._ask_load(server))
        self._waiting = left
        for server in self.servers:
            server.stalled(now)
        self.share_out(left)
        return self._dead_for(now)

    def share_out(self, left: int) -> None:
        """Bring the sums over the servers up to date.

        A server that never answered gets at most a quarter of its fair share: it may be the slow one.
        """
        working = [s for s in self.servers if s.takes_work]
        for server in working:
            if server.latency_s is None:
                server.share = max(4, left // (4 * len(working))) if len(working) > 1 else 0
        self.places = max(1, sum(s.limit for s in working))
        known = [(s.limit / s.latency_s, s.latency_s) for s in working if s.latency_s]
        self.hold_below = 2 * self.places + sum(r for r, _ in known) * max((t for _, t in known), default=0.0)

    def _dead_for(self, now: float) -> str | None:
        if any(s.state == "up" and s.refusals_in_a_row < _REFUSALS for s in self.servers):
            self._alive_at = now
        # also one that is up only between two looks
        self._alive_at = max([self._alive_at, *(s.answered_at for s in self.servers)])
        # what is under way may yet succeed; that it was tried is no sign of life, or trials that fail would be for ever
        pending = any(s.state in ("joining", "checking") or (s.takes_work and s.in_flight) for s in self.servers)
        if pending or now - self._alive_at <= self.limits.wait_s:
            return None
        here = [s for s in self.servers if s.state != "left"]
        lines = [f"  {s.url}: {s.note}" for s in here[:8]] or ["  every server was taken out of the run"]
        if len(here) > 8:
            lines.append(f"  and {len(here) - 8} more")
        return "\n".join([f"no server has worked for {self.limits.wait_s:g} s:", *lines,
                          "What was not answered is still owed: mend a server and run the same command again."])

    async def _ask_facts(self, server: Server) -> None:
        asked_at = time.monotonic()
        try:
            facts = await server.client.facts()
            why = self._admit(facts)
        except RequestFailed as failure:
            server.no_answer(str(failure))
            return
        except Exception as error:  # of ours, or facts that nobody expected: neither may hang the run
            log.exception("%s can't be judged", server.url)
            server.no_answer(f"it can't be judged: {error!r}")
            return
        if server.state not in ("joining", "down", "unfit"):
            return
        if why:
            server.go_down(why, unfit=True)
        else:
            server.admitted(facts, asked_at)
            self.share_out(self._waiting)
            self._changed()

    async def _ask_load(self, server: Server) -> None:
        try:
            if load := await server.client.load():
                server.adaptive.queue_seen(*load)
        except RequestFailed as failure:
            log.debug("%s: %s", server.url, failure)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it beside the requests, until `close`."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Close every connection."""
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*(s.client.close() for s in self.servers))
