"""95 % intervals of means and shares whose observations come in clusters: the answers to one prompt are alike.

Every interval is made from sums (`cluster_sums` of `report_tally`): n and clusters, s (sum of all values), nn, ss and
ns (sums over clusters of n_g^2, S_g^2 and n_g S_g, with n_g the cluster's values and S_g their sum); and, where values
have standard errors of their own, v (the sum of their squares).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scipy.special import stdtrit

_Z95 = 1.959963984540054
_DIGITS = 6
_NO_SPREAD = 1e-12  # of the sum of squares: what rounding leaves where all clusters are equal

Interval = tuple[float | None, float | None, float | None]


def rounded(value: float | None) -> float | None:
    """The value to six decimals; None for what is no finite number."""
    return None if value is None or not math.isfinite(value) else round(float(value), _DIGITS)


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`, None where there is nothing to divide."""
    return rounded(part / whole) if part is not None and whole else None


def wilson(right: float, n: float) -> tuple[float | None, float | None]:
    """95 % score interval of a share (Wilson 1927); (None, None) without trials. `n` may be an effective size."""
    if n <= 0:
        return None, None
    p, z2 = right / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(max(0.0, p * (1 - p) / n + z2 / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def _spread(sums: Mapping[str, Any], metric: str) -> tuple[int, int, float, float]:
    """(values, clusters, mean, sum over clusters of (S_g - n_g mean)^2); the last is 0 where no cluster differs."""
    n, clusters = sums[f"{metric}_n"], sums[f"{metric}_clusters"]
    if not n:
        return 0, 0, math.nan, math.nan
    mean = sums[f"{metric}_s"] / n
    square = sums[f"{metric}_ss"] - 2 * mean * sums[f"{metric}_ns"] + mean**2 * sums[f"{metric}_nn"]
    return n, clusters, mean, square if square > _NO_SPREAD * sums[f"{metric}_ss"] else 0.0


def mean_interval(sums: Mapping[str, Any], metric: str) -> Interval:
    """(mean, low, high): a ratio mean with the cluster-robust standard error, the prompts as clusters.

    se^2 = G/(G-1) * sum_g (S_g - n_g mean)^2 / n^2 (Cochran 1977, 2.31 and 6.12), Student's t with G-1 degrees
    of freedom. A few prompts may by luck lie closer together than the values' own errors allow: the half-width is at
    least 1.96 sqrt(sum of squared errors) / n. One prompt alone has a mean and no interval; nor have prompts that
    are all equal without known errors, for nothing there tells how far others may lie.

    Ratings of one group depend on each other (they sum to 0). That bends no interval of one heuristic, for its own
    values of different prompts are independent. Two heuristics whose intervals do not meet differ at 95 % whatever
    the dependence, since the error of a difference is at most the sum of both errors.
    """
    n, clusters, mean, square = _spread(sums, metric)
    if n == 0:
        return None, None, None
    own = _Z95 * math.sqrt(sums.get(f"{metric}_v") or 0.0) / n
    if clusters < 2 or square == own == 0:
        return rounded(mean), None, None
    half = max(own, _t95(clusters - 1) * math.sqrt(clusters / (clusters - 1) * square) / n)
    return rounded(mean), rounded(mean - half), rounded(mean + half)


def share_interval(sums: Mapping[str, Any], metric: str) -> Interval:
    """(share, low, high): Wilson's interval at the effective sample size (Korn and Graubard 1998).

    Answers to one prompt resemble each other, so n is divided by the design effect (how much more the share varies
    between prompts than it would between as many independent answers, at least 1) and, as few prompts tell that
    effect badly, by (t_{G-1} / t_{n-1})^2. Where every prompt has one answer that is Wilson's own. With all right, all
    wrong or one prompt nothing tells how alike they are: n is the prompts.
    """
    n, clusters, share, square = _spread(sums, metric)
    if n == 0:
        return None, None, None
    effective = float(clusters)
    if 0 < share < 1 and clusters > 1:
        design = clusters / (clusters - 1) * square / n**2 / (share * (1 - share) / (n - 1))
        effective = n / max(1.0, design) * (_t95(n - 1) / _t95(clusters - 1)) ** 2
    low, high = wilson(share * effective, effective)
    return rounded(share), rounded(low), rounded(high)


def _t95(freedom: int) -> float:
    return float(stdtrit(freedom, 0.975))
