from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.core.errors import UnreachableError
from tasks.serving.loop import gather_all
from tasks.serving.pool import ServerPool
from tasks.serving.request import Outcome, Request
from tests.fake_sglang import FakeSGLang
from tests.serving.asking import (
    VOCAB,
    Asking,
    arrivals,
    asked,
    dead_url,
    make_pool,
    number,
    payload,
    until,
    with_pool,
)

MAGIC = 30


class Crashing(FakeSGLang):
    """Dies of one request, sooner than those are done that came with it."""

    def __init__(self, **more: Any) -> None:
        super().__init__(fault=lambda n, p: "crash" if number(p) == MAGIC else None, **more)
        self._usual_s = self.delay_s

    async def _generate(self, request: Any) -> Any:
        self.delay_s = self._usual_s / (4 if number(await request.json()) == MAGIC else 1)
        return await super()._generate(request)


def send(servers: list[str], count: int, **limits: Any) -> list[Outcome]:
    async def work(pool: ServerPool) -> list[Outcome]:
        return await gather_all(pool.ask(payload(n)) for n in range(count))

    return with_pool(make_pool(servers, **limits), work)


@pytest.mark.parametrize(("fault", "kind", "sent"), [
    ("400", "rejected", 1), ("500", "server_error", 3), ("garbage", "bad_response", 3), ("truncate", "bad_response", 3),
    ("abort", "aborted", 3), ("wrong_ids", "bad_response", 3), ("hang", "timeout", 3), ("drip", "timeout", 3),
    ("reset", "poison", 2),
])
def test_each_fault_is_a_typed_failure_after_its_attempts(fault, kind, sent):
    with FakeSGLang(fault=lambda n, p: fault) as server:
        (outcome,) = send([server.url], 1, attempts=3, timeout_s=0.2)
        assert outcome.reply is None
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.attempts, len(server.requests)) == (kind, sent, sent)


@pytest.mark.parametrize("fault", ["500", "503", "429", "garbage", "truncate", "abort", "hang", "reset"])
def test_a_passing_fault_is_mended_by_asking_again(fault):
    with FakeSGLang(fault=lambda n, p: fault if n == 0 else None) as server:
        (outcome,) = send([server.url], 1, timeout_s=0.5)
        assert outcome.reply is not None
        assert len(server.requests) == 2


def test_a_server_error_is_retried_elsewhere():
    with FakeSGLang(fault=lambda n, p: "500") as bad, FakeSGLang() as good:
        outcomes = send([bad.url, good.url], 20)
        assert all(o.reply and o.server == good.url for o in outcomes)


def test_a_failed_request_is_asked_elsewhere_while_there_is_somewhere_else():
    with (FakeSGLang(fault=lambda n, p: "500" if number(p) % 3 == 0 else None, delay_s=0.01) as a,
          FakeSGLang(fault=lambda n, p: "garbage" if number(p) % 3 == 1 else None, delay_s=0.01) as b):
        asking = asked([a, b], 60, attempts=2)
        assert set(asking.kinds().values()) == {"ok"}


def test_no_server_gets_more_than_its_limit_and_each_is_kept_full():
    with FakeSGLang(delay_s=0.02) as a, FakeSGLang(delay_s=0.02) as b:
        send([a.url, b.url], 60, limit=5)
        assert a.most_in_flight == b.most_in_flight == 5


def test_a_request_that_took_too_long_in_all_is_a_failure_before_its_attempts_are_spent():
    with FakeSGLang(fault=lambda n, p: "hang") as server:
        (outcome,) = send([server.url], 1, attempts=50, timeout_s=0.3, deadline_s=0.5)
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.attempts) == ("timeout", 2)


# --- any mixture of faults ---

NO_ANSWER = ["hang", "drip"]
BREAKS = ["reset", "crash"]
FAULTS = ["400", "401", "404", "429", "500", "503", "redirect", "garbage", "empty_body", "null", "abort", "wrong_ids",
          "wrong_vocab", "wrong_rid", "wrong_count", "nan", "truncate"]
SCRIPT = st.lists(st.one_of(st.none(), st.sampled_from([*FAULTS, *NO_ANSWER, *BREAKS])), min_size=8, max_size=30)
SERVER = st.fixed_dictionaries({
    "script": SCRIPT, "limit": st.sampled_from([1, 2, 5, 9]), "slots": st.sampled_from([None, 1, 3]),
    "queue": st.sampled_from([None, 0, 2]), "down_s": st.sampled_from([0, 0.05, 0.3]),
    "retry_after": st.sampled_from([None, 0, 0.1]), "metrics": st.booleans()})


