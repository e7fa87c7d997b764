"""Self-BLEU against sacrebleu asked text by text: CPU seconds, as a ratio measured in the same run.

    .venv/bin/python benchmarks/self_bleu.py

Values are asserted equal to the last bit. The baseline builds no reference cache: every text against all others
through `BLEU.sentence_score`, as one would write it first.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from sacrebleu.metrics.bleu import BLEU

from tasks.labels.diversity import self_bleu

WORDS = [f"word{n}" for n in range(400)]
REPEATS = 3


def naive(texts: Sequence[str]) -> float:
    """Mean sentence BLEU of each text against all others."""
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [t for m, t in enumerate(texts) if m != n]).score
              for n, text in enumerate(texts)]
    return statistics.fmean(scores)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of a few runs."""
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def main() -> None:
    """Print one line per group size."""
    rng = random.Random(0)
    for count in (2, 8, 64):
        texts = [" ".join(rng.choices(WORDS, k=150)) for _ in range(count)]
        assert self_bleu(texts) == naive(texts)
        ours, theirs = seconds(lambda t=texts: self_bleu(t)), seconds(lambda t=texts: naive(t))
        print(f"{count:3} texts of 150 words: {1e3 * ours / count:.2f} ms a text, sacrebleu "
              f"{1e3 * theirs / count:.2f} ms ({theirs / ours:.1f}x)")


if __name__ == "__main__":
    main()
