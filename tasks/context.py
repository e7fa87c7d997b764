"""What a stage is given: the run's config, store, heuristics, tokenizer and servers.

A task gets the run's URL and nothing else; every process opens its own context from `run.json`, so the
same task runs in a thread here or in a worker on another machine.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from tasks.core.chat_template import ChatTemplate
from tasks.core.config import RunConfig
from tasks.core.config_generation import ROLES
from tasks.core.errors import InputError, InterruptedRun
from tasks.core.generation import RoleGeneration
from tasks.core.heuristics import Heuristic, parse_processor
from tasks.core.progress import Progress
from tasks.core.store import Store
from tasks.core.tokenizer import load_tokenizer, vocabulary_size
from tasks.serving import membership
from tasks.serving.client import ServerFacts
from tasks.serving.fleet import Limits
from tasks.serving.guard.admission import refusal
from tasks.serving.loop import Loop
from tasks.serving.pool import ServerPool

RUN_JSON = "run.json"
_NEEDED = ("config", "heuristics", "shards", "generation", "templates", "servers")
_FOLLOW_EVERY_S = 2.0


class Context:
    """One run, as one process sees it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(url)
        raw = self.store.read_json(RUN_JSON)
        if raw is None:
            raise InputError(f"{url}: no such run (no {RUN_JSON} there)")
        if lacking := [name for name in _NEEDED if name not in raw]:
            raise InputError(f"{url}: {RUN_JSON} is of another version of Winnow (no {', '.join(lacking)}): open "
                             "it with that version, or begin a run of another name")
        self.raw: dict[str, Any] = raw
        self.config = RunConfig.model_validate(raw["config"])
        self.heuristics = [_heuristic(h) for h in raw["heuristics"]]
        self.shards: int = raw["shards"]
        self.progress = Progress()
        self._pools: dict[str, ServerPool] = {}
        self._loop: Loop | None = None
        self._lock = threading.Lock()

    @property
    def loop(self) -> Loop:
        """Where this process's requests run: one loop, however many shards ask for it at once."""
        with self._lock:  # functools.cached_property takes no lock since Python 3.12
            if self._loop is None:
                self._loop = Loop()
            return self._loop

    @property
    def tokenizer(self) -> Any:
        """The generator's tokenizer."""
        return load_tokenizer(self.config.model, needs_template=False)

    @property
    def judge_tokenizer(self) -> Any:
        """The judge's tokenizer."""
        return load_tokenizer(self.config.judge_model, "quality.model.path", needs_template=False)

    def generation(self, role: str) -> RoleGeneration:
        """What a role's requests ask for, every field."""
        return RoleGeneration.from_recorded(self.raw["generation"][role])

    def chat_template(self, role: str) -> ChatTemplate:
        """The chat template that a role's prompts are rendered with."""
        return ChatTemplate.from_recorded(self.raw["inputs"]["chat_templates"][role]["content"])

    @property
    def judge_template(self) -> dict[str, Any]:
        """The judge's template as recorded, under its own system turn."""
        return self.raw["inputs"]["judge_template"]["content"]

    def pool(self, role: str) -> ServerPool:
        """The servers of `generator` or `judge`; one pool where both are the same servers."""
        loop = self.loop
        with self._lock:
            if role not in self._pools:
                roles = [r for r in ROLES if self.servers(r) == self.servers(role)]
                limits = self.config.limits
                pool = ServerPool(
                    self.servers(role),
                    Limits(limits.attempts, limits.request_timeout_s, limits.request_deadline_s,
                           limits.wait_for_servers_s),
                    admit=lambda facts: self.unfit(facts, roles),
                    vocab=vocabulary_size(self.config.model, self.tokenizer) if "generator" in roles else None)
                self._pools |= dict.fromkeys(roles, pool)
                self.progress.watch(role, lambda: pool.loads(role))
                loop.spawn(lambda: self._follow(pool, role))
            return self._pools[role]

    def servers(self, role: str) -> list[tuple[str, int | None]]:
        """(url, most requests in flight) of a role's servers: those of the config and those that joined, without those
        that left."""
        given = [(s["url"], s["max_in_flight"]) for s in self.raw["servers"][role]]
        return membership.apply(given, membership.read(self.store), role)

    def servers_seen(self, role: str) -> list[tuple[str, int | None, ServerFacts]]:
        """(url, most in flight, facts) of a role's servers that this process has asked."""
        pool = self._pools.get(role)
        return [(s.url, s.given, s.facts) for s in pool.fleet.servers if s.facts] if pool else []

    async def _follow(self, pool: ServerPool, role: str) -> None:
        """Let servers join and leave while the run goes on."""
        known = await asyncio.to_thread(self.servers, role)
        while True:
            await asyncio.sleep(_FOLLOW_EVERY_S)
            if (now := await asyncio.to_thread(self.servers, role)) != known:
                known = now
                pool.update(now)

    def unfit(self, facts: ServerFacts, roles: list[str]) -> str | None:
        """Why a server that answers can't work for all of the roles, or None."""
        return refusal(self.config, self.heuristics, self.raw["servers"], facts, roles)

    def close(self) -> None:
        """Stop the requests and close the connections."""
        with self._lock:
            loop, pools = self._loop, set(self._pools.values())
        if loop is not None:
            loop.stop()
            for pool in pools:
                loop.finish(pool.close)
            loop.end()


def _heuristic(raw: dict[str, Any]) -> Heuristic:
    processors = tuple(parse_processor(p, "run.json: heuristics") for p in raw["processors"])
    return Heuristic(raw["name"], processors, tuple(raw.get("aliases", ())))


_open: dict[str, Context] = {}
_open_lock = threading.Lock()
_interrupted = threading.Event()


def context(url: str) -> Context:
    """This process's context of a run, opened once. Raises InterruptedRun after `interrupt`."""
    with _open_lock:
        if _interrupted.is_set():
            raise InterruptedRun("interrupted")
        if url not in _open:
            _open[url] = Context(url)
        return _open[url]


def reopen(url: str) -> Context:
    """Forget what was known of the run and read it anew; `run.json` changed."""
    release(url)
    return context(url)


def interrupt(url: str) -> None:
    """Stop the run in this process for good: what is in flight is cancelled, no shard begins."""
    _interrupted.set()
    release(url)


def release(url: str) -> None:
    """Close and forget the run."""
    with _open_lock:
        known = _open.pop(url, None)
    if known:
        known.close()
