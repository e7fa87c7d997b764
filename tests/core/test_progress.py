from __future__ import annotations

import time

from tasks.core.progress import Progress


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
