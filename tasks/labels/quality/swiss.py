"""Seeded Swiss pairing: which candidates of one group meet the judge, round by round.

Every round sorts the players by points and pairs neighbours that have not met, so that most comparisons
are spent between players of about the same strength. No pair ever meets twice:

* Let m be the number of players, plus one when it is odd (the bye counts as a player). In round k every
  player has met k - 1 others, so at least m - k remain. As long as k <= m / 2, that is m / 2 or more, and by
  Dirac's theorem the graph of fresh pairs has a perfect matching. `_exchange` shows how it is found.
* A tournament of more than m / 2 rounds plays more than half of all the pairs, and there the order of play
  hardly matters: it takes its rounds from a round robin with shuffled seats (the circle method), in which
  no pair repeats and nobody sits out twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BYE_POINTS = 0.5
"""A bye is worth what a comparison is worth on average: one win shared by two players."""

Pair = tuple[str, str]


def rounds_of(players: int, rounds: int | None = None, extra_rounds: int = 1) -> int:
    """Rounds of a tournament: `rounds`, or ceil(log2 players) + extra_rounds where that is None. Never more
    than a round robin has (n - 1 for an even number of players, n for an odd one); 0 below two players.

    Raises ValueError: a negative number of rounds.
    """
    wanted = math.ceil(math.log2(max(players, 1))) + extra_rounds if rounds is None else rounds
    if wanted < 0:
        raise ValueError(f"rounds: must not be negative, got {wanted}")
    return min(wanted, players + players % 2 - 1) if players > 1 else 0


class Swiss:
    """The state of one tournament; a function of (players as a set, seed, rounds, results) alone.

    Args:
        players: distinct ids, in any order.
        seed: not negative; decides ties in the standings and the seats of a round robin.
        rounds, extra_rounds: see `rounds_of`.

    Raises:
        ValueError: repeated players, negative seed or rounds.
    """

    def __init__(
        self, players: Sequence[str], seed: int, rounds: int | None = None, extra_rounds: int = 1
    ) -> None:
        self._players = sorted(players)
        if len(set(self._players)) != len(self._players):
            raise ValueError("players: every player may be entered once; found repeated ids")
        if seed < 0:
            raise ValueError(f"seed: must not be negative, got {seed}")
        n = len(self._players)
        self._seed = seed
        self._seats = n + n % 2
        self.rounds = rounds_of(n, rounds, extra_rounds)
        self.rounds_started = 0
        self.points: dict[str, float] = dict.fromkeys(self._players, 0.0)
        # None stands for the bye: an opponent like any other, whom everybody may meet once.
        self._met: dict[str | None, set[str | None]] = {player: set() for player in [*self._players, None]}
        self._shown_first = dict.fromkeys(self._players, 0)
        self._pending: dict[frozenset[str], Pair] = {}
        self._bye: str | None = None

    @property
    def pending(self) -> list[Pair]:
        """Pairs of the current round without a result yet, the first shown first."""
        return list(self._pending.values())

    @property
    def bye(self) -> str | None:
        """Who sits the current round out, or None."""
        return self._bye

    @property
    def finished(self) -> bool:
        """Whether every round is played and recorded."""
        return self.rounds_started >= self.rounds and not self._pending

    def next_round(self) -> list[Pair]:
        """Start the next round; its pairs, the one to show first first (places are kept balanced over the
        rounds). Empty when the tournament is over.

        Raises:
            RuntimeError: pairs of the current round are not recorded yet.
        """
        if self._pending:
            raise RuntimeError(f"{len(self._pending)} pairs of round {self.rounds_started} have no result")
        self._bye = None
        if self.rounds_started >= self.rounds:
            return []
        rng = np.random.default_rng((self._seed, self.rounds_started))
        matched = self._round_robin() if self.rounds > self._seats / 2 else self._by_standing(rng)
        self.rounds_started += 1
        for a, b in matched:
            self._start(a, b, swap=bool(rng.integers(2)))
        return self.pending

    def record(self, a: str, b: str, outcome: float | None) -> None:
        """Enter the result of a pending pair, in either order.

        Args:
            outcome: share of the win that goes to `a`, in [0, 1]; None if the judge abstained: the pair is
                spent and neither gets points.

        Raises:
            ValueError: the pair is not pending, or the outcome outside [0, 1].
        """
        key = frozenset((a, b))
        if key not in self._pending:
            raise ValueError(f"({a}, {b}) is not a pending pair of round {self.rounds_started}")
        if outcome is not None:
            if not 0.0 <= outcome <= 1.0:
                raise ValueError(f"outcome: must be in [0, 1] or None, got {outcome}")
            self.points[a] += outcome
            self.points[b] += 1.0 - outcome
        del self._pending[key]

    def _start(self, a: str | None, b: str | None, swap: bool) -> None:
        self._met[a].add(b)
        self._met[b].add(a)
        if a is None or b is None:
            self._bye = a or b
            assert self._bye is not None
            self.points[self._bye] += BYE_POINTS
            return
        balance = self._shown_first[a] - self._shown_first[b]
        if balance > 0 or (balance == 0 and swap):
            a, b = b, a
        self._shown_first[a] += 1
        self._pending[frozenset((a, b))] = (a, b)

    def _round_robin(self) -> list[tuple[str | None, str | None]]:
        """Round `rounds_started` of the circle method: one seat stays, the others move on by one."""
        seats: list[str | None] = [*self._players, *([None] * (self._seats - len(self._players)))]
        order = np.random.default_rng((self._seed, self.rounds)).permutation(self._seats)
        first, *others = [seats[k] for k in order]
        turn = self.rounds_started % len(others)
        circle = [first, *others[turn:], *others[:turn]]
        half = self._seats // 2
        return list(zip(circle[:half], reversed(circle[half:]), strict=True))

    def _by_standing(self, rng: np.random.Generator) -> list[tuple[str | None, str | None]]:
        """Neighbours in the standings that have not met; the bye to the last who had none."""
        shuffled = [self._players[k] for k in rng.permutation(len(self._players))]
        standing = sorted(shuffled, key=lambda player: -self.points[player])
        waiting: list[str | None] = [*standing]
        rank: dict[str | None, int] = {player: k for k, player in enumerate([*standing, None])}
        matched: list[tuple[str | None, str | None]] = []
        if len(waiting) % 2:
            last = next(player for player in reversed(waiting) if player not in self._met[None])
            waiting.remove(last)
            matched.append((last, None))
        left: list[str | None] = []
        while waiting:
            player = waiting.pop(0)
            k = next((k for k, other in enumerate(waiting) if other not in self._met[player]), None)
            if k is None:
                left.append(player)
            else:
                matched.append((player, waiting.pop(k)))
        while left:
            self._exchange(left.pop(0), left.pop(0), matched, rank)
        return matched

    def _exchange(
        self,
        p: str | None,
        q: str | None,
        matched: list[tuple[str | None, str | None]],
        rank: dict[str | None, int],
    ) -> None:
        """Break the one pair (r, s) whose partners can take p and q, at the least distance in rank.

        There always is one: p and q found nobody left, so all their fresh opponents sit in the pairs of
        `matched`, m of them or more (Dirac's bound, twice) over fewer than m / 2 pairs. Some pair therefore
        holds three of the four possible meetings, among them (p, r), (q, s) or (p, s), (q, r).
        """
        swaps = [
            (abs(rank[p] - rank[x]) + abs(rank[q] - rank[y]), k, x, y)
            for k, (r, s) in enumerate(matched)
            for x, y in ((r, s), (s, r))
            if x not in self._met[p] and y not in self._met[q]
        ]
        _, k, x, y = min(swaps, key=lambda swap: swap[:2])
        matched[k] = (p, x)
        matched.append((q, y))
