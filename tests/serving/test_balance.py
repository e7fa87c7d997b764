from __future__ import annotations

import asyncio
import heapq
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.serving.balance import choose
from tasks.serving.pool import ServerPool
from tests.fake_sglang import FakeSGLang
from tests.serving.asking import Asking, asked, make_pool, until, with_pool


@dataclass
class Seen:
    limit: int = 8
    latency_s: float | None = 1.0
    in_flight: int = 0
    done_at: list[float] = field(default_factory=list)


def free(servers: list[Seen]) -> list[Seen]:
    return [s for s in servers if s.in_flight < s.limit]


def makespan(servers: list[Seen], requests: int) -> float:
    """Seconds for all of them, on servers that take `latency_s` a request whatever their load."""
    now = 0.0
    while requests or any(s.done_at for s in servers):
        while requests and (server := choose(servers, free(servers), requests)):
            requests -= 1
            server.in_flight += 1
            assert server.in_flight <= server.limit
            assert server.latency_s
            heapq.heappush(server.done_at, now + server.latency_s)
        busy = [s for s in servers if s.done_at]
        assert busy, "all are free, nobody is given the work"
        now = min(s.done_at[0] for s in busy)
        for server in busy:
            while server.done_at and server.done_at[0] <= now:
                heapq.heappop(server.done_at)
                server.in_flight -= 1
    return now


def test_the_next_request_goes_where_the_least_work_is_outstanding():
    a, b, c = Seen(in_flight=4), Seen(in_flight=2), Seen(in_flight=4, limit=32)
    assert choose([a, b, c], [a, b, c], 1000) is c  # 5/32 of its places
    assert choose([a, b], [a, b], 1000) is b
    slow, fast = Seen(latency_s=10.0, in_flight=2), Seen(latency_s=1.0, in_flight=6)
    assert choose([slow, fast], [slow, fast], 1000) is fast


def test_while_there_is_plenty_to_do_every_free_place_is_used():
    slow, fast = Seen(latency_s=10.0), Seen(latency_s=1.0, in_flight=8)
    assert choose([slow, fast], [slow], 1000) is slow


def test_near_the_end_a_slow_server_is_left_free_when_the_fast_would_do_the_rest_sooner():
    slow, fast = Seen(latency_s=10.0), Seen(latency_s=1.0, in_flight=8)
    assert choose([slow, fast], [slow], 10) is None
    assert choose([slow, fast], [slow], 100) is slow


def test_a_server_that_never_answered_is_tried_and_without_a_free_place_there_is_none():
    new, fast = Seen(latency_s=None), Seen(latency_s=1.0, in_flight=8)
    assert choose([new, fast], [new], 1) is new
    assert choose([new, fast], [], 1) is None


@pytest.mark.parametrize(("latencies", "requests"), [
    ((1.0, 1.0, 5.0), 300), ((1.0, 1.0, 5.0), 100), ((1.0, 2.0, 4.0, 8.0), 200), ((0.1, 10.0), 500),
    ((1.0, 1.1, 1.2), 60), ((3.0,), 40), ((1.0, 50.0), 20),
])
def test_servers_of_different_speeds_end_together(latencies, requests):
    servers = [Seen(latency_s=latency) for latency in latencies]
    ideal = requests / sum(s.limit / latency for s, latency in zip(servers, latencies, strict=True))
    # whole requests: nobody can do better than one more of the fastest
    assert makespan(servers, requests) <= 1.15 * ideal + 1.5 * min(latencies)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 100)), min_size=1, max_size=6), st.integers(1, 200))
def test_the_work_is_done_whatever_the_speeds_and_waiting_never_costs_more_than_taking_every_place(servers, requests):
    def eager() -> float:
        places = [(0.0, latency) for limit, latency in servers for _ in range(limit)]
        heapq.heapify(places)  # first free, first used
        ends = []
        for _ in range(requests):
            at, latency = heapq.heappop(places)
            ends.append(at + latency)
            heapq.heappush(places, (at + latency, latency))
        return max(ends)

    ours = makespan([Seen(limit, latency) for limit, latency in servers], requests)
    assert ours <= eager() * 1.01 + min(latency for _, latency in servers)


# --- real servers ---

def test_one_of_three_servers_five_times_slower_does_its_part_and_nobody_waits_for_it():
    with FakeSGLang(delay_s=0.05) as a, FakeSGLang(delay_s=0.05) as b, FakeSGLang(delay_s=0.25) as slow:
        async def work(pool: ServerPool) -> tuple[Asking, float]:
            await Asking(range(1000, 1030)).by(pool)  # connections and latencies are known
            count, began = 400, time.monotonic()
            asking = await Asking(range(count)).by(pool)
            return asking, time.monotonic() - began

        asking, took = with_pool(make_pool([s.url for s in (a, b, slow)]), work)
        asking.check()
        ends = {s.url: max(asking.settled_at[n] for n, (o,) in asking.outcomes.items() if o.server == s.url)
                for s in (a, b, slow)}
        assert ends[slow.url] - max(ends[a.url], ends[b.url]) < 0.15  # less than one of its own
        assert 16 <= len(slow.requests) <= 60  # its fair part is a eleventh
        assert took < 2 * 400 / (2 * 8 / 0.05 + 8 / 0.25)  # with room for a busy machine


def test_a_place_is_not_kept_free_for_a_fast_server_that_hangs():
    hangs = False

    with (FakeSGLang(delay_s=0.01, fault=lambda n, p: "hang" if hangs else None) as fast,
          FakeSGLang(delay_s=0.3) as slow):
        async def work(pool: ServerPool) -> None:
            nonlocal hangs
            await Asking(range(100, 140)).by(pool)
            assert slow.requests
            hangs = True
            asking, began = Asking(range(12)), time.monotonic()
            running = asyncio.create_task(asking.by(pool))
            await until(lambda: asking.settled >= 8)  # of the rest, each of the four places there holds one
            assert time.monotonic() - began < 5
            running.cancel()

        with_pool(make_pool([fast.url, slow.url], limit=4, timeout_s=8), work)


def test_a_full_queue_teaches_the_limit_with_few_refusals():
    with FakeSGLang(delay_s=0.03, concurrency=3, queue_limit=2) as a, FakeSGLang(delay_s=0.03) as b:
        async def work(pool: ServerPool) -> Asking:
            asking = await Asking(range(500)).by(pool)
            limits = {s.url: s.limit for s in pool.fleet.servers}
            assert limits == {a.url: 5, b.url: 20}
            return asking

        asking = with_pool(make_pool([a.url, b.url], limit=20), work)
        asking.check()
        assert set(asking.kinds().values()) == {"ok"}
        refused = len(a.requests) - sum(a.answered.values())
        assert refused <= 20  # those of the first moment


def test_a_server_of_unknown_size_is_given_what_it_runs_at_once():
    with FakeSGLang(delay_s=0.02) as server:
        server.info["max_running_requests"] = 6
        asked([server], 60, limit=None)
        assert server.most_in_flight == 6
