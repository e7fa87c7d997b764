from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from tasks.core.errors import UnreachableError
from tasks.serving.client import ServerFacts
from tasks.serving.pool import ServerPool
from tests.fake_sglang import FakeSGLang
from tests.serving.asking import Asking, asked, dead_url, make_pool, payload, until, with_pool


def gives_up(servers: list[str], timeout_s: float = 30, **limits: Any) -> float:
    """Seconds until the pool says that no server is left."""
    async def work(pool: ServerPool) -> float:
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="still owed"):
            await Asking(range(3)).by(pool, timeout_s)
        return time.monotonic() - began

    return with_pool(make_pool(servers, **limits), work)


# --- dead servers ---

def test_the_rest_of_the_fleet_completes_the_work():
    with FakeSGLang() as good:
        async def work(pool: ServerPool) -> Asking:
            return await Asking(range(50)).by(pool)

        asking = with_pool(make_pool([dead_url(), dead_url(), good.url]), work)
        asking.check()
        assert set(asking.kinds().values()) == {"ok"}
        assert all(o.attempts == 1 for (o,) in asking.outcomes.values())  # what was never sent is no attempt


def test_all_but_one_may_die_at_work():
    with FakeSGLang(delay_s=0.02) as a, FakeSGLang(delay_s=0.02) as b, FakeSGLang(delay_s=0.02) as c:
        async def work(pool: ServerPool) -> Asking:
            asking = Asking(range(300))
            running = asyncio.create_task(asking.by(pool))
            await until(lambda: asking.settled > 30)
            a.crash()
            # a request that was at two crashes would be poison: those that were at the first come first
            await until(lambda: asking.settled > 200 or (any(asking.suspected.values()) and all(
                n in asking.outcomes for n, told in list(asking.suspected.items()) if told)))
            b.crash()
            return await running

        asking = with_pool(make_pool([s.url for s in (a, b, c)], limit=4), work)
        asking.check()
        assert set(asking.kinds().values()) == {"ok"}


def test_when_the_last_server_dies_at_work_the_wait_begins():
    with FakeSGLang(delay_s=0.02) as server:
        async def work(pool: ServerPool) -> None:
            asking = Asking(range(500))
            running = asyncio.create_task(asking.by(pool))
            await until(lambda: asking.settled > 150)
            died = time.monotonic()
            server.crash()
            with pytest.raises(UnreachableError, match=r"for 0\.6 s"):
                await running
            assert 0.6 <= time.monotonic() - died < 4
            assert all(o.reply for (o,) in asking.outcomes.values())  # the rest is owed, not failed

        with_pool(make_pool([server.url], wait_s=0.6), work)


@pytest.mark.parametrize("wait_s", [0, 0.6])
def test_no_server_at_all_ends_in_an_error_after_the_wait_and_not_before(wait_s):
    assert wait_s <= gives_up([dead_url(), dead_url()], wait_s=wait_s) < wait_s + 5


def test_no_server_on_the_list_is_an_error_too():
    gives_up([], wait_s=0.2)


@pytest.mark.parametrize(("retry_after", "delay_s"), [(None, 0), (0, 0), (0.2, 0), (0, 0.25)])
def test_servers_that_turn_everything_away_for_ever_are_none(retry_after, delay_s):
    """Also when each refusal takes its time, so that a trial is under way whenever one looks."""
    def refuse(n: int, p: dict[str, Any]) -> str:
        return "503"

    with (FakeSGLang(fault=refuse, retry_after=retry_after, delay_s=delay_s) as a,
          FakeSGLang(fault=refuse, retry_after=retry_after, delay_s=delay_s) as b):
        gives_up([a.url, b.url], wait_s=0.5)
        assert len(a.requests) + len(b.requests) < 60


def test_a_server_that_dies_of_everything_is_none():
    with FakeSGLang(fault=lambda n, p: "crash", crash_down_s=0.3) as server:
        async def work(pool: ServerPool) -> None:
            with pytest.raises(UnreachableError):
                await Asking(range(300)).by(pool)
            assert len(server.requests) < 40

        with_pool(make_pool([server.url], limit=2, wait_s=1), work)


def test_a_server_that_dies_again_and_again_but_answers_in_between_is_one():
    with FakeSGLang(fault=lambda n, p: "crash" if n % 6 == 5 else None, crash_down_s=0.02) as server:
        asking = asked([server], 60, limit=2, wait_s=0.6)
        assert server.crashes >= 8
        assert list(asking.kinds().values()).count("ok") > 40


def test_a_server_that_is_merely_slow_is_waited_for():
    with FakeSGLang(delay_s=0.9) as server:
        asking = asked([server], 2, limit=2, wait_s=0.3, timeout_s=10)
        assert set(asking.kinds().values()) == {"ok"}


