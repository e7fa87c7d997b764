"""Many SGLang servers as one: work goes where it is done soonest, failures elsewhere, nothing is lost.

No request is bound to a server in advance. The pool takes the next request from its sources when a server has a
free place (`balance` says which, `limit` how many), so that however long the plan, only what is in flight exists.

What a failure means is in `failures`; what the pool does with it:

- never sent, turned away, or the server was not the right one: it goes back to the front of the queue;
- the connection broke: the server is asked whether it lives. If it does not (or everything in flight there broke at
  once), it died, and the request may be why: a suspect is sent again alone, and after a second crash never;
- anything else is a strike: again elsewhere, after a pause that doubles, until `attempts` strikes or the deadline.

A server that fails is left alone (down), asked in the background until it answers, and gets one request to prove
itself (trial) before it gets more. When none has worked for `wait_s`, the pool gives up with UnreachableError and
what was not answered stays owed.
"""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from tasks.core.errors import UnreachableError
from tasks.core.progress import ServerLoad
from tasks.serving.balance import choose
from tasks.serving.client import Reply, ServerFacts
from tasks.serving.crashes import CRASHES_TO_POISON, Crashes, poison
from tasks.serving.failures import RequestFailed
from tasks.serving.fleet import Fleet, Limits
from tasks.serving.request import Outcome, Request, Source
from tasks.serving.server import Server

_TICK_S = 0.1
_HOPELESS = 200


