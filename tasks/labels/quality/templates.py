"""Pairwise judge templates: from (prompt, answer A, answer B) to token ids, and from log-probabilities to
an outcome.

The verdict is one token. The judge generates nothing: the server reports the log-probabilities of the two
verdict tokens at the place where the verdict would come, and `outcome` makes a probability of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks.core.chat_template import ChatTemplate, apply
from tasks.core.errors import InputError, did_you_mean
from tasks.core.identity import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDERS = ("prompt", "a", "b")
MARKER = " [...] "
"""Stands where a too long text was cut."""

MASKED = -1e30
"""Log-probabilities below this stand for probability 0 (servers report masked tokens as -3.4e38)."""


@dataclass(frozen=True)
class Example:
    """One worked example: a comparison and the verdict that the judge should have given."""

    prompt: str
    a: str
    b: str
    verdict: str


@dataclass(frozen=True)
class JudgeTemplate:
    """How a judge is asked which of two answers is better.

    Raises:
        ValueError: `user` lacks a placeholder, repeats one or has an unknown one; verdicts that are empty or
            equal; an example with another verdict.
    """

    name: str
    user: str
    """The user's turn, with {prompt}, {a} and {b} once each; other braces stand for themselves."""
    system: str | None = None
    examples: tuple[Example, ...] = ()
    """Turns before the question, in the layout of `user`; the assistant's: `assistant_prefix` + verdict."""
    assistant_prefix: str = ""
    """Put into the assistant's mouth; the verdict is the next token."""
    verdicts: tuple[str, str] = ("A", "B")
    """What the judge says when the first, or the second, answer is better."""

    def __post_init__(self) -> None:
        found = re.findall(r"\{(\w+)\}", self.user)
        for name in found:
            if name not in PLACEHOLDERS:
                raise ValueError(f"user: unknown placeholder '{{{name}}}'"
                                 f"{did_you_mean(name, list(PLACEHOLDERS))} Known: {{prompt}}, {{a}}, {{b}}.")
        for name in PLACEHOLDERS:
            if found.count(name) != 1:
                raise ValueError(f"user: '{{{name}}}' must stand in it once, found {found.count(name)} times")
        if not all(self.verdicts) or self.verdicts[0] == self.verdicts[1]:
            raise ValueError(f"verdicts: two different texts are needed, got {list(self.verdicts)}")
        for example in self.examples:
            if example.verdict not in self.verdicts:
                raise ValueError(f"examples: '{example.verdict}' is none of the verdicts "
                                 f"{list(self.verdicts)}")

    @property
    def digest(self) -> str:
        """Identity of the content: equal for templates that differ in name alone."""
        content = dataclasses.asdict(self)
        del content["name"]
        return digest("judge_template", content)

    def with_system(self, text: str | None) -> JudgeTemplate:
        """The same template with this system turn in place of its own, which None leaves."""
        return self if text is None else dataclasses.replace(self, system=text)

    def recorded(self) -> dict[str, Any]:
        """As JSON, for `from_recorded`: the digest and every field."""
        fields = dataclasses.asdict(self)
        return {"digest": self.digest, **fields, "verdicts": list(self.verdicts), "examples": list(fields["examples"])}

    @staticmethod
    def from_recorded(raw: dict[str, Any], where: str = "run.json") -> JudgeTemplate:
        """The template of `recorded`. Raises InputError when it is not that of the recorded digest."""
        fields = {key: value for key, value in raw.items() if key != "digest"}
        template = JudgeTemplate(**fields | {
            "verdicts": tuple(raw["verdicts"]), "examples": tuple(Example(**example) for example in raw["examples"])})
        if template.digest != raw["digest"]:
            raise InputError(f"{where}: the recorded judge template '{template.name}' is not that of its digest "
                             f"{raw['digest']}; it was edited: put it back")
        return template

    def render(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, a: str, b: str, max_tokens: int | None = None,
        chat: ChatTemplate | None = None,
    ) -> list[int]:
        """Token ids of the request, ready to be sent as they are: the chat template, applied once, with
        `assistant_prefix` at the end. Nothing is added around it, so there is no second BOS.

        The contents stay text: braces in them mean nothing, and the text of one of the tokenizer's special
        tokens (a candidate that says "<|im_end|>") gets a space inside and cannot end the turn.

        Args:
            max_tokens: the longest result; leave room for the verdict. When prompt and answers do not fit,
                the template stays whole and each of the three keeps at most c tokens, c as large as fits:
                head and tail of equal length (in characters) with " [...] " between them. A and B thus have
                the same budget, and what is shorter than c is not cut.
            chat: the chat template; None is the tokenizer's own, told the default date.

        Raises:
            ValueError: the template alone leaves no room for contents.
            InputError: the chat template refuses the turns.
        """
        return fitted(tokenizer, [prompt, a, b], max_tokens,
                      lambda contents: self._encode(tokenizer, chat, *contents), f"judge template '{self.name}'")

    def verdict_token_ids(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None = None
    ) -> tuple[int, int]:
        """The tokens of the two verdicts, as they come after `render`.

        Raises:
            ValueError: a verdict is not exactly one token there, or both are the same token.
            InputError: the chat template refuses the turns.
        """
        where = f"judge template '{self.name}'"
        before = self.text(tokenizer, chat, "p", "a", "b")
        head = encode(tokenizer, before)
        found = []
        for verdict in self.verdicts:
            ids = encode(tokenizer, before + verdict)
            if ids[: len(head)] != head:
                raise ValueError(f"{where}: the verdict '{verdict}' merges with the text before it, "
                                 f"{before[-20:]!r}; end assistant_prefix without a space and begin the "
                                 "verdicts with one, or the reverse")
            if len(ids) != len(head) + 1:
                raise ValueError(f"{where}: this tokenizer makes {len(ids) - len(head)} "
                                 f"tokens of the verdict '{verdict}' after {before[-20:]!r}; it must be one")
            found.append(ids[-1])
        if found[0] == found[1]:
            raise ValueError(f"{where}: both verdicts are token {found[0]} in this tokenizer")
        return found[0], found[1]

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None, prompt: str, a: str, b: str
    ) -> list[int]:
        return encode(tokenizer, self.text(tokenizer, chat, prompt, a, b))

    def text(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None, prompt: str, a: str, b: str
    ) -> str:
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for example in self.examples:
            turns.append({"role": "user", "content": self._fill(example.prompt, example.a, example.b)})
            turns.append({"role": "assistant", "content": self.assistant_prefix + example.verdict})
        turns.append({"role": "user", "content": self._fill(prompt, a, b)})
        return apply(tokenizer, [turns], chat)[0] + self.assistant_prefix

    def _fill(self, prompt: str, a: str, b: str) -> str:
        values = {"prompt": prompt, "a": a, "b": b}
        # One pass: placeholders inside the contents are not looked at.
        return re.sub(r"\{(prompt|a|b)\}", lambda match: values[match[1]], self.user)


