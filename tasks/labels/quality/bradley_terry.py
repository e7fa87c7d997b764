"""Bradley-Terry ratings with standard errors: the quality of each player of one group.

Model (Bradley and Terry 1952): player i beats player j with probability 1 / (1 + exp(r_j - r_i)). With
outcomes y in [0, 1] (the share of the win that goes to the first) and weights w the log-likelihood is

    l(r) = sum_k w_k [ y_k log s(d_k) + (1 - y_k) log s(-d_k) ],    d_k = r_i(k) - r_j(k),  s the logistic.

`fit` maximises l(r) / dispersion - sum r^2 / (2 prior_sd^2): independent normal priors, which decide where the
data say little (few or one-sided comparisons), and there keep the ratings finite. The posterior is strictly
concave; Newton's method with halved steps finds its one maximum. Both numbers are in the result: whoever
maximises this with them gets the same ratings. "auto" learns them from the group's own outcomes; see
`bradley_terry_prior`, which also says what the standard errors then take in.

**Comparing prompts.** A rating is a logit: 1 more means odds of 2.7 to 1 by the expected verdict of the judge,
whatever the prompt. Every group has mean 0, so a rating says how far above the average candidate *of its
prompt* one is. Where outcomes say little, ratings are shrunk towards 0 by their group's own prior;
`reliability` says how much of the differences they tell.

**Do the intervals tell the truth?** Share of true ratings within 1.96 se, "auto", for 8, 16, 64 and 143 players in
6, 7, 8 and 10 rounds, of groups whose true ratings deviate by `spread` logits (`benchmarks/coverage.py`; simulation
error 0.2 to 1.2 %; 95.1 % over all, 95.3 % with a fifth of the verdicts abstained):

    verdicts              pairs     spread 0.5                spread 1                  spread 2
    one toss              random    98.9  97.3  96.1  95.2    95.9  93.5  95.2  94.2    94.0  93.7  95.1  93.9
                          Swiss     98.8  98.6  98.2  96.3    96.0  94.9  92.7  93.7    95.3  92.8  93.9  93.3
    mean of two tosses    random    98.0  95.6  94.9  96.0    96.2  94.0  95.0  94.8    94.8  95.5  95.6  94.3
                          Swiss     97.8  96.7  93.8  94.0    96.1  94.7  95.1  95.2    96.7  95.3  95.2  94.5
    soft, 0.5 logits of   random    96.5  95.5  94.1  94.8    96.2  94.9  94.1  94.6    96.0  95.7  96.2  94.9
    noise                 Swiss     95.7  94.2  94.5  94.6    96.1  95.1  93.7  95.5    96.0  95.8  95.2  95.0
    soft, 1 logit of      random    96.4  94.8  94.6  94.5    94.5  93.6  94.4  93.9    93.7  94.2  95.1  95.6
    noise                 Swiss     96.1  93.7  94.2  92.2    94.7  94.8  94.1  95.0    93.8  95.5  93.4  94.4

Above 97 % are few tosses between players that differ little: they can't tell that spread from a wider one, and the
errors allow for it. A fixed prior_sd has the errors of its Hessian, which hold where it is the true deviation,
outcomes are many and verdicts are tosses or hardly noisy. Noise that keeps a verdict's mean (Beta, say) is
taken for noise in its log odds: too wide then.

The errors know nothing of a bias that all of a judge's verdicts share. One of b logits towards a position cancels in
the mean of both orders' log odds, which the labels are fitted to (`tournament.pooled`); of tosses in both orders it
flattens the mean, for equals by 4 s(b) s(-b): 0.94 for 0.5 logits, 0.79 for 1.
A pair entered twice counts twice: give each judgement once.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import ThreadpoolController

from tasks.labels.quality.bradley_terry_posterior import MAX_ITERATIONS, Comparisons, Floats, Ints, log_likelihood
from tasks.labels.quality.bradley_terry_prior import SD_MEDIAN, Calibration, calibrate, dispersion_at, with_prior

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Fit:
    """Ratings of one group of n players.

    `rating` and `se` are masked where a player has no comparison (`tolist()` gives None there).
    """

    rating: np.ma.MaskedArray
    """(n,) natural logits, mean 0 over the rated players."""
    se: np.ma.MaskedArray
    """(n,) standard error of `rating`, in logits. Between components it is the prior's spread. With a prior_sd of
    "auto" it is the root mean square distance of the true rating, what is unknown of the prior included."""
    comparisons: Ints
    """(n,) comparisons that count (weight > 0) per player."""
    rated: npt.NDArray[np.bool_]
    """(n,) whether the player was compared at all."""
    connected: bool
    """Whether comparisons link all rated players; if not, only ratings within a component compare."""
    separated: bool
    """Whether some component has no maximum likelihood estimate, as a set of its players won every
    comparison with the others whole (Ford 1957): their distance is then the prior's doing."""
    component: Ints
    """(n,) number of the component; a player without comparison is one by itself."""
    converged: bool
    """Whether the maximum was reached; a warning is logged if not."""
    log_likelihood: float
    """At `rating`, of the outcomes with their weights: without prior and dispersion; nats."""
    prior_sd: float | None
    """Logits; None: no prior (choix)."""
    dispersion: float
    """Variance of an outcome as a share of a toss's, p (1 - p)."""
    reliability: float | None
    """Share of the variance of the true ratings that the ratings explain, sum r^2 / (sum r^2 + sum se^2) over
    the rated: the separation reliability of posterior means (Adams 2005); of ratings without a prior, which
    errors spread, 1 - sum se^2 / sum r^2 (Wright and Masters 1982). None for fewer than two."""
    solver: Literal["newton", "choix"]
    """Which one found the ratings."""


