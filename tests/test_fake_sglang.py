from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any

import aiohttp
import pytest

from tasks.serving.sampling_mask import read_mask
from tests.fake_answers import BEYOND_ANY_VOCABULARY
from tests.fake_sglang import FakeSGLang


def payload(n: int) -> dict[str, Any]:
    return {"input_ids": [1, 2, n], "sampling_params": {"sampling_seed": n, "max_new_tokens": 30}, "rid": f"{n:032d}"}


async def ask(server: FakeSGLang, n: int = 0, timeout_s: float = 5, **more: Any) -> tuple[int, Any, Any]:
    """Status, JSON (or text) and headers."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (aiohttp.ClientSession(timeout=timeout) as session,
                session.post(server.url + "/generate", json=payload(n) | more) as answer):
        try:
            body = await answer.json(content_type=None)
        except ValueError:
            body = await answer.text()
        return answer.status, body, answer.headers


async def get(server: FakeSGLang, path: str, timeout_s: float = 5) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.get(server.url + path) as answer:
        return answer.status, await answer.text()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def asked(server: FakeSGLang, n: int = 0, timeout_s: float = 5) -> tuple[int, Any, Any]:
    return run(ask(server, n, timeout_s))


async def several(server: FakeSGLang, count: int) -> list[Any]:
    return await asyncio.gather(*(ask(server, n) for n in range(count)), return_exceptions=True)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_good_answer_names_its_request_and_is_counted():
    with FakeSGLang() as server:
        status, body, _ = asked(server, 7)
        assert (status, body["meta_info"]["id"]) == (200, payload(7)["rid"])
        assert body["meta_info"]["e2e_latency"] >= 0
        assert body["output_ids"] == server.write(payload(7))["output_ids"]
        assert server.answered == {payload(7)["rid"]: 1}


@pytest.mark.parametrize("fault", ["400", "401", "404", "429", "500", "503"])
def test_a_refusal_has_its_status(fault):
    with FakeSGLang(fault=lambda n, p: fault, retry_after=3) as server:
        status, body, headers = asked(server)
        assert (status, type(body)) == (int(fault), dict)
        assert headers.get("Retry-After") == ("3" if fault in ("429", "503") else None)
        assert not server.answered


def test_a_wrong_answer_is_wrong_in_what_it_is_named_after():
    faults = ["abort", "wrong_ids", "wrong_vocab", "wrong_rid", "wrong_count", "nan", "garbage", "empty_body", "null"]
    with FakeSGLang(fault=lambda n, p: faults[n]) as server:
        abort, ids, vocab, rid, count, nan, garbage, empty, null = (asked(server)[1] for _ in faults)
        whole = server.write(payload(0))
        assert not server.answered
    length = len(whole["output_ids"])
    assert abort["meta_info"]["finish_reason"]["type"] == "abort"
    assert ids["output_ids"] == [*whole["output_ids"], 3]
    assert min(vocab["output_ids"]) >= BEYOND_ANY_VOCABULARY
    assert [e[1] for e in vocab["meta_info"]["output_token_logprobs"]] == vocab["output_ids"]
    assert rid["meta_info"]["id"] != payload(0)["rid"]
    assert (count["meta_info"]["completion_tokens"], len(count["output_ids"])) == (length + 1, length)
    assert nan["meta_info"]["output_token_logprobs"][0][0] != nan["meta_info"]["output_token_logprobs"][0][0]
    assert (garbage, empty, null) == ("<html>not json</html>", None, None)


def test_a_misspelt_fault_is_no_good_answer():
    with FakeSGLang(fault=lambda n, p: "truncated") as server:
        assert asked(server)[0] == 500


def test_a_redirect_leads_to_itself():
    with FakeSGLang(fault=lambda n, p: "redirect") as server, pytest.raises(aiohttp.TooManyRedirects):
        asked(server)


def test_a_cut_body_a_reset_and_silence_look_as_they_do_on_a_network():
    faults = ["truncate", "reset", "hang"]
    with FakeSGLang(fault=lambda n, p: faults[n]) as server:
        with pytest.raises(aiohttp.ClientPayloadError):
            asked(server)
        with pytest.raises(aiohttp.ClientOSError):
            asked(server)
        with pytest.raises(TimeoutError):
            asked(server, timeout_s=0.1)
        until(lambda: server.in_flight == 0)  # who hangs up is forgotten


def test_a_drip_sends_its_headers_at_once_and_never_ends():
    async def read(server: FakeSGLang) -> tuple[float, int, int]:
        began = time.monotonic()
        async with aiohttp.ClientSession() as session, session.post(server.url + "/generate", json=payload(0)) as answer:
            headers_s, got = time.monotonic() - began, 0
            try:
                async with asyncio.timeout(0.5):
                    while await answer.content.readany():
                        got += 1
            except TimeoutError:
                pass
            return headers_s, got, int(answer.headers["Content-Length"])

    with FakeSGLang(fault=lambda n, p: "drip") as server:
        headers_s, got, length = run(read(server))
        assert headers_s < 0.3
        assert 3 <= got <= 11
        assert length > 300


def test_a_crash_breaks_what_is_in_flight_and_refuses_what_is_new():
    with FakeSGLang(delay_s=0.6) as server:
        threading.Timer(0.3, server.crash).start()
        broken = run(several(server, 5))
        assert all(isinstance(b, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError) for b in broken)
        assert not any(isinstance(b, aiohttp.ClientConnectorError) for b in broken)
        with pytest.raises(aiohttp.ClientConnectorError):
            asked(server)
        with socket.socket() as other, pytest.raises(OSError):  # its port is kept
            other.bind(("127.0.0.1", server.port))
        until(lambda: server.in_flight == 0)


def test_a_crashed_server_comes_back_at_the_same_port():
    with FakeSGLang(fault=lambda n, p: "crash" if n == 0 else None, crash_down_s=0.2) as server:
        url = server.url
        with pytest.raises(aiohttp.ServerDisconnectedError):
            asked(server)
        with pytest.raises(aiohttp.ClientConnectorError):
            asked(server)
        time.sleep(0.3)
        assert asked(server)[0] == 200
        server.crash(down_s=0)
        assert asked(server)[0] == 200
        assert (server.url, server.crashes) == (url, 2)


def test_a_restarted_server_says_what_it_serves_now():
    with FakeSGLang(model_path="one") as server:
        server.crash()
        server.restart(model_path="two", enable_deterministic_inference=False)
        assert '"two"' in run(get(server, "/model_info"))[1]
        server.restart("three")  # of a server that runs
        status, text = run(get(server, "/server_info"))
        assert status == 200 and '"three"' in text and '"enable_deterministic_inference": false' in text
        assert server.control == ["/model_info", "/server_info"]


def test_slots_bound_the_work_and_the_rest_waits_in_order():
    with FakeSGLang(concurrency=2, delay_s=0.1, metrics=True) as server:
        async def work() -> tuple[float, str]:
            began = time.monotonic()
            sent = asyncio.create_task(several(server, 6))
            await asyncio.sleep(0.05)
            _, metrics = await get(server, "/metrics")
            assert [answer[0] for answer in await sent] == [200] * 6
            return time.monotonic() - began, metrics

        took, metrics = run(work())
        assert 0.3 <= took < 0.6
        assert 'sglang:num_running_reqs{engine_type="unified",model_name="tiny",' in metrics
        values = [line.rpartition(" ")[2] for line in metrics.splitlines() if not line.startswith("#")]
        assert values == ["2.0", "4.0"]
        assert list(server.answered) == [r["rid"] for r in server.requests]


def test_a_full_queue_is_answered_503_at_once():
    with FakeSGLang(concurrency=1, queue_limit=2, delay_s=0.1) as server:
        answers = run(several(server, 8))
        assert sorted(answer[0] for answer in answers) == [200] * 3 + [503] * 5
        assert {answer[1]["message"] for answer in answers if answer[0] == 503} == {"The request queue is full."}


def test_a_sampling_mask_is_given_where_the_server_can_and_refused_where_it_cannot():
    def mask(params: dict[str, Any], **more: Any) -> tuple[int, Any, Any]:
        sampling = payload(1)["sampling_params"] | params
        return run(ask(server, 1, sampling_params=sampling, return_sampling_mask=True, **more))

    with FakeSGLang() as server:
        for top_k, kept in ((1, 1), (2, 2), (20, 3)):
            status, body, _ = mask({"top_k": top_k})
            masks, logprobs = read_mask(body["meta_info"])
            assert (status, {len(m) for m in masks}, logprobs is None) == (200, {kept}, False)
        assert mask({})[0] == mask({"top_k": 5000})[0] == mask({"top_k": 20}, custom_logit_processor="{}")[0] == 400


def test_without_metrics_there_are_none():
    with FakeSGLang() as server:
        assert run(get(server, "/metrics"))[0] == 404
        assert '"num_running_reqs": 0' in run(get(server, "/v1/loads"))[1]


def test_a_control_path_fails_on_order():
    with FakeSGLang(control_fault={"/model_info": "hang", "/server_info": "500"}.get) as server:
        assert run(get(server, "/health"))[0] == 200
        assert run(get(server, "/server_info"))[0] == 500
        with pytest.raises(TimeoutError):
            run(get(server, "/model_info", timeout_s=0.1))


def test_the_block_ends_at_once_whatever_is_in_flight():
    with FakeSGLang(fault=lambda n, p: ["hang", "drip"][n % 2]) as server:
        sender = threading.Thread(target=lambda: run(several(server, 6)))
        sender.start()
        until(lambda: server.in_flight == 6)
        began = time.monotonic()
    assert time.monotonic() - began < 1
    sender.join(5)
    assert not sender.is_alive()
