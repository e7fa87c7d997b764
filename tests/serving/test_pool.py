from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.core.errors import UnreachableError
from tasks.serving.client import RequestFailed, SGLangClient
from tasks.serving.pool import Outcome, ServerPool, gather_all
from tests.fake_sglang import FakeSGLang


def payload(n: int) -> dict[str, Any]:
    return {"input_ids": [1, 2, n], "sampling_params": {"sampling_seed": n, "max_new_tokens": 30}, "rid": f"{n:032d}"}


def send(servers: list[str], count: int, *, limit: int = 8, attempts: int = 4, timeout_s: float = 2,
         wait_s: float = 2) -> list[Outcome]:
    async def work() -> list[Outcome]:
        pool = ServerPool([(u, limit) for u in servers], attempts=attempts, timeout_s=timeout_s, wait_s=wait_s)
        try:
            return await gather_all(pool.generate(payload(n)) for n in range(count))
        finally:
            await pool.close()

    return asyncio.run(work())


def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(("fault", "kind", "sent"), [
    ("400", "rejected", 1), ("500", "server_error", 3), ("garbage", "bad_response", 3), ("truncate", "bad_response", 3),
    ("abort", "aborted", 3), ("wrong_ids", "bad_response", 3), ("hang", "timeout", 3), ("reset", "poison", 2),
])
def test_each_fault_is_a_typed_failure_after_its_attempts(fault, kind, sent):
    with FakeSGLang(fault=lambda n, p: fault) as server:
        (outcome,) = send([server.url], 1, attempts=3, timeout_s=0.3)
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


def test_the_rest_of_the_fleet_completes_the_work():
    with FakeSGLang() as good:
        outcomes = send([dead_url(), dead_url(), good.url], 50)
        assert all(o.reply for o in outcomes)
        assert all(o.attempts == 1 for o in outcomes)  # what was never sent is no attempt


def test_a_request_in_flight_at_two_crashes_is_not_sent_again():
    def crash(n: int, p: dict[str, Any]) -> str | None:
        return "reset" if p["input_ids"][-1] == 3 else None

    with FakeSGLang(fault=crash) as a, FakeSGLang(fault=crash) as b:
        outcomes = send([a.url, b.url], 12)
        kinds = [o.failure.kind if o.failure else "ok" for o in outcomes]
        assert kinds == ["ok"] * 3 + ["poison"] + ["ok"] * 8
        poison = [r for s in (a, b) for r in s.requests if r["input_ids"][-1] == 3]
        assert len(poison) == 2


def test_no_server_at_all_ends_in_an_error_that_says_so():
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="still owed"):
        send([dead_url()], 3, wait_s=0.5)
    assert time.monotonic() - began < 10


def test_a_server_that_comes_back_is_used_again():
    url = dead_url()
    port = int(url.rpartition(":")[2])

    async def work() -> Outcome:
        pool = ServerPool([(url, 4)], attempts=3, timeout_s=2, wait_s=20)
        try:
            asked = asyncio.create_task(pool.generate(payload(1)))
            await asyncio.sleep(0.3)
            with FakeSGLang(port=port):
                return await asked
        finally:
            await pool.close()

    assert asyncio.run(work()).reply is not None


def test_no_server_gets_more_than_its_limit_and_each_is_kept_full():
    with FakeSGLang(delay_s=0.02) as a, FakeSGLang(delay_s=0.02) as b:
        send([a.url, b.url], 60, limit=5)
        assert a.most_in_flight == b.most_in_flight == 5


def test_no_request_waits_for_a_slow_server_while_another_is_free():
    with FakeSGLang(delay_s=3) as slow, FakeSGLang() as fast:
        send([slow.url, fast.url], 44, limit=4, timeout_s=20)
        assert (len(slow.requests), len(fast.requests)) == (4, 40)


FAULTS = st.lists(st.sampled_from([None, None, "500", "503", "429", "400", "reset", "garbage", "truncate", "abort",
                                   "wrong_ids"]), max_size=60)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FAULTS, FAULTS)
def test_under_any_mixture_of_faults_every_request_has_exactly_one_outcome(first, second):
    def script(faults: list[str | None]):
        return lambda n, p: faults[n] if n < len(faults) else None

    with FakeSGLang(fault=script(first)) as a, FakeSGLang(fault=script(second)) as b:
        outcomes = send([a.url, b.url], 25, attempts=3, wait_s=10)
    assert len(outcomes) == 25
    for n, outcome in enumerate(outcomes):
        assert (outcome.reply is None) != (outcome.failure is None)
        if outcome.reply:  # and it is the answer to this very request
            assert outcome.reply.output_ids == FakeSGLang().write(payload(n))["output_ids"]


def test_facts_tell_what_matters_and_a_stranger_is_refused():
    async def ask(url: str):
        client = SGLangClient(url, 2, 1)
        try:
            return await client.facts()
        finally:
            await client.close()

    with FakeSGLang(deterministic=False, custom_processors=True, model_path="some/model") as server:
        facts = asyncio.run(ask(server.url))
        assert (facts.model_path, facts.honours_seeds, facts.custom_processors) == ("some/model", False, True)
    with contextlib.suppress(OSError), pytest.raises(RequestFailed):
        asyncio.run(ask(dead_url()))
