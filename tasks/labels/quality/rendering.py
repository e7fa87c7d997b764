"""Judge prompts from pieces: each text is encoded once for its place in the template, not once for every judgement.

A player meets ten others, and the encoding of a judgement costs more than all else that we do for it. The rendered
template is cut inside its literal parts into five pieces, of which each holds one text at most, and the ids of the
whole are those of the pieces, one after the other. That is exact only where no token crosses a cut. The tokenizers of
today split a text into words before they merge, and between a letter and a space with a letter behind it there always
is such a split, so the cuts are made there. Whether a tokenizer and a chat template are of that kind is not taken on
trust: `PromptEncoder` renders texts with everything that merges at borders both ways, and where one differs, or a
template has no such place, it encodes every prompt whole.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from typing import TYPE_CHECKING

import orjson

from tasks.core.chat_template import ChatTemplate
from tasks.labels.quality.templates import PLACEHOLDERS, JudgeTemplate, defused, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("winnow.quality")

_KEPT = 8_192
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_MARKS = dict(zip(PLACEHOLDERS, ("\ue0a1Xq", "\ue0a2Xq", "\ue0a3Xq"), strict=True))
# what meets the template's own words at a text's two ends: spaces and line ends in every mixture, letters, digits,
# apostrophes, marks that combine with the character before, scripts without spaces, what chat templates look for
_HOSTILE = ("", " ", "\n", "\n\n", " \n", "\t", "word", " word", "word ", "\nword\n", "\r\nword\r\n",
            "  two  spaces  ", "7", "42 7", "'s", "don't", ".", "...", "?!", "-", "\u0301e\u0301", "é",
            "日本語", " 日本", "🙂", "A", "A: b", "\u00a0x\u00a0", "<b>", "{prompt}", "[End", "# head\n", "ﬁ",
            "x\n\nAnswer B: y", "```\ncode\n```", "<tool_response>x</tool_response>", "<think>x</think>y")


class PromptEncoder:
    """Judge prompts as the JSON of their token ids. `exact_pieces` tells whether they are put together from pieces."""

    def __init__(self, template: JudgeTemplate, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None,
                 max_tokens: int) -> None:
        self._template, self._tokenizer, self._chat, self._limit = template, tokenizer, chat, max_tokens
        self._pieces = _pieces(template, tokenizer, chat)
        self._piece = functools.lru_cache(_KEPT)(self._encoded)
        if self._pieces and not self._is_exact():
            self._pieces = None
        if self._pieces is None:
            log.info("judge template '%s': with this tokenizer a prompt cannot be put together from pieces; each is "
                     "encoded whole", template.name)

    @property
    def exact_pieces(self) -> bool:
        """Whether pieces are used."""
        return self._pieces is not None

    def ids(self, prompt: str, a: str, b: str) -> tuple[bytes, int]:
        """The JSON list of the ids that `JudgeTemplate.render` gives for the same texts, and how many they are."""
        if self._pieces:
            found = [self._piece(n, text) for n, text in self._in_order(prompt, a, b)]
            if (count := sum(n for _, n in found)) <= self._limit:
                return _joined(found), count
        ids = self._template.render(self._tokenizer, prompt, a, b, max_tokens=self._limit, chat=self._chat)
        return orjson.dumps(ids), len(ids)

    def _in_order(self, prompt: str, a: str, b: str) -> list[tuple[int, str]]:
        assert self._pieces
        texts = {"prompt": prompt, "a": a, "b": b, "": ""}
        return [(n, texts[name]) for n, (_, name, _) in enumerate(self._pieces)]

    def _encoded(self, n: int, text: str) -> tuple[bytes, int]:
        assert self._pieces
        before, name, after = self._pieces[n]
        ids = encode(self._tokenizer, before + (defused(self._tokenizer, text) if name else "") + after)
        return orjson.dumps(ids)[1:-1], len(ids)

    def _is_exact(self) -> bool:
        """Whether the pieces give what the whole gives, for texts made to break them."""
        words = itertools.cycle(("plain words", "x", " y "))
        trials = [(text, next(words), next(words)) for text in _HOSTILE]
        trials += [(next(words), text, next(words)) for text in _HOSTILE]
        trials += [(next(words), next(words), text) for text in _HOSTILE]
        trials += [(text, text, text) for text in _HOSTILE]
        for texts in trials:
            whole = self._template.render(self._tokenizer, *texts, chat=self._chat)
            pieces = [self._encoded(n, text) for n, text in self._in_order(*texts)]
            if orjson.loads(_joined(pieces)) != whole:
                return False
        return True


def _joined(pieces: list[tuple[bytes, int]]) -> bytes:
    return b"[" + b",".join(ids for ids, count in pieces if count) + b"]"


@functools.lru_cache(maxsize=4)  # to try the hostile texts takes a fifth of a second: once a process, not once a shard
def prompt_encoder(template: JudgeTemplate, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None,
                   max_tokens: int) -> PromptEncoder:
    """The encoder of a template, tokenizer and chat template."""
    return PromptEncoder(template, tokenizer, chat, max_tokens)


Piece = tuple[str, str, str]


def _pieces(template: JudgeTemplate, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None,
            ) -> list[Piece] | None:
    """(literal before, name of the text or "", literal after) of each piece in order; None without places to cut."""
    text = template.text(tokenizer, chat, *(_MARKS[name] for name in PLACEHOLDERS))
    if any(text.count(mark) != 1 for mark in _MARKS.values()):
        return None
    order = sorted(PLACEHOLDERS, key=lambda name: text.index(_MARKS[name]))
    literals = re.split("|".join(_MARKS.values()), text)
    # the last cut before the first text, the first after the last: the pieces with texts are as short as can be
    cuts = [[m.start() for m in _CUT.finditer(literal)] for literal in literals]
    if not all(cuts):
        return None
    at = [cuts[0][-1], *(places[len(places) // 2] for places in cuts[1:-1]), cuts[-1][0]]
    tails = [literal[cut:] for literal, cut in zip(literals, at, strict=True)]
    heads = [literal[:cut] for literal, cut in zip(literals, at, strict=True)]
    return [(heads[0], "", ""), *((tails[n], order[n], heads[n + 1]) for n in range(3)), (tails[3], "", "")]