def fitted(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None,
           rendered: Callable[[Sequence[str]], list[int]], where: str) -> list[int]:
    """`rendered(texts)`, the texts defused and, where that is longer than `max_tokens`, cut as `JudgeTemplate.render`
    says: each to at most the same number of tokens.

    Raises ValueError, which names `where` they stand, if that leaves no room for them.
    """
    contents = [defused(tokenizer, text) for text in texts]
    ids = rendered(contents)
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    lengths = [_length(tokenizer, text) for text in contents]
    room = max_tokens - len(rendered([""] * len(contents)))
    # Tokens can merge or split where texts meet, so what should fit may be a few tokens too long.
    cap = _equal_share(lengths, room)
    least = _length(tokenizer, MARKER) + 2
    while cap >= least:
        cut = [_cut(tokenizer, text, n, cap) for text, n in zip(contents, lengths, strict=True)]
        ids = rendered(cut)
        if len(ids) <= max_tokens:
            return ids
        cap -= 1
    raise ValueError(f"max_tokens: {max_tokens} leave {max(room, 0)} for prompt and answers beside {where}; allow "
                     "more, or take a shorter template")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it is, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(encode(tokenizer, text))


@functools.lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = sorted({*added, *map(str, tokenizer.all_special_tokens)}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def defused(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text, in which a special token's text is no special token."""
    pattern = _special(tokenizer)
    return text if pattern is None else pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _equal_share(lengths: list[int], room: int) -> int:
    """The largest c with sum(min(length, c)) <= room; 0 if there is none."""
    for shorter, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - shorter)
        if length >= share:
            return max(share, 0)
        room -= length
    return max(lengths)


@functools.lru_cache(maxsize=4096)  # a candidate meets many others under the same cap
def _cut(tokenizer: PreTrainedTokenizerBase, text: str, length: int, cap: int) -> str:
    """`text` if its `length` is at most `cap` tokens, else as much of its head and tail as fits."""
    if length <= cap:
        return text

    def kept(characters: int) -> str:
        tail = characters // 2
        return text[: characters - tail] + MARKER + text[len(text) - tail:]

    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _length(tokenizer, kept(middle)) <= cap else (low, middle - 1)
    return kept(low)


def outcome(logprob_a: float | None, logprob_b: float | None) -> tuple[float, float]:
    """The judge's verdict: (probability that the answer shown first is better, mass on other tokens).

    The first is the softmax over the two verdicts, exp(a) / (exp(a) + exp(b)); the second is
    1 - exp(a) - exp(b), at least 0, and tells how far the judge was from answering at all.

    Args:
        logprob_a, logprob_b: natural log-probabilities of the two verdict tokens; masked ones (-inf, or
            -3.4e38 as servers report it) count as probability 0.

    Raises:
        ValueError: one is missing, NaN or above 0, or both are masked: an abstention, not an outcome.
    """
    if logprob_a is None or logprob_b is None or math.isnan(logprob_a) or math.isnan(logprob_b):
        raise ValueError(f"verdict log-probabilities are missing: {logprob_a}, {logprob_b}")
    # Rounding on the server may lift a certain verdict a little over 0.
    if max(logprob_a, logprob_b) > 0.01:
        raise ValueError(f"verdict log-probabilities must not be positive: {logprob_a}, {logprob_b}")
    if max(logprob_a, logprob_b) < MASKED:
        raise ValueError(f"both verdicts are masked: {logprob_a}, {logprob_b}")
    difference = logprob_b - logprob_a
    # exp overflows from 710 on; the probability is then 0 in double precision anyway.
    first = 1 / (1 + math.exp(difference)) if difference < 700 else 0.0
    return first, max(0.0, 1.0 - math.exp(logprob_a) - math.exp(logprob_b))


FEW_SHOT = JudgeTemplate(
    name="few_shot",
    user="Question: {prompt}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\nWhich answer is better, A or B?",
    examples=(
        Example("What is the capital of France?", "Cats like to drink milk.",
                "The capital of France is Paris.", "B"),
        Example("How do I make tea?", "Pour hot water over tea leaves and wait five minutes.",
                "Over five pour leaves minutes water tea hot.", "A"),
    ),
)
"""For small instruct models that were never trained to judge: without the two examples, models of a hundred
million parameters give the same verdict to everything."""

GRAM = JudgeTemplate(
    name="gram",
    user="""\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to \
the user question displayed below. You should choose the assistant that follows the user's instructions and \
answers the user's question better.
Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and \
level of detail of their responses. Avoid any position biases and ensure that the order in which the \
responses were presented does not influence your decision. Do not allow the length of the responses to \
influence your evaluation. Do not favor certain names of the assistants. Be as objective as possible.
Please directly output your final verdict by strictly following this format: "A" if assistant A is better, \
"B" if assistant B is better.

[User Question]
{prompt}

[The Start of Assistant A's Answer]
{a}
[The End of Assistant A's Answer]

[The Start of Assistant B's Answer]
{b}
[The End of Assistant B's Answer]

#Preferred: """,
)
"""The layout that the GRAM reward models were fine-tuned on (NiuTrans/GRAM-LLaMA3.2-3B-RewardModel and its
sisters), quoted from github.com/NiuTrans/GRAM, README.md "Fine-Tuning" and evaluation/gram_eval.py (Apache
2.0; Wang et al. 2025, arXiv:2506.14175): one user turn, no system turn, and the verdict opens the
assistant's."""

BUILT_IN = {template.name: template for template in (FEW_SHOT, GRAM)}


def load_template(name_or_path: str | Path) -> JudgeTemplate:
    """A built-in template by its name, or the user's from a YAML file with the fields of `JudgeTemplate`
    (`name` is the file's if it is not given; `examples` are mappings of prompt, a, b, verdict).

    Raises:
        InputError: no such template or file, unknown or missing keys, values of the wrong type, or whatever
            `JudgeTemplate` refuses.
    """
    if (known := BUILT_IN.get(str(name_or_path))) is not None:
        return known
    path = Path(name_or_path)
    if not path.is_file():
        guess = did_you_mean(str(name_or_path), list(BUILT_IN))
        raise InputError(f"judge template '{name_or_path}': no such file, and no built-in template{guess} "
                         f"Built in: {', '.join(BUILT_IN)}.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {error}") from error
    fields = _strings(raw, JudgeTemplate, str(path), {"system", "examples", "verdicts"})
    verdicts = fields.pop("verdicts", ["A", "B"])
    if not (isinstance(verdicts, list) and len(verdicts) == 2 and all(isinstance(v, str) for v in verdicts)):
        raise InputError(f"{path}: verdicts: a list of two texts is needed (quote them), got {verdicts!r}")
    examples = fields.pop("examples", None) or []
    if not isinstance(examples, list):
        raise InputError(f"{path}: examples: a list of mappings is needed, got {examples!r}")
    if not isinstance(fields.get("system"), str | None):
        raise InputError(f"{path}: system: a text is needed, got {fields['system']!r}")
    try:
        return JudgeTemplate(
            **{"name": path.stem} | fields,
            verdicts=(verdicts[0], verdicts[1]),
            examples=tuple(Example(**_strings(example, Example, f"{path}: examples[{k}]", set()))
                           for k, example in enumerate(examples)),
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _strings(raw: Any, record: type, where: str, others: set[str]) -> dict[str, Any]:
    """`raw` as the fields of a dataclass: known keys, none missing, texts all but `others`."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: a mapping is needed, got {raw!r}")
    fields = {field.name: field for field in dataclasses.fields(record)}
    for key, value in raw.items():
        if key not in fields:
            raise InputError(f"{where}: unknown key '{key}'{did_you_mean(str(key), list(fields))} "
                             f"Known: {', '.join(fields)}.")
        if key not in others and not isinstance(value, str):
            raise InputError(f"{where}: {key}: a text is needed (quote it), got {value!r}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in raw and name != "name":
            raise InputError(f"{where}: the key '{name}' is missing")
    return dict(raw)
