"""The servers of a run: asked what they are, held against what they must be, recorded; those of ours started and
stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flows.prepare import update_run
from flows.seats import Notice, Seat, Served, ask, given, seated, seats_of, state_dir
from tasks.context import ROLES, RUN_JSON, Context, reopen
from tasks.core.config import RunConfig
from tasks.core.errors import InputError, UnreachableError
from tasks.core.heuristics import Heuristic
from tasks.serving import membership
from tasks.serving.client import ServerFacts
from tasks.serving.compile import recording, unfit
from tasks.serving.failures import RequestFailed
from tasks.serving.guard import guard
from tasks.serving.guard.admission import Recorded, cramped, departures
from tasks.serving.guard.same_model import same_model
from tasks.serving.launch import launcher
from tasks.serving.launch.launcher import ServerRecord

log = logging.getLogger("winnow.servers")


@contextlib.contextmanager
def running(ctx: Context, notice: Notice) -> Iterator[Context]:
    """The run's servers, up and proved, their facts in `run.json`; ours are stopped at the end.

    Raises InputError where one is not what the run asks for, UnreachableError where none answers for a role.
    """
    config, started = ctx.config, list[ServerRecord]()
    seats, changes = seats_of(config, ctx.heuristics), membership.read(ctx.store)  # changes: of an earlier process
    try:
        others = _others(seats, changes)
        _refuse(config, others)
        ours = _ours([s for s in seats if s.spec], config, started, notice)
        _refuse(config, ours)
        found = {role: _of_role(role, seats, [*others, *ours], changes) for role in ROLES}
        _check(ctx, {role: [s.facts for s in served if isinstance(s.facts, ServerFacts)]
                     for role, served in found.items()})
        update_run(ctx.store, servers=_records(ctx, found), servers_differ=_unlike(found))
        working = reopen(ctx.url)
        yield working
        _record_joined(working)
    finally:
        if started:
            notice(f"stopping {', '.join(record.url for record in started)}")
            launcher.stop_all(started)


def _others(seats: list[Seat], changes: Mapping[str, Any]) -> list[Served]:
    """The servers that others run, without those that left."""
    return given([s for s in seats if s.url and s.url not in changes.get(s.role, {}).get("leave", [])])


def _ours(seats: list[Seat], config: RunConfig, started: list[ServerRecord], notice: Notice) -> list[Served]:
    on = seated(seats, state_dir(config), started, notice, leashed=True)
    facts = ask(record.url for record, _ in on.values())
    return [Served(on[s][0].url, s.limit, on[s][1], facts[on[s][0].url], s, on[s][0]) for s in seats]


def _of_role(role: str, seats: list[Seat], served: list[Served], changes: Mapping[str, Any]) -> list[Served]:
    """A role's servers: its own or, for a judge without any, the generators; with those that joined, without those
    that left. Raises UnreachableError when none answers."""
    whose = role if any(s.role == role for s in seats) else "generator"
    order = {id(seat): n for n, seat in enumerate(seats)}
    own = sorted((s for s in served if s.seat and s.seat.role == whose), key=lambda s: order[id(s.seat)])
    known = {s.url: s for s in own}
    addresses = membership.apply([(s.url, s.limit) for s in own], dict(changes), role)
    joined = ask(url for url, _ in addresses if url not in known)
    out = [dataclasses.replace(known[url], limit=limit) if url in known else Served(url, limit, "joined", joined[url])
           for url, limit in addresses]
    _require_one(out)
    return out


def _require_one(served: list[Served]) -> None:
    for s in served:
        if isinstance(s.facts, RequestFailed):
            log.warning("%s does not answer: %s", s.url, s.facts)
    if all(isinstance(s.facts, RequestFailed) for s in served):
        raise UnreachableError("no server answers:\n" + "\n".join(f"  {s.url}: {s.facts}" for s in served))


def require_reachable(config: RunConfig) -> None:
    """An early look at the servers of a run that is begun, before anything is started.

    Raises UnreachableError if a role has only `url` servers and none of them answers, InputError if one is not what the
    run asks for.
    """
    ctx = Context(config.url)
    seats, changes = seats_of(config, ctx.heuristics), membership.read(ctx.store)
    others = _others(seats, changes)
    for role in ROLES:
        if any(s.role == role for s in seats) and not any(s.role == role and s.spec for s in seats):
            _of_role(role, seats, others, changes)
    if not config.allow_mismatch:  # else said once, by the run itself
        _refuse(config, others)


# --- are they what is asked for? ---

def _refuse(config: RunConfig, served: list[Served]) -> None:
    """Raises InputError, with the differences of all, if one is not what is asked for; a warning with allow_mismatch.

    A server that was just started is held to it as well: SGLang may make something else of a setting, by itself or
    because of the model. What it was started without, because its SGLang has no such flag, was said then and is
    recorded, and no error.
    """
    wrong = []
    for s in served:
        found = s.compared.differences
        if s.record:
            found = guard.without_left_out(found, launcher.spec_of(s.record), s.record.command)
        if s.seat and found:
            wrong.append(f"{s.seat.key}: {s.url} is not what the run asks for:\n"
                         f"{guard.text(found, 'expect' if s.how == 'given' else 'launch')}")
            if s.how == "given" and (whole := guard.expected(found, s.seat.expect)):
                wrong.append(f"  all at once: {whole}")
    if not wrong:
        return
    if config.allow_mismatch:
        log.warning("%s\nallowed (allow_mismatch), and recorded in run.json", "\n".join(wrong))
        return
    if served[0].how == "given":
        mend = ("Start it as the run asks for, write under its `expect` what is meant, or use it as it is with "
                "--allow-mismatch, which run.json then says.")
    else:
        mend = ("SGLang made something else of it than it was told. Write under `launch` what it made, leave the "
                "setting out, or use it as it is with --allow-mismatch, which run.json then says.")
    raise InputError("\n".join([*wrong, mend]))


def _check(ctx: Context, found: Mapping[str, list[ServerFacts]]) -> None:
    """Can these servers do what heuristics and judge need? Raises InputError before a candidate is asked for."""
    generators = found["generator"]
    wrong = [f"servers.{'judge' if ctx.config.servers.judge else 'generator'}: {f.url}: {why}"
             for f in found.get("judge", ()) if (why := cramped(ctx.config, f))]
    wrong += [f"servers.generator: {f.url}: {why}" for f in generators if (why := unfit(f, ctx.heuristics))]
    judge = ctx.config.quality.model if "quality" in ctx.config.labels and not ctx.config.servers.judge else None
    if judge and not ctx.config.allow_mismatch:
        wrong += [f"quality.model: the judge's model is {judge.path}, but there is no servers.judge, and the generator "
                  f"at {f.url}, which judges then, serves {f.model_path}" for f in generators
                  if not same_model(judge.path, f.model_path, f.url)[0]]
    if wrong:
        raise InputError("\n".join(wrong))
    if ctx.config.generation.generator.sampling_mask:
        log.warning("%s", recording(generators, ctx.heuristics))
    for facts in generators:
        if not facts.honours_seeds:
            log.warning("%s ignores seeds (no --enable-deterministic-inference): its rows can't be made again, and "
                        "seed_effective says so", facts.url)


def _unlike(found: Mapping[str, list[Served]]) -> dict[str, list[str]]:
    """By role, in what its servers differ from each other that shapes tokens; one warning each."""
    out = {}
    for role, served in found.items():
        lines = guard.unlike([s.facts for s in served if isinstance(s.facts, ServerFacts)])
        if lines and lines not in out.values():  # the judges may be the generators
            log.warning("the %s servers are not alike, and which one answers is chance (each row names its own): %s",
                        role, " | ".join(lines))
        if lines:
            out[role] = lines
    return out


# --- run.json ---

def _records(ctx: Context, found: Mapping[str, list[Served]]) -> dict[str, list[dict[str, Any]]]:
    out = {role: [_record(s) for s in served] for role, served in found.items()}
    for role, served in found.items():
        for s, record in zip(served, out[role], strict=True):
            _mark_joined(ctx, out, role, s, record)
    return out


def _mark_joined(ctx: Context, recorded: Recorded, role: str, served: Served, record: dict[str, Any]) -> None:
    """One that joined has no entry of its own: it is held against the others of its role."""
    if served.seat is None and isinstance(served.facts, ServerFacts):
        found = departures(ctx.config, ctx.heuristics, recorded, served.facts, role)
        record["mismatch"] = [d.shown() for d in found]


def _record(served: Served) -> dict[str, Any]:
    """A server as `run.json` has it; without facts while it has not answered."""
    out: dict[str, Any] = {"url": served.url, "max_in_flight": served.limit, "how": served.how}
    flags: Iterable[str] = ()
    if served.seat:
        asked = served.seat.asked
        out |= {"entry": served.seat.entry, "asked": asked.shown()}
        flags = (name.replace("-", "_") for name in asked.flags)
    if isinstance(facts := served.facts, ServerFacts):
        compared = served.compared
        out |= {"mismatch": [d.shown() for d in compared.differences], "notes": compared.notes,
                "honours_seeds": facts.honours_seeds, "custom_processors": facts.custom_processors,
                "model_path": facts.model_path, "context": facts.context,
                "info": {k: facts.info[k] for k in (*guard.RECORDED, *flags) if k in facts.info}}
    return out


def _record_joined(ctx: Context) -> None:
    """Servers that answered for the first time during the run: what they are belongs into `run.json` too."""
    servers = ctx.store.read_json(RUN_JSON)["servers"]
    seats = [s for s in seats_of(ctx.config, ctx.heuristics) if s.url]
    changed = False
    for role in ROLES:
        known = {s["url"]: s for s in servers[role]}
        for url, limit, facts in ctx.servers_seen(role):
            if "model_path" not in known.get(url, {}):
                seat = next((s for s in seats if s.role == (role if ctx.config.servers.judge else "generator")
                             and s.url == url), None)
                served = Served(url, limit, "given" if seat else "joined", facts, seat)
                known[url] = _record(served)
                _mark_joined(ctx, servers, role, served, known[url])
                changed = True
        servers[role] = list(known.values())
    if changed:
        update_run(ctx.store, servers=servers)


# --- winnow servers up, down ---

def up(config: RunConfig, heuristics: Iterable[Heuristic], notice: Notice) -> list[ServerRecord]:
    """Start what the config launches and leave it running.

    A server that runs already stays if it is what is asked for; one that is not is stopped and started anew.
    """
    started: list[ServerRecord] = []
    seats = [s for s in seats_of(config, heuristics) if s.spec]
    on = seated(seats, state_dir(config), started, notice, leashed=False)
    facts = ask(record.url for record, _ in on.values())
    try:
        _refuse(config, [Served(r.url, s.limit, how, facts[r.url], s, r) for s, (r, how) in on.items()])
    except InputError:
        launcher.stop_all(started)
        raise
    return [on[seat][0] for seat in seats]


def down(config: RunConfig) -> list[ServerRecord]:
    """Stop every server that Winnow started on this machine and that still runs; those stopped."""
    return [record for record in launcher.running(state_dir(config)) if launcher.stop(record)]
