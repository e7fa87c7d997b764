"""SGLang's flags: what an installed SGLang knows, asked of its `--help`, and a command line that it understands."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tasks.core.errors import did_you_mean

Value = str | int | float | bool
_ALIASES = {"model": "model-path", "tensor-parallel-size": "tp-size", "data-parallel-size": "dp-size",
            "pipeline-parallel-size": "pp-size", "expert-parallel-size": "ep-size", "ep": "ep-size", "tp": "tp-size",
            "dp": "dp-size", "pp": "pp-size", "speculative-draft-model": "speculative-draft-model-path"}


class LaunchFailed(Exception):
    """A server could not be started; the message says what failed, the usual cause and where the log is."""


class LaunchRefused(LaunchFailed):
    """What was asked for is wrong, on any machine; the message names the flag or key and the mend."""


def plain(name: str) -> str:
    """A flag's name however it was written: `--Tp_Size` is `tp-size`."""
    return name.strip().lstrip("-").replace("_", "-").lower()


def flag_name(name: str) -> str:
    """A flag's one name among its aliases: `--Tensor_Parallel_Size` is `tp-size`."""
    return _ALIASES.get(plain(name), plain(name))


@dataclass(frozen=True)
class Option:
    """One option of a command line: its names as printed, whether it takes a value, and which."""

    names: tuple[str, ...]
    value: Literal["none", "optional", "required"]
    choices: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The one name that is emitted: the first long one."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])

    @property
    def negatives(self) -> tuple[str, ...]:
        """The names that switch it off (`--no-x` beside `--x`)."""
        return tuple(name for name in self.names if name.startswith("--no-") and f"--{name[5:]}" in self.names)


@dataclass(frozen=True)
class Capabilities:
    """What an installed SGLang's command line understands."""

    options: tuple[Option, ...]

    @classmethod
    def parse(cls, text: str) -> Capabilities:
        """From the text that argparse (Python 3.11 to 3.13) prints for --help. Nothing found: no options."""
        return cls(tuple(option for line in text.splitlines() if (option := _parsed(line)) and "--help" not in
                         option.names))

    def find(self, name: str, *, whole: bool = False) -> tuple[Option, bool] | None:
        """The option that a name stands for and whether the name switches it off (`--no-x`); None: there is none.

        Spelling does not matter, and unless the name is `whole` an unambiguous beginning is enough, as for argparse.
        Raises LaunchRefused where several options begin so.
        """
        asked = plain(name)
        if whole or asked in self._names:
            return self._names.get(asked)
        begin = [found for full, found in self._names.items() if full.startswith(asked)]
        if len(meant := dict.fromkeys(begin)) > 1:
            names = sorted({option.name for option, _ in meant})
            raise LaunchRefused(f"flag {name}: it could be {', '.join(names[:6])}{' or another' * (len(names) > 6)}; "
                                "write the name out")
        return begin[0] if begin else None

    @cached_property
    def _names(self) -> dict[str, tuple[Option, bool]]:
        return {plain(name): (option, name in option.negatives) for option in self.options for name in option.names}


def _parsed(line: str) -> Option | None:
    """`  --a A, --b A  help` or `  --a, --b {x,y}`: options begin after two spaces, their help after two or more."""
    if not (found := re.match(r"  (-\S.*?)(?:\s{2,}|$)", line)):
        return None
    names = list(re.finditer(r"(?:^|, )(-[^\s,]+)", found[1]))
    value = found[1][names[-1].end():].strip()
    choices = re.match(r"\[?\{([^}]*)\}", value)
    return Option(tuple(name[1] for name in names), "optional" if value[:1] == "[" else "required" if value else "none",
                  tuple(choices[1].split(",")) if choices else None)


# --- a command line ---


@dataclass(frozen=True)
class Group:
    """Flags that mean something together: one that is not supported takes the others along. Whoever asks for one has
    to ask for all of `required`."""

    names: tuple[str, ...]
    required: tuple[str, ...] = ()


_STEPS = ("speculative-num-steps", "speculative-eagle-topk", "speculative-num-draft-tokens")
_BREADTHS = ("speculative-ngram-min-bfs-breadth", "speculative-ngram-max-bfs-breadth")
_MAX_BREADTH = 10  # SGLang's own; its min is 1
_ALGORITHM, _DRAFT = "speculative-algorithm", "speculative-draft-model-path"
_DRAFTED = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")  # those that SGLang gives all of _STEPS or wants all of them
_GROUPS = (
    Group(_BREADTHS),
    Group(("speculative-draft-window-size", "speculative-draft-sink-size"), ("speculative-draft-window-size",)),
    Group(("nnodes", "node-rank", "dist-init-addr")),
    Group(("ssl-keyfile", "ssl-certfile"), ("ssl-keyfile", "ssl-certfile")),
)


@dataclass(frozen=True)
class Rendered:
    """A command line's options, each one element of `argv`; `warnings` name what was left out."""

    argv: tuple[str, ...]
    warnings: tuple[str, ...]


def render(options: Iterable[tuple[str, Value]], known: Capabilities, *, sure: Collection[str] = ()) -> Rendered:
    """The options by name, whatever the spelling, as this SGLang takes them: none twice (the later one counts), those
    that it does not know left out with a warning, those that mean something together all there or all left out.

    True stands for a flag without a value; False takes an option away, or switches it off where there is a `--no-`.
    Names in `sure` are whole and spelled right: no other one is taken for them or suggested. Raises LaunchRefused for
    a value that the option cannot have.
    """
    line = _Line(known, sure)
    for name, value in options:
        line.ask(name, value)
    line.order_breadths()
    line.drop_speculation_without_its_guesser()
    drafted = str(line.value(_ALGORITHM)).strip().upper() in _DRAFTED
    for group in (*_GROUPS, Group(_STEPS, _STEPS if drafted else ())):
        line.drop_broken(group)
    line.drop_unknown()
    return Rendered(tuple(word for word in line.words.values() if word), tuple(line.warnings))


