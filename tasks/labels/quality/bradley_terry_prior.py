"""How far the ratings of a group lie apart and how noisy its outcomes are, learnt from the outcomes.

**Spread.** True ratings are normal with standard deviation sigma, log sigma normal about log `SD_MEDIAN` with
deviation `SD_LOG_SD` (95 % of it within 0.2 and 11 logits). For some sigmas about the likeliest, expectation
propagation (Minka 2001; Rasmussen and Williams 2006, section 3.6) gives the normal distribution closest to the
posterior and the evidence of that sigma; weighted by it they make the posterior mean and variance of each rating.
The rating that is reported is the mode for one prior, the one whose mode comes closest to this mean, so that
anyone can refit it. That prior is a little wider than sigma (the mode of a skewed posterior lies further in
than its mean), and the error is the root mean square distance of the truth from the mode. Why not the Laplace
approximation: from tosses in Swiss rounds it finds a sigma far too small, and where players have few tosses its
intervals cover too little even with the true sigma.

**Noise.** Outcomes have variance `dispersion` p (1 - p) about the expected p, as in quasi-likelihood (McCullagh and
Nelder 1989, section 9.2): 1 for tosses, about 1/2 for the mean of two tosses, less for soft verdicts; never more than
1, which is the most that numbers between 0 and 1 can vary. It is the ratio of summed squared residuals to
their summed expectation (with leverages), which, unlike Pearson's mean of ratios, no single upset decides;
shrunk towards 1 on the log scale as if log dispersion were normal about 0 with deviation `DISPERSION_LOG_SD`.
Outcomes of 0, 1/2 and 1 alone are taken for means of two tosses, at least 1/2: a judge who always prefers one
position draws every time and knows nothing.

**Soft verdicts** are noisy in their log odds: y = s(d + noise). Their mean is flatter than s(d): the ratings
come out smaller than the judge's noiseless ones, by 1 / sqrt(1 + 0.346 variance) (Zeger, Liang and Albert 1988).
The ratings stay those of the verdicts' means; their errors allow for the true ones lying that much further out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tasks.labels.quality.bradley_terry_posterior import Comparisons, Floats, logistic

SD_MEDIAN = 1.5
SD_LOG_SD = 1.0
SD_RANGE = (0.05, 20.0)
"""Logits; all draws want 0, one long chain of wins wants any number."""
DISPERSION_LOG_SD = 1.5
DISPERSION_RANGE = (1e-3, 1.0)
"""The least stands for 0.06 logits of noise between equal players."""

_STEPS = 50
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(11)
_LOG_NODE_WEIGHTS = np.log(_NODE_WEIGHTS / _NODE_WEIGHTS.sum()) + _NODES**2 / 2


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ratings (n,), their errors (n,), and what they were fitted with."""

    rating: Floats
    se: Floats
    prior_sd: float
    dispersion: float
    converged: bool


@dataclass(frozen=True, eq=False)
class _Belief:
    """The normal distribution closest to the posterior, for one standard deviation of the prior."""

    mean: Floats
    covariance: Floats
    log_evidence: float
    precision: Floats
    pull: Floats
    """(m,), with `precision`: the next approximation of each comparison's likelihood, log t(d) = pull d -
    precision d^2 / 2."""


def with_prior(data: Comparisons, prior_sd: float, dispersion: float | None, start: Floats | None) -> Calibration:
    """Mode and curvature for a given prior; a dispersion that is not given is found by iteration."""
    noise = dispersion or 1.0
    rating, converged = data.mode(prior_sd, noise, start)
    covariance = data.covariance(rating, prior_sd, noise)
    for _ in range(_STEPS if dispersion is None else 0):
        # Half the way: less noise leaves less freedom, which speaks for more; with few outcomes that swings.
        before, noise = noise, math.sqrt(noise * dispersion_at(data, rating, covariance, noise))
        rating, converged = data.mode(prior_sd, noise, rating)
        covariance = data.covariance(rating, prior_sd, noise)
        if abs(math.log(noise / before)) < 1e-4:
            break
    return Calibration(rating, np.sqrt(np.maximum(np.diag(covariance), 0)), prior_sd, noise, converged)


