"""The servers of a run: those that run, those to start; what each says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flows.prepare import update_run
from tasks.context import ROLES, RUN_JSON, Context, reopen
from tasks.core.config import Launch, RunConfig, ServerConfig
from tasks.core.errors import InputError, UnreachableError, WinnowError
from tasks.core.store import Store
from tasks.serving import launcher, membership
from tasks.serving.client import ServerFacts, SGLangClient
from tasks.serving.compile import recording, unfit
from tasks.serving.failures import RequestFailed

log = logging.getLogger("winnow.servers")

Notice = Callable[[str], None]
Address = tuple[str, int | None]
"""A server's url and the most requests in flight there; None: to be found out."""

# What of /server_info goes into run.json: what can shape a token, and never a key or a password.
_RECORDED = ("version", "model_path", "revision", "dtype", "quantization", "context_length", "max_total_num_tokens",
             "sampling_backend", "attention_backend", "enable_deterministic_inference", "random_seed",
             "enable_custom_logit_processor", "preferred_sampling_params", "speculative_algorithm", "tp_size",
             "dp_size", "device", "disable_radix_cache", "chunked_prefill_size", "kv_cache_dtype")


def state_dir(config: RunConfig) -> Path:
    """Where this machine keeps records and logs of the servers that Winnow started."""
    if base := os.environ.get("WINNOW_STATE_DIR"):
        return Path(base)
    store = Store(config.runs_dir)
    return Path(store.root) / ".servers" if store.local else Path.home() / ".local/state/winnow/servers"


def specs(config: RunConfig, role: str) -> list[tuple[launcher.LaunchSpec, int | None]]:
    """What to launch for a role, each with its most requests in flight."""
    out = []
    servers: list[ServerConfig] = getattr(config.servers, role)
    for server in servers:
        if server.launch:
            out += [(spec, server.max_in_flight) for spec in _specs(config, role, server.launch)]
    return out


def _specs(config: RunConfig, role: str, launch: Launch) -> Iterator[launcher.LaunchSpec]:
    served = config.judge_model if role == "judge" else config.model
    model, revision = (launch.model, None) if launch.model else (served.path, served.revision)
    gpus: list[int | None] = list(launch.gpus) if launch.device == "cuda" else [None]
    if not gpus:
        raise InputError(f"servers.{role}: launch.gpus is empty; name at least one GPU")
    for n, gpu in enumerate(gpus):
        yield launcher.LaunchSpec(
            model=model, revision=revision, role=role, gpu=gpu, port=launch.port + n if launch.port else None,
            dtype=None if launch.dtype == "auto" else launch.dtype,
            **launch.model_dump(exclude={"model", "gpus", "port", "dtype"}))


@contextlib.contextmanager
def running(ctx: Context, notice: Notice) -> Iterator[Context]:
    """The run's servers, up and checked, their facts in `run.json`; ours are stopped at the end."""
    config = ctx.config
    started: list[launcher.ServerRecord] = []
    try:
        places = {role: _addresses(config, role, started, notice) for role in ROLES}
        places["judge"] = places["judge"] or places["generator"]
        changes = membership.read(ctx.store)  # of an earlier process of this run
        places = {role: membership.apply(addresses, changes, role) for role, addresses in places.items()}
        facts = {role: _facts(addresses) for role, addresses in places.items()}
        _check(ctx, [f for f in facts["generator"] if isinstance(f, ServerFacts)])
        update_run(ctx.store, servers={
            role: [_record(address, f) for address, f in zip(places[role], found, strict=True)]
            for role, found in facts.items()})
        working = reopen(ctx.url)
        yield working
        _record_joined(working)
    finally:
        if started:
            notice(f"stopping {', '.join(record.url for record in started)}")
            with ThreadPoolExecutor(len(started)) as stopping:  # each takes seconds to end in order
                list(stopping.map(launcher.stop, started))


def _record_joined(ctx: Context) -> None:
    """Servers that answered for the first time during the run: what they are belongs into `run.json` too."""
    servers = ctx.store.read_json(RUN_JSON)["servers"]
    changed = False
    for role in ROLES:
        known = {s["url"]: s for s in servers[role]}
        for url, limit, facts in ctx.servers_seen(role):
            if "model_path" not in known.get(url, {}):
                known[url] = _record((url, limit), facts)
                changed = True
        servers[role] = list(known.values())
    if changed:
        update_run(ctx.store, servers=servers)


def _addresses(config: RunConfig, role: str, started: list[launcher.ServerRecord], notice: Notice) -> list[Address]:
    """(url, most in flight) of a role's servers; starts those to launch that don't run yet."""
    servers: list[ServerConfig] = getattr(config.servers, role)
    out = [(s.url.rstrip("/"), s.max_in_flight) for s in servers if s.url]
    folder = state_dir(config)
    missing = []
    for spec, limit in specs(config, role):
        known = launcher.find_reusable(spec, folder, taken=[url for url, _ in out])
        if known:
            notice(f"using the {role} server that runs at {known.url}")
            out.append((known.url, limit))
        else:
            missing.append((spec, limit))
    if missing:
        out += _start(missing, folder, started, notice)
    return out


