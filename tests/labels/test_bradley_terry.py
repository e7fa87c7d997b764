from __future__ import annotations

import logging
import time

import choix
import numpy as np
import pytest
from scipy.optimize import minimize

from tasks.labels.quality.bradley_terry import fit


def tournament(n: int, m: int, seed: int, soft: bool = True):
    """m random comparisons among n players; players i, j, outcomes."""
    rng = np.random.default_rng(seed)
    i = rng.integers(n, size=m)
    j = (i + rng.integers(1, n, size=m)) % n
    truth = rng.normal(size=n)
    p = 1 / (1 + np.exp(truth[j] - truth[i]))
    y = np.clip(p + 0.2 * rng.normal(size=m), 0.02, 0.98) if soft else (rng.random(m) < p).astype(float)
    return i, j, y


@pytest.mark.parametrize(("n", "m", "seed"), [(2, 3, 0), (5, 20, 1), (12, 80, 2), (40, 300, 3)])
def test_a_flat_prior_gives_the_maximum_likelihood_of_choix(n, m, seed):
    i, j, y = tournament(n, m, seed)
    weight = np.random.default_rng(seed).uniform(0.5, 3, size=m)
    wins = np.zeros((n, n))
    np.add.at(wins, (i, j), weight * y)
    np.add.at(wins, (j, i), weight * (1 - y))
    reference = choix.ilsr_pairwise_dense(wins, alpha=0, max_iter=1000, tol=1e-12)
    result = fit(n, i, j, y, weight, prior_sd=1e6)
    assert result.converged and result.connected and not result.separated
    np.testing.assert_allclose(result.rating, reference - reference.mean(), atol=1e-6)


@pytest.mark.parametrize(("prior_sd", "soft"), [(0.7, True), (2.5, False), (10.0, False)])
def test_the_mode_and_its_errors_equal_those_of_a_general_optimiser(prior_sd, soft):
    n = 6
    i, j, y = tournament(n, 15, 4, soft)
    weight = np.random.default_rng(0).uniform(0, 2, size=len(i))

    def loss(r):
        d = r[i] - r[j]
        likelihood = weight * (y * np.log(1 / (1 + np.exp(-d))) + (1 - y) * np.log(1 / (1 + np.exp(d))))
        return -likelihood.sum() + (r**2).sum() / 2 / prior_sd**2

    best = minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-9}).x
    result = fit(n, i, j, y, weight, prior_sd, dispersion=1.0)
    np.testing.assert_allclose(result.rating, best, atol=1e-5)
    assert loss(np.asarray(result.rating)) <= loss(best) + 1e-12
    # The Hessian by central differences, inverted in an orthonormal basis of the ratings with mean 0.
    h, eye = 1e-4, np.eye(n)
    hessian = np.array([[(loss(best + h * (a + b)) - loss(best + h * (a - b)) - loss(best - h * (a - b))
                          + loss(best - h * (a + b))) / (4 * h * h) for b in eye] for a in eye])
    basis = np.linalg.svd(np.ones((1, n)))[2][1:].T
    covariance = basis @ np.linalg.inv(basis.T @ hessian @ basis) @ basis.T
    np.testing.assert_allclose(result.se, np.sqrt(np.diag(covariance)), rtol=1e-4)
    prior = -(np.asarray(result.rating) ** 2).sum() / 2 / prior_sd**2
    assert result.log_likelihood + prior == pytest.approx(-loss(np.asarray(result.rating)))


def test_two_players_have_the_closed_form():
    """9 wins to 3, flat prior: difference log 3, variance of it 1/9 + 1/3; half of each for a rating."""
    result = fit(2, [0, 0], [1, 1], [1.0, 0.0], [9, 3], prior_sd=1e6)
    np.testing.assert_allclose(result.rating, [np.log(3) / 2, -np.log(3) / 2], atol=1e-9)
    np.testing.assert_allclose(result.se, np.sqrt(1 / 9 + 1 / 3) / 2, rtol=1e-6)
    assert result.log_likelihood == pytest.approx(9 * np.log(0.75) + 3 * np.log(0.25))


def test_renumbering_the_players_renumbers_the_ratings():
    n = 15
    i, j, y = tournament(n, 60, 5)
    new = np.random.default_rng(1).permutation(n)
    before, after = fit(n, i, j, y), fit(n, new[i], new[j], y)
    np.testing.assert_allclose(after.rating[new], before.rating, atol=1e-9)
    np.testing.assert_allclose(after.se[new], before.se, atol=1e-9)


def test_order_and_direction_of_the_comparisons_do_not_matter():
    i, j, y = tournament(10, 50, 6)
    flip = np.random.default_rng(2).random(50) < 0.5
    before = fit(10, i, j, y)
    after = fit(10, np.where(flip, j, i)[::-1], np.where(flip, i, j)[::-1], np.where(flip, 1 - y, y)[::-1])
    np.testing.assert_allclose(after.rating, before.rating, atol=1e-9)


