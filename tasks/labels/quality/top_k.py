"""A tournament for the top k: comparisons go where they tell who belongs to it.

1. The first round pairs everyone at random (one sits out when their number is odd).
2. After each round the players are rated (`belief`), with the covariance C. The boundary is the rating that leaves
   k players above it in expectation; P_i, the chance that player i is one of the top, is that of its rating to
   lie above the boundary, which moves with the players near it: what they are all wrong by together does not count.
3. A comparison of i and j is worth what it takes off the expected shortfall |r - boundary| of wrongly placed
   players, to first order in their variances (a linear expected improvement): for each of both

       density(z_i) / se_i * cov(r_i - boundary, r_i - r_j)^2 / (var(r_i - r_j) + noise of the comparison),

   z and se those of r_i - boundary. So players near the boundary and little known play, against those that tell
   most, and who had bad luck in the first round is tried again.
4. A round takes pairs by worth, one a player, while they are worth nearly what the best is; a thirtieth of the
   budget at least, so that there are some 15 rounds for 64 players and 20 to 40 for 396.
5. Players out of the question are left behind, those of least P_i, up to LEFT_BEHIND of the top in all; what is
   known of the others stays. That is what keeps a round cheap.

**Settled** means: the expected share of the right ones among the k rated best, the mean of their P_i, is at
least `confidence`. At 0.95 and k = 5, 4.75 of the five named are expected to be of the true five: each one
is right with 95 % on average, the set as a whole less often. It holds as far as the model does: simulated with
judges of its kind, the settled were right as often as claimed or more; with players that differ little (true
deviation 0.5 logits) and a hard judge, less often at confidences of 0.8 (0.6 of the few that settled). Of a
judge that runs in circles it knows nothing.

**Budget**: BUDGET_SHARE of the pairs of a ranking tournament, for small groups n + 2k pairs if that is more;
with `rounds` given, as many rounds' worth. Never more than a ranking's. When the top is not settled by then
(a hard judge and close players), the tournament ends all the same and says so.

Abstentions spend their pair. A player of whom the judge abstained UNJUDGEABLE times and never had a verdict
is not asked for again; what is settled is settled among the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.special import ndtr

from tasks.labels.quality.belief import Belief, Floats, Ints

BUDGET_SHARE = 0.4
"""Of a ranking's pairs: enough for a top 5 as right as a plain Swiss tournament's."""
UNJUDGEABLE = 4
"""Abstentions in a row from the first: at one in five, one player in 600 is given up by chance."""
PASSES = 3
"""Over the boundary, which depends on the distances' uncertainty, which depends on the boundary."""
WORTH = 0.85
"""Share of the best pair's worth that a pair of the same round must have."""
ROUNDS = 30
"""A round spends one part in so many of the budget, or more, as far as one comparison a player allows."""
LEFT_BEHIND = 0.02
"""Share of the top that may be expected among the players left behind."""
FEW = 24
"""Players of the smallest field (or 4 top, or what has twice the pairs that are left to play): nothing is saved by
less, and it would run out of fresh pairs."""

Pair = tuple[str, str]


