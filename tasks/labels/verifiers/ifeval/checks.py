"""The 25 checks: pure functions of a text and the instruction's arguments.

Each decides as the official evaluation does, its oddities included (they are named where they occur), but
in time proportional to the text: a model stuck on `[` or on line breaks must not cost minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tasks.labels.verifiers.ifeval.text import count_words, detect_language, sentences, tokens

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_STAR_BULLET = re.compile(r"^[^\S\n]*\*[^*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^[^\S\n]*-.*$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n*]*\*\*")
_PARAGRAPH_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
_WORD_END = frozenset(".,?!'\"")
_JSON_FENCES = ("```json", "```Json", "```JSON", "```")


def _holds(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# Keywords


def keyword_existence(text: str, keywords: Sequence[str]) -> bool:
    """Every keyword, a regular expression, occurs in any case, also inside words."""
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword, a regular expression, occurs often or seldom enough, also inside words."""
    return _holds(sum(1 for _ in re.finditer(keyword, text, re.IGNORECASE)), relation, frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """No forbidden word occurs as a whole word, in any case."""
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter, in either case, occurs often or seldom enough.

    The official code replaces a letter outside a-z by one drawn at random; two prompts of the set ask for
    `#` and `!`, and here those are counted.
    """
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


def response_language(text: str, language: str) -> bool:
    """The detected language is the one asked for; a text without features passes."""
    return detect_language(text) in (language, None)


def english_capital(text: str) -> bool:
    """English, and no small letters; capitals without features for detection pass."""
    return text.isupper() and detect_language(text) in ("en", None)


def english_lowercase(text: str) -> bool:
    """English, and no capital letters; small letters without features for detection pass."""
    return text.islower() and detect_language(text) in ("en", None)


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words all in capitals occur often or seldom enough; a hyphenated word counts once."""
    capitals = sum(1 for token in tokens(text) if token.isupper())
    return _holds(capitals, capital_relation, capital_frequency)


# Length


def number_words(text: str, num_words: int, relation: str) -> bool:
    return _holds(count_words(text), relation, num_words)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(len(sentences(text)), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs divided by `***`; a blank one at either end is not counted, one in between fails."""
    paragraphs = _PARAGRAPH_DIVIDER.split(text)
    last = len(paragraphs) - 1
    blank = [index for index, paragraph in enumerate(paragraphs) if not paragraph.strip()]
    if any(0 < index < last for index in blank):
        return False
    return len(paragraphs) - len(blank) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs divided by blank lines are so many, and one of them begins with a word.

    As in the official code, blank paragraphs lower the count but keep their place in the numbering.
    """
    paragraphs = text.split("\n\n")
    count = sum(1 for paragraph in paragraphs if paragraph.strip())
    if count != num_paragraphs or nth_paragraph > count:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)
    if not words:
        return False
    word = words[0].lstrip("'").lstrip('"')
    end = next((index for index, character in enumerate(word) if character in _WORD_END), len(word))
    return word[:end].lower() == first_word.lower()


# Content and format


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many `[...]`, each within one line."""
    return sum(_count_brackets(line) for line in text.split("\n")) >= num_placeholders


def _count_brackets(line: str) -> int:
    count = position = 0
    while (opening := line.find("[", position)) >= 0 and (closing := line.find("]", opening)) >= 0:
        count += 1
        position = closing + 1
    return count


def postscript(text: str, postscript_marker: str) -> bool:
    """The marker of a postscript occurs, in any case and anywhere."""
    pattern = _POSTSCRIPTS.get(postscript_marker, postscript_marker.lower())
    return re.search(pattern, text.lower()) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with `*` (not `**`) or `-`."""
    bullets = sum(1 for pattern in (_STAR_BULLET, _DASH_BULLET) for _ in pattern.finditer(text))
    return bullets == num_bullets


def constrained_response(text: str) -> bool:
    """One of the three fixed answers occurs."""
    return any(option in text for option in _OPTIONS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least so many `*...*` and `**...**` that are not blank."""
    single = sum(1 for match in _HIGHLIGHT.finditer(text) if match[0].strip("*").strip())
    double = sum(1 for match in _DOUBLE_HIGHLIGHT.finditer(text) if match[0][2:-2].strip())
    return single + double >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many section headings: the marker, a regular expression, and a number."""
    headings = re.finditer(rf"\s?{section_spliter}\s?\d+\s?", text)
    return sum(1 for _ in headings) >= num_sections


def json_format(text: str) -> bool:
    """The whole text is JSON, in a code fence or not. What nests too deep to be read is not."""
    text = text.strip()
    for fence in _JSON_FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """Some line holds `<<...>>` with more than angle brackets between."""
    return any(_holds_title(line) for line in text.split("\n"))


def _holds_title(line: str) -> bool:
    opening, closing = line.find("<<"), line.rfind(">>")
    if opening < 0 or closing < opening + 3:
        return False
    return bool(line[opening : closing + 2].lstrip("<").rstrip(">").strip())


def two_responses(text: str) -> bool:
    """Two different responses divided by `******`; a blank one is allowed at either end only."""
    responses = [response.strip() for response in text.split("******")]
    if not all(responses[1:-1]):
        return False
    given = [response for response in responses if response]
    return len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The text begins with the prompt, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    """The text, quotation marks aside, ends with the phrase, in any case."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    """The whole text stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'