def test_ratings_have_mean_0_and_depend_on_differences_of_the_truth_alone():
    i, j, _ = tournament(10, 60, 7)
    truth = np.random.default_rng(3).normal(size=10)
    for shift in (0.0, 5.0):
        shifted = truth + shift
        y = 1 / (1 + np.exp(shifted[j] - shifted[i]))
        result = fit(10, i, j, y, prior_sd=1e6)
        np.testing.assert_allclose(result.rating, truth - truth.mean(), atol=1e-7)


def test_a_weight_counts_as_so_many_comparisons():
    i, j, y = tournament(8, 30, 8)
    twice = fit(8, np.tile(i, 2), np.tile(j, 2), np.tile(y, 2), prior_sd=2.5)
    weighted = fit(8, i, j, y, np.full(30, 2.0), prior_sd=2.5)
    assert weighted.dispersion == pytest.approx(twice.dispersion) and weighted.dispersion < 0.5
    np.testing.assert_allclose(weighted.rating, twice.rating, atol=1e-9)
    np.testing.assert_allclose(weighted.se, twice.se, atol=1e-9)
    assert (twice.comparisons == 2 * weighted.comparisons).all()


def test_players_without_a_comparison_are_masked_and_change_nothing():
    i, j, y = tournament(6, 25, 9)
    small, large = fit(6, i, j, y), fit(9, i + 1, j + 1, y)
    assert large.rating.tolist()[0] is None and large.se.tolist()[8] is None
    assert large.rated.tolist() == [False] + [True] * 6 + [False] * 2
    assert large.comparisons.tolist() == [0, *small.comparisons.tolist(), 0, 0]
    np.testing.assert_allclose(large.rating[1:7], small.rating, atol=1e-12)
    np.testing.assert_allclose(large.se[1:7], small.se, atol=1e-12)
    assert large.connected and len(set(large.component.tolist())) == 4
    assert fit(3, [0], [1], [0.5], [0.0]).rating.tolist() == [None, None, None]


@pytest.mark.parametrize("n", [0, 1, 4])
def test_a_group_without_comparisons_has_no_ratings(n):
    result = fit(n, [], [], [])
    assert result.rating.tolist() == result.se.tolist() == [None] * n
    assert result.converged and result.connected and not result.separated and result.log_likelihood == 0


def test_two_islands_are_flagged_and_each_keeps_mean_0():
    result = fit(5, [0, 0, 2, 3, 4], [1, 1, 3, 4, 2], [1.0, 0.0, 0.8, 0.7, 0.6])
    assert not result.connected and not result.separated
    assert result.component.tolist() == [0, 0, 1, 1, 1]
    assert result.rating[:2].sum() == pytest.approx(0) and result.rating[2:].sum() == pytest.approx(0)
    flat = fit(5, [0, 0, 2, 3, 4], [1, 1, 3, 4, 2], [1.0, 0.0, 0.8, 0.7, 0.6], prior_sd=1e4, dispersion=1.0)
    assert flat.converged and np.isfinite(flat.rating).all() and flat.se.min() > 1000


@pytest.mark.parametrize("prior_sd", [2.5, 1e6])
def test_a_player_that_always_wins_is_flagged_and_stays_finite(prior_sd):
    result = fit(3, [0, 0, 1, 1], [1, 2, 2, 2], [1.0, 1.0, 1.0, 0.0], prior_sd=prior_sd)
    assert result.separated and result.connected and result.converged
    assert np.isfinite(result.rating).all() and np.isfinite(result.se).all()
    assert result.rating.argmax() == 0 and result.se[0] > result.se[1]
    assert not fit(3, [0, 0, 1, 1, 2], [1, 2, 2, 2, 0], [1.0, 1.0, 1.0, 0.0, 0.01]).separated


def test_extreme_verdicts_and_weights_converge():
    i, j, y = tournament(30, 200, 10, soft=False)
    for weight in (1e-6, 1.0, 1e6):
        result = fit(30, i, j, y, np.full(200, weight))
        assert result.converged and np.isfinite(result.rating).all()
    chain = fit(50, np.arange(49), np.arange(1, 50), np.ones(49), np.full(49, 1000.0), prior_sd=1000.0)
    assert chain.converged and (np.diff(np.asarray(chain.rating)) < -5).all()


@pytest.mark.parametrize("seed", [225, 690, 1512, 2844])
def test_weights_of_all_sizes_converge_where_full_newton_steps_diverge(seed):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(3, 8)), int(rng.integers(2, 12))
    i = rng.integers(n, size=m)
    j = (i + rng.integers(1, n, size=m)) % n
    y = rng.choice([0, 1, 1e-3, 1 - 1e-3, 0.5], size=m)
    assert fit(n, i, j, y, 10 ** rng.uniform(-4, 4, size=m), prior_sd=100.0).converged


def test_no_convergence_is_flagged_and_logged(caplog):
    i, j, y = tournament(10, 50, 11)
    with caplog.at_level(logging.WARNING):
        assert not fit(10, i, j, y, max_iterations=1).converged
    assert "no convergence" in caplog.text


