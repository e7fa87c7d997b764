"""One tournament: the candidates of a (prompt, seed), compared until they are ranked, and rated.

Equal texts share one player.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from tasks.context import Context
from tasks.core.config import RunConfig
from tasks.core.identity import digest
from tasks.labels.quality import bradley_terry
from tasks.labels.quality.asking import Answer
from tasks.labels.quality.judge import Judge
from tasks.labels.quality.schedule import Rules, most_comparisons, schedule

Row = dict[str, Any]
T = TypeVar("T")


def rules_of(config: RunConfig) -> Rules:
    """What the config says of a tournament."""
    quality = config.quality
    return Rules(schedule=quality.schedule, top=config.quality_top, confidence=quality.confidence,
                 reliability=quality.reliability, rounds=quality.rounds, extra_rounds=quality.extra_rounds,
                 stop=quality.stop, prior_sd=quality.prior_sd)


def planned_calls(players: int, config: RunConfig) -> int:
    """Most judge calls of one tournament: two orders of every pair."""
    return 2 * most_comparisons(players, rules_of(config))


def players_of(rows: list[Row]) -> dict[str, str]:
    """text -> the candidate that stands for it: the lowest id among equal texts."""
    out: dict[str, str] = {}
    for row in rows:
        out[row["text"]] = min(out.get(row["text"], row["candidate_id"]), row["candidate_id"])
    return out


async def play(ctx: Context, judge: Judge, prompt: str, prompt_id: str, seed: int, rows: list[Row],
               ) -> tuple[list[Row], list[Row]]:
    """One group from the first round to the ratings: rows of the schemas COMPARISONS and QUALITY.

    Raises UnreachableError, StorageError.
    """
    texts = {player: text for text, player in players_of(rows).items()}
    games = schedule(list(texts), int(digest("pairing", ctx.config.run_seed, prompt_id, seed, size=4), 16),
                     rules_of(ctx.config))
    about = {"prompt_id": prompt_id, "seed": seed, "judge": ctx.config.judge_model.path,
             "template": judge.template.digest}
    played: list[Row] = []
    while pairs := await _aside(games.next_round):
        number = games.rounds_started - 1
        verdicts = await judge.compare(prompt, [(texts[a], texts[b]) for a, b in pairs])
        for (a, b), (first, second) in zip(pairs, verdicts, strict=True):
            row = comparison(a, b, first, second)
            games.record(a, b, row["outcome"])
            played.append(row | about | {"round": number})
    # what equal texts and an early end saved was planned
    ctx.progress.spare("quality", planned_calls(len(rows), ctx.config) - 2 * len(played))
    return played, await _aside(lambda: rate(rows, played, ctx.config, games.settled))


async def _aside(work: Callable[[], T]) -> T:
    """Numerical work, away from the loop on which the answers come in."""
    return await asyncio.to_thread(work)


def pooled(one: float, other: float) -> float:
    """One verdict of the two orders': the logistic of their mean log-odds, sqrt(pq) / (sqrt(pq) + sqrt((1-p)(1-q))).

    The logarithmic opinion pool (Genest and Zidek 1986). What a judge adds to the log-odds of the answer shown first
    cancels; in the mean of the probabilities it would flatten every difference (to 0.79 for a bias of 1 logit). Of
    verdicts without a doubt it is the mean: a half where the two contradict each other.
    """
    win, loss = math.sqrt(one * other), math.sqrt((1 - one) * (1 - other))
    return win / (win + loss) if win + loss else 0.5


def comparison(a: str, b: str, first: Answer, second: Answer) -> Row:
    """The row of a pair: `first` has a shown first, `second` has b shown first."""
    p_first = first.value
    p_second = None if second.value is None else 1.0 - second.value
    outcome = pooled(p_first, p_second) if p_first is not None and p_second is not None else None
    outside = [v.outside for v in (first, second) if v.outside is not None]
    reasons = dict.fromkeys(v.reason for v in (first, second) if v.reason)
    return {"a": a, "b": b, "p_first": p_first, "p_second": p_second, "outcome": outcome,
            "outside": sum(outside) / len(outside) if outside else None, "reason": "; ".join(reasons) or None}


def rate(rows: list[Row], comparisons: list[Row], config: RunConfig, top_settled: bool | None) -> list[Row]:
    """Quality rows of one group's candidates (schema QUALITY); null where a text was never judged.

    `top_settled`: what a top_k tournament says of its end. Of a ranking it is the fit that says whether the aim is
    reached: the schedule knows the ratings less well.
    """
    quality = config.quality
    player = players_of(rows)
    index = {p: n for n, p in enumerate(sorted(player.values()))}
    judged = [c for c in comparisons if c["outcome"] is not None]
    fit = bradley_terry.fit(
        len(index), np.array([index[c["a"]] for c in judged], dtype=np.int64),
        np.array([index[c["b"]] for c in judged], dtype=np.int64),
        np.array([c["outcome"] for c in judged], dtype=np.float64), prior_sd=quality.prior_sd, solver=quality.solver)
    rating, se = fit.rating.tolist(), fit.se.tolist()
    flags = ", ".join(name for name, on in [("disconnected", not fit.connected), ("separated", fit.separated),
                                            ("not_converged", not fit.converged)] if on) or None
    if quality.schedule == "ranking":
        settled = None if fit.reliability is None else fit.reliability >= quality.reliability
    else:  # with no more texts than places there is nothing to settle
        settled = top_settled if len(index) > config.quality_top else None
    group = {"rating_flags": flags, "settled": settled, "reliability": fit.reliability,
             "prior_sd": fit.prior_sd if judged else None, "dispersion": fit.dispersion if judged else None}
    out = []
    for row in rows:
        n = index[stands := player[row["text"]]]
        out.append({"candidate_id": row["candidate_id"], "rating": rating[n], "rating_se": se[n],
                    "comparisons": int(fit.comparisons[n]), "player": stands} | group)
    return out
