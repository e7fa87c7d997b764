from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import orjson
import pytest

from tasks.serving.client import Reply, SGLangClient
from tasks.serving.failures import TAXONOMY, RequestFailed
from tests.fake_sglang import FakeSGLang
from tests.serving.asking import VOCAB, dead_url, payload, right_answer

GOOD: dict[str, Any] = {"text": "ab", "output_ids": [97, 98], "meta_info": {
    "id": "r", "finish_reason": {"type": "length", "length": 2}, "completion_tokens": 2,
    "output_token_logprobs": [[-0.5, 97, None], [-1.5, 98, None]]}}


def http(body: bytes | str | Any, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    size = len(raw) if length is None else length
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {size}", *headers, "", ""]).encode() + raw


@contextlib.asynccontextmanager
async def answering(*answers: bytes, then_silent: bool = False) -> AsyncIterator[str]:
    """The address of a server that sends these bytes, one after each request, and closes."""
    left = list(answers)
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        size = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
        await reader.readexactly(size)
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        if then_silent:
            await over.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        over.set()
        server.close()


def with_client(url: str, work: Callable[[SGLangClient], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        client = SGLangClient(url)
        try:
            return await work(client)
        finally:
            await client.close()
    return asyncio.run(run())


def generate(*answers: bytes, then_silent: bool = False, timeout_s: float = 0.5, **more: Any) -> Reply:
    async def run() -> Reply:
        async with answering(*answers, then_silent=then_silent) as url:
            client = SGLangClient(url)
            try:
                return await client.generate(b"{}", timeout_s, **more)
            finally:
                await client.close()
    return asyncio.run(run())


def failure(*answers: bytes, **more: Any) -> RequestFailed:
    with pytest.raises(RequestFailed) as caught:
        generate(*answers, **more)
    return caught.value


def changed(**meta: Any) -> dict[str, Any]:
    return GOOD | {"meta_info": GOOD["meta_info"] | meta}


# --- answers ---

def test_a_whole_answer_is_read():
    reply = generate(http(GOOD), rid="r", vocab=VOCAB)
    assert (reply.output_ids, reply.logprobs, reply.finish_reason) == ([97, 98], [-0.5, -1.5], "length")
    assert reply.latency_s > 0


@pytest.mark.parametrize("body", [
    http(gzip.compress(json.dumps(GOOD).encode()), "200 OK", "Content-Encoding: gzip"),
    http(json.dumps(GOOD), "200 OK", "Content-Type: text/plain"),
    http(changed(finish_reason="length", output_token_logprobs=None, id=None, completion_tokens=None)),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        len(json.dumps(GOOD)), json.dumps(GOOD).encode()),
])
def test_what_http_and_other_versions_allow_is_no_failure(body):
    assert generate(body, rid="r").output_ids == [97, 98]


def test_an_answer_without_tokens_is_one():
    empty = {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "stop", "matched": 2}}}
    assert generate(http(empty)).output_ids == []


@pytest.mark.parametrize("body", [
    "", "null", "[]", "[1]", "3", '"text"', "<html>not json</html>", json.dumps(GOOD)[:-9], "\xff\xfe", "{}", [GOOD],
    {"text": "ab"}, {"error": {"message": "said with 200"}}, GOOD | {"meta_info": None}, GOOD | {"meta_info": []},
    changed(finish_reason=None), changed(finish_reason={}), changed(finish_reason={"type": None}),
    changed(finish_reason={"type": 5}), changed(finish_reason=7),
    GOOD | {"output_ids": None}, GOOD | {"output_ids": "ab"}, GOOD | {"output_ids": [97, "98"]},
    GOOD | {"output_ids": [97, 98.0]}, GOOD | {"output_ids": [97, True]}, GOOD | {"output_ids": [97, -98]},
    GOOD | {"output_ids": [97, None]}, GOOD | {"output_ids": [[97, 98]]}, GOOD | {"output_ids": [97]},
    GOOD | {"output_ids": [98, 97]}, changed(completion_tokens=3),
    changed(output_token_logprobs=[[-0.5, 97, None]]), changed(output_token_logprobs=[[None, 97], [-1.5, 98]]),
    changed(output_token_logprobs=[[-0.5], [-1.5]]), changed(output_token_logprobs=5),
    changed(output_token_logprobs=[["x", 97, None], [-1.5, 98, None]]),
    json.dumps(changed(output_token_logprobs=[[float("nan"), 97], [-1.5, 98]])),
    json.dumps(changed(output_token_logprobs=[[float("-inf"), 97], [-1.5, 98]])),
    changed(output_token_logprobs=[[-1e309, 97], [-1.5, 98]]),
    changed(output_token_logprobs=None) | {"output_ids": [97, VOCAB]},
    changed(output_token_logprobs=None) | {"output_ids": [97, 2**70]},
])
def test_what_is_no_answer_of_sglang_is_a_bad_response(body):
    assert failure(http(body), rid="r", vocab=VOCAB).kind == "bad_response"