@functools.cache
def _blas() -> ThreadpoolController:
    # Finding the loaded libraries takes milliseconds, a solve less.
    return ThreadpoolController()


def fit(
    n_players: int,
    i: npt.ArrayLike,
    j: npt.ArrayLike,
    outcome: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    prior_sd: float | Literal["auto"] = "auto",
    dispersion: float | Literal["auto"] = "auto",
    *,
    start: npt.ArrayLike | None = None,
    solver: Literal["newton", "choix"] = "newton",
    max_iterations: int = MAX_ITERATIONS,
) -> Fit:
    """The posterior mode and its standard errors (see the module's docstring).

    Args:
        i, j: (m,) integers in [0, n_players), the two players of each comparison.
        outcome: (m,) in [0, 1], the share of the win that goes to `i`. Leave abstentions out.
        weight: (m,) not negative, how many comparisons each counts for; None for one each.
        prior_sd: standard deviation of the prior of each rating, logits; positive. With a number, the standard
            errors are those of the Hessian at the mode.
        dispersion: variance of an outcome as a share of a toss's; positive; 1 for tosses.
        start: (n_players,) ratings to begin at, as those of the round before; nan or masked stands for 0.
        solver: choix: maximum likelihood by `choix.ilsr_pairwise_dense`, without a prior, standard errors by our
            Hessian (too narrow for tosses in Swiss pairs: a check of ratings, not of errors). A group that has no
            such maximum (disconnected or separated, or choix did not converge) is fitted by newton, with the
            prior, and `Fit.solver` says so.

    Raises:
        ValueError: arrays of different lengths, players out of range or against themselves, outcomes
            outside [0, 1], weights that are negative or not finite, a prior_sd or dispersion not positive.
    """
    first, second, share, mass = _checked(n_players, i, j, outcome, weight)
    given = {name: _number(name, value) for name, value in [("prior_sd", prior_sd), ("dispersion", dispersion)]}
    begin = _start(n_players, start)
    comparisons = np.bincount(np.concatenate([first, second]), minlength=n_players)
    rated = comparisons > 0
    component, separated = _structure(n_players, first, second, share)
    connected = len(np.unique(component[rated])) <= 1
    rating, se = np.zeros(n_players), np.zeros(n_players)
    found, used = _nothing(**given), "newton"
    if rated.any():
        dense = np.cumsum(rated) - 1
        data = Comparisons(dense[first], dense[second], share, mass, component[rated], max_iterations)
        # One thread: at these sizes a second one costs far more than it gives.
        with _blas().limit(limits=1, user_api="blas"):
            by_choix = _choix(data, given["dispersion"]) if solver == "choix" and connected and not separated else None
            found = by_choix or _newton(data, **given, start=None if begin is None else begin[rated])
        used = "choix" if by_choix else "newton"
        rating[rated], se[rated] = found.rating, found.se
    if solver != used:
        log.debug("Bradley-Terry: choix has no answer for %d players and %d comparisons (connected: %s, "
                    "separated: %s); fitted with a prior", n_players, len(first), connected, separated)
    if not found.converged:
        log.warning("Bradley-Terry: no convergence after %d iterations on %d players and %d comparisons",
                    max_iterations, n_players, len(first))
    squares = float(rating @ rating)
    return Fit(
        rating=np.ma.MaskedArray(rating, ~rated),
        se=np.ma.MaskedArray(se, ~rated),
        comparisons=comparisons,
        rated=rated,
        connected=connected,
        separated=separated,
        component=component,
        converged=found.converged,
        log_likelihood=log_likelihood(rating[first] - rating[second], share, mass),
        prior_sd=found.prior_sd if math.isfinite(found.prior_sd) else None,
        dispersion=found.dispersion,
        reliability=_reliability(squares, float(se @ se), math.isfinite(found.prior_sd)) if rated.any() else None,
        solver=used,
    )


