"""What is learnt from the outcomes: prior, dispersion, and whether the intervals tell the truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy.optimize import minimize

from tasks.labels.quality.bradley_terry import Fit, fit
from tasks.labels.quality.swiss import Swiss

pytestmark = pytest.mark.slow


def verdict(kind: str, ahead: float, rng: np.random.Generator) -> float:
    noise = {"soft": 0.5, "very soft": 1.0}.get(kind, 0.0) * rng.normal()
    p = 1 / (1 + np.exp(-ahead - noise))
    return {"toss": lambda: float(rng.random() < p), "two tosses": lambda: rng.binomial(2, p) / 2}.get(kind, lambda: p)()


def played(n: int, spread: float, rounds: int, kind: str, seed: int, swiss: bool = True, abstained: float = 0.0):
    """True ratings with mean 0; first, second, outcome of the comparisons."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, spread, n)
    truth -= truth.mean()
    results = []

    def judge(a: int, b: int):
        if rng.random() < abstained:
            return None
        results.append((a, b, verdict(kind, truth[a] - truth[b], rng)))
        return results[-1][2]

    tournament = Swiss([f"{k:03d}" for k in range(n)], seed, rounds)
    for _ in range(rounds):
        if swiss:
            for a, b in tournament.next_round():
                tournament.record(a, b, judge(int(a), int(b)))
        else:
            seats = rng.permutation(n)
            for a, b in zip(seats[::2], seats[1::2], strict=True):
                judge(int(a), int(b))
    first, second, outcome = (np.array(column) for column in zip(*results, strict=True))
    return truth, first, second, outcome


@functools.cache
def coverage(n: int, rounds: int, kind: str, spread: float, swiss: bool, groups: int) -> tuple[float, float]:
    """Share of true ratings within 1.96 errors of the fitted ones, and its standard error over the groups."""
    inside = []
    for seed in range(groups):
        truth, i, j, y = played(n, spread, rounds, kind, seed, swiss, abstained=0.2 * (seed % 2))
        result = fit(n, i, j, y)
        inside.append(np.mean((np.abs(result.rating - truth) <= 1.96 * result.se).compressed()))
    return float(np.mean(inside)), float(np.std(inside) / groups**0.5)


@pytest.mark.parametrize("swiss", [True, False])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["toss", "two tosses", "soft", "very soft"])
def test_95_percent_intervals_cover_93_to_97_percent_of_true_ratings(kind, spread, swiss):
    share, error = coverage(40, 8, kind, spread, swiss, groups=24)
    # Eight tosses a player hardly tell a spread of 0.5 from 1: the errors allow for both.
    upper = 0.99 if kind == "toss" and spread == 0.5 else 0.97
    assert 0.93 - 2.5 * error <= share <= upper + 2.5 * error


@pytest.mark.parametrize("kind", ["toss", "two tosses", "soft", "very soft"])
def test_coverage_over_all_spreads_and_pairings_is_near_95_percent(kind):
    cells = [coverage(40, 8, kind, spread, swiss, 24) for spread in (0.5, 1.0, 2.0) for swiss in (True, False)]
    assert 0.935 <= np.mean([share for share, _ in cells]) <= 0.97


@pytest.mark.parametrize("kind", ["toss", "soft"])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_few_players_have_errors_that_cover_too(kind, spread):
    share, error = coverage(8, 6, kind, spread, True, groups=80)
    assert 0.93 - 2.5 * error <= share


