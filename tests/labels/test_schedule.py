from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.labels.quality import bradley_terry
from tasks.labels.quality.schedule import Rules, Schedule, most_comparisons, schedule
from tasks.labels.quality.swiss import Swiss

TOP, RANKING = Rules(schedule="top_k"), Rules(schedule="ranking")


def ids(n: int) -> list[str]:
    return [f"p{k:03d}" for k in range(n)]


class Judge:
    """Outcomes by the pair alone: asked again, in whatever order, it says the same."""

    def __init__(self, n: int, seed: int, kind: str = "hard", abstain: float = 0.0, spread: float = 1.0) -> None:
        self.true = np.random.default_rng([seed, n]).normal(size=n) * spread
        self._seed, self._kind, self._abstain = seed, kind, abstain

    def __call__(self, a: str, b: str) -> float | None:
        i, j = sorted((int(a[1:]), int(b[1:])))
        rng = np.random.default_rng([self._seed, i, j])
        p = 1 / (1 + math.exp(self.true[j] - self.true[i]))
        if rng.random() < self._abstain:
            return None
        share = {"hard": rng.binomial(2, p) / 2, "noiseless": p, "coin": rng.binomial(2, 0.5) / 2,
                 "soft": 1 / (1 + math.exp(self.true[j] - self.true[i] - 0.7 * rng.normal()))}[self._kind]
        return share if a == ids(i + 1)[i] else 1 - share


def play(games: Schedule, judge: Judge) -> tuple[list[list[tuple[str, str]]], list[tuple[str, str, float | None]]]:
    """The rounds and the results of a tournament played to its end."""
    rounds, results = [], []
    while pairs := games.next_round():
        rounds.append(pairs)
        assert games.rounds_started == len(rounds) <= 500
        for a, b in pairs:
            results.append((a, b, judge(a, b)))
            games.record(*results[-1])
    assert games.next_round() == []
    return rounds, results


def ratings(n: int, results: list[tuple[str, str, float | None]]) -> np.ndarray:
    judged = [(int(a[1:]), int(b[1:]), y) for a, b, y in results if y is not None]
    i, j, y = (np.array(column) for column in zip(*judged, strict=True))
    return bradley_terry.fit(n, i, j, y, prior_sd=1.5).rating.filled(0.0)


def precision(rating: np.ndarray, true: np.ndarray, top: int = 5) -> float:
    return len(set(np.argsort(-rating)[:top]) & set(np.argsort(-true)[:top])) / top


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 40), seed=st.integers(0, 2**62), kind=st.sampled_from(["hard", "soft", "noiseless", "coin"]),
       abstain=st.sampled_from([0.0, 0.3, 0.9, 1.0]), which=st.sampled_from(["top_k", "ranking"]),
       top=st.integers(1, 45), stop=st.sampled_from(["settled", "rounds"]), rounds=st.none() | st.integers(1, 50))
def test_pairs_are_fresh_and_within_the_bound_and_every_tournament_ends(n, seed, kind, abstain, which, top, stop,
                                                                       rounds):
    rules = Rules(schedule=which, top=top, stop=stop, rounds=rounds)
    games = schedule(ids(n), seed, rules)
    played, results = play(games, Judge(n, seed % 1000, kind, abstain))
    met = [frozenset(pair) for pairs in played for pair in pairs]
    assert all(len(pair) == 2 and pair <= set(ids(n)) for pair in met)
    assert len(met) == len(set(met)), "a rematch"
    for pairs in played:
        assert max(Counter(itertools.chain(*pairs)).values()) == 1, "two comparisons of a player in one round"
    assert len(results) <= most_comparisons(n, rules)
    if n < 2:
        assert games.settled is None
    elif stop == "rounds" and which == "ranking":
        assert len(results) == most_comparisons(n, rules)
    else:
        assert games.settled in (True, False)
    if abstain == 1.0:
        assert not games.settled