@pytest.mark.parametrize("reason", [{"type": "abort", "message": "no memory"}, {"type": "abort"}, "abort",
                                    {"type": "abort", "message": None, "status_code": 503}])
def test_an_abort_with_status_200_is_one_whatever_else_it_has(reason):
    assert failure(http(changed(finish_reason=reason) | {"output_ids": None})).kind == "aborted"


@pytest.mark.parametrize("answer", [
    http(GOOD, length=5000), http(GOOD, "200 OK", "Content-Encoding: gzip"), b"not http at all\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 two OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
])
def test_an_answer_cut_short_and_what_is_no_http_are_bad_responses(answer):
    assert failure(answer).kind == "bad_response"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200"])
def test_a_connection_that_ends_before_the_headers_do_broke(answer):
    assert failure(answer).kind in ("disconnected", "bad_response")
    assert failure(b"").kind == "disconnected"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", http(GOOD, length=5000)])
def test_silence_before_in_or_after_the_headers_is_a_timeout(answer):
    began = time.monotonic()
    assert failure(answer, then_silent=True, timeout_s=0.2).kind == "timeout"
    assert time.monotonic() - began < 3


# --- statuses ---

@pytest.mark.parametrize(("status", "kind"), [
    ("400 Bad Request", "rejected"), ("413 Too Large", "rejected"), ("422 Unprocessable", "rejected"),
    ("401 Unauthorized", "server_error"), ("403 Forbidden", "server_error"), ("404 Not Found", "server_error"),
    ("405 Not Allowed", "server_error"), ("408 Timeout", "timeout"), ("429 Too Many", "overloaded"),
    ("503 Unavailable", "overloaded"), ("500 Error", "server_error"), ("502 Bad Gateway", "server_error"),
    ("504 Gateway Timeout", "server_error"), ("302 Found", "server_error"), ("307 Moved", "server_error"),
    ("204 No Content", "server_error"), ("202 Accepted", "server_error"),
])
def test_each_status_has_its_kind(status, kind):
    found = failure(http("" if status.startswith("204") else GOOD, status, "Location: /generate"))
    assert found.kind == kind
    assert found.rule is TAXONOMY[kind]
    assert status.split()[0] in str(found)


@pytest.mark.parametrize(("said", "seconds"), [
    ("3", 3.0), ("0", 0.0), ("0.5", 0.5), (None, None), ("", None), ("soon", None), ("-1", None), ("nan", None),
    ("inf", None), ("Wed, 21 Oct 2015 07:28:00 GMT", None),
])
def test_retry_after_is_seconds_or_nothing(said, seconds):
    headers = [] if said is None else [f"Retry-After: {said}"]
    assert failure(http("", "503 Unavailable", *headers)).retry_after_s == seconds