class _Line:
    """What is asked for by each option's canonical name, as a word of the command line (None: this SGLang has no such
    option), and what was left out."""

    def __init__(self, known: Capabilities, sure: Collection[str]) -> None:
        self.known, self.sure = known, sure
        self.values: dict[str, Value] = {}
        self.words: dict[str, str | None] = {}
        self.warnings: list[str] = []

    def key(self, name: str) -> str:
        """The canonical name of one of SGLang's own names."""
        found = self.known.find(name, whole=True)
        return plain(found[0].name) if found else name

    def value(self, name: str) -> Value | None:
        return self.values.get(self.key(name))

    def ask(self, name: str, value: Value) -> None:
        found = self.known.find(name, whole=plain(name) in self.sure)
        key = plain(found[0].name if found else name)
        self.take_away(key)
        if found and key == self.key(_ALGORITHM) and isinstance(value, str) and _choice(found[0], value) is None:
            found = None  # an algorithm that an older SGLang lacks is no mistake in the config
        word = _word(name, value, *found) if found else None
        if word or not found:
            self.values[key], self.words[key] = value, word

    def take_away(self, *keys: str) -> None:
        for key in keys:
            self.values.pop(key, None)
            self.words.pop(key, None)

    def order_breadths(self) -> None:
        """Both breadths or none, min <= max."""
        least, most = (self.value(name) for name in _BREADTHS)
        if least is None and most is None:
            return
        try:
            low = int(least if least is not None else 1)
            high = int(most if most is not None else max(low, _MAX_BREADTH))
        except ValueError:
            raise LaunchRefused(f"--{_BREADTHS[0]}, --{_BREADTHS[1]}: {least!r} and {most!r} must be whole "
                                "numbers") from None
        if low > high:
            raise LaunchRefused(f"--{_BREADTHS[0]} ({low}) is above --{_BREADTHS[1]} ({high})")
        for name, number in zip(_BREADTHS, (low, high), strict=True):
            self.ask(name, number)

    def drop_speculation_without_its_guesser(self) -> None:
        """Whatever says how to guess is of no use, or stops the server, where what guesses is left out."""
        heads = [key for key in map(self.key, (_ALGORITHM, _DRAFT)) if key in self.words]
        if not (missing := [self.shown(key) for key in heads if self.words[key] is None]):
            return
        along = [key for key in self.words if key.startswith("speculative-")]
        others = [self.shown(key) for key in along if self.shown(key) not in missing]
        self.warnings.append(f"this SGLang has no {' and no '.join(missing)}: started without speculative decoding"
                             + (f" ({', '.join(others)} left out too)" if others else ""))
        self.take_away(*along)

    def drop_broken(self, group: Group) -> None:
        asked = [key for key in map(self.key, group.names) if key in self.words]
        missing = [key for key in map(self.key, group.required) if key not in self.words]
        if asked and missing:
            raise LaunchRefused(f"{_flags(asked)} without {_flags(missing)}: they go together")
        unknown = [key for key in asked if self.words[key] is None]
        if unknown and len(asked) > 1:
            self.warnings.append(f"this SGLang has no {_flags(unknown)}: started without {_flags(asked)}, which go "
                                 "together")
            self.take_away(*asked)

    def drop_unknown(self) -> None:
        names = [option.name for option in self.known.options]
        for key in [key for key, word in self.words.items() if word is None]:
            like = "." if key in self.sure else did_you_mean(f"--{key}", names)
            self.warnings.append(f"this SGLang has no {self.shown(key)}: started without it{like}")
            self.take_away(key)

    def shown(self, key: str) -> str:
        """The flag for a message, with its value where it is the value that this SGLang lacks."""
        lacking = self.words[key] is None and self.known.find(key, whole=True)
        return f"--{key}={self.values[key]}" if lacking else f"--{key}"


def _word(name: str, value: Value, option: Option, negated: bool) -> str | None:
    """One element of argv; None for what is switched off by its absence."""
    off = next(iter(option.negatives), None)
    flag = off if negated else option.name
    if value is False:
        return None if negated else off
    if value is True:
        if option.value == "required":
            raise LaunchRefused(f"flag {name}: {flag} wants a value{_among(option)}; true is for flags without one")
        return flag
    if option.value == "none":
        raise LaunchRefused(f"flag {name}: {flag} takes no value, and {value!r} was given; say true or false")
    if (chosen := _choice(option, value)) is None:
        close = did_you_mean(str(value), list(option.choices or ()))
        raise LaunchRefused(f"flag {name}: {flag} cannot be {value!r}{close if close != '.' else ';'} It is one of "
                            f"{', '.join(option.choices or ())}.")
    return f"{flag}={chosen}"


def _choice(option: Option, value: Value) -> str | None:
    """The value as this option spells it; None where it is none of its choices."""
    text = str(value)
    if option.choices is None or text in option.choices:
        return text
    return next((choice for choice in option.choices if choice.lower() == text.strip().lower()), None)


def _among(option: Option) -> str:
    return f" ({', '.join(option.choices)})" if option.choices else ""


def _flags(keys: Iterable[str]) -> str:
    return ", ".join(f"--{key}" for key in keys)
