"""What a tournament believes of its players while it runs: ratings, as one normal distribution.

The mean outcome of i against j is p = 1 / (1 + exp(r_j - r_i)), as in `bradley_terry`; its variance

    p (1 - p) (toss + noise p (1 - p)),

toss 1/2 for a judge that is as good as a coin of that probability (in two orders), small for one that tells
the probability; noise is the variance of its own error, in logits squared. A schedule needs the full covariance
of the ratings after every round, with both variances estimated from fewer comparisons than there are players. So
they are approximated, fast: Fisher scoring to the mode of the quasi-likelihood (Wedderburn 1974) with a normal
prior, warm-started; the covariance there; one step a round of a fixed point for the variances, which weak priors
hold while data are few. The ratings of the labels are not these: `bradley_terry.fit` fits all comparisons at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
from threadpoolctl import ThreadpoolController

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PRIOR_SD, PRIOR_SD_WEIGHT = 1.2, (10.0, 0.1)
"""Logits; and what the guess is worth against the data, in players: so many, and a share of all."""
TOSS, LEAST_TOSS = 0.5, 0.003
"""What a judge of verdicts without a doubt (outcomes of 0, 1/2 and 1 alone: the mean of two tosses) has of the
variance of one toss, p (1 - p); and what any judge has."""
NOISE, NOISE_WEIGHT, NOISE_RANGE = 0.5, 6.0, (0.01, 25.0)
"""Variance of a judge's own noise, logits squared: a logit in each order; what the guess is worth, in comparisons."""
_POTRF, _POTRS, _POTRI = scipy.linalg.get_lapack_funcs(("potrf", "potrs", "potri"), dtype=np.float64)
"""Cholesky's factor, a solution by it, the inverse by it."""
MAX_STEPS = 6
TOLERANCE = 0.3
"""Logits: the last step is shorter, and what it misses far below any standard error."""


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


