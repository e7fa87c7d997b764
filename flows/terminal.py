"""What a person at the terminal sees while a run works, and after."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from flows import words
from flows.screen import Look, View
from tasks.core.config_generation import RoleLessKey
from tasks.core.progress import ServerLoad, StageProgress

console = Console(stderr=True, highlight=False)
out = Console(highlight=False)
if not out.is_terminal:
    out.width = max(out.width, 160)  # a pipe has no width: let each row be a line

_PLAIN_EVERY_S = 10.0


class _Told(logging.Handler):
    """Shows the log's lines that are meant for the terminal too (`extra={"shown": True}`), above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "shown", False):
            console.print(f"[dim]{time.strftime('%H:%M:%S')}  {escape(record.getMessage())}[/dim]", soft_wrap=True)


def set_up_logging(debug: bool) -> None:
    """Winnow's warnings on stderr (everything with --debug), and what is marked as shown."""
    logger = logging.getLogger("winnow")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    handler = RichHandler(console=console, show_path=debug, show_time=debug, markup=False)
    handler.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.handlers = [handler] if debug else [handler, _Told(logging.INFO)]
    warnings.simplefilter("always", RoleLessKey)  # Python hides deprecations, and whoever wrote the key is here
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, RoleLessKey):
            logger.warning("%s", message)
        else:
            shown(message, category, *rest, **more)

    warnings.showwarning = show


def notice(text: str) -> None:
    """One line about what happens now."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim]  {escape(text)}", soft_wrap=True)  # paths stay whole


@contextmanager
def watching(url: str) -> Iterator[None]:
    """Progress bars of the run at `url` while the block runs; lines now and then where there is no terminal."""
    from tasks.context import _open  # the contexts of this process, by run

    def look() -> tuple[list[StageProgress], list[ServerLoad]]:
        ctx = _open.get(url)
        return (ctx.progress.snapshot(), ctx.progress.servers()) if ctx else ([], [])

    if console.is_terminal:
        view = View(look)
        with Live(get_renderable=view.draw, console=console, refresh_per_second=4):
            try:
                yield
            finally:
                view.close()
        return
    stop = threading.Event()
    watcher = threading.Thread(target=_lines, args=(look, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=2)


def _lines(look: Look, stop: threading.Event) -> None:
    said: dict[str, object] = {}  # by what is told of: what was last told; nothing before the first unit

    def say(what: str, news: object, text: str) -> None:
        if said.get(what, 0) != news:
            said[what] = news
            notice(text)

    while True:
        last = stop.wait(_PLAIN_EVERY_S)
        stages, servers = look()
        for s in stages:
            title = words.TITLES.get(s.name, s.name)
            say(s.name, s.done, f"{title}: {s.done:,} of {s.total:,} {s.unit}  {words.describe(s)}")
        if words.is_shown(servers) and not last:
            away = [f"{words.address(s)} {s.state}{f' ({s.note})' if s.note else ''}"
                    for s in words.troubled(servers, 3, 3)[0] if s.state not in ("up", "left")]
            text = "; ".join([words.fleet(servers), *away])
            say("servers", text, f"servers: {text}")
        if last:
            return


def table(title: str | None, *columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> Table:
    """A table in the house's style; `whole` columns are never broken."""
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold",
                        no_wrap=column in whole)
    return made
