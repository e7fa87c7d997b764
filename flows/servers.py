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
from tasks.context import Context, reopen
from tasks.core.config import Launch, RunConfig, ServerConfig
from tasks.core.errors import InputError, UnreachableError, WinnowError
from tasks.core.store import Store
from tasks.serving import launcher
from tasks.serving.client import ServerFacts
from tasks.serving.compile import compile_heuristic
from tasks.serving.pool import ServerPool

log = logging.getLogger("winnow.servers")

Notice = Callable[[str], None]
ROLES = ("generator", "judge")

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


def specs(config: RunConfig, role: str) -> list[tuple[launcher.LaunchSpec, int]]:
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
        facts = {role: _facts(ctx, addresses) for role, addresses in places.items()}
        _check(ctx, facts["generator"])
        update_run(ctx.store, servers={role: [_record(f, places[role]) for f in found]
                                       for role, found in facts.items()})
        yield reopen(ctx.url)
    finally:
        if started:
            notice(f"stopping {', '.join(record.url for record in started)}")
            with ThreadPoolExecutor(len(started)) as stopping:  # each takes seconds to end in order
                list(stopping.map(launcher.stop, started))


def _addresses(config: RunConfig, role: str, started: list[launcher.ServerRecord], notice: Notice
               ) -> list[tuple[str, int]]:
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


def _start(missing: list[tuple[launcher.LaunchSpec, int]], folder: Path, started: list[launcher.ServerRecord],
           notice: Notice) -> list[tuple[str, int]]:
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


def _facts(ctx: Context, addresses: list[tuple[str, int]]) -> list[ServerFacts]:
    """What each server that answers says of itself. Raises UnreachableError when none does."""
    return ctx.loop.run(lambda: _ask(addresses))


def require_reachable(config: RunConfig) -> None:
    """Raises UnreachableError if a role has only `url` servers and none of them answers."""
    for role in ROLES:
        servers: list[ServerConfig] = getattr(config.servers, role)
        if servers and not any(s.launch for s in servers):
            asyncio.run(_ask([(str(s.url), 1) for s in servers]))


async def _ask(addresses: list[tuple[str, int]]) -> list[ServerFacts]:
    pool = ServerPool(addresses, attempts=1, timeout_s=10, wait_s=0)
    try:
        return await pool.facts()
    finally:
        await pool.close()


def _record(facts: ServerFacts, places: list[tuple[str, int]]) -> dict[str, Any]:
    return {"url": facts.url, "max_in_flight": dict(places)[facts.url], "honours_seeds": facts.honours_seeds,
            "custom_processors": facts.custom_processors, "model_path": facts.model_path,
            "info": {k: facts.info[k] for k in _RECORDED if k in facts.info}}


def _check(ctx: Context, generators: list[ServerFacts]) -> None:
    """Can these servers do what the heuristics need? Raises InputError before a candidate is asked for."""
    honours = any(f.honours_seeds for f in generators)
    need = [h.name for h in ctx.heuristics if compile_heuristic(h, honours).custom_params is not None]
    without = [f.url for f in generators if not f.custom_processors]
    if need and without:
        more = f" and {len(need) - 3} more" if len(need) > 3 else ""
        raise InputError(
            f"servers.generator: {', '.join(without)} runs without custom logit processors, which {len(need)} of "
            f"{len(ctx.heuristics)} heuristics need ({', '.join(need[:3])}{more}); start it with "
            "--enable-custom-logit-processor (only on an address you trust), or choose other heuristics")
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
            found = [r.url for r in known if (r.role, r.spec_digest) == (role, spec.digest) and r.url not in urls]
            if found:
                urls.append(found[0])
            else:
                out.append((role, "-", UnreachableError("to be launched by the run; not running now")))
        for url in urls:
            try:
                out.append((role, url, asyncio.run(_ask([(url, 1)]))[0]))
            except UnreachableError as error:
                out.append((role, url, error))
    return out
