from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.labels.quality.swiss import BYE_POINTS, Swiss


def ids(n: int) -> list[str]:
    return [f"p{k:03d}" for k in range(n)]


def play(swiss: Swiss, seed: int = 0, abstain: float = 0.0):
    """Play to the end with seeded outcomes that depend on the pair alone; rounds, byes and results."""
    rounds, byes, results = [], [], []
    while pairs := swiss.next_round():
        for a, b in pairs:
            rng = np.random.default_rng([seed, *map(ord, min(a, b) + max(a, b))])
            drawn = None if rng.random() < abstain else rng.random()
            outcome = drawn if drawn is None or a < b else 1 - drawn
            results.append((a, b, outcome))
        rounds.append(pairs)
        byes.append(swiss.bye)
        for result in results[-len(pairs):]:
            swiss.record(*result)
    return rounds, byes, results


@settings(max_examples=300, deadline=None)
@given(n=st.integers(2, 40), seed=st.integers(0, 2**62), rounds=st.none() | st.integers(0, 45),
       abstain=st.sampled_from([0.0, 0.3, 1.0]))
def test_everyone_plays_every_round_against_somebody_new_and_nobody_sits_out_twice(n, seed, rounds, abstain):
    swiss = Swiss(ids(n), seed, rounds)
    played, byes, _ = play(swiss, seed % 1000, abstain)
    assert len(played) == swiss.rounds
    for pairs, bye in zip(played, byes, strict=True):
        present = [player for pair in pairs for player in pair] + ([bye] if bye else [])
        assert sorted(present) == ids(n)
        assert (bye is not None) == (n % 2 == 1)
    met = [frozenset(pair) for pairs in played for pair in pairs]
    assert len(met) == len(set(met)), "a rematch"
    given_byes = [bye for bye in byes if bye]
    assert len(given_byes) == len(set(given_byes)), "a second bye"


def test_rounds_are_log2_of_the_players_plus_the_extra_ones():
    assert Swiss(ids(396), 0).rounds == math.ceil(math.log2(396)) + 1 == 10
    assert Swiss(ids(16), 0, extra_rounds=3).rounds == 7
    assert Swiss(ids(16), 0, rounds=2).rounds == 2


@pytest.mark.parametrize("n", range(2, 12))
def test_no_more_rounds_than_a_round_robin_which_meets_every_pair_once(n):
    played, _, _ = play(Swiss(ids(n), 3, rounds=1000))
    met = sorted(tuple(sorted(pair)) for pairs in played for pair in pairs)
    assert met == list(itertools.combinations(ids(n), 2))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_players_have_nothing_to_play(n):
    swiss = Swiss(ids(n), 0)
    assert swiss.rounds == 0 and swiss.finished and swiss.next_round() == []


@pytest.mark.parametrize("n", [5, 6, 9, 30, 31])
def test_the_order_in_which_players_are_given_does_not_matter(n):
    shuffled = list(np.random.default_rng(1).permutation(ids(n)))
    first, second = play(Swiss(ids(n), 7)), play(Swiss([str(player) for player in shuffled], 7))
    assert first == second
    assert play(Swiss(ids(n), 8))[0] != first[0]


def test_neighbours_in_the_standings_meet():
    """Player k always beats those after it: after the first rounds, points differ little within a pair."""
    swiss = Swiss(ids(64), 0)
    gaps = []
    while pairs := swiss.next_round():
        gaps.append(max(abs(swiss.points[a] - swiss.points[b]) for a, b in pairs))
        for a, b in pairs:
            swiss.record(a, b, 1.0 if a < b else 0.0)
    assert max(gaps) <= 2.0
    assert max(swiss.points, key=swiss.points.__getitem__) == "p000"
    assert min(swiss.points, key=swiss.points.__getitem__) == "p063"


def test_a_bye_is_worth_the_mean_of_a_comparison_and_goes_to_the_last():
    swiss = Swiss(ids(9), 5, rounds=3)
    for a, b in swiss.next_round():
        swiss.record(a, b, 1.0 if a < b else 0.0)
    first = swiss.bye
    assert first is not None and swiss.points[first] == BYE_POINTS == 0.5
    before = dict(swiss.points)
    swiss.next_round()
    assert swiss.bye is not None and before[swiss.bye] == 0.0 == min(before.values())


def test_an_abstention_gives_no_points_and_spends_the_pair():
    swiss = Swiss(ids(4), 0)
    pairs = swiss.next_round()
    for a, b in pairs:
        swiss.record(b, a, None)
    assert set(swiss.points.values()) == {0.0}
    assert not {frozenset(pair) for pair in swiss.next_round()} & {frozenset(pair) for pair in pairs}


def test_recording_in_the_other_order_shares_the_win_the_other_way():
    swiss = Swiss(ids(2), 0)
    [(a, b)] = swiss.next_round()
    swiss.record(b, a, 0.25)
    assert (swiss.points[a], swiss.points[b]) == (0.75, 0.25)


@pytest.mark.parametrize("n", [6, 21, 40])
def test_both_places_are_shown_about_equally_often_for_every_player(n):
    played, _, _ = play(Swiss(ids(n), 2))
    firsts = [a for pairs in played for a, _ in pairs]
    seconds = [b for pairs in played for _, b in pairs]
    assert max(abs(firsts.count(player) - seconds.count(player)) for player in ids(n)) <= 3


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="repeated"):
        Swiss(["a", "a"], 0)
    with pytest.raises(ValueError, match="seed"):
        Swiss(ids(2), -1)
    swiss = Swiss(ids(4), 0)
    [(a, b), (c, _)] = swiss.next_round()
    with pytest.raises(RuntimeError, match="2 pairs"):
        swiss.next_round()
    with pytest.raises(ValueError, match="not a pending pair"):
        swiss.record(a, c, 0.5)
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="outcome"):
            swiss.record(a, b, bad)


def test_396_players_are_paired_in_well_under_a_second():
    started = time.perf_counter()
    play(Swiss(ids(396), 0))
    assert time.perf_counter() - started < 2.0
