"""What `winnow servers check` finds: each server of a config, and what a run would do about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from flows.seats import Found, Seat, Served, ask, ask_one, given, in_the_way, matched, seats_of, state_dir
from tasks.core.config import RunConfig
from tasks.core.heuristics import Heuristic
from tasks.serving.client import ServerFacts
from tasks.serving.compile import unfit
from tasks.serving.failures import RequestFailed
from tasks.serving.guard import guard
from tasks.serving.launch import launcher


@dataclass(frozen=True)
class Probed:
    """What `servers check` found of a server of the config."""

    seat: Seat
    url: str | None
    facts: ServerFacts | None
    state: str
    differences: list[guard.Difference]
    notes: list[str]
    refused: bool = False
    """Whether a run would end here."""


def probe(config: RunConfig, heuristics: Iterable[Heuristic]) -> list[Probed]:
    """Every server of the config: what it is, and what a run would do about it. Starts and stops nothing."""
    heuristics = list(heuristics)
    seats, folder = seats_of(config, heuristics), state_dir(config)
    others = {s.seat: s for s in given([s for s in seats if s.url])}
    reused = matched([s for s in seats if s.spec], folder)
    taken = [r.url for r in reused.values()]
    facts, out = ask(taken), []
    for seat in seats:
        if seat in others:
            out.append(_probed(config, heuristics, others[seat]))
        elif seat in reused:
            record = reused[seat]
            out.append(dataclasses.replace(
                _probed(config, heuristics, Served(record.url, None, "reused", facts[record.url], seat, record)),
                state="would be reused"))
        else:
            out.append(_would_start(seat, in_the_way(seat, folder, taken)))
            taken += [out[-1].url] if out[-1].url else []
    return out


def _probed(config: RunConfig, heuristics: list[Heuristic], served: Served) -> Probed:
    assert served.seat is not None
    if isinstance(served.facts, RequestFailed):
        return Probed(served.seat, served.url, None, str(served.facts), [], [])
    compared = served.compared
    state = "as asked for" if not compared.differences else "differs, allowed" if config.allow_mismatch else "differs"
    refused, notes = state == "differs", compared.notes
    if served.seat.role == "generator" and (why := unfit(served.facts, heuristics)):
        refused, state, notes = True, "can't be used", [why, *notes]
    return Probed(served.seat, served.url, served.facts, state, compared.differences, notes, refused)


def _would_start(seat: Seat, way: list[Found]) -> Probed:
    if not way:
        return Probed(seat, None, None, "not running: would be launched", [], [])
    first = way[0]
    at_work = launcher.busy(first.record)
    state = f"differs, at work ({at_work}): would stay" if at_work else "would be restarted"
    facts = ask_one(first.record.url)
    return Probed(seat, first.record.url, facts if isinstance(facts, ServerFacts) else None, state, first.differences,
                  [])
