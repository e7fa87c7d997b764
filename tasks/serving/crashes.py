"""A connection broke with a request in flight: did the server die, and did the request do it?

A server that dies takes all its connections along and does not answer afterwards (or is another process by then). All
that was in flight there is suspect; after a second death a request is poison and never sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from tasks.serving.client import Reply
from tasks.serving.failures import RequestFailed
from tasks.serving.fleet import Fleet
from tasks.serving.request import Request
from tasks.serving.server import Server

CRASHES_TO_POISON = 2
_SETTLE_S = 0.05
_FLAKY = 10


@dataclass(eq=False)
class _Break:
    """Connections to one server that broke at about the same time."""

    survivors: set[Request]
    broken: list[tuple[Request, RequestFailed]]
    heard: int
    at: float


class Crashes:
    """Looks into broken connections. Lives on the pool's event loop."""

    def __init__(self, fleet: Fleet, again: Callable[[Request, Server, RequestFailed], None],
                 settle: Callable[[Request, Reply | None, RequestFailed | None, Server | None], None],
                 changed: Callable[[], None]) -> None:
        """`again`, `settle`: what becomes of the request; `changed`: a server may take work that could not."""
        self._fleet, self._again, self._settle, self._changed = fleet, again, settle, changed
        self._breaks: dict[Server, _Break] = {}
        self._resets = 0  # requests whose connection broke although the server lived
        self.good = 0
        """Answers, against which broken connections are few or many."""

    def broke(self, request: Request, server: Server, failure: RequestFailed) -> None:
        """A connection broke with the request in flight: find out whether the server died."""
        if server in self._breaks:
            self._breaks[server].broken.append((request, failure))
            return
        if server.dead:  # a moment ago, and this one was there as well
            self._crashed(server, [request])
            return
        self._breaks[server] = _Break(set(server.flying), [(request, failure)], server.heard, time.monotonic())
        self._fleet.spawn(self._look(server, server.state))
        if server.takes_work:
            server.state = "checking"

    async def _look(self, server: Server, before: str) -> None:
        """Did the server die, or only a connection? It died if it does not answer now, or if all that was in flight
        there broke together (it may be up again already)."""
        await asyncio.sleep(_SETTLE_S)
        lives = False
        for pause in (0.2, 0.0):
            try:
                await server.client.get("/model_info", timeout_s=3)
                lives = True
                break
            except RequestFailed as error:
                if error.kind == "unreachable":
                    break
                await asyncio.sleep(pause)
        seen = self._breaks.pop(server)
        broken = {r for r, _ in seen.broken}
        # unless what answered is a new process already
        others_live = ((server.heard > seen.heard or bool(seen.survivors & server.flying))
                       and server.client.newest_connection < seen.at)
        if (lives or others_live) and not (len(broken) > 1 and not others_live):
            if server.state == "checking":
                server.state = "trial" if before == "trial" else "up"
            server.dead = False
            for request, failure in seen.broken:
                self._cut_off(request, server, failure)
        else:
            server.dead = True
            server.go_down(f"it died with {len(broken)} request{'s' if len(broken) > 1 else ''} in flight")
            self._crashed(server, list(broken))
        self._changed()

    def _cut_off(self, request: Request, server: Server, failure: RequestFailed) -> None:
        """The connection broke and the server lives. The second time it may well be the request that does it, to a
        server that is restarted at once; unless connections break all the time, for then it is the network."""
        request.resets += 1
        self._resets += request.resets == 1
        server.faults_in_a_row += 1
        if server.takes_work and server.wants_rest() and self._fleet.others_work(server):
            server.go_down("connections to it keep breaking")  # all that is sent there: then it is the server
        if self._deadly(request):
            self._settle(request, None, RequestFailed("poison", "its connection broke twice, at servers where others "
                                                      "lived; not sent again"), server)
        else:
            self._again(request, server, failure)

    def _deadly(self, request: Request) -> bool:
        """Whether two crashes are enough to call it poison; a reset may be one, unless resets are common."""
        flaky = self._resets > _FLAKY and self._resets**2 > 0.1 * self.good  # then some meet two by chance
        return request.crashes + (0 if flaky else request.resets) >= CRASHES_TO_POISON

    def _crashed(self, server: Server, requests: list[Request]) -> None:
        for request in requests:
            request.crashes += 1
            try:
                if request.suspected:
                    request.suspected(request.crashes)
            except Exception as error:
                assert request.source is not None
                request.source.fail(error)
                continue
            if self._deadly(request):
                self._settle(request, None, poison(request), server)
            else:
                self._again(request, server, RequestFailed("crashed", "the server died"))


def poison(request: Request) -> RequestFailed:
    """The last failure of a request that may not be sent again."""
    return RequestFailed("poison", f"in flight at {request.crashes} crashes of servers; not sent again")