def test_a_slow_trial_is_waited_for():
    with FakeSGLang(fault=lambda n, p: "crash" if n == 0 else None, crash_down_s=0.1, delay_s=0.9) as server:
        asking = asked([server], 1, limit=1, wait_s=0.8, timeout_s=10)
        assert set(asking.kinds().values()) == {"ok"}


def test_the_last_server_is_used_whatever_it_answers_and_the_failures_are_rows():
    with FakeSGLang(fault=lambda n, p: "500") as server:
        asking = asked([server], 20, attempts=3, wait_s=0.5)
        assert set(asking.kinds().values()) == {"server_error"}
        assert len(server.requests) == 60


def test_a_server_that_is_dead_at_the_start_joins_when_it_comes_up():
    url = dead_url()

    async def work(pool: ServerPool) -> None:
        running = asyncio.create_task(Asking(range(30)).by(pool))
        await asyncio.sleep(0.3)
        with FakeSGLang(port=int(url.rpartition(":")[2])) as late:
            (await running).check()
            assert len(late.requests) == 30

    with_pool(make_pool([url], wait_s=20), work)


def test_facts_that_nobody_can_judge_keep_a_server_out_and_do_not_hang_the_run():
    def admit(facts: ServerFacts) -> str | None:
        raise KeyError("no such thing")

    with FakeSGLang() as server:
        gives_up([server.url], wait_s=0.3, admit=admit)
        assert not server.requests


# --- left alone, and used again ---

def test_a_server_that_fails_is_left_alone_and_proves_itself_with_one_request_when_it_is_mended():
    broken = True
    before_good: list[int] = []

    def fault(n: int, p: dict[str, Any]) -> str | None:
        if broken:
            return "500"
        if not bad.answered:
            before_good.append(bad.in_flight)
        return None

    with FakeSGLang(fault=fault, delay_s=0.01) as bad, FakeSGLang(delay_s=0.01) as good:
        async def work(pool: ServerPool) -> None:
            nonlocal broken
            (await Asking(range(400)).by(pool)).check()
            assert len(bad.requests) < 25  # of about two hundred
            broken, came = False, len(bad.requests)
            running = asyncio.create_task(Asking(range(1000, 4000)).by(pool))
            await until(lambda: len(bad.requests) > came + 100)
            assert before_good == [1]
            running.cancel()

        with_pool(make_pool([bad.url, good.url], limit=8, attempts=10), work)


def test_a_server_whose_connections_all_break_is_left_alone_though_it_answers_questions():
    with FakeSGLang(fault=lambda n, p: "reset") as bad, FakeSGLang(delay_s=0.01) as good:
        asking = asked([bad, good], 500, limit=4)
        assert set(asking.kinds().values()) == {"ok"}
        assert len(bad.requests) < 20


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_server_is_not_asked_before_the_time_it_named(status):
    came: list[float] = []

    class Busy(FakeSGLang):
        """Turns one away at once, and answers the others that it has a moment later."""

        async def _generate(self, request: Any) -> Any:
            came.append(time.monotonic())
            return await super()._generate(request)

        async def _answer(self, request: Any, payload: Any, fault: str | None, *rest: Any) -> Any:
            await asyncio.sleep(0 if fault else 0.15)
            return await super()._answer(request, payload, fault, *rest)

    with Busy(fault=lambda n, p: status if n == 2 else None, retry_after=1) as busy, FakeSGLang(delay_s=0.01) as other:
        asking = asked([busy, other], 250, limit=4)
        assert set(asking.kinds().values()) == {"ok"}
        later = [t - came[0] for t in came if t - came[0] > 0.1]
        assert not later or min(later) > 0.9
        assert len(came) >= 3


def test_a_server_in_trial_that_refuses_a_bad_request_works():
    at_once: list[int] = []

    def fault(n: int, p: dict[str, Any]) -> str:
        if n > 10:
            at_once.append(server.in_flight)
        return "crash" if n == 0 else "400"

    with FakeSGLang(fault=fault, crash_down_s=0.2, delay_s=0.03) as server:
        asking = asked([server], 40, limit=4, wait_s=1)
        assert set(asking.kinds().values()) == {"rejected"}
        assert max(at_once) == 4


# --- another model ---

class Serving(FakeSGLang):
    """What it writes depends on the model that it serves."""

    def write(self, payload: dict[str, Any]) -> dict[str, Any]:
        if self.info["model_path"] != "tiny":
            params = payload["sampling_params"] | {"sampling_seed": payload["sampling_params"]["sampling_seed"] + 10**6}
            payload = payload | {"sampling_params": params}
        return super().write(payload)

    def reborn(self, model: str) -> None:
        self.crash()  # first dead, then another: no process changes its model
        self.restart(model)


