"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tasks.context import Context

ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file, such as configs/demo.yaml.")]
SetOption = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY.PATH=VALUE", help="Override one key of the config; may be given many times. Example: "
    "--set scoring.top_k=2 --set 'seeds=[0, 1, 2]'.")]
RunOption = Annotated[str | None, typer.Option("--run", metavar="NAME", help="Override the run's name.")]
MismatchOption = Annotated[bool, typer.Option(
    "--allow-mismatch", help="Use servers given by url although they are not what the config expects; what differs is "
    "recorded in run.json.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or its folder or URL.")]
RunsDir = Annotated[str, typer.Option(help="Where runs live.")]


def with_mismatch(sets: list[str] | None, allow: bool) -> list[str]:
    """The overrides, with that of --allow-mismatch."""
    return [*(sets or []), *(["allow_mismatch=true"] if allow else [])]


def open_run_named(name: str, runs_dir: str) -> Context:
    """The context of a run that is named, or whose folder or URL is given. Raises InputError."""
    from tasks.context import Context
    from tasks.core.store import Store

    return Context(name if "/" in name or Store(name).exists("run.json") else f"{runs_dir}/{name}")