@pytest.mark.parametrize("rules", [TOP, RANKING], ids=lambda rules: rules.schedule)
@pytest.mark.parametrize("n", [5, 6, 31, 64])
def test_the_order_of_players_and_of_results_does_not_matter(rules, n):
    judge = Judge(n, 3, abstain=0.1)
    rounds, _ = play(schedule(ids(n), 7, rules), judge)
    other = schedule([ids(n)[k] for k in np.random.default_rng(0).permutation(n)], 7, rules)
    again = []
    while pairs := other.next_round():
        again.append(pairs)
        for a, b in reversed(pairs):
            outcome = judge(b, a)
            other.record(b, a, outcome)
    assert again == rounds
    assert play(schedule(ids(n), 8, rules), judge)[0] != rounds


@pytest.mark.parametrize("rounds", [None, 3])
@pytest.mark.parametrize("top", [1, 5, 64])
def test_a_top_k_never_costs_more_than_a_ranking_and_the_bound_grows_with_the_players(top, rounds):
    bounds = []
    for n in range(400):
        top_k, ranking = (most_comparisons(n, Rules(schedule=which, top=top, rounds=rounds))
                          for which in ("top_k", "ranking"))
        assert top_k <= ranking == Swiss(ids(n), 0, rounds).rounds * (n // 2)
        bounds.append(top_k)
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("n", [64, 143, 396])
def test_a_top_5_costs_two_fifths_of_a_swiss_tournament(n):
    assert most_comparisons(n, TOP) == math.ceil(0.4 * (math.ceil(math.log2(n)) + 1) * (n // 2))


def test_a_noiseless_judge_ends_it_early_and_the_top_is_right():
    """Players at equal distances: none is so near the boundary that it could not be told."""
    rules = dataclasses.replace(TOP, rounds=8)
    for seed in range(5):
        judge = Judge(64, seed, "noiseless")
        judge.true = np.random.default_rng(seed).permutation(64).astype(np.float64) * 0.15
        games = schedule(ids(64), seed, rules)
        _, results = play(games, judge)
        assert games.settled
        assert len(results) < 0.75 * most_comparisons(64, rules)
        assert precision(ratings(64, results), judge.true) == 1.0
        later = schedule(ids(64), seed, dataclasses.replace(rules, stop="rounds"))
        assert len(play(later, judge)[1]) > len(results)


def test_an_even_coin_settles_nothing():
    """Every ranking is as right as any: whatever is claimed is claimed wrongly."""
    claims = []
    for seed in range(12):
        for rules in (TOP, RANKING):
            games = schedule(ids(48), seed, rules)
            play(games, Judge(48, seed, "coin"))
            claims.append(games.settled)
    assert sum(claims) <= (1 - 0.95) * len(claims) + 1


def test_a_top_that_is_said_to_be_settled_is_right_as_often_as_said():
    """Mean precision among the settled, at a confidence that judges of this noise reach."""
    rules = Rules(confidence=0.8, rounds=50)
    right = []
    for seed in range(30):
        judge = Judge(32, seed, "soft", spread=1.5)
        games = schedule(ids(32), seed, rules)
        _, results = play(games, judge)
        if games.settled:
            right.append(precision(ratings(32, results), judge.true))
    assert len(right) >= 20
    assert np.mean(right) >= 0.8 - 2 * np.std(right) / math.sqrt(len(right))


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    tau: Any = scipy.stats.kendalltau(a, b)
    return float(tau.statistic)


def play_plainly(judge: Judge, n: int, rounds: int, seed: int) -> list[tuple[str, str, float | None]]:
    """A Swiss tournament of wins and draws without memory: rematches, no seeding."""
    rng, points, results = np.random.default_rng([seed, 99]), dict.fromkeys(ids(n), 0.0), []
    for _ in range(rounds):
        order = sorted(rng.permutation(ids(n)).tolist(), key=lambda player: -points[player])
        for a, b in zip(order[::2], order[1::2], strict=False):
            share = judge(a, b)
            won = 0.5 if share is None else 0.5 + 0.5 * np.sign(share - 0.5)
            points[a] += won
            points[b] += 1 - won
            results.append((a, b, won))
    return results


@pytest.fixture(scope="module")
def compared() -> dict[str, dict[str, float]]:
    """Mean top-5 precision and Kendall's tau of four schedules, on the same 30 groups of 64 players and a soft judge."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for seed in range(30):
        judge = Judge(64, seed, "soft")
        played = {"plain": play_plainly(judge, 64, 7, seed)}
        for name, rules in {"top_k": TOP, "ranking": dataclasses.replace(RANKING, stop="rounds"),
                            "ranking, 3 rounds": dataclasses.replace(RANKING, stop="rounds", rounds=3)}.items():
            played[name] = play(schedule(ids(64), seed, rules), judge)[1]
        for name, results in played.items():
            rating = ratings(64, results)
            scores.setdefault(name, []).append((precision(rating, judge.true), kendall(rating, judge.true)))
    return {name: dict(zip(("top", "tau"), np.mean(found, axis=0).tolist(), strict=True))
            for name, found in scores.items()}


def test_a_top_5_for_two_fifths_of_the_calls_is_as_right_as_a_plain_swiss_tournament(compared):
    assert compared["top_k"]["top"] >= compared["plain"]["top"]


def test_a_top_5_is_righter_than_a_ranking_at_equal_calls(compared):
    """90 pairs against 96."""
    assert compared["top_k"]["top"] > compared["ranking, 3 rounds"]["top"] + 0.06


def test_a_ranking_ranks_at_least_as_well_as_a_plain_swiss_tournament_at_equal_calls(compared):
    assert compared["ranking"]["tau"] >= compared["plain"]["tau"]


def test_a_ranking_ends_once_its_ratings_are_reliable():
    judge = Judge(64, 1, "noiseless", spread=2.0)
    rules = dataclasses.replace(RANKING, rounds=30, reliability=0.9)
    games = schedule(ids(64), 0, rules)
    rounds, results = play(games, judge)
    assert games.settled and len(rounds) < 30
    assert np.corrcoef(ratings(64, results), judge.true)[0, 1] ** 2 >= 0.9
    strict = schedule(ids(64), 0, dataclasses.replace(rules, reliability=0.99999))
    assert len(play(strict, judge)[0]) == 30 and strict.settled is False


def test_a_ranking_of_few_players_can_end_early_too():
    """The level that all ratings share is known to no comparison, and is no uncertainty of theirs."""
    games = schedule(ids(7), 0, dataclasses.replace(RANKING, rounds=6, reliability=0.95))
    assert len(play(games, Judge(7, 0, "noiseless", spread=2.0))[0]) < 6


def test_no_more_players_than_places_in_the_top_play_a_ranking():
    for n in range(6):
        judge = Judge(n, 0)
        assert play(schedule(ids(n), 0, TOP), judge) == play(schedule(ids(n), 0, RANKING), judge)


def test_a_player_whom_the_judge_cannot_judge_is_given_up():
    judge = Judge(40, 0, "soft")
    games = schedule(ids(40), 0, dataclasses.replace(TOP, stop="rounds"))
    tried = 0
    while pairs := games.next_round():
        for a, b in pairs:
            mute = "p007" in (a, b)
            tried += mute
            games.record(a, b, None if mute else judge(a, b))
    assert tried == 4


def test_misuse_is_refused():
    for rules in (TOP, RANKING):
        with pytest.raises(ValueError, match="repeated"):
            schedule(["a", "a"], 0, rules)
        with pytest.raises(ValueError, match="seed"):
            schedule(ids(9), -1, rules)
        games = schedule(ids(9), 0, rules)
        [(a, b), (c, _), *_] = games.next_round()
        with pytest.raises(RuntimeError, match="4 pairs"):
            games.next_round()
        with pytest.raises(ValueError, match="not a pending pair"):
            games.record(a, c, 0.5)
        for bad in (1.5, -0.1, float("nan")):
            with pytest.raises(ValueError, match="outcome"):
                games.record(a, b, bad)
        games.record(b, a, 0.25)
        with pytest.raises(ValueError, match="not a pending pair"):
            games.record(a, b, 0.5)
    with pytest.raises(ValueError, match="top"):
        schedule(ids(9), 0, Rules(top=0))
