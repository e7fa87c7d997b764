"""Servers that join and leave a run, from the command line, while it goes on and between."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.join import servers
from flows.prepare import check, open_run
from flows.servers import running
from tasks import context as contexts
from tasks.context import Context
from tasks.core.config import RunConfig
from tasks.serving import membership
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

DEAD = "http://127.0.0.1:9"


@pytest.fixture
def begun(tmp_path, tiny_model) -> Callable[..., Context]:
    """A run that was begun: its `run.json` has its servers' facts."""
    def make(server: FakeSGLang, **changes: Any) -> Context:
        raw = make_config(tmp_path, tiny_model, [server.url], **changes)
        ctx = open_run(check(RunConfig.model_validate(raw), {}))
        with running(ctx, lambda _: None):
            return Context(ctx.url)
    return make


def who(ctx: Context, role: str = "generator") -> dict[str, int | None]:
    return dict(Context(ctx.url).servers(role))


def wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_idle(server: FakeSGLang) -> bool:
    """Whether nothing reaches it: between two requests nothing is in flight either, but not for so long."""
    before = len(server.generations)
    time.sleep(0.5)
    return server.in_flight == 0 and len(server.generations) == before


def test_a_server_that_joins_in_the_middle_gets_work_and_one_that_leaves_gets_no_more(
        winnow, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(contexts, "_FOLLOW_EVERY_S", 0.1)
    url = str(tmp_path / "runs/test")
    with FakeSGLang(delay_s=0.05) as first, FakeSGLang(delay_s=0.05) as second, ThreadPoolExecutor(1) as pool:
        raw = make_config(tmp_path, tiny_model, [first.url], labels=[])
        raw["servers"]["generator"][0]["max_in_flight"] = 1
        done = pool.submit(build, raw, ["generate", "verify"])
        wait_for(lambda: len(first.generations) >= 3)
        code, said = winnow("servers", "join", url, second.url + "/", "--max-in-flight", "1")
        assert code == 0, said
        assert f"generator {second.url} 1 never answered yet joined" in said
        assert f"generator {first.url} 1 tiny" in said
        wait_for(lambda: len(second.generations) >= 3)
        code, said = winnow("servers", "leave", url, first.url)
        assert code == 0, said
        assert f"generator {first.url}" not in said
        wait_for(lambda: is_idle(first))
        at_leave = len(first.generations)
        ctx = done.result(60)
        assert len(first.generations) == at_leave < 30
        assert len(second.generations) == 40 - at_leave
    rows = [r for n in range(ctx.shards) for r in ctx.store.read(f"verified/shard-{n:04d}.parquet").to_pylist()]
    assert [r["status"] for r in rows] == ["ok"] * 40
    assert {r["server"] for r in rows} == {first.url, second.url}
    assert sum(r["attempts"] for r in rows) == 40
    recorded = {s["url"]: s for s in Context(url).raw["servers"]["generator"]}
    assert recorded[second.url]["model_path"] == "tiny"  # what it is stands in run.json at the end


@pytest.mark.parametrize(("other", "reason"), [
    ({"model_path": "another/model"}, "it serves another/model"), ({"custom_processors": False}, "custom logit processors"),
    ({"control_fault": lambda path: "500"}, "answered 500"),
])
def test_a_server_that_the_run_cannot_use_is_refused_with_the_reason(winnow, begun, other, reason):
    with FakeSGLang() as first, FakeSGLang(**other) as second:
        ctx = begun(first)
        code, said = winnow("servers", "join", ctx.url, second.url)
        assert code == 2
        assert reason in said and second.url in said
        assert who(ctx) == {first.url: 8}


def test_one_that_does_not_answer_yet_is_let_in_and_said_so(winnow, begun):
    with FakeSGLang() as first:
        ctx = begun(first)
    code, said = winnow("servers", "join", "test", DEAD, "--runs-dir", str(Path(ctx.url).parent))
    assert code == 0
    assert "does not answer now" in said and f"winnow servers leave {ctx.url} {DEAD}" in said
    assert who(ctx) == {first.url: 8, DEAD: None}
    assert [s["joined"] for s in servers(Context(ctx.url))] == [False, True] * 2


@pytest.mark.parametrize(("arguments", "reason"), [
    (["join", "{run}", "127.0.0.1:3"], "not a server's address"), (["leave", "{run}", "{url}x"], "did you mean '{url}'?"),
    (["leave", "{run}", "{url}", "--role", "judge"], "is no judge"), (["join", "nothing", DEAD], "no such run"),
    (["join", "{run}", DEAD, "--role", "judgge"], "judgge"), (["join", "{run}", DEAD, "--max-in-flight", "0"], "--max-in-flight"),
])
def test_a_wrong_argument_is_exit_code_2_and_changes_nothing(winnow, begun, arguments, reason):
    with FakeSGLang() as first, FakeSGLang() as judge:
        ctx = begun(first, servers={"generator": [{"url": first.url, "max_in_flight": 8}], "judge": [{"url": judge.url}]})
        code, said = winnow("servers", *(a.format(run=ctx.url, url=first.url) for a in arguments))
        assert code == 2
        assert reason.format(url=first.url) in said
        assert membership.read(ctx.store) == {}


def test_whoever_joins_judges_too_unless_the_config_has_judges(winnow, begun):
    with FakeSGLang() as first, FakeSGLang() as second:
        ctx = begun(first)
        assert winnow("servers", "join", ctx.url, second.url)[0] == 0
        assert who(ctx) == who(ctx, "judge") == {first.url: 8, second.url: None}
        assert winnow("servers", "leave", ctx.url, second.url, "--role", "judge")[0] == 0
        assert who(ctx) == {first.url: 8, second.url: None} and who(ctx, "judge") == {first.url: 8}


def test_a_generator_stays_a_generator_where_the_config_has_judges(winnow, begun):
    with FakeSGLang() as first, FakeSGLang() as judge, FakeSGLang() as second:
        ctx = begun(first, servers={"generator": [{"url": first.url}], "judge": [{"url": judge.url}]})
        winnow("servers", "join", ctx.url, second.url)
        assert who(ctx) == {first.url: None, second.url: None} and who(ctx, "judge") == {judge.url: None}


def test_one_that_left_comes_back_with_the_limit_it_had(winnow, begun):
    with FakeSGLang() as first:
        ctx = begun(first)
        code, said = winnow("servers", "leave", ctx.url, first.url)
        assert code == 0 and "no generator is left" in said
        assert who(ctx) == {}
        assert winnow("servers", "join", ctx.url, first.url)[0] == 0
        assert who(ctx) == {first.url: 8}
        code, said = winnow("servers", "join", ctx.url, first.url)
        assert code == 0 and "already" in said
        assert winnow("servers", "join", ctx.url, first.url, "--max-in-flight", "3")[0] == 0
        assert who(ctx) == {first.url: 3}


def test_a_resumed_run_knows_who_joined(winnow, tmp_path, tiny_model):
    with FakeSGLang() as first, FakeSGLang() as second:
        raw = make_config(tmp_path, tiny_model, [first.url], labels=[])
        ctx = open_run(check(RunConfig.model_validate(raw), {}))
        assert winnow("servers", "join", ctx.url, second.url)[0] == 0
        build(raw, ["generate"])
        assert len(first.generations) + len(second.generations) == 40
        assert second.generations


def test_a_run_goes_on_with_who_joined_when_the_servers_of_its_config_are_gone(winnow, tmp_path, tiny_model):
    with FakeSGLang() as first, FakeSGLang() as second:
        raw = make_config(tmp_path, tiny_model, [first.url], labels=[])
        ctx = open_run(check(RunConfig.model_validate(raw), {}))
        first.crash()
        assert winnow("servers", "join", ctx.url, second.url)[0] == 0
        assert winnow("servers", "leave", ctx.url, first.url)[0] == 2  # it never was in a run that has not begun
        build(raw, ["generate"])
        assert (len(first.generations), len(second.generations)) == (0, 40)