def scripted(plan: dict[str, Any]) -> FakeSGLang:
    script = plan["script"]
    return FakeSGLang(fault=lambda n, p: script[n] if n < len(script) else None, concurrency=plan["slots"],
                      queue_limit=plan["queue"], crash_down_s=plan["down_s"], retry_after=plan["retry_after"],
                      metrics=plan["metrics"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SERVER, min_size=1, max_size=3), st.lists(st.integers(1, 25), min_size=1, max_size=3))
def test_under_any_mixture_of_faults_every_request_has_exactly_one_outcome_and_it_is_its_own(plans, sources):
    used = {fault for plan in plans for fault in plan["script"]}
    broke, silent = bool(used & {*BREAKS}), bool(used & {*NO_ANSWER})
    servers = [scripted(plan) for plan in plans]
    for server in servers:
        server.__enter__()
    try:
        made = make_pool([], timeout_s=0.25 if silent else 10, attempts=3, wait_s=15, vocab=VOCAB)
        made.update([(s.url, p["limit"]) for s, p in zip(servers, plans, strict=True)])
        shards = [Asking(range(100 * i, 100 * i + count)) for i, count in enumerate(sources)]
        with_pool(made, lambda pool: gather_all(shard.by(pool) for shard in shards))
    finally:
        for server in servers:
            server.__exit__()
    reached = arrivals(servers)
    for shard in shards:
        shard.check()
        for n, (outcome,) in shard.outcomes.items():
            came = reached[payload(n)["rid"]]
            # what a dying process had not read yet was sent and never seen, or what was given up on a busy machine
            assert came <= outcome.attempts if broke or silent else came == outcome.attempts
            assert outcome.reply is None or came >= 1
    for server, plan in zip(servers, plans, strict=True):
        given_up = sum(plan["script"].count(fault) for fault in NO_ANSWER)  # there may be a moment until it notices
        assert server.most_in_flight <= plan["limit"] + given_up


# --- laziness, errors, cancellation ---

def test_requests_are_pulled_as_places_get_free_and_not_before():
    with FakeSGLang(delay_s=0.005) as a, FakeSGLang(delay_s=0.005) as b:
        asking = asked([a, b], 400, limit=4)
        assert asking.most_open <= 9  # those in flight, and the one that is being begun


def test_while_much_fails_no_more_is_begun():
    with FakeSGLang(fault=lambda n, p: "500" if n < 300 else None) as server:
        asking = asked([server], 300, limit=2, attempts=3)
        assert asking.most_open <= 2 * 2 + 64 + 2 + 1


@pytest.mark.parametrize("error", [ValueError("ours"), StopIteration("ours")])
@pytest.mark.parametrize("where", ["requests", "build", "settle", "suspected"])
def test_an_error_of_ours_comes_out_and_everything_in_flight_is_cancelled(where, error):
    def fails(*_: Any) -> Any:
        raise error

    def requests():
        for n in range(20):
            if where == "requests" and n == 7:
                raise ValueError("ours")
            body = orjson.dumps(payload(n))
            bad = n == 7
            yield Request(fails if bad and where == "build" else lambda _, body=body: body,
                          fails if bad and where == "settle" else lambda _: None,
                          suspected=fails if where == "suspected" else None)

    fault = (lambda n, p: "crash" if n == 7 else None) if where == "suspected" else None
    with FakeSGLang(delay_s=0.1, fault=fault, crash_down_s=0.1) as server:
        async def work(pool: ServerPool) -> None:
            with pytest.raises((type(error), ValueError, RuntimeError), match="ours"):
                await asyncio.wait_for(pool.ask_all(requests(), 20), 10)
            assert [s.in_flight for s in pool.fleet.servers] == [0]
            assert (await asyncio.wait_for(pool.ask(payload(50)), 10)).reply  # and the pool is as good as before

        with_pool(make_pool([server.url], limit=4), work)


def test_places_of_cancelled_requests_are_free_again():
    """Also those of a request that was cancelled before its first step."""
    with FakeSGLang(delay_s=0.05) as server:
        async def work(pool: ServerPool) -> None:
            for wait_s in (0, 0.001, 0.02, 0.1):
                shard = asyncio.create_task(pool.ask_all(Asking(range(50)).requests(), 50))
                await asyncio.sleep(wait_s)
                shard.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await shard
                assert [(s.in_flight, s.flying, s.suspects) for s in pool.fleet.servers] == [(0, set(), 0)]
            body = orjson.dumps(payload(0))
            requests = (Request(lambda _: body, lambda _: shard.cancel()) for _ in range(50))
            shard = asyncio.create_task(pool.ask_all(requests, 50))
            with pytest.raises(asyncio.CancelledError):
                await shard
            assert [s.in_flight for s in pool.fleet.servers] == [0]
            (await Asking(range(20)).by(pool)).check()
            await until(lambda: server.in_flight == 0)

        with_pool(make_pool([server.url], limit=4), work)
        assert server.most_in_flight <= 4 + 4 * 4  # what was cancelled, until the server noticed


