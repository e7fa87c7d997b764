"""What people are told while a run works: terminal, UI, log, `winnow status`."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import logging
import os
import re
import threading
import time
import types

import pytest
from rich.console import Console

from flows import artifacts, screen, status, terminal, words
from tasks.core.progress import Progress, ServerLoad, StageProgress
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

GENERATE = StageProgress("generate", "requests", 8000, 1024, 512, seconds=10.0, recent=(49.7, 8123.0),
                         counts=collections.Counter(tokens=83_000),
                         failures=collections.Counter(rejected=3, timeout=9))


def server(n: int, state: str = "up", failures: dict[str, int] | None = None, latency_s: float | None = 0.42,
           **more: object) -> ServerLoad:
    made = ServerLoad(f"http://10.0.0.{n}:30000", "generator", state, 32, 64, 1000, failures or {}, 12.5, 2040.0,
                      latency_s)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def rendered(what: screen.Screen, width: int, encoding: str = "utf-8") -> list[str]:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=raw, width=width, force_terminal=True, color_system=None, legacy_windows=False).print(what)
    raw.seek(0)
    return [line.rstrip() for line in raw.read().splitlines()]


def test_failures_are_named_in_one_order_whatever_came_first():
    assert words.failures({"rejected": 1, "timeout": 3}) == words.failures({"timeout": 3, "rejected": 1})
    assert words.failures({"rejected": 1, "zebra": 2, "timeout": 3000, "aborted": 0}) == (
        "3,000 timeout, 1 rejected, 2 zebra")
    assert words.failures({}) == ""


@pytest.mark.parametrize(("number", "said"), [(0.4, "0"), (999, "999"), (999.7, "1.0k"), (8123, "8.1k"),
                                              (123_456, "123k"), (1_234_567, "1.2M")])
def test_large_numbers_are_short(number, said):
    assert words.short(number) == said


@pytest.mark.parametrize(("seconds", "said"), [(42.9, "0:42"), (3723, "1:02:03"), (184_000, "2 d 3 h")])
def test_durations(seconds, said):
    assert words.duration(seconds) == said


def test_a_stage_says_rate_tokens_time_left_and_failures_by_kind():
    assert words.describe(GENERATE) == ("49.7/s, 8.1k tok/s, 2:20 left, 9 timeout, 3 rejected, 512 stood already")
    still = dataclasses.replace(GENERATE, recent=None, idle_s=130.0, already=0)
    assert words.describe(still) == "nothing for 2:10, 9 timeout, 3 rejected"


def test_the_shards_line():
    line = words.shard_line("generate", 3, "2,048 requests", 0, {"rejected": 3, "timeout": 9}, 41.2, 2048 / 41.2, 8123.0)
    assert line == ("generate shard 0003: 2,048 requests (12 failed: 9 timeout, 3 rejected) in 41.2 s, 49.7/s, "
                    "8.1k tok/s")
    assert words.shard_line("score", 12, "64 prompts", 32, {}, 1.0, 32.0, 0.0) == (
        "score shard 0012: 64 prompts (32 stood already) in 1.00 s, 32.0/s")


def test_bars_stand_in_columns_and_what_does_not_fit_stands_below():
    verify = StageProgress("verify", "requests", 8000)
    wide = rendered(screen.Screen([GENERATE, verify], []), 160)
    assert len(wide) == 2
    assert re.fullmatch(r". generate  ━+╸?━*  1,024/8,000  49.7/s  8.1k tok/s  2:20 left  9 timeout, 3 rejected, "
                        r"512 stood already", wide[0])
    assert wide[0].index("1,024") == wide[1].index("0/8,000")
    narrow = rendered(screen.Screen([GENERATE, verify], []), 100)
    assert narrow[0].endswith("2:20 left")
    assert narrow[1] == "  9 timeout, 3 rejected, 512 stood already"
    tiny = rendered(screen.Screen([GENERATE], []), 40)
    assert [len(line) <= 40 and line.endswith("…") for line in tiny] == [True, True]


def test_a_small_fleet_has_a_line_for_each_server():
    fleet = [server(1, failures={"timeout": 2}), server(2, "down", in_flight=0, note="connection refused"),
             server(3, latency_s=None, per_s=0.0, tokens_per_s=0.0)]
    lines = rendered(screen.Screen([], fleet), 120)[1:]
    assert lines[0].split() == ["server", "in", "flight", "answers", "tokens", "latency"]
    assert re.fullmatch(r"● 10.0.0.1:30000  up    ━+ +32/64 +12.5/s  2.0k tok/s +0.42 s  2 timeout", lines[1])
    assert re.fullmatch(r"● 10.0.0.2:30000  down  ━+ +12.5/s  2.0k tok/s +connection refused", lines[2])
    assert re.fullmatch(r"● 10.0.0.3:30000  up    ━+ +32/64", lines[3])


def test_of_a_large_fleet_the_worst_are_named_and_the_rest_summed_up():
    fleet = [server(n) for n in range(60)]
    fleet += [server(100, "down", in_flight=0, per_s=0.0), server(101, failures={"timeout": 50}),
              server(102, "unfit", in_flight=0), server(103, latency_s=9.0)]
    lines = rendered(screen.Screen([], fleet), 120)[2:]
    assert [line.split()[1].split(":")[0] for line in lines[:4]] == ["10.0.0.100", "10.0.0.102", "10.0.0.101",
                                                                     "10.0.0.103"]
    assert lines[4:] == ["  and 60 servers up, 1,920/3,840 in flight, 750.0/s, 122k tok/s"]


def test_the_fleet_in_a_line_counts_each_state():
    fleet = [server(1), server(2), server(3, "down", in_flight=0, per_s=0.0, tokens_per_s=0.0)]
    assert words.fleet(fleet) == "2 servers up, 1 down, 64/128 in flight, 25.0/s, 4.1k tok/s"
    assert words.fleet([server(1)]).startswith("1 server up, 32/64 in flight")


def test_two_roles_are_told_apart():
    lines = rendered(screen.Screen([], [server(1), server(2, role="judge")]), 120)
    assert "generator" in lines[2]
    assert "judge" in lines[3]


def test_a_terminal_without_unicode_gets_a_picture_too():
    lines = rendered(screen.Screen([GENERATE], [server(1)]), 120, encoding="ascii")
    assert "1,024/8,000" in lines[0]
    assert lines[-1].startswith("* 10.0.0.1:30000")


def test_servers_are_shown_while_they_work_and_do_not_flicker():
    now = 100.0
    servers = [server(1)]
    view = screen.View(lambda: ([GENERATE], servers), lambda: now)

    def shown() -> bool:
        return any("10.0.0.1" in line for line in rendered(view.draw(), 120))

    assert shown()
    servers = [server(1, in_flight=0)]
    now += 1
    assert shown()  # between two shards
    now += 5
    assert not shown()
    servers = [server(1, "down", in_flight=0)]
    assert shown()  # the run waits for it
    view.close()
    assert not shown()


def test_without_a_terminal_lines_name_failures_and_the_fleet(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(terminal, "notice", said.append)
    monkeypatch.setattr(terminal, "_PLAIN_EVERY_S", 0.01)
    stop = threading.Event()
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        if looks == 5:
            stop.set()
        return [GENERATE, StageProgress("verify", "requests", 8000)], [server(1), server(2, "down", in_flight=0, per_s=0.0, note="connection refused")]

    terminal._lines(look, stop)
    assert said == [
        "generate: 1,024 of 8,000 requests  49.7/s, 8.1k tok/s, 2:20 left, 9 timeout, 3 rejected, 512 stood already",
        "servers: 1 server up, 1 down, 32/64 in flight, 12.5/s, 4.1k tok/s; 10.0.0.2:30000 down (connection refused)"]


def test_only_lines_marked_as_shown_reach_the_terminal(monkeypatch):
    logger = logging.getLogger("winnow")
    before = logger.handlers, logger.level, logger.propagate
    page = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", page)
    try:
        terminal.set_up_logging(debug=False)
        log = logging.getLogger("winnow.stages")
        log.info("generate shard [red]: made", extra={"shown": True})
        log.info("verify shard 0003: made", extra={"shown": False})
        log.info("something else")
    finally:
        logger.handlers, logger.level, logger.propagate = before
    said = page.file.getvalue()  # type: ignore[attr-defined]
    assert re.fullmatch(r"\d\d:\d\d:\d\d  generate shard \[red\]: made\n", said)


# -- the log's lines, from a run's files -----------------------------------------------------------


@pytest.fixture
def made(tmp_path, tiny_model):
    """A run whose candidates stand, one of them refused."""
    refused: list[str] = []

    def refuse_one(_: int, payload: dict) -> str | None:
        if "rid" not in payload or refused:
            return None
        refused.append(payload["rid"])
        return "400"

    with FakeSGLang(fault=refuse_one) as fake:
        return build(make_config(tmp_path, tiny_model, [fake.url], labels=[]), ["generate", "verify"])


@pytest.fixture
def log_lines():
    """What is logged of the shards, whatever became of the root logger's handlers."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("winnow.stages")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def test_a_shards_line_tells_what_its_files_hold(made, log_lines):
    from flows.stages import run_shard

    stage_files = [m for m in status._standing(made, 0) if "rejected" in m.facts["statuses"]]
    assert len(stage_files) == 1
    made.store.remove(stage_files[0].path)
    with FakeSGLang() as fake:
        made.raw["servers"]["generator"][0]["url"] = fake.url
        made.progress.begin("generate", "requests", 40)
        done = run_shard.fn(made.url, "generate", 0)
        again = run_shard.fn(made.url, "generate", 0)
    assert (done.how, done.units, done.stood, done.failures) == ("made", 16, 8, {})
    assert done.tokens > 0
    first, second = log_lines
    assert re.fullmatch(r"generate shard 0000: 16 requests \(8 stood already\) in \d+\.\d+ s, [\d.,]+/s",
                        first.getMessage())
    assert second.getMessage() == "generate shard 0000: 16 requests stood already"
    assert (first.levelname, first.shown, second.shown) == ("INFO", True, False)
    assert (again.how, again.stood) == ("reused", 16)