def _reliability(squares: float, errors: float, has_prior: bool) -> float:
    if has_prior:
        return squares / (squares + errors)
    return max(0.0, 1 - errors / squares) if squares else 0.0


def _nothing(prior_sd: float | None, dispersion: float | None) -> Calibration:
    """Of a group without comparisons."""
    return Calibration(np.zeros(0), np.zeros(0), prior_sd or SD_MEDIAN, dispersion or 1.0, True)


def _newton(data: Comparisons, prior_sd: float | None, dispersion: float | None, start: Floats | None) -> Calibration:
    if prior_sd is None:
        return calibrate(data, dispersion, start)
    return with_prior(data, prior_sd, dispersion, start)


def _choix(data: Comparisons, dispersion: float | None) -> Calibration | None:
    """The maximum of the likelihood, which must exist; None if choix did not find it."""
    import choix  # the one solver that nobody need have installed

    n = len(data.component)
    wins = np.zeros((n, n))
    np.add.at(wins, (data.first, data.second), data.mass * data.share)
    np.add.at(wins, (data.second, data.first), data.mass * (1 - data.share))
    try:
        with np.errstate(all="ignore"):
            rating = choix.ilsr_pairwise_dense(wins, alpha=0, max_iter=1000, tol=1e-9)
    except (RuntimeError, ValueError, np.linalg.LinAlgError):
        return None
    if not np.isfinite(rating).all():
        return None
    rating = rating - rating.mean()
    covariance = data.covariance(rating, math.inf)
    noise = dispersion_at(data, rating, covariance, 1.0) if dispersion is None else dispersion
    se = np.sqrt(np.maximum(noise * np.diag(covariance), 0))
    return Calibration(rating, se, math.inf, noise, True)


def _number(name: str, value: float | str) -> float | None:
    """None stands for auto."""
    if value == "auto":
        return None
    if isinstance(value, str) or not value > 0:
        raise ValueError(f"{name}: must be positive or auto, got {value}")
    return float(value)


def _start(n: int, start: npt.ArrayLike | None) -> Floats | None:
    if start is None:
        return None
    ratings = np.ma.filled(np.ma.asarray(start, float), 0.0)
    if ratings.shape != (n,):
        raise ValueError(f"start: one rating for each of {n} players, got shape {ratings.shape}")
    return np.where(np.isfinite(ratings), ratings, 0.0)


def _checked(
    n: int,
    i: npt.ArrayLike,
    j: npt.ArrayLike,
    outcome: npt.ArrayLike,
    weight: npt.ArrayLike | None,
) -> tuple[Ints, Ints, Floats, Floats]:
    """The comparisons as arrays, without those of weight 0."""
    raw_first, raw_second = np.asarray(i), np.asarray(j)
    share = np.asarray(outcome, float)
    mass = np.ones(share.shape) if weight is None else np.asarray(weight, float)
    if not share.ndim == 1 or not raw_first.shape == raw_second.shape == share.shape == mass.shape:
        raise ValueError(f"i, j, outcome, weight: one length each, got shapes {raw_first.shape}, "
                         f"{raw_second.shape}, {share.shape}, {mass.shape}")
    first, second = raw_first.astype(np.int64), raw_second.astype(np.int64)
    if (first != raw_first).any() or (second != raw_second).any():
        raise ValueError("i, j: players are numbered by integers")
    if len(first) and (min(first.min(), second.min()) < 0 or max(first.max(), second.max()) >= n):
        raise ValueError(f"i, j: players are numbered from 0 to {n - 1}")
    if (first == second).any():
        raise ValueError("i, j: a player is compared with itself")
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError("outcome: must be in [0, 1]; leave abstentions out")
    if not ((mass >= 0) & np.isfinite(mass)).all():
        raise ValueError("weight: must be finite and not negative")
    used = mass > 0
    return first[used], second[used], share[used], mass[used]


def _structure(n: int, first: Ints, second: Ints, share: Floats) -> tuple[Ints, bool]:
    """Components of the comparison graph, and whether one of them is separated: not strongly connected
    by the relation "took some share of a win from"."""
    if n == 0:
        return np.zeros(0, np.int64), False
    won, lost = share > 0, share < 1
    winner = np.concatenate([first[won], second[lost]])
    loser = np.concatenate([second[won], first[lost]])
    beats = coo_array((np.ones(len(winner)), (winner, loser)), shape=(n, n)).tocsr()
    weak, component = connected_components(beats, directed=True, connection="weak")
    strong, _ = connected_components(beats, directed=True, connection="strong")
    return component.astype(np.int64), bool(strong > weak)
