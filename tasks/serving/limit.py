"""How many requests one server is given at a time: as many as still make it faster, never more than it takes.

Four signals, in the order in which they are believed:

- it turns requests away (HTTP 503 or 429): so many are too many, one fewer is the limit; a quarter more later;
- its /metrics show requests that wait in its queue: give it what it runs and a tenth more;
- requests time out: give it less, unless fewer in flight turn out to mean no more than fewer answers;
- twice as many in flight answer (almost) no more tokens a second: go back, try again later.

Doubling is judged by throughput and not by latency, since a server that batches answers each request later and
all of them sooner. With X(n) = n / (a + b n) answers a second at n in flight, growth stops where doubling gains
less than `_PAYS`, at 85-92 % of the most the server can do (1 / b).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_PAYS = 1.08
_CUT, _COSTS = 0.7, 0.85  # after a cut to 0.7 of the requests, fewer than 0.85 of the answers: it was no overload
_PATIENCE_S = 30.0
_LATER_S = (2.0, 600.0)
_HEADROOM = 1.1


class AdaptiveLimit:
    """The most requests in flight at one server; integer `value` in [1, ceiling]."""

    def __init__(self, ceiling: int, start: int, *, timeout_s: float, clock: Callable[[], float] = time.monotonic
                 ) -> None:
        """`start`: the first value; where it is the ceiling, nothing grows unless something shrank it before."""
        self.ceiling = max(1, ceiling)
        self.value = max(1, min(start, self.ceiling))
        self._timeout_s, self._clock = timeout_s, clock
        self._doubling = True
        self._later_s = _LATER_S[0]
        self._next_try = 0.0
        self._last_refusal = float("-inf")
        self._cut: tuple[int, float] | None = None  # the value before the last cut, and its tokens a second
        self._next_cut, self._cut_later_s = 0.0, _LATER_S[0]
        self._latency_s: float | None = None
        self._refused_at = 0
        self._queued_polls = 0
        self._paid: tuple[int, float] | None = None  # the value before the last doubling, and its tokens a second
        self._settle_until = 0.0
        self._begin()

    def _begin(self) -> None:
        self._since, self._answers, self._tokens, self._short = self._clock(), 0, 0, 0

    def answered(self, latency_s: float, tokens: int, *, full: bool) -> None:
        """A good answer came; `full`: more requests were waiting than the limit let through."""
        now = self._clock()
        self._latency_s = latency_s
        if now < self._settle_until:  # what was sent before the change says nothing about it
            self._begin()
            return
        self._answers += 1
        self._tokens += max(1, tokens)
        self._short += not full
        if self._cut is not None:
            if self._answers >= max(32, self.value):
                self._judge_cut(now)
        elif self._answers >= (max(2 * self.value, 64) if self._doubling else self.value):
            self._judge(now, latency_s)

    def _judge(self, now: float, latency_s: float) -> None:
        rate = self._tokens / max(1e-9, now - self._since)
        full = self._short <= self._answers // 10
        self._begin()
        if not full:
            return  # there was not enough to do: nothing can be learnt
        if self._paid is not None:
            before, earned = self._paid
            self._paid = None
            if rate < earned * _PAYS:
                self._set(before, latency_s)
                self._back_off(now)
                return
            self._later_s = _LATER_S[0]
        if self.value >= self.ceiling or now < self._next_try or latency_s > self._timeout_s / 2:
            return
        if self._doubling:
            self._paid = (self.value, rate)
            self._set(2 * self.value, latency_s)
        else:  # nothing to measure after a refusal: the server says itself when it is too much
            if self.value > self._refused_at:  # more than was refused: it takes more than it did
                self._later_s = _LATER_S[0]
            self._set(self.value + max(1, self.value // 4), latency_s)

    def turned_away(self, in_flight: int) -> None:
        """The server refused a request when it had `in_flight` of ours, that one included."""
        now = self._clock()
        if in_flight - 1 < self.value:
            self.value = self._refused_at = max(1, in_flight - 1)
            self._doubling, self._paid, self._cut = False, None, None
            if now - self._last_refusal > 1.0:  # many are refused at once: they are one refusal
                self._back_off(now)
            self._last_refusal = now
        self._begin()

    def timed_out(self) -> None:
        """A request got no answer in time."""
        now = self._clock()
        patience = min(_PATIENCE_S, self._timeout_s)
        if now < self._settle_until:
            return
        if self._cut is not None:
            if now - self._since >= patience:
                self._judge_cut(now)
        elif self._paid is not None:  # twice as many were too many
            before, self._paid = self._paid[0], None
            self._set(before, self._latency_s or patience)
            self._back_off(now)
        elif self.value > 1 and now >= self._next_cut and (
                self._answers >= max(32, self.value) or now - self._since >= patience):
            self._cut = (self.value, self._tokens / max(1e-9, now - self._since))
            self._set(int(self.value * _CUT), self._latency_s or patience)
            self._back_off(now)
            self._begin()

    def _judge_cut(self, now: float) -> None:
        """Some requests hang whatever the load; without this, they would bring any server down to one at a time."""
        assert self._cut is not None
        before, earned = self._cut
        self._cut = None
        if self._tokens / max(1e-9, now - self._since) < earned * _COSTS:
            self._set(before, self._latency_s or 0.0)
            self._next_cut = now + self._cut_later_s
            self._cut_later_s = min(_LATER_S[1], 2 * self._cut_later_s)
        else:
            self._cut_later_s = _LATER_S[0]
        self._begin()

    def queue_seen(self, running: float, waiting: float) -> None:
        """What /metrics says: requests (of anybody) that the server runs, and that wait in its queue."""
        if not (math.isfinite(running + waiting) and running >= 0):  # a gauge may say NaN
            return
        long = waiting > max(2.0, 0.25 * running)
        self._queued_polls = self._queued_polls + 1 if long else 0
        if self._queued_polls < 3:
            return
        self._queued_polls = 0
        wanted = int(self.value * _HEADROOM * (running / (running + waiting))) + 1
        if wanted < self.value:
            self.value, self._paid, self._cut = max(1, wanted), None, None
            self._back_off(self._clock())
            self._begin()

    def _set(self, value: int, latency_s: float) -> None:
        self.value = max(1, min(value, self.ceiling))
        self._settle_until = self._clock() + latency_s

    def _back_off(self, now: float) -> None:
        self._next_try = now + self._later_s
        self._later_s = min(_LATER_S[1], 2 * self._later_s)
