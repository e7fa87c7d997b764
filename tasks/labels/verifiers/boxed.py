"""Find `\\boxed{...}` in LaTeX."""

from __future__ import annotations

import re

_OPENING = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """The (start, end) of the content of each outermost box whose braces balance, left to right."""
    spans: list[tuple[int, int]] = []
    position = 0
    while (opening := _OPENING.search(text, position)) is not None:
        end = closing_brace(text, opening.end())
        if end is None:
            # Nothing behind an unclosed brace can close: one pass over the rest settles every later box.
            position = opening.end()
            spans += _closed_later(text, position)
            break
        spans.append((opening.end(), end))
        position = end + 1
    return spans


def closing_brace(text: str, start: int) -> int | None:
    """The index of the brace that closes the one opened just before `start`, or None."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _closed_later(text: str, start: int) -> list[tuple[int, int]]:
    """The closed boxes behind an unclosed one, by one pass with a stack (no quadratic rescans)."""
    openings = {match.end() - 1: match.end() for match in _OPENING.finditer(text, start)}
    stack: list[int] = []
    spans: list[tuple[int, int]] = []
    for match in _BRACE.finditer(text, start):
        if match[0] == "{":
            stack.append(match.start())
        elif match[0] == "}" and stack:
            opened = stack.pop()
            if opened in openings:
                spans.append((openings[opened], match.start()))
    return sorted(spans)