class Belief:
    """The ratings of n players: normal, `mean` (n,) and `covariance` (n, n), logits.

    Args:
        n: players, numbered from 0.
        prior_sd: of each rating; "auto" estimates it as comparisons come in.
    """

    def __init__(self, n: int, prior_sd: float | Literal["auto"]) -> None:
        self._sd_known = prior_sd != "auto"
        self.prior_sd = PRIOR_SD if prior_sd == "auto" else float(prior_sd)
        self._toss, self._noise, self._guess = LEAST_TOSS, NOISE, NOISE
        self._seen = False
        self.mean = np.zeros(n)
        self.covariance = np.eye(n) * self.prior_sd**2
        self._first: list[int] = []
        self._second: list[int] = []
        self._share: list[float] = []
        # squared residuals and degrees of freedom: of the comparisons at hand, of those before `keep`
        self._here = self._past = (0.0, 0.0)
        # the prior of what is left of the players: (mean, precision); None while it is independent
        self._base: tuple[Floats, Floats] | None = None

    @property
    def se(self) -> Floats:
        """(n,) standard deviations."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def reliability(self) -> float:
        """Share of the spread of the ratings that is not their uncertainty (separation reliability of posterior
        means, Adams 2005): var / (var + mean squared error), both of the ratings less their mean: the level that
        they have in common is known to no comparison."""
        spread, c = float(np.var(self.mean)), self.covariance
        return spread / (spread + float(np.mean(np.diag(c)) - c.mean())) if spread else 0.0

    def noise(self, p: Floats) -> Floats:
        """Variance of what a comparison tells of a difference whose expected outcome is `p`, logits squared."""
        return self._toss / (p * (1 - p)) + self._noise

    def observe(self, first: Sequence[int], second: Sequence[int], share: Sequence[float]) -> None:
        """Add comparisons (the share of the win that goes to the first) and refit."""
        self._first += first
        self._second += second
        self._share += share
        with _blas().limit(limits=1, user_api="blas"):
            self._fit()

    def keep(self, players: Ints) -> None:
        """Go on with these players alone, renumbered in this order. What is known of them stays: the others are
        integrated out, and their comparisons are part of the prior from now on. Must not meet the others again."""
        self.mean, self.covariance = self.mean[players], self.covariance[np.ix_(players, players)]
        with _blas().limit(limits=1, user_api="blas"):
            self._base = self.mean.copy(), scipy.linalg.inv(self.covariance)
        self._past = self._past[0] + self._here[0], self._past[1] + self._here[1]
        self._here = (0.0, 0.0)
        self._first, self._second, self._share = [], [], []

    def _fit(self) -> None:
        n = len(self.mean)
        i, j, y = np.array(self._first, np.int64), np.array(self._second, np.int64), np.array(self._share)
        diagonal = np.diag_indices(n)
        base, precision = self._base or (np.zeros(n), None)
        if precision is None:
            self._know_judge(y)
        for _ in range(MAX_STEPS):
            p = _logistic(self.mean[i] - self.mean[j])
            spread = self._toss + self._noise * p * (1 - p)
            pull, weight = (y - p) / spread, p * (1 - p) / spread
            off = self.mean - base
            held = off / self.prior_sd**2 if precision is None else precision @ off
            gradient = np.bincount(i, pull, n) - np.bincount(j, pull, n) - held
            hessian = np.zeros((n, n)) if precision is None else precision.copy()
            # no pair meets twice: plain indexing adds each once
            hessian[i, j] -= weight
            hessian[j, i] -= weight
            hessian[diagonal] += np.bincount(i, weight, n) + np.bincount(j, weight, n)
            if precision is None:
                hessian[diagonal] += self.prior_sd**-2
            factor, _ = _POTRF(hessian, lower=1, overwrite_a=1)
            step, _ = _POTRS(factor, gradient, lower=1)
            longest = float(np.abs(step).max())
            # two logits at most: from a poor start the full step overshoots
            self.mean = self.mean + step * min(1.0, 2.0 / max(longest, 1e-300))
            if longest < TOLERANCE:
                break
        half, _ = _POTRI(factor, lower=1, overwrite_c=1)
        half = np.tril(half)
        self.covariance = half + half.T
        self.covariance[diagonal] /= 2
        self._estimate(i, j, y, precision)

    def _know_judge(self, y: Floats) -> None:
        """How much of the judge is a coin that is tossed: the share of its verdicts that know no doubt."""
        sure = float(np.mean((np.abs(y - 0.5) > 0.5 - 1e-6) | (np.abs(y - 0.5) < 1e-6)))
        self._toss, self._guess = LEAST_TOSS + (TOSS - LEAST_TOSS) * sure, NOISE * (1 - sure)
        if not self._seen:
            self._seen, self._noise = True, max(NOISE_RANGE[0], self._guess)

    def _estimate(self, i: Ints, j: Ints, y: Floats, precision: Floats | None) -> None:
        """One step of MacKay's fixed point (1992, sec. 3) for both variances; they count from the next fit on.

        A rating counts as far as the data, not the prior, decide it: effective numbers of ratings and
        of degrees of freedom.
        """
        p = _logistic(self.mean[i] - self.mean[j])
        toss = np.maximum(p * (1 - p), 1e-4)
        chi_square = float(((y - p) ** 2 / (toss * (self._toss + self._noise * toss))).sum())
        variance = np.diag(self.covariance)
        held = variance.sum() / self.prior_sd**2 if precision is None else (precision * self.covariance).sum()
        decided = max(0.0, len(variance) - float(held))
        self._here = chi_square, max(0.0, len(y) - decided)
        if precision is None and not self._sd_known:
            guess = PRIOR_SD_WEIGHT[0] + PRIOR_SD_WEIGHT[1] * len(variance)
            total = float((self.mean**2).sum()) + guess * PRIOR_SD**2
            self.prior_sd = float(np.sqrt(total / (decided + guess)))
        total = self._noise * (self._here[0] + self._past[0]) + NOISE_WEIGHT * self._guess
        free = self._here[1] + self._past[1] + NOISE_WEIGHT
        self._noise = float(np.clip(total / free, *NOISE_RANGE))


def _logistic(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))