class ServerPool:
    """The servers of one role. Lives on the event loop of `Loop`; call `ask` and `ask_all` there."""

    def __init__(self, servers: Iterable[tuple[str, int | None]], limits: Limits, *,
                 admit: Callable[[ServerFacts], str | None] = lambda _: None, vocab: int | None = None) -> None:
        """`servers`: (url, most requests in flight or None); `admit`: why a server can't be used, or None;
        `vocab`: ids of answers must lie below."""
        self.limits, self._vocab = limits, vocab
        self.fleet = Fleet(servers, limits, admit, self._dispatch)
        self._queue: collections.deque[Request] = collections.deque()  # those that were sent before
        self._suspects: collections.deque[Request] = collections.deque()  # and of them those that were at a crash
        self._sources: set[Source] = set()
        self._pull: collections.deque[Source] = collections.deque()  # those that have requests to come
        self._pausing = 0  # requests that wait for their pause to end
        self._crashes = Crashes(self.fleet, self._again, self._settle, self._dispatch)
        self._caretaker: asyncio.Task[None] | None = None
        self._gone: UnreachableError | None = None
        self._failed_in_a_row, self._last_good = 0, 0.0
        self._closed = False

    @property
    def places(self) -> int:
        """Requests that the servers take at once at present, for sizing."""
        return self.fleet.places

    def update(self, servers: Iterable[tuple[str, int | None]]) -> None:
        """Make these the pool's servers: new ones join, others leave once what they have in flight is done."""
        self.fleet.update(servers)

    def loads(self, role: str) -> list[ServerLoad]:
        """Every server as it is now. May be called from another thread."""
        return [s.load(role) for s in list(self.fleet.servers)]

    async def ask(self, payload: dict[str, Any]) -> Outcome:
        """One request whose body is the same for every server; its outcome, a row either way.

        Raises UnreachableError when no server is left, and asyncio.CancelledError.
        """
        body = orjson.dumps(payload)
        outcomes: list[Outcome] = []
        await self.ask_all([Request(lambda _: body, outcomes.append)], 1)
        return outcomes[0]

    async def ask_all(self, requests: Iterable[Request], count: int) -> None:
        """Send every request until it has its outcome; `count`: how many there are.

        Requests are pulled one by one as places get free. The first exception, of the iterable or of a `settle`,
        cancels what is in flight of them and is raised; UnreachableError when no server is left.
        """
        if not count:
            return
        if self._gone:
            raise self._gone
        if self._closed:
            raise RuntimeError("the pool is closed")
        source = Source(iter(requests), count, asyncio.get_running_loop().create_future())
        if not self._sources:
            self._last_good = time.monotonic()
            self.fleet.woke()
        self._sources.add(source)
        self._pull.append(source)
        if self._caretaker is None or self._caretaker.done():
            self._caretaker = asyncio.create_task(self._take_care())
        self._dispatch()
        try:
            await source.done
        finally:
            self._sources.discard(source)
            if source.open or not source.exhausted:  # it failed, or was cancelled
                await self._drop(source)

    async def _drop(self, source: Source) -> None:
        if source in self._pull:
            self._pull.remove(source)
        if not source.done.done():
            source.done.cancel()
        elif not source.done.cancelled():
            source.done.exception()  # seen, also where a cancellation came first: no words of asyncio's at the end
        for waiting in (self._queue, self._suspects):
            kept = [r for r in waiting if r.source is not source]
            waiting.clear()
            waiting.extend(kept)
        for task in list(source.tasks):
            task.cancel()
        try:
            await asyncio.gather(*source.tasks, return_exceptions=True)
        finally:  # a task that was cancelled before its first step never ran: its place is taken still
            for server in self.fleet.servers:
                server.flying -= {r for r in server.flying if r.source is source}
            self._dispatch()

    # -- who gets what ---------------------------------------------------------------------------

    def _left(self) -> int:
        """Requests that are not in flight."""
        return len(self._queue) + len(self._suspects) + sum(s.left for s in self._pull)

    def _dispatch(self) -> None:
        """Give every free place a request, as long as that is better than waiting."""
        while (self._queue or self._suspects or self._pull) and not self._gone and not self._closed:
            working = self.fleet.working()
            free = [s for s in working if s.in_flight < s.limit]
            if not free:
                return
            if self._place_waiting(working, free):
                continue
            # while much fails, no more is begun: what waits for its next attempt must not pile up. Suspects, which
            # go one by one, are allowed to be many: a crash makes as many of them as were in flight
            if (len(self._queue) + self._pausing > 2 * self.fleet.places + 64
                    or len(self._suspects) > 8 * self.fleet.places + 4096):
                return
            server = choose(working, free, self._left())
            if server is None or (request := self._next()) is None:
                return
            self._send(request, server)

    def _refill(self, server: Server) -> None:
        """`_dispatch` after a place became free, without looking at every server while there is plenty to do."""
        if (self._queue or self._suspects or self._pausing or self._gone or self._closed
                or self._left() < self.fleet.hold_below):
            self._dispatch()
            return
        if server.paused_until > time.monotonic():
            return
        while server.takes_work and server.in_flight < server.limit and (request := self._next()):
            self._send(request, server)

    def _place_waiting(self, working: list[Server], free: list[Server]) -> bool:
        """Send one of the requests that were sent before, if there is a place that suits it."""
        # a suspect goes alone among suspects, so that a second crash has one culprit; and not where the server itself
        # is the other suspect
        proven = any(s.state == "up" for s in working)
        quiet = [s for s in free if not s.suspects and (s.state == "up" or not proven)] if self._suspects else []
        for waiting, places in ((self._suspects, quiet), (self._queue, free)):
            for n, request in enumerate(waiting if places else ()):
                able, fits = working, places
                if (request.strikes or request.crashes) and len(working) > 1:
                    able, fits = ([s for s in some if s is not request.last] for some in (working, places))
                if server := choose(able, fits, self._left()):
                    del waiting[n]
                    self._send(request, server)
                    return True
        return False

    def _next(self) -> Request | None:
        """The next request of the plan, of the source that came first."""
        while self._pull:
            source = self._pull[0]
            if source.done.done():  # it failed a moment ago
                self._pull.popleft()
                continue
            try:
                request = next(source.requests, None)
            except BaseException as error:
                self._pull.popleft()
                source.fail(error)
                continue
            if request is None:
                self._pull.popleft()
                source.exhausted = True
                self._finish(source)
                continue
            source.left -= 1
            source.open += 1
            request.source = source
            if not source.left:
                self._pull.popleft()
                source.exhausted = True
            if request.crashes >= CRASHES_TO_POISON:
                self._settle(request, None, poison(request), None)
            elif request.crashes:  # of an earlier process: a suspect
                self._suspects.append(request)
                asyncio.get_running_loop().call_soon(self._dispatch)
            else:
                return request
        return None

    @staticmethod
    def _finish(source: Source) -> None:
        if source.exhausted and not source.open and not source.done.done():
            source.done.set_result(None)

    def _send(self, request: Request, server: Server) -> None:
        source = request.source
        assert source is not None
        if not server.in_flight:
            server.quiet_since = time.monotonic()
        server.flying.add(request)
        task = asyncio.create_task(self._attempt(request, server, server.in_flight))
        source.tasks.add(task)
        task.add_done_callback(source.tasks.discard)

    async def _attempt(self, request: Request, server: Server, in_flight: int) -> None:
        began = time.monotonic()
        reply: Reply | None = None
        failure: RequestFailed | None = None
        try:
            request.facts = facts = server.facts
            assert facts is not None
            body = request.build(facts)
            timeout_s = max(0.001, min(self.limits.timeout_s, self.limits.deadline_s - request.spent_s))
            request.sent += 1
            if request.ask is not None:
                reply = await request.ask(server.client, body, timeout_s)
            else:
                masked = request.masked is not None and request.masked(facts)
                reply = await server.client.generate(body, timeout_s, rid=request.rid, vocab=self._vocab,
                                                     masked=masked)
            await server.confirm()
        except RequestFailed as error:
            failure = error if error.rule.again or reply else await self._blamed(server, error)
        except Exception as error:  # of ours: it ends the shard, with its traceback
            assert request.source is not None
            request.source.fail(error)
            return
        finally:
            server.flying.discard(request)
            request.last = server
            request.spent_s += time.monotonic() - began
        if failure is not None:
            request.sent -= failure.kind == "unreachable" and reply is None  # it never left
            self._failed(request, server, failure, in_flight)
        elif reply is not None:
            server.answered(reply, full=bool(self._queue or self._pull or self._suspects))
            self._crashes.good += 1
            self._failed_in_a_row, self._last_good = 0, time.monotonic()
            self._settle(request, reply, None, server)
        self._refill(server)

    async def _blamed(self, server: Server, failure: RequestFailed) -> RequestFailed:
        """A refusal is final, so it must come from the server that was chosen: behind the address may be another by
        now, and then that is the failure."""
        try:
            await server.confirm()
        except RequestFailed as changed:
            return changed
        return failure

    def _settle(self, request: Request, reply: Reply | None, failure: RequestFailed | None, server: Server | None
                ) -> None:
        source = request.source
        assert source is not None
        if source.done.done():
            return
        if failure is not None and failure.rule.again:
            self._failed_in_a_row += 1
        try:
            request.settle(Outcome(reply, failure, request.sent, server.url if server else None,
                                   request.facts))
        except BaseException as error:
            source.fail(error)
        source.open -= 1
        self._finish(source)

    # -- when it goes wrong ----------------------------------------------------------------------

    def _failed(self, request: Request, server: Server, failure: RequestFailed, in_flight: int) -> None:
        server.failed(failure, in_flight)
        if failure.kind == "disconnected":
            self._crashes.broke(request, server, failure)
            return
        if failure.kind == "unreachable":
            server.dead = True
            if server.takes_work:
                server.go_down(str(failure))
        elif failure.kind in ("wrong_model", "changed"):
            if server.state not in ("down", "unfit"):  # once for all in flight there: each time, the pause doubles
                server.go_down(str(failure), unfit=True)
        elif server.takes_work and server.wants_rest() and (
                not failure.rule.fault or self.fleet.others_work(server)):
            # the last server is never left alone for its faults: then it may be the requests that are wrong
            server.go_down(f"too much fails there, last with {failure.kind}: {failure}")
        self._again(request, server, failure, too_long=failure.kind == "overloaded" and in_flight == 1)

    def _again(self, request: Request, server: Server, failure: RequestFailed, too_long: bool = False) -> None:
        """Back into the queue, now or after a pause, or given up. `too_long`: a list of prompts that was turned away by
        a server that had nothing else of ours may be longer than its queue for ever."""
        if request.source is None or request.source.done.done():  # nobody waits for it any more
            return
        request.strikes += failure.rule.strike
        over = request.spent_s >= self.limits.deadline_s
        apart = request.divisible and (too_long or failure.kind in ("crashed", "timeout"))
        if (apart or not failure.rule.again or request.strikes >= self.limits.attempts
                or (over and failure.rule.strike)):
            self._settle(request, None, failure, server)
        elif not failure.rule.strike:
            self._line(request).appendleft(request)
        else:
            pause = min(10.0, 0.1 * 2**request.strikes) * random.uniform(0.5, 1)
            request.spent_s += pause
            self._pausing += 1
            asyncio.get_running_loop().call_later(pause, self._pause_over, request)

    def _pause_over(self, request: Request) -> None:
        self._pausing -= 1
        if request.source is not None and not request.source.done.done():
            self._line(request).append(request)
            self._dispatch()

    def _line(self, request: Request) -> collections.deque[Request]:
        """Where it waits for its next attempt."""
        return self._suspects if request.crashes else self._queue

    async def _take_care(self) -> None:
        """Look after the servers until there is nothing to do."""
        try:
            await self._watch()
        except Exception as error:  # of ours: without a caretaker whoever waits would wait for ever
            for source in self._sources:
                source.fail(error)

    async def _watch(self) -> None:
        while self._sources and not self._closed and not self._gone:
            if why := self.fleet.tick(self._left()) or self._hopeless():
                self._gone = UnreachableError(why)
                for source in self._sources:
                    source.fail(self._gone)
            self._dispatch()  # a pause may be over, a limit may have grown
            await asyncio.sleep(_TICK_S)

    def _hopeless(self) -> str | None:
        """Why it is no use to go on although servers answer: nothing but failures, many of them, for long."""
        since = time.monotonic() - self._last_good
        if self._failed_in_a_row < max(_HOPELESS, 4 * self.fleet.places) or since < max(self.limits.wait_s, 10.0):
            return None
        return (f"the last {self._failed_in_a_row} requests all failed and none was answered for {since:.0f} s "
                "(`winnow status` names the kinds); what was not asked yet is still owed: mend the servers and run the "
                "same command again")

    async def close(self) -> None:
        """Close every connection."""
        self._closed = True
        if self._caretaker:
            self._caretaker.cancel()
        for source in self._sources:
            source.fail(RuntimeError("the pool was closed"))
        await self.fleet.close()
