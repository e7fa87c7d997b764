"""How many true ratings lie within 1.96 standard errors of the fitted ones (aim: 93 to 97 %).

    .venv/bin/python benchmarks/coverage.py

Groups with true ratings drawn from normal distributions, random pairs or our Swiss tournament, four kinds of verdict:

* toss: one toss by the true probability; two tosses: the mean of two;
* soft 0.5, soft 1: the true probability, with normal noise of so many logits on its log odds.

A line is the share over all players of all groups, with its standard error over groups. --percent of the verdicts are
abstentions. A minute of CPU; --full: five times the groups.
"""

from __future__ import annotations

import argparse
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from tasks.labels.quality.bradley_terry import fit
from tasks.labels.quality.swiss import Swiss

VERDICTS = ("toss", "two tosses", "soft 0.5", "soft 1")
PLAYERS = {8: (240, 6), 16: (120, 7), 64: (30, 8), 143: (15, 10)}
"""Groups and rounds by number of players."""


def verdict(kind: str, ahead: float, rng: np.random.Generator) -> float:
    """Of a judge who sees the first `ahead` by so many logits."""
    noise = float(kind.split()[1]) * rng.normal() if kind.startswith("soft") else 0.0
    p = 1 / (1 + np.exp(-ahead - noise))
    tosses = {"toss": 1, "two tosses": 2}.get(kind)
    return float(p) if tosses is None else rng.binomial(tosses, p) / tosses


def group(
    n: int, spread: float, rounds: int, kind: str, swiss: bool, abstained: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """True ratings (n,) with mean 0; first players, second players, outcomes (m,) of one group."""
    truth = rng.normal(0, spread, n)
    truth -= truth.mean()
    results: list[tuple[int, int, float]] = []

    def judge(a: int, b: int) -> float | None:
        if rng.random() < abstained:
            return None
        results.append((a, b, verdict(kind, truth[a] - truth[b], rng)))
        return results[-1][2]

    if swiss:
        tournament = Swiss([f"{player:04d}" for player in range(n)], int(rng.integers(2**31)), rounds)
        while pairs := tournament.next_round():
            for a, b in pairs:
                tournament.record(a, b, judge(int(a), int(b)))
    else:
        for _ in range(rounds):
            seats = rng.permutation(n)
            for a, b in zip(seats[0 : n - 1 : 2], seats[1::2], strict=True):
                judge(int(a), int(b))
    first, second, outcome = zip(*results, strict=True)
    return truth, np.array(first), np.array(second), np.array(outcome)


def coverage(groups: int, seed: int, *setting: object, **options: object) -> tuple[float, float, float, float]:
    """Share of true ratings within 1.96 errors, its error over groups; medians of prior_sd and dispersion."""
    rng = np.random.default_rng(seed)
    shares, used = [], []
    for _ in range(groups):
        truth, first, second, outcome = group(*setting, rng)  # type: ignore[arg-type]
        result = fit(len(truth), first, second, outcome, **options)  # type: ignore[arg-type]
        rated = result.rated
        # Ratings have mean 0 over the rated: the truth they estimate has too.
        off = np.abs(result.rating - (truth - truth[rated].mean()))[rated]
        shares.append(float(np.mean(off <= 1.96 * result.se[rated])))
        used.append((result.prior_sd, result.dispersion))
    prior_sd, dispersion = np.median(np.array(used, float), axis=0)
    return float(np.mean(shares)), float(np.std(shares) / len(shares) ** 0.5), prior_sd, dispersion


def main() -> None:
    """Print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="five times the groups")
    parser.add_argument("--percent", type=float, default=0.0, help="abstentions (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verdicts", nargs="+", default=list(VERDICTS), choices=VERDICTS)
    parser.add_argument("--players", nargs="+", type=int, default=list(PLAYERS))
    chosen = parser.parse_args()
    print("players rounds pairs  verdict     spread   within 1.96 se     prior_sd dispersion")
    cells = itertools.product(chosen.verdicts, chosen.players, (False, True), (0.5, 1.0, 2.0))
    for number, (kind, n, swiss, spread) in enumerate(cells):
        groups, rounds = PLAYERS.get(n, (max(3, 2000 // n), 8))
        share, error, sd, dispersion = coverage(
            groups * (5 if chosen.full else 1), chosen.seed + number, n, spread, rounds, kind, swiss,
            chosen.percent / 100)
        print(f"{n:7d} {rounds:6d} {'Swiss' if swiss else 'random':6s} {kind:11s} {spread:6.1f}   "
              f"{100 * share:5.1f} % +- {100 * error:3.1f}   {sd:10.2f} {dispersion:10.3f}", flush=True)


if __name__ == "__main__":
    main()
