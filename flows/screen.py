"""The live part of the terminal: a bar for each stage, and below it the servers while they work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Group
from rich.text import Text

from flows import words
from tasks.core.progress import ServerLoad, StageProgress

Look = Callable[[], tuple[list[StageProgress], list[ServerLoad]]]
Cell = tuple[str, str]
"""A text and its style."""

_MOST, _NAMED = 8, 4
_LINGER_S = 3.0
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_COLOURS = {"up": "green", "down": "red", "unfit": "red", "left": "dim"} | dict.fromkeys(
    ("joining", "checking", "trial"), "yellow")
_ASCII = str.maketrans({"━": "-", "╸": "-", "●": "*", "✓": "v", "…": "."} | dict.fromkeys(_SPINNER, "*"))


class View:
    """What is on the screen; `draw` is called a few times a second."""

    def __init__(self, look: Look, clock: Callable[[], float] = time.monotonic) -> None:
        self._look, self._clock = look, clock
        self._shown_until = 0.0
        self._closed = False

    def close(self) -> None:
        """The bars stay on the screen, the servers go."""
        self._closed = True

    def draw(self) -> Screen:
        """The picture of this moment. Between two shards the servers stay for a while: nothing shall flicker."""
        stages, servers = self._look()
        now = self._clock()
        if words.is_shown(servers):
            self._shown_until = now + _LINGER_S
        working = any(s.done < s.total for s in stages)
        shown = working and now < self._shown_until and not self._closed
        return Screen(stages, servers if shown else [], _SPINNER[int(now * 8) % len(_SPINNER)])


class Screen:
    """One picture, for whatever width there is."""

    def __init__(self, stages: Sequence[StageProgress], servers: Sequence[ServerLoad], spinner: str = "⠋") -> None:
        self._stages, self._servers, self._spinner = stages, servers, spinner

    def __rich_console__(self, console, options):  # type: ignore[no-untyped-def]
        lines = stage_lines(self._stages, options.max_width, self._spinner)
        if self._servers:
            lines += [Text(), *server_lines(self._servers, options.max_width)]
        if options.ascii_only:
            for line in lines:
                line.plain = line.plain.translate(_ASCII)
        yield Group(*lines)


def stage_lines(stages: Sequence[StageProgress], width: int, spinner: str = "⠋") -> list[Text]:
    """A line each; what does not fit beside a bar stands below it."""
    length = 28 if width >= 120 else 16
    rows: list[list[list[Cell]]] = []
    notes: list[list[Cell]] = []
    for s in stages:
        finished = s.done >= s.total
        mark = ("✓", "green") if finished else (spinner, "cyan") if s.made or s.already else (" ", "")
        rate, tokens, left = words.pace(s)
        share = s.done / s.total if s.total else 1.0
        bar = _bar(share, length, "green" if finished else "cyan")
        rows.append([[mark], [(words.TITLES.get(s.name, s.name), "")], bar, [(f"{s.done:,}/{s.total:,}", "")],
                     [(rate, "dim")], [(tokens, "dim")], [(left, "yellow" if s.idle_s is not None else "dim")]])
        notes.append(_joined([(words.failures(s.failures), "yellow"), (words.asides(s), "dim")]))
    return _aligned(rows, notes, "llllrrr", width, indent=2)


def server_lines(servers: Sequence[ServerLoad], width: int) -> list[Text]:
    """A line for each server of a small fleet; of a large one the worst, and a line for the rest."""
    named, rest = words.troubled(servers, _MOST, _NAMED)
    roles = len({s.role for s in servers}) > 1
    rows: list[list[list[Cell]]] = [
        [[(text, "dim")] for text in ("", "server", *(("role",) if roles else ()), "", "in flight", "", "answers",
                                      "tokens", "latency")]]
    notes: list[list[Cell]] = [[]]
    for s in named:
        colour = _COLOURS.get(s.state, "")
        quiet = s.state in ("down", "left", "unfit")
        rows.append([
            [("●", colour)], [(_cropped(words.address(s), 36), "")], *([[(s.role, "dim")]] if roles else []),
            [(s.state, colour)], _bar(s.in_flight / s.limit if s.limit else 0.0, 8, "cyan"),
            [("" if quiet else f"{s.in_flight:,}/{s.limit:,}", "")],
            [(words.per_second(s.per_s) if s.per_s else "", "dim")],
            [(f"{words.short(s.tokens_per_s)} tok/s" if s.tokens_per_s else "", "dim")],
            [("" if s.latency_s is None or quiet else f"{s.latency_s:.2f} s", "dim")]])
        why = (s.note or "", "dim" if s.state == "up" else colour)
        notes.append(_joined([(words.failures(s.failures), "yellow"), why]))
    lines = _aligned(rows, notes, "llllrrrr" if not roles else "lllllrrrr", width, indent=4)
    if rest:
        more = Text.assemble(("  and ", "dim"), (words.fleet(rest), "dim"))
        lines.append(_fitted(more, width))
    return lines


def _bar(share: float, length: int, colour: str) -> list[Cell]:
    halves = round(2 * length * min(1.0, max(0.0, share)))
    full = "━" * (halves // 2) + "╸" * (halves % 2)
    return [(full, colour), ("━" * (length - len(full)), "grey30")]


def _joined(parts: list[Cell]) -> list[Cell]:
    """Parts with commas between those that are there."""
    out: list[Cell] = []
    for text, style in parts:
        if text:
            out += [*([(", ", "dim")] if out else []), (text, style)]
    return out


def _aligned(rows: list[list[list[Cell]]], notes: list[list[Cell]], sides: str, width: int, indent: int) -> list[Text]:
    """Columns of equal width, two spaces apart; a note follows its row, or stands below it where it is too long."""
    sizes = [max(_size(row[n]) for row in rows) for n in range(len(sides))] if rows else []
    lines = []
    for row, note in zip(rows, notes, strict=True):
        line = Text(no_wrap=True)
        for n, (cell, size) in enumerate(zip(row, sizes, strict=True)):
            if not size:
                continue
            gap = " " * (size - _size(cell))
            line.append_text(Text.assemble("" if not n else " " if n == 1 else "  ",
                                           gap if sides[n] == "r" else "", *cell, gap if sides[n] == "l" else ""))
        rest = Text.assemble(*note)
        if len(line) + 2 + len(rest) <= width:
            line.append_text(Text.assemble("  ", rest))
            rest = Text()
        line.rstrip()
        lines.append(_fitted(line, width))
        if rest:
            lines.append(_fitted(Text.assemble(" " * indent, rest), width))
    return lines


def _size(cell: list[Cell]) -> int:
    return sum(len(text) for text, _ in cell)


def _fitted(line: Text, width: int) -> Text:
    line.no_wrap = True
    line.truncate(width, overflow="ellipsis")
    return line


def _cropped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width - 13]}…{text[-12:]}"
