"""Counters that any thread may advance and a terminal or a UI may read."""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is; `done` and `total` count `unit`s."""

    name: str
    unit: str
    total: int
    done: int = 0
    started: float = 0.0
    moved: float = 0.0
    already: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def rate(self) -> float:
        """Units per second made by this process; what stood already does not count."""
        return (self.done - self.already) / self.seconds

    @property
    def seconds(self) -> float:
        """How long the stage has worked: until now, or until its last unit when it is done."""
        return max(1e-9, (self.moved if self.done >= self.total else time.monotonic()) - self.started)

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before the first unit."""
        return (self.total - self.done) / self.rate if self.done > self.already else None


class Progress:
    """The stages of a run in the order they began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, StageProgress] = {}

    def begin(self, name: str, unit: str, total: int) -> None:
        """Announce a stage and how much there is of it."""
        with self._lock:
            self._stages[name] = StageProgress(name, unit, total, started=time.monotonic())

    def advance(self, name: str, done: int = 1, *, already: bool = False, **counts: int) -> None:
        """Count units as done; `already`: they stood before this process began. `counts`: more counters."""
        with self._lock:
            stage = self._stages.get(name)
            if stage is None:
                return  # nobody watches here: a worker process, or a stage called by itself
            added = stage.counts.copy()
            added.update(counts)
            self._stages[name] = replace(stage, done=stage.done + done, counts=added, moved=time.monotonic(),
                                         already=stage.already + (done if already else 0))

    def snapshot(self) -> list[StageProgress]:
        """The stages as they are now."""
        with self._lock:
            return list(self._stages.values())
