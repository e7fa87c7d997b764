"""`winnow servers ...`: start, probe and stop the servers of a config; let servers join and leave a run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flows import terminal
from flows.options import ConfigArg, MismatchOption, RunArg, RunsDir, SetOption, open_run_named, with_mismatch
from tasks.core.errors import InputError, UnreachableError
from tasks.core.resolve import load_config, recorded_run

if TYPE_CHECKING:
    from tasks.context import Context
    from tasks.core.config import RunConfig
    from tasks.core.heuristics import Heuristic

servers_app = typer.Typer(no_args_is_help=True, help="Start, probe and stop the servers of a config; let servers join "
                                                     "and leave a run.")

UrlArg = Annotated[str, typer.Argument(metavar="URL", help="The server's address, such as http://10.0.0.3:30000.")]


class Role(StrEnum):
    """What a server does in a run."""

    generator = "generator"
    judge = "judge"


@servers_app.command("up")
def servers_up(config: ConfigArg, sets: SetOption = None) -> None:
    """Start the servers that the config launches and leave them running; runs then use them.

    One that runs already stays if it is what the config asks for; one that is not is stopped and started anew.
    """
    from flows.servers import up

    resolved, heuristics = _resolved(config, sets)
    started = up(resolved, heuristics, terminal.notice)
    if not started:
        terminal.out.print("the config launches no servers: its servers are urls")
    for record in started:
        terminal.out.print(f"{record.role}  {record.url}  process {record.pid}  log {record.log}")


@servers_app.command("check")
def servers_check(config: ConfigArg, sets: SetOption = None, allow_mismatch: MismatchOption = False) -> None:
    """Ask each server of the config what it is, and show in what it is not what the config asks for.

    Exit code 2 where a server given by url differs (without --allow-mismatch), 4 where none answers.
    """
    from flows.probing import probe
    from tasks.serving.guard.guard import columns, expected, table

    found = probe(*_resolved(config, with_mismatch(sets, allow_mismatch)))
    shown = terminal.table(None, "entry", "server", "", "model", "seeds", "custom processors", "SGLang",
                           whole=("entry", "server"))
    for server in found:
        facts, colour = server.facts, "red" if server.refused else "yellow" if server.differences else "default"
        shown.add_row(server.seat.key, server.url or "-", f"[{colour}]{escape(server.state)}[/{colour}]", *(
            [escape(facts.model_path or "?"), "honoured" if facts.honours_seeds else "ignored",
             "yes" if facts.custom_processors else "no", str(facts.info.get("version", "?"))] if facts else [""] * 4))
    terminal.out.print(shown)
    for server in found:
        if server.differences:
            mend = "expect" if server.seat.url else "none"
            different = terminal.table(f"\n[bold]{server.seat.key}[/bold]  {server.url}", *columns(mend),
                                       whole=("setting",))
            for row in table(server.differences, mend):
                different.add_row(*map(escape, row))
            terminal.out.print(different)
            if server.seat.url and (whole := expected(server.differences, server.seat.expect)):
                terminal.out.print(f"all at once: {escape(whole)}", soft_wrap=True)
        for note in server.notes:
            terminal.out.print(f"{server.seat.key}: {escape(note)}", soft_wrap=True)
    if not any(server.facts for server in found):
        raise UnreachableError("no server of this config answers")
    if wrong := [server.seat.key for server in found if server.refused]:
        raise InputError(f"{', '.join(wrong)}: a run would not use {'it' if len(wrong) == 1 else 'them'}")


def _resolved(config: Path, sets: list[str] | None) -> tuple[RunConfig, list[Heuristic]]:
    """The config, and the heuristics that its servers are for."""
    from flows.prepare import resolve_sampling

    resolved, origins = load_config(config, sets)
    return resolved, resolve_sampling(resolved, origins, recorded_run(config)).heuristics


@servers_app.command("down")
def servers_down(config: ConfigArg, sets: SetOption = None) -> None:
    """Stop the servers that Winnow started on this machine, and only those."""
    from flows.servers import down

    resolved, _ = load_config(config, sets)
    stopped = down(resolved)
    for record in stopped:
        terminal.out.print(f"stopped the {record.role} server at {record.url} (process {record.pid})")
    if not stopped:
        terminal.out.print("no server of ours is running")


@servers_app.command("join")
def servers_join(
    run_name: RunArg, url: UrlArg,
    role: Annotated[Role | None, typer.Option(
        help="What it shall do; without it, generate, and judge too where the config has no servers for that.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(
        min=1, max=4096, help="Most requests in flight there; found out while running where not given.")] = None,
    runs_dir: RunsDir = "data/runs",
) -> None:
    """Let a server join a run, also one that is being worked on; it is asked first whether the run can use it."""
    from flows.join import join

    ctx = open_run_named(run_name, runs_dir)
    for note in join(ctx, url, role and role.value, max_in_flight):
        terminal.notice(note)
    _show_servers(ctx)


@servers_app.command("leave")
def servers_leave(
    run_name: RunArg, url: UrlArg,
    role: Annotated[Role | None, typer.Option(help="What it shall do no more; without it, all it did.")] = None,
    runs_dir: RunsDir = "data/runs",
) -> None:
    """Let a server leave a run; what it has in flight is waited for, and it is not stopped."""
    from flows.join import leave

    ctx = open_run_named(run_name, runs_dir)
    for note in leave(ctx, url, role and role.value):
        terminal.notice(note)
    _show_servers(ctx)


def _show_servers(ctx: Context) -> None:
    """Who is in the run now."""
    from flows.join import servers

    shown = terminal.table(f"[bold]{escape(ctx.config.run)}[/bold]", "role", "server", "most in flight", "model", "",
                           right=("most in flight",), whole=("server",))
    for s in servers(ctx):
        shown.add_row(s["role"], escape(s["url"]), str(s["max_in_flight"] or "found out"),
                      escape(s["model"] or "never answered yet"), "joined" if s["joined"] else "")
    terminal.out.print(shown)
