from __future__ import annotations

import sys
import threading
import time

import pytest

from tasks.core.progress import Progress, ServerLoad


def test_what_stood_already_counts_as_done_but_not_as_rate():
    progress = Progress()
    progress.begin("generate", "requests", 10)
    progress.advance("generate", 6, already=True)
    progress.advance("generate", 2, failed=1, tokens=30)
    (stage,) = progress.snapshot()
    assert (stage.done, stage.already, stage.counts["failed"], stage.counts["tokens"]) == (8, 6, 1, 30)
    assert 0 < stage.rate <= 2 / stage.seconds * 1.5
    assert stage.seconds_left is not None


def test_before_the_first_unit_no_time_is_promised():
    progress = Progress()
    progress.begin("judge", "calls", 4)
    assert progress.snapshot()[0].seconds_left is None


def test_a_finished_stage_keeps_its_rate():
    progress = Progress()
    progress.begin("judge", "calls", 1)
    progress.advance("judge")
    before = progress.snapshot()[0].seconds
    time.sleep(0.02)
    assert progress.snapshot()[0].seconds == before


def test_a_stage_that_nobody_announced_is_not_shown():
    progress = Progress()
    progress.advance("judge")
    assert progress.snapshot() == []


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def steadily(progress: Progress, clock: Clock, seconds: int, per_s: int, tokens: int = 0) -> None:
    for _ in range(seconds * per_s):
        clock.now += 1 / per_s
        progress.advance("generate", 1, tokens=tokens)


def test_no_count_is_lost_between_threads():
    progress = Progress()
    progress.begin("generate", "requests", 80_000)

    def work(n: int) -> None:
        for i in range(10_000):
            progress.advance("generate", 1, failure="timeout" if i % 10 == n else None, tokens=3)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    (stage,) = progress.snapshot()
    assert (stage.done, stage.counts["tokens"], stage.failures) == (80_000, 240_000, {"timeout": 8_000})


def test_a_snapshot_does_not_change_afterwards():
    progress = Progress()
    progress.begin("generate", "requests", 9)
    progress.advance("generate", failure="timeout", tokens=5)
    (before,) = progress.snapshot()
    progress.advance("generate", failure="rejected", tokens=5)
    assert (before.done, before.counts, before.failures) == (1, {"tokens": 5}, {"timeout": 1})


def test_the_rate_is_that_of_late():
    clock = Clock()
    progress = Progress(clock)
    progress.begin("generate", "requests", 10_000)
    steadily(progress, clock, 100, per_s=10, tokens=7)
    (slow,) = progress.snapshot()
    assert slow.rate == pytest.approx(10, rel=0.05)
    steadily(progress, clock, 40, per_s=50, tokens=3)
    (fast,) = progress.snapshot()
    assert fast.rate == pytest.approx(50, rel=0.05)
    assert fast.tokens_per_s == pytest.approx(150, rel=0.05)
    assert fast.seconds_left == pytest.approx((10_000 - 3000) / 50, rel=0.05)


def test_a_finished_stage_has_its_mean_rate():
    clock = Clock()
    progress = Progress(clock)
    progress.begin("generate", "requests", 3000)
    steadily(progress, clock, 100, per_s=10, tokens=7)
    steadily(progress, clock, 40, per_s=50, tokens=7)
    for later in (0, 500):
        clock.now += later
        (stage,) = progress.snapshot()
        assert stage.rate == pytest.approx(3000 / 140)
        assert stage.tokens_per_s == pytest.approx(7 * 3000 / 140)


def test_a_stage_that_moves_in_leaps_has_the_mean_of_all_its_leaps():
    clock = Clock()
    progress = Progress(clock)
    progress.begin("generate", "prompts", 6400)
    for _ in range(10):
        clock.now += 20
        progress.advance("generate", 64)
    (stage,) = progress.snapshot()
    assert stage.rate == pytest.approx(64 / 20)
    clock.now += 60
    assert progress.snapshot()[0].idle_s is None


def test_a_pause_is_said_and_does_not_spoil_the_rate():
    clock = Clock()
    progress = Progress(clock)
    progress.begin("generate", "requests", 10_000)
    steadily(progress, clock, 60, per_s=20)
    clock.now += 600
    (paused,) = progress.snapshot()
    assert paused.idle_s == pytest.approx(600)
    assert paused.seconds_left is None
    assert paused.seconds == pytest.approx(60)
    for _ in range(64):  # what waited comes at once
        progress.advance("generate")
    for _ in range(12):
        steadily(progress, clock, 1, per_s=20)
        (stage,) = progress.snapshot()
        assert stage.idle_s is None
        assert 15 < stage.rate < 40
        assert 200 < stage.seconds_left < 700
    assert stage.seconds == pytest.approx(72)


def test_looking_for_what_stands_is_no_work():
    clock = Clock()
    progress = Progress(clock)
    progress.begin("generate", "requests", 1000)
    clock.now += 300
    progress.advance("generate", 500, already=True)
    steadily(progress, clock, 4, per_s=10)
    assert progress.snapshot()[0].rate == pytest.approx(10)


def test_servers_of_all_roles_are_listed_and_a_source_that_fails_hurts_nobody():
    def load(role: str) -> list[ServerLoad]:
        return [ServerLoad("http://a", role, "up", 1, 8, 5, {}, 1.0, 2.0, None)]

    def broken() -> list[ServerLoad]:
        raise RuntimeError("the loop has ended")

    progress = Progress()
    assert progress.servers() == []
    progress.watch("generator", broken)
    progress.watch("judge", lambda: load("judge"))
    assert [s.role for s in progress.servers()] == ["judge"]
    progress.watch("generator", lambda: load("generator"))
    assert [s.role for s in progress.servers()] == ["generator", "judge"]
