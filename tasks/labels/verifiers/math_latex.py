"""MATH: is the final LaTeX answer of a solution equal to the reference?

Parsing and comparison are math-verify's. Its own time limits are switched off: they rest on signals,
which only the main thread receives. The time limit is the pool's, which kills the process.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

import math_verify.grader
import math_verify.parser
from math_verify import ExprExtractionConfig, LatexExtractionConfig

from tasks.labels.verifiers.base import Verdict, shown
from tasks.labels.verifiers.boxed import boxed_spans

# math-verify's patterns are not linear; an answer in prose stands at the end of a solution.
_WINDOW_CHARACTERS = 20_000
_LONGEST_REFERENCE = 1_000

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_BETWEEN_BOXES = re.compile(r"[\s$}]*[,;]?\s*(?:and|or)?[\s$]*(?:\\f?boxed\s*\{)")
_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:!]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\$|\s+")


def _is_not_about_timeouts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Timeout is disabled")


# math-verify warns that its time limit is off: here that is the intention.
for _module in (math_verify.parser, math_verify.grader):
    logging.getLogger(_module.__name__).addFilter(_is_not_about_timeouts)


def check(ground_truth: str) -> str | None:
    """None when the ground truth names one answer; else what is wrong. Reads only the form, parses nothing."""
    boxes = boxed_spans(ground_truth)
    if "\\boxed" in ground_truth and not boxes:
        return "its \\boxed{...} is not closed"
    answer = _reference(ground_truth)
    if not answer:
        return "empty"
    if len(answer) > _LONGEST_REFERENCE:
        return f"{len(answer)} characters without \\boxed{{...}}: a solution must box its answer"
    unescaped = re.sub(r"\\.", "", answer)
    if unescaped.count("{") != unescaped.count("}"):
        return f"braces do not balance: {shown(answer)!r}"
    return None


def verify(text: str, ground_truth: str) -> Verdict:
    """Compare the answer of `text`, boxed or in prose, to the reference.

    Raises ValueError when the ground truth is malformed or cannot be parsed.
    """
    problem = check(ground_truth)
    if problem is not None:
        raise ValueError(problem)
    reference = _reference(ground_truth)
    boxes = _final_boxes(text)
    if len(boxes) == 1 and _spelling(boxes[0]) == _spelling(reference):
        return Verdict(1.0, shown(boxes[0]), None)
    answer = _parse(" and ".join(f"\\boxed{{{box}}}" for box in boxes) or text[-_WINDOW_CHARACTERS:])
    if not answer:
        return Verdict(0.0, None, "no_answer")
    right = math_verify.verify(list(_gold(reference)), answer, timeout_seconds=None)
    # The last element is the source string; str() of an expression may itself run without end.
    source = answer[-1] if isinstance(answer[-1], str) else None
    return Verdict(float(right), shown(source) if source is not None else None, None)


def _reference(ground_truth: str) -> str:
    boxes = boxed_spans(ground_truth)
    if boxes:
        start, end = boxes[-1]
        return ground_truth[start:end].strip()
    answer = ground_truth.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(answer) > len(opening + closing) and answer.startswith(opening) and answer.endswith(closing):
            return answer[len(opening) : -len(closing)].strip()
    return answer


@lru_cache(maxsize=1024)
def _gold(reference: str) -> tuple[Any, ...]:
    parsed = _parse(f"\\boxed{{{reference}}}")
    if not parsed:
        raise ValueError(f"cannot be parsed: {shown(reference)!r}")
    return tuple(parsed)


def _parse(text: str) -> list[Any]:
    return math_verify.parse(text, extraction_config=_TARGETS, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _final_boxes(text: str) -> list[str]:
    """The last box and those it is listed with (`\\boxed{1} and \\boxed{2}`): an earlier one was taken back."""
    spans = boxed_spans(text)
    first = len(spans) - 1
    while first > 0 and _BETWEEN_BOXES.fullmatch(text, spans[first - 1][1], spans[first][0]):
        first -= 1
    return [text[start:end] for start, end in spans[max(first, 0) :] if text[start:end].strip()]


def _spelling(latex: str) -> str:
    """LaTeX without the marks that change only its looks."""
    latex = _WRAPPERS.sub(r"\1", latex).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _SPACING.sub("", latex).rstrip(".")