@pytest.mark.parametrize(("body", "said"), [
    ({"error": {"message": "too long"}}, "too long"), ({"error": "too long"}, "too long"),
    ({"object": "error", "message": "too long", "code": 400}, "too long"), ({"detail": "too long"}, "too long"),
    ("too long", "too long"), ("\xff too long", "too long"), ("", "400"), ("null", "400"), ([1], "400"),
])
def test_the_servers_own_words_are_in_the_failure_whatever_their_shape(body, said):
    assert said in str(failure(http(body, "400 Bad Request")))
    assert len(str(failure(http("x" * 10_000, "400 Bad Request")))) < 400


def test_nobody_there_is_unreachable():
    async def work(client: SGLangClient) -> list[str]:
        kinds = []
        for asks in (lambda: client.generate(b"{}", 2), client.facts, client.load):
            with pytest.raises(RequestFailed) as caught:
                await asks()
            kinds.append(caught.value.kind)
        return kinds

    assert with_client(dead_url(), work) == ["unreachable"] * 3


# --- what a server says of itself ---

def facts(model: Any, info: Any) -> Any:
    """Both documents from one address, by path."""
    async def run() -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(http(model if b"/model_info" in head else info, "200 OK", "Connection: close"))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = SGLangClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return await client.facts()
        finally:
            await client.close()
            server.close()
    return asyncio.run(run())


@pytest.mark.parametrize(("info", "honours"), [
    ({}, False), ({"enable_deterministic_inference": False, "sampling_backend": "pytorch"}, False),
    ({"enable_deterministic_inference": True, "sampling_backend": "pytorch"}, True),
    ({"enable_deterministic_inference": True}, True), ({"enable_deterministic_inference": None}, False),
    ({"enable_deterministic_inference": True, "sampling_backend": "ascend"}, True),
    ({"enable_deterministic_inference": True, "sampling_backend": "flashinfer"}, False),
    ({"enable_deterministic_inference": True, "sampling_backend": "pytorch", "speculative_algorithm": "EAGLE"}, False),
    ({"enable_deterministic_inference": True, "sampling_backend": "pytorch", "speculative_algorithm": None}, True),
    ({"enable_deterministic_inference": True, "sampling_backend": "of tomorrow"}, False),
])
def test_seeds_are_honoured_only_where_the_engine_draws_by_them(info, honours):
    assert facts({"model_path": "m"}, info).honours_seeds is honours


@pytest.mark.parametrize(("info", "most"), [
    ({}, None), ({"max_running_requests": 7}, 7), ({"max_running_requests": 7, "dp_size": 3}, 21),
    ({"max_running_requests": 7, "internal_states": [{"effective_max_running_requests_per_dp": 5}], "dp_size": 2}, 10),
    ({"max_running_requests": None, "internal_states": [{}]}, None), ({"max_running_requests": 0}, None),
    ({"max_running_requests": "many"}, None), ({"max_running_requests": 4, "internal_states": None}, 4),
    ({"max_running_requests": 4, "internal_states": ["odd"]}, 4),
])
def test_what_a_server_runs_at_once_is_read_where_it_says_so(info, most):
    assert facts({"model_path": "m"}, info).max_running == most


@pytest.mark.parametrize(("model", "info"), [([], {}), ({}, []), ("null", {}), ({}, "null"), ("<html>", {}), ({}, "")])
def test_what_answers_and_is_no_sglang_server_is_refused(model, info):
    with pytest.raises(RequestFailed) as caught:
        facts(model, info)
    assert caught.value.kind == "server_error"


def test_a_server_that_names_no_model_has_none():
    assert facts({"is_generation": True}, {}).model_path is None


METRICS = """# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",dp_rank="0"} 3.0
sglang:num_running_reqs{model_name="m",dp_rank="1"} 4.0
sglang:num_running_reqs_total 99
sglang:num_queue_reqs{model_name="m n"} 2.0
"""


@pytest.mark.parametrize(("text", "load"), [
    (METRICS, (7.0, 2.0)), ("", None), ("# nothing", None), (METRICS.replace("2.0", "two"), None),
    (METRICS.replace("num_queue_reqs", "other"), None), ("<html>", None),
])
def test_the_load_is_the_sum_over_its_ranks_or_nothing(text, load):
    async def run() -> Any:
        async with answering(http(text)) as url:
            client = SGLangClient(url)
            try:
                return await client.load()
            finally:
                await client.close()

    assert asyncio.run(run()) == load


