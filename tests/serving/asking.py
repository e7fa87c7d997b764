"""What tests of the fan-out ask, and how they count what became of it."""

from __future__ import annotations

import asyncio
import collections
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import orjson

from tasks.serving.client import ServerFacts
from tasks.serving.fleet import Limits
from tasks.serving.pool import ServerPool
from tasks.serving.request import Outcome, Request
from tests import fake_answers
from tests.fake_sglang import FakeSGLang

VOCAB = 257


def payload(n: int) -> dict[str, Any]:
    return {"input_ids": [1, 2, n], "sampling_params": {"sampling_seed": n, "max_new_tokens": 30}, "rid": f"{n:032d}"}


def number(request: dict[str, Any]) -> int:
    return request["input_ids"][-1]


def right_answer(n: int) -> list[int]:
    return fake_answers.write(payload(n), 256)["output_ids"]


def make_pool(servers: Iterable[str], *, limit: int | None = 8, attempts: int = 4, timeout_s: float = 2,
              wait_s: float = 5, deadline_s: float = 60, **more: Any) -> ServerPool:
    return ServerPool([(u, limit) for u in servers], Limits(attempts, timeout_s, deadline_s, wait_s), **more)


class Asking:
    """Requests by number, the outcomes of each, and how many were pulled and not settled at the worst."""

    def __init__(self, numbers: Iterable[int], **more: Any) -> None:
        self.numbers, self._more = list(numbers), more
        self.outcomes: dict[int, list[Outcome]] = collections.defaultdict(list)
        self.suspected: dict[int, list[int]] = collections.defaultdict(list)
        self.settled_at: dict[int, float] = {}
        self.pulled = self.settled = self.most_open = 0

    def requests(self) -> Iterator[Request]:
        for n in self.numbers:
            self.pulled += 1
            self.most_open = max(self.most_open, self.pulled - self.settled)
            yield Request(self._build(n), self._settle(n), rid=payload(n)["rid"], suspected=self.suspected[n].append,
                          **self._more)

    @staticmethod
    def _build(n: int) -> Callable[[ServerFacts], bytes]:
        return lambda _: orjson.dumps(payload(n))

    def _settle(self, n: int) -> Callable[[Outcome], None]:
        def settle(outcome: Outcome) -> None:
            self.settled += 1
            self.settled_at[n] = time.monotonic()
            self.outcomes[n].append(outcome)
        return settle

    async def by(self, pool: ServerPool, timeout_s: float = 40) -> Asking:
        await asyncio.wait_for(pool.ask_all(self.requests(), len(self.numbers)), timeout_s)
        return self

    def check(self) -> None:
        """Each has one outcome, and an answer is the answer to its own request."""
        assert sorted(self.outcomes) == sorted(self.numbers)
        assert {len(o) for o in self.outcomes.values()} == {1}
        for n, (outcome,) in self.outcomes.items():
            assert (outcome.reply is None) != (outcome.failure is None)
            if outcome.reply:
                assert outcome.reply.output_ids == right_answer(n)

    def kinds(self) -> dict[int, str]:
        return {n: o.failure.kind if o.failure else "ok" for n, (o,) in self.outcomes.items()}


def asked(servers: Iterable[FakeSGLang], count: int, **pool: Any) -> Asking:
    """Ask all of these servers for so many, to the end."""
    async def work(made: ServerPool) -> Asking:
        return await Asking(range(count)).by(made)

    asking = with_pool(make_pool([s.url for s in servers], **pool), work)
    asking.check()
    return asking


def with_pool(pool: ServerPool, work: Callable[[ServerPool], Coroutine[Any, Any, Any]]) -> Any:
    """Run `work`; the pool is closed after it."""
    async def run() -> Any:
        try:
            return await work(pool)
        finally:
            await pool.close()
    return asyncio.run(run())


async def until(condition: Callable[[], Any], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.005)


def arrivals(servers: Iterable[FakeSGLang]) -> collections.Counter[str]:
    """How many times each request id reached the servers."""
    return collections.Counter(r["rid"] for s in servers for r in s.requests)


def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
