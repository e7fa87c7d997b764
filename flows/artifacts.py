"""What the Prefect UI shows of a run while it works: one progress bar and one table of servers, kept up to date."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from flows import words
from tasks.context import Context
from tasks.core.progress import ServerLoad, StageProgress

log = logging.getLogger("winnow.artifacts")

_PROGRESS_EVERY_S, _SERVERS_EVERY_S = 5.0, 10.0


def artifact_key(*parts: str) -> str:
    """The parts as Prefect wants an artifact's key: lower case, digits and dashes."""
    return "".join(c if c.isalnum() else "-" for c in "-".join(parts).lower())


class Shown:
    """The stages `names` and the servers of a run, in the UI. Create it in a flow; each artifact is one version."""

    def __init__(self, ctx: Context, names: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._ctx, self._names, self._clock = ctx, set(names), clock
        self._progress_id: Any = None
        self._servers_id: Any = None
        self._progress_next = self._servers_next = 0.0
        self._progress_key = artifact_key(ctx.config.run, *sorted(self._names))
        self._servers_key = artifact_key(ctx.config.run, "servers")
        self._answered_before = _answered(ctx.progress.servers())

    def update(self, last: bool = False) -> None:
        """Create or refresh what is due; `last`: all of it."""
        now = self._clock()
        if last or now >= self._progress_next:
            self._progress_next = now + _PROGRESS_EVERY_S
            _quietly(self._write_progress)
        if last or now >= self._servers_next:
            self._servers_next = now + _SERVERS_EVERY_S
            _quietly(self._write_servers)

    def _write_progress(self) -> None:
        stages = [s for s in self._ctx.progress.snapshot() if s.name in self._names]
        total = sum(s.total for s in stages)
        share = 100.0 * sum(s.done for s in stages) / total if total else 0.0
        text = progress_text(stages)
        if self._progress_id is None:
            self._progress_id = create_progress_artifact(progress=share, key=self._progress_key, description=text)
        else:
            update_progress_artifact(artifact_id=self._progress_id, progress=share, description=text)

    def _write_servers(self) -> None:
        servers = self._ctx.progress.servers()
        if self._servers_id is None and not words.is_shown(servers) and _answered(servers) == self._answered_before:
            return  # this flow has asked none
        rows, text = server_rows(servers), words.fleet(servers)
        if self._servers_id is None:
            self._servers_id = create_table_artifact(table=rows, key=self._servers_key, description=text)
        else:  # Prefect has an updater for progress and images alone
            get_client(sync_client=True).update_artifact(
                self._servers_id, ArtifactUpdate(data=json.dumps(rows, allow_nan=False), description=text))


def progress_text(stages: Iterable[StageProgress]) -> str:
    """Markdown: a line for each stage."""
    lines = [f"- **{words.TITLES.get(s.name, s.name)}** {s.done:,} of {s.total:,} {s.unit}"
             f"{f' ({about})' if (about := words.describe(s)) else ''}" for s in stages]
    return "\n".join(lines) or "starting"


def server_rows(servers: Sequence[ServerLoad]) -> list[dict[str, Any]]:
    """A row for each server; a cell without a value is empty."""
    roles = len({s.role for s in servers}) > 1
    return [{
        "server": s.url, **({"role": s.role} if roles else {}), "state": s.state,
        "in flight": f"{s.in_flight:,}/{s.limit:,}", "answered": f"{s.done:,}",
        "answers": words.per_second(s.per_s) if s.per_s else "",
        "tokens": f"{words.short(s.tokens_per_s)} tok/s" if s.tokens_per_s else "",
        "latency": "" if s.latency_s is None else f"{s.latency_s:.2f} s",
        "failed attempts": words.failures(s.failures), "note": s.note or "",
    } for s in servers]


def _answered(servers: Iterable[ServerLoad]) -> int:
    return sum(s.done + sum(s.failures.values()) for s in servers)


def _quietly(write: Callable[[], None]) -> None:
    """A UI that can't be written to must not stop the run."""
    try:
        write()
    except Exception as error:
        log.debug("artifact: %s", error)
