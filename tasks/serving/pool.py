"""Many SGLang servers as one: least outstanding work, retries elsewhere, nothing lost.

No request is bound to a server in advance: a request takes the next free place, at the server with the
smallest share of its places taken. A server that is gone is probed in the background and comes back when
it answers. When none has answered for `wait_s`, the pool gives up with UnreachableError and what was not
answered stays owed.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tasks.core.errors import InterruptedRun, UnreachableError
from tasks.serving.client import Reply, RequestFailed, ServerFacts, SGLangClient

log = logging.getLogger("winnow.pool")
T = TypeVar("T")

CRASHES_TO_POISON = 2


@dataclass(frozen=True)
class Outcome:
    """How a request ended: a reply, or the last failure; either is a row."""

    reply: Reply | None
    failure: RequestFailed | None
    attempts: int
    server: str | None


@dataclass(eq=False)
class _Server:
    client: SGLangClient
    limit: int
    in_flight: int = 0
    down_since: float | None = None
    facts: ServerFacts | None = None


class ServerPool:
    """The servers of one role. Lives on the event loop of `Loop`; call `generate` there."""

    def __init__(self, servers: list[tuple[str, int]], *, attempts: int, timeout_s: float, wait_s: float) -> None:
        """`servers`: (url, most requests in flight)."""
        self._servers = [_Server(SGLangClient(url, timeout_s, limit), limit) for url, limit in servers]
        self._attempts, self._wait_s = attempts, wait_s
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._probe: asyncio.Task[None] | None = None
        self._gone: UnreachableError | None = None

    @property
    def capacity(self) -> int:
        """Requests that may be in flight at once."""
        return sum(s.limit for s in self._servers)

    async def facts(self) -> list[ServerFacts]:
        """What each server that answers says of itself. Raises UnreachableError when none does."""
        found = await asyncio.gather(*(s.client.facts() for s in self._servers), return_exceptions=True)
        for server, fact in zip(self._servers, found, strict=True):
            if isinstance(fact, ServerFacts):
                server.facts = fact
            elif isinstance(fact, RequestFailed):
                log.warning("%s does not answer: %s", server.client.url, fact)
            else:
                raise fact
        facts = [s.facts for s in self._servers if s.facts]
        if not facts:
            lines = [f"  {s.client.url}: {f}" for s, f in zip(self._servers, found, strict=True)]
            raise UnreachableError("no server answers:\n" + "\n".join(lines))
        return facts

    async def generate(self, payload: dict[str, Any]) -> Outcome:
        """Send until it is answered or the attempts are used up; the outcome is a row either way.

        Raises UnreachableError when no server is left, and asyncio.CancelledError.
        """
        attempts = crashes = turned_away = 0
        last: _Server | None = None
        while True:
            server = await self._take(avoid=last)
            failure: RequestFailed | None = None
            try:
                attempts += 1
                reply = await server.client.generate(payload)
                return Outcome(reply, None, attempts, server.client.url)
            except RequestFailed as error:
                failure = error
            finally:
                self._give_back(server)
            last = server
            if failure.server_down:
                self._mark_down(server, failure)
            if failure.kind == "unreachable":
                attempts -= 1  # it was never sent
                continue
            crashes += failure.crashed
            if crashes >= CRASHES_TO_POISON:
                poison = RequestFailed("poison", f"in flight at {crashes} server crashes; not sent again")
                return Outcome(None, poison, attempts, server.client.url)
            if failure.overloaded and turned_away < 20:
                attempts -= 1
                turned_away += 1
                await asyncio.sleep(min(5.0, 0.1 * 2**turned_away) * random.uniform(0.5, 1))
                continue
            if not failure.retry or attempts >= self._attempts:
                return Outcome(None, failure, attempts, server.client.url)
            await asyncio.sleep(min(10.0, 0.2 * 2**attempts) * random.uniform(0.5, 1))

    async def _take(self, avoid: _Server | None) -> _Server:
        """A place at the least loaded server that is up; waits for one. `avoid`: only if it is the last one."""
        while True:
            if self._gone:
                raise self._gone
            free = [s for s in self._servers if s.down_since is None and s.in_flight < s.limit]
            others = [s for s in free if s is not avoid]
            if free:
                server = min(others or free, key=lambda s: s.in_flight / s.limit)
                server.in_flight += 1
                return server
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                self._wake()
                raise

    def _give_back(self, server: _Server) -> None:
        server.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def _wake_all(self) -> None:
        for _ in range(len(self._waiting)):
            self._wake()

    def _mark_down(self, server: _Server, failure: RequestFailed) -> None:
        if server.down_since is None:
            log.warning("%s is gone: %s; probing until it answers", server.client.url, failure)
            server.down_since = time.monotonic()
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probe_down())

    async def _probe_down(self) -> None:
        """Ask servers that are down until they answer; give up when all have been down for too long."""
        pause = 0.25
        while down := [s for s in self._servers if s.down_since is not None]:
            for server in down:
                try:
                    await server.client.get("/model_info", timeout_s=5)
                except RequestFailed:
                    continue
                log.warning("%s answers again", server.client.url)
                server.down_since = None
                pause = 0.25
                self._wake_all()
            now = time.monotonic()
            if all(s.down_since is not None and now - s.down_since > self._wait_s for s in self._servers):
                urls = ", ".join(s.client.url for s in self._servers)
                self._gone = UnreachableError(
                    f"no server has answered for {self._wait_s:g} s ({urls}); what was not answered is still "
                    "owed: start a server and run the same command again")
                self._wake_all()
                return
            await asyncio.sleep(pause)
            pause = min(5.0, pause * 1.5)

    async def close(self) -> None:
        """Close every connection."""
        if self._probe:
            self._probe.cancel()
        await asyncio.gather(*(s.client.close() for s in self._servers))


async def gather_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all, in order; the first exception cancels the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(w) for w in work]
    except BaseExceptionGroup as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [t.result() for t in tasks]


class Loop:
    """An event loop on a thread of its own, where all requests of the process run.

    Shards are worked on in other threads (or Prefect's); they hand coroutines to `run` and wait. So one
    pool, with one limit per server, serves them all.
    """

    def __init__(self) -> None:
        import uvloop

        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="winnow-requests", daemon=True)
        self._thread.start()
        self._stopped = threading.Event()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine there, wait for its result. Raises InterruptedRun after `stop`."""
        if self._stopped.is_set():
            raise InterruptedRun("interrupted")
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        if self._stopped.is_set():  # between the look above and the line above
            future.cancel()
        try:
            return future.result()
        except (asyncio.CancelledError, concurrent.futures.CancelledError) as error:
            raise InterruptedRun("interrupted") from error

    def finish(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine even after `stop`, for closing; waits at most 5 s."""
        with contextlib.suppress(TimeoutError, asyncio.CancelledError, concurrent.futures.CancelledError):
            asyncio.run_coroutine_threadsafe(work(), self._loop).result(timeout=5)

    def stop(self) -> None:
        """Cancel everything in flight; callers of `run` get InterruptedRun."""
        self._stopped.set()
        self._loop.call_soon_threadsafe(self._cancel_all)

    def end(self) -> None:
        """End the thread, once everything is cancelled and closed."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