def only_tiny(facts: ServerFacts) -> str | None:
    return None if facts.model_path == "tiny" else f"it serves {facts.model_path}"


def test_no_answer_of_another_model_is_taken_although_connections_were_open_and_the_right_one_is_used_again():
    with Serving(delay_s=0.01) as a, Serving(delay_s=0.01) as b:
        async def work(pool: ServerPool) -> None:
            (await Asking(range(16)).by(pool)).check()
            assert a.requests and b.requests
            a.reborn("other")  # nothing in flight, idle connections to both
            during = await Asking(range(100, 160)).by(pool)
            during.check()
            assert {o.server for (o,) in during.outcomes.values() if o.reply} == {b.url}
            a.reborn("tiny")
            after = Asking(range(1000, 5000))
            running = asyncio.create_task(after.by(pool))
            await until(lambda: any(o[0].server == a.url for o in list(after.outcomes.values())))
            running.cancel()

        with_pool(make_pool([a.url, b.url], limit=4, admit=only_tiny), work)


def test_a_server_that_changes_its_model_again_and_again_at_work_gives_no_wrong_answer():
    rng = random.Random(3)
    with Serving(delay_s=0.01) as a, Serving(delay_s=0.01) as b:
        async def work(pool: ServerPool) -> Asking:
            asking = Asking(range(600))
            running = asyncio.create_task(asking.by(pool))
            turn = 0
            while not running.done():
                turn += 1
                await asyncio.to_thread(a.reborn, "tiny" if turn % 2 == 0 else "other")
                await asyncio.sleep(rng.uniform(0, 0.25))
            return await running

        asking = with_pool(make_pool([a.url, b.url], limit=6, admit=only_tiny), work)
        asking.check()  # every answer is that of the right model
        assert set(asking.kinds().values()) <= {"ok", "poison"}
        assert list(asking.kinds().values()).count("ok") > 550


def test_the_facts_of_an_answer_are_those_of_the_server_that_gave_it():
    with FakeSGLang(deterministic=True) as server:
        async def work(pool: ServerPool) -> list[bool]:
            began = time.monotonic()
            first = await pool.ask(payload(1))
            running = asyncio.create_task(Asking(range(10, 400)).by(pool))
            await until(lambda: len(server.requests) > 20)
            server.crash()
            server.restart(enable_deterministic_inference=False)
            await running
            last = await pool.ask(payload(2))
            assert time.monotonic() - began < 3  # it is asked what it is now soon, however many came from it
            return [o.facts.honours_seeds for o in (first, last) if o.facts]

        assert with_pool(make_pool([server.url]), work) == [True, False]


# --- join and leave ---

def test_a_server_that_joins_gets_work_and_one_that_leaves_finishes_what_it_has():
    with FakeSGLang(delay_s=0.05) as a, FakeSGLang(delay_s=0.05) as b:
        async def work(pool: ServerPool) -> Asking:
            asking = Asking(range(120))
            running = asyncio.create_task(asking.by(pool))
            await until(lambda: len(a.requests) > 6)
            pool.update([(a.url, 4), (b.url, 4)])
            await until(lambda: len(b.requests) > 6)
            pool.update([(b.url, 4)])
            had = len(a.requests)
            await running
            assert len(a.requests) <= had + 4  # those that were on their way
            assert sum(a.answered.values()) == len(a.requests)
            return asking

        asking = with_pool(make_pool([a.url], limit=4), work)
        asking.check()
        assert all(o.attempts == 1 for (o,) in asking.outcomes.values())


def test_a_server_that_leaves_and_comes_back_has_no_more_in_flight_than_its_limit():
    with FakeSGLang(delay_s=0.1) as server:
        async def work(pool: ServerPool) -> None:
            running = asyncio.create_task(Asking(range(20)).by(pool))
            for _ in range(6):
                await asyncio.sleep(0.06)
                pool.update([])
                await asyncio.sleep(0.01)
                pool.update([(server.url + "/", 3)])  # the same address, written another way
            (await running).check()
            assert len(pool.fleet.servers) == 1

        with_pool(make_pool([server.url], limit=3), work)
        assert server.most_in_flight == 3


def test_a_server_may_be_given_another_limit_at_work():
    with FakeSGLang(delay_s=0.03) as server:
        async def work(pool: ServerPool) -> None:
            running = asyncio.create_task(Asking(range(60)).by(pool))
            await until(lambda: len(server.requests) > 4)
            pool.update([(server.url, 7)])
            (await running).check()

        with_pool(make_pool([server.url], limit=2), work)
        assert server.most_in_flight == 7
