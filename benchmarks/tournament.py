"""Tournaments at their price: how right a ranking is against the judge calls it costs.

Players have true ratings N(0, spread) and play in simulation: a soft judge tells the probability of a win with
noise on its logit, a hard one tosses a coin of that probability; each pair in both orders, a call each. Failed
calls are abstentions of the pair for ours and 0.5 for the baseline, which is:

* seed: ceil(log2 n) + 1 Swiss rounds, unseeded, rematches and repeated byes (a point each); won, drawn or lost by
  the mean outcome; ratings by 1000 steps of gradient descent on the likelihood.

Against it: random pairs, `ranking` and `top_k` as by default (but for --stop-early: play all), a full round
robin. tau: Kendall's, with the true ratings. top 1, top 5: share of the true best found. The last column is
CPU of schedule and fit. Below: the calls at which top_k is as right about the top 5 as the seed, as a share of
the seed's (a line through its precision at a few budgets; "<" where the least of them is enough).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness  # sets the threads, before numpy is there
import numpy as np
import tournament_sim as sim
from scipy.stats import kendalltau

from tasks.labels.quality.schedule import Rules, schedule
from tasks.labels.quality.top_k import TopK

GOAL = 0.4
SHARES = (0.2, 0.3, 0.4, 0.6)
KINDS = ("seed", "random", "ranking", "top_k", "round robin")
ALL = Rules(stop="rounds")
QUICK = {16: 20, 64: 20, 143: 10, 396: 3}
FULL = {16: 300, 64: 300, 143: 150, 396: 60}
ROBINS = {143: 3, 396: 1}
"""Full round robins are dear: no more than so many of them, and in quick runs none of 396."""


@dataclasses.dataclass
class Scores:
    """What one kind of tournament reached, one entry a repeat."""

    tau: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    top: list[float] = dataclasses.field(default_factory=list)
    calls: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def add(self, rating: sim.Floats, judge: sim.Judge, cpu_s: float) -> None:
        """Score ratings."""
        n = len(rating)
        tau: Any = kendalltau(rating, judge.true)
        self.tau.append(float(tau.statistic))
        self.first.append(float(np.argmax(rating) == np.argmax(judge.true)))
        self.top.append(sim.precision(rating, judge.true))
        self.calls.append(judge.calls / n)
        self.cpu.append(cpu_s / n * 1e3)

    def cells(self) -> list[str]:
        """For a table."""
        if not self.tau:
            return ["-"] * 5
        means = (float(np.mean(values)) for values in (self.tau, self.first, self.top, self.calls, self.cpu))
        return [f"{mean:.{digits}f}" for mean, digits in zip(means, (3, 2, 3, 1, 2), strict=True)]


def main() -> None:
    """Print a table for each number of players."""
    chosen = harness.options(__doc__, repeats=(0, "repeats of each; 0 for as many as fit"),
                             bias=(0, "hundredths of a logit in favour of the first shown"),
                             intransitive=(0, "sd of a pair's own whim, hundredths of a logit"),
                             pairs=(0, "1: whole comparisons fail, not single calls"),
                             players=(0, "only so many players"))
    goals: list[list[Any]] = []
    for n, repeats in (FULL if chosen.full else QUICK).items():
        if chosen.players not in (0, n):
            continue
        rows = []
        for hard in (False, True):
            for failures in (0.0, 0.1, 0.2):
                settings = sim.JudgeSettings(hard, failures, bias=chosen.bias / 100, whole_pairs=bool(chosen.pairs),
                                             intransitive=chosen.intransitive / 100)
                scores, ratio = compare(n, settings, chosen.repeats or repeats, chosen.full)
                label = f"{'hard' if hard else 'soft'}, {failures:.0%}"
                rows += [[label if kind == "seed" else "", kind, *scores[kind].cells()] for kind in KINDS]
                goals.append([f"{n}, {label}", f"{np.mean(scores['seed'].top):.3f}",
                              f"{np.mean(scores['top_k'].top):.3f}",
                              f"{np.sum(scores['top_k'].calls) / np.sum(scores['seed'].calls):.2f}", ratio.text,
                              "-" if n < 64 else harness.verdict(ratio.value <= GOAL)])
        harness.show(f"{n} players, {chosen.repeats or repeats} repeats",
                     ["judge, failures", "", "tau", "top 1", "top 5", "calls/player", "CPU ms/player"], rows)
    harness.show("top 5 as right as the seed's", ["players, judge", "seed", "top_k", "top_k's calls / seed's",
                                                 "calls for the seed's precision / seed's", f"<= {GOAL}"], goals)


@dataclasses.dataclass
class Ratio:
    """Calls of top_k over calls of the seed, at the seed's precision."""

    value: float
    text: str


