"""The 25 instruction kinds with the arguments each one takes.

`bind` turns an id and its arguments into an `Instruction` or says what is wrong with them. The official
code draws a missing or odd argument at random; here it is refused, for a verdict must not be a matter
of luck. Arguments that are null count as absent, as in the published Parquet files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.labels.verifiers.base import shown
from tasks.labels.verifiers.ifeval import checks
from tasks.labels.verifiers.ifeval.text import languages

# A parameter's reader returns the value a check takes, or raises ValueError with what it should be.
Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Instruction:
    """One instruction of one prompt, with its arguments; calling it changes nothing."""

    id: str
    arguments: tuple[tuple[str, Any], ...]

    def followed_by(self, text: str) -> bool:
        check, _ = KINDS[self.id]
        return check(text, **dict(self.arguments))


def bind(name: object, arguments: object) -> Instruction:
    """An instruction with its arguments read.

    Raises ValueError for an unknown id and for missing, unknown or unfit arguments.
    """
    if not isinstance(name, str) or name not in KINDS:
        near = difflib.get_close_matches(str(name), KINDS, n=1)
        raise ValueError(f"unknown instruction {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{name}: arguments are not an object")
    given = {key: value for key, value in arguments.items() if value is not None}
    _, readers = KINDS[name]
    unknown = sorted(given.keys() - readers.keys())
    missing = sorted(readers.keys() - given.keys())
    if unknown or missing:
        parts = [f"unknown {', '.join(map(repr, unknown))}"] if unknown else []
        parts += [f"missing {', '.join(map(repr, missing))}"] if missing else []
        raise ValueError(f"{name}: {'; '.join(parts)}")
    read = tuple((key, _read(name, key, readers[key], given[key])) for key in sorted(readers))
    values = dict(read)
    if "nth_paragraph" in values and values["nth_paragraph"] > values["num_paragraphs"]:
        raise ValueError(f"{name}: 'nth_paragraph' is beyond 'num_paragraphs'")
    return Instruction(name, read)


def _read(name: str, key: str, reader: Reader, value: object) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise ValueError(f"{name}: {key!r} is {shown(repr(value))}, not {error}") from None


def _count(value: object) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:  # pyright: ignore[reportOperatorIssue]
        raise ValueError("a whole number of at least 0")
    return int(value)  # pyright: ignore[reportArgumentType]


def _position(value: object) -> int:
    count = _count(value)
    if count == 0:
        raise ValueError("a whole number of at least 1")
    return count


def _relation(value: object) -> str:
    if value not in ("less than", "at least"):
        raise ValueError("'less than' or 'at least'")
    return str(value)


def _string(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value


def _pattern(value: object) -> str:
    # The official checks use keywords and markers as regular expressions.
    text = _string(value).strip()
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None
    return text


def _patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of at least one text")
    for item in value:
        _pattern(item)
    return tuple(value)


def _letter(value: object) -> str:
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("one character")
    return value.strip()


def _language(value: object) -> str:
    if not isinstance(value, str) or value not in languages():
        raise ValueError(f"one of {', '.join(sorted(languages()))}")
    return value


KINDS: dict[str, tuple[Callable[..., bool], dict[str, Reader]]] = {
    "change_case:capital_word_frequency": (
        checks.capital_word_frequency,
        {"capital_frequency": _count, "capital_relation": _relation},
    ),
    "change_case:english_capital": (checks.english_capital, {}),
    "change_case:english_lowercase": (checks.english_lowercase, {}),
    "combination:repeat_prompt": (checks.repeat_prompt, {"prompt_to_repeat": _string}),
    "combination:two_responses": (checks.two_responses, {}),
    "detectable_content:number_placeholders": (checks.number_placeholders, {"num_placeholders": _count}),
    "detectable_content:postscript": (checks.postscript, {"postscript_marker": _pattern}),
    "detectable_format:constrained_response": (checks.constrained_response, {}),
    "detectable_format:json_format": (checks.json_format, {}),
    "detectable_format:multiple_sections": (
        checks.multiple_sections,
        {"section_spliter": _pattern, "num_sections": _count},
    ),
    "detectable_format:number_bullet_lists": (checks.number_bullet_lists, {"num_bullets": _count}),
    "detectable_format:number_highlighted_sections": (checks.number_highlighted_sections, {"num_highlights": _count}),
    "detectable_format:title": (checks.title, {}),
    "keywords:existence": (checks.keyword_existence, {"keywords": _patterns}),
    "keywords:forbidden_words": (checks.forbidden_words, {"forbidden_words": _patterns}),
    "keywords:frequency": (
        checks.keyword_frequency,
        {"keyword": _pattern, "frequency": _count, "relation": _relation},
    ),
    "keywords:letter_frequency": (
        checks.letter_frequency,
        {"letter": _letter, "let_frequency": _count, "let_relation": _relation},
    ),
    "language:response_language": (checks.response_language, {"language": _language}),
    "length_constraints:nth_paragraph_first_word": (
        checks.nth_paragraph_first_word,
        {"num_paragraphs": _position, "nth_paragraph": _position, "first_word": _string},
    ),
    "length_constraints:number_paragraphs": (checks.number_paragraphs, {"num_paragraphs": _count}),
    "length_constraints:number_sentences": (checks.number_sentences, {"num_sentences": _count, "relation": _relation}),
    "length_constraints:number_words": (checks.number_words, {"num_words": _count, "relation": _relation}),
    "punctuation:no_comma": (checks.no_comma, {}),
    "startend:end_checker": (checks.end_checker, {"end_phrase": _string}),
    "startend:quotation": (checks.quotation, {}),
}
