"""The record every verifier returns, and the table of verifiers.

A verifier is a module with two functions, `check(ground_truth) -> str | None` and
`verify(text, ground_truth) -> Verdict`, and, where it imports lazily, `prepare(ground_truth)`. Modules
are imported on first use, so that a worker that checks numbers never loads a computer algebra system.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

MODULES: dict[str, str] = {
    "gsm8k": "tasks.labels.verifiers.gsm8k",
    "ifeval": "tasks.labels.verifiers.ifeval",
    "math": "tasks.labels.verifiers.math_latex",
}

# An answer is a few characters; what is longer is shown cut, so that no verdict carries a whole text.
_EXTRACTED_CHARACTERS = 200


@dataclass(frozen=True)
class Verdict:
    """What a verifier decided about one text.

    score: 1.0 right, 0.0 wrong, None when there is no verdict (then `reason` says why).
    extracted: what was taken as the answer; None where nothing was, or where the whole text is judged.
    reason: `no_answer`, `not followed: ...`, `timeout`, `crashed: ...` or `error: ...`.
    loose: the verdict under IFEval's loose rule; None for the other verifiers.
    """

    score: float | None
    extracted: str | None
    reason: str | None
    loose: float | None = None


def names() -> list[str]:
    """The kinds of verifier there are, sorted."""
    return sorted(MODULES)


def load(kind: str) -> ModuleType:
    """Import the verifier of a kind.

    Raises ValueError for a kind that does not exist.
    """
    if kind not in MODULES:
        raise ValueError(f"unknown verifier {kind!r}; there are {', '.join(names())}")
    return importlib.import_module(MODULES[kind])


def prepare(kind: str, ground_truth: str) -> None:
    """Import all that verifying against a ground truth needs, so that a time limit need not allow for it.

    Raises ValueError for an unknown kind or a malformed ground truth.
    """
    module = load(kind)
    if hasattr(module, "prepare"):
        module.prepare(ground_truth)


def check_ground_truth(kind: str, ground_truth: str) -> str | None:
    """Say what is wrong with a ground truth, or None when it is fine.

    Cheap and free of side effects: meant for every source row, before any request is sent.
    Raises ValueError for an unknown kind.
    """
    return load(kind).check(ground_truth)


def verify(kind: str, text: str, ground_truth: str) -> Verdict:
    """Verify one text in this process, without a time limit.

    What goes wrong inside a verifier, a malformed ground truth included, becomes a verdict without
    a score. Raises ValueError for an unknown kind only.
    """
    module = load(kind)
    try:
        return module.verify(text, ground_truth)
    except Exception as error:
        return Verdict(None, None, describe(error))


def describe(error: BaseException) -> str:
    """The `reason` of a verdict that an exception prevented, as one bounded line."""
    message = " ".join(str(error).split())[:_EXTRACTED_CHARACTERS]
    return f"error: {type(error).__name__}: {message}" if message else f"error: {type(error).__name__}"


def shown(answer: str) -> str:
    """An extracted answer as a verdict carries it: one line, cut to a bounded length."""
    answer = " ".join(answer[: 4 * _EXTRACTED_CHARACTERS].split())
    if len(answer) <= _EXTRACTED_CHARACTERS:
        return answer
    return answer[: _EXTRACTED_CHARACTERS - 1] + "…"