@pytest.mark.parametrize(("change", "message"), [
    ({"i": [0, 3]}, "numbered from 0"), ({"j": [1, -1]}, "numbered from 0"), ({"i": [0, 0.5]}, "integers"),
    ({"i": [1, 0]}, "itself"), ({"outcome": [0.5, 1.5]}, "outcome"), ({"outcome": [0.5, np.nan]}, "outcome"),
    ({"outcome": [0.5]}, "shapes"), ({"weight": [1.0, -1.0]}, "weight"),
    ({"weight": [1.0, np.inf]}, "weight"),
    ({"prior_sd": 0.0}, "prior_sd"), ({"prior_sd": "weak"}, "prior_sd"), ({"dispersion": -1.0}, "dispersion"),
    ({"dispersion": np.nan}, "dispersion"), ({"start": [0.0, 1.0]}, "start"),
])
def test_impossible_input_is_refused(change, message):
    arguments = {"i": [0, 0], "j": [1, 2], "outcome": [0.5, 0.5]} | change
    with pytest.raises(ValueError, match=message):
        fit(3, **arguments)


def test_396_players_take_well_under_a_second():
    i, j, y = tournament(396, 2000, 12)
    fit(2, [0], [1], [0.5])
    started = time.perf_counter()
    assert fit(396, i, j, y, prior_sd=2.5, dispersion=1.0).converged
    assert time.perf_counter() - started < 1.0


def test_a_start_saves_iterations_and_changes_no_rating():
    i, j, y = tournament(40, 300, 13)
    cold = fit(40, i, j, y, prior_sd=2.5, dispersion=1.0)
    assert not fit(40, i, j, y, prior_sd=2.5, dispersion=1.0, max_iterations=2).converged
    warm = fit(40, i, j, y, prior_sd=2.5, dispersion=1.0, start=cold.rating, max_iterations=2)
    assert warm.converged
    for start in (cold.rating, np.full(40, 7.0), np.ma.masked_all(40), np.full(40, np.nan)):
        again = fit(40, i, j, y, prior_sd=2.5, dispersion=1.0, start=start)
        np.testing.assert_allclose(again.rating, cold.rating, atol=1e-9)
        np.testing.assert_allclose(fit(40, i, j, y, start=start).rating, fit(40, i, j, y).rating, atol=0.02)


def test_a_start_of_any_mean_serves_islands():
    i, j, y = [0, 0, 2, 3, 4], [1, 1, 3, 4, 2], [1.0, 0.0, 0.8, 0.7, 0.6]
    cold = fit(5, i, j, y, prior_sd=1e3, dispersion=1.0)
    warm = fit(5, i, j, y, prior_sd=1e3, dispersion=1.0, start=[9.0, 9.0, -4.0, 0.0, 0.0])
    np.testing.assert_allclose(warm.rating, cold.rating, atol=1e-8)


@pytest.mark.parametrize(("n", "m", "seed"), [(2, 3, 0), (5, 20, 1), (12, 80, 2), (40, 300, 3)])
def test_newton_and_choix_agree_where_both_apply(n, m, seed):
    i, j, y = tournament(n, m, seed)
    by_choix, by_newton = fit(n, i, j, y, solver="choix"), fit(n, i, j, y, prior_sd=1e6)
    assert by_choix.solver == "choix" and by_newton.solver == "newton" and by_choix.prior_sd is None
    np.testing.assert_allclose(by_choix.rating, by_newton.rating, atol=1e-6)
    np.testing.assert_allclose(by_choix.se, by_newton.se, rtol=1e-3)
    assert by_choix.dispersion == pytest.approx(by_newton.dispersion, rel=1e-3)
    assert by_choix.log_likelihood == pytest.approx(by_newton.log_likelihood)


@pytest.mark.parametrize(("i", "j", "y"), [
    ([0, 0, 1, 1], [1, 2, 2, 2], [1.0, 1.0, 1.0, 0.0]),  # separated
    ([0, 0, 2, 3], [1, 1, 3, 4], [0.7, 0.2, 0.5, 0.5]),  # two islands
    ([0], [1], [1.0]), ([], [], []),
])
def test_where_choix_has_no_answer_newton_gives_one_and_says_so(i, j, y):
    result, ours = fit(5, i, j, y, solver="choix"), fit(5, i, j, y)
    assert result.solver == "newton" and result.prior_sd is not None
    assert result.rating.tolist() == ours.rating.tolist() and result.prior_sd == ours.prior_sd


def test_choix_that_does_not_converge_is_replaced(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Did not converge")

    monkeypatch.setattr(choix, "ilsr_pairwise_dense", fails)
    i, j, y = tournament(5, 20, 1)
    assert fit(5, i, j, y, solver="choix").solver == "newton"
    monkeypatch.setattr(choix, "ilsr_pairwise_dense", lambda *_, **__: np.full(5, np.nan))
    assert fit(5, i, j, y, solver="choix").solver == "newton"
