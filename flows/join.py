"""Servers that join or leave a run, also while a process works on it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from flows.seats import ask_one
from flows.status import worker
from tasks.context import ROLES, Context
from tasks.core.config import ServerConfig
from tasks.core.errors import InputError, did_you_mean
from tasks.serving import membership
from tasks.serving.client import ServerFacts
from tasks.serving.guard.admission import departures

# it may well come up in a minute; whatever else it answers, it is no server that a run could use
_NOT_YET = ("unreachable", "timeout", "overloaded")


def join(ctx: Context, url: str, role: str | None, max_in_flight: int | None) -> list[str]:
    """Let a server join; what a person should know of it. Raises InputError where the run can't use it.

    Without a role it generates, and judges too where the config has no servers for that. One that does not answer yet
    is let in: a process at work asks it until it does, and gives it nothing before.
    """
    url = _address(url)
    roles = [role] if role else [r for r in ROLES if r == "generator" or not ctx.config.servers.judge]
    facts = ask_one(url)
    notes = []
    if isinstance(facts, ServerFacts):
        if why := ctx.unfit(facts, roles):
            raise InputError(f"{url} can't join {ctx.config.run}: {why}")
        for each in roles if ctx.config.allow_mismatch else ():
            found = departures(ctx.config, ctx.heuristics, ctx.raw["servers"], facts, each)
            notes += [f"{url}: {d}; let in nevertheless (allow_mismatch)" for d in found]
        if "generator" in roles and not facts.honours_seeds:
            notes.append(f"{url} ignores seeds: its rows can't be made again, and seed_effective says so")
    elif facts.kind in _NOT_YET:
        notes.append(f"{url} does not answer now ({facts}); it gets work once it does, if the run can use it. Was the "
                     f"address wrong? winnow servers leave {ctx.url} {url}")
    else:
        raise InputError(f"{url} can't join {ctx.config.run}: {facts}")
    for each in roles:
        notes += _join(ctx, each, url, max_in_flight)
    if role == "judge" and not ctx.config.servers.judge and worker(ctx):
        notes.append("the generators of this run judge as well: the process at work on it gives judgements to the new "
                     "server only after it is stopped and started again")
    return [*notes, _when(ctx)]


def _join(ctx: Context, role: str, url: str, max_in_flight: int | None) -> list[str]:
    here = dict(ctx.servers(role))
    if url in here and max_in_flight in (None, here[url]):
        return [f"{url} is a {role} of the run already"]
    # one that comes back gets the limit that it had
    known = {s["url"]: s["max_in_flight"] for s in ctx.raw["servers"][role]}
    membership.join(ctx.store, [role], url, max_in_flight or known.get(url))
    return [f"{url}: another limit counts from the next start of the run on"] if url in here else []


def leave(ctx: Context, url: str, role: str | None) -> list[str]:
    """Let a server leave once what it has in flight is done; what a person should know of it.

    Raises InputError where it is not in the run.
    """
    url = url.rstrip("/")
    here = {r: [u for u, _ in ctx.servers(r)] for r in ([role] if role else ROLES)}
    roles = [r for r, urls in here.items() if url in urls]
    if not roles:
        known = sorted({u for urls in here.values() for u in urls})
        raise InputError(f"{url} is no {role or 'server'} of {ctx.config.run}{did_you_mean(url, known)} "
                         f"In it: {', '.join(known) or 'none'}.")
    membership.leave(ctx.store, roles, url)
    notes = [f"no {r} is left: the run waits {ctx.config.limits.wait_for_servers_s:g} s for one to join, then stops "
             "(exit code 4) and can be resumed" for r in roles if len(here[r]) == 1]
    return [*notes, _when(ctx)]


def servers(ctx: Context) -> list[dict[str, Any]]:
    """Who is in the run: role, url, max_in_flight (None: found out while running), model (None: it never answered as
    far as `run.json` knows), whether it joined later."""
    out = []
    for role in ROLES:
        known = {s["url"]: s for s in ctx.raw["servers"][role]}
        joined = membership.read(ctx.store).get(role, {}).get("join", {})
        out += [{"role": role, "url": url, "max_in_flight": limit, "joined": url in joined,
                 "model": known.get(url, {}).get("model_path")} for url, limit in ctx.servers(role)]
    return out


def _address(url: str) -> str:
    try:
        return str(ServerConfig(url=url).url).rstrip("/")
    except ValidationError:
        raise InputError(f"{url}: not a server's address; it looks like http://10.0.0.1:30000") from None


def _when(ctx: Context) -> str:
    pid = worker(ctx)
    return (f"process {pid} works on the run and takes note within seconds" if pid
            else "nobody works on the run now; it counts when the run goes on")
