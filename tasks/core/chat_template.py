"""The chat template in use: the tokenizer's or the config's, checked, and told a fixed date.

Today's date must never reach a prompt, or the same prompt is another one tomorrow. Templates come by it in two ways:
the function `strftime_now`, which transformers puts into their globals, and the variable `date_string` of Llama's
templates, which falls back to that function. A variable of the same name shadows the global, so `apply` passes both.
"""

from __future__ import annotations

import datetime
import traceback
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, TemplateSyntaxError

from tasks.core.errors import InputError
from tasks.core.identity import digest

DEFAULT_DATE = datetime.date(2024, 7, 26)
"""What Llama 3's templates fall back to."""

KEY = "generation.generator.chat_template"

Chat = list[dict[str, str]]

_SYSTEM = {"role": "system", "content": "samplerules"}
_USER = {"role": "user", "content": "samplequestion"}
_ASSISTANT = {"role": "assistant", "content": "sampleanswer"}
_PLAIN = [_USER]
_WITH_SYSTEM = [_SYSTEM, _USER]
_SAMPLES = (_PLAIN, _WITH_SYSTEM, [_USER, _ASSISTANT, _USER], [_SYSTEM, _USER, _ASSISTANT, _USER])
# They differ in all that strftime can say: year, month, day, weekday, week, hour, minute, second.
_MOMENTS = (datetime.datetime(1987, 1, 5, 3, 4, 5), datetime.datetime(2001, 2, 13, 14, 15, 16),
            datetime.datetime(2038, 11, 27, 21, 22, 23))


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the day it is told. Equal digests render every chat alike (by one tokenizer)."""

    source: str
    """The Jinja text."""
    origin: str
    """`tokenizer`, `config` or `config: PATH`."""
    date: datetime.date
    """The day that it is told; `DEFAULT_DATE` if it stamps none, whatever was asked for."""
    stamps_date: bool
    """Prompts of it contain a date (or depend on one)."""

    @property
    def digest(self) -> str:
        """Digest of the text, and of the date if it stamps one."""
        return digest("chat_template", self.source, self.date.isoformat() if self.stamps_date else None)

    def recorded(self) -> dict[str, Any]:
        """As JSON, for `from_recorded`: digest, origin, stamps_date, date (if it stamps one) and source."""
        dated = {"date": self.date.isoformat()} if self.stamps_date else {}
        return {"digest": self.digest, "origin": self.origin, "stamps_date": self.stamps_date, **dated,
                "source": self.source}

    @staticmethod
    def from_recorded(raw: dict[str, Any], where: str = "run.json") -> ChatTemplate:
        """The template of `recorded`. Raises InputError when text or date are not those of the recorded digest."""
        date = datetime.date.fromisoformat(raw["date"]) if raw["stamps_date"] else DEFAULT_DATE
        template = ChatTemplate(raw["source"], raw["origin"], date, raw["stamps_date"])
        if template.digest != raw["digest"]:
            raise InputError(f"{where}: the recorded chat template ({raw['origin']}) is not that of its digest "
                             f"{raw['digest']}; it was edited: put it back")
        return template


def chat_template(tokenizer: Any, given: str | None = None, date: datetime.date = DEFAULT_DATE, key: str = KEY
                  ) -> ChatTemplate:
    """The template that a config's `key` gives, or the tokenizer's own (of several named ones the default one).

    Args:
        given: Jinja text if there is a "{" or a newline in it, else the path of a file with such text.
        date: what a template that stamps a date is told.

    Raises:
        InputError: naming key, file and line: no such file, no template at all, no valid Jinja, or it fails for a plain
            chat or leaves the user's text out. A template may refuse system turns (see `system_turns`).
    """
    if given is None:
        source, origin, where = _own(tokenizer, key), "tokenizer", f"{key}: the tokenizer's own chat template"
    elif "{" in given or "\n" in given:
        source, origin, where = given, "config", key
    else:
        source, origin, where = _read(given, key), f"config: {given}", f"{key}: {given}"
    stamps = _checked(tokenizer, source, where)
    return ChatTemplate(source, origin, date if stamps else DEFAULT_DATE, stamps)


def _own(tokenizer: Any, key: str) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise InputError(f"{key}: the tokenizer has several chat templates and none is named default "
                             f"({', '.join(sorted(own))}); give the one to use here")
        own = own["default"]
    if not own:
        raise InputError(f"{key}: the tokenizer has no chat template; give one here, or put a chat_template.jinja "
                         "beside it")
    return own


def _read(path: str, key: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{key}: no such file {path!r} (looked in {file.absolute().parent}); give a file with a Jinja "
                         "template, or the template itself")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: {path}: cannot be read: {error}") from error


@lru_cache(maxsize=16)
def _checked(tokenizer: Any, source: str, where: str) -> bool:
    """Whether the template stamps dates; InputError if it is none that can be used."""
    told = _told(DEFAULT_DATE, True)
    try:
        text = _rendered(tokenizer, source, [_PLAIN], told)[0]
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise InputError(f"{where}{_line(error)}: {_reason(error)}") from error
    if not _says(text, _USER):
        raise InputError(f"{where}: it leaves the user's text out: a chat of {_USER['content']!r} renders as "
                         f"{text[:200]!r}")
    try:
        _rendered(tokenizer, source, [_WITH_SYSTEM], told)
    except Exception as error:
        if not _refused(error):
            raise InputError(f"{where}{_line(error)}: with a system turn: {_reason(error)}") from error
    return any(_stamps(tokenizer, source, chat) for chat in _SAMPLES)


def _stamps(tokenizer: Any, source: str, chat: Chat) -> bool:
    """Whether what the template makes of `chat` depends on the date, found out by telling it several."""
    def said(**told: Any) -> str | None:
        try:
            return _rendered(tokenizer, source, [chat], told)[0]
        except Exception:  # refused, at some of the dates perhaps
            return None

    without = said(strftime_now=_MOMENTS[0].strftime)
    if any(said(strftime_now=moment.strftime) != without for moment in _MOMENTS[1:]):
        return True
    day = _date_string(_MOMENTS[0])
    filled = said(strftime_now=_MOMENTS[0].strftime, date_string=day)
    if filled is None or day not in filled:
        return False
    # A date_string counts where it fills a place that is there without it (Llama 3.1's own "26 Jul 2024"). A line that
    # stands only where one is passed is no stamp: nobody passes one unless told, and it would alter the prompt.
    head, tail = filled.split(day)[0], filled.split(day)[-1]
    return without is None or (len(without) >= len(head) + len(tail) and without.startswith(head)
                               and without.endswith(tail))


def system_turns(tokenizer: Any, template: ChatTemplate) -> Literal["keep", "drop", "raise"]:
    """What the template does with a system turn: its text stands in the prompt, is silently left out, or the template
    raises an error."""
    try:
        return "keep" if _says(apply(tokenizer, [_WITH_SYSTEM], template)[0], _SYSTEM) else "drop"
    except InputError:
        return "raise"


def apply(tokenizer: Any, chats: list[Chat], template: ChatTemplate | None = None, *, answered: bool = False
          ) -> list[str]:
    """The prompt text of each chat, up to where the answer begins; without `template` the tokenizer's own.

    `answered`: the last turn is the answer, and the text ends with it.

    Raises InputError, with the line of the template, for a chat that it refuses.
    """
    if not chats:
        return []
    template = template or chat_template(tokenizer)
    try:
        return _rendered(tokenizer, template.source, chats, _told(template.date, template.stamps_date),
                         answered=answered)
    except Exception as error:
        if len(chats) > 1:  # which one is it? This raises for it
            return [apply(tokenizer, [chat], template, answered=answered)[0] for chat in chats]
        roles = ", ".join(turn["role"] for turn in chats[0])
        raise InputError(f"chat template ({template.origin}){_line(error)}: {_reason(error)} (turns: {roles})"
                         ) from error


def _rendered(tokenizer: Any, source: str, chats: list[Chat], told: dict[str, Any], *, answered: bool = False
              ) -> list[str]:
    return tokenizer.apply_chat_template(
        chats, chat_template=source, tokenize=False, add_generation_prompt=not answered, **told)


def _told(date: datetime.date, stamps: bool) -> dict[str, Any]:
    """The template variables of a day: midnight. `strftime_now` goes to every template: one that looked dateless in the
    samples must not ask the clock for another chat."""
    moment = datetime.datetime(date.year, date.month, date.day)
    told: dict[str, Any] = {"strftime_now": moment.strftime}
    return told | {"date_string": _date_string(moment)} if stamps else told


def _date_string(date: datetime.date) -> str:
    return date.strftime("%d %b %Y")  # Llama's form


def _says(text: str, turn: dict[str, str]) -> bool:
    return turn["content"] in text.casefold()


def _refused(error: Exception) -> bool:
    """Whether the template itself said no, by the `raise_exception` of chat templates: that raises a bare one."""
    return type(error) is TemplateError


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, TemplateSyntaxError):
        return f"no valid Jinja: {text}"
    return f"it refuses the chat: {text}" if _refused(error) else f"it fails: {text or type(error).__name__}"


def _line(error: Exception) -> str:
    """`, line N` of the template, where it can be told: Jinja rewrites tracebacks so that they speak of it."""
    if isinstance(error, TemplateSyntaxError):
        return f", line {error.lineno}"
    lines = [lineno for frame, lineno in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""
