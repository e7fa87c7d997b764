"""Numbers as people and models write them, read exactly.

A quantity keeps its sign, currency, thousands separators, fraction, percent sign and scale word
(`-$1,234.50`, `3/4`, `1 1/2`, `25%`, `5 million`). Values are `Fraction`s: no floats, no rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# Beyond this many digits a number is noise (a model stuck on one digit), and Python refuses to read it.
_MAX_DIGITS = 400

_SCALES = {
    "k": 10**3,
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_VULGAR = {
    **{"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5"},
    **{"⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"},
}

_DIGIT = re.compile(r"\d")
_CURRENCY = r"(?:(?:US|CA|AU|NZ|HK)?\\?\$|[€£¥₹₽₩]|\b(?:USD|EUR|GBP|INR|Rs\.?)(?=[ ]?[-\u2212\d.]))"
_QUANTITY = re.compile(
    rf"""
    (?:(?<![\w)\].])(?P<sign>[-+\u2212\u2013]|negative[ ]))?  # an operator follows a word or bracket; a sign does not
    (?:{_CURRENCY}[ ]?(?P<inner_sign>[-\u2212])?|(?<!\w)(?<!\d\.))
    (?:
        (?P<whole>\d+)[ ](?P<mixed_top>\d+)/(?P<mixed_bottom>\d+)
      | (?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)
      | (?P<digits>\d{{1,3}}(?:,\d{{2,3}}){{0,9}},\d{{3}}(?!\d)|\d+)?(?P<decimals>(?:(?<=\d)|(?<![\w.]))\.\d+)?
        (?:[eE](?P<exponent>[-+]?\d{{1,2}})(?!\w))?
    )
    (?<=\d)(?!\.?\d)                                   # at least one digit, and all of them
    (?!(?:st|nd|rd|th)\b)                              # ordinals count nothing
    (?:[ ]?(?P<percent>\\?%|percent\b|per[ ]cent\b))?
    (?:(?P<kilo>[kK]\b)|[ ](?P<scale>dozen|hundred|thousand|million|billion|trillion)s?\b)?
    """,
    re.VERBOSE | re.IGNORECASE,
)

_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?)(\d+)\s*\}|()(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_VULGAR_FRACTION = re.compile(f"[{''.join(_VULGAR)}]")
_THIN_SPACE_GROUP = re.compile(r"(?<=\d)(?:\{,\}|\\!,\\!|,\\!|\\!,|\\,|[\u2009\u202f])(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class Quantity:
    """One number in a text.

    source: the characters it was read from; start, end: where they stand in the tidied text.
    readings: the values it may stand for: `5 million` is 5,000,000, and 5 where millions were asked
    for. The first reading is the literal one. Empty when the number is too long to be one.
    """

    source: str
    start: int
    end: int
    readings: tuple[Fraction, ...]
    percent: bool


def tidy(text: str) -> str:
    """Rewrite LaTeX and typographic spellings of numbers to plain ones, leaving all else alone."""
    text = _THIN_SPACE_GROUP.sub(",", text)
    text = _LATEX_FRACTION.sub(lambda m: _beside(m, f"{m[1] or ''}{m[2] or m[4]}/{m[5] or m[6]}"), text)
    return _VULGAR_FRACTION.sub(lambda m: _beside(m, _VULGAR[m[0]]), text)


def _beside(match: re.Match[str], fraction: str) -> str:
    """The fraction, kept apart from a digit before it: 1\\frac{1}{2} is one and a half, not eleven halves."""
    before = match.string[: match.start()][-1:]
    return f" {fraction}" if before.isdigit() else fraction


def quantities(text: str) -> Iterator[Quantity]:
    """Yield the numbers of a tidied text from left to right."""
    if not _DIGIT.search(text):
        return
    for match in _QUANTITY.finditer(text):
        yield _quantity(match)


def same(answer: Quantity, truth: Quantity) -> bool:
    """Whether two quantities agree exactly in some reading of each.

    A percent sign is compared at face value, as GSM8K's truths are written (25% is 25), and as
    hundredths where just one side has it (25% is 0.25).
    """
    if set(answer.readings) & set(truth.readings):
        return True
    if answer.percent == truth.percent:
        return False
    hundredth = Fraction(1, 100)
    left = {value * hundredth for value in answer.readings} if answer.percent else set(answer.readings)
    right = {value * hundredth for value in truth.readings} if truth.percent else set(truth.readings)
    return bool(left & right)


def _quantity(match: re.Match[str]) -> Quantity:
    value = _value(match)
    readings: tuple[Fraction, ...] = ()
    if value is not None:
        if (match["sign"] or "+") != "+" or match["inner_sign"]:
            value = -value
        scale = _SCALES.get((match["scale"] or match["kilo"] or "").lower())
        readings = (value,) if scale is None else (value * scale, value)
    return Quantity(match[0].strip(), match.start(), match.end(), readings, match["percent"] is not None)


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > _MAX_DIGITS:
        return None
    if match["whole"] is not None:
        return _ratio(match["mixed_top"], match["mixed_bottom"], int(match["whole"]))
    if match["top"] is not None:
        return _ratio(match["top"], match["bottom"], 0)
    exponent = match["exponent"]
    literal = (match["digits"] or "0").replace(",", "") + (match["decimals"] or "")
    return Fraction(literal + (f"e{exponent}" if exponent else ""))


def _ratio(top: str, bottom: str, whole: int) -> Fraction | None:
    return None if int(bottom) == 0 else whole + Fraction(int(top), int(bottom))
