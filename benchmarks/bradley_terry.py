"""Our fit against 1000 fixed steps of gradient descent: time, as a ratio measured in the same run.

    .venv/bin/python benchmarks/bradley_terry.py

143 players, 10 Swiss rounds, a judge's soft verdicts, the same prior for all (prior_sd 2.5, dispersion 1). Descent
takes the longest step that surely converges, 1 / (largest curvature), and stops after 1000. `torch` writes the loss
and leaves the gradient to autograd, as one would write it first; `numpy` has the gradient by hand. Ours also finds
the standard errors. Goal: 80x torch at an equal or better posterior. `auto`: ours where the prior is learnt too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import harness
import numpy as np
import torch
from coverage import group

from tasks.labels.quality.bradley_terry import Fit, fit

PLAYERS, ROUNDS, STEPS, PRIOR_SD, GOAL = 143, 10, 1000, 2.5, 80


def descent_torch(i: np.ndarray, j: np.ndarray, y: np.ndarray, rate: float) -> np.ndarray:
    """1000 steps with autograd."""
    first, second, share = torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(y)
    rating = torch.zeros(PLAYERS, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([rating], lr=rate)
    for _ in range(STEPS):
        optimiser.zero_grad()
        d = rating[first] - rating[second]
        wins = share * torch.nn.functional.logsigmoid(d) + (1 - share) * torch.nn.functional.logsigmoid(-d)
        loss = -wins.sum() + (rating**2).sum() / (2 * PRIOR_SD**2)
        loss.backward()
        optimiser.step()
    return rating.detach().numpy()


def descent_numpy(i: np.ndarray, j: np.ndarray, y: np.ndarray, rate: float) -> np.ndarray:
    """1000 steps with the gradient written down."""
    rating = np.zeros(PLAYERS)
    for _ in range(STEPS):
        residual = y - 1 / (1 + np.exp(rating[j] - rating[i]))
        gradient = np.bincount(i, residual, PLAYERS) - np.bincount(j, residual, PLAYERS) - rating / PRIOR_SD**2
        rating = rating + rate * gradient
    return rating


def log_posterior(rating: np.ndarray, i: np.ndarray, j: np.ndarray, y: np.ndarray) -> float:
    """Nats, up to a constant."""
    d = rating[i] - rating[j]
    likelihood = -(y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d)).sum()
    return float(likelihood - (rating**2).sum() / (2 * PRIOR_SD**2))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """CPU milliseconds, and what it gave."""
    began = time.process_time()
    result = work()
    return 1e3 * (time.process_time() - began), result


def main() -> None:
    """Rounds of all four, interleaved."""
    chosen = harness.options(__doc__, rounds=7)
    torch.set_num_threads(1)
    i, j, y = (np.asarray(a) for a in group(PLAYERS, 1.0, ROUNDS, "soft 1", True, 0.0, np.random.default_rng(0))[1:])
    rate = 1 / (np.bincount(np.concatenate([i, j])).max() / 2 + PRIOR_SD**-2)
    fit(PLAYERS, i, j, y)
    times: dict[str, list[float]] = {}
    gains: dict[str, float] = {}
    for _ in range(chosen.rounds):
        # Ours is short: the mean of ten.
        took, ours = timed(lambda: [fit(PLAYERS, i, j, y, prior_sd=PRIOR_SD, dispersion=1.0) for _ in range(10)][-1])
        assert isinstance(ours, Fit)
        times.setdefault("ours", []).append(took / 10)
        times.setdefault("auto", []).append(timed(lambda: fit(PLAYERS, i, j, y))[0])
        best = log_posterior(np.asarray(ours.rating), i, j, y)
        for name, descent in (("torch", descent_torch), ("numpy", descent_numpy)):
            took, rating = timed(lambda descent=descent: descent(i, j, y, rate))
            assert isinstance(rating, np.ndarray)
            times.setdefault(name, []).append(took)
            gains[name] = best - log_posterior(rating, i, j, y)
    rows = []
    for name in ("torch", "numpy"):
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
        goal = harness.verdict(statistics.median(ratios) >= GOAL) if name == "torch" else ""
        rows.append([f"{STEPS} steps, {name}", harness.spread(times[name], 1), harness.spread(ratios, 0),
                     f"{gains[name]:+.1e}", goal])
    rows.append(["ours", harness.spread(times["ours"]), "", "", ""])
    rows.append(["ours, auto", harness.spread(times["auto"], 1), "", "", ""])
    harness.show(f"{PLAYERS} players, {len(y)} comparisons",
                 ["fit", "CPU ms", "x ours", "nats that ours gains", f">= {GOAL}"], rows)


if __name__ == "__main__":
    main()
