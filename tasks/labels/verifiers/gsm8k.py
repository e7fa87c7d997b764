"""GSM8K: is the number a free-form solution ends on the reference number?

Where the answer is looked for, in this order; within one step the last hit counts:

1. a statement of the answer: `#### 72`, `\\boxed{72}`, a line `A: 72` or `Answer: 72`, `the answer is 72`;
2. bold text in the last line that holds a number: `She sold **72 clips** in 2 months.`;
3. the last number of the text, list numbering aside.

Numbers written as words are not read. Numbers are compared as exact fractions, see `quantities`.
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache

from tasks.labels.verifiers.base import Verdict, shown
from tasks.labels.verifiers.boxed import boxed_spans
from tasks.labels.verifiers.quantities import Quantity, quantities, same, tidy

# Bounds that real solutions stay far below; they keep degenerate texts (one endless line) linear.
_STATEMENT_CHARACTERS = 2000
_STATEMENTS = 200

_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculator annotations: 48/2 = <<48/2=24>>24
_EMPHASIS = re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|`")
# `#### 72` is an answer; `#### 2. Count the clips`, with text below it, is a heading.
_HASHES = re.compile(r"####(?!#)[ \t]*+(?!\d+[.):] [^\n]*\n\s*\S)")
_LABEL = re.compile(
    r"^[ \t>*#-]*(?:A|(?i:ans|answer|(?:the )?(?:final|correct) answer|final result))[ \t]*[:=][ \t]*",
    re.MULTILINE,
)
_PHRASE = re.compile(
    r"\banswer\b(?: [^.:\n\d=]{0,60}?)?"
    r"(?:\s(?:is|are|was|equals|would be|will be|should be)\b:?|(?P<colon>:)| ?[=→⇒])[ \t]*",
    re.IGNORECASE,
)
# What may stand between a phrase and its number: punctuation, LaTeX delimiters, hedges, a name and "=".
_FILLER = re.compile(
    r"(?:[\s:*({\[\"'~≈=]|\\[(\[]|\$(?!\d)|[a-z]\s*=|(?:approximately|about|around|exactly|roughly|only|just|simply"
    r"|therefore|thus|then|still|now|equal to|a total of|indeed|clearly)\b)*",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*(?!\s*:)|__([^_\n]+)__(?!\s*:)")
_NUMBERING = re.compile(r"[ \t>*#-]*(?:(?:step|part)[ \t]+\d+\b[.):]?|\d+[.):](?=\s))[ \t]*", re.IGNORECASE)
_OPERATOR_NEXT = re.compile(r"\s*(?:[-+*/\u00d7\u00f7\u2212]|\\times|\\div|\\cdot)\s*[\d$(\\]")
_SENTENCE_END = re.compile(r"[.!?]\s+\S")


def check(ground_truth: str) -> str | None:
    """None when the ground truth is a number, alone or after the last `####`; else what is wrong."""
    if _truth(ground_truth) is not None:
        return None
    shape = "after its last '####'" if "####" in ground_truth else "(write '72' or '... #### 72')"
    return f"not a number {shape}: {shown(ground_truth.rpartition('####')[2])!r}"


def verify(text: str, ground_truth: str) -> Verdict:
    """Compare the number `text` answers with to the reference.

    Raises ValueError when the ground truth is not a number.
    """
    truth = _truth(ground_truth)
    if truth is None:
        raise ValueError(check(ground_truth))
    answer = extract(text)
    if answer is None:
        return Verdict(0.0, None, "no_answer")
    return Verdict(float(same(answer, truth)), shown(answer.source), None)


def extract(text: str) -> Quantity | None:
    """The number a solution gives as its answer, or None when it holds no number."""
    text = _CALCULATION.sub("", text)
    return _stated(text) or _from_last_line(text)


@lru_cache(maxsize=4096)
def _truth(ground_truth: str) -> Quantity | None:
    text = tidy(ground_truth.rpartition("####")[2]).strip()
    found = next(quantities(text), None)
    complete = found is not None and found.start == 0 and found.end == len(text) and found.readings
    return found if complete else None


def _stated(text: str) -> Quantity | None:
    """The last explicit statement of an answer that holds a number."""
    plain = _EMPHASIS.sub("", text)
    statements = [(match.end(), _leading) for match in _HASHES.finditer(plain)]
    statements += [(match.end(), _labelled) for match in _LABEL.finditer(plain)]
    statements += [(match.end(), _labelled if match["colon"] else _leading) for match in _PHRASE.finditer(plain)]
    boxes = dict(boxed_spans(plain))
    statements += [(start, _of_line) for start in boxes]
    statements.sort(key=lambda statement: statement[0], reverse=True)
    for start, read in statements[:_STATEMENTS]:
        end = min(boxes.get(start, start), start + _STATEMENT_CHARACTERS)
        content = plain[start:end] if start in boxes else _line_from(plain, start)
        answer = read(tidy(content))
        if answer is not None:
            return answer
    return None


def _line_from(text: str, start: int) -> str:
    """The rest of the line at `start`, or the next line that is not blank when it is."""
    lines = text[start : start + _STATEMENT_CHARACTERS].split("\n")
    return next((line for line in lines if line.strip(" \t\r$*:[\\")), "")


def _labelled(line: str) -> Quantity | None:
    """`Answer: 72` or `A: she sold 72 clips`, but not `Answer: first, 48 / 2 = 24 clips in May. Then ...`."""
    if _NUMBERING.match(line):
        return None
    return _leading(line) or (None if _SENTENCE_END.search(line) else _of_line(line))


def _leading(line: str) -> Quantity | None:
    """The number a statement begins with, with nothing but fillers before it."""
    filler = _FILLER.match(line)
    line = line[filler.end() :] if filler else line
    first = next(quantities(line), None)
    if first is None or first.start > 0:
        return None
    return first if not _is_operand(line, first) else _of_line(line)


def _of_line(line: str) -> Quantity | None:
    """The right-hand side of an equation that closes the line, else the line's first number."""
    found = list(quantities(line))
    closing = [quantity for quantity in found if 0 <= line.rfind("=") < quantity.start]
    if closing and not _is_operand(line, closing[0]):
        return closing[0]
    return found[0] if found else None


def _is_operand(line: str, quantity: Quantity) -> bool:
    return _OPERATOR_NEXT.match(line, quantity.end) is not None


def _from_last_line(text: str) -> Quantity | None:
    end = len(text)
    while end >= 0:
        start = text.rfind("\n", 0, end) + 1
        line = text[max(start, end - _STATEMENT_CHARACTERS) : end]
        if any(character.isdigit() for character in line):
            answer = _last_bold(line) or _last_number(line)
            if answer is not None:
                return answer
        end = start - 1
    return None


def _last_bold(line: str) -> Quantity | None:
    for match in reversed(list(_BOLD.finditer(line))):
        content = match[1] or match[2]
        if not content.rstrip().endswith(":") and not _NUMBERING.match(content):
            answer = _of_line(tidy(content))
            if answer is not None:
                return answer
    return None


def _last_number(line: str) -> Quantity | None:
    line = _EMPHASIS.sub("", line)
    numbered = _NUMBERING.match(line)
    return next(iter(deque(quantities(tidy(line[numbered.end() :] if numbered else line)), maxlen=1)), None)