@pytest.mark.parametrize("kind", ["toss", "two tosses", "soft"])
@pytest.mark.parametrize("n", [4, 20, 64])
def test_ratings_are_the_mode_under_the_prior_and_dispersion_of_the_result(kind, n):
    _, i, j, y = played(n, 1.0, 3 if n == 4 else 7, kind, seed=n)
    result = fit(n, i, j, y)
    assert result.prior_sd is not None

    def loss(r):
        d = r[i] - r[j]
        p = 1 / (1 + np.exp(-d))
        value = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum() / result.dispersion + r @ r / 2 / result.prior_sd**2
        residual = (p - y) / result.dispersion
        return value, np.bincount(i, residual, n) - np.bincount(j, residual, n) + r / result.prior_sd**2

    best = minimize(loss, np.zeros(n), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}).x
    np.testing.assert_allclose(result.rating, best, atol=1e-5)
    again = fit(n, i, j, y, prior_sd=result.prior_sd, dispersion=result.dispersion)
    np.testing.assert_allclose(again.rating, result.rating, atol=1e-8)


@pytest.mark.parametrize("wins", [(3, 0), (2, 1), (9, 3), (20, 4)])
def test_the_errors_of_two_players_equal_those_of_the_exact_posterior(wins):
    """Integrated on a grid over the difference and log sigma, with the hyperprior as documented."""
    result = fit(2, [0] * sum(wins), [1] * sum(wins), [1.0] * wins[0] + [0.0] * wins[1])
    d, log_sd = np.linspace(-40, 40, 8001)[:, None], np.linspace(np.log(0.02), np.log(60), 200)[None, :]
    variance = 2 * np.exp(2 * log_sd)
    logs = -wins[0] * np.logaddexp(0, -d) - wins[1] * np.logaddexp(0, d) - d**2 / 2 / variance - np.log(variance) / 2
    weights = np.exp(logs - 0.5 * (log_sd - np.log(1.5)) ** 2 - logs.max())
    weights /= weights.sum()
    mean = (weights * d).sum()
    spread = (weights * (d - mean) ** 2).sum()
    expected = np.sqrt(spread / 4 + (mean / 2 - result.rating[0]) ** 2)
    np.testing.assert_allclose(result.se, expected, rtol=0.15 if 0 in wins else 0.05)
    # The rating is the mode that comes closest to the posterior mean: for two players they are the same.
    assert result.rating[0] == pytest.approx(mean / 2, rel=0.15 if 0 in wins else 0.05)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("swiss", [True, False])
def test_the_prior_follows_the_true_spread(spread, swiss):
    found = [fit(64, *played(64, spread, 10, "soft", seed, swiss)[1:]).prior_sd for seed in range(5)]
    assert 0.75 * spread < np.median(found) < 1.35 * spread
    tossed = [fit(64, *played(64, spread, 10, "toss", seed, swiss)[1:]).prior_sd for seed in range(5)]
    assert 0.6 * spread < np.median(tossed) < 1.7 * spread


def test_the_dispersion_is_that_of_the_verdicts():
    def dispersion(kind: str) -> float:
        return fit(64, *played(64, 1.0, 8, kind, seed=3)[1:]).dispersion

    assert dispersion("toss") == 1.0
    assert dispersion("two tosses") == pytest.approx(0.5, abs=0.08)
    assert dispersion("soft") == pytest.approx(0.05, abs=0.02)
    rng = np.random.default_rng(0)
    truth, i, j, _ = played(64, 1.0, 8, "toss", seed=4)
    p = 1 / (1 + np.exp(truth[j] - truth[i]))
    y = rng.beta(4 * p, 4 * (1 - p))  # variance p (1 - p) / 5
    for options in ({}, {"prior_sd": 1.0}):
        assert fit(64, i, j, y, **options).dispersion == pytest.approx(0.2, abs=0.04)


def test_a_dispersion_is_a_weight():
    _, i, j, y = played(12, 1.0, 6, "soft", seed=5)
    dispersed, weighted = fit(12, i, j, y, None, 1.5, 0.2), fit(12, i, j, y, np.full(len(i), 5.0), 1.5, 1.0)
    np.testing.assert_allclose(dispersed.rating, weighted.rating, atol=1e-9)
    np.testing.assert_allclose(dispersed.se, weighted.se, atol=1e-9)
    assert dispersed.dispersion == 0.2 and dispersed.prior_sd == 1.5