class TopK:
    """A tournament that looks for the `top` best; see the module's docstring.

    Args:
        players: distinct ids, in any order; more than `top`.
        seed: not negative.
        top: how many to find.
        budget: most pairs.
        confidence: at which the top is settled.
        stop_early: end then; else play the budget whatever comes.
        prior_sd: of the ratings, logits; "auto" estimates it.
    """

    def __init__(self, players: Sequence[str], seed: int, top: int, budget: int, confidence: float,
                 stop_early: bool = True, prior_sd: float | Literal["auto"] = "auto") -> None:
        self._rng = np.random.default_rng((seed, top))
        known = sorted(players)
        # seeded once, so that ties go to the first without a preference for low ids
        self._ids = [known[k] for k in self._rng.permutation(len(known))]
        self._number = {player: k for k, player in enumerate(self._ids)}
        n = len(self._ids)
        self._top, self._budget, self._left = top, budget, budget
        self._least = max(math.ceil(top / 2), math.ceil(budget / ROUNDS))
        """Pairs of a round at least."""
        self._confidence, self._early = confidence, stop_early
        self._belief = Belief(n, prior_sd)
        self._field: Ints = np.arange(n)
        """Who is still in question: numbers of players, in the order of the belief's."""
        self._behind: tuple[Floats, Floats] = np.zeros(0), np.zeros(0)
        """Means and standard errors of those out of the question, as last seen."""
        self._met = np.eye(n, dtype=bool)
        self._verdicts = np.zeros(n, np.int64)
        self._abstained = np.zeros(n, np.int64)
        self._pending: dict[Pair, float | None] = {}
        self._waiting: set[Pair] = set()
        self._boundary, self._se, self._shared = math.nan, np.zeros(0), np.zeros(0)
        """Set by `_locate`, which explains them; the latter two are (field,)."""
        self.rounds_started = 0
        self.expected_precision: float | None = None
        """The expected share of the right ones among the `top` rated best; None before the first result."""

    @property
    def settled(self) -> bool:
        """Whether the top is settled at the confidence."""
        return self.expected_precision is not None and self.expected_precision >= self._confidence

    def next_round(self) -> list[Pair]:
        """See `schedule.Schedule`."""
        if self._waiting:
            raise RuntimeError(f"{len(self._waiting)} pairs of round {self.rounds_started} have no result")
        if self.rounds_started:
            self._learn()
        if self._left <= 0 or (self._early and self.settled):
            return []
        pairs = self._informative() if self.rounds_started else self._opening()
        pairs = pairs[: self._left]
        if not pairs:
            return []
        self.rounds_started += 1
        self._left -= len(pairs)
        shown = [self._shown(a, b) for a, b in pairs]
        self._pending = dict.fromkeys(shown)
        self._waiting = set(shown)
        return shown

    def record(self, a: str, b: str, outcome: float | None) -> None:
        """See `schedule.Schedule`."""
        if (b, a) in self._waiting:
            a, b, outcome = b, a, None if outcome is None else 1.0 - outcome
        if (a, b) not in self._waiting:
            raise ValueError(f"({a}, {b}) is not a pending pair of round {self.rounds_started}")
        if outcome is not None and not 0.0 <= outcome <= 1.0:
            raise ValueError(f"outcome: must be in [0, 1] or None, got {outcome}")
        self._waiting.remove((a, b))
        self._pending[a, b] = outcome

    # -- what is known ---------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Take in the round's results, in the order of its pairs whatever the order they came in."""
        place = {int(player): k for k, player in enumerate(self._field)}
        first, second, share = [], [], []
        for (a, b), outcome in self._pending.items():
            numbers = self._number[a], self._number[b]
            for number in numbers:
                (self._abstained if outcome is None else self._verdicts)[number] += 1
            if outcome is not None:
                first.append(place[numbers[0]])
                second.append(place[numbers[1]])
                share.append(outcome)
        self._pending = {}
        if share:
            self._belief.observe(first, second, share)
        judgeable = (self._verdicts > 0) | (self._abstained < UNJUDGEABLE)
        if not judgeable[self._field].all():
            self._reduce(np.flatnonzero(judgeable[self._field]))
        chance = self._locate()
        if self._verdicts.any():
            self.expected_precision = float(np.sort(chance)[-self._top:].sum()) / min(self._top, max(1, len(chance)))
        order = np.argsort(chance, kind="stable")
        left = LEFT_BEHIND * self._top - max(0.0, self._top - float(chance.sum()))
        out = int(np.searchsorted(np.cumsum(chance[order]), left))
        out = min(out, len(order) - max(FEW, 4 * self._top, math.isqrt(4 * max(0, self._left))))
        # made smaller when that saves something, and not before the spread of the ratings is known
        if out > len(order) // 4 and self.rounds_started >= 3:
            mean, se = self._behind
            leave = order[:out]
            self._behind = np.append(mean, self._belief.mean[leave]), np.append(se, self._se[leave])
            stay = np.sort(order[out:])
            self._se, self._shared = self._se[stay], self._shared[stay]
            self._reduce(stay)

    def _reduce(self, stay: Ints) -> None:
        self._belief.keep(stay)
        self._field = self._field[stay]

    def _locate(self) -> Floats:
        """Find the boundary; the chances of the field to lie above it. With those left behind they sum to `top`.

        The boundary moves with the players near it, by the share u of each in its density. What counts is
        the uncertainty of the distance: var(r_i - u r) = C_ii - 2 (C u)_i + u C u, less than C_ii where
        players are known well among themselves and the level of all of them is not.
        """
        belief = self._belief
        behind, behind_se = self._behind
        mean = np.append(belief.mean, behind)
        if len(mean) <= self._top:
            self._boundary = -math.inf
            return np.ones(len(belief.mean))
        variance, level = np.diag(belief.covariance), np.zeros(len(belief.mean))
        for _ in range(PASSES):
            self._se = np.sqrt(np.maximum(variance + level, 1e-12))
            self._boundary = _above(mean, np.append(self._se, behind_se), self._top)
            z = (belief.mean - self._boundary) / self._se
            density = np.exp(-z * z / 2) / self._se
            u = density / max(float(density.sum()), 1e-300)
            self._shared = belief.covariance @ u
            level = float(u @ self._shared) - 2 * self._shared
        return ndtr(z)

    # -- who plays -------------------------------------------------------------------------------------

    def _opening(self) -> list[tuple[int, int]]:
        numbers = self._field
        return [(int(a), int(b)) for a, b in zip(numbers[::2], numbers[1::2], strict=False)]

    def _informative(self) -> list[tuple[int, int]]:
        """Pairs of the field that have not met, by worth; one a player."""
        if not math.isfinite(self._boundary):
            return []
        z = (self._belief.mean - self._boundary) / self._se
        density = np.exp(-z * z / 2) / self._se
        gain = density * self._se**2
        order = np.argsort(-np.round(gain / max(float(gain.max()), 1e-200), 9), kind="stable")
        # those far from the boundary are worth meeting only where the nearer ones have all met
        near = order[: max(FEW, 6 * self._top, 6 * self._least)]
        return self._best_pairs(np.sort(near), density) or self._best_pairs(np.sort(order), density)

    def _best_pairs(self, some: Ints, density: Floats) -> list[tuple[int, int]]:
        """As `_informative`, of `some` (places in the field)."""
        numbers = self._field[some]
        # rounded, so that the last bit of a sum decides nothing; ties go to the first
        worth = self._worth(some, density[some])
        worth[np.tri(len(some), dtype=bool) | self._met[np.ix_(numbers, numbers)]] = -1.0
        best = float(worth.max(initial=0.0))
        worth = np.round(worth / (best if best > 1e-200 else 1.0), 9)
        pairs: list[tuple[int, int]] = []
        while worth.size:
            a, b = divmod(int(worth.argmax()), len(some))
            if worth[a, b] < 0 or (worth[a, b] < WORTH and len(pairs) >= self._least):
                break
            pairs.append((int(numbers[a]), int(numbers[b])))
            worth[[a, b], :] = worth[:, [a, b]] = -1.0
        return pairs

    def _worth(self, some: Ints, density: Floats) -> Floats:
        """(some, some) what a comparison is worth, the module's formula; symmetric."""
        c = self._belief.covariance[np.ix_(some, some)]
        mean, variance, shared = self._belief.mean[some], np.diag(c), self._shared[some]
        apart = variance[:, None] + variance - 2 * c
        # the chance of a win with the ratings uncertain (MacKay 1992, eq. 10)
        p = 0.5 * (1 + np.tanh((mean[:, None] - mean) / np.sqrt(1 + math.pi / 8 * apart) / 2))
        # covariance of a player's (row) distance to the boundary with its difference to another
        told = variance[:, None] - c - shared[:, None] + shared
        taken_off = density[:, None] * told**2
        return (taken_off + taken_off.T) / (apart + self._belief.noise(np.clip(p, 1e-9, 1 - 1e-9)))

    def _shown(self, a: int, b: int) -> Pair:
        """A pair that meets, one of them shown first."""
        self._met[a, b] = self._met[b, a] = True
        if self._rng.integers(2):
            a, b = b, a
        return self._ids[a], self._ids[b]


def _above(mean: Floats, se: Floats, players: int) -> float:
    """The rating that leaves so many players above it in expectation, by bisection."""
    low, high = float((mean - 6 * se).min()), float((mean + 6 * se).max())
    for _ in range(20):
        middle = (low + high) / 2
        if ndtr((mean - middle) / se).sum() > players:
            low = middle
        else:
            high = middle
    return (low + high) / 2
