"""Where the config wants a server: those that others run, those of ours; what runs there already, and starting it."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tasks.context import ROLES
from tasks.core.config import RunConfig
from tasks.core.errors import InputError, UnreachableError
from tasks.core.heuristics import Heuristic
from tasks.core.store import Store
from tasks.serving.client import ServerFacts, SGLangClient
from tasks.serving.failures import RequestFailed
from tasks.serving.guard import guard
from tasks.serving.launch import launcher
from tasks.serving.launch.launch_spec import LaunchRefused, LaunchSpec, command, specs_of
from tasks.serving.launch.launcher import ServerRecord

Notice = Callable[[str], None]
How = Literal["given", "launched", "reused", "joined"]


@dataclass(frozen=True, eq=False)
class Seat:
    """A server that the config wants: one that runs at `url`, or one of ours (`spec`)."""

    role: str
    entry: int
    """Its place in `servers.ROLE`."""
    asked: guard.Asked
    limit: int | None
    """Most requests in flight; None: to be found out."""
    url: str | None = None
    spec: LaunchSpec | None = None
    expect: Mapping[str, Any] = field(default_factory=dict)
    """What its entry expects, as given (`url`)."""

    @property
    def key(self) -> str:
        """Its entry in the config."""
        return f"servers.{self.role}.{self.entry}"


@dataclass(frozen=True)
class Served:
    """A server of the run: its address, how it came to it, and what it says of itself."""

    url: str
    limit: int | None
    how: How
    facts: ServerFacts | RequestFailed
    seat: Seat | None = None
    record: ServerRecord | None = None

    @property
    def compared(self) -> guard.Comparison:
        """What it is against what its entry of the config asks for; nothing where it has none or does not answer."""
        if self.seat is None or isinstance(self.facts, RequestFailed):
            return guard.Comparison([], [])
        return guard.compare(self.seat.asked, self.facts, launcher.spec_of(self.record) if self.record else None)


@dataclass(frozen=True)
class Found:
    """A server of ours that runs where a seat is, and in what it is not what the seat wants."""

    record: ServerRecord
    differences: list[guard.Difference]


def state_dir(config: RunConfig) -> Path:
    """Where this machine keeps records and logs of the servers that Winnow started."""
    if base := os.environ.get("WINNOW_STATE_DIR"):
        return Path(base)
    store = Store(config.runs_dir)
    return Path(store.root) / ".servers" if store.local else Path.home() / ".local/state/winnow/servers"


def seats_of(config: RunConfig, heuristics: Iterable[Heuristic]) -> list[Seat]:
    """Every server that the config names, in its order."""
    heuristics, out = list(heuristics), []
    for role in ROLES:
        for n, server in enumerate(getattr(config.servers, role)):
            seat = Seat(role, n, guard.asked_of(config, role, server, heuristics), server.max_in_flight)
            expect = server.expect.model_dump(mode="json", exclude_defaults=True)
            out += ([dataclasses.replace(seat, url=server.url.rstrip("/"), expect=expect)] if server.url else
                    [dataclasses.replace(seat, spec=spec) for spec in specs_of(config, role, server)])
    return out


def ask(urls: Iterable[str]) -> dict[str, ServerFacts | RequestFailed]:
    """What each server says of itself, or why it does not."""
    async def one(url: str) -> ServerFacts | RequestFailed:
        client = SGLangClient(url)
        try:
            return await client.facts()
        except RequestFailed as error:
            return error
        finally:
            await client.close()

    async def every() -> dict[str, ServerFacts | RequestFailed]:
        wanted = list(dict.fromkeys(urls))
        return dict(zip(wanted, await asyncio.gather(*map(one, wanted)), strict=True))

    return asyncio.run(every())


def ask_one(url: str) -> ServerFacts | RequestFailed:
    """What a server says of itself, or why it does not."""
    return ask([url])[url]


def given(seats: list[Seat]) -> list[Served]:
    """The servers that others run."""
    facts = ask(str(s.url) for s in seats)
    return [Served(str(s.url), s.limit, "given", facts[str(s.url)], s) for s in seats]


# --- ours ---

def matched(seats: list[Seat], folder: Path) -> dict[Seat, ServerRecord]:
    """The seats of ours on which what is wanted runs already."""
    out: dict[Seat, ServerRecord] = {}
    for seat in seats:
        equal = [f for f in _standing(seat, folder, [r.url for r in out.values()]) if not f.differences]
        if equal:
            out[seat] = equal[0].record
    return out


def in_the_way(seat: Seat, folder: Path, taken: Iterable[str]) -> list[Found]:
    """Our servers that have to go before the seat's can start.

    On a GPU, or at a given port, that is all that stands there; on the CPU there is room for many, and the one in the
    seat's place is the first.
    """
    assert seat.spec is not None
    found = _standing(seat, folder, taken)
    return found if seat.spec.device == "cuda" or seat.spec.port else found[:1]


def _standing(seat: Seat, folder: Path, taken: Iterable[str]) -> list[Found]:
    assert seat.spec is not None
    records = launcher.in_place_of(seat.spec, folder, taken=list(taken))
    facts = ask(r.url for r in records)
    return [Found(r, _against(seat, r, facts[r.url])) for r in records]


def _against(seat: Seat, record: ServerRecord, facts: ServerFacts | RequestFailed) -> list[guard.Difference]:
    assert seat.spec is not None
    was = launcher.spec_of(record)
    if isinstance(facts, RequestFailed):
        return [guard.Difference("state", "it answers", str(facts))]
    found = guard.without_left_out(guard.differences(seat.asked, facts, was), was, record.command)
    return [*guard.placed(seat.spec, was), *found]


def seated(seats: list[Seat], folder: Path, started: list[ServerRecord], notice: Notice, *, leashed: bool
           ) -> dict[Seat, tuple[ServerRecord, How]]:
    """A server on each seat of ours: one that runs already where it is what is wanted, else a new one.

    One that stands there and is not what is wanted is stopped first, with the differences said. What this starts is
    also appended to `started`. Raises UnreachableError where it is busy with somebody else's requests or a server
    can't be started, InputError where what is asked for can't be.
    """
    for orphan in launcher.reap(folder):
        notice(f"ended the {orphan.role} server at {orphan.url}, left over from a run that was killed")
    here = matched(seats, folder)
    for seat, record in here.items():
        notice(f"using the {seat.role} server that runs at {record.url}: it is what {seat.key} asks for")
    missing = [seat for seat in seats if seat not in here]
    _clear(missing, folder, [r.url for r in here.values()], notice)
    out: dict[Seat, tuple[ServerRecord, How]] = {seat: (record, "reused") for seat, record in here.items()}
    if missing:
        records = _start(missing, folder, notice, leashed)
        started += records
        out |= {seat: (record, "launched") for seat, record in zip(missing, records, strict=True)}
    return out


def _clear(missing: list[Seat], folder: Path, taken: list[str], notice: Notice) -> None:
    """Stop what stands where these start; nothing if any of it is at work."""
    going: list[tuple[Seat, Found]] = []
    for seat in missing:
        going += [(seat, f) for f in in_the_way(seat, folder, [*taken, *(f.record.url for _, f in going)])]
    for seat, found in going:
        if at_work := launcher.busy(found.record):
            raise UnreachableError(
                f"{seat.key}: our {found.record.role} server at {found.record.url} stands where this one would start, "
                f"is not what is asked for, and works on {at_work} request{'s' if at_work > 1 else ''} for someone "
                f"else:\n{guard.text(found.differences, 'none')}\nWait until it is idle, stop it (winnow servers "
                "down), ask for what it is, or give this one another place (launch.gpus, launch.port)")
    for seat, found in going:
        notice(f"our {found.record.role} server at {found.record.url} is not what {seat.key} asks for; it is stopped "
               f"and one that is gets started:\n{guard.text(found.differences, 'none')}")
    launcher.stop_all(found.record for _, found in going)


def _start(missing: list[Seat], folder: Path, notice: Notice, leashed: bool) -> list[ServerRecord]:
    wanted = [seat.spec for seat in missing if seat.spec]
    models = ", ".join(sorted({Path(s.model).name for s in wanted}))
    gpus = ", ".join(f"GPU {s.gpu}" for s in wanted if s.gpu is not None)
    count = "a server" if len(wanted) == 1 else f"{len(wanted)} servers"
    notice(f"starting SGLang, {count} for {models} on {gpus or 'the CPU'} (half a minute for a small model; logs in "
           f"{folder})")
    try:
        # which flags an SGLang knows takes it 10 s to say: asked once on a machine
        build = functools.partial(command, cache_dir=folder / "flags")
        records = launcher.start_all(wanted, folder, leashed=leashed, build=build)
    except LaunchRefused as error:
        raise InputError(str(error)) from error
    except launcher.LaunchFailed as error:
        raise UnreachableError(str(error)) from error
    for record in records:
        notice(f"{record.role} server ready at {record.url}")
    return records
