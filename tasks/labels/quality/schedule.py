"""Which players meet: the schedule of a tournament, as its rules ask for.

* `ranking` (`swiss`): everyone plays every round, for ratings of all of them. With stop `settled` it ends when the
  ratings' separation reliability reaches `reliability`.
* `top_k` (`top_k`): comparisons go where they tell who is among the best `top`. With stop `settled` it ends when
  that is known at `confidence`. Fewer comparisons, and of the rest little more than that they are the rest.
  With no more players than `top` there is nothing to look for, and a ranking is played instead.

With stop `rounds` both play all their rounds (budget) and say at the end whether they are settled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tasks.labels.quality.belief import Belief
from tasks.labels.quality.swiss import Pair, Swiss, rounds_of
from tasks.labels.quality.top_k import BUDGET_SHARE, TopK


@dataclass(frozen=True)
class Rules:
    """Settings of a tournament; named as in the config's `quality` section, which explains them."""

    schedule: Literal["top_k", "ranking"] = "top_k"
    top: int = 5
    confidence: float = 0.95
    reliability: float = 0.95
    rounds: int | None = None
    extra_rounds: int = 1
    stop: Literal["settled", "rounds"] = "settled"
    prior_sd: float | Literal["auto"] = "auto"


class Schedule(Protocol):
    """A tournament's pairings: a function of (players as a set, seed, rules, results), without any I/O."""

    @property
    def rounds_started(self) -> int:
        """Rounds that `next_round` gave."""
        ...

    @property
    def settled(self) -> bool | None:
        """After the end: whether the aim is reached: top_k: the top known at `confidence`; ranking:
        `reliability` reached. None: nothing to settle (fewer than two players)."""
        ...

    def next_round(self) -> list[Pair]:
        """Start the next round: its pairs, the one to show first first; empty when the tournament is over.

        Raises RuntimeError: pairs of the current round are not recorded yet.
        """
        ...

    def record(self, a: str, b: str, outcome: float | None) -> None:
        """Enter a result of the current round, in any order: the share of the win that goes to `a`, or None if
        the judge abstained (the pair is spent).

        Raises ValueError: the pair is not pending, or the outcome outside [0, 1].
        """
        ...


def schedule(players: Sequence[str], seed: int, rules: Rules) -> Schedule:
    """A new tournament.

    Raises:
        ValueError: repeated players, negative seed or rounds, no `top`.
    """
    n = len(players)
    if len(set(players)) != n:
        raise ValueError("players: every player may be entered once; found repeated ids")
    if seed < 0:
        raise ValueError(f"seed: must not be negative, got {seed}")
    if rules.top < 1:
        raise ValueError(f"top: must be positive, got {rules.top}")
    if rules.schedule == "ranking" or n <= rules.top:
        return Ranking(players, seed, rules)
    return TopK(players, seed, rules.top, most_comparisons(n, rules), rules.confidence,
                rules.stop == "settled", rules.prior_sd)


def most_comparisons(players: int, rules: Rules) -> int:
    """Upper bound on the pairs of one tournament of that many players, or of fewer."""
    ranking = _ranking_pairs(players, rules)
    if rules.schedule == "ranking" or players <= rules.top or rules.rounds is not None:
        return ranking
    # what fewer players than `top` would play is no more than this either: the bound grows with the players
    smaller = _ranking_pairs(min(players, rules.top), rules)
    return max(math.ceil(BUDGET_SHARE * ranking), min(ranking, players + 2 * rules.top), smaller)


def _ranking_pairs(players: int, rules: Rules) -> int:
    return rounds_of(players, rules.rounds, rules.extra_rounds) * (players // 2)


class Ranking:
    """A Swiss tournament that may end early, once the ratings are reliable."""

    def __init__(self, players: Sequence[str], seed: int, rules: Rules) -> None:
        self._swiss = Swiss(players, seed, rules.rounds, rules.extra_rounds)
        self._number = {player: k for k, player in enumerate(sorted(players))}
        self._belief = Belief(len(players), rules.prior_sd)
        self._results: dict[Pair, float | None] = {}
        self._early, self._reliability = rules.stop == "settled", rules.reliability

    @property
    def rounds_started(self) -> int:
        """See `Schedule`."""
        return self._swiss.rounds_started

    @property
    def settled(self) -> bool | None:
        """See `Schedule`."""
        if len(self._number) < 2:
            return None
        return self._belief.reliability >= self._reliability

    def next_round(self) -> list[Pair]:
        """See `Schedule`."""
        if not self._swiss.pending:
            self._learn()
            if self._early and self.settled:
                return []
        pairs = self._swiss.next_round()
        self._results = dict.fromkeys(pairs)
        return pairs

    def record(self, a: str, b: str, outcome: float | None) -> None:
        """See `Schedule`."""
        self._swiss.record(a, b, outcome)
        if (b, a) in self._results:
            a, b, outcome = b, a, None if outcome is None else 1.0 - outcome
        self._results[a, b] = outcome

    def _learn(self) -> None:
        judged = [(self._number[a], self._number[b], y) for (a, b), y in self._results.items() if y is not None]
        self._results = {}
        if judged:
            first, second, share = zip(*judged, strict=True)
            self._belief.observe(first, second, share)