def calibrate(data: Comparisons, dispersion: float | None, start: Floats | None) -> Calibration:
    """Ratings under the prior that the outcomes speak for (see the module's docstring)."""
    modal, log_sd, width, noise = _likeliest(data, dispersion, start)
    # A narrow posterior of sigma needs fewer points; it is narrow where players are many.
    steps = np.array([-2.4, -1.2, 0.0, 1.2, 2.4]) if len(modal.mean) <= 64 else np.array([-1.7, 0.0, 1.7])
    log_sds = np.clip(log_sd + width * steps, *np.log(SD_RANGE))
    beliefs = [_propagate(data, sd, noise, modal, iterations=8) for sd in np.exp(log_sds)]
    weights = np.array([belief.log_evidence for belief in beliefs]) - _surprise(log_sds)
    weights = np.exp(weights - weights.max())
    weights /= weights.sum()
    means = np.array([belief.mean for belief in beliefs])
    mean = weights @ means
    variance = weights @ (np.array([np.diag(belief.covariance) for belief in beliefs]) + (means - mean) ** 2)
    rating, prior_sd, converged = _closest_mode(data, mean, log_sd, noise)
    if dispersion is None and not _hard(data):
        # Student's t: the dispersion is uncertain itself.
        freedom = max(float(data.mass.sum()) - len(mean) + 1, 4.0)
        variance = variance * freedom / (freedom - 2)
    stretch = 1.0 if dispersion is not None or _tosses(data) else _stretch(data, rating, noise)
    se = np.sqrt(np.maximum(stretch**2 * variance, 0) + (stretch * mean - rating) ** 2)
    return Calibration(rating, se, prior_sd, noise, converged)


def dispersion_at(data: Comparisons, rating: Floats, covariance: Floats, dispersion: float) -> float:
    """The dispersion of outcomes about `rating`; `covariance` was found with `dispersion`."""
    low, high = DISPERSION_RANGE
    if _hard(data):
        return high
    low = max(low, 0.5) if _tosses(data) else low
    variance = data.spread(rating)
    # A comparison of weight 2 is two, each with half the leverage.
    free = data.mass * np.maximum(1 - variance * data.variances(covariance) / dispersion, 0)
    freedom, expected = float(free.sum()), float(variance @ free)
    if freedom <= 0 or expected <= 0:
        return high
    squares = float(data.mass @ (data.share - logistic(data.differences(rating))) ** 2)
    ratio = min(max(squares / expected, low), high)
    # The variance of the logarithm of a mean of squares is about 2 / freedom.
    return ratio ** (freedom / (freedom + 2 * DISPERSION_LOG_SD**-2))


def _likeliest(
    data: Comparisons, dispersion: float | None, start: Floats | None
) -> tuple[_Belief, float, float, float]:
    """The belief near the likeliest log sigma, that, the width of its posterior, and the dispersion."""
    log_sd, gradient = math.log(SD_MEDIAN), 0.0
    noise = dispersion or (1.0 if _hard(data) else 0.3)
    belief, width, moved = _first_belief(data, start, noise), SD_LOG_SD, 0.0
    for _ in range(_STEPS):
        belief = _propagate(data, math.exp(log_sd), noise, belief, iterations=2)
        earlier, (gradient, information) = gradient, _score(belief, log_sd)
        if moved:
            # Fisher's information is far too high for tosses in Swiss rounds; the secant's is that of the data.
            information = min(max((earlier - gradient) / moved, 0.05 * information, SD_LOG_SD**-2), information)
        step, width = gradient / information, information**-0.5
        before = noise
        if dispersion is None:
            noise = dispersion_at(data, belief.mean, belief.covariance, before)
            belief = _Belief(belief.mean, belief.covariance, belief.log_evidence,
                             belief.precision * before / noise, belief.pull * before / noise)
        if abs(step) < 0.1 * width and abs(math.log(noise / before)) < 1e-3:
            break
        moved = float(np.clip(log_sd + np.clip(step, -1, 1), *np.log(SD_RANGE))) - log_sd
        log_sd += moved
    return belief, log_sd, width, noise


def _first_belief(data: Comparisons, start: Floats | None, noise: float) -> _Belief:
    """Sites from the likelihood's second-order expansion at `start`."""
    rating = np.zeros(len(data.component)) if start is None else start
    d, curvature = data.differences(rating), data.spread(rating) + 1e-3
    pull = data.share - logistic(d) + curvature * d
    return _Belief(rating, np.zeros((0, 0)), 0.0, data.mass / noise * curvature, data.mass / noise * pull)


def _surprise(log_sd: Floats) -> Floats:
    return 0.5 * ((log_sd - math.log(SD_MEDIAN)) / SD_LOG_SD) ** 2


def _score(belief: _Belief, log_sd: float) -> tuple[float, float]:
    """Of log sigma: the derivative of its log posterior, and Fisher's information."""
    n, precision = len(belief.mean), math.exp(-2 * log_sd)
    trace = float(np.trace(belief.covariance))
    gradient = precision * (float(belief.mean @ belief.mean) + trace) - (n - 1)
    gradient -= (log_sd - math.log(SD_MEDIAN)) / SD_LOG_SD**2
    information = 2 * (n - 1 - 2 * precision * trace + precision**2 * float((belief.covariance**2).sum()))
    return gradient, max(information, 0.0) + SD_LOG_SD**-2