def _start(missing: list[tuple[launcher.LaunchSpec, int | None]], folder: Path, started: list[launcher.ServerRecord],
           notice: Notice) -> list[Address]:
    models = ", ".join(sorted({Path(s.model).name for s, _ in missing}))
    gpus = ", ".join(f"GPU {s.gpu}" for s, _ in missing if s.gpu is not None)
    count = "a server" if len(missing) == 1 else f"{len(missing)} servers"
    notice(f"starting SGLang, {count} for {models} on {gpus or 'the CPU'} (half a minute for a small model; logs in "
           f"{folder})")
    try:
        records = launcher.start_all([s for s, _ in missing], folder, leashed=True)
    except launcher.LaunchFailed as error:
        raise UnreachableError(str(error)) from error
    started += records
    for record in records:
        notice(f"{record.role} server ready at {record.url}")
    return [(r.url, limit) for r, (_, limit) in zip(records, missing, strict=True)]


def _facts(addresses: list[Address]) -> list[ServerFacts | RequestFailed]:
    """What each server says of itself, or why it does not. Raises UnreachableError when none does."""
    found = asyncio.run(_ask([url for url, _ in addresses]))
    for (url, _), fact in zip(addresses, found, strict=True):
        if isinstance(fact, RequestFailed):
            log.warning("%s does not answer: %s", url, fact)
    if not any(isinstance(f, ServerFacts) for f in found):
        lines = [f"  {url}: {why}" for (url, _), why in zip(addresses, found, strict=True)]
        raise UnreachableError("no server answers:\n" + "\n".join(lines))
    return found


def require_reachable(config: RunConfig) -> None:
    """Raises UnreachableError if a role has only `url` servers and none of them answers."""
    changes = membership.read(Store(config.url))
    for role in ROLES:
        servers: list[ServerConfig] = getattr(config.servers, role)
        if servers and not any(s.launch for s in servers):
            _facts(membership.apply([(str(s.url).rstrip("/"), None) for s in servers], changes, role))


async def _ask(urls: list[str]) -> list[ServerFacts | RequestFailed]:
    async def one(url: str) -> ServerFacts | RequestFailed:
        client = SGLangClient(url)
        try:
            return await client.facts()
        except RequestFailed as error:
            return error
        finally:
            await client.close()

    return await asyncio.gather(*map(one, urls))


def ask_one(url: str) -> ServerFacts | RequestFailed:
    """What a server says of itself, or why it does not."""
    return asyncio.run(_ask([url]))[0]


def _record(address: Address, facts: ServerFacts | RequestFailed) -> dict[str, Any]:
    """A server as `run.json` has it; without facts while it has not answered."""
    out: dict[str, Any] = {"url": address[0], "max_in_flight": address[1]}
    if isinstance(facts, ServerFacts):
        out |= {"honours_seeds": facts.honours_seeds, "custom_processors": facts.custom_processors,
                "model_path": facts.model_path, "info": {k: facts.info[k] for k in _RECORDED if k in facts.info}}
    return out


def _check(ctx: Context, generators: list[ServerFacts]) -> None:
    """Can these servers do what the heuristics need? Raises InputError before a candidate is asked for."""
    wrong = [f"servers.generator: {f.url}: {why}" for f in generators if (why := unfit(f, ctx.heuristics))]
    if wrong:
        raise InputError("\n".join(wrong))
    if ctx.config.generation.sampling_mask:
        log.warning("%s", recording(generators, ctx.heuristics))
    for facts in generators:
        if not facts.honours_seeds:
            log.warning("%s ignores seeds (no --enable-deterministic-inference): its rows can't be made again, and "
                        "seed_effective says so", facts.url)
        wanted, served = Path(ctx.config.model.path).name, Path(facts.model_path or "").name
        if facts.model_path and wanted != served:
            log.warning("%s serves %s, the config's model is %s: make sure that they are the same", facts.url,
                        facts.model_path, ctx.config.model.path)


def up(config: RunConfig, notice: Notice) -> list[launcher.ServerRecord]:
    """Start what the config launches and leave it running; servers that run already stay."""
    folder, out = state_dir(config), []
    for role in ROLES:
        for spec, _ in specs(config, role):
            if known := launcher.find_reusable(spec, folder, taken=[r.url for r in out]):
                notice(f"{role} server runs already at {known.url}")
                out.append(known)
                continue
            notice(f"starting SGLang for {spec.model} (log in {folder})")
            try:
                out.append(launcher.start(spec, folder, leashed=False))
            except launcher.LaunchFailed as error:
                raise UnreachableError(str(error)) from error
            notice(f"{role} server ready at {out[-1].url}")
    return out


def down(config: RunConfig) -> list[launcher.ServerRecord]:
    """Stop every server that Winnow started on this machine and that still runs; those stopped."""
    return [record for record in launcher.running(state_dir(config)) if launcher.stop(record)]


def probe(config: RunConfig) -> list[tuple[str, str, ServerFacts | WinnowError]]:
    """(role, url, facts or why there are none) of every server that should run."""
    known = launcher.running(state_dir(config))
    out = []
    for role in ROLES:
        urls = [s.url.rstrip("/") for s in getattr(config.servers, role) if s.url]
        for spec, _ in specs(config, role):
            running = [r.url for r in known if (r.role, r.spec_digest) == (role, spec.digest) and r.url not in urls]
            if running:
                urls.append(running[0])
            else:
                out.append((role, "-", UnreachableError("to be launched by the run; not running now")))
        for url in urls:
            found = ask_one(url)
            out.append((role, url, found if isinstance(found, ServerFacts) else UnreachableError(str(found))))
    return out