def test_what_failed_in_one_shard_leaves_the_other_alone():
    with FakeSGLang(delay_s=0.02) as server:
        async def work(pool: ServerPool) -> Asking:
            good = Asking(range(60))
            running = asyncio.create_task(good.by(pool))
            bad = asyncio.create_task(pool.ask_all(iter([Request(lambda _: 1 / 0, lambda _: None)]), 30))
            with pytest.raises(ZeroDivisionError):
                await bad
            return await running

        with_pool(make_pool([server.url], limit=4), work).check()


def test_a_crash_after_its_shard_is_gone_sends_nothing_of_it_again():
    with Crashing(crash_down_s=0.3, delay_s=0.1) as server:
        async def work(pool: ServerPool) -> None:
            shard = asyncio.create_task(Asking([MAGIC, *range(8)]).by(pool))
            await until(lambda: server.crashes)
            await asyncio.sleep(0.03)
            shard.cancel()
            await asyncio.gather(shard, return_exceptions=True)
            (await Asking(range(100, 120)).by(pool)).check()
            assert all(count == 1 for count in arrivals([server]).values())

        with_pool(make_pool([server.url]), work)


def test_a_pool_that_is_closed_ends_those_who_wait_and_takes_no_more():
    with FakeSGLang(fault=lambda n, p: "hang") as server:
        async def work(pool: ServerPool) -> None:
            waiting = asyncio.create_task(pool.ask(payload(0)))
            await until(lambda: server.requests)
            await pool.close()
            for asks in (waiting, pool.ask(payload(1))):
                with pytest.raises(RuntimeError, match="closed"):
                    await asyncio.wait_for(asks, 5)

        with_pool(make_pool([server.url]), work)


def test_fewer_requests_than_announced_are_no_reason_to_wait():
    with FakeSGLang() as server:
        async def work(pool: ServerPool) -> Asking:
            asking = Asking(range(5))
            await asyncio.wait_for(pool.ask_all(asking.requests(), 9), 5)
            return asking

        with_pool(make_pool([server.url]), work).check()


# --- poison ---

@pytest.mark.parametrize("down_s", [0, 0.05, 0.4])
def test_a_request_that_kills_servers_is_alone_poison_and_reaches_two(down_s):
    with (Crashing(crash_down_s=down_s, delay_s=0.02) as a, Crashing(crash_down_s=down_s, delay_s=0.02) as b,
          Crashing(crash_down_s=down_s, delay_s=0.02) as c):
        asking = asked([a, b, c], 300, limit=6)
        assert {n: k for n, k in asking.kinds().items() if k != "ok"} == {MAGIC: "poison"}
        assert sorted(s.crashes for s in (a, b, c)) == [0, 1, 1]  # two servers, not one of them twice
        assert asking.outcomes[MAGIC][0].attempts == 2
        # whoever else was there came through at the next attempt, and the next process would have known
        assert asking.suspected[MAGIC][0] == 1
        others = [n for n, told in asking.suspected.items() if told and n != MAGIC]
        assert others
        assert all(asking.suspected[n] == [1] for n in others)


@pytest.mark.parametrize(("down_s", "company"), [
    (0, (False, False)), (0, (False, True)), (0, (True, False)), (0.3, (True, False)), (0.3, (True, True))])
def test_no_request_is_sent_a_third_time_whether_it_killed_alone_or_in_company(down_s, company):
    """Alone at a server that is up again at once, a crash looks like a broken connection."""
    with Crashing(crash_down_s=down_s, delay_s=0.1) as server:
        async def work(pool: ServerPool) -> Asking:
            asking, jobs = Asking([MAGIC]), []
            if company[0]:
                jobs.append(asyncio.create_task(Asking(range(4)).by(pool)))
            magic = asyncio.create_task(asking.by(pool))
            await until(lambda: server.crashes == 1)
            if company[1]:
                jobs.append(asyncio.create_task(Asking(range(10, 22)).by(pool)))
            for job in [magic, *jobs]:
                await job
            return asking

        asking = with_pool(make_pool([server.url], limit=8, wait_s=15, attempts=6), work)
        assert asking.kinds() == {MAGIC: "poison"}
        assert server.crashes == arrivals([server])[payload(MAGIC)["rid"]] == 2


