"""Counters that any thread may advance and a terminal or a UI may read.

Advancing is cheap, for it happens once a request; what readers want to know is worked out when they ask.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("winnow.progress")

WINDOW_S = 30
"""How far back the recent rate looks."""
_STEADY = 5
"""Seconds of the window in which something must have happened: a stage that moves in leaps has no recent rate."""
_PAUSE_S, _PAUSE_GAPS = 10.0, 20.0
"""A stage stands still when nothing came for so long, and for so many times its usual gap."""


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is; `done` and `total` count `unit`s."""

    name: str
    unit: str
    total: int
    done: int = 0
    already: int = 0
    """Of `done`, what stood before this process began."""
    seconds: float = 0.0
    """How long the stage has worked: until now, or until its last unit when it is done; pauses do not count."""
    idle_s: float | None = None
    """How long it has stood still, if it does: servers that are gone, say."""
    recent: tuple[float, float] | None = None
    """Units and tokens per second of late; None where too little happened to tell."""
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    """Failed units by kind."""

    @property
    def made(self) -> int:
        """Units made by this process."""
        return self.done - self.already

    @property
    def rate(self) -> float:
        """Units per second made by this process, of late or else on average; what stood already does not count."""
        return self.recent[0] if self.recent else self.made / max(self.seconds, 1e-3)

    @property
    def tokens_per_s(self) -> float:
        """The counter `tokens`, likewise."""
        return self.recent[1] if self.recent else self.counts["tokens"] / max(self.seconds, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before the first unit and while the stage stands still."""
        return (self.total - self.done) / self.rate if self.made and self.idle_s is None else None


@dataclass(frozen=True)
class ServerLoad:
    """One server as the pool sees it now."""

    url: str
    role: str
    state: str
    """`joining`, `up`, `checking`, `down`, `trial`, `unfit` or `left`."""
    in_flight: int
    limit: int
    """Most requests it is given at once now."""
    done: int
    failures: dict[str, int]
    """Failed attempts by kind."""
    per_s: float
    tokens_per_s: float
    latency_s: float | None
    note: str | None = None
    """Why it is not up."""


class _Stage:
    """The counters of one stage; the lock of `Progress` guards them."""

    __slots__ = ("already", "buckets", "calls", "counts", "done", "failures", "last", "moved", "name", "origin",
                 "paused", "started", "total", "unit")

    def __init__(self, name: str, unit: str, total: int, now: float) -> None:
        self.name, self.unit, self.total = name, unit, total
        self.done = self.already = self.calls = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()
        # moved: the last unit of any kind; last: the last that was made; origin: where the window may begin
        self.started = self.moved = self.last = self.origin = now
        self.paused = 0.0
        # units and tokens by second of the clock
        self.buckets: collections.deque[list[int]] = collections.deque(maxlen=WINDOW_S + 1)

    def stands_still(self, now: float) -> bool:
        """Whether nothing has come for much longer than is usual."""
        gap = now - self.last
        if gap < _PAUSE_S or not self.calls:
            return False
        return gap > _PAUSE_GAPS * (self.last - self.started - self.paused) / self.calls

    def go_on(self, now: float) -> None:
        """The first unit after a pause."""
        self.paused += now - self.last
        self.origin = now
        self.buckets.clear()

    def recent(self, now: float) -> tuple[float, float] | None:
        """Units and tokens per second over the window."""
        begin = max(self.origin, int(now) - WINDOW_S)
        seen = [b for b in self.buckets if b[0] >= int(begin)]
        if len(seen) < _STEADY:
            return None
        return sum(b[1] for b in seen) / (now - begin), sum(b[2] for b in seen) / (now - begin)

    def freeze(self, now: float) -> StageProgress:
        """The stage as a record."""
        finished = self.done >= self.total
        still = not finished and self.stands_still(now)
        until = self.moved if finished else self.last if still else now
        return StageProgress(
            self.name, self.unit, self.total, self.done, self.already,
            seconds=max(0.0, until - self.started - self.paused), idle_s=now - self.last if still else None,
            recent=None if finished or still else self.recent(now),
            counts=self.counts.copy(), failures=self.failures.copy())


class Progress:
    """The stages of a run in the order they began, and the servers they ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds since whenever, never backwards."""
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._sources: dict[str, Callable[[], list[ServerLoad]]] = {}

    def begin(self, name: str, unit: str, total: int) -> None:
        """Announce a stage and how much there is of it."""
        with self._lock:
            self._stages[name] = _Stage(name, unit, total, self._clock())

    def __contains__(self, name: str) -> bool:
        """Whether the stage was announced here."""
        return name in self._stages

    def advance(self, name: str, done: int = 1, *, already: bool = False, failure: str | None = None,
                **counts: int) -> None:
        """Count units as done; `already`: they stood before this process began.

        `failure`: the kind of their failure; `counts`: more counters, of which `tokens` has a rate.
        """
        stage = self._stages.get(name)
        if stage is None:
            return  # nobody watches here: a worker process, or a stage called by itself
        now = self._clock()
        with self._lock:
            stage.done += done
            stage.moved = now
            if failure is not None:
                stage.failures[failure] += done
            for key, n in counts.items():
                stage.counts[key] += n
            if already:
                stage.already += done
                if not stage.calls:  # to find what stands is no work: the clock starts after it
                    stage.started = stage.last = stage.origin = now
                return
            if not done:
                return
            if now - stage.last >= _PAUSE_S and stage.stands_still(now):
                stage.go_on(now)
            stage.calls += 1
            stage.last = now
            second = int(now)
            buckets = stage.buckets
            if not buckets or buckets[-1][0] != second:
                buckets.append([second, 0, 0])
            bucket = buckets[-1]
            bucket[1] += done
            if "tokens" in counts:
                bucket[2] += counts["tokens"]

    def spare(self, name: str, units: int) -> None:
        """So many units need not be made after all: the total shrinks."""
        if (stage := self._stages.get(name)) is not None:
            with self._lock:
                stage.total = max(stage.done, stage.total - units)

    def snapshot(self) -> list[StageProgress]:
        """The stages as they are now."""
        with self._lock:
            now = self._clock()
            return [stage.freeze(now) for stage in self._stages.values()]

    def watch(self, role: str, source: Callable[[], list[ServerLoad]]) -> None:
        """Let `servers` ask `source` for the servers of a role; it is called from any thread."""
        with self._lock:
            self._sources[role] = source

    def servers(self) -> list[ServerLoad]:
        """The servers as they are now, by role in the order of `watch`."""
        with self._lock:
            sources = list(self._sources.values())
        out: list[ServerLoad] = []
        for source in sources:
            try:
                out += source()
            except Exception as error:  # who looks on must not hurt
                log.debug("servers cannot be shown: %s", error)
        return out