def test_the_load_of_the_fake_server_is_what_it_has():
    with FakeSGLang(metrics=True, delay_s=0.3, concurrency=2) as server:
        async def work(client: SGLangClient) -> Any:
            running = [asyncio.create_task(client.generate(orjson.dumps(payload(n)), 5)) for n in range(5)]
            await asyncio.sleep(0.15)
            load = await client.load()
            replies = await asyncio.gather(*running)
            assert [r.output_ids for r in replies] == [right_answer(n) for n in range(5)]
            return load

        assert with_client(server.url, work) == (2.0, 3.0)


def kinds_of(ids: list[Any]) -> list[str]:
    """What becomes of the answers to requests "r" of a server whose answers bear these ids."""
    async def run() -> list[str]:
        async with answering(*(http(changed(id=i), "200 OK", "Connection: close") for i in ids)) as url:
            client, out = SGLangClient(url), []
            for _ in ids:
                try:
                    await client.generate(b"{}", 5, rid="r")
                    out.append("ok")
                except RequestFailed as error:
                    out.append(error.kind)
            await client.close()
            return out

    return asyncio.run(run())


# --- /classify ---

def item(score: Any, rid: Any = None, **meta: Any) -> dict[str, Any]:
    return {"embedding": score, "meta_info": {"id": rid, "finish_reason": {"type": "length", "length": 0}, **meta}}


def classified(*bodies: Any, rids: tuple[str, ...] = ("a", "b")) -> list[Any]:
    """The scores of each answer, or the kind of its failure."""
    async def run() -> list[Any]:
        async with answering(*(http(b, "200 OK", "Connection: close") for b in bodies)) as url:
            client, out = SGLangClient(url), []
            for _ in bodies:
                try:
                    out.append((await client.classify(b"{}", 5, rids=rids)).scores)
                except RequestFailed as error:
                    out.append(error.kind)
            await client.close()
            return out

    return asyncio.run(run())


def test_what_classify_says_of_each_text_is_read_in_order_as_it_is():
    assert classified([item([1.5], "a"), item([2, 3], "b")]) == [[[1.5], [2, 3]]]
    assert classified([item([1.5]), item(None)]) == [[[1.5], None]]  # what is no score is its reader's matter


@pytest.mark.parametrize("body", [
    "", "null", "{}", item([1.5], "a"), [], [item([1.5], "a")], [item([1.5], "a")] * 3, [item([1.5], "a"), None],
    [item([1.5], "a"), {"embedding": [1.0]}], [item([1.5], "a"), {"meta_info": {"id": "b", "finish_reason": None}}],
    [item([1.5], "b"), item([2.5], "a")], [item([1.5], "a"), item([2.5], "a")], [item([1.5], "a"), item([2.5], ["b"])],
    [item([1.5], "a"), item([2.5], "c")], json.dumps([item([float("nan")], "a"), item([1.0], "b")]),
])
def test_what_is_no_answer_to_these_texts_is_a_bad_response(body):
    assert classified(body) == ["bad_response"]


def test_a_text_that_the_server_gave_up_is_an_abort_of_its_list():
    assert classified([item([1.0], "a"), item(None, "b", finish_reason={"type": "abort", "message": "m"})]) == ["aborted"]


def test_texts_of_another_request_are_told_by_their_ids_where_the_server_bears_them():
    good, foreign = [item([1.0], "a"), item([2.0], "b")], [item([1.0], "x"), item([2.0], "y")]
    assert classified(foreign, good, foreign) == [[[1.0], [2.0]], [[1.0], [2.0]], "bad_response"]


def test_an_answer_to_another_request_is_told_by_its_id_where_the_server_bears_them():
    assert kinds_of(["r", "s", "r", 5]) == ["ok", "bad_response", "ok", "bad_response"]
    assert kinds_of(["a", "b", None]) == ["ok", "ok", "ok"]  # it, or a proxy, numbers requests its own way