def test_the_line_names_failures_from_the_manifests(made):
    from flows.stages import _done
    from tasks.pipeline import stage

    lines = [_done(made, stage("generate"), n, "made", 0, 2.0).line("requests") for n in range(3)]
    assert sum("(1 failed: 1 rejected) in 2.00 s, 8.0/s" in line for line in lines) == 1
    assert all(re.search(r"/s, [\d.k]+ tok/s$", line) for line in lines)


def test_many_quick_shards_do_not_flood_the_terminal():
    from flows.stages import ShardDone

    quick = ShardDone("generate", 0, "made", 16, 0, {}, 0, 0.2, True)
    assert quick.is_shown(50)
    assert not quick.is_shown(51)
    assert dataclasses.replace(quick, seconds=1.5).is_shown(4000)
    assert not dataclasses.replace(quick, stage="verify").is_shown(3)
    assert dataclasses.replace(quick, stage="quality", seconds=60.0).is_shown(3)


def test_a_shard_made_in_another_process_counts_when_it_is_whole(made):
    from flows.stages import ShardDone, _count

    made.progress.begin("generate", "requests", 40)
    _count(made, ShardDone("generate", 0, "made", 16, 4, {"timeout": 2}, 90, 2.0, False), "requests", 16)
    _count(made, ShardDone("generate", 1, "reused", 16, 16, {"timeout": 1}, 90, 2.0, False), "requests", 16)
    _count(made, ShardDone("generate", 2, "made", 8, 0, {}, 90, 2.0, True), "requests", 8)  # a thread's: counted already
    (stage,) = made.progress.snapshot()
    assert (stage.done, stage.already, stage.failures) == (32, 20, {"timeout": 2})


