"""Words, sentences, tokens and language of a text, each as the official evaluation counts them.

Nothing is downloaded. Sentences: Punkt with its published English model. Tokens: the Penn Treebank rules
of NLTK. Language: langdetect, which draws n-grams at random, so it is seeded here.
"""

from __future__ import annotations

import os
import re
import threading
from functools import lru_cache
from typing import Any

from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
from langdetect.lang_detect_exception import LangDetectException

_SEED = 0
_WORD = re.compile(r"\w+")
_detectors_lock = threading.Lock()


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return sum(1 for _ in _WORD.finditer(text))


def sentences(text: str) -> list[str]:
    """The sentences of a text, by Punkt's English model."""
    return _sentence_splitter().tokenize(text)


def tokens(text: str) -> list[str]:
    """Treebank tokens, sentence by sentence."""
    split = _word_splitter()
    return [token for sentence in sentences(text) for token in split.tokenize(sentence)]


def detect_language(text: str) -> str | None:
    """ISO 639-1 code of the language (Chinese: zh-cn, zh-tw), or None for a text without features."""
    detector = _detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


@lru_cache(maxsize=1)
def languages() -> frozenset[str]:
    """The codes `detect_language` can return."""
    return frozenset(name for name in os.listdir(PROFILES_DIRECTORY) if not name.startswith((".", "_")))


@lru_cache(maxsize=1)
def _sentence_splitter() -> Any:
    import punkt

    return punkt.PunktSentenceTokenizer(punkt.load_model("english"))


@lru_cache(maxsize=1)
def _word_splitter() -> Any:
    # Importing NLTK takes a second or more: only this one kind of instruction pays for it.
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


def _detectors() -> DetectorFactory:
    # langdetect's own lazy global is published half loaded to other threads, and shares its seed.
    with _detectors_lock:
        return _loaded_detectors()


@lru_cache(maxsize=1)
def _loaded_detectors() -> DetectorFactory:
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(_SEED)
    return factory
