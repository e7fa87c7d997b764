"""How progress is said: the same words in the terminal, in the UI, in the log and in `winnow status`."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from tasks.core.progress import ServerLoad, StageProgress
from tasks.serving.failures import TAXONOMY

TITLES = {"quality": "judge"}
"""A stage's name where its own would say too little."""

# as the taxonomy lists them; defects that are no failures follow by name
_ORDER = {kind: n for n, kind in enumerate(TAXONOMY)}
_TROUBLE = ("down", "unfit", "trial", "checking", "joining", "up", "left")


def failures(kinds: Mapping[str, int]) -> str:
    """`3 timeout, 1 rejected`: always in the same order, nothing for what did not happen."""
    return ", ".join(f"{kinds[k]:,} {k}" for k in in_order(kinds))


def in_order(kinds: Mapping[str, int]) -> list[str]:
    """The kinds that happened, in that order."""
    return sorted((k for k, n in kinds.items() if n), key=lambda k: (_ORDER.get(k, len(_ORDER)), k))


def short(number: float) -> str:
    """Three digits or so: `8.1k`, `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.1f}{unit}" if number < 100 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"


def per_second(rate: float) -> str:
    """`49.7/s`, or by the minute what is slow."""
    if 0 < rate < 0.1:
        return f"{rate * 60:.1f}/min"
    return f"{rate:.1f}/s" if rate < 999.5 else f"{rate:,.0f}/s"


def duration(seconds: float) -> str:
    """`0:42`, `1:02:03`, `2 d 3 h`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def pace(stage: StageProgress) -> tuple[str, str, str]:
    """Rate, tokens a second and time left of a stage; empty where there is none."""
    if not stage.made:
        return "", "", ""
    tokens = f"{short(stage.tokens_per_s)} tok/s" if stage.counts["tokens"] else ""
    if stage.idle_s is not None:
        return "", "", f"nothing for {duration(stage.idle_s)}"
    left = stage.seconds_left
    return per_second(stage.rate), tokens, f"{duration(left)} left" if left and stage.done < stage.total else ""


def asides(stage: StageProgress) -> str:
    """A stage's own counters, and what stood before."""
    parts = [f"{n:,} {name}" for name, n in stage.counts.items() if n and name != "tokens"]
    return ", ".join([*parts, *([f"{stage.already:,} stood already"] if stage.already else [])])


def describe(stage: StageProgress) -> str:
    """All of it in a line."""
    return ", ".join(part for part in (*pace(stage), failures(stage.failures), asides(stage)) if part)


def shard_line(name: str, shard: int, units: str, stood: int, kinds: Mapping[str, int], seconds: float, rate: float,
               tokens_per_s: float) -> str:
    """`generate shard 0003: 2,048 requests (12 failed: 9 timeout, 3 rejected) in 41.2 s, 49.7/s, 8.1k tok/s`."""
    asides = [f"{stood:,} stood already"] if stood else []
    if failed := sum(kinds.values()):
        asides.append(f"{failed:,} failed: {failures(kinds)}")
    aside = f" ({'; '.join(asides)})" if asides else ""
    took = duration(seconds) if seconds >= 600 else f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
    parts = [f"{name} shard {shard:04d}: {units}{aside} in {took}"]
    return ", ".join([*parts, *([per_second(rate)] if rate else []),
                      *([f"{short(tokens_per_s)} tok/s"] if tokens_per_s else [])])


def is_shown(servers: Sequence[ServerLoad]) -> bool:
    """Whether the servers are worth a look: something is in flight, or cannot be."""
    return any(s.in_flight or s.state not in ("up", "left") for s in servers)


def address(server: ServerLoad) -> str:
    """The URL without what all have."""
    return server.url.removeprefix("http://")


def troubled(servers: Sequence[ServerLoad], most: int, named: int) -> tuple[list[ServerLoad], list[ServerLoad]]:
    """Which servers to name and which to sum up: all of up to `most`, else the `named` worst.

    Failures and latencies are compared by their magnitude, so that the table does not shuffle all the time.
    """
    if len(servers) <= most:
        return list(servers), []

    def badness(server: ServerLoad) -> tuple[int, int, int, str]:
        state = _TROUBLE.index(server.state) if server.state in _TROUBLE else 0
        return (state, -sum(server.failures.values()).bit_length(), -int(10 * (server.latency_s or 0)).bit_length(),
                server.url)

    ranked = sorted(servers, key=badness)
    return ranked[:named], ranked[named:]


def fleet(servers: Sequence[ServerLoad]) -> str:
    """`60 servers up, 3,840/4,096 in flight, 512/s, 65.5k tok/s`."""
    by_state = collections.Counter(s.state for s in servers)
    up = by_state.pop("up", 0)
    parts = [f"{up:,} server{'' if up == 1 else 's'} up", *(f"{n} {state}" for state, n in sorted(by_state.items()))]
    limit = sum(s.limit for s in servers if s.state in ("up", "trial", "checking"))
    parts.append(f"{sum(s.in_flight for s in servers):,}/{limit:,} in flight")
    if rate := sum(s.per_s for s in servers):
        parts.append(per_second(rate))
    if tokens := sum(s.tokens_per_s for s in servers):
        parts.append(f"{short(tokens)} tok/s")
    return ", ".join(parts)
