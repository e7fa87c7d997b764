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
    already: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def rate(self) -> float:
        """Units per second made by this process; what stood already does not count."""
        return (self.done - self.already) / max(1e-9, time.monotonic() - self.started)

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
        """Announce a stage; announcing it again adds to its total (another shard's share)."""
        with self._lock:
            known = self._stages.get(name)
            self._stages[name] = replace(known, total=known.total + total) if known else StageProgress(
                name, unit, total, started=time.monotonic())

    def advance(self, name: str, done: int = 1, *, already: bool = False, **counts: int) -> None:
        """Count units as done; `already`: they stood before this process began. `counts`: more counters."""
        with self._lock:
            stage = self._stages[name]
            added = stage.counts.copy()
            added.update(counts)
            self._stages[name] = replace(stage, done=stage.done + done, counts=added,
                                         already=stage.already + (done if already else 0))

    def snapshot(self) -> list[StageProgress]:
        """The stages as they are now."""
        with self._lock:
            return list(self._stages.values())
