"""What a stage is given: the run's config, store, heuristics, tokenizer and servers.

A task gets the run's URL and nothing else; every process opens its own context from `run.json`, so the
same task runs in a thread here or in a worker on another machine.
"""

from __future__ import annotations

import threading
from typing import Any

from tasks.core.config import RunConfig
from tasks.core.errors import InputError, InterruptedRun
from tasks.core.heuristics import Heuristic, parse_processor
from tasks.core.progress import Progress
from tasks.core.store import Store
from tasks.core.tokenizer import load_tokenizer
from tasks.serving.pool import Loop, ServerPool

RUN_JSON = "run.json"


class Context:
    """One run, as one process sees it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = Store(url)
        raw = self.store.read_json(RUN_JSON)
        if raw is None:
            raise InputError(f"{url}: no such run (no {RUN_JSON} there)")
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
        return load_tokenizer(self.config.model)

    @property
    def judge_tokenizer(self) -> Any:
        """The judge's tokenizer."""
        return load_tokenizer(self.config.judge_model, "quality.model.path")

    @property
    def honours_seeds(self) -> bool:
        """Whether any generator runs in deterministic mode, as `run.json` has it from the servers."""
        return any(f["honours_seeds"] for f in self.raw["servers"]["generator"])

    def pool(self, role: str) -> ServerPool:
        """The servers of `generator` or `judge`; one pool where both are the same servers."""
        with self._lock:
            servers = [(s["url"], s["max_in_flight"]) for s in self.raw["servers"][role]]
            name = str(sorted(servers))
            if name not in self._pools:
                limits = self.config.limits
                self._pools[name] = ServerPool(servers, attempts=limits.attempts, timeout_s=limits.request_timeout_s,
                                               wait_s=limits.wait_for_servers_s)
            return self._pools[name]

    def close(self) -> None:
        """Stop the requests and close the connections."""
        with self._lock:
            loop, pools = self._loop, list(self._pools.values())
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