def test_a_request_whose_connection_breaks_twice_while_others_live_is_not_sent_again():
    def breaks(n: int, p: dict[str, Any]) -> str | None:
        return "reset" if number(p) == MAGIC else None

    with FakeSGLang(fault=breaks, delay_s=0.01) as a, FakeSGLang(fault=breaks, delay_s=0.01) as b:
        asking = asked([a, b], 60)
        assert {n: k for n, k in asking.kinds().items() if k != "ok"} == {MAGIC: "poison"}
        assert arrivals([a, b])[payload(MAGIC)["rid"]] == 2


def test_a_suspect_of_an_earlier_process_is_poison_after_one_more_crash_and_one_of_two_is_never_sent():
    with Crashing(crash_down_s=0.5) as a, Crashing(crash_down_s=0.5) as b:
        async def work(pool: ServerPool) -> list[Asking]:
            return [await Asking([1, MAGIC, 2], crashes=1).by(pool), await Asking([3, 4], crashes=2).by(pool)]

        once, twice = with_pool(make_pool([a.url, b.url]), work)
        assert once.kinds() == {1: "ok", MAGIC: "poison", 2: "ok"}
        assert once.suspected[MAGIC] == [2]
        assert twice.kinds() == {3: "poison", 4: "poison"}
        assert a.crashes + b.crashes == 1
        assert max(arrivals([a, b]).values()) == 1
        assert payload(3)["rid"] not in arrivals([a, b])


def test_many_suspects_of_an_earlier_process_do_not_keep_the_servers_from_new_work():
    with FakeSGLang(delay_s=0.02) as server:
        def requests():
            yield from Asking(range(250), crashes=1).requests()
            yield from new.requests()

        new = Asking(range(1000, 1400))

        async def work(pool: ServerPool) -> None:
            running = asyncio.create_task(pool.ask_all(requests(), 650))
            await until(lambda: new.settled == 400)
            assert sum(number(r) < 250 for r in server.requests) < 150  # they go one by one, beside the rest
            running.cancel()

        with_pool(make_pool([server.url], limit=8), work)


def test_an_innocent_suspect_is_not_sent_to_prove_a_server_that_may_be_the_culprit():
    """A server that dies of whatever it is sent makes no poison of it while another works."""
    with FakeSGLang(fault=lambda n, p: "crash", crash_down_s=0.1, delay_s=0.01) as bad, FakeSGLang(delay_s=0.2) as good:
        asking = asked([bad, good], 24, limit=4)
        assert bad.crashes >= 2
        assert set(asking.kinds().values()) == {"ok"}


def test_a_flaky_network_makes_no_poison():
    rng = random.Random(5)

    def flaky(n: int, p: dict[str, Any]) -> str | None:
        return "reset" if rng.random() < 0.08 else None

    with FakeSGLang(fault=flaky, delay_s=0.005) as a, FakeSGLang(fault=flaky, delay_s=0.005) as b:
        asking = asked([a, b], 500, limit=12, attempts=6)
        failed = [k for k in asking.kinds().values() if k != "ok"]
        assert len(failed) <= 4  # about three meet two by chance, and only the first few resets are suspicious


def test_an_error_beside_a_broken_connection_is_a_sign_that_the_server_lives():
    """Else every pair of resets amid other failures would be a crash, and its requests suspects."""
    class Server(FakeSGLang):
        async def _answer(self, request: Any, payload: Any, fault: str | None, came: float) -> Any:
            await asyncio.sleep(0.02 if fault == "500" else 0)
            return await super()._answer(request, payload, fault, came)

    with Server(fault=lambda n, p: None if n >= 8 else "reset" if n in (2, 3) else "500", delay_s=0.03) as server:
        asking = asked([server], 8, limit=8)
        assert not any(asking.suspected.values())


@pytest.mark.parametrize("make", [lambda: dead_url(), lambda: "http://127.0.0.1:1"])
def test_after_it_gave_up_a_pool_says_so_again(make: Callable[[], str]):
    async def work(pool: ServerPool) -> None:
        for _ in range(2):
            with pytest.raises(UnreachableError, match="still owed"):
                await asyncio.wait_for(pool.ask(payload(1)), 10)

    with_pool(make_pool([make()], wait_s=0.3), work)
