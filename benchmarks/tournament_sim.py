"""Simulated judges and the tournaments that `tournament.py` compares; nothing here asks a server."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tasks.labels.quality import bradley_terry
from tasks.labels.quality.schedule import Schedule
from tasks.labels.quality.tournament import pooled

Floats = npt.NDArray[np.float64]
Orders = tuple[float | None, float | None]


@dataclass(frozen=True)
class JudgeSettings:
    """A simulated judge. It is asked in both orders, one call each.

    hard: a call is a toss with the model's probability; else that probability, with noise on its logit.
    noise: sd of that noise, logits. bias: logits in favour of the one shown first. intransitive: sd of what a
    pair's own whim adds to its difference, in both orders. failures: share of the calls that fail; or of the
    pairs, where `whole_pairs`. spread: sd of the true ratings, logits.
    """

    hard: bool
    failures: float = 0.0
    noise: float = 1.0
    bias: float = 0.0
    intransitive: float = 0.0
    spread: float = 1.0
    whole_pairs: bool = False


class Judge:
    """Judges players of drawn true ratings, the same ones for all `luck` of one `seed`; a function of both and
    of what it is asked, in order."""

    def __init__(self, players: int, settings: JudgeSettings, seed: int, luck: int = 0) -> None:
        self._settings, self._rng = settings, np.random.default_rng((seed, players))
        self.true = self._rng.normal(size=players) * settings.spread
        whims = self._rng.normal(size=(players, players)) * settings.intransitive
        self._whims = np.triu(whims) - np.triu(whims).T
        self._rng = np.random.default_rng((seed, players, luck))
        self.calls = 0
        self.cpu_s = 0.0

    def compare(self, a: int, b: int) -> Orders:
        """Shares of the win that go to `a`: shown first, shown second; None where the call failed."""
        started = time.process_time()
        self.calls += 2
        orders = self._orders(a, b)
        self.cpu_s += time.process_time() - started
        return orders

    def _orders(self, a: int, b: int) -> Orders:
        s = self._settings
        logit = self.true[a] - self.true[b] + self._whims[a, b]
        first, second = self._call(logit + s.bias), self._call(logit - s.bias)
        if s.whole_pairs:
            return (None, None) if self._rng.random() < s.failures else (first, second)
        failed = self._rng.random(2) < s.failures
        return None if failed[0] else first, None if failed[1] else second

    def _call(self, logit: float) -> float:
        if self._settings.hard:
            return float(self._rng.random() < _logistic(logit))
        return _logistic(logit + self._settings.noise * self._rng.normal())


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@dataclass
class Played:
    """The comparisons of one tournament that have an outcome."""

    players: int
    first: list[int] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def add(self, a: int, b: int, outcome: float | None) -> None:
        """Take in a pair; an abstention is none."""
        if outcome is not None:
            self.first.append(a)
            self.second.append(b)
            self.share.append(outcome)


def outcome(orders: Orders) -> float | None:
    """As our labeller has it; None if one failed."""
    a, b = orders
    return None if a is None or b is None else pooled(a, b)


def ours(judge: Judge, games: Schedule, players: int) -> Played:
    """A tournament of ours to its end; player k is named so that the order of names is the order of numbers."""
    played = Played(players)
    while pairs := games.next_round():
        for a, b in pairs:
            result = outcome(judge.compare(int(a), int(b)))
            games.record(a, b, result)
            played.add(int(a), int(b), result)
    return played


def names(players: int) -> list[str]:
    """Ids of the players."""
    return [f"{k:04d}" for k in range(players)]


def seeds_swiss(judge: Judge, players: int, rounds: int, rng: np.random.Generator) -> Played:
    """The baseline: neighbours in points, who may meet again; the last sits out for a point, as often as that is
    so. A pair is won, drawn or lost by its mean outcome, where a failed call counts 0.5."""
    points, played = np.zeros(players), Played(players)
    for _ in range(rounds):
        order = sorted(rng.permutation(players).tolist(), key=lambda player: -points[player])
        for a, b in zip(order[::2], order[1::2], strict=False):
            mean = sum(0.5 if y is None else y for y in judge.compare(a, b)) / 2
            won = 1.0 if mean > 0.5 else 0.0 if mean < 0.5 else 0.5
            points[a] += won
            points[b] += 1 - won
            played.add(a, b, won)
        if players % 2:
            points[order[-1]] += 1
    return played


def random_pairs(judge: Judge, players: int, pairs: int, rng: np.random.Generator) -> Played:
    """Rounds of random pairs, without rematches while that is easy."""
    played, met = Played(players), set()
    while pairs:
        order = rng.permutation(players).tolist()
        for a, b in zip(order[::2], order[1::2], strict=False):
            if pairs and (a, b) not in met:
                met |= {(a, b), (b, a)}
                pairs -= 1
                played.add(a, b, outcome(judge.compare(a, b)))
    return played


def round_robin(judge: Judge, players: int) -> Played:
    """Everyone against everyone."""
    played = Played(players)
    for a, b in itertools.combinations(range(players), 2):
        played.add(a, b, outcome(judge.compare(a, b)))
    return played


def rate(played: Played) -> Floats:
    """(n,) ratings as our labels have them; who has none is at 0, the mean."""
    fit = bradley_terry.fit(played.players, np.array(played.first, np.int64), np.array(played.second, np.int64),
                            np.array(played.share), prior_sd="auto", dispersion="auto")
    return fit.rating.filled(0.0)


def descend(tournaments: Sequence[Played], steps: int = 1000, rate: float = 0.05) -> Floats:
    """(tournaments, n) ratings by gradient descent without a prior, the baseline's fit; of all tournaments side by
    side, as they do not touch each other."""
    n = tournaments[0].players
    start = np.repeat(np.arange(len(tournaments)) * n, [len(t.first) for t in tournaments])
    i = np.concatenate([t.first for t in tournaments]).astype(int) + start
    j = np.concatenate([t.second for t in tournaments]).astype(int) + start
    y = np.concatenate([t.share for t in tournaments])
    rating = np.zeros(n * len(tournaments))
    for _ in range(steps):
        residual = y - 1 / (1 + np.exp(rating[j] - rating[i]))
        rating += rate * (np.bincount(i, residual, len(rating)) - np.bincount(j, residual, len(rating)))
    return rating.reshape(len(tournaments), n)


def precision(rating: Floats, true: Floats, top: int = 5) -> float:
    """Share of the `top` rated best that are of the true best."""
    return len(set(np.argsort(-rating)[:top]) & set(np.argsort(-true)[:top])) / min(top, len(true))
