from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.serving.limit import AdaptiveLimit

Serve = Callable[[int, float], tuple[str, float]]
"""(requests in flight, this one included, now) -> (ok, refused or late; seconds until the client knows)"""


@dataclass
class Simulated:
    """A server that always has more to do than the limit lets through, on a clock of its own."""

    serve: Serve
    ceiling: int = 1024
    start: int = 32
    timeout_s: float = 300.0
    poll: Callable[[int], tuple[float, float]] | None = None
    now: float = 0.0
    counts: dict[str, int] = field(default_factory=lambda: {"ok": 0, "refused": 0, "late": 0})
    values: list[tuple[float, int]] = field(default_factory=list)

    def run(self, until: float) -> Simulated:
        self.limit = limit = AdaptiveLimit(self.ceiling, self.start, timeout_s=self.timeout_s, clock=lambda: self.now)
        flying, sent, events, polled = 0, 0, [], 0.0
        while self.now < until:
            while flying < limit.value:
                flying, sent = flying + 1, sent + 1
                kind, takes = self.serve(flying, self.now)
                heapq.heappush(events, (self.now + takes, sent, kind, flying, takes))
            self.now, _, kind, at, took = heapq.heappop(events)
            flying -= 1
            self.counts[kind] += 1
            if kind == "ok":
                limit.answered(took, 50, full=True)
            elif kind == "refused":
                limit.turned_away(at)
            else:
                limit.timed_out()
            if self.poll and self.now >= polled + 2:
                polled = self.now
                limit.queue_seen(*self.poll(flying))
            assert 1 <= limit.value <= self.ceiling
            if not self.values or self.values[-1][1] != limit.value:
                self.values.append((self.now, limit.value))
        return self

    def held(self) -> int:
        """The value that it had longest in the second half."""
        spans: dict[int, float] = {}
        for (since, value), (until, _) in zip(self.values, [*self.values[1:], (self.now, 0)], strict=True):
            spans[value] = spans.get(value, 0.0) + max(0.0, until - max(since, self.now / 2))
        return max(spans, key=lambda v: spans[v])


def jitter(seed: int = 1) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: rng.uniform(0.9, 1.1)


def test_a_server_that_is_never_slower_gets_all_it_is_allowed():
    noise = jitter()
    seen = Simulated(lambda n, now: ("ok", 0.5 * noise()), ceiling=512).run(30)
    assert seen.limit.value == seen.held() == 512


@pytest.mark.parametrize("slots", [8, 40, 64])
def test_growth_stops_where_requests_only_wait_in_a_silent_queue(slots):
    noise, free_at = jitter(), [0.0] * slots

    def serve(n: int, now: float) -> tuple[str, float]:
        done = max(heapq.heappop(free_at), now) + 0.5 * noise()
        heapq.heappush(free_at, done)
        return "ok", done - now

    seen = Simulated(serve).run(400)
    assert slots <= seen.held() <= 4 * slots
    assert seen.counts["ok"] > 0.95 * slots * 2 * 400  # and the slots were kept busy


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.004), (1.0, 0.02), (0.2, 0.01)])
def test_a_server_that_batches_is_driven_near_the_most_it_can_do(a, b):
    noise = jitter()
    seen = Simulated(lambda n, now: ("ok", (a + b * n) * noise())).run(700)
    n = seen.held()
    assert n / (a + b * n) >= 0.8 / b


@pytest.mark.parametrize("most", [1, 3, 20, 100])
def test_a_server_that_refuses_settles_at_what_it_takes_with_few_refusals(most):
    noise = jitter()
    seen = Simulated(lambda n, now: ("refused", 0.002) if n > most else ("ok", 0.5 * noise())).run(300)
    assert seen.held() == most
    assert seen.counts["refused"] <= 60 + 3 * most
    assert seen.counts["ok"] >= 0.95 * most * 2 * 300


def test_a_server_that_takes_more_later_is_given_more():
    noise = jitter()
    seen = Simulated(lambda n, now: ("refused", 0.002) if n > (10 if now < 20 else 80) else ("ok", 0.5 * noise()))
    assert seen.run(200).limit.value >= 60


def test_what_waits_in_the_queue_that_metrics_show_is_taken_back():
    noise, free_at = jitter(), [0.0] * 40

    def serve(n: int, now: float) -> tuple[str, float]:
        done = max(heapq.heappop(free_at), now) + 0.5 * noise()
        heapq.heappush(free_at, done)
        return "ok", done - now

    seen = Simulated(serve, start=400, ceiling=400, poll=lambda n: (min(n, 40), max(0, n - 40))).run(120)
    assert 40 <= seen.held() <= 60


def test_a_server_that_answers_too_late_for_its_load_gets_less():
    """It shares its time among what it has; above 80 at once each takes longer than the timeout."""
    def serve(n: int, now: float) -> tuple[str, float]:
        return ("ok", n / 8) if n <= 80 else ("late", 10.0)

    seen = Simulated(serve, start=200, ceiling=200, timeout_s=10).run(900)
    assert seen.held() <= 80
    assert seen.counts["ok"] > 0.6 * 8 * 900


def test_a_server_that_answers_nothing_ends_at_one():
    assert Simulated(lambda n, now: ("late", 10.0), start=64, timeout_s=10).run(600).limit.value == 1


@pytest.mark.parametrize("share", [0.001, 0.02, 0.06])
def test_requests_that_hang_whatever_the_load_do_not_starve_a_server(share):
    rng, noise = random.Random(2), jitter()
    seen = Simulated(lambda n, now: ("late", 30.0) if rng.random() < share else ("ok", 2 * noise()), start=64, ceiling=64,
                     timeout_s=30).run(1800)
    assert seen.held() == 64
    mean_s = share * 30 + (1 - share) * 2
    assert seen.counts["ok"] > 0.9 * (1 - share) * 64 / mean_s * 1800


def test_answers_that_are_long_by_nature_do_not_starve_a_server():
    noise = jitter()
    seen = Simulated(lambda n, now: ("ok", 200 * noise()), start=32, ceiling=256, timeout_s=300).run(20_000)
    assert seen.held() >= 32


def test_where_there_is_too_little_to_do_nothing_is_learnt():
    now = [0.0]
    limit = AdaptiveLimit(1024, 32, timeout_s=300, clock=lambda: now[0])
    for _ in range(500):
        now[0] += 0.1
        limit.answered(0.5, 50, full=False)
    assert limit.value == 32


GAUGE = st.one_of(st.floats(0), st.just(math.nan))
EVENT = st.one_of(
    st.tuples(st.just("ok"), st.floats(0, 400), st.booleans()), st.tuples(st.just("refused"), st.integers(1, 2000)),
    st.tuples(st.just("late")), st.tuples(st.just("queue"), GAUGE, GAUGE))


@settings(max_examples=200)
@given(st.integers(-1, 5000), st.integers(-1, 5000), st.lists(st.tuples(st.floats(0, 500), EVENT), max_size=80))
def test_the_limit_is_always_between_one_and_its_ceiling(ceiling, start, events):
    now = [0.0]
    limit = AdaptiveLimit(ceiling, start, timeout_s=60, clock=lambda: now[0])
    for elapsed, (kind, *args) in events:
        now[0] += elapsed
        for _ in range({"ok": 70, "queue": 3}.get(kind, 1)):
            if kind == "ok":
                limit.answered(args[0], 10, full=args[1])
            elif kind == "refused":
                limit.turned_away(args[0])
            elif kind == "late":
                limit.timed_out()
            else:
                limit.queue_seen(*args)
            assert type(limit.value) is int
            assert 1 <= limit.value <= max(1, ceiling)
