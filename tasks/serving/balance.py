"""Which server gets the next request: the one with the least work outstanding, unless waiting is better.

While there is plenty to do, every free place is used. Near the end of the work a place at a slow server is a trap:
a request put there is done later than one that waits for a fast server, and the whole run waits for it. So a place
is left free when the servers that are faster would do all that is left, this request included, sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Seen(Protocol):
    """What is known of a server that may be given a request."""

    @property
    def in_flight(self) -> int:
        """Requests there now."""
        ...

    @property
    def limit(self) -> int:
        """Most requests it is given."""
        ...

    @property
    def latency_s(self) -> float | None:
        """How long it takes for an answer at present; None before the first."""
        ...


S = TypeVar("S", bound=Seen)


def choose(up: Sequence[Seen], free: Sequence[S], backlog: int) -> S | None:
    """The server for the next request, or None: it had better wait.

    `up`: every server that works; `free`: those of them with a free place; `backlog`: requests that are not in
    flight yet, this one included.
    """
    if not free:
        return None
    best = min(free, key=_outstanding)
    if not _better_wait(best, up, backlog):
        return best
    return next((s for s in sorted(free, key=_outstanding) if not _better_wait(s, up, backlog)), None)


def _outstanding(server: Seen) -> float:
    """Seconds until the server would have worked off what it has and one more; its share of places as long as it
    has not answered yet."""
    return (server.in_flight + 1) / server.limit * (server.latency_s or 1e-3)


def _better_wait(server: Seen, up: Sequence[Seen], backlog: int) -> bool:
    """Whether the servers faster than this one would do all of the backlog before this one did one request."""
    mine = server.latency_s
    if mine is None:
        return False
    rate, places, slowest = 0.0, 0, 0.0
    for other in up:
        latency = other.latency_s
        if latency is not None and latency < 0.8 * mine:
            rate += other.limit / latency
            places += other.limit - other.in_flight
            slowest = max(slowest, latency)
    if not rate:
        return False
    return max(0, backlog - places) / rate + slowest < mine