def test_the_reliability_is_the_share_of_variance_that_the_ratings_explain():
    claimed, seen = [], []
    for seed in range(12):
        truth, i, j, y = played(64, 1.0, 8, "toss", seed, swiss=False)
        result = fit(64, i, j, y)
        rating, se = np.asarray(result.rating), np.asarray(result.se)
        assert result.reliability == pytest.approx(rating @ rating / (rating @ rating + se @ se))
        claimed.append(result.reliability)
        seen.append(np.corrcoef(rating, truth)[0, 1] ** 2)
    assert np.mean(claimed) == pytest.approx(np.mean(seen), abs=0.07)
    assert fit(3, [], [], []).reliability is None


@pytest.mark.parametrize(("n", "i", "j", "y"), [
    (2, [0], [1], [1.0]), (2, [0], [1], [0.5]), (2, [0] * 3, [1] * 3, [0.3, 0.4, 0.35]),
    (3, [0, 1, 2], [1, 2, 0], [1.0, 1.0, 1.0]),
    (3, [0, 0, 1], [1, 2, 2], [1.0, 1.0, 1.0]),
    (4, [0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3], [0.5] * 6),
    (4, [0, 2], [1, 3], [1.0, 0.9]),
    (4, [0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3], [1 - 1e-12] * 6),
    (60, list(range(59)), list(range(1, 60)), [1.0] * 59),
    (60, list(range(59)), list(range(1, 60)), [0.5] * 59),
])
def test_small_and_degenerate_groups_have_finite_ratings_and_errors(n, i, j, y):
    for options in ({}, {"prior_sd": 2.5}, {"dispersion": 0.5}):
        result = fit(n, i, j, y, **options)
        assert result.converged and np.isfinite(result.rating.filled(0)).all() and (result.se > 0).all()
        assert np.isfinite(result.se).all() and 1e-3 <= result.dispersion <= 1 and 0.05 <= result.prior_sd <= 20
        assert 0 <= result.reliability <= 1
    assert fit(n, i, j, y).rating.tolist() == fit(n, i, j, y).rating.tolist()


def test_draws_alone_rate_all_the_same_with_a_narrow_prior():
    result: Fit = fit(6, [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0], [0.5] * 6)
    np.testing.assert_allclose(result.rating, 0, atol=1e-9)
    assert result.prior_sd < 1.0 and result.se.max() < 1.0
    assert 0.5 <= result.dispersion < 0.7  # a judge who always prefers one position draws too


@pytest.mark.parametrize("prior_sd", [0.5, 2.5])
@pytest.mark.parametrize("y", [[0.6, 0.5, 0.5], [0.9, 0.2, 0.4], [0.5, 0.5, 0.5], [0.496, 0.511], [0.513, 0.505]])
def test_a_tree_of_comparisons_has_a_dispersion_that_reproduces_itself(y, prior_sd):
    """No comparison can be checked against another: the dispersion hangs on the prior and on little else."""
    m, n = len(y), len(y) + 1
    i, j = np.zeros(m, int), np.arange(1, n)
    result = fit(n, i, j, y, prior_sd=prior_sd)
    rating = np.asarray(result.rating)
    p = 1 / (1 + np.exp(rating[j] - rating[i]))
    variance = p * (1 - p)
    design = np.eye(n)[i] - np.eye(n)[j]
    hessian = (design.T * variance) @ design / result.dispersion + np.eye(n) / prior_sd**2
    free = 1 - variance / result.dispersion * np.einsum("ka,ab,kb->k", design, np.linalg.inv(hessian), design)
    ratio = max(((y - p) ** 2).sum() / (variance @ free), 0.5 if set(y) == {0.5} else 1e-3)
    expected = min(ratio, 1) ** (free.sum() / (free.sum() + 2 / 1.5**2))
    assert result.dispersion == pytest.approx(expected, rel=1e-3)