def _propagate(data: Comparisons, sd: float, noise: float, belief: _Belief, iterations: int) -> _Belief:
    """Parallel expectation propagation, started from the sites of `belief`."""
    precision, pull, mass = belief.precision, belief.pull, data.mass / noise
    for _ in range(iterations):
        covariance, log_determinant = data.inverse(precision, sd**-2)
        pulled = data.scatter(pull)
        mean = covariance @ pulled
        variance, d = data.variances(covariance), data.differences(mean)
        cavity = np.maximum(1 / variance - precision, 1e-10)
        cavity_pull = d / variance - pull
        log_z, tilted_mean, tilted_variance = _tilted(data.share, mass, cavity_pull / cavity, cavity, d)
        evidence = log_z + 0.5 * np.log1p(precision / cavity)
        evidence -= 0.5 * ((cavity_pull + pull) ** 2 / (cavity + precision) - cavity_pull**2 / cavity)
        log_evidence = float(evidence.sum()) + 0.5 * (float(pulled @ mean) - log_determinant)
        log_evidence -= (len(mean) - 1) * math.log(sd)
        # The likelihood is log-concave: a site is never negative but by rounding.
        change = np.maximum(1 / tilted_variance - cavity, 0) - precision
        moved = float(np.abs(change * variance).max())
        # Damped: all sites move at once, and those of one pair would overshoot together.
        precision = precision + 0.9 * change
        pull = pull + 0.9 * (tilted_mean / tilted_variance - cavity_pull - pull)
        if moved < 1e-3:
            break
    return _Belief(mean, covariance, log_evidence, precision, pull)


def _tilted(
    share: Floats, mass: Floats, centre: Floats, cavity: Floats, start: Floats
) -> tuple[Floats, Floats, Floats]:
    """Log normaliser, mean and variance (m,) of N(z; centre, 1 / cavity) s(z)^(mass share) s(-z)^(mass (1 - share)),
    by Gauss-Hermite quadrature about its mode, which is sought from `start`."""
    z = start
    for _ in range(12):
        p = logistic(z)
        step = (mass * (share - p) - cavity * (z - centre)) / (cavity + mass * p * (1 - p))
        z = z + np.clip(step, -3, 3)
        if np.abs(step).max() < 0.1:
            break
    p = logistic(z)
    width = (cavity + mass * p * (1 - p)) ** -0.5
    x = z[:, None] + width[:, None] * _NODES
    logs = mass[:, None] * (share[:, None] * x - np.logaddexp(0, x)) + _LOG_NODE_WEIGHTS
    logs -= 0.5 * cavity[:, None] * (x - centre[:, None]) ** 2
    top = logs.max(axis=1)
    weights = np.exp(logs - top[:, None])
    total = weights.sum(axis=1)
    weights /= total[:, None]
    mean = (weights * x).sum(axis=1)
    variance = (weights * (x - mean[:, None]) ** 2).sum(axis=1)
    return np.log(total) + top + np.log(width) + 0.5 * np.log(cavity), mean, variance


def _closest_mode(data: Comparisons, mean: Floats, log_sd: float, noise: float) -> tuple[Floats, float, bool]:
    """The mode that comes closest to `mean`, its prior's standard deviation, and whether it converged."""
    rating, converged = data.mode(math.exp(log_sd), noise, mean)
    for _ in range(4):
        slope = data.slope(rating, math.exp(log_sd), noise)
        length = float(slope @ slope)
        step = float(slope @ (mean - rating)) / length if length > 1e-12 else 0.0
        if abs(step) < 1e-2:
            break
        log_sd = float(np.clip(log_sd + np.clip(step, -1, 1), *np.log(SD_RANGE)))
        rating, converged = data.mode(math.exp(log_sd), noise, rating)
    return rating, math.exp(log_sd), converged


def _hard(data: Comparisons) -> bool:
    """Whether the outcomes are tosses, whose variance is p (1 - p) by nature."""
    return bool(np.isin(data.share, (0.0, 1.0)).all())


def _tosses(data: Comparisons) -> bool:
    """Whether the outcomes are tosses or means of two."""
    return bool(np.isin(data.share, (0.0, 0.5, 1.0)).all())


def _stretch(data: Comparisons, rating: Floats, dispersion: float) -> float:
    """By how much the noise in soft verdicts' log odds flattens their mean; at least 1."""
    variance = data.spread(rating)
    # Such noise has its largest share of p (1 - p) between equals, `even`: about v / (v + 4.5) for variance v.
    even = min(dispersion * float(data.mass @ variance) / (4 * float(data.mass @ variance**2)), 0.9)
    return math.sqrt(1 + 0.346 * 4.5 * even / (1 - even))
