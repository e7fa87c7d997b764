"""What a person at the terminal sees while a run works, and after."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from tasks.core.progress import StageProgress

console = Console(stderr=True, highlight=False)
out = Console(highlight=False)
if not out.is_terminal:
    out.width = max(out.width, 160)  # a pipe has no width: let each row be a line

_PLAIN_EVERY_S = 10.0
_TITLES = {"generate": "generate", "verify": "verify", "quality": "judge", "diversity": "diversity",
           "verifiers": "verifiers", "score": "score"}


def set_up_logging(debug: bool) -> None:
    """Winnow's warnings on stderr (everything with --debug)."""
    logger = logging.getLogger("winnow")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    handler = RichHandler(console=console, show_path=debug, show_time=debug, markup=False)
    handler.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.handlers = [handler]


def notice(text: str) -> None:
    """One line about what happens now."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]  {escape(text)}")


def describe(stage: StageProgress) -> str:
    """Rate, time left and the stage's own counters."""
    parts = []
    made = stage.done - stage.already
    if made:
        parts.append(f"{stage.rate:.1f} {stage.unit}/s")
    tokens = stage.counts.get("tokens", 0)
    if tokens:
        parts.append(f"{tokens / stage.seconds:.0f} tok/s")
    if stage.done < stage.total and stage.seconds_left is not None:
        minutes, seconds = divmod(int(stage.seconds_left), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    parts += [f"{n} {name}" for name, n in stage.counts.items() if n and name != "tokens"]
    if stage.already:
        parts.append(f"{stage.already} stood already")
    return ", ".join(parts)


@contextmanager
def watching(url: str) -> Iterator[None]:
    """Progress bars of the run at `url` while the block runs; lines now and then where there is no terminal."""
    from tasks.context import _open  # the contexts of this process, by run

    def stages() -> list[StageProgress]:
        ctx = _open.get(url)
        return ctx.progress.snapshot() if ctx else []

    stop = threading.Event()
    watcher = threading.Thread(target=_bars if console.is_terminal else _lines, args=(stages, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=2)


def _bars(stages, stop: threading.Event) -> None:  # type: ignore[no-untyped-def]
    bars = Progress(SpinnerColumn(finished_text="[green]✓[/green]"), TextColumn("{task.description:10}"),
                    BarColumn(bar_width=28), MofNCompleteColumn(), TextColumn("[dim]{task.fields[about]}[/dim]"),
                    console=console)
    ids: dict[str, int] = {}
    with Live(bars, console=console, refresh_per_second=4, transient=False):
        while True:
            last = stop.is_set()
            for s in stages():
                if s.name not in ids:
                    ids[s.name] = bars.add_task(_TITLES.get(s.name, str(s.name)), total=s.total, about="")
                bars.update(ids[s.name], total=s.total, completed=s.done, about=describe(s))  # type: ignore[arg-type]
            if last:
                return
            stop.wait(0.25)


def _lines(stages, stop: threading.Event) -> None:  # type: ignore[no-untyped-def]
    shown: dict[str, int] = {}
    while True:
        last = stop.wait(_PLAIN_EVERY_S)
        for s in stages():
            if shown.get(s.name) != s.done:
                shown[s.name] = s.done
                notice(f"{_TITLES.get(s.name, s.name)}: {s.done} of {s.total} {s.unit}  {describe(s)}")
        if last:
            return


def table(title: str | None, *columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """A table in the house's style; `whole` columns are never broken."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold",
                        no_wrap=column in whole)
    return made