def compare(n: int, settings: sim.JudgeSettings, repeats: int, full: bool) -> tuple[dict[str, Scores], Ratio]:
    """Play every kind of tournament `repeats` times, each on the same players."""
    scores = {kind: Scores() for kind in KINDS}
    at_share: dict[float, list[float]] = {share: [] for share in SHARES}
    rounds = math.ceil(math.log2(n)) + 1
    pairs = rounds * (n // 2)
    robins = min(repeats, ROBINS.get(n, repeats)) if full or n < 396 else 0
    baseline: list[tuple[sim.Played, sim.Judge, float]] = []
    for repeat in range(repeats):
        rng = np.random.default_rng((repeat, n, 1))

        def judge(kind: int, repeat: int = repeat) -> sim.Judge:
            return sim.Judge(n, settings, repeat, kind)

        asked = judge(0)
        cpu, played = timed(sim.seeds_swiss, asked, n, rounds, rng)
        baseline.append((played, asked, cpu))
        for kind, games in (("ranking", dataclasses.replace(ALL, schedule="ranking")), ("top_k", ALL)):
            asked = judge(KINDS.index(kind))
            cpu, played = timed(sim.ours, asked, schedule(sim.names(n), repeat, games), n)
            fit, rating = timed(sim.rate, played)
            scores[kind].add(rating, asked, cpu + fit)
        asked = judge(1)
        cpu, played = timed(sim.random_pairs, asked, n, pairs, rng)
        fit, rating = timed(sim.rate, played)
        scores["random"].add(rating, asked, cpu + fit)
        if repeat < robins:
            asked = judge(4)
            cpu, played = timed(sim.round_robin, asked, n)
            fit, rating = timed(sim.rate, played)
            scores["round robin"].add(rating, asked, cpu + fit)
        for k, share in enumerate(SHARES):
            asked = judge(5 + k)
            games = TopK(sim.names(n), repeat, 5, round(share * pairs), 0.95, stop_early=False)
            at_share[share].append(sim.precision(sim.rate(sim.ours(asked, games, n)), asked.true))
    # side by side for speed; the price of one fit is that of one alone
    ratings = sim.descend([played for played, _, _ in baseline])
    fit, _ = timed(sim.descend, [baseline[0][0]])
    for (_, asked, cpu), rating in zip(baseline, ratings, strict=True):
        scores["seed"].add(rating, asked, cpu + fit)
    return scores, ratio_at([float(np.mean(at_share[share])) for share in SHARES], float(np.mean(scores["seed"].top)))


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """CPU seconds without those in which the judge thought, and what came of it."""
    judges = [a for a in arguments if isinstance(a, sim.Judge)]
    started, thought = time.process_time(), sum(j.cpu_s for j in judges)
    result = work(*arguments)
    return time.process_time() - started - (sum(j.cpu_s for j in judges) - thought), result


def ratio_at(precision: Sequence[float], wanted: float) -> Ratio:
    """Where the line through (SHARES, precision) first reaches what is wanted."""
    if precision[0] >= wanted:
        return Ratio(SHARES[0], f"< {SHARES[0]}")
    for k in range(1, len(SHARES)):
        if precision[k] >= wanted:
            part = (wanted - precision[k - 1]) / (precision[k] - precision[k - 1])
            value = SHARES[k - 1] + part * (SHARES[k] - SHARES[k - 1])
            return Ratio(value, f"{value:.2f}")
    return Ratio(math.inf, f"> {SHARES[-1]}")


if __name__ == "__main__":
    main()