# -- status -----------------------------------------------------------------------------------------


def test_status_counts_the_journals_whole_lines(made):
    for manifest in status._standing(made, 1):
        made.store.forget(manifest.path)
    path = status._journal(made, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"a": "' + b"x" * (1 << 20) + b'"}\n' + b"{}\n" * 4 + b'{"torn": ')
    counts = status.candidate_counts(made)
    assert counts.journalled == 5
    assert next(iter(counts.statuses)) == "ok"
    assert sum(counts.statuses.values()) == 24
    assert status.answered(made, 1) == 5
    assert status.answered(made, 0) == 16


def test_status_tells_how_fast_a_run_goes_on_only_while_it_does(made):
    path = status._journal(made, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}\n" * 1000)
    assert status.answers_per_s(made, over_s=0.05) is None
    timer = threading.Timer(0.1, lambda: path.open("ab").write(b"{}\n" * 30))
    timer.start()
    began = time.monotonic()
    assert 0 < (status.answers_per_s(made, over_s=0.3) or 0) <= 30 / 0.3
    assert time.monotonic() - began < 5
    timer.join()


def test_status_knows_whether_somebody_works_on_the_run(made, capsys):
    from flows import cli

    def said() -> str:
        with pytest.raises(SystemExit):
            cli.main(["status", made.url])
        return capsys.readouterr().out

    with made.store.lock():
        assert f"(process {os.getpid()} works on it)" in said()
    made.store.lock().path.write_text("process 999999999")
    assert "(not finished: run it again to go on)" in said()


# -- the UI -----------------------------------------------------------------------------------------


class Ui:
    """Stands for Prefect's API: what was created and what was updated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[tuple[str, str]] = []
        self.updated: list[tuple[str, str, str]] = []
        monkeypatch.setattr(artifacts, "create_progress_artifact", lambda **k: self.create("progress", k["key"]))
        monkeypatch.setattr(artifacts, "create_table_artifact", lambda **k: self.create("table", k["key"]))
        monkeypatch.setattr(artifacts, "update_progress_artifact", lambda artifact_id, progress, description:
                            self.updated.append((artifact_id, f"{progress:.1f}", description)))
        monkeypatch.setattr(artifacts, "get_client", lambda sync_client: self)

    def create(self, kind: str, key: str) -> str:
        self.created.append((kind, key))
        return kind

    def update_artifact(self, artifact_id, artifact) -> None:
        self.updated.append((artifact_id, artifact.data, artifact.description))


def shown_in_ui(servers: list[ServerLoad], clock) -> tuple[artifacts.Shown, Progress]:
    progress = Progress()
    progress.begin("generate", "requests", 8)
    progress.watch("generator", lambda: servers)
    ctx = types.SimpleNamespace(progress=progress, config=types.SimpleNamespace(run="My.Run"))
    return artifacts.Shown(ctx, ["generate"], clock), progress  # type: ignore[arg-type]


def test_the_ui_has_one_bar_and_one_table_that_are_kept_up_to_date(monkeypatch):
    ui, now = Ui(monkeypatch), 0.0
    shown, progress = shown_in_ui([server(1, failures={"timeout": 2})], lambda: now)
    for _ in range(31):
        shown.update()
        now += 1
    assert ui.created == [("progress", "my-run-generate"), ("table", "my-run-servers")]
    assert [u[0] for u in ui.updated].count("progress") == 6
    assert [u[0] for u in ui.updated].count("table") == 3
    progress.advance("generate", 4, failure="timeout", tokens=9)
    shown.update(last=True)
    (_, share, text), (_, table, fleet) = ui.updated[-2:]
    assert share == "50.0"
    assert re.match(r"- \*\*generate\*\* 4 of 8 requests \([\d.,]+/s, [\d.k]+ tok/s, \d:\d\d left, 4 timeout\)", text)
    assert json.loads(table)[0] | {"server": "http://10.0.0.1:30000", "in flight": "32/64",
                                   "failed attempts": "2 timeout", "answers": "12.5/s"} == json.loads(table)[0]
    assert fleet == "1 server up, 32/64 in flight, 12.5/s, 2.0k tok/s"


def test_a_flow_that_asks_no_server_shows_none(monkeypatch):
    ui = Ui(monkeypatch)
    shown, _ = shown_in_ui([server(1, in_flight=0)], lambda: 0.0)
    shown.update(last=True)
    assert ui.created == [("progress", "my-run-generate")]


def test_a_ui_that_is_gone_stops_nothing(monkeypatch):
    ui = Ui(monkeypatch)

    def gone(**_: object) -> str:
        raise ConnectionError("no")

    monkeypatch.setattr(artifacts, "create_progress_artifact", gone)
    shown, _ = shown_in_ui([server(1)], lambda: 0.0)
    shown.update(last=True)
    assert ui.created == [("table", "my-run-servers")]
