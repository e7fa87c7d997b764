"""The posterior of Bradley-Terry ratings under independent normal priors: its mode and its curvature there.

Everything works on the ratings with mean 0, where the likelihood lives. Arrays over players are (n,), over
comparisons (m,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import get_lapack_funcs

MAX_ITERATIONS = 200
TOLERANCE = 1e-18
"""Converged when half the squared Newton decrement, the log posterior still to be gained, is below this
share of the total weight; the last step then moved no rating by more than about 1e-8 logits."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# At these sizes the checks around a solver cost as much as the solution.
_posv, _potrf, _potri = get_lapack_funcs(("posv", "potrf", "potri"), dtype=np.float64)


def log_likelihood(d: Floats, share: Floats, mass: Floats) -> float:
    """Of outcomes `share` of weight `mass` at differences `d` in rating; nats."""
    # log s(d) = -log(1 + exp(-d)), without overflow.
    return float(-(mass * (share * np.logaddexp(0, -d) + (1 - share) * np.logaddexp(0, d))).sum())


def logistic(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Checked comparisons among n players of whom each has one at least."""

    first: Ints
    second: Ints
    share: Floats
    """(m,) of the win that goes to the first."""
    mass: Floats
    """(m,) positive: how many comparisons each counts for."""
    component: Ints
    """(n,) number of each player's component of the comparison graph."""
    max_iterations: int = MAX_ITERATIONS

    def mode(self, prior_sd: float, dispersion: float = 1.0, start: Floats | None = None) -> tuple[Floats, bool]:
        """The ratings (n,) that maximise the posterior, by Newton's method; and whether it converged."""
        # Shifting a component changes nothing but the prior, which holds its mean at 0: the start and every
        # gradient have mean 0 there. Any curvature along the shift will do; 1 keeps the matrix well scaled.
        size = np.bincount(self.component)[self.component]
        shift = (self.component[:, None] == self.component[None, :]) / size
        mass, precision = self.mass / dispersion, prior_sd**-2
        rating = np.zeros(len(size))
        if start is not None:
            rating = start - np.bincount(self.component, start)[self.component] / size
        now = self._posterior(rating, mass, precision)
        for _ in range(self.max_iterations):
            residual = mass * (self.share - logistic(self.differences(rating)))
            gradient = self.scatter(residual) - rating * precision
            step = _solve(self._matrix(mass * self.spread(rating), precision) + shift, gradient)
            gain = float(gradient @ step) / 2
            # Armijo's rule; near the maximum the differences drown in rounding, and the full step is right.
            scale, rounding = 1.0, 1e-14 * (1 + abs(now))
            while True:
                moved = rating + scale * step
                then = self._posterior(moved, mass, precision)
                if then >= now + 0.1 * scale * gain - rounding or scale <= 1e-6:
                    break
                scale /= 2
            rating, now = moved, then
            if gain <= TOLERANCE * mass.sum():
                return rating, True
        return rating, False

    def covariance(self, rating: Floats, prior_sd: float, dispersion: float = 1.0) -> Floats:
        """(n, n) inverse of the posterior's curvature at `rating`."""
        return self.inverse(self.mass / dispersion * self.spread(rating), prior_sd**-2)[0]

    def slope(self, rating: Floats, prior_sd: float, dispersion: float = 1.0) -> Floats:
        """(n,) by how much the mode, `rating`, grows with the logarithm of `prior_sd`."""
        matrix = self._matrix(self.mass / dispersion * self.spread(rating), prior_sd**-2) + 1 / len(rating)
        return _solve(matrix, 2 * prior_sd**-2 * rating)

    def inverse(self, curvature: Floats, precision: float) -> tuple[Floats, float]:
        """Inverse (n, n) and log determinant of the Hessian of a prior of this precision and comparisons of
        these curvatures (m,)."""
        # The constant vector is an eigenvector of the matrix, eigenvalue `precision`: take it out.
        n = len(self.component)
        factor, info = _potrf((self._matrix(curvature, precision) + 1 / n).T, lower=True, overwrite_a=True)
        if info:
            raise np.linalg.LinAlgError(f"dpotrf: {info}")
        log_determinant = 2 * float(np.log(np.diag(factor)).sum()) - float(np.log1p(precision))
        lower, _ = _potri(factor, lower=True, overwrite_c=True)
        inverse = lower + lower.T
        inverse[np.diag_indices(n)] /= 2
        inverse -= 1 / n / (1 + precision)
        return inverse, log_determinant

    def differences(self, rating: Floats) -> Floats:
        """(m,) by how many logits the first is ahead."""
        return rating[self.first] - rating[self.second]

    def variances(self, covariance: Floats) -> Floats:
        """(m,) of the differences."""
        diagonal = np.diag(covariance)
        return diagonal[self.first] + diagonal[self.second] - 2 * covariance[self.first, self.second]

    def spread(self, rating: Floats) -> Floats:
        """(m,) variance of a toss of each comparison: p (1 - p)."""
        p = logistic(np.abs(self.differences(rating)))
        return p * (1 - p)

    def scatter(self, pulls: Floats) -> Floats:
        """(n,) sums of what each comparison (m,) adds to its first and takes from its second."""
        n = len(self.component)
        return (np.bincount(self.first, pulls, n) - np.bincount(self.second, pulls, n)).astype(np.float64, copy=False)

    def _posterior(self, r: Floats, mass: Floats, precision: float) -> float:
        return log_likelihood(self.differences(r), self.share, mass) - float(r @ r) * precision / 2

    def _matrix(self, curvature: Floats, precision: float) -> Floats:
        """(n, n), the upper triangle of the Hessian of a negative log posterior: positive definite."""
        n = len(self.component)
        place = np.minimum(self.first, self.second) * n + np.maximum(self.first, self.second)
        matrix = np.bincount(place, -curvature, n * n).astype(np.float64, copy=False)
        matrix[:: n + 1] = precision + np.bincount(self.first, curvature, n) + np.bincount(self.second, curvature, n)
        return matrix.reshape(n, n)


def _solve(matrix: Floats, right: Floats) -> Floats:
    # The transpose is what it wants column by column; the upper triangle is then the lower.
    _, solution, info = _posv(matrix.T, right, lower=True, overwrite_a=True)
    if info:
        raise np.linalg.LinAlgError(f"dposv: {info}")
    return solution
