from __future__ import annotations

import threading

import pytest

from tasks import context as contexts
from tasks.core.errors import InterruptedRun
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config


def test_shards_that_ask_at_once_share_one_loop_and_one_pool(tmp_path, tiny_model):
    with FakeSGLang() as server:
        url = build(make_config(tmp_path, tiny_model, [server.url]), ["generate"]).url
    for _ in range(20):
        contexts.release(url)
        ctx = contexts.context(url)
        barrier, found = threading.Barrier(8), set()

        def ask(ctx=ctx, barrier=barrier, found=found) -> None:
            barrier.wait()
            found.add((id(ctx.loop), id(ctx.pool("generator"))))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 1


def test_after_an_interrupt_no_shard_begins(tmp_path, tiny_model, monkeypatch):
    with FakeSGLang() as server:
        url = build(make_config(tmp_path, tiny_model, [server.url]), ["generate"]).url
    monkeypatch.setattr(contexts, "_interrupted", threading.Event())
    loop = contexts.context(url).loop
    contexts.interrupt(url)
    with pytest.raises(InterruptedRun):
        contexts.context(url)

    async def nothing() -> None: ...

    with pytest.raises(InterruptedRun):
        loop.run(nothing)


def test_an_interrupt_cancels_what_is_in_flight(tmp_path, tiny_model, monkeypatch):
    with FakeSGLang(fault=lambda n, p: "hang") as server:
        monkeypatch.setattr(contexts, "_interrupted", threading.Event())
        raw = make_config(tmp_path, tiny_model, [server.url], limits={"request_timeout_s": 100})
        stop = threading.Timer(1.0, lambda: contexts.interrupt(str(tmp_path / "runs/test")))
        stop.start()
        with pytest.raises(InterruptedRun):
            build(raw, ["generate"])
