"""One server as the pool sees it: whether it may be given work, how much, and how it has done."""

from __future__ import annotations

import asyncio
import collections
import logging
import random
import time
from typing import TYPE_CHECKING, Literal

from tasks.core.progress import ServerLoad
from tasks.serving.client import Reply, ServerFacts, SGLangClient
from tasks.serving.failures import RequestFailed
from tasks.serving.guard.guard import changed, table
from tasks.serving.limit import AdaptiveLimit

if TYPE_CHECKING:
    from tasks.serving.request import Request

log = logging.getLogger("winnow.pool")

State = Literal["joining", "up", "checking", "trial", "down", "unfit", "left"]
"""joining: not asked yet. up: it works. checking: a connection broke, is it the server? trial: it answers again
after a failure and gets one request to prove it. down: it does not answer, or fails. unfit: it answers, but is not
the server that the run needs. left: taken out of the run."""

FAULTS_TO_TRIP = 5
REFUSALS_TO_TRIP = 8
_PAUSE_S = (0.25, 30.0)
_START = 32
_SIGNS_OF_LIFE = frozenset({"overloaded", "server_error", "aborted", "rejected"})
_UNKNOWN_CEILING = 1024


class Server:
    """State, limit and statistics of one server. Lives on the pool's event loop."""

    def __init__(self, url: str, ceiling: int | None, timeout_s: float) -> None:
        """`ceiling`: the most requests in flight that the config allows; None: to be found out."""
        self.client = SGLangClient(url)
        self.given, self.timeout_s = ceiling, timeout_s
        self.adaptive = AdaptiveLimit(ceiling or _UNKNOWN_CEILING, ceiling or _START, timeout_s=timeout_s)
        self.state: State = "joining"
        self.note: str | None = None
        self.facts: ServerFacts | None = None
        self.flying: set[Request] = set()
        self.heard = 0  # answers of any kind: signs of life
        self.answered_at = 0.0  # the last one that was good
        self.quiet_since = 0.0  # that, or when the first in flight was sent
        self.latency_s: float | None = None
        self.share = 0  # while it has never answered: no more than a part of what there is to do; set by the pool
        self.done = self.tokens = 0
        self.failures: collections.Counter[str] = collections.Counter()
        self.faults_in_a_row = self.refusals_in_a_row = 0
        self.paused_until = 0.0  # after a refusal
        self.ask_at = 0.0  # when to ask whether it lives
        self.down_since: float | None = None
        self.dead = False  # it refused a connection or crashed, and has not answered since
        self._pause_s = _PAUSE_S[0]
        self._confirmed_at = float("-inf")
        self._identifying: asyncio.Task[None] | None = None
        self._rates = (time.monotonic(), 0, 0, 0.0, 0.0)

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    @property
    def in_flight(self) -> int:
        """Requests there now."""
        return len(self.flying)

    @property
    def suspects(self) -> int:
        """Those of them that were in flight at a crash before."""
        return sum(request.crashes > 0 for request in self.flying)

    @property
    def limit(self) -> int:
        """Most requests that it is given now."""
        if self.state == "trial":
            return 1
        value = self.adaptive.value
        return min(value, self.share) if self.latency_s is None and self.share else value

    def joins(self, ceiling: int | None) -> None:
        """It was taken out of the run, or had another ceiling, and is wanted now."""
        if ceiling != self.given:
            self.given = ceiling
            self.adaptive = AdaptiveLimit(ceiling or _UNKNOWN_CEILING, ceiling or _START, timeout_s=self.timeout_s)
        if self.state == "left":
            self.state, self.note, self.down_since, self.ask_at = "joining", None, None, 0.0

    @property
    def takes_work(self) -> bool:
        """Whether it may be given requests, now or once a place is free."""
        return self.state in ("up", "trial")

    # -- how it did ------------------------------------------------------------------------------

    def answered(self, reply: Reply, full: bool) -> None:
        """A good answer came from it."""
        self.done += 1
        self.heard += 1
        self.answered_at = self.quiet_since = time.monotonic()
        tokens = len(reply.output_ids)
        self.tokens += tokens
        self.faults_in_a_row = self.refusals_in_a_row = 0
        known = self.latency_s
        self.latency_s = reply.latency_s if known is None else known + 0.1 * (reply.latency_s - known)
        self.adaptive.answered(reply.latency_s, tokens, full=full)
        if self.state == "trial":
            self._works_again()

    def _works_again(self) -> None:
        log.warning("%s works again", self.url)
        self._up()

    def _up(self) -> None:
        self.state, self.note, self.down_since, self._pause_s = "up", None, None, _PAUSE_S[0]

    def _ask_later(self, at_most_s: float) -> None:
        """The next question after a pause, which grows from one to the next."""
        self.ask_at = time.monotonic() + min(self._pause_s, at_most_s) * random.uniform(0.75, 1)
        self._pause_s = min(_PAUSE_S[1], self._pause_s * 1.6)

    def stalled(self, now: float) -> None:
        """Take it for as slow as it is silent, or the others would be left free for one that hangs."""
        silent = now - self.quiet_since
        if self.in_flight and self.latency_s is not None and silent > 2 * self.latency_s:
            self.latency_s = silent

    def failed(self, failure: RequestFailed, in_flight: int) -> None:
        """A request failed there, when it had `in_flight` of them; whether it goes down is `wants_rest`'s to say."""
        self.failures[failure.kind] += 1
        self.heard += failure.kind in _SIGNS_OF_LIFE
        if failure.kind == "overloaded":
            self.adaptive.turned_away(in_flight)
            pause = failure.retry_after_s or 0.0
            if in_flight == 1:  # it takes not even one: leave it alone for a moment, whatever it says itself
                self.refusals_in_a_row += 1
                own = min(5.0, 0.05 * 2 ** min(self.refusals_in_a_row, 7)) * random.uniform(0.5, 1)
                pause = max(pause, own)
            if pause:
                self.paused_until = max(self.paused_until, time.monotonic() + min(pause, 60.0))
        elif failure.kind == "timeout":
            self.adaptive.timed_out()
        elif failure.kind == "rejected" and self.state == "trial":  # it reads requests: it works
            self._works_again()
        if failure.rule.fault:
            self.faults_in_a_row += 1

    def wants_rest(self) -> bool:
        """Whether so much has failed there that it should be left alone for a while."""
        return (self.faults_in_a_row >= FAULTS_TO_TRIP or self.refusals_in_a_row >= REFUSALS_TO_TRIP
                or (self.state == "trial" and self.faults_in_a_row + self.refusals_in_a_row > 0))

    def go_down(self, why: str, *, unfit: bool = False) -> None:
        """Give it no more work until it has answered a question."""
        if self.state == "left":
            return
        if self.state not in ("down", "unfit") or self.note != why:
            log.warning("%s is not used for now: %s", self.url, why)
        self.state, self.note = ("unfit" if unfit else "down"), why
        self.down_since = self.down_since or time.monotonic()
        self._ask_later(_PAUSE_S[1])
        self.faults_in_a_row = self.refusals_in_a_row = 0

    def no_answer(self, why: str) -> None:
        """It was asked and did not answer: ask again later."""
        if self.state == "joining":
            self.go_down(why)
        elif self.state in ("down", "unfit"):
            self.state, self.note = "down", why
            self._ask_later(5.0)

    def admitted(self, facts: ServerFacts, asked_at: float) -> None:
        """It answered, and is a server that the run can use."""
        first = self.facts is None
        self.facts, self.dead = facts, False
        self._confirmed_at = asked_at
        if self.given is None and facts.max_running:
            self.adaptive.ceiling = facts.max_running
            self.adaptive.value = min(self.adaptive.value, facts.max_running)
        if self.state == "joining" or (first and self.down_since is not None):
            if self.down_since is not None:
                log.warning("%s answers: it joins", self.url)
            self._up()
        elif self.state in ("down", "unfit"):
            self.state = "trial"

    # -- is it still the same? -------------------------------------------------------------------

    async def confirm(self) -> None:
        """Returns once it is known that what answered over any connection so far is the server that was admitted.

        A connection lasts no longer than the process behind it, so only after a new connection there is something to
        ask; one question serves all that wait. Raises RequestFailed: wrong_model, changed, or that it could not be
        known.
        """
        newest = self.client.newest_connection
        while self._confirmed_at <= newest:
            if self._identifying is None or self._identifying.done():
                self._identifying = asyncio.create_task(self._identify())
            await asyncio.shield(self._identifying)

    async def _identify(self) -> None:
        for attempt in range(3):
            started = time.monotonic()
            try:
                now = await self.client.facts()
                break
            except RequestFailed:
                if attempt == 2:
                    raise
                await asyncio.sleep(0.2)
        known = self.facts
        assert known is not None
        found = changed(known, now)
        if any(d.field == "model" for d in found):
            raise RequestFailed("wrong_model", f"it serves {now.model_path} now, it served {known.model_path} before")
        if found:
            raise RequestFailed("changed", "it runs otherwise than before: " + ", ".join(
                f"{field} is {is_now}, it was {was}" for field, was, is_now in table(found, mend="none")))
        self._confirmed_at = started

    # -- what people see -------------------------------------------------------------------------

    def load(self, role: str) -> ServerLoad:
        """A snapshot for progress displays; rates are of the last seconds."""
        now = time.monotonic()
        at, done, tokens, per_s, tokens_per_s = self._rates
        if (elapsed := now - at) >= 2:
            per_s, tokens_per_s = (self.done - done) / elapsed, (self.tokens - tokens) / elapsed
            self._rates = (now, self.done, self.tokens, per_s, tokens_per_s)
        return ServerLoad(url=self.url, role=role, state=self.state, in_flight=self.in_flight, limit=self.limit,
                          done=self.done, failures=dict(self.failures), per_s=per_s, tokens_per_s=tokens_per_s,
                          latency_s=self.latency_s, note=self.note)
